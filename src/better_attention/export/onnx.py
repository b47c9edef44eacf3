"""Export to ONNX in standard operators, compared with the model in ONNX Runtime before anybody relies on it."""

from __future__ import annotations

import contextlib
import io
import json
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from better_attention.call.torch_state import onnx_attention_operator
from better_attention.errors import check_int, describe
from better_attention.evaluation import evaluating
from better_attention.text import plural

from .compare import relative_error, tensors_of
from .inputs import Dynamic, Inputs, by_name, check_dynamic, guess_dynamic, variations
from .surroundings import quietly, written

ATTENTION_OPSET = 23
"""The first ONNX opset with the operator ``Attention``."""
TOLERANCE = 1e-5
EXTRA = "exporting to ONNX needs onnx, onnxscript and onnxruntime: pip install 'better-attention[onnx]'."


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison of the model with its export.

    Args:
        inputs: what is particular about them, such as ``"batch 1"``.
        error: largest difference over the largest output, or over 1 if that is larger; None where the model itself does
            not take such inputs.
        note: why it does not.
    """

    inputs: str
    error: float | None
    note: str = ""


@dataclass(frozen=True, slots=True)
class OnnxReport:
    """What :func:`better_attention.export_onnx` wrote.

    Args:
        path: the file.
        opset: version of the standard operators.
        file_bytes: its size.
        operators: name of each operator -> how often it occurs.
        dynamic: name of each input -> axis -> name of its size.
        checks: comparisons with the model in ONNX Runtime.
    """

    path: Path
    opset: int
    file_bytes: int
    operators: dict[str, int]
    dynamic: dict[str, dict[int, str]]
    checks: list[Check] = field(default_factory=list)

    @property
    def worst(self) -> float:
        """The largest error of all checks."""
        return max((check.error for check in self.checks if check.error is not None), default=0.0)

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {**asdict(self), "path": str(self.path), "worst": self.worst}

    def to_json(self) -> str:
        """The same as a JSON text."""
        return json.dumps(self.as_dict(), indent=2)

    def __str__(self) -> str:
        lines = [
            f"{self.path}: opset {self.opset}, {self.file_bytes:,} bytes, "
            f"{plural(sum(self.operators.values()), 'operator')} ({self.operators.get('Attention', 0)} Attention)",
            f"largest error {self.worst:.1e} in {plural(len(self.checks), 'comparison')} with ONNX Runtime:",
        ]
        lines += [
            f"  {check.inputs}: " + (f"{check.error:.1e}" if check.error is not None else f"not compared, {check.note}")
            for check in self.checks
        ]
        return "\n".join(lines)


def export_onnx(
    model: nn.Module,
    path: str | Path,
    inputs: Inputs,
    *,
    dynamic: Dynamic | None = None,
    opset: int = ATTENTION_OPSET,
    tolerance: float | None = TOLERANCE,
    output_names: Sequence[str] | None = None,
) -> OnnxReport:
    """Write ``model`` as an ONNX file in standard operators, and compare it with the model in ONNX Runtime.

    From opset 23 on, softmax attention becomes the operator ``Attention``, which ONNX Runtime 1.32 computes 1.3 to 2.7
    times as fast as its formula (64 to 2,048 tokens, one core). The expressive score, and every score below opset 23,
    becomes its formula. The comparison runs on the given inputs, on other batch sizes and lengths, and, where an input
    is a mask (bool, or integers 0 and 1), with one sample all hidden and one all shown.

    Args:
        model: exported in evaluation mode; its mode and parameters are left as they were.
        path: the file to write, replaced only by a file that passed.
        inputs: an example: a tensor, a tuple of tensors, or a dictionary by the names of ``model.forward``.
        dynamic: which axes may have any size. None: axis 0 of every input is the batch, and axis 1 is the length where
            it has the size that it has in the first sequence, (B, L, D), or (B, L) of integers or bool. ``{}``: fixed.
        opset: version of the standard operators, at least 18.
        tolerance: largest error that is accepted, relative to the largest output or 1; None accepts any, and the report
            tells.
        output_names: names of the outputs in the file.

    Raises:
        ValueError: an error above the tolerance; operators that are not standard; axes that do not fit; an opset that
            onnx or ONNX Runtime does not know.
        TypeError: inputs that ``model.forward`` does not take.
        ImportError: a package of the extra ``onnx`` is missing.
        torch.onnx.OnnxExporterError: torch cannot export the model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, received {describe(model)}.")
    check_int(opset, "opset", at_least=18)
    _require_packages()
    _check_known(opset)
    named = by_name(model, inputs)
    axes = guess_dynamic(named) if dynamic is None else dynamic
    check_dynamic(named, axes)
    target = Path(path)
    with evaluating(model):
        proto = _exported(model, named, axes, opset, output_names)
        operators = _operators(proto)
        data = proto.SerializeToString()
        # From memory: nothing is on the disk before it has passed.
        checks = list(_checks(model, _session(data, opset), named, axes))
    report = OnnxReport(target, opset, len(data), operators, {n: dict(a) for n, a in axes.items()}, checks)
    # `not <=` rather than `>`, so that NaN counts as too large.
    if tolerance is not None and not report.worst <= tolerance:
        bad = ", ".join(f"{c.inputs} {c.error:.1e}" for c in checks if c.error is not None and not c.error <= tolerance)
        raise ValueError(
            f"the exported model differs from the model by more than {tolerance:.0e} of its largest output: {bad}. "
            "Nothing was written. Pass tolerance=None to write it all the same."
        )
    with written(target) as part:
        part.write_bytes(data)
    return report


def _require_packages() -> None:
    """Refuse before anything is exported.

    Raises:
        ImportError: a package of the extra is missing.
    """
    try:
        import onnx as onnx
        import onnxruntime as onnxruntime
        import onnxscript as onnxscript
    except ImportError as error:
        raise ImportError(EXTRA) from error


def _check_known(opset: int) -> None:
    """Refuse before anything is exported, which may take a minute.

    Raises:
        ValueError: an opset later than the newest that the installed onnx describes.
    """
    import onnx

    if opset > (newest := onnx.defs.onnx_opset_version()):
        raise ValueError(
            f"opset must be <= {newest}, the newest that onnx {onnx.__version__} describes, received {opset}. "
            f"Choose another opset= than {opset}, {ATTENTION_OPSET} for example, or newer versions of the packages."
        )


def _exported(
    model: nn.Module, named: dict[str, Tensor], axes: Dynamic, opset: int, output_names: Sequence[str] | None
) -> Any:
    """The exported model as a protocol buffer."""
    shapes = {name: dict(axes[name]) if axes.get(name) else None for name in named}
    with _silent_exporter(), onnx_attention_operator(opset >= ATTENTION_OPSET), _axes_explained():
        program = torch.onnx.export(
            model,
            # By name only, because the dynamic axes are given by name.
            (),
            kwargs=dict(named),
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=shapes if any(shapes.values()) else None,
            input_names=list(named),
            output_names=list(output_names) if output_names else None,
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned nothing: this is a bug of better-attention.")
    return program.model_proto


@contextlib.contextmanager
def _axes_explained() -> Iterator[None]:
    """A short message where the model fixes the size of an axis that was to be dynamic."""
    try:
        yield
    except torch.onnx.OnnxExporterError as error:
        fixed = re.findall(r"static shape of (\d+) for dimension inputs\['(\w+)'\]\.shape\[(\d+)\]", str(error))
        if not fixed:
            raise
        where = ", ".join(f"axis {axis} of {name} to {size}" for size, name, axis in fixed)
        raise ValueError(
            f"the model fixes {where}, so that the axis cannot have any size in the file. Say with dynamic= which axes "
            "may, {'x': {0: 'batch'}} for example, or pass {} for fixed sizes."
        ) from error


@contextlib.contextmanager
def _silent_exporter() -> Iterator[None]:
    """Without the exporter's notes on its own inside: what counts is checked afterwards."""
    with quietly(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _operators(proto: Any) -> dict[str, int]:
    """How often each operator occurs.

    Raises:
        ValueError: one that is not in the standard.
    """
    # The exporter may leave functions inside the model; what they consist of counts as well.
    nodes = [node for graph in (proto.graph, *proto.functions) for node in graph.node]
    # A call of such a function has a domain, but needs nothing of the runtime that is not standard.
    local = {(function.domain, function.name) for function in proto.functions}
    other = sorted({f"{n.domain}.{n.op_type}" for n in nodes if n.domain and (n.domain, n.op_type) not in local})
    if other:
        raise ValueError(
            f"the exported model would need operators that are not standard: {', '.join(other)}. Build its layers with "
            "impl='auto', which exports the formula."
        )
    return dict(Counter(node.op_type for node in nodes).most_common())


def _session(data: bytes, opset: int) -> Any:
    """The exported model in ONNX Runtime.

    Raises:
        ValueError: ONNX Runtime does not know the opset, or an operator in it.
    """
    import onnxruntime

    try:
        return onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no class in common
        raise ValueError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load the exported model: {error}. Nothing was written. "
            f"Choose another opset= than {opset}, {ATTENTION_OPSET} for example, or a newer onnxruntime."
        ) from error


def _checks(model: nn.Module, session: Any, named: dict[str, Tensor], axes: Dynamic) -> Iterator[Check]:
    kept = {one.name for one in session.get_inputs()}  # an input that nothing depends on is left out
    for variation in variations(named, axes):
        try:
            expected = tensors_of(model(**variation.inputs))
        # A model may refuse a length or a batch size by right: W_A has a largest one.
        except (ValueError, IndexError, RuntimeError) as error:
            yield Check(variation.name, None, f"the model refuses it: {' '.join(str(error).split())[:200]}")
            continue
        feed = {name: x.detach().cpu().numpy() for name, x in variation.inputs.items() if name in kept}
        found = [torch.from_numpy(x) for x in session.run(None, feed)]
        yield Check(variation.name, relative_error(found, [x.cpu() for x in expected]))
