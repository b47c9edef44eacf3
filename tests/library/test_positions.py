"""Rotary positions and ALiBi: against complex numbers in NumPy, the layer with each mechanism, the compilers."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.export import Dim

import better_attention as ba
from better_attention.positions import alibi_bias, alibi_slopes, rotary, rotary_angles
from better_attention.scores import SCORES
from helpers import oracle
from helpers.compiler import Programs
from helpers.layers import ALL, CAUSAL, layer, refused, tokens

B, N, L, S, H = 2, 3, 7, 5, 4
D = N * H


# --- the functions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [10_000.0, 7.5])
@pytest.mark.parametrize("offset", [0, 11])
def test_rotary_is_a_product_of_complex_numbers(base: float, offset: int) -> None:
    x = tokens(B, N, L, H)
    expected = oracle.spun(x.numpy(), np.arange(L) + offset, base)
    np.testing.assert_allclose(rotary(x, base=base, offset=offset).numpy(), expected, rtol=0, atol=1e-13)
    assert not np.allclose(expected, oracle.spun(x.numpy(), np.arange(L) + offset, base + 1))


def test_scores_depend_on_the_distance_alone() -> None:
    q, k = tokens(H), tokens(H)
    places = torch.arange(40)
    turned_q = rotary(q.expand(40, H), positions=places)
    turned_k = rotary(k.expand(40, H), positions=places)
    scores = turned_q @ turned_k.T
    for distance in range(-39, 40):
        line = scores.diagonal(distance)
        assert (line - line[0]).abs().max() < 1e-13
    assert (scores[0] - scores[0, 0]).abs().max() > 0.1
    torch.testing.assert_close(scores[5, 5], q @ k)
    shifted = rotary(q.expand(40, H), offset=1000) @ rotary(k.expand(40, H), offset=1000).T
    torch.testing.assert_close(shifted, scores, rtol=0, atol=1e-11)


def test_an_offset_continues_a_sequence_and_positions_name_it() -> None:
    x = tokens(B, N, L, H)
    whole = rotary(x)
    for start in range(L):
        assert torch.equal(rotary(x[:, :, start:], offset=start), whole[:, :, start:])
        assert torch.equal(rotary(x[:, :, start:], offset=torch.tensor(start)), whole[:, :, start:])
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    assert torch.equal(rotary(x[:, :, order], positions=order), whole[:, :, order])
    places = torch.stack([torch.arange(L), torch.arange(L) + 9])
    each = rotary(x, positions=places)
    assert torch.equal(each[0], whole[0])
    assert torch.equal(each[1], rotary(x[1], offset=9))
    assert torch.equal(rotary(x[:, 0], positions=places), each[:, 0])


def test_length_is_kept_and_the_first_position_is_not_turned() -> None:
    x = tokens(B, N, L, H)
    torch.testing.assert_close(rotary(x).norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(rotary(x)[:, :, 0], x[:, :, 0])
    torch.testing.assert_close(rotary(rotary(x, positions=torch.full((L,), 3)), positions=torch.full((L,), -3)), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_numbers_are_turned_in_float32(dtype: torch.dtype) -> None:
    x = tokens(B, N, 97, H).to(dtype)
    turned = rotary(x, offset=500)
    assert turned.dtype == dtype
    expected = torch.from_numpy(oracle.spun(x.double().numpy(), np.arange(97) + 500))
    torch.testing.assert_close(turned.double(), expected, rtol=torch.finfo(dtype).eps, atol=2e-4)


def test_gradients_of_both_orders() -> None:
    assert torch.autograd.gradcheck(rotary, tokens(2, 3, H, requires_grad=True))
    assert torch.autograd.gradgradcheck(rotary, tokens(2, 3, H, requires_grad=True))


def test_angles_that_cannot_be() -> None:
    x = tokens(B, N, L, H)
    refused(lambda: rotary(tokens(L, 3)), "head width must be even", 3, kind=ValueError)
    refused(lambda: rotary(x, base=0.5), "base must be >= 1", 0.5, kind=ValueError)
    refused(lambda: rotary(x, positions=torch.arange(L), offset=2), "not both", "offset=2", kind=ValueError)
    refused(lambda: rotary(x, positions=torch.arange(L + 1)), "(L,) = (7,)", (8,), kind=ValueError)
    refused(lambda: rotary(tokens(L, H), positions=torch.zeros(1, L)), (7, 4), kind=ValueError)
    refused(lambda: rotary(x, positions=list(range(L))), "positions must be a tensor", kind=TypeError)
    refused(lambda: rotary(x.long()), "must be float64", kind=TypeError)
    refused(lambda: rotary_angles(torch.arange(3), 5), "even", kind=ValueError)


PRINTED = {
    1: [2**-8],
    2: [2**-4, 2**-8],
    8: [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625],
    16: [2 ** -(k / 2) for k in range(1, 17)],
    # the power of two below, then every second slope of the power above
    3: [2**-4, 2**-8, 2**-2],
    6: [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3],
    12: [2.0**-k for k in range(1, 9)] + [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5],
}


@pytest.mark.parametrize("heads", PRINTED)
def test_slopes_are_those_of_the_paper(heads: int) -> None:
    assert alibi_slopes(heads) == pytest.approx(PRINTED[heads], rel=1e-15)


def test_alibi_falls_with_the_distance_and_an_offset_continues_it() -> None:
    bias = alibi_bias(2, 5, 7, dtype=torch.float64)
    for n, slope in enumerate((1 / 16, 1 / 256)):
        for i in range(5):
            for j in range(7):
                assert bias[n, i, j] == -slope * abs(i - j)
    for start in range(5):
        assert torch.equal(alibi_bias(2, 5 - start, 7, offset=start, dtype=torch.float64), bias[:, start:])
    assert alibi_bias(2, 5, 7).dtype == torch.float32
    refused(lambda: alibi_bias(0, 2, 2), "num_heads", 0)


@pytest.mark.parametrize("score", SCORES)
def test_alibi_multiplies_the_weight_of_either_score_by_its_exponential(score: str) -> None:
    q, k, v = tokens(B, N, L, H), tokens(B, N, L, H), tokens(B, N, L, H)
    _, plain = ba.attention(q, k, v, score=score, is_causal=True, need_weights=True)
    bias = alibi_bias(N, L, L, dtype=torch.float64)
    _, biased = ba.attention(q, k, v, score=score, is_causal=True, attn_mask=bias, need_weights=True)
    weighed = plain * bias.exp()
    torch.testing.assert_close(biased, weighed / weighed.sum(dim=-1, keepdim=True), rtol=1e-12, atol=1e-14)


# --- the layer --------------------------------------------------------------------------------------------------------


def expected(module: ba.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, causal: bool) -> np.ndarray:
    """The layer's output, by the oracle's parts, one head after the other."""
    maps = {
        p: (None, None)
        if isinstance(part := getattr(module, f"{p}_proj"), torch.nn.Identity)
        else (part.weight.detach().numpy(), part.bias.detach().numpy())
        for p in ("q", "k", "v", "out")
    }
    width = module.head_dim
    base = module.rotary
    assert base is not None
    output = np.zeros((query.shape[0], query.shape[1], module.embed_dim))
    visible = oracle.see(query.shape[1], key.shape[1], causal, None, None)
    for b in range(query.shape[0]):
        sources = {"q": query, "k": key, "v": value}
        q, k, v = (oracle.linear(x[b].numpy(), *maps[p]) for p, x in sources.items())
        joined = np.zeros_like(output[b])
        for n in range(module.num_heads):
            columns = slice(n * width, (n + 1) * width)
            q_n = oracle.spun(q[:, columns], np.arange(len(q)), base)
            k_n = oracle.spun(k[:, columns], np.arange(len(k)), base)
            v_n = v[:, columns]
            if module.mechanism.aligned:
                kernel, shift = (p.detach().numpy() for p in (module.align.weight, module.align.bias))
                if kernel.ndim == 3:
                    kernel, shift = kernel[n], shift[n]
                v_n = oracle.align(v_n, kernel, shift, module.align.causal)
            scale = width**-0.5
            if module.scale == "learned":
                scale = float(module.log_scale[n].detach().exp())
            zero = np.zeros(visible.shape)
            joined[:, columns], _ = oracle.one_head(q_n, k_n, v_n, visible, zero, scale, module.mechanism.score)
        output[b] = oracle.linear(joined, *maps["out"])
    return output


@pytest.mark.parametrize("rotation", [True, 50, 33.5])
@pytest.mark.parametrize("name", ALL)
def test_every_mechanism_with_rotary_positions(name: str, rotation: bool | float) -> None:
    module = layer(name, D, N, rotary=rotation, spread=0.7).double()
    assert module.rotary == (10_000.0 if rotation is True else rotation)
    x = tokens(B, L, D)
    causal = name in CAUSAL
    output, _ = module(x, x, x, is_causal=causal)
    np.testing.assert_allclose(output.detach().numpy(), expected(module, x, x, x, causal), rtol=0, atol=1e-12)
    with torch.no_grad():
        for need_weights in (False, True):
            quick, _ = module(x, x, x, is_causal=causal, need_weights=need_weights)
            torch.testing.assert_close(quick, output, rtol=1e-12, atol=1e-13)
    plain = layer(name, D, N).double()
    plain.load_state_dict(module.state_dict())  # no key more
    assert not torch.allclose(plain(x, x, x, is_causal=causal)[0], output)


@pytest.mark.parametrize("name", ALL)
def test_in_inference_nothing_skips_the_turning(name: str) -> None:
    module = layer(name, D, N, rotary=True).eval()
    x = tokens(B, L, D, dtype=torch.float32)
    trained, _ = module(x, x, x, need_weights=False)
    with torch.inference_mode():
        served, _ = module(x, x, x, need_weights=False)
    torch.testing.assert_close(served, trained.detach())


@pytest.mark.parametrize("name", ["standard", "efficient", "super", "efficient+expressive learned scale"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_cross_attention_counts_both_sides_from_zero(name: str, batch_first: bool) -> None:
    module = layer(name, D, N, rotary=True, batch_first=batch_first).double()
    query, key, value = tokens(B, L, D), tokens(B, S, D), tokens(B, S, D)
    for k, v in ((key, value), (key, key)):
        given = [x if batch_first else x.transpose(0, 1) for x in (query, k)]
        output, _ = module(*given, given[1] if v is k else v if batch_first else v.transpose(0, 1))
        output = output if batch_first else output.transpose(0, 1)
        np.testing.assert_allclose(output.detach().numpy(), expected(module, query, k, v, False), rtol=0, atol=1e-12)


def test_the_order_of_tokens_matters_with_rotary_positions_and_not_without() -> None:
    x, order = tokens(B, L, D), torch.tensor([3, 0, 6, 1, 5, 2, 4])
    for rotation, same in ((None, True), (False, True), (True, False)):
        module = layer("efficient", D, N, rotary=rotation).double()
        output, _ = module(x, x, x)
        moved, _ = module(*[x[:, order]] * 3)
        assert torch.allclose(moved, output[:, order], atol=1e-12) == same


def test_shifting_all_positions_changes_nothing() -> None:
    """Distances alone count: keys in front that nobody sees leave the others' results as they were."""
    module = layer("efficient", D, N, rotary=True).double()
    x = tokens(B, L, D)
    mask = torch.zeros(L + 3, L + 3, dtype=torch.bool)
    mask[:, :3] = True
    longer = torch.cat([tokens(B, 3, D), x], dim=1)
    shifted, _ = module(longer, longer, longer, attn_mask=mask)
    torch.testing.assert_close(shifted[:, 3:], module(x, x, x)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_past_bit_moves_with_the_future(name: str, dtype: torch.dtype) -> None:
    module = layer(name, D, N, rotary=True).to(dtype).eval()
    ba.assert_causal(lambda x: module(x, x, x, is_causal=True, need_weights=False)[0], tokens(B, L, D, dtype=dtype))


@pytest.mark.parametrize("name", ALL)
def test_padding_does_not_reach_real_tokens(name: str) -> None:
    module = layer(name, D, N, rotary=True).double()
    x = tokens(B, L, D)
    padded = torch.zeros(B, L, dtype=torch.bool)
    padded[:, -2:] = True
    output, _ = module(x, x, x, key_padding_mask=padded)
    spoiled = x.clone()
    spoiled[:, -2:] = float("nan")
    again, _ = module(x, spoiled, spoiled, key_padding_mask=padded)
    assert torch.equal(again, output)
    short = x[:, :-2]
    torch.testing.assert_close(module(short, short, short)[0], output[:, :-2], rtol=0, atol=1e-12)


def test_added_keys_have_no_position() -> None:
    """A key of zeros has the score 0 wherever it would stand; the learned one keeps its numbers."""
    module = layer("standard", D, N, rotary=True, add_bias_kv=True, add_zero_attn=True).double()
    x = tokens(1, L, D)
    _, weights = module(x, x, x, average_attn_weights=False)
    q, k = (
        oracle.spun(p(x[0]).view(L, N, H).transpose(0, 1).detach().numpy(), np.arange(L))
        for p in (module.q_proj, module.k_proj)
    )
    extra = module.bias_k[0, 0].view(N, 1, H).detach().numpy()
    keys = np.concatenate([k, extra, np.zeros((N, 1, H))], axis=1)
    scores = np.exp(q @ keys.transpose(0, 2, 1) * H**-0.5)
    np.testing.assert_allclose(weights[0].detach().numpy(), scores / scores.sum(-1, keepdims=True), rtol=1e-11)


@pytest.mark.parametrize("name", ALL)
def test_gradients(name: str) -> None:
    module = layer(name, 8, 2, rotary=True, impl="reference").double()
    x = tokens(1, 4, 8, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: module(x, x, x, is_causal=name in CAUSAL)[0], x)


def test_construction_and_what_is_refused() -> None:
    module = layer("super", D, N, rotary=500)
    assert "rotary=500.0" in repr(module)
    assert "rotary" not in repr(layer("super", D, N)) + repr(layer("super", D, N, rotary=False))
    assert list(module.state_dict()) == list(layer("super", D, N).state_dict())
    message = refused(lambda: ba.MultiheadAttention(6, 2, rotary=True), "head width must be even", 3, kind=ValueError)
    assert "embed_dim / num_heads" in message
    assert ba.MultiheadAttention(6, 2, rotary=False).rotary is None
    for wrong in (0, -5.0, float("inf"), float("nan")):
        refused(lambda wrong=wrong: ba.MultiheadAttention(8, 2, rotary=wrong), "rotary", kind=ValueError)
    refused(lambda: ba.MultiheadAttention(8, 2, rotary="yes"), "rotary must be a number", "yes", kind=TypeError)
    refused(lambda: layer("standard", 8, 2, rotary=True).to_torch_state_dict(), "rotary=10000.0", kind=ValueError)
    assert len(layer("standard", 8, 2).to_torch_state_dict()) == 4


def test_a_copy_computes_the_same() -> None:
    module = layer("super causal", D, N, rotary=77).double()
    x = tokens(B, L, D)
    other = copy.deepcopy(module)
    assert other.rotary == 77.0
    assert torch.equal(other(x, x, x, is_causal=True)[0], module(x, x, x, is_causal=True)[0])


def test_under_autocast_the_weights_are_those_of_16_bit() -> None:
    module = layer("standard", D, N, rotary=True)
    x = tokens(B, L, D, dtype=torch.float32)
    full, _ = module(x, x, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = module(x, x, x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), full, rtol=0.03, atol=0.05)
    assert not torch.equal(output.float(), full)


def test_one_graph_for_every_length() -> None:
    torch._dynamo.reset()
    counter = Programs("aot_eager")
    module = layer("efficient", D, N, rotary=True).double()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    for length in (5, 3, 11):
        x = tokens(B, length, D)
        torch.testing.assert_close(
            compiled(x, x, x, is_causal=True, need_weights=False)[0],
            module(x, x, x, is_causal=True, need_weights=False)[0],
            rtol=1e-10,
            atol=1e-12,
        )
    assert 1 <= counter.count <= 2
    torch._dynamo.reset()


class _Cross(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = layer("standard", D, N, rotary=True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        output: Tensor = self.layer(x, y, y, need_weights=False)[0]
        return output


def test_export_keeps_both_lengths_free() -> None:
    module = _Cross().eval()
    example = tokens(B, L, D, dtype=torch.float32), tokens(B, S, D, dtype=torch.float32)
    shapes = ({1: Dim("L", min=2, max=64)}, {1: Dim("S", min=2, max=64)})
    program = torch.export.export(module, example, dynamic_shapes=shapes)
    for lengths in ((3, 8), (9, 9)):
        x, y = (tokens(B, n, D, dtype=torch.float32) for n in lengths)
        torch.testing.assert_close(program.module()(x, y), module(x, y))
