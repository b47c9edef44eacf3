"""``better-attention table``: the paper beside ours, what was not run, and what is refused."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from better_attention import MultiheadAttention
from better_attention.cli import main
from better_attention.lab import published
from better_attention.lab.paper.beside import TABLES, printed_unit
from better_attention.lab.tasks.catalogue import TASKS
from better_attention.lab.training.loop import count
from helpers import studies


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No results of anybody else, and tables as wide as they need to be."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)


def imdb(mechanism: str = "standard", seed: int = 0, heads: int = 4, **changes: Any) -> dict[str, Any]:
    """A run of imdb as results.json has it, at the paper's setting."""
    settings = TASKS["imdb"]("paper").settings() | changes.pop("settings", {})
    counts = {"standard": 4224, "optimised": 3168, "efficient": 2112, "super": 3168, "expressive": 4224}
    base = {"task": "imdb", "scale": "paper", "settings": settings, "attention_params": counts.get(mechanism, 4224)}
    base["samples"] = {"train": 22_500, "validation": 2_500, "test": 25_000}
    return studies.record(mechanism, seed, heads, **(base | changes))


def write(path: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records), "utf-8")
    return path


def table(*words: object) -> int:
    return main.main(["table", *map(str, words)])


def document(capsys: pytest.CaptureFixture[str], *words: object) -> Any:
    assert table(*words, "--json") == 0
    return json.loads(capsys.readouterr().out)


def row_of(block: Any, mechanism: str, heads: int) -> Any:
    return next(row for row in block["rows"] if (row["mechanism"], row["heads"]) == (mechanism, heads))


def test_ours_stands_beside_the_paper(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Means, t intervals and differences as computed by hand: 77, 78, 79 give 78 ± 4.303 / √3 = 2.484."""
    runs = [imdb("standard", s, test_accuracy=77.0 + s, test_loss=0.5, epoch_seconds=4.0) for s in range(3)]
    runs += [imdb("super", 0, test_accuracy=80.0, epoch_seconds=3.0), imdb("expressive", 0)]
    path = write(tmp_path / "a" / "results.json", runs)
    found = document(capsys, 8, path)
    (block,) = found["blocks"]
    assert (found["table"], block["task"], block["scale"], block["paper_scale"]) == (8, "imdb", "paper", True)
    assert block["changed"] == {}
    standard = row_of(block, "standard", 4)
    assert standard["seeds"] == 3
    assert standard["test_accuracy"] == 78.0
    assert standard["test_accuracy_interval"] == pytest.approx(2.484, abs=5e-4)
    assert standard["test_accuracy_paper"] == 77.62
    assert standard["test_accuracy_difference"] == pytest.approx(0.38)
    assert standard["test_loss_difference"] == pytest.approx(0.5 - 0.474)
    assert standard["attention_params_agrees"] is True
    super_ = row_of(block, "super", 4)
    assert super_["test_accuracy_interval"] is None
    assert super_["times_as_fast_as_standard"] == pytest.approx(1 / 0.75)
    assert super_["times_as_fast_as_standard_paper"] == pytest.approx(0.315 / 0.299)
    extra = row_of(block, "expressive", 4)
    assert (extra["in_paper"], extra["test_accuracy_paper"]) == (False, None)
    assert {(row["mechanism"], row["heads"]) for row in block["not_run"]} == {
        (m, h) for m in ("standard", "optimised", "efficient", "super") for h in (1, 2, 4)
    } - {("standard", 4), ("super", 4)}

    assert table(8, path) == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.split()[:3] == ["standard", "4", "3"])
    for cell in ("4,224", "78.00 ± 2.48", "77.62", "+0.38"):
        assert cell in line
    assert "+0.026" in out
    assert "super            4         1" in out
    assert "80.00" in out
    assert "± –" not in out  # of one seed nothing stands in the place of an interval
    assert "Not run: standard (h 1, 2), optimised (h 1, 2, 4), efficient (h 1, 2, 4), super (h 1, 2)." in out
    assert "better-attention compare imdb --scale paper --heads 1,2,4" in out
    assert "not the paper's" not in out


@pytest.mark.parametrize("number", sorted(TABLES))
def test_every_figure_of_the_paper_is_there_when_nothing_was_run(
    number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    found = document(capsys, number)
    assert [block["scale"] for block in found["blocks"]] == [None] * len(found["blocks"])
    for block, part in zip(found["blocks"], TABLES[number][1], strict=True):
        theirs_all = part.published()
        assert len(block["rows"]) == len(block["not_run"]) == len(theirs_all)
        for row, theirs in zip(block["rows"], theirs_all, strict=True):
            told = {key.removesuffix("_paper"): value for key, value in row.items() if key.endswith("_paper")}
            del told["in"]
            told.pop("times_as_fast_as_standard", None)
            assert told == {key: theirs[key] for key in published.COLUMNS if theirs[key] is not None}
    assert table(number) == 0
    assert capsys.readouterr().out.count("Not run: ") == len(found["blocks"])


def test_tables_1_to_3_are_the_rows_of_the_most_heads(capsys: pytest.CaptureFixture[str]) -> None:
    tasks = {
        number: [(b["task"], {row["heads"] for row in b["rows"]}) for b in document(capsys, number)["blocks"]]
        for number in (1, 2, 3)
    }
    assert tasks[1] == [("mnist", {4}), ("cifar100", {8}), ("imagenet", {12})]
    assert tasks[2] == [("imdb", {4}), ("amazon", {4})]
    assert tasks[3] == [("translation", {4})]


def test_runs_with_fewer_heads_are_no_rows_of_table_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "results.json", [imdb("expressive", heads=1), imdb("expressive", heads=4)])
    rows = document(capsys, 2, path)["blocks"][0]["rows"]
    assert [(row["mechanism"], row["heads"]) for row in rows if not row["in_paper"]] == [("expressive", 4)]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scale": "small", "settings": {"epochs": 3}}, "scale small, not the paper's scale (epochs=3)"),
        ({"settings": {"batch_size": 32}}, "scale paper, not the paper's setting (batch_size=32)"),
        ({"scale": "smoke", "settings": None}, "scale smoke, not the paper's scale (no settings recorded)"),
    ],
)
def test_another_scale_or_setting_is_marked(
    changes: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = changes.pop("settings")
    record = imdb(**changes, **({"settings": settings} if settings else {}))
    if settings is None:
        del record["settings"]
    path = write(tmp_path / "results.json", [record])
    assert table(8, path) == 0
    assert said in capsys.readouterr().out
    assert document(capsys, 8, path)["blocks"][0]["paper_scale"] is False


def test_other_data_are_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "results.json", [imdb(samples={"train": 22_500, "validation": 2_500, "test": 24_999})])
    assert table(8, path) == 0
    assert "not the paper's setting (49,999 samples instead of 50,000)" in capsys.readouterr().out
    block = document(capsys, 8, path)["blocks"][0]
    assert (block["changed"], block["paper_scale"]) == ({"samples": 49_999}, False)


def test_speed_relative_to_standard_is_that_of_neighbouring_updates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Hours apart, the slower run may have the faster model."""
    runs = [
        imdb("standard", epoch_seconds=1.0, times_as_fast=1.25),
        imdb("super", epoch_seconds=4.0, times_as_fast=2.5),
    ]
    (block,) = document(capsys, 8, write(tmp_path / "results.json", runs))["blocks"]
    assert row_of(block, "super", 4)["times_as_fast_as_standard"] == pytest.approx(2.0)
    unpaced = [imdb("standard", epoch_seconds=1.0), imdb("super", epoch_seconds=4.0, times_as_fast=2.5)]
    (block,) = document(capsys, 8, write(tmp_path / "results.json", unpaced))["blocks"]
    assert row_of(block, "super", 4)["times_as_fast_as_standard"] == pytest.approx(0.25)


@pytest.mark.parametrize("key", ["times_as_fast", "epoch_ratio"])
def test_results_of_earlier_versions_hold_ratios_of_times(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``epoch_ratio`` is a time over torch's: 0.4 and 0.5 are 2.5 and 2 times as fast."""
    fast = (2.0, 2.5) if key == "times_as_fast" else (0.5, 0.4)
    slow = 0.5 if key == "times_as_fast" else 2.0
    runs = [imdb("super", seed=seed, **{key: value}) for seed, value in enumerate(fast)]
    path = write(tmp_path / "results.json", [*runs, imdb("standard", **{key: slow})])
    (block,) = document(capsys, 8, path)["blocks"]
    row = row_of(block, "super", 4)
    assert row["times_as_fast"] == pytest.approx(math.sqrt(2.0 * 2.5))
    assert row["times_as_fast_low"] < row["times_as_fast"] < row["times_as_fast_high"]
    assert row_of(block, "standard", 4)["times_as_fast"] == 0.5
    assert row["times_as_fast_as_standard"] == pytest.approx(2 * math.sqrt(5.0))
    assert table(8, path) == 0
    out = capsys.readouterr().out
    assert "times as fast as nn.MHA" in out
    assert "times as fast as standard" in out
    assert "÷" not in out


def test_rows_of_our_own_stand_by_mechanism(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [imdb(name, heads=h) for h in (1, 4) for name in ("standard", "expressive", "super+expressive")]
    (block,) = document(capsys, 8, write(tmp_path / "results.json", runs))["blocks"]
    own = [(row["mechanism"], row["heads"]) for row in block["rows"] if not row["in_paper"]]
    assert own == [("expressive", 1), ("expressive", 4), ("super+expressive", 1), ("super+expressive", 4)]


def test_settings_that_decide_nothing_do_not_mark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "results.json", [imdb(settings={"threads": 7, "seeds": 2, "default_heads": 1})])
    assert document(capsys, 8, path)["blocks"][0]["changed"] == {}


def test_parameters_must_be_the_papers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "results.json", [imdb("super", attention_params=3167), imdb("standard")])
    assert table(8, path) == 0
    out = capsys.readouterr().out
    assert "≠ Params of super, h 4: 3,167 ours, 3,168 in the paper: not the same model." in out
    assert out.count("≠") == 2  # the cell and the sentence, and none for standard
    assert row_of(document(capsys, 8, path)["blocks"][0], "super", 4)["attention_params_agrees"] is False


@pytest.mark.parametrize(
    ("count", "agrees"),
    [(2_362_368, True), (2_369_999, True), (2_350_001, True), (2_370_000, False), (2_350_000, False)],
)
def test_counts_that_the_paper_rounds(
    count: int, agrees: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Table 1 prints 2.36M for the 4 (768² + 768) = 2,362,368 of standard attention."""
    record = studies.record("standard", 0, 12, task="imagenet", scale="paper", attention_params=count)
    block = document(capsys, 1, write(tmp_path / "results.json", [record]))["blocks"][2]
    assert row_of(block, "standard", 12)["attention_params_agrees"] is agrees


@pytest.mark.parametrize("number", sorted(TABLES))
def test_our_models_have_the_papers_parameters(number: int) -> None:
    """Every row of every table, built at the paper's scale without memory."""
    for part in TABLES[number][1]:
        task = replace(TASKS[part.task]("paper"), equal_params=part.equal_params)
        for row in part.published():
            with torch.device("meta"):
                model = task.build(str(row["mechanism"]), int(str(row["heads"])))
            attention = next(module for module in model.modules() if isinstance(module, MultiheadAttention))
            for key, ours in (("attention_params", count(attention)), ("total_params", count(model))):
                theirs = row[key]
                if isinstance(theirs, int):
                    assert abs(ours - theirs) < printed_unit(theirs), (row["mechanism"], row["heads"], key)


def test_units_of_printed_counts() -> None:
    assert [printed_unit(n) for n in (66048, 4_198_400, 66_000, 2_360_000, 60_540_000)] == [1, 1, 1000, 10_000, 10_000]


def test_table_7_takes_the_runs_of_equal_parameters_and_table_1_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base: dict[str, Any] = {"task": "imagenet", "scale": "paper"}
    equal = studies.record("super", 0, 12, **base, settings={"equal_params": True}, total_params=60_439_121)
    plain = studies.record("super", 0, 12, **base, settings={"equal_params": False}, test_accuracy=1.5)
    path = write(tmp_path / "a" / "results.json", [equal])
    write(tmp_path / "b" / "results.json", [plain])
    seventh = row_of(document(capsys, 7, tmp_path)["blocks"][0], "super", 12)
    assert (seventh["total_params"], seventh["total_params_paper"]) == (60_439_121, 60_440_000)
    assert seventh["total_params_agrees"] is True
    assert "attention_params" not in seventh
    assert row_of(document(capsys, 1, tmp_path)["blocks"][2], "super", 12)["test_accuracy"] == 1.5
    assert document(capsys, 1, path)["blocks"][2]["scale"] is None


def test_runs_of_one_setting_come_together_from_several_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = imdb("super", heads=2)
    write(tmp_path / "runs" / "a" / "results.json", [imdb(heads=1), shared])
    write(tmp_path / "runs" / "b" / "results.json", [imdb(heads=2), shared])
    (block,) = document(capsys, 8)["blocks"]
    assert [Path(file).parts for file in block["files"]] == [("runs", x, "results.json") for x in "ab"]
    assert {(r["mechanism"], r["heads"], r["seeds"]) for r in block["rows"] if r["seeds"]} == {
        ("standard", 1, 1),
        ("standard", 2, 1),
        ("super", 2, 1),
    }


def test_runs_that_contradict_each_other_stay_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "results" / "imdb" / "results.json", [imdb(test_accuracy=70.0)])
    write(tmp_path / "runs" / "mine" / "results.json", [imdb(test_accuracy=71.0)])
    write(tmp_path / "runs" / "small" / "results.json", [imdb(scale="small", test_accuracy=60.0)])
    blocks = document(capsys, 8)["blocks"]
    assert [row_of(block, "standard", 4)["test_accuracy"] for block in blocks] == [70.0, 71.0, 60.0]
    assert [block["paper_scale"] for block in blocks] == [True, True, False]


def test_results_of_other_tasks_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "results.json", [imdb()])
    assert table(5, path) == 0
    assert "Results of imdb were read, but none belongs to table 5." in capsys.readouterr().out
    assert table(8, path) == 0
    assert "none of them" not in capsys.readouterr().out


@pytest.mark.parametrize("number", [4, 8])
def test_a_file_of_somebody_elses_is_not_overwritten(
    number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "results.json", [imdb()])
    (tmp_path / "mine.csv").write_text("text,label\nfine,1\n", encoding="utf-8")
    results = [path] if number == 8 else []
    assert table(number, *results, "--csv", tmp_path / "mine.csv") == 2
    assert "mine.csv: this file already exists and was not written by better-attention" in capsys.readouterr().err
    assert (tmp_path / "mine.csv").read_text("utf-8") == "text,label\nfine,1\n"
    assert table(number, *results, "--csv", tmp_path / "nodir" / "t.csv") == 2
    assert "does not exist. Create it first" in capsys.readouterr().err
    assert not (tmp_path / "nodir").exists()
    for _ in range(2):
        assert table(number, *results, "--csv", tmp_path / "ours.csv") == 0


def test_a_csv_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "results.json", [imdb("=cmd()", task="imdb"), imdb()])
    for _ in range(2):  # its own file may be written again
        assert table(8, path, "--csv", tmp_path / "t.csv") == 0
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 13
    assert lines[12]["mechanism"] == "'=cmd()"
    standard = lines[2]
    assert (standard["mechanism"], standard["heads"], standard["seeds"]) == ("standard", "4", "1")
    assert float(standard["test_accuracy"]) == 97.5
    assert float(standard["test_accuracy_difference"]) == pytest.approx(97.5 - 77.62)
    assert lines[0]["test_accuracy"] == lines[0]["test_accuracy_interval"] == ""


@pytest.mark.parametrize("number", ["0", "11", "-1", "four", "1.0", ""])
def test_there_are_tables_1_to_10(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        table("--", number)
    assert ended.value.code == 2
    assert f"the paper has tables 1 to 10, received {number!r}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "Expecting value"),
        ("[{", "is damaged or no results.json"),
        ("{}", "expected a list of objects, one a run"),
        ("[1]", "expected a list of objects, one a run"),
        ('[{"task": "imdb"}]', "a record lacks scale, mechanism, heads, seed"),
        (json.dumps([studies.record() | {"heads": "4"}]), "whole numbers, received '4'"),
        (json.dumps([studies.record(test_accuracy="98")]), "test_accuracy is a number or None, received '98'"),
        (json.dumps([studies.record(), studies.record()]), "more than one record of seed 0"),
    ],
)
def test_damaged_results_are_refused(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.json"
    path.write_text(content, "utf-8")
    assert table(8, path) == 2
    said = capsys.readouterr().err
    assert message in said
    assert str(path) in said
    assert "Traceback" not in said


def test_results_that_are_not_there_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert table(8, tmp_path / "nowhere") == 2
    assert "nowhere does not exist: name a results.json" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert table(8, tmp_path / "empty") == 2
    assert "empty holds no results.json, nor does a folder in it" in capsys.readouterr().err
    assert table(4, tmp_path / "empty") == 2
    assert "empty holds no edge.json" in capsys.readouterr().err
    assert table(8, "--csv", tmp_path) == 2
    assert "--csv expects a file, but" in capsys.readouterr().err
