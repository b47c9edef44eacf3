"""The summary of runs, and the tables made of it: on the screen, as CSV, as JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from better_attention.lab.analysis.study import Threshold
from better_attention.lab.analysis.summary import (
    Row,
    against_paper,
    columns_of,
    compared_columns,
    paper_value,
    summarise,
)
from better_attention.lab.report import tables
from better_attention.lab.tasks.catalogue import TASKS
from helpers.studies import MECHANISMS, record

# ---------------------------------------------------------------------------------------------------- summarise


def test_a_row_a_mechanism_and_number_of_heads_in_the_tables_order() -> None:
    names = ("expressive", "super+expressive", "super", "standard")
    rows = summarise(record(name, seed, heads) for heads in (4, 1) for seed in (1, 0) for name in names)
    order = ["standard", "super", "expressive", "super+expressive"]
    assert [(row.heads, row.mechanism) for row in rows] == [(h, name) for h in (1, 4) for name in order]
    assert all(row.seeds == (0, 1) for row in rows)
    assert {row.mechanism: row.score for row in rows}["super+expressive"] == "expressive"


def test_means_and_intervals_are_over_seeds() -> None:
    (row,) = summarise(record(seed=seed, test_accuracy=value) for seed, value in enumerate((90.0, 92.0, 94.0)))
    estimate = row.estimates["test_accuracy"]
    assert (estimate.mean, estimate.n) == (92.0, 3)
    assert estimate.half_width == pytest.approx(4.302652729749464 * 2 / math.sqrt(3))


def test_what_no_seed_has_is_no_column() -> None:
    rows = summarise([record(), record("super", test_bleu=20.0)])
    assert "test_bleu" not in rows[0].estimates
    assert rows[1].estimates["test_bleu"].mean == 20.0
    assert [column.key for column in columns_of(rows)][-1] == "test_bleu"
    assert "test_top5" not in [column.key for column in columns_of(rows)]


def test_ranks_follow_the_good_direction_of_each_column() -> None:
    better: dict[str, Any] = {
        "test_accuracy": 99.0, "test_loss": 0.01, "attention_params": 1, "times_as_fast": 2.0, "test_bleu": 30.0,
        "total_params": 1,
    }  # fmt: skip
    worse: dict[str, Any] = {
        "test_accuracy": 98.0, "test_loss": 0.02, "attention_params": 2, "times_as_fast": 1.6, "test_bleu": 20.0,
        "total_params": 2,
    }  # fmt: skip
    rows = summarise([record(**worse, epoch_seconds=0.6), record("efficient", **better, epoch_seconds=0.5)])
    assert all("epoch_seconds" not in row.ranks for row in rows)  # they tell of the hour, too
    for key in better:
        assert [row.ranks[key] for row in rows] == [2, 1], key


def test_ranks_stay_within_a_number_of_heads() -> None:
    rows = summarise(record(name, heads=h) for h in (1, 4) for name in ("standard", "super"))
    # Four heads test better by 3/8 of a point, yet each block has its own first.
    assert [row.ranks["test_accuracy"] for row in rows] == [1, 1, 1, 1]


def test_what_is_printed_equal_ranks_equal() -> None:
    rows = summarise(
        [record(test_loss=0.47201), record("super", test_loss=0.47249), record("efficient", test_loss=0.5)]
    )
    assert {row.mechanism: row.ranks["test_loss"] for row in rows} == {"standard": 1, "super": 1, "efficient": 3}


def test_gains_are_seed_by_seed_and_against_standard_of_the_same_heads() -> None:
    runs = [record(seed=s, heads=h, test_accuracy=80.0 + 10 * s + h) for s in (0, 1) for h in (1, 4)]
    runs += [record("super", seed=s, heads=4, test_accuracy=86.0 + 12 * s) for s in (0, 1)]
    standard1, standard4, ours = summarise(runs)
    assert standard1.gains == standard4.gains == {}
    gain = ours.gains["test_accuracy"]
    assert (gain.mean, gain.n) == (3.0, 2)  # 86 - 84 and 98 - 94
    assert "epoch_seconds" not in ours.gains


def test_the_papers_row_of_the_same_heads_is_attached() -> None:
    rows = summarise(record(name, heads=2, task="imdb") for name in ("super", "expressive"))
    assert rows[0].published is not None
    assert rows[0].published["test_accuracy"] == 78.35
    assert rows[1].published is None
    keys = [column.key for column in against_paper(rows)]
    assert keys == ["attention_params", "train_accuracy", "train_loss", "test_accuracy", "test_loss"]
    assert all(paper_value(rows[1], column) is None for column in columns_of(rows))


def test_every_mechanism_and_number_of_heads_is_compared_with_standard() -> None:
    runs = [record(name, s, h) for name in ("standard", "super", "efficient") for h in (1, 4) for s in range(3)]
    rows = summarise(runs)
    assert [(row.heads, row.mechanism) for row in rows if row.tests] == [
        (1, "efficient"), (1, "super"), (4, "efficient"), (4, "super"),
    ]  # fmt: skip
    for row in rows:
        for key, test in row.tests.items():
            assert key in ("test_accuracy", "test_loss")  # never of another split
            assert test.family == 4  # one metric: two mechanisms at two numbers of heads
    assert [column.key for column in compared_columns(rows)] == ["test_accuracy", "test_loss"]


def test_families_end_at_a_task_and_a_scale() -> None:
    runs = [
        record(name, s, task=task, scale=scale)
        for name in ("standard", "super", "efficient")
        for task, scale in (("digits", "small"), ("digits", "smoke"), ("mnist", "small"))
        for s in range(3)
    ]
    assert {test.family for row in summarise(runs) for test in row.tests.values()} == {2}


def test_p_is_corrected_over_heads() -> None:
    steps = {1: (1.0, 1.2, 1.4), 4: (1.0, 1.1, 1.3)}  # t = 10.39 and 12.85, df 2: p = 1 - t/√(2 + t²)
    runs = [record("standard", s, h, test_accuracy=90.0) for h in (1, 4) for s in range(3)]
    runs += [record("super", s, h, test_accuracy=90.0 + step) for h in (1, 4) for s, step in enumerate(steps[h])]
    one, four = (row.tests["test_accuracy"] for row in summarise(runs) if row.mechanism == "super")
    p = {h: 1 - (t := t_of(v)) / math.sqrt(2 + t * t) for h, v in steps.items()}
    assert (one.t_p, four.t_p) == (pytest.approx(p[1]), pytest.approx(p[4]))
    assert four.corrected_p == pytest.approx(2 * p[4])
    assert one.corrected_p == pytest.approx(max(p[1], 2 * p[4]))


def t_of(values: tuple[float, float, float]) -> float:
    mean = sum(values) / 3
    return mean / math.sqrt(sum((v - mean) ** 2 for v in values) / 2 / 3)


def test_speed_ratios_have_a_geometric_mean() -> None:
    (row,) = summarise(record(seed=s, times_as_fast=value) for s, value in enumerate((0.5, 2.0)))
    assert row.estimates["times_as_fast"].mean == pytest.approx(1.0)
    (row,) = summarise(record(seed=s, times_as_fast=0.9) for s in range(3))
    assert row.estimates["times_as_fast"].n == 1  # one measurement, shared by the runs of a command


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([record(), record()], "digits, standard, 4 heads: more than one record of seed 0"),
        ([{"task": "digits"}], "a record lacks scale, mechanism, heads, seed"),
        ([record(test_loss="0.1")], "test_loss is a number or None, received '0.1'"),
        ([record(test_loss=True)], "test_loss is a number or None, received True"),
        ([{**record(), "seed": "0"}], "heads and seed of a record are whole numbers, received '0'"),
        ([{**record(), "heads": True}], "heads and seed of a record are whole numbers, received True"),
    ],
)
def test_records_that_cannot_be_read(runs: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        summarise(runs)


# ------------------------------------------------------------------------------------------------- on the screen


def printed(rows: list[Row], width: int) -> str:
    console = Console(width=width, file=io.StringIO())
    tables.print_table(rows, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def five(task: str = "mnist", seeds: int = 2) -> list[Row]:
    return summarise(record(name, seed, task=task) for name in MECHANISMS for seed in range(seeds))


def test_the_papers_kind_of_table() -> None:
    text = printed(five(), 200)
    line = next(line for line in text.splitlines() if line.lstrip().startswith("super"))
    # 98.0 ± t(0.975, 1) / 2, seeds 97.5 and 98.5
    assert "98.00 ± 6.35 (1)" in line
    assert "4,224 (1)" in line
    assert "mnist (scale small)" in text


@pytest.mark.parametrize("width", [60, 80, 100, 140, 200])
def test_nothing_is_cut_off_on_a_narrow_screen(width: int) -> None:
    text = printed(five(), width)
    assert "…" not in text
    assert all(len(line) <= width for line in text.splitlines())
    for cell in ("98.00 ± 6.35 (1)", "0.105 ± 0.064 (1)", "expressive", "98.62", "−0.62", "0.051", "+0.054"):
        assert cell in text


def test_ours_the_papers_and_the_difference() -> None:
    text = printed(five(), 200)
    line = text[text.index("Ours, the paper's (table 5)") :].splitlines()
    ours = next(one.split() for one in line if one.lstrip().startswith("super"))
    assert ours[:5] == ["super", "4", "4,224", "37,184", "−32,960"]
    assert ours[-6:] == ["98.00", "98.62", "−0.62", "0.105", "0.051", "+0.054"]
    assert not any(one.lstrip().startswith("expressive") for one in line)


def test_a_task_the_paper_lacks_has_no_second_table() -> None:
    assert "paper" not in printed(five("digits"), 200)


def test_differences_their_p_and_the_word_for_it() -> None:
    steps = {"super": (1.0, 1.01, 1.02), "efficient": (0.5, -0.4, 0.3), "expressive": (-2.0, -2.01, -2.03)}
    runs = [record("standard", s, test_accuracy=90.0 + s) for s in range(3)]
    runs += [record(m, s, test_accuracy=90.0 + s + v) for m, values in steps.items() for s, v in enumerate(values)]
    text = printed(summarise(runs), 200)
    table = text[text.index("Difference to standard") :].splitlines()
    lines = {line.split()[0]: " ".join(line.split()) for line in table if line.split()}
    assert "Test acc. % − standard" in lines["Mechanism"]
    assert lines["super"].startswith("super 4 +1.01 ± 0.02 (p < 0.001) higher")
    assert lines["efficient"].startswith("efficient 4 +0.13 ± 1.17 (p 0.67) no difference shown")
    assert lines["expressive"].startswith("expressive 4 −2.01 ± 0.04 (p < 0.001) lower")
    assert "standard" not in lines


def test_one_mechanism_has_no_differences() -> None:
    assert "Difference" not in printed(summarise([record(), record(seed=1)]), 200)


def test_a_single_seed_is_told() -> None:
    text = printed(summarise(record(name, task="mnist", times_as_fast=1.1) for name in MECHANISMS), 200)
    ours = text[: text.index("Ours, the paper's")]
    assert "97.50 (1)" in ours
    assert "±" not in ours  # nor in the legend
    assert "–" not in ours  # no interval, no p, no verdict, and nothing in their place
    assert "verdict" not in ours
    assert "super 4 0.00" in " ".join(ours[ours.index("Difference") :].split())
    assert "A single seed tells nothing about chance" in ours
    assert "single seed" not in printed(five(), 200)


def test_what_matters_most_comes_first() -> None:
    title = next(line for line in printed(five(), 200).splitlines() if "Mechanism" in line)
    places = [title.index(name) for name in ("Test acc. %", "Test loss", "Params", "s/epoch", "Train acc. %")]
    assert places == sorted(places)


def reaching(*epochs: int | None, mechanism: str = "super") -> list[dict[str, Any]]:
    return [record(mechanism, s, epochs_to_threshold=e, seconds_to_threshold=e) for s, e in enumerate(epochs)]


def test_the_speed_of_learning_is_printed_with_its_threshold() -> None:
    rows = summarise([*reaching(10, 12, 11, mechanism="standard"), *reaching(5, 7, 7)])
    console = Console(width=250, file=io.StringIO())
    tables.print_table(rows, console, Threshold(87.5, "as we say"))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "until the validation accuracy reached 87.5 %, as we say." in text
    assert "6.3 ± 2.9 (1)" in text
    assert "−4.7 ± 1.4 (p 0.005)" in text
    assert "fewer epochs" in text
    assert "threshold" not in printed(five(), 250)


def test_runs_that_never_got_there_are_told() -> None:
    text = printed(summarise([*reaching(10, 12, mechanism="standard"), *reaching(5, None), record("efficient")]), 250)
    first = text[: text.index("Difference")]
    line = {line.split()[0]: line for line in first.splitlines() if line.split()}
    assert "5.0, 1 of 2 runs" in line["super"]
    assert "never" in line["efficient"]


def test_no_run_at_all() -> None:
    assert printed([], 80) == "No run has finished.\n"


@pytest.mark.parametrize("evil", ["[red]x[/red]", "[link=https://x.example]x[/link]", "\x1b[31mx", "x\ny", "x" * 9999])
def test_names_are_text_not_markup(evil: str) -> None:
    text = printed(summarise([record(evil, task=evil)]), 250)
    assert "\x1b" not in text
    assert evil[:60].replace("\x1b", "").replace("\n", " ") in text
    assert len(max(text.splitlines(), key=len)) <= 250


# ----------------------------------------------------------------------------------------------------------- CSV


def test_csv_holds_full_precision_and_empty_cells(tmp_path: Path) -> None:
    runs = [record(seed=s, task="mnist", test_accuracy=v) for s, v in enumerate((97.123456789, 98.2))]
    runs += [record("expressive", task="mnist", train_accuracy=None)]
    tables.write_csv(summarise(runs), tmp_path / "results.csv")
    with (tmp_path / "results.csv").open(newline="", encoding="utf-8") as file:
        standard, expressive = csv.DictReader(file)
    assert float(standard["test_accuracy"]) == (97.123456789 + 98.2) / 2
    assert standard["attention_params"] == "4224"
    assert float(standard["test_accuracy_paper"]) == 98.12
    assert float(standard["test_accuracy_difference"]) == pytest.approx((97.123456789 + 98.2) / 2 - 98.12)
    assert float(standard["test_accuracy_interval"]) > 0
    assert (standard["seeds"], expressive["seeds"]) == ("2", "1")
    assert float(expressive["test_loss_gain"]) == pytest.approx(0.0)
    for empty in ("train_accuracy", "test_accuracy_interval", "test_accuracy_paper", "test_accuracy_difference"):
        assert expressive[empty] == ""
    assert standard["test_accuracy_gain"] == standard["test_accuracy_verdict"] == standard["test_accuracy_p"] == ""
    assert (expressive["test_accuracy_pairs"], expressive["test_accuracy_verdict"]) == ("1", "not tested")
    assert expressive["test_accuracy_p"] == expressive["test_accuracy_effect"] == ""
    assert "attention_params_interval" not in standard
    assert "epoch_seconds_difference" not in standard


def test_csv_holds_what_the_comparison_shows(tmp_path: Path) -> None:
    runs = [record("standard", s, test_accuracy=90.0, test_loss=1.0) for s in range(3)]
    runs += [record("super", s, test_accuracy=v, test_loss=1.0) for s, v in enumerate((91.0, 92.0, 93.0))]
    runs += [record("efficient", s, test_accuracy=90.0, test_loss=1.0) for s in range(3)]  # p = 1
    runs = [run | {"times_as_fast": 0.5 * 2 ** run["seed"]} for run in runs]
    tables.write_csv(summarise(runs), tmp_path / "results.csv")
    with (tmp_path / "results.csv").open(newline="", encoding="utf-8") as file:
        _, _, ours = csv.DictReader(file)
    # 1, 2, 3: t = 2√3, p = 1 - √(12/14); d_z = 2, J = 1/√π
    assert float(ours["test_accuracy_p"]) == pytest.approx(1 - math.sqrt(12 / 14))
    assert float(ours["test_accuracy_p_holm"]) == pytest.approx(2 * (1 - math.sqrt(12 / 14)))
    assert float(ours["test_accuracy_p_wilcoxon"]) == 0.25
    assert float(ours["test_accuracy_effect"]) == pytest.approx(2 / math.sqrt(math.pi))
    assert (ours["test_accuracy_pairs"], ours["test_accuracy_verdict"]) == ("3", "no difference shown")
    assert (float(ours["test_loss_p_holm"]), ours["test_loss_verdict"]) == (1.0, "no difference shown")
    assert float(ours["times_as_fast"]) == pytest.approx(1.0)
    assert float(ours["times_as_fast_low"]) == pytest.approx(1 / float(ours["times_as_fast_high"]))
    assert not [key for key in ours if key.startswith("train") and key.endswith(("_p", "_verdict", "_p_holm"))]
    assert not {"times_as_fast_interval", "times_as_fast_difference"} & set(ours)


def test_csv_holds_the_speed_of_learning(tmp_path: Path) -> None:
    rows = summarise(
        [*reaching(10, 12, 11, mechanism="standard"), *reaching(5, 7, 7), *reaching(4, None, None, mechanism="a")]
    )
    tables.write_csv(rows, tmp_path / "results.csv", Threshold(87.5, ""))
    with (tmp_path / "results.csv").open(newline="", encoding="utf-8") as file:
        _, ours, slow = csv.DictReader(file)
    assert float(ours["threshold_accuracy"]) == 87.5
    assert float(ours["epochs_to_threshold"]) == pytest.approx(19 / 3)
    assert float(ours["seconds_to_threshold"]) == pytest.approx(19 / 3)
    assert (ours["epochs_to_threshold_runs"], slow["epochs_to_threshold_runs"]) == ("3", "1")
    assert ours["epochs_to_threshold_verdict"] == "lower"
    assert (
        slow["epochs_to_threshold_verdict"] == "no difference shown"
    )  # two of its runs count as later than any number
    assert float(ours["epochs_to_threshold_p_holm"]) < 0.05


def test_csv_of_nothing_is_a_header(tmp_path: Path) -> None:
    tables.write_csv([], tmp_path / "results.csv")
    assert (tmp_path / "results.csv").read_text() == "task,scale,mechanism,score,heads,seeds,departures\n"


def test_csv_says_what_sets_a_row_apart_from_the_papers(tmp_path: Path) -> None:
    """Settings, numbers of samples and data, a cell a row: all that the report says of it."""
    theirs = TASKS["mnist"]("paper").settings()
    papers = {"train": 59_000, "validation": 1_000, "test": 10_000}
    fewer = {"train": 5_900, "validation": 100, "test": 1_000}
    other = "other data under the same names"
    runs = [record("standard", s, task="mnist", settings=theirs, samples=papers) for s in (0, 1)]
    runs += [record("super", 0, task="mnist", settings=theirs | {"epochs": 1, "lr": 0.5}, samples=papers)]
    runs += [record("efficient", s, task="mnist", settings=theirs, samples=fewer, departures=[other]) for s in (0, 1)]
    runs += [record("optimised", task="mnist")]  # of an older version, without its settings
    tables.write_csv(summarise(runs), tmp_path / "results.csv")
    with (tmp_path / "results.csv").open(newline="", encoding="utf-8") as file:
        found = {row["mechanism"]: row["departures"] for row in csv.DictReader(file)}
    assert found == {
        "standard": "",
        "optimised": "",
        "efficient": f"the setting is not the paper's: 7,000 samples instead of 70,000; {other}",
        "super": "the setting is not the paper's: epochs=1, lr=0.5",
    }


def test_a_departure_is_no_formula(tmp_path: Path) -> None:
    tables.write_csv(summarise([record(departures=["=1+1\n"])]), tmp_path / "results.csv")
    with (tmp_path / "results.csv").open(newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert row["departures"].strip() == "'=1+1"


FORMULAS = (
    "=1+1", "+1+1", "-1+1", "@SUM(A1)", "\t=1+1", "\r=1+1", "\n=1+1", "  =1+1", "＝1+1", "＠x",
    '=HYPERLINK("https://x.example","y")', "=cmd|'/c calc'!A0", '"=1+1', 'a",=1+1', "a\n=1+1", "a\r\n=1+1", "x\x1b[31m",
)  # fmt: skip


@pytest.mark.parametrize("evil", FORMULAS)
def test_no_cell_is_a_formula(tmp_path: Path, evil: str) -> None:
    path = tmp_path / "results.csv"
    tables.write_csv(summarise([record(evil, task=evil, scale=evil, score=evil)]), path)
    text = path.read_text(encoding="utf-8")
    assert not [c for c in text if ord(c) < 32 and c != "\n"]
    with path.open(newline="", encoding="utf-8") as file:
        head, *lines = csv.reader(file)
    assert len(lines) == 1  # no newline came through
    cells = dict(zip(head, lines[0], strict=True))
    for key in ("task", "scale", "mechanism", "score"):
        assert not cells[key].lstrip().startswith(tuple("=+-@＝＋－＠"))
        assert cells[key].removeprefix("'").split() == evil.replace("\x1b", "").split()
    assert float(cells["test_accuracy"]) == 97.5  # numbers stay numbers


def test_negative_numbers_are_no_formulas(tmp_path: Path) -> None:
    tables.write_csv(summarise([record(test_loss=-0.5)]), tmp_path / "results.csv")
    assert ",-0.5," in (tmp_path / "results.csv").read_text()


# ---------------------------------------------------------------------------------------------------------- JSON


def test_json_is_the_records(tmp_path: Path) -> None:
    runs = [record(seed=s, versions={"torch": "2.13.0"}) for s in (0, 1)]
    tables.write_json(runs, tmp_path / "results.json")
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == runs


def test_json_has_no_nan(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    tables.write_json([record(test_loss=math.nan, samples={"train": [1, math.inf]}, command="ℓ\ud800")], path)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    (found,) = json.loads(path.read_bytes(), parse_constant=refuse)
    assert found["test_loss"] is None
    assert found["samples"] == {"train": [1, None]}
    assert found["command"] == "ℓ?"
