"""Text classifier of the review experiments (arXiv 2403.01643, section 4.2, after keras.io's text example).

Shape letters: B batch, L tokens, D model width, K outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from better_attention.dropout import dropout
from better_attention.lab.models.initialisation import keras_
from better_attention.layer.multihead import MultiheadAttention
from better_attention.mechanism import Mechanism

PADDING = 0  # the token that fills short texts
NORM_EPS = 1e-6  # Keras' text example; torch's default is 1e-5


class TextBlock(nn.Module):
    """Post-norm transformer block: ``norm(x + attention(x))``, then ``norm(x + MLP(x))``."""

    def __init__(
        self,
        width: int,
        heads: int,
        length: int,
        mechanism: Mechanism,
        options: Mapping[str, Any],
        hidden: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.attention = MultiheadAttention(
            width,
            heads,
            batch_first=True,
            mechanism=mechanism,
            **(mechanism.layer_options(length) | dict(options)),
        )
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.expand = nn.Linear(width, hidden)
        self.contract = nn.Linear(hidden, width)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.dropout = dropout

    def forward(self, x_BLD: Tensor, padding_BL: Tensor | None) -> Tensor:
        """Map (B, L, D) to (B, L, D); ``padding_BL`` is True where there is no token."""
        mixed, _ = self.attention(x_BLD, x_BLD, x_BLD, key_padding_mask=padding_BL, need_weights=False)
        x_BLD = self.norm1(x_BLD + dropout(mixed, self.dropout, self.training))
        mapped = self.contract(F.relu(self.expand(x_BLD)))
        normed: Tensor = self.norm2(x_BLD + dropout(mapped, self.dropout, self.training))
        return normed


class TextClassifier(nn.Module):
    """Text classifier: token and learned position embedding, post-norm blocks, mean over tokens, two linear maps.

    At the paper's IMDB setting (vocabulary 20,000, D 32, L 32, one standard block) it has 647,693 parameters.

    Padding (token 0) never reaches a result: it is masked as a key, left out of the mean, and the mask is
    built only where a batch holds padding at all, so that full batches take the faster unmasked path.

    Args:
        vocabulary: number of tokens, padding and unknown included.
        length: tokens of a text, L.
        width, layers, heads: model width D, number of blocks, attention heads.
        mechanism: name or row of :data:`better_attention.MECHANISMS`.
        options: further arguments of every :class:`~better_attention.MultiheadAttention`.
        hidden: width of a block's MLP.
        head: width of the ReLU layer before the outputs.
        outputs: number of logits, K: one for two classes.
        dropout: after attention, after a block's MLP, and around the ReLU layer.

    >>> import torch
    >>> model = TextClassifier(vocabulary=97, length=7, width=32, layers=1, heads=4)
    >>> model(torch.ones(5, 7, dtype=torch.int64)).shape
    torch.Size([5, 1])
    """

    def __init__(
        self,
        *,
        vocabulary: int,
        length: int,
        width: int,
        layers: int,
        heads: int,
        mechanism: str | Mechanism = "standard",
        options: Mapping[str, Any] | None = None,
        hidden: int = 32,
        head: int = 6,
        outputs: int = 1,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        mechanism = Mechanism.of(mechanism)
        self.dropout = dropout
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(
            TextBlock(width, heads, length, mechanism, options or {}, hidden, dropout) for _ in range(layers)
        )
        self.hidden = nn.Linear(width, head)
        self.output = nn.Linear(head, outputs)
        keras_(self)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Logits (B, K) of integer tokens (B, L), where L is the ``length`` of the model."""
        padding_BL = tokens_BL == PADDING
        # An exported program takes texts of both kinds, and the masked path is right for both.
        some_padding = torch.compiler.is_exporting() or bool(padding_BL.any())
        x_BLD = self.tokens(tokens_BL) + self.positions.weight
        for block in self.blocks:
            x_BLD = block(x_BLD, padding_BL if some_padding else None)
        pooled = masked_mean(x_BLD, padding_BL) if some_padding else x_BLD.mean(dim=1)
        hidden = F.relu(self.hidden(dropout(pooled, self.dropout, self.training)))
        logits: Tensor = self.output(dropout(hidden, self.dropout, self.training))
        return logits


def masked_mean(x_BLD: Tensor, padding_BL: Tensor) -> Tensor:
    """Mean (B, D) over the positions that hold a token; zero for a text without any.

    >>> import torch
    >>> masked_mean(torch.tensor([[[1.0], [5.0], [7.0]]]), torch.tensor([[True, False, False]]))
    tensor([[6.]])
    """
    # Replaced and not multiplied by zero, since NaN times zero is NaN.
    total_BD = x_BLD.masked_fill(padding_BL.unsqueeze(-1), 0.0).sum(dim=1)
    return total_BD / (~padding_BL).sum(dim=1, keepdim=True).clamp(min=1)
