"""The tables of docs/scale.md, between marks; what stands around them is written by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import markdown

from .arithmetic import (
    DECODER,
    MECHANISMS,
    VIT,
    Machine,
    Model,
    cache_bytes,
    decoding,
    exchanges,
    last_length,
    params,
    saving,
    step,
    tensor_parallel,
    tokens_a_second,
    users,
    work,
)

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "scale.md"
RESULTS = ROOT / "benchmarks" / "results"
MEASURED = RESULTS / "sequence-gloo.json"
LAYERS = "layer-*-float32.json"
GPUS = (8, 64, 512)
MARK = re.compile(r"<!-- table: (\S+) -->\n.*?<!-- end -->", re.DOTALL)


def write() -> None:
    """Put the current tables on the page."""
    PAGE.write_text(current(PAGE.read_text("utf-8")), "utf-8")


def current(text: str) -> str:
    """The page with every table as this code computes it.

    Raises:
        ValueError: a mark without a table, or a table without a mark.
    """
    tables = all_tables()
    marks = MARK.findall(text)
    if sorted(marks) != sorted(tables):
        raise ValueError(f"the page has marks for {sorted(marks)}, there are tables {sorted(tables)}.")
    return MARK.sub(lambda m: f"<!-- table: {m[1]} -->\n\n{tables[m[1]]}\n<!-- end -->", text)


def all_tables(machine: Machine | None = None) -> dict[str, str]:
    """Every table by its name."""
    gpu = machine or Machine()
    return {
        "assumptions": assumptions(gpu),
        "vit": training(VIT, gpu),
        "decoder": training(DECODER, gpu),
        "cpu": on_a_cpu(),
        "tensor": tensor(gpu),
        "limits": limits(),
        "users": serving(gpu),
        "formulae": formulae(),
        "sequence": long_sequences(gpu),
        "decoding": long_decoding(gpu),
        "gloo": measured(),
    }


table = partial(markdown.table, numbers=True)


def assumptions(m: Machine) -> str:
    """What is assumed of a GPU and its network."""
    return table(
        ("of each GPU", "value", "source"),
        [
            ("dense bf16 products, peak", f"{m.product / 1e12:.0f} TFLOP/s", "NVIDIA H100 SXM data sheet"),
            ("memory", f"{m.memory / 1e9:.0f} GB at {m.memory_rate / 1e12:.2f} TB/s", "the same"),
            ("inside a server of 8", f"{m.inside / 1e9:.0f} GB/s each way", "the same: NVLink, 900 GB/s both ways"),
            ("between servers", f"{m.between / 1e9:.0f} GB/s each way", "one 400 Gbit/s port for each GPU"),
            (
                "a message, whatever its size",
                f"{1e6 * m.hop_inside:.0f} µs, {1e6 * m.hop_between:.0f} µs between servers",
                "assumed",
            ),
            ("linear maps reach", f"{m.of_product:.0%} of the peak", "assumed, element-wise work included"),
            ("attention kernels reach", f"{m.of_attention:.0%} of the peak", "assumed, forward and backward"),
            ("memory and network reach", f"{m.of_rates:.0%} of their rates", "assumed"),
        ],
    )


def training(model: Model, machine: Machine) -> str:
    """Time, memory and network of training, for each mechanism and number of GPUs."""
    rows = []
    for gpus in GPUS:
        hours = {}
        for mechanism in MECHANISMS:
            one = step(model, mechanism, gpus, machine)
            hours[mechanism] = one.seconds * model.updates / 3600
            rows.append(
                (
                    f"{mechanism}, {gpus} GPUs",
                    f"{params(model, mechanism) / 1e6:,.1f}",
                    f"{3 * work(model, mechanism).total * model.batch / 1e15:,.1f}",
                    f"{1e3 * one.compute:,.1f}",
                    f"{1e3 * one.network:,.1f}",
                    f"{one.memory / 1e9:,.1f}",
                    f"{hours[mechanism]:,.2f}",
                    f"{gpus * hours[mechanism]:,.0f}",
                    f"{hours['standard'] / hours[mechanism]:.2f}×",
                )
            )
    header = (
        "mechanism", "parameters, M", "PFLOP a step", "computing, ms", "network, ms", "memory of a GPU, GB",
        "training, h", "GPU hours", "times as fast",
    )  # fmt: skip
    return table(header, rows)


def on_a_cpu() -> str:
    """The measured layer at the size of ViT-B/16, and what follows for the whole model."""
    (file,) = RESULTS.glob(LAYERS)
    document = json.loads(file.read_text("utf-8"))
    size = {"batch": 16, "length": 196, "width": 768, "heads": 12, "mode": "training"}
    rows = {r["contender"]: r for r in document["rows"] if all(r[k] == v for k, v in size.items())}
    product = sorted(limit["product"]["float32"] for limit in document["limits"])[len(document["limits"]) // 2] * 1e9
    mlp = 3 * 2.0 * 2 * 197 * VIT.width * VIT.hidden * VIT.layers / product
    base = rows["nn.MultiheadAttention"]
    lines = []
    for name in ("nn.MultiheadAttention", *MECHANISMS):
        row = rows[name]
        one = row["seconds"]["median"]
        image = VIT.layers * one / size["batch"] + mlp  # type: ignore[operator]
        lines.append(
            (
                name,
                f"{1e3 * one:.0f} ({1e3 * row['seconds']['low']:.0f} … {1e3 * row['seconds']['high']:.0f})",
                f"{row['flops'] / one / 1e9:.0f}",
                f"{row['flop_ratio']:.2f}×",
                f"{row['ratio']['median']:.2f}×",
                f"{1e3 * image:.0f}",
            )
        )
    assert base["ratio"]["median"] == 1.0  # noqa: S101 - the baseline of the file is the first row here
    header = (
        "layer", "ms a step, 16 images (low … high)", "GFLOP/s", "fewer operations", "times as fast, measured",
        "ms an image, 12 layers with MLP",
    )  # fmt: skip
    machine = document["machine"]
    note = (
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['versions']['torch']}, float32; products of "
        f"{product / 1e9:.0f} GFLOP/s; `benchmarks/results/{file.name}`, `{machine['command']}`."
    )
    return f"{table(header, lines)}\n{note}\n"


def tensor(machine: Machine) -> str:
    """One layer of the decoder over the GPUs of a server."""
    rows = []
    for ways in (2, 4, 8):
        for mechanism in MECHANISMS:
            compute, network, held = tensor_parallel(DECODER, mechanism, ways, machine)
            rows.append(
                (
                    f"{mechanism}, {ways} GPUs",
                    f"{1e6 * compute:,.0f}",
                    f"{1e6 * network:,.0f}",
                    f"{network / (compute + network):.0%}",
                    f"{held / 1e6:,.2f}",
                )
            )
    return table(("mechanism", "computing, µs", "two all-reduces, µs", "share of network", "parameters held, M"), rows)


def limits() -> str:
    """Up to which length a mechanism saves something, for the whole model."""
    rows = []
    for model in (VIT, DECODER):
        for mechanism in MECHANISMS[1:]:
            lengths = [last_length(model, mechanism, least) for least in (0.10, 0.05, 0.01)]
            rows.append(
                (
                    f"{model.name}, {mechanism}",
                    f"{saving(model, mechanism, model.length):.1%} at {model.length:,}",
                    *("–" if n is None else f"{n:,}" for n in lengths),
                )
            )
    return table(("model, mechanism", "saves", "10 % up to ℓ", "5 % up to ℓ", "1 % up to ℓ"), rows)


def serving(machine: Machine) -> str:
    """Conversations beside the weights of one GPU, and tokens a second of all of them."""
    rows = []
    for length in (2048, 8192, 32768):
        for mechanism in ("standard", "optimised", "efficient"):
            number = users(DECODER, mechanism, length, machine)
            rate = tokens_a_second(DECODER, mechanism, length, number, machine)
            base = users(DECODER, "standard", length, machine)
            same = tokens_a_second(DECODER, mechanism, length, base, machine)
            rows.append(
                (
                    f"{mechanism}, {length:,} tokens each",
                    f"{cache_bytes(DECODER, mechanism) / 1024:.0f}",
                    f"{number:,}",
                    f"{number / base:.2f}×",
                    f"{rate:,.0f}",
                    f"{same:,.0f}",
                )
            )
    header = (
        "mechanism, context", "cache of a token, KiB", "users", "of standard", "tokens/s, all of them",
        "tokens/s with standard's users",
    )  # fmt: skip
    return table(header, rows)


def formulae() -> str:
    """What one process sends in one layer for one sequence, in letters."""
    return table(
        ("way", "forward, bytes", "steps", "backward, bytes", "steps ", "held of others"),
        [
            (
                "ring, softmax",
                "2ℓd g/h · 2 (P−1)/P",
                "P−1",
                "2ℓd g/h · (2 (P−1)/P + 4)",
                "P",
                "K, V of one process, forward",
            ),
            ("all-gather of K and V", "2ℓd g/h · 2 (P−1)/P", "P−1", "2ℓd g/h · 6 (P−1)/P", "2 (P−1)", "K, V of all"),
            (
                "sums, expressive",
                "(2ℓd + 4ℓ(d+h)) (P−1)/P",
                "2 (P−1)",
                "(8ℓd + 8ℓh) (P−1)/P",
                "3 (P−1)",
                "q of all, sums of all",
            ),
            (
                "sums, softmax",
                "(2ℓd + 4ℓ(d+h) + 8ℓh) (P−1)/P",
                "4 (P−1)",
                "(8ℓd + 12ℓh) (P−1)/P",
                "3 (P−1)",
                "q of all, sums of all",
            ),
        ],
    )


def long_sequences(machine: Machine) -> str:
    """The same in numbers."""
    length, d, h = 131_072, DECODER.width, DECODER.heads
    rows = []
    for ways, rate, hop in (
        (8, machine.inside, machine.hop_inside),
        (64, machine.between, machine.hop_between),
    ):
        for groups in (h, 4):
            for name, (there, back) in exchanges(length, d, h, groups, ways).items():
                speed = rate * machine.of_rates
                rows.append(
                    (
                        f"{name}, {ways} GPUs, {groups} heads of keys",
                        f"{there.bytes / 2**20:,.0f}",
                        f"{there.steps}",
                        f"{1e3 * there.seconds(speed, hop):,.2f}",
                        f"{back.bytes / 2**20:,.0f}",
                        f"{1e3 * back.seconds(speed, hop):,.2f}",
                        f"{there.held / 2**20:,.0f}",
                    )
                )
    header = (
        "way", "forward, MiB", "steps", "forward, ms", "backward, MiB", "backward, ms", "held of others, MiB",
    )  # fmt: skip
    return table(header, rows)


def long_decoding(machine: Machine) -> str:
    """One new token over keys that several GPUs hold."""
    length, d, h = 131_072, DECODER.width, DECODER.heads
    rows = []
    for ways, rate, hop in ((8, machine.inside, machine.hop_inside), (64, machine.between, machine.hop_between)):
        for name, one in decoding(length, d, h, ways).items():
            rows.append(
                (
                    f"{name}, {ways} GPUs",
                    f"{one.bytes / 1024:,.1f}",
                    f"{one.steps}",
                    f"{1e6 * one.seconds(rate * machine.of_rates, hop):,.0f}",
                )
            )
    return table(("way", "KiB sent", "steps", "µs a layer"), rows)


def measured() -> str:
    """Counts, bytes and errors over gloo."""
    document = json.loads(MEASURED.read_text("utf-8"))

    def calls(row: Mapping[str, Any], direction: str) -> str:
        return ", ".join(f"{n} {name}" for name, n in row.get(f"{direction}_calls", {}).items()) or "–"

    lines = [
        (
            f"{row['way']}, {row['processes']} processes",
            calls(row, "forward"),
            f"{row['forward_bytes'] / 2**20:.2f}",
            calls(row, "backward"),
            f"{row['backward_bytes'] / 2**20:.2f}" if "backward_bytes" in row else "–",
            f"{row['error']:.0e}",
        )
        for row in document["rows"]
    ]
    header = (
        "way", "forward calls", "MiB sent", "backward calls", "MiB sent ", "error",
    )  # fmt: skip
    shape, machine = document["shape"], document["machine"]
    note = (
        f"ℓ = {shape['length']}, {shape['heads']} heads of width {shape['head_width']}, float32, a thread each; "
        f"{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}, {machine['backend']}; "
        f"`{document['command']}`."
    )
    return f"{table(header, lines)}\n{note}\n"
