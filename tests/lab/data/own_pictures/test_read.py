"""Pictures in folders and archives: layouts, splits, decoding, the cache, and what is refused."""

from __future__ import annotations

import bz2
import errno
import hashlib
import io
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from better_attention.lab.data.own_pictures import cache, decode, tree
from better_attention.lab.data.own_pictures.read import Pictures, find
from better_attention.lab.data.samples import DataError
from helpers.layouts import compress, member, tar

COLOURS = {"ants": (200, 30, 40), "bees": (20, 180, 60), "cats": (10, 50, 220)}


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)  # type: ignore[arg-type]
    return stream.getvalue()


def plain(colour: tuple[int, int, int] | int, size: tuple[int, int] = (9, 7)) -> bytes:
    return encoded(Image.new("RGB" if isinstance(colour, tuple) else "L", size, colour))


def photos(top: str = "", each: int = 12) -> dict[str, bytes]:
    """``each`` pictures a class, every one of another size, of one colour."""
    return {
        f"{top}{name}/{number}.png": plain(colour, (5 + number, 7))
        for name, colour in COLOURS.items()
        for number in range(each)
    }


def write(folder: Path, files: Mapping[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def everything(found: Pictures, part: str = "train", size: int = 4, **options: int) -> tuple[np.ndarray, list[str]]:
    """Pixels and class names of a split."""
    rows = found.parts[part]
    return found.pixels(rows, size, found.channels, **options), [found.classes[label] for label in found.labels[rows]]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads what another has decoded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


# --- layouts ----------------------------------------------------------------------------------------------------------


def test_a_folder_a_class(tmp_path: Path) -> None:
    write(
        tmp_path / "photos", photos() | {"cats/deeper/a.JPG": encoded(Image.new("RGB", (8, 8), (10, 50, 220)), "JPEG")}
    )
    write(tmp_path / "photos", {"notes.txt": b"mine", ".hidden/x.png": b"", "ants/.x.png": b"", "bees/list.csv": b""})
    found = find(tmp_path / "photos")
    assert found.classes == found.folders == ("ants", "bees", "cats")
    assert sum(map(len, found.parts.values())) == 37
    assert found.channels == 3
    for part in ("train", "test"):
        pixels, classes = everything(found, part)
        assert pixels.shape == (len(classes), 4, 4, 3)
        for image, name in zip(pixels, classes, strict=True):
            assert np.abs(image.astype(int) - COLOURS[name]).max() <= 3  # the JPEG is not exact


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test"])
def test_two_splits(tmp_path: Path, name: str) -> None:
    write(tmp_path, photos("train/", 5) | photos(f"{name}/", 2))
    found = find(tmp_path)
    assert {part: len(rows) for part, rows in found.parts.items()} == {"train": 15, "test": 6}
    assert {found.names[row].split("/")[0] for row in found.parts["test"]} == {name}
    assert (f"{name}/ is the test split here; validation is cut from train/" in found.notes) == (name != "test")


def test_three_splits(tmp_path: Path) -> None:
    write(tmp_path, photos("train/", 5) | photos("val/", 2) | photos("test/", 1) | {"devkit/a/b.png": plain(3)})
    found = find(tmp_path)
    assert {part: len(rows) for part, rows in found.parts.items()} == {"train": 15, "validation": 6, "test": 3}
    assert "1 picture in no class's folder, not read" in found.notes


def test_a_test_folder_without_classes_is_not_read(tmp_path: Path) -> None:
    write(tmp_path, photos("train/") | photos("val/", 2) | {"test/0.png": plain(3), "test/1.png": plain(4)})
    found = find(tmp_path)
    assert len(found.parts["test"]) == 6
    assert "test/ holds no folder per class and is not read" in found.notes


def test_photographs_of_trains_are_a_class(tmp_path: Path) -> None:
    found = find(write(tmp_path, photos() | {f"train/{n}.png": plain(n) for n in range(3)}))
    assert found.classes == ("ants", "bees", "cats", "train")


def test_links_are_followed_though_not_in_a_circle(tmp_path: Path) -> None:
    write(tmp_path / "real", photos(each=4))
    (tmp_path / "photos").mkdir()
    for name in COLOURS:
        (tmp_path / "photos" / name).symlink_to(tmp_path / "real" / name)
    (tmp_path / "real" / "cats" / "again").symlink_to(tmp_path / "photos")
    assert len(find(tmp_path / "photos").names) == 12


ARCHIVES = [".tar", ".tar.gz", ".tar.xz", ".tar.bz2", ".zip"]


def pack(path: Path, files: Mapping[str, bytes]) -> Path:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
        return path
    data = tar(member(name, content) for name, content in files.items())
    if path.suffix == ".bz2":
        path.write_bytes(bz2.compress(data))
    else:
        path.write_bytes(data if path.suffix == ".tar" else compress(data, path.suffix))
    return path


@pytest.mark.parametrize(
    "names",
    [("Training", "Testing"), ("seg_train", "seg_test"), ("TRAIN", "TEST"), ("train_set", "dev"), ("valid", "test")],
)
def test_folders_that_look_like_splits_are_not_taken_for_classes(tmp_path: Path, names: tuple[str, str]) -> None:
    write(tmp_path, photos(f"{names[0]}/") | photos(f"{names[1]}/"))
    with pytest.raises(DataError, match=rf"{', '.join(sorted(names))}, which look like splits and would be classes"):
        find(tmp_path)


def test_classes_may_be_called_almost_like_splits(tmp_path: Path) -> None:
    """Two kinds of trains, and no test: no split is meant."""
    files = {f"{name}/{n}.png": plain(n) for name in ("steam-train", "train station", "contest") for n in range(3)}
    assert find(write(tmp_path, files)).classes == ("contest", "steam-train", "train station")


@pytest.mark.parametrize("suffix", ARCHIVES)
@pytest.mark.parametrize("inside", ["", "train/", "set/train/"])
def test_archives_by_split(tmp_path: Path, suffix: str, inside: str) -> None:
    pack(tmp_path / f"my-set-train{suffix}", photos(inside, 5))
    pack(tmp_path / f"my-set-val{suffix}", photos(inside.replace("train", "val"), 2))
    (tmp_path / "classes.tsv").write_text("0\tants\tsmall ants, many\n1\tbees\tbees\n2\tcows\tcows\n")
    found = find(tmp_path)
    assert found.classes == ("small ants, many", "bees", "cats")
    assert {part: len(rows) for part, rows in found.parts.items()} == {"train": 15, "test": 6}
    pixels, classes = everything(found, "test")
    colours = COLOURS | {"small ants, many": COLOURS["ants"]}
    np.testing.assert_array_equal(pixels[:, 2, 1], [colours[name] for name in classes])


@pytest.mark.parametrize("suffix", ARCHIVES)
@pytest.mark.parametrize(
    ("tops", "sizes"), [(("",), None), (("photos/",), None), (("photos/train/", "photos/val/"), (36, 36))]
)
def test_one_archive(tmp_path: Path, suffix: str, tops: tuple[str, ...], sizes: tuple[int, int] | None) -> None:
    files = {name: data for top in tops for name, data in photos(top).items()} | {"photos/._x.png": b"", "a.txt": b""}
    files |= {"__MACOSX/cats/1.png": b"", ".trash/dogs/1.png": b""}
    found = find(pack(tmp_path / f"photos{suffix}", files))
    assert found.classes == ("ants", "bees", "cats")
    assert sizes is None or (len(found.parts["train"]), len(found.parts["test"])) == sizes
    pixels, classes = everything(found)
    np.testing.assert_array_equal(pixels[:, 0, 3], [COLOURS[name] for name in classes])


def test_classes_that_are_called_alike_stay_apart(tmp_path: Path) -> None:
    """ImageNet has two kinds of crane."""
    write(tmp_path, photos() | {"words.txt": b"ants\tcrane\nbees\tcrane\nbirds\tcats\n"})
    assert find(tmp_path).classes == ("crane (ants)", "crane (bees)", "cats")


# --- the split of our own ---------------------------------------------------------------------------------------------


def held_out(found: Pictures) -> set[str]:
    return {found.names[row] for row in found.parts["test"]}


def test_a_tenth_is_held_out_and_stays_held_out(tmp_path: Path) -> None:
    data = plain(7)
    write(tmp_path, {f"{name}/{number}.png": data for name in "ab" for number in range(400)})
    before = find(tmp_path)
    assert 50 <= len(before.parts["test"]) <= 110
    assert not set(before.parts["train"]) & set(before.parts["test"])
    write(tmp_path, {f"{name}/new{number}.png": data for name in "abc" for number in range(100)})
    after = find(tmp_path)
    assert held_out(before) <= held_out(after)
    old = {name for name in held_out(after) if "new" not in name}
    assert old == held_out(before)
    assert any("nearly alike may lie on both sides" in note for note in after.notes)


def test_every_class_is_on_both_sides(tmp_path: Path) -> None:
    write(tmp_path, {f"{name}/{number}.png": plain(7) for name in "abcdefgh" for number in range(2)})
    found = find(tmp_path)
    for part in ("train", "test"):
        assert sorted(found.labels[found.parts[part]]) == list(range(8))


def test_a_class_that_would_be_held_out_whole_is_not(tmp_path: Path) -> None:
    lucky = [
        f"a/{n}.png" for n in range(200) if hashlib.sha256(f"a/{n}.png".encode()).digest()[0] < 25
    ]  # 25 / 256 < 0.1
    write(tmp_path, {name: plain(7) for name in [*lucky, *(f"b/{n}.png" for n in range(5))]})
    found = find(tmp_path)
    assert len(lucky) > 5
    assert [found.names[row] for row in found.parts["train"] if found.names[row] in lucky] == [
        max(lucky, key=lambda name: hashlib.sha256(name.encode()).digest())
    ]


def test_a_train_folder_alone_is_split_like_the_folder_itself(tmp_path: Path) -> None:
    write(tmp_path / "a", photos())
    write(tmp_path / "b", photos("train/"))
    assert {f"train/{name}" for name in held_out(find(tmp_path / "a"))} == held_out(find(tmp_path / "b"))


def test_accents_are_split_alike_however_they_are_written(tmp_path: Path) -> None:
    composed = {f"caf\u00e9/{n}.png": plain(n) for n in range(30)} | {f"th\u00e9/{n}.png": plain(n) for n in range(30)}
    write(tmp_path / "a", composed)
    write(tmp_path / "b", {name.replace("\u00e9", "e\u0301"): data for name, data in composed.items()})
    assert held_out(find(tmp_path / "a")) == {
        name.replace("e\u0301", "\u00e9") for name in held_out(find(tmp_path / "b"))
    }


@pytest.mark.parametrize("packed", [False, True])
def test_pictures_of_kinds_that_are_not_read_are_counted(packed: bool, tmp_path: Path) -> None:
    files = photos() | {f"ants/{n}.HEIC": b"?" for n in range(3)} | {"bees/scan.tif": b"II*", "bees/list.csv": b""}
    place = write(tmp_path / "photos", files)
    if packed:
        place = tmp_path / "photos.zip"
        with zipfile.ZipFile(place, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
        tarred = tmp_path / "photos.tar"
        with tarfile.open(tarred, "w") as tape:
            tape.add(tmp_path / "photos", "photos")
            tape.addfile(tarfile.TarInfo("photos/bees/large.psd"))
        told = "5 pictures of kinds that are not read left out (3 .heic, 1 .psd, 1 .tif): convert them"
        assert told in find(tarred).notes
    found = find(place)
    assert "4 pictures of kinds that are not read left out (3 .heic, 1 .tif): convert them" in found.notes
    assert sorted(found.names) == sorted(photos())


def test_a_dev_folder_is_a_validation_split(tmp_path: Path) -> None:
    write(tmp_path, photos("train/", 5) | photos("dev/", 2))
    assert {part: len(rows) for part, rows in find(tmp_path).parts.items()} == {
        "train": 5 * len(COLOURS),
        "test": 2 * len(COLOURS),
    }


def test_two_folders_for_one_split_are_refused(tmp_path: Path) -> None:
    write(tmp_path, photos("train/", 5) | photos("dev/", 2) | photos("val/", 2))
    with pytest.raises(DataError, match="dev/ and val/ are both the validation split: keep one"):
        find(tmp_path)


def test_where_nothing_can_be_kept_pictures_are_decoded_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "photos", photos())
    usual, names = everything(find(tmp_path / "photos"))

    def refused(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EROFS, "Read-only file system", str(path))

    cache.clear()
    monkeypatch.setattr(Path, "mkdir", refused)
    found = find(tmp_path / "photos")
    again, again_names = everything(found)
    assert again_names == names
    assert np.array_equal(again, usual)
    assert cache.held() == (0, 0)
    with pytest.raises(DataError, match=r"cannot write .*Read-only file system"):
        everything(found, in_memory=10)


def test_a_large_picture_that_is_not_read_is_no_hindrance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "FILE_LIMIT", 2_000)
    with zipfile.ZipFile(tmp_path / "photos.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in (photos() | {"ants/master.tif": bytes(500_000)}).items():
            archive.writestr(name, data)
    assert sorted(find(tmp_path / "photos.zip").names) == sorted(photos())


def test_what_the_user_may_not_read_is_not_blamed_on_the_cache(tmp_path: Path) -> None:
    class Refused(tree.PictureTree):
        def contents(self, rows: Mapping[str, int]) -> Iterator[tuple[int, str, bytes | Path]]:
            yield from ()  # the error comes when the first picture is asked for
            raise PermissionError(errno.EACCES, "Permission denied", "photos.tar")

    found = find(write(tmp_path / "photos", photos()))
    found = replace(found, tree=Refused(**vars(found.tree)))
    with pytest.raises(DataError, match=r"^photos\.tar cannot be read \(Permission denied\)\.$"):
        found.pixels(np.arange(3), 4, 3)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"holds no pictures \(.jpg, .*\); expected a folder per class"),
        ({"a/1.heic": b"x", "b/1.txt": b"x"}, "holds no pictures"),
        ({"all.zip": b"?"}, r"holds no pictures .* To read all\.zip, name it: .*all\.zip\."),
        ({"1.png": plain(1), "2.png": plain(2)}, "holds pictures that lie in no class's folder"),
        ({"a/1.png": plain(1), "a/2.png": plain(2)}, r"has only one class, 'a'; there is nothing to learn\.$"),
        ({"a/b/1.png": plain(1), "a/c/2.png": plain(2)}, r"has only one class, 'a'.*name it: .*a\."),
        (photos() | {"dogs/1.heic": b"x"}, "dogs holds no pictures .*a class without pictures"),
        (photos("train/") | {"train/dogs/1.heic": b"", "val/ants/1.png": plain(1)}, "dogs holds no pictures"),
        (photos("train/") | photos("val/") | {"val/dogs/1.png": plain(1)}, "dogs is a class that train/ does not have"),
        (photos() | {"dogs/1.png": plain(1)}, "1.png is the only picture of its class"),
        (photos() | {"dogs/1.png": plain(1), "owls/1.png": plain(1)}, r"dogs.1\.png is .* So are owls/1\.png\."),
        ({"train/a/1.png": plain(1), "val/a/1.png": plain(1)}, "train has only one class, 'a'"),
        (photos() | {"a-val.tar.gz": b"x"}, "one archive NAME-train.tar"),
        ({"a-val.tar": b"", "b-train.tar": b""}, r"archives of several data sets \(a, b\)"),
        ({"a-val.tar": b"", "a-train.tar": b"", "a-valid.tar": b""}, "at most one a split"),
    ],
)
def test_layouts_that_mean_nothing_are_refused(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    with pytest.raises(DataError, match=message):
        find(write(tmp_path, files))


def test_places_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere does not exist"):
        find(tmp_path / "nowhere")
    (tmp_path / "a.png").write_bytes(plain(1))
    with pytest.raises(DataError, match="is no folder and no archive"):
        find(tmp_path / "a.png")
    write(tmp_path / "photos", photos())
    (tmp_path / "photos" / "cats" / "gone.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(DataError, match=r"gone.png cannot be read .*a link that leads nowhere"):
        find(tmp_path / "photos")


def test_something_that_is_no_file_is_never_opened(tmp_path: Path) -> None:
    write(tmp_path, photos())
    os.mkfifo(tmp_path / "cats" / "pipe.png")
    with pytest.raises(DataError, match=r"pipe.png is no regular file"):
        find(tmp_path)


@pytest.mark.parametrize("name", ["../cats/1.png", "/cats/1.png"])
def test_unsafe_members_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="leads out of the archive"):
        find(pack(tmp_path / "photos.tar.gz", photos() | {name: plain(1)}))
    path = tmp_path / "links.tar.gz"
    path.write_bytes(compress(tar([member("cats/1.png", b"", type=b"2", linkname="/etc/passwd")]), ".gz"))
    with pytest.raises(DataError, match=r"a link, device or sparse file"):
        find(path)


def test_an_archive_cut_short(tmp_path: Path) -> None:
    path = pack(tmp_path / "photos.tar.gz", photos())
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"photos.tar.gz is cut short"):
        find(path)


def test_all_bad_pictures_are_named_before_anything_is_trained(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    bad = {
        f"cats/cut.{kind}": encoded(Image.fromarray(noise), kind)[:-900]
        for kind in ("jpeg", "png", "webp", "bmp", "gif")
    }
    bad |= {"cats/text.jpg": b"no picture", "cats/empty.png": b"", "bees/svg.png": b"<svg/>"}
    write(tmp_path, photos("train/") | photos("test/") | {f"train/{name}": data for name, data in bad.items()})
    found = find(tmp_path)
    with pytest.raises(DataError) as caught:
        everything(found)
    message = str(caught.value)
    assert all(str(tmp_path / "train" / name) in message for name in bad), message
    assert message.count("\n") == len(bad) - 1
    assert not list(cache.folder().glob("*.npy"))
    assert not list(cache.folder().glob(".*.tmp"))
    everything(found, "test")


def test_bad_pictures_among_grey_ones_are_all_named(tmp_path: Path) -> None:
    """Every file is opened to see that all are grey: the first that cannot be must not hide the others."""
    write(tmp_path, {f"{name}/{n}.png": plain(n) for name in "ab" for n in range(3)})
    write(tmp_path, {"a/0.png": b"", "b/1.png": b"no picture"})
    found = find(tmp_path)
    with pytest.raises(DataError, match=r"a/0.png is empty[^\n]*\n[^\n]*b/1.png is no JPEG"):
        found.pixels(np.arange(6), 4, found.channels)
    write(tmp_path, {"b/1.png": plain((1, 2, 3)), "a/0.png": plain(0)})
    assert find(tmp_path).channels == 3


def test_a_bad_member_is_named_with_its_archive(tmp_path: Path) -> None:
    path = pack(tmp_path / "photos.tar.gz", photos("train/") | photos("test/", 1) | {"train/cats/x.png": b"no"})
    with pytest.raises(DataError, match=r"photos.tar.gz: train/cats/x.png is no JPEG, PNG"):
        everything(find(path))


def test_a_bomb_is_refused_by_its_head(tmp_path: Path) -> None:
    """A file of 70 bytes whose head promises 65,500 × 65,500 pixels: nothing of it may be decoded."""
    chunk = encoded(Image.new("1", (8, 8)))
    bomb = bytearray(chunk)
    bomb[16:24] = (65_500).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    with pytest.raises(DataError, match=r"bomb has far more than 134,217,728 pixels"):
        decode.read_picture("bomb", bytes(bomb), 8, 3)
    bomb[16:24] = (12_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    with decode.quiet(), pytest.raises(DataError, match=r"bomb has 12,000 × 12,000 pixels; at most 134,217,728"):
        decode.read_picture("bomb", bytes(bomb), 8, 3)


# --- one picture ------------------------------------------------------------------------------------------------------


def scene(width: int = 37, height: int = 23) -> Image.Image:
    """A picture without any symmetry."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([6 * x, 10 * y, 3 * (x + y)], axis=2).astype(np.uint8))


@pytest.mark.parametrize("size", [5, 23, 64])
@pytest.mark.parametrize("shape", [(37, 23), (23, 37), (31, 31)])
def test_the_middle_square_is_scaled_as_pillow_fits_pictures(size: int, shape: tuple[int, int]) -> None:
    expected = np.asarray(ImageOps.fit(scene(*shape), (size, size), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(decode.fit(scene(*shape), size, 3), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(scene(), "PNG", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    expected = np.asarray(ImageOps.fit(upright, (11, 11), Image.Resampling.BICUBIC)).astype(int)
    ours = decode.read_picture("a", data, 11, 3).astype(int)
    assert np.abs(ours - expected).max() <= 1  # rounding, where the square's border falls between two pixels
    assert orientation == 1 or np.abs(ours - decode.fit(scene(), 11, 3)).max() > 20


def test_a_damaged_exif_block_does_no_harm() -> None:
    data = encoded(scene(), "PNG", exif=b"Exif\0\0MM\0\x2a\0\0\0\x08\xff\xff garbage")
    with decode.quiet():
        np.testing.assert_array_equal(decode.read_picture("a", data, 11, 3), decode.fit(scene(), 11, 3))


@pytest.mark.parametrize(
    ("image", "grey", "colour"),
    [
        (Image.new("L", (4, 4), 77), 77, (77, 77, 77)),
        (Image.new("1", (4, 4), 1), 255, (255, 255, 255)),
        (Image.new("LA", (4, 4), (40, 0)), 255, (255, 255, 255)),
        (Image.new("RGBA", (4, 4), (10, 20, 30, 255)), 18, (10, 20, 30)),
        (Image.new("RGBA", (4, 4), (10, 20, 30, 0)), 255, (255, 255, 255)),
        (Image.new("RGB", (4, 4), (90, 90, 90)).convert("P"), None, None),
        (Image.fromarray(np.full((4, 4), 51 * 256 + 3, dtype=np.uint16)), 51, (51, 51, 51)),
    ],
    ids=["L", "1", "LA", "RGBA", "transparent", "P", "16 bits"],
)
def test_every_kind_of_pixel(image: Image.Image, grey: int | None, colour: tuple[int, int, int] | None) -> None:
    data = encoded(image)
    one, three = decode.read_picture("a", data, 2, 1), decode.read_picture("a", data, 2, 3)
    assert one.shape == (2, 2)
    assert three.shape == (2, 2, 3)
    if grey is not None and colour is not None:
        assert one.tolist() == [[grey] * 2] * 2
        assert three[0, 0].tolist() == list(colour)
    assert decode.is_grey("a", data) == (image.mode in ("L", "1", "LA", "I;16"))


def test_the_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((250, 0, 0), (0, 0, 250))]
    for kind, more in (("GIF", {}), ("WEBP", {"lossless": True})):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **more)
        assert decode.read_picture("a", data, 2, 3)[0, 0].tolist() == [250, 0, 0]


def test_large_jpegs_are_decoded_at_a_fraction() -> None:
    """The same picture, within what scaling in two steps may change."""
    large = scene(40, 30).resize((1600, 1200), Image.Resampling.BICUBIC)
    data = encoded(large, "JPEG", quality=95)
    ours = decode.read_picture("a", data, 16, 3).astype(int)
    assert np.abs(ours - decode.fit(large, 16, 3)).mean() < 2


def test_grey_sets_have_one_channel(tmp_path: Path) -> None:
    write(tmp_path, {f"{name}/{n}.png": plain(n) for name in "ab" for n in range(20)})
    found = find(tmp_path)
    assert found.channels == 1
    assert everything(found)[0].shape == (len(found.parts["train"]), 4, 4)
    write(tmp_path, {"b/colour.png": plain((1, 2, 3))})
    assert find(tmp_path).channels == 3


# --- the cache --------------------------------------------------------------------------------------------------------


def test_a_set_is_decoded_once(tmp_path: Path) -> None:
    write(tmp_path, photos())
    first, _ = everything(find(tmp_path))
    (file,) = cache.folder().glob("*.npy")
    np.testing.assert_array_equal(np.load(file), first)
    file.write_bytes(file.read_bytes()[:-1] + b"\x7b")  # shows from where the pixels come
    first[-1, -1, -1, -1] = 0x7B
    np.testing.assert_array_equal(everything(find(tmp_path))[0], first)
    assert (everything(find(tmp_path), size=5)[0] != 0x7B).all()
    cats = tmp_path / "cats" / "3.png"
    cats.write_bytes(plain((0, 0, 0)))
    assert (everything(find(tmp_path))[0] != 0x7B).all()


def test_rows_come_in_the_order_that_was_asked_for(tmp_path: Path) -> None:
    path = pack(tmp_path / "photos.tar.gz", photos())
    found = find(path)
    for rows in ([5, 30, 2], [30, 2, 5], [7]):
        pixels = found.pixels(np.array(rows), 3, 3)
        expected = [COLOURS[found.classes[found.labels[row]]] for row in rows]
        np.testing.assert_array_equal(pixels[:, 1, 1], expected)


def test_large_sets_stay_on_the_disk(tmp_path: Path) -> None:
    write(tmp_path, photos())
    found = find(tmp_path)
    memory, _ = everything(found)
    mapped, _ = everything(found, in_memory=0)
    assert isinstance(mapped, np.memmap)
    assert not isinstance(memory, np.memmap)
    np.testing.assert_array_equal(mapped, memory)
    mapped[0] = 0  # writes change memory alone
    np.testing.assert_array_equal(everything(found, in_memory=0)[0], memory)


def test_a_damaged_cache_is_made_again(tmp_path: Path) -> None:
    write(tmp_path, photos())
    first, _ = everything(find(tmp_path))
    for file in [*cache.folder().glob("*.npy"), *cache.folder().glob("*.json")]:
        file.write_bytes(file.read_bytes()[:-1] if file.suffix == ".npy" else b"{")
    np.testing.assert_array_equal(everything(find(tmp_path))[0], first)
    (file,) = cache.folder().glob("*.npy")
    np.save(file, first[1:])
    np.testing.assert_array_equal(everything(find(tmp_path))[0], first)
    assert everything(find(tmp_path), size=5)[0].shape[1:] == (5, 5, 3)
    assert len(list(cache.folder().glob("*.npy"))) == 2


def test_no_room_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from shutil import _ntuple_diskusage

    found = find(write(tmp_path, photos()))
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: _ntuple_diskusage(1000, 1000, 5))
    with pytest.raises(DataError, match=r"the decoded pictures take [\d,]+ bytes; .* has 5 free"):
        everything(found)


def test_a_cache_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    found = find(write(tmp_path, photos()))
    cache.folder().parent.mkdir(parents=True)
    cache.folder().write_bytes(b"a file where the folder should be")
    with pytest.raises(DataError, match=r"cannot write .*XDG_CACHE_HOME"):
        everything(found, in_memory=10)  # fewer pictures are decoded in memory


@pytest.mark.data
def test_real_photographs(real_data: Path) -> None:
    """Fifty of each class, as the archive's maker says; class names as WordNet has them."""
    found = find(real_data / "tinyimagenet100" / "tinyimagenet100-val.tar.xz")
    assert np.bincount(found.labels).tolist() == [50] * 100
    assert found.classes[0] == "goldfish, Carassius auratus"
    rows = found.parts["test"][:40]
    pixels = found.pixels(rows, 64, found.channels)
    assert pixels.shape == (40, 64, 64, 3)
    assert len({bytes(image) for image in pixels}) == 40
    small = found.pixels(rows, 8, 3).astype(int)
    blocks = pixels.reshape(40, 8, 8, 8, 8, 3).mean(axis=(2, 4))
    assert np.abs(small - blocks).mean() < 8  # scaled down, not cut out


@pytest.mark.slow
@pytest.mark.data
def test_the_real_thing(real_data: Path) -> None:
    """Sizes as the archives' maker gives them."""
    found = find(real_data / "tinyimagenet100")
    assert {part: len(rows) for part, rows in found.parts.items()} == {"train": 50_000, "test": 5_000}
    assert len(found.classes) == 100
    assert found.classes[0] == "goldfish, Carassius auratus"
    assert found.channels == 3
    assert np.bincount(found.labels[found.parts["train"]]).tolist() == [500] * 100
    pixels = found.pixels(found.parts["test"][:8], 64, 3)
    assert pixels.shape == (8, 64, 64, 3)
    assert len({bytes(image) for image in pixels}) == 8
