"""The reports of the committed studies, drawn again from ``results.json`` and ``curves.csv`` as the package draws now.

    python results/reports.py                # every report
    python results/reports.py imdb amazon    # those of these folders

Notes on the data, attention maps and alignment kernels are taken over from the report that is there: they were made
from the data and from trained models, neither of which is committed. There are no links to folders of runs.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from html import unescape
from pathlib import Path

from learning_speed import FOLDER, guess, read_curves

from better_attention.lab.analysis import findings, learning_speed
from better_attention.lab.analysis.study import Study
from better_attention.lab.analysis.summary import summarise
from better_attention.lab.report.html import write_report
from better_attention.lab.tasks.catalogue import TASKS

DRAWN = (
    "results/reports.py drew this page from results.json and curves.csv. Attention maps and pictures of W_A are those "
    "of the report that the comparison wrote, since the trained models are not in the repository"
)
KEPT = {"maps": "Attention maps", "kernels": "Alignment kernels"}
"""Sections that are taken over: their mark in the page, and how their titles begin."""


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = sorted(path.parent.name for path in FOLDER.glob("*/report.html"))
    parser.add_argument("study", nargs="*", choices=[*known, []], metavar="STUDY", help=f"of {', '.join(known)}")
    for name in parser.parse_args().study or known:
        page = FOLDER / name / "report.html"
        kept = pictures(page)
        write_report(study(FOLDER / name), page)
        page.write_text(beside(page.read_text("utf-8"), kept), "utf-8")


def study(folder: Path) -> Study:
    """What the files of a folder say."""
    records = json.loads((folder / "results.json").read_text("utf-8"))
    curves = read_curves(folder / "curves.csv")
    first = records[0]
    task = TASKS[first["task"]](first["scale"])
    threshold = learning_speed.find_threshold(curves, guess(first), fixed=task.threshold)
    timed = learning_speed.timed(records, curves, threshold)
    made_again = set(findings.gaps(summarise(timed))) | {DRAWN}
    return Study(
        task={"name": task.name, "title": task.title, "source": task.source, "settings": first["settings"]},
        records=timed,
        curves=curves,
        maps=[],
        alignments=[],
        command="",  # those of the runs are shown; what drew the page stands in the note
        commit=records[-1]["commit"],
        notes=[*(note for note in notes(folder / "report.html") if note not in made_again), DRAWN],
        threshold=threshold,
        folders={},
    )


def beside(text: str, kept: Mapping[str, str]) -> str:
    """A page with the sections ``kept`` behind its notes, and their entries in the table of contents."""
    behind = next(mark for mark in ("angle", "runs", "made") if f'<section id="{mark}">' in text)
    section, entry = f'<section id="{behind}">', f'<li><a href="#{behind}">'
    entries = "".join(f'<li><a href="#{mark}">{KEPT[mark]}</a></li>\n' for mark in kept)
    return text.replace(section, "".join(kept.values()) + section).replace(entry, entries + entry)


def pictures(page: Path) -> dict[str, str]:
    """The sections with maps and kernels, in a fold-out."""
    text = page.read_text("utf-8")
    found = {}
    for mark, title in KEPT.items():
        section = re.search(rf"<section[^>]*>\s*(<h2>{title}.*?</h2>)(.*?)</section>", text, re.DOTALL)
        if section is None:
            continue
        head, body = section.groups()
        if "<details>" not in body:
            body = f"\n<details><summary>pictures of trained models</summary>{body}</details>\n"
        found[mark] = f'<section id="{mark}">\n{head}{body}</section>\n\n'
    return found


def notes(page: Path) -> list[str]:
    """The notes of a report, as they were before they became markup."""
    section = re.search(r"<h2>Notes</h2>\s*<ul>(.*?)</ul>", page.read_text("utf-8"), re.DOTALL)
    found = re.findall(r"<li>(.*?)</li>", section[1], re.DOTALL) if section else []
    lowered = (re.sub(r"<sub>(.*?)</sub>", r"_\1", note) for note in found)
    return [unescape(re.sub(r"<[^>]*>", "", note)) for note in lowered]


if __name__ == "__main__":
    main()
