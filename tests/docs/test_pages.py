"""Every block of code of the documentation runs, and prints what the page says that it prints."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from better_attention.cli import main
from helpers import CHECKOUT, pages

DOCS = CHECKOUT / "docs"
PAGES = {path.relative_to(DOCS).as_posix(): path.read_text("utf-8") for path in pages.files(DOCS)}


def _parameters() -> list[object]:
    return [
        pytest.param(name, marks=[getattr(pytest.mark, marker) for marker in sorted(pages.tier(text))])
        for name, text in PAGES.items()
        if any(b.reason is None and b.language in ("python", *pages.SHELL) for b in pages.blocks(text))
    ]


@pytest.mark.filterwarnings("default")  # as in a reader's session, where a warning does not end it
@pytest.mark.parametrize("name", _parameters())
def test_the_blocks_of_a_page_run(name: str, tmp_path: Path) -> None:
    pages.run(PAGES[name], tmp_path)


@pytest.mark.parametrize("name", PAGES)
def test_every_block_says_what_it_is_and_why_it_is_not_run(name: str) -> None:
    known = {"python", "text", "json", "yaml", "toml", *pages.SHELL}
    for block in pages.blocks(PAGES[name]):
        assert block.language in known, f"{name}:{block.line}: {block.language!r}"
        assert block.reason is None or len(block.reason.split()) >= 3, f"{name}:{block.line}: {block.reason}"


@pytest.mark.parametrize("name", PAGES)
def test_every_command_is_one_that_this_version_knows(name: str) -> None:
    parser = main.build_parser()
    for block in pages.blocks(PAGES[name]):
        for command, _ in block.commands if block.language in pages.SHELL else []:
            words = shlex.split(command)
            if words[0] == "better-attention" and not {"--help", "|"} & set(words):
                parser.parse_args(words[1:])


def test_blocks_are_found_and_judged(tmp_path: Path) -> None:
    text = "<!-- tests: slow -->\n```python\nx = 2\nprint(x)\n```\n\n```text\n2\n```\n\n"
    text += "<!-- not run: needs a GPU here -->\n```console\n$ a \\\n  b  # remark\nout\n```\n"
    first, second, third = pages.blocks(text)
    assert (first.line, first.language, first.reason) == (2, "python", None)
    assert (second.language, second.code) == ("text", "2\n")
    assert (third.reason, third.commands) == ("needs a GPU here", [("a b", "out\n")])
    assert pages.tier(text) == {"slow"}
    pages.run(text, tmp_path)
    with pytest.raises(AssertionError, match="line 2"):
        pages.run(text.replace("```text\n2", "```text\n3"), tmp_path)
    with pytest.raises(AssertionError, match="exit 3"):
        pages.run("```console\n$ exit 3\n```\n", tmp_path)
