"""ALiBi on the weight and inside the score: against the oracle, every implementation, exact in 16 bits."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

import better_attention as ba
from better_attention.positions import alibi_bias, alibi_features, alibi_slopes
from better_attention.scores import SCORES
from helpers import oracle
from helpers.layers import CAUSAL, layer, refused, tokens
from helpers.registry import IMPLS, computing

B, N, L, S, H = 2, 3, 7, 7, 5
D = N * H


def inside(heads: int, L: int, S: int, offset: int = 0, sign: float = -1.0) -> np.ndarray:
    """-m (l - s), number by number, (N, L, S)."""
    bias = np.zeros((heads, L, S))
    for n, slope in enumerate(alibi_slopes(heads)):
        for i in range(L):
            for j in range(S):
                bias[n, i, j] = sign * slope * (i + offset - j)
    return bias


@pytest.mark.parametrize("scale", [None, 0.31, -2.0])
@pytest.mark.parametrize("offset", [0, 4])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_features_put_the_bias_inside_the_score(
    score: str, offset: int, scale: float | None, dtype: torch.dtype
) -> None:
    rows, keys = 7 - offset, 7
    q, k, v = (tokens(B, N, length, H, dtype=dtype) for length in (rows, keys, keys))
    seen = np.tri(rows, keys, offset, dtype=bool)
    arrays = [x.double().numpy() for x in (q, k, v)]
    keep = np.broadcast_to(seen, (B, N, rows, keys))
    shifted = inside(N, rows, keys, offset)
    output, weights = oracle.attention(*arrays, score=score, keep=keep, inside=shifted, scale=scale)
    wide = alibi_features(q, k, scale=scale, offset=offset)
    assert wide[0].shape[-1] == wide[1].shape[-1] == H + 2
    bounds = {"rtol": 1e-11, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-4, "atol": 2e-5}
    for impl in computing(score, dtype):
        found = ba.attention(*wide, v, score=score, attn_mask=torch.from_numpy(seen), scale=1.0, impl=impl)
        np.testing.assert_allclose(found.double().numpy(), output, **bounds)
    _, ours = ba.attention(*wide, v, score=score, attn_mask=torch.from_numpy(seen), scale=1.0, need_weights=True)
    np.testing.assert_allclose(ours.double().numpy(), weights, **bounds)
    # The oracle would notice a bias of the other sign.
    other, _ = oracle.attention(*arrays, score=score, keep=keep, inside=-shifted, scale=scale)
    assert not np.allclose(other, output, rtol=1e-3)


def test_grouped_queries_keep_a_slope_each() -> None:
    q, k, v = tokens(B, 6, L, H), tokens(B, 2, S, H), tokens(B, 2, S, H)
    expected, _ = oracle.attention(
        *(x.numpy() for x in (q, k, v)), score="expressive", causal=True, inside=inside(6, L, S)
    )
    found = ba.attention(
        *alibi_features(q, k), v, score="expressive", is_causal=True, scale=1.0, enable_gqa=True, impl="reference"
    )
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [1, 3, 4, 16])
@pytest.mark.parametrize("offset", [0, 5_003, 60_000])
def test_in_16_bits_the_bias_is_exact_for_the_slope_as_it_is_held(dtype: torch.dtype, heads: int, offset: int) -> None:
    q, k = torch.zeros(1, heads, 401, 2, dtype=dtype), torch.zeros(1, heads, 60_401, 2, dtype=dtype)
    wide_q, wide_k = (x[0].double() for x in alibi_features(q, k, offset=offset))
    assert wide_q.shape[-1] == 2 + 6
    slopes = torch.tensor(alibi_slopes(heads), dtype=dtype).double()[:, None]
    keys = torch.tensor([0, 1, 255, 256, 257, 5_003, 40_001, 60_000, 60_400])
    for row in (0, 1, 255, 256, 400):
        assert torch.equal((wide_q[:, row, None] * wide_k[:, keys]).sum(-1), -slopes * (row + offset - keys))


def test_positions_that_16_bits_cannot_hold_are_refused() -> None:
    q, k = torch.zeros(1, 1, 1, 2, dtype=torch.bfloat16), torch.zeros(1, 1, 65_537, 2, dtype=torch.bfloat16)
    refused(lambda: alibi_features(q, k), "65,537", "bfloat16", "float32", kind=ValueError)
    assert alibi_features(q.float(), k.float())[1].shape == (1, 1, 65_537, 4)
    refused(lambda: alibi_features(torch.zeros(2, 2), torch.zeros(2, 2)), "query must be (..., heads", kind=ValueError)
    refused(lambda: alibi_features(q.long(), k), "query must be float", kind=TypeError)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_far_from_the_start_near_keys_keep_their_digits(dtype: torch.dtype) -> None:
    """A decoder's step at position 30,000 weighs its neighbours as at position 3."""
    v = tokens(1, N, 30_001, H, dtype=dtype)
    q, k = tokens(1, N, 1, H, dtype=dtype), tokens(1, N, 30_001, H, dtype=dtype)
    near = slice(29_997, None)
    visible = torch.zeros(30_001, dtype=torch.bool)
    visible[near] = True
    far = ba.attention(*alibi_features(q, k, offset=30_000), v, score="expressive", attn_mask=visible, scale=1.0)
    short = alibi_features(q, k[:, :, near], offset=3)
    close = ba.attention(*short, v[:, :, near], score="expressive", scale=1.0)
    torch.testing.assert_close(far, close, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("score", SCORES)
def test_gradients_by_the_kernels_are_those_of_the_reference(score: str) -> None:
    made = [tokens(B, N, length, H, dtype=torch.float32) for length in (L, S, S)]
    assert torch.autograd.gradcheck(
        lambda q, k, v: ba.attention(
            *alibi_features(q, k), v, score=score, is_causal=True, scale=1.0, impl="reference"
        ),
        [x[:1, :, :4].double().requires_grad_() for x in made],
    )
    gradients = []
    for impl in ("reference", *(i for i in computing(score, torch.float32) if i != "reference")):
        q, k, v = (x.clone().requires_grad_() for x in made)
        ba.attention(*alibi_features(q, k), v, score=score, is_causal=True, scale=1.0, impl=impl).pow(
            2
        ).sum().backward()
        gradients.append([x.grad for x in (q, k, v)])
    for found in gradients[1:]:
        for one, other in zip(found, gradients[0], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


# --- the layer --------------------------------------------------------------------------------------------------------


def weights_of(module: ba.MultiheadAttention) -> oracle.Weights:
    """The layer's arrays for the oracle."""
    arrays: dict[str, object] = {}
    for name, part in (("q", module.q_proj), ("k", module.k_proj), ("v", module.v_proj), ("o", module.out_proj)):
        if isinstance(part, torch.nn.Linear):
            arrays |= {name: part.weight.detach().numpy(), f"{name}_bias": part.bias.detach().numpy()}
    if module.mechanism.aligned:
        kernel, shift = module.align.weight.detach().numpy(), module.align.bias.detach().numpy()
        arrays |= {"align": kernel, "align_bias": shift, "align_causal": module.align.causal}
    scale = None if module.log_scale is None else module.log_scale.detach().exp().numpy()
    return oracle.Weights(module.num_heads, score=module.mechanism.score, scale=scale, **arrays)  # type: ignore[arg-type]


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("place", ["score", "weight"])
@pytest.mark.parametrize("name", CAUSAL)
def test_every_mechanism_with_alibi(name: str, place: str, need_weights: bool) -> None:
    module = layer(name, D, N, alibi=place, spread=0.7).double()
    x = tokens(B, L, D)
    bias = inside(N, L, L)
    given = {"inside": bias} if place == "score" else {"bias": np.broadcast_to(-np.abs(bias), (B, N, L, L))}
    expected, weights = oracle.multihead(weights_of(module), *[x.numpy()] * 3, causal=True, **given)
    output, found = module(x, x, x, is_causal=True, need_weights=need_weights, average_attn_weights=False)
    np.testing.assert_allclose(output.detach().numpy(), expected, rtol=0, atol=1e-11)
    if need_weights:
        np.testing.assert_allclose(found.detach().numpy(), weights, rtol=0, atol=1e-11)
    plain = layer(name, D, N).double()
    plain.load_state_dict(module.state_dict())
    assert not torch.allclose(plain(x, x, x, is_causal=True)[0], output)


@pytest.mark.parametrize("impl", IMPLS)
def test_for_softmax_both_places_are_one_and_for_expressive_they_are_not(impl: str) -> None:
    x = tokens(B, L, D, dtype=torch.float32)
    for name in ("standard", "expressive"):
        if impl not in computing(ba.Mechanism.of(name).score, torch.float32):
            continue
        score, weight = (layer(name, D, N, alibi=place, impl=impl) for place in ("score", "weight"))
        weight.load_state_dict(score.state_dict())
        one, two = (m(x, x, x, is_causal=True, need_weights=False)[0] for m in (score, weight))
        assert torch.allclose(one, two, atol=1e-5) == (name == "standard")


def test_inside_the_expressive_score_far_keys_weigh_more() -> None:
    """With queries of zeros the bias is all there is: (m d)^2 / (1 + (m d)^2) inside, and no weight at all outside."""
    q, k = torch.zeros(1, 1, 6, 2, dtype=torch.float64), tokens(1, 1, 6, 2)
    _, weights = ba.attention(
        *alibi_features(q, k), k, score="expressive", is_causal=True, scale=1.0, need_weights=True
    )
    z = torch.arange(5, -1, -1, dtype=torch.float64) / 256
    raw = z**2 / (1 + z**2)
    torch.testing.assert_close(weights[0, 0, -1], raw / raw.sum(), rtol=1e-10, atol=1e-14)
    bias = alibi_bias(1, 6, 6, dtype=torch.float64)
    _, none = ba.attention(q, k, k, score="expressive", is_causal=True, attn_mask=bias, need_weights=True)
    assert not none.any()


@pytest.mark.parametrize("place", ["score", "weight"])
@pytest.mark.parametrize("name", ["standard", "efficient+expressive learned scale", "super causal"])
def test_masks_and_padding_apply_as_well(name: str, place: str) -> None:
    """What a mask hides is as if it were not there, whatever stands in it; a float mask is added on the weight."""
    module = layer(name, D, N, alibi=place).double()
    x = tokens(B, L, D)
    hidden = torch.zeros(L, L, dtype=torch.bool)
    hidden[4:, 1:3] = True
    padded = torch.zeros(B, L, dtype=torch.bool)
    padded[:, 0] = True
    by_mask, _ = module(x, x, x, attn_mask=hidden, key_padding_mask=padded, is_causal=True)
    bias = torch.zeros(L, L, dtype=torch.float64).masked_fill(hidden, torch.finfo(torch.float64).min)
    by_bias, _ = module(x, x, x, attn_mask=bias, key_padding_mask=padded, is_causal=True)
    torch.testing.assert_close(by_bias, by_mask, rtol=0, atol=1e-12)
    keep = np.broadcast_to(~hidden.numpy(), (B, N, L, L))
    offset = inside(N, L, L)
    given = {"inside": offset} if place == "score" else {"bias": np.broadcast_to(-np.abs(offset), (B, N, L, L))}
    if not module.mechanism.aligned:
        expected, _ = oracle.multihead(
            weights_of(module), *[x.numpy()] * 3, keep=keep, present=~padded.numpy(), causal=True, **given
        )
        np.testing.assert_allclose(by_mask.detach().numpy(), expected, rtol=0, atol=1e-11)


def test_a_narrow_mask_hides_by_its_own_lowest_number() -> None:
    """float16's lowest number is an ordinary one in float32, in which the bias is added."""
    module = layer("expressive", D, N, alibi="weight")
    x = tokens(B, L, D, dtype=torch.float32)
    hidden = torch.zeros(L, L, dtype=torch.bool)
    hidden[3] = True
    low = torch.zeros(L, L, dtype=torch.float16).masked_fill(hidden, torch.finfo(torch.float16).min)
    output, _ = module(x, x, x, attn_mask=low, is_causal=True)
    assert torch.equal(output, module(x, x, x, attn_mask=hidden, is_causal=True)[0])
    assert torch.equal(output[:, 3], module.out_proj.bias.expand(B, -1))


@pytest.mark.parametrize("place", ["score", "weight"])
@pytest.mark.parametrize("name", CAUSAL)
def test_no_past_bit_moves_with_the_future(name: str, place: str) -> None:
    module = layer(name, D, N, alibi=place).eval()
    attend = partial(module, is_causal=True, need_weights=False)
    ba.assert_causal(lambda x: attend(x, x, x)[0], tokens(B, L, D, dtype=torch.float32))


def test_in_inference_nothing_skips_the_bias() -> None:
    module = layer("efficient", D, N, alibi="weight").eval()
    x = tokens(B, L, D, dtype=torch.float32)
    trained, _ = module(x, x, x, need_weights=False)
    with torch.inference_mode():
        served, _ = module(x, x, x, need_weights=False)
    torch.testing.assert_close(served, trained.detach())


@pytest.mark.parametrize("place", ["score", "weight"])
def test_under_autocast_the_bias_stays_exact(place: str) -> None:
    """300 positions: beyond 256 bfloat16 holds no odd number, and the weights would be those of other distances."""
    module = layer("expressive", 8, 1, alibi=place, spread=0.3)
    x = tokens(1, 300, 8, dtype=torch.float32)
    full, _ = module(x, x, x, is_causal=True, need_weights=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow, _ = module(x, x, x, is_causal=True, need_weights=False)
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), full, rtol=0.03, atol=0.03)


def test_one_graph_for_every_length() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    module = layer("efficient", D, N, alibi="score").double()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    for length in (5, 3, 11):
        x = tokens(B, length, D)
        ours = module(x, x, x, is_causal=True, need_weights=False)[0]
        theirs = compiled(x, x, x, is_causal=True, need_weights=False)[0]
        torch.testing.assert_close(theirs, ours, rtol=1e-10, atol=1e-12)
    assert 1 <= counter.frame_count <= 2
    torch._dynamo.reset()


def test_a_converted_layer_keeps_its_alibi() -> None:
    module = layer("standard", 8, 1, alibi="weight").double()
    x = tokens(B, L, 8)
    before, _ = module(x, x, x)
    model = torch.nn.ModuleList([module])
    assert ba.convert(model, "efficient").exact
    assert (model[0].mechanism.name, model[0].alibi) == ("efficient", "weight")
    torch.testing.assert_close(model[0](x, x, x)[0], before, rtol=0, atol=1e-10)


def test_construction_and_what_is_refused() -> None:
    module = layer("standard", D, N, alibi="score")
    assert "alibi='score'" in repr(module)
    assert "alibi" not in repr(layer("standard", D, N))
    x = tokens(B, L, D, dtype=torch.float32)
    refused(lambda: module(x, x, x), "is_causal=True", "alibi='weight'", kind=ValueError)
    refused(lambda: ba.MultiheadAttention(8, 2, alibi="inside"), "alibi must be one of", "inside", kind=ValueError)
    refused(lambda: ba.MultiheadAttention(8, 2, alibi=True), "alibi must be one of", kind=TypeError)
    for option in ("add_bias_kv", "add_zero_attn"):
        refused(
            lambda o=option: ba.MultiheadAttention(8, 2, alibi="weight", **{o: True}), "add_bias_kv", kind=ValueError
        )
    refused(lambda: module.to_torch_state_dict(), "alibi='score'", kind=ValueError)


def test_the_bias_asks_for_no_gradient() -> None:
    module = layer("expressive", D, N, alibi="weight")
    x: Tensor = tokens(B, L, D, dtype=torch.float32)
    module(x, x, x, is_causal=True)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


# --- caches and windows -----------------------------------------------------------------------------------------------

CACHED = [(name, window) for name in CAUSAL for window in (None, 3) if window is None or "super" not in name]
"""Layers and windows; W_A of a window has a test of its own."""


def by_steps(module: ba.MultiheadAttention, x: Tensor, steps: tuple[int, ...]) -> Tensor:
    """The layer's output, token after token with a cache."""
    cache = ba.KVCache(module, len(x))
    with torch.no_grad():
        parts = [module(piece, piece, piece, cache=cache)[0] for piece in x.split(steps, dim=1)]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("steps", [(1,) * L, (3, 1, 2, 1)])
@pytest.mark.parametrize("place", ["score", "weight"])
@pytest.mark.parametrize(("name", "window"), CACHED)
def test_with_a_cache_distances_count_from_the_tokens_that_it_holds(
    name: str, window: int | None, place: str, steps: tuple[int, ...]
) -> None:
    options = {} if window is None else {"window": window}
    module = layer(name, D, N, alibi=place, **options).double().eval()
    x = tokens(B, L, D)
    with torch.no_grad():
        whole, _ = module(x, x, x, is_causal=True)
    torch.testing.assert_close(by_steps(module, x, steps), whole, rtol=0, atol=1e-11)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("place", ["score", "weight"])
@pytest.mark.parametrize(("name", "window"), CACHED)
def test_as_the_kernels_read_the_cache(name: str, window: int | None, place: str, padded: bool) -> None:
    """In float32, where the compiled kernels count distances themselves."""
    options = {} if window is None else {"window": window}
    module = layer(name, D, N, alibi=place, **options).float().eval()
    x = tokens(B, L, D, dtype=torch.float32)
    hidden = torch.zeros(B, L, dtype=torch.bool)
    hidden[0, :2] = padded
    cache = ba.KVCache(module, B)
    with torch.no_grad():
        whole, _ = module(x, x, x, is_causal=True, key_padding_mask=hidden if padded else None)
        for at in range(L):
            new = x[:, at : at + 1]
            mask = hidden[:, at : at + 1] if padded else None
            found, _ = module(new, new, new, cache=cache, key_padding_mask=mask, need_weights=False)
            torch.testing.assert_close(found[1:], whole[1:, at : at + 1], rtol=1e-4, atol=2e-5)
            if at >= 2:  # hidden queries differ: what they see is nothing
                torch.testing.assert_close(found, whole[:, at : at + 1], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("place", ["score", "weight"])
@pytest.mark.parametrize("mechanism", ["super", "super+expressive"])
def test_with_the_w_a_of_a_window(mechanism: str, place: str) -> None:
    """A row's output depends on distances alone: the same tokens behind others give the same rows."""
    options: dict[str, object] = {"batch_first": True, "mechanism": mechanism, "window": 3}
    module = ba.MultiheadAttention(D, N, alibi=place, **options).double().eval()
    x, before = tokens(B, L, D), tokens(B, 4, D)
    whole, _ = module(x, x, x, is_causal=True)
    torch.testing.assert_close(by_steps(module, x, (1,) * L), whole.detach(), rtol=0, atol=1e-11)
    behind, _ = module(*[torch.cat([before, x], dim=1)] * 3, is_causal=True)
    torch.testing.assert_close(behind[:, 4 + 2 :], whole[:, 2:], rtol=0, atol=1e-11)
    plain = ba.MultiheadAttention(D, N, **options).double().eval()
    plain.load_state_dict(module.state_dict())
    assert not torch.allclose(plain(x, x, x, is_causal=True)[0], whole)
