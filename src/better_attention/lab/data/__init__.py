"""Real data: read from the official files, fetched from their publishers, never from memory."""

from .catalogue import SOURCES, Source, read
from .samples import DataError, Images, NotFetched, Pairs, Texts
from .vocabulary import Vocabulary

__all__ = ["SOURCES", "DataError", "Images", "NotFetched", "Pairs", "Source", "Texts", "Vocabulary", "read"]
