"""Runs brought together: a row a mechanism with means, intervals, tests and ranks, the paper's numbers beside them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from better_attention.lab import published
from better_attention.lab.analysis.departures import departures_of
from better_attention.lab.analysis.estimates import Estimate, estimate, ranks, ratio
from better_attention.lab.analysis.paired import (
    Comparison,
    compare_ordered,
    compare_paired,
    corrected,
    paired_difference,
)
from better_attention.lab.analysis.study import Record
from better_attention.lab.runs.record import times_as_fast
from better_attention.mechanism import MECHANISMS


@dataclass(frozen=True, slots=True)
class Column:
    """One number of a record as tables show it: its key, its title, the digits behind the point, which end is good."""

    key: str
    title: str
    digits: int
    higher_is_better: bool
    # "size": the same for every seed; "time" and "ratio": this machine's, a ratio has a geometric mean; "epochs": until
    # the validation accuracy reached a threshold, without the runs that never did.
    kind: str = "metric"

    @property
    def tested(self) -> bool:
        """Whether claims on the trained model may rest on it: figures of the test split alone."""
        return self.key.startswith("test_")

    @property
    def compared(self) -> bool:
        """Whether it is compared with standard: figures of the test split, and the speed of learning."""
        return self.tested or self.kind == "epochs"


EPOCHS_TO_THRESHOLD = Column("epochs_to_threshold", "Epochs to threshold", 1, higher_is_better=False, kind="epochs")
COLUMNS = (
    Column("attention_params", "Params", 0, higher_is_better=False, kind="size"),
    Column("total_params", "All params", 0, higher_is_better=False, kind="size"),
    Column("epoch_seconds", "s/epoch", 2, higher_is_better=False, kind="time"),
    Column("times_as_fast", "times as fast as nn.MHA", 2, higher_is_better=True, kind="ratio"),
    Column("tokens_per_second", "tokens/s, training", 0, higher_is_better=True, kind="time"),
    Column("decoded_per_second", "tokens/s, decoding", 0, higher_is_better=True, kind="time"),
    Column("cache_bytes_per_token", "Cache bytes/token", 0, higher_is_better=False, kind="size"),
    Column("train_bits_per_character", "Train bits/char.", 3, higher_is_better=False),
    Column("train_perplexity", "Train perplexity", 2, higher_is_better=False),
    Column("train_accuracy", "Train acc. %", 2, higher_is_better=True),
    Column("train_loss", "Train loss", 3, higher_is_better=False),
    Column("train_top5", "Train top 5 %", 2, higher_is_better=True),
    Column("train_bleu", "Train BLEU", 1, higher_is_better=True),
    Column("test_bits_per_character", "Test bits/char.", 3, higher_is_better=False),
    Column("test_perplexity", "Test perplexity", 2, higher_is_better=False),
    Column("test_accuracy", "Test acc. %", 2, higher_is_better=True),
    Column("test_loss", "Test loss", 3, higher_is_better=False),
    Column("test_top5", "Test top 5 %", 2, higher_is_better=True),
    Column("test_bleu", "Test BLEU", 1, higher_is_better=True),
    EPOCHS_TO_THRESHOLD,
    Column("seconds_to_threshold", "s to threshold", 1, higher_is_better=False, kind="time"),
)
"""What is shown, in the paper's order; a column that no row has a value for is left out."""

COSTS = (
    *("attention_params", "total_params", "epoch_seconds", "times_as_fast"),
    *("tokens_per_second", "decoded_per_second", "cache_bytes_per_token"),
)
"""Keys of the columns that say what a mechanism costs."""

MAIN = ("test_bits_per_character", "test_accuracy", "test_bleu")
"""Keys of the columns that say what a task is about, the most telling first."""

MACHINE = ("time", "ratio")
"""Kinds of column whose numbers are this machine's: not to be set against the paper's."""


@dataclass(frozen=True, slots=True)
class Row:
    """One mechanism at one number of heads, over its seeds.

    Args:
        task: name of the task.
        scale: ``smoke``, ``small`` or ``paper``.
        mechanism: name of the mechanism.
        score: ``softmax`` or ``expressive``.
        heads: number of heads.
        seeds: the seeds, in rising order.
        estimates: key of a column -> mean and interval; without the keys that every seed left empty.
        ranks: key of a column -> rank among the rows of the same task, scale and number of heads.
        gains: key of a column -> difference to standard attention, seed by seed; empty for standard itself.
        published: the paper's numbers for this task, mechanism and number of heads; None where it has none.
        tests: key of a column that is ``compared`` -> comparison with standard, its p corrected for all comparisons of
            that metric in the task: every other mechanism at every number of heads. Where a run never reached the
            threshold, epochs to it are compared by ranks: the mean over the others would be one over the fast ones.
            Empty for standard itself.
        departures: sentences on what sets these runs apart from the paper's, each once.
    """

    task: str
    scale: str
    mechanism: str
    score: str
    heads: int
    seeds: tuple[int, ...]
    estimates: Mapping[str, Estimate]
    ranks: Mapping[str, int]
    gains: Mapping[str, Estimate]
    published: published.Row | None = None
    tests: Mapping[str, Comparison] = field(default_factory=dict)
    departures: tuple[str, ...] = ()


def summarise(records: Iterable[Record], baseline: str = "standard") -> list[Row]:
    """One row a (task, scale, number of heads, mechanism): means, 95 % intervals, differences, tests and ranks.

    Ranks compare rows of equal task, scale and number of heads, as in the paper, and count as equal what is printed
    equal. Seconds have none: they also depend on the load of the machine; ``times_as_fast`` has, measured alternately
    with torch's layer.

    Args:
        records: one mapping a run, as in ``results.json``.
        baseline: the mechanism that ``gains`` are differences to, and ``tests`` comparisons with.

    Raises:
        ValueError: two records of one seed, or a record without a key it needs.
    """
    groups: dict[tuple[str, str, int], dict[str, list[Record]]] = {}
    for record in records:
        missing = [key for key in ("task", "scale", "mechanism", "heads", "seed") if key not in record]
        # Records may come from a file that somebody has edited.
        if missing:
            raise ValueError(f"a record lacks {', '.join(missing)}; it has {', '.join(map(repr, record))}.")
        group = (str(record["task"]), str(record["scale"]), _int(record["heads"]))
        groups.setdefault(group, {}).setdefault(str(record["mechanism"]), []).append(record)
    rows: list[Row] = []
    for (task, scale, heads), mechanisms in sorted(groups.items()):
        printed = {(row["mechanism"], row["heads"]): row for row in published.rows(_published(task, mechanisms))}
        every = [run for runs in mechanisms.values() for run in runs]
        # What any run was measured by counts as missing, and not as absent, where a run diverged.
        measured = [c.key for c in COLUMNS if c.kind == "metric" and any(run.get(c.key) is not None for run in every)]
        values = {
            name: _values(runs, measured, f"{task}, {name}, {heads} heads") for name, runs in _in_order(mechanisms)
        }
        estimates = {
            name: {key: _estimate(key, list(seeds.values())) for key, seeds in by_key.items()}
            for name, by_key in values.items()
        }
        places = _ranks(estimates, values)
        for name, by_key in values.items():
            both = (_epochs(mechanisms[name], every), _epochs(mechanisms.get(baseline, ()), every))
            rows.append(
                Row(
                    task=task,
                    scale=scale,
                    mechanism=name,
                    score=str(mechanisms[name][0].get("score") or "softmax"),
                    heads=heads,
                    seeds=tuple(sorted(_int(run["seed"]) for run in mechanisms[name])),
                    estimates=estimates[name],
                    ranks=places[name],
                    gains={} if name == baseline else _gains(by_key, values.get(baseline, {})),
                    published=printed.get((name, heads)),
                    tests={} if name == baseline else _tests(by_key, values.get(baseline, {}), *both),
                    departures=tuple(dict.fromkeys(one for run in mechanisms[name] for one in departures_of(run))),
                )
            )
    return _corrected(rows)


def _published(task: str, mechanisms: Mapping[str, Sequence[Record]]) -> str:
    """The paper's table for these runs: widened to equal parameters, they are table 7's or nobody's."""
    settings = next((run.get("settings") for runs in mechanisms.values() for run in runs), None)
    return f"{task}-equal-size" if isinstance(settings, Mapping) and settings.get("equal_params") else task


def _int(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"heads and seed of a record are whole numbers, received {value!r}.")
    return value


def _in_order(mechanisms: Mapping[str, list[Record]]) -> list[tuple[str, list[Record]]]:
    """The named mechanisms in the order of MECHANISMS, then the others in the order in which they came."""
    named = list(MECHANISMS)
    # sorted() is stable, so mechanisms of equal rank stay in their order.
    return sorted(mechanisms.items(), key=lambda item: named.index(item[0]) if item[0] in named else len(named))


def _values(runs: Sequence[Record], measured: Sequence[str], where: str) -> dict[str, dict[int, float]]:
    """Key of a column -> seed -> value, without what is None; NaN for what is ``measured``, of a run that diverged."""
    seeds = [_int(run["seed"]) for run in runs]
    if len(set(seeds)) < len(seeds):
        twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
        raise ValueError(f"{where}: more than one record of seed {twice[0]}. Hand over one record a run.")
    found: dict[str, dict[int, float]] = {}
    for run in runs:
        for column in COLUMNS:
            value = times_as_fast(run) if column.key == "times_as_fast" else run.get(column.key)
            if isinstance(value, int | float) and not isinstance(value, bool):
                found.setdefault(column.key, {})[_int(run["seed"])] = value
            elif value is not None:
                raise ValueError(f"{where}: {column.key} is a number or None, received {value!r}.")
            elif run.get("diverged") and column.key in measured:
                found.setdefault(column.key, {})[_int(run["seed"])] = math.nan
    return found


_Values = Mapping[str, Mapping[int, float]]
"""Key of a column -> seed -> value."""


def _estimate(key: str, values: Sequence[float]) -> Estimate:
    return ratio(values) if key in _RATIOS else estimate(values)


_RATIOS = frozenset(column.key for column in COLUMNS if column.kind == "ratio")


def _ranks(estimates: Mapping[str, Mapping[str, Estimate]], values: Mapping[str, _Values]) -> dict[str, dict[str, int]]:
    places: dict[str, dict[str, int]] = {name: {} for name in estimates}
    for column in COLUMNS:
        if column.kind == "time":  # of runs that may be days apart, on a machine that did other things besides
            continue
        means = [
            # Rounded as it is printed, so that what looks equal in the table shares a rank.
            round(by_key[column.key].mean, column.digits)
            if column.key in by_key and (column.kind != "epochs" or _complete(values[name], column))
            else None
            for name, by_key in estimates.items()
        ]
        for name, rank in zip(estimates, ranks(means, higher_is_better=column.higher_is_better), strict=True):
            if rank is not None:
                places[name][column.key] = rank
    return places


def _gains(ours: _Values, baseline: _Values) -> dict[str, Estimate]:
    pairs = {
        column.key: paired_difference(ours.get(column.key, {}), baseline.get(column.key, {}))
        for column in COLUMNS
        if column.kind == "metric"
    }
    return {key: pair for key, pair in pairs.items() if pair is not None}


def _tests(
    ours: _Values, baseline: _Values, epochs: Mapping[int, float], epochs_baseline: Mapping[int, float]
) -> dict[str, Comparison]:
    found = {
        column.key: compare_paired(ours.get(column.key, {}), baseline.get(column.key, {}))
        for column in COLUMNS
        if column.tested
    }
    found[EPOCHS_TO_THRESHOLD.key] = compare_ordered(epochs, epochs_baseline)
    return {key: one for key, one in found.items() if one is not None}


def _epochs(runs: Sequence[Record], every: Sequence[Record]) -> dict[int, float]:
    """Seed -> epochs to the threshold, infinity for a run that never got there; without those that nobody timed."""
    key = EPOCHS_TO_THRESHOLD.key
    if not any(key in run for run in every):
        return {}
    found = {}
    for run in runs:
        value = run.get(key)
        if isinstance(value, int | float):
            found[_int(run["seed"])] = float(value)
        elif key in run or run.get("diverged"):
            found[_int(run["seed"])] = math.inf
    return found


def _complete(values: _Values, column: Column) -> bool:
    """Whether every run has a value: without those that never reached a threshold, the others look fast."""
    return len(values.get(column.key, {})) == max(map(len, values.values()), default=0)


def _corrected(rows: Sequence[Row]) -> list[Row]:
    """The rows with their tests corrected: a family is all rows of a task and scale, in one metric."""
    tests: list[dict[str, Comparison]] = [dict(row.tests) for row in rows]
    families: dict[tuple[str, str, str], list[int]] = {}
    for place, row in enumerate(rows):
        for key in row.tests:
            families.setdefault((row.task, row.scale, key), []).append(place)
    for (_, _, key), places in families.items():
        for place, one in zip(places, corrected([tests[p][key] for p in places]), strict=True):
            tests[place][key] = one
    return [replace(row, tests=found) for row, found in zip(rows, tests, strict=True)]


def columns_of(rows: Sequence[Row]) -> list[Column]:
    """The columns that at least one row has a value for."""
    return [column for column in COLUMNS if any(column.key in row.estimates for row in rows)]


def by_importance(columns: Sequence[Column]) -> list[Column]:
    """The columns in the order of a reader's questions: results of the test split, costs, speed of learning, training.

    Of the test split, what the task is about comes first, see :data:`MAIN`.
    """

    def place(column: Column) -> int:
        if column.tested:
            return 0 if column.key in MAIN else 1
        return 2 if column.key in COSTS else 4 if column.kind == "metric" else 3

    return sorted(columns, key=place)


def compared_columns(rows: Sequence[Row]) -> list[Column]:
    """The columns in which at least one row is compared with standard."""
    return [column for column in COLUMNS if any(column.key in row.tests for row in rows)]


def against_paper(rows: Sequence[Row]) -> list[Column]:
    """The columns in which at least one row has a number of ours and one of the paper's, seconds left out."""
    return [
        column
        for column in columns_of(rows)
        if column.kind not in MACHINE
        and any(column.key in row.estimates and paper_value(row, column) is not None for row in rows)
    ]


def paper_value(row: Row, column: Column) -> float | None:
    """The paper's number for ``row``, or None."""
    value = row.published.get(column.key) if row.published else None
    return value if isinstance(value, int | float) else None
