"""Every adapter that comes with the library; importing a module registers it, and imports nothing of its host."""

from __future__ import annotations

from . import torch_attention as torch_attention


def load() -> None:
    """Make sure that all adapters are registered: importing this module has done it."""
