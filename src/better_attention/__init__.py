"""Standard, optimised, efficient, super and expressive attention for PyTorch (arXiv 2403.01643, 2407.18601).

>>> import torch, better_attention as ba
>>> layer = ba.MultiheadAttention(embed_dim=32, num_heads=4, mechanism="efficient", batch_first=True)
>>> x = torch.zeros(2, 7, 32)
>>> layer(x, x, x, need_weights=False)[0].shape
torch.Size([2, 7, 32])
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import command as command  # first of all: it ends the process quietly if Ctrl-C comes while torch is imported
from .imported import when_imported, when_settled

if TYPE_CHECKING:
    from better_attention.lab.runs.load import load_run as load_run
    from better_attention.lab.training.distillation import distil as distil

    from .cache.kv_cache import KVCache
    from .cache.model_cache import ModelCache
    from .causality import assert_causal
    from .conversion.convert import convert
    from .conversion.recipe import load_converted, save_converted
    from .conversion.report import ConversionReport
    from .conversion.revert import revert
    from .costs import Cost, cost
    from .export.onnx import OnnxReport, export_onnx
    from .export.quantise import Quantised, quantise
    from .functional import Explanation, attention, explain
    from .inspect import attention_maps
    from .layer.multihead import MultiheadAttention
    from .mechanism import MECHANISMS, Mechanism
    from .parallel import parallel_plan, sequence_attention

__version__ = "0.2.0"

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
    "sequence_attention",
]  # and distil and load_run, which need the extras: a star import must not


_HOMES = {
    "MECHANISMS": "mechanism",
    "ConversionReport": "conversion.report",
    "Cost": "costs",
    "Explanation": "functional",
    "KVCache": "cache.kv_cache",
    "Mechanism": "mechanism",
    "ModelCache": "cache.model_cache",
    "MultiheadAttention": "layer.multihead",
    "OnnxReport": "export.onnx",
    "Quantised": "export.quantise",
    "assert_causal": "causality",
    "attention": "functional",
    "attention_maps": "inspect",
    "convert": "conversion.convert",
    "cost": "costs",
    "distil": "lab.training.distillation",
    "explain": "functional",
    "export_onnx": "export.onnx",
    "load_converted": "conversion.recipe",
    "load_run": "lab.runs.load",
    "parallel_plan": "parallel",
    "quantise": "export.quantise",
    "revert": "conversion.revert",
    "save_converted": "conversion.recipe",
    "sequence_attention": "parallel",
}
"""Where each public name is defined: its module is imported when the name is first used."""


def __getattr__(name: str) -> Any:
    # Importing the package imports neither torch (better_attention.keras runs without it) nor the extras.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        globals()[name] = value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not _HOMES[name].startswith("lab.") or package == __name__:
            raise
        text = f"{__name__}.{name} needs {package}, which is missing: pip install 'better-attention[experiments]'."
        raise ModuleNotFoundError(text, name=error.name) from error
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register_operators() -> None:
    for name in ("impl", "layer.alignment"):
        import_module(f"{__name__}.{name}")


# Saved programs name our operators: torch has to know them even where nobody has used a name of this package.
when_imported("torch", lambda: when_settled(__name__, _register_operators))
