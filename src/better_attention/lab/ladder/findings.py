"""What a ladder shows: accuracy over (N, τ), the highest rung solved, and expressive against softmax, pair by pair."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median

from better_attention.lab.analysis.estimates import number
from better_attention.lab.analysis.paired import NOTHING, UNTESTED, Comparison, compare_paired, corrected
from better_attention.lab.ladder.grid import Rung, RungResult, Setting, best_settings, rung_words
from better_attention.text import plural


@dataclass(frozen=True, slots=True)
class Spot:
    """One mechanism on one rung, over its seeds.

    Args:
        setting: where these runs were; the one that is best on validation, in the tables of the best.
        accuracy: mean test accuracy in per cent; None where every run diverged.
        solved, runs: how many runs reached the target on validation, of how many.
        updates: the median of their updates to it; None where none did.
    """

    setting: Setting
    accuracy: float | None
    solved: int
    runs: int
    updates: float | None

    @property
    def is_solved(self) -> bool:
        """Whether more than half of the runs reached the target."""
        return 2 * self.solved > self.runs


def spots(rows: Iterable[RungResult]) -> dict[tuple[str, Rung], Spot]:
    """One spot a mechanism and rung; the rows of each are to be of one setting."""
    groups: dict[tuple[str, Rung], list[RungResult]] = {}
    for row in rows:
        groups.setdefault((row.mechanism, row.rung), []).append(row)
    found = {}
    for key, group in groups.items():
        accuracies = [row.test_accuracy for row in group if row.test_accuracy is not None]
        steps = [row.updates_to_target for row in group if row.updates_to_target is not None]
        mean = fmean(accuracies) if accuracies else None
        found[key] = Spot(group[0].setting, mean, len(steps), len(group), median(steps) if steps else None)
    return found


def at_best(rows: Sequence[RungResult]) -> list[RungResult]:
    """The rows of the setting that validation prefers, for each mechanism and rung."""
    best = best_settings(rows)
    return [row for row in rows if best[row.mechanism, row.rung] == row.setting]


def within(rows: Sequence[RungResult], budget: int) -> list[RungResult]:
    """The rows as if each rung and setting had a budget of operations: ``budget`` updates of its cheapest model.

    The learning rate is constant and the order of the samples does not depend on the limit: to stop a run earlier is
    the same as never to have gone on.
    """
    cheapest: dict[tuple[Rung, Setting], int] = {}
    for row in rows:
        place = row.rung, row.setting
        cheapest[place] = min(row.update_flops, cheapest.get(place, row.update_flops))

    def cut(row: RungResult) -> RungResult:
        spent = (row.updates_to_target or 0) * row.update_flops
        return row if spent <= budget * cheapest[row.rung, row.setting] else replace(row, updates_to_target=None)

    return [cut(row) for row in rows]


@dataclass(frozen=True, slots=True)
class Height:
    """How far up a mechanism got: the last of the rungs, in their order, that is solved, and how many are."""

    highest: Rung | None
    solved: int
    tried: int


def heights(rows: Sequence[RungResult], rungs: Sequence[Rung]) -> dict[str, Height]:
    """The height of every mechanism, at the setting that validation prefers on each rung."""
    found = spots(at_best(rows))
    names = dict.fromkeys(row.mechanism for row in rows)
    tried = {name: [rung for rung in rungs if (name, rung) in found] for name in names}
    solved = {name: [rung for rung in tried[name] if found[name, rung].is_solved] for name in names}
    return {
        name: Height(solved[name][-1] if solved[name] else None, len(solved[name]), len(tried[name])) for name in names
    }


@dataclass(frozen=True, slots=True)
class Duel:
    """Expressive minus softmax, everything else equal.

    Args:
        softmax, expressive: names of the two mechanisms.
        where: what the pairs are of: all rungs at the best setting of each, one rung of these, or one setting.
        accuracy: difference of the test accuracies in points; None where there is no pair. Without a p where a run
            diverged: those that got through say nothing of a mechanism as a whole.
        updates: difference of log2(updates to the target) over the pairs in which both reached it; None likewise.
        diverged: runs of either mechanism without an accuracy.
    """

    softmax: str
    expressive: str
    where: str
    accuracy: Comparison | None
    updates: Comparison | None
    diverged: int = 0

    @property
    def verdict(self) -> str:
        """``"higher"``, ``"lower"`` or that no difference is shown; that, too, where the interval includes zero."""
        found = self.accuracy
        if found is None or found.difference.half_width is None:
            return UNTESTED
        return NOTHING if found.shows and abs(found.difference.mean) <= found.difference.half_width else found.verdict

    @property
    def speed(self) -> str:
        """Updates of expressive over those of softmax, the geometric mean with its interval: ``1.41 [1.10, 1.80]``."""
        if self.updates is None:
            return "–"
        found = self.updates.difference
        ends = "–" if found.low is None or found.high is None else f"{_power(found.low)}, {_power(found.high)}"
        return f"{_power(found.mean)} [{ends}]"


def _power(exponent: float) -> str:
    return number(2.0**exponent, 2) if exponent < 20 else "> 1,000,000"


def duels(rows: Sequence[RungResult]) -> dict[str, list[Duel]]:
    """Every comparison of the two scores: ``"overall"``, ``"rungs"`` (both at the best settings) and ``"settings"``.

    A pair is two runs of one rung and one seed; they share data, order and, where they can, initial weights. The p of
    each of the three lists are corrected for the number of comparisons in it (Holm).
    """
    best = at_best(rows)
    twins = {(row.twin, row.mechanism) for row in rows if row.score == "expressive"}
    named = [pair for pair in dict.fromkeys((r.twin, r.mechanism) for r in rows) if pair in twins]
    overall = [_duel(best, *pair, "all rungs, each at its best setting") for pair in named]
    by_rung = [
        _duel([row for row in best if row.rung == rung], *pair, rung_words(rung))
        for pair in named
        for rung in dict.fromkeys(row.rung for row in rows)
    ]
    by_setting = [
        _duel([row for row in rows if row.setting == setting], *pair, setting.words)
        for pair in named
        for setting in dict.fromkeys(row.setting for row in rows)
    ]
    lists = {"overall": overall, "rungs": by_rung, "settings": by_setting}
    return {name: _corrected([duel for duel in found if duel.accuracy]) for name, found in lists.items()}


def _duel(rows: Sequence[RungResult], softmax: str, expressive: str, where: str) -> Duel:
    accuracy = _compared(rows, softmax, expressive, lambda row: row.test_accuracy)
    # Logarithms, so that halving the number of updates weighs as much as doubling it.
    updates = _compared(
        rows, softmax, expressive, lambda row: math.log2(row.updates_to_target) if row.updates_to_target else None
    )
    diverged = sum(row.mechanism in (softmax, expressive) and row.test_accuracy is None for row in rows)
    if accuracy is not None and diverged:
        accuracy = replace(accuracy, t_p=None, wilcoxon_p=None, effect=None)
    return Duel(softmax, expressive, where, accuracy, updates, diverged)


def _compared(
    rows: Sequence[RungResult], softmax: str, expressive: str, value: Callable[[RungResult], float | None]
) -> Comparison | None:
    """Expressive minus softmax over the pairs in which both have a value."""
    # compare_paired() matches by number; here a rung and a seed make a pair, so each of them gets a number.
    pairs = {pair: number for number, pair in enumerate(dict.fromkeys((row.rung, row.seed) for row in rows))}
    values: Mapping[str, dict[int, float]] = {softmax: {}, expressive: {}}
    for row in rows:
        found = value(row)
        if row.mechanism in values and found is not None:
            values[row.mechanism][pairs[row.rung, row.seed]] = found
    return compare_paired(values[expressive], values[softmax])


def _corrected(found: Sequence[Duel]) -> list[Duel]:
    tested = corrected([duel.accuracy for duel in found if duel.accuracy is not None])
    return [replace(duel, accuracy=one) for duel, one in zip(found, tested, strict=True)]


def sentence(duel: Duel) -> str:
    """One comparison in words."""
    found = duel.accuracy
    if found is None:
        return f"There is no pair of runs of {duel.expressive} and {duel.softmax}."
    points = found.difference.format(1, sign=True)
    pairs = f"{plural(found.difference.n, 'pair')} of runs"
    told = {"higher": "expressive predicts better", "lower": "softmax predicts better"}.get(duel.verdict, duel.verdict)
    lost = f", as {plural(duel.diverged, 'run')} diverged" if duel.diverged else ""
    return f"Test accuracy of {duel.expressive} against {duel.softmax}: {points} points over {pairs}; {told}{lost}."
