"""The registry itself: every suite by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from better_attention.bench.registry import Suite
from better_attention.bench.suites import align, decode, kernel, layer, model

SUITES: Mapping[str, Suite] = MappingProxyType(
    {suite.name: suite for suite in (kernel.SUITE, layer.SUITE, decode.SUITE, align.SUITE, model.SUITE)}
)
