"""Pictures as others publish and pack them: labels in tables, Parquet files, hostile and peculiar archives."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from better_attention.lab.data.own_pictures import decode
from better_attention.lab.data.own_pictures.read import Pictures, find
from better_attention.lab.data.samples import DataError
from helpers.layouts import member, tar

COLOURS = {"ants": (200, 30, 40), "bees": (20, 180, 60)}


def png(colour: tuple[int, int, int], size: int = 6) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(stream, "PNG")
    return stream.getvalue()


def write(folder: Path, files: Mapping[str, bytes | str]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return folder


def packed(path: Path, files: Mapping[str, bytes | str]) -> Path:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    else:
        path.write_bytes(gzip.compress(tar(member(name, data) for name, data in files.items()), 1))
    return path


def seen(found: Pictures) -> dict[str, int]:
    """How many pictures each class has; every one must have its class's colour."""
    rows = np.arange(len(found.names))
    counts = dict.fromkeys(found.classes, 0)
    for pixels, label in zip(found.pixels(rows, 2, 3), found.labels, strict=True):
        assert tuple(pixels[0, 0]) == COLOURS[found.folders[label]]
        counts[found.classes[label]] += 1
    return counts


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads what another has decoded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


# --- tables of labels -------------------------------------------------------------------------------------------------


def tiny_imagenet() -> dict[str, bytes | str]:
    """The layout of tiny-imagenet-200.zip, with two classes."""
    files: dict[str, bytes | str] = {
        "wnids.txt": "ants\nbees\n",
        "words.txt": "ants\tsix legs\nbees\thoney\ncats\tfur\n",
    }
    for name, colour in COLOURS.items():
        files |= {f"train/{name}/images/{name}_{n}.PNG": png(colour) for n in range(5)}
        files[f"train/{name}/{name}_boxes.txt"] = "".join(f"{name}_{n}.PNG\t0\t0\t5\t5\n" for n in range(5))
    lines = [f"val_{n}.PNG\t{name}\t0\t32\t44\t62" for n, name in enumerate([*COLOURS, *COLOURS])]
    files["val/val_annotations.txt"] = "\n".join(lines) + "\n"
    files |= {f"val/images/val_{n}.PNG": png(colour) for n, colour in enumerate([*COLOURS.values()] * 2)}
    return files | {f"test/images/test_{n}.PNG": png((1, 2, 3)) for n in range(3)}


@pytest.mark.parametrize("kind", ["folder", ".zip", ".tar.gz"])
def test_tiny_imagenet_is_read_as_it_is_published(tmp_path: Path, kind: str) -> None:
    files = {f"tiny-imagenet-200/{name}": data for name, data in tiny_imagenet().items()}
    place = write(tmp_path, files) / "tiny-imagenet-200" if kind == "folder" else packed(tmp_path / f"a{kind}", files)
    found = find(place)
    assert {part: len(rows) for part, rows in found.parts.items()} == {"train": 10, "test": 4}
    assert found.classes == ("six legs", "honey")
    assert seen(found) == {"six legs": 7, "honey": 7}
    assert "classes are from val/val_annotations.txt" in found.notes
    assert "test/ holds no folder per class and is not read" in found.notes
    assert any("no table names the pictures of test/" in note for note in found.notes)


def test_a_changed_table_is_not_answered_from_the_cache(tmp_path: Path) -> None:
    place = write(tmp_path, tiny_imagenet())
    seen(find(place))
    lines = [f"val_{n}.PNG\t{name}" for n, name in enumerate([*COLOURS, *COLOURS][::-1])]
    colours = [*COLOURS.values(), *COLOURS.values()][::-1]
    write(place, {"val/val_annotations.txt": "\n".join(lines)})
    write(place, {f"val/images/val_{n}.PNG": png(colour) for n, colour in enumerate(colours)})
    assert seen(find(place)) == {"six legs": 7, "honey": 7}


def flat(prefix: str = "") -> dict[str, bytes | str]:
    return {f"{prefix}{number:02}.png": png(COLOURS["ants" if number % 2 else "bees"]) for number in range(40)}


def table(start: str, line: Callable[[int], str]) -> str:
    return start + "".join(line(number) + "\n" for number in range(40))


def own_class(number: int) -> str:
    return "ants" if number % 2 else "bees"


QUOTE = {5: '"so', 30: 'so"'}
"""Quotes that are characters: a reader of CSV would take the rows from 5 to 30 for one."""

TABLES = {
    "with endings": ("labels.csv", "", table("file,label\n", lambda n: f"{n:02}.png,{own_class(n)}")),
    "without endings": ("labels.csv", "", table("id,breed\n", lambda n: f"{n:02},{own_class(n)}")),
    "without a header": ("labels.tsv", "", table("", lambda n: f"{n:02}.png\t{own_class(n)}")),
    "many columns": ("metadata.csv", "", table("x;label;name\n", lambda n: f"{n};{own_class(n)};{n:02}.png")),
    "marked as UTF-8": ("labels.csv", "", table("\ufefffile,label\n", lambda n: f"{n:02}.png,{own_class(n)}")),
    "in images/": ("labels.csv", "images/", table("file,label\n", lambda n: f"{n:02}.png,{own_class(n)}")),
    "with folders": ("labels.csv", "images/", table("file,label\n", lambda n: f"images/{n:02}.png,{own_class(n)}")),
    "quotes": (
        "labels.tsv",
        "",
        table("file\tlabel\tby\n", lambda n: f"{n:02}.png\t{own_class(n)}\t{QUOTE.get(n, 'me')}"),
    ),
    "a line separator": (
        "labels.tsv",
        "",
        table("file\tlabel\tby\n", lambda n: f"{n:02}.png\t{own_class(n)}\ta\u2028b"),
    ),
    "a split": ("train.csv", "train/", table("id,label\n", lambda n: f"{n:02},{own_class(n)}")),
    "a split's labels": ("train_labels.csv", "train/images/", table("id,label\n", lambda n: f"{n:02},{own_class(n)}")),
}


@pytest.mark.parametrize("case", TABLES)
@pytest.mark.parametrize("kind", ["folder", ".zip"])
def test_pictures_beside_a_table_of_labels(tmp_path: Path, case: str, kind: str) -> None:
    name, prefix, text = TABLES[case]
    files = {**flat(prefix), name: text}
    if prefix.startswith("train/"):  # as in a competition: its test pictures have no labels
        files |= {"test/1.png": png((1, 2, 3)), "sample_submission.csv": "id,label\n1,ants\n"}
    found = find(write(tmp_path, files) if kind == "folder" else packed(tmp_path / f"a{kind}", files))
    assert seen(found) == {"ants": 20, "bees": 20}
    assert found.parts.keys() == {"train", "test"}
    assert any(f"classes are from {name}" in note for note in found.notes)


def test_what_a_table_leaves_out_is_counted(tmp_path: Path) -> None:
    text = "file,label\n" + "".join(f"{n:02}.png,{own_class(n)}\n" for n in range(30)) + "gone.png,ants\n"
    found = find(write(tmp_path, {**flat(), "labels.csv": text}))
    assert "classes are from labels.csv; 1 row of it without a picture" in found.notes
    assert "10 pictures in no class's folder, not read" in found.notes


def test_a_table_that_leaves_doubts_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {**flat(), "labels.csv": table("file,colour,size\n", lambda n: f"{n:02}.png,{own_class(n)},6")})
    with pytest.raises(DataError, match=r"labels.csv does not say which column.*'colour', 'size'.*Call that column"):
        find(tmp_path)
    write(tmp_path, {"labels.csv": table("file,label\n03.png,bees\n", lambda n: f"{n:02}.png,{own_class(n)}")})
    with pytest.raises(DataError, match=r"labels.csv gives the picture '03.png' two classes, 'bees' and 'ants'"):
        find(tmp_path)
    (tmp_path / "labels.csv").unlink()
    with pytest.raises(DataError, match=r"in no class's folder.*a table such as labels.csv"):
        find(tmp_path)


def test_classes_that_may_be_one_are_told(tmp_path: Path) -> None:
    for place, names in (("a", ("Cat", "cat", "dog")), ("b", ("nan", "ants"))):
        write(tmp_path / place, {f"{name}/{n}.png": png((1, 2, 3)) for name in names for n in range(3)})
    assert any("nearly the same and are kept apart: 'Cat' (3) and 'cat' (3)." in n for n in find(tmp_path / "a").notes)
    assert "read as a class, though it may stand for a missing label: 'nan' (3 pictures)" in find(tmp_path / "b").notes
    write(tmp_path / "c", {**flat(), "labels.csv": table("file,label\n", lambda n: f"{n:02}.png,{('A', 'a')[n % 2]}")})
    assert any("'A' (20) and 'a' (20)" in note for note in find(tmp_path / "c").notes)


def test_folders_of_classes_win_over_a_table(tmp_path: Path) -> None:
    files = {f"{name}/{n}.png": png(colour) for name, colour in COLOURS.items() for n in range(4)}
    text = "file,label\n" + "".join(f"{name},wrong\n" for name in files)
    found = find(write(tmp_path, {**files, "labels.csv": text}))
    assert seen(found) == {"ants": 4, "bees": 4}
    assert "not read as labels: labels.csv" in found.notes


ABOUT = {
    "other things": "page,title\n1,Home\n2,About\n",
    "the pictures": "file,width,photographer\n" + "".join(f"ants/{n}.png,5,Bo\nbees/{n}.png,5,Al\n" for n in range(4)),
    "the pictures, with a label": "file,label\n" + "".join(f"ants/{n}.png,x\nbees/{n}.png,y\n" for n in range(4)),
    "nothing": "",
    "no table": '\x00\x01 not, a table\n"',
}


@pytest.mark.parametrize("about", ABOUT)
@pytest.mark.parametrize("where", ["", "ants/", "train/"])
@pytest.mark.parametrize("kind", ["folder", ".zip"])
def test_an_index_beside_folders_of_classes_changes_nothing(tmp_path: Path, about: str, where: str, kind: str) -> None:
    below = "train/" if where == "train/" else ""
    files = {f"{below}{name}/{n}.png": png(colour) for name, colour in COLOURS.items() for n in range(4)}
    alone, beside = files, {**files, f"{where}index.csv": ABOUT[about]}
    one, other = (
        find(write(tmp_path / str(n), found) if kind == "folder" else packed(tmp_path / f"{n}{kind}", found))
        for n, found in enumerate((alone, beside))
    )
    assert seen(other) == seen(one) == {"ants": 4, "bees": 4}
    assert other.names == one.names
    assert {part: rows.tolist() for part, rows in other.parts.items()} == {p: r.tolist() for p, r in one.parts.items()}


# --- Parquet ----------------------------------------------------------------------------------------------------------


def parquet(path: Path, rows: int = 40, *, names: bool = True, structs: bool = True) -> Path:
    """As the datasets library writes pictures."""
    data = [png(COLOURS["ants" if n % 2 else "bees"]) for n in range(rows)]
    images = pa.array([{"bytes": one, "path": None} for one in data] if structs else data)
    labels = pa.array([1 - n % 2 if names else own_class(n) for n in range(rows)])
    features = {"info": {"features": {"label": {"names": ["ants", "bees"], "_type": "ClassLabel"}}}}
    metadata = {"huggingface": json.dumps(features)} if names else None
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": images, "label": labels}).replace_schema_metadata(metadata), path)
    return path


@pytest.mark.parametrize("names", [True, False])
@pytest.mark.parametrize("structs", [True, False])
def test_pictures_in_a_parquet_file(tmp_path: Path, names: bool, structs: bool) -> None:
    found = find(parquet(tmp_path / "photos.parquet", names=names, structs=structs))
    assert seen(found) == {"ants": 20, "bees": 20}
    assert found.channels == 3


@pytest.mark.parametrize("below", ["", "data/"])
def test_splits_and_shards_of_parquet(tmp_path: Path, below: str) -> None:
    for name, rows in (("train-00000-of-00002", 12), ("train-00001-of-00002", 8), ("test-00000-of-00001", 6)):
        parquet(tmp_path / f"{below}{name}.parquet", rows)
    found = find(tmp_path)
    assert {part: len(rows) for part, rows in found.parts.items()} == {"train": 20, "test": 6}
    assert seen(found) == {"ants": 13, "bees": 13}


def test_a_damaged_picture_in_a_parquet_file_is_named_by_its_row(tmp_path: Path) -> None:
    images = [png(COLOURS[own_class(n)]) if n != 6 else b"broken" for n in range(20)]
    pq.write_table(pa.table({"image": images, "label": [own_class(n) for n in range(20)]}), tmp_path / "a.parquet")
    found = find(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet, row 7 is no JPEG"):
        found.pixels(np.arange(20), 2, 3)


def test_parquet_files_without_pictures_or_classes(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"], "label": ["b"]}), tmp_path / "text.parquet")
    with pytest.raises(DataError, match=r"0 columns with pictures.*'text', 'label'.*compare text"):
        find(tmp_path / "text.parquet")
    pq.write_table(pa.table({"image": [b"a"], "size": [1]}), tmp_path / "bare.parquet")
    with pytest.raises(DataError, match=r"no column with the classes.*Call that column 'label'"):
        find(tmp_path / "bare.parquet")
    (tmp_path / "cut.parquet").write_bytes(parquet(tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(DataError, match="is no Parquet file, or a damaged one"):
        find(tmp_path / "cut.parquet")


# --- a copy inside ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top", ["", "train/"])
@pytest.mark.parametrize("inner", ["cells/", "copy/", "backup/2023/", "copy/train/"])
@pytest.mark.parametrize("classes", [2, 1])
def test_a_copy_of_the_set_inside_the_set_is_refused(tmp_path: Path, top: str, inner: str, classes: int) -> None:
    files = {f"{top}{name}/{n}.png": png(colour) for name, colour in COLOURS.items() for n in range(4)}
    names = list(COLOURS)[:classes]
    copied = {f"{top}{inner}{name}/{n}.png": png(COLOURS[name]) for name in names for n in range(4)}
    if top:
        files |= {f"test/{name}/1.png": png(colour) for name, colour in COLOURS.items()}
    write(tmp_path, files | copied)
    folder = tmp_path / top / inner.split("/")[0]
    with pytest.raises(
        DataError, match=f"{folder} holds the folders? {', '.join(names)}, as .*a copy of the set"
    ) as told:
        find(tmp_path)
    assert "Remove it" in str(told.value)


def test_a_copy_whose_folders_are_spelled_otherwise_is_refused(tmp_path: Path) -> None:
    files = {f"{name}/{n}.png": png(colour) for name, colour in COLOURS.items() for n in range(4)}
    write(tmp_path, files | {f"copy/{name.title()}": data for name, data in files.items()})
    with pytest.raises(DataError, match=r"copy holds the folders ants, bees, as .*a copy of the set"):
        find(tmp_path)


def test_a_copy_in_the_folder_of_a_class_is_refused(tmp_path: Path) -> None:
    files = {f"{name}/{n}.png": png(colour) for name, colour in COLOURS.items() for n in range(4)}
    write(tmp_path, files | {f"ants/{name}": data for name, data in files.items()})
    with pytest.raises(DataError, match=r"ants holds the folders ants, bees, as .*a copy of the set"):
        find(tmp_path)


def test_folders_called_alike_are_no_copies(tmp_path: Path) -> None:
    confusion = {f"{a}/{b}/{n}.png": png(COLOURS[a]) for a in COLOURS for b in COLOURS for n in range(3)}
    assert seen(find(write(tmp_path / "confusion", confusion))) == {"ants": 6, "bees": 6}
    days = {f"{a}/{b}/{n}.png": png(COLOURS[a]) for a in COLOURS for b in ("day", "night") for n in range(3)}
    assert seen(find(write(tmp_path / "days", days))) == {"ants": 6, "bees": 6}
    mixed = {f"{a}/{n}.png": png(COLOURS[a]) for a in COLOURS for n in range(3)} | {
        "ants/bees/9.png": png(COLOURS["ants"])
    }
    assert seen(find(write(tmp_path / "mixed", mixed))) == {"ants": 4, "bees": 3}


# --- names in archives ------------------------------------------------------------------------------------------------

NAMES = {
    "narrow no-break space": "Screenshot 2024-05-01 at 9.41.00\u202fAM.png",
    "no-break space": "a\u00a0b.png",
    "ideographic space": "写真\u3000一.png",
    "joined emoji": "\U0001f468\u200d\U0001f469\u200d\U0001f467.png",
    "right-to-left mark": "\u05d0\u200f.png",
    "private use": "\ue000.png",
    "not yet assigned": "\U0001fbff\u0378.png",
    "backslash": "a\\b.png",
}


@pytest.mark.parametrize("case", NAMES)
@pytest.mark.parametrize("kind", [".zip", ".tar.gz"])
def test_archives_read_the_names_that_folders_read(tmp_path: Path, case: str, kind: str) -> None:
    files: dict[str, bytes | str] = {f"{name}/{n}.png": png(c) for name, c in COLOURS.items() for n in range(4)}
    files |= {f"{name}/{NAMES[case]}": png(c) for name, c in COLOURS.items()}
    folder, archive = find(write(tmp_path / "a", files)), find(packed(tmp_path / f"a{kind}", files))
    assert folder.names == archive.names
    assert {part: rows.tolist() for part, rows in folder.parts.items()} == {
        part: rows.tolist() for part, rows in archive.parts.items()
    }
    assert seen(folder) == seen(archive) == {"ants": 5, "bees": 5}


def test_a_zip_file_whose_folders_are_separated_by_backslashes(tmp_path: Path) -> None:
    files = {f"photos\\{name}\\{n}.png": png(c) for name, c in COLOURS.items() for n in range(5)}
    assert seen(find(packed(tmp_path / "a.zip", files))) == {"ants": 5, "bees": 5}


@pytest.mark.parametrize(
    "name",
    ["..\\ants\\1.png", "ants\\..\\..\\1.png", "\\\\host\\share\\1.png", "\\1.png", "ants/..\\1.png", "C:\\1.png"],
)
@pytest.mark.parametrize("kind", [".zip", ".tar.gz"])
def test_backslashes_lead_out_of_no_archive(tmp_path: Path, name: str, kind: str) -> None:
    files = {f"{own}/{n}.png": png(c) for own, c in COLOURS.items() for n in range(4)}
    with pytest.raises(DataError, match="is a path that leads out of the archive"):
        find(packed(tmp_path / f"a{kind}", {**files, name: png((1, 2, 3))}))


# --- hostile archives -------------------------------------------------------------------------------------------------


def long_name(length: int) -> bytes:
    """A tar archive with two pictures, one below as many folders as a name of that length has."""
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, length
    name = (b"a/" * (length // 2))[: length - 6] + b"x.png"
    data = header.tobuf(tarfile.GNU_FORMAT) + name.ljust(-(-length // 512) * 512, b"\0")
    other = tarfile.TarInfo("b/x.png").tobuf(tarfile.GNU_FORMAT)
    return data + tarfile.TarInfo("x").tobuf(tarfile.GNU_FORMAT) + other + bytes(1024)


def pax_name(length: int) -> bytes:
    return tar([member("x.png", b"", pax_headers={"path": "a/" * (length // 2) + "x.png"}), member("b/x.png", b"")])


def announced(kind: bytes, size: int) -> bytes:
    """An extended header that goes on for ``size`` bytes."""
    header = tarfile.TarInfo("x")
    header.type, header.size = kind, size
    return header.tobuf(tarfile.GNU_FORMAT) + bytes(size) + bytes(1024)


def global_entries(headers: int, each: int) -> bytes:
    """A tar archive with entries that hold for all members, which a reader keeps."""
    data = b""
    for header in range(headers):
        entries = b"".join(b"14 k%07d=x\n" % (header * each + entry) for entry in range(each))
        info = tarfile.TarInfo("x")
        info.type, info.size = tarfile.XGLTYPE, len(entries)
        data += info.tobuf(tarfile.GNU_FORMAT) + entries.ljust(-(-len(entries) // 512) * 512, b"\0")
        data += tarfile.TarInfo(f"a/{header}.txt").tobuf(tarfile.GNU_FORMAT)
    return data + bytes(1024)


def sparse(entries: int) -> bytes:
    """A sparse file of the latest form, with a map of that many entries."""
    content = f"{entries}\n".encode() + b"0\n" * (2 * entries)
    headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "a.png", "GNU.sparse.realsize": "9"}
    return tar([member("a.png", content.ljust(-(-len(content) // 512) * 512, b"\0"), pax_headers=headers)])


HOSTILE = {
    "a long name of GNU's kind": lambda: gzip.compress(long_name(40_000)),
    "a long name of POSIX's kind": lambda: gzip.compress(pax_name(40_000)),
    "a deep name": lambda: gzip.compress(pax_name(4_000)),
    "an endless name": lambda: gzip.compress(announced(tarfile.GNUTYPE_LONGNAME, 16 << 20), 1),
    "an endless link name": lambda: gzip.compress(announced(tarfile.GNUTYPE_LONGLINK, 16 << 20), 1),
    "an endless extended header": lambda: gzip.compress(announced(tarfile.XHDTYPE, 16 << 20), 1),
    "an endless global header": lambda: gzip.compress(announced(tarfile.XGLTYPE, 16 << 20), 1),
    "many global headers": lambda: gzip.compress(global_entries(100, 250), 1),
    "a long global header": lambda: gzip.compress(global_entries(20, 15_000), 1),
    "a map of a sparse file": lambda: gzip.compress(sparse(200_000), 1),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_small_archives_take_little_memory(tmp_path: Path, case: str) -> None:
    path = tmp_path / "a.tar.gz"
    path.write_bytes(HOSTILE[case]())
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"a\.tar\.gz"):
            find(path)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_a_zip_file_with_a_deep_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="lies below 2,000 folders and has a name of 4,005 characters"):
        find(packed(tmp_path / "a.zip", {"a/" * 2000 + "x.png": b""}))


def test_more_members_than_can_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {f"{own}/{n}.png": png(c) for own, c in COLOURS.items() for n in range(4)}
    monkeypatch.setattr("better_attention.lab.data.archives._MEMBERS", 7)
    for kind in (".zip", ".tar.gz"):
        with pytest.raises(DataError, match=rf"a{kind} holds more than 7 members.*Unpack it, and name the folder"):
            find(packed(tmp_path / f"a{kind}", files))
    monkeypatch.setattr("better_attention.lab.data.archives._NAMES_LIMIT", 100)
    with pytest.raises(DataError, match=r"b.zip has a directory of [0-9,]+ bytes: more than 7 members"):
        find(packed(tmp_path / "b.zip", files))


def test_members_that_share_their_bytes(tmp_path: Path) -> None:
    """Each entry of the directory leads to the same compressed bytes."""
    packed(tmp_path / "a.zip", {"ants/0.png": bytes(2000)})
    whole = bytearray((tmp_path / "a.zip").read_bytes())
    end = whole.rindex(b"PK\x05\x06")
    size, start = struct.unpack_from("<LL", whole, end + 12)
    entry = bytes(whole[start : start + size])
    again = b"".join(entry.replace(b"ants/0.png", b"ants/%d.png" % n) for n in range(10))
    struct.pack_into("<HHLL", whole, end + 8, 10, 10, len(again), start)
    (tmp_path / "b.zip").write_bytes(whole[:start] + again + whole[end:])
    with pytest.raises(DataError, match=r"b.zip: its members overlap|b.zip is no zip archive.*[Oo]verlapped"):
        find(tmp_path / "b.zip")


def test_a_listing_decompresses_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {f"{own}/{n}.png": png(c) for own, c in COLOURS.items() for n in range(4)}
    path = packed(tmp_path / "a.zip", files)
    monkeypatch.setattr(zipfile.ZipExtFile, "read", lambda *_: pytest.fail("a picture was read"))
    assert len(find(path).names) == 8


def test_a_parquet_file_that_expands_is_refused(tmp_path: Path) -> None:
    one = bytes(1 << 20)
    pq.write_table(
        pa.table({"image": [one] * 8, "label": ["a", "b"] * 4}), tmp_path / "plain.parquet", compression="zstd",
        use_dictionary=False,
    )  # fmt: skip
    with pytest.raises(DataError, match="expands to more than 100 times its size"):
        find(tmp_path / "plain.parquet")
    noise = np.random.default_rng(0).bytes(1 << 16)
    pq.write_table(pa.table({"image": [noise] * 200, "label": ["a", "b"] * 100}), tmp_path / "dictionary.parquet")
    assert (tmp_path / "dictionary.parquet").stat().st_size < 1 << 17
    with pytest.raises(DataError, match="expands to more than 100 times its size"):
        find(tmp_path / "dictionary.parquet").pixels(np.arange(200), 2, 3)


# --- what is opened ---------------------------------------------------------------------------------------------------


def test_no_picture_starts_another_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    for call in (lambda: decode.read_picture("a.png", eps, 8, 1), lambda: decode.sides("a.png", eps)):
        with pytest.raises(DataError, match="is no JPEG, PNG, WebP, BMP or GIF"):
            call()


def test_large_pictures_are_decoded_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thread would need gigabytes of its own."""
    assert not decode._one_large.locked()
    held: list[bool] = []
    fit = decode.fit
    monkeypatch.setattr(decode, "fit", lambda *args: (held.append(decode._one_large.locked()), fit(*args))[1])
    monkeypatch.setattr(decode, "_LARGE", 100)
    for size in (10, 11):
        decode.read_picture("a", png((1, 2, 3), size), 4, 3)
    assert held == [False, True]
    assert not decode._one_large.locked()


def test_a_16_bit_picture_with_a_transparent_value() -> None:
    values = np.array([[0, 65535], [30000, 0]], dtype=">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))

    head = struct.pack(">LLBBBBB", 2, 2, 16, 0, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"tRNS", b"\0\0") + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert decode.read_picture("a", b"\x89PNG\r\n\x1a\n" + body, 2, 1).tolist() == [[255, 255], [117, 255]]
