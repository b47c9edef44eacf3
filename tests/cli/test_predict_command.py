"""``better-attention predict``: texts, pictures and test samples through a finished run."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from better_attention.cli import main

SHORT = ["--mechanisms", "super", "--scale", "smoke", "--epochs", "1", "--seeds", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run of the digits task."""
    out = tmp_path_factory.mktemp("digits")
    assert main.main(["compare", "digits", *SHORT, "--out", str(out)]) == 0
    return out / "super-h4-s0"


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run of the imdb task on a few reviews of ours: "good" is positive, "bad" is not."""
    folder = tmp_path_factory.mktemp("reviews")
    for split in ("train", "test"):
        for label, word, rating in (("neg", "bad", 2), ("pos", "good", 9)):
            (folder / "aclImdb" / split / label).mkdir(parents=True)
            for number in range(30):
                text = " ".join(["a", word, "film"] * (number % 7 + 1))
                (folder / "aclImdb" / split / label / f"{number}_{rating}.txt").write_text(text, encoding="utf-8")
    options = [
        "--lr",
        "0.01",
        "--batch-size",
        "8",
        "--epochs",
        "8",
        "--set",  # so few updates learn two words for certain without it alone
        "dropout=0",
        "--data",
        str(folder),
        "--out",
        str(folder / "out"),
    ]
    assert main.main(["compare", "imdb", *SHORT, *options]) == 0
    return folder / "out" / "super-h4-s0"


def predict(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main.main(["predict", *map(str, arguments), "--json"]) == 0
    rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return rows


def given(content: bytes) -> io.TextIOWrapper:
    """Standard input with this content."""
    return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8")


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main.main(["predict", *map(str, arguments)]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def picture(number: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.asarray(load_digits().images[number], dtype=np.uint8)


def test_pictures_of_every_kind_give_the_same_answer(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "one.npy", picture())
    np.save(tmp_path / "many.npy", np.stack([picture(1), picture(0)]))
    Image.fromarray((picture() * (255 / 16)).round().astype(np.uint8)).save(tmp_path / "grey.png")
    rows = predict(capsys, digits, tmp_path / "one.npy", tmp_path / "many.npy", tmp_path / "grey.png")
    assert [Path(row["input"]).name for row in rows] == ["one.npy", "many.npy[0]", "many.npy[1]", "grey.png"]
    one, other, again, grey = (row["probabilities"] for row in rows)
    assert one == pytest.approx(again)
    assert one == pytest.approx(grey)
    assert one != pytest.approx(other)
    assert rows[0]["class"] == max(one, key=one.get)
    assert rows[0]["probability"] == max(one.values())


def test_a_picture_of_another_size_is_resized_only_if_asked(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large = Image.fromarray((picture() * 15).astype(np.uint8)).resize((80, 64))
    large.convert("RGBA").save(tmp_path / "large.png")
    assert "has 80x64 pixels; task 'digits' reads 8x8" in refused(capsys, digits, tmp_path / "large.png")
    assert len(predict(capsys, digits, tmp_path / "large.png", "--resize")) == 1


def test_test_samples_come_with_their_class(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = predict(capsys, digits, "--index", 0, "--index", 358)
    assert [row["input"] for row in rows] == ["test sample 0", "test sample 358"]
    assert {row["truth"] for row in rows} <= set("0123456789")
    assert "the test split has samples 0 to 358" in refused(capsys, digits, "--index", 359)
    assert main.main(["predict", str(digits), "--index", "0"]) == 0
    assert "Truth" in capsys.readouterr().out


def test_texts_from_everywhere(
    reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "review.txt").write_text("bad bad\nfilm")
    monkeypatch.setattr(sys, "stdin", given(b"\xef\xbb\xbfa good film\r\n\na bad film\n"))
    rows = predict(capsys, reviews, "a good film", tmp_path / "review.txt", "-")
    assert [row["input"] for row in rows] == ["a good film", "bad bad\nfilm", "a good film", "a bad film"]
    assert [row["class"] for row in rows] == ["pos", "neg", "pos", "neg"]
    assert rows[0]["probabilities"] == rows[2]["probabilities"]
    assert sum(rows[0]["probabilities"].values()) == pytest.approx(1)


@pytest.mark.parametrize("name", ["nothing.png", "text.png", "pickled.npy", "short.npy", "flat.npy", "bright.npy"])
def test_files_that_are_no_pictures_are_refused(
    name: str, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.png").write_text("no picture")
    np.save(tmp_path / "pickled.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "short.npy").write_bytes(b"\x93NUMPY")
    np.save(tmp_path / "flat.npy", np.zeros(64, dtype=np.uint8))
    np.save(tmp_path / "bright.npy", np.full((8, 8), 200, dtype=np.uint8))
    message = {
        "nothing.png": "there is no such file",
        "text.png": "is not an image that can be read",
        "pickled.npy": "is not an array of numbers",
        "short.npy": "is not an array of numbers",
        "flat.npy": "reads images of shape (8, 8)",
        "bright.npy": "pixels from 0 (black) to 16 (white)",
    }[name]
    assert message in refused(capsys, digits, tmp_path / name)


def test_what_holds_no_text_is_refused(
    reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    monkeypatch.setattr(sys, "stdin", given(b"\n"))
    assert "is not UTF-8 text" in refused(capsys, reviews, tmp_path / "latin.txt")
    assert "input 2, '  ', holds no text" in refused(capsys, reviews, "good", "  ")
    assert "standard input holds no text" in refused(capsys, reviews, "-")
    monkeypatch.setattr(sys, "stdin", given(b"\xff\xfe bad\n"))
    assert "standard input is not UTF-8 text" in refused(capsys, reviews, "-")
    for name in ("nofile.txt", "some/where", str(tmp_path / "gone.txt")):
        assert f"{name}: there is no such file. If it is a text" in refused(capsys, reviews, name)
    assert f"{tmp_path} is a folder: name the text files in it" in refused(capsys, reviews, tmp_path)
    assert "nothing to predict" in refused(capsys, reviews)


def test_a_text_without_a_known_word_is_told(reviews: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main.main(["predict", str(reviews), "zzz \x1b qqq", "a good film."]) == 0
    said = capsys.readouterr().err
    assert said.count("note:") == 1
    assert "note: zzz" in said
    assert "qqq: none of its words is in the model's vocabulary" in said
    assert "\x1b" not in said


def test_what_is_no_picture_file_is_told_apart(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(fine := tmp_path / "fine.npy", picture())
    assert f"{tmp_path} is a folder: name the pictures in it" in refused(capsys, digits, tmp_path)
    assert "/dev/null is not an image file" in refused(capsys, digits, "/dev/null")
    for name in ("", "-"):
        assert f"input 2, {name!r}: expected the path of an image file" in refused(capsys, digits, fine, name)


def test_inputs_and_options_come_in_any_order(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "-1.png"):
        Image.fromarray((picture() * 15).astype(np.uint8)).save(tmp_path / name)
    wanted = predict(capsys, digits, "a.png", "./-1.png")
    assert [row["input"] for row in wanted] == ["a.png", "-1.png"]
    for words in (
        [digits, "--json", "a.png", "./-1.png"],
        ["--json", digits, "a.png", "./-1.png"],
        [digits, "a.png", "--json", "./-1.png"],
        [digits, "--json", "--", "a.png", "-1.png"],
    ):
        assert main.main(["predict", *map(str, words)]) == 0
        assert json.loads(capsys.readouterr().out) == wanted


def test_test_samples_of_other_data_are_refused(
    reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = reviews.parent.parent
    assert len(predict(capsys, reviews, "--index", 0, "--data", data)) == 1
    shutil.copytree(data / "aclImdb", tmp_path / "aclImdb")
    (tmp_path / "aclImdb" / "test" / "pos" / "3_9.txt").write_text("a bad film")
    said = refused(capsys, reviews, "--index", 0, "--data", tmp_path)
    assert f"--index: {tmp_path} is not the data that {reviews} was trained on" in said


def test_what_is_no_run_is_refused(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "It holds super-h4-s0: name one of these runs" in refused(capsys, digits.parent, "--index", 0)
    # The first mistake of two is told first: without a run nothing can be asked.
    assert f"{tmp_path / 'nowhere'} does not exist" in refused(capsys, tmp_path / "nowhere")
    assert "nothing to predict: name inputs" in refused(capsys, digits)
    damaged = Path(shutil.copytree(digits, tmp_path / "damaged"))
    (damaged / "model.safetensors").write_bytes(b"")
    assert "is not a whole safetensors file" in refused(capsys, damaged, "--index", 0)


def test_a_task_without_a_data_set_reads_what_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["compare", "recurrence", *SHORT, "--out", str(tmp_path)]) == 0
    run = tmp_path / "super-h2-s0"
    assert len(predict(capsys, run, "1 0 1 3")) == 1
    assert "'recurrence' computes its data. Name the symbols instead" in refused(capsys, run, "--index", 0)


def test_a_hostile_text_cannot_write_to_the_terminal(reviews: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main.main(["predict", str(reviews), "good \x1b[31m[bold]film[/bold]"]) == 0
    said = capsys.readouterr().out
    assert "\x1b[31m" not in said
    assert "[bold]film[/bold]" in said


def drawn(number: int = 0, scale: int = 255) -> np.ndarray[Any, np.dtype[np.float64]]:
    """A digit as light ink on dark paper, 0 ... ``scale``."""
    return (picture(number) * (scale / 16)).round()


def clear(paper: int) -> Image.Image:
    """A digit in ink on a transparent ground, whose hidden colour is ``paper``."""
    ink = drawn().astype(np.uint8)
    grey = np.where(ink > 0, 255 - ink, paper).astype(np.uint8)
    return Image.fromarray(np.stack([grey] * 3 + [np.where(ink > 0, 255, 0).astype(np.uint8)], axis=2))


def turned(orientation: int) -> tuple[Image.Image, Image.Exif]:
    """A digit as a camera held otherwise stores it, and the EXIF block that says so."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    back = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    return Image.fromarray(drawn().astype(np.uint8)).transpose(back[orientation]), exif


def probabilities(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, float]:
    (row,) = predict(capsys, *arguments)
    found: dict[str, float] = row["probabilities"]
    return found


def test_a_picture_is_read_as_a_viewer_shows_it(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "plain.npy", picture())
    expected = probabilities(capsys, digits, tmp_path / "plain.npy")
    Image.fromarray((drawn() * 257).astype(np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(drawn().astype(np.uint8)).convert("RGBA").save(tmp_path / "opaque.png")
    for orientation in (3, 6, 8):
        image, exif = turned(orientation)
        image.save(tmp_path / f"turned{orientation}.png", exif=exif)
    for file in sorted(tmp_path.glob("*.png")):
        assert probabilities(capsys, digits, file) == pytest.approx(expected), file.name
    np.save(tmp_path / "white.npy", np.where(picture() > 0, 16 - picture(), 16).astype(np.uint8))
    shown = probabilities(capsys, digits, tmp_path / "white.npy")
    for paper in (0, 255):
        clear(paper).save(tmp_path / "clear.png")
        assert probabilities(capsys, digits, tmp_path / "clear.png") == pytest.approx(shown)


def test_a_wide_picture_is_cut_to_its_middle_and_not_squeezed(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = np.zeros((8, 20), np.uint8)
    wide[:, 6:14] = drawn()
    Image.fromarray(wide).save(tmp_path / "wide.png")
    np.save(tmp_path / "plain.npy", picture())
    expected = probabilities(capsys, digits, tmp_path / "plain.npy")
    assert probabilities(capsys, digits, tmp_path / "wide.png", "--resize") == pytest.approx(expected)


def test_pictures_unlike_the_training_pictures_are_told(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model that knows light digits on dark paper is sure of dark ones on light paper, and wrong."""
    for number in range(12):
        Image.fromarray((255 - drawn(number)).astype(np.uint8)).save(tmp_path / f"paper{number}.png")
    np.save(tmp_path / "array.npy", 16 - picture())
    Image.fromarray(drawn().astype(np.uint8)).save(tmp_path / "right.png")
    Image.new("LA", (8, 8), (255, 0)).save(tmp_path / "blank.png")
    capsys.readouterr()
    assert main.main(["predict", str(digits), *map(str, sorted(tmp_path.iterdir()))]) == 0
    light, blank = sorted(line for line in capsys.readouterr().err.splitlines() if line.startswith("note:"))[::-1]
    if "blank" in light:
        light, blank = blank, light
    assert "array.npy" in light
    assert " and 3 more: light at its edges, where the training pictures are dark" in light
    assert "Invert the picture" in light
    assert "right.png" not in light + blank
    assert "blank.png: blank, every pixel has nearly the same value. White shapes on a transparent ground" in blank


KINDS = ["EPS", "TIFF", "PPM", "ICO", "TGA", "PCX", "PDF", "SGI", "JPEG2000"]


@pytest.mark.parametrize("kind", KINDS)
def test_only_pictures_of_the_usual_kinds_are_opened(
    kind: str, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a file is called: Pillow hands some kinds to other programs, or to decoders that few have looked at."""
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {kind}")
    with (tmp_path / "a.png").open("wb") as file:
        Image.new("L", (8, 8), 9).convert("RGB").save(file, kind)
    said = refused(capsys, digits, tmp_path / "a.png")
    assert "is not an image that can be read: a.png is no JPEG, PNG, WebP, BMP or GIF" in said


def test_a_forged_array_takes_no_memory(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (4000000000000, 8, 8)}".ljust(117) + b"\n"
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    assert "is not an array of numbers" in refused(capsys, digits, tmp_path / "a.npy")
