"""Published data sets, one file each: how the official files are found and read, and the row that describes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from better_attention.lab.catalogue import Catalogue

if TYPE_CHECKING:
    from better_attention.lab.data.source import Source

SOURCES: Catalogue[Source] = Catalogue(__name__, __path__, "SOURCE")
"""Every published data set, by name."""
