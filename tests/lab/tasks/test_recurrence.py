"""Recurrences: the sequences, what is held out, what counts, and that a small one is learned."""

from __future__ import annotations

import json
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from better_attention import MECHANISMS, assert_causal
from better_attention.lab.runs.folder import RunFolder
from better_attention.lab.runs.job import Job
from better_attention.lab.runs.load import load_run
from better_attention.lab.tasks.catalogue import TASKS
from better_attention.lab.tasks.recurrence import RULES, RecurrenceTask, continued, split_states
from better_attention.lab.tasks.splits import Split
from better_attention.lab.tasks.variant import Variant
from better_attention.lab.training.loop import Training
from better_attention.lab.training.progress import Interrupted, Position


def task(**changes: Any) -> RecurrenceTask:
    base = TASKS["recurrence"]("small")
    assert isinstance(base, RecurrenceTask)
    small: dict[str, Any] = {"modulus": 5, "delay": 3, "steps": 7, "train_samples": 40, "test_samples": 9}
    return replace(base, **(small | {"batch_size": 8, "epochs": 3, "width": 8} | changes))


def by_hand(state: list[int], a: int, b: int, steps: int, modulus: int) -> list[int]:
    """x_t = (a x_{t-1} + b x_{t-τ}) mod N, symbol after symbol."""
    x = list(state)
    for t in range(len(state), len(state) + steps):
        x.append((a * x[t - 1] + b * x[t - len(state)]) % modulus)
    return x


def whole(split: Split, of: RecurrenceTask) -> Tensor:
    """The sequences themselves: what is read, and behind it the last symbol."""
    head = len(of.rules) > 1
    return torch.cat([split.inputs[:, head:], split.targets[:, -1:]], dim=1)


def test_a_sequence_written_down() -> None:
    # 1 0 2 | 2+1=0, 0+0=0, 0+2=2, 2+0=2 modulo 3
    assert continued(torch.tensor([[1, 0, 2]]), torch.tensor([[1, 1]]), 4, 3).tolist() == [[1, 0, 2, 0, 0, 2, 2]]
    # N = 2, τ = 2 is the Fibonacci sequence modulo 2: 0 1 1 0 1 1
    assert continued(torch.tensor([[0, 1]]), torch.tensor([[1, 1]]), 4, 2).tolist() == [[0, 1, 1, 0, 1, 1]]


@pytest.mark.parametrize(("modulus", "delay"), [(2, 2), (2, 9), (5, 3), (64, 2), (16, 12), (64, 64)])
def test_every_sequence_follows_its_rule(modulus: int, delay: int) -> None:
    of = task(modulus=modulus, delay=delay)
    splits = of.load()
    assert len(splits.train) == 40
    for split in (splits.train, splits.validation, splits.test):
        assert split.inputs.shape[1] == of.length == delay + 6
        for row, inputs, targets in zip(whole(split, of).tolist(), split.inputs, split.targets, strict=True):
            assert row == by_hand(row[:delay], 1, 1, 7, modulus)
            assert inputs.tolist() == row[:-1]
            assert targets.tolist() == row[delay:]


def test_several_rules_are_told_by_the_first_token() -> None:
    of = task(rules=("plus", "minus", "back", "negative"))
    assert of.length == 3 + 7 - 1 + 1
    splits = of.load()
    for split in (splits.train, splits.validation, splits.test):
        for first, row in zip(split.inputs[:, 0].tolist(), whole(split, of).tolist(), strict=True):
            a, b = RULES[of.rules[first - 5]]
            assert row == by_hand(row[:3], a, b, 7, 5)
    assert set(splits.train.inputs[:, 0].tolist()) == {5, 6, 7, 8}
    model = of.model(Variant.of("super"), 2)
    assert model.tokens.num_embeddings == 9
    assert model(splits.test.inputs).shape == (9, of.length, 5)


@pytest.mark.parametrize(
    ("modulus", "delay", "rules"),
    [(2, 2, ("plus",)), (2, 3, ("plus",)), (3, 5, ("plus", "minus")), (7, 4, ("plus",)), (64, 64, ("plus", "back"))],
)
def test_no_initial_state_is_in_two_splits(modulus: int, delay: int, rules: tuple[str, ...]) -> None:
    of = task(modulus=modulus, delay=delay, rules=rules, train_samples=600, test_samples=200)
    splits = of.load()
    train, validation, test = (
        {tuple(row[:delay]) for row in whole(split, of).tolist()}
        for split in (splits.train, splits.validation, splits.test)
    )
    assert min(map(len, (train, validation, test))) >= 1
    assert not train & validation
    assert not train & test
    assert not validation & test


def test_the_split_is_by_the_hash_of_the_state() -> None:
    """SHA-256 of the symbols as bytes, computed here again: test lies below a tenth, validation below two tenths."""
    wanted = {"train": 50, "validation": 20, "test": 20}
    limits = {"test": (0.0, 0.1), "validation": (0.1, 0.2), "train": (0.2, 1.0)}
    for modulus, delay, seed in ((64, 64, 0), (64, 64, 1), (11, 7, 0)):
        for name, states in split_states(modulus, delay, wanted, seed).items():
            low, high = limits[name]
            for state in states.tolist():
                share = int.from_bytes(sha256(bytes(state)).digest()[:8]) / 2**64
                assert low <= share < high
    every = split_states(3, 6, dict.fromkeys(wanted, 1_000), 0)
    assert [len(every[name]) for name in ("test", "validation", "train")] == [72, 72, 585]
    assert len({tuple(state) for states in every.values() for state in states.tolist()}) == 729
    assert not torch.equal(split_states(64, 64, wanted, 0)["train"], split_states(64, 64, wanted, 1)["train"])


def test_the_data_depend_on_their_settings_alone() -> None:
    first = task(modulus=16, delay=12).load()
    torch.manual_seed(5)
    assert (
        first.digest
        == task(modulus=16, delay=12, lr=1.0, scaling="raw", positions="alibi-score", layers=2).load().digest
    )
    assert first.digest != task(modulus=16, delay=12, data_seed=1).load().digest
    assert "our own definition" in first.notes[0]
    assert "our own definition" in task().source
    assert "0.0 % of the test sequences" in first.notes[1]


def test_what_was_met_on_the_way_is_counted() -> None:
    of = task(modulus=2, delay=4, train_samples=200, test_samples=200)
    splits = of.load()
    windows = {tuple(row[i : i + 4]) for row in whole(splits.train, of).tolist() for i in range(len(row) - 3)}
    starts = [tuple(row[:4]) for row in splits.test.inputs.tolist()]
    share = 100 * sum(start in windows for start in starts) / len(starts)
    assert splits.notes[1].startswith(f"{share:.1f} % of the test sequences")


def perfect(inputs: Tensor, modulus: int, delay: int) -> Tensor:
    """Logits of a predictor made by hand: what follows token t is x_t + x_{t-τ+1}; before that it says symbol 0."""
    B, L = inputs.shape
    logits = torch.zeros(B, L, modulus)
    for t in range(L):
        right = (inputs[:, t] + inputs[:, t - delay + 1]) % modulus if t >= delay - 1 else torch.zeros(B).long()
        logits[torch.arange(B), t, right] = 30.0
    return logits


def test_what_can_be_known_counts_and_nothing_else() -> None:
    of = task(modulus=7, delay=4)
    split = of.load().train
    logits = perfect(split.inputs, 7, 4)
    assert of.correct(logits, split.targets).tolist() == [1.0] * 40
    assert float(of.losses(logits, split.targets).max()) < 1e-9
    noise = logits.clone()
    noise[:, :3] = torch.randn(40, 3, 7)  # x_1, x_2, x_3 are drawn at random: nothing about them counts
    assert torch.equal(of.losses(noise, split.targets), of.losses(logits, split.targets))
    for t in range(3, of.length):  # and every other symbol does
        wrong = logits.clone()
        wrong[:, t] = wrong[:, t].roll(1, dims=-1)
        assert torch.allclose(of.correct(wrong, split.targets), torch.tensor(6 / 7))
        assert torch.allclose(of.losses(wrong, split.targets), torch.tensor(30 / 7), atol=1e-4)
    one_off = perfect(split.inputs, 7, 3)
    assert float(of.correct(one_off, split.targets).mean()) < 0.5


@pytest.mark.parametrize("mechanism", [*MECHANISMS, "super+expressive"])
def test_the_models_do_not_look_ahead(mechanism: str) -> None:
    of = task(positions="alibi-score", layers=2)
    assert_causal(of.build(mechanism, 2).eval(), of.load().test.inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modulus": 1}, "modulus must be >= 2"),
        ({"modulus": 257}, "modulus must be <= 256"),
        ({"delay": 1}, "delay must be >= 2"),
        ({"steps": 0}, "steps must be >= 1"),
        ({"rules": ()}, "rules must be a tuple of names out of plus"),
        ({"rules": ("plus", "times")}, "rules must be one of 'plus'"),
        ({"rules": ("plus", "minus"), "modulus": 2}, "'plus' and 'minus' are the same modulo 2"),
        ({"positions": "sine"}, "positions must be one of"),
        ({"scaling": "cube"}, "scaling must be one of 'sqrt', 'raw', 'learned'"),
        ({"target_accuracy": 101.0}, "target_accuracy must be between 0 and 100"),
        ({"train_samples": None}, "train_samples must be a whole number"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        task(**change)


def test_the_length_follows_from_the_rest() -> None:
    of = task()
    assert (of.length, replace(of, delay=30).length, replace(of, rules=("plus", "back")).length) == (9, 36, 10)
    assert task().with_settings(json.loads(json.dumps(replace(of, delay=30).settings()))).length == 36


def test_the_setting_of_one_hot_tokens_relu_and_momentum_arrives() -> None:
    of = task(embedding="one-hot", activation="relu", optimiser="sgd", lr=0.01, width=8, heads=(1,))
    model = of.build("expressive", 1)
    assert torch.equal(model.tokens(torch.arange(5)), torch.eye(5, 8))
    assert model.blocks[0].activation is torch.nn.functional.relu
    assert (
        of.size("expressive", 1) == sum(p.numel() for p in model.parameters()) == task().size("expressive", 1) - 5 * 8
    )
    made = of.make_optimiser(model)
    assert (type(made), made.defaults["momentum"], made.defaults["lr"]) == (torch.optim.SGD, 0.7, 0.01)
    assert of.with_settings(json.loads(json.dumps(of.settings()))) == of


def test_momentum_comes_back_exactly_from_a_checkpoint(tmp_path: Path) -> None:
    """An interrupted run of SGD ends with the numbers of an uninterrupted one."""
    changes: dict[str, Any] = {"optimiser": "sgd", "lr": 0.05, "embedding": "one-hot", "activation": "relu"}
    whole = training(tmp_path / "whole", **changes)
    whole.run()
    count = iter(range(100))
    with pytest.raises(Interrupted):
        training(tmp_path / "cut", stop=lambda: next(count) == 7, **changes).run()
    resumed = training(tmp_path / "cut", **changes)
    resumed.run()
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


@pytest.mark.parametrize("rules", [("plus",), ("plus", "back")])
@pytest.mark.parametrize("positions", ["learned", "rotary", "alibi-weight"])
@pytest.mark.parametrize("scaling", ["sqrt", "learned"])
@pytest.mark.parametrize("name", [*MECHANISMS, "super+per-head", "efficient+expressive"])
def test_the_computed_size_is_that_of_the_model(
    name: str, scaling: str, positions: str, rules: tuple[str, ...]
) -> None:
    """At the width of the task, and at the one that makes parameters equal."""
    for equal in (False, True):
        of = task(width=24, layers=3, equal_params=equal, rules=rules, positions=positions, scaling=scaling)
        assert of.size(name, 2) == sum(p.numel() for p in of.build(name, 2).parameters())


def training(folder: Path, mechanism: str = "standard", **changes: Any) -> Training:
    own = {key: changes.pop(key) for key in ("progress", "stop") if key in changes}
    of = task(**changes)
    return Training(Job(of, Variant.of(mechanism), 2, 0), of.load(), RunFolder(folder), Accelerator(cpu=True), **own)


EASY: dict[str, Any] = {
    "modulus": 8, "delay": 4, "steps": 8, "positions": "learned", "scaling": "raw",
    "train_samples": 3_200, "test_samples": 256, "batch_size": 64, "epochs": 12, "width": 32,
}  # fmt: skip


@pytest.fixture(scope="module")
def solved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of softmax attention that has learned its rung."""
    folder = tmp_path_factory.mktemp("solved")
    training(folder, **EASY).run()
    return folder


def test_softmax_learns_a_small_rung_and_stops_when_it_has(solved: Path) -> None:
    record = json.loads((solved / "result.json").read_text())
    assert record["test_accuracy"] > 98
    assert record["validation_accuracy"] >= 99
    assert record["epochs"] < 12
    curve = [json.loads(line)["validation_accuracy"] for line in (solved / "metrics.jsonl").read_text().splitlines()]
    assert [accuracy >= 99 for accuracy in curve] == [False] * (len(curve) - 1) + [True]


def test_without_a_target_it_goes_on(tmp_path: Path) -> None:
    assert training(tmp_path / "on", epochs=2, target_accuracy=None).run().values["epochs"] == 2
    assert training(tmp_path / "off", epochs=2, target_accuracy=0.0).run().values["epochs"] == 1


def test_a_run_that_was_stopped_ends_with_the_same_bits(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"rules": ("plus", "minus"), "scaling": "learned", "positions": "rotary", "dropout": 0.1}
    straight = training(tmp_path / "straight", "efficient+expressive", **changes)
    record = straight.run().values
    seen: list[Position] = []

    def stop() -> bool:
        return len(seen) in (3, 7)

    for _ in range(3):
        again = training(
            tmp_path / "again", "efficient+expressive", stop=stop, progress=lambda p, _: seen.append(p), **changes
        )
        try:
            resumed = again.run().values
        except Interrupted:
            seen.append(again.position)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("straight", "again")]
    assert weights[0] == weights[1]
    assert resumed["test_loss"] == record["test_loss"]


def test_a_finished_run_predicts_what_comes_next(solved: Path) -> None:
    run = load_run(solved)
    found = run.predict(["3 1 4 1 4 5", "2,7,1,0,2,1"])  # 5 + 4 = 1 and 1 + 1 = 2 modulo 8
    assert [one.label for one in found] == ["1", "2"]
    assert found[0].probability > 0.5
    wrongs = (
        ("0 8 1 1", "symbols 0 ... 7, received '0 8 1 1'"),
        ("0 1 1", "at least 4 symbols"),
        ("0 " * 12, "at most 11"),
    )
    for wrong, message in wrongs:
        with pytest.raises(ValueError, match=message):
            run.predict(wrong)
    with pytest.raises(ValueError, match=r"lengths \[4, 5\]"):
        run.predict(["0 1 2 3", "0 1 2 3 4"])
    with pytest.raises(TypeError, match="reads texts of symbols"):
        run.predict([3])


def test_with_several_rules_the_first_word_is_the_rule() -> None:
    several = task(rules=("plus", "minus"))
    assets = several.load().assets
    assert several.encode("minus 3 0 4", assets).tolist() == [[6, 3, 0, 4]]
    assert several.show(torch.tensor([6, 3, 0, 4]), assets).tokens == ("minus", "3", "0", "4")
    with pytest.raises(ValueError, match=r"the rule \(plus, minus\), then at least 3 symbols"):
        several.encode("3 0 4", assets)
