"""Which mechanism to use here, and how sure that is: the first thing on a report, in words and in numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import geometric_mean

from better_attention.lab.analysis.estimates import Estimate, number
from better_attention.lab.analysis.paired import LEVEL, NOTHING, UNTESTED, Comparison, p_text
from better_attention.lab.analysis.power import MOST, POWER, pairs_needed, spread
from better_attention.lab.analysis.study import Record
from better_attention.lab.analysis.summary import Column, Row
from better_attention.lab.runs.record import times_as_fast
from better_attention.lab.tasks.variant import Variant
from better_attention.mechanism import PROJECTIONS
from better_attention.text import plural

BASELINE = "standard"
UNITS = {
    "test_bits_per_character": "bits per character of the test text",
    "test_accuracy": "points of test accuracy",
    "test_bleu": "points of test BLEU",
}
"""Key of a column that advice may rest on -> the unit of its differences; the first one that there is decides."""


@dataclass(frozen=True, slots=True)
class Card:
    """One mechanism at a glance.

    Args:
        mechanism: its name.
        value: its result on the test split.
        params: parameters of one attention layer; None where they are not known.
        params_share: relative to those of standard; None likewise.
        speed: times as fast in training as standard; None where it was not measured.
        timings: how many measurements of it the speed is the mean of, of the one of which there are fewer.
        difference: to standard, seed by seed; None for standard itself, and where there is no pair.
        outcome: ``"better"``, ``"worse"``, that nothing shows or that nothing was tested; "" for standard itself.
        verdict: one sentence on that difference.
        needed: about how many seeds would decide a difference that is not shown, as text; "" where that is not known.
        about: what the mechanism computes, in a few words; "" for one that has no name of ours.
    """

    mechanism: str
    value: Estimate
    params: int | None
    params_share: float | None
    speed: float | None
    difference: Estimate | None
    outcome: str
    verdict: str
    needed: str = ""
    about: str = ""
    timings: int = 0


def advised_column(columns: Sequence[Column]) -> Column | None:
    """The column that advice rests on: the first of :data:`UNITS` that is there."""
    return next((column for key in UNITS for column in columns if column.key == key), None)


def advised_heads(rows: Sequence[Row], column: Column) -> int | None:
    """The number of heads that is advised on: that of most mechanisms, the greatest of several; None without rows."""
    counts = Counter(row.heads for row in rows if column.key in row.estimates)
    return max(counts, key=lambda heads: (counts[heads], heads), default=None)


def cards(rows: Sequence[Row], records: Sequence[Record], column: Column) -> list[Card]:
    """A card a mechanism, in the order of ``rows``.

    Args:
        rows: those of one number of heads.
        records: the runs, for their speeds.
        column: what it is about.
    """
    shared = [row for row in rows if column.key in row.estimates]
    base = next((row for row in shared if row.mechanism == BASELINE), None)
    found = []
    for row in shared:
        params, theirs = _params(row), _params(base)
        speed, timings = _speed(records, row, base)
        test = row.tests.get(column.key)
        found.append(
            Card(
                mechanism=row.mechanism,
                value=row.estimates[column.key],
                params=params,
                params_share=params / theirs if params is not None and theirs else None,
                speed=speed,
                timings=timings,
                difference=test.difference if test else None,
                outcome="" if row.mechanism == BASELINE else _outcome(test, column),
                verdict=_verdict(row, test, base),
                needed=_needed(test)[1] if test else "",
                about=described(row.mechanism),
            )
        )
    return found


def _outcome(test: Comparison | None, column: Column) -> str:
    if test is None or not test.shows:
        return test.verdict if test else UNTESTED
    return "better" if (test.verdict == "higher") == column.higher_is_better else "worse"


def _params(row: Row | None) -> int | None:
    found = row.estimates.get("attention_params") if row else None
    # Every seed has a model of the same size, so that the mean is a whole number.
    return int(found.mean) if found else None


def _speed(records: Sequence[Record], row: Row, base: Row | None) -> tuple[float | None, int]:
    """Both were measured alternately with the same model on torch's layer, which cancels; and how often, at least."""
    if base is None or row is base:
        return None, 0
    ours, theirs = (_speeds(records, name, row.heads) for name in (row.mechanism, BASELINE))
    if not (ours and theirs):
        return None, 0
    # Ratios are averaged as logarithms: twice and half as fast cancel.
    # A measurement is that of all seeds of a session, and stands with each of them.
    return geometric_mean(ours) / geometric_mean(theirs), min(len(set(ours)), len(set(theirs)))


def _speeds(records: Sequence[Record], mechanism: str, heads: int) -> list[float]:
    own = (run for run in records if (run.get("mechanism"), run.get("heads")) == (mechanism, heads))
    found = (times_as_fast(run) for run in own)
    return [float(value) for value in found if isinstance(value, int | float) and value > 0]


def _verdict(row: Row, test: Comparison | None, base: Row | None) -> str:
    """One sentence on what the comparison of ``row`` with standard shows, and what would show more."""
    if row.mechanism == BASELINE:
        return "What the others are compared with."
    if base is None or test is None:
        return "Cannot be compared: there are no runs of standard with the same seeds."
    difference, pairs = test.difference, plural(test.difference.n, "seed")
    if test.shows:
        return f"{test.verdict.capitalize()} than standard ({pairs}, {p_text(test.corrected_p)})."
    if difference.n == 1:
        return "Not tested: one seed tells nothing about chance."
    known, needed = _needed(test)
    if not known:
        return "Not tested: a run diverged, or all differences are equal."
    start = f"Cannot be told from standard with {pairs}"
    if not needed:
        return f"{start}: the means are equal."
    if needed == _TOO_MANY:
        return f"{start}, and {needed} would be needed to decide a difference of this size."
    return f"{start}; about {needed} would decide a difference of this size."


_TOO_MANY = f"more than {MOST:,}"


def _needed(test: Comparison) -> tuple[bool, str]:
    """Whether it can be said how many seeds would decide, and how many; nothing where no number would."""
    deviation = spread(test.difference)
    if test.shows or deviation is None or test.corrected_p is None:
        return False, ""
    if test.difference.mean == 0:
        return True, ""
    # The level of the strictest step of Holm's correction, which the smallest p value has to pass.
    needed = pairs_needed(test.difference.mean, deviation, LEVEL / max(test.family, 1))
    return True, _TOO_MANY if needed is None else f"{needed:,}"


def described(name: str) -> str:
    """What a mechanism computes, in a few words; "" where the name is not one of ours.

    >>> described("efficient"), described("super+identity")
    ('without W_K and W_V', 'without W_K and W_V; W_A mixes the values over positions, from the identity on')
    >>> described("expressive"), described("custom(q+align)")
    ('all four maps; keys weigh z²/(1 + z²) instead of exp z', '')
    """
    try:
        variant = Variant.of(name)
    except ValueError:
        return ""
    mechanism = variant.mechanism
    dropped = [f"W_{letter.upper()}" for letter in PROJECTIONS if letter not in mechanism.projections]
    listed = " and ".join([", ".join(dropped[:-1]), dropped[-1]] if dropped[1:] else dropped)
    parts = [f"without {listed}" if dropped else "all four maps"]
    if mechanism.aligned:
        one = "a W_A for each head" if variant.per_head else "W_A"
        parts.append(f"{one} mixes the values over positions{', from the identity on' * variant.identity}")
    if mechanism.score == "expressive":
        parts.append("keys weigh z²/(1 + z²) instead of exp z")
    return "; ".join(parts)


def answer(found: Sequence[Card], column: Column, heads: int) -> str:
    """Which mechanism to use, in a sentence or two.

    The best of those that are shown to be better than standard; without one, the mechanism of the fewest attention
    parameters among those of which no difference is shown, with the interval of its difference: what is not shown may
    still be there.
    """
    where = f"With {plural(heads, 'head')}"
    base = next((card for card in found if card.mechanism == BASELINE), None)
    if base is None or len(found) < 2:
        return f"{where}, nothing can be recommended: there is no comparison with standard."
    if all(card.outcome in ("", UNTESTED) for card in found):
        return f"{where}, nothing can be recommended: nothing was tested, which takes several finished runs of each."
    better = [card for card in found if card.outcome == "better"]
    if better:
        best = max if column.higher_is_better else min
        return f"{where}, {_better(best(better, key=lambda card: card.value.mean), column)}"
    equal = [card for card in found if card.outcome == NOTHING and (card.params_share or 1) < 1]
    if not equal:
        return f"{where}, stay with standard: nothing is shown to be better, and nothing smaller to be as good."
    least = min(equal, key=lambda card: card.params_share or 1)
    return (
        f"{where}, no mechanism is shown to be better than standard. {_capital(least.mechanism)} is the smallest of "
        f"which no difference is shown, {_size(least)}: {_reach(least, column)}."
    )


def _better(card: Card, column: Column) -> str:
    gain = card.difference.format(column.digits, sign=True) if card.difference else ""
    return f"use {card.mechanism}: {gain} {UNITS[column.key]} against standard, which is shown; {_size(card)}."


def _capital(name: str) -> str:
    return name[:1].upper() + name[1:]


def _size(card: Card) -> str:
    """What it costs beside standard."""
    parts = [] if card.params_share is None else [f"{number(100 * card.params_share, 0)} % of its attention parameters"]
    once = " (measured once)" if card.timings == 1 else ""
    parts += [] if card.speed is None else [f"{number(card.speed, 2)} times its speed in training{once}"]
    return f"with {' and '.join(parts)}" if parts else "at a cost that is not known"


def _reach(card: Card, column: Column) -> str:
    """Between what and what the difference lies."""
    difference, digits = card.difference, column.digits
    if difference is None or difference.low is None or difference.high is None:
        return "how much worse it may be is not known"
    low, high = (number(end, digits, sign=True) for end in (difference.low, difference.high))
    return (
        f"its difference lies between {low} and {high} {UNITS[column.key]} (95 % interval, "
        f"{plural(difference.n, 'seed')})"
    )


def about_seeds(family: int) -> str:
    """How the number of seeds that would decide was found, for the small print.

    Args:
        family: the number of comparisons that share a level.
    """
    level = f"{LEVEL:g}" if family <= 1 else f"{LEVEL:g}/{family} (the strictest step of Holm’s correction)"
    return (
        f"About that many seeds would decide: with them, a paired t-test at the level {level} shows a true difference "
        f"of the size and the spread seen here with a chance of {100 * POWER:.0f} %. Both come from these few seeds, "
        "so that the number is a guide and no promise."
    )
