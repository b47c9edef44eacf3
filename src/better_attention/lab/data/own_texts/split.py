"""Cutting labelled texts into training, validation and test, and what has to be said of the cut."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from better_attention.lab.data.vocabulary import tokens

HELD_OUT = ("test", "validation")


def text_key(text: str) -> bytes:
    """A SHA-256 that two texts share if they have the same words: a model that reads words cannot tell them apart.

    >>> text_key("Love it!") == text_key("love it"), text_key("Love it!") == text_key("Loved it!")
    (True, False)
    """
    return hashlib.sha256(" ".join(tokens(text)).encode()).digest()


def partition(keys: Sequence[bytes], strata: Sequence[Any], held_out: Sequence[str] = HELD_OUT) -> dict[str, list[int]]:
    """Row numbers of ``"train"`` and of each part in ``held_out``, by hash: a tenth of every stratum goes to each.

    The parts depend on the texts alone, not on their order; equal texts are on one side, whatever their labels. A text
    that makes more than a tenth of its stratum is trained on.

    Args:
        keys: the :func:`text_key` of each row.
        strata: what each part shall hold in the same proportion, the labels for example; values that can be compared.
        held_out: the parts to cut off.
    """
    rows: dict[bytes, list[int]] = defaultdict(list)
    for row, key in enumerate(keys):
        rows[key].append(row)
    members: dict[Any, list[bytes]] = defaultdict(list)
    for key, group in rows.items():
        # Equal texts with different labels stay one group, in the stratum of the least label, so that they cannot be
        # parted.
        members[min(strata[row] for row in group)].append(key)
    parts: dict[str, list[int]] = {name: [] for name in ("train", *held_out)}
    for stratum in members.values():
        # A tenth, rounded to the nearest whole number in integers.
        tenth = (sum(len(rows[key]) for key in stratum) + 5) // 10
        room = dict.fromkeys(held_out, tenth)
        # The order of the hashes is as good as random, and does not depend on the order of the rows.
        for key in sorted(stratum):
            part = next((name for name in held_out if len(rows[key]) <= room[name]), None)
            if part is None:
                part = "train"
            else:
                room[part] -= len(rows[key])
            parts[part] += rows[key]
    return {name: sorted(part) for name, part in parts.items()}


def repeats(keys: Sequence[bytes], labels: Sequence[Any]) -> tuple[str, ...]:
    """Notes on texts that occur more than once, and on those that do so with different labels."""
    labels_of: dict[bytes, set[Any]] = defaultdict(set)
    for key, label in zip(keys, labels, strict=True):
        labels_of[key].add(label)
    again = len(keys) - len(labels_of)
    torn = sum(len(some) > 1 for some in labels_of.values())
    notes = []
    if again:
        notes.append(f"{again:,} of {len(keys):,} texts repeat another one word for word")
    if torn:
        notes.append(f"{torn:,} texts occur with different labels: no model can be right on all of them")
    return tuple(notes)
