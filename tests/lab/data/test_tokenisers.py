"""Text as numbers and back: nothing is lost, numbers follow from the training text, foreign assets are refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from better_attention.lab.data.samples import DataError
from better_attention.lab.data.tokenisers import (
    LEARN,
    UNKNOWN,
    UNKNOWN_SIGN,
    BytePairs,
    Characters,
    Tokeniser,
    byte_signs,
    tokeniser_of,
)

TEXT = "the cat sat on the mat.\n\nthe cat ate the rat;\nthat was that.\n" * 5
STRANGE = "é e\u0301 日本語 \x00\t\r\n \u2028 🙂  \ud7ff  trailing \n\n"


def bpe(text: str = TEXT, size: int = 280) -> BytePairs:
    pytest.importorskip("tokenizers", reason='tokenizers is not installed: pip install "better-attention[bpe]"')
    return BytePairs.learn(text, size)


def learned(kind: str) -> Tokeniser:
    return bpe() if kind == "bpe" else Characters.learn(TEXT, 100)


@pytest.mark.parametrize("kind", LEARN)
def test_decoding_gives_the_text_back(kind: str) -> None:
    tokeniser = learned(kind)
    tokens = tokeniser.encode(TEXT, strict=True)
    assert tokeniser.decode(tokens).decode() == TEXT
    assert set(tokens) <= set(range(len(tokeniser)))
    assert tokeniser.encode("") == []
    assert tokeniser.decode([]) == b""


@pytest.mark.parametrize("kind", LEARN)
def test_assets_give_the_same_tokeniser_again(kind: str) -> None:
    tokeniser = learned(kind)
    again = tokeniser_of(json.loads(json.dumps(dict(tokeniser.assets()) | {"other": 1})))
    assert len(again) == len(tokeniser)
    assert again.encode(TEXT) == tokeniser.encode(TEXT)
    assert again.assets() == tokeniser.assets()


# --- characters -------------------------------------------------------------------------------------------------------


def test_characters_are_numbered_in_the_order_of_unicode() -> None:
    tokeniser = Characters.learn("bab\né", 100)
    assert tokeniser.symbols == ("\n", "a", "b", "é")
    assert tokeniser.encode("ab\n") == [2, 3, 1]
    assert [tokeniser.shown(token) for token in range(5)] == ["?", "↵", "a", "b", "é"]
    assert tokeniser.never == (UNKNOWN,)


def test_of_too_many_characters_the_most_frequent_ones_are_kept() -> None:
    tokeniser = Characters.learn("aaabbbccd", 3)
    assert tokeniser.symbols == ("a", "b")
    assert len(tokeniser) == 3
    assert tokeniser.encode("abcd") == [1, 2, UNKNOWN, UNKNOWN]
    assert tokeniser.decode([1, UNKNOWN, 2]).decode() == f"a{UNKNOWN_SIGN}b"


def test_an_unknown_character_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"no token for 'é' \(U\+00E9\), '日' \(U\+65E5\): its vocabulary is the 2 char"
    ):
        Characters(["a", "b"]).encode("aé日é", strict=True)


# --- byte pairs -------------------------------------------------------------------------------------------------------


@given(text=st.text())
def test_no_text_is_lost_in_byte_pairs(text: str) -> None:
    tokeniser = bpe()
    try:
        data = text.encode()
    except UnicodeEncodeError:  # half a surrogate is no text
        return
    assert tokeniser.decode(tokeniser.encode(text, strict=True)) == data


def test_byte_pairs_are_those_that_occur_most() -> None:
    """By hand: in "abab abab" with its spaces, "ab" comes first, then "abab"."""
    tokeniser = bpe("abab abab abab", 259)
    assert tokeniser.merges[:2] == [("a", "b"), ("ab", "ab")]
    assert tokeniser.shown(256) == "ab"
    assert tokeniser.encode("abab") == [257]
    assert len(tokeniser) == 259
    assert [len(one) for one in map(tokeniser.decode, ([n] for n in range(256)))] == [1] * 256


def test_nothing_left_to_merge_gives_fewer_tokens() -> None:
    assert len(bpe("ab", 1000)) == 257


def test_tokens_may_end_within_a_character() -> None:
    tokeniser = bpe()
    parts = [tokeniser.decode([token]) for token in tokeniser.encode(STRANGE)]
    assert b"".join(parts).decode() == STRANGE
    with pytest.raises(UnicodeDecodeError):
        [part.decode() for part in parts]


def test_every_byte_has_its_sign() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    signs = byte_signs()
    assert sorted(signs.values()) == list(range(256))
    assert set(signs) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def test_size_of_byte_pairs() -> None:
    with pytest.raises(ValueError, match="size must be >= 256, received 255"):
        bpe(size=255)


@pytest.mark.parametrize(
    ("assets", "message"),
    [
        ({}, "no tokeniser is described by the entries"),
        ({"tokeniser": "words", "symbols": []}, "no tokeniser is described by the entries 'tokeniser', 'symbols'"),
        ({"tokeniser": "characters", "symbols": "ab"}, "no tokeniser"),
        ({"tokeniser": "characters", "symbols": ["a", "bc"]}, "single characters"),
        ({"tokeniser": "characters", "symbols": ["a", 3]}, "single characters"),
        ({"tokeniser": "characters", "symbols": ["a", "a"]}, "occurs twice"),
    ],
)
def test_foreign_assets_are_refused(assets: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        tokeniser_of(assets)


@pytest.mark.parametrize("merges", [[["a"]], [["a", "bb"]], [["a", 3]], ["abc"], [["ab", "c"], ["a", "b"]]])
def test_merges_of_unknown_tokens_are_refused(merges: list[Any]) -> None:
    pytest.importorskip("tokenizers")
    with pytest.raises(DataError, match="is no pair of tokens that an earlier merge made"):
        tokeniser_of({"tokeniser": "bpe", "merges": merges})
