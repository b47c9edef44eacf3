"""What reads or runs Python code without tensors: ``torch.fx.symbolic_trace`` and ``torch.jit.script``.

torch.fx runs code with names in place of tensors; a layer or a call becomes one node of its graph, as torch's own do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn


def is_symbolic(x: object) -> bool:
    """Whether ``x`` is one of those names."""
    return not isinstance(x, Tensor) and isinstance(x, torch.fx.Proxy)


def module_node(module: nn.Module, arguments: Mapping[str, Any]) -> Any:
    """The node for a call of ``module`` whose query :func:`is_symbolic`.

    torch.fx does not look into torch's own modules; of ours it does not know that it should not.

    Raises:
        TypeError: the module is itself what is traced.
    """
    tracer = arguments["query"].tracer
    path = tracer.path_of_module(module)
    # torch.fx gives the traced module itself the empty path.
    if not path:
        raise TypeError(
            f"torch.fx.symbolic_trace received a {type(module).__name__} itself, which is one node of a graph like "
            "torch's own layers. Trace a model that contains it, or use torch.export."
        )
    return tracer.create_proxy("call_module", path, (), dict(arguments))


def function_node(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """The node for a call of ``function`` whose query :func:`is_symbolic`."""
    return arguments["query"].tracer.create_proxy("call_function", function, (), dict(arguments))


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
