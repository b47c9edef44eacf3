"""Initial weights of the experiments' models."""

from __future__ import annotations

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
