"""Settings of a task on the command line: ``--set NAME=VALUE``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from better_attention.cli import UserError

if TYPE_CHECKING:
    from better_attention.lab.tasks.base import Task


def settings_of(task: Task, texts: Sequence[str]) -> dict[str, Any]:
    """The settings that several ``NAME=VALUE`` describe, see :func:`setting`.

    Raises:
        UserError: one is given twice, too.
    """
    settings: dict[str, Any] = {}
    for text in texts:
        name, value = setting(task, text)
        if name in settings:
            raise UserError(f"--set {text!r}: {name} is given twice.")
        settings[name] = value
    return settings


FIXED = ("name", "title", "source", "scale", "dataset", "equal_params", "threshold")
"""Fields of a task that are no settings, or have an option of their own that is not called like them."""

OPTIONS = {"heads": "--heads", "default_heads": "--heads", "seeds": "--seeds"}
"""Settings that another option decides -> that option."""


def setting(task: Task, text: str) -> tuple[str, Any]:
    """Name and value of ``NAME=VALUE``, the value as JSON or, failing that or where any text will do, as it stands.

    Raises:
        UserError: no such setting, or a value of another kind than the task's own.
    """
    name, sign, value = text.partition("=")
    decided = {**OPTIONS, **task.derived}
    kinds = {field.name: str(field.type) for field in fields(task) if field.name not in FIXED}
    if not sign or name not in kinds:
        free = sorted(kinds.keys() - decided.keys())
        near = ["--equal-params"] if name == "equal_params" else get_close_matches(name, free, n=1, cutoff=0.75)
        unknown = f"there is no setting {name!r}{f' (did you mean {near[0]}?)' if near else ''}; " if sign else ""
        raise UserError(f"--set {text!r}: {unknown}expected NAME=VALUE with one of the names {', '.join(free)}.")
    if name in decided:
        raise UserError(f"--set {text!r}: {name} of task {task.name!r} follows from {decided[name]}.")
    parsed = _json_or_text(value)
    default = getattr(task, name)
    if default == "" and not isinstance(parsed, str):  # free text: a column may be called 2024, or true
        parsed = value
    kind = (int,) if default is None else (int, float) if isinstance(default, float) else (type(default),)
    if "None" in kinds[name]:
        kind = (*kind, type(None))
    if isinstance(default, tuple):  # a JSON list, or words with commas between
        words = tuple(parsed if isinstance(parsed, list) else map(_json_or_text, value.split(",")))
        parsed = words if all(isinstance(word, type(default[0])) for word in words) else value
    # bool is a subclass of int, but `true` is no number here.
    if not isinstance(parsed, kind) or (isinstance(parsed, bool) and not isinstance(default, bool)):
        # What takes a float takes whole numbers as well, so these are not named separately.
        wanted = " or ".join(KINDS[type_] for type_ in kind if type_ is not int or float not in kind)
        raise UserError(f"--set {text!r}: {name} is {default!r} by default; expected {wanted}, received {value!r}.")
    return name, parsed


KINDS: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    tuple: "values of that kind with commas between",
    type(None): "null",
}
"""How the kinds of settings are called, as they are written in ``NAME=VALUE``."""


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value
