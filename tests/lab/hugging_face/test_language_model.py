"""The language model inside transformers: generation with our cache, beams, padding, saving, loss, Trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from better_attention import MECHANISMS
from helpers import hosts

pytestmark = pytest.mark.hosts

VOCABULARY, WIDTH, HEADS, LENGTH = 17, 12, 3, 24
CASES = [
    *((mechanism, None) for mechanism in MECHANISMS),
    *((mechanism, 4) for mechanism in ("standard", "efficient", "super", "super+expressive")),
]


@pytest.fixture
def hf() -> Any:
    """The module, or a skipped test."""
    hosts.transformers()
    import better_attention.lab.hugging_face.model as module

    return module


def build(hf: Any, mechanism: str = "efficient", **changes: Any) -> Any:
    """A model in float64 in eval mode, random far from its start."""
    sizes: dict[str, Any] = {
        **{"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS},
        **{"max_position_embeddings": LENGTH, "mechanism": mechanism, "pad_token_id": 0},
    }
    model = hf.LanguageModelForCausalLM(hf.LanguageModelConfig(**(sizes | changes))).double().eval()
    return hosts.random(model, 0.5)


def tokens(batch: int = 2, length: int = 5) -> Tensor:
    return torch.randint(1, VOCABULARY, (batch, length))


# --- generation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(("mechanism", "window"), CASES)
def test_with_our_cache_as_without_one(hf: Any, mechanism: str, window: int | None, beams: int) -> None:
    model, x = build(hf, mechanism, window=window), tokens()
    options = {"max_new_tokens": 12, "do_sample": False, "num_beams": beams}
    found = model.generate(x, **options, return_dict_in_generate=True)
    assert torch.equal(found.sequences, model.generate(x, **options, use_cache=False))
    assert isinstance(found.cache, hf.GenerationCache)
    assert found.cache.get_seq_length() == 5 + 12 - 1


@pytest.mark.parametrize("positions", ["rotary", "learned", "alibi-weight"])
@pytest.mark.parametrize(("mechanism", "window"), [("standard", None), ("efficient", None), ("super", 4)])
def test_padded_in_front_as_each_alone(hf: Any, mechanism: str, window: int | None, positions: str) -> None:
    model = build(hf, mechanism, window=window, positions=positions)
    rows = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3]]
    padded = torch.tensor([[0] * (5 - len(row)) + row for row in rows])
    mask = (torch.arange(5) >= torch.tensor([[5 - len(row)] for row in rows])).long()
    together = model.generate(padded, attention_mask=mask, max_new_tokens=9, do_sample=False)
    for row, whole in zip(rows, together, strict=True):
        alone = model.generate(torch.tensor([row]), max_new_tokens=9, do_sample=False)
        assert torch.equal(whole[5 - len(row) :], alone[0])


SHARED: dict[str, Any] = {"hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 2}
"""Three query heads share one of keys and values."""


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(
    ("mechanism", "changes"),
    [
        ("standard", {}),
        ("optimised", {"positions": "learned"}),
        ("expressive", {"positions": "alibi-weight"}),
        ("optimised", {"window": 4}),
        ("standard+align", {"window": 4}),
    ],
)
def test_shared_heads_with_our_cache_as_without_one(
    hf: Any, mechanism: str, changes: dict[str, Any], beams: int
) -> None:
    model = build(hf, mechanism, **SHARED, **changes)
    rows = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3]]
    padded = torch.tensor([[0] * (5 - len(row)) + row for row in rows])
    options = {"attention_mask": (padded > 0).long(), "max_new_tokens": 9, "do_sample": False, "num_beams": beams}
    assert torch.equal(model.generate(padded, **options), model.generate(padded, **options, use_cache=False))


def test_shared_heads_remember_a_third(hf: Any) -> None:
    model = build(hf, "standard", **SHARED)
    with torch.no_grad():
        cache = model(tokens(2, 16), use_cache=True).cache.held
        whole = build(hf, "standard", **SHARED | {"num_key_value_heads": None})(
            tokens(2, 16), use_cache=True
        ).cache.held
    assert 3 * cache.nbytes == whole.nbytes


def test_padding_in_front_of_a_w_a_over_all_positions_is_refused(hf: Any) -> None:
    model, padded = build(hf, "super"), torch.tensor([[0, 0, 3, 4], [1, 2, 3, 4]])
    with pytest.raises(ValueError, match="W_A counts places"):
        model.generate(padded, attention_mask=(padded > 0).long(), max_new_tokens=2)


def test_a_conversation_continues_in_its_cache(hf: Any) -> None:
    model, x = build(hf), tokens()
    options = {"do_sample": False, "return_dict_in_generate": True}
    first = model.generate(x, max_new_tokens=4, **options)
    more = torch.cat([first.sequences, tokens(2, 3)], dim=1)
    second = model.generate(more, max_new_tokens=4, cache=first.cache, **options)
    assert second.cache is first.cache
    assert torch.equal(second.sequences, model.generate(more, max_new_tokens=4, do_sample=False))


def test_the_cache_is_cut_repeated_selected_and_emptied(hf: Any) -> None:
    model, x = build(hf).requires_grad_(False), tokens(2, 8)
    cache = model(x[:, :5], use_cache=True).cache
    assert (cache.batch_size, cache.get_seq_length(), cache.get_max_length()) == (2, 5, -1)
    cache.crop(-2)
    torch.testing.assert_close(model(x[:, 3:], cache=cache).logits, model(x).logits[:, 3:])
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    torch.testing.assert_close(
        model(x[[1, 0], :1], cache=cache).logits, model(torch.cat([x, x[:, :1]], 1)[[1, 0]]).logits[:, 8:]
    )
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(model(x, cache=cache).logits, model(x).logits)
    with pytest.raises(ValueError, match="received 1"):
        cache.crop(1)


def test_efficient_attention_remembers_half(hf: Any) -> None:
    bytes_of = {}
    for mechanism in ("standard", "efficient"):
        model = build(hf, mechanism)
        with torch.no_grad():
            bytes_of[mechanism] = model(tokens(2, 16), use_cache=True).cache.held.nbytes
    assert bytes_of["standard"] == 2 * bytes_of["efficient"] > 0


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"cache_implementation": "static"}, ValueError, "cache_implementation='static' is one of transformers'"),
        ({"output_attentions": True}, ValueError, "returns no attentions"),
        ({"output_hidden_states": True}, ValueError, "returns no hidden_states"),
    ],
)
def test_what_is_not_there_is_refused(hf: Any, options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        build(hf).generate(tokens(), max_new_tokens=2, return_dict_in_generate=True, **options)


def test_another_cache_or_mask_is_refused(hf: Any) -> None:
    model, x = build(hf), tokens()
    with pytest.raises(TypeError, match=r"cache must be a GenerationCache .* received DynamicCache"):
        model(x, cache=hosts.transformers().DynamicCache())
    with pytest.raises(ValueError, match=r"attention_mask must be \(batch, tokens\), received shape \(2, 1, 5, 5\)"):
        model(x, attention_mask=torch.ones(2, 1, 5, 5))
    with pytest.raises(TypeError, match="for others use DynamicCache"):
        hf.GenerationCache().update(x, x, 0)


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (torch.zeros(2, 0), r"no token to read: received shape \(2, 0\)"),
        (torch.tensor([[1, 17]]), "token 17 is unknown to this model, whose vocabulary is the 17 tokens from 0 to 16"),
        (torch.tensor([[1, -3]]), "token -3 is unknown"),
    ],
)
def test_what_is_no_prompt_is_refused(hf: Any, read: Tensor, message: str) -> None:
    model = build(hf)
    with pytest.raises(ValueError, match=message):
        model.generate(read, max_new_tokens=2)
    with pytest.raises(ValueError, match=message):
        model(input_ids=read)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True},
        {"do_sample": True, "top_k": 3, "top_p": 0.9},
        {"num_beams": 3},
        {"prompt_lookup_num_tokens": 3},
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_of_which_no_token_can_be_chosen(hf: Any, options: dict[str, Any], value: float) -> None:
    model = build(hf).requires_grad_(False)
    model.model.tokens.weight[7] = value  # an output row as well
    with pytest.raises(ValueError, match=r"the model's logits are (NaN|infinite), so that no token can be chosen"):
        model.generate(torch.tensor([[1, 2, 3, 1, 2]]), max_new_tokens=5, **options)


def test_the_callers_own_processors_are_called_too(hf: Any) -> None:
    model, x = build(hf), tokens()

    def only_nine(ids: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([9]), 0.0)

    assert (model.generate(x, max_new_tokens=3, logits_processor=[only_nine])[:, 5:] == 9).all()


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("drafted", [1, 3, 10])
@pytest.mark.parametrize(("mechanism", "window"), [("standard", None), ("standard", 4), ("efficient", 4), ("super", 4)])
def test_drafts_from_the_prompt(hf: Any, mechanism: str, window: int | None, drafted: int, own: bool) -> None:
    """Also in a cache that the caller made, which is still empty."""
    model, x = build(hf, mechanism, window=window), torch.tensor([[1, 2, 3, 4, 1, 2, 3, 4, 1, 2]])
    cache = {"cache": hf.GenerationCache()} if own else {}
    found = model.generate(x, max_new_tokens=50, do_sample=False, prompt_lookup_num_tokens=drafted, **cache)
    assert torch.equal(found, model.generate(x, max_new_tokens=50, do_sample=False, use_cache=False))


def test_a_full_window_without_room_for_drafts(hf: Any) -> None:
    model, x = build(hf, window=4), tokens(1)
    first = model.generate(x, max_new_tokens=6, return_dict_in_generate=True)
    with pytest.raises(ValueError, match=r"drafts of 3 tokens need as many. Begin with GenerationCache\(rewind_room=3"):
        model.generate(first.sequences, max_new_tokens=6, cache=first.cache, prompt_lookup_num_tokens=3)


# --- the keywords of forward ------------------------------------------------------------------------------------------


def test_a_cache_by_its_earlier_name(hf: Any) -> None:
    model, x = build(hf).requires_grad_(False), tokens()
    cache = hf.GenerationCache()
    model(x[:, :4], past_key_values=cache)
    torch.testing.assert_close(model(x[:, 4:], past_key_values=cache).logits, model(x).logits[:, 4:])
    with pytest.raises(ValueError, match="past_key_values is the earlier name of cache, and both were given"):
        model(x, cache=cache, past_key_values=cache)
    for other in (hosts.transformers().DynamicCache(), ((x, x),)):
        with pytest.raises(TypeError, match="cache must be a GenerationCache"):
            model(x, past_key_values=other)
        with pytest.raises(TypeError, match="cache must be a GenerationCache"):
            model.generate(x, max_new_tokens=2, cache=other)


def test_unknown_keywords_are_refused(hf: Any) -> None:
    model, x = build(hf), tokens()
    with pytest.raises(TypeError, match=r"takes no atention_mask. It takes input_ids, attention_mask, "):
        model(x, atention_mask=torch.ones(2, 5))
    with pytest.raises(ValueError, match="reads tokens alone: leave inputs_embeds out"):
        model(x, inputs_embeds=torch.ones(2, 5, WIDTH))
    nothing = {"output_attentions": None, "output_hidden_states": False, "inputs_embeds": None}
    assert torch.equal(model(x, num_items_in_batch=3, **nothing).logits, model(x).logits)


def test_a_tuple_instead_of_names(hf: Any) -> None:
    model, x = build(hf).requires_grad_(False), tokens()
    loss, logits, cache = model(x, labels=x, use_cache=True, return_dict=False)
    named = model(x, labels=x)
    assert torch.equal(loss, named.loss)
    assert torch.equal(logits, named.logits)
    assert isinstance(cache, hf.GenerationCache)
    model.config.return_dict = False
    assert isinstance(model(x), tuple)
    assert model(x, return_dict=True).loss is None
    assert model.generate(x, max_new_tokens=2).shape == (2, 7)


def test_logits_of_chosen_tokens(hf: Any) -> None:
    model, x = build(hf), tokens()
    whole = model(x).logits
    torch.testing.assert_close(model(x, logits_to_keep=torch.tensor([4, 0])).logits, whole[:, [4, 0]])
    torch.testing.assert_close(model(x, logits_to_keep=torch.tensor([[4], [0]])).logits, whole[[0, 1], [4, 0]][:, None])
    torch.testing.assert_close(model(x, logits_to_keep=2).logits, whole[:, -2:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tie_word_embeddings": False}, "tie_word_embeddings must be True, received False"),
        ({"vocab_size": 0}, "vocab_size must be >= 1, received 0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 must divide num_attention_heads=4"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be >= 1, received 0"),
        (
            {"num_key_value_heads": 2, "mechanism": "efficient"},
            "num_key_value_heads=2 groups projected keys, and mechanism 'efficient' has no W_K",
        ),
    ],
)
def test_what_no_model_can_be_built_from(hf: Any, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hf.LanguageModelConfig(**changes)
    config = hf.LanguageModelConfig(vocab_size=VOCABULARY)
    vars(config).update(changes)
    with pytest.raises(ValueError, match=message):
        hf.LanguageModelForCausalLM(config)


# --- saving and loading -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mechanism", "changes"),
    [
        ("standard", {}),
        ("super", {"attention_options": {"align_heads": "per_head"}, "scale": "learned"}),
        ("efficient+expressive", {"window": 4, "positions": "learned"}),
        ("super", {"window": 4, "positions": "alibi-weight"}),
        ("optimised", {"hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 2}),
    ],
)
def test_what_is_saved_is_loaded(hf: Any, tmp_path: Path, mechanism: str, changes: dict[str, Any]) -> None:
    model, x = build(hf, mechanism, **changes), tokens()
    model.save_pretrained(tmp_path)
    assert {file.suffix for file in tmp_path.iterdir()} == {".json", ".safetensors"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["mechanism"]) == ("better_attention_lm", mechanism)
    again = hosts.transformers().AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert isinstance(again, hf.LanguageModelForCausalLM)
    before, after = model.state_dict(), again.state_dict()
    assert again.config.num_key_value_heads == changes.get("num_key_value_heads")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    # Not bit for bit: tensors mapped from a file begin anywhere, and products then sum in another order.
    torch.testing.assert_close(again(x).logits, model(x).logits, rtol=1e-12, atol=1e-12)
    assert not again.training


def test_what_a_checkpoint_lacks_is_drawn_anew(hf: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = build(hf, "super", scale="learned", attention_options={"align_init": "identity"})
    model.save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    for name in list(held):
        if "align" in name or "log_scale" in name or "blocks.1.norm1" in name or "blocks.0.mlp.contract" in name:
            del held[name]
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = hf.LanguageModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    first, second = again.model.blocks
    assert torch.equal(first.attention.align.weight, torch.eye(LENGTH).double())
    torch.testing.assert_close(first.attention.scaling.log_scale.exp(), torch.full((HEADS,), 0.5).double())
    assert (second.norm1.weight == 1).all()
    assert 0.5 < float(first.mlp.contract.weight.detach().std()) / (0.02 / 2) < 1.5
    assert torch.equal(second.mlp.contract.weight, model.model.blocks[1].mlp.contract.weight)


def test_initial_weights_are_those_of_the_lab(hf: Any) -> None:
    config = hf.LanguageModelConfig(vocab_size=97, hidden_size=128, num_hidden_layers=8)
    model = hf.LanguageModelForCausalLM(config).model
    assert 0.95 < float(model.tokens.weight.detach().std()) / 0.02 < 1.05
    assert 0.95 < float(model.blocks[3].attention.out_proj.weight.detach().std()) / 0.005 < 1.05


# --- training ---------------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_the_next_token(hf: Any) -> None:
    model, x = build(hf), tokens(3, 7)
    labels = x.clone()
    labels[0, 4:] = -100
    found = model(x, labels=labels)
    logits = found.logits[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(found.loss, expected, check_dtype=False)
    assert found.cache is None
    assert model(x, logits_to_keep=2).logits.shape == (3, 2, VOCABULARY)


def test_padding_behind_a_text_changes_nothing(hf: Any) -> None:
    for mechanism in ("efficient", "super"):
        model, x = build(hf, mechanism, positions="learned"), tokens(2, 7)
        mask = (torch.arange(7) < torch.tensor([[4], [7]])).long()
        logits = model(x, attention_mask=mask).logits
        torch.testing.assert_close(logits[0, :4], model(x[:1, :4]).logits[0])
        torch.testing.assert_close(logits[1], model(x).logits[1])


@pytest.mark.slow
def test_trainer_trains_it(hf: Any, tmp_path: Path) -> None:
    t = hosts.transformers()
    row = torch.arange(1, 13)
    data = [{"input_ids": row.roll(n), "labels": row.roll(n)} for n in range(12)] * 4
    config = hf.LanguageModelConfig(vocab_size=VOCABULARY, hidden_size=24, num_hidden_layers=1, mechanism="super",
                                    max_position_embeddings=12)  # fmt: skip
    model = hf.LanguageModelForCausalLM(config)
    arguments = t.TrainingArguments(
        output_dir=str(tmp_path / "out"), use_cpu=True, num_train_epochs=30, per_device_train_batch_size=12,
        learning_rate=1e-2, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = t.Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data[:12])
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.3
    trainer.save_model(str(tmp_path / "saved"))
    again = t.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    continued = again.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=5, do_sample=False)
    assert continued[0].tolist() == [3, 4, 5, 6, 7, 8, 9, 10]
