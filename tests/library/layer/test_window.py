"""Layers with a window: each query sees the last w tokens, and super's W_A acts on exactly these."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import better_attention as ba
from helpers import oracle
from helpers.bridge import array, oracle_masks, oracle_weights
from helpers.compiler import Programs
from helpers.layers import MASKS, WINDOWED, layer, refused, tokens
from helpers.registry import scored_mechanisms

B, D, N = 2, 6, 2
ALIGNED = [name for name, options in WINDOWED.items() if ba.Mechanism.of(options["mechanism"]).aligned]


def expected(module: ba.MultiheadAttention, x: Tensor, masks: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    L = x.shape[1]
    given = oracle_masks(masks.get("attn_mask"), masks.get("key_padding_mask"), len(x), N, L, L, floor=-1e3)
    return oracle.multihead(oracle_weights(module), *[array(x)] * 3, **given)


@pytest.mark.parametrize("mechanism", scored_mechanisms())
@pytest.mark.parametrize("window", [1, 3, 40])
def test_every_mechanism_is_the_oracles(mechanism: str, window: int) -> None:
    module = ba.MultiheadAttention(D, N, batch_first=True, mechanism=mechanism, window=window, dtype=torch.float64)
    for L in (1, 2, 7, 37):
        x = tokens(B, L, D)
        output, weights = module(x, x, x, average_attn_weights=False)
        truth, seen = expected(module, x, {})
        np.testing.assert_allclose(array(output), truth, rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(array(weights), seen, rtol=1e-9, atol=1e-11)
        without, nothing = module(x, x, x, need_weights=False)
        torch.testing.assert_close(without, output, rtol=1e-10, atol=1e-12)
        assert nothing is None


@pytest.mark.parametrize("name", WINDOWED)
@pytest.mark.parametrize("mask", MASKS)
def test_masks_act_within_the_window(name: str, mask: str) -> None:
    module, L = layer(name).double(), 13
    x = tokens(B, L, D)
    masks = MASKS[mask](B, L, L, N, torch.float64)
    output, _ = module(x, x, x, need_weights=False, **masks)
    truth, _ = expected(module, x, masks)
    np.testing.assert_allclose(array(output), truth, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ALIGNED)
def test_the_identity_is_no_alignment(name: str) -> None:
    options = WINDOWED[name] | {"align_init": "identity"}
    aligned = ba.MultiheadAttention(D, N, batch_first=True, **options)
    mechanism = ba.Mechanism(aligned.mechanism.projections, False, aligned.mechanism.score)
    other = ba.MultiheadAttention(D, N, batch_first=True, mechanism=mechanism, window=aligned.window)
    other.load_state_dict({k: v for k, v in aligned.state_dict().items() if not k.startswith("align.")})
    x = tokens(B, 11, D, dtype=torch.float32)
    torch.testing.assert_close(aligned(x, x, x)[0], other(x, x, x)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ALIGNED)
def test_gradients(name: str) -> None:
    module = layer(name).double()
    x = tokens(1, 5, D, requires_grad=True)

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        names = [key for key, _ in module.named_parameters()]
        given = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(module, given, (x, x, x), {"need_weights": False})[0]

    inputs = (x, *(p.detach().clone().requires_grad_() for p in module.parameters()))
    assert gradcheck(run, inputs)
    assert gradgradcheck(run, inputs[:1] + tuple(p.detach() for p in inputs[1:]))


@pytest.mark.parametrize("name", ALIGNED)
def test_numbers_outside_the_window_do_not_count(name: str) -> None:
    """Bit for bit, NaN and infinity included; inside the window they do."""
    module, L, at = layer(name).double(), 90, 40
    x = tokens(B, L, D)
    before, _ = module(x, x, x, need_weights=False)
    for spoiled in (9.0, torch.nan, torch.inf):
        other = x.clone()
        other[:, at] = spoiled
        after, _ = module(other, other, other, need_weights=False)
        reached = slice(at, at + module.window)
        assert torch.equal(before[:, :at], after[:, :at])
        assert torch.equal(before[:, reached.stop :], after[:, reached.stop :])
        assert not torch.isclose(before[:, reached], after[:, reached]).all(dim=-1).any()


def test_dropout_acts_on_weights() -> None:
    module = layer("super window", dropout=0.5).double().train()
    x = tokens(B, 13, D)
    torch.manual_seed(3)
    output, weights = module(x, x, x, average_attn_weights=False)
    assert ((array(weights) == 0.0) & (expected(module, x, {})[1] > 0.0)).any()
    torch.manual_seed(3)
    torch.testing.assert_close(module(x, x, x, need_weights=False)[0], output)


def test_sixteen_bits_are_close() -> None:
    module = layer("super window", spread=0.2).float()
    x = tokens(B, 50, D, dtype=torch.float32)
    exact, _ = module(x, x, x, need_weights=False)
    module = module.bfloat16()
    output, _ = module(*[x.bfloat16()] * 3, need_weights=False)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), exact, rtol=0.05, atol=0.05)


def test_time_and_memory_grow_with_the_length_not_its_square() -> None:
    module = ba.MultiheadAttention(16, 2, batch_first=True, mechanism="super", window=32)
    largest = []
    for L in (512, 4096):
        x = tokens(1, L, 16, dtype=torch.float32)
        with torch.profiler.profile(profile_memory=True, with_flops=True) as profile:
            module(x, x, x, need_weights=False)[0].sum().backward()
        events = profile.events()
        largest.append((max(e.cpu_memory_usage for e in events), sum(e.flops or 0 for e in events)))
    for short, long in zip(*largest, strict=True):
        assert 0 < long < 8.5 * short  # eight times the length


@pytest.mark.slow
@pytest.mark.parametrize("name", WINDOWED)
def test_one_graph(name: str) -> None:
    torch._dynamo.reset()
    module = layer(name).double()
    programs = Programs("aot_eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=programs)
    for L in (5, 37, 64, 90):
        x = tokens(B, L, D, requires_grad=True)
        for call in (module, compiled):
            x.grad = None
            output, _ = call(x, x, x, need_weights=False)
            output.square().sum().backward()
            if call is module:
                first = (output.detach(), x.grad)
        torch.testing.assert_close((output.detach(), x.grad), first, rtol=1e-10, atol=1e-12)
    assert programs.count <= 3, f"{programs.count} programs for 4 lengths"


@pytest.mark.slow
@pytest.mark.parametrize("name", WINDOWED)
def test_an_exported_program(name: str) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = layer(name).double().requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    model = Model().eval()
    program = torch.export.export(
        model, (tokens(B, 70, D),), dynamic_shapes=({1: torch.export.Dim("length", min=2, max=500)},)
    ).module()
    for L in (2, 33, 70, 131):
        x = tokens(B, L, D)
        torch.testing.assert_close(program(x), model(x), rtol=1e-10, atol=1e-12)


def test_weights_are_saved_and_copied() -> None:
    module = layer("super window")
    assert [tuple(module.state_dict()[key].shape) for key in ("align.weight", "align.bias")] == [(3, 3), (3,)]
    other = layer("super window")
    other.load_state_dict(module.state_dict())
    x = tokens(B, 9, D, dtype=torch.float32)
    for twin in (other, copy.deepcopy(module)):
        assert torch.equal(twin(x, x, x)[0], module(x, x, x)[0])
    ba.MultiheadAttention.redraw(other)
    assert not torch.equal(other.align.weight, module.align.weight)
    assert "window=3" in repr(module)


def test_what_is_refused() -> None:
    make = ba.MultiheadAttention
    refused(lambda: make(D, N, mechanism="super", window=3, max_len=9), "max_len=9", "window=3")
    refused(lambda: make(D, N, mechanism="super", window=3, align_causal=True), "align_causal", "window=3")
    refused(lambda: make(D, N, mechanism="super"), "max_len", "window")
    refused(lambda: make(D, N, mechanism="super", window=3, add_zero_attn=True), "add_zero_attn", "window=3")
    refused(lambda: make(D, N, window=0), "window", "0")
    refused(lambda: make(D, N, window=2.0), "window", "2.0")
    x = tokens(B, 9, D, dtype=torch.float32)
    refused(lambda: layer("super window", impl="native")(x, x, x), "impl='native'", "window")
