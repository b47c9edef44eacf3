"""``in_proj_weight`` and ``in_proj_bias`` of torch's layer, for code that reads or initialises them.

The layer keeps W_Q, W_K and W_V in modules of their own. What is here is made of them when it is read, and what is
written to it is written to them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from better_attention.call.torch_private import (
    own_parameters,
    transformed,
    version,
    whole_attentions,
    without_subclasses,
)
from better_attention.call.torch_state import values_available

_COMPUTES_ATTENTION = {F.multi_head_attention_forward, *whole_attentions}
_COPIES = {Tensor.copy_, Tensor.__setitem__, Tensor.set_, Tensor.data.__set__}  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True)
class _Source:
    """Where a packed tensor comes from.

    Args:
        whole: the packed values, an ordinary tensor.
        parts: the parameters of W_Q, W_K, W_V; None for a map that the mechanism does not learn.
        mechanism: its name, for messages.
        torchs: whether torch's own attention computes the layer's function from these weights.
    """

    whole: Tensor
    parts: tuple[Tensor | None, ...]
    mechanism: str
    torchs: bool

    def learned(self) -> list[Tensor]:
        return [part for part in self.parts if part is not None]

    def write(self, values: Tensor, *, copied: bool, replace: bool = False) -> None:
        """Write ``values`` to the parameters.

        Args:
            values: (3D, D) or (3D,).
            copied: they come from another tensor: rows that the mechanism does not learn must be the identity's.
                Otherwise they were drawn, filled or scaled in place, which those rows have no need of.
            replace: take dtype and device of ``values`` too, as an assignment to ``.data`` does.
        """
        if values.shape != self.whole.shape:
            raise ValueError(f"expected values of shape {tuple(self.whole.shape)}, received {tuple(values.shape)}.")
        # All rows are checked before one is written: a refused write leaves every parameter as it was.
        rows = values.chunk(3)
        for letter, part, new in zip("QKV", self.parts, rows, strict=True):
            if part is None and copied and not new.is_meta and not torch.equal(new, _unlearned(new)):
                raise ValueError(
                    f"mechanism {self.mechanism!r} has no W_{letter}: weights of another layer cannot be written to "
                    "it. Write to the projections that it has (layer.q_proj.weight ...), or build the layer with "
                    "mechanism='standard'."
                )
        for part, new in zip(self.parts, rows, strict=True):
            if part is not None and replace:
                # A clone, because the three rows are views of one storage, which parameters must not share.
                part.data = new.detach().clone()
            elif part is not None:
                with torch.no_grad():
                    part.copy_(new)

    def grad(self) -> Tensor | None:
        """The gradients in the packed layout, None before there are any."""
        grads = [None if part is None else part.grad for part in self.parts]
        if all(grad is None for grad in grads):
            return None
        rows = self.whole.detach().chunk(3)
        return torch.cat([torch.zeros_like(row) if g is None else g for g, row in zip(grads, rows, strict=True)])


class Packed(Tensor):
    """The weights (3D, D) or biases (3D,) of W_Q, W_K and W_V, one below the other.

    Writing in place, to views and to ``.data`` too, writes to the projections' parameters; gradients flow to them.
    Rows of a map that the mechanism does not learn are the identity's, which is what it computes there; drawing or
    filling them has no effect, and copying other weights into them raises ValueError.

    As torch's transformers leave their own fused attention where an argument has ``__torch_function__``, they call the
    layer.
    """

    _source: _Source

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func`` on ordinary tensors; what it changed in place is written to the parameters."""
        given = [x for x in _tensors((args, kwargs or {})) if isinstance(x, Packed)]
        source = given[0]._source
        if func in _COMPUTES_ATTENTION and not source.torchs:
            raise TypeError(
                f"torch's own function would compute standard attention from the weights of {source.mechanism!r}: "
                "call the layer instead."
            )
        # Compared by ==, because each access to __get__ makes a new object, which equals the others.
        if func == Tensor.grad.__get__:  # type: ignore[union-attr]
            return source.grad()
        if func in (Tensor.requires_grad_, Tensor.requires_grad.__set__):  # type: ignore[attr-defined]
            for part in source.learned():
                func(part, *args[1:], **(kwargs or {}))
            return args[0] if func == Tensor.requires_grad_ else None
        if func == Tensor.data.__set__:  # type: ignore[attr-defined]
            source.write(args[1], copied=True, replace=True)
            return None
        # Some of torch's initialisers draw elsewhere and copy.
        drawn = sys._getframe(1).f_globals.get("__name__") == nn.init.__name__
        with without_subclasses():  # type: ignore[misc]  # there is one: packed() asked
            # A version that has risen shows a change in place by any function: no list of such functions is needed.
            before = [version(x) for x in given]
            result = func(*args, **(kwargs or {}))
            for x, earlier in zip(given, before, strict=True):
                if earlier is None or version(x) != earlier:
                    x._source.write(x._source.whole.detach(), copied=func in _COPIES and not drawn)
            return _linked(result, source)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """An ordinary tensor, as everything is that leaves the layer."""
        return self.detach().as_subclass(Tensor).clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """In a file it is an ordinary tensor too."""
        return self.__deepcopy__({}).__reduce_ex__(protocol)

    def __getattr__(self, name: str) -> Any:
        """What all the parameters carry: flags that libraries set on them."""
        # as_subclass() makes the tensor before _link() sets its source: asking self for it here would call this again.
        if name == "_source":
            raise AttributeError(name)
        parts = self._source.learned()
        values = [vars(part)[name] for part in parts if name in vars(part)]
        if not parts or len(values) < len(parts) or any(value is not values[0] for value in values):
            raise AttributeError(f"'Packed' object has no attribute {name!r}")
        return values[0]


class Unpackable:
    """Stands for packed weights where there are none to be had; torch's transformers call the layer here too.

    Args:
        why: the reason, as a clause.
    """

    def __init__(self, why: str) -> None:
        self.why = why

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse to take part in a computation."""
        stands = next(x for x in _tensors((args, kwargs or {}), cls) if isinstance(x, cls))
        raise TypeError(stands._message())

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{self._message()} (asked for {name!r})")

    def _refuse(self, *_: Any) -> NoReturn:
        raise TypeError(self._message())

    __getitem__ = __setitem__ = __len__ = __iter__ = __add__ = __radd__ = __sub__ = __rsub__ = _refuse
    __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __matmul__ = __rmatmul__ = __neg__ = __pow__ = _refuse

    def __bool__(self) -> bool:
        """It is something, as torch's weights are; without this the length would be asked for."""
        return True

    def _message(self) -> str:
        return (
            f"this layer has no packed in_proj_weight and in_proj_bias {self.why}: use the modules q_proj, k_proj, "
            "v_proj and out_proj, and reset_parameters() to draw their weights anew."
        )


def packed(projections: Sequence[nn.Module], kind: str, mechanism: str, torchs: bool) -> Tensor | Unpackable | None:
    """The three projections' weights or biases in torch's packed layout.

    Args:
        projections: those of query, key and value: linear maps of one shape (D, D), or identities.
        kind: "weight" or "bias".
        mechanism: its name, for messages.
        torchs: whether torch's own attention computes the layer's function from these weights.

    Returns:
        (3D, D) or (3D,); None without learned maps or biases.
    """
    learned = [p for p in projections if type(p) is not nn.Identity]
    if not values_available():
        return Unpackable("while a graph is being traced")
    if without_subclasses is None or None in whole_attentions:
        return Unpackable("with this version of torch, which lacks what they need")
    if not all(isinstance(p, nn.Linear) and "weight" in own_parameters(p) for p in learned):
        return Unpackable("where other modules stand in the place of its nn.Linear projections")
    named = [None if type(p) is nn.Identity else own_parameters(p).get(kind) for p in projections]
    present = [x for x in named if x is not None]
    if not present:
        return None
    first = present[0]
    alike = all((x.dtype, x.device, x.shape) == (first.dtype, first.device, first.shape) for x in present)
    plain = not transformed() and all(type(x) in (Tensor, nn.Parameter) for x in present)
    ordinary = plain and first.is_floating_point() and first.element_size() > 1
    if not (len(present) == len(learned) and alike and ordinary):
        return Unpackable("where the weights of its projections are not ordinary tensors of one kind")
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(mode=False), torch.no_grad():  # inference tensors do not count their changes
            whole = torch.cat([_unlearned(first) if x is None else x for x in named])
    else:
        # A differentiable copy: gradients of what is computed from it reach the projections.
        whole = torch.cat([_unlearned(first) if x is None else x for x in named])
    return _link(whole, _Source(whole, tuple(named), mechanism, torchs))


def assign(old: Tensor | Unpackable | None, new: Any, name: str) -> None:
    """Write ``new`` to the parameters that ``old``, which the layer gave for its attribute ``name``, was made of.

    Raises:
        ValueError, TypeError: there are none, ``new`` is no tensor, or it does not fit.
    """
    if isinstance(old, Unpackable) or (old is None and new is not None):
        why = f" {old.why}" if isinstance(old, Unpackable) else ""
        raise TypeError(
            f"this layer has no {name} to assign to{why}: assign to its modules q_proj, k_proj, v_proj instead."
        )
    if isinstance(old, Packed) and not isinstance(
        new, Packed
    ):  # a packed one is what an augmented assignment ends with
        if not isinstance(new, Tensor):
            raise TypeError(
                f"{name} is made of the parameters of q_proj, k_proj and v_proj, to which a tensor can be assigned, "
                f"received {new!r}. Build the layer with bias=False to have no biases."
            )
        old._source.write(new, copied=True, replace=True)


def _unlearned(like: Tensor) -> Tensor:
    """Weight or bias of the identity."""
    if like.dim() == 1:
        return torch.zeros_like(like)
    return torch.eye(len(like), dtype=like.dtype, device=like.device)


def _linked(result: Any, source: _Source) -> Any:
    """``result`` with every tensor in it that shares the packed memory made one that writes through."""
    if isinstance(result, (list, tuple)) and type(result) in (list, tuple):
        return type(result)(_linked(x, source) for x in result)
    # Meta tensors have no address to compare.
    if not isinstance(result, Tensor) or isinstance(result, Packed) or result.is_meta:
        return result
    # A view has the storage of the whole and has to write through; a result of its own is an ordinary tensor.
    if result.untyped_storage().data_ptr() != source.whole.untyped_storage().data_ptr():
        return result
    return _link(result, source)


def _link(x: Tensor, source: _Source) -> Packed:
    linked = x.as_subclass(Packed)
    linked._source = source
    return linked


def _tensors(values: Any, kind: type = Tensor) -> list[Any]:
    """The tensors in nested arguments."""
    if isinstance(values, (Tensor, kind)):
        return [values]
    if isinstance(values, dict):
        values = list(values.values())
    return [x for value in values for x in _tensors(value, kind)] if isinstance(values, (list, tuple)) else []
