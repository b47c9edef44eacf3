"""Joins IMDB reviews into one running text for ``better-attention compare text-lm``.

    python benchmarks/language/join_imdb.py DATA/imdb/aclImdb_v1-labelled.tar.xz imdb.txt

Reads the official archive of the Large Movie Review Dataset (or one of the same layout) and takes reviews of its
training part in the order of the SHA-256 of their names, which mixes positive and negative ones, until the text has as
many characters as Tiny Shakespeare. ``<br />`` becomes a line end; an empty line stands between two reviews.
"""

from __future__ import annotations

import argparse
import hashlib
import tarfile
from pathlib import Path

CHARACTERS = 1_115_394
"""The size of Tiny Shakespeare, so that both studies have splits of one size."""


def joined(archive: Path, characters: int) -> str:
    """The text."""
    with tarfile.open(archive) as members:
        reviews = {
            member.name: members.extractfile(member).read().decode("utf-8")  # type: ignore[union-attr] # a file
            for member in members
            if member.isfile() and member.name.startswith("aclImdb/train/")
        }
    kept: list[str] = []
    length = 0
    for name in sorted(reviews, key=lambda name: hashlib.sha256(name.encode()).hexdigest()):
        lines = (" ".join(line.split()) for line in reviews[name].replace("<br />", "\n").split("\n"))
        kept.append("\n".join(line for line in lines if line) + "\n")
        length += len(kept[-1]) + 1
        if length >= characters:
            break
    return "\n".join(kept)[:characters]


def main() -> None:
    """Write the text, and say what it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path)
    parser.add_argument("text", type=Path)
    args = parser.parse_args()
    content = joined(args.archive, CHARACTERS).encode()
    args.text.write_bytes(content)
    print(f"{args.text}: {len(content.decode()):,} characters, SHA-256 {hashlib.sha256(content).hexdigest()}")


if __name__ == "__main__":
    main()
