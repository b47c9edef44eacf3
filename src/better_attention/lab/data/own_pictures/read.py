"""Pictures in a folder per class: the user's own, and ImageNet as everybody arranges it.

Three layouts, in a folder, in one archive, or in archives ``NAME-train.tar.gz``, ``NAME-val.tar.gz`` that lie together:

    CLASS/.../picture                      no split: a tenth is held out by a hash of each name
    train/CLASS/... and val/ or test/      that one is the test split
    train/CLASS/..., val/ and test/        validation and test split

``val/`` may be called ``valid/``, ``validation/`` or ``dev/``. Where the pictures of a split, or all of them, lie in no
class's folder, a table may give their classes: ``val/val_annotations.txt``, ``labels.csv``, ``train.csv``. A file
``classes.tsv`` or ``words.txt`` beside them may name the classes: a line holds the name of a class's folder in one
column and what people call it in the last. Parquet files hold a picture and a class in each row; ``train-*.parquet``
and ``test-*.parquet`` are splits.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from better_attention.lab.data.own_texts.columns import doubtful
from better_attention.lab.data.samples import DataError, Int64, UInt8
from better_attention.text import plural

from .cache import IN_MEMORY, decoded, remembered, unreadable
from .decode import SUFFIXES, is_grey, quiet
from .labels import KINDS, TABLE, Labels, read_labels
from .tree import SPLITS, PictureTree, archives, grow

LAYOUT = (
    "a folder per class, or train/ and val/ (or test/) folders of such, or archives NAME-train.tar.* "
    "and NAME-val.tar.*, or "
    f"Parquet files, or pictures beside {KINDS}"
)
HELD_OUT = 0.1
"""Share of the pictures that are held out where the data has no split of its own."""
_SPLIT_LIKE = re.compile(
    r"(?:.*[ _-])?(train|test|val|valid|validation|dev)(?:ing|[ _-]?set)?(?:[ _-].*)?", re.IGNORECASE
)
"""Folders that other tools give to splits, ``Training`` or ``seg_test``; a steam-train alone is a class."""


_GENERIC = frozenset(
    ("images", "image", "imgs", "img", "pictures", "photos", "data", "unlabeled", "unlabelled", "unknown")
)
"""Folders that hold pictures of all classes together."""


@dataclass(frozen=True, eq=False)
class Pictures:
    """Labelled pictures, found but not decoded.

    Args:
        tree: where they lie.
        names: of every picture, in the tree.
        labels: int64 ``(N,)``, indices into ``folders``.
        folders: the name of each class's folder, sorted.
        classes: what people call it.
        parts: ``"train"``, ``"test"`` and maybe ``"validation"`` -> the rows of the split, ascending.
        notes: what a report should say about the data.
    """

    tree: PictureTree
    names: Sequence[str]
    labels: Int64
    folders: tuple[str, ...]
    classes: tuple[str, ...]
    parts: Mapping[str, Int64]
    notes: tuple[str, ...]

    @cached_property
    def channels(self) -> int:
        """1 if every picture stores grey values, else 3. Broken ones decide nothing: :meth:`pixels` names them."""

        def grey(name: str, source: bytes | Path) -> bool:
            try:
                return is_grey(name, source)
            except DataError:
                return True

        def find() -> int:
            rows = {name: row for row, name in enumerate(self.names)}
            with quiet():
                return 1 if all(grey(name, source) for _, name, source in self.tree.contents(rows)) else 3

        return 1 if remembered(_key("channels", self.tree.stamp, np.arange(0)), find) == 1 else 3

    def pixels(self, rows: Int64, size: int, channels: int, in_memory: int = IN_MEMORY) -> UInt8:
        """The pictures of some rows, in their order; :func:`.cache.decoded` holds them, and explains ``in_memory``."""
        wanted = {self.names[row]: index for index, row in enumerate(rows.tolist())}
        key = _key(f"{size} {channels}", self.tree.stamp, rows)
        return decoded(key, len(rows), lambda: self.tree.contents(wanted), size, channels, in_memory)

    def damaged(self, rows: Int64, size: int, channels: int) -> dict[int, str]:
        """Place in ``rows`` -> what is wrong, of the pictures that cannot be decoded; all are, to find out."""
        wanted = {self.names[row]: index for index, row in enumerate(rows.tolist())}
        key = _key(f"damaged {size} {channels}", self.tree.stamp, rows)
        problems = remembered(key, lambda: unreadable(self.tree.contents(wanted), size, channels))
        return {int(index): str(what) for index, what in problems}


def find(place: Path) -> Pictures:
    """The pictures at ``place``, and how they are split; none is decoded yet.

    Args:
        place: a folder or an archive.

    Returns:
        The same on every machine for the same names; of an unsplit set, a picture that is held out stays held out when
        others are added, and each class has one at least.

    Raises:
        DataError: no pictures, one class only, a class without pictures or with too few, a damaged archive.
    """
    tree = grow(place)
    splits = _splits(tree)
    tables = {split: table for split, top in splits.items() if (table := _table(tree, top)) is not None}
    members = {
        split: _grouped(tables[split].classes) if split in tables else _classes(tree.names, top)
        for split, top in splits.items()
    }
    known = members["train"].keys()
    members = {
        split: classes
        for split, classes in members.items()
        # A test folder that has nothing but images/ in it holds pictures without classes, as Tiny ImageNet's does.
        if classes and (split == "train" or not (classes.keys() <= _GENERIC and classes.keys().isdisjoint(known)))
    }
    _check(tree, members, splits, tables)
    folders = tuple(sorted(members["train"]))
    names: list[str] = []
    labels: list[int] = []
    parts: dict[str, Int64] = {}
    # Split after split, so that the rows of each follow one another.
    for split, pictures_of in members.items():
        first = len(names)
        for label, folder in enumerate(folders):
            names += pictures_of.get(folder, [])
            labels += [label] * len(pictures_of.get(folder, []))
        parts[split] = np.arange(first, len(names), dtype=np.int64)
    pictures = Pictures(tree, names, np.array(labels, dtype=np.int64), folders, _called(tree, folders), parts, ())
    pictures = replace(
        pictures,
        notes=(
            *(table.note for table in tables.values()),
            *doubtful(
                folders, {folder: len(pictures_of) for folder, pictures_of in members["train"].items()}, "picture"
            ),
            *_ignored(pictures, splits, {table.table for table in tables.values()}),
        ),
    )
    if parts.keys() == {"train"}:
        pictures = _with_held_out(pictures, splits["train"])
    elif "test" not in parts:
        note = f"{splits['validation']}/ is the test split here; validation is cut from {splits['train']}/"
        pictures = replace(
            pictures, parts={"train": parts["train"], "test": parts["validation"]}, notes=(*pictures.notes, note)
        )
    return pictures


def _splits(tree: PictureTree) -> dict[str, str]:
    """Split -> its folder. A folder train/ that holds pictures itself, and no table of their classes, is a class.

    Raises:
        DataError: two folders for one split.
    """
    names = tree.names
    below = [name for name in names if name.startswith("train/")]
    if not below or (any(name.count("/") == 1 for name in below) and _table(tree, "train") is None):
        return {"train": ""}
    folder_of: dict[str, str] = {}
    for top in sorted({name.partition("/")[0] for name in names} & SPLITS.keys()):
        if SPLITS[top] in folder_of:
            raise DataError(f"{folder_of[SPLITS[top]]}/ and {top}/ are both the {SPLITS[top]} split: keep one.")
        folder_of[SPLITS[top]] = top
    return folder_of


def _table(tree: PictureTree, top: str) -> Labels | None:
    """The table that gives the classes of the pictures below ``top``, if they lie in no folders of classes.

    It lies beside them, or beside the folder under a name that tells which it is for, or is the only one.
    """
    base = f"{top}/" if top else ""
    names = [name for name in tree.names if name.startswith(base)]
    if not names or any(folder not in _GENERIC for name in names if (folder := _class_of(name, top)) is not None):
        return None
    inside = [name for name in tree.texts if name.startswith(base) and "/" not in name[len(base) :]]
    beside = [name for name in tree.texts if "/" not in name and top and top in re.split(r"[._-]", name.lower())]
    shared = [name for name in tree.texts if re.match(r"(?:labels?|annotations?|metadata)\.", name, re.IGNORECASE)]
    for table in dict.fromkeys((*sorted(inside), *sorted(beside), *sorted(shared))):
        labels = read_labels(str(tree.place / table), tree.texts[table], names)
        if labels is not None:
            return replace(labels, table=table)
    return None


def _grouped(classes: Mapping[str, str]) -> dict[str, list[str]]:
    """Class -> names of its pictures, sorted."""
    pictures_of: defaultdict[str, list[str]] = defaultdict(list)
    for name in sorted(classes):
        pictures_of[classes[name]].append(name)
    return dict(pictures_of)


def _class_of(name: str, top: str) -> str | None:
    """The class folder of a picture below the folder ``top`` ("": the root); None if it lies in none."""
    parts = name.split("/")[1 if top else 0 :] if not top or name.startswith(f"{top}/") else []
    return parts[0] if len(parts) > 1 else None


def _classes(names: Sequence[str], top: str) -> dict[str, list[str]]:
    pictures_of: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        folder = _class_of(name, top)
        if folder is not None:
            pictures_of[folder].append(name)
    return dict(pictures_of)


def _check(
    tree: PictureTree,
    members: Mapping[str, Mapping[str, Sequence[str]]],
    splits: Mapping[str, str],
    tables: Mapping[str, Labels],
) -> None:
    """Refuse what nothing can be learned from, or not what is meant."""
    kinds = ", ".join(SUFFIXES)
    top = splits["train"]
    where = tree.place / top if top else tree.place
    if "train" not in members:
        loose = "pictures that lie in no class's folder" if tree.names else f"no pictures ({kinds})"
        packed = archives(tree.place) if not tree.names else []
        hint = f" To read {packed[0].name}, name it: {packed[0]}." if packed else ""
        raise DataError(f"{where} holds {loose}; expected {LAYOUT}.{hint}")
    alike = {folder: match[1].lower() for folder in members["train"] if (match := _SPLIT_LIKE.fullmatch(folder))}
    if not top and len(set(alike.values())) > 1:
        raise DataError(
            f"{where} holds the folders {', '.join(sorted(alike))}, which look like splits and would be classes; "
            f"expected {LAYOUT}. Rename them to train/, val/ and test/, with a folder per class in each."
        )
    for split, name in splits.items():
        base = f"{name}/" if name else ""
        empty = sorted(f for f in tree.folders if f.startswith(base) and f.count("/") == base.count("/"))
        empty = [f for f in empty if f.removeprefix(base) not in members.get(split, {})]
        if empty and split not in tables and (split == "train" or split in members):
            raise DataError(
                f"{tree.place / empty[0]} holds no pictures ({kinds}): a class without pictures. Remove the folder, or "
                "put pictures there."
            )
    if "train" not in tables and (copy := _copy_inside(members["train"], top)):
        folder, again = copy
        raise DataError(
            f"{where / folder} holds the folders {', '.join(again[:10])}{', ...' if len(again) > 10 else ''}, as "
            f"{where} does: a copy of the set inside the set, which would be one more class. Remove it, or put it "
            "elsewhere."
        )
    if len(members["train"]) == 1:
        ((only, names),) = members["train"].items()
        deeper = any(name.removeprefix(f"{top}/" if top else "").count("/") > 1 for name in names)
        hint = f" If its classes are the folders below that, name it: {where / only}." if deeper else ""
        raise DataError(f"{where} has only one class, {only!r}; there is nothing to learn.{hint}")
    for split, classes in members.items():
        unknown = sorted(classes.keys() - members["train"].keys())
        if unknown:
            class_folder = (
                f"{tables[split].table}: {unknown[0]}" if split in tables else f"{splits[split]}/{unknown[0]}"
            )
            raise DataError(
                f"{tree.place / class_folder} is a class that {top}/ does not have "
                f"({len(unknown):,} such): a model cannot know it. Expected {LAYOUT}."
            )


def _copy_inside(classes: Mapping[str, Sequence[str]], top: str) -> tuple[str, list[str]] | None:
    """A class's folder that contains other classes again, somewhere below it, and which; None if no folder does.

    Two of them, or nothing but one, are no chance. Where every class holds folders called like the others, as tables of
    confusion do, none is a copy.
    """
    known = {folder.casefold(): folder for folder in classes}
    below: dict[str, list[set[str]]] = {}
    for folder, names in classes.items():
        paths = (name.removeprefix(f"{top}/" if top else "").split("/")[1:-1] for name in names)
        below[folder] = [{known[part.casefold()] for part in path if part.casefold() in known} for path in paths]
    again = {folder: sorted(set().union(*inside)) for folder, inside in below.items()}
    for folder, repeated in again.items():
        others = [other for other in repeated if other != folder]
        whole = len(repeated) > 1 or (others and all(others[0] in inside for inside in below[folder]))
        if others and whole and not any(set(again[other]) - {other} for other in others):
            return folder, repeated
    return None


def _with_held_out(pictures: Pictures, top: str) -> Pictures:
    """The same pictures with a test split: those whose name hashes below a tenth, and the lowest of each class."""
    # Without the folder of the split, so that the choice does not depend on whether the set has a train/ above it.
    own_names = [name.removeprefix(f"{top}/" if top else "") for name in pictures.names]
    hashes = np.array([_unit(name) for name in own_names])
    members = [np.flatnonzero(pictures.labels == label) for label in range(len(pictures.folders))]
    lonely = [pictures.names[rows[0]] for rows in members if len(rows) == 1]
    if lonely:
        more = f" So are {', '.join(lonely[1:11])}{', ...' if len(lonely) > 11 else ''}." if lonely[1:] else ""
        raise DataError(
            f"{pictures.tree.place / lonely[0]} is the only picture of its class: one to train on and one to test on "
            f"are needed. Add pictures, or remove the class.{more}"
        )
    held = hashes < HELD_OUT
    for rows in members:
        # The least hash is held out and the greatest trained on, so every class is on both sides.
        held[rows[hashes[rows].argmin()]] = True
        held[rows[hashes[rows].argmax()]] = False
    note = (
        "the data has no split of its own: about a tenth of each class, chosen by a hash of the files' names, is the "
        "test split; pictures that are nearly alike may lie on both sides"
    )
    parts = {"train": np.flatnonzero(~held), "test": np.flatnonzero(held)}
    return replace(pictures, parts=parts, notes=(*pictures.notes, note))


def _unit(name: str) -> float:
    """A number in 0 ... 1 that depends on the name alone, however a file system writes its accents."""
    # A file name that is not UTF-8 reaches Python with surrogates, which this error handler turns back into its bytes.
    digest = hashlib.sha256(unicodedata.normalize("NFC", name).encode("utf-8", "surrogateescape")).digest()
    # 48 bits, which a float holds exactly.
    return int.from_bytes(digest[:6], "big") / 2**48


def _ignored(pictures: Pictures, splits: Mapping[str, str], used: Collection[str]) -> tuple[str, ...]:
    """Notes on pictures, and on tables that may label them, that are not read."""
    tops = [top for split, top in splits.items() if split not in pictures.parts]
    flat = [f"{top}/ holds no folder per class and is not read" for top in tops]
    if tops:
        flat.append(f"no table names the pictures of {'/, '.join(tops)}/, as val_annotations.txt or labels.csv might")
    tables = sorted(
        name for name in pictures.tree.texts if TABLE.fullmatch(name.rpartition("/")[2]) and name not in used
    )
    if tables:
        flat.append(f"not read as labels: {', '.join(tables[:10])}{', ...' if len(tables) > 10 else ''}")
    loose = len(pictures.tree.names) - len(pictures.names)
    if loose:
        flat.append(f"{plural(loose, 'picture')} in no class's folder, not read")
    if unread := pictures.tree.unread:
        kinds = ", ".join(f"{number:,} {kind}" for kind, number in sorted(unread.items()))
        flat.append(
            f"{plural(sum(unread.values()), 'picture')} of kinds that are not read left out ({kinds}): convert them"
        )
    return tuple(flat)


def _called(tree: PictureTree, folders: Sequence[str]) -> tuple[str, ...]:
    """Readable names of the classes; the folder's name where no file gives one, or gives it to two classes."""
    said: dict[str, str] = {}
    wanted = set(folders)
    for line in tree.called():
        columns = [column.strip() for column in line.split("\t")]
        own = next((column for column in columns[:-1] if column in wanted), None)
        if own is not None and columns[-1]:
            said[own] = columns[-1]
    often = Counter(said.get(folder, folder) for folder in folders)
    names = [said.get(folder, folder) for folder in folders]
    unique = [name if often[name] == 1 else f"{name} ({folder})" for name, folder in zip(names, folders, strict=True)]
    # Bytes that are not UTF-8 become replacement characters: the name will be written into JSON and HTML.
    return tuple(name.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for name in unique)


def _key(what: str, stamp: str, rows: Int64) -> str:
    digest = hashlib.sha256(f"1 {what} {stamp} {rows.shape}".encode())
    digest.update(rows.tobytes())
    return digest.hexdigest()[:32]
