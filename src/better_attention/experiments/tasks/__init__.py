"""The tasks, one file each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from better_attention.experiments.task import Task
from better_attention.experiments.tasks.digits import digits
from better_attention.experiments.tasks.imdb import imdb
from better_attention.experiments.tasks.mnist import mnist

TASKS: Mapping[str, Callable[[str], Task]] = MappingProxyType({"digits": digits, "mnist": mnist, "imdb": imdb})
"""Name -> function from a scale ("smoke", "small", "paper") to the task at that scale."""
