"""Attention layers for Keras 3, on JAX, TensorFlow or torch; importing this imports no torch by itself.

>>> import keras, better_attention.keras as bk  # doctest: +SKIP
>>> layer = bk.MultiHeadAttention(num_heads=4, key_dim=8, mechanism="efficient")  # doctest: +SKIP
>>> layer(keras.ops.zeros((2, 7, 32)), keras.ops.zeros((2, 7, 32))).shape  # doctest: +SKIP
(2, 7, 32)
"""

from __future__ import annotations

try:
    import keras

    _version = tuple(int(part) for part in keras.__version__.split(".")[:2])
    if _version < (3, 15):
        raise ImportError(f"this is keras {keras.__version__}")
except ImportError as error:
    raise ImportError(
        "better_attention.keras needs Keras 3.15 or newer and one of its backends, JAX for example: "
        f"pip install 'better-attention[keras]'. ({error})"
    ) from error

from .layer import MultiHeadAttention
from .weights import from_torch_state, to_torch_state, torch_options

__all__ = ["MultiHeadAttention", "from_torch_state", "to_torch_state", "torch_options"]
