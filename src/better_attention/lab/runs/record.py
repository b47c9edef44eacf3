"""The files of a run as values: its configuration, the record of its results, its learning curve."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from better_attention.lab.files import parse_json, read_regular
from better_attention.lab.runs.json_file import read_json
from better_attention.lab.runs.name import RunName
from better_attention.lab.runs.provenance import changed

FORMAT = 1
"""Version of the format of ``config.json``."""
LARGEST_NUMBER = 1e100
"""Bound on a measured number, so that sums and squares of it are finite."""

# --- config.json ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RunConfig:
    """``config.json``: what was trained and how, which is compared when a run is continued, and where.

    Args:
        task, mechanism, heads, seed, settings: what was trained.
        description: all of it as plain values, see :meth:`~better_attention.lab.runs.job.Job.describe`.
        environment: command, commit and versions of packages; not compared.
        format: :data:`FORMAT` of the version that wrote it.
    """

    task: str
    mechanism: str
    heads: int
    seed: int
    settings: Mapping[str, Any]
    description: Mapping[str, Any]
    environment: Mapping[str, Any]
    format: object

    @classmethod
    def read(cls, path: Path) -> RunConfig:
        """The configuration in the file ``path``.

        Raises:
            ValueError: the file is damaged, or describes no run.
            OSError: it cannot be read.
        """
        content = read_json(path)
        if "run" not in content:
            raise ValueError(f"{path} describes no run: it lacks 'run'.")
        run, environment = content["run"], content.get("environment", {})
        if not isinstance(run, Mapping) or not isinstance(environment, Mapping):
            raise ValueError(f"{path} is damaged: it describes no run.")
        if "format" not in content:
            raise ValueError(f"{path} describes no run: it lacks 'format'.")
        for key, (kind, expected) in _DESCRIBED.items():
            # bool is a subclass of int in Python, so `true` would pass as a number.
            if not isinstance(run.get(key), kind) or isinstance(run[key], bool):
                raise ValueError(f"{path} is damaged: {key} must be {expected}, received {str(run.get(key))[:60]!r}.")
        return cls(
            *(run["task"], run["mechanism"], run["heads"], run["seed"], run["settings"]),
            description=run,
            environment=environment,
            format=content["format"],
        )

    @property
    def name(self) -> RunName:
        """The name of the run."""
        return RunName(self.mechanism, self.heads, self.seed)

    @property
    def written_by(self) -> str:
        """The version that wrote the file, as ``better-attention 0.1.0, commit 0123abc``."""
        versions = self.environment.get("versions")
        version = versions.get("better-attention") if isinstance(versions, Mapping) else None
        return f"better-attention {version or 'of unknown version'}, commit {self.environment.get('commit', 'unknown')}"

    def differences(self, now: Mapping[str, Any]) -> list[str]:
        """One line for each value in which the description of a job differs from this one.

        Keys that ``now`` does not have are not compared.
        """
        return differences({key: self.description.get(key) for key in now}, now)


def differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for each value in which two descriptions of runs differ; the title of a task decides nothing."""
    return [
        f"{key}: {old!r} there, {new!r} now" for key, old, new in changed(there, now) if key not in ("title", "source")
    ]


_DESCRIBED: Mapping[str, tuple[type, str]] = MappingProxyType(
    {
        "task": (str, "a text"),
        "mechanism": (str, "a text"),
        "heads": (int, "a whole number"),
        "seed": (int, "a whole number"),
        "settings": (dict, "an object"),
    }
)
"""The entries that every configuration has, and their kinds."""

# --- result.json ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """``result.json``: what came of a finished run.

    Accuracies are in per cent, BLEU in points; all of the weights with the best validation loss. An optional value is
    None where the task has no such measure, or where the version that wrote the record did not measure it.

    Args:
        task, scale, mechanism, heads, seed: what was trained.
        epochs, best_epoch: epochs that were trained, and the one with the best validation loss.
        epoch_seconds: mean training time of an epoch.
        commit: commit of the program that trained it.
        total_params: learned values of the model.
        times_as_fast: update time of the same model on ``torch.nn.MultiheadAttention`` over its own.
        departures: how the data differ from those of the task's source.
        model_sha256: digest of the weights.
        manifest: name of the file with the digests of all files.
        values: the whole record as plain values, as it stands in the file.
    """

    task: str
    scale: str
    mechanism: str
    heads: int
    seed: int
    epochs: int
    best_epoch: int
    epoch_seconds: float
    commit: str
    test_accuracy: float
    test_loss: float
    train_accuracy: float | None = None
    validation_accuracy: float | None = None
    test_bleu: float | None = None
    test_bits_per_character: float | None = None
    total_params: int | None = None
    times_as_fast: float | None = None
    departures: tuple[str, ...] = ()
    model_sha256: str | None = None
    manifest: str | None = None
    values: Mapping[str, Any] = field(repr=False)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> RunRecord:
        """The record with these plain values, which have been checked or were just measured."""
        known = {name: values[name] for name in _FIELDS if values.get(name) is not None}
        return cls(
            **known | {"times_as_fast": times_as_fast(values), "departures": tuple(map(str, _listed(values)))},
            values=values,
        )

    @classmethod
    def read(cls, path: Path) -> RunRecord:
        """The record in the file ``path``.

        Raises:
            ValueError: the file is damaged; names the entry that is missing or of another kind.
            OSError: it cannot be read.
        """
        values = read_json(path)
        for problem in _problems(values):
            raise ValueError(f"{path} is damaged: {problem}.")
        return cls.of(values)

    @property
    def name(self) -> RunName:
        """The name of the run."""
        return RunName(self.mechanism, self.heads, self.seed)


_FIELDS = tuple(f.name for f in fields(RunRecord) if f.name not in ("values", "times_as_fast", "departures"))


def times_as_fast(record: Mapping[str, Any]) -> Any:
    """A record's speed relative to the same model on ``torch.nn.MultiheadAttention``, above 1 is faster; None: unknown.

    Records of earlier versions have the ratio of the times instead, as ``epoch_ratio``: its inverse is returned.

    >>> times_as_fast({"times_as_fast": 2.0}), times_as_fast({"epoch_ratio": 0.5}), times_as_fast({})
    (2.0, 2.0, None)
    """
    if "times_as_fast" in record:
        return record["times_as_fast"]
    time = record.get("epoch_ratio")
    return 1 / time if isinstance(time, int | float) and not isinstance(time, bool) and time else time


def _listed(values: Mapping[str, Any]) -> list[object]:
    departures = values.get("departures")
    return departures if isinstance(departures, list) else []


def _problems(values: Mapping[str, Any]) -> Iterator[str]:
    """What keeps tables from showing a record: entries that are missing, and entries of another kind."""
    yield from (f"it lacks {key!r}" for key in _NEEDED if key not in values)
    for key, value in values.items():
        number = is_number(value)
        if (
            (key in _WHOLE and not (isinstance(value, int) and number))
            or (key in _TEXTS and not isinstance(value, str))
            or (key in _MAPPINGS and not isinstance(value, Mapping))
            or (_NUMBER.fullmatch(key) and not (number or (value is None and key not in _ALWAYS)))
        ):
            yield f"{key!r} is {str(value)[:60]!r}"


def is_number(value: object) -> bool:
    """Whether a JSON value is a number that can be computed with."""
    # NaN fails the comparison as well, so it is no number either.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST_NUMBER


_NEEDED = (
    *("test_accuracy", "epochs", "commit", "task", "scale", "mechanism", "heads", "seed"),
    *("test_loss", "best_epoch", "epoch_seconds"),
)
_WHOLE = frozenset(["heads", "seed", "epochs", "best_epoch", "total_params", "attention_params"])
_TEXTS = frozenset(["task", "scale", "mechanism", "score", "device", "commit"])
_MAPPINGS = frozenset(["settings", "samples", "versions"])
_ALWAYS = frozenset(f"{split}_{key}" for split in ("train", "validation", "test") for key in ("accuracy", "loss"))
_NUMBER = re.compile(
    r"(?:train|validation|test)_\w+|epoch_seconds|epoch_ratio|times_as_fast|waiting_share"
    r"|tokens_per_second|decoded_per_second|cache_bytes_per_token"
)

# --- metrics.jsonl ----------------------------------------------------------------------------------------------------


def read_curve(path: Path) -> list[dict[str, float]]:
    """The finished epochs in a ``metrics.jsonl``, one entry for each.

    Raises:
        ValueError: the file is damaged.
        OSError: it cannot be read.
    """
    content = read_regular(path)
    try:
        lines = [parse_json(line) for line in content.decode("utf-8").splitlines()]
    # A UnicodeDecodeError is a ValueError, too.
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}). Delete the folder {path.parent} and run again.") from None
    for line in lines:
        if not isinstance(line, Mapping) or not {"epoch", "seconds"} <= line.keys():
            raise ValueError(f"{path} is damaged: an epoch lacks its seconds or its number.")
        for key, value in line.items():
            if not is_number(value):
                raise ValueError(f"{path} is damaged: {key!r} of an epoch is {str(value)[:60]!r}.")
    return lines
