"""Texts as the world writes them: what other programs write is read, and each row that is not is explained."""

from __future__ import annotations

import csv
import io
import json
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from better_attention.cli import main
from better_attention.lab.data.catalogue import read as read_set
from better_attention.lab.data.own_texts import read
from better_attention.lab.data.own_texts.columns import Columns, near_equal, read_table
from better_attention.lab.data.samples import DataError, NotFetched, Texts

COUNT = 400
LABELS = ("bad", "good")


def rows_of(data: Texts) -> int:
    return len(data.train_texts) + len(data.test_texts) + len(data.validation_texts or ())


def every_text(data: Texts) -> set[str]:
    return {*data.train_texts, *data.test_texts, *(data.validation_texts or ())}


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def comma(rows: Sequence[Sequence[Any]], delimiter: str = ",", ending: str = "\r\n") -> str:
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=delimiter, lineterminator=ending).writerows(rows)
    return out.getvalue()


def numbered(count: int = COUNT) -> list[tuple[str, str]]:
    return [(f"number {i}, it is", LABELS[i % 2]) for i in range(count)]


# --- rows in the file = rows in the data + rows named in notes --------------------------------------------------------


def stray_quotes(ending: str = "\n") -> str:
    """GLUE's way: quotes are characters. One begins row 20, one ends row 60."""
    marks = {20: '"number', 60: 'number "', 100: 'so "called" number', 140: '"a quoted" number'}
    lines = ["sentence\tlabel"]
    lines += [f"{marks.get(i, 'number')} {i}{chr(34) * (i == 60)}\t{LABELS[i % 2]}" for i in range(COUNT)]
    return ending.join([*lines, ""])


def glue_every_40th() -> str:
    return "sentence\tlabel\n" + "".join(
        f"{chr(34) * (i % 40 == 0)}number {i}\t{LABELS[i % 2]}\n" for i in range(COUNT)
    )


def common_voice() -> str:
    return "client_id\tsentence\tup_votes\tcategory\n" + "".join(
        f"x{i}\t{chr(34) * (i % 30 == 7)}number {i} he said{chr(34) * (i % 30 == 9)}\t2\t{LABELS[i % 2]}\n"
        for i in range(COUNT)
    )


FILES: dict[str, tuple[str, Callable[[], str | bytes]]] = {
    "glue": ("a.tsv", stray_quotes),
    "glue crlf": ("a.tsv", lambda: stray_quotes("\r\n")),
    "glue, every 40th row": ("a.tsv", glue_every_40th),
    "common voice": ("a.tsv", common_voice),
    "tabs in a .csv": ("a.csv", stray_quotes),
    "excel": ("a.csv", lambda: b"\xef\xbb\xbf" + comma([("text", "label"), *numbered()], ";").encode()),
    "pandas with index": (
        "a.csv",
        lambda: comma([("", "text", "label"), *((i, *row) for i, row in enumerate(numbered()))], ending="\n"),
    ),
    "pandas twice": (
        "a.csv",
        lambda: comma([("", "Unnamed: 0", "text", "label"), *((i, i, *row) for i, row in enumerate(numbered()))]),
    ),
    "sms": ("a.csv", lambda: comma([("label", "text", "", "", ""), *((b, a, "", "", "") for a, b in numbered())])),
    "trailing separators": ("a.csv", lambda: comma([("text", "label"), *((*row, "", "") for row in numbered())])),
    "a blank name": (
        "a.csv",
        lambda: comma([(" ", "text", "label"), *((i, *row) for i, row in enumerate(numbered()))]),
    ),
    "line ends in quotes": ("a.csv", lambda: comma([("text", "label"), *((a + "\nsecond", b) for a, b in numbered())])),
    "quoted tsv": ("a.tsv", lambda: comma([("text", "label"), *((f'a "b"\t{a}\nc', b) for a, b in numbered())], "\t")),
}


@pytest.mark.parametrize("kind", FILES)
def test_each_row_of_what_other_programs_write_is_read(tmp_path: Path, kind: str) -> None:
    name, content = FILES[kind]
    data = read.read(write(tmp_path / name, content()))
    assert rows_of(data) == COUNT
    assert {int(re.findall(r"number (?:\" ?)?([0-9]+)", text)[0]) for text in every_text(data)} == set(range(COUNT))
    assert data.classes == LABELS


def test_how_quotes_were_read_is_told(tmp_path: Path) -> None:
    odd = read.read(write(tmp_path / "a.tsv", stray_quotes()))
    assert "a.tsv: quotes are read as characters of the texts; 4 lines hold them" in odd.notes
    assert '"number 20' in every_text(odd)
    plain = read.read(
        write(tmp_path / "b.tsv", comma([("text", "label"), *((f'"{a}"', b) for a, b in numbered())], "\t"))
    )
    assert not any("quotes" in note for note in plain.notes)
    assert '"number 7, it is"' in every_text(plain)  # as the writer of CSV had it


def test_lines_that_one_field_holds_are_counted(tmp_path: Path) -> None:
    text = "text,label\n" + "".join(f"number {i},{LABELS[i % 2]}\n" for i in range(100))
    swallowed = text.replace("number 20,", '"number 20,').replace("number 60,good", 'number 60",good')
    swallowed = swallowed.replace("number 60,bad", 'number 60",bad')
    data = read.read(write(tmp_path / "a.csv", swallowed))
    assert rows_of(data) == 60
    (note,) = [note for note in data.notes if "line ends" in note]
    assert note.startswith(
        "a.csv: 1 row with line ends between quotes, 41 lines together, the longest 41 from line 22 on"
    )
    assert "a quote there is a character: double it" in note


@pytest.mark.parametrize("odd", ["number 30", "number 30\tbad\tmore"])
@pytest.mark.parametrize("at", [30, 200])
def test_an_odd_line_does_not_let_quotes_swallow_the_others(tmp_path: Path, odd: str, at: int) -> None:
    lines = stray_quotes().split("\n")
    lines[at] = odd
    with pytest.raises(
        DataError, match=rf"line {at + 1} has [13] fields?, line 1 has 2 .*Remove the record, or correct"
    ):
        read.read(write(tmp_path / "a.tsv", "\n".join(lines)))


# --- columns without a name -------------------------------------------------------------------------------------------


def test_both_missing_columns_are_named_at_once(tmp_path: Path) -> None:
    content = comma([("v1", "v2", "", ""), *((b, a, "", "") for a, b in numbered(60))])
    with pytest.raises(DataError, match=r"no text column.*text_column=NAME.*No label column either.*label_column=NAME"):
        read.read(write(tmp_path / "a.csv", content))


@pytest.mark.parametrize("header", [("", "text", "label"), (" ", "a", "label"), ("Unnamed: 0", "a", "label", "")])
def test_a_column_without_a_name_is_no_candidate(header: tuple[str, ...]) -> None:
    assert Columns().of(header)[0] == ("text" if "text" in header else None)
    assert Columns(label="label").of(header)[0] == ("text" if "text" in header else None)
    assert Columns(text="", label="label").of(["", "label"]) == (None, "label")


def test_what_stands_in_columns_without_a_name_is_counted(tmp_path: Path) -> None:
    rows = [(b, a, "more" if i in (3, 5) else "", "") for i, (a, b) in enumerate(numbered(60))]
    data = read.read(write(tmp_path / "a.csv", comma([("label", "text", "", ""), *rows])))
    assert "a.csv: 2 rows with something in a column without a name, which is not read: line 5, 7" in data.notes


# --- folders ----------------------------------------------------------------------------------------------------------


def test_a_competitions_folder(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", comma([("id", "text", "target"), *((i, *row) for i, row in enumerate(numbered()))]))
    write(tmp_path / "test.csv", comma([("id", "text"), (1, "what is it?")]))
    write(tmp_path / "sample_submission.csv", comma([("id", "target"), (1, "bad")]))
    data = read.read(tmp_path)
    assert rows_of(data) == COUNT
    (left_out,) = [note for note in data.notes if note.startswith("test.csv is left out")]
    assert "has no labels" in left_out
    assert "not read: sample_submission.csv beside test.csv, train.csv" in data.notes


@pytest.mark.parametrize(("name", "empty"), [("test.csv", ""), ("test.csv", "  "), ("test.jsonl", None)])
def test_a_held_out_file_with_an_empty_label_column_is_left_out(tmp_path: Path, name: str, empty: str | None) -> None:
    write(tmp_path / "train.csv", comma([("text", "label"), *numbered()]))
    rows = [(f"what is {i}?", empty) for i in range(20)]
    lines = [json.dumps({"text": text, "label": label}) + "\n" for text, label in rows]
    write(tmp_path / name, "".join(lines) if name.endswith("l") else comma([("text", "label"), *rows]))
    data = read.read(tmp_path)
    assert rows_of(data) == COUNT
    assert f"{name} is left out: it has no labels, without which nothing can be measured" in data.notes


def test_all_records_of_unknown_classes_are_named_at_once(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", comma([("text", "label"), *numbered()]))
    write(tmp_path / "test.csv", comma([("text", "label"), *((f"test {i}", "-1") for i in range(20))]))
    with pytest.raises(
        DataError, match=r"class '-1' does not occur .*take the file out.* Likewise 19 more lines: 3, 4"
    ):
        read.read(tmp_path)


def test_training_without_labels_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", comma([("id", "text"), (1, "what is it?")]))
    with pytest.raises(DataError, match=r"train\.csv, line 1 .* has no label column"):
        read.read(tmp_path)


def test_a_folder_without_a_training_file_names_the_file_to_pass(tmp_path: Path) -> None:
    for name in ("my a.csv", "b.csv"):
        write(tmp_path / name, comma([("text", "label"), *numbered()]))
    with pytest.raises(DataError, match=r"name it: `--data \S*b\.csv`\."):
        read.read(tmp_path)


def write_folders(place: Path, count: int) -> Path:
    for i, (text, label) in enumerate(numbered(count)):
        write(place / label / f"{i}.txt", text)
    return place


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("below", ["", "corpus"])
@pytest.mark.parametrize("ending", [".txt", ".TXT"])
def test_a_folder_of_txt_files_for_each_class(tmp_path: Path, parts: bool, below: str, ending: str) -> None:
    whole, tmp_path = tmp_path, tmp_path / below
    if parts:
        write_folders(tmp_path / "Train", 60)
        write_folders(tmp_path / "test", 20)
    else:
        write_folders(tmp_path, 60)
    place = tmp_path / "Train" if parts else tmp_path
    write(place / "README.md", "about them")
    write(place / "good" / "notes.docx", "?")
    for file in [*tmp_path.rglob("*.txt")]:
        file.rename(file.with_suffix(ending))
    data = read.read(whole)
    assert rows_of(data) == 60 + 20 * parts
    assert data.classes == LABELS
    labels = [data.classes[label] for label in data.train_labels]
    for text, label in zip(data.train_texts, labels, strict=True):
        assert label == LABELS[int(re.findall("[0-9]+", text)[0]) % 2]
    assert f"texts from the files of {place}, classes from its folders" in data.notes
    assert any(
        "not read, since no text in the folder of a class: 2 (README.md, good/notes.docx)" in n for n in data.notes
    )


def write_newsgroups(place: Path, count: int, first: int = 0) -> Path:
    """Articles as the 20 newsgroups have them: a folder for each group, a number for each file."""
    for i, (text, label) in enumerate(numbered(count)):
        write(place / f"alt.{label}" / str(51_000 + first + i), f"From: me\n\n{text}")
    return place


@pytest.mark.parametrize("layout", ["20_newsgroups", "unpacked", "bydate"])
def test_newsgroups_are_read_as_they_are_published(tmp_path: Path, layout: str) -> None:
    """One folder of groups, that folder within another, or a folder for each part with the part at its name's end."""
    place = tmp_path / "20_newsgroups"
    if layout == "bydate":
        write_newsgroups(tmp_path / "20news-bydate-train", 60)
        write_newsgroups(tmp_path / "20news-bydate-test", 20)
    else:
        write_newsgroups(place, 60)
    data = read.read(place if layout == "20_newsgroups" else tmp_path)
    assert rows_of(data) == 60 + 20 * (layout == "bydate")
    assert (data.classes, len(data.test_texts)) == (("alt.bad", "alt.good"), 20 if layout == "bydate" else 6)
    for text, label in zip(data.train_texts, data.train_labels, strict=True):
        assert data.classes[label].removeprefix("alt.") == LABELS[int(re.findall("[0-9]+", text)[0]) % 2]


def test_articles_older_than_utf_8_are_read_and_counted(tmp_path: Path) -> None:
    place = write_newsgroups(tmp_path / "news", 60)
    for number, letter in ((51_002, "é"), (51_004, "ß")):
        write(place / "alt.bad" / str(number), f"café {letter} {number}".encode("latin-1"))
    data = read.read(place)
    assert {f"café é {51_002}", f"café ß {51_004}"} <= every_text(data)
    assert any("2 of 60 files not UTF-8 and read as Latin-1, the first alt.bad/51002" in note for note in data.notes)
    write(place / "alt.bad" / "51006", b"\x7fELF\x00\x00")
    with pytest.raises(DataError, match=r"alt\.bad/51006 is no text: it holds a byte 0"):
        read.read(place)


def test_where_there_are_txt_files_those_without_an_ending_are_none(tmp_path: Path) -> None:
    write(write_folders(tmp_path, 60) / "good" / "Makefile", "all:")
    data = read.read(tmp_path)
    assert rows_of(data) == 60
    assert any("good/Makefile" in note for note in data.notes)


def test_a_part_at_the_end_of_a_name_is_one_only_beside_a_training_folder(tmp_path: Path) -> None:
    for name in ("litmus-test", "steam-train"):
        for i in range(20):
            write(tmp_path / name / f"{i}.txt", f"{name} {i}")
    assert read.read(tmp_path).classes == ("litmus-test", "steam-train")


@pytest.mark.parametrize("about", ["page,title\n1,Home\n", "", "x\x00y,\n", "text\nno label\n"])
def test_class_folders_beside_an_unrelated_table_are_read(tmp_path: Path, about: str) -> None:
    write(write_folders(tmp_path, 60) / "index.csv", about)
    data = read.read(tmp_path)
    assert (rows_of(data), data.classes) == (60, LABELS)
    assert any("index.csv" in note for note in data.notes)


@pytest.mark.parametrize("name", ["reviews.csv", "train.csv"])
def test_a_table_of_texts_beside_folders_is_read(tmp_path: Path, name: str) -> None:
    for folder in ("docs", "licences"):
        write(tmp_path / folder / "README.txt", "about them")
    write(tmp_path / name, comma([("text", "label"), *numbered()]))
    assert rows_of(read.read(tmp_path)) == COUNT


# --- tables in a .zip -------------------------------------------------------------------------------------------------


def zipped(path: Path, files: Mapping[str, str | bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


REVIEWS = comma([("review", "sentiment"), *((f"film {i}", ("positive", "negative")[i % 2]) for i in range(60))])


@pytest.mark.parametrize("where", ["archive", "folder"])
@pytest.mark.parametrize("inner", ["IMDB Dataset.csv", "archive/IMDB Dataset.csv"])
def test_a_table_in_an_archive_is_read_as_the_table_itself(tmp_path: Path, inner: str, where: str) -> None:
    alone = read.read(write(tmp_path / "alone" / "IMDB Dataset.csv", REVIEWS))
    archive = zipped(tmp_path / "in" / "archive.zip", {inner: REVIEWS, "__MACOSX/._IMDB Dataset.csv": "x"})
    found = read.read(archive if where == "archive" else archive.parent)
    assert found.fingerprint() == alone.fingerprint()
    assert found.notes == alone.notes


def test_the_parts_in_an_archive(tmp_path: Path) -> None:
    rows = comma([("text", "label"), *numbered()])
    held_out = json.dumps({"text": "one more", "label": "good"})
    archive = zipped(tmp_path / "archive.zip", {"Train.csv": rows, "test.jsonl": held_out, "notes.csv": "a,b\n"})
    data = read.read(archive)
    assert data.test_texts == ["one more"]
    assert any("not read: notes.csv beside Train.csv, test.jsonl" in note for note in data.notes)
    unlabelled = zipped(tmp_path / "b.zip", {"train.csv": rows, "test.csv": "text\nx\n"})
    assert any("test.csv is left out: it has no labels" in note for note in read.read(unlabelled).notes)


def test_what_is_wrong_in_an_archive_is_named_with_its_line(tmp_path: Path) -> None:
    archive = zipped(tmp_path / "a.zip", {"a.csv": REVIEWS.replace("film 7,", ",")})
    with pytest.raises(DataError, match=r"a\.zip/a\.csv, line 9: the text in column 'review' is empty"):
        read.read(archive)


def test_an_unpacked_table_comes_before_the_archive_that_it_is_of(tmp_path: Path) -> None:
    zipped(tmp_path / "archive.zip", {"a.csv": "damaged"})
    write(tmp_path / "a.csv", REVIEWS)
    assert rows_of(read.read(tmp_path)) == 60


@pytest.mark.parametrize("inner", ["a.parquet", "a.csv.gz", "pos/1.txt"])
def test_an_archive_without_a_table_that_can_be_read(tmp_path: Path, inner: str) -> None:
    archive = zipped(tmp_path / "archive.zip", {inner: b"x"})
    with pytest.raises(DataError, match=r"archive\.zip has no training file.*unpack it, and name the folder"):
        read.read(archive)


def test_an_archive_that_expands_to_much_is_refused(tmp_path: Path) -> None:
    archive = zipped(tmp_path / "archive.zip", {"a.csv": REVIEWS + "x" * 50_000_000})
    with pytest.raises(DataError, match="expands to more than 100 times"):
        read.read(archive)


@pytest.mark.parametrize("command", ["compare", "import"])
@pytest.mark.parametrize("whole_folder", [False, True])
def test_the_movie_reviews_in_an_archive_are_sent_to_the_command_that_reads_them(
    tmp_path: Path, whole_folder: bool, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """As Kaggle hands them out: nothing in the archive's name tells what it holds."""
    archive = zipped(tmp_path / "in" / "archive.zip", {"IMDB Dataset.csv": REVIEWS})
    place = str(archive.parent if whole_folder else archive)
    words = {"compare": ["compare", "imdb", "--data", place, "--device", "cpu", "--out", str(tmp_path / "out")]}
    words["import"] = ["data", "import", "imdb", place, "--data", str(tmp_path / "home")]
    assert main.main(words[command]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "holds the table IMDB Dataset.csv" in told
    assert f"`better-attention compare text --data {archive}`" in told
    assert rows_of(read.read(archive)) == 60


@pytest.mark.parametrize("name", ["imdb", "cifar100"])
def test_an_archive_of_another_kind_is_to_be_unpacked(tmp_path: Path, name: str) -> None:
    archive = zipped(tmp_path / "archive.zip", {"aclImdb/train/pos/0_9.txt": "good", "train": "x"})
    with pytest.raises(DataError, match=r"archive\.zip is a \.zip archive, which is not read here\. Unpack it"):
        read_set(name, archive)


def test_a_damaged_archive_beside_the_reviews_is_nobodys_business(tmp_path: Path) -> None:
    write(tmp_path / "archive.zip", b"PK\x03\x04 and no more")
    with pytest.raises(NotFetched):
        read_set("imdb", tmp_path)


# --- other layouts of folders -----------------------------------------------------------------------------------------


def test_all_faulty_files_of_a_folder_at_once(tmp_path: Path) -> None:
    write_folders(tmp_path, 60)
    for i in range(4):
        write(tmp_path / "bad" / f"z{i}.txt", "Ça".encode("latin-1") if i else " ")
    with pytest.raises(DataError, match=r"z0\.txt is empty\. Remove it\. Likewise 3 more files: bad/z1\.txt, bad/z2"):
        read.read(tmp_path)


def test_a_class_of_too_few_files_is_named_by_its_folder(tmp_path: Path) -> None:
    write(write_folders(tmp_path, 60) / "rare" / "one.txt", "number 61")
    with pytest.raises(DataError, match=r"rare/one\.txt: class 'rare' has too few") as told:
        read.read(tmp_path)
    assert "column" not in str(told.value)


@pytest.mark.parametrize("whole_folder", [False, True])
def test_the_movie_reviews_as_a_table_are_sent_to_the_command_that_reads_them(
    tmp_path: Path, whole_folder: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [(f"film {i}", ("positive", "negative")[i % 2]) for i in range(60)]
    file = write(tmp_path / "IMDB Dataset.csv", comma([("review", "sentiment"), *rows]))
    place = tmp_path if whole_folder else file
    with pytest.raises(DataError, match=r"`better-attention compare text --data '.*IMDB Dataset\.csv'`"):
        read_set("imdb", place)
    assert main.main(["compare", "imdb", "--data", str(place), "--device", "cpu", "--out", str(tmp_path / "out")]) == 2
    assert "compare text --data" in " ".join(capsys.readouterr().err.split())
    assert rows_of(read.read(file)) == 60


def test_a_folder_with_nothing_of_the_reviews_is_still_not_fetched(tmp_path: Path) -> None:
    write(tmp_path / "other.csv", "text,label\n")
    with pytest.raises(NotFetched):
        read_set("imdb", tmp_path)


# --- all faulty records at once ---------------------------------------------------------------------------------------


def amazon_lines(fault: Any) -> list[str]:
    records: list[dict[str, Any]] = [{"overall": 1.0 + i % 5, "reviewText": f"number {i}"} for i in range(100)]
    lines = [json.dumps(record) for record in records]
    for i in range(0, 96, 8):
        lines[i] = fault(records[i])
    return lines


@pytest.mark.parametrize(
    "fault",
    [
        lambda record: json.dumps({"overall": record["overall"]}),
        lambda record: json.dumps({**record, "reviewText": ""}),
        lambda record: json.dumps({**record, "reviewText": None}),
        lambda record: json.dumps({"reviewText": record["reviewText"]}),
        lambda record: json.dumps({**record, "overall": None}),
        lambda record: "[]",
        lambda record: '{"overall": 1.0, "reviewText',
    ],
)
def test_all_faulty_lines_are_named_at_once(tmp_path: Path, fault: Any) -> None:
    path = write(tmp_path / "Electronics_5.json", "\n".join(amazon_lines(fault)))
    with pytest.raises(DataError, match=r"json, line 1\b.* Likewise 11 more lines: 9, 17, .*, 81, \.\.\.\.$"):
        read.read(path)


def test_all_rows_of_another_width_are_named_at_once(tmp_path: Path) -> None:
    rows = "".join(f"number {i}{',x' * (i % 20 == 0)},{LABELS[i % 2]}\n" for i in range(100))
    with pytest.raises(DataError, match=r"line 2 has 3 fields, .* Likewise 4 more lines: 22, 42, 62, 82\."):
        read.read(write(tmp_path / "a.csv", "text,label\n" + rows))


def test_all_faulty_lines_of_the_amazon_sets_at_once(tmp_path: Path) -> None:
    good = {"stars": 5, "title": "", "text": "fine", "source": "shop"}
    lines = [json.dumps(good if i % 4 else {**good, "text": ""}) for i in range(20)]
    write(tmp_path / "mixture" / "amazon-5star.jsonl", "\n".join(lines))
    with pytest.raises(DataError, match=r"line 1: the review is empty.* Likewise 4 more lines: 5, 9, 13, 17\."):
        read_set("amazon", tmp_path / "mixture")
    official = "".join(f'"{1 + i % 5}","","{"fine" * (i % 4 > 0)}"\n' for i in range(20))
    for name in ("train.csv", "test.csv"):
        write(tmp_path / "official" / name, official)
    with pytest.raises(DataError, match=r"line 1: the review is empty.* Likewise 4 more lines: 5, 9, 13, 17\."):
        read_set("amazon", tmp_path / "official")


def test_the_two_class_set_is_not_one_to_five_stars(tmp_path: Path) -> None:
    for name in ("train.csv", "test.csv"):
        write(tmp_path / name, "".join(f'"{1 + i % 2}","title","number {i}"\n' for i in range(20)))
    with pytest.raises(DataError, match=r"set of two classes \(Amazon Review Polarity\)"):
        read_set("amazon", tmp_path)


# --- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "labels",
    [
        ("Positive", "positive"),
        ("po sitive", "po\u00a0sitive"),
        ("positive", "posi\u200btive"),
        ("positive", "\ufeffpositive"),
        ("very good", "very  good"),
        ("caf\u00e9", "cafe\u0301"),
        ("Straße", "STRASSE"),
        ("0", "0.0"),
        ("1", "01"),
        ("ＡＢ", "ab"),
    ],
)
def test_labels_nearly_the_same_are_told_and_kept_apart(tmp_path: Path, labels: tuple[str, str]) -> None:
    assert near_equal([*labels, "other"]) == [tuple(sorted(labels))]
    rows = [(f"number {i}", (*labels, "other")[i % 3]) for i in range(90)]
    data = read.read(write(tmp_path / "a.csv", comma([("text", "label"), *rows])))
    assert len(data.classes) == 3
    (note,) = [note for note in data.notes if "nearly the same" in note]
    assert all(f"{label!a} (30)" in note for label in labels)
    few = [*rows, ("last", labels[1].upper() + " ")] if labels[0] == "Positive" else None
    if few:
        with pytest.raises(DataError, match=r"class 'POSITIVE' has too few .*Nearly the same are 'POSITIVE' and 'Pos"):
            read.read(write(tmp_path / "few.csv", comma([("text", "label"), *few])))


def test_labels_whose_spaces_are_cut_off_are_counted(tmp_path: Path) -> None:
    rows = [(f"number {i}", ("good", "bad", "bad ", "\u00a0good")[i % 4]) for i in range(80)]
    data = read.read(write(tmp_path / "a.csv", comma([("text", "label"), *rows])))
    assert data.classes == LABELS
    assert "a.csv: spaces around 40 labels are cut off" in data.notes


def test_labels_that_differ_are_not_near() -> None:
    assert near_equal(["1", "10", "1.5", "a", "b", "ab", "-1", "", "e", "é", "is not", "isnot"]) == []


@pytest.mark.parametrize("name", ["nan", "None", "<NA>", "NULL", "N/A"])
def test_classes_that_stand_for_a_missing_label_are_told(tmp_path: Path, name: str) -> None:
    rows = [(f"number {i}", ("good", "bad", name)[i % 3]) for i in range(90)]
    notes = read.read(write(tmp_path / "a.csv", comma([("text", "label"), *rows]))).notes
    assert f"read as a class, though it may stand for a missing label: {name!r} (30 texts)" in notes
    fine = read.read(write(tmp_path / "b.csv", comma([("text", "label"), *numbered()]))).notes
    assert not any("missing" in note or "nearly" in note for note in fine)


def test_labels_with_control_characters_are_refused_at_once(tmp_path: Path) -> None:
    rows = [{"text": f"number {i}", "label": LABELS[i % 2] + "\0" * (i % 20 == 0)} for i in range(100)]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=r"'bad\\x00' holds the control character U\+0000\. .*Likewise 4 more lines"):
        read.read(path)


# --- Parquet ----------------------------------------------------------------------------------------------------------


def test_a_short_parquet_file_that_repeats_a_long_text_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long, count = "word " * 20_000, 5_000  # 100 kB, 500 MB together
    indices = pa.array([0] * count, pa.int32())
    column = pa.DictionaryArray.from_arrays(indices, pa.array([long]))
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": column, "label": [i % 2 for i in range(count)]}), path)
    assert path.stat().st_size < 1 << 20
    table = read_table(path, Columns())
    assert len(table.texts) == count
    assert len(set(map(id, table.texts))) < 10  # repeated, not copied
    monkeypatch.setattr("better_attention.lab.data.own_texts.records._LIMIT", 200_000_000)
    with pytest.raises(DataError, match=r"a\.parquet expands to more than 200,000,000 bytes, from row 1,025 on"):
        read_table(path, Columns())
    monkeypatch.setattr("better_attention.lab.data.own_texts.records._LIMIT", 300_000)
    with pytest.raises(DataError, match=r"a\.parquet holds 5,000 rows; at most 4,687 are read"):
        read_table(path, Columns())
