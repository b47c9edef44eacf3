"""A small modern language model: pre-norm RMSNorm, rotary positions, SwiGLU, tied embeddings, any mechanism.

The blocks are those of Llama (arXiv 2302.13971, section 2.2): RMSNorm (arXiv 1910.07467), rotary positions (arXiv
2104.09864) and SwiGLU (arXiv 2002.05202), without biases; the initial weights are GPT-2's. Shape letters: B batch, L
tokens, S tokens seen so far, D model width, F width inside the MLP, N heads, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from better_attention.cache.model_cache import ModelCache
from better_attention.costs import cost
from better_attention.dropout import dropout
from better_attention.errors import check_choice, check_int
from better_attention.lab.models.causal_decoder import POSITIONS, position_options
from better_attention.lab.models.initialisation import gpt2_
from better_attention.lab.models.language_checks import check_cache, check_known, check_tokens
from better_attention.layer.multihead import MultiheadAttention
from better_attention.layer.projections import check_kv_heads
from better_attention.mechanism import Mechanism

NORM_EPS = 1e-6  # Llama's
RESIDUAL = ("out_proj", "contract")
"""Names of the maps whose output is added to the residual stream."""
KV_HEADS = ("kv_heads", "heads")
"""What the numbers of heads of keys and of queries are called here."""
HIDDEN_MULTIPLE = 8
"""The MLP's width is rounded up to a multiple of this: as many float32 numbers as AVX2 processes at a time."""


def hidden_width(width: int) -> int:
    """Width F of the MLP: 8/3 D, so that three maps have the parameters of two of width 4 D, rounded up.

    >>> hidden_width(384), hidden_width(64)
    (1024, 176)
    """
    return -(-8 * width // (3 * HIDDEN_MULTIPLE)) * HIDDEN_MULTIPLE


class SwiGLU(nn.Module):
    """``contract(silu(gate(x)) * up(x))``; ``expand`` holds both maps, the gate's first (arXiv 2002.05202, eq. 6)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expand = nn.Linear(width, 2 * hidden_width(width), bias=False)
        self.contract = nn.Linear(hidden_width(width), width, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Map (B, L, D) to (B, L, D)."""
        gate_BLF, up_BLF = self.expand(x_BLD).chunk(2, dim=-1)
        mapped: Tensor = self.contract(F.silu(gate_BLF) * up_BLF)
        return mapped


class LanguageBlock(nn.Module):
    """Pre-norm block: ``x + attention(norm(x))``, then ``x + SwiGLU(norm(x))``."""

    def __init__(self, width: int, attention: MultiheadAttention, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(width, eps=NORM_EPS)
        self.attention = attention
        self.norm2 = nn.RMSNorm(width, eps=NORM_EPS)
        self.mlp = SwiGLU(width)
        self.dropout = dropout

    def forward(self, x_BLD: Tensor, padding_BL: Tensor | None, cache: Any | None) -> Tensor:
        """Map (B, L, D) to (B, L, D).

        Args:
            x_BLD: what stands at the tokens.
            padding_BL: True where there is no token.
            cache: of the whole model; None: the tokens are all there is.
        """
        normed = self.norm1(x_BLD)
        # A cache attends causally by itself: its new tokens do not begin at the first key.
        how: dict[str, Any] = {"is_causal": True} if cache is None else {"cache": cache[self.attention]}
        mixed, _ = self.attention(normed, normed, normed, key_padding_mask=padding_BL, need_weights=False, **how)
        x_BLD = x_BLD + dropout(mixed, self.dropout, self.training)
        return x_BLD + dropout(self.mlp(self.norm2(x_BLD)), self.dropout, self.training)


class LanguageModel(nn.Module):
    """Causal language model: tokens, pre-norm blocks, a norm, and the tokens' own embeddings as the output map.

    Args:
        vocabulary: number of different tokens V.
        length: sequence length it is trained at: the size of W_A (without a window) and of learned positions, which
            bound what it can read; see :attr:`longest`.
        width, layers, heads: model width D, number of blocks, attention heads N.
        mechanism: name or row of :data:`better_attention.MECHANISMS`; W_A, where there is one, is lower triangular,
            or aligns the window.
        options: further arguments of every :class:`~better_attention.MultiheadAttention`.
        positions: ``"rotary"``, ``"learned"`` (a vector a position, added to the token's), ``"alibi-weight"`` or
            ``"alibi-score"``, see :class:`~better_attention.MultiheadAttention`.
        window: each token sees the last ``window`` tokens, itself included; None: all before it.
        scale: factor on q.k: None for 1/sqrt(head width), a number, or ``"learned"``.
        kv_heads: heads of projected keys and values, each of which serves as many neighbouring query heads; divides
            ``heads``. None: as many as queries have.
        dropout: on embeddings, on attention weights, and after both halves of a block.

    Raises:
        ValueError: no vocabulary; positions of another name; ``kv_heads`` that do not divide ``heads``, or fewer where
            no keys are projected; arguments that the attention layers refuse.

    >>> model = LanguageModel(vocabulary=5, length=7, width=8, layers=2, heads=2, mechanism="efficient")
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
        mechanism: str | Mechanism = "standard",
        options: Mapping[str, Any] | None = None,
        positions: str = "rotary",
        window: int | None = None,
        scale: float | str | None = None,
        kv_heads: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_choice(positions, "positions", POSITIONS)
        row = Mechanism.of(mechanism)
        check_kv_heads(kv_heads, heads, row, KV_HEADS)
        self.dropout = dropout
        bounded = positions == "learned" or (row.aligned and window is None)
        self.longest = check_int(length, "length") if bounded else None
        """Most tokens that it can read; None: any number."""
        self.places_matter = row.aligned and window is None
        """Whether a token's place in its row changes what it means: W_A counts from the first token, padding too."""
        self.tokens = nn.Embedding(check_int(vocabulary, "vocabulary"), width)
        self.positions = nn.Embedding(length, width) if positions == "learned" else None
        own: dict[str, Any] = {"dropout": dropout, "scale": scale, "bias": False, "num_kv_heads": kv_heads}
        own |= position_options(positions)
        own |= row.layer_options(length, causal=True) if window is None else {"window": window}
        own |= options or {}
        self.blocks = nn.ModuleList(
            LanguageBlock(width, MultiheadAttention(width, heads, batch_first=True, mechanism=row, **own), dropout)
            for _ in range(layers)
        )
        self.norm = nn.RMSNorm(width, eps=NORM_EPS)
        gpt2_(self, residual=RESIDUAL, layers=layers)

    def forward(
        self,
        tokens_BL: Tensor,
        *,
        padding_BL: Tensor | None = None,
        positions_BL: Tensor | None = None,
        cache: ModelCache | None = None,
        last: int | Tensor | None = None,
    ) -> Tensor:
        """Logits (B, L, V) of the token after each of ``tokens_BL``, integers (B, L).

        Args:
            tokens_BL: the new tokens.
            padding_BL: bool, True where there is no token: in front of the shorter texts of a batch.
            positions_BL: number of each token in its text, for learned positions; None: counted from the first one
                that is no padding, or behind what the cache holds.
            cache: a ``better_attention.ModelCache`` of this model; the tokens follow those that it holds.
            last: how many of the last tokens get logits, (B, last, V); or the places of those that do, whole numbers
                (n,) for all rows or (B, n), or bool (B, L), which gives (n, V); None: all.

        Raises:
            TypeError: tokens that are no whole numbers; another cache.
            ValueError: no token; on the CPU, one that the vocabulary does not have; more tokens than :attr:`longest`;
                padding where W_A counts it.
        """
        check_tokens(tokens_BL)
        check_cache(cache)
        # After Ctrl-C in the middle of a step, the next one begins where that one began.
        start = 0 if cache is None else cache.settle()
        if self.places_matter:
            self._check_places(start + tokens_BL.shape[1], padding_BL, cache)
        x_BLD = self._embedded(tokens_BL)
        if self.positions is not None:
            x_BLD = x_BLD + self.positions(self._numbers(tokens_BL, padding_BL, positions_BL, start))
        x_BLD = dropout(x_BLD, self.dropout, self.training)
        for block in self.blocks:
            x_BLD = block(x_BLD, padding_BL, cache)
        return F.linear(self.norm(_kept(x_BLD, last)), self.tokens.weight)

    @property
    def unbounded(self) -> str:
        """What a model of this kind needs to read any number of tokens, for messages; empty where it does already."""
        needs = ["with rotary positions or ALiBi instead of learned ones"] if self.positions is not None else []
        return " and ".join([*needs, "with a window"] if self.places_matter else needs)

    def check_prompts(self, tokens_BL: Tensor) -> None:
        """Refuse what this model cannot read; :meth:`forward` does the same on the CPU alone, where it costs nothing.

        Args:
            tokens_BL: (B, L); a GPU is waited for.

        Raises:
            TypeError: no whole numbers.
            ValueError: no token, or one that the vocabulary does not have.
        """
        check_tokens(tokens_BL)
        check_known(tokens_BL, self.tokens.weight.shape[0])

    def _embedded(self, tokens_BL: Tensor) -> Tensor:
        """What stands for each token, (B, L, D)."""
        try:
            embedded: Tensor = self.tokens(tokens_BL)
        # On the CPU torch looks at each number in any case, so that nothing needs to be looked at twice.
        except IndexError:
            self.check_prompts(tokens_BL)
            raise
        return embedded

    def _numbers(self, tokens_BL: Tensor, padding_BL: Tensor | None, positions_BL: Tensor | None, start: int) -> Tensor:
        """The number of each token in its text, (L,) or (B, L); that of padding is 0."""
        if positions_BL is None:
            if padding_BL is None:
                self._check_length(start + tokens_BL.shape[1])
                return torch.arange(start, start + tokens_BL.shape[1], device=tokens_BL.device)
            if start:
                raise ValueError("padding behind cached tokens: pass positions_BL, each token's number in its text.")
            positions_BL = ((~padding_BL).cumsum(dim=1) - 1).clamp(min=0)
        self._check_length(int(positions_BL.max()) + 1 if positions_BL.numel() else 0)
        return positions_BL

    def _check_length(self, tokens: int) -> None:
        if self.longest is not None and tokens > self.longest:
            raise ValueError(
                f"this model reads at most {self.longest} tokens, received {tokens}. Shorten the input, or build the "
                f"model {self.unbounded}."
            )

    def _check_places(self, tokens: int, padding_BL: Tensor | None, cache: Any | None) -> None:
        """Refuse too many tokens, and padding that a token follows or, with a cache, may follow."""
        self._check_length(tokens)
        if padding_BL is None:
            return
        followed = padding_BL if cache is not None else padding_BL[:, :-1] & ~padding_BL[:, 1:]
        if bool(followed.any()):
            raise ValueError(
                "W_A counts places from the first of a row, so that padding in front of a text would change what it "
                "means to this model. Pass texts of one length, or build the model with window=."
            )


def _kept(x_BLD: Tensor, last: int | Tensor | None) -> Tensor:
    """The tokens that get logits, see :meth:`LanguageModel.forward`."""
    if last is None:
        return x_BLD
    if not isinstance(last, Tensor):
        if last < 1:
            raise ValueError(f"last must be >= 1, received {last}. For the logits of all tokens leave it out.")
        return x_BLD[:, -last:]
    if last.dim() != 2:
        return x_BLD[:, last]
    return x_BLD[last] if last.dtype == torch.bool else x_BLD.take_along_dim(last[..., None], dim=1)


def language_model_size(
    *,
    vocabulary: int,
    length: int,
    width: int,
    layers: int,
    heads: int,
    mechanism: str | Mechanism = "standard",
    per_head: bool = False,
    positions: str = "rotary",
    window: int | None = None,
    scale: float | str | None = None,
    kv_heads: int | None = None,
) -> int:
    """Number of learned values of a :class:`LanguageModel`, without building it; ``per_head``: one W_A for each head.

    Raises:
        ValueError, TypeError: as the class does.

    >>> sizes = {"vocabulary": 5, "length": 7, "width": 8, "layers": 2, "heads": 2, "mechanism": "super"}
    >>> language_model_size(**sizes) == sum(parameter.numel() for parameter in LanguageModel(**sizes).parameters())
    True
    """
    kernel = "per_head" if per_head else "shared"
    check_kv_heads(kv_heads, heads, Mechanism.of(mechanism), KV_HEADS)
    own: dict[str, Any] = {"mechanism": mechanism, "align_heads": kernel, "window": window, "num_kv_heads": kv_heads}
    attention = cost(width, heads, length, bias=False, **own).params
    block = attention + heads * (scale == "learned") + 3 * width * hidden_width(width) + 2 * width
    return (vocabulary + length * (positions == "learned")) * width + layers * block + width
