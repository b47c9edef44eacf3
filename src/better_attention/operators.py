"""Custom operators, registered once for every way in which torch runs one.

torch.compile and torch.export need a registered operator, which they keep as one node. torch.func needs an
``autograd.Function``, because a custom operator's own autograd does not know its transforms. In eager mode ordinary
tensors need neither: at small sizes the dispatcher would take longer than the arithmetic. :func:`register` derives all
of this, and the rules for vmap and for counting FLOPs, from one :class:`Definition`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar, get_type_hints

import torch
from torch import Tensor
from torch.autograd.function import Function, FunctionCtx
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from .call.torch_state import legacy_batched, ordinary

A = TypeVar("A", bound=tuple[Any, ...])
"""The ``NamedTuple`` of an operator's arguments."""
Tensors = tuple[Tensor, ...]

NAMESPACE = "better_attention"
_SCHEMA_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", bool: "bool", str: "str", float: "float"}


class Definition(ABC, Generic[A]):
    """What an operator computes; :func:`register` makes it known to torch.

    Attributes:
        name: below ``torch.ops.better_attention``. The operator of its derivative is called ``NAME_backward``.
        arguments: the ``NamedTuple`` A: first the tensors, ``Tensor | None`` where one is optional, then settings of
            type bool, str or float.
        differentiable: the fields of A that have a gradient.
        saves_results: whether :meth:`backward` reads the results.
        results: how many tensors :meth:`forward` returns. The first is the result; the others have no derivative.
        device_type: the only device that computes it; None: any.
        batched: whether dimension 0 of every tensor is a batch, which is how vmap calls the operator once. Where A
            has a ``seed`` and it is given, vmap calls it slice by slice: what is dropped depends on the batch.
        refuses_second: the message for whoever differentiates the derivative.
        refuses_batched_dropout: the message for ``torch.autograd.grad(is_grads_batched=True)`` where there is a
            ``seed``; None where that works.
    """

    name: ClassVar[str]
    arguments: ClassVar[Any]
    differentiable: ClassVar[tuple[str, ...]]
    saves_results: ClassVar[bool] = False
    results: ClassVar[int] = 1
    device_type: ClassVar[str | None] = None
    batched: ClassVar[bool] = False
    refuses_second: ClassVar[str]
    refuses_batched_dropout: ClassVar[str | None] = None

    @abstractmethod
    def forward(self, arguments: A) -> Tensors:
        """The results."""

    def inference(self, arguments: A) -> Tensors:
        """The results where no derivative follows: all but the first may be left empty."""
        return self.forward(arguments)

    @abstractmethod
    def fake(self, arguments: A) -> Tensors:
        """Tensors with the shapes and strides of the results, without values."""

    @abstractmethod
    def backward(self, grad: Tensor, arguments: A, results: Tensors, wanted: Sequence[bool]) -> Sequence[Tensor | None]:
        """The gradients of the ``differentiable`` arguments, in their order; None or anything where not ``wanted``."""

    def empty_gradient(self, argument: Tensor) -> Tensor:
        """A new tensor with the shape and strides of an argument's gradient."""
        return argument.new_empty(argument.shape)

    @abstractmethod
    def flops(self, *shapes: Any) -> int:
        """The floating-point operations of :meth:`forward`, from A with shapes in place of tensors."""

    def backward_flops(self, wanted: Sequence[bool], *shapes: Any) -> int:
        """Those of :meth:`backward`: each matrix product has two factors with a gradient."""
        return 2 * self.flops(*shapes)


def register(definition: Definition[A]) -> Callable[[A], Any]:
    """Make an operator known to torch, under its name and that of its derivative.

    Returns:
        What computes it, whatever torch is doing: from A to the result, or to the tuple of results if it has several.
    """
    layout = _Layout.of(definition)
    operator, derivative = _custom_operators(definition, layout)
    namespace = getattr(torch.ops, NAMESPACE)
    packet, backward_packet = getattr(namespace, definition.name), getattr(namespace, f"{definition.name}_backward")
    save, derive = _autograd(definition, layout, backward_packet)
    operator.register_autograd(derive, setup_context=save)
    if definition.batched:
        operator.register_vmap(_vmap_rule(packet, layout))
        derivative.register_vmap(_backward_vmap_rule(backward_packet, layout, definition.differentiable))
    _count_flops(definition, layout, packet, backward_packet)
    function = _function(definition, layout, packet, save, derive)
    inference, tensors, single = definition.inference, layout.tensors, layout.results == 1

    def call(arguments: A) -> Any:
        if torch.compiler.is_compiling():
            return packet(*arguments)
        if not _require_gradients(arguments[:tensors]) and ordinary(*arguments[:tensors]):
            results = inference(arguments)
            return results[0] if single else results
        return function.apply(*arguments)

    return call


def _require_gradients(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a derivative may be asked for. A loop: small calls feel a generator."""
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return True
    return False


class _Layout(NamedTuple):
    """Where things lie in the flat arguments of an operator and of its derivative.

    The operator takes tensors, then settings; its derivative grad, tensors, saved results, settings, wanted.
    """

    arguments: Any
    fields: tuple[str, ...]
    tensors: int
    results: int
    saved_results: int

    @classmethod
    def of(cls, definition: Definition[A]) -> _Layout:
        hints = get_type_hints(definition.arguments)
        tensors = sum(_SCHEMA_TYPES[hint].startswith("Tensor") for hint in hints.values())
        saved_results = definition.results if definition.saves_results else 0
        return cls(definition.arguments, tuple(hints), tensors, definition.results, saved_results)

    def schemas(self, gradients: int) -> tuple[str, str]:
        """Those of the operator and of its derivative, in torch's language."""
        types = [_SCHEMA_TYPES[hint] for hint in get_type_hints(self.arguments).values()]
        parameters = [f"{kind} {name}" for kind, name in zip(types, self.fields, strict=True)]
        saved = [f"Tensor result{number}" for number in range(self.saved_results)]
        backward = ["Tensor grad", *parameters[: self.tensors], *saved, *parameters[self.tensors :], "bool[] wanted"]
        return _schema(parameters, self.results), _schema(backward, gradients)

    def returned(self, results: Tensors) -> Any:
        """Results as the operator returns them."""
        return results[0] if self.results == 1 else results

    def split(self, flat: Sequence[Any]) -> tuple[Any, Tensors, Sequence[bool]]:
        """What the derivative takes behind grad, as the arguments A, the saved results, and what is wanted."""
        end = self.tensors + self.saved_results
        return self.arguments(*flat[: self.tensors], *flat[end:-1]), tuple(flat[self.tensors : end]), flat[-1]

    def seed(self, flat: Sequence[Any]) -> Any:
        """The seed among arguments that start with A; None where there is none."""
        return flat[self.fields.index("seed")] if "seed" in self.fields else None


def _schema(parameters: Sequence[str], results: int) -> str:
    returned = ", ".join(["Tensor"] * results)
    return f"({', '.join(parameters)}) -> {returned if results == 1 else f'({returned})'}"


# --- for torch.compile, torch.export and the dispatcher ---------------------------------------------------------------


def _custom_operators(definition: Definition[A], layout: _Layout) -> tuple[Any, Any]:
    """The operator and its derivative, with what stands for them where tensors have no values."""

    def forward(*flat: Any) -> Any:
        return layout.returned(definition.forward(layout.arguments(*flat)))

    def fake(*flat: Any) -> Any:
        return layout.returned(definition.fake(layout.arguments(*flat)))

    def fake_backward(grad: Tensor, *flat: Any) -> Tensors:
        arguments, _, wanted = layout.split(flat)
        inputs = (getattr(arguments, field) for field in definition.differentiable)
        return tuple(
            definition.empty_gradient(x) if wish and x is not None else grad.new_empty(0)
            for x, wish in zip(inputs, wanted, strict=True)
        )

    name = f"{NAMESPACE}::{definition.name}"
    schema, backward_schema = layout.schemas(len(definition.differentiable))
    settings: dict[str, Any] = {"mutates_args": (), "device_types": definition.device_type}
    operator = custom_op(name, forward, schema=schema, **settings)
    derivative = custom_op(f"{name}_backward", _derivative(definition, layout), schema=backward_schema, **settings)
    operator.register_fake(fake)
    derivative.register_fake(fake_backward)
    return operator, derivative


def _derivative(definition: Definition[A], layout: _Layout) -> Callable[..., Tensors]:
    """The derivative over flat arguments; an operator returns tensors only, so an empty one where none is wanted."""

    def run(grad: Tensor, *flat: Any) -> Tensors:
        arguments, results, wanted = layout.split(flat)
        gradients = definition.backward(grad, arguments, results, wanted)
        return tuple(
            gradient if wish and gradient is not None else grad.new_empty(0)
            for gradient, wish in zip(gradients, wanted, strict=True)
        )

    return run


def _count_flops(definition: Definition[A], layout: _Layout, packet: Any, backward_packet: Any) -> None:
    """For :class:`torch.utils.flop_counter.FlopCounterMode`, which hands over shapes in place of tensors."""

    def forward(*shapes: Any, **_: Any) -> int:
        return definition.flops(*shapes)

    def backward(grad: Any, *flat: Any, **_: Any) -> int:
        shapes, _results, wanted = layout.split(flat)
        return definition.backward_flops(wanted, *shapes)

    register_flop_formula(packet)(forward)
    register_flop_formula(backward_packet)(backward)


# --- derivatives ------------------------------------------------------------------------------------------------------


def _autograd(definition: Definition[A], layout: _Layout, backward_packet: Any) -> tuple[Any, Any]:
    """What is kept of a call, and its derivative; both for the operator and for the ``autograd.Function``."""
    differentiable = [layout.fields.index(field) for field in definition.differentiable]
    in_eager_mode = _derivative(definition, layout)
    elsewhere = _backward_function(definition, layout, backward_packet, in_eager_mode)

    def save(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        kept = output if definition.saves_results else ()
        kept = (kept,) if isinstance(kept, Tensor) else kept
        ctx.save_for_backward(*inputs[: layout.tensors], *kept)
        ctx.settings = (*inputs[layout.tensors :], [bool(ctx.needs_input_grad[i]) for i in differentiable])
        if layout.results > 1 and isinstance(ctx, FunctionCtx):
            ctx.mark_non_differentiable(*output[1:])

    def derive(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors  # read once: activation checkpointing hands them out only once
        if definition.refuses_batched_dropout and layout.seed(tensors) is not None and legacy_batched(grad):
            raise ValueError(definition.refuses_batched_dropout)
        run = elsewhere
        if torch.compiler.is_compiling():
            run = backward_packet
        elif not torch.is_grad_enabled() and ordinary(grad, *tensors):
            run = in_eager_mode
        gradients: list[Tensor | None] = [None] * len(layout.fields)
        for index, gradient, wish in zip(
            differentiable, run(grad, *tensors, *ctx.settings), ctx.settings[-1], strict=True
        ):
            gradients[index] = gradient if wish else None
        return tuple(gradients)

    return save, derive


def _function(definition: Definition[A], layout: _Layout, packet: Any, save: Any, derive: Any) -> Any:
    """The operator and its derivative as an ``autograd.Function``, for torch.func and for eager mode."""

    def forward(*flat: Any) -> Any:
        if ordinary(*flat[: layout.tensors]):
            return layout.returned(definition.forward(layout.arguments(*flat)))
        return packet(*flat)

    return _new_function(definition, "", forward, save, derive)


def _backward_function(definition: Definition[A], layout: _Layout, packet: Any, in_eager_mode: Any) -> Any:
    """The derivative as an ``autograd.Function``, with an answer to whoever wants to differentiate it again."""

    def forward(*flat: Any) -> Any:
        return in_eager_mode(*flat) if ordinary(*flat[: 1 + layout.tensors + layout.saved_results]) else packet(*flat)

    def save(ctx: Any, inputs: Any, output: Any) -> None:
        return None

    def derive(ctx: Any, *_: Any) -> Any:
        raise ValueError(definition.refuses_second)

    return _new_function(definition, "Backward", forward, save, derive).apply


def _new_function(definition: Definition[A], suffix: str, forward: Any, save: Any, derive: Any) -> Any:
    """A subclass of ``autograd.Function``, whose name shows in graphs and in messages of torch."""
    members = {
        "generate_vmap_rule": definition.batched,
        "forward": staticmethod(forward),
        "setup_context": staticmethod(save),
        "backward": staticmethod(derive),
    }
    return type(f"{definition.name.capitalize()}{suffix}", (Function,), members)


# --- vmap -------------------------------------------------------------------------------------------------------------


def _vmap_rule(packet: Any, layout: _Layout) -> Callable[..., Any]:
    """The operator under vmap: one call with a batch of both dimensions."""

    def rule(info: Any, in_dims: Any, *args: Any) -> Any:
        if layout.seed(args) is not None:
            return _one_by_one(info, in_dims, args, packet)
        batch = _batch(args[0], in_dims[0])
        folded = _fold(info, in_dims[: layout.tensors], args[: layout.tensors], batch)
        results = packet(*folded, *args[layout.tensors :])
        if layout.results == 1:
            return results.unflatten(0, (info.batch_size, batch)), 0
        return tuple(x.unflatten(0, (info.batch_size, batch)) for x in results), (0,) * layout.results

    return rule


def _backward_vmap_rule(packet: Any, layout: _Layout, differentiable: Sequence[str]) -> Callable[..., Any]:
    """The derivative under vmap. A tensor that broadcasts over its batch gets the sum over that batch."""
    tensors = 1 + layout.tensors + layout.saved_results
    inputs = [1 + layout.fields.index(field) for field in differentiable]

    def rule(info: Any, in_dims: Any, *args: Any) -> Any:
        if layout.seed(args[1:]) is not None:
            return _one_by_one(info, in_dims, args, packet)
        batch = _batch(args[1], in_dims[1])
        folded = _fold(info, in_dims[:tensors], args[:tensors], batch)
        gradients = []
        for index, gradient in zip(inputs, packet(*folded, *args[tensors:]), strict=True):
            if gradient.dim() == 1:  # not wanted
                gradients.append(gradient.expand(info.batch_size, 0))
                continue
            gradient = gradient.unflatten(0, (info.batch_size, batch))
            broadcasts = _batch(args[index], in_dims[index]) != batch
            gradients.append(gradient.sum(1, keepdim=True) if broadcasts else gradient)
        return tuple(gradients), (0,) * len(gradients)

    return rule


def _batch(x: Tensor, in_dim: int | None) -> int:
    """The size of the first dimension below that of vmap."""
    return x.shape[0 if in_dim is None or in_dim > 0 else 1]


def _fold(info: Any, in_dims: Sequence[Any], tensors: Sequence[Any], batch: int) -> list[Tensor | None]:
    """Every tensor with a batch of ``info.batch_size * batch``; what is not vmapped is repeated."""
    folded: list[Tensor | None] = []
    for x, in_dim in zip(tensors, in_dims, strict=True):
        if x is not None:
            x = x.expand(info.batch_size, *x.shape) if in_dim is None else x.movedim(in_dim, 0)
            # A mask that broadcasts over the batch is expanded, a view.
            x = x.expand(info.batch_size, batch, *x.shape[2:]).flatten(0, 1)
        folded.append(x)
    return folded


def _one_by_one(info: Any, in_dims: Any, args: Any, packet: Any) -> tuple[Any, Any]:
    """An operator under vmap, called slice by slice."""
    slices = [
        packet(*(x.select(dim, i) if isinstance(dim, int) else x for x, dim in zip(args, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    if isinstance(slices[0], Tensor):
        return torch.stack(slices), 0
    results = tuple(torch.stack(parts) for parts in zip(*slices, strict=True))
    return results, (0,) * len(results)
