"""``better-attention trial``: arguments, going on, the report, the picture."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from better_attention.cli import main, trial
from better_attention.lab.trial.grid import CONTESTANTS, STAGES
from better_attention.lab.trial.run import CELLS


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    trial.add_arguments(parser)
    return parser.parse_args(arguments)


def test_the_stages_of_the_help_are_those_of_the_grid() -> None:
    assert trial.STAGES == STAGES
    assert parse().stages == STAGES
    assert (parse("--part", "2/3").part, parse("--draw", "d16 l2,4x8").draw) == ((2, 3), ("d16 l2", (4, 8)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--part", "3/2"], "expected K/N with K <= N, such as 1/2, received '3/2'"),
        (["--part", "2"], "expected K/N"),
        (["--draw", "4x8"], "expected a size and N x τ, such as d16,4x8, received '4x8'"),
        (["--stages", "tune,last"], "--stages last: the stages are tune, main, group, long, multi."),
        (["--sizes", "d5"], "--sizes d5: the sizes are one-hot."),
        (["--report"], "holds no finished cell yet."),
    ],
)
def test_what_cannot_be_meant_is_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main.main(["trial", "--scale", "smoke", *arguments, "--out", str(tmp_path / "out")])
    except SystemExit as ended:  # argparse ends the process itself
        status = ended.code
    assert status == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_it_trains_goes_on_reports_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["trial", "--scale", "smoke", "--out", str(tmp_path)]
    assert main.main([*command, "--stages", "tune"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(CONTESTANTS) + 3
    assert lines[0].startswith("tune N 4 τ 4 one-hot, learned, sqrt, adamw, seed 0: standard ")
    assert "after 20 updates" in lines[0]
    assert lines[-1].endswith("tables.md")
    assert main.main([*command, "--draw", "one-hot,4x4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:-4]].count("tune") == 0
    assert (tmp_path / "distances-one-hot-4x4.svg").read_text().startswith("<?xml")
    rows = (tmp_path / CELLS).read_text()
    assert main.main([*command, "--report"]) == 0
    assert (tmp_path / CELLS).read_text() == rows
    assert "At the tuned setting" in (tmp_path / "tables.md").read_text()
    capsys.readouterr()
    assert main.main([*command, "--report", "--draw", "d16,4x8"]) == 2
    assert "--draw d16,4x8: no such cell of the stages main and long is finished." in capsys.readouterr().err
