"""``python -m benchmarks.language.speed``: how fast the models of the studies train and decode, on a quiet machine.

Every round times all models in turn, so that what slows the machine down meets all of them. Weights do not matter for
speed and are random. Writes ``speed.json``; rows that are there are kept, so that it can be run in pieces.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from better_attention import ModelCache
from better_attention.bench.machine import describe
from better_attention.bench.runner import Spread, no_garbage_collection
from better_attention.lab.csv_json import write_json
from better_attention.lab.generation.speed import decoding_speed
from better_attention.lab.models.language_model import LanguageModel
from better_attention.lab.timing import alternate

from .study import EQUAL, HEADS, LONGER, WINDOWED, Model

PARTS = {
    "training": (EQUAL, 64, 16),
    "longer, training": (LONGER, 64, 16),
    "longer, decoding": (LONGER, 64, None),
    "windows, training": (WINDOWED, 64, 16),
    "windows, training at 1,024": (WINDOWED, 1024, 1),
    "decoding": (EQUAL, 64, None),
    "windows, decoding": (WINDOWED, 64, None),
    "windows, decoding at 1,024": (WINDOWED, 1024, None),
}
"""Name of a part -> its models, the length of a sample, and samples of an update; None: decoding."""
DECODED = 32
"""Tokens that are decoded, up to the length."""
PIECE = 32
"""Tokens that are read at once where bytes are counted."""


def updates(models: tuple[Model, ...], length: int, batch: int, seconds: float) -> dict[str, list[float]]:
    """Seconds of an update of each model, round by round."""
    steps = {}
    for model in models:
        task, module = model.task(length), model.build(length).train()
        optimiser = task.make_optimiser(module)
        inputs, targets = task.random_samples(batch).batch(slice(batch))

        def step(
            task: Any = task, module: Any = module, optimiser: Any = optimiser, x: Any = (inputs, targets)
        ) -> None:
            task.losses(module(x[0]), x[1]).mean().backward()
            optimiser.step()
            optimiser.zero_grad()

        steps[model.name] = step
        for _ in range(3):
            step()
    taken: dict[str, list[float]] = {name: [] for name in steps}
    with no_garbage_collection():
        for _, name in alternate(list(steps), 200, least=3, seconds=seconds):
            began = perf_counter()
            steps[name]()
            taken[name].append(perf_counter() - began)
    return taken


def decoded(models: tuple[Model, ...], length: int, seconds: float) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds a token of each model, round by round, and bytes of its cache behind ``length`` tokens."""
    made = {model.name: model.build(length).eval() for model in models}
    prompt = torch.randint(10, (length - DECODED,), generator=torch.Generator().manual_seed(0)).tolist()
    taken: dict[str, list[float]] = {name: [] for name in made}
    sizes = {name: float(cache_bytes(model, length)) for name, model in made.items()}
    with no_garbage_collection():
        for turn, name in alternate(list(made), 100, least=4, seconds=seconds):
            found = decoding_speed(made[name], prompt, length)
            if turn and found.tokens_per_second is not None:  # the first round warms up
                taken[name].append(1 / found.tokens_per_second)
    return taken, sizes


@torch.inference_mode()
def cache_bytes(model: LanguageModel, length: int) -> int:
    """Bytes of the caches after ``length`` tokens, read in pieces: read at once, even a window's hold all of them."""
    cache = ModelCache(model, 1, max_len=length)
    for piece in torch.zeros(1, length, dtype=torch.int64).split(PIECE, dim=1):
        model(piece, cache=cache, last=1)
    return cache.nbytes


def main() -> None:
    """Measure the parts that are missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.language.speed", description=__doc__)
    parser.add_argument("--parts", default=";".join(PARTS), help="with ; between: " + "; ".join(PARTS))
    parser.add_argument("--seconds", type=float, default=25.0, help="no new round of a part after that")
    parser.add_argument("--out", type=Path, default=Path("results/text-lm-shakespeare/speed.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    kept = json.loads(args.out.read_text("utf-8")) if args.out.exists() else {"rows": []}
    rows = kept["rows"]
    for part in args.parts.split(";"):
        if any(row["part"] == part for row in rows):
            continue
        models, length, batch = PARTS[part]
        if batch is None:
            taken, sizes = decoded(models, length, args.seconds)
        else:
            taken, sizes = updates(models, length, batch, args.seconds), {}
        for model in models:
            row = {"part": part, "model": model.name, "width": model.build().tokens.weight.shape[1], "heads": HEADS}
            mine, base = taken[model.name], taken["standard"]
            ratio = asdict(Spread.of([a / b for a, b in zip(mine, base, strict=True)]))
            row |= {"length": length, "rounds": len(mine), "seconds": asdict(Spread.of(mine)), "to_standard": ratio}
            rows.append(row | ({"cache_bytes": round(sizes[model.name])} if sizes else {}))
    write_json(args.out, {"machine": describe("python -m benchmarks.language.speed"), "rows": rows})


if __name__ == "__main__":
    main()
