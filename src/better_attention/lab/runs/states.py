"""The state of every run below a folder: finished, interrupted, diverged, being written or damaged.

Results that a command made of its runs are listed where they are damaged.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from better_attention.conversion.recipe import RECIPE
from better_attention.lab.lock import holder
from better_attention.lab.runs import manifest
from better_attention.lab.runs.checkpoint import last_state
from better_attention.lab.runs.folder import RunFolder
from better_attention.lab.runs.name import RunName
from better_attention.lab.runs.record import RunConfig, RunRecord

STATES = ("finished", "interrupted", "diverged", "being written", "damaged")
RESULTS = ("results.json", "ladder.json", "edge.json")
"""By one of these a folder of results is known, as the commands compare, ladder and edge write it."""
DEPTH = 4
"""Levels of folders that are searched; a run of a comparison below ``runs/`` needs two."""


@dataclass(frozen=True, slots=True)
class RunState:
    """The state of one run, or the damaged results of a command that may have made many.

    Args:
        path: its folder.
        state: one of :data:`STATES`.
        detail: where it was interrupted, why it diverged or is damaged, which process writes it; "" if there is
            nothing to say.
        config: what was to be trained; None where the configuration is damaged.
        record: what came of it; None where it is not finished.
        epochs: finished epochs.
        seconds: time of training in them.
        kind: ``"run"`` or ``"results"``, which are listed only if they are damaged.
    """

    path: Path
    state: str
    detail: str = ""
    config: RunConfig | None = None
    record: RunRecord | None = None
    epochs: int = 0
    seconds: float = 0.0
    kind: str = "run"

    @property
    def departures(self) -> tuple[str, ...]:
        """How the data differ from those of the task's source."""
        return self.record.departures if self.record else ()

    def as_json(self) -> dict[str, Any]:
        """Everything that a listing shows, as plain JSON values."""
        description = self.config.description if self.config else {}
        environment = self.config.environment if self.config else {}
        return {
            "path": str(self.path),
            "name": self.path.name,
            "kind": self.kind,
            "state": self.state,
            "detail": self.detail,
            **{key: description.get(key) for key in ("task", "mechanism", "heads", "seed", "device")},
            "scale": self.config.settings.get("scale") if self.config else None,
            "test_accuracy": self.record.test_accuracy if self.record else None,
            "departures": list(self.departures),
            "epochs": self.epochs,
            "seconds": self.seconds,
            "commit": environment.get("commit"),
            "command": environment.get("command"),
        }


def run_states(folders: Sequence[Path]) -> list[RunState]:
    """The states of the runs below ``folders``, and results that are damaged, by path; each once."""
    # The folders may lie inside each other; each run is listed once.
    below = dict.fromkeys(one for folder in folders for one in _folders(folder, DEPTH))
    states = (run_state(path) if is_run else _damaged_results(path) for path, is_run in below)
    return [state for state in states if state is not None]


def run_state(path: Path) -> RunState:
    """The state of the run in the folder ``path``; builds no model."""
    folder = RunFolder(path)
    if files := folder.orphans:
        return RunState(path, "damaged", f"{path / 'config.json'} is missing, which says what {files[0]} is of")
    try:
        config = folder.config()
    except (OSError, ValueError) as error:
        return RunState(path, "damaged", str(error))
    return _state_of(folder, RunState(path, "interrupted", config=config))


def _state_of(folder: RunFolder, state: RunState) -> RunState:
    """``state``, in which the configuration is known, completed with what the other files say."""
    path = folder.path
    try:
        if folder.is_finished or os.path.lexists(path / "metrics.jsonl"):
            if not os.path.lexists(path / "metrics.jsonl"):
                raise ValueError(f"{path / 'metrics.jsonl'} is missing.")
            curve = folder.curve()
            state = replace(state, epochs=len(curve), seconds=sum(line["seconds"] for line in curve))
        if folder.is_finished:
            record = RunRecord.read(path / "result.json")
            return replace(state, state="finished", detail=folder.check_whole(record), record=record)
        divergence = folder.divergence()
    except (OSError, ValueError) as error:
        return replace(state, state="damaged", detail=str(error))
    saved = _position(last_state(path))
    # Asked before the divergence: a run that is trained again keeps the old diverged.json until its next checkpoint.
    if writer := holder(path):
        return replace(state, state="being written", detail=f"by {writer}; saved {saved}")
    if divergence:
        return replace(state, state="diverged", detail=divergence)
    return replace(state, detail=saved)


def _damaged_results(path: Path) -> RunState | None:
    """The files of results in ``path`` that differ from its manifest; None if none does, or there is no manifest."""
    try:
        names: Sequence[str | None] = sorted(manifest.read(path) or ())
    except (OSError, ValueError):
        names = [None]  # the manifest itself is damaged, so nothing that it lists can be trusted
    if not any(name in names or os.path.lexists(path / name) for name in RESULTS):
        return None
    faults = [fault for name in names if (fault := _fault(path, name))]
    again = "The command that made these files writes them again."
    return RunState(path, "damaged", " ".join([*faults, again]), kind="results") if faults else None


def _fault(path: Path, name: str | None) -> str:
    """What is wrong with a file that the manifest of ``path`` lists, or (None) with that manifest; "" if nothing."""
    try:
        manifest.check(path, None if name is None else [name])
    except (OSError, ValueError) as error:
        return f"{str(error).rstrip('.')}."
    return ""


def _position(state: Mapping[str, Any] | None) -> str:
    """The position of a checkpoint, in words."""
    if not state:
        return "before its first checkpoint"
    epoch, step = state.get("epoch"), state.get("step")
    return f"after epoch {epoch - 1}" if step == 0 and isinstance(epoch, int) else f"at epoch {epoch}, step {step}"


def _folders(path: Path, depth: int) -> Iterator[tuple[Path, bool]]:
    """Every folder that is searched, and whether it is a run's, also one that has lost its ``config.json``.

    A run holds no other runs, so the search does not go into it. Links are not followed.
    """
    config, folder = path / "config.json", RunFolder(path)
    try:  # a FIFO in place of the file, for example, is damage; a folder of that name has nothing to do with runs
        is_run = folder.has_config and not config.is_dir()
    except OSError:  # a link to something that may not be read
        is_run = True
    if is_run or (RunName.names_a_folder(path.name) and (folder.has_config or folder.orphans)):
        yield path, True
        return
    yield path, False
    if depth:
        try:
            # A link may lead back to a folder above it.
            names = sorted(entry.name for entry in os.scandir(path) if entry.is_dir(follow_symlinks=False))
        except OSError:
            return
        if os.path.lexists(path / RECIPE):  # a converted model: beside it lies what it was built from, which is no run
            names = [name for name in names if RunName.names_a_folder(name)]
        for name in names:
            yield from _folders(path / name, depth - 1)
