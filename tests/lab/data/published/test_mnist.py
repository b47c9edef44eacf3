"""MNIST's layout: read back as written, and every way in which it can be wrong."""

from __future__ import annotations

import gzip
import hashlib
import re
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from better_attention.lab.data.published import mnist
from better_attention.lab.data.samples import DataError, Images, NotFetched
from helpers.layouts import idx, mnist_arrays, write_mnist

NAMES = tuple(mnist_arrays())


def read(folder: Path, *published: Any) -> Images:
    files = mnist.locate(folder)
    assert files is not None
    return mnist.read(files, *published)


@pytest.mark.parametrize("compress", [True, False])
def test_what_was_written_is_read(tmp_path: Path, compress: bool) -> None:
    data = read(write_mnist(tmp_path, compress=compress))
    arrays = mnist_arrays()
    np.testing.assert_array_equal(data.train_images, arrays["train-images-idx3-ubyte"])
    np.testing.assert_array_equal(data.train_labels, arrays["train-labels-idx1-ubyte"])
    np.testing.assert_array_equal(data.test_images, arrays["t10k-images-idx3-ubyte"])
    np.testing.assert_array_equal(data.test_labels, arrays["t10k-labels-idx1-ubyte"])
    assert data.train_images.shape == (13, 5, 3)
    assert data.train_images.dtype == np.uint8
    assert data.train_labels.dtype == np.int64
    assert data.train_images.flags.writeable
    assert data.peak == 255
    assert data.notes == ("13 training and 7 test samples, where the official set has 60,000 and 10,000",)


def test_compressed_files_come_first_and_may_be_mixed_with_others(tmp_path: Path) -> None:
    write_mnist(tmp_path, compress=False)
    write_mnist(tmp_path, {NAMES[0]: mnist_arrays()[NAMES[0]]})
    files = mnist.locate(tmp_path)
    assert files is not None
    assert [file.name for file in files] == [f"{NAMES[0]}.gz", *NAMES[1:]]
    assert mnist.locate(tmp_path / NAMES[2]) == files  # one of the files names them all


def test_nothing_there_and_not_all_there(tmp_path: Path) -> None:
    assert mnist.locate(tmp_path) is None
    write_mnist(tmp_path)
    (tmp_path / f"{NAMES[1]}.gz").unlink()
    (tmp_path / f"{NAMES[3]}.gz").unlink()
    with pytest.raises(NotFetched, match=r"lacks train-labels-idx1-ubyte, t10k-labels-idx1-ubyte .* needs all four"):
        mnist.locate(tmp_path)


def test_images_and_labels_that_do_not_belong_together(tmp_path: Path) -> None:
    arrays = mnist_arrays() | {NAMES[1]: np.arange(12)}
    with pytest.raises(DataError, match=f"{NAMES[0]}.gz holds 13 images but {NAMES[1]}.gz 12 labels"):
        read(write_mnist(tmp_path, arrays))


def test_a_label_that_is_no_digit(tmp_path: Path) -> None:
    labels = np.arange(7)
    labels[4] = 10
    with pytest.raises(DataError, match=f"{NAMES[3]}.gz: label 4 is 10"):
        read(write_mnist(tmp_path, mnist_arrays() | {NAMES[3]: labels}))


def test_one_class_only(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{NAMES[1]}.gz: every label is 6"):
        read(write_mnist(tmp_path, mnist_arrays() | {NAMES[1]: np.full(13, 6)}))


def test_no_images_and_images_without_pixels(tmp_path: Path) -> None:
    for shape in ((0, 5, 3), (13, 0, 3)):
        with pytest.raises(DataError, match=rf"{NAMES[0]}.gz holds no pixels \(shape {re.escape(str(shape))}\)"):
            read(write_mnist(tmp_path, mnist_arrays() | {NAMES[0]: np.zeros(shape)}))


def test_splits_of_two_sizes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"\(5, 3\) and test images \(3, 5\)"):
        read(write_mnist(tmp_path, mnist_arrays() | {NAMES[2]: np.zeros((7, 3, 5))}))


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("shape", [(2**31, 2**11, 2**11), (2**32 - 1,) * 3, (2**20, 16, 1)])
def test_a_header_that_promises_too_much_costs_no_memory(
    tmp_path: Path, compress: bool, shape: tuple[int, int, int]
) -> None:
    """The first is 8 PiB. Nothing may be allocated on a header's word alone."""
    data = struct.pack(">BBBB3I", 0, 0, 8, 3, *shape) + bytes(13 * 5 * 3)
    path = tmp_path / "file"
    path.write_bytes(gzip.compress(data) if compress else data)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=rf"promises {np.prod(shape, dtype=object):,} bytes .* more than a file of"):
            mnist.read_idx(path, 3)
        assert tracemalloc.get_traced_memory()[1] < 3 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("compress", [True, False])
def test_a_file_cut_anywhere_or_too_long(tmp_path: Path, compress: bool) -> None:
    array = mnist_arrays()[NAMES[0]]
    whole, path = idx(array), tmp_path / "cut"
    for length in [*range(24), len(whole) - 1, len(whole) + 1]:
        data = (whole + b"\0")[:length]
        path.write_bytes(gzip.compress(data) if compress else data)
        with pytest.raises(DataError, match="cut"):
            mnist.read_idx(path, 3)
    path.write_bytes(gzip.compress(whole) if compress else whole)
    np.testing.assert_array_equal(mnist.read_idx(path, 3), array)


@pytest.mark.parametrize(
    ("head", "dimensions"),
    [(b"\0\0\x08\x01", 3), (b"\0\0\x08\x03", 1), (b"\0\0\x0d\x03", 3), (b"\x89PNG", 3), (b"PK\x03\x04", 1)],
)
def test_another_kind_of_file(tmp_path: Path, head: bytes, dimensions: int) -> None:
    (tmp_path / "file").write_bytes(head + bytes(100))
    with pytest.raises(DataError, match=rf"is not an idx file of unsigned bytes with {dimensions} dimension\(s\)"):
        mnist.read_idx(tmp_path / "file", dimensions)


@settings(max_examples=100)
@given(edits=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 255)), min_size=1, max_size=4))
def test_edited_files_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, int]]
) -> None:
    data = bytearray(idx(np.zeros((2, 4, 3))))
    for at, value in edits:
        data[at % len(data)] = value
    path = tmp_path_factory.getbasetemp() / "edited-idx"
    path.write_bytes(data)
    try:
        array = mnist.read_idx(path, 3)
    except DataError:
        return
    assert array.nbytes == 24


def test_the_table_of_official_files_is_complete() -> None:
    assert [remote.name for remote in mnist.REMOTES] == [f"{name}.gz" for name in NAMES]
    assert all(remote.url.endswith("/" + remote.name) for remote in mnist.REMOTES)


@pytest.mark.data
def test_the_real_thing(real_data: Path) -> None:
    """Sizes as published; mean and deviation as everybody normalises MNIST (0.1307, 0.3081)."""
    data = read(real_data / "mnist")
    assert data.train_images.shape == (60_000, 28, 28)
    assert data.test_images.shape == (10_000, 28, 28)
    assert data.notes == ()
    assert data.train_images.mean() / 255 == pytest.approx(0.1307, abs=5e-5)
    assert data.train_images.std() / 255 == pytest.approx(0.3081, abs=5e-5)
    assert set(data.train_labels) == set(data.test_labels) == set(range(10))


@pytest.mark.parametrize("changed", ["", *NAMES])
def test_other_data_under_the_same_names_is_told(tmp_path: Path, changed: str) -> None:
    """Fashion-MNIST has the names, sizes and labels of MNIST: the contents alone tell them apart."""
    arrays = mnist_arrays()
    official = {name: hashlib.sha256(idx(array)).hexdigest() for name, array in arrays.items()}
    if changed:
        arrays[changed] = arrays[changed][::-1].copy()
    data = read(write_mnist(tmp_path, arrays), (13, 7), official)
    assert data.departures == data.notes
    if changed:
        (note,) = data.notes
        own = hashlib.sha256(idx(arrays[changed])).hexdigest()
        assert f"not MNIST: {changed} has SHA-256 {own[:12]}..., not that of the published file" in note
    else:
        assert data.notes == ()


def test_the_official_digests_are_those_of_the_named_files() -> None:
    assert tuple(mnist.DIGESTS) == NAMES
    assert len(set(mnist.DIGESTS.values())) == 4
