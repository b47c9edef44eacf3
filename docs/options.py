"""Options of commands in running text, ``--scale``, that no line ends within."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from markdown import Extension, Markdown
from markdown.treeprocessors import Treeprocessor
from markdown.util import AtomicString

OPTION = re.compile(r"(?<!\S)(--?[a-z][\w-]*)")


class Whole(Treeprocessor):
    """Puts options within ``code`` into elements of the class ``whole``: browsers break lines after any hyphen."""

    def run(self, root: ElementTree.Element) -> None:
        """Change the tree of a page."""
        for code in root.iter("code"):
            before, *parts = OPTION.split(code.text or "")
            if not parts or len(code):
                continue
            code.text = AtomicString(before)
            for option, after in zip(parts[::2], parts[1::2], strict=True):
                whole = ElementTree.SubElement(code, "span", {"class": "whole"})
                whole.text, whole.tail = AtomicString(option), AtomicString(after)


class Options(Extension):
    """The treatment of options."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802 - their name
        """Add it to the rules of ``md``, after those that find code spans."""
        md.treeprocessors.register(Whole(md), "options", 5)
