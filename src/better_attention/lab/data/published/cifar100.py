"""CIFAR-100 in its binary version: 60,000 colour photographs of 32×32 pixels, 100 classes.

Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", technical report, University of
Toronto, 2009. ``cifar-100-binary/{train,test}.bin`` are records of 3,074 bytes: the coarse label (of 20), the fine
label (of 100, the one that is learned), then 1,024 red, 1,024 green and 1,024 blue pixels, row by row; the files
``{coarse,fine}_label_names.txt`` beside them hold a name a line. The Python version of the archive is a pickle, which
runs whatever code its maker put there, and is never read.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from better_attention.lab.data.archives import AGAIN, MIB, tar_members
from better_attention.lab.data.download import Remote
from better_attention.lab.data.samples import DataError, Images, Int64, NotFetched, UInt8, departures
from better_attention.lab.data.source import Source

# Address, size and SHA-256: github.com/tensorflow/datasets, tensorflow_datasets/url_checksums/cifar100.txt
# at commit 333639b37af6c6fedf3610a4a2d42f1c6ef6f7d5.
REMOTES = (
    Remote(
        url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        name="cifar-100-binary.tar.gz",
        size=168_513_733,
        sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
    ),
)
OFFICIAL = (50_000, 10_000)
# SHA-256 of the members: github.com/ankane/torchvision-ruby, lib/torchvision/datasets/cifar100.rb.
DIGESTS = {
    "train.bin": "f31298fc616915fa142368359df1c4ca2ae984d6915ca468b998a5ec6aeebf29",
    "test.bin": "d8b1e6b7b3bee4020055f0699b111f60b1af1e262aeb93a0b659061746f8224a",
}
LAYOUT = "cifar-100-binary.tar.gz (or .tar.xz), or the unpacked folder cifar-100-binary/"

SIDE = 32
FINE, COARSE = 100, 20
RECORD = 2 + 3 * SIDE * SIDE

_FOLDER = "cifar-100-binary"
_FILES = ("train.bin", "test.bin", "fine_label_names.txt")
_MEMBER = re.compile(rf"{_FOLDER}/({'|'.join(map(re.escape, _FILES))})")
_MEMBER_LIMIT = 256 * MIB  # bytes; train.bin has 146.6 MiB
_TOTAL_LIMIT = 512 * MIB  # the official archive holds 176 MiB


def locate(place: Path) -> tuple[Path, ...] | None:
    """The archive or unpacked folder at or in ``place``, or None. An archive comes first.

    Raises:
        NotFetched: some of the three files are there, but not all.
        DataError: only the Python version is there.
    """
    if place.is_file():
        return (place,)
    for suffix in (".gz", ".xz"):
        archive = place / f"{_FOLDER}.tar{suffix}"
        if archive.is_file():
            return (archive,)
    for folder in (place / _FOLDER, place):
        missing = [name for name in _FILES if not (folder / name).is_file()]
        if not missing:
            return (folder,)
        if len(missing) < len(_FILES):
            raise NotFetched(f"{folder} lacks {', '.join(missing)}: CIFAR-100 needs all of {', '.join(_FILES)}.")
    if any((place / f"cifar-100-python{suffix}").exists() for suffix in ("", ".tar.gz")):
        raise DataError(
            f"{place} holds the Python version of CIFAR-100: pickles, which can run any code and are not read. "
            f"Get the binary version, {REMOTES[0].name}."
        )
    return None


def read(files: Sequence[Path], sizes: tuple[int, int] = OFFICIAL, published: Mapping[str, str] = DIGESTS) -> Images:
    """CIFAR-100 from its archive or its unpacked folder.

    Args:
        files: the archive or the folder, as :func:`locate` gives it.
        sizes, published: images to train and to test with, and the SHA-256 of each file, of the set that this is
            expected to be; what differs is noted.

    Returns:
        uint8 images ``(N, 32, 32, 3)``, RGB, with the fine label of each; 50,000 and 10,000 in the official files.

    Raises:
        DataError: a damaged or unsafe archive, a missing file, a record cut short, a label out of range.
    """
    (place,) = files
    contents = dict(_contents(place))
    missing = [name for name in _FILES if name not in contents]
    if missing:
        raise DataError(f"{place} has no {', '.join(f'{_FOLDER}/{name}' for name in missing)}: expected {LAYOUT}.")
    digests = {name: (hashlib.sha256(contents[name]).hexdigest(), theirs) for name, theirs in published.items()}
    # pop() lets the 150 MB of raw records go as soon as their pixels are copied.
    train_images, train_labels = _records(place, "train.bin", contents.pop("train.bin"))
    test_images, test_labels = _records(place, "test.bin", contents.pop("test.bin"))
    unlike = departures("CIFAR-100", (len(train_labels), len(test_labels)), sizes, digests)
    return Images(
        name="cifar100",
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        classes=_names(place, contents["fine_label_names.txt"]),
        notes=unlike,
        departures=unlike,
    )


def members(folder: Path) -> Iterator[tuple[str, Path]]:
    """The files of an unpacked folder that are read, as ``(name in the archive, file)``, sorted by name.

    Raises:
        DataError: a file is a link or no regular file.
    """
    for name in sorted(_FILES):
        file = folder / name
        # Packed into an archive, a link would point at something else on another machine.
        if file.is_symlink() or not file.is_file():
            raise DataError(f"{file} is a link or no regular file. Put the file itself there.")
        yield f"{_FOLDER}/{name}", file


def _contents(place: Path) -> Iterator[tuple[str, bytes]]:
    if not place.is_dir():
        for match, data in tar_members(place, _MEMBER, member_limit=_MEMBER_LIMIT, total_limit=_TOTAL_LIMIT):
            yield match[1], data
        return
    for name in _FILES:
        file = place / name
        if file.stat().st_size > _MEMBER_LIMIT:
            raise DataError(
                f"{file} has {file.stat().st_size:,} bytes; at most {_MEMBER_LIMIT:,} are expected. {AGAIN}"
            )
        yield name, file.read_bytes()


def _records(place: Path, name: str, data: bytes) -> tuple[UInt8, Int64]:
    """Images and fine labels of the records of one file."""
    if not data or len(data) % RECORD:
        raise DataError(
            f"{place}: {name} has {len(data):,} bytes, which is no whole number of records of {RECORD:,} bytes: it is "
            f"cut short, or not CIFAR-100. {AGAIN}"
        )
    records = np.frombuffer(data, dtype=np.uint8).reshape(-1, RECORD)
    # The coarse label is not used, but a wrong one shows that the record is damaged.
    for column, kind, classes in ((0, "coarse", COARSE), (1, "fine", FINE)):
        wrong = np.flatnonzero(records[:, column] >= classes)
        if len(wrong):
            raise DataError(
                f"{place}: {name}, record {wrong[0]}: {kind} label {records[wrong[0], column]}; they run from 0 "
                f"to {classes - 1}. {AGAIN}"
            )
    # The file has one plane per colour; pictures have their channels last here.
    planes = records[:, 2:].reshape(-1, 3, SIDE, SIDE)
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), records[:, 1].astype(np.int64)


def _names(place: Path, data: bytes) -> tuple[str, ...]:
    """The names of the fine labels, a line each."""
    try:
        names = tuple(data.decode("ascii").split())
    except UnicodeDecodeError:
        names = ()
    if len(set(names)) != FINE:
        raise DataError(
            f"{place}: fine_label_names.txt holds {len(set(names))} different names, expected {FINE}, one a line. "
            f"{AGAIN}"
        )
    return names


SOURCE = Source(
    name="cifar100",
    title="60,000 photographs of 100 kinds of things, 32×32",
    terms="Krizhevsky 2009; no licence stated, with citation",
    layout=LAYOUT,
    load=read,
    locate=locate,
    remotes=REMOTES,
    members=members,
)
