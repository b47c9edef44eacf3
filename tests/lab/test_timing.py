"""Taking turns: who, in which order, and when it ends."""

from __future__ import annotations

import time

from better_attention.lab.timing import alternate


def turns(*arguments: object, **options: object) -> str:
    return " ".join(f"{turn}{name}" for turn, name in alternate(*arguments, **options))  # type: ignore[arg-type]


def test_every_second_round_runs_backwards() -> None:
    assert turns("abc", 3) == "0a 0b 0c 1c 1b 1a 2a 2b 2c"
    assert turns("a", 2) == "0a 1a"
    assert turns("", 3) == turns("abc", 0) == ""


def test_time_ends_the_rounds_beyond_the_least_number() -> None:
    assert turns("ab", 5, least=2, seconds=0.0) == "0a 0b 1b 1a"
    began = time.perf_counter()
    rounds = [turn for turn, _ in alternate("a", 10**9, seconds=0.05)]
    assert time.perf_counter() - began >= 0.05
    assert len(rounds) > 1


def test_a_stop_ends_them_after_a_whole_round() -> None:
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) == 2

    assert turns("ab", 9, least=9, stop=stop) == "0a 0b 1b 1a"
    assert turns("ab", 9, stop=lambda: True) == "0a 0b", "one round there is always"
