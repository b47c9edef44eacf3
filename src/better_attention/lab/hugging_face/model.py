"""The lab's language model with the interface of transformers: configuration, saving, generation, Trainer.

>>> from better_attention.lab.hugging_face.model import LanguageModelConfig, LanguageModelForCausalLM  # doctest: +SKIP
>>> model = LanguageModelForCausalLM(LanguageModelConfig(vocab_size=66, mechanism="efficient"))  # doctest: +SKIP

Importing this module registers both with ``AutoConfig`` and ``AutoModelForCausalLM``. ``save_pretrained`` writes
safetensors and JSON alone; the checkpoints of ``Trainer`` also contain transformers' own pickles of the optimiser.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from better_attention.lab.models.initialisation import gpt2_map_
from better_attention.lab.models.language_model import RESIDUAL, LanguageBlock, LanguageModel
from better_attention.layer.alignment import Alignment
from better_attention.layer.scale import LearnedScale
from better_attention.layer.window import WindowAlignment

from .cache import GenerationCache
from .config import LanguageModelConfig as LanguageModelConfig
from .finite import FiniteLogits

# After .cache, which says what to install where it is missing.
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel  # isort: skip
from transformers import LogitsProcessorList  # isort: skip
from transformers.modeling_outputs import CausalLMOutputWithPast  # isort: skip

LOSS_OPTIONS = ("num_items_in_batch", "ignore_index", "shift_labels")
"""What the loss of transformers takes besides the labels; Trainer passes the first one."""
NOT_THERE = ("output_attentions", "output_hidden_states", "inputs_embeds")
"""What hosts pass to every model as None or False, and what this one has not."""
ASSISTED_ROOM = 256
"""Tokens that a draft of another model may have, under a window: all of them may have to be taken back."""


class LanguageModelForCausalLM(PreTrainedModel, GenerationMixin):
    """:class:`~better_attention.lab.models.language_model.LanguageModel` as transformers' models are used.

    Args:
        config: sizes, mechanism, positions, window, heads of keys and values.

    Raises:
        ValueError: a configuration that the model refuses.
    """

    config: LanguageModelConfig
    config_class = LanguageModelConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _no_split_modules = [LanguageBlock.__name__]  # noqa: RUF012 - as transformers declares it

    def __init__(self, config: LanguageModelConfig) -> None:
        config.check()
        super().__init__(config)
        self.model = LanguageModel(
            vocabulary=config.vocab_size,
            length=config.max_position_embeddings,
            width=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            mechanism=config.mechanism,
            options=config.attention_options,
            positions=config.positions,
            window=config.window,
            scale=config.scale,
            kv_heads=config.num_key_value_heads,
            dropout=config.dropout,
        )
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: GenerationCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **options: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits (B, L, V) of the token after each of ``input_ids``, and the loss where there are ``labels``.

        Args:
            input_ids: (B, L), the tokens behind those in the cache.
            attention_mask: (B, S), 0 where there is no token; of all tokens, those in the cache included.
            position_ids: (B, L) or (1, L), number of each token in its text; None: from ``attention_mask``.
            cache: of a generation; None with ``use_cache``: a new one. ``past_key_values``, its earlier name, is
                taken too.
            labels: (B, L), the tokens themselves; -100 where no loss is wanted. They are shifted here.
            use_cache: return a cache.
            logits_to_keep: how many of the last tokens get logits, 0: all; or the places of those that do, whole
                numbers (n,) for all rows or (B, n), or bool (B, L), which gives (n, V).
            return_dict: False: a tuple of what there is of loss, logits and cache; None: as the configuration says.
            options: what the loss takes: ``num_items_in_batch``, ``ignore_index``, ``shift_labels``.

        Raises:
            TypeError: an unknown keyword, or another cache.
            ValueError: no token, or one that the vocabulary does not have; a mask of another shape; attentions or
                hidden states as outputs.
        """
        cache = _earlier_name(options, cache)
        _refuse(options, attention_mask, cache)
        if cache is None and use_cache:
            cache = GenerationCache()
        logits: Tensor = self.model(
            input_ids,
            padding_BL=_padding(attention_mask, input_ids.shape[1]),
            positions_BL=None if position_ids is None else position_ids.expand(input_ids.shape),
            cache=None if cache is None else cache.of(self.model, len(input_ids)),
            last=logits_to_keep if isinstance(logits_to_keep, Tensor) else logits_to_keep or None,
        )
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **options)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, cache=cache)
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        logits_processor: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """``generate`` of transformers, with all of its arguments.

        Args:
            inputs: (B, L), the prompts; the same as ``input_ids``.
            generation_config, logits_processor, args, kwargs: see transformers.

        Raises:
            ValueError: a prompt without a token, or with one that the vocabulary does not have; logits that are NaN or
                infinite, on a GPU at the end.
        """
        prompts = kwargs.get("input_ids") if inputs is None else inputs
        if isinstance(prompts, Tensor):
            self.model.check_prompts(prompts)  # once a prompt, because a GPU has to be waited for
        finite = FiniteLogits()
        processors = LogitsProcessorList([finite, *(logits_processor or ())])
        found = super().generate(inputs, generation_config, processors, *args, **kwargs)
        finite.check()
        return found

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embeddings, which are the output map as well."""
        return self.model.tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace them."""
        self.model.tokens = value

    def _init_weights(self, module: nn.Module) -> None:
        # transformers calls this for each module of which a checkpoint lacks something, and guards torch's
        # initialisers: what was loaded stays as it is.
        if isinstance(module, nn.Linear | nn.Embedding):
            adds = any(one is module for name, one in self.model.named_modules() if name.endswith(RESIDUAL))
            gpt2_map_(module, adds=self.config.num_hidden_layers if adds else 0)
        # W_A draws with functions of its own, which nothing guards.
        elif isinstance(module, Alignment | WindowAlignment | LearnedScale | nn.RMSNorm) and not all(
            getattr(parameter, "_is_hf_initialized", False) for parameter in module.parameters()
        ):
            module.reset_parameters()

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: str,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Our cache instead of transformers' own, unless the caller brought one or wants none."""
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} is one of transformers' own caches; "
                "this model has another, which grows. Leave cache_implementation out."
            )
        # Of a draft all tokens may have to be taken back, by the model that reads it and by the one that wrote it.
        room = ASSISTED_ROOM if getattr(generation_config, "is_assistant", False) else 0
        if generation_mode == "assisted_generation":
            room = min(generation_config.prompt_lookup_num_tokens or ASSISTED_ROOM, max_cache_length)
        cache = model_kwargs.get("cache")
        if cache is not None:
            _check_cache(cache)
            cache.make_room(room)
            cache._is_user_defined = True  # as transformers marks it
        elif generation_config.use_cache is not False:
            model_kwargs["cache"] = GenerationCache(rewind_room=room)


def _padding(attention_mask: Tensor | None, L: int) -> Tensor | None:
    """Where the new tokens are padding, (B, L); None where none is."""
    if attention_mask is None:
        return None
    padding_BL = attention_mask[:, -L:] == 0
    return padding_BL if bool(padding_BL.any()) else None


def _earlier_name(options: dict[str, Any], cache: GenerationCache | None) -> GenerationCache | None:
    """The cache, which may have come as ``past_key_values``: its name before transformers 5.24."""
    earlier: GenerationCache | None = options.pop("past_key_values", None)
    if earlier is not None and cache is not None:
        raise ValueError("past_key_values is the earlier name of cache, and both were given: leave out the former.")
    return cache if earlier is None else earlier


def _refuse(options: dict[str, Any], attention_mask: Tensor | None, cache: object) -> None:
    for name in NOT_THERE:
        value = options.pop(name, None)
        if value is not None and value is not False:
            raise ValueError(
                f"this model returns no {name.removeprefix('output_')} and reads tokens alone: leave {name} out. For "
                "the weights use better_attention.attention_maps(model, ...)."
            )
    if unknown := [name for name in options if name not in LOSS_OPTIONS]:
        raise TypeError(
            f"this model takes no {', '.join(unknown)}. It takes input_ids, attention_mask, position_ids, cache, "
            f"labels, use_cache, logits_to_keep, return_dict, and for the loss {', '.join(LOSS_OPTIONS)}."
        )
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(f"attention_mask must be (batch, tokens), received shape {tuple(attention_mask.shape)}.")
    if cache is not None:
        _check_cache(cache)


def _check_cache(cache: object) -> None:
    if not isinstance(cache, GenerationCache):
        raise TypeError(
            f"cache must be a GenerationCache (better_attention.lab.hugging_face.cache), received "
            f"{type(cache).__name__}. Leave it out, and generate() makes one."
        )


AutoConfig.register(LanguageModelConfig.model_type, LanguageModelConfig)
AutoModelForCausalLM.register(LanguageModelConfig, LanguageModelForCausalLM)
