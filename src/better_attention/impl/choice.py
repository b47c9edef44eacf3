"""Which implementation computes a call: the first of a short visible list that is not slow for it."""

from __future__ import annotations

from types import MappingProxyType

import torch

from better_attention.call.call import Call
from better_attention.call.torch_state import exporting, exporting_onnx, transformed

from . import IMPLEMENTATIONS

IMPLS = ("auto", *IMPLEMENTATIONS)

# Crossovers measured on CPUs, forward and backward (benchmarks/results): below them calls between Python and the
# implementation take longer than the arithmetic.
PLAIN = MappingProxyType({"softmax": 1 << 20, "expressive": 1 << 17})
"""Weights (B N L S) up to which the plain formula is taken where no compiled kernel serves, per score."""
SHORT = 32
"""Longest S at which it still beats PyTorch's fused softmax attention (it also has derivatives of every order)."""
HEADS = 32
"""Heads (B N) from which the compiled kernels beat PyTorch's fused softmax attention at any length."""
WORK = 1 << 20
"""Multiplications for the scores (B N L S H) from which they do with fewer heads."""
WIDE = 128
"""Widest heads for which they do where a mask hides keys; a triangle costs them nothing."""
HALF, HALF_TRAINED = 128, 512
"""Longest S at which they do in bfloat16, in inference and in training; beyond, PyTorch has matrix instructions."""
DROPPED = 1 << 20
"""Weights of a head (L S) from which tiles are as fast under dropout as PyTorch, which then keeps every weight."""


def choose(call: Call, impl: str) -> str | None:
    """The implementation for a call, or None where the one asked for refuses it."""
    if impl != "auto":
        return None if IMPLEMENTATIONS[impl].unsupported(call) else impl
    if exporting():
        return next(name for name, i in IMPLEMENTATIONS.items() if not _tied(name) and not i.unsupported(call))
    choosy = call.q_BNLH.device.type == "cpu" and not torch.compiler.is_compiling()  # there, sizes may be symbols
    first = None
    for name, implementation in IMPLEMENTATIONS.items():  # the first that is not slow; small calls feel each question
        if not implementation.unsupported(call):
            if not (choosy and _slow(call, name)):
                return name
            first = first or name
    return first


def _tied(name: str) -> str | None:
    """Why an exported program should not hold an implementation unless it is asked for by name; None where it may."""
    if not IMPLEMENTATIONS[name].portable:
        return f"the exported program would need better-attention to run; impl={name!r} keeps it in all the same"
    if name == "sdpa" and exporting_onnx():
        return "in ONNX a query from which every key is hidden gets the mean of the values from it instead of zero"
    return None


def passed_over(chosen: str | None, name: str, impl: str) -> str:
    """Why an implementation that could compute a call is not the ``chosen`` one."""
    if impl != "auto":
        return f"impl={impl!r} was asked for"
    return (_tied(name) if exporting() else None) or f"{chosen!r} is faster or leaner here"


def _slow(call: Call, name: str) -> bool:
    """Whether something later in the order of implementations is faster on a CPU at these sizes."""
    (B, N, L, H), S = call.q_BNLH.shape, call.k_BNSH.shape[2]
    if name == "sdpa" and transformed():  # it has no rule for vmap, which then calls it slice by slice
        return True
    if name == "native":
        if call.score != "softmax" or IMPLEMENTATIONS["sdpa"].unsupported(call):
            return False
        if call.dropout_p > 0.0:  # torch draws a number for each weight, one by one, and keeps them all
            return False
        if call.q_BNLH.dtype == torch.bfloat16 and (HALF_TRAINED if _trains(call) else HALF) < S:
            return True
        if call.masks and H > WIDE:
            return True
        return B * N < HEADS and B * N * L * S * H < WORK
    if name == "sdpa" and call.dropout_p > 0.0 and L * S >= DROPPED:
        return True
    small = PLAIN[call.score] >= B * N * L * S and (call.score != "softmax" or S <= SHORT)
    return small and name != "reference"


def _trains(call: Call) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in (call.q_BNLH, call.k_BNSH, call.v_BNSH))


def refusal(call: Call, impl: str) -> str:
    """The message where ``impl`` cannot compute a call: what came, and every implementation's reasons."""
    lines = [f"impl={impl!r} cannot compute attention({summary(call)}):"]
    for name, implementation in IMPLEMENTATIONS.items():
        why = implementation.unsupported(call)
        lines.append(f"  {name}: {'; '.join(why) if why else 'can'}")
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
    parts += [f"dropout_p={call.dropout_p:g}"] * (call.dropout_p > 0.0)
    parts += ["need_weights=True"] * call.need_weights
    return ", ".join(parts)
