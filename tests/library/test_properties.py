"""Properties: what must hold of every mechanism, and what must not.

``TABLE`` declares, for each property and mechanism, whether it holds to the last bit, within 1e-12, or not at all. A
property that does not hold is tested too: its two sides must differ. Each ``measure`` yields pairs that the property
says are equal.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import better_attention as ba
from better_attention.scores import SCORES
from helpers import oracle
from helpers.bridge import array, assert_close, fill

DOUBLE = torch.float64
E, N, B, L, S, MAX = 15, 3, 2, 7, 11, 23  # width, heads (of width 5), batch, queries, keys, length of W_A

# ---------------------------------------------------------------------------------------------------- the declarations

BITWISE, WITHIN, NEVER, REFUSED = "holds bitwise", "holds within tolerance", "does not hold", "the call is refused"


class Row(NamedTuple):
    """What is declared of one property. ``None``: it says nothing of those mechanisms."""

    plain: str | None  # without W_A
    causal: str | None  # with a lower triangular W_A
    full: str | None  # with a full W_A
    expressive: str | None = ""  # where the expressive score, not W_A, decides; "": as the softmax one
    why: str = ""


PLACE = "W_A is indexed by position: a token moved elsewhere is mixed differently"
LEAK = "a full W_A carries every later value into the earlier ones"

TABLE: dict[str, Row] = {
    "weights are a distribution over keys": Row(WITHIN, WITHIN, WITHIN),
    "queries do not see each other": Row(WITHIN, WITHIN, WITHIN),
    "batch independence": Row(WITHIN, WITHIN, WITHIN),
    "batch independence in float32": Row(WITHIN, WITHIN, WITHIN),
    "permuted tokens permute the output": Row(WITHIN, NEVER, NEVER, why=PLACE),
    "permuted tokens and kernel": Row(None, NEVER, WITHIN, why="P W_A Pᵀ of a triangle is no triangle"),
    "order of keys does not matter": Row(WITHIN, NEVER, NEVER, why=PLACE),
    "keys twice are keys once": Row(WITHIN, NEVER, NEVER, why=PLACE),
    "linear in the values": Row(WITHIN, WITHIN, WITHIN),
    "a constant added to all scores of a query": Row(
        WITHIN, WITHIN, WITHIN, NEVER, why="z²/(1+z²) knows where zero is"
    ),
    "a constant added to all biases of a query": Row(WITHIN, WITHIN, WITHIN),
    "opposite keys are the same keys": Row(NEVER, NEVER, NEVER, BITWISE, why="exp tells a score from its opposite"),
    "heads stay among the values": Row(WITHIN, NEVER, NEVER, why="W_A V is no average of values"),
    "zero queries take the mean": Row(WITHIN, WITHIN, WITHIN),
    "boolean masks are infinite biases": Row(WITHIN, WITHIN, WITHIN),
    "one mask for all is that mask for each": Row(WITHIN, WITHIN, WITHIN),
    "two masks are their union": Row(WITHIN, WITHIN, WITHIN),
    "is causal is the triangle": Row(WITHIN, WITHIN, REFUSED, why=LEAK),
    "garbage in padding changes nothing": Row(BITWISE, BITWISE, BITWISE),
    "padding on the right is cropping": Row(WITHIN, WITHIN, WITHIN),
    "padding on the left is cropping": Row(WITHIN, NEVER, NEVER, why=PLACE),
    "the future does not reach the past": Row(BITWISE, BITWISE, REFUSED, why=LEAK),
    "a prefix stands alone": Row(WITHIN, WITHIN, REFUSED, why=LEAK),
    "longer than max len": Row(WITHIN, REFUSED, REFUSED, why="W_A has max_len rows"),
    "one sample needs no batch": Row(BITWISE, BITWISE, BITWISE),
    "the layouts agree": Row(WITHIN, WITHIN, WITHIN),
    "how it is called does not matter": Row(WITHIN, WITHIN, WITHIN),
}
"""Properties of several layers, or of exact numbers, are tests below."""

COLUMNS: dict[str, dict[str, Any]] = {
    "standard": {"mechanism": "standard"},
    "optimised": {"mechanism": "optimised"},
    "efficient": {"mechanism": "efficient"},
    "super causal": {"mechanism": "super", "align_causal": True},
    "super full": {"mechanism": "super", "align_heads": "per_head"},
    "expressive": {"mechanism": "expressive"},
    "optimised+expressive": {"mechanism": "optimised+expressive"},
    "efficient+expressive": {"mechanism": "efficient+expressive"},
    "super+expressive causal": {"mechanism": "super+expressive", "align_causal": True, "align_heads": "per_head"},
    "super+expressive full": {"mechanism": "super+expressive"},
    "standard+align": {"mechanism": "standard+align"},
}

PATHS: dict[str, dict[str, Any]] = {
    "auto": {"impl": "auto", "need_weights": False},
    "reference": {"impl": "reference", "need_weights": True},
    "chunked": {"impl": "chunked", "need_weights": False},
}

REFUSAL = {"longer than max len": "max_len"}
"""A word of the message with which a call is refused; "align_causal" where nothing is said."""

TOLERANCE = {"batch independence in float32": 5e-7}
"""Other bounds than 1e-12 (times the largest reference value, where that exceeds 1)."""


@dataclass
class Layers:
    """Makes and calls layers of one column by one path."""

    column: str
    path: str
    rng: np.random.Generator
    options: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.options = COLUMNS[self.column]
        self.mechanism = ba.Mechanism.of(self.options["mechanism"])
        self.full = self.mechanism.aligned and not self.options.get("align_causal", False)
        self.expressive = self.mechanism.score == "expressive"

    def make(self, *, dtype: torch.dtype = DOUBLE, max_len: int = MAX, **more: Any) -> ba.MultiheadAttention:
        options = {"batch_first": True, "impl": PATHS[self.path]["impl"], **self.options, **more}
        if self.mechanism.aligned:
            options["max_len"] = max_len
        return fill(ba.MultiheadAttention(E, N, dtype=dtype, **options), self.rng)

    def call(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Tensor:
        return module(query, key, value, **{"need_weights": PATHS[self.path]["need_weights"], **arguments})[0]

    def normal(self, *shape: int, dtype: torch.dtype = DOUBLE) -> Tensor:
        return torch.from_numpy(self.rng.normal(size=shape)).to(dtype)

    def tokens(self, length: int = L, dtype: torch.dtype = DOUBLE) -> Tensor:
        return self.normal(B, length, E, dtype=dtype)

    def cross(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.tokens(L), self.tokens(S), self.tokens(S)

    def mask(self, *shape: int) -> Tensor:
        """A boolean mask, True = masked, whose rows all keep their last key (which is later than most queries)."""
        mask = torch.from_numpy(self.rng.random(shape) < 0.4)
        mask[..., -1] = False
        if not mask.any():  # a mask that hides nothing tests nothing
            mask[..., -2] = True
        return mask


Pair = tuple[str, Tensor, Tensor]
MEASURES: dict[str, Callable[[Layers], Iterator[Pair]]] = {}


def measure(name: str) -> Callable[[Callable[[Layers], Iterator[Pair]]], Callable[[Layers], Iterator[Pair]]]:
    def register(function: Callable[[Layers], Iterator[Pair]]) -> Callable[[Layers], Iterator[Pair]]:
        MEASURES[name] = function
        return function

    return register


def claim(name: str, column: str) -> str | None:
    """What the table declares of a property for a column."""
    row, mechanism = TABLE[name], ba.Mechanism.of(COLUMNS[column]["mechanism"])
    if mechanism.score == "expressive" and row.expressive != "":
        return row.expressive
    if not mechanism.aligned:
        return row.plain
    return row.causal if COLUMNS[column].get("align_causal") else row.full


# -------------------------------------------------------------------------------------------------------- the measures


@measure("weights are a distribution over keys")
def weights_are_a_distribution_over_keys(layers: Layers) -> Iterator[Pair]:
    module, (q, k, v) = layers.make(), layers.cross()
    mask = layers.mask(L, S)
    mask[3] = True
    weights = module(q, k, v, attn_mask=mask, average_attn_weights=False)[1]
    alive = torch.ones(B, N, L, dtype=DOUBLE)
    alive[:, :, 3] = 0
    yield "sums", weights.sum(-1), alive
    yield "never negative", weights, weights.clamp(min=0)
    yield "hidden keys", weights.masked_fill(mask, 0), weights
    yield "averaged", module(q, k, v, attn_mask=mask)[1], weights.mean(1)


@measure("queries do not see each other")
def queries_do_not_see_each_other(layers: Layers) -> Iterator[Pair]:
    module, (q, k, v) = layers.make(), layers.cross()
    mask = layers.mask(L, S)
    whole = layers.call(module, q, k, v, attn_mask=mask)
    for kept in ([2], [6, 1, 3]):
        yield f"{kept}", layers.call(module, q[:, kept], k, v, attn_mask=mask[kept]), whole[:, kept]


def batches_do_not_see_each_other(layers: Layers, dtype: torch.dtype) -> Iterator[Pair]:
    module = layers.make(dtype=dtype)
    q, k, v = (layers.normal(5, n, E, dtype=dtype) for n in (L, S, S))
    padding = layers.mask(5, S)
    whole = layers.call(module, q, k, v, key_padding_mask=padding)
    for b in (0, 3):
        alone = slice(b, b + 1)
        yield f"{b}", layers.call(module, q[alone], k[alone], v[alone], key_padding_mask=padding[alone]), whole[alone]


@measure("batch independence")
def batch_independence(layers: Layers) -> Iterator[Pair]:
    yield from batches_do_not_see_each_other(layers, DOUBLE)


@measure("batch independence in float32")
def batch_independence_in_float32(layers: Layers) -> Iterator[Pair]:
    yield from batches_do_not_see_each_other(layers, torch.float32)


@measure("permuted tokens permute the output")
def permuted_tokens_permute_the_output(layers: Layers) -> Iterator[Pair]:
    module, x = layers.make(), layers.tokens()
    order = [3, 0, 6, 1, 5, 2, 4]
    y = x[:, order]
    yield "permuted", layers.call(module, y, y, y), layers.call(module, x, x, x)[:, order]


@measure("permuted tokens and kernel")
def permuted_tokens_and_kernel(layers: Layers) -> Iterator[Pair]:
    module, x = layers.make(max_len=L), layers.tokens()
    order = [3, 0, 6, 1, 5, 2, 4]
    y = x[:, order]
    expected = layers.call(module, x, x, x)[:, order]
    with torch.no_grad():  # P W_A Pᵀ, and P a
        module.align.weight.copy_(module.align.weight[..., order, :][..., order].clone())
        module.align.bias.copy_(module.align.bias[..., order].clone())
    yield "permuted", layers.call(module, y, y, y), expected


@measure("order of keys does not matter")
def order_of_keys_does_not_matter(layers: Layers) -> Iterator[Pair]:
    module, (q, k, v) = layers.make(), layers.cross()
    padding = layers.mask(B, S)
    order = torch.from_numpy(layers.rng.permutation(S))
    yield (
        "permuted",
        layers.call(module, q, k[:, order], v[:, order], key_padding_mask=padding[:, order]),
        layers.call(module, q, k, v, key_padding_mask=padding),
    )


@measure("keys twice are keys once")
def keys_twice_are_keys_once(layers: Layers) -> Iterator[Pair]:
    module, (q, k, v) = layers.make(), layers.cross()
    yield (
        "twice",
        layers.call(module, q, torch.cat([k, k], 1), torch.cat([v, v], 1)),
        layers.call(module, q, k, v),
    )


@measure("linear in the values")
def linear_in_the_values(layers: Layers) -> Iterator[Pair]:
    module, (q, k, v) = layers.make(bias=False), layers.cross()
    w, mask = layers.tokens(S), layers.mask(L, S)

    def at(value: Tensor) -> Tensor:
        return layers.call(module, q, k, value, attn_mask=mask)

    yield "combination", at(2.5 * v - 0.75 * w), 2.5 * at(v) - 0.75 * at(w)


@measure("a constant added to all scores of a query")
def a_constant_added_to_all_scores_of_a_query(layers: Layers) -> Iterator[Pair]:
    """A constant vector added to every key adds to the scores of a query one number, whatever W_K."""
    module, (q, k, v) = layers.make(), layers.cross()
    yield "shifted", layers.call(module, q, k + layers.normal(E), v), layers.call(module, q, k, v)


@measure("a constant added to all biases of a query")
def a_constant_added_to_all_biases_of_a_query(layers: Layers) -> Iterator[Pair]:
    """A mask acts on the logarithm of the weight, for every score, and so cancels in the normaliser."""
    module, (q, k, v) = layers.make(), layers.cross()
    bias = layers.normal(L, S)
    shifted = bias + 3 * layers.normal(L, 1)
    yield "shifted", layers.call(module, q, k, v, attn_mask=shifted), layers.call(module, q, k, v, attn_mask=bias)


@measure("opposite keys are the same keys")
def opposite_keys_are_the_same_keys(layers: Layers) -> Iterator[Pair]:
    module, (q, k, v) = layers.make(bias=False), layers.cross()
    for name, mask in (("bare", None), ("masked", layers.mask(L, S)), ("biased", layers.normal(L, S))):
        yield name, layers.call(module, q, -k, v, attn_mask=mask), layers.call(module, q, k, v, attn_mask=mask)
    with_bias = layers.make()
    expected = layers.call(with_bias, q, k, v)
    with torch.no_grad():  # all queries negated, the bias of their projection with them
        with_bias.q_proj.weight.neg_()
        with_bias.q_proj.bias.neg_()
    yield "queries", layers.call(with_bias, q, k, v), expected


def without_output_map(module: ba.MultiheadAttention) -> ba.MultiheadAttention:
    """The layer whose output is its joined heads."""
    with torch.no_grad():
        module.out_proj.weight.copy_(torch.eye(E))
        module.out_proj.bias.zero_()
    return module


@measure("heads stay among the values")
def heads_stay_among_the_values(layers: Layers) -> Iterator[Pair]:
    """Each feature of a head lies between the least and the greatest of the values the query sees."""
    module, (q, k, v) = without_output_map(layers.make()), layers.cross()
    if layers.mechanism.aligned:
        with torch.no_grad():
            module.align.weight.mul_(3)  # far from an average of the values
    mask = layers.mask(L, S)
    heads = layers.call(module, q, k, v, attn_mask=mask)
    values = module.v_proj(v)[:, None].expand(B, L, S, E)
    least, greatest = (
        values.masked_fill(mask[None, :, :, None], sign * torch.inf).mul(sign).amin(2).mul(sign) for sign in (1, -1)
    )
    yield "in the hull", heads, heads.clamp(least, greatest)


@measure("zero queries take the mean")
def zero_queries_take_the_mean(layers: Layers) -> Iterator[Pair]:
    """Equal scores: the plain mean of the visible (mixed) values. Expressive scores of zero: 0/0, a zero row."""
    module, (q, k, v) = without_output_map(layers.make()), layers.cross()
    with torch.no_grad():
        module.q_proj.weight.zero_()
        module.q_proj.bias.zero_()
        module.out_proj.bias.fill_(0.5)
    mask = layers.mask(L, S)
    values = array(module.v_proj(v))
    if layers.mechanism.aligned:
        kernel, bias = array(module.align.weight), array(module.align.bias)
        parts = [
            oracle.align(
                part,
                kernel if kernel.ndim == 2 else kernel[n],
                bias if bias.ndim == 1 else bias[n],
                layers.options.get("align_causal", False),
            )
            for value in values
            for n, part in enumerate(np.split(value, N, axis=1))
        ]
        values = np.stack([np.concatenate(parts[b * N : b * N + N], axis=1) for b in range(B)])
    visible = array(~mask)
    mean = (visible / visible.sum(1, keepdims=True)) @ values
    expected = torch.from_numpy(np.zeros_like(mean) if layers.expressive else mean) + 0.5
    leaves = [x.requires_grad_() for x in (q, k, v)]
    output = layers.call(module, *leaves, attn_mask=mask)
    yield "mean", output, expected
    for gradient in torch.autograd.grad(output.square().sum(), [*leaves, *module.parameters()]):
        assert gradient.isfinite().all()


@measure("boolean masks are infinite biases")
def boolean_masks_are_infinite_biases(layers: Layers) -> Iterator[Pair]:
    module, (q, k, v) = layers.make(), layers.cross()
    mask, padding = layers.mask(L, S), layers.mask(B, S)
    lowest = torch.finfo(DOUBLE).min
    expected = layers.call(module, q, k, v, attn_mask=mask, key_padding_mask=padding)
    for hidden in (-torch.inf, lowest):
        floats = [torch.zeros(m.shape, dtype=DOUBLE).masked_fill(m, hidden) for m in (mask, padding)]
        yield f"attn {hidden}", layers.call(module, q, k, v, attn_mask=floats[0], key_padding_mask=padding), expected
        yield f"padding {hidden}", layers.call(module, q, k, v, attn_mask=mask, key_padding_mask=floats[1]), expected
        if hidden != lowest:
            yield "both", layers.call(module, q, k, v, attn_mask=floats[0], key_padding_mask=floats[1]), expected
    visible = torch.zeros(L, S, dtype=DOUBLE)
    yield "zeros", layers.call(module, q, k, v, attn_mask=visible), layers.call(module, q, k, v)


@measure("one mask for all is that mask for each")
def one_mask_for_all_is_that_mask_for_each(layers: Layers) -> Iterator[Pair]:
    module, (q, k, v) = layers.make(), layers.cross()
    for name, mask in (("bool", layers.mask(L, S)), ("float", layers.normal(L, S))):
        whole = layers.call(module, q, k, v, attn_mask=mask)
        yield f"same {name}", layers.call(module, q, k, v, attn_mask=mask.repeat(B * N, 1, 1)), whole
    each = layers.mask(B * N, L, S)
    by_sample = torch.cat(
        [
            layers.call(module, q[b : b + 1], k[b : b + 1], v[b : b + 1], attn_mask=each[b * N : b * N + N])
            for b in range(B)
        ]
    )
    yield "a mask for each", layers.call(module, q, k, v, attn_mask=each), by_sample


@measure("two masks are their union")
def two_masks_are_their_union(layers: Layers) -> Iterator[Pair]:
    module, (q, k, v) = layers.make(), layers.cross()
    mask, padding = layers.mask(L, S), layers.mask(B, S)
    if layers.mechanism.aligned:  # padding also silences a value before W_A, a mask does not
        v = v.masked_fill(padding[..., None], 0)
        if "v" in layers.mechanism.projections:
            with torch.no_grad():
                module.v_proj.bias.zero_()
    merged = (mask | padding[:, None]).repeat_interleave(N, 0)
    expected = layers.call(module, q, k, v, attn_mask=mask, key_padding_mask=padding)
    yield "merged", layers.call(module, q, k, v, attn_mask=merged), expected
    yield "twice", layers.call(module, q, k, v, attn_mask=merged, key_padding_mask=padding), expected


@measure("is causal is the triangle")
def is_causal_is_the_triangle(layers: Layers) -> Iterator[Pair]:
    module = layers.make()
    for name, (q, k, v) in {"self": (layers.tokens(),) * 3, "cross": layers.cross()}.items():
        keys = k.shape[1]
        triangle = torch.ones(L, keys, dtype=torch.bool).triu(1)
        causal = layers.call(module, q, k, v, is_causal=True)
        yield f"{name} bool", causal, layers.call(module, q, k, v, attn_mask=triangle)
        as_float = torch.zeros(L, keys, dtype=DOUBLE).masked_fill(triangle, -torch.inf)
        yield f"{name} float", causal, layers.call(module, q, k, v, attn_mask=as_float)
        yield f"{name} twice", causal, layers.call(module, q, k, v, attn_mask=triangle, is_causal=True)
        mask = layers.mask(L, keys)
        mask[:, 0] = False
        both = layers.call(module, q, k, v, attn_mask=mask, is_causal=True)
        yield f"{name} with a mask", both, layers.call(module, q, k, v, attn_mask=mask | triangle)
        padding = layers.mask(B, keys)
        padding[:, 0] = False
        both = layers.call(module, q, k, v, key_padding_mask=padding, is_causal=True)
        yield f"{name} padded", both, layers.call(module, q, k, v, key_padding_mask=padding, attn_mask=triangle)
        bias = layers.normal(L, keys)
        both = layers.call(module, q, k, v, attn_mask=bias, is_causal=True)
        yield (
            f"{name} with a bias",
            both,
            layers.call(module, q, k, v, attn_mask=bias.masked_fill(triangle, -torch.inf)),
        )


SIZED = ((DOUBLE, 67), (torch.float32, 67), (torch.bfloat16, L), (torch.float16, L))
"""Dtypes and lengths for what must hold to the last bit; 67 is longer than a vector register or a small block."""


@measure("garbage in padding changes nothing")
def garbage_in_padding_changes_nothing(layers: Layers) -> Iterator[Pair]:
    for dtype, length in SIZED:
        module = layers.make(dtype=dtype, max_len=67)
        x, y = layers.tokens(length, dtype), layers.tokens(length, dtype)
        padding = torch.zeros(B, length, dtype=torch.bool)
        padding[1, 4:] = True
        padding[1, 1] = True
        as_float = torch.zeros(B, length, dtype=dtype).masked_fill(padding, -torch.inf)
        calls = {"bool": {"key_padding_mask": padding}, "float": {"key_padding_mask": as_float}}
        if not layers.full:
            calls["causal"] = {"key_padding_mask": padding, "is_causal": True}
        for name, masks in calls.items():
            quiet = layers.call(module, x, x, x, **masks)[~padding]
            quiet_cross = layers.call(module, y[:, :5], x, y, **masks)
            for garbage in (1e30, torch.nan, torch.inf):
                filler = torch.tensor(garbage).to(dtype)  # 1e30 is inf in float16
                loud, loud_y = (torch.where(padding[..., None], filler, z) for z in (x, y))
                note = f"{name} {garbage} {dtype} {length}"
                yield f"self {note}", layers.call(module, loud, loud, loud, **masks)[~padding], quiet
                if name == "bool":
                    yield f"cross {note}", layers.call(module, y[:, :5], loud, loud_y, **masks), quiet_cross


@measure("padding on the right is cropping")
def padding_on_the_right_is_cropping(layers: Layers) -> Iterator[Pair]:
    module, x = layers.make(), layers.tokens()
    padded = torch.cat([x, layers.tokens(5)], 1)
    padding = (torch.arange(L + 5) >= L).expand(B, -1)
    expected = layers.call(module, x, x, x)
    yield "right", layers.call(module, padded, padded, padded, key_padding_mask=padding)[:, :L], expected


@measure("padding on the left is cropping")
def padding_on_the_left_is_cropping(layers: Layers) -> Iterator[Pair]:
    module, x = layers.make(), layers.tokens()
    padded = torch.cat([layers.tokens(5), x], 1)
    padding = (torch.arange(L + 5) < 5).expand(B, -1)
    expected = layers.call(module, x, x, x)
    yield "left", layers.call(module, padded, padded, padded, key_padding_mask=padding)[:, 5:], expected


@measure("the future does not reach the past")
def the_future_does_not_reach_the_past(layers: Layers) -> Iterator[Pair]:
    for dtype, length in SIZED:
        module = layers.make(dtype=dtype, max_len=67)
        x, y = layers.tokens(length, dtype), layers.tokens(length, dtype)
        triangle = torch.ones(length, length, dtype=torch.bool).triu(1)
        holes = triangle | layers.mask(length, length)
        holes[:, 0] = False
        calls = {
            "is_causal": {"is_causal": True},
            "bool": {"attn_mask": triangle},
            "float": {"attn_mask": torch.zeros(length, length, dtype=dtype).masked_fill(triangle, -torch.inf)},
            "with holes": {"attn_mask": holes, "is_causal": True},
        }
        for name, masks in calls.items():
            quiet = layers.call(module, x, x, x, **masks)
            quiet_cross = layers.call(module, y, x, y, **masks)
            cuts, noises = (length // 2, length - 1), ("x 100", 1e30, torch.nan)
            if name != "is_causal":
                cuts, noises = cuts[:1], noises[1:]
            for now, noise in itertools.product(cuts, noises):
                loud, loud_y = x.clone(), y.clone()
                for z in (loud, loud_y):
                    z[:, now:] = z[:, now:] * 100 if noise == "x 100" else torch.tensor(noise).to(dtype)
                note = f"{name} {noise} from {now} of {length} {dtype}"
                yield f"self {note}", layers.call(module, loud, loud, loud, **masks)[:, :now], quiet[:, :now]
                if name == "is_causal":
                    yield f"cross {note}", layers.call(module, y, loud, loud_y, **masks)[:, :now], quiet_cross[:, :now]


@measure("a prefix stands alone")
def a_prefix_stands_alone(layers: Layers) -> Iterator[Pair]:
    module, x = layers.make(), layers.tokens()
    whole = layers.call(module, x, x, x, is_causal=True)
    for length in range(1, L):
        y = x[:, :length]
        yield f"{length}", layers.call(module, y, y, y, is_causal=True), whole[:, :length]


@measure("longer than max len")
def longer_than_max_len(layers: Layers) -> Iterator[Pair]:
    """Only W_A limits the number of keys. The number of queries is never limited."""
    module = layers.make(max_len=S)
    q, k, v = (layers.tokens(n) for n in (S + 2, S, S))
    alone = torch.cat([layers.call(module, q[:, i : i + 1], k, v) for i in range(S + 2)], 1)
    assert_close(layers.call(module, q, k, v), alone, "max_len itself")
    longer = layers.tokens(S + 2)
    yield "longer", layers.call(module, q, longer, longer)[:, :3], layers.call(module, q[:, :3], longer, longer)


@measure("one sample needs no batch")
def one_sample_needs_no_batch(layers: Layers) -> Iterator[Pair]:
    module, (q, k, v) = layers.make(), layers.cross()
    mask, padding = layers.mask(L, S), layers.mask(S)
    before = [x.clone() for x in (q, k, v, mask, padding)]
    alone = layers.call(module, q[0], k[0], v[0], attn_mask=mask, key_padding_mask=padding)
    batched = layers.call(module, q[:1], k[:1], v[:1], attn_mask=mask, key_padding_mask=padding[None])
    yield "unbatched", alone, batched[0]
    each = layers.mask(N, L, S)
    one = layers.call(module, q[0], k[0], v[0], attn_mask=each)
    yield "a mask for each head", one, layers.call(module, q[:1], k[:1], v[:1], attn_mask=each)[0]
    first = layers.make(batch_first=False)
    first.load_state_dict(module.state_dict())
    yield (
        "unbatched has no layout",
        layers.call(first, q[0], k[0], v[0], attn_mask=mask, key_padding_mask=padding),
        alone,
    )
    for name, was, now in zip(
        ("query", "key", "value", "mask", "padding"), before, (q, k, v, mask, padding), strict=True
    ):
        yield f"{name} is not modified", now, was


@measure("the layouts agree")
def the_layouts_agree(layers: Layers) -> Iterator[Pair]:
    module, (q, k, v) = layers.make(), layers.cross()
    mask, padding = layers.mask(B * N, L, S), layers.mask(B, S)
    first = layers.make(batch_first=False)
    first.load_state_dict(module.state_dict())
    expected = layers.call(module, q, k, v, attn_mask=mask, key_padding_mask=padding)
    swapped = (x.transpose(0, 1) for x in (q, k, v))
    transposed = layers.call(first, *swapped, attn_mask=mask, key_padding_mask=padding)
    yield "transposed", transposed.transpose(0, 1), expected


@measure("how it is called does not matter")
def how_it_is_called_does_not_matter(layers: Layers) -> Iterator[Pair]:
    module, (q, k, v) = layers.make(), layers.cross()
    mask, padding = layers.mask(L, S), layers.mask(B, S)

    def at(**more: Any) -> Tensor:
        return layers.call(module, q, k, v, attn_mask=mask, key_padding_mask=padding, **more)

    expected = at()
    yield "no weights", at(need_weights=False), expected
    if layers.path == "chunked":  # it exists not to make the weights: honoured or refused, never replaced
        with pytest.raises(ValueError, match="chunked"):
            at(need_weights=True)
    else:
        yield "weights", at(need_weights=True), expected
        yield "weights of each head", at(need_weights=True, average_attn_weights=False), expected
    for training in (False, True):
        module.train(training)
        yield f"training {training}", at(), expected
        with torch.no_grad():
            yield f"no_grad, training {training}", at(), expected
        with torch.inference_mode():
            yield f"inference_mode, training {training}", at().clone(), expected
    for x in (q, k, v):
        x.requires_grad_()
    yield "gradients asked", at(), expected


# ---------------------------------------------------------------------------------------------------------- the driver

CASES = [
    pytest.param(name, column, id=f"{name}-{column}")
    for name, column in itertools.product(TABLE, COLUMNS)
    if claim(name, column) is not None
]


@pytest.mark.parametrize(("name", "column"), CASES)
def test_property(name: str, column: str, rng: np.random.Generator) -> None:
    declared = claim(name, column)
    for path in PATHS:
        if name == "weights are a distribution over keys" and path == "chunked":
            continue  # it never makes the weights
        layers = Layers(column, path, rng)
        if declared == REFUSED:
            with pytest.raises(ValueError, match=REFUSAL.get(name, "align_causal")):
                list(MEASURES[name](layers))
            continue
        pairs = 0
        for label, actual, expected in MEASURES[name](layers):
            pairs += 1
            note = f"{name} {column} {path}: {label}"
            if declared == NEVER:
                difference = (actual - expected).abs().max() / expected.abs().max()
                assert difference > 1e-3, f"{note}: holds, though {TABLE[name].why}"
            elif declared == BITWISE:
                assert expected.isfinite().all(), note
                assert expected.any(), f"{note}: vacuous"
                off = (actual.double() - expected.double()).abs().max()
                assert torch.equal(actual, expected), f"{note}: largest difference {off}"
            else:
                assert_close(actual, expected, note, tolerance=TOLERANCE.get(name, 1e-12))
        assert pairs


def test_the_table_is_whole() -> None:
    assert MEASURES.keys() == TABLE.keys()
    for name, row in TABLE.items():
        reason_needed = bool({NEVER, REFUSED} & set(row))
        assert bool(row.why) == reason_needed, f"{name}: a reason for, and only for, what does not hold"


TRIANGLE = torch.ones(L, L, dtype=torch.bool).triu(1)
CAUSAL_CALLS: dict[str, dict[str, Any]] = {
    "is_causal": {"is_causal": True},
    "bool": {"attn_mask": TRIANGLE},
    "bool for each": {"attn_mask": TRIANGLE.repeat(B * N, 1, 1)},
    "-inf": {"attn_mask": torch.zeros(L, L, dtype=DOUBLE).masked_fill(TRIANGLE, -torch.inf)},
    "finfo.min": {"attn_mask": torch.zeros(L, L, dtype=DOUBLE).masked_fill(TRIANGLE, torch.finfo(DOUBLE).min)},
    "both": {"attn_mask": TRIANGLE, "is_causal": True},
    "is_causal with a mask": {"attn_mask": torch.zeros(L, L, dtype=torch.bool), "is_causal": True},
}


@pytest.mark.parametrize("form", CAUSAL_CALLS)
@pytest.mark.parametrize("column", [c for c in COLUMNS if c.endswith("full")])
def test_a_full_kernel_refuses_every_causal_call(column: str, form: str, rng: np.random.Generator) -> None:
    layers = Layers(column, "auto", rng)
    module, x = layers.make(), layers.tokens()
    for need_weights in (False, True):
        with pytest.raises(ValueError, match="align_causal"):
            module(x, x, x, need_weights=need_weights, **CAUSAL_CALLS[form])


@pytest.mark.parametrize("column", [c for c in COLUMNS if c.endswith("full")])
def test_a_mask_that_shows_a_later_key_is_not_causal(column: str, rng: np.random.Generator) -> None:
    layers = Layers(column, "auto", rng)
    module, x = layers.make(), layers.tokens()
    almost = TRIANGLE.clone()
    almost[2, 5] = False
    assert layers.call(module, x, x, x, attn_mask=almost).isfinite().all()


@pytest.mark.parametrize("align_heads", ["shared", "per_head"])
def test_a_causal_kernel_ignores_what_lies_above_its_diagonal(align_heads: str, rng: np.random.Generator) -> None:
    module = Layers("super causal", "auto", rng).make(align_heads=align_heads)
    x = torch.from_numpy(rng.normal(size=(B, L, E)))
    before = module(x, x, x, is_causal=True)[0]
    with torch.no_grad():
        module.align.weight.add_(torch.ones(MAX, MAX, dtype=DOUBLE).triu(1))
    assert torch.equal(module(x, x, x, is_causal=True)[0], before)
    with torch.no_grad():
        module.align.weight.add_(torch.eye(MAX, dtype=DOUBLE))
    assert not torch.allclose(module(x, x, x, is_causal=True)[0], before)


@pytest.mark.parametrize("column", [c for c in COLUMNS if c.startswith("super")])
def test_the_message_names_both_lengths(column: str, rng: np.random.Generator) -> None:
    layers = Layers(column, "auto", rng)
    module, x = layers.make(), layers.tokens(MAX + 6)
    with pytest.raises(ValueError, match=rf"max_len.*\b{MAX}\b.*\b{MAX + 6}\b"):
        module(x, x, x)


@pytest.mark.parametrize("batch_first", [False, True])
def test_the_output_is_contiguous(batch_first: bool, rng: np.random.Generator) -> None:
    """So that ``view`` works on it, as it does on stock's."""
    for column, path in itertools.product(COLUMNS, PATHS):
        layers = Layers(column, path, rng)
        module, x = layers.make(batch_first=batch_first), layers.tokens()
        assert layers.call(module, x, x, x).is_contiguous(), f"{column} {path}"


def test_contiguity_is_documented() -> None:
    assert "contiguous" in f"{ba.MultiheadAttention.__doc__} {ba.MultiheadAttention.forward.__doc__}"


CHAIN = {
    "standard, W_K = W_V = I, is efficient": ("standard", "efficient", ("k_proj", "v_proj")),
    "standard, W_V = I, is optimised": ("standard", "optimised", ("v_proj",)),
    "optimised, W_K = I, is efficient": ("optimised", "efficient", ("k_proj",)),
    "super, W_A = I, is efficient": ("super", "efficient", ("align",)),
    "expressive, W_V = I, is optimised+expressive": ("expressive", "optimised+expressive", ("v_proj",)),
    "super+expressive, W_A = I, is efficient+expressive": ("super+expressive", "efficient+expressive", ("align",)),
}


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("heads", [1, 2, 3, 6])
@pytest.mark.parametrize("link", CHAIN)
def test_each_mechanism_contains_the_next(link: str, heads: int, impl: str, rng: np.random.Generator) -> None:
    upper, lower, identities = CHAIN[link]
    width, need_weights = 6, impl == "reference"
    small = fill(ba.MultiheadAttention(width, heads, mechanism=lower, batch_first=True, dtype=DOUBLE, impl=impl), rng)
    more = {"max_len": 9} if "super" in upper else {}
    large = ba.MultiheadAttention(width, heads, mechanism=upper, batch_first=True, dtype=DOUBLE, impl=impl, **more)
    result = large.load_state_dict(small.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert {name.split(".")[0] for name in result.missing_keys} == set(identities)
    with torch.no_grad():
        for name in identities:
            layer = large.get_submodule(name)
            layer.weight.copy_(torch.eye(layer.weight.shape[-1]))
            layer.bias.zero_()
    q, k, v = (torch.from_numpy(rng.normal(size=(B, n, width))) for n in (5, 7, 7))
    mask = torch.from_numpy(rng.random((5, 7)) < 0.4)
    mask[:, -1] = False
    padding = torch.arange(7) >= torch.tensor([[7], [5]])
    masks = {"attn_mask": mask, "key_padding_mask": padding}
    expected = small(q, k, v, need_weights=need_weights, **masks)[0]
    assert_close(large(q, k, v, need_weights=need_weights, **masks)[0], expected, link)
    for name in identities:
        with torch.no_grad():
            large.get_submodule(name).weight.mul_(1.5)
        moved = large(q, k, v, need_weights=need_weights, **masks)[0]
        assert (moved - expected).abs().max() > 1e-3, f"the identity for {name} is not used"


def count(embed_dim: int, heads: int, mechanism: str, max_len: int | None = None, **options: Any) -> int:
    more = {"max_len": max_len} if "super" in mechanism else {}
    module = ba.MultiheadAttention(embed_dim, heads, mechanism=mechanism, device="meta", **more, **options)
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("heads", [1, 4])
def test_parameters_without_biases(heads: int) -> None:
    d, length = 52, 17
    assert count(d, heads, "standard", bias=False) == 4 * d**2
    assert count(d, heads, "expressive", bias=False) == 4 * d**2
    assert count(d, heads, "optimised", bias=False) == 3 * d**2
    assert count(d, heads, "efficient", bias=False) == 2 * d**2
    assert count(d, heads, "super", length, bias=False) == 2 * d**2 + length**2
    assert count(d, heads, "super", length, bias=False, align_heads="per_head") == 2 * d**2 + heads * length**2
    assert count(d, heads, "efficient", bias=False, scale="learned") == 2 * d**2 + heads


@pytest.mark.parametrize(
    ("width", "heads", "length", "standard", "optimised", "efficient", "super_"),
    [
        pytest.param(128, 4, 64, 66_048, 49_536, 33_024, 37_184, id="MNIST"),
        pytest.param(256, 8, 257, 263_168, 197_376, 131_584, 197_890, id="CIFAR100"),
        # the paper rounds these: 2.36M, 1.77M, 1.18M, 1.22M
        pytest.param(768, 12, 196, 2_362_368, 1_771_776, 1_181_184, 1_219_796, id="ImageNet"),
        pytest.param(32, 4, 32, 4_224, 3_168, 2_112, 3_168, id="IMDB"),
        pytest.param(64, 4, 64, 16_640, 12_480, 8_320, 12_480, id="Amazon"),
        pytest.param(1024, 4, None, 4_198_400, 3_148_800, 2_099_200, None, id="translation"),
    ],
)
def test_parameters_of_every_table_of_the_paper(
    width: int, heads: int, length: int | None, standard: int, optimised: int, efficient: int, super_: int | None
) -> None:
    assert count(width, heads, "standard") == standard
    assert count(width, heads, "optimised") == optimised
    assert count(width, heads, "efficient") == efficient
    if super_ is not None:
        assert count(width, heads, "super", length) == super_


GRID = list(
    itertools.product(
        (True, False),  # need_weights
        (True, False),  # training
        ("auto", "reference"),  # the fast path and the plain one
        ("bool", "float"),
        ("attn", "padding", "both"),
        ("first", "last", "all"),
    )
)


def empty_rows(where: str, which: str) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """An attention mask, a padding mask, and the rows (B, L) to which they leave no key, for 3 samples."""
    rows = {"first": slice(0, 1), "last": slice(-1, None), "all": slice(None)}[which]
    attn, padding = torch.zeros(L, S, dtype=torch.bool), torch.zeros(3, S, dtype=torch.bool)
    empty = torch.zeros(3, L, dtype=torch.bool)
    if where == "attn":
        attn[rows], empty[:, rows] = True, True
        attn[3, 2] = True
        return attn, None, empty
    if where == "padding":
        padding[rows], empty[rows] = True, True
        padding[1, 5:] = True
        return None, padding, empty
    padding[:, 6:] = True  # neither mask alone empties a row
    attn[rows, :6], empty[:, rows] = True, True
    return attn, padding, empty


@pytest.mark.parametrize("column", COLUMNS)
def test_fully_masked_rows(column: str, rng: np.random.Generator) -> None:
    """Weights 0, output = output bias, no gradient to the query, finite gradients; the same on every path."""
    layers = Layers(column, "auto", rng)
    modules = {impl: layers.make(impl=impl) for impl in ("auto", "reference")}
    modules["reference"].load_state_dict(modules["auto"].state_dict())
    leaves = [layers.normal(3, n, E).requires_grad_() for n in (L, S, S)]
    upstream = layers.normal(3, L, E)
    results: dict[tuple[str, str], Tensor] = {}
    cells = 0
    for need_weights, training, impl, form, where, which in GRID:
        attn, padding, empty = empty_rows(where, which)
        assert empty.any()
        assert empty.all() == (which == "all")
        if form == "float":
            attn, padding = (
                None if m is None else torch.zeros(m.shape, dtype=DOUBLE).masked_fill(m, -torch.inf)
                for m in (attn, padding)
            )
        note = f"{column} {need_weights=} {training=} {impl} {form} {where} {which}"
        module = modules[impl].train(training)
        arguments = {"attn_mask": attn, "key_padding_mask": padding, "need_weights": need_weights}
        output, weights = module(*leaves, **arguments)
        gradients = torch.autograd.grad(output, [*leaves, *module.parameters()], upstream)
        everything = torch.cat([x.flatten() for x in (output, *gradients)])
        bias = module.out_proj.bias
        assert torch.equal(output[empty], bias.expand_as(output[empty])), note
        assert everything.isfinite().all(), note
        assert not gradients[0][empty].any(), note
        if need_weights:
            assert not weights[empty].any(), note
            assert_close(weights.sum(-1), array(~empty), note, vacuous=True)
        if which != "all":
            assert (output[~empty] != bias).any(-1).all(), note
            assert gradients[0][~empty].any(-1).all(), note
        assert_close(everything, results.setdefault((where, which), everything), note)
        if not training and impl == "auto":
            with torch.no_grad():
                assert_close(module(*leaves, **arguments)[0], output, f"no_grad {note}")
        cells += 1
    assert cells == 144


@pytest.mark.parametrize("impl", ["auto", "reference", "chunked"])
@pytest.mark.parametrize("score", SCORES)
def test_in_the_function(score: str, impl: str, rng: np.random.Generator) -> None:
    q, k, v = (torch.from_numpy(rng.normal(size=(2, 3, n, 5))).requires_grad_() for n in (L, S, S))
    visible = torch.from_numpy(rng.random((2, 1, L, S)) < 0.6)
    visible[..., 0] = True
    visible[1, :, 2:4] = False
    bias = torch.zeros(2, 1, L, S, dtype=DOUBLE).masked_fill(~visible, -torch.inf)
    for mask in (visible, bias):
        output = ba.attention(q, k, v, score=score, attn_mask=mask, impl=impl)
        assert not output[1, :, 2:4].any()
        assert output[0].any(-1).all()
        gradients = torch.autograd.grad(output.square().sum(), [q, k, v])
        assert all(g.isfinite().all() for g in gradients)
        assert not gradients[0][1, :, 2:4].any()
        assert gradients[0][0].any(-1).all()


@pytest.mark.parametrize("sizes", [(0, L, S), (B, 0, 0), (B, L, 0), (B, 0, S)], ids=["B=0", "L=S=0", "S=0", "L=0"])
@pytest.mark.parametrize("column", COLUMNS)
def test_zero_lengths(column: str, sizes: tuple[int, int, int], rng: np.random.Generator) -> None:
    """Nothing to do is done, forward and backward; no keys means what a fully masked row means."""
    batch, queries, keys = sizes
    for path in PATHS:
        layers = Layers(column, path, rng)
        module = layers.make()
        leaves = [layers.normal(batch, n, E).requires_grad_() for n in (queries, keys, keys)]
        need_weights = PATHS[path]["need_weights"]
        padding = torch.zeros(batch, keys, dtype=torch.bool) if path == "auto" else None
        output, weights = module(*leaves, key_padding_mask=padding, need_weights=need_weights)
        assert output.shape == (batch, queries, E)
        if need_weights:
            assert weights.shape == (batch, queries, keys)
        if keys == 0:
            assert torch.equal(output, module.out_proj.bias.expand_as(output))
        output.sum().backward()
        for leaf in (*leaves, *module.parameters()):
            assert leaf.grad is None or (leaf.grad.shape == leaf.shape and leaf.grad.isfinite().all())
        assert (module.out_proj.bias.grad == batch * queries).all()


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("sizes", [(0, L, S), (B, 0, 0), (B, L, 0), (B, 0, S)], ids=["B=0", "L=S=0", "S=0", "L=0"])
def test_zero_lengths_as_stock(sizes: tuple[int, int, int], need_weights: bool, rng: np.random.Generator) -> None:
    batch, queries, keys = sizes
    stock = fill(nn.MultiheadAttention(E, N, batch_first=True, dtype=DOUBLE), rng)
    ours = ba.MultiheadAttention(E, N, batch_first=True, dtype=DOUBLE)
    ours.load_state_dict(stock.state_dict())
    inputs = [torch.from_numpy(rng.normal(size=(batch, n, E))) for n in (queries, keys, keys)]
    expected, output = (m(*inputs, need_weights=need_weights) for m in (stock, ours))
    assert_close(output[0], expected[0], vacuous=True)
    assert (output[1] is None) == (expected[1] is None)
    if need_weights:
        assert_close(output[1], expected[1], vacuous=True)
