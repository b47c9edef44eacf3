"""The trial: what runs when, that quick training is training, what is concluded from made-up rows, what is written."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from better_attention.inspect import attention_maps
from better_attention.lab.runs.folder import RunFolder
from better_attention.lab.runs.job import Job
from better_attention.lab.tasks.recurrence import RULES
from better_attention.lab.tasks.variant import Variant
from better_attention.lab.training.loop import Training
from better_attention.lab.trial.distances import over_distance, picture
from better_attention.lab.trial.findings import MARGIN, final, judged, pairs, slope, solved, verdicts
from better_attention.lab.trial.grid import CONTESTANTS, SCALES, SCHEMES, STAGES, Size, Trial, TrialCell, small_task
from better_attention.lab.trial.quick import Outcome, batches, train
from better_attention.lab.trial.report import write
from better_attention.lab.trial.run import CELLS, append, read, run
from better_attention.lab.trial.stages import Row, chosen, waiting

SMOKE = Trial(**SCALES["smoke"])
WHOLE = Trial()


def row(cell: TrialCell, accuracy: float | None = 50.0, *, solved_at: int | None = None, **changes: Any) -> Row:
    """A finished cell with this test accuracy and a flat curve."""
    curve = tuple((step, 1.0, accuracy or 0.0) for step in range(250, cell.updates + 1, 250))
    outcome = Outcome(100, cell.updates, solved_at, curve, accuracy, 2.0)
    return Row(cell, replace(outcome, **changes), "0123abc")


def tuned(trial: Trial, loss: Any = lambda cell: 1.0) -> list[Row]:
    """All cells of `tune`, with the validation loss that ``loss`` gives a cell."""
    cells = list(waiting(trial, [], ["tune"]))
    return [row(cell, curve=((1_000, loss(cell), 30.0),)) for cell in cells]


def same(cells: Iterable[TrialCell], **values: Any) -> list[TrialCell]:
    return [cell for cell in cells if all(getattr(cell, name) == value for name, value in values.items())]


# --- what runs when ---------------------------------------------------------------------------------------------------


def test_every_setting_is_tuned_and_each_size_once() -> None:
    cells = list(waiting(WHOLE, [], ["tune"]))
    assert len(cells) == len(set(cells)) == 3 * 2 * 7 * 3 * 2
    assert {cell.size for cell in cells} == {"one-hot", "d16", "d32"}
    assert {cell.seed for cell in cells} == {0}
    assert {(cell.mechanism, cell.positions) for cell in cells} == set(CONTESTANTS)
    assert all(WHOLE.job(cell).task.lr == {"adamw": 3e-3, "sgd": 0.01}[cell.optimiser] for cell in cells)


def test_the_setting_with_the_lowest_loss_is_kept_everywhere() -> None:
    """Losses count as shares of log N: 0.9 of log 4 is better than 0.95 of log 8, though the number is smaller too."""

    def loss(cell: TrialCell) -> float:
        wins = (cell.scaling, cell.optimiser) == ("raw", "sgd") and cell.positions == "rotary"
        return math.log(cell.modulus) * (0.5 if wins else 0.9 if cell.scaling == "learned" else 1.0)

    rows = tuned(WHOLE, loss)
    settings = chosen(WHOLE, rows)
    assert settings["d16", "standard", "rotary"] == ("raw", "sgd")
    assert settings["d16", "expressive", "alibi-score"][0] == "learned"
    cells = list(waiting(WHOLE, rows, ["main"]))
    assert {(c.scaling, c.optimiser) for c in same(cells, positions="rotary", size="d64")} == {("raw", "sgd")}
    assert not same(cells, modulus=2, size="one-hot")
    assert len(same(cells, modulus=2, size="d16")) == 2 * 7 * 3
    assert {cell.seed for cell in cells} == {0, 1, 2}
    first = [cell.size for cell in cells].index("one-hot h1")
    assert {(c.size, c.seed) for c in cells[:first]} == {(s, n) for s in ("one-hot", "d16", "d32") for n in range(3)}


def test_what_is_not_tuned_yet_waits_and_a_diverged_setting_is_not_chosen() -> None:
    rows = tuned(WHOLE)
    short = [r for r in rows if r.cell != rows[-1].cell]
    unfinished = rows[-1].cell
    cells = list(waiting(WHOLE, short, ["main"]))
    assert same(cells, size="d16")
    lacking = {"mechanism": unfinished.mechanism, "positions": unfinished.positions}
    assert not same(cells, size=unfinished.size, **lacking)
    assert same(cells, size="d16", **lacking)
    broken = [row(r.cell, None) if (r.cell.scaling, r.cell.optimiser) == ("sqrt", "adamw") else r for r in rows]
    assert ("sqrt", "adamw") not in chosen(WHOLE, broken).values()
    assert set(chosen(WHOLE, rows).values()) == {("sqrt", "adamw")}  # the first, where all are equal


def test_both_of_a_pair_go_on_where_one_rises() -> None:
    rows = tuned(WHOLE)
    place = {"modulus": 4, "delay": 8, "size": "d16", "seed": 1}
    cells = same(waiting(WHOLE, rows, ["main"]), **place)
    rising = tuple((step, 1.0, 30.0 + step / 100) for step in range(250, 4_001, 250))
    found = [row(c, curve=rising) if c.positions == "alibi-score" else row(c) for c in cells]
    long = list(waiting(WHOLE, [*rows, *found], ["long"]))
    assert {(c.mechanism, c.positions) for c in long} == {("standard", "alibi-weight"), ("expressive", "alibi-score")}
    assert {(c.updates, c.seed, c.size) for c in long} == {(20_000, 1, "d16")}
    solved_then = [row(c, solved_at=4_000, curve=rising) for c in cells]
    assert not list(waiting(WHOLE, [*rows, *solved_then], ["long"]))
    slow = tuple((step, 1.0, 30.0 + step / 1_000) for step in range(250, 4_001, 250))  # one point in a quarter
    assert not list(waiting(WHOLE, [*rows, *(row(c, curve=slow) for c in cells)], ["long"]))


def test_the_setting_of_the_groups_code() -> None:
    cells = list(waiting(WHOLE, [], ["group"]))
    assert {(c.scaling, c.optimiser, c.updates) for c in cells} == {("raw", "sgd", 20_000)}
    assert {c.size for c in cells} == {"one-hot", "one-hot h1", "one-hot l2"}
    assert "rotary" not in {c.positions for c in cells}
    job = WHOLE.job(same(cells, modulus=8, delay=4, size="one-hot h1")[0])
    task = job.task
    assert (task.width, task.embedding, task.activation, task.optimiser, task.scaling, job.heads) == (
        *(8, "one-hot", "relu", "sgd", "raw"),
        1,
    )


def test_several_rules_need_a_token_each() -> None:
    cell = same(waiting(WHOLE, tuned(WHOLE), ["multi"]), size="one-hot", modulus=8)[0]
    assert cell.rules == tuple(RULES)
    job = WHOLE.job(cell)
    assert job.task.width == 12
    assert job.task.build("expressive", 2)(torch.zeros(1, job.task.length, dtype=torch.long)).shape[-1] == 8


# --- quick training ---------------------------------------------------------------------------------------------------


def job(**changes: Any) -> Job:
    tiny: dict[str, Any] = {
        "modulus": 5,
        "delay": 3,
        "train_samples": 40,
        "test_samples": 9,
        "batch_size": 8,
        "width": 8,
    }
    return Job(
        replace(small_task(), **(tiny | {"epochs": 3, "target_accuracy": None} | changes)),
        Variant.of("expressive"),
        2,
        1,
    )


@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
def test_it_trains_to_the_very_weights_of_a_comparisons_run(tmp_path: Path, optimiser: str) -> None:
    """Three epochs of five updates, the last of them not full."""
    of = job(positions="alibi-score", optimiser=optimiser, train_samples=37)
    splits = of.task.load()
    usual = Training(of, splits, RunFolder(tmp_path), Accelerator(cpu=True))
    record = usual.run()
    outcome, model = train(of, splits, 15, 5)
    for name, tensor in model.state_dict().items():
        assert torch.equal(usual.model.state_dict()[name], tensor), name
    assert outcome.test_accuracy == pytest.approx(record.test_accuracy, abs=1e-4)
    assert [accuracy for _, _, accuracy in outcome.curve] == pytest.approx(
        [line["validation_accuracy"] for line in usual.position.curve], abs=1e-4
    )
    assert (outcome.updates, outcome.params) == (15, record.total_params)


def test_it_stops_when_the_task_is_solved_and_where_the_loss_is_no_number() -> None:
    of = job(modulus=4, delay=3, positions="learned", scaling="raw", target_accuracy=30.0, train_samples=640, width=16)
    outcome, _ = train(of, of.task.load(), 400, 20)
    assert outcome.solved_at == outcome.updates < 400
    assert outcome.curve[-1][2] >= 30.0 > outcome.curve[-2][2] if len(outcome.curve) > 1 else True
    wild = job(optimiser="sgd", lr=1e12)
    found, _ = train(wild, wild.task.load(), 60, 5)
    assert (found.test_accuracy, found.solved_at) == (None, None)
    assert found.updates < 60


def test_batches_cover_an_epoch_and_end_in_the_middle_of_one() -> None:
    made = list(batches(10, 4, seed=3, updates=5))
    assert [len(batch) for batch in made] == [4, 4, 2, 4, 4]
    assert sorted(torch.cat(made[:3]).tolist()) == list(range(10))
    assert torch.cat(made[3:]).tolist() != torch.cat(made[:2]).tolist()


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_second_command_goes_on_where_the_first_ended(tmp_path: Path) -> None:
    assert not list(run(SMOKE, tmp_path, STAGES, seconds=-1.0))
    count = iter(range(100))
    first = list(run(SMOKE, tmp_path, ["tune"], stop=lambda: next(count) == 3))
    assert len(first) == 3
    with (tmp_path / CELLS).open("a") as file:
        file.write('{"cell": {"stage": "tu')  # a crash in the middle of a line
    assert read(tmp_path) == first
    rest = list(run(SMOKE, tmp_path, ["tune"]))
    assert len(rest) == len(CONTESTANTS) - 3
    assert [r.cell for r in first + rest] == list(waiting(SMOKE, [], ["tune"]))
    assert not list(run(SMOKE, tmp_path, ["tune"]))
    again = list(run(SMOKE, tmp_path / "other", ["tune"], part=(1, 2)))
    assert [r.outcome.test_accuracy for r in again] == [
        r.outcome.test_accuracy for r in first + rest if r.cell in {a.cell for a in again}
    ]
    assert 0 < len(again) < len(CONTESTANTS)
    assert not list(run(SMOKE, tmp_path / "other", STAGES, sizes=["d16"]))
    assert len(list(run(SMOKE, tmp_path / "other", ["tune"], sizes=["one-hot"]))) == len(CONTESTANTS) - len(again)


def test_shares_are_disjoint_and_together_everything(tmp_path: Path) -> None:
    found = [[r.cell for r in run(SMOKE, tmp_path / str(k), ["tune"], part=(k, 3))] for k in (1, 2, 3)]
    together = [cell for share in found for cell in share]
    assert sorted(map(str, together)) == sorted(map(str, waiting(SMOKE, [], ["tune"])))
    assert max(map(len, found)) < len(together)


def test_a_line_that_is_no_row_is_named(tmp_path: Path) -> None:
    append(tmp_path, row(next(waiting(SMOKE, [], ["tune"]))))
    with (tmp_path / CELLS).open("a") as file:
        file.write('{"cell": {"stage": "tune"}}\n')
    with pytest.raises(ValueError, match=r"cells.jsonl, line 2 is no row of a trial"):
        read(tmp_path)


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    rows = [row(cell, 33.3, seconds=1.25) for cell in list(waiting(SMOKE, [], ["tune"]))[:3]]
    for one in rows:
        append(tmp_path, one)
    assert read(tmp_path) == rows


# --- conclusions ------------------------------------------------------------------------------------------------------


def main_rows(differences: dict[str, Any], seeds: int = 3, solves: Any = lambda cell: False) -> list[Row]:
    """`main` at two sizes and all rungs: softmax at 50, expressive above it by what a scheme's function says."""
    found = []
    for size in ("d16", "d32"):
        for rung in WHOLE.rungs:
            for seed in range(seeds):
                for mechanism, positions in CONTESTANTS:
                    cell = TrialCell(
                        "main", *rung, ("plus",), size, positions, "sqrt", "adamw", mechanism, seed, updates=4_000
                    )
                    gap = differences[positions](cell) if mechanism == "expressive" else 0.0
                    found.append(row(cell, 50.0 + gap, solved_at=4_000 if solves(cell) else None))
    return found


def noise(cell: TrialCell) -> float:
    """A little, of mean zero over the seeds."""
    return 0.2 * (cell.seed - 1)


def bits(cell: TrialCell) -> float:
    return cell.delay * math.log2(cell.modulus)


def test_verdicts_follow_the_rules_that_were_written_down() -> None:
    rows = main_rows(
        {
            "learned": lambda c: -5.0 + noise(c),
            "rotary": noise,
            "alibi-weight": lambda c: 20.0 * (c.seed - 1),
            "alibi-score": lambda c: 0.5 * bits(c) + noise(c),
        }
    )
    found = {one.scheme: one for one in verdicts(rows)}
    assert list(found) == list(SCHEMES)
    assert {name: one.at_least_as_good for name, one in found.items()} == {
        "learned": "does not hold",
        "rotary": "holds",
        "alibi-weight": "not decided",
        "alibi-score": "holds, ahead",
    }
    assert {name: one.grows for name, one in found.items()} == {
        "learned": "not decided",
        "rotary": "not decided",
        "alibi-weight": "not decided",
        "alibi-score": "holds",
    }
    assert found["learned"].difference.difference.n == 2 * 7 * 3
    assert found["learned"].difference.family == 4
    assert found["alibi-score"].slope.mean == pytest.approx(0.5)
    assert found["alibi-score"].time.mean == pytest.approx(1.0)
    assert MARGIN == 1.0
    falling = verdicts(main_rows(dict.fromkeys(SCHEMES, lambda c: -0.5 * bits(c) + noise(c))))
    assert {one.grows for one in falling} == {"does not hold"}


def test_a_rung_counts_as_solved_by_more_than_half_of_the_seeds() -> None:
    def solves(cell: TrialCell) -> bool:
        if (cell.size, cell.mechanism) == ("d16", "expressive") and cell.positions in ("alibi-score", "rotary"):
            return cell.rung == (8, 8) and cell.seed < 2
        if (cell.size, cell.mechanism, cell.positions) == ("d16", "standard", "learned"):
            return cell.rung == (4, 8) or (cell.rung == (8, 8) and cell.seed < 1)
        return (cell.size, cell.rung, cell.mechanism, cell.positions) == ("d32", (8, 8), "standard", "alibi-weight")

    rows = main_rows(dict.fromkeys(SCHEMES, noise), solves=solves)
    found = {one.scheme: one for one in verdicts(rows)}
    assert found["alibi-score"].weakly == found["alibi-score"].strongly == (("d16", (8, 8)),)
    assert found["alibi-score"].reverse == (("d32", (8, 8)),)
    assert found["learned"].reverse == (("d16", (4, 8)),)
    assert found["learned"].alone == "does not hold"
    assert found["rotary"].alone == "holds strongly"
    assert solved(rows)["standard", "learned"] == {("d16", (4, 8))}
    softmax_too = [
        row(r.cell, solved_at=1) if (r.cell.mechanism, r.cell.positions) == ("standard", "learned") else r for r in rows
    ]
    assert {one.scheme: one.alone for one in verdicts(softmax_too)}["rotary"] == "holds weakly"


def test_a_longer_run_takes_the_place_of_a_shorter_and_a_pair_is_equally_long() -> None:
    rows = main_rows(dict.fromkeys(SCHEMES, noise), seeds=1)
    one = next(r for r in rows if r.cell.positions == "alibi-score" and r.cell.rung == (8, 8))
    other = next(
        r
        for r in rows
        if (r.cell.mechanism, r.cell.positions, r.cell.size, r.cell.rung)
        == ("standard", "alibi-weight", one.cell.size, (8, 8))
    )
    longer = row(replace(one.cell, stage="long", updates=20_000), 90.0)
    whole = final([longer, *rows], ("main", "long"))
    assert len(whole) == len(rows)
    assert not [p for p in pairs(whole, "alibi-score") if p.place == (one.cell.size, (8, 8), 0)]
    partner = row(replace(other.cell, stage="long", updates=20_000), 60.0)
    (pair,) = [
        p
        for p in pairs(final([longer, partner, *rows], ("main", "long")), "alibi-score")
        if p.place == (one.cell.size, (8, 8), 0)
    ]
    assert pair.difference == 30.0


def test_a_size_is_judged_when_all_its_seeds_are_there(tmp_path: Path) -> None:
    rows = main_rows(dict.fromkeys(SCHEMES, lambda c: (9.0 if c.size == "d32" else 3.0) + noise(c)))
    last = next(r for r in rows if r.cell.size == "d32" and r.cell.seed == 2)
    early = [r for r in rows if r != last]
    assert {r.cell.size for r in judged(early, 3)} == {"d16"}
    assert judged(rows, 3) == rows
    assert judged([r for r in rows if r.cell.seed < 2], 3) == []
    write(WHOLE, early, tmp_path)
    text = (tmp_path / "tables.md").read_text()
    assert "Judged on the sizes with 3 seeds: d16." in text
    assert "| learned positions | 21 | +3.0 ± 0.1, p < 0.001 | holds, ahead |" in text
    assert "| d32 | 8 | 16 | 50.0 ± 0.0 | 59.0 ± 0.5 | +9.0 ± 0.5 |" in text  # shown all the same
    write(WHOLE, [r for r in rows if r.cell.seed == 0], tmp_path)
    assert "nothing is judged" in (tmp_path / "tables.md").read_text()


def test_a_diverged_run_leaves_no_verdict() -> None:
    rows = main_rows(dict.fromkeys(SCHEMES, noise))
    broken = [row(r.cell, None) if r.cell.positions == "rotary" and r.cell.seed == 1 else r for r in rows]
    found = {one.scheme: one for one in verdicts(broken)}
    assert found["rotary"].at_least_as_good == "not tested"
    assert found["learned"].at_least_as_good == "holds"
    assert slope(pairs(broken, "learned")) is not None


def test_the_files_hold_the_numbers(tmp_path: Path) -> None:
    rows = [*tuned(WHOLE), *main_rows(dict.fromkeys(SCHEMES, lambda c: 3.0 + noise(c)))]
    write(WHOLE, rows, tmp_path)
    text = (tmp_path / "tables.md").read_text()
    assert "| learned positions | 42 | +3.0 ± 0.1, p < 0.001 | holds, ahead |" in text
    assert "| d16 | 4 | 8 | 50.0 ± 0.0 | 53.0 ± 0.5 | +3.0 ± 0.5 | 0/3, 0/3 | 4,000 |" in text
    assert "Four rules" not in text
    lines = (tmp_path / "cells.csv").read_text().splitlines()
    assert len(lines) == 1 + len(rows)
    assert lines[0].startswith(
        "stage,modulus,delay,rules,size,positions,scaling,optimiser,mechanism,seed,updates,params"
    )
    numbers = json.loads((tmp_path / "summary.json").read_text())
    assert numbers["finished"]["main"] == 2 * 7 * 3 * 7
    assert numbers["waiting"]["tune"] == 0
    assert numbers["settings"]["d16 / standard / rotary"] == "sqrt / adamw"


# --- weights over distance --------------------------------------------------------------------------------------------


def test_weights_over_distance_number_by_number() -> None:
    of = job(positions="alibi-score", layers=2)
    model, split = of.task.build("expressive", 2).eval(), of.task.load().test
    found = over_distance(model, split, 3)
    assert len(found) == 2
    for name, weights in attention_maps(model, split.inputs).items():
        B, N, L, _ = weights.shape
        for n in range(N):
            for d in range(L):
                seen = [weights[b, n, q, q - d] for b in range(B) for q in range(2, L) if q - d >= 0]
                assert found[name][n, d] == pytest.approx(float(sum(seen) / len(seen)), abs=1e-6)
    drawn = picture([("one", "expressive", found), ("two", "standard", found)], 3)
    assert drawn.startswith(b"<?xml")
    assert picture([("one", "expressive", found)], 3) != drawn
    # Letters are outlines, and matplotlib writes what they spell into a comment.
    spelt = re.findall(r"<!-- (.*?) -->", drawn.decode())
    heads = sum(map(len, found.values()))
    legend = spelt[spelt.index("expressive") :]
    assert legend[:2] == ["expressive", "softmax"]
    assert len(legend) == 2 + heads + 1, "scores, heads, and what the marks are"
    assert legend[-1] == "the rule reads here: 0 and 2"


def test_a_size_names_one_hot_or_a_width() -> None:
    assert Size(None, 1, 2, "x").settings(5) == {"layers": 2, "width": 5, "embedding": "one-hot", "activation": "relu"}
    assert Size(16, 2, 1, "x").settings(5) == {"layers": 1, "width": 16}
