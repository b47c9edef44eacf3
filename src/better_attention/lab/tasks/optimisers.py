"""Optimisers by name: torch's, and RMSprop as Keras computes it, with which keras.io's translation example trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn

OPTIMISERS = ("adam", "adamw", "rmsprop", "sgd")
MOMENTUM = 0.7
"""Of ``"sgd"``: what public code from the group behind arXiv 2407.18601 trains with, at a learning rate of 0.01."""


def optimiser_of(name: str, params: Iterable[nn.Parameter], *, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """The optimiser called ``name``, one of :data:`OPTIMISERS`."""
    if name == "rmsprop":
        return RMSprop(params, lr=lr, weight_decay=weight_decay)
    # A single kernel for all values; by default torch loops over the tensors in Python on a CPU.
    if name == "sgd":
        return torch.optim.SGD(params, lr=lr, momentum=MOMENTUM, weight_decay=weight_decay, fused=True)
    make = torch.optim.AdamW if name == "adamw" else torch.optim.Adam
    return make(params, lr=lr, weight_decay=weight_decay, fused=True)


class RMSprop(torch.optim.Optimizer):
    """Steps of lr · g / √(v + ε), where v ← ρ v + (1 − ρ) g² is a running mean of the squared gradient.

    ``torch.optim.RMSprop`` divides by √v + ε instead: the first steps of a rare word's embedding are then of full size
    however small its gradient is, while here they fade out below √ε, about 3e-4.

    Args:
        params: what is trained.
        lr: learning rate.
        rho, eps: ρ and ε; Keras' defaults.
        weight_decay: share of ``lr`` by which every value shrinks at each step, apart from the gradient.

    >>> weight = nn.Parameter(torch.tensor([1.0]))
    >>> weight.grad = torch.tensor([3.0])
    >>> RMSprop([weight], lr=0.1).step()  # 1 - 0.1 · 3 / √(0.1 · 9)
    >>> round(weight.item(), 4)
    0.6838
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float,
        rho: float = 0.9,
        eps: float = 1e-7,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "rho": rho, "eps": eps, "weight_decay": weight_decay})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient; ``closure`` computes the loss anew before it."""
        # step() itself runs without gradients; a closure needs them for its backward pass.
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            params = [parameter for parameter in group["params"] if parameter.grad is not None]
            if params:
                self._update(params, group)
        return loss

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in params:
            if not self.state[parameter]:
                self.state[parameter]["square_avg"] = torch.zeros_like(parameter)
        gradients = [gradient for parameter in params if (gradient := parameter.grad) is not None]
        means = [self.state[parameter]["square_avg"] for parameter in params]
        # Decoupled from the gradient, as in AdamW, and so it does not enter the mean of squares.
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1.0 - group["lr"] * group["weight_decay"])
        # The _foreach_ functions take all tensors at once, in place of a loop in Python.
        torch._foreach_mul_(means, group["rho"])
        torch._foreach_addcmul_(means, gradients, gradients, 1.0 - group["rho"])
        roots = torch._foreach_add(means, group["eps"])
        torch._foreach_sqrt_(roots)
        torch._foreach_addcdiv_(params, gradients, roots, -group["lr"])
