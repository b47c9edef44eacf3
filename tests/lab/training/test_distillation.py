"""Distillation: the teacher's loss reaches each layer of the student; interrupted, it ends with the same numbers."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import better_attention as ba
from better_attention.lab.training.distillation import schedule
from better_attention.lab.training.matching import logits_loss
from better_attention.lab.training.progress import DivergedError, Interrupted
from helpers.layers import padding, refused, tokens

B, L, E = 8, 5, 8


def encoder(layers: int = 3) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(E, 2, 11, batch_first=True, dropout=0.1)
    model = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return model


def pair(mechanism: str = "efficient") -> tuple[nn.Module, nn.Module]:
    teacher = encoder()
    student = copy.deepcopy(teacher)
    ba.convert(student, mechanism, exact=False, max_len=L if ba.Mechanism.of(mechanism).aligned else None)
    return student, teacher


def batches(number: int = 4) -> list[Tensor]:
    return [tokens(B, L, E, dtype=torch.float32) for _ in range(number)]


def without_dropout(*models: nn.Module) -> None:
    for model in models:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(module, ba.MultiheadAttention | nn.MultiheadAttention):
                module.dropout = 0.0


@pytest.mark.parametrize("mechanism", ["optimised", "efficient", "super", "expressive"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_loss_of_the_teacher_reaches_each_layer_of_the_student(layer: int, mechanism: str) -> None:
    """Only this layer may learn, and only the loss of the hidden states is there: its own loss falls."""
    student, teacher = pair(mechanism)
    without_dropout(student, teacher)
    student.requires_grad_(False)
    attention = student.layers[layer].self_attn
    attention.requires_grad_(True)
    before = {name: p.clone() for name, p in attention.named_parameters()}
    result = ba.distil(student, teacher, batches(), hidden_epochs=8, output_epochs=0, lr=1e-2)
    assert result.layers == [f"layers.{i}.self_attn" for i in range(3)]
    assert result.hidden[-1][layer] < 0.97 * result.hidden[0][layer]
    for other in range(layer):  # what lies before it cannot have changed
        assert result.hidden[-1][other] == pytest.approx(result.hidden[0][other], rel=1e-5)
    changed = {name for name, p in attention.named_parameters() if not torch.equal(p, before[name])}
    assert changed >= {name for name in before if name.endswith("weight")}


def test_the_outputs_come_closer() -> None:
    student, teacher = pair()
    result = ba.distil(student, teacher, batches(), hidden_epochs=2, output_epochs=20, lr=1e-2)
    assert len(result.hidden) == 2
    assert len(result.output) == 20
    assert result.output[-1] < 0.5 * result.output[0]
    assert teacher.training


def test_the_teacher_is_not_changed_and_the_same_seed_gives_the_same_student() -> None:
    student, teacher = pair()
    twin, other, data = copy.deepcopy(student), copy.deepcopy(student), batches()
    before = copy.deepcopy(teacher.state_dict())
    for one in (student, twin):
        ba.distil(one, teacher, data, seed=3)
    assert all(torch.equal(x, before[name]) for name, x in teacher.state_dict().items())
    assert all(torch.equal(x, twin.state_dict()[name]) for name, x in student.state_dict().items())
    ba.distil(other, teacher, data, seed=4)
    assert not all(torch.equal(x, other.state_dict()[name]) for name, x in student.state_dict().items())


class StopAfter:
    """Asks to stop once, after some number of updates."""

    def __init__(self, updates: int) -> None:
        self.left = updates

    def __call__(self) -> bool:
        self.left -= 1
        return self.left == 0


@pytest.mark.parametrize("updates", [1, 7, 8, 9, 11])
def test_an_interrupted_distillation_ends_with_the_same_bits(updates: int, tmp_path: Path) -> None:
    """Within the first stage, at its end and within the second; dropout included."""
    student, teacher = pair("super")
    twin, data = copy.deepcopy(student), batches()
    options = {"hidden_epochs": 2, "output_epochs": 2}
    whole = ba.distil(student, teacher, data, **options)
    fresh = copy.deepcopy(twin)
    with pytest.raises(Interrupted, match=f"update {updates} of 16"):
        ba.distil(twin, teacher, data, folder=tmp_path, stop=StopAfter(updates), **options)
    resumed = ba.distil(fresh, teacher, data, folder=tmp_path, **options)
    assert resumed == whole
    assert all(torch.equal(x, fresh.state_dict()[name]) for name, x in student.state_dict().items())
    done: list[int] = []
    again = ba.distil(twin, teacher, data, folder=tmp_path, progress=lambda step, *_: done.append(step), **options)
    assert again == whole
    assert done == []


def test_padding_does_not_count() -> None:
    class Masked(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.inner(x, src_key_padding_mask=attention_mask == 0)

    student, teacher = (Masked(model) for model in pair())
    without_dropout(student, teacher)
    mask, results = (~padding(B, L)).long(), []
    x = tokens(B, L, E, dtype=torch.float32)
    other = torch.where(mask.bool()[..., None], x, tokens(B, L, E, dtype=torch.float32))
    for data in (x, other):
        twin = copy.deepcopy(student)
        results.append(ba.distil(twin, teacher, [{"x": data, "attention_mask": mask}]))
    for new, old in zip(results[0].hidden[0], results[1].hidden[0], strict=True):
        assert new == pytest.approx(old, rel=1e-4)
    assert results[0].output == pytest.approx(results[1].output, rel=1e-4)


def test_the_divergence_of_logits_is_that_of_the_probabilities() -> None:
    got, want, t = tokens(2, 3, 5), tokens(2, 3, 5), 2.0
    p, q = (want / t).softmax(-1), (got / t).softmax(-1)
    expected = (p * (p.log() - q.log())).sum(-1)
    torch.testing.assert_close(logits_loss(got, want, None, t), expected.mean() * t * t)
    keep = torch.tensor([[True, True, False], [True, False, False]])
    torch.testing.assert_close(logits_loss(got, want, keep, t), expected[keep].mean() * t * t)


def test_the_learning_rate_rises_and_falls_to_almost_nothing() -> None:
    rates = [schedule(step, 100) for step in range(100)]
    top = rates.index(max(rates))
    assert top == 5
    assert rates[:6] == sorted(rates[:6])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[-1] < 0.001
    assert schedule(0, 1) > 0


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    student, teacher = pair()
    data = batches()
    refused(lambda: ba.distil(teacher, teacher, data), "no converted layer", kind=ValueError)
    refused(lambda: ba.distil(student, nn.Linear(2, 2), data), "layers.0.self_attn", kind=ValueError)
    refused(lambda: ba.distil(student, teacher, []), "no batches", kind=ValueError)
    refused(lambda: ba.distil(student, teacher, data[0]), "list of batches", kind=TypeError)
    refused(lambda: ba.distil(student, teacher, data, lr=-1.0), "lr", kind=ValueError)
    refused(lambda: ba.distil(student, teacher, data, hidden_epochs=-1), "hidden_epochs", kind=ValueError)
    ba.distil(student, teacher, data, folder=tmp_path)
    refused(lambda: ba.distil(student, teacher, data, folder=tmp_path, seed=1), "settings", kind=ValueError)
    refused(lambda: ba.distil(student, teacher, data[1:], folder=tmp_path), "batches", kind=ValueError)
    student.requires_grad_(False)
    refused(lambda: ba.distil(student, teacher, data), "requires a gradient", kind=ValueError)


def test_a_loss_that_is_not_finite_ends_it() -> None:
    student, teacher = pair()
    data = [torch.full((B, L, E), torch.nan)]
    with pytest.raises(DivergedError, match="lower lr"):
        ba.distil(student, teacher, data)


def test_a_loss_of_your_own() -> None:
    student, teacher = pair()
    seen: list[object] = []

    def loss(got: Tensor, want: Tensor, batch: Tensor) -> Tensor:
        seen.append(batch)
        return 1 - nn.functional.cosine_similarity(got, want, dim=-1).mean()

    result = ba.distil(student, teacher, batches(), hidden_epochs=0, output_epochs=10, lr=1e-2, loss=loss)
    assert len(seen) == 40
    assert result.hidden == []
    assert result.output[-1] < result.output[0]


TOGETHER = """
import sys
import torch
import better_attention as ba
from better_attention.lab.training.processes import make_accelerator
from torch import nn

torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(8, 2, 11, batch_first=True)
teacher, student = (nn.TransformerEncoder(layer, 2, enable_nested_tensor=False) for _ in range(2))
student.load_state_dict(teacher.state_dict())
ba.convert(student, "efficient", exact=False)
data = [torch.randn(4, 5, 8) for _ in range(6)]
accelerator = make_accelerator("cpu")
start = student.layers[-1].linear2.weight.clone()
result = ba.distil(student, teacher, data, hidden_epochs=2, output_epochs=0, accelerator=accelerator)
assert torch.equal(student.layers[-1].linear2.weight, start)  # behind the last attention: no loss reaches it
stages = {"hidden_epochs": 2, "output_epochs": 2}
result = ba.distil(student, teacher, data, **stages, accelerator=accelerator, folder=sys.argv[1])
weights = torch.cat([p.detach().flatten() for p in student.parameters()])
everywhere = accelerator.gather(weights[None])
assert torch.equal(everywhere[0], everywhere[1])
print("processes", accelerator.num_processes, len(result.hidden), len(result.output), flush=True)
"""


@pytest.mark.slow
def test_two_processes_share_the_batches_and_end_with_one_student(tmp_path: Path) -> None:
    script = tmp_path / "together.py"
    script.write_text(TOGETHER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(script), str(tmp_path / "checkpoints")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("processes 2 2 2") == 2
