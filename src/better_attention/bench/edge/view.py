"""Table 4 beside ours: on the screen, as CSV and as JSON, and read back from there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from rich.console import Console
from rich.text import Text

from better_attention.bench.edge.timing import BASELINE, PAPER_TASKS, Settings, Timing
from better_attention.bench.machine import busy
from better_attention.bench.runner import Spread, noise_line
from better_attention.lab import csv_json, published
from better_attention.lab.analysis.estimates import number
from better_attention.lab.files import parse_json, read_regular
from better_attention.lab.report.tables import Strip, print_fitting
from better_attention.lab.runs import manifest

TITLE = "inference on an edge device: seconds for 5,000 samples"
PAPER_DEVICE = "Apple M2"
FILES = ("edge.json", "edge.csv")


@dataclass(frozen=True, slots=True)
class Report:
    """A run of ``better-attention edge``.

    Args:
        machine: as :func:`better_attention.bench.machine.describe` gives it.
        settings: what was timed.
        timings: what was found.
        complete: False if it was interrupted.
    """

    machine: Mapping[str, Any]
    settings: Settings
    timings: Sequence[Timing]
    complete: bool = True


def published_seconds(task: str, mechanism: str, heads: int) -> tuple[float | None, float | None]:
    """The paper's seconds, and how many times as fast that is as standard attention with as many heads.

    >>> published_seconds("mnist", "standard", 4)
    (5.27, 1.0)
    """
    rows = {(row["mechanism"], row["heads"]): row.get(task) for row in published.edge_inference()}
    seconds, standard = rows.get((mechanism, heads)), rows.get((BASELINE, heads))
    if not isinstance(seconds, int | float) or not isinstance(standard, int | float):
        return None, None
    return seconds, standard / seconds


def beside_paper(report: Report | None) -> list[dict[str, Any]]:
    """One flat mapping per timing, ours and the paper's; then the paper's rows that were not run (``rounds`` 0)."""
    rows = [_flat(timing, report.settings.samples) for timing in report.timings] if report else []
    # The paper's models compute in float32.
    done = {
        (row["task"], row["mechanism"], row["heads"]) for row in rows if row["rounds"] and row["precision"] == "float32"
    }
    missing = [
        Timing(task, int(str(row["heads"])), "float32", str(row["mechanism"]), reason="not run")
        for task in PAPER_TASKS
        for row in published.edge_inference()
        if (task, row["mechanism"], row["heads"]) not in done
    ]
    return rows + [_flat(timing, 5000) for timing in missing]


def _flat(timing: Timing, samples: int) -> dict[str, Any]:
    seconds, times_as_fast = published_seconds(timing.task, timing.mechanism, timing.heads)
    return {
        "task": timing.task,
        "mechanism": timing.mechanism,
        "heads": timing.heads,
        "precision": timing.precision,
        "samples": samples,
        "measured": timing.measured,
        "rounds": timing.rounds,
        **{f"seconds_{key}": value for key, value in _spread(timing.seconds).items()},
        "seconds_paper": seconds,
        **{f"times_as_fast_{key}": value for key, value in _spread(timing.times_as_fast).items()},
        "times_as_fast_paper": times_as_fast,
        "quantised_linears": timing.quantised,
        "reason": timing.reason,
    }


def _spread(spread: Spread | None) -> dict[str, float | None]:
    return asdict(spread) if spread else dict.fromkeys(("median", "low", "high"))


def print_report(report: Report, console: Console) -> None:
    """A table for each precision: seconds and speed relative to standard attention, ours and the paper's; a summary."""
    machine, settings = report.machine, report.settings
    console.print(Text(f"Table 4 of arXiv 2403.01643v2: {TITLE}", style="bold"))
    if settings.samples != 5000:
        console.print(
            f"Our seconds are for {settings.samples:,} samples: compare the ratios to standard, not the seconds."
        )
    console.print(
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['versions']['torch']}, "
        f"commit {machine['commit']}, {machine['date']}",
        markup=False,
        soft_wrap=True,
    )
    if (warning := busy(machine)) is not None:
        console.print(Text(f"Note: {warning}", style="bold yellow"))
    console.print(
        Text(
            f"{settings.samples:,} random inputs in batches of {settings.batch_size}, untrained weights (speed only); "
            f"median (10th–90th percentile) over rounds. The paper's seconds are those of an {PAPER_DEVICE}: what can "
            "be compared is the speed relative to standard attention (times as fast as standard, above 1 is faster). "
            "(–): a single round. noisy: rounds differ more than the mechanism and standard do.",
            style="dim",
        )
    )
    for precision in dict.fromkeys(timing.precision for timing in report.timings):
        _print_precision(precision, [t for t in report.timings if t.precision == precision], settings, console)
    if not report.complete:
        console.print(Text("Interrupted: this is what was timed by then.", style="bold"))
    missing = [row for row in beside_paper(report) if row["reason"] == "not run"]
    if missing:
        console.print(Text(f"Of the paper's table not run: {_named(missing)}."))
    for line in summary(report):
        console.print(Text(line, style="bold"), soft_wrap=True)


def summary(report: Report) -> list[str]:
    """The findings, one line for each precision and mechanism, and how much noise limits them."""
    pairs = [(t, t.times_as_fast) for t in report.timings if t.times_as_fast and t.mechanism != BASELINE]
    if not pairs:
        return []
    lines = ["On this machine, as geometric means over the models:"]
    for precision, mechanism in dict.fromkeys((t.precision, t.mechanism) for t, _ in pairs):
        speeds = [speed for t, speed in pairs if (t.precision, t.mechanism) == (precision, mechanism)]
        mean = geometric_mean(speed.median for speed in speeds)
        models = f"{len(speeds)} model{'s' * (len(speeds) > 1)}"
        lines.append(f"  {mechanism} in {precision}: {number(mean, 2)} times as fast as standard ({models})")
    noisy = sum(speed.noisy for _, speed in pairs)
    if noisy:
        lines.append(noise_line(noisy, len(pairs)))
    return lines


def _named(missing: Sequence[Mapping[str, Any]]) -> str:
    """``mnist (h 8), imagenet, imdb (h 1: super)``: whole data sets and numbers of heads by their name alone."""
    mechanisms = {row["mechanism"] for row in published.edge_inference()}
    missing_heads: dict[str, dict[int, set[str]]] = {}
    for row in missing:
        missing_heads.setdefault(row["task"], {}).setdefault(row["heads"], set()).add(row["mechanism"])
    most = {row["heads"] for row in published.edge_inference()}
    texts = []
    for task, heads in missing_heads.items():
        parts = [
            f"h {h}" if names == mechanisms else f"h {h}: {', '.join(sorted(names))}"
            for h, names in sorted(heads.items())
        ]
        whole = heads.keys() == most and all(names == mechanisms for names in heads.values())
        texts.append(task if whole else f"{task} ({'; '.join(parts)})")
    return ", ".join(texts)


def _print_precision(precision: str, timings: Sequence[Timing], settings: Settings, console: Console) -> None:
    timing_of = {(t.task, t.mechanism, t.heads): t for t in timings}
    mechanisms, heads = (dict.fromkeys(getattr(t, name) for t in timings) for name in ("mechanism", "heads"))
    rows = [(mechanism, h) for h in heads for mechanism in mechanisms]
    title = precision
    if precision == "int8":
        done = {t.task: t.quantised for t in timings if t.quantised}
        title += " (torchao, dynamic: linear maps " + ", ".join(f"{task} {n}" for task, n in done.items())
        title += "; attention itself and W_A in float32)"
    groups = [_strips(timing_of, task, rows) for task in dict.fromkeys(t.task for t in timings)]
    ends = [index % len(mechanisms) == len(mechanisms) - 1 for index in range(len(rows))]
    start: list[Strip] = [("Mechanism", [m for m, _ in rows]), ("Heads", [h for _, h in rows])]
    print_fitting(title, start, groups, ends, console)
    for task in dict.fromkeys(t.task for t in timings):
        shorter = {t.measured for t in timings if t.task == task and t.rounds and t.measured < settings.samples}
        if shorter:
            span = f"{min(shorter):,}" if len(shorter) == 1 else f"{min(shorter):,} to {max(shorter):,}"
            console.print(Text(f"{task}: {settings.samples:,} extrapolated from {span}.", style="bold yellow"))
    for reason in dict.fromkeys(f"{t.task}, h {t.heads}: {t.reason}" for t in timings if t.reason):
        console.print(Text(f"Not timed: {reason}"))


def _strips(
    timing_of: Mapping[tuple[str, str, int], Timing], task: str, rows: Sequence[tuple[str, int]]
) -> list[Strip]:
    timings = [timing_of.get((task, *row)) for row in rows]
    theirs = [published_seconds(task, *row) for row in rows]
    return [
        (f"{task}, s", [_cell(t, t.seconds if t else None) for t in timings]),
        (PAPER_DEVICE, ["–" if s is None else f"{s:g}" for s, _ in theirs]),
        ("times as fast", [_speed(t) for t in timings]),
        (PAPER_DEVICE, ["–" if r is None else f"{r:.3f}" for _, r in theirs]),
    ]


def _cell(timing: Timing | None, spread: Spread | None, digits: int | None = None) -> str:
    if timing is None or spread is None:
        return "–"
    places = digits if digits is not None else 3 if spread.median < 1 else 2
    reach = f"{number(spread.low, places)}–{number(spread.high, places)}" if timing.rounds > 1 else "–"
    return f"{number(spread.median, places)} ({reach})"


def _speed(timing: Timing | None) -> str:
    spread = timing.times_as_fast if timing else None
    noisy = spread is not None and timing is not None and timing.mechanism != BASELINE and spread.noisy
    return _cell(timing, spread, 3) + (" noisy" if noisy else "")


def print_paper(console: Console) -> None:
    """Table 4 alone, where there are no timings of ours."""
    rows = [(str(row["mechanism"]), int(str(row["heads"]))) for row in published.edge_inference()]
    console.print(Text(f"Table 4 of arXiv 2403.01643v2: {TITLE}", style="bold"))
    start: list[Strip] = [("Mechanism", [m for m, _ in rows]), ("Heads", [h for _, h in rows])]
    groups: list[list[Strip]] = [_strips({}, task, rows)[1:] for task in PAPER_TASKS]
    named: list[list[Strip]] = [
        [(f"{task}, s", seconds[1]), ("times as fast", ratios[1])]
        for task, (seconds, _, ratios) in zip(PAPER_TASKS, groups, strict=True)
    ]
    print_fitting(
        f"the paper's ({PAPER_DEVICE}), times as fast as standard; ours: not run",
        start,
        named,
        [False] * len(rows),
        console,
    )
    console.print("Not run: no edge.json was found. To run: better-attention edge")


def is_report(value: object) -> bool:
    """Whether the value in a JSON file is an ``edge.json``."""
    return isinstance(value, Mapping) and "timings" in value


def write(report: Report, folder: Path) -> list[Path]:
    """:data:`FILES` in ``folder``; returns the paths."""
    document = {
        "machine": dict(report.machine),
        "settings": asdict(report.settings),
        "complete": report.complete,
        "weights": "untrained",
        "timings": [asdict(timing) for timing in report.timings],
    }
    paths = [folder / name for name in FILES]
    manifest.remove(folder, FILES)  # it would be wrong until both are written
    csv_json.write_json(paths[0], document)
    write_csv([report], paths[1])
    manifest.add(folder, FILES)
    return paths


def write_csv(reports: Sequence[Report], path: Path) -> None:
    """Ours beside the paper's, one line per timing."""
    rows = [row for report in reports for row in beside_paper(report)] or beside_paper(None)
    csv_json.write_csv(path, list(rows[0]), (row.values() for row in rows))


def read(path: Path) -> Report:
    """The report that :func:`write` wrote.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        document = parse_json(read_regular(path))
        timings = [
            Timing(**{**t, "seconds": _as_spread(t["seconds"]), "times_as_fast": _as_spread(t["times_as_fast"])})
            for t in map(_current, document["timings"])
        ]
        machine = document["machine"]
        if (
            any(key not in machine for key in ("cpu", "cores", "threads", "commit", "date"))
            or "torch" not in machine["versions"]
        ):
            raise ValueError("the machine is not described")
        report = Report(machine, Settings(**document["settings"]), timings, bool(document["complete"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged or no edge.json ({type(error).__name__}: {error}). "
            "`better-attention edge` writes it again."
        ) from None
    manifest.check_listed(path)
    return report


def _current(timing: Mapping[str, Any]) -> dict[str, Any]:
    """A timing with the fields of this version; earlier ones have the ratio of the times as ``ratio``."""
    current = dict(timing)
    if "ratio" in current:
        times = _as_spread(current.pop("ratio"))
        inverse = times and Spread(1 / times.median, 1 / times.high, 1 / times.low)
        current["times_as_fast"] = inverse and asdict(inverse)
    return current


def _as_spread(value: Mapping[str, float] | None) -> Spread | None:
    if value is None:
        return None
    numbers = {key: value[key] for key in ("median", "low", "high")}
    if not all(isinstance(x, int | float) and not isinstance(x, bool) for x in numbers.values()):
        raise ValueError(f"{value} is no spread of numbers")
    return Spread(**numbers)
