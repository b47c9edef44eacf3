"""Formulas in the pages, ``$W_A V$`` and ``$$...$$``, as MathML, which browsers draw without a script or a font."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from latex2mathml.converter import convert_to_element
from markdown import Extension, Markdown
from markdown.blockprocessors import BlockProcessor
from markdown.inlinepatterns import InlineProcessor


class Inline(InlineProcessor):
    """``$x^2$`` within a sentence. As in pandoc, it neither begins nor ends with a space, and no digit follows it."""

    def handleMatch(self, m: re.Match[str], data: str) -> tuple[ElementTree.Element, int, int]:  # noqa: N802 - their name
        """The formula, and where it stood."""
        return convert_to_element(m[1]), m.start(0), m.end(0)


class Block(BlockProcessor):
    """``$$`` and ``$$`` around a formula that is a paragraph of its own."""

    def test(self, parent: ElementTree.Element, block: str) -> bool:
        """Whether a paragraph is a formula."""
        text = block.strip()
        return len(text) > 4 and text.startswith("$$") and text.endswith("$$")

    def run(self, parent: ElementTree.Element, blocks: list[str]) -> bool:
        """Put the formula in the place of the paragraph."""
        frame = ElementTree.SubElement(parent, "div", {"class": "formula"})
        convert_to_element(blocks.pop(0).strip()[2:-2].strip(), display="block", parent=frame)
        return True


class Formulas(Extension):
    """Both kinds of formulas."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802 - their name
        """Add them to the rules of ``md``, after code spans, in which a dollar sign is one."""
        md.inlinePatterns.register(Inline(r"\$(?!\s)([^$]+?)(?<!\s)\$(?!\d)", md), "formula", 185)
        md.parser.blockprocessors.register(Block(md.parser), "formula", 75)
