"""Nested tensors: self-attention on sequences of several lengths, as ``nn.TransformerEncoder`` makes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from better_attention.layer.arguments import Arguments

if TYPE_CHECKING:
    from better_attention.layer.multihead import MultiheadAttention


def is_nested(x: object) -> bool:
    """Whether ``x`` is a nested tensor, strided or jagged."""
    return isinstance(x, Tensor) and x.is_nested


def attend(layer: MultiheadAttention, given: Arguments) -> tuple[Tensor, None]:
    """What ``layer.forward`` returns for them: the output in the query's layout, and no weights.

    Raises:
        TypeError: more than self-attention without masks and weights.
        ValueError: sequences of another width.
    """
    query = given.query
    _refuse_options(layer, given)
    sequences = query.unbind()
    if any(x.dim() != 2 or x.shape[1] != layer.embed_dim for x in sequences):
        shapes = ", ".join(str(tuple(x.shape)) for x in sequences[:10])
        raise ValueError(f"a nested query must hold sequences (L, embed_dim={layer.embed_dim}), received {shapes}.")
    lengths = [len(x) for x in sequences]
    # Without tokens there is nothing to pad or attend to, and the output has the query's shape.
    if sum(lengths) == 0:
        return query.clone(), None
    padded_BLD = nn.utils.rnn.pad_sequence(list(sequences), batch_first=True)
    padding_BL = torch.arange(padded_BLD.shape[1]) >= torch.tensor(lengths)[:, None]
    # Its forward, because the hooks of this call have fired for the nested tensor already.
    output_BLD, _ = layer.forward(
        padded_BLD,
        padded_BLD,
        padded_BLD,
        padding_BL.to(query.device),
        need_weights=False,
        is_causal=given.is_causal,
    )
    return _nested_like(query, [x[:n] for x, n in zip(output_BLD, lengths, strict=True)]), None


def _refuse_options(layer: MultiheadAttention, given: Arguments) -> None:
    is_self = given.query is given.key and given.key is given.value
    masks = given.attn_mask is not None or given.key_padding_mask is not None
    if not is_self or not layer.batch_first or given.need_weights or masks:
        raise TypeError(
            "nested tensors are taken for self-attention with batch_first=True, need_weights=False and no mask "
            "(is_causal is taken): pad them (to_padded_tensor) and pass key_padding_mask, or set "
            "encoder.use_nested_tensor = False."
        )


def _nested_like(query: Tensor, outputs: list[Tensor]) -> Tensor:
    if query.layout == torch.jagged and query.lengths() is None:  # type: ignore[attr-defined]
        # With the query's own offsets, so that the two can be added.
        return torch.nested.nested_tensor_from_jagged(torch.cat(outputs), query.offsets())  # type: ignore[attr-defined]
    return torch.nested.as_nested_tensor(outputs, layout=query.layout)
