"""How fast a language model decodes, and what its cache takes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch

from better_attention.cache.model_cache import ModelCache
from better_attention.lab.models.language_model import LanguageModel

UNTIMED = 3  # steps that do what happens only once


@dataclass(frozen=True, slots=True)
class DecodingSpeed:
    """What one text costs.

    Args:
        tokens_per_second: one over the median time of a step with the cache; None where there was no step.
        cache_bytes_per_token: bytes of the cache that holds ``tokens`` tokens, over their number. Under a window the
            cache ends to grow, so that it falls with the length.
        tokens: how many the cache held in the end.
    """

    tokens_per_second: float | None
    cache_bytes_per_token: float
    tokens: int


@torch.inference_mode()
def decoding_speed(model: LanguageModel, prompt: Sequence[int], tokens: int) -> DecodingSpeed:
    """Continue ``prompt`` to ``tokens`` tokens, one text alone, the likeliest token each time.

    Args:
        model: in eval mode.
        prompt: at least one token.
        tokens: at least as many as the prompt has, and no more than the model can read.
    """
    cache = ModelCache(model, 1, max_len=tokens)
    device = model.tokens.weight.device
    logits_B1V = model(torch.tensor([list(prompt)], device=device), cache=cache, last=1)
    seconds = []
    while cache.length < tokens:
        began = time.perf_counter()
        logits_B1V = model(logits_B1V.argmax(dim=-1), cache=cache, last=1)
        logits_B1V[0, 0, 0].item()  # waits until the device has computed it
        seconds.append(time.perf_counter() - began)
    timed = seconds[UNTIMED:] or seconds
    return DecodingSpeed(1 / median(timed) if timed else None, cache.nbytes / tokens, tokens)
