"""Tasks: settings, splits, and what is held out."""

from __future__ import annotations

import gzip
import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from better_attention import MECHANISMS
from better_attention.lab.tasks.base import SCALES
from better_attention.lab.tasks.catalogue import TASKS
from better_attention.lab.tasks.image import ImageTask
from better_attention.lab.tasks.splits import Split, Splits
from better_attention.lab.tasks.subsets import cut
from better_attention.lab.tasks.text import TextTask
from helpers import tiny


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", TASKS)
def test_every_task_and_scale_is_whole(name: str, scale: str) -> None:
    task = TASKS[name](scale)
    assert (task.name, task.scale) == (name, scale)
    assert task.default_heads in task.heads
    if isinstance(task, ImageTask):
        assert task.length == (task.image_size // task.patch) ** 2 + task.class_token
    with torch.device("meta"):
        for mechanism in MECHANISMS:
            task.build(mechanism, task.default_heads)
    assert TASKS[name]("smoke").with_settings(json.loads(json.dumps(task.settings()))) == task


@pytest.mark.parametrize("name", TASKS)
def test_random_samples_can_be_trained_on(name: str) -> None:
    task = replace(TASKS[name]("smoke"), width=24)
    samples = task.random_samples(3)
    again = task.random_samples(3)
    assert len(samples) == 3
    assert torch.equal(samples.inputs, again.inputs)
    assert torch.equal(samples.targets, again.targets)
    assert samples.inputs.float().std() > 0
    losses = task.losses(task.build("efficient", 2)(samples.inputs), samples.targets)
    losses.sum().backward()
    assert losses.shape == (3,)
    assert losses.isfinite().all()


@pytest.mark.parametrize("name", TASKS)
def test_a_task_at_another_length_reads_that_many_tokens(name: str) -> None:
    task = TASKS[name]("smoke")
    length = 25 + getattr(task, "class_token", 0)
    longer = task.at_length(length)
    assert longer.length == length
    samples = longer.random_samples(2)
    logits = longer.build("super", task.default_heads)(samples.inputs)
    assert longer.losses(logits, samples.targets).isfinite().all()


@pytest.mark.parametrize(
    ("name", "length", "message"),
    [
        ("mnist", 26, "square pictures, which cannot have 26 patches"),
        ("cifar100", 25, "square pictures, which cannot have 25 patches"),
        ("cifar100", 1, "square pictures"),
        ("recurrence", 3, "delay=4 reads more than 3 tokens"),
    ],
)
def test_lengths_that_no_model_of_a_task_can_have(name: str, length: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TASKS[name]("smoke").at_length(length)


def test_which_tasks_read_files() -> None:
    built_in = {name for name in TASKS if not TASKS[name]("smoke").reads_files}
    assert built_in == {"digits", "recurrence"}


@pytest.mark.parametrize("name", TASKS)
def test_derived_settings_are_settings(name: str) -> None:
    task = TASKS[name]("small")
    assert set(task.derived) <= set(task.settings())
    assert not any("--" in reason for reason in task.derived.values()), "a task knows no options of the command line"


def test_numbered_samples_are_the_data_sets_own() -> None:
    task = TASKS["digits"]("smoke")
    splits = task.load()
    first, last = task.numbered_samples([0, 358], splits)
    assert (first.title, last.title) == ("test sample 0", "test sample 358")
    assert torch.equal(task.encode(first.value, splits.assets)[0], splits.test.inputs[0])
    assert last.truth == splits.assets["classes"][splits.test.targets[358]]
    for row in (-1, 359):
        with pytest.raises(ValueError, match=f"test sample {row}: the test split has samples 0 to 358"):
            task.numbered_samples([0, row], splits)


@pytest.mark.parametrize("name", [name for name in TASKS if TASKS[name]("smoke").unnumbered])
def test_samples_without_numbers_say_what_to_do(name: str) -> None:
    task = TASKS[name]("smoke")
    with pytest.raises(ValueError, match=f"task '{name}' .* Name the (symbols|sentences|text) instead"):
        task.numbered_samples([0], Splits(*[task.random_samples(3)] * 3, assets={}))


def test_the_papers_settings() -> None:
    mnist, imdb = TASKS["mnist"]("paper"), TASKS["imdb"]("paper")
    assert (mnist.layers, mnist.width, mnist.length, mnist.default_heads) == (2, 128, 64, 4)
    assert (mnist.optimiser, mnist.lr, mnist.weight_decay, mnist.batch_size) == ("adamw", 1e-3, 1e-4, 256)
    assert (imdb.layers, imdb.width, imdb.length, imdb.default_heads) == (1, 32, 32, 4)
    assert (imdb.optimiser, imdb.lr, imdb.batch_size, imdb.epochs) == ("adam", 1e-3, 64, 10)
    assert isinstance(imdb, TextTask)
    assert imdb.vocabulary == 20_000
    assert mnist.train_samples is imdb.train_samples is imdb.test_samples is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs must be >= 1"),
        ({"patience": -1}, "patience must be >= 0"),
        ({"batch_size": 2.5}, "batch_size must be a whole number"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"lr": float("nan")}, "lr must be"),
        ({"dropout": 1.5}, "dropout must be between 0 and 1"),
        ({"train_samples": 0}, "train_samples must be >= 1"),
        ({"test_samples": -1}, "test_samples must be >= 1"),
        ({"validation_share": -0.5}, "validation_share must be between 0 and 1"),
        ({"optimiser": "lion"}, "optimiser must be one of 'adam', 'adamw'"),
        ({"scale": "huge"}, "scale must be one of"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        replace(tiny.task(), **change)


def test_settings_of_another_version_are_refused() -> None:
    settings = tiny.task().settings()
    del settings["patch"]
    with pytest.raises(ValueError, match=r"unknown \['depth'\], missing \['patch'\]"):
        tiny.task().with_settings(settings | {"depth": 3})


def test_validation_is_cut_from_train_and_nothing_is_lost() -> None:
    task = replace(tiny.task(), train_samples=None, test_samples=None)
    train, validation, test = cut(task, 211, 53)
    assert sorted([*train.tolist(), *validation.tolist()]) == list(range(211))
    assert len(validation) == 21
    assert test.tolist() == list(range(53))


def test_the_cut_depends_on_the_data_seed_alone() -> None:
    task = replace(tiny.task(), train_samples=50, test_samples=7)
    first = cut(task, 211, 53)
    torch.manual_seed(99)
    again = cut(replace(task, lr=1.0, name="other"), 211, 53)
    other = cut(replace(task, data_seed=1), 211, 53)
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))
    assert [len(part) for part in first] == [45, 5, 7]
    assert len(set(torch.cat(first[:2]).tolist())) == 50


def test_a_cut_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="leaves no validation samples of 4 training"):
        cut(tiny.task(), 4, 9)


@pytest.mark.parametrize("limit", [0, 2**30])
def test_large_splits_move_batch_by_batch(limit: int) -> None:
    """The device "meta" stands in for an accelerator: what was moved there is known by its device."""
    elsewhere = torch.device("meta")
    split = Split(torch.arange(30).reshape(10, 3), torch.arange(10))
    moved = split.to(elsewhere, limit)
    assert moved.inputs.device.type == ("meta" if limit else "cpu")
    for rows in (torch.tensor([3, 1]), slice(2, 4)):
        inputs, targets = moved.batch(rows)
        assert (inputs.device, inputs.shape, targets.device) == (elsewhere, (2, 3), elsewhere)
        assert torch.equal(split.to(torch.device("cpu")).batch(rows)[0], split.inputs[rows])


@pytest.mark.parametrize(("first", "step"), [(0, 1), (0, 3), (1, 3), (2, 3), (11, 12)])
def test_batches_hold_every_sample_of_a_share_once(first: int, step: int) -> None:
    split = Split(torch.arange(30).reshape(10, 3), torch.arange(10))
    parts = list(split.batches(2, first, step))
    assert torch.cat([targets for _, targets in parts]).tolist() == list(range(first, 10, step))
    assert torch.cat([inputs for inputs, _ in parts])[:, 0].tolist() == list(range(3 * first, 30, 3 * step))
    assert len(parts) == max(1, -(-len(range(first, 10, step)) // 2))


def test_digits_load_whole_and_always_the_same() -> None:
    task = TASKS["digits"]("small")
    splits = task.load()
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [1_294, 144, 359]
    assert splits.train.inputs.dtype == torch.uint8
    assert splits.digest == task.load().digest
    assert splits.digest != replace(task, data_seed=1).load().digest
    assert splits.assets["classes"] == [str(digit) for digit in range(10)]
    held = {bytes(image.numpy()) for image in splits.test.inputs}
    assert not held & {bytes(image.numpy()) for image in splits.train.inputs}


def test_mnist_is_padded_with_black_on_all_sides(tmp_path: Path, rng: np.random.Generator) -> None:
    images = rng.integers(1, 256, (20, 28, 28), dtype=np.uint8)
    labels = np.arange(20, dtype=np.uint8) % 10
    for split in ("train", "t10k"):
        pixels = struct.pack(">IIII", 0x803, 20, 28, 28) + images.tobytes()
        (tmp_path / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(pixels))
        numbers = struct.pack(">II", 0x801, 20) + labels.tobytes()
        (tmp_path / f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(numbers))
    splits = TASKS["mnist"]("paper").load(tmp_path)
    assert splits.test.inputs.shape == (20, 32, 32)
    assert torch.equal(splits.test.inputs[:, 2:30, 2:30], torch.from_numpy(images))
    assert int(splits.test.inputs.sum()) == int(images.sum())
    assert splits.test.targets.tolist() == labels.tolist()


def reviews(folder: Path) -> None:
    """Twenty reviews a class and split, each holding a word of its own."""
    for split in ("train", "test"):
        for label, rating in (("neg", 2), ("pos", 9)):
            (folder / "aclImdb" / split / label).mkdir(parents=True)
            for number in range(20):
                text = f"the film was {label} own{split}{label}{number}"
                (folder / "aclImdb" / split / label / f"{number}_{rating}.txt").write_text(text, encoding="utf-8")


def test_the_vocabulary_knows_training_texts_alone(tmp_path: Path) -> None:
    reviews(tmp_path)
    splits = TASKS["imdb"]("paper").load(tmp_path)
    own = [word for word in splits.assets["vocabulary"] if word.startswith("own")]
    assert len(own) == len(splits.train) == 36
    assert all(word.startswith("owntrain") for word in own)
    assert not (splits.train.inputs == 1).any()  # no unknown word where the vocabulary comes from
    assert ((splits.validation.inputs == 1).sum(1) == 1).all()
    assert ((splits.test.inputs == 1).sum(1) == 1).all()
    assert (splits.test.inputs[:, : 32 - 5] == 0).all()


def test_text_tasks_encode_and_show_what_they_were_trained_on(tmp_path: Path) -> None:
    reviews(tmp_path)
    task = TASKS["imdb"]("smoke")
    splits = task.load(tmp_path)
    encoded = task.encode("The film was POS, nowhere seen", splits.assets)
    assert task.show(encoded[0], splits.assets).tokens == ("",) * 26 + ("the", "film", "was", "pos", "?", "?")
    assert torch.equal(encoded, task.encode(["the film was pos nowhere seen"], splits.assets))
    with pytest.raises(TypeError, match=r"reads texts \(str\), received 3 \(int\)"):
        task.encode(["a", 3], splits.assets)


def test_image_tasks_encode_what_they_were_trained_on() -> None:
    task, splits = tiny.task(), tiny.splits()
    image = splits.test.inputs[3].numpy()
    assert torch.equal(task.encode(image, splits.assets)[0], splits.test.inputs[3])
    assert task.encode([image, image], splits.assets).shape == (2, 8, 8)
    picture = task.show(splits.test.inputs[3], splits.assets).picture
    assert picture is not None
    assert picture.max() == 255


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (np.zeros((7, 8)), r"received float64 of shape \(7, 8\)"),
        (np.full((8, 8), 17), r"received values from 17 to 17"),
        (np.full((8, 8), "a"), "received <U1"),
        ([np.zeros((8, 8)), np.zeros((9, 9))], "different sizes"),
    ],
)
def test_images_that_cannot_be_read_are_refused(inputs: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.task().encode(inputs, {})


def test_one_logit_is_the_logit_of_class_one_of_two() -> None:
    task, z, targets = tiny.task(), torch.randn(7, 1), torch.tensor([0, 1, 1, 0, 1, 0, 1])
    both = torch.cat([torch.zeros_like(z), z], dim=1)
    torch.testing.assert_close(task.losses(z, targets), F.cross_entropy(both, targets, reduction="none"))
    torch.testing.assert_close(task.losses(both, targets), task.losses(z, targets))
    torch.testing.assert_close(task.probabilities(z), both.softmax(dim=1))
    assert torch.equal(task.correct(z, targets), both.argmax(1) == targets)
    assert torch.equal(task.correct(both, targets), both.argmax(1) == targets)


@pytest.mark.data
@pytest.mark.parametrize(("name", "sizes"), [("mnist", (54_000, 6_000, 10_000)), ("imdb", (22_500, 2_500, 25_000))])
def test_the_real_data_are_complete(real_data: Path, name: str, sizes: tuple[int, int, int]) -> None:
    splits = TASKS[name]("paper").load(real_data)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == sizes
    if name == "imdb":
        assert len(splits.assets["vocabulary"]) == 20_000 - 2
