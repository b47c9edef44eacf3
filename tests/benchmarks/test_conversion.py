"""The benchmark of conversion: what it records of the four stages; its tables leave the text around them alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.layers import tokens

pytest.importorskip("benchmarks.conversion", reason="a source distribution has no benchmarks")

from benchmarks.conversion import records, tables
from benchmarks.conversion.records import Record, Stage
from benchmarks.conversion.study import Setting, Subject, judged, study

B, L, E, LAYERS = 8, 5, 8, 2
BEFORE = Stage("before", 0.0, 0.0, 0.0)


def squared(student: Tensor, teacher: Tensor, batch: Any) -> Tensor:
    return (student - teacher).square().mean()


def subject(heads: int, seed: int = 0) -> Subject:
    """An encoder that is judged by minus its distance to what it was."""
    layer = nn.TransformerEncoderLayer(E, heads, 11, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False).eval()
    batches = [{"src": tokens(B, L, E, dtype=torch.float32)} for _ in range(4)]
    teacher = copy.deepcopy(model)

    def distance(student: nn.Module) -> float:
        with torch.no_grad():
            return -float(sum((student(**b) - teacher(**b)).square().mean() for b in batches))

    return Subject(
        "minilm", "points", heads, seed, model, L, distance, distance, batches, batches, squared, lambda x: x
    )


@pytest.mark.parametrize("mechanism", ["optimised", "efficient", "super"])
def test_one_head_ends_with_the_exact_conversion(mechanism: str) -> None:
    one = subject(heads=1)
    record = study(one, mechanism, Setting(1, 1, 1e-3), judged(one, one.model, "before", 0.0))
    assert record.exact
    assert [stage.stage for stage in record.stages] == ["before", "weights"]
    assert record.difference < 1e-5
    assert record.attention["after"] == record.attention["before"] - (LAYERS * _dropped(mechanism))


def _dropped(mechanism: str) -> int:
    linear = E * E + E
    return {"optimised": linear, "efficient": 2 * linear, "super": 2 * linear - (L * L + L)}[mechanism]


def test_each_stage_comes_nearer_to_the_original_and_the_original_stays_as_it_is() -> None:
    one = subject(heads=2)
    state = {name: x.clone() for name, x in one.model.state_dict().items()}
    record = study(one, "efficient", Setting(hidden_epochs=2, output_epochs=20, lr=3e-3), BEFORE)
    assert not record.exact
    assert [stage.stage for stage in record.stages] == list(records.STAGES)
    weights, calibrated, distilled = (stage.test for stage in record.stages[1:])
    assert weights < calibrated < distilled < 0
    assert [step for step, _ in record.curve] == [4 * epoch for epoch in range(23)]
    assert record.curve[-1][1] == pytest.approx(distilled)
    assert len(record.errors) == LAYERS
    assert all(torch.equal(x, state[name]) for name, x in one.model.state_dict().items())


def finished(mechanism: str, seed: int, lost: float) -> Record:
    stages = [Stage(name, 80.0 - lost * (name == "distilled"), 1.0, 1.0) for name in records.STAGES]
    sizes = {"before": 20, "after": 10}
    where = {"commit": "0123456" + 33 * "0", "command": "x", "cpu": "y", "threads": 1}
    settings = dict.fromkeys(("calibration_samples", "distillation_samples", "hidden_epochs", "output_epochs", "lr"), 1)
    return Record(
        *("minilm", "points", mechanism, 12, seed, False, sizes, sizes, 0.1, settings, stages),
        errors=[(0.5, 0.25)],
        curve=[(0, 1.0)],
        environment=where,
    )


def test_a_target_is_met_or_missed_by_the_mean_over_the_seeds() -> None:
    rows = [finished("optimised", 0, 1.0), finished("optimised", 1, 2.9), finished("efficient", 0, 2.1)]
    text = tables.document(rows)
    assert "| optimised | 0.00 | 0.00 | −1.95 ± 12.07 | approximated | at most 2 points lost: met |" in text
    assert "| efficient | 0.00 | 0.00 | −2.10 | approximated | at most 2 points lost: **missed** |" in text


def test_results_are_read_back_and_tables_leave_the_other_text_as_it_is(tmp_path: Path) -> None:
    finished("efficient", 1, 0.5).save(tmp_path / "records")
    finished("optimised", 0, 0.5).save(tmp_path / "records")
    found = records.read(tmp_path / "records")
    assert [r.name for r in found] == ["minilm-optimised-h12-s0", "minilm-efficient-h12-s1"]
    records.write(found, tmp_path)
    tables.write(found, tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text("Before.\n" + readme.read_text("utf-8") + "Behind.\n", "utf-8")
    once = readme.read_text("utf-8")
    tables.write(found[:1], tmp_path)
    tables.write(found, tmp_path)
    assert readme.read_text("utf-8") == once
    assert len((tmp_path / "conversion.csv").read_text("utf-8").splitlines()) == 1 + 2 * len(records.STAGES)
