"""A trained model as a file for ONNX Runtime, in float32 or int8, judged beside the model that it was made from."""

from __future__ import annotations

import inspect
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from better_attention.export.onnx import ATTENTION_OPSET, TOLERANCE, OnnxReport, export_onnx
from better_attention.export.quantise import AGREEMENT, Quantised, quantise
from better_attention.lab.trained.model import Trained
from better_attention.lab.trained.origin import RunOrigin
from better_attention.lab.trained.samples import Samples

EXAMPLES = 3
"""Samples that the model is exported with."""


@dataclass(frozen=True)
class Settings:
    """How to export.

    Args:
        int8: also quantise the file.
        opset: of ONNX.
        agreement: least cosine similarity of int8 outputs to those in float32.
        samples: held-out samples on which the agreement is measured.
        force: write a file that is off by more, too.
    """

    int8: bool = False
    opset: int = ATTENTION_OPSET
    agreement: float = AGREEMENT
    samples: int = 256
    force: bool = False


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Args:
        path: the file.
        parity: the file in float32 beside the model.
        int8: the int8 file beside that in float32; None where none was asked for.
        accuracy_before, accuracy_after: on the test split in per cent, of the model and of the file in ONNX Runtime;
            None without a test split.
    """

    path: Path
    parity: OnnxReport
    int8: Quantised | None
    accuracy_before: float | None
    accuracy_after: float | None

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "path": str(self.path),
            "bytes": self.path.stat().st_size,
            "parity": self.parity.as_dict() | {"path": str(self.path)},
            "int8": self.int8.as_dict() if self.int8 else None,
            "accuracy": {"before": self.accuracy_before, "after": self.accuracy_after},
        }


def export_trained(trained: Trained, path: Path, samples: Samples, settings: Settings) -> Exported:
    """Write the model of ``trained`` as an ONNX file.

    Raises:
        ValueError: the file differs too much from the model; nothing is written then.
        ImportError: a package of the extra ``onnx`` is missing.
        torch.onnx.OnnxExporterError: torch cannot export the model.
    """
    before = samples.accuracy(trained.model)
    if not settings.int8:
        parity, int8 = _float32(trained, path, samples, settings), None
    else:
        with tempfile.TemporaryDirectory() as folder:
            whole = Path(folder) / "float32.onnx"
            parity = _float32(trained, whole, samples, settings)
            batches = samples.held_out(settings.samples)
            limits: dict[str, Any] = {"agreement": settings.agreement, "refuse": not settings.force}
            int8 = quantise(whole, batches, path=path, **limits)
    return Exported(path, parity, int8, before, None if before is None else samples.accuracy(OnnxModel(path)))


def _float32(trained: Trained, path: Path, samples: Samples, settings: Settings) -> OnnxReport:
    (example,) = samples.held_out(EXAMPLES)
    limits: dict[str, Any] = {"opset": settings.opset, "tolerance": None if settings.force else TOLERANCE}
    return export_onnx(trained.model, path, example, dynamic=free_axes(trained), **limits)


def free_axes(trained: Trained) -> dict[str, dict[int, str]] | None:
    """Which axes of an exported model may have any size: of a run's the batch alone; None: ``export_onnx`` decides."""
    if not isinstance(trained.origin, RunOrigin):
        return None
    return {next(iter(inspect.signature(trained.model.forward).parameters)): {0: "batch"}}


class OnnxModel(nn.Module):
    """An ONNX file with one input and one output, called like the model that it was made from.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        import onnxruntime

        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.input = self.session.get_inputs()[0].name

    def forward(self, x: Tensor) -> Tensor:
        """The first output for inputs (B, ...)."""
        return torch.from_numpy(self.session.run(None, {self.input: x.numpy()})[0])


def is_onnx(content: bytes) -> bool:
    """Whether the bytes are those of a file that an export wrote."""
    return any(producer in content[:64] for producer in (b"pytorch", b"onnx.quantize"))
