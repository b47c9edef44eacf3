"""How each part of a layer is divided, as styles for ``parallelize_module``.

Between the layer's input and its output everything is an ordinary tensor of this process's heads, so that the kernels
and every option of the layer work as always. The input is marked as one whose gradient is the sum over processes, once
for the whole layer: torch's own ``ColwiseParallel`` would add it up once for each projection.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from better_attention.errors import describe
from better_attention.layer.multihead import MultiheadAttention
from better_attention.layer.share import HeadShare

from .agreement import agreed, backend_device, shape_of

_INPUTS = (
    "query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal",
)  # fmt: skip


def _layout(layout: Any, name: str) -> Placement:
    if layout is None:
        return Replicate()
    if isinstance(layout, Partial) or not isinstance(layout, Placement):
        raise TypeError(f"{name} must be Replicate() or Shard(dimension), received {describe(layout)}.")
    return layout


class Heads(ParallelStyle):
    """The layer itself: which heads are whose, and inputs on their way in."""

    def __init__(self, input_layouts: Any, check: bool | None) -> None:
        super().__init__()
        self.layout = _layout(input_layouts, "input_layouts")
        self.check = check

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if device_mesh.ndim != 1:
            names = ", ".join(map(repr, device_mesh.mesh_dim_names or ())) or "none"
            raise ValueError(
                f"heads are divided over one dimension, received a mesh of shape {tuple(device_mesh.shape)} (names: "
                f'{names}). Pass one dimension of it, as mesh["tp"]; the other one is for fully_shard.'
            )
        group, ways = device_mesh.get_group(), device_mesh.size()
        device = torch.device(device_mesh.device_type)
        layer = agreed(
            lambda: _checked(module, device_mesh),
            lambda: _described(module),
            group,
            backend_device(group, device),
            "layer",
        )
        count = layer.num_heads // ways
        layer.share = HeadShare(device_mesh, device_mesh.get_local_rank() * count, count)
        check = device_mesh.device_type == "cpu" if self.check is None else self.check

        def enter(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
            given = dict(zip(_INPUTS, args, strict=False)) | kwargs
            if check and not torch.compiler.is_compiling():
                agreed(
                    lambda: _refuse(given), lambda: _said(layer, given), group, backend_device(group, device), "inputs"
                )
            else:
                _refuse(given)
            whole: dict[int, Any] = {}
            for name, x in given.items():
                if not isinstance(x, Tensor):
                    continue
                # One tensor that is query, key and value stays one.
                if id(x) not in whole:
                    whole[id(x)] = _whole(x, device_mesh, self.layout if name in _INPUTS[:3] else Replicate())
                given[name] = whole[id(x)]
            return (), given

        layer.register_forward_pre_hook(enter, with_kwargs=True)
        return layer


def _checked(module: nn.Module, mesh: DeviceMesh) -> MultiheadAttention:
    """The layer, if it can be divided over ``mesh``."""
    if "grad_placements" not in inspect.signature(DTensor.from_local).parameters:
        raise ValueError(f"parallel_plan needs torch 2.13 or later, this is {torch.__version__}.")
    if not isinstance(module, MultiheadAttention):
        raise TypeError(f"this style is for a better_attention.MultiheadAttention, received {type(module).__name__}.")
    if module.share is not None or any(isinstance(p, DTensor) for p in module.parameters()):
        raise ValueError(
            "this layer is divided among processes already. Call parallelize_module once, before fully_shard."
        )
    devices = {p.device.type for p in module.parameters()} - {"meta"}
    if devices - {mesh.device_type}:
        raise ValueError(
            f"the layer is on {', '.join(sorted(devices))}, the mesh is of {mesh.device_type}. Move the layer there "
            "first, or make the mesh with init_device_mesh of the layer's device."
        )
    heads, ways = module.num_heads, mesh.size()
    if heads % ways:
        larger = "More processes than heads cannot share them. " if ways > heads else ""
        raise ValueError(
            f"{heads} heads cannot be divided among {ways} processes. {larger}Take a number of processes that divides "
            "the number of heads; the others can divide the batch or the weights (fully_shard over another dimension "
            "of the mesh)."
        )
    if module.num_kv_heads % ways:
        raise ValueError(
            f"num_kv_heads={module.num_kv_heads} cannot be divided among {ways} processes: each needs whole heads of "
            "keys and values. Take a number of processes that divides num_kv_heads."
        )
    return module


def _described(module: nn.Module) -> str:
    shapes = ", ".join(f"{name} {shape_of(p)}" for name, p in module.named_parameters())
    own = module.extra_repr() if isinstance(module, MultiheadAttention) else ""
    return f"{type(module).__name__}({own}; {shapes})"


def _refuse(given: dict[str, Any]) -> None:
    for name in _INPUTS[:3]:
        x = given.get(name)
        if isinstance(x, Tensor) and x.is_nested:
            raise TypeError(
                f"{name} is a nested tensor, which a layer that processes share does not take: pad it "
                "(to_padded_tensor) and pass key_padding_mask."
            )


def _said(layer: nn.Module, given: dict[str, Any]) -> str:
    """What all processes have to agree on before they compute together."""
    words = [f"{name} {shape_of(x) if isinstance(x, Tensor) else x}" for name, x in given.items() if name != "cache"]
    cache = given.get("cache")
    words += [] if cache is None else [f"a cache of {cache.length}"]
    return ", ".join([*words, "training" if layer.training else "evaluation"])


def _whole(x: Tensor, mesh: DeviceMesh, layout: Placement) -> Tensor:
    """``x`` whole in every process, its gradient the sum of theirs."""
    if not isinstance(x, DTensor):
        # A collective that is still on its way would be a kind of tensor that the kernels do not know.
        x = x.wait() if hasattr(x, "wait") else x
        if layout.is_replicate() and not x.requires_grad:
            return x
        x = DTensor.from_local(x, mesh, [layout], run_check=False)
    elif x.device_mesh != mesh:
        raise ValueError(f"the layer is divided over {mesh}, its input over {x.device_mesh}.")
    result: Tensor = x.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
    return result


class _Part(ParallelStyle):
    """One sub-module: its parameters divided, and hooks for what goes in and comes out."""

    def _place(self, name: str, parameter: nn.Parameter) -> Placement:
        raise NotImplementedError

    def _distribute(self, module: nn.Module, mesh: DeviceMesh, **hooks: Any) -> nn.Module:
        def divide(_: str, part: nn.Module, mesh: DeviceMesh) -> None:
            for name, parameter in list(part.named_parameters(recurse=False)):
                whole = distribute_tensor(
                    parameter, mesh, [self._place(name, parameter)], src_data_rank=self.src_data_rank
                )
                part.register_parameter(name, nn.Parameter(whole, requires_grad=parameter.requires_grad))

        return distribute_module(module, mesh, divide, **hooks)


class Columns(_Part):
    """W_Q, W_K, W_V: each process has the columns of its heads."""

    def _place(self, name: str, parameter: nn.Parameter) -> Placement:
        return Shard(0)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def enter(_: nn.Module, inputs: tuple[Tensor, ...], mesh: DeviceMesh) -> DTensor:
            # Summed over processes at the layer's input, and not for each projection.
            return DTensor.from_local(inputs[0], mesh, [Replicate()], run_check=False, grad_placements=[Partial()])

        def leave(_: nn.Module, output: DTensor, mesh: DeviceMesh) -> Tensor:
            return output.to_local()

        return self._distribute(module, device_mesh, input_fn=enter, output_fn=leave)


class Rows(_Part):
    """W_O: each process has the rows of its heads, and the outputs are added up; the identity puts heads together."""

    def __init__(self, output_layouts: Any) -> None:
        super().__init__()
        self.layout = _layout(output_layouts, "output_layouts")

    def _place(self, name: str, parameter: nn.Parameter) -> Placement:
        return Shard(1) if name == "weight" else Replicate()

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def enter(_: nn.Module, inputs: tuple[Tensor, ...], mesh: DeviceMesh) -> DTensor:
            return DTensor.from_local(inputs[0], mesh, [Shard(inputs[0].dim() - 1)], run_check=False)

        def leave(_: nn.Module, output: DTensor, mesh: DeviceMesh) -> Tensor:
            return output.redistribute(placements=[self.layout]).to_local()

        return self._distribute(module, device_mesh, input_fn=enter, output_fn=leave)


class Divided(_Part):
    """Parameters that lie head after head in one dimension; the module computes with the part that is here."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def _place(self, name: str, parameter: nn.Parameter) -> Placement:
        return Shard(self.dim)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        self._distribute(module, device_mesh)
        module.__dict__["divided"] = True  # layer/share.py: here()
        return module


class Aligned(Divided):
    """W_A: copies of one that all heads share, parts of one for each head."""

    def __init__(self) -> None:
        super().__init__(dim=0)
        self.shared = False

    def _place(self, name: str, parameter: nn.Parameter) -> Placement:
        return Replicate() if self.shared else Shard(0)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        self.shared = module.heads == "shared"
        return super()._apply(module, device_mesh)
