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

PACKAGE = Path(__file__).resolve().parents[2]
"""The folder of this package."""
SOURCE = ("src", "pyproject.toml", "constraints.txt")
"""The files of a checkout that decide what a run computes."""


def environment(command: str) -> dict[str, Any]:
    """Where a run happens. It is recorded, but not compared when a run is continued."""
    return {
        "command": command,
        "commit": commit(),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }


# The code in use is that which was imported, so the first answer holds as long as the process.
@cache
def commit(package: Path = PACKAGE) -> str:
    """The commit of the source in use, with ``+changes`` if it was modified since; ``"unknown"`` outside a checkout.

    Other files of the checkout do not count, for example results that a command has just rewritten.

    Args:
        package: folder of the package. Only ``CHECKOUT/src/better_attention`` is recognised: an installed package may
            lie inside the repository of another project, whose commit would be misleading.
    """
    checkout = package.parent.parent
    if package != checkout / "src" / "better_attention" or not (checkout / ".git").exists():
        return "unknown"
    try:
        head = _git(checkout, "rev-parse", "HEAD")
        changed_files = _git(checkout, "status", "--porcelain", "--untracked-files=no", "--", *SOURCE)
        return head + ("+changes" if changed_files else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(checkout: Path, *arguments: str) -> str:
    command = ["git", "-C", str(checkout), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers may depend on."""
    installed = {"python": platform.python_version()}
    for package in ("better-attention", "torch", "accelerate", "numpy", "safetensors"):
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            installed[package] = "not installed as a package"
    return installed


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Key, old and new value of each entry in which two descriptions differ; nested mappings entry by entry."""
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from changed(old, new)
        elif old != new:
            yield key, old, new
