"""``better-attention show``: a mechanism drawn, with equations and counts; or a task with its setting."""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from typing import TYPE_CHECKING, Any

from better_attention.cli import UserError, console
from better_attention.cli.arguments import add_kv_heads, add_sizes, check_sizes, kv_heads_of
from better_attention.lab.tasks.variant import Variant
from better_attention.mechanism import MECHANISMS, PROJECTIONS
from better_attention.text import plural

if TYPE_CHECKING:
    from rich.table import Table

HELP = "show a mechanism (picture, equations, counts) or a task (setting, source)"

Entry = dict[str, Any]

_ROLE = re.compile(r":\w+:`~?(?:[\w.]*\.)?(\w+)`")
"""A reference in a docstring, such as :func:`~a.b.c`, of which people want the last word."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument(
        "name", metavar="NAME", help="a mechanism, maybe with +expressive, +align, +per-head or +identity; or a task"
    )
    add_sizes(parser)
    add_kv_heads(parser, "of the mechanism")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print what ``NAME`` is; returns 0.

    Raises:
        UserError: it is neither a mechanism nor a task.
    """
    from better_attention.lab.tasks.catalogue import TASKS

    if args.name in TASKS:
        if args.kv_heads is not None:
            raise UserError(f"--kv-heads is of a layer, and {args.name!r} is a task: leave it out.")
        task = describe_task(args.name)
        if args.json:
            print(json.dumps(task, indent=2, ensure_ascii=False))
        else:
            _print_task(task)
        return 0
    try:
        variant = Variant.of(args.name)
    except ValueError:
        raise UserError(
            f"{args.name!r} is neither a mechanism ({', '.join(MECHANISMS)}, optionally followed by +expressive or "
            f"+align, and with W_A by +per-head or +identity) nor a task ({', '.join(TASKS)})."
        ) from None
    check_sizes(args)
    (kv_heads,) = kv_heads_of(args, [variant])
    found = describe_mechanism(variant, args.embed_dim, args.heads, args.length, kv_heads)
    if args.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        _print_mechanism(found)
    return 0


def describe_mechanism(variant: Variant, embed_dim: int, heads: int, length: int, kv_heads: int | None = None) -> Entry:
    """The mechanism's axes, picture, equations, and the counts of one layer of these sizes."""
    from better_attention.cli.mechanism_drawing import draw, equations, legend, source
    from better_attention.costs import cost
    from better_attention.costs import kv_heads_of as counted_heads
    from better_attention.layer.part import Sizes
    from better_attention.layer.parts import parts_of

    mechanism, d, n = variant.mechanism, embed_dim, length
    layout = "per_head" if variant.per_head else "shared"
    own: dict[str, Any] = {"mechanism": mechanism, "align_heads": layout, "num_kv_heads": kv_heads}
    counted = cost(d, heads, n, **own)
    key_heads, value_heads = counted_heads(mechanism, heads, kv_heads)
    sizes = Sizes(d, heads, n, align_heads=layout, key_heads=key_heads, value_heads=value_heads)
    params = {part.symbol: part.params(sizes) for part in parts_of(mechanism)}
    return {
        "mechanism": variant.name,
        "source": source(mechanism),
        "learned": [p for p in PROJECTIONS if p in mechanism.projections],
        "aligned": mechanism.aligned,
        "score": mechanism.score,
        "drawing": draw(mechanism),
        "legend": [*legend(mechanism), *_layout(variant), *_grouped(heads, key_heads, value_heads)],
        "equations": equations(mechanism),
        "sizes": {"embed_dim": d, "heads": heads, "length": n} | ({} if kv_heads is None else {"kv_heads": kv_heads}),
        "params": {**params, "all": counted.params},
        "flops_paper": counted.flops_paper,
        "flops": counted.flops,
        "flops_forward": cost(d, heads, n, backward=False, **own).flops,
        "weight_bytes": counted.weight_bytes,
        "cache_bytes_per_token": counted.cache_bytes_per_token,
    }


def _layout(variant: Variant) -> list[str]:
    """What is particular about W_A."""
    return ["W_A: one for each head."] * variant.per_head + ["W_A: starts as the identity."] * variant.identity


def _grouped(heads: int, key_heads: int, value_heads: int) -> list[str]:
    """Which keys and values have fewer heads than queries."""
    found = []
    for word, count in (("keys", key_heads), ("values", value_heads)):
        if count != heads:
            found.append(f"{word.capitalize()}: {plural(count, 'head')}, each for {heads // count} query heads.")
    return found


def describe_task(name: str) -> Entry:
    """The task's text, its settings at every scale, and the paper's rows for it."""
    from better_attention.lab import published
    from better_attention.lab.tasks.base import SCALES
    from better_attention.lab.tasks.catalogue import TASKS

    make = TASKS[name]
    module = inspect.getdoc(sys.modules[make.__module__]) or ""
    # The first paragraph of the function only says what such a function does.
    _, _, choices = (inspect.getdoc(make) or "").partition("\n\n")
    task = make("paper")
    return {
        "task": name,
        "title": task.title,
        "source": task.source,
        "about": [_ROLE.sub(r"\1", " ".join(part.split())) for part in (module, choices) if part],
        "settings": {scale: make(scale).settings() for scale in SCALES},
        "paper": published.rows(name),
    }


def _print_mechanism(found: Entry) -> None:
    from rich.text import Text

    out = console()
    sizes, params = found["sizes"], found["params"]
    out.print(Text.assemble((found["mechanism"], "bold"), f" attention  ({found['source']})\n"))
    for line in (*found["drawing"], "", *found["legend"], "", *found["equations"]):
        out.print(line, markup=False, soft_wrap=True)
    d, h, n = (sizes[key] for key in ("embed_dim", "heads", "length"))
    grouped = f", {plural(sizes['kv_heads'], 'head')} of projected keys and values" if "kv_heads" in sizes else ""
    table = _table(f"\nOne layer: d = {d}, h = {h}, ℓ = {n}{grouped}, biases included")
    table.add_column("Count")
    table.add_column("", justify="right")
    for name, count in params.items():
        table.add_row(f"parameters of {name}" if name != "all" else Text("parameters", "bold"), f"{count:,}")
    without = " (without groups)" if grouped else ""
    for key, title in (
        ("flops_paper", f"FLOPs, forward + backward, eq. 24{without}"),
        ("flops_forward", "FLOPs, forward, exact"),
        ("flops", "FLOPs, forward + backward, exact"),
        ("weight_bytes", "bytes of weights, float32"),
        ("cache_bytes_per_token", "bytes of key/value cache a token, float32"),
    ):
        table.add_row(title, f"{found[key]:,}")
    out.print(table)


def _print_task(found: Entry) -> None:
    from rich.text import Text

    out = console()
    out.print(Text.assemble((found["task"], "bold"), f": {found['title']}\nSource: {found['source']}.\n"))
    for paragraph in found["about"]:
        out.print(paragraph, markup=False, end="\n\n", width=min(out.width, 100))
    scales = found["settings"]
    table = _table("Setting at each scale")
    table.add_column("")
    for scale in scales:
        table.add_column(scale)
    settings = list(scales.values())
    for key in settings[0]:
        if key not in ("name", "title", "source", "scale"):
            table.add_row(key.replace("_", " "), *(_cell(setting.get(key)) for setting in settings))
    out.print(table)
    _print_paper(found)


def _print_paper(found: Entry) -> None:
    from better_attention.lab.analysis.estimates import number
    from better_attention.lab.analysis.summary import COLUMNS

    rows = found["paper"]
    out = console()
    if not rows:
        out.print("The paper has no results for this task.")
        return
    keys = [key for key in rows[0] if key not in ("task", "score", "source") and rows[0][key] is not None]
    table = _table(f"The paper's results ({rows[0]['source']})")
    for key in keys:
        table.add_column(key.replace("_", " "), justify="left" if key == "mechanism" else "right")
    digits = {column.key: column.digits for column in COLUMNS if column.kind == "metric"}
    for row in rows:
        table.add_row(*(number(row[key], digits[key]) if key in digits else _cell(row[key]) for key in keys))
    out.print(table)


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _table(title: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    return Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
