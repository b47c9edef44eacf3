"""Attention over a sequence that several processes hold together: equal to one process, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

import better_attention as ba
from better_attention import sequence_attention

from .tensor_parallel_cases import close, raises

B, N, H, W = 2, 4, 5, 3
FORWARD, BACKWARD = 1e-6, 1e-5


def lengths(kind: str) -> list[int]:
    world = dist.get_world_size()
    return {"equal": [6] * world, "unequal": [5 + 2 * r for r in range(world)], "one empty": [0, *[7] * (world - 1)]}[
        kind
    ]


def own(x: Tensor, sizes: Sequence[int], layout: str = "contiguous") -> Tensor:
    """This process's tokens of a whole (..., L, H)."""
    rank, world = dist.get_rank(), dist.get_world_size()
    if layout == "zigzag":
        parts = x.chunk(2 * world, dim=-2)
        return torch.cat([parts[rank], parts[2 * world - 1 - rank]], dim=-2)
    return x.split(list(sizes), dim=-2)[rank]


def own_mask(mask: Tensor | None, sizes: Sequence[int], layout: str) -> Tensor | None:
    if mask is None or mask.shape[-1] == 1:
        return mask
    return own(mask.transpose(-1, -2), sizes, layout).transpose(-1, -2)


def equal(
    *,
    kind: str = "equal",
    queries: str = "sharded",
    layout: str = "contiguous",
    L: int | None = None,
    mask: Tensor | None = None,
    groups: int = 1,
    shared: bool = False,
    dtype: torch.dtype = torch.float32,
    size: float = 1.0,
    tolerance: tuple[float, float] = (FORWARD, BACKWARD),
    **settings: Any,
) -> None:
    sizes = lengths(kind)
    S = sum(sizes)
    L = S if L is None else L
    width = H if shared else W
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    q, k = torch.randn(B, N, L, H, dtype=wide) * size, torch.randn(B, N // groups, S, H, dtype=wide)
    v, g = torch.randn(B, N // groups, S, width, dtype=wide), torch.randn(B, N, L, width, dtype=wide)
    q, k, v, g = (x.to(dtype) for x in (q, k, v, g))
    kwargs = {"score": "expressive", "enable_gqa": groups > 1, **settings}
    # One process.
    whole = [x.clone().requires_grad_() for x in (q, k, v)]
    theirs = ba.attention(whole[0], whole[1], whole[1] if shared else whole[2], attn_mask=mask, **kwargs)
    theirs.backward(g)
    # All of them.
    divided = queries == "sharded"
    mine = [(own(x, sizes, layout) if divided or i else x).clone().requires_grad_() for i, x in enumerate((q, k, v))]
    ours = sequence_attention(
        mine[0],
        mine[1],
        mine[1] if shared else mine[2],
        attn_mask=own_mask(mask, sizes, layout),
        queries=queries,
        layout=layout,
        **kwargs,
    )
    ours.backward(own(g, sizes, layout) if divided else g)
    assert ours.dtype == dtype
    close(ours.float(), (own(theirs, sizes, layout) if divided else theirs).float(), tolerance[0], "output")
    for i, name in enumerate("qk" if shared else "qkv"):
        grad = whole[i].grad
        expected = own(grad, sizes, layout) if divided or i else grad
        scale = max(1.0, grad.abs().max().item())
        close(mine[i].grad.float() / scale, expected.float() / scale, tolerance[1], f"gradient of {name}")


def total() -> int:
    return sum(lengths("equal"))


def padding(score: str) -> None:
    S = total()
    seen = torch.arange(S) < torch.tensor([S - 3, 2])[:, None]
    equal(score=score, mask=seen[:, None, None])
    equal(score=score, mask=seen[:, None, None], is_causal=True, layout="zigzag")


def masks(score: str) -> None:
    S = total()
    equal(score=score, mask=torch.rand(B, N, S, S) > 0.4)
    equal(score=score, mask=torch.rand(S, S) > 0.4, layout="zigzag")
    equal(score=score, mask=torch.randn(1, N, S, S) * 3)
    bias = torch.randn(N, S, S) * 30  # exponents of which none but the largest would survive without a shift
    equal(score=score, mask=bias, queries="replicated", tolerance=(1e-6, 2e-5))
    equal(score=score, mask=bias.masked_fill(torch.rand(N, S, S) > 0.5, -torch.inf), tolerance=(1e-6, 2e-5))


def hidden_rows() -> None:
    """A query from which every key is hidden in every process gives zeros, and finite gradients."""
    S = total()
    for score in ("expressive", "softmax"):
        mask = torch.rand(B, 1, S, S) > 0.5
        mask[:, :, 3:5] = False
        equal(score=score, mask=mask)
        q, k = (torch.randn(B, N, 6, H, requires_grad=True) for _ in range(2))
        out = sequence_attention(q, k, k, score=score, attn_mask=torch.zeros(1, 6, dtype=torch.bool))
        assert out.abs().max() == 0.0
        out.sum().backward()
        assert q.grad.abs().max() == 0.0
        assert k.grad.abs().max() == 0.0
    x = torch.randn(B, N, 6, H)
    assert sequence_attention(torch.zeros_like(x), x, x).abs().max() == 0.0  # orthogonal to every key


def small_scores() -> None:
    """Scores whose squares float32 cannot add up; one process computes such rows in double precision."""
    for size in (1e-6, 1e-10, 1e-14, 1e-16):
        equal(size=size, tolerance=(2e-6, 1e-4))
    S = total()
    equal(size=1e-14, mask=torch.randn(S, S), tolerance=(2e-6, 1e-4))
    x = torch.randn(B, N, 6, H)
    assert sequence_attention(x * 1e-22, x, x).abs().max() == 0.0  # documented: no weight


def same_bits() -> None:
    q, k, v = (torch.randn(B, N, 6, H) for _ in range(3))
    first, second = (sequence_attention(q, k, v, is_causal=True) for _ in range(2))
    assert torch.equal(first, second)


def collectives() -> None:
    """What travels: docs/scale.md counts with these numbers."""
    for score, queries, forward, backward in (
        ("expressive", "sharded", 2, 2),
        ("expressive", "replicated", 1, 1),
        ("softmax", "sharded", 3, 2),
        ("softmax", "replicated", 2, 1),
    ):
        q, k, v = (torch.randn(B, N, 6, H, requires_grad=True) for _ in range(3))
        with CommDebugMode() as there:
            out = sequence_attention(q, k, v, score=score, queries=queries, check=False)
        with CommDebugMode() as back:
            out.sum().backward()
        assert there.get_total_counts() == forward, (score, queries, there.get_comm_counts())
        assert back.get_total_counts() == backward, (score, queries, back.get_comm_counts())


def refusals() -> None:
    rank = dist.get_rank()
    x = torch.randn(B, N, 6, H)
    other = torch.randn(B, N, 6, H + 1) if rank == 0 else x
    raises("all processes must be given the same arguments", lambda: sequence_attention(other, other, other))
    flag = {"is_causal": rank == 0}
    raises("all processes must be given the same arguments", lambda: sequence_attention(x, x, x, **flag))
    wide = torch.randn(B, N, 6, H + 1) if rank == 1 else x
    message = "key with the query's last size" if rank == 1 else "process 1 of"
    raises(message, lambda: sequence_attention(x, wide, wide))
    raises("the queries of its keys' tokens", lambda: sequence_attention(x[:, :, :2], x, x))
    raises("two pieces of one length", lambda: sequence_attention(*[x[:, :, :3]] * 3, layout="zigzag"))
    raises("requires a gradient", lambda: sequence_attention(x, x, x, attn_mask=torch.zeros(1, 6, requires_grad=True)))
    raises("attn_mask must broadcast", lambda: sequence_attention(x, x, x, attn_mask=torch.ones(5, 6).bool()))
    raises("score must be one of", lambda: sequence_attention(x, x, x, score="relu"))
    raises("query heads a multiple", lambda: sequence_attention(x, x[:, :3], x[:, :3], enable_gqa=True))
    raises("group must be a torch.distributed.ProcessGroup", lambda: sequence_attention(x, x, x, group=3), TypeError)
    out = sequence_attention(x, x, x)
    assert out.shape == x.shape  # and everything still works


def once() -> None:
    x = torch.randn(B, N, 6, H, requires_grad=True)
    (grad,) = torch.autograd.grad(sequence_attention(x, x, x).square().sum(), x, create_graph=True)
    raises("once_differentiable", lambda: grad.sum().backward(), RuntimeError)


def both(**settings: Any) -> Callable[[], None]:
    def check() -> None:
        for score in ("expressive", "softmax"):
            equal(score=score, **settings)

    return check


CASES: dict[str, Callable[[], None]] = {
    "plain": both(),
    "causal": both(is_causal=True),
    "causal in zigzag": both(is_causal=True, layout="zigzag"),
    "a window": both(is_causal=True, window=4),
    "a window in zigzag": both(is_causal=True, window=4, layout="zigzag"),
    "shares of unequal length": both(kind="unequal", is_causal=True),
    "a process without tokens": both(kind="one empty"),
    "replicated queries": both(queries="replicated", L=3),
    "one query behind a cache": lambda: both(queries="replicated", L=1, is_causal=True, offset=total() - 1)(),
    "replicated queries over unequal shares": both(queries="replicated", kind="unequal", is_causal=True, window=3),
    "grouped heads": both(groups=2, is_causal=True),
    "one tensor as key and value": both(shared=True, groups=2),
    "a scale": both(scale=0.3),
    "padding, expressive": lambda: padding("expressive"),
    "padding, softmax": lambda: padding("softmax"),
    "masks, expressive": lambda: masks("expressive"),
    "masks, softmax": lambda: masks("softmax"),
    "hidden rows": hidden_rows,
    "float64": both(dtype=torch.float64, is_causal=True, tolerance=(1e-7, 1e-7)),
    "float64 with a bias": lambda: equal(dtype=torch.float64, mask=torch.randn(total(), total()).double()),
    "bfloat16": both(dtype=torch.bfloat16, tolerance=(2**-7, 2**-5)),
    "large scores": lambda: equal(size=1e4, tolerance=(2e-6, 1e-4)),
    "small scores": small_scores,
    "the same bits": same_bits,
    "collectives": collectives,
    "refusals": refusals,
    "once differentiable": once,
}
