"""For every test: randomness from its own name, real data, a stand-in of the publishers, a small heap to collect."""

from __future__ import annotations

import gc
import os
import signal
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import settings

if TYPE_CHECKING:
    from helpers.publisher import Publisher

# They are read once, by the first import of Keras and of JAX.
os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# At these sizes compiling takes far longer than computing. `make test-slow` has XLA optimise as users have it.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")


def _without_waiting(handle: int) -> None:
    """What a test writes need not outlast the machine, and on a busy disk each call waits for everybody's writes."""


os.fsync = _without_waiting

torch.set_num_threads(1)  # one summation order, on whatever machine

# A deadline measures the load of the machine and not the code.
settings.register_profile("without deadline", deadline=None)
settings.load_profile("without deadline")

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # so are children of a shell that runs the tests in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect the tests, and take what that leaves out of the garbage collector's sight.

    Modules and test items stay until the end. A full collection would visit these 700,000 objects in a third of a
    second, and a benchmark asks for one before each measurement.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


def pytest_unconfigure() -> None:
    """Let Python clear up what was frozen: Triton's bindings print pages about what they find left at the end."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """The test's seed, a function of its id alone; torch's global generator starts from it. Shown when a test fails."""
    value = zlib.crc32(request.node.nodeid.encode())
    torch.default_generator.manual_seed(value)  # torch.manual_seed also tells CUDA, 8 ms where there is none
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(value)
    print(f"seed {value}")
    return value


@pytest.fixture
def settled_heap() -> None:
    """What earlier tests and their imports have left is out of the collector's sight, as after the collection above."""
    gc.freeze()


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    """A NumPy generator started from the test's seed."""
    return np.random.default_rng(seed)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets; a test that asks for it is skipped where there is none."""
    folder = os.environ.get("BETTER_ATTENTION_DATA")
    if not folder:
        pytest.skip("BETTER_ATTENTION_DATA is not set: this test reads real data")
    path = Path(folder)
    if not path.is_dir():
        pytest.fail(f"BETTER_ATTENTION_DATA={folder!r} is not a folder")
    return path


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    """A server that answers for every publisher's host."""
    from helpers.publisher import Publisher

    with Publisher() as server:
        yield server


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data home of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "better-attention" / "data"
