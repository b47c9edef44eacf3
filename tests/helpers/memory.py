"""How much memory a piece of code keeps alive."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def profiled_memory() -> Iterator[dict[str, int]]:
    """Fills ``peak``: the most bytes that were alive at once, beyond those alive at the start."""
    measured: dict[str, int] = {}
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        yield measured
    alive = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    measured["peak"] = peak
