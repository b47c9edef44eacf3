"""``better-attention show``: pictures, equations and counts that follow from the mechanism's data; tasks."""

from __future__ import annotations

import argparse
import itertools
import json
from typing import Any

import pytest

from better_attention.cli import UserError
from better_attention.cli import show as verb
from better_attention.cli.mechanism_drawing import draw, equations, legend, source
from better_attention.costs import cost
from better_attention.lab.tasks.catalogue import TASKS
from better_attention.mechanism import MECHANISMS, Mechanism

EVERY = [
    Mechanism(frozenset(letters), aligned, score)
    for size in range(5)
    for letters in itertools.combinations("qkvo", size)
    for aligned in (False, True)
    for score in ("softmax", "expressive")
]


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    return verb.run(parser.parse_args(words))


def as_json(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert run(*words, "--json") == 0
    return json.loads(capsys.readouterr().out)


# ------------------------------------------------------------------------------------------------------ the picture


@pytest.mark.parametrize("mechanism", EVERY, ids=lambda m: m.name)
def test_blocks_are_the_mechanisms_parts(mechanism: Mechanism) -> None:
    text = "\n".join(draw(mechanism))
    for letter in "qkvo":
        assert text.count(f"Linear  W_{letter.upper()}") == (letter in mechanism.projections)
    assert text.count("Linear* W_A") == mechanism.aligned
    assert text.count("Slice") == len(set("qkv") - mechanism.projections)
    assert text.count("Softmax") == (mechanism.score == "softmax")
    assert text.count("Expressive") == (mechanism.score == "expressive")
    assert text.count("MatMul") == 2
    assert max(map(len, text.splitlines())) <= 60
    assert ("Slice" in "\n".join(legend(mechanism))) == ("Slice" in text)


GOES_ON = {
    **dict.fromkeys("│╎", "ud"),
    **dict.fromkeys("─╌", "lr"),
    "┌": "dr", "┐": "dl", "└": "ur", "┘": "ul", "┴": "ulr", "▲": "d",
}  # fmt: skip
ACCEPTS = {**GOES_ON, "▲": "udlr"}  # an arrow head ends a line, in a border or below a word
STEPS = {"u": (-1, 0), "d": (1, 0), "l": (0, -1), "r": (0, 1)}
BACK = {"u": "d", "d": "u", "l": "r", "r": "l"}


@pytest.mark.parametrize("mechanism", EVERY, ids=lambda m: m.name)
def test_every_line_leads_somewhere(mechanism: Mechanism) -> None:
    lines = draw(mechanism)
    cells = {(r, c): character for r, line in enumerate(lines) for c, character in enumerate(line)}
    for (row, column), character in cells.items():
        for step in GOES_ON.get(character, ""):
            down, right = STEPS[step]
            other = cells.get((row + down, column + right), " ")
            assert BACK[step] in ACCEPTS.get(other, "") or other in "QKV", (row, column, character, step, other)


@pytest.mark.parametrize("mechanism", EVERY, ids=lambda m: m.name)
def test_every_input_reaches_the_output(mechanism: Mechanism) -> None:
    lines = draw(mechanism)
    cells = {(r, c) for r, line in enumerate(lines) for c, character in enumerate(line) if character != " "}
    for letter in "QKV":
        row, column = len(lines) - 1, lines[-1].index(letter)
        reached, edge = set(), {(row, column)}
        while edge:
            reached |= edge
            edge = {(r + dr, c + dc) for r, c in edge for dr, dc in STEPS.values()} & cells - reached
        assert any(r == 0 for r, _ in reached)


def test_super_is_figure_1d(capsys: pytest.CaptureFixture[str]) -> None:
    assert "\n".join(draw(MECHANISMS["super"])[-9:]) == (
        "          ┌──────┴──────┐            ┌──────┴──────┐\n"
        "          │   MatMul    │            │ Linear* W_A │\n"
        "          └──▲───────▲──┘            └──────▲──────┘\n"
        "        ┌────┘       └────┐                 │\n"
        " ┌──────┴──────┐   ┌╌╌╌╌╌╌┴╌╌╌╌╌╌┐   ┌╌╌╌╌╌╌┴╌╌╌╌╌╌┐\n"
        " │ Linear  W_Q │   ╎    Slice    ╎   ╎    Slice    ╎\n"
        " └──────▲──────┘   └╌╌╌╌╌╌▲╌╌╌╌╌╌┘   └╌╌╌╌╌╌▲╌╌╌╌╌╌┘\n"
        "        │                 │                 │\n"
        "        Q                 K                 V"
    )


# -------------------------------------------------------------------------------------------------------- equations


@pytest.mark.parametrize(
    ("name", "expected"),
    [  # arXiv 2403.01643, definitions 1 to 4
        (
            "standard",
            ("O = (H_1 H_2 ⋯ H_h) W^O (1)", "H_i = S_i V'_i (2)", "S_i = softmax(Q'_i K'_iᵀ / √d_k) (3)",
             "V'_i = V W_i^V (4)", "K'_i = K W_i^K (5)", "Q'_i = Q W_i^Q (6)"),
        ),
        (
            "optimised",
            ("O = (H_1 H_2 ⋯ H_h) W^O (8)", "H_i = S_i V_i (9)", "S_i = softmax(Q'_i K'_iᵀ / √d_k) (10)",
             "K'_i = K W_i^K (11)", "Q'_i = Q W_i^Q (12)"),
        ),
        (
            "efficient",
            ("O = (H_1 H_2 ⋯ H_h) W^O (13)", "H_i = S_i V_i (14)", "S_i = softmax(Q'_i K_iᵀ / √d_k) (15)",
             "Q'_i = Q W_i^Q (16)"),
        ),
        (
            "super",
            ("O = (H_1 H_2 ⋯ H_h) W^O (19)", "H_i = S_i V'_i (20)", "S_i = softmax(Q'_i K_iᵀ / √d_k) (21)",
             "V'_i = W^A V_i (22)", "Q'_i = Q W_i^Q (23)"),
        ),
    ],
)  # fmt: skip
def test_the_papers_equations_under_their_numbers(name: str, expected: tuple[str, ...]) -> None:
    found = [" ".join(line.split()) for line in equations(MECHANISMS[name])]
    assert tuple(line for line in found if "columns" not in line) == expected
    assert source(MECHANISMS[name]).startswith("arXiv 2403.01643, definition")


def test_equations_of_combinations() -> None:
    found = equations(Mechanism.of("standard+expressive+align"))
    assert "V'_i = W^A V W_i^V" in found
    assert "S_i = Z_i² / (1 + Z_i²), each row divided by its sum" in found
    assert "Z_i = Q'_i K'_iᵀ / √d_k" in found
    assert equations(Mechanism(frozenset()))[:3] == [
        "O = (H_1 H_2 ⋯ H_h)",
        "H_i = S_i V_i",
        "S_i = softmax(Q_i K_iᵀ / √d_k)",
    ]


# ------------------------------------------------------------------------------------------------------------ counts


@pytest.mark.parametrize("name", [*MECHANISMS, "optimized", "efficient+expressive", "standard+align"])
def test_counts_are_the_librarys(capsys: pytest.CaptureFixture[str], name: str) -> None:
    found = as_json(capsys, name, "--embed-dim", "24", "--heads", "3", "--length", "7")
    expected = cost(24, 3, 7, mechanism=name)
    parts = {key: value for key, value in found["params"].items() if key != "all"}
    assert found["mechanism"] == Mechanism.of(name).name
    assert sum(parts.values()) == found["params"]["all"] == expected.params
    assert ("W_A" in parts) == Mechanism.of(name).aligned
    assert (found["flops_paper"], found["flops"]) == (expected.flops_paper, expected.flops)
    assert found["sizes"] == {"embed_dim": 24, "heads": 3, "length": 7}
    assert found["drawing"] == draw(Mechanism.of(name))


def test_layouts_of_the_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, "super+per-head+identity", "--embed-dim", "24", "--heads", "3", "--length", "7")
    assert found["mechanism"] == "super+per-head+identity"
    assert found["params"]["W_A"] == 3 * (7 * 7 + 7)
    assert found["params"]["all"] == cost(24, 3, 7, mechanism="super", align_heads="per_head").params
    assert found["legend"][-2:] == ["W_A: one for each head.", "W_A: starts as the identity."]


@pytest.mark.parametrize(("name", "lines"), [("standard", ["Keys", "Values"]), ("optimised", ["Keys"])])
def test_heads_that_share_keys_and_values(capsys: pytest.CaptureFixture[str], name: str, lines: list[str]) -> None:
    words = ("--embed-dim", "24", "--heads", "6", "--length", "7", "--kv-heads", "2")
    found, expected = as_json(capsys, name, *words), cost(24, 6, 7, mechanism=name, num_kv_heads=2)
    parts = {key: value for key, value in found["params"].items() if key != "all"}
    assert sum(parts.values()) == found["params"]["all"] == expected.params
    assert parts["W_K"] == 8 * (24 + 1)
    assert found["cache_bytes_per_token"] == expected.cache_bytes_per_token
    assert (found["flops"], found["weight_bytes"]) == (expected.flops, expected.weight_bytes)
    assert found["sizes"] == {"embed_dim": 24, "heads": 6, "length": 7, "kv_heads": 2}
    assert found["legend"][-len(lines) :] == [f"{word}: 2 heads, each for 3 query heads." for word in lines]
    assert run(name, *words) == 0
    assert "h = 6, ℓ = 7, 2 heads of projected keys and values" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("standard", "--kv-heads", "3"), "--kv-heads=3 must divide --heads=4"),
        (("efficient", "--kv-heads", "2"), "groups projected keys, and efficient has no W_K"),
        (("mnist", "--kv-heads", "2"), "--kv-heads is of a layer, and 'mnist' is a task"),
    ],
)
def test_heads_that_cannot_be_shared(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(*words)


def test_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("super") == 0
    out = capsys.readouterr().out
    for part in ("definition 4", "Linear* W_A", "V'_i = W^A V_i", "37,184", "344,064", "22,020,096"):
        assert part in out
    assert all(len(line.rstrip()) <= 100 for line in out.splitlines())


def test_heads_that_do_not_divide_the_width() -> None:
    with pytest.raises(UserError, match="--embed-dim must be divisible by --heads, received 10 and 4"):
        run("super", "--embed-dim", "10")


# ------------------------------------------------------------------------------------------------------------- tasks


OURS = ("digits", "images", "text", "recurrence", "text-lm")  # not in the paper


@pytest.mark.parametrize("name", TASKS)
def test_tasks(capsys: pytest.CaptureFixture[str], name: str) -> None:
    found = as_json(capsys, name)
    for scale in ("smoke", "small", "paper"):
        assert found["settings"][scale] == TASKS[name](scale).settings()
    assert found["source"] == TASKS[name]("paper").source
    assert bool(found["paper"]) == (name not in OURS)
    assert run(name) == 0
    out = capsys.readouterr().out
    assert found["title"] in " ".join(out.split())  # long ones are wrapped
    assert "batch size" in out
    assert ("The paper's results" in out) == (name not in OURS)


def test_mnist_says_how_it_differs_from_the_paper(capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, "mnist")
    assert "no 64 square patches" in " ".join(found["about"])
    assert found["settings"]["paper"]["length"] == 64
    assert found["paper"][-1]["test_accuracy"] == 98.62


@pytest.mark.parametrize("name", ["sup", "", "super+expresive", "standard-align", "../mnist", "[red]x"])
def test_unknown_names_are_told_what_there_is(name: str) -> None:
    with pytest.raises(UserError, match="is neither a mechanism") as error:
        run(name)
    assert repr(name) in str(error.value)
    assert "super" in str(error.value)
    assert "mnist" in str(error.value)
