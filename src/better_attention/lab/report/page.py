"""What our HTML pages share: one base (head, policy, looks), and templates in which no field can be left unescaped."""

from __future__ import annotations

import re
from typing import Any

import jinja2
from markupsafe import Markup, escape

from better_attention.lab.analysis.estimates import number
from better_attention.lab.analysis.paired import p_text
from better_attention.lab.files import plain
from better_attention.lab.report.style import DARK, LIGHT

_SYMBOL = re.compile(r"\b(?:([a-z])_\{([^{}]{1,12})\}|([xWd])_([tAQKVOk]))(?!\w)")
"""Indices as our own texts write them, and nothing that looks like the name of a column, a class or a file."""
_PAPER = re.compile(r"\barXiv (\d{4}\.\d{5}(?:v\d)?)(?!\d)")
_SECTION = re.compile(r'<section id="([a-z-]+)">\s*<h2>(.*?)</h2>')


def typeset(text: object) -> Markup:
    """``text``, escaped, with indices set low, ``x_{t-1}`` and ``W_A``, and arXiv numbers as links to the papers.

    >>> typeset("x_{t-1} < W_A, but train_loss and a_1")
    Markup('x<sub>t−1</sub> &lt; W<sub>A</sub>, but train_loss and a_1')
    >>> typeset("arXiv 2403.01643v2")
    Markup('<a href="https://arxiv.org/abs/2403.01643v2">arXiv 2403.01643v2</a>')
    """

    def lowered(found: re.Match[str]) -> str:
        base, index = found[1] or found[3], found[2] or found[4]
        return f"{base}<sub>{index.replace('-', '−')}</sub>"

    escaped = _SYMBOL.sub(lowered, str(escape(plain(text))))
    linked = _PAPER.sub(r'<a href="https://arxiv.org/abs/\1">\g<0></a>', escaped)
    return Markup(linked)  # noqa: S704 - escaped on the way in


def sections(body: Markup) -> list[tuple[str, Markup]]:
    """The sections of a page's body for its table of contents: what a link points at, and the heading.

    >>> sections(Markup('<section id="runs"><h2>Every run</h2></section><section><h2>No id</h2></section>'))
    [('runs', Markup('Every run'))]
    """
    return [(id_, Markup(title)) for id_, title in _SECTION.findall(body)]  # noqa: S704 - markup on the way in


def breakable(name: str) -> str:
    """A dotted name that may go on, behind a dot, in the next line."""
    return name.replace(".", ".\N{ZERO WIDTH SPACE}")


def template(name: str, **names: Any) -> jinja2.Template:
    """The template ``name``, which knows ``number``, ``p_text``, ``sections``, ``light``, ``dark`` and ``names``.

    Every value that it prints, wherever it stands, is made :func:`~better_attention.lab.files.plain` and
    escaped; a name that nobody defined is an error.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("better_attention.lab.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else plain(value),
    )
    environment.filters.update(typeset=typeset, breakable=breakable)
    environment.globals.update(number=number, p_text=p_text, sections=sections, light=LIGHT, dark=DARK, **names)
    return environment.get_template(name)
