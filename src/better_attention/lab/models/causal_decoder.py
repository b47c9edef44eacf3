"""A small causal decoder for the prediction of tokens: the model of the recurrence ladder.

Shape letters: B batch, L tokens, D model width, N heads, K outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from better_attention.costs import cost
from better_attention.dropout import dropout
from better_attention.errors import check_choice
from better_attention.layer.multihead import MultiheadAttention
from better_attention.mechanism import Mechanism

POSITIONS = ("learned", "rotary", "alibi-weight", "alibi-score")
"""How a decoder knows where a token stands; ALiBi in one of its two places, see layer/heads.py."""
EMBEDDINGS = ("learned", "one-hot")
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType({"gelu": F.gelu, "relu": F.relu})
EMBEDDING_STD = 0.02  # GPT-2's


class CausalBlock(nn.Module):
    """Pre-norm transformer block: ``x + attention(norm(x))``, then ``x + MLP(norm(x))``, MLP widths [4D, D]."""

    def __init__(self, width: int, attention: MultiheadAttention, dropout: float, activation: str) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = attention
        self.norm2 = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)
        self.dropout = dropout
        self.activation = ACTIVATIONS[activation]

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Map (B, L, D) to (B, L, D)."""
        normed = self.norm1(x_BLD)
        mixed, _ = self.attention(normed, normed, normed, is_causal=True, need_weights=False)
        x_BLD = x_BLD + dropout(mixed, self.dropout, self.training)
        mapped = self.contract(self.activation(self.expand(self.norm2(x_BLD))))
        return x_BLD + dropout(mapped, self.dropout, self.training)


class CausalDecoder(nn.Module):
    """Causal language model: tokens, positions, pre-norm blocks, a norm, logits of what comes next.

    Args:
        vocabulary: number of different tokens that are read.
        outputs: number of different tokens that are predicted, K; None: as many as are read.
        length: longest sequence; the size of W_A and of learned positions.
        width, layers, heads: model width D, number of blocks, attention heads.
        mechanism: name or row of :data:`better_attention.MECHANISMS`; W_A, where there is one, is lower triangular.
        options: further arguments of every :class:`~better_attention.MultiheadAttention`.
        positions: ``"learned"`` (a vector a position, added to the token's), ``"rotary"``, or ALiBi on the log weights
            (``"alibi-weight"``) or inside the score (``"alibi-score"``).
        embedding: ``"learned"``, or ``"one-hot"``: token i is the unit vector i, which is not trained; needs a width of
            at least ``vocabulary``.
        activation: of the MLP, ``"gelu"`` or ``"relu"``.
        scale: factor on q.k: None for 1/sqrt(head width), a number, or ``"learned"``.
        dropout: on attention weights, and after both halves of a block.

    Raises:
        ValueError: a name that is not listed; too few dimensions for one-hot tokens; arguments that the attention
            layers refuse.

    >>> import torch
    >>> model = CausalDecoder(vocabulary=5, length=7, width=8, layers=2, heads=2, mechanism="super", positions="rotary")
    >>> model(torch.tensor([[0, 4, 1]])).shape
    torch.Size([1, 3, 5])
    """

    def __init__(
        self,
        *,
        vocabulary: int,
        length: int,
        width: int,
        layers: int,
        heads: int,
        outputs: int | None = None,
        mechanism: str | Mechanism = "standard",
        options: Mapping[str, Any] | None = None,
        positions: str = "learned",
        embedding: str = "learned",
        activation: str = "gelu",
        scale: float | str | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_choice(positions, "positions", POSITIONS)
        check_choice(activation, "activation", ACTIVATIONS)
        mechanism = Mechanism.of(mechanism)
        self.length = length
        self.tokens = token_table(vocabulary, width, embedding)
        self.positions = nn.Embedding(length, width) if positions == "learned" else None
        self.blocks = nn.ModuleList(
            CausalBlock(
                width,
                MultiheadAttention(
                    width,
                    heads,
                    dropout,
                    batch_first=True,
                    mechanism=mechanism,
                    scale=scale,
                    **position_options(positions),
                    **(mechanism.layer_options(length, causal=True) | dict(options or {})),
                ),
                dropout,
                activation,
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, vocabulary if outputs is None else outputs)
        # torch draws embeddings with a standard deviation of 1, which is 50 times as much.
        for table in (self.tokens, self.positions):
            if isinstance(table, nn.Embedding):
                nn.init.normal_(table.weight, std=EMBEDDING_STD)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Logits (B, L, K) of the token after each of ``tokens_BL``, integers (B, L).

        Raises:
            ValueError: more tokens than ``length``.
        """
        L = tokens_BL.shape[1]
        if self.length < L:
            raise ValueError(f"this model was built for length={self.length}, received {L} tokens. Shorten the input.")
        x_BLD = self.tokens(tokens_BL)
        if self.positions is not None:
            x_BLD = x_BLD + self.positions.weight[:L]
        for block in self.blocks:
            x_BLD = block(x_BLD)
        logits: Tensor = self.output(self.norm(x_BLD))
        return logits


def position_options(positions: str) -> dict[str, Any]:
    """The arguments of an attention layer for one of :data:`POSITIONS`; learned ones are no affair of the layer."""
    place = positions.removeprefix("alibi-")
    return {"rotary": positions == "rotary", "alibi": None if place == positions else place}


class OneHot(nn.Module):
    """Token i as the unit vector i: what an embedding fixed to the identity gives, without its parameters."""

    table: Tensor

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.register_buffer("table", torch.eye(vocabulary, width), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(...) integers to (..., D)."""
        return F.embedding(tokens, self.table)


def token_table(vocabulary: int, width: int, embedding: str) -> nn.Module:
    """What turns tokens into vectors: learned, or one-hot.

    Raises:
        ValueError: an embedding of another name, or fewer dimensions than one-hot tokens need.
    """
    if check_choice(embedding, "embedding", EMBEDDINGS) == "learned":
        return nn.Embedding(vocabulary, width)
    if width < vocabulary:
        raise ValueError(f"one-hot embeddings of {vocabulary} tokens need a width of at least that, received {width}.")
    return OneHot(vocabulary, width)


def decoder_size(
    *,
    vocabulary: int,
    length: int,
    width: int,
    layers: int,
    heads: int,
    outputs: int | None = None,
    mechanism: str | Mechanism = "standard",
    per_head: bool = False,
    positions: str = "learned",
    embedding: str = "learned",
    scale: float | str | None = None,
) -> int:
    """Number of learned values of a :class:`CausalDecoder`, without building it; ``per_head``: one W_A for each head.

    >>> sizes = {"vocabulary": 5, "length": 7, "width": 8, "layers": 2, "heads": 2, "mechanism": "super"}
    >>> decoder_size(**sizes) == sum(parameter.numel() for parameter in CausalDecoder(**sizes).parameters())
    True
    """
    D, K = width, vocabulary if outputs is None else outputs
    kernel = "per_head" if per_head else "shared"
    attention = cost(D, heads, length, mechanism=mechanism, align_heads=kernel).params + heads * (scale == "learned")
    # The two maps of the MLP have 4D · D weights each, and 4D and D biases.
    norm, mlp = 2 * D, 8 * D * D + 5 * D
    tables = (vocabulary * (embedding == "learned") + length * (positions == "learned")) * D
    return tables + layers * (attention + mlp + 2 * norm) + norm + (D + 1) * K
