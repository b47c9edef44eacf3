"""docs/scale.md: its tables are what the code computes, and the arithmetic agrees with models that exist."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("benchmarks.scale", reason="a source distribution has no benchmarks")

from benchmarks.scale import arithmetic, page
from benchmarks.scale.arithmetic import DECODER, MECHANISMS, VIT, Machine

import better_attention as ba


def test_the_page_is_current() -> None:
    text = page.PAGE.read_text("utf-8")
    assert page.current(text) == text, "run python -m benchmarks.scale"


def test_a_page_with_other_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="the page has marks for"):
        page.current("<!-- table: another -->\n<!-- end -->")


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_parameters_are_those_of_a_model(mechanism: str) -> None:
    with torch.device("meta"):
        options = ba.Mechanism.of(mechanism).layer_options(VIT.length)
        d = VIT.width
        block = nn.ModuleList(
            [
                ba.MultiheadAttention(d, VIT.heads, mechanism=mechanism, **options),
                nn.LayerNorm(d),
                nn.LayerNorm(d),
                nn.Linear(d, VIT.hidden),
                nn.Linear(VIT.hidden, d),
            ]
        )
        around = [nn.Conv2d(3, d, 16), nn.Embedding(VIT.length + 1, d), nn.LayerNorm(d), nn.Linear(d, 1000)]
    count = VIT.layers * sum(p.numel() for p in block.parameters())
    count += sum(p.numel() for part in around for p in part.parameters())
    assert arithmetic.params(VIT, mechanism) == count


def test_the_best_known_counts_come_out() -> None:
    assert arithmetic.params(VIT, "standard") == pytest.approx(86.57e6, rel=1e-3)  # as torchvision and timm count it
    macs = arithmetic.work(VIT, "standard").total / 2
    assert macs == pytest.approx(17.56e9, rel=0.01)  # their 17.56 GMACs
    assert arithmetic.cache_bytes(DECODER, "standard") == 2 * arithmetic.cache_bytes(DECODER, "efficient")


def test_a_causal_model_computes_half_of_the_scores() -> None:
    d, n = DECODER.width, DECODER.length
    assert arithmetic.attention_work(DECODER, "standard").scores == 4 * n * n * d / 2
    assert arithmetic.attention_work(DECODER, "super").products == 2 * 2 * n * d * d + 2 * n * n * d / 2


def test_more_servers_take_less_time_and_no_less_network_for_each_byte() -> None:
    machine = Machine()
    few, many = (arithmetic.step(DECODER, "standard", gpus, machine) for gpus in (64, 512))
    assert few.compute == pytest.approx(8 * many.compute)
    assert few.network > many.network  # fewer parts of the batch, each of which gathers the weights


def test_limits_are_where_the_saving_crosses() -> None:
    last = arithmetic.last_length(DECODER, "efficient", 0.05)
    assert last is not None
    assert arithmetic.saving(DECODER, "efficient", last) >= 0.05 > arithmetic.saving(DECODER, "efficient", last + 1)
    assert arithmetic.last_length(DECODER, "expressive", 0.01) is None


def test_measured_bytes_are_those_of_the_formulae() -> None:
    """In float32 every number has 4 bytes, where the formulae have 2 for tensors that are not sums."""
    import json

    document = json.loads(page.MEASURED.read_text("utf-8"))
    shape = document["shape"]
    length, heads, d = shape["length"], shape["heads"], shape["heads"] * shape["head_width"]
    for row in document["rows"]:
        p = row["processes"]
        away = (p - 1) / p
        sums, maxima = 4 * length * (d + heads), 4 * length * heads
        forward = {
            "ring, softmax": away * 8 * length * d,
            "sums, expressive": away * (4 * length * d + sums),
            "sums, softmax": away * (4 * length * d + sums + 2 * maxima),
        }[row["way"]]
        assert row["forward_bytes"] == pytest.approx(forward, rel=1e-9), row["way"]
        assert row["error"] < 1e-6
        if "backward_bytes" in row:
            rows = (3 if "softmax" in row["way"] else 2) * 4 * length * heads
            assert row["backward_bytes"] == pytest.approx(away * (12 * length * d + rows), rel=1e-9)
