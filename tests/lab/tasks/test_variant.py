"""Variants: names that come back, folders, what cannot be, and layers that are really built so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from better_attention import MECHANISMS, MultiheadAttention
from better_attention.lab.runs.job import Job
from better_attention.lab.runs.load import load_run
from better_attention.lab.tasks.variant import Variant
from better_attention.layer.alignment import Alignment
from better_attention.mechanism import Mechanism
from helpers import tiny

SUFFIXES = ("", "+per-head", "+identity", "+per-head+identity")
ALIGNED = ("super", "super+expressive", "standard+align", "optimised+align", "efficient+expressive+align")


def names() -> Iterator[str]:
    for mechanism in ALIGNED:
        for suffix in SUFFIXES:
            yield mechanism + suffix


@pytest.mark.parametrize("name", [*MECHANISMS, *names()])
def test_names_come_back(name: str) -> None:
    variant = Variant.of(name)
    assert Variant.of(variant.name) == variant
    assert Variant.of(variant) is variant
    assert variant.per_head == ("per-head" in name)
    assert variant.identity == ("identity" in name)
    assert variant.mechanism == Mechanism.of(name.replace("+per-head", "").replace("+identity", ""))


def test_the_order_of_suffixes_does_not_matter() -> None:
    spellings = ["super+expressive+per-head+identity", "super+identity+expressive+per-head"]
    assert len({Variant.of(name) for name in spellings}) == 1
    assert len({Variant.of(name).name for name in spellings}) == 1


def test_a_mechanism_is_a_variant() -> None:
    assert Variant.of(Mechanism.of("super")) == Variant.of("super")
    assert Variant.of("super").options == {}
    assert Variant.of("super+per-head+identity").options == {"align_heads": "per_head", "align_init": "identity"}


def test_every_variant_has_a_folder_of_its_own() -> None:
    folders = [Job(tiny.task(), Variant.of(name), 4, 0).folder_name for name in (*MECHANISMS, *names())]
    distinct = {Variant.of(name) for name in (*MECHANISMS, *names())}
    assert len(set(folders)) == len(distinct)
    everything = Variant.of("super+per-head+identity")
    assert Job(tiny.task(), everything, 4, 12).folder_name == "super.per-head.identity-h4-s12"
    for folder in folders:
        assert folder.isascii()
        assert len(folder) <= 64


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("standard+per-head", "mechanism 'standard' has no W_A to lay out. Take 'super', or add [+]align"),
        ("efficient+identity", "'efficient[+]identity': mechanism 'efficient' has no W_A"),
        ("hyper", "unknown mechanism 'hyper'.*also takes [+]per-head and [+]identity"),
        ("super+per_head", "per_head"),
        ("super+", "super"),
        ("", "unknown mechanism"),
        ("+per-head", "unknown mechanism"),
    ],
)
def test_what_cannot_be_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Variant.of(name)


def test_a_layout_of_what_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="has no W_A"):
        Variant(MECHANISMS["optimised"], identity=True)


def layers(name: str, heads: int = 3) -> list[Alignment]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = tiny.task().build(name, heads)
    found = [module.align for module in model.modules() if isinstance(module, MultiheadAttention)]
    assert len(found) == 2
    assert all(isinstance(one, Alignment) for one in found)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("mechanism", ["super", "standard+align"])
def test_per_head_builds_a_kernel_each(mechanism: str) -> None:
    """16 patches, 3 heads: (16, 16) shared, (3, 16, 16) otherwise, and no two of them the same."""
    for shared, own in zip(layers(mechanism), layers(f"{mechanism}+per-head"), strict=True):
        assert shared.weight.shape == (16, 16)
        assert own.weight.shape == (3, 16, 16)
        assert not torch.equal(own.weight[0], own.weight[1])


def test_identity_starts_as_the_identity_and_learns(tmp_path: Path) -> None:
    for one in layers("super+identity"):
        assert torch.equal(one.weight, torch.eye(16))
        assert one.bias is not None
        assert not one.bias.any()
    for one in layers("super+per-head+identity"):
        assert torch.equal(one.weight, torch.eye(16).expand(3, 16, 16))
    for one in layers("super"):
        assert not torch.equal(one.weight, torch.eye(16))


def test_super_from_the_identity_starts_as_efficient() -> None:
    from better_attention.lab.training.randomness import initial_model

    inputs = tiny.splits().test.inputs
    with torch.inference_mode():
        outputs = {
            name: initial_model(tiny.task(), Variant.of(name), 3, seed=0).eval()(inputs)
            for name in ("efficient", "super+identity", "super+per-head+identity", "super")
        }
    for name in ("super+identity", "super+per-head+identity"):
        torch.testing.assert_close(outputs[name], outputs["efficient"], rtol=1e-5, atol=1e-6)
    assert (outputs["super"] - outputs["efficient"]).abs().max() > 1e-3


def test_a_run_of_a_variant_comes_back(tmp_path: Path) -> None:
    folder = tmp_path / "super.per-head.identity-h3-s0"
    record = tiny.training(folder, "super+per-head+identity", epochs=1).run().values
    assert record["mechanism"] == "super+per-head+identity"
    assert record["attention_params"] == 2 * (6 * 6 + 6) + 3 * (16 * 16 + 16)
    model = load_run(folder).model
    found = [module for module in model.modules() if isinstance(module, Alignment)]
    assert [one.weight.shape for one in found] == [(3, 16, 16)] * 2
