r"""Exact folding of one mechanism into another, and its projection where it cannot be exact: mathematics on weights.

Row vectors x (query input) and y (key and value input), head i:

* The scores are :math:`(x W_Q^i + b_Q^i)(y W_K^i + b_K^i)^\top`. The part with :math:`b_K` is the same for every key
  and cancels in softmax. Without W_K the key is the slice :math:`y S_i`. For one head :math:`S` is the identity, so
  :math:`W_Q \leftarrow W_Q W_K^\top` and :math:`b_Q \leftarrow b_Q W_K^\top` give the same weights.
* The output is :math:`\sum_i A_i (y W_V^i + b_V^i) W_O^i + b_O`, rows of :math:`A_i` sum to one. For one head
  :math:`W_O \leftarrow W_V W_O` and :math:`b_O \leftarrow b_V W_O + b_O` give the same output, except for a query from
  which every key is hidden: its weights are zero, so that it gives :math:`b_O` before and :math:`b_V W_O + b_O` after.
* For several heads a slice has width d/h and the product has rank up to d/h in all d columns. The least squares
  solution for inputs of identity covariance keeps the columns of the slice:
  :math:`W_Q^i \leftarrow W_Q^i (S_i^\top W_K^i)^\top`. It is the exact fold for h = 1, so that one formula serves both.

Everything is computed in float64 and rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from better_attention.adapters.source import MAPS, Kernel, LinearMap, Source
from better_attention.mechanism import Mechanism

from .report import TensorChange

SOLVE = torch.float64


@dataclass(slots=True)
class Folded:
    """A layer with another mechanism.

    Args:
        source: what the new layer computes.
        changes: what became of each tensor.
        inexact: why the new layer does not compute the same function; empty for exact.
    """

    source: Source
    changes: list[TensorChange] = field(default_factory=list)
    inexact: list[str] = field(default_factory=list)

    def note(self, tensor: str, status: str, why: str) -> None:
        """Write down what became of a tensor; the last word counts."""
        self.changes = [c for c in self.changes if c.tensor != tensor]
        self.changes.append(TensorChange(tensor, status, why))

    @property
    def exact(self) -> bool:
        """Whether the new layer computes the same function, to rounding."""
        return not self.inexact


def impossible(source: Source, target: Mechanism, max_len: int | None, align_causal: bool | None = None) -> list[str]:
    """Why ``source`` cannot take the form of ``target`` at all, approximately either."""
    reasons = []
    gone = {"q": "W_Q", "o": "W_O"}
    reasons += [
        f"{target.name!r} has no {name}, into which the other maps are folded"
        for letter, name in gone.items()
        if letter not in target.projections
    ]
    # A slice is cut from the input itself, which therefore has to be as wide as all heads together.
    joined = source.num_heads * source.head_dim
    for letter, word in (("k", "key"), ("v", "value")):
        found: LinearMap | None = getattr(source, letter)
        if letter in target.projections or found is None:
            continue
        if found.weight.shape[1] != joined:
            reasons.append(
                f"without W_{letter.upper()} the heads read slices of the {word} input, which is "
                f"{found.weight.shape[1]} wide, but {source.num_heads} heads of {source.head_dim} need {joined}"
            )
    if target.aligned and source.causal and align_causal is False:
        reasons.append("it is causal, and a full W_A would let it see later tokens: leave align_causal out")
    if target.aligned and source.align is None and max_len is None:
        reasons.append("W_A needs a size: pass max_len=..., the longest value sequence")
    if target.aligned and source.align is not None and max_len not in (None, source.align.max_len):
        reasons.append(f"its W_A has max_len={source.align.max_len}, not {max_len}")
    return reasons


def fold(source: Source, target: Mechanism, *, max_len: int | None = None, align_causal: bool = False) -> Folded:
    """``source`` as a layer with the mechanism ``target``: exact where that is possible, else its projection.

    Args:
        source: a layer for which :func:`impossible` names nothing.
        target: the mechanism to reach.
        max_len: size of a new W_A.
        align_causal: whether a new W_A stays triangular.
    """
    result = Folded(replace(source, mechanism=target))
    _scores(result, source, target)
    _values(result, source, target)
    _one_number_of_heads(result)
    _alignment(result, source, target, max_len, align_causal)
    # From the source and not from the result, so that _refuse() can ask the same before anything is computed.
    result.inexact = obstacles(source, target)
    return result


def obstacles(source: Source, target: Mechanism) -> list[str]:
    """Why ``source`` as a layer with the mechanism ``target`` does not compute the same function; empty for exact."""
    reasons = score_obstacles(source, target) + value_obstacles(source, target)
    if source.align is not None and not target.aligned and not _is_identity(source.align):
        reasons.append("W_A is not the identity, so that it cannot be left out exactly")
    if source.mechanism.score != target.score:
        reasons.append(f"the score {target.score!r} is another function than {source.mechanism.score!r}")
    return reasons


def _absorb(result: Folded, dropped: str, into: str, reasons: list[str]) -> None:
    """Write down that the map ``dropped`` went into the map ``into``: exactly, if there are no reasons against it."""
    word = {"k_proj": "W_K", "v_proj": "W_V"}[dropped]
    if reasons:
        result.note(into, "approximated", f"{word} projected onto the slice of each head")
        result.note(dropped, "dropped", f"projected into {into}")
    else:
        result.note(into, "exact", f"{word} folded in")
        result.note(dropped, "dropped", f"folded into {into}")


def _scores(result: Folded, source: Source, target: Mechanism) -> None:
    """W_Q, and W_K: kept, an identity, or folded into W_Q."""
    _kept_or_identity(result, source, "q")
    if "k" in target.projections:
        _kept_or_identity(result, source, "k")
    elif source.k is not None and result.source.q is not None:
        result.source = result.source.with_maps(k=None, q=_query_with(source, result.source.q, source.k))
        _absorb(result, "k_proj", "q_proj", score_obstacles(source, target))


def score_obstacles(source: Source, target: Mechanism) -> list[str]:
    """Why the weights of ``target`` cannot equal those of ``source``."""
    if source.k is None or "k" in target.projections:
        return []
    reasons = _slice_obstacles(source, "W_K", "W_Q")
    # The rotation by the distance of query and key stands between the two maps and need not commute with them.
    if source.rotary:
        reasons.append("rotary positions stand between W_Q and W_K")
    bias = source.k.bias
    # In softmax a term that is the same for all keys cancels; a score of another form depends on it.
    if target.score != "softmax" and bias is not None and bool(bias.any()):
        reasons.append(f"the bias of W_K does not cancel in the score {target.score!r}")
    return reasons


def _values(result: Folded, source: Source, target: Mechanism) -> None:
    """W_O, and W_V: kept, an identity, or folded into W_O."""
    _kept_or_identity(result, source, "o")
    if "v" in target.projections:
        _kept_or_identity(result, source, "v")
    elif source.v is not None and result.source.o is not None:
        result.source = result.source.with_maps(v=None, o=_output_with(source, result.source.o, source.v))
        _absorb(result, "v_proj", "out_proj", value_obstacles(source, target))


def value_obstacles(source: Source, target: Mechanism) -> list[str]:
    """Why the values of ``target`` cannot lead to the same output."""
    if source.v is None or "v" in target.projections:
        return []
    reasons = _slice_obstacles(source, "W_V", "W_O")
    bias = source.v.bias
    # b_V passes through the weights unchanged, because their rows sum to one; those of W_A do not.
    if source.align is not None and bias is not None and bool(bias.any()):
        reasons.append("W_A mixes the bias of W_V, and its rows do not sum to one")
    return reasons


def _slice_obstacles(source: Source, dropped: str, into: str) -> list[str]:
    """Why heads that read slices of the input cannot do without the map ``dropped``, whatever it holds."""
    reasons = [f"{dropped} cannot be dropped exactly: {why}" for why in source.obstacles]
    if source.num_heads > 1:
        reasons.append(
            f"{dropped} cannot be folded into {into} with {source.num_heads} heads: each sees {source.head_dim} of "
            f"{source.width} columns of the input"
        )
    return reasons


def _kept_or_identity(result: Folded, source: Source, letter: str) -> None:
    name = MAPS[letter]
    if getattr(source, letter) is not None:
        result.note(name, "exact", "taken over unchanged")
        return
    like, width = source.sample, source.num_heads * source.head_dim
    trains = any(m.trains for _, m in source.maps())
    bias = None if all(m.bias is None for _, m in source.maps()) else like.new_zeros(width)
    identity = LinearMap(torch.eye(width, dtype=like.dtype, device=like.device), bias, trains)
    result.source = result.source.with_maps(**{letter: identity})
    result.note(name, "new", "the identity, which the slices were")


def _one_number_of_heads(result: Folded) -> None:
    """Repeat grouped heads where a layer cannot group them: beside an identity, of all heads, and without keys."""
    source = result.source
    if source.k is not None and (source.v is None or len(source.k.weight) == len(source.v.weight)):
        return
    repeated = {}
    for letter in "kv":
        found: LinearMap | None = getattr(source, letter)
        times = 1 if found is None else source.num_heads * source.head_dim // len(found.weight)
        if found is not None and times > 1:
            repeated[letter] = found.with_repeated_heads(source.head_dim, times)
            result.note(MAPS[letter], "exact", "its heads repeated, one for each query head")
    result.source = replace(source, kv_heads=source.num_heads).with_maps(**repeated)


def _alignment(result: Folded, source: Source, target: Mechanism, max_len: int | None, causal: bool) -> None:
    if target.aligned and source.align is not None:
        kernel = source.align.for_heads(result.source.value_width // source.head_dim)
        result.source = result.source.with_maps(align=kernel)
        same = kernel is source.align
        result.note("align", "exact", "taken over unchanged" if same else "repeated, one for each head of the values")
    elif target.aligned and max_len is not None:
        like = source.sample
        bias = None if all(m.bias is None for _, m in source.maps()) else like.new_zeros(max_len)
        eye = torch.eye(max_len, dtype=like.dtype, device=like.device)
        trains = any(m.trains for _, m in source.maps())
        result.source = result.source.with_maps(align=Kernel(eye, bias, causal, trains))
        result.note("align", "new", "the identity")
    elif source.align is not None:
        result.source = result.source.with_maps(align=None)
        result.note("align", "dropped", "values are no longer mixed over positions")


def _is_identity(kernel: Kernel) -> bool:
    l = kernel.max_len  # noqa: E741 - the paper's name for the length
    eye = torch.eye(l, dtype=kernel.weight.dtype, device=kernel.weight.device)
    # What lies above the diagonal of a causal kernel is never used.
    acting = kernel.weight.tril() if kernel.causal else kernel.weight
    return bool((acting == eye).all()) and (kernel.bias is None or not bool(kernel.bias.any()))


# --- the two products, in torch's orientation: weight (outputs, inputs) ---------------------------------------------


def own_blocks(weight: Tensor, num_heads: int) -> Tensor:
    """Of each head's rows of W_K or W_V (outputs, D), the columns of its slice of the input: (heads, H, H) in float64.

    Heads may be grouped: ``weight`` then has fewer blocks of rows than there are heads.
    """
    H = weight.shape[1] // num_heads
    groups = weight.shape[0] // H
    per_group = num_heads // groups
    rows_NHD = weight.detach().to(SOLVE).view(groups, H, -1).repeat_interleave(per_group, dim=0)
    # Head i reads columns i H to (i + 1) H of the input, which are all that a slice leaves of W_K.
    return torch.stack([rows_NHD[i, :, i * H : (i + 1) * H] for i in range(num_heads)])


def _query_with(source: Source, q: LinearMap, k: LinearMap) -> LinearMap:
    """W_Q times the transposed blocks of W_K: for one head the exact fold."""
    return query_times(source, q, key_blocks(source, k), q.trains or k.trains)


def key_blocks(source: Source, k: LinearMap) -> Tensor:
    """What maps a slice to its part of the key, (heads, H, H).

    Rotary positions stand between W_Q and W_K: averaged over all distances, only the part that commutes with turning
    acts, one complex number for each pair of features.
    """
    blocks_NHH = own_blocks(k.weight, source.num_heads)
    if not source.rotary:
        return blocks_NHH
    # rotate() pairs feature p with p + H/2, so that the halves are real and imaginary parts.
    first, second = blocks_NHH.chunk(2, dim=1)
    (a, b), (c, d) = first.chunk(2, dim=2), second.chunk(2, dim=2)
    # A 2 x 2 block commutes with rotations only where it is a complex number: this is its nearest one.
    real, imaginary = ((x.diagonal(dim1=1, dim2=2) / 2).diag_embed() for x in (a + d, c - b))
    return torch.cat([torch.cat([real, -imaginary], dim=2), torch.cat([imaginary, real], dim=2)], dim=1)


def query_times(source: Source, q: LinearMap, blocks_NHH: Tensor, trains: bool) -> LinearMap:
    """Head i's query q becomes ``q @ blocks[i]``."""
    N, H = source.num_heads, source.head_dim
    weight = torch.einsum("nij,nid->njd", blocks_NHH, q.weight.detach().to(SOLVE).view(N, H, -1))
    bias = None
    if q.bias is not None:
        bias = torch.einsum("nij,ni->nj", blocks_NHH, q.bias.detach().to(SOLVE).view(N, H)).reshape(-1)
    return _rounded(weight.reshape(N * H, -1), bias, q.weight, trains)


def _output_with(source: Source, o: LinearMap, v: LinearMap) -> LinearMap:
    """W_O times the blocks of W_V, and the bias of W_V behind W_O, which is exact for any number of heads."""
    N, H = source.num_heads, source.head_dim
    wide = o.weight.detach().to(SOLVE)
    heads_NDH = wide.view(-1, N, H).transpose(0, 1)
    weight = (heads_NDH @ own_blocks(v.weight, N)).transpose(0, 1).reshape(-1, N * H)
    bias = None if o.bias is None else o.bias.detach().to(SOLVE)
    if v.bias is not None:
        per_group = N * H // v.bias.numel()
        spread = v.bias.detach().to(SOLVE).view(-1, H).repeat_interleave(per_group, dim=0).reshape(-1)
        # Rows of the weights sum to one, so that every query gets b_V in full.
        moved = wide @ spread
        bias = moved if bias is None else bias + moved
    return _rounded(weight, bias, o.weight, o.trains or v.trains)


def _rounded(weight: Tensor, bias: Tensor | None, like: Tensor, trains: bool) -> LinearMap:
    dtype = like.dtype
    return LinearMap(weight.to(dtype), None if bias is None else bias.to(dtype), trains)
