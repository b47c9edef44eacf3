"""attention(): validate, choose an implementation, compute."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, overload

from torch import Tensor

from .call.distributed import Shards, draws_of, is_dtensor, shards_of
from .call.function_arguments import prepare
from .call.tracing import function_node, is_symbolic, refuse_script
from .errors import check_bool, check_choice
from .impl import IMPLEMENTATIONS
from .impl.dispatch import IMPLS, attend, choose, passed_over, summary


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    score: str = ...,
    attn_mask: Tensor | None = ...,
    is_causal: bool = ...,
    offset: int = ...,
    window: int | None = ...,
    dropout_p: float = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    need_weights: Literal[False] = ...,
    impl: str = ...,
) -> Tensor: ...


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    score: str = ...,
    attn_mask: Tensor | None = ...,
    is_causal: bool = ...,
    offset: int = ...,
    window: int | None = ...,
    dropout_p: float = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    need_weights: Literal[True],
    impl: str = ...,
) -> tuple[Tensor, Tensor]: ...


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    score: str = "softmax",
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    offset: int = 0,
    window: int | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    enable_gqa: bool = False,
    need_weights: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Weighted mean of values, weights from queries and keys.

    softmax: :math:`w_{ls} \propto e^{z_{ls} + b_{ls}}`; expressive: :math:`w_{ls} \propto
    \frac{z_{ls}^2}{1 + z_{ls}^2} e^{b_{ls}}`, with :math:`z = q \cdot k \cdot \mathrm{scale}`; both normalised over the
    keys s.

    Args:
        query: (..., N, L, H), floating point.
        key: (..., N, S, H), dtype and device of the query.
        value: (..., N, S, Hv).
        score: "softmax" or "expressive"; any key of :data:`better_attention.scores.SCORES`.
        attn_mask: broadcastable to (..., N, L, S). bool: True = attend (as in
            ``F.scaled_dot_product_attention``, the opposite of ``nn.MultiheadAttention``). float: b, added in
            log-weight space; -inf hides, and for the expressive score so does anything <= ``finfo(dtype).min``.
        is_causal: query l sees keys s <= l + offset. Together with ``attn_mask`` both apply.
        offset: position of the first query among the keys, such as the number of keys that a cache held before; needs
            ``is_causal``.
        window: a query sees its own position and at most ``window`` - 1 before it; needs ``is_causal``. None: all.
        dropout_p: probability of dropping a weight; applies always, so pass 0.0 outside training.
        scale: factor on q.k; None means 1/sqrt(H).
        enable_gqa: allow query heads to be a multiple of the key and value heads.
        need_weights: return (output, weights), the weights (..., N, L, S) after dropout.
        impl: "auto", or one implementation by name, which then computes or refuses. A second derivative needs
            "reference".

    Returns:
        (..., N, L, Hv), or that and the weights. A query from which every key is hidden (expressive: also one
        orthogonal to every visible key) gets weights and output 0, and finite gradients.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an argument of the wrong shape, or an ``impl`` that cannot compute this call.

    Note:
        DTensors that are divided over samples or heads, all three alike, give a DTensor divided in the same way; every
        process computes its part and nothing is sent. ``attn_mask`` is then that of the whole call, as an ordinary
        tensor or a DTensor. Tensors divided over length or width, and partial ones, are refused. With ``dropout_p``
        the parts drop independently of each other: the result depends on how the call is divided.

        With NaN or infinite numbers in keys or values, queries that may not see them stay clean. This is
        checked on the CPU in eager mode; elsewhere only finite numbers are kept apart.

        Expressive weights do not depend on the size of small scores: z and z/1000 give the same. Output and gradients
        are right, to the rounding of their dtype, while the largest number of each query (times scale) and of the
        keys of each head is between 1e-37 and 1e19 (float64: 1e-307 and 1e153), however small or large z is; 16-bit
        formats are computed as float32. The gradient of a query grows with 1/|query|, and that of a key with
        1/|key|, and is infinite only where it exceeds the dtype. Where one key has all the weight, the gradients of
        query and key are exactly 0.

    Source: arXiv 2403.01643 eqs. 3-4 (softmax); arXiv 2407.18601 (expressive).

    >>> import torch
    >>> q = torch.ones(2, 4, 5, 8)
    >>> attention(q, q, q, score="expressive", is_causal=True).shape
    torch.Size([2, 4, 5, 8])
    """
    # Before every check: torch.fx passes names, which have neither a dtype nor a shape.
    symbolic = is_symbolic(query)
    if symbolic or any(map(is_dtensor, (query, key, value, attn_mask))):
        settings: dict[str, Any] = {
            "score": score,
            "is_causal": is_causal,
            "offset": offset,
            "window": window,
            "dropout_p": dropout_p,
            "scale": scale,
            "enable_gqa": enable_gqa,
            "need_weights": need_weights,
            "impl": impl,
        }
        if symbolic:
            inputs = {"query": query, "key": key, "value": value, "attn_mask": attn_mask}
            return function_node(attention, inputs | settings)  # type: ignore[no-any-return]
        check_choice(impl, "impl", IMPLS)
        check_bool(enable_gqa, "enable_gqa")
        parts, reasons = shards_of(query, key, value, attn_mask, grouped=enable_gqa)
        if parts is None:
            raise ValueError(f"attention on DTensors: {'; '.join(reasons)}.")
        return _on_shards(parts, settings)
    check_choice(impl, "impl", IMPLS)
    call, lead = prepare(
        query, key, value, score, attn_mask, is_causal, offset, window, dropout_p, scale, enable_gqa, need_weights
    )
    heads_BNLH, weights_BNLS = attend(call, impl)
    output = lead.unfold(heads_BNLH)
    if not need_weights:
        return output
    assert weights_BNLS is not None  # noqa: S101 - the chosen implementation returns weights, for the type checker
    return output, lead.unfold(weights_BNLS)


def _on_shards(parts: Shards, settings: dict[str, Any]) -> Tensor | tuple[Tensor, Tensor]:
    """The call of the whole tensors, each process with its own part."""
    # Without dropout nothing is drawn, and the generator stays where it was.
    draws = draws_of(parts.place, parts.query.device) if settings["dropout_p"] else nullcontext()
    with draws:
        result = attention(parts.query, parts.key, parts.value, attn_mask=parts.attn_mask, **settings)
    if isinstance(result, tuple):
        return parts.whole(result[0]), parts.whole(result[1])
    return parts.whole(result)


# torch.jit.script asks for it before it reads the source; calls never look at it.
attention.__prepare_scriptable__ = partial(refuse_script, "attention")  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True)
class Explanation:
    """Which implementation would compute a call, and why not the others.

    Args:
        chosen: its name, or None where none would (only with an explicit ``impl``).
        reasons: per implementation, why it is not chosen; empty for the chosen one.
        inputs: the call in one line.
    """

    chosen: str | None
    reasons: Mapping[str, list[str]]
    inputs: str

    def __str__(self) -> str:
        lines = [f"attention({self.inputs})", f"  chosen: {self.chosen or 'none'}"]
        for name, why in self.reasons.items():
            if name != self.chosen:
                lines.append(f"  {name}: " + "; ".join(why))
        return "\n".join(lines)


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    score: str = "softmax",
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    offset: int = 0,
    window: int | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    enable_gqa: bool = False,
    need_weights: bool = False,
    impl: str = "auto",
) -> Explanation:
    """Which implementation :func:`attention` would take for the same arguments, and why not the others.

    Args:
        query: (..., N, L, H), as for :func:`attention`.
        key: (..., N, S, H).
        value: (..., N, S, Hv).
        score: "softmax", "expressive", or another key of ``SCORES``.
        attn_mask: broadcastable to (..., N, L, S).
        is_causal: query l sees keys s <= l + offset.
        offset: position of the first query among the keys.
        window: number of positions that a query sees, its own included; None: all.
        dropout_p: probability of dropping a weight.
        scale: factor on q.k; None means 1/sqrt(H).
        enable_gqa: allow query heads to be a multiple of the key and value heads.
        need_weights: whether the weights would be returned.
        impl: "auto", or one implementation by name.

    Returns:
        The choice and the reasons; printed, one line per implementation.

    Raises:
        TypeError: as for :func:`attention`.
        ValueError: as for :func:`attention`, but not for an ``impl`` that cannot compute the call.

    >>> import torch
    >>> q = torch.ones(1, 1, 512, 8)
    >>> print(explain(q, q, q, score="expressive", impl="sdpa"))
    attention(q (1, 1, 512, 8), k (1, 1, 512, 8), v (1, 1, 512, 8), float32 on cpu, score='expressive')
      chosen: none
      native: impl='sdpa' was requested
      sdpa: it computes softmax weights only, not 'expressive'
      triton: its kernels are for GPUs, not 'cpu'
      flex: it is for CUDA devices, not 'cpu'; it takes heads of width 16 and above
      chunked: impl='sdpa' was requested
      reference: impl='sdpa' was requested
    """
    check_choice(impl, "impl", IMPLS)
    divided = ""
    if any(map(is_dtensor, (query, key, value, attn_mask))):
        parts, refused = shards_of(query, key, value, attn_mask, grouped=check_bool(enable_gqa, "enable_gqa"))
        if parts is None:
            shapes = ", ".join(f"{n} {tuple(x.shape)}" for n, x in (("q", query), ("k", key), ("v", value)))
            return Explanation(None, dict.fromkeys(IMPLEMENTATIONS, refused), f"{shapes}, DTensor")
        query, key, value, attn_mask = parts.query, parts.key, parts.value, parts.attn_mask
        divided = f"; each process computes {parts}"
    call, _ = prepare(
        query, key, value, score, attn_mask, is_causal, offset, window, dropout_p, scale, enable_gqa, need_weights
    )
    inputs = summary(call) + divided
    # What is chosen for is the call without the keys that nobody sees.
    call = call.trimmed()
    chosen = choose(call, impl)
    reasons = {}
    for name, implementation in IMPLEMENTATIONS.items():
        why = implementation.unsupported(call)
        if not why and name != chosen:
            # It could, so that the reason is the choice itself.
            why = [passed_over(chosen, name, impl)]
        reasons[name] = why
    return Explanation(chosen, reasons, inputs)
