"""Small data sets in the official layouts, made by hand: nothing here uses the code under test."""

from __future__ import annotations

import gzip
import io
import lzma
import struct
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

IMDB: Mapping[str, str] = {
    "aclImdb/train/pos/0_9.txt": "A fine film.<br /><br />Don't miss it!",
    "aclImdb/train/pos/10_7.txt": "Good, if long",
    "aclImdb/train/pos/2_10.txt": "Superb. Ça c'est du cinéma",
    "aclImdb/train/neg/0_1.txt": "Dreadful",
    "aclImdb/train/neg/1_3.txt": "I fell asleep",
    "aclImdb/test/pos/0_8.txt": "Good, if long",
    "aclImdb/test/neg/3_2.txt": "No. No! NO",
    "aclImdb/test/neg/21_4.txt": "Dreadful",
}
"""Two of the texts occur in both splits; index 10 sorts after 2, as numbers do and names do not."""

UNREAD: Mapping[str, str] = {
    "aclImdb/README": "not a review",
    "aclImdb/imdb.vocab": "the\nand",
    "aclImdb/train/unsup/0_0.txt": "nobody knows whether this is good",
    "aclImdb/train/labeledBow.feat": "9 0:9 1:1",
    "aclImdb/train/pos/README.txt": "no review either",
    "aclImdb/train/pos/٣_9.txt": "an index in other digits",
    "other/train/pos/0_9.txt": "another data set",
}


def idx(array: np.ndarray) -> bytes:
    """``array`` of unsigned bytes in the idx format."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def mnist_arrays(train: int = 13, test: int = 7, height: int = 5, width: int = 3) -> dict[str, np.ndarray]:
    """Made-up digits by official file name (without .gz), every label from 0 on."""
    random = np.random.default_rng(0)
    return {
        "train-images-idx3-ubyte": random.integers(0, 256, (train, height, width), dtype=np.uint8),
        "train-labels-idx1-ubyte": (np.arange(train) % 10).astype(np.uint8),
        "t10k-images-idx3-ubyte": random.integers(0, 256, (test, height, width), dtype=np.uint8),
        "t10k-labels-idx1-ubyte": (np.arange(test) % 10).astype(np.uint8),
    }


def write_mnist(folder: Path, arrays: Mapping[str, np.ndarray] | None = None, *, compress: bool = True) -> Path:
    """The four files in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in (arrays or mnist_arrays()).items():
        if compress:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (folder / name).write_bytes(idx(array))
    return folder


def member(name: str, content: str | bytes = b"", **header: object) -> tuple[tarfile.TarInfo, bytes]:
    """One tar member, with whatever else its header shall say."""
    data = content.encode() if isinstance(content, str) else content
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in header.items():
        setattr(info, key, value)
    return info, data


def tar(members: Iterable[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    """An uncompressed tar archive."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def compress(data: bytes, suffix: str) -> bytes:
    """``data`` as a ``.gz`` or ``.xz`` file."""
    return gzip.compress(data) if suffix.endswith("gz") else lzma.compress(data)


def write_imdb(path: Path, reviews: Mapping[str, str | bytes] = IMDB, *, prefix: str = "") -> Path:
    """An archive of ``reviews`` at ``path``, whose suffix chooses the compression."""
    path.parent.mkdir(parents=True, exist_ok=True)
    archive = tar(member(prefix + name, text) for name, text in reviews.items())
    path.write_bytes(compress(archive, path.suffix))
    return path


def write_imdb_folder(parent: Path, reviews: Mapping[str, str | bytes] = IMDB) -> Path:
    """The unpacked ``aclImdb`` folder below ``parent``."""
    for name, text in reviews.items():
        file = parent / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text.encode() if isinstance(text, str) else text)
    return parent / "aclImdb"
