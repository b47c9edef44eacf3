"""Amazon and the user's own texts as tasks: sizes, what is fitted, what is held out, a comparison from end to end."""

from __future__ import annotations

import csv
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from better_attention import MultiheadAttention
from better_attention.cli import main
from better_attention.lab.data.samples import Texts
from better_attention.lab.runs.load import load_run
from better_attention.lab.tasks.base import Task
from better_attention.lab.tasks.catalogue import TASKS
from better_attention.lab.tasks.subsets import subsets
from better_attention.lab.tasks.text import OwnTextTask, TextTask


def text_task(name: str, scale: str = "paper") -> TextTask:
    task = TASKS[name](scale)
    assert isinstance(task, TextTask)
    return task


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize(
    ("mechanism", "count"), [("standard", 16_640), ("optimised", 12_480), ("efficient", 8_320), ("super", 12_480)]
)
def test_the_papers_parameters_of_each_attention_layer(mechanism: str, count: int, heads: int) -> None:
    """Table 9 of arXiv 2403.01643."""
    with torch.device("meta"):
        model = TASKS["amazon"]("paper").build(mechanism, heads)
    layers = [module for module in model.modules() if isinstance(module, MultiheadAttention)]
    assert [parameters(layer) for layer in layers] == [count] * 3
    assert parameters(model) == pytest.approx(2.6e6, rel=0.02)  # section 4.2: "2.6M (Amazon)"


def test_the_papers_settings() -> None:
    task = text_task("amazon")
    assert (task.layers, task.width, task.length, task.classes, task.vocabulary) == (3, 64, 64, 5, 40_000)
    assert (task.heads, task.default_heads, task.seeds) == ((1, 2, 4), 4, 5)
    assert (task.optimiser, task.lr, task.batch_size) == ("adam", 1e-3, 64)
    assert task.patience > 0  # "until validation loss flattens"
    assert task.train_samples is task.test_samples is None


# --- the user's own texts ---------------------------------------------------------------------------------------------

COLOURS = ("red", "green", "blue")


def write_reviews(path: Path, number: int = 300, names: tuple[str, str] = ("text", "label")) -> Path:
    """Texts that name their class, each with a word of its own."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for i in range(number):
            words = ["it", "was", "all", COLOURS[i % 3], "then", f"own{i}"]
            draw.shuffle(words)
            writer.writerow([" ".join(words) + ',\n"they said"', COLOURS[i % 3]])
    return path


def test_classes_and_words_are_those_of_the_file(tmp_path: Path) -> None:
    path = write_reviews(tmp_path / "a.csv")
    task = text_task("text").fitted(path)
    splits = task.load(path)
    assert (task.classes, splits.assets["classes"]) == (3, ["blue", "green", "red"])
    words = splits.assets["vocabulary"]
    own = [word for word in words if word.startswith("own")]
    assert len(own) == len(splits.train) == 240  # each training text has one, and no other text has a say
    assert task.vocabulary == len(words) + 2 == 240 + 6 + 3 + 2  # it was all then they said; colours; padding, unknown
    assert int(splits.train.inputs.max()) == task.vocabulary - 1
    assert (splits.test.inputs == 1).sum(1).tolist() == [1] * 30
    assert text_task("text").with_settings(json.loads(json.dumps(task.settings()))) == task


def test_the_limits_of_what_is_fitted(tmp_path: Path) -> None:
    path = write_reviews(tmp_path / "a.csv")
    assert replace(text_task("text"), vocabulary=7).fitted(path).vocabulary == 7
    assert text_task("text").fitted(path).head == 20
    many = tmp_path / "many.csv"
    many.write_text("text,label\n" + "".join(f"text {i},{i % 21}\n" for i in range(420)), encoding="utf-8")
    fitted = text_task("text").fitted(many)
    assert (fitted.classes, fitted.head) == (21, 21)
    assert text_task("imdb").fitted(many) == text_task("imdb")
    assert "text_column" not in text_task("imdb").settings()


@pytest.mark.parametrize(("limit", "sizes"), [(None, (240, 30, 30)), (100, (90, 10, 7)), (10_000, (240, 30, 7))])
def test_smaller_scales_take_subsets_of_every_part(
    tmp_path: Path, limit: int | None, sizes: tuple[int, int, int]
) -> None:
    path = write_reviews(tmp_path / "a.csv")
    task = replace(text_task("text"), train_samples=limit, test_samples=7 if limit else None).fitted(path)
    splits = task.load(path)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == sizes
    assert splits.digest == task.load(path).digest
    if limit == 100:
        assert splits.digest != replace(task, data_seed=1).load(path).digest


def test_subsets_that_leave_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"leaves no training or no validation samples \(train_samples=3, validation_"):
        subsets(replace(text_task("text"), train_samples=3), 90, 10, 10)


class Tripwire(TextTask):
    """A task whose data set's validation split must be used, not one cut from training."""

    def texts(self, folder: Path | None = None) -> Texts:
        """Texts that tell their part."""
        import numpy as np

        labels = np.arange(20, dtype=np.int64) % 2
        train, test, held = ([f"{part} {i}" for i in range(20)] for part in ("train", "test", "held"))
        return Texts("tripwire", train, labels, test, labels, ("a", "b"), (), held, labels)


def test_a_validation_split_of_the_datas_own_is_kept() -> None:
    fields: dict[str, Any] = {name: getattr(text_task("imdb"), name) for name in text_task("imdb").settings()}
    splits = Tripwire(**fields).load()
    assert sorted(splits.assets["vocabulary"]) == sorted(["train", *map(str, range(20))])
    assert splits.validation.targets.tolist() == [0, 1] * 10
    assert (splits.validation.inputs[:, -2] == 1).all()  # "held" is unknown
    assert len(splits.train) == 20


TINY = ("--set", "width=8", "--set", "length=8", "--set", "layers=1", "--set", "dropout=0", "--lr", "0.01")
SHORT = ("--seeds", "1", "--batch-size", "16", "--device", "cpu", "--epochs", "8", "--scale", "paper")


def compare(data: Path, out: Path, *more: str) -> int:
    return main.main(["compare", "text", "--data", str(data), "--out", str(out), *TINY, *SHORT, *more])


def test_a_file_becomes_a_comparison_and_its_models_read_new_texts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_reviews(tmp_path / "my reviews.csv", names=("Body", "Colour"))
    columns = ("--set", "text_column=body", "--set", "label_column=colour")
    out = tmp_path / "out"
    assert compare(path, out, "--mechanisms", "standard,super", *columns) == 0
    records = json.loads((out / "results.json").read_text())
    assert [record["mechanism"] for record in records] == ["standard", "super"]
    assert all(record["test_accuracy"] > 90 for record in records)  # guessing is right for a third
    assert records[0]["samples"] == {"train": 240, "validation": 30, "test": 30}
    report = (out / "report.html").read_text("utf-8")
    assert "guessing &#39;blue&#39;, the most frequent class, is right for 33.3 % of the test samples" in report
    assert "texts from column &#39;Body&#39;, classes from column &#39;Colour&#39; of my reviews.csv" in report

    run = load_run(out / "super-h4-s0")
    assert isinstance(run.task, OwnTextTask)
    assert (run.task.text_column, run.task.classes) == ("body", 3)
    found = run.predict(["it was GREEN, all green", "blue then"])
    assert [prediction.label for prediction in found] == ["green", "blue"]
    assert list(found[0].probabilities) == ["blue", "green", "red"]

    capsys.readouterr()
    assert main.main(["predict", str(out / "super-h4-s0"), "--index", "29", "--data", str(path), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["truth"] == row["class"]


def test_a_folder_of_parts_becomes_a_comparison(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    write_reviews(folder / "train.csv", 90)
    lines = [json.dumps({"text": f"all {colour} it was", "label": colour}) for colour in COLOURS * 3]
    (folder / "test.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert compare(folder, tmp_path / "out", "--mechanisms", "efficient+expressive", "--epochs", "1") == 0
    (record,) = json.loads((tmp_path / "out" / "results.json").read_text())
    assert record["samples"] == {"train": 81, "validation": 9, "test": 9}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,label\n" + "a,b\n" * 30, "every label in column 'label' is 'b'; there is nothing to learn"),
        ("text,label\n" + "a,b\n" * 30 + " ,c\n", "a.csv, line 32: the text in column 'text' is empty"),
        ("words,label\na,b\n", "a.csv, line 1 (separated by commas) has no text column. It has 'words', 'label'"),
    ],
)
def test_bad_texts_end_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    (tmp_path / "a.csv").write_text(content, encoding="utf-8")
    assert compare(tmp_path / "a.csv", tmp_path / "out") == 2
    said = capsys.readouterr()
    assert message in said.err
    assert "Traceback" not in said.err
    assert not (tmp_path / "out").exists()


def test_without_data_it_says_what_it_reads(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main.main(["compare", "text", "--device", "cpu", "--out", str(tmp_path / "out")]) == 2
    assert "reads texts of your own: name them with `--data`, a .csv, .tsv, .jsonl or" in capsys.readouterr().err


def test_scales_grow() -> None:
    for name in ("amazon", "text"):
        scales: list[Task] = [TASKS[name](scale) for scale in ("smoke", "small", "paper")]
        assert [task.seeds for task in scales] == [1, 3, 5]
        assert scales[0].epochs < scales[1].epochs < scales[2].epochs


@pytest.mark.data
def test_the_real_mixture_fits(real_data: Path) -> None:
    splits = TASKS["amazon"]("paper").load(real_data)
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 28_891
    assert len(splits.assets["vocabulary"]) == 40_000 - 2
