"""``better-attention ladder``: arguments, what it prints, how it ends."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from better_attention.cli import ladder, main
from better_attention.lab.ladder.climb import epoch_updates
from better_attention.lab.ladder.grid import SCALES
from better_attention.lab.training.loop import Training
from better_attention.lab.training.progress import Interrupted


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    ladder.add_arguments(parser)
    return parser.parse_args(arguments)


def test_without_arguments_it_is_the_declared_grid() -> None:
    made = ladder.make_ladder(parse())
    grid = SCALES["small"]
    assert tuple(made.rungs) == grid["rungs"]
    assert len(made.settings) == 3 * 4 * 2
    assert [v.name for v in made.variants] == ["standard", "expressive", "efficient", "efficient+expressive"]
    assert (made.seeds, made.heads, made.out, made.device) == (3, 2, Path("runs/ladder-small"), "cpu")
    assert (made.task.equal_params, made.task.epochs * 50, made.task.target_accuracy) == (True, grid["updates"], 99.0)
    assert not made.screen
    assert ladder.make_ladder(parse("--scale", "paper")).task.width == made.task.width


def test_every_argument_arrives() -> None:
    options = "--scale smoke --mechanisms super,super+expressive --rungs 4x5,8x5 --scalings raw,learned"
    more = "--positions alibi-score --layers 2,3 --heads 4 --seeds 7 --updates 120 --screen"
    setting = "--equal-width --out here --device auto --set width=16 --set steps=9"
    made = ladder.make_ladder(parse(*options.split(), *more.split(), *setting.split()))
    assert made.rungs == ((4, 5), (8, 5))
    assert [str(s) for s in made.settings] == [
        "raw-alibi-score-l2",
        "raw-alibi-score-l3",
        "learned-alibi-score-l2",
        "learned-alibi-score-l3",
    ]
    assert [v.name for v in made.variants] == ["super", "super+expressive"]
    assert (made.heads, made.seeds, made.screen, made.out, made.device) == (4, 7, True, Path("here"), "auto")
    assert (made.task.equal_params, made.task.epochs, made.task.width, made.task.steps) == (False, 2, 16, 9)


@pytest.mark.parametrize(("updates", "epochs", "each"), [(7, 1, 7), (50, 1, 50), (99, 1, 50), (100, 2, 50)])
def test_a_run_makes_no_more_updates_than_asked_for(updates: int, epochs: int, each: int) -> None:
    made = ladder.make_ladder(parse("--updates", str(updates)))
    assert (made.task.epochs, epoch_updates(made.task)) == (epochs, each)


@pytest.mark.parametrize("rules", ["plus,minus,back,negative", '["plus","minus","back","negative"]'])
@pytest.mark.parametrize("scale", ["smoke", "small"])
def test_several_rules_at_once(rules: str, scale: str) -> None:
    """Modulo 2 they would all be the same: the rungs' own moduli count, not the task's."""
    made = ladder.make_ladder(parse("--scale", scale, "--rungs", "4x4,8x4", "--set", f"rules={rules}"))
    assert made.task.rules == ("plus", "minus", "back", "negative")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rungs", "2x9,8x4", "--set", "rules=plus,minus"], "'plus' and 'minus' are the same modulo 2"),
        (["--set", "rules=plus,times"], "rules must be one of"),
        (["--rungs", "8x4,4x4"], "(4, 4) is easier than (8, 4)"),
        (["--rungs", "1x4"], "modulus must be >= 2"),
        (["--scalings", "cube"], "scaling must be one of"),
        (["--positions", "sine"], "positions must be one of"),
        (["--set", "delay=4"], "--set delay: the ladder's grid sets it"),
        (["--set", "colour=4"], "expected NAME=VALUE"),
        (["--heads", "3", "--scale", "smoke"], "3"),
    ],
)
def test_what_does_not_fit_is_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["ladder", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rungs", "message"),
    [("4", "expected N x τ, such as 8x4"), *((bad, "whole number") for bad in ("x4", "4x", "axb", "4x0"))],
)
def test_rungs_are_two_numbers(rungs: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main(["ladder", "--rungs", rungs])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


GRID = "--scale smoke --mechanisms standard,expressive --rungs 4x4,4x5 --updates 2 --seeds 1"
SIZES = "--set train_samples=16 --set batch_size=8 --set test_samples=8 --set width=8"
TINY = ["ladder", *GRID.split(), *SIZES.split()]


def test_it_ends_with_the_findings_and_says_where_the_files_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main.main([*TINY, "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "our own definition" in said
    assert "of training for 4 runs with 2 updates per epoch and at most 1 epoch; solved" in said
    assert "[1 of at most 4] n4-t4/sqrt-rotary-l1/standard-h2-s0  test " in said
    assert "expressive against standard: " in said
    assert "no difference shown." in said
    for name in ("ladder.html", "ladder.csv", "ladder.json"):
        assert str(tmp_path / name) in said
        assert (tmp_path / name).stat().st_size > 100
    found = json.loads((tmp_path / "ladder.json").read_text())
    assert found["complete"]
    assert len(found["rows"]) == 4
    page = (tmp_path / "ladder.html").read_text()
    assert "our own definition" in page


def test_json_stands_alone_on_standard_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main.main([*TINY, "--rungs", "4x4", "--json", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == json.loads((tmp_path / "ladder.json").read_text("utf-8"))
    assert "our own definition" in said.err


def test_stopped_it_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(self: Training) -> dict[str, object]:
        raise Interrupted("standard-h2-s0: saved")

    monkeypatch.setattr(Training, "run", stopped)
    assert main.main([*TINY, "--out", str(tmp_path)]) == 130
    assert "The same command continues there" in capsys.readouterr().out


ESTIMATED = """
import sys
from better_attention.cli.main import main
status = main(["ladder", "--out", sys.argv[1]])
print(status, *(name for name in ("torch._dynamo", "scipy", "matplotlib", "sklearn") if name in sys.modules))
"""


def test_nothing_slow_is_imported_before_the_estimate(tmp_path: Path) -> None:
    """Whoever is told that it takes days is told so within seconds; these packages take as long as all the rest."""
    done = subprocess.run(
        [sys.executable, "-c", ESTIMATED, str(tmp_path / "out")], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "2", done.stdout
    assert "that may take more than an hour" in done.stderr
