"""``python -m benchmarks.conversion.speed``: speed and size of converted MiniLM beside the host's own sdpa attention.

Batches of 32 sentences of 64 tokens without padding, in PyTorch (eager and through ``torch.compile``) and in ONNX
Runtime (float32 and int8); every round times all models in turn, and ratios are formed within a round. Weights do not
matter here: the models are converted by theirs alone.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import better_attention as ba
from better_attention.bench.machine import describe
from better_attention.bench.runner import Spread, no_garbage_collection
from better_attention.lab.csv_json import write_json
from better_attention.lab.timing import alternate

from . import minilm, records

HOST = "host, sdpa"
MECHANISMS = ("standard", "optimised", "efficient", "super", "expressive")
BATCH, LENGTH = 32, 64
INPUTS = ("input_ids", "attention_mask")
EAGER, COMPILED, ONNX, INT8 = "PyTorch", "torch.compile", "ONNX Runtime", "ONNX Runtime, int8"
RUNTIMES = {"eager": EAGER, "compiled": COMPILED, "onnx": ONNX, "int8": INT8}
"""Word of the command line -> what it stands for in the tables."""
Call = Callable[[], Tensor]


class LastHidden(nn.Module):
    """The host with two inputs and one output, as an export wants it."""

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self.host = host

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, L) twice, to (B, L, D)."""
        hidden: Tensor = self.host(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return hidden


def models() -> dict[str, nn.Module]:
    """The host's own model, and its conversions."""
    made = {HOST: minilm.load()}
    for mechanism in MECHANISMS:
        model = minilm.load()
        length = LENGTH if ba.Mechanism.of(mechanism).aligned else None
        ba.convert(model, mechanism, exact=False, keep_original=False, max_len=length)
        made[mechanism] = model
    return {name: LastHidden(model).eval() for name, model in made.items()}


def inputs() -> tuple[Tensor, Tensor]:
    """Random tokens, without padding."""
    tokens = torch.randint(1000, 30000, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    return tokens, torch.ones_like(tokens)


def exported(model: nn.Module, path: Path) -> Path:
    """The model as an ONNX file with free batch and length, compared with the model when it is made; made once."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        tokens = torch.randint(1000, 30000, (3, 17), generator=torch.Generator().manual_seed(0))
        ba.export_onnx(model, path, dict(zip(INPUTS, (tokens, torch.ones_like(tokens)), strict=True)))
    return path


def quantised(exported: Path) -> Path:
    """The file in int8, beside it; made once. It need not agree: weights do not matter here."""
    path = exported.with_suffix(".int8.onnx")
    if not path.exists():
        tokens, mask = inputs()
        print(ba.quantise(exported, [dict(zip(INPUTS, (tokens[:8], mask[:8]), strict=True))], path=path, refuse=False))
    return path


def runtime(path: Path, threads: int) -> Call:
    """A call of ONNX Runtime on the file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {name: value.numpy() for name, value in zip(INPUTS, inputs(), strict=True)}
    return lambda: torch.from_numpy(np.asarray(session.run(None, feed)[0]))


def eager(model: nn.Module) -> Call:
    """A call of PyTorch."""
    tokens, mask = inputs()

    def call() -> Tensor:
        with torch.inference_mode():
            result: Tensor = model(tokens, mask)
        return result

    return call


def compiled(model: nn.Module) -> Call:
    """A call of the model through ``torch.compile``, for this one shape."""
    tokens, mask = inputs()
    program = torch.compile(model, dynamic=False)

    def call() -> Tensor:
        with torch.no_grad():  # inference tensors would be another program
            result: Tensor = program(tokens, mask)
        return result

    return call


def measure(calls: dict[tuple[str, str], Call], rounds: int) -> dict[tuple[str, str], list[float]]:
    """Seconds of a call, for each of the rounds."""
    seconds: dict[tuple[str, str], list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    with no_garbage_collection():
        for _, name in alternate(list(calls), rounds):
            began = perf_counter()
            calls[name]()
            seconds[name].append(perf_counter() - began)
    return seconds


def rows(
    made: dict[str, nn.Module], sizes: dict[tuple[str, str], int], calls: dict[tuple[str, str], Call], rounds: int
) -> list[dict[str, Any]]:
    """A row for each model and runtime: speed beside the host in PyTorch, and beside the host in the same runtime."""
    seconds = measure(calls, rounds)
    found = []
    for (where, name), mine in seconds.items():
        base, same = seconds[EAGER, HOST], seconds[where, HOST]
        error = float((calls[where, name]() - calls[EAGER, name]()).abs().max())
        found.append(
            {
                "runtime": where,
                "model": name,
                "parameters": records.parameters(made[name]),
                "bytes": sizes[where, name],
                "seconds": asdict(Spread.of(mine)),
                "times_as_fast": asdict(Spread.of([b / m for b, m in zip(base, mine, strict=True)])),
                "times_as_fast_same_runtime": asdict(Spread.of([b / m for b, m in zip(same, mine, strict=True)])),
                "difference_to_pytorch": error,
            }
        )
    return found


def main() -> None:
    """Measure, and write speed.json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.conversion.speed", description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--runtimes", default=",".join(RUNTIMES), help="some of these, or all")
    parser.add_argument("--work", type=Path, default=Path("runs/conversion"), help="where the ONNX files are kept")
    parser.add_argument("--out", type=Path, default=Path("results/conversion"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    machine = describe(records.command("benchmarks.conversion.speed")) | {"load_average_before": os.getloadavg()[0]}
    made = models()
    calls: dict[tuple[str, str], Call] = {}
    sizes: dict[tuple[str, str], int] = {}
    for short, where in RUNTIMES.items():
        if where != EAGER and short not in args.runtimes.split(","):
            continue
        for name, model in made.items():
            if where in (EAGER, COMPILED):
                calls[where, name] = eager(model) if where == EAGER else compiled(model)
                sizes[where, name] = 4 * records.parameters(model)
            else:
                file = exported(model, args.work / "onnx" / f"{name.split(',')[0]}.onnx")
                file = quantised(file) if where == INT8 else file
                calls[where, name] = runtime(file, args.threads)
                sizes[where, name] = file.stat().st_size
    machine["load_average_at_timing"] = os.getloadavg()[0]
    found = {"machine": machine, "batch": BATCH, "length": LENGTH, "rounds": args.rounds}
    write_json(args.out / "speed.json", found | {"rows": rows(made, sizes, calls, args.rounds)})


if __name__ == "__main__":
    main()
