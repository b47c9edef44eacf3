"""One model on several processes: layers divided by heads, attention over sequences divided by length.

Importing it loads nothing of ``torch.distributed``; calling its functions needs a torch that was built with it.
"""

from __future__ import annotations

from .plan import parallel_plan
from .sequence import sequence_attention

__all__ = ["parallel_plan", "sequence_attention"]
