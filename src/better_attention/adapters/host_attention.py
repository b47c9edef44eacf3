"""Attention inside the models of other libraries: grouped heads, a cache of the host's, rotary positions.

:class:`HostAttention` computes; a subclass for each host translates that host's forward signature.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from better_attention.call.masks import together
from better_attention.errors import describe
from better_attention.functional import attention
from better_attention.mechanism import Mechanism
from better_attention.scores import DEFAULT_SCORE, SCORES

from .adapter import Adapter, linear_refusals, register
from .source import MAPS, LinearMap, Source, alignment, kernel_of

Update = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Appends keys and values (B, heads, L, H) to a host's cache and returns all that are in it."""


class Score(nn.Module):
    """Weights from queries and keys, and the mean of the values; a module so that hooks see what goes in.

    Args:
        score: a key of :data:`better_attention.scores.SCORES`.
        scale: factor on q.k.
        dropout: probability of dropping a weight in training.
    """

    def __init__(self, score: str, scale: float, dropout: float) -> None:
        super().__init__()
        self.score, self.scale, self.dropout = score, scale, dropout

    def forward(
        self, q_BNLH: Tensor, k_BGSH: Tensor, v_BGSH: Tensor, mask: Tensor | None, causal: bool, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The heads (B, N, L, H), and the weights (B, N, L, S) or None. Keys and values may be grouped."""
        groups = {q_BNLH.shape[1], k_BGSH.shape[1], v_BGSH.shape[1]}
        # A host with grouped heads that lost only one of W_K and W_V: slices come one per head, and grouped queries
        # need keys and values in equal number.
        if k_BGSH.shape[1] != v_BGSH.shape[1]:
            shared = k_BGSH is v_BGSH
            k_BGSH, v_BGSH = (_spread(x, q_BNLH.shape[1]) for x in (k_BGSH, v_BGSH))
            v_BGSH = k_BGSH if shared else v_BGSH
            groups = {q_BNLH.shape[1]}
        result = attention(  # type: ignore[call-overload]
            q_BNLH,
            k_BGSH,
            v_BGSH,
            score=self.score,
            attn_mask=mask,
            is_causal=causal,
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.scale,
            enable_gqa=len(groups) > 1,
            need_weights=need_weights,
        )
        return cast("tuple[Tensor, Tensor]", result) if need_weights else (cast(Tensor, result), None)

    def extra_repr(self) -> str:
        """Settings for ``print(module)``."""
        return f"{self.score!r}, scale={self.scale:.4g}, dropout={self.dropout}"


def _spread(x_BGSH: Tensor, num_heads: int) -> Tensor:
    return x_BGSH.repeat_interleave(num_heads // x_BGSH.shape[1], dim=1)


class HostAttention(nn.Module):
    """One attention layer with any mechanism, in batch-first layout.

    Args:
        target: what it computes; its Parameters are taken over.

    Subclasses are hosts' modules too: :func:`converted_class` derives from both, so that whatever asks whether a module
    is of the host's class (recorders of attention weights, for example) gets the answer yes.
    """

    keeps: ClassVar[tuple[str, ...]] = ()
    """Submodules of the host's module that stay, such as a dropout behind the output map."""
    host: ClassVar[type[nn.Module]]
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    out_proj: nn.Module

    def __init__(self, target: Source) -> None:
        nn.Module.__init__(self)  # and not the host's
        self.mechanism = target.mechanism
        # Without the weights, which the sub-modules hold: `source` reads them there, after training too.
        self.settings = replace(target, q=None, k=None, v=None, o=None, align=None)
        for letter, name in MAPS.items():
            found: LinearMap | None = getattr(target, letter)
            part: nn.Module = nn.Identity()
            if found is not None:
                # A shell on the meta device, where nothing is drawn or allocated; into() sets its weights and sizes.
                part = nn.Linear(1, 1, device="meta")
                found.into(part)
            setattr(self, name, part)
        self.align = nn.Identity() if target.align is None else alignment(target.align, target.num_heads)
        self.score = Score(target.mechanism.score, target.scale, target.dropout)

    @property
    def source(self) -> Source:
        """What this layer computes, with its present weights."""
        maps = {letter: LinearMap.of(getattr(self, MAPS[letter])) for letter in self.mechanism.projections}
        return self.settings.with_maps(**maps, align=kernel_of(self.align))

    @classmethod
    def take_over(cls, old: nn.Module, target: Source) -> Self:
        """A module of this class and of the host's, in the place of ``old``, the host's or a converted one."""
        host = type(old).host if isinstance(old, HostAttention) else type(old)
        merged = converted_class(cls, host)
        # The host's constructor is not called: it would build and draw weights that are not needed.
        new: Self = merged.__new__(merged)
        HostAttention.__init__(new, target)
        for name, value in vars(old).items():
            # The host's plain attributes, such as config and layer_idx; an underscore begins those of nn.Module itself.
            if not name.startswith("_") and name not in vars(new):
                object.__setattr__(new, name, value)
        for name in cls.keeps:
            if name in old._modules:
                setattr(new, name, old._modules[name])
        return new.train(old.training)

    def attend(
        self,
        x_BLD: Tensor,
        y_BSD: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        update: Update | None = None,
        bias: Tensor | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from ``x_BLD`` to itself or to ``y_BSD``.

        Args:
            x_BLD: query input.
            y_BSD: key and value input; None for x.
            mask: None, or (B or 1, N or 1, L, S): bool, True = attend; or float, added to the log weights.
            causal: query l sees keys s <= l; only without a mask.
            update: appends to the host's cache.
            bias: (1 or B, N, L, S), added to the log weights.
            need_weights: also return the weights.

        Returns:
            The output (B, L, D), and None or the weights (B, N, L, S).
        """
        y_BSD = x_BLD if y_BSD is None else y_BSD
        q_BNLH = self.heads(self.q_proj(x_BLD))
        k_BGSH = self.heads(self.k_proj(y_BSD))
        v_BGSH = k_BGSH if self.shares_slices else self.heads(self.v_proj(y_BSD))
        if update is not None:
            # The cache gets values before W_A, because each new token changes what W_A makes of all positions.
            k_BGSH, v_BGSH = self._cached(k_BGSH, v_BGSH, update)
        return self.finish(q_BNLH, k_BGSH, v_BGSH, mask=mask, causal=causal, bias=bias, need_weights=need_weights)

    def finish(
        self,
        q_BNLH: Tensor,
        k_BGSH: Tensor,
        v_BGSH: Tensor,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        bias: Tensor | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Align, score, mix, output; arguments as for :meth:`attend`, heads apart."""
        check_mask(mask)
        L = q_BNLH.shape[2]
        causal = causal and mask is None and L > 1  # a single query is the last one, and sees all keys
        if causal and k_BGSH.shape[2] > L:  # a cache of fixed length, filled up to here
            shared = k_BGSH is v_BGSH
            k_BGSH = k_BGSH[:, :, :L]
            v_BGSH = k_BGSH if shared else v_BGSH[:, :, :L]
            bias = None if bias is None else bias[..., :L]
        v_BGSH = self._aligned(v_BGSH, mask)
        heads_BNLH, weights = self.score(q_BNLH, k_BGSH, v_BGSH, together(mask, bias), causal, need_weights)
        output: Tensor = self.out_proj(heads_BNLH.transpose(1, 2).flatten(2))
        return output, weights

    @property
    def shares_slices(self) -> bool:
        """Whether keys and values, before W_A, are the same slices of the input."""
        return not {"k", "v"} & self.mechanism.projections

    def heads(self, x_BLD: Tensor) -> Tensor:
        """Heads apart: (B, heads, L, H), a view."""
        B, L, width = x_BLD.shape
        H = self.settings.head_dim
        return x_BLD.view(B, L, width // H, H).transpose(1, 2)

    def _cached(self, k_BGSH: Tensor, v_BGSH: Tensor, update: Update) -> tuple[Tensor, Tensor]:
        if k_BGSH is not v_BGSH:
            return update(k_BGSH, v_BGSH)
        # One tensor serves as both: values of no width, so that the cache holds it once.
        k_BGSH, _ = update(k_BGSH, v_BGSH[..., :0])
        return k_BGSH, k_BGSH

    def _aligned(self, v_BGSH: Tensor, mask: Tensor | None) -> Tensor:
        if isinstance(self.align, nn.Identity):
            return v_BGSH
        hidden_BS = hidden_positions(mask)
        if hidden_BS is not None:  # W_A mixes positions, and padding must not reach the others
            v_BGSH = v_BGSH.masked_fill(hidden_BS[:, None, :, None], 0.0)
        return self.heads(self.align(v_BGSH.transpose(1, 2).flatten(2)))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time: copies and pickles ask for it by the two classes that it consists of.
        return _blank, (self._ours(), type(self).host), self.__dict__

    @classmethod
    def _ours(cls) -> type[HostAttention]:
        # converted_class() names ours first among the bases of the class that it makes.
        return cast("type[HostAttention]", cls.__mro__[1]) if "host" in vars(cls) else cls

    def extra_repr(self) -> str:
        """Settings for ``print(module)``."""
        heads = f"{self.settings.num_heads}"
        if self.settings.kv_heads != self.settings.num_heads:
            heads += f" ({self.settings.kv_heads} of keys and values)"
        return f"mechanism={self.mechanism.name!r}, heads={heads}"


_CLASSES: dict[tuple[type, type], Any] = {}


def converted_class(ours: type[HostAttention], host: type[nn.Module]) -> Any:
    """A class that computes as ``ours`` does and is a subclass of ``host`` for all who ask; always the same one."""
    # One class for each pair, because type comparisons and pickles need the same object each time.
    if (ours, host) not in _CLASSES:
        body = {"host": host, "__doc__": f"{host.__name__} with another mechanism.", "__module__": ours.__module__}
        _CLASSES[ours, host] = type(f"Converted{host.__name__}", (ours, host), body)
    return _CLASSES[ours, host]


def _blank(ours: type[HostAttention], host: type[nn.Module]) -> HostAttention:
    merged = converted_class(ours, host)
    new: HostAttention = merged.__new__(merged)
    return new


def check_mask(mask: object) -> None:
    """Raise unless ``mask`` is None or has four dimensions.

    Raises:
        TypeError: the host passes masks of another kind, as it does for flash and flex attention.
    """
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 4):
        raise TypeError(
            f"a converted layer takes masks (B, heads, L, S), received {describe(mask)}: choose the attention "
            "implementation 'sdpa' or 'eager' of the host."
        )


def hidden_positions(mask: Tensor | None) -> Tensor | None:
    """(B or 1, S): the keys that no query sees, which is padding; None without a mask."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        return ~mask.any(dim=2).any(dim=1)
    # The lowest number is what transformers writes for padding, and -inf lies below it.
    return (mask <= torch.finfo(mask.dtype).min).all(dim=2).all(dim=1)


def implementations() -> dict[str, str]:
    """Name of each attention implementation that :mod:`.transformers` registers there -> its score."""
    return {("better_attention" if score == DEFAULT_SCORE else score): score for score in SCORES}


def transformers_mechanism(module: nn.Module) -> Mechanism:
    """What a module of transformers computes: the score may be one of ours that was registered there."""
    implementation = getattr(module.config, "_attn_implementation", "sdpa")
    return Mechanism(frozenset(MAPS), score=implementations().get(implementation, DEFAULT_SCORE))


def transformers_refusals(module: nn.Module, *names: str) -> list[str]:
    """Why a module of transformers with these linear maps cannot be converted."""
    reasons = linear_refusals(module, *names)
    config: Any = module.config
    implementation = getattr(config, "_attn_implementation", None)
    if implementation not in (None, "eager", "sdpa", *implementations()):
        reasons.append(
            f"the model's attention implementation is {implementation!r}: call "
            "model.set_attn_implementation('sdpa') first"
        )
    if getattr(module, "sinks", None) is not None:
        reasons.append("it has attention sinks")
    for name in ("attn_logit_softcapping", "sliding_window"):
        if getattr(config, name, None) is not None or getattr(module, name, None) is not None:
            reasons.append(f"it has {name}")
    return reasons


def wants_weights(module: nn.Module) -> bool:
    """Whether the host's own layer would return the weights: transformers' "eager" attention does."""
    return getattr(module.config, "_attn_implementation", None) == "eager"


def _read(module: nn.Module) -> Source:
    return cast(HostAttention, module).source


def _build(old: nn.Module, target: Source) -> nn.Module:
    layer = cast(HostAttention, old)
    return layer._ours().take_over(old, target)


def _refusals(module: nn.Module) -> list[str]:
    layer = cast(HostAttention, module)
    return linear_refusals(layer, *(MAPS[letter] for letter in sorted(layer.mechanism.projections)))


CONVERTED = register(
    Adapter("converted", "better-attention", lambda m: isinstance(m, HostAttention), _read, _build, _refusals)
)
