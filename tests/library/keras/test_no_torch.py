"""Importing the Keras layer, and computing with it, imports no torch."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import keras
import pytest

CODE = """
import sys
import numpy as np
import better_attention.keras as bk
layer = bk.MultiHeadAttention(2, 3, mechanism="super+expressive", max_len=5)
x = np.ones((1, 5, 6), "float32")
assert layer(x, x).shape == (1, 5, 6)
state = bk.to_torch_state(layer)
bk.from_torch_state(layer, state)
assert bk.torch_options(layer)["max_len"] == 5
try:
    layer(x, np.ones((1, 7, 6), "float32"))
except ValueError as error:
    assert "max_len=5" in str(error)
print("torch" in sys.modules)
"""


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="Keras runs on torch here")
def test_torch_stays_out() -> None:
    # On NumPy, whose import is short, where Keras can load it with JAX and SciPy; what of ours is imported does not
    # depend on Keras' backend.
    numpy = find_spec("jax") is not None and find_spec("scipy") is not None
    environment = {**os.environ, "KERAS_BACKEND": "numpy" if numpy else keras.backend.backend()}
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False"
