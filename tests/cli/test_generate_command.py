"""``better-attention generate``: a small trained model continues prompts, as a user types them."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from better_attention.cli import main
from better_attention.lab.data.tokenisers import tokeniser_of
from better_attention.lab.runs.load import load_run

NAMES = ["ann", "bob", "eve", "tom"]


def language() -> str:
    draw = random.Random(0)
    pairs = (draw.sample(NAMES, 2) for _ in range(600))
    return "".join(f"{a} sees {b}. {b} nods.\n" for a, b in pairs)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of the text-lm task on a language in which the one who is seen nods."""
    folder = tmp_path_factory.mktemp("language")
    assert trained(folder, "--mechanisms", "efficient,super", "--heads", "2", "--epochs", "9") == 0
    return folder / "out"


def trained(folder: Path, *words: str) -> int:
    """The exit status of a comparison of text-lm on the language, with ``folder / "out"`` as its folder."""
    (folder / "text.txt").write_text(language(), "utf-8")
    options = ["--scale", "smoke", "--lr", "0.01", "--batch-size", "16", "--device", "cpu"]
    settings = ["width=32", "length=40", "stride=20", "train_samples=null", "dropout=0.0"]
    options += [word for one in settings for word in ("--set", one)]
    files = ["--data", str(folder / "text.txt"), "--out", str(folder / "out")]
    return main.main(["compare", "text-lm", *files, *options, *words])


@pytest.fixture(scope="module")
def efficient(runs: Path) -> str:
    return str(runs / "efficient-h2-s0")


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[str, str]:
    capsys.readouterr()
    assert main.main(["generate", *map(str, arguments)]) == 0
    printed = capsys.readouterr()
    return printed.out, printed.err


def as_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(said(capsys, *arguments, "--json")[0])
    return rows


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main.main(["generate", *map(str, arguments)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Traceback" not in printed.err
    return printed.err


def test_the_results_have_the_figures_of_a_language_model(runs: Path) -> None:
    header = (runs / "results.csv").read_text("utf-8").splitlines()[0].split(",")
    for name in ("test_bits_per_character", "test_perplexity", "tokens_per_second", "decoded_per_second"):
        assert name in header
    page = (runs / "report.html").read_text("utf-8")
    assert "Test bits/char." in page
    assert "lowest test loss in bits per character" in page.replace("\n", " ")
    bytes_of = {
        run["mechanism"]: run["cache_bytes_per_token"] for run in json.loads((runs / "results.json").read_text())
    }
    assert bytes_of == {"efficient": 2 * 32 * 4, "super": 2 * 2 * 32 * 4}


def test_a_prompt_is_printed_with_what_follows_it(efficient: str, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = said(capsys, efficient, "--prompt", "ann sees bob. ", "--greedy", "--max-tokens", 10)
    assert out == "ann sees bob. bob nods.\n\n"
    assert err.startswith("10 tokens, ")
    assert err.endswith("as many as --max-tokens allows\n")


@pytest.mark.parametrize("mechanism", ["efficient", "super"])
def test_a_stop_string_ends_the_text_before_it(runs: Path, mechanism: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = runs / f"{mechanism}-h2-s0"
    (one,) = as_json(capsys, run, "--prompt", "tom sees eve. ", "--greedy", "--stop", ".", "--stop", "\n")
    assert one == {"prompt": "tom sees eve. ", "text": "eve nods", "tokens": 9, "ended": "stop"}


def test_prompts_of_a_file_are_a_batch(efficient: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = [(a, b) for a in NAMES for b in NAMES if a != b]
    lines = [f"{a} sees {b}. " if n % 2 else f"{a} nods. {a} sees {b}. " for n, (a, b) in enumerate(pairs)]
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n")
    arguments = (efficient, "--prompt-file", tmp_path / "prompts.txt", "--greedy", "--stop", "\n")
    rows = as_json(capsys, *arguments)
    assert [row["prompt"] for row in rows] == lines
    right = sum(row["text"] == f"{b} nods." for row, (_, b) in zip(rows, pairs, strict=True))
    assert right >= 10
    out, _ = said(capsys, *arguments)
    assert out.startswith(f"[1]\n{lines[0]}{rows[0]['text']}\n\n[2]\n")
    (alone,) = as_json(capsys, efficient, "--prompt", lines[1], "--greedy", "--stop", "\n")
    assert alone == rows[1]


def test_a_seed_gives_one_text(efficient: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = (efficient, "--prompt", "ann", "--temperature", 1.5, "--top-k", 12, "--top-p", 0.99, "--min-p", 0.001)
    first, again, other = (said(capsys, *options, "--seed", seed)[0] for seed in (1, 1, 2))
    assert first == again != other
    cold = said(capsys, efficient, "--prompt", "ann", "--temperature", 0.0)[0]
    assert cold == said(capsys, efficient, "--prompt", "ann", "--greedy")[0]
    assert cold == said(capsys, efficient, "--prompt", "ann", "--top-k", 1, "--seed", 7)[0]


def test_a_model_that_can_read_no_more_says_so(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (one,) = as_json(capsys, runs / "super-h2-s0", "--prompt", "ann")
    assert (one["ended"], one["tokens"]) == ("length", 40 - 3 + 1)
    assert "the model reads no more" in said(capsys, runs / "super-h2-s0", "--prompt", "ann")[1]
    (free,) = as_json(capsys, runs / "efficient-h2-s0", "--prompt", "ann")
    assert (free["ended"], free["tokens"]) == ("max_tokens", 200)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing to continue: give a --prompt"),
        (["--prompt", ""], "--prompt '' is empty"),
        (["--prompt", "Xéa"], r"no token for 'X' (U+0058), 'é' (U+00E9)"),
        (["--prompt", "a", "--greedy", "--top-k", "3", "--min-p", "0.1"], "whatever --top-k, --min-p says"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature must be"),
        (
            ["--prompt", "a", "--top-p", "0"],
            "--top-p must be above 0, received 0: no token would be left. For the likeliest, --top-k 1.",
        ),
        (
            ["--prompt", "a", "--temperature", "0", "--top-k", "3"],
            "--temperature 0 takes the likeliest token always, whatever --top-k says",
        ),
        (["--prompt", "a", "--stop", ""], "a stop string is empty"),
        (["--prompt-file", "nowhere.txt"], "--prompt-file nowhere.txt does not exist: name a text file"),
    ],
)
def test_what_cannot_be_done(
    efficient: str, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capsys, efficient, *options)


def test_files_that_are_no_prompts(efficient: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "gap").write_text("a\n\nb\n", "utf-8")
    assert "line 2 is empty" in refused(capsys, efficient, "--prompt-file", tmp_path / "gap")
    (tmp_path / "latin").write_bytes(b"caf\xe9\n")
    assert "is not UTF-8 text" in refused(capsys, efficient, "--prompt-file", tmp_path / "latin")
    for nothing in (b"", b"\n", b"\r\n\r\n"):
        (tmp_path / "empty").write_bytes(nothing)
        assert "empty holds no prompt: write one" in refused(capsys, efficient, "--prompt-file", tmp_path / "empty")


def test_a_prompt_that_is_too_long(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, runs / "super-h2-s0", "--prompt", "a" * 41)
    assert "prompt 1 has 41 tokens, and this model reads at most 40" in message


def test_a_run_that_is_no_language_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--mechanisms", "super", "--scale", "smoke", "--epochs", "1", "--seeds", "1", "--device", "cpu"]
    assert main.main(["compare", "digits", *short, "--out", str(tmp_path / "digits")]) == 0
    message = refused(capsys, tmp_path / "digits" / "super-h4-s0", "--prompt", "a")
    assert "is a run of task 'digits', which writes no text: name a run of text-lm" in message
    assert "is not a folder" in refused(capsys, tmp_path / "nothing", "--prompt", "a")
    assert "is not a run" in refused(capsys, tmp_path, "--prompt", "a")


def test_control_characters_do_not_reach_the_terminal(efficient: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, efficient, "--prompt", "a\x1b[31m")
    assert "\x1b" not in message


@pytest.mark.slow
def test_ctrl_c_ends_the_line_and_the_command(efficient: str) -> None:
    words = ["generate", efficient, "--prompt", "ann", "--max-tokens", "1000000"]
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "better_attention", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as program:
        assert program.stdout is not None
        assert program.stdout.read(5)[:3] == "ann"
        program.send_signal(signal.SIGINT)
        out, err = program.communicate(timeout=60)
    assert program.returncode == 130
    assert out.endswith("\n")
    assert err == "better-attention: interrupted.\n"


# --- heads of keys and values that query heads share ------------------------------------------------------------------


@pytest.mark.parametrize("mechanisms", ["standard,efficient", "efficient"])
def test_heads_that_cannot_be_shared_are_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mechanisms: str
) -> None:
    assert trained(tmp_path, "--mechanisms", mechanisms, "--heads", "4", "--set", "kv_heads=3") == 2
    assert "kv_heads=3 must divide heads=4: each head of keys and values serves" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_comparison_of_models_that_share_heads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trained, told on the screen and in the report, measured, and written from with a cache of the shared heads."""
    words = ["--mechanisms", "standard,optimised,super", "--heads", "4", "--epochs", "1", "--seeds", "1"]
    assert trained(tmp_path, *words, "--set", "kv_heads=2") == 0
    note = "2 heads of projected keys and values in standard, optimised; kv_heads=2 does not apply to super, without"
    assert note in " ".join(capsys.readouterr().out.split())
    assert note in (tmp_path / "out" / "report.html").read_text("utf-8")
    rows = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))
    # Two layers in float32; a head is 8 wide, and 32 all four of them.
    found = {row["mechanism"]: row["cache_bytes_per_token"] / (2 * 4) for row in rows}
    assert found == {"standard": 2 * 16, "optimised": 16 + 32, "super": 2 * 32}
    assert {row["settings"]["kv_heads"] for row in rows} == {2}
    for mechanism in found:
        run = tmp_path / "out" / f"{mechanism}-h4-s0"
        (one,) = as_json(capsys, run, "--prompt", "ann sees", "--greedy", "--max-tokens", "9")
        assert one["tokens"] == 9
        assert one["text"] == greedily(run, "ann sees", 9)
    # Another number of heads is another comparison.
    assert trained(tmp_path, *words, "--set", "kv_heads=1") == 2
    assert "kv_heads: 2 there, 1 now" in capsys.readouterr().err


def greedily(run: Path, prompt: str, steps: int) -> str:
    """What follows by the full forward pass, each time of the whole text."""
    found = load_run(run)
    tokeniser = tokeniser_of(found.assets)
    tokens = tokeniser.encode(prompt)
    for _ in range(steps):
        logits = found.model(torch.tensor([tokens]))[0, -1]
        logits[list(tokeniser.never)] = -torch.inf
        tokens.append(int(logits.argmax()))
    return tokeniser.decode(tokens).decode().removeprefix(prompt)
