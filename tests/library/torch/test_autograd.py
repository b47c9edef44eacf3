"""Every derivative torch can take, torch.func, and inputs in every memory layout."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

import better_attention as ba
from better_attention.scores import SCORES
from helpers.layers import ALL, CAUSAL, MASKS, NAMED, layer, masks_for, padding, tokens, triangle
from helpers.registry import computing

# torch's own forward-mode formulas are still written with the deprecated torch.jit.script.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

B, L, S, N, E = 2, 3, 5, 2, 6

EVERY_PAIR = [(name, mask) for name in ALL for mask in masks_for(name)]
UNIT_PAIRS = [(name, "is_causal and padding" if name in CAUSAL else "float (B*N,L,S)") for name in ALL]
UNIT_PAIRS += [("super", "padding bool"), ("expressive", "float (B*N,L,S)"), ("standard", "float (B*N,L,S)")]


def differentiable(module: nn.Module, **arguments: object) -> tuple[Callable[..., object], tuple[Tensor, ...]]:
    """``module`` as a function of query, key, value and all its parameters, and a point at which to check it."""
    names = [name for name, _ in module.named_parameters()]

    def function(q: Tensor, k: Tensor, v: Tensor, *parameters: Tensor) -> object:
        output, weights = functional_call(module, dict(zip(names, parameters, strict=True)), (q, k, v), arguments)
        return output if weights is None else (output, weights)

    inputs = [tokens(B, length, E, requires_grad=True) for length in (L, S, S)]
    parameters = [p.detach().clone().requires_grad_() for p in module.parameters()]
    return function, (*inputs, *parameters)


def check_first_order(name: str, mask: str, need_weights: bool, impl: str, *, fast: bool = True) -> None:
    module = layer(name, E, N, impl=impl).double()
    arguments = MASKS[mask](B, L, S, N, torch.float64)
    function, point = differentiable(module, need_weights=need_weights, **arguments)
    assert gradcheck(
        function,
        point,
        fast_mode=fast,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )


def check_second_order(name: str, mask: str, need_weights: bool, impl: str) -> None:
    module = layer(name, E, N, impl=impl).double()
    arguments = MASKS[mask](B, L, S, N, torch.float64)
    function, point = differentiable(module, need_weights=need_weights, **arguments)
    assert gradgradcheck(function, point, fast_mode=True, check_fwd_over_rev=True, check_rev_over_rev=True)


# --- gradcheck, gradgradcheck, forward mode, batched gradients ----------------------------------------------------


@pytest.mark.parametrize(("name", "mask"), UNIT_PAIRS)
def test_first_derivatives_of_inputs_and_parameters(name: str, mask: str) -> None:
    check_first_order(name, mask, need_weights=False, impl="auto")


@pytest.mark.parametrize("name", NAMED)
def test_first_derivatives_of_output_and_weights_together(name: str) -> None:
    check_first_order(name, "mask and padding", need_weights=True, impl="reference")


@pytest.mark.parametrize(("name", "need_weights"), [*((name, False) for name in NAMED), ("expressive", True)])
def test_second_derivatives(name: str, need_weights: bool) -> None:
    check_second_order(name, "mask and padding", need_weights, impl="auto")


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize(("name", "mask"), EVERY_PAIR)
def test_every_mask_every_layer(name: str, mask: str, need_weights: bool, impl: str) -> None:
    check_first_order(name, mask, need_weights, impl)
    check_second_order(name, mask, need_weights, impl)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_whole_jacobian(name: str) -> None:
    """The fast mode compares one random projection of the Jacobian; this compares every entry."""
    check_first_order(name, "padding bool", need_weights=True, impl="auto", fast=False)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("score", SCORES)
def test_a_float_mask_is_differentiable(score: str, need_weights: bool) -> None:
    """Learned position biases (T5, ALiBi slopes) are float masks that require a gradient."""
    q, k, v = (tokens(B, N, length, 3, requires_grad=True) for length in (L, S, S))
    bias = tokens(1, N, L, S, requires_grad=True)
    attend = lambda q, k, v, m: ba.attention(q, k, v, score=score, attn_mask=m, need_weights=need_weights)  # noqa: E731
    assert gradcheck(attend, (q, k, v, bias), fast_mode=True)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("mask", ["none", "bool", "float", "causal"])
def test_chunked_differentiates_once_and_says_so_when_asked_twice(score: str, mask: str) -> None:
    q, k, v = (tokens(B, N, length, 3, requires_grad=True) for length in (L, S, S))
    masks = {"none": None, "causal": None, "bool": torch.rand(B, 1, L, S) > 0.3, "float": tokens(N, L, S)}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = ba.attention(q, k, v, score=score, attn_mask=masks[mask], is_causal=mask == "causal", impl="chunked")
        assert isinstance(result, Tensor)
        return result

    assert gradcheck(attend, (q, k, v), fast_mode=True)
    try:
        assert gradgradcheck(attend, (q, k, v), fast_mode=True)
    except ValueError as error:  # a backward of its own may be differentiable once only; wrong it may not be
        assert "derivative" in str(error)  # noqa: PT017 - either outcome is right
        assert "reference" in str(error)  # noqa: PT017


def test_gradients_with_dropout_are_those_of_the_mask_drawn() -> None:
    module = layer("expressive", E, N, dropout=0.4).double().train()

    def function(x: Tensor) -> Tensor:
        torch.manual_seed(5)
        return module(x, x, x, need_weights=False)[0]

    assert gradcheck(function, tokens(B, S, E, requires_grad=True))


# --- torch.func ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_vmap_over_samples_is_the_batch(name: str, need_weights: bool) -> None:
    module = layer(name, E, N).double()
    q, k, v = tokens(B, L, E), tokens(B, S, E), tokens(B, S, E)
    bias, padded = tokens(L, S), padding(B, S)

    def one(q: Tensor, k: Tensor, v: Tensor, padded: Tensor) -> object:
        result = module(q, k, v, attn_mask=bias, key_padding_mask=padded, need_weights=need_weights)
        return result if need_weights else result[0]

    floats = torch.zeros(B, S, dtype=torch.float64).masked_fill(padded, -torch.inf)
    expected = module(q, k, v, attn_mask=bias, key_padding_mask=floats, need_weights=need_weights)
    torch.testing.assert_close(vmap(one)(q, k, v, floats), expected if need_weights else expected[0])


@pytest.mark.parametrize("name", [n for n in ALL if n != "no projections"])
def test_gradients_of_each_sample(name: str) -> None:
    module = layer(name, E, N).double()
    parameters = {n: p.detach() for n, p in module.named_parameters()}
    x, target = tokens(B, S, E), tokens(B, S, E)

    def loss(parameters: dict[str, Tensor], x: Tensor, target: Tensor) -> Tensor:
        output, _ = functional_call(module, parameters, (x, x, x), {"need_weights": False})
        return (output - target).square().sum()

    each = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, target)
    for sample in range(B):
        torch.testing.assert_close(
            {n: g[sample] for n, g in each.items()}, grad(loss)(parameters, x[sample], target[sample])
        )


@pytest.mark.parametrize("name", ["standard", "super", "expressive"])
def test_an_ensemble_is_its_members(name: str) -> None:
    members = [layer(name, E, N).double() for _ in range(3)]
    x = tokens(B, S, E)
    parameters, buffers = stack_module_state(members)
    base = layer(name, E, N).double()

    def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return functional_call(base, (parameters, buffers), (x, x, x), {"need_weights": False})[0]

    expected = torch.stack([member(x, x, x, need_weights=False)[0] for member in members])
    torch.testing.assert_close(vmap(one)(parameters, buffers), expected)


@pytest.mark.parametrize("name", NAMED)
def test_forward_and_reverse_mode_agree(name: str) -> None:
    module = layer(name, 2, 1, max_len=3).double()
    x, tangent = tokens(3, 2), tokens(3, 2)
    function = lambda x: module(x, x, x, need_weights=False)[0]  # noqa: E731
    output, forward = jvp(function, (x,), (tangent,))
    cotangent = torch.randn_like(output)
    (reverse,) = vjp(function, x)[1](cotangent)
    torch.testing.assert_close((cotangent * forward).sum(), (reverse * tangent).sum())
    torch.testing.assert_close(jacfwd(function)(x), jacrev(function)(x))
    curvature = hessian(lambda x: function(x).square().sum())(x).reshape(6, 6)
    assert curvature.abs().max() > 1e-3
    torch.testing.assert_close(curvature, curvature.T)


# --- memory layouts -----------------------------------------------------------------------------------------------


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same numbers laid out differently in memory."""
    return {
        "transposed": x.transpose(0, 1).contiguous().transpose(0, 1),
        "features outermost": x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "every second element": torch.stack([x, torch.full_like(x, torch.nan)], dim=-1).flatten(-2)[..., ::2],
        "storage offset": torch.cat([torch.full_like(x[:1], torch.nan), x])[1:],
    }


def output_and_gradients(module: nn.Module, inputs: list[Tensor], **arguments: object) -> list[Tensor | None]:
    """The output, and the gradients of a weighted sum of it by every input and parameter (None where there is none)."""
    output = module(*inputs, need_weights=False, **arguments)[0]
    weight = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view(output.shape)
    wanted = [t for t in (*inputs, *module.parameters()) if t.requires_grad]
    return [output, *torch.autograd.grad((output * weight).sum(), wanted, allow_unused=True)]


@pytest.mark.parametrize("name", ALL)
def test_memory_layout_does_not_matter(name: str) -> None:
    module = layer(name, E, N).double()
    inputs = [tokens(B, L, E), tokens(B, S, E), tokens(B, S, E)]
    mask = padding(B, S)
    expected = output_and_gradients(module, [x.requires_grad_() for x in inputs], key_padding_mask=mask)
    for kind in layouts(inputs[0]):
        strided = [layouts(x.detach())[kind].requires_grad_() for x in inputs]
        assert any(not x.is_contiguous() or x.storage_offset() for x in strided), kind
        before = [x.detach().clone() for x in strided]
        found = output_and_gradients(module, strided, key_padding_mask=layouts(mask[..., None])["transposed"][..., 0])
        torch.testing.assert_close(found, expected, msg=lambda text, kind=kind: f"{kind}: {text}")
        torch.testing.assert_close([x.detach() for x in strided], before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ALL)
def test_expanded_inputs_and_masks(name: str) -> None:
    """Stride 0: one sample, one token or one mask row, shown many times."""
    module = layer(name, E, N).double()
    sample, token, row = tokens(1, S, E), tokens(B, 1, E), tokens(1, S)
    for x in (sample.expand(B, S, E), token.expand(B, S, E)):
        mask = row.expand(S, S)
        found, _ = module(x, x, x, attn_mask=mask, need_weights=False)
        expected, _ = module(x.clone(), x.clone(), x.clone(), attn_mask=mask.clone(), need_weights=False)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("score", "impl"), [(s, i) for s in SCORES for i in computing(s)])
def test_memory_layout_does_not_matter_to_any_implementation(score: str, impl: str) -> None:
    inputs = [tokens(B, N, length, 3) for length in (L, S, S)]
    mask = tokens(B, 1, L, S)
    expected = ba.attention(*inputs, score=score, attn_mask=mask, impl=impl)
    strided = [x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0) for x in inputs]
    assert not strided[0].is_contiguous()
    wide = mask.transpose(-1, -2).contiguous().transpose(-1, -2).expand(B, N, L, S)
    torch.testing.assert_close(ba.attention(*strided, score=score, attn_mask=wide, impl=impl), expected)


@pytest.mark.parametrize("name", ALL)
def test_one_tensor_as_query_key_and_value(name: str) -> None:
    """The gradient of the shared tensor is the sum of the three; the output is that of three copies."""
    module = layer(name, E, N).double()
    x = tokens(B, S, E, requires_grad=True)
    copies = [x.detach().clone().requires_grad_() for _ in range(3)]
    shared = output_and_gradients(module, [x, x, x])
    apart = output_and_gradients(module, copies)
    torch.testing.assert_close(shared[0], apart[0])
    torch.testing.assert_close(shared[1], apart[1] + apart[2] + apart[3])
    torch.testing.assert_close(shared[4:], apart[4:])


@pytest.mark.parametrize("impl", ["auto", "reference", "chunked"])
@pytest.mark.parametrize("name", ["standard", "super", "expressive", "efficient+expressive learned scale"])
def test_any_subset_may_require_a_gradient(name: str, impl: str) -> None:
    module = layer(name, E, N, impl=impl).double()
    inputs = [tokens(B, L, E), tokens(B, S, E), tokens(B, S, E)]
    everything = output_and_gradients(module, [x.clone().requires_grad_() for x in inputs])
    for frozen_parameters in (False, True):
        module.requires_grad_(not frozen_parameters)
        for wanted in range(8):
            asked = [x.clone().requires_grad_(bool(wanted >> i & 1)) for i, x in enumerate(inputs)]
            if frozen_parameters and wanted == 0:
                assert not module(*asked, need_weights=False)[0].requires_grad
                continue
            found = output_and_gradients(module, asked)
            kept = [everything[0], *(everything[1 + i] for i in range(3) if wanted >> i & 1)]
            kept += [] if frozen_parameters else everything[4:]
            torch.testing.assert_close(found, kept)


@pytest.mark.parametrize("name", CAUSAL)
def test_the_triangle_may_be_a_view(name: str) -> None:
    module = layer(name, E, N).double()
    x = tokens(B, S, E)
    window = triangle(2 * S).t().contiguous().t()[:S, :S]
    expected, _ = module(x, x, x, attn_mask=triangle(S))
    torch.testing.assert_close(module(x, x, x, attn_mask=window)[0], expected)
