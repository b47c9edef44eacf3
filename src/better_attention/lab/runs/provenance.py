"""Where a number comes from: the commit, the versions, the machine."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import better_attention

SOURCE = ("src", "pyproject.toml", "constraints.txt")
"""What a run depends on, of a checkout."""


def environment(command: str) -> dict[str, Any]:
    """Where a run happens: recorded, not compared."""
    return {
        "command": command,
        "commit": commit(),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }


@cache
def commit() -> str:
    """The commit of the source that runs, ``+changes`` where it differs from that, or ``"unknown"``.

    What else lies in the checkout, results that a command has just rewritten for example, does not count.

    Only a checkout of better-attention itself is asked: an installed package may lie inside another
    project's repository, whose commit would say nothing.
    """
    package = Path(better_attention.__file__).resolve().parent
    checkout = package.parent.parent
    if package != checkout / "src" / "better_attention" or not (checkout / ".git").exists():
        return "unknown"
    try:
        head = _git(checkout, "rev-parse", "HEAD")
        changed = _git(checkout, "status", "--porcelain", "--untracked-files=no", "--", *SOURCE)
        return head + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(checkout: Path, *arguments: str) -> str:
    command = ["git", "-C", str(checkout), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers may depend on."""
    found = {"python": platform.python_version()}
    for package in ("better-attention", "torch", "accelerate", "numpy", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Key, old and new value of each entry in which two descriptions differ; those within mappings one by one."""
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from changed(old, new)
        elif old != new:
            yield key, old, new
