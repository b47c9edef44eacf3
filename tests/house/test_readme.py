"""The README's Python blocks run as they stand, in one session, and print what it says they print."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import tomllib

from better_attention.cli import main
from helpers import CHECKOUT

README = CHECKOUT / "README.md"
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


def commands() -> list[str]:
    """The lines of the console blocks, in the order printed, without their remarks."""
    blocks = [code for language, code in BLOCK.findall(README.read_text(encoding="utf-8")) if language == "console"]
    lines = [line for block in blocks for line in block.splitlines()]
    assert all(line.startswith("$ ") for line in lines)
    return [line.removeprefix("$ ").partition("#")[0].strip() for line in lines]


def test_every_command_is_one_that_this_version_knows() -> None:
    parser = main.build_parser()
    ours = [shlex.split(line) for line in commands() if line.startswith("better-attention ")]
    verbs = [parser.parse_args(words[1:]).run.__module__.rpartition(".")[2] for words in ours]
    assert set(verbs) >= set(main.VERBS) - {"list", "bench"}
    (ladder,) = [words for words in ours if words[1] == "ladder"]
    assert ladder[2:4] == ["--scale", "smoke"]  # the others take hours


def test_in_a_fresh_shell_the_environment_comes_before_what_needs_it() -> None:
    lines = commands()
    text = README.read_text(encoding="utf-8")
    made, activated = lines.index("make compare"), lines.index(". .venv/bin/activate")
    first = next(i for i, line in enumerate(lines) if line.startswith("better-attention "))
    assert made < activated < first
    assert text.index(". .venv/bin/activate") < text.index("import better_attention as ba")
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    assert "VENV ?= .venv\n" in makefile
    assert lines.index("better-attention data fetch mnist") < next(
        i for i, line in enumerate(lines) if line.startswith("better-attention compare mnist")
    )


def test_what_is_installed_comes_from_the_clone() -> None:
    """No index has the package; the extras are those that it declares."""
    project = tomllib.loads((README.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    given = re.findall(r"`pip install ([^`]+)`", README.read_text(encoding="utf-8"))
    assert given
    for target in given:
        found = re.fullmatch(r"\.(?:\[(\w+)\])?", shlex.split(target)[0])
        assert found, target
        assert found[1] is None or found[1] in project["optional-dependencies"]
    assert project["requires-python"] == ">=3.11"
    assert "Python 3.11 or later" in README.read_text(encoding="utf-8")


def test_an_index_shows_no_link_that_leads_nowhere() -> None:
    """What the build writes into the package: relative links become paths in the source distribution, pictures go."""
    pyproject = tomllib.loads((README.parent / "pyproject.toml").read_text(encoding="utf-8"))
    assert "readme" in pyproject["project"]["dynamic"]
    settings = pyproject["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    text = "".join(
        README.read_text(encoding="utf-8") if "path" in part else part["text"] for part in settings["fragments"]
    )
    for rule in settings["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    assert re.findall(r"\]\((?!https://)", text) == []
    assert "![" not in text
    assert "ten minutes (`docs/start.md`)" in text
    assert "[arXiv 2403.01643](https://arxiv.org/abs/2403.01643)" in text
    excluded = pyproject["tool"]["scikit-build"]["sdist"]["exclude"]
    paths = re.findall(r"\(`([\w./-]+\.md)`\)", text)
    assert len(paths) > 10
    assert all((README.parent / path).exists() and f"/{path.split('/')[0]}" not in excluded for path in paths)
