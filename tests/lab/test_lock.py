"""One writer at a time on every file system, and what a crash left is removed by the next writer."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import filelock
import pytest

from better_attention.lab import lock
from better_attention.lab.comparison.compare import compare
from better_attention.lab.comparison.plan import Plan
from better_attention.lab.files import remove_leftovers
from better_attention.lab.lock import MARKER, holder, locked
from better_attention.lab.runs.states import run_state
from better_attention.lab.tasks.variant import Variant
from helpers import TESTS, tiny


def without_locks(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Play a file system that answers so where it is asked for a lock."""

    def refuse(handle: int, *, blocking: bool) -> bool:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(filelock, "lock_descriptor", refuse)


@pytest.mark.parametrize("name", ["ENOLCK", "EOPNOTSUPP", "ENOSYS", "ENOTSUP", "EINVAL"])
def test_a_file_system_without_locks_has_one_writer_too(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_locks(monkeypatch, getattr(errno, name))
    run = tmp_path / "run"
    assert holder(run) is None
    with locked(run):
        assert holder(run) == f"process {os.getpid()}"
        with (
            pytest.raises(ValueError, match=rf"by another process \(process \d+\).* delete {re.escape(str(run))}"),
            locked(run, patience=0.0),
        ):
            pass
        with locked(tmp_path / "another"):
            pass
    assert holder(run) is None
    with locked(run):
        pass
    assert not (run / MARKER).exists()


def test_a_comparison_trains_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_locks(monkeypatch, errno.ENOLCK)
    plan = Plan(tiny.task(epochs=1), [Variant.of("super")], (3,), 1, tmp_path, device="cpu", command="compare")
    study, _ = compare(plan)
    assert study.finished == 1
    assert run_state(tmp_path / "super-h3-s0").state == "finished"


DIES = """
import errno, os, sys
from pathlib import Path
import filelock
from better_attention.lab import lock
def refuse(handle, *, blocking):
    raise OSError(errno.ENOLCK, "No locks available")
filelock.lock_descriptor = refuse
with lock.locked(Path(sys.argv[1])):
    os._exit(7)
"""


def test_the_marker_of_a_process_that_died_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = subprocess.run([sys.executable, "-c", DIES, str(tmp_path)], check=False, timeout=120)
    assert ended.returncode == 7
    assert (tmp_path / MARKER).exists()
    without_locks(monkeypatch, errno.ENOLCK)
    with locked(tmp_path, patience=5.0):
        pass
    assert holder(tmp_path) is None


@pytest.mark.parametrize("name", ["EACCES", "EROFS", "EIO", "ESTALE"])
def test_another_error_is_told_as_what_it_is(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    number = getattr(errno, name)
    without_locks(monkeypatch, number)
    with pytest.raises(OSError, match=re.escape(os.strerror(number))) as caught, locked(tmp_path):
        pass
    assert caught.value.errno == number
    assert caught.value.filename == str(tmp_path / ".lock")
    assert isinstance(caught.value, PermissionError) == (name == "EACCES")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_folder_that_cannot_be_written_is_not_said_to_be_held(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: object, *_: object) -> int:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(lock.os, "open", refuse)
    with pytest.raises(OSError, match=re.escape(os.strerror(number))), locked(tmp_path):
        pass
    assert holder(tmp_path) is None


def test_a_lock_file_that_is_a_link_destroys_nothing(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "theirs")
    with pytest.raises(OSError, match=r"\.lock"), locked(tmp_path / "run"):
        pass
    assert (tmp_path / "theirs").read_text() == "precious"


OURS = [
    *("config.json", "assets.json", "metrics.jsonl", "model.safetensors", "result.json", "diverged.json"),
    *("manifest.sha256", "checkpoint-000007.json", "checkpoint-000007.safetensors"),
    *("results.json", "results.csv", "curves.csv", "report.html", "ladder.json", "ladder.csv", "ladder.html"),
]
THEIRS = [".notes.txt.abcdefgh.tmp", ".results.csv.tmp", ".results.csv.abc.tmp", "results.csv.abcdefgh.tmp", ".x.tmp"]


@pytest.mark.parametrize("name", OURS)
def test_what_a_crash_left_is_removed_by_the_next_writer_alone(name: str, tmp_path: Path) -> None:
    left = tmp_path / f".{name}.a1_b2c3d.tmp"
    with locked(tmp_path):
        left.write_bytes(b"half")  # now somebody is writing it
        with pytest.raises(ValueError, match="another process"), locked(tmp_path, patience=0.0):
            pass
        assert holder(tmp_path) is not None
        assert left.exists()
    for other in THEIRS:
        (tmp_path / other).write_bytes(b"")
    (tmp_path / f".{name}.folder__.tmp").mkdir()
    with locked(tmp_path):
        assert not left.exists()
    assert {path.name for path in tmp_path.iterdir()} == {*THEIRS, ".lock", f".{name}.folder__.tmp"}


CRASH = """
import os, sys, tempfile
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from helpers import tiny
from better_attention.lab.comparison.compare import compare
from better_attention.lab.comparison.plan import Plan
from better_attention.lab.tasks.variant import Variant
real = Path.replace
def crash(self, target):
    if Path(target).name == sys.argv[3]:
        os._exit(9)
    return real(self, target)
Path.replace = crash
compare(Plan(tiny.task(epochs=1), [Variant.of("super")], (3,), 1, Path(sys.argv[2]), device="cpu"))
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*passing over a damaged checkpoint")  # half a pair, of the crash between its files
@pytest.mark.parametrize("name", [name for name in OURS[:13] if name != "diverged.json"])
def test_a_comparison_that_crashed_is_cleaned_up_by_the_next(name: str, tmp_path: Path) -> None:
    name = name.replace("000007", "000001")
    command = [sys.executable, "-c", CRASH, str(TESTS), str(tmp_path), name]
    assert subprocess.run(command, check=False, timeout=300).returncode == 9
    assert list(tmp_path.rglob(f".{name}.*.tmp"))
    plan = Plan(tiny.task(epochs=1), [Variant.of("super")], (3,), 1, tmp_path, device="cpu", command="compare")
    study, _ = compare(plan)
    assert study.finished == 1
    assert not list(tmp_path.rglob("*.tmp"))


def test_files_of_other_names_are_left_to_those_who_write_them(tmp_path: Path) -> None:
    (tmp_path / ".run.tensorboard.json.abcdefgh.tmp").write_text("")
    remove_leftovers(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    remove_leftovers(tmp_path, re.compile(re.escape("run.tensorboard.json")))
    assert not list(tmp_path.iterdir())
