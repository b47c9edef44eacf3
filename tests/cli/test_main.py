"""The command itself: verbs, exit statuses, and errors without tracebacks."""

from __future__ import annotations

import argparse
import importlib
import os
import pwd
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from better_attention import __version__
from better_attention.cli import UserError, main
from better_attention.lab.data.own_pictures import cache


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


@pytest.mark.parametrize("arguments", [["dance"], ["list", "--dance"], ["table"], ["ladder", "--rungs", "x"]])
def test_what_is_wrong_stands_before_how_it_is_called(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main.main(arguments)
    first, usage = capsys.readouterr().err.splitlines()
    verb = arguments[0] if arguments[0] in main.VERBS else ""
    prog = f"better-attention {verb}".strip()
    assert first.startswith(f"{prog}: ")
    assert usage == f"usage: {prog} [options]; `{prog} --help` lists them."


def test_without_a_verb_it_is_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main([])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("usage: better-attention")
    assert "compare` is a good first command" in said
    for verb in main.VERBS:
        assert f"\n    {verb} " in said


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


@pytest.mark.parametrize("verb", ["data", "list", "runs", "table 1", "show mnist", "cost", "data show digits"])
def test_it_works_without_a_home_directory(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    homeless(monkeypatch, tmp_path)
    assert main.main(verb.split()) == 0
    said = capsys.readouterr()
    assert said.out
    assert ("HOME is not set" in said.err) == (verb == "data")


@pytest.mark.parametrize("verb", ["data show mnist", "compare mnist --scale smoke", "compare imagenet", "data clear"])
def test_what_needs_a_home_directory_says_what_to_set(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    homeless(monkeypatch, tmp_path)
    assert main.main(verb.split()) == (0 if verb == "data show mnist" else 2)
    said = capsys.readouterr()
    assert "HOME is not set" in said.out + said.err
    assert "Set HOME or XDG_CACHE_HOME" in said.out + said.err


def test_pictures_are_decoded_without_a_home_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    homeless(monkeypatch, tmp_path)
    shades = np.arange(12 * 64, dtype=np.uint8).reshape(12, 8, 8)
    made = [cache.decoded("key", 12, lambda: contents(shades, tmp_path), 8, 1) for _ in range(2)]
    for pixels in made:
        assert (pixels == shades).all()
    assert cache.remembered("key", lambda: [1, 2]) == [1, 2]
    assert cache.held() == (0, 0)


def test_a_home_of_somebody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A container's user often finds HOME=/root."""
    real = Path.stat

    def stat(path: Path, **options: bool) -> os.stat_result:
        if path.is_relative_to("/somebody"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, **options)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/somebody")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "stat", stat)
    assert main.main(["data"]) == 0
    assert "/somebody/.cache may not be read by this user. Set HOME or XDG_CACHE_HOME" in capsys.readouterr().err


def contents(shades: np.ndarray, folder: Path) -> Iterator[tuple[int, str, Path]]:
    for row, pixels in enumerate(shades):
        path = folder / f"{row}.png"
        Image.fromarray(pixels).save(path)
        yield row, path.name, path


def homeless(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """A user whom the system does not know, as in a container, in an empty folder."""

    def unknown(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.chdir(folder)
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
