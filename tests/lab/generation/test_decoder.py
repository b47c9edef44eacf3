"""Sequences continued with a cache: as by the full forward pass, each as if it were alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from better_attention import MECHANISMS
from better_attention.lab.generation.decoder import Decoder
from better_attention.lab.generation.sampling import Sampling
from better_attention.lab.models.causal_decoder import POSITIONS
from better_attention.lab.models.language_model import LanguageModel

GREEDY = Sampling(temperature=0.0)
PROMPTS = [[3, 1, 4, 1, 5], [2], [6, 5, 3], [5, 3, 5, 8, 9]]


def build(mechanism: str = "standard", **changes: Any) -> LanguageModel:
    """A model in float64, so that no two tokens are equally likely within rounding; random far from its start."""
    sizes: dict[str, Any] = {"vocabulary": 11, "length": 24, "width": 12, "layers": 2, "heads": 3}
    model = LanguageModel(mechanism=mechanism, **(sizes | changes)).double().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.5 * torch.randn_like(parameter))
    return model


def continued(model: LanguageModel, prompt: list[int], steps: int) -> list[int]:
    """The likeliest tokens by the full forward pass, each time of the whole sequence."""
    tokens = list(prompt)
    for _ in range(steps):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def decoded(decoder: Decoder, steps: int) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {n: [] for n in decoder.rows}
    for _ in range(steps):
        for n, token in decoder.step().items():
            found[n].append(token)
    return found


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("mechanism", [*MECHANISMS, "super+expressive"])
def test_with_the_cache_as_by_the_full_forward_pass(mechanism: str, positions: str) -> None:
    model = build(mechanism, positions=positions)
    prompts = [prompt for prompt in PROMPTS if len(prompt) == 5]
    found = decoded(Decoder(model, prompts, GREEDY), 12)
    assert found == {n: continued(model, prompt, 12) for n, prompt in enumerate(prompts)}
    assert len({tuple(tokens) for tokens in found.values()}) == 2


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_under_a_window_for_any_length(mechanism: str, positions: str) -> None:
    model = build(mechanism, positions=positions, window=4, length=40)
    found = decoded(Decoder(model, PROMPTS, GREEDY), 30)
    assert found == {n: continued(model, prompt, 30) for n, prompt in enumerate(PROMPTS)}


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("mechanism", ["standard", "efficient+expressive"])
def test_padded_in_front_each_as_it_would_be_alone(mechanism: str, positions: str) -> None:
    model = build(mechanism, positions=positions)
    decoder = Decoder(model, PROMPTS, GREEDY)
    found = decoded(decoder, 4)
    decoder.end([0, 2])
    assert decoder.rows == [1, 3]
    more = decoded(decoder, 8)
    for n, prompt in enumerate(PROMPTS):
        expected = continued(model, prompt, 12)
        assert found[n] == expected[:4]
        assert more.get(n, expected[4:]) == expected[4:]


def test_random_numbers_depend_on_the_seed_and_the_sequence_alone() -> None:
    model = build()
    together = decoded(Decoder(model, PROMPTS, Sampling(), seed=3), 9)
    for n, prompt in enumerate(PROMPTS):
        alone = decoded(Decoder(model, [prompt], Sampling(), seed=3, numbers=[n]), 9)
        assert alone[0] == together[n]
    assert decoded(Decoder(model, PROMPTS, Sampling(), seed=4), 9) != together
    same = decoded(Decoder(model, [PROMPTS[0]] * 2, Sampling(), seed=3), 9)
    assert same[0] != same[1]


def test_sampled_tokens_come_in_the_models_proportions() -> None:
    """2,000 sequences with one prompt: the distance to the exact probabilities is what chance explains."""
    model = build()
    exact = model(torch.tensor([[3, 1]]))[0, -1].softmax(-1)
    found = Decoder(model, [[3, 1]] * 2000, Sampling()).step()
    counts = torch.tensor(list(found.values())).bincount(minlength=11)
    chi2 = float(((counts - 2000 * exact) ** 2 / (2000 * exact)).sum())
    assert chi2 < 36  # ten degrees of freedom: exceeded once in ten thousand seeds


def test_tokens_that_never_come() -> None:
    model = build()
    plain = decoded(Decoder(model, PROMPTS, GREEDY), 12)
    often = max(range(11), key=lambda token: sum(tokens.count(token) for tokens in plain.values()))
    found = decoded(Decoder(model, PROMPTS, GREEDY, never=[often]), 12)
    assert any(often in tokens for tokens in plain.values())
    assert not any(often in tokens for tokens in found.values())


@pytest.mark.parametrize(("mechanism", "positions"), [("super", "rotary"), ("efficient", "learned")])
def test_a_sequence_is_full_when_the_model_can_read_no_more(mechanism: str, positions: str) -> None:
    model = build(mechanism, positions=positions, length=7)
    decoder = Decoder(model, [[1, 2, 3, 4, 5]], GREEDY)
    for expected in ([], [], [0]):
        decoder.step()
        assert decoder.full == expected
    with pytest.raises(ValueError, match="at most 7 tokens"):
        decoder.step()
    assert Decoder(build(), [[1]], GREEDY).full == []


def test_padding_counts_for_nothing_where_positions_are_learned() -> None:
    """The short prompt goes on to its own seventh token, though the row was padded to more."""
    model = build("efficient", positions="learned", length=7)
    decoder = Decoder(model, [[1, 2, 3, 4, 5, 6], [2, 4]], GREEDY)
    found: dict[int, list[int]] = {0: [], 1: []}
    while decoder.rows:
        for n, token in decoder.step().items():
            found[n].append(token)
        decoder.end(decoder.full)
    assert found == {0: continued(model, [1, 2, 3, 4, 5, 6], 2), 1: continued(model, [2, 4], 6)}


@pytest.mark.parametrize("prompts", [[], [[1], []]])
def test_nothing_to_continue(prompts: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="a prompt holds no token"):
        Decoder(build(), prompts, GREEDY)


@pytest.mark.parametrize("token", [11, -1])
def test_a_token_that_the_model_does_not_know(token: int) -> None:
    with pytest.raises(ValueError, match=f"token {token} is unknown .* vocabulary is the 11 tokens from 0 to 10. Enc"):
        Decoder(build(), [[1, 2], [3, token]], GREEDY)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(), Sampling(top_k=3, top_p=0.9, min_p=0.1)])
@pytest.mark.parametrize(("value", "name"), [(float("nan"), "NaN"), (float("inf"), "NaN|infinite")])
def test_logits_of_which_no_token_can_be_chosen(sampling: Sampling, value: float, name: str) -> None:
    model = build()
    decoder = Decoder(model, PROMPTS, sampling)
    decoder.step()
    decoder.end([0])
    model.tokens.weight[7] = value  # an output row as well
    with pytest.raises(ValueError, match=f"sequence 1: the model's logits are ({name}), so that no token can be cho"):
        decoder.step()


@pytest.mark.parametrize("sampling", [GREEDY, Sampling()])
def test_where_every_token_is_excluded(sampling: Sampling) -> None:
    with pytest.raises(ValueError, match=r"sequence 0: every token is excluded.* Exclude fewer"):
        Decoder(build(), PROMPTS, sampling, never=range(11)).step()


def test_a_prompt_that_is_too_long() -> None:
    with pytest.raises(ValueError, match="a prompt has 25 tokens, and this model reads at most 24"):
        Decoder(build("super"), [[1] * 25], GREEDY)
