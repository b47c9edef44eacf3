"""The report of a comparison: one HTML page that needs no other file, no script and no network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jinja2

from better_attention.lab.analysis import findings, summary
from better_attention.lab.analysis.study import Study
from better_attention.lab.files import write_atomic
from better_attention.lab.report import gallery, heatmaps
from better_attention.lab.report.forest import forest
from better_attention.lab.report.page import template
from better_attention.lab.report.style import MARKER_PATHS, look

PICTURE_ROOM = 2_400_000
"""Characters of pictures on a page, so that it stays below 3 MB and opens at once on a phone."""


def write_report(study: Study, path: str | Path) -> None:
    """Write the report of ``study`` to ``path`` (``OUT/report.html``), atomically.

    The page holds findings in words, what is the paper's and what is ours, the result table (beside the paper's
    numbers, where it has the task), a forest plot and the tests of the differences to standard attention, mean ranks,
    results over the number of heads, learning curves, attention maps, pictures of W_A, the weights of both scores over
    the angle between query and key, setting, notes, command, commit and versions. Text of the study is escaped and cut
    at 2,000 characters, and the page's own policy forbids scripts and every address but ``data:``. Pictures beyond
    :data:`PICTURE_ROOM` are left out, and the page says how many.

    Raises:
        ValueError: records that :func:`better_attention.lab.analysis.summary.summarise` cannot read.
    """
    write_atomic(path, render(study))


def render(study: Study) -> str:
    """The report of ``study`` as HTML text."""
    rows = summary.summarise(study.records)
    columns = summary.columns_of(rows)
    # What the task is about comes first: accuracy where there is one, else BLEU.
    main = sorted((c for c in columns if c.tested), key=lambda c: c.key not in ("test_accuracy", "test_bleu"))
    album = gallery.Album(PICTURE_ROOM)
    compared = summary.compared_columns(rows)
    # Small and about everything first: what finds no room is the last of the maps and kernels.
    ablation_names, ablation_panels = gallery.ablation(rows, album)
    expressive = any(row.score == "expressive" for row in rows)
    return _template().render(
        study=study,
        task=study.task,
        setting=_setting(study.task),
        rows=rows,
        main=main,
        costs=[column for column in columns if not column.tested and column.kind != "metric"],
        training=[column for column in columns if not column.tested and column.kind == "metric"],
        findings=findings.sentences(rows),
        origin=findings.origin(str(study.task.get("name", "")), rows),
        notes=[*study.notes, *findings.gaps(rows)],
        standings=findings.standings(rows),
        ranked_heads=findings.shared_heads(rows),
        more_seeds=findings.more_seeds(rows, study.command),
        rank_columns=[column for column in columns if column.tested],
        compared=compared,
        forests=[drawn for column in compared if (drawn := forest(rows, column))],
        fewest=min((row.tests[c.key].difference.n for row in rows for c in compared if c.key in row.tests), default=0),
        ablation_names=ablation_names,
        ablation_panels=ablation_panels,
        angle_panels=gallery.angle_panels(album) if expressive else [],
        paper_columns=summary.against_paper(rows),
        paper_value=summary.paper_value,
        curve_groups=gallery.curve_groups(study.curves, album),
        inputs=gallery.inputs(study.maps, album),
        kernels=gallery.kernels(study.alignments, album),
        left_out=album.left_out,
        bars={name: heatmaps.data_uri(heatmaps.scale_bar(name), "image/png") for name in _SCALES},
        commands=_commands(study),
        made_on=_made_on(study),
        waiting=findings.waiting(study.records),
    )


_SCALES = (heatmaps.SEQUENTIAL, heatmaps.DIVERGING)


@cache
def _template() -> jinja2.Template:
    return template("report.html", shown=findings.shown, look=look, marker_paths=MARKER_PATHS)


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


@dataclass(frozen=True, slots=True)
class Command:
    """A command, the commit that it was given at, and how many of the runs it made."""

    command: str
    commit: str
    runs: int


def _commands(study: Study) -> list[Command]:
    """The commands that the runs came of, in the order of the runs, and the one that wrote the page."""
    named = [run for run in study.records if run.get("command")]
    made = Counter((str(run["command"]), str(run.get("commit", "unknown"))) for run in named)
    if study.command and study.command not in {command for command, _ in made}:
        made[study.command, study.commit] = 0
    return [Command(command, commit, runs) for (command, commit), runs in made.items()]


def _made_on(study: Study) -> dict[str, str]:
    """Commits, devices, threads, versions and numbers of samples of the runs, each named once."""
    facts: dict[str, dict[str, None]] = {}
    for record in study.records:
        sessions = record.get("sessions")
        for part in (record, *(sessions if isinstance(sessions, list) else ())):
            for key in ("commit", "device", "threads", "finished"):
                if part.get(key) is not None:
                    facts.setdefault(key, {})[str(part[key])] = None
        for key in ("samples", "versions"):
            named = record.get(key)
            if isinstance(named, Mapping):
                facts.setdefault(key, {})[", ".join(f"{name} {value}" for name, value in named.items())] = None
    facts.setdefault("commit", {})[study.commit] = None
    if "finished" in facts:
        facts["finished"] = {max(facts["finished"]): None}
    return {key: "; ".join(values) for key, values in facts.items()}
