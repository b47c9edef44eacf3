"""Plain technical English: phrases that crept in before and are understood by nobody at first reading.

Each pattern stands for a habit, with the wording to use instead. Strings, comments and docstrings of the source
count, and the documents; the papers' own data and the tests do not.
"""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import better_attention
from helpers import CHECKOUT

PACKAGE = Path(better_attention.__file__).parent
NOUN = r"(?:row|line|run|folder|file|text|number|picture|mechanism|class|task|verb|suite|seed|column|sentence|bar)"
PHRASES = {
    rf"\ba {NOUN} (?:a|an|each|every) [a-z]+\b(?! of| with| in| is)": "one row per mechanism, a folder for each class",
    r"(?<!there )\bis none\b": "is not one; there is no …",
    r"\btells? of\b": "describes, reports, shows",
    r"\bof one's own\b|\bof (?:a|the) \w+'s own\b": "its own, your own",
    r"\b[Ll]eave \S+ away\b": "remove, omit",
    r"\bin turn\b": "one after another",
    r"\bso many\b": "that many",
    r"\bhas had its say\b": "was applied before",
    r"\bsomebody else's\b": "of another program",
    r"\bare not to be had\b|\bis not to be had\b": "are not available",
    r"\b[Tt]he way out\b": "what to do instead",
    r"\bhand over\b|\bhanded over\b": "pass",
    r"\bput down\b": "record",
    r"\bspeaks? of\b": "names, describes",
    r"\bwhosoever|\bthereof\b|\bin its stead\b|\bevermore\b|\bever after\b|\bhitherto\b": "modern words",
    r"\b[Mm]end(?:ed|s)?\b": "fix",
    r"\bpictures? that\b.*\bthat\b.*\bthat\b": "two sentences",
    r"\b[Ww]hoever\b": "code that …, users who …",
    r"\bgoes? on\b|\bwent on\b": "continues, resumes",
    r"\bas many\b.*\bas many\b": "two sentences",
    r"\bthere is such a\b|\bno such thing\b": "already exists; does not exist",
    r"\bis taken for\b|\btaken for a\b": "is treated as",
    r"\bby the hour\b|\bthe hour,": "depends on the load of the machine",
}


def words_of(file: Path) -> Iterator[tuple[int, str]]:
    """The line numbers and contents of the comments and strings of a Python file."""
    with file.open("rb") as source:
        for token in tokenize.tokenize(io.BytesIO(source.read()).readline):
            if token.type in (tokenize.COMMENT, tokenize.STRING):
                for offset, line in enumerate(token.string.splitlines()):
                    yield token.start[0] + offset, line


def faults(lines: Iterator[tuple[int, str]], name: str) -> list[str]:
    """Every phrase that a text should not hold, with its place and what to write instead."""
    return [
        f"{name}:{number}: {match.group()!r}; better: {better}"
        for number, line in lines
        for pattern, better in PHRASES.items()
        if (match := re.search(pattern, line))
    ]


@pytest.mark.parametrize(
    "room",
    sorted({f.relative_to(PACKAGE).parts[0] if f.parent != PACKAGE else "." for f in PACKAGE.rglob("*.py")}),
)
def test_the_source_speaks_plain_english(room: str) -> None:
    files = sorted(PACKAGE.glob("*.py") if room == "." else (PACKAGE / room).rglob("*.py"))
    assert [fault for f in files for fault in faults(words_of(f), str(f.relative_to(PACKAGE)))] == []


PAGES = ["README.md", "DESIGN.md", "CONTRIBUTING.md", "tests/README.md"]
PAGES += sorted(path.relative_to(CHECKOUT).as_posix() for path in (CHECKOUT / "docs").rglob("*.md"))


@pytest.mark.parametrize("page", PAGES)
def test_the_documents_speak_plain_english(page: str) -> None:
    lines = (CHECKOUT / page).read_text("utf-8").splitlines()
    assert faults(enumerate(lines, 1), page) == []


@pytest.mark.parametrize(
    "file", sorted((PACKAGE / "lab" / "report" / "templates").glob("*.html")), ids=lambda f: f.name
)
def test_the_pages_speak_plain_english(file: Path) -> None:
    spoken = re.sub(r"{%.*?%}|{{.*?}}", "", file.read_text("utf-8"))  # the rest is code, where "is none" is right
    assert faults(enumerate(spoken.splitlines(), 1), file.name) == []


def test_the_search_finds_what_it_should() -> None:
    bad = [
        "prints a row a mechanism",
        "a number that is none",
        "Leave --data away.",
        "a folder a class",
        "it goes on",
    ]
    assert all(faults(iter([(1, line)]), "here") for line in bad)
    good = ["one row per mechanism", "a run of a comparison", "a file in a folder", "the next step"]
    assert [line for line in good if faults(iter([(1, line)]), "here")] == []
