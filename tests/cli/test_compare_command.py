"""``better-attention compare``: arguments, what it prints, how it ends."""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from better_attention.cli import compare, main
from better_attention.cli.arguments import command_line
from better_attention.cli.progress import LiveProgress, PlainProgress, make_progress
from better_attention.lab.comparison.cluster import Cluster
from better_attention.lab.runs.record import RunRecord
from better_attention.lab.tasks.catalogue import TASKS
from better_attention.lab.tasks.text import OwnTextTask
from better_attention.lab.training.events import Began, Ended, Estimated, Failed, Stopping, Updated
from better_attention.lab.training.progress import DivergedError, Position
from helpers import studies


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    return parser.parse_args(arguments)


def test_without_arguments_it_compares_five_mechanisms_on_digits() -> None:
    plan = compare.make_plan(parse())
    task = TASKS["digits"]("small")
    assert plan.task == task
    assert [m.name for m in plan.variants] == ["standard", "optimised", "efficient", "super", "expressive"]
    assert (plan.heads, plan.seeds, plan.out) == ((task.default_heads,), task.seeds, Path("runs/digits-small"))
    assert (plan.device, plan.data) == ("auto", None)


def test_every_argument_arrives() -> None:
    options = "--mechanisms super,efficient+expressive --heads 1,2 --seeds 7 --scale paper --epochs 9 --patience 0"
    more = "--batch-size 5 --lr 0.25 --device cpu --data there --out here"
    plan = compare.make_plan(parse("imdb", *options.split(), *more.split()))
    assert [m.name for m in plan.variants] == ["super", "efficient+expressive"]
    assert (plan.heads, plan.seeds, plan.device) == ((1, 2), 7, "cpu")
    assert (plan.task.name, plan.task.scale) == ("imdb", "paper")
    assert (plan.task.epochs, plan.task.patience, plan.task.batch_size, plan.task.lr) == (9, 0, 5, 0.25)
    assert (plan.data, plan.out) == (Path("there"), Path("here"))


@pytest.mark.parametrize("name", ["2024", "true", "null", "[1]", '"quoted"', "stars"])
def test_a_column_may_have_any_name(name: str) -> None:
    plan = compare.make_plan(parse("text", "--set", f"label_column={name}"))
    assert isinstance(plan.task, OwnTextTask)
    assert plan.task.label_column == name.strip('"')


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mechanisms", "standard,quick"], "unknown mechanism 'quick'. Choose one of standard, optimised"),
        (["--heads", "0"], "expected a whole number of at least 1, received '0'"),
        (["--heads", "two"], "expected a whole number of at least 1, received 'two'"),
        (["--seeds", "-1"], "expected a whole number of at least 1, received '-1'"),
        (["--seeds", "1.5"], "expected a whole number of at least 1, received '1.5'"),
        (["--patience", "-1"], "expected a whole number of at least 0, received '-1'"),
        (["--scale", "huge"], "invalid choice: 'huge'"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main(["compare", *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_an_empty_name_is_no_folder(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main(["compare", "--out", ""])
    assert ended.value.code == 2
    assert "expected the name of a folder, received nothing" in capsys.readouterr().err


def test_a_file_for_a_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").write_text("mine", encoding="utf-8")
    assert main.main(["compare", "--out", str(tmp_path / "taken")]) == 2
    assert "is a file: name a folder for the results." in capsys.readouterr().err
    assert (tmp_path / "taken").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chess"], f"unknown task 'chess': choose one of {', '.join(TASKS)}."),
        (["--lr", "0"], "lr must be above 0"),
        (["--lr", "nan"], "lr must be"),
        (["--heads", "5", "--device", "cpu"], "5"),
        (["--set", "classes=5", "--device", "cpu"], "is set to classes=5, but data set 'digits' has 10"),
        (["--set", "channels=3", "--device", "cpu"], "is set to channels=3, but the pictures of 'digits' have 1"),
        (["--set", "peak=7", "--device", "cpu"], "is set to peak=7, but the pictures of 'digits' have 16"),
        (["--set", "raw_size=4", "--device", "cpu"], "is set to raw_size=4, but the pictures of 'digits' have 8"),
        (["--set", "peak=0"], "peak must be >= 1"),
        (["--set", "channels=2"], "channels must be 1 (grey) or 3 (colour), received 2"),
        (["--set", "dropout=1"], "dropout must be below 1"),
        (["--set", "head_dropout=1"], "head_dropout must be below 1"),
        (["--set", "length=5"], "length of task 'digits' follows from image_size, patch and class_token"),
        (["--set", "heads=2"], "heads of task 'digits' follows from --heads"),
        (["images", "--set", "classes=5"], "classes of task 'images' follows from the data"),
        (["recurrence", "--set", "length=5"], "length of task 'recurrence' follows from delay, steps and rules"),
        (["--set", "width=100000000", "--device", "cpu"], "GiB of parameters; training needs 3 times that"),
        (["--set", "width=200000", "--device", "cpu"], "GiB of parameters; training needs 3 times that"),
        (["imdb", "--data", "nowhere", "--device", "cpu"], "nowhere does not exist"),
        (["text-lm", "--set", "kv_heads=0"], "kv_heads must be >= 1, received 0."),
        (["text-lm", "--set", "kv_heads=two"], "expected a whole number or null, received 'two'"),
        (["digits", "--set", "kv_heads=2"], "there is no setting 'kv_heads'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["compare", *arguments, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert "Traceback" not in said.err
    assert not (tmp_path / "out").exists()


SHORT = ["--scale", "smoke", "--epochs", "1", "--seeds", "1", "--device", "cpu"]


def test_it_ends_with_the_table_and_says_where_the_files_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["compare", "digits", "--mechanisms", "super", *SHORT, "--out", str(tmp_path)]
    assert main.main(arguments) == 0
    said = capsys.readouterr().out
    assert "[1/1] super-h4-s0  test " in said
    assert "2,384" in said  # 2 (32^2 + 32) + 16^2 + 16 parameters of attention
    for name in ("report.html", "results.csv", "results.json"):
        assert str(tmp_path / name) in said
        assert (tmp_path / name).stat().st_size > 100
    (record,) = json.loads((tmp_path / "results.json").read_text())
    assert record["command"] == command_line()
    assert main.main([*arguments, "--lr", "0.5"]) == 2
    assert "lr: 0.003 there, 0.5 now" in capsys.readouterr().err


def test_ctrl_c_saves_and_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def press() -> None:
        while not list(tmp_path.glob("*/config.json")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    words = ["compare", "--mechanisms", "super", "--scale", "smoke", "--epochs", "1000", "--patience", "0"]
    words += ["--device", "cpu", "--out", str(tmp_path)]
    # Not as the script of that name, which would leave with the default action for Ctrl-C, and so would the tests.
    monkeypatch.setattr(sys, "argv", ["program of the tests", *words])
    handler = signal.getsignal(signal.SIGINT)
    threading.Thread(target=press, daemon=True).start()
    assert main.main(words) == 130
    assert signal.getsignal(signal.SIGINT) is handler
    said = capsys.readouterr()
    assert "stopping after this step" in said.out
    assert "Interrupted. super-h4-s0: saved in epoch" in said.out
    assert "better-attention compare --mechanisms super" in said.out
    assert said.err == ""


def test_json_stands_alone_on_standard_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--scale", "smoke", "--mechanisms", "standard", "--epochs", "1", "--device", "cpu", "--json"]
    assert main.main(["compare", *options, "--out", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert "[1/1] standard-h4-s0  test " in said.err


@pytest.mark.parametrize(
    ("scale", "hint"),
    [
        ("paper", "--scale small or smoke takes less"),
        ("small", "--scale smoke takes less"),
        ("smoke", "fewer --epochs, --seeds or --mechanisms take less"),
    ],
)
def test_above_an_hour_something_shorter_is_named(scale: str, hint: str) -> None:
    screen = io.StringIO()
    plan = compare.make_plan(parse("digits", "--scale", scale))
    progress = PlainProgress(Console(file=screen, width=200, highlight=False), plan)
    progress(Estimated(3600, 5))
    assert "take" not in screen.getvalue()
    progress(Estimated(3601, 5))
    assert f"{hint}; Ctrl-C stops after a step, and the same command continues there" in screen.getvalue()


def progress_on(terminal: bool) -> tuple[PlainProgress, io.StringIO]:
    screen = io.StringIO()
    plan = compare.make_plan(parse("digits", "--seeds", "1"))
    return make_progress(Console(file=screen, force_terminal=terminal, width=200, highlight=False), plan), screen


def test_a_terminal_gets_bars_and_anything_else_plain_lines() -> None:
    results = {"test_accuracy": 97.531, "test_loss": 0.25, "best_epoch": 3, "epochs": 5, "epoch_seconds": 1.25}
    record = RunRecord.of(studies.record("super") | results)
    curve = [{"validation_accuracy": 91.5, "validation_loss": 0.5}]
    position = Position(epoch=2, step=7, curve=curve)
    for terminal, kind in ((True, LiveProgress), (False, PlainProgress)):
        progress, screen = progress_on(terminal)
        assert type(progress) is kind
        with progress:
            progress(Began("super-h4-s0", 2, 5))
            progress.said_at["super-h4-s0"] -= 60
            progress(Updated(position, 21))
            if isinstance(progress, LiveProgress):
                progress.bars.refresh()
            progress(Ended("super-h4-s0", record))
            progress(Failed("super-h4-s0", DivergedError("loss nan")))
            progress(Stopping())
        said = screen.getvalue()
        assert "[2/5] super-h4-s0  test 97.53 %, loss 0.250; best epoch 3 of 5; 1.25 s/epoch" in said
        assert "epoch 2/30, step 7/21  validation 91.50 %, loss 0.500" in said
        assert "FAILED  loss nan" in said
        assert ("\x1b[" in said) == terminal


@pytest.mark.parametrize("terminal", [True, False])
def test_several_runs_at_once_are_told_apart(terminal: bool) -> None:
    """As on Ray: what is said of each has its own number, and each has a bar until it ends."""
    progress, screen = progress_on(terminal)
    names = ("super-h4-s0", "standard-h4-s0")
    results = {"test_accuracy": 97.531, "test_loss": 0.25, "best_epoch": 3, "epochs": 5, "epoch_seconds": 1.25}
    peaks = {"peak_memory_bytes": [512 * 2**20, 1500 * 2**20]}
    with progress:
        for number, name in enumerate(names, start=1):
            progress(Began(name, number, 2))
            progress.said_at[name] -= 60
        for name in names:
            progress(Updated(Position(epoch=3, step=4), 21, name))
        if isinstance(progress, LiveProgress):
            progress.bars.refresh()
            assert set(progress.ones) == set(names)
        progress(Began("super-h4-s0", 1, 2))  # its worker was lost
        progress(Ended("super-h4-s0", RunRecord.of(studies.record("super") | results | peaks)))
        if isinstance(progress, LiveProgress):
            assert set(progress.ones) == {"standard-h4-s0"}
        progress(Failed("standard-h4-s0", DivergedError("loss nan")))
    said = screen.getvalue()
    for number, name in enumerate(names, start=1):
        assert f"[{number}/2] {name}  epoch 3/30, step 4/21" in said
    assert "[1/2] super-h4-s0  test 97.53 %" in said
    assert "1.25 s/epoch; peak memory of its processes 512, 1,500 MiB" in said
    assert "[2/2] standard-h4-s0  FAILED  loss nan" in said


def test_engine_and_shard_arrive() -> None:
    assert compare.make_plan(parse("digits", "--shard", "fsdp")).shard == "fsdp"
    assert compare.make_plan(parse("digits")).shard == ""
    assert compare.make_engine(parse("digits")) is None


def test_ray_gets_its_options() -> None:
    pytest.importorskip("ray")
    engine = compare.make_engine(
        parse("digits", "--engine", "ray", "--address", "10.0.0.1:6379", "--cpus-per-run", "3", "--gpus-per-run", "1")
    )
    assert engine is not None
    assert engine.device == "cuda"
    assert engine.cluster == Cluster("10.0.0.1:6379", 3, 1)  # type: ignore[attr-defined]
