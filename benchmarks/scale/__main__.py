"""The command: ``python -m benchmarks.scale``."""

from __future__ import annotations

import argparse

from . import page, sequence


def main() -> None:
    """Measure where that is wanted, and write the tables of the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--measure", action="store_true", help="run 2 and 4 processes over gloo first")
    if parser.parse_args().measure:
        sequence.measure(page.MEASURED)
    page.write()


if __name__ == "__main__":
    main()
