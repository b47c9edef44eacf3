"""The layer: the one picture of the library as consecutive calls.

query, key, value -> project -> align -> score -> mix -> output. Shape suffixes as in impl/call.py: B batch,
L queries, S keys, N heads, H head width, D model width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from better_attention.call import masks
from better_attention.call.call import Call, island
from better_attention.call.function_arguments import same_dtype
from better_attention.call.torch_state import are_plain, bare, fx_leaf, is_symbolic, quiet, refuse_script, unpatched
from better_attention.call.values import autocast_dtype
from better_attention.errors import finite_number, flag, floating_dtype, one_of, whole_number
from better_attention.impl.dispatch import IMPLS, attend
from better_attention.mechanism import MECHANISMS, Mechanism
from better_attention.positions import BASE, angles, even_width, turned
from better_attention.scores import DEFAULT_SCORE

from . import arguments, fast_path
from .alignment import Alignment
from .arguments import called
from .extra_keys import ExtraPosition, LearnedScale
from .packed import Unpackable, assign, packed
from .state_dict import explain_parts, lasting_hooks, other_size, separate, to_packed, unpack


class MultiheadAttention(nn.Module):
    r"""Multi-head attention with any mechanism; takes the place of ``torch.nn.MultiheadAttention``.

    Head i computes :math:`\mathrm{weights}(Q W^Q_i (K W^K_i)^\top / \sqrt{d_k}) \, W_A V W^V_i`, and the joined heads
    go through :math:`W^O`; a mechanism says which maps are learned (a missing one slices its input instead), whether
    W_A is there, and which score makes the weights.

    Args:
        embed_dim: model width D, of query and output.
        num_heads: number of heads h; divides ``embed_dim``.
        dropout: probability of dropping an attention weight in training.
        bias: biases of the linear maps, and of W_A.
        add_bias_kv: one learned key and value more, behind the projected (and aligned) ones.
        add_zero_attn: one key and value of zeros more. The expressive score gives it no weight.
        kdim, vdim: widths of key and value, where they differ from D; only where they are projected.
        batch_first: inputs are (B, L, D) rather than (L, B, D).
        device, dtype: of the parameters.
        mechanism: a name from ``MECHANISMS``, ``"optimized"``, ``"NAME+expressive"``, or a ``Mechanism``.
        max_len: longest value sequence, the size of W_A; required by aligned mechanisms, refused by others.
        align_heads: one W_A for all heads ("shared") or one "per_head".
        align_causal: keep W_A lower triangular; needed under a causal mask.
        align_init: "xavier" or "identity".
        scale: factor on q.k: None for 1/sqrt(head width), a number, or "learned", which starts there as the
            parameter ``log_scale`` (h,).
        rotary: turn queries and keys by their positions, counted from 0 on both sides (:mod:`.positions`): True for
            base 10,000, or the base. Needs an even head width; the keys of ``add_bias_kv`` and ``add_zero_attn`` have
            no position and are not turned.
        impl: who computes, see :func:`better_attention.attention`.

    Raises:
        ValueError, TypeError: arguments out of range, or that cannot mean anything for the mechanism.

    Note:
        Three deliberate differences from torch's class. ``is_causal=True`` means the top-left triangle, alone or
        together with a mask (torch demands a mask and then trusts the flag). A query with every key hidden gets
        weights 0 and the output bias on every path (torch: NaN on some). Misuse raises ValueError or TypeError, 0/1
        float masks included (torch: AssertionError, RuntimeError, or nothing). Numbers in padded keys and values,
        NaN included, never reach the output, whether they are padded by True, -inf or the dtype's lowest number.

    Source: arXiv 2403.01643, definitions 1-4; arXiv 2407.18601.

    >>> layer = MultiheadAttention(32, 4, batch_first=True, mechanism="super", max_len=10)
    >>> output, weights = layer(*[torch.zeros(2, 10, 32)] * 3)
    >>> output.shape, weights.shape
    (torch.Size([2, 10, 32]), torch.Size([2, 10, 10]))
    """

    # In eval mode nn.TransformerEncoder reads the weights off torch's layer and computes standard attention itself,
    # whatever the layer is. Two things keep it from doing so, each on its own: this, and what in_proj_weight returns.
    _qkv_same_embed_dim = False

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        mechanism: str | Mechanism = "standard",
        max_len: int | None = None,
        align_heads: str = "shared",
        align_causal: bool = False,
        align_init: str = "xavier",
        scale: float | str | None = None,
        rotary: bool | float | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.mechanism = Mechanism.of(mechanism)
        self.embed_dim = whole_number(embed_dim, "embed_dim")
        self.num_heads = whole_number(num_heads, "num_heads")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim must be divisible by num_heads, received {embed_dim} and {num_heads}.")
        self.head_dim = self.embed_dim // self.num_heads
        self.dropout = finite_number(dropout, "dropout", low=0.0, high=1.0)
        self.kdim = self._input_width(kdim, "kdim", "k")
        self.vdim = self._input_width(vdim, "vdim", "v")
        self.batch_first = flag(batch_first, "batch_first")
        self.add_zero_attn = flag(add_zero_attn, "add_zero_attn")
        self.scale = self._check_scale(scale)
        self.rotary = self._check_rotary(rotary)
        self.impl = one_of(impl, "impl", IMPLS)
        flag(bias, "bias")
        flag(add_bias_kv, "add_bias_kv")
        if not self.mechanism.aligned:
            self._refuse_alignment(max_len, align_heads, align_causal, align_init)
        elif max_len is None:
            raise ValueError(
                f"mechanism {self.mechanism.name!r} needs max_len, the size of W_A: the longest value sequence. "
                "Pass max_len=..., or use 'efficient', which has no fixed length."
            )

        if dtype is not None:
            floating_dtype(dtype, "dtype")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        widths = {"q": self.embed_dim, "k": self.kdim, "v": self.vdim}
        # out_proj is drawn first, as in torch, so that one seed gives both classes the same weights.
        out_proj = nn.Linear(self.embed_dim, self.embed_dim, bias, **factory) if self._learns("o") else nn.Identity()
        for p, width in widths.items():
            linear = _undrawn(width, self.embed_dim, bias, **factory) if self._learns(p) else nn.Identity()
            setattr(self, f"{p}_proj", linear)
        self.align: nn.Module = nn.Identity()
        if max_len is not None:
            self.align = Alignment(
                max_len,
                self.num_heads,
                heads=align_heads,
                causal=align_causal,
                init=align_init,
                bias=bias,
                compiled=self.impl in ("auto", "native"),
                **factory,
            )
        self.out_proj = out_proj
        self.extra_k = ExtraPosition(self.embed_dim, **factory) if add_bias_kv else None
        self.extra_v = ExtraPosition(self.embed_dim, **factory) if add_bias_kv else None
        self.scaling = LearnedScale(self.num_heads, self.head_dim, **factory) if self.scale == "learned" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw q, k, v weights as torch's class does (Glorot uniform of the packed matrix); biases start at zero.

        W_A has its own ``align.reset_parameters()``.
        """
        kept = [getattr(self, f"{p}_proj") for p in "qkv" if self._learns(p)]
        with torch.no_grad():
            if self.kdim == self.vdim == self.embed_dim:
                # One draw for the packed (3D, D) matrix has torch's bound, and torch's numbers for "standard".
                bound = math.sqrt(3.0) * math.sqrt(2.0 / (4 * self.embed_dim))
                weights = [linear.weight for linear in kept]
                if weights:
                    packed = torch.empty_like(torch.cat(weights)).uniform_(-bound, bound)
                    for weight, part in zip(weights, packed.split(self.embed_dim), strict=True):
                        weight.copy_(part)
            else:
                for linear in kept:
                    nn.init.xavier_uniform_(linear.weight)
            for linear in (*kept, self.out_proj):
                if getattr(linear, "bias", None) is not None:
                    linear.bias.zero_()
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

        >>> model = nn.Sequential(MultiheadAttention(32, 4, mechanism="super", max_len=5, align_init="identity"))
        >>> _ = [nn.init.xavier_uniform_(p) for p in model.parameters() if p.dim() > 1]
        >>> MultiheadAttention.redraw(model)
        >>> bool((model[0].align.weight == torch.eye(5)).all())
        True
        """
        for module in model.modules():
            if isinstance(module, MultiheadAttention):
                module.reset_parameters()
                if isinstance(module.align, Alignment):
                    module.align.reset_parameters()

    # --- attributes of torch's layer, for hosts that read or initialise them -----------------------------------

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
        ours = self.mechanism.aligned or self.mechanism.score != DEFAULT_SCORE or self.scale is not None
        torchs = not ours and self.rotary is None
        return packed((self.q_proj, self.k_proj, self.v_proj), kind, self.mechanism.name, torchs)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; arguments and result are those of ``torch.nn.MultiheadAttention.forward``.

        Args:
            query: (L, B, D); (B, L, D) with ``batch_first``; or unbatched (L, D).
            key, value: the same with S for L, and widths ``kdim`` and ``vdim``.
            key_padding_mask: (B, S) or (S). bool: True = hide. float: added to the log weights.
            need_weights: also return the weights. Turn it off for speed and O(L) memory.
            attn_mask: (L, S) or (B h, L, S), unbatched (h, L, S). bool: True = hide. float: added. A float mask of 0
                and 1 that requires no gradient is refused; as a bias, pass ``mask - 1.0``.
            average_attn_weights: average the returned weights over heads.
            is_causal: query l sees keys s <= l; masks apply as well.

        Returns:
            The output in the query's layout, contiguous, and None or the weights after dropout: (B, L, S), or
            (B, h, L, S) if not averaged, without B if unbatched.

        Raises:
            TypeError, ValueError: inputs that do not fit the layer or one another.
            RuntimeError: under ``torch.compile``, a causal ``attn_mask`` on a full W_A, seen when the code runs.
                An exported program does not look: build the layer with ``align_causal=True``.
        """
        if is_symbolic(query):
            return fx_leaf(  # type: ignore[no-any-return]
                self,
                {
                    "query": query,
                    "key": key,
                    "value": value,
                    "key_padding_mask": key_padding_mask,
                    "need_weights": need_weights,
                    "attn_mask": attn_mask,
                    "average_attn_weights": average_attn_weights,
                    "is_causal": is_causal,
                },
            )
        if isinstance(query, Tensor) and query.is_nested:
            return self._nested(query, key, value, key_padding_mask, need_weights, attn_mask, is_causal), None
        query_BLD, key_BSD, value_BSD = arguments.sequences(
            query, key, value, widths=(self.embed_dim, self.kdim, self.vdim), batch_first=self.batch_first
        )
        arguments.check_placement(query, key, value)
        batched = query.dim() == 3
        if (
            key_padding_mask is None
            and attn_mask is None
            and not need_weights
            and key_BSD is value_BSD
            and key is query
        ):
            output = self._in_one_call(query_BLD, is_causal)
            if output is not None:
                return output if batched else output.squeeze(0), None
        sizes = (query_BLD.shape[0], self.num_heads, query_BLD.shape[1], key_BSD.shape[1])
        mask_BNLS, padding_B11S = arguments.torch_masks(
            attn_mask, key_padding_mask, sizes, batched=batched, device=query.device
        )
        self._refuse_leak(mask_BNLS, is_causal)
        padded_BS1 = arguments.padded_positions(padding_B11S, self.mechanism)
        key_BSD, value_BSD = arguments.silence(key_BSD, value_BSD, padded_BS1)

        q_BLD = called(self.q_proj, query_BLD, "q_proj")
        k_BSD = called(self.k_proj, key_BSD, "k_proj")
        v_BSD = called(self.v_proj, value_BSD, "v_proj")
        if padded_BS1 is not None and self.mechanism.aligned and self._learns("v"):
            v_BSD = v_BSD.masked_fill(padded_BS1, 0.0)  # W_V's bias has made them non-zero again
        v_BSD = called(self.align, v_BSD, "align (W_A)")
        q_BLD, k_BSD, v_BSD = same_dtype(q_BLD, k_BSD, v_BSD, projected=True)
        if self.rotary is not None:
            q_BLD, k_BSD = (self._turned(x, self.rotary) for x in (q_BLD, k_BSD))
        if self.extra_k is not None or self.add_zero_attn:
            k_BSD, v_BSD = self._with_extra_keys(k_BSD, v_BSD)
            mask_BNLS, padding_B11S = self._with_extra_columns(mask_BNLS, padding_B11S, q_BLD, k_BSD, is_causal)
            is_causal = False

        q_BNLH, k_BNSH = self._split(q_BLD, "q_proj"), self._split(k_BSD, "k_proj")
        call = Call(
            q_BNLH if self.scaling is None else called(self.scaling, q_BNLH, "scaling"),
            k_BNSH,
            k_BNSH if v_BSD is k_BSD else self._split(v_BSD, "v_proj"),
            mask_BNLS=mask_BNLS,
            padding_B11S=padding_B11S,
            causal=is_causal,
            score=self.mechanism.score,
            scale=self._fixed_scale(),
            dropout_p=self.dropout if self.training else 0.0,
            need_weights=need_weights,
        )
        heads_BNLH, weights = attend(call, self.impl)

        heads_BLNH = heads_BNLH.transpose(1, 2)
        # Joined in the caller's layout, so that the output is contiguous there.
        joined = (heads_BLNH if self.batch_first else heads_BLNH.transpose(0, 1)).flatten(-2)
        output = called(self.out_proj, joined, "out_proj")
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if batched:
            return output, weights
        return output.squeeze(0 if self.batch_first else 1), None if weights is None else weights[0]

    def to_torch_state_dict(self) -> dict[str, Tensor]:
        """The weights under the names of ``torch.nn.MultiheadAttention``, packed where torch packs them.

        Raises:
            ValueError: the layer computes what torch's class cannot.
        """
        if self.mechanism != MECHANISMS["standard"] or self.scale is not None or self.rotary is not None:
            raise ValueError(
                f"torch.nn.MultiheadAttention computes 'standard' attention with scale=None and without rotary "
                f"positions only; this layer is {self.mechanism.name!r} with scale={self.scale!r}, "
                f"rotary={self.rotary!r}."
            )
        return to_packed(self.state_dict(), packed=self.kdim == self.vdim == self.embed_dim)

    def __prepare_scriptable__(self) -> MultiheadAttention:
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
        unpack(self, state_dict, prefix)
        if local_metadata.get("assign_to_params_buffers", False):
            separate(state_dict, prefix)
        explain_parts(self, state_dict, prefix)
        error_msgs += other_size(self, state_dict, prefix)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def __getstate__(self) -> dict[str, Any]:
        # The mechanism as plain data: torch.load(weights_only=True) needs a permission for every class in a pickle.
        row = self.mechanism
        plain = {"mechanism": ("".join(sorted(row.projections)), row.aligned, row.score)}
        return {**self.__dict__, "_load_state_dict_post_hooks": lasting_hooks(self), **plain}

    def __setstate__(self, state: dict[str, Any]) -> None:
        projections, aligned, score = state["mechanism"]
        super().__setstate__({**state, "mechanism": Mechanism(frozenset(projections), aligned, score)})

    def extra_repr(self) -> str:
        """Settings for ``print(module)``."""
        parts = [f"{self.embed_dim}, {self.num_heads}, mechanism={self.mechanism.name!r}"]
        defaults: dict[str, object] = {"dropout": 0.0, "batch_first": False, "add_zero_attn": False}
        defaults |= {"scale": None, "rotary": None, "impl": "auto"}
        parts += [f"{n}={getattr(self, n)!r}" for n, default in defaults.items() if getattr(self, n) != default]
        return ", ".join(parts)

    # --- construction ------------------------------------------------------------------------------------------

    def _learns(self, projection: str) -> bool:
        return projection in self.mechanism.projections

    def _input_width(self, width: int | None, name: str, projection: str) -> int:
        if width is None:
            return self.embed_dim
        width = whole_number(width, name)
        if width != self.embed_dim and not self._learns(projection):
            raise ValueError(
                f"{name}={width} must equal embed_dim={self.embed_dim}: mechanism {self.mechanism.name!r} has no "
                f"W_{projection.upper()}, its heads read slices of the input itself. Project the input first, or use a "
                f"mechanism that learns {projection!r}."
            )
        return width

    def _check_scale(self, scale: float | str | None) -> float | str | None:
        if scale is None or (isinstance(scale, str) and scale == "learned"):
            return scale
        if isinstance(scale, str):
            raise ValueError(f"scale must be None, a number or 'learned', received {scale!r}.")
        return finite_number(scale, "scale")

    def _check_rotary(self, rotary: bool | float | None) -> float | None:
        if rotary is None or rotary is False:
            return None
        even_width(self.head_dim)
        return BASE if rotary is True else finite_number(rotary, "rotary", low=1.0)

    def _refuse_alignment(self, max_len: int | None, heads: str, causal: bool, init: str) -> None:
        given = {"max_len": max_len, "align_heads": heads, "align_causal": causal, "align_init": init}
        defaults = {"max_len": None, "align_heads": "shared", "align_causal": False, "align_init": "xavier"}
        for name, value in given.items():
            if value != defaults[name]:
                raise ValueError(
                    f"{name}={value!r} concerns W_A, which mechanism {self.mechanism.name!r} does not have. Leave it "
                    "out, or choose 'super' or 'NAME+align'."
                )

    # --- forward, in order of use ------------------------------------------------------------------------------

    def _nested(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> Tensor:
        """Self-attention on sequences of several lengths, as ``nn.TransformerEncoder`` makes them of padded input.

        The result has the layout of the query, strided or jagged.
        """
        own = query is key and key is value and self.batch_first
        if not own or need_weights or attn_mask is not None or key_padding_mask is not None:
            raise TypeError(
                "nested tensors are taken for self-attention with batch_first=True, need_weights=False and no mask "
                "(is_causal is taken): pad them (to_padded_tensor) and pass key_padding_mask, or set "
                "encoder.use_nested_tensor = False."
            )
        sequences = query.unbind()
        if any(x.dim() != 2 or x.shape[1] != self.embed_dim for x in sequences):
            shapes = ", ".join(str(tuple(x.shape)) for x in sequences[:10])
            raise ValueError(f"a nested query must hold sequences (L, embed_dim={self.embed_dim}), received {shapes}.")
        lengths = [len(x) for x in sequences]
        if sum(lengths) == 0:
            return query.clone()
        padded_BLD = nn.utils.rnn.pad_sequence(list(sequences), batch_first=True)
        padding_BL = torch.arange(padded_BLD.shape[1]) >= torch.tensor(lengths)[:, None]
        output_BLD, _ = self.forward(
            padded_BLD,
            padded_BLD,
            padded_BLD,
            padding_BL.to(query.device),
            need_weights=False,
            is_causal=is_causal,
        )
        outputs = [x[:n] for x, n in zip(output_BLD, lengths, strict=True)]
        if query.layout == torch.jagged and query.lengths() is None:  # type: ignore[attr-defined]
            # With the query's own offsets, so that the two can be added.
            return torch.nested.nested_tensor_from_jagged(torch.cat(outputs), query.offsets())  # type: ignore[attr-defined]
        return torch.nested.as_nested_tensor(outputs, layout=query.layout)

    def _in_one_call(self, x_BLD: Tensor, is_causal: bool) -> Tensor | None:
        """Small self-attention in inference by one compiled call; None where it has to go step by step."""
        # Under the triangle a past row keeps its bits whatever the future holds, NaN too: one way for both.
        if is_causal or torch.is_grad_enabled() or not quiet() or not fast_path.serves(x_BLD, self.mechanism.score):
            return None
        projections = (self.q_proj, self.k_proj, self.v_proj, self.out_proj)
        parts = (*projections, self.align)
        if (
            self.impl not in ("auto", "native")
            or not self.batch_first
            or not self.kdim == self.vdim == self.embed_dim
            or self.bias_k is not None
            or self.add_zero_attn
            or self.log_scale is not None
            or self.rotary is not None
            or (self.training and self.dropout > 0.0)
            or autocast_dtype("cpu") is not None
            or not unpatched()
            or not all(_is_bare(part) for part in parts)
            or not are_plain(x_BLD, *(p for part in parts for p in part._parameters.values()))
        ):
            return None
        alignment = None
        if isinstance(self.align, Alignment):
            if not self.align.is_plain(x_BLD.shape[1]):
                return None
            alignment = self.align.first(x_BLD.shape[1])
        return fast_path.self_attention(
            x_BLD, self.num_heads, projections, alignment, self.mechanism.score, bool(is_causal), self._fixed_scale()
        )

    def _refuse_leak(self, mask_BNLS: Tensor | None, is_causal: bool) -> None:
        if not isinstance(self.align, Alignment) or self.align.causal:
            return
        if is_causal or (mask_BNLS is not None and masks.hides_the_future(mask_BNLS)):
            raise ValueError(self._leak("is_causal=True" if is_causal else "a causal attn_mask"))
        if mask_BNLS is not None and torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting():
            # The mask's values are known when the compiled code runs: the question becomes part of it.
            conditions = masks.triangle_conditions(mask_BNLS)
            if conditions:
                causal = torch.stack([condition() for condition in conditions]).all()
                torch._assert_async(~causal, self._leak("a causal attn_mask"))

    def _leak(self, came: str) -> str:
        return (
            f"mechanism {self.mechanism.name!r} received {came}, but its W_A mixes every value position, later "
            "ones included, into every other before any mask applies: the future would leak. Build the layer with "
            "align_causal=True, which keeps W_A lower triangular."
        )

    def _with_extra_keys(self, k_BSD: Tensor, v_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Behind the sequence: the learned key and value, then those of zeros."""
        if self.extra_k is not None and self.extra_v is not None:
            k_BSD, v_BSD = called(self.extra_k, k_BSD, "extra_k"), called(self.extra_v, v_BSD, "extra_v")
        if self.add_zero_attn:
            k_BSD, v_BSD = (F.pad(x, (0, 0, 0, 1)) for x in (k_BSD, v_BSD))
        return k_BSD, v_BSD

    def _with_extra_columns(
        self, mask_BNLS: Tensor | None, padding_B11S: Tensor | None, q_BLD: Tensor, k_BSD: Tensor, is_causal: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Masks for the keys that were added, which every query sees, the triangle written out among them."""
        extra = (self.extra_k is not None) + self.add_zero_attn
        if is_causal:
            L, S = q_BLD.shape[1], k_BSD.shape[1] - extra
            triangle = torch.ones(L, S, dtype=torch.bool, device=q_BLD.device).tril()[None, None]
            if mask_BNLS is None:
                mask_BNLS = triangle
            elif mask_BNLS.dtype == torch.bool:
                mask_BNLS = mask_BNLS & triangle
            else:
                mask_BNLS = mask_BNLS.masked_fill(~triangle, -math.inf)
        mask_BNLS, padding_B11S = (
            m if m is None else F.pad(m, (0, extra), value=True if m.dtype == torch.bool else 0.0)
            for m in (mask_BNLS, padding_B11S)
        )
        return mask_BNLS, padding_B11S

    def _split(self, x_BLD: Tensor, name: str) -> Tensor:
        """Heads apart: head i has columns i*H ... (i+1)*H; a view.

        Raises:
            ValueError: the projection called ``name`` returned another width, as in tensor-parallel training.
        """
        B, L, width = x_BLD.shape
        if width != self.num_heads * self.head_dim:
            raise ValueError(
                f"{name} returned width {width}, but {self.num_heads} heads of width {self.head_dim} need "
                f"{self.num_heads * self.head_dim}. If its columns are divided among processes, set num_heads to the "
                f"heads of one process ({self.num_heads} divided by their number); every projection has to be divided."
            )
        return x_BLD.view(B, L, self.num_heads, self.head_dim).transpose(1, 2)

    def _turned(self, x_BLD: Tensor, base: float) -> Tensor:
        """Every head's pairs of features turned by the position."""
        B, L, _ = x_BLD.shape
        positions_L = torch.arange(L, device=x_BLD.device)
        cos_LP, sin_LP = angles(positions_L, self.head_dim, base=base, dtype=island(x_BLD.dtype))
        heads_BLNH = x_BLD.view(B, L, self.num_heads, self.head_dim)
        return turned(heads_BLNH, cos_LP[:, None], sin_LP[:, None]).flatten(2)

    def _fixed_scale(self) -> float:
        if self.scale is None:
            return 1.0 / math.sqrt(self.head_dim)
        return 1.0 if isinstance(self.scale, str) else self.scale


def _is_bare(part: nn.Module) -> bool:
    """Whether a part of the layer is just what it seems: no adapter, hook, patch or special weight would be skipped."""
    if type(part) not in (nn.Linear, nn.Identity, Alignment) or not bare(part):
        return False
    parameters = part._parameters
    return len(parameters) in (0, 2) and all(p is None or p.dtype == torch.float32 for p in parameters.values())


class _Undrawn(nn.Linear):
    """A linear map whose weights the layer draws itself, so that it draws no random numbers of its own."""

    def reset_parameters(self) -> None:
        """Leave the weights as allocated."""


def _undrawn(*args: Any, **kwargs: Any) -> nn.Linear:
    linear: nn.Linear = _Undrawn(*args, **kwargs)
    linear.__class__ = nn.Linear  # an ordinary one from here on: some tools ask for exactly this class
    return linear
