"""``better-attention cost``: parameters, FLOPs and bytes of one layer, and the paper's figures of them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from better_attention.cli import UserError, console
from better_attention.cli.arguments import (
    SIZES,
    add_kv_heads,
    add_sizes,
    check_sizes,
    kv_heads_of,
    names,
    option,
    positive,
)
from better_attention.lab.tasks.variant import Variant
from better_attention.mechanism import MECHANISMS
from better_attention.text import plural

HELP = "what the mechanisms cost: a table, or the paper's figures 2 to 4"
DTYPES = ("float64", "float32", "bfloat16", "float16")

Entry = dict[str, str | int | float | None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    add_sizes(parser)
    add_kv_heads(parser, "of mechanisms that project keys")
    parser.add_argument("--batch", type=positive, default=1, metavar="N", help="sequences at once; default: 1")
    parser.add_argument(
        "--window",
        type=positive,
        metavar="W",
        help="each token sees the last W alone, and W_A is W x W; default: every token sees all",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights and cache; default: float32")
    parser.add_argument(
        "--mechanisms",
        type=names,
        default=tuple(MECHANISMS),
        metavar="A,B,...",
        help=f"default: {','.join(MECHANISMS)}; each may be followed by +expressive or +align, and one with W_A by "
        "+per-head or +identity (which costs nothing)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    figure = parser.add_argument_group("figures")
    figure.add_argument("--figure", type=int, choices=(2, 3, 4), help="draw this figure of the paper")
    figure.add_argument("--out", type=Path, metavar="FILE", help="where to: .png, .svg or .pdf")
    figure.add_argument(
        "--form", choices=("paper", "exact"), default="paper", help="eq. 24 (default), or the exact count"
    )


def run(args: argparse.Namespace) -> int:
    """Print the table or draw the figure; returns 0.

    Raises:
        UserError: arguments that do not go together.
    """
    if args.figure is not None:
        return _draw(args)
    if args.out is not None:
        raise UserError("--out is the file of a figure: say which with --figure 2, 3 or 4.")
    check_sizes(args)
    rows = entries(args)
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        _print(rows, args)
    return 0


def entries(args: argparse.Namespace) -> list[Entry]:
    """A mapping a mechanism: counts as in :class:`better_attention.costs.Cost`, and exact FLOPs over standard's."""
    import torch

    from better_attention.costs import cost

    dtype = getattr(torch, args.dtype)
    sizes = {"batch": args.batch, "dtype": dtype}
    standard = cost(args.embed_dim, args.heads, args.length, **sizes)
    found: list[Entry] = []
    variants = [Variant.of(name) for name in args.mechanisms]
    for name, variant, kv_heads in zip(args.mechanisms, variants, kv_heads_of(args, variants), strict=True):
        own: dict[str, Any] = {
            "mechanism": variant.mechanism,
            "align_heads": "per_head" if variant.per_head else "shared",
            **sizes,
        }
        own |= {"window": args.window, "num_kv_heads": kv_heads}
        whole = cost(args.embed_dim, args.heads, args.length, **own)
        forward = cost(args.embed_dim, args.heads, args.length, backward=False, **own)
        found.append(
            {
                "mechanism": name,
                "params": whole.params,
                "flops_paper": whole.flops_paper,
                "flops_forward": forward.flops,
                "flops": whole.flops,
                "flops_to_standard": whole.flops / standard.flops,
                "weight_bytes": whole.weight_bytes,
                "cache_bytes_per_token": whole.cache_bytes_per_token,
                "cache_bytes": whole.cache_bytes,
                **({} if args.kv_heads is None else {"kv_heads": kv_heads}),
            }
        )
    return found


_TITLES = {
    "params": "Params",
    "flops_paper": "FLOPs, eq. 24",
    "flops_forward": "FLOPs, forward",
    "flops": "forward + backward",
    "flops_to_standard": "FLOPs, share of standard's",
    "weight_bytes": "Weights, bytes",
    "cache_bytes_per_token": "Cache, bytes/token",
    "cache_bytes": "Cache, bytes",
}


def _print(rows: list[Entry], args: argparse.Namespace) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    title = f"One layer: d = {args.embed_dim}, h = {args.heads}, ℓ = {args.length}, batch {args.batch}, {args.dtype}"
    if args.window is not None:
        title += f", window {args.window}"
    if args.kv_heads is not None:
        title += f", {plural(args.kv_heads, 'head')} of projected keys and values"
    lines = [["Mechanism", *_TITLES.values()]]
    for row in rows:
        cells = [f"{row[key]:,}" if isinstance(row[key], int) else f"{row[key]:.3f}" for key in _TITLES]
        lines.append([str(row["mechanism"]), *cells])
    out = console()
    if out.width < sum(max(map(len, column)) + 3 for column in zip(*lines, strict=True)):
        lines = [list(column) for column in zip(*lines, strict=True)]  # a narrow screen: mechanisms side by side
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for i, header in enumerate(lines[0]):
        table.add_column(header, justify="right" if i else "left", overflow="fold")
    for line in lines[1:]:
        table.add_row(*line)
    out.print(table)
    out.print(
        "Eq. 24 of arXiv 2403.01643 counts forward and backward and is linear in d; the other counts are those of the\n"
        "matrix products of a real layer, a multiply-add as two. W_A and biases are included." + _remarks(args),
        style="dim",
        soft_wrap=True,
    )


def _remarks(args: argparse.Namespace) -> str:
    """What the numbers of a window, or of grouped heads, are to be read with."""
    said = []
    if args.window is not None:
        said.append(" Shares are of standard\nwithout a window; eq. 24 knows none.")
    if args.kv_heads not in (None, args.heads):
        said.append("\nShares are of standard with as many heads of keys as of queries; eq. 24 knows no others.")
        variants = [Variant.of(name) for name in args.mechanisms]
        if alone := ", ".join(variant.name for variant in variants if not variant.projects_keys):
            said.append(f"\n--kv-heads does not apply without projected keys to group: {alone}.")
    return "".join(said)


def _draw(args: argparse.Namespace) -> int:
    from better_attention.lab.paper.cost_figures import PAPER_OVERHEADS, POWERS, average_overheads, cost_figure

    for name, (size, *_) in SIZES.items():
        # Refused rather than ignored: the figure would look as if it had these sizes.
        if getattr(args, name) != size:
            raise UserError(f"--figure {args.figure} has its own sizes: omit {option(name)}.")
    if args.window is not None:
        raise UserError(f"--figure {args.figure} knows no window: omit --window.")
    if args.kv_heads is not None:
        raise UserError(f"--figure {args.figure} knows no grouped heads: omit --kv-heads.")
    if args.out is None:
        raise UserError(f"--figure {args.figure} needs --out FILE, ending in .png, .svg or .pdf.")
    cost_figure(args.figure, args.out, form=args.form)
    overheads = average_overheads(args.form) if args.figure == 3 else {}
    if args.json:
        averages: dict[str, object] = {}
        if overheads:
            averages = {"average_overheads": _keyed(overheads), "paper": _keyed(PAPER_OVERHEADS), "grid": POWERS}
        print(json.dumps({"figure": args.figure, "form": args.form, "file": str(args.out), **averages}, indent=2))
        return 0
    for heads, value in overheads.items():
        printed = f" (the paper prints {100 * PAPER_OVERHEADS[heads]:.0f} %)" if args.form == "paper" else ""
        print(f"h = {heads}: standard needs {100 * value:.1f} % more FLOPs than efficient on average{printed}")
    if overheads:
        only = "" if args.form == "paper" else ", where h divides d"
        print(f"averaged over ℓ and d = {POWERS[0]}, {POWERS[1]}, {POWERS[2]}, ..., {POWERS[-1]}{only}")
    print(f"figure {args.figure} ({args.form}): {args.out}")
    return 0


def _keyed(values: dict[int, float]) -> dict[str, float]:
    """For JSON, whose keys are text."""
    return {str(heads): value for heads, value in values.items()}
