"""The blocks of code in a Markdown page, and how they are run.

A block is run unless a comment directly above its fence says why not: ``<!-- not run: reason -->``. A comment in the
first line of a page puts the whole page into another tier: ``<!-- tests: slow -->`` or ``<!-- tests: hosts -->``.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(
    r"(?P<before>^[^\n]*\n)?^(?P<indent>[ ]*)```(?P<language>[\w-]*)[^\n]*\n(?P<code>.*?)^(?P=indent)```[ ]*$",
    re.DOTALL | re.MULTILINE,
)
NOT_RUN = re.compile(r"<!-- not run: (?P<reason>.*?) -->")
TIER = re.compile(r"<!-- tests: (?P<tier>[\w ]+) -->")
SHELL = ("console", "bash", "sh", "shell")


@dataclass(frozen=True)
class Block:
    """One block of code: where it begins, what it is, and why it is not run, if so."""

    line: int
    language: str
    code: str
    reason: str | None

    @property
    def commands(self) -> list[tuple[str, str]]:
        """The commands of a console block, continued lines joined, without remarks; and what is printed after each."""
        found: list[tuple[str, str]] = []
        text = self.code.replace("\\\n", " ")
        for line in text.splitlines(keepends=True):
            if line.startswith("$ "):
                found.append((" ".join(shlex.split(line[2:], comments=True, posix=False)), ""))
            elif found:
                found[-1] = (found[-1][0], found[-1][1] + line)
        return found


def blocks(text: str) -> list[Block]:
    """The blocks of a page, in its order."""
    found = []
    for match in FENCE.finditer(text):
        indent = len(match["indent"])
        code = "".join(line[indent:] or "\n" for line in match["code"].splitlines(keepends=True))
        marker = NOT_RUN.search(match["before"] or "")
        line = text[: match.start("language")].count("\n") + 1
        found.append(Block(line, match["language"], code, marker["reason"] if marker else None))
    return found


def tier(text: str) -> set[str]:
    """The markers of a page."""
    match = TIER.match(text)
    return set(match["tier"].split()) if match else set()


def run(text: str, folder: Path) -> None:
    """Run the blocks of a page in its order, in ``folder``: Python in one session, commands in a shell.

    Raises:
        AssertionError: something failed, or printed something else than the page says.
    """
    session: dict[str, object] = {"__name__": "__main__"}
    everything = blocks(text)
    for number, block in enumerate(everything):
        after = everything[number + 1] if number + 1 < len(everything) else None
        expected = after.code if after and after.language == "text" and not between(text, block, after) else ""
        if block.reason is not None:
            continue
        with contextlib.chdir(folder):
            if block.language == "python":
                assert printed(block, session) == expected, f"line {block.line}"
            elif block.language in SHELL:
                for command, output in block.commands:
                    result = shell(command)
                    assert result.returncode == 0, f"line {block.line}: {command}\n{result.stdout}{result.stderr}"
                    assert not output or result.stdout == output, f"line {block.line}: {command}\n{result.stdout}"


def between(text: str, first: Block, second: Block) -> str:
    """What stands between two blocks, blank lines left out."""
    lines = text.splitlines()[first.line + first.code.count("\n") + 1 : second.line - 1]
    return "".join(line.strip() for line in lines)


def printed(block: Block, session: dict[str, object]) -> str:
    """What a block of Python prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(block.code, f"block at line {block.line}", "exec"), session)  # noqa: S102 - our own pages
    return out.getvalue()


def shell(command: str) -> subprocess.CompletedProcess[str]:
    """Run a command with this interpreter's programs first in the path."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = os.environ | {"PATH": path, "COLUMNS": "80", "NO_COLOR": "1"}
    return subprocess.run(command, shell=True, env=environment, capture_output=True, text=True, check=False)  # noqa: S602 - our own pages


def files(root: Path) -> Iterator[Path]:
    """The pages below ``root``."""
    yield from sorted(root.rglob("*.md"))
