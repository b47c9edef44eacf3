"""Encoder and decoder of the translation experiment (arXiv 2403.01643, section 4.2, after keras.io's example).

Shape letters: B batch, S source tokens, T target tokens, D model width, V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from better_attention.dropout import dropout
from better_attention.lab.models.initialisation import keras_
from better_attention.layer.multihead import MultiheadAttention
from better_attention.mechanism import Mechanism

PADDING, UNKNOWN, START, END = 0, 1, 2, 3  # tokens; START and END in the target alone
NORM_EPS = 1e-3  # Keras' default, which its translation example keeps; torch's is 1e-5


class EncoderBlock(nn.Module):
    """Post-norm block over the source: ``norm(x + attention(x))``, then ``norm(x + MLP(x))``."""

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
        self.attention = attention(width, heads, length, mechanism, options)
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.expand = nn.Linear(width, hidden)
        self.contract = nn.Linear(hidden, width)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.dropout = dropout

    def forward(self, x_BSD: Tensor, padding_BS: Tensor) -> Tensor:
        """Map (B, S, D) to (B, S, D); ``padding_BS`` is True where there is no token."""
        mixed, _ = self.attention(x_BSD, x_BSD, x_BSD, key_padding_mask=padding_BS, need_weights=False)
        x_BSD = self.norm1(x_BSD + dropout(mixed, self.dropout, self.training))
        mapped = self.contract(F.relu(self.expand(x_BSD)))
        normed: Tensor = self.norm2(x_BSD + dropout(mapped, self.dropout, self.training))
        return normed


class DecoderBlock(nn.Module):
    """Post-norm block over the target: causal attention, attention on the encoded source (``cross``), MLP."""

    def __init__(
        self,
        width: int,
        heads: int,
        lengths: tuple[int, int],
        mechanism: Mechanism,
        options: Mapping[str, Any],
        hidden: int,
        dropout: float,
    ) -> None:
        super().__init__()
        source_length, target_length = lengths
        self.attention = attention(width, heads, target_length, mechanism, options, causal=True)
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.cross = attention(width, heads, source_length, mechanism, options)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.expand = nn.Linear(width, hidden)
        self.contract = nn.Linear(hidden, width)
        self.norm3 = nn.LayerNorm(width, eps=NORM_EPS)
        self.dropout = dropout

    def forward(self, x_BTD: Tensor, memory_BSD: Tensor, padding_BS: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D); ``memory_BSD`` is the encoded source, ``padding_BS`` its padding.

        The target's own padding needs no mask: it follows the tokens, and no token sees what follows it.
        """
        mixed, _ = self.attention(x_BTD, x_BTD, x_BTD, is_causal=True, need_weights=False)
        x_BTD = self.norm1(x_BTD + dropout(mixed, self.dropout, self.training))
        mixed, _ = self.cross(x_BTD, memory_BSD, memory_BSD, key_padding_mask=padding_BS, need_weights=False)
        x_BTD = self.norm2(x_BTD + dropout(mixed, self.dropout, self.training))
        mapped = self.contract(F.relu(self.expand(x_BTD)))
        normed: Tensor = self.norm3(x_BTD + dropout(mapped, self.dropout, self.training))
        return normed


class Translator(nn.Module):
    """Encoder-decoder: token and learned position embeddings, post-norm blocks, dropout, a linear map to the words.

    All three kinds of attention (in the encoder, causal in the decoder, from decoder to encoder) use the mechanism.
    Where W_K or W_V is missing, the keys or values of the third kind are slices of the encoder's output. The paper has
    no super attention here, since lengths vary. Ours has a longest length: W_A is lower triangular in the decoder, and
    between the two it mixes the positions of the source. Shorter inputs use its upper left part.

    Padding (token 0) follows the sentence. It never reaches a token: it is masked as a key wherever the source is read,
    and zeroed before W_A.

    Args:
        vocabulary: number of source and of target tokens, those in front of the words included.
        source_length, target_length: most tokens of a source and of a target, S and T.
        width, heads: model width D, attention heads.
        encoder_layers, decoder_layers: blocks of each.
        mechanism: name or row of :data:`better_attention.MECHANISMS`.
        options: further arguments of every :class:`~better_attention.MultiheadAttention`.
        hidden: width of a block's MLP.
        dropout: after every attention and every MLP.
        output_dropout: before the map to the words.

    >>> import torch
    >>> model = Translator(vocabulary=97, source_length=7, target_length=5, width=32, heads=4)
    >>> model(torch.ones(3, 7 + 5, dtype=torch.int64)).shape
    torch.Size([3, 5, 97])
    """

    def __init__(
        self,
        *,
        vocabulary: int,
        source_length: int,
        target_length: int,
        width: int,
        heads: int,
        encoder_layers: int = 1,
        decoder_layers: int = 2,
        mechanism: str | Mechanism = "standard",
        options: Mapping[str, Any] | None = None,
        hidden: int = 2048,
        dropout: float = 0.0,
        output_dropout: float = 0.5,
    ) -> None:
        super().__init__()
        row, more = Mechanism.of(mechanism), options or {}
        lengths = (source_length, target_length)
        self.output_dropout = output_dropout
        self.source_tokens = nn.Embedding(vocabulary, width)
        self.source_positions = nn.Embedding(source_length, width)
        self.target_tokens = nn.Embedding(vocabulary, width)
        self.target_positions = nn.Embedding(target_length, width)
        self.encoder = nn.ModuleList(
            EncoderBlock(width, heads, source_length, row, more, hidden, dropout) for _ in range(encoder_layers)
        )
        self.decoder = nn.ModuleList(
            DecoderBlock(width, heads, lengths, row, more, hidden, dropout) for _ in range(decoder_layers)
        )
        self.output = nn.Linear(width, vocabulary)
        keras_(self)

    @property
    def target_length(self) -> int:
        """Most tokens of a target, T."""
        return self.target_positions.num_embeddings

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, V) of the token that follows each target token.

        Args:
            tokens: integers (B, S + T): the source, padded to the model's ``source_length``; behind it ``START`` and
                the target, of at most ``target_length`` tokens.
        """
        # Source and target come as one tensor, so that a batch of any task has one tensor of inputs.
        source_BS, target_BT = tokens.tensor_split([self.source_positions.num_embeddings], dim=1)
        hidden_BTD = self.decode(target_BT, *self.encode(source_BS))
        logits: Tensor = self.output(dropout(hidden_BTD, self.output_dropout, self.training))
        return logits

    def encode(self, source_BS: Tensor) -> tuple[Tensor, Tensor]:
        """The encoded source (B, S, D), S at most the model's, and where it is padding, bool (B, S)."""
        padding_BS = source_BS == PADDING
        x_BSD = _embedded(source_BS, self.source_tokens, self.source_positions, "source")
        for block in self.encoder:
            x_BSD = block(x_BSD, padding_BS)
        return x_BSD, padding_BS

    def decode(self, target_BT: Tensor, memory_BSD: Tensor, padding_BS: Tensor) -> Tensor:
        """What the decoder makes of each target token, (B, T, D), from it and the tokens before it."""
        x_BTD = _embedded(target_BT, self.target_tokens, self.target_positions, "target")
        for block in self.decoder:
            x_BTD = block(x_BTD, memory_BSD, padding_BS)
        return x_BTD


def attention(
    width: int, heads: int, length: int, mechanism: Mechanism, options: Mapping[str, Any], *, causal: bool = False
) -> MultiheadAttention:
    """An attention layer over at most ``length`` values; ``causal`` keeps a W_A lower triangular."""
    options = mechanism.layer_options(length, causal=causal) | dict(options)
    return MultiheadAttention(width, heads, batch_first=True, mechanism=mechanism, **options)


def _embedded(tokens_BL: Tensor, tokens: nn.Embedding, positions: nn.Embedding, side: str) -> Tensor:
    length = tokens_BL.shape[1]
    if length > positions.num_embeddings:
        raise ValueError(
            f"this model reads at most {positions.num_embeddings} {side} tokens, received {length} (shape "
            f"{tuple(tokens_BL.shape)}). Build it for more, or shorten the sentence."
        )
    embedded: Tensor = tokens(tokens_BL) + positions.weight[:length]
    return embedded
