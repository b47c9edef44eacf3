"""Which token comes next: probabilities from logits, and one token from probabilities and a number between 0 and 1.

Pure functions; what is random comes from outside. Shape letters: B batch, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from better_attention.errors import check_float, check_int


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen.

    The restrictions apply one after the other, in the order in which they stand here, each to what the one before left.

    Args:
        temperature: logits are divided by it; 0 takes the likeliest token always (greedy decoding).
        top_k: keep the k likeliest tokens; None: all.
        top_p: keep the likeliest tokens that together have at least this probability (arXiv 1904.09751); None: all.
        min_p: keep the tokens of at least this share of the likeliest one's probability (arXiv 2407.01082); None: all.

    Raises:
        TypeError, ValueError: a number out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        check_float(self.temperature, "temperature", low=0.0)
        if self.top_k is not None:
            check_int(self.top_k, "top_k")
        for name in ("top_p", "min_p"):
            if getattr(self, name) is not None:
                check_float(getattr(self, name), name, low=0.0, high=1.0)
        if self.top_p == 0:
            raise ValueError("top_p must be above 0, received 0: no token would be left. For the likeliest, top_k=1.")

    def probabilities(self, logits_BV: Tensor) -> Tensor:
        """Probability of each token to come next, (B, V), float64, from logits (B, V).

        Rows whose largest logit is not finite have no such probabilities, and their numbers mean nothing: on a GPU to
        look for them would be to wait. ``Decoder.step`` refuses them.
        """
        logits_BV = logits_BV.double()
        if self.temperature == 0:
            return one_hot_of_likeliest(logits_BV)
        # The likeliest becomes 0 before the division, so that no small temperature overflows.
        logits_BV = (logits_BV - logits_BV.amax(dim=-1, keepdim=True)) / self.temperature
        if self.top_k is not None:
            logits_BV = keep_top_k(logits_BV, self.top_k)
        if self.top_p is not None:
            logits_BV = keep_top_p(logits_BV, self.top_p)
        if self.min_p is not None:
            logits_BV = keep_min_p(logits_BV, self.min_p)
        return logits_BV.softmax(dim=-1)


def one_hot_of_likeliest(logits_BV: Tensor) -> Tensor:
    """Probability 1 for the largest logit, of equal ones the first."""
    return torch.zeros_like(logits_BV).scatter_(-1, logits_BV.argmax(dim=-1, keepdim=True), 1.0)


def keep_top_k(logits_BV: Tensor, k: int) -> Tensor:
    """The k largest logits; the others become -inf. Of equal ones at the border the first are kept.

    >>> keep_top_k(torch.tensor([[1.0, 3.0, 2.0, 2.0]]), 2)
    tensor([[-inf, 3., 2., -inf]])
    """
    return logits_BV.masked_fill(_ranks(logits_BV) >= k, -math.inf)


def keep_top_p(logits_BV: Tensor, p: float) -> Tensor:
    """The fewest likeliest tokens whose probabilities sum to at least p, at least one; the others become -inf."""
    sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    probabilities_BV = sorted_BV.softmax(dim=-1)
    # A token is needed as long as those before it do not suffice.
    before_BV = probabilities_BV.cumsum(dim=-1) - probabilities_BV
    dropped_BV = torch.zeros_like(before_BV, dtype=torch.bool).scatter_(-1, order_BV, before_BV >= p)
    return logits_BV.masked_fill(dropped_BV, -math.inf)


def keep_min_p(logits_BV: Tensor, p: float) -> Tensor:
    """The tokens of at least p times the probability of the likeliest; the others become -inf.

    >>> keep_min_p(torch.tensor([[0.0, -1.0, -3.0]]), 0.1)
    tensor([[ 0., -1., -inf]])
    """
    if p == 0:
        return logits_BV
    # Probabilities have one normaliser, so that their ratio is that of the exponentials.
    return logits_BV.masked_fill(logits_BV < logits_BV.amax(dim=-1, keepdim=True) + math.log(p), -math.inf)


def pick(probabilities_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """One token for each row, (B,): the first up to which the probabilities sum to more than the row's number.

    For numbers that are uniform in [0, 1) a token is picked with exactly its probability.

    Args:
        probabilities_BV: (B, V), rows that sum to one up to rounding.
        uniform_B: (B,), in [0, 1).

    >>> pick(torch.tensor([[0.25, 0.0, 0.75]]).repeat(3, 1), torch.tensor([0.1, 0.25, 0.99]))
    tensor([0, 2, 2])
    """
    sums_BV = probabilities_BV.cumsum(dim=-1)
    # Scaled by the sum that rounding left, so that a number just below one never falls behind the last token.
    aims_B1 = uniform_B[:, None].to(sums_BV.dtype) * sums_BV[:, -1:]
    tokens_B = torch.searchsorted(sums_BV, aims_B1, right=True)[:, 0]
    # Rounding may make the product equal to the sum; the last token that has a probability is meant then.
    last_B = (probabilities_BV > 0).int().mul(torch.arange(1, sums_BV.shape[1] + 1, device=sums_BV.device)).amax(dim=-1)
    return torch.minimum(tokens_B, last_B.long() - 1)


def _ranks(logits_BV: Tensor) -> Tensor:
    """The place of each logit by falling value, 0 the largest; of equal ones the first is before the second."""
    order_BV = logits_BV.argsort(dim=-1, descending=True, stable=True)
    places_V = torch.arange(logits_BV.shape[-1], device=logits_BV.device).expand_as(order_BV)
    return torch.empty_like(order_BV).scatter_(-1, order_BV, places_V)
