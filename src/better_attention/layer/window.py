r"""W_A of a sliding window: super attention for sequences of any length, in time and memory O(L w).

Query t sees the last w tokens, and W_A acts on exactly these:
:math:`H_t = s_t (W_A V_{t-w+1 \ldots t} + a \mathbf{1}^\top)`, with :math:`s_t` the w weights of query t. W_A is
therefore applied to the weights, :math:`\tilde s_t = s_t W_A`, which then mix the w values: no aligned value exists
that later queries could share, and none has to be remembered. Places in the window are counted from its
end: the token itself has the last row and column of W_A, also near the beginning, where a window has fewer tokens.

Source: arXiv 2403.01643, definition 4 and its first limitation, which names the sliding window; the form is ours.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from better_attention.call.call import Call, compute_dtype
from better_attention.call.torch_state import exporting, is_known_finite
from better_attention.dropout import dropout
from better_attention.errors import check_choice, check_int
from better_attention.impl.dispatch import attend as attend_without_alignment
from better_attention.impl.dispatch import not_finite, without
from better_attention.impl.reference import bias_and_hidden
from better_attention.mechanism import Mechanism
from better_attention.scores import SCORES

from .alignment import ALIGN_HEADS, ALIGN_INITS, draw
from .calling import called
from .share import here

if TYPE_CHECKING:
    from .multihead import MultiheadAttention

BLOCK = 32
"""Queries that are computed together, at least: one product for many short windows."""


class WindowAlignment(nn.Module):
    r"""W_A of a window, applied to weights: :math:`\tilde s = s W_A`, and :math:`s \cdot a` for its bias.

    Args:
        window: w, the size of W_A.
        num_heads: number of heads that the values have; a multiple of it have weights.
        heads: "shared", one W_A for all heads, or "per_head".
        init: "xavier" or "identity", with which super is efficient attention with a window.
        bias: whether there is a bias, one number per place in the window (and head).
        device: of the parameters.
        dtype: of the parameters.

    >>> WindowAlignment(4, 2)(torch.zeros(3, 2, 7, 4)).shape
    torch.Size([3, 2, 7, 5])
    """

    def __init__(
        self,
        window: int,
        num_heads: int,
        *,
        heads: str = "shared",
        init: str = "xavier",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.window = check_int(window, "window")
        self.heads = check_choice(heads, "align_heads", ALIGN_HEADS)
        self.init = check_choice(init, "align_init", ALIGN_INITS)
        sizes = (num_heads,) if heads == "per_head" else ()
        self.weight = nn.Parameter(torch.empty(*sizes, self.window, self.window, device=device, dtype=dtype))
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(torch.empty(*sizes, self.window, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw W_A anew; its bias starts at zero."""
        with torch.no_grad():
            draw(self.weight, self.init)
            if self.bias is not None:
                self.bias.zero_()

    def forward(self, weights_BNLW: Tensor) -> Tensor:
        """(B, N, L, w) weights to (B, N, L, w + 1): those of the values, and what is added to every feature."""
        # One product for both: the bias is one more column.
        matrix = here(self, self.weight)
        if self.bias is not None:
            matrix = torch.cat([matrix, here(self, self.bias)[..., None]], dim=-1)
        matrix, N = matrix.to(weights_BNLW.dtype), weights_BNLW.shape[1]
        if matrix.dim() == 3 and len(matrix) != N:  # one for each head of values, which several of queries share
            mixing = (weights_BNLW.unflatten(1, (len(matrix), -1)) @ matrix[:, None]).flatten(1, 2)
        else:
            mixing = weights_BNLW @ matrix
        return mixing if self.bias is not None else F.pad(mixing, (0, 1))

    def extra_repr(self) -> str:
        """Settings for ``print(module)``."""
        return f"window={self.window}, heads={self.heads!r}, init={self.init!r}, bias={self.bias is not None}"


def check_window(mechanism: Mechanism, window: int | None, *, extra: bool) -> None:
    """Refuse keys that stand behind the sequence together with a W_A in whose windows they have no place.

    Raises:
        ValueError: both.
    """
    if extra and window is not None and mechanism.aligned:
        raise ValueError(
            f"add_bias_kv and add_zero_attn add keys that stand outside every window, but the W_A of mechanism "
            f"{mechanism.name!r} with window={window} acts on the places of a window. Leave them out, or the window."
        )


def aligned_values(layer: MultiheadAttention, v_BSD: Tensor, first: int = 0) -> Tensor:
    """Values from position ``first`` on, mixed by W_A; with a window, where W_A acts on weights, as they are."""
    if isinstance(layer.align, WindowAlignment):
        return v_BSD
    # Called also where it is the identity, so that hooks on `align` see the values of every mechanism.
    return called(layer.align, v_BSD, "align (W_A)", *((first,) if first else ()))


def attend(layer: MultiheadAttention, call: Call) -> tuple[Tensor, Tensor | None]:
    """The heads (B, N, L, H) of a validated call, and its weights or None, for any layer.

    Raises:
        ValueError: an implementation that cannot compute the call.
    """
    if not isinstance(layer.align, WindowAlignment):
        return attend_without_alignment(call, layer.impl)
    if layer.impl not in ("auto", "reference"):
        raise ValueError(
            f"impl={layer.impl!r} cannot compute super attention with a window, which changes the weights before they "
            "mix the values. Build the layer with impl='auto'."
        )
    heads_BNLH, weights = _attend(layer.align, call)
    if not is_known_finite(heads_BNLH):
        heads_BNLH, weights = _keep_apart(layer.align, call, heads_BNLH, weights)
    return heads_BNLH, weights


def _attend(align: WindowAlignment, call: Call) -> tuple[Tensor, Tensor | None]:
    call = call.with_repeated_heads()
    if not exporting() and call.q_BNLH.shape[2] == 0:
        # No block, so that nothing could be unfolded; a program is exported for any length.
        weights = call.q_BNLH @ call.k_BNSH.mT if call.need_weights else None
        # As wide as values: queries have two more features with ALiBi in the score.
        return call.q_BNLH.new_empty(*call.q_BNLH.shape[:3], call.v_BNSH.shape[3]), weights
    dtype = compute_dtype(call.q_BNLH.dtype)
    bands = _Bands.of(call, align.window)
    # Each block of queries against the keys of its windows: (B, N, blocks, rows, keys), zero outside of them.
    weights = SCORES[call.score].weights(
        bands.queries(call.q_BNLH.to(dtype) * call.scale), bands.keys(call.k_BNSH.to(dtype)), *bands.restrictions(dtype)
    )
    if call.dropout_p > 0.0:
        weights = dropout(weights, call.dropout_p)
    mixing = called(align, bands.to_windows(weights), "align (W_A)")
    values = bands.keys(call.v_BNSH.to(dtype))
    heads = bands.from_windows(mixing[..., :-1]) @ values + bands.in_blocks(mixing[..., -1:])
    heads_BNLH = bands.rows(heads).to(call.q_BNLH.dtype)
    return heads_BNLH, bands.dense(weights).to(call.q_BNLH.dtype) if call.need_weights else None


class _Bands:
    """The windows of all queries as blocks: ``rows`` queries and the ``rows + window`` keys that any of them sees.

    Query i of a block sees keys i + 1 ... i + window of it. Keys before the first token and behind the last stand in
    the blocks as zeros, and are hidden.
    """

    def __init__(self, call: Call, window: int, rows: int) -> None:
        self.call, self.window, self.size = call, window, rows
        self.L, self.S = call.q_BNLH.shape[2], call.k_BNSH.shape[2]
        self.blocks = -(-self.L // rows)
        device = call.q_BNLH.device
        # Position among the keys: of every query of a block, and of every key.
        self.places = torch.arange(self.blocks * rows, device=device).view(self.blocks, rows) + call.offset
        self.at = self.places[:, :1] - window + torch.arange(rows + window, device=device)

    @classmethod
    def of(cls, call: Call, window: int) -> _Bands:
        """Blocks about as long as the window: half of what they compute is then wanted, whatever the length."""
        if exporting():
            # One program for every length: the number of blocks is then the number of queries.
            return cls(call, window, 1)
        rows = max(window, BLOCK)
        # A compiler has no number yet to compare with.
        return cls(call, window, rows if torch.compiler.is_compiling() else max(1, min(call.q_BNLH.shape[2], rows)))

    def queries(self, q_BNLH: Tensor) -> Tensor:
        """Queries in blocks, (B, N, blocks, rows, H)."""
        # Contiguous, because a compiler takes the memory order of what it saw for that of every length, and padding
        # by nothing, which some lengths need, keeps the order of its input.
        padded = F.pad(q_BNLH.contiguous(), (0, 0, 0, self.blocks * self.size - self.L))
        return padded.unflatten(2, (self.blocks, self.size))  # type: ignore[no-any-return]

    def keys(self, x_BNSH: Tensor) -> Tensor:
        """Keys or values in blocks, (B, N, blocks, rows + window, H)."""
        first = self.call.offset - self.window
        last = self.call.offset + self.blocks * self.size
        # A negative number cuts off what no block needs.
        padded = F.pad(x_BNSH, (0, 0, -first, last - self.S))
        windows = padded.unfold(2, self.size + self.window, self.size).transpose(-1, -2)
        # The products would copy what overlaps in any case, and a compiler cannot see that they have to.
        return windows.contiguous() if torch.compiler.is_compiling() else windows

    def restrictions(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
        """What is added to log weights, and what is hidden; broadcastable to (B, N, blocks, rows, keys)."""
        places, at = self.places[:, :, None], self.at[:, None]
        seen = (at <= places) & (at > places - self.window) & (at >= 0) & (at < self.S)
        cut = [None if mask is None else self._cut(mask) for mask in (self.call.mask_BNLS, self.call.padding_B11S)]
        # The triangle is in `seen` already.
        masks = replace(self.call, mask_BNLS=cut[0], padding_B11S=cut[1], causal=False)
        bias, hide = bias_and_hidden(masks, dtype)
        return bias, ~seen[None, None] if hide is None else hide | ~seen

    def _cut(self, mask: Tensor) -> Tensor:
        """A mask (B|1, N|1, L|1, S|1) in blocks."""
        rows = (self.places - self.call.offset).clamp(max=self.L - 1)[:, :, None]
        columns = self.at.clamp(0, max(0, self.S - 1))[:, None, :]
        return mask[:, :, rows if mask.shape[2] > 1 else rows * 0, columns if mask.shape[3] > 1 else columns * 0]

    def to_windows(self, weights: Tensor) -> Tensor:
        """Weights of blocks by place in the window, (B, N, blocks rows, window)."""
        # Row i begins i + 1 further right: read with a row one longer than it is, every row begins in one column.
        rows, keys = self.size, self.size + self.window
        flat = F.pad(weights.flatten(-2)[..., 1:], (0, rows + 1))
        return flat.unflatten(-1, (rows, keys + 1))[..., : self.window].flatten(2, 3)  # type: ignore[no-any-return]

    def from_windows(self, mixing: Tensor) -> Tensor:
        """The reverse, zero outside the windows."""
        rows, keys = self.size, self.size + self.window
        flat = F.pad(self.in_blocks(mixing), (0, keys + 1 - self.window)).flatten(-2)
        return F.pad(flat, (1, -rows - 1)).unflatten(-1, (rows, keys))  # type: ignore[no-any-return]

    def in_blocks(self, x: Tensor) -> Tensor:
        """(B, N, blocks rows, ...) as (B, N, blocks, rows, ...)."""
        return x.unflatten(2, (self.blocks, self.size))  # type: ignore[no-any-return]

    def rows(self, heads: Tensor) -> Tensor:
        """Blocks one after the other, (B, N, L, ...)."""
        return heads.flatten(2, 3)[:, :, : self.L]

    def dense(self, weights: Tensor) -> Tensor:
        """All weights, (B, N, L, S)."""
        B, N = weights.shape[:2]
        whole = weights.new_zeros(B, N, self.blocks * self.size, self.S + 1)
        # What stands for no key goes to one column more, which is cut off.
        column = torch.where((self.at >= 0) & (self.at < self.S), self.at, self.S)
        column = column[:, None].expand(self.blocks, self.size, -1).flatten(0, 1)
        whole = whole.scatter_add(3, column.expand(B, N, -1, -1), weights.flatten(2, 3))
        return whole[:, :, : self.L, : self.S]


def _keep_apart(
    align: WindowAlignment, call: Call, heads_BNLH: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Redo a call whose keys or values are not all finite: only queries with those in their window become NaN."""
    call = call.with_even_heads()
    bad_BNS = not_finite(call)
    if bad_BNS is None:  # then a query brought them, whose own row they are
        return heads_BNLH, weights
    heads_BNLH, weights = _attend(align, without(call, bad_BNS))
    (B, N, L, _), S = call.q_BNLH.shape, call.k_BNSH.shape[2]
    bad_BNS = bad_BNS.repeat_interleave(N // max(1, bad_BNS.shape[1]), dim=1)
    # W_A carries every value of a window into every result, whatever a mask hides.
    counts = F.pad(bad_BNS.cumsum(dim=-1), (1, 0))
    last = torch.arange(call.offset + 1, call.offset + L + 1, device=bad_BNS.device)
    in_window = counts[..., last.clamp(max=S)] - counts[..., (last - align.window).clamp(0, S)]
    spoiled = (in_window > 0)[..., None].expand(B, N, L, 1)
    return heads_BNLH.masked_fill(spoiled, math.nan), None if weights is None else weights.masked_fill(
        spoiled, math.nan
    )
