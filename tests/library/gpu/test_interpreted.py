"""The GPU kernels in Triton's interpreter: outputs and gradients against the oracle, feature by feature.

The checks themselves are in ``helpers/triton_cases.py``, and run in one process for each tier.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest

from helpers import triton_cases
from helpers.triton_cases import CHECKS, MORE_CHECKS

TESTS = Path(triton_cases.__file__).parents[1]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@cache
def outcomes(tier: str) -> Mapping[str, str]:
    """What failed in a tier, by name."""
    names = list(CHECKS if tier == "unit" else MORE_CHECKS)
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    # Where a GPU computes infinity in silence, the interpreter's NumPy warns.
    quiet = "ignore::RuntimeWarning:triton.runtime.interpreter"
    result = subprocess.run(
        [sys.executable, "-W", "error", "-W", quiet, "-m", "helpers.triton_cases", *names],
        cwd=TESTS,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    failures: Mapping[str, str] = json.loads(result.stdout.splitlines()[-1])["failures"]
    return failures


@pytest.mark.parametrize("name", CHECKS)
def test_in_the_interpreter(name: str) -> None:
    assert name not in outcomes("unit"), outcomes("unit")[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_CHECKS)
def test_more_in_the_interpreter(name: str) -> None:
    assert name not in outcomes("slow"), outcomes("slow")[name]
