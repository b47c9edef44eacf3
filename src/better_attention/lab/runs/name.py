"""The name of a run, ``MECHANISM-hHEADS-sSEED``: built and parsed here and nowhere else."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

# DOTALL, because names also come from files, where they may hold line breaks.
_FORM = re.compile(r"(.+)-h(\d{1,9})-s(\d{1,9})", flags=re.DOTALL)
_FOLDER = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True, slots=True)
class RunName:
    """The name of a run.

    Args:
        mechanism: name of the mechanism, ``+`` included; of a name that has another form, the whole name.
        heads, seed: None for a name that has another form.

    >>> RunName.of("super+expressive-h4-s0")
    RunName(mechanism='super+expressive', heads=4, seed=0)
    >>> str(_), _.folder
    ('super+expressive-h4-s0', 'super.expressive-h4-s0')
    """

    mechanism: str
    heads: int | None
    seed: int | None

    @classmethod
    def of(cls, name: str) -> RunName:
        """Parse ``name``. A name of another form counts as the mechanism; heads and seed are then unknown."""
        match = _FORM.fullmatch(name)
        return cls(match[1], int(match[2]), int(match[3])) if match else cls(name, None, None)

    @classmethod
    def of_record(cls, record: Mapping[str, object]) -> RunName:
        """The name of the run that a record of ``results.json`` describes."""
        return cls.of(f"{record.get('mechanism')}-h{record.get('heads')}-s{record.get('seed')}")

    @staticmethod
    def names_a_folder(name: str) -> bool:
        """Whether a folder with this name is the folder of a run."""
        return _FORM.fullmatch(name) is not None and re.fullmatch(r"[A-Za-z0-9._-]+", name) is not None

    @property
    def folder(self) -> str:
        """The name of the run's folder, in which a dot replaces the ``+`` of the mechanism.

        Raises:
            ValueError: the name is too long, or holds characters that a folder name should not have.
        """
        name = str(self).replace("+", ".")
        if not _FOLDER.fullmatch(name):
            raise ValueError(
                f"run name {name!r}: at most 64 letters, digits, dots, dashes and underscores are allowed."
            )
        return name

    def __str__(self) -> str:
        return self.mechanism if self.heads is None else f"{self.mechanism}-h{self.heads}-s{self.seed}"
