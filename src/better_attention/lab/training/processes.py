"""Accelerators for one process or several of one launch, and the error where one of them has ended."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator

from better_attention.lab.training.launch import PeerLostError, count_in, in_words, launched, torchrun

# gloo raises a plain RuntimeError, so that only its text shows that a connection was lost.
_LOST = re.compile(
    r"gloo/|NCCL|nccl|TCPStore|Connection (?:closed|reset|refused)|Broken pipe|Timed out waiting|Socket Timeout"
)


def make_accelerator(device: str) -> Accelerator:
    """An accelerator on ``device``: ``"auto"`` (a GPU if there is one), ``"cpu"``, ``"cuda"`` or ``"mps"``.

    Where several processes were launched, they are one training: each takes its share of every batch.

    Raises:
        ValueError: the device does not exist, there is not one for each process, or the processes cannot share it.
        PeerLostError: another process has ended before all had met.
    """
    processes = launched()
    several = processes > 1
    # accelerate looks for several processes on a CPU only where it is told to use the CPU.
    cpu = device == "cpu" or (device == "auto" and several and not torch.cuda.is_available())
    here, devices = count_in(os.environ.get("LOCAL_WORLD_SIZE")), torch.cuda.device_count()
    # NCCL refuses two processes on one GPU ("Duplicate GPU detected"), but only at the first exchange.
    if several and not cpu and 0 < devices < here:
        raise ValueError(
            f"--device {device}: {in_words(here)} were launched on this machine, which has {devices} CUDA "
            f"device{'s' * (devices != 1)}; each needs its own. Launch {devices}, or use --device cpu."
        )
    with watching_peers(processes):
        accelerator = Accelerator(cpu=cpu, mixed_precision="no", gradient_accumulation_steps=1)
    if device not in ("auto", accelerator.device.type):
        raise ValueError(
            f"--device {device}: no such device on this machine, or torch {torch.__version__} cannot use it. "
            f"--device {accelerator.device.type} works, --device auto chooses it."
        )
    if accelerator.num_processes != processes and several:
        raise ValueError(
            f"{in_words(processes)} were launched, but on device {accelerator.device.type} they do not work together "
            f"({in_words(accelerator.num_processes)} found). Use --device cpu, or launch one process."
        )
    if accelerator.num_processes == 1 and not several and _asked_for_more():
        warnings.warn(
            "`accelerate launch` was asked for several processes but started one only, which trains alone: without a "
            f"GPU it starts one whatever --num_processes says. For several use `{torchrun(2)} ...`.",
            stacklevel=2,
        )
    return accelerator


@contextmanager
def watching_peers(processes: int, command: str = "") -> Iterator[None]:
    """Turn the errors that torch raises when another process of the launch has ended into one that says so.

    Args:
        processes: number of processes of the launch.
        command: the command line that continues.

    Raises:
        PeerLostError: another process has ended.
    """
    try:
        yield
    except RuntimeError as error:
        if processes == 1 or not (isinstance(error, torch.distributed.DistError) or _LOST.search(str(error))):
            raise
        raise PeerLostError(
            "another process of this launch has ended, so this one cannot continue; the message of that process says "
            "why (if there is none, it was killed, for example for lack of memory). What was saved is kept, and the "
            f"same command continues there{':' if command else '.'}\n  {command}".rstrip()
        ) from error


@contextmanager
def limited_threads(threads: int | None) -> Iterator[None]:
    """Let torch use at most ``threads`` CPU threads while the block runs; None changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, threads or before))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _asked_for_more() -> bool:
    """Whether ``accelerate launch`` was asked for several processes and started this one alone.

    It then sets an address to meet at, but gives the process no rank.
    """
    names = ("ACCELERATE_MIXED_PRECISION", "MASTER_ADDR", "MASTER_PORT")
    return all(name in os.environ for name in names) and not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} & os.environ.keys()
