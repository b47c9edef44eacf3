"""The training loop: fairness, resuming bit by bit, and stopping in time."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from better_attention import MECHANISMS
from better_attention.lab.runs import checkpoint
from better_attention.lab.runs.states import run_state
from better_attention.lab.tasks.image import ImageTask
from better_attention.lab.tasks.variant import Variant
from better_attention.lab.training import randomness
from better_attention.lab.training.evaluation import evaluate
from better_attention.lab.training.progress import DivergedError, Interrupted, Position
from better_attention.lab.training.randomness import derive, epoch_order, initial_model
from helpers import TESTS, tiny


def weights(folder: Path) -> str:
    """SHA-256 of a finished run's weights."""
    return sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def curve(folder: Path) -> list[dict[str, float]]:
    """A run's curve without its times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("seconds", "waiting")} for line in lines]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("straight")
    tiny.training(folder).run()
    return folder


@pytest.mark.parametrize("mechanism", [*MECHANISMS, "super+expressive"])
def test_what_mechanisms_share_starts_from_the_same_values(mechanism: str) -> None:
    standard = initial_model(tiny.task(), Variant.of("standard"), 3, seed=5).state_dict()
    model = initial_model(tiny.task(), Variant.of(mechanism), 3, seed=5).state_dict()
    shared = [name for name in model if name in standard]
    assert len(shared) >= 20
    assert all(torch.equal(model[name], standard[name]) for name in shared)
    assert {name.rsplit(".", 2)[-2] for name in model.keys() - standard.keys()} <= {"align"}


def test_initial_weights_depend_on_the_seed_alone() -> None:
    super_ = Variant.of("super")
    first = initial_model(tiny.task(), super_, 3, seed=5).state_dict()
    torch.rand(7)
    again = initial_model(tiny.task(), super_, 3, seed=5).state_dict()
    other = initial_model(tiny.task(), super_, 3, seed=6).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    name = "blocks.0.attention.align.weight"
    assert not torch.equal(first[name], other[name])
    before = torch.get_rng_state()
    initial_model(tiny.task(), super_, 3, seed=5)
    assert torch.equal(before, torch.get_rng_state())


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    order = epoch_order(97, 3, 2)
    assert sorted(order.tolist()) == list(range(97))
    assert torch.equal(order, epoch_order(97, 3, 2))
    assert not torch.equal(order, epoch_order(97, 2, 3))
    assert len({derive("order", a, b) for a in range(10) for b in range(10)}) == 100


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_every_mechanism_learns(mechanism: str, tmp_path: Path) -> None:
    record = tiny.training(tmp_path, mechanism, epochs=12, width=12, dropout=0.0, head_dropout=0.0).run().values
    lines = curve(tmp_path)
    assert lines[-1]["train_loss"] < 0.7 * lines[0]["train_loss"]
    assert record["train_accuracy"] > 50
    assert record["mechanism"] == mechanism


def test_the_record_tells_everything(straight: Path) -> None:
    record = json.loads((straight / "result.json").read_text())
    lines = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    best = min(lines, key=lambda line: line["validation_loss"])
    assert (record["epochs"], record["best_epoch"]) == (3, best["epoch"])
    assert record["validation_loss"] == best["validation_loss"]  # the best weights were restored
    assert record["epoch_seconds"] == pytest.approx(sum(line["seconds"] for line in lines) / 3)
    assert record["samples"] == {"train": 90, "validation": 10, "test": 37}
    assert record["attention_params"] == 2 * (6 * 6 + 6) + 16 * 16 + 16
    assert {record[f"{s}_{m}"] for s in ("train", "test") for m in ("top5", "bleu")} == {None}
    assert {*record} >= {"task", "scale", "score", "heads", "seed", "total_params", "device", "threads", "commit"}
    assert record["versions"]["torch"] == torch.__version__
    assert not list(straight.glob("checkpoint-*"))


def test_the_best_weights_are_kept_and_not_the_last(tmp_path: Path) -> None:
    """Validation is made to be best after epoch 2; the stored weights must be those of that moment."""
    after: dict[int, Tensor] = {}

    def losses(task: Any, logits: Tensor, targets: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return ImageTask.losses(task, logits, targets)
        return torch.full((len(targets),), abs(run.position.epoch - 2.0))

    run = tiny.training(tmp_path, task=tiny.overriding(tiny.task(epochs=4), losses=losses))

    def note(position: Position, steps: int) -> None:
        after[position.epoch] = run.model.state_dict()["head.weight"].clone()

    run.progress = note
    assert run.run().values["best_epoch"] == 2
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")["head.weight"]
    assert torch.equal(stored, after[2])
    assert not torch.equal(stored, after[4])


def test_the_test_split_is_touched_once_and_last(tmp_path: Path) -> None:
    """Of 37 samples, where validation has 10: after each of 3 epochs and at the end; training is evaluated once."""
    seen: list[int] = []

    def losses(task: Any, logits: Tensor, targets: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            seen.append(len(targets))
        return ImageTask.losses(task, logits, targets)

    tiny.training(tmp_path, task=tiny.overriding(tiny.task(), losses=losses)).run()
    assert seen[:3] == [10] * 3
    assert sorted(seen[3:-1]) == [10, 90]
    assert seen[-1] == 37


def test_evaluation_counts_every_sample_once() -> None:
    """Three processes are played one after the other; their sums must be those of one process alone."""
    run = tiny.training(Path("unused"))
    model = initial_model(run.task, run.job.variant, 3, 0)
    task = tiny.overriding(run.task, evaluation_batch=5)
    alone = evaluate(run.accelerator, model, task, run.splits.test)

    class Rank:
        num_processes, device = 3, torch.device("cpu")

        def __init__(self, rank: int, others: Tensor | None = None) -> None:
            self.process_index, self.others, self.own = rank, others, torch.zeros(3)

        def reduce(self, values: Tensor, kind: str) -> Tensor:
            assert kind == "sum"
            self.own = values
            return values if self.others is None else values + self.others

    parts = [Rank(0), Rank(1)]
    for part in parts:
        with pytest.raises(RuntimeError, match=r"evaluation counted 1[23] samples of 37"):
            evaluate(part, model, task, run.splits.test)
    together = evaluate(Rank(2, parts[0].own + parts[1].own), model, task, run.splits.test)
    assert together == pytest.approx(alone, rel=1e-6)


def test_patience_stops_a_run_that_no_longer_improves(tmp_path: Path) -> None:
    record = tiny.training(tmp_path, epochs=50, patience=2, lr=1e-30, weight_decay=0.0).run().values
    assert (record["epochs"], record["best_epoch"]) == (3, 1)
    assert not Position(epoch=4, best_epoch=1).finished(tiny.task(epochs=50, patience=0))


@pytest.mark.parametrize("stops", [{1}, {6}, {8, 11}, {3, 4, 5, 17}, {18}])
def test_an_interrupted_run_ends_with_the_same_bits(straight: Path, tmp_path: Path, stops: set[int]) -> None:
    """6 updates an epoch: stops in the middle, at an epoch's last update, several, and at the very last."""
    done = 0

    def count(position: Position, steps: int) -> None:
        nonlocal done
        done += 1

    def stop() -> bool:
        return done + 1 in stops  # asked before the update that `count` then counts

    for _ in stops:
        with pytest.raises(Interrupted):
            tiny.training(tmp_path, progress=count, stop=stop).run()
    tiny.training(tmp_path, progress=count).run()
    assert done == 18
    assert weights(tmp_path) == weights(straight)
    assert curve(tmp_path) == curve(straight)


@pytest.mark.parametrize("threads", [1, 2])
def test_going_on_with_other_threads_is_told_and_put_down(tmp_path: Path, threads: int) -> None:
    before = torch.get_num_threads()
    task = tiny.task(epochs=1, train_samples=20, test_samples=7, batch_size=9)
    few: dict[str, Any] = {"task": task, "splits": task.load()}
    try:
        torch.set_num_threads(threads)
        with pytest.raises(Interrupted):
            tiny.training(tmp_path, **few, stop=lambda: True).run()
        torch.set_num_threads(3 - threads)
        told = "1 thread so far, continues with 2" if threads == 1 else "2 threads so far, continues with 1"
        with pytest.warns(
            UserWarning, match=rf"trained with {told}.* last bits .*OMP_NUM_THREADS={threads} to reproduce"
        ):
            record = tiny.training(tmp_path, **few).run().values
    finally:
        torch.set_num_threads(before)
    assert [part["threads"] for part in record["sessions"]] == [threads, 3 - threads]
    assert {part["processes"] for part in record["sessions"]} == {1}
    assert record["threads"] == 3 - threads


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from helpers import tiny
done = 0
def die(position, steps):
    global done
    done += 1
    if done == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
tiny.training(Path(sys.argv[2]), progress=die, checkpoint_seconds=0.0).run()
"""


def kill_after(folder: Path, updates: int) -> None:
    here = str(TESTS)
    command = [sys.executable, "-c", KILLED, here, str(folder), str(updates)]
    ended = subprocess.run(command, timeout=120, check=False, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(straight: Path, tmp_path: Path) -> None:
    kill_after(tmp_path, 9)
    saved = checkpoint.load(tmp_path)
    assert saved is not None
    assert (saved[1]["epoch"], saved[1]["step"]) == (2, 2)  # the ninth update was not saved yet
    done: list[int] = []
    tiny.training(tmp_path, progress=lambda position, steps: done.append(position.step)).run()
    assert len(done) == 18 - 8
    assert weights(tmp_path) == weights(straight)
    assert curve(tmp_path) == curve(straight)


@pytest.mark.slow
def test_twenty_kills(straight: Path, tmp_path: Path) -> None:
    for number, updates in enumerate([1, 2, 3, 5, 6, 7, 9, 11, 12, 13, 15, 17]):
        kill_after(tmp_path / str(number), updates)
        if number % 3 == 0 and updates < 12:
            kill_after(tmp_path / str(number), 3)
            kill_after(tmp_path / str(number), 2)
        tiny.training(tmp_path / str(number)).run()
        assert weights(tmp_path / str(number)) == weights(straight)


def test_without_its_generator_in_place_a_resumed_run_would_differ(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control of the comparison above: dropout that depends on anything else shows."""
    monkeypatch.setattr(randomness, "reseed", lambda device, seed: None)
    tiny.training(tmp_path).run()
    assert weights(tmp_path) != weights(straight)


def test_two_equal_runs_are_equal_and_another_seed_is_not(straight: Path, tmp_path: Path) -> None:
    tiny.training(tmp_path / "a").run()
    tiny.training(tmp_path / "b", seed=1).run()
    assert weights(tmp_path / "a") == weights(straight)
    assert curve(tmp_path / "a") == curve(straight)
    assert weights(tmp_path / "b") != weights(straight)


def test_a_finished_run_is_kept_as_it_is(straight: Path) -> None:
    before = weights(straight)

    def never(position: Position, steps: int) -> None:
        raise AssertionError("a finished run was trained again")

    record = tiny.training(straight, progress=never).run().values
    assert record == json.loads((straight / "result.json").read_text())
    assert weights(straight) == before


def test_another_configuration_is_refused_with_the_differences(straight: Path) -> None:
    with pytest.raises(ValueError, match=r"holds another run:\n  lr: 0.01 there, 0.02 now\n"):
        tiny.training(straight, lr=0.02).run()


@pytest.mark.parametrize("kind", ["nan loss", "inf loss", "gradient alone"])
def test_what_is_not_finite_stops_the_run_before_the_update(kind: str, tmp_path: Path) -> None:
    good: dict[str, Tensor] = {}

    def poisoned(self: Any, logits: Tensor, targets: Tensor) -> Tensor:
        losses = ImageTask.losses(self, logits, targets)
        if not torch.is_grad_enabled() or (run.position.epoch, run.position.step) != (2, 3):
            return losses
        if kind == "gradient alone":
            return losses + (logits.sum(1) * 0).sqrt()  # 0 in value, 0 * infinity in gradient
        return losses * (math.nan if kind == "nan loss" else math.inf)

    def note(position: Position, steps: int) -> None:
        good.update({name: tensor.clone() for name, tensor in run.model.state_dict().items()})

    task = tiny.overriding(tiny.task(), losses=poisoned)
    run = tiny.training(tmp_path, task=task, checkpoint_seconds=0.0, progress=note)
    with pytest.raises(DivergedError, match=r"epoch 2, step 4 of 6: loss \S+, gradient norm (nan|inf)"):
        run.run()
    assert all(torch.equal(tensor, good[name]) for name, tensor in run.model.state_dict().items())
    assert not (tmp_path / "result.json").exists()
    assert "epoch 2, step 4 of 6" in json.loads((tmp_path / "diverged.json").read_text())["reason"]
    found = run_state(tmp_path)
    assert found.state == "diverged"
    assert "epoch 2, step 4 of 6" in found.detail
    saved = checkpoint.load(tmp_path)
    assert saved is not None
    assert (saved[1]["epoch"], saved[1]["step"]) == (2, 3)
    assert all(t.isfinite().all() for t in saved[0].values())
    seen: list[int] = []
    again = tiny.training(tmp_path, checkpoint_seconds=0.0, progress=lambda p, _: seen.append(p.step))
    again.stop = lambda: len(seen) > 0
    with pytest.raises(Interrupted):  # what made it diverge is gone
        again.run()
    assert run_state(tmp_path).state == "interrupted"
    tiny.training(tmp_path).run()
    assert run_state(tmp_path).state == "finished"
    assert not (tmp_path / "diverged.json").exists()


def test_nothing_is_pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    def bomb(*arguments: object, **named: object) -> None:
        raise AssertionError("something was pickled")

    for name in ("dumps", "dump", "loads", "load", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, bomb)
    asked = iter([False] * 7 + [True])
    with pytest.raises(Interrupted):
        tiny.training(tmp_path, checkpoint_seconds=0.0, stop=lambda: next(asked)).run()
    tiny.training(tmp_path).run()


PARALLEL = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from helpers import tiny
tiny.training(Path(sys.argv[2]), dropout=0.0, head_dropout=0.0, batch_size=7).run()
"""


@pytest.mark.slow
def test_two_processes_train_the_same_model(tmp_path: Path) -> None:
    """Batches of 7 are shared 4 : 3, the last one of 6 as 3 : 3; the gradient must be that of the whole batch."""
    alone = tiny.training(tmp_path / "alone", dropout=0.0, head_dropout=0.0, batch_size=7).run().values
    (tmp_path / "script.py").write_text(PARALLEL)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, str(tmp_path / "script.py"), str(TESTS), str(tmp_path / "both")]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, timeout=300, check=False, capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr
    both = json.loads((tmp_path / "both" / "result.json").read_text())
    assert both["processes"] == 2
    assert both["samples"] == alone["samples"]
    for key in ("train_loss", "validation_loss", "test_loss"):
        assert both[key] == pytest.approx(alone[key], rel=1e-3)
