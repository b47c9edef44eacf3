"""Vision transformer of the image experiments (arXiv 2403.01643, section 4.1, after keras.io's ViT example).

Shape letters: B batch, L tokens of an image (its patches, before them the class token if there is one), D model
width, K classes; H, W, C height, width and channels of an image, P side of a patch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from better_attention.dropout import dropout
from better_attention.lab.models.initialisation import keras_
from better_attention.layer.multihead import MultiheadAttention
from better_attention.mechanism import Mechanism

NORM_EPS = 1e-6  # Keras' ViT example; torch's default is 1e-5


class VisionBlock(nn.Module):
    """Pre-norm transformer block: ``x + attention(norm(x))``, then ``x + MLP(norm(x))``, MLP widths [``mlp``, D]."""

    def __init__(
        self,
        width: int,
        heads: int,
        length: int,
        mechanism: Mechanism,
        options: Mapping[str, Any],
        dropout: float,
        mlp: int,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attention = MultiheadAttention(
            width,
            heads,
            dropout=dropout,
            batch_first=True,
            mechanism=mechanism,
            **(mechanism.layer_options(length) | dict(options)),
        )
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.expand = nn.Linear(width, mlp)
        self.contract = nn.Linear(mlp, width)
        self.dropout = dropout

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Map (B, L, D) to (B, L, D)."""
        normed = self.norm1(x_BLD)
        x_BLD = x_BLD + self.attention(normed, normed, normed, need_weights=False)[0]
        hidden = dropout(F.gelu(self.expand(self.norm2(x_BLD))), self.dropout, self.training)
        return x_BLD + dropout(self.contract(hidden), self.dropout, self.training)


class VisionTransformer(nn.Module):
    """Image classifier: patches, linear map, learned positions, pre-norm blocks, mean over patches, linear head.

    The patches are averaged. keras.io's example flattens them into a head of millions of weights, which the
    300K parameters that the paper gives for MNIST exclude; this model has 276,874 there. With a class token, its
    output is read instead of the mean. The ViT-B/16 of the paper's ImageNet experiment, as its table 7 counts it,
    is ``mlp=3072, head_hidden=2000, final_norm=False, embed_bias=False``.

    Args:
        image_size: side of the square images, in pixels; a multiple of ``patch``.
        patch: side of a patch, in pixels.
        channels: 1 (grey) or 3.
        classes: number of outputs.
        width, layers, heads: model width D, number of blocks, attention heads.
        mechanism: name or row of :data:`better_attention.MECHANISMS`.
        options: further arguments of every :class:`~better_attention.MultiheadAttention`.
        dropout: on attention weights and after both linear maps of a block's MLP.
        head_dropout: before the head.
        peak: the pixel value that means white; pixels are mapped from 0 ... peak to -1 ... 1.
        class_token: put a learned token before the patches (L is one more then) and classify by it.
        mlp: hidden width of a block's MLP; None: 2D.
        head_hidden: width of a GELU layer before the outputs, dropout behind it too; 0: none.
        final_norm: normalise before pooling.
        embed_bias: whether the linear map of the patches has a bias; the positions hold one anyway.

    Raises:
        ValueError: ``image_size`` is not a multiple of ``patch``.

    >>> import torch
    >>> model = VisionTransformer(image_size=8, patch=2, channels=1, classes=10, width=32, layers=2, heads=4)
    >>> model(torch.zeros(5, 8, 8, dtype=torch.uint8)).shape
    torch.Size([5, 10])
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch: int,
        channels: int,
        classes: int,
        width: int,
        layers: int,
        heads: int,
        mechanism: str | Mechanism = "standard",
        options: Mapping[str, Any] | None = None,
        dropout: float = 0.1,
        head_dropout: float = 0.5,
        peak: int = 255,
        class_token: bool = False,
        mlp: int | None = None,
        head_hidden: int = 0,
        final_norm: bool = True,
        embed_bias: bool = True,
    ) -> None:
        super().__init__()
        if image_size % patch:
            raise ValueError(
                f"image_size={image_size} is not a multiple of patch={patch}: choose a patch that divides it, "
                "or pad the images."
            )
        mechanism = Mechanism.of(mechanism)
        length = (image_size // patch) ** 2 + class_token
        self.patch, self.peak, self.head_dropout = patch, peak, head_dropout
        self.embed = nn.Linear(patch * patch * channels, width, bias=embed_bias)
        self.class_token = nn.Embedding(1, width) if class_token else None
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(
            VisionBlock(width, heads, length, mechanism, options or {}, dropout, mlp or 2 * width)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width, eps=NORM_EPS) if final_norm else nn.Identity()
        self.head_hidden = nn.Linear(width, head_hidden) if head_hidden else None
        self.head = nn.Linear(head_hidden or width, classes)
        keras_(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, H, W) or (B, H, W, C) with pixels in 0 ... ``peak``, of any dtype."""
        pixels = images.to(self.embed.weight.dtype) * (2 / self.peak) - 1
        x_BLD = self.embed(patches(pixels, self.patch))
        if self.class_token is not None:
            x_BLD = torch.cat([self.class_token.weight.expand(len(x_BLD), 1, -1), x_BLD], dim=1)
        x_BLD = x_BLD + self.positions.weight
        for block in self.blocks:
            x_BLD = block(x_BLD)
        normed_BLD = self.norm(x_BLD)
        pooled = normed_BLD.mean(dim=1) if self.class_token is None else normed_BLD[:, 0]
        features = dropout(pooled, self.head_dropout, self.training)
        if self.head_hidden is not None:
            features = dropout(F.gelu(self.head_hidden(features)), self.head_dropout, self.training)
        logits: Tensor = self.head(features)
        return logits


def patches(images: Tensor, patch: int) -> Tensor:
    """Cut images (B, H, W) or (B, H, W, C) into rows of patches (B, H/P * W/P, P*P*C), from the top left.

    >>> import torch
    >>> patches(torch.arange(16).reshape(1, 4, 4), 2)[0].tolist()
    [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    """
    batch, height, width, *rest = images.shape
    channels = rest[0] if rest else 1
    rows, columns = height // patch, width // patch
    # From (row, y, column, x) to (row, column, y, x): the pixels of a patch become neighbours.
    grid = images.reshape(batch, rows, patch, columns, patch, channels).transpose(2, 3)
    return grid.reshape(batch, rows * columns, patch * patch * channels)
