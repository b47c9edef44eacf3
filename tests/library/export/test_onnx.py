"""export_onnx(): standard operators, any batch and length, parity with ONNX Runtime, and what is refused."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import better_attention as ba
from better_attention.export.inputs import by_name, guess_dynamic, variations
from helpers.layers import refused
from helpers.registry import scored_mechanisms

WIDTH, HEADS, BATCH, LENGTH = 12, 3, 3, 5


class Model(nn.Module):
    """One layer of a mechanism, with padding, a mask or causality."""

    def __init__(self, mechanism: str, causal: bool = False, **options: object) -> None:
        super().__init__()
        options = ba.Mechanism.of(mechanism).layer_options(9, causal=causal) | options
        self.layer = ba.MultiheadAttention(WIDTH, HEADS, batch_first=True, mechanism=mechanism, **options)
        self.causal = causal

    def forward(self, x: Tensor, padding: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        return self.layer(x, x, x, key_padding_mask=padding, attn_mask=mask, need_weights=False, is_causal=self.causal)[
            0
        ]


def padding() -> Tensor:
    mask = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    mask[0, 3:] = True
    return mask


def tokens() -> Tensor:
    return torch.randn(BATCH, LENGTH, WIDTH)


@pytest.fixture(autouse=True)
def _packages() -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=f"{name} is not installed: it is in the extra onnx")


@pytest.mark.parametrize(
    ("mechanism", "options"),
    [
        ("standard", {}),
        ("optimised", {"num_kv_heads": 1}),
        pytest.param("optimised", {"rotary": True, "window": 3}, marks=pytest.mark.slow),
        pytest.param("standard+align", {}, marks=pytest.mark.slow),
        pytest.param("expressive", {"alibi": "weight"}, marks=pytest.mark.slow),
    ],
)
def test_shared_heads(mechanism: str, options: dict[str, object], tmp_path: Path) -> None:
    """In the operator Attention, which shares keys as we do, and where only keys are shared."""
    model = Model(mechanism, causal=True).eval()
    own = {"max_len": 9, "align_causal": True} if "align" in mechanism else {}
    given: dict[str, object] = {"num_kv_heads": 2, **own, **options}
    model.layer = ba.MultiheadAttention(24, 6, batch_first=True, mechanism=mechanism, **given).eval()
    report = ba.export_onnx(model, tmp_path / "model.onnx", torch.randn(BATCH, LENGTH, 24))
    assert len(report.checks) > 1
    assert report.worst < 1e-5


QUICK = {("super", True)}
CELLS = [
    pytest.param(name, causal, marks=[] if (name, causal) in QUICK else [pytest.mark.slow])
    for name in scored_mechanisms()
    for causal in (False, True)
]


@pytest.mark.parametrize(("mechanism", "causal"), CELLS)
def test_every_mechanism_at_any_batch_and_length(mechanism: str, causal: bool, tmp_path: Path) -> None:
    report = ba.export_onnx(Model(mechanism, causal), tmp_path / "model.onnx", (tokens(), padding()))
    assert report.worst <= 1e-5
    names = [check.inputs for check in report.checks if check.error is not None]
    assert {"as given", "batch 1", "length 1", "padding all True in one sample"} <= set(names)
    softmax = ba.Mechanism.of(mechanism).score == "softmax"
    assert report.operators.get("Attention", 0) == softmax, "softmax alone is the operator"
    assert report.file_bytes == (tmp_path / "model.onnx").stat().st_size


def test_rows_that_a_mask_hides_are_zero_in_the_operator_too(tmp_path: Path) -> None:
    import onnxruntime

    model = Model("standard", bias=False)
    mask = torch.rand(BATCH * HEADS, LENGTH, LENGTH) < 0.4
    inputs = {"x": tokens(), "mask": mask}
    sizes = {"x": {1: "length"}, "mask": {1: "length", 2: "length"}}
    report = ba.export_onnx(model, tmp_path / "model.onnx", inputs, dynamic=sizes)
    assert report.operators["Attention"] == 1
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    hidden = torch.ones_like(mask)
    (output,) = session.run(None, {"x": tokens().numpy(), "mask": hidden.numpy()})
    assert not output.any()


@pytest.mark.slow
def test_below_opset_23_the_formula(tmp_path: Path) -> None:
    report = ba.export_onnx(Model("standard"), tmp_path / "model.onnx", (tokens(), padding()), opset=20)
    assert "Attention" not in report.operators
    assert "Softmax" in report.operators
    assert report.worst <= 1e-5


@pytest.mark.slow
def test_an_ordinary_export_is_not_changed_by_ours(tmp_path: Path) -> None:
    ba.export_onnx(Model("standard"), tmp_path / "model.onnx", (tokens(), padding()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter uses deprecated parts of torch
        program = torch.onnx.export(Model("standard").eval(), (tokens(),), dynamo=True, opset_version=23, verbose=False)
    assert "Attention" not in {node.op_type for node in program.model_proto.graph.node}


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = Model("super", dropout=0.5)
    model.layer.out_proj.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ba.export_onnx(model, tmp_path / "model.onnx", tokens())
    assert model.training
    assert model.layer.training
    assert not model.layer.out_proj.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_lengths_beyond_the_models_are_told_and_not_compared(tmp_path: Path) -> None:
    model = Model("super", max_len=LENGTH)
    report = ba.export_onnx(model, tmp_path / "model.onnx", tokens())
    (check,) = [check for check in report.checks if check.error is None]
    assert check.inputs == f"length {LENGTH + 1}"
    assert "max_len" in check.note
    assert check.note in str(report)


class Forgetful(nn.Module):
    """A model whose export is wrong: an exporter keeps what a Python number was when it looked."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (2.0 if torch.compiler.is_exporting() else 1.0)


def test_a_wrong_export_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("the file of before")
    refused(lambda: ba.export_onnx(Forgetful(), path, tokens()), "differs", "as given", "tolerance=None")
    assert path.read_text() == "the file of before"
    assert list(tmp_path.iterdir()) == [path]
    report = ba.export_onnx(Forgetful(), path, tokens(), tolerance=None)
    assert report.worst > 0.5
    assert report.as_dict()["worst"] == report.worst


def test_fixed_sizes(tmp_path: Path) -> None:
    report = ba.export_onnx(Model("efficient"), tmp_path / "model.onnx", tokens(), dynamic={})
    assert [check.inputs for check in report.checks] == ["as given"]


def test_misuse_says_what_to_do(tmp_path: Path) -> None:
    path, model = tmp_path / "model.onnx", Model("standard")
    refused(lambda: ba.export_onnx("model", path, tokens()), "model", "nn.Module")
    refused(lambda: ba.export_onnx(model, path, [1.0]), "tensor", "float")
    refused(lambda: ba.export_onnx(model, path, 3), "tensor", "3")
    refused(lambda: ba.export_onnx(model, path, {"y": tokens()}), "forward", "y")
    refused(lambda: ba.export_onnx(model, path, tokens(), dynamic={"z": {0: "batch"}}), "'z'", "x")
    refused(lambda: ba.export_onnx(model, path, tokens(), dynamic={"x": {3: "batch"}}), "axis 3")
    refused(lambda: ba.export_onnx(model, path, tokens(), dynamic={"x": {0: "n", 1: "n"}}), "'n'", "3", "5")
    refused(lambda: ba.export_onnx(model, path, tokens(), dynamic=5), "dynamic")
    refused(lambda: ba.export_onnx(model, path, tokens(), opset=11), "opset", "18")
    refused(lambda: ba.export_onnx(model, path, tokens(), opset=99), "opset", "99", "newest", "23")
    fixed = {"input": {0: "batch", 1: "features"}}
    refused(lambda: ba.export_onnx(nn.Linear(3, 2), path, torch.ones(5, 3), dynamic=fixed), "axis 1 of input to 3")
    refused(lambda: ba.export_onnx(Model("standard", impl="native"), path, tokens()), kind=Exception)
    assert not path.exists()


def test_the_guess_of_dynamic_axes() -> None:
    ids, mask, image = torch.ones(2, 7, dtype=torch.long), torch.ones(2, 7), torch.ones(2, 3, 8, 8)
    assert guess_dynamic({"ids": ids, "mask": mask}) == {name: {0: "batch", 1: "length"} for name in ("ids", "mask")}
    assert guess_dynamic({"image": image}) == {"image": {0: "batch"}}
    assert guess_dynamic({"ids": ids, "labels": torch.ones(2, 4)})["labels"] == {0: "batch"}
    assert guess_dynamic({"features": torch.ones(2, 4)})["features"] == {0: "batch"}


def test_variations_keep_values_and_change_sizes() -> None:
    inputs = {"ids": torch.arange(14).view(2, 7), "mask": torch.ones(2, 7, dtype=torch.long)}
    seen = {v.name: v.inputs for v in variations(inputs, guess_dynamic(inputs))}
    assert seen["batch 1, length 1"]["ids"].shape == (1, 1)
    assert seen["length 8"]["mask"].shape == (2, 8)
    assert set(seen["batch 3"]["ids"].flatten().tolist()) <= set(range(14))
    assert seen["mask all 0 in one sample"]["mask"].tolist() == [[0] * 7, [1] * 7]
    assert by_name(Model("standard"), tokens()).keys() == {"x"}


@pytest.mark.parametrize("name", ["onnxscript", "onnxruntime"])
def test_without_the_packages_the_error_names_the_extra(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"better-attention\[onnx\]"):
        ba.export_onnx(nn.Linear(2, 3), tmp_path / "m.onnx", torch.ones(4, 2))
    assert not (tmp_path / "m.onnx").exists()
