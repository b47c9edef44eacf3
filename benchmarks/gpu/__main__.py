"""``python -m benchmarks.gpu``: check every contender against the reference, time them, print one table.

Speeds are against the best backend of ``F.scaled_dot_product_attention`` in the same row. A contender that is wrong, or
that the device or torch refuses, is named and left out. Without a CUDA device the command says so, and succeeds.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import contenders as who
from .timing import Cell, alternating, cells

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
WIDTHS = (64, 128)
CHECK_LENGTH = 509
"""Contenders are checked at a length that no tile divides."""
TOLERANCE = {torch.bfloat16: 0.03, torch.float16: 0.01, torch.float32: 2e-3}
"""The largest relative error of output and gradients; that of SDPA's own backends in bfloat16 is about 0.01."""

NOTHING_HERE = (
    "No CUDA device here: nothing is measured. `python -m benchmarks.gpu.resources` compiles the kernels for an H100 "
    "without one."
)

GOALS = {
    "forward": ("ours, expressive", 1.0),
    "forward and backward": ("ours, expressive", 0.9),
    "decode": ("ours, softmax, K = V", 1.8),
}
"""By direction: whose speed should be how many times that of SDPA's best backend."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="features of a head")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--tokens", type=int, default=16384, help="in all samples of a row together")
    parser.add_argument("--features", type=int, default=2048, help="in all heads together")
    parser.add_argument("--decode-length", type=int, default=16384, help="keys of the rows with one query")
    parser.add_argument("--decode-batch", type=int, default=8, help="samples of these rows")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="two lengths, three rounds, no FlexAttention")
    parser.add_argument("--out", type=Path, help="a folder for gpu-DEVICE.json and .csv")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 unless one of ours is wrong."""
    options = parse(arguments)
    if not torch.cuda.is_available():
        print(NOTHING_HERE)
        return 0
    if options.quick:
        options.lengths, options.rounds = options.lengths[:2], 3
    dtype = getattr(torch, options.dtype)
    if dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        print(f"{torch.cuda.get_device_name()} has no bfloat16: pass --dtype float16.")
        return 2
    about = describe(options)
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    found: list[Cell] = []
    wrong: list[str] = []
    for direction in GOALS:
        for width in options.widths:
            right = check(direction, width, options, dtype, wrong)
            for length in (options.decode_length,) if direction == "decode" else options.lengths:
                found += measure(direction, length, width, right, options, dtype)
                print(lines([cell for cell in found if (cell.length, cell.width) == (length, width)
                             and cell.direction == direction]), flush=True)  # fmt: skip
    print(table(found))
    for verdict in verdicts(found):
        print(verdict)
    for line in wrong:
        print(line)
    if options.out is not None:
        write(options.out, about, found, wrong)
    return 1 if any("ours" in line and "WRONG" in line for line in wrong) else 0


def describe(options: argparse.Namespace) -> dict[str, Any]:
    """The device and the software, and the command's own settings."""
    properties = torch.cuda.get_device_properties(0)
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = "missing"
    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version,
        "python": platform.python_version(),
        "dtype": options.dtype,
        "tokens": options.tokens,
        "features": options.features,
        "rounds": options.rounds,
    }


def check(direction: str, width: int, options: argparse.Namespace, dtype: torch.dtype, wrong: list[str]) -> list[str]:
    """The names of the contenders whose results are right; what is wrong or missing is added to ``wrong``."""
    decode, names = direction == "decode", []
    length = options.decode_length if decode else CHECK_LENGTH
    for c in who.contenders(length, decode=decode, flex=not options.quick):
        q, k, v = who.inputs(
            length, width, decode=decode, shared=c.shared, tokens=2 * length, features=4 * width, device="cuda",
            dtype=dtype,
        )  # fmt: skip
        upstream = torch.randn_like(q) if direction == "forward and backward" else None
        try:
            found = who.computed(c, q, k, v, upstream)
        except (RuntimeError, ValueError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            wrong.append(f"{direction}, width {width}: {c.name} cannot: {first}")
            continue
        error = who.worst(found, who.exact(q, k, v, c.score, not decode, upstream))
        if error < TOLERANCE[dtype]:
            names.append(c.name)
        else:
            wrong.append(f"{direction}, width {width}: {c.name} is WRONG: relative error {error:.2g}")
    return names


def measure(
    direction: str, length: int, width: int, right: Sequence[str], options: argparse.Namespace, dtype: torch.dtype
) -> list[Cell]:
    """One row: every contender that is right, in turns."""
    decode = direction == "decode"
    tokens = options.decode_batch * length if decode else options.tokens
    calls = {}
    for c in who.contenders(length, decode=decode, flex=not options.quick):
        if c.name in right:
            qkv = who.inputs(
                length, width, decode=decode, shared=c.shared, tokens=tokens, features=options.features, device="cuda",
                dtype=dtype,
            )  # fmt: skip
            calls[c.name] = who.timed(c, qkv, direction == "forward and backward")
    return cells(direction, length, width, alternating(calls, options.rounds))


# --- what the times amount to -----------------------------------------------------------------------------------------


def best_sdpa(row: Sequence[Cell]) -> Cell | None:
    """The fastest of PyTorch's backends in a row; None if there is none."""
    return min((c for c in row if c.contender.startswith("SDPA")), key=lambda c: c.milliseconds, default=None)


def rows(found: Sequence[Cell]) -> dict[tuple[str, int, int], list[Cell]]:
    """The cells of each row."""
    grouped: dict[tuple[str, int, int], list[Cell]] = {}
    for cell in found:
        grouped.setdefault((cell.direction, cell.width, cell.length), []).append(cell)
    return grouped


def lines(row: Sequence[Cell]) -> str:
    """One row while the command runs."""
    best = best_sdpa(row)
    return "\n".join(
        f"  {c.direction}, {c.length} keys, width {c.width}: {c.contender} {c.milliseconds:.3f} ms "
        f"({c.low:.3f} to {c.high:.3f})" + (f", {best.milliseconds / c.milliseconds:.2f} times as fast" if best else "")
        for c in row
    )


def table(found: Sequence[Cell]) -> str:
    """All rows: milliseconds of the best backend, and how many times as fast the others are."""
    names = list(dict.fromkeys(c.contender for c in found))
    head = ["direction", "width", "length", "best of SDPA", "ms", *names]
    out = ["| " + " | ".join(head) + " |", "|---|---:|---:|---|" + "---:|" * (len(names) + 1)]
    for (direction, width, length), row in rows(found).items():
        best = best_sdpa(row)
        times = {c.contender: c for c in row}
        ratios = [f"{best.milliseconds / times[n].milliseconds:.2f}" if best and n in times else "–" for n in names]
        first = [best.contender, f"{best.milliseconds:.3f}"] if best else ["none", "–"]
        out.append("| " + " | ".join([direction, str(width), str(length), *first, *ratios]) + " |")
    return "\n".join(out)


def verdicts(found: Sequence[Cell]) -> list[str]:
    """Each goal of the project, and whether the rows of this run reach it."""
    result = []
    for direction, (name, goal) in GOALS.items():
        ratios = []
        for (way, _, _), row in rows(found).items():
            best, ours = best_sdpa(row), next((c for c in row if c.contender == name), None)
            if way == direction and best and ours:
                ratios.append(best.milliseconds / ours.milliseconds)
        if not ratios:
            result.append(f"{direction}: {name} was not measured against SDPA.")
            continue
        reached = sum(ratio >= goal for ratio in ratios)
        result.append(
            f"{direction}: {name} is {min(ratios):.2f} to {max(ratios):.2f} times as fast as the best of SDPA; "
            f"the goal of {goal:g} is reached in {reached} of {len(ratios)} rows."
        )
    return result


def write(folder: Path, about: dict[str, Any], found: Sequence[Cell], wrong: Sequence[str]) -> None:
    """The measurements as JSON and CSV."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / ("gpu-" + "-".join(about["device"].lower().split()))
    document = {
        "machine": about,
        "rows": [c.record() for c in found],
        "left_out": list(wrong),
        "goals": verdicts(found),
    }
    stem.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    with stem.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(Cell.__dataclass_fields__))
        writer.writeheader()
        writer.writerows(c.record() for c in found)


if __name__ == "__main__":
    raise SystemExit(main())
