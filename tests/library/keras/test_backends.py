"""The tests of this folder once more, on the other backends of Keras."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["tensorflow", "torch", "numpy"])
def test_another_backend_gives_the_same(backend: str) -> None:
    if find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    files = [str(file) for file in sorted(FOLDER.glob("test_*.py")) if file != Path(__file__)]
    # TensorFlow itself uses what others have deprecated: only our own warnings are errors there.
    relaxed = ["-W", "ignore::DeprecationWarning"] if backend == "tensorflow" else []
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *relaxed, *files],
        cwd=FOLDER.parents[2],
        env={**os.environ, "KERAS_BACKEND": backend, "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout
