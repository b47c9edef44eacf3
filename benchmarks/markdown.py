"""Tables in Markdown, and the pages in which commands put them between what is written by hand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from better_attention.lab.files import write_atomic

BEGIN, END = "<!-- tables: written by the command -->", "<!-- end of tables -->"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = False) -> str:
    """A table; with ``numbers`` all columns but the first are on the right."""
    rule = ["---", *["---:" if numbers else "---"] * (len(header) - 1)]
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, rule, *rows))


def put(page: Path, text: str) -> None:
    """Put ``text`` between the two marks of a page that has them, and leave the rest of it as it is."""
    old = page.read_text("utf-8")
    head, tail = old.split(BEGIN)[0], old.split(END)[1]
    write_atomic(page, f"{head}{BEGIN}\n\n{text}\n{END}{tail}")
