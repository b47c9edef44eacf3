"""Whatever became of the files of a run: the run is named, the others are listed, nothing hangs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from better_attention.cli import main
from better_attention.lab.comparison.compare import compare
from better_attention.lab.comparison.plan import Plan
from better_attention.lab.runs import checkpoint
from better_attention.lab.runs.folder import FILES
from better_attention.lab.runs.load import load_run
from better_attention.lab.runs.snapshot import Snapshot
from better_attention.lab.runs.states import run_state
from better_attention.lab.tasks.variant import Variant
from better_attention.lab.training.progress import Interrupted, Position
from helpers import tiny

RUN, OTHER = "super-h3-s0", "efficient-h3-s0"


@pytest.fixture(autouse=True)
def nothing_hangs() -> Iterator[None]:
    """What waits for a FIFO would wait for ever."""
    if sys.platform == "win32":
        yield
        return

    def hangs(*_: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run and an interrupted one."""
    folder = tmp_path_factory.mktemp("trained")
    tiny.training(folder / RUN, epochs=1).run()
    asked = iter([False] * 3 + [True])
    with pytest.raises(Interrupted):
        tiny.training(folder / OTHER, "efficient", epochs=1, stop=lambda: next(asked)).run()
    return folder


@pytest.fixture
def out(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "out"))


def plan(out: Path, mechanism: str = "super") -> Plan:
    return Plan(tiny.task(epochs=1), [Variant.of(mechanism)], (3,), 1, out, device="cpu", command="compare")


def states(out: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, tuple[str, str]]:
    """Path below ``out`` -> state and detail, as ``runs`` tells them; the table is printed as well."""
    main.main(["runs", str(out)])
    capsys.readouterr()
    main.main(["runs", str(out), "--json"])
    listed = json.loads(capsys.readouterr().out)
    return {Path(one["path"]).relative_to(out).as_posix(): (one["state"], one["detail"]) for one in listed}


def as_fifo(path: Path) -> None:
    os.mkfifo(path)


def as_folder(path: Path) -> None:
    path.mkdir()


def as_loop(path: Path) -> None:
    path.symlink_to(path.name)


def as_endless_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.skipif(sys.platform == "win32", reason="no FIFO there")
@pytest.mark.parametrize("put", [as_fifo, as_folder, as_loop, as_endless_device])
@pytest.mark.parametrize("name", [*FILES, "manifest.sha256", "diverged.json", "checkpoint-000001.json", ".lock"])
def test_no_file_in_place_of_a_file(
    name: str, put: Callable[[Path], None], out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = out / (OTHER if name.startswith(("checkpoint", "diverged", ".")) else RUN)
    (folder / name).unlink(missing_ok=True)
    put(folder / name)
    found = states(out, capsys)
    assert found.keys() == {RUN, OTHER}
    if folder.name == RUN:
        assert found[RUN][0] == "damaged", name
        assert name in found[RUN][1]
        with pytest.raises((OSError, ValueError)):
            load_run(folder)
        if name in ("config.json", "result.json"):
            with pytest.raises((OSError, ValueError)):
                Snapshot.read(out)
    else:
        assert found[OTHER][0] == "interrupted"
        with pytest.warns() if name.startswith("checkpoint") else _nothing():
            checkpoint.load(folder)
    assert found[OTHER if folder.name == RUN else RUN][0] != "damaged"
    if name == "config.json":
        with pytest.raises((OSError, ValueError), match=r"config\.json"):
            compare(plan(out))


@pytest.mark.skipif(sys.platform == "win32", reason="no FIFO there")
@pytest.mark.parametrize("put", [as_fifo, as_loop, as_endless_device])
def test_a_renamed_run_is_listed_whatever_its_configuration_is(
    put: Callable[[Path], None], out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (out / RUN).rename(out / "best of all")
    (out / "best of all" / "config.json").unlink()
    put(out / "best of all" / "config.json")
    found = states(out, capsys)
    assert found.keys() == {"best of all", OTHER}
    assert found["best of all"][0] == "damaged"
    assert "config.json" in found["best of all"][1]


class _nothing:  # noqa: N801 - reads like contextlib's own
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


VALUES = ["NaN", "-Infinity", "1e400", "1e308", "1" + "0" * 400, "null", "true", '"text"', "[]", "[" * 100_000]


def unsigned(folder: Path) -> None:
    """As a version left it that wrote no digests: then only what the values say can be noticed."""
    (folder / "manifest.sha256").unlink()
    text = (folder / "result.json").read_text("utf-8")
    result = {key: value for key, value in json.loads(text).items() if key not in ("manifest", "model_sha256")}
    (folder / "result.json").write_text(json.dumps(result), "utf-8")


def with_value(text: str, key: str, value: str) -> str:
    """JSON ``text`` with another value of its first ``key``, which may be no JSON at all."""
    document = json.loads(text)
    place = document
    for part in key.split("/")[:-1]:
        place = place[part]
    place[key.rsplit("/", maxsplit=1)[-1]] = "@here@"
    return json.dumps(document).replace('"@here@"', value)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("metrics.jsonl", "seconds"),
        ("metrics.jsonl", "validation_loss"),
        ("result.json", "test_accuracy"),
        ("result.json", "test_loss"),
        ("result.json", "epochs"),
        ("result.json", "seed"),
        ("config.json", "run/heads"),
        ("config.json", "run/settings/layers"),
        ("config.json", "run/settings/width"),
        ("config.json", "run"),
        ("assets.json", "classes"),
    ],
)
def test_a_value_that_is_no_number_of_ours(name: str, key: str, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each value in a comparison of its own, all of them in one listing."""
    unsigned(out / RUN)
    text = (out / RUN / name).read_text("utf-8")
    first = text.splitlines()[0] if "metrics" in name else text
    for number, value in enumerate(VALUES):
        shutil.copytree(out / RUN, out / str(number) / RUN)
        (out / str(number) / RUN / name).write_text(with_value(first, key, value), "utf-8")
    found = states(out, capsys)
    assert found.keys() == {RUN, OTHER, *(f"{number}/{RUN}" for number in range(len(VALUES)))}
    assert found[OTHER][0] == "interrupted"
    assert found[RUN][0] == "finished"
    for number, value in enumerate(VALUES):
        comparison = out / str(number)
        run = comparison / RUN
        if name in ("metrics.jsonl", "result.json"):
            state, detail = found[f"{number}/{RUN}"]
            assert state == "damaged", value
            assert name in detail, value
        if name != "assets.json":
            with pytest.raises((OSError, ValueError), match=r"json") as caught:
                load_run(run)
            assert not str(caught.value).endswith("..")
            assert main.main(["predict", str(run), "--index", "0"]) == 2, value
        if name == "config.json" and value != "1e308":
            with pytest.raises((OSError, ValueError)):
                compare(plan(comparison))


@pytest.mark.parametrize("layers", [20_000, 2**20, 900])
def test_a_model_is_bounded_before_it_is_built(layers: int, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = out / RUN / "config.json"
    config.write_text(with_value(config.read_text("utf-8"), "run/settings/layers", str(layers)), "utf-8")
    tiny.sign(out / RUN)

    def built(*_: object) -> Any:
        raise AssertionError("it was built")

    monkeypatch.setattr(type(tiny.task()), "build", built)
    with pytest.raises(ValueError, match=r"layers"):
        load_run(out / RUN)


@pytest.mark.parametrize(
    "change", [{"raw_size": 2**20, "image_size": 2**20, "length": 2**20, "patch": 1}, {"mlp": 2**20, "width": 2**20}]
)
def test_a_model_that_cannot_be_built_is_refused_in_a_sentence(change: dict[str, int], out: Path) -> None:
    config = out / RUN / "config.json"
    document = json.loads(config.read_text("utf-8"))
    document["run"]["settings"] |= change
    config.write_text(json.dumps(document), "utf-8")
    tiny.sign(out / RUN)
    with pytest.raises(ValueError, match=r"config\.json|weights of this model"):
        load_run(out / RUN)


@pytest.mark.parametrize("moment", ["checkpoint", "end"])
@pytest.mark.parametrize("how", ["deleted", "moved", "replaced"])
def test_a_run_that_lost_its_folder_says_so(moment: str, how: str, tmp_path: Path) -> None:
    folder = tmp_path / RUN

    def lose(position: Position, steps: int) -> None:
        if position.step != 3:
            return
        if how == "moved":
            folder.rename(tmp_path / "elsewhere")
        else:
            shutil.rmtree(folder)
        if how == "replaced":
            folder.mkdir()
            shutil.copy(tmp_path / "config.json", folder)

    run = tiny.training(tmp_path, epochs=1)
    run.open()  # a configuration of the very same run
    often = {"checkpoint_seconds": 0.0} if moment == "checkpoint" else {}
    with pytest.raises(OSError, match=r"super-h3-s0 was deleted, moved or replaced while it was being trained"):
        tiny.training(folder, epochs=1, progress=lose, **often).run()
    assert folder.exists() == (how == "replaced")
    assert not folder.exists() or [path.name for path in folder.iterdir()] == ["config.json"]
    again = tiny.training(folder, epochs=1)
    assert again.run().values["epochs"] == 1
    assert run_state(folder).state == "finished"


def test_a_folder_lost_at_the_last_moment_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = checkpoint.save

    def lost(folder: Path, *arguments: Any) -> None:
        shutil.rmtree(folder)
        save(folder, *arguments)

    monkeypatch.setattr(checkpoint, "save", lost)
    with pytest.raises(OSError, match=RUN):
        compare(plan(tmp_path))
    assert not (tmp_path / RUN).exists()
    monkeypatch.undo()
    study, _ = compare(plan(tmp_path))
    assert study.finished == 1


def test_an_interrupted_run_has_the_right_names_of_its_classes(tmp_path: Path) -> None:
    """Who goes on writes them again, where a crash or a flipped bit has spoilt them."""
    with pytest.raises(Interrupted):
        tiny.training(tmp_path, epochs=1, stop=lambda: True).run()
    right = (tmp_path / "assets.json").read_bytes()
    for spoilt in (right.replace(b'"3"', b'"8"'), b"{", b""):
        (tmp_path / "assets.json").write_bytes(spoilt)
        tiny.training(tmp_path, epochs=1).open()
        assert (tmp_path / "assets.json").read_bytes() == right
