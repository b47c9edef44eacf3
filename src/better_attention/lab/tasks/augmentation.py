"""Training images changed at random, a whole batch at once, on the device where it lies."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from better_attention.dropout import uniform

AUGMENTATIONS = ("none", "keras")

TURN = 0.02 * 2 * math.pi  # radians, at most, either way
ZOOM = 0.2


def keras_augmented(images: Tensor) -> Tensor:
    """Images as keras.io's vision transformer example augments them: flipped, turned, zoomed.

    Each image is mirrored with probability 1/2, turned by up to 0.02 of a full turn, and its height and its width are
    scaled by 0.8 ... 1.2 independently; what comes in from outside is the image reflected at its edge. The example
    samples the pixels twice, bilinearly, to turn and to zoom; here one affine map does both, which blurs less.

    Args:
        images: (B, H, W) or (B, H, W, C), H = W, of any dtype.

    Returns:
        float32 of the same shape, within the range of the pixels. Random numbers come from the default generator of
        the images' device; within :func:`better_attention.dropout.batch_share` they follow the samples.

    Source: keras.io/examples/vision/image_classification_with_vision_transformer, ``data_augmentation``.

    >>> keras_augmented(torch.zeros(5, 8, 8, 3, dtype=torch.uint8)).shape
    torch.Size([5, 8, 8, 3])
    """
    drawn = uniform(len(images), 4, images.device)
    if len(images) == 0:  # the share of a process in a small last batch; affine_grid refuses it
        return images.float()
    planes = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
    return _sampled(planes.float(), affine_maps(drawn)).reshape(images.shape)


def affine_maps(drawn: Tensor) -> Tensor:
    """For four numbers in 0 ... 1 an image, (B, 4), where each output pixel is to be looked up: (B, 2, 3).

    Output coordinates are zoomed first, then turned, then mirrored: the inverse of mirroring, turning and zooming the
    image. ``affine_grid`` counts both axes from -1 to 1.
    """
    mirror = torch.where(drawn[:, 0] < 0.5, -1.0, 1.0)
    angle = TURN * (2 * drawn[:, 1] - 1)
    width, height = (1 + ZOOM * (2 * drawn[:, column] - 1) for column in (2, 3))
    zero = torch.zeros_like(angle)
    # The rows of diag(mirror, 1) · rotation · diag(width, height), of which the last is applied first.
    x_row = torch.stack([mirror * angle.cos() * width, -mirror * angle.sin() * height, zero], dim=1)
    y_row = torch.stack([angle.sin() * width, angle.cos() * height, zero], dim=1)
    return torch.stack([x_row, y_row], dim=1)


def _sampled(planes: Tensor, maps: Tensor) -> Tensor:
    """Planes (B, C, H, W) looked up through affine maps (B, 2, 3), as (B, H, W, C)."""
    grid = F.affine_grid(maps, list(planes.shape), align_corners=False)
    # Without align_corners it is reflected about the outer edge of the last pixel: Keras' "reflect", c b a | a b c.
    moved = F.grid_sample(planes, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    return moved.permute(0, 2, 3, 1)
