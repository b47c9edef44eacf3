"""A run of the benchmarks as data: one JSON document, and CSV and JSON files that can be read back."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from better_attention.bench.machine import Limits
from better_attention.bench.registry import Row, Shape, Work
from better_attention.bench.runner import BOUNDS, Result, Settings, Spread
from better_attention.bench.targets import Verdict
from better_attention.lab import csv_json
from better_attention.lab.files import parse_json, read_regular


@dataclass(frozen=True, slots=True)
class Report:
    """Everything about a run.

    Args:
        machine: as :func:`better_attention.bench.machine.describe` gives it.
        settings: of the runner.
        limits: before and, where the run came to its end, after the rows.
        results, verdicts: of the rows and of the targets.
        rows: how many rows were planned.
        dtype, suite: what was asked for.
        complete: False if it was interrupted.
    """

    machine: Mapping[str, Any]
    settings: Settings
    limits: Sequence[Limits]
    results: Sequence[Result]
    verdicts: Sequence[Verdict]
    rows: int
    dtype: str
    suite: str
    complete: bool

    @property
    def best(self) -> Limits:
        """The better of the two measurements of the limits, number by number."""
        return self.limits[0] if len(self.limits) == 1 else self.limits[0].better(self.limits[1])

    def document(self) -> dict[str, Any]:
        """The run as JSON values."""
        return {
            "machine": self.machine,
            "settings": settings_of(self.settings),
            "suite": self.suite,
            "dtype": self.dtype,
            "complete": self.complete,
            "limits": [asdict(limits) for limits in self.limits],
            "rows": [record(result, self.best) for result in self.results],
            "targets": [asdict(verdict) for verdict in self.verdicts],
        }

    def stem(self) -> str:
        """Name of the run's files without their ending: suite, device, threads, version, dtype."""
        return stem(self.machine, self.suite, self.dtype)


def stem(machine: Mapping[str, Any], suite: str, dtype: str) -> str:
    """Name of a run's files without their ending: suite, device, threads, version, dtype."""
    # Intel(R) Core(TM) becomes intel-core, and not intel-r-core-tm.
    cpu = re.sub(r"\((r|tm)\)", " ", machine["cpu"].lower())
    cpu = re.sub(r"[^a-z0-9]+", "-", cpu).strip("-")[:48]
    version = re.sub(r"[^A-Za-z0-9.+]", "", machine["versions"]["torch"])
    return f"{suite}-{cpu}-{machine['threads']}t-torch{version}-{dtype}"


def rates(result: Result, limits: Limits) -> dict[str, float | None]:
    """Numbers that follow from a result: rates, their shares of the machine's limits, ratio over FLOP ratio."""
    numbers: dict[str, float | None] = dict.fromkeys(
        ("gflops", "product_share", "gbytes", "read_share", "flop_ratio", "ratio_over_flop_ratio")
    )
    if result.seconds is None:
        return numbers
    seconds, work = result.seconds.median, result.work
    if work.flops:
        rate = work.flops / seconds / 1e9
        numbers |= {"gflops": rate, "product_share": rate / limits.product[_dtype(result)]}
    if work.bytes:
        rate = work.bytes / seconds / 1e9
        # Which way of reading is fastest differs between processors; that one is the limit.
        numbers |= {"gbytes": rate, "read_share": rate / max(limits.read.values())}
    if work.flop_ratio and result.ratio:
        numbers |= {"flop_ratio": work.flop_ratio, "ratio_over_flop_ratio": result.ratio.median / work.flop_ratio}
    return numbers


def record(result: Result, limits: Limits) -> dict[str, Any]:
    """One result as JSON values."""
    row = result.row
    values = asdict(result)
    del values["row"], values["work"]
    head = {
        "suite": row.suite,
        **row.shape._asdict(),
        "variant": row.variant,
        "mode": row.mode,
        "dtype": _dtype(result),
    }
    return head | values | {"flops": result.work.flops, "bytes": result.work.bytes} | rates(result, limits)


def _dtype(result: Result) -> str:
    return str(result.row.dtype).removeprefix("torch.")


def write(report: Report, folder: Path) -> list[Path]:
    """Write the run as JSON and as CSV, a line for each contender of each row; returns the paths."""
    paths = [folder / f"{report.stem()}.{ending}" for ending in ("json", "csv")]
    csv_json.write_json(paths[0], report.document())
    lines = [_flat(record(result, report.best)) for result in report.results]
    csv_json.write_csv(paths[1], list(lines[0]) if lines else ["suite"], (line.values() for line in lines))
    return paths


def settings_of(settings: Settings) -> dict[str, Any]:
    """The settings as JSON values."""
    # JSON has no sets, and in this order equal sets are equal text.
    return asdict(settings) | {"switches": sorted(settings.switches)}


def read(path: Path) -> dict[str, Any] | None:
    """The document that :func:`write` wrote; None if there is no such file.

    Raises:
        ValueError: the file is damaged or not one of this command.
    """
    if not path.exists():
        return None
    try:
        document = parse_json(read_regular(path))
        whole = isinstance(document["machine"], dict) and isinstance(document["settings"], dict)
        if not whole or not document["limits"]:
            raise ValueError("the machine, the settings or its limits are not described")
        # For their errors: damage is told before hours of measuring, not after.
        stored_results(document)
        stored_limits(document)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged or was not written by this command ({type(error).__name__}: {error}). "
            "Move it away, or choose another folder with --out."
        ) from None
    return dict(document)


def stored_results(document: Mapping[str, Any]) -> list[Result]:
    """The results in a document of :func:`read`."""
    results = []
    for entry in document["rows"]:
        # The name becomes an attribute of torch below, which has others than dtypes.
        if entry["dtype"] not in {str(dtype).removeprefix("torch.") for dtype in BOUNDS}:
            raise ValueError(f"unknown dtype {entry['dtype']!r}")
        shape = Shape(*(entry[key] for key in Shape._fields))
        row = Row(entry["suite"], shape, entry["variant"], entry["mode"], getattr(torch, entry["dtype"]))
        spreads: dict[str, Any] = {key: entry[key] and Spread(**entry[key]) for key in ("seconds", "ratio")}
        rest = {key: entry[key] for key in ("status", "reason", "note", "error", "bound", "rounds", "calls", "memory")}
        work = Work(entry["flops"], entry["bytes"], entry["flop_ratio"])
        results.append(Result(row, entry["contender"], work, **rest, **spreads))
    return results


def stored_limits(document: Mapping[str, Any]) -> list[Limits]:
    """The limits in a document of :func:`read`."""
    return [Limits(**limits) for limits in document["limits"]]


def as_json(report: Report) -> str:
    """The run as one JSON document."""
    return csv_json.as_json(report.document())


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    cells: dict[str, Any] = {}
    for key, value in values.items():
        if key in ("seconds", "ratio"):
            cells |= {f"{key}_{part}": value and value[part] for part in ("median", "low", "high")}
        else:
            cells[key] = value
    return cells
