"""Initial weights of the experiments' models."""

from __future__ import annotations

import math
from collections.abc import Collection

from torch import nn

from better_attention.layer.multihead import MultiheadAttention


def keras_(module: nn.Module) -> None:
    """Initialise the linear maps and embeddings inside ``module``, in place, as Keras does by default.

    The paper's experiments are the keras.io examples with small changes (arXiv 2403.01643, section 4),
    so its models start from Keras' defaults: Glorot uniform matrices, zero biases, embeddings uniform
    in +-0.05. Attention layers keep the initial weights that the library gives them everywhere.
    """
    for child in module.children():
        if isinstance(child, MultiheadAttention):
            continue
        if isinstance(child, nn.Linear):
            nn.init.xavier_uniform_(child.weight)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
        elif isinstance(child, nn.Embedding):
            nn.init.uniform_(child.weight, -0.05, 0.05)
        keras_(child)


GPT2_STD = 0.02


def gpt2_(module: nn.Module, *, residual: Collection[str], layers: int) -> None:
    """Initialise the linear maps and embeddings inside ``module``, in place, as GPT-2 does; W_A keeps its own.

    Normal with a standard deviation of 0.02; biases are zero. Maps whose output is added to the residual stream are
    divided by the square root of the number of such additions, so that their sum does not grow with the depth (Radford
    et al. 2019, section 2.3).

    Args:
        module: a model.
        residual: names of those maps, without what stands before the last dot.
        layers: blocks, each of which adds twice.
    """
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear | nn.Embedding):
            gpt2_map_(child, adds=layers if name.rpartition(".")[2] in residual else 0)


def gpt2_map_(module: nn.Linear | nn.Embedding, *, adds: int) -> None:
    """Initialise one map or table in place; ``adds``: blocks of the model if it adds to the residual stream, else 0."""
    nn.init.normal_(module.weight, std=GPT2_STD / math.sqrt(2 * adds) if adds else GPT2_STD)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
