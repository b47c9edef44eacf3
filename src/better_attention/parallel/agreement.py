"""Before processes send each other tensors: do all of them mean the same?

Collective operations on tensors of different shapes hang, or mix up what they return. One small exchange of fixed size
beforehand turns that into an error in every process, which says who brought what.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from better_attention.errors import describe

ROOM = 512
"""Bytes of what each process says."""
_FAILED = "!"

T = TypeVar("T")


def check_group(group: Any) -> Any:
    """The group of processes, the default one where it is None.

    Raises:
        RuntimeError: processes have not been set up, or this one is not part of the group.
        TypeError: no group.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "this needs processes that know each other: start them with torchrun and call "
            "torch.distributed.init_process_group() first."
        )
    if group is None:
        return dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        hint = " Of a DeviceMesh pass mesh.get_group()." if hasattr(group, "get_group") else ""
        raise TypeError(f"group must be a torch.distributed.ProcessGroup or None, received {describe(group)}.{hint}")
    return group


def agreed(check: Callable[[], T], said: Callable[[], str], group: Any, device: torch.device, what: str) -> T:
    """What ``check`` returns, once all processes of ``group`` have passed their checks and said the same.

    Args:
        check: checks this process's arguments.
        said: what has to be the same everywhere, in words; asked only after ``check``.
        group: a process group.
        device: where its backend wants tensors.
        what: what is compared, for messages.

    Raises:
        ValueError: other processes say something else, or failed their checks; whatever ``check`` raises.
    """
    try:
        result, text, failure = check(), said(), None
    except Exception as error:  # whatever it is
        # The others wait for this process, and are told before it goes its own way.
        failure, text = error, _FAILED + str(error)
    texts = exchange(text, group, device)
    if failure is not None:
        raise failure
    for rank, other in enumerate(texts):
        if other.startswith(_FAILED):
            raise ValueError(f"process {rank} of {len(texts)} refused its {what}: {other[1:]}")
    if len(set(texts)) > 1:
        listed = "; ".join(f"process {rank}: {other}" for rank, other in enumerate(texts))
        raise ValueError(f"all processes must be given the same {what}, received {listed}.")
    return result


def exchange(text: str, group: Any, device: torch.device) -> list[str]:
    """The texts of all processes, in their order; of one beyond ``ROOM`` bytes the end is replaced by a digest."""
    raw = text.encode()
    if len(raw) > ROOM:
        digest = f" … {sha256(raw).hexdigest()[:16]}".encode()
        raw = raw[: ROOM - len(digest)] + digest
    mine = torch.zeros(ROOM, dtype=torch.uint8)
    mine[: len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else mine[:0]
    mine = mine.to(device)
    all_of_them = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(all_of_them, mine, group=group)
    return [bytes(x.cpu().tolist()).rstrip(b"\0").decode(errors="replace") for x in all_of_them]


def shape_of(x: Tensor | None) -> str:
    """A tensor in a few letters."""
    return "none" if x is None else f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"


def backend_device(group: Any, like: torch.device) -> torch.device:
    """Where the backend of ``group`` wants tensors: NCCL takes those of GPUs alone."""
    return like if "nccl" in dist.get_backend(group) else torch.device("cpu")
