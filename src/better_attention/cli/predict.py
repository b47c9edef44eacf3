"""``better-attention predict``: a finished run's model on new inputs."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from better_attention.cli import UserError, console

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from better_attention.lab.runs.folder import Run
    from better_attention.lab.tasks.image import ImageTask

PATH_LIKE = re.compile(r"\S*/\S*|\S+\.[A-Za-z]{1,5}")
"""A text without a space, with a slash or an ending: a file, if it were there."""

TOLD = 10
"""Pictures that one note names."""

HELP = "classify new inputs, or test samples, with the model of a finished run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("path", type=Path, metavar="RUN", help="folder of a run, such as runs/digits-small/super-h4-s0")
    parser.add_argument(
        "inputs",
        nargs="*",
        metavar="INPUT",
        help="texts, text files (a text each) or - for standard input (a text a line); of images: their files or .npy",
    )
    parser.add_argument("--index", type=int, action="append", metavar="N", help="test sample N of the data set, from 0")
    parser.add_argument("--data", type=Path, metavar="DIR", help="where the data set is, for --index")
    parser.add_argument(
        "--resize",
        action="store_true",
        help="scale images of another size to that of the data set, and take the middle square",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Predict, and print a line an input: class, probability, and the true class of a test sample."""
    from better_attention.lab.runs.folder import load_run
    from better_attention.lab.tasks.image import ImageTask

    if not args.inputs and not args.index:
        raise UserError("nothing to predict: name inputs after the run, or --index N for a test sample.")
    trained = load_run(args.path)
    named: list[tuple[str, Any, str | None]] = []
    if args.inputs and isinstance(trained.task, ImageTask):
        for number, name in enumerate(args.inputs, start=1):
            if not name or name == "-":
                raise UserError(f"input {number}, {name!r}: pictures are named by their files.")
            named += [(title, picture, None) for title, picture in read_images(Path(name), trained.task, args.resize)]
        warn_of_pictures([(title, picture) for title, picture, _ in named], trained)
    elif args.inputs:
        named += [(text, text, None) for n, name in enumerate(args.inputs, start=1) for text in read_texts(name, n)]
        warn_of_unknown([text for text, _, _ in named], trained)
    named += numbered_samples(trained, args.index or [], args.data)
    predictions = trained.predict([inputs for _, inputs, _ in named])
    rows = [
        {
            "input": name,
            "class": found.label,
            "probability": found.probability,
            "probabilities": dict(found.probabilities),
        }
        | ({} if truth is None else {"truth": truth})
        for (name, _, truth), found in zip(named, predictions, strict=True)
    ]
    if args.json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
    else:
        print_rows(rows)
    return 0


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """One line an input, as a table."""
    from rich.table import Table
    from rich.text import Text

    from better_attention.lab.files import plain

    table = Table(
        "Input",
        "Class" if all(row["probabilities"] for row in rows) else "Output",
        "Probability",
        *(["Truth"] if any("truth" in row for row in rows) else []),
        box=None,
    )
    for row in rows:
        cells = [plain(row["input"], 60), plain(row["class"]), f"{row['probability']:.3f}"]
        table.add_row(*map(Text, [*cells, *([plain(row["truth"])] if "truth" in row else [])]))
    console().print(table)


def read_texts(name: str, number: int = 1) -> list[str]:
    """The texts that input ``number`` stands for: the lines of standard input, a file's content, or itself.

    Raises:
        UserError: a file that is not there or is not UTF-8 text, or nothing to read.
    """
    from better_attention.lab.data.own_texts.columns import FORMATS

    if name == "-":
        try:
            lines = sys.stdin.buffer.read().decode("utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise UserError(f"standard input is not UTF-8 text ({error}). Convert it first.") from None
        texts = [line.rstrip("\r") for line in lines if line.strip()]
        if not texts:
            raise UserError("standard input holds no text: write one text a line.")
        return texts
    try:
        is_file, is_folder = Path(name).is_file(), bool(name) and Path(name).is_dir()
    except (OSError, ValueError):  # a text may be too long for a name, or hold what a name cannot
        is_file = is_folder = False
    if is_folder:
        raise UserError(f"{name} is a folder: name the text files in it.")
    if not is_file and PATH_LIKE.fullmatch(name):
        raise UserError(f"{name}: there is no such file. If it is a text, hand it over on standard input, with -.")
    if is_file and Path(name).suffix.lower() in FORMATS:
        raise UserError(f"{name} is a table, and would be read as one text: hand over a text a line, with -.")
    try:
        text = Path(name).read_text("utf-8") if is_file else name
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 text ({error}). Convert it first.") from None
    if not text.strip():
        raise UserError(f"input {number}, {name!r}, holds no text.")
    return [text]


def warn_of_unknown(texts: Sequence[str], trained: Run) -> None:
    """Say which texts hold no word that the model knows: what it says of them, it would say of any."""
    from better_attention.lab.data.vocabulary import UNKNOWN
    from better_attention.lab.files import plain
    from better_attention.lab.tasks.text import TextTask

    if not isinstance(trained.task, TextTask):
        return
    for text, row in zip(texts, trained.task.encode(texts, trained.assets), strict=True):
        if int(row.max()) <= UNKNOWN:
            print(f"note: none of the words of {plain(text, 60)!r} is in the model's vocabulary", file=sys.stderr)


def warn_of_pictures(pictures: Sequence[tuple[str, NDArray[np.uint8]]], trained: Run) -> None:
    """Say which pictures are unlike all that the model was trained on: what it says of them is worth little."""
    from better_attention.lab.files import plain
    from better_attention.lab.tasks.image import ImageTask

    if not isinstance(trained.task, ImageTask):
        return
    unlike: dict[str, list[str]] = {}
    for title, picture in pictures:
        for remark in trained.task.unlike(picture, trained.assets):
            unlike.setdefault(remark, []).append(plain(title, 300))
    for remark, titles in unlike.items():
        more = f" and {len(titles) - TOLD:,} more" if len(titles) > TOLD else ""
        print(f"note: {', '.join(titles[:TOLD])}{more}: {remark}", file=sys.stderr)


def read_images(path: Path, task: ImageTask, resize: bool) -> list[tuple[str, NDArray[np.uint8]]]:
    """The images in a .npy file (as they are) or an image file, as a viewer shows it, brought to the task's range.

    Args:
        path: the file.
        task: what its run was trained on.
        resize: whether a picture of another size is scaled, and its middle square taken; every size is read of a task
            that was trained on pictures of all sizes.

    Raises:
        UserError: another kind of file, a damaged one, or an image of another size without ``resize``.
        FileNotFoundError: there is no such file.
    """
    import numpy as np

    from better_attention.lab.tasks.picture_folder import FolderTask

    if path.is_dir():
        raise UserError(f"{path} is a folder: name the pictures in it.")
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file.")
    if not path.is_file():
        raise UserError(f"{path} is no file that pictures are in.")
    if path.suffix == ".npy":
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)  # a forged header then takes no memory
        except (ValueError, EOFError) as error:
            raise UserError(f"{path} is not an array of numbers ({error}).") from None
        plane = 2 if task.channels == 1 else 3
        if array.ndim == plane:
            return [(str(path), array)]
        return (
            [(f"{path}[{row}]", image) for row, image in enumerate(array)]
            if array.ndim == plane + 1
            else [(str(path), array)]
        )

    if isinstance(task, FolderTask):  # pictures of all sizes are what it was trained on
        return [(str(path), task.picture(path))]

    from better_attention.lab.data.own_pictures.decode import quiet, read_picture, sides
    from better_attention.lab.data.samples import DataError

    side = task.raw_size
    try:
        with quiet():
            width, height = sides(path.name, path)
            if (width, height) != (side, side) and not resize:
                raise UserError(
                    f"{path} has {width}x{height} pixels; task {task.name!r} reads {side}x{side}. Resize it, or add "
                    "--resize."
                )
            pixels = read_picture(path.name, path, side, task.channels)
    except DataError as error:
        raise UserError(f"{path} is not an image that can be read: {error}") from None
    return [(str(path), (pixels * (task.peak / 255)).round().astype(np.uint8))]


def numbered_samples(trained: Run, rows: Sequence[int], folder: Path | None) -> list[tuple[str, Any, str | None]]:
    """Name, input and true class of the test samples numbered ``rows`` in the data set's own order.

    Raises:
        UserError: no such sample.
    """
    if not rows:
        return []
    from better_attention.lab.data.catalogue import read
    from better_attention.lab.data.samples import Images, Pairs
    from better_attention.lab.tasks.picture_folder import FolderTask
    from better_attention.lab.tasks.recurrence import RecurrenceTask
    from better_attention.lab.tasks.text import TextTask
    from better_attention.lab.tasks.translation import TranslationTask

    inputs: Any
    if isinstance(trained.task, RecurrenceTask):
        raise UserError(
            f"--index: task {trained.task.name!r} makes its data itself. Name the symbols instead, as in '1 0 1'."
        )
    if isinstance(trained.task, TranslationTask):
        raise UserError(f"--index: {trained.task.dataset!r} has no test split of its own. Name the sentences instead.")
    splits = trained.task.load(folder)
    if splits.digest != trained.config["run"]["data_sha256"]:
        raise UserError(
            f"--index: {folder or 'what is there'} is not the data that {trained.path} was trained on. A test sample "
            "of other data may be one that it has seen; name the inputs themselves to predict all the same."
        )
    if isinstance(trained.task, FolderTask):
        test = splits.test
        inputs, labels, classes = test.inputs.numpy(), test.targets.numpy(), trained.assets["classes"]
    else:
        task = trained.task
        data = task.texts(folder) if isinstance(task, TextTask) else read(task.dataset, folder)
        assert not isinstance(data, Pairs)  # noqa: S101 - for the type checker: those of a translation
        inputs = data.test_images if isinstance(data, Images) else data.test_texts
        labels, classes = data.test_labels, data.classes
    for row in rows:
        if not 0 <= row < len(inputs):
            raise UserError(f"--index {row}: the test split has samples 0 to {len(inputs) - 1}.")
    return [(f"test sample {row}", inputs[row], classes[labels[row]]) for row in rows]
