"""The user's own texts: every format alike, the split without leaks, and each thing that can be wrong with them."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from better_attention.lab.data.own_texts import read as tables
from better_attention.lab.data.own_texts.columns import Columns, read_table
from better_attention.lab.data.own_texts.read import natural, read
from better_attention.lab.data.own_texts.records import csv_records
from better_attention.lab.data.samples import DataError, NotFetched, Texts
from better_attention.lab.data.vocabulary import tokens
from better_attention.lab.tasks.catalogue import TASKS

Row = tuple[str, Any]
ROWS: list[Row] = [(f'number {i}, "quoted"\nand; split\tthere', ("bad", "good")[i % 2]) for i in range(40)]


def as_csv(rows: Sequence[Row], delimiter: str = ",", names: tuple[str, str] = ("text", "label")) -> bytes:
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=delimiter).writerows([names, *rows])
    return out.getvalue().encode()


def as_jsonl(rows: Sequence[Row]) -> bytes:
    return "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows).encode()


def as_parquet(rows: Sequence[Row]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table({"text": [text for text, _ in rows], "label": [label for _, label in rows]}), out)
    return out.getvalue()


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def everything(data: Texts) -> list[tuple[str, str]]:
    assert data.validation_texts is not None
    assert data.validation_labels is not None
    parts = (
        (data.train_texts, data.train_labels),
        (data.validation_texts, data.validation_labels),
        (data.test_texts, data.test_labels),
    )
    return [(text, data.classes[label]) for texts, labels in parts for text, label in zip(texts, labels, strict=True)]


FILES: dict[str, bytes] = {
    "a.csv": as_csv(ROWS),
    "semicolons.csv": as_csv(ROWS, ";"),
    "a.tsv": as_csv(ROWS, "\t"),
    "bom.csv": b"\xef\xbb\xbf" + as_csv(ROWS),
    "blank.csv": b"\r\n" + as_csv(ROWS, ";") + b"\r\n",
    "columns.csv": as_csv(ROWS, names=("Review", " STARS")),
    "a.jsonl": as_jsonl(ROWS),
    "blank.ndjson": as_jsonl(ROWS).replace(b"\n", b"\n\n"),
    "a.parquet": as_parquet(ROWS),
    "a.csv.gz": gzip.compress(as_csv(ROWS)),
    "a.csv.bz2": bz2.compress(as_csv(ROWS)),
    "a.jsonl.xz": lzma.compress(as_jsonl(ROWS)),
}


@pytest.mark.parametrize("name", FILES)
def test_every_format_holds_the_same_texts(tmp_path: Path, name: str) -> None:
    data = read(write(tmp_path / name, FILES[name]))
    assert sorted(everything(data)) == sorted(ROWS)
    assert data.fingerprint() == read(write(tmp_path / "plain.jsonl", as_jsonl(ROWS))).fingerprint()
    assert data.classes == ("bad", "good")


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(lambda text: text.strip())


@settings(max_examples=150)
@given(
    rows=st.lists(st.tuples(TEXT, st.sampled_from(["a", "b;,\t.", 'c"'])), min_size=1, max_size=8),
    delimiter=st.sampled_from([",", ";", "\t"]),
    ending=st.sampled_from(["\n", "\r\n"]),
    quoting=st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]),
)
def test_what_csv_can_quote_comes_back_with_its_line(
    rows: list[Row], delimiter: str, ending: str, quoting: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = io.StringIO(newline="")
    if ending == "\n":
        quoting = csv.QUOTE_ALL  # before Python 3.13 a carriage return alone is not quoted then
    writer = csv.writer(out, delimiter=delimiter, lineterminator=ending, quoting=quoting)
    writer.writerow(["text", "label"])
    lines = []
    for row in rows:
        lines.append(out.getvalue().count("\n") + 1)
        writer.writerow(row)
    path = write(tmp_path_factory.mktemp("csv") / "a.csv", out.getvalue())
    table = read_table(path, Columns())
    assert list(zip(table.texts, table.labels, strict=True)) == rows
    assert table.lines == lines


def test_a_document_longer_than_pythons_own_limit(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    long = [("word " * 30_000 + str(i), str(i % 2)) for i in range(20)]
    assert sorted(everything(read(write(tmp_path / "a.csv", as_csv(long))))) == sorted(long)
    assert csv.field_size_limit() == before


# --- the split --------------------------------------------------------------------------------------------------------


def words(text: str) -> tuple[str, ...]:
    return tuple(tokens(text))


def parts(data: Texts) -> dict[str, set[tuple[str, ...]]]:
    sources = {"train": data.train_texts, "validation": data.validation_texts or [], "test": data.test_texts}
    return {name: {words(text) for text in texts} for name, texts in sources.items()}


REPEATED = [
    (text, label)
    for i in range(300)
    for text, label in ((f"Review {i} it is", i % 3), *([(f"review, {i}: IT is!", i % 2)] if i % 5 == 0 else []))
]
"""300 different texts of three classes; every fifth occurs again, spelt otherwise, half of these with another label."""


def test_texts_of_the_same_words_are_on_one_side(tmp_path: Path) -> None:
    found = parts(read(write(tmp_path / "a.jsonl", as_jsonl(REPEATED))))
    assert not found["train"] & found["test"]
    assert not found["train"] & found["validation"]
    assert not found["test"] & found["validation"]


def test_a_tenth_of_each_class_and_the_rest(tmp_path: Path) -> None:
    rows = [(f"text {i}", "rare" if i % 10 == 0 else "usual") for i in range(1_000)]
    data = read(write(tmp_path / "a.csv", as_csv(rows)))
    assert (len(data.train_texts), len(data.validation_texts or ()), len(data.test_texts)) == (800, 100, 100)
    assert Counter(data.test_labels.tolist()) == {0: 10, 1: 90}


def test_texts_of_which_little_is_read_are_told_of(tmp_path: Path) -> None:
    rows = [(f"good film {i}", "a") for i in range(50)] + [(f"bad film {i}", "b") for i in range(50)]
    told = " ".join(read(write(tmp_path / "a.csv", as_csv(rows))).notes)
    assert "without a word" not in told
    assert "letters on average" not in told
    signs = [*rows, ("!!!", "a"), ("👍 :-)", "b")]
    assert (
        "2 of 102 texts without a word, only signs: nothing is read of them"
        in read(write(tmp_path / "b.csv", as_csv(signs))).notes
    )
    chinese = [(f"这部电影非常好看我很喜欢它的故事{i}", "a") for i in range(50)] + [
        (f"演员表演很差剧情也没有意思不值得看{i}", "b") for i in range(50)
    ]
    (note,) = [note for note in read(write(tmp_path / "c.csv", as_csv(chinese))).notes if "letters" in note]
    assert note.startswith("words have 18 letters on average: a word is what stands between spaces")
    spaced = [(" ".join(text), label) for text, label in chinese]
    assert not any("letters on average" in note for note in read(write(tmp_path / "d.csv", as_csv(spaced))).notes)


def test_the_side_of_a_text_does_not_depend_on_the_order(tmp_path: Path) -> None:
    ways = [REPEATED, REPEATED[::-1], REPEATED[100:] + REPEATED[:100]]
    found = [parts(read(write(tmp_path / "a.jsonl", as_jsonl(rows)))) for rows in ways]
    assert found[0] == found[1] == found[2]
    assert all(found[0].values())


def test_a_text_that_many_wrote_is_trained_on(tmp_path: Path) -> None:
    for often in ("yes", "no", "fine", "thanks", "great", "bad", "works", "nothing"):  # wherever its hash puts it
        rows = [(f"text {i}", "a") for i in range(50)] + [(often, "a")] * 50 + [(f"other {i}", "b") for i in range(10)]
        data = read(write(tmp_path / "a.csv", as_csv(rows)))
        assert data.train_texts.count(often) == 50
        assert len(data.test_texts) == len(data.validation_texts or ()) == 10 + 1


def test_the_notes_say_what_a_reader_must_know(tmp_path: Path) -> None:
    notes = read(write(tmp_path / "a.jsonl", as_jsonl(REPEATED))).notes
    assert notes == (
        "texts from column 'text', classes from column 'label' of a.jsonl",
        "a tenth of a.jsonl each for test and validation, chosen by hash of the text within each class; texts of the "
        "same words are on one side",
        "60 of 360 texts repeat another one word for word",
        # of i = 0, 5, ..., 295 those with i % 3 = i % 2: i = 0 and 25 of every thirty
        "40 texts occur with different labels: no model can be right on all of them",
    )


# --- folders ----------------------------------------------------------------------------------------------------------


def numbered(start: int, stop: int) -> list[Row]:
    return [(f"text number {i}", i % 2) for i in range(start, stop)]


def test_the_parts_of_a_folder_stay_as_they_are(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", as_csv(numbered(0, 40)))
    write(tmp_path / "Valid.jsonl.gz", gzip.compress(as_jsonl(numbered(40, 45))))
    write(tmp_path / "test.parquet", as_parquet(numbered(38, 48)))
    write(tmp_path / "README.md", "not a table")
    data = read(tmp_path)
    assert data.train_texts == [text for text, _ in numbered(0, 40)]
    assert data.validation_texts == [text for text, _ in numbered(40, 45)]
    assert data.test_texts == [text for text, _ in numbered(38, 48)]
    assert data.test_labels.tolist() == [0, 1] * 5
    assert "2 of 10 test texts occur in the training file too" in data.notes


def test_a_part_that_is_missing_is_cut_from_training(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", as_csv(numbered(0, 200)))
    write(tmp_path / "test.csv", as_csv(numbered(200, 230)))
    data = read(tmp_path)
    assert (len(data.train_texts), len(data.validation_texts or ()), len(data.test_texts)) == (180, 20, 30)
    assert not set(data.train_texts) & set(data.validation_texts or ())
    assert any("each for validation, chosen by hash" in note for note in data.notes)


def test_a_folder_of_one_file_is_that_file(tmp_path: Path) -> None:
    path = write(tmp_path / "reviews.csv", as_csv(numbered(0, 40)))
    assert read(tmp_path).fingerprint() == read(path).fingerprint()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], r"has no training file such as train\.csv\. Expected a \.csv, \.tsv, \.jsonl"),
        (["a.csv", "b.jsonl"], r"has no training file such as train\.csv, but a\.csv, b\.jsonl\."),
        (["test.csv"], r"has no training file such as train\.csv, but test\.csv\."),
        (["train.csv", "train.jsonl"], r"has two train files, train\.csv and train\.jsonl\. Remove one\."),
        (["train.csv", "val.csv", "dev.csv"], r"has two validation files, dev\.csv and val\.csv\."),
        (["train.csv", "train-0-of-1.csv"], r"has two train files, train-0-of-1\.csv and train\.csv\."),
        (["train-0-of-2.csv", "train-1-of-3.csv"], r"has two train files, train-0-of-2\.csv and train-1-of-3\.csv"),
        (
            ["train-0-of-3.csv", "train-2-of-3.csv"],
            r"in 3 files needs each of the numbers 0 to 2 once; there",
        ),
        (
            ["train-0-of-2.csv", "train-0-of-2.tsv"],
            r"in 2 files needs each of .*train-0-of-2\.csv, ",
        ),
        (["train-1-of-2.csv", "train-2-of-2.csv"], r"train table in 2 files needs each of"),
        (["train-0-of-2.csv", "train-1-of-2.csv", "train-2-of-2.csv"], r"train table in 2 files needs each of"),
    ],
)
def test_folders_that_leave_a_doubt(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        write(tmp_path / name, as_csv(ROWS))
    with pytest.raises(DataError, match=message):
        read(tmp_path)


@pytest.mark.parametrize("folder", [".", "data"])
def test_shards_are_one_table(tmp_path: Path, folder: str) -> None:
    """As published data sets lie: train-00000-of-00002.parquet and so on, often in a folder data/."""
    for shard in range(11):
        write(tmp_path / folder / f"train-{shard}-of-11.parquet", as_parquet(numbered(4 * shard, 4 * shard + 4)))
    write(tmp_path / folder / "validation-00000-of-00001.parquet", as_parquet(numbered(50, 60)))
    write(tmp_path / folder / "Test-00000-of-00001-a09b74b3ef9c3b56.parquet", as_parquet(numbered(60, 70)))
    write(tmp_path / "README.md", "about them")
    write(tmp_path / "dataset_infos.json", "{}")
    data = read(tmp_path)
    assert data.train_texts == [text for text, _ in numbered(0, 44)]
    assert data.test_texts == [text for text, _ in numbered(60, 70)]
    assert len(data.validation_texts or ()) == 10
    assert any("train-0-of-11.parquet and 10 more" in note for note in data.notes)


def test_what_is_wrong_in_a_shard_is_told_with_its_name_and_row(tmp_path: Path) -> None:
    write(tmp_path / "train-0-of-2.csv", as_csv(numbered(0, 40)))
    odd = write(tmp_path / "train-1-of-2.csv", "text,label\nfine,good\nso so,meh\n")
    with pytest.raises(DataError, match=r"train-1-of-2\.csv, line 2: class 'good' has too few texts"):
        read(tmp_path)
    write(odd, as_csv(numbered(40, 60), names=("review", "label")))
    with pytest.raises(DataError, match=r"\('text', 'label'\), .*1-of-2\.csv in \('review', 'label'\).*same columns"):
        read(tmp_path)


def test_a_class_that_training_does_not_know(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", as_csv(ROWS))
    write(tmp_path / "test.csv", "text,label\nfine,good\nso so,meh\n")
    with pytest.raises(
        DataError, match=r"test\.csv, line 3: class 'meh' does not occur in the training file \('bad', 'good'\)"
    ):
        read(tmp_path)


# --- labels and columns -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([10, 9, 1], ("1", "9", "10")),
        (["10", "9", "-1", "0.5"], ("-1", "0.5", "9", "10")),
        ([True, False], ("false", "true")),
        ([1.0, 2.5, 10.0], ("1", "2.5", "10")),
        (["class 10", "class 9", "Class 1"], ("Class 1", "class 9", "class 10")),
        (["b", "5", "a"], ("5", "a", "b")),
    ],
)
def test_classes_of_any_kind_in_their_natural_order(
    tmp_path: Path, labels: list[Any], classes: tuple[str, ...]
) -> None:
    rows = [(f"text {i}", labels[i % len(labels)]) for i in range(12 * len(labels))]
    data = read(write(tmp_path / "a.jsonl", as_jsonl(rows)))
    assert data.classes == classes
    truth = {text: i % len(labels) for i, (text, _) in enumerate(rows)}
    order = sorted(range(len(labels)), key=lambda number: classes.index(class_name(labels[number])))
    for text, label in zip(data.train_texts, data.train_labels.tolist(), strict=True):
        assert order[label] == truth[text]


def class_name(label: object) -> str:
    return str(label).lower() if isinstance(label, bool) else str(label).removesuffix(".0")


@given(st.lists(st.text(max_size=8)))
@settings(max_examples=100)
def test_any_names_can_be_sorted(names: list[str]) -> None:
    turned = names[::-1]
    assert sorted(turned, key=natural) == sorted(names, key=natural)


def test_columns_are_found_by_their_usual_names_or_by_the_users() -> None:
    assert Columns().of(["id", "Sentence", "Target", "text"]) == ("text", "Target")
    assert Columns("BODY", "who").of(["text", "body", "label", "who"]) == ("body", "who")
    assert Columns().of(["a", "b"]) == (None, None)


def test_the_users_columns(tmp_path: Path) -> None:
    rows = "".join(f"wrong,right {i},{i % 2},{i % 3}\n" for i in range(60))
    path = write(tmp_path / "a.csv", "text,body,label,colour\n" + rows)
    data = read(path, "body", "Colour")
    assert data.classes == ("0", "1", "2")
    assert all(text.startswith("right ") for text in data.train_texts)
    assert data.notes[0] == "texts from column 'body', classes from column 'colour' of a.csv"


def test_the_separator_is_the_one_that_gives_the_columns(tmp_path: Path) -> None:
    rows = "".join(f'{i % 2},"a; b; c; {i}"\n' for i in range(40))
    assert read(write(tmp_path / "a.csv", "label,text\n" + rows)).classes == ("0", "1")
    rows = "".join(f'{i % 2},"a; b; c; {i}",\n' for i in range(40))
    data = read(write(tmp_path / "b.csv", 'label,text,"what; is; really; meant"\n' + rows))
    assert data.classes == ("0", "1")


# --- what can be wrong ------------------------------------------------------------------------------------------------

GOOD = as_csv(ROWS).decode()
LAST = GOOD.count("\n") + 1
"""The line after the last one of ``GOOD``."""


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            "number,words\n1,b\n",
            r"a\.csv, line 1 \(separated by commas\) has no text column\. It has 'number', 'words': name one with "
            r"`--set text_column=NAME`; the first line must hold the columns' names\.",
        ),
        ("a.csv", "text;stern\na;b\n", r"line 1 \(separated by semicolons\) has no label column\. It has 'text', 'ste"),
        ("a.csv", "text,label,text\na,b,c\n", r"has 2 columns 'text'\. It has 'text', 'label', 'text': rename all but"),
        ("a.csv", GOOD + '" \n",good\n', rf"a\.csv, line {LAST}: the text in column 'text' is empty\. Remove that rec"),
        ("a.csv", GOOD + "fine, \n", rf"a\.csv, line {LAST}: no label in column 'label'\. Add it, or remove that rec"),
        ("a.csv", GOOD + "a,b,c\n", rf"a\.csv, line {LAST} has 3 fields, line 1 has 2 \(separated by commas\)\. Put"),
        ("a.csv", GOOD + "alone\n", rf"a\.csv, line {LAST} has 1 field, line 1 has 2"),
        ("a.csv", GOOD + '"open,good\nx,y\n', rf"begins on line {LAST} is no CSV \(unexpected end of data\)\. Put a"),
        ("a.csv", GOOD + '"a"b,good\n', rf"begins on line {LAST} is no CSV \(',' expected after '\"'\)"),
        ("a.csv", "text,label\ra,b\r", r"begins on line 1 is no CSV \(a carriage return outside quotes"),
        ("a.csv", GOOD.encode() + "Ça,good\n".encode("latin-1"), rf"line {LAST} is not UTF-8 text \(byte 0xc7 at pos"),
        ("a.csv", GOOD.encode("utf-16"), r"a\.csv, line 1 is not UTF-8 text \(byte 0xff at position 0\)\. Save the f"),
        ("a.csv", "text,label\n", r"a\.csv holds no texts, only the names of its columns: is the file whole\?"),
        (
            "a.csv",
            GOOD + "fine, \n" + " ,good\n" * 20,
            rf"line {LAST}: no label .*\. Likewise 20 more lines: {LAST + 1}",
        ),
        ("a.csv", GOOD + "fine, \n" + " ,good\n" * 20, rf", {LAST + 10}, \.\.\.\.$"),
        ("a.csv", GOOD + "fine, \n" + " ,good\n", rf"Likewise 1 more line: {LAST + 1}\.$"),
        (
            "a.csv",
            "word " * 100_000,
            r"line 1 \(separated by commas\) has no text column\. It has 'word word word word",
        ),
        ("a.csv", "\n\n", r"line 1 \(separated by commas\) has no text column\. It has none: name one"),
        ("a.csv", "", r"a\.csv is empty \(0 bytes\)"),
        ("a.csv", "<!DOCTYPE html>", r"a\.csv is a web page, not data"),
        ("a.csv", "text,label\n" + "a,b\n" * 30, r"a\.csv: every label in column 'label' is 'b'; there is nothing to"),
        (
            "a.csv",
            GOOD + "so so,meh\n",
            rf"a\.csv, line {LAST}: class 'meh' has too few texts of its own \(1 different ones, at least 10 are",
        ),
        (
            "a.csv",
            GOOD + "so so,meh\n" * 30,
            rf"a\.csv, line {LAST}: class 'meh' has too few texts of its own \(1 different",
        ),
        (
            "a.csv",
            GOOD + "".join(f"word{n},{n % 14}\n" for n in range(40)),
            r"class '0' has too few .*16 classes, of which too few have also '1' \(3\), '2'.*'10' \(3\), \.\.\.\)\.",
        ),
        (
            "a.jsonl",
            '{"text": "a", "label": 1}\n{"text": \n',
            r"a\.jsonl, line 2 is not JSON in column 9 \(Expecting ",
        ),
        ("a.jsonl", "[" * 100_000, r"a\.jsonl, line 1 is not JSON \(maximum recursion depth exceeded"),
        ("a.jsonl", '[{"text": "a", "label": 1}]', r"a\.jsonl, line 1 is JSON, but no object\. Write one a line, such"),
        ("a.jsonl", '{"a": 1}', r"a\.jsonl, line 1 has no text column\. It has 'a'"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}', r"line 2 has no 'label'\. Every line needs 'text' and"),
        ("a.jsonl", '{"text": null, "label": 1}', r"a\.jsonl, line 1: the text in column 'text' is empty"),
        ("a.jsonl", '{"text": 3, "label": 1}', r"line 1: the text in column 'text' is 3 \(int\); a text is expected"),
        ("a.jsonl", '{"text": "a", "label": null}', r"a\.jsonl, line 1: no label in column 'label'"),
        ("a.jsonl", '{"text": "a", "label": NaN}', r"a\.jsonl, line 1: no label in column 'label'"),
        ("a.jsonl", '{"text": "a", "label": [1]}', r"is \[1\] \(list\); texts, numbers and truth values are expected"),
        (
            "a.jsonl",
            '{"text": "\\ud83d", "label": 1}',
            r"line 1: the text holds half a character \('\\ud83d'\)\. Correct",
        ),
        ("a.parquet", b"PAR1 and nothing else", r"a\.parquet is no Parquet file, or a damaged one"),
        ("a.parquet", as_parquet(ROWS)[:-20], r"a\.parquet is no Parquet file, or a damaged one"),
        ("a.parquet", as_parquet([*ROWS, ("", "bad")]), r"a\.parquet, row 41: the text in column 'text' is empty"),
        ("a.parquet", as_parquet([*ROWS, ("a", None)]), r"a\.parquet, row 41: no label in column 'label'"),
        ("a.csv.gz", gzip.compress(GOOD.encode())[:-30], r"a\.csv\.gz is cut short"),
        ("a.csv.bz2", bz2.compress(GOOD.encode())[:-30], r"a\.csv\.bz2 is cut short"),
        ("a.csv.bz2", bz2.compress(GOOD.encode())[:20] + b"x" * 90, r"a\.csv\.bz2 is damaged \(Invalid data stream\)"),
        ("a.csv.xz", lzma.compress(b"text,label\n" + b"a" * (8 << 20)), r"expands to more than 100 times its size"),
        ("a.csv.bz2", bz2.compress(b"text,label\n" + b"a" * (8 << 20)), r"expands to more than 100 times its size"),
        ("a.docx", "", r"a\.docx is of no kind that can be read: expected a \.csv"),
        ("nosuffix", GOOD, r"nosuffix is of no kind that can be read"),
        ("a.parquet.gz", b"", r"a\.parquet\.gz is of no kind that can be read"),
    ],
)
def test_what_is_wrong_is_said_with_file_and_line(
    tmp_path: Path, name: str, content: bytes | str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / name, content))


def test_a_column_that_is_not_there_and_one_for_both(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", GOOD)
    with pytest.raises(
        DataError, match=r"has no column 'body'\. It has 'text', 'label': name one with `--set text_col"
    ):
        read(path, text_column="body")
    with pytest.raises(DataError, match=r"column 'text' cannot hold the texts and the labels at once"):
        read(path, label_column="text")


def test_nothing_there_and_nothing_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere does not exist: name your texts, a \.csv"):
        read(tmp_path / "nowhere")
    with pytest.raises(NotFetched, match=r"task 'text' reads texts of your own: name them with `--data`, a \.csv"):
        TASKS["text"]("smoke").load()


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", FILES["a.parquet"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"reading Parquet needs pyarrow\. `pip install 'better-attention\[parquet\]'`"):
        read(path)
    read(write(tmp_path / "a.csv", GOOD))


def test_a_file_too_large_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("better_attention.lab.data.own_texts.records._LIMIT", 1_000)
    with pytest.raises(DataError, match=r"a\.csv holds more than the 1,000 bytes expected of it at most"):
        read(write(tmp_path / "a.csv", GOOD))
    with pytest.raises(DataError, match=r"a\.parquet holds 1,[0-9]+ bytes; at most 1,000 are read into memory"):
        read(write(tmp_path / "a.parquet", FILES["a.parquet"]))


def test_records_are_told_where_they_begin() -> None:
    assert [line for line, _ in csv_records("a", ["a,b\n", '"1\n', '2",3\n', "\n", "4,5\n"])] == [1, 2, 5]


def test_damage_is_found_however_the_file_is_cut(tmp_path: Path) -> None:
    """No cut of a compressed file passes for a whole one."""
    whole: dict[str, tuple[bytes, Callable[[bytes], bytes]]] = {
        "a.jsonl.gz": (as_jsonl(ROWS), gzip.compress),
        "a.jsonl.xz": (as_jsonl(ROWS), lzma.compress),
        "a.jsonl.bz2": (as_jsonl(ROWS), bz2.compress),
    }
    for name, (content, compress) in whole.items():
        packed = compress(content)
        for size in range(10, len(packed) - 1, 37):
            with pytest.raises(DataError, match=r"cut short|is damaged"):
                read(write(tmp_path / name, packed[:size]))


def test_the_public_words_of_the_layout() -> None:
    assert all(f"{suffix}" in tables.LAYOUT for suffix in (".csv", ".tsv", ".jsonl", ".parquet", ".gz", ".bz2", ".xz"))
