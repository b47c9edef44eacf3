"""The README's Python blocks run as they stand, in one session, and print what it says they print."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)


def test_python_blocks_print_what_follows_them() -> None:
    blocks = BLOCK.findall(README.read_text(encoding="utf-8"))
    python = [i for i, (language, _) in enumerate(blocks) if language == "python"]
    assert len(python) >= 2
    session: dict[str, object] = {}
    for i in python:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(blocks[i][1], session)  # noqa: S102 - our own README
        assert blocks[i + 1] == ("text", printed.getvalue())


def test_named_files_and_targets_exist() -> None:
    text = README.read_text(encoding="utf-8")
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"`?make (\w[\w-]*)`?", text)
    assert targets
    for target in targets:
        assert f"\n{target}:" in makefile
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (README.parent / link).exists(), link
