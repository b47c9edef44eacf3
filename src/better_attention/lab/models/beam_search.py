"""Translations from a trained :class:`~better_attention.lab.models.translator.Translator`: greedy, or by beam search.

Both are deterministic, work on a whole batch at once, and compute every step anew: sentences of 20 words need no cache.
Shape letters: B batch, W width of the beam, S source tokens, T target tokens, V target vocabulary, D model width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from better_attention.errors import check_float, check_int
from better_attention.lab.models.translator import END, PADDING, START, Translator


@dataclass(frozen=True, slots=True)
class Decoded:
    """What a model wrote.

    Args:
        tokens: int64 (B, T), without ``START``; after ``END``, which is missing where a sentence was cut off, padding.
        log_probability: (B,), of the tokens of each sentence, ``END`` included.
    """

    tokens: Tensor
    log_probability: Tensor


def greedy(model: Translator, source_BS: Tensor, *, max_len: int | None = None) -> Decoded:
    """The likeliest token at each step, until every sentence has ended or has ``max_len`` tokens.

    Args:
        model: in eval mode.
        source_BS: integer tokens (B, S).
        max_len: most tokens of a translation, the end included; None: as many as the model knows positions.

    Raises:
        ValueError: ``max_len`` is more than that.
    """
    memory_BSD, padding_BS = model.encode(source_BS)
    written_BT = source_BS.new_full((len(source_BS), 1), START)
    total_B = memory_BSD.new_zeros(len(source_BS))
    ended_B = torch.zeros_like(total_B, dtype=torch.bool)
    for _ in range(_longest(model, max_len)):
        likeliest = _next(model, written_BT, memory_BSD, padding_BS).max(dim=1)
        token_B = likeliest.indices.masked_fill(ended_B, PADDING)
        total_B = total_B + likeliest.values.masked_fill(ended_B, 0.0)
        written_BT = torch.cat([written_BT, token_B[:, None]], dim=1)
        ended_B = ended_B | (token_B == END)
        if bool(ended_B.all()):
            break
    return Decoded(written_BT[:, 1:], total_B)


def beam_search(
    model: Translator, source_BS: Tensor, *, width: int, max_len: int | None = None, length_penalty: float = 1.0
) -> Decoded:
    """The best of the ``width`` sentences that were kept at each step; ``width=1`` is :func:`greedy`.

    Sentences are ranked by log probability / (number of tokens)^``length_penalty``, finished ones among those that go
    on. With a beam as wide as there are sentences, the result is the best of all sentences.

    Args:
        model, source_BS, max_len: as for :func:`greedy`.
        width: sentences kept, W.
        length_penalty: 0 ranks by probability alone, which favours short sentences; 1 by the mean of a token.

    Raises:
        ValueError: a number out of range.
    """
    W, alpha = check_int(width, "width"), check_float(length_penalty, "length_penalty", low=0.0)
    # The W copies of a sentence follow each other, as the beams do where (B, W) is flattened.
    memory_BSD, padding_BS = (x.repeat_interleave(W, dim=0) for x in model.encode(source_BS))
    B, V = len(source_BS), model.output.out_features
    written_BWT = source_BS.new_full((B, W, 1), START)
    total_BW = memory_BSD.new_full((B, W), -math.inf)
    total_BW[:, 0] = 0.0  # all start alike: one of them is enough
    length_BW = torch.zeros_like(total_BW)
    ended_BW = torch.zeros_like(total_BW, dtype=torch.bool)
    over_V = total_BW.new_full((V,), -math.inf)
    over_V[PADDING] = 0.0  # a sentence that has ended continues with padding, at no cost
    for _ in range(_longest(model, max_len)):
        next_BWV = _next(model, written_BWT.flatten(0, 1), memory_BSD, padding_BS).view(B, W, V)
        total_BWV = total_BW[..., None] + torch.where(ended_BW[..., None], over_V, next_BWV)
        length_BW = length_BW + ~ended_BW
        # Every sentence has at least one token by now, so no length is zero.
        best_BW = (total_BWV / length_BW[..., None] ** alpha).flatten(1).topk(W, dim=1).indices
        # The index counts tokens within beams.
        beam_BW, token_BW = best_BW // V, best_BW % V
        total_BW, length_BW = total_BWV.flatten(1).gather(1, best_BW), length_BW.gather(1, beam_BW)
        kept_BWT = written_BWT.gather(1, beam_BW[..., None].expand_as(written_BWT))
        written_BWT = torch.cat([kept_BWT, token_BW[..., None]], dim=2)
        ended_BW = ended_BW.gather(1, beam_BW) | (token_BW == END)
        if bool(ended_BW.all()):
            break
    # topk sorts, so the first beam is the best one.
    return Decoded(written_BWT[:, 0, 1:], total_BW[:, 0])


def _longest(model: Translator, max_len: int | None) -> int:
    if max_len is None:
        return model.target_length
    if check_int(max_len, "max_len") > model.target_length:
        raise ValueError(
            f"max_len must be <= {model.target_length}, the target positions this model knows, received {max_len}."
        )
    return max_len


def _next(model: Translator, written_BT: Tensor, memory_BSD: Tensor, padding_BS: Tensor) -> Tensor:
    """Log probabilities (B, V) of the next token; no sentence continues with padding or with another start."""
    logits_BV: Tensor = model.output(model.decode(written_BT, memory_BSD, padding_BS)[:, -1])
    never = torch.tensor([PADDING, START], device=logits_BV.device)
    # Before the softmax, so that the probabilities of the other tokens still sum to 1.
    return logits_BV.index_fill(1, never, -math.inf).log_softmax(dim=1)
