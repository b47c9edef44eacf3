"""Run folders: one trained model each, with everything that is needed to trust it, repeat it and use it.

super-h4-s0/
    config.json          what was trained and how (compared when a run is continued), and where
    assets.json          names of the classes, vocabulary
    metrics.jsonl        one line an epoch
    model.safetensors    the weights with the best validation loss
    manifest.sha256      the SHA-256 of each of these files
    result.json          the record of the finished run; its presence means finished
    checkpoint-*         only while the run is under way
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from better_attention.errors import whole_number
from better_attention.lab.files import parse_json, read_regular, write_atomic
from better_attention.lab.runs import manifest
from better_attention.lab.runs.checkpoint import check_digest, load_weights, tensor_count
from better_attention.lab.runs.provenance import changed, environment
from better_attention.lab.tasks.base import SCALES, Prediction, Task
from better_attention.lab.tasks.catalogue import TASKS
from better_attention.lab.tasks.variant import Variant

FORMAT = 1
FILES = ("config.json", "assets.json", "metrics.jsonl", "model.safetensors", "result.json")
"""What a finished run consists of, all of it in its manifest; ``model.safetensors`` may have been removed."""
WEIGHTS = "model.safetensors"
LARGEST = 2**20  # bound on every size of a model: a damaged config must not ask for all memory
DEEPEST = 1000  # bound on layers: building a model takes time for each of them
LARGEST_NUMBER = 1e100  # bound on a measured number: sums and squares of it are finite
COUNTS = frozenset(
    ["train_samples", "test_samples", "bleu_samples", "data_seed", "seeds", "epochs", "patience", "batch_size"]
)
"""Settings that size no model: they may be as large as the data."""
DEPTHS = ("layers", "encoder_layers")
"""Settings that say how many layers a model has."""


@cache
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
    config = read_config(folder / "config.json")
    assets, result = (read_json(folder / f"{name}.json") for name in ("assets", "result"))
    check_record(result, folder / "result.json")
    curve = read_curve(folder)
    weights = folder / WEIGHTS
    task, variant, heads = _what(config, folder)
    if not weights.is_file():
        raise FileNotFoundError(
            f"{folder} has lost its weights ({weights.name}): delete it, and run the command of its config.json again."
        )
    layers, tensors = sum(getattr(task, key, 0) for key in DEPTHS), tensor_count(weights)
    if layers > tensors:  # found before a model is built that cannot be the one
        raise ValueError(
            f"{folder / 'config.json'} describes {layers} layers, {weights.name} holds {tensors} tensors: one of "
            "the two is damaged. Delete the run and train it again."
        )
    model = _build(task, variant, heads, folder)
    load_weights(model, weights)
    check_files(folder, result)
    return Run(folder, model.eval(), task, config, result, assets, curve)


def _build(task: Task, variant: Variant, heads: int, folder: Path) -> nn.Module:
    """The model of a run, without memory for its weights.

    Raises:
        ValueError: it cannot be built.
    """
    try:
        with torch.device("meta"):
            return task.build(variant, heads)
    except (RuntimeError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        why = str(error).rstrip(".") or type(error).__name__
        raise ValueError(f"{folder / 'config.json'} describes a model that cannot be built: {why}.") from None


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
    except (AttributeError, KeyError, TypeError, ValueError, ArithmeticError) as error:
        why = str(error).rstrip(".")
        raise ValueError(
            f"{folder / 'config.json'} cannot be read by this version of better-attention: {why}."
        ) from None


def check_sizes(settings: Mapping[str, Any]) -> None:
    """Refuse a model too large to be read back, before it is built.

    Raises:
        ValueError: a size of the model beyond ``LARGEST``, or more layers than ``DEEPEST``.
    """
    for key, value in settings.items():
        bound, what = (DEEPEST, "layers") if key in DEPTHS else (LARGEST, "sizes")
        if isinstance(value, int) and key not in COUNTS and not -bound <= value <= bound:
            raise ValueError(f"{key}={value} is out of range: models are read with {what} up to {bound:,}")


def list_runs(out: str | Path) -> list[dict[str, Any]]:
    """The runs below a comparison's folder: ``name``, ``path``, ``config``, and ``result`` (None: not finished).

    Other programs have folders with a ``config.json``, too; they are passed over.

    Raises:
        ValueError: a file of a run is damaged.
    """
    found = []
    for folder in sorted(Path(out).glob("*")):
        path = folder / "config.json"
        if os.path.lexists(path) and (config := _own_config(path)) is not None:
            found.append({"name": folder.name, "path": folder, "config": config, "result": read_result(folder)})
    return found


def read_result(folder: Path) -> dict[str, Any] | None:
    """The record of the run in ``folder``; None if the run is not finished.

    Raises:
        ValueError: the record or the configuration is damaged, or was changed since it was written.
    """
    path = folder / "result.json"
    if not os.path.lexists(path):
        return None
    result = read_json(path)
    check_record(result, path)
    check_files(folder, result, ("config.json", "result.json"))
    return result


def check_record(result: Mapping[str, Any], path: Path) -> None:
    """Refuse a record of a run that tables could not show.

    Raises:
        ValueError: names the entry that is missing or of another kind.
    """
    for key in _NEEDED:
        if key not in result:
            raise ValueError(f"{path} is damaged: it lacks {key!r}.")
    for key, value in result.items():
        number = is_number(value)
        if (
            (key in _WHOLE and not (isinstance(value, int) and number))
            or (key in _TEXTS and not isinstance(value, str))
            or (key in _MAPPINGS and not isinstance(value, Mapping))
            or (_NUMBER.fullmatch(key) and not (number or (value is None and key not in _ALWAYS)))
        ):
            raise ValueError(f"{path} is damaged: {key!r} is {str(value)[:60]!r}.")


def is_number(value: object) -> bool:
    """Whether a JSON value is a number that can be computed with."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST_NUMBER


_NEEDED = (
    *("test_accuracy", "epochs", "commit", "task", "scale", "mechanism", "heads", "seed"),
    *("test_loss", "best_epoch", "epoch_seconds"),
)
_WHOLE = frozenset(["heads", "seed", "epochs", "best_epoch", "total_params", "attention_params"])
_TEXTS = frozenset(["task", "scale", "mechanism", "score", "device", "commit"])
_MAPPINGS = frozenset(["settings", "samples", "versions"])
_ALWAYS = frozenset(f"{split}_{key}" for split in ("train", "validation", "test") for key in ("accuracy", "loss"))
_NUMBER = re.compile(r"(?:train|validation|test)_\w+|epoch_seconds|epoch_ratio|times_as_fast|waiting_share")


def check_files(folder: Path, result: Mapping[str, Any], names: Sequence[str] | None = None) -> bool:
    """Make sure that the files of a finished run are as they were written.

    Args:
        folder: of the run.
        result: its record.
        names: of the files to look at; None: all of them.

    Returns:
        Whether there is a manifest: versions that wrote none left the digest of the weights alone, which is checked.

    Raises:
        ValueError: names the first file that was changed or is missing.
    """
    if names is None and (listed := manifest.read(folder)) is not None:
        names = [*FILES, *(name for name in listed if name not in FILES)]
    if manifest.check(folder, names, may_lack=(WEIGHTS,)):
        return True
    if result.get("manifest"):
        raise ValueError(f"{folder / manifest.NAME} is missing, which has the digests of its files.")
    if names is None and (folder / WEIGHTS).is_file():
        check_digest(folder / WEIGHTS, result.get("model_sha256"))
    return False


def _own_config(path: Path) -> dict[str, Any] | None:
    """The configuration of a run; None if it is somebody else's, told by what else lies there where it is damaged."""
    try:
        return read_config(path)
    except (OSError, ValueError):
        if any(os.path.lexists(path.parent / name) for name in ("assets.json", "metrics.jsonl", "result.json")):
            raise
        return None


def read_config(path: Path) -> dict[str, Any]:
    """The configuration of a run.

    Raises:
        ValueError: the file is damaged, or describes no run.
        OSError: it cannot be read.
    """
    config = read_json(path)
    if "run" not in config:
        raise ValueError(f"{path} describes no run: it lacks 'run'.")
    run, where = config["run"], config.get("environment", {})
    if not isinstance(run, Mapping) or not isinstance(where, Mapping):
        raise ValueError(f"{path} is damaged: it describes no run.")
    if "format" not in config:
        raise ValueError(f"{path} describes no run: it lacks 'format'.")
    for key, (kind, name) in _DESCRIBED.items():
        if not isinstance(run.get(key), kind) or isinstance(run[key], bool):
            raise ValueError(f"{path} is damaged: {key} must be {name}, received {str(run.get(key))[:60]!r}.")
    return config


_DESCRIBED: Mapping[str, tuple[type, str]] = MappingProxyType(
    {
        "task": (str, "a text"),
        "mechanism": (str, "a text"),
        "heads": (int, "a whole number"),
        "seed": (int, "a whole number"),
        "settings": (dict, "an object"),
    }
)
"""What is known of every run, and its kind."""


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
    return [
        f"{key}: {old!r} there, {new!r} now" for key, old, new in changed(there, now) if key not in ("title", "source")
    ]


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
        lines = differences(read_config(path)["run"], run)
        if lines:
            raise ValueError(f"{folder} holds another run:\n  " + "\n  ".join(lines) + "\nChoose another --out.")
        return
    write_json(path, {"format": FORMAT, "run": run, "environment": environment(command)})


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: it is not a regular file, not JSON, not an object, or has a number that is not finite.
    """
    content = read_regular(path)
    try:
        value = parse_json(content)
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
    content = read_regular(path)
    try:
        lines = [parse_json(line) for line in content.decode("utf-8").splitlines()]
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}). Delete the folder {folder} and run again.") from None
    for line in lines:
        if not isinstance(line, Mapping) or not {"epoch", "seconds"} <= line.keys():
            raise ValueError(f"{path} is damaged: an epoch lacks its seconds or its number.")
        for key, value in line.items():
            if not is_number(value):
                raise ValueError(f"{path} is damaged: {key!r} of an epoch is {str(value)[:60]!r}.")
    return lines


def json_text(value: Mapping[str, Any]) -> str:
    """``value`` as the text of a JSON file, indented.

    Raises:
        ValueError: a number in it is not finite.
    """
    return json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """``value`` as JSON, indented, whole or not at all."""
    write_atomic(path, json_text(value))
