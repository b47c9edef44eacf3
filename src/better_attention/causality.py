"""A test users can run on their own model: does any output depend on a later input?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .errors import describe


def assert_causal(function: Callable[[Tensor], Any], inputs: Tensor, *, dim: int = 1) -> None:
    """Perturb every suffix of ``inputs`` along ``dim`` and check that no output before it moves by a single bit.

    Args:
        function: maps a tensor like ``inputs`` to a tensor of the same length along ``dim`` (of a tuple or list, the
            first item counts). Put a model in eval mode first.
        inputs: floating point: every suffix is replaced by large numbers and by NaN; or integers (token ids): by
            other ids that occur in ``inputs``.
        dim: the position (time) dimension, in inputs and outputs.

    Raises:
        AssertionError: an output moved; names the perturbed position and the first past position that moved.
        TypeError: ``inputs`` that is no tensor of real numbers, or a function that returns none.
        ValueError: a dimension that does not exist, or a function that changes the length or draws random numbers.

    >>> assert_causal(lambda x: x.cumsum(1), torch.zeros(2, 5, 3))
    """
    if not isinstance(inputs, Tensor):
        raise TypeError(f"inputs must be a tensor, received {describe(inputs)}.")
    if not -inputs.dim() <= dim < inputs.dim():
        raise ValueError(f"dim={dim} is not a dimension of inputs, {describe(inputs)}.")
    with torch.no_grad():
        clean = _evaluate(function, inputs, inputs, dim)
        # Random numbers would look like a leak, so that they are ruled out first.
        if not _same(clean, _evaluate(function, inputs, inputs, dim)).all():
            raise ValueError("function gave two results for the same inputs: switch dropout off (model.eval()).")
        length = inputs.shape[dim]
        # Every suffix, because a leak may reach back by one position only.
        for start in range(1, length):
            for name, disturbed in _disturbances(inputs, start, dim):
                past = _evaluate(function, disturbed, inputs, dim).narrow(dim, 0, start)
                same = _same(past, clean.narrow(dim, 0, start)).movedim(dim, 0).reshape(start, -1).all(dim=1)
                if not bool(same.all()):
                    moved = int((~same).nonzero()[0])
                    raise AssertionError(
                        f"not causal: with {name} at positions {start} to {length - 1}, "
                        f"the output at position {moved} moved."
                    )


def _disturbances(inputs: Tensor, start: int, dim: int) -> list[tuple[str, Tensor]]:
    """``inputs`` with everything from ``start`` on replaced, in each of the ways that fit its dtype."""
    head, tail = inputs.narrow(dim, 0, start), inputs.narrow(dim, start, inputs.shape[dim] - start)
    if inputs.is_floating_point():
        # NaN shows also a leak whose weight is 0, because 0 * NaN is NaN.
        tails = [("values times 100 plus 100", tail * 100 + 100), ("NaN", torch.full_like(tail, float("nan")))]
    elif inputs.dtype == torch.bool:
        tails = [("the opposite values", ~tail)]
    elif inputs.is_complex():
        raise TypeError(f"inputs must be real numbers, integers or bools, received {describe(inputs)}.")
    else:
        ids = inputs.unique()
        if len(ids) < 2:
            raise ValueError(f"inputs hold one value only, {describe(inputs)}: nothing to exchange it with.")
        # The next id in sorted order: every position changes, and only to ids that the model knows.
        tails = [("other values", ids[(torch.searchsorted(ids, tail.contiguous()) + 1) % len(ids)])]
    return [(name, torch.cat([head, t], dim=dim)) for name, t in tails]


def _evaluate(function: Callable[[Tensor], Any], x: Tensor, inputs: Tensor, dim: int) -> Tensor:
    output = function(x)
    if isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise TypeError(
            f"function must return a tensor (or a tuple that starts with one), received {describe(output)}."
        )
    if not -output.dim() <= dim < output.dim() or output.shape[dim] != inputs.shape[dim]:
        raise ValueError(
            f"function must keep the length along dim={dim}: "
            f"inputs {tuple(inputs.shape)}, output {tuple(output.shape)}."
        )
    # A function may return a buffer that its next call writes to.
    return output.clone()


def _same(a: Tensor, b: Tensor) -> Tensor:
    """Equal element by element, NaN equal to NaN."""
    return (a == b) | ((a != a) & (b != b))
