"""A converted model on disk learns from the model that it was, on that model's own data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from better_attention.lab.runs import checkpoint
from better_attention.lab.trained.convert import Accuracy, read_story, write
from better_attention.lab.trained.model import Trained
from better_attention.lab.trained.samples import Samples
from better_attention.lab.training.distillation import Distilled, distil
from better_attention.lab.training.interruption import Stop
from better_attention.lab.training.launch import is_first
from better_attention.lab.training.processes import make_accelerator
from better_attention.lab.training.progress import Interrupted

CHECKPOINTS = "checkpoints"
"""Folder inside that of the result, while the distillation is in progress."""


@dataclass(frozen=True)
class Settings:
    """How to distil, see :func:`better_attention.distil`.

    Args:
        hidden_epochs, output_epochs, lr, seed: as there.
        samples: training samples to learn from; None: all of them.
        batch_size: samples of an update.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"mps"``.
    """

    hidden_epochs: int = 1
    output_epochs: int = 2
    lr: float = 1e-3
    seed: int = 0
    samples: int | None = None
    batch_size: int = 64
    device: str = "auto"


def check_pair(student: Trained, teacher: Trained) -> None:
    """Refuse a teacher that is not the model that was converted.

    Raises:
        ValueError: says what is wrong with the pair.
    """
    if not student.converted:
        raise ValueError(f"{student.path} is not a converted model: `better-attention convert` makes one of a run.")
    if teacher.converted:
        raise ValueError(f"{teacher.path} is a converted model itself: --teacher expects the run that was converted.")
    ours, theirs = student.origin.identity, teacher.origin.identity
    keys = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    if keys:
        raise ValueError(
            f"{student.path} was not made from {teacher.path}: {', '.join(keys[:5])} differ. --teacher expects the "
            "model that was converted."
        )


def distil_trained(
    student: Trained,
    teacher: Trained,
    samples: Samples,
    settings: Settings,
    out: Path,
    progress: Callable[[int, int, float], None],
    command: str,
) -> tuple[Distilled, Accuracy]:
    """Distil, and write the student to ``out`` as a converted model; interrupted, it continues there.

    Args:
        student, teacher: a pair that :func:`check_pair` accepts.
        samples: of the teacher.
        settings: how.
        out: folder for the result, and for checkpoints until then.
        progress: called after every update with (updates done, updates in all, loss).
        command: the command line, for the record.

    Returns:
        The losses of every epoch, and the accuracy before and after.

    Raises:
        Interrupted: a signal arrived; everything is saved.
        DivergedError: a loss was not finite.
        ValueError: settings out of range, or checkpoints of another distillation.
    """
    story = read_story(student.path)
    before = samples.accuracy(student.model)
    stop = Stop()
    try:
        with stop.listening():
            result = distil(
                student.model,
                teacher.model,
                samples.train(settings.samples, settings.batch_size),
                hidden_epochs=settings.hidden_epochs,
                output_epochs=settings.output_epochs,
                lr=settings.lr,
                loss=samples.loss,
                seed=settings.seed,
                folder=out / CHECKPOINTS,
                accelerator=make_accelerator(settings.device),
                progress=progress,
                stop=stop,
            )
    except Interrupted as error:
        error.signal = stop.signal or error.signal
        raise
    student.model.cpu().eval()
    accuracy = Accuracy(before, samples.accuracy(student.model))
    if is_first():
        record = {"command": command, "settings": asdict(settings), "losses": result.as_dict()}
        write(student, student.model, out, story | {"distillation": record | {"accuracy": asdict(accuracy)}})
        checkpoint.clear(out / CHECKPOINTS)
        (out / CHECKPOINTS).rmdir()
    return result, accuracy
