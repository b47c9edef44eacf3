"""Tensors that are divided among processes (DTensor): what of them is here, and attention on the parts.

Samples and heads are independent of one another. Where query, key and value are divided over those, every process
computes its own part, forward and backward, and nothing is sent. Everything else is refused with a reason: a hidden
all-gather of a long sequence is what somebody who divided it wants least.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

HEADS = -3
"""The dimension of heads, counted from the end as all dimensions are here; what lies before it is the batch."""
_NAMES = ("query", "key", "value")


def is_dtensor(x: object) -> bool:
    """Whether ``x`` is a ``torch.distributed.tensor.DTensor``; imports nothing."""
    if type(x) is Tensor or type(x) is nn.Parameter or x is None:  # the ordinary case, which small calls feel
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def part_like(whole: Tensor, divided: Any) -> Any:
    """An ordinary tensor, the same in all processes, divided as the DTensor ``divided`` is; nothing is sent.

    Where it is divided in a way that torch alone knows, as by ``fully_shard`` over heads, the tensor as it came.
    """
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    if any(type(placement) not in (Replicate, Shard) for placement in divided.placements):
        return whole
    return distribute_tensor(whole.to(divided.device), divided.device_mesh, divided.placements, src_data_rank=None)


@contextmanager
def draws_of(place: int, device: torch.device) -> Iterator[None]:
    """Random numbers of one process's own while the context lasts, and the same state for all processes afterwards.

    Processes that share a seed would otherwise drop the same weights of different heads or samples.

    Args:
        place: a number that differs between the processes whose draws are to differ.
        device: where the numbers are drawn, beside the CPU.
    """
    seed = int(torch.randint(2**62, (), device="cpu"))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed + place)
        yield


@dataclass(frozen=True, slots=True)
class Shards:
    """The parts of an attention call that one process computes.

    Args:
        query, key, value, attn_mask: ordinary tensors.
        mesh: the ``DeviceMesh`` of the whole ones.
        divided: for each of its dimensions the one of the tensors that is divided over it, None for copies.
        sizes: the whole size of each divided dimension.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    mesh: Any
    divided: tuple[int | None, ...]
    sizes: dict[int, int]

    @property
    def place(self) -> int:
        """A number that differs between processes with different parts, and is one for all that hold copies."""
        index = 0
        for dim, here, size in zip(self.divided, self.mesh.get_coordinate(), self.mesh.shape, strict=True):
            index = index if dim is None else index * size + here
        return index

    def whole(self, part: Tensor) -> Tensor:
        """What this process computed, (..., N, L, width), as its part of a DTensor."""
        from torch.distributed.tensor import DTensor, Replicate, Shard

        placements = [Replicate() if dim is None else Shard(part.dim() + dim) for dim in self.divided]
        if all(size % _ways(self.mesh, self.divided, dim) == 0 for dim, size in self.sizes.items()):
            return DTensor.from_local(part, self.mesh, placements, run_check=False)
        shape = list(part.shape)
        for dim, size in self.sizes.items():
            shape[dim] = size
        strides = tuple(prod(shape[d + 1 :]) for d in range(len(shape)))
        return DTensor.from_local(
            part.contiguous(), self.mesh, placements, run_check=False, shape=torch.Size(shape), stride=strides
        )

    def __str__(self) -> str:
        """How the call is divided, in words."""
        over = {"heads" if dim == HEADS else "the batch" for dim in self.divided if dim is not None}
        return f"its part of a call that is divided over {' and '.join(sorted(over))}" if over else "a copy of the call"


def shards_of(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, *, grouped: bool
) -> tuple[Shards | None, list[str]]:
    """The part of a call on DTensors that this process computes, or the reasons why it cannot be divided so.

    Args:
        query, key, value: (..., N, L, H) and so on, at least one of which is a DTensor.
        attn_mask: a mask for the whole call, an ordinary tensor (the same in all processes) or a DTensor.
        grouped: whether key heads may be fewer than query heads.
    """
    main = dict(zip(_NAMES, (query, key, value), strict=True))
    plain = [name for name, x in main.items() if not is_dtensor(x)]
    if plain:
        return None, [
            f"{' and '.join(plain)} must be divided as well where others are DTensors: pass "
            "torch.distributed.tensor.distribute_tensor(x, mesh, placements), or DTensor.from_local of a part"
        ]
    mesh = query.device_mesh  # type: ignore[attr-defined]
    tensors: dict[str, Any] = main | ({"attn_mask": attn_mask} if is_dtensor(attn_mask) else {})
    if any(x.device_mesh != mesh for x in tensors.values()):
        return None, ["query, key, value and attn_mask must be on one device mesh"]
    reasons = [reason for name, x in tensors.items() for reason in _placement_reasons(name, x)]
    if reasons:
        return None, reasons
    divided = [_divided(list(main.values()), i) for i in range(mesh.ndim)]
    for i, dims in enumerate(divided):
        reasons += _disagreements(main, i, dims)
    if reasons:
        return None, reasons
    over = tuple(next(iter(dims), None) for dims in divided)
    sizes = {dim: max(_size(x, dim) for x in main.values()) for dim in over if dim is not None}
    reasons = _group_reasons(main, mesh, over) if grouped else []
    if attn_mask is not None:
        reasons += _mask_reasons(attn_mask, sizes)
    if reasons:
        return None, reasons
    q, k = _part(query, over), _part(key, over)
    # One tensor that is both stays one.
    v = k if value is key else _part(value, over)
    mask = None if attn_mask is None else _mask_part(attn_mask, mesh, over)
    return Shards(q, k, v, mask, mesh, over, sizes), []


def _size(x: Tensor, dim: int) -> int:
    """The size of a dimension counted from the end, 1 where a tensor does not have it."""
    return x.shape[dim] if x.dim() >= -dim else 1


def _ways(mesh: Any, over: Sequence[int | None], dim: int) -> int:
    """Into how many parts a dimension is divided."""
    return prod(size for size, other in zip(mesh.shape, over, strict=True) if other == dim)


def _placement_reasons(name: str, x: Any) -> list[str]:
    from torch.distributed.tensor import Replicate, Shard

    reasons = []
    for placement in x.placements:
        if type(placement) not in (Replicate, Shard):
            reasons.append(
                f"{name} is {placement}: only whole samples and heads can be computed apart. Pass "
                f"{name}.redistribute(placements=...) with Shard(0), for example"
            )
        elif placement.is_shard() and placement.dim - x.dim() > HEADS:
            what = "length" if placement.dim - x.dim() == -2 else "width"
            other = "keys" if name == "attn_mask" and what == "width" else what
            hint = ", or call better_attention.sequence_attention" if what == "length" else ""
            reasons.append(
                f"{name} is divided over its {other} ({placement}), where every process would need the parts of all "
                f"others. Pass {name}.redistribute(placements=...) with copies (Replicate()), or divided over samples "
                f"or heads{hint}"
            )
    return reasons


def _divided(main: Sequence[Any], i: int) -> set[int]:
    """The dimensions, from the end, that are divided over dimension ``i`` of the mesh."""
    return {x.placements[i].dim - x.dim() for x in main if x.placements[i].is_shard()}


def _disagreements(main: dict[str, Any], i: int, dims: set[int]) -> list[str]:
    """Why the tensors do not go together over dimension ``i`` of the mesh."""
    shown = ", ".join(f"{name} {x.placements[i]} of {tuple(x.shape)}" for name, x in main.items())
    # A dimension of size 1, or none, belongs to every part.
    lone = [x for x in main.values() for dim in dims if not x.placements[i].is_shard() and _size(x, dim) != 1]
    if len(dims) > 1 or lone:
        return [
            f"query, key and value must be divided over the same samples or heads, received {shown} on dimension {i} "
            "of the mesh. Redistribute one of them"
        ]
    return []


def _group_reasons(main: dict[str, Any], mesh: Any, over: Sequence[int | None]) -> list[str]:
    """Why grouped heads do not fall on whole groups."""
    ways = _ways(mesh, over, HEADS)
    return [
        f"{name} has {x.shape[HEADS]} heads, which {ways} processes cannot share in whole groups: take a number of "
        "processes that divides it"
        for name, x in main.items()
        if ways > 1 and x.shape[HEADS] % ways and x.shape[HEADS] != 1
    ]


def _mask_reasons(mask: Tensor, sizes: dict[int, int]) -> list[str]:
    return [
        f"attn_mask has size {_size(mask, dim)} in dimension {dim}, where the call has {size}: pass the mask of the "
        "whole call, or one that broadcasts"
        for dim, size in sizes.items()
        if _size(mask, dim) not in (1, size)
    ]


def _part(x: Any, over: Sequence[int | None]) -> Tensor:
    """What this process holds. The gradient of what all hold is the sum of theirs."""
    from torch.distributed.tensor import Partial

    placements = [
        Partial() if dim is not None and not placement.is_shard() else placement
        for dim, placement in zip(over, x.placements, strict=True)
    ]
    part: Tensor = x.to_local(grad_placements=placements)
    return part


def _mask_part(mask: Tensor, mesh: Any, over: Sequence[int | None]) -> Tensor:
    from torch.distributed.tensor import DTensor, Replicate, Shard

    if not is_dtensor(mask):
        mask = DTensor.from_local(mask, mesh, [Replicate()] * mesh.ndim, run_check=False)
    placements = [Shard(mask.dim() + dim) if dim is not None and _size(mask, dim) > 1 else Replicate() for dim in over]
    return _part(mask.redistribute(placements=placements), over)  # type: ignore[attr-defined]
