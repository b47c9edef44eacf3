"""Trained models and ONNX files by path, each ready to be called the way a device would."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from better_attention.errors import describe
from better_attention.export.onnx import export_onnx
from better_attention.export.quantise import quantise
from better_attention.lab.runs.json_file import read_json
from better_attention.lab.trained.export import free_axes
from better_attention.lab.trained.host import is_host, longest
from better_attention.lab.trained.model import Trained, is_converted, open_trained
from better_attention.lab.trained.origin import HostOrigin, Origin, RunOrigin
from better_attention.mechanism import Mechanism

RUNTIMES = ("eager", "compiled", "onnx", "onnx-int8")
"""PyTorch alone; PyTorch with the compiled kernels; ONNX Runtime in float32 and with int8 linear maps."""
LENGTH = 64
"""Tokens of a text, where neither the task nor the file fixes them."""

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Contender:
    """One model in one runtime.

    Args:
        name: of the model.
        runtime: of :data:`RUNTIMES`.
        path: the folder of the model, or the ONNX file.
        batch_size: samples of a call.
        threads: of the runtime.
        length: tokens of a text, where an ONNX file leaves them free.
        reason: why it cannot be timed.
    """

    name: str
    runtime: str
    path: Path
    batch_size: int
    threads: int
    length: int = LENGTH
    reason: str = ""

    @property
    def file_bytes(self) -> int:
        """Size of the weights, or of the ONNX file."""
        if self.path.is_file():
            return self.path.stat().st_size
        return sum(file.stat().st_size for file in self.path.glob("*.safetensors"))

    def load(self) -> Call:
        """Read the model; what is returned computes one batch.

        Raises:
            ValueError, OSError, ImportError: it cannot be read here.
        """
        if self.runtime.startswith("onnx"):
            return _onnx_call(self.path, (self.batch_size, self.length), self.threads)
        trained = open_trained(self.path)
        _prepare(trained.model, self.runtime)
        return _torch_call(trained.model, example(trained.origin, self.batch_size))


def models_in(paths: Sequence[Path]) -> list[Path]:
    """The models that ``paths`` name: themselves, or those in a folder of models, each once.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: a file or folder without a model.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(
                f"{path} does not exist: name runs, converted models, .onnx files or folders of them."
            )
        inside = [path] if _is_model(path) else sorted(filter(_is_model, path.iterdir() if path.is_dir() else ()))
        if not inside:
            raise ValueError(
                f"{path} holds no finished run, no converted model and no .onnx file: name one, or a folder of them."
            )
        found |= dict.fromkeys(inside)
    return list(found)


def _is_model(path: Path) -> bool:
    if path.is_file():
        return path.suffix == ".onnx"
    return path.is_dir() and (is_converted(path) or (path / "result.json").is_file() or is_host(path))


@contextmanager
def contenders(
    paths: Sequence[Path], runtimes: Sequence[str], batch_size: int, say: Callable[[str], None] = lambda line: None
) -> Iterator[list[Contender]]:
    """Every model in every runtime; files that had to be exported for it exist while the block runs."""
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        made: list[Contender] = []
        for number, path in enumerate(paths):
            say(f"preparing {path}")
            if path.is_file():
                made.append(Contender(str(path), _kind(path), path, batch_size, threads))
                continue
            # By number, because models in different folders may have the same name.
            place = Path(folder) / str(number)
            place.mkdir()
            for runtime in runtimes:
                made.append(_contender(path, runtime, place, batch_size, threads))
        yield made


def _kind(file: Path) -> str:
    # The quantiser of ONNX Runtime names itself as the producer, which stands at the head of the file.
    return "onnx-int8" if b"onnx.quantize" in file.read_bytes()[:64] else "onnx"


def _contender(path: Path, runtime: str, place: Path, batch_size: int, threads: int) -> Contender:
    """A model in a runtime; for ONNX Runtime it is exported to ``place``."""
    contender = Contender(str(path), runtime, path, batch_size, threads)
    try:
        trained = open_trained(path)
        if runtime.startswith("onnx"):
            return _exported(contender, trained, place)
        _prepare(trained.model, runtime)
    except (ValueError, ImportError, torch.onnx.OnnxExporterError) as error:
        # An exporter's message may fill pages, and this becomes a cell of a table.
        return replace(contender, reason=" ".join(str(error).split())[:300])
    return contender


def _exported(contender: Contender, trained: Trained, place: Path) -> Contender:
    """The contender with an ONNX file in ``place``, which is written where it is not there."""
    file = place / "float32.onnx"
    # Of several samples: torch's exporter takes a size of 1 for one that never changes.
    inputs = example(trained.origin, 3)
    length = inputs["input_ids"].shape[1] if isinstance(inputs, dict) else LENGTH
    # The int8 file is made of the float32 one, which is exported once for both.
    if not file.exists():
        export_onnx(trained.model, file, inputs, dynamic=free_axes(trained))
    if contender.runtime == "onnx-int8":
        quantise(file, [inputs], path=place / "int8.onnx")
        file = place / "int8.onnx"
    return replace(contender, path=file, length=length)


def example(origin: Origin, batch_size: int) -> Tensor | dict[str, Tensor]:
    """Random inputs of a model, without padding.

    Raises:
        ValueError: a model of transformers that reads no tokens.
    """
    if isinstance(origin, RunOrigin):
        return origin.task.random_samples(batch_size).inputs
    if not isinstance(origin, HostOrigin):
        raise TypeError(f"no inputs are known for {describe(origin)}.")
    words = read_json(origin.folder / "config.json").get("vocab_size")
    if not isinstance(words, int):
        raise ValueError(f"{origin.folder} describes a model that reads no tokens: only texts are timed here.")
    length = min(LENGTH, longest(origin.folder) or LENGTH)
    # From 1 on: 0 stands for padding in most vocabularies, of which these inputs have none.
    tokens = torch.randint(1, words, (batch_size, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def _prepare(model: nn.Module, runtime: str) -> None:
    """Make a model compute by PyTorch alone for ``"eager"``, and make sure that there is a difference to it.

    Raises:
        ValueError: the runtime would say nothing about this model.
    """
    if runtime == "eager":
        switch_kernels_off(model)
    elif not _layers(model):
        raise ValueError("the model has no attention layer of better-attention, so that eager is all there is")


def _layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(getattr(module, "mechanism", None), Mechanism)]


def switch_kernels_off(model: nn.Module) -> None:
    """Let every attention layer of ours compute by PyTorch alone, in place.

    Raises:
        ValueError: a layer takes its kernels as they come, as converted ones of transformers do.
    """
    for layer in _layers(model):
        if not hasattr(layer, "impl"):
            raise ValueError(
                "the compiled kernels cannot be switched off in a converted model of transformers alone: time it in a "
                "process of its own, with BETTER_ATTENTION_NATIVE=off"
            )
        # The best that PyTorch has without us: its fused kernel for softmax, plain operations for other scores.
        layer.impl = "sdpa" if layer.mechanism.score == "softmax" else "reference"
        if layer.align is not None:
            layer.align.compiled = False


def _torch_call(model: nn.Module, inputs: Tensor | dict[str, Tensor]) -> Call:
    def call() -> object:
        with torch.inference_mode():
            return model(**inputs) if isinstance(inputs, dict) else model(inputs)

    return call


def _onnx_call(file: Path, sizes: tuple[int, int], threads: int) -> Call:
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError("timing .onnx files needs onnxruntime: pip install 'better-attention[onnx]'.") from error
    options = onnxruntime.SessionOptions()
    # ONNX Runtime would take every core, however many torch may use.
    options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no class in common
        raise ValueError(f"{file} cannot be read by ONNX Runtime {onnxruntime.__version__}: {error}") from error
    feed = {one.name: _input(one, sizes) for one in session.get_inputs()}
    return lambda: session.run(None, feed)


def _input(described: Any, sizes: tuple[int, int]) -> Any:
    """One input of an ONNX file: free sizes are the batch first, then the length; floats random, everything else 1."""
    import numpy as np

    free = iter(sizes)
    shape = [size if isinstance(size, int) else next(free, 1) for size in described.shape]
    kind = described.type.removeprefix("tensor(").removesuffix(")")
    if kind in ("float", "double", "float16"):
        types = {"float": np.float32, "double": np.float64, "float16": np.float16}
        return np.random.default_rng(0).standard_normal(shape).astype(types[kind])
    return np.ones(shape, dtype=kind)
