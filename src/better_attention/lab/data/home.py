"""The folder in which the program keeps data sets and decoded pictures."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from .samples import NotFetched


class NoHome(NotFetched):
    """The user has no home directory that may be read, so that there is no data home either."""


def home() -> Path:
    """``$XDG_CACHE_HOME/better-attention/data``, or the same below ``~/.cache``.

    Raises:
        NoHome: neither is known, or it may not be read, as for a user whom the system of a container does not know.
    """
    cache = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification tells to ignore a relative path.
    if Path(cache).is_absolute():
        base = Path(cache)
    else:
        try:
            base = Path.home() / ".cache"
            # What matters is whether the folder may be read, not whether it is there.
            with suppress(FileNotFoundError, NotADirectoryError):
                (base / "better-attention").stat()
        except (RuntimeError, PermissionError) as error:
            unknown = "HOME is not set, and the system knows no home directory of this user"
            why = f"{base} may not be read by this user" if isinstance(error, PermissionError) else unknown
            raise NoHome(
                f"there is no folder for data sets and decoded pictures: {why}. Set HOME or XDG_CACHE_HOME to a folder "
                "that may be written, or name the folder of a data set with --data DIR."
            ) from None
    return base / "better-attention" / "data"
