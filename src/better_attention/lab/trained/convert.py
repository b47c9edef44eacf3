"""A trained model with another mechanism: converted, judged before and after, and written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from better_attention.conversion.convert import convert
from better_attention.conversion.recipe import RECIPE, WEIGHTS, save_converted
from better_attention.conversion.report import ConversionReport
from better_attention.lab.runs import manifest
from better_attention.lab.runs.json_file import read_json, write_json
from better_attention.lab.runs.overwrite_guard import check_output
from better_attention.lab.runs.snapshot import Snapshot
from better_attention.lab.trained.model import Trained
from better_attention.lab.trained.origin import RunOrigin
from better_attention.lab.trained.samples import Samples
from better_attention.mechanism import Mechanism

STORY = "conversion.json"
FILES = (RECIPE, WEIGHTS, STORY)
"""What is written into the folder of a converted model, beside ``origin/``."""
FORMAT = 1


@dataclass(frozen=True)
class Settings:
    """How to convert, see :func:`better_attention.convert`.

    Args:
        exact: refuse what would only be an approximation.
        calibrate: training samples to measure errors and fit approximations on; 0: none.
        max_len: size of a new W_A; None: the length of a run's inputs.
        layers: which attention layers; None: all.
        align_causal: keep a new W_A triangular; None: what the layer says of itself.
    """

    exact: bool = True
    calibrate: int = 0
    max_len: int | None = None
    layers: tuple[str | int, ...] | None = None
    align_causal: bool | None = None


@dataclass(frozen=True)
class Accuracy:
    """Accuracy on the test split in per cent, before and after; None where there is no test split."""

    before: float | None
    after: float | None


def convert_trained(
    trained: Trained, mechanism: str, settings: Settings, samples: Samples | None
) -> tuple[ConversionReport, Accuracy]:
    """Convert the model of ``trained`` in place.

    Args:
        trained: a run or a model of transformers.
        mechanism: a name.
        settings: how.
        samples: of the model; needed for a calibration.

    Returns:
        What became of each tensor and layer, and the accuracy before and after.

    Raises:
        ValueError: the model was converted before, or cannot be, or not exactly.
    """
    if trained.converted:
        raise ValueError(f"{trained.path} is a converted model: convert the model that it came from.")
    target = Mechanism.of(mechanism)
    if settings.calibrate and samples is None:
        raise ValueError("a calibration needs samples: name a file with one text in each line with --texts.")
    batches = samples.train(settings.calibrate) if samples and settings.calibrate else None
    # Measured first, because the conversion changes the model in place.
    before = samples.accuracy(trained.model) if samples else None
    report = convert(
        trained.model,
        target,
        layers=settings.layers,
        max_len=_max_len(trained, target, settings.max_len),
        align_causal=settings.align_causal,
        exact=settings.exact,
        calibration=batches,
        keep_original=False,
    )
    return report, Accuracy(before, samples.accuracy(trained.model) if samples else None)


def _max_len(trained: Trained, target: Mechanism, given: int | None) -> int | None:
    # W_A needs a size, and a task has inputs of one length.
    if given is None and target.aligned and isinstance(trained.origin, RunOrigin):
        return trained.origin.task.length
    return given


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds something else than a converted model, before any work is done.

    Raises:
        ValueError: says what it holds.
    """
    check_output(folder, (STORY, RECIPE, WEIGHTS), is_story)
    if runs := list(Snapshot.read(folder).runs):
        raise ValueError(
            f"{folder} holds runs ({runs[0]}{', ...' if runs[1:] else ''}), and a converted model has a folder of its "
            f"own: name another with --out, such as {folder / 'converted'}."
        )


def is_story(value: object) -> bool:
    """Whether the value in a JSON file is what :func:`write` writes."""
    return isinstance(value, Mapping) and "conversion" in value and "accuracy" in value


def write(trained: Trained, model: nn.Module, folder: Path, story: Mapping[str, Any]) -> None:
    """Write a converted model: recipe, weights, what it was built from, and how it came about.

    Args:
        trained: what was converted.
        model: the converted model.
        folder: where to; an earlier converted model in it is replaced.
        story: plain values, see :func:`story_of`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # The manifest would be wrong until all files are written.
    manifest.remove(folder, FILES)
    with torch.no_grad():
        save_converted(model.cpu(), folder)
    trained.origin.copy(folder)
    write_json(folder / STORY, story)
    manifest.add(folder, FILES)


def story_of(
    mechanism: str, settings: Settings, report: ConversionReport, accuracy: Accuracy, command: str
) -> dict[str, Any]:
    """How a converted model came about, as plain values."""
    return {
        "format": FORMAT,
        "command": command,
        "mechanism": mechanism,
        "calibration_samples": settings.calibrate,
        "accuracy": {"before": accuracy.before, "after": accuracy.after},
        "conversion": report.as_dict(),
    }


def read_story(folder: Path) -> dict[str, Any]:
    """What :func:`write` was given.

    Raises:
        ValueError: it is damaged.
        OSError: it cannot be read.
    """
    story = read_json(folder / STORY)
    if not is_story(story) or story.get("format") != FORMAT:
        raise ValueError(f"{folder / STORY} is damaged, or of another version of better-attention.")
    return story
