"""Docstrings of the source in the pages of the API: Sphinx roles become links and formulas of Markdown.

The source keeps ``:class:`KVCache``` and ``:math:`W_A V```, which read well in ``help()``.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

import better_attention

DOCUMENTED = {*better_attention.__all__, "distil", "load_run"}
"""Public names of the package itself: a role that names one becomes a link."""
ROLE = re.compile(r":(?P<kind>[a-z]+):`(?P<text>[^`]+)`")
DISPLAY = re.compile(r"^(?P<indent>[ ]*)\.\. math:: (?P<text>.*(?:\n(?P=indent)[ ]+\S.*)*)$", re.MULTILINE)
"""A formula of its own, whose further lines are indented."""
EXAMPLE = re.compile(r"^(?P<indent>[ ]*)>>> .*?(?=^[ ]*$|\Z)", re.MULTILINE | re.DOTALL)
SKIPPED = re.compile(r"[ ]+# doctest: \+SKIP$", re.MULTILINE)


def rewritten(text: str) -> str:
    """The text of a docstring in Markdown: no Sphinx roles, examples fenced.

    >>> rewritten("see :class:`better_attention.KVCache` and :math:`W_A V`")
    'see [`KVCache`][better_attention.KVCache] and $W_A V$'
    >>> rewritten(".. math:: a = b,\\n    c = d\\n\\nand so on")
    '$$a = b, c = d$$\\n\\nand so on'
    """
    text = DISPLAY.sub(_displayed, text.replace("``", "`"))
    return EXAMPLE.sub(_fenced, ROLE.sub(_role, text))


def _displayed(match: re.Match[str]) -> str:
    """A formula of its own on one line, as ``docs.formulas`` takes it."""
    return f"{match['indent']}$${' '.join(match['text'].split())}$$"


def _fenced(match: re.Match[str]) -> str:
    """An example as a block of code: without the fence Markdown would take ``>>>`` for a quotation."""
    return f"{match['indent']}```pycon\n{SKIPPED.sub('', match[0].rstrip())}\n{match['indent']}```\n"


def _role(match: re.Match[str]) -> str:
    if match["kind"] == "math":
        return "$" + " ".join(match["text"].split()) + "$"
    name = match["text"].lstrip("~.")
    last = name.removeprefix("better_attention.")
    if last in DOCUMENTED:
        return f"[`{last}`][better_attention.{last}]"
    return f"`{name}`"


class Roles(griffe.Extension):
    """Rewrites each docstring once it has been read."""

    def on_object(self, *, obj: griffe.Object, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        """See :func:`rewritten`."""
        if obj.docstring is not None:
            obj.docstring.value = rewritten(obj.docstring.value)
