"""benchmarks.recurrence_scale: which cells it trains beside the trial's, and what its table compares."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("benchmarks.recurrence_scale", reason="a source distribution has no benchmarks")

from benchmarks.recurrence_scale import SIZE, accuracies, cells, compared, main

from better_attention.lab.trial.grid import Trial
from better_attention.lab.trial.run import read
from better_attention.lab.trial.stages import Row

RESULTS = Path(__file__).parents[2] / "results" / "recurrence-positions"


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return read(RESULTS)


def test_it_asks_for_what_the_trial_has_at_another_scale(rows: list[Row]) -> None:
    asked = list(cells(Trial(), rows))
    assert {cell.positions for cell in asked} == {"learned", "rotary", "alibi-weight"}
    assert len(asked) == 3 * 7 * 3
    assert {(cell.scaling, cell.mechanism, cell.size) for cell in asked} == {("sqrt", "standard", SIZE)}


def test_the_table_has_both_scales_of_softmax_and_its_opponent(rows: list[Row]) -> None:
    trained = [row for row in rows if row.cell.size == SIZE and row.cell.stage == "main"]
    raw = next(row for row in trained if (row.cell.positions, row.cell.scaling) == ("learned", "raw"))
    assert list(compared(Trial(), rows)) == []  # nothing at the other scale yet
    beside = Row(replace(raw.cell, scaling="sqrt"), replace(raw.outcome, test_accuracy=25.0), raw.commit)
    (line,) = compared(Trial(), [*rows, beside])
    modulus, delay = raw.cell.rung
    own = accuracies(rows)["standard", "learned", raw.cell.rung]["raw"]
    assert line[:2] == ["learned", f"({modulus}, {delay})"]
    assert line[2:5] == ["raw", f"{sum(own) / len(own):.1f} ({len(own)})", "25.0 (1)"]


def test_a_report_trains_nothing(tmp_path: Path) -> None:
    main(["--trial", str(RESULTS), "--out", str(tmp_path), "--report"])
    assert "softmax, 1/√d_k" in (tmp_path / "table.md").read_text("utf-8")
