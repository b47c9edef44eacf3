"""Digests of every file of a finished run and of the results: no change goes unnoticed, old folders are still read."""

from __future__ import annotations

import json
import os
import random
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from better_attention.cli import main
from better_attention.lab.comparison.compare import compare
from better_attention.lab.comparison.plan import Plan
from better_attention.lab.paper.beside import read_results
from better_attention.lab.runs import manifest
from better_attention.lab.runs.folder import FILES
from better_attention.lab.runs.load import load_run
from better_attention.lab.runs.snapshot import Snapshot
from better_attention.lab.runs.states import run_state
from better_attention.lab.tasks.variant import Variant
from helpers import CHECKOUT, tiny

RUN = "super-h3-s0"
RESULTS = ("results.json", "results.csv", "curves.csv", "report.html")


def plan(out: Path) -> Plan:
    return Plan(tiny.task(epochs=1), [Variant.of("super")], (3,), 1, out, device="cpu", command="compare")


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compared")
    compare(plan(out))
    return out


@pytest.fixture
def out(compared: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(compared, tmp_path / "out"))


def flips(content: bytes, number: int, seed: int) -> list[bytes]:
    """``content`` with one bit flipped, at ``number`` random places."""
    rng = random.Random(seed)
    found = []
    for _ in range(number):
        changed = bytearray(content)
        changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        found.append(bytes(changed))
    return found


@pytest.mark.parametrize("name", [*FILES, manifest.NAME])
def test_every_flipped_bit_of_a_run_is_noticed(name: str, out: Path, seed: int) -> None:
    path = out / RUN / name
    whole = path.read_bytes()
    for number, content in enumerate(flips(whole, 120, seed)):
        path.write_bytes(content)
        assert run_state(out / RUN).state == "damaged"
        if number % 6 == 0:
            with pytest.raises((ValueError, FileNotFoundError)):
                load_run(out / RUN)
        if name in ("config.json", "result.json", manifest.NAME):
            try:
                found = Snapshot.read(out).runs
            except ValueError:
                continue
            # What the manifest says of other files is looked at when they are; a config may become somebody else's.
            assert name == manifest.NAME or found == []
    path.write_bytes(whole)
    assert run_state(out / RUN).state == "finished"
    load_run(out / RUN)


@pytest.mark.parametrize("name", [name for name in FILES if name != "model.safetensors"])
def test_a_space_more_is_a_change(name: str, out: Path) -> None:
    path = out / RUN / name
    path.write_bytes(path.read_bytes().replace(b": ", b":  ", 1))
    found = run_state(out / RUN)
    assert (found.state, f"{name} was changed since it was written" in found.detail) == ("damaged", True)


def test_every_flipped_bit_of_the_results_is_noticed(out: Path, seed: int) -> None:
    path = out / "results.json"
    whole = path.read_bytes()
    for content in flips(whole, 120, seed):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"results\.json (was changed since it was written|is damaged)"):
            read_results(path)
    path.write_bytes(whole)
    assert len(read_results(path)) == 1


def another_number(path: Path) -> None:
    """Change a published number in its last digit."""
    text = path.read_text("utf-8")
    start = text.index('"test_loss": ') + len('"test_loss": 0.')
    digit = text[start + 6]
    path.write_text(text[: start + 6] + str((int(digit) + 1) % 10) + text[start + 7 :], "utf-8")


@pytest.mark.parametrize("verb", ["runs", "table", "predict", "compare"])
def test_each_command_says_that_a_number_was_changed(
    verb: str, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    another_number(out / "results.json" if verb == "table" else out / RUN / "result.json")
    if verb == "compare":
        with pytest.raises(ValueError, match=r"result\.json was changed since it was written"):
            compare(plan(out))
        return
    words = {"runs": ["runs", str(out)], "table": ["table", "1", str(out)]}
    words["predict"] = ["predict", str(out / RUN), "--index", "0"]
    assert main.main(words[verb]) == (1 if verb == "runs" else 2)
    told = capsys.readouterr()
    assert "was changed since it was written" in " ".join((told.out + told.err).split())


def listed(capsys: pytest.CaptureFixture[str], folder: Path, status: int) -> list[dict[str, Any]]:
    assert main.main(["runs", str(folder), "--json"]) == status
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return [one for one in found if one["kind"] == "results"]


@pytest.mark.parametrize("name", [*RESULTS, manifest.NAME])
@pytest.mark.parametrize("how", ["changed", "gone", "FIFO"])
def test_runs_names_the_damaged_files_of_a_comparison(
    name: str, how: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert listed(capsys, out, 0) == []
    path = out / name
    content = path.read_bytes()
    path.unlink()
    if how == "changed":
        path.write_bytes(content[:40] + bytes([content[40] ^ 1]) + content[41:])
    elif how == "FIFO":
        os.mkfifo(path)
    elif name == manifest.NAME:  # then nothing is known of the files, as of results from before there were manifests
        assert listed(capsys, out, 0) == []
        return
    (one,) = listed(capsys, out, 1)
    assert (one["path"], one["state"]) == (str(out), "damaged")
    assert name in one["detail"]


def test_runs_names_every_damaged_file_and_still_lists_the_runs(
    out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "2000")
    another_number(out / "results.json")
    (out / "curves.csv").unlink()
    assert main.main(["runs", str(out)]) == 1
    told = " ".join(capsys.readouterr().out.split())
    assert f"{out / 'results.json'} was changed since it was written" in told
    assert f"{out / 'curves.csv'} is missing" in told
    assert "results.csv" not in told
    assert told.endswith("1 damaged results, 1 finished")


def test_a_manifest_of_somebody_else_s_is_no_damage(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = out.parent / "elsewhere"
    other.mkdir()
    (other / manifest.NAME).write_text("of another program\n")
    assert listed(capsys, out.parent, 0) == []


@pytest.mark.parametrize(("folder", "names"), [(RUN, FILES), ("", RESULTS)])
def test_the_manifest_is_what_sha256sum_writes(folder: str, names: tuple[str, ...], compared: Path) -> None:
    lines = [f"{sha256((compared / folder / name).read_bytes()).hexdigest()}  {name}\n" for name in sorted(names)]
    assert (compared / folder / manifest.NAME).read_text("ascii") == "".join(lines)


def as_before_manifests(folder: Path) -> None:
    """A run as versions wrote it that had no manifest."""
    (folder / manifest.NAME).unlink()
    result = json.loads((folder / "result.json").read_text("utf-8"))
    del result["manifest"]
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n", "utf-8")


def test_a_run_without_a_manifest_is_read_and_told(out: Path) -> None:
    as_before_manifests(out / RUN)
    found = run_state(out / RUN)
    assert (found.state, found.detail) == ("finished", "no manifest: a change of its numbers would not be noticed")
    assert load_run(out / RUN).result["mechanism"] == "super"
    (out / manifest.NAME).unlink()
    assert len(read_results(out / "results.json")) == 1
    compare(plan(out))
    weights = out / RUN / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    assert "was changed since it was written" in run_state(out / RUN).detail  # its record has the digest of the weights


def test_a_manifest_that_is_gone_is_missed(out: Path) -> None:
    (out / RUN / manifest.NAME).unlink()
    assert "manifest.sha256 is missing" in run_state(out / RUN).detail
    with pytest.raises(ValueError, match=r"manifest\.sha256 is missing"):
        load_run(out / RUN)


@pytest.mark.parametrize("name", [n for n in FILES if n != "model.safetensors"])
def test_a_file_that_is_gone_is_missed(name: str, out: Path) -> None:
    (out / RUN / name).unlink()
    found = run_state(out / RUN)
    if name == "result.json":
        assert found.state == "interrupted"
    else:
        assert found.state == "damaged"
        assert f"{name} is missing" in found.detail


def test_two_commands_share_the_manifest_of_a_folder(tmp_path: Path) -> None:
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text("1")
        manifest.add(tmp_path, [name])
    (tmp_path / "a.json").write_text("2")
    with pytest.raises(ValueError, match=r"a\.json was changed"):
        manifest.check_listed(tmp_path / "a.json")
    manifest.check_listed(tmp_path / "b.json")
    manifest.remove(tmp_path, ["a.json"])
    manifest.check_listed(tmp_path / "a.json")
    assert manifest.read(tmp_path) == {"b.json": sha256(b"1").hexdigest()}
    manifest.remove(tmp_path, ["b.json"])
    assert manifest.read(tmp_path) is None


def test_the_published_results_have_no_manifest_and_are_read() -> None:
    files = sorted((CHECKOUT / "results").glob("*/results.json"))
    if not files:
        pytest.skip("this copy of the source has no results")
    assert all(read_results(file) for file in files)
