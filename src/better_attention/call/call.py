"""One validated attention call: what every implementation is asked, and what each of them answers.

Shape suffixes, here and everywhere below: B batch, L queries, S keys, N heads, H head width, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from better_attention.scores import DEFAULT_SCORE


@dataclass(frozen=True, slots=True)
class Call:
    """Inputs of one attention call after validation, in one form for every implementation.

    Args:
        q_BNLH, k_BNSH, v_BNSH: 4-D, same dtype and device. With grouped queries (GQA) k and v have fewer
            heads, and N is a multiple of theirs; k may have fewer than v, whose number is then a multiple. The head
            width of v may differ.
        mask_BNLS: broadcastable to (B, N, L, S); bool, True = attend, or a float added in log-weight space.
        padding_B11S: the same for whole keys, (B, 1, 1, S); kept apart so that merging never needs (B, N, L, S).
        causal: query l sees keys s <= l + offset only, besides what the masks allow.
        offset: position of the first query among the keys; 0 without ``causal``.
        window: under ``causal``, how many keys a query sees at most, its own position the last; None: any number.
        score: a key of :data:`better_attention.scores.SCORES`.
        scale: factor on q.k.
        dropout_p: probability of dropping a weight.
        need_weights: whether the weights themselves are wanted.
    """

    q_BNLH: Tensor
    k_BNSH: Tensor
    v_BNSH: Tensor
    mask_BNLS: Tensor | None = None
    padding_B11S: Tensor | None = None
    causal: bool = False
    offset: int = 0
    window: int | None = None
    score: str = DEFAULT_SCORE
    scale: float = 1.0
    dropout_p: float = 0.0
    need_weights: bool = False

    @property
    def restricted(self) -> bool:
        """Whether any key may be hidden from any query."""
        return self.causal or self.mask_BNLS is not None or self.padding_B11S is not None

    @property
    def banded(self) -> bool:
        """Whether the triangle is another than the top-left one of all keys."""
        return self.offset != 0 or self.window is not None

    @property
    def masks(self) -> list[Tensor]:
        """The masks that were given, zero to two of them."""
        return [m for m in (self.mask_BNLS, self.padding_B11S) if m is not None]

    @property
    def tensors(self) -> dict[str, Tensor | None]:
        """Every tensor by the name under which the user knows it."""
        return {
            "query": self.q_BNLH,
            "key": self.k_BNSH,
            "value": self.v_BNSH,
            "attn_mask": self.mask_BNLS,
            "key_padding_mask": self.padding_B11S,
        }

    def trimmed(self) -> Call:
        """The same call without the keys that no query can see, and without a triangle that hides nothing.

        One query at the end of a cache, the usual step of a decoder, becomes a call without restrictions. Calls that
        want the weights of all keys stay as they are.
        """
        if not self.banded or self.need_weights:
            return self
        L, S = self.q_BNLH.shape[2], self.k_BNSH.shape[2]
        first = 0 if self.window is None else min(S, max(0, self.offset - self.window + 1))
        last = min(S, self.offset + L)
        k_BNSH = self.k_BNSH[:, :, first:last]
        cut = replace(
            self,
            k_BNSH=k_BNSH,
            v_BNSH=k_BNSH if self.v_BNSH is self.k_BNSH else self.v_BNSH[:, :, first:last],
            mask_BNLS=_columns(self.mask_BNLS, first, last),
            padding_B11S=_columns(self.padding_B11S, first, last),
            offset=self.offset - first,
        )
        # Something is hidden unless the first query sees the last key, and the last query the first key.
        if last - 1 > self.offset or (self.window is not None and self.offset + L - self.window > first):
            return cut
        return replace(cut, causal=False, offset=0, window=None)

    def with_repeated_heads(self) -> Call:
        """The same call with k and v repeated to N heads (a no-op without grouped queries)."""
        return self._with_heads(self.q_BNLH.shape[1])

    def with_even_heads(self) -> Call:
        """The same call with k repeated to the heads of v (a no-op where they have the same number)."""
        return self if self.v_BNSH is self.k_BNSH else self._with_heads(self.v_BNSH.shape[1])

    def _with_heads(self, count: int) -> Call:
        """k and v of ``count`` heads. Neighbours share one, as in torch's enable_gqa: n reads n // groups."""
        k_BNSH = _repeated(self.k_BNSH, count)
        v_BNSH = k_BNSH if self.v_BNSH is self.k_BNSH else _repeated(self.v_BNSH, count)
        return self if k_BNSH is self.k_BNSH and v_BNSH is self.v_BNSH else replace(self, k_BNSH=k_BNSH, v_BNSH=v_BNSH)


def _repeated(x_BGSH: Tensor, count: int) -> Tensor:
    # max() guards an empty head dimension, which would divide by zero.
    groups = count // max(1, x_BGSH.shape[1])
    if groups == 1:
        return x_BGSH
    if torch.compiler.is_compiling():
        # repeat_interleave() compares strides of a symbolic length, more than torch.export can prove.
        return torch.cat([head.expand(-1, groups, -1, -1) for head in x_BGSH.split(1, dim=1)], dim=1)
    return x_BGSH.repeat_interleave(groups, dim=1)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A float mask in ``dtype``: widened as it is, narrowed so that what is finite stays finite.

    float64's lowest number would become -inf in float32, and hide where it was only a large bias.
    """
    if mask.dtype == dtype:
        return mask
    # float16 and bfloat16 meet in float32, because neither contains the other: the clamp below applies both ways.
    wide = torch.promote_types(mask.dtype, dtype)
    if wide == dtype:
        return mask.to(dtype)
    limits = torch.finfo(dtype)
    # Clamped before the conversion, because afterwards what is too large is infinite already.
    narrow = mask.to(wide).clamp(limits.min, limits.max).to(dtype)
    # The clamp made -inf finite as well, but -inf hides a key, where the lowest number may be only a large bias.
    return narrow.masked_fill(mask == -torch.inf, -torch.inf)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute weights in: 16-bit formats lose z**2 and long sums, so they compute in float32."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _columns(mask: Tensor | None, first: int, last: int) -> Tensor | None:
    """A mask for keys ``first`` to ``last`` alone; one that is the same for all keys serves as it is."""
    return mask if mask is None or mask.shape[-1] == 1 else mask[..., first:last]


def band(places: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Bool (len(places), len(keys)), True where the query at ``places[i]`` sees key ``keys[j]`` under the triangle.

    Args:
        places: positions of queries among all keys.
        keys: positions of keys.
        window: see :class:`Call`.
    """
    seen = keys <= places[:, None]
    return seen if window is None else seen & (keys > places[:, None] - window)
