"""What our HTML pages share: one base (head, policy, looks), and templates in which no field can be left unescaped."""

from __future__ import annotations

from typing import Any

import jinja2
from markupsafe import Markup

from better_attention.experiments.files import plain
from better_attention.experiments.looks import DARK, LIGHT
from better_attention.experiments.paired import p_text
from better_attention.experiments.stats import number


def template(name: str, **names: Any) -> jinja2.Template:
    """The template ``name``, which knows ``number``, ``p_text``, the grounds ``light`` and ``dark``, and ``names``.

    Every value that it prints, wherever it stands, is made :func:`~better_attention.experiments.files.plain` and
    escaped; a name that nobody defined is an error.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("better_attention.experiments"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else plain(value),
    )
    environment.globals.update(number=number, p_text=p_text, light=LIGHT, dark=DARK, **names)
    return environment.get_template(name)
