"""The training loop: one run, from its initial weights or its last checkpoint to its record.

Everything random is a pure function of the position: the order of the samples of (seed, epoch), the dropout
of (seed, epoch, step). A run that was killed at any moment therefore continues in the middle of its epoch
and, on a CPU with the same number of threads, ends with the same bits. It runs on Hugging Face accelerate: on a CPU, a
GPU, or several processes, where each takes its share of every batch and the gradient is that of the whole
batch.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any, BinaryIO

import torch
from accelerate import Accelerator
from torch import Tensor

from better_attention.lab.files import digest, open_regular, same_file, write_atomic
from better_attention.lab.runs import checkpoint, manifest
from better_attention.lab.runs.folder import FILES, WEIGHTS, RunFolder
from better_attention.lab.runs.job import Job
from better_attention.lab.runs.json_file import json_text, read_json, write_json
from better_attention.lab.runs.provenance import commit, environment
from better_attention.lab.runs.record import RunRecord
from better_attention.lab.tasks.base import count
from better_attention.lab.tasks.splits import Splits
from better_attention.lab.training import sharding
from better_attention.lab.training.evaluation import evaluate, total
from better_attention.lab.training.launch import in_words, torchrun
from better_attention.lab.training.memory import peaks
from better_attention.lab.training.progress import DivergedError, Interrupted, Position
from better_attention.lab.training.randomness import drawing, epoch_order, initial_model
from better_attention.lab.training.step_time import Pace
from better_attention.layer.multihead import MultiheadAttention
from better_attention.text import plural

CHECKPOINT_SECONDS = 20.0
"""A crash loses at most the work of this many seconds."""


@dataclass
class Training:
    """One run in progress. :meth:`run` is the whole story; the methods below it are its steps, in order.

    Args:
        job: what is trained.
        splits: the data, on the accelerator's device.
        folder: the run's folder.
        accelerator: where it runs.
        command: the command line, for the record.
        progress: called after every update with the position and the number of updates of an epoch.
        stop: called after every update; true saves the run and raises :class:`Interrupted`.
        checkpoint_seconds: time between checkpoints; at the end of an epoch a tenth of it suffices.
        pace: the speed of the model as measured before training, for the record.
        shard: whether the model is spread over the processes, see :mod:`.sharding`.
    """

    job: Job
    splits: Splits
    folder: RunFolder
    accelerator: Accelerator
    command: str = ""
    progress: Callable[[Position, int], None] = lambda position, steps: None
    stop: Callable[[], bool] = lambda: False
    checkpoint_seconds: float = CHECKPOINT_SECONDS
    pace: Pace | None = None
    shard: bool = False
    best: dict[str, Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.task, self.main = self.job.task, self.accelerator.is_main_process

    def run(self) -> RunRecord:
        """Train, or continue where the run was interrupted, then test; a finished run is returned as it is.

        The test split is used once, after the weights of the epoch with the best validation loss are restored.

        Returns:
            The record of the run, as it stands in ``result.json``.

        Raises:
            DivergedError: a loss or gradient is not finite; raised before the update that it would spoil, and written
                to ``diverged.json``.
            Interrupted: ``stop`` said so.
            ValueError: the folder holds another run, or a finished one that was changed since it was written.
            OSError: the disk is full, for example; the last checkpoint is whole. Or the folder was deleted or replaced.
        """
        return self.open() or self.finish()

    def open(self) -> RunRecord | None:
        """Create the run's folder, or make sure that it is this run's; the record if the run is finished.

        Raises:
            ValueError: another run lies there, or this one was changed since it was written.
        """
        if self.main:
            device = self.accelerator.device.type
            self.folder.begin(self.job.describe(self.splits.digest, device), self.command)
            if not self.folder.is_finished:
                self.write_assets()
        # The others must not look at the folder before the first process has created and completed it.
        self.accelerator.wait_for_everyone()
        record = self.folder.record()
        if record is not None:
            self.folder.check_files(record)
            if self.main:
                checkpoint.clear(self.folder.path)  # a crash may have come right after the result
        return record

    def finish(self) -> RunRecord:
        """Train what is left, then test. The folder was opened before, see :meth:`open`."""
        # Kept open during training: the identity of this file is how check_folder() notices that the folder was
        # replaced.
        with open_regular(self.folder.path / "config.json") as config:
            return self.train(config)

    def train(self, config: BinaryIO) -> RunRecord:
        """Train what is left, then test.

        Args:
            config: the run's ``config.json``, open: as long as it is, no other file can be mistaken for it.
        """
        self.config = config
        self.restore()
        self.warm_up()
        try:
            while not self.position.finished(self.task):
                self.train_epoch()
                self.validate()
        except DivergedError as error:
            if self.main:
                self.write("diverged.json", json_text({"reason": str(error)}))
            raise
        self.restore_best()
        weights = checkpoint.tensor_bytes(self.best)
        record = self.measure() | {"model_sha256": sha256(weights).hexdigest(), "manifest": manifest.NAME}
        if self.main:
            self.write_curve()
            self.write(WEIGHTS, weights)
            text = json_text(record)
            # The record is not on the disk yet, so its digest comes from the text. The manifest must be there before
            # the record, because a run with a record counts as finished and is checked against its manifest.
            digests = {name: digest(self.folder.path / name) for name in FILES if name != "result.json"}
            digests["result.json"] = sha256(text.encode("utf-8")).hexdigest()
            manifest.write(self.folder.path, digests, make_folder=False)
            self.write("result.json", text)  # last: with it the run is finished
            checkpoint.clear(self.folder.path)
        self.accelerator.wait_for_everyone()
        return RunRecord.of(record)

    def write_assets(self) -> None:
        """``assets.json``, unless it is there already with the content that the data give it."""
        path = self.folder.path / "assets.json"
        try:
            known = read_json(path)
        # A damaged file is no obstacle, since the data give its content again.
        except (OSError, ValueError):
            known = None
        assets = self.task.stored(self.splits)
        # Compared as text, because JSON turns tuples into lists.
        if known is None or json_text(known) != json_text(assets):
            write_json(path, assets)

    def write(self, name: str, content: bytes | str) -> None:
        """Write a file of the run.

        Raises:
            OSError: it cannot be written, or the folder is no longer that of this run.
        """
        self.check_folder()
        write_atomic(self.folder.path / name, content, make_folder=False)

    def check_folder(self) -> None:
        """Refuse to go on where the folder was deleted, moved or replaced since this process opened it.

        Raises:
            OSError: it was.
        """
        if not same_file(self.config, self.folder.path / "config.json"):
            raise OSError(
                f"{self.folder.path} was deleted, moved or replaced while it was being trained: nothing more is saved "
                "there. Run the same command again; without its folder, the run starts anew."
            )

    def build(self) -> None:
        """Model and optimiser at their beginning: ``parallel`` is what computes with ``model``."""
        self.model = initial_model(self.task, self.job.variant, self.job.heads, self.job.seed)
        if self.shard:
            self.parallel = sharding.spread(self.model, self.accelerator)
            self.optimiser = sharding.optimiser_for_parts(self.task.make_optimiser(self.model))
        else:
            self.parallel, self.optimiser = self.accelerator.prepare(self.model, self.task.make_optimiser(self.model))

    def saved(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors and the state of the last checkpoint, if there is one."""
        if self.shard:
            return sharding.load(self.folder.path, self.model.state_dict(), list(self.model.parameters()))
        return checkpoint.load(self.folder.path)

    def restore_best(self) -> None:
        """Make ``model`` that of the best epoch, in one piece on each process."""
        if self.shard:
            self.best = sharding.all_whole(self.best)
            self.model = self.task.build(self.job.variant, self.job.heads).to(self.accelerator.device)
        self.model.load_state_dict(self.best)

    def restore(self) -> None:
        """Build model and optimiser, at the last checkpoint if there is one."""
        self.build()
        self.position = Position()
        self.best = {}
        self.saved_at = time.monotonic()
        with warnings.catch_warnings():
            if not self.main:  # the first process warns of a damaged one
                warnings.simplefilter("ignore")
            saved = self.saved()
        if saved is None:
            self.begin_session()
            return
        tensors, state = saved
        self.position = Position(**state)
        self.begin_session()
        if not self.main:  # the sums that were saved are those of all processes together
            self.position.loss = self.position.correct = 0.0
        self.best = {k: v.to(self.accelerator.device) for k, v in _below("best", tensors).items()}
        self.model.load_state_dict(_below("model", tensors))
        checkpoint.load_optimiser(self.optimiser, _below("optimiser", tensors))

    def begin_session(self) -> None:
        """Record where the run continues, and warn if that changes the last bits of its result."""
        sessions, threads = self.position.sessions, torch.get_num_threads()
        session = {"commit": commit(), "threads": threads, "processes": self.accelerator.num_processes}
        before, processes = (sessions[-1][key] if sessions else session[key] for key in ("threads", "processes"))
        # A session like the one before adds nothing that a reader of the record could use.
        if not sessions or sessions[-1] != session:
            sessions.append(session)
        if processes != session["processes"] and self.main:
            warnings.warn(
                f"{self.folder.path}: trained by {in_words(processes)} so far, continues with "
                f"{session['processes']}. {self.what_processes_change} "
                f"Start it with `{torchrun(processes)} ...` to reproduce it.",
                stacklevel=2,
            )
        # Sums on a GPU do not depend on the number of CPU threads.
        if before != threads and self.main and self.accelerator.device.type == "cpu":
            warnings.warn(
                f"{self.folder.path}: trained with {plural(before, 'thread')} so far, continues with {threads}. "
                "Floating-point sums depend on the number of threads, so the result will differ in the last bits from "
                f"an uninterrupted run. Set OMP_NUM_THREADS={before} to reproduce it exactly.",
                stacklevel=2,
            )

    @property
    def what_processes_change(self) -> str:
        """Why another number of processes gives another result, as a sentence."""
        if self.accelerator.device.type == "cpu":
            return "Floating-point sums are rounded differently, so the result will differ in the last digits."
        return (
            "Each process draws its own dropout, and floating-point sums are rounded differently, so the result will "
            "differ from an uninterrupted run."
        )

    def warm_up(self) -> None:
        """One forward and backward pass without an update, so that no epoch's seconds include one-time costs."""
        batch = slice(self.task.batch_size)
        self.parallel.train()
        # What augmentation and dropout draw here has no consequences: the generators are seeded anew before each
        # update.
        inputs, targets = self.splits.train.batch(batch)
        logits = self.parallel(self.task.augment(inputs))
        self.accelerator.backward(self.task.losses(logits, targets).sum())
        self.optimiser.zero_grad()

    def train_epoch(self) -> None:
        """The updates of an epoch that are still to be done."""
        task, position, train = self.task, self.position, self.splits.train
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        steps = task.epoch_updates_of(len(train))
        order = epoch_order(len(train), self.job.seed, position.epoch).to(train.inputs.device)
        self.parallel.train()
        while position.step < steps:
            began = time.perf_counter()
            batch = order[position.step * task.batch_size : (position.step + 1) * task.batch_size]
            # In a short last batch a process may get no sample at all. It takes part nevertheless, with a loss of zero.
            mine = batch[rank::processes]
            place = (self.job.seed, position.epoch, position.step)
            with drawing(self.accelerator.device, place, rank, processes):
                inputs, targets = train.batch(mine)
                inputs = task.augment(inputs)
                ready = time.perf_counter()
                logits = self.parallel(inputs)
                loss = task.losses(logits, targets).sum()
                # Processes average their gradients: scaled like this, the average is that of the whole batch.
                self.accelerator.backward(loss * (processes / len(batch)))
            # Taken after backward(), when the gradients are those of the whole batch. The norm is finite only if all of
            # them are.
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
            norm = sharding.whole(norm)
            correct = task.correct(logits.detach(), targets).sum()
            numbers = torch.stack([loss.detach(), norm, correct.to(norm.dtype)]).tolist()  # one wait for the device
            due = time.monotonic() - self.saved_at >= self.checkpoint_seconds
            # One exchange answers all three questions. Clocks and signals differ between processes, but they must act
            # alike.
            failed, due, stopped = self.any_process(not all(map(math.isfinite, numbers)), due, self.stop())
            if failed:
                raise DivergedError(
                    f"{self.folder.path.name}: epoch {position.epoch}, step {position.step + 1} of {steps}: loss "
                    f"{numbers[0] / max(1, len(mine))}, gradient norm {numbers[1]}. The run was stopped before the "
                    f"update; its last checkpoint is kept. Try a lower --lr (it was {task.lr})."
                )
            # Set anew before each update, as a function of its number: nothing of it needs to be saved.
            rate = task.learning_rate((position.epoch - 1) * steps + position.step, task.epochs * steps)
            for group in self.optimiser.param_groups:
                group["lr"] = rate
            self.optimiser.step()
            self.optimiser.zero_grad()
            position.step += 1
            position.loss += numbers[0]
            position.correct += numbers[2]
            position.seconds += time.perf_counter() - began
            position.waiting += ready - began
            self.progress(position, steps)
            # After the last update of an epoch, validate() decides about a checkpoint.
            if stopped or (due and position.step < steps):
                self.save()
            if stopped:
                raise Interrupted(
                    f"{self.folder.path.name}: saved in epoch {position.epoch} after step {position.step}."
                )

    def validate(self) -> None:
        """Close the epoch: its line of the curve, its weights if they are the best so far, a checkpoint."""
        position = self.position
        loss, correct = self.total(position.loss, position.correct)
        # The last batch of a whole epoch may be short.
        samples = min(len(self.splits.train), position.step * self.task.batch_size)
        validation = evaluate(self.accelerator, self.model, self.task, self.splits.validation)
        if not math.isfinite(validation["loss"]):
            raise DivergedError(
                f"{self.folder.path.name}: epoch {position.epoch}: validation loss {validation['loss']}."
            )
        position.curve.append(
            {
                "epoch": position.epoch,
                "train_loss": loss / samples,
                "train_accuracy": 100 * correct / samples,
                "validation_loss": validation["loss"],
                "validation_accuracy": validation["accuracy"],
                "seconds": position.seconds,
                "waiting": position.waiting,
            }
        )
        if validation["loss"] < position.best_loss:
            position.best_epoch, position.best_loss = position.epoch, validation["loss"]
            # A copy, because the optimiser changes the parameters in place.
            self.best = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        position.epoch += 1
        position.step, position.loss, position.correct = 0, 0.0, 0.0
        position.seconds = position.waiting = 0.0
        due = time.monotonic() - self.saved_at >= self.checkpoint_seconds / 10
        if self.any_process(due)[0] or position.finished(self.task):
            self.save()

    def save(self) -> None:
        """Write a checkpoint and the curve."""
        # A collective operation: all processes call save() after the same update, or this line waits for ever.
        loss, correct = self.total(self.position.loss, self.position.correct)
        state = asdict(self.position) | {"loss": loss, "correct": correct}
        if not self.best:
            del state["best_loss"]  # infinite, which JSON does not know
        if self.shard:
            self.check_folder()
            sharding.save(self.folder.path, self.tensors(), state, self.accelerator)
        if self.main:
            if not self.shard:
                self.check_folder()
                checkpoint.save(self.folder.path, self.tensors(), state)
            (self.folder.path / "diverged.json").unlink(missing_ok=True)  # training is past that point now
            self.write_curve()
        self.saved_at = time.monotonic()

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of model and optimiser."""
        tensors = {f"model.{name}": t for name, t in self.model.state_dict().items()}
        # Beside the current weights, because the best epoch may lie behind by as many epochs as the patience allows.
        tensors |= {f"best.{name}": t for name, t in self.best.items()}
        return tensors | {f"optimiser.{name}": t for name, t in checkpoint.optimiser_tensors(self.optimiser).items()}

    def write_curve(self) -> None:
        """``metrics.jsonl``: the finished epochs."""
        self.write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in self.position.curve))

    def measure(self) -> dict[str, Any]:
        """Evaluate the restored weights on every split: the plain values of ``result.json``."""
        parts = {name: getattr(self.splits, name) for name in ("train", "validation", "test")}
        metrics = {name: evaluate(self.accelerator, self.model, self.task, split) for name, split in parts.items()}
        self.model.eval()
        with torch.inference_mode():
            more = {name: self.task.scores(self.model, parts[name], self.splits.assets) for name in ("train", "test")}
        seconds, waiting = (sum(line[key] for line in self.position.curve) for key in ("seconds", "waiting"))
        epoch_seconds = seconds / len(self.position.curve)
        figures = {name: self.task.figures(name, metrics[name]["loss"], self.splits.assets) for name in parts}
        with torch.inference_mode():
            costs = self.task.costs(self.model, self.splits, epoch_seconds)
        attention = next(m for m in self.model.modules() if isinstance(m, MultiheadAttention))
        where = environment(self.command)
        return {
            "task": self.task.name,
            "scale": self.task.scale,
            "mechanism": self.job.variant.name,
            "score": self.job.variant.mechanism.score,
            "heads": self.job.heads,
            "seed": self.job.seed,
            "settings": self.task.settings(),
            **{f"{name}_{key}": value for name, values in metrics.items() for key, value in values.items()},
            **{f"{name}_{key}": more[name].get(key) for name in more for key in ("top5", "bleu")},
            **{f"{name}_{key}": value for name, values in figures.items() for key, value in values.items()},
            "attention_params": count(attention),
            "total_params": count(self.model),
            "epoch_seconds": epoch_seconds,
            "waiting_share": waiting / seconds,
            "times_as_fast": self.pace.times_as_fast if self.pace else None,
            **costs,
            "epochs": len(self.position.curve),
            "best_epoch": self.position.best_epoch,
            "samples": self.splits.sizes,
            **({"departures": list(self.splits.departures)} if self.splits.departures else {}),
            "device": self.accelerator.device.type,
            "processes": self.accelerator.num_processes,
            **({"peak_memory_bytes": peaks(self.accelerator)} if self.accelerator.num_processes > 1 else {}),
            **({"shard": "fsdp"} if self.shard else {}),
            **{key: where[key] for key in ("threads", "commit", "command", "versions")},
            # The entries above describe the last session only; list all sessions of a run that was interrupted.
            **({"sessions": self.position.sessions} if len(self.position.sessions) > 1 else {}),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def any_process(self, *flags: bool) -> list[bool]:
        """Each flag, true on every process if it is true on one, so that all of them decide alike."""
        return [n > 0 for n in self.total(*map(float, flags))]

    def total(self, *values: float) -> list[float]:
        """The sum of each value over the processes."""
        return total(self.accelerator, *values)


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(f"{prefix}."): t for n, t in tensors.items() if n.startswith(f"{prefix}.")}
