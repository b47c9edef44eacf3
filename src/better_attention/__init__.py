"""Standard, optimised, efficient, super and expressive attention for PyTorch (arXiv 2403.01643, 2407.18601).

>>> import torch, better_attention as ba
>>> layer = ba.MultiheadAttention(embed_dim=32, num_heads=4, mechanism="efficient", batch_first=True)
>>> x = torch.zeros(2, 7, 32)
>>> layer(x, x, x, need_weights=False)[0].shape
torch.Size([2, 7, 32])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import command as command  # first of all: it ends the process quietly if Ctrl-C comes while torch is imported
from .cache.kv_cache import KVCache
from .cache.model_cache import ModelCache
from .causality import assert_causal
from .conversion.convert import convert
from .conversion.recipe import load_converted, save_converted
from .conversion.report import ConversionReport
from .conversion.revert import revert
from .cost import Cost, cost
from .export.onnx import OnnxReport, export_onnx
from .export.quantise import Quantised, quantise
from .functional import Explanation, attention, explain
from .inspect import attention_maps
from .layer.multihead import MultiheadAttention
from .mechanism import MECHANISMS, Mechanism
from .parallel import parallel_plan

if TYPE_CHECKING:
    from better_attention.lab.runs.load import load_run as load_run
    from better_attention.lab.training.distillation import distil as distil

__version__ = "0.1.0"

__all__ = [
    "MECHANISMS",
    "ConversionReport",
    "Cost",
    "Explanation",
    "KVCache",
    "Mechanism",
    "ModelCache",
    "MultiheadAttention",
    "OnnxReport",
    "Quantised",
    "assert_causal",
    "attention",
    "attention_maps",
    "convert",
    "cost",
    "explain",
    "export_onnx",
    "load_converted",
    "parallel_plan",
    "quantise",
    "revert",
    "save_converted",
]  # and distil and load_run, which need the extras: a star import must not


def __getattr__(name: str) -> Any:
    # These need the extras; importing the package must not.
    if name == "load_run":
        from better_attention.lab.runs.load import load_run

        return load_run
    if name == "distil":
        from better_attention.lab.training.distillation import distil

        return distil
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
