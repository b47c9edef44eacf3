"""Tiny models of other libraries with random weights; a test that asks for one is skipped without the library."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import pytest
import torch
from torch import nn

VOCABULARY = 50


_OPERATORS: list[torch.library.Library] = []


def library(name: str, *, at_least: str | None = None) -> Any:
    """An imported library, or a skipped test.

    timm, and transformers where it is there, import torchvision, whose wheel may have been compiled for another torch;
    it then lacks two operators of its own. None of the models here calls them: their names alone are declared.
    """
    if importlib.util.find_spec("torchvision") and not _OPERATORS and not hasattr(torch.ops.torchvision, "nms"):
        operators = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            operators.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _OPERATORS.append(operators)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, minversion=at_least, reason=f"{name} is not installed: make test-hosts")


def transformers() -> Any:
    """The library, or a skipped test."""
    return library("transformers", at_least="5.24")


def assert_same(new: torch.Tensor, old: torch.Tensor, tolerance: float) -> None:
    """The largest difference is within ``tolerance``, of the largest number where that is above one."""
    torch.testing.assert_close(new, old, rtol=0, atol=tolerance * max(1.0, float(old.detach().abs().max())))


def random(model: nn.Module, spread: float = 0.3) -> nn.Module:
    """Every parameter random and far from its start: biases are zero there, and weights small."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return model


def _text(width: int, heads: int, attention: str) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "intermediate_size": 31,
        "max_position_embeddings": 40,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "attn_implementation": attention,
    }


def bert(width: int, heads: int, attention: str = "sdpa") -> Any:
    """A BERT encoder of two layers."""
    t = transformers()
    return random(t.BertModel(t.BertConfig(**_text(width, heads, attention)), add_pooling_layer=False))


def roberta(width: int, heads: int, attention: str = "sdpa") -> Any:
    """A RoBERTa encoder of two layers."""
    t = transformers()
    return random(t.RobertaModel(t.RobertaConfig(**_text(width, heads, attention)), add_pooling_layer=False))


def distilbert(width: int, heads: int, attention: str = "sdpa") -> Any:
    """A DistilBERT encoder of two layers."""
    t = transformers()
    config = t.DistilBertConfig(
        vocab_size=VOCABULARY, dim=width, n_layers=2, n_heads=heads, hidden_dim=31, max_position_embeddings=40,
        dropout=0.0, attention_dropout=0.0, attn_implementation=attention,
    )  # fmt: skip
    return random(t.DistilBertModel(config))


def vit(width: int, heads: int, attention: str = "sdpa") -> Any:
    """A vision transformer of two layers for 8 x 8 pixels: 4 patches and the class token."""
    t = transformers()
    options = _text(width, heads, attention)
    for name in ("vocab_size", "max_position_embeddings"):
        del options[name]
    return random(t.ViTModel(t.ViTConfig(image_size=8, patch_size=4, **options), add_pooling_layer=False))


def timm_vit(width: int, heads: int, attention: str = "sdpa", **options: Any) -> Any:
    """timm's vision transformer of two layers for 8 x 8 pixels; "eager" means without torch's fused attention."""
    model = library("timm").models.vision_transformer.VisionTransformer(
        img_size=8, patch_size=4, num_classes=5, embed_dim=width, depth=2, num_heads=heads, mlp_ratio=1.5, **options
    )
    for block in model.blocks:
        block.attn.fused_attn = attention == "sdpa"
    return random(model)


def gpt2(width: int, heads: int, attention: str = "sdpa", **options: Any) -> Any:
    """A GPT-2 language model of two layers."""
    t = transformers()
    config = t.GPT2Config(
        vocab_size=VOCABULARY, n_positions=40, n_embd=width, n_layer=2, n_head=heads, n_inner=31, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation=attention, bos_token_id=1, eos_token_id=None,
        pad_token_id=0, **options,
    )  # fmt: skip
    return random(t.GPT2LMHeadModel(config), 0.2)


def llama(width: int, heads: int, attention: str = "sdpa", groups: int | None = None, **options: Any) -> Any:
    """A Llama language model of two layers; ``groups`` heads of keys and values."""
    t = transformers()
    config = t.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=31, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=groups or heads, max_position_embeddings=40, attn_implementation=attention,
        bos_token_id=1, eos_token_id=None, pad_token_id=0, **options,
    )  # fmt: skip
    return random(t.LlamaForCausalLM(config), 0.2)


def t5(width: int, heads: int, attention: str = "sdpa", head_dim: int | None = None) -> Any:
    """A T5 of two layers on each side."""
    t = transformers()
    config = t.T5Config(
        vocab_size=VOCABULARY, d_model=width, d_kv=head_dim or width // heads, d_ff=31, num_layers=2, num_heads=heads,
        dropout_rate=0.0, attn_implementation=attention, decoder_start_token_id=0, eos_token_id=None, pad_token_id=0,
        relative_attention_num_buckets=8, relative_attention_max_distance=12,
    )  # fmt: skip
    return random(t.T5ForConditionalGeneration(config), 0.2)


def whisper(width: int, heads: int, attention: str = "sdpa") -> Any:
    """A Whisper of two layers on each side, for 20 frames of 8 frequencies: 10 positions."""
    t = transformers()
    config = t.WhisperConfig(
        vocab_size=VOCABULARY, d_model=width, encoder_layers=2, decoder_layers=2, encoder_attention_heads=heads,
        decoder_attention_heads=heads, encoder_ffn_dim=31, decoder_ffn_dim=31, num_mel_bins=8, max_source_positions=10,
        max_target_positions=40, dropout=0.0, attn_implementation=attention, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return random(t.WhisperModel(config), 0.2)


ATTENTION = (".attention.", ".attn.", ".self_attn.", ".encoder_attn.", ".SelfAttention.", ".EncDecAttention.")
"""Names of attention modules in these models, below which a conversion renames the parameters."""


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """The gradients of the parameters outside of the attention."""
    trained = ((n, p) for n, p in model.named_parameters() if not any(part in f".{n}" for part in ATTENTION))
    return {n: p.grad for n, p in trained if p.requires_grad and p.grad is not None}


def flash(model: Any) -> Any:
    """The model as if it had been built with flash attention, which this machine may lack."""
    model.config._attn_implementation = "flash_attention_2"
    return model


class Wrapped(nn.Linear):
    """A linear map of another class, as adapters and quantisers leave them."""


def wrapped(model: nn.Module) -> nn.Module:
    """The model with its first W_Q of another class."""
    for module in model.modules():
        if hasattr(module, "q_proj"):
            module.q_proj.__class__ = Wrapped
            return model
    raise AssertionError("no q_proj")
