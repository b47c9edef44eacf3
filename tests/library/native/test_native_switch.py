"""The environment variable that switches the compiled kernels off: every usual spelling, and no misspelt one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
from better_attention.native.library import missing
try:
    print(missing() or "on")
except ValueError as error:
    print("refused:", error)
"""


def answer(value: str) -> str:
    environment = {**os.environ, "BETTER_ATTENTION_NATIVE": value}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("value", ["0", "off", "OFF", "false", "no"])
def test_no_switches_the_kernels_off(value: str) -> None:
    assert f"switched off by BETTER_ATTENTION_NATIVE={value}" in answer(value)


@pytest.mark.slow
@pytest.mark.parametrize("value", ["1", "on", "True", "yes", ""])
def test_yes_leaves_them_on(value: str) -> None:
    assert "switched off" not in answer(value)


def test_a_misspelt_switch_is_not_ignored() -> None:
    assert "refused: the environment variable BETTER_ATTENTION_NATIVE must be 1 or 0" in answer("offf")
