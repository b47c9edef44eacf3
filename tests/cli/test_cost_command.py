"""``better-attention cost``: the numbers of the papers, the figures, and what is refused."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from better_attention.cli import UserError
from better_attention.cli import cost as verb
from better_attention.costs import cost


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    return verb.run(parser.parse_args(words))


def as_json(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert run(*words, "--json") == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("sizes", "params"),
    [  # PAPERS.md section 1: standard, optimised, efficient, super
        ((128, 4, 64), (66_048, 49_536, 33_024, 37_184)),
        ((256, 8, 257), (263_168, 197_376, 131_584, 197_890)),
        ((32, 4, 32), (4_224, 3_168, 2_112, 3_168)),
        ((64, 4, 64), (16_640, 12_480, 8_320, 12_480)),
    ],
)
def test_parameters_of_the_papers_layers(
    capsys: pytest.CaptureFixture[str], sizes: tuple[int, int, int], params: tuple[int, ...]
) -> None:
    d, h, n = map(str, sizes)
    rows = as_json(capsys, "--embed-dim", d, "--heads", h, "--length", n)
    found = {row["mechanism"]: row["params"] for row in rows}
    assert found == dict(zip(("standard", "optimised", "efficient", "super"), params, strict=True)) | {
        "expressive": params[0]
    }


def test_a_kernel_for_each_head_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    """super has 2(d² + d) + l² + l parameters; with a kernel a head h(l² + l) instead of the last two terms."""
    words = ("--embed-dim", "32", "--heads", "4", "--length", "16")
    rows = as_json(capsys, *words, "--mechanisms", "super,super+per-head,super+identity")
    assert [row["mechanism"] for row in rows] == ["super", "super+per-head", "super+identity"]
    assert [row["params"] for row in rows] == [2112 + 272, 2112 + 4 * 272, 2112 + 272]


def test_every_count_is_that_of_the_library(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    words = ("--embed-dim", "24", "--heads", "3", "--length", "7", "--batch", "5", "--dtype", "bfloat16")
    (row,) = as_json(capsys, *words, "--mechanisms", "super+expressive")
    sizes: dict[str, Any] = {"mechanism": "super+expressive", "batch": 5, "dtype": torch.bfloat16}
    expected = cost(24, 3, 7, **sizes)
    assert row == {
        "mechanism": "super+expressive",
        "params": expected.params,
        "flops_paper": expected.flops_paper,
        "flops": expected.flops,
        "flops_forward": cost(24, 3, 7, backward=False, **sizes).flops,
        "flops_to_standard": expected.flops / cost(24, 3, 7, batch=5).flops,
        "weight_bytes": 2 * expected.params,
        "cache_bytes_per_token": 2 * 2 * 24,
        "cache_bytes": 5 * 7 * 2 * 2 * 24,
    }


def test_a_window_bounds_the_cache_and_the_operations(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--embed-dim", "24", "--heads", "3", "--length", "700", "--mechanisms", "standard,super")
    whole, windowed = as_json(capsys, *words), as_json(capsys, *words, "--window", "16")
    assert [row["cache_bytes"] for row in whole] == [700 * 2 * 24 * 4, 700 * 2 * 24 * 4]
    assert [row["cache_bytes"] for row in windowed] == [16 * 2 * 24 * 4, 16 * 24 * 4]
    assert [row["flops"] for row in windowed] == [
        cost(24, 3, 700, mechanism=m, window=16).flops for m in ("standard", "super")
    ]
    assert all(row["flops_to_standard"] < 1 for row in windowed)
    assert run(*words, "--window", "16") == 0
    assert "float32, window 16" in " ".join(capsys.readouterr().out.split())


def test_heads_that_share_keys_and_values(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One head of width 8 for three query heads; what is not projected stays as it is, and it is said."""
    monkeypatch.setenv("COLUMNS", "200")
    words = ("--embed-dim", "24", "--heads", "3", "--length", "7")
    rows = as_json(capsys, *words, "--kv-heads", "1")
    assert {row["mechanism"]: row["kv_heads"] for row in rows} == {
        **{"standard": 1, "optimised": 1, "expressive": 1},
        **{"efficient": None, "super": None},
    }
    for row in rows:
        expected = cost(24, 3, 7, mechanism=row["mechanism"], num_kv_heads=row["kv_heads"])
        counts = (row["params"], row["flops"], row["cache_bytes"])
        assert counts == (expected.params, expected.flops, expected.cache_bytes)
    found = {row["mechanism"]: row["cache_bytes_per_token"] for row in rows}
    assert found == {
        **{"standard": 2 * 8 * 4, "optimised": (8 + 24) * 4, "expressive": 2 * 8 * 4},
        **{"efficient": 24 * 4, "super": 2 * 24 * 4},
    }
    assert rows[0]["flops_to_standard"] < 1
    assert run(*words, "--kv-heads", "1") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "float32, 1 head of projected keys and values" in out
    assert "--kv-heads does not apply without projected keys to group: efficient, super." in out
    assert run(*words, "--kv-heads", "3") == 0
    assert "does not apply" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--kv-heads", "3"), "--kv-heads=3 must divide --heads=4"),
        (("--kv-heads", "8"), "--kv-heads=8 must divide --heads=4"),
        (("--kv-heads", "2", "--mechanisms", "efficient,super"), "efficient, super has no W_K: each of the 4 heads"),
        (("--kv-heads", "2", "--figure", "2", "--out", "f.png"), "knows no grouped heads: omit --kv-heads"),
    ],
)
def test_heads_that_cannot_be_shared(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(*words)


def test_a_figure_knows_no_window(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="knows no window"):
        run("--figure", "2", "--out", str(tmp_path / "f.png"), "--window", "8")


def test_efficient_keeps_one_tensor(capsys: pytest.CaptureFixture[str]) -> None:
    rows = as_json(capsys, "--mechanisms", "standard,efficient,optimized")
    assert [row["mechanism"] for row in rows] == ["standard", "efficient", "optimised"]
    assert [row["cache_bytes_per_token"] for row in rows] == [1024, 512, 1024]


def test_the_table_says_the_same(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run() == 0
    out = capsys.readouterr().out
    line = next(line.split() for line in out.splitlines() if line.split()[:1] == ["super"])
    assert line == ["super", "37,184", "344,064", "7,340,032", "22,020,096", "0.700", "148,736", "1,024", "65,536"]
    assert "d = 128, h = 4, ℓ = 64, batch 1, float32" in out


def test_a_narrow_screen_cuts_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run() == 0
    words = capsys.readouterr().out.split()
    for wanted in ("standard", "optimised", "efficient", "super", "expressive", "22,020,096", "31,457,280", "148,736"):
        assert wanted in words


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_a_figure_replaces_a_figure_and_nothing_else(tmp_path: Path, ending: str) -> None:
    words = ("--figure", "2", "--out", str(path := tmp_path / f"f.{ending}"))
    for _ in range(2):
        assert run(*words) == 0
    path.write_bytes(b"a photo of mine")
    with pytest.raises(ValueError, match="this file already exists and was not written by"):
        run(*words)
    assert path.read_bytes() == b"a photo of mine"
    with pytest.raises(ValueError, match=r"does not exist\. Create it first"):
        run("--figure", "2", "--out", str(tmp_path / "nodir" / path.name))
    assert not (tmp_path / "nodir").exists()


@pytest.mark.parametrize("form", ["paper", "exact"])
def test_a_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str) -> None:
    path = tmp_path / "figure.svg"
    assert run("--figure", "2", "--out", str(path), "--form", form) == 0
    assert path.read_bytes().startswith(b"<?xml")
    assert str(path) in capsys.readouterr().out


def test_figure_3_prints_the_papers_averages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--figure", "3", "--out", str(tmp_path / "figure.svg")) == 0
    out = capsys.readouterr().out
    for heads, average in ((1, "29.7"), (2, "24.9"), (4, "20.3"), (8, "16.2")):
        paper = {1: 30, 2: 25, 4: 20, 8: 16}[heads]
        assert (
            f"h = {heads}: standard needs {average} % more FLOPs than efficient on average (the paper prints {paper} %)"
            in out
        )
    assert "averaged over ℓ and d = 1, 2, 4, ..., 1024\n" in out
    found = as_json(capsys, "--figure", "3", "--out", str(tmp_path / "figure.svg"))
    assert {h: round(100 * v, 1) for h, v in found["average_overheads"].items()} == {
        "1": 29.7,
        "2": 24.9,
        "4": 20.3,
        "8": 16.2,
    }
    assert found["paper"] == {"1": 0.3, "2": 0.25, "4": 0.2, "8": 0.16}
    assert found["grid"] == [2**k for k in range(11)]


def test_figure_3_from_the_exact_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--figure", "3", "--form", "exact", "--out", str(tmp_path / "figure.svg")) == 0
    out = capsys.readouterr().out
    grid = [2**k for k in range(11)]
    for heads in (1, 2, 4, 8):  # forward, standard 8ℓd² + 4ℓ²d, efficient 4ℓd² + 4ℓ²d
        ratios = [(2 * d + n) / (d + n) for d in grid if d % heads == 0 for n in grid]
        assert f"h = {heads}: standard needs {100 * (sum(ratios) / len(ratios) - 1):.1f} % more" in out
    assert "the paper prints" not in out  # its averages are of eq. 24
    assert "averaged over ℓ and d = 1, 2, 4, ..., 1024, where h divides d\n" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--embed-dim", "10", "--heads", "4"), "--embed-dim must be divisible by --heads, received 10 and 4"),
        (("--figure", "2"), "--figure 2 needs --out FILE"),
        (("--out", "x.png"), "--out is the file of a figure: say which with --figure"),
    ],
)
def test_words_that_do_not_go_together(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(*words)


@pytest.mark.parametrize(
    "words",
    [("--figure", "1"), ("--heads", "0"), ("--length", "-3"), ("--mechanisms", "standrad"), ("--dtype", "int8")],
)
def test_words_the_parser_refuses(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run(*words)
    assert stop.value.code == 2
    assert words[0] in capsys.readouterr().err


def test_a_kind_of_picture_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'x\.gif' names no kind of picture: end it in \.png, \.svg or \.pdf"):
        run("--figure", "2", "--out", str(tmp_path / "x.gif"))
