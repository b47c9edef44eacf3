"""``better-attention table N``: a table of the paper, ours beside it, and what was not run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from better_attention.cli import console
from better_attention.cli.screen import message

HELP = "print a table of the paper beside our figures: difference, seeds, intervals, what was not run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("number", type=number, metavar="N", help="1 to 10; 4 is that of `better-attention edge`")
    parser.add_argument(
        "results",
        nargs="*",
        type=Path,
        metavar="RESULTS",
        help="results.json (of table 4: edge.json), or folders with one; default: results/*/ and runs/*/",
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the rows there")
    parser.add_argument("--json", action="store_true", help="print JSON")


def number(text: str) -> int:
    """The number of a table."""
    if text not in map(str, range(1, 11)):
        raise argparse.ArgumentTypeError(f"the paper has tables 1 to 10, received {text!r}")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Print the table; returns 0.

    Raises:
        UserError, ValueError, FileNotFoundError: results that are not there, or damaged.
    """
    from better_attention.lab.paper import beside, view
    from better_attention.lab.runs.overwrite_guard import check_file

    if args.csv is not None:
        check_file(args.csv, "--csv", is_table)
    if args.number == beside.EDGE:
        return edge_table(args)
    files = beside.find_results(args.results)
    blocks = beside.blocks(args.number, files)
    if args.csv is not None:
        view.write_csv(blocks, args.csv)
    if args.json:
        print(json.dumps(view.as_json(args.number, blocks), indent=2, ensure_ascii=False))
    else:
        screen = console()
        view.print_blocks(args.number, blocks, screen)
        if not any(block.ours for block in blocks):
            tasks = sorted({str(record["task"]) for file in files for record in beside.read_results(file)})
            text = f"Results of {', '.join(tasks)} were read, but none belongs to table {args.number}."
            screen.print(message(text) if tasks else "No results.json was found.", markup=False, soft_wrap=True)
    return 0


def is_table(content: bytes) -> bool:
    """Whether the content of a file is that of a table which this command wrote."""
    return {b"task", b"mechanism", b"heads"} <= set(content.partition(b"\n")[0].split(b","))


def edge_table(args: argparse.Namespace) -> int:
    """Table 4, from what ``better-attention edge`` wrote."""
    from better_attention.bench.edge import view
    from better_attention.lab.paper.beside import find_results

    files = find_results(args.results, "edge.json")
    reports = [(file, view.read(file)) for file in files]
    if args.csv is not None:
        view.write_csv([report for _, report in reports], args.csv)
    if args.json:
        entries = [{"file": str(file), "rows": view.beside_paper(report)} for file, report in reports]
        blocks = entries or [{"file": "", "rows": view.beside_paper(None)}]
        print(json.dumps({"table": 4, "title": view.TITLE, "blocks": blocks}, indent=2, ensure_ascii=False))
        return 0
    screen = console()
    for file, report in reports:
        screen.print(message(f"{file}"), markup=False, soft_wrap=True)
        view.print_report(report, screen)
    if not reports:
        view.print_paper(screen)
    return 0
