"""What torch.nn.MultiheadAttention takes, checked and in the one form the layer computes with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from better_attention.call.masks import NEARLY_HIDDEN, check_mask, without_repeats
from better_attention.call.torch_state import bare, unpatched
from better_attention.call.values import autocast_dtype
from better_attention.errors import FLOATING, describe, floating_tensor
from better_attention.mechanism import Mechanism
from better_attention.scores import SCORES


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


def check_placement(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Refuse inputs on different devices, or (except under autocast) of different dtypes.

    Where the weights are is for each called module to judge: they may be offloaded, quantised, sharded or cast when it
    is called.

    Raises:
        ValueError: devices differ.
        TypeError: dtypes differ.
    """
    if not query.device == key.device == value.device:
        raise ValueError(
            f"query, key and value must be on one device, received query on {query.device}, key on {key.device}, "
            f"value on {value.device}. Move them with .to(device)."
        )
    if autocast_dtype(query.device.type) is None and not query.dtype == key.dtype == value.dtype:
        raise TypeError(
            f"query, key and value must have one dtype, received query {query.dtype}, key {key.dtype}, value "
            f"{value.dtype}. Convert them with .to(dtype), or use torch.autocast."
        )


def called(part: nn.Module, x: Tensor, name: str) -> Tensor:
    """``part(x)``, with an error that says so where its weights are of another dtype or on another device.

    Args:
        part: a sub-module of the layer that takes one tensor.
        x: its input.
        name: how messages call it.

    Raises:
        TypeError: its parameters are of another dtype, and it did not get over that.
        ValueError: they are on another device, likewise.
    """
    weight = part._parameters.get("weight")
    if weight is not None and _goes_unnoticed(weight, x) and _is_untouched(part):
        raise _mismatch(name, weight, x)
    try:
        result: Tensor = part(x)
    except RuntimeError as error:
        if type(error) is RuntimeError:  # its subclasses are others: out of memory, for example
            for parameter in part._parameters.values():
                if parameter is not None and _differ(parameter, x):
                    raise _mismatch(name, parameter, x) from error
        raise
    return result


def _differ(parameter: Tensor, x: Tensor) -> bool:
    return parameter.device != x.device or (parameter.is_floating_point() and parameter.dtype != x.dtype)


def _goes_unnoticed(weight: Tensor, x: Tensor) -> bool:
    """Whether they do not go together, and there would be no error here that could be explained.

    torch mixes the meta device with others, and returns unwritten memory; a compiler tries operators on its own.
    """
    if torch.compiler.is_compiling() and autocast_dtype(x.device.type) is None:
        return _differ(weight, x)
    return weight.is_meta is not x.is_meta


def _mismatch(name: str, parameter: Tensor, x: Tensor) -> TypeError | ValueError:
    if parameter.device == x.device:
        inputs = f"the inputs with .to({parameter.dtype}), " if parameter.dtype in FLOATING else ""
        return TypeError(
            f"the parameters of {name} are {parameter.dtype}, its input is {x.dtype}. Convert {inputs}the layer with "
            f".to({x.dtype}), or use torch.autocast."
        )
    way = "Move the inputs or the layer with .to(device)"
    if parameter.is_meta:
        way = "Load weights with load_state_dict(..., assign=True), or call .to_empty(device=...), first"
    return ValueError(f"the parameters of {name} are on {parameter.device}, its input is on {x.device}. {way}.")


def _is_untouched(part: nn.Module) -> bool:
    """Whether nobody has provided for weights that come and go: no hook, no replaced or patched forward."""
    own = isinstance(part, nn.Linear) and type(part).forward is not nn.Linear.forward
    return not own and bare(part) and unpatched()


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
    # A score may add the dtype's lowest number like any other: it hides all the same, unless a sample has nothing else.
    lowest = padding_BS1 <= torch.finfo(padding_BS1.dtype).min
    return (lowest & ~lowest.all(dim=1, keepdim=True)) | SCORES[mechanism.score].hides(padding_BS1)


def silence(key_BSD: Tensor, value_BSD: Tensor, padded_BS1: Tensor | None) -> tuple[Tensor, Tensor]:
    """Padded keys and values as zeros: W_A would mix them into real ones, and 0 * NaN is NaN in any mechanism."""
    if padded_BS1 is None:
        return key_BSD, value_BSD
    silenced = key_BSD.masked_fill(padded_BS1, 0.0)
    return silenced, silenced if value_BSD is key_BSD else value_BSD.masked_fill(padded_BS1, 0.0)
