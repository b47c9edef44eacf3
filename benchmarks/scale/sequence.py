"""Sequence parallel attention measured over gloo: how often processes send, how many bytes, how far the result is off.

Beside :func:`better_attention.sequence_attention` runs ring attention for softmax (arXiv 2310.01889), forward,
on the same kernels: keys and values go round, and results are merged by their log-sum-exp. No times: processes that
share the processors and the loopback of one machine say nothing about the speed of a cluster, while counts and bytes
are those of any.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode

from better_attention import attention, sequence_attention
from better_attention.call.call import Call
from better_attention.impl import native

B, N, H = 1, 8, 64
LENGTH = 512


class Bytes(TorchDispatchMode):
    """Counts the bytes that collectives are given to send; what one process sends of them is (P - 1) / P of it."""

    def __init__(self) -> None:
        super().__init__()
        self.given: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func``, and count what it sends."""
        if func.namespace == "c10d":
            name = func._opname
            # Gathers have the whole in their first argument, scatters in their second, reductions in their only one.
            whole = args[1] if "reduce_scatter" in name else args[0]
            self.given[name] = self.given.get(name, 0) + sum(x.numel() * x.element_size() for x in _flat(whole))
        return func(*args, **(kwargs or {}))


def _flat(x: Any) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x]
    return [y for part in x for y in _flat(part)] if isinstance(x, list | tuple) else []


def ring(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, int, int]:
    """Softmax attention of the local queries over all keys, which go round.

    Returns:
        The output, how many messages this process sent, and how many bytes.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    total, shift = q.new_zeros(q.shape[:-1]), q.new_full(q.shape[:-1], -torch.inf)
    here, messages = torch.stack([k, v]), 0
    for turn in range(world):
        there = torch.empty_like(here)
        pending = []
        if turn < world - 1:
            to, of = (rank + 1) % world, (rank - 1) % world
            pending = dist.batch_isend_irecv([dist.P2POp(dist.isend, here, to), dist.P2POp(dist.irecv, there, of)])
            messages += 1
        part, stats = native.partial(Call(q, here[0], here[1], score="softmax", scale=q.shape[-1] ** -0.5))
        larger = torch.maximum(shift, stats[..., 1])
        before, now = total * (shift - larger).exp(), stats[..., 0] * (stats[..., 1] - larger).exp()
        total, shift = before + now, larger
        out = (out * before[..., None] + part * now[..., None]) / total[..., None]
        for request in pending:
            request.wait()
        here = there
    return out, messages, messages * here.numel() * here.element_size()


def worker(rank: int, world: int, folder: Path) -> None:
    """One process."""
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    torch.manual_seed(0)
    whole = [torch.randn(B, N, LENGTH, H) for _ in range(3)]
    q, k, v = (x.chunk(world, dim=2)[rank].contiguous() for x in whole)
    rows = []
    for score in ("expressive", "softmax"):
        expected = attention(*whole, score=score).chunk(world, dim=2)[rank]
        rows.append(_measured(f"sums, {score}", world, q, k, v, score, expected))
    out, messages, sent = ring(q, k, v)
    rows.append(
        {
            "way": "ring, softmax",
            "processes": world,
            "error": _error(out, expected),
            "forward_calls": {"send and receive": messages},
            "forward_bytes": sent,
        }
    )
    if rank == 0:
        (folder / "rows.json").write_text(json.dumps(rows), "utf-8")
    dist.barrier()
    dist.destroy_process_group()


def _measured(way: str, world: int, q: Tensor, k: Tensor, v: Tensor, score: str, expected: Tensor) -> dict[str, Any]:
    def call(*inputs: Tensor) -> Tensor:
        return sequence_attention(*inputs, score=score, check=False)

    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    with Bytes() as there:
        out = call(*inputs)
    with Bytes() as back:
        out.sum().backward()
    with CommDebugMode() as calls_there:
        out = call(*inputs)
    with CommDebugMode() as calls_back:
        out.sum().backward()
    return {
        "way": way,
        "processes": world,
        "error": _error(out.detach(), expected),
        "forward_calls": _names(calls_there.get_comm_counts()),
        "backward_calls": _names(calls_back.get_comm_counts()),
        "forward_bytes": _sent(there, world),
        "backward_bytes": _sent(back, world),
    }


def _names(counts: Mapping[Any, int]) -> dict[str, int]:
    return {str(name).rpartition(".")[2].strip("_"): number for name, number in counts.items()}


def _sent(counted: Bytes, world: int) -> int:
    """What one process sends: (P - 1) / P of what is gathered or scattered, twice that of what all add up."""
    twice = sum(size for name, size in counted.given.items() if "allreduce" in name)
    return round((sum(counted.given.values()) + twice) * (world - 1) / world)


def _error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def measure(out: Path) -> None:
    """Run 2 and 4 processes, one after the other, and write what they measured."""
    torch.set_num_threads(1)
    rows = []
    for world in (2, 4):
        with TemporaryDirectory() as folder:
            # Forks, because starting Python takes longer than what is measured.
            context = multiprocessing.get_context("fork")
            arguments = [(rank, world, Path(folder)) for rank in range(world)]
            processes = [context.Process(target=worker, args=x, daemon=True) for x in arguments]
            for process in processes:
                process.start()
            try:
                for process in processes:
                    process.join(timeout=300)
                    if process.exitcode != 0:
                        raise RuntimeError(f"a process of {world} failed or did not end; its message is above.")
            finally:
                for process in processes:
                    process.kill()
            rows += json.loads((Path(folder) / "rows.json").read_text("utf-8"))
    shape = {"batch": B, "heads": N, "length": LENGTH, "head_width": H}
    cpu = next((x.partition(":")[2].strip() for x in _cpuinfo() if x.startswith("model name")), "unknown")
    machine = {"cpu": cpu, "cores": os.cpu_count(), "torch": torch.__version__, "backend": "gloo, loopback"}
    command = "python -m benchmarks.scale --measure"
    text = json.dumps({"command": command, "machine": machine, "shape": shape, "rows": rows}, indent=1)
    out.write_text(text + "\n", "utf-8")


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text("utf-8").splitlines() if path.exists() else []
