"""``better-attention bench``: what it prints and writes, exit statuses, Ctrl-C, and what is refused."""

from __future__ import annotations

import argparse
import csv
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from better_attention.bench import machine, registry, runner
from better_attention.bench.suites import SUITES
from better_attention.cli import UserError
from better_attention.cli import bench as verb
from better_attention.layer.alignment import Alignment

pytestmark = pytest.mark.usefixtures("settled_heap")
SHORT = ("--suite", "align", "--shapes", "2x5x6x2", "--repeats", "3")


@pytest.fixture(autouse=True)
def quick_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    real = machine.measure_limits
    monkeypatch.setattr(machine, "measure_limits", lambda dtype, **sizes: real(dtype, size=32, read_bytes=1 << 16))


@pytest.fixture(autouse=True)
def wide(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files go nowhere else, and tables are as wide as they need to be, whatever screen the tests are run on."""
    monkeypatch.chdir(tmp_path_factory.mktemp("work"))
    monkeypatch.delenv("COLUMNS", raising=False)


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    return verb.run(parser.parse_args(words))


def document(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert run(*words, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_every_suite_can_be_asked_for() -> None:
    assert {"kernel", "layer", "decode", "align", "model"} <= set(SUITES)
    assert all(SUITES[name].name == name for name in SUITES)
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    assert [parser.parse_args(["--suite", name]).suite for name in (*SUITES, "all")] == [*SUITES, "all"]
    assert {str(dtype).removeprefix("torch.") for dtype in runner.BOUNDS} == set(verb.DTYPES)


def test_the_document(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    found = document(capsys, *SHORT, "--threads", "1", "--seconds", "3.5", "--dtype", "bfloat16")
    assert torch.get_num_threads() == threads
    assert found["machine"]["threads"] == 1
    assert found["settings"]["repeats"] == 3
    assert found["settings"]["seconds"] == 3.5
    assert (found["suite"], found["dtype"], found["complete"]) == ("align", "bfloat16", True)
    assert len(found["limits"]) == 2
    assert set(found["limits"][0]["product"]) == {"float32", "bfloat16"}
    rows = found["rows"]
    assert [row["contender"] for row in rows] == ["torch.matmul", "Alignment"] * 4
    assert [(row["variant"], row["mode"]) for row in rows[::2]] == [
        ("plain", "forward"),
        ("plain", "forward+backward"),
        ("causal", "forward"),
        ("causal", "forward+backward"),
    ]
    for row in rows:
        assert (row["batch"], row["length"], row["width"], row["heads"]) == (2, 5, 6, 2)
        assert row["status"] == "ok"
        assert row["rounds"] == 3
        assert row["calls"] >= 1
        assert 0 < row["seconds"]["low"] <= row["seconds"]["median"] <= row["seconds"]["high"]
        assert row["gflops"] == pytest.approx(row["flops"] / row["seconds"]["median"] / 1e9)
        assert 0 <= row["error"] < row["bound"] == 3e-2
    assert all(row["ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0} for row in rows[::2])
    best = max(limits["product"]["bfloat16"] for limits in found["limits"])
    assert rows[0]["product_share"] == pytest.approx(rows[0]["gflops"] / best)


def test_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*SHORT) == 0
    said = capsys.readouterr()
    for words in (
        machine.cpu_name(),
        f"torch {torch.__version__}",
        "limits before: product of 32² matrices",
        "limits after",
        "align: batch 2, ℓ 5, d 6, h 2 (width 3), causal, forward+backward",
        "torch.matmul",
        "Alignment",
        "extra MiB",
        "median of the ratios within a round",
    ):
        assert words in said.out
    assert "[4/4] align" in said.err
    assert "Targets" not in said.out, "no target speaks of these rows"


def test_a_narrow_screen_shows_whole_numbers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run(*SHORT) == 0
    out = capsys.readouterr().out
    assert "…" not in out
    lines = [line.split() for line in out.splitlines() if line.split()[:1] == ["Alignment"]]
    assert len(lines) == 4
    assert all(float(line[1]) > 0 for line in lines)


def test_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*SHORT, "--out", str(tmp_path / "new")) == 0
    paths = sorted((tmp_path / "new").iterdir())
    assert [path.suffix for path in paths] == [".csv", ".json"]
    version = torch.__version__
    for path in paths:
        assert path.name.startswith("align-")
        assert path.stem.endswith(f"-{torch.get_num_threads()}t-torch{version}-float32")
        assert f"wrote {path}" in capsys.readouterr().err or path is paths[1]
    stored = json.loads(paths[1].read_text("utf-8"))
    with paths[0].open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(stored["rows"]) == 8
    for line, row in zip(lines, stored["rows"], strict=True):
        assert line["contender"] == row["contender"]
        assert float(line["seconds_median"]) == row["seconds"]["median"]
        assert float(line["ratio_high"]) == row["ratio"]["high"]


def test_wrong_numbers_are_not_timed_and_fail_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Alignment.forward
    monkeypatch.setattr(Alignment, "forward", lambda self, value: right(self, value) * 1.001)
    assert run(*SHORT) == 1
    out = capsys.readouterr().out
    assert "WRONG: align: batch 2, ℓ 5, d 6, h 2 (width 3), plain, forward: Alignment: output is off by" in out
    assert not [line for line in out.splitlines() if line.split()[:1] == ["Alignment"]]
    assert [line for line in out.splitlines() if line.split()[:1] == ["torch.matmul"]]


def test_ctrl_c_shows_what_was_done(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    real, done = runner.measure, []

    def measure(*arguments: Any) -> Any:
        if done:
            raise KeyboardInterrupt
        done.append(True)
        return real(*arguments)

    monkeypatch.setattr(runner, "measure", measure)
    assert run(*SHORT) == 130
    said = capsys.readouterr()
    assert "Interrupted: 1 of 4 rows were measured." in said.out
    tables_of = [line.split(":")[1].strip() for line in said.out.splitlines() if line.startswith("align:")]
    assert tables_of == ["batch 2, ℓ 5, d 6, h 2 (width 3), plain, forward"]
    done.clear()
    assert run(*SHORT, "--json", "--again") == 130
    found = json.loads(capsys.readouterr().out)
    assert found["complete"] is False
    assert len(found["rows"]) == 2
    assert len(found["limits"]) == 1


def test_rows_are_in_the_files_before_the_next_is_measured_and_sigterm_ends_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, kept = runner.measure, []
    handler = signal.getsignal(signal.SIGTERM)

    def measure(*arguments: Any) -> Any:
        kept.append([json.loads(path.read_text()) for path in tmp_path.glob("*.json")])
        if len(kept) == 3:
            signal.raise_signal(signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(runner, "measure", measure)
    assert run(*SHORT, "--out", str(tmp_path)) == 143
    assert [[(len(found["rows"]), found["complete"]) for found in files] for files in kept] == [
        [],
        [(2, False)],
        [(4, False)],
    ]
    assert "Interrupted: 2 of 4 rows were measured." in capsys.readouterr().out
    (path,) = tmp_path.glob("*.csv")
    assert len(path.read_text().splitlines()) == 1 + 4
    assert signal.getsignal(signal.SIGTERM) is handler


def pretend(
    monkeypatch: pytest.MonkeyPatch,
    most: int = 99,
    ratio: runner.Spread = runner.Spread(2.5, 2.1, 2.9),  # noqa: B008 - it is frozen
) -> list[str]:
    """Nothing is timed. The names of the rows that would be; Ctrl-C comes instead of the row after ``most`` of them."""
    names: list[str] = []

    def measure(row: Any, contenders: Any, settings: Any) -> list[runner.Result]:
        if len(names) == most:
            raise KeyboardInterrupt
        names.append(row.name)
        base = contenders[0].name
        return [
            runner.Result(
                *(row, one.name, one.work),
                seconds=runner.Spread(0.2, 0.1, 0.3 + len(names)),
                ratio=runner.Spread(1.0, 1.0, 1.0) if one.name == base else ratio,
                rounds=settings.repeats,
                calls=1,
            )
            for one in contenders
        ]

    monkeypatch.setattr(runner, "measure", measure)
    return names


@pytest.mark.parametrize("out", [(), ("--out", "mine")])
def test_the_same_command_goes_on_where_it_stopped(
    out: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(*out[1:] or ("runs", "bench"))
    with monkeypatch.context() as patched:
        first = pretend(patched, 3)
        assert run(*SHORT, *out) == 130
    (path,) = folder.glob("*.json")
    before = json.loads(path.read_text("utf-8"))
    assert (len(before["rows"]), before["complete"]) == (6, False)
    capsys.readouterr()
    second = pretend(monkeypatch)
    assert run(*SHORT, *out) == 0
    said = capsys.readouterr()
    assert f"{path} holds 3 of 4 rows of the same settings" in said.err
    assert len(first) == 3
    assert len(second) == 1
    after = json.loads(path.read_text("utf-8"))
    assert after["complete"] is True
    measured = (
        "contender",
        "variant",
        "mode",
        "seconds",
        "ratio",
        "rounds",
    )  # shares depend on the limits, taken twice
    for old, new in zip(before["rows"], after["rows"], strict=False):
        assert [new[key] for key in measured] == [old[key] for key in measured]
    assert len({(row["variant"], row["mode"]) for row in after["rows"]}) == 4
    assert all(name in said.out for name in (*first, *second)), "the tables show rows of both parts"
    # A complete file is not measured again, unless asked.
    assert run(*SHORT, *out, "--json") == 0
    again = capsys.readouterr()
    assert f"{path} is complete: none of its 4 rows is measured again. To do so: --again" in again.err
    assert json.loads(again.out)["rows"] == after["rows"]
    assert len(second) == 1
    assert run(*SHORT, *out, "--again") == 0
    assert len(second) == 5


@pytest.mark.parametrize(
    ("words", "told"),
    [(("--seconds", "3"), "seconds 2.5, now 3.0"), (("--repeats", "4"), "repeats 3, now 4"), ((), "commit ")],
)
def test_rows_of_other_settings_are_not_overwritten(
    words: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch)
    base = ("--suite", "align", "--shapes", "2x5x6x2", "--repeats", "3", "--seconds", "2.5")
    assert run(*base) == run(*base, "--out", "mine") == 0
    (path,) = Path("mine").glob("*.json")
    content = path.read_bytes()
    if not words:
        real = machine.describe
        monkeypatch.setattr(machine, "describe", lambda command: real(command) | {"commit": "another"})
    with pytest.raises(UserError, match=f"--out mine holds rows that were measured differently .*{told}.*--again"):
        run(*base, *words, "--out", "mine")
    assert path.read_bytes() == content
    assert run(*base, *words) == 0
    assert [len(list(Path("runs").glob(f"bench{end}/*.json"))) for end in ("", "-2")] == [1, 1]
    assert run(*base, *words, "--out", "mine", "--again") == 0
    assert path.read_bytes() != content


def test_other_rows_of_the_same_settings_stay(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch)
    other = ("--suite", "align", "--shapes", "2x4x6x2", "--repeats", "3")
    assert run(*SHORT) == run(*other) == 0
    (path,) = Path("runs/bench").glob("*.json")
    assert [row["length"] for row in json.loads(path.read_text("utf-8"))["rows"]] == [5] * 8 + [4] * 8
    capsys.readouterr()
    assert len(document(capsys, *other)["rows"]) == 8, "what is printed is what was asked for"


def test_a_damaged_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    assert run(*SHORT) == 0
    (path,) = Path("runs/bench").glob("*.json")
    path.write_text('{"rows": []}')
    with pytest.raises(ValueError, match=r"is damaged or was not written by this command .*Move it away"):
        run(*SHORT)


@pytest.mark.parametrize(("spread", "noisy"), [((1.2, 0.7, 1.9), True), ((2.5, 2.1, 2.9), False)])
def test_noise_is_told_beside_the_number_and_a_summary_ends_the_run(
    spread: tuple[float, float, float],
    noisy: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(monkeypatch, ratio=runner.Spread(*spread))
    assert run(*SHORT) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    start = lines.index("On this machine (geometric means over rows; above 1 is faster):")
    assert f"  align, forward, times as fast as torch.matmul: Alignment {spread[0]:.2f}" in lines[start:]
    assert ("noisy, rounds differ more than this contender and the baseline do" in out) == noisy
    assert ("Noise: in 4 of 4 comparisons" in lines[-1]) == noisy
    assert "times as fast" in out
    assert "÷" not in out
    assert len(lines) - start < 24


@pytest.mark.parametrize(("load", "told"), [(7.25, True), (0.0, False), (None, False)])
def test_a_busy_machine_is_told(
    load: float | None, told: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch)
    real = machine.describe
    monkeypatch.setattr(machine, "describe", lambda command: real(command) | {"load_average": load, "cores": 2})
    assert run(*SHORT) == 0
    assert ("the machine is busy: load 7.25 on 2 cores at the start" in capsys.readouterr().out) == told


def test_targets_are_printed_on_request_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch)
    words = ("--suite", "layer", "--shapes", "64x32x32x4", "--repeats", "1")
    assert run(*words) == 0
    assert "Targets" not in capsys.readouterr().out
    assert run(*words, "--targets") == 0
    assert "Targets" in capsys.readouterr().out


def test_targets_are_told_where_their_rows_were_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer than all seven shapes leave a mean open."""
    pretend(monkeypatch)
    assert run("--suite", "layer", "--shapes", "64x32x32x4", "--repeats", "1", "--targets") == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if "efficient layer, inference, mean" in line)
    assert line.split()[0] == "open"
    assert "6 of 7 shapes not run" in line


def test_a_number_that_json_does_not_know(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Alignment, "forward", lambda self, value: value * float("nan"))
    assert run(*SHORT, "--json") == 1
    rows = json.loads(capsys.readouterr().out)["rows"]
    ours = [row for row in rows if row["contender"] == "Alignment" and row["mode"] == "forward"]
    assert [(row["status"], row["error"]) for row in ours] == [("wrong", None)] * 2


@pytest.mark.parametrize("evil", ["=cmd()", "＝cmd()", " =cmd()", "\t=cmd()"])
def test_the_reason_of_a_failure_is_no_formula(evil: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Alignment, value: torch.Tensor) -> torch.Tensor:
        raise registry.Unavailable(evil)

    monkeypatch.setattr(Alignment, "forward", fail)
    assert run(*SHORT, "--out", str(tmp_path)) == 0
    (table,) = tmp_path.glob("*.csv")
    with table.open(newline="", encoding="utf-8") as file:
        reasons = [line["reason"] for line in csv.DictReader(file) if line["status"] == "unavailable"]
    assert reasons
    assert {reason[0] for reason in reasons} == {"'"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--shapes", "64x32"), "expected batch x length x width x heads, as in 64x32x32x4, received '64x32'"),
        (("--shapes", "1x2x3x0"), "received '1x2x3x0'"),
        (("--shapes", "1x2x3x4,"), "divisible by the heads, received '1x2x3x4'"),
        (("--shapes", "axbxcxd"), "received 'axbxcxd'"),
        (("--suite", "everything"), "invalid choice"),
        (("--dtype", "float16"), "invalid choice"),
        (("--threads", "0"), "at least 1"),
        (("--repeats", "-1"), "expected a whole number"),
        (("--seconds", "nan"), "a positive number of seconds, received 'nan'"),
        (("--limit", "soon"), "a positive number of seconds, received 'soon'"),
    ],
)
def test_words_the_parser_refuses(words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run(*words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_rows_of_some_variants_only(capsys: pytest.CaptureFixture[str]) -> None:
    rows = document(capsys, *SHORT, "--variants", "causal")["rows"]
    assert {row["variant"] for row in rows} == {"causal"}
    with pytest.raises(UserError, match=r"'kernel' has plain, causal, padded, mask, dropout, received 'masked'"):
        run("--suite", "kernel", "--variants", "dropout,masked")


@pytest.mark.parametrize("words", [("--dtype", "bfloat16"), ("--shapes", "2x7x8x2", "--variants", "mnist")])
def test_a_suite_without_such_rows_says_why(words: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=r"model has no rows in .*float32, those of pictures at lengths that are a"):
        run("--suite", "model", *words)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("mine", "utf-8")
    with pytest.raises(ValueError, match="is a file: name a folder"):
        run(*SHORT, "--out", str(path))
    assert path.read_text("utf-8") == "mine"
