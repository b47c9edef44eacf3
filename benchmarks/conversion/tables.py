"""The measurements as tables of README.md, between two marks; what stands around them is written by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.markdown import BEGIN, END, put, table

from better_attention.lab.analysis.estimates import estimate, number
from better_attention.lab.files import write_atomic

from .records import STAGES, Record

TARGET = {("minilm", mechanism): 2.0 for mechanism in ("optimised", "efficient")}
"""Points that may be lost after distillation, in the mean over the seeds."""


def write(records: Sequence[Record], out: Path) -> None:
    """Put the tables into README.md, and leave the rest of it as it is."""
    page = out / "README.md"
    if not page.exists():
        write_atomic(page, f"# Conversion of trained models\n\n{BEGIN}\n{END}\n")
    # One file for each processor.
    timed = "".join(speed(json.loads(path.read_text("utf-8"))) for path in sorted(out.glob("speed*.json")))
    put(page, document(records) + timed)


def document(records: Sequence[Record]) -> str:
    """All tables, one for each task and number of heads."""
    parts = []
    for (task, heads), group in groupby(records, lambda r: (r.task, r.heads)):
        rows = list(group)
        parts.append(f"### {task}, {heads} {'head' if heads == 1 else 'heads'}: {rows[0].metric}\n")
        parts += [_quality(rows), _differences(rows), _layers(rows), _curves(rows), _origin(rows)]
    return "\n".join(part for part in parts if part)


def _by_mechanism(records: list[Record]) -> list[tuple[str, list[Record]]]:
    return [(name, list(group)) for name, group in groupby(records, lambda r: r.mechanism)]


def _mean(values: Sequence[float], digits: int = 2, *, sign: bool = False) -> str:
    if not values:
        return "–"
    same = len(set(values)) == 1  # one model, or a step without chance: no interval
    return number(values[0], digits, sign=sign) if same else estimate(values).format(digits, sign=sign)


def _at(records: list[Record], stage: str) -> list[float]:
    return [s.test for r in records if (s := r.stage(stage)) is not None]


def _lost(records: list[Record], stage: str) -> list[float]:
    pairs = [(r.stage(stage), r.stage("before")) for r in records]
    return [after.test - before.test for after, before in pairs if after is not None and before is not None]


def _quality(records: list[Record]) -> str:
    header = ["mechanism", "seeds", *STAGES, "attention parameters", "model parameters", "seconds of the stages"]
    rows = []
    for name, group in _by_mechanism(records):
        one = group[0]
        rows.append(
            [
                name,
                str(len(group)),
                *(_mean(_at(group, stage)) for stage in STAGES),
                f"{number(one.attention['before'], 0)} → {number(one.attention['after'], 0)}",
                f"{number(one.parameters['before'], 0)} → {number(one.parameters['after'], 0)}",
                " + ".join(_seconds(group, stage) for stage in STAGES[1:]),
            ]
        )
    return table(header, rows)


def _seconds(records: list[Record], stage: str) -> str:
    found = sorted(s.seconds for r in records if (s := r.stage(stage)) is not None)
    return (
        f"{found[len(found) // 2]:.2g}"
        if found and found[0] < 10
        else f"{found[len(found) // 2]:.0f}"
        if found
        else "–"
    )


def _differences(records: list[Record]) -> str:
    header = ["mechanism", *(f"{stage} − before" for stage in STAGES[1:]), "conversion", "target"]
    rows = []
    for name, group in _by_mechanism(records):
        exact = f"exact; outputs differ by {max(r.difference for r in group):.0e} of the largest"
        rows.append(
            [
                name,
                *(_mean(_lost(group, stage), sign=True) for stage in STAGES[1:]),
                exact if group[0].exact else "approximated",
                _verdict(group),
            ]
        )
    return table(header, rows)


def _verdict(records: list[Record]) -> str:
    allowed = TARGET.get((records[0].task, records[0].mechanism))
    lost = _lost(records, "distilled")
    if allowed is None or not lost:
        return ""
    met = -sum(lost) / len(lost) <= allowed
    return f"at most {allowed:g} points lost: {'met' if met else '**missed**'}"


def _layers(records: list[Record]) -> str:
    rows = []
    for name, group in _by_mechanism([r for r in records if r.errors]):
        layers = zip(*(r.errors for r in group), strict=True)
        rows.append([name, *(_error(list(layer)) for layer in layers)])
    if not rows:
        return ""
    header = ["error of the layer's output, projected → fitted", *(f"layer {i}" for i in range(len(rows[0]) - 1))]
    return table(header, rows)


def _error(pairs: list[tuple[float | None, float | None]]) -> str:
    before, after = (sum(x for x in column if x is not None) / len(pairs) for column in zip(*pairs, strict=True))
    return f"{before:.2f} → {after:.2f}"


def _curves(records: list[Record]) -> str:
    rows = []
    for name, group in _by_mechanism([r for r in records if r.curve]):
        points = zip(*(r.curve for r in group), strict=True)
        rows.append([name, *(_mean([value for _, value in point]) for point in points)])
    if not rows:
        return ""
    steps = [step for step, _ in next(r for r in records if r.curve).curve]
    return table(["development part after updates", *(str(step) for step in steps)], rows)


def _origin(records: list[Record]) -> str:
    settings = next((r.settings for r in records if r.curve), records[0].settings)
    commits = sorted({r.environment["commit"][:7] + r.environment["commit"][40:] for r in records})
    commands = sorted({r.environment["command"] for r in records})
    fitted = (
        f"Calibration on {number(settings['calibration_samples'], 0)} samples; distillation on "
        f"{number(settings['distillation_samples'], 0)}, {settings['hidden_epochs']} pass for the layers and "
        f"{settings['output_epochs']} for the outputs, learning rate {settings['lr']:g}. "
    )
    return (
        f"{fitted if any(r.curve for r in records) else ''}Commit {', '.join(commits)}, "
        f"{records[0].environment['cpu']}, {records[0].environment['threads']} thread. "
        f"{'Commands' if len(commands) > 1 else 'Command'}: {'; '.join(f'`{c}`' for c in commands)}.\n"
    )


def speed(found: Mapping[str, Any]) -> str:
    """The table of ``speed.json``: seconds of a batch and ratios of them, median (10th to 90th percentile)."""
    machine, rows = found["machine"], []
    for row in found["rows"]:
        rows.append(
            [
                *(row["runtime"], row["model"], _spread(row["seconds"], 3)),
                *(_spread(row[key], 2) for key in ("times_as_fast", "times_as_fast_same_runtime")),
                *(number(row["parameters"], 0), number(row["bytes"] / 1e6, 1)),
                f"{row['difference_to_pytorch']:.0e}",
            ]
        )
    header = ["runtime", "model", "seconds", "times as fast as the host in PyTorch", "as the host in the same runtime"]
    header += ["parameters", "megabytes", "difference to PyTorch"]
    return (
        f"\n### minilm: speed and size, batch {found['batch']}, length {found['length']}, "
        f"{machine['threads']} threads, {machine['cpu']}\n\n"
        f"{table(header, rows)}\n{found['rounds']} rounds. Commit {machine['commit'][:7]}, "
        f"{machine['instruction_set']}, load {machine['load_average_at_timing']:.1f} on {machine['cores']} cores when "
        "timing began. "
        f"Command: `{machine['command']}`.\n"
    )


def _spread(spread: Mapping[str, float], digits: int) -> str:
    return f"{spread['median']:.{digits}f} ({spread['low']:.{digits}f} to {spread['high']:.{digits}f})"
