"""The layers, masks and small helpers that the tests of the machinery share.

Shape suffixes as in the library: B batch, L queries, S keys, N heads, D model width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import better_attention as ba

LAYERS: dict[str, dict[str, object]] = {
    **{name: {"mechanism": name} for name in ba.MECHANISMS},
    "super causal": {"mechanism": "super", "align_causal": True},
    "super per head": {"mechanism": "super", "align_heads": "per_head", "align_causal": True},
    "super+expressive": {"mechanism": "super+expressive", "align_causal": True},
    "efficient+expressive learned scale": {"mechanism": "efficient+expressive", "scale": "learned"},
    "standard+align": {"mechanism": "standard+align", "align_heads": "per_head"},
    "no projections": {"mechanism": ba.Mechanism(projections=frozenset())},
}
"""Every mechanism of the table, and the corners of the three axes that could break by themselves."""

WINDOWED: dict[str, dict[str, object]] = {
    "efficient window": {"mechanism": "efficient", "window": 3},
    "super window": {"mechanism": "super", "window": 3},
    "standard+align+expressive window": {
        "mechanism": "standard+align+expressive",
        "window": 4,
        "align_heads": "per_head",
    },
}
"""Layers whose queries see the last few tokens alone, causal whatever is asked for."""

NAMED = list(ba.MECHANISMS)
ALL = list(LAYERS)
CAUSAL = [name for name, o in LAYERS.items() if o.get("align_causal") or not ba.Mechanism.of(o["mechanism"]).aligned]
"""The layers that a causal mask may be given to: those without W_A, and those whose W_A is lower triangular."""


def layer(
    name: str, embed_dim: int = 6, num_heads: int = 2, *, max_len: int = 7, spread: float = 0.4, **options: object
) -> ba.MultiheadAttention:
    """The layer called ``name``; every parameter is random (a bias of zero would hide that it is ignored)."""
    chosen: dict[str, object] = {"batch_first": True, **(LAYERS | WINDOWED)[name], **options}
    if ba.Mechanism.of(chosen["mechanism"]).aligned and "window" not in chosen:
        chosen["max_len"] = max_len
    module = ba.MultiheadAttention(embed_dim, num_heads, **chosen)
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.is_meta:
                parameter.copy_(spread * torch.randn(parameter.shape, dtype=torch.float64))
    return module


def tokens(*shape: int, dtype: torch.dtype = torch.float64, requires_grad: bool = False) -> Tensor:
    """Standard normal inputs."""
    return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_(requires_grad)


def triangle(L: int, S: int | None = None) -> Tensor:
    """The boolean causal mask in the module's meaning: True above the diagonal, where a query must not look."""
    return torch.ones(L, L if S is None else S, dtype=torch.bool).triu(1)


def padding(B: int, S: int, padded: int = 2) -> Tensor:
    """A key padding mask that hides the last ``padded`` keys of every sample but the first."""
    mask = torch.zeros(B, S, dtype=torch.bool)
    mask[1:, S - padded :] = True
    return mask


def _boolean(*shape: int) -> Tensor:
    """A random mask that leaves the first key visible, but for one fully masked row."""
    mask = torch.rand(*shape) < 0.4
    mask[..., 0] = False
    mask[..., -1, :] = True
    return mask


def _bias(*shape: int, dtype: torch.dtype) -> Tensor:
    """A random additive mask: biases, and minus infinity in places."""
    return torch.randn(*shape, dtype=torch.float64).masked_fill(_boolean(*shape), -torch.inf).to(dtype)


MASKS: dict[str, Callable[[int, int, int, int, torch.dtype], dict[str, object]]] = {
    "none": lambda B, L, S, N, dtype: {},
    "bool (L,S)": lambda B, L, S, N, dtype: {"attn_mask": _boolean(L, S)},
    "float (L,S)": lambda B, L, S, N, dtype: {"attn_mask": _bias(L, S, dtype=dtype)},
    "bool (B*N,L,S)": lambda B, L, S, N, dtype: {"attn_mask": _boolean(B * N, L, S)},
    "float (B*N,L,S)": lambda B, L, S, N, dtype: {"attn_mask": _bias(B * N, L, S, dtype=dtype)},
    "padding bool": lambda B, L, S, N, dtype: {"key_padding_mask": padding(B, S)},
    "padding float": lambda B, L, S, N, dtype: {
        "key_padding_mask": torch.zeros(B, S, dtype=dtype).masked_fill(padding(B, S), -torch.inf)
    },
    "mask and padding": lambda B, L, S, N, dtype: {
        "attn_mask": _boolean(L, S),
        "key_padding_mask": padding(B, S),
    },
    "is_causal": lambda B, L, S, N, dtype: {"is_causal": True},
    "is_causal and padding": lambda B, L, S, N, dtype: {"is_causal": True, "key_padding_mask": padding(B, S)},
}
"""Every form of mask that ``forward`` takes, by name."""


def masks_for(name: str) -> list[str]:
    """The masks that the layer ``name`` may be given."""
    return [mask for mask in MASKS if name in CAUSAL or "is_causal" not in mask]


def refused(
    call: Callable[[], object],
    *words: object,
    kind: type[Exception] | tuple[type[Exception], ...] = (ValueError, TypeError),
) -> str:
    """Asserts that ``call`` raises a user error whose message holds every word, and returns the message.

    Args:
        call: what the user did.
        words: what the message must contain (names and values), letter case aside; of a tuple, any one.
        kind: the exception types that are right.
    """
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    for word in words:
        choices = word if isinstance(word, tuple) else (word,)
        assert any(str(choice).lower() in message.lower() for choice in choices), f"{word!r} is not in: {message}"
    return message


def fingerprint() -> str:
    """SHA-256 of the initial weights, outputs and gradients of all mechanisms, from a fixed seed."""
    torch.manual_seed(11)
    digest = hashlib.sha256()
    for name, row in ba.MECHANISMS.items():
        module = ba.MultiheadAttention(8, 2, dropout=0.1, mechanism=row, max_len=5 if row.aligned else None)
        x = torch.randn(5, 3, 8, requires_grad=True)
        output, _ = module(x, x, x, need_weights=False)
        output.square().sum().backward()
        digest.update(name.encode())
        for tensor in (output, x.grad, *(p.grad for p in module.parameters()), *module.parameters()):
            digest.update(bytes(tensor.detach().contiguous().view(torch.uint8).flatten().tolist()))
    return digest.hexdigest()
