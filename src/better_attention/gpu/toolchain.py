"""Whether Triton is there, what it would compile for, and why not."""

from __future__ import annotations

import importlib.util
import os
import sys
from functools import cache
from typing import NamedTuple

import torch

from better_attention.call.torch_private import constant_while_compiling

INTERPRETER = "interpreter"


class Target(NamedTuple):
    """What kernels are compiled for.

    Args:
        kind: "cuda", "hip", or "interpreter": Triton's own, which runs kernels in NumPy on the CPU.
        capability: ten times the compute capability of a CUDA device, such as 90; 0 elsewhere.
        processors: how many multiprocessors the device has.
        descriptors: whether tiles are copied by descriptor, by units that devices from 9.0 on have (TMA).
    """

    kind: str
    capability: int
    processors: int
    descriptors: bool = False


LOWEST_CAPABILITY = 80
"""The oldest CUDA devices that Triton compiles for."""


def missing(device: torch.device) -> str | None:
    """Why kernels cannot run on a device, in words; None where they can."""
    reason: str | None = _missing(device.type, device.index)
    return reason


@constant_while_compiling  # instead of tracing a search for files
def _missing(kind: str, index: int | None) -> str | None:
    if kind != "cuda" and not (kind == "cpu" and _interpreting()):
        return f"its kernels are for GPUs, not {kind!r}"
    if not _installed():
        return "Triton is not installed: pip install triton"
    return _unfit(index) if kind == "cuda" else None


def _interpreting() -> bool:
    """Whether Triton interprets kernels, or will: it asks for ``TRITON_INTERPRET`` when it is imported."""
    if "triton" not in sys.modules:
        return os.environ.get("TRITON_INTERPRET") == "1"
    import triton

    return bool(triton.knobs.runtime.interpret)


def target_of(device: torch.device) -> Target:
    """What to compile for, for tensors on a device that :func:`missing` has nothing against."""
    if device.type == "cpu":
        return Target(INTERPRETER, 0, 4)
    return _device_target(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _unfit(index: int | None) -> str | None:
    if torch.version.hip is not None:
        return None
    capability = _device_target(torch.cuda.current_device() if index is None else index).capability
    if capability < LOWEST_CAPABILITY:
        return f"Triton compiles for compute capability 8.0 and above, and this device has {capability / 10:.1f}"
    return None


@cache
def _device_target(index: int) -> Target:
    # Properties are known to the host: asking for them does not wait for the device.
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return Target("hip", 0, properties.multi_processor_count)
    capability = 10 * properties.major + properties.minor
    return Target("cuda", capability, properties.multi_processor_count, descriptors=capability >= 90)
