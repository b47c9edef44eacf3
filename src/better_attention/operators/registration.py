"""From a :class:`.Definition` to a custom operator, its derivative, and a function that takes the shortest way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, FunctionCtx
from torch.library import custom_op

from better_attention.call.torch_private import legacy_batched
from better_attention.call.torch_state import ordinary
from better_attention.imported import when_imported

from .definition import A, Definition, Layout, Tensors
from .vmap import backward_vmap_rule, vmap_rule

NAMESPACE = "better_attention"


def register(definition: Definition[A]) -> Callable[[A], Any]:
    """Make an operator known to torch, under its name and that of its derivative.

    Returns:
        What computes it, whatever torch is doing: from A to the result, or to the tuple of results if it has several.
    """
    layout = Layout.of(definition)
    operator, derivative = _custom_operators(definition, layout)
    namespace = getattr(torch.ops, NAMESPACE)
    packet, backward_packet = getattr(namespace, definition.name), getattr(namespace, f"{definition.name}_backward")
    save, derive = _autograd(definition, layout, backward_packet)
    operator.register_autograd(derive, setup_context=save)
    if definition.batched:
        operator.register_vmap(vmap_rule(packet, layout))
        derivative.register_vmap(backward_vmap_rule(backward_packet, layout, definition.differentiable))
    _count_flops(definition, layout, packet, backward_packet)
    function = _function(definition, layout, packet, save, derive)
    inference, tensors, single = definition.inference, layout.tensors, layout.results == 1

    def call(arguments: A) -> Any:
        if torch.compiler.is_compiling():
            return packet(*arguments)
        # Past the dispatcher, whose overhead is a large part of a small call. Only where nothing could notice.
        if not _require_gradients(arguments[:tensors]) and ordinary(*arguments[:tensors]):
            # No derivative can follow here, so that what only the derivative reads need not be computed.
            results = inference(arguments)
            return results[0] if single else results
        return function.apply(*arguments)

    return call


def _require_gradients(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a derivative may be wanted."""
    if torch.is_grad_enabled():
        for x in tensors:  # not any(): for small calls the cost of a generator is measurable
            if x is not None and x.requires_grad:
                return True
    return False


# --- for torch.compile, torch.export and the dispatcher ---------------------------------------------------------------


def _custom_operators(definition: Definition[A], layout: Layout) -> tuple[Any, Any]:
    """The operator and its derivative, with what stands for them where tensors have no values."""

    def forward(*flat: Any) -> Any:
        return layout.returned(definition.forward(layout.arguments(*flat)))

    def fake(*flat: Any) -> Any:
        return layout.returned(definition.fake(layout.arguments(*flat)))

    def fake_backward(grad: Tensor, *flat: Any) -> Any:
        arguments, _, wanted = layout.split(flat)
        inputs = (getattr(arguments, field) for field in definition.differentiable)
        return _as_returned(
            tuple(
                # Compiled programs plan their memory by these shapes, which have to be those of _derivative().
                definition.empty_gradient(x) if wish and x is not None else grad.new_empty(0)
                for x, wish in zip(inputs, wanted, strict=True)
            )
        )

    derive = _derivative(definition, layout)

    def backward(grad: Tensor, *flat: Any) -> Any:
        return _as_returned(derive(grad, *flat))

    name = f"{NAMESPACE}::{definition.name}"
    schema, backward_schema = layout.schemas(len(definition.differentiable))
    settings: dict[str, Any] = {"mutates_args": (), "device_types": definition.device_type}
    operator = custom_op(name, forward, schema=schema, **settings)
    derivative = custom_op(f"{name}_backward", backward, schema=backward_schema, **settings)
    operator.register_fake(fake)
    derivative.register_fake(fake_backward)
    return operator, derivative


def _as_returned(gradients: Tensors) -> Any:
    """Gradients as an operator returns them: one by itself."""
    return gradients[0] if len(gradients) == 1 else gradients


def _derivative(definition: Definition[A], layout: Layout) -> Callable[..., Tensors]:
    """The derivative over flat arguments; an operator returns tensors only, so an empty one where none is wanted."""

    def run(grad: Tensor, *flat: Any) -> Tensors:
        arguments, results, wanted = layout.split(flat)
        gradients = definition.backward(grad, arguments, results, wanted)
        return tuple(
            # backward_vmap_rule() recognises a gradient that is not wanted by its single dimension.
            gradient if wish and gradient is not None else grad.new_empty(0)
            for gradient, wish in zip(gradients, wanted, strict=True)
        )

    return run


def _count_flops(definition: Definition[A], layout: Layout, packet: Any, backward_packet: Any) -> None:
    """For :class:`torch.utils.flop_counter.FlopCounterMode`, which hands over shapes in place of tensors."""

    def forward(*shapes: Any, **_: Any) -> int:
        return definition.flops(*shapes)

    def backward(grad: Any, *flat: Any, **_: Any) -> int:
        shapes, _results, wanted = layout.split(flat)
        return definition.backward_flops(wanted, *shapes)

    def register() -> None:
        from torch.utils.flop_counter import register_flop_formula

        register_flop_formula(packet)(forward)
        register_flop_formula(backward_packet)(backward)

    when_imported("torch.utils.flop_counter", register)


# --- derivatives ------------------------------------------------------------------------------------------------------


def _autograd(definition: Definition[A], layout: Layout, backward_packet: Any) -> tuple[Any, Any]:
    """What is kept of a call, and its derivative; both for the operator and for the ``autograd.Function``."""
    differentiable = [layout.fields.index(field) for field in definition.differentiable]
    in_eager_mode = _derivative(definition, layout)
    elsewhere = _backward_function(definition, layout, backward_packet, in_eager_mode)

    def save(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        kept = output if definition.saves_results else ()
        kept = (kept,) if isinstance(kept, Tensor) else kept
        ctx.save_for_backward(*inputs[: layout.tensors], *kept)
        # save_for_backward takes tensors only; what is wanted is known now, and the derivative needs it as an argument.
        ctx.settings = (*inputs[layout.tensors :], [bool(ctx.needs_input_grad[i]) for i in differentiable])
        # Under vmap the context is a wrapper around another one, whose results are not these.
        if layout.results > 1 and isinstance(ctx, FunctionCtx):
            ctx.mark_non_differentiable(*output[1:])

    def derive(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors  # read once: activation checkpointing hands them out only once
        if definition.refuses_batched_dropout and layout.seed(tensors) is not None and legacy_batched(grad):
            raise ValueError(definition.refuses_batched_dropout)
        # An autograd.Function cannot be a graph node, an operator has no rules for torch.func: each has its place.
        run = elsewhere
        if torch.compiler.is_compiling():
            run = backward_packet
        elif not torch.is_grad_enabled() and ordinary(grad, *tensors):
            run = in_eager_mode
        gradients: list[Tensor | None] = [None] * len(layout.fields)
        found = run(grad, *tensors, *ctx.settings)
        found = (found,) if isinstance(found, Tensor) else found  # the operator's own result, where it has one gradient
        for index, gradient, wish in zip(differentiable, found, ctx.settings[-1], strict=True):
            gradients[index] = gradient if wish else None
        return tuple(gradients)

    return save, derive


def _function(definition: Definition[A], layout: Layout, packet: Any, save: Any, derive: Any) -> Any:
    """The operator and its derivative as an ``autograd.Function``, for torch.func and for eager mode."""

    def forward(*flat: Any) -> Any:
        if ordinary(*flat[: layout.tensors]):
            return layout.returned(definition.forward(layout.arguments(*flat)))
        return packet(*flat)

    return _new_function(definition, "", forward, save, derive)


def _backward_function(definition: Definition[A], layout: Layout, packet: Any, in_eager_mode: Any) -> Any:
    """The derivative as an ``autograd.Function``, which refuses with a message to be differentiated again."""

    def forward(*flat: Any) -> Any:
        return in_eager_mode(*flat) if ordinary(*flat[: 1 + layout.tensors + layout.saved_results]) else packet(*flat)

    # Nothing to keep: differentiating a derivative is refused.
    def save(ctx: Any, inputs: Any, output: Any) -> None:
        return None

    def derive(ctx: Any, *_: Any) -> Any:
        raise ValueError(definition.refuses_second)

    return _new_function(definition, "Backward", forward, save, derive).apply


def _new_function(definition: Definition[A], suffix: str, forward: Any, save: Any, derive: Any) -> Any:
    """A subclass of ``autograd.Function``, whose name shows in graphs and in messages of torch."""
    members = {
        # torch then runs `forward` under vmap, where the operator's own rule applies.
        "generate_vmap_rule": definition.batched,
        "forward": staticmethod(forward),
        "setup_context": staticmethod(save),
        "backward": staticmethod(derive),
    }
    return type(f"{definition.name.capitalize()}{suffix}", (Function,), members)
