"""The layer: the picture in DESIGN.md as consecutive calls of ``keras.ops``.

query, key, value -> project -> align -> score -> mix -> output. Shape suffixes: B batch, L queries, S keys, N heads,
H head width, D width of an input.
"""

from __future__ import annotations

import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import keras
from keras import ops

from better_attention.errors import check_bool, check_choice, check_float, check_int
from better_attention.mechanism import Mechanism
from better_attention.scores import DEFAULT_SCORE

from . import masks
from .alignment import Alignment, WindowAlignment, check_alignment
from .axes import Axes, attended_axes
from .inputs import check_inputs, check_slices, refuse_leak
from .scores import SCORES


@keras.saving.register_keras_serializable(package="better_attention")
class MultiHeadAttention(keras.layers.Layer):
    r"""Multi-head attention with any mechanism; takes the place of ``keras.layers.MultiHeadAttention``.

    Head i computes :math:`\mathrm{weights}(Q W^Q_i (K W^K_i)^\top / \sqrt{d_k}) \, W_A V W^V_i`, and the joined heads
    go through :math:`W^O`; a mechanism says which maps are learned (a missing one slices its input instead), whether
    W_A is there, and which score makes the weights.

    Args:
        num_heads: number of heads N.
        key_dim: width of a head's queries and keys. The papers' layers have ``key_dim = features // num_heads``, and
            a mechanism that slices its keys needs it: ``num_heads * key_dim`` is the width of the key.
        value_dim: width of a head's values; None: ``key_dim``.
        dropout: probability of dropping an attention weight in training.
        use_bias: biases of the linear maps, and of W_A.
        output_shape: features of the output, an int or a tuple; None: those of the query.
        attention_axes: axes of the input that are attended over; None: all but batch and features.
        sliding_window: each query sees keys at most ``sliding_window`` - 1 places away, on both sides; with
            ``use_causal_mask`` on the left alone. W_A is then window x window and acts on the tokens of each window
            (:mod:`better_attention.layer.window`), which needs ``use_causal_mask``; it takes the place of ``max_len``.
        flash_attention: as in Keras: None for what Keras is configured to, True to insist; for the softmax score.
        kernel_initializer: of the linear maps; W_A has ``align_init``.
        bias_initializer: of their biases, and of W_A's.
        kernel_regularizer: of the linear maps and of W_A.
        bias_regularizer: of their biases, and of W_A's.
        activity_regularizer: of what the linear maps return.
        kernel_constraint: of the linear maps and of W_A.
        bias_constraint: of their biases, and of W_A's.
        use_gate: multiply the joined heads by a sigmoid of a linear map of the query (arXiv 2505.06708).
        seed: of dropout.
        mechanism: a name from ``MECHANISMS``, ``"optimized"``, ``"NAME+expressive"``, ``"NAME+align"``, or a
            ``Mechanism``.
        score: "softmax" or "expressive": the mechanism with this score; None: the mechanism's own.
        max_len: longest value sequence, the size of W_A; required by aligned mechanisms without a window.
        align_heads: one W_A for all heads ("shared") or one "per_head".
        align_causal: keep W_A lower triangular; needed under a causal mask.
        align_init: "xavier" or "identity".
        scale: factor on q.k: None for 1/sqrt(key_dim), a number, or "learned", which starts there, one for each head.
        impl: "ops" for ``keras.ops``, or "kernels" for this package's compiled CPU kernels, on JAX alone and built at
            their first use (:mod:`better_attention.keras.kernels`). Calls that drop weights or return them, and W_A of
            a window, are computed in ``keras.ops`` with both.
        kwargs: those of every Keras layer, ``name`` and ``dtype`` for example.

    Raises:
        ValueError, TypeError: arguments out of range, or that cannot mean anything for the mechanism.

    Note:
        Deliberate differences from Keras' class. A query with every key hidden always gets weights 0 and the output
        bias (Keras: the mean of all values, hidden ones too, where it makes no attention scores). An explicit
        ``query_mask`` is honoured (Keras reads the mask that is attached to the query, and no other). Numbers in padded
        keys and values, NaN included, never reach the output. The shape of the attention scores is right for
        cross-attention in symbolic calls too.

    Source: arXiv 2403.01643, definitions 1-4; arXiv 2407.18601.

    >>> layer = MultiHeadAttention(4, key_dim=8, mechanism="super", max_len=10)
    >>> x = keras.ops.zeros((2, 10, 32))
    >>> output, weights = layer(x, x, return_attention_scores=True)
    >>> output.shape, weights.shape
    ((2, 10, 32), (2, 4, 10, 10))
    """

    def __init__(
        self,
        num_heads: int,
        key_dim: int,
        value_dim: int | None = None,
        dropout: float = 0.0,
        use_bias: bool = True,
        output_shape: int | Sequence[int] | None = None,
        attention_axes: int | Sequence[int] | None = None,
        sliding_window: int | None = None,
        flash_attention: bool | None = None,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        activity_regularizer: Any = None,
        kernel_constraint: Any = None,
        bias_constraint: Any = None,
        use_gate: bool = False,
        seed: int | None = None,
        *,
        mechanism: str | Mechanism | Mapping[str, Any] = "standard",
        score: str | None = None,
        max_len: int | None = None,
        align_heads: str = "shared",
        align_causal: bool = False,
        align_init: str = "xavier",
        scale: float | str | None = None,
        impl: str = "ops",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True  # the query's mask is the output's
        self._mechanism = _mechanism(mechanism, score)
        self._num_heads = check_int(num_heads, "num_heads")
        self._key_dim = check_int(key_dim, "key_dim")
        self._value_dim = self._key_dim if value_dim is None else check_int(value_dim, "value_dim")
        self._dropout = check_float(dropout, "dropout", low=0.0, high=1.0)
        self._use_bias = check_bool(use_bias, "use_bias")
        self._use_gate = check_bool(use_gate, "use_gate")
        self._output_shape = _output_shape(output_shape, self._mechanism)
        self._attention_axes = _given_axes(attention_axes)
        self._sliding_window = None if sliding_window is None else check_int(sliding_window, "sliding_window")
        self._scale = _scale(scale)
        self._impl = _impl(impl)
        self.seed = seed if seed is None else check_int(seed, "seed", at_least=0)
        self._max_len = None if max_len is None else check_int(max_len, "max_len")
        check_alignment(
            self._mechanism.name,
            self._mechanism.aligned,
            self._max_len,
            self._sliding_window,
            align_heads,
            align_causal,
            align_init,
        )
        self._align_options = {"heads": align_heads, "init": align_init}
        self._align_causal = check_bool(align_causal, "align_causal")
        self._given_flash = flash_attention
        self._flash_attention = self._flash(flash_attention)
        self._kernel_initializer = keras.initializers.get(kernel_initializer)
        self._bias_initializer = keras.initializers.get(bias_initializer)
        self._kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self._bias_regularizer = keras.regularizers.get(bias_regularizer)
        self._activity_regularizer = keras.regularizers.get(activity_regularizer)
        self._kernel_constraint = keras.constraints.get(kernel_constraint)
        self._bias_constraint = keras.constraints.get(bias_constraint)
        self._log_scale: Any = None
        # Named as in Keras' layer: a file of its weights loads here, and in `keras.layers.MultiHeadAttention` ours.
        self._query_dense: Any = None
        self._key_dense: Any = None
        self._gate_dense: Any = None
        self._value_dense: Any = None
        self._align: Any = None
        self._dropout_layer: Any = None
        self._output_dense: Any = None

    # --- what it was made with --------------------------------------------------------------------------------------

    @property
    def mechanism(self) -> Mechanism:
        """What the layer computes, the argument ``score`` included."""
        return self._mechanism

    @property
    def num_heads(self) -> int:
        """Number of heads N."""
        return self._num_heads

    @property
    def key_dim(self) -> int:
        """Width of a head's queries and keys."""
        return self._key_dim

    @property
    def value_dim(self) -> int:
        """Width of a head's values."""
        return self._value_dim

    @property
    def dropout(self) -> float:
        """Probability of dropping an attention weight in training."""
        return self._dropout

    @property
    def use_bias(self) -> bool:
        """Whether the maps and W_A have biases."""
        return self._use_bias

    @property
    def attention_axes(self) -> tuple[int, ...] | None:
        """The axes that are attended over, as given."""
        return self._attention_axes

    @property
    def query_dense(self) -> Any:
        """W_Q, or None where it is not learned."""
        return self._query_dense

    @property
    def key_dense(self) -> Any:
        """W_K, or None."""
        return self._key_dense

    @property
    def value_dense(self) -> Any:
        """W_V, or None."""
        return self._value_dense

    @property
    def align(self) -> Any:
        """W_A, or None."""
        return self._align

    @property
    def output_dense(self) -> Any:
        """W_O, or None."""
        return self._output_dense

    @property
    def log_scale(self) -> Any:
        """The variable of ``scale="learned"``, (N,), or None."""
        return self._log_scale

    def get_config(self) -> dict[str, Any]:
        """Everything that :meth:`from_config` needs, as JSON can hold it."""
        row = self._mechanism
        named = not row.name.startswith("custom(")
        plain = {"projections": "".join(sorted(row.projections)), "aligned": row.aligned, "score": row.score}
        return {
            **super().get_config(),
            "num_heads": self._num_heads,
            "key_dim": self._key_dim,
            "value_dim": self._value_dim,
            "dropout": self._dropout,
            "use_bias": self._use_bias,
            "output_shape": self._output_shape,
            "attention_axes": self._attention_axes,
            "sliding_window": self._sliding_window,
            "flash_attention": self._given_flash,
            "kernel_initializer": keras.initializers.serialize(self._kernel_initializer),
            "bias_initializer": keras.initializers.serialize(self._bias_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self._kernel_regularizer),
            "bias_regularizer": keras.regularizers.serialize(self._bias_regularizer),
            "activity_regularizer": keras.regularizers.serialize(self._activity_regularizer),
            "kernel_constraint": keras.constraints.serialize(self._kernel_constraint),
            "bias_constraint": keras.constraints.serialize(self._bias_constraint),
            "use_gate": self._use_gate,
            "seed": self.seed,
            "mechanism": row.name if named else plain,
            "max_len": self._max_len,
            "align_heads": self._align_options["heads"],
            "align_causal": self._align_causal,
            "align_init": self._align_options["init"],
            "scale": self._scale,
            "impl": self._impl,
        }

    # --- building ---------------------------------------------------------------------------------------------------

    def build(
        self, query_shape: Sequence[Any], value_shape: Sequence[Any], key_shape: Sequence[Any] | None = None
    ) -> None:
        """Add the learned maps that the mechanism has, for inputs of these shapes.

        Raises:
            ValueError: widths that do not go together where a map is missing, or axes that the inputs do not have.
        """
        key_shape = value_shape if key_shape is None else key_shape
        check_inputs(query_shape, value_shape, key_shape)
        self._axes(len(query_shape))
        learned, N = self._mechanism.projections, self._num_heads
        check_slices(self, query_shape, key_shape, value_shape)
        # In Keras' order, so that lists of weights can be exchanged.
        if "q" in learned:
            self._query_dense = self._projection("query", query_shape, self._key_dim)
        if "k" in learned:
            self._key_dense = self._projection("key", key_shape, self._key_dim)
        if self._use_gate:
            self._gate_dense = self._projection("gate", query_shape, self._value_dim, activation="sigmoid")
        if "v" in learned:
            self._value_dense = self._projection("value", value_shape, self._value_dim)
        if self._mechanism.aligned:
            self._align = self._alignment()
            self._align.build()
        self._dropout_layer = keras.layers.Dropout(self._dropout, dtype=self.dtype_policy, seed=self.seed)
        if self._scale == "learned":
            # A logarithm, because no step of an optimiser can then make the factor zero or negative.
            start = keras.initializers.Constant(-0.5 * math.log(self._key_dim))
            self._log_scale = self.add_weight(name="log_scale", shape=(N,), initializer=start)
        if "o" in learned:
            self._output_dense = self._output_projection(query_shape)
        self.built = True

    def _axes(self, rank: int) -> Axes:
        return attended_axes(self._attention_axes, rank)

    def _projection(self, name: str, shape: Sequence[Any], width: int, **options: Any) -> Any:
        """(..., D) to (..., N, width)."""
        free, D, N, H = string.ascii_lowercase[: len(shape) - 1], "x", "y", "z"
        dense = keras.layers.EinsumDense(
            f"{free}{D},{D}{N}{H}->{free}{N}{H}",
            output_shape=(*[None] * (len(shape) - 2), self._num_heads, width),
            bias_axes=f"{N}{H}" if self._use_bias else None,
            name=name,
            **self._common(),
            **options,
        )
        dense.supports_masking = True  # masks are this layer's affair, and no warning is due
        dense.build(tuple(shape))
        return dense

    def _output_projection(self, query_shape: Sequence[Any]) -> Any:
        """(..., N, H) to (..., output shape)."""
        rank, output = len(query_shape), self._output_shape or (query_shape[-1],)
        letters = iter(string.ascii_lowercase)
        free = "".join(next(letters) for _ in range(rank - 1))
        joined = "".join(next(letters) for _ in range(2))
        result = "".join(next(letters) for _ in output)
        dense = keras.layers.EinsumDense(
            f"{free}{joined},{joined}{result}->{free}{result}",
            output_shape=(*[None] * (rank - 2), *output),
            bias_axes=result if self._use_bias else None,
            name="attention_output",
            **self._common(),
        )
        dense.supports_masking = True
        dense.build((*query_shape[:-1], self._num_heads, self._value_dim))
        return dense

    def _common(self) -> dict[str, Any]:
        """What all linear maps share. An initialiser draws the same numbers each time, so that each has its own."""
        kernel, bias = self._kernel_initializer, self._bias_initializer
        return {
            "kernel_initializer": kernel.__class__.from_config(kernel.get_config()),
            "bias_initializer": bias.__class__.from_config(bias.get_config()),
            "kernel_regularizer": self._kernel_regularizer,
            "bias_regularizer": self._bias_regularizer,
            "activity_regularizer": self._activity_regularizer,
            "kernel_constraint": self._kernel_constraint,
            "bias_constraint": self._bias_constraint,
            "dtype": self.dtype_policy,
        }

    def _alignment(self) -> Any:
        common = self._common()
        del common["kernel_initializer"], common["activity_regularizer"]
        options = {**common, **self._align_options, "use_bias": self._use_bias, "name": "align"}
        if self._sliding_window is not None:
            return WindowAlignment(self._sliding_window, self._num_heads, **options)
        if self._max_len is None:
            raise AssertionError("check_alignment() lets no aligned mechanism through without a size")
        return Alignment(self._max_len, self._num_heads, self._align_causal, **options)

    # --- calling ----------------------------------------------------------------------------------------------------

    def call(
        self,
        query: Any,
        value: Any,
        key: Any | None = None,
        query_mask: Any | None = None,
        value_mask: Any | None = None,
        key_mask: Any | None = None,
        attention_mask: Any | None = None,
        return_attention_scores: bool = False,
        training: bool | None = None,
        use_causal_mask: bool = False,
    ) -> Any:
        """Attend; arguments and result are those of ``keras.layers.MultiHeadAttention.call``.

        Args:
            query: (batch, L, D).
            value: (batch, S, D_v). With ``attention_axes`` the inputs may have more dimensions.
            key: (batch, S, D_k); None: the value.
            query_mask: (batch, L), True for real tokens. By default the mask that is attached to the query.
            value_mask: (batch, S), True for real tokens, likewise. Padded values do not reach W_A.
            key_mask: (batch, S), True for real tokens, likewise.
            attention_mask: (batch, L, S), True where a query sees a key; dimensions before (L, S) are broadcast.
            return_attention_scores: also return the weights, (batch, N, L, S), before dropout.
            training: whether dropout is active.
            use_causal_mask: query l sees keys s <= l; masks apply as well.

        Returns:
            The output (batch, L, D), or with ``output_shape`` those features; and the weights, if asked for.

        Raises:
            ValueError, TypeError: inputs that do not fit the layer or one another.
        """
        key = value if key is None else key
        check_inputs(query.shape, value.shape, key.shape)
        axes = self._axes(len(query.shape))
        self._check_call(axes, query, value, attention_mask, return_attention_scores, use_causal_mask)
        query_mask = masks.padding(query_mask, query, axes, "query_mask")
        present = masks.both(
            masks.padding(value_mask, value, axes, "value_mask"), masks.padding(key_mask, key, axes, "key_mask")
        )

        # project
        q_BLNH = axes.flat(self._projected(self._query_dense, query), 2)
        k_BSNH = _where_present(present, axes.flat(self._projected(self._key_dense, key), 2))
        v_BSNH = _where_present(present, axes.flat(self._projected(self._value_dense, value), 2))
        L, S = ops.shape(q_BLNH)[1], ops.shape(v_BSNH)[1]
        # align
        if isinstance(self._align, Alignment):
            v_BSNH = self._align(v_BSNH)
        # score and mix
        mask = None if attention_mask is None else ops.cast(ops.convert_to_tensor(attention_mask), "bool")
        if mask is not None:
            refuse_leak(self, mask)
            mask = axes.flat_mask(mask, query, value, self._num_heads)
        compiled = self._impl == "kernels" and not self._needs_weights(training, return_attention_scores)
        band = masks.band(L, S, causal=use_causal_mask and not compiled, window=self._sliding_window)
        keep = masks.of_weights(query_mask, present, mask, band)
        weights_BNLS = None
        if compiled:
            heads_BLNH = self._compiled(q_BLNH, k_BSNH, v_BSNH, keep, use_causal_mask)
        else:
            heads_BLNH, weights_BNLS = self._attend(q_BLNH, k_BSNH, v_BSNH, keep, training, return_attention_scores)
        # output
        joined = axes.unflat(heads_BLNH, query)
        if self._gate_dense is not None:
            joined = joined * self._gate_dense(query)
        if self._output_dense is None:
            output = ops.reshape(joined, (*ops.shape(joined)[:-2], self._num_heads * self._value_dim))
        else:
            output = self._output_dense(joined)
        return (output, axes.unflat_weights(weights_BNLS, query, value)) if return_attention_scores else output

    def _projected(self, dense: Any, x: Any) -> Any:
        """(..., D) as (..., N, H): head i of a map that is not learned has columns i H ... (i + 1) H."""
        if dense is not None:
            return dense(x)
        width = x.shape[-1] // self._num_heads
        return ops.reshape(x, (*ops.shape(x)[:-1], self._num_heads, width))

    def _attend(
        self, q_BLNH: Any, k_BSNH: Any, v_BSNH: Any, keep: Any | None, training: bool | None, wanted: bool
    ) -> tuple[Any, Any | None]:
        """Heads (B, L, N, H), and the weights (B, N, L, S) where the way to the heads makes them."""
        q_BLNH, scale = self._scaled(q_BLNH)
        if self._mechanism.score == "softmax" and self._one_width and not self._needs_weights(training, wanted):
            return self._fused(q_BLNH, k_BSNH, v_BSNH, keep, scale), None
        z_BNLS = ops.einsum("blnh,bsnh->bnls", q_BLNH * ops.cast(scale, q_BLNH.dtype), k_BSNH)
        dtype = keras.backend.standardize_dtype(z_BNLS.dtype)
        # Squares of half-precision scores would overflow, and their sums lose digits.
        z_BNLS = ops.cast(z_BNLS, "float32") if dtype in ("float16", "bfloat16") else z_BNLS
        weights_BNLS = ops.cast(SCORES[self._mechanism.score](z_BNLS, keep), dtype)
        mixing_BNLS = self._dropout_layer(weights_BNLS, training=training) if self._drops(training) else weights_BNLS
        if isinstance(self._align, WindowAlignment):
            return self._align(mixing_BNLS, v_BSNH), weights_BNLS
        return ops.einsum("bnls,bsnh->blnh", mixing_BNLS, v_BSNH), weights_BNLS

    @property
    def _one_width(self) -> bool:
        """Whether keys and values are equally wide, as the backends' own kernels need them."""
        return self._value_dim == self._key_dim

    def _drops(self, training: bool | None) -> bool:
        return bool(training) and self._dropout > 0.0

    def _needs_weights(self, training: bool | None, wanted: bool) -> bool:
        """Whether the weights have to be there, and not only what they mix."""
        return wanted or self._drops(training) or isinstance(self._align, WindowAlignment)

    def _scaled(self, q_BLNH: Any) -> tuple[Any, float]:
        """Queries times the learned scale, and the part of the scale that is a number."""
        if self._log_scale is not None:
            return q_BLNH * ops.cast(ops.exp(self._log_scale), q_BLNH.dtype)[:, None], 1.0
        return q_BLNH, 1.0 / math.sqrt(self._key_dim) if self._scale is None else float(self._scale)

    def _compiled(self, q_BLNH: Any, k_BSNH: Any, v_BSNH: Any, keep: Any | None, causal: bool) -> Any:
        """Attention by this package's kernels, for JAX."""
        from .kernels import attention

        q_BLNH, scale = self._scaled(q_BLNH)
        return attention(q_BLNH, k_BSNH, v_BSNH, keep, score=self._mechanism.score, causal=causal, scale=scale)

    def _fused(self, q_BLNH: Any, k_BSNH: Any, v_BSNH: Any, keep: Any | None, scale: float) -> Any:
        """Softmax attention by the backend's own kernel."""
        heads_BLNH = ops.dot_product_attention(
            q_BLNH, k_BSNH, v_BSNH, mask=keep, scale=scale, flash_attention=self._flash_attention
        )
        if keep is None:
            return heads_BLNH
        # The backends give a query without a key to see the mean of all values, or NaN.
        sees_BLN1 = ops.transpose(ops.any(keep, axis=-1, keepdims=True), (0, 2, 1, 3))
        return ops.where(sees_BLN1, heads_BLNH, ops.zeros_like(heads_BLNH))

    def _flash(self, flash_attention: bool | None) -> bool | None:
        """The setting that reaches the backend.

        Raises:
            ValueError: insisted upon where no such kernel computes the layer.
        """
        if flash_attention is not None:
            check_bool(flash_attention, "flash_attention")
        flash = flash_attention or keras.config.is_flash_attention_enabled()
        reasons = {
            f"score {self._mechanism.score!r}": self._mechanism.score != DEFAULT_SCORE,
            f"dropout={self._dropout}": self._dropout > 0.0,
            f"value_dim={self._value_dim} and key_dim={self._key_dim}": not self._one_width,
            "W_A of a sliding window": self._mechanism.aligned and self._sliding_window is not None,
        }
        cannot = [reason for reason, holds in reasons.items() if holds]
        if flash_attention and cannot:
            raise ValueError(
                f"flash_attention=True computes softmax attention without dropout, with keys and values of one width; "
                f"this layer has {cannot[0]}. Leave flash_attention out."
            )
        return None if cannot else flash

    def _check_call(
        self, axes: Axes, query: Any, value: Any, attention_mask: Any | None, scores: bool, causal: bool
    ) -> None:
        check_bool(scores, "return_attention_scores")
        check_bool(causal, "use_causal_mask")
        if len(axes.attended) > 1 and (causal or self._sliding_window is not None):
            setting = "use_causal_mask=True" if causal else f"sliding_window={self._sliding_window}"
            raise ValueError(
                f"{setting} needs one axis whose places have an order, but attention is over the axes "
                f"{axes.attended}: pass attention_mask, or choose one axis with attention_axes."
            )
        if scores and self._given_flash:
            raise ValueError("flash_attention=True makes no attention scores: leave one of the two out.")
        lengths = [x.shape[axis] for x in (query, value) for axis in axes.attended]
        self._check_alignment_call(lengths, value, causal)

    def _check_alignment_call(self, lengths: list[Any], value: Any, causal: bool) -> None:
        name = self._mechanism.name
        half = len(lengths) // 2
        if isinstance(self._align, WindowAlignment):
            if not causal:
                raise ValueError(
                    f"the W_A of mechanism {name!r} with sliding_window={self._sliding_window} acts on the tokens "
                    "before each query: call the layer with use_causal_mask=True."
                )
            if None not in lengths and lengths[:half] != lengths[half:]:
                raise ValueError(
                    f"mechanism {name!r} with sliding_window={self._sliding_window} is for self-attention; received "
                    f"{lengths[0]} queries and {lengths[-1]} values."
                )
            return
        if not self._mechanism.aligned or self._max_len is None:
            return
        if None not in lengths and (S := math.prod(lengths[half:])) > self._max_len:
            raise ValueError(
                f"this layer's W_A was built for max_len={self._max_len} but received {S} values (shape "
                f"{tuple(value.shape)}). Build with max_len >= {S}, shorten the input, or use 'efficient', which has "
                "no fixed length."
            )
        if causal and not self._align_causal:
            raise ValueError(
                f"mechanism {name!r} received use_causal_mask=True, but its W_A mixes every value position, later ones "
                "included, into every other before any mask applies: the future would leak. Build the layer with "
                "align_causal=True, which keeps W_A lower triangular."
            )

    # --- shapes without numbers -------------------------------------------------------------------------------------

    def compute_output_shape(
        self, query_shape: Sequence[Any], value_shape: Sequence[Any], key_shape: Sequence[Any] | None = None
    ) -> tuple[Any, ...]:
        """That of the output, without the attention scores."""
        check_inputs(query_shape, value_shape, value_shape if key_shape is None else key_shape)
        if "o" not in self._mechanism.projections:
            return (*query_shape[:-1], self._num_heads * self._value_dim)
        return (*query_shape[:-1], *(self._output_shape or query_shape[-1:]))

    def compute_output_spec(
        self,
        query: Any,
        value: Any,
        key: Any | None = None,
        query_mask: Any | None = None,
        value_mask: Any | None = None,
        key_mask: Any | None = None,
        attention_mask: Any | None = None,
        return_attention_scores: bool = False,
        training: bool | None = None,
        use_causal_mask: bool = False,
    ) -> Any:
        """Shapes and dtypes of what :meth:`call` returns, whose checks of sizes are made here too."""
        axes = self._axes(len(query.shape))
        shape = self.compute_output_shape(query.shape, value.shape, None if key is None else key.shape)
        self._check_call(axes, query, value, attention_mask, return_attention_scores, use_causal_mask)
        output = keras.KerasTensor(shape, dtype=self.compute_dtype)
        if not return_attention_scores:
            return output
        weights = axes.weights_shape(query.shape, value.shape, self._num_heads)
        return output, keras.KerasTensor(weights, dtype=self.compute_dtype)


def _where_present(present_BS: Any | None, x_BSNH: Any) -> Any:
    """Zero in padded places: before W_A, which would mix them into others, and so that not even NaN leaves them."""
    return x_BSNH if present_BS is None else ops.where(present_BS[:, :, None, None], x_BSNH, ops.zeros_like(x_BSNH))


def _mechanism(value: str | Mechanism | Mapping[str, Any], score: str | None) -> Mechanism:
    if isinstance(value, Mapping):  # as get_config() writes a mechanism that has no name
        value = Mechanism(**{**value, "projections": frozenset(value["projections"])})
    mechanism = Mechanism.of(value)
    if mechanism.score not in SCORES:
        raise ValueError(
            f"score must be one of {', '.join(map(repr, SCORES))} in Keras, received {mechanism.score!r}: use the "
            "torch layer for others."
        )
    if score is None:
        return mechanism
    check_choice(score, "score", SCORES)
    if mechanism.score not in (DEFAULT_SCORE, score):
        raise ValueError(
            f"score={score!r} contradicts mechanism={mechanism.name!r}, whose score is {mechanism.score!r}: leave "
            "one of the two out."
        )
    return replace(mechanism, score=score)


def _output_shape(value: int | Sequence[int] | None, mechanism: Mechanism) -> tuple[int, ...] | None:
    if value is None:
        return None
    if "o" not in mechanism.projections:
        raise ValueError(
            f"output_shape={value!r} needs W_O, which mechanism {mechanism.name!r} does not learn: its output is the "
            "joined heads. Leave output_shape out."
        )
    sizes = (value,) if isinstance(value, int | str) else value
    return tuple(check_int(size, "output_shape") for size in sizes)


def _given_axes(value: int | Sequence[int] | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    axes = (value,) if isinstance(value, int | str) else value
    if not axes or not all(isinstance(axis, int) and not isinstance(axis, bool) for axis in axes):
        raise TypeError(f"attention_axes must be a whole number or several, received {value!r}.")
    return tuple(axes)


def _scale(value: float | str | None) -> float | str | None:
    if value is None or value == "learned":
        return value
    if isinstance(value, str):
        raise ValueError(f"scale must be None, a number or 'learned', received {value!r}.")
    return check_float(value, "scale")


def _impl(value: str) -> str:
    check_choice(value, "impl", ("ops", "kernels"))
    if value == "kernels" and keras.backend.backend() != "jax":
        raise ValueError(
            f"impl='kernels' is for Keras on JAX, and this is Keras on {keras.backend.backend()!r}: leave impl out, or "
            "set KERAS_BACKEND=jax."
        )
    return value
