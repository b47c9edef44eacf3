"""The tasks, one file each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from better_attention.experiments.task import Task
from better_attention.experiments.tasks.amazon import amazon
from better_attention.experiments.tasks.cifar100 import cifar100
from better_attention.experiments.tasks.digits import digits
from better_attention.experiments.tasks.imagenet import imagenet
from better_attention.experiments.tasks.images import images
from better_attention.experiments.tasks.imdb import imdb
from better_attention.experiments.tasks.mnist import mnist
from better_attention.experiments.tasks.recurrence import recurrence
from better_attention.experiments.tasks.text import text
from better_attention.experiments.tasks.translation import translation

TASKS: Mapping[str, Callable[[str], Task]] = MappingProxyType(
    {
        "digits": digits,
        "mnist": mnist,
        "cifar100": cifar100,
        "imagenet": imagenet,
        "images": images,
        "imdb": imdb,
        "amazon": amazon,
        "text": text,
        "recurrence": recurrence,
        "translation": translation,
    }
)
"""Name -> function from a scale ("smoke", "small", "paper") to the task at that scale."""
