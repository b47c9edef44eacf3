"""The oracle: the papers' equations in NumPy float64, one batch element, one head, one query at a time.

It imports no torch and shares no line with the library. Everything here means what it says in one way only:
``keep`` is True where a query may attend, ``present`` is True where a token is real and False where it is padding,
``bias`` is added to the logarithm of the un-normalised weight, ``inside`` to the scaled product that a score reads.

Source: arXiv 2403.01643, definitions 1-4 (projections, alignment kernel W_A); arXiv 2407.18601 (expressive score).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Weights:
    """The arrays of one layer of width E with h heads. A map that is None is the identity, as in the paper's slices."""

    heads: int
    q: Array | None = None  # (E, width of the query): y = x Wᵀ + b
    k: Array | None = None  # (G E/h, .): keys of G heads, of which h/G neighbouring query heads read one; and so v
    v: Array | None = None
    o: Array | None = None
    q_bias: Array | None = None  # (E,)
    k_bias: Array | None = None
    v_bias: Array | None = None
    o_bias: Array | None = None
    align: Array | None = None  # W_A, (l, l) or one for each head of the values, (h, l, l)
    align_bias: Array | None = None  # (l,) or (h, l)
    align_causal: bool = False
    extra_k: Array | None = (
        None  # as wide as k: one more key and value, after projection and W_A, which every query sees
    )
    extra_v: Array | None = None
    zero_key: bool = False  # a last key and value of zeros
    window: int | None = None  # queries see the last so many keys, and W_A (window, window) acts on these
    score: str = "softmax"
    scale: float | Array | None = None  # None: 1/sqrt(E/h); an array holds one number for each head
    rotary: float | None = None  # the base by which queries and keys are turned, but for extra keys


def softmax_row(z: Array, bias: Array) -> Array:
    """exp(z + bias), normalised over the keys."""
    logits = z + bias
    e = np.exp(logits - logits.max())
    return e / e.sum()


def expressive_row(z: Array, bias: Array) -> Array:
    """exp(bias) z²/(1+z²), normalised over the keys; a zero row where every z is zero.

    The logarithm of z²/(1+z²) is taken so that neither a tiny nor a huge z is lost.
    """
    result = np.zeros_like(z)
    alive = z != 0
    if not alive.any():
        return result
    magnitude = np.abs(z[alive])
    small, large = np.minimum(magnitude, 1.0), np.maximum(magnitude, 1.0)
    log_weight = np.where(magnitude <= 1, 2 * np.log(small) - np.log1p(small**2), -np.log1p(large**-2.0))
    log_weight = log_weight + bias[alive]
    e = np.exp(log_weight - log_weight.max())
    result[alive] = e / e.sum()
    return result


ROWS = {"softmax": softmax_row, "expressive": expressive_row}


def one_head(
    q: Array,
    k: Array,
    v: Array,
    visible: Array,
    bias: Array,
    scale: float,
    score: str,
    inside: Array | None = None,
) -> tuple[Array, Array]:
    """One head. q (L, H), k (S, H), v (S, Hv), visible, bias, inside (L, S) -> output (L, Hv), weights (L, S)."""
    length, keys = visible.shape
    inside = np.zeros((length, keys)) if inside is None else inside
    weights = np.zeros((length, keys))
    output = np.zeros((length, v.shape[1]))
    for i in range(length):
        seen = np.flatnonzero(visible[i])
        if seen.size == 0:
            continue  # nothing to attend to: weights 0, output 0
        weights[i, seen] = ROWS[score](k[seen] @ q[i] * scale + inside[i, seen], bias[i, seen])
        output[i] = weights[i, seen] @ v[seen]
    return output, weights


def linear(x: Array, weight: Array | None, bias: Array | None) -> Array:
    """Row by row y = x Wᵀ + b; without a W, x itself."""
    y = x if weight is None else x @ weight.T
    return y if bias is None else y + bias


def spun(x: Array, positions: Array, base: float = 10_000.0) -> Array:
    """Pair (p, p + H/2) as one complex number, times e^(i m base^(-2p/H)); x (..., L, H)."""
    half = x.shape[-1] // 2
    speeds = np.array([float(base) ** (-2 * p / x.shape[-1]) for p in range(half)])
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * np.multiply.outer(positions, speeds))
    return np.concatenate([z.real, z.imag], axis=-1)


def head(x: Array, n: int, heads: int, width: int) -> Array:
    """What query head n of ``heads`` reads of x (..., G width), whose heads are side by side: head n // (heads / G)."""
    own = n // (heads // (x.shape[-1] // width))
    return x[..., own * width : (own + 1) * width]


def align(v: Array, kernel: Array, bias: Array | None, causal: bool) -> Array:
    """W_A V + a 1ᵀ for the first s positions of W_A: v (s, H), kernel (l, l), bias (l,) -> (s, H)."""
    mixed = np.zeros_like(v)
    for i in range(v.shape[0]):
        sources = i + 1 if causal else v.shape[0]
        mixed[i] = kernel[i, :sources] @ v[:sources]
        if bias is not None:
            mixed[i] += bias[i]
    return mixed


def windowed(weights: Array, v: Array, kernel: Array, bias: Array | None) -> Array:
    """s_t (W_A V_window + a) for each query of self-attention: weights (s, s), v (s, H), kernel (w, w) -> (s, H).

    The last row and column of the kernel belong to the query's own position.
    """
    size = kernel.shape[0]
    output = np.zeros_like(v)
    for t in range(v.shape[0]):
        window = np.zeros((size, v.shape[1]))
        s = np.zeros(size)
        for place in range(size):
            key = t - (size - 1) + place
            if key >= 0:
                window[place], s[place] = v[key], weights[t, key]
        mixed = kernel @ window
        if bias is not None:
            mixed = mixed + bias[:, None]
        output[t] = s @ mixed
    return output


def see(
    length: int,
    keys: int,
    causal: bool,
    keep: Array | None,
    present: Array | None,
    offset: int = 0,
    window: int | None = None,
) -> Array:
    """Which key each query sees, (L, S). Causal: query i stands at i + offset and sees up to there, ``window`` keys."""
    visible = np.ones((length, keys), dtype=bool)
    for i in range(length):
        if causal:
            here = i + offset
            visible[i, here + 1 :] = False
            if window is not None:
                visible[i, : max(0, here - window + 1)] = False
        if keep is not None:
            visible[i] &= keep[i]
        if present is not None:
            visible[i] &= present
    return visible


def multihead(
    w: Weights,
    query: Array,
    key: Array,
    value: Array,
    *,
    keep: Array | None = None,
    bias: Array | None = None,
    inside: Array | None = None,
    present: Array | None = None,
    causal: bool = False,
) -> tuple[Array, Array]:
    """A whole layer.

    query (B, L, .), key (B, S, .), value (B, S, .); keep and bias (B, h, L, S); inside (h, L, S); present (B, S)
    -> output (B, L, E), weights (B, h, L, S), S growing by one for an extra key and by one for a zero key.
    """
    query, key, value = (np.asarray(x, dtype=np.float64) for x in (query, key, value))
    batch, length, keys = query.shape[0], query.shape[1], key.shape[1]
    embed = linear(query, w.q, w.q_bias).shape[-1]
    width = embed // w.heads
    extras = (w.extra_k is not None) + w.zero_key
    output = np.zeros((batch, length, embed))
    weights = np.zeros((batch, w.heads, length, keys + extras))
    for b in range(batch):
        q = linear(query[b], w.q, w.q_bias)
        k = linear(key[b], w.k, w.k_bias)
        v = linear(value[b], w.v, w.v_bias)
        if present is not None:
            v = np.where(present[b][:, None], v, 0.0)  # before W_A, which would spread a padded value
        joined = np.zeros((length, embed))
        for n in range(w.heads):
            columns = slice(n * width, (n + 1) * width)
            q_n, k_n, v_n = q[:, columns], head(k, n, w.heads, width), head(v, n, w.heads, width)
            if w.rotary is not None:
                q_n, k_n = (spun(x, np.arange(len(x)), w.rotary) for x in (q_n, k_n))
            kernel, shift = w.align, w.align_bias
            if w.align is not None:
                m = n // (w.heads // (v.shape[1] // width))
                kernel = w.align if w.align.ndim == 2 else w.align[m]
                shift = w.align_bias if w.align_bias is None or w.align_bias.ndim == 1 else w.align_bias[m]
                v_n = v_n if w.window is not None else align(v_n, kernel, shift, w.align_causal)
            visible = see(
                length,
                keys,
                causal or w.window is not None,
                None if keep is None else keep[b, n],
                None if present is None else present[b],
                window=w.window,
            )
            log_bias = np.zeros((length, keys)) if bias is None else np.asarray(bias[b, n], dtype=np.float64)
            if w.extra_k is not None:
                k_n = np.vstack([k_n, head(w.extra_k, n, w.heads, width)])
                v_n = np.vstack([v_n, head(w.extra_v, n, w.heads, width)])
            if w.zero_key:
                k_n, v_n = np.vstack([k_n, np.zeros(width)]), np.vstack([v_n, np.zeros(width)])
            visible = np.hstack([visible, np.ones((length, extras), dtype=bool)])
            log_bias = np.hstack([log_bias, np.zeros((length, extras))])
            scale = width**-0.5 if w.scale is None else np.broadcast_to(w.scale, (w.heads,))[n]
            joined[:, columns], weights[b, n] = one_head(
                q_n, k_n, v_n, visible, log_bias, float(scale), w.score, None if inside is None else inside[n]
            )
            if w.align is not None and w.window is not None:
                joined[:, columns] = windowed(weights[b, n], v_n, kernel, shift)
        output[b] = linear(joined, w.o, w.o_bias)
    return output, weights


def attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    score: str = "softmax",
    keep: Array | None = None,
    bias: Array | None = None,
    inside: Array | None = None,
    causal: bool = False,
    offset: int = 0,
    window: int | None = None,
    scale: float | None = None,
) -> tuple[Array, Array]:
    """The inner function alone. query (B, N, L, H), key (B, M, S, H), value (B, M, S, Hv); keep and bias (B, N, L, S).

    inside is (N, L, S). N is a multiple of M: query head n reads key head n // (N/M) -> output (B, N, L, Hv), weights
    (B, N, L, S).
    """
    query, key, value = (np.asarray(x, dtype=np.float64) for x in (query, key, value))
    batch, heads, length, width = query.shape
    group = heads // key.shape[1]
    keys = key.shape[2]
    output = np.zeros((batch, heads, length, value.shape[3]))
    weights = np.zeros((batch, heads, length, keys))
    for b in range(batch):
        for n in range(heads):
            visible = see(length, keys, causal, None if keep is None else keep[b, n], None, offset, window)
            log_bias = np.zeros((length, keys)) if bias is None else np.asarray(bias[b, n], dtype=np.float64)
            output[b, n], weights[b, n] = one_head(
                query[b, n],
                key[b, n // group],
                value[b, n // group],
                visible,
                log_bias,
                width**-0.5 if scale is None else scale,
                score,
                None if inside is None else inside[n],
            )
    return output, weights
