"""Programs and functions that run as several processes of one launch."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import closing
from functools import cache
from typing import Any

import pytest
import torch

forks = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="processes are forked here, which only Linux does safely"
)
"""For tests that call :func:`run_ranks`."""


def run_two(program: str, *arguments: object, seconds: float) -> None:
    """Run ``program`` twice at once, its first argument 0 and 1; both must succeed."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(rank), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=seconds)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)


def free_port() -> int:
    """A port of this machine at which nobody listens."""
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def run_ranks(function: Callable[..., Any], processes: int, *arguments: object, seconds: float = 400.0) -> list[Any]:
    """What ``function`` returns in each of several processes that were started together, as torchrun starts them.

    They are forked, which saves the seconds of importing torch, and killed if one fails or takes too long.
    """
    _import_once()
    context = multiprocessing.get_context("fork")
    port = free_port()
    ranks = []
    for rank in range(processes):
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(there, function, rank, processes, port, arguments), daemon=True)
        process.start()
        there.close()
        ranks.append((process, here))
    answers: list[Any] = []
    end = time.monotonic() + seconds
    try:
        for rank, (_, here) in enumerate(ranks):
            assert here.poll(max(0.0, end - time.monotonic())), f"process {rank} did not answer in {seconds} s"
            try:
                good, answer = here.recv()
            except EOFError:
                raise AssertionError(f"process {rank} ended without an answer") from None
            assert good, f"process {rank}:\n{answer}"
            answers.append(answer)
    finally:
        for process, _ in ranks:
            process.kill()
            process.join()
    return answers


@cache
def _import_once() -> None:
    """Import here what every process would import for itself, its first update for example; it takes seconds."""
    import torch._dynamo
    import torch.distributed.checkpoint.hf_storage
    import torch.distributed.fsdp
    import torch.distributed.tensor  # noqa: F401


def _rank(
    there: Any, function: Callable[..., Any], rank: int, processes: int, port: int, arguments: tuple[object, ...]
) -> None:
    """One of the processes."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):  # what the parent knew is not what is here
        state._shared_state.clear()
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",  # as torchrun sets it for several processes
    }
    torch.set_num_threads(1)  # a forked process has none of its parent's threads
    try:
        there.send((True, function(*arguments)))
    except BaseException:
        there.send((False, traceback.format_exc()))
    there.close()
    os._exit(0)  # nothing of the parent is to be tidied up here
