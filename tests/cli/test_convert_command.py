"""``better-attention convert``: runs get another mechanism, exactly or not, and what cannot be done is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import better_attention as ba
from better_attention.cli import main
from better_attention.lab.trained.model import open_trained
from helpers import tiny


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs of the tiny task: ``standard`` and ``efficient``."""
    out = tmp_path_factory.mktemp("runs")
    for mechanism in ("standard", "efficient"):
        tiny.training(out / mechanism, mechanism).run()
    return out


def converted(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    capsys.readouterr()
    assert main.main(["convert", *map(str, words), "--json"]) == 0
    story: dict[str, Any] = json.loads(capsys.readouterr().out)
    return story


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    try:
        status = main.main(["convert", *map(str, words)])
    except SystemExit as end:
        status = int(end.code or 0)
    said = capsys.readouterr().err
    assert status == 2
    assert "Traceback" not in said
    return said


def test_upwards_is_exact_and_loses_nothing(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    story = converted(capsys, runs / "efficient", "standard", "--out", tmp_path / "out")
    assert story["conversion"]["exact"]
    assert story["accuracy"]["before"] == story["accuracy"]["after"] == ba.load_run(runs / "efficient").result[
        "test_accuracy"
    ]  # fmt: skip
    opened = open_trained(tmp_path / "out")
    inputs = tiny.splits().test.inputs
    assert {layer.mechanism.name for layer in attention(opened.model)} == {"standard"}
    expected = ba.load_run(runs / "efficient").model(inputs)
    torch.testing.assert_close(opened.model(inputs), expected, rtol=0, atol=1e-5)


def test_an_exact_conversion_needs_no_data(
    runs: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run is made to be one of MNIST, which is not here; its weights do not change by that."""
    shutil.copytree(runs / "efficient", run := tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["run"]["settings"]["dataset"] = "mnist"
    (run / "config.json").write_text(json.dumps(config))
    tiny.sign(run)
    assert main.main(["convert", str(run), "standard", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert "note: the accuracy is not measured: data set 'mnist' is not in" in said.err
    assert "accuracy" not in said.out
    assert json.loads((tmp_path / "out" / "conversion.json").read_text())["accuracy"] == {"before": None, "after": None}
    for needs in (["--approximate"], ["--calibrate", "9"], ["--data", str(tmp_path)]):
        told = refused(capsys, run, "standard", "--out", tmp_path / "more", *needs)
        assert "data set 'mnist' is not in" in told


def attention(model: torch.nn.Module) -> list[ba.MultiheadAttention]:
    return [module for module in model.modules() if isinstance(module, ba.MultiheadAttention)]


def test_an_approximation_has_to_be_asked_for_and_is_fitted(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, runs / "standard", "super", "--out", tmp_path / "out")
    assert "W_V cannot be folded into W_O with 3 heads" in said
    assert "Add --approximate" in said
    assert "exact=False" not in said
    assert not (tmp_path / "out").exists()
    story = converted(capsys, runs / "standard", "super", "--approximate", "--calibrate", 80, "--out", tmp_path / "out")
    assert story["calibration_samples"] == 80
    first, *_ = story["conversion"]["layers"]
    assert (first["before"], first["after"]) == ("standard", "super")
    assert 0 < first["error_after"] < first["error_before"]
    kernels = [layer.align for layer in attention(open_trained(tmp_path / "out").model)]
    assert {kernel.max_len for kernel in kernels if kernel is not None} == {tiny.task().length}


def test_the_report_on_the_screen(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(runs / "standard"), "optimised", "--approximate", "--layers", "1", "--out", str(tmp_path / "out")]
    assert main.main(["convert", *words]) == 0
    out = capsys.readouterr().out
    assert "1 layer converted to 'optimised': approximated" in out
    assert "blocks.1.attention" in out
    assert "% before, " in out


def test_the_folder_needs_the_run_no_more(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(runs / "efficient", tmp_path / "run")
    converted(capsys, tmp_path / "run", "optimised", "--out", tmp_path / "out")
    shutil.rmtree(tmp_path / "run")
    assert {layer.mechanism.name for layer in attention(open_trained(tmp_path / "out").model)} == {"optimised"}
    (tmp_path / "out" / "origin" / "config.json").write_text("{}")
    assert "config.json was changed since it was written" in refused(
        capsys, tmp_path / "out", "super", "--out", tmp_path / "more"
    )


def test_what_cannot_be_converted_is_told(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", tmp_path / "out"]
    assert "is not a folder: name that of a run" in refused(capsys, tmp_path / "nowhere", "super", *out)
    assert "unknown mechanism 'quick'" in refused(capsys, runs / "standard", "quick", *out)
    assert "it holds no config.json" in refused(capsys, runs, "super", *out)
    (tmp_path / "unfinished").mkdir()
    shutil.copy(runs / "standard" / "config.json", tmp_path / "unfinished")
    assert "is not finished" in refused(capsys, tmp_path / "unfinished", "super", *out)
    assert "--layers 7 fits no attention layer" in refused(capsys, runs / "efficient", "standard", "--layers", 7, *out)
    assert "--max-len 5 is the size of W_A" in refused(capsys, runs / "efficient", "standard", "--max-len", 5, *out)
    said = refused(capsys, runs / "standard", "super", "--approximate", "--calibrate", 10**6, *out)
    assert "1,000,000 training samples were asked for" in said
    assert "--texts x.txt: this model is of a run" in refused(
        capsys, runs / "efficient", "super", "--texts", "x.txt", *out
    )
    assert not (tmp_path / "out").exists()


def test_a_converted_model_is_not_converted_again_and_nothing_else_is_overwritten(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    converted(capsys, runs / "efficient", "optimised", "--out", tmp_path / "out")
    said = refused(capsys, tmp_path / "out", "standard", "--out", tmp_path / "again")
    assert "is a converted model: convert the model that it came from" in said
    assert converted(capsys, runs / "efficient", "standard", "--out", tmp_path / "out")["mechanism"] == "standard"
    before = (runs / "standard" / "model.safetensors").read_bytes()
    assert "refusing to overwrite" in refused(capsys, runs / "efficient", "super", "--out", runs / "standard")
    assert (runs / "standard" / "model.safetensors").read_bytes() == before
    study = tmp_path / "study"
    shutil.copytree(runs / "standard", study / "standard-h3-s0")
    said = refused(capsys, runs / "efficient", "standard", "--out", study)
    assert f"{study} holds runs (standard-h3-s0), and a converted model has a folder of its own" in said
    assert f"such as {study / 'converted'}" in said


def test_what_a_model_was_built_from_is_no_run(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    converted(capsys, runs / "efficient", "optimised", "--out", tmp_path / "out")
    assert (tmp_path / "out" / "origin" / "config.json").is_file()
    assert main.main(["runs", str(tmp_path)]) == 0
    assert "No run folders" in capsys.readouterr().out


def test_data_of_another_run_is_refused(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = Path(shutil.copytree(runs / "efficient", tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    config["run"]["data_sha256"] = "0" * 64
    (other / "config.json").write_text(json.dumps(config))
    tiny.sign(other)
    assert "is not the data that the run" in refused(capsys, other, "standard", "--out", tmp_path / "out")
