"""Run folders: names, reading back, refusing what is damaged or different, one writer at a time."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import better_attention
from better_attention import MECHANISMS
from better_attention.lab.lock import locked
from better_attention.lab.runs import provenance
from better_attention.lab.runs.job import Job
from better_attention.lab.runs.load import load_run
from better_attention.lab.runs.record import differences
from better_attention.lab.runs.snapshot import Snapshot
from better_attention.lab.tasks.variant import Variant
from better_attention.mechanism import Mechanism
from helpers import tiny


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study") / "super-h3-s0"
    tiny.training(folder).run()
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(finished, tmp_path / "super-h3-s0"))


def edit(path: Path, **changes: Any) -> None:
    """Change entries of the ``run`` part of a config."""
    config = json.loads(path.read_text())
    config["run"] |= changes
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("name", [*MECHANISMS, *(f"{m}+expressive" for m in MECHANISMS), "standard+align"])
def test_names_are_safe_and_tell_mechanisms_apart(name: str) -> None:
    mechanism = Variant.of(name)
    folder = Job(tiny.task(), mechanism, 4, 12).folder_name
    assert folder.isascii()
    assert not set(folder) - set("abcdefghijklmnopqrstuvwxyz0123456789.-")
    assert Variant.of(folder.removesuffix("-h4-s12").replace(".", "+")) == mechanism


def test_a_mechanism_without_a_name_has_no_run() -> None:
    with pytest.raises(ValueError, match="unknown mechanism 'custom"):
        _ = Job(tiny.task(), Variant(Mechanism(frozenset("ko"))), 4, 0).folder_name


def test_a_finished_run_comes_back(finished: Path) -> None:
    run = better_attention.load_run(finished)
    split = tiny.splits().test
    with torch.inference_mode():
        probabilities = run.model(split.inputs).softmax(dim=1)
    found = run.predict(split.inputs.numpy(), batch_size=7)
    assert [int(p.label) for p in found] == probabilities.argmax(1).tolist()
    assert [p.probability for p in found] == pytest.approx(probabilities.max(1).values.tolist(), rel=1e-5)
    assert sum(found[0].probabilities.values()) == pytest.approx(1, rel=1e-6)
    right = 100 * sum(int(p.label) == t for p, t in zip(found, split.targets.tolist(), strict=True)) / len(split)
    assert right == pytest.approx(run.result["test_accuracy"])
    assert run.task == tiny.task()
    assert len(run.curve) == run.result["epochs"] == 3
    assert not run.model.training


def test_reading_a_run_draws_no_random_number(finished: Path) -> None:
    before = torch.get_rng_state()
    load_run(finished)
    assert torch.equal(before, torch.get_rng_state())


def test_what_is_no_finished_run_is_refused_with_the_way_out(run: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json\. It holds super-h3-s0"):
        load_run(run.parent)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist: name the folder of a run"):
        load_run(run / "nowhere")
    (run / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="is not a run"):
        load_run(run / "empty")
    (run / "result.json").unlink()
    with pytest.raises(FileNotFoundError, match="is not finished: run the command"):
        load_run(run)


def test_damaged_weights_are_refused(run: Path) -> None:
    path = run / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        load_run(run)
    edit(run / "config.json", mechanism="efficient")
    shutil.copy(run / "config.json", path)
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        load_run(run)


def test_weights_of_another_mechanism_are_refused(run: Path) -> None:
    edit(run / "config.json", mechanism="efficient")
    with pytest.raises(ValueError, match=r"align.bias: \(16,\) in the file, unknown in the model"):
        load_run(run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "chess"}, "task 'chess'"),
        ({"heads": 4}, "heads|divis"),
        ({"heads": True}, "heads must be a whole number"),
        ({"mechanism": "hyper"}, "unknown mechanism 'hyper'"),
        ({"settings": {}}, "scale"),
        ({"settings": tiny.task().settings() | {"width": 2**40}}, "width must be <= 2,147,483,647"),
        ({"settings": tiny.task().settings() | {"width": -6}}, "width must be >= 1"),
        ({"settings": tiny.task().settings() | {"depth": 6}}, "unknown .'depth'."),
    ],
)
def test_an_edited_configuration_is_refused(run: Path, change: dict[str, Any], message: str) -> None:
    edit(run / "config.json", **change)
    with pytest.raises(ValueError, match=message):
        load_run(run)


def test_a_number_of_samples_may_be_as_large_as_the_data(tmp_path: Path) -> None:
    many = {"train_samples": 2**30, "test_samples": 2**21, "data_seed": 2**31 - 1, "validation_share": 0.9}
    record = tiny.training(tmp_path / "super-h3-s0", epochs=1, **many).run().values
    found = load_run(tmp_path / "super-h3-s0")
    assert (found.task.train_samples, found.task.data_seed) == (2**30, 2**31 - 1)
    assert found.result == record


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_a_damaged_configuration_is_refused(run: Path, content: bytes) -> None:
    (run / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        load_run(run)


def test_runs_are_listed_with_what_is_known_of_them(run: Path) -> None:
    tiny_config = run.parent / "efficient-h3-s0"
    tiny_config.mkdir()
    shutil.copy(run / "config.json", tiny_config)
    stored = Snapshot.read(run.parent)
    assert {name: run.record is None for name, run in stored.runs.items()} == {
        "efficient-h3-s0": True,
        "super-h3-s0": False,
    }


def test_differences_name_each_value_of_both_sides() -> None:
    there = {"seed": 0, "settings": {"lr": 0.1, "epochs": 3}, "old": 1}
    now = {"seed": 0, "settings": {"lr": 0.2, "epochs": 3}}
    assert differences(there, now) == ["old: 1 there, None now", "lr: 0.1 there, 0.2 now"]
    assert differences(now, now) == []


def test_a_folder_has_one_writer(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "run"),
        pytest.raises(ValueError, match=r"is being written by another process \(process \d+\)"),
        locked(tmp_path / "run"),
    ):
        pass
    with locked(tmp_path / "run"):
        pass


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    code = (
        "import sys, fcntl; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); print('held'); sys.stdin.read()"
    )
    (tmp_path / "run").mkdir()
    command = [sys.executable, "-c", code, str(tmp_path / "run" / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="is being written by another process"), locked(tmp_path / "run"):
            pass
        other.kill()
    with locked(tmp_path / "run"):
        pass


def test_the_commit_is_that_of_this_checkout_or_unknown(tmp_path: Path) -> None:
    here = provenance.commit()
    assert here == "unknown" or len(here.removesuffix("+changes")) == 40
    # Installed below another project's repository, whose commit would be misleading.
    (tmp_path / ".git").mkdir()
    assert provenance.commit(tmp_path / "venv" / "better_attention") == "unknown"


def test_results_that_were_rewritten_are_no_change_of_the_source(tmp_path: Path) -> None:
    """Results are kept in the same checkout as the program: the first of two commands must not taint the second."""
    source = tmp_path / "src" / "better_attention" / "__init__.py"
    kept = tmp_path / "results" / "table.csv"
    for path in (source, kept):
        path.parent.mkdir(parents=True)
        path.write_text("1")
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "-A"], [*who, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)

    def commit() -> str:
        provenance.commit.cache_clear()
        return provenance.commit(source.parent)

    clean = commit()
    assert len(clean) == 40
    kept.write_text("2")
    assert commit() == clean
    source.write_text("2")
    assert commit() == f"{clean}+changes"
