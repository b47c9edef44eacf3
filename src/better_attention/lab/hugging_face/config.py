"""The configuration of the lab's language model inside transformers."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from better_attention.errors import check_int
from better_attention.layer.projections import check_kv_heads
from better_attention.mechanism import Mechanism


class LanguageModelConfig(PreTrainedConfig):
    """What a :class:`.model.LanguageModelForCausalLM` is built from.

    Attributes:
        vocab_size: number of different tokens.
        max_position_embeddings: sequence length that it is trained at: the size of W_A (without a window) and of
            learned positions.
        hidden_size: model width.
        num_hidden_layers: number of blocks.
        num_attention_heads: number of heads in each block.
        num_key_value_heads: heads of projected keys and values, each of which serves as many neighbouring query heads;
            divides ``num_attention_heads``. None: as many as queries have.
        mechanism: a name from :data:`better_attention.MECHANISMS`, or one with suffixes, as ``"efficient+expressive"``.
        attention_options: further arguments of every :class:`better_attention.MultiheadAttention`.
        positions: ``"rotary"``, ``"learned"``, ``"alibi-weight"`` or ``"alibi-score"``.
        window: each token sees the last ``window`` tokens; None: all before it.
        scale: factor on q.k: None for 1/sqrt(head width), a number, or ``"learned"``.
        dropout: on embeddings, attention weights, and after both halves of a block.
        tie_word_embeddings: True; the token embeddings are the output map.

    Raises:
        ValueError: no vocabulary, embeddings that are not tied, or fewer heads of keys and values than the mechanism or
            the number of heads allows.
    """

    model_type = "better_attention_lm"
    keys_to_ignore_at_inference = ["cache"]  # noqa: RUF012 - as transformers declares it

    vocab_size: int = 512
    max_position_embeddings: int = 1024
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    mechanism: str = "standard"
    attention_options: dict[str, Any] | None = None
    positions: str = "rotary"
    window: int | None = None
    scale: float | str | None = None
    dropout: float = 0.0
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.check()

    def check(self) -> None:
        """Refuse what no model can be built from and what this one does not heed; attributes can be set later.

        Raises:
            ValueError: see the class.
        """
        check_int(self.vocab_size, "vocab_size")
        if not self.tie_word_embeddings:
            raise ValueError(
                f"tie_word_embeddings must be True, received {self.tie_word_embeddings!r}: the token embeddings are "
                "the output map of this model, which has no other. Leave it out."
            )
        check_kv_heads(
            self.num_key_value_heads,
            check_int(self.num_attention_heads, "num_attention_heads"),
            Mechanism.of(self.mechanism),
            ("num_key_value_heads", "num_attention_heads"),
        )
