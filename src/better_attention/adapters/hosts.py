"""Every adapter that comes with the library; importing a module registers it, and imports nothing of its host."""

from __future__ import annotations

from . import bert as bert
from . import distilbert as distilbert
from . import timm_vit as timm_vit
from . import torch_attention as torch_attention
from . import vit as vit


def load() -> None:
    """Make sure that all adapters are registered: importing this module has done it."""
