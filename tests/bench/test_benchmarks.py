"""The benchmarks themselves: a gate that closes, a clock that is fair, sums that are right, misses told as misses."""

from __future__ import annotations

import importlib.util
import math
import signal
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from time import perf_counter, sleep
from typing import Any

import pytest
import torch

from better_attention.bench import contenders, keras_worker, machine, runner, targets
from better_attention.bench.machine import Limits
from better_attention.bench.registry import PAPER, Contender, Results, Row, Run, Shape, Unavailable, Work, here
from better_attention.bench.runner import Result, Settings, Spread
from better_attention.bench.suites import SUITES, decode, kernel, layer, model
from better_attention.impl import IMPLEMENTATIONS
from better_attention.scores import SCORES

pytestmark = pytest.mark.usefixtures("settled_heap")
TINY = Shape(3, 11, 10, 2)
LIMITS = Limits({"float32": 100.0}, 64, {"sum, float32": 10.0, "dot, float32": 8.0}, 1 << 20)


def tiny_rows(suite: str, dtype: torch.dtype = torch.float32, shape: Shape = TINY) -> list[Row]:
    return SUITES[suite].rows(dtype, (shape,))


@pytest.fixture(autouse=True)
def small_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "MOST_PAIRS", 3)


# --- the registry ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_contender_computes_what_it_should(suite: str, dtype: torch.dtype) -> None:
    for row in tiny_rows(suite, dtype):
        contenders = SUITES[suite].contenders(row)
        assert len({c.name for c in contenders}) == len(contenders)
        for number, contender in enumerate(contenders):
            if contender.name in ("Keras on JAX", "x-transformers"):
                continue  # below, where they are installed
            result, run = runner.admit(row, contender, Settings())
            assert result.status in ("ok", "unavailable"), f"{row.name}: {result}"
            assert (run is None) == (result.status == "unavailable") == bool(result.reason)
            assert number > 0 or run is not None, "there is no baseline"
            assert contender.work.flops > 0


def test_a_step_of_generation_with_rotary_positions_and_what_it_reads() -> None:
    B, S, D, N = 3, 11, 24, 4
    (row, learned) = tiny_rows("generation", shape=Shape(B, S, D, N))
    assert row.variant == "rotary"
    assert "tokens before 11" in row.name
    read = {}
    for contender in SUITES["generation"].contenders(row):
        result, _ = runner.admit(row, contender, Settings())
        assert result.status == ("unavailable" if contender.switch else "ok"), result
        read[contender.name] = contender.work.bytes
    attention, kept = 4 * 4 * D * D, 4 * B * S * D * 4  # bytes of a map in all layers, and of a cached tensor
    assert read["standard"] - read["efficient"] == 2 * attention + kept
    assert read["super"] - read["efficient"] == 4 * 4 * (S + 1) + kept  # one row of W_A over twelve positions
    # W_K, W_V and both tensors with one head for four.
    assert read["standard"] - read["standard, grouped"] == 2 * (attention + kept) * 3 / 4
    assert read["standard through SDPA, grouped"] == read["standard, grouped"]
    for contender in SUITES["generation"].contenders(learned):
        assert contender.work.bytes == read[contender.name] + 4 * D, "one vector of all learned positions"
    # A byte a number, and four for each of four heads.
    assert read["efficient"] - read["efficient, int8 cache"] == kept - 4 * B * S * (D + N * 4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's own
def test_compiled_steps_of_generation_are_right() -> None:
    for row in tiny_rows("generation", shape=Shape(2, 11, 12, 2)):
        compiled = [c for c in SUITES["generation"].contenders(row) if c.switch == "compiled"]
        assert len(compiled) == 3
        for contender in compiled:
            result, _ = runner.admit(row, contender, Settings(switches=frozenset({"compiled"})))
            assert result.status in ("ok", "unavailable"), result


def test_what_cannot_be_grouped_is_left_out() -> None:
    for suite in ("generation", "decode"):
        row = tiny_rows(suite, shape=Shape(1, 11, 12, 2))[0]
        reasons = {c.name: c.why_not() for c in SUITES[suite].contenders(row) if "grouped" in c.name}
        assert len(reasons) >= 2
        assert set(reasons.values()) == {"2 heads are no multiple of 4"}


def test_super_is_left_out_of_generation_where_w_a_is_too_large() -> None:
    row = SUITES["generation"].rows(torch.float32, (Shape(1, 16384, 512, 8),))[0]
    reasons = {c.name: c.why_not() for c in SUITES["generation"].contenders(row)}
    assert reasons["super"] == "W_A over all positions has 1.0 GiB a layer"
    assert [name for name, reason in reasons.items() if reason] == ["super"]


def test_the_kernel_suite_asks_every_implementation() -> None:
    names = {c.name for c in SUITES["kernel"].contenders(tiny_rows("kernel")[0])}
    for score in SCORES:
        for impl in ("auto", "native", *IMPLEMENTATIONS):
            assert f"{score} {impl}" in names
        assert f"{score} native, k is v" in names


def test_the_default_rows() -> None:
    assert [str(shape) for shape in PAPER] == [
        "64x32x32x4", "64x64x64x4", "64x64x128x4", "32x257x256x8", "16x196x768x12", "8x64x1024x4", "2x2048x512x8",
    ]  # fmt: skip
    for suite in SUITES.values():
        rows = suite.rows(torch.float32)
        assert {row.shape for row in rows} == set(suite.shapes)
        assert {row.variant for row in rows} == set(suite.variants)
        assert {row.mode for row in rows} == set(suite.modes)
        assert len({row.name for row in rows}) == len(rows)
        assert set(suite.quick) <= set(suite.shapes)
        chosen = suite.rows(torch.float32, (TINY,))
        tiny = {"model": ("imdb", "amazon"), "generation": ("learned",)}.get(suite.name, suite.variants)
        fitting = [variant for variant in suite.variants if variant in tiny]
        assert {row.variant for row in chosen} == set(fitting), "no 11 patches of a square, no pairs of 5 features"
        assert len(chosen) == len(fitting) * len(suite.modes), "all variants at a chosen shape"
        narrow = suite.rows(torch.bfloat16, (TINY,))
        assert len(narrow) == (0 if suite.name in ("model", "generation") else len(chosen)), "models are float32"
        assert {row.dtype for row in narrow} <= {torch.bfloat16}
        assert {row.dtype for row in chosen} == {torch.float32}


def test_variants_and_scores_ask_for_different_numbers() -> None:
    truths: dict[str, torch.Tensor] = {}
    for row in tiny_rows("kernel"):
        if row.mode == "forward" and row.variant != "dropout":
            contenders = {c.name: c for c in SUITES["kernel"].contenders(row)}
            for name in ("SDPA", "expressive auto", "softmax native, k is v"):
                truths[f"{row.variant} {name}"] = contenders[name].truth()["output"]
    assert len(truths) == 12
    for a, first in truths.items():
        for b, second in truths.items():
            assert a == b or (first - second).abs().max() > 1e-2, f"{a} and {b} are the same"


def test_dropout_is_in_what_is_timed_and_not_in_what_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, float]] = []
    real_sdpa, real_ours = torch.nn.functional.scaled_dot_product_attention, kernel.ba.attention

    def noting(name: str, real: Any) -> Any:
        def attention(*tensors: torch.Tensor, **options: Any) -> Any:
            asked.append((name, options["dropout_p"]))
            return real(*tensors, **options)

        return attention

    monkeypatch.setattr(kernel.F, "scaled_dot_product_attention", noting("SDPA", real_sdpa))
    rows = [row for row in tiny_rows("kernel") if row.variant in ("dropout", "plain")]
    assert len(rows) == 4
    for row in rows:
        found = {c.name: c for c in SUITES["kernel"].contenders(row)}
        for name in ("SDPA", "expressive auto"):
            runner.admit(row, found[name], Settings())  # against the truth, which knows of no dropout
            run = found[name].make()
            with monkeypatch.context() as patch:
                patch.setattr(kernel.ba, "attention", noting("expressive auto", real_ours))
                asked.clear()
                run.sample(2)
                assert asked == [(name, 0.1 if row.variant == "dropout" else 0.0)] * 2
                asked.clear()
                run.results()
                assert asked == [(name, 0.0)]


def test_the_gate_of_a_large_row_looks_at_its_corners(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "SLICED", 0)
    for row in tiny_rows("kernel", shape=Shape(3, 7, 15, 5)):
        contender = SUITES["kernel"].contenders(row)[0]
        result, run = runner.admit(row, contender, Settings())
        assert result.status == "ok"
        assert run is not None
        assert {tuple(x.shape) for x in run.results().values()} == {(2, 7, 2, 3)}


@pytest.mark.parametrize(("variant", "length"), [("mnist", 9), ("cifar100", 10), ("imagenet", 9)])
def test_vision_models_of_any_square(variant: str, length: int) -> None:
    shape = Shape(3, length, 8, 2)
    rows = [row for row in tiny_rows("model", shape=shape) if row.variant == variant]
    assert [row.mode for row in rows] == ["inference", "training"]
    assert not [row for row in tiny_rows("model", shape=shape._replace(length=length + 1)) if row.variant == variant]
    for row in rows:
        for contender in SUITES["model"].contenders(row):
            result, run = runner.admit(row, contender, Settings())
            assert result.status == "ok", result
            assert run is not None
            assert run.results()["output"].shape == (3, {"mnist": 10, "cifar100": 100, "imagenet": 1000}[variant])


def test_models_of_the_papers_sizes() -> None:
    rows = {row.variant: row for row in SUITES["model"].rows(torch.float32) if row.mode == "training"}
    parameters = {"mnist": 276_874, "imdb": 647_693}
    for variant, wanted in parameters.items():
        task = model.task_of(rows[variant])
        assert task is not None
        assert task.size("standard", rows[variant].shape.heads) == wanted
        assert task.batch_size == rows[variant].shape.batch
    assert {row.shape for row in rows.values()} == set(model.SHAPES.values())


def test_an_update_of_a_model_trains_with_dropout_and_the_gate_is_without(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    real = torch.nn.functional.dropout

    def noting(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        rates.append(p if training else 0.0)
        return real(x, p, training, inplace)

    monkeypatch.setattr(torch.nn.functional, "dropout", noting)
    row = next(row for row in tiny_rows("model") if (row.variant, row.mode) == ("imdb", "training"))
    for name in (model.BASELINE, "super"):
        run = next(c for c in SUITES["model"].contenders(row) if c.name == name).make()
        rates.clear()
        before = run.results()
        assert set(rates) == {0.0}
        rates.clear()
        run.sample(2)
        assert max(rates) > 0
        after = run.results()
        assert not torch.equal(before["output"], after["output"]), "the optimiser has not stepped"


def test_the_gate_sees_an_attention_layer_of_a_model_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    row = next(row for row in tiny_rows("model") if (row.variant, row.mode) == ("amazon", "training"))
    contender = next(c for c in SUITES["model"].contenders(row) if c.name == "efficient")
    contender.truth()

    def biased(module: torch.nn.Module, inputs: object, output: Any) -> Any:
        return (output[0] * 1.01, *output[1:])

    real = model._build

    def build(*arguments: Any) -> torch.nn.Module:
        built = real(*arguments)
        if len(arguments) == 2:  # what is timed, not the reference
            next(m for m in built.modules() if isinstance(m, model.MultiheadAttention)).register_forward_hook(biased)
        return built

    monkeypatch.setattr(model, "_build", build)
    result, run = runner.admit(row, contender, Settings())
    assert (result.status, run) == ("wrong", None)


def test_operations_of_a_model_by_hand() -> None:
    B, L, D = 3, 11, 10
    row = next(row for row in tiny_rows("model") if (row.variant, row.mode) == ("imdb", "inference"))
    task = model.task_of(row)
    assert task is not None
    hidden, head = task.hidden, task.head  # type: ignore[attr-defined]
    attention = 4 * L * D * D + 2 * L * L * D
    by_hand = 2 * B * (attention + 2 * L * D * hidden + D * head + head)
    assert model.work(row, "standard").flops == by_hand
    assert model.work(row, "efficient").flops == by_hand - 2 * B * 2 * L * D * D
    assert model.work(row, "efficient").flop_ratio == pytest.approx(by_hand / (by_hand - 4 * B * L * D * D))
    assert model.work(row, "super").flops == by_hand - 2 * B * 2 * L * D * D + 2 * B * L * L * D
    update = next(row for row in tiny_rows("model") if (row.variant, row.mode) == ("imdb", "training"))
    trained = model.work(update, "standard").flops
    assert model.work(update, "efficient").flops == trained - 3 * 2 * B * 2 * L * D * D
    assert 3 * by_hand - trained in (0, 2 * B * L * D * D)


def test_operations_and_bytes_by_hand() -> None:
    row = Row("kernel", Shape(2, 3, 8, 2), "plain", "forward", torch.float32)
    assert kernel.flops(row) == 2 * 2 * (3 * 3 * 4) * 2 * 2  # batch, heads, L S H, two products, two operations
    assert kernel.flops(replace(row, mode="forward+backward")) == 3.5 * kernel.flops(row)
    assert kernel.flops(replace(row, variant="causal")) == kernel.flops(row) / 2
    cached = Row("decode", Shape(2, 5, 8, 2), decode.JOINED, "forward", torch.bfloat16)
    assert decode.work(cached, shared=False).bytes == 2 * (2 * 5 * 8) * 2
    assert decode.work(cached, shared=True).bytes == (2 * 5 * 8) * 2
    whole = Row("layer", Shape(64, 64, 128, 4), "plain", "training", torch.float32)
    assert layer.work(whole, "efficient").flop_ratio == pytest.approx(10_485_760 / 6_291_456)
    assert layer.work(whole, "standard").flop_ratio == 1.0


def test_decoding_meets_another_cache_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[int] = []

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        met.append(k.data_ptr())
        return q

    row = tiny_rows("decode")[0]
    monkeypatch.setattr(decode.F, "scaled_dot_product_attention", attention)
    apart, shared = (c for c in SUITES["decode"].contenders(row) if c.name in ("SDPA", "SDPA, k is v"))
    run = apart.make()
    run.sample(4)
    assert len(set(met[:3])) == 3
    assert met[3] == met[0]
    assert "rotating over 3 caches" in run.note
    met.clear()
    run = shared.make()
    run.sample(6)
    assert "rotating over 6 caches" in run.note
    assert len(set(met)) == 6


# --- the gate --------------------------------------------------------------------------------------------------


def results_of(**values: list[float]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def test_an_error_is_relative_to_the_largest_number_of_its_tensor() -> None:
    truth = results_of(output=[4.0, -8.0], key=[0.5, 0.25, 0.0])
    assert runner.error(truth, truth) == (0.0, "output")
    off = results_of(output=[4.0, -8.0 + 1e-3], key=[0.5, 0.25, 1e-3])
    assert runner.error(off, truth) == (pytest.approx(2e-3), "key")


def test_a_gradient_that_is_zero_is_measured_by_its_likes() -> None:
    truth = results_of(output=[1.0], k_bias=[1e-15, 0.0], v_bias=[2.0, 0.0])
    off = results_of(output=[1.0], k_bias=[1e-6, 0.0], v_bias=[2.0, 0.0])
    assert runner.error(off, truth) == (pytest.approx(5e-7), "k_bias")


def test_nan_is_infinitely_wrong_and_other_shapes_are_refused() -> None:
    truth = results_of(output=[1.0, 2.0])
    assert runner.error(results_of(output=[1.0, math.nan]), truth) == (math.inf, "output")
    for other in (results_of(output=[1.0]), results_of(), results_of(output=[1.0, 2.0], value=[0.0])):
        with pytest.raises(ValueError, match=r"^computed "):
            runner.error(other, truth)


ROW = Row("align", TINY, "plain", "forward", torch.float32)


def contender(
    name: str, value: float = 1.0, *, seconds: float = 0.01, log: list[str] | None = None, **more: object
) -> Contender:
    """Somebody whose answer is ``value``, which should be 1, and whose clock is made up."""

    def sample(calls: int) -> float:
        if log is not None:
            log.append(f"{name} {calls}")
        return seconds * calls

    run = Run(sample, lambda: results_of(output=[value]), lambda: 7, f"note of {name}")
    return Contender(name, lambda: run, lambda: results_of(output=[1.0]), Work(flops=1e6), **more)


def raising(error: Exception) -> Callable[[], Run]:
    def make() -> Run:
        raise error

    return make


def test_the_gate_closes_and_the_others_are_timed() -> None:
    wrong = contender("wrong", 1.001)
    gone = replace(contender("gone"), make=raising(Unavailable("it is not here")))
    broken = replace(contender("broken"), make=raising(ZeroDivisionError("a bug")))
    absent = contender("absent", why_not=lambda: "not on Mondays")
    slow_to_build = contender("slow to build", switch="flex")
    row = [contender("base"), wrong, gone, broken, absent, slow_to_build, contender("good", seconds=0.005)]
    found = {r.contender: r for r in runner.measure(ROW, row, Settings(repeats=4))}
    assert {name: r.status for name, r in found.items()} == {
        "base": "ok",
        "wrong": "wrong",
        "gone": "unavailable",
        "broken": "failed",
        "absent": "unavailable",
        "slow to build": "unavailable",
        "good": "ok",
    }
    assert "output is off by 1.0e-03, allowed 1e-04" in found["wrong"].reason
    assert found["gone"].reason == "it is not here"
    assert found["broken"].reason == "ZeroDivisionError: a bug"
    assert found["absent"].reason == "not on Mondays"
    assert "--flex" in found["slow to build"].reason
    for name, result in found.items():
        timed = name in ("base", "good")
        assert (result.seconds is not None) == (result.ratio is not None) == timed
        assert result.memory == (7 if timed else None)
    assert found["good"].ratio.median == pytest.approx(2.0)
    assert found["good"].note == "note of good"


def test_a_switch_lets_in_what_takes_long() -> None:
    settings = Settings(switches=frozenset({"flex"}))
    assert runner.admit(ROW, contender("x", switch="flex"), settings)[0].status == "ok"


def test_without_a_baseline_there_is_no_ratio() -> None:
    base, good = runner.measure(ROW, [contender("base", math.nan), contender("good")], Settings(repeats=3))
    assert base.status == "wrong"
    assert good.ratio is None
    assert good.seconds == Spread(0.01, 0.01, 0.01)


def test_nobody_waits_for_a_contender_for_ever() -> None:
    def make() -> Run:
        for _ in range(1000):
            sleep(0.01)
        raise AssertionError

    before, start = signal.getsignal(signal.SIGALRM), perf_counter()
    result, run = runner.admit(ROW, replace(contender("x"), make=make), Settings(limit=0.05))
    assert (result.status, run) == ("unavailable", None)
    assert "not ready within 0.05 s" in result.reason
    assert perf_counter() - start < 5
    assert signal.getsignal(signal.SIGALRM) is before


# --- the clock -------------------------------------------------------------------------------------------------


def test_a_spread_is_median_and_tenths() -> None:
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)
    assert Spread.of([float(i) for i in range(11)]) == Spread(5.0, 1.0, 9.0)


def test_contenders_alternate_and_every_second_round_runs_backwards() -> None:
    log: list[str] = []
    runs = {name: contender(name, log=log).make() for name in "abc"}
    runner.time(runs, "a", Settings(repeats=3))
    timed = [entry[0] for entry in log][12:]  # after four calls each to see how long they take
    assert timed == [name for order in ("abc", "cba", "abc") for name in order for _ in range(2)]


def test_short_calls_are_timed_many_at_a_time_and_long_ones_without_a_call_before() -> None:
    log: list[str] = []
    seconds = {"short": 1e-4, "middle": 0.01, "long": 0.5}
    runs = {name: contender(name, seconds=s, log=log).make() for name, s in seconds.items()}
    samples, calls = runner.time(runs, "long", Settings(repeats=1))
    assert calls == {"short": 50, "middle": 1, "long": 1}
    assert log[-5:] == ["short 1", "short 50", "middle 1", "middle 1", "long 1"]
    assert {name: s[0] for name, s in samples.items()} == pytest.approx(seconds)


def test_the_slow_take_part_in_the_first_rounds_only() -> None:
    runs = {"base": contender("base").make(), "slow": contender("slow", seconds=0.081).make()}
    samples, _ = runner.time(runs, "base", Settings(repeats=6))
    assert {name: len(s) for name, s in samples.items()} == {"base": 6, "slow": runner.FEWEST_ROUNDS}


@pytest.mark.parametrize(("takes", "rounds"), [(0.5, 6), (2.0, 5), (6.0, 1), (40.0, 1)])
def test_a_slow_contender_is_called_as_often_as_fits_into_the_time(takes: float, rounds: int) -> None:
    log: list[str] = []
    runs = {"base": contender("base").make(), "slow": contender("slow", seconds=takes, log=log).make()}
    samples, _ = runner.time(runs, "slow", Settings(repeats=6, seconds=10.0))
    assert len(samples["slow"]) == rounds
    assert len(samples["base"]) == 6
    assert log.count("slow 1") <= rounds + 1, "beyond its rounds, once to see how long it takes"
    assert takes < 10 or log == ["slow 1"], "a call longer than the whole time is not repeated"


def test_a_row_ends_when_its_time_is_up() -> None:
    samples, _ = runner.time({"base": contender("base").make()}, "base", Settings(repeats=50, seconds=1e-9))
    assert len(samples["base"]) == runner.FEWEST_ROUNDS


def test_a_ratio_is_formed_within_each_round() -> None:
    """The machine slows down fourfold from round to round: ratios of medians would not be 2 in every round."""
    turns = {"base": 0, "twice as fast": 0}

    def drifting(name: str, seconds: float) -> Contender:
        def sample(calls: int) -> float:
            turns[name] += 1
            return seconds * 4.0 ** (turns[name] // 2)

        run = Run(sample, lambda: results_of(output=[1.0]), lambda: None)
        return Contender(name, lambda: run, lambda: results_of(output=[1.0]))

    found = runner.measure(ROW, [drifting("base", 0.02), drifting("twice as fast", 0.01)], Settings(repeats=5))
    assert found[1].ratio == Spread(2.0, 2.0, 2.0)
    assert found[1].seconds.high > 10 * found[1].seconds.low


def test_threads_come_back() -> None:
    before = torch.get_num_threads()
    with runner.threads(before + 1):
        assert torch.get_num_threads() == before + 1
        with runner.threads(None):
            assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_a_run_in_this_process_takes_real_time_and_keeps_gradients_off() -> None:
    seen: list[bool] = []

    def call() -> None:
        seen.append(torch.is_grad_enabled())
        sleep(0.002)

    def results() -> Results:
        return {"output": torch.ones(1)}

    assert 0.004 <= here(call, results, grad=False).sample(2) < 1.0
    here(call, results, grad=True).sample(1)
    assert seen == [False, False, True]


# --- the machine -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps a mark that can be reset")
def test_memory_of_a_call() -> None:
    for _ in range(2):  # the allocator keeps nothing back the second time
        found = machine.extra_memory(lambda: torch.ones(6 << 20).sum())
        assert found == pytest.approx(24 << 20, rel=0.1)
    assert machine.extra_memory(lambda: None) < 2 << 20


def test_limits_are_measured() -> None:
    found = machine.measure_limits(torch.bfloat16, size=32, read_bytes=1 << 16)
    assert set(found.product) == {"float32", "bfloat16"}
    assert {"sum, float32", "dot, bfloat16", "matrix-vector, float32"} <= set(found.read)
    assert all(0 < rate < math.inf for rates in (found.product, found.read) for rate in rates.values())
    double = Limits({k: 2 * v for k, v in found.product.items()}, 32, dict.fromkeys(found.read, 0.0), 1 << 16)
    assert found.better(double).product == double.product
    assert found.better(double).read == found.read


def test_the_machine_line() -> None:
    about = machine.describe("the command")
    assert about["command"] == "the command"
    assert about["threads"] == torch.get_num_threads()
    assert about["versions"]["torch"] == torch.__version__
    assert about["cpu"]
    assert about["instruction_set"]
    assert 1 <= about["cores"] <= 4096


# --- other people's layers -------------------------------------------------------------------------------------


def test_what_is_missing_is_named_with_the_way_to_it() -> None:
    reason = contenders.missing("math", "no_such_package", "no_such_other")
    assert reason == f"no_such_package and no_such_other not installed: {contenders.INSTALL}"
    assert contenders.missing("math") is None


@pytest.mark.parametrize("mode", ["training", pytest.param("inference", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "package"), [("x-transformers", "x_transformers"), ("Keras on JAX", "keras")])
def test_the_extra_layers_compute_what_they_should(name: str, package: str, mode: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: it is in the extra bench")
    (row,) = (row for row in tiny_rows("layer") if row.mode == mode)
    (found,) = (c for c in SUITES["layer"].contenders(row) if c.name == name)
    result, run = runner.admit(row, found, Settings())
    assert result.status == "ok", result
    assert run is not None
    assert 0 < run.sample(2) < 60
    run.close()


def test_weights_go_to_keras_and_gradients_come_back() -> None:
    shapes = {f"{p}_proj.{kind}": (6, 6) if kind == "weight" else (6,) for p in "qkv" for kind in ("weight", "bias")}
    shapes |= {"out_proj.weight": (6, 6), "out_proj.bias": (6,)}
    ours = {name: torch.randn(shape).numpy() for name, shape in shapes.items()}
    theirs = keras_worker._to_keras(ours, 2)
    assert theirs["k_proj.weight"].shape == (6, 2, 3)
    assert theirs["k_proj.weight"][4, 1, 2] == ours["k_proj.weight"][5, 4], "in, head, column <- out, in"
    assert theirs["out_proj.weight"][1, 2, 4] == ours["out_proj.weight"][4, 5], "head, column, out <- out, in"
    back = keras_worker._from_keras(list(theirs.values()), 6)
    assert all((back[name] == value).all() for name, value in ours.items())


@pytest.mark.parametrize("mechanism", layer.OURS)
def test_no_number_of_a_layer_is_one_that_could_be_left_out(mechanism: str) -> None:
    """Biases start at zero, and a contender that ignored one would pass the gate."""
    row = tiny_rows("layer")[1]
    first, second = (layer._ours(row, mechanism, bias=True).state_dict() for _ in range(2))
    assert any(name.endswith("bias") for name in first)
    for name, parameter in first.items():
        assert parameter.abs().min() > 0, name
        assert parameter.equal(second[name]), f"{name} is not the same in every run"
    assert not any(name.endswith("bias") for name in layer._ours(row, mechanism, bias=False).state_dict())


# --- targets ---------------------------------------------------------------------------------------------------


def result(shape: Shape, ratio: float, who: str = "expressive auto", **more: object) -> Result:
    row = Row("kernel", shape, "plain", "forward", torch.float32)
    return Result(row, who, Work(), seconds=Spread(1.0, 1.0, 1.0), ratio=Spread(ratio, ratio, ratio), **more)


TARGET = targets.Target("t", "kernel", "forward", "expressive auto", 1.4, PAPER[:3])


def judged(target: targets.Target, *results: Result) -> targets.Verdict:
    found = targets.verdict(target, results, LIMITS)
    assert found is not None
    return found


def test_each_row_must_reach_a_target() -> None:
    good = [result(shape, 1.5) for shape in PAPER[:3]]
    verdict = judged(TARGET, *good)
    assert (verdict.met, verdict.found, verdict.detail) == (True, 1.5, "")
    verdict = judged(TARGET, *good[:2], result(PAPER[2], 1.39))
    assert (verdict.met, verdict.found, verdict.detail) == (False, 1.39, f"{PAPER[2]}: 1.39")
    verdict = judged(TARGET, *good[:2])
    assert (verdict.met, verdict.detail) == (None, "1 of 3 shapes not run")
    assert judged(TARGET, result(PAPER[0], 1.0)).met is False, "a miss is a miss, whatever was not run"


def test_a_mean_is_geometric_and_needs_every_row() -> None:
    target = replace(TARGET, mean=True)
    rows = [result(shape, ratio) for shape, ratio in zip(PAPER[:3], (1.0, 1.5, 2.0), strict=True)]
    verdict = judged(target, *rows)
    assert verdict.found == pytest.approx(3.0 ** (1 / 3))
    assert verdict.met is True
    assert judged(replace(target, least=1.45), *rows).met is False
    assert judged(target, *rows[1:]).met is None


def test_who_could_not_be_timed_has_missed() -> None:
    absent = replace(result(PAPER[0], 9.9), status="unavailable", reason="no library", seconds=None, ratio=None)
    for target in (TARGET, replace(TARGET, mean=True)):
        verdict = judged(target, absent, *(result(shape, 9.9) for shape in PAPER[1:3]))
        assert verdict.met is False
        assert "no library" in verdict.detail


def test_never_slower_allows_for_the_noise_and_no_more() -> None:
    target = replace(TARGET, least=1.0, ties=True, shapes=PAPER[:1])
    assert judged(target, result(PAPER[0], 0.985)).met is True
    assert judged(target, result(PAPER[0], 0.975)).met is False
    assert judged(replace(target, ties=False), result(PAPER[0], 0.985)).met is False


def test_other_rows_do_not_count() -> None:
    for other in (
        result(PAPER[5], 9.9),
        result(PAPER[0], 9.9, "expressive chunked"),
        replace(result(PAPER[0], 9.9), row=Row("kernel", PAPER[0], "causal", "forward", torch.float32)),
        replace(result(PAPER[0], 9.9), row=Row("kernel", PAPER[0], "plain", "forward+backward", torch.float32)),
    ):
        assert targets.verdict(TARGET, [other], LIMITS) is None


def test_bandwidth_is_a_share_of_the_best_read() -> None:
    target = replace(TARGET, measure="bandwidth", shapes=PAPER[:1])
    verdict = judged(target, replace(result(PAPER[0], 1.0), work=Work(bytes=7.5e9)))
    assert verdict.found == pytest.approx(0.75)


def test_memory_must_grow_like_the_length() -> None:
    short, long = kernel.SUITE.shapes[-2:]
    assert (long.length, short.length) == (4096, 1024)
    for grown, met in ((4.0, True), (4.4, True), (5.0, False), (16.0, False)):
        rows = [
            result(short, 1.0, "expressive chunked", memory=10 << 20),
            result(long, 1.0, "expressive chunked", memory=int(grown * (10 << 20))),
        ]
        (verdict,) = (v for v in targets.verdicts(rows, LIMITS) if "memory" in v.name)
        assert verdict.met is met


def test_every_target_speaks_of_rows_that_there_are() -> None:
    for target in targets.TARGETS:
        rows = SUITES[target.suite].rows(torch.float32)
        matching = [row for row in rows if row.mode == target.mode and target.variant in (None, row.variant)]
        assert set(target.shapes) <= {row.shape for row in matching}, target.name
        names = {c.name for c in SUITES[target.suite].contenders(matching[0])}
        assert target.contender in names, target.name
    assert len({target.name for target in targets.TARGETS}) == len(targets.TARGETS)
    assert statistics.mean(target.least for target in targets.TARGETS) > 1
