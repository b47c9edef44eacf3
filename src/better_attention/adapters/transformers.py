"""Attention of Hugging Face transformers, computed here: importing this module registers two implementations.

>>> import better_attention.adapters.transformers  # doctest: +SKIP
>>> model = AutoModel.from_pretrained(name, attn_implementation="better_attention")  # doctest: +SKIP

``"better_attention"`` is softmax attention, the same function as "sdpa" and "eager". ``"expressive"`` is expressive
attention (arXiv 2407.18601): another function, for models that are trained with it. ``model.set_attn_implementation``
switches a model that exists. Shape suffixes: B batch, N query heads, G heads of keys and values, L queries, S keys.

The attention and the mask interface belong together: a name that is registered for attention alone receives no mask for
padded batches, and no error says so.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from better_attention.call.masks import together
from better_attention.functional import attention
from better_attention.scores import DEFAULT_SCORE

from .host_attention import implementations

try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask
except ImportError as error:
    raise ImportError(
        "better_attention.adapters.transformers needs transformers 5.24 or newer: "
        "pip install 'better-attention[transformers]'."
    ) from error

OTHER_FUNCTION = {
    "softcap": "a soft cap on the scores",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "indices": "a selection of keys for each query",
    "block_indices": "a selection of blocks of keys for each query",
    "head_mask": "a mask over heads",
    "layer_head_mask": "a mask over heads",
}
"""Arguments by which a model asks for another function of queries and keys, and what they are."""


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    *,
    score: str = DEFAULT_SCORE,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers' attention interface calls, in place of its own ``sdpa_attention_forward``.

    Args:
        module: the model's attention module; its ``is_causal`` counts where the argument is None.
        query: (B, N, L, H).
        key: (B, G, S, H), where G divides N.
        value: (B, G, S, H).
        attention_mask: None, or (B, 1 or N, L, S): bool, True = attend, or float, added to the log weights.
        dropout: probability of dropping a weight.
        scaling: factor on q.k; None for 1/sqrt(H).
        is_causal: query l sees keys s <= l, if there is no mask and more than one query.
        position_bias: (1 or B, N, L, S), added to the log weights, as T5 does.
        score: a key of :data:`better_attention.scores.SCORES`.
        options: what else the model passes. ``output_attentions=True`` returns the weights.

    Returns:
        The output (B, L, N, H), contiguous; and None, or the weights (B, N, L, S) after dropout.

    Raises:
        ValueError: the model asks for another function: a soft cap, attention sinks, a selection of keys, packed
            sequences without a mask.
        TypeError: a mask of another kind, as flash and flex attention take them.
    """
    _refuse_other_functions(module, attention_mask, options)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    # A single query is the newest token, which sees all keys; a mask says by itself what is hidden.
    causal = bool(query.shape[2] > 1 and attention_mask is None and causal)
    if causal and key.shape[2] > query.shape[2]:
        # The first tokens with a static cache, whose remaining places are still empty: later keys are hidden anyway.
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
        position_bias = None if position_bias is None else position_bias[..., : query.shape[2]]
    result = attention(  # type: ignore[call-overload] # need_weights chooses what is returned
        query,
        key,
        value,
        score=score,
        attn_mask=together(attention_mask, position_bias),
        is_causal=causal,
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=key.shape[1] != query.shape[1],
        need_weights=bool(options.get("output_attentions")),
    )
    output, weights = result if isinstance(result, tuple) else (result, None)
    return output.transpose(1, 2).contiguous(), weights


def _refuse_other_functions(module: nn.Module, mask: object, options: dict[str, Any]) -> None:
    for name, meaning in OTHER_FUNCTION.items():
        if options.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__} passes {name}, {meaning}, which better-attention does not compute. Use "
                "model.set_attn_implementation('eager')."
            )
    if mask is None and options.get("cu_seq_lens_q") is not None:
        raise ValueError(
            f"{type(module).__name__} passes cu_seq_lens_q, several sequences in one row, and no mask that keeps them "
            "apart. Pass padded batches, or use an attention implementation that takes packed ones."
        )
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 4):
        kind = f"a tensor of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"{type(module).__name__} passes {kind} as attention_mask, expected None or a tensor (B, 1 or N, L, S). "
            "Use model.set_attn_implementation('sdpa')."
        )


def attention_of(score: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """:func:`attend` with a score, in the form that transformers' attention interface takes."""
    return partial(attend, score=score)


def register() -> None:
    """Register every score with the attention interface, and with the mask interface, as importing this module does.

    Call it again after registering a score of your own.
    """
    for name, score in implementations().items():
        AttentionInterface.register(name, attention_of(score))
        # Masks as for SDPA: bool with True = attend, or None where causality says all.
        AttentionMaskInterface.register(name, sdpa_mask)


register()
