"""The reports of the committed studies, drawn again from ``results.json`` and ``curves.csv`` as the package draws now.

    python results/reports.py                # every report
    python results/reports.py imdb amazon    # those of these folders

Notes on the data are taken over from the report that is there, because they were made from the data itself. Attention
maps and alignment kernels need the trained models, which are not committed: the reports are without them, and without
links to folders of runs.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from html import unescape
from pathlib import Path

from learning_speed import FOLDER, guess, read_curves

from better_attention.lab.analysis import findings, learning_speed
from better_attention.lab.analysis.study import Study
from better_attention.lab.analysis.summary import summarise
from better_attention.lab.report.html import write_report
from better_attention.lab.tasks.catalogue import TASKS

WITHOUT = (
    "results/reports.py drew this page from results.json and curves.csv: attention maps and pictures of W_A need the "
    "trained models, which are not in the repository"
)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = sorted(path.parent.name for path in FOLDER.glob("*/report.html"))
    parser.add_argument("study", nargs="*", choices=[*known, []], metavar="STUDY", help=f"of {', '.join(known)}")
    for name in parser.parse_args().study or known:
        write_report(study(FOLDER / name), FOLDER / name / "report.html")


def study(folder: Path) -> Study:
    """What the files of a folder say, without pictures of models."""
    records = json.loads((folder / "results.json").read_text("utf-8"))
    curves = read_curves(folder / "curves.csv")
    first = records[0]
    task = TASKS[first["task"]](first["scale"])
    threshold = learning_speed.find_threshold(curves, guess(first), fixed=task.threshold)
    timed = learning_speed.timed(records, curves, threshold)
    made_again = set(findings.gaps(summarise(timed))) | {WITHOUT}
    return Study(
        task={"name": task.name, "title": task.title, "source": task.source, "settings": first["settings"]},
        records=timed,
        curves=curves,
        maps=[],
        alignments=[],
        command="",  # those of the runs are shown; what drew the page stands in the note
        commit=records[-1]["commit"],
        notes=[*(note for note in notes(folder / "report.html") if note not in made_again), WITHOUT],
        threshold=threshold,
        folders={},
    )


def notes(page: Path) -> list[str]:
    """The notes of a report, as they were before they became markup."""
    section = re.search(r"<h2>Notes</h2>\s*<ul>(.*?)</ul>", page.read_text("utf-8"), re.DOTALL)
    found = re.findall(r"<li>(.*?)</li>", section[1], re.DOTALL) if section else []
    lowered = (re.sub(r"<sub>(.*?)</sub>", r"_\1", note) for note in found)
    return [unescape(re.sub(r"<[^>]*>", "", note)) for note in lowered]


if __name__ == "__main__":
    sys.exit(main())
