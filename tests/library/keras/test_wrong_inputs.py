"""Wrong arguments and inputs: messages that say what came, what was expected and what to do."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest

import better_attention as ba
import better_attention.keras as bk
from helpers.layers import refused

x = np.zeros((2, 7, 6), "float32")
LONG = np.zeros((2, 9, 6), "float32")


def layer(**options: Any) -> Any:
    return bk.MultiHeadAttention(**{"num_heads": 2, "key_dim": 3, **options})


def call(*inputs: Any, build: dict[str, Any] | None = None, **settings: Any) -> Any:
    return layer(**(build or {}))(*inputs, **settings)


TRIANGLE = np.tril(np.ones((7, 7), bool))
SUPER = {"mechanism": "super", "max_len": 7}
WINDOW = {"mechanism": "super", "sliding_window": 3}

CASES: dict[str, tuple[Callable[[], Any], tuple[Any, ...]]] = {
    "num_heads": (lambda: layer(num_heads=0), ("num_heads", ">= 1", "0")),
    "heads as text": (lambda: layer(num_heads="4"), ("num_heads", "whole number", "'4'")),
    "key_dim": (lambda: layer(key_dim=2.0), ("key_dim", "2.0")),
    "value_dim": (lambda: layer(value_dim=-1), ("value_dim", "-1")),
    "dropout": (lambda: layer(dropout=1.5), ("dropout", "between 0 and 1", "1.5")),
    "use_bias": (lambda: layer(use_bias="no"), ("use_bias", "'no'")),
    "sliding_window": (lambda: layer(sliding_window=0), ("sliding_window", "0")),
    "output_shape": (lambda: layer(output_shape="6"), ("output_shape", "'6'")),
    "attention_axes": (lambda: layer(attention_axes="1"), ("attention_axes", "'1'")),
    "mechanism": (lambda: layer(mechanism="fast"), ("mechanism", "'fast'", "efficient")),
    "score": (lambda: layer(score="relu"), ("score", "'relu'", "expressive")),
    "contradiction": (lambda: layer(mechanism="expressive", score="softmax"), ("softmax", "contradicts", "leave")),
    "scale": (lambda: layer(scale="large"), ("scale", "'large'", "learned")),
    "no max_len": (lambda: layer(mechanism="super"), ("super", "max_len", "efficient")),
    "max_len without W_A": (lambda: layer(max_len=7), ("max_len=7", "standard", "Remove")),
    "two sizes of W_A": (lambda: layer(**SUPER, sliding_window=3), ("max_len=7", "sliding_window=3", "exclude")),
    "align_heads": (lambda: layer(**SUPER, align_heads="all"), ("align_heads", "'all'", "per_head")),
    "flash with the wrong score": (
        lambda: layer(score="expressive", flash_attention=True),
        ("flash_attention", "expressive", "Leave"),
    ),
    "flash with dropout": (lambda: layer(dropout=0.1, flash_attention=True), ("flash_attention", "dropout=0.1")),
    "flash with two widths": (
        lambda: layer(value_dim=5, flash_attention=True),
        ("flash_attention", "value_dim=5", "one width"),
    ),
    "flash as a number": (lambda: layer(flash_attention=1), ("flash_attention", "True or False", "1")),
    "output_shape without W_O": (
        lambda: layer(mechanism=ba.Mechanism(frozenset("qk")), output_shape=5),
        ("output_shape=5", "W_O"),
    ),
    "slices of another width": (
        lambda: call(x, x, build={"mechanism": "efficient", "key_dim": 5}),
        ("efficient", "W_K", "width 6", "2 * 5 = 10", "key_dim=3"),
    ),
    "value slices": (
        lambda: call(x, x, build={"mechanism": "optimised", "value_dim": 4}),
        ("W_V", "value_dim = 2 * 4 = 8", "value_dim=3"),
    ),
    "two dimensions": (lambda: call(x[0], x[0]), ("batch, length, features", "(7, 6)")),
    "other ranks": (lambda: call(x, x[:, None]), ("same number of dimensions", "(2, 1, 7, 6)")),
    "key without its value": (lambda: call(x, x, LONG), ("key", "value", "(2, 9, 6)", "query, value, key")),
    "other batches": (lambda: call(x, x[:1]), ("batch", "(1, 7, 6)")),
    "axes that are not there": (lambda: call(x, x, build={"attention_axes": 3}), ("attention_axes", "3", "between")),
    "an axis twice": (lambda: call(x, x, build={"attention_axes": (1, -2)}), ("attention_axes", "once")),
    "too long": (lambda: call(LONG, LONG, build=SUPER), ("max_len=7", "9 values", "(2, 9, 6)", "efficient")),
    "leak": (lambda: call(x, x, build=SUPER, use_causal_mask=True), ("super", "leak", "align_causal=True")),
    "leak by a mask": (
        lambda: call(x, x, build=SUPER, attention_mask=TRIANGLE),
        ("super", "leak", "align_causal=True"),
    ),
    "a window that looks ahead": (lambda: call(x, x, build=WINDOW), ("sliding_window=3", "use_causal_mask=True")),
    "a window over others": (
        lambda: call(x, LONG, build=WINDOW, use_causal_mask=True),
        ("self-attention", "7 queries", "9 values"),
    ),
    "causal over two axes": (
        lambda: call(x[:, None], x[:, None], use_causal_mask=True),
        ("use_causal_mask=True", "one axis", "attention_axes"),
    ),
    "flash with scores": (
        lambda: call(x, x, build={"flash_attention": True}, return_attention_scores=True),
        ("flash_attention", "scores"),
    ),
    "padding of another shape": (
        lambda: call(x, x, value_mask=np.ones((2, 9), bool)),
        ("value_mask", "(2, 7)", "(2, 9)", "attention_mask"),
    ),
    "a mask of queries as padding": (
        lambda: call(x, x, query_mask=np.ones((2, 7, 7), bool)),
        ("query_mask", "(2, 7, 7)"),
    ),
    "attention mask of one dimension": (
        lambda: call(x, x, attention_mask=np.ones(7, bool)),
        ("attention_mask", "(7,)"),
    ),
    "attention mask of other keys": (
        lambda: call(x, LONG, attention_mask=np.ones((2, 7, 7), bool)),
        ("attention_mask", "(2, 2, 7, 9)", "(2, 7, 7)", "value_mask"),
    ),
    "attention mask of padding": (
        lambda: call(x, x, attention_mask=np.ones((2, 7), bool)),
        ("attention_mask", "(2, 2, 7, 7)", "(2, 7)", "value_mask"),
    ),
    "attention mask over two axes": (
        lambda: call(x[:, None], x[:, None], attention_mask=np.ones((7, 1, 1, 7), bool)),
        ("attention_mask", "(2, 2, 1, 7, 1, 7)", "(7, 1, 1, 7)"),
    ),
    "settings that are no bool": (lambda: call(x, x, use_causal_mask=1), ("use_causal_mask", "1")),
    "weights before they are there": (lambda: bk.to_torch_state(layer()), ("build", "no weights")),
    "weights of another class": (
        lambda: bk.to_torch_state(keras.layers.MultiHeadAttention(2, 3)),
        ("better_attention.keras.MultiHeadAttention", "set_weights"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_message_says_what_to_do(name: str) -> None:
    action, words = CASES[name]
    refused(action, *words)


def built(**options: Any) -> Any:
    one = layer(**options)
    one.build(x.shape, x.shape)
    return one


def test_a_state_of_another_layer_is_refused_and_changes_nothing() -> None:
    one, efficient = built(), built(mechanism="efficient")
    before = one.get_weights()
    state = bk.to_torch_state(one)
    refused(lambda: bk.from_torch_state(one, bk.to_torch_state(efficient)), "missing", "k_proj.weight", "standard")
    refused(lambda: bk.from_torch_state(efficient, state), "not in this layer", "v_proj.bias")
    wrong = {**state, "out_proj.weight": np.zeros((6, 5))}
    refused(lambda: bk.from_torch_state(one, wrong), "out_proj.weight", "(6, 5)", "(6, 6)")
    odd = {**state, "k_proj.weight": np.zeros((4, 6))}  # four rows are no heads of width three
    refused(lambda: bk.from_torch_state(one, odd), "k_proj.weight", "(4, 6)", "(6, 6)")
    for a, b in zip(one.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("options", "word"),
    [({"use_gate": True}, "use_gate"), ({"value_dim": 4}, "value_dim=4"), ({"output_shape": 5}, "(5,)")],
)
def test_layers_without_a_counterpart_in_torch(options: dict[str, Any], word: str) -> None:
    refused(lambda: bk.to_torch_state(built(**options)), word, "no place")


def test_symbolic_calls_are_checked_too() -> None:
    symbol = keras.Input((9, 6))
    refused(lambda: layer(**SUPER)(symbol, symbol), "max_len=7", "9 values")
    short = keras.Input((7, 6))
    refused(lambda: layer(**SUPER)(short, short, use_causal_mask=True), "leak")


WITHOUT = """
import sys
sys.modules["keras"] = None  # as if it were not installed
try:
    import better_attention.keras
except ImportError as error:
    print(error)
"""


def test_without_keras_the_extra_is_named() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=True)
    assert "pip install 'better-attention[keras]'" in done.stdout
    assert "Keras 3.15" in done.stdout
