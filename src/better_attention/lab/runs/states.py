"""What lies below a folder: every run with its state, finished, interrupted, diverged, being written or damaged.

Results that a command made of its runs are listed where they are damaged.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from better_attention.lab.lock import holder
from better_attention.lab.runs import manifest
from better_attention.lab.runs.checkpoint import last_state, tensor_count
from better_attention.lab.runs.folder import (
    WEIGHTS,
    check_files,
    check_record,
    divergence,
    read_config,
    read_curve,
    read_json,
)

_NAME = re.compile(r"[A-Za-z0-9._-]+-h[0-9]{1,9}-s[0-9]{1,9}")
STATES = ("finished", "interrupted", "diverged", "being written", "damaged")
RESULTS = ("results.json", "ladder.json", "edge.json")
"""By one of these a folder of results is known, as the commands compare, ladder and edge write it."""
DEPTH = 4
"""Levels of folders that are searched; a run below a comparison below ``runs/`` needs two."""


@dataclass(frozen=True, slots=True)
class Found:
    """One run folder, or the damaged results of a command that may have made many.

    Args:
        path: the folder.
        state: one of :data:`STATES`.
        detail: where it was interrupted, why it diverged or is damaged, who writes it; "" if nothing is to be said.
        run: what was to be trained: task, mechanism, heads, seed, settings; empty where the configuration is damaged.
        result: the record of a finished run, else empty.
        environment: command, commit, versions.
        epochs: finished epochs.
        seconds: spent training in them.
        kind: ``"run"`` or ``"results"``, which are listed only if they are damaged.
    """

    path: Path
    state: str
    detail: str = ""
    run: Mapping[str, Any] = field(default_factory=dict)
    result: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    epochs: int = 0
    seconds: float = 0.0
    kind: str = "run"

    def as_json(self) -> dict[str, Any]:
        """What a listing tells, as plain JSON values."""
        settings = self.run.get("settings")
        departures = self.result.get("departures")
        return {
            "path": str(self.path),
            "name": self.path.name,
            "kind": self.kind,
            "state": self.state,
            "detail": self.detail,
            **{key: self.run.get(key) for key in ("task", "mechanism", "heads", "seed", "device")},
            "scale": settings.get("scale") if isinstance(settings, Mapping) else None,
            "test_accuracy": self.result.get("test_accuracy"),
            "departures": [str(one) for one in departures] if isinstance(departures, list) else [],
            "epochs": self.epochs,
            "seconds": self.seconds,
            "commit": self.environment.get("commit"),
            "command": self.environment.get("command"),
        }


def inventory(folders: Sequence[Path]) -> list[Found]:
    """The runs below ``folders``, and results that are damaged, by path."""
    below = dict.fromkeys(one for folder in folders for one in _folders(folder, DEPTH))
    found = (look_at(folder) if is_run else _damaged_results(folder) for folder, is_run in below)
    return [one for one in found if one is not None]


def _folders(folder: Path, depth: int) -> Iterator[tuple[Path, bool]]:
    """Every folder that is searched, and whether it is a run's, also one that has lost its ``config.json``.

    A run holds no other; links end there.
    """
    config = folder / "config.json"
    try:  # what stands in the place of the file, a FIFO for example, is damage; a folder of that name is anybody's
        found = os.path.lexists(config) and not config.is_dir()
    except OSError:  # a link to what may not be read
        found = True
    if found or (_NAME.fullmatch(folder.name) and _has_files_of_a_run(folder)):
        yield folder, True
        return
    yield folder, False
    if depth:
        try:
            below = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))
        except OSError:
            return
        for name in below:
            yield from _folders(folder / name, depth - 1)


def _has_files_of_a_run(folder: Path) -> bool:
    return os.path.lexists(folder / "config.json") or bool(left_behind(folder))


def left_behind(folder: Path) -> list[str]:
    """The files of a run in a folder that has no ``config.json``: without it nobody knows what they are of."""
    if os.path.lexists(folder / "config.json"):
        return []
    return [name for name in ("result.json", "metrics.jsonl", WEIGHTS) if os.path.lexists(folder / name)]


def look_at(folder: Path) -> Found:
    """The state of the run in ``folder``; builds no model."""
    if files := left_behind(folder):
        return Found(folder, "damaged", f"{folder / 'config.json'} is missing, which says what {files[0]} is of")
    try:
        config = read_config(folder / "config.json")
        run, environment = config["run"], config.get("environment", {})
    except (OSError, ValueError) as error:
        return Found(folder, "damaged", str(error))
    found = Found(folder, "interrupted", run=run, environment=environment)
    try:
        epochs, seconds = _curve(folder)
        found = replace(found, epochs=epochs, seconds=seconds)
        if os.path.lexists(folder / "result.json"):
            result = read_json(folder / "result.json")
            check_record(result, folder / "result.json")
            return replace(found, state="finished", detail=_remarks(folder, result), result=result)
        diverged = divergence(folder)
    except (OSError, ValueError) as error:
        return replace(found, state="damaged", detail=str(error))
    writer, state = holder(folder), last_state(folder)
    where = _where(state) if state else "before its first checkpoint"
    if writer:
        return replace(found, state="being written", detail=f"by {writer}; saved {where}")
    if diverged:
        return replace(found, state="diverged", detail=diverged)
    return replace(found, detail=where)


def _damaged_results(folder: Path) -> Found | None:
    """The files of results in ``folder`` that are not as its manifest has them; None if all are, or it has none."""
    try:
        names: Sequence[str | None] = sorted(manifest.read(folder) or ())
    except (OSError, ValueError):
        names = [None]  # whatever it lists, it cannot be trusted
    if not any(name in names or os.path.lexists(folder / name) for name in RESULTS):
        return None
    faults = [fault for name in names if (fault := _fault(folder, name))]
    again = "The command that made these files writes them again."
    return Found(folder, "damaged", " ".join([*faults, again]), kind="results") if faults else None


def _fault(folder: Path, name: str | None) -> str:
    """What is wrong with a file that the manifest of ``folder`` lists, or (None) with that manifest; "" if nothing."""
    try:
        manifest.check(folder, None if name is None else [name])
    except (OSError, ValueError) as error:
        return f"{str(error).rstrip('.')}."
    return ""


def _where(state: Mapping[str, Any]) -> str:
    """A position, for people."""
    epoch, step = state.get("epoch"), state.get("step")
    return f"after epoch {epoch - 1}" if step == 0 and isinstance(epoch, int) else f"at epoch {epoch}, step {step}"


def _curve(folder: Path) -> tuple[int, float]:
    """Number of finished epochs, and the seconds of their training."""
    if not os.path.lexists(folder / "metrics.jsonl"):
        if os.path.lexists(folder / "result.json"):
            raise ValueError(f"{folder / 'metrics.jsonl'} is missing.")
        return 0, 0.0
    lines = read_curve(folder)
    return len(lines), sum(line["seconds"] for line in lines)


def _remarks(folder: Path, result: Mapping[str, Any]) -> str:
    """What is to be said of a finished run, "" where all its files are there as they were written.

    Raises:
        ValueError: a file is not whole, was changed or is missing.
    """
    weights = os.path.lexists(folder / WEIGHTS)
    if weights:
        tensor_count(folder / WEIGHTS)
    remarks = [] if weights else ["without its weights: in tables, but `predict` cannot use it"]
    if not check_files(folder, result):
        remarks.append("no manifest: a change of its numbers would not be noticed")
    return "; ".join(remarks)
