"""Int8 for torch (torchao) and ONNX Runtime, with a report of how far the results still agree."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from better_attention.errors import check_bool, check_float, describe
from better_attention.evaluation import evaluating

from .compare import cosine, relative_error, same_choice, tensors_of
from .inputs import Inputs, by_name
from .surroundings import quietly, written

AGREEMENT = 0.99
"""Least cosine similarity of outputs, in the mean over positions, that is accepted without being asked for."""
TORCHAO = "int8 in torch needs torchao: pip install 'better-attention[edge]'."
ONNX = "int8 for ONNX Runtime needs onnx and onnxruntime: pip install 'better-attention[onnx]'."


@dataclass(frozen=True, slots=True)
class Quantised:
    """A quantised model, and how far it agrees with the one that it was made from.

    Args:
        model: the module, or the path of the ONNX file.
        agreement: mean cosine similarity of the outputs, over all positions of all batches.
        same_choice: share of positions whose largest output is the same: equal predictions of a classifier.
        error: largest difference, over the largest output or 1.
        quantised: number of linear maps that compute in int8.
        bytes_before: size of the original's weights, or of its file.
        bytes_after: size of the int8 weights, or of their file.
    """

    model: nn.Module | Path
    agreement: float
    same_choice: float
    error: float
    quantised: int
    bytes_before: int
    bytes_after: int

    def as_dict(self) -> dict[str, Any]:
        """The numbers as plain values; the model by its path or class."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return values | {"model": str(self.model) if isinstance(self.model, Path) else type(self.model).__name__}

    def to_json(self) -> str:
        """The same as a JSON text."""
        return json.dumps(self.as_dict(), indent=2)

    def __str__(self) -> str:
        return (
            f"int8: {self.quantised} linear maps, {self.bytes_before:,} -> {self.bytes_after:,} bytes; "
            f"cosine similarity {self.agreement:.5f}, same largest output {100 * self.same_choice:.1f} %, "
            f"largest error {self.error:.1e}"
        )


def quantise(
    model: nn.Module | str | Path,
    batches: Iterable[Inputs],
    *,
    path: str | Path | None = None,
    agreement: float = AGREEMENT,
    refuse: bool = True,
) -> Quantised:
    """Int8 weights and, computed for each input, int8 activations of every linear map; W_A keeps its precision.

    Args:
        model: a module, of which a quantised copy is made with torchao; or the path of an ONNX file, for which ONNX
            Runtime writes another one.
        batches: what the model is called with, to measure agreement: each a tensor, a tuple, or a dictionary by name.
        path: the ONNX file to write; required for a path, and refused for a module.
        agreement: least mean cosine similarity of the outputs that is accepted, 0 to 1.
        refuse: raise below that; False returns what came out, whose report tells.

    Raises:
        ValueError: the agreement is below ``agreement``; no batches; a path where none belongs.
        TypeError: no module and no path.
        ImportError: torchao, or onnx and onnxruntime, are missing.
        FileNotFoundError: no such ONNX file.
    """
    check_float(agreement, "agreement", low=0.0, high=1.0)
    check_bool(refuse, "refuse")
    given = list(batches)
    if not given:
        raise ValueError("batches must hold at least one input, on which agreement is measured; received none.")
    if isinstance(model, nn.Module):
        if path is not None:
            raise ValueError(
                f"path={str(path)!r} belongs to ONNX files; a module's int8 copy is returned, not written."
            )
        return _accepted(_torch(model, given), agreement, refuse)
    if not isinstance(model, str | Path):
        raise TypeError(f"model must be an nn.Module or the path of an ONNX file, received {describe(model)}.")
    if path is None:
        raise ValueError("path must name the ONNX file to write, received None.")
    with written(Path(path)) as part:
        return _accepted(_onnx(Path(model), given, part, Path(path)), agreement, refuse)


def _accepted(result: Quantised, agreement: float, refuse: bool) -> Quantised:
    # `not >=` rather than `<`, so that NaN is refused.
    if refuse and not result.agreement >= agreement:
        raise ValueError(
            f"the int8 model agrees too little with the original: {result}. Expected a cosine similarity of at least "
            f"{agreement:g}. Pass a lower agreement=, or refuse=False to have it all the same."
        )
    return result


# --- torch ------------------------------------------------------------------------------------------------------------


def _torch(model: nn.Module, batches: list[Inputs]) -> Quantised:
    # A copy, because quantize_() replaces the weights in place.
    small = copy.deepcopy(model).eval()
    number = quantise_linears(small)
    named = [by_name(model, batch) for batch in batches]
    with evaluating(model):
        pairs = [(tensors_of(small(**batch)), tensors_of(model(**batch))) for batch in named]
    return _result(small, pairs, number, weight_bytes(model), weight_bytes(small))


def quantise_linears(model: nn.Module) -> int:
    """Turn every ``nn.Linear`` of ``model`` into torchao's dynamic int8, in place; returns how many.

    Raises:
        ImportError: torchao is missing.
        RuntimeError: torchao cannot do it with this torch, or left some maps as they were.
    """
    with quietly():  # what torchao misses at import is for GPUs
        try:
            from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
        except ImportError as error:
            raise ImportError(f"{TORCHAO} ({error})") from error
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    try:
        quantize_(model, Int8DynamicActivationInt8WeightConfig())
    except (RuntimeError, NotImplementedError, AttributeError, TypeError) as error:
        raise RuntimeError(f"torchao cannot quantise with torch {torch.__version__}: {error}") from None
    # torchao puts a tensor of a class of its own into each map that it quantises.
    done = sum(type(linear.weight) not in (Tensor, nn.Parameter) for linear in linears)
    if done < len(linears):
        raise RuntimeError(f"torchao left {len(linears) - done} of {len(linears)} linear maps in floating point")
    return done


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, of quantised ones those of their parts."""

    def size(x: Tensor) -> int:
        parts: list[Tensor] = []
        # A quantised weight reports the shape and dtype of the original; its real parts are what takes memory.
        if type(x) not in (Tensor, nn.Parameter) and hasattr(x, "__tensor_flatten__"):
            names, _ = x.__tensor_flatten__()
            parts = [part for name in names if isinstance(part := getattr(x, name), Tensor)]
        return sum(map(size, parts)) if parts else x.numel() * x.element_size()

    return sum(size(x) for x in (*model.parameters(), *model.buffers()))


# --- ONNX Runtime -----------------------------------------------------------------------------------------------------


def _onnx(source: Path, batches: list[Inputs], part: Path, target: Path) -> Quantised:
    try:
        import onnx
        import onnxruntime
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError as error:
        raise ImportError(ONNX) from error
    if not source.is_file():
        raise FileNotFoundError(f"there is no ONNX file {source}.")
    with quietly():
        quantize_dynamic(
            source,
            part,
            # Named one by one: an operator Attention would become one of ONNX Runtime's own that does not fit.
            op_types_to_quantize=["MatMul", "Gemm", "Gather"],
            weight_type=QuantType.QInt8,
            # x86 processors without VNNI add two products of 8 bits in 16 bits and saturate there. Weights of 7 bits
            # never reach that limit, so that a file gives the same numbers on every device; a scale for each output
            # instead of one for the whole matrix makes up for the lost bit.
            reduce_range=True,
            per_channel=True,
        )
    nodes = onnx.load(part, load_external_data=False).graph.node
    # Counted in the file: products of two activations, such as queries with keys, are left as they are.
    number = sum(node.op_type == "MatMulInteger" for node in nodes)
    sessions = [onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]) for file in (part, source)]
    pairs = []
    for batch in batches:
        ours, theirs = ([torch.from_numpy(x) for x in s.run(None, _feed(s, batch))] for s in sessions)
        pairs.append((ours, theirs))
    return _result(target, pairs, number, source.stat().st_size, part.stat().st_size)


def _feed(session: Any, batch: Inputs) -> dict[str, Any]:
    """The inputs by the names in the file."""
    names = [one.name for one in session.get_inputs()]
    if isinstance(batch, Mapping):
        named = {name: x for name, x in batch.items() if name in names}
    else:
        given = [batch] if isinstance(batch, Tensor) else list(batch)
        if len(given) != len(names):
            raise TypeError(f"the ONNX file takes {len(names)} inputs ({', '.join(names)}), received {len(given)}.")
        named = dict(zip(names, given, strict=True))
    if missing := [name for name in names if name not in named]:
        raise TypeError(f"the ONNX file takes {', '.join(names)}; {', '.join(missing)} missing.")
    return {name: x.detach().cpu().numpy() for name, x in named.items()}


def _result(
    model: nn.Module | Path, pairs: list[tuple[list[Tensor], list[Tensor]]], number: int, before: int, after: int
) -> Quantised:
    count = len(pairs)
    return Quantised(
        model,
        sum(cosine(*pair) for pair in pairs) / count,
        sum(same_choice(*pair) for pair in pairs) / count,
        max(relative_error(*pair) for pair in pairs),
        number,
        before,
        after,
    )
