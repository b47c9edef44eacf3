"""What an operator computes, and how its arguments lie in torch's flat lists."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar, get_type_hints

from torch import Tensor

A = TypeVar("A", bound=tuple[Any, ...])
"""The ``NamedTuple`` of an operator's arguments."""
Tensors = tuple[Tensor, ...]

_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    str: "str",
    float: "float",
    int: "SymInt",
    int | None: "int?",
}


class Definition(ABC, Generic[A]):
    """What an operator computes; :func:`register` makes it known to torch.

    Attributes:
        name: below ``torch.ops.better_attention``. The operator of its derivative is called ``NAME_backward``.
        arguments: the ``NamedTuple`` A: first the tensors, ``Tensor | None`` where one is optional, then settings of
            type bool, int, str or float.
        differentiable: the fields of A that have a gradient.
        saves_results: whether :meth:`backward` reads the results.
        results: how many tensors :meth:`forward` returns. The first is the result; the others have no derivative.
        device_type: the only device that computes it; None: any.
        batched: whether dimension 0 of every tensor is a batch, which is how vmap calls the operator once. Where A
            has a ``seed`` and it is given, vmap calls it slice by slice: what is dropped depends on the batch.
        refuses_second: the message of the error that differentiating the derivative raises.
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


class Layout(NamedTuple):
    """Where things lie in the flat arguments of an operator and of its derivative.

    The operator takes tensors, then settings; its derivative grad, tensors, saved results, settings, wanted.
    """

    arguments: Any
    fields: tuple[str, ...]
    tensors: int
    results: int
    saved_results: int

    @classmethod
    def of(cls, definition: Definition[A]) -> Layout:
        """The layout that follows from the annotations of the arguments."""
        # Resolved, because the postponed annotations of the arguments are texts.
        hints = get_type_hints(definition.arguments)
        tensors = sum(_SCHEMA_TYPES[hint].startswith("Tensor") for hint in hints.values())
        # The derivative gets all results or none: which of them it reads is its own affair.
        saved_results = definition.results if definition.saves_results else 0
        return cls(definition.arguments, tuple(hints), tensors, definition.results, saved_results)

    def schemas(self, gradients: int) -> tuple[str, str]:
        """Those of the operator and of its derivative, in torch's language."""
        parameters = schema_types(get_type_hints(self.arguments))
        saved = [f"Tensor result{number}" for number in range(self.saved_results)]
        # Tensors stand before settings in both schemas, so that a prefix of the arguments is what autograd saves.
        backward = ["Tensor grad", *parameters[: self.tensors], *saved, *parameters[self.tensors :], "bool[] wanted"]
        return schema(parameters, self.results), schema(backward, gradients)

    def returned(self, results: Tensors) -> Any:
        """Results as the operator returns them."""
        return results[0] if self.results == 1 else results

    def split(self, flat: Sequence[Any]) -> tuple[Any, Tensors, Sequence[bool]]:
        """What the derivative takes behind grad, as the arguments A, the saved results, and what is wanted."""
        # grad has been taken off already, so the saved results start right behind the tensors.
        end = self.tensors + self.saved_results
        return self.arguments(*flat[: self.tensors], *flat[end:-1]), tuple(flat[self.tensors : end]), flat[-1]

    def seed(self, flat: Sequence[Any]) -> Any:
        """The seed among arguments that start with A; None where there is none."""
        return flat[self.fields.index("seed")] if "seed" in self.fields else None


def schema_types(hints: Mapping[str, Any]) -> list[str]:
    """Annotated arguments in torch's language: type and name of each."""
    return [f"{_SCHEMA_TYPES[hint]} {name}" for name, hint in hints.items()]


def schema(parameters: Sequence[str], results: int) -> str:
    """An operator's signature in torch's language."""
    returned = ", ".join(["Tensor"] * results)
    return f"({', '.join(parameters)}) -> {returned if results == 1 else f'({returned})'}"
