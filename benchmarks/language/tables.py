"""``python -m benchmarks.language.tables``: the tables of the studies, by the lab's own analysis, into their README.

Reads ``results.json`` and ``curves.csv`` of the studies' folders, ``speed.json`` and ``int8-cache.json``. What stands
around the tables is written by hand.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.markdown import put

from better_attention.lab.analysis.estimates import estimate, number
from better_attention.lab.analysis.paired import Comparison, compare_paired, corrected, p_text

from .study import EPOCH_UPDATES, EPOCHS, GROUPED, LONG, LONG_EPOCHS, LONG_EVERY, MECHANISMS, TEXTS, WINDOWS

HOME = "text-lm-shakespeare"
MODELS = (*MECHANISMS, GROUPED)
BITS = 1 / math.log(2)
Seeds = dict[int, float]
Curve = list[float]
"""Validation loss after every EPOCH_UPDATES updates."""
PAIRS: tuple[tuple[tuple[str, int | None], tuple[str, int | None]], ...] = (
    (("super", 16), ("standard", 16)),
    (("super", 32), ("standard", 32)),
    (("super", None), ("standard", None)),
    (("standard", 16), ("standard", None)),
    (("standard", 32), ("standard", None)),
    (("super", 16), ("super", None)),
    (("super", 32), ("super", None)),
    (("super", 16), ("standard", None)),
    (("super", 32), ("standard", None)),
)
"""(mechanism, window) against (mechanism, window)."""


def records(folder: Path) -> list[dict[str, Any]]:
    """The runs of a study; none where it has no results."""
    path = folder / "results.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else []


def by_seed(runs: Sequence[Mapping[str, Any]], mechanism: str, key: str) -> Seeds:
    """Seed -> a number of each run of a mechanism."""
    return {run["seed"]: run[key] for run in runs if run["mechanism"] == mechanism}


def curves(folder: Path) -> dict[tuple[str, int], Curve]:
    """(Mechanism, seed) -> its learning curve."""
    found: dict[tuple[str, int], Curve] = {}
    with (folder / "curves.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            mechanism, _, seed = row["run"].rsplit("-", 2)
            found.setdefault((mechanism, int(seed.removeprefix("s"))), []).append(float(row["validation_loss"]))
    return found


def at_update(curve: Curve, update: float, every: int = EPOCH_UPDATES) -> float:
    """The loss at an update, linearly between validations, of which there is one after ``every`` updates.

    >>> at_update([3.0, 2.0, 1.0], 125.0)
    1.5
    """
    place = min(max(update / every - 1, 0.0), len(curve) - 1.0)
    left = min(int(place), max(0, len(curve) - 2))
    return curve[left] + (place - left) * (curve[min(left + 1, len(curve) - 1)] - curve[left])


def mean(values: Seeds, digits: int) -> str:
    """Mean and interval over seeds."""
    return estimate(list(values.values())).format(digits) if values else "–"


def told(found: Comparison | None, digits: int) -> str:
    """Difference, corrected p and verdict."""
    if found is None:
        return "– | –"
    return f"{found.difference.format(digits, sign=True)}, {p_text(found.corrected_p)} | {found.verdict}"


def compared(pairs: Sequence[tuple[Seeds, Seeds]]) -> list[Comparison | None]:
    """Each of a family of comparisons, corrected together."""
    found = [compare_paired(ours, theirs) for ours, theirs in pairs]
    waiting = iter(corrected([one for one in found if one is not None]))
    return [None if one is None else next(waiting) for one in found]


def head(*names: str) -> Iterator[str]:
    """The first two lines of a table."""
    yield f"| {' | '.join(names)} |"
    yield "|---" * len(names) + "|"


def equal_parameters(title: str, runs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A row a mechanism: parameters, test loss, bits, accuracy, each with its difference to standard."""
    present = [m for m in MODELS if by_seed(runs, m, "test_loss")]
    standard = {key: by_seed(runs, "standard", key) for key in ("test_loss", "test_accuracy")}
    others = [m for m in present if m != "standard"]
    families = {
        key: dict(zip(others, compared([(by_seed(runs, m, key), base) for m in others]), strict=True))
        for key, base in standard.items()
    }
    yield f"### {title}: equal parameters\n"
    yield from head(
        *("mechanism", "parameters", "seeds", "test loss, nats/character", "bits/character", "accuracy %"),
        *("loss − standard, p", "", "accuracy − standard, p", ""),
    )
    for m in present:
        bits, loss, accuracy = (by_seed(runs, m, f"test_{key}") for key in ("bits_per_character", "loss", "accuracy"))
        size = next(run["total_params"] for run in runs if run["mechanism"] == m)
        gaps = (
            [" | "] * 2
            if m == "standard"
            else [told(families[key][m], d) for key, d in zip(standard, (3, 2), strict=True)]
        )
        cells = (m, number(size, 0), str(len(loss)), mean(loss, 3), mean(bits, 3), mean(accuracy, 2), *gaps)
        yield f"| {' | '.join(cells)} |"
    yield ""


def equal_time(
    title: str,
    lines: Mapping[tuple[str, int], Curve],
    speed: Sequence[Mapping[str, Any]],
    *,
    part: str = "training",
    epochs: int = EPOCHS,
    every: int = EPOCH_UPDATES,
) -> Iterator[str]:
    """A row a mechanism: its update time, the update that the budget reaches, the validation loss there."""
    rows = {row["model"]: row for row in speed if row["part"] == part}
    unit = rows["standard"]["seconds"]["median"]
    taken = {m: unit * row["to_standard"]["median"] for m, row in rows.items()}  # by ratios within rounds
    present = [m for m in MODELS if m in taken and any(name == m for name, _ in lines)]
    budget = epochs * every * min(taken[m] for m in present)
    reached = {m: budget / taken[m] for m in present}
    losses = {m: {s: at_update(c, reached[m], every) for (n, s), c in lines.items() if n == m} for m in present}
    others = [m for m in present if m != "standard"]
    gaps = dict(zip(others, compared([(losses[m], losses["standard"]) for m in others]), strict=True))
    yield f"### {title}: equal training time, {budget:.1f} s of one thread\n"
    yield from head("mechanism", "ms an update", "update reached", "validation loss there", "− standard, p", "")
    for m in present:
        gap = " | " if m == "standard" else told(gaps[m], 3)
        yield f"| {m} | {1e3 * taken[m]:.1f} | {reached[m]:.0f} | {mean(losses[m], 3)} | {gap} |"
    yield ""


def windows(results: Path, speed: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A row a model, then the pairs."""
    runs = {w: records(results / HOME / name) for w, name in WINDOWS.items()}
    # Standard at width 64 is the same run in the study of equal parameters.
    runs[None] = [*runs[None], *(r for r in records(results / HOME) if r["mechanism"] == "standard")]
    models = [(m, w) for w in WINDOWS for m in ("standard", "super") if by_seed(runs[w], m, "test_loss")]
    if len(models) < 2:
        return
    timed = {(row["part"], row["model"]): row for row in speed}

    def cell(part: str, m: str, w: int | None, show: Any) -> str:
        row = timed.get((part, m if w is None else f"{m}, window {w}"))
        return "–" if row is None else show(row)

    yield "### Windows, Tiny Shakespeare, width 64\n"
    yield from head(
        *("mechanism", "window", "parameters", "seeds", "test loss", "bits/character", "trained tokens/s, ℓ 64"),
        *("ℓ 1,024", "decoded tokens/s, ℓ 64", "ℓ 1,024", "cache at 1,024 tokens, bytes"),
    )
    for m, w in models:
        loss, bits = by_seed(runs[w], m, "test_loss"), by_seed(runs[w], m, "test_bits_per_character")
        size = next(run["total_params"] for run in runs[w] if run["mechanism"] == m)
        speeds = [
            cell("windows, training", m, w, lambda r: number(16 * 64 / r["seconds"]["median"], 0)),
            cell("windows, training at 1,024", m, w, lambda r: number(1024 / r["seconds"]["median"], 0)),
            cell("windows, decoding", m, w, lambda r: number(1 / r["seconds"]["median"], 0)),
            cell("windows, decoding at 1,024", m, w, lambda r: number(1 / r["seconds"]["median"], 0)),
            cell("windows, decoding at 1,024", m, w, lambda r: number(r["cache_bytes"], 0)),
        ]
        first = (m, "none" if w is None else str(w), number(size, 0), str(len(loss)), mean(loss, 3), mean(bits, 3))
        yield f"| {' | '.join((*first, *speeds))} |"
    pairs = [pair for pair in PAIRS if all(model in models for model in pair)]
    found = compared([tuple(by_seed(runs[w], m, "test_loss") for m, w in pair) for pair in pairs])  # type: ignore[misc] # two
    yield "\n| | loss, difference, p | |\n|---|---|---|"
    for pair, one in zip(pairs, found, strict=True):
        names = (f"{m}, {'no window' if w is None else f'window {w}'}" for m, w in pair)
        yield f"| {' − '.join(names)} | {told(one, 3)} |"
    yield ""


def int8(found: Mapping[str, Any]) -> Iterator[str]:
    """A row a mechanism."""
    rows = found["rows"]
    yield "### int8 cache, Tiny Shakespeare's test text read token by token\n"
    yield from head(
        *("mechanism", "seeds", "bits/character, float32 cache", "int8 − float32", "largest change of a probability"),
        *("same likeliest character %", "cache bytes, int8 / float32"),
    )
    for m in (m for m in MECHANISMS if any(row["mechanism"] == m for row in rows)):
        own = [row for row in rows if row["mechanism"] == m]
        exact = {row["seed"]: row["bits_float32"] for row in own}
        change = {row["seed"]: row["bits_int8"] - row["bits_float32"] for row in own}
        largest = max(row["largest_probability_difference"] for row in own)
        same = min(row["same_choice"] for row in own)
        share = own[0]["bytes_int8"] / own[0]["bytes_float32"]
        gap = estimate(list(change.values())).format(5, sign=True)
        yield f"| {m} | {len(own)} | {mean(exact, 4)} | {gap} | {largest:.4f} | {100 * same:.2f} | {share:.3f} |"
    yield ""


def document(results: Path) -> str:
    """All tables."""
    home = results / HOME
    speed = json.loads(path.read_text("utf-8"))["rows"] if (path := home / "speed.json").exists() else []
    lines: list[str] = []
    for title, name in TEXTS.items():
        if runs := records(results / name):
            lines += equal_parameters(title, runs)
            lines += equal_time(title, curves(results / name), speed) if speed else []
    lines += windows(results, speed)
    if (path := home / "int8-cache.json").exists():
        lines += int8(json.loads(path.read_text("utf-8")))
    return "\n".join(lines)


def longer(results: Path) -> str:
    """The tables of the longer study."""
    home = results / LONG
    # Its runs are called by the mechanism, which standard has in both folders.
    runs = [*records(home), *(run | {"mechanism": GROUPED} for run in records(home / "grouped"))]
    lines = list(equal_parameters("Tiny Shakespeare, 2,000 updates", runs))
    if (path := home / "speed.json").exists():
        speed = json.loads(path.read_text("utf-8"))["rows"]
        found = {**curves(home), **{(GROUPED, seed): curve for (_, seed), curve in curves(home / "grouped").items()}}
        setting: dict[str, Any] = {"part": "longer, training", "epochs": LONG_EPOCHS, "every": LONG_EVERY}
        lines += equal_time("Tiny Shakespeare, 2,000 updates", found, speed, **setting)
        lines += decoding(speed, runs)
    lines += rivals(runs)
    return "\n".join(lines)


def decoding(speed: Sequence[Mapping[str, Any]], runs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A row a model: tokens a second, and the bytes of a cache."""
    yield "### Decoding 32 tokens behind 32, and what a cache takes\n"
    yield from head("mechanism", "decoded tokens/s", "times standard's", "cache, bytes a token")
    for row in (row for row in speed if row["part"] == "longer, decoding"):
        size = next(run["cache_bytes_per_token"] for run in runs if run["mechanism"] == row["model"])
        rate, times = number(1 / row["seconds"]["median"], 0), 1 / row["to_standard"]["median"]
        yield f"| {row['model']} | {rate} | {times:.2f} | {number(size, 0)} |"
    yield ""


def rivals(runs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Efficient attention and grouped heads, which have caches of about the same size."""
    (found,) = compared([tuple(by_seed(runs, m, "test_loss") for m in ("efficient", GROUPED))])  # type: ignore[list-item]
    yield "### Two ways to half a cache\n"
    yield from head("", "loss, difference, p", "")
    yield f"| efficient − {GROUPED} | {told(found, 3)} |"
    yield ""


def main() -> None:
    """Put the tables between the two marks of the READMEs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.language.tables", description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("results"))
    args = parser.parse_args()
    put(args.results / HOME / "README.md", document(args.results))
    if records(args.results / LONG):
        put(args.results / LONG / "README.md", longer(args.results))


if __name__ == "__main__":
    main()
