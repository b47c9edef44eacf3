"""The report of a comparison: one HTML page that needs no other file, no script and no network."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jinja2

from better_attention.lab.analysis import advice, findings, learning_speed, summary
from better_attention.lab.analysis.study import Study
from better_attention.lab.analysis.summary import Column, Row
from better_attention.lab.files import write_atomic
from better_attention.lab.report import gallery, heatmaps, map_gallery
from better_attention.lab.report.forest import forest
from better_attention.lab.report.page import template
from better_attention.lab.report.scatter import scatter
from better_attention.lab.report.style import MARKER_PATHS, look
from better_attention.lab.runs.name import RunName

PICTURE_ROOM = 2_400_000
"""Characters of pictures on a page, so that it stays below 3 MB and opens at once on a phone."""


def write_report(study: Study, path: str | Path) -> None:
    """Write the report of ``study`` to ``path`` (``OUT/report.html``), atomically.

    The page begins with which mechanism to use and how sure that is; then come the speed of learning, the results
    (beside the paper's numbers, where it has the task), a forest plot and the tests of the differences to standard,
    mean ranks, results over the number of heads, attention maps, pictures of W_A, the weights of both scores over the
    angle between query and key, every run, setting, notes, command, commit and versions. Text of the study is escaped
    and cut at 2,000 characters. The page's own policy forbids scripts and loads nothing but ``data:``; links lead to
    its sections, to the folders of the runs and to the papers. Pictures beyond :data:`PICTURE_ROOM` are left out, and
    the page says how many.

    Raises:
        ValueError: records that :func:`better_attention.lab.analysis.summary.summarise` cannot read.
    """
    write_atomic(path, render(study))


def render(study: Study, picture_room: int = PICTURE_ROOM) -> str:
    """The report of ``study`` as HTML text; pictures of more than ``picture_room`` characters are left out."""
    rows = summary.summarise(study.records)
    columns = summary.by_importance(summary.columns_of(rows))
    main = [column for column in columns if column.tested]
    run_columns = _run_columns(columns)
    album = gallery.Album(picture_room)
    compared = [column for column in summary.compared_columns(rows) if column.tested]
    # Small and about everything first: what finds no room is the last of the maps and kernels.
    ablation_names, ablation_panels = gallery.ablation(rows, album)
    expressive = any(row.score == "expressive" for row in rows)
    return _template().render(
        study=study,
        task=study.task,
        setting=_setting(study.task),
        rows=rows,
        main=main,
        costs=[column for column in columns if column.key in summary.COSTS],
        training=[column for column in columns if not column.tested and column.kind == "metric"],
        findings=findings.sentences(rows),
        **_advice(study, rows, columns),
        speed=learning_speed.lines(rows, study.records) if study.threshold else [],
        speed_sentences=findings.speed(rows, study.threshold) if study.threshold else [],
        links=_links(study),
        run_columns=run_columns,
        run_lines=_run_lines(study, run_columns),
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
        paper_columns=summary.by_importance(summary.against_paper(rows)),
        paper_value=summary.paper_value,
        curve_groups=gallery.curve_groups(study.curves, album),
        folds=map_gallery.folds(study.maps, album),
        kernels=map_gallery.kernels(study.alignments, album),
        left_out=album.left_out,
        bars={name: heatmaps.data_uri(heatmaps.scale_bar(name), "image/png") for name in _SCALES},
        commands=_commands(study),
        made_on=_made_on(study),
        waiting=findings.waiting(study.records),
    )


_SCALES = (heatmaps.SEQUENTIAL, heatmaps.DIVERGING)


@cache
def _template() -> jinja2.Template:
    speed = learning_speed
    return template(
        "report.html",
        look=look,
        marker_paths=MARKER_PATHS,
        told_epochs=speed.told,
        epochs_apart=speed.epochs_apart,
    )


def _advice(study: Study, rows: Sequence[Row], columns: Sequence[Column]) -> dict[str, object]:
    """What the template of the first section needs; empty lists and texts where there is nothing to advise on."""
    advised = advice.advised_column(columns)
    heads = advice.advised_heads(rows, advised) if advised else None
    if advised is None or heads is None:
        return {"advised": None, "answer": "", "cards": [], "scatter": None, "about_seeds": ""}
    block = [row for row in rows if row.heads == heads]
    found = advice.cards(block, study.records, advised)
    family = max((row.tests[advised.key].family for row in block if advised.key in row.tests), default=0)
    return {
        "advised": advised,
        "answer": advice.answer(found, advised, heads),
        "cards": found,
        "scatter": scatter(found, advised),
        "about_seeds": advice.about_seeds(family) if any(card.needed for card in found) else "",
    }


_FOLDER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
"""Names of run folders that are linked: a path with a separator would lead to another place."""


def _links(study: Study) -> dict[str, str]:
    """Name of a run -> the address of its folder, relative to the page."""
    return {run: f"{folder}/" for run, folder in study.folders.items() if _FOLDER.fullmatch(folder)}


def _run_columns(columns: Sequence[Column]) -> list[Column]:
    """What is shown of every single run."""
    return [column for column in columns if column.compared or column.key in ("epoch_seconds", "seconds_to_threshold")]


def _run_lines(study: Study, columns: Sequence[Column]) -> list[tuple[str, list[tuple[Column, float | None]]]]:
    """Name of each run and its numbers, None where it has none."""
    found = []
    for record in study.records:
        name = str(RunName.of_record(record))
        values = [(c, v if isinstance(v := record.get(c.key), int | float) else None) for c in columns]
        found.append((name, values))
    return found


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
        # Dates in ISO format and in UTC sort by time.
        facts["finished"] = {max(facts["finished"]): None}
    return {key: "; ".join(values) for key, values in facts.items()}
