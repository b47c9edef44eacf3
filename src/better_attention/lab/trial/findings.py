"""What the trial shows: pairs of the two scores per kind of positions, and the rules of decision applied to them.

The rules were written down before the first run, in ``results/recurrence-positions/README.md``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from better_attention.lab.analysis.estimates import Estimate, Ratio, estimate, ratio
from better_attention.lab.analysis.paired import Comparison, compare_paired, corrected
from better_attention.lab.ladder.grid import Rung

from .grid import EXPRESSIVE, SCHEMES, SOFTMAX
from .stages import Row

MARGIN = 1.0
"""Points by which expressive may lie behind and still be "at least as good" (E2)."""
Place = tuple[str, Rung, int]
"""Size, rung, seed."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two runs that differ in the score, each at the setting that was chosen for it."""

    softmax: Row
    expressive: Row

    @property
    def place(self) -> Place:
        """Where both were run."""
        cell = self.expressive.cell
        return cell.size, cell.rung, cell.seed

    @property
    def difference(self) -> float:
        """Expressive minus softmax, points of test accuracy; NaN where one diverged."""
        both = self.expressive.outcome.test_accuracy, self.softmax.outcome.test_accuracy
        return math.nan if both[0] is None or both[1] is None else both[0] - both[1]


def final(rows: Iterable[Row], stages: Sequence[str]) -> list[Row]:
    """The rows of ``stages``, of each contestant, size, rung and seed that of the last stage that has it."""
    kept: dict[object, Row] = {}
    for row in sorted((r for r in rows if r.cell.stage in stages), key=lambda r: stages.index(r.cell.stage)):
        c = row.cell
        kept[c.size, c.rung, c.seed, c.mechanism, c.positions] = row
    return list(kept.values())


def judged(rows: Sequence[Row], seeds: int) -> list[Row]:
    """The rows of sizes that are through: of which every contestant has ``seeds`` seeds on every rung it began."""
    counts: dict[tuple[object, ...], int] = {}
    for row in rows:
        c = row.cell
        key = c.size, c.rung, c.mechanism, c.positions
        counts[key] = counts.get(key, 0) + 1
    begun = {size for (size, *_), seen in counts.items() if seen < seeds}
    return [row for row in rows if row.cell.size not in begun]


def pairs(rows: Iterable[Row], scheme: str) -> list[Pair]:
    """The pairs of a kind of positions. Where one of two was trained longer than the other, there is no pair."""
    found: dict[tuple[str, str], dict[Place, Row]] = {}
    for row in rows:
        c = row.cell
        found.setdefault((c.mechanism, c.positions), {})[c.size, c.rung, c.seed] = row
    softmax, expressive = found.get((SOFTMAX, SCHEMES[scheme]), {}), found.get((EXPRESSIVE, scheme), {})
    both = [place for place in expressive if place in softmax]
    made = [Pair(softmax[place], expressive[place]) for place in both]
    return [pair for pair in made if pair.softmax.cell.updates == pair.expressive.cell.updates]


@dataclass(frozen=True, slots=True)
class Verdict:
    """A kind of positions judged.

    Args:
        scheme: the kind.
        difference: expressive minus softmax over all pairs; None without pairs.
        slope: of the difference over log2 of the number of states, over sizes and seeds; None where fewer than three
            rungs have pairs.
        weakly, reverse: (size, rung) that expressive alone solves, and that softmax alone solves.
        strongly: those of ``weakly`` that softmax solves with none of its kinds of positions.
        time: seconds per update, expressive over softmax.
    """

    scheme: str
    difference: Comparison | None
    slope: Estimate | None
    weakly: tuple[tuple[str, Rung], ...]
    reverse: tuple[tuple[str, Rung], ...]
    strongly: tuple[tuple[str, Rung], ...]
    time: Ratio | None

    @property
    def at_least_as_good(self) -> str:
        """E2 in words."""
        found = self.difference
        if found is None or found.difference.low is None or found.difference.high is None:
            return "not tested"
        if found.difference.low > -MARGIN:
            return "holds, ahead" if found.verdict == "higher" else "holds"
        return "does not hold" if found.difference.high < -MARGIN else "not decided"

    @property
    def grows(self) -> str:
        """E3 in words."""
        if self.slope is None or self.slope.low is None or self.slope.high is None:
            return "not tested"
        return "holds" if self.slope.low > 0 else "does not hold" if self.slope.high < 0 else "not decided"

    @property
    def alone(self) -> str:
        """E5 in words."""
        if self.difference is None:
            return "not tested"
        return "holds strongly" if self.strongly else "holds weakly" if self.weakly else "does not hold"


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """Every kind of positions judged on these rows; their p are corrected together."""
    solving = solved(rows)
    found = [_verdict(scheme, pairs(rows, scheme), solving) for scheme in SCHEMES]
    tested = corrected([one.difference for one in found if one.difference is not None])
    waiting = iter(tested)
    return [replace(one, difference=next(waiting)) if one.difference is not None else one for one in found]


def _verdict(scheme: str, made: Sequence[Pair], solving: Mapping[tuple[str, str], set[tuple[str, Rung]]]) -> Verdict:
    numbers = dict(enumerate(pair.difference for pair in made))
    where = {(pair.place[0], pair.place[1]) for pair in made}
    ours = solving.get((EXPRESSIVE, scheme), set()) & where
    theirs = solving.get((SOFTMAX, SCHEMES[scheme]), set()) & where
    anywhere = set().union(*(of for (mechanism, _), of in solving.items() if mechanism == SOFTMAX))
    times = [_pace(pair.expressive) / _pace(pair.softmax) for pair in made]
    return Verdict(
        scheme,
        compare_paired(numbers, dict.fromkeys(numbers, 0.0)),
        slope(made),
        tuple(sorted(ours - theirs)),
        tuple(sorted(theirs - ours)),
        tuple(sorted(ours - anywhere)),
        ratio(times) if times else None,
    )


def _pace(row: Row) -> float:
    return row.outcome.seconds / row.outcome.updates


def slope(made: Sequence[Pair]) -> Estimate | None:
    """Points per doubling of the number of states: a least-squares slope for every size and seed, their mean."""
    lines: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for pair in made:
        size, (modulus, delay), seed = pair.place
        if math.isfinite(pair.difference):
            lines.setdefault((size, seed), []).append((delay * math.log2(modulus), pair.difference))
    slopes = [_least_squares(points) for points in lines.values() if len({x for x, _ in points}) > 2]
    return estimate(slopes) if slopes else None


def _least_squares(points: Sequence[tuple[float, float]]) -> float:
    x_mean, y_mean = fmean(x for x, _ in points), fmean(y for _, y in points)
    return sum((x - x_mean) * (y - y_mean) for x, y in points) / sum((x - x_mean) ** 2 for x, _ in points)


def solved(rows: Iterable[Row]) -> dict[tuple[str, str], set[tuple[str, Rung]]]:
    """Contestant -> the (size, rung) that more than half of its seeds solve."""
    runs: dict[tuple[str, str], dict[tuple[str, Rung], list[bool]]] = {}
    for row in rows:
        c = row.cell
        of = runs.setdefault((c.mechanism, c.positions), {})
        of.setdefault((c.size, c.rung), []).append(row.outcome.solved_at is not None)
    return {who: {place for place, found in of.items() if 2 * sum(found) > len(found)} for who, of in runs.items()}
