"""The layer: the picture in the README as consecutive calls.

query, key, value -> project -> align -> score -> mix -> output. Shape suffixes as in arguments.py: B batch, L queries,
S keys, N heads, G heads of keys, H head width, D model width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from better_attention.cache.kv_cache import KVCache
from better_attention.call.call import Call
from better_attention.call.function_arguments import same_dtype
from better_attention.call.tracing import is_symbolic, module_node
from better_attention.errors import check_bool, check_choice, check_float, check_int
from better_attention.impl.dispatch import IMPLS
from better_attention.mechanism import Mechanism
from better_attention.tensors import floating_dtype

from . import extra_keys, fast_path, share, window
from .alignment import Alignment, check_alignment
from .arguments import Arguments, Inputs, read
from .calling import called
from .decode import cached
from .extra_keys import ExtraPosition
from .heads import HeadCounts, biased, check_alibi, check_rotary, join, rotated, split
from .imitation import nested
from .imitation.drop_in import DropIn
from .projections import check_input_width, check_kv_heads, projection
from .scale import LearnedScale, check_scale, fixed_scale, scaled
from .window import WindowAlignment, check_window


class MultiheadAttention(HeadCounts, DropIn):
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
        kdim: width of the key, where it differs from D; only where W_K is learned.
        vdim: width of the value, where it differs from D; only where W_V is learned.
        batch_first: inputs are (B, L, D) rather than (L, B, D).
        device: of the parameters.
        dtype: of the parameters.
        mechanism: a name from ``MECHANISMS``, ``"optimized"``, ``"NAME+expressive"``, or a ``Mechanism``.
        max_len: longest value sequence, the size of W_A; required by aligned mechanisms without a window, refused by
            others.
        align_heads: one W_A for all heads ("shared") or one for each head of the values ("per_head").
        align_causal: keep W_A lower triangular; needed under a causal mask.
        align_init: "xavier" or "identity".
        scale: factor on q.k: None for 1/sqrt(head width), a number, or "learned", which starts there as the
            parameter ``log_scale`` (h,).
        rotary: turn queries and keys by their positions, counted from 0 on both sides (:mod:`.positions`): True for
            base 10,000, or the base. Needs an even head width; the keys of ``add_bias_kv`` and ``add_zero_attn`` have
            no position and are not turned.
        window: each query sees its own token and at most ``window`` - 1 before it, for sequences of any length, in
            time O(L window). W_A is then window x window and acts on the tokens of each window
            (:mod:`.layer.window`); it takes the place of ``max_len``.
        alibi: bias every key by its distance, "weight" (on the log weights, as ALiBi has it) or "score" (inside the
            score, needs ``is_causal=True``); see heads.py. None: not at all.
        num_kv_heads: number of heads of projected keys and values, each of which serves as many neighbouring query
            heads (grouped queries, arXiv 2305.13245; 1: multi-query, arXiv 1911.02150); divides ``num_heads``. None: as
            many as queries have. Refused where keys are not projected; values that are not stay slices of the input,
            one for each query head.
        impl: who computes, see :func:`better_attention.attention`.

    Raises:
        ValueError: an argument out of range, or one that cannot mean anything for the mechanism.
        TypeError: an argument of the wrong kind.

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
        window: int | None = None,
        alibi: str | None = None,
        num_kv_heads: int | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.mechanism = Mechanism.of(mechanism)
        self.embed_dim = check_int(embed_dim, "embed_dim")
        self.num_heads = check_int(num_heads, "num_heads")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim must be divisible by num_heads, received {embed_dim} and {num_heads}.")
        self.head_dim = self.embed_dim // self.num_heads
        self.kv_group = check_kv_heads(num_kv_heads, self.num_heads, self.mechanism)
        self.dropout = check_float(dropout, "dropout", low=0.0, high=1.0)
        self.kdim = check_input_width(kdim, "kdim", "k", self.embed_dim, self.mechanism)
        self.vdim = check_input_width(vdim, "vdim", "v", self.embed_dim, self.mechanism)
        self.batch_first = check_bool(batch_first, "batch_first")
        self.add_zero_attn = check_bool(add_zero_attn, "add_zero_attn")
        self.scale = check_scale(scale)
        self.rotary = check_rotary(rotary, self.head_dim)
        self.alibi = check_alibi(alibi, add_bias_kv or add_zero_attn)
        self.impl = check_choice(impl, "impl", IMPLS)
        check_bool(bias, "bias")
        check_bool(add_bias_kv, "add_bias_kv")
        self.cache_identity: set[None] = set()
        self.window = None if window is None else check_int(window, "window")
        check_alignment(self.mechanism, max_len, self.window, align_heads, align_causal, align_init)
        check_window(self.mechanism, self.window, extra=add_bias_kv or self.add_zero_attn)
        if dtype is not None:
            floating_dtype(dtype, "dtype")

        D, H, learned = self.embed_dim, self.head_dim, self.mechanism.projections
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        # W_O is drawn first, as in torch, so that one seed gives both classes the same weights.
        out_proj = nn.Linear(D, D, bias, **factory) if "o" in learned else nn.Identity()
        self.q_proj = projection("q" in learned, D, D, bias, **factory)
        self.k_proj = projection("k" in learned, self.kdim, self.key_heads * H, bias, **factory)
        self.v_proj = projection("v" in learned, self.vdim, self.value_heads * H, bias, **factory)
        self.align = nn.Identity()
        # check_alignment() has refused a size without W_A and a W_A without its size.
        if self.mechanism.aligned and self.window is not None:
            self.align = WindowAlignment(
                self.window, self.value_heads, heads=align_heads, init=align_init, bias=bias, **factory
            )
        elif max_len is not None:
            self.align = Alignment(
                max_len,
                self.value_heads,
                heads=align_heads,
                causal=align_causal,
                init=align_init,
                bias=bias,
                compiled=self.impl in ("auto", "native"),
                **factory,
            )
        # Assigned last though drawn first: state dicts and prints list the maps in the order of the picture.
        self.out_proj = out_proj
        self.extra_k = ExtraPosition(self.key_heads * H, **factory) if add_bias_kv else None
        self.extra_v = ExtraPosition(self.value_heads * H, **factory) if add_bias_kv else None
        self.scaling = LearnedScale(self.num_heads, self.head_dim, **factory) if self.scale == "learned" else None
        # All of q, k and v at once, as torch draws its packed matrix.
        self.reset_parameters()

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
        *,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; arguments and result are those of ``torch.nn.MultiheadAttention.forward``.

        Args:
            query: (L, B, D); (B, L, D) with ``batch_first``; or unbatched (L, D).
            key: the same with S for L, and width ``kdim``.
            value: the same with S for L, and width ``vdim``.
            key_padding_mask: (B, S) or (S). bool: True = hide. float: added to the log weights.
            need_weights: also return the weights. Turn it off for speed and O(L) memory.
            attn_mask: (L, S) or (B h, L, S), unbatched (h, L, S). bool: True = hide. float: added. A float mask of 0
                and 1 that requires no gradient is refused; as a bias, pass ``mask - 1.0``.
            average_attn_weights: average the returned weights over heads.
            is_causal: query l sees keys s <= l; masks apply as well. Always so with a window or a cache.
            cache: what the layer remembers of earlier tokens, a :class:`better_attention.KVCache`. The inputs are the
                tokens that follow, one tensor as query, key and value; they are remembered as well. S in the other
                arguments: of ``key_padding_mask`` the new tokens, of ``attn_mask`` all of them.

        Returns:
            The output in the query's layout, contiguous, and None or the weights after dropout: (B, L, S), or
            (B, h, L, S) if not averaged, without B if unbatched.

        Raises:
            TypeError: an input of the wrong kind or dtype.
            ValueError: inputs that do not fit the layer or one another.
            RuntimeError: under ``torch.compile``, a causal ``attn_mask`` on a full W_A, seen when the code runs.
                An exported program does not look: build the layer with ``align_causal=True``.
        """
        given = Arguments(query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        if is_symbolic(query):
            return module_node(self, given._asdict() | {"cache": cache})  # type: ignore[no-any-return]
        if cache is not None:
            return cached.attend(self, given, cache)
        if nested.is_nested(query):
            return nested.attend(self, given)
        x = read(self, given)
        if (output := fast_path.attend(self, x)) is not None:
            return x.returned(output)

        # project
        q_BLD = called(self.q_proj, x.query_BLD, "q_proj")
        k_BSD = called(self.k_proj, x.key_BSD, "k_proj")
        v_BSD = called(self.v_proj, x.value_BSD, "v_proj")
        q_BLD, k_BSD, v_BSD = share.columns(self, q_BLD, k_BSD, v_BSD)
        # align
        v_BSD = window.aligned_values(self, x.with_zero_padding(v_BSD))
        # score and mix
        # Under autocast a linear map returns 16 bits, and an identity its input as it is: here they become one dtype.
        q_BLD, k_BSD, v_BSD = same_dtype(q_BLD, k_BSD, v_BSD, projected=True)
        q_BLD = rotated(q_BLD, self.heads_here, self.rotary)
        k_BSD = rotated(k_BSD, self.here(self.key_heads), self.rotary)
        # After the rotation, because the added keys have no position.
        k_BSD, v_BSD, x = extra_keys.append(self, k_BSD, v_BSD, x)
        call = self.call(q_BLD, k_BSD, v_BSD, x)
        with share.draws(self, call.dropout_p, call.q_BNLH):
            heads_BNLH, weights = window.attend(self, call)
        weights = weights if self.share is None else self.share.gathered(weights)
        # output
        output = called(self.out_proj, join(heads_BNLH, self.batch_first), "out_proj")
        return x.returned(output, weights)

    def call(self, q_BLD: Tensor, k_BSD: Tensor, v_BSD: Tensor, x: Inputs) -> Call:
        """The attention call, heads apart, with the biases of the positions."""
        call = self.unbiased_call(q_BLD, k_BSD, v_BSD, x)
        return biased(self.alibi, call, self.num_heads, self.first_head)

    def unbiased_call(self, q_BLD: Tensor, k_BSD: Tensor, v_BSD: Tensor, x: Inputs) -> Call:
        """The attention call, heads apart, as it is without ALiBi."""
        q_BNLH = split(q_BLD, self.heads_here, self.head_dim, "q_proj")
        k_BGSH = split(k_BSD, self.here(self.key_heads), self.head_dim, "k_proj")
        # With neither W_K nor W_V one tensor is both; it stays one, so that the kernels read it once.
        shared = v_BSD is k_BSD
        return Call(
            scaled(self.scaling, q_BNLH),
            k_BGSH,
            k_BGSH if shared else split(v_BSD, self.here(self.value_heads), self.head_dim, "v_proj"),
            mask_BNLS=x.mask_BNLS if self.share is None else self.share.mask(x.mask_BNLS),
            padding_B11S=x.padding_B11S,
            causal=x.causal,
            offset=x.offset,
            window=self.window if x.causal else None,
            score=self.mechanism.score,
            scale=fixed_scale(self.scale, self.head_dim),
            dropout_p=self.dropout if self.training else 0.0,
            need_weights=x.need_weights,
        )

    def extra_repr(self) -> str:
        """Settings for ``print(module)``."""
        parts = [f"{self.embed_dim}, {self.num_heads}, mechanism={self.mechanism.name!r}"]
        defaults: dict[str, object] = {"dropout": 0.0, "batch_first": False, "add_zero_attn": False}
        defaults |= {"scale": None, "rotary": None, "window": None, "alibi": None, "impl": "auto"}
        defaults |= {"num_kv_heads": self.num_heads}
        parts += [f"{n}={getattr(self, n)!r}" for n, default in defaults.items() if getattr(self, n) != default]
        if self.share is not None:
            parts.append(f"heads {self.share.first} ... {self.share.first + self.share.count - 1} in this process")
        return ", ".join(parts)
