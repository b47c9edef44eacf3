"""Models, machines, and what a training step or a decoding step takes: operations over rates, bytes over bandwidths.

Parameters, operations and bytes of attention come from :func:`better_attention.cost`; what stands around it is counted
here. An assumption is a field of :class:`Machine` and a row of the first table of the page.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import ceil, log2

import torch

from better_attention import Mechanism, cost

MECHANISMS = ("standard", "optimised", "efficient", "super", "expressive", "efficient+expressive")
NOTHING = Mechanism(frozenset())
"""Scores and mixing alone, without any learned map."""
W_A = Mechanism(frozenset(), aligned=True)
BF16 = torch.bfloat16


@dataclass(frozen=True, slots=True)
class Machine:
    """One GPU of a cluster, and its connections, with the share of each peak that is assumed to be reached.

    Args:
        product: peak of dense bf16 products, operations a second.
        memory_rate: bytes a second.
        memory: bytes.
        inside, between: bytes a second and direction of one GPU, inside a server and between servers.
        hop_inside, hop_between: seconds that a message takes whatever its size.
        gpus: of one server.
        of_product: share of ``product`` in linear maps, element-wise work around them included.
        of_attention: share of ``product`` in attention kernels, forward and backward.
        of_rates: share of memory and network rates.
    """

    product: float = 989e12
    memory_rate: float = 3.35e12
    memory: float = 80e9
    inside: float = 450e9
    between: float = 50e9
    hop_inside: float = 5e-6
    hop_between: float = 15e-6
    gpus: int = 8
    of_product: float = 0.55
    of_attention: float = 0.50
    of_rates: float = 0.80


@dataclass(frozen=True, slots=True)
class Model:
    """A transformer.

    Args:
        name: in tables.
        layers, width, heads, length: L, d, h, ℓ.
        hidden: width of the MLP.
        around: parameters outside the blocks, and how many of them are products of each token's (the others are
            looked up).
        head: operations outside the blocks, forward, for one sequence.
        causal: whether a query sees earlier tokens alone: half of the scores, and half of W_A, are computed.
        batch: sequences in one update, on all GPUs.
        micro: most sequences that one GPU holds at a time.
        updates: of the whole training.
    """

    name: str
    layers: int
    width: int
    heads: int
    length: int
    hidden: int
    around: int
    head: float
    causal: bool
    batch: int
    micro: int
    updates: int


def _vit() -> Model:
    d, tokens, classes = 768, 197, 1000
    around = (16 * 16 * 3 + 1) * d + (tokens + 1) * d + 2 * d + (d + 1) * classes
    head = 2.0 * (196 * 16 * 16 * 3 * d + d * classes)
    images, epochs, batch = 1_281_167, 300, 4096
    return Model("ViT-B/16", 12, d, 12, tokens, 4 * d, around, head, False, batch, 256, images * epochs // batch)


def _decoder() -> Model:
    d, length, words, batch = 2048, 4096, 32_000, 512
    tokens = 25_000_000_000
    head = 2.0 * length * d * words
    return Model(
        "1B decoder", 24, d, 16, length, 4 * d, words * d + 2 * d, head, True, batch, 4, tokens // (batch * length)
    )


VIT, DECODER = _vit(), _decoder()


@cache
def attention_params(model: Model, mechanism: str) -> int:
    """Of one layer."""
    return cost(model.width, model.heads, model.length, mechanism=mechanism).params


def params(model: Model, mechanism: str) -> int:
    """Of the whole model: attention, MLP with biases, two norms a block, what stands around."""
    d = model.width
    mlp = 2 * d * model.hidden + d + model.hidden
    return model.layers * (attention_params(model, mechanism) + mlp + 4 * d) + model.around


@dataclass(frozen=True, slots=True)
class Work:
    """Operations, forward, for one sequence.

    Args:
        products: of linear maps and W_A.
        scores: of queries with keys and of weights with values.
    """

    products: float
    scores: float

    @property
    def total(self) -> float:
        """Both."""
        return self.products + self.scores


@cache
def attention_work(model: Model, mechanism: str, length: int | None = None) -> Work:
    """Of one attention layer."""
    row, length = Mechanism.of(mechanism), length or model.length

    def forward(of: Mechanism) -> float:
        return float(cost(model.width, model.heads, length, mechanism=of, backward=False).flops)

    seen = 0.5 if model.causal else 1.0
    scores, whole = forward(NOTHING), forward(row)
    align = forward(W_A) - scores if row.aligned else 0.0
    return Work(whole - scores - align + seen * align, seen * scores)


def work(model: Model, mechanism: str, length: int | None = None) -> Work:
    """Of the whole model."""
    attention, n = attention_work(model, mechanism, length), length or model.length
    mlp = 2.0 * 2 * n * model.width * model.hidden
    head = model.head * n / model.length
    return Work(model.layers * (attention.products + mlp) + head, model.layers * attention.scores)


def seconds(work: Work, machine: Machine, *, passes: float = 3.0) -> float:
    """Of one GPU; ``passes``: 3 for forward and backward, in units of the forward pass."""
    return passes * (
        work.products / (machine.product * machine.of_product) + work.scores / (machine.product * machine.of_attention)
    )


@dataclass(frozen=True, slots=True)
class Step:
    """One update on one of many GPUs.

    Args:
        compute, network: seconds, each as if it were alone.
        memory: bytes of weights, gradients, optimiser and activations.
    """

    compute: float
    network: float
    memory: float

    @property
    def seconds(self) -> float:
        """With communication hidden behind computing as far as it is shorter."""
        return max(self.compute, self.network)


BYTES_OF_STATE = 18
"""For one parameter: bf16 weight, float32 master copy, gradient and two moments of Adam."""
BYTES_OF_ACTIVATIONS = 34
"""For one token and feature of a block, without L x S matrices (arXiv 2205.05198, eq. 2); K and V are 2 bytes each."""


def activation_bytes(model: Model, mechanism: str) -> float:
    """Of one sequence, bf16, kept for the backward pass. A key or value that is the input itself is there already."""
    row = Mechanism.of(mechanism)
    saved = BYTES_OF_ACTIVATIONS - 2 * len({"k", "v"} - row.projections) + 2 * row.aligned
    return float(saved) * model.length * model.width * model.layers


def step(model: Model, mechanism: str, gpus: int, machine: Machine) -> Step:
    """One update: fully sharded inside a server, gradients of the shards summed over servers."""
    own = model.batch / gpus
    held = min(own, model.micro)
    turns = own / held
    n, bytes_of_weights = machine.gpus, 2.0 * params(model, mechanism)
    # Weights are gathered forward and backward, gradients scattered, each time a part of the batch is computed.
    inside = 3 * turns * bytes_of_weights * (n - 1) / n / (machine.inside * machine.of_rates)
    servers = gpus // n
    between = 2 * bytes_of_weights / n * (servers - 1) / servers / (machine.between * machine.of_rates)
    whole = work(model, mechanism)
    memory = BYTES_OF_STATE * params(model, mechanism) / n + held * activation_bytes(model, mechanism)
    return Step(own * seconds(whole, machine), inside + between, memory)


# --- tensor parallelism -------------------------------------------------------------------------------------------


def tensor_parallel(model: Model, mechanism: str, ways: int, machine: Machine) -> tuple[float, float, float]:
    """Seconds of one attention layer over ``ways`` GPUs of a server, one sequence, forward and backward.

    Returns:
        Computing, the two all-reduces of (ℓ, d) in bf16, and the largest share of weights that one GPU holds. A W_A
        that all heads share is held by all, but each uses it for its own heads.
    """
    compute = seconds(attention_work(model, mechanism), machine) / ways
    sent = 2 * (ways - 1) / ways * 2.0 * model.length * model.width
    network = 2 * (sent / (machine.inside * machine.of_rates) + 2 * (ways - 1) * machine.hop_inside)
    align = cost(model.width, model.heads, model.length, mechanism=W_A).params if Mechanism.of(mechanism).aligned else 0
    held = (attention_params(model, mechanism) - align) / ways + align
    return compute, network, held


# --- serving ----------------------------------------------------------------------------------------------------------


def cache_bytes(model: Model, mechanism: str) -> int:
    """Of one token, bf16."""
    one = cost(model.width, model.heads, model.length, mechanism=mechanism, dtype=BF16)
    return one.cache_bytes_per_token * model.layers


RESERVE = 0.10
"""Share of the memory left for activations, buffers and fragmentation."""


def users(model: Model, mechanism: str, length: int, machine: Machine) -> int:
    """Conversations of ``length`` tokens that fit beside the weights."""
    room = machine.memory * (1 - RESERVE) - 2.0 * params(model, mechanism)
    return int(room // (cache_bytes(model, mechanism) * length))


def tokens_a_second(model: Model, mechanism: str, length: int, users: int, machine: Machine) -> float:
    """Of all users together: each step reads the weights once and every cache."""
    read = 2.0 * params(model, mechanism) + users * float(cache_bytes(model, mechanism)) * length
    return users / (read / (machine.memory_rate * machine.of_rates))


# --- where a mechanism stops paying -----------------------------------------------------------------------------------


def saving(model: Model, mechanism: str, length: int) -> float:
    """Share of standard's operations, of the whole model, that a mechanism saves at a length; negative: it costs."""
    return 1.0 - work(model, mechanism, length).total / work(model, "standard", length).total


def last_length(model: Model, mechanism: str, least: float) -> int | None:
    """The greatest length at which a mechanism saves at least that share; None where it never does."""
    if saving(model, mechanism, 1) < least:
        return None
    low, high = 1, 1 << 24
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if saving(model, mechanism, middle) >= least else (low, middle)
    return low


# --- sequence parallelism ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Exchange:
    """What one process sends in one layer, for one sequence.

    Args:
        bytes: all of them.
        steps: messages that wait for one another.
        held: bytes of other processes' tokens that it holds at a time.
    """

    bytes: float
    steps: int
    held: float

    def seconds(self, rate: float, hop: float) -> float:
        """At a bandwidth, and with a latency for each step."""
        return self.bytes / rate + self.steps * hop


def exchanges(length: int, width: int, heads: int, groups: int, ways: int) -> dict[str, tuple[Exchange, Exchange]]:
    """Forward and backward of each way to divide a sequence; bf16 tensors, float32 sums.

    A collective of P processes has P - 1 steps in its ring form, all-reduce 2 (P - 1).
    """
    p, away = ways, (ways - 1) / ways
    q = 2.0 * length * width  # bf16
    kv = 2 * 2.0 * length * width * groups / heads
    sums = 4.0 * length * (width + heads)  # float32: Σ a v, and Σ a of each head
    rows = 2 * 4.0 * length * heads  # Σ a over all keys, and the product of output and gradient
    maxima = 4.0 * length * heads
    gradient = 4.0 * length * width
    one = p - 1
    return {
        "ring, softmax": (
            Exchange(away * kv, one, 2 * kv / p),
            # Keys and values go round again, their gradients with them in float32, and once more home.
            Exchange(away * kv + 2 * kv, one + 1, 2 * (kv + 2 * kv) / p),
        ),
        "all-gather of K and V, either score": (
            Exchange(away * kv, one, kv),
            Exchange(away * kv + away * 2 * kv, 2 * one, kv + 2 * kv),
        ),
        "sums, expressive": (
            Exchange(away * (q + sums), 2 * one, q + sums),
            Exchange(away * (2 * q + rows + gradient), 3 * one, 2 * q + rows + gradient),
        ),
        "sums, softmax": (
            Exchange(away * (q + sums + 2 * maxima), 4 * one, q + sums + maxima),
            Exchange(away * (2 * q + rows + maxima + gradient), 3 * one, 2 * q + rows + maxima + gradient),
        ),
    }


def decoding(length: int, width: int, heads: int, ways: int, batch: int = 1) -> dict[str, Exchange]:
    """One new token of each of ``batch`` sequences whose keys are divided: the query is everywhere.

    Sums this small go through a tree, up and down: 2 log2 P steps.
    """
    away, tree = (ways - 1) / ways, 2 * ceil(log2(ways))
    kv, sums = 2 * 2.0 * length * width * batch, 4.0 * (width + heads) * batch
    maxima = 4.0 * heads * batch
    return {
        "ring, softmax": Exchange(away * kv, ways - 1, 2 * kv / ways),
        "sums, softmax": Exchange(2 * away * (sums + maxima), 2 * tree, sums),
        "sums, expressive": Exchange(2 * away * sums, tree, sums),
    }
