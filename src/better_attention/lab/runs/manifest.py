"""``manifest.sha256``: the SHA-256 of every file of a finished run, or of the results of a comparison.

It has the form that ``sha256sum`` writes, so that ``sha256sum -c manifest.sha256`` checks the files without this
program. Only one spelling is accepted, so that a flipped bit in the manifest itself is noticed, too.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from better_attention.lab.files import digest, read_regular, write_atomic

NAME = "manifest.sha256"
_LINE = re.compile(r"([0-9a-f]{64})  ([A-Za-z0-9._-]{1,64})")


def write(folder: Path, digests: Mapping[str, str], *, make_folder: bool = True) -> None:
    """Write the manifest of ``folder``.

    Args:
        digests: name of a file -> its SHA-256 in hexadecimal.
        make_folder: see :func:`write_atomic`.

    Raises:
        OSError: it cannot be written.
    """
    # Sorted, because read() accepts no other order.
    lines = (f"{digests[name]}  {name}\n" for name in sorted(digests))
    write_atomic(folder / NAME, "".join(lines), make_folder=make_folder)


def add(folder: Path, names: Collection[str]) -> None:
    """Add files of ``folder``, as they are now, to its manifest, which may list other files too.

    Raises:
        OSError: a file cannot be read, or the manifest not be written.
    """
    write(folder, _others(folder, names) | {name: digest(folder / name) for name in names})


def remove(folder: Path, names: Collection[str]) -> None:
    """Remove files that are about to be rewritten from the manifest of ``folder``.

    Raises:
        OSError: the manifest cannot be written.
    """
    # A manifest without entries is an empty file, which read() does not accept.
    if others := _others(folder, names):
        write(folder, others)
    else:
        (folder / NAME).unlink(missing_ok=True)


def check_listed(path: Path) -> None:
    """Make sure that a file of results is as it was written, if a manifest beside it lists it.

    Raises:
        ValueError: it was changed since, or the manifest was.
    """
    digests = read(path.parent)
    if digests is not None and path.name in digests:
        check(path.parent, [path.name])


def _others(folder: Path, names: Collection[str]) -> dict[str, str]:
    """The entries of other files in the manifest; none if it is damaged."""
    try:
        listed = read(folder) or {}
    # Nothing of a damaged manifest is carried over into the new one.
    except ValueError:
        return {}
    return {name: digest for name, digest in listed.items() if name not in names}


def read(folder: Path) -> dict[str, str] | None:
    """Name of a file -> its SHA-256, from the manifest of ``folder``; None without a manifest.

    Raises:
        ValueError: the manifest is damaged.
        OSError: it cannot be read.
    """
    path = folder / NAME
    try:
        content = read_regular(path, 2**20)
    except FileNotFoundError:
        return None
    # splitlines() would accept other line ends, too, so that a changed byte could pass unnoticed.
    lines = [_LINE.fullmatch(line) for line in content.decode("ascii", "replace").split("\n")[:-1]]
    names = [match[2] for match in lines if match]
    if not content.endswith(b"\n") or len(names) < len(lines) or names != sorted(set(names)):
        raise ValueError(f"{path} was changed since it was written: it is not a list of SHA-256 digests and names.")
    return {match[2]: match[1] for match in lines if match}


def check(folder: Path, names: Collection[str] | None = None, *, may_lack: Collection[str] = ()) -> bool:
    """Make sure that files of ``folder`` are as they were written.

    Args:
        names: the files to check; None: every file in the manifest.
        may_lack: files that may have been removed.

    Returns:
        Whether there is a manifest. Without one, nothing is checked.

    Raises:
        ValueError: names the first file that was changed, is missing or is not in the manifest.
        OSError: a file cannot be read.
    """
    digests = read(folder)
    if digests is None:
        return False
    for name in sorted(digests) if names is None else names:
        path = folder / name
        if name not in digests:
            raise ValueError(f"{folder / NAME} was changed since it was written: it does not list {name}.")
        try:
            same = digest(path) == digests[name]
        except FileNotFoundError:
            if name in may_lack:
                continue
            raise ValueError(f"{path} is missing; {NAME} lists it.") from None
        if not same:
            raise ValueError(f"{path} was changed since it was written: its SHA-256 is not the one in {NAME}.")
    return True
