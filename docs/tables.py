"""The tables of the pages and of the README, from the committed results. No number in them is written by hand.

    python -m docs.tables            # write them into the pages
    python -m docs.tables --check    # say which are out of date

A table stands between ``<!-- table: NAME -->`` and ``<!-- end of table -->``.
"""

from __future__ import annotations

import csv
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path

import better_attention as ba
from better_attention.lab.analysis.estimates import estimate, number

ROOT = Path(__file__).parents[1]
BENCHMARKS, RESULTS = ROOT / "benchmarks" / "results", ROOT / "results"
PLACE = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)

Row = dict[str, str]


def pages() -> list[Path]:
    """Every page that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


# --- reading ----------------------------------------------------------------------------------------------------------


@cache
def suite(name: str, dtype: str = "float32") -> tuple[tuple[Row, ...], dict[str, object]]:
    """The rows of a benchmark suite and its machine; of several complete files the one that was measured last."""
    found = []
    for path in BENCHMARKS.glob(f"{name}-*-{dtype}.json"):
        document = json.loads(path.read_text("utf-8"))
        # kernel-dropout-*.json is a selection of the suite kernel, and a name of its own here.
        if re.fullmatch(rf"{name}-(?!dropout|flex).*", path.stem) and document.get("complete", True):
            found.append((document["machine"]["date"], path, document["machine"]))
    _, path, machine = max(found)
    return tuple(rows(path.with_suffix(".csv"))), machine


def rows(path: Path) -> list[Row]:
    """A CSV file."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def only(table: Iterable[Row], **wanted: str) -> list[Row]:
    """The rows with these values."""
    return [row for row in table if all(row[key] == value for key, value in wanted.items())]


def one(table: Iterable[Row], **wanted: str) -> Row:
    """The one row with these values."""
    (row,) = only(table, **wanted)
    return row


def shape(row: Row) -> str:
    """Batch, length, width and heads of a benchmark row."""
    return ", ".join(row[key] for key in ("batch", "length", "width", "heads"))


def measured_on(machine: dict[str, object]) -> str:
    """Where and how a suite was measured, one line."""
    versions = machine["versions"]
    assert isinstance(versions, dict)
    assert isinstance(machine["commit"], str)
    assert isinstance(machine["date"], str)
    isa = str(machine["instruction_set"])
    isa = {"avx512": "AVX-512", "avx2": "AVX2", "neon": "NEON"}.get(isa, isa)
    return (
        f"Measured on {machine['cpu']} ({machine['threads']} threads, {isa}), torch {versions['torch']}, "
        f"{machine['date'][:10]}, commit {machine['commit'][:7]}; command "
        f"`{machine['command']}`."
    )


def markdown(header: Sequence[str], body: Iterable[Sequence[str]], right: int = 1) -> str:
    """A table; the columns from ``right`` on are numbers."""
    line = lambda cells: f"| {' | '.join(cells)} |"  # noqa: E731
    rule = ["---" if i < right else "---:" for i in range(len(header))]
    return "\n".join([line(header), line(rule), *map(line, body)]) + "\n"


def times(row: Row, *, spread: bool = False) -> str:
    """Times as fast as the baseline of the same round: the median, and the lowest and highest round."""
    median = f"{float(row['ratio_median']):.2f}"
    median = f"**{median}**" if float(median) < 1.0 else median
    return f"{median} ({float(row['ratio_low']):.2f}–{float(row['ratio_high']):.2f})" if spread else median


def p_value(text: str) -> str:
    """A p value as tables print it."""
    value = float(text)
    return "< 0.001" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


# --- speed ------------------------------------------------------------------------------------------------------------

LAYERS = ("efficient", "optimised", "super", "standard", "expressive")
OTHERS = ("fused QKV on SDPA", "x-transformers", "Keras on JAX")


def _layers(shapes: Sequence[str], contenders: Sequence[str], *, spread: bool) -> str:
    table, machine = suite("layer")
    header = ("batch, tokens, width, heads", *shapes)
    body = [
        (
            f"{who}, {mode}",
            *(times(one([r for r in table if shape(r) == s], contender=who, mode=mode), spread=spread) for s in shapes),
        )
        for who in contenders
        for mode in ("inference", "training")
    ]
    return markdown(header, body) + "\n" + measured_on(machine) + "\n"


def layer_speed() -> str:
    """Every layer at every shape."""
    table, _ = suite("layer")
    return _layers(list(dict.fromkeys(shape(r) for r in table)), (*LAYERS, *OTHERS), spread=False)


def layer_spread() -> str:
    """The same for three shapes, with the slowest and the fastest round."""
    return _layers(["64, 64, 64, 4", "32, 257, 256, 8", "2, 2048, 512, 8"], LAYERS, spread=True)


def readme_speed() -> str:
    """The README's speed table."""
    shapes = ["64, 32, 32, 4", "32, 257, 256, 8", "16, 196, 768, 12", "2, 2048, 512, 8"]
    return _layers(shapes, ("efficient", "super", "standard", "expressive", "fused QKV on SDPA"), spread=False)


def _kernel(table: Sequence[Row], variant: str) -> list[tuple[str, ...]]:
    body = []
    for size in dict.fromkeys(shape(r) for r in table):
        here = only([r for r in table if shape(r) == size], variant=variant)
        cells = [
            times(one(here, contender=f"{score} auto", mode=mode))
            for score in ("softmax", "expressive")
            for mode in ("forward", "forward+backward")
        ]
        body.append((size, *cells))
    return body


KERNEL_HEADER = (
    "batch, tokens, width, heads",
    "softmax, forward",
    "softmax, forward and backward",
    "expressive, forward",
    "expressive, forward and backward",
)


def kernel_speed() -> str:
    """The function against F.scaled_dot_product_attention."""
    table, machine = suite("kernel")
    return markdown(KERNEL_HEADER, _kernel(table, "plain")) + "\n" + measured_on(machine) + "\n"


def kernel_causal() -> str:
    """The same with a causal mask."""
    table, machine = suite("kernel")
    return markdown(KERNEL_HEADER, _kernel(table, "causal")) + "\n" + measured_on(machine) + "\n"


def bfloat16_speed() -> str:
    """The same in bfloat16."""
    table, machine = suite("kernel", "bfloat16")
    return markdown(KERNEL_HEADER, _kernel(table, "plain")) + "\n" + measured_on(machine) + "\n"


def dropout_speed() -> str:
    """Training with dropout, with the memory of one call."""
    table, machine = suite("kernel-dropout")
    body = []
    for size in dict.fromkeys(shape(r) for r in table):
        here = only([r for r in table if shape(r) == size], variant="dropout", mode="forward+backward")
        ours = [one(here, contender=f"{score} auto") for score in ("softmax", "expressive")]
        memory = [f"{int(row['memory']) / 2**20:,.0f} MiB" for row in (one(here, contender="SDPA"), ours[0])]
        body.append((size, *map(times, ours), *memory))
    header = (KERNEL_HEADER[0], "softmax", "expressive", "memory of a call, SDPA", "ours, softmax")
    return markdown(header, body) + "\n" + measured_on(machine) + "\n"


def _over_caches(
    name: str,
    rows_are: str,
    wanted: dict[str, str],
    cell: Callable[[Row], str] = times,
    lengths: Sequence[str] = ("4096", "16384"),
) -> str:
    """Contenders of a suite, by the heads of their columns, over caches of each variant, batch and number of tokens."""
    table, machine = suite(name)
    body = [
        (
            f"{v.removeprefix('cache ')}, {b}, {int(n):,}",
            *(cell(one(table, variant=v, batch=b, length=n, contender=who)) for who in wanted),
        )
        for v in dict.fromkeys(r["variant"] for r in table)
        for b in ("1", "8")
        for n in lengths
    ]
    return markdown((rows_are, *wanted.values()), body) + "\n" + measured_on(machine) + "\n"


def _share(row: Row) -> str:
    """Of the best bandwidth at which the machine reads."""
    return f"{float(row['read_share']):.0%}".replace("%", " %")


def decode_speed() -> str:
    """One query over a cache."""
    wanted = {
        "SDPA, k is v": "SDPA, one tensor",
        "softmax auto": "softmax",
        "softmax auto, k is v": "softmax, one tensor",
        "expressive auto": "expressive",
        "expressive auto, k is v": "expressive, one tensor",
        "softmax int8": "softmax, int8",
        "softmax int8, k is v": "softmax, int8, one tensor",
    }
    return _over_caches("decode", "layout of the cache, batch, tokens", wanted)


def decode_grouped() -> str:
    """One query whose heads share keys and values by fours."""
    wanted = {"SDPA grouped": "SDPA", "softmax grouped": "softmax", "expressive grouped": "expressive"}
    return _over_caches("decode", "layout of the cache, batch, tokens", wanted)


def generation_grouped() -> str:
    """A step of a whole language model whose query heads share keys and values by fours."""
    wanted = {
        "standard through SDPA, grouped": "SDPA, grouped",
        "standard, grouped": "standard, grouped",
        "standard": "standard",
        "efficient": "efficient",
    }
    return _over_caches("generation", "positions, batch, tokens", wanted)


def decode_bandwidth() -> str:
    """The same as a share of what the machine reads at best."""
    wanted = {
        "SDPA": "SDPA",
        "SDPA, k is v": "SDPA, one tensor",
        "softmax auto": "softmax",
        "expressive auto": "expressive",
        "plain read": "plain read",
        "softmax auto, k is v": "softmax, one tensor",
        "expressive auto, k is v": "expressive, one tensor",
        "plain read, k is v": "plain read, one tensor",
    }
    return _over_caches("decode", "layout of the cache, batch, tokens", wanted, _share, ("16384",))


def generation_speed() -> str:
    """A step of a whole language model."""
    wanted = {
        "standard": "standard",
        "efficient": "efficient",
        "standard, int8 cache": "standard, int8",
        "efficient, int8 cache": "efficient, int8",
        "standard through SDPA, compiled": "SDPA, compiled",
        "efficient, compiled": "efficient, compiled",
        "efficient, int8 cache, compiled": "efficient, int8, compiled",
    }
    return _over_caches("generation", "positions, batch, tokens", wanted)


MODELS = {"imdb": "IMDB", "amazon": "Amazon", "mnist": "MNIST", "cifar100": "CIFAR100", "imagenet": "ImageNet"}


def model_speed() -> str:
    """Whole models against the same models on nn.MultiheadAttention."""
    table, machine = suite("model")
    body = [
        (f"{who}, {mode}", *(times(one(table, variant=model, contender=who, mode=mode)) for model in MODELS))
        for who in LAYERS
        for mode in ("inference", "training")
    ]
    return markdown(("model", *MODELS.values()), body) + "\n" + measured_on(machine) + "\n"


def edge_speed() -> str:
    """Seconds for 5,000 samples: how many rows a mechanism wins against standard, and its geometric mean."""
    table = rows(RESULTS / "edge" / "edge.csv")
    body = []
    for who in ("optimised", "efficient", "super", "expressive"):
        cells = []
        for precision in ("float32", "int8"):
            ratios = [float(r["to_standard_median"]) for r in only(table, mechanism=who, precision=precision)]
            faster = sum(ratio < 1.0 for ratio in ratios)
            cells += [f"{1 / statistics.geometric_mean(ratios):.2f}", f"{faster} of {len(ratios)}"]
        body.append((who, *cells))
    header = ("mechanism", "float32: times as fast", "faster in", "int8: times as fast", "faster in")
    return markdown(header, body)


# --- quality ----------------------------------------------------------------------------------------------------------

STUDIES = {
    "imdb": ("IMDB, the paper's setting", "test_accuracy", "points"),
    "mnist-flat": ("MNIST, the paper's model, until the loss is flat", "test_accuracy", "points"),
    "amazon": ("Amazon, 28,891 reviews", "test_accuracy", "points"),
    "images": ("Tiny-ImageNet, 100 classes, ten epochs", "test_accuracy", "points"),
    "images-equal-params": ("the same at equal parameters of the model", "test_accuracy", "points"),
    "translation": ("English to Spanish, small", "test_bleu", "BLEU"),
}


def _difference(row: Row, metric: str, *, p: bool = True) -> str:
    gain, half = float(row[f"{metric}_gain"]), float(row[f"{metric}_gain_interval"])
    text = f"{number(gain, 2, sign=True)} ± {half:.2f}"
    text += f", p {p_value(row[f'{metric}_p_holm'])}" if p else ""
    return text if row[f"{metric}_verdict"] == "no difference shown" else f"**{text}**"


def quality() -> str:
    """Mechanism minus standard on every study."""
    body = []
    for folder, (title, metric, unit) in STUDIES.items():
        table = only(rows(RESULTS / folder / "results.csv"), heads="4")
        standard = one(table, mechanism="standard", score="softmax")
        cells = []
        for who in ("optimised", "efficient", "super", "expressive"):
            found = only(table, mechanism=who)
            cells.append(_difference(found[0], metric) if found else "–")
        level = f"{float(standard[metric]):.1f}" + (" %" if unit == "points" else " BLEU")
        body.append((title, standard["seeds"], level, *cells))
    header = ("data", "seeds", "standard", "optimised", "efficient", "super", "expressive")
    return markdown(header, body)


def readme_quality() -> str:
    """The README's table of results: IMDB in the paper's setting, 4 heads."""
    table = only(rows(RESULTS / "imdb" / "results.csv"), heads="4")
    body = []
    for who in ("standard", "optimised", "efficient", "super", "expressive"):
        row = one(table, mechanism=who)
        paper = f"{float(row['test_accuracy_paper']):.2f}" if row["test_accuracy_paper"] else "–"
        accuracy = f"{float(row['test_accuracy']):.2f} ± {float(row['test_accuracy_interval']):.2f}"
        gain = "" if who == "standard" else _difference(row, "test_accuracy", p=False)
        verdict = row["test_accuracy_verdict"]
        body.append((who, f"{int(row['attention_params']):,}", accuracy, paper, gain, verdict))
    header = ("mechanism", "attention parameters", "test accuracy, %", "paper", "− standard, paired", "")
    return markdown(header, body)


def against_paper() -> str:
    """IMDB in the paper's setting, every number of heads, beside the paper's numbers."""
    table = rows(RESULTS / "imdb" / "results.csv")
    body = []
    for heads in ("1", "2", "4"):
        for who in ("standard", "optimised", "efficient", "super", "expressive"):
            row = one(table, heads=heads, mechanism=who)
            paper = f"{float(row['test_accuracy_paper']):.2f}" if row["test_accuracy_paper"] else "–"
            gain = "" if who == "standard" else _difference(row, "test_accuracy")
            accuracy = f"{float(row['test_accuracy']):.2f} ± {float(row['test_accuracy_interval']):.2f}"
            body.append((heads, who, f"{int(row['attention_params']):,}", accuracy, paper, gain))
    header = ("heads", "mechanism", "attention parameters", "test accuracy, %", "paper", "− standard")
    return markdown(header, body, right=2)


def alignment() -> str:
    """What W_A adds, on IMDB with 4 heads, against standard."""
    table = only(rows(RESULTS / "imdb" / "results.csv"), heads="4")
    names = (
        "efficient",
        "super",
        "super+identity",
        "super+per-head",
        "standard+align",
        "optimised+align",
        "super+expressive",
    )
    body = []
    for who in names:
        row = one(table, mechanism=who)
        body.append((f"`{who}`", f"{int(row['attention_params']):,}", _difference(row, "test_accuracy")))
    return markdown(("variant", "attention parameters", "test accuracy − standard"), body)


def conversion() -> str:
    """What conversion of trained models costs, three seeds each."""
    table = rows(RESULTS / "conversion" / "conversion.csv")
    names = {
        ("minilm", "12"): "MiniLM, 100 × Spearman on STS-B",
        ("imdb", "4"): "IMDB, %",
        ("mnist", "4"): "MNIST, 3 epochs on 9,000 pictures, %",
    }
    body = []
    for (task, heads), title in names.items():
        for who in ("optimised", "efficient", "super", "expressive"):
            here = only(table, task=task, heads=heads, mechanism=who)
            seeds = sorted({r["seed"] for r in here})
            value = {(r["stage"], r["seed"]): float(r["test"]) for r in here}
            before = statistics.fmean(value["before", s] for s in seeds)
            cells = []
            for stage in ("weights", "calibrated", "distilled"):
                gains = [value[stage, s] - value["before", s] for s in seeds if (stage, s) in value]
                cells.append(_mean(gains) if gains else "–")
            body.append((title, who, f"{before:.2f}", *cells))
    header = ("model", "mechanism", "before", "by the weights alone", "calibrated", "distilled")
    return markdown(header, body, right=2)


def _mean(values: Sequence[float]) -> str:
    """Mean and half width of the 95 % Student interval; the mean alone where all values are one."""
    if max(values) == min(values):
        return number(values[0], 2, sign=True)
    return estimate(values).format(2, sign=True)


def conversion_speed() -> str:
    """Converted MiniLM against MiniLM."""
    document = json.loads((RESULTS / "conversion" / "speed.json").read_text("utf-8"))
    body = []
    for row in document["rows"]:
        ratio = row["times_as_fast_same_runtime"]
        text = f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})"
        body.append((row["runtime"], row["model"], f"{row['parameters']:,}", text))
    header = ("runtime", "model", "parameters", "times as fast as the original in the same runtime")
    return markdown(header, body, right=2) + "\n" + measured_on(document["machine"]) + "\n"


POSITIONS = {
    "learned": "learned",
    "rotary": "rotary",
    "alibi-weight": "ALiBi on the weight",
    "alibi-score": "ALiBi in the score",
}


def recurrences() -> str:
    """Expressive minus softmax on delayed recurrences, per kind of positions."""
    document = json.loads((RESULTS / "recurrence-positions" / "summary.json").read_text("utf-8"))
    body = []
    for verdict in document["judged"]["main"]["verdicts"]:
        mean = verdict["difference"]["difference"]
        p = p_value(str(verdict["difference"]["corrected_p"]))
        text = f"{number(mean['mean'], 1, sign=True)} ± {mean['half_width']:.1f}"
        shown = "higher" if mean["mean"] > 0 else "lower"
        shown = shown if verdict["difference"]["corrected_p"] < 0.05 else "no difference shown"
        body.append((POSITIONS[verdict["scheme"]], text, p, shown))
    return markdown(("positions", "expressive − softmax, points", "p", ""), body)


# --- parameters -------------------------------------------------------------------------------------------------------


def parameters() -> str:
    """Parameters, operations and cache of one layer, by ba.cost."""
    body = []
    for name in ba.MECHANISMS:
        small, large = ba.cost(128, 4, 64, mechanism=name), ba.cost(768, 12, 196, mechanism=name)
        forward = ba.cost(768, 12, 196, mechanism=name, backward=False)
        body.append(
            (
                f"`{name}`",
                f"{small.params:,}",
                f"{large.params:,}",
                f"{forward.flops / 1e9:.2f}",
                f"{large.cache_bytes_per_token:,}",
            )
        )
    header = (
        "mechanism",
        "parameters, d 128, ℓ 64",
        "parameters, d 768, ℓ 196",
        "GFLOP forward, d 768, ℓ 196",
        "bytes of cache per token, d 768",
    )
    return markdown(header, body)


def grouped_caches() -> str:
    """Parameters and cache of one layer with fewer heads of keys and values, by ba.cost."""
    body = []
    for name in ("standard", "optimised", "efficient", "super"):
        groups = (12, 3, 1) if "k" in ba.MECHANISMS[name].projections else (12,)
        costs = [ba.cost(768, 12, 196, mechanism=name, num_kv_heads=heads) for heads in groups]
        texts = [f"{x.cache_bytes_per_token:,} ({x.params / 1e6:.2f} M)" for x in costs]
        body.append((f"`{name}`", *texts, *("–" for _ in range(3 - len(texts)))))
    header = ("bytes of cache per token (parameters)", "12 heads of keys", "3", "1")
    return markdown(header, body)


TABLES: dict[str, Callable[[], str]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        layer_speed,
        layer_spread,
        readme_speed,
        kernel_speed,
        kernel_causal,
        bfloat16_speed,
        dropout_speed,
        decode_speed,
        decode_bandwidth,
        decode_grouped,
        generation_speed,
        generation_grouped,
        model_speed,
        edge_speed,
        quality,
        readme_quality,
        against_paper,
        alignment,
        conversion,
        conversion_speed,
        recurrences,
        parameters,
        grouped_caches,
    )
}
"""Name in a page -> what makes the table."""


def renewed(text: str) -> str:
    """A page with every table made anew.

    Raises:
        KeyError: a table of an unknown name.
    """
    return PLACE.sub(lambda m: f"{m[1]}\n{TABLES[m['name']]()}\n{m[3]}", text)


def main(arguments: Sequence[str]) -> int:
    """Write the tables, or with ``--check`` name the pages that are out of date."""
    stale = []
    for page in pages():
        text = page.read_text("utf-8")
        if (new := renewed(text)) != text:
            stale.append(page.relative_to(ROOT).as_posix())
            if "--check" not in arguments:
                page.write_text(new, "utf-8")
    print("\n".join(stale) or "every table is up to date")
    return int(bool(stale) and "--check" in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
