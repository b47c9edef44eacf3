"""What an attention layer computes, as data.

A mechanism is a point on three independent axes: which linear maps are learned, whether the values
are mixed by the alignment kernel W_A, and how a query scores a key. Nothing in the library branches
on the name of a mechanism; everything follows from the row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from types import MappingProxyType
from typing import Any

from better_attention.errors import check_bool, check_choice
from better_attention.scores import DEFAULT_SCORE, score_names

PROJECTIONS = "qkvo"


@dataclass(frozen=True, slots=True)
class Mechanism:
    """One attention mechanism: ``softmax(Q W_Q (K W_K)^T / sqrt(d_k)) W_A (V W_V) W_O`` and its relatives.

    Args:
        projections: which of ``"q" "k" "v" "o"`` are learned linear maps. A missing one is the
            identity: head i then reads columns ``i*d_k ... (i+1)*d_k`` of the input itself.
        aligned: whether the values are multiplied from the left by the learned kernel W_A (s x s).
        score: a key of :data:`better_attention.scores.SCORES`: ``"softmax"``, weights ``exp(z) / sum exp(z)``, or
            ``"expressive"``, weights ``z^2/(1+z^2) / sum z^2/(1+z^2)``, of ``z = q.k * scale``. A score includes its
            normaliser.

    Raises:
        ValueError: an unknown projection or score.
        TypeError: an argument of the wrong kind.

    Source: arXiv 2403.01643, definitions 1-4 (projections, W_A); arXiv 2407.18601 (expressive score).

    >>> Mechanism(projections=frozenset("qo"), aligned=True, score="expressive").name
    'super+expressive'
    """

    projections: frozenset[str]
    aligned: bool = False
    score: str = DEFAULT_SCORE

    def __post_init__(self) -> None:
        if not isinstance(self.projections, Iterable):
            raise TypeError(
                f"projections must be a set of letters out of {list(PROJECTIONS)}, "
                f"received {self.projections!r} ({type(self.projections).__name__}). "
                'Write frozenset("qo"), for example.'
            )
        projections = frozenset(self.projections)
        unknown = [p for p in projections if not (isinstance(p, str) and len(p) == 1 and p in PROJECTIONS)]
        if unknown:
            raise ValueError(
                f"unknown projections {sorted(map(repr, unknown))}: "
                f'each must be one of {list(PROJECTIONS)}, as in frozenset("qo").'
            )
        check_bool(self.aligned, "aligned")
        check_choice(self.score, "score", score_names())
        # The dataclass is frozen. A set or a text of letters becomes the frozenset that equality and hashing need.
        object.__setattr__(self, "projections", projections)

    @classmethod
    def of(cls, value: str | Mechanism) -> Mechanism:
        """The mechanism that ``value`` names.

        Args:
            value: a mechanism (returned as it is), or a name: a key of ``MECHANISMS``, ``"optimized"``,
                or either followed by the name of another score, as in ``"+expressive"``, and/or by ``"+align"``.

        Raises:
            ValueError: an unknown name.
            TypeError: neither a name nor a mechanism.

        >>> Mechanism.of("efficient+expressive").score
        'expressive'
        """
        if isinstance(value, Mechanism):
            return value
        if not isinstance(value, str):
            raise TypeError(
                f"mechanism must be a name or a Mechanism, received {value!r} ({type(value).__name__}). "
                f"Names: {', '.join(MECHANISMS)}."
            )
        base, *suffixes = value.split("+")
        changes = _changes()
        # The base has to be a row of the table: the description of a custom mechanism does not lead back to it.
        if _SPELLINGS.get(base, base) not in MECHANISMS or not set(suffixes) <= set(changes):
            raise ValueError(
                f"unknown mechanism {value!r}. Choose one of {', '.join(MECHANISMS)}, optionally followed by "
                f"{' or '.join('+' + suffix for suffix in changes)}, as in 'efficient+expressive'."
            )
        mechanism = MECHANISMS[_SPELLINGS.get(base, base)]
        for suffix in suffixes:
            mechanism = replace(mechanism, **changes[suffix])
        return mechanism

    def layer_options(self, length: int, *, causal: bool = False) -> dict[str, Any]:
        """What a layer of this mechanism has to know of its sequences: keyword arguments of ``MultiheadAttention``.

        Args:
            length: longest sequence, in tokens.
            causal: whether a causal mask will be used.

        >>> Mechanism.of("super").layer_options(128, causal=True), Mechanism.of("efficient").layer_options(128)
        ({'max_len': 128, 'align_causal': True}, {})
        """
        return {"max_len": length, "align_causal": causal} if self.aligned else {}

    @property
    def name(self) -> str:
        """The shortest name that :meth:`of` turns back into this mechanism, or a description of it."""
        changes = _changes()
        # Without suffixes first: "super" is to be called so, and not "efficient+align".
        for aligned, scored in product(("", "align"), ("", *({self.score} & set(changes)))):
            # The score stands before "align", so that one mechanism always gets the same name.
            suffixes = [suffix for suffix in (scored, aligned) if suffix]
            change = {field: value for suffix in suffixes for field, value in changes[suffix].items()}
            for name, row in MECHANISMS.items():
                if replace(row, **change) == self:
                    return "+".join([name, *suffixes])
        parts = ["".join(p for p in PROJECTIONS if p in self.projections) or "none"]
        parts += ["align"] * self.aligned + [self.score] * (self.score != DEFAULT_SCORE)
        return f"custom({'+'.join(parts)})"


_SPELLINGS = {"optimized": "optimised"}


def _changes() -> dict[str, dict[str, Any]]:
    """What each suffix of a name changes. Built at each call, because scores can be registered."""
    scores = {score: {"score": score} for score in score_names() if score != DEFAULT_SCORE}
    return {**scores, "align": {"aligned": True}}


MECHANISMS: Mapping[str, Mechanism] = MappingProxyType(
    {
        "standard": Mechanism(frozenset("qkvo")),
        "optimised": Mechanism(frozenset("qko")),
        "efficient": Mechanism(frozenset("qo")),
        "super": Mechanism(frozenset("qo"), aligned=True),
        "expressive": Mechanism(frozenset("qkvo"), score="expressive"),
    }
)
"""The five named mechanisms, in the order in which every table lists them."""
