"""How long ``import better_attention`` takes beyond ``import torch``; the bound is 50 ms.

Each sample is a fresh interpreter that imports torch, then the package, then asks for the layer and the function, and
last for every other public name. Before the first sample one interpreter writes the byte code.

    python -m benchmarks.import_time [--repeats 15]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

SAMPLE = """
import json, sys, time
clock = time.perf_counter
start = clock()
import torch
torch_done = clock()
import better_attention as ba
package = clock()
ba.MultiheadAttention, ba.attention
core = clock()
for name in ba.__all__:
    getattr(ba, name)
names = clock()
print(json.dumps({"torch": torch_done - start, "package": package - torch_done, "layer and function": core - package,
                  "all other names": names - core}))
"""


def sample(cache: str) -> dict[str, float]:
    """Seconds of each stage in a fresh interpreter, its byte code kept in the folder ``cache``."""
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": cache}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run([sys.executable, "-c", SAMPLE], capture_output=True, text=True, env=environment, check=True)
    return json.loads(done.stdout)


def processor() -> str:
    """The processor's name, as far as the system says it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def measure(repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each stage, sorted."""
    with tempfile.TemporaryDirectory() as cache:
        sample(cache)
        samples = [sample(cache) for _ in range(repeats)]
    return {stage: sorted(1e3 * one[stage] for one in samples) for stage in samples[0]}


def main() -> None:
    """Measure and print one line per stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="interpreters to start (default: 15)")
    repeats = parser.parse_args().repeats
    print(f"{processor()}, Python {platform.python_version()}, {repeats} interpreters; milliseconds")
    print(f"{'stage':<20}{'median':>8}{'lowest':>8}{'highest':>9}")
    for stage, times in measure(repeats).items():
        print(f"{stage:<20}{statistics.median(times):>8.1f}{times[0]:>8.1f}{times[-1]:>9.1f}")


if __name__ == "__main__":
    main()
