"""One run to be trained: which task, with which mechanism, number of heads and seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from better_attention.lab.runs.name import RunName
from better_attention.lab.tasks.base import Task
from better_attention.lab.tasks.variant import Variant


@dataclass(frozen=True, slots=True)
class Job:
    """One run to be trained.

    Args:
        task: the task, with all its settings.
        variant: the mechanism and the layout of its alignment kernel.
        heads: number of attention heads.
        seed: decides initial weights, order of the samples and dropout.
    """

    task: Task
    variant: Variant
    heads: int
    seed: int

    @property
    def folder_name(self) -> str:
        """The name of the run's folder.

        Raises:
            ValueError: the mechanism has no name that can be read back, or one that no folder should have.
        """
        Variant.of(self.variant.name)  # a custom mechanism has a description only, which nothing reads back
        return RunName(self.variant.name, self.heads, self.seed).folder

    def describe(self, data_sha256: str, device: str) -> dict[str, Any]:
        """Everything that decides the outcome: two runs with equal descriptions are the same run.

        Args:
            data_sha256: digest of the data.
            device: kind of device, such as ``"cpu"``.
        """
        return {
            "task": self.task.name,
            "mechanism": self.variant.name,
            "heads": self.heads,
            "seed": self.seed,
            "settings": self.task.settings(),
            "data_sha256": data_sha256,
            "device": device,
        }
