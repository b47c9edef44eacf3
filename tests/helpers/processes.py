"""Python programs that run as two processes of one launch."""

from __future__ import annotations

import os
import subprocess
import sys


def run_two(program: str, *arguments: object, seconds: float) -> None:
    """Run ``program`` twice at once, its first argument 0 and 1; both must succeed."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(rank), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=seconds)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)
