"""The command ``better-attention``: one file a verb, and what they share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from better_attention.cli.screen import make_console

if TYPE_CHECKING:
    from rich.console import Console


class UserError(ValueError):
    """Something in the command that the user can put right; printed as one message, exit status 2."""


def console(*, stderr: bool = False) -> Console:
    """Where a verb prints: colours and live display on a terminal, plain lines anywhere else.

    A pipe or a file has no width: tables are then as wide as they need to be, unless ``COLUMNS`` says otherwise.
    ``FORCE_COLOR`` colours them there too, without a live display. No text is taken for markup, and none can act on the
    terminal, see :mod:`better_attention.cli.screen`. Of several processes of one launch, the first alone prints.
    """
    return make_console(stderr=stderr)
