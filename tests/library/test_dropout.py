"""Dropout that follows the samples: shares of a batch drop together what one process drops for all of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import better_attention as ba
from better_attention.dropout import batch_share, drawn_seed, dropout, keep, parts, uniform
from better_attention.impl import native
from better_attention.lab.tasks.augmentation import keras_augmented
from helpers.native_cases import ISAS, needs_native

PLACES = [(0, 1), (0, 2), (1, 2), (2, 3)]
"""First and step of shares."""


def seeded(share: tuple[int, int], compute: object, *arguments: object, seed: int = 3) -> Tensor:
    """What ``compute`` gives for a share of the batch, with a generator in the state that all processes have."""
    torch.manual_seed(seed)
    with batch_share(*share):
        return compute(*arguments)  # type: ignore[operator]


# --- the rule, written on Python's own integers -----------------------------------------------------------------------


def splitmix64(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def mixed(x: int, extra: int) -> int:
    x = ((x ^ x >> 16) * 0x7FEB352D + extra) % 2**32
    x = (x ^ x >> 15) * 0x846CA68B % 2**32
    return x ^ x >> 16


def is_kept(seed: int, p: float, row: int, key: int) -> bool:
    r = splitmix64((seed + (2 * row + 1) * 0x9E3779B97F4A7C15) % 2**64)
    number = mixed((key * 0x9E3779B9 + splitmix64(seed)) % 2**32, 0)
    return mixed(r % 2**32 ^ number, r >> 32) >= int(p * 2**32)


@pytest.mark.parametrize("share", PLACES)
@pytest.mark.parametrize("seed", [0, 1, 2**40 + 7, 2**63 - 2])
def test_keep_is_the_rule(share: tuple[int, int], seed: int) -> None:
    (B, N, L, S), p = (2, 3, 4, 5), 0.4
    rule = [
        [is_kept(seed, p, ((share[0] + b * share[1]) * N + n) * L + row, s) for s in range(S)]
        for b in range(B)
        for n in range(N)
        for row in range(L)
    ]
    kept = keep(torch.tensor([seed, *share]), p, (B, N, L, S), torch.device("cpu"))
    assert kept.flatten(0, 2).tolist() == rule


# --- numbers that are no weights --------------------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", [(5, 3, 37), (7, 64), (3,), (2, 3, 4, 5), (4, 1), (2, 40, 16), (1, 5, 129)])
def test_the_kernel_drops_by_the_rule(isa: str, shape: tuple[int, ...], rng: np.random.Generator) -> None:
    x = torch.from_numpy(rng.normal(size=shape)).float().requires_grad_()
    torch.manual_seed(3)
    with native.instruction_set(isa), batch_share(1, 3):
        y = dropout(x, 0.3)
        (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.manual_seed(3)
    with batch_share(1, 3):
        seed = drawn_seed()
    width = shape[-1] if len(shape) > 1 else 1
    kept = keep(seed, 0.3, (shape[0], 1, x[0].numel() // width, width), x.device).view(shape)
    factor = torch.tensor(1 / 0.7)
    assert torch.equal(y, torch.where(kept, x * factor, 0.0))
    assert torch.equal(gradient, torch.where(kept, factor.expand(shape), 0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(9, 6, 10), (9, 4), (9, 2, 3, 4)])
def test_shares_drop_what_one_process_drops(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, dtype=dtype)
    whole = seeded((0, 1), dropout, x, 0.5)
    assert 0 < (whole == 0).float().mean() < 1
    for processes in (2, 4):
        for rank in range(processes):
            mine = x[rank::processes]
            assert torch.equal(seeded((rank, processes), dropout, mine, 0.5), whole[rank::processes])


def test_a_share_without_samples_draws_its_seed_too() -> None:
    for samples in (0, 3):
        seeded((1, 2), dropout, torch.ones(samples, 4), 0.5)
        after = torch.randint(1000, ())
        assert after == seeded((0, 2), lambda: (drawn_seed(), torch.randint(1000, ()))[1])


def test_drops_are_random_and_of_the_asked_rate() -> None:
    x = torch.ones(64, 50, 60)
    for p in (0.1, 0.5, 0.9):
        y = seeded((0, 1), dropout, x, p)
        assert (y == 0).float().mean().item() == pytest.approx(p, abs=4 * (p * (1 - p) / x.numel()) ** 0.5)
        assert y[y != 0].unique().item() == pytest.approx(1 / (1 - p), rel=1e-6)
    first, second = seeded((0, 1), lambda: [dropout(x, 0.5) for _ in range(2)])
    assert 0.45 < (first == second).float().mean() < 0.55, "two calls drop alike"


def test_edges() -> None:
    x = torch.randn(3, 4)
    with batch_share(0, 1):
        assert dropout(x, 0.0) is x
        assert dropout(x, 0.5, training=False) is x
        assert torch.equal(dropout(x, 1.0), torch.zeros(3, 4))
        assert torch.equal(dropout(x.double(), 1.0), torch.zeros(3, 4).double())
        with pytest.raises(ValueError, match=r"p must be a number from 0 to 1, received 1.5"):
            dropout(x, 1.5)
    for wrong in ((-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="must be"), batch_share(*wrong):
            pass


def test_outside_of_a_share_it_is_torchs() -> None:
    x = torch.randn(3, 4)
    torch.manual_seed(0)
    expected = F.dropout(x, 0.5)
    torch.manual_seed(0)
    assert torch.equal(dropout(x, 0.5), expected)
    torch.manual_seed(0)
    numbers = torch.rand(3, 2)
    torch.manual_seed(0)
    assert torch.equal(uniform(3, 2, torch.device("cpu")), numbers)
    assert parts(drawn_seed())[1:] == (0, 1)


@needs_native
def test_opcheck() -> None:
    x = torch.randn(3, 4, 5, requires_grad=True)
    torch.library.opcheck(torch.ops.better_attention.dropout.default, (x, torch.tensor([5, 1, 2]), 0.5))


# --- attention --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["softmax", "expressive"])
@pytest.mark.parametrize("impl", ["auto", "native", "reference"])
def test_attention_weights_of_shares(impl: str, score: str) -> None:
    if impl == "native" and native.missing() is not None:
        pytest.skip(f"there are no compiled kernels here: {native.missing()}")
    q, k, v = (torch.randn(5, 2, n, 8, requires_grad=True) for n in (7, 9, 9))

    def attend(rank: int, processes: int) -> Tensor:
        return ba.attention(*(x[rank::processes] for x in (q, k, v)), score=score, dropout_p=0.4, impl=impl, scale=0.5)

    whole = seeded((0, 1), attend, 0, 1)
    gradients = torch.autograd.grad(whole.square().sum(), (q, k, v))
    parts_of = [seeded((rank, 2), attend, rank, 2) for rank in range(2)]
    for rank, part in enumerate(parts_of):
        torch.testing.assert_close(part, whole[rank::2])
    summed = torch.autograd.grad(sum(part.square().sum() for part in parts_of), (q, k, v))
    torch.testing.assert_close(summed, gradients)
    # The reference drops the same weights as the kernels.
    reference = seeded((0, 1), lambda: ba.attention(q, k, v, score=score, dropout_p=0.4, impl="reference", scale=0.5))
    torch.testing.assert_close(whole, reference, rtol=1e-4, atol=1e-5)


@needs_native
def test_one_process_alone_drops_the_weights_that_it_always_dropped() -> None:
    q = torch.randn(3, 2, 5, 8)
    torch.manual_seed(3)
    plain = ba.attention(q, q, q, dropout_p=0.4, impl="native")
    assert torch.equal(seeded((0, 1), lambda: ba.attention(q, q, q, dropout_p=0.4, impl="native")), plain)


@pytest.mark.parametrize("impl", ["chunked", "sdpa"])
def test_implementations_that_cannot_follow_say_so(impl: str) -> None:
    q = torch.randn(2, 2, 5, 8)
    with batch_share(0, 2), pytest.raises(ValueError, match=rf"{impl}: .*cannot follow the samples"):
        ba.attention(q, q, q, dropout_p=0.4, impl=impl)
    with batch_share(0, 2):
        ba.attention(q, q, q, impl=impl)


@pytest.mark.parametrize("mechanism", ["standard", "efficient", "super", "expressive"])
@pytest.mark.parametrize("window", [None, 3])
def test_layers_of_shares(mechanism: str, window: int | None) -> None:
    options = {"window": window} if window else {"max_len": 6} if mechanism == "super" else {}
    torch.manual_seed(0)
    layer = ba.MultiheadAttention(8, 2, batch_first=True, dropout=0.5, mechanism=mechanism, **options)
    x = torch.randn(5, 6, 8)
    causal = window is not None

    def attend(mine: Tensor) -> Tensor:
        return layer(mine, mine, mine, need_weights=False, is_causal=causal)[0]  # type: ignore[no-any-return]

    whole = seeded((0, 1), attend, x)
    for rank in range(2):
        torch.testing.assert_close(seeded((rank, 2), attend, x[rank::2]), whole[rank::2])


# --- augmentation -----------------------------------------------------------------------------------------------------


def test_uniform_numbers_and_augmented_images_of_shares() -> None:
    numbers = seeded((0, 1), uniform, 4000, 3, torch.device("cpu"))
    assert ((numbers >= 0) & (numbers < 1)).all()
    assert numbers.dtype == torch.float32
    assert numbers.mean(0).tolist() == pytest.approx([0.5] * 3, abs=0.03)
    assert numbers.var(0).tolist() == pytest.approx([1 / 12] * 3, rel=0.1)
    assert torch.corrcoef(numbers.T).triu(1).abs().max() < 0.08
    assert torch.equal(seeded((1, 2), uniform, 2000, 3, torch.device("cpu")), numbers[1::2])
    images = torch.rand(6, 8, 8, 3)
    whole = seeded((0, 1), keras_augmented, images)
    for rank in range(2):
        torch.testing.assert_close(seeded((rank, 2), keras_augmented, images[rank::2]), whole[rank::2])
    assert seeded((1, 2), keras_augmented, images[:0]).shape == (0, 8, 8, 3)


def test_a_model_trains_on_shares_as_on_the_whole() -> None:
    """Gradients of a small model with dropout on both sides of a layer, summed over shares, are those of the batch."""
    torch.manual_seed(0)
    layer = ba.MultiheadAttention(8, 2, batch_first=True, dropout=0.3, mechanism="expressive")
    head = nn.Linear(8, 3)
    x = torch.randn(7, 5, 8)

    def loss(mine: Tensor) -> Tensor:
        h = dropout(mine, 0.2)
        h = dropout(layer(h, h, h, need_weights=False)[0], 0.2).mean(1)
        return head(dropout(h, 0.5)).square().sum()  # type: ignore[no-any-return]

    weights = [*layer.parameters(), *head.parameters()]
    whole = torch.autograd.grad(seeded((0, 1), loss, x), weights)
    summed = [torch.zeros_like(w) for w in weights]
    for rank in range(3):
        for total, part in zip(summed, torch.autograd.grad(seeded((rank, 3), loss, x[rank::3]), weights), strict=True):
            total += part
    torch.testing.assert_close(summed, list(whole), rtol=1e-4, atol=1e-5)
