"""Texts continued: stop strings, characters of several bytes, batches, and what cannot be continued."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from better_attention.lab.data.tokenisers import Characters
from better_attention.lab.generation.sampling import Sampling
from better_attention.lab.generation.writer import BATCH, Settings, Stream, write
from better_attention.lab.models.language_model import LanguageModel

TOKENISER = Characters("abcdefg \n")


def build(mechanism: str = "efficient", **changes: Any) -> LanguageModel:
    sizes: dict[str, Any] = {"vocabulary": len(TOKENISER), "length": 40, "width": 12, "layers": 2, "heads": 3}
    model = LanguageModel(mechanism=mechanism, **(sizes | changes)).double().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.5 * torch.randn_like(parameter))
    return model


# --- the stream -------------------------------------------------------------------------------------------------------


def pieces(stream: Stream, text: str, step: int) -> list[str]:
    data = text.encode()
    found = [stream.feed(data[start : start + step]) for start in range(0, len(data), step)]
    return [*found, stream.feed(b"", last=True)]


@pytest.mark.parametrize("step", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        ("abc", [], "abc"),
        ("é日🙂x", [], "é日🙂x"),
        ("one. two.", ["."], "one"),
        ("aab aaab", ["aaab"], "aab "),
        ("xyz end", ["nothing", "end", "zz"], "xyz "),
        ("ab", ["abc"], "ab"),
        ("12END34", ["34", "END"], "12"),
        ("日本語", ["語"], "日本"),
    ],
)
def test_a_stream_ends_before_its_stop_string(text: str, stop: list[str], shown: str, step: int) -> None:
    stream = Stream(stop)
    assert "".join(pieces(stream, text, step)) == shown
    assert stream.stopped == (shown != text)


def test_nothing_is_shown_that_may_be_taken_back() -> None:
    stream = Stream(["\n\n"])
    assert [stream.feed(one.encode()) for one in ("a", "\n", "b", "\n", "\n", "c")] == ["a", "", "\nb", "", "", ""]
    whole = Stream()
    assert [whole.feed(bytes([byte])) for byte in "é".encode()] == ["", "é"]


def test_bytes_that_are_no_text_are_replaced() -> None:
    stream = Stream()
    assert (
        stream.feed(b"a\xff") + stream.feed(b"\xc3", last=True) == "a\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}"
    )


def test_every_way_to_cut_a_text_shows_the_same() -> None:
    draw = random.Random(0)
    for _ in range(200):
        text = "".join(draw.choices("ab\n", k=12))
        stop = ["".join(draw.choices("ab\n", k=draw.randint(1, 3))) for _ in range(2)]
        first = min((at for one in stop if (at := text.find(one)) >= 0), default=len(text))
        shown = {"".join(pieces(Stream(stop), text, step)) for step in (1, 5, 12)}
        # Cut letter by letter the string that is complete first ends the text, even if another began before it.
        letter = "".join(pieces(Stream(stop), text, 1))
        assert all(one.startswith(text[:first]) or text[:first].startswith(one) for one in shown)
        assert text.startswith(letter)
        assert not any(one in letter for one in stop)


# --- writing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mechanism", ["efficient", "super"])
def test_a_batch_is_written_as_each_prompt_alone(mechanism: str) -> None:
    model = build(mechanism)
    prompts = ["abc", "g", "fade ", "bad\n", "c"]
    settings = Settings(Sampling(temperature=0.0), max_tokens=20)
    together = write(model, TOKENISER, prompts, settings)
    assert together == [write(model, TOKENISER, [prompt], settings)[0] for prompt in prompts]
    assert [one.prompt for one in together] == prompts
    assert len({one.text for one in together}) > 1


def test_what_is_emitted_is_what_is_returned() -> None:
    model, shown = build(), dict.fromkeys(range(3), "")

    def emit(number: int, piece: str) -> None:
        assert piece
        shown[number] += piece

    written = write(model, TOKENISER, ["ab", "c", "dd"], Settings(max_tokens=30, stop=("a", "dc")), emit)
    assert [one.text for one in written] == list(shown.values())
    assert all(not any(stop in one.text for stop in ("a", "dc")) for one in written)


def test_why_a_text_ends() -> None:
    model = build("super", length=10)
    free = write(model, TOKENISER, ["abc"], Settings(max_tokens=50, seed=1))[0]
    assert (free.ended, free.tokens, len(free.text)) == ("length", 8, 8)
    few = write(model, TOKENISER, ["abc"], Settings(max_tokens=4, seed=1))[0]
    assert (few.ended, few.tokens, few.text) == ("max_tokens", 4, free.text[:4])
    stop = free.text[2]
    stopped = write(model, TOKENISER, ["abc"], Settings(max_tokens=50, seed=1, stop=(stop,)))[0]
    at = free.text.index(stop)
    assert (stopped.ended, stopped.tokens, stopped.text) == ("stop", at + 1, free.text[:at])


def test_a_seed_gives_one_text_and_another_seed_another() -> None:
    model = build()
    first, again, other = (write(model, TOKENISER, ["a"], Settings(seed=seed))[0].text for seed in (5, 5, 6))
    assert first == again != other
    assert len(first) == 200


def test_the_unknown_token_never_comes() -> None:
    model = build()
    model.tokens.weight[0] += 3.0 * model.tokens.weight.std() * model.tokens.weight.sign()[0]
    written = write(model, TOKENISER, ["abc"] * (BATCH + 3), Settings(Sampling(temperature=3.0), max_tokens=30))
    assert len(written) == BATCH + 3
    assert all(set(one.text) <= set("abcdefg \n") for one in written)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["a", ""], "prompt 2 is empty"),
        (["aXb"], r"prompt 1: the model has no token for 'X' \(U\+0058\)"),
        (["a", "a" * 41], "prompt 2 has 41 tokens, and this model reads at most 40"),
    ],
)
def test_what_cannot_be_continued_is_refused_before_anything_is_written(prompts: list[str], message: str) -> None:
    def emit(number: int, piece: str) -> None:
        raise AssertionError("something was written")

    with pytest.raises(ValueError, match=message):
        write(build("super"), TOKENISER, prompts, Settings(), emit)


@pytest.mark.parametrize(
    ("positions", "window", "message"),
    [
        ("rotary", None, r"train a model with a window\."),
        ("learned", None, r"train a model with rotary positions or ALiBi instead of learned ones and with a window\."),
        ("learned", 4, r"train a model with rotary positions or ALiBi instead of learned ones\."),
    ],
)
def test_a_long_prompt_names_what_bounds_this_model(positions: str, window: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write(build("super", positions=positions, window=window), TOKENISER, ["a" * 41], Settings())


@pytest.mark.parametrize("stop", ["ab", None, ("a", 3)])
def test_stop_strings_come_in_a_tuple(stop: Any) -> None:
    with pytest.raises(TypeError, match=r"stop must be a tuple of texts, such as \('\.',\); received"):
        Settings(stop=stop)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"max_tokens": 0}, "max_tokens"), ({"seed": -1}, "seed"), ({"stop": ("a", "")}, "a stop string is empty")],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**options)
