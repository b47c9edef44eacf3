"""Weights that live elsewhere or otherwise than the inputs: offloaded, cast, replaced, sharded.

The layer compares its inputs with one another; whether the weights fit is for each called module to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import better_attention as ba
from helpers.layers import ALL, NAMED, layer, padding, refused
from helpers.processes import run_two

B, S, N, E = 3, 5, 2, 6
LEARNED = [name for name in ALL if name != "no projections"]


def every_part(name: str) -> ba.MultiheadAttention:
    """The layer with every optional parameter, in inference."""
    return layer(name, E, N, max_len=S, add_bias_kv=True, scale="learned").eval()


def outputs(module: nn.Module, *, dtype: torch.dtype = torch.float32, need_weights: bool = False) -> Tensor:
    x = torch.linspace(-1, 1, B * S * E, dtype=torch.float64).sin().view(B, S, E).to(dtype)
    with torch.no_grad():
        return module(x, x, x, key_padding_mask=padding(B, S), need_weights=need_weights)[0]


# --- offloading and casting by hooks ----------------------------------------------------------------------------------


BUILDS = pytest.mark.parametrize(
    "build", [every_part, lambda name: layer(name, E, N, max_len=S).eval()], ids=["all", "plain"]
)


@pytest.mark.hosts
@BUILDS
@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("name", LEARNED)
def test_offloaded_weights(name: str, where: str, build: Callable[[str], nn.Module], tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is in the `experiments` extra")
    module = build(name)
    expected = [outputs(module, need_weights=flag) for flag in (False, True)]
    if where == "cpu":
        accelerate.cpu_offload(module, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(module, str(tmp_path), execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in module.parameters())
    for flag, wanted in zip((False, True), expected, strict=True):
        assert torch.equal(outputs(module, need_weights=flag), wanted)
    x = torch.zeros(B, S, E)
    assert module(x, x, x, need_weights=False)[0].isfinite().all()  # self-attention, where the small layer has one call


@pytest.mark.hosts
@BUILDS
@pytest.mark.parametrize("name", LEARNED)
def test_layerwise_casting(name: str, build: Callable[[str], nn.Module]) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is in the `experiments` extra")
    module = build(name)
    with torch.no_grad():
        for part in module.children():
            if isinstance(part, nn.Linear):
                for parameter in part.parameters():  # to numbers that the storage type has
                    parameter.copy_(parameter.to(torch.float8_e4m3fn).float())
    expected = outputs(module)
    accelerate.big_modeling.attach_layerwise_casting_hooks(
        module, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
    )
    assert module.q_proj.weight.dtype == torch.float8_e4m3fn
    assert torch.equal(outputs(module), expected)
    assert module.q_proj.weight.dtype == torch.float8_e4m3fn


# --- whoever provides for the weights -------------------------------------------------------------------------------


@contextmanager
def patched_class() -> Iterator[None]:
    """As adapters do that cast the weights to the input inside ``nn.Linear.forward``."""
    kept = nn.Linear.forward
    nn.Linear.forward = lambda self, x: nn.functional.linear(  # type: ignore[method-assign]
        x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
    )
    try:
        yield
    finally:
        nn.Linear.forward = kept  # type: ignore[method-assign]


@contextmanager
def patched_function() -> Iterator[None]:
    kept = nn.functional.linear
    nn.functional.linear = lambda x, w, b=None: kept(x, w.to(x.dtype), None if b is None else b.to(x.dtype))
    try:
        yield
    finally:
        nn.functional.linear = kept


class Casting(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., object], types: object, args: tuple = (), kwargs: object = None
    ) -> object:
        if func is nn.functional.linear:
            args = tuple(x if x is None else x.to(args[0].dtype) for x in args)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("host", [patched_class, patched_function, Casting])
@pytest.mark.parametrize("name", ["standard", "optimised", "efficient", "expressive"])
def test_whoever_casts_the_weights_is_let_do_it(name: str, host: Callable[[], object]) -> None:
    module = layer(name, E, N, max_len=S).eval()
    expected = outputs(layer_in(module, torch.float64), dtype=torch.float64)
    with host():
        found = outputs(module, dtype=torch.float64)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected)


def layer_in(module: ba.MultiheadAttention, dtype: torch.dtype) -> ba.MultiheadAttention:
    twin = ba.MultiheadAttention(E, N, batch_first=True, mechanism=module.mechanism, dtype=dtype).eval()
    twin.load_state_dict(module.state_dict())
    return twin


class Quantised(nn.Linear):
    """A linear map that keeps its weight in eight bits, as quantisation libraries do."""

    def __init__(self, source: nn.Linear) -> None:
        super().__init__(source.in_features, source.out_features)
        self.load_state_dict(source.state_dict())
        self.step = source.weight.detach().abs().max() / 127
        self.weight = nn.Parameter((source.weight.detach() / self.step).round().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.step, self.bias)


@pytest.mark.parametrize("name", NAMED)
def test_quantised_linears_take_the_place_of_the_projections(name: str) -> None:
    module = layer(name, E, N, max_len=S).eval()
    expected = outputs(module)
    for attribute in ("q_proj", "k_proj", "v_proj", "out_proj"):
        if isinstance(child := getattr(module, attribute), nn.Linear):
            setattr(module, attribute, Quantised(child))
    found = outputs(module)
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.03 * expected.abs().max().item())


# --- and where nobody does ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", LEARNED)
def test_inputs_of_another_dtype_than_the_weights(name: str, dtype: torch.dtype, training: bool) -> None:
    module = layer(name, E, N, max_len=S).train(training)
    refused(lambda: outputs(module, dtype=dtype), "q_proj", dtype, torch.float32, ".to(", kind=TypeError)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if dtype != torch.float64:
            assert outputs(module, dtype=dtype).dtype == torch.bfloat16


def test_inputs_are_not_sent_to_a_dtype_that_only_stores() -> None:
    module = layer("standard", E, N).eval().to(torch.float8_e4m3fn)
    message = refused(lambda: outputs(module), "q_proj", "layer with .to(torch.float32)", kind=TypeError)
    assert ".to(torch.float8" not in message


@pytest.mark.parametrize("part", ["k_proj", "v_proj", "out_proj", "align"])
def test_one_part_of_another_dtype_is_named(part: str) -> None:
    module = layer("standard+align", E, N, max_len=S).eval()
    getattr(module, part).double()
    refused(lambda: outputs(module), part, torch.float64, torch.float32, kind=TypeError)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("part", ["q_proj", "k_proj", "v_proj", "out_proj", "align", "extra_k", "scaling", "all"])
def test_weights_that_were_never_given_memory(part: str, bias: bool) -> None:
    """torch's linear takes a weight on the meta device with inputs on the CPU, and returns unwritten memory."""
    module = layer("standard+align", E, N, max_len=S, bias=bias, add_bias_kv=True, scale="learned").eval()
    (module if part == "all" else getattr(module, part)).to("meta")
    refused(lambda: outputs(module), "q_proj" if part == "all" else part, "meta", "cpu", "assign=True", kind=ValueError)
    plain = layer("standard", E, N, bias=bias, device="meta").eval()
    x = torch.zeros(1, 2, E)
    with torch.no_grad():
        refused(lambda: plain(x, x, x, need_weights=False), "q_proj", "meta", kind=ValueError)


@pytest.mark.parametrize("name", LEARNED)
def test_inputs_without_memory_and_weights_with(name: str) -> None:
    module, x = layer(name, E, N, max_len=S), torch.zeros(B, S, E, device="meta")
    refused(lambda: module(x, x, x), "q_proj", "meta", "cpu", kind=ValueError)


@pytest.mark.parametrize("name", ["standard", "super"])
def test_inputs_of_another_dtype_are_named_when_compiled_too(name: str) -> None:
    module = layer(name, E, N, max_len=S)
    compiled = torch.compile(module, backend="eager")
    x = torch.zeros(B, S, E, dtype=torch.float64)
    refused(lambda: compiled(x, x, x), "q_proj", "float64", "float32", kind=TypeError)


def test_projections_that_return_different_dtypes() -> None:
    module = layer("standard", E, N)
    module.k_proj.register_forward_hook(lambda _, __, output: output.double())
    refused(lambda: outputs(module), "projected", torch.float64, torch.float32, kind=TypeError)


def test_an_error_of_another_kind_is_passed_on() -> None:
    module = layer("standard", E, N)
    module.q_proj.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("out of luck")))
    with pytest.raises(RuntimeError, match=r"^out of luck$"):
        outputs(module)


# --- sharded, two processes -------------------------------------------------------------------------------------------

WORKER = """
import sys, torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
import better_attention as ba

dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=int(sys.argv[1]), world_size=2)
mesh = dist.init_device_mesh("cpu", (2,))
policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
for name in ("standard", "efficient", "super", "expressive"):
    for unit in ("parts", "layer"):
        torch.manual_seed(0)
        options = {"mechanism": name, "max_len": 5 if name == "super" else None, "scale": "learned"}
        layer = ba.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True, **options)
        x = torch.randn(2, 5, 8)
        expected = layer.bfloat16()(*[x.bfloat16()] * 3, need_weights=False)[0].float()
        layer.float()
        for part in layer.children() if unit == "parts" else [layer]:
            if list(part.parameters()):
                fully_shard(part, mesh=mesh, mp_policy=policy)
        # Sharded part by part, a map that is not learned passes its input on as it is.
        cast = unit == "parts" and name in ("efficient", "super")
        output = layer(*[x.bfloat16() if cast else x] * 3, need_weights=False)[0].float()
        torch.testing.assert_close(output, expected, rtol=0.05, atol=0.05)
        output.square().sum().backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_fully_sharded_in_mixed_precision(tmp_path: Path) -> None:
    """FSDP2 over two processes, each module computing in bfloat16 from float32 shards."""
    run_two(WORKER, tmp_path / "store", seconds=180)
