"""The suite "generation": a step of a language model that has read a long text, against the same through SDPA.

A step reads one token of each sequence, with what the model remembers of the tokens before, and gives the logits of the
next one. The model is the lab's (RMSNorm, SwiGLU, tied embeddings); one over the time of a step is its tokens a second.
The memory is filled with random numbers instead of a text, which costs the same. In float32 alone; some caches are
in int8, and the truth about those reads the same rounded numbers.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from types import FunctionType

import torch
from torch import Tensor
from torch.nn import functional as F

import better_attention as ba
from better_attention.bench.decode_caches import GROUP
from better_attention.bench.registry import Contender, Results, Row, Run, Shape, Suite, Work, here, normal
from better_attention.cache.int8 import row_bytes
from better_attention.lab.models.language_model import LanguageModel
from better_attention.layer.multihead import MultiheadAttention
from better_attention.positions import rotary

LAYERS, VOCABULARY = 4, 512
BASELINE = "standard through SDPA"
LARGEST_W_A = 2**28
"""Bytes of W_A in one layer, from which on super attention is left out."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What makes a contender.

    Args:
        mechanism: of the model.
        group: query heads that share one of keys and values.
        sdpa: written by hand around ``F.scaled_dot_product_attention``.
        int8: whether its cache is.
        compiled: whether torch.compile made a program of the step.
    """

    mechanism: str
    group: int = 1
    sdpa: bool = False
    int8: bool = False
    compiled: bool = False


KINDS: Mapping[str, Kind] = {
    BASELINE: Kind("standard", sdpa=True),
    **{mechanism: Kind(mechanism) for mechanism in ba.MECHANISMS},
    f"{BASELINE}, grouped": Kind("standard", GROUP, sdpa=True),
    "standard, grouped": Kind("standard", GROUP),
    "standard, int8 cache": Kind("standard", int8=True),
    "efficient, int8 cache": Kind("efficient", int8=True),
    f"{BASELINE}, compiled": Kind("standard", sdpa=True, compiled=True),
    "efficient, compiled": Kind("efficient", compiled=True),
    "efficient, int8 cache, compiled": Kind("efficient", int8=True, compiled=True),
}


def remembered(model: LanguageModel, row: Row, *, int8: bool = False, double: bool = False) -> ba.ModelCache:
    """A cache after as many tokens as the row says, the same numbers in every run and for every layout.

    Args:
        model: the model.
        row: batch, tokens and width.
        int8: in codes.
        double: numbers in float64.
    """
    B, S, D, _ = row.shape
    cache = ba.ModelCache(model, B, max_len=S + 1, dtype=torch.int8 if int8 else None)
    for number, layer in enumerate(_layers(model)):
        held = cache[layer]
        for i, (stream, heads) in enumerate(zip(held.streams, layer.cache_heads, strict=True)):
            x_BSD = normal(2 * number + i, B, S, D, dtype=torch.float32)[..., : heads * layer.head_dim]
            held.write(stream, x_BSD.double() if double else x_BSD)
    for held in cache:
        held.commit(S)
    return cache


def _layers(model: LanguageModel) -> list[MultiheadAttention]:
    return [module for module in model.modules() if isinstance(module, MultiheadAttention)]


def contenders(row: Row) -> list[Contender]:
    """The standard model through SDPA, ours with each mechanism, and some with caches in int8 or compiled."""
    return [
        Contender(
            name,
            partial(_through_sdpa if kind.sdpa else _ours, row, kind),
            cache(partial(_truth, row, kind)),
            work(row, kind),
            partial(_why_not, row, kind),
            switch="compiled" if kind.compiled else "",
        )
        for name, kind in KINDS.items()
    ]


def work(row: Row, kind: Kind) -> Work:
    """Two operations for each weight and sequence, four for each number of a key; weights and caches are read once."""
    B, S, D, _ = row.shape
    with torch.device("meta"):
        model = _model(row, kind)
    # Of W_A and of learned positions a step reads the row of its token alone.
    rows = (".align.", "positions.")
    weights = sum(p[-1:].numel() if any(x in name for x in rows) else p.numel() for name, p in model.named_parameters())
    stored = sum(
        row_bytes(heads * layer.head_dim, heads) if kind.int8 else 4 * heads * layer.head_dim
        for layer in _layers(model)
        for heads in layer.cache_heads
    )
    return Work(flops=2.0 * B * weights + 4.0 * LAYERS * B * S * D, bytes=4.0 * weights + B * S * stored)


def _why_not(row: Row, kind: Kind) -> str | None:
    """Why a contender cannot be measured here."""
    if kind.compiled and shutil.which("c++") is None and shutil.which("g++") is None:
        return "torch.compile needs a C++ compiler: apt-get install g++"
    if row.shape.heads % kind.group:
        return f"{row.shape.heads} heads are no multiple of {kind.group}"
    size = 4 * (row.shape.length + 1) ** 2 * ba.Mechanism.of(kind.mechanism).aligned
    return f"W_A over all positions has {size / 2**30:.1f} GiB a layer" if size > LARGEST_W_A else None


def _model(row: Row, kind: Kind, impl: str = "auto") -> LanguageModel:
    """A model whose weights depend on the row alone, those that mechanisms share being the same."""
    _, S, D, N = row.shape
    sizes = {"vocabulary": VOCABULARY, "length": S + 1, "width": D, "layers": LAYERS, "heads": N}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(2)
        options = {"impl": impl, "num_kv_heads": N // kind.group if N % kind.group == 0 else N}
        model = LanguageModel(**sizes, positions=row.variant, mechanism=kind.mechanism, options=options)
    return model.eval().requires_grad_(False)


def _token(row: Row) -> Tensor:
    return torch.arange(row.shape.batch)[:, None] % VOCABULARY


def _ours(row: Row, kind: Kind) -> Run:
    model = _model(row, kind)
    memory, token = remembered(model, row, int8=kind.int8), _token(row)

    def logits() -> Tensor:
        output: Tensor = model(token, cache=memory, last=1)
        return output

    compute = _compiled(logits) if kind.compiled else logits

    def step() -> Tensor:
        output = compute()
        memory.rewind(1)
        return output

    return here(step, lambda: {"output": step()}, grad=False, note=f"{memory.nbytes / 2**20:.0f} MiB of cache")


def _through_sdpa(row: Row, kind: Kind) -> Run:
    """The standard model as one writes it by hand: keys and values in memory that was allocated before."""
    model, token = _model(row, kind), _token(row)
    _, S, D, N = row.shape
    held = []
    for cached in remembered(model, row):
        pair = [F.pad(x.unflatten(2, (-1, D // N)).transpose(1, 2), (0, 0, 0, 1)) for x in cached.tensors]
        held.append(tuple(pair))

    def attend(layer: MultiheadAttention, x_B1D: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        maps = (layer.q_proj, layer.k_proj, layer.v_proj)
        q, k, v = (project(x_B1D).unflatten(2, (-1, D // N)).transpose(1, 2) for project in maps)
        if row.variant == "rotary":
            q, k = rotary(q, offset=S), rotary(k, offset=S)
        keys[:, :, S:], values[:, :, S:] = k, v
        heads = F.scaled_dot_product_attention(q, keys, values, enable_gqa=kind.group > 1)
        output: Tensor = layer.out_proj(heads.transpose(1, 2).flatten(2))
        return output

    def step() -> Tensor:
        x = model.tokens(token)
        if model.positions is not None:
            x = x + model.positions.weight[S]
        for block, (keys, values) in zip(model.blocks, held, strict=True):
            x = x + attend(block.attention, block.norm1(x), keys, values)  # type: ignore[arg-type, operator]
            x = x + block.mlp(block.norm2(x))  # type: ignore[operator]
        return F.linear(model.norm(x), model.tokens.weight)

    compute = _compiled(step) if kind.compiled else step
    bytes_ = sum(x.nbytes for pair in held for x in pair)
    return here(compute, lambda: {"output": compute()}, grad=False, note=f"{bytes_ / 2**20:.0f} MiB of cache")


def _compiled(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A program of ``step`` that shares nothing with those of other rows and contenders."""
    # torch.compile counts and looks up programs by the code of a function, which all rows have in common.
    assert isinstance(step, FunctionType)  # noqa: S101 - for the type checker
    own = FunctionType(step.__code__.replace(), step.__globals__, closure=step.__closure__)
    program: Callable[[], Tensor] = torch.compile(own, dynamic=False)
    return program


def _truth(row: Row, kind: Kind) -> Results:
    """The same in float64 by the reference."""
    model = _model(row, kind, "reference").double()
    with torch.no_grad():
        return {"output": model(_token(row), cache=remembered(model, row, int8=kind.int8, double=True), last=1)}


SUITE = Suite(
    "generation",
    "a step of a language model with a long text behind it, against the same through F.scaled_dot_product_attention",
    contenders,
    shapes=tuple(Shape(batch, tokens, 512, 8) for batch in (1, 8) for tokens in (4096, 16384)),
    quick=(Shape(1, 4096, 512, 8),),
    variants=("rotary", "learned"),
    modes=("inference",),
    rates="read",
    # Rounding adds up over the layers beyond any gate for bfloat16; rotary positions turn pairs of features.
    fits=lambda row: row.dtype == torch.float32 and (row.variant != "rotary" or row.shape.head_width % 2 == 0),
)
