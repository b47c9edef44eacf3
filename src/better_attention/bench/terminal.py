"""A run of the benchmarks on the screen: a table for each row, targets, and a summary in words."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from better_attention.bench.machine import Limits, busy
from better_attention.bench.registry import Row
from better_attention.bench.report import Report, rates
from better_attention.bench.runner import BOUNDS, FEWEST_ROUNDS, SLOW, Result, Spread, noise_line
from better_attention.bench.suites import SUITES
from better_attention.bench.targets import TIE
from better_attention.lab.files import plain

SIGNS = {True: "met", False: "MISSED", None: "open"}


def print_report(report: Report, out: Console, *, targets: bool = False) -> None:
    """Machine, limits, a table for each row, what became of the targets if asked for, and a summary in words."""
    for line in machine_lines(report):
        out.print(Text(line), soft_wrap=True)
    for name, results in groupby(report.results, key=lambda result: result.row.name):
        _print_row(name, list(results), report, out)
    _print_method(report, out)
    if targets:
        _print_verdicts(report, out)
    for result in report.results:
        if result.status in ("wrong", "failed"):
            line = f"{result.status.upper()}: {result.row.name}: {result.contender}: {plain(result.reason, 400)}"
            out.print(Text(line, style="bold red"), soft_wrap=True)
    if not report.complete:
        out.print(f"Interrupted: {len({r.row for r in report.results})} of {report.rows} rows were measured.")
    for line in summary(report):
        out.print(Text(line, style="bold"), soft_wrap=True)


def compared(results: Sequence[Result]) -> list[tuple[Result, Spread, str]]:
    """The results that have a ratio to another contender, with the ratio and that contender's name."""
    baselines: dict[Row, str] = {}
    for result in results:
        # The first result of a row is that of its baseline.
        baselines.setdefault(result.row, result.contender)
    return [
        (result, result.ratio, baselines[result.row])
        for result in results
        if result.ratio is not None and result.contender != baselines[result.row]
    ]


def summary(report: Report) -> list[str]:
    """What the run found in a few lines, and how far noise puts it in doubt.

    A line for each suite, mode and baseline: the geometric mean of the ratios over the plain rows (over all rows of a
    suite that has no plain ones, or where none was run).
    """
    pairs = compared(report.results)
    if not pairs:
        return []
    plain_suites = {(r.row.suite, r.row.mode) for r, _, _ in pairs if r.row.variant == "plain"}
    groups: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for result, ratio, baseline in pairs:
        row = result.row
        if row.variant == "plain" or (row.suite, row.mode) not in plain_suites:
            speeds_of = groups.setdefault((row.suite, row.mode, baseline), {})
            speeds_of.setdefault(result.contender, []).append(ratio.median)
    lines = ["On this machine (geometric means over rows; above 1 is faster):"]
    for (suite, mode, baseline), speeds in groups.items():
        numbers = [f"{name} {statistics.geometric_mean(values):.2f}" for name, values in speeds.items()]
        lines.append(f"  {suite}, {mode}, times as fast as {baseline}: {', '.join(numbers)}")
    noisy = sum(ratio.noisy for _, ratio, _ in pairs)
    if noisy:
        lines.append(noise_line(noisy, len(pairs)))
    return lines


def machine_lines(report: Report) -> list[str]:
    """The machine and its limits in a few lines."""
    about = report.machine
    cache, load = about["last_level_cache_bytes"], about["load_average"]
    parts = [about["cpu"], f"cores: {about['cores']}", f"threads: {about['threads']}"]
    parts += [f"last-level cache {cache / 2**20:.0f} MiB"] if cache else []
    parts += [f"load {load:.2f} at the start"] if load is not None else []
    lines = [", ".join(parts)]
    lines.append(", ".join(f"{name} {version}" for name, version in about["versions"].items()))
    lines.append(f"kernels: {about['instruction_set']}; torch: {about['torch_instruction_set']}")
    lines.append(f"commit {about['commit']}, {about['date']}, {about['command']}")
    for when, limits in zip(("before", "after"), report.limits, strict=False):
        product = ", ".join(f"{rate:,.0f} GFLOP/s in {dtype}" for dtype, rate in limits.product.items())
        read = ", ".join(f"{rate:.1f} ({name})" for name, rate in limits.read.items())
        lines.append(
            f"limits {when}: product of {limits.product_size}² matrices {product}; "
            f"reading {limits.read_bytes / 2**20:.0f} MiB, GB/s: {read}"
        )
    if (warning := busy(about)) is not None:
        lines.append(f"Note: {warning}")
    return lines


Cell = Callable[[Result, Mapping[str, float | None]], str]


def _percent(key: str) -> Cell:
    return lambda result, rate: "" if (share := rate[key]) is None else f"{100 * share:.0f} %"


def _number(key: str, digits: int) -> Cell:
    return lambda result, rate: "" if (value := rate[key]) is None else f"{value:,.{digits}f}"


def _range(spread: Spread | None, factor: float = 1.0, digits: int = 2) -> str:
    return "" if spread is None else f"{spread.low * factor:.{digits}f}–{spread.high * factor:.{digits}f}"


_TIMES: dict[str, Cell] = {
    "ms": lambda result, rate: "" if result.seconds is None else f"{1e3 * result.seconds.median:.3f}",
    "10–90 %": lambda result, rate: _range(result.seconds, 1e3, 3),
    "times as fast": lambda result, rate: "" if result.ratio is None else f"{result.ratio.median:.2f}",
    # The space tells it from the column above, and is not printed.
    "10–90 % ": lambda result, rate: _range(result.ratio),
}
_PRODUCT: dict[str, Cell] = {"GFLOP/s": _number("gflops", 1), "of product": _percent("product_share")}
_WHOLE: dict[str, Cell] = {
    "times fewer FLOPs": _number("flop_ratio", 2),
    "speed over FLOPs": _number("ratio_over_flop_ratio", 2),
    **_PRODUCT,
}
_RATES: dict[str, dict[str, Cell]] = {
    "product": _PRODUCT,
    "whole": _WHOLE,
    "read": {"GB/s": _number("gbytes", 1), "of read": _percent("read_share")},
}
_REST: dict[str, Cell] = {
    "extra MiB": lambda result, rate: "not measured" if result.memory is None else f"{result.memory / 2**20:.1f}",
    "error": lambda result, rate: "" if result.error is None else f"{result.error:.0e}",
    "rounds × calls": lambda result, rate: f"{result.rounds} × {result.calls}",
}


def _print_row(name: str, results: Sequence[Result], report: Report, out: Console) -> None:
    limits = report.best
    columns = _TIMES | _RATES[SUITES[results[0].row.suite].rates] | _REST
    # Without the limit of the screen: a bounded measurement never exceeds its width, so no column would have to go.
    unbounded = out.options.update(max_width=10_000)
    table = _table(name, results, columns, limits)
    while len(columns) > len(_TIMES) and out.measure(table, options=unbounded).maximum > out.width:
        columns.popitem()  # a narrow screen: the last columns are in the files alone
        table = _table(name, results, columns, limits)
    out.print(table)
    notes: dict[str, list[str]] = {}
    for result in results:
        text = result.note if result.status == "ok" else f"{result.status}: {plain(result.reason, 400)}"
        if text:
            notes.setdefault(text, []).append(result.contender)
    for result, ratio, _ in compared(results):
        if ratio.noisy:
            notes.setdefault("noisy, rounds differ more than this contender and the baseline do", []).append(
                result.contender
            )
    most = max((result.rounds for result in results), default=0)
    for result in results:
        if 0 < result.rounds < max(most, min(FEWEST_ROUNDS, report.settings.repeats)):
            text = f"slow, {result.rounds} round{'s' * (result.rounds > 1)} instead of {report.settings.repeats}"
            notes.setdefault(text, []).append(result.contender)
    for text, names in notes.items():
        out.print(Text(f"  {' | '.join(names)}: {text}", style="dim"), soft_wrap=True)
    out.print()


def _table(name: str, results: Sequence[Result], columns: Mapping[str, Cell], limits: Limits) -> Table:
    table = Table(title=name, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("Contender", no_wrap=True)
    for column in columns:
        table.add_column(column.strip(), justify="right", no_wrap=True)
    for result in results:
        if result.seconds is not None:
            rate = rates(result, limits)
            table.add_row(Text(result.contender), *(cell(result, rate) for cell in columns.values()))
    return table


def _print_method(report: Report, out: Console) -> None:
    bounds = ", ".join(f"{bound:.0e} in {str(dtype).removeprefix('torch.')}" for dtype, bound in BOUNDS.items())
    out.print(
        Text(
            "ms: median of one call over rounds, every contender once a round in alternation. times as fast: "
            "speed over that of the row's first line, median of the ratios within a round; above 1 is faster. 10–90 %: "
            f"percentiles over rounds. Contenders more than {SLOW:g} times slower than the baseline take part in "
            f"{FEWEST_ROUNDS} rounds only, and none in more than fit into {report.settings.seconds:g} s. times fewer "
            "FLOPs: operations of the first line over its own; speed over FLOPs: times as fast over times fewer. "
            "extra MiB: by how much one call raises the high-water mark of resident memory, results "
            "included. error: largest |x − float64 reference| over the largest number of a tensor, "
            f"outputs and gradients; allowed {bounds}. Shares are of the better of the limits before and after.",
            style="dim",
        )
    )


def _print_verdicts(report: Report, out: Console) -> None:
    if not report.verdicts:
        return
    heading = "Targets" if report.dtype == "float32" else "Targets of float32, as goals"
    table = Table(title=heading, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("", "Target", "at least", "found", "where not"):
        table.add_column(column, justify="right" if column in ("at least", "found") else "left", overflow="fold")
    for verdict in report.verdicts:
        value = "–" if verdict.found is None else f"{verdict.found:.2f}"
        style = "bold red" if verdict.met is False else ""
        cells = (SIGNS[verdict.met], verdict.name, f"{verdict.least:.2f}", value, plain(verdict.detail, 400))
        table.add_row(*(Text(cell, style=style) for cell in cells))
    out.print(table)
    out.print(
        Text(
            f"found: the geometric mean, or the worst row. open: rows are missing. Never slower: at least {1 - TIE:g}, "
            "as two medians of the same code differ by as much.",
            style="dim",
        )
    )
