"""A run of a language model as a model and a tokenizer of Hugging Face transformers.

>>> from better_attention.lab.trained.causal_lm import causal_lm  # doctest: +SKIP
>>> model, tokenizer = causal_lm("runs/text-lm-small/efficient-h4-s0")  # doctest: +SKIP
>>> model.save_pretrained("shakespeare"), tokenizer.save_pretrained("shakespeare")  # doctest: +SKIP
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from better_attention.lab.data.tokenisers import UNKNOWN_SIGN, BytePairs, Characters, Tokeniser, tokeniser_of
from better_attention.lab.models.language_model import LanguageModel
from better_attention.lab.tasks.language import LanguageTask
from better_attention.lab.trained.model import open_trained
from better_attention.lab.trained.origin import RunOrigin

if TYPE_CHECKING:
    from better_attention.lab.hugging_face.model import LanguageModelForCausalLM


def causal_lm(folder: str | Path) -> tuple[LanguageModelForCausalLM, Any]:
    """The model of a finished run of ``text-lm``, in eval mode, and its ``PreTrainedTokenizerFast``.

    Prompts are padded in front. Tokens that stand for no text are never generated.

    Raises:
        ValueError: the run is of another task, or its model was converted.
        FileNotFoundError: there is no finished run.
        ImportError: transformers or tokenizers is missing.
    """
    from better_attention.lab.hugging_face.model import LanguageModelConfig, LanguageModelForCausalLM

    trained = open_trained(Path(folder))
    origin = trained.origin
    if trained.converted or not isinstance(origin, RunOrigin) or not isinstance(origin.task, LanguageTask):
        raise ValueError(f"{folder} is not a run of text-lm as `better-attention compare text-lm` writes it.")
    assert isinstance(trained.model, LanguageModel)  # noqa: S101 - for the type checker
    task, tokeniser = origin.task.sized(origin.variant, origin.heads), tokeniser_of(origin.assets)
    config = LanguageModelConfig(
        vocab_size=task.vocabulary,
        max_position_embeddings=task.length,
        hidden_size=task.width,
        num_hidden_layers=task.layers,
        num_attention_heads=origin.heads,
        mechanism=origin.variant.mechanism.name,
        attention_options=origin.variant.options,
        positions=task.positions,
        window=task.window,
        num_key_value_heads=origin.variant.kv_heads(task.kv_heads, origin.heads),
        dropout=task.dropout,
        pad_token_id=0,
    )
    model = LanguageModelForCausalLM(config)
    model.model.load_state_dict(trained.model.state_dict())
    if tokeniser.never:
        model.generation_config.suppress_tokens = list(tokeniser.never)
    return model.eval(), tokenizer_of(tokeniser)


def tokenizer_of(tokeniser: Tokeniser) -> Any:
    """A tokeniser of ours as a ``PreTrainedTokenizerFast`` with the same numbers.

    Raises:
        TypeError: a tokeniser of another kind.
    """
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    if isinstance(tokeniser, BytePairs):
        fast = tokeniser.fast()
        fast.decoder = tokenizers.decoders.ByteLevel()
    elif isinstance(tokeniser, Characters):
        symbols = (UNKNOWN_SIGN, *tokeniser.symbols)
        vocabulary = {symbol: number for number, symbol in enumerate(symbols)}
        fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=UNKNOWN_SIGN))
        every_character = tokenizers.Regex(r"[\s\S]")
        fast.pre_tokenizer = tokenizers.pre_tokenizers.Split(every_character, behavior="isolated")
        fast.decoder = tokenizers.decoders.Fuse()
    else:
        raise TypeError(f"a {type(tokeniser).__name__} has no counterpart in transformers.")
    # Which token fills the places in front does not matter, because the attention mask hides it.
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        pad_token=fast.id_to_token(0),
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
