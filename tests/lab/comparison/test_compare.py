"""Comparisons: what is trained, what is kept, what is written."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
import signal
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from better_attention.inspect import alignment_kernels
from better_attention.lab.analysis.study import Study, Threshold
from better_attention.lab.analysis.summary import summarise
from better_attention.lab.comparison.compare import compare, make_accelerator
from better_attention.lab.comparison.plan import Plan
from better_attention.lab.lock import locked
from better_attention.lab.runs.load import load_run
from better_attention.lab.runs.states import run_states
from better_attention.lab.tasks.catalogue import TASKS
from better_attention.lab.tasks.image import ImageTask
from better_attention.lab.tasks.variant import Variant
from better_attention.lab.training.events import Began, DataRead, Ended, Event, Failed, Stopping, Updated
from better_attention.lab.training.progress import Interrupted
from better_attention.lab.training.randomness import initial_model
from better_attention.lab.training.step_time import Pace
from helpers import tiny


class Diary:
    """Writes down the events of a comparison."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.ended: list[str] = []
        self.lost: list[str] = []
        self.updates = 0
        self.asked_to_stop = False

    def __call__(self, event: Event) -> None:
        match event:
            case Began(name=name, number=number, runs=runs):
                self.begun.append(f"{number}/{runs} {name}")
            case Updated():
                self.updates += 1
            case Ended(name=name):
                self.ended.append(name)
            case Failed(name=name):
                self.lost.append(name)
            case Stopping():
                self.asked_to_stop = True
            case _:
                pass


def test_seeds_are_outermost(tmp_path: Path) -> None:
    order = tiny.plan(tmp_path, heads=(1, 2), seeds=2).jobs()
    assert [job.seed for job in order] == [0] * 4 + [1] * 4
    names = [(job.variant.name, job.heads) for job in order[:4]]
    assert names == [
        ("standard", 1),
        ("super", 1),
        ("standard", 2),
        ("super", 2),
    ]


def first_three(study: Study) -> list[tuple[str, int]]:
    return [(run, int(epoch["epoch"])) for run, curve in study.curves.items() for epoch in curve][:3]


def test_a_comparison_writes_its_results_and_is_then_kept(tmp_path: Path) -> None:
    diary = Diary()
    study, failed = compare(tiny.plan(tmp_path, seeds=2), diary)
    assert failed == []
    assert diary.begun == ["1/4 standard-h3-s0", "2/4 super-h3-s0", "3/4 standard-h3-s1", "4/4 super-h3-s1"]
    assert diary.updates == 4 * 6
    records = json.loads((tmp_path / "results.json").read_text())
    assert [(r["mechanism"], r["heads"], r["seed"]) for r in records] == [
        ("standard", 3, 0),
        ("super", 3, 0),
        ("standard", 3, 1),
        ("super", 3, 1),
    ]
    assert set(study.curves) == {"standard-h3-s0", "super-h3-s0", "standard-h3-s1", "super-h3-s1"}
    assert [(m.run, m.weights.shape) for m in study.maps[:1]] == [("standard-h3-s0", (3, 16, 16))]
    assert len(study.maps) == 2 * 2 * 2  # mechanisms, layers, samples
    assert {a.run for a in study.alignments} == {"super-h3-s0"}
    assert all(re.fullmatch(r"\d \(\d{1,3} %\)", one.predicted) for one in study.maps)
    assert study.folders["super-h3-s1"] == "super-h3-s1"
    assert '<a href="super-h3-s1/">' in (tmp_path / "report.html").read_text("utf-8")
    with (tmp_path / "results.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 2
    with (tmp_path / "curves.csv").open(newline="") as file:
        epochs = list(csv.DictReader(file))
    assert [(e["run"], e["epoch"]) for e in epochs[:3]] == [(r, str(n)) for r, n in first_three(study)]
    assert {e["run"]: float(e["train_loss"]) for e in epochs} == {
        r: c[-1]["train_loss"] for r, c in study.curves.items()
    }
    assert "<html" in (tmp_path / "report.html").read_text("utf-8")

    again = Diary()
    compare(tiny.plan(tmp_path, seeds=2), again)
    assert again.updates == 0
    assert again.ended == diary.ended


def test_epochs_are_counted_to_the_threshold_of_the_plan(tmp_path: Path) -> None:
    study, _ = compare(tiny.plan(tmp_path, threshold=100.0))
    assert study.threshold == Threshold(100.0, "as given by --threshold")
    assert [run["epochs_to_threshold"] for run in study.records] == [None, None]
    (first, *_) = study.curves["standard-h3-s0"]
    study, _ = compare(tiny.plan(tmp_path, threshold=1e-3))
    assert first["validation_accuracy"] > 0
    assert study.records[0]["epochs_to_threshold"] == 1
    assert study.records[0]["seconds_to_threshold"] == first["seconds"]
    with (tmp_path / "results.csv").open(newline="") as file:
        assert [float(line["threshold_accuracy"]) for line in csv.DictReader(file)] == [1e-3, 1e-3]
    with pytest.raises(ValueError, match="threshold must be between 0 and 100, received 101"):
        tiny.plan(tmp_path, threshold=101.0)


def test_maps_say_what_the_model_predicts_of_their_sample(tmp_path: Path) -> None:
    task = tiny.task(epochs=4)
    study, _ = compare(replace(tiny.plan(tmp_path, ["standard"]), task=task))
    run = load_run(tmp_path / "standard-h3-s0")
    rows = [row for row, _ in task.examples(tiny.splits(), 2)]
    inputs = tiny.splits().test.inputs[rows]
    found = task.predictions(run.model, inputs, tiny.splits().assets)
    told = [f"{one.label} ({100 * one.probability:.0f} %)" for one in found]
    assert list(dict.fromkeys((one.label, one.predicted) for one in study.maps)) == list(
        zip([label for _, label in task.examples(tiny.splits(), 2)], told, strict=True)
    )


def test_kernels_are_drawn_beside_where_they_started(tmp_path: Path) -> None:
    study, _ = compare(tiny.plan(tmp_path, ["standard", "super"], seeds=1))
    trained = dict(alignment_kernels(load_run(tmp_path / "super-h3-s0").model))
    fresh = dict(alignment_kernels(initial_model(tiny.task(epochs=1), Variant.of("super"), 3, 0)))
    for one in study.alignments:
        assert one.initial is not None
        assert (one.weight == trained[one.layer].numpy()).all()
        assert (one.initial == fresh[one.layer].numpy()).all()
        assert 0 < abs(one.weight - one.initial).max() < abs(one.initial).max()  # an epoch at a small rate
    assert len(study.alignments) == 2


def test_the_folder_is_read_a_fixed_number_of_times_per_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing to do, the configuration and the record of a run are read once, and once more for the results."""
    parse, read = json.loads, Counter[str]()

    def counting(text: str, **options: Any) -> Any:
        value = parse(text, **options)
        if isinstance(value, dict) and "epoch" not in value:  # every file but the learning curve
            read["config" if "run" in value else "record" if "test_accuracy" in value else "other"] += 1
        return value

    compare(tiny.plan(tmp_path, seeds=4), measure=tiny.pace)
    monkeypatch.setattr(json, "loads", counting)
    compare(tiny.plan(tmp_path, seeds=4), measure=tiny.pace)
    assert read == {"config": 2 * 8, "record": 2 * 8}


def test_later_comparisons_add_to_a_folder(tmp_path: Path) -> None:
    compare(tiny.plan(tmp_path, ["standard"]))
    study, _ = compare(tiny.plan(tmp_path, ["efficient"]))
    assert {record["mechanism"] for record in study.records} == {"standard", "efficient"}


def test_a_folder_does_not_mix_settings(tmp_path: Path) -> None:
    compare(tiny.plan(tmp_path, ["standard"]))
    other = replace(tiny.plan(tmp_path, ["super"]), task=tiny.task(epochs=1, lr=0.5))
    with pytest.raises(ValueError, match=r"another configuration .*\n  lr: 0.01 there, 0.5 now\n.*--out"):
        compare(other)
    assert not (tmp_path / "super-h3-s0").exists()


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "SIGINT"), (signal.SIGTERM, "SIGTERM")])
def test_a_signal_saves_and_the_next_call_continues(tmp_path: Path, number: signal.Signals, name: str) -> None:
    class Hurry(Diary):
        def __call__(self, event: Event) -> None:
            super().__call__(event)
            if isinstance(event, Updated) and self.updates == 8:
                os.kill(os.getpid(), number)

    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    hurry = Hurry()
    with pytest.raises(Interrupted, match=r"super-h3-s0: saved in epoch 1 after step 3") as caught:
        compare(tiny.plan(tmp_path), hurry)
    assert caught.value.signal == number
    assert hurry.asked_to_stop
    assert hurry.ended == ["standard-h3-s0"]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    diary = Diary()
    compare(tiny.plan(tmp_path), diary)
    assert diary.updates == 6 - 3


def poisoned(plan: Plan, run: str, diary: Diary) -> Plan:
    """The same comparison, in which the losses of one run are no numbers."""
    real = type(plan.task).losses

    def losses(self: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        found = real(self, logits, targets)
        return found * math.nan if diary.begun and diary.begun[-1].endswith(run) else found

    assert isinstance(plan.task, ImageTask)
    return replace(plan, task=tiny.overriding(plan.task, losses=losses))


def test_a_run_that_fails_does_not_take_the_others_along(tmp_path: Path) -> None:
    diary = Diary()
    study, failed = compare(poisoned(tiny.plan(tmp_path), "standard-h3-s0", diary), diary)
    assert failed == diary.lost == ["standard-h3-s0"]
    assert [(record["mechanism"], "diverged" in record) for record in study.records] == [
        ("super", False),
        ("standard", True),
    ]
    assert any("diverged, and nothing is claimed of its mechanism: standard-h3-s0" in note for note in study.notes)
    assert study.finished == 1


def test_nothing_is_claimed_of_a_mechanism_of_which_a_run_diverged(tmp_path: Path) -> None:
    diary = Diary()
    whole, _ = compare(tiny.plan(tmp_path / "whole", seeds=4), measure=tiny.pace)
    assert summarise(whole.records)[1].tests["test_loss"].corrected_p is not None
    spoilt_plan = poisoned(tiny.plan(tmp_path / "spoilt", seeds=4), "super-h3-s2", diary)
    study, failed = compare(spoilt_plan, diary, measure=tiny.pace)
    assert failed == ["super-h3-s2"]
    written = json.loads((tmp_path / "spoilt" / "results.json").read_text())
    assert [(run["seed"], run["samples"]) for run in written if "diverged" in run] == [(2, whole.records[0]["samples"])]
    for records in (study.records, written):  # as `table` reads them back
        standard, spoilt = summarise(records)
        assert (standard.mechanism, standard.ranks["test_accuracy"], standard.seeds) == ("standard", 1, (0, 1, 2, 3))
        assert spoilt.tests["test_accuracy"].verdict == spoilt.tests["test_loss"].verdict == "not tested"
        assert spoilt.ranks.keys().isdisjoint({"test_accuracy", "test_loss", "train_accuracy"})
        assert math.isnan(spoilt.estimates["test_accuracy"].mean)
        assert spoilt.estimates["attention_params"].n == 3
    page = (tmp_path / "spoilt" / "report.html").read_text("utf-8")
    assert "super-h3-s2: epoch 1, step 1" in page
    assert "Test acc. % and Test loss of at least one run is no number; nothing is claimed of it" in page


def test_two_commands_that_begin_at_once_do_not_mix_settings(tmp_path: Path) -> None:
    other = replace(tiny.plan(tmp_path, ["super"]), task=tiny.task(epochs=1, lr=0.5))

    def overtaken(*_: object, **__: object) -> Pace:
        compare(tiny.plan(tmp_path, ["standard"]))  # begins and ends while the other measures
        return tiny.pace()

    with pytest.raises(ValueError, match=r"standard-h3-s0 holds a run with another configuration .*\n  lr: 0.01 there"):
        compare(other, measure=overtaken)
    assert not (tmp_path / "super-h3-s0" / "config.json").exists()
    assert {run["mechanism"] for run in json.loads((tmp_path / "results.json").read_text())} == {"standard"}


class NoData(Diary):
    """A comparison that is refused has not read its data."""

    def __call__(self, event: Event) -> None:
        assert not isinstance(event, DataRead), "the data was read"


@pytest.mark.parametrize("name", ["result.json", "metrics.jsonl", "model.safetensors"])
def test_a_run_without_its_configuration_is_damaged_and_named_at_once(tmp_path: Path, name: str) -> None:
    compare(tiny.plan(tmp_path, ["super"]))
    (tmp_path / "super-h3-s0" / "config.json").unlink()
    for other in {"result.json", "metrics.jsonl", "model.safetensors"} - {name}:
        (tmp_path / "super-h3-s0" / other).unlink()
    before = (tmp_path / "super-h3-s0" / name).read_bytes()
    with pytest.raises(ValueError, match=rf"super-h3-s0 holds {name}, but no config\.json: either a damaged"):
        compare(tiny.plan(tmp_path), NoData())
    assert (tmp_path / "super-h3-s0" / name).read_bytes() == before
    ((found,)) = run_states([tmp_path])
    assert (found.path.name, found.state) == ("super-h3-s0", "damaged")
    assert "config.json is missing" in found.detail


def test_a_run_that_another_process_writes_is_named_at_once(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "super-h3-s0"),
        pytest.raises(ValueError, match=r"super-h3-s0 is being written by another process \(process \d+\)\. Wait"),
    ):
        compare(tiny.plan(tmp_path), NoData())


@pytest.mark.parametrize("inside", [".", "runs/mine"])
def test_results_do_not_go_into_a_folder_that_is_read_as_data(tmp_path: Path, inside: str) -> None:
    for task in ("images", "text"):
        own = Plan(TASKS[task]("smoke"), [Variant.of("super")], (4,), 1, tmp_path / inside, data=tmp_path, device="cpu")
        with pytest.raises(ValueError, match=r"--out .* lies in --data .*, and what is written there would be read as"):
            compare(own, NoData())
    assert list(tmp_path.iterdir()) == []


def test_a_finished_run_without_its_weights_is_told(tmp_path: Path) -> None:
    compare(tiny.plan(tmp_path))
    (tmp_path / "super-h3-s0" / "model.safetensors").unlink()
    study, _ = compare(tiny.plan(tmp_path))
    assert [note for note in study.notes if "weights" in note] == [
        "super-h3-s0 has lost its weights (model.safetensors): no maps of it are shown"
    ]
    assert len(study.records) == 2


def test_results_are_written_by_one_command_at_a_time(tmp_path: Path) -> None:
    """The one that comes second waits, and sees the runs of the first."""
    out, ready = tmp_path / "out", threading.Event()
    compare(tiny.plan(tmp_path / "elsewhere", ["super"]))
    compare(tiny.plan(out, ["standard"]))
    (out / "results.json").unlink()
    second = threading.Thread(target=compare, args=(tiny.plan(out, ["standard"]), lambda event: ready.set()))
    with locked(out):
        second.start()
        assert ready.wait(60)
        time.sleep(2)
        assert not (out / "results.json").exists()
        shutil.copytree(tmp_path / "elsewhere" / "super-h3-s0", out / "super-h3-s0")
    second.join(60)
    assert {run["mechanism"] for run in json.loads((out / "results.json").read_text())} == {"standard", "super"}


def test_all_mechanisms_see_the_samples_in_the_same_order(tmp_path: Path) -> None:
    seen: dict[str, list[list[int]]] = {}
    real = ImageTask.losses

    class Note(Diary):
        def __call__(self, event: Event) -> None:
            if isinstance(event, Began):
                self.name = event.name
                seen[event.name] = []

    note = Note()

    def losses(self: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            seen[note.name].append(targets.tolist())
        return real(self, logits, targets)

    plan = replace(tiny.plan(tmp_path, seeds=2), task=tiny.overriding(tiny.task(epochs=1), losses=losses))
    compare(plan, note, measure=tiny.pace)
    assert seen["standard-h3-s0"] == seen["super-h3-s0"]
    assert seen["standard-h3-s1"] == seen["super-h3-s1"]
    assert seen["standard-h3-s0"] != seen["standard-h3-s1"]


def test_what_cannot_be_built_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--heads 4 does not divide the width of task 'digits', 6"):
        compare(tiny.plan(tmp_path, heads=(3, 4)))
    assert not list(tmp_path.iterdir())


def test_a_model_larger_than_the_memory_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    task = tiny.task(patch=2**20 + 1, image_size=2**20 + 1)
    plan = Plan(task, [Variant.of("super")], (3,), 1, tmp_path, device="cpu")
    with pytest.raises(ValueError, match="GiB of parameters; training needs 3 times that, and this machine has"):
        compare(plan)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="--device cuda: no such device on this machine"):
        make_accelerator("cuda")


def test_a_task_limits_the_threads_of_its_runs(tmp_path: Path) -> None:
    class MeasuredError(Exception):
        """The number of threads is known; training with two of them takes long on a busy machine."""

    def measured(*_: object, **__: object) -> Pace:
        raise MeasuredError(torch.get_num_threads())

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for threads, seen in ((None, 2), (1, 1), (5, 2)):
            wish = replace(tiny.plan(tmp_path, ["standard"]), task=tiny.task(epochs=1, threads=threads))
            with pytest.raises(MeasuredError, match=f"^{seen}$"):
                tiny.train(wish, measure=measured)
            assert torch.get_num_threads() == 2
        tiny.train(replace(tiny.plan(tmp_path, ["standard"]), task=tiny.task(epochs=1, threads=1)))
        assert json.loads((tmp_path / "standard-h3-s0" / "result.json").read_text())["threads"] == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
