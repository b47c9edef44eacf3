"""What torch.nn.MultiheadAttention takes, checked and brought into the one form that the layer computes with.

Shape suffixes: B batch, L queries, S keys, N heads, H head width, D model width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from better_attention.call.masks import NEARLY_HIDDEN, check_mask, without_repeats
from better_attention.call.torch_state import autocast_dtype
from better_attention.errors import describe
from better_attention.mechanism import Mechanism
from better_attention.scores import SCORES
from better_attention.tensors import floating_tensor

from .alignment import refuse_leak

if TYPE_CHECKING:
    from .multihead import MultiheadAttention


class Arguments(NamedTuple):
    """The arguments of ``torch.nn.MultiheadAttention.forward``, as they came."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_padding_mask: Tensor | None
    need_weights: bool
    attn_mask: Tensor | None
    average_attn_weights: bool
    is_causal: bool


class Inputs(NamedTuple):
    """The same after validation.

    Args:
        query_BLD, key_BSD, value_BSD: batched, batch first; padded keys and values are zero.
        mask_BNLS: bool, True = attend, or a float added to the log weights; broadcastable to (B, N, L, S).
        padding_B11S: the same for whole keys.
        padded_BS1: True where W_V's bias makes a padded value non-zero again before W_A mixes it into others.
        causal: whether query l sees keys s <= l + offset only.
        offset: position of the first query among the keys.
        need_weights: whether the weights are wanted.
        average: whether the weights are wanted averaged over heads.
        is_self: whether query, key and value were one tensor.
        batched: whether the query came with a batch dimension.
        batch_first: whether that was the first.
    """

    query_BLD: Tensor
    key_BSD: Tensor
    value_BSD: Tensor
    mask_BNLS: Tensor | None
    padding_B11S: Tensor | None
    padded_BS1: Tensor | None
    causal: bool
    offset: int
    need_weights: bool
    average: bool
    is_self: bool
    batched: bool
    batch_first: bool

    def with_zero_padding(self, v_BSD: Tensor) -> Tensor:
        """Projected values, padded ones zero where W_A would mix them into others."""
        return v_BSD if self.padded_BS1 is None else v_BSD.masked_fill(self.padded_BS1, 0.0)

    def returned(self, output: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """What ``forward`` returns.

        Args:
            output: batched, in the caller's order of dimensions.
            weights: (B, N, L, S), or None where they are not wanted.
        """
        if weights is not None and self.average:
            weights = weights.mean(dim=1)
        if self.batched:
            return output, weights
        return output.squeeze(0 if self.batch_first else 1), None if weights is None else weights[0]


def read(layer: MultiheadAttention, given: Arguments) -> Inputs:
    """Check what ``layer`` was called with.

    Raises:
        TypeError, ValueError: inputs that do not fit the layer or one another; a causal mask on a full W_A.
    """
    widths = (layer.embed_dim, layer.kdim, layer.vdim)
    query, key, value = given.query, given.key, given.value
    query_BLD, key_BSD, value_BSD = sequences(query, key, value, widths=widths, batch_first=layer.batch_first)
    check_placement(query, key, value)
    batched = query.dim() == 3
    mask_BNLS = padding_B11S = padded_BS1 = None
    if given.attn_mask is not None or given.key_padding_mask is not None:
        sizes = (query_BLD.shape[0], layer.num_heads, query_BLD.shape[1], key_BSD.shape[1])
        mask_BNLS, padding_B11S = torch_masks(
            given.attn_mask, given.key_padding_mask, sizes, batched=batched, device=query.device
        )
    if given.is_causal or mask_BNLS is not None:
        refuse_leak(layer, mask_BNLS, given.is_causal)
    if padding_B11S is not None:
        # Keys and values become zero before they are projected, because a projection would spread their NaN over a row.
        padded_BS1 = padded_positions(padding_B11S, layer.mechanism)
        key_BSD, value_BSD = zero_padding(key_BSD, value_BSD, padded_BS1)
        if not (layer.mechanism.aligned and "v" in layer.mechanism.projections):
            padded_BS1 = None
    return Inputs(
        query_BLD,
        key_BSD,
        value_BSD,
        mask_BNLS,
        padding_B11S,
        padded_BS1,
        # A window is one of earlier tokens.
        given.is_causal or layer.window is not None,
        0,
        given.need_weights,
        given.average_attn_weights,
        key is query and value is key,
        batched,
        layer.batch_first,
    )


_NAMES, _WIDTHS = ("query", "key", "value"), ("embed_dim", "kdim", "vdim")


def sequences(
    query: Tensor, key: Tensor, value: Tensor, *, widths: tuple[int, int, int], batch_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value as (B, length, width); one tensor passed as key and value comes back as one.

    Args:
        query, key, value: (length, B, width), or (B, length, width) with ``batch_first``, or (length, width).
        widths: the widths the layer was built for.
        batch_first: which of the batched layouts is meant.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: shapes that do not fit the layer or one another.
    """
    floating_tensor(query, "query")
    # In self-attention, the most frequent call, one look at the tensor is enough.
    if key is not query:
        floating_tensor(key, "key")
    if value is not key:
        floating_tensor(value, "value")
    rank = query.dim()

    def received() -> str:  # built only when something is wrong: torch.compile cannot format symbolic sizes
        return ", ".join(f"{n} {tuple(x.shape)}" for n, x in zip(_NAMES, (query, key, value), strict=True))

    if rank not in (2, 3) or key.dim() != rank or value.dim() != rank:
        layout = "(B, L, D)" if batch_first else "(L, B, D)"
        raise ValueError(f"expected query, key and value all {layout} or all unbatched (L, D), received {received()}.")
    for name, x, argument, width in zip(_NAMES, (query, key, value), _WIDTHS, widths, strict=True):
        if x.shape[-1] != width:
            raise ValueError(f"{name} must have last size {argument}={width}, received {received()}.")
    batch_dim = 0 if batch_first else 1
    if key.shape[:-1] != value.shape[:-1] or (rank == 3 and query.shape[batch_dim] != key.shape[batch_dim]):
        raise ValueError(
            f"key and value must have one length, and all inputs one batch size (dimension {batch_dim} with "
            f"batch_first={batch_first}), received {received()}."
        )

    def ready(x: Tensor) -> Tensor:
        return x.unsqueeze(0) if rank == 2 else x if batch_first else x.transpose(0, 1)

    key_BSD = ready(key)
    return ready(query), key_BSD, key_BSD if value is key else ready(value)


def check_placement(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Refuse inputs on different devices, or (except under autocast) of different dtypes.

    Whether the weights fit is checked where each sub-module is called: they may be offloaded, quantised, sharded or
    cast at that moment.

    Raises:
        ValueError: devices differ.
        TypeError: dtypes differ.
    """
    if not query.device == key.device == value.device:
        raise ValueError(
            f"query, key and value must be on one device, received query on {query.device}, key on {key.device}, "
            f"value on {value.device}. Move them with .to(device)."
        )
    # Autocast converts inputs of linear maps itself, so that a mixture is no mistake there.
    if not query.dtype == key.dtype == value.dtype and autocast_dtype(query.device.type) is None:
        raise TypeError(
            f"query, key and value must have one dtype, received query {query.dtype}, key {key.dtype}, value "
            f"{value.dtype}. Convert them with .to(dtype), or use torch.autocast."
        )


def torch_masks(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    sizes: tuple[int, int, int, int],
    *,
    batched: bool,
    device: torch.device,
) -> tuple[Tensor | None, Tensor | None]:
    """Torch's mask forms (bool True = hide) in the internal one (True = attend).

    Args:
        attn_mask: (L, S) or (B N, L, S).
        key_padding_mask: (B, S), or (S) if not ``batched``.
        sizes: (B, N, L, S).
        batched: whether the user's tensors have a batch dimension.
        device: where the inputs are.

    Returns:
        A mask broadcastable to (B, N, L, S) and a padding (B, 1, 1, S), each None where not given.

    Raises:
        TypeError, ValueError: a mask of another kind or shape.
    """
    B, N, L, S = sizes
    mask_BNLS = padding_B11S = None
    if attn_mask is not None:
        mask = check_mask(attn_mask, "attn_mask", one_means="hide", device=device)
        # No broadcasting here: torch's layer accepts exactly these shapes, and a wrong one is usually a mix-up.
        if tuple(mask.shape) not in ((L, S), (B * N, L, S)):
            raise ValueError(
                f"attn_mask must be (L, S) = {(L, S)} or ({'B h' if batched else 'h'}, L, S) = {(B * N, L, S)}, "
                f"received {describe(mask)}.{_hint(mask, sizes)}"
            )
        # torch counts the first dimension of (B h, L, S) head after head within a sample, hence the plain reshape.
        mask_BNLS = without_repeats(mask[None, None] if mask.dim() == 2 else mask.reshape(B, N, L, S))
        # Inverted after the repeats are cut away, which keeps the copy as small as what the mask says.
        mask_BNLS = ~mask_BNLS if mask.dtype == torch.bool else mask_BNLS
    if key_padding_mask is not None:
        padding = check_mask(key_padding_mask, "key_padding_mask", one_means="hide", device=device)
        if tuple(padding.shape) != ((B, S) if batched else (S,)):
            expected = f"(B, S) = {(B, S)}" if batched else f"(S,) = {(S,)}"
            raise ValueError(f"key_padding_mask must be {expected}, received {describe(padding)}.")
        padding_B11S = (~padding if padding.dtype == torch.bool else padding).reshape(B, 1, 1, S)
    return mask_BNLS, padding_B11S


def _hint(mask: Tensor, sizes: tuple[int, int, int, int]) -> str:
    """What to do with a mask in another library's form, where it is recognised."""
    B, N, L, S = sizes
    negated = mask.dtype == torch.bool
    mask_text = "~mask" if negated else "mask"
    meaning = (
        " As in torch.nn.MultiheadAttention, True = hide here; masks of four dimensions, as of "
        "F.scaled_dot_product_attention, usually mean True = attend."
        if negated
        else ""
    )
    if mask.dim() == 4 and all(m in (1, s) for m, s in zip(mask.shape, sizes, strict=True)):
        return f"{meaning} If so, pass ({mask_text}).expand({B}, {N}, {L}, {S}).flatten(0, 1)."
    if mask.dim() == 3 and tuple(mask.shape) in ((B, L, S), (B, 1, S)):
        expanded = f"mask.expand({B}, {L}, {S}).repeat_interleave({N}, dim=0)"
        return f" One mask for each sample is repeated for its heads: {expanded}."
    if tuple(mask.shape) == (B, S):
        return " A mask of whole keys goes to key_padding_mask (bool: True = hide)."
    return meaning if mask.dim() == 4 else ""


def padded_positions(padding_B11S: Tensor, mechanism: Mechanism) -> Tensor:
    """Which keys are hidden from every query, (B, S, 1)."""
    padding_BS1 = padding_B11S[:, 0, 0, :, None]
    if padding_BS1.dtype == torch.bool:
        return ~padding_BS1
    if mechanism.aligned:
        # W_A mixes before any mask applies, so a value that is hidden only nearly would reach the others in full.
        return padding_BS1 <= NEARLY_HIDDEN
    # A score may add the dtype's lowest number like any other: it hides all the same, unless a sample has nothing else.
    lowest = padding_BS1 <= torch.finfo(padding_BS1.dtype).min
    return (lowest & ~lowest.all(dim=1, keepdim=True)) | SCORES[mechanism.score].hides(padding_BS1)


def zero_padding(key_BSD: Tensor, value_BSD: Tensor, padded_BS1: Tensor) -> tuple[Tensor, Tensor]:
    """Padded keys and values as zeros: W_A would mix them into others, and 0 * NaN is NaN in any mechanism."""
    zeroed = key_BSD.masked_fill(padded_BS1, 0.0)
    return zeroed, zeroed if value_BSD is key_BSD else value_BSD.masked_fill(padded_BS1, 0.0)
