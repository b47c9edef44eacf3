"""torch.compile without graph breaks or needless recompiles, and torch.export."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from helpers.compiler import Programs
from helpers.layers import ALL, CAUSAL, MASKS, NAMED, layer, masks_for, padding, tokens

B, N, E, MAX_LEN = 2, 2, 6, 13
LENGTHS = (5, 3, 7, 11, MAX_LEN)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(module: nn.Module, x: Tensor, arguments: dict[str, object], call: nn.Module) -> list[Tensor]:
    """Output (weights too, if asked for) and every gradient of one call of ``module``, through ``call``."""
    module.zero_grad()
    x = x.detach().clone().requires_grad_()
    output, weights = call(x, x, x, **arguments)
    output.square().sum().backward()
    gradients = [p.grad.clone() for p in (x, *module.parameters())]
    return [output.detach(), *([] if weights is None else [weights.detach()]), *gradients]


def check_compiled(
    name: str, mask: str, need_weights: bool, backend: str, *, lengths: tuple[int, ...] = LENGTHS
) -> None:
    module = layer(name, E, N, max_len=MAX_LEN).double()
    counter = Programs(backend)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    for length in lengths:
        arguments = {"need_weights": need_weights, **MASKS[mask](B, length, length, N, torch.float64)}
        x = tokens(B, length, E)
        torch.testing.assert_close(
            step(module, x, arguments, compiled), step(module, x, arguments, module), rtol=1e-10, atol=1e-12
        )
    assert 1 <= counter.count <= 2, f"{counter.count} compilations for lengths {lengths}"


# --- torch.compile ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mask"),
    [("super causal", "is_causal and padding"), ("expressive", "padding bool")],
)
def test_one_graph_for_every_length(name: str, mask: str) -> None:
    check_compiled(name, mask, need_weights=False, backend="aot_eager")


EVERY_LAYER = [(name, "is_causal and padding" if name in CAUSAL else "mask and padding", False) for name in ALL]
EVERY_MASK = [
    (name, mask, (i + j) % 2 == 0)  # weights asked for in every second case
    for i, name in enumerate(("standard", "super causal", "expressive"))
    for j, mask in enumerate(masks_for(name))
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mask", "need_weights"), [*EVERY_LAYER, *EVERY_MASK])
def test_one_graph_for_every_layer_and_every_mask(name: str, mask: str, need_weights: bool) -> None:
    check_compiled(name, mask, need_weights, backend="aot_eager")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's own
@pytest.mark.parametrize("mask", ["none", "mask and padding"])
@pytest.mark.parametrize("name", NAMED)
def test_inductor(name: str, mask: str) -> None:
    check_compiled(name, mask, need_weights=False, backend="inductor")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMED)
def test_cross_attention_with_both_lengths_free(name: str) -> None:
    module = layer(name, E, N, max_len=MAX_LEN).double()
    counter = Programs("aot_eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    for L, S in [(3, 5), (5, 3), (7, MAX_LEN), (11, 2), (2, 11)]:
        q, k = tokens(B, L, E), tokens(B, S, E)
        torch.testing.assert_close(compiled(q, k, k, need_weights=False), module(q, k, k, need_weights=False))
    assert counter.count <= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", CAUSAL)
def test_inside_a_compiled_encoder_layer(name: str) -> None:
    host = nn.TransformerEncoderLayer(E, N, 7, dropout=0.0, batch_first=True).double()
    host.self_attn = layer(name, E, N, max_len=MAX_LEN).double()
    compiled = torch.compile(host, fullgraph=True, dynamic=True, backend="aot_eager")
    for mode in (True, False):
        host.train(mode)
        for length in LENGTHS[:3]:
            x, hidden = tokens(B, length, E), padding(B, length)
            with torch.set_grad_enabled(mode):
                torch.testing.assert_close(
                    compiled(x, src_key_padding_mask=hidden), host(x, src_key_padding_mask=hidden)
                )


def test_too_long_an_input_is_refused_when_compiled_too() -> None:
    module = layer("super", E, N, max_len=5).double()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    x = tokens(B, 5, E)
    torch.testing.assert_close(compiled(x, x, x), module(x, x, x))
    longer = tokens(B, 7, E)
    with pytest.raises((ValueError, RuntimeError), match=r"(?s)max_len|5"):
        compiled(longer, longer, longer)


# --- torch.export -------------------------------------------------------------------------------------------------


class SelfAttention(nn.Module):
    """What a model does with the layer; one length for query, key and value."""

    def __init__(self, attention: nn.Module, **arguments: object) -> None:
        super().__init__()
        self.attention = attention
        self.arguments = arguments

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        output, weights = self.attention(x, x, x, key_padding_mask=hidden, **self.arguments)
        return output if weights is None else (output, weights)


def saved_and_loaded(program: torch.export.ExportedProgram) -> nn.Module:
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    return torch.export.load(buffer).module()


def check_exported(name: str, *, strict: bool = False, **arguments: object) -> None:
    model = SelfAttention(layer(name, E, N, max_len=MAX_LEN), **arguments).double().eval()
    batch, length = Dim("batch", min=1, max=64), Dim("length", min=2, max=MAX_LEN)
    dynamic = {"x": {0: batch, 1: length}, "hidden": {0: batch, 1: length}}
    example = (tokens(B, 5, E), padding(B, 5))
    program = torch.export.export(model, example, dynamic_shapes=dynamic, strict=strict)
    loaded = saved_and_loaded(program)
    for b, s in [(B, 5), (3, 11), (1, 3), (5, MAX_LEN)]:
        x, hidden = tokens(b, s, E), padding(b, s)
        torch.testing.assert_close(loaded(x, hidden), model(x, hidden), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["super", "expressive"])
def test_dynamic_batch_and_length_up_to_max_len(name: str) -> None:
    check_exported(name, need_weights=False)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_every_layer(name: str, need_weights: bool, strict: bool) -> None:
    check_exported(name, need_weights=need_weights, strict=strict)


@pytest.mark.slow
@pytest.mark.parametrize("name", CAUSAL)
def test_causal(name: str) -> None:
    check_exported(name, need_weights=False, is_causal=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_lengths_without_a_declared_maximum(name: str) -> None:
    """``Dim.DYNAMIC`` leaves the range to the program: max_len must not be taken for a constant."""
    model = SelfAttention(layer(name, E, N, max_len=MAX_LEN), need_weights=False).double().eval()
    free = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    example = (tokens(B, 5, E), padding(B, 5))
    loaded = saved_and_loaded(torch.export.export(model, example, dynamic_shapes={"x": free, "hidden": free}))
    for b, s in [(3, 11), (5, MAX_LEN)]:
        x, hidden = tokens(b, s, E), padding(b, s)
        torch.testing.assert_close(loaded(x, hidden), model(x, hidden), rtol=1e-12, atol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMED)
def test_cross_attention(name: str) -> None:
    module = layer(name, E, N, max_len=MAX_LEN).double().eval()
    batch, L, S = Dim("batch", max=64), Dim("queries", max=64), Dim("keys", max=MAX_LEN)
    shapes = {"query": {0: batch, 1: L}, "key": {0: batch, 1: S}, "value": {0: batch, 1: S}, "need_weights": None}
    q, k = tokens(B, 3, E), tokens(B, 5, E)
    program = torch.export.export(module, (q, k, k), {"need_weights": False}, dynamic_shapes=shapes)
    loaded = saved_and_loaded(program)
    for b, length, s in [(3, 17, 11), (5, 2, MAX_LEN)]:
        q, k = tokens(b, length, E), tokens(b, s, E)
        torch.testing.assert_close(
            loaded(q, k, k, need_weights=False), module(q, k, k, need_weights=False), rtol=1e-12, atol=1e-13
        )
