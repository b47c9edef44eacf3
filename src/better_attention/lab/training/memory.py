"""The most memory that each process of a training has used."""

from __future__ import annotations

import sys

import torch
from accelerate import Accelerator


def peak(device: torch.device) -> int:
    """The most bytes that this process has used: on a CUDA device there, else in the machine's memory; 0: unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024  # Linux counts KiB


def peaks(accelerator: Accelerator) -> list[int]:
    """The peak of each process, in their order; all of them call this together."""
    here = torch.tensor([peak(accelerator.device)], dtype=torch.int64, device=accelerator.device)
    numbers: list[int] = accelerator.gather(here).tolist()
    return numbers
