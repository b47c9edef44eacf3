"""Pace: the rival on torch's own layer computes the same, and hours are multiplied rightly."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from better_attention import MultiheadAttention
from better_attention.lab.comparison.gather import gather
from better_attention.lab.comparison.plan import Plan
from better_attention.lab.models.text_classifier import TextClassifier
from better_attention.lab.models.vision_transformer import VisionTransformer
from better_attention.lab.runs.snapshot import Snapshot
from better_attention.lab.tasks.catalogue import TASKS
from better_attention.lab.tasks.image import ImageTask
from better_attention.lab.tasks.recurrence import RecurrenceTask
from better_attention.lab.tasks.variant import Variant
from better_attention.lab.training import step_time
from better_attention.lab.training.events import Estimated, Event
from better_attention.lab.training.randomness import initial_model
from better_attention.lab.training.step_time import Pace, measure, on_torch
from helpers import tiny


def recurrence() -> RecurrenceTask:
    task = TASKS["recurrence"]("smoke")
    assert isinstance(task, RecurrenceTask)
    return replace(task, train_samples=64, test_samples=16, batch_size=32, width=8)


def vit(**changes: Any) -> VisionTransformer:
    sizes: dict[str, Any] = {"image_size": 12, "patch": 4, "channels": 1, "classes": 5, "width": 28, "layers": 3}
    return VisionTransformer(**(sizes | {"heads": 7} | changes))


def text(**changes: Any) -> TextClassifier:
    sizes: dict[str, Any] = {"vocabulary": 31, "length": 11, "width": 20, "layers": 2, "heads": 5}
    return TextClassifier(**(sizes | changes))


def same(ours: nn.Module, inputs: torch.Tensor) -> None:
    with torch.no_grad():
        for parameter in ours.parameters():  # biases start at zero, where a swapped one would not show
            parameter.add_(0.3 * torch.randn_like(parameter))
    rival = on_torch(ours)
    assert rival is not None
    kinds = [type(m) for m in rival.modules()]
    assert MultiheadAttention not in kinds
    assert kinds.count(nn.MultiheadAttention) == sum(isinstance(m, MultiheadAttention) for m in ours.modules())
    with torch.inference_mode():
        torch.testing.assert_close(rival.eval()(inputs), ours.eval()(inputs), rtol=1e-4, atol=1e-5)


def test_the_rival_of_a_vision_transformer_computes_the_same() -> None:
    same(vit(), torch.randint(0, 256, (3, 12, 12), dtype=torch.uint8))


@pytest.mark.parametrize("padding", [0, 4])
def test_the_rival_of_a_text_classifier_computes_the_same(padding: int) -> None:
    tokens = torch.randint(1, 31, (3, 11))
    tokens[1, :padding] = 0
    same(text(), tokens)


def test_it_trains_with_the_same_dropout_rate() -> None:
    rival = on_torch(vit(dropout=0.25))
    assert rival is not None
    assert [m.dropout for m in rival.modules() if isinstance(m, nn.MultiheadAttention)] == [0.25] * 3


def test_the_original_is_left_alone() -> None:
    ours = vit()
    rival = on_torch(ours)
    assert rival is not None
    assert sum(isinstance(m, MultiheadAttention) for m in ours.modules()) == 3
    before = next(ours.parameters()).clone()
    with torch.no_grad():
        for parameter in rival.parameters():
            parameter.zero_()
    assert torch.equal(next(ours.parameters()), before)


@pytest.mark.parametrize("need_weights", [False, True])  # torch reads the hint in one case, the mask in the other
def test_a_causal_layer_gets_the_mask_that_torch_wants(need_weights: bool) -> None:
    layer = MultiheadAttention(12, 3, batch_first=True)
    rival = on_torch(nn.ModuleList([layer]))
    assert rival is not None
    x = torch.randn(2, 7, 12)
    with torch.inference_mode():
        ours, _ = layer.eval()(x, x, x, is_causal=True, need_weights=need_weights)
        theirs, _ = rival.eval()[0](x, x, x, is_causal=True, need_weights=need_weights)  # type: ignore[index]
        free, _ = layer(x, x, x, need_weights=False)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    assert (ours - free).abs().max() > 1e-2


@pytest.mark.parametrize("options", [{"scale": 0.5}, {"scale": "learned"}, {"rotary": True}, {"alibi": "weight"}])
def test_what_torch_cannot_compute_has_no_rival(options: dict[str, Any]) -> None:
    assert on_torch(vit(options=options)) is None


@pytest.mark.parametrize("positions", ["rotary", "alibi-weight", "alibi-score", "learned"])
@pytest.mark.parametrize("scaling", ["sqrt", "learned"])
def test_a_recurrence_has_a_pace_beside_torchs_layer(positions: str, scaling: str) -> None:
    """With learned positions and torch's own scale where its layer knows no others."""
    task = replace(recurrence(), positions=positions, scaling=scaling)
    found = measure(task, task.load(), Variant.of("expressive"), 2, torch.device("cpu"))
    assert found.times_as_fast is not None
    assert 0.05 < found.times_as_fast < 20


@pytest.mark.parametrize("mechanism", ["efficient", "super", "expressive"])
def test_another_mechanism_has_no_rival_of_its_own(mechanism: str) -> None:
    assert on_torch(vit(mechanism=mechanism)) is None


def test_hours_are_updates_times_epochs() -> None:
    """90 samples in batches of 16 are 6 updates, the last one short; 5 epochs of them at 0.25 s: 7.5 s."""
    task = tiny.task(batch_size=16, epochs=5)
    assert Pace(0.25, None).run_seconds(task, 90, 10, 7) == pytest.approx(7.5)
    assert Pace(0.25, None).run_seconds(task, 96, 10, 7) == pytest.approx(7.5)
    assert Pace(0.25, None).run_seconds(task, 97, 10, 7) == pytest.approx(8.75)


def test_evaluation_counts_too() -> None:
    """Validation after each of 5 epochs, every split at the end: 5 * 10 + 90 + 10 + 7; training and test are scored."""
    task = tiny.task(batch_size=16, epochs=5)
    assert Pace(0.0, None, evaluated=0.5).run_seconds(task, 90, 10, 7) == pytest.approx(0.5 * 157)
    assert Pace(0.0, None, scored=0.25).run_seconds(task, 90, 10, 7) == pytest.approx(0.25 * 97)
    few = replace(TASKS["translation"]("smoke"), bleu_samples=8)
    assert Pace(0.0, None, scored=0.25).run_seconds(few, 90, 10, 7) == pytest.approx(0.25 * 15)


def test_what_a_sample_costs_is_measured_on_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that the model and the scores push forward: 3 s a batch of 16, 8 s for 32 samples that are scored."""
    now = [0.0]
    model = tiny.task().build("super", 3)

    class Slow(nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            assert not self.training
            now[0] += 3.0
            return model.eval()(inputs)

    def scores(task: Any, model: Any, split: Any, assets: Any) -> dict[str, float]:
        now[0] += 0.25 * len(split)
        return {}

    monkeypatch.setattr(step_time.time, "perf_counter", lambda: now[0])
    task = tiny.overriding(tiny.task(batch_size=16), scores=scores)
    found = step_time._evaluation(task, Slow(), tiny.splits())
    assert found == (3 / 16, 0.25)


def test_the_ratio_is_the_median_over_neighbouring_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours 9, then 2, 8, 3 after the first call, theirs 9, then 4, 2, 3: the median of 0.5, 4, 1."""
    now = [0.0]
    seconds = iter([9.0, 9.0, 2.0, 4.0, 2.0, 8.0, 3.0, 3.0])  # every second round begins with theirs

    def losses(task: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        now[0] += next(seconds) if torch.is_grad_enabled() else 0.5
        return ImageTask.losses(task, logits, targets)

    monkeypatch.setattr(step_time.time, "perf_counter", lambda: now[0])
    task = tiny.overriding(tiny.task(), losses=losses)
    found = measure(task, tiny.splits(), Variant.of("super"), 3, torch.device("cpu"), seconds=0.0)
    assert (found.seconds, found.times_as_fast) == (3.0, 1.0)
    assert found.evaluated == 0.5 / 16


def test_measuring_draws_no_random_number_and_trains_nothing() -> None:
    before = torch.get_rng_state()
    found = measure(tiny.task(), tiny.splits(), Variant.of("super"), 3, torch.device("cpu"), seconds=0.0)
    assert torch.equal(torch.get_rng_state(), before)
    assert found.seconds > 0
    assert found.times_as_fast is not None
    assert 0.01 < found.times_as_fast < 100
    assert math.isfinite(found.times_as_fast)
    model = initial_model(tiny.task(), Variant.of("super"), 3, 0)
    assert all(p.grad is None for p in model.parameters())


def test_the_watcher_hears_the_sum_over_what_is_left(tmp_path: Path) -> None:
    """Two mechanisms, two seeds, 6 updates, 2 epochs: 2 (0.5 + 0.25) 12 = 18 s; of one run that is left, 3 s."""
    speeds = {"standard": Pace(0.5, 1.1), "super": Pace(0.25, 0.9)}
    asked: list[str] = []
    heard: list[tuple[float, int]] = []

    def known(task: Any, train: Any, variant: Variant, *rest: Any, **options: Any) -> Pace:
        asked.append(variant.name)
        return speeds[variant.name]

    def listen(event: Event) -> None:
        if isinstance(event, Estimated):
            heard.append((event.seconds, event.runs))

    variants = [Variant.of(name) for name in speeds]
    plan = Plan(tiny.task(epochs=2), variants, (3,), 2, tmp_path, device="cpu")
    tiny.train(plan, listen, known)
    assert heard == [(pytest.approx(18.0), 4)]
    assert asked == ["standard", "super"]  # once for all seeds
    (tmp_path / "super-h3-s1" / "result.json").unlink()
    tiny.train(plan, listen, known)
    assert heard[1:] == [(pytest.approx(3.0), 1)]
    assert asked[2:] == ["super"]
    records = gather(plan, Snapshot.read(tmp_path), tiny.splits()).records
    assert {r["mechanism"]: r["times_as_fast"] for r in records} == {"standard": 1.1, "super": 0.9}
    for record in records:
        assert 0 <= record["waiting_share"] < 1  # type: ignore[operator]
    tiny.train(plan, listen, known)
    assert len(heard) == 2  # nothing is left: nothing is said
