"""The result tables of arXiv 2403.01643v2, as data, under the names and units of our own records."""

from __future__ import annotations

import csv
from functools import cache
from importlib.resources import files

_TABLES = {
    "mnist": ("table05_mnist.csv", "table 5"),
    "cifar100": ("table06_cifar100.csv", "table 6"),
    "imagenet": ("table01_vision.csv", "table 1"),
    "imagenet-equal-size": ("table07_imagenet_equal_size.csv", "table 7"),
    "imdb": ("table08_imdb.csv", "table 8"),
    "amazon": ("table09_amazon.csv", "table 9"),
    "translation": ("table10_translation.csv", "table 10"),
}
_NAMES = {
    "epoch_time_s": "epoch_seconds",
    **{f"{split}_acc": f"{split}_accuracy" for split in ("train", "test")},
}
_METRICS = ("loss", "accuracy", "top5", "bleu")
COLUMNS = (
    "attention_params",
    "total_params",
    "epoch_seconds",
    *(f"{split}_{metric}" for split in ("train", "test") for metric in _METRICS),
)
"""The numbers a row can hold: accuracies and top 5 in per cent, BLEU in points, parameters of one attention layer."""

SAMPLES = {"mnist": 70_000, "cifar100": 60_000, "imagenet": 1_331_167, "imdb": 50_000, "amazon": 3_650_000}
"""Samples of a data set, all splits together, as the paper had them; of its translations it gives no number."""

Row = dict[str, str | int | float | None]


@cache
def _read(file: str) -> tuple[dict[str, str], ...]:
    text = files(__package__).joinpath(file).read_text(encoding="utf-8")
    return tuple(csv.DictReader(text.splitlines()))


def _number(text: str) -> float | int | None:
    """A cell as a number: ``66048``, ``0.209``, ``60.54M``, ``66K``; None where the paper has none."""
    if not text:
        return None
    unit = {"K": 1_000, "M": 1_000_000}.get(text[-1])
    if unit is not None:
        return round(float(text[:-1]) * unit)
    return int(text) if text.isdigit() else float(text)


def rows(task: str) -> list[Row]:
    """The paper's rows for ``task``, in its order; an empty list where the paper has none.

    Each row holds ``task``, ``mechanism``, ``score``, ``heads``, ``embed_dim``, ``source`` (the paper's table) and
    every name of :data:`COLUMNS`, None where the table has no such column. Means over five runs (ImageNet: one run),
    without a spread: the paper gives none. ``epoch_seconds`` were taken on an RTX 4090.

    Args:
        task: ``mnist``, ``cifar100``, ``imagenet``, ``imagenet-equal-size``, ``imdb``, ``amazon`` or ``translation``.

    >>> [row["test_accuracy"] for row in rows("mnist") if row["mechanism"] == "super"]
    [98.32, 98.52, 98.62]
    >>> rows("digits")
    []
    """
    if task not in _TABLES:
        return []
    file, source = _TABLES[task]
    found = []
    for cells in _read(file):
        if cells.get("dataset", task) != task:
            continue
        numbers = {_NAMES.get(name, name): cell for name, cell in cells.items()}
        row: Row = {
            "task": task,
            "mechanism": cells["mechanism"],
            "score": "softmax",
            "heads": int(cells["heads"]),
            "embed_dim": int(cells["d_model"]),
            "source": source,
        }
        row.update({name: _number(numbers.get(name, "")) for name in COLUMNS})
        found.append(row)
    return found


@cache
def edge_inference() -> tuple[Row, ...]:
    """Table 4: seconds that 5,000 samples take on an Apple M2, one row per mechanism and number of heads.

    >>> [row["mnist"] for row in edge_inference() if row["heads"] == 8]
    [6.89, 6.37, 6.1, 6.65]
    """
    found: list[Row] = []
    for cells in _read("table04_edge_inference.csv"):
        row: Row = {"mechanism": cells["mechanism"], "heads": int(cells["heads"])}
        row.update({name.removesuffix("_s"): _number(cell) for name, cell in cells.items() if name.endswith("_s")})
        found.append(row)
    return tuple(found)
