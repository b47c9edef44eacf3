"""What is told of a language task: its text, and which of its models have grouped heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from better_attention.lab.tasks.variant import Variant
from better_attention.text import plural


def grouping(kv_heads: int | None, variants: Sequence[Variant], heads: Sequence[int]) -> tuple[str, ...]:
    """A sentence on the models with grouped heads, and on those that have none to group."""
    if kv_heads is None or all(kv_heads == n for n in heads):
        return ()
    grouped = ", ".join(variant.name for variant in variants if variant.projects_keys)
    others = ", ".join(variant.name for variant in variants if not variant.projects_keys)
    found = [f"{plural(kv_heads, 'head')} of projected keys and values in {grouped}"] if grouped else []
    if others:
        found.append(
            f"kv_heads={kv_heads} does not apply to {others}, without projected keys to group: each query head reads "
            "its own slice of the input"
        )
    return ("; ".join(found),)


def guessing_bits(tokens: Mapping[str, Tensor], vocabulary: int) -> float:
    """Bits a token of the test part by the frequencies in the training part, each token counted once more."""
    counts = tokens["train"].bincount(minlength=vocabulary).double() + 1
    return float(-(counts / counts.sum()).log2()[tokens["test"]].mean())


def parts_told(parts: Mapping[str, str], tokens: Mapping[str, Tensor]) -> list[str]:
    """Characters and tokens of each part."""
    return [f"{len(text):,} for {name} ({len(tokens[name]):,} tokens)" for name, text in parts.items()]
