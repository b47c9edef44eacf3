"""From one attention problem to the launches of kernels that compute it. Nothing here waits for the device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from better_attention.scores import SCORES
from better_attention.tensors import contiguous_rows, empty_heads

from . import blocks
from .blocks import Block
from .toolchain import INTERPRETER, Target, target_of

EXPRESSIVE, SOFTMAX = "expressive", "softmax"
COMPUTED = (SOFTMAX, EXPRESSIVE)
"""What the kernels compute."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_WIDTH = 256
FEW = 16
"""Queries of one head of keys that count as decoding: the smallest tile of a matrix product."""
FEW_KEYS = 256
"""With fewer keys there is nothing to split."""

FAINT = 1e-24
"""Below this total of expressive weights their squares have lost digits, and the row is computed again."""
FAINT_FLOAT16 = 2.0**-27
"""The same per key in float16, in which weights are multiplied with values."""
PRECISIONS = {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}
"""How products of float32 are taken, by ``torch.get_float32_matmul_precision()``; tf32x3 has about 21 bits."""


PLAIN, CAREFUL = 0, 1
"""Which rows a kernel computes: as in ``kernels/backward.py``."""


class Problem(NamedTuple):
    """One attention call.

    Args:
        q: (B, N, L, H).
        k: (B, G, S, H), N a multiple of G.
        v: (B, G, S, W); None: k serves as v.
        mask: broadcastable to (B, N, L, S): bool (True = attend), or a number added to log weights.
        padding: (B, 1, 1, S), the same for whole keys.
        seed: the number from which follows what dropout drops, and the places of the samples in the whole batch: of the
            first one, and the distance between two.
        causal, offset, window, score, scale, dropout_p: as in :class:`better_attention.call.call.Call`.
    """

    q: Tensor
    k: Tensor
    v: Tensor | None
    mask: Tensor | None
    padding: Tensor | None
    seed: tuple[int, int, int] | None
    causal: bool
    offset: int
    window: int | None
    score: str
    scale: float
    dropout_p: float

    @property
    def values(self) -> Tensor:
        """v, or k where it serves as v."""
        return self.k if self.v is None else self.v

    @property
    def expressive(self) -> bool:
        """Whether the score is the expressive one."""
        return self.score == EXPRESSIVE


@dataclass(frozen=True)
class Launch:
    """One kernel with everything it is called with.

    Args:
        kernel: its name in ``kernels/``.
        arguments: what it takes at run time, in order.
        constants: what it is compiled for; the sizes of its tiles among them.
        outer: the name of the constant that tuning may choose, and how many rows there are of what it cuts.
        alternatives: the ways to run it.
        programs: how many programs there are for one block of ``outer`` rows.
        parts: how many programs share one block.
        length_class: 1 where it is worth the time to tune.
    """

    kernel: str
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    alternatives: tuple[Block, ...]
    outer: str | None = None
    rows: int = 1
    programs: int = 1
    parts: int = 1
    length_class: int = 0

    def grid(self, outer: int) -> tuple[int, ...]:
        """How many programs there are, when each computes ``outer`` rows."""
        blocks_of_rows = -(-self.rows // outer) if self.outer else 1
        return (self.programs * blocks_of_rows, self.parts) if self.parts > 1 else (self.programs * blocks_of_rows,)


# --- the two directions -----------------------------------------------------------------------------------------------


def forward(p: Problem, target: Target | None = None) -> tuple[Tensor, Tensor]:
    """Output (B, N, L, W) in the memory order (B, L, N, W), and statistics of rows for the backward pass."""
    target = target or target_of(p.q.device)
    out, stats = empty_heads(p.q, p.values.shape[-1]), empty_statistics(p)
    if 0 in (*p.q.shape, *p.k.shape, *p.values.shape):
        return out.zero_(), stats.zero_()
    if _truncates(p, target):
        wide, stats = forward(_in_float32(p), target)
        return out.copy_(wide), stats
    for launch in forward_launches(p, out, stats, target):
        run(launch)
    return out, stats


def backward(
    grad: Tensor, p: Problem, out: Tensor, stats: Tensor, target: Target | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of q, k and v; where k serves as v, of both in the second one."""
    target = target or target_of(p.q.device)
    dq, dk = empty_heads(p.q), empty_heads(p.k)
    dv = None if p.v is None else empty_heads(p.v)
    if 0 in (*p.q.shape, *p.k.shape, *p.values.shape):
        return dq.zero_(), dk.zero_(), None if dv is None else dv.zero_()
    if _truncates(p, target):
        wide_q, wide_k, wide_v = backward(grad.float(), _in_float32(p), out.float(), stats, target)
        return dq.copy_(wide_q), dk.copy_(wide_k), None if dv is None or wide_v is None else dv.copy_(wide_v)
    for launch in backward_launches(grad, p, out, stats, dq, dk, dv, target):
        run(launch)
    return dq, dk, dv


def _truncates(p: Problem, target: Target) -> bool:
    """Whether numbers would be rounded wrongly: Triton's interpreter cuts bfloat16 off and computes with its bits."""
    return target.kind == INTERPRETER and p.q.dtype == torch.bfloat16


def _in_float32(p: Problem) -> Problem:
    return p._replace(q=p.q.float(), k=p.k.float(), v=None if p.v is None else p.v.float())


def empty_statistics(p: Problem) -> Tensor:
    """New statistics, float32, in the shape of :func:`statistics_shape`."""
    return p.q.new_empty(statistics_shape(p.q, p.score), dtype=torch.float32)


def statistics_shape(q: Tensor, score: str) -> tuple[int, int, int, int]:
    """(B, N, 3, L + 1) for the expressive score, (B, N, 1, L) for softmax."""
    B, N, L, _ = q.shape
    return (B, N, 3, L + 1) if score == EXPRESSIVE else (B, N, 1, L)


# --- which kernels, with what -----------------------------------------------------------------------------------------


def forward_launches(p: Problem, out: Tensor, stats: Tensor, target: Target) -> list[Launch]:
    """The launches of the forward pass: split over keys for a few queries, else one block of queries after another."""
    p = _materialised(p)
    (B, N, L, _), (_, G, S, _) = p.q.shape, p.k.shape
    if N // G * L <= FEW and S >= FEW_KEYS and p.dropout_p == 0.0:
        launches = _split_launches(p, out, stats, target)
    else:
        alternatives = _alternatives(blocks.FORWARD, p, target)
        constants = _constants(p, target, alternatives[0].inner)
        tensors, tma = _tiled(p, constants, target, ("k", "v"), alternatives[0].inner)
        constants |= {"TMA": tma}
        arguments = {
            "q_x": p.q, "k_x": tensors["k"], "v_x": tensors["v"], **_masks(p), "out_x": out, "stats_x": stats,
            **_strides(p), **_steps("o", "bnl", out), "N": N, "L": L, "S": S, "offset": p.offset,
            "window": p.window or 0, "factor": _factor(p), "kept": _kept(p), **_dropout(p),
        }  # fmt: skip
        launches = [
            Launch(
                "forward_kernel", arguments, constants, alternatives, "BM", rows=L, programs=B * N,
                length_class=int(L >= blocks.LENGTH_TO_TUNE),
            )
        ]  # fmt: skip
    if p.expressive:
        launches.append(_careful_launch(p, out, stats))
    return launches


def _split_launches(p: Problem, out: Tensor, stats: Tensor, target: Target) -> list[Launch]:
    """A few queries: a share of the keys for each program, enough programs for all processors."""
    (B, N, L, _), (_, G, S, _) = p.q.shape, p.k.shape
    alternatives = _alternatives(blocks.DECODE, p, target)
    (BM, BN, _, _) = alternatives[0]
    tiles = -(-S // BN)
    parts = max(1, min(tiles, 2 * target.processors // max(1, B * G)))
    share = -(-tiles // parts) * BN
    parts = -(-S // share)
    constants = _constants(p, target, BN) | {"BM": BM}
    # Its rows are those of all heads of a group, so that a mask of each head is a mask of each row.
    constants["MASK_PER_QUERY"] = p.mask is not None and (p.mask.shape[2] > 1 or p.mask.shape[1] > 1)
    lifted, group, w, w_p = (constants[name] for name in ("LIFTED", "GROUP", "W", "W_P"))
    sums = p.q.new_empty((B * G, parts, BM, w_p), dtype=torch.float32)
    totals = p.q.new_empty((B * G, parts, 2, BM), dtype=torch.float32)
    arguments = {
        "q_x": p.q, "k_x": p.k, "v_x": p.values, **_masks(p), "sums_x": sums, "totals_x": totals, **_strides(p), "G": G,
        "L": L, "S": S, "offset": p.offset, "window": p.window or 0, "factor": _factor(p), "share": share,
    }  # fmt: skip
    constants.pop("DROPOUT")
    split = Launch("split_kernel", arguments, constants, alternatives, programs=B * G, parts=parts)
    together = {
        "sums_x": sums, "totals_x": totals, "out_x": out, "stats_x": stats, **_steps("o", "bnl", out), "G": G, "N": N,
        "L": L, "parts": parts, "kept": 1.0,
    }  # fmt: skip
    floats = any(m is not None and m.dtype != torch.bool for m in (p.mask, p.padding))
    fixed = {
        "EXPRESSIVE": p.expressive, "EXPONENT": floats or not p.expressive, "GROUP": group, "W": w, "W_P": w_p,
        "BM": BM, "LIFTED": lifted,
    }  # fmt: skip
    return [split, Launch("combine_kernel", together, fixed, (Block(BM, BN, 4, 1),), programs=B * N)]


def _careful_launch(p: Problem, out: Tensor, stats: Tensor) -> Launch:
    (B, N, L, H), (_, G, S, _), W = p.q.shape, p.k.shape, p.values.shape[-1]
    block = blocks.CAREFUL[max(_padded(H), _padded(W))]
    arguments = {
        "q_x": p.q, "k_x": p.k, "v_x": p.values, **_masks(p), "out_x": out, "stats_x": stats, **_strides(p),
        **_steps("o", "bnl", out), "N": N, "L": L, "S": S, "offset": p.offset, "window": p.window or 0,
        "factor": _factor(p), "scale": p.scale, "steep": 1.0 / _faint(p), "kept": _kept(p), **_dropout(p),
    }  # fmt: skip
    constants = {
        **_restrictions(p), "DROPOUT": p.dropout_p > 0.0, "GROUP": N // G, "H": H, "W": W, "H_P": _padded(H),
        "W_P": _padded(W), "BN": block.inner, "LONG": _long(p),
    }  # fmt: skip
    return Launch("careful_kernel", arguments, constants, (block,), "BM", rows=L, programs=B * N)


def backward_launches(
    grad: Tensor, p: Problem, out: Tensor, stats: Tensor, dq: Tensor, dk: Tensor, dv: Tensor | None, target: Target
) -> list[Launch]:
    """The launches of the backward pass."""
    p, grad, out = _materialised(p), contiguous_rows(grad), contiguous_rows(out)
    (B, N, L, _), (_, G, S, _), W = p.q.shape, p.k.shape, p.values.shape[-1]
    share = p.q.new_empty((B, N, L), dtype=torch.float32)
    shares = {
        "out_x": out, "grad_x": grad, "share_x": share, **_steps("o", "bnl", out), **_steps("d", "bnl", grad), "N": N,
        "L": L,
    }  # fmt: skip
    launches = [
        Launch("share_kernel", shares, {"W": W, "W_P": _padded(W)}, (Block(64, 1, 4, 1),), "BM", rows=L, programs=B * N)
    ]
    common = {
        "L": L, "S": S, "offset": p.offset, "window": p.window or 0, "factor": _factor(p), "scale": p.scale,
        "kept": _kept(p), **_dropout(p),
    }  # fmt: skip
    alternatives = _alternatives(blocks.QUERY_GRADIENT, p, target)
    constants = _constants(p, target, alternatives[0].inner)
    tensors, tma = _tiled(p, constants, target, ("k", "v"), alternatives[0].inner)
    arguments = {
        "q_x": p.q, "k_x": tensors["k"], "v_x": tensors["v"], **_masks(p), "grad_x": grad, "stats_x": stats,
        "share_x": share, "dq_x": dq, **_strides(p), **_steps("d", "bnl", grad), **_steps("r", "bnl", dq), "N": N,
        **common,
    }  # fmt: skip
    tune = int(min(L, S) >= blocks.LENGTH_TO_TUNE)
    launches.append(
        Launch(
            "query_gradient_kernel", arguments, _backwards(constants, tma, p), alternatives, "BM", rows=L,
            programs=B * N, length_class=tune,
        )
    )  # fmt: skip
    alternatives = _alternatives(blocks.KEY_GRADIENT, p, target)
    constants = _constants(p, target, alternatives[0].inner)
    constants["BM"] = constants.pop("BN")
    tensors, tma = _tiled(p, constants, target, ("q", "grad"), alternatives[0].inner, grad)
    arguments = {
        "q_x": tensors["q"], "k_x": p.k, "v_x": p.values, **_masks(p), "grad_x": tensors["grad"], "stats_x": stats,
        "share_x": share, "dk_x": dk, "dv_x": dk if dv is None else dv, **_strides(p), **_steps("d", "bnl", grad),
        **_steps("r", "bgs", dk), **_steps("t", "bgs", dk if dv is None else dv), "N": N, "G": G, **common,
    }  # fmt: skip
    launches.append(
        Launch(
            "key_gradient_kernel", arguments, _backwards(constants, tma, p) | {"WHICH": PLAIN}, alternatives, "BN",
            rows=S, programs=B * G, length_class=tune,
        )
    )  # fmt: skip
    if p.expressive:
        last = launches[-1]
        # The rows that careful.py computed add to what is there, nearly always nothing.
        which = {**last.constants, "WHICH": CAREFUL}
        launches.append(replace(last, constants=which, alternatives=alternatives[-1:]))
    return launches


def _backwards(constants: dict[str, Any], tma: bool, p: Problem) -> dict[str, Any]:
    """What the kernels of the backward pass are compiled for."""
    wide = p.expressive and p.q.dtype == torch.float16
    return {name: value for name, value in constants.items() if name != "LIFTED"} | {"TMA": tma, "WIDE": wide}


# --- arguments --------------------------------------------------------------------------------------------------------


def _materialised(p: Problem) -> Problem:
    """The same problem with contiguous rows, and with masks in formats that the kernels read."""
    q, k, v = contiguous_rows(p.q), contiguous_rows(p.k), None if p.v is None else contiguous_rows(p.v)
    return p._replace(q=q, k=k, v=v, mask=_readable(p, p.mask), padding=_readable(p, p.padding))


def _readable(p: Problem, mask: Tensor | None) -> Tensor | None:
    """A mask of float64 in float32, what is finite staying finite and what hides hiding."""
    if mask is None or mask.dtype != torch.float64:
        return mask
    hidden = SCORES[p.score].hides(mask)
    limits = torch.finfo(torch.float32)
    # The lowest number of float32 would hide: what is large but finite becomes the next one.
    lowest = limits.min * (1.0 - 2.0**-23)
    return mask.clamp(lowest, limits.max).to(torch.float32).masked_fill(hidden, -math.inf)


def _masks(p: Problem) -> dict[str, Any]:
    return {"mask_x": _bytes(p.mask), "padding_x": _bytes(p.padding)}


def _bytes(mask: Tensor | None) -> Tensor | None:
    # Triton reads a bool as one bit of a byte; as a byte it is what torch wrote.
    return mask.view(torch.uint8) if mask is not None and mask.dtype == torch.bool else mask


def _kind(mask: Tensor | None) -> int:
    return 0 if mask is None else 1 if mask.dtype == torch.bool else 2


def _hiding(p: Problem, mask: Tensor | None) -> float:
    """The number at and below which a float mask hides keys; -inf for other masks."""
    return -math.inf if mask is None or _kind(mask) < 2 else SCORES[p.score].hiding(mask.dtype)


def _restrictions(p: Problem) -> dict[str, Any]:
    return {
        "CAUSAL": p.causal,
        "WINDOW": p.window is not None,
        "MASK": _kind(p.mask),
        "MASK_LOWEST": _hiding(p, p.mask),
        "MASK_PER_QUERY": p.mask is not None and p.mask.shape[2] > 1,
        "PADDING": _kind(p.padding),
        "PADDING_LOWEST": _hiding(p, p.padding),
    }


def _constants(p: Problem, target: Target, inner: int) -> dict[str, Any]:
    """What all kernels over tiles are compiled for, but for the tiles that tuning chooses."""
    (_, N, _, H), G, W, dtype = p.q.shape, p.k.shape[1], p.values.shape[-1], p.q.dtype
    return {
        "EXPRESSIVE": p.expressive,
        "SHARED": p.v is None,
        **_restrictions(p),
        "DROPOUT": p.dropout_p > 0.0,
        "GROUP": N // G,
        "H": H,
        "W": W,
        "H_P": _padded(H),
        "W_P": _padded(W),
        "BN": inner,
        "LIFTED": p.expressive and dtype == torch.float16,
        "PRECISION": PRECISIONS[torch.get_float32_matmul_precision()] if dtype == torch.float32 else "ieee",
        "FAST": target.kind == "cuda",
        "LONG": _long(p),
    }


def _tiled(
    p: Problem,
    constants: Mapping[str, Any],
    target: Target,
    names: tuple[str, str],
    rows: int,
    grad: Tensor | None = None,
) -> tuple[dict[str, Any], bool]:
    """The two tensors that a kernel reads tile by tile: as descriptors where the device copies by descriptor."""
    tensors = {"q": p.q, "k": p.k, "v": p.values, "grad": grad}
    chosen = {name: tensors[name] for name in names}
    if not target.descriptors or not all(_describable(x) for x in chosen.values()):
        return chosen, False
    from triton.tools.tensor_descriptor import TensorDescriptor

    widths = (constants["H_P"], constants["W_P"])
    return {
        name: TensorDescriptor.from_tensor(x, [1, 1, rows, width])
        for (name, x), width in zip(chosen.items(), widths, strict=True)
    }, True


def _describable(x: Tensor | None) -> bool:
    """Whether a descriptor can say where ``x`` lies: in units of 16 bytes, and in no more than 2^31 rows."""
    assert x is not None  # noqa: S101 - for the type checker
    size = x.element_size()
    # A dimension of size 1 may have any stride, which the descriptor would hold to the same rule.
    steps = (step for step, length in zip(x.stride()[:-1], x.shape[:-1], strict=True) if length > 1)
    aligned = x.data_ptr() % 16 == 0 and all(step > 0 and step * size % 16 == 0 for step in steps)
    return aligned and all(step * size % 16 == 0 for step in x.stride()[:-1]) and x.stride(-1) == 1


def _strides(p: Problem) -> dict[str, int]:
    mask = [0, 0, 0, 0] if p.mask is None else _mask_steps(p.mask)
    padding = [0, 0, 0, 0] if p.padding is None else _mask_steps(p.padding)
    return {
        **_steps("q", "bnl", p.q), **_steps("k", "bgs", p.k), **_steps("v", "bgs", p.values),
        **{f"m_{letter}": step for letter, step in zip("bnls", mask, strict=True)},
        "p_b": padding[0], "p_s": padding[3],
    }  # fmt: skip


def _steps(name: str, letters: str, x: Tensor) -> dict[str, int]:
    return {f"{name}_{letter}": step for letter, step in zip(letters, x.stride()[:-1], strict=True)}


def _mask_steps(mask: Tensor) -> list[int]:
    """Strides of a mask, 0 where it broadcasts."""
    return [0 if size == 1 else step for size, step in zip(mask.shape, mask.stride(), strict=True)]


def _long(p: Problem) -> bool:
    """Whether a head spans more elements than 32 bits count."""
    return any(x.shape[2] * abs(x.stride(2)) >= 2**31 for x in (p.q, p.k, p.values))


def _padded(width: int) -> int:
    """A power of two that a matrix product can take."""
    return max(16, 1 << (width - 1).bit_length())


def _alternatives(table: dict[int, blocks.Table], p: Problem, target: Target) -> tuple[Block, ...]:
    if target.kind == INTERPRETER:
        return blocks.INTERPRETED
    return table[p.q.element_size()][max(_padded(p.q.shape[-1]), _padded(p.values.shape[-1]))]


def _factor(p: Problem) -> float:
    """scale log2(e) for softmax; 1 / scale^2 for the expressive score, bounded so that weights stay finite."""
    if not p.expressive:
        return p.scale * math.log2(math.e)
    square = p.scale * p.scale
    return min(max(1.0 / square if square > 0.0 else math.inf, 2.0**-120), 2.0**120)


def _faint(p: Problem) -> float:
    """The total below which an expressive row is computed again."""
    if p.q.dtype == torch.float16:
        return FAINT_FLOAT16 * p.k.shape[2]
    # A weight a is x^2 / c: for a small c, x^2 is smaller than a.
    return max(FAINT, 1e-29 / _factor(p))


def _kept(p: Problem) -> float:
    return 1.0 / (1.0 - p.dropout_p) if p.dropout_p < 1.0 else 0.0


def _dropout(p: Problem) -> dict[str, int]:
    below = int(p.dropout_p * 2.0**32) if p.dropout_p < 1.0 else 2**32 - 1
    seed, first, step = p.seed or (0, 0, 1)
    return {"seed": seed, "below": below, "batch_first": first, "batch_step": step}


# --- running ----------------------------------------------------------------------------------------------------------


def kernel(name: str) -> Any:
    """A kernel by name. Imports Triton at the first call."""
    from .kernels import backward as backward_kernels
    from .kernels import careful, decode
    from .kernels import forward as forward_kernels

    for module in (forward_kernels, backward_kernels, careful, decode):
        if hasattr(module, name):
            return getattr(module, name)
    raise KeyError(name)


def run(launch: Launch) -> None:
    """Start a kernel; return before it has run."""
    first = launch.alternatives[0]
    arguments = {**launch.arguments, **launch.constants}
    if launch.outer is None:
        _start(kernel(launch.kernel), launch.grid(1), arguments, first)
    elif len(launch.alternatives) == 1 or launch.length_class == 0:
        _start(kernel(launch.kernel), launch.grid(first.outer), arguments | {launch.outer: first.outer}, first)
    else:
        outer = launch.outer
        tuned = _tuned(launch.kernel, outer, launch.alternatives)
        tuned[lambda meta: launch.grid(meta[outer])](**arguments, enable_fp_fusion=True)


def _start(function: Any, grid: tuple[int, ...], arguments: Mapping[str, Any], block: Block) -> None:
    # Said, because Triton warns where it has to assume it: products and sums may be fused.
    function[grid](**arguments, num_warps=block.warps, num_stages=block.stages, enable_fp_fusion=True)


KEYS = ("EXPRESSIVE", "SHARED", "CAUSAL", "WINDOW", "MASK", "PADDING", "DROPOUT", "H_P", "W_P", "TMA", "LONG")
"""What a tuned choice depends on, besides the dtypes."""


@cache
def _tuned(name: str, outer: str, alternatives: tuple[Block, ...]) -> Any:
    """A kernel that tries its alternatives at the first call of a kind, and keeps what it finds on disk.

    On disk, so that the next process takes the same one, and gets the same bits.
    """
    import triton

    configurations = [
        triton.Config({outer: block.outer}, num_warps=block.warps, num_stages=block.stages) for block in alternatives
    ]

    def prune(configs: list[Any], arguments: Mapping[str, Any], **constants: Any) -> list[Any]:
        """Leave out blocks of more rows than there are."""
        rows = {**arguments, **constants}["S" if outer == "BN" else "L"]
        return [config for config in configs if config.kwargs[outer] < 2 * rows] or configs[:1]

    return triton.autotune(
        configs=configurations, key=list(KEYS), prune_configs_by={"early_config_prune": prune}, cache_results=True
    )(kernel(name))
