"""Keras on the backend that KERAS_BACKEND names, JAX by default (tests/conftest.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("keras", reason="Keras or its backend is not installed: pip install 'better-attention[keras]'")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keras 3.15 converts its variables in a way that NumPy 2 deprecates."""
    ignored = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(ignored)


@pytest.fixture(autouse=True)
def keras_seed(seed: int) -> None:
    """Keras draws from the test's own seed as well."""
    import keras

    keras.utils.set_random_seed(seed % 2**31)
