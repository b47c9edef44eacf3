"""The suites of the benchmarks, one file each; a file ``NAME.py`` defines its ``SUITE``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from better_attention.lab.catalogue import Catalogue

if TYPE_CHECKING:
    from better_attention.bench.registry import Suite

SUITES: Catalogue[Suite] = Catalogue(__name__, __path__, "SUITE")
"""Every suite, by name."""
