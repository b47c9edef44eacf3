"""A trained model by the path of its folder, whatever wrote it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from better_attention.conversion.recipe import RECIPE, load_converted
from better_attention.lab.runs import manifest
from better_attention.lab.runs.load import load_run
from better_attention.lab.trained import host
from better_attention.lab.trained.origin import FOLDER, HostOrigin, Origin, RunOrigin


@dataclass(frozen=True)
class Trained:
    """A trained model.

    Args:
        path: its folder.
        model: on the CPU, in evaluation mode.
        origin: what it was built from; of a converted model, the model before.
        converted: whether :func:`~better_attention.lab.trained.convert.convert_trained` wrote it.
    """

    path: Path
    model: nn.Module
    origin: Origin
    converted: bool


def open_trained(path: Path) -> Trained:
    """The run, the converted model or the model of transformers in folder ``path``.

    Raises:
        FileNotFoundError: there is no such folder, no finished run in it, or no weights.
        ValueError: a file is damaged, was changed, or was written by a version that this one cannot read.
        ImportError: a model of transformers, which is missing.
    """
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path} is not a folder: name that of a run (`better-attention runs` lists them), of a converted model, "
            "or one that save_pretrained of transformers wrote."
        )
    if is_converted(path):
        return _open_converted(path)
    if host.is_host(path):
        return Trained(path, host.load(path), HostOrigin(path), converted=False)
    return Trained(path, load_run(path).model, RunOrigin.read(path), converted=False)


def is_converted(path: Path) -> bool:
    """Whether a folder holds a converted model."""
    return (path / RECIPE).is_file()


def _open_converted(path: Path) -> Trained:
    there = path / FOLDER
    if not (there / "config.json").is_file():
        raise ValueError(
            f"{path} holds a recipe and weights, but not what the model was built from ({FOLDER}/config.json): only "
            "folders of `better-attention convert` do. Open this one in Python, with load_converted."
        )
    # Before the weights are read: a damaged file is then named as such, and not as a wrong shape.
    manifest.check(path)
    manifest.check(there)
    origin: Origin = HostOrigin(there) if host.is_host(there) else RunOrigin.read(there)
    return Trained(path, load_converted(origin.build(), path).eval(), origin, converted=True)
