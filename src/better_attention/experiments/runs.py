"""Run folders: one trained model each, with everything that is needed to trust it, repeat it and use it.

super-h4-s0/
    config.json          what was trained and how (compared when a run is continued), and where
    assets.json          names of the classes, vocabulary
    metrics.jsonl        one line an epoch
    model.safetensors    the weights with the best validation loss
    result.json          the record of the finished run; its presence means finished
    checkpoint-*         only while the run is under way
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from better_attention.errors import whole_number
from better_attention.experiments.checkpoint import check_digest, load_weights
from better_attention.experiments.files import write_atomic
from better_attention.experiments.origin import environment
from better_attention.experiments.task import SCALES, Prediction, Task
from better_attention.experiments.tasks import TASKS
from better_attention.experiments.variant import Variant

FORMAT = 1
LARGEST = 2**20  # bound on every size of a model: a damaged config must not ask for all memory
COUNTS = frozenset(
    ["train_samples", "test_samples", "bleu_samples", "data_seed", "seeds", "epochs", "patience", "batch_size"]
)
"""Settings that size no model: they may be as large as the data."""


def run_name(variant: Variant, heads: int, seed: int) -> str:
    """The name of a run's folder; a ``+`` in the mechanism's name becomes a dot.

    >>> run_name(Variant.of("super+expressive"), 4, 0)
    'super.expressive-h4-s0'

    Raises:
        ValueError: a mechanism without a name, or a name that no folder should have.
    """
    Variant.of(variant.name)  # a custom row has a description only, which nothing reads back
    name = f"{variant.name.replace('+', '.')}-h{heads}-s{seed}"
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name):
        raise ValueError(f"run name {name!r}: at most 64 letters, digits, dots, dashes and underscores are allowed.")
    return name


@dataclass(frozen=True)
class Run:
    """A finished run.

    Args:
        path: its folder.
        model: the trained model, on the CPU, in eval mode.
        task: the task with the settings of the run.
        config, result, assets, curve: its files as plain values; ``curve`` has one entry an epoch.
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
            ValueError, TypeError: inputs that the model cannot read; the message says what it reads.
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

    Raises:
        FileNotFoundError: there is no finished run; the message says what there is.
        ValueError: a damaged file, one that was changed, or one of another version.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        if not folder.exists():
            raise FileNotFoundError(
                f"{folder} does not exist: name the folder of a run; `better-attention runs` lists them."
            )
        inside = [run["name"] for run in list_runs(folder)] if folder.is_dir() else []
        raise FileNotFoundError(
            f"{folder} is not a run: it holds no config.json. "
            + (
                f"It holds {', '.join(inside[:5])}{', ...' if len(inside) > 5 else ''}: name one of these runs."
                if inside
                else "Runs are the folders "
                "that `better-attention compare` writes, such as runs/digits-small/super-h4-s0."
            )
        )
    if not (folder / "result.json").is_file():
        raise FileNotFoundError(
            f"{folder} is not finished: run the command of its config.json again, it continues there."
        )
    config, assets, result = (read_json(folder / f"{name}.json") for name in ("config", "assets", "result"))
    task, variant, heads = _what(config, folder)
    with torch.device("meta"):
        model = task.build(variant, heads)
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise FileNotFoundError(
            f"{folder} has lost its weights ({weights.name}): delete it, and run the command of its config.json again."
        )
    load_weights(model, weights)
    check_digest(weights, result.get("model_sha256"))
    return Run(folder, model.eval(), task, config, result, assets, read_curve(folder))


def _what(config: Mapping[str, Any], folder: Path) -> tuple[Task, Variant, int]:
    """Task, variant and heads of a configuration that may have been damaged or edited."""
    try:
        run = config["run"]
        name, settings = run["task"], run["settings"]
        if config["format"] != FORMAT or name not in TASKS or settings["scale"] not in SCALES:
            raise ValueError(
                f"format {config['format']!r}, task {name!r}, scale {settings['scale']!r} are not all known"
            )
        check_sizes(settings)
        task = TASKS[name](settings["scale"]).with_settings(settings)
        return task, Variant.of(run["mechanism"]), whole_number(run["heads"], "heads")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / 'config.json'} cannot be read by this version of better-attention: {error}."
        ) from None


def check_sizes(settings: Mapping[str, Any]) -> None:
    """Refuse a model too large to be read back.

    Raises:
        ValueError: a size of the model beyond ``LARGEST``.
    """
    for key, value in settings.items():
        if isinstance(value, int) and key not in COUNTS and not -LARGEST <= value <= LARGEST:
            raise ValueError(f"{key}={value} is out of range: models are read with sizes up to {LARGEST:,}")


def list_runs(out: str | Path) -> list[dict[str, Any]]:
    """The runs below a comparison's folder: ``name``, ``path``, ``config``, and ``result`` (None: not finished).

    Other programs have folders with a ``config.json``, too; they are passed over.

    Raises:
        ValueError: a file of a run is damaged.
    """
    found = []
    for path in sorted(Path(out).glob("*/config.json")):
        folder = path.parent
        if (config := _own_config(path)) is not None:
            result = read_json(folder / "result.json") if (folder / "result.json").is_file() else None
            found.append({"name": folder.name, "path": folder, "config": config, "result": result})
    return found


def _own_config(path: Path) -> dict[str, Any] | None:
    """The configuration of a run; None if it is somebody else's, told by what else lies there where it is damaged."""
    try:
        config = read_json(path)
    except ValueError:
        if any((path.parent / name).is_file() for name in ("assets.json", "metrics.jsonl", "result.json")):
            raise
        return None
    return config if "format" in config and isinstance(config.get("run"), Mapping) else None


def divergence(folder: Path) -> str:
    """Why the run in ``folder`` was given up, as training wrote it down; "" where it was not."""
    path = folder / "diverged.json"
    return str(read_json(path).get("reason", "its loss was not finite")) if path.is_file() else ""


def describe_run(task: Task, variant: Variant, heads: int, seed: int, data: str, device: str) -> dict[str, Any]:
    """What decides a run's outcome: two runs that agree in this are the same run."""
    return {
        "task": task.name,
        "mechanism": variant.name,
        "heads": heads,
        "seed": seed,
        "settings": task.settings(),
        "data_sha256": data,
        "device": device,
    }


def differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for each value in which two :func:`describe_run` differ; how a task is called decides nothing."""
    lines = []
    for key in sorted((there.keys() | now.keys()) - {"title", "source"}):
        old, new = there.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += differences(old, new)
        elif old != new:
            lines.append(f"{key}: {old!r} there, {new!r} now")
    return lines


def check_agreement(out: Path, now: Mapping[str, Any]) -> None:
    """Refuse a folder with runs of another setting than ``now``: one table must not mix them.

    Args:
        out: folder of the comparison.
        now: a :func:`describe_run`, or some of it.

    Raises:
        ValueError: with the list of differences.
    """
    own = ("mechanism", "heads", "seed")  # what the name of a run tells apart
    wanted = {key: value for key, value in now.items() if key not in own}
    for run in list_runs(out):
        there = run["config"]["run"]
        if there.get("task") != now["task"]:
            raise ValueError(f"{run['path']} is a run of task {there.get('task')!r}: choose another folder with --out.")
        lines = differences({key: there.get(key) for key in wanted}, wanted)
        if lines:
            raise ValueError(
                f"{run['path']} holds a run with another configuration:\n  "
                + "\n  ".join(lines)
                + "\nChoose another folder with --out, use the settings from there, or delete that folder."
            )


def open_run(folder: Path, run: Mapping[str, Any], command: str) -> None:
    """Make the folder of a run, or make sure that what lies there is the same run.

    Raises:
        ValueError: another run lies there; with the list of differences.
    """
    path = folder / "config.json"
    if path.is_file():
        lines = differences(read_json(path).get("run", {}), run)
        if lines:
            raise ValueError(f"{folder} holds another run:\n  " + "\n  ".join(lines) + "\nChoose another --out.")
        return
    write_json(path, {"format": FORMAT, "run": run, "environment": environment(command)})


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: the file is not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}). Delete the folder {path.parent} and run again.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: it holds {type(value).__name__}, not an object.")
    return value


def read_curve(folder: Path) -> list[dict[str, float]]:
    """The finished epochs of the run in ``folder``, one entry each.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / "metrics.jsonl"
    try:
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}). Delete the folder {folder} and run again.") from None


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """``value`` as JSON, indented, whole or not at all."""
    write_atomic(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")
