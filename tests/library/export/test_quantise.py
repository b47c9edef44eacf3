"""quantise(): int8 with torchao and ONNX Runtime, agreement measured, and refused where it is low."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import better_attention as ba
from better_attention.export.compare import cosine, relative_error, same_choice
from better_attention.export.quantise import weight_bytes
from helpers.layers import refused
from helpers.registry import scored_mechanisms

WIDTH, HEADS = 64, 4


class Classifier(nn.Module):
    def __init__(self, mechanism: str, **options: object) -> None:
        super().__init__()
        options = ba.Mechanism.of(mechanism).layer_options(9) | options
        self.layer = ba.MultiheadAttention(WIDTH, HEADS, batch_first=True, mechanism=mechanism, **options)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.layer(x, x, x, need_weights=False)[0])


def batches() -> list[Tensor]:
    return [torch.randn(2, 7, WIDTH), torch.randn(3, 5, WIDTH)]


@pytest.mark.parametrize(
    ("mechanism", "options"),
    [
        *((mechanism, {}) for mechanism in scored_mechanisms()),
        *((mechanism, {"num_kv_heads": 2}) for mechanism in ("standard", "optimised")),
    ],
)
def test_torch(mechanism: str, options: dict[str, object]) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed: it is in the extra edge")
    model, given = Classifier(mechanism, **options), batches()
    before = [model(x).detach() for x in given]
    result = ba.quantise(model, given)
    assert result.quantised == sum(isinstance(m, nn.Linear) for m in model.modules())
    assert all(torch.equal(model(x), y) for x, y in zip(given, before, strict=True)), "the original is as it was"
    assert model.training
    with torch.no_grad():  # as quantise() compares them: implementations differ in last bits, and steps of int8 by more
        found = [result.model(x) for x in given]
    assert not all(torch.equal(a, b) for a, b in zip(found, before, strict=True))
    assert result.agreement == pytest.approx(sum(cosine([a], [b]) for a, b in zip(found, before, strict=True)) / 2)
    assert result.agreement > 0.99
    assert result.bytes_after < 0.6 * result.bytes_before
    assert result.bytes_before == weight_bytes(model)


@pytest.mark.parametrize(
    "mechanism",
    ["super", pytest.param("standard", marks=pytest.mark.slow), pytest.param("expressive", marks=pytest.mark.slow)],
)
def test_onnx_runtime(mechanism: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: it is in the extra onnx")
    import onnxruntime

    model = Classifier(mechanism).eval()
    exported = ba.export_onnx(model, tmp_path / "model.onnx", batches()[0]).path
    result = ba.quantise(exported, batches(), path=tmp_path / "small.onnx")
    assert result.model == tmp_path / "small.onnx"
    assert result.quantised > 0
    assert result.bytes_after < result.bytes_before
    session = onnxruntime.InferenceSession(tmp_path / "small.onnx")
    x = batches()[0]
    (output,) = session.run(None, {"x": x.numpy()})
    assert cosine([torch.from_numpy(output)], [model(x).detach()]) > 0.99
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "small.onnx"]


def test_low_agreement_is_refused_unless_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed: it is in the extra edge")
    model, given = Classifier("standard"), batches()
    message = refused(lambda: ba.quantise(model, given, agreement=1.0), "agree", "refuse=False")
    assert "cosine similarity 0.99" in message
    assert ba.quantise(model, given, agreement=1.0, refuse=False).agreement < 1.0
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: it is in the extra onnx")
    exported = ba.export_onnx(model, tmp_path / "model.onnx", given[0]).path
    refused(lambda: ba.quantise(exported, given, path=tmp_path / "small.onnx", agreement=1.0), "agree")
    assert not (tmp_path / "small.onnx").exists()


def test_misuse_says_what_to_do(tmp_path: Path) -> None:
    model = Classifier("standard")
    refused(lambda: ba.quantise(model, []), "batches")
    refused(lambda: ba.quantise(model, batches(), path=tmp_path / "x"), "path")
    refused(lambda: ba.quantise(tmp_path / "x", batches()), "path")
    refused(lambda: ba.quantise(3, batches()), "model", "3")
    refused(lambda: ba.quantise(model, batches(), agreement=1.5), "agreement")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: it is in the extra onnx")
    with pytest.raises(FileNotFoundError, match=r"x\.onnx"):
        ba.quantise(tmp_path / "x.onnx", batches(), path=tmp_path / "y.onnx")


def test_how_far_outputs_are_apart() -> None:
    a = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert relative_error([a], [a]) == 0.0
    assert relative_error([a + 0.5], [a]) == pytest.approx(0.25)
    assert relative_error([a, a], [a]) == math.inf
    assert relative_error([a[0]], [a]) == math.inf
    nan = a.clone()
    nan[0, 0] = math.nan
    assert relative_error([nan], [a]) == math.inf
    assert relative_error([nan], [nan]) == 0.0
    assert cosine([-a], [a]) == pytest.approx(-1.0)
    assert cosine([nan], [a]) == 0.0
    assert same_choice([a.flip(-1)], [a]) == 0.0


def test_a_single_logit_is_compared_over_the_batch() -> None:
    """The cosine of single numbers is 1 for every two of the same sign, and their largest entry always the same."""
    expected, found = torch.tensor([[1.0], [-2.0], [3.0]]), torch.tensor([[3.0], [2.0], [1.0]])
    assert cosine([found], [expected]) == pytest.approx((3 - 4 + 3) / 14)
    assert same_choice([found], [expected]) == pytest.approx(2 / 3)
