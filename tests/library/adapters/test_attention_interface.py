"""transformers' attention interface: our softmax equals the host's own, expressive equals its formula."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from better_attention.scores import registered
from better_attention.scores.score import Score
from helpers import hosts
from helpers.layers import refused

B, L = 3, 9
WIDTH, HEADS = 24, 4


@pytest.fixture
def interface() -> Any:
    """The adapter's module, or a skipped test."""
    hosts.transformers()
    import better_attention.adapters.transformers as module

    return module


def decoder(kind: str, **options: Any) -> nn.Module:
    """A causal language model of two layers."""
    t = hosts.transformers()
    common = {"vocab_size": hosts.VOCABULARY, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    if kind == "gpt2":
        config = t.GPT2Config(
            n_embd=WIDTH, n_layer=2, n_head=HEADS, n_inner=31, n_positions=40, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, **common, **options,
        )  # fmt: skip
        return hosts.random(t.GPT2LMHeadModel(config))
    sizes = {
        "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS, "num_key_value_heads": 2,
        "intermediate_size": 31, "max_position_embeddings": 40,
    }  # fmt: skip
    names = {"llama": ("LlamaConfig", "LlamaForCausalLM"), "mistral": ("MistralConfig", "MistralForCausalLM")}
    config_class, model_class = (getattr(t, name) for name in names[kind])
    return hosts.random(model_class(config_class(**common, **sizes, **options)))


def t5(**options: Any) -> nn.Module:
    t = hosts.transformers()
    config = t.T5Config(
        vocab_size=hosts.VOCABULARY, d_model=WIDTH, d_kv=6, d_ff=31, num_layers=2, num_heads=HEADS, dropout_rate=0.0,
        decoder_start_token_id=0, eos_token_id=None, pad_token_id=0, **options,
    )  # fmt: skip
    return hosts.random(t.T5ForConditionalGeneration(config))


def whisper() -> nn.Module:
    t = hosts.transformers()
    config = t.WhisperConfig(
        vocab_size=hosts.VOCABULARY, d_model=WIDTH, encoder_layers=2, decoder_layers=2, encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS, encoder_ffn_dim=31, decoder_ffn_dim=31, num_mel_bins=6, max_source_positions=8,
        max_target_positions=20, dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=None,
        decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return hosts.random(t.WhisperForConditionalGeneration(config))


def ids(length: int = L) -> Tensor:
    return torch.randint(5, hosts.VOCABULARY, (B, length))


def padded(side: str) -> Tensor:
    """1 for a token, 0 for padding: nothing in the first sample, two and five places in the others."""
    mask = torch.ones(B, L, dtype=torch.long)
    for sample, places in ((1, 2), (2, 5)):
        mask[sample, slice(None, places) if side == "left" else slice(L - places, None)] = 0
    return mask


@dataclass(frozen=True)
class Host:
    """A model, its inputs, whether these may be padded, and what it returns per token."""

    make: Callable[[], Any]
    inputs: Callable[[], dict[str, Tensor]]
    sides: tuple[str, ...] = ("none",)
    output: str = "last_hidden_state"


BOTH = ("none", "left", "right")
HOSTS = {
    "llama": Host(lambda: decoder("llama"), lambda: {"input_ids": ids()}, BOTH, "logits"),
    "mistral with a window": Host(
        lambda: decoder("mistral", sliding_window=4), lambda: {"input_ids": ids()}, BOTH, "logits"
    ),
    "gpt2": Host(lambda: decoder("gpt2"), lambda: {"input_ids": ids()}, BOTH, "logits"),
    "bert": Host(lambda: hosts.bert(WIDTH, HEADS), lambda: {"input_ids": ids()}, BOTH),
    "roberta": Host(lambda: hosts.roberta(WIDTH, HEADS), lambda: {"input_ids": ids()}, BOTH),
    "distilbert": Host(lambda: hosts.distilbert(WIDTH, HEADS), lambda: {"input_ids": ids()}, BOTH),
    "vit": Host(lambda: hosts.vit(WIDTH, HEADS), lambda: {"pixel_values": torch.randn(B, 3, 8, 8)}),
    "t5": Host(t5, lambda: {"input_ids": ids(), "decoder_input_ids": ids(5)}, BOTH, "logits"),
    "whisper": Host(
        whisper, lambda: {"input_features": torch.randn(B, 6, 16), "decoder_input_ids": ids(5)}, output="logits"
    ),
}
CELLS = [(name, side) for name, host in HOSTS.items() for side in host.sides]


def run(host: Host, model: Any, inputs: dict[str, Tensor], implementation: str) -> tuple[Tensor, list[Tensor]]:
    """The outputs at tokens, and the gradients of all parameters of a random function of them."""
    model.set_attn_implementation(implementation)
    output = getattr(model(**inputs), host.output)
    if "attention_mask" in inputs and output.shape[1] == L:
        output = output[inputs["attention_mask"].bool()]
    weight = torch.linspace(-1, 1, output.numel()).reshape(output.shape)
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad((output * weight).sum(), parameters, allow_unused=True, materialize_grads=True)
    return output, list(gradients)


@pytest.mark.hosts
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("name", "side"), CELLS)
def test_our_softmax_equals_the_hosts_own(name: str, side: str, training: bool, interface: Any) -> None:
    host = HOSTS[name]
    model = host.make().double().train(training)
    inputs = {key: x.double() if x.is_floating_point() else x for key, x in host.inputs().items()}
    if side != "none":
        inputs["attention_mask"] = padded(side)
    expected, expected_gradients = run(host, model, inputs, "sdpa")
    found, gradients = run(host, model, inputs, "better_attention")
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.hosts
@pytest.mark.parametrize("name", HOSTS)
def test_in_single_precision_too(name: str, interface: Any) -> None:
    host = HOSTS[name]
    model, inputs = host.make().eval(), host.inputs()
    with torch.no_grad():
        model.set_attn_implementation("sdpa")
        expected = getattr(model(**inputs), host.output)
        model.set_attn_implementation("better_attention")
        found = getattr(model(**inputs), host.output)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def expressive_by_formula(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """arXiv 2407.18601 written out, in the form of the interface; masks are always given, see ``eager_mask``."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    z = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    weights = z**2 / (1 + z**2)
    if attention_mask is not None:
        weights = weights * torch.exp(attention_mask.clamp(min=-1e9))
    if position_bias is not None:
        weights = weights * torch.exp(position_bias)
    total = weights.sum(-1, keepdim=True)
    weights = weights / total.where(total > 0, 1.0)  # a query that sees no key
    return (weights @ value).transpose(1, 2).contiguous(), None


@pytest.mark.hosts
@pytest.mark.parametrize(("name", "side"), CELLS)
def test_expressive_equals_its_formula(name: str, side: str, interface: Any) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register("formula", expressive_by_formula)
    AttentionMaskInterface.register("formula", eager_mask)
    host = HOSTS[name]
    model = host.make().double()
    inputs = {key: x.double() if x.is_floating_point() else x for key, x in host.inputs().items()}
    if side != "none":
        inputs["attention_mask"] = padded(side)
    expected, expected_gradients = run(host, model, inputs, "formula")
    found, gradients = run(host, model, inputs, "expressive")
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7)
    softmax, _ = run(host, model, inputs, "better_attention")
    assert (softmax - found).abs().max() > 1e-3, "another score gives other numbers"


GENERATORS: dict[str, Callable[[], Any]] = {
    "llama": lambda: decoder("llama"),
    "mistral with a window": lambda: decoder("mistral", sliding_window=4),
    "gpt2": lambda: decoder("gpt2"),
    "t5": t5,
}


@pytest.mark.hosts
@pytest.mark.parametrize("implementation", ["better_attention", "expressive"])
@pytest.mark.parametrize("name", GENERATORS)
def test_generation_with_a_cache_equals_generation_without(name: str, implementation: str, interface: Any) -> None:
    model = GENERATORS[name]().eval()
    model.set_attn_implementation(implementation)
    prompt, mask = ids(), padded("left")
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    plain = model.generate(prompt, use_cache=False, **options)
    assert torch.equal(model.generate(prompt, use_cache=True, **options), plain)
    if name != "t5":
        assert torch.equal(model.generate(prompt, cache_implementation="static", **options), plain)
        for sample in range(B):  # left padding changes nothing
            alone = model.generate(prompt[sample : sample + 1, mask[sample].bool()], max_new_tokens=6, do_sample=False)
            assert torch.equal(alone[0, -6:], plain[sample, -6:])


@pytest.mark.hosts
@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_weights_are_returned_on_request(name: str, interface: Any) -> None:
    host = HOSTS[name]
    model, inputs = host.make().eval(), host.inputs()
    seen = {}
    for implementation in ("eager", "better_attention"):
        model.set_attn_implementation(implementation)
        result = model(**inputs, output_attentions=True)
        seen[implementation] = result.encoder_attentions if name == "t5" else result.attentions
    assert len(seen["eager"]) == 2
    for ours, theirs in zip(seen["better_attention"], seen["eager"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.hosts
def test_dropout_acts_in_training_alone(interface: Any) -> None:
    model = decoder("llama", attention_dropout=0.5)
    model.set_attn_implementation("expressive")
    x = ids()
    assert not torch.equal(model(x).logits, model(x).logits)
    model.eval()
    assert torch.equal(model(x).logits, model(x).logits)


@pytest.mark.hosts
def test_saved_and_loaded(tmp_path: Any, interface: Any) -> None:
    t = hosts.transformers()
    model = decoder("llama").eval()
    model.set_attn_implementation("expressive")
    model.save_pretrained(tmp_path)
    again = t.LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="expressive").eval()
    x = ids()
    assert torch.equal(again(x).logits, model(x).logits)


@pytest.mark.hosts
@pytest.mark.parametrize("argument", ["softcap", "s_aux", "sinks", "indices", "block_indices", "head_mask"])
def test_another_function_is_refused(argument: str, interface: Any) -> None:
    q = torch.randn(1, 2, 3, 4)
    refused(lambda: interface.attend(nn.Identity(), q, q, q, None, **{argument: torch.ones(2)}), argument, "eager")


@pytest.mark.hosts
def test_a_model_with_a_soft_cap_is_refused(interface: Any) -> None:
    t = hosts.transformers()
    config = t.Gemma2Config(
        vocab_size=hosts.VOCABULARY, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=HEADS,
        num_key_value_heads=2, head_dim=6, intermediate_size=31, max_position_embeddings=40, pad_token_id=0,
    )  # fmt: skip
    model = t.Gemma2ForCausalLM(config)
    model.set_attn_implementation("better_attention")
    refused(lambda: model(ids()), "softcap", "Gemma2Attention")


@pytest.mark.hosts
def test_packed_sequences_and_masks_of_other_kinds_are_refused(interface: Any) -> None:
    q = torch.randn(1, 2, 3, 4)
    lengths = torch.tensor([0, 1, 3])
    refused(lambda: interface.attend(nn.Identity(), q, q, q, None, cu_seq_lens_q=lengths), "cu_seq_lens_q")
    refused(lambda: interface.attend(nn.Identity(), q, q, q, torch.ones(1, 3)), "attention_mask", "(1, 3)")
    refused(lambda: interface.attend(nn.Identity(), q, q, q, object()), "attention_mask", "object")


def half_softmax(q: Tensor, k: Tensor, bias: Tensor | None, hide: Tensor | None) -> Tensor:
    """Softmax weights divided by two."""
    z = q @ k.transpose(-1, -2) + (0.0 if bias is None else bias)
    return torch.softmax(z if hide is None else z.masked_fill(hide, -1e30), -1) / 2


@pytest.mark.hosts
def test_a_registered_score_becomes_an_implementation(interface: Any) -> None:
    row = Score("half", "Half", ("S_i = softmax({z}) / 2",), "none", True, half_softmax)
    model, x = decoder("llama").eval(), ids()
    with registered(row):
        interface.register()
        found = run(HOSTS["llama"], model, {"input_ids": x}, "half")[0]
    softmax = run(HOSTS["llama"], model, {"input_ids": x}, "better_attention")[0]
    layer = model.model.layers[0].self_attn
    with torch.no_grad():
        layer.o_proj.weight /= 2
        model.model.layers[1].self_attn.o_proj.weight /= 2
    torch.testing.assert_close(found, run(HOSTS["llama"], model, {"input_ids": x}, "better_attention")[0])
    assert (softmax - found).abs().max() > 1e-3


def test_without_transformers_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "better_attention.adapters.transformers", raising=False)
    with pytest.raises(ImportError, match=r"better-attention\[transformers\]"):
        importlib.import_module("better_attention.adapters.transformers")
