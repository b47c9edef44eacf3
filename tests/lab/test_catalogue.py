"""Catalogues: a new file is a new entry everywhere, and the names alone import nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from better_attention.cli import main
from better_attention.lab.catalogue import Catalogue
from better_attention.lab.data import published
from better_attention.lab.tasks import catalogue
from better_attention.lab.tasks.catalogue import TASKS

TASK = """
from dataclasses import replace
from better_attention.lab.tasks.catalogue.digits import digits

def doodles(scale="small"):
    return replace(digits(scale), name="doodles", title="doodles of mine", dataset="doodles")
"""
DATA = """
from dataclasses import replace
from better_attention.lab.data.published import digits

SOURCE = replace(digits.SOURCE, name="doodles", title="doodles on paper")
"""


def test_an_underscore_in_a_file_is_a_hyphen_in_its_name() -> None:
    assert "text-lm" in TASKS
    assert "text_lm" not in TASKS
    assert TASKS["text-lm"]("smoke").name == "text-lm"
    with pytest.raises(KeyError):
        TASKS["text_lm"]


def test_a_task_is_one_file_and_its_data_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, package, source in (("tasks", catalogue, TASK), ("data", published, DATA)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "doodles.py").write_text(source, "utf-8")
        package.__path__.append(str(tmp_path / folder))
    try:
        for words, said in (
            (["list"], "doodles of mine"),
            (["show", "doodles"], "doodles of mine"),
            (["data", "list"], "doodles on paper"),
            (["data", "show", "doodles"], "doodles on paper"),
            (["compare", "--help"], "doodles"),
            (["data", "show", "--help"], "doodles"),
        ):
            monkeypatch.setenv("COLUMNS", "200")
            if "--help" in words:
                with pytest.raises(SystemExit, match="0"):
                    main.main(words)
            else:
                assert main.main(words) == 0
            assert said in capsys.readouterr().out, words
        out = tmp_path / "out"
        settings = ["--scale", "smoke", "--mechanisms", "efficient", "--set", "train_samples=64", "--epochs", "1"]
        assert main.main(["compare", "doodles", *settings, "--out", str(out)]) == 0
        assert (out / "report.html").exists()
    finally:
        for package in (catalogue, published):
            package.__path__.pop()
            sys.modules.pop(f"{package.__name__}.doodles", None)


def test_the_names_import_no_entry() -> None:
    program = (
        "import sys; from better_attention.lab.tasks.catalogue import TASKS; "
        "from better_attention.lab.data.published import SOURCES; assert 'mnist' in TASKS and len(SOURCES) > 5; "
        "print([m for m in sys.modules if 'mnist' in m or m.endswith(('tasks.base', 'data.samples'))])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_is_no_entry() -> None:
    assert "base" not in TASKS
    assert 3 not in TASKS
    with pytest.raises(KeyError):
        TASKS["nothing"]
    assert list(Catalogue("nowhere", [])) == []
