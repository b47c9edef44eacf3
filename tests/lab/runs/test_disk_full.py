"""Nothing is lost when the disk fills: the error names the file, and the same command ends with the same bits."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from better_attention.cli import main
from better_attention.lab.comparison.compare import compare
from better_attention.lab.comparison.plan import Plan
from better_attention.lab.files import write_atomic
from better_attention.lab.lock import locked
from better_attention.lab.runs import checkpoint
from better_attention.lab.tasks.variant import Variant
from helpers import TESTS, tiny

FILES = (
    "config.json",
    "assets.json",
    "checkpoint-*.safetensors",
    "checkpoint-*.json",
    "metrics.jsonl",
    "model.safetensors",
    "result.json",
)
RESULTS = ("results.csv", "results.json", "curves.csv", "report.html")


def full(*_: object, **__: object) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


@contextmanager
def disk_full_at(pattern: str, step: str, nth: int = 1) -> Iterator[list[str]]:
    """The ``nth`` file whose name fits ``pattern`` meets a full disk at this step of its way; all later ones too."""
    seen: list[str] = []
    patch = pytest.MonkeyPatch()
    make = tempfile.mkstemp

    def mkstemp(*, prefix: str, suffix: str, dir: Path) -> tuple[int, str]:
        if fnmatch(prefix[1:-1], pattern):
            seen.append(prefix)
        if len(seen) >= nth:
            if step == "create":
                full()
            owner, name = {"write": (os, "fdopen"), "rename": (Path, "replace"), "folder": (os, "open")}[step]
            if step != "folder":
                patch.setattr(owner, name, full)
            else:
                patch.setattr(os, "fsync", _second_call(os.fsync))
        return make(prefix=prefix, suffix=suffix, dir=dir)

    patch.setattr(tempfile, "mkstemp", mkstemp)
    try:
        yield seen
    finally:
        patch.undo()


def _second_call(real: Any) -> Any:
    """The file reaches the disk, the folder that holds its new name does not."""
    calls = 0

    def fsync(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 1:
            full()
        real(handle)

    return fsync


def weights(folder: Path) -> str:
    return sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("straight")
    tiny.training(folder, epochs=2).run()
    return weights(folder)


MOMENTS = [(pattern, "write") for pattern in FILES] + [
    (pattern, step) for pattern in ("checkpoint-*.json", "result.json") for step in ("create", "rename", "folder")
]
"""A file, and the step on its way at which the disk is full."""


@pytest.mark.parametrize(("pattern", "step"), MOMENTS)
def test_a_run_that_met_a_full_disk_ends_with_the_same_bits(
    pattern: str, step: str, straight: str, tmp_path: Path
) -> None:
    nth = 3 if pattern.startswith("checkpoint") else 1
    with disk_full_at(pattern, step, nth) as seen, pytest.raises(OSError, match="No space left on device") as caught:
        tiny.training(tmp_path, epochs=2, checkpoint_seconds=0.0).run()
    assert len(seen) == nth
    assert caught.value.filename is not None
    assert fnmatch(Path(caught.value.filename).name, pattern)
    assert "bytes; free some space and run again" in str(caught.value)
    assert not list(tmp_path.glob("*.tmp"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no damaged checkpoint is left to be passed over
        saved = checkpoint.load(tmp_path)
        if pattern.startswith("checkpoint"):
            assert saved is not None
            assert (saved[1]["epoch"], saved[1]["step"]) == (1, 2)  # the one before the one that failed
        elif pattern in ("model.safetensors", "result.json"):
            assert saved is not None
            assert saved[1]["epoch"] == 3  # both epochs are done: nothing is trained again
        tiny.training(tmp_path, epochs=2).run()
    assert weights(tmp_path) == straight
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_failed_save_keeps_two_whole_pairs_and_no_half(tmp_path: Path) -> None:
    for value in (1, 2):
        checkpoint.save(tmp_path, {}, {"value": value})
    with disk_full_at("checkpoint-*.json", "write"), pytest.raises(OSError, match="No space"):
        checkpoint.save(tmp_path, {}, {"value": 3})
    names = [f"checkpoint-00000{n}{suffix}" for n in (1, 2) for suffix in (".json", ".safetensors")]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_half_a_pair_that_a_crash_left_does_not_count_as_the_one_before(tmp_path: Path) -> None:
    for value in (1, 2):
        checkpoint.save(tmp_path, {}, {"value": value})
    (tmp_path / "checkpoint-000003.safetensors").write_bytes(b"half a pair")
    checkpoint.save(tmp_path, {}, {"value": 4})
    (tmp_path / "checkpoint-000004.json").write_text("{")  # the newest is damaged as well
    with pytest.warns(UserWarning, match="passing over a damaged checkpoint"):
        found = checkpoint.load(tmp_path)
    assert found is not None
    assert found[1] == {"value": 2}


def test_a_lock_without_its_signature_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "write", full)
    with locked(tmp_path):
        monkeypatch.undo()
        with pytest.raises(ValueError, match="another process"), locked(tmp_path):
            pass


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    compare(plan(out))
    return out


def plan(out: Path) -> Plan:
    return Plan(tiny.task(epochs=1), [Variant.of("super")], (3,), 1, out, device="cpu", command="compare")


@pytest.mark.parametrize("name", RESULTS)
def test_results_are_written_by_the_same_command_again(name: str, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    old = (out / name).read_bytes()
    with disk_full_at(name, "write"), pytest.raises(OSError, match="No space left on device") as caught:
        compare(plan(out))
    assert Path(caught.value.filename).name == name
    assert (out / name).read_bytes() == old
    (out / name).unlink()
    compare(plan(out))
    assert (out / name).stat().st_size > 100


def test_the_command_says_it_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", "--scale", "smoke", "--seeds", "1", "--mechanisms", "super", "--device", "cpu"]
    with disk_full_at("result.json", "write"):
        assert main.main([*words, "--epochs", "1", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "No space left on device (while writing" in said
    assert str(tmp_path / "super-h4-s0" / "result.json") in said
    assert "Traceback" not in said
    assert main.main([*words, "--epochs", "1", "--out", str(tmp_path)]) == 0


def test_other_errors_do_not_speak_of_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", "some temporary name")

    monkeypatch.setattr(tempfile, "mkstemp", refused)
    with pytest.raises(PermissionError, match="Permission denied") as caught:
        write_atomic(tmp_path / "x.json", "text")
    assert caught.value.filename == str(tmp_path / "x.json")
    assert "free some space" not in str(caught.value)


REAL = """
import errno, os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from helpers import tiny
disk, ballast = Path(sys.argv[2]), Path(sys.argv[2]) / "ballast"
failures = 0
room = 8_000
while True:
    # All but ``room`` bytes of the disk are taken; each time there is a little more.
    free = os.statvfs(disk)
    ballast.write_bytes(b"x" * max(0, free.f_bavail * free.f_frsize - room))
    try:
        tiny.training(disk / "run", epochs=2, checkpoint_seconds=0.0).run()
        break
    except OSError as error:
        assert error.errno == errno.ENOSPC, error
        assert error.filename and Path(error.filename).parent == disk / "run", error
        failures += 1
        room += 24_000
        ballast.unlink()
assert failures >= 3, failures
print((disk / "run" / "model.safetensors").read_bytes().hex())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="mounts a small disk in a namespace of its own")
def test_a_disk_that_is_really_full(straight: str, tmp_path: Path) -> None:
    """A tmpfs of 2 MB, filled up; the run fails again and again, each time a little later, and ends as ever."""
    (tmp_path / "disk").mkdir()
    mount = 'mount -t tmpfs -o size=2m tmpfs "$2" && exec "$0" -c "$3" "$1" "$2"'
    script = ["sh", "-c", mount, sys.executable, str(TESTS), str(tmp_path / "disk"), REAL]
    command = ["unshare", "--user", "--map-root-user", "--mount", *script]
    try:
        subprocess.run(["unshare", "--user", "--map-root-user", "--mount", "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this system lets nobody mount a disk of their own")
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if "mount:" in ended.stderr and "Traceback" not in ended.stderr:
        pytest.skip("this system lets nobody mount a disk of their own")
    assert ended.returncode == 0, ended.stderr
    assert sha256(bytes.fromhex(ended.stdout.strip())).hexdigest() == straight
