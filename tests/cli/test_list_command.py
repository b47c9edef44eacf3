"""``better-attention list``."""

from __future__ import annotations

import argparse
import json

import pytest

from better_attention.cli import list as verb
from better_attention.lab.tasks.catalogue import TASKS
from better_attention.mechanism import MECHANISMS


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    return verb.run(parser.parse_args(words))


def test_json_is_the_registries(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in found["mechanisms"]] == list(MECHANISMS)
    for row in found["mechanisms"]:
        mechanism = MECHANISMS[row["name"]]
        assert set(row["learned"]) == mechanism.projections
        assert (row["aligned"], row["score"]) == (mechanism.aligned, mechanism.score)
    assert [row["name"] for row in found["tasks"]] == list(TASKS)
    assert all(row["title"] and row["source"] and row["dataset"] for row in found["tasks"])


def test_the_table_is_that_of_the_paper(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    lines = {words[0]: words[1:] for line in capsys.readouterr().out.splitlines() if (words := line.split())}
    assert lines["standard"] == ["✓", "✓", "✓", "✓", "softmax"]
    assert lines["optimised"] == ["✓", "✓", "slice", "✓", "softmax"]
    assert lines["super"] == ["✓", "slice", "slice", "✓", "✓", "softmax"]
    assert lines["expressive"][-1] == "expressive"
    assert set(TASKS) <= set(lines)
