"""From a validated call to its result: the choice of an implementation, and its numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from better_attention.call.call import Call, band
from better_attention.call.torch_private import transformed
from better_attention.call.torch_state import (
    autocast_dtype,
    exporting,
    exporting_onnx,
    exporting_onnx_attention,
    is_known_finite,
    zero_rows,
)
from better_attention.scores import SCORES

from . import IMPLEMENTATIONS, native, sdpa

IMPLS = ("auto", *IMPLEMENTATIONS)

# --- where which implementation is slow -------------------------------------------------------------------------------
# Crossovers of forward plus backward, measured on CPUs (benchmarks/results). An implementation is slow where a call
# takes less time than the way to it from Python, or where PyTorch uses faster instructions.


class SmallCall(NamedTuple):
    """The largest call for which the reference is fastest, if the compiled kernels cannot compute it.

    Args:
        weights: number of weights, B N L S.
        length: number of keys, S, where PyTorch's fused attention is faster for more; None: any number.
    """

    weights: int
    length: int | None = None


SMALL_CALLS: Mapping[str, SmallCall] = MappingProxyType(
    {"softmax": SmallCall(1 << 20, length=32), "expressive": SmallCall(1 << 17)}
)
"""By score."""
UNMEASURED = SmallCall(1 << 17)
"""For scores that have not been measured: as for the expressive score, which is made of plain arithmetic, too."""

# The compiled kernels compared with PyTorch's fused attention, for calls that both can compute:
NATIVE_MIN_HEADS = 32
"""From this number of heads (B N) on, the compiled kernels are faster at any length."""
NATIVE_MIN_MULTIPLICATIONS = 1 << 20
"""With fewer heads, they are faster from this many multiplications of queries and keys (B N L S H) on."""
NATIVE_MAX_MASKED_HEAD_WIDTH = 128
"""Under a mask, they are slower for heads wider than this. The causal triangle costs them nothing."""
NATIVE_MAX_LENGTH_BF16 = 128
"""In bfloat16 they are slower for more keys than this, because PyTorch uses matrix instructions there."""
NATIVE_MAX_LENGTH_BF16_TRAINING = 512
"""The same where gradients are wanted."""
SDPA_MAX_WEIGHTS_UNDER_DROPOUT = 1 << 20
"""Under dropout PyTorch keeps every weight: from this many weights per head (L S) on, tiles are as fast."""

# On a GPU, by what has to be read (docs/gpu.md):
SPLIT_MAX_QUERIES = 16
"""Up to this number of queries of one head of keys, attention takes the time in which the keys are read."""
SPLIT_MIN_LENGTH = 1024
"""With fewer keys it takes the time of its launches."""


# --- the choice -------------------------------------------------------------------------------------------------------


def choose(call: Call, impl: str) -> str | None:
    """The name of the implementation that computes a call; None if ``impl`` names one that cannot."""
    if impl != "auto":
        return None if IMPLEMENTATIONS[impl].unsupported(call) else impl
    if exporting():
        fit = (name for name in IMPLEMENTATIONS if not _unfit_for_export(name))
        # There is always one: the reference is portable and refuses no call.
        return next(name for name in fit if not IMPLEMENTATIONS[name].unsupported(call))
    # torch.compile makes programs for many sizes; comparing their symbolic sizes would fix them to one.
    sizes_matter = not torch.compiler.is_compiling()
    # Take the first that is not slow. `unsupported` is evaluated lazily: for small calls its cost is measurable.
    for name, implementation in IMPLEMENTATIONS.items():
        if not implementation.unsupported(call) and not (sizes_matter and _slow(call, name)):
            break
    # At the latest the last one: the reference refuses no call and is never slow.
    return name


def _unfit_for_export(name: str) -> str | None:
    """Why ``impl="auto"`` keeps an implementation out of exported programs; None where it does not."""
    if not IMPLEMENTATIONS[name].portable:
        return f"the exported program would need better-attention to run; impl={name!r} exports it all the same"
    if name == "sdpa" and exporting_onnx() and not exporting_onnx_attention():
        return "in ONNX a query from which every key is hidden gets the mean of the values from it instead of zero"
    return None


def _slow(call: Call, name: str) -> bool:
    """Whether an implementation later in the list is faster at these sizes."""
    if call.q_BNLH.device.type != "cpu":
        return name == "sdpa" and _reads_twice(call)
    if name == "triton":  # on a CPU these kernels run in an interpreter, for tests
        return True
    if name == "native":
        return _native_is_slow(call)
    (B, N, L, _), S = call.q_BNLH.shape, call.k_BNSH.shape[2]
    if name == "sdpa":
        if transformed():  # it has no rule for vmap, which then calls it slice by slice
            return True
        if call.dropout_p > 0.0 and L * S >= SDPA_MAX_WEIGHTS_UNDER_DROPOUT:
            return True
    small = SMALL_CALLS.get(call.score, UNMEASURED)
    # The reference is last in the list: nothing behind it could be faster, so it never counts as slow.
    return name != "reference" and small.weights >= B * N * L * S and (small.length is None or small.length >= S)


def _reads_twice(call: Call) -> bool:
    """Whether a few queries read one tensor as key and as value, which our kernels read once."""
    (_, N, L, _), (_, G, S, _) = call.q_BNLH.shape, call.k_BNSH.shape
    few = N // max(1, G) * L <= SPLIT_MAX_QUERIES and S >= SPLIT_MIN_LENGTH
    return few and call.v_BNSH is call.k_BNSH and not IMPLEMENTATIONS["triton"].unsupported(call)


def _native_is_slow(call: Call) -> bool:
    """Whether PyTorch's fused attention can compute the call, too, and is faster than the compiled kernels."""
    # The score decides most calls; `unsupported`, whose cost is measurable for small ones, the rest.
    if call.score != sdpa.SCORE or IMPLEMENTATIONS["sdpa"].unsupported(call):
        return False
    # The others take keys that are repeated to the heads of values: in a decoder's step a copy as long as the cache.
    if call.k_BNSH.shape[1] != call.v_BNSH.shape[1] and native.decodes(call):
        return False
    if call.dropout_p > 0.0:  # PyTorch draws a random number for each weight, one by one, and keeps them all
        return False
    (B, N, L, H), S = call.q_BNLH.shape, call.k_BNSH.shape[2]
    if call.q_BNLH.dtype == torch.bfloat16 and _max_length_bf16(call) < S:
        return True
    if call.masks and H > NATIVE_MAX_MASKED_HEAD_WIDTH:
        return True
    return B * N < NATIVE_MIN_HEADS and B * N * L * S * H < NATIVE_MIN_MULTIPLICATIONS


def _max_length_bf16(call: Call) -> int:
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in (call.q_BNLH, call.k_BNSH, call.v_BNSH))
    return NATIVE_MAX_LENGTH_BF16_TRAINING if trains else NATIVE_MAX_LENGTH_BF16


# --- the choice in words ----------------------------------------------------------------------------------------------


def passed_over(chosen: str | None, name: str, impl: str) -> str:
    """Why an implementation that could compute a call is not the ``chosen`` one."""
    if impl != "auto":
        return f"impl={impl!r} was requested"
    return (_unfit_for_export(name) if exporting() else None) or f"{chosen!r} is faster or leaner here"


def refusal(call: Call, impl: str) -> str:
    """The message where ``impl`` cannot compute a call: what came, and every implementation's reasons."""
    lines = [f"impl={impl!r} cannot compute attention({summary(call)}):"]
    for name, implementation in IMPLEMENTATIONS.items():
        reasons = implementation.unsupported(call)
        lines.append(f"  {name}: {'; '.join(reasons) if reasons else 'can'}")
    return "\n".join([*lines, "Pass impl='auto', or the name of one that can."])


def summary(call: Call) -> str:
    """The call in one line."""
    parts = [f"{n} {tuple(x.shape)}" for n, x in (("q", call.q_BNLH), ("k", call.k_BNSH), ("v", call.v_BNSH))]
    parts.append(f"{str(call.q_BNLH.dtype).removeprefix('torch.')} on {call.q_BNLH.device.type}")
    parts.append(f"score={call.score!r}")
    for name, mask in (("mask", call.mask_BNLS), ("padding", call.padding_B11S)):
        if mask is not None:
            parts.append(f"{name}={str(mask.dtype).removeprefix('torch.')} {tuple(mask.shape)}")
    parts += ["is_causal=True"] * call.causal
    parts += [f"offset={call.offset}"] * (call.offset != 0)
    parts += [f"window={call.window}"] * (call.window is not None)
    parts += [f"dropout_p={call.dropout_p:g}"] * (call.dropout_p > 0.0)
    parts += ["need_weights=True"] * call.need_weights
    return ", ".join(parts)


# --- the result -------------------------------------------------------------------------------------------------------


def attend(call: Call, impl: str) -> tuple[Tensor, Tensor | None]:
    """Compute a validated call.

    Returns:
        Head outputs (B, N, L, H), and weights (B, N, L, S) if the call wants them, else None.

    Raises:
        ValueError: ``impl`` cannot compute the call.
    """
    call = call.trimmed()
    chosen = choose(call, impl)
    if chosen is None:
        raise ValueError(refusal(call, impl))
    with _without_autocast(call.q_BNLH.device.type):
        # The others take as many heads of keys as of values.
        call = call if chosen == "native" else call.with_even_heads()
        heads_BNLH, weights_BNLS = IMPLEMENTATIONS[chosen].compute(call)
        # One look at the output shows whether anything came through. Where nothing is hidden, every query sees every
        # key, so that NaN belongs in every row.
        if call.restricted and not is_known_finite(heads_BNLH):
            heads_BNLH, weights_BNLS = _keep_apart(call, chosen, heads_BNLH, weights_BNLS)
    return heads_BNLH, weights_BNLS if call.need_weights else None


def _without_autocast(device: str) -> AbstractContextManager[object]:
    """Disable autocast: inputs were already cast, and it would turn the float32 accumulation back into 16 bits."""
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device, enabled=False)


def _keep_apart(
    call: Call, chosen: str, heads_BNLH: Tensor, weights_BNLS: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Redo a call whose keys or values are not all finite, so that only queries that see those become NaN.

    A hidden key has weight 0, but 0 * NaN is NaN. The same implementation runs again with those keys and values
    zeroed, which leaves every other query bit for bit as with finite ones (without dropout, which draws again).
    """
    call = call.with_even_heads()
    bad_BNS = not_finite(call)
    # Then a query or an overflow brought the numbers, which belong to their own rows.
    if bad_BNS is None:
        return heads_BNLH, weights_BNLS
    clean = without(call, bad_BNS)
    # What rows that see a zeroed key compute does not matter: they become NaN below.
    heads_BNLH, weights_BNLS = IMPLEMENTATIONS[chosen].compute(clean)
    sees_bad_BNL1 = sees(call, bad_BNS)
    if weights_BNLS is not None:
        weights_BNLS = weights_BNLS.masked_fill(sees_bad_BNL1, math.nan)
    return heads_BNLH.masked_fill(sees_bad_BNL1, math.nan), weights_BNLS


def not_finite(call: Call) -> Tensor | None:
    """Which keys have numbers that are not finite, in key or value, (B, heads of keys, S); None if none has."""
    bad_BNS = ~(call.k_BNSH.isfinite().all(dim=-1) & call.v_BNSH.isfinite().all(dim=-1))
    return bad_BNS if bool(bad_BNS.any()) else None


def without(call: Call, keys_BNS: Tensor) -> Call:
    """The call with zeros for some keys and their values; one tensor that is both stays one."""
    k_BNSH = zero_rows(call.k_BNSH, keys_BNS)
    shared = call.v_BNSH is call.k_BNSH
    return replace(call, k_BNSH=k_BNSH, v_BNSH=k_BNSH if shared else zero_rows(call.v_BNSH, keys_BNS))


def sees(call: Call, keys_BNS: Tensor, rows: int = 256) -> Tensor:
    """Which queries may see any of the marked keys, (B, N, L, 1); a few rows at a time, to save memory."""
    (B, N, L, _), S = call.q_BNLH.shape, call.k_BNSH.shape[2]
    hides = SCORES[call.score].hides
    # Grouped queries: neighbouring query heads share a key head.
    keys_BNS = keys_BNS.repeat_interleave(N // max(1, keys_BNS.shape[1]), dim=1)
    parts = []
    for start in range(0, L, rows):
        stop = min(L, start + rows)
        seen = keys_BNS[:, :, None, :]
        for mask in call.masks:
            cut = mask[:, :, start:stop] if mask.shape[2] > 1 else mask
            seen = seen & ~hides(cut)
        if call.causal:
            places = torch.arange(start, stop, device=seen.device) + call.offset
            seen = seen & band(places, torch.arange(S, device=seen.device), call.window)
        # Expanded, because without a mask per query `seen` has a single row for all of them.
        parts.append(seen.any(dim=-1, keepdim=True).expand(B, N, stop - start, 1))
    return torch.cat(parts, dim=2)
