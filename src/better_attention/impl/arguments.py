"""What the operators of the implementations chunked, native and triton are called with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from better_attention.call.call import Call
from better_attention.dropout import drawn_seed

NOT_BY_SAMPLE = "its dropout cannot follow the samples of a batch"
NO_DROPOUT = "under torch.func it has no dropout: one seed would be one mask for a whole vmap"


class Arguments(NamedTuple):
    """A :class:`Call` as an operator takes it.

    Args:
        q, k: (B, N, L, H) and (B, G, S, H).
        v: (B, G, S, W); None: k serves as v, too, and the gradient of k is that of both.
        mask, padding: as in :class:`Call`.
        seed: from which follows what is dropped, see :func:`better_attention.dropout.drawn_seed`; None: nothing is.
        causal, offset, window, score, scale, dropout_p: as in :class:`Call`.
    """

    q: Tensor
    k: Tensor
    v: Tensor | None
    mask: Tensor | None
    padding: Tensor | None
    seed: Tensor | None
    causal: bool
    offset: int
    window: int | None
    score: str
    scale: float
    dropout_p: float

    @classmethod
    def of(cls, call: Call, *, share: bool = False) -> Arguments:
        """The arguments for a call.

        Args:
            call: the call. Its seed is drawn from the CPU's default generator, which ``torch.manual_seed`` and
                activation checkpointing control.
            share: whether to leave out v where it is k.
        """
        return cls(
            call.q_BNLH,
            call.k_BNSH,
            None if share and call.v_BNSH is call.k_BNSH else call.v_BNSH,
            call.mask_BNLS,
            call.padding_B11S,
            drawn_seed() if call.dropout_p > 0.0 else None,
            call.causal,
            call.offset,
            call.window,
            call.score,
            call.scale,
            call.dropout_p,
        )

    @property
    def values(self) -> Tensor:
        """v, or k where it serves as v."""
        return self.k if self.v is None else self.v


def flops(q: Sequence[int], k: Sequence[int], v: Sequence[int] | None) -> int:
    """Floating-point operations of a forward pass, from the shapes of q, k and v; a multiply-add counts as two.

    As in :func:`better_attention.cost`: the two products, every key of every query, hidden or not. Scores that an
    implementation computes again in its backward pass are not counted.
    """
    B, N, L, H = q
    return 2 * B * N * L * k[2] * (H + (k if v is None else v)[3])
