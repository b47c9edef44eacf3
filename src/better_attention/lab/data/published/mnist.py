"""MNIST in its official layout: four idx files, compressed with gzip or not.

Source: Y. LeCun, C. Cortes, C. J. C. Burges, "The MNIST database of handwritten digits"; CC BY-SA 3.0.
The idx format: two zero bytes, the type (8: unsigned byte), the number of dimensions, each dimension as
a big-endian 32-bit number, then the values, last dimension fastest.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from better_attention.lab.data.archives import AGAIN, MIB, decompressed
from better_attention.lab.data.download import Remote
from better_attention.lab.data.samples import DataError, Images, Int64, NotFetched, UInt8, departures
from better_attention.lab.data.source import Source

_ADDRESS = "https://storage.googleapis.com/cvdf-datasets/mnist/"
# Addresses, sizes and SHA-256: github.com/tensorflow/datasets, tensorflow_datasets/url_checksums/mnist.txt
# at commit 31f1255e57e519a6c004f0b097a2f5cfcf0dde7d.
REMOTES = tuple(
    Remote(url=_ADDRESS + name, name=name, size=size, sha256=sha256)
    for name, size, sha256 in (
        (
            "train-images-idx3-ubyte.gz",
            9_912_422,
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        ),
        (
            "train-labels-idx1-ubyte.gz",
            28_881,
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        ),
        (
            "t10k-images-idx3-ubyte.gz",
            1_648_877,
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        ),
        (
            "t10k-labels-idx1-ubyte.gz",
            4_542,
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        ),
    )
)
OFFICIAL = (60_000, 10_000)
# SHA-256 of the same files, decompressed: they do not depend on the program that compressed them. As the files at the
# address above have them, and the copies in many public repositories.
DIGESTS = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
LAYOUT = "the four files {train,t10k}-{images-idx3,labels-idx1}-ubyte, with or without .gz"

_LIMIT = 256 * MIB  # of one file, decompressed; the largest official one has 45 MiB
_DEFLATE = 1032  # the most that deflate can expand: 258 bytes from two bits


def locate(place: Path) -> tuple[Path, ...] | None:
    """The four files below ``place`` (or beside it, if it is one of them), or None if none is there.

    Raises:
        NotFetched: some of the four are there, but not all.
    """
    names = [remote.name.removesuffix(".gz") for remote in REMOTES]
    if place.is_file() and place.name.removesuffix(".gz") in names:
        place = place.parent
    candidates = [next((f for f in (place / f"{name}.gz", place / name) if f.is_file()), None) for name in names]
    files = tuple(file for file in candidates if file is not None)
    if not files:
        return None
    if len(files) < len(names):
        missing = [name for name, file in zip(names, candidates, strict=True) if file is None]
        raise NotFetched(f"{place} lacks {', '.join(missing)} (each with or without .gz): MNIST needs all four files.")
    return files


def read(files: Sequence[Path], sizes: tuple[int, int] = OFFICIAL, published: Mapping[str, str] = DIGESTS) -> Images:
    """MNIST from its four files.

    Args:
        files: in the order in which :func:`locate` gives them.
        sizes, published: images to train and to test with, and the SHA-256 of each decompressed file, of the set that
            this is expected to be; what differs is noted.

    Returns:
        uint8 images ``(N, H, W)``, grey values 0 to 255; 60,000 and 10,000 of 28×28 in the official files.

    Raises:
        DataError: a file is damaged, is no idx file, or does not fit the others.
    """
    train_images, train_labels = _split(files[0], files[1])
    test_images, test_labels = _split(files[2], files[3])
    arrays = (train_images, train_labels.astype(np.uint8), test_images, test_labels.astype(np.uint8))
    digests = {name: (_digest(array), theirs) for (name, theirs), array in zip(published.items(), arrays, strict=True)}
    unlike = departures("MNIST", (len(train_labels), len(test_labels)), sizes, digests)
    return Images(
        name="mnist",
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        classes=tuple(str(digit) for digit in range(10)),
        notes=unlike,
        departures=unlike,
    )


def read_idx(path: Path, dimensions: int) -> UInt8:
    """One idx file of unsigned bytes.

    Args:
        path: the file, gzip-compressed or not.
        dimensions: how many the array must have.

    Returns:
        A writable uint8 array.

    Raises:
        DataError: damaged, of another type, or of another size than its header says.
    """
    with decompressed(path, limit=_LIMIT, plain=True) as stream:
        header = stream.read(4 + 4 * dimensions)
        if header[:4] != bytes((0, 0, 8, dimensions)):
            raise DataError(
                f"{path} is not an idx file of unsigned bytes with {dimensions} dimension(s): it starts with "
                f"{header[:4]!r}, expected {bytes((0, 0, 8, dimensions))!r}. {AGAIN}"
            )
        if len(header) < 4 + 4 * dimensions:
            raise DataError(f"{path} is cut short within its header. {AGAIN}")
        shape = struct.unpack(f">{dimensions}I", header[4:])
        count = math.prod(shape)
        # The header is checked against what the file can hold before a byte is allocated for it.
        size = path.stat().st_size
        possible = size - len(header) if stream.compressed is None else min(_LIMIT, _DEFLATE * size)
        if count > possible:
            raise DataError(
                f"{path}: the header promises {count:,} bytes (shape {shape}), more than a file of {size:,} bytes can "
                f"hold. {AGAIN}"
            )
        values = bytearray()
        # One byte more than promised, so that a longer file is noticed without reading it to its end.
        while data := stream.read(count + 1 - len(values)):
            values += data
            if len(values) > count:
                break
    if len(values) != count:
        held = "more" if len(values) > count else f"only {len(values):,}"
        raise DataError(f"{path}: the header promises {count:,} bytes (shape {shape}), the file holds {held}. {AGAIN}")
    return np.frombuffer(values, dtype=np.uint8).reshape(shape)


def _digest(array: UInt8) -> str:
    """SHA-256 of the idx file that holds ``array``, decompressed: :func:`read_idx` lets no other byte pass."""
    digest = hashlib.sha256(struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape))
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _split(image_file: Path, label_file: Path) -> tuple[UInt8, Int64]:
    images, labels = read_idx(image_file, 3), read_idx(label_file, 1)
    if images.size == 0:
        raise DataError(f"{image_file} holds no pixels (shape {images.shape}). {AGAIN}")
    if len(images) != len(labels):
        raise DataError(
            f"{image_file} holds {len(images):,} images but {label_file.name} {len(labels):,} labels: the files do not "
            "belong together. Take all four from one place."
        )
    if labels.max() > 9:
        where = int(np.argmax(labels > 9))
        raise DataError(f"{label_file}: label {where} is {labels[where]}; digits run from 0 to 9. {AGAIN}")
    if labels.min() == labels.max():
        raise DataError(f"{label_file}: every label is {labels[0]}; there is nothing to learn. {AGAIN}")
    return images, labels.astype(np.int64)


SOURCE = Source(
    name="mnist",
    title="70,000 handwritten digits, 28×28",
    terms="LeCun, Cortes, Burges; CC BY-SA 3.0",
    layout=LAYOUT,
    load=read,
    locate=locate,
    remotes=REMOTES,
)
