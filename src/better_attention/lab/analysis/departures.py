"""In what a run departs from the paper's: settings, numbers of samples, data."""

from __future__ import annotations

from collections.abc import Mapping

from better_attention.lab import published
from better_attention.lab.analysis.study import Record
from better_attention.lab.tasks.catalogue import TASKS

_NO_OUTCOME = frozenset(
    {"name", "title", "source", "scale", "heads", "default_heads", "seeds", "threads", "equal_params"}
)
"""Settings that decide nothing in a run of given heads and seed; equal_params chooses the table."""


def departures_of(record: Record) -> tuple[str, ...]:
    """Sentences on what sets a run apart from the paper's, empty where nothing does or the record does not tell.

    Args:
        record: one run, as in ``results.json``.
    """
    task, settings, unlike = str(record["task"]), record.get("settings"), record.get("departures")
    data = tuple(map(str, unlike)) if isinstance(unlike, list) else ()
    if not isinstance(settings, Mapping) or not published.rows(task):
        return data
    return (*not_the_papers(task, settings, record.get("samples")), *data)


def not_the_papers(task: str, settings: Mapping[str, object], samples: object) -> tuple[str, ...]:
    """One sentence on the settings that are not the paper's, or none.

    Args:
        task: name of a task that the paper has.
        settings: of the task.
        samples: name of a split -> how many it has; anything else is unknown.
    """
    changed = changed_settings(task, settings)
    # These settings imply another number of samples, which need not be said twice.
    if "train_samples" not in changed and "test_samples" not in changed:
        changed |= other_samples(task, samples)
    return (f"the setting is not the paper's: {told(task, changed)}",) if changed else ()


def changed_settings(task: str, settings: Mapping[str, object]) -> dict[str, object]:
    """The settings that differ from those of the paper's scale."""
    theirs: Mapping[str, object] = TASKS[task]("paper").settings() if task in TASKS else {}
    # A setting that the task no longer has cannot be compared.
    return {key: value for key, value in settings.items() if key not in _NO_OUTCOME and theirs.get(key, value) != value}


def other_samples(task: str, samples: object) -> dict[str, object]:
    """``{"samples": ...}`` where the splits together have another number of samples than the paper's data.

    Args:
        task: name of the task.
        samples: name of a split -> how many it has; anything else is unknown.
    """
    theirs = published.SAMPLES.get(task)
    counts = list(samples.values()) if isinstance(samples, Mapping) else []
    if theirs is None or not counts or not all(isinstance(count, int) for count in counts) or sum(counts) == theirs:
        return {}
    return {"samples": sum(counts)}


def told(task: str, changed: Mapping[str, object]) -> str:
    """Changed settings in words: ``epochs=1, 28,891 samples instead of 3,650,000``."""
    return ", ".join(
        f"{value:,} samples instead of {published.SAMPLES[task]:,}" if key == "samples" else f"{key}={value}"
        for key, value in changed.items()
    )
