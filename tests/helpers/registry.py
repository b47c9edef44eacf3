"""Rows of the package's registries, for the tests to run through: a new row is held to the oracle by itself."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch

import better_attention as ba
from better_attention.impl import IMPLEMENTATIONS
from better_attention.scores import SCORES

IMPLS = tuple(IMPLEMENTATIONS)
"""Every implementation by name."""
CPU_IMPLS = tuple(impl for impl in IMPLS if impl not in ("triton", "flex"))
"""Those that are not for GPUs alone, which refuse every call here (``tests/library/gpu``)."""
IMPLS_AND_AUTO = ("auto", *IMPLS)


@cache
def computing(score: str, dtype: torch.dtype = torch.float64, *, need_weights: bool = False) -> tuple[str, ...]:
    """ "auto", and every implementation that says of itself that it computes ``score`` in ``dtype``.

    What it says is tested: ``test_explain_and_attention_agree`` calls each one and expects a result or a refusal.
    """
    q = torch.ones(1, 1, 2, 2, dtype=dtype)
    able = [
        impl for impl in IMPLS if ba.explain(q, q, q, score=score, impl=impl, need_weights=need_weights).chosen == impl
    ]
    return ("auto", *able)


def scored_mechanisms() -> dict[str, ba.Mechanism]:
    """Every named mechanism with every score, by name, each once."""
    pairs = (replace(row, score=score) for row in ba.MECHANISMS.values() for score in SCORES)
    return {mechanism.name: mechanism for mechanism in pairs}
