"""What a trained model was built from: enough to build it again without its weights.

A converted model on disk is its weights and a recipe. The files that this module copies beside them, into ``origin/``,
describe the model before its conversion, so that the folder can be opened without the run or the model it came from.
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from better_attention.lab.files import digest
from better_attention.lab.runs import manifest
from better_attention.lab.runs.json_file import read_json
from better_attention.lab.runs.load import described
from better_attention.lab.runs.record import RunConfig
from better_attention.lab.tasks.base import Task
from better_attention.lab.tasks.variant import Variant

FOLDER = "origin"
"""Folder inside that of a converted model."""


class Origin(ABC):
    """A trained model without its weights.

    Args:
        folder: where its description lies.
    """

    folder: Path

    @abstractmethod
    def build(self) -> nn.Module:
        """A model of the same kind and size, in evaluation mode, whose weights do not matter."""

    @property
    @abstractmethod
    def files(self) -> list[str]:
        """Names of the files in :attr:`folder` that describe it."""

    @property
    @abstractmethod
    def identity(self) -> Mapping[str, Any]:
        """What two models have in common that can teach each other, as plain values."""

    def copy(self, folder: Path) -> None:
        """Write the description into ``folder``, which is created, with a manifest."""
        target = folder / FOLDER
        target.mkdir(parents=True, exist_ok=True)
        for name in self.files:
            shutil.copyfile(self.folder / name, target / name)
        manifest.write(target, {name: digest(target / name) for name in self.files})


@dataclass(frozen=True)
class RunOrigin(Origin):
    """The description of a run: its configuration, and what it knows about its data.

    Args:
        folder: of the run, or of copies of its files.
        config, task, variant, heads: what was trained.
        assets: names of the classes, vocabulary.
    """

    folder: Path
    config: RunConfig
    task: Task
    variant: Variant
    heads: int
    assets: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> RunOrigin:
        """The description in ``folder``.

        Raises:
            ValueError: it is damaged, or of another version.
            OSError: a file cannot be read.
        """
        path = folder / "config.json"
        config = RunConfig.read(path)
        task, variant, heads = described(config, path)
        return cls(folder, config, task, variant, heads, read_json(folder / "assets.json"))

    def build(self) -> nn.Module:
        """See :meth:`Origin.build`."""
        # Building draws random numbers, which must not disturb the generator of the caller.
        with torch.random.fork_rng(devices=[]):
            return self.task.build(self.variant, self.heads).eval()

    @property
    def files(self) -> list[str]:
        """See :attr:`Origin.files`."""
        return ["config.json", "assets.json"]

    @property
    def identity(self) -> Mapping[str, Any]:
        """See :attr:`Origin.identity`: the whole description of the run, its seed included."""
        return self.config.description


@dataclass(frozen=True)
class HostOrigin(Origin):
    """The description of a model of transformers: its ``config.json``, and its tokeniser where there is one.

    Args:
        folder: what ``save_pretrained`` wrote, or copies of its files.
    """

    folder: Path

    def build(self) -> nn.Module:
        """See :meth:`Origin.build`."""
        from better_attention.lab.trained.host import build

        # Weights are drawn at random here too, although they will be replaced.
        with torch.random.fork_rng(devices=[]):
            return build(self.folder)

    @property
    def files(self) -> list[str]:
        """See :attr:`Origin.files`."""
        from better_attention.lab.trained.host import DESCRIPTION

        return [name for name in DESCRIPTION if (self.folder / name).is_file()]

    @property
    def identity(self) -> Mapping[str, Any]:
        """See :attr:`Origin.identity`."""
        return read_json(self.folder / "config.json")
