"""What exporters and quantisers need around them: silence, and a file that appears at its place in one step."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without the notes that other libraries log about themselves."""
    # The switch is the whole process's, so that it is set back to what it was.
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def written(path: Path) -> Iterator[Path]:
    """A file to be filled in the block, which takes the name ``path`` if nothing was raised."""
    # Beside the target, because a rename is one step only within a file system.
    with tempfile.TemporaryDirectory(prefix=f".{path.name[:64]}.", dir=path.parent) as folder:
        part = Path(folder) / path.name
        yield part
        part.replace(path)
