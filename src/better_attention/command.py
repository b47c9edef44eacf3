"""Whether this process is the command ``better-attention``, and Ctrl-C before and after the command's own code.

Both ``python -m better_attention`` and the installed script import the package, and torch with it, before any code of
the command runs: seconds in which Ctrl-C would end in a traceback from somewhere inside torch. Behind it Python clears
up what was imported. That takes a second where the machine is busy, and where it is cut short, libraries in C++ such as
Triton tell standard error what was left of them. So the process ends without it.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType


def is_command() -> bool:
    """Whether this process was started as the script ``better-attention`` or by ``python -m better_attention``."""
    program = sys.argv[0] if sys.argv else ""
    if program == "-m":  # what Python puts there until it has found the module
        given = sys.orig_argv
        return "better_attention" in given[given.index("-m") + 1 :][:1] if "-m" in given else False
    return Path(program).name.partition(".")[0] == "better-attention"


def quiet() -> None:
    """End the process without a traceback if Ctrl-C comes; in another program, change nothing."""
    if is_command() and _listens(signal.default_int_handler):
        signal.signal(signal.SIGINT, _end)
        atexit.register(_leave)  # before any other library registers something, hence called after all of them


def loud() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again, now that somebody catches it."""
    if _listens(_end):
        signal.signal(signal.SIGINT, signal.default_int_handler)


_status: int | None = None


def ending(status: int) -> None:
    """Leave soon, now that all is said and saved: nothing is cleared up, and Ctrl-C ends the process at once.

    Args:
        status: the process's exit status.
    """
    global _status
    if is_command() and _listens(signal.default_int_handler):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        _status = status


def _leave() -> None:
    """What other libraries do at the end of a process has been done; Python's own end would free every object."""
    if _status is not None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # nobody reads it any more, or it is closed
                stream.flush()
        os._exit(_status)


def _listens(handler: object) -> bool:
    main = threading.current_thread() is threading.main_thread()  # nobody else may set a handler
    return main and signal.getsignal(signal.SIGINT) is handler


def _end(number: int, frame: FrameType | None) -> None:
    # print() could meet a stream that the signal has interrupted in the middle of a write.
    os.write(2, b"better-attention: interrupted.\n")
    # The shell's convention for a process that a signal has ended.
    os._exit(128 + number)  # nothing has begun that would have to be put away


quiet()
