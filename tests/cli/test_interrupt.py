"""Ctrl-C where nothing is to be saved: while torch is imported, while a pace is measured, and after the end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from better_attention import command
from better_attention.cli import main
from better_attention.lab.ladder import climb
from better_attention.lab.tasks.image import ImageTask
from better_attention.lab.tasks.variant import Variant
from better_attention.lab.training import step_time
from better_attention.lab.training.interruption import Stop
from helpers import tiny

SCRIPT = "import sys\nfrom better_attention.cli.main import main\nsys.exit(main())\n"


@pytest.mark.parametrize("how", ["module", "script"])
def test_while_torch_is_imported(how: str, tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    script = tmp_path / "better-attention"
    script.write_text(SCRIPT)
    started = ["-m", "better_attention"] if how == "module" else [str(script)]
    known = os.environ | {"PYTHONPATH": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, *started, "list"], env=known, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "importing\n"
        program.send_signal(signal.SIGINT)
        _, said = program.communicate(timeout=30)
    assert (program.returncode, said) == (130, "better-attention: interrupted.\n")


CLEARING_UP = """
import atexit, sys, time
from better_attention.cli.main import main

def slow():
    print("clearing up", flush=True)
    time.sleep(60)

atexit.register(slow)
sys.exit(main())
"""


def test_while_the_process_clears_up(tmp_path: Path) -> None:
    """Whoever is told that it is interrupted, and waits for Python's own end, may press the keys again."""
    script = tmp_path / "better-attention"
    script.write_text(CLEARING_UP)
    with subprocess.Popen(
        [sys.executable, str(script), "cost"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as program:
        assert program.stdout is not None
        while program.stdout.readline() not in ("clearing up\n", ""):
            pass
        program.send_signal(signal.SIGINT)
        _, said = program.communicate(timeout=30)
    assert (program.returncode, said) == (-signal.SIGINT, "")


def test_a_program_of_somebody_else_s_keeps_its_handler() -> None:
    assert not command.is_command()
    before = signal.getsignal(signal.SIGINT)
    command.quiet()
    command.loud()
    command.ending(3)
    assert signal.getsignal(signal.SIGINT) is before
    command._leave()  # does not end this process


ENDS = """
import atexit, importlib.util, sys
from better_attention.cli.main import main

class Kept:
    def __del__(self):
        print("cleared up")

kept = Kept()
kept.itself = kept
if importlib.util.find_spec("triton") is not None:
    import triton.language
atexit.register(print, "put away")
sys.exit(main())
"""


@pytest.mark.parametrize(("verb", "status"), [("list", 0), ("--help", 0), ("nothing", 2), ("show nothing", 2)])
def test_the_end_is_short_and_says_nothing(verb: str, status: int, tmp_path: Path) -> None:
    """Other libraries put away what is theirs; bindings in C++ such as Triton's do not list what is left of them."""
    script = tmp_path / "better-attention"
    script.write_text(ENDS)
    done = subprocess.run([sys.executable, str(script), *verb.split()], capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert done.stdout.endswith("put away\n")  # also where standard output is a file, which is written late
    assert "leaked" not in done.stderr
    assert (done.stderr == "") == (status == 0)


VERBS = {
    "compare": ["compare", "digits", "--scale", "smoke", "--mechanisms", "standard,super"],
    "ladder": ["ladder", "--scale", "smoke"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_while_the_pace_is_measured(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first update that is measured is the last."""
    updates = []

    def interrupted(*arguments: Any) -> Callable[[], float]:
        def update() -> float:
            updates.append(1)
            signal.raise_signal(signal.SIGINT)
            return 1.0

        return update

    monkeypatch.setattr(step_time, "_updates", interrupted)
    assert main.main([*VERBS[verb], "--device", "cpu", "--out", str(tmp_path / "out")]) == 130
    assert len(updates) == 1
    said = capsys.readouterr()
    assert said.err == "better-attention: interrupted.\n"
    assert "stopping" not in said.out
    assert not list((tmp_path / "out").rglob("config.json"))


def test_between_the_runs_of_a_ladder_a_measurement_is_cut_short() -> None:
    stop = Stop()
    updates = []

    def losses(task: ImageTask, logits: Tensor, targets: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            updates.append(1)
            stop.signal = signal.SIGINT
        return ImageTask.losses(task, logits, targets)

    task = tiny.overriding(tiny.task(), losses=losses)
    step_time.measure(task, tiny.splits(), Variant.of("super"), 3, torch.device("cpu"), stop=stop)
    assert len(updates) == 4  # ours and torch's, once to get ready and once for the time


def test_an_estimate_takes_two_updates_of_few_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the grid of the scale "small": 2 mechanisms, one of them at 2 depths, the shortest and longest sequences."""
    updates = []

    def counted(*arguments: Any) -> Callable[[], float]:
        def update() -> float:
            updates.append(1)
            return 0.1

        return update

    monkeypatch.setattr(step_time, "_updates", counted)
    monkeypatch.setattr(step_time, "_evaluation", lambda *_: (0.0, 0.0))
    monkeypatch.setattr(climb.Climb, "train", lambda *_: pytest.fail("it has begun"))
    ladder = ["ladder", "--mechanisms", "standard,efficient", "--scalings", "sqrt", "--out", str(tmp_path / "out")]
    assert main.main(ladder) == 2
    assert len(updates) == 2 * (2 + 1) * 2
    said = capsys.readouterr()
    assert re.search(r"at most \d+ (days|h)", said.out)
    assert "add --yes to begin, take --scale smoke" in said.err
    assert not list(tmp_path.rglob("config.json"))
    with pytest.raises(pytest.fail.Exception, match="it has begun"):
        main.main([*ladder, "--yes"])
    with pytest.raises(pytest.fail.Exception, match="it has begun"):  # an hour and less asks nothing
        main.main([*ladder, "--scale", "smoke"])
