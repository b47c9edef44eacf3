"""JSON files of a run: read strictly, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from better_attention.lab.files import parse_json, read_regular, write_atomic


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: it is not a regular file, not JSON, not an object, or holds a number that is not finite.
        OSError: it does not exist or cannot be read.
    """
    content = read_regular(path)
    try:
        value = parse_json(content)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}). Delete the folder {path.parent} and run again.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: it holds {type(value).__name__}, not an object.")
    return value


def json_text(value: Mapping[str, Any]) -> str:
    """``value`` as the text of a JSON file, indented.

    Raises:
        ValueError: a number in it is not finite.
    """
    # Names of classes and words of a vocabulary stay readable in any script.
    return json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write ``value`` as indented JSON, atomically.

    Raises:
        OSError: it cannot be written.
    """
    write_atomic(path, json_text(value))
