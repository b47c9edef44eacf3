"""The table of ``better-attention edge --models``."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from rich.console import Console
from rich.text import Text

from better_attention.bench.edge.models import Report, Row
from better_attention.bench.machine import busy
from better_attention.lab.analysis.estimates import number
from better_attention.lab.report.tables import Strip, print_fitting

MEGA = 2**20


def print_report(report: Report, console: Console) -> None:
    """One row for each model and runtime, and what the columns mean."""
    rows = report.rows
    groups: list[list[Strip]] = [
        [
            ("median, ms", [_milliseconds(row.median) for row in rows]),
            ("90 %, ms", [_milliseconds(r.p90) for r in rows]),
        ],
        [("times as fast", [_speed(row) for row in rows])],
        [
            ("memory, MiB", [_mebi(row.memory_bytes) for row in rows]),
            ("file, MiB", [_mebi(r.file_bytes) for r in rows]),
        ],
    ]
    heads: list[Strip] = [("Model", [row.model for row in rows]), ("Runtime", [row.runtime for row in rows])]
    ends = [*(a.model != b.model for a, b in pairwise(rows)), True]
    print_fitting(f"calls of {report.settings.batch_size} samples on this CPU", heads, groups, ends, console)
    for line in explanations(report.machine, report):
        console.print(Text(line), soft_wrap=True)


def explanations(machine: Mapping[str, Any], report: Report) -> list[str]:
    """What stands below the table."""
    first = next((row for row in report.rows if row.calls), None)
    lines = [
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['versions']['torch']}, "
        f"commit {machine['commit']}, {machine['date']}",
        "eager: PyTorch alone. compiled: PyTorch with the kernels of better-attention "
        f"({machine['instruction_set']}) where they are faster. onnx, onnx-int8: ONNX Runtime.",
        "memory: by which reading the model and calling it raise the resident memory of a fresh process.",
    ]
    if first is not None:
        lines.append(f"times as fast as {first.model}, {first.runtime}: median (10th-90th percentile) over the rounds.")
    if (warning := busy(machine)) is not None:
        lines.append(f"Note: {warning}")
    lines += [f"Not timed: {row.model}, {row.runtime}: {row.reason}" for row in report.rows if row.reason]
    return lines + ([] if report.complete else ["Interrupted: this is what was timed by then."])


def _milliseconds(seconds: float | None) -> str:
    return "–" if seconds is None else number(1e3 * seconds, 3)


def _speed(row: Row) -> str:
    speed = row.times_as_fast
    if speed is None:
        return "–"
    return f"{number(speed.median, 2)} ({number(speed.low, 2)}–{number(speed.high, 2)})"


def _mebi(value: int | None) -> str:
    return "–" if value is None else number(value / MEGA, 2)
