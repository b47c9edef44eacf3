"""Several processes train as one does: losses, dropout, evaluation, checkpoints, and models spread over them."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from better_attention.lab.runs.folder import RunFolder
from better_attention.lab.runs.job import Job
from better_attention.lab.tasks.base import Task
from better_attention.lab.tasks.catalogue import TASKS
from better_attention.lab.tasks.optimisers import OPTIMISERS
from better_attention.lab.tasks.splits import Split, Splits
from better_attention.lab.tasks.variant import Variant
from better_attention.lab.training.evaluation import evaluate
from better_attention.lab.training.loop import Training
from better_attention.lab.training.processes import check_alike, make_accelerator
from better_attention.lab.training.progress import Interrupted
from helpers import tiny
from helpers.processes import forks, run_ranks

pytestmark = forks

LOSSES = ("train_loss", "validation_loss", "train_accuracy", "validation_accuracy")


def dropping(task: Task) -> Task:
    """The task with every kind of dropout that it has switched on, batches of 6 and four epochs at most."""
    rates = {field.name: 0.2 for field in fields(task) if field.name.endswith("dropout")}
    return replace(task, batch_size=6, epochs=4, patience=0, **rates)


def random_splits(task: Task) -> Splits:
    """15 samples for training, in batches of 6, 6 and 3; 7 and 5 for the others."""
    rows = task.random_samples(27)
    parts = [Split(rows.inputs[a:b], rows.targets[a:b]) for a, b in ((0, 15), (15, 22), (22, 27))]
    return Splits(*parts, assets={})


def curve(name: str, mechanism: str, folder: str, shard: bool = False, optimiser: str = "") -> list[dict[str, float]]:
    """Two epochs of a task of the catalogue on random samples, as each process sees them."""
    task = dropping(TASKS[name]("smoke"))
    task = replace(task, optimiser=optimiser or task.optimiser)
    training = Training(
        Job(task, Variant.of(mechanism), task.default_heads, 0),
        random_splits(task),
        RunFolder(Path(folder)),
        make_accelerator("cpu"),
        checkpoint_seconds=math.inf,
        shard=shard,
    )
    training.restore()
    for _ in range(2):
        training.train_epoch()
        training.validate()
    return [{key: line[key] for key in LOSSES} for line in training.position.curve]


def assert_same(found: list[dict[str, float]], expected: list[dict[str, float]], tolerance: float = 1e-5) -> None:
    for one, other in zip(found, expected, strict=True):
        for key in LOSSES:
            assert one[key] == pytest.approx(other[key], rel=tolerance), key


def drops_in(name: str) -> bool:
    """Whether dropout changes what a task trains, so that the comparisons below mean something."""
    return any(field.name.endswith("dropout") for field in fields(TASKS[name]("smoke")))


# --- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_train_as_one_does(processes: int, tmp_path: Path) -> None:
    """Dropout on weights, behind both maps and before the head; the last batch of 3 leaves one of four without any."""
    (alone,) = run_ranks(curve, 1, "digits", "expressive", tmp_path)
    together = run_ranks(curve, processes, "digits", "expressive", tmp_path)
    for found in together:
        assert_same(found, alone)


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_every_task_trains_on_two_processes_as_on_one(name: str, tmp_path: Path) -> None:
    assert drops_in(name)
    (alone,) = run_ranks(curve, 1, name, "efficient", tmp_path, seconds=500)
    for found in run_ranks(curve, 2, name, "efficient", tmp_path, seconds=500):
        assert_same(found, alone)


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", ["standard", "optimised", "super", "super+per-head", "efficient+expressive"])
def test_every_mechanism_trains_on_two_processes_as_on_one(mechanism: str, tmp_path: Path) -> None:
    (alone,) = run_ranks(curve, 1, "digits", mechanism, tmp_path)
    for found in run_ranks(curve, 2, "digits", mechanism, tmp_path):
        assert_same(found, alone)


def test_dropout_decides_what_is_compared_here(tmp_path: Path) -> None:
    """Without it the comparisons above could not fail."""
    task = dropping(TASKS["digits"]("smoke"))
    losses = []
    for rate in (0.0, 0.2):
        rates = {field.name: rate for field in fields(task) if field.name.endswith("dropout")}
        training = tiny.training(tmp_path, task=replace(task, **rates), splits=random_splits(task))
        training.job = replace(training.job, heads=task.default_heads)
        training.restore()
        training.train_epoch()
        losses.append(training.position.loss)
    assert abs(losses[0] - losses[1]) > 0.01 * losses[0]


# --- evaluation -------------------------------------------------------------------------------------------------------


def counted(samples: int) -> dict[str, float]:
    """Evaluation of a model that answers by a sample's own number."""

    class Told(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([x, -x], dim=1)

    numbers = torch.arange(samples, dtype=torch.float32)
    split = Split(numbers, torch.zeros(samples, dtype=torch.long))
    task = tiny.overriding(tiny.task(), evaluation_batch=property(lambda self: 3))
    return evaluate(make_accelerator("cpu"), Told(), task, split)


@pytest.mark.parametrize("samples", [1, 7, pytest.param(12, marks=pytest.mark.slow)])
def test_evaluation_counts_each_sample_once(samples: int) -> None:
    (alone,) = run_ranks(counted, 1, samples)
    for found in run_ranks(counted, 2, samples):
        assert found == pytest.approx(alone, rel=1e-7)  # sums of float32 in another order


@pytest.mark.parametrize("size", [1, 2, 3, 50])
@pytest.mark.parametrize("samples", [0, 1, 5, 12, 13])
def test_every_process_has_as_many_batches(samples: int, size: int) -> None:
    split = Split(torch.arange(samples), torch.arange(samples))
    for processes in (1, 2, 4):
        shares = [[x.tolist() for x, _ in split.batches(size, rank, processes)] for rank in range(processes)]
        assert len({len(share) for share in shares}) == 1
        assert sorted(x for share in shares for batch in share for x in batch) == list(range(samples))
        assert all(len(batch) <= size for share in shares for batch in share)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def part(folder: str, updates: int, shard: bool) -> str:
    """Train until ``updates`` updates are done, or to the end; what came of it."""
    left = [updates]

    def stop() -> bool:
        left[0] -= 1
        return left[0] == 0

    training = tiny.training(Path(folder), stop=stop, checkpoint_seconds=math.inf, dropout=0.2)
    training.accelerator, training.shard = make_accelerator("cpu"), shard
    training.__post_init__()
    try:
        training.run()
    except Interrupted as stopped:
        return str(stopped)
    return "finished"


def trained(folder: Path) -> dict[str, Any]:
    """The losses of a finished run."""
    record = json.loads((folder / "result.json").read_text("utf-8"))
    return {key: value for key, value in record.items() if key.endswith("_loss")}


@pytest.mark.filterwarnings("ignore:.*trained by")
def test_a_run_goes_on_with_any_number_of_processes(tmp_path: Path) -> None:
    """One process, then two, then one again, in the middle of epochs: the losses of a run in one piece."""
    run_ranks(part, 1, tmp_path / "whole", 0, False)
    for processes, updates in ((1, 4), (2, 5), (1, 0)):
        said = run_ranks(part, processes, tmp_path / "parts", updates, False)
    assert set(said) == {"finished"}
    assert trained(tmp_path / "parts") == pytest.approx(trained(tmp_path / "whole"), rel=1e-5)


# --- models that are spread over the processes ------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_spread_model_trains_as_on_one_process(processes: int, tmp_path: Path) -> None:
    (alone,) = run_ranks(curve, 1, "digits", "super", tmp_path)
    for found in run_ranks(curve, processes, "digits", "super", tmp_path, True):
        assert_same(found, alone)


@pytest.mark.slow
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_every_optimiser_trains_parts(optimiser: str, tmp_path: Path) -> None:
    (alone,) = run_ranks(curve, 1, "digits", "standard", tmp_path, False, optimiser)
    for found in run_ranks(curve, 2, "digits", "standard", tmp_path, True, optimiser):
        assert_same(found, alone)


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_every_task_trains_spread(name: str, tmp_path: Path) -> None:
    (alone,) = run_ranks(curve, 1, name, "standard", tmp_path, seconds=500)
    for found in run_ranks(curve, 2, name, "standard", tmp_path, True, seconds=500):
        assert_same(found, alone)


@pytest.mark.filterwarnings("ignore:.*trained by")
def test_a_spread_run_goes_on_in_one_piece_and_the_other_way_round(tmp_path: Path) -> None:
    run_ranks(part, 1, tmp_path / "whole", 0, False)
    run_ranks(part, 2, tmp_path / "parts", 4, True)
    shards = next((tmp_path / "parts").glob("checkpoint-*.shards"))
    assert {path.suffix for path in shards.iterdir()} == {".safetensors"}, "a pickle, perhaps"
    assert len(list(shards.iterdir())) == 2
    run_ranks(part, 1, tmp_path / "parts", 4, False)
    run_ranks(part, 2, tmp_path / "parts", 0, True)
    assert trained(tmp_path / "parts") == pytest.approx(trained(tmp_path / "whole"), rel=1e-5)
    record = json.loads((tmp_path / "parts" / "result.json").read_text("utf-8"))
    assert len(record["peak_memory_bytes"]) == 2
    assert all(2**20 < most < 2**40 for most in record["peak_memory_bytes"])
    assert record["shard"] == "fsdp"


@pytest.mark.filterwarnings("ignore:.*trained by")
def test_a_damaged_part_of_a_checkpoint_is_noticed(tmp_path: Path) -> None:
    """The checkpoint before it takes its place, for one process and for two."""
    run_ranks(part, 2, tmp_path, 3, True)
    run_ranks(part, 2, tmp_path, 3, True)
    newest = max(tmp_path.glob("checkpoint-*.shards"))
    victim = max(newest.iterdir())
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    training = tiny.training(tmp_path, dropout=0.2)
    with pytest.warns(UserWarning, match=rf"{newest.name} holds other files than were written"):
        training.restore()
    assert training.position.step == 3


# --- processes that do not fit together -------------------------------------------------------------------------------


def agreement(differing: int) -> str:
    accelerator = make_accelerator("cpu")
    data = "other" if accelerator.process_index == differing else "same"
    try:
        check_alike(accelerator, {"the version of torch": "2", "the data": data})
    except ValueError as error:
        return str(error)
    return ""


def test_processes_with_other_data_are_refused_by_all() -> None:
    said = run_ranks(agreement, 3, 2)
    assert len(set(said)) == 1
    assert "do not agree" in said[0]
    assert "the data: process 2 differs from process 0" in said[0]
    assert "torch" not in said[0]
    assert run_ranks(agreement, 2, -1) == ["", ""]
