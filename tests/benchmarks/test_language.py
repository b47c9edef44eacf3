"""The scripts of the text studies: their models, the joined text, losses at a time, tables, caches in int8."""

from __future__ import annotations

import io
import json
import math
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("benchmarks.language", reason="a source distribution has no benchmarks")

from benchmarks.language import int8_cache, join_imdb, speed, study, tables

from benchmarks import markdown
from better_attention.lab.tasks.variant import Variant


def test_equal_models_are_within_four_per_cent_and_windowed_ones_as_wide_as_standard() -> None:
    sizes = {model.name: sum(p.numel() for p in model.build().parameters()) for model in study.EQUAL}
    standard = sizes["standard"]
    assert sizes["expressive"] == standard
    assert all(abs(size / standard - 1) < 0.04 for size in sizes.values())
    for model in study.EQUAL:
        assert model.task().size(Variant.of(model.mechanism), study.HEADS) == sizes[model.name]
    for model in study.WINDOWED:
        built = model.build(128)
        assert built.tokens.weight.shape[1] == 64
        assert built.blocks[0].attention.window == model.window  # type: ignore[union-attr] # a module


def test_reviews_are_joined_in_an_order_that_mixes_them(tmp_path: Path) -> None:
    path = tmp_path / "reviews.tar.gz"
    reviews = {
        f"aclImdb/train/{kind}/{n}_1.txt": f"{kind}  {n}.<br /><br />End" for kind in ("neg", "pos") for n in range(4)
    }
    reviews["aclImdb/test/pos/9_9.txt"] = "a secret"
    with tarfile.open(path, "w:gz") as archive:
        for name, text in reviews.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    whole = join_imdb.joined(path, 10_000)
    assert sorted(whole.strip().split("\n\n")) == sorted(
        f"{kind} {n}.\nEnd" for kind in ("neg", "pos") for n in range(4)
    )
    kinds = [line[:3] for line in whole.split("\n") if line[:3] in ("neg", "pos")]
    assert kinds not in (sorted(kinds), sorted(kinds, reverse=True))
    assert join_imdb.joined(path, 37) == whole[:37]


def test_a_loss_at_an_update_lies_between_validations() -> None:
    curve = [4.0, 3.0, 2.5]  # after 50, 100, 150 updates
    assert [tables.at_update(curve, n) for n in (50, 75, 100, 140, 150)] == pytest.approx([4.0, 3.5, 3.0, 2.6, 2.5])
    assert tables.at_update(curve, 10) == 4.0, "before the first validation nothing is known"
    assert tables.at_update([4.0], 50) == 4.0


def results(folder: Path, losses: dict[str, list[float]], epochs: int = study.EPOCHS) -> None:
    """What a comparison writes, as far as the tables read it."""
    folder.mkdir(parents=True)
    runs = [
        {
            **{"mechanism": m, "seed": seed, "test_loss": loss, "test_bits_per_character": loss / math.log(2)},
            **{"test_accuracy": 50 - loss, "total_params": 1000, "cache_bytes_per_token": 96.0},
        }
        for m, each in losses.items()
        for seed, loss in enumerate(each)
    ]
    (folder / "results.json").write_text(json.dumps(runs))
    lines = ["run,epoch,validation_loss"]
    for run in runs:
        # Straight down to the test loss, from 4 more.
        lines += [
            f"{run['mechanism']}-h2-s{run['seed']},{n},{run['test_loss'] + 4 - 4 * n / epochs}"
            for n in range(1, epochs + 1)
        ]
    (folder / "curves.csv").write_text("\n".join(lines) + "\n")


def row(part: str, model: str, milliseconds: float, **more: Any) -> dict[str, Any]:
    """A row of speed.json."""
    return {
        "part": part,
        "model": model,
        "seconds": {"median": milliseconds / 1e3},
        "to_standard": {"median": milliseconds / 10},
    } | more


def test_tables_by_hand(tmp_path: Path) -> None:
    home = tmp_path / tables.HOME
    results(home, {"standard": [2.0, 2.1, 2.2], "efficient": [1.9, 2.0, 2.1001], "super": [2.5, 2.0, 2.3]})
    results(home / "window-16", {"standard": [2.3, 2.4, 2.5], "super": [2.2, 2.4, 2.7]})
    timed = [row("training", "standard", 10.0), row("training", "efficient", 5.0), row("training", "super", 10.0)]
    timed += [row("windows, decoding at 1,024", "super, window 16", 2.0, cache_bytes=4096)]
    (home / "speed.json").write_text(json.dumps({"rows": timed}))
    text = tables.document(tmp_path)
    assert "| efficient | 1,000 | 3 | 2.000 ± 0.249 |" in text
    assert "−0.100 ± 0.000, p < 0.001 | lower | +0.10 ± 0.00, p < 0.001 | higher |" in text
    # Efficient does its 400 updates in 2 s, the others 200: their losses are those after 200 of 400 updates.
    assert "equal training time, 2.0 s of one thread" in text
    assert "| standard | 10.0 | 200 | 4.100 ± 0.248 |" in text
    assert "| efficient | 5.0 | 400 | 2.000 ± 0.249 | −2.100" in text
    assert "| super | 16 | 1,000 | 3 |" in text
    assert "| – | – | – | 500 | 4,096 |" in text
    assert "| super, window 16 − standard, window 16 | +0.033" in text
    assert "window 32" not in text


def test_tables_of_the_longer_study_by_hand(tmp_path: Path) -> None:
    home = tmp_path / study.LONG
    results(home, {"standard": [2.0, 2.1, 2.2], "efficient": [1.9, 2.0, 2.1001]}, study.LONG_EPOCHS)
    results(home / "grouped", {"standard": [2.1, 2.2, 2.3]}, study.LONG_EPOCHS)
    timed = [row("longer, training", name, time) for name, time in (("standard", 10.0), (study.GROUPED, 20.0))]
    timed += [row("longer, decoding", study.GROUPED, 5.0)]
    (home / "speed.json").write_text(json.dumps({"rows": timed}))
    text = tables.longer(tmp_path)
    assert f"| {study.GROUPED} | 1,000 | 3 | 2.200 ± 0.248 |" in text
    # Standard does 2,000 updates in 20 s, grouped 1,000, half the way down from 4 more.
    assert "equal training time, 20.0 s of one thread" in text
    assert "| standard | 10.0 | 2000 | 2.100 ± 0.248 |" in text
    assert f"| {study.GROUPED} | 20.0 | 1000 | 4.200 ± 0.248 | +2.100" in text
    assert f"| {study.GROUPED} | 200 | 2.00 | 96 |" in text
    assert f"| efficient − {study.GROUPED} | −0.200" in text


def test_one_head_of_keys_makes_the_smallest_cache() -> None:
    built = {model.name: model.build() for model in study.LONGER}
    grouped = built[study.GROUPED]
    assert [block.attention.num_kv_heads for block in grouped.blocks] == [1, 1]  # type: ignore[union-attr] # modules
    sizes = {name: speed.cache_bytes(model, 64) for name, model in built.items()}
    assert sizes[study.GROUPED] == min(sizes.values()) == 64 * 544
    assert sizes["efficient"] == 64 * 576


def test_tables_leave_what_stands_around_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results(tmp_path / tables.HOME, {"standard": [2.0, 2.1], "super": [1.0, 1.2]})
    path = tmp_path / tables.HOME / "README.md"
    path.write_text(f"before\n{markdown.BEGIN}\nold\n{markdown.END}\nafter\n")
    monkeypatch.setattr("sys.argv", ["tables", "--results", str(tmp_path)])
    for _ in range(2):
        tables.main()
    text = path.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert text.count("### Tiny Shakespeare: equal parameters") == 1


def test_an_int8_cache_is_nearly_the_same_in_a_third_of_the_bytes() -> None:
    torch.manual_seed(0)
    model = study.Model("standard").build(24).eval()
    tokens = torch.randint(study.VOCABULARY, (3, 24))
    with torch.inference_mode():
        whole = model(tokens)
    exact, bytes_float = int8_cache.step_by_step(model, tokens, None)
    rough, bytes_int8 = int8_cache.step_by_step(model, tokens, torch.int8)
    assert torch.allclose(exact, whole, atol=1e-5)
    assert 0 < float((rough - exact).abs().max()) < 0.02 * float(exact.std())
    assert bytes_int8 < 0.33 * bytes_float


def test_speed_is_measured_for_all_models_of_a_part() -> None:
    models = (study.Model("standard"), study.Model("super", 16))
    taken = speed.updates(models, 32, 2, 0.0)
    assert list(taken) == ["standard", "super, window 16"]
    assert all(len(each) >= 3 and min(each) > 0 for each in taken.values())
    seconds, sizes = speed.decoded(models, 40, 0.0)
    assert all(len(each) >= 3 for each in seconds.values())
    assert sizes["standard"] == 2 * 2 * 40 * 64 * 4
    # One tensor in place of two, and the room to slide of a window.
    assert sizes["super, window 16"] == 2 * 40 * 64 * 4
