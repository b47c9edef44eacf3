"""The tasks, one file each: a file ``NAME.py`` defines a function ``NAME`` from a scale to the task at that scale."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from better_attention.lab.catalogue import Catalogue

if TYPE_CHECKING:
    from better_attention.lab.tasks.base import Task

TASKS: Catalogue[Callable[[str], Task]] = Catalogue(__name__, __path__)
"""Name -> function from a scale ("smoke", "small", "paper") to the task at that scale."""
