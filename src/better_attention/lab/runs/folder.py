"""The folder of a run: one trained model with everything that is needed to trust it, repeat it and use it.

super-h4-s0/
    config.json          what was trained and how (compared when a run is continued), and where
    assets.json          names of the classes, vocabulary
    metrics.jsonl        one line per epoch
    model.safetensors    the weights with the best validation loss
    manifest.sha256      the SHA-256 of each of these files
    result.json          the record of the finished run; its presence means finished
    diverged.json        only where a loss was not finite: why training was given up
    checkpoint-*         only while the run is in progress
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from better_attention.lab.runs import manifest
from better_attention.lab.runs.checkpoint import check_digest, tensor_count
from better_attention.lab.runs.json_file import read_json, write_json
from better_attention.lab.runs.provenance import environment
from better_attention.lab.runs.record import FORMAT, RunConfig, RunRecord, differences, read_curve

WEIGHTS = "model.safetensors"
FILES = ("config.json", "assets.json", "metrics.jsonl", WEIGHTS, "result.json")
"""The files of a finished run, all of them in its manifest; :data:`WEIGHTS` may have been removed."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The folder of a run; every method reads or writes the disk.

    Args:
        path: the folder, which may not exist yet.
    """

    path: Path

    @property
    def has_config(self) -> bool:
        """Whether there is a configuration, damaged or not: without it the folder is not a run."""
        # A broken link is damage to report, not a missing file; exists() would not see it.
        return os.path.lexists(self.path / "config.json")

    @property
    def is_finished(self) -> bool:
        """Whether there is a record, damaged or not."""
        return os.path.lexists(self.path / "result.json")

    @property
    def has_weights(self) -> bool:
        """Whether the weights are there; results are often published without them."""
        return (self.path / WEIGHTS).is_file()

    @property
    def orphans(self) -> list[str]:
        """Files of a run in a folder that has no ``config.json``, which would say what they belong to."""
        if self.has_config:
            return []
        return [name for name in ("result.json", "metrics.jsonl", WEIGHTS) if os.path.lexists(self.path / name)]

    def begin(self, description: Mapping[str, Any], command: str) -> None:
        """Create the folder for the run with this description, or make sure that this run is the one that lies there.

        Args:
            description: see :meth:`~better_attention.lab.runs.job.Job.describe`.
            command: the command line, for the record.

        Raises:
            ValueError: another run lies there; lists the differences.
        """
        path = self.path / "config.json"
        if not path.is_file():
            write_json(path, {"format": FORMAT, "run": description, "environment": environment(command)})
            return
        lines = differences(self.config().description, description)
        if lines:
            raise ValueError(f"{self.path} holds another run:\n  " + "\n  ".join(lines) + "\nChoose another --out.")

    def config(self) -> RunConfig:
        """The configuration.

        Raises:
            ValueError: it is damaged, or describes no run.
            OSError: it cannot be read.
        """
        return RunConfig.read(self.path / "config.json")

    def record(self) -> RunRecord | None:
        """The record; None if the run is not finished.

        Raises:
            ValueError: the record or the configuration is damaged, or was changed since it was written.
        """
        if not self.is_finished:
            return None
        record = RunRecord.read(self.path / "result.json")
        # Only the two small files, because every table reads them. All files are checked where the weights are used.
        self.check_files(record, ("config.json", "result.json"))
        return record

    def curve(self) -> list[dict[str, float]]:
        """The finished epochs, one entry for each.

        Raises:
            ValueError: the file is damaged.
            OSError: it cannot be read.
        """
        return read_curve(self.path / "metrics.jsonl")

    def divergence(self) -> str:
        """Why training was given up, as it wrote it down; "" where it was not given up.

        Raises:
            ValueError: the file is damaged.
        """
        path = self.path / "diverged.json"
        return str(read_json(path).get("reason", "its loss was not finite")) if path.is_file() else ""

    def check_files(self, record: RunRecord, names: Sequence[str] | None = None) -> bool:
        """Make sure that the files of a finished run are as they were written.

        Args:
            record: the run's record.
            names: the files to check; None: all of them.

        Returns:
            Whether there is a manifest. Older versions wrote none, but the digest of the weights, which is checked.

        Raises:
            ValueError: names the first file that was changed or is missing.
        """
        # Not only what the manifest lists: without its entry a changed file would pass.
        if names is None and (listed := manifest.read(self.path)) is not None:
            names = [*FILES, *(name for name in listed if name not in FILES)]
        if manifest.check(self.path, names, may_lack=(WEIGHTS,)):
            return True
        # The record was written together with a manifest, so somebody has removed it.
        if record.manifest:
            raise ValueError(f"{self.path / manifest.NAME} is missing, which has the digests of its files.")
        if names is None and self.has_weights:
            check_digest(self.path / WEIGHTS, record.model_sha256)
        return False

    def check_whole(self, record: RunRecord) -> str:
        """Make sure that nothing of a finished run is damaged, changed or missing; the weights may be missing.

        Returns:
            What is to be known of it, "" where every file is there as it was written.

        Raises:
            ValueError: names the file.
            OSError: a file cannot be read.
        """
        if not os.path.lexists(self.path / "metrics.jsonl"):
            raise ValueError(f"{self.path / 'metrics.jsonl'} is missing.")
        self.curve()
        remarks = []
        if os.path.lexists(self.path / WEIGHTS):
            tensor_count(self.path / WEIGHTS)
        else:
            remarks.append("without its weights: in tables, but `predict` cannot use it")
        if not self.check_files(record):
            remarks.append("no manifest: a change of its numbers would not be noticed")
        return "; ".join(remarks)
