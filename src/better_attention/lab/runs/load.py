"""Reading a finished run back: its model, ready to predict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from better_attention.errors import check_int
from better_attention.lab.runs.checkpoint import load_weights, tensor_count
from better_attention.lab.runs.folder import WEIGHTS, RunFolder
from better_attention.lab.runs.json_file import read_json
from better_attention.lab.runs.provenance import versions
from better_attention.lab.runs.record import FORMAT, RunConfig, RunRecord
from better_attention.lab.runs.snapshot import Snapshot
from better_attention.lab.tasks.base import SCALES, Prediction, Task
from better_attention.lab.tasks.catalogue import TASKS
from better_attention.lab.tasks.variant import Variant

DEPTHS = ("layers", "encoder_layers")
"""Settings that say how many layers a model has."""


@dataclass(frozen=True)
class Run:
    """A finished run.

    Args:
        path: its folder.
        model: the trained model, on the CPU, in eval mode.
        task: the task with the settings of the run.
        config: its ``config.json`` as plain values.
        result: its ``result.json`` as plain values.
        assets: its ``assets.json`` as plain values, a vocabulary for example.
        curve: its learning curve, one entry per epoch.
    """

    path: Path
    model: nn.Module
    task: Task
    config: Mapping[str, Any]
    result: Mapping[str, Any]
    assets: Mapping[str, Any]
    curve: Sequence[Mapping[str, float]]

    def predict(self, inputs: Any, *, batch_size: int = 256) -> list[Prediction]:
        """Classify new inputs: texts, or images of the data set's size with its range of pixel values.

        Raises:
            ValueError: inputs that the model cannot read; the message says what it reads.
            TypeError: inputs of another kind.
        """
        encoded = self.task.encode(inputs, self.assets)
        self.model.eval()
        with torch.inference_mode():
            batches = [self.task.predictions(self.model, batch, self.assets) for batch in encoded.split(batch_size)]
        return [prediction for batch in batches for prediction in batch]


def load_run(path: str | Path) -> Run:
    """The finished run in folder ``path``.

    The model is rebuilt from the run's configuration; names, shapes and dtypes of the stored weights are
    checked against it before they are read. Nothing is unpickled.

    Args:
        path: the folder of the run.

    Returns:
        The run, its model on the CPU in eval mode.

    Raises:
        FileNotFoundError: there is no finished run; the message says what there is.
        ValueError: a file is damaged, was changed, or was written by a version that this one cannot read.
    """
    folder = RunFolder(Path(path))
    _check_finished(folder)
    config, record = folder.config(), RunRecord.read(folder.path / "result.json")
    assets, curve = read_json(folder.path / "assets.json"), folder.curve()
    if not folder.has_weights:
        raise FileNotFoundError(
            f"{folder.path} has lost its weights ({WEIGHTS}): delete it, and run the command of its config.json again."
        )
    task, model = load_model(folder, config)
    folder.check_files(record)  # last: what the checks before can say of a changed file is more precise
    plain_config = {"format": config.format, "run": config.description, "environment": config.environment}
    return Run(folder.path, model, task, plain_config, record.values, assets, curve)


def load_model(folder: RunFolder, config: RunConfig) -> tuple[Task, nn.Module]:
    """The task of a finished run, and its trained model, on the CPU, in eval mode.

    Args:
        folder: of the run.
        config: its configuration.

    Raises:
        ValueError: the configuration describes no model that can be built, or not that of the weights.
    """
    path, weights = folder.path / "config.json", folder.path / WEIGHTS
    task, variant, heads = described(config, path)
    layers, tensors = sum(getattr(task, key, 0) for key in DEPTHS), tensor_count(weights)
    if layers > tensors:  # compared before the model is built, because each layer takes time to build
        raise ValueError(
            f"{path} describes {layers} layers, {WEIGHTS} holds {tensors} tensors: one of the two is damaged. "
            "Delete the run and train it again."
        )
    try:
        with torch.device("meta"):  # the weights are read from the file, so none need memory before
            model = task.build(variant, heads)
    except (RuntimeError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        why = str(error).rstrip(".") or type(error).__name__
        raise ValueError(f"{path} describes a model that cannot be built: {why}.") from None
    load_weights(model, weights)
    return task, model.eval()


def _check_finished(folder: RunFolder) -> None:
    """Refuse a folder that holds no finished run.

    Raises:
        FileNotFoundError: says what the folder holds instead.
    """
    path = folder.path
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: name the folder of a run; `better-attention runs` lists them.")
    if not (path / "config.json").is_file():
        names = list(Snapshot.read(path).runs)
        raise FileNotFoundError(
            f"{path} is not a run: it holds no config.json. "
            + (
                f"It holds {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}: name one of these runs."
                if names
                else "Runs are the folders "
                "that `better-attention compare` writes, such as runs/digits-small/super-h4-s0."
            )
        )
    if not (path / "result.json").is_file():
        raise FileNotFoundError(
            f"{path} is not finished: run the command of its config.json again, it continues there."
        )


def described(config: RunConfig, path: Path) -> tuple[Task, Variant, int]:
    """Task, variant and heads of a configuration, which may come from another version or may have been edited.

    Raises:
        ValueError: says what is unknown, and which version wrote the file.
    """
    scale = config.settings.get("scale")
    try:
        if config.format != FORMAT or config.task not in TASKS or scale not in SCALES:
            raise ValueError(f"format {config.format!r}, task {config.task!r}, scale {scale!r} are not all known")
        task = TASKS[config.task](scale).with_settings(config.settings)
        return task, Variant.of(config.mechanism), check_int(config.heads, "heads")
    except (AttributeError, KeyError, TypeError, ValueError, ArithmeticError) as error:
        why = str(error).rstrip(".")
        raise ValueError(
            f"{path} cannot be read by this version of better-attention ({versions()['better-attention']}): {why}. "
            f"It was written by {config.written_by}."
        ) from None
