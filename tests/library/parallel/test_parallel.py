"""Layers divided by heads and DTensor inputs, in several processes over gloo; the cases are in ``helpers/``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import better_attention as ba
from helpers import ranks

MODULES = [
    "helpers.tensor_parallel_cases",
    "helpers.grouped_parallel_cases",
    "helpers.sequence_cases",
    "helpers.dtensor_cases",
]
QUICK = [
    "tensor_parallel: mechanism efficient+expressive",
    "tensor_parallel: a mask per head",
    "tensor_parallel: state dicts",
    "tensor_parallel: refusals",
    "grouped_parallel: optimised, rotary, a mask per head",
    "grouped_parallel: caches",
    "grouped_parallel: state dicts",
    "grouped_parallel: refusals",
    "sequence: causal",
    "sequence: padding, expressive",
    "sequence: collectives",
    "sequence: refusals",
    "dtensor: over samples and heads",
    "dtensor: refusals",
    "dtensor: explanations",
]
"""Two processes start once in each unit run, and take these."""


def held(modules: list[str], world: int, folder: Path, cases: list[str]) -> None:
    results = ranks.run(modules, world, folder, seconds=600, cases=cases)
    wrong = [f"{case}: {outcome}" for case, outcome in results.items() if outcome != "ok"]
    assert not wrong, "\n".join(wrong)
    assert len(results) == len(cases) if cases else len(results) >= 6


def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    held(MODULES, 2, tmp_path, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("module", MODULES)
def test_every_case_in_several_processes(module: str, world: int, tmp_path: Path) -> None:
    held([module], world, tmp_path, [])


def test_a_case_that_fails_is_reported_and_no_process_is_left(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"a process of helpers.no_such_module ended early"):
        ranks.run(["helpers.no_such_module"], 1, tmp_path, seconds=60)


def test_the_plan_names_the_parts_that_a_layer_has() -> None:
    layer = ba.MultiheadAttention(16, 4, mechanism="super", max_len=8, scale="learned")
    assert list(ba.parallel_plan(layer)) == ["", "q_proj", "align", "scaling", "out_proj"]
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), ba.MultiheadAttention(16, 4, add_bias_kv=True))
    names = ["q_proj", "k_proj", "v_proj", "extra_k", "extra_v", "out_proj"]
    assert list(ba.parallel_plan(model)) == ["1", *(f"1.{name}" for name in names)]


def test_a_plan_needs_a_layer() -> None:
    with pytest.raises(ValueError, match=r"no better_attention.MultiheadAttention in Linear"):
        ba.parallel_plan(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module"):
        ba.parallel_plan("layer")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"output_layouts must be Replicate\(\) or Shard"):
        ba.parallel_plan(ba.MultiheadAttention(16, 4), output_layouts="rows")
