"""What one attention layer computes, in neutral terms: the only form in which weights travel between libraries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from better_attention.layer.alignment import Alignment
from better_attention.layer.imitation.state_dict import repeat_heads
from better_attention.mechanism import Mechanism

MAPS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}
"""The letters of :class:`Mechanism`, and the names that our layers give these maps."""


@dataclass(frozen=True, slots=True)
class LinearMap:
    """One linear map, oriented as ``nn.Linear``: ``y = x @ weight.T + bias``.

    Args:
        weight: (outputs, inputs). A Parameter is taken over as it is, so that ties survive; any other tensor is copied.
        bias: (outputs,), or None.
        trains: whether the parameters of the new layer require gradients.
    """

    weight: Tensor
    bias: Tensor | None
    trains: bool = True

    @classmethod
    def of(cls, linear: nn.Module) -> LinearMap:
        """The map of an ``nn.Linear``."""
        weight, bias = linear.weight, linear.bias
        assert isinstance(weight, Tensor)  # noqa: S101 - for the type checker: adapters have looked
        assert bias is None or isinstance(bias, Tensor)  # noqa: S101
        return cls(weight, bias, weight.requires_grad)

    @property
    def parameters(self) -> int:
        """Number of numbers."""
        return self.weight.numel() + (0 if self.bias is None else self.bias.numel())

    def into(self, linear: nn.Linear) -> None:
        """Make this the map of ``linear``, whose own weights may lie on the meta device."""
        linear.weight = as_parameter(self.weight, self.trains)
        linear.bias = None if self.bias is None else as_parameter(self.bias, self.trains)  # type: ignore[assignment]
        # nn.Linear does not derive its sizes from the weight, and programs read them.
        linear.out_features, linear.in_features = self.weight.shape

    def with_repeated_heads(self, head_dim: int, times: int) -> LinearMap:
        """The map with each head ``times`` times, once for each query head of the group."""
        bias = None if self.bias is None else repeat_heads(self.bias, head_dim, times)
        return LinearMap(repeat_heads(self.weight, head_dim, times), bias, self.trains)


@dataclass(frozen=True, slots=True)
class Kernel:
    """W_A: ``weight`` (l, l) or (heads, l, l), ``bias`` (l,) or (heads, l) or None, and whether it stays triangular."""

    weight: Tensor
    bias: Tensor | None
    causal: bool
    trains: bool = True

    @property
    def max_len(self) -> int:
        """The longest value sequence."""
        return self.weight.shape[-1]

    def for_heads(self, heads: int) -> Kernel:
        """W_A for that number of heads of values: itself, or that of each grouped head for all of its group."""
        if self.weight.dim() == 2 or len(self.weight) == heads:
            return self
        times = heads // len(self.weight)
        bias = None if self.bias is None else self.bias.repeat_interleave(times, dim=0)
        return replace(self, weight=self.weight.repeat_interleave(times, dim=0), bias=bias)

    @property
    def parameters(self) -> int:
        """Number of numbers."""
        return self.weight.numel() + (0 if self.bias is None else self.bias.numel())


@dataclass(frozen=True, slots=True)
class Source:
    """What one attention layer computes.

    Args:
        mechanism: which maps it has, whether W_A, and its score.
        width: of the query input and of the output, D.
        num_heads: heads of the query.
        kv_heads: heads of key and value: fewer where they are grouped, else the same number.
        head_dim: width of a head of query and key.
        scale: factor on q.k.
        dropout: probability of dropping a weight in training.
        causal: whether the host hides later keys when it passes no mask.
        rotary: whether the host turns queries and keys by their positions.
        q: W_Q; None where the mechanism has none.
        k: W_K, or None.
        v: W_V, or None.
        o: W_O, or None.
        align: W_A, or None.
        obstacles: properties of the layer that forbid dropping W_K or W_V exactly, in words.
    """

    mechanism: Mechanism
    width: int
    num_heads: int
    kv_heads: int
    head_dim: int
    scale: float
    dropout: float
    causal: bool = False
    rotary: bool = False
    q: LinearMap | None = None
    k: LinearMap | None = None
    v: LinearMap | None = None
    o: LinearMap | None = None
    align: Kernel | None = None
    obstacles: tuple[str, ...] = ()

    def maps(self) -> Iterator[tuple[str, LinearMap]]:
        """The letters and maps that are there."""
        # In the order of MAPS, because reports and `sample` should not depend on how a mechanism was written.
        for letter in MAPS:
            found = getattr(self, letter)
            if found is not None:
                yield letter, found

    def with_maps(self, **maps: LinearMap | Kernel | None) -> Source:
        """A copy with other maps (``q``, ``k``, ``v``, ``o``, ``align``)."""
        return replace(self, **maps)  # type: ignore[arg-type]

    @property
    def parameters(self) -> int:
        """Number of parameters, W_A and biases included."""
        return sum(m.parameters for _, m in self.maps()) + (self.align.parameters if self.align else 0)

    @property
    def sample(self) -> Tensor:
        """Any weight, for device and dtype."""
        return next(m.weight for _, m in self.maps())

    @property
    def key_width(self) -> int:
        """Numbers of one key over all heads."""
        return (self.kv_heads if self.k is not None else self.num_heads) * self.head_dim

    @property
    def value_width(self) -> int:
        """Numbers of one value over all heads."""
        return (self.kv_heads if self.v is not None else self.num_heads) * self.head_dim

    def flops(self, length: int) -> int:
        """Operations of the matrix products of one forward pass over ``length`` tokens, as :func:`cost` counts them."""
        linear = sum(m.weight.numel() for _, m in self.maps())
        # Two products, queries with keys and weights with values; a multiply-add counts as two.
        mixed = 4 * length * length * self.num_heads * self.head_dim
        aligned = 2 * length * length * self.value_width if self.align else 0
        return 2 * length * linear + mixed + aligned

    @property
    def cache_bytes(self) -> int:
        """Bytes of the key and value cache per token while generating.

        One tensor where keys and values are both slices of the input; with rotary positions the angles come with it.
        """
        if self.k is None and self.v is None and self.align is None:
            return (self.key_width + (self.head_dim if self.rotary else 0)) * self.sample.dtype.itemsize
        return (self.key_width + self.value_width) * self.sample.dtype.itemsize


def as_parameter(x: Tensor, trains: bool) -> nn.Parameter:
    """``x`` itself if it is a Parameter, so that ties survive; a Parameter of its own storage otherwise."""
    if isinstance(x, nn.Parameter):
        return x
    # A clone, because the tensor may be a view of the old layer's packed matrix.
    return nn.Parameter(x.detach().clone(memory_format=torch.contiguous_format), requires_grad=trains)


def kernel_of(align: nn.Module) -> Kernel | None:
    """W_A of one of our layers, or None for the identity."""
    if not isinstance(align, Alignment):
        return None
    return Kernel(align.weight, align.bias, align.causal, align.weight.requires_grad)


def alignment(kernel: Kernel, num_heads: int, compiled: bool = True) -> Alignment:
    """The module of a W_A, with these weights."""
    # On the meta device nothing is drawn: both parameters are replaced below.
    module = Alignment(
        kernel.max_len,
        num_heads,
        heads="shared" if kernel.weight.dim() == 2 else "per_head",
        causal=kernel.causal,
        bias=kernel.bias is not None,
        compiled=compiled,
        device="meta",
    )
    module.weight = as_parameter(kernel.weight, kernel.trains)
    module.bias = None if kernel.bias is None else as_parameter(kernel.bias, kernel.trains)
    return module
