"""Run folders of earlier versions: they are still read, or refused in words that name the version."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from better_attention import load_run
from better_attention.lab.comparison.compare import compare
from better_attention.lab.comparison.plan import Plan
from better_attention.lab.runs.states import run_state
from helpers import tiny

WRITTEN = Path(__file__).parent / "older_versions"
RUNS = sorted(path.parent for path in WRITTEN.rglob("config.json"))
"""One folder per commit that wrote it: `compare digits` on a few samples."""


@pytest.mark.parametrize("folder", RUNS, ids=lambda folder: folder.parent.name)
def test_an_older_run_still_predicts_as_it_was_recorded(folder: Path) -> None:
    run = load_run(folder)
    test = run.task.load().test
    predictions = run.predict(test.inputs.numpy())
    right = sum(int(p.label) == target for p, target in zip(predictions, test.targets.tolist(), strict=True))
    assert 100 * right / len(test) == pytest.approx(run.result["test_accuracy"])
    assert len(run.curve) == run.result["epochs"]
    state = run_state(folder)
    assert (state.state, state.detail) == ("finished", "")


@pytest.mark.parametrize("folder", RUNS, ids=lambda folder: folder.parent.name)
def test_a_comparison_goes_on_in_an_older_folder(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / folder.name)
    before = (tmp_path / folder.name / "result.json").read_bytes()
    run = load_run(folder)
    plan = tiny.plan(tmp_path, ["standard", run.result["mechanism"]], heads=(run.result["heads"],))
    study, failed = compare(Plan(**{**vars(plan), "task": run.task}))
    assert failed == []
    assert [record["mechanism"] for record in study.records] == ["standard", run.result["mechanism"]]
    assert (tmp_path / folder.name / "result.json").read_bytes() == before


def test_a_run_that_this_version_cannot_read_is_refused_with_the_version_that_wrote_it(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(RUNS[0], tmp_path / "super.expressive-h3-s0"))
    config = json.loads((folder / "config.json").read_text())
    del config["run"]["settings"]["mlp"]
    (folder / "config.json").write_text(json.dumps(config))
    tiny.sign(folder)
    with pytest.raises(ValueError, match=r"missing \['mlp'\].*It was written by better-attention 0\.1\.0, commit 48a4"):
        load_run(folder)
    with pytest.raises(ValueError, match=r"written by better-attention 0\.1\.0, commit 48a4.*\):\n"):
        compare(tiny.plan(tmp_path))


def test_a_future_format_is_refused_with_the_version_that_wrote_it(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(RUNS[0], tmp_path / "super.expressive-h3-s0"))
    config = json.loads((folder / "config.json").read_text())
    config["format"] = 2
    config["environment"]["versions"]["better-attention"] = "9.9"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"format 2.*not all known.*It was written by better-attention 9\.9, commit"):
        load_run(folder)
