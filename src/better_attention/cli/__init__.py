"""The command ``better-attention``: one file a verb, and what they share."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


class UserError(ValueError):
    """Something in the command that the user can put right; printed as one message, exit status 2."""


def console(*, stderr: bool = False) -> Console:
    """Where a verb prints: colours and live display on a terminal, plain lines anywhere else.

    A pipe or a file has no width: tables are then as wide as they need to be, unless ``COLUMNS`` says otherwise.
    Of several processes of one launch, the first alone prints.
    """
    from rich.console import Console

    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    width = None if terminal or "COLUMNS" in os.environ else 200
    return Console(stderr=stderr, highlight=False, width=width, quiet=os.environ.get("RANK", "0") != "0")
