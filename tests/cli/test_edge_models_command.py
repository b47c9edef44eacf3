"""``better-attention edge --models``: runs, converted models and ONNX files against each other on this machine."""

from __future__ import annotations

import csv
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import better_attention as ba
from better_attention.bench.edge.contenders import Contender, switch_kernels_off
from better_attention.bench.edge.models import Row, summarised
from better_attention.bench.runner import Spread
from better_attention.cli import main
from helpers import tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of torch's exporter
    pytest.mark.usefixtures("settled_heap"),
]
QUICK = ["--quick", "--rounds", "2", "--batch-size", "4"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run and with the same model converted to super."""
    out = tmp_path_factory.mktemp("runs")
    tiny.training(out / "run", "standard").run()
    words = ["super", "--approximate", "--calibrate", "80", "--out", str(out / "converted")]
    assert main.main(["convert", str(out / "run"), *words]) == 0
    return out


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert main.main(["edge", *map(str, words)]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


@pytest.mark.slow
def test_every_model_in_every_runtime(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxscript")
    capsys.readouterr()
    words = ["edge", "--models", str(runs), *QUICK, "--out", str(tmp_path), "--json"]
    assert main.main([*words, "--runtimes", "compiled,onnx"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    rows = document["models"]
    names = [(Path(row["model"]).name, row["runtime"]) for row in rows]
    assert names == [(name, way) for name in ("converted", "run") for way in ("compiled", "onnx")]
    for row in rows:
        assert row["reason"] == ""
        assert row["calls"] >= 6
        assert 0 < row["median"] <= row["p90"] < 60
        assert row["memory_bytes"] is None or 0 < row["memory_bytes"] < 2**28
    assert rows[0]["times_as_fast"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert rows[2]["file_bytes"] == (runs / "run" / "model.safetensors").stat().st_size
    with (tmp_path / "models.csv").open(newline="") as file:
        assert [line["runtime"] for line in csv.DictReader(file)] == [row["runtime"] for row in rows]
    assert json.loads((tmp_path / "models.json").read_text()) == document


@pytest.mark.slow
def test_onnx_files_and_what_cannot_be_timed(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxscript")
    files = tmp_path / "files"
    files.mkdir()
    for kind in ("onnx", "int8"):
        words = ["--to", kind, "--out", str(files / f"{kind}.onnx"), "--force", "--samples", "8"]
        assert main.main(["export", str(runs / "run"), *words]) == 0
    (files / "torn.onnx").write_bytes((files / "onnx.onnx").read_bytes()[:1000])
    capsys.readouterr()
    assert main.main(["edge", "--models", str(files), *QUICK, "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    rows = {
        Path(row["model"]).name: row for row in json.loads((tmp_path / "out" / "models.json").read_text())["models"]
    }
    assert (rows["int8.onnx"]["runtime"], rows["onnx.onnx"]["runtime"]) == ("onnx-int8", "onnx")
    assert rows["onnx.onnx"]["file_bytes"] == (files / "onnx.onnx").stat().st_size
    assert "cannot be read by ONNX Runtime" in rows["torn.onnx"]["reason"]
    assert f"Not timed: {files / 'torn.onnx'}, onnx: " in out
    assert "calls of 4 samples on this CPU" in out
    assert "compiled: PyTorch with the kernels of better-attention (" in out


def test_eager_computes_the_same_without_the_kernels(runs: Path) -> None:
    inputs = tiny.task().random_samples(4).inputs
    for mechanism in ("super", "efficient+expressive"):
        model = tiny.task().build(mechanism, 3).eval()
        expected = model(inputs)
        switch_kernels_off(model)
        layers = [module for module in model.modules() if isinstance(module, ba.MultiheadAttention)]
        assert {layer.impl for layer in layers} == {"sdpa" if mechanism == "super" else "reference"}
        torch.testing.assert_close(model(inputs), expected, rtol=0, atol=1e-5)


def test_ratios_are_formed_within_a_round() -> None:
    """Medians of the rounds 1 and 4 s beside 4 and 2 s: 0.25 and 2 times as fast."""
    rows = summarised(
        [Row("a", "eager"), Row("b", "eager"), Row("c", "onnx", reason="broken")],
        {0: [[1.0, 1.0, 9.0], [4.0]], 1: [[4.0], [2.0]]},
    )
    assert rows[1].times_as_fast == Spread.of([0.25, 2.0])
    assert (rows[0].median, rows[0].calls, rows[2].reason) == (2.5, 4, "broken")
    assert rows[0].p90 == pytest.approx(7.5)


def test_ctrl_c_shows_what_was_timed(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def press() -> None:
        while "timing 1 of 1" not in seen[0]:
            time.sleep(0.05)
            seen[0] += capsys.readouterr().err
        time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGINT)

    seen = [""]
    words = ["--runtimes", "compiled", "--rounds", "500", "--out", str(tmp_path)]
    threading.Thread(target=press, daemon=True).start()
    assert main.main(["edge", "--models", str(runs / "run"), *words]) == 130
    document = json.loads((tmp_path / "models.json").read_text())
    assert document["complete"] is False
    assert document["models"][0]["calls"] > 0


@pytest.mark.slow
def test_memory_counts_the_weights(tmp_path: Path) -> None:
    """A model with 32 MiB of weights needs at least those."""
    from better_attention.bench.edge.models import memory_of

    tiny.training(tmp_path / "run", "efficient", width=1536, layers=1, mlp=2304, epochs=1, train_samples=20).run()
    size = (tmp_path / "run" / "model.safetensors").stat().st_size
    assert size > 2**25
    found = memory_of(Contender("run", "compiled", tmp_path / "run", 1, 1))
    assert found is None or size <= found < 4 * size


def test_wrong_arguments_are_refused(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "does not exist: name runs" in refused(capsys, "--models", tmp_path / "nowhere")
    assert "holds no finished run, no converted model and no .onnx file" in refused(capsys, "--models", tmp_path)
    assert "--tasks has no meaning for --models" in refused(capsys, "--models", runs, "--tasks", "imdb")
    assert "--runtimes has no meaning for table 4" in refused(capsys, "--runtimes", "eager")
    (tmp_path / "models.json").write_text("{}")
    assert "refusing to overwrite" in refused(capsys, "--models", runs, "--out", tmp_path)
