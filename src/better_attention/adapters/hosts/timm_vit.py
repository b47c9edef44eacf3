"""timm's vision transformers: ``timm.layers.Attention``, of vit, deit, deit3, siglip, pit, vitamin, naflexvit."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from better_attention.adapters.adapter import Adapter, has, linear_refusals, register, takes
from better_attention.adapters.host_attention import HostAttention
from better_attention.adapters.source import LinearMap, Source
from better_attention.mechanism import MECHANISMS


class TimmAttention(HostAttention):
    """``timm.layers.Attention`` with another mechanism."""

    keeps = ("proj_drop",)
    proj_drop: nn.Module

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, L, D) to (B, L, D).

        Args:
            x: the tokens.
            attn_mask: broadcastable to (B, heads, L, L). bool: True = attend. float: added to the log weights.
            is_causal: query l sees keys s <= l; as in timm, it replaces the mask.
        """
        # check_mask() wants four dimensions; leading ones of size 1 broadcast.
        mask = None if is_causal or attn_mask is None else attn_mask[(None,) * (4 - attn_mask.dim())]
        output, _ = self.attend(x, mask=mask, causal=is_causal)
        dropped: Tensor = self.proj_drop(output)
        return dropped


def _matches(module: nn.Module) -> bool:
    return has(module, "qkv", "proj", "q_norm", "k_norm", "attn_drop", "proj_drop", "num_heads") and takes(
        module, "x", "attn_mask", "is_causal"
    )


def _refusals(module: nn.Module) -> list[str]:
    reasons = linear_refusals(module, "qkv", "proj")
    for name, what in (("q_norm", "normalises queries"), ("k_norm", "normalises keys"), ("norm", "normalises heads")):
        if not isinstance(getattr(module, name, nn.Identity()), nn.Identity):
            reasons.append(f"it {what} ({name}), which our layer does not")
    if getattr(module, "gate", None) is not None:
        reasons.append("it has a gate on the heads, which our layer does not")
    return reasons


def _read(module: nn.Module) -> Source:
    host: Any = module
    # One packed map, whose rows are those of W_Q, W_K and W_V one below the other.
    weight, bias = host.qkv.weight, host.qkv.bias
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    q, k, v = (LinearMap(w, b, weight.requires_grad) for w, b in zip(weight.chunk(3), biases, strict=True))
    heads = host.num_heads
    return Source(
        MECHANISMS["standard"],
        weight.shape[1],
        heads,
        heads,
        weight.shape[0] // (3 * heads),
        float(host.scale),
        host.attn_drop.p,
        q=q,
        k=k,
        v=v,
        o=LinearMap.of(host.proj),
    )


TIMM = register(Adapter("timm", "timm", _matches, _read, TimmAttention.take_over, _refusals))
