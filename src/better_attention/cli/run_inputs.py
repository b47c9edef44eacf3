"""What a finished run is asked about: inputs of the user's, and numbered samples of its test split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from better_attention.cli import UserError

if TYPE_CHECKING:
    from better_attention.lab.runs.load import Run
    from better_attention.lab.tasks.inputs import NamedInput
    from better_attention.lab.tasks.splits import Splits

INPUTS = "texts, text files (one text each), - for standard input (one text per line); image files or .npy"
"""Help on inputs."""


def numbered_samples(trained: Run, rows: Sequence[int], folder: Path | None) -> list[NamedInput]:
    """The test samples numbered ``rows`` in the data set's own order.

    Raises:
        UserError: no such sample, or other data than the run's.
    """
    task = trained.task
    if not rows:
        return []
    if task.unnumbered:
        raise UserError(f"--index: task {task.name!r} {task.unnumbered}")
    return task.numbered_samples(rows, own_data(trained, folder, "--index"), folder)


def own_data(trained: Run, folder: Path | None, option: str) -> Splits:
    """The data that the run was trained on.

    Args:
        trained: the run.
        folder: where the data set is; None: the data home.
        option: what asks for it, for the message.

    Raises:
        UserError: other data.
    """
    splits = trained.task.load(folder)
    if splits.digest != trained.config["run"]["data_sha256"]:
        raise UserError(
            f"{option}: {folder or 'the data set'} is not the data that {trained.path} was trained on. Test samples of "
            "other data may have been trained on; to use them anyway, name the inputs themselves."
        )
    return splits
