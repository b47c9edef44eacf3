"""Folders that results go into: nothing of others is overwritten, and what cannot be written is said at once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from better_attention.bench.edge.view import is_report
from better_attention.lab.comparison.compare import compare
from better_attention.lab.ladder.grid import is_ladder
from better_attention.lab.runs.load import load_run
from better_attention.lab.runs.overwrite_guard import check_output
from better_attention.lab.training.events import Began, Event
from helpers import tiny

FILES = ("found.json", "found.html")


def check(folder: Path) -> None:
    check_output(folder, FILES, lambda found: isinstance(found, dict) and "ours" in found)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", ["", "{}", "[1]", "[" * 100_000, '{"theirs": 1}'])
def test_files_of_others_are_not_overwritten(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"holds {name}, but no found.json of better-attention: refusing"):
        check(tmp_path)


def test_our_own_may_be(tmp_path: Path) -> None:
    (tmp_path / "found.json").write_text('{"ours": 1}')
    (tmp_path / "found.html").write_text("<p>")
    (tmp_path / "notes.txt").write_text("theirs, and not in the way")
    check(tmp_path)


def test_a_folder_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    check(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()


def test_a_broken_link_is_said(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="a is a broken link: name a folder"):
        check(tmp_path / "a")


def test_a_file_above_is_said(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    with pytest.raises(ValueError, match="a is a file: name a folder"):
        check(tmp_path / "a" / "b")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="there is no /proc")
@pytest.mark.parametrize("below", ["", "a/b"])
def test_a_folder_that_cannot_be_written_is_said(below: str) -> None:
    """In /proc nobody may write, though the system tells root otherwise; so it is on some network disks."""
    with pytest.raises(
        ValueError, match=r"^--out /proc[ab/]*: nothing can be written in /proc \(.+\)\. Choose another folder\."
    ):
        check(Path("/proc") / below)


def test_looking_whether_a_folder_can_be_written_leaves_no_trace(tmp_path: Path) -> None:
    check(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_comparison_leaves_the_users_report_alone(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("<p>mine</p>")
    with pytest.raises(ValueError, match=r"holds report.html, but no results.json of better-attention: refusing"):
        compare(tiny.plan(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text() == "<p>mine</p>"


@pytest.mark.parametrize("content", ["5", "null", "[]", "[1]", '["the mechanism"]', '{"mechanism": 1}', "[[]]"])
def test_a_file_that_only_looks_like_results_is_anothers(content: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match=r"no results\.json of better-attention: refusing"):
        compare(tiny.plan(tmp_path))
    for ours in (is_ladder, is_report):
        assert not ours(json.loads(content))


def test_folders_of_other_programs_beside_the_runs_are_passed_over(tmp_path: Path) -> None:
    for name, content in (("a", '{"name": "x"}'), ("b", '{"run": "npm start"}'), ("c", "not even JSON")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(content)
    study, failed = compare(tiny.plan(tmp_path, ["efficient"]))
    assert (len(study.records), failed) == (1, [])
    assert (tmp_path / "c" / "config.json").read_text() == "not even JSON"


def test_a_ladders_folder_is_no_comparisons(tmp_path: Path) -> None:
    (tmp_path / "ladder.json").write_text('{"grid": {}}')
    with pytest.raises(ValueError, match="holds a ladder: choose another --out"):
        compare(tiny.plan(tmp_path))


# --- finished runs that were damaged ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compared")
    compare(tiny.plan(folder, ["standard"]))
    return folder


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", ["no curve", "half the weights", "a flipped bit", "no result"])
def test_a_damaged_run_is_named_before_anything_is_trained(damage: str, compared: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(compared, tmp_path / "copy"))
    run = folder / "standard-h3-s0"
    weights = run / "model.safetensors"
    if damage == "no curve":
        (run / "metrics.jsonl").unlink()
    elif damage == "half the weights":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "a flipped bit":
        flip(weights, -3)
    else:
        (run / "result.json").write_text("{")
    begun: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, Began):
            begun.append(event.name)

    with pytest.raises(
        ValueError, match=r"standard-h3-s0.* Delete that folder and run again|damaged .*Delete the folder"
    ):
        compare(tiny.plan(folder, ["standard", "efficient"]), listen)
    assert begun == []


def test_a_model_that_is_built_otherwise_now_is_named_before_anything_is_trained(
    compared: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(compared, tmp_path / "copy"))
    result = folder / "standard-h3-s0" / "result.json"
    record = json.loads(result.read_text())
    result.write_text(json.dumps(record | {"total_params": record["total_params"] + 1}))
    tiny.sign(result.parent)
    with pytest.raises(ValueError, match=r"is a model of .* parameters; this version .* Delete that folder"):
        compare(tiny.plan(folder, ["standard", "efficient"]))


def test_a_damaged_run_of_another_comparison_below_is_no_hindrance(compared: Path, tmp_path: Path) -> None:
    inner = Path(shutil.copytree(compared, tmp_path / "outer" / "inner"))
    (inner / "standard-h3-s0" / "metrics.jsonl").unlink()
    study, _ = compare(tiny.plan(tmp_path / "outer", ["efficient"]))
    assert len(study.records) == 1


def test_how_a_task_is_called_decides_nothing(compared: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(compared, tmp_path / "copy"))
    config = folder / "standard-h3-s0" / "config.json"
    title = tiny.task().title
    assert title in config.read_text()
    config.write_text(config.read_text().replace(title, "another title"))
    tiny.sign(config.parent)
    study, _ = compare(tiny.plan(folder, ["standard"]))
    assert len(study.records) == 1


def test_changed_weights_are_not_loaded(compared: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(compared, tmp_path / "copy"))
    run = folder / "standard-h3-s0"
    load_run(run)
    flip(run / "model.safetensors", -3)
    with pytest.raises(ValueError, match="was changed since it was written: its SHA-256 is"):
        load_run(run)


def test_lost_weights_are_said(compared: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(compared, tmp_path / "copy"))
    (folder / "standard-h3-s0" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has lost its weights \(model.safetensors\): delete it, and run"):
        load_run(folder / "standard-h3-s0")


def test_a_run_of_an_older_version_without_a_digest_is_read(compared: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(compared / "standard-h3-s0", tmp_path / "copy"))
    result = json.loads((run / "result.json").read_text())
    del result["model_sha256"], result["manifest"]
    (run / "result.json").write_text(json.dumps(result))
    (run / "manifest.sha256").unlink()
    assert load_run(run).task == tiny.task(epochs=1)


def test_another_tasks_folder_is_refused_in_one_line(compared: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(compared, tmp_path / "copy"))
    config = folder / "standard-h3-s0" / "config.json"
    config.write_text(config.read_text().replace('"task": "digits"', '"task": "mnist"'))
    tiny.sign(config.parent)
    with pytest.raises(ValueError, match=r"is a run of task 'mnist': choose another folder with --out\.$"):
        compare(tiny.plan(folder))
