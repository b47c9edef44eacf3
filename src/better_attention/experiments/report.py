"""The report of a comparison: one HTML page that needs no other file, no script and no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import jinja2
from markupsafe import Markup

from better_attention.experiments import gallery, pictures, summary
from better_attention.experiments.files import plain, write_atomic
from better_attention.experiments.looks import DARK, LIGHT, look
from better_attention.experiments.stats import number
from better_attention.experiments.study import Study

PICTURE_ROOM = 2_400_000
"""Characters of pictures on a page, so that it stays below 3 MB and opens at once on a phone."""


def write_report(study: Study, path: str | Path) -> None:
    """Write the report of ``study`` to ``path`` (``OUT/report.html``), atomically.

    The page holds the result table (beside the paper's numbers, where it has the task), differences to standard
    attention, learning curves, attention maps, pictures of W_A, setting, notes, command, commit and versions. Text of
    the study is escaped and cut at 2,000 characters, and the page's own policy forbids scripts and every address but
    ``data:``. Pictures beyond :data:`PICTURE_ROOM` are left out, and the page says how many.

    Raises:
        ValueError: records that :func:`better_attention.experiments.summary.summarise` cannot read.
    """
    write_atomic(path, render(study))


def render(study: Study) -> str:
    """The report of ``study`` as HTML text."""
    rows = summary.summarise(study.records)
    columns = summary.columns_of(rows)
    album = gallery.Album(PICTURE_ROOM)
    return _template().render(
        study=study,
        task=study.task,
        setting=_setting(study.task),
        rows=rows,
        columns=columns,
        findings=_findings(rows),
        gain_columns=[column for column in columns if column.key in ("test_accuracy", "test_loss", "test_bleu")],
        paper_columns=summary.against_paper(rows),
        paper_value=summary.paper_value,
        curve_groups=gallery.curve_groups(study.curves, album),
        inputs=gallery.inputs(study.maps, album),
        kernels=gallery.kernels(study.alignments, album),
        left_out=album.left_out,
        bars={name: pictures.data_uri(pictures.scale_bar(name), "image/png") for name in _SCALES},
        made_on=_made_on(study),
        light=LIGHT,
        dark=DARK,
    )


_SCALES = (pictures.SEQUENTIAL, pictures.DIVERGING)


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("better_attention.experiments"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Every value that is printed, wherever it stands, comes through here: no field can be forgotten.
        finalize=lambda value: value if isinstance(value, Markup) else plain(value),
    )
    environment.globals.update(look=look, number=number)
    return environment.get_template("report.html")


_SHOWN_ELSEWHERE = ("title", "source", "settings", "heads", "default_heads", "seeds")


def _setting(task: Mapping[str, object]) -> dict[str, object]:
    """The task's setting as name -> value, whether it came flat or below "settings"."""
    nested = task.get("settings")
    flat = {**task, **(nested if isinstance(nested, Mapping) else {})}
    return {
        str(key).replace("_", " "): ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
        for key, value in flat.items()
        if key not in _SHOWN_ELSEWHERE and value not in (None, (), [], "")
    }


def _findings(rows: Sequence[summary.Row]) -> list[str]:
    """One sentence a number of heads: which mechanism tests best, and how far that is from standard attention."""
    sentences = []
    for heads in sorted({row.heads for row in rows}):
        compared = [row for row in rows if row.heads == heads]
        best = [row for row in compared if row.ranks.get("test_accuracy") == 1]
        if not best or len(compared) < 2:
            continue
        accuracy, gain = best[0].estimates["test_accuracy"], best[0].gains.get("test_accuracy")
        sentence = (
            f"With {heads} head{'s' * (heads > 1)}, {' and '.join(row.mechanism for row in best)} "
            f"{'has' if len(best) == 1 else 'share'} the highest test accuracy, {accuracy.format(2)} % "
            f"({accuracy.n} seed{'s' * (accuracy.n > 1)})"
        )
        if gain is None or gain.half_width is None:
            sentences.append(f"{sentence}.")
            continue
        points = gain.format(2, sign=True)
        clear = "" if abs(gain.mean) > gain.half_width else ", which does not tell them apart"
        sentences.append(f"{sentence}: {points} points against standard{clear}.")
    return [
        sentence.replace(" ±", "\N{NO-BREAK SPACE}±").replace(" %", "\N{NO-BREAK SPACE}%") for sentence in sentences
    ]


def _made_on(study: Study) -> dict[str, str]:
    """Commits, devices, threads, versions and numbers of samples of the runs, each named once."""
    facts: dict[str, dict[str, None]] = {}
    for record in study.records:
        for key in ("commit", "device", "threads", "finished"):
            if record.get(key) is not None:
                facts.setdefault(key, {})[str(record[key])] = None
        for key in ("samples", "versions"):
            named = record.get(key)
            if isinstance(named, Mapping):
                facts.setdefault(key, {})[", ".join(f"{name} {value}" for name, value in named.items())] = None
    facts.setdefault("commit", {})[study.commit] = None
    if "finished" in facts:
        facts["finished"] = {max(facts["finished"]): None}
    return {key: "; ".join(values) for key, values in facts.items()}
