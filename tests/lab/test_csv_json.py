"""The writer of CSV and JSON files: no cell is a formula, no number is one that JSON does not have, no file is half."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest

from better_attention.lab.csv_json import as_json, write_csv, write_json

FORMULAS = (
    "=1+1", "+1+1", "-1+1", "@SUM(A1)", "\t=1+1", "\r=1+1", "\n=1+1", "  =1+1", "＝1+1", "＠x",
    '=HYPERLINK("https://x.example","y")', "=cmd|'/c calc'!A0", "\t ＋1", "\v=1+1", "\u2028=1+1", "\x1b=1+1",
)  # fmt: skip


@pytest.mark.parametrize("evil", FORMULAS)
def test_no_cell_is_a_formula(tmp_path: Path, evil: str) -> None:
    write_csv(tmp_path / "table.csv", ["a", "b"], [[evil, 1], ["harmless", 2]])
    with (tmp_path / "table.csv").open(newline="", encoding="utf-8") as file:
        _, first, second = csv.reader(file)
    assert first[0].startswith("'")
    assert first[1:] == ["1"]
    assert second == ["harmless", "2"]


@pytest.mark.parametrize("text", ['"=1+1', 'a",=1+1', "a\n=1+1", "a\r\n=1+1", "x\x1b[31m"])
def test_no_text_leaves_its_cell(tmp_path: Path, text: str) -> None:
    write_csv(tmp_path / "table.csv", ["a"], [[text]])
    content = (tmp_path / "table.csv").read_text("utf-8")
    assert not [character for character in content if ord(character) < 32 and character != "\n"]
    with (tmp_path / "table.csv").open(newline="", encoding="utf-8") as file:
        header, *lines = csv.reader(file)
    assert header == ["a"]
    assert [len(line) for line in lines] == [1]


def test_numbers_stay_numbers_and_none_is_an_empty_cell(tmp_path: Path) -> None:
    write_csv(tmp_path / "table.csv", ["a", "b", "c", "d"], [[-0.1, 10**20, None, True]])
    assert (tmp_path / "table.csv").read_text("utf-8") == "a,b,c,d\n-0.1,100000000000000000000,,True\n"


def test_json_has_no_nan_at_any_depth(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": math.nan, "b": [1, (math.inf, -math.inf, 2.5)], "c": {3: "ℓ\ud800"}})

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    document = json.loads((tmp_path / "x.json").read_bytes(), parse_constant=refuse)
    assert document == {"a": None, "b": [1, [None, None, 2.5]], "c": {"3": "ℓ?"}}


def test_what_is_no_json_value_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"a": object()})
    assert json.loads((tmp_path / "x.json").read_text("utf-8")) == {"a": 1}
    assert as_json({"a": 1}) == '{\n  "a": 1\n}'
