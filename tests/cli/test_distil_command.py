"""``better-attention distil``: what was lost is learned again, a distillation is resumed, wrong pairs are refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from better_attention.cli import main
from better_attention.lab.trained.model import open_trained
from better_attention.lab.training.interruption import Stop
from helpers import tiny


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, and the same with efficient attention in ``converted``, by the projection of its weights."""
    out = tmp_path_factory.mktemp("runs")
    tiny.training(out / "run", "standard", epochs=12, width=12, dropout=0.0, head_dropout=0.0).run()
    words = ["efficient", "--approximate", "--calibrate", "0", "--out", str(out / "converted")]
    assert main.main(["convert", str(out / "run"), *words]) == 0
    return out


def words(runs: Path, out: Path, *more: object) -> list[str]:
    pair = ["distil", str(runs / "converted"), "--teacher", str(runs / "run")]
    return [*pair, "--out", str(out), "--device", "cpu", *map(str, more)]


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main.main(["distil", *map(str, arguments)]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def distance(model: Path, teacher: Path) -> float:
    """Mean difference of the probabilities of the test samples."""
    ours, theirs = (open_trained(path).model(tiny.splits().test.inputs).softmax(1) for path in (model, teacher))
    return float((ours - theirs).detach().abs().mean())


def test_the_student_comes_nearer_to_its_teacher(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    options = ["--hidden-epochs", 8, "--output-epochs", 4, "--lr", 0.01, "--batch-size", 16, "--json"]
    assert main.main(words(runs, tmp_path / "out", *options)) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (len(result["hidden"]), len(result["output"])) == (8, 4)
    assert max(result["hidden"][-1]) < max(result["hidden"][0])
    assert distance(tmp_path / "out", runs / "run") < 0.5 * distance(runs / "converted", runs / "run")
    story = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert story["mechanism"] == "efficient"
    assert story["distillation"]["losses"]["output"] == result["output"]
    assert story["distillation"]["accuracy"] == result["accuracy"]
    assert not (tmp_path / "out" / "checkpoints").exists()


def press_ctrl_c() -> None:
    """Send SIGINT as soon as the distillation listens to it."""
    for _ in range(6000):
        if getattr(signal.getsignal(signal.SIGINT), "__func__", None) is Stop._request:
            os.kill(os.getpid(), signal.SIGINT)
            return
        time.sleep(0.01)


def test_after_ctrl_c_the_same_command_ends_with_the_same_numbers(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--hidden-epochs", 10, "--output-epochs", 10, "--batch-size", 8]
    assert main.main(words(runs, tmp_path / "whole", *options)) == 0
    interrupted = words(runs, tmp_path / "parts", *options)
    threading.Thread(target=press_ctrl_c, daemon=True).start()
    capsys.readouterr()
    assert main.main(interrupted) == 130
    assert "The same command continues there:" in capsys.readouterr().out
    assert not (tmp_path / "parts" / "recipe.json").exists()
    assert main.main(interrupted) == 0
    whole, parts = (open_trained(tmp_path / name).model.state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_checkpoints_of_other_settings_are_refused(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threading.Thread(target=press_ctrl_c, daemon=True).start()
    assert main.main(words(runs, tmp_path / "out", "--output-epochs", 40, "--batch-size", 8)) == 130
    said = refused(capsys, *words(runs, tmp_path / "out", "--output-epochs", 9, "--batch-size", 8)[1:])
    assert "holds another distillation (of other settings)" in said


def test_wrong_pairs_are_refused(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, converted = runs / "run", runs / "converted"
    out = ["--out", tmp_path / "out"]
    assert "is not a converted model" in refused(capsys, run, "--teacher", run, *out)
    assert "is a converted model itself" in refused(capsys, converted, "--teacher", converted, *out)
    tiny.training(tmp_path / "other", "standard", 1, epochs=12, width=12, dropout=0.0, head_dropout=0.0).run()
    said = refused(capsys, converted, "--teacher", tmp_path / "other", *out)
    assert f"was not made from {tmp_path / 'other'}: seed differ" in said
    assert "name another folder" in refused(capsys, converted, "--teacher", run, "--out", converted)
    assert "nothing to do" in refused(
        capsys, converted, "--teacher", run, *out, "--hidden-epochs", 0, "--output-epochs", 0
    )
    assert "--lr must be above 0" in refused(capsys, converted, "--teacher", run, *out, "--lr", 0)
    assert not (tmp_path / "out").exists()


def test_by_default_the_result_lies_beside_the_converted_model(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "converted", tmp_path / "mine")
    options = ["--teacher", str(runs / "run"), "--device", "cpu", "--samples", "32"]
    assert main.main(["distil", str(tmp_path / "mine"), *options]) == 0
    assert open_trained(tmp_path / "mine-distilled").converted
