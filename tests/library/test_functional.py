"""``ba.attention`` against torch's own function, the laws of the expressive score, and the choice of who computes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import better_attention as ba
from better_attention.native.library import missing
from better_attention.scores import SCORES
from helpers.layers import refused, tokens
from helpers.registry import IMPLS, computing

B, N, L, S, H, V = 2, 3, 5, 7, 4, 2  # an own width for the values: nothing says that it is the keys'
COMPUTING = computing("softmax")
COMPUTING_EXPRESSIVE = computing("expressive")

MASK_SHAPES = [
    (1, 1), (1, S), (L, 1), (L, S), (N, 1, 1), (N, 1, S), (N, L, S), (1, 1, 1, 1), (1, N, L, S),
    (B, 1, 1, 1), (B, 1, 1, S), (B, 1, L, S), (B, N, 1, S), (B, N, L, 1), (B, N, L, S),
]  # fmt: skip


def qkv(*lead: int, queries: int = L, keys: int = S, dtype: torch.dtype = torch.float64, **o: bool) -> list[Tensor]:
    shapes = ((*lead, queries, H), (*lead, keys, H), (*lead, keys, V))
    return [tokens(*shape, dtype=dtype, **o) for shape in shapes]


def boolean(*shape: int) -> Tensor:
    """True = attend; at random."""
    return torch.rand(*shape) < 0.6


def formula(q: Tensor, k: Tensor, score: str, bias: Tensor | None = None, scale: float | None = None) -> Tensor:
    """The weights, straight from the papers: e^(z+b), or z²/(1+z²) · e^b, over their sum; zero where that is zero."""
    z = q @ k.transpose(-1, -2) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    bias = torch.zeros_like(z) if bias is None else bias
    a = torch.exp(z + bias) if score == "softmax" else z**2 / (1 + z**2) * torch.exp(bias)
    return torch.nan_to_num(a / a.sum(-1, keepdim=True))


def as_bias(mask: Tensor | None, causal: bool, shape: tuple[int, int] = (L, S)) -> Tensor:
    """One float64 bias that says what a mask (bool: True = attend) and the triangle say together."""
    bias = torch.zeros(shape, dtype=torch.float64)
    if causal:
        bias = bias.masked_fill(~torch.ones(shape, dtype=torch.bool).tril(), -torch.inf)
    if mask is None:
        return bias
    return bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask


# --- the meaning of F.scaled_dot_product_attention --------------------------------------------------------------------


@pytest.mark.parametrize("impl", COMPUTING)
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("shape", MASK_SHAPES)
def test_masks_of_every_shape(shape: tuple[int, ...], kind: str, impl: str) -> None:
    q, k, v = qkv(B, N)
    mask = boolean(*shape) if kind == "bool" else tokens(*shape).masked_fill(~boolean(*shape), -torch.inf)
    found = ba.attention(q, k, v, attn_mask=mask, impl=impl)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    if impl in COMPUTING_EXPRESSIVE:
        expected = formula(q, k, "expressive", as_bias(mask, causal=False)) @ v
        torch.testing.assert_close(ba.attention(q, k, v, score="expressive", attn_mask=mask, impl=impl), expected)


@pytest.mark.parametrize("impl", COMPUTING)
@pytest.mark.parametrize("scale", [None, 1.0, 0.3, -0.7, 0])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(L, S), (S, L), (L, L), (1, S), (L, 1), (1, 1)])
def test_scale_causality_and_lengths(queries: int, keys: int, causal: bool, scale: float | None, impl: str) -> None:
    q, k, v = qkv(B, N, queries=queries, keys=keys)
    found = ba.attention(q, k, v, is_causal=causal, scale=scale, impl=impl)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale))
    if impl in COMPUTING_EXPRESSIVE and scale != 0:
        expected = formula(q, k, "expressive", as_bias(None, causal, (queries, keys)), scale) @ v
        torch.testing.assert_close(
            ba.attention(q, k, v, score="expressive", is_causal=causal, scale=scale, impl=impl), expected
        )


@pytest.mark.parametrize("impl", COMPUTING)
@pytest.mark.parametrize("lead", [(), (N,), (B, N), (2, B, N)])
def test_any_number_of_leading_dimensions(lead: tuple[int, ...], impl: str) -> None:
    q, k, v = qkv(*lead)
    torch.testing.assert_close(ba.attention(q, k, v, impl=impl), F.scaled_dot_product_attention(q, k, v))
    mask = boolean(*lead, L, S)
    torch.testing.assert_close(
        ba.attention(q, k, v, attn_mask=mask, impl=impl), F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    )


@pytest.mark.parametrize("impl", COMPUTING)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_grouped_queries(groups: int, score: str, impl: str) -> None:
    if (score, impl) == ("expressive", "sdpa"):
        return
    q, (_, k, v) = tokens(B, 2 * groups, L, H), qkv(B, 2)
    mask = boolean(B, 2 * groups, L, S)
    found = ba.attention(q, k, v, score=score, attn_mask=mask, enable_gqa=True, impl=impl)
    wide = [x.repeat_interleave(groups, dim=1) for x in (k, v)]
    torch.testing.assert_close(found, ba.attention(q, *wide, score=score, attn_mask=mask, impl="reference"))
    if score == "softmax":
        torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True))
    if groups > 1:
        refused(lambda: ba.attention(q, k, v, score=score, impl=impl), "enable_gqa")


@pytest.mark.parametrize("impl", COMPUTING)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_is_causal_and_a_mask_both_apply(kind: str, score: str, impl: str) -> None:
    if (score, impl) == ("expressive", "sdpa"):
        return
    q, k, v = qkv(B, N)
    mask = boolean(B, 1, L, S) if kind == "bool" else tokens(B, 1, L, S)
    expected = formula(q, k, score, as_bias(mask, causal=True)) @ v
    found = ba.attention(q, k, v, score=score, attn_mask=mask, is_causal=True, impl=impl)
    torch.testing.assert_close(found, expected)
    for ignored in ({"attn_mask": mask}, {"is_causal": True}):
        assert not torch.allclose(ba.attention(q, k, v, score=score, impl=impl, **ignored), expected)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["none", "bool", "float"])
def test_weights_on_request(kind: str, causal: bool, score: str) -> None:
    q, k, v = qkv(B, N)
    mask = {"none": None, "bool": boolean(N, L, S), "float": tokens(N, L, S)}[kind]
    arguments = {"score": score, "attn_mask": mask, "is_causal": causal}
    output, weights = ba.attention(q, k, v, need_weights=True, **arguments)
    torch.testing.assert_close(weights, formula(q, k, score, as_bias(mask, causal)))
    torch.testing.assert_close(output, weights @ v)
    torch.testing.assert_close(ba.attention(q, k, v, **arguments), output)
    sums = weights.sum(-1)
    torch.testing.assert_close(sums, (weights.amax(-1) > 0).to(sums))


@pytest.mark.parametrize("impl", COMPUTING)
@pytest.mark.parametrize("score", SCORES)
def test_gradients_of_every_implementation(score: str, impl: str) -> None:
    if (score, impl) == ("expressive", "sdpa"):
        return
    q, k, v = qkv(B, N, requires_grad=True)
    bias = tokens(N, L, S, requires_grad=impl in ("auto", "reference"))
    wanted = [x for x in (q, k, v, bias) if x.requires_grad]
    weight = tokens(B, N, L, V)
    expected = torch.autograd.grad((formula(q, k, score, bias) @ v * weight).sum(), wanted)
    found = ba.attention(q, k, v, score=score, attn_mask=bias, impl=impl)
    torch.testing.assert_close(torch.autograd.grad((found * weight).sum(), wanted), expected)


@pytest.mark.parametrize("score", SCORES)
def test_a_mask_that_asks_for_a_gradient_gets_it_or_a_refusal(score: str) -> None:
    q, k, v = qkv(B, N)
    for impl in COMPUTING:
        bias = tokens(N, L, S, requires_grad=True)
        try:
            output = ba.attention(q, k, v, score=score, attn_mask=bias, impl=impl)
        except ValueError as error:
            assert impl not in ("auto", "reference"), error  # noqa: PT017 - either outcome is right
            continue
        expected = torch.autograd.grad((formula(q, k, score, bias) @ v).square().sum(), bias)
        torch.testing.assert_close(torch.autograd.grad(output.square().sum(), bias), expected)


@pytest.mark.parametrize("impl", COMPUTING)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype, score: str, impl: str) -> None:
    if (score, impl) == ("expressive", "sdpa"):
        return
    q, k, v = qkv(B, N, dtype=dtype)
    mask = boolean(B, 1, L, S)
    mask[..., 0] = True
    found = ba.attention(q, k, v, score=score, attn_mask=mask, impl=impl)
    assert found.dtype == dtype
    exact = formula(q.double(), k.double(), score, as_bias(mask, causal=False)) @ v.double()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=tolerance)


@pytest.mark.parametrize("impl", COMPUTING)
@pytest.mark.parametrize(("b", "queries", "keys"), [(0, L, S), (B, 0, S), (B, L, 0), (B, 0, 0)])
@pytest.mark.parametrize("score", SCORES)
def test_nothing_to_attend_or_to_attend_to(score: str, b: int, queries: int, keys: int, impl: str) -> None:
    if (score, impl) == ("expressive", "sdpa"):
        return
    q, k, v = qkv(b, N, queries=queries, keys=keys, requires_grad=True)
    output = ba.attention(q, k, v, score=score, impl=impl)
    assert output.shape == (b, N, queries, V)
    assert torch.equal(output, torch.zeros_like(output)) is (output.numel() == 0 or keys == 0)
    output.sum().backward()
    assert all(x.grad is None or x.grad.isfinite().all() for x in (q, k, v))


# --- the laws of the expressive score (arXiv 2407.18601) --------------------------------------------------------------


@pytest.mark.parametrize("impl", COMPUTING_EXPRESSIVE)
def test_signs_do_not_matter(impl: str) -> None:
    q, k, v = qkv(B, N)
    expected = ba.attention(q, k, v, score="expressive", impl=impl)
    signs = torch.randint(2, (B, N, S, 1), dtype=torch.float64) * 2 - 1
    assert torch.equal(ba.attention(-q, k, v, score="expressive", impl=impl), expected)
    assert torch.equal(ba.attention(q, k * signs, v, score="expressive", impl=impl), expected)
    assert not torch.allclose(ba.attention(-q, k, v, impl=impl), ba.attention(q, k, v, impl=impl)), "softmax is another"


def test_orthogonal_keys_get_no_weight_parallel_and_antiparallel_ones_the_most() -> None:
    q = torch.tensor([[[2.0, 0.0]]])
    k = torch.tensor([[[0.0, 5.0], [3.0, 0.0], [-3.0, 0.0], [1.0, 1.0]]])
    _, weights = ba.attention(q, k, k, score="expressive", need_weights=True)
    assert weights[0, 0, 0] == 0
    assert weights[0, 0, 1] == weights[0, 0, 2] > weights[0, 0, 3] > 0
    torch.testing.assert_close(weights.sum(), torch.tensor(1.0))


@pytest.mark.parametrize("impl", COMPUTING_EXPRESSIVE)
@pytest.mark.parametrize("hidden", [-torch.inf, torch.finfo(torch.float64).min])
def test_hidden_keys_get_no_weight(hidden: float, impl: str) -> None:
    """Added to z before the square, either would give the hidden key the largest weight, or NaN."""
    q, k, v = qkv(B, N)
    shown = boolean(B, 1, L, S)
    shown[..., 0] = True
    bias = tokens(N, L, S)
    found = ba.attention(q, k, v, score="expressive", attn_mask=bias.masked_fill(~shown, hidden), impl=impl)
    torch.testing.assert_close(found, formula(q, k, "expressive", bias.masked_fill(~shown, -torch.inf)) @ v)


@pytest.mark.parametrize("impl", COMPUTING_EXPRESSIVE)
def test_a_bias_multiplies_the_weight_by_its_exponential(impl: str) -> None:
    """ALiBi-like slopes, large positive biases and large negative ones."""
    q, k, v = qkv(B, N)
    distance = (torch.arange(S) - torch.arange(L)[:, None]).abs().double()
    for bias in (-0.5 * distance, 3.0 * distance, 200.0 - 50.0 * distance, torch.full((L, S), -500.0).double()):
        found = ba.attention(q, k, v, score="expressive", attn_mask=bias, impl=impl)
        torch.testing.assert_close(found, formula(q, k, "expressive", bias - bias.amax(-1, keepdim=True)) @ v)


@pytest.mark.parametrize("impl", COMPUTING_EXPRESSIVE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_row_without_weight_is_zero_with_zero_gradient(dtype: torch.dtype, impl: str) -> None:
    q, k, v = qkv(B, N, dtype=dtype)
    q[:, :, 0], q[:, :, 1, 1:], k[..., 0] = 0, 0, 0  # a zero query; a query orthogonal to every key
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    output = ba.attention(q, k, v, score="expressive", impl=impl)
    assert torch.equal(output[:, :, :2], torch.zeros_like(output[:, :, :2]))
    assert output[:, :, 2:].abs().min() > 0
    output.sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))
    assert torch.equal(q.grad[:, :, :2], torch.zeros_like(q.grad[:, :, :2]))


@pytest.mark.parametrize("impl", COMPUTING_EXPRESSIVE)
@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float16, 60.0), (torch.bfloat16, 1e10), (torch.float32, 1e14), (torch.float64, 1e100)]
)
def test_huge_scores_saturate_and_do_not_overflow(dtype: torch.dtype, size: float, impl: str) -> None:
    """Where z² overflows every weight is the same; its gradient is tiny, and finite."""
    signs = torch.randint(2, (B, N, S, H)).to(dtype) * 2 - 1
    q, k = torch.full((B, N, L, H), size, dtype=dtype), (size * signs)
    k[..., 1:] = k[..., :1]
    v = tokens(B, N, S, V, dtype=dtype)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    output = ba.attention(q, k, v, score="expressive", scale=1.0, impl=impl)
    mean = v.detach().double().mean(2, keepdim=True).expand(B, N, L, V)
    torch.testing.assert_close(output.double(), mean, rtol=0, atol=2e-2 if dtype.itemsize == 2 else 1e-5)
    output.sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tiny_scores_keep_their_shares_in_half_precision(dtype: torch.dtype) -> None:
    """z² underflows in float16 from z = 2e-4 on; the shares are still 1 : 4."""
    q = torch.tensor([[[1e-4]]], dtype=dtype)
    k = torch.tensor([[[1.0], [2.0]]], dtype=dtype)
    _, weights = ba.attention(q, k, k, score="expressive", scale=1.0, need_weights=True)
    torch.testing.assert_close(weights.float(), torch.tensor([[[0.2, 0.8]]]), rtol=0, atol=4e-3)


# --- who computes -----------------------------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """The names of all operations, and the largest number of elements any of them made."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.largest = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        self.names.add(str(function))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.largest = max(self.largest, leaf.untyped_storage().nbytes() // leaf.element_size())
        return result


def watched(impl: str, length: int, **arguments: object) -> Operations:
    q, k, v = (tokens(1, 1, length, H, dtype=torch.float32) for _ in range(3))
    operations = Operations()
    with operations:
        ba.attention(q, k, v, impl=impl, **arguments)
    return operations


def test_the_name_asked_for_is_the_one_that_computes() -> None:
    length = 1_031
    seen = {impl: watched(impl, length) for impl in ("reference", "sdpa", "chunked")}
    assert {impl for impl, o in seen.items() if any("scaled_dot_product" in name for name in o.names)} == {"sdpa"}
    assert seen["reference"].largest >= length**2
    assert seen["chunked"].largest < length**2
    assert watched("chunked", length, score="expressive").largest < length**2


def test_explain_names_the_choice_and_the_reasons() -> None:
    q, k, v = qkv(B, N)
    explanation = ba.explain(q, k, v)
    assert set(IMPLS) == set(explanation.reasons)
    assert explanation.chosen in explanation.reasons
    assert explanation.reasons[explanation.chosen] == []
    assert all(isinstance(reason, str) and reason for reasons in explanation.reasons.values() for reason in reasons)
    for name in explanation.reasons:
        assert name in str(explanation)


@pytest.mark.parametrize(
    ("impl", "arguments", "word"),
    [
        ("sdpa", {"score": "expressive"}, "expressive"),
        ("sdpa", {"need_weights": True}, "weights"),
        ("chunked", {"need_weights": True}, "weights"),
    ],
)
def test_what_an_implementation_cannot_do_is_refused_with_everyones_reasons(
    impl: str, arguments: dict[str, object], word: str
) -> None:
    q, k, v = qkv(B, N)
    message = refused(
        lambda: ba.attention(q, k, v, impl=impl, **arguments), impl, word, "(2, 3, 5, 4)", kind=ValueError
    )
    explanation = ba.explain(q, k, v, impl=impl, **arguments)
    assert explanation.chosen != impl
    assert any(word in reason for reason in explanation.reasons[impl])
    for name in explanation.reasons:
        assert name in message, f"what {name} could or could not do is not told"
    ba.attention(q, k, v, impl="auto", **arguments)
    assert ba.explain(q, k, v, impl="auto", **arguments).reasons[impl]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("mask", [None, "bool", "float", "causal", "causal and bool"])
def test_explain_and_attention_agree(
    impl: str, score: str, need_weights: bool, dropout_p: float, mask: str | None
) -> None:
    """Honoured or refused; and explain says beforehand which."""
    q, k, v = qkv(B, N)
    arguments: dict[str, object] = {"score": score, "need_weights": need_weights, "dropout_p": dropout_p}
    arguments["is_causal"] = "causal" in (mask or "")
    if "bool" in (mask or ""):
        arguments["attn_mask"] = boolean(L, S)
    if mask == "float":
        arguments["attn_mask"] = tokens(L, S)
    explanation = ba.explain(q, k, v, impl=impl, **arguments)
    if explanation.chosen == impl:
        assert explanation.reasons[impl] == []
        result = ba.attention(q, k, v, impl=impl, **arguments)
        assert isinstance(result, tuple) is need_weights
    else:
        assert explanation.reasons[impl]
        refused(lambda: ba.attention(q, k, v, impl=impl, **arguments), impl, kind=ValueError)
    assert impl != "reference" or explanation.chosen == "reference", "the reference can do everything"
    assert ba.explain(q, k, v, **arguments).chosen in IMPLS


@pytest.mark.parametrize("name", ["standard", "expressive"])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_layer_honours_or_refuses_its_impl(name: str, impl: str) -> None:
    x = tokens(2, 5, 6, dtype=torch.float32)
    try:
        module = ba.MultiheadAttention(6, 2, mechanism=name, impl=impl, batch_first=True)
        for need_weights in (True, False):
            module(x, x, x, need_weights=need_weights)
    except ValueError as error:
        assert impl in str(error)  # noqa: PT017 - which of the two is checked below
        assert impl != "reference"
    else:
        assert impl in computing("softmax", torch.float32, need_weights=True), "it has no weights to give"


def test_calling_explain_computes_nothing() -> None:
    q = torch.empty(1, 8, 100_000, 64, device="meta")
    assert ba.explain(q, q, q).chosen in {"sdpa", "chunked"}, "a long input must not go to the quadratic reference"
    assert ba.explain(q, q, q, score="expressive").chosen == "chunked"
    inputs = qkv(B, N)
    state = torch.get_rng_state()
    ba.explain(*inputs, dropout_p=0.5)
    assert torch.equal(torch.get_rng_state(), state)


def test_auto_leaves_long_bfloat16_softmax_to_torch() -> None:
    """PyTorch has matrix instructions for it; expressive attention has nobody else."""
    q = torch.zeros(1, 8, 1024, 64, dtype=torch.bfloat16)
    assert ba.explain(q, q, q).chosen == "sdpa"
    assert ba.explain(q[:, :1, :8], q[:, :1, :8], q[:, :1, :8]).chosen == "reference", "too small for another call"
    assert ba.explain(q, q, q, score="expressive").chosen != "sdpa"


@pytest.mark.skipif(bool(missing()), reason="the compiled kernels are missing")
def test_auto_gives_wide_heads_to_torch_only_where_a_mask_hides_keys() -> None:
    q, mask = torch.zeros(8, 4, 64, 256), torch.ones(64, 64, dtype=torch.bool)
    assert ba.explain(q, q, q).chosen == "native"
    assert ba.explain(q, q, q, is_causal=True).chosen == "native"
    assert ba.explain(q, q, q, attn_mask=mask).chosen == "sdpa"
    assert ba.explain(q[..., :128], q[..., :128], q[..., :128], attn_mask=mask).chosen == "native"
