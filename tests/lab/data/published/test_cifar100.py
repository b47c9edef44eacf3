"""CIFAR-100's binary layout: read back as written, and every way in which it can be wrong."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from better_attention.lab.data import store
from better_attention.lab.data.catalogue import read
from better_attention.lab.data.published import SOURCES, cifar100
from better_attention.lab.data.samples import DataError, Images, NotFetched
from helpers.layouts import compress, member, tar

NAMES = "\n".join(f"thing_{number}" for number in range(100))


def records(count: int, first: int = 0) -> np.ndarray:
    """``count`` records, byte by byte as the publisher describes them: fine label n, coarse label n mod 20."""
    random = np.random.default_rng(first)
    rows = random.integers(0, 256, (count, 3074), dtype=np.uint8)
    rows[:, 1] = (first + np.arange(count)) % 100
    rows[:, 0] = rows[:, 1] % 20
    return rows


def contents(**changes: bytes | None) -> dict[str, bytes]:
    """The files of the archive; those changed to None are left out."""
    files: dict[str, bytes | None] = {
        "train.bin": records(13).tobytes(),
        "test.bin": records(7, first=95).tobytes(),
        "fine_label_names.txt": NAMES.encode() + b"\n\n",
        "coarse_label_names.txt": b"animal\nplant\n",
    }
    files |= {name.replace("_bin", ".bin").replace("_txt", ".txt"): data for name, data in changes.items()}
    return {name: data for name, data in files.items() if data is not None}


def write_archive(path: Path, **changes: bytes | None) -> Path:
    members = [member(f"cifar-100-binary/{name}", data) for name, data in contents(**changes).items()]
    path.write_bytes(compress(tar([*members, member("elsewhere/train.bin", b"not this one")]), path.suffix))
    return path


def write_folder(parent: Path, **changes: bytes | None) -> Path:
    folder = parent / "cifar-100-binary"
    folder.mkdir(parents=True)
    for name, data in contents(**changes).items():
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("kind", [".gz", ".xz", "folder"])
def test_what_was_written_is_read(tmp_path: Path, kind: str) -> None:
    if kind == "folder":
        write_folder(tmp_path)
    else:
        write_archive(tmp_path / f"cifar-100-binary.tar{kind}")
    data = read("cifar100", tmp_path)
    assert isinstance(data, Images)
    rows = records(13)
    assert data.train_images.shape == (13, 32, 32, 3)
    assert data.test_images.shape == (7, 32, 32, 3)
    for image, row in ((0, 0), (12, 12)):  # red plane, then green, then blue, each row by row
        for y, x, channel in ((0, 0, 0), (0, 31, 1), (5, 7, 2), (31, 0, 0)):
            assert data.train_images[image, y, x, channel] == rows[row, 2 + 1024 * channel + 32 * y + x]
    assert data.train_labels.tolist() == list(range(13))
    assert data.test_labels.tolist() == [95, 96, 97, 98, 99, 0, 1]
    assert data.classes == tuple(f"thing_{number}" for number in range(100))
    assert data.notes == ("13 training and 7 test samples, where the official set has 50,000 and 10,000",)
    assert data.train_images.flags.c_contiguous


def test_where_it_is_looked_for(tmp_path: Path) -> None:
    assert cifar100.locate(tmp_path) is None
    folder = write_folder(tmp_path)
    assert cifar100.locate(tmp_path) == cifar100.locate(folder) == (folder,)
    xz = write_archive(tmp_path / "cifar-100-binary.tar.xz")
    assert cifar100.locate(tmp_path) == (xz,)
    gz = write_archive(tmp_path / "cifar-100-binary.tar.gz")
    assert cifar100.locate(tmp_path) == (gz,)
    assert cifar100.locate(xz) == (xz,)


def test_some_of_the_files(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, test_bin=None, fine_label_names_txt=None)
    with pytest.raises(NotFetched, match=r"cifar-100-binary lacks test.bin, fine_label_names.txt: CIFAR-100 needs all"):
        cifar100.locate(folder)


@pytest.mark.parametrize("name", ["cifar-100-python", "cifar-100-python.tar.gz"])
def test_the_pickled_version_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(DataError, match=r"Python version of CIFAR-100: pickles.* Get the binary version"):
        cifar100.locate(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_bin": records(3).tobytes()[:-1]}, r"train.bin has 9,221 bytes, which is no whole number of records"),
        ({"test_bin": b""}, "test.bin has 0 bytes"),
        ({"train_bin": None}, "has no cifar-100-binary/train.bin: expected"),
        ({"fine_label_names_txt": NAMES.replace("thing_7\n", "").encode()}, "holds 99 different names, expected 100"),
        ({"fine_label_names_txt": b"caf\xe9"}, "holds 0 different names"),
        ({"train_bin": b"\x03\x07" + bytes(3072)}, "every training sample has the one label 'thing_7'"),
    ],
)
def test_damage_is_named(tmp_path: Path, changes: dict[str, bytes | None], message: str) -> None:
    with pytest.raises(DataError, match=message):
        cifar100.read((write_archive(tmp_path / "mine.tar.gz", **changes),))


@pytest.mark.parametrize(("column", "kind", "value"), [(0, "coarse", 20), (1, "fine", 100)])
def test_a_label_out_of_range_is_named_with_its_record(tmp_path: Path, column: int, kind: str, value: int) -> None:
    rows = records(9)
    rows[4, column] = value
    folder = write_folder(tmp_path, test_bin=rows.tobytes())
    with pytest.raises(DataError, match=rf"test.bin, record 4: {kind} label {value}; they run from 0 to {value - 1}"):
        cifar100.read((folder,))


def test_an_archive_cut_short_or_unsafe(tmp_path: Path) -> None:
    whole = write_archive(tmp_path / "whole.tar.gz").read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut.tar.gz is cut short"):
        cifar100.read((tmp_path / "cut.tar.gz",))
    (tmp_path / "bad.tar.gz").write_bytes(compress(tar([member("cifar-100-binary/../../train.bin", b"x")]), ".gz"))
    with pytest.raises(DataError, match="leads out of the archive"):
        cifar100.read((tmp_path / "bad.tar.gz",))


def test_an_unpacked_folder_is_imported_as_the_archive(cache: Path, tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    store.import_from(SOURCES["cifar100"], folder)
    assert (cache / "cifar100" / "cifar-100-binary.tar.gz").is_file()
    again, data = read("cifar100"), read("cifar100", tmp_path)
    assert again.fingerprint() == data.fingerprint()
    (folder / "test.bin").unlink()
    (folder / "test.bin").symlink_to(folder / "train.bin")
    with pytest.raises(DataError, match="is a link or no regular file"):
        list(cifar100.members(folder))


def test_the_official_sizes_fit_the_records() -> None:
    """176 MiB are 60,000 records of 3,074 bytes: 184,440,000 bytes; the compressed archive is smaller."""
    assert cifar100.RECORD * sum(cifar100.OFFICIAL) == 184_440_000
    assert cifar100.REMOTES[0].size < 184_440_000


@pytest.mark.parametrize("changed", ["", "train.bin", "test.bin"])
@pytest.mark.parametrize("kind", [".gz", "folder"])
def test_other_data_under_the_same_names_is_told(tmp_path: Path, changed: str, kind: str) -> None:
    files = contents()
    official = {name: hashlib.sha256(files[name]).hexdigest() for name in ("train.bin", "test.bin")}
    changes = {changed.replace(".", "_"): records(len(files[changed]) // 3074, 3).tobytes()} if changed else {}
    if kind == "folder":
        write_folder(tmp_path, **changes)
    else:
        write_archive(tmp_path / f"cifar-100-binary.tar{kind}", **changes)
    files = cifar100.locate(tmp_path)
    assert files is not None
    data = cifar100.read(files, (13, 7), official)
    assert data.departures == data.notes
    assert [note.split(" has SHA-256")[0] for note in data.notes] == ([f"not CIFAR-100: {changed}"] if changed else [])
