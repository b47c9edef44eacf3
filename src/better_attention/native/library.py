"""The compiled CPU kernels' shared library: finding it, its instruction sets, and calls across its C interface.

The library knows neither torch nor Python; ``cpp/api.h`` is the whole interface, :mod:`.structs` its translation. It
is looked for and loaded at the first use, not at import.
"""

from __future__ import annotations

import ctypes
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from better_attention.call.torch_private import constant_while_compiling

from .structs import ABI, BEST_ISA, FUNCTIONS, ISAS, NO_MEMORY, OK

PATTERNS = ("*better_attention*.so", "*better_attention*.dylib", "*better_attention*.dll")

SWITCH = "BETTER_ATTENTION_NATIVE"
"""The environment variable that switches the kernels off, to compare with plain torch or to rule them out."""
ISA_SWITCH = "BETTER_ATTENTION_ISA"
"""The environment variable that names the instruction set to use. Results differ between sets in their last bits."""

# A plain global: the choice holds for every thread of the process that calls the kernels.
_forced = BEST_ISA


class _Library:
    """The loaded library, or why there is none."""

    def __init__(self) -> None:
        self.reason: str | None = None
        try:
            self._load()
        except _MissingError as missing:
            self.reason = str(missing)

    def _load(self) -> None:
        if not _switched_on():
            raise _MissingError(f"they are switched off by {SWITCH}={os.environ[SWITCH]}")
        file = _find()
        try:
            library = ctypes.CDLL(str(file))
            abi = _function(library, "ba_abi")()  # first: a library of another version may lack the others
            if abi != ABI:
                raise _MissingError(
                    f"{file.name} has interface {abi}, this version of better-attention needs {ABI}; {way_out()}"
                )
            self.calls = {name: _function(library, name) for name in FUNCTIONS}
            self.isas = self.calls["ba_isas"]()
        # ctypes raises OSError for a file that cannot be loaded, and AttributeError for a function that it lacks.
        except (OSError, AttributeError) as error:
            raise _MissingError(f"{file.name} could not be loaded: {error}; {way_out()}") from None


def _switched_on() -> bool:
    """What :data:`SWITCH` says.

    Raises:
        ValueError: neither yes nor no. A misspelt switch should not be ignored.
    """
    value = os.environ.get(SWITCH, "1")
    if value.lower() in ("1", "on", "true", "yes", ""):
        return True
    if value.lower() in ("0", "off", "false", "no"):
        return False
    raise ValueError(f"the environment variable {SWITCH} must be 1 or 0 (on or off), received {value!r}.")


class _MissingError(Exception):
    """There is no usable library."""


def _function(library: ctypes.CDLL, name: str) -> Callable[..., int]:
    function: Any = getattr(library, name)
    structure = FUNCTIONS[name]
    # Without declared types ctypes passes and returns C ints, which would cut 64-bit numbers.
    function.argtypes = [] if structure is None else [ctypes.POINTER(structure)]
    function.restype = ctypes.c_int64
    return function  # type: ignore[no-any-return]


def _find() -> Path:
    """The library's file: beside this one, or where an installer put the package's compiled part."""
    # An editable installation leaves the Python files in the checkout and puts compiled ones elsewhere on the path.
    package = sys.modules[__name__.partition(".")[0]]
    folders = [Path(__file__).parent, *(Path(folder) / "native" for folder in package.__path__)]
    for folder in folders:
        for pattern in PATTERNS:
            for file in sorted(folder.glob(pattern)):
                return file
    for folder in folders:
        note = folder / "missing.txt"
        if note.is_file():
            raise _MissingError(f"{note.read_text('utf-8').strip()}; {way_out()}")
    raise _MissingError(
        "no compiled kernels were installed with better-attention (a wheel for any platform, or no C++ compiler at "
        f"installation?); {way_out()}"
    )


def way_out() -> str:
    """How to install the kernels: from where the package came, past pip's cache, which may hold it without them."""
    try:
        text = metadata.distribution("better-attention").read_text("direct_url.json")
        record = json.loads(text or "{}")
        source, editable = record.get("url", "better-attention"), record.get("dir_info", {}).get("editable", False)
        if "vcs_info" in record:
            source = f"{record['vcs_info']['vcs']}+{source}@{record['vcs_info']['commit_id']}"
    except (metadata.PackageNotFoundError, OSError, ValueError, KeyError, AttributeError):
        source, editable = "better-attention", False
    # From an index, pip would choose a wheel again; the sdist has the sources of the kernels.
    built = ["--no-binary", source] if source == "better-attention" else []
    target = shlex.join([*built, *(["--editable"] if editable else []), source])
    return f"with a C++ compiler there: pip install --no-cache-dir --force-reinstall --no-deps {target}"


@cache
def _library() -> _Library:
    # A failure is remembered too, so that no later call looks for files again.
    return _Library()


@constant_while_compiling  # instead of tracing a search for files
def missing() -> str | None:
    """Why the compiled kernels cannot be used here at all, or None if they can."""
    return _library().reason


def instruction_sets() -> tuple[str, ...]:
    """The instruction sets that were built and that this processor has, fastest first; empty if :func:`missing`."""
    library = _library()
    if library.reason is not None:
        return ()
    # Bit i of the answer stands for instruction set i of api.h.
    return tuple(name for name, number in reversed(ISAS.items()) if library.isas >> number & 1)


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Use one instruction set while the context lasts, in this process.

    Args:
        name: one of :func:`instruction_sets`.

    Raises:
        ValueError: it is unknown, was not built, or the processor lacks it.
    """
    global _forced
    before, _forced = _forced, _number(name, "instruction_set")
    try:
        yield
    finally:
        _forced = before


def _number(name: str, source: str) -> int:
    here = instruction_sets()
    if name not in here:
        raise ValueError(f"{source} must be one of {', '.join(here) or '(none)'} here, received {name!r}.")
    return ISAS[name]


@cache
def _from_environment(name: str) -> int:
    return _number(name, f"the environment variable {ISA_SWITCH}")


def current_instruction_set() -> int:
    """The number of the instruction set to use: a context's, the environment's, or 0 for the best.

    Raises:
        ValueError: ``BETTER_ATTENTION_ISA`` names an unknown one, or one that does not run here.
    """
    # A context counts more than the environment: benchmarks compare sets within one process.
    if _forced != BEST_ISA:
        return _forced
    # Read at each call, so that a change takes effect; the check of a name is remembered.
    wanted = os.environ.get(ISA_SWITCH)
    return _from_environment(wanted) if wanted else BEST_ISA


def call(function: str, arguments: ctypes.Structure) -> None:
    """Call a function of ``api.h`` with its structure. The GIL is released meanwhile.

    Raises:
        MemoryError: a thread got no scratch memory.
        RuntimeError: there are no kernels here, as where a program exported with them is loaded without.
    """
    library = _library()
    if library.reason is not None:
        raise RuntimeError(
            f"this program calls better-attention's compiled CPU kernels, which are missing here: {library.reason}. "
            "Install them, or export the model with impl='auto', which takes torch's own operators."
        )
    status = library.calls[function](arguments)  # ctypes passes its address
    if status == NO_MEMORY:
        raise MemoryError("the compiled attention kernels got no scratch memory.")
    if status != OK:
        raise RuntimeError(f"{function} returned {status}.")  # a bug: the instruction set and the score were checked
