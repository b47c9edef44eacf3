"""The oracle itself: worked examples done by hand, a second formulation, and formulas that must not agree with it."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from better_attention.scores import SCORES
from helpers import TESTS, oracle

EXACT = {"rtol": 0, "atol": 1e-15}

# Two tokens, two features, the unit vectors: x = I. With one head of width 2 and W_Q = √2 ln3 · I the scores are
# x W_Qᵀ xᵀ / √2 = ln3 · I. Row by row softmax(ln3, 0) = (3, 1)/4 and softmax(0, ln3) = (1, 3)/4.
TOKENS = np.eye(2)[None]
LN3 = np.sqrt(2) * np.log(3) * np.eye(2)


def test_hand_worked_softmax() -> None:
    # heads = P V = [[3/4, 1/4], [1/4, 3/4]];  W_O = [[1, 2], [0, 1]] (y = x W_Oᵀ), b_O = (10, 20):
    # row 1: (3/4 + 2/4, 1/4) + b = (11.25, 20.25);  row 2: (1/4 + 6/4, 3/4) + b = (11.75, 20.75)
    w = oracle.Weights(1, q=LN3, o=np.array([[1.0, 2.0], [0.0, 1.0]]), o_bias=np.array([10.0, 20.0]))
    output, weights = oracle.multihead(w, TOKENS, TOKENS, TOKENS)
    np.testing.assert_allclose(weights[0, 0], [[0.75, 0.25], [0.25, 0.75]], **EXACT)
    np.testing.assert_allclose(output[0], [[11.25, 20.25], [11.75, 20.75]], rtol=1e-15)


@pytest.mark.parametrize(
    ("causal", "expected"),
    [
        # W_A V + a = [[1, 2], [3, 4]] + [[10, 10], [20, 20]] = [[11, 12], [23, 24]]
        # row 1: 3/4 (11, 12) + 1/4 (23, 24) = (14, 15);  row 2: 1/4 (11, 12) + 3/4 (23, 24) = (20, 21)
        (False, [[14, 15], [20, 21]]),
        # lower triangle: [[1, 0], [3, 4]] + a = [[11, 10], [23, 24]]
        # row 1 sees key 1 alone: (11, 10);  row 2: 1/4 (11, 10) + 3/4 (23, 24) = (20, 20.5)
        (True, [[11, 10], [20, 20.5]]),
    ],
)
def test_hand_worked_super(causal: bool, expected: list[list[float]]) -> None:
    w = oracle.Weights(
        1, q=LN3, align=np.array([[1.0, 2.0], [3.0, 4.0]]), align_bias=np.array([10.0, 20.0]), align_causal=causal
    )
    output, _ = oracle.multihead(w, TOKENS, TOKENS, TOKENS, causal=causal)
    np.testing.assert_allclose(output[0], expected, rtol=1e-15)


def test_hand_worked_expressive() -> None:
    # q = [[1, 2], [0, -1]], k = v = I, scale 1: z = q, z²/(1+z²) = [[1/2, 4/5], [0, 1/2]]
    # row 1: (5/10, 8/10) / (13/10) = (5/13, 8/13);  row 2: (0, 1): the orthogonal key has weight exactly 0
    q = np.array([[[1.0, 2.0], [0.0, -1.0]]])
    w = oracle.Weights(1, score="expressive", scale=1.0)
    output, weights = oracle.multihead(w, q, TOKENS, TOKENS)
    np.testing.assert_allclose(weights[0, 0], [[5 / 13, 8 / 13], [0, 1]], **EXACT)
    np.testing.assert_allclose(output[0], weights[0, 0], **EXACT)
    # a bias of ln2 on key 1 doubles its weight: row 1 (1, 4/5) / (9/5) = (5/9, 4/9);  row 2 still (0, 1)
    bias = np.broadcast_to([np.log(2), 0.0], (1, 1, 2, 2))
    _, weights = oracle.multihead(w, q, TOKENS, TOKENS, bias=bias)
    np.testing.assert_allclose(weights[0, 0], [[5 / 9, 4 / 9], [0, 1]], **EXACT)


def test_hand_worked_two_heads() -> None:
    # Two heads of width 1: head i reads column i. x = [[0, ln3], [ln3, 0]], W_Q = I, scale 1.
    # head 1: q = k = (0, ln3): z = [[0, 0], [0, (ln3)²]];  head 2 the same with the tokens exchanged.
    # p = 3^ln3 / (1 + 3^ln3): head 1 rows (1/2, 1/2), (1-p, p); head 2 rows (p, 1-p), (1/2, 1/2)
    a = np.log(3)
    x = np.array([[[0, a], [a, 0]]])
    p = 3**a / (1 + 3**a)
    output, weights = oracle.multihead(oracle.Weights(2), x, x, x)
    np.testing.assert_allclose(weights[0], [[[0.5, 0.5], [1 - p, p]], [[p, 1 - p], [0.5, 0.5]]], **EXACT)
    np.testing.assert_allclose(output[0], [[a / 2, p * a], [p * a, a / 2]], **EXACT)


def test_masks_by_hand() -> None:
    w = oracle.Weights(1, q=LN3, o=np.eye(2), o_bias=np.array([1.0, 2.0]), extra_k=np.zeros(2), extra_v=np.ones(2))
    keep = np.array([[[[True, True], [False, False]]]])
    output, weights = oracle.multihead(w, TOKENS, TOKENS, TOKENS, keep=keep)
    # the extra key scores 0: row 1 (3, 1, 1)/5; row 2 sees the extra key alone
    np.testing.assert_allclose(weights[0, 0], [[0.6, 0.2, 0.2], [0, 0, 1]], **EXACT)
    np.testing.assert_allclose(output[0], [[1.8, 2.4], [2, 3]], rtol=1e-15)
    # without it row 2 sees nothing: its weights are 0 and its output is the output bias
    bare = oracle.Weights(1, q=LN3, o=np.eye(2), o_bias=np.array([1.0, 2.0]))
    output, weights = oracle.multihead(bare, TOKENS, TOKENS, TOKENS, keep=keep)
    np.testing.assert_allclose(weights[0, 0], [[0.75, 0.25], [0, 0]], **EXACT)
    np.testing.assert_array_equal(output[0, 1], [1, 2])
    # padding hides key 2, and silences its value before W_A: 2 x_1 is all that W_A spreads
    w = oracle.Weights(1, align=np.full((3, 3), 2.0))
    output, weights = oracle.multihead(w, TOKENS, TOKENS, 1e30 * TOKENS + 1, present=np.array([[True, False]]))
    np.testing.assert_array_equal(weights[0, 0], [[1, 0], [1, 0]])
    np.testing.assert_array_equal(output[0], [[2e30, 2], [2e30, 2]])


def formula(w: oracle.Weights, x: np.ndarray, keep: np.ndarray, mistake: str | None = None) -> np.ndarray:
    """Super attention on whole arrays (a second way to write it), with one mistake seen in public code if asked."""
    batch, length, embed = x.shape
    width = embed // w.heads

    def heads(y: np.ndarray) -> np.ndarray:
        if mistake == "split without transpose":
            return y.reshape(batch, w.heads, length, width)
        return y.reshape(batch, length, w.heads, width).transpose(0, 2, 1, 3)

    q, k, v = heads(x @ w.q.T + w.q_bias), heads(x), heads(x)
    kernel = w.align[:length, :length].T if mistake == "transposed W_A" else w.align[:length, :length]
    if w.align_causal and mistake != "full W_A under a causal mask":
        kernel = np.triu(kernel) if mistake == "upper triangular W_A" else np.tril(kernel)
    v = kernel @ v + (0 if mistake == "no bias of W_A" else w.align_bias[:length, None])
    divisor = {"times sqrt(d_k)": 1 / np.sqrt(width), "divided by d_m": embed}.get(mistake, np.sqrt(width))
    z = q @ np.swapaxes(k, -1, -2) / divisor
    if mistake == "mask inverted":
        keep = ~keep
    if mistake == "diagonal off by one":
        keep = np.tril(np.ones((length, length), bool), 1)
    axis = -2 if mistake == "normalised over queries" else -1
    if w.score == "expressive":
        if mistake == "mask added to z":
            z = z + np.where(keep, 0, -1e4)
        g = z**2 / (1 + z**2) * (1 if mistake == "mask added to z" else keep)
    else:
        g = np.exp(z) * keep
    total = g.sum(axis, keepdims=True)
    joined = (g / np.where(total == 0, 1, total) @ v).transpose(0, 2, 1, 3).reshape(batch, length, embed)
    return joined @ w.o.T + w.o_bias


MISTAKES = [
    "split without transpose",
    "transposed W_A",
    "full W_A under a causal mask",
    "upper triangular W_A",
    "no bias of W_A",
    "times sqrt(d_k)",
    "divided by d_m",
    "mask inverted",
    "diagonal off by one",
    "normalised over queries",
]


def causal_example(rng: np.random.Generator, score: str) -> tuple[oracle.Weights, np.ndarray, np.ndarray]:
    heads, width, length = 3, 5, 7
    embed = heads * width
    w = oracle.Weights(
        heads,
        q=rng.normal(size=(embed, embed)) / np.sqrt(embed),
        q_bias=rng.normal(size=embed),
        o=rng.normal(size=(embed, embed)) / np.sqrt(embed),
        o_bias=rng.normal(size=embed),
        align=rng.normal(size=(11, 11)),
        align_bias=rng.normal(size=11),
        align_causal=True,
        score=score,
    )
    return w, rng.normal(size=(2, length, embed)), np.tril(np.ones((length, length), bool))


@pytest.mark.parametrize("score", SCORES)
def test_agrees_with_the_formula_on_whole_arrays(rng: np.random.Generator, score: str) -> None:
    w, x, keep = causal_example(rng, score)
    output, _ = oracle.multihead(w, x, x, x, causal=True)
    np.testing.assert_allclose(output, formula(w, x, keep), rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("score", "mistake"),
    [("softmax", m) for m in MISTAKES] + [("expressive", m) for m in [*MISTAKES, "mask added to z"]],
)
def test_disagrees_with_every_known_mistake(rng: np.random.Generator, score: str, mistake: str) -> None:
    w, x, keep = causal_example(rng, score)
    output, _ = oracle.multihead(w, x, x, x, causal=True)
    assert np.abs(output - formula(w, x, keep, mistake)).max() > 0.1


def test_silencing_padding_is_what_keeps_it_out(rng: np.random.Generator) -> None:
    """Hiding a padded key from the scores alone lets W_A carry its value to real tokens."""
    w, x, _ = causal_example(rng, "softmax")
    w = oracle.Weights(**{**vars(w), "align_causal": False})
    present = np.arange(7) < np.array([[7], [4]])
    loud = x.copy()
    loud[1, 4:] = 1e3
    keep = np.broadcast_to(present[:, None, None], (2, 3, 7, 7))
    silent = [oracle.multihead(w, y, y, y, present=present)[0][1, :4] for y in (x, loud)]
    leaking = [oracle.multihead(w, y, y, y, keep=keep)[0][1, :4] for y in (x, loud)]
    np.testing.assert_array_equal(*silent)
    assert np.abs(leaking[0] - leaking[1]).max() > 1e2


def test_expressive_row_is_stable(rng: np.random.Generator) -> None:
    zero = np.zeros(3)
    np.testing.assert_array_equal(oracle.expressive_row(zero, zero), zero)
    np.testing.assert_allclose(oracle.expressive_row(np.array([1e-200, 2e-200, 0.0]), zero), [0.2, 0.8, 0], rtol=1e-12)
    np.testing.assert_allclose(oracle.expressive_row(np.array([1e200, -1e180, 1e9]), zero), [1 / 3] * 3, rtol=1e-12)
    shifted = oracle.expressive_row(np.array([1.0, 2.0, 3.0]), np.array([1e4, 1e4, 1e4]))
    np.testing.assert_allclose(shifted, oracle.expressive_row(np.array([1.0, 2.0, 3.0]), zero), rtol=1e-12)


def test_grouped_heads(rng: np.random.Generator) -> None:
    q, k, v = rng.normal(size=(2, 6, 5, 3)), rng.normal(size=(2, 2, 7, 3)), rng.normal(size=(2, 2, 7, 4))
    grouped = oracle.attention(q, k, v)[0]
    repeated = oracle.attention(q, np.repeat(k, 3, axis=1), np.repeat(v, 3, axis=1))[0]
    np.testing.assert_array_equal(grouped, repeated)


def test_grouped_heads_of_a_layer(rng: np.random.Generator) -> None:
    """Two heads of keys and values for six of queries are six, of which three neighbours are alike."""
    x = rng.normal(size=(2, 7, 18))
    few = oracle.Weights(
        6,
        q=rng.normal(size=(18, 18)),
        k=rng.normal(size=(6, 18)),
        v=rng.normal(size=(6, 18)),
        v_bias=rng.normal(size=6),
        align=rng.normal(size=(2, 7, 7)),
        align_bias=rng.normal(size=(2, 7)),
        extra_k=rng.normal(size=6),
        extra_v=rng.normal(size=6),
    )

    def wide(y: np.ndarray) -> np.ndarray:
        return np.concatenate([y[3 * head : 3 * head + 3] for head in (0, 0, 0, 1, 1, 1)])

    rows = {name: wide(getattr(few, name)) for name in ("k", "v", "v_bias", "extra_k", "extra_v")}
    kernels = {name: np.repeat(getattr(few, name), 3, axis=0) for name in ("align", "align_bias")}
    many = oracle.Weights(**{**vars(few), **rows, **kernels})
    for ours, theirs in zip(oracle.multihead(few, x, x, x), oracle.multihead(many, x, x, x), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_imports_no_torch() -> None:
    code = "import sys; from helpers import oracle; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=TESTS, check=True)
