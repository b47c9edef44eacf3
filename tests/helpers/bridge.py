"""From a torch layer to the oracle's arrays, and the rules by which two results count as equal."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers import oracle
from helpers.rounding import Align, Attention, Error, Linear, Rounded, Rounding

EXACT = 1e-12
"""Two float64 results may differ by this, times the largest reference value where that exceeds 1."""

CAPS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""No error of an output may exceed these, times the largest reference value where that exceeds 1."""


def array(x: Tensor | np.ndarray) -> np.ndarray:
    """A float64 array of the same numbers."""
    return x.detach().to(torch.float64).numpy() if isinstance(x, Tensor) else np.asarray(x, dtype=np.float64)


def fill(module: nn.Module, rng: np.random.Generator) -> nn.Module:
    """Draw every parameter, biases too, from a normal distribution that keeps activations near 1."""
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            spread = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 and not name.startswith("bias_") else 0.5
            parameter.copy_(torch.from_numpy(rng.normal(size=parameter.shape) * spread))
    return module


def oracle_weights(
    module: nn.Module, *, scale: float | None = None, align_causal: bool = False, add_zero_attn: bool = False
) -> oracle.Weights:
    """The parameters of a ``better_attention.MultiheadAttention``, for the oracle."""

    def pair(name: str) -> dict[str, np.ndarray | None]:
        linear = getattr(module, f"{name}_proj" if name != "o" else "out_proj")
        if not isinstance(linear, nn.Linear):
            assert not list(linear.parameters()), f"{name} is dropped but has parameters"
            return {}
        return {name: array(linear.weight), f"{name}_bias": None if linear.bias is None else array(linear.bias)}

    arrays: dict[str, Any] = {}
    for name in "qkvo":
        arrays |= pair(name)
    if module.mechanism.aligned:
        arrays["align"] = array(module.align.weight)
        arrays["align_bias"] = None if module.align.bias is None else array(module.align.bias)
    if module.bias_k is not None:
        arrays["extra_k"], arrays["extra_v"] = array(module.bias_k)[0, 0], array(module.bias_v)[0, 0]
    learned = getattr(module, "log_scale", None)
    return oracle.Weights(
        module.num_heads,
        **arrays,
        align_causal=align_causal,
        zero_key=add_zero_attn,
        window=module.window,
        score=module.mechanism.score,
        scale=scale if learned is None else np.exp(array(learned)),
    )


def oracle_masks(
    attn_mask: Tensor | None, padding: Tensor | None, batch: int, heads: int, length: int, keys: int, *, floor: float
) -> dict[str, np.ndarray]:
    """torch's masks of a module (True = masked, or added) as the oracle's keep, bias and present.

    A float padding bias that is not above ``floor`` means a padded token.
    """
    keep = np.ones((batch, heads, length, keys), dtype=bool)
    bias = np.zeros((batch, heads, length, keys))
    present = np.ones((batch, keys), dtype=bool)

    def add(mask: Tensor, shape: tuple[int, ...]) -> None:
        values = mask.numpy().reshape(shape)
        hidden = values if mask.dtype == torch.bool else np.isneginf(values)
        keep[:] &= ~np.broadcast_to(hidden, keep.shape)
        if mask.dtype != torch.bool:
            bias[:] += np.broadcast_to(np.where(hidden, 0, values), bias.shape)

    if attn_mask is not None:
        add(attn_mask, (1, 1, length, keys) if attn_mask.ndim == 2 else (batch, heads, length, keys))
    if padding is not None:
        padding = padding.reshape(batch, keys)
        present &= (~padding if padding.dtype == torch.bool else padding > floor).numpy()
        add(padding, (batch, 1, 1, keys))
    return {"keep": keep, "bias": bias, "present": present}


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    score: str,
    keep: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The unfused formula in the dtype of its inputs, as anybody would write it; every row must see some key."""
    z = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if score == "softmax":
        z = z if bias is None else z + bias
        weights = (z if keep is None else z.masked_fill(~keep, -torch.inf)).softmax(-1)
    else:
        g = z**2 / (1 + z**2)
        g = g if bias is None else g * bias.exp()
        g = g if keep is None else g * keep
        weights = g / g.sum(-1, keepdim=True)
    return weights @ value, weights


def plain_module(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    padding: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    align_causal: bool = False,
    rounding: Rounding | None = None,
) -> Tensor:
    """The whole layer by the unfused formula, batch first, in the dtype of its parameters; with drawn ``rounding``.

    ``padding`` (B, S) is True for padded tokens, ``bias`` (L, S) is added to the scores.
    """

    def linear(layer: nn.Module, x: Tensor) -> Tensor:
        if not isinstance(layer, nn.Linear):
            return x
        if rounding is None:
            return F.linear(x, layer.weight, layer.bias)
        return Linear.apply(x, layer.weight, layer.bias, rounding)

    def heads_of(x: Tensor) -> Tensor:
        return x.unflatten(-1, (module.num_heads, -1)).transpose(1, 2)

    q, k, v = (
        heads_of(linear(layer, x))
        for layer, x in ((module.q_proj, query), (module.k_proj, key), (module.v_proj, value))
    )
    scale = None
    if module.log_scale is not None:
        q, scale = q * module.log_scale.exp()[:, None, None], 1.0
        q = q if rounding is None else Rounded.apply(q, rounding)
    keep = None if padding is None else ~padding[:, None, None, :]
    if module.mechanism.aligned:
        keys = key.shape[1]
        v = v if padding is None else v.masked_fill(padding[:, None, :, None], 0)  # W_A would spread a padded value
        kernel = module.align.weight[..., :keys, :keys]
        kernel = kernel.tril() if align_causal else kernel
        shift = None if module.align.bias is None else module.align.bias[..., :keys]
        if rounding is None:
            v = kernel @ v if shift is None else kernel @ v + shift[..., None]
        else:
            v = Align.apply(kernel if kernel.ndim == 3 else kernel[None], v, shift, rounding)
    if causal:
        triangle = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        keep = triangle if keep is None else keep & triangle
    if rounding is None:
        heads, _ = plain_attention(q, k, v, score=module.mechanism.score, keep=keep, bias=bias, scale=scale)
    else:
        heads = rounded_attention(
            q, k, v, score=module.mechanism.score, keep=keep, bias=bias, scale=scale, rounding=rounding
        )
    return linear(module.out_proj, heads.transpose(1, 2).flatten(2))


def rounded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    score: str,
    rounding: Rounding,
    keep: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """:func:`plain_attention` in float64 with drawn rounding errors; keys and values may have fewer heads than q."""
    group, shape = q.shape[1] // k.shape[1], (*q.shape[:3], k.shape[2])
    seen = torch.ones(shape, dtype=torch.bool) if keep is None else keep.expand(shape)
    k, v = (x.repeat_interleave(group, 1) if group > 1 else x for x in (k, v))
    return Attention.apply(q, k, v, seen, bias, score, q.shape[-1] ** -0.5 if scale is None else scale, rounding)


def assert_close(
    actual: Tensor | np.ndarray,
    reference: Tensor | np.ndarray,
    note: str = "",
    *,
    tolerance: float = EXACT,
    vacuous: bool = False,
) -> None:
    """max|actual - reference| <= tolerance * max(1, max|reference|), both finite, and the reference not all but zero.

    ``vacuous`` allows a reference of zeros, for results that must be zero.
    """
    actual, reference = array(actual), array(reference)
    assert actual.shape == reference.shape, f"{note}: shape {actual.shape}, expected {reference.shape}"
    assert np.isfinite(reference).all(), f"{note}: the reference is not finite"
    assert np.isfinite(actual).all(), f"{note}: not finite at {np.argwhere(~np.isfinite(actual))[:5].tolist()}"
    if reference.size == 0:
        return
    largest = np.abs(reference).max()
    assert vacuous or largest >= 1e-3, f"{note}: vacuous, the largest reference value is {largest}"
    error, bound = np.abs(actual - reference).max(), tolerance * max(1.0, largest)
    assert error <= bound, f"{note}: error {error:.3g} above {bound:.3g} (largest reference {largest:.3g})"


def assert_within_rounding(
    actual: Tensor,
    exact: Tensor | np.ndarray,
    allowed: Error,
    note: str = "",
    *,
    cap: bool = False,
    vacuous: bool = False,
) -> None:
    """The largest and the mean error of ``actual`` are within what rounding may lead to (see :mod:`rounding`).

    With ``cap``, no element may miss by more than ``CAPS`` either, times the largest exact value where that exceeds 1.
    ``vacuous`` allows an exact result of zeros.
    """
    ours, exact = array(actual), array(exact)
    assert ours.shape == exact.shape, f"{note}: shape {ours.shape}, expected {exact.shape}"
    assert np.isfinite(ours).all(), f"{note}: not finite at {np.argwhere(~np.isfinite(ours))[:5].tolist()}"
    assert np.isfinite(exact).all(), f"{note}: the reference is not finite"
    largest, error = np.abs(exact).max(), np.abs(ours - exact)
    assert vacuous or largest >= 1e-3, f"{note}: vacuous, the largest reference value is {largest}"
    assert error.max() <= allowed.largest, (
        f"{note}: error {error.max():.3g} above {allowed.largest:.3g} of {largest:.3g}"
    )
    assert error.mean() <= allowed.mean, f"{note}: mean error {error.mean():.3g} above {allowed.mean:.3g}"
    if cap:
        bound = CAPS[actual.dtype] * max(1.0, largest)
        assert error.max() <= bound, f"{note}: error {error.max():.3g} above the cap {bound:.3g}"
