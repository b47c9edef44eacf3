"""The copy of the paper's tables: names and units, and figures that must follow from other figures."""

from __future__ import annotations

import pytest

from better_attention.costs import cost
from better_attention.lab import published
from better_attention.lab.analysis.summary import COLUMNS

TASKS = ("mnist", "cifar100", "imagenet", "imagenet-equal-size", "imdb", "amazon", "translation")
LENGTHS = {"mnist": 64, "cifar100": 257, "imdb": 32, "amazon": 64, "translation": 20}  # PAPERS: implied by the counts


@pytest.mark.parametrize(("task", "rows"), list(zip(TASKS, (12, 16, 4, 4, 12, 12, 9), strict=True)))
def test_every_table_is_whole(task: str, rows: int) -> None:
    found = published.rows(task)
    assert len(found) == rows
    assert all(
        set(row) == {"task", "mechanism", "score", "heads", "embed_dim", "source", *published.COLUMNS} for row in found
    )
    assert {row["task"] for row in found} == {task}
    assert len({(row["mechanism"], row["heads"]) for row in found}) == rows


@pytest.mark.parametrize("task", LENGTHS)
def test_parameter_counts_are_those_of_our_layers(task: str) -> None:
    for row in published.rows(task):
        ours = cost(int(row["embed_dim"]), int(row["heads"]), LENGTHS[task], mechanism=str(row["mechanism"]))  # type: ignore[arg-type]
        assert row["attention_params"] == ours.params


def test_the_names_are_those_of_our_records() -> None:
    # The paper measured neither the speed against torch's layer nor that of learning, and trained no language model.
    own = {"times_as_fast", "epochs_to_threshold", "seconds_to_threshold"}
    own |= {"train_perplexity", "test_perplexity", "train_bits_per_character", "test_bits_per_character"}
    own |= {"tokens_per_second", "decoded_per_second", "cache_bytes_per_token"}
    assert {column.key for column in COLUMNS} - own <= set(published.COLUMNS)


@pytest.mark.parametrize("task", TASKS)
def test_units(task: str) -> None:
    for row in published.rows(task):
        for key in published.COLUMNS:
            value = row[key]
            if value is None:
                continue
            assert isinstance(value, int | float)
            if key.endswith(("accuracy", "top5", "bleu")):
                assert 10 < value < 100  # per cent, not a share
            if key.endswith("loss"):
                assert 0 < value < 4


@pytest.mark.parametrize(
    ("task", "mechanism", "heads", "key", "value"),
    [  # read off the paper's text, one from each table
        ("mnist", "super", 4, "train_accuracy", 96.96),
        ("mnist", "optimised", 1, "epoch_seconds", 7.56),
        ("cifar100", "super", 8, "train_top5", 86.51),
        ("cifar100", "standard", 4, "test_loss", 2.91),
        ("imagenet", "optimised", 12, "test_accuracy", 36.31),
        ("imagenet", "super", 12, "attention_params", 1_220_000),
        ("imagenet-equal-size", "super", 12, "total_params", 60_440_000),
        ("imdb", "super", 2, "test_accuracy", 78.35),
        ("amazon", "super", 4, "test_loss", 1.058),
        ("translation", "optimised", 4, "train_bleu", 24.5),
    ],
)
def test_cells_read_off_the_paper(task: str, mechanism: str, heads: int, key: str, value: float) -> None:
    (row,) = [r for r in published.rows(task) if (r["mechanism"], r["heads"]) == (mechanism, heads)]
    assert row[key] == value


def test_what_the_paper_lacks() -> None:
    assert published.rows("digits") == []
    assert published.rows("../table05_mnist.csv") == []
    assert {row["test_top5"] for row in published.rows("mnist")} == {None}


def test_a_caller_cannot_spoil_the_copy() -> None:
    published.rows("imdb")[0]["test_accuracy"] = 0.0
    assert published.rows("imdb")[0]["test_accuracy"] == 78.09


def test_edge_inference() -> None:
    rows = published.edge_inference()
    assert len(rows) == 12
    assert [row["imdb"] for row in rows if row["heads"] == 8] == [0.266, 0.262, 0.256, 0.264]
