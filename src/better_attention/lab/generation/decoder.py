"""Several token sequences continued together, a token a step, by a language model with a cache.

Shorter sequences are padded in front. Each draws its random numbers from a generator of its own, so that what becomes
of one does not depend on the others beside it. Shape letters: B sequences that continue, L tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from hashlib import sha256

import torch
from torch import Tensor

from better_attention.cache.model_cache import ModelCache
from better_attention.lab.generation.sampling import Sampling, pick
from better_attention.lab.models.language_checks import without_choice
from better_attention.lab.models.language_model import LanguageModel

UNCHOSEN = -1
"""In the place of a token where none can be chosen."""


class Decoder:
    """Continues several sequences of tokens.

    Args:
        model: in eval mode.
        prompts: a sequence of at least one token each; of one length where the model has a W_A over all positions.
        sampling: how tokens are chosen.
        seed: of the random numbers; sequence n draws those of (``seed``, n).
        never: tokens that are never chosen.
        numbers: the n of each sequence; None: 0, 1, ...

    Raises:
        ValueError: no prompt, an empty one, one that is longer than the model reads, or one with a token that the
            vocabulary does not have.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        seed: int = 0,
        never: Sequence[int] = (),
        numbers: Sequence[int] | None = None,
    ) -> None:
        lengths = [len(prompt) for prompt in prompts]
        if not lengths or min(lengths) == 0:
            raise ValueError("a prompt holds no token: there is nothing to continue. Write at least one character.")
        if model.longest is not None and max(lengths) > model.longest:
            raise ValueError(
                f"a prompt has {max(lengths):,} tokens, and this model reads at most {model.longest:,}. Shorten it."
            )
        # Here and not on the device, where a look at the numbers would have to wait for them.
        for prompt in prompts:
            model.check_prompts(torch.tensor([list(prompt)]))
        device = model.tokens.weight.device
        self.model, self.sampling = model, sampling
        self.rows = list(range(len(prompts)))
        """The sequences that continue, as numbers of ``prompts``."""
        self._never = torch.tensor(list(never), dtype=torch.int64, device=device)
        self._generators = [_generator(seed, n) for n in numbers or range(len(prompts))]
        self._cache = ModelCache(model, len(prompts))
        self._lengths_B = torch.tensor(lengths, device=device)
        padded = [[0] * (max(lengths) - len(prompt)) + list(prompt) for prompt in prompts]
        self._unread_BL = torch.tensor(padded, device=device)
        """Tokens that the model has yet to read: the prompts, later the newest token of each sequence."""

    def step(self) -> dict[int, int]:
        """One more token for each sequence that continues: its number in ``prompts`` -> the token.

        Raises:
            ValueError: a sequence has more tokens than the model can read, see :attr:`full`; or the model's logits
                leave no token to choose, as where one of them is NaN.
        """
        logits_BV = self._read().index_fill(1, self._never, -torch.inf)
        draws = [torch.rand((), dtype=torch.float64, generator=self._generators[n]) for n in self.rows]
        uniform_B = torch.stack(draws).to(logits_BV.device)
        tokens_B = pick(self.sampling.probabilities(logits_BV), uniform_B)
        # A maximum is NaN where any number is, and -inf where no token is left. The mark travels with the tokens, so
        # that a GPU is waited for once.
        chosen = tokens_B.where(logits_BV.amax(dim=-1).isfinite(), UNCHOSEN).tolist()
        if UNCHOSEN in chosen:
            raise ValueError(_without_choice(self.rows[chosen.index(UNCHOSEN)], logits_BV[chosen.index(UNCHOSEN)]))
        self._unread_BL, self._lengths_B = tokens_B[:, None], self._lengths_B + 1
        return dict(zip(self.rows, chosen, strict=True))

    @property
    def full(self) -> list[int]:
        """The sequences that continue and have more tokens than the model can read."""
        longest = self.model.longest
        if longest is None:
            return []
        return [n for n, length in zip(self.rows, self._lengths_B.tolist(), strict=True) if length > longest]

    def end(self, sequences: Collection[int]) -> None:
        """Leave some sequences out from now on; the others continue as if these had never been there."""
        kept = [place for place, n in enumerate(self.rows) if n not in sequences]
        if len(kept) == len(self.rows):
            return
        self.rows = [self.rows[place] for place in kept]
        if kept:  # of the last ones nothing needs to be kept
            index_B = torch.tensor(kept, device=self._lengths_B.device)
            self._cache.reorder(index_B)
            self._unread_BL, self._lengths_B = self._unread_BL[index_B], self._lengths_B[index_B]

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache."""
        return self._cache.nbytes

    @torch.inference_mode()
    def _read(self) -> Tensor:
        """Logits (B, V) of the token after the unread ones."""
        L = self._unread_BL.shape[1]
        # Counted backwards from the last token, so that the padding in front has negative numbers.
        numbers_BL = self._lengths_B[:, None] - L + torch.arange(L, device=self._lengths_B.device)
        padding_BL = numbers_BL < 0
        logits_B1V = self.model(
            self._unread_BL,
            padding_BL=padding_BL if L > 1 and bool(padding_BL.any()) else None,
            positions_BL=numbers_BL.clamp(min=0),
            cache=self._cache,
            last=1,
        )
        last_BV: Tensor = logits_B1V[:, -1]
        return last_BV


def _without_choice(number: int, logits_V: Tensor) -> str:
    if not logits_V.isnan().any() and logits_V.amax() < 0:  # -inf: what is excluded has it too
        return f"sequence {number}: every token is excluded, or infinitely unlikely. Exclude fewer tokens (never)."
    return f"sequence {number}: {without_choice(float(logits_V.amax()))}"


def _generator(seed: int, number: int) -> torch.Generator:
    """A generator that depends on both numbers, and not on the order in which sequences are decoded."""
    digest = sha256(f"{seed} {number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
