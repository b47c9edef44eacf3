"""All runs in the output folder of a comparison, read once per command."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from better_attention.lab.lock import holder
from better_attention.lab.runs.folder import RunFolder
from better_attention.lab.runs.job import Job
from better_attention.lab.runs.name import RunName
from better_attention.lab.runs.record import RunConfig, RunRecord


@dataclass(frozen=True, slots=True)
class StoredRun:
    """A run as it was on the disk when it was read.

    Args:
        folder: where it lies.
        config: what was to be trained.
        record: what came of it; None if it is not finished.
        divergence: why training was given up; "" where it was not.
        damage: what is wrong with its other files; "" where nothing is, and where they were not looked at.
    """

    folder: RunFolder
    config: RunConfig
    record: RunRecord | None
    divergence: str
    damage: str = ""

    @classmethod
    def read(cls, folder: RunFolder, *, verify: bool = False) -> StoredRun:
        """Read the run in ``folder``; ``verify``: look at all its files, for ``damage``.

        Raises:
            ValueError: its configuration or its record is damaged.
            OSError: they cannot be read.
        """
        config, record = folder.config(), folder.record()
        divergence = "" if record else folder.divergence()
        return cls(folder, config, record, divergence, _damage(folder, record) if verify and record else "")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All runs in a folder at one moment.

    Args:
        out: the folder.
        runs: the runs in it, by name.
        orphans: name of a folder without ``config.json`` -> the files of a run in it.
        writers: name of a folder -> the process that holds its lock.
    """

    out: Path
    runs: Mapping[str, StoredRun]
    orphans: Mapping[str, list[str]] = field(default_factory=dict)
    writers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, out: Path, *, verify: bool = False, writers: bool = False) -> Snapshot:
        """Read the runs directly below ``out``: the folders that are named like runs.

        Args:
            out: the folder, which may not exist yet.
            verify: look at every file of the finished runs, see :attr:`StoredRun.damage`.
            writers: look for processes that hold a run.

        Raises:
            ValueError: the configuration or the record of a run is damaged.
            OSError: they cannot be read.
        """
        # Sorted, because a file system lists its folders in any order.
        folders = [RunFolder(path) for path in sorted(out.glob("*")) if RunName.names_a_folder(path.name)]
        runs = {f.path.name: StoredRun.read(f, verify=verify) for f in folders if f.has_config}
        orphans = {f.path.name: files for f in folders if (files := f.orphans)}
        held = {f.path.name: writer for f in folders if (writer := holder(f.path))} if writers else {}
        return cls(out, runs, orphans, held)

    @property
    def finished(self) -> dict[str, RunRecord]:
        """The records of the finished runs, by name of the folder."""
        return {name: run.record for name, run in self.runs.items() if run.record}

    def missing(self, jobs: Iterable[Job]) -> list[Job]:
        """The jobs whose run is not finished, in their order."""
        finished = self.finished
        return [job for job in jobs if job.folder_name not in finished]

    def newcomer(self) -> RunFolder | None:
        """A run in ``out`` that has appeared since this snapshot was taken; None if there is none."""
        for path in sorted(self.out.glob("*")):
            if RunName.names_a_folder(path.name) and path.name not in self.runs and (path / "config.json").is_file():
                return RunFolder(path)
        return None


def _damage(folder: RunFolder, record: RunRecord) -> str:
    try:
        folder.check_whole(record)
    except (OSError, ValueError) as error:
        return str(error)
    return ""
