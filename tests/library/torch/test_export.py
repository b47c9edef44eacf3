"""Programs for others: ONNX by both exporters, AOTInductor, ExecuTorch; and torch.export without the kernels."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import better_attention as ba
from better_attention.native.library import missing

MAX_LEN = 13
D = 16
MECHANISMS = [*ba.MECHANISMS, "super+expressive"]
SIZES = ((2, 5), (1, 1), (3, MAX_LEN), (1, 7), (4, 2))

pytestmark = pytest.mark.filterwarnings("ignore")  # exporters warn of their own deprecations, and of traced sizes


class Model(nn.Module):
    """Self-attention under padding, as models call it."""

    def __init__(self, mechanism: str, causal: bool, impl: str = "auto", **options: int) -> None:
        super().__init__()
        aligned = ba.Mechanism.of(mechanism).aligned
        self.attention = ba.MultiheadAttention(
            D,
            options.pop("heads", 2),
            batch_first=True,
            mechanism=mechanism,
            max_len=MAX_LEN if aligned else None,
            align_causal=causal and aligned,
            impl=impl,
            **options,
        )
        self.causal = causal
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.4)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        output, _ = self.attention(x, x, x, key_padding_mask=hidden, need_weights=False, is_causal=self.causal)
        return output


def example(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Inputs, and a padding that hides the last key, and every key of the last sample."""
    hidden = torch.zeros(batch, length, dtype=torch.bool)
    hidden[:, length - 1 :] = length > 1
    hidden[-1] = True
    return torch.randn(batch, length, D), hidden


DYNAMIC = ({0: Dim("batch", min=1, max=64), 1: Dim("length", min=1, max=MAX_LEN)},) * 2


def onnx_bytes(model: nn.Module, dynamo: bool) -> bytes:
    buffer = io.BytesIO()
    if dynamo:
        program = torch.onnx.export(model, example(2, 5), dynamo=True, dynamic_shapes=DYNAMIC, verbose=False)
        assert program is not None
        return program.model_proto.SerializeToString()
    axes = {name: {0: "batch", 1: "length"} for name in ("x", "hidden")}
    torch.onnx.export(
        model, example(2, 5), buffer, dynamo=False, input_names=["x", "hidden"], dynamic_axes=axes, verbose=False
    )
    return buffer.getvalue()


def check_onnx(model: nn.Module, dynamo: bool) -> None:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed: it is in the extra onnx")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: it is in the extra onnx")
    data = onnx_bytes(model, dynamo)
    assert {node.domain for node in onnx.load_from_string(data).graph.node} <= {""}, "an operator that is not standard"
    session = onnxruntime.InferenceSession(data)
    for batch, length in SIZES:
        inputs = example(batch, length)
        names = [i.name for i in session.get_inputs()]
        (got,) = session.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})
        torch.testing.assert_close(torch.from_numpy(got), model(*inputs).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize(
    "dynamo",
    [pytest.param(True, marks=pytest.mark.slow, id="dynamo"), pytest.param(False, id="legacy")],
)
def test_onnx_with_default_settings_at_any_batch_and_length(mechanism: str, causal: bool, dynamo: bool) -> None:
    check_onnx(Model(mechanism, causal).eval(), dynamo)


@pytest.mark.parametrize(
    ("mechanism", "kv_heads"),
    [
        ("standard", 2),
        ("optimised", 1),
        *(pytest.param(name, 2, marks=pytest.mark.slow) for name in ("expressive", "standard+align")),
    ],
)
def test_shared_heads_of_keys_and_values(mechanism: str, kv_heads: int) -> None:
    """Exported by torch at any batch and length, and as ONNX by the exporter that traces."""
    model = Model(mechanism, causal=True, heads=4, num_kv_heads=kv_heads).eval()
    program = torch.export.export(model, example(2, 5), dynamic_shapes=DYNAMIC).module()
    for batch, length in SIZES:
        inputs = example(batch, length)
        torch.testing.assert_close(program(*inputs), model(*inputs))
    check_onnx(model, dynamo=False)


@pytest.mark.parametrize("impl", ["native", "chunked"])
def test_an_implementation_without_translation_is_refused_by_name(impl: str) -> None:
    pytest.importorskip("onnx", reason="onnx is not installed: it is in the extra onnx")
    if impl == "native" and missing() is not None:
        pytest.skip(f"the compiled kernels are missing: {missing()}")
    with pytest.raises(torch.onnx.OnnxExporterError) as caught:
        onnx_bytes(Model("expressive", causal=False, impl=impl).eval(), dynamo=True)
    chain: list[BaseException] = [caught.value]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    own = str(chain[-1])
    assert "the ONNX exporter has no translation" in own
    assert "impl='auto'" in own


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_a_whole_encoder_in_onnx(mechanism: str) -> None:
    """The layer inside torch's own encoder, whose code around it the exporter sees as well."""
    encoder_layer = nn.TransformerEncoderLayer(D, 2, 32, batch_first=True)
    aligned = ba.Mechanism.of(mechanism).aligned
    encoder_layer.self_attn = ba.MultiheadAttention(
        D, 2, batch_first=True, mechanism=mechanism, max_len=MAX_LEN if aligned else None
    )
    encoder = nn.TransformerEncoder(encoder_layer, 2, enable_nested_tensor=False).eval()

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
            return self.encoder(x, src_key_padding_mask=hidden)

    check_onnx(Encoder(), dynamo=True)


def test_the_strict_mode_of_the_exporter_knows_what_it_exports_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exporter falls back to it where a model's code around the layer fails otherwise."""
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    program = torch.export.export(Model("standard", causal=False).eval(), example(2, 5), strict=True)
    assert not any("scaled_dot_product" in str(node.target) for node in program.graph.nodes)


# --- torch.export: for others, and with the kernels -------------------------------------------------------------------


def operators(program: torch.export.ExportedProgram) -> set[str]:
    """The namespaces of the operators that an exported program calls."""
    return {str(node.target).split(".")[0] for node in program.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("mechanism", ["standard", "super", "expressive"])
def test_an_exported_program_holds_torchs_operators_unless_asked(mechanism: str) -> None:
    program = torch.export.export(Model(mechanism, causal=True).eval(), example(2, 5), dynamic_shapes=DYNAMIC)
    assert "better_attention" not in operators(program)


def test_the_kernels_can_be_kept_in_by_name() -> None:
    if missing() is not None:
        pytest.skip(f"the compiled kernels are missing: {missing()}")
    model = Model("expressive", causal=True, impl="native").eval()
    program = torch.export.export(model, example(2, 5), dynamic_shapes=DYNAMIC)
    assert "better_attention" in operators(program)
    inputs = example(3, 11)
    torch.testing.assert_close(program.module()(*inputs), model(*inputs))


def test_explain_tells_what_an_export_would_take() -> None:
    seen: list[ba.Explanation] = []

    class Explaining(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            seen.append(ba.explain(q, q, q, score="expressive"))
            return ba.attention(q, q, q, score="expressive")

    torch.export.export(Explaining(), (torch.randn(4, 8, 5, 8),))
    assert seen[-1].chosen == "reference"
    assert any("impl='native' exports it" in reason for reason in seen[-1].reasons["native"]) or missing() is not None


LOAD = """
import io, sys, torch, better_attention
program = torch.export.load(io.BytesIO(sys.stdin.buffer.read()))
try:
    program.module()(torch.randn(2, 5, 16), torch.zeros(2, 5, dtype=torch.bool))
except RuntimeError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_program_with_kernels_says_so_where_they_are_missing() -> None:
    if missing() is not None:
        pytest.skip(f"the compiled kernels are missing: {missing()}")
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(Model("expressive", True, "native").eval(), example(2, 5)), buffer)
    environment = {**os.environ, "BETTER_ATTENTION_NATIVE": "0"}
    result = subprocess.run(
        [sys.executable, "-c", LOAD], input=buffer.getvalue(), capture_output=True, env=environment, check=False
    )
    assert b"kernels, which are missing here" in result.stdout, result.stderr.decode()
    assert b"impl='auto'" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["auto", "native"])
@pytest.mark.parametrize("mechanism", ["efficient", "super", "expressive"])
def test_aot_inductor(mechanism: str, impl: str, tmp_path: Path) -> None:
    """Compiled ahead of time; with impl='native' the package calls the kernels of the process that loads it."""
    if impl == "native" and missing() is not None:
        pytest.skip(f"the compiled kernels are missing: {missing()}")
    model = Model(mechanism, causal=True, impl=impl).eval()
    with torch.no_grad():
        program = torch.export.export(model, example(2, 5), dynamic_shapes=DYNAMIC)
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        loaded = torch._inductor.aoti_load_package(package)
        for batch, length in SIZES:
            inputs = example(batch, length)
            torch.testing.assert_close(loaded(*inputs), model(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.hosts
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_executorch(mechanism: str) -> None:
    pytest.importorskip("executorch", reason='pip install "better-attention[executorch]"')
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    model = Model(mechanism, causal=True).eval()
    program = torch.export.export(model, example(2, 5), dynamic_shapes=DYNAMIC)
    for partitioner in ([], [XnnpackPartitioner()]):
        buffer = to_edge_transform_and_lower(program, partitioner=partitioner).to_executorch().buffer
        method = Runtime.get().load_program(buffer).load_method("forward")
        assert method is not None
        for batch, length in SIZES:
            inputs = example(batch, length)
            torch.testing.assert_close(method.execute(inputs)[0], model(*inputs), rtol=1e-5, atol=1e-5)
