"""The ladder: the grid, climbing and going on, what the numbers amount to, and a page on which all is text."""

from __future__ import annotations

import csv
import json
import signal
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from better_attention.costs import cost
from better_attention.lab.ladder import page as ladder_page
from better_attention.lab.ladder.climb import Climb, row_of, update_flops
from better_attention.lab.ladder.findings import at_best, duels, heights, sentence, spots, within
from better_attention.lab.ladder.grid import (
    SCALES,
    Cell,
    Ladder,
    RungResult,
    Setting,
    below,
    best_settings,
    softmax_twin,
)
from better_attention.lab.runs.states import run_states
from better_attention.lab.tasks.catalogue import TASKS
from better_attention.lab.tasks.recurrence import RecurrenceTask
from better_attention.lab.tasks.variant import Variant
from better_attention.lab.training.events import Began, Ended, Estimated, Event, Updated, ignore
from better_attention.lab.training.progress import Interrupted
from better_attention.lab.training.step_time import Pace, measure

SQRT, RAW = Setting("sqrt", "rotary", 1), Setting("raw", "alibi-weight", 2)
PAIR = ("standard", "expressive")


QUICK = partial(measure, seconds=0.0)
"""Three updates of each model are enough here."""


def base(**changes: Any) -> RecurrenceTask:
    small: dict[str, Any] = {
        "train_samples": 24,
        "test_samples": 8,
        "batch_size": 8,
        "epochs": 2,
        "width": 8,
        "steps": 5,
    }
    found = replace(TASKS["recurrence"]("small"), **(small | changes))
    assert isinstance(found, RecurrenceTask)
    return found


def ladder(out: Path, **changes: Any) -> Ladder:
    given: dict[str, Any] = {
        "task": base(),
        "rungs": ((4, 4), (8, 4), (8, 8)),
        "settings": (SQRT, RAW),
        "variants": [Variant.of(name) for name in PAIR],
        "heads": 2,
        "seeds": 2,
        "out": out,
        "command": "better-attention ladder",
    }
    return Ladder(**(given | changes))


def row(mechanism: str = "standard", rung: tuple[int, int] = (4, 4), seed: int = 0, **changes: Any) -> RungResult:
    given: dict[str, Any] = {
        "setting": SQRT, "test": 100.0, "validation": 99.5, "to_target": 200, "updates": 200, "flops": 1000
    }  # fmt: skip
    given |= changes
    setting = given["setting"]
    return RungResult(
        mechanism=mechanism,
        score=Variant.of(mechanism).mechanism.score,
        modulus=rung[0],
        delay=rung[1],
        scaling=setting.scaling,
        positions=setting.positions,
        layers=setting.layers,
        heads=2,
        seed=seed,
        width=32,
        train_accuracy=100.0,
        validation_accuracy=given["validation"],
        test_accuracy=given["test"],
        test_loss=0.01,
        updates=given["updates"],
        updates_to_target=given["to_target"],
        update_flops=given["flops"],
        params=13_000,
        seconds=1.5,
    )


def failed(*args: Any, **changes: Any) -> RungResult:
    return row(*args, **({"test": 40.0, "validation": 40.0, "to_target": None, "updates": 1000} | changes))


# --- the grid ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES)
def test_the_declared_grids_are_ladders(scale: str) -> None:
    grid = SCALES[scale]
    settings = [Setting("sqrt", "rotary", 1)]
    made = ladder(Path("unused"), rungs=grid["rungs"], settings=settings)
    assert all(N**delay >= 256 for N, delay in made.rungs)
    if scale != "smoke":
        assert set(grid["scalings"]) == {"sqrt", "raw", "learned"}
        assert set(grid["positions"]) == {"learned", "rotary", "alibi-weight", "alibi-score"}
        assert grid["layers"] == (1, 2)
    if scale == "paper":
        assert {n for rung in made.rungs for n in rung} == {2, 4, 8, 16, 32, 64}
        assert made.rungs[-1] == (64, 64)


def test_rungs_must_rise() -> None:
    with pytest.raises(ValueError, match=r"\(4, 4\) is easier than \(8, 4\), which comes before it"):
        ladder(Path("unused"), rungs=((8, 4), (4, 4)))
    with pytest.raises(ValueError, match="each rung is climbed once"):
        ladder(Path("unused"), rungs=((4, 4), (4, 4)))
    assert below((4, 8), (8, 8))
    assert not below((8, 4), (4, 8))


def test_the_twin_differs_in_the_score_alone() -> None:
    names = {"expressive": "standard", "super+expressive+per-head": "super+per-head", "efficient": "efficient"}
    assert {name: softmax_twin(Variant.of(name)) for name in names} == names


# --- climbing ---------------------------------------------------------------------------------------------------------


class Notes:
    """Writes down the events; asks to stop once the wanted number of updates is made."""

    def __init__(self) -> None:
        self.ended: list[str] = []
        self.estimates: list[tuple[float, int]] = []
        self.updates = 0

    def notify(self, event: Event) -> None:
        if isinstance(event, Estimated):
            self.estimates.append((event.seconds, event.runs))
        elif isinstance(event, Updated):
            self.updates += 1
        elif isinstance(event, Ended):
            self.ended.append(event.name)


def climbed(of: Ladder) -> tuple[Climb, Notes]:
    notes = Notes()
    climb = Climb(of, notes.notify, QUICK)
    assert list(climb.run()) == list(of.rungs)
    return climb, notes


def bits(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("model.safetensors"))}


def untimed(rows: Sequence[RungResult]) -> list[RungResult]:
    assert all(one.times_as_fast and one.times_as_fast > 0 for one in rows)
    return [replace(one, seconds=None, times_as_fast=None) for one in rows]


def test_several_rules_are_climbed_at_once(tmp_path: Path) -> None:
    """Also where they would be the same modulo 2: the estimate before the first run uses no easier modulus."""
    of = ladder(tmp_path, rungs=((4, 4),), seeds=1, task=base(epochs=1, rules=("plus", "minus", "back")))
    climb, notes = climbed(of)
    assert notes.estimates[0][1] == len(climb.rows) == len(of.cells)
    assert all(row.test_accuracy is not None for row in climb.rows)


def test_every_cell_has_its_folder_and_its_row(tmp_path: Path) -> None:
    of = ladder(tmp_path, rungs=((4, 4), (8, 4)), seeds=1, task=base(epochs=1))
    climb, notes = climbed(of)
    assert notes.ended[:3] == [
        "n4-t4/sqrt-rotary-l1/standard-h2-s0",
        "n4-t4/sqrt-rotary-l1/expressive-h2-s0",
        "n4-t4/raw-alibi-weight-l2/standard-h2-s0",
    ]
    assert len(notes.ended) == len(climb.rows) == len(of.cells) == 8
    ((seconds, runs),) = notes.estimates
    assert runs == 8
    assert seconds > 0
    first = climb.rows[0]
    result = json.loads((tmp_path / notes.ended[0] / "result.json").read_text())
    assert (first.test_accuracy, first.params) == (result["test_accuracy"], result["total_params"])
    assert (first.updates, first.updates_to_target) == (3, None)
    config = json.loads((tmp_path / notes.ended[2] / "config.json").read_text())["run"]["settings"]
    assert (config["modulus"], config["delay"], config["scaling"]) == (4, 4, "raw")
    assert (config["positions"], config["layers"]) == ("alibi-weight", 2)
    assert set(climb.notes) == {(4, 4), (8, 4)}


@pytest.mark.parametrize("screen", [False, True])
def test_the_estimate_bounds_every_mechanism_in_any_order(tmp_path: Path, screen: bool) -> None:
    """An update takes 1, 2, 3 or 4 seconds by the mechanism, ten times that with two layers; evaluating takes none."""
    seconds = {"standard": 1.0, "expressive": 2.0, "efficient": 3.0, "super+expressive": 4.0}
    seen: list[tuple[int, int]] = []

    def known(task: Any, splits: object, variant: Variant, *more: object, **options: object) -> Pace:
        seen.append((task.modulus, task.delay))
        return Pace(seconds[variant.name] * 10 ** (task.layers - 1), None)

    told = []
    for names in (list(seconds), list(reversed(seconds))):
        variants = [Variant.of(name) for name in names]
        of = ladder(tmp_path, rungs=((4, 4), (8, 6)), seeds=2, screen=screen, variants=variants, task=base(epochs=2))
        climb = Climb(of, (notes := Notes()).notify, known)
        climb.estimate(Accelerator(cpu=True))
        told += notes.estimates
    updates = 3 * 2
    runs = updates * 2 * (1 + 2 + 3 + 4)  # of one layer and one seed, on both rungs
    expected = runs + 10 * runs + (10 * runs if screen else runs + 10 * runs)
    assert told == [(expected, 24 if screen else 32)] * 2
    assert set(seen) == {(8, 4), (8, 6)}


class Killer(Notes):
    """Sends Ctrl-C after some updates; after none, when the first run begins."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def notify(self, event: Event) -> None:
        super().notify(event)
        if isinstance(event, Updated if self.after else Began) and self.updates == self.after:
            signal.raise_signal(signal.SIGINT)


def test_a_ladder_that_was_killed_goes_on_bit_by_bit(tmp_path: Path) -> None:
    grid: dict[str, Any] = {"rungs": ((4, 4),), "settings": (SQRT,), "seeds": 2}
    straight, heard = climbed(ladder(tmp_path / "straight", **grid))
    of = ladder(tmp_path / "again", **grid)
    for updates in (4, 11):  # of 24: in the first run's second epoch, in the second run's last
        with pytest.raises(Interrupted):
            list(Climb(of, Killer(updates).notify, QUICK).run())
    resumed, again = climbed(of)
    assert bits(tmp_path / "again") == bits(tmp_path / "straight")
    assert untimed(resumed.rows) == untimed(straight.rows)
    assert again.ended == heard.ended
    finished, idle = climbed(of)
    assert idle.updates == 0
    assert idle.estimates == []
    assert finished.rows == resumed.rows


def test_a_finished_ladder_is_not_measured_again_and_listens_to_ctrl_c(tmp_path: Path) -> None:
    of = ladder(tmp_path, rungs=((4, 4),), settings=(SQRT,), seeds=1)
    first, _ = climbed(of)

    def never(*_: object, **options: object) -> Pace:
        raise AssertionError("a finished run was measured")

    again = Climb(of, measure=never)
    list(again.run())
    assert again.rows == first.rows
    (tmp_path / "ladder.csv").write_text("of a ladder that was killed before its ladder.json\n")
    list(Climb(of, measure=never).run())
    with pytest.raises(Interrupted, match="Every run so far is saved"):
        list(Climb(of, Killer(0).notify, never).run())


def test_another_setting_is_refused(tmp_path: Path) -> None:
    grid: dict[str, Any] = {"rungs": ((4, 4),), "settings": (SQRT,), "seeds": 1}
    climbed(ladder(tmp_path, **grid))
    with pytest.raises(ValueError, match=r"lr: 0.003 there, 0.01 now"):
        climbed(ladder(tmp_path, task=base(lr=0.01), **grid))


def test_what_failed_below_is_given_up_for_both_scores_of_that_setting_alone(tmp_path: Path) -> None:
    climb = Climb(ladder(tmp_path, rungs=((4, 4), (2, 9), (8, 4), (8, 8))), ignore)
    climb.rows = [failed(name, rung) for name in PAIR for rung in ((4, 4), (8, 4))]
    climb.rows += [
        failed("efficient", (4, 4)),
        failed("standard", (4, 4), setting=RAW),
        row("expressive", (8, 4), setting=RAW),
    ]
    assert climb.given_up((8, 8), SQRT, "standard")
    assert not climb.given_up((2, 9), SQRT, "standard")  # it is not harder in N than what failed
    assert not climb.given_up((8, 8), RAW, "standard")  # one failure, and one rung that expressive has solved
    assert not climb.given_up((8, 8), SQRT, "efficient")
    tried = climb.worth_trying((8, 8), 0)
    assert [(cell.setting, cell.variant.name) for cell in tried] == [(RAW, name) for name in PAIR]


def test_screening_runs_the_other_seeds_where_validation_was_best(tmp_path: Path) -> None:
    climb = Climb(ladder(tmp_path, screen=True), ignore)
    climb.rows = [
        failed("standard", (4, 4), validation=60.0, test=10.0),
        failed("standard", (4, 4), setting=RAW, validation=50.0, test=90.0),  # the test split has no say
        failed("expressive", (4, 4), validation=50.0),
        row("expressive", (4, 4), setting=RAW),
    ]
    assert climb.worth_trying((4, 4), 1) == [
        Cell((4, 4), SQRT, Variant.of("standard"), 1),
        Cell((4, 4), RAW, Variant.of("expressive"), 1),
    ]


def test_the_operations_of_an_update() -> None:
    of = base(modulus=8, delay=4, width=8, layers=2, equal_params=False)
    batch, length = 8, of.length
    attention = 2 * cost(8, 2, length, mechanism="efficient", batch=batch).flops
    others = 3 * 2 * batch * length * (2 * (8 * 32 + 32 * 8) + 8 * 8)
    assert update_flops(of, Variant.of("efficient"), 2) == attention + others


def test_a_run_that_diverged_is_a_row_without_numbers(tmp_path: Path) -> None:
    of = ladder(tmp_path)
    found = row_of(of, of.cells[0], None, [])
    assert (found.test_accuracy, found.updates, found.updates_to_target) == (None, None, None)
    page = ladder_page.render(report(of, [found]))
    assert "failed" in page
    assert "1 run diverged" in page


# --- what the numbers amount to ---------------------------------------------------------------------------------------


def test_the_best_setting_is_chosen_on_validation_over_the_seeds_that_all_have() -> None:
    rows = [
        row(seed=0, to_target=400, updates=400),
        row(seed=0, setting=RAW, to_target=150, updates=150, test=97.0),
        failed(seed=1, setting=RAW),  # screening: SQRT has no seed 1
    ]
    assert best_settings(rows) == {("standard", (4, 4)): RAW}
    assert at_best(rows) == rows[1:]
    assert best_settings([*rows, row(seed=1)]) == {("standard", (4, 4)): SQRT}
    spot = spots(at_best(rows))["standard", (4, 4)]
    assert (spot.accuracy, spot.solved, spot.runs, spot.updates, spot.is_solved) == (68.5, 1, 2, 150, False)


def test_heights_at_equal_updates_and_at_equal_compute() -> None:
    rungs = ((4, 4), (8, 4), (8, 8))
    rows = [row(rung=(4, 4)), row(rung=(8, 4), to_target=900), failed(rung=(8, 8))]
    rows += [row("efficient", rung=r, flops=500, to_target=1000) for r in ((4, 4), (8, 8))]
    found = heights(rows, rungs)
    assert (found["standard"].highest, found["standard"].solved, found["standard"].tried) == ((8, 4), 2, 3)
    assert (found["efficient"].highest, found["efficient"].solved) == ((8, 8), 2)
    # 1,000 updates of efficient are worth 500 of standard; on (8, 4) efficient was not run
    equal = heights(within(rows, 1000), rungs)
    assert equal["standard"].highest == (8, 4)
    rows.append(failed("efficient", rung=(8, 4), flops=500))
    equal = heights(within(rows, 1000), rungs)
    assert equal["standard"].highest == (4, 4)
    assert equal["efficient"] == found["efficient"].__class__((8, 8), 2, 3)


def many(gain: float, noise: Sequence[float] = (0.0, 0.4, -0.3)) -> list[RungResult]:
    """Three rungs and three seeds, expressive ``gain`` points above softmax but for noise, and twice as slow."""
    rows = []
    for place, rung in enumerate(((4, 4), (8, 4), (8, 8))):
        for seed in range(3):
            rows.append(row("standard", rung, seed, test=90.0 - place, to_target=100))
            more = gain + noise[seed] * (1 + place)
            rows.append(row("expressive", rung, seed, test=90.0 - place + more, to_target=200))
    return rows


def test_differences_are_taken_pair_by_pair_and_corrected() -> None:
    found = duels(many(3.0))
    (overall,) = found["overall"]
    assert overall.accuracy is not None
    assert overall.accuracy.difference.n == 9
    assert overall.accuracy.difference.mean == pytest.approx(3.0 + 0.1 * 6 / 9)
    assert overall.verdict == "higher"
    assert overall.speed == "2.00 [2.00, 2.00]"
    assert [duel.where for duel in found["rungs"]] == ["4 symbols, delay 4", "8 symbols, delay 4", "8 symbols, delay 8"]
    assert {duel.accuracy.family for duel in found["rungs"] if duel.accuracy} == {3}
    assert sentence(overall).endswith("points over 9 pairs of runs; expressive predicts better.")
    (worse,) = duels(many(-3.0))["overall"]
    assert "softmax predicts better" in sentence(worse)


def test_where_the_interval_includes_zero_no_difference_is_shown() -> None:
    (overall,) = duels(many(0.0, noise=(1.0, -2.0, 1.1)))["overall"]
    assert overall.verdict == "no difference shown"
    assert "no difference shown" in sentence(overall)
    (one,) = duels([row("standard"), row("expressive", test=60.0)])["overall"]
    assert one.verdict == "not tested"  # a single pair tells nothing about the spread
    assert duels([row("standard"), row("efficient+expressive")])["overall"] == []


def test_runs_that_diverged_leave_nothing_to_claim() -> None:
    rows = many(3.0)
    lost = [row.mechanism == "expressive" and row.rung == (8, 8) for row in rows]
    assert sum(lost) == 3
    spoilt = [replace(r, test_accuracy=None) if gone else r for r, gone in zip(rows, lost, strict=True)]
    found = duels(spoilt)
    (overall,) = found["overall"]
    assert overall.verdict == "not tested"
    assert sentence(overall).endswith("over 6 pairs of runs; not tested, as 3 runs diverged.")
    assert [duel.verdict for duel in found["rungs"]] == [duel.verdict for duel in duels(rows)["rungs"][:2]]
    spoilt = [replace(r, test_accuracy=None) if r == rows[lost.index(True)] else r for r in rows]
    assert sentence(duels(spoilt)["overall"][0]).endswith("over 8 pairs of runs; not tested, as 1 run diverged.")


# --- the files --------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Tags, attribute names and text, as a browser sees them."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: Counter[str] = Counter()
        self.attributes: Counter[str] = Counter()
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes.update(name for name, _ in attrs)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += f"{data} "


def report(of: Ladder, rows: Sequence[RungResult], text: str = "plain words") -> ladder_page.Report:
    """A report with ``text`` in every field of free text."""
    of = replace(of, command=text, device=text, task=replace(of.task, title=text, source=text))
    return ladder_page.Report(of, rows, {(4, 4): text}, True, text, {text: text})


def test_the_page_holds_the_numbers(tmp_path: Path) -> None:
    rows = [*many(3.0), failed("standard", (4, 4), setting=RAW)]
    page = Page(ladder_page.render(report(ladder(tmp_path, task=base(epochs=100)), rows)))  # of 3 updates
    text = " ".join(page.text.split())
    assert page.open == []
    assert "standard Delay \\ symbols 4 8 4 90.0 3/3 89.0 3/3 8 88.0 3/3" in text
    assert "8 symbols, delay 8 3 of 3 8 symbols, delay 8 3 of 3" in text
    assert "Test accuracy of expressive against standard: +3.1 ± " in text
    assert "rotary, 1 layer expressive − standard" in text  # settings in words in every table
    assert "rotary-l1" not in text
    assert "What is asked Accuracy by delay and number of symbols How high" in text  # contents
    assert "1/√d k , rotary, 1 layer" in text  # k set low
    assert "raw q·k, ALiBi on the weight, 2 layers" in text
    assert "by their hash" in text
    assert page.tags["script"] == page.tags["link"] == page.tags["img"] == 0
    html = ladder_page.render(report(ladder(tmp_path), rows))
    assert "default-src 'none'" in html
    assert 'style="--share:0.87"' in html  # (90 - 25) / (100 - 25)
    assert "prefers-color-scheme: dark" in html


PAYLOADS = (
    "<script>alert(1)</script>", "\"><img src=x onerror=alert(1)>", "'-alert(1)-'", "</style><script>x</script>",
    "</title><svg onload=x>", "{{7*7}}", "<!-- -->", "javascript:alert(1)", "\x00\x1b[31m‮<b>", "a" * 5000,
)  # fmt: skip


@pytest.fixture(scope="module")
def benign() -> Page:
    """A page without a payload."""
    return Page(ladder_page.render(report(ladder(Path("out")), many(3.0))))


@pytest.mark.parametrize("payload", PAYLOADS)
def test_nothing_hostile_becomes_more_than_text(payload: str, benign: Page) -> None:
    page = Page(ladder_page.render(report(ladder(Path("out")), many(3.0), payload)))
    assert page.tags == benign.tags
    assert page.attributes == benign.attributes
    assert "49" not in page.text or payload != "{{7*7}}"
    assert not any(ord(c) < 32 and c != "\n" for c in page.text)


def test_an_unfinished_ladder_is_a_page_and_says_so(tmp_path: Path) -> None:
    page = Page(ladder_page.render(replace(report(ladder(tmp_path), []), complete=False)))
    assert "0 runs, not finished yet" in " ".join(page.text.split())


def test_csv_and_json_hold_every_row(tmp_path: Path) -> None:
    of, rows = (
        ladder(tmp_path),
        [*many(1.0), failed("efficient+expressive"), row_of(ladder(tmp_path), ladder(tmp_path).cells[0], None, [])],
    )
    ladder_page.write(of, rows, {}, complete=True)
    with (tmp_path / "ladder.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(rows)
    assert lines[0]["mechanism"] == "standard"
    assert [lines[1][key] for key in ("score", "modulus", "delay", "scaling", "positions", "layers", "seed")] == [
        "expressive", "4", "4", "sqrt", "rotary", "1", "0"
    ]  # fmt: skip
    assert (float(lines[0]["test_accuracy"]), lines[0]["updates_to_target"], lines[0]["params"]) == (
        90.0,
        "100",
        "13000",
    )
    assert lines[-2]["updates_to_target"] == lines[-1]["test_accuracy"] == ""
    found = json.loads((tmp_path / "ladder.json").read_text())
    assert found["rows"][1]["test_accuracy"] == rows[1].test_accuracy
    assert found["grid"]["rungs"] == [[4, 4], [8, 4], [8, 8]]
    assert "our own definition" in found["source"]
    assert (tmp_path / "ladder.html").read_text().startswith("<!DOCTYPE html>")


def test_damaged_files_of_a_ladder_are_named(tmp_path: Path) -> None:
    of, rows = ladder(tmp_path), many(1.0)
    for _ in range(2):  # after every rung
        ladder_page.write(of, rows, {}, complete=True)
        assert run_states([tmp_path]) == []
    page = tmp_path / "ladder.html"
    page.write_bytes(page.read_bytes() + b" ")
    (found,) = run_states([tmp_path])
    assert found.state == "damaged"
    assert f"{page} was changed since it was written" in found.detail
