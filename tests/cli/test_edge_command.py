"""``better-attention edge``: what is timed, what is told beside the paper, int8, and what is refused."""

from __future__ import annotations

import argparse
import csv
import json
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from better_attention.bench import machine
from better_attention.bench.edge import timing, view
from better_attention.bench.edge.timing import Settings, Timing
from better_attention.bench.runner import Spread
from better_attention.cli import UserError, main
from better_attention.cli import edge as verb
from better_attention.lab import published
from better_attention.lab.tasks.catalogue import TASKS
from helpers import tiny

pytestmark = pytest.mark.usefixtures("settled_heap")
SHORT = ["--tasks", "imdb", "--heads", "1,8", "--mechanisms", "standard,super"]
SHORT += ["--samples", "50", "--batch-size", "20", "--rounds", "3"]
FP32 = [*SHORT, "--precisions", "float32"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files go nowhere else, and tables are as wide as they need to be."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)


def run(*words: str) -> int:
    return main.main(["edge", *words])


def document(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert run(*words, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_the_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, *FP32, "--threads", "1")
    assert found["machine"]["threads"] == 1
    assert found["machine"]["cpu"] == machine.cpu_name()
    assert (found["settings"]["samples"], found["settings"]["batch_size"], found["complete"]) == (50, 20, True)
    timed = [row for row in found["rows"] if row["rounds"]]
    assert [(row["task"], row["heads"], row["mechanism"]) for row in timed] == [
        ("imdb", h, m) for h in (1, 8) for m in ("standard", "super")
    ]
    for row in timed:
        assert (row["rounds"], row["measured"], row["precision"]) == (3, 50, "float32")
        assert 0 < row["seconds_low"] <= row["seconds_median"] <= row["seconds_high"] < 60
    assert [row["times_as_fast_median"] for row in timed[::2]] == [1.0, 1.0]
    assert [row["seconds_paper"] for row in timed] == [0.114, 0.112, 0.266, 0.264]
    assert [row["times_as_fast_paper"] for row in timed] == pytest.approx([1, 0.114 / 0.112, 1, 0.266 / 0.264])
    missing = [row for row in found["rows"] if not row["rounds"]]
    assert len(missing) == 5 * 12 - 4
    assert {row["reason"] for row in missing} == {"not run"}
    assert (tmp_path / "runs" / "edge" / "edge.json").is_file()


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*FP32) == 0
    out = capsys.readouterr().out
    for words in (
        machine.cpu_name(),
        f"torch {torch.__version__}",
        "Our seconds are for 50 samples: compare the ratios",
        "50 random inputs in batches of 20, untrained weights (speed only)",
        "times as fast as standard",
        "Apple M2",
    ):
        assert words in out
    line = next(line for line in out.splitlines() if line.split()[:2] == ["super", "8"])
    assert "0.264" in line  # the paper's seconds
    assert "1.008" in line  # and its speed relative to standard, 0.266 / 0.264
    assert "extrapolated" not in out
    assert "Of the paper's table not run: mnist, cifar100, imagenet, imdb (h 1: efficient, optimised; h 4; h 8: " in out


@pytest.mark.parametrize(("words", "measured"), [(["--measured", "30"], 30), (["--measured", "900"], 50)])
def test_fewer_samples_are_told(words: list[str], measured: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*FP32, *words) == 0
    out = capsys.readouterr().out
    assert ("imdb: 50 extrapolated from 30." in out) == (measured == 30)
    row = json.loads(Path("runs/edge/edge.json").read_text())["timings"][0]
    assert row["measured"] == measured


@pytest.mark.parametrize(("measured", "seconds"), [(30, 2 * 50 / 30), (900, 3.0)])
def test_fewer_samples_are_scaled(measured: int, seconds: float) -> None:
    """Every batch of 20 takes a second on the clock of this test: 30 of 50 samples in two batches are 3.33 seconds."""
    fewer = Settings(samples=50, batch_size=20, rounds=1, measured=measured)
    watch = lambda model, batches: float(len(batches))  # noqa: E731
    (timed,) = timing.measure_group(tiny.task(), ["standard"], 3, "float32", fewer, watch=watch)
    assert timed.seconds is not None
    assert timed.seconds.median == pytest.approx(seconds)


def test_quick_takes_about_a_second_a_pass() -> None:
    quick = Settings(samples=5000, batch_size=32, quick=True)
    assert timing.how_many(quick, 0.1) == 320
    assert timing.how_many(quick, 60.0) == 32
    assert timing.how_many(quick, 1e-6) == 5000
    assert timing.how_many(Settings(quick=True, measured=64), 1e-6) == 64


def test_the_mechanisms_take_turns_and_ratios_are_formed_within_a_round() -> None:
    order: list[str] = []
    speeds = {"a": iter([1.0, 10.0, 4.0]), "b": iter([2.0, 5.0, 2.0])}

    def passes(model: Any, batches: Any) -> float:
        if len(batches) == 1:
            return 0.0
        order.append(model)
        return next(speeds[model])

    found = timing.rounds({"a": "a", "b": "b"}, [torch.zeros(1)] * 2, 3, passes)  # type: ignore[dict-item]
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert found == {"a": [1.0, 10.0, 4.0], "b": [2.0, 5.0, 2.0]}


def test_a_single_round_has_no_range(capsys: pytest.CaptureFixture[str]) -> None:
    for rounds, told in (("1", True), ("2", False)):
        assert run(*FP32, "--rounds", rounds) == 0
        line = next(line for line in capsys.readouterr().out.splitlines() if line.split()[:2] == ["super", "8"])
        assert ("(–)" in line) == told


def test_a_quick_pass_is_sized_by_standard_attention() -> None:
    asked: list[Any] = []

    def watch(model: nn.Module, batches: Any) -> float:
        asked.append(model)
        return 0.5

    quick = Settings(64, 16, 1, quick=True)
    timings = timing.measure_group(tiny.task(), ["super", "standard"], 3, "float32", quick, watch=watch)
    assert [timing.measured for timing in timings] == [32, 32]
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in asked]
    assert sizes[:2] == [tiny.task().size("standard", 3)] * 2
    assert tiny.task().size("super", 3) in sizes


def test_an_int8_timing_is_not_the_papers_row() -> None:
    spread = Spread.of([1.0])
    report = view.Report({}, Settings(), [Timing("mnist", 4, "int8", "standard", spread, spread, 1, 5000)])
    rows = [row for row in view.beside_paper(report) if (row["task"], row["heads"]) == ("mnist", 4)]
    assert [(row["mechanism"], row["precision"], row["reason"]) for row in rows] == [
        ("standard", "int8", ""),
        *((name, "float32", "not run") for name in ("standard", "optimised", "efficient", "super")),
    ]


def test_ratios_are_standards_time_over_its_own() -> None:
    """Rounds of 1, 10, 4 and 2, 5, 2 seconds: the median of 0.5, 2, 2, and not the ratio of the medians, 4 / 2."""
    task = tiny.task()
    sizes = {name: task.size(name, 3) for name in ("standard", "super")}
    seconds = {sizes["standard"]: iter([1.0, 10.0, 4.0]), sizes["super"]: iter([2.0, 5.0, 2.0])}

    def watch(model: nn.Module, batches: Any) -> float:
        """The next of these for a pass of two batches; a single batch is a trial."""
        size = sum(parameter.numel() for parameter in model.parameters())
        return next(seconds[size]) if len(batches) == 2 else 0.0

    settings = Settings(samples=16, batch_size=8)
    timings = timing.measure_group(task, list(sizes), 3, "float32", settings, watch=watch)
    assert timings[1].times_as_fast == Spread.of([0.5, 2.0, 2.0])
    assert timings[1].seconds == Spread.of([2.0, 5.0, 2.0])


def test_heads_that_do_not_divide_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--tasks", "imdb", "--heads", "5,4", "--mechanisms", "standard", *FP32[-2:], "--quick") == 0
    assert "Not timed: imdb, h 5: embed_dim must be divisible" in capsys.readouterr().out
    assert run("--tasks", "imdb,mnist", "--heads", "5,3", "--mechanisms", "standard") == 2
    assert "--heads: none of 5, 3 divides a model's width (imdb 32, mnist 128)" in capsys.readouterr().err


def test_int8_without_torchao_is_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    assert run(*SHORT) == 0
    out = capsys.readouterr().out
    assert "better-attention[edge]" in out
    timed = [t for t in json.loads(Path("runs/edge/edge.json").read_text())["timings"] if t["rounds"]]
    assert {t["precision"] for t in timed} == {"float32"}


def fake_torchao(monkeypatch: pytest.MonkeyPatch, quantize: Any) -> None:
    module = ModuleType("torchao.quantization")
    module.quantize_ = quantize  # type: ignore[attr-defined]
    module.Int8DynamicActivationInt8WeightConfig = object  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchao", ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.quantization", module)


def test_what_was_not_quantised_is_not_called_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_torchao(monkeypatch, lambda model, config: None)
    (timed,) = timing.measure_group(tiny.task(), ["standard"], 3, "int8", Settings(samples=16, batch_size=16))
    assert timed.rounds == 0
    # a tiny ViT: patches, 2 layers of 4 + 2 maps, head
    assert timed.reason == "torchao left 14 of 14 linear maps in floating point"


def test_wrong_int8_numbers_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rough(torch.Tensor):
        pass

    def spoil(model: nn.Module, config: Any) -> None:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight = nn.Parameter((module.weight.data * 3).as_subclass(Rough), requires_grad=False)

    fake_torchao(monkeypatch, spoil)
    (timed,) = timing.measure_group(tiny.task(), ["standard"], 3, "int8", Settings(samples=16, batch_size=16))
    assert timed.rounds == 0
    assert "of the largest float32 output, allowed 1e-01" in timed.reason


@pytest.mark.filterwarnings("ignore")  # of torchao's own
def test_int8_by_torchao() -> None:
    pytest.importorskip("torchao")
    probe = tiny.task(width=12).random_samples(16).inputs
    model, count = timing.prepare(tiny.task(width=12), "super", 3, "int8", probe)
    # a tiny ViT: patches, 2 layers of q, o and the MLP, head
    assert count == 1 + 2 * (2 + 2) + 1
    with torch.inference_mode():
        exact, _ = timing.prepare(tiny.task(width=12), "super", 3, "float32", probe)
        off = (model(probe) - exact(probe)).abs().max() / exact(probe).abs().max()
    assert 0 < off < 0.1  # rounded to 8 bits, and no more than that


def test_ctrl_c_keeps_what_was_done(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    real, done = timing.measure_group, []

    def once(*arguments: Any) -> Any:
        if done:
            raise KeyboardInterrupt
        done.append(True)
        return real(*arguments)

    monkeypatch.setattr(timing, "measure_group", once)
    assert run(*FP32) == 130
    assert "Interrupted: this is what was timed by then." in capsys.readouterr().out
    assert json.loads(Path("runs/edge/edge.json").read_text())["complete"] is False


def test_rows_are_in_the_file_before_the_next_is_timed_and_sigterm_ends_a_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, kept = timing.measure_group, []
    path = Path("runs/edge/edge.json")

    def group(*arguments: Any) -> Any:
        kept.append(json.loads(path.read_text()) if path.exists() else None)
        if len(kept) == 2:
            signal.raise_signal(signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(timing, "measure_group", group)
    assert run(*FP32) == 143
    assert kept[0] is None
    assert (len(kept[1]["timings"]), kept[1]["complete"]) == (2, False)
    assert "Interrupted: this is what was timed by then." in capsys.readouterr().out
    assert len(view.read(path).timings) == 2


def count_groups(monkeypatch: pytest.MonkeyPatch, most: int = 99) -> list[Any]:
    """What is timed, as (heads, mechanisms); Ctrl-C comes instead of the group after ``most`` of them."""
    real = timing.measure_group
    groups: list[Any] = []

    def group(task: Any, mechanisms: Any, heads: int, *rest: Any) -> Any:
        if len(groups) == most:
            raise KeyboardInterrupt
        groups.append((heads, tuple(mechanisms)))
        return real(task, mechanisms, heads, *rest)

    monkeypatch.setattr(timing, "measure_group", group)
    return groups


@pytest.mark.parametrize("out", [(), ("--out", "mine")])
def test_the_same_command_goes_on_where_it_stopped(
    out: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(*out[1:] or ("runs", "edge"), "edge.json")
    with monkeypatch.context() as patched:
        count_groups(patched, 1)
        assert run(*FP32, *out) == 130
    before = json.loads(path.read_text())
    capsys.readouterr()
    groups = count_groups(monkeypatch)
    assert run(*FP32, *out) == 0
    said = capsys.readouterr()
    assert f"{path} holds 2 of 4 rows of the same settings" in said.err
    assert groups == [(8, ("standard", "super"))]
    after = json.loads(path.read_text())
    assert after["complete"] is True
    assert after["timings"][:2] == before["timings"]
    assert len(after["timings"]) == 4
    assert run(*FP32, *out) == 0
    assert f"{path} is complete: none of its 4 rows is measured again" in capsys.readouterr().err
    assert len(groups) == 1
    assert run(*FP32, *out, "--again") == 0
    assert len(groups) == 3
    # Another mechanism is timed in turn with those that are there: their ratios belong together.
    assert run(*FP32, *out, "--mechanisms", "efficient", "--heads", "8") == 0
    assert groups[3:] == [(8, ("standard", "super", "efficient"))]
    assert len(json.loads(path.read_text())["timings"]) == 5


def test_rows_of_other_settings_are_not_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*FP32) == run(*FP32, "--out", "mine") == 0
    content = Path("mine/edge.json").read_bytes()
    assert run(*FP32, "--rounds", "2", "--out", "mine") == 2
    assert "--out mine holds rows that were measured differently (rounds 3, now 2)" in capsys.readouterr().err
    assert Path("mine/edge.json").read_bytes() == content
    assert run(*FP32, "--rounds", "2") == 0
    assert sorted(str(path) for path in Path("runs").glob("*/edge.json")) == [
        "runs/edge-2/edge.json",
        "runs/edge/edge.json",
    ]
    assert run(*FP32, "--rounds", "2", "--out", "mine", "--again") == 0
    assert Path("mine/edge.json").read_bytes() != content


def test_the_time_of_all_rows_is_told_before_the_first() -> None:
    """Every batch takes 10 seconds on the clock of this test."""
    told: list[str] = []
    settings = Settings(samples=50, batch_size=20, rounds=3)
    watch = lambda model, batches: 10.0 * len(batches)  # noqa: E731
    rows = timing.measure([tiny.task()], ["standard", "super"], (1, 3), ["float32"], settings, told.append, watch=watch)
    assert len(list(rows)) == 2
    first = told[0]
    # 3 rounds of 3 batches and an untimed one for 4 rows, and 2 batches to see how long one takes for 2 groups
    assert first == f"about {(4 * 3 * 4 * 10 + 2 * 2 * 10) / 60:.1f} minutes in all for 4 rows at the present load"


@pytest.mark.parametrize(("spread", "noisy"), [((1.2, 0.7, 1.9), True), ((2.5, 2.1, 2.9), False)])
def test_noise_is_told_beside_the_number_and_a_summary_ends_the_run(
    spread: tuple[float, float, float],
    noisy: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = timing.measure_group

    def group(*arguments: Any) -> Any:
        standard, other = real(*arguments)
        return [standard, replace(other, times_as_fast=Spread(*spread))]

    monkeypatch.setattr(timing, "measure_group", group)
    described = machine.describe
    monkeypatch.setattr(machine, "describe", lambda command: described(command) | {"load_average": 7.25, "cores": 2})
    assert run(*FP32) == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.split()[:2] == ["super", "8"])
    assert (" noisy" in line) == noisy
    assert f"super in float32: {spread[0]:.2f} times as fast as standard (2 models)" in out
    assert ("Noise: in 2 of 2 comparisons" in out.splitlines()[-1]) == noisy
    assert "the machine is busy: load 7.25 on 2 cores at the start" in out
    assert "÷" not in out


def test_a_file_of_an_earlier_version_holds_ratios_of_times(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*FP32, "--out", "here") == 0
    path = Path("here/edge.json")
    document = json.loads(path.read_text())
    for kept in document["timings"]:
        del kept["times_as_fast"]
        kept["ratio"] = {"median": 0.5, "low": 0.25, "high": 0.8}
    path.write_text(json.dumps(document))
    (path.parent / "manifest.sha256").unlink()
    assert view.read(path).timings[1].times_as_fast == Spread(2.0, 1.25, 4.0)


def test_files_come_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*FP32, "--out", "here") == 0
    said = capsys.readouterr()
    assert "wrote here/edge.csv" in said.err
    report = view.read(tmp_path / "here" / "edge.json")
    assert isinstance(report.timings[0], Timing)
    assert view.beside_paper(report)[0]["mechanism"] == "standard"
    with (tmp_path / "here" / "edge.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 60
    assert float(lines[0]["seconds_median"]) == report.timings[0].seconds.median  # type: ignore[union-attr]
    # Table 4 prints the same.
    assert main.main(["table", "4", "here"]) == 0
    table = capsys.readouterr().out
    assert table.splitlines()[1:] == said.out.splitlines()
    assert main.main(["table", "4", "here", "--json"]) == 0
    (block,) = json.loads(capsys.readouterr().out)["blocks"]
    assert block["rows"] == view.beside_paper(report)


def test_table_4_without_ours_is_the_papers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["table", "4"]) == 0
    out = capsys.readouterr().out
    assert "Not run: no edge.json was found" in out
    line = next(line for line in out.splitlines() if line.split()[:2] == ["super", "8"])
    for task in timing.PAPER_TASKS:
        (row,) = [r for r in published.edge_inference() if (r["mechanism"], r["heads"]) == ("super", 8)]
        assert str(row[task]) in line
    assert main.main(["table", "4", "--csv", "t.csv"]) == 0
    assert len(Path("t.csv").read_text().splitlines()) == 61


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"machine": {}, "settings": {}, "timings": [], "complete": true}']
)
def test_a_damaged_file_is_refused(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "edge.json"
    path.write_text(content)
    assert main.main(["table", "4", str(path)]) == 2
    assert f"{path} is damaged or no edge.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tasks", "digits"), "--tasks: expected some of mnist"),
        (("--tasks", ""), "received ''"),
        (("--out", "file"), "is a file: name a folder"),
    ],
)
def test_what_is_refused(words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").write_text("mine")
    assert run(*words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("words", [("--precisions", "int4"), ("--heads", "0"), ("--rounds", "0"), ("--samples", "x")])
def test_words_the_parser_refuses(words: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as stop:
        run(*words)
    assert stop.value.code == 2


def test_without_words_it_is_the_papers_table() -> None:
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    args = parser.parse_args([])
    assert (args.samples, args.heads, args.precisions) == (5000, (1, 4, 8), ("float32", "int8"))
    assert [task.name for task in verb.chosen(args.tasks)] == [n for n in timing.PAPER_TASKS if n in TASKS]
    assert {task.scale for task in verb.chosen(None)} == {"paper"}
    with pytest.raises(UserError, match="received 'chess'"):
        verb.chosen("mnist, chess")
