"""How long ``import better_attention`` takes beyond ``import torch``; the bound is 50 ms.

Each sample is a fresh interpreter that has imported torch, and whose clock runs while it does one of four things. These
take turns. Before the first round one interpreter writes the byte code of all.

    python -m benchmarks.import_time [--rounds 15] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from better_attention.bench.machine import busy, describe

BOUND = 50.0
"""Milliseconds, for the median of each thing in BOUNDED."""

STATEMENTS = {
    "the package": "import better_attention",
    "the layer": "from better_attention import MultiheadAttention",
    "first call of attention": "import better_attention as ba; ba.attention(x, x, x)",
    "every public name": "from better_attention import *",
}
BOUNDED = ("the package", "the layer", "first call of attention")

SAMPLE = """
import json, time
clock = time.perf_counter
start = clock()
import torch
imported = clock()
x = torch.randn(1, 2, 8, 4)
before = clock()
{statement}
print(json.dumps([1e3 * (clock() - before), 1e3 * (imported - start)]))
"""


def sample(statement: str, cache: str) -> tuple[float, float]:
    """Milliseconds of a statement and of torch's own import, in a fresh interpreter whose byte code is in ``cache``."""
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": cache}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    code = SAMPLE.format(statement=statement)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    statement_ms, torch_ms = json.loads(done.stdout)
    return statement_ms, torch_ms


def measure(rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each statement and of torch's import, sorted."""
    times: dict[str, list[float]] = {name: [] for name in (*STATEMENTS, "torch itself")}
    with tempfile.TemporaryDirectory() as cache:
        sample(STATEMENTS["every public name"], cache)
        for _ in range(rounds):
            for name, statement in STATEMENTS.items():
                statement_ms, torch_ms = sample(statement, cache)
                times[name].append(statement_ms)
                times["torch itself"].append(torch_ms)
    return {name: sorted(of) for name, of in times.items()}


def summary(times: list[float]) -> dict[str, float]:
    """Median and spread of sorted times: the rounds from the first to the last tenth, and the extremes."""
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    middle = {"median": statistics.median(times), "tenth": tenths[0], "ninetieth": tenths[-1]}
    return {name: round(value, 2) for name, value in {**middle, "lowest": times[0], "highest": times[-1]}.items()}


def main() -> int:
    """Measure, print one line for each statement, and return 1 where the bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="interpreters for each statement (default: 15)")
    parser.add_argument("--out", type=Path, help="write the figures and the machine into this JSON file")
    options = parser.parse_args()
    machine = describe(f"python -m benchmarks.import_time --rounds {options.rounds}")
    print(
        f"{machine['cpu']}, Python {machine['versions']['python']}, torch {machine['versions']['torch']}; milliseconds"
    )
    if (warning := busy(machine)) is not None:
        print(f"warning: {warning}")
    rows = {name: summary(times) for name, times in measure(options.rounds).items()}
    print(f"{'':<26}" + "".join(f"{column:>11}" for column in rows["the package"]))
    for name, row in rows.items():
        print(f"{name:<26}" + "".join(f"{value:>11.1f}" for value in row.values()))
    met = all(rows[name]["median"] <= BOUND for name in BOUNDED)
    print(f"bound of {BOUND:.0f} ms: {'met' if met else 'missed'}")
    if options.out is not None:
        document = {"machine": machine, "rounds": options.rounds, "bound": BOUND, "met": met, "milliseconds": rows}
        options.out.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
