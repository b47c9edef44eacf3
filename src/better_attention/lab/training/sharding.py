"""A model whose parameters, gradients and optimiser state are spread over the processes of a launch (FSDP2).

torch itself does it (``torch.distributed.fsdp.fully_shard``): accelerate takes its plain data parallelism on a CPU
without a word. A process holds a part of each tensor, and all of a block while it computes with it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from better_attention.lab.runs import checkpoint, shards
from better_attention.lab.training.launch import torchrun

SHARDS = ("fsdp",)
"""The ways to spread a model."""


def check(shard: str, processes: int) -> None:
    """Refuse to spread a model over one process.

    Raises:
        ValueError: says how to start several.
    """
    if shard and processes == 1:
        raise ValueError(
            f"--shard {shard} spreads a model over several processes. Start them with `{torchrun(2)} ...`."
        )


def spread(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Spread the parameters of ``model``, which is equal on all processes, by whole blocks; the same module."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    device = accelerator.device.type
    mesh = init_device_mesh(device, (accelerator.num_processes,))
    model.to(accelerator.device)
    for block in blocks(model):
        fully_shard(block, mesh=mesh)
    # In part again after each pass, as its blocks are: else its state would be whole after an evaluation.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    # Logits of three dimensions are a view of a matrix product. torch warns at each update of operations in place on
    # them; the training loop has none.
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view tensor", UserWarning)
    return model


def optimiser_for_parts(optimiser: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimiser, which computes with parts of tensors: torch has no rule for them in the fused kernel of SGD."""
    if isinstance(optimiser, torch.optim.SGD):
        for group in optimiser.param_groups:
            group["fused"], group["foreach"] = False, True
    return optimiser


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The layers that a model repeats: what stands in its lists of modules."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            yield from module


def is_spread(tensor: Tensor) -> bool:
    """Whether this process has a part of a tensor."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """A tensor with the parts of all processes, which call this together."""
    return tensor.full_tensor() if is_spread(tensor) else tensor  # type: ignore[attr-defined]


def all_whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor with the parts of all processes, on the CPU."""
    return {name: whole(tensor).cpu() for name, tensor in tensors.items()}


def alike(values: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``values``, whole and equal on all processes, spread as the tensors of the same names in ``like`` are."""
    return {name: _as(value, like[name]) for name, value in values.items()}


def _as(value: Tensor, like: Tensor) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    value = value.to(like.device)
    # Every process has all of it already, so that nothing is sent.
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None) if is_spread(like) else value  # type: ignore[attr-defined]


# --- checkpoints ------------------------------------------------------------------------------------------------------


def save(folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any], accelerator: Accelerator) -> None:
    """Write a checkpoint to which every process contributes its part; all of them call this together.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    number = _agreed(checkpoint.next_number(folder), accelerator)
    parts = checkpoint.file_of(folder, number, shards.SUFFIX)
    if accelerator.is_main_process:
        shards.remove(parts)
        parts.mkdir()
    accelerator.wait_for_everyone()
    shards.write(parts, tensors)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        checkpoint.complete(folder, number, lambda: {"shards": shards.seal(parts)}, state)
    accelerator.wait_for_everyone()


def load(
    folder: Path, model: Mapping[str, Tensor], parameters: Sequence[Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest whole checkpoint, of one process or of any number, spread as the model is.

    Args:
        folder: of the run.
        model: the state dict of the spread model, whose tensors are not changed.
        parameters: its parameters, in the order in which the optimiser has them.
    """
    found = checkpoint.newest(folder)
    if found is None:
        return None
    content, state = found
    stored = shards.names(content) if isinstance(content, Path) else set(content)
    wanted = {name: _place(name, model, parameters) for name in sorted(stored)}
    if isinstance(content, Path):
        shards.read_into(content, wanted)
        return wanted, state
    return alike(content, wanted), state


def _place(name: str, model: Mapping[str, Tensor], parameters: Sequence[Tensor]) -> Tensor:
    """A new tensor for what a checkpoint calls ``name``: ``model.NAME``, ``best.NAME`` or ``optimiser.INDEX.KEY``."""
    kind, _, rest = name.partition(".")
    if kind != "optimiser":
        return torch.zeros_like(model[rest])
    index, key = rest.split(".", 1)
    # Every state of our optimisers has the shape of its parameter, but for the number of steps.
    return torch.zeros(1) if key == "step" else torch.zeros_like(parameters[int(index)].detach())


def _agreed(number: int, accelerator: Accelerator) -> int:
    """The number of the first process."""
    return int(accelerator.gather(torch.tensor([number], device=accelerator.device))[0])
