"""How fast the mechanisms of the committed studies learned: the table in README.md, from ``curves.csv``.

    python results/learning_speed.py            # print it
    python results/learning_speed.py --write    # put it into README.md

It is the arithmetic of the report's section "Learning speed". A threshold is that of the task where it has one, else
90 % of the way from guessing to the mean of the best validation accuracies of standard. These runs were trained before
tasks had thresholds: what the means would be at 80 % and 95 % of the way stands beside them.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from better_attention.lab.analysis import learning_speed
from better_attention.lab.analysis.estimates import number
from better_attention.lab.analysis.learning_speed import epochs_apart, told
from better_attention.lab.analysis.paired import p_text
from better_attention.lab.analysis.study import Curve
from better_attention.lab.analysis.summary import summarise
from better_attention.lab.tasks.catalogue import TASKS

FOLDER = Path(__file__).resolve().parent
STUDIES = ("imdb", "mnist-flat", "mnist-paper", "mnist", "images", "images-equal-params", "translation", "amazon")
OTHERS = (0.8, 0.95)
"""Other thresholds, as shares of the way from guessing to standard's best."""
BEGIN, END = "<!-- learning speed: begin -->", "<!-- learning speed: end -->"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    if not parser.parse_args().write:
        print(table())
        return
    page = FOLDER / "README.md"
    before, rest = page.read_text("utf-8").split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}", "utf-8")


def table() -> str:
    """The whole table in Markdown."""
    head = (
        "| study, threshold | h | mechanism | epochs of each seed | mean | − standard | p (Holm) | | seconds "
        "| mean at 80 % | at 95 % |"
    )
    return "\n".join([head, "|" + "---|" * 11, *(line for study in STUDIES for line in rows(study))])


def rows(study: str) -> Iterator[str]:
    """The lines of one study."""
    records = json.loads((FOLDER / study / "results.json").read_text("utf-8"))
    curves = read_curves(FOLDER / study / "curves.csv")
    guessing = guess(records[0])
    fixed = TASKS[records[0]["task"]](records[0]["scale"]).threshold
    threshold = learning_speed.find_threshold(curves, guessing, fixed=fixed)
    rule = learning_speed.find_threshold(curves, guessing)
    if threshold is None or rule is None:
        raise SystemExit(f"{study}: there are no curves of standard.")
    way = (rule.accuracy - guessing) / learning_speed.SHARE
    name = f"{study}, {number(threshold.accuracy, 1)} %{'' if fixed is None else ' (the task’s)'}"
    timed = learning_speed.timed(records, curves, threshold)
    for place, line in enumerate(learning_speed.lines(summarise(timed), timed)):
        runs = [run for run, _ in line.by_seed]
        shown = [mean(epochs_of(runs, curves, guessing + share * way)) for share in OTHERS]
        seeds = ", ".join("never" if epochs is None else str(epochs) for _, epochs in line.by_seed)
        test = line.test
        p = p_text(test.corrected_p).removeprefix("p ") if test else ""
        cells = [
            *(name if place == 0 else "", line.row.heads, line.row.mechanism, seeds),
            mean([epochs for _, epochs in line.by_seed]),
            *(epochs_apart(test) if test else "", p, told(test.verdict) if test else ""),
            *(number(line.seconds.mean, 0) if line.seconds else "", *shown),
        ]
        yield f"| {' | '.join(map(str, cells))} |"


def epochs_of(runs: Sequence[str], curves: Mapping[str, Curve], accuracy: float) -> list[int | None]:
    """Epochs until each run reached a validation accuracy; None: never."""
    found = (learning_speed.reached(curves[run], accuracy) for run in runs)
    return [None if one is None else one[0] for one in found]


def mean(epochs: Sequence[int | None]) -> str:
    """Mean epochs of the runs that got there, and how many those are if not all."""
    there = [one for one in epochs if one is not None]
    if not there:
        return "never"
    partial = f" ({len(there)} of {len(epochs)} runs)" if len(there) < len(epochs) else ""
    return f"{number(fmean(there), 1)}{partial}"


def read_curves(file: Path) -> dict[str, Curve]:
    """Name of a run -> its curve."""
    found: dict[str, list[dict[str, float]]] = {}
    with file.open(encoding="utf-8", newline="") as lines:
        for line in csv.DictReader(lines):
            run = line.pop("run")
            found.setdefault(run, []).append({key: float(value) for key, value in line.items() if value})
    return dict(found)


def guess(record: Mapping[str, Any]) -> float:
    """Accuracy in per cent of guessing one of equally frequent classes; 0 for a translation, which has none."""
    classes = record["settings"].get("classes")
    return 100 / classes if classes else 0.0


if __name__ == "__main__":
    main()
