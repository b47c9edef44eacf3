"""Attention on DTensors: divided over samples or heads it is computed where it lies, anything else is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import better_attention as ba

from .tensor_parallel_cases import close, mesh, raises

B, N, L, S, H = 4, 8, 5, 7, 3


def qkv(lead: Sequence[int] = (B, N), groups: int = 1) -> list[Tensor]:
    lead_k = (*lead[:-1], lead[-1] // groups)
    return [torch.randn(*a, n, H) for a, n in ((lead, L), (lead_k, S), (lead_k, S))]


def agree(placements: Sequence[Any], inputs: list[Tensor], m: Any = None, mask: Any = None, **settings: Any) -> None:
    """The divided call is the whole one, forward and backward, and sends nothing."""
    m = mesh() if m is None else m
    plain = [x.clone().requires_grad_() for x in inputs]
    divided = [distribute_tensor(x, m, _fitting(placements, x)).requires_grad_() for x in inputs]
    kwargs = {"score": "expressive", **settings}
    whole_mask = mask.full_tensor() if isinstance(mask, DTensor) else mask
    with CommDebugMode() as sent:
        ours = ba.attention(*divided, attn_mask=mask, **kwargs)
    assert sent.get_total_counts() == 0, sent.get_comm_counts()
    theirs = ba.attention(*plain, attn_mask=whole_mask, **kwargs)
    assert isinstance(ours, DTensor)
    assert ours.shape == theirs.shape
    close(ours.full_tensor(), theirs, 1e-6, "output")
    ours.full_tensor().square().sum().backward()
    theirs.square().sum().backward()
    for x, y in zip(divided, plain, strict=True):
        close(x.grad.full_tensor(), y.grad, 1e-5, "gradient")


def _fitting(placements: Sequence[Any], x: Tensor) -> list[Any]:
    """The placements, with copies where a dimension has size 1; dimensions from the end."""
    return [
        Replicate() if p.is_replicate() or x.dim() < -p.dim or x.shape[p.dim] == 1 else Shard(x.dim() + p.dim)
        for p in placements
    ]


class From:
    """``Shard`` with a dimension that stays counted from the end."""

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def is_replicate(self) -> bool:
        return False


BATCH, HEADS = From(-4), From(-3)


def over_samples_and_heads() -> None:
    world = dist.get_world_size()
    for score in ("softmax", "expressive"):
        agree([BATCH], qkv(), score=score)
        agree([HEADS], qkv(), score=score, is_causal=True, offset=2, window=3)
        agree([Replicate()], qkv(), score=score)
    agree([HEADS], qkv((3, N), groups=2), enable_gqa=True)
    agree([HEADS], qkv((3, N), groups=N), enable_gqa=True)  # one head of keys for all: copies
    agree([BATCH], qkv((3, 2)))  # 3 samples do not fall evenly
    agree([HEADS], [torch.randn(N, L, H), torch.randn(2, 1, S, H), torch.randn(2, N, S, H)])  # broadcasting
    agree([From(-5)], qkv((world, 2, 3)))
    if world == 4:
        both = init_device_mesh("cpu", (2, 2))
        agree([BATCH, HEADS], qkv(), both)
        agree([HEADS, HEADS], qkv(), both)
        agree([BATCH, Replicate()], qkv(), both)


def masks() -> None:
    m = mesh()
    whole = torch.rand(B, N, L, S) > 0.3
    for mask in (whole, whole[:, :1], whole[:1], whole[0, 0], torch.randn(B, 1, 1, S), torch.randn(N, L, S)):
        for placement in (BATCH, HEADS):
            agree([placement], qkv(), mask=mask)
    agree([BATCH], qkv(), mask=distribute_tensor(whole, m, [Shard(0)]))
    agree([HEADS], qkv(), mask=distribute_tensor(whole, m, [Shard(1)]))
    agree([HEADS], qkv(), mask=distribute_tensor(whole, m, [Replicate()]))
    inputs, bias = qkv(), torch.randn(L, S)
    ours = distribute_tensor(bias, m, [Replicate()]).requires_grad_()
    theirs = bias.clone().requires_grad_()
    divided = [distribute_tensor(x, m, [Shard(1)]) for x in inputs]
    ba.attention(*divided, attn_mask=ours, score="expressive").full_tensor().square().sum().backward()
    ba.attention(*inputs, attn_mask=theirs, score="expressive").square().sum().backward()
    close(ours.grad.full_tensor(), theirs.grad, 1e-5, "gradient of the mask")


def weights_and_shared() -> None:
    q, k, _ = (distribute_tensor(x, mesh(), [Shard(1)]) for x in qkv())
    out, weights = ba.attention(q, k, k, need_weights=True)
    assert weights.shape == (B, N, L, S)
    theirs = ba.attention(q.full_tensor(), k.full_tensor(), k.full_tensor(), need_weights=True)
    close(out.full_tensor(), theirs[0], 1e-6, "output")
    close(weights.full_tensor(), theirs[1], 1e-6, "weights")


def dropout() -> None:
    ones = [torch.ones(1, *x.shape[1:]).expand_as(x) for x in qkv()]
    m = mesh()
    divided = [distribute_tensor(x.contiguous(), m, [Shard(0)]) for x in ones]
    torch.manual_seed(3)
    out = ba.attention(*divided, dropout_p=0.5)
    parts = out.full_tensor().chunk(dist.get_world_size())
    assert not torch.allclose(parts[0], parts[1])
    torch.manual_seed(3)
    assert torch.equal(out.full_tensor(), ba.attention(*divided, dropout_p=0.5).full_tensor())
    copies = [distribute_tensor(x.contiguous(), m, [Replicate()]) for x in ones]
    out = ba.attention(*copies, dropout_p=0.5).to_local()
    others = [torch.empty_like(out) for _ in range(dist.get_world_size())]
    dist.all_gather(others, out.contiguous())
    assert all(torch.equal(out, other) for other in others)


def refusals() -> None:
    m, inputs = mesh(), qkv()

    def call(placement: Any, names: str = "qkv", **settings: Any) -> Callable[[], object]:
        divided = [
            distribute_tensor(x, m, [placement if n in names else Replicate()])
            for n, x in zip("qkv", inputs, strict=True)
        ]
        return lambda: ba.attention(*divided, **settings)

    raises("divided over its length", call(Shard(2)))
    raises("sequence_attention", call(Shard(2)))
    raises("divided over its width", call(Shard(3)))
    raises("same samples or heads", call(Shard(1), "q"))
    raises("same samples or heads", call(Shard(1), "kv"))
    partial = [DTensor.from_local(x, m, [Partial()]) for x in inputs]
    raises("only whole samples and heads", lambda: ba.attention(*partial))
    q, k, v = (distribute_tensor(x, m, [Shard(1)]) for x in inputs)
    raises("key and value must be divided as well", lambda: ba.attention(q, *inputs[1:]))
    raises("mask of the whole call", lambda: ba.attention(q, k, v, attn_mask=torch.ones(B, N - 1, L, S).bool()))
    by_key = distribute_tensor(torch.ones(L, S).bool(), m, [Shard(1)])
    raises("divided over its keys", lambda: ba.attention(q, k, v, attn_mask=by_key))
    world = dist.get_world_size()
    grouped = [distribute_tensor(x, m, [Shard(1)]) for x in qkv((2, 2 * (world + 1)), groups=2)]
    raises("whole groups", lambda: ba.attention(*grouped, enable_gqa=True))
    sizes = [distribute_tensor(x, m, [Shard(1)]) for x in (inputs[0], inputs[1], inputs[2][:, :, :3])]
    raises("value with the key's length", lambda: ba.attention(*sizes))


def explanations() -> None:
    m, inputs = mesh(), qkv((B, N))
    q, k, v = (distribute_tensor(x, m, [Shard(1)]) for x in inputs)
    said = ba.explain(q, k, v, score="expressive")
    local = ba.explain(*(x.to_local() for x in (q, k, v)), score="expressive")
    assert said.chosen == local.chosen, said
    assert "divided over heads" in said.inputs
    by_length = [distribute_tensor(x, m, [Shard(2)]) for x in inputs]
    said = ba.explain(*by_length)
    assert said.chosen is None
    assert all("divided over its length" in " ".join(why) for why in said.reasons.values())


CASES: dict[str, Callable[[], None]] = {
    "over samples and heads": over_samples_and_heads,
    "masks": masks,
    "weights, and one tensor as key and value": weights_and_shared,
    "dropout": dropout,
    "refusals": refusals,
    "explanations": explanations,
}
