"""``ba.cost`` against the paper's printed counts, real modules and torch's own counter of operations."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import better_attention as ba
from better_attention.cache.rows import SPARE
from helpers.layers import NAMED, refused, tokens

PAPER: dict[str, tuple[int, int, int, dict[str, int]]] = {
    "MNIST": (128, 4, 64, {"standard": 66_048, "optimised": 49_536, "efficient": 33_024, "super": 37_184}),
    "CIFAR100": (256, 8, 257, {"standard": 263_168, "optimised": 197_376, "efficient": 131_584, "super": 197_890}),
    "IMDB": (32, 4, 32, {"standard": 4_224, "optimised": 3_168, "efficient": 2_112, "super": 3_168}),
    "Amazon": (64, 4, 64, {"standard": 16_640, "optimised": 12_480, "efficient": 8_320, "super": 12_480}),
    "translation": (1024, 4, 20, {"standard": 4_198_400, "optimised": 3_148_800, "efficient": 2_099_200}),
}
"""Width, heads, length and the printed attention parameters of arXiv 2403.01643v2, tables 1-7 (one layer)."""

IMAGENET = {"standard": 2.36, "optimised": 1.77, "efficient": 1.18, "super": 1.22}
"""Printed in millions, at width 768, 12 heads and 196 patches."""

C_OF_EQUATION_24 = {"standard": 15, "optimised": 12, "efficient": 9, "super": 12}
MAPS = {"standard": 4, "optimised": 3, "efficient": 2, "super": 2, "expressive": 4}
FREE = {
    "super+expressive": ba.Mechanism.of("super+expressive"),
    "optimised+align": ba.Mechanism.of("optimised+align"),
    "keys alone": ba.Mechanism(frozenset("k")),
    "no map": ba.Mechanism(frozenset()),
    "everything": ba.Mechanism(frozenset("qkvo"), aligned=True, score="expressive"),
}


def module_of(d: int, h: int, length: int, mechanism: object, **options: object) -> ba.MultiheadAttention:
    if ba.Mechanism.of(mechanism).aligned:
        options["max_len"] = length
    return ba.MultiheadAttention(d, h, batch_first=True, mechanism=mechanism, **options)


def params_of(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# --- parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("data", "name"), [(data, name) for data, row in PAPER.items() for name in row[3]])
def test_parameters_are_those_of_the_paper(data: str, name: str) -> None:
    d, h, length, printed = PAPER[data]
    assert params_of(module_of(d, h, length, name, device="meta")) == printed[name]
    assert ba.cost(d, h, length, mechanism=name).params == printed[name]


@pytest.mark.parametrize("name", IMAGENET)
def test_parameters_on_imagenet(name: str) -> None:
    count = params_of(module_of(768, 12, 196, name, device="meta"))
    assert round(count / 1e6, 2) == IMAGENET[name]
    assert ba.cost(768, 12, 196, mechanism=name).params == count


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("align_heads", ["shared", "per_head"])
@pytest.mark.parametrize("mechanism", [*NAMED, *FREE])
def test_parameters_are_those_of_the_module(mechanism: str, align_heads: str, bias: bool) -> None:
    chosen = FREE.get(mechanism, mechanism)
    if align_heads == "per_head" and not ba.Mechanism.of(chosen).aligned:
        align_heads = "shared"  # it says nothing about a mechanism without W_A
    module = module_of(12, 3, 7, chosen, align_heads=align_heads, bias=bias, device="meta")
    record = ba.cost(12, 3, 7, mechanism=chosen, align_heads=align_heads, bias=bias)
    assert record.params == params_of(module)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        sized = ba.cost(12, 3, 7, mechanism=chosen, align_heads=align_heads, bias=bias, dtype=dtype)
        assert sized.weight_bytes == params_of(module) * dtype.itemsize


def test_per_head_kernels_cost_h_times_as_much() -> None:
    shared, apart = (ba.cost(12, 3, 7, mechanism="super", align_heads=a) for a in ("shared", "per_head"))
    assert apart.params - shared.params == 2 * (7 * 7 + 7)
    assert apart.flops == shared.flops, "the same products, of other numbers"


def test_claim_c1_shares_of_the_parameters() -> None:
    """25 % fewer for optimised, 50 % for efficient; for super the saving depends on the length."""
    standard = ba.cost(512, 8, 128).params
    assert ba.cost(512, 8, 128, mechanism="optimised").params / standard == 0.75
    assert ba.cost(512, 8, 128, mechanism="efficient").params / standard == 0.5
    assert 0.5 < ba.cost(512, 8, 128, mechanism="super").params / standard < 0.75


# --- equation 24 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", C_OF_EQUATION_24)
@pytest.mark.parametrize(("d", "h", "length"), [(128, 4, 64), (768, 12, 196), (32, 1, 32), (256, 8, 257)])
def test_equation_24(name: str, d: int, h: int, length: int) -> None:
    expected = C_OF_EQUATION_24[name] * length * d + 15 * h * length**2
    assert ba.cost(d, h, length, mechanism=name).flops_paper == expected


@pytest.mark.parametrize(
    ("mechanism", "c"),
    [
        ("expressive", 15),
        ("super+expressive", 12),
        ("optimised+align", 15),
        ("keys alone", 6),
        ("no map", 3),
        ("everything", 18),
    ],
)
def test_equation_24_of_a_free_mechanism(mechanism: str, c: int) -> None:
    """C = 3 · (linear maps, W_A included) + 3."""
    assert ba.cost(12, 3, 7, mechanism=FREE.get(mechanism, mechanism)).flops_paper == c * 7 * 12 + 15 * 3 * 49


@pytest.mark.parametrize(("h", "average"), [(1, 29.7), (2, 24.9), (4, 20.3), (8, 16.2)])
def test_the_averages_of_figure_3(h: int, average: float) -> None:
    """Standard over efficient on eleven powers of two each way (widths below h included, as in the paper's grid)."""
    powers = [2**k for k in range(11)]
    more = [
        100 * (ba.cost(d, h, n).flops_paper / ba.cost(d, h, n, mechanism="efficient").flops_paper - 1)
        for d in powers
        for n in powers
    ]
    assert round(sum(more) / len(more), 1) == average
    assert h > 1 or 66 <= max(more) < 66.7  # the text: up to 66 %


def test_claim_c9_super_is_cheaper_than_standard_where_the_width_exceeds_the_length() -> None:
    for d, length in [(64, 64), (64, 32), (64, 127), (64, 129), (64, 256)]:
        standard, aligned = (ba.cost(d, 1, length, mechanism=m, backward=False).flops for m in ("standard", "super"))
        assert (aligned < standard) is (length < 2 * d), "exactly: 2ℓ²d for W_A against 4ℓd² saved"
    assert ba.cost(64, 1, 64, mechanism="super").flops_paper < ba.cost(64, 1, 64).flops_paper


# --- exact operations -------------------------------------------------------------------------------------------------


def counted(mechanism: object, d: int, h: int, length: int, batch: int, backward: bool, **options: object) -> int:
    module = module_of(d, h, length, mechanism, impl="reference", **options)
    x = tokens(batch, length, d, dtype=torch.float32, requires_grad=True)
    counter = FlopCounterMode(display=False)
    with counter:
        output, _ = module(x, x, x, need_weights=True)
        if backward:
            output.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("mechanism", [*NAMED, *FREE])
def test_exact_operations_are_those_torch_counts(mechanism: str, backward: bool) -> None:
    chosen = FREE.get(mechanism, mechanism)
    for d, h, length, batch in [(12, 3, 7, 2), (10, 1, 5, 1), (8, 2, 1, 3)]:
        record = ba.cost(d, h, length, mechanism=chosen, batch=batch, backward=backward)
        assert record.flops == counted(chosen, d, h, length, batch, backward)


@pytest.mark.parametrize("backward", [False, True])
def test_exact_operations_with_a_kernel_per_head_and_without_bias(backward: bool) -> None:
    found = ba.cost(12, 3, 7, mechanism="super", batch=2, align_heads="per_head", bias=False, backward=backward).flops
    assert found == counted("super", 12, 3, 7, 2, backward, align_heads="per_head", bias=False)


@pytest.mark.parametrize("name", NAMED)
def test_exact_operations_by_formula(name: str) -> None:
    """Forward 2·(projections)·ℓd² + 4ℓ²d, and 2ℓ²d more for W_A; the backward pass does twice the products."""
    d, h, length = 768, 12, 196
    forward = 2 * MAPS[name] * length * d**2 + 4 * length**2 * d + (2 * length**2 * d if name == "super" else 0)
    assert ba.cost(d, h, length, mechanism=name, backward=False).flops == forward
    assert ba.cost(d, h, length, mechanism=name).flops == 3 * forward
    assert ba.cost(d, h, length, mechanism=name, batch=5).flops == 15 * forward


def test_forward_ratio_of_standard_to_efficient() -> None:
    for d, length in [(64, 64), (64, 8), (64, 4096)]:
        standard, efficient = (
            ba.cost(d, 1, length, mechanism=m, backward=False).flops for m in ("standard", "efficient")
        )
        assert math.isclose(standard / efficient, (2 * d + length) / (d + length))


# --- bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_bytes_of_a_token(dtype: torch.dtype) -> None:
    """In efficient self-attention keys and values are both the layer's input: one tensor to keep instead of two."""
    tensors = {"standard": 2, "optimised": 2, "efficient": 1, "super": 2, "expressive": 2, "efficient+expressive": 1}
    for name, count in tensors.items():
        assert ba.cost(12, 3, 7, mechanism=name, dtype=dtype).cache_bytes_per_token == count * 12 * dtype.itemsize
    assert (
        ba.cost(12, 3, 7, mechanism=ba.Mechanism(frozenset("q")), dtype=dtype).cache_bytes_per_token
        == 12 * dtype.itemsize
    )


# --- a window ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("align_heads", ["shared", "per_head"])
@pytest.mark.parametrize("mechanism", ["standard", "efficient", "super", "super+expressive", "optimised+align"])
def test_parameters_under_a_window_are_those_of_the_module(mechanism: str, align_heads: str, bias: bool) -> None:
    options = {"align_heads": align_heads} if ba.Mechanism.of(mechanism).aligned else {}
    module = ba.MultiheadAttention(12, 3, batch_first=True, mechanism=mechanism, window=5, bias=bias, **options)
    assert ba.cost(12, 3, 70, mechanism=mechanism, window=5, bias=bias, **options).params == params_of(module)


@pytest.mark.parametrize("window", [1, 3, 7, 8, 100])
@pytest.mark.parametrize("mechanism", NAMED)
def test_operations_under_a_window_are_those_of_every_query(mechanism: str, window: int) -> None:
    """Query by query, by torch's own counter: one row of scores, W_A on its weights, one mix of values."""
    d, h, length = 12, 3, 7
    counter = FlopCounterMode(display=False)
    with counter:
        for t in range(1, length + 1):
            seen = min(t, window)
            q, k, v = torch.zeros(h, 1, d // h), torch.zeros(h, d // h, seen), torch.zeros(h, seen, d // h)
            weights = q @ k
            if mechanism == "super":
                matrix = torch.zeros(h, seen, seen + 1)  # the bias is one more column
                weights = (weights @ matrix)[..., :seen]
            weights @ v
        for _ in range(MAPS[mechanism]):
            torch.zeros(length, d) @ torch.zeros(d, d)
    assert ba.cost(d, h, length, mechanism=mechanism, window=window, backward=False).flops == counter.get_total_flops()
    whole = ba.cost(d, h, length, mechanism=mechanism, window=window, batch=2).flops
    assert whole == 6 * counter.get_total_flops()


def test_a_window_makes_operations_linear_in_the_length() -> None:
    for mechanism in NAMED:
        short, long = (ba.cost(64, 4, n, mechanism=mechanism, window=32).flops for n in (1_000, 2_000))
        assert long / short == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mechanism", ["standard", "optimised", "efficient", "super", "super+expressive"])
def test_cache_bytes_are_those_of_a_cache(mechanism: str, dtype: torch.dtype) -> None:
    """A real cache of 40 tokens; one that slides over the last 8 has the room of SPARE more, whatever the length."""
    for window in (None, 8):
        aligned = ba.Mechanism.of(mechanism).aligned and window is None
        sizes = {"max_len": 40, "align_causal": True} if aligned else {}
        layer = ba.MultiheadAttention(12, 3, batch_first=True, mechanism=mechanism, window=window, dtype=dtype, **sizes)
        cache = ba.KVCache(layer.eval(), 2, max_len=40 if window is None else None)
        with torch.no_grad():
            for x in torch.zeros(2, 40, 12, dtype=dtype).split(1, dim=1):
                layer(x, x, x, cache=cache, need_weights=False)
        record = ba.cost(12, 3, 40, mechanism=mechanism, batch=2, dtype=dtype, window=window)
        spare = 0 if window is None else 2 * SPARE * record.cache_bytes_per_token
        assert record.cache_bytes == cache.nbytes - spare


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"embed_dim": 0}, ("embed_dim", "0")),
        ({"embed_dim": 12.0}, ("embed_dim", "12.0")),
        ({"embed_dim": "12"}, ("embed_dim", "'12'")),
        ({"num_heads": -3}, ("num_heads", "-3")),
        ({"num_heads": True}, ("num_heads", "True")),
        ({"length": -1}, ("length", "-1")),
        ({"length": 7.5}, ("length", "7.5")),
        ({"length": math.nan}, ("length", "nan")),
        ({"batch": -1}, ("batch", "-1")),
        ({"batch": "2"}, ("batch", "'2'")),
        ({"mechanism": "fast"}, ("fast", "standard", "super")),
        ({"mechanism": "super", "align_heads": "each"}, ("align_heads", "each", "shared", "per_head")),
        ({"dtype": "float32"}, ("dtype", "float32")),
        ({"dtype": None}, ("dtype", "None")),
        ({"window": 0}, ("window", "0")),
        ({"window": 2.5}, ("window", "2.5")),
    ],
)
def test_errors(arguments: dict[str, object], words: tuple[str, ...]) -> None:
    refused(lambda: ba.cost(**{"embed_dim": 12, "num_heads": 3, "length": 7, **arguments}), *words)
