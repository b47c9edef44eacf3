"""Fixtures of the data tests: a publisher's server on this machine, and a data home of the test's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from publisher import Publisher


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    """A server that answers for every publisher's host."""
    with Publisher() as server:
        yield server


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data home of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "better-attention" / "data"
