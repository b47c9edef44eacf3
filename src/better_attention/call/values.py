"""What Python may ask at run time: the values of tensors (in eager mode only), and what autocast would do."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def readable() -> bool:
    """Whether Python may look at values here: not while a graph is being traced."""
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing())  # type: ignore[attr-defined]


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype autocast would compute in on a device type, None where it is off or unknown (the meta device)."""
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def surely_finite(x: Tensor) -> bool:
    """False only if ``x`` is seen to hold NaN or infinity: one sum, on the CPU, in eager mode.

    On an accelerator reading a value would stall its queue, so there everything counts as finite.
    """
    if x.device.type != "cpu" or not readable():
        return True
    try:
        x = x.detach()
        # In another dtype the sum would convert all of x first. It may overflow where no number does: then look twice.
        wide = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
        return math.isfinite(x.sum(dtype=wide).item()) or bool(x.isfinite().all())
    except RuntimeError:  # no values to look at: fake tensors, vmap
        return True


def without(x: Tensor, rows: Tensor) -> Tensor:
    """``x`` with the marked rows (all but its last dimension) zeroed, in the same memory layout.

    The layout decides which kernel a matrix product takes, and with it the last bits of rows that are not marked.
    """
    return x.clone().masked_fill_(rows[..., None], 0.0)
