"""Accelerators for one process or several of one launch, and the error where one of them has ended."""

from __future__ import annotations

import os
import re
import socket
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from hashlib import sha256

import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from better_attention.lab.training.launch import (
    PeerLostError,
    check_launch,
    count_in,
    in_words,
    launched,
    torchrun,
)

MEETING_SECONDS = 20.0
"""For which a process looks for the first one of its launch: they may start some seconds after each other."""
WAITING = timedelta(minutes=10)
"""For which a process waits for another one that has not ended, in an exchange of numbers."""

# gloo raises a plain RuntimeError, so that only its text shows that a connection was lost.
_LOST = re.compile(
    r"gloo/|NCCL|nccl|TCPStore|Connection (?:closed|reset|refused)|Broken pipe|Timed out waiting|Socket Timeout"
)


def make_accelerator(device: str) -> Accelerator:
    """An accelerator on ``device``: ``"auto"`` (a GPU if there is one), ``"cpu"``, ``"cuda"`` or ``"mps"``.

    Where several processes were launched, they are one training: each takes its share of every batch.

    Raises:
        ValueError: the device does not exist, there is not one for each process, or the processes cannot share it.
        ValueError: the environment names processes, but not how they find each other, see :func:`.check_launch`.
        PeerLostError: another process has ended before all had met.
    """
    check_launch()
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
    meet()
    with watching_peers(processes):
        accelerator = Accelerator(
            cpu=cpu,
            mixed_precision="no",
            gradient_accumulation_steps=1,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=WAITING)],
        )
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


def meet(environment: Mapping[str, str] = os.environ, seconds: float = MEETING_SECONDS) -> None:
    """Make sure that somebody answers where the processes of this launch are to meet; torch would wait for minutes.

    Raises:
        ValueError: nobody does.
    """
    agent = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if count_in(environment.get("WORLD_SIZE")) == 1 or (environment["RANK"] == "0" and not agent):
        return  # alone, or the one that the others look for
    host, port, end = environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=seconds).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise ValueError(
                    f"RANK={environment['RANK']} of WORLD_SIZE={environment['WORLD_SIZE']}: nobody answers at "
                    f"MASTER_ADDR={host}, MASTER_PORT={port} ({error}), where process 0 should wait. Start all "
                    f"processes with `{torchrun(launched(environment), environment)} ...`, or unset these variables "
                    "for one process."
                ) from None
        time.sleep(0.5)


def check_alike(accelerator: Accelerator, parts: Mapping[str, str]) -> None:
    """Refuse processes of one launch that would not compute the same: all of them raise the same error.

    Args:
        accelerator: of this process.
        parts: what must be equal on all -> its value here.

    Raises:
        ValueError: names what differs, and which processes differ from the first.
    """
    if accelerator.num_processes == 1:
        return
    # 62 bits of each digest: they fit an int64, which every backend exchanges.
    numbers = [int.from_bytes(sha256(value.encode()).digest()[:8]) >> 2 for value in parts.values()]
    everywhere = accelerator.gather(torch.tensor([numbers], device=accelerator.device)).tolist()
    wrong = []
    for name, *values in zip(parts, *everywhere, strict=True):
        if others := [str(rank) for rank, value in enumerate(values) if value != values[0]]:
            wrong.append(f"{name}: {plural_ranks(others)} from process 0")
    if wrong:
        raise ValueError(
            "the processes of this launch do not agree, and one model must not be trained on both:\n  "
            + "\n  ".join(wrong)
            + "\nInstall the same version and give the same command and data on every machine."
        )


def plural_ranks(ranks: list[str]) -> str:
    """``process 1 differs``, or ``processes 1, 3 differ``."""
    return f"process {ranks[0]} differs" if len(ranks) == 1 else f"processes {', '.join(ranks)} differ"


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
