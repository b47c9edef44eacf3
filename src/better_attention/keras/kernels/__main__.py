"""``python -m better_attention.keras.kernels``: build the kernels for JAX now rather than at their first use."""

from __future__ import annotations

import sys

from . import build, missing


def main() -> int:
    """Build, load, and print where the result lies; 1 with the reason if that is not possible."""
    if (reason := missing()) is not None:
        print(reason, file=sys.stderr)
        return 1
    print(build())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
