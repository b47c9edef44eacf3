"""The alignment kernel W_A as Keras layers: a learned linear map over positions, from the left, on the values.

Shape suffixes: B batch, L queries, S keys, N heads, H head width, W places of a window.
"""

from __future__ import annotations

import math
from typing import Any

import keras
from keras import ops

from better_attention.errors import check_bool, check_choice, check_int

ALIGN_HEADS = ("shared", "per_head")
ALIGN_INITS = ("xavier", "identity")


class _Kernel(keras.layers.Layer):
    """One square matrix, or one for each head, and its bias.

    Args:
        size: rows and columns of W_A.
        num_heads: number of heads.
        heads: "shared", one W_A for all heads, or "per_head".
        init: "xavier" (Glorot uniform) or "identity".
        use_bias: whether there is a bias, one number per row (and head).
        bias_initializer, kernel_regularizer, bias_regularizer, kernel_constraint, bias_constraint: as in Keras' layers.
        options: those of every Keras layer.
    """

    def __init__(
        self,
        size: int,
        num_heads: int,
        heads: str = "shared",
        init: str = "xavier",
        use_bias: bool = True,
        bias_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        kernel_constraint: Any = None,
        bias_constraint: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.size = check_int(size, "size")
        self.num_heads = check_int(num_heads, "num_heads")
        self.heads = check_choice(heads, "align_heads", ALIGN_HEADS)
        self.init = check_choice(init, "align_init", ALIGN_INITS)
        self.use_bias = check_bool(use_bias, "use_bias")
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)
        self.kernel_constraint = keras.constraints.get(kernel_constraint)
        self.bias_constraint = keras.constraints.get(bias_constraint)
        self.bias: Any = None

    def build(self, *_: Any) -> None:
        """Add W_A and its bias."""
        copies = (self.num_heads,) if self.heads == "per_head" else ()
        self.kernel = self.add_weight(
            name="kernel",
            shape=(*copies, self.size, self.size),
            initializer=_Identity() if self.init == "identity" else _glorot(self.size),
            regularizer=self.kernel_regularizer,
            constraint=self.kernel_constraint,
        )
        if self.use_bias:
            self.bias = self.add_weight(
                name="bias",
                shape=(*copies, self.size),
                initializer=self.bias_initializer,
                regularizer=self.bias_regularizer,
                constraint=self.bias_constraint,
            )
        self.built = True


class Alignment(_Kernel):
    """V' = W_A V + a 1^T over all positions (2403.01643, definition 4); shorter inputs use the first rows and columns.

    Args:
        size: longest sequence of values, ``max_len``.
        causal: keep W_A lower triangular, so that no position receives a later one.
        options: those of :class:`_Kernel`.
    """

    def __init__(self, size: int, num_heads: int, causal: bool = False, **options: Any) -> None:
        super().__init__(size, num_heads, **options)
        self.causal = check_bool(causal, "align_causal")

    def build(self, *_: Any) -> None:
        """Add W_A, whose upper triangle starts at zero where it is never read, and its bias."""
        super().build()
        if self.causal:
            self.kernel.assign(ops.tril(ops.convert_to_tensor(self.kernel)))

    def call(self, value_BSNH: Any) -> Any:
        """Mix the positions of values (B, S, N, H), whose padded ones are zero."""
        S = ops.shape(value_BSNH)[1]
        kernel = ops.convert_to_tensor(self.kernel)[..., :S, :S]
        if self.causal:
            kernel = ops.tril(kernel)  # at each call, because loaded weights may fill the upper triangle
        shared = self.heads == "shared"
        aligned_BSNH = ops.einsum("ts,bsnh->btnh" if shared else "nts,bsnh->btnh", kernel, value_BSNH)
        if self.bias is None:
            return aligned_BSNH
        bias = ops.convert_to_tensor(self.bias)[..., :S]
        return aligned_BSNH + (bias[:, None, None] if shared else ops.transpose(bias)[:, :, None])

    def compute_output_shape(self, value_shape: Any) -> Any:
        """That of the values."""
        return value_shape


class WindowAlignment(_Kernel):
    """W_A of a causal window, on weights: s W_A for the W places of each query's window, and s.a for its bias.

    Places are counted from the end: the query's own token has the last row and column. See
    :mod:`better_attention.layer.window`.
    """

    def call(self, weights_BNLS: Any, value_BSNH: Any) -> Any:
        """What mixes the values of self-attention: (B, N, L, H) out of weights and values, L = S."""
        L, W = ops.shape(weights_BNLS)[2], self.size
        rows, columns = ops.arange(L, dtype="int32")[:, None], ops.arange(W, dtype="int32")[None]
        key_LW = rows - (W - 1) + columns  # which key stands at a place; negative before the first token
        inside = ops.take_along_axis(weights_BNLS, ops.maximum(key_LW, 0)[None, None], axis=3)
        inside = ops.where(key_LW >= 0, inside, 0.0)
        equation = "bntw,wv->bntv" if self.heads == "shared" else "bntw,nwv->bntv"
        mixing = ops.einsum(equation, inside, ops.convert_to_tensor(self.kernel))
        place_LS = ops.arange(L, dtype="int32")[None] - rows + (W - 1)  # the reverse: at which place a key stands
        seen = ops.logical_and(place_LS >= 0, place_LS < W)
        mixing = ops.take_along_axis(mixing, ops.clip(place_LS, 0, W - 1)[None, None], axis=3)
        mixing = ops.where(seen, mixing, 0.0)
        heads_BLNH = ops.einsum("bnts,bsnh->btnh", mixing, value_BSNH)
        if self.bias is None:
            return heads_BLNH
        bias = ops.convert_to_tensor(self.bias)
        added = ops.einsum("bntw,w->btn" if self.heads == "shared" else "bntw,nw->btn", inside, bias)
        return heads_BLNH + added[..., None]

    def compute_output_shape(self, weights_shape: Any, value_shape: Any) -> Any:
        """(B, L, N, H)."""
        return (weights_shape[0], weights_shape[2], *value_shape[2:])


def _glorot(size: int) -> Any:
    """Glorot uniform for one square matrix; Keras' own would count the heads as inputs."""
    bound = math.sqrt(6.0 / (2 * size))
    return keras.initializers.RandomUniform(-bound, bound)


class _Identity(keras.initializers.Initializer):
    """The identity, or one for each head."""

    def __call__(self, shape: Any, dtype: Any = None) -> Any:
        return ops.broadcast_to(ops.eye(shape[-1], dtype=dtype), shape)


def check_alignment(
    name: str, aligned: bool, max_len: int | None, window: int | None, heads: str, causal: bool, init: str
) -> None:
    """Refuse settings of W_A where there is none, a W_A without its size, and one with two sizes.

    Raises:
        ValueError, TypeError: any of them, or values that there are not.
    """
    check_choice(heads, "align_heads", ALIGN_HEADS)
    check_choice(init, "align_init", ALIGN_INITS)
    check_bool(causal, "align_causal")
    if aligned and window is not None:
        if max_len is not None or causal:
            given = f"max_len={max_len}" if max_len is not None else "align_causal=True"
            raise ValueError(
                f"{given} and sliding_window={window} exclude each other: the W_A of a window is window x window, has "
                "no fixed length, and looks at no later token. Leave one of them out."
            )
    elif aligned:
        if max_len is None:
            raise ValueError(
                f"mechanism {name!r} needs max_len, the size of W_A: the longest value sequence. Pass max_len=..., or "
                "sliding_window=... for any length, or use 'efficient', which has no fixed length."
            )
    else:
        defaults = {"max_len": None, "align_heads": "shared", "align_causal": False, "align_init": "xavier"}
        for (option, default), value in zip(defaults.items(), (max_len, heads, causal, init), strict=True):
            if value != default:
                raise ValueError(
                    f"{option}={value!r} configures the alignment kernel W_A, which mechanism {name!r} does not use. "
                    f"Remove {option}, or choose 'super' or 'NAME+align'."
                )
