"""Several processes of one launch, recognised by the environment that ``torchrun`` or ``accelerate launch`` set."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path

# torchrun and accelerate set the first, MPICH, Open MPI and MVAPICH2 one of the others.
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


class PeerLostError(RuntimeError):
    """Another process of the launch has ended, so this one cannot continue."""


def launched(environment: Mapping[str, str] = os.environ) -> int:
    """Number of processes that were started together, this one included."""
    return max(count_in(environment.get(name)) for name in _SIZES)


def check_launch(environment: Mapping[str, str] = os.environ) -> None:
    """Refuse an environment that says this is one of several processes, but not how they find each other.

    Raises:
        ValueError: names the variable.
    """
    size, rank = environment.get("WORLD_SIZE"), environment.get("RANK")
    several = count_in(size) > 1
    if not several and rank in (None, "", "0"):
        return
    way_out = (
        f"`{torchrun(max(2, count_in(size)), environment)} ...` sets all of them; for one process unset RANK and "
        "WORLD_SIZE."
    )
    if not several:
        raise ValueError(f"RANK is {rank!r}, but WORLD_SIZE is {size or 'not set'}: expected more than one. {way_out}")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not environment.get(name):
            raise ValueError(f"WORLD_SIZE is {size}, but {name} is not set. {way_out}")
    for name, most in (("RANK", count_in(size) - 1), ("MASTER_PORT", 65535)):
        value = environment[name]
        if not (value.isascii() and value.isdigit() and int(value) <= most):
            raise ValueError(
                f"{name} must be a number from 0 to {most} with WORLD_SIZE={size}, received {value!r}. {way_out}"
            )


def in_words(processes: int) -> str:
    """A number of processes: ``1 process``, ``2 processes``."""
    return f"{processes} process{'' if processes == 1 else 'es'}"


def command_line(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> str:
    """The command with these arguments as it could be typed again, with as many processes."""
    if (processes := launched(environment)) == 1:
        return shlex.join(["better-attention", *arguments])
    return f"{torchrun(processes, environment)} {shlex.join(arguments)}"


def torchrun(processes: int, environment: Mapping[str, str] = os.environ) -> str:
    """The beginning of the command line that starts this many processes.

    >>> torchrun(1, {}), torchrun(2, {})
    ('better-attention', 'torchrun --nproc_per_node 2 -m better_attention')
    >>> torchrun(8, {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"})
    'torchrun --nnodes 2 --nproc_per_node 4 --rdzv_backend c10d --rdzv_endpoint HOST:PORT -m better_attention'
    """
    if processes == 1:
        return "better-attention"
    here = count_in(environment.get("LOCAL_WORLD_SIZE", str(processes)))
    if processes % here or launched(environment) in (1, here):  # of one machine, or of another launch than this one
        return f"torchrun --nproc_per_node {processes} -m better_attention"
    nodes = f"--nnodes {processes // here} --nproc_per_node {here} --rdzv_backend c10d --rdzv_endpoint HOST:PORT"
    return f"torchrun {nodes} -m better_attention"


def first_to_say(message: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether no other process of this launch, on this machine, has said the same before.

    ``torchrun`` has a folder for the errors of its processes, which all of them know: what was said is noted there.
    """
    if launched(environment) == 1 or not (errors := environment.get("TORCHELASTIC_ERROR_FILE")):
        return True
    # The error file of a process is .../attempt_N/RANK/error.json; the folder two levels up is common to all ranks.
    note = Path(errors).parent.parent / f"said-{sha256(message.encode('utf-8', 'replace')).hexdigest()[:32]}"
    # The file is created exclusively, so of several processes exactly one succeeds.
    try:
        note.touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        # Saying it twice is better than not saying it at all.
        return True
    return True


def is_first(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is the first of its launch, which alone writes and prints."""
    return environment.get("RANK", "0") == "0"


def count_in(text: str | None) -> int:
    """The number in an environment variable; 1 where it holds no positive number."""
    # isdigit() alone accepts characters such as a superscript two, which int() refuses.
    return int(text) if text and text.isascii() and text.isdigit() and int(text) > 0 else 1
