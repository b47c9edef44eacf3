"""What torch is doing around a call, and everything that this package asks of torch's private side.

The compiled kernels read tensors by address. That is right for ordinary tensors in ordinary execution only: a tensor
can be lazy (a negation, a zero without memory), a wrapper (fake, functional, batched, distributed) or a dual number,
and tools that trace, count or replace operators have to see operators. Such calls go through the dispatcher or to
implementations made of torch's own operators; the questions that decide it are here.

Where a version of torch lacks a private name, the careful answer is assumed: calls get slower, never wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

try:
    from torch._subclasses.fake_tensor import FakeTensor as _FAKE  # noqa: N814 - torch itself imports it
except ImportError:  # pragma: no cover - then fake tensors count as any other subclass
    _FAKE = ()  # type: ignore[assignment, misc]


def _private(name: str, careful: object) -> Callable[..., Any]:
    """The function of that dotted name below ``torch._C``, or one that gives the careful answer."""
    found: Any = torch._C
    for part in name.split("."):
        found = getattr(found, part, None)
    return found if callable(found) else lambda *_: careful


_dispatch_modes = _private("_len_torch_dispatch_stack", 1)
_function_modes = _private("_len_torch_function_stack", 1)
_profiled = _private("_autograd._profiler_enabled", True)
_keys = _private("_dispatch_keys", None)
_tracing: Callable[[], bool] = getattr(torch._C, "_is_tracing", torch.jit.is_tracing)  # type: ignore[attr-defined]

transformed: Callable[[], bool] = _private("_are_functorch_transforms_active", True)
"""Whether transforms of torch.func are at work."""

legacy_batched: Callable[[Tensor], bool] = _private("_functorch.is_legacy_batchedtensor", True)
"""Whether a tensor is one that ``torch.autograd.grad(is_grads_batched=True)`` hands out."""


# --- may memory be read by address? ------------------------------------------------------------------------------


def quiet() -> bool:
    """Whether nothing traces, transforms, observes or replaces operators at the moment."""
    return not (
        torch.compiler.is_compiling()
        or _tracing()
        or _dispatch_modes()
        or _function_modes()
        or transformed()
        or forward_level()
        or _profiled()
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
        keys = _keys(x)
        if keys is None or keys.raw_repr() not in plain:
            return False
    return True


def _learn_plain_keys() -> frozenset[int]:
    """The dispatch keys of ordinary CPU tensors, those made in inference mode included.

    Learnt from new tensors at the first use, and only while :func:`quiet`: a mode would hand out its own kind.
    """
    global _plain_keys
    found = []
    for inference in (False, True):
        with torch.inference_mode(inference):
            keys = _keys(torch.empty(0, device="cpu"))
            found.append(keys and keys.raw_repr())
    _plain_keys = frozenset(found)
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
    return not torch.compiler.is_compiling() and _tracing()


def exporting_onnx() -> bool:
    """Whether it is being exported to ONNX, by either of torch's exporters."""
    return exporting() and _in_onnx_export()


def _in_onnx_export() -> bool:
    return torch.onnx.is_in_onnx_export()


# torch.compile takes torch's own function to be False, the strict mode of torch.export too; of ours it asks the answer.
_in_onnx_export._dynamo_marked_constant = True  # type: ignore[attr-defined]


def forward_level() -> bool:
    """Whether forward-mode differentiation may be under way."""
    return getattr(forward_ad, "_current_level", 0) >= 0


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
        if type(x) is not Tensor and type(x) is not nn.Parameter and x is not None and not isinstance(x, _FAKE):
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
    """Whether torch.func.functionalize is among the transforms at work."""
    functorch = getattr(torch._C, "_functorch", None)
    stack: list[Any] | None = getattr(functorch, "get_interpreter_stack", list)()
    return any("functionalize" in str(interpreter.key()).lower() for interpreter in stack or ())


def is_symbolic(x: object) -> bool:
    """Whether ``x`` is a value of ``torch.fx.symbolic_trace``, which runs code with names in place of tensors."""
    return not isinstance(x, Tensor) and isinstance(x, torch.fx.Proxy)


def refuse_script(name: str) -> NoReturn:
    """Answer ``torch.jit.script``, which compiles source code in a subset of Python.

    Args:
        name: of what it was to compile.

    Raises:
        TypeError: always.
    """
    raise TypeError(
        f"better_attention.{name} cannot be compiled by torch.jit.script, whose language lacks what its code uses. Use "
        "torch.export.export, torch.compile, or torch.jit.trace, all of which work with it."
    )


def fx_leaf(module: nn.Module, arguments: Mapping[str, Any]) -> Any:
    """The node that stands for a call of ``module`` whose query :func:`is_symbolic`.

    torch.fx does not look into torch's own modules; ours it would have to be told to leave alone.

    Raises:
        TypeError: the module is itself what is traced.
    """
    tracer = arguments["query"].tracer
    path = tracer.path_of_module(module)
    if not path:
        raise TypeError(
            f"torch.fx.symbolic_trace received a {type(module).__name__} itself, which is one node of a graph like "
            "torch's own layers. Trace a model that contains it, or use torch.export."
        )
    return tracer.create_proxy("call_module", path, (), dict(arguments))


def fx_call(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """The same for a call of a function."""
    return arguments["query"].tracer.create_proxy("call_function", function, (), dict(arguments))


# --- are modules what they seem? ---------------------------------------------------------------------------------

_module_call = nn.Module.__call__
_module_call_within = nn.Module._call_impl  # looked up at each call, so that a patch of it alone takes effect
_hooks: tuple[Any, ...] = tuple(
    getattr(nn.modules.module, name, True)
    for name in (
        "_global_forward_hooks",
        "_global_forward_pre_hooks",
        "_global_backward_hooks",
        "_global_backward_pre_hooks",
    )
)


def unpatched() -> bool:
    """Whether no library observes or replaces linear maps globally: by hooks, class patches or patched functions."""
    return (
        nn.Module.__call__ is _module_call
        and nn.Module._call_impl is _module_call_within
        and F.linear is torch._C._nn.linear
        and _belongs(nn.Linear.forward)
        and _belongs(nn.Identity.forward)
        and not any(_hooks)
    )


def _belongs(forward: Any) -> bool:
    """Whether a ``forward`` is the one that torch's file of linear maps defines, whenever it was looked at."""
    return getattr(forward, "__globals__", None) is nn.modules.linear.__dict__


def bare(part: nn.Module) -> bool:
    """Whether calling a module runs its class's ``forward`` and nothing else: no hook of its own, nothing patched."""
    state = part.__dict__
    return not (
        "forward" in state
        or state.get("_forward_hooks", True)
        or state.get("_forward_pre_hooks", True)
        or state.get("_backward_hooks", True)
        or state.get("_backward_pre_hooks", True)
    )
