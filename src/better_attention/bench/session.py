"""A run of the benchmarks from its first row to its last, each in the files as soon as it is measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from better_attention.bench import machine, runner, targets
from better_attention.bench.machine import Limits
from better_attention.bench.registry import Row
from better_attention.bench.report import Report, stored_limits, stored_results, write
from better_attention.bench.runner import Result, Settings
from better_attention.bench.suites import SUITES

QUICK_LIMITS = {"size": 1024, "read_bytes": 256 << 20}
"""Sizes at which ``--quick`` measures the limits of the machine."""


@dataclass
class Session:
    """Rows to measure, and what has been measured.

    Args:
        rows: what was asked for, in order.
        settings: of the runner.
        about: the machine, as :func:`.machine.describe` gives it.
        suite, dtype: as on the command line.
        out: folder of the files.
        quick: measure the limits of the machine roughly.
    """

    rows: Sequence[Row]
    settings: Settings
    about: Mapping[str, Any]
    suite: str
    dtype: str
    out: Path
    quick: bool = False
    results: list[Result] = field(default_factory=list)
    limits: list[Limits] = field(default_factory=list)

    @property
    def todo(self) -> list[Row]:
        """The rows that are not measured yet."""
        measured = {result.row for result in self.results}
        return [row for row in self.rows if row not in measured]

    def resume(self, document: Mapping[str, Any], *, again: bool) -> None:
        """Continue an earlier run with the same settings.

        Args:
            document: of that run, see :func:`.report.read`.
            again: measure the rows again that were asked for, and keep only others.
        """
        results = [result for result in stored_results(document) if not again or result.row not in self.rows]
        if not results:
            return
        self.results, self.limits = results, stored_limits(document)
        # Nothing will be measured any more, so the date of this command has no place in the description.
        finished = not self.todo and len(self.limits) > 1
        self.about = document["machine"] if finished else machine.resumed(document["machine"], self.about)

    def run(self, say: Callable[[str], None]) -> Report:
        """Measure the limits, every row that is missing, and the limits again; Ctrl-C ends it early.

        Args:
            say: called with one line about each step.
        """
        if not self.limits:
            say("machine limits: a large matrix product, reading memory")
            self.limits = [self._measure_limits()]
        complete = True
        try:
            self._measure_rows(say)
        except KeyboardInterrupt:
            complete = False
            say("interrupted: the rows measured until then follow. The same command continues from there.")
        if self.results:
            for path in self._write(complete=complete):
                say(f"wrote {path}")
        # The files hold rows of earlier commands as well; shown is what was asked for.
        order = {row: index for index, row in enumerate(self.rows)}
        asked = sorted((r for r in self.results if r.row in order), key=lambda result: order[result.row])
        return self._report(asked, len(self.rows), complete=complete)

    def _measure_rows(self, say: Callable[[str], None]) -> None:
        todo = self.todo
        for number, row in enumerate(self.rows, start=1):
            if row in todo:
                say(f"[{number}/{len(self.rows)}] {row.name}")
                self.results += runner.measure(row, SUITES[row.suite].contenders(row), self.settings)
                self._write(complete=False)  # whatever ends the run, even SIGKILL, the rows measured so far are kept
        # The machine may be slower or faster than hours ago: the better of both measurements is its limit.
        if todo or len(self.limits) < 2:
            say("machine limits once more")
            self.limits = [self.limits[0], self._measure_limits()]

    def _measure_limits(self) -> Limits:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return machine.measure_limits(dtype, **(QUICK_LIMITS if self.quick else {}))

    def _write(self, *, complete: bool) -> list[Path]:
        # The files also keep rows of earlier commands, which count as planned.
        planned = len({*self.rows, *(result.row for result in self.results)})
        return write(self._report(self.results, planned, complete=complete), self.out)

    def _report(self, results: Sequence[Result], planned: int, *, complete: bool) -> Report:
        verdicts = targets.verdicts(results, self.limits[0].better(self.limits[-1]))
        return Report(
            *(self.about, self.settings, self.limits, results, verdicts, planned, self.dtype, self.suite, complete)
        )
