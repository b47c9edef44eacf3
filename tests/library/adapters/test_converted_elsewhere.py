"""Converted models inside what people put around models: LoRA, int8, offloading, casting, several processes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import better_attention as ba
from better_attention.adapters.host_attention import HostAttention
from helpers import TESTS, hosts
from helpers.processes import run_two

pytestmark = [pytest.mark.hosts, pytest.mark.filterwarnings("ignore")]  # the libraries' own warnings
B, L, W = 3, 7, 64
MECHANISMS = [*ba.MECHANISMS, "super+expressive"]
PARTS = ("q_proj", "k_proj", "v_proj", "out_proj")


def converted(mechanism: str) -> Any:
    """A BERT with another mechanism, and W_A away from the identity."""
    model = hosts.random(hosts.bert(W, 4), 0.05).eval()
    aligned = ba.Mechanism.of(mechanism).aligned
    ba.convert(model, mechanism, exact=False, max_len=L if aligned else None)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".align." in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch() -> dict[str, Tensor]:
    mask = torch.ones(B, L, dtype=torch.long)
    mask[1, 5:] = 0
    return {"input_ids": torch.randint(5, hosts.VOCABULARY, (B, L)), "attention_mask": mask}


def run(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        hidden: Tensor = model(**inputs).last_hidden_state
    return hidden


def learned(model: nn.Module) -> list[str]:
    """The names of the projections that are linear maps, as peft wants them."""
    layer = next(m for m in model.modules() if isinstance(m, HostAttention))
    return [part for part in PARTS if isinstance(getattr(layer, part), nn.Linear)]


# --- the host's own files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_the_hosts_own_file_holds_every_weight(mechanism: str, tmp_path: Path) -> None:
    """``save_pretrained`` writes them; ``from_pretrained`` builds the original, so the conversion comes first."""
    model, inputs = converted(mechanism), batch()
    model.save_pretrained(tmp_path)
    fresh = converted(mechanism)
    safetensors = hosts.library("safetensors.torch")
    fresh.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"))
    for name, weight in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], weight)
    torch.testing.assert_close(run(fresh, inputs), run(model, inputs), rtol=1e-5, atol=1e-5)


# --- LoRA -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_lora_trained_saved_loaded_and_merged(mechanism: str, tmp_path: Path) -> None:
    peft = hosts.library("peft")
    base, inputs = converted(mechanism), batch()
    twin, before = copy.deepcopy(base), run(base, inputs)
    config = peft.LoraConfig(target_modules=learned(base), r=2, lora_dropout=0.0)
    model = peft.get_peft_model(base, config)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        optimiser.zero_grad()
        model(**inputs).last_hidden_state.square().mean().backward()
        optimiser.step()
    adapted = run(model, inputs)
    assert (adapted - before).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(twin), tmp_path / "adapter").eval()
    assert torch.equal(run(loaded, inputs), adapted)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(run(merged, inputs), adapted, rtol=1e-5, atol=1e-5)
    ba.save_converted(merged, tmp_path / "merged")
    fresh = ba.load_converted(hosts.bert(W, 4).eval(), tmp_path / "merged")
    for name, weight in merged.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], weight)
    # Not the same bits: tensors of a file begin anywhere in memory, and products there may sum in another order.
    torch.testing.assert_close(run(fresh, inputs), run(merged, inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_maps_of_an_adapted_model_are_those_after_merging(mechanism: str) -> None:
    peft = hosts.library("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    base, inputs = converted(mechanism), batch()
    plain = ba.attention_maps(base, **inputs)
    model = peft.get_peft_model(base, config).eval()
    adapted = list(ba.attention_maps(model, **inputs).values())
    merged = list(ba.attention_maps(model.merge_and_unload(), **inputs).values())
    assert len(adapted) == len(merged) == len(plain) == 2
    for ours, theirs, other in zip(adapted, merged, plain.values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(ours, other, atol=1e-3)


# --- weights elsewhere or otherwise -----------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_offloaded_weights(mechanism: str, where: str, tmp_path: Path) -> None:
    accelerate = hosts.library("accelerate")
    model, inputs = converted(mechanism), batch()
    expected, maps = run(model, inputs), ba.attention_maps(model, **inputs)
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(run(model, inputs), expected)
    found = ba.attention_maps(model, **inputs)
    assert all(torch.equal(found[name], maps[name]) for name in maps)
    assert all(parameter.is_meta for parameter in model.parameters())
    with pytest.raises(ValueError, match="meta device"):
        ba.convert(model, "standard")


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_layerwise_casting(mechanism: str) -> None:
    accelerate = hosts.library("accelerate")
    model, inputs = converted(mechanism), batch()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                for parameter in module.parameters(recurse=False):  # to numbers that the storage type has
                    parameter.copy_(parameter.to(torch.float8_e4m3fn).float())
    expected = run(model, inputs)
    accelerate.big_modeling.attach_layerwise_casting_hooks(
        model,
        storage_dtype=torch.float8_e4m3fn,
        compute_dtype=torch.float32,
        skip_modules_pattern=["embeddings", "norm"],
    )
    layer = next(m for m in model.modules() if isinstance(m, HostAttention))
    assert layer.q_proj.weight.dtype == torch.float8_e4m3fn
    assert torch.equal(run(model, inputs), expected)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_torchao_int8(mechanism: str) -> None:
    quantization = hosts.library("torchao.quantization")
    model, inputs = converted(mechanism), batch()
    expected = run(model, inputs)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    found = run(model, inputs)
    assert not torch.equal(found, expected)
    assert (found - expected).norm() < 0.05 * expected.norm()
    weights = next(iter(ba.attention_maps(model, **inputs).values()))
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, 4, L))


# --- two processes --------------------------------------------------------------------------------------------------

WORKER = """
import sys
import warnings

warnings.simplefilter("ignore")
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

rank, store, tests, how = int(sys.argv[1]), *sys.argv[2:5]
sys.path.insert(0, tests)
from library.adapters.test_converted_elsewhere import MECHANISMS, batch, converted

dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
mesh = dist.init_device_mesh("cpu", (2,))
for mechanism in MECHANISMS:
    torch.manual_seed(3)
    model, both = converted(mechanism).train(), [batch(), batch()]

    def loss(of, inputs):
        return of(**inputs).last_hidden_state.square().mean()

    sum(loss(model, inputs) / 2 for inputs in both).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert any("q_proj" in name for name in expected)
    model.zero_grad()
    if how == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        for layer in model.encoder.layer:
            fully_shard(layer, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    loss(wrapped, both[rank]).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    for name, gradient in found.items():
        whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        torch.testing.assert_close(whole, expected[name], rtol=1e-4, atol=1e-6)
    assert (how == "ddp") != isinstance(found[next(n for n in found if "q_proj" in n)], DTensor)
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_gradients_of_two_processes_are_those_of_one(how: str, tmp_path: Path) -> None:
    hosts.transformers()
    run_two(WORKER, tmp_path / "store", TESTS, how, seconds=300)
