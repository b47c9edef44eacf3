"""The tasks, one file each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from better_attention.lab.tasks.base import Task
from better_attention.lab.tasks.catalogue.amazon import amazon
from better_attention.lab.tasks.catalogue.cifar100 import cifar100
from better_attention.lab.tasks.catalogue.digits import digits
from better_attention.lab.tasks.catalogue.imagenet import imagenet
from better_attention.lab.tasks.catalogue.images import images
from better_attention.lab.tasks.catalogue.imdb import imdb
from better_attention.lab.tasks.catalogue.mnist import mnist
from better_attention.lab.tasks.catalogue.recurrence import recurrence
from better_attention.lab.tasks.catalogue.text import text
from better_attention.lab.tasks.catalogue.translation import translation

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
