"""Several processes of one launch: recognised on every device, one voice, and the way to go on."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Collection, Iterator
from contextlib import closing, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from better_attention.cli import main
from better_attention.cli.compare import command_line
from better_attention.lab.comparison.compare import check_shares
from better_attention.lab.training import launch, processes
from better_attention.lab.training.launch import PeerLostError, first_to_say, launched
from better_attention.lab.training.processes import make_accelerator, watching_peers
from better_attention.lab.training.progress import Interrupted
from helpers import tiny
from helpers.processes import free_port

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
COMPARE = ["compare", "--scale", "smoke", "--seeds", "1", "--mechanisms", "super", "--epochs"]


@pytest.fixture
def first() -> Iterator[int]:
    """The port at which the first process of a launch listens."""
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield int(listener.getsockname()[1])


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, first: int) -> dict[str, str]:
    """The environment of the second of two processes, as torchrun makes it."""
    there = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(first),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "RANK": "1",
        "LOCAL_RANK": "1",
        "TORCHELASTIC_ERROR_FILE": str(tmp_path / "attempt_0" / "1" / "error.json"),
    }
    (tmp_path / "attempt_0" / "1").mkdir(parents=True)
    for name, value in there.items():
        monkeypatch.setenv(name, value)
    return there


def play_accelerate(monkeypatch: pytest.MonkeyPatch, gpus: int, mps: bool = False) -> list[bool]:
    """accelerate as it decides: on a CPU it looks for other processes only where it is told to use the CPU."""
    asked: list[bool] = []

    def accelerator(*, cpu: bool, **_: Any) -> Any:
        asked.append(cpu)
        device = "cpu" if cpu or not (gpus or mps) else "cuda" if gpus else "mps"
        met = cpu or device == "cuda"
        return SimpleNamespace(device=torch.device(device), num_processes=launched() if met else 1)

    monkeypatch.setattr(processes, "Accelerator", accelerator)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    return asked


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize(
    ("device", "gpus", "mps", "found"),
    [("auto", 0, False, "cpu"), ("auto", 0, True, "cpu"), ("auto", 2, False, "cuda"), ("cpu", 2, False, "cpu")],
)
def test_processes_work_together_whatever_the_device(
    device: str, gpus: int, mps: bool, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    play_accelerate(monkeypatch, gpus, mps)
    accelerator = make_accelerator(device)
    assert (accelerator.num_processes, accelerator.device.type) == (2, found)


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize(
    ("device", "gpus", "mps", "told"),
    [
        ("mps", 0, True, "2 processes were launched, but on device mps they do not work together"),
        ("auto", 1, False, "2 processes were launched on this machine, which has 1 CUDA device; each needs its own"),
        ("cuda", 0, False, "no such device on this machine"),
    ],
)
def test_processes_that_cannot_are_told_so(
    device: str, gpus: int, mps: bool, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    play_accelerate(monkeypatch, gpus, mps)
    with pytest.raises(ValueError, match=f"{told}.*--device cpu"):
        make_accelerator(device)


def test_one_process_takes_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = play_accelerate(monkeypatch, 0)
    assert make_accelerator("auto").num_processes == 1
    assert asked == [False]


def test_accelerate_launch_that_started_one_process_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    play_accelerate(monkeypatch, 0)
    for name in ("ACCELERATE_MIXED_PRECISION", "MASTER_ADDR", "MASTER_PORT"):
        with warnings.catch_warnings():  # not yet: one of these may be there for another reason
            warnings.simplefilter("error")
            make_accelerator("auto")
        monkeypatch.setenv(name, "no")
    with pytest.warns(UserWarning, match="asked for several processes but started one only.*torchrun --nproc_per_node"):
        make_accelerator("auto")


def test_the_command_to_go_on_has_as_many_processes(monkeypatch: pytest.MonkeyPatch, two: dict[str, str]) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/better-attention", "compare", "--out", "my runs"])
    assert command_line() == "torchrun --nproc_per_node 2 -m better_attention compare --out 'my runs'"
    for name in two:
        monkeypatch.delenv(name)
    assert command_line() == "better-attention compare --out 'my runs'"
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert command_line().startswith("torchrun --nnodes 2 --nproc_per_node 4 ")


@pytest.mark.parametrize("before", [1, 2])
def test_going_on_with_other_processes_is_told_and_put_down(
    before: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Interrupted):
        tiny.training(tmp_path, stop=lambda: True).run()
    run = tiny.training(tmp_path)
    run.main = True
    run.position = SimpleNamespace(sessions=[{"commit": "a", "threads": torch.get_num_threads(), "processes": before}])
    run.accelerator = SimpleNamespace(num_processes=3 - before, device=torch.device("cpu"))
    told = "1 process so far, continues with 2" if before == 1 else "2 processes so far, continues with 1"
    command = "better-attention" if before == 1 else "torchrun --nproc_per_node 2 -m better_attention"
    with pytest.warns(UserWarning, match=rf"trained by {told}\. .*last digits.*`{command} \.\.\.` to reproduce it"):
        run.begin_session()
    assert [part["processes"] for part in run.position.sessions] == [before, 3 - before]


def test_one_message_of_several_processes(two: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert main.main(["compare", "chess"]) == 2
        assert main.main(["runs", "nowhere"]) == 2
        with pytest.raises(SystemExit):
            main.main(["compare", "--hands", "3"])
    told = capsys.readouterr().err
    for message in ("unknown task 'chess'", "nowhere is no folder", "unrecognized arguments: --hands"):
        assert told.count(message) == 1
    assert first_to_say("a", two | {"WORLD_SIZE": "1"})
    assert first_to_say("a", two | {"WORLD_SIZE": "1"})
    there = {"WORLD_SIZE": "2", "TORCHELASTIC_ERROR_FILE": "/nowhere/at/all"}  # rather twice than never
    assert first_to_say("a", there)
    assert first_to_say("a", there)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"MASTER_ADDR": None}, "WORLD_SIZE is 2, but MASTER_ADDR is not set"),
        ({"MASTER_PORT": ""}, "WORLD_SIZE is 2, but MASTER_PORT is not set"),
        ({"RANK": None}, "WORLD_SIZE is 2, but RANK is not set"),
        ({"RANK": "2"}, "RANK must be a number from 0 to 1 with WORLD_SIZE=2, received '2'"),
        ({"RANK": "first"}, "RANK must be a number from 0 to 1"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT must be a number from 0 to 65535"),
        ({"WORLD_SIZE": None}, "RANK is '1', but WORLD_SIZE is not set: expected more than one"),
        ({"WORLD_SIZE": "1"}, "RANK is '1', but WORLD_SIZE is 1: expected more than one"),
    ],
)
def test_an_incomplete_environment_is_refused(changes: dict[str, str | None], told: str, two: dict[str, str]) -> None:
    environment = {name: value for name, value in (two | changes).items() if value is not None}
    with pytest.raises(ValueError, match=rf"{told}.*torchrun --nproc_per_node 2 .*unset RANK"):
        launch.check_launch(environment)


def test_complete_environments(two: dict[str, str]) -> None:
    for environment in ({}, {"RANK": "0"}, {"RANK": "0", "WORLD_SIZE": "1"}, {"OMPI_COMM_WORLD_SIZE": "2"}, two):
        launch.check_launch(environment)


def test_nobody_at_the_meeting_place(two: dict[str, str], first: int) -> None:
    """Told within seconds; torch would wait for minutes. The first process itself looks for nobody."""
    processes.meet(two)
    deserted = two | {"MASTER_PORT": str(free_port())}
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"nobody answers at MASTER_ADDR=127.0.0.1, MASTER_PORT=\d+ .*torchrun"):
        processes.meet(deserted, seconds=0.2)
    assert time.monotonic() - began < 10
    processes.meet(deserted | {"RANK": "0"})
    with pytest.raises(ValueError, match="nobody answers"):  # under torchrun it is the agent that listens
        processes.meet(deserted | {"RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "True"}, seconds=0.0)


def test_more_processes_than_samples_in_a_batch(tmp_path: Path) -> None:
    plan = tiny.plan(tmp_path)
    check_shares(plan, 16)
    with pytest.raises(ValueError, match=r"17 processes share batches of 16 samples.*at most 16, or raise"):
        check_shares(plan, 17)


def test_a_model_is_spread_over_several_processes_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["compare", "digits", "--scale", "smoke", "--shard", "fsdp", "--out", str(tmp_path / "out")]) == 2
    assert "--shard fsdp spreads a model over several processes" in (said := capsys.readouterr().err)
    assert "torchrun --nproc_per_node 2 -m better_attention" in said


GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4711"


@pytest.mark.parametrize(
    "error", [RuntimeError(GLOO), torch.distributed.DistBackendError("NCCL error"), RuntimeError("Broken pipe")]
)
def test_a_lost_process_is_told_with_the_way_to_go_on(error: RuntimeError) -> None:
    told = r"another process of this launch has ended.*\n  torchrun 2"
    with pytest.raises(PeerLostError, match=told) as caught, watching_peers(2, "torchrun 2 ..."):
        raise error
    assert main.explain(caught.value) == (str(caught.value), 1)


def test_other_errors_are_bugs_as_before() -> None:
    for number, error in ((1, RuntimeError(GLOO)), (2, RuntimeError("shape '[2]' is invalid"))):
        with pytest.raises(RuntimeError) as caught, watching_peers(number):
            raise error
        assert caught.value is error


@pytest.mark.parametrize(
    ("environment", "number"),
    [
        ({}, 1),
        ({"WORLD_SIZE": "4"}, 4),
        ({"OMPI_COMM_WORLD_SIZE": "3"}, 3),
        ({"WORLD_SIZE": "x"}, 1),
        ({"WORLD_SIZE": ""}, 1),
    ],
)
def test_how_many_were_launched(environment: dict[str, str], number: int) -> None:
    assert launch.launched(environment) == number


def wait_for_checkpoint(folder: Path, old: Collection[str] = ()) -> None:
    """Wait until a run has a checkpoint that is not among ``old``."""
    for _ in range(1200):
        time.sleep(0.1)
        with suppress(FileNotFoundError):  # replaced meanwhile
            found = [path.read_text() for path in sorted(folder.glob("checkpoint-*.json"))]
            if found and found[-1] not in old:
                return
    raise AssertionError("no checkpoint")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes need two GPUs then")
def test_torchrun_without_a_device_and_then_one_process(tmp_path: Path) -> None:
    """The run is one of two processes; an error is said once; the loss of a process is explained; one goes on."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def run(command: list[str], **options: Any) -> Any:
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path, **options
        )

    out, err = run([*TORCHRUN, "-m", "better_attention", *COMPARE, "1"]).communicate(timeout=200)
    assert out.count("[1/1] super-h4-s0  test") == 1, err
    record = json.loads((tmp_path / "runs" / "digits-smoke" / "super-h4-s0" / "result.json").read_text())
    assert record["processes"] == 2
    assert record["command"].startswith("torchrun --nproc_per_node 2 -m better_attention compare")

    out, err = run([*TORCHRUN, "-m", "better_attention", *COMPARE, "1", "--heads", "3"]).communicate(timeout=200)
    assert err.count("does not divide the width") == 1

    long = [*COMPARE, "2000", "--patience", "0", "--out", "long"]
    both = run([*TORCHRUN, "-m", "better_attention", *long])
    signature = tmp_path / "long" / "super-h4-s0" / ".lock"
    wait_for_checkpoint(signature.parent)
    os.kill(int(signature.read_text().removeprefix("process ")), signal.SIGKILL)
    killed = time.monotonic()
    out, err = both.communicate(timeout=200)
    assert time.monotonic() - killed < 60
    assert both.returncode != 0
    assert err.count("another process of this launch has ended") == 1
    assert f"\n  torchrun --nproc_per_node 2 -m better_attention {' '.join(long)}" in err
    assert not re.search(r"gloo.*Connection|RuntimeError", err)

    last = max(signature.parent.glob("checkpoint-*.json")).read_text()
    alone = run([sys.executable, "-m", "better_attention", *long])
    wait_for_checkpoint(signature.parent, {last})
    alone.send_signal(signal.SIGINT)
    out, err = alone.communicate(timeout=200)
    assert "trained by 2 processes so far, continues with 1" in err


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="accelerate starts a process for each GPU then")
def test_accelerate_launch_on_a_cpu(tmp_path: Path) -> None:
    """What accelerate really sets: it starts one process, and the user is told so, with the line to use."""
    options = ["--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    compare = ["--module", "better_attention", *COMPARE, "1", "--device", "cpu"]
    launched = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *options, *compare],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert launched.returncode == 0, launched.stderr
    assert "asked for several processes but started one only" in launched.stderr
    assert "torchrun --nproc_per_node 2 -m better_attention" in launched.stderr
    record = json.loads((tmp_path / "runs" / "digits-smoke" / "super-h4-s0" / "result.json").read_text())
    assert record["processes"] == 1


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes need two GPUs then")
def test_torchrun_with_a_spread_model(tmp_path: Path) -> None:
    """The command itself: the losses of one process, and the peak memory of each process in the output."""
    command = [*COMPARE, "2", "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    options: dict[str, Any] = {"env": environment, "cwd": tmp_path, "capture_output": True, "text": True}
    spread = [*TORCHRUN, "-m", "better_attention", *command, "--shard", "fsdp", "--out", "spread"]
    done = subprocess.run(spread, timeout=400, check=False, **options)
    assert done.returncode == 0, done.stderr
    assert re.search(r"peak memory of its processes [\d,]+, [\d,]+ MiB", done.stdout)
    subprocess.run([sys.executable, "-m", "better_attention", *command, "--out", "one"], check=True, **options)
    losses = [
        {key: value for key, value in json.loads(path.read_text()).items() if key.endswith("_loss")}
        for path in (tmp_path / name / "super-h4-s0" / "result.json" for name in ("spread", "one"))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes need two GPUs then")
def test_ranks_with_other_data_end_at_once(tmp_path: Path) -> None:
    """One of two processes is given another command, as on a second machine; both say so within seconds."""
    port = free_port()
    ranks = []
    for rank in range(2):
        environment = os.environ | {
            **{"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)},
            **{"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        }
        command = [sys.executable, "-m", "better_attention", *COMPARE, "1", "--set", f"train_samples={200 + rank}"]
        ranks.append(
            subprocess.Popen(
                command, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True
            )
        )
    try:
        said = [rank.communicate(timeout=200)[1] for rank in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [2, 2]
    for text in said:
        assert "the data: process 1 differs from process 0" in text
        assert "task, settings or runs: process 1 differs" in text
