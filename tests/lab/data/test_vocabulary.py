"""Words as numbers, against a slow and obvious implementation."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from better_attention.lab.data.samples import DataError
from better_attention.lab.data.vocabulary import Vocabulary, tokens

TEXTS = ["b a. B", "a c!", "it's <br />It's"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Hello, WORLD!", ["hello", "world"]),
        ("one<br />two<BR />three", ["one", "two", "three"]),
        ("isn't don’t 'quoted' rock'n'roll boys'", ["isn't", "don't", "quoted", "rock'n'roll", "boys"]),
        ("7/10, état-major", ["7", "10", "état", "major"]),
        (" ... ", []),
        ("", []),
    ],
)
def test_tokens(text: str, words: list[str]) -> None:
    assert tokens(text) == words == Vocabulary.tokens(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("मील, मेल।", ["मील", "मेल"]),
        ("स्\u200dकूल", ["स्\u200dकूल"]),
        ("ที่นี่ ไทย", ["ที่นี่", "ไทย"]),
        ("مُحَمَّد، كِتَاب", ["مُحَمَّد", "كِتَاب"]),
        ("می\u200cخواهم", ["می\u200cخواهم"]),
        ("שָׁלוֹם (צה״ל)", ["שָׁלוֹם", "צה״ל"]),
        ("தமிழ் বাংলা", ["தமிழ்", "বাংলা"]),
        ("cafe\u0301 CAFÉ", ["café", "café"]),
        ("a\u0301b x\u0323y", ["áb", "x\u0323y"]),
        ("co\u00adop e\u2060e", ["coop", "ee"]),
        ("ok\u200d \u0301x \u2764\ufe0f", ["ok", "x"]),
        ("one\u200btwo", ["one", "two"]),
        ("а\u0488б 1\ufe0f\u20e3", ["а\u0488б", "1\u20e3"]),
    ],
)
def test_words_of_every_script_keep_their_marks_and_joiners(text: str, words: list[str]) -> None:
    normal = [unicodedata.normalize("NFC", word) for word in words]
    assert tokens(text) == normal
    for form in ("NFC", "NFD"):
        assert tokens(unicodedata.normalize(form, text)) == normal
    assert Vocabulary.build([text], 99).encode([text], 9).min() == 0
    assert 1 not in Vocabulary.build([text], 99).encode([text], 9)


@settings(max_examples=200)
@given(st.text(st.characters(max_codepoint=127)))
def test_ascii_words_are_those_of_published_vocabularies(text: str) -> None:
    assert tokens(text) == re.findall(r"\w+(?:'\w+)*", text.lower().replace("<br />", " "))


def test_words_by_falling_frequency_then_alphabet() -> None:
    vocabulary = Vocabulary.build(["b a b", "d c d b", "c"], 100)
    assert vocabulary.words == ("b", "c", "d", "a")  # 3, 2, 2, 1 times
    assert len(vocabulary) == 6


def test_the_size_counts_padding_and_unknown() -> None:
    vocabulary = Vocabulary.build(["b a b", "d c d b", "c"], 4)
    assert len(vocabulary) == 4
    assert vocabulary.words == ("b", "c")
    assert vocabulary.encode(["a b c d"], 4).max() == len(vocabulary) - 1


def test_the_last_words_padded_on_the_left() -> None:
    vocabulary = Vocabulary(["a", "b"])
    rows = vocabulary.encode(["a b x", "x a b a", "", "B"], 3)
    assert rows.dtype == np.int64
    assert rows.tolist() == [[2, 3, 1], [2, 3, 2], [0, 0, 0], [0, 0, 3]]
    assert vocabulary.encode([], 3).shape == (0, 3)


WORDS = st.lists(
    st.sampled_from(
        [
            "a",
            "Bb",
            "c'd",
            "<br />",
            "é",
            "İ",
            "ΟΔΟΣ",
            ".",
            "\n",
            "\u00a0",
            "मील",
            "e\u0301",
            "\u0301",
            "\u200d",
            "x" * 30,
        ]
    ),
    max_size=60,
)


@settings(max_examples=100)
@given(
    texts=st.lists(st.builds(lambda words, gap: gap.join(words), WORDS, st.sampled_from([" ", "", "  "])), max_size=4),
    size=st.integers(3, 9),
    length=st.integers(1, 7),
)
def test_against_the_obvious_way(texts: list[str], size: int, length: int) -> None:
    counts = Counter(word for text in texts for word in tokens(text))
    if not counts:
        with pytest.raises(DataError, match="no word"):
            Vocabulary.build(texts, size)
        return
    words = sorted(counts, key=lambda word: (-counts[word], word))[: size - 2]
    expected = []
    for text in texts:
        numbers = [words.index(word) + 2 if word in words else 1 for word in tokens(text)]
        expected.append(([0] * length + numbers)[-length:])
    assert Vocabulary.build(texts, size).encode(texts, length).tolist() == expected


def test_the_test_split_has_no_say() -> None:
    """Building from train alone must differ from building from everything: else nobody would notice a leak."""
    train, test = ["a a b"], ["c c c c"]
    assert "c" not in Vocabulary.build(train, 10).words
    assert "c" in Vocabulary.build([*train, *test], 10).words


def test_vocabularies_of_the_same_words_are_equal() -> None:
    vocabulary = Vocabulary.build([*TEXTS, "Ça 你好"], 50)
    again = Vocabulary(vocabulary.words)
    assert again == vocabulary
    assert hash(again) == hash(vocabulary)
    assert again != Vocabulary.build(TEXTS, 50)
    np.testing.assert_array_equal(again.encode(TEXTS, 5), vocabulary.encode(TEXTS, 5))


@pytest.mark.parametrize("words", [["a", 3], ["a", ""], ["a", "b", "a"], [["a"]]])
def test_words_that_make_no_vocabulary(words: list[str]) -> None:
    with pytest.raises(DataError, match="vocabulary"):
        Vocabulary(words)


@pytest.mark.parametrize("size", [2, 0, -1])
def test_a_size_without_room_for_a_word(size: int) -> None:
    with pytest.raises(ValueError, match=f"size must be >= 3, received {size}"):
        Vocabulary.build(TEXTS, size)


def test_a_length_that_is_none() -> None:
    with pytest.raises(ValueError, match="length must be >= 1, received 0"):
        Vocabulary(["a"]).encode(TEXTS, 0)
    with pytest.raises(TypeError, match="length must be a whole number"):
        Vocabulary(["a"]).encode(TEXTS, 2.5)  # type: ignore[arg-type]
