"""What torch.nn.MultiheadAttention takes, checked and in the one form the layer computes with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .errors import describe, floating_tensor
from .impl.call import hidden
from .masks import NEARLY_HIDDEN, check_mask, without_repeats
from .mechanism import Mechanism
from .values import autocast_dtype


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
    named = {"query": query, "key": key, "value": value}
    for name, x in named.items():
        floating_tensor(x, name)
    rank = query.dim()

    def received() -> str:  # built only when something is wrong: torch.compile cannot format symbolic sizes
        return ", ".join(f"{n} {tuple(x.shape)}" for n, x in named.items())

    if rank not in (2, 3) or key.dim() != rank or value.dim() != rank:
        layout = "(B, L, D)" if batch_first else "(L, B, D)"
        raise ValueError(f"expected query, key and value all {layout} or all unbatched (L, D), received {received()}.")
    for (name, x), argument, width in zip(named.items(), ("embed_dim", "kdim", "vdim"), widths, strict=True):
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


def check_placement(layer: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Refuse inputs on another device than the layer's parameters, or (except under autocast) in another dtype.

    Raises:
        ValueError: devices differ.
        TypeError: dtypes differ.
    """
    own = next(layer.parameters(), query)
    if not query.device == key.device == value.device == own.device:
        raise ValueError(
            f"this layer's parameters are on {own.device}, received query on {query.device}, key on {key.device}, "
            f"value on {value.device}. Move them with .to({str(own.device)!r}), or the layer."
        )
    if autocast_dtype(query.device.type) is None and not query.dtype == key.dtype == value.dtype == own.dtype:
        raise TypeError(
            f"this layer's parameters are {own.dtype}, received query {query.dtype}, key {key.dtype}, value "
            f"{value.dtype}. Convert the inputs with .to({own.dtype}), the layer with .to(dtype), or autocast."
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
        if tuple(mask.shape) not in ((L, S), (B * N, L, S)):
            raise ValueError(
                f"attn_mask must be (L, S) = {(L, S)} or ({'B h' if batched else 'h'}, L, S) = {(B * N, L, S)}, "
                f"received {describe(mask)}.{_hint(mask, sizes)}"
            )
        mask_BNLS = without_repeats(mask[None, None] if mask.dim() == 2 else mask.reshape(B, N, L, S))
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


def padded_positions(padding_B11S: Tensor | None, mechanism: Mechanism) -> Tensor | None:
    """Which keys are hidden from every query, (B, S, 1), or None."""
    if padding_B11S is None:
        return None
    padding_BS1 = padding_B11S[:, 0, 0, :, None]
    if padding_BS1.dtype == torch.bool:
        return ~padding_BS1
    if mechanism.aligned:
        return padding_BS1 <= NEARLY_HIDDEN
    lowest = hidden(padding_BS1, "expressive")
    if mechanism.score == "expressive":
        return lowest
    # torch adds the dtype's lowest number like any other: it hides, unless a sample has nothing else.
    return (lowest & ~lowest.all(dim=1, keepdim=True)) | hidden(padding_BS1, "softmax")


def silence(key_BSD: Tensor, value_BSD: Tensor, padded_BS1: Tensor | None) -> tuple[Tensor, Tensor]:
    """Padded keys and values as zeros: W_A would mix them into real ones, and 0 * NaN is NaN in any mechanism."""
    if padded_BS1 is None:
        return key_BSD, value_BSD
    silenced = key_BSD.masked_fill(padded_BS1, 0.0)
    return silenced, silenced if value_BSD is key_BSD else value_BSD.masked_fill(padded_BS1, 0.0)
