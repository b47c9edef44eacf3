"""``better-attention data``: which data sets are here, and how to get the others."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from better_attention.cli import UserError, console
from better_attention.cli.screen import message
from better_attention.lab.data.published import SOURCES
from better_attention.text import plural

if TYPE_CHECKING:
    from rich.console import Console

    from better_attention.lab.data.download import Remote
    from better_attention.lab.data.source import Source

HELP = "show, fetch or import the data sets; clear decoded pictures"

Record = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's actions and options; ``--data`` and ``--json`` may stand before or after the action."""
    _add_common(parser)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", title="actions (default: list)")
    _add_common(actions.add_parser("list", help="every data set, and whether it is here"))
    show = actions.add_parser("show", help="one data set: origin, terms, files, sizes; its files are read and checked")
    fetch = actions.add_parser("fetch", help="download the official files, with their SHA-256 checked")
    adopt = actions.add_parser("import", help="copy the official files from a folder of yours, after checking them")
    clear = actions.add_parser("clear", help="remove decoded pictures from the user's cache; they are made again")
    clear.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")
    for action in (show, fetch, adopt):
        action.add_argument("name", metavar="NAME", help=", ".join(SOURCES))
        _add_common(action)
    adopt.add_argument("origin", metavar="FROM", type=Path, help="the folder or file that holds the data")


def run(args: argparse.Namespace) -> int:
    """Carry out the action; returns 0.

    Raises:
        DataError: unknown data set, failed download, unusable files (a ValueError: the command line prints it).
    """
    from better_attention.lab.data import catalogue, store
    from better_attention.lab.data.home import NoHome, home
    from better_attention.lab.data.own_pictures import cache
    from better_attention.lab.tasks.catalogue import TASKS

    folder: Path | None = getattr(args, "data", None)
    as_json: bool = getattr(args, "json", False)
    if args.action == "clear":
        if folder is not None:
            raise UserError(
                "data clear empties the cache of decoded pictures, which --data does not move: remove --data."
            )
        sets, size = cache.clear()
        if as_json:
            print(json.dumps({"folder": str(cache.folder()), "sets": sets, "bytes": size}, indent=2))
        else:
            text = f"removed {_decoded(sets, size)} from {cache.folder()}"
            console().print(message(text), soft_wrap=True)
        return 0
    if args.action in (None, "list", "show") and folder is not None and not folder.exists():
        raise UserError(f"--data {folder} does not exist: `data fetch` and `data import` can make it.")
    if args.action in (None, "list"):
        rows = [_state(row, folder) for row in SOURCES.values()]
        sets, size = cache.held()
        where: str | None
        pictures: str | None
        try:
            where, pictures = str(folder or home()), str(cache.folder())
        except NoHome as missing:
            where, pictures = None if folder is None else str(folder), None
            if not as_json:
                print(f"note: {missing}", file=sys.stderr)
        decoded: Record = {"folder": pictures, "sets": sets, "bytes": size}
        if as_json:
            print(json.dumps({"folder": where, "data_sets": rows, "decoded_pictures": decoded}, indent=2))
        else:
            _print_list(
                console(), where, rows, decoded, "" if folder is None else " " + shlex.join(["--data", str(folder)])
            )
        return 0

    if args.name not in SOURCES and args.name in TASKS and TASKS[args.name]("paper").own_data:
        raise UserError(
            f"task {args.name!r} reads your own files in place: `better-attention compare {args.name} --data PATH`."
        )
    row = catalogue.source(args.name)
    if args.action == "fetch":
        with _progress(quiet=as_json) as progress:
            store.fetch(row, folder, progress=progress)
    elif args.action == "import":
        store.import_from(row, args.origin, folder)
    record = _state(row, folder) if args.action != "show" else _details(row, folder)
    if as_json:
        print(json.dumps(record, indent=2))
    else:
        _print_record(console(), record)
    return 0


def _add_common(parser: argparse.ArgumentParser) -> None:
    # SUPPRESS: an option given before the action must not be reset by the action's own default.
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        default=argparse.SUPPRESS,
        help="the folder that holds the data, or shall hold it (default: better-attention's own)",
    )
    parser.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")


def _state(row: Source, folder: Path | None) -> Record:
    """What is known about a data set without reading it."""
    from better_attention.lab.data import catalogue, store
    from better_attention.lab.data.samples import DataError

    record: Record = {"name": row.name, "title": row.title, "state": "embedded", "where": None}
    record["fetchable"] = bool(row.remotes)
    if row.embedded:
        return record
    try:
        files = catalogue.find(row, folder)
    except DataError as error:
        # One damaged data set must not keep the others out of the list.
        return record | {"state": "incomplete", "problem": str(error)}
    if files is None:
        return record | {"state": "absent"}
    origin = store.origin(files[0].parent)
    # A file that somebody has put beside those that were fetched was found, and no more.
    recorded = origin is not None and all(file.name in origin["files"] for file in files)
    how = origin["how"] if origin is not None and recorded else "found"
    return record | {"state": how, "where": str(files[0].parent), "files": [file.name for file in files]}


def _details(row: Source, folder: Path | None) -> Record:
    """Origin, terms and official files; of a data set that is here also its contents, which are read completely."""
    from better_attention.lab.data import catalogue
    from better_attention.lab.data.catalogue import read
    from better_attention.lab.data.samples import Images, NotFetched, Pairs, RunningText
    from better_attention.lab.files import digest

    record = _state(row, folder) | {
        "terms": row.terms,
        "layout": row.layout,
        "official": [{"url": r.url, "bytes": r.size, "sha256": r.sha256} for r in row.remotes],
    }
    try:
        data = read(row.name, folder)
    except NotFetched as missing:
        return record | {"problem": str(missing)}
    digests = {remote.sha256 for remote in row.remotes}
    files = [file for file in catalogue.find(row, folder) or () if file.is_file()]
    hashes = {file.name: digest(file) for file in files}
    contents: Record = {
        "files": [{"name": name, "sha256": hash_, "official": hash_ in digests} for name, hash_ in hashes.items()],
        "notes": list(data.notes),
        "fingerprint": data.fingerprint(),
    }
    if isinstance(data, Pairs):
        return record | contents | {"pairs": len(data.pairs)}
    if isinstance(data, RunningText):
        return record | contents | {"characters": len(data.text)}
    contents |= {
        "train": len(data.train_labels),
        "test": len(data.test_labels),
        "classes": list(data.classes),
    }
    if isinstance(data, Images):
        contents |= {"shape": list(data.train_images.shape[1:]), "peak": data.peak}
    return record | contents


_STATES = {
    "embedded": "here: scikit-learn carries it",
    "fetched": "here: fetched, SHA-256 checked",
    "imported": "here: imported",
    "found": "here",
    "incomplete": "incomplete",
    "absent": "not here",
}


def _decoded(sets: int, size: int) -> str:
    return f"{plural(sets, 'set')} of decoded pictures, {size / 2**20:,.0f} MiB,"


def _print_list(out: Console, where: str | None, rows: list[Record], decoded: Record, option: str) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for heading in ("data set", "what it is", "state"):
        table.add_column(heading)
    for row in rows:
        table.add_row(row["name"], Text(row["title"]), _STATES[row["state"]])
    out.print(table)
    if where is not None:
        out.print(Text(f"\n{message(f'Looked in {where}.')}"))
    for row in rows:
        if "problem" in row:
            out.print(Text(message(f"{row['name']}: {row['problem']}")))
        elif row["state"] == "absent":
            name = row["name"]
            fetch = f"better-attention data fetch {name}{option}   (or: data import {name} FROM{option})"
            bring = f"better-attention data import {name} FROM{option}"
            out.print(Text(message(fetch if row["fetchable"] else bring)), soft_wrap=True)
    if decoded["sets"]:
        text = f"{_decoded(decoded['sets'], decoded['bytes'])} in {decoded['folder']}"
        out.print(Text(f"\n{message(text)}; `better-attention data clear` removes them."), soft_wrap=True)


def _print_record(out: Console, record: Record) -> None:
    from rich.text import Text

    out.print(Text(f"{record['name']}: {record['title']}", style="bold"))
    lines = [_STATES[record["state"]] + (f", in {record['where']}" if record["where"] else "")]
    if "terms" in record:
        lines += [f"origin: {record['terms']}", f"layout: {record['layout']}"]
        lines += [f"official: {r['url']} ({r['bytes']:,} bytes)\n  SHA-256 {r['sha256']}" for r in record["official"]]
    if "fingerprint" in record:
        for file in record["files"]:
            verdict = "the official file" if file["official"] else "not the official file's; contents checked"
            lines.append(f"{file['name']}: SHA-256 {file['sha256']} ({verdict})")
        shape = f" of {'×'.join(map(str, record['shape']))}, white is {record['peak']}" if "shape" in record else ""
        if "pairs" in record:
            lines.append(f"{record['pairs']:,} sentence pairs, which the task splits")
        elif "characters" in record:
            lines.append(f"{record['characters']:,} characters of running text, which the task splits")
        else:
            lines.append(f"{record['train']:,} training and {record['test']:,} test samples{shape}")
            lines.append(f"classes: {', '.join(record['classes'])}")
        lines += [f"note: {note}" for note in record["notes"]]
        lines.append(f"contents: SHA-256 {record['fingerprint']}")
    if "problem" in record:
        lines.append(record["problem"])
    out.print(Text("\n".join(map(message, lines))), soft_wrap=True)


@contextmanager
def _progress(*, quiet: bool) -> Iterator[Callable[[Remote, int], None] | None]:
    """How a download shows itself, on stderr: bars on a terminal, one line per file elsewhere, nothing if ``quiet``."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    # Standard output is for the record, which may be JSON.
    err = console(stderr=True)
    tasks: dict[str, Any] = {}
    if quiet:
        yield None
    elif err.is_interactive:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with Progress(*columns, console=err) as bars:

            def draw(remote: Remote, done: int) -> None:
                if remote.name not in tasks:
                    tasks[remote.name] = bars.add_task(remote.name, total=remote.size)
                bars.update(tasks[remote.name], completed=done)

            yield draw
    else:

        def say(remote: Remote, done: int) -> None:
            if remote.name not in tasks:
                tasks[remote.name] = True
                err.print(f"fetching {remote.url} ({remote.size:,} bytes)", markup=False, soft_wrap=True)

        yield say
