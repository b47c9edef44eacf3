"""Every adapter that comes with the library; importing a module registers it, and imports nothing of its host."""

from __future__ import annotations

from . import bert as bert
from . import distilbert as distilbert
from . import gpt2 as gpt2
from . import llama as llama
from . import t5 as t5
from . import timm_vit as timm_vit
from . import torch_attention as torch_attention
from . import vit as vit
from . import whisper as whisper


def load() -> None:
    """Make sure that all adapters are registered: importing this module has done it."""
