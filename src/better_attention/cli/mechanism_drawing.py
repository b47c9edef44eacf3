"""A mechanism drawn in text as in figure 1 of arXiv 2403.01643, and its equations; both follow from its data alone."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from better_attention.layer.part import Part
from better_attention.layer.parts import PARTS, parts_of
from better_attention.mechanism import Mechanism
from better_attention.scores import DEFAULT_SCORE, SCORES

_HALF = 7  # half the width of a block
_Q, _K, _V = 8, 26, 44  # columns of the three inputs
_S = (_Q + _K) // 2  # column of the scores
_O = (_S + _V) // 2  # column of the output

_PAPER = {"standard": (1, 1), "optimised": (2, 8), "efficient": (3, 13), "super": (4, 19)}
"""Name -> number of the paper's definition and of its first equation."""


@dataclass(slots=True)
class _Canvas:
    """Text at (row, column)."""

    cells: dict[tuple[int, int], str] = field(default_factory=dict)

    def write(self, row: int, column: int, text: str) -> None:
        """Centre ``text`` on ``column``."""
        for place, character in enumerate(text, start=column - len(text) // 2):
            self.cells[row, place] = character

    def block(self, row: int, column: int, label: str, *, learned: bool = True, inputs: tuple[int, ...] = (0,)) -> None:
        """A block three rows high, its output above its middle, its inputs below; dashed where nothing is learned."""
        line, side = ("─", "│") if learned else ("╌", "╎")
        self.write(row, column, f"┌{line * (2 * _HALF - 1)}┐")
        self.write(row + 1, column, f"{side}{label:^{2 * _HALF - 1}}{side}")
        self.write(row + 2, column, f"└{line * (2 * _HALF - 1)}┘")
        self.write(row, column, "┴")
        for offset in inputs:
            self.write(row + 2, column + offset, "▲")

    def bend(self, row: int, below: int, above: int) -> None:
        """A line that enters at ``below`` and leaves at ``above``."""
        low, high = sorted((below, above))
        for column in range(low + 1, high):
            self.write(row, column, "─")
        self.write(row, below, "┌" if below < above else "┐")
        self.write(row, above, "┘" if below < above else "└")

    def lines(self) -> list[str]:
        """The rows, without blanks at their ends."""
        height = 1 + max(row for row, _ in self.cells)
        width = 1 + max(column for _, column in self.cells)
        return ["".join(self.cells.get((r, c), " ") for c in range(width)).rstrip() for r in range(height)]


def draw(mechanism: Mechanism) -> list[str]:
    """``mechanism`` as a flow chart, inputs at the bottom, line by line.

    >>> print("\\n".join(draw(Mechanism.of("efficient"))[-5:]))
     ┌──────┴──────┐   ┌╌╌╌╌╌╌┴╌╌╌╌╌╌┐   ┌╌╌╌╌╌╌┴╌╌╌╌╌╌┐
     │ Linear  W_Q │   ╎    Slice    ╎   ╎    Slice    ╎
     └──────▲──────┘   └╌╌╌╌╌╌▲╌╌╌╌╌╌┘   └╌╌╌╌╌╌▲╌╌╌╌╌╌┘
            │                 │                 │
            Q                 K                 V
    """
    canvas, row = _Canvas(), 0
    canvas.write(row, _O, "output")
    canvas.write(row + 1, _O, "▲")
    row += 2
    for label in [*(part.label for part in parts_of(mechanism) if part.stream == "o"), "Concat"]:
        canvas.block(row, _O, label)
        row += 3
    canvas.write(row - 2, _O + _HALF + 6, "h heads")
    canvas.block(row, _O, "MatMul", inputs=(-4, 4))
    canvas.bend(row + 3, _S, _O - 4)
    canvas.bend(row + 3, _V, _O + 4)
    row += 4
    first = row
    for label in (SCORES[mechanism.score].label, "Scale 1/√dₖ"):
        canvas.block(row, _S, label)
        row += 3
    canvas.block(row, _S, "MatMul", inputs=(-4, 4))
    canvas.bend(row + 3, _Q, _S - 4)
    canvas.bend(row + 3, _K, _S + 4)
    for line in range(first, row + 4):
        canvas.write(line, _V, "│")
    row += 4
    for column, stream in ((_Q, "q"), (_K, "k"), (_V, "v")):
        for level, part in enumerate(part for part in PARTS if part.stream == stream):
            if part.is_in(mechanism) or part.absent:
                _draw_part(canvas, row - 4 * level, column, part, learned=part.is_in(mechanism))
        canvas.write(row + 3, column, "│")
        canvas.write(row + 4, column, stream.upper())
    return canvas.lines()


def _draw_part(canvas: _Canvas, row: int, column: int, part: Part, *, learned: bool) -> None:
    canvas.block(row, column, part.label if learned else part.absent.capitalize(), learned=learned)


def equations(mechanism: Mechanism) -> list[str]:
    """The equations of one layer, biases left out, with the paper's numbers where the paper has the mechanism.

    >>> for line in equations(Mechanism.of("efficient")):
    ...     print(line)
    O = (H_1 H_2 ⋯ H_h) W^O                  (13)
    H_i = S_i V_i                            (14)
    S_i = softmax(Q'_i K_iᵀ / √d_k)          (15)
    Q'_i = Q W_i^Q                           (16)
    V_i = columns (i-1)·d_k+1 … i·d_k of V
    K_i = columns (i-1)·d_k+1 … i·d_k of K
    """
    terms = {stream: _term(mechanism, stream) for stream in "vkq"}
    learned = [stream for stream, term in terms.items() if term != f"{stream.upper()}_i"]
    names = {stream: f"{stream.upper()}'_i" if stream in learned else f"{stream.upper()}_i" for stream in terms}
    z = f"{names['q']} {names['k']}ᵀ / √d_k"
    numbered = [
        f"O = {_term(mechanism, 'o')}",
        f"H_i = S_i {names['v']}",
        *(equation.format(z=z) for equation in SCORES[mechanism.score].equations),
        *(f"{names[stream]} = {terms[stream]}" for stream in learned),
    ]
    sliced = [stream.upper() for stream in terms if stream not in mechanism.projections]
    slices = [f"{name}_i = columns (i-1)·d_k+1 … i·d_k of {name}" for name in sliced]
    if mechanism.name not in _PAPER:
        return numbered + slices
    first = _PAPER[mechanism.name][1]
    return [f"{line:<40} ({first + place})" for place, line in enumerate(numbered)] + slices


def _term(mechanism: Mechanism, stream: str) -> str:
    """What becomes of an input, or of the joined heads ("o"), in head i: its product with every part on its way."""
    sliced = stream != "o" and stream not in mechanism.projections
    term = "(H_1 H_2 ⋯ H_h)" if stream == "o" else f"{stream.upper()}_i" if sliced else stream.upper()
    for part in parts_of(mechanism):
        if part.stream == stream:
            term = part.term(term)
    return term


def legend(mechanism: Mechanism) -> list[str]:
    """What the blocks of :func:`draw` stand for, those that occur in ``mechanism``.

    >>> legend(Mechanism.of("standard"))
    ['Linear: a learned map with a bias, from the right.']
    """
    lines = list(dict.fromkeys(part.legend for part in parts_of(mechanism)))
    if not mechanism.projections >= frozenset("qkv"):
        lines.append("Slice: head i takes its columns of the input itself; nothing is learned.")
    return lines


def source(mechanism: Mechanism) -> str:
    """Where the papers define ``mechanism``.

    >>> source(Mechanism.of("super")), source(Mechanism.of("super+expressive"))
    ('arXiv 2403.01643, definition 4', 'our combination; the score of arXiv 2407.18601')
    """
    if mechanism.name in _PAPER:
        return f"arXiv 2403.01643, definition {_PAPER[mechanism.name][0]}"
    score = "" if mechanism.score == DEFAULT_SCORE else f"the score of {SCORES[mechanism.score].source}"
    if mechanism == replace(Mechanism.of("standard"), score=mechanism.score):
        return f"arXiv 2403.01643, definition 1, with {score}"
    return "; ".join(["our combination", score] if score else ["our combination"])
