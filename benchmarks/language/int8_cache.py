"""``python -m benchmarks.language.int8_cache RUNS``: what an int8 cache costs trained language models in loss.

Every sample of the test text is read token by token, all samples together: with a float32 cache and with an int8 one.
Writes ``int8-cache.json``.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import better_attention as ba
from better_attention.lab.csv_json import write_json
from better_attention.lab.models.language_model import LanguageModel
from better_attention.lab.runs.load import load_run
from better_attention.lab.runs.provenance import commit
from better_attention.lab.tasks.language import LanguageTask

BITS = 1 / math.log(2)


@torch.inference_mode()
def step_by_step(model: LanguageModel, tokens_BL: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, int]:
    """Logits (B, L, V) of all tokens, read one at a time with a cache of that type; and the cache's bytes."""
    cache = ba.ModelCache(model, len(tokens_BL), max_len=tokens_BL.shape[1], dtype=dtype)
    logits = [model(tokens_B1, cache=cache) for tokens_B1 in tokens_BL.split(1, dim=1)]
    return torch.cat(logits, dim=1), cache.nbytes


@torch.inference_mode()
def judged(folder: Path, data: Path) -> dict[str, Any]:
    """A row: bits a character with both caches, and how far apart probabilities and choices are."""
    run = load_run(folder)
    task, model = run.task, run.model
    assert isinstance(task, LanguageTask)  # noqa: S101 - for the type checker
    assert isinstance(model, LanguageModel)  # noqa: S101 - for the type checker
    split = task.load(data).test
    tokens, targets = split.inputs.contiguous(), split.targets.contiguous()
    whole = model(tokens)
    exact, bytes_float = step_by_step(model, tokens, None)
    rough, bytes_int8 = step_by_step(model, tokens, torch.int8)
    bits = {
        name: BITS * float(task.losses(logits, targets).mean())
        for name, logits in (("full", whole), ("float32", exact), ("int8", rough))
    }
    moved = (rough.softmax(-1) - exact.softmax(-1)).abs()
    return {
        "run": folder.name,
        "mechanism": run.result["mechanism"],
        "seed": run.result["seed"],
        "characters": targets.numel(),
        **{f"bits_{name}": value for name, value in bits.items()},
        "largest_probability_difference": float(moved.max()),
        "same_choice": float((rough.argmax(-1) == exact.argmax(-1)).float().mean()),
        "bytes_float32": bytes_float,
        "bytes_int8": bytes_int8,
    }


def main() -> None:
    """Judge all finished runs of a folder."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.language.int8_cache", description=__doc__)
    parser.add_argument("runs", type=Path, help="folder of `better-attention compare text-lm`")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("results/text-lm-shakespeare/int8-cache.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    folders = sorted(path.parent for path in args.runs.glob("*/result.json"))
    write_json(args.out, {"commit": commit(), "rows": [judged(folder, args.data) for folder in folders]})


if __name__ == "__main__":
    main()
