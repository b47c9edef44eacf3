"""``better-attention runs``: the state of every run, told without touching any."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from better_attention.cli import main
from better_attention.lab.lock import holder, locked
from better_attention.lab.training.progress import Interrupted
from helpers import tiny


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run and one that was stopped in its second epoch after the third update of six."""
    folder = tmp_path_factory.mktemp("trained")
    tiny.training(folder / "super-h3-s0").run()
    asked = iter([False] * 8 + [True])
    with pytest.raises(Interrupted):
        tiny.training(folder / "efficient-h3-s0", "efficient", stop=lambda: next(asked)).run()
    return folder


@pytest.fixture
def study(trained: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage, where the command looks by default."""
    return Path(shutil.copytree(trained, tmp_path / "runs" / "digits-smoke"))


def listed(capsys: pytest.CaptureFixture[str], *words: object, status: int = 0) -> dict[str, Any]:
    assert main.main(["runs", *map(str, words), "--json"]) == status
    return {one["name"]: one for one in json.loads(capsys.readouterr().out)}


def fingerprint(folder: Path) -> dict[str, str]:
    return {str(p): sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_finished_and_interrupted(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = fingerprint(study)
    found = listed(capsys)
    assert list(found) == ["efficient-h3-s0", "super-h3-s0"]
    record = json.loads((study / "super-h3-s0" / "result.json").read_text())
    curve = [json.loads(line) for line in (study / "super-h3-s0" / "metrics.jsonl").read_text().splitlines()]
    one = found["super-h3-s0"]
    assert (one["state"], one["detail"]) == ("finished", "")
    assert (one["task"], one["scale"], one["mechanism"], one["heads"], one["seed"]) == (
        "digits",
        "smoke",
        "super",
        3,
        0,
    )
    assert (one["test_accuracy"], one["epochs"], one["commit"]) == (record["test_accuracy"], 3, record["commit"])
    assert one["seconds"] == pytest.approx(sum(line["seconds"] for line in curve))
    one = found["efficient-h3-s0"]
    assert (one["state"], one["detail"]) == ("interrupted", "at epoch 2, step 3")
    assert (one["test_accuracy"], one["epochs"]) == (None, 1)
    assert fingerprint(study) == before


def test_the_table(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["runs", str(study.parent)]) == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if "efficient-h3-s0" in line)
    assert "interrupted: at epoch 2, step 3" in line
    line = next(line for line in out.splitlines() if "super-h3-s0" in line)
    record = json.loads((study / "super-h3-s0" / "result.json").read_text())
    for cell in ("digits", "smoke", "finished", f"{record['test_accuracy']:.2f}", record["commit"][:10]):
        assert cell in line
    assert "1 interrupted, 1 finished" in out


def test_a_narrow_screen_loses_no_name_and_no_state(
    study: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "44")
    assert main.main(["runs"]) == 0
    out = capsys.readouterr().out
    told = "".join("".join(line.split()) for line in out.splitlines())
    for words in ("Run", "State", "finished", "interrupted", "A wider screen, or --json, shows more"):
        assert "".join(words.split()) in told
    assert told.count("-h3-s0") == 2
    assert "Commit" not in out
    monkeypatch.setenv("COLUMNS", "200")
    assert main.main(["runs"]) == 0
    out = capsys.readouterr().out
    assert "Commit" in out
    assert "wider" not in out


def test_a_run_that_has_no_checkpoint_yet(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (study / "efficient-h3-s0").glob("checkpoint-*"):
        path.unlink()
    assert listed(capsys)["efficient-h3-s0"]["detail"] == "before its first checkpoint"


def test_a_damaged_checkpoint_is_passed_over(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = study / "efficient-h3-s0"
    newest = sorted(folder.glob("checkpoint-*.safetensors"))[-1]
    for suffix in (".safetensors", ".json"):
        shutil.copy(newest.with_suffix(suffix), folder / f"checkpoint-900000{suffix}")
    text = (folder / "checkpoint-900000.json").read_text()
    (folder / "checkpoint-900000.json").write_text(text.replace('"step": 3', '"step": 4'))
    assert listed(capsys)["efficient-h3-s0"]["detail"] == "at epoch 2, step 3"
    newest.write_bytes(newest.read_bytes()[:-1])
    assert listed(capsys)["efficient-h3-s0"]["detail"] == "before its first checkpoint"


def test_who_writes_a_run(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = (
        "import sys, os, fcntl; f = open(sys.argv[1], 'a+'); fcntl.flock(f, fcntl.LOCK_EX); f.truncate(0)\n"
        "f.write(f'process {os.getpid()}'); f.flush(); print('held', flush=True); sys.stdin.read()"
    )
    folder = study / "efficient-h3-s0"
    command = [sys.executable, "-c", code, str(folder / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        found = listed(capsys)["efficient-h3-s0"]
        assert found["state"] == "being written"
        assert found["detail"] == f"by process {other.pid}; saved at epoch 2, step 3"
        other.kill()
    assert listed(capsys)["efficient-h3-s0"]["state"] == "interrupted"


def test_looking_does_not_keep_a_run_from_starting(study: Path) -> None:
    folder, done = study / "efficient-h3-s0", threading.Event()

    def look() -> None:
        while not done.is_set():
            holder(folder)
            time.sleep(0.002)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        for _ in range(50):
            with locked(folder):
                time.sleep(0.001)
    finally:
        done.set()
        looking.join()


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("config.json", b"{", "config.json is damaged"),
        ("config.json", b"{}", "config.json describes no run: it lacks 'run'"),
        ("config.json", b'{"run": 3}', "it describes no run"),
        ("result.json", b"[]", "result.json is damaged: it holds list, not an object"),
        ("result.json", b"{}", "result.json is damaged: it lacks 'test_accuracy'"),
        ("metrics.jsonl", b"{", "metrics.jsonl is damaged"),
        ("metrics.jsonl", b"1\n", "an epoch lacks its seconds"),
        ("metrics.jsonl", None, "metrics.jsonl is missing"),
        ("model.safetensors", b"short", "model.safetensors is not a whole safetensors file"),
    ],
)
def test_damage_is_named(
    name: str, content: bytes | None, why: str, study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = study / "super-h3-s0" / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    found = listed(capsys, status=1)
    assert found["super-h3-s0"]["state"] == "damaged"
    assert why in found["super-h3-s0"]["detail"]
    assert found["efficient-h3-s0"]["state"] == "interrupted"
    assert main.main(["runs"]) == 1
    assert "1 damaged" in capsys.readouterr().out


def test_a_published_run_has_no_weights(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (study / "super-h3-s0" / "model.safetensors").unlink()
    found = listed(capsys)["super-h3-s0"]
    assert (found["state"], found["detail"]) == (
        "finished",
        "without its weights: in tables, but `predict` cannot use it",
    )


def test_where_it_looks(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(listed(capsys, study, study.parent, study / "super-h3-s0")) == 2  # each once
    assert list(listed(capsys, study / "super-h3-s0")) == ["super-h3-s0"]
    shutil.copytree(study / "super-h3-s0", tmp_path / "results" / "digits" / "super-h3-s7")
    assert list(listed(capsys)) == ["efficient-h3-s0", "super-h3-s0", "super-h3-s7"]


def test_nothing_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["runs"]) == 0
    out = capsys.readouterr().out
    assert "No run folders below runs/ and results/, which do not exist." in out
    assert "better-attention compare" in out
    (tmp_path / "results" / "imdb").mkdir(parents=True)
    (tmp_path / "results" / "imdb" / "results.json").write_text("[]")
    assert main.main(["runs"]) == 0
    assert "`better-attention table N` reads them" in capsys.readouterr().out
    assert listed(capsys) == {}
    assert main.main(["runs", "nowhere"]) == 2
    assert "nowhere is no folder" in capsys.readouterr().err


def test_a_name_cannot_write_to_the_screen(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = study / "super-h3-s0" / "config.json"
    config = json.loads(path.read_text())
    config["run"]["task"] = "\x1b[2Jdigits[bold]"
    path.write_text(json.dumps(config))
    tiny.sign(path.parent)
    assert main.main(["runs"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "digits[bold]" in out
