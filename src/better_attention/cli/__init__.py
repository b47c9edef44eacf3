"""The command ``better-attention``: one file per verb, and what they share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from better_attention.cli.screen import make_console

if TYPE_CHECKING:
    from rich.console import Console


class UserError(ValueError):
    """An error that the user can correct in the command; printed as one message, exit status 2."""


def console(*, stderr: bool = False) -> Console:
    """Where a verb prints: colours and live display on a terminal, plain lines anywhere else.

    A pipe or a file has no width: tables are then as wide as they need to be, unless ``COLUMNS`` says otherwise.
    ``FORCE_COLOR`` colours them there too, without a live display. No text is interpreted as markup, and none can
    control the terminal, see :mod:`better_attention.cli.screen`. Of the processes of one launch, only the first prints.
    """
    return make_console(stderr=stderr)
