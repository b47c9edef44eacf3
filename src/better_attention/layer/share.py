"""The heads of a layer that one process computes, where several share the layer (tensor parallelism).

Every process holds whole heads. Learned projections bring their columns, because their weights are divided; what a
mechanism slices from the input is sliced here to the same heads. ``parallel/plan.py`` sets it up.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from better_attention.call.distributed import draws_of

if TYPE_CHECKING:
    from .multihead import MultiheadAttention


@dataclass(frozen=True, slots=True)
class HeadShare:
    """Heads ``first`` ... ``first + count - 1`` of a layer's, and who computes the others.

    Args:
        mesh: the ``DeviceMesh``, of one dimension, of the processes that share the layer.
        first, count: of the heads of this process.
    """

    mesh: Any
    first: int
    count: int

    @property
    def heads(self) -> slice:
        """Where they lie among all heads."""
        return slice(self.first, self.first + self.count)

    def mask(self, mask_BNLS: Tensor | None) -> Tensor | None:
        """A mask for these heads; one that is the same for all heads serves as it is."""
        return mask_BNLS if mask_BNLS is None or mask_BNLS.shape[1] == 1 else mask_BNLS[:, self.heads]

    def gathered(self, weights: Tensor | None) -> Tensor | None:
        """The weights (B, N, L, S) of all heads, for those who asked for them."""
        if weights is None:
            return None
        from torch.distributed.tensor import DTensor, Replicate, Shard

        whole = DTensor.from_local(weights, self.mesh, [Shard(1)], run_check=False)
        result: Tensor = whole.redistribute(placements=[Replicate()]).to_local()
        return result


def columns(layer: MultiheadAttention, q_BLD: Tensor, k_BSD: Tensor, v_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Projected query, key and value of the heads that this process has; one tensor that is two of them stays one."""
    share, learned = layer.share, layer.mechanism.projections
    if share is None:
        return q_BLD, k_BSD, v_BSD
    H = layer.head_dim
    here = slice(share.first * H, (share.first + share.count) * H)
    k = k_BSD if "k" in learned else k_BSD[..., here]
    # Both are slices of their input where neither is learned.
    v = k if v_BSD is k_BSD else v_BSD if "v" in learned else v_BSD[..., here]
    return q_BLD if "q" in learned else q_BLD[..., here], k, v


def draws(layer: MultiheadAttention, dropout_p: float, x: Tensor) -> AbstractContextManager[None]:
    """Under dropout, random numbers of this process's own: its heads drop independently of the others'."""
    share = layer.share
    return nullcontext() if share is None or dropout_p == 0.0 else draws_of(share.first, x.device)


def here(part: nn.Module, parameter: Tensor) -> Tensor:
    """The part of a parameter that this process computes with: the parameter itself in an ordinary layer.

    The gradient of what all processes hold is the sum of theirs, because each has heads of its own.

    Args:
        part: the module that owns the parameter; ``parallel/plan.py`` marks those that are divided.
        parameter: one of its parameters.
    """
    if not getattr(part, "divided", False):
        return parameter
    from torch.distributed.tensor import Partial

    whole: Any = parameter
    copies = [placement.is_replicate() for placement in whole.placements]
    if any(copies):
        # Its backward pass adds the sums up, so that the parameter's gradient is whole like the parameter.
        whole = whole.redistribute(placements=whole.placements)
    gradients = [Partial() if copy else place for copy, place in zip(copies, whole.placements, strict=True)]
    result: Tensor = whole.to_local(grad_placements=gradients)
    return result
