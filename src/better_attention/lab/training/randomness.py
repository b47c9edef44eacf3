"""Everything random in a run, each a pure function of the seed and the position."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256

import torch
from torch import Tensor, nn

from better_attention.dropout import batch_share
from better_attention.lab.tasks.base import Task
from better_attention.lab.tasks.variant import Variant


def initial_model(task: Task, variant: Variant, heads: int, seed: int) -> nn.Module:
    """The model of a variant at its initial weights, which depend on the seed alone.

    Every tensor that the standard model has under the same name and in the same shape starts from the same
    values, so that mechanisms differ in what they compute and not in their luck.
    """
    # Without devices: models are built on the CPU, and saving the state of a GPU's generator would initialise CUDA.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive("standard", seed))
        standard = task.build("standard", heads).state_dict()
        # A stream of its own, so that the variant does not depend on how many numbers the standard model has drawn.
        torch.manual_seed(derive("own", seed))
        model = task.build(variant, heads)
    initial = model.state_dict()
    shared = {name: t for name, t in standard.items() if name in initial and initial[name].shape == t.shape}
    model.load_state_dict(initial | shared)
    return model


def epoch_order(samples: int, seed: int, epoch: int) -> Tensor:
    """The order of the samples in an epoch, int64 (samples,): the same for every mechanism."""
    # A generator of the CPU even for training on a GPU, whose generator would give another order.
    return torch.randperm(samples, generator=torch.Generator().manual_seed(derive("order", seed, epoch)))


@contextmanager
def drawing(device: torch.device, place: tuple[int, ...], rank: int, processes: int) -> Iterator[None]:
    """What dropout and augmentation draw for one update while the context lasts, a function of ``place`` alone.

    On the CPU it follows the samples: the processes of a launch together draw what one process would. On an
    accelerator, whose fused kernels draw numbers of their own, each process has a stream of its own.

    Args:
        device: where the model is trained.
        place: seed of the run, epoch, step.
        rank, processes: this process has the samples ``rank``, ``rank + processes``, ... of the batch.
    """
    if device.type != "cpu":
        reseed(device, derive("dropout", *place, rank))
        yield
        return
    reseed(device, derive("dropout", *place, 0))
    with batch_share(rank, processes):
        yield


def reseed(device: torch.device, seed: int) -> None:
    """Seed the generators that dropout on ``device`` draws from; our kernels derive their seed from the CPU's.

    ``torch.manual_seed`` would seed every kind of device, which takes milliseconds even where there is none.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        getattr(torch, device.type).manual_seed(seed)


def derive(*parts: str | int) -> int:
    """A seed, 0 ... 2^63 - 1, that depends on all ``parts``; unrelated for any two of them.

    >>> derive("order", 0, 1) != derive("order", 1, 0)
    True
    """
    # A digest and not hash(), which gives another value for the same text in every process. The shift leaves 63 bits,
    # which fit a signed 64-bit integer.
    return int.from_bytes(sha256(repr(parts).encode()).digest()[:8]) >> 1
