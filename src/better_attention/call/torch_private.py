"""Every private name of torch that the package reads, each with the answer that is assumed where torch lacks it.

A private name can disappear in any version. The assumed answer always takes the careful path: calls get slower, never
wrong. Names are looked up once, at import; ``PRIVATE_NAMES`` lists them, and a test removes them one by one.

The opposite direction cannot be looked up: what torch reads of the layer by a private name (``_qkv_same_embed_dim``,
``_reset_parameters``, ``_load_from_state_dict``) is defined in ``layer/imitation/drop_in.py``.
"""

from __future__ import annotations

import importlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

PRIVATE_NAMES: list[str] = []
"""``module:attribute`` of every name below, in order of appearance."""

# None is no sign of absence, because a private name may well have the value None.
_MISSING = object()


def _private(name: str, otherwise: Any) -> Any:
    """What ``name``, written ``module:attribute.attribute``, stands for; ``otherwise`` where torch lacks it."""
    PRIVATE_NAMES.append(name)
    module, _, path = name.partition(":")
    try:
        value: Any = importlib.import_module(module)
    except ImportError:
        return otherwise
    for part in path.split("."):
        value = getattr(value, part, _MISSING)
        if value is _MISSING:
            return otherwise
    return value


def _always(answer: object) -> Callable[..., Any]:
    return lambda *_: answer


# --- what is going on around a call ------------------------------------------------------------------------------

dispatch_modes: Callable[[], int] = _private("torch:_C._len_torch_dispatch_stack", _always(1))
"""How many modes see every operator. Assumed: one, so that nothing bypasses the dispatcher."""

function_modes: Callable[[], int] = _private("torch:_C._len_torch_function_stack", _always(1))
"""How many modes see every function of torch. Assumed: one."""

is_profiled: Callable[[], bool] = _private("torch:_C._autograd._profiler_enabled", _always(True))
"""Whether a profiler records operators. Assumed: it does."""

is_tracing: Callable[[], bool] = _private("torch:_C._is_tracing", torch.jit.is_tracing)  # type: ignore[attr-defined]
"""Whether torch.jit.trace records operators, without the cost of the public function, which answers otherwise."""

transformed: Callable[[], bool] = _private("torch:_C._are_functorch_transforms_active", _always(True))
"""Whether transforms of torch.func are at work. Assumed: they are."""

_has_forward_level = _private("torch.autograd.forward_ad:_current_level", None) is not None
interpreter_stack: Callable[[], list[Any] | None] | None = _private("torch:_C._functorch.get_interpreter_stack", None)
"""The transforms of torch.func at work. Assumed: unknown."""


def forward_level() -> bool:
    """Whether forward-mode differentiation may be under way. Assumed: it may."""
    return not _has_forward_level or forward_ad._current_level >= 0


def constant_while_compiling(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let torch.compile take what ``function`` returns as a constant; a version without this mark traces its body.

    It is all that torch.compiler.assume_constant_result does, which would import half of the compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# --- what a tensor is --------------------------------------------------------------------------------------------

dispatch_keys: Callable[[Tensor], Any] = _private("torch:_C._dispatch_keys", _always(None))
"""The dispatch keys of a tensor, with a method ``raw_repr``. Assumed: unknown, and no tensor is read by address."""

legacy_batched: Callable[[Tensor], bool] = _private("torch:_C._functorch.is_legacy_batchedtensor", _always(True))
"""Whether ``torch.autograd.grad(is_grads_batched=True)`` made a tensor. Assumed: it did."""

FAKE_TENSOR: type | tuple[()] = _private("torch._subclasses.fake_tensor:FakeTensor", ())
"""The class of tensors without values. Assumed: none, so that they count as a subclass of unknown rules."""

_version = _private("torch:Tensor._version", None)


def version(x: Tensor) -> int | None:
    """How often ``x`` was changed in place, None where that is not counted. Assumed: unknown."""
    # An inference tensor raises RuntimeError when it is asked for its version.
    return None if _version is None or x.is_inference() else x._version


# --- functions that have no public name --------------------------------------------------------------------------

whole_attentions: tuple[Any, ...] = (
    _private("torch:_native_multi_head_attention", None),
    _private("torch:_transformer_encoder_layer_fwd", None),
)
"""Functions that compute standard attention from packed weights. Assumed: there may be some under other names."""

without_subclasses: Callable[[], AbstractContextManager[Any]] | None = _private(
    "torch:_C.DisableTorchFunctionSubclass", None
)
"""A context in which tensor subclasses count as ordinary tensors. Assumed: there is none."""

_assert_async = _private("torch:_assert_async", None)


def check_when_run(condition: Tensor, message: str) -> None:
    """Let a compiled program raise RuntimeError where it runs and finds ``condition`` false; other code, at once."""
    if _assert_async is not None:
        _assert_async(condition, message)
    elif not bool(condition):
        raise RuntimeError(message)


# --- what a module is --------------------------------------------------------------------------------------------

# What was there when this package was imported. A library that patched it earlier counts as torch's own.
_module_call = nn.Module.__call__
_module_call_within = _private("torch.nn:Module._call_impl", None)
_linear = _private("torch:_C._nn.linear", None)
_global_hooks: tuple[Any, ...] = (
    _private("torch.nn.modules.module:_global_forward_hooks", True),
    _private("torch.nn.modules.module:_global_forward_pre_hooks", True),
    _private("torch.nn.modules.module:_global_backward_hooks", True),
    _private("torch.nn.modules.module:_global_backward_pre_hooks", True),
)


def is_unpatched() -> bool:
    """Whether no library observes or replaces linear maps globally: by hooks, class patches or patched functions."""
    return (
        nn.Module.__call__ is _module_call
        and _module_call_within is not None
        and nn.Module._call_impl is _module_call_within  # looked up again, so that a patch of it alone takes effect
        # F.linear is the builtin function itself, so a replacement in Python is always another object.
        and F.linear is _linear
        and _is_torchs(nn.Linear.forward)
        and _is_torchs(nn.Identity.forward)
        and not any(_global_hooks)
    )


def _is_torchs(forward: Any) -> bool:
    """Whether a ``forward`` is the one that torch's file of linear maps defines, whenever it was looked at."""
    return getattr(forward, "__globals__", None) is nn.modules.linear.__dict__


def is_bare(part: nn.Module) -> bool:
    """Whether calling a module runs its class's ``forward`` and nothing else: no hook of its own, nothing patched."""
    # The instance's dictionary: a patched forward is stored there. A name of torch's that is absent counts as a hook.
    state = part.__dict__
    return not (
        "forward" in state
        or state.get("_forward_hooks", True)
        or state.get("_forward_pre_hooks", True)
        or state.get("_backward_hooks", True)
        or state.get("_backward_pre_hooks", True)
    )


_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


def is_hooked(module: nn.Module) -> bool:
    """Whether a module has hooks on its forward pass. Assumed: it has."""
    state = module.__dict__
    return bool(state.get("_forward_hooks", True) or state.get("_forward_pre_hooks", True))


def share_hooks(old: nn.Module, new: nn.Module) -> None:
    """Let the hooks of ``old`` be those of ``new`` too, so that removing one removes it from both.

    Raises:
        RuntimeError: this version of torch keeps them elsewhere.
    """
    for name in _HOOKS:
        if name not in old.__dict__:
            raise RuntimeError(f"torch {torch.__version__} has no {name}, where hooks were kept: they would be lost.")
        # The same dictionaries, because a handle removes its hook from the dictionary that it was made for.
        object.__setattr__(new, name, getattr(old, name))


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile made a module. By name: importing its class would import the compiler."""
    return type(module).__name__ == "OptimizedModule"


def own_parameters(part: nn.Module) -> Mapping[str, nn.Parameter | None]:
    """The parameters of a module itself by name; those registered as None may be left out."""
    parameters: Mapping[str, nn.Parameter | None] | None = getattr(part, "_parameters", None)
    return dict(part.named_parameters(recurse=False)) if parameters is None else parameters


def load_hooks(module: nn.Module) -> OrderedDict[Any, Any] | None:
    """What torch calls after it has loaded a module. Assumed: unknown, and nothing is added to it."""
    hooks: OrderedDict[Any, Any] | None = module.__dict__.get("_load_state_dict_post_hooks")
    return hooks


def set_load_hooks(module: nn.Module, hooks: OrderedDict[Any, Any]) -> None:
    """Replace what :func:`load_hooks` returns."""
    module.__dict__["_load_state_dict_post_hooks"] = hooks
