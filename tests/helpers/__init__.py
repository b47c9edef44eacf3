"""What several tests share: oracles, tables of layers, small tasks and studies, stand-ins of publishers."""

from pathlib import Path

TESTS = Path(__file__).parents[1]
"""The import root of the tests, for programs that a test starts."""
CHECKOUT = TESTS.parent
