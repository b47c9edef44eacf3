"""Checks of the tensors and the length of which :meth:`KVCache.of` makes a cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from better_attention.errors import check_int, describe
from better_attention.tensors import floating_tensor

from .int8 import scale_name
from .streams import SHOWN


def named(heads: Mapping[str, int], head_dim: int, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """The tensors, by the names of the rows that they are.

    Args:
        heads: of each of the layer's streams, how many the layer computes here.
        head_dim: the width of one.
        tensors: as :attr:`KVCache.tensors` gives them.

    Raises:
        TypeError: no tensors, or a dtype that no cache has.
        ValueError: another number of tensors than the layer's, or shapes or devices that do not go together.
    """
    if not isinstance(tensors, (tuple, list)):
        raise TypeError(f"tensors must be a tuple or list, as cache.tensors is, received {describe(tensors)}.")
    for i, x in enumerate(tensors):
        if not isinstance(x, Tensor):
            convert = f" Convert it with torch.as_tensor(tensors[{i}])." if hasattr(x, "__array__") else ""
            raise TypeError(f"tensors[{i}] must be a tensor, received {describe(x)}.{convert}")
    streams = tuple(heads)
    in_codes = bool(tensors) and tensors[0].dtype == torch.int8
    scales = tuple(map(scale_name, streams)) if in_codes else ()
    shown = (SHOWN,) if tensors and tensors[-1].dtype == torch.bool else ()
    names = streams + scales + shown
    if len(tensors) != len(names):
        raise ValueError(
            f"tensors must be {len(streams + scales)}, for {', '.join(streams[:-1])}{' and ' * (len(streams) > 1)}"
            f"{streams[-1]}{' and then their scales' if in_codes else ''}, and one of bool behind them where tokens "
            f"are padding, as cache.tensors gives them; received {len(tensors)}."
        )
    stored = dict(zip(names, tensors, strict=True))
    widths = {name: (n * head_dim,) for name, n in heads.items()} | {
        scale_name(name): (n,) for name, n in heads.items()
    }
    for i, (name, x) in enumerate(stored.items()):
        wanted = widths.get(name, ())
        if not in_codes and name in streams:
            floating_tensor(x, f"tensors[{i}]")
        elif name not in shown and x.dtype != (torch.float32 if name in scales else torch.int8):
            raise TypeError(f"tensors[{i}] must be {'float32' if name in scales else 'int8'}, received {describe(x)}.")
        if x.dim() != 2 + len(wanted) or tuple(x.shape[2:]) != wanted:
            sizes = ", ".join(("batch", "length", *map(str, wanted)))
            raise ValueError(f"tensors[{i}], the layer's {name}, must be of shape ({sizes}), received {describe(x)}.")
    _check_that_they_agree(tensors, tensors[: len(streams)])
    return stored


def _check_that_they_agree(tensors: Sequence[Tensor], numbers: Sequence[Tensor]) -> None:
    first = tensors[0]
    if any(x.shape[:2] != first.shape[:2] or x.device != first.device for x in tensors) or any(
        x.dtype != first.dtype for x in numbers
    ):
        raise ValueError(
            "tensors must agree in batch size, length and device, keys and values in dtype too; received "
            f"{', '.join(f'{describe(x)} on {x.device}' for x in tensors)}."
        )


def checked_length(length: int | None, kept: int, window: int | None) -> int:
    """The number of tokens that a cache of ``kept`` rows has seen.

    Raises:
        TypeError: no whole number.
        ValueError: none although there is a window, or one that does not go with the rows.
    """
    if length is None:
        if window is not None:
            raise ValueError(
                f"length is missing: a layer with window={window} forgets tokens, so that the {kept} rows of tensors "
                "do not say how many came before. Pass length=cache.length of the cache that they are from."
            )
        return kept
    if torch.compiler.is_compiling() and not isinstance(length, (bool, float, Tensor)):
        # Every comparison would be a condition on the program's inputs.
        return kept if window is None else length
    number = check_int(length, "length", at_least=0)
    if number < kept or (number > kept and (window is None or kept < window - 1)):
        least = "" if window is None else f", or more where they are at least window - 1 = {window - 1}"
        raise ValueError(
            f"length must be the number of rows of tensors, {kept}{least}; received {number}. Pass tensors and length "
            "of one cache."
        )
    return number
