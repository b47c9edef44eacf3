"""The alignment kernel W_A: a learned linear map over positions, from the left, on the values."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from better_attention.cache.int8 import dequantised
from better_attention.call import masks
from better_attention.call.torch_private import check_when_run, transformed
from better_attention.call.torch_state import exporting, is_known_finite, zero_rows
from better_attention.errors import check_bool, check_choice, check_int
from better_attention.mechanism import Mechanism
from better_attention.native import align

from .part import Part, Sizes
from .share import here

if TYPE_CHECKING:
    from .multihead import MultiheadAttention

PIECE = 128
"""Positions of an int8 cache that are made numbers at a time."""

ALIGN_HEADS = ("shared", "per_head")
ALIGN_INITS = ("xavier", "identity")

# Lengths at which the compiled kernels beat torch's matrix product (benchmarks/results).
TRAINED = (64, 1024)
"""Shortest length in training, and the longest of a full W_A; a triangular one stays ahead."""
TRIANGULAR = 192
"""Shortest length of a triangular W_A in inference; a full one is torch's there."""


class Alignment(nn.Module):
    r"""Mixes value positions: :math:`V' = W_A V + a \mathbf{1}^\top` (2403.01643, definition 4).

    Shorter inputs use ``weight[:s, :s]`` and ``bias[:s]``; position j of the value is always column j.

    Args:
        max_len: largest number of value positions, the size of W_A.
        num_heads: number of heads of the values.
        heads: "shared", one W_A for all heads, or "per_head".
        causal: keep W_A lower triangular, so that no position receives a later one.
        init: "xavier" (Glorot uniform, Keras' default for such a map; the paper does not say) or "identity",
            which makes super start out as efficient.
        bias: whether there is a bias, one number per position (and head), added to every feature.
        compiled: whether the compiled CPU kernels may compute it where they are faster; they have a first derivative
            only.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: an argument out of range; in ``forward``, more than ``max_len`` positions.
        TypeError: an argument of the wrong kind.

    >>> Alignment(max_len=8, num_heads=2)(torch.zeros(3, 5, 6)).shape
    torch.Size([3, 5, 6])
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        max_len: int,
        num_heads: int,
        *,
        heads: str = "shared",
        causal: bool = False,
        init: str = "xavier",
        bias: bool = True,
        compiled: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.max_len = check_int(max_len, "max_len")
        self.num_heads = num_heads
        self.heads = check_choice(heads, "align_heads", ALIGN_HEADS)
        self.causal = check_bool(causal, "align_causal")
        self.compiled = check_bool(compiled, "compiled")
        self.init = check_choice(init, "align_init", ALIGN_INITS)
        sizes = (num_heads,) if heads == "per_head" else ()
        self.weight = nn.Parameter(torch.empty(*sizes, self.max_len, self.max_len, device=device, dtype=dtype))
        column = nn.Parameter(torch.empty(*sizes, self.max_len, device=device, dtype=dtype)) if bias else None
        # Registered where it is None too, as nn.Linear does: who looks at the parameters expects two.
        self.register_parameter("bias", column)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw W_A anew; its bias starts at zero."""
        with torch.no_grad():
            draw(self.weight, self.init)
            if self.causal:
                self.weight.tril_()
            if self.bias is not None:
                self.bias.zero_()

    def forward(self, value_BSD: Tensor, first: int = 0) -> Tensor:
        """Mix the positions of (B, S, D) values, D = heads x head width, head after head.

        Args:
            value_BSD: the values, (B, S, D).
            first: the first position that is wanted: the result is (B, S - first, D). Only a lower triangular W_A has
                results for a part of the positions that do not change when more are added.
        """
        self._check_fits(value_BSD)
        aligned_BSD = self._mix(value_BSD, first)
        # A full W_A mixes every position into every other: there NaN belongs everywhere.
        if self.causal and not is_known_finite(aligned_BSD):
            aligned_BSD = self._keep_apart(value_BSD, first)
        return aligned_BSD

    def _check_fits(self, value_BSD: Tensor) -> None:
        S = value_BSD.shape[1]
        if self.max_len < S:
            raise ValueError(
                f"this layer's W_A was built for max_len={self.max_len} but received {S} values "
                f"(shape {tuple(value_BSD.shape)}). Build with max_len >= {S}, shorten the input, "
                "or use 'efficient', which has no fixed length."
            )

    def _mix(self, value_BSD: Tensor, first: int) -> Tensor:
        S = value_BSD.shape[1]
        if first > 0:
            return self._mix_rows(value_BSD, first)
        weight, bias = self.sliced_to(S)
        if self._kernels_serve(weight, bias, value_BSD):
            shared = weight.dim() == 2
            column = None if bias is None else bias.squeeze(-1)[None] if shared else bias.squeeze(-1)
            return align.align(weight[None] if shared else weight, column, value_BSD, self.causal)
        if self.causal:
            # At each call, because loaded weights may fill the upper triangle; tril() keeps its gradient at 0.
            weight = weight.tril()
        if self.heads == "shared":
            aligned_BSD: Tensor = weight @ value_BSD
            return aligned_BSD if bias is None else aligned_BSD + bias
        # The batch becomes columns, so that each head's kernel is used as it is and not copied for every sample.
        (B, S, D), N = value_BSD.shape, len(weight)
        columns_NSC = value_BSD.reshape(B, S, N, D // N).permute(2, 1, 0, 3).reshape(N, S, B * (D // N))
        aligned_NSC: Tensor = weight @ columns_NSC
        if bias is not None:
            aligned_NSC = aligned_NSC + bias
        return aligned_NSC.reshape(N, S, B, D // N).permute(2, 1, 0, 3).reshape(B, S, D)

    def _mix_rows(self, value_BSD: Tensor, first: int) -> Tensor:
        """Positions from ``first`` on, (B, S - first, D): their rows of W_A alone, and no copy of the values."""
        rows, column = self._rows(value_BSD.shape[1], first)
        return _with_column(_times(rows, value_BSD), column)

    def of_codes(self, codes_BSD: Tensor, scale_BSN: Tensor, first: int, dtype: torch.dtype) -> Tensor:
        """The same of values that a cache holds in int8, of which a few positions at a time are made numbers.

        Args:
            codes_BSD, scale_BSN: the values, see :mod:`better_attention.cache.int8`.
            first: as for :meth:`forward`.
            dtype: of the numbers.
        """
        self._check_fits(codes_BSD)
        aligned_BLD = self._mix_codes(codes_BSD, scale_BSN, first, dtype)
        if not is_known_finite(aligned_BLD):
            bad_BS = ~scale_BSN.isfinite().all(dim=-1)
            clean_BSN = scale_BSN.masked_fill(bad_BS[..., None], 0.0)
            aligned_BLD = _spoiled(self._mix_codes(codes_BSD, clean_BSN, first, dtype), bad_BS, first)
        return aligned_BLD

    def _mix_codes(self, codes_BSD: Tensor, scale_BSN: Tensor, first: int, dtype: torch.dtype) -> Tensor:
        rows, column = self._rows(codes_BSD.shape[1], first)
        pieces = (x.split(PIECE, dim=1) for x in (codes_BSD, scale_BSN))
        total_BLD: Tensor | None = None
        for row, codes, scale in zip(rows.split(PIECE, dim=-1), *pieces, strict=True):
            part = _times(row, dequantised(codes, scale, dtype))
            total_BLD = part if total_BLD is None else total_BLD + part
        assert total_BLD is not None  # noqa: S101 - for the type checker
        return _with_column(total_BLD, column)

    def _rows(self, S: int, first: int) -> tuple[Tensor, Tensor | None]:
        """Rows of W_A from ``first`` on for S positions, and their bias as a column."""
        weight, bias = self.sliced_to(S)
        rows = weight[..., first:, :]
        if self.causal and S - first > 1:  # one row ends with its own position
            rows = rows.tril(first)
        return rows, None if bias is None else bias[..., first:, :]

    def _kernels_serve(self, weight: Tensor, bias: Tensor | None, value_BSD: Tensor) -> bool:
        if not self.compiled or not align.supported(weight, bias, value_BSD):
            return False
        if torch.compiler.is_compiling():
            # The length is symbolic, and comparing it would fix the program to one. Exported programs run without us.
            return self.causal and not exporting()
        trains = torch.is_grad_enabled() and (weight.requires_grad or value_BSD.requires_grad)
        S = value_BSD.shape[1]
        # The operator has no rule for vmap, see `batched` in operators/definition.py.
        if transformed():
            return False
        if trains:
            return TRAINED[0] <= S and (self.causal or TRAINED[1] >= S)
        return self.causal and S >= TRIANGULAR

    def is_plain(self, S: int) -> bool:
        """Whether this is one full matrix for all heads that ``S`` positions fit into."""
        return self.heads == "shared" and not self.causal and self.max_len >= S

    def sliced_to(self, S: int) -> tuple[Tensor, Tensor | None]:
        """The part of W_A for S positions, and of its bias as a column."""
        weight, bias = here(self, self.weight), None if self.bias is None else here(self, self.bias)
        if not torch.compiler.is_compiling():
            return weight[..., :S, :S], None if bias is None else bias[..., :S, None]
        # While tracing, a slice up to a symbolic S is taken to be shorter than the whole: S = max_len would be lost.
        positions = torch.arange(S, device=self.weight.device)
        weight = weight.index_select(-2, positions).index_select(-1, positions)
        return weight, None if bias is None else bias.index_select(-1, positions)[..., None]

    def _keep_apart(self, value_BSD: Tensor, first: int) -> Tensor:
        """With numbers that are not finite, 0 * NaN would carry them backwards: positions before them stay clean."""
        bad_BS = ~value_BSD.isfinite().all(dim=-1)
        return _spoiled(self._mix(zero_rows(value_BSD, bad_BS), first), bad_BS, first)

    def extra_repr(self) -> str:
        """Settings for ``print(module)``."""
        return (
            f"max_len={self.max_len}, heads={self.heads!r}, causal={self.causal}, init={self.init!r}, "
            f"bias={self.bias is not None}"
        )


def _spoiled(clean_BLD: Tensor, bad_BS: Tensor, first: int) -> Tensor:
    """Results without positions that are not finite, NaN for these and all behind them."""
    # Zeroing a position and marking its successors is enough: in a lower triangular W_A only those can receive it.
    return clean_BLD.masked_fill((bad_BS.cumsum(dim=-1) > 0)[:, first:, None], math.nan)


def _times(rows: Tensor, value_BSD: Tensor) -> Tensor:
    """Rows (L, S) of W_A, or (N, L, S) of one for each head, times the values: (B, L, D)."""
    if rows.dim() == 2:
        product: Tensor = rows @ value_BSD
        return product
    # Head after head, because one product over all of them would first copy the values.
    parts = [row @ part for row, part in zip(rows, value_BSD.chunk(len(rows), dim=-1), strict=True)]
    return torch.cat(parts, dim=-1)


def _with_column(x_BLD: Tensor, column: Tensor | None) -> Tensor:
    """With the bias (L, 1) added, or (N, L, 1) with one for each head."""
    if column is None:
        return x_BLD
    if column.dim() == 2:
        return x_BLD + column
    heads_BLNH: Tensor = x_BLD.unflatten(-1, (len(column), -1)) + column.transpose(0, 1)
    return heads_BLNH.flatten(-2)


def _products(sizes: Sizes) -> int:
    """W_A times the values; with a window, the weights of every query and head times their part of W_A and its bias."""
    if sizes.window is None:
        return 2 * sizes.length**2 * sizes.width("v")
    return 2 * sizes.num_heads * sum(seen * (seen + sizes.bias) for seen in sizes.seen)


def draw(weight: Tensor, init: str) -> None:
    """Draw W_A, or one for each head, (..., S, S): Glorot uniform or the identity. Without gradients."""
    size = weight.shape[-1]
    if init == "identity":
        weight.copy_(torch.eye(size, dtype=weight.dtype, device=weight.device))
        return
    bound = math.sqrt(6.0 / (2 * size))  # per kernel; nn.init would count the heads as inputs
    weight.uniform_(-bound, bound)


def check_alignment(
    mechanism: Mechanism, max_len: int | None, window: int | None, heads: str, causal: bool, init: str
) -> None:
    """Refuse settings of W_A where there is none, a W_A without its size, and one with two sizes.

    Raises:
        ValueError: any of them.
    """
    if mechanism.aligned and window is not None:
        if max_len is not None or causal:
            given = f"max_len={max_len}" if max_len is not None else "align_causal=True"
            raise ValueError(
                f"{given} and window={window} exclude each other: the W_A of a window is window x window, has no "
                "fixed length, and looks at no later token. Leave one of them out."
            )
        return
    if mechanism.aligned:
        if max_len is None:
            raise ValueError(
                f"mechanism {mechanism.name!r} needs max_len, the size of W_A: the longest value sequence. "
                "Pass max_len=..., or window=... for any length, or use 'efficient', which has no fixed length."
            )
        return
    defaults = {"max_len": None, "align_heads": "shared", "align_causal": False, "align_init": "xavier"}
    for (name, default), value in zip(defaults.items(), (max_len, heads, causal, init), strict=True):
        if value != default:
            raise ValueError(
                f"{name}={value!r} configures the alignment kernel W_A, which mechanism {mechanism.name!r} does not "
                f"use. Remove {name}, or choose 'super' or 'NAME+align'."
            )


def refuse_leak(layer: MultiheadAttention, mask_BNLS: Tensor | None, is_causal: bool) -> None:
    """Refuse a causal mask together with a W_A that mixes later values into earlier ones.

    Raises:
        ValueError: there is one; where a compiled program first sees the mask when it runs, RuntimeError there.
    """
    if not isinstance(layer.align, Alignment) or layer.align.causal:
        return
    if is_causal or (mask_BNLS is not None and masks.hides_the_future(mask_BNLS)):
        raise ValueError(_leak(layer.mechanism.name, "is_causal=True" if is_causal else "a causal attn_mask"))
    if mask_BNLS is not None and torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting():
        # The mask's values are known when the compiled code runs: the question becomes part of it.
        conditions = masks.triangle_conditions(mask_BNLS)
        if conditions:
            causal = torch.stack([condition() for condition in conditions]).all()
            check_when_run(~causal, _leak(layer.mechanism.name, "a causal attn_mask"))


def _leak(mechanism: str, received: str) -> str:
    return (
        f"mechanism {mechanism!r} received {received}, but its W_A mixes every value position, later ones included, "
        "into every other before any mask applies: the future would leak. Build the layer with align_causal=True, "
        "which keeps W_A lower triangular."
    )


def _kernels(sizes: Sizes) -> int:
    per_head = sizes.num_heads if sizes.value_heads is None else sizes.value_heads
    return per_head if sizes.align_heads == "per_head" else 1


ALIGNMENT_PART = Part(
    symbol="W_A",
    module="align",
    stream="v",
    label="Linear* W_A",
    legend="Linear*: a learned map with a bias, from the left: it mixes tokens.",
    add=lambda mechanism: replace(mechanism, aligned=True),
    params=lambda sizes: _kernels(sizes) * (sizes.align_size**2 + sizes.bias * sizes.align_size),
    flops=lambda sizes: _products(sizes),
    term=lambda factor: f"W^A {factor}",
)
"""What W_A counts and how it is drawn."""
