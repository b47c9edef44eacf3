"""``better-attention export``: runs and converted models as ONNX files, with their reports, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import better_attention as ba
from better_attention.cli import main
from better_attention.lab.models.text_classifier import TextClassifier
from better_attention.lab.trained.model import open_trained
from helpers import tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch's exporter


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the tiny task, and what ``convert`` makes of it."""
    out = tmp_path_factory.mktemp("runs")
    tiny.training(out / "run", "standard").run()
    words = ["super", "--approximate", "--calibrate", "80", "--out", str(out / "converted")]
    assert main.main(["convert", str(out / "run"), *words]) == 0
    return out


def exported(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    capsys.readouterr()
    assert main.main(["export", *map(str, words), "--json"]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert main.main(["export", *map(str, words)]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def through_onnx(path: Path, inputs: torch.Tensor) -> torch.Tensor:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(path)
    return torch.from_numpy(np.asarray(session.run(None, {session.get_inputs()[0].name: inputs.numpy()})[0]))


@pytest.mark.slow
def test_a_converted_model_computes_the_same_in_onnx_runtime(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxscript")
    report = exported(capsys, runs / "converted", "--out", tmp_path / "m.onnx")
    assert report["parity"]["worst"] < 1e-5
    assert report["parity"]["operators"]["Attention"] == 2
    assert report["accuracy"]["before"] == report["accuracy"]["after"]
    assert report["int8"] is None
    inputs = tiny.splits().test.inputs
    expected = open_trained(runs / "converted").model(inputs)
    torch.testing.assert_close(through_onnx(tmp_path / "m.onnx", inputs), expected, rtol=0, atol=1e-5)
    older = exported(capsys, runs / "run", "--out", tmp_path / "m.onnx", "--opset", 18)
    assert "Attention" not in older["parity"]["operators"]


@pytest.mark.slow
def test_int8_below_the_agreement_is_refused_unless_forced(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxscript")
    words = [runs / "run", "--to", "int8", "--out", tmp_path / "m.onnx", "--samples", 30]
    said = refused(capsys, *words, "--agreement", "1")
    assert "agrees too little" in said
    assert "--force to write it all the same" in said
    assert list(tmp_path.iterdir()) == []
    report = exported(capsys, *words, "--agreement", "1", "--force")
    assert 0.9 < report["int8"]["agreement"] < 1
    assert report["bytes"] == (tmp_path / "m.onnx").stat().st_size
    assert report["int8"]["quantised"] > 0
    capsys.readouterr()
    assert main.main(["export", *map(str, words), "--agreement", "0.5"]) == 0
    out = capsys.readouterr().out
    assert "in float32, before it became int8: opset 23" in out
    assert "% of the model, " in out


def test_what_cannot_be_exported_is_told(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxscript")
    out = ["--out", tmp_path / "m.onnx"]
    assert "is not a folder: name that of a run" in refused(capsys, tmp_path / "nowhere", *out)
    assert "opset must be >= 18, received 17" in refused(capsys, runs / "run", *out, "--opset", 17)
    assert "--agreement must be from 0 to 1, received 2" in refused(capsys, runs / "run", *out, "--agreement", 2)
    assert "does not exist. Create it first" in refused(capsys, runs / "run", "--out", tmp_path / "no" / "m.onnx")
    (tmp_path / "notes.onnx").write_text("mine")
    assert "refusing to overwrite" in refused(capsys, runs / "run", "--out", tmp_path / "notes.onnx")
    assert (tmp_path / "notes.onnx").read_text() == "mine"
    assert "an ONNX file, in float32 or int8" in (said := refused(capsys, runs / "run", "--out", tmp_path / "m.tflite"))
    assert "call it m.onnx" in said
    ba.save_converted(open_trained(runs / "converted").model, tmp_path / "python")
    assert "only folders of `better-attention convert` do" in refused(capsys, tmp_path / "python", *out)


def test_an_opset_that_nobody_knows_is_told(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxscript")
    assert "--opset" in refused(capsys, runs / "run", "--out", tmp_path / "m.onnx", "--opset", 99)
    assert list(tmp_path.iterdir()) == []


def test_without_the_extra_the_command_says_what_to_install(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert "pip install 'better-attention[onnx]'" in refused(capsys, runs / "run", "--out", tmp_path / "m.onnx")


def test_the_text_classifier_is_exported_with_and_without_padding(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model = TextClassifier(vocabulary=20, length=6, width=8, layers=1, heads=2).eval()
    tokens = torch.randint(1, 20, (3, 6))
    report = ba.export_onnx(model, tmp_path / "m.onnx", tokens, dynamic={"tokens_BL": {0: "batch"}})
    assert report.worst < 1e-5
    tokens[0, :4] = 0
    tokens[1] = 0
    torch.testing.assert_close(through_onnx(tmp_path / "m.onnx", tokens), model(tokens), rtol=0, atol=1e-5)
