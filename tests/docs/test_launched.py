"""The programs of the documentation that torchrun starts print what the pages say that they print."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import CHECKOUT, pages

PROGRAMS = {"divide.py": "scale.md", "sequence.py": "scale.md"}
"""Name of a program, which its first line says -> the page that has it."""


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_for_several_processes(program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = pages.blocks((CHECKOUT / "docs" / PROGRAMS[program]).read_text("utf-8"))
    (code,) = [block.code for block in blocks if block.code.startswith(f"# {program}\n")]
    consoles = [pair for block in blocks if block.language in pages.SHELL for pair in block.commands]
    ((command, output),) = [pair for pair in consoles if pair[0].endswith(f" {program}")]
    monkeypatch.chdir(tmp_path)
    Path(program).write_text(code, "utf-8")
    # The script torchrun itself belongs to the environment in which torch was installed.
    done = pages.shell(command.replace("torchrun", "python -m torch.distributed.run", 1))
    assert done.returncode == 0, done.stderr
    assert done.stdout == output
