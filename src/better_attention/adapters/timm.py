"""A class for timm's ``attn_layer=``: vision transformers that are built with one of our mechanisms.

>>> from better_attention.adapters.timm import timm_attention
>>> layer = timm_attention("super", max_len=197)  # 196 patches and the class token
>>> timm.models.VisionTransformer(attn_layer=layer)  # doctest: +SKIP

timm asks for a class and not for a function, which is why this module makes one for each choice of settings. To give a
model that exists another mechanism, with its weights, see :func:`better_attention.convert`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from better_attention.layer.multihead import MultiheadAttention
from better_attention.mechanism import Mechanism


class TimmLayer(nn.Module):
    """Self-attention as timm's blocks build and call it; :func:`timm_attention` makes subclasses with settings.

    Args:
        dim: model width D.
        num_heads: number of heads.
        qkv_bias: whether W_Q, W_K, W_V and W_A have biases.
        qk_norm: refused: our layer does not normalise queries and keys.
        scale_norm: refused: our layer does not normalise heads.
        proj_bias: whether W_O has a bias.
        attn_drop: probability of dropping an attention weight in training.
        proj_drop: probability of dropping a feature of the output in training.
        norm_layer: not used.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: settings that the layer does not have.
        TypeError: an argument of the wrong kind.
    """

    mechanism: ClassVar[Mechanism] = Mechanism.of("standard")
    settings: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: object = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("qk_norm", qk_norm), ("scale_norm", scale_norm)):
            if value:
                raise ValueError(
                    f"{name}=True: a layer of better-attention does not normalise queries, keys or heads. Build the "
                    f"model with {name}=False."
                )
        self.attention = MultiheadAttention(
            dim,
            num_heads,
            attn_drop,
            batch_first=True,
            device=device,
            dtype=dtype,
            mechanism=self.mechanism,
            **self.settings,
        )
        # Our layer has one switch for all biases and timm two, so that biases are built and then removed.
        with_bias = {
            "q_proj": qkv_bias,
            "k_proj": qkv_bias,
            "v_proj": qkv_bias,
            "align": qkv_bias,
            "out_proj": proj_bias,
        }
        for name, wanted in with_bias.items():
            part = self.attention.get_submodule(name)
            if not wanted and getattr(part, "bias", None) is not None:
                # None by registration, so that state dicts treat it like a layer that was built without a bias.
                part.register_parameter("bias", None)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Map (B, L, D) to (B, L, D).

        Args:
            x: the tokens.
            attn_mask: (L, L), (B, L, L), (B, 1, L, L) or (B, heads, L, L). bool: True = attend. float: added to the
                log weights.
            is_causal: query l sees keys s <= l; a mask applies as well.

        Raises:
            ValueError: more tokens than ``max_len``; a mask of another shape.
        """
        mask = None if attn_mask is None else self._as_layer_mask(attn_mask, x.shape[0], x.shape[1])
        output, _ = self.attention(x, x, x, need_weights=False, attn_mask=mask, is_causal=is_causal)
        dropped: Tensor = self.proj_drop(output)
        return dropped

    def _as_layer_mask(self, mask: Tensor, batch: int, length: int) -> Tensor:
        """(L, L) or (B heads, L, L), bool: True = hide."""
        # timm means True = attend, as SDPA does, and torch's layer the opposite.
        if mask.dtype == torch.bool:
            mask = ~mask
        if mask.dim() == 2:
            return mask
        if mask.dim() not in (3, 4):
            raise ValueError(
                f"attn_mask must have shape (L, L), (B, L, L) or (B, 1 or heads, L, L), received {tuple(mask.shape)}."
            )
        # torch's layer has no mask per sample: (B heads, L, L), heads fastest, is the form that it takes.
        wide = mask[:, None] if mask.dim() == 3 else mask
        return wide.expand(batch, self.attention.num_heads, length, length).flatten(0, 1)


def timm_attention(
    mechanism: str | Mechanism = "standard",
    *,
    max_len: int | None = None,
    align_heads: str = "shared",
    align_causal: bool = False,
    align_init: str = "xavier",
    scale: float | str | None = None,
    impl: str = "auto",
) -> type[TimmLayer]:
    """A class for the argument ``attn_layer`` of timm's vision transformers.

    Args:
        mechanism: a name or a ``Mechanism``.
        max_len: number of tokens, class and register tokens included; required by mechanisms with W_A.
        align_heads: one W_A for all heads ("shared") or one "per_head".
        align_causal: keep W_A lower triangular; needed under a causal mask.
        align_init: "xavier" or "identity".
        scale: factor on q.k: None for 1/sqrt(head width), a number, or "learned".
        impl: who computes, see :func:`better_attention.attention`.

    Returns:
        A subclass of ``TimmLayer`` with these settings.

    Raises:
        ValueError: settings that the layer does not have.
        TypeError: an argument of the wrong kind.

    >>> layer = timm_attention("efficient")(16, num_heads=2, qkv_bias=True)
    >>> layer(torch.zeros(3, 5, 16)).shape
    torch.Size([3, 5, 16])
    """
    row = Mechanism.of(mechanism)
    settings: dict[str, Any] = {"scale": scale, "impl": impl}
    settings |= {"align_heads": align_heads, "align_causal": align_causal, "align_init": align_init, "max_len": max_len}
    MultiheadAttention(4, 2, mechanism=row, **settings)  # refuses now what each block would refuse later
    return type("TimmAttention", (TimmLayer,), {"mechanism": row, "settings": settings, "__doc__": TimmLayer.__doc__})
