"""Equal parameters, settings by name, and what a task learns from the user's data before anything is built."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from better_attention import MultiheadAttention
from better_attention.cli import UserError, main
from better_attention.cli import compare as verb
from better_attention.lab.comparison.compare import compare
from better_attention.lab.comparison.gather import gather
from better_attention.lab.comparison.plan import Plan
from better_attention.lab.runs.snapshot import Snapshot
from better_attention.lab.tasks.base import Task, equal_width
from better_attention.lab.tasks.catalogue import TASKS
from better_attention.lab.tasks.image import ImageTask
from better_attention.lab.tasks.recurrence import RecurrenceTask
from better_attention.lab.tasks.variant import Variant
from helpers import tiny

# --- the width of equal parameters ------------------------------------------------------------------------------------


def size(task: Task, name: str, heads: int) -> int:
    with torch.device("meta"):
        model = replace(task, equal_params=False).model(Variant.of(name), heads)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["optimised", "efficient", "super", "super+per-head", "standard+align", "expressive"])
@pytest.mark.parametrize("task", [TASKS["digits"]("small"), TASKS["mnist"]("paper")], ids=lambda task: task.name)
def test_no_other_width_comes_nearer(task: Task, name: str) -> None:
    """Every allowed width is tried, and none is nearer to the standard model than the one that is chosen."""
    heads = task.default_heads
    width = equal_width(task, Variant.of(name), heads)
    aim = size(task, "standard", heads)
    widths = {*range(heads, 2 * task.width, heads), task.width}
    off = {w: abs(size(replace(task, width=w), name, heads) - aim) for w in widths}
    assert off[width] == min(off.values())
    assert width % heads == 0


def test_efficient_and_super_are_widened_and_standard_is_not() -> None:
    """At the paper's MNIST model 25 to 50 % fewer attention parameters are a few columns more."""
    task = TASKS["mnist"]("paper")
    assert equal_width(task, Variant.of("standard"), 4) == task.width == 128
    assert equal_width(task, Variant.of("expressive"), 4) == 128
    for name in ("optimised", "efficient", "super"):
        assert equal_width(task, Variant.of(name), 4) > 128
    assert equal_width(task, Variant.of("standard+align+per-head"), 4) < 128


@pytest.mark.parametrize(("name", "least"), [("super", 140), ("efficient", 140)])
def test_by_hand(name: str, least: int) -> None:
    """MNIST, d = 128: standard has 2 (4 (d² + d) + 4 d² + 3 d + 4 d) + patches, positions, norm, head = 276,874."""
    task = TASKS["mnist"]("paper")
    assert size(task, "standard", 4) == 276_874
    width = equal_width(task, Variant.of(name), 4)
    found = size(replace(task, width=width), name, 4)
    step = size(replace(task, width=width + 4), name, 4) - found
    assert abs(found - 276_874) <= step
    assert width >= least


def test_a_model_is_built_at_the_width_of_equal_parameters() -> None:
    task = replace(TASKS["digits"]("small"), equal_params=True)
    with torch.device("meta"):
        model = task.build("efficient", 4)
    layer = next(module for module in model.modules() if isinstance(module, MultiheadAttention))
    assert layer.embed_dim == equal_width(task, Variant.of("efficient"), 4) > task.width
    with torch.device("meta"):
        assert sum(p.numel() for p in task.build("standard", 4).parameters()) == size(task, "standard", 4)


def test_a_comparison_at_equal_parameters(tmp_path: Path) -> None:
    task = tiny.task(epochs=1, equal_params=True, width=24)
    variants = [Variant.of(name) for name in ("standard", "efficient")]
    study, failed = compare(Plan(task, variants, (3,), 1, tmp_path, device="cpu"), measure=tiny.pace)
    assert failed == []
    counts = {str(record["mechanism"]): int(str(record["total_params"])) for record in study.records}
    width = equal_width(task, Variant.of("efficient"), 3)
    assert counts == {
        "standard": size(task, "standard", 3),
        "efficient": size(replace(task, width=width), "efficient", 3),
    }
    assert width > 24
    settings = [record["settings"] for record in study.records]
    assert all(isinstance(one, dict) and one["equal_params"] is True for one in settings)


# --- the command line -------------------------------------------------------------------------------------------------


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    return parser.parse_args(arguments)


def test_settings_arrive() -> None:
    words = ["--set", "layers=4", "--set", "dropout=0", "--set", "weight_decay=1e-3", "--set", "train_samples=55"]
    more = ["--set", "optimiser=adam", "--set", "threads=null", "--equal-params"]
    task = verb.make_plan(parse("digits", *words, *more)).task
    assert isinstance(task, ImageTask)
    assert (task.layers, task.dropout, task.weight_decay, task.train_samples) == (4, 0, 1e-3, 55)
    assert (task.optimiser, task.threads, task.equal_params) == ("adam", None, True)
    assert verb.make_plan(parse("digits")).task.equal_params is False
    for rules in ('["plus","minus"]', "plus,minus"):
        several = verb.make_plan(parse("recurrence", "--set", f"rules={rules}")).task
        assert isinstance(several, RecurrenceTask)
        assert several.rules == ("plus", "minus")


def test_what_is_given_twice_is_refused() -> None:
    with pytest.raises(UserError, match="batch_size is given twice: by --set and by --batch-size"):
        verb.make_plan(parse("--set", "batch_size=3", "--batch-size", "7"))


@pytest.mark.parametrize("task", ["digits", "recurrence"])
def test_data_for_a_task_that_reads_none_is_refused(task: str) -> None:
    with pytest.raises(UserError, match=f"task '{task}' uses built-in data"):
        verb.make_plan(parse(task, "--data", "there"))
    assert verb.make_plan(parse("mnist", "--data", "there")).data == Path("there")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["layers"], "expected NAME=VALUE with one of the names "),
        (["depth=4"], "'depth=4': there is no setting 'depth'; expected NAME=VALUE"),
        (["layer=4"], "there is no setting 'layer' (did you mean layers?)"),
        (["layers=3", "lr=0.1", "layers=4"], "'layers=4': layers is given twice"),
        (["=4"], "expected NAME=VALUE"),
        (["scale=paper"], "expected NAME=VALUE"),
        (["equal_params=true"], "'equal_params' (did you mean --equal-params?); expected NAME=VALUE"),
        (["name=imdb"], "expected NAME=VALUE"),
        (["layers=two"], "layers is 2 by default; expected a whole number, received 'two'"),
        (["layers=2.5"], "expected a whole number, received '2.5'"),
        (["layers=true"], "expected a whole number, received 'true'"),
        (["layers="], "expected a whole number, received ''"),
        (["dropout=lots"], "dropout is 0.1 by default; expected a number, received 'lots'"),
        (["heads=4"], "heads of task 'digits' follows from --heads"),
        (["optimiser=3"], "optimiser is 'adamw' by default; expected a text, received '3'"),
        (["train_samples=many"], "train_samples is None by default; expected a whole number or null, received 'many'"),
    ],
)
def test_settings_that_are_none_are_refused(words: Sequence[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        verb.make_plan(parse(*(part for word in words for part in ("--set", word))))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("layers=0", "layers must be >= 1"),
        ("dropout=2", "dropout must be"),
        ("optimiser=lion", "optimiser"),
        ("width=33", "33"),
        ("lr=0", "lr must be above 0"),
    ],
)
def test_settings_out_of_range_are_refused_by_the_task(
    word: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["compare", "--set", word, "--device", "cpu", "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- a task and the user's data ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Unfitted(ImageTask):
    """Knows the number of its classes from the data alone."""

    def fitted(self, folder: Path | None = None) -> Unfitted:
        if folder is None:
            raise ValueError("this task needs --data")
        return replace(self, classes=len((folder / "classes.txt").read_text().split()))

    def model(self, variant: Variant, heads: int) -> nn.Module:
        if self.classes != 10:
            raise ValueError(f"a model was built for {self.classes} classes, before the task was fitted")
        return super().model(variant, heads)

    def load(self, folder: Path | None = None) -> Any:
        return tiny.splits()


def unfitted() -> Unfitted:
    return Unfitted(**{**tiny.task(epochs=1).__dict__, "classes": 1})


def test_a_task_is_fitted_before_anything_is_built(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text(" ".join("abcdefghij"))
    plan = Plan(unfitted(), [Variant.of("super")], (3,), 1, tmp_path / "out", data=tmp_path, device="cpu")
    study, _ = compare(plan, measure=tiny.pace)
    config = json.loads((tmp_path / "out" / "super-h3-s0" / "config.json").read_text())
    assert config["run"]["settings"]["classes"] == 10  # what rebuilds the model
    settings = study.task["settings"]
    assert isinstance(settings, dict)
    assert settings["classes"] == 10
    with pytest.raises(ValueError, match="this task needs --data"):
        compare(replace(plan, data=None, out=tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_known_data_sets_are_fitted_already() -> None:
    for name in ("digits", "mnist", "imdb"):
        task = TASKS[name]("small")
        assert task.fitted(Path("nowhere")) is task


def test_published_runs_without_weights_still_give_a_report(tmp_path: Path) -> None:
    variants = [Variant.of("standard"), Variant.of("super")]
    plan = Plan(tiny.task(epochs=1), variants, (3,), 1, tmp_path, device="cpu")
    whole, _ = compare(plan, measure=tiny.pace)
    assert {m.run for m in whole.maps} == {"standard-h3-s0", "super-h3-s0"}
    (tmp_path / "super-h3-s0" / "model.safetensors").unlink()
    (tmp_path / "report.html").unlink()
    study, _ = compare(plan, measure=tiny.pace)
    assert {m.run for m in study.maps} == {"standard-h3-s0"}
    assert study.alignments == []
    assert {record["mechanism"] for record in study.records} == {"standard", "super"}
    assert set(study.curves) == {"standard-h3-s0", "super-h3-s0"}
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "super" in page
    (tmp_path / "standard-h3-s0" / "model.safetensors").unlink()
    assert gather(plan, Snapshot.read(tmp_path), tiny.splits()).maps == []
