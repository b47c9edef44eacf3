"""The registry itself: every suite by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from better_attention.benchmarks import align, decode, kernel, layer, model
from better_attention.benchmarks.registry import Suite

SUITES: Mapping[str, Suite] = MappingProxyType(
    {suite.name: suite for suite in (kernel.SUITE, layer.SUITE, decode.SUITE, align.SUITE, model.SUITE)}
)
