"""What reaches the terminal: everything that the command prints passes through here.

Names of files, labels and runs are untrusted text. A character in them that would act on a terminal (escape
sequences, control characters, marks that turn the direction of writing) is printed as its ``\\uXXXX`` escape, which
is also what JSON calls it. Nothing in them is interpreted as markup. Signs that the stream's encoding lacks are
spelled in ASCII, so that no number loses its minus.
"""

from __future__ import annotations

import os
import sys
import traceback
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO, cast

if TYPE_CHECKING:
    from rich.console import Console

SIGNS = {
    **{"−": "-", "–": "-", "—": "-", "±": "+/-", "×": "x", "÷": "/", "·": "*", "√": "sqrt", "°": " deg"},
    **{"≤": "<=", "≥": ">=", "≠": "!=", "≈": "~", "∞": "inf", "²": "^2", "³": "^3", "ᵀ": "^T", "ₖ": "_k"},
    **{"→": "->", "←": "<-", "▲": "^", "▼": "v", "⋯": "...", "…": "...", "✓": "yes", "✗": "no", "•": "*"},
    **{"ℓ": "l", "τ": "tau", "ε": "eps", "ρ": "rho", "θ": "theta", "µ": "u", "μ": "mu", "α": "alpha", "β": "beta"},
    **{"’": "'", "‘": "'", "“": '"', "”": '"', "«": '"', "»": '"'},
    **dict.fromkeys("─╌━═", "-"),
    **dict.fromkeys("│╎┃║", "|"),
    **dict.fromkeys("┌┐└┘├┤┬┴┼╭╮╯╰", "+"),
}
"""How signs are spelled where the encoding of the terminal lacks them."""
_VISIBLE_FORMATS = frozenset("\u200c\u200d\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u08e2")
"""Of the category Cf: joiners, without which some scripts and emoji cannot be written, and marks that are drawn."""


def harmless(text: str) -> str:
    r"""``text`` without a character that acts on a terminal; line ends and tabs stay.

    >>> harmless("a\x1b[31mb\rc\u202ed\ne")
    'a\\u001b[31mb\\u000dc\\u202ed\ne'
    """
    if text.isprintable():
        return text
    return "".join(_escape(char) if _acts(char) else char for char in text)


def spelled(text: str, encoding: str | None, signs: bool = True) -> str:
    r"""``text`` in the characters of an encoding: signs by :data:`SIGNS`, anything else that is lacking as an escape.

    >>> spelled("−0.5 ± 0.1 é", "ascii"), spelled("−0.5 ± 0.1 é", "latin-1"), spelled("−0.5", "ascii", signs=False)
    ('-0.5 +/- 0.1 \\u00e9', '-0.5 ± 0.1 é', '\\u22120.5')
    """
    encoding = encoding or "utf-8"
    if text.isascii() or _fits(text, encoding):
        return text
    table = SIGNS if signs else {}
    return "".join(char if _fits(char, encoding) else table.get(char) or _escape(char) for char in text)


def message(text: str) -> str:
    """A message whose further lines are indented: a line end in a name cannot begin a message of its own."""
    first, *more = text.split("\n")
    return "\n".join([first, *(line if line.startswith(" ") else f"  {line}" for line in more)])


def say(line: str) -> None:
    """Print a line about the progress of the command on standard error."""
    print(line, file=sys.stderr, flush=True)


class Guarded:
    """A text stream that writes through :func:`harmless` and :func:`spelled`; anything else is the stream's own.

    Args:
        inner: where the text goes.
        signs: whether signs that the encoding lacks are spelled by :data:`SIGNS`; JSON takes escapes instead.
    """

    def __init__(self, inner: TextIO, signs: bool = True) -> None:
        self.inner, self.signs = inner, signs

    def write(self, text: str) -> int:
        """Write ``text``."""
        self.inner.write(spelled(harmless(text), self.inner.encoding, self.signs))
        # The length of what was passed in, as callers expect, whatever was written in its place.
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@contextmanager
def guarded(*, json: bool) -> Iterator[None]:
    """Guard the process's output and error streams while the block runs, also for the traceback of an error."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast("TextIO", Guarded(stream, signs=not json)) for stream in map(unguarded, before))
    # An uncaught error is printed after the streams are themselves again, so the hook guards its own output.
    sys.excepthook = _show
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def unguarded(stream: TextIO) -> TextIO:
    """The stream itself, for callers whose text is harmless already and contains colours."""
    return stream.inner if isinstance(stream, Guarded) else stream


def make_console(*, stderr: bool) -> Console:
    """See :func:`better_attention.cli.console`."""
    from rich.console import Console
    from rich.segment import Segment
    from rich.table import Table
    from rich.text import Text

    class Screen(Console):
        """Prints no markup, and each text as :func:`harmless` and :func:`spelled` give it."""

        def print(self, *objects: Any, **options: Any) -> None:
            """See :class:`rich.console.Console`; texts change before their widths are measured."""
            super().print(*map(self.safe, objects), **options)

        def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
            """See :class:`rich.console.Console`; catches what is composed elsewhere, in a progress bar for example."""
            for segment in super().render(renderable, options):
                # Control segments are rich's own movements of the cursor.
                if not segment.control:
                    # The address of a link is written within an escape sequence, where it would not be checked.
                    style = segment.style.update_link(None) if segment.style and segment.style.link else segment.style
                    segment = Segment(self.safe_text(segment.text), style)
                yield segment

        def safe_text(self, text: str) -> str:
            return spelled(harmless(text), self.encoding)

        def safe(self, renderable: Any) -> Any:
            match renderable:
                case str():
                    return self.safe_text(renderable)
                case Text() if self.safe_text(renderable.plain) != renderable.plain:
                    # Character by character: an escape is longer than what it replaces, and styles belong to places.
                    pieces = renderable.divide(range(1, len(renderable)))
                    for piece in pieces:
                        piece.plain = self.safe_text(piece.plain)
                    whole = renderable.blank_copy()
                    for piece in pieces:
                        whole.append_text(piece)
                    return whole
                case Table():
                    renderable.title, renderable.caption = self.safe(renderable.title), self.safe(renderable.caption)
                    for column in renderable.columns:
                        column.header, column.footer = self.safe(column.header), self.safe(column.footer)
                        column._cells = list(map(self.safe, column._cells))
            return renderable

    stream = unguarded(sys.stderr if stderr else sys.stdout)
    terminal = stream.isatty()
    # FORCE_COLOR asks for colours in a file or a CI log; a cursor cannot be moved there.
    colours = terminal or os.environ.get("FORCE_COLOR", "0") not in ("", "0")
    wide = 200 if _fits("".join(SIGNS), stream.encoding or "utf-8") else 300  # spelled signs need more room
    return Screen(
        file=stream,
        force_terminal=terminal,
        color_system="auto" if terminal else "standard" if colours else None,
        force_interactive=None if terminal else False,
        # Names of files may hold brackets and colons, which rich would take for styles and emoji.
        markup=False,
        emoji=False,
        highlight=False,
        width=None if terminal or "COLUMNS" in os.environ else wide,
        # Of several processes only the first prints.
        quiet=os.environ.get("RANK", "0") != "0",
    )


def _acts(char: str) -> bool:
    if char in "\n\t":
        return False
    category = unicodedata.category(char)
    return category in ("Cc", "Cs", "Zl", "Zp") or (category == "Cf" and char not in _VISIBLE_FORMATS)


def _escape(char: str) -> str:
    code = ord(char)
    if code < 0x10000:
        return f"\\u{code:04x}"
    return f"\\u{0xD800 + (code - 0x10000 >> 10):04x}\\u{0xDC00 + (code & 0x3FF):04x}"  # JSON knows no longer one


def _fits(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def _show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    traceback.print_exception(kind, error, trace, file=cast("TextIO", Guarded(unguarded(sys.stderr))))
