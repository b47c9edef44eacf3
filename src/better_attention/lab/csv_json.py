"""The one writer of CSV and JSON files, for the lab and the bench: atomic, finite numbers, no spreadsheet formulas."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from better_attention.lab.files import plain, write_atomic

FORMULA_SIGNS = ("=", "+", "-", "@", "＝", "＋", "－", "＠")
"""What makes a spreadsheet take a cell for a formula, full-width forms included."""


def write_csv(path: str | Path, header: Iterable[str], lines: Iterable[Iterable[object]]) -> None:
    """Write a CSV file, atomically.

    Numbers stay numbers, in full precision. Every text passes :func:`safe`, and None becomes an empty cell.
    """
    # The line ends of the writer, untranslated on every system.
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([_cell(value) for value in line] for line in lines)
    write_atomic(path, buffer.getvalue())


def _cell(value: object) -> object:
    if value is None:
        return ""
    return safe(value) if isinstance(value, str) else value


def safe(text: str) -> str:
    """Free text as a CSV cell: on one line, and never a formula (OWASP, "CSV injection").

    >>> safe("a\\nb"), safe(" =1+1"), safe("＝1+1")
    ('a b', "' =1+1", "'＝1+1")
    """
    line = plain(text)
    # Some programs trim leading blanks before they look for a formula; a tab or line end has become a blank here.
    formula = line.lstrip().startswith(FORMULA_SIGNS) or text.startswith(("\t", "\r", "\n"))
    return f"'{line}" if formula else line


def write_json(path: str | Path, value: object) -> None:
    """Write ``value`` as a JSON document, atomically; see :func:`as_json`."""
    # A lone surrogate in a path or message cannot be encoded as UTF-8: it is written as "?".
    write_atomic(path, as_json(value).encode("utf-8", "replace") + b"\n")


def as_json(value: object) -> str:
    """A JSON document, indented; NaN and infinities, which JSON does not have, become null.

    >>> print(as_json({"loss": float("nan"), "sizes": (1, 2)}))
    {
      "loss": null,
      "sizes": [
        1,
        2
      ]
    }
    """
    return json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False)


def finite(value: object) -> object:
    """``value`` with None for every number that is not finite, in mappings and sequences at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
