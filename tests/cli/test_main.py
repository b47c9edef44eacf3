"""The command itself: verbs, exit statuses, and errors without tracebacks."""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from better_attention import __version__
from better_attention.cli import UserError, main


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let the verb ``list`` raise ``error``."""

    def run(args: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr(importlib.import_module("better_attention.cli.list"), "run", run)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"better-attention {__version__}\n"


def test_it_can_be_run_as_a_module_and_into_a_stream_that_knows_no_greek() -> None:
    command = [sys.executable, "-m", "better_attention", "show", "super"]
    known = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    ended = subprocess.run(command, env=known, capture_output=True, check=True, timeout=60)
    assert ended.stderr == b""
    assert b"super attention" in ended.stdout
    assert ended.stdout.isascii()


def test_an_unknown_option_is_told_by_its_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main(["compare", "text", "--dta", "x.csv"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "usage: better-attention compare" in said
    assert "unrecognized arguments: --dta x.csv (did you mean --data?)" in said


@pytest.mark.parametrize("verb", main.VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main([verb, "--help"])
    assert ended.value.code == 0
    assert f"usage: better-attention {verb}" in capsys.readouterr().out


def test_the_help_of_the_whole_lists_every_verb_in_its_own_words(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main(["--help"])
    assert ended.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    for verb in main.VERBS:
        assert f"{verb} {importlib.import_module(f'better_attention.cli.{verb}').HELP}" in said


@pytest.mark.parametrize("arguments", [[], ["dance"], ["list", "--dance"]])
def test_what_is_no_command_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main(arguments)
    assert ended.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UserError("that is wrong"), 2),
        (ValueError("that is wrong"), 2),
        (TypeError("that is wrong"), 2),
        (FileNotFoundError("that is wrong"), 2),
        (PermissionError(13, "that is wrong", "there"), 2),
        (OSError(28, "that is wrong"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_are_one_message_and_a_status(
    error: BaseException, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raising(monkeypatch, error)
    assert main.main(["list"]) == status
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("better-attention: ")
    assert ("interrupted" if status == 130 else "that is wrong") in said.err
    assert "Traceback" not in said.err


def test_a_traceback_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, ValueError("that is wrong"))
    with pytest.raises(ValueError, match="that is wrong"):
        main.main(["--traceback", "list"])


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (ZeroDivisionError("bug"), ModuleNotFoundError("bug", name="better_attention.nothing")):
        raising(monkeypatch, error)
        with pytest.raises(type(error), match="bug"):
            main.main(["list"])


@pytest.mark.parametrize("missing", ["rich", "accelerate", "PIL.Image"])
def test_a_missing_extra_is_named_with_the_way_to_it(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raising(monkeypatch, ModuleNotFoundError(f"No module named {missing!r}", name=missing))
    assert main.main(["list"]) == 2
    said = capsys.readouterr().err
    assert missing.partition(".")[0] in said
    assert 'pip install "better-attention[all]"' in said


def test_the_parser_needs_torch_alone() -> None:
    """`better-attention --help` must work where no extra is installed."""
    code = (
        "import sys\n"
        f"for name in {sorted(main.EXTRAS)!r}: sys.modules[name] = None\n"
        "from better_attention.cli.main import main\n"
        "main(['compare', '--help'])\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "--mechanisms" in ended.stdout


def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "import better_attention.cli.list as verb\n"
        "verb.run = lambda args: [print('line') for _ in range(100_000)] and 0\n"
        "from better_attention.cli.main import main\n"
        "sys.exit(main(['list']))\n"
    )
    with (tmp_path / "errors").open("w+b") as errors:
        reading, writing = os.pipe()
        with subprocess.Popen([sys.executable, "-c", code], stdout=writing, stderr=errors) as program:
            os.close(writing)
            assert os.read(reading, 4) == b"line"
            os.close(reading)
            assert program.wait(timeout=60) == 0
        errors.seek(0)
        assert errors.read() == b""
