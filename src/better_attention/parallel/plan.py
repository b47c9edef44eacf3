"""A plan for ``torch.distributed.tensor.parallel.parallelize_module``: attention layers divided by heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from better_attention.errors import check_bool, describe
from better_attention.layer.multihead import MultiheadAttention

if TYPE_CHECKING:
    from torch.distributed.tensor.parallel import ParallelStyle


def parallel_plan(
    module: nn.Module,
    *,
    input_layouts: Any = None,
    output_layouts: Any = None,
    check: bool | None = None,
) -> dict[str, ParallelStyle]:
    r"""How the attention layers of ``module`` are divided by heads among processes (tensor parallelism).

    W_Q, W_K and W_V are divided by columns and W_O by rows, so that a process computes whole heads and one sum over
    processes, forward and backward, joins them. What a mechanism slices from the input needs no weights: each process
    takes the columns of its heads. A W_A that all heads share is held by every process, one per head by the process
    that has the head; so are learned scales and the keys of ``add_bias_kv``. ALiBi slopes, masks per head and rotary
    positions follow the heads, and weights that are asked for come back for all heads. Every process gets the whole
    input and returns the whole output, unless layouts say otherwise. ``layer(..., cache=cache)`` remembers the heads
    of its process alone.

    Args:
        module: a :class:`better_attention.MultiheadAttention`, or any module that contains some. Plans for other parts
            can be merged in: ``{**ba.parallel_plan(block), "mlp.0": ColwiseParallel(), "mlp.2": RowwiseParallel()}``.
        input_layouts: how plain tensors that come in are divided, a ``Placement``; None: ``Replicate()``. With
            ``Shard(1)`` for (B, L, D), sequences that a norm before the layer keeps divided are gathered. Inputs that
            are DTensors say so themselves.
        output_layouts: how the output is divided; None: ``Replicate()``.
        check: whether the processes compare the shapes of their inputs before each call, one exchange of 512 bytes,
            so that a difference is an error and no deadlock. None: on the CPU only, because a GPU would have to wait.

    Returns:
        Styles by the names of sub-modules, ``""`` for ``module`` itself.

    Raises:
        TypeError: no module.
        ValueError: no attention layer in it. ``parallelize_module`` itself raises ValueError in all processes for a
            mesh of several dimensions (pass one, as ``mesh["tp"]``), one of another device, a number of processes
            that does not divide the number of heads, or of those of keys and values, or different layers.

    Note:
        Dropout draws independently in each process, as it must for its heads, so that with it the result depends on
        the number of processes. Without it outputs and gradients are those of one process up to rounding. State dicts
        hold DTensors under the names of an ordinary layer. Each class loads the other's: whole tensors into a divided
        layer without anything being sent; DTensors into an ordinary layer by putting them together, for which all
        processes have to load. Nested tensors are refused.

    >>> layer = MultiheadAttention(32, 4, mechanism="efficient")
    >>> list(parallel_plan(layer))
    ['', 'q_proj', 'out_proj']
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, received {describe(module)}.")
    if check is not None:
        check_bool(check, "check")
    layers = {name: part for name, part in module.named_modules() if isinstance(part, MultiheadAttention)}
    if not layers:
        raise ValueError(
            f"there is no better_attention.MultiheadAttention in {type(module).__name__}: convert its attention with "
            "better_attention.convert first, or divide other layers with torch's own styles."
        )
    from .styles import Aligned, Columns, Divided, Heads, Rows

    plan: dict[str, ParallelStyle] = {}
    for name, layer in layers.items():
        prefix = f"{name}." if name else ""
        # First of all, because it checks everything before anything is changed.
        plan[name] = Heads(input_layouts, check)
        for part in ("q_proj", "k_proj", "v_proj"):
            if part[0] in layer.mechanism.projections:
                plan[prefix + part] = Columns()
        if layer.mechanism.aligned:
            plan[prefix + "align"] = Aligned()
        if layer.extra_k is not None:
            plan |= {prefix + "extra_k": Divided(dim=2), prefix + "extra_v": Divided(dim=2)}
        if layer.scaling is not None:
            plan[prefix + "scaling"] = Divided(dim=0)
        plan[prefix + "out_proj"] = Rows(output_layouts)
    return plan
