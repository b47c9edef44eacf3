"""Climbing a ladder: train the cells that are worth trying, rung by rung, and record the result of each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import product

import torch
from accelerate import Accelerator

from better_attention.costs import cost
from better_attention.lab.ladder.grid import (
    FILES,
    GIVE_UP,
    Cell,
    Ladder,
    Rung,
    RungResult,
    Setting,
    below,
    best_settings,
    is_ladder,
    softmax_twin,
)
from better_attention.lab.lock import locked
from better_attention.lab.runs import manifest
from better_attention.lab.runs.job import Job
from better_attention.lab.runs.overwrite_guard import check_output
from better_attention.lab.runs.record import RunRecord
from better_attention.lab.runs.snapshot import Snapshot
from better_attention.lab.tasks.base import Task
from better_attention.lab.tasks.recurrence import RecurrenceTask
from better_attention.lab.tasks.splits import Splits
from better_attention.lab.tasks.variant import Variant
from better_attention.lab.training.events import Began, Ended, Estimated, Failed, Notify, Updated, ignore
from better_attention.lab.training.interruption import Stop
from better_attention.lab.training.loop import Training
from better_attention.lab.training.processes import limited_threads, make_accelerator, watching_peers
from better_attention.lab.training.progress import DivergedError, Interrupted
from better_attention.lab.training.step_time import Measure, Pace, measure


@dataclass
class Climb:
    """A ladder in progress: the results so far, and what is still worth trying.

    Args:
        ladder: what is climbed.
        notify: called with every event.
        measure: finds the speed of each model before it is trained.
        rows: results of the cells that were run, in their order.
        notes: what is to be known of the data of each rung.
        paces: speeds of the models that were trained.
    """

    ladder: Ladder
    notify: Notify = ignore
    measure: Measure = measure
    rows: list[RungResult] = field(default_factory=list)
    notes: dict[Rung, str] = field(default_factory=dict)
    paces: dict[tuple[Task, Variant], Pace] = field(default_factory=dict)

    def run(self) -> Iterator[Rung]:
        """Train what is not yet trained; yields each rung when all its cells are done.

        Raises:
            ValueError: a folder holds another run; a model cannot be built.
            Interrupted: a signal arrived; everything is saved.
            PeerLostError: another process of the launch has ended.
        """
        ladder = self.ladder
        # A folder with runs of a ladder belongs to this command even before it holds results.
        begun = ladder.out.is_dir() and any(ladder.folder(cell).has_config for cell in ladder.cells)
        check_output(ladder.out, (*FILES, manifest.NAME), is_ladder, known=begun)
        if names := list(Snapshot.read(ladder.out).runs):
            raise ValueError(f"{ladder.out} holds runs of a comparison ({names[0]}): choose another --out.")
        accelerator = make_accelerator(ladder.device)
        self.check_models()
        stop = Stop(self.notify)
        with watching_peers(accelerator.num_processes, ladder.command), limited_threads(ladder.task.threads):
            self.estimate(accelerator)  # nothing needs to be saved yet: a signal ends it at once
            with stop.listening():
                for rung in ladder.rungs:
                    splits = ladder.task_of(rung, ladder.settings[0]).load().to(accelerator.device)
                    # The last note is the overlap of the splits; the others are the same on every rung.
                    self.notes[rung] = splits.notes[-1]
                    # Seeds outermost: when screening, the later ones run only the settings that seed 0 found best.
                    for seed in range(ladder.seeds):
                        for cell in self.worth_trying(rung, seed):
                            self.rows.append(self.train(cell, splits, accelerator, stop))
                    accelerator.free_memory()  # it keeps every model that it has prepared
                    yield rung

    def check_models(self) -> None:
        """Build models, so that what cannot be built is refused before hours of training.

        Of all that the grid varies, variant and positions alone are refused by a model: one of each is enough. It is
        as small as the task's width; on the device "meta" the first one would make torch import its compiler.

        Raises:
            ValueError: heads that do not divide the width, for example.
        """
        ladder = self.ladder
        kinds = {setting.positions: setting for setting in ladder.settings}.values()
        with torch.random.fork_rng(devices=[]):
            for setting, variant in product(kinds, ladder.variants):
                ladder.task_of(ladder.rungs[-1], replace(setting, layers=1)).build(variant, ladder.heads)

    def worth_trying(self, rung: Rung, seed: int) -> list[Cell]:
        """The cells of a rung and a seed, except those that are given up or, when screening, were not the best."""
        pairs = list(product(self.ladder.settings, self.ladder.variants))
        pairs = [(s, v) for s, v in pairs if not self.given_up(rung, s, softmax_twin(v))]
        if self.ladder.screen and seed > 0:
            best = best_settings(row for row in self.rows if row.rung == rung)
            pairs = [(s, v) for s, v in pairs if best.get((v.name, rung)) == s]
        return [Cell(rung, setting, variant, seed) for setting, variant in pairs]

    def given_up(self, rung: Rung, setting: Setting, twin: str) -> bool:
        """Whether a setting has failed too often below this rung, with either score: pairs stay whole."""
        tried: dict[Rung, bool] = {}
        for row in self.rows:
            if (row.setting, row.twin) == (setting, twin) and row.rung != rung and below(row.rung, rung):
                tried[row.rung] = tried.get(row.rung, False) or row.updates_to_target is not None
        return sum(not solved for solved in tried.values()) >= GIVE_UP

    def train(self, cell: Cell, splits: Splits, accelerator: Accelerator, stop: Stop) -> RungResult:
        """Train one cell, or read the result of an earlier command."""
        ladder, folder, job = self.ladder, self.ladder.folder(cell), self.ladder.job(cell)
        name = str(folder.path.relative_to(ladder.out))
        self.notify(Began(name, len(self.rows) + 1, len(ladder.cells)))
        if stop():  # training does so after each update, but a finished run makes none
            stopped = Interrupted("Every run so far is saved.")
            stopped.signal = stop.signal or stopped.signal
            raise stopped
        # Only the first process writes, so it holds the lock for all of them.
        with locked(folder.path) if accelerator.is_main_process else nullcontext():
            training = Training(
                *(job, splits, folder, accelerator),
                command=ladder.command,
                pace=None if folder.is_finished else self.pace(job, splits, accelerator, stop),
                progress=lambda position, steps: self.notify(Updated(position, steps)),
                stop=stop,
            )
            try:
                record = training.run()
            except DivergedError as error:
                self.notify(Failed(name, error))
                return row_of(ladder, cell, None, [])
            except Interrupted as error:
                error.signal = stop.signal or error.signal
                raise
        self.notify(Ended(name, record))
        if record.times_as_fast is None:  # written by an older version; the model is the same
            record = replace(record, times_as_fast=self.pace(job, splits, accelerator, stop).times_as_fast)
        return row_of(ladder, cell, record, folder.curve())

    def pace(self, job: Job, splits: Splits, accelerator: Accelerator, stop: Stop) -> Pace:
        """The speed of a model, measured when it is first needed."""
        model = job.task, job.variant
        if model not in self.paces:
            self.paces[model] = self.measure(*(job.task, splits, job.variant, job.heads, accelerator.device), stop=stop)
        return self.paces[model]

    def estimate(self, accelerator: Accelerator) -> None:
        """Report an upper bound of the time: every update is made, nothing is given up, nothing solved early.

        Between the shortest and the longest sequences the time is at most linear in the length. The kind of position
        encoding makes little difference: rotary positions, which cost most, stand for the others. Screening leaves one
        setting; the slowest is counted.
        """
        ladder = self.ladder
        begun = ladder.out.is_dir()
        ended = {cell: begun and ladder.folder(cell).is_finished for cell in ladder.cells}
        # A finished run of a later seed shows which setting was chosen there, so its rivals will not be trained.
        chosen = {(c.rung, c.variant, c.seed) for c, done in ended.items() if done and ladder.screen and c.seed > 0}
        waiting = [c for c, done in ended.items() if not done and (c.rung, c.variant, c.seed) not in chosen]
        if not waiting:
            return
        delays = [cell.rung[1] for cell in waiting]
        shortest, longest = min(delays), max(delays)
        ends = [self.run_seconds(waiting, delay, accelerator) for delay in dict.fromkeys((shortest, longest))]
        slowest: dict[object, float] = {}
        for cell in waiting:
            # Where all delays are equal there is one end, which then stands for both.
            low, high = (seconds[cell.variant, cell.setting.layers] for seconds in (ends[0], ends[-1]))
            share = (cell.rung[1] - shortest) / max(1, longest - shortest)
            screened = ladder.screen and cell.seed > 0  # one setting will be left
            run = (cell.rung, cell.variant, cell.seed, None if screened else cell.setting)
            slowest[run] = max(slowest.get(run, 0.0), low + share * (high - low))
        self.notify(Estimated(sum(slowest.values()), len(slowest)))

    def run_seconds(
        self, waiting: Sequence[Cell], delay: int, accelerator: Accelerator
    ) -> dict[tuple[Variant, int], float]:
        """Seconds of a run with the largest N, by variant and depth.

        Every variant is measured at the greatest depth, the first one at the others as well: what a block adds is much
        the same for all.
        """
        modulus = max(cell.rung[0] for cell in waiting)
        positions = max((cell.setting.positions for cell in waiting), key=lambda name: name == "rotary")
        variants = list(dict.fromkeys(cell.variant for cell in waiting))
        depths = sorted({cell.setting.layers for cell in waiting})

        def seconds(variant: Variant, layers: int) -> float:
            task = self.ladder.task_of((modulus, delay), Setting("sqrt", positions, layers))
            # The time of an update does not depend on how many batches there are, so one batch of data suffices.
            small = replace(task, train_samples=min(task.train_samples or 1, task.batch_size), test_samples=1)
            splits = small.load().to(accelerator.device)
            found = self.measure(task, splits, variant, self.ladder.heads, accelerator.device, quick=True)
            held_out = task.test_samples or 0
            return found.run_seconds(task, epoch_updates(task) * task.batch_size, held_out, held_out)

        deepest = {variant: seconds(variant, depths[-1]) for variant in variants}
        first = {depth: seconds(variants[0], depth) for depth in depths[:-1]} | {depths[-1]: deepest[variants[0]]}
        return {(v, d): deepest[v] * first[d] / first[depths[-1]] for v, d in product(variants, depths)}


def epoch_updates(task: RecurrenceTask) -> int:
    """Updates of an epoch."""
    return math.ceil((task.train_samples or 0) / task.batch_size)


def row_of(ladder: Ladder, cell: Cell, record: RunRecord | None, curve: Sequence[Mapping[str, float]]) -> RungResult:
    """The row of a cell.

    Args:
        ladder: to which the cell belongs.
        cell: the run.
        record: its record; None where it diverged.
        curve: its finished epochs; empty where it diverged.
    """
    task = ladder.task_of(cell.rung, cell.setting)
    each = epoch_updates(task)
    solved = [int(epoch["epoch"]) for epoch in curve if task.solved(epoch)]
    row = RungResult(
        mechanism=cell.variant.name,
        score=cell.variant.mechanism.score,
        modulus=task.modulus,
        delay=task.delay,
        scaling=task.scaling,
        positions=task.positions,
        layers=task.layers,
        heads=ladder.heads,
        seed=cell.seed,
        width=task.sized(cell.variant, ladder.heads).width,
        # The accuracy is measured after whole epochs only.
        updates_to_target=solved[0] * each if solved else None,
        update_flops=update_flops(task, cell.variant, ladder.heads),
    )
    if record is None:
        return row
    return replace(
        row,
        train_accuracy=record.train_accuracy,
        validation_accuracy=record.validation_accuracy,
        test_accuracy=record.test_accuracy,
        test_loss=record.test_loss,
        updates=len(curve) * each,
        params=record.total_params,
        seconds=record.epoch_seconds * len(curve),
        times_as_fast=record.times_as_fast,
        commit=record.commit,
    )


def update_flops(task: RecurrenceTask, variant: Variant, heads: int) -> int:
    """Operations of the matrix products of one update, forward and backward: attention, MLP 4D, logits."""
    width, tokens = task.sized(variant, heads).width, task.batch_size * task.length
    attention = cost(
        width,
        heads,
        task.length,
        mechanism=variant.mechanism,
        batch=task.batch_size,
        align_heads="per_head" if variant.per_head else "shared",
    ).flops
    maps = task.layers * 8 * width**2 + width * task.modulus  # multiplications per token, forward
    # Six: a multiplication and an addition, once forward and twice backward.
    return task.layers * attention + 6 * tokens * maps
