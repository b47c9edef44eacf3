"""What several processes that share attention layers are asked: equality with one process, state dicts, refusals."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import better_attention as ba

B, L, D, N = 3, 7, 24, 4
LOSS, GRADIENT = 1e-6, 1e-5


def mesh() -> Any:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def close(ours: Tensor, theirs: Tensor, tolerance: float, what: str) -> None:
    assert ours.shape == theirs.shape, what
    if theirs.numel() == 0:
        return
    scale = max(1.0, theirs.abs().max().item())
    worst = (ours - theirs).abs().max().item() / scale
    assert worst <= tolerance, f"{what} differs by {worst:.2e}"


def raises(message: str, call: Callable[[], object], kind: type[Exception] = ValueError) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        call()


def equal(
    settings: dict[str, Any],
    run: Callable[..., Any],
    *,
    plan: dict[str, Any] | None = None,
    size: tuple[int, int] = (D, N),
) -> nn.Module:
    """Outputs, loss and all gradients of a divided layer are those of the same layer in one process."""
    torch.manual_seed(1)
    alone = ba.MultiheadAttention(*size, batch_first=True, **settings)
    with torch.no_grad():
        for p in alone.parameters():  # biases that start at zero would hide where they are added
            p.add_(torch.randn_like(p), alpha=0.3)
    shared = parallelize_module(copy.deepcopy(alone), mesh(), ba.parallel_plan(alone, **(plan or {})))
    x = torch.randn(B, L, size[0])
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [run(layer, y) for layer, y in zip((alone, shared), inputs, strict=True)]
    assert type(outputs[1]) is Tensor
    close(outputs[1], outputs[0], LOSS, "output")
    losses = [o.square().mean() for o in outputs]
    assert abs(losses[1].item() - losses[0].item()) <= LOSS * max(1.0, losses[0].item())
    for loss in losses:
        loss.backward()
    close(inputs[1].grad, inputs[0].grad, GRADIENT, "gradient of the input")
    names = [name for name, _ in alone.named_parameters()]
    assert names == [name for name, _ in shared.named_parameters()]
    for name, p in alone.named_parameters():
        close(whole(shared.get_parameter(name).grad), p.grad, GRADIENT, f"gradient of {name}")
    return shared


def self_attention(layer: nn.Module, x: Tensor, **options: Any) -> Tensor:
    return layer(x, x, x, need_weights=False, **options)[0]


def options(mechanism: str) -> dict[str, Any]:
    aligned = ba.Mechanism.of(mechanism).aligned
    return {"mechanism": mechanism, **({"max_len": L + 2} if aligned else {})}


PADDING = torch.arange(L) >= torch.tensor([L, L - 2, 1])[:, None]
PER_HEAD = torch.randn(B * N, L, L, generator=torch.Generator().manual_seed(5))
TRIANGLE = torch.ones(L, L).triu(1).bool()


def learned_bias(layer: nn.Module, x: Tensor) -> Tensor:
    bias = PER_HEAD.clone().requires_grad_()
    flat = torch.randn(L, L, generator=torch.Generator().manual_seed(6)).requires_grad_()
    out = self_attention(layer, x, attn_mask=bias) + self_attention(layer, x, attn_mask=flat)
    grads = torch.autograd.grad(out.square().mean(), [bias, flat], retain_graph=True)
    # Into the output, so that whoever compares outputs compares these gradients too.
    return out + sum(g.abs().mean() for g in grads)


def weights_too(layer: nn.Module, x: Tensor) -> Tensor:
    out, averaged = layer(x, x, x)
    _, apart = layer(x, x, x, average_attn_weights=False)
    assert apart.shape == (B, N, L, L)
    return out + averaged.square().sum() + (apart**3).sum()


def cross(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x[:, :4], x, x.flip(1), key_padding_mask=PADDING, need_weights=False)[0]


def with_cache(layer: nn.Module, x: Tensor) -> Tensor:
    layer.eval()
    with torch.no_grad():
        cache = ba.KVCache(layer, B, dtype=None)
        parts = [layer(y, y, y, cache=cache, need_weights=False)[0] for y in x.split([4, 1, 2], dim=1)]
    return torch.cat(parts, dim=1) + self_attention(layer, x, is_causal=True)


FEATURES: dict[str, tuple[dict[str, Any], Callable[..., Tensor]]] = {
    "padding": ({"mechanism": "super", "max_len": L}, lambda a, x: self_attention(a, x, key_padding_mask=PADDING)),
    "a mask per head": ({"mechanism": "optimised"}, lambda a, x: self_attention(a, x, attn_mask=PER_HEAD)),
    "a learned mask": ({"impl": "reference"}, learned_bias),
    "the triangle": ({"mechanism": "expressive"}, lambda a, x: self_attention(a, x, is_causal=True)),
    "a triangular W_A per head": (
        {"mechanism": "super", "max_len": L, "align_heads": "per_head", "align_causal": True},
        lambda a, x: self_attention(a, x, attn_mask=TRIANGLE),
    ),
    "W_A per head": ({"mechanism": "super", "max_len": L, "align_heads": "per_head"}, self_attention),
    "W_A over W_V": ({"mechanism": "standard+align", "max_len": L}, self_attention),
    "W_A of a window": ({"mechanism": "super", "window": 3}, self_attention),
    "W_A of a window per head": (
        {"mechanism": "super+expressive", "window": 3, "align_heads": "per_head"},
        self_attention,
    ),
    "a window": ({"mechanism": "efficient", "window": 3}, self_attention),
    "added keys": ({"add_bias_kv": True, "add_zero_attn": True}, lambda a, x: self_attention(a, x, is_causal=True)),
    "rotary": ({"mechanism": "efficient+expressive", "rotary": True}, self_attention),
    "alibi on the weight": ({"mechanism": "expressive", "alibi": "weight"}, self_attention),
    "alibi in the score": (
        {"mechanism": "efficient+expressive", "alibi": "score"},
        lambda a, x: self_attention(a, x, is_causal=True),
    ),
    "a learned scale": ({"scale": "learned", "mechanism": "expressive"}, self_attention),
    "a fixed scale": ({"scale": 0.7, "mechanism": "optimised"}, self_attention),
    "no biases": ({"bias": False, "mechanism": "super", "max_len": L}, self_attention),
    "weights": ({"mechanism": "efficient"}, weights_too),
    "other keys": ({"mechanism": "optimised"}, cross),
    "widths": ({"kdim": D, "vdim": D}, cross),
    "no W_O": ({"mechanism": ba.Mechanism(frozenset("qk"))}, self_attention),
    "nothing learned but W_A": ({"mechanism": ba.Mechanism(frozenset(), aligned=True), "max_len": L}, self_attention),
    "a cache": ({"mechanism": "efficient", "rotary": True}, with_cache),
    "a cache with alibi": ({"mechanism": "efficient+expressive", "alibi": "weight"}, with_cache),
    "a cache of super": ({"mechanism": "super", "max_len": L, "align_causal": True}, with_cache),
}

MECHANISMS = [f"{m}{s}" for m in ("standard", "optimised", "efficient", "super") for s in ("", "+expressive")]


class Block(nn.Module):
    def __init__(self, mechanism: str) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.attention = ba.MultiheadAttention(D, N, batch_first=True, **options(mechanism))
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm_1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm_2(x))


def train(model: nn.Module, batches: list[Tensor], average: int = 1) -> list[float]:
    """Losses of a few updates; ``average``: processes over which each loss is to be averaged."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for x in batches:
        loss = (model(x) - x.flip(1)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        value = loss.detach().clone()
        if average > 1:
            dist.all_reduce(value)
        losses.append(value.item() / average)
    return losses


def blocks() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(3)
    alone = nn.Sequential(*(Block(m) for m in ("efficient+expressive", "super", "standard")))
    return alone, copy.deepcopy(alone)


def block_plan(model: nn.Module) -> dict[str, Any]:
    mlps = {f"{i}.mlp.{j}": s for i in range(len(model)) for j, s in ((0, ColwiseParallel()), (2, RowwiseParallel()))}
    return {**ba.parallel_plan(model), **mlps}


def in_blocks() -> None:
    """Three blocks, attention and MLP divided, trained for three updates."""
    alone, shared = blocks()
    shared = parallelize_module(shared, mesh(), block_plan(shared))
    batches = list(torch.randn(3, B, L, D))
    for ours, theirs in zip(train(shared, batches), train(alone, batches), strict=True):
        assert abs(ours - theirs) < 2e-6, (ours, theirs)


def with_fully_shard() -> None:
    """Two processes for the batch, and the others for heads."""
    from torch.distributed.fsdp import fully_shard

    world = dist.get_world_size()
    ways = world // 2
    both = init_device_mesh("cpu", (2, ways), mesh_dim_names=("data", "heads"))
    alone, shared = blocks()
    shared = parallelize_module(shared, both["heads"], block_plan(shared))
    for block in shared:
        fully_shard(block, mesh=both["data"])
    fully_shard(shared, mesh=both["data"])
    batches = list(torch.randn(3, 2 * B, L, D))
    mine = dist.get_rank() // ways
    losses = train(shared, [x[mine * B : (mine + 1) * B] for x in batches], average=world)
    for ours, theirs in zip(losses, train(alone, batches), strict=True):
        assert abs(ours - theirs) < 2e-6, (ours, theirs)


def sequence_layouts() -> None:
    """Input and output divided over the length, as norms between layers may keep them."""
    world, length = dist.get_world_size(), 8
    torch.manual_seed(1)
    alone = ba.MultiheadAttention(D, N, batch_first=True, mechanism="efficient+expressive")
    plan = ba.parallel_plan(alone, input_layouts=Shard(1), output_layouts=Shard(1))
    shared = parallelize_module(copy.deepcopy(alone), mesh(), plan)
    x = torch.randn(B, length, D, requires_grad=True)
    part = x.detach().chunk(world, dim=1)[dist.get_rank()].clone().requires_grad_()
    y, z = self_attention(alone, x), self_attention(shared, part)
    close(z, y.chunk(world, dim=1)[dist.get_rank()], LOSS, "output")
    y.square().sum().backward()
    z.square().sum().backward()
    close(part.grad, x.grad.chunk(world, dim=1)[dist.get_rank()], GRADIENT, "gradient")
    for name, p in alone.named_parameters():
        close(whole(shared.get_parameter(name).grad), p.grad, GRADIENT, name)


def dtensor_inputs() -> None:
    """A DTensor says itself how it is divided."""
    torch.manual_seed(1)
    alone = ba.MultiheadAttention(D, N, batch_first=True, mechanism="super", max_len=8)
    m = mesh()
    shared = parallelize_module(copy.deepcopy(alone), m, ba.parallel_plan(alone))
    x = torch.randn(B, 8, D)
    y = self_attention(shared, distribute_tensor(x, m, [Shard(1)]))
    close(y, self_attention(alone, x), LOSS, "output")


def state_dicts() -> None:
    """Whole weights load into a divided layer, its own into an ordinary one."""
    settings = {"mechanism": "super", "max_len": L, "align_heads": "per_head", "scale": "learned"}
    first, second, third = (ba.MultiheadAttention(D, N, batch_first=True, **settings) for _ in range(3))
    shared = parallelize_module(second, mesh(), ba.parallel_plan(second))
    x = torch.randn(B, L, D)
    y = self_attention(first, x)
    assert list(shared.state_dict()) == list(first.state_dict())
    shared.load_state_dict(first.state_dict())
    assert isinstance(shared.q_proj.weight, DTensor)
    close(self_attention(shared, x), y, LOSS, "after loading whole weights")
    third.load_state_dict(shared.state_dict())
    assert type(third.q_proj.weight) is nn.Parameter
    for name, p in first.state_dict().items():
        assert torch.equal(third.state_dict()[name], p), name
        assert torch.equal(whole(shared.state_dict()[name]), p), name
    packed = ba.MultiheadAttention(D, N, batch_first=True)
    torchs = nn.MultiheadAttention(D, N, batch_first=True)
    packed = parallelize_module(packed, mesh(), ba.parallel_plan(packed))
    packed.load_state_dict(torchs.state_dict())
    close(self_attention(packed, x), torchs(x, x, x)[0], LOSS, "torch's packed weights")


def dropout() -> None:
    """Heads of different processes drop differently, and the processes' generators stay in step."""
    world = dist.get_world_size()
    layer = ba.MultiheadAttention(D, N, dropout=0.5, batch_first=True, mechanism=ba.Mechanism(frozenset()))
    shared = parallelize_module(layer, mesh(), ba.parallel_plan(layer))
    # All heads see the same numbers: what differs in their outputs was dropped.
    x = torch.randn(B, L, D // N).repeat(1, 1, N)
    torch.manual_seed(7)
    heads = self_attention(shared, x).unflatten(-1, (N, D // N))
    per = N // world
    for a in range(0, N, per):
        for b in range(a + per, N, per):
            assert not torch.allclose(heads[:, :, a], heads[:, :, b])
    state = torch.get_rng_state()
    states = [torch.empty_like(state) for _ in range(world)]
    dist.all_gather(states, state)
    assert all(torch.equal(s, state) for s in states)
    torch.manual_seed(7)
    assert torch.equal(heads, self_attention(shared, x).unflatten(-1, (N, D // N)))


def one_sum() -> None:
    """One sum over processes forward, one backward, whatever the mechanism."""
    from torch.distributed.tensor.debug import CommDebugMode

    for mechanism in ("standard", "efficient"):
        layer = ba.MultiheadAttention(D, N, batch_first=True, mechanism=mechanism)
        shared = parallelize_module(layer, mesh(), ba.parallel_plan(layer, check=False))
        x = torch.randn(B, L, D, requires_grad=True)
        with CommDebugMode() as forward:
            y = self_attention(shared, x)
        with CommDebugMode() as backward, warnings.catch_warnings():
            # The counter's own hooks on modules: a projection of a constant has no gradient to hand on.
            warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
            y.square().sum().backward()
        assert forward.get_total_counts() == 1, forward.get_comm_counts()
        assert backward.get_total_counts() == 1, backward.get_comm_counts()


def refusals() -> None:
    world, rank = dist.get_world_size(), dist.get_rank()

    def plan(heads: int, **settings: Any) -> nn.Module:
        layer = ba.MultiheadAttention(heads * 6, heads, batch_first=True, **settings)
        return parallelize_module(layer, mesh(), ba.parallel_plan(layer))

    raises("heads cannot be divided among", lambda: plan(world + 1))
    raises("More processes than heads", lambda: plan(1))
    raises("all processes must be given the same layer", lambda: plan(world, bias=rank == 0))
    layer = ba.MultiheadAttention(D, N)
    two = init_device_mesh("cpu", (world, 1), mesh_dim_names=("a", "b"))
    raises('Pass one dimension of it, as mesh["tp"]', lambda: parallelize_module(layer, two, ba.parallel_plan(layer)))
    meta = ba.MultiheadAttention(D, N, device="meta")
    parallelize_module(meta, mesh(), ba.parallel_plan(meta))  # weights may come later
    shared = plan(N)
    raises("divided among processes already", lambda: parallelize_module(shared, mesh(), ba.parallel_plan(shared)))
    x = torch.randn(B + rank, L, N * 6)
    raises("all processes must be given the same inputs", lambda: self_attention(shared, x))
    x = torch.randn(B, L, N * 6)
    nested = torch.nested.as_nested_tensor([x[0], x[1][:2]], layout=torch.jagged)
    raises("nested", lambda: self_attention(shared, nested if rank == 0 else x), TypeError if rank == 0 else ValueError)
    raises("attn_mask must be (L, S)", lambda: self_attention(shared, x, attn_mask=torch.zeros(L, L + 1).bool()))
    close(self_attention(shared, x), self_attention(shared, x), 0.0, "the layer still works")


def case(name: str) -> Callable[[], None]:
    settings, run_layer = FEATURES[name]

    def check() -> None:
        if name.startswith("a cache"):  # in inference, where nothing has a gradient
            layer = ba.MultiheadAttention(D, N, batch_first=True, **settings)
            shared = parallelize_module(copy.deepcopy(layer), mesh(), ba.parallel_plan(layer))
            x = torch.randn(B, L, D)
            with torch.no_grad():
                close(run_layer(shared, x), run_layer(layer, x), LOSS, "output")
            return
        equal(settings, run_layer)

    return check


CASES: dict[str, Callable[[], None]] = {
    **{f"mechanism {m}": (lambda m=m: (equal(options(m), self_attention), None)[1]) for m in MECHANISMS},
    **{name: case(name) for name in FEATURES},
    "in transformer blocks": in_blocks,
    "with fully_shard": with_fully_shard,
    "layouts over the length": sequence_layouts,
    "DTensor inputs": dtensor_inputs,
    "state dicts": state_dicts,
    "dropout": dropout,
    "one sum each way": one_sum,
    "refusals": refusals,
}
