"""What torch is doing around a call, and what may be asked of tensors at the moment.

The compiled kernels read tensors by address. That is right for ordinary tensors in ordinary execution only: a tensor
can be lazy (a negation, a zero without memory), a wrapper (fake, functional, batched, distributed) or a dual number,
and tools that trace, count or replace operators have to see operators. Such calls go through the dispatcher or to
implementations made of torch's own operators; the functions that decide it are here. Names that are private in torch
are in :mod:`.torch_private`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .torch_private import (
    FAKE_TENSOR,
    constant_while_compiling,
    dispatch_keys,
    dispatch_modes,
    forward_level,
    function_modes,
    interpreter_stack,
    is_profiled,
    is_tracing,
    transformed,
)

# --- what can be known about tensors outside tracing --------------------------------------------------------------


def values_available() -> bool:
    """Whether Python may read the values of tensors: not while a graph is being traced."""
    return not (torch.compiler.is_compiling() or is_tracing())


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype autocast would compute in on a device type, None where it is off or unknown (the meta device)."""
    if device != "cpu" and not torch.amp.is_autocast_available(device):  # the CPU always has it: small calls feel it
        return None
    if not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def is_known_finite(x: Tensor) -> bool:
    """False only if ``x`` is seen to hold NaN or infinity: one sum, on the CPU, in eager mode.

    On an accelerator reading a value would stall its queue, so there everything counts as finite.
    """
    if x.device.type != "cpu" or not values_available():
        return True
    try:
        x = x.detach()
        # In another dtype the sum would convert all of x first. A finite sum may overflow: then look at each.
        wide = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
        return math.isfinite(x.sum(dtype=wide).item()) or bool(x.isfinite().all())
    except RuntimeError:  # no values to look at: fake tensors, vmap
        return True


def zero_rows(x: Tensor, rows: Tensor) -> Tensor:
    """``x`` with the marked rows (all but its last dimension) zeroed, in the same memory layout.

    The layout decides which kernel a matrix product takes, and with it the last bits of rows that are not marked.
    """
    return x.clone().masked_fill_(rows[..., None], 0.0)


# --- may memory be read by address? ------------------------------------------------------------------------------


def quiet() -> bool:
    """Whether nothing traces, transforms, observes or replaces operators at the moment."""
    return not (
        torch.compiler.is_compiling()
        or is_tracing()
        or dispatch_modes()
        or function_modes()
        or transformed()
        or forward_level()
        or is_profiled()
    )


def ordinary(*tensors: Tensor | None) -> bool:
    """Whether the kernels may read and write these tensors by address, here and now."""
    return quiet() and are_plain(*tensors)


_plain_keys: frozenset[int] = frozenset()


def are_plain(*tensors: Tensor | None) -> bool:
    """Whether these are materialised CPU memory and nothing else; to be asked only while :func:`quiet`.

    torch's dispatch keys say it completely: every lazy bit and every wrapper adds a key of its own, so a kind of tensor
    that does not exist yet is recognised as well.
    """
    plain = _plain_keys or _learn_plain_keys()
    for x in tensors:
        if x is None:
            continue
        if type(x) is not Tensor and type(x) is not nn.Parameter:
            return False
        keys = dispatch_keys(x)
        if keys is None or keys.raw_repr() not in plain:
            return False
    return True


def _learn_plain_keys() -> frozenset[int]:
    """The dispatch keys of ordinary CPU tensors, those made in inference mode included.

    Learnt from new tensors at the first use, and only while :func:`quiet`: a mode would hand out its own kind.
    """
    global _plain_keys
    plain = []
    for inference in (False, True):
        with torch.inference_mode(inference):
            keys = dispatch_keys(torch.empty(0, device="cpu"))
            plain.append(keys and keys.raw_repr())
    _plain_keys = frozenset(plain)
    return _plain_keys


def address(x: Tensor) -> int:
    """Where the memory of ``x`` starts.

    Raises:
        RuntimeError: it has none: its storage was freed under it, as sharded training does between uses.
    """
    pointer = x.data_ptr()
    if pointer == 0 and x.numel() > 0:
        raise RuntimeError(
            f"a tensor of shape {tuple(x.shape)} has no memory: its storage was resized to zero (sharded training does "
            "so between uses). Gather the parameters before the layer is called."
        )
    return pointer


# --- may our operators take part? --------------------------------------------------------------------------------


def exporting() -> bool:
    """Whether a program is being exported or traced: it should run where this package is not installed."""
    return torch.compiler.is_exporting() or recording()


def recording() -> bool:
    """Whether torch.jit.trace, or an exporter built on it, records operators. torch.compile cannot trace the call."""
    return not torch.compiler.is_compiling() and is_tracing()


def exporting_onnx() -> bool:
    """Whether it is being exported to ONNX, by either of torch's exporters."""
    return exporting() and _in_onnx_export()


@constant_while_compiling  # torch.compile takes torch's own function to be False, strict torch.export too
def _in_onnx_export() -> bool:
    return torch.onnx.is_in_onnx_export()


_onnx_attention = ContextVar("whether ONNX exports in progress may use the operator Attention", default=False)


@contextmanager
def onnx_attention_operator(there: bool) -> Iterator[None]:
    """Say, while the context lasts, whether exports to ONNX may use the operator ``Attention`` of opset 23."""
    token = _onnx_attention.set(there)
    try:
        yield
    finally:
        _onnx_attention.reset(token)


def exporting_onnx_attention() -> bool:
    """Whether a model is being exported to an ONNX opset that has the operator ``Attention``."""
    return exporting_onnx() and _has_onnx_attention()


@constant_while_compiling
def _has_onnx_attention() -> bool:
    return _onnx_attention.get()


def with_tangents(tensors: Mapping[str, Tensor | None]) -> list[str]:
    """The names of those that are dual numbers, or may be some below the wrappers of torch.func."""
    if not forward_level():
        return []
    hidden = transformed()
    return [
        name
        for name, x in tensors.items()
        if x is not None and (hidden or forward_ad.unpack_dual(x).tangent is not None)
    ]


def operator_obstacles(tensors: Mapping[str, Tensor | None]) -> list[str]:
    """Why no custom operator of ours can take these tensors here, in words; empty where one can.

    Args:
        tensors: by the name under which the user knows them.
    """
    obstacles = [] if quiet() else _machinery_obstacles(tensors)  # one look in the ordinary case: small calls feel it
    for name, x in tensors.items():
        if type(x) is not Tensor and type(x) is not nn.Parameter and x is not None and not isinstance(x, FAKE_TENSOR):
            obstacles.append(f"{name} is a {type(x).__name__}, whose own rules for operators do not cover custom ones")
    return obstacles


def _machinery_obstacles(tensors: Mapping[str, Tensor | None]) -> list[str]:
    """The part of :func:`operator_obstacles` that lies in what torch is doing."""
    obstacles = []
    if recording():
        obstacles.append("torch.jit.trace and the exporters built on it record torch's own operators only")
    elif exporting_onnx():
        obstacles.append("the ONNX exporter has no translation of custom operators")
    elif transformed():
        if torch.compiler.is_compiling():
            obstacles.append("torch.compile has no rule for it inside transforms of torch.func")
        elif _functionalised():
            obstacles.append("torch.func.functionalize has no rule for it")
    carrying = with_tangents(tensors)
    return obstacles + [f"it has no forward-mode derivative, and {name} carries a tangent" for name in carrying]


def _functionalised() -> bool:
    """Whether torch.func.functionalize is, or may be, among the transforms at work."""
    if interpreter_stack is None:
        return True
    return any("functionalize" in str(interpreter.key()).lower() for interpreter in interpreter_stack() or ())
