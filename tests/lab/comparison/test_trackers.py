"""Trackers: what they are told, that no epoch is told twice, and that nothing of theirs can stop training."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from better_attention.cli import main
from better_attention.lab.comparison import trackers
from better_attention.lab.comparison.plan import Plan
from better_attention.lab.comparison.trackers import Tracking, check
from better_attention.lab.files import write_atomic
from better_attention.lab.runs.folder import RunFolder
from better_attention.lab.tasks.variant import Variant
from better_attention.lab.training.events import Began, Event, Notify, Stopping, Updated, to_all
from better_attention.lab.training.progress import Interrupted
from helpers import tiny


def plan(out: Path, epochs: int = 3, mechanisms: Sequence[str] = ("super",)) -> Plan:
    variants = [Variant.of(name) for name in mechanisms]
    return Plan(tiny.task(epochs=epochs), variants, (3,), 1, out, device="cpu", command="better-attention compare")


class Notebook:
    """A tracker that keeps what it is told, in a dictionary of runs."""

    pages: dict[str, list[tuple[int | None, dict[str, Any]]]]
    settings: dict[str, list[dict[str, Any]]]
    fail_at: str = ""

    def __init__(self, run: str) -> None:
        self.run, self.finished = run, 0

    def _maybe(self, place: str) -> None:
        if type(self).fail_at == place:
            raise ConnectionError(f"no network in {place}")

    def start(self) -> None:
        self._maybe("start")
        self.pages.setdefault(self.run, [])

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._maybe("settings")
        self.settings.setdefault(self.run, []).append(values)

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        self._maybe("log")
        self.pages[self.run].append((step, values))

    def finish(self) -> None:
        self._maybe("finish")


@pytest.fixture
def notebook() -> type[Notebook]:
    """A tracker of its own pages for the test."""
    return type("Kind", (Notebook,), {"pages": {}, "settings": {}})


def tracked(wish: Plan, kind: type[Notebook], *more: Notify, **others: type[Notebook]) -> list[str]:
    """Train with trackers that are called as packages are which everybody has; what they said."""
    kinds = {**others, "json": kind}
    makers = {name: lambda folder, plan, run, kind=kind: kind(run) for name, kind in kinds.items()}
    said: list[str] = []
    with Tracking(wish, list(makers), said.append, makers=makers) as tracking:
        tiny.train(wish, to_all(*more, tracking))
    return said


class StopAfter:
    """Interrupts a comparison after some updates, as a signal does."""

    def __init__(self, updates: int, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.left, self.error = updates, error

    def __call__(self, event: Event) -> None:
        self.left -= isinstance(event, Updated)
        if self.left == 0:
            raise self.error


def test_every_epoch_and_the_final_figures(tmp_path: Path, notebook: type[Notebook]) -> None:
    assert tracked(plan(tmp_path, mechanisms=("super", "efficient")), notebook) == []
    assert set(notebook.pages) == {"super-h3-s0", "efficient-h3-s0"}
    for run, page in notebook.pages.items():
        curve = RunFolder(tmp_path / run).curve()
        assert [step for step, _ in page] == [1, 2, 3, 3]
        for (_, told), line in zip(page, curve, strict=False):
            for key in ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy"):
                assert told[key.replace("_", "/")] == line[key]
            assert told["epoch/seconds"] == line["seconds"]
        record = json.loads((tmp_path / run / "result.json").read_text())
        final = page[-1][1]
        assert final == {
            f"final/{k}": record[k] for k in record if k.startswith(("validation_", "test_")) and record[k] is not None
        }
        assert final["final/test_accuracy"] == record["test_accuracy"]
        (settings,) = notebook.settings[run]
        assert settings["run"] == run
        assert settings["lr"] == 1e-2
        assert all(isinstance(value, bool | int | float | str) for value in settings.values())


def test_epochs_are_told_while_the_run_goes_on(tmp_path: Path, notebook: type[Notebook]) -> None:
    with pytest.raises(KeyboardInterrupt):
        tracked(plan(tmp_path), notebook, StopAfter(14))  # 6 updates an epoch
    # The listener before it raises at the 14th update: the second epoch was logged at the 13th.
    assert [step for step, _ in notebook.pages["super-h3-s0"]] == [1, 2]


@pytest.mark.parametrize("stops", [[3], [7], [8, 2, 4], [6], [18]])
def test_a_resumed_run_has_no_epoch_twice(tmp_path: Path, notebook: type[Notebook], stops: list[int]) -> None:
    """Killed without a last checkpoint: epochs are trained again, and not told again."""
    for updates in stops:
        with pytest.raises(KeyboardInterrupt):
            tracked(plan(tmp_path), notebook, StopAfter(updates))
    tracked(plan(tmp_path), notebook)
    tracked(plan(tmp_path), notebook)  # a finished comparison adds nothing
    page = notebook.pages["super-h3-s0"]
    assert [step for step, _ in page] == [1, 2, 3, 3]
    assert [told["validation/loss"] for _, told in page[:3]] == [
        line["validation_loss"] for line in RunFolder(tmp_path / "super-h3-s0").curve()
    ]
    assert len(notebook.settings["super-h3-s0"]) == 1


def test_a_run_that_was_deleted_and_trained_anew_has_a_log_of_its_own(tmp_path: Path, notebook: type[Notebook]) -> None:
    tracked(plan(tmp_path), notebook)
    before = list(notebook.pages["super-h3-s0"])
    for epochs, page in ((2, "super-h3-s0-2"), (1, "super-h3-s0-3")):
        shutil.rmtree(tmp_path / "super-h3-s0")
        for _ in range(2):  # the second time there is nothing new
            tracked(plan(tmp_path, epochs=epochs), notebook)
        assert [step for step, _ in notebook.pages[page]] == [*range(1, epochs + 1), epochs]
        assert notebook.settings[page][0]["epochs"] == epochs
    assert notebook.pages["super-h3-s0"] == before
    assert set(notebook.pages) == {"super-h3-s0", "super-h3-s0-2", "super-h3-s0-3"}


def test_a_finished_comparison_is_told_afterwards(tmp_path: Path, notebook: type[Notebook]) -> None:
    tiny.train(plan(tmp_path))
    assert not (tmp_path / "trackers").exists()
    tracked(plan(tmp_path), notebook)
    assert [step for step, _ in notebook.pages["super-h3-s0"]] == [1, 2, 3, 3]


@pytest.mark.parametrize("place", ["start", "settings", "log", "finish"])
def test_a_tracker_that_fails_is_given_up_and_training_goes_on(
    place: str, tmp_path: Path, notebook: type[Notebook]
) -> None:
    notebook.fail_at = place
    (said,) = tracked(plan(tmp_path, mechanisms=("super", "efficient")), notebook)
    assert said.startswith(f"json failed (ConnectionError: no network in {place}): nothing more is logged there")
    assert len(list(tmp_path.glob("*/result.json"))) == 2
    notebook.fail_at = ""
    assert tracked(plan(tmp_path, mechanisms=("super", "efficient")), notebook) == []
    for run in ("super-h3-s0", "efficient-h3-s0"):  # what was missing came afterwards
        assert [step for step, _ in notebook.pages[run]][-4:] == [1, 2, 3, 3]


def test_a_disk_that_takes_nothing_ends_the_tracker_alone(tmp_path: Path, notebook: type[Notebook]) -> None:
    (tmp_path / "trackers").mkdir()
    (tmp_path / "trackers" / "logged").write_text("a file where the folder should be")
    (said,) = tracked(plan(tmp_path), notebook)
    assert said.startswith("json failed (FileExistsError")
    assert (tmp_path / "super-h3-s0" / "result.json").is_file()


def test_a_failing_tracker_takes_no_other_along(tmp_path: Path, notebook: type[Notebook]) -> None:
    bad = type("Bad", (Notebook,), {"pages": {}, "settings": {}, "fail_at": "log"})
    (said,) = tracked(plan(tmp_path), notebook, csv=bad)
    assert said.startswith("csv failed")
    assert [step for step, _ in notebook.pages["super-h3-s0"]] == [1, 2, 3, 3]


def test_only_the_first_process_tells(tmp_path: Path, notebook: type[Notebook]) -> None:
    wish = plan(tmp_path)
    makers = {"json": lambda folder, plan, run: notebook(run)}
    with Tracking(wish, ["json"], print, first=False, makers=makers) as tracking:
        tiny.train(wish, tracking)
    assert notebook.pages == {}
    assert not (tmp_path / "trackers").exists()


def test_every_listener_gets_every_event_in_order() -> None:
    heard: list[tuple[str, Event]] = []
    events: list[Event] = [Began("super-h3-s0", 1, 2), Stopping()]
    notify = to_all(lambda event: heard.append(("a", event)), lambda event: heard.append(("b", event)))
    for event in events:
        notify(event)
    assert heard == [(name, event) for event in events for name in "ab"]


# --- what is asked for ------------------------------------------------------------------------------------------------


def test_names_and_packages_are_checked_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    short = ["compare", "--scale", "smoke", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert main.main([*short, "--track", "neptune"]) == 2
    assert "unknown tracker 'neptune': choose among tensorboard, wandb." in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main.main([*short, "--track", "wandb"]) == 2
    said = capsys.readouterr().err
    assert "--track wandb needs the package 'wandb', which is not installed: pip install wandb" in said
    assert not (tmp_path / "out").exists()


def test_a_folder_called_wandb_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ValueError, match="pip install wandb"):
        check(["wandb"])


def test_wandb_needs_no_network_unless_it_is_told_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package: what wandb.init is asked for."""
    asked: dict[str, Any] = {}

    class Run:
        def log(self, values: dict[str, Any], step: int) -> None:
            """Nothing."""

        def finish(self) -> None:
            """Nothing."""

    def init(**arguments: Any) -> Run:
        asked.update(arguments)
        return Run()

    module = ModuleType("wandb")
    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    trackers.wandb(tmp_path, plan(tmp_path), "super-h3-s0").start()
    assert (asked["mode"], asked["resume"], asked["dir"], asked["name"]) == (
        "offline",
        "allow",
        str(tmp_path),
        "super-h3-s0",
    )
    first = asked["id"]
    monkeypatch.setenv("WANDB_MODE", "online")
    trackers.wandb(tmp_path, plan(tmp_path), "super-h3-s0").start()
    assert (asked["mode"], asked["id"]) == ("online", first)
    trackers.wandb(tmp_path / "other", plan(tmp_path), "super-h3-s0").start()
    assert asked["id"] != first


# --- TensorBoard itself -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # of tensorboard's own
def test_tensorboard_reads_the_curves_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    said: list[str] = []
    for stop in (8, None):
        wish = plan(tmp_path)
        with Tracking(wish, ["tensorboard"], said.append) as tracking:
            if stop:
                with pytest.raises(Interrupted):
                    tiny.train(wish, to_all(StopAfter(stop, Interrupted), tracking))
            else:
                tiny.train(wish, tracking)
    assert said == []
    events = EventAccumulator(str(tmp_path / "trackers" / "tensorboard" / "super-h3-s0"))
    events.Reload()
    curve = RunFolder(tmp_path / "super-h3-s0").curve()
    for key in ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy"):
        scalars = events.Scalars(key.replace("_", "/"))
        assert [scalar.step for scalar in scalars] == [1, 2, 3]
        assert [scalar.value for scalar in scalars] == pytest.approx([line[key] for line in curve], rel=1e-6)
    record = json.loads((tmp_path / "super-h3-s0" / "result.json").read_text())
    (final,) = events.Scalars("final/test_accuracy")
    assert (final.step, final.value) == (3, pytest.approx(record["test_accuracy"], rel=1e-6))


@pytest.mark.filterwarnings("ignore")
def test_the_command_logs_with_the_flag_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard")
    short = ["--scale", "smoke", "--epochs", "1", "--seeds", "1", "--device", "cpu", "--mechanisms", "super"]
    assert main.main(["compare", *short, "--out", str(tmp_path)]) == 0
    assert not (tmp_path / "trackers").exists()
    assert main.main(["compare", *short, "--out", str(tmp_path), "--track", "tensorboard"]) == 0
    assert list((tmp_path / "trackers" / "tensorboard" / "super-h4-s0").glob("events.*"))
    assert "failed" not in capsys.readouterr().out


def test_a_damaged_memory_is_a_failure_of_the_tracker(tmp_path: Path, notebook: type[Notebook]) -> None:
    write_atomic(tmp_path / "trackers" / "logged" / "super-h3-s0.json.json", "{")
    (said,) = tracked(replace(plan(tmp_path), command="x"), notebook)
    assert "super-h3-s0.json.json is damaged" in said
