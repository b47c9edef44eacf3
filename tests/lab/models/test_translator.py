"""The translator: sizes, what may see what, padding, and decoding against brute force."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from better_attention import MECHANISMS, MultiheadAttention
from better_attention.lab.data.published import translation as data
from better_attention.lab.models.beam_search import beam_search, greedy
from better_attention.lab.models.translator import END, PADDING, START, UNKNOWN, Translator

SOURCE, TARGET, VOCABULARY, WIDTH, HEADS = 7, 5, 19, 12, 3
EVERY = [*MECHANISMS, "standard+align", "super+expressive"]
every_mechanism = pytest.mark.parametrize("mechanism", EVERY)


def build(
    mechanism: str = "standard", vocabulary: int = VOCABULARY, spread: float = 1.0, **changes: float
) -> Translator:
    """A model whose embeddings are spread enough for its words to differ."""
    sizes = {"source_length": SOURCE, "target_length": TARGET, "width": WIDTH, "heads": HEADS, "hidden": 11} | changes
    model = Translator(vocabulary=vocabulary, mechanism=mechanism, **sizes).double().eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for table in (model.source_tokens, model.source_positions, model.target_tokens, model.target_positions):
            table.weight.normal_(std=spread)
    return model


def sentences(length: int, *words: int, first: int | None = None) -> Tensor:
    """Random rows of the given numbers of words, padded on the right to ``length``, maybe with a first token."""
    rows = torch.randint(4, VOCABULARY, (len(words), length))
    for row, number in zip(rows, words, strict=True):
        row[number:] = PADDING
        if first is not None:
            row[0] = first
    return rows


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("mechanism", "expected"), [("standard", 4_198_400), ("optimised", 3_148_800), ("efficient", 2_099_200)]
)
def test_the_papers_attention_parameters(mechanism: str, expected: int) -> None:
    with torch.device("meta"):
        model = Translator(
            vocabulary=15_000, source_length=20, target_length=20, width=1024, heads=4, mechanism=mechanism
        )
    layers = [module for module in model.modules() if isinstance(module, MultiheadAttention)]
    assert len(layers) == 1 + 2 * 2
    assert {sum(p.numel() for p in layer.parameters()) for layer in layers} == {expected}
    mlp, norm, words = 2 * 1024 * 2048 + 2048 + 1024, 2 * 1024, 15_000 * 1024
    blocks = 5 * expected + 3 * mlp + (2 + 2 * 3) * norm
    assert sum(p.numel() for p in model.parameters()) == blocks + 3 * words + 15_000 + 2 * 20 * 1024


def test_super_has_a_triangle_in_the_decoder_and_a_kernel_over_the_source() -> None:
    model = build("super")
    found = {name: (m.max_len, m.causal) for name, m in model.named_modules() if hasattr(m, "max_len")}
    assert found == {
        "encoder.0.attention.align": (SOURCE, False),
        "decoder.0.attention.align": (TARGET, True),
        "decoder.0.cross.align": (SOURCE, False),
        "decoder.1.attention.align": (TARGET, True),
        "decoder.1.cross.align": (SOURCE, False),
    }


def test_the_numbers_of_the_tokens_are_those_of_the_data() -> None:
    rows = data.encode(["x nowhere"], [data.START, data.END, "x"], 5, framed=True)
    assert rows.tolist() == [[START, 4, UNKNOWN, END, PADDING]]


@every_mechanism
def test_no_token_sees_a_later_one(mechanism: str) -> None:
    model = build(mechanism)
    source, target = sentences(SOURCE, 7, 3), sentences(TARGET, 5, 5, first=START)
    before = model(torch.cat([source, target], dim=1))
    for place in range(1, TARGET):
        other = target.clone()
        other[:, place:] = sentences(TARGET, 5, 5)[:, place:]
        after = model(torch.cat([source, other], dim=1))
        assert torch.equal(after[:, :place], before[:, :place])
        assert not torch.allclose(after[:, place:], before[:, place:])
        shorter = model(torch.cat([source, target[:, :place]], dim=1))
        close(shorter, before[:, :place])  # what decoding relies on


@every_mechanism
def test_every_target_token_sees_the_whole_source(mechanism: str) -> None:
    model = build(mechanism)
    source, target = sentences(SOURCE, 7), sentences(TARGET, 5, first=START)
    before = model(torch.cat([source, target], dim=1))
    for place in range(SOURCE):
        other = source.clone()
        other[:, place] = 4 + (source[:, place] - 3) % (VOCABULARY - 4)
        change = (model(torch.cat([other, target], dim=1)) - before).abs().amax(dim=2)
        assert (change > 1e-6).all()


@every_mechanism
def test_more_padding_changes_nothing(mechanism: str) -> None:
    model = build(mechanism)
    source, target = sentences(SOURCE, 3, 3), sentences(TARGET, 2, 2, first=START)
    whole = model(torch.cat([source, target], dim=1))
    for length in range(3, SOURCE):
        memory, padding = model.encode(source[:, :length])
        close(model.output(model.decode(target, memory, padding)), whole)
    close(model(torch.cat([source, target[:, :2]], dim=1)), whole[:, :2])
    beside = model(torch.cat([torch.cat([source, sentences(SOURCE, 7)]), torch.cat([target, target[:1]])], dim=1))
    close(beside[:2], whole)


@every_mechanism
def test_what_padding_is_made_of_reaches_nothing(mechanism: str) -> None:
    model = build(mechanism)
    source, target = sentences(SOURCE, 3, 4), sentences(TARGET, 2, 3, first=START)
    inputs, real = torch.cat([source, target], dim=1), target != PADDING
    before = model(inputs)[real]
    with torch.no_grad():
        model.source_tokens.weight[PADDING] += 100.0
        model.source_positions.weight[4:] -= 50.0
        model.target_tokens.weight[PADDING] += 100.0
    assert torch.equal(model(inputs)[real], before)
    with torch.no_grad():
        model.source_tokens.weight[4:] *= 2.0
    assert not torch.allclose(model(inputs)[real], before)


@every_mechanism
def test_every_parameter_is_trained(mechanism: str) -> None:
    model = build(mechanism)
    model(torch.cat([sentences(SOURCE, 7, 5), sentences(TARGET, 5, 4, first=START)], dim=1)).pow(2).sum().backward()
    for name, parameter in model.named_parameters():
        if "k_proj.bias" in name and "expressive" not in mechanism:
            continue  # it shifts every score of a query alike, which softmax takes out
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_dropout_before_the_words_and_in_the_blocks() -> None:
    inputs = torch.cat([sentences(SOURCE, 7), sentences(TARGET, 5, first=START)], dim=1)
    for rate in ({"dropout": 0.0, "output_dropout": 0.5}, {"dropout": 0.5, "output_dropout": 0.0}):
        model = build(**rate).train()
        assert not torch.equal(model(inputs), model(inputs))
        model.eval()
        assert torch.equal(model(inputs), model(inputs))
    still = build(dropout=0.0, output_dropout=0.0).train()
    assert torch.equal(still(inputs), still(inputs))


def test_longer_sentences_are_refused() -> None:
    model = build()
    with pytest.raises(ValueError, match=r"reads at most 5 target tokens, received 6 \(shape \(1, 6\)\)"):
        model(torch.ones(1, SOURCE + TARGET + 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="reads at most 7 source tokens, received 8"):
        model.encode(torch.ones(1, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match="max_len must be <= 5, the target positions this model knows, received 6"):
        greedy(model, sentences(SOURCE, 3), max_len=6)
    with pytest.raises(ValueError, match="width must be >= 1"):
        beam_search(model, sentences(SOURCE, 3), width=0)


# --- decoding ---------------------------------------------------------------------------------------------------------


def talkative(mechanism: str, seed: int, vocabulary: int = VOCABULARY, ending: float = 0.5) -> Translator:
    """A model that says different things, and ends some sentences early."""
    torch.default_generator.manual_seed(seed)
    model = build(mechanism, vocabulary, spread=2.0).requires_grad_(False)
    model.output.weight.normal_(std=0.7)
    model.output.bias[END] += ending
    return model


def log_probabilities(model: Translator, source: Tensor, written: Sequence[tuple[int, ...]]) -> list[float]:
    """Of sentences, by one forward pass with the right tokens given; no sentence holds PADDING or START."""
    longest = max(map(len, written))
    tokens = torch.tensor([[*sentence, *[PADDING] * (longest - len(sentence))] for sentence in written])
    starts = torch.full((len(written), 1), START)
    logits = model(torch.cat([source.expand(len(written), -1), starts, tokens[:, :-1]], dim=1))
    logits[..., [PADDING, START]] = -math.inf
    each = logits.log_softmax(dim=2).gather(2, tokens[..., None])[..., 0]
    return each.masked_fill(tokens == PADDING, 0.0).sum(dim=1).tolist()


def all_sentences(vocabulary: int, longest: int) -> list[tuple[int, ...]]:
    """Every sentence: at most ``longest`` tokens, the last of which is END, or cut off there."""
    words = [UNKNOWN, *range(4, vocabulary)]
    ended = [(*some, END) for length in range(longest) for some in itertools.product(words, repeat=length)]
    return ended + list(itertools.product(words, repeat=longest))


def words_of(row: Tensor) -> tuple[int, ...]:
    tokens = row.tolist()
    return tuple(tokens[: tokens.index(END) + 1] if END in tokens else tokens)


@every_mechanism
@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_a_wide_beam_finds_the_best_of_all_sentences(mechanism: str, length_penalty: float) -> None:
    vocabulary, longest = 7, 3
    every = all_sentences(vocabulary, longest)
    assert len(every) == 1 + 4 + 16 + 64
    model = talkative(mechanism, 3, vocabulary)
    source = sentences(SOURCE, 7, 2, 4) % vocabulary
    found = beam_search(model, source, width=64, max_len=longest, length_penalty=length_penalty)
    for row in range(len(source)):
        scores = dict(zip(every, log_probabilities(model, source[row : row + 1], every), strict=True))
        assert sum(map(math.exp, scores.values())) == pytest.approx(1.0)  # these are all there are
        best = max(every, key=lambda sentence: scores[sentence] / len(sentence) ** length_penalty)
        assert words_of(found.tokens[row]) == best
        assert float(found.log_probability[row]) == pytest.approx(scores[best], abs=1e-9)


def test_a_wider_beam_finds_what_greed_misses() -> None:
    model, source = talkative("standard", 3), sentences(SOURCE, *[7] * 40)
    found = [beam_search(model, source, width=width, length_penalty=0.0).log_probability for width in (1, 4, 16)]
    assert found[0].sum() < found[1].sum() < found[2].sum()
    assert (found[2] > found[0] + 1e-6).any()


def test_the_length_penalty_changes_what_is_best() -> None:
    model, source = talkative("standard", 2, ending=1.0), sentences(SOURCE, *[7] * 40)
    found = [beam_search(model, source, width=16, length_penalty=penalty) for penalty in (0.0, 0.5, 1.0)]
    lengths = [sum(len(words_of(row)) for row in decoded.tokens) for decoded in found]
    assert lengths[0] < lengths[1] < lengths[2]


@every_mechanism
def test_a_beam_of_one_is_greedy(mechanism: str) -> None:
    model, source = talkative(mechanism, 11), sentences(SOURCE, 7, 1, 4, 6, 2, 5)
    one, beam = greedy(model, source), beam_search(model, source, width=1)
    assert torch.equal(one.tokens, beam.tokens)
    close(one.log_probability, beam.log_probability)
    assert len({words_of(row) for row in one.tokens}) > 1
    for row in range(len(source)):
        (expected,) = log_probabilities(model, source[row : row + 1], [words_of(one.tokens[row])])
        assert float(one.log_probability[row]) == pytest.approx(expected, abs=1e-9)


def test_greedy_takes_the_likeliest_token_at_each_step() -> None:
    model, source = talkative("super", 2), sentences(SOURCE, 6)
    written = [START]
    while len(written) <= TARGET and written[-1] != END:
        logits = model(torch.cat([source, torch.tensor([written])], dim=1))[0, -1]
        logits[[PADDING, START]] = -math.inf
        written.append(int(logits.argmax()))
    assert words_of(greedy(model, source).tokens[0]) == tuple(written[1:])


@pytest.mark.parametrize("width", [1, 2, 5])
def test_a_sentence_does_not_depend_on_its_neighbours(width: int) -> None:
    model, source = talkative("super", 7), sentences(SOURCE, 7, 3, 5, 1)
    together = beam_search(model, source, width=width)
    again = beam_search(model, source, width=width)
    assert torch.equal(together.tokens, again.tokens)
    for row in range(len(source)):
        alone = beam_search(model, source[row : row + 1], width=width)
        assert words_of(alone.tokens[0]) == words_of(together.tokens[row])


def test_decoding_ends_with_the_last_sentence_or_at_max_len() -> None:
    model, source = talkative("efficient", 1), sentences(SOURCE, 7, 4)
    assert greedy(model, source, max_len=2).tokens.shape == (2, 2)
    assert beam_search(model, source, width=3, max_len=1).tokens.shape == (2, 1)
    model.output.bias[END] += 1000.0
    assert greedy(model, source).tokens.tolist() == [[END], [END]]
    assert beam_search(model, source, width=1).tokens.tolist() == [[END], [END]]
    model.output.bias[[PADDING, START]] += 10_000.0
    model.output.bias[END] -= 2000.0
    tokens = greedy(model, source).tokens
    assert tokens.shape == (2, TARGET)
    assert not ((tokens == PADDING) | (tokens == START) | (tokens == END)).any()
    assert greedy(model, source[:0]).tokens.shape[0] == 0
