"""Comparisons on Ray: what a worker does, which needs no Ray; and whole sweeps, which start a cluster (slow).

Starting Ray and one worker takes about ten seconds of a CPU, most of it imports, so that no whole sweep is among the
unit tests. There a worker's function runs in the test's own process, and everything that refuses a cluster is tested.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from better_attention.cli import main
from better_attention.lab.comparison import cluster, ray_worker
from better_attention.lab.comparison.cluster import Cluster
from better_attention.lab.comparison.compare import compare
from better_attention.lab.comparison.ray_worker import SENT, Order, event_of, work
from better_attention.lab.runs.folder import RunFolder
from better_attention.lab.runs.provenance import versions
from better_attention.lab.training.events import Began, Ended, Event, Failed, Updated
from helpers import tiny
from helpers.processes import free_port

TIMES = {
    *("epoch_seconds", "waiting_share", "times_as_fast", "finished", "command", "commit"),
    *("tokens_per_second", "decoded_per_second"),
}
"""What differs from one run to the next of the same numbers."""


def numbers(folder: Path) -> tuple[dict[str, Any], list[dict[str, float]], bytes]:
    """What a run is bit for bit: its record and its curve without times, its weights."""
    record = json.loads((folder / "result.json").read_text("utf-8"))
    curve = [
        {key: value for key, value in line.items() if key not in ("seconds", "waiting")}
        for line in RunFolder(folder).curve()
    ]
    kept = {key: value for key, value in record.items() if key not in TIMES}
    return kept, curve, (folder / "model.safetensors").read_bytes()


def order(out: Path, mark: str, **changes: Any) -> Order:
    """The tiny task, for a worker."""
    task = tiny.task(epochs=2, dropout=0.2)
    what = Order(
        task=task.name,
        scale=task.scale,
        settings=task.settings(),
        variant="super",
        heads=3,
        seed=0,
        number=2,
        runs=5,
        data_sha256=tiny.splits().digest,
        assets=tiny.splits().assets,
        departures=(),
        out=str(out),
        mark=mark,
        command="better-attention compare",
        device="cpu",
        threads=1,
        versions=versions(),
    )
    return replace(what, **changes)


def arrays() -> dict[str, Any]:
    parts = {name: getattr(tiny.splits(), name) for name in ("train", "validation", "test")}
    return {name: (part.inputs.numpy(), part.targets.numpy()) for name, part in parts.items()}


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The threads of a worker, and no time for measuring speeds."""
    monkeypatch.setattr(ray_worker, "measure", tiny.pace)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def worked(what: Order, *, stop_at: str = "") -> tuple[dict[str, str], dict[str, bytes], list[Mapping[str, Any]]]:
    told: list[Mapping[str, Any]] = []

    def tell(message: Mapping[str, Any]) -> bool:
        told.append(json.loads(json.dumps(message)))
        return message["kind"] == stop_at

    text, files = work(json.dumps(asdict(what)), arrays(), tell)
    return json.loads(text), files, told


# --- a worker ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("shared", [True, False])
def test_a_worker_trains_what_would_be_trained_here(shared: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mark").touch()
    outcome, files, told = worked(order(out, "mark" if shared else "elsewhere"))
    assert outcome == {"state": "finished", "text": ""}
    if not shared:
        assert list(out.iterdir()) == [out / "mark"]
        (out / "super-h3-s0").mkdir()
        for name, content in files.items():
            (out / "super-h3-s0" / name).write_bytes(content)
    assert set(files) == (set() if shared else set(SENT))
    tiny.training(tmp_path / "here", epochs=2, dropout=0.2).run()
    assert numbers(out / "super-h3-s0") == numbers(tmp_path / "here")
    record = RunFolder(out / "super-h3-s0").record()
    assert record is not None
    RunFolder(out / "super-h3-s0").check_files(record)
    assert [message["kind"] for message in told[:3]] == ["waiting", "began", "updated"]
    event = event_of(told[2], "super-h3-s0", 2, 5)
    assert isinstance(event, Updated)
    assert (event.name, event.position.step, event.steps) == ("super-h3-s0", 1, 6)
    assert event_of(told[1], "super-h3-s0", 2, 5) == Began("super-h3-s0", 2, 5)
    assert event_of(told[0], "super-h3-s0", 2, 5) is None


@pytest.mark.usefixtures("one_thread")
def test_a_worker_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    """As after a worker that was killed: the numbers of a run in one piece, where the folder is shared."""
    (tmp_path / "mark").touch()
    outcome, _, _ = worked(order(tmp_path, "mark"), stop_at="updated")
    assert outcome["state"] == "interrupted"
    assert list((tmp_path / "super-h3-s0").glob("checkpoint-*.json"))
    assert worked(order(tmp_path, "mark"))[0]["state"] == "finished"
    tiny.training(tmp_path / "here", epochs=2, dropout=0.2).run()
    (record, *rest), (whole, *other) = numbers(tmp_path / "super-h3-s0"), numbers(tmp_path / "here")
    assert (record, rest) == (whole, other)


@pytest.mark.usefixtures("one_thread")
def test_a_worker_tells_what_keeps_it_from_training(tmp_path: Path) -> None:
    (tmp_path / "mark").touch()
    assert worked(order(tmp_path, "mark"), stop_at="waiting")[0]["state"] == "interrupted"
    for changes, state, text in (
        ({"versions": {"torch": "1.0"}}, "refused", "torch .* there, 1.0 here"),
        ({"data_sha256": "0" * 64}, "refused", "arrived damaged"),
        ({"settings": tiny.task(lr=1e30).settings()}, "failed", "Try a lower --lr"),
    ):
        outcome, files, _ = worked(order(tmp_path, "mark", **changes))
        assert (outcome["state"], files) == (state, {})
        assert re.search(text, outcome["text"], re.DOTALL), outcome


# --- a cluster that cannot be used ------------------------------------------------------------------------------------

SMOKE = ["compare", "digits", "--scale", "smoke", "--engine", "ray"]


@pytest.mark.parametrize("address", ["10.0.0.1", "ray://10.0.0.1:10001", "a b:1", "host:123456"])
def test_an_address_of_another_form(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([*SMOKE, "--address", address]) == 2
    said = capsys.readouterr().err
    assert "--address" in said
    assert address in said


def test_nobody_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ray")
    began = time.monotonic()
    address = f"127.0.0.1:{free_port()}"
    assert main.main([*SMOKE, "--address", address, "--out", str(tmp_path / "out")]) == 2
    assert time.monotonic() - began < 30
    assert f"--address {address}: nobody answers there" in capsys.readouterr().err


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main.main(SMOKE) == 2
    assert 'pip install "better-attention[ray]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--engine", "local", "--address", "a:1"], "--address has a meaning for --engine ray alone"),
        (["--engine", "local", "--cpus-per-run", "2"], "--cpus-per-run has a meaning for --engine ray alone"),
        (["--shard", "fsdp"], "--shard spreads a model"),
        (["--gpus-per-run", "2"], "a run uses one GPU"),
        (["--device", "cuda"], "--gpus-per-run decides"),
        (["--gpus-per-run", "1", "--device", "cpu"], "--gpus-per-run decides"),
    ],
)
def test_options_that_do_not_fit(options: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([*SMOKE, *options]) == 2
    assert told in capsys.readouterr().err


def test_no_machine_is_large_enough() -> None:
    nodes = [
        {"Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0}},
        {"Alive": True, "Resources": {"CPU": 8.0}},
        {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}},
    ]
    cluster.check_resources(nodes, Cluster(None, 8))
    cluster.check_resources(nodes, Cluster(None, 4, 1))
    for wanted, told in ((Cluster(None, 9), "has 9 CPUs; at most 8 CPUs"), (Cluster(None, 5, 1), "5 CPUs and 1 GPU")):
        with pytest.raises(ValueError, match=told):
            cluster.check_resources(nodes, wanted)


# --- whole sweeps -----------------------------------------------------------------------------------------------------


@pytest.fixture
def ray_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ray in this process, its processes gone afterwards, and a token that no file holds."""
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_here")
def test_a_sweep_gives_the_tables_of_the_local_engine(tmp_path: Path) -> None:
    from better_attention.lab.comparison.ray_engine import RayEngine

    events: list[Event] = []
    changes: dict[str, Any] = {"task": tiny.task(epochs=2, dropout=0.2), "seeds": 2}
    here = replace(tiny.plan(tmp_path / "local"), **changes)
    there = replace(tiny.plan(tmp_path / "ray"), **changes)
    assert compare(here, measure=tiny.pace)[1] == []
    study, failed = compare(there, events.append, engine=RayEngine(Cluster(None, 1)))
    assert failed == []
    names = sorted(job.folder_name for job in there.jobs())
    assert len(names) == 4
    assert study.finished == len(names)
    for name in names:
        assert numbers(there.out / name) == numbers(here.out / name)
        mine = [event for event in events if getattr(event, "name", "") == name]
        assert isinstance(mine[0], Began)
        assert isinstance(mine[-1], Ended)
        assert any(isinstance(event, Updated) for event in mine)
    assert not list(there.out.glob(".sweep-*"))
    # The same command has nothing to do.
    again: list[Event] = []
    assert compare(there, again.append, engine=RayEngine(Cluster(None, 1)))[1] == []
    assert [type(event) for event in again if not isinstance(event, Began)][1:] == [Ended] * 4


def command(out: Path, *more: str) -> list[str]:
    long = ["--scale", "smoke", "--mechanisms", "super", "--epochs", "60", "--patience", "0", "--out", str(out)]
    return [sys.executable, "-m", "better_attention", "compare", "digits", *long, *more]


@pytest.mark.slow
@pytest.mark.parametrize("killed", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_worker_is_replaced_and_ctrl_c_saves(killed: signal.Signals, tmp_path: Path) -> None:
    """A worker that is killed goes on from its checkpoint; a command that is interrupted continues by itself."""
    pytest.importorskip("ray")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    options: dict[str, Any] = {"env": environment, "stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    sweep = subprocess.Popen(command(tmp_path / "ray", "--engine", "ray"), **options)
    try:
        folder = tmp_path / "ray" / "super-h4-s0"
        end = time.monotonic() + 400
        while not list(folder.glob("checkpoint-*.json")):
            assert sweep.poll() is None, sweep.communicate()
            assert time.monotonic() < end
            time.sleep(0.1)
        if killed == signal.SIGKILL:
            os.kill(int((folder / ".lock").read_text().removeprefix("process ")), signal.SIGKILL)
        else:
            sweep.send_signal(signal.SIGINT)
        out, err = sweep.communicate(timeout=400)
    finally:
        sweep.kill()
        sweep.communicate()
    if killed == signal.SIGKILL:
        assert sweep.returncode == 0, err
    else:
        assert sweep.returncode == 130, err
        assert "--engine ray" in out
        subprocess.run(command(tmp_path / "ray", "--engine", "ray"), check=True, timeout=400, **options)
    subprocess.run(command(tmp_path / "local"), check=True, timeout=400, **options)
    assert numbers(folder) == numbers(tmp_path / "local" / "super-h4-s0")


@pytest.mark.slow
def test_something_else_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A port at which some other program listens: refused within seconds, where Ray would try for minutes."""
    pytest.importorskip("ray")
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        began = time.monotonic()
        assert main.main([*SMOKE, "--address", address, "--out", str(tmp_path / "out")]) == 2
    assert time.monotonic() - began < cluster.HEALTH_SECONDS + 30
    assert f"--address {address}: what answers there is no Ray cluster" in capsys.readouterr().err


def test_a_run_whose_worker_is_lost_again_and_again_is_left_out() -> None:
    """Told as a failure of that run; the others go on."""
    pytest.importorskip("ray")
    from better_attention.lab.comparison.ray_engine import _Sweep

    class LostError(Exception):
        pass

    class Fake:
        class exceptions:  # noqa: N801
            TaskCancelledError = RayTaskError = type("Other", (Exception,), {})
            RayError = LostError

        def get(self, task: object) -> object:
            raise LostError("The worker died.\nA long story.")

    events: list[Event] = []
    sweep = object.__new__(_Sweep)
    sweep.ray, sweep.notify, sweep.failed = Fake(), events.append, []
    assert sweep.end(object(), "super-h3-s0") is False
    assert sweep.failed == ["super-h3-s0"]
    (event,) = events
    assert isinstance(event, Failed)
    assert "its worker was lost 4 times, the last time: The worker died" in str(event.error)


def test_the_inbox() -> None:
    pytest.importorskip("ray")
    from better_attention.lab.comparison.ray_engine import inbox_class

    inbox = inbox_class()()
    assert [inbox.tell("a"), inbox.tell("b")] == [False, False]
    assert (inbox.take(), inbox.take()) == (["a", "b"], [])
    inbox.stop()
    assert inbox.tell("c") is True
