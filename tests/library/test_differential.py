"""Differential tests: the library against the oracle, against stock PyTorch, and its own paths against each other.

Random layers against the NumPy oracle; low precision and larger sizes; standard against
``torch.nn.MultiheadAttention``; every implementation against the reference; extreme inputs.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import better_attention as ba
from better_attention.scores import SCORES
from helpers import oracle
from helpers.bridge import (
    CAPS,
    array,
    assert_close,
    assert_within_rounding,
    fill,
    oracle_masks,
    oracle_weights,
    plain_attention,
    plain_module,
    rounded_attention,
)
from helpers.registry import IMPLS, IMPLS_AND_AUTO, computing, scored_mechanisms
from helpers.rounding import Rounding, expected_errors

DOUBLE = torch.float64

DRAWS = [200, pytest.param(2000, marks=pytest.mark.slow)]


def normal(rng: np.random.Generator, *shape: int, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.from_numpy(rng.normal(size=shape)).to(dtype)


# --- layers against the oracle

ROWS: dict[str, dict[str, Any]] = {
    **{name: {"mechanism": name} for name, row in scored_mechanisms().items() if not row.aligned},
    **{
        f"{name} {'causal' if causal else 'full'}": {"mechanism": name, "align_causal": causal}
        for name, row in scored_mechanisms().items()
        if row.aligned
        for causal in (False, True)
    },
    "any": {},  # a random set of projections, aligned or not, any score
}


@dataclass
class Case:
    """One random layer with one random input, and what the oracle says of it."""

    settings: dict[str, Any]
    module: ba.MultiheadAttention
    inputs: tuple[Tensor, Tensor, Tensor]
    arguments: dict[str, Any]
    output: np.ndarray
    weights: np.ndarray | None
    features: set[str]

    def __str__(self) -> str:
        masks = {k: None if v is None else (v.dtype, tuple(v.shape)) for k, v in self.arguments.items() if "mask" in k}
        rest = {k: v for k, v in self.arguments.items() if "mask" not in k}
        return f"{self.settings} on {[tuple(x.shape) for x in self.inputs]} with {masks} {rest}"


def draw_mask(rng: np.random.Generator, kind: str, shape: tuple[int, ...], hidden: float = 0.4) -> Tensor | None:
    """A mask in torch.nn's sense: none; bool, True = masked; float, added; inf, a float of zeros and -inf."""
    if kind == "none":
        return None
    masked = torch.from_numpy(rng.random(shape) < hidden)
    if kind == "bool":
        return masked
    values = torch.zeros(shape, dtype=DOUBLE) if kind == "inf" else normal(rng, *shape)
    return values.masked_fill(masked, -torch.inf)


def draw_layer(
    rng: np.random.Generator, row: dict[str, Any], keys: int
) -> tuple[ba.MultiheadAttention, dict[str, Any]]:
    """A layer of random size and settings whose every parameter is random."""

    def maybe(p: float) -> bool:
        return bool(rng.random() < p)

    mechanism = (
        ba.Mechanism.of(row["mechanism"])
        if row
        else ba.Mechanism(
            frozenset(p for p in "qkvo" if maybe(0.5)),
            aligned=maybe(0.5),
            score=str(rng.choice(list(SCORES))),
        )
    )
    heads, width = int(rng.integers(1, 5)), int(rng.integers(1, 9))
    settings: dict[str, Any] = {"bias": maybe(0.7), "batch_first": maybe(0.5), "mechanism": mechanism}
    settings |= {"add_bias_kv": maybe(0.2), "add_zero_attn": maybe(0.2)}
    for letter in "kv":
        if letter in mechanism.projections and maybe(0.3):
            settings[f"{letter}dim"] = int(rng.integers(1, 14))
    if mechanism.aligned:
        settings["max_len"] = max(1, keys + int(rng.integers(0, 4)))
        settings["align_heads"] = "per_head" if maybe(0.5) else "shared"
        settings["align_causal"] = row.get("align_causal", maybe(0.5))
    settings["scale"] = (None, "learned", float(rng.uniform(0.3, 1.5)))[rng.choice(3, p=[0.6, 0.2, 0.2])]
    settings["impl"] = str(rng.choice(["auto", "reference"]))
    module = ba.MultiheadAttention(heads * width, heads, **settings, dtype=DOUBLE)
    return fill(module, rng), settings


def draw_case(rng: np.random.Generator, row: dict[str, Any]) -> Case:
    """One random case: batch none, 0-3, L and S 0-9, heads 1-4, width 1-8, and every form of mask."""
    batch = None if rng.random() < 0.15 else int(rng.integers(0, 4))
    L, S = int(rng.integers(0, 10)), int(rng.integers(0, 10))
    module, settings = draw_layer(rng, row, max(L, S))
    E, N, B = module.embed_dim, module.num_heads, 1 if batch is None else batch
    kdim, vdim = settings.get("kdim", E), settings.get("vdim", E)

    query = normal(rng, B, L, E)
    sharing = str(rng.choice(["self", "key is value", "distinct"]))
    if sharing == "self" and kdim == vdim == E:
        key = value = query
        S = L
    else:
        sharing = "key is value" if sharing != "distinct" and kdim == vdim else "distinct"
        key = normal(rng, B, S, kdim)
        value = key if sharing == "key is value" else normal(rng, B, S, vdim)

    attn_kind, padding_kind = (str(rng.choice(["none", "bool", "float", "inf"])) for _ in range(2))
    three_d = bool(rng.random() < 0.5)
    attn_mask = draw_mask(rng, attn_kind, (B * N, L, S) if three_d else (L, S))
    padding = draw_mask(rng, padding_kind, (S,) if batch is None else (B, S))
    full_kernel = module.mechanism.aligned and not settings["align_causal"]
    is_causal = bool(rng.random() < 0.3) and not full_kernel
    need_weights, average = bool(rng.random() < 0.5), bool(rng.random() < 0.5)

    floor = torch.finfo(DOUBLE).min if module.mechanism.aligned or module.mechanism.score == "expressive" else -np.inf
    masks = oracle_masks(attn_mask, padding, B, N, L, S, floor=floor)
    numbers = oracle_weights(
        module,
        scale=settings["scale"] if isinstance(settings["scale"], float) else None,
        align_causal=settings.get("align_causal", False),
        add_zero_attn=settings["add_zero_attn"],
    )
    output, weights = oracle.multihead(numbers, array(query), array(key), array(value), **masks, causal=is_causal)
    features = {f"attn {attn_kind}", f"padding {padding_kind}", sharing, f"need_weights {need_weights}"}
    features |= {"unbatched"} if batch is None else {f"batch {min(batch, 2)}"}
    features |= {"causal"} if is_causal else set()
    features |= {"fully masked row"} if weights.size and (weights.sum(-1) == 0).any() else set()
    features |= {"no queries"} if L == 0 else set()
    features |= {"no keys"} if S == 0 else set()
    features |= {name for name in ("add_bias_kv", "add_zero_attn") if settings[name]}
    features |= {"3-D mask"} if three_d and attn_mask is not None else set()
    weights = weights.mean(1) if average else weights

    def layout(x: Tensor) -> Tensor:
        return x[0] if batch is None else x if settings["batch_first"] else x.transpose(0, 1)

    laid = {id(x): layout(x) for x in (query, key, value)}  # the same object stays the same object
    output = output[0] if batch is None else output if settings["batch_first"] else output.swapaxes(0, 1)
    return Case(
        settings=settings,
        module=module,
        inputs=(laid[id(query)], laid[id(key)], laid[id(value)]),
        arguments={
            "attn_mask": attn_mask,
            "key_padding_mask": padding,
            "is_causal": is_causal,
            "need_weights": need_weights,
            "average_attn_weights": average,
        },
        output=output,
        weights=(weights[0] if batch is None else weights) if need_weights else None,
        features=features,
    )


def hides_every_later_key(mask: Tensor | None) -> bool:
    """Whether some (L, S) slice of the mask hides all that is above its diagonal, and there is something above it."""
    if mask is None or 0 in mask.shape:
        return False
    hidden = mask if mask.dtype == torch.bool else torch.isneginf(mask)
    later = torch.ones(mask.shape[-2:], dtype=torch.bool).triu(1)
    return bool(later.any()) and bool((hidden | ~later).all(-1).all(-1).any())


EXPECTED = {
    *(f"{mask} {kind}" for mask in ("attn", "padding") for kind in ("none", "bool", "float", "inf")),
    *("self", "key is value", "distinct", "need_weights True", "need_weights False"),
    *("unbatched", "batch 0", "batch 1", "batch 2", "fully masked row", "no queries", "no keys"),
    *("add_bias_kv", "add_zero_attn", "3-D mask"),
}


@pytest.mark.parametrize("count", DRAWS)
@pytest.mark.parametrize("row", ROWS)
def test_random_layers_agree_with_the_oracle(row: str, count: int, seed: int) -> None:
    seen: Counter[str] = Counter()
    told = refused = 0
    for index in itertools.count():
        case = draw_case(np.random.default_rng([seed, index]), ROWS[row])
        note = f"seed [{seed}, {index}], {case}"
        try:
            output, weights = case.module(*case.inputs, **case.arguments)
        except ValueError as error:
            full_kernel = case.module.mechanism.aligned and not case.settings["align_causal"]
            leaks = full_kernel and hides_every_later_key(case.arguments["attn_mask"])
            if not (leaks and "align_causal" in str(error)):
                raise AssertionError(note) from error
            refused += 1  # what looks causal is refused where W_A would leak; draw again
            continue
        assert_close(output, case.output, note, vacuous=True)
        if case.weights is None:
            assert weights is None, note
        else:
            assert_close(weights, case.weights, f"weights, {note}", vacuous=True)
        seen.update(case.features)
        told += case.output.size > 0 and np.abs(case.output).max() >= 1e-3
        if told == count:
            break
    missing = (EXPECTED | ({"causal"} if "full" not in row else set())) - set(seen)
    assert not missing, f"{count} draws never contained {sorted(missing)}"
    assert refused < count / 5


# --- low precision

LOW = (torch.float32, torch.bfloat16, torch.float16)
#        embed heads  L    S
SIZES = [
    (65, 5, 97, 101),
    (119, 7, 131, 103),
    (60, 3, 1, 239),
    (66, 11, 239, 1),
    (253, 11, 149, 151),
    (512, 8, 257, 251),
]

FEW = 8
"""Under a causal mask, low precision is compared from this query on. The ones before see so few keys that all their
scores can be near 0 at once, where expressive weights hang on the rounding of q and k, by any formula."""

SCORE_PATH = ("query", "key", "q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias")
"""What only the scores depend on: one key takes all whatever its score, so that these gradients are then rounding."""


def check_low_precision(
    rng: np.random.Generator, row: str, dtype: torch.dtype, size: tuple[int, int, int, int], masked: bool
) -> None:
    """Outputs against the oracle, gradients against the plain float64 formula, within what rounding explains."""
    E, N, L, S = size
    options = dict(ROWS[row])
    align_causal = options.get("align_causal", False)
    causal = options.get("align_causal", masked) and L > 1
    first = FEW if causal else 0
    if "super" in row:
        options["max_len"] = S + 2
    module = fill(ba.MultiheadAttention(E, N, **options, batch_first=True, dtype=DOUBLE), rng).to(dtype)
    inputs = [normal(rng, 2, n, E, dtype=dtype).requires_grad_() for n in (L, S, S)]
    upstream = normal(rng, 2, L - first, E, dtype=dtype)
    padding = torch.arange(S) >= torch.tensor([[S], [max(1, S - 5)]]) if masked else None
    note = f"{row} {dtype} {size}"

    exact_module = copy.deepcopy(module).to(DOUBLE)
    exact_inputs = [x.detach().to(DOUBLE).requires_grad_() for x in inputs]
    exact, _ = oracle.multihead(
        oracle_weights(exact_module, align_causal=align_causal),
        *(array(x) for x in inputs),
        present=None if padding is None else (~padding).numpy(),
        causal=causal,
    )

    def formula(rounding: Rounding | None = None) -> list[Tensor]:
        output = plain_module(
            exact_module, *exact_inputs, padding=padding, causal=causal, align_causal=align_causal, rounding=rounding
        )
        return [output[:, first:], *gradients(output, exact_module, exact_inputs)]

    def gradients(output: Tensor, layer: nn.Module, xs: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output[:, first:], [*xs, *layer.parameters()], upstream.to(output.dtype))

    double = [array(x) for x in formula()]
    assert_close(double[0], exact[:, first:], f"plain formula, {note}")
    allowed = expected_errors(lambda: formula(Rounding(rng, dtype, dtype)), double)
    for need_weights in (False, True):
        output, _ = module(*inputs, key_padding_mask=padding, is_causal=causal, need_weights=need_weights)
        assert output.isfinite().all(), note
        assert_within_rounding(output[:, first:], double[0], allowed[0], f"{note} {need_weights=}", cap=True)
        names = ["query", "key", "value", *(name for name, _ in module.named_parameters())]
        grads = gradients(output, module, inputs)
        for name, ours, true, error in zip(names, grads, double[1:], allowed[1:], strict=True):
            constant = name == "k_proj.bias" and module.mechanism.score == "softmax"  # on a row of scores: cancels
            vacuous = constant or (S == 1 and name in SCORE_PATH)
            assert_within_rounding(ours, true, error, f"gradient of {name}, {note}", vacuous=vacuous)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("row", [row for row in ROWS if row != "any"])
def test_low_precision(row: str, dtype: torch.dtype, rng: np.random.Generator) -> None:
    check_low_precision(rng, row, dtype, (65, 5, 37, 41), masked=False)


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("row", [row for row in ROWS if row != "any"])
def test_low_precision_at_size(
    row: str, dtype: torch.dtype, size: tuple[int, int, int, int], masked: bool, rng: np.random.Generator
) -> None:
    check_low_precision(rng, row, dtype, size, masked)


# --- beside torch.nn.MultiheadAttention


def draw_stock(rng: np.random.Generator) -> tuple[nn.MultiheadAttention, dict[str, Any], list[Tensor], dict[str, Any]]:
    """A stock layer with random parameters, inputs, and masks under which every query sees some key."""

    def maybe(p: float) -> bool:
        return bool(rng.random() < p)

    heads, width = int(rng.integers(1, 5)), int(rng.integers(1, 7))
    E = heads * width
    batch = None if maybe(0.15) else int(rng.integers(1, 4))
    L, S = int(rng.integers(1, 9)), int(rng.integers(1, 9))
    settings = {"bias": maybe(0.7), "add_bias_kv": maybe(0.25), "add_zero_attn": maybe(0.25), "batch_first": maybe(0.5)}
    sharing = str(rng.choice(["self", "key is value", "distinct"]))
    if sharing != "self" and maybe(0.4):
        settings |= {"kdim": int(rng.integers(1, 14))}
        settings |= {"vdim": settings["kdim"] if sharing == "key is value" else int(rng.integers(1, 14))}
    stock = fill(nn.MultiheadAttention(E, heads, **settings, dtype=DOUBLE), rng)

    def sequence(length: int, width: int) -> Tensor:
        shape = (length,) if batch is None else (batch, length) if settings["batch_first"] else (length, batch)
        return normal(rng, *shape, width).requires_grad_()

    query = sequence(L, E)
    if sharing == "self":
        inputs, S = [query] * 3, L
    else:
        key = sequence(S, settings.get("kdim", E))
        inputs = [query, key, key if sharing == "key is value" else sequence(S, settings.get("vdim", E))]

    B = batch or 1
    attn_kind = str(rng.choice(["none", "bool", "float", "inf", "causal"]))
    causal = torch.ones(L, S, dtype=torch.bool).triu(1)
    shape = (B * heads, L, S) if maybe(0.5) else (L, S)
    attn_mask = causal if attn_kind == "causal" else draw_mask(rng, attn_kind, shape)
    padding = draw_mask(rng, str(rng.choice(["none", "bool", "float", "inf"])), (S,) if batch is None else (B, S))
    seen = 0 if attn_kind == "causal" else int(rng.integers(S))  # the one key that no mask hides: no row is empty
    for mask in (attn_mask, padding):
        if mask is not None:
            mask[..., seen] = 0
    # stock's is_causal is a hint about attn_mask, and its own fast route then hides the extra keys: not comparable
    extras = settings["add_bias_kv"] or settings["add_zero_attn"]
    arguments = {
        "attn_mask": attn_mask,
        "key_padding_mask": padding,
        "is_causal": attn_kind == "causal" and not extras and maybe(0.5),
        "need_weights": maybe(0.5),
        "average_attn_weights": maybe(0.5),
    }
    return stock, settings, inputs, arguments


def unpacked_gradients(stock: nn.MultiheadAttention) -> dict[str, Tensor]:
    """The gradients of a stock layer under the names of ours."""
    if stock.in_proj_weight is not None:
        weights = stock.in_proj_weight.grad.chunk(3)
    else:
        weights = (stock.q_proj_weight.grad, stock.k_proj_weight.grad, stock.v_proj_weight.grad)
    named = {f"{p}_proj.weight": w for p, w in zip("qkv", weights, strict=True)}
    if stock.in_proj_bias is not None:
        named |= {f"{p}_proj.bias": b for p, b in zip("qkv", stock.in_proj_bias.grad.chunk(3), strict=True)}
    rest = {name: p.grad for name, p in stock.named_parameters() if "in_proj" not in name and "_proj_w" not in name}
    extra = {f"extra_{p}.weight": rest.pop(f"bias_{p}") for p in "kv" if f"bias_{p}" in rest}
    return named | extra | rest


@pytest.mark.parametrize("count", [100, pytest.param(500, marks=pytest.mark.slow)])
def test_standard_is_stock_attention(count: int, seed: int) -> None:
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        stock, settings, inputs, arguments = draw_stock(rng)
        mode = str(rng.choice(["train", "eval", "no_grad"]))
        note = f"seed [{seed}, {index}] {mode} {settings} {[tuple(x.shape) for x in inputs]} {arguments}"
        ours = ba.MultiheadAttention(stock.embed_dim, stock.num_heads, **settings, dtype=DOUBLE)
        ours.load_state_dict(stock.state_dict())
        results = []
        for module in (stock, ours):
            module.train(mode == "train")
            for x in inputs:
                x.grad = None
            with torch.set_grad_enabled(mode != "no_grad"), warnings.catch_warnings():
                if module is stock:  # it warns of masks of two kinds, and of its own nested tensors
                    warnings.simplefilter("ignore")
                output, weights = module(*inputs, **arguments)
            if mode != "no_grad":
                upstream = normal(np.random.default_rng(seed), *output.shape)
                loss = (output * upstream).sum()
                if weights is not None:
                    loss = loss + (weights * normal(np.random.default_rng(seed), *weights.shape)).sum()
                loss.backward()
            results.append((output, weights, [x.grad for x in inputs]))
        (expected, expected_weights, expected_grads), (output, weights, grads) = results
        assert_close(output, expected, note)
        assert (weights is None) == (expected_weights is None), note
        if weights is not None:
            assert_close(weights, expected_weights, f"weights, {note}")
        if mode == "no_grad":
            continue
        for name, actual, reference in zip(("query", "key", "value"), grads, expected_grads, strict=True):
            assert_close(actual, reference, f"gradient of {name}, {note}", vacuous=True)
        named = {name: p.grad for name, p in ours.named_parameters()}
        reference_named = unpacked_gradients(stock)
        assert named.keys() == reference_named.keys(), note
        for name, reference in reference_named.items():
            assert_close(named[name], reference, f"gradient of {name}, {note}", vacuous=True)


# --- implementations against each other


def reference_first(impls: Sequence[str]) -> list[str]:
    """The yardstick, then the others."""
    return ["reference", *(impl for impl in impls if impl != "reference")]


@contextmanager
def poisoned() -> Iterator[None]:
    """Fills every uninitialised allocation with NaN, so that a number nobody wrote cannot go unnoticed."""
    before = torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def functional_mask(rng: np.random.Generator, kind: str, B: int, N: int, L: int, S: int) -> Tensor | None:
    """A mask in SDPA's sense: True = attend, or added. Key 0 stays visible but for "empty rows"."""
    visible = torch.from_numpy(rng.random((B, N, L, S)) < 0.6)
    visible[..., 0] = True
    bias = normal(rng, B, N, L, S)
    if kind == "empty rows":
        visible[:, :, L // 2] = False
        visible[0, :, -1] = False
    return {
        "none": None,
        "bool (L, S)": visible[0, 0],
        "bool (B, 1, 1, S)": visible[:, :1, :1],
        "bool (N, L, S)": visible[0],
        "float (L, S)": bias[0, 0],
        "float (1, N, L, S)": bias[:1],
        "float -inf (B, N, L, S)": bias.masked_fill(~visible, -torch.inf),
        "float finfo.min (B, 1, L, S)": bias[:, :1].masked_fill(~visible[:, :1], torch.finfo(DOUBLE).min),
        "empty rows": visible,
    }[kind]


def as_oracle_masks(mask: Tensor | None, shape: tuple[int, ...], score: str) -> dict[str, np.ndarray | None]:
    if mask is None:
        return {}
    if mask.dtype == torch.bool:
        return {"keep": np.broadcast_to(mask.numpy(), shape)}
    values = np.broadcast_to(mask.detach().numpy(), shape)
    floor = torch.finfo(mask.dtype).min if score == "expressive" else -np.inf
    return {"keep": values > floor, "bias": np.where(values > floor, values, 0)}


MASKS = [
    "none",
    "bool (L, S)",
    "bool (B, 1, 1, S)",
    "bool (N, L, S)",
    "float (L, S)",
    "float (1, N, L, S)",
    "float -inf (B, N, L, S)",
    "float finfo.min (B, 1, L, S)",
    "empty rows",
]


def check_implementations(
    rng: np.random.Generator,
    score: str,
    mask_kind: str,
    *,
    sizes: tuple[int, int, int, int] = (2, 6, 13, 17),
    groups: int = 1,
    causal: bool = False,
    scale: float | None = None,
    learned_bias: bool = False,
) -> None:
    """Every implementation of the score, against the oracle and against the reference's gradients."""
    B, N, L, S = sizes
    H, Hv = 5, 7
    leaves = [
        normal(rng, B, n, s, w).requires_grad_() for n, s, w in ((N, L, H), (N // groups, S, H), (N // groups, S, Hv))
    ]
    mask = functional_mask(rng, mask_kind, B, N, L, S)
    if learned_bias:
        mask.requires_grad_()
        leaves.append(mask)
    call = {"score": score, "attn_mask": mask, "is_causal": causal, "scale": scale, "enable_gqa": groups > 1}
    exact, exact_weights = oracle.attention(
        *(array(x) for x in leaves[:3]),
        score=score,
        causal=causal,
        scale=scale,
        **as_oracle_masks(mask, (B, N, L, S), score),
    )
    upstream = normal(rng, B, N, L, Hv)
    chosen = ba.explain(*leaves[:3], **call).chosen
    assert chosen in computing(score)
    # SDPA may decline what would cost it a merged mask, or a mask that learns; nobody else may decline anything.
    may_decline = {"sdpa"} if learned_bias or (causal and mask is not None) else set()
    gradients: dict[str, tuple[Tensor, ...]] = {}
    for impl in reference_first(computing(score)):
        note = f"{impl} {score} {mask_kind} {sizes} groups={groups} causal={causal} scale={scale}"
        try:
            with poisoned():
                output = ba.attention(*leaves[:3], **call, impl=impl)
                gradients[impl] = torch.autograd.grad(output, leaves, upstream)
        except ValueError as error:
            if impl not in may_decline or f"impl={impl!r} cannot" not in str(error):
                raise
            continue
        assert_close(output, exact, note)
        for index, (actual, reference) in enumerate(zip(gradients[impl], gradients["reference"], strict=True)):
            assert_close(actual, reference, f"gradient {index}, {note}")
    same = ba.attention(*leaves[:3], **call, impl=chosen)
    assert torch.equal(ba.attention(*leaves[:3], **call), same), f"auto is not the {chosen} that explain named"
    for impl in set(IMPLS) - set(computing(score)):
        with pytest.raises(ValueError, match=impl):
            ba.attention(*leaves[:3], **call, impl=impl)
    output, weights = ba.attention(*leaves[:3], **call, need_weights=True)
    assert_close(output, exact, f"with weights, {score} {mask_kind}")
    assert_close(weights, exact_weights, f"weights, {score} {mask_kind}")
    # The reference's own gradients, against the formula that autograd differentiates.
    visible = torch.from_numpy(exact_weights.sum(-1) > 0)
    if bool(visible.all()):
        q, k, v = leaves[0], *(x.repeat_interleave(groups, 1) for x in leaves[1:3])
        boolean = mask is not None and mask.dtype == torch.bool
        triangle = torch.ones(L, S, dtype=torch.bool).tril() if causal else None
        keep = (mask & triangle if causal else mask) if boolean else triangle
        formula, _ = plain_attention(q, k, v, score=score, scale=scale, keep=keep, bias=None if boolean else mask)
        for index, (actual, reference) in enumerate(
            zip(gradients["reference"], torch.autograd.grad(formula, leaves, upstream), strict=True)
        ):
            assert_close(actual, reference, f"gradient {index} of the reference, {score} {mask_kind}")


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("score", SCORES)
def test_every_implementation(score: str, mask: str, rng: np.random.Generator) -> None:
    for causal, groups, scale in itertools.product((False, True), (1, 3), (None, -0.7)):
        check_implementations(rng, score, mask, causal=causal, groups=groups, scale=scale)


@pytest.mark.parametrize("sizes", [(1, 2, 211, 1031), (1, 2, 1031, 211), (3, 1, 1, 2053)], ids=str)
@pytest.mark.parametrize("score", SCORES)
def test_across_blocks(score: str, sizes: tuple[int, int, int, int], rng: np.random.Generator) -> None:
    """Lengths that no block size divides, long enough for several blocks."""
    for mask, causal in itertools.product(("none", "float -inf (B, N, L, S)"), (False, True)):
        if causal and sizes[2] == 1:
            continue  # one query that sees one key: its gradient is 0
        check_implementations(rng, score, mask, sizes=sizes, causal=causal)


@pytest.mark.parametrize("score", SCORES)
def test_gradient_of_a_bias(score: str, rng: np.random.Generator) -> None:
    check_implementations(rng, score, "float (1, N, L, S)", learned_bias=True)
    check_implementations(rng, score, "float (L, S)", learned_bias=True, causal=True)


@pytest.mark.parametrize("score", SCORES)
def test_weights_carry_gradients(score: str, rng: np.random.Generator) -> None:
    """A loss on the weights reaches query and key as in the formula."""
    q, k, v = (normal(rng, 2, 3, n, 5).requires_grad_() for n in (7, 11, 11))
    upstream = normal(rng, 2, 3, 7, 11)
    _, weights = ba.attention(q, k, v, score=score, need_weights=True)
    _, formula = plain_attention(q, k, v, score=score)
    actual, expected = (torch.autograd.grad(w, [q, k], upstream) for w in (weights, formula))
    for ours, theirs in zip(actual, expected, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("leading", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("score", SCORES)
def test_leading_dimensions(score: str, leading: tuple[int, ...], rng: np.random.Generator) -> None:
    q, k, v = normal(rng, *leading, 7, 5), normal(rng, *leading, 11, 5), normal(rng, *leading, 11, 13)
    lifted = (array(x).reshape((1,) * (4 - x.ndim) + tuple(x.shape)) for x in (q, k, v))
    exact = oracle.attention(*lifted, score=score)[0].reshape(*leading, 7, 13)
    for impl in computing(score):
        assert_close(ba.attention(q, k, v, score=score, impl=impl), exact, impl)


def check_low_precision_attention(
    rng: np.random.Generator, score: str, impl: str, dtype: torch.dtype, L: int, S: int, *, causal: bool
) -> None:
    leaves = [normal(rng, 2, 3, n, 19, dtype=dtype).requires_grad_() for n in (L, S, S)]
    doubles = [x.detach().to(DOUBLE).requires_grad_() for x in leaves]
    first = FEW if causal else 0
    upstream = normal(rng, 2, 3, L - first, 19, dtype=dtype)
    exact, _ = oracle.attention(*(array(x) for x in leaves), score=score, causal=causal)
    keep = torch.ones(L, S, dtype=torch.bool).tril() if causal else None
    formula, _ = plain_attention(*doubles, score=score, keep=keep)
    assert_close(formula, exact)
    output = ba.attention(*leaves, score=score, is_causal=causal, impl=impl)
    note = f"{impl} {score} {dtype} {L}x{S}"

    def results(output: Tensor, xs: list[Tensor]) -> list[Tensor]:
        rows = output[:, :, first:]
        return [rows, *torch.autograd.grad(rows, xs, upstream.to(output.dtype))]

    def draw() -> list[Tensor]:
        rounding = Rounding(rng, dtype, dtype)
        return results(rounded_attention(*doubles, score=score, keep=keep, rounding=rounding), doubles)

    true = [array(x) for x in results(formula, doubles)]
    for name, ours, theirs, error in zip(
        ("output", *SCORE_PATH[:2], "value"),
        results(output, leaves),
        true,
        expected_errors(draw, true),
        strict=True,
    ):
        what = note if name == "output" else f"gradient of {name}, {note}"
        vacuous = S == 1 and name in SCORE_PATH
        assert_within_rounding(ours, theirs, error, what, cap=name == "output", vacuous=vacuous)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("score", SCORES)
def test_implementations_agree_in_low_precision(
    score: str, impl: str, dtype: torch.dtype, rng: np.random.Generator
) -> None:
    if impl not in computing(score, dtype):
        with pytest.raises(ValueError, match=impl):
            ba.attention(*(torch.ones(1, 1, 2, 2, dtype=dtype),) * 3, score=score, impl=impl)
        return
    for L, S, causal in ((97, 101, False), (1, 239, False), (239, 1, False), (149, 151, True)):
        check_low_precision_attention(rng, score, impl, dtype, L, S, causal=causal)


@pytest.mark.parametrize("row", [row for row in ROWS if row != "any"])
def test_modules(row: str, rng: np.random.Generator) -> None:
    """The same layer built for each implementation: outputs and every gradient are the reference's."""
    E, N, B, L = 15, 3, 2, 7
    options = dict(ROWS[row])
    causal = options.get("align_causal", True)
    if ba.Mechanism.of(options["mechanism"]).aligned:
        options["max_len"] = 11
    score = ba.Mechanism.of(options["mechanism"]).score
    x = normal(rng, B, L, E)
    upstream = normal(rng, B, L, E)
    padding = torch.arange(L) >= torch.tensor([[7], [5]])
    reference = fill(ba.MultiheadAttention(E, N, **options, batch_first=True, dtype=DOUBLE, impl="reference"), rng)
    expected: list[Tensor] = []
    for impl in reference_first(IMPLS_AND_AUTO):
        if impl not in computing(score):
            with pytest.raises(ValueError, match=impl):
                ba.MultiheadAttention(E, N, **options, batch_first=True, dtype=DOUBLE, impl=impl)(
                    x, x, x, need_weights=False
                )
            continue
        module = ba.MultiheadAttention(E, N, **options, batch_first=True, dtype=DOUBLE, impl=impl)
        module.load_state_dict(reference.state_dict())
        y = x.clone().requires_grad_()
        with poisoned():
            output, _ = module(y, y, y, key_padding_mask=padding, is_causal=causal, need_weights=False)
            results = [output, *torch.autograd.grad(output, [y, *module.parameters()], upstream)]
        expected = expected or results
        for index, (actual, wanted) in enumerate(zip(results, expected, strict=True)):
            assert_close(actual, wanted, f"{row} {impl} result {index}", vacuous=index > 0)


def test_an_unknown_implementation_is_refused() -> None:
    x = torch.ones(1, 1, 2, 2)
    with pytest.raises(ValueError, match="fastest"):
        ba.attention(x, x, x, impl="fastest")


# --- extreme values

ALL_DTYPES = (DOUBLE, *LOW)


def check_extreme(
    q: Tensor, k: Tensor, v: Tensor, score: str, *, scale: float | None = None, causal: bool = False
) -> np.ndarray:
    """Every implementation against the oracle, within 1e-12 in float64 and the cap of the dtype otherwise."""
    exact, exact_weights = oracle.attention(*(array(x) for x in (q, k, v)), score=score, scale=scale, causal=causal)
    tolerance = CAPS.get(q.dtype, 1e-12)
    for impl in computing(score):
        output = ba.attention(q, k, v, score=score, scale=scale, is_causal=causal, impl=impl)
        assert_close(output, exact, f"{impl} {score} {q.dtype}", tolerance=tolerance)
    output, weights = ba.attention(q, k, v, score=score, scale=scale, is_causal=causal, need_weights=True)
    assert_close(output, exact, f"with weights {score} {q.dtype}", tolerance=tolerance)
    assert_close(weights, exact_weights, f"weights {score} {q.dtype}", tolerance=tolerance, vacuous=True)
    return exact_weights


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("score", SCORES)
class TestD6:
    """Extremes, each by every implementation and in every dtype."""

    def test_huge_scores(self, score: str, dtype: torch.dtype, rng: np.random.Generator) -> None:
        """Scores of ±1e4, whose exp and whose square overflow float16; the gradients stay finite."""
        signs = torch.from_numpy(rng.choice([-100.0, 100.0], size=(1, 2, 11, 1)))
        q = torch.full((1, 2, 3, 1), 100.0, dtype=dtype).requires_grad_()
        k, v = signs.to(dtype).requires_grad_(), normal(rng, 1, 2, 11, 5, dtype=dtype).requires_grad_()
        check_extreme(q, k, v, score, scale=1.0)
        for impl in computing(score):
            output = ba.attention(q, k, v, score=score, scale=1.0, impl=impl)
            for gradient in torch.autograd.grad(output, [q, k, v], torch.ones_like(output)):
                assert gradient.isfinite().all(), impl

    def test_equal_scores(self, score: str, dtype: torch.dtype, rng: np.random.Generator) -> None:
        """One key repeated: the mean of the values."""
        q = normal(rng, 1, 1, 2, 3, dtype=dtype)
        k = normal(rng, 1, 1, 1, 3, dtype=dtype).repeat(1, 1, 7, 1)
        v = normal(rng, 1, 1, 7, 5, dtype=dtype)
        weights = check_extreme(q, k, v, score)
        np.testing.assert_allclose(weights, 1 / 7, rtol=1e-14)

    def test_one_hot(self, score: str, dtype: torch.dtype, rng: np.random.Generator) -> None:
        """One key takes all."""
        q, k = torch.tensor([10.0, 0.0]).expand(1, 1, 3, 2).to(dtype), torch.zeros(1, 1, 7, 2, dtype=dtype)
        k[..., 5, 0] = 10 if score == "expressive" else 1000
        k[..., :5, 1] = 3  # orthogonal to the query: its expressive weight is exactly 0
        v = normal(rng, 1, 1, 7, 5, dtype=dtype)
        weights = check_extreme(q, k, v, score, scale=1.0)
        assert weights[..., 5].min() == 1

    def test_denormals(self, score: str, dtype: torch.dtype, rng: np.random.Generator) -> None:
        """Queries and values below the smallest normal number: finite, and the value is not made up."""
        tiny = torch.finfo(dtype).smallest_normal / 4
        q = torch.full((1, 1, 2, 1), tiny, dtype=dtype)
        k, v = torch.ones(1, 1, 5, 1, dtype=dtype), normal(rng, 1, 1, 5, 3, dtype=dtype)
        for impl in computing(score):
            output = ba.attention(q, k, v, score=score, scale=1.0, impl=impl)
            mean = v.to(DOUBLE).mean(2, keepdim=True).expand(1, 1, 2, 3)
            # five equal scores: the mean; the expressive score may take a z that underflows for 0, a zero row
            if score == "expressive" and not output.any():
                continue
            assert_close(output, mean, impl, tolerance=CAPS.get(dtype, 1e-12))
            small = ba.attention(torch.ones_like(q), k, torch.full_like(v, tiny), score=score, impl=impl)
            assert (small.to(DOUBLE) - tiny).abs().max() <= tiny, impl

    def test_small_scores(self, score: str, dtype: torch.dtype, rng: np.random.Generator) -> None:
        """Scores whose square underflows the dtype: z² / (1 + z²) would be 0/0, its logarithm is not."""
        size = {DOUBLE: 1e-170, torch.float32: 1e-25, torch.bfloat16: 1e-25, torch.float16: 1e-4}[dtype]
        q = torch.full((1, 1, 2, 1), size, dtype=dtype)
        k = torch.tensor([1.0, -2.0, 0.0, 3.0]).reshape(1, 1, 4, 1).to(dtype)
        weights = check_extreme(q, k, normal(rng, 1, 1, 4, 3, dtype=dtype), score, scale=1.0)
        expected = [1 / 14, 4 / 14, 0, 9 / 14] if score == "expressive" else [0.25] * 4
        np.testing.assert_allclose(weights[0, 0, 0], expected, rtol=1e-3, atol=1e-12)

    def test_length_one(self, score: str, dtype: torch.dtype, rng: np.random.Generator) -> None:
        """One key: its value, under a causal mask or not."""
        q, k, v = (normal(rng, 2, 3, 1, 5, dtype=dtype) for _ in range(3))
        for causal in (False, True):
            assert (check_extreme(q, k, v, score, causal=causal) == 1).all()

    def test_many_keys(self, score: str, dtype: torch.dtype, rng: np.random.Generator) -> None:
        q, k, v = (normal(rng, 1, 2, n, 5, dtype=dtype) for n in (3, 4096, 4096))
        weights = check_extreme(q, k, v + 0.5, score)
        assert (weights > 0).all()


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_expressive_bias_of_large_size(dtype: torch.dtype, rng: np.random.Generator) -> None:
    """Biases act on the logarithm of the weight: ±300 neither overflows nor empties a row, whatever the block order."""
    q, k, v = (normal(rng, 1, 2, n, 5, dtype=dtype) for n in (3, 11, 11))
    bias = torch.from_numpy(rng.choice([-300.0, 300.0], size=(2, 3, 11))).to(dtype)
    exact, exact_weights = oracle.attention(*(array(x) for x in (q, k, v)), score="expressive", bias=array(bias)[None])
    for impl in computing("expressive"):
        output = ba.attention(q, k, v, score="expressive", attn_mask=bias, impl=impl)
        assert_close(output, exact, impl, tolerance=CAPS.get(dtype, 1e-12))
    _, weights = ba.attention(q, k, v, score="expressive", attn_mask=bias, need_weights=True)
    assert_close(weights, exact_weights, tolerance=CAPS.get(dtype, 1e-12))


# ------------------------------------------------------------------------------------------- the rules of comparison


@pytest.mark.parametrize(
    ("actual", "reference"),
    [
        ([1.0, 2.0], [1.0, 2.0 + 3e-12]),
        ([float("nan"), 1.0], [float("nan"), 1.0]),
        ([float("inf"), 1.0], [1.0, 1.0]),
        ([0.0, 0.0], [0.0, 0.0]),
        ([1.0], [1.0, 1.0]),
    ],
    ids=["off", "both NaN", "infinite", "vacuous", "shape"],
)
def test_the_float64_rule_can_fail(actual: list[float], reference: list[float]) -> None:
    with pytest.raises(AssertionError):
        assert_close(np.array(actual), np.array(reference))


def test_the_rule_of_rounding_can_fail(rng: np.random.Generator) -> None:
    exact = rng.normal(size=(7, 11)) / 3
    (allowed,) = expected_errors(lambda: [Rounding(rng)(torch.from_numpy(exact), torch.float16)], [exact])
    good = torch.from_numpy(exact).to(torch.float16)
    assert_within_rounding(good, exact, allowed)
    one_bad = good.clone()
    one_bad[3, 5] += 0.01
    for bad in (one_bad, good + 2e-3, good * 1.01, good * torch.nan):
        with pytest.raises(AssertionError):
            assert_within_rounding(bad, exact, allowed)
