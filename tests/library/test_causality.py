"""``ba.assert_causal``: passes what is causal, finds every planted leak and names where it shows."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import better_attention as ba
from helpers.layers import CAUSAL, layer, refused, tokens, triangle

B, L, E, N = 2, 7, 6, 2


def leak_of(function: Callable[..., object], inputs: Tensor, **options: object) -> str:
    with pytest.raises(AssertionError) as caught:
        ba.assert_causal(function, inputs, **options)
    return str(caught.value)


def self_attention(module: nn.Module, **arguments: object) -> Callable[[Tensor], Tensor]:
    return lambda x: module(x, x, x, need_weights=False, **arguments)[0]


# --- what is causal passes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CAUSAL)
def test_every_causal_layer_passes(name: str, dtype: torch.dtype, impl: str) -> None:
    module, x = layer(name, E, N, impl=impl).to(dtype), tokens(B, L, E, dtype=dtype)
    ba.assert_causal(self_attention(module, is_causal=True), x)


@pytest.mark.parametrize("name", CAUSAL)
def test_every_form_of_the_triangle_passes(name: str) -> None:
    module, x = layer(name, E, N).double(), tokens(B, L, E)
    never = torch.zeros(L, L, dtype=torch.float64).masked_fill(triangle(L), -torch.inf)
    masks = [triangle(L), never]
    if module.mechanism.score == "expressive":  # to softmax the least finite number is a bias like any other
        masks.append(never.clamp_min(torch.finfo(torch.float64).min))
    for mask in masks:
        ba.assert_causal(self_attention(module, attn_mask=mask), x)
    hidden = torch.zeros(B, L, dtype=torch.bool)
    hidden[1, -2:] = True
    ba.assert_causal(self_attention(module, is_causal=True, key_padding_mask=hidden), x)


@pytest.mark.parametrize("name", CAUSAL)
def test_output_and_weights_together(name: str) -> None:
    """What ``forward`` returns is a pair; the first item counts."""
    module, x = layer(name, E, N).double(), tokens(B, L, E)
    ba.assert_causal(lambda x: module(x, x, x, is_causal=True), x)
    leak_of(lambda x: [x.flip(1), x], x)


@pytest.mark.parametrize("name", CAUSAL)
def test_chunked_passes_across_chunks(name: str) -> None:
    module, x = layer(name, E, N, impl="chunked", max_len=L), tokens(B, L, E, dtype=torch.float32)
    ba.assert_causal(self_attention(module, is_causal=True), x)


def test_a_whole_decoder_on_tokens_passes() -> None:
    embedding = nn.Embedding(11, E)
    host = nn.TransformerEncoderLayer(E, N, 8, dropout=0.0, batch_first=True).eval()
    host.self_attn = layer("expressive", E, N)
    mask = triangle(L)
    ba.assert_causal(lambda t: host(embedding(t), src_mask=mask, is_causal=True), torch.randint(11, (B, L)))


def test_dimension_zero_and_negative_dimensions() -> None:
    module, x = layer("super causal", E, N, batch_first=False).double(), tokens(L, B, E)
    ba.assert_causal(self_attention(module, is_causal=True), x, dim=0)
    ba.assert_causal(self_attention(module, is_causal=True), x, dim=-3)
    unbatched = tokens(L, E)
    ba.assert_causal(self_attention(module, is_causal=True), unbatched, dim=0)


def test_nothing_is_left_behind() -> None:
    module, x = layer("standard", E, N), tokens(B, L, E, dtype=torch.float32)
    before, state = x.clone(), torch.get_rng_state()
    module.train()
    assert ba.assert_causal(self_attention(module, is_causal=True), x) is None
    assert torch.equal(x, before)
    assert x.grad is None
    assert module.training
    assert torch.equal(torch.get_rng_state(), state)


def test_inputs_that_require_a_gradient() -> None:
    x = tokens(B, L, E, requires_grad=True)
    ba.assert_causal(lambda x: x.cumsum(1), x)
    assert x.grad is None


# --- what leaks is found ----------------------------------------------------------------------------------------------

LEAKS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "the next token": lambda x, p: x[:, p + 1],
    "the last token": lambda x, p: x[:, -1],
    "a thousandth": lambda x, p: 1e-3 * x[:, p + 1],
    "one feature of one sample": lambda x, p: torch.zeros_like(x[:, p]).index_put(
        (torch.tensor([1]), torch.tensor([2])), x[1, p + 1, 2]
    ),
    "weight zero": lambda x, p: 0.0 * x[:, p + 1],  # only NaN shows it: 0 · NaN = NaN
    "a maximum": lambda x, p: x[:, p:].max(dim=1).values,
    "saturated": lambda x, p: torch.tanh(x[:, p + 1]),
}


@pytest.mark.parametrize("position", range(L - 1))
@pytest.mark.parametrize("leak", LEAKS)
def test_a_leak_is_found_at_every_position_and_named(leak: str, position: int) -> None:
    def function(x: Tensor) -> Tensor:
        y = x.cumsum(1)
        return y.index_add(1, torch.tensor([position]), LEAKS[leak](x, position)[:, None])

    message = leak_of(function, tokens(B, L, E))
    assert re.search(rf"\b{position}\b", message), message


def test_the_first_of_several_positions_is_named() -> None:
    def function(x: Tensor) -> Tensor:
        y = x.clone()
        y[:, 4] = y[:, 4] + x[:, 5]
        y[:, 2] = y[:, 2] + x[:, 6]
        return y

    message = leak_of(function, tokens(B, L, E))
    assert re.search(r"position\D*2\b", message), message


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_a_leak_along_any_dimension(dim: int) -> None:
    x = tokens(3, 4, 5)
    ba.assert_causal(lambda x: x.cumsum(dim), x, dim=dim)
    assert re.search(r"\b0\b", leak_of(lambda x: x.flip(dim).cumsum(dim).flip(dim), x, dim=dim))


def test_leaks_on_tokens() -> None:
    """Integers cannot be made NaN or large: they are exchanged for others that the function knows."""
    table = torch.randn(11, 4, dtype=torch.float64)
    inputs = torch.tensor([[0, 3, 10, 3, 7, 7, 1], [5, 5, 5, 5, 5, 5, 2]])
    ba.assert_causal(lambda t: table[t].cumsum(1), inputs)
    for position in range(L - 1):
        steal = lambda t, p=position: table[t].index_add(1, torch.tensor([p]), table[t[:, p + 1 : p + 2]])  # noqa: E731
        assert re.search(rf"\b{position}\b", leak_of(steal, inputs))


@pytest.mark.parametrize("name", ["standard", "optimised", "efficient", "super", "expressive"])
def test_layers_without_a_mask_leak(name: str) -> None:
    module = layer(name, E, N).double()
    assert re.search(r"\b0\b", leak_of(self_attention(module), tokens(B, L, E)))


def test_a_kernel_that_is_not_triangular_leaks_though_the_scores_are() -> None:
    """What the refusal of a causal mask on a full W_A is for (arXiv 2403.01643, section 3.3)."""
    module = layer("super causal", E, N).double()
    kernel = torch.randn(L, L, dtype=torch.float64)

    def function(x: Tensor) -> Tensor:
        return module(x, x, torch.einsum("st,btd->bsd", kernel, x), is_causal=True)[0]

    leak_of(function, tokens(B, L, E))


# --- controls: torch's own class --------------------------------------------------------------------------------------


def test_stock_attention_without_a_mask_leaks() -> None:
    stock = nn.MultiheadAttention(E, N, batch_first=True).double()
    leak_of(self_attention(stock), tokens(B, L, E))


def test_stock_attention_believes_a_lying_hint() -> None:
    """With weights asked for, torch ignores ``is_causal`` and uses the mask it was given."""
    stock = nn.MultiheadAttention(E, N, batch_first=True).double()
    visible = torch.zeros(L, L, dtype=torch.bool)
    leak_of(lambda x: stock(x, x, x, attn_mask=visible, is_causal=True)[0], tokens(B, L, E))
    ours = layer("standard", E, N).double()
    ba.assert_causal(lambda x: ours(x, x, x, attn_mask=visible, is_causal=True)[0], tokens(B, L, E))


def test_stock_attention_lets_nan_through_its_mask() -> None:
    """0 · NaN = NaN: torch's masked future poisons the past; ours is closed to it."""
    stock = nn.MultiheadAttention(E, N, batch_first=True).double()
    leak_of(lambda x: stock(x, x, x, attn_mask=triangle(L))[0], tokens(B, L, E))


# --- what cannot be judged is refused ---------------------------------------------------------------------------------


def test_random_functions_are_refused_clearly() -> None:
    """Dropout makes everything move; that is not a leak, and must not be reported as one."""
    module, x = layer("standard", E, N, dropout=0.5).train(), tokens(B, L, E, dtype=torch.float32)
    refused(
        lambda: ba.assert_causal(self_attention(module, is_causal=True), x),
        ("determin", "two results"),
        ("dropout", "eval"),
    )
    ba.assert_causal(self_attention(module.eval(), is_causal=True), x)


@pytest.mark.parametrize("dim", [3, -4, 7])
def test_dimensions_that_do_not_exist(dim: int) -> None:
    refused(lambda: ba.assert_causal(lambda x: x, tokens(B, L, E), dim=dim), "dim", dim)


@pytest.mark.parametrize(
    "case",
    [
        (lambda x: x, [1.0, 2.0], {}),
        (lambda x: x, None, {}),
        (lambda x: "text", torch.zeros(B, L, E), {}),
        (lambda x: None, torch.zeros(B, L, E), {}),
        (lambda x: x.mean(1), torch.zeros(B, L, E), {}),
        (lambda x: x[:, :-1], torch.zeros(B, L, E), {}),
        ("not a function", torch.zeros(B, L, E), {}),
        (lambda x: x, torch.zeros(B, L, E), {"dim": "1"}),
    ],
    ids=["list", "None", "returns text", "returns None", "returns no positions", "drops one", "no function", "dim"],
)
def test_what_cannot_be_judged(case: tuple[object, object, dict[str, object]]) -> None:
    function, inputs, options = case
    refused(lambda: ba.assert_causal(function, inputs, **options))
