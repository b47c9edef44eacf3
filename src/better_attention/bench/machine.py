"""The machine: its description, the best that it can do, and how much memory a call takes."""

from __future__ import annotations

import ctypes
import datetime
import hashlib
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import better_attention
from better_attention.lab.runs.provenance import changed

PACKAGES = ("better-attention", "torch", "torchao", "numpy", "x-transformers", "keras", "jax", "jaxlib")
BEST_OF = 7
"""Trials of each limit; the best one counts, as the least disturbed."""

BUSY = 0.5
"""Load per core, before anything is measured, from which on the machine counts as busy."""


def describe(command: str) -> dict[str, Any]:
    """Everything about the machine and the software that numbers may depend on."""
    from better_attention.lab.runs.provenance import commit  # needs the extras

    return {
        "cpu": cpu_name(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "instruction_set": instruction_set(),
        "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
        "last_level_cache_bytes": last_level_cache(),
        "available_memory_bytes": available_memory(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "platform": platform.platform(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "commit": commit(),
        "code": code(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
    }


def identity(about: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of :func:`describe` that must agree before measurements are merged: not the time, load or command."""
    passing = ("available_memory_bytes", "load_average", "date", "command", "continued")
    return {key: value for key, value in about.items() if key not in passing}


def differences(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The entries in which two descriptions differ, as ``seconds 2.0, now 10.0``."""
    return [f"{key} {before}, now {after}" for key, before, after in changed(stored, now)]


def resumed(stored: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The stored description of the machine, with the date and load of this part of the run added."""
    part = {key: now[key] for key in ("date", "load_average")}
    return {**stored, "continued": [*stored.get("continued", []), part]}


def busy(about: Mapping[str, Any]) -> str | None:
    """A warning if other programs kept many of the cores busy when ``about`` was taken; None if they did not.

    >>> busy({"load_average": 5.37, "cores": 2})
    'the machine is busy: load 5.37 on 2 cores at the start. Times are longer and differ more between rounds.'
    """
    load = about.get("load_average")
    if load is None or load <= BUSY * about["cores"]:
        return None
    return (
        f"the machine is busy: load {load:.2f} on {about['cores']} cores at the start. "
        "Times are longer and differ more between rounds."
    )


@cache
def code() -> str:
    """A digest of the package's files, compiled kernels included: a working tree may differ from its commit."""
    package = Path(better_attention.__file__).resolve().parent
    digest = hashlib.sha256()
    for path in sorted(path for path in package.rglob("*") if path.suffix in (".py", ".so", ".pyd")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def cpu_name() -> str:
    """The processor's name as the system knows it."""
    for line in _lines("/proc/cpuinfo"):
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    """Cores that this process may run on."""
    # A container may allow fewer cores than the machine has.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def instruction_set() -> str:
    """The instruction set that the compiled kernels use, or why they cannot be loaded."""
    from better_attention.impl import native

    if (missing := native.missing()) is not None:
        return f"no compiled kernels: {missing}"
    return os.environ.get("BETTER_ATTENTION_ISA") or str(native.instruction_sets()[0])


def last_level_cache() -> int | None:
    """Bytes of the largest cache, None where the system does not say."""
    sizes = [_lines(path)[0].strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    # The kernel writes sizes as in 1280K.
    units = {"K": 1 << 10, "M": 1 << 20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=None)


def available_memory() -> int | None:
    """Bytes that may still be allocated without swapping, None where the system does not say."""
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            # The kernel counts in KiB.
            return int(line.split()[1]) << 10
    return None


@dataclass(frozen=True, slots=True)
class Limits:
    """What the machine does at best, by the simplest operations of torch, with all the threads of the benchmark.

    Args:
        product: dtype -> GFLOP/s of a product of two square matrices.
        product_size: their side.
        read: operation -> GB/s at which it reads a buffer from memory.
        read_bytes: size of that buffer.
    """

    product: Mapping[str, float]
    product_size: int
    read: Mapping[str, float]
    read_bytes: int

    def better(self, other: Limits) -> Limits:
        """The better of two measurements, number by number."""
        product = {name: max(rate, other.product[name]) for name, rate in self.product.items()}
        read = {name: max(rate, other.read[name]) for name, rate in self.read.items()}
        return Limits(product, self.product_size, read, self.read_bytes)


def measure_limits(dtype: torch.dtype, *, size: int = 2048, read_bytes: int | None = None) -> Limits:
    """Measure the limits, in float32 and in ``dtype``.

    Args:
        size: side of the matrices.
        read_bytes: size of the buffer that is read; default: 512 MiB or twice the largest cache, at most an eighth of
            the memory that is free.
    """
    dtypes = dict.fromkeys((torch.float32, dtype))
    # A buffer that fits a cache would show the bandwidth of the cache.
    if read_bytes is None:
        read_bytes = min(max(512 << 20, 2 * (last_level_cache() or 0)), (available_memory() or 8 << 30) // 8)
    product = {str(d).removeprefix("torch."): _product(d, size) for d in dtypes}
    read: dict[str, float] = {}
    for d in dtypes:
        read |= _read(d, read_bytes)
    return Limits(product, size, read, read_bytes)


def _product(dtype: torch.dtype, size: int) -> float:
    # Into the same result each time, so that allocating memory is no part of the product.
    a, b, c = (torch.ones(size, size, dtype=dtype) for _ in range(3))
    return 2.0 * size**3 / _best(lambda: torch.mm(a, b, out=c)) / 1e9


def _read(dtype: torch.dtype, size: int) -> dict[str, float]:
    columns = 4096
    # An even number of rows, so that the two halves of the scalar product are equally long.
    matrix = torch.ones(max(2, size // dtype.itemsize // columns // 2 * 2), columns, dtype=dtype)
    vector, flat = torch.ones(columns, dtype=dtype), matrix.view(-1)
    first, second = flat.chunk(2)
    # Which of these is fastest differs between processors and dtypes.
    operations: dict[str, Callable[[], object]] = {
        "sum": lambda: flat.sum(),
        "dot": lambda: torch.dot(first, second),
        "matrix-vector": lambda: torch.mv(matrix, vector),
    }
    name = str(dtype).removeprefix("torch.")
    return {f"{op}, {name}": flat.nbytes / _best(call) / 1e9 for op, call in operations.items()}


def _best(call: Callable[[], object]) -> float:
    """Seconds of the fastest call; operations that are very slow in bfloat16 get fewer trials."""
    call()
    seconds: list[float] = []
    while len(seconds) < BEST_OF and sum(seconds) < 1.0:
        start = perf_counter()
        call()
        seconds.append(perf_counter() - start)
    # The least: whatever else the machine does only adds to a time.
    return min(seconds)


def extra_memory(call: Callable[[], object]) -> int | None:
    """Bytes by which one call raises the high-water mark of resident memory; its results count, its inputs do not.

    Free memory that the allocator keeps is handed back first, where it can be (glibc), so that it is seen when it is
    used again. ``call`` should have run before: what only a first call needs is not meant. None where the system keeps
    no mark that can be reset (anything but Linux).
    """
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    try:
        # A 5 resets the high-water mark of this process (proc_pid_clear_refs(5)).
        reset.write_text("5", "ascii")
    except OSError:  # a container may forbid it
        return None
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)


def _status(key: str) -> int:
    return next(int(line.split()[1]) << 10 for line in _lines("/proc/self/status") if line.startswith(f"{key}:"))


def _lines(path: str | Path) -> list[str]:
    try:
        return Path(path).read_text("utf-8").splitlines() or [""]
    except OSError:
        return [""]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
