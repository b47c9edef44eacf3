"""Image tasks beyond digits: augmentation, top 5, table 7, and pictures of one's own from the folder to the report."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from scipy.ndimage import affine_transform
from sklearn.metrics import top_k_accuracy_score
from torch import nn

from better_attention.cli import main
from better_attention.lab.comparison.compare import compare
from better_attention.lab.comparison.plan import Plan
from better_attention.lab.data.samples import DataError, NotFetched
from better_attention.lab.paper import beside
from better_attention.lab.runs.load import load_run
from better_attention.lab.tasks import picture_notes
from better_attention.lab.tasks.augmentation import TURN, affine_maps, keras_augmented
from better_attention.lab.tasks.catalogue import TASKS
from better_attention.lab.tasks.image import ImageTask
from better_attention.lab.tasks.picture_folder import FolderTask
from better_attention.lab.tasks.splits import Split
from better_attention.lab.tasks.variant import Variant
from better_attention.lab.training.progress import Interrupted
from helpers import studies, tiny
from helpers.layouts import mnist_arrays, write_mnist

# --- augmentation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [None, 3])
def test_augmentation_samples_as_scipy_does(channels: int | None) -> None:
    """scipy's "reflect" is Keras': d c b a | a b c d. Rows come first there, and coordinates are pixels."""
    images = torch.randint(256, (5, 12, 12, *([channels] if channels else [])), dtype=torch.uint8)
    torch.manual_seed(7)
    drawn = torch.rand(5, 4).double().tolist()
    torch.manual_seed(7)
    ours = keras_augmented(images).reshape(5, 12, 12, -1)
    assert ours.dtype == torch.float32
    centre = np.array([5.5, 5.5])
    for image, (flip, turn, wide, high), result in zip(images.reshape(5, 12, 12, -1), drawn, ours, strict=True):
        angle = 0.02 * 2 * math.pi * (2 * turn - 1)
        rotation = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
        zoom = np.diag([0.8 + 0.4 * high, 0.8 + 0.4 * wide])
        matrix = np.diag([1.0, -1.0 if flip < 0.5 else 1.0]) @ rotation @ zoom
        for channel in range(image.shape[2]):
            plane = image[..., channel].numpy().astype(np.float64)
            expected = affine_transform(plane, matrix, centre - matrix @ centre, order=1, mode="reflect")
            np.testing.assert_allclose(result[..., channel], expected, atol=0.02)


def test_half_are_flipped_and_all_stay_within_the_examples_limits() -> None:
    maps = affine_maps(torch.rand(4000, 4)).double()
    flipped = torch.det(maps[:, :, :2]) < 0
    assert 1850 < int(flipped.sum()) < 2150
    width, height = maps[:, :, 0].norm(dim=1), maps[:, :, 1].norm(dim=1)
    for side in (width, height):
        assert 0.8 <= side.min() < 0.81
        assert 1.19 < side.max() <= 1.2
    angle = torch.atan2(maps[:, 1, 0], maps[:, 0, 0] * torch.where(flipped, -1.0, 1.0))
    assert 0.95 * TURN < angle.abs().max() <= TURN * 1.0001
    assert abs(float(angle.mean())) < 0.1 * TURN
    assert torch.corrcoef(torch.stack([width, height]))[0, 1].abs() < 0.1
    assert torch.equal(maps[:, :, 2], torch.zeros(4000, 2, dtype=torch.float64))


def test_augmentation_draws_from_the_default_generator_alone() -> None:
    images = torch.randint(256, (3, 8, 8), dtype=torch.uint8)
    torch.manual_seed(5)
    first, after = keras_augmented(images), torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(keras_augmented(images), first)
    assert torch.equal(torch.rand(1), after)
    assert not torch.equal(keras_augmented(images), first)
    assert keras_augmented(images[:0]).shape == (0, 8, 8)
    assert first.min() >= 0
    assert first.max() <= 255


def test_only_training_is_augmented_and_only_where_it_is_asked_for() -> None:
    images = tiny.splits().train.inputs[:3]
    assert tiny.task().augment(images) is images
    assert not torch.equal(tiny.task(augmentation="keras").augment(images), images.float())
    with pytest.raises(ValueError, match="augmentation must be one of 'none', 'keras', received 'mixup'"):
        tiny.task(augmentation="mixup")


def test_an_interrupted_run_with_augmentation_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole = tiny.training(tmp_path / "whole", augmentation="keras").run().values
    asked = iter([False] * 8 + [True])
    with pytest.raises(Interrupted):
        tiny.training(tmp_path / "cut", augmentation="keras", stop=lambda: next(asked)).run()
    assert tiny.training(tmp_path / "cut", augmentation="keras").run().values["test_loss"] == whole["test_loss"]
    assert tiny.training(tmp_path / "plain").run().values["test_loss"] != whole["test_loss"]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]


# --- top 5 ------------------------------------------------------------------------------------------------------------


def test_top_5_is_sklearns() -> None:
    logits = torch.randn(700, 10).double()
    split = Split(torch.arange(700)[:, None], torch.randint(10, (700,)))
    model: Any = lambda rows: logits[rows[:, 0]]  # noqa: E731 - a model is a function here
    task = tiny.task(top5=True)
    expected = 100 * top_k_accuracy_score(split.targets.numpy(), logits.numpy(), k=5)
    assert task.scores(model, split, {}) == {"top5": pytest.approx(expected)}
    assert replace(task, top5=False).scores(model, split, {}) == {}
    assert replace(task, classes=5).scores(model, split, {}) == {}


def test_top_5_is_in_the_record(tmp_path: Path) -> None:
    record = tiny.training(tmp_path, top5=True, class_token=True).run().values
    assert record["test_accuracy"] < record["test_top5"] <= 100
    assert record["train_top5"] > record["train_accuracy"]


# --- the paper's models -----------------------------------------------------------------------------------------------


def total(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_cifar100_has_the_papers_attention_parameters() -> None:
    task = TASKS["cifar100"]("paper")
    assert isinstance(task, ImageTask)
    assert (task.length, task.layers, task.width, task.default_heads) == (257, 8, 256, 8)
    with torch.device("meta"):
        for mechanism, attention in (("standard", 263_168), ("super", 197_890)):
            model = task.build(mechanism, 8)
            assert sum(p.numel() for name, p in model.named_parameters() if "attention" in name) == 8 * attention


@pytest.mark.parametrize(
    ("variant", "width", "layers", "millions"),
    [
        ("standard", 768, 8, "60.54"),
        ("optimised", 816, 8, "60.12"),
        ("efficient", 804, 9, "60.09"),
        ("super", 804, 9, "60.44"),
        ("expressive", 768, 8, "60.54"),
        ("super+expressive", 804, 9, "60.44"),
        ("super+identity", 804, 9, "60.44"),
    ],
)
def test_equal_parameters_on_imagenet_are_those_of_table_7(
    variant: str, width: int, layers: int, millions: str
) -> None:
    task = replace(TASKS["imagenet"]("paper"), equal_params=True)
    sized = task.sized(Variant.of(variant), 12)
    assert (sized.width, sized.layers) == (width, layers)
    with torch.device("meta"):
        assert f"{total(task.build(variant, 12)) / 1e6:.2f}" == millions
        assert total(replace(task, equal_params=False).build("super", 12)) < 54e6


@pytest.mark.parametrize(
    ("variant", "heads", "changes"),
    [("super+per-head", 12, {}), ("standard+align", 12, {}), ("super", 8, {}), ("super", 12, {"width": 384})],
)
def test_what_table_7_does_not_have_gets_the_nearest_width(variant: str, heads: int, changes: dict[str, int]) -> None:
    task = replace(TASKS["imagenet"]("paper"), equal_params=True, **changes)
    assert task.sized(Variant.of(variant), heads).layers == 8
    with torch.device("meta"):
        assert total(task.build(variant, heads)) == pytest.approx(total(task.build("standard", 12)), rel=0.02)


# --- pictures of one's own --------------------------------------------------------------------------------------------

CLASSES = {"ants": (220, 40, 40), "bees": (40, 220, 40), "cats": (40, 40, 220)}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty noisy pictures of each of three colours, every one of another size."""
    folder, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name, colour in CLASSES.items():
        (folder / name).mkdir()
        for number in range(20):
            noise = random.integers(-30, 30, (9 + number, 12, 3))
            Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(
                folder / name / f"{number}.png"
            )
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def small(**changes: Any) -> FolderTask:
    task = TASKS["images"]("smoke")
    assert isinstance(task, FolderTask)
    sizes: dict[str, Any] = {"image_size": 8, "patch": 4, "width": 8, "layers": 1, "batch_size": 8, "epochs": 12}
    return replace(task, **(sizes | {"lr": 0.02, "dropout": 0.0, "head_dropout": 0.0} | changes))


def test_compare_images_from_the_folder_to_the_prediction(photos: Path, tmp_path: Path) -> None:
    variants = [Variant.of("standard"), Variant.of("super")]
    plan = Plan(task=small(), variants=variants, heads=(2,), seeds=1, out=tmp_path, data=photos, device="cpu")
    study, failed = compare(plan)
    assert failed == []
    for record in study.records:
        assert record["test_accuracy"] > 90  # the colours tell everything
        assert sum(record["samples"].values()) == 60
    assert any("no split of its own" in note for note in study.notes)
    assert "data:image/png" in (tmp_path / "report.html").read_text("utf-8")

    run = load_run(tmp_path / "super-h2-s0")
    assert (run.task.settings()["classes"], run.task.settings()["channels"], run.task.length) == (3, 3, 4)
    colours = [np.full(shape, colour, np.uint8) for shape, colour in zip(
        ((30, 9, 3), (8, 8, 3), (11, 200, 3)), CLASSES.values(), strict=True)]  # fmt: skip
    assert [found.label for found in run.predict(colours)] == list(CLASSES)
    assert run.predict(photos / "bees" / "7.png")[0].label == "bees"
    assert run.predict([str(photos / "cats" / "7.png"), colours[0]])[0].label == "cats"
    assert run.predict(np.stack([colours[1]] * 2))[1].label == "bees"
    assert run.predict([]) == []


def test_from_the_command_line(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    sizes = ["width=8", "layers=1", "image_size=8", "dropout=0.0", "head_dropout=0.0"]
    options = [part for size in sizes for part in ("--set", size)] + ["--epochs", "10", "--lr", "0.02"]
    command = ["compare", "images", "--scale", "smoke", "--mechanisms", "super", "--heads", "2", "--device", "cpu"]
    assert main.main([*command, *options, "--batch-size", "8", "--data", str(photos), "--out", str(out)]) == 0
    capsys.readouterr()
    run = str(out / "super-h2-s0")
    assert main.main(["predict", run, str(photos / "ants" / "3.png"), str(photos / "cats" / "4.png"), "--json"]) == 0
    assert [row["class"] for row in json.loads(capsys.readouterr().out)] == ["ants", "cats"]
    assert main.main(["predict", run, "--index", "0", "--data", str(photos), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["class"] == row["truth"]
    (tmp_path / "text.png").write_text("no picture")
    assert main.main(["predict", run, str(tmp_path / "text.png")]) == 2
    assert "text.png is no JPEG, PNG" in capsys.readouterr().err
    assert main.main(["predict", run, "--index", "99", "--data", str(photos)]) == 2
    assert "test sample 99: the test split has samples 0 to" in capsys.readouterr().err


def test_splits_hold_each_picture_once(photos: Path) -> None:
    task = small(image_size=16).fitted(photos)
    splits = task.load(photos)
    parts = (splits.train, splits.validation, splits.test)
    seen = Counter(bytes(image.numpy()) for part in parts for image in part.inputs)
    assert len(seen) == 60
    assert set(seen.values()) == {1}
    assert splits.digest == task.load(photos).digest
    assert splits.assets == {"classes": list(CLASSES)}
    for part in parts:
        means = part.inputs.float().mean(dim=(1, 2))
        assert torch.equal(means.argmax(dim=1), part.targets)
    fewer = replace(task, train_samples=20, test_samples=2).load(photos)
    assert [len(part) for part in (fewer.train, fewer.validation, fewer.test)] == [18, 2, 2]
    assert {bytes(image.numpy()) for image in fewer.train.inputs} <= set(seen)
    with pytest.raises(ValueError, match=r"is set to 2 classes of 32 pixels a side, but .* has 3 and image_size is 16"):
        small(image_size=16).load(photos)


def test_pictures_on_both_sides_are_counted(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Test holds 3 of the 36 training pictures under other names, validation one, and the two share a fourth."""
    parts = {"train": range(12), "val": (0, 12, 13, 14), "test": (3, 5, 13, 15, 16)}
    for top, names in parts.items():
        for name in CLASSES:
            (tmp_path / top / name).mkdir(parents=True)
            for number in names:
                if top == "train" or name == "ants" or number > 11:
                    picture = (photos / name / f"{number}.png").read_bytes()
                    (tmp_path / top / name / f"{top}-{number}.png").write_bytes(picture)
    (tmp_path / "test" / "bees" / "2.png").write_bytes((photos / "bees" / "2.png").read_bytes())
    task = small(image_size=16).fitted(tmp_path)
    splits = task.load(tmp_path)
    notes = [note for note in splits.notes if "pixel by pixel" in note]
    assert picture_notes.overlap_notes(splits) == tuple(notes)
    assert notes == [
        "1 of 10 validation pictures are training pictures too, pixel by pixel",
        "3 of 12 test pictures are training pictures too, pixel by pixel",
    ]
    assert picture_notes.overlap_notes(splits, searched=1000) == ()


def test_the_digits_have_none_on_both_sides_and_say_nothing() -> None:
    assert not any("pixel by pixel" in note for note in tiny.splits().notes)


def test_a_validation_split_of_the_datas_own_is_kept(photos: Path, tmp_path: Path) -> None:
    for top, names in (("train", range(12)), ("val", range(12, 16)), ("test", range(16, 20))):
        for name in CLASSES:
            (tmp_path / top / name).mkdir(parents=True)
            for number in names:
                (tmp_path / top / name / f"{number}.png").write_bytes((photos / name / f"{number}.png").read_bytes())
    task = small().fitted(tmp_path)
    splits = task.load(tmp_path)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [36, 12, 12]
    fewer = replace(task, train_samples=20).load(tmp_path)
    assert [len(part) for part in (fewer.train, fewer.validation, fewer.test)] == [18, 2, 12], "as many as of texts"
    for picture in list((tmp_path / "train").glob("*/*.png")):
        if int(picture.stem) > 0:
            picture.unlink()  # three are left, of which nothing could be cut
    for changed in (task, replace(task, train_samples=None, validation_share=0.0)):
        few = changed.load(tmp_path)
        assert [len(part) for part in (few.train, few.validation, few.test)] == [3, 12, 12]
    own = small(image_size=8).fitted(tmp_path / "val").load(tmp_path / "val")
    pictures = {bytes(image.numpy()) for part in (own.train, own.validation, own.test) for image in part.inputs}
    assert {bytes(image.numpy()) for image in splits.validation.inputs} == pictures


def test_grey_pictures_make_a_grey_model(tmp_path: Path) -> None:
    for label in range(2):
        (tmp_path / f"class{label}").mkdir()
        for number in range(20):
            image = Image.new("L", (10, 10), 200 * label + number)
            image.save(tmp_path / f"class{label}" / f"{number}.png")
    task = small(class_token=True).fitted(tmp_path)
    assert (task.channels, task.length) == (1, 5)
    inputs, targets = task.load(tmp_path).train.inputs, task.load(tmp_path).train.targets
    assert inputs.shape[1:] == (8, 8)
    assert torch.equal(inputs[:, 0, 0] >= 200, targets == 1)
    assert task.encode(np.zeros((4, 20, 30), np.uint8), {}).shape == (4, 8, 8)
    assert task.encode(np.zeros((20, 30), np.uint8), {}).shape == (1, 8, 8)


def test_nearly_black_pictures_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve bits of content in files of sixteen: what many cameras and scanners write."""
    random = np.random.default_rng(0)
    for label in range(2):
        (tmp_path / f"class{label}").mkdir()
        for number in range(20):
            values = random.integers(0, 4096, (10, 10), dtype=np.uint16) * (16 if number < 5 else 1)
            Image.fromarray(values).save(tmp_path / f"class{label}" / f"{number}.png")
    task = small().fitted(tmp_path)
    splits = task.load(tmp_path)
    assert [note for note in splits.notes if "nearly black" in note] == [
        "30 of 40 pictures are nearly black, no pixel brighter than 31 of 255: files of 16 bits that use 12 or fewer "
        "look like this; scale their values up to white before training"
    ]
    assert len(picture_notes.dark_notes(splits)) == 1
    assert picture_notes.dark_notes(splits, searched=1000) == ()


def test_bright_pictures_are_not_called_nearly_black(photos: Path) -> None:
    assert not any("nearly black" in note for note in small().fitted(photos).load(photos).notes)


def test_coloured_pictures_are_read_as_grey_ones_if_asked(photos: Path) -> None:
    task = small(channels=1).fitted(photos)
    assert task.channels == 1
    assert task.load(photos).train.inputs.shape[1:] == (8, 8)
    assert small().fitted(photos).channels == 3


def test_the_length_follows_from_image_and_patch() -> None:
    mnist = TASKS["mnist"]("paper")
    assert isinstance(mnist, ImageTask)
    assert replace(mnist, patch=8).length == replace(mnist, patch=8, length=3).length == 16
    with pytest.raises(ValueError, match="patch must be <= image_size=32, received 64"):
        replace(mnist, patch=64)


def test_images_are_padded_and_never_cut() -> None:
    with pytest.raises(ValueError, match="image_size must be >= 8, received 4"):
        tiny.task(image_size=4).load()


@pytest.mark.parametrize(
    "picture", [np.zeros((5, 5)), np.zeros((5, 5, 4), np.uint8), np.zeros((0, 5), np.uint8), np.zeros(5, np.uint8), 3]
)
def test_arrays_that_are_no_pictures_are_refused(picture: object) -> None:
    with pytest.raises(ValueError, match=r"task 'images' reads picture files, or uint8 pixels"):
        small(raw_size=8).encode([picture], {})


def test_without_data_it_says_where_to_name_it(tmp_path: Path) -> None:
    for name in ("images", "imagenet"):
        with pytest.raises(NotFetched, match=rf"task '{name}' reads picture files: name them with `--data DIR`"):
            TASKS[name]("smoke").fitted()
    with pytest.raises(DataError, match="nowhere does not exist"):
        TASKS["images"]("smoke").fitted(tmp_path / "nowhere")


def test_a_part_of_imagenet_says_so(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "imagenet").mkdir()
    for top in ("train", "val"):
        (tmp_path / "imagenet" / top).symlink_to(photos)
    task = replace(TASKS["imagenet"]("smoke"), image_size=16).fitted(tmp_path)
    splits = task.load(tmp_path)
    assert "60 training and 60 test samples, where the official set has 1,281,167 and 50,000" in splits.notes
    assert "val/ is the test split here; validation is cut from train/" in splits.notes


def shapes(folder: Path, colour: tuple[int, int, int], each: int = 20) -> Path:
    """Discs and bars of one colour on a transparent ground."""
    for label in ("bar", "disc"):
        (folder / label).mkdir()
        for number in range(each):
            image = Image.new("RGBA", (16, 16), (*colour, 0))
            draw = ImageDraw.Draw(image)
            box = (1 + number % 5, 4, 12, 6 + (label == "disc") * 6)
            (draw.ellipse if label == "disc" else draw.rectangle)(box, fill=(*colour, 255))
            image.save(folder / label / f"{number}.png")
    return folder


@pytest.mark.parametrize(("colour", "blank"), [((255, 255, 255), 40), ((250, 250, 250), 40), ((200, 0, 0), 0)])
def test_shapes_that_vanish_on_white_are_told(tmp_path: Path, colour: tuple[int, int, int], blank: int) -> None:
    task = small().fitted(shapes(tmp_path, colour))
    notes = [note for note in task.load(tmp_path).notes if "blank" in note]
    assert len(notes) == bool(blank)
    if blank:
        assert f"{blank} of 40 pictures are blank" in notes[0]
        assert "White shapes on a transparent ground" in notes[0]


def broken(photos: Path, folder: Path, number: int = 15) -> Path:
    """A copy of the photos in which some of the bees and ants cannot be read."""
    shutil.copytree(photos, folder)
    for row in range(number):
        (folder / ("ants", "bees")[row % 2] / f"{row}.png").write_bytes(b"\x89PNG\r\n\x1a\n cut short")
    return folder


def test_damaged_pictures_are_named_and_counted_and_can_be_left_out(photos: Path, tmp_path: Path) -> None:
    place = broken(photos, tmp_path / "photos")
    task = small().fitted(place)
    with pytest.raises(
        ValueError, match=r"\n\.\.\. and 5 more\. To do without them: `--set damaged=leave-out`"
    ) as told:
        task.load(place)
    assert str(told.value).count("\n") == 10
    whole, left = task.load(photos), replace(task, damaged="leave-out").load(place)
    assert sum(left.sizes.values()) == sum(whole.sizes.values()) - 15
    assert any("15 of 60 pictures cannot be decoded and are left out; the first: " in note for note in left.notes)
    kept = {bytes(x.numpy()) for part in (whole.train, whole.validation, whole.test) for x in part.inputs}
    for name, part in (("train", left.train), ("validation", left.validation), ("test", left.test)):
        assert {bytes(x.numpy()) for x in part.inputs} <= kept, name
        assert {bytes(x.numpy()) for x in part.inputs} <= {bytes(x.numpy()) for x in getattr(whole, name).inputs}
        means = part.inputs.float().mean(dim=(1, 2))
        assert means.sub(torch.tensor(list(CLASSES.values()))[part.targets]).abs().max() < 30
    again = replace(task, damaged="leave-out").load(place)
    assert again.digest == left.digest


def test_a_whole_set_is_the_same_with_damaged_pictures_left_out(photos: Path) -> None:
    task = small().fitted(photos)
    assert replace(task, damaged="leave-out").load(photos).notes == task.load(photos).notes
    with pytest.raises(ValueError, match="damaged must be"):
        replace(task, damaged="maybe")


def test_a_class_of_damaged_pictures_is_not_left_out(photos: Path, tmp_path: Path) -> None:
    place = tmp_path / "photos"
    shutil.copytree(photos, place)
    for file in (place / "bees").iterdir():
        file.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"every picture of class 'bees' is damaged, the first so: .*is no JPEG"):
        replace(small().fitted(place), damaged="leave-out").load(place)


@pytest.mark.slow
def test_left_out_from_the_command_line(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place, out = broken(photos, tmp_path / "photos", 3), tmp_path / "out"
    sizes = [part for size in ("width=8", "layers=1", "image_size=8") for part in ("--set", size)]
    command = ["compare", "images", "--scale", "smoke", "--mechanisms", "efficient", "--heads", "2", "--device", "cpu"]
    command += [*sizes, "--epochs", "1", "--data", str(place), "--out", str(out)]
    assert main.main(command) == 2
    assert "`--set damaged=leave-out`" in capsys.readouterr().err
    assert main.main([*command, "--set", "damaged=leave-out"]) == 0
    assert "3 of 60 pictures cannot be decoded and are left out" in (out / "report.html").read_text("utf-8")


@pytest.mark.slow
def test_data_that_is_not_mnist_says_so_wherever_the_result_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_mnist(tmp_path / "data", mnist_arrays(60, 40, 28, 28), compress=False)
    command = ["compare", "mnist", "--scale", "smoke", "--mechanisms", "efficient", "--heads", "1", "--device", "cpu"]
    sizes = ["train_samples=30", "test_samples=20", "width=8", "layers=1"]
    command += [part for size in sizes for part in ("--set", size)]
    assert main.main([*command, "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    (record,) = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))
    (departure,) = record["departures"]
    assert departure.startswith("60 training and 40 test samples, where the official set has 60,000 and 10,000")
    assert departure in (tmp_path / "out" / "report.html").read_text("utf-8")
    monkeypatch.setenv("COLUMNS", "300")
    assert main.main(["table", "5", str(tmp_path / "out"), "--csv", str(tmp_path / "table.csv")]) == 0
    assert f"≠ Our data: {departure}" in capsys.readouterr().out
    assert departure in (tmp_path / "table.csv").read_text("utf-8")
    assert main.main(["runs", str(tmp_path / "out")]) == 0
    assert f"≠ efficient-h1-s0: {departure[:40]}" in capsys.readouterr().out
    assert main.main(["runs", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["departures"] == [departure]
    assert main.main(["table", "5", str(tmp_path / "out"), "--json"]) == 0
    blocks = json.loads(capsys.readouterr().out)["blocks"]
    assert [(block["departures"], block["paper_scale"]) for block in blocks] == [([departure], False)]


def test_other_data_is_never_averaged_with_the_published(tmp_path: Path) -> None:
    record = studies.record("standard", 0, 4, task="mnist", scale="paper", settings=TASKS["mnist"]("paper").settings())
    other = {**record, "seed": 1, "departures": ["not MNIST: other data"]}
    (tmp_path / "results.json").write_text(json.dumps([record, other]), "utf-8")
    found = beside.blocks(5, [tmp_path / "results.json"])
    assert [(block.ours.departures, len(block.ours.records)) for block in found if block.ours] == [
        ((), 1),
        (("not MNIST: other data",), 1),
    ]
