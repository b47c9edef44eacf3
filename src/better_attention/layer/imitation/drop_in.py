"""What torch's own layer has besides ``forward``, for programs written for it: attributes, initial draws, state dicts.

``nn.TransformerEncoder`` and others read and initialise torch's layer by attributes that have no place here, because
W_Q, W_K and W_V are modules of their own; some of what they look for is private in torch.
"""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from better_attention.call.tracing import refuse_script
from better_attention.layer.alignment import Alignment
from better_attention.layer.extra_keys import ExtraPosition
from better_attention.layer.scale import LearnedScale
from better_attention.layer.share import HeadShare
from better_attention.layer.window import WindowAlignment
from better_attention.mechanism import MECHANISMS, Mechanism
from better_attention.scores import DEFAULT_SCORE

from .packed import Unpackable, assign, packed
from .state_dict import (
    explain_parts,
    other_size,
    separate,
    to_packed,
    unpack,
    whole_or_parts,
    with_repeated_heads,
    without_waiting_hook,
)


class DropIn(nn.Module):
    """The part of :class:`.multihead.MultiheadAttention` that imitates ``torch.nn.MultiheadAttention``."""

    # In eval mode nn.TransformerEncoder reads the weights off torch's layer and computes standard attention itself,
    # whatever the layer is. Two things keep it from doing so, each on its own: this, and what in_proj_weight returns.
    _qkv_same_embed_dim = False

    cache_identity: set[None]
    """What a cache knows the layer by: an empty set, of which every copy has its own. (torch.export replaces lists.)"""

    share: HeadShare | None = None
    """The heads of this process where several share the layer; on the class, so that older pickles have it."""

    mechanism: Mechanism
    embed_dim: int
    kdim: int
    vdim: int
    scale: float | str | None
    rotary: float | None
    alibi: str | None
    window: int | None
    head_dim: int
    kv_group: int
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    out_proj: nn.Module
    align: nn.Module
    extra_k: ExtraPosition | None
    extra_v: ExtraPosition | None
    scaling: LearnedScale | None

    # --- initial draws ---------------------------------------------------------------------------------------------

    def reset_parameters(self) -> None:
        """Draw q, k, v weights as torch's class does (Glorot uniform of the packed matrix); biases start at zero.

        W_A has its own ``align.reset_parameters()``.
        """
        # In torch's order q, k, v: with one seed a standard layer then has the weights of torch's.
        kept = [getattr(self, f"{p}_proj") for p in "qkv" if p in self.mechanism.projections]
        with torch.no_grad():
            if self.kdim == self.vdim == self.embed_dim:
                # One draw for the packed (3D, D) matrix has torch's bound, and torch's numbers for "standard". With
                # fewer heads of keys and values it has fewer rows and the same bound: a row's size is that of any head.
                bound = math.sqrt(3.0) * math.sqrt(2.0 / (4 * self.embed_dim))
                weights = [linear.weight for linear in kept]
                if weights:
                    packed = torch.empty_like(torch.cat(weights)).uniform_(-bound, bound)
                    for weight, part in zip(weights, packed.split([len(weight) for weight in weights]), strict=True):
                        weight.copy_(part)
            else:
                for linear in kept:
                    nn.init.xavier_uniform_(linear.weight)
            for linear in (*kept, self.out_proj):
                if getattr(linear, "bias", None) is not None:
                    linear.bias.zero_()
        # After the projections, as torch draws bias_k and bias_v last.
        for part in (self.extra_k, self.extra_v, self.scaling):
            if part is not None:
                part.reset_parameters()

    _reset_parameters = reset_parameters  # torch's name for it, which hosts call

    @staticmethod
    def redraw(model: nn.Module) -> None:
        """Draw the q, k, v weights of every layer in ``model`` as torch does, and W_A as it was built.

        For hosts that initialise all parameters in one loop. As the loop of ``nn.Transformer`` or DETR
        (``xavier_uniform_`` on every matrix) finds three (D, D) matrices here instead of torch's one (3D, D), it draws
        them with bounds sqrt(2) times larger; it also overwrites an identity W_A. Afterwards this puts both right; the
        output projection keeps what the loop drew, as in torch.

        Args:
            model: a layer of this class, or any module that contains some.

        >>> from better_attention import MultiheadAttention
        >>> model = nn.Sequential(MultiheadAttention(32, 4, mechanism="super", max_len=5, align_init="identity"))
        >>> _ = [nn.init.xavier_uniform_(p) for p in model.parameters() if p.dim() > 1]
        >>> MultiheadAttention.redraw(model)
        >>> bool((model[0].align.weight == torch.eye(5)).all())
        True
        """
        for module in model.modules():
            if isinstance(module, DropIn):
                module.reset_parameters()
                if isinstance(module.align, Alignment | WindowAlignment):
                    module.align.reset_parameters()

    # --- attributes of torch's layer ---------------------------------------------------------------------------------

    @property
    def in_proj_weight(self) -> Tensor | Unpackable | None:
        """W_Q, W_K and W_V one below the other, (3D, D), a :class:`.packed.Packed`; None where kdim or vdim differ."""
        return self._packed("weight") if self.kdim == self.vdim == self.embed_dim else None

    @in_proj_weight.setter
    def in_proj_weight(self, value: Tensor) -> None:
        assign(self.in_proj_weight, value, "in_proj_weight")

    @property
    def in_proj_bias(self) -> Tensor | Unpackable | None:
        """The biases of W_Q, W_K and W_V one after the other, (3D,); None without biases."""
        return self._packed("bias")

    @in_proj_bias.setter
    def in_proj_bias(self, value: Tensor) -> None:
        assign(self.in_proj_bias, value, "in_proj_bias")

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """See :class:`torch.nn.Module`, which calls it where a Parameter is assigned to an attribute."""
        if name in ("in_proj_weight", "in_proj_bias"):
            assign(getattr(self, name), param, name)
        else:
            super().register_parameter(name, param)

    @property
    def q_proj_weight(self) -> Tensor | None:
        """The parameter of ``q_proj``; None where the mechanism has no W_Q."""
        return getattr(self.q_proj, "weight", None)

    @property
    def k_proj_weight(self) -> Tensor | None:
        """The parameter of ``k_proj``; None where the mechanism has no W_K."""
        return getattr(self.k_proj, "weight", None)

    @property
    def v_proj_weight(self) -> Tensor | None:
        """The parameter of ``v_proj``; None where the mechanism has no W_V."""
        return getattr(self.v_proj, "weight", None)

    @property
    def bias_k(self) -> Tensor | None:
        """The learned key of ``add_bias_kv``, (1, 1, D), or None."""
        return None if self.extra_k is None else self.extra_k.weight

    @property
    def bias_v(self) -> Tensor | None:
        """The learned value of ``add_bias_kv``, (1, 1, D), or None."""
        return None if self.extra_v is None else self.extra_v.weight

    @property
    def log_scale(self) -> Tensor | None:
        """The parameter of ``scale="learned"``, (h,), or None."""
        return None if self.scaling is None else self.scaling.log_scale

    def _packed(self, kind: str) -> Tensor | Unpackable | None:
        if self.kv_group > 1:
            return Unpackable("with num_kv_heads, since keys and values have fewer rows than queries")
        ours = self.mechanism.aligned or self.mechanism.score != DEFAULT_SCORE or self.scale is not None
        torchs = not ours and self.rotary is None and self.alibi is None and self.window is None
        return packed((self.q_proj, self.k_proj, self.v_proj), kind, self.mechanism.name, torchs)

    # --- state dicts, copies and scripts ---------------------------------------------------------------------------

    def to_torch_state_dict(self) -> dict[str, Tensor]:
        """The weights under the names of ``torch.nn.MultiheadAttention``, packed where torch packs them.

        With ``num_kv_heads`` each query head gets a copy of the keys and values that it shares: torch's class then
        computes the same.

        Raises:
            ValueError: the layer computes what torch's class cannot.
        """
        settings = self.scale, self.rotary, self.alibi, self.window
        if self.mechanism != MECHANISMS["standard"] or settings != (None,) * len(settings):
            raise ValueError(
                f"torch.nn.MultiheadAttention computes 'standard' attention with scale=None and without rotary "
                f"positions, ALiBi and a window only; this layer is {self.mechanism.name!r} with scale={self.scale!r}, "
                f"rotary={self.rotary!r}, alibi={self.alibi!r}, window={self.window!r}."
            )
        ours = with_repeated_heads(self.state_dict(), self.head_dim, self.kv_group)
        return to_packed(ours, packed=self.kdim == self.vdim == self.embed_dim)

    def __prepare_scriptable__(self) -> NoReturn:
        """Answer ``torch.jit.script``, which compiles source code in a subset of Python.

        Raises:
            TypeError: always.
        """
        refuse_script("MultiheadAttention")

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # A method rather than a hook: a hook would be pickled with every layer.
        # First the names become ours, because the steps below and torch's own loading look for them.
        unpack(self, state_dict, prefix)
        if local_metadata.get("assign_to_params_buffers", False):
            separate(state_dict, prefix)
        explain_parts(self, state_dict, prefix)
        whole_or_parts(self, state_dict, prefix)
        error_msgs += other_size(self, state_dict, prefix)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def __getstate__(self) -> dict[str, Any]:
        # The mechanism as plain data: torch.load(weights_only=True) needs a permission for every class in a pickle.
        # Sorted below, because the order of a set of texts differs from process to process.
        row = self.mechanism
        plain = {"mechanism": ("".join(sorted(row.projections)), row.aligned, row.score)}
        return {**without_waiting_hook(self), **plain}

    def __setstate__(self, state: dict[str, Any]) -> None:
        projections, aligned, score = state["mechanism"]
        super().__setstate__(
            {"cache_identity": set(), **state, "mechanism": Mechanism(frozenset(projections), aligned, score)}
        )
