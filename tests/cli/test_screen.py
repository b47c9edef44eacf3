"""What reaches the terminal: names of others cannot act on it, signs keep their meaning, a file holds no cursor."""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import json
import re
import sys
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

import better_attention
from better_attention.cli import console, main, screen
from better_attention.cli import list as list_verb
from better_attention.cli.progress import PlainProgress, make_progress
from better_attention.lab.comparison.plan import Plan
from better_attention.lab.tasks.variant import Variant
from helpers import tiny

NAME = (
    "a\x1b]8;;http:e\x1b\\\x1b[31mb\x07\x08\x7f\x9b2J\u202ec\u2066\u200e\r"
    "\nbetter-attention: done\u2028[bold]x[link=y]:smile:"
)
"""A name with everything that could act on a terminal, or on what prints there; it may be a file's, without slash."""
SAFE = frozenset("\n\t")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("COLUMNS", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


def acting(text: str) -> set[str]:
    """The characters of ``text`` that act on a terminal, and lines that pretend to be the command's own."""
    directions = {"\u200e", "\u200f", "\u061c", *map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A))}
    found = {c for c in text if c in directions or unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")} - SAFE
    return found | set(re.findall(r"^better-attention: done", text, re.MULTILINE))


# --- a walk over the verbs, hostile names in each place where a name comes in -----------------------------------------


def pictures(folder: Path, classes: tuple[str, ...] = (NAME, "other")) -> Path:
    """A folder of pictures whose classes and files have such names; one picture is broken."""
    for label in classes:
        (folder / label).mkdir(parents=True)
        for number in range(12):
            pixels = np.full((8, 8, 3), 10 * number, np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{NAME}{number}.png", "png")
    return folder


def broken_pictures(folder: Path) -> Path:
    (pictures(folder) / NAME / f"{NAME}3.png").write_bytes(b"no picture")
    return folder


def archive(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"set/{NAME}/{NAME}.png", b"no picture")
    return path


def texts(path: Path, header: str = "text,label") -> Path:
    rows = [f'"words of {NAME} {number}","{NAME if number % 2 else "other"}"' for number in range(40)]
    path.write_text("\n".join([header, *rows]), encoding="utf-8")
    return path


def json_file(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def runs(folder: Path) -> Path:
    """Runs with such names: of another task, damaged, diverged."""
    config = {"run": {"name": NAME, "task": NAME, "scale": NAME, "mechanism": NAME, "heads": 1, "seed": 0}}
    json_file(folder / NAME / "config.json", config | {"commit": NAME})
    json_file(folder / f"{NAME}2" / "config.json", NAME)
    json_file(folder / f"{NAME}3" / "config.json", config)
    json_file(folder / f"{NAME}3" / "result.json", {"test_accuracy": NAME, "commit": NAME, NAME: NAME})
    return folder


def results(folder: Path) -> Path:
    json_file(folder / NAME / "results.json", [{"task": NAME, "mechanism": NAME, "heads": 1, NAME: NAME}])
    return folder / NAME


def damaged_run(folder: Path) -> Path:
    tiny.training(folder / NAME).run()
    config = json.loads((folder / NAME / "config.json").read_text("utf-8"))
    config["run"]["task"] = config["run"]["settings"]["name"] = NAME
    json_file(folder / NAME / "config.json", config)
    return folder / NAME


SMOKE = [*("--scale", "smoke", "--epochs", "1", "--seeds", "1", "--mechanisms", "standard"), "--out", "out"]
WALK: dict[str, Callable[[Path], list[Any]]] = {
    "unknown verb": lambda _: [NAME],
    "unknown option": lambda _: ["runs", f"--{NAME}"],
    "compare, task": lambda _: ["compare", NAME],
    "compare, mechanism": lambda _: ["compare", "--mechanisms", NAME],
    "compare, setting": lambda _: ["compare", "--set", f"{NAME}=1"],
    "compare, value": lambda _: ["compare", "--set", f"layers={NAME}"],
    "compare, heads": lambda _: ["compare", "--heads", NAME],
    "compare, tracker": lambda _: ["compare", *SMOKE, "--track", NAME],
    "compare, no data": lambda at: ["compare", "images", "--data", at / NAME],
    "compare, not our folder": lambda at: [
        *("compare", *SMOKE, "--out"),
        json_file(at / NAME / "results.json", "mine").parent,
    ],
    "compare, broken pictures": lambda at: ["compare", "images", *SMOKE, "--data", broken_pictures(at / NAME)],
    "compare, archive": lambda at: ["compare", "images", *SMOKE, "--data", archive(at / f"{NAME}.zip")],
    "compare, texts": lambda at: ["compare", "text", *SMOKE, "--data", texts(at / f"{NAME}.csv")],
    "compare, column": lambda at: ["compare", "text", *SMOKE, "--data", texts(at / "a.csv", '"' + NAME + '",b')],
    "compare, no column": lambda at: [
        *("compare", "text", *SMOKE, "--set", f"label_column={NAME}", "--data"),
        texts(at / "a.csv"),
    ],
    "ladder, rung": lambda _: ["ladder", "--rungs", NAME],
    "ladder, setting": lambda _: ["ladder", "--set", f"{NAME}=1"],
    "ladder, scaling": lambda _: ["ladder", "--scalings", NAME],
    "trial, stages": lambda _: ["trial", "--stages", NAME],
    "trial, sizes": lambda at: ["trial", "--scale", "smoke", "--sizes", NAME, "--out", at / NAME],
    "trial, a rung": lambda at: ["trial", "--scale", "smoke", "--draw", NAME, "--out", at / NAME],
    "ladder, not our folder": lambda at: [
        *("ladder", "--scale", "smoke", "--out"),
        json_file(at / NAME / "ladder.json", "mine").parent,
    ],
    "table, number": lambda _: ["table", NAME],
    "table, no results": lambda _: ["table", "1", NAME],
    "table, damaged results": lambda at: ["table", "1", json_file(at / NAME / "results.json", NAME)],
    "table, results": lambda at: ["table", "1", results(at)],
    "table, csv": lambda at: ["table", "1", results(at), "--csv", at / NAME / "none" / NAME],
    "table, edge": lambda at: ["table", "4", json_file(at / NAME / "edge.json", {NAME: NAME})],
    "runs": lambda at: ["runs", runs(at)],
    "runs, json": lambda at: ["runs", runs(at), "--json"],
    "runs, no folder": lambda at: ["runs", at / NAME],
    "runs, nothing there": lambda at: ["runs", pictures(at / NAME)],
    "data, name": lambda _: ["data", "show", NAME],
    "data, no folder": lambda at: ["data", "--data", at / NAME],
    "data, folder": lambda at: ["data", "--data", pictures(at / NAME)],
    "data, folder, json": lambda at: ["data", "--data", pictures(at / NAME), "--json"],
    "data, import": lambda at: ["data", "import", "imdb", pictures(at / NAME)],
    "list": lambda _: ["list", NAME],
    "show": lambda _: ["show", NAME],
    "cost, mechanism": lambda _: ["cost", "--mechanisms", NAME],
    "cost, figure": lambda at: ["cost", "--figure", "2", "--out", at / NAME / f"{NAME}.exe"],
    "predict, no run": lambda at: ["predict", at / NAME, "a"],
    "predict, damaged run": lambda at: ["predict", damaged_run(at), "a"],
    "generate, no run": lambda at: ["generate", at / NAME, "--prompt", "a"],
    "generate, damaged run": lambda at: ["generate", damaged_run(at), "--prompt", NAME],
    "generate, no prompts": lambda at: ["generate", damaged_run(at), "--prompt-file", at / NAME],
    "inspect, no run": lambda at: ["inspect", at / NAME],
    "inspect, damaged run": lambda at: ["inspect", damaged_run(at)],
    "convert, no run": lambda at: ["convert", at / NAME, "efficient", "--out", at / "out"],
    "convert, damaged run": lambda at: ["convert", damaged_run(at), "efficient", "--out", at / "out"],
    "convert, mechanism": lambda at: ["convert", damaged_run(at), NAME, "--out", at / "out"],
    "distil, no folder": lambda at: ["distil", at / NAME, "--teacher", at / NAME],
    "export, no run": lambda at: ["export", at / NAME, "--to", "onnx", "--out", at / "out.onnx"],
    "export, damaged run": lambda at: ["export", damaged_run(at), "--to", "onnx", "--out", at / "out.onnx"],
    "bench": lambda _: ["bench", "--suite", NAME],
    "edge": lambda at: ["edge", "--tasks", NAME, "--out", at / NAME],
    "edge, no model": lambda at: ["edge", "--models", at / NAME],
}


@pytest.mark.parametrize("place", WALK)
def test_no_name_acts_on_the_terminal(place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = tmp_path / "home"
    home.mkdir()
    arguments = [str(word) for word in WALK[place](home)]
    capsys.readouterr()
    with contextlib.suppress(SystemExit):  # argparse ends the process itself
        main.main(arguments)
    said = capsys.readouterr()
    assert said.out + said.err
    assert not acting(said.out + said.err)
    if "--json" in arguments:
        json.loads(said.out)


def test_every_verb_is_walked() -> None:
    assert {place.partition(",")[0] for place in WALK} >= set(main.VERBS)


def test_predictions_name_classes_and_inputs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = pictures(tmp_path / NAME)
    assert main.main(["compare", "images", *SMOKE, "--data", str(data)]) == 0
    said = capsys.readouterr()
    assert not acting(said.out + said.err)
    run = "out/standard-h4-s0"
    one = data / NAME / f"{NAME}1.png"
    for arguments in ([str(one)], ["--index", "0", "--data", str(data)], [str(one), "--json"], [str(one) + NAME]):
        main.main(["predict", run, *arguments])
        said = capsys.readouterr()
        assert said.out + said.err
        assert not acting(said.out + said.err)


def test_a_bug_s_traceback_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(args: argparse.Namespace) -> int:
        raise ZeroDivisionError(NAME.replace("\n", ""))

    monkeypatch.setattr(list_verb, "run", run)
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    with pytest.raises(ZeroDivisionError) as caught:
        main.main(["list"])
    sys.excepthook(caught.type, caught.value, caught.tb)  # as Python does when it leaves the program
    said = capsys.readouterr().err
    assert "ZeroDivisionError: a\\u001b]8;;http:e" in said
    assert not acting(said)


def test_markup_links_and_emoji_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    text = "[bold]x[/bold] [link=http://e]y[/link] :smile:"
    table = Table(text, title=text)
    table.add_row(text)
    linked = Text("z")
    linked.stylize("link http://e")
    with screen.guarded(json=False):
        console().print(text)
        console().print(table)
        console().print(linked)
    out = capsys.readouterr().out
    assert out.count(text) == 4
    assert "\x1b" not in out


def test_what_can_be_read_stays() -> None:
    for text in ("café", "मील", "می‌خواهم", "👩‍👩‍👧", "日本語", "a\tb\nc", "−0.5 ± 0.1"):
        assert screen.harmless(text) == text
        assert screen.spelled(text, "utf-8") == text
    assert json.loads(f'"{screen.harmless(chr(0xE0001) + chr(0xDCFF))}"') == "\U000e0001\udcff"


# --- terminals without the signs --------------------------------------------------------------------------------------


def ascii_run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", stream)
        assert main.main(list(arguments)) == 0
    stream.flush()
    return stream.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]


def test_signs_are_spelled_where_the_terminal_lacks_them(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = ascii_run(monkeypatch, "list")
    assert "?" not in listed
    standard = next(line for line in listed.splitlines() if line.strip("| ").startswith("standard"))
    assert standard.replace("|", " ").split() == ["standard", "yes", "yes", "yes", "yes", "softmax"]
    assert "x_{t-tau}" in listed
    assert "l = 64" in ascii_run(monkeypatch, "cost")


def test_no_number_is_cut_off_where_signs_are_spelled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the widest of the paper's tables, which has nineteen columns."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    table = Table(*["−1.25 ± 0.25" if column % 3 == 0 else "−0.125" for column in range(19)])
    assert 140 < sum(len(str(column.header)) for column in table.columns) < 200
    console().print(table)
    stream.flush()
    header = stream.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]
    assert header.count("-1.25 +/- 0.25") == 7
    assert header.count("-0.125") == 12


def test_columns_stay_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    table = Table("÷ a", "b", title="τ")
    table.add_row("−0.126 ± 0.2", Text.assemble("✓ ", ("±", "bold"), " x"))
    table.add_row("1", "2")
    console().print(table)
    stream.flush()
    lines = stream.buffer.getvalue().decode("ascii").splitlines()  # type: ignore[attr-defined]
    assert "-0.126 +/- 0.2" in lines[4]
    assert "yes +/- x" in lines[4]
    assert len({len(line) for line in lines[1:]}) == 1


def test_json_is_whole_on_any_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["list", "--json"]) == 0
    assert json.loads(ascii_run(monkeypatch, "list", "--json")) == json.loads(capsys.readouterr().out)


def printed_signs() -> set[str]:
    """Every character beyond ASCII in a string of the package that is no docstring."""
    found: set[str] = set()
    for file in Path(better_attention.__file__).parent.rglob("*.py"):
        if file.name == "screen.py" or "data" in file.parts:  # the spellings themselves, and what is only read
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone:
                found |= {char for char in node.value if not char.isascii()}
    return found


def test_every_sign_of_ours_has_a_spelling() -> None:
    signs = printed_signs()
    assert {"−", "±", "✓", "ℓ", "τ"} <= signs
    assert {char for char in signs - screen.SIGNS.keys() if not char.isalpha()} <= READ
    assert all(spelling.isascii() for spelling in screen.SIGNS.values())


READ = {char for char in map(chr, range(0x2000, 0x2070)) if not char.isprintable()} | set("＠＝－＋\ufffd\xa0")
"""Characters that the package looks for in what it reads, and does not print."""


# --- files and logs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"FORCE_COLOR": "1"},
        {"TTY_COMPATIBLE": "1"},
        {"TTY_INTERACTIVE": "1"},
        {"FORCE_COLOR": "1", "TTY_COMPATIBLE": "1", "TTY_INTERACTIVE": "1"},
    ],
    ids=lambda settings: "+".join(settings),
)
def test_a_file_holds_no_cursor_movement(
    settings: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert type(make_progress(console(), Plan(tiny.task(), [Variant.of("super")], (3,), 1, tmp_path))) is PlainProgress
    with Progress(console=console(), refresh_per_second=100) as bars:
        task = bars.add_task("bars", total=3)
        for _ in range(3):
            bars.advance(task)
            bars.refresh()
    console().print(Text("coloured", style="bold red"))
    assert main.main(["list"]) == 0
    out = capsys.readouterr().out
    assert not re.sub(r"\x1b\[[\d;]*m", "", out).count("\x1b")
    assert "\r" not in out
    assert ("\x1b[" in out) == ("FORCE_COLOR" in settings)


def test_a_terminal_has_colours_and_a_cursor(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        encoding = "utf-8"

        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    out = console()
    assert out.is_interactive
    with Progress(console=out, auto_refresh=False) as bars:
        bars.add_task(f"{NAME}", total=3)
        bars.refresh()
    said = terminal.getvalue()
    assert "\x1b[?25l" in said
    rest = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", said)
    assert not acting(rest.replace("\r", "")), rest
