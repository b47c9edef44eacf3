"""DESIGN.md, CONTRIBUTING.md and tests/README.md speak of files that exist, and of every room that there is."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

import better_attention
from helpers import CHECKOUT, TESTS

PACKAGE = CHECKOUT / "src" / "better_attention"
PAGES = ("DESIGN.md", "CONTRIBUTING.md", "tests/README.md")
ROOTS = {"DESIGN.md": (CHECKOUT, PACKAGE), "CONTRIBUTING.md": (CHECKOUT, PACKAGE), "tests/README.md": (CHECKOUT, TESTS)}
PLANNED = {"adapters/hosts/HOST.py", "tests/library/adapters/test_HOST.py"}
"""Places that a recipe tells the first contributor to create."""


def named(page: str) -> Iterator[str]:
    """The files and folders that a page names in code style, without those that hold a placeholder."""
    text = (CHECKOUT / page).read_text("utf-8")
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    for name in re.findall(r"`([\w./-]+(?:/|\.(?:py|md|hpp|cpp|h|html|toml|txt)))`", text):
        if "NAME" not in name and "PART" not in name and name not in PLANNED:
            yield name


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_exists(page: str) -> None:
    names = set(named(page))
    assert len(names) >= 5
    absent = [name for name in sorted(names) if not any((root / name).exists() for root in ROOTS[page])]
    here = [name for name in absent if not list(PACKAGE.rglob(name)) and name != "better_attention/"]
    assert here == []


def test_every_room_of_the_library_and_of_the_lab_is_on_the_page() -> None:
    text = (CHECKOUT / "DESIGN.md").read_text("utf-8")
    library = {f.name for f in PACKAGE.iterdir() if f.is_dir() and f.name not in ("__pycache__", "templates")}
    lab = {f.name for f in (PACKAGE / "lab").iterdir() if f.is_dir() and f.name not in ("__pycache__", "published")}
    assert {room for room in library if f"`{room}/`" not in text} == set()
    assert {room for room in lab if f"`{room}`" not in text} == set()


def test_the_words_of_the_glossary_are_those_of_the_code() -> None:
    text = (CHECKOUT / "DESIGN.md").read_text("utf-8")
    assert all(f'`"{name}"`' in text for name in better_attention.MECHANISMS)
