"""Real data: read from the official files, fetched from their publishers, never from memory."""

from .containers import DataError, Images, NotFetched, Pairs, Texts
from .sources import SOURCES, Source, read
from .vocabulary import Vocabulary

__all__ = ["SOURCES", "DataError", "Images", "NotFetched", "Pairs", "Source", "Texts", "Vocabulary", "read"]
