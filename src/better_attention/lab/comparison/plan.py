"""What a comparison compares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from better_attention.lab.analysis import learning_speed
from better_attention.lab.runs.job import Job
from better_attention.lab.tasks.base import Task
from better_attention.lab.tasks.variant import Variant


@dataclass(frozen=True)
class Plan:
    """What is compared.

    Args:
        task: the task, its settings resolved.
        variants, heads, seeds: a run is trained for each combination; ``seeds`` is a number, they count from 0.
        out: folder of the comparison, with one folder per run.
        data: the user's data folder; None: the library's own.
        device: ``"auto"`` (a GPU if there is one), ``"cpu"``, ``"cuda"`` or ``"mps"``.
        command: the command line, for the record.
        threshold: validation accuracy in per cent, the epochs to which are counted; None: that of the task, or
            by the rule of :func:`better_attention.lab.analysis.learning_speed.find_threshold`.
        shard: ``"fsdp"`` spreads the parameters of a model over the processes of the launch; "": each has all of them.
    """

    task: Task
    variants: Sequence[Variant]
    heads: Sequence[int]
    seeds: int
    out: Path
    data: Path | None = None
    device: str = "auto"
    command: str = ""
    threshold: float | None = None
    shard: str = ""

    def __post_init__(self) -> None:
        if self.threshold is not None:
            learning_speed.check_threshold(self.threshold)

    def jobs(self) -> list[Job]:
        """The runs, seeds outermost, so that an interrupted comparison is still balanced."""
        return [Job(self.task, v, h, s) for s in range(self.seeds) for h in self.heads for v in self.variants]

    def fitted(self) -> Plan:
        """This plan with the settings of its task that only the user's data can tell (classes, sizes).

        Raises:
            ValueError: the data set is missing or damaged; the message says how to get it.
        """
        return replace(self, task=self.task.fitted(self.data))
