"""A model of a hundred million parameters: converted in less than a minute, in less memory than a second copy of it."""

from __future__ import annotations

import time

import pytest
from torch import nn

import better_attention as ba
from helpers.memory import profiled_memory

pytestmark = pytest.mark.slow
D, LAYERS, LENGTH = 768, 14, 512


@pytest.mark.parametrize(
    ("mechanism", "heads"), [("standard", 12), ("efficient", 12), ("super", 12), ("efficient", 1), ("super", 1)]
)
def test_time_and_memory(mechanism: str, heads: int) -> None:
    layer = nn.TransformerEncoderLayer(D, heads, 4 * D, batch_first=True)
    model = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
    numbers = sum(p.numel() for p in model.parameters())
    assert 95e6 < numbers < 105e6
    aligned = ba.Mechanism.of(mechanism).aligned
    began = time.perf_counter()
    with profiled_memory() as memory:
        ba.convert(model, mechanism, exact=heads == 1, max_len=LENGTH if aligned else None)
    assert time.perf_counter() - began < 60
    assert memory["peak"] < 4 * numbers  # with the model itself, less than twice its size
