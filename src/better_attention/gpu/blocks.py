"""How large the tiles of each kernel are, by head width and size of an element.

The sizes come from the resources that ptxas reports for compute capability 9.0 (docs/gpu.md): as large as registers and
shared memory allow. Along the dimension that a kernel sums over there is one size for each width, so that sums run in
one order whatever tuning finds; tuning chooses among the alternatives for the other dimension, warps and stages.
"""

from __future__ import annotations

from typing import NamedTuple

LENGTH_TO_TUNE = 1024
"""With fewer queries a call takes less time than it takes to start; the first alternative serves then."""


class Block(NamedTuple):
    """One way to run a kernel.

    Args:
        outer: rows that a program computes: queries, or keys in the kernel for their gradients.
        inner: rows that it takes at a time from the dimension that it sums over.
        warps, stages: as for Triton.
    """

    outer: int
    inner: int
    warps: int
    stages: int


Table = dict[int, tuple[Block, ...]]

INTERPRETED = (Block(16, 16, 1, 1),)
"""For Triton's interpreter, where tests want several tiles of few numbers."""

FORWARD: dict[int, Table] = {
    2: {
        16: (Block(128, 128, 4, 3), Block(64, 128, 4, 3)),
        32: (Block(128, 128, 4, 3), Block(64, 128, 4, 3)),
        64: (Block(128, 128, 8, 3), Block(128, 128, 4, 3), Block(64, 128, 4, 3)),
        128: (Block(128, 128, 8, 2), Block(64, 128, 4, 2), Block(128, 128, 8, 3)),
        256: (Block(128, 64, 8, 2), Block(64, 64, 4, 2)),
    },
    4: {
        16: (Block(64, 64, 4, 2),),
        32: (Block(64, 64, 4, 2),),
        64: (Block(64, 64, 4, 2),),
        128: (Block(64, 32, 4, 2),),
        256: (Block(32, 32, 4, 2),),
    },
}
QUERY_GRADIENT: dict[int, Table] = {
    2: {
        16: (Block(128, 64, 4, 3), Block(128, 64, 8, 3)),
        32: (Block(128, 64, 4, 3), Block(128, 64, 8, 3)),
        64: (Block(128, 64, 8, 3), Block(64, 64, 4, 3)),
        128: (Block(128, 64, 8, 2), Block(64, 64, 4, 2)),
        256: (Block(64, 32, 8, 2), Block(64, 32, 4, 2)),
    },
    4: {
        16: (Block(64, 32, 4, 2),),
        32: (Block(64, 32, 4, 2),),
        64: (Block(64, 32, 4, 2),),
        128: (Block(32, 32, 4, 2),),
        256: (Block(32, 16, 4, 1),),
    },
}
KEY_GRADIENT: dict[int, Table] = {
    2: {
        16: (Block(128, 64, 4, 2), Block(128, 64, 8, 2)),
        32: (Block(128, 64, 4, 2), Block(128, 64, 8, 2)),
        64: (Block(128, 64, 8, 2), Block(64, 64, 4, 2)),
        128: (Block(128, 64, 8, 2),),
        256: (Block(64, 32, 8, 2), Block(64, 32, 8, 1)),
    },
    4: {
        16: (Block(64, 32, 4, 2),),
        32: (Block(64, 32, 4, 2),),
        64: (Block(64, 32, 4, 2),),
        128: (Block(32, 32, 4, 1),),
        256: (Block(32, 16, 4, 1),),
    },
}
DECODE: dict[int, Table] = {
    2: {width: (Block(16, 64 if width > 128 else 128, 4, 3),) for width in (16, 32, 64, 128, 256)},
    4: {width: (Block(16, 32 if width > 128 else 64, 4, 2),) for width in (16, 32, 64, 128, 256)},
}
CAREFUL = {width: Block(16, 16 if width > 128 else 32, 4, 1) for width in (16, 32, 64, 128, 256)}
"""In float32 whatever the dtype; few rows ever take this way."""
