"""Both scores by PyTorch's FlexAttention, on CUDA devices: torch compiles the kernel, and nothing of it is ours.

The expressive weight z^2 / (1 + z^2) is a softmax weight of the score 2 log|z| - log(1 + z^2), exactly, so that one
``score_mod`` is all that it takes. What hides keys is a block mask, so that hidden tiles are skipped; biases are
captured. One program is compiled for each kind of call, for any length.

Sources: arXiv 2412.05496 (FlexAttention); arXiv 2407.18601 (expressive).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, lru_cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from better_attention.call.call import Call, additive, compute_dtype
from better_attention.call.torch_private import transformed
from better_attention.call.torch_state import operator_obstacles
from better_attention.scores import SCORES

SOFTMAX, EXPRESSIVE = "softmax", "expressive"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
NARROWEST = 16
"""The narrowest head that FlexAttention's kernels take."""
PROGRAMS = 64
"""Kinds of calls that may each have a program; torch's own limit of 8 is meant for programs that should be one."""

Score = Callable[..., Tensor]
"""From a score and its place (b, h, q, k) to the log of its weight."""


def unsupported(call: Call) -> list[str]:
    """Why FlexAttention should not compute this call. On a CPU it has no derivative, and would hold all scores."""
    q_BNLH, reasons = call.q_BNLH, []
    if q_BNLH.device.type != "cuda":
        reasons.append(f"it is for CUDA devices, not {q_BNLH.device.type!r}")
    return reasons + inexpressible(call)


def inexpressible(call: Call) -> list[str]:
    """Why no FlexAttention, on whatever device, can compute this call."""
    q_BNLH, v_BNSH, reasons = call.q_BNLH, call.v_BNSH, []
    if call.score not in (SOFTMAX, EXPRESSIVE):
        reasons.append(f"its formulas are those of the scores {SOFTMAX}, {EXPRESSIVE}, not {call.score!r}")
    if q_BNLH.dtype not in DTYPES:
        reasons.append(f"it computes in float16, bfloat16 and float32, not {str(q_BNLH.dtype).removeprefix('torch.')}")
    if min(q_BNLH.shape[-1], v_BNSH.shape[-1]) < NARROWEST:
        reasons.append(f"it takes heads of width {NARROWEST} and above")
    if 0 in (*q_BNLH.shape, *call.k_BNSH.shape):
        reasons.append("it takes no empty tensors")
    if call.need_weights:
        reasons.append("it does not return weights")
    if call.dropout_p > 0.0:
        reasons.append("it has no dropout")
    if transformed():
        reasons.append("it has no rule for the transforms of torch.func")
    return reasons + operator_obstacles(call.tensors)


def compute(call: Call) -> tuple[Tensor, None]:
    """Head outputs (B, N, L, H)."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # Inside somebody's torch.compile the call becomes a part of their program.
    if torch.compiler.is_compiling():
        return attend(call, flex_attention, create_block_mask), None
    return attend(call, *_compiled()), None


def attend(call: Call, attention: Callable[..., Any], create_block_mask: Callable[..., Any]) -> Tensor:
    """The call by ``attention``, which is called as ``flex_attention`` is.

    Args:
        call: one that :func:`inexpressible` has nothing against.
        attention: the function, compiled or not; the tests pass one that runs on a CPU.
        create_block_mask: as in ``torch.nn.attention.flex_attention``.
    """
    output: Tensor = attention(
        call.q_BNLH,
        call.k_BNSH,
        call.v_BNSH,
        score_mod=score_of(call),
        block_mask=_block_mask(call, create_block_mask),
        scale=call.scale,
        enable_gqa=call.q_BNLH.shape[1] != call.k_BNSH.shape[1],
    )
    return output


@cache
def _compiled() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """FlexAttention and the making of block masks, compiled for lengths that are not fixed."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # An older torch has no such argument, and its limit of 8 for everything.
    more: dict[str, Any] = (
        {"recompile_limit": PROGRAMS} if "recompile_limit" in signature(torch.compile).parameters else {}
    )
    return torch.compile(flex_attention, dynamic=True, **more), torch.compile(create_block_mask, dynamic=True, **more)


# --- scores -----------------------------------------------------------------------------------------------------------


def log_expressive(z: Tensor) -> Tensor:
    """log(z^2 / (1 + z^2)), -inf at 0, without overflow for any z, and with a finite derivative wherever it has one."""
    size = z.abs()
    near, nothing = size <= 1.0, size == 0.0
    # Both branches are differentiated, and the one not taken must not be infinite: 0 * inf would be NaN.
    small = torch.where(near & ~nothing, size, 1.0)
    large = torch.where(near, 1.0, size)
    inverse = 1.0 / large
    log_weight = torch.where(near, 2.0 * small.log() - (small * small).log1p(), -(inverse * inverse).log1p())
    return torch.where(nothing, -math.inf, log_weight)


def score_of(call: Call) -> Score | None:
    """What becomes of a score before the softmax; None: nothing."""
    masks = [_at(mask, SCORES[call.score].hiding(mask.dtype)) for mask in call.masks if mask.dtype != torch.bool]
    expressive = call.score == EXPRESSIVE
    if not masks and not expressive:
        return None

    def modified(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        log_weight = log_expressive(score) if expressive else score
        for bias in masks:
            log_weight = log_weight + bias(b, h, q, k)
        return log_weight

    return modified


def _at(mask: Tensor, hides: float) -> Callable[..., Tensor]:
    """What a float mask adds at a place, -inf where it is ``hides`` or less."""
    if mask.dtype == torch.float64:
        mask = additive(mask.masked_fill(mask <= hides, -math.inf), torch.float32)
        hides = -math.inf
    B, N, L, S = (size > 1 for size in mask.shape)
    dtype = compute_dtype(mask.dtype)

    def bias(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        number = mask[b if B else 0, h if N else 0, q if L else 0, k if S else 0].to(dtype)
        return torch.where(number <= hides, -math.inf, number)

    return bias


# --- what hides keys --------------------------------------------------------------------------------------------------


def _block_mask(call: Call, create_block_mask: Callable[..., Any]) -> Any:
    """The block mask of a call; None where nothing is hidden but by float masks, which hide as they are read."""
    hiding = [mask for mask in call.masks if mask.dtype == torch.bool]
    (B, N, L, _), S, device = call.q_BNLH.shape, call.k_BNSH.shape[2], call.q_BNLH.device
    if not hiding and not call.causal:
        return None
    if not hiding and not torch.compiler.is_compiling():
        return _band_mask(create_block_mask, L, S, call.offset, call.window, device)
    batches = B if any(mask.shape[0] > 1 for mask in hiding) else None
    heads = N if any(mask.shape[1] > 1 for mask in hiding) else None
    return create_block_mask(_visible(call, hiding), batches, heads, L, S, device)


@lru_cache(maxsize=64)
def _band_mask(
    create_block_mask: Callable[..., Any], L: int, S: int, offset: int, window: int | None, device: torch.device
) -> Any:
    """The block mask of a triangle or a window, which depends on nothing else, and is made once."""
    return create_block_mask(_band(offset, window, device), None, None, L, S, device)


def _band(offset: int, window: int | None, device: torch.device) -> Score:
    # A tensor, and not a number, which would be a constant of the compiled program. Filling it waits for nothing.
    shift = torch.full((), offset, device=device)
    if window is None:
        return lambda b, h, q, k: k <= q + shift
    reach = torch.full((), window, device=device)
    return lambda b, h, q, k: (k <= q + shift) & (k > q + shift - reach)


def _visible(call: Call, hiding: list[Tensor]) -> Score:
    """Whether a key is visible from a query."""
    shown = [_shown(mask) for mask in hiding]
    if call.causal:
        shown.append(_band(call.offset, call.window, call.q_BNLH.device))

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = shown[0](b, h, q, k)
        for one in shown[1:]:
            seen = seen & one(b, h, q, k)
        return seen

    return visible


def _shown(mask: Tensor) -> Score:
    B, N, L, S = (size > 1 for size in mask.shape)
    return lambda b, h, q, k: mask[b if B else 0, h if N else 0, q if L else 0, k if S else 0]
