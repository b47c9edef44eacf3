"""Distillation: a converted model learns from the model that it was, layer by layer first, then by its outputs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from better_attention.conversion.revert import converted_layers
from better_attention.errors import check_float, check_int, describe
from better_attention.lab.runs import checkpoint

from .matching import OutputLoss, default_loss, hidden_losses, output_tensor, recorded, run, tokens_of
from .processes import make_accelerator
from .progress import DivergedError, Interrupted
from .randomness import derive, epoch_order, reseed

CHECKPOINT_SECONDS = 60.0
"""A crash loses at most the work of this many seconds."""
WARM_UP = 0.05
"""Share of the updates of a stage in which the learning rate rises; afterwards it falls to zero as a half cosine."""


@dataclass
class Distilled:
    """How a distillation went.

    Args:
        layers: the names of the converted layers.
        hidden: after each epoch of the first stage, the mean loss of each layer: squared difference to the teacher's
            output, divided by the square of that.
        output: after each epoch of the second stage, its mean loss.
    """

    layers: list[str]
    hidden: list[list[float]] = field(default_factory=list)
    output: list[float] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Everything as lists, dictionaries, texts and numbers."""
        return asdict(self)


def distil(
    student: nn.Module,
    teacher: nn.Module,
    data: Iterable[Any],
    *,
    hidden_epochs: int = 1,
    output_epochs: int = 1,
    lr: float = 5e-4,
    weight_decay: float = 0.01,
    loss: OutputLoss | None = None,
    temperature: float = 2.0,
    seed: int = 0,
    folder: str | Path | None = None,
    accelerator: Accelerator | None = None,
    progress: Callable[[int, int, float], None] = lambda step, steps, value: None,
    stop: Callable[[], bool] = lambda: False,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
) -> Distilled:
    """Train a converted model towards the one that it was converted from.

    First the outputs of the converted attention layers, all at once; then the outputs of the whole model. AdamW, on
    accelerate. In place: the student is on the accelerator's device afterwards.

    Args:
        student: a model with layers that :func:`better_attention.convert` replaced. Parameters that require a gradient
            are trained.
        teacher: the model before its conversion; it is not changed.
        data: batches: a list of what both models take, each a tensor, a tuple of arguments or a dict of keyword
            arguments. Where there is an ``attention_mask`` (B, L), only its tokens count.
        hidden_epochs: passes over the data in the first stage, towards the outputs of the attention layers.
        output_epochs: passes in the second stage, towards the output of the model.
        lr: largest learning rate.
        weight_decay: of AdamW.
        loss: a scalar from (student's result, teacher's result, batch) for the second stage; None for the
            divergence of the ``logits`` where there are some, otherwise the relative squared difference of the outputs.
        temperature: of the logits.
        seed: of the order of the batches and of dropout.
        folder: where to keep checkpoints. The same call continues there, with the same numbers as an uninterrupted one.
        accelerator: where to train; None for the GPU if there is one, and for all processes that were launched.
        progress: called after every update with (updates done, updates in all, loss).
        stop: called after every update; true saves and raises :class:`Interrupted`.
        checkpoint_seconds: time between checkpoints.

    Returns:
        The losses of every epoch.

    Raises:
        ValueError: nothing converted in the student, a teacher of another structure, no data, numbers out of range, a
            folder with another distillation.
        DivergedError: a loss is not finite.
        Interrupted: ``stop`` said so.
    """
    settings = Settings(
        check_int(hidden_epochs, "hidden_epochs", at_least=0),
        check_int(output_epochs, "output_epochs", at_least=0),
        check_float(lr, "lr", low=0.0),
        check_float(weight_decay, "weight_decay", low=0.0),
        check_float(temperature, "temperature", low=1e-3),
        check_int(seed, "seed", at_least=0),
    )
    work = Distillation(
        student,
        teacher,
        _batches(data),
        settings,
        loss or default_loss(temperature),
        None if folder is None else Path(folder),
        accelerator or make_accelerator("auto"),
        progress,
        stop,
        checkpoint_seconds,
    )
    return work.run()


@dataclass(frozen=True)
class Settings:
    """The numbers of a distillation, see :func:`distil`."""

    hidden_epochs: int
    output_epochs: int
    lr: float
    weight_decay: float
    temperature: float
    seed: int


def _batches(data: object) -> list[Any]:
    # A tensor, a dict or a text can be iterated over as well, but none of them is a list of batches.
    if isinstance(data, Tensor | Mapping | str) or not isinstance(data, Iterable):
        raise TypeError(f"data must be a list of batches of what the models take, received {describe(data)}.")
    batches = list(data)
    if not batches:
        raise ValueError("data holds no batches.")
    return batches


@dataclass
class Distillation:
    """One distillation in progress; :meth:`run` is the whole story."""

    student: nn.Module
    teacher: nn.Module
    batches: list[Any]
    settings: Settings
    loss: OutputLoss
    folder: Path | None
    accelerator: Accelerator
    progress: Callable[[int, int, float], None]
    stop: Callable[[], bool]
    checkpoint_seconds: float

    def __post_init__(self) -> None:
        self.layers = converted_layers(self.student)
        if not self.layers:
            raise ValueError(f"{type(self.student).__name__} has no converted layer: convert() it first.")
        # A layer that is used in two places has two names, and the conversion may have recorded either of them.
        there = {name for name, _ in self.teacher.named_modules(remove_duplicate=False)}
        missing = [name for name in self.layers if name not in there]
        if missing:
            raise ValueError(f"the teacher has no {missing[0]}: it must be the model that was converted.")
        if not any(p.requires_grad for p in self.student.parameters()):
            raise ValueError("nothing in the student requires a gradient: unfreeze what is to learn.")
        # All processes make the same number of updates, or they would wait for each other's gradients for ever. The
        # batches that remain are skipped; the order is drawn anew in every epoch, so they are not always the same.
        self.per_epoch = len(self.batches) // self.accelerator.num_processes
        if not self.per_epoch:
            raise ValueError(
                f"data holds fewer batches, {len(self.batches)}, than there are processes: "
                f"{self.accelerator.num_processes}."
            )
        self.result = Distilled(self.layers)
        self.totals = torch.zeros(len(self.layers))
        self.step = 0

    @property
    def stages(self) -> tuple[int, int]:
        """Updates of the first stage, and of both."""
        first = self.settings.hidden_epochs * self.per_epoch
        return first, first + self.settings.output_epochs * self.per_epoch

    def run(self) -> Distilled:
        """Continue where a checkpoint says, or start, and train to the end."""
        device = self.accelerator.device
        self.teacher_mode = self.teacher.training
        # Dropout in the teacher would only add noise to the targets.
        self.teacher.to(device).eval()
        self.parallel = self.accelerator.prepare(self.student)
        self.trained = [p for p in self.student.parameters() if p.requires_grad]
        # Before restore(), which also fills the moments of the optimiser.
        self.optimiser = self._new_optimiser()
        self.restore()
        self.parallel.train()
        self.saved_at = time.monotonic()
        while self.step < self.stages[1]:
            self.update()
        self.save()
        self.teacher.train(self.teacher_mode)
        return self.result

    def _new_optimiser(self) -> torch.optim.AdamW:
        return torch.optim.AdamW(self.trained, lr=self.settings.lr, weight_decay=self.settings.weight_decay)

    def update(self) -> None:
        """One update, and what follows from it."""
        first, last = self.stages
        if self.step == first and first:
            self.optimiser = self._new_optimiser()  # the second stage has another loss, and other moments
        hidden = self.step < first
        begin, end = (0, first) if hidden else (first, last)
        # Computed from the position and not by a scheduler, whose state would have to be in every checkpoint.
        for group in self.optimiser.param_groups:
            group["lr"] = self.settings.lr * schedule(self.step - begin, end - begin)
        losses = self.losses(hidden)
        loss = losses.mean()
        self.accelerator.backward(loss)
        if hidden:
            self.forget_unreached()
        numbers = losses.detach().cpu()
        # Checked before the step, which would carry a NaN into all the weights.
        if not bool(numbers.isfinite().all()):
            raise DivergedError(
                f"distillation: update {self.step + 1} of {last}: loss {float(numbers.mean())}. Try a lower lr."
            )
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.step += 1
        self.note(numbers, hidden)
        self.progress(self.step, last, float(numbers.mean()))
        stopped = self.stop()
        if stopped or time.monotonic() - self.saved_at >= self.checkpoint_seconds:
            self.save()
        # After the last update there is nothing left to interrupt.
        if stopped and self.step < last:
            raise Interrupted(f"distillation: saved after update {self.step} of {last}.")

    def losses(self, hidden: bool) -> Tensor:
        """The loss of each layer, or that of the outputs, on the batch of this process."""
        batch = self._batch()
        # Seeded by the position, so that a resumed distillation draws the dropout that it would have drawn anyway.
        reseed(
            self.accelerator.device,
            derive("distillation", self.settings.seed, self.step, self.accelerator.process_index),
        )
        with torch.no_grad(), recorded(self.teacher, self.layers if hidden else []) as wanted:
            teacher = run(self.teacher, batch)
        # The hooks sit on the plain model: the wrapper that shares gradients calls the same modules.
        with recorded(self.student, self.layers if hidden else []) as got:
            student = run(self.parallel, batch)
        if hidden:
            losses = hidden_losses(got, wanted, tokens_of(batch))
            several = self.accelerator.num_processes > 1
            # Processes that share gradients wait for one of every parameter, reached by the loss or not.
            return losses + 0.0 * output_tensor(student).sum() if several else losses
        return self.loss(student, teacher, batch)[None]

    def forget_unreached(self) -> None:
        """Take the gradients of zeros away, so that weight decay does not touch what the loss does not reach."""
        for parameter in self.trained:
            if parameter.grad is not None and not bool(parameter.grad.any()):
                parameter.grad = None

    def _batch(self) -> Any:
        epoch, number = divmod(self.step, self.per_epoch)
        # Every process computes the same order and takes its own entry of it, so nothing has to be exchanged.
        order = epoch_order(len(self.batches), self.settings.seed, epoch)
        mine = int(order[number * self.accelerator.num_processes + self.accelerator.process_index])
        return _moved(self.batches[mine], self.accelerator.device)

    def note(self, losses: Tensor, hidden: bool) -> None:
        """Add the losses of an update to those of its epoch, and close the epoch after its last one."""
        # The second stage has a single loss, which uses the first entry.
        self.totals[: len(losses)] += losses
        if self.step % self.per_epoch:
            return
        # On the accelerator's device, because NCCL reduces no tensors in main memory.
        means = (self.accelerator.reduce(self.totals.to(self.accelerator.device), "mean") / self.per_epoch).tolist()
        if hidden:
            self.result.hidden.append(means)
        else:
            self.result.output.append(means[0])
        self.totals.zero_()

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be of this distillation."""
        # Frozen parameters have no moments in a checkpoint, so which ones are frozen is a part of the identity.
        names = sorted(f"{n} {tuple(p.shape)} {p.requires_grad}" for n, p in self.student.named_parameters())
        return {
            "settings": asdict(self.settings),
            "layers": self.layers,
            "batches": len(self.batches),
            # It decides how many updates an epoch has, and which batch belongs to which update.
            "processes": self.accelerator.num_processes,
            "student": sha256("\n".join(names).encode()).hexdigest(),
        }

    def save(self) -> None:
        """Write a checkpoint, where there is a folder."""
        self.saved_at = time.monotonic()
        if self.folder is None or not self.accelerator.is_main_process:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"model.{name}": t for name, t in self.student.state_dict().items()}
        tensors |= {f"optimiser.{name}": t for name, t in checkpoint.optimiser_tensors(self.optimiser).items()}
        tensors["totals"] = self.totals
        state = {"identity": self.identity(), "step": self.step, "result": self.result.as_dict()}
        checkpoint.save(self.folder, tensors, state)

    def restore(self) -> None:
        """Load the last checkpoint, if there is one."""
        found = None if self.folder is None else checkpoint.load(self.folder)
        if found is None:
            return
        tensors, state = found
        known, mine = state["identity"], self.identity()
        if known != mine:
            other = ", ".join(key for key in mine if known.get(key) != mine[key])
            raise ValueError(f"{self.folder} holds another distillation (of other {other}): choose another folder.")
        self.student.load_state_dict(_part(tensors, "model."))
        self.step, self.totals = state["step"], tensors["totals"]
        self.result = Distilled(**state["result"])
        checkpoint.load_optimiser(self.optimiser, _part(tensors, "optimiser."))


def schedule(step: int, steps: int) -> float:
    """Share of the learning rate in update ``step`` of a stage: a rise, then a half cosine down to zero."""
    rise = max(1, round(WARM_UP * steps))
    if step < rise:
        # Neither 0 nor 1: the first update already learns, and the cosine begins with the full rate.
        return (step + 1) / (rise + 1)
    return 0.5 * (1.0 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    return tuple(_moved(value, device) for value in batch) if isinstance(batch, tuple | list) else batch
