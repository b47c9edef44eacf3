"""A good citizen among modules: copying, saving, dtypes, autocast, hooks, parametrisations."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import better_attention as ba
from helpers.layers import ALL, LAYERS, NAMED, layer, padding, tokens, triangle

B, S, N, E, MAX_LEN = 3, 5, 2, 6, 7
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


def linear(name: str, width: int = E) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (E, width), f"{name}.bias": (E,)}


FROZEN_NAMES: dict[str, dict[str, tuple[int, ...]]] = {
    "standard": {**linear("q_proj"), **linear("k_proj"), **linear("v_proj"), **linear("out_proj")},
    "optimised": {**linear("q_proj"), **linear("k_proj"), **linear("out_proj")},
    "efficient": {**linear("q_proj"), **linear("out_proj")},
    "super": {**linear("q_proj"), **linear("out_proj"), "align.weight": (MAX_LEN, MAX_LEN), "align.bias": (MAX_LEN,)},
    "expressive": {**linear("q_proj"), **linear("k_proj"), **linear("v_proj"), **linear("out_proj")},
    "super per head": {
        **linear("q_proj"),
        **linear("out_proj"),
        "align.weight": (N, MAX_LEN, MAX_LEN),
        "align.bias": (N, MAX_LEN),
    },
    "efficient+expressive learned scale": {**linear("q_proj"), **linear("out_proj"), "scaling.log_scale": (N,)},
    "no projections": {},
}
"""Parameter names and shapes are the format of every checkpoint: a change here is a breaking change."""


def outputs(module: nn.Module, *, need_weights: bool = True, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.linspace(-1, 1, B * S * E, dtype=torch.float64).sin().view(B, S, E).to(dtype)
    return module(x, x.flip(1), x * 2, key_padding_mask=padding(B, S), need_weights=need_weights)[0]


# --- copies, checkpoints, dtypes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FROZEN_NAMES)
def test_names_and_shapes_of_the_parameters_are_frozen(name: str) -> None:
    module = layer(name, E, N, max_len=MAX_LEN)
    assert {n: tuple(p.shape) for n, p in module.named_parameters()} == FROZEN_NAMES[name]
    assert set(module.state_dict()) == set(FROZEN_NAMES[name])


def test_names_of_the_optional_parameters_are_frozen() -> None:
    module = ba.MultiheadAttention(E, N, bias=False, add_bias_kv=True, kdim=5, vdim=7)
    assert {n: tuple(p.shape) for n, p in module.named_parameters()} == {
        "q_proj.weight": (E, E),
        "k_proj.weight": (E, 5),
        "v_proj.weight": (E, 7),
        "out_proj.weight": (E, E),
        "extra_k.weight": (1, 1, E),
        "extra_v.weight": (1, 1, E),
    }
    without = ba.MultiheadAttention(E, N, mechanism="super", max_len=MAX_LEN, bias=False)
    assert {n for n, _ in without.named_parameters()} == {"q_proj.weight", "out_proj.weight", "align.weight"}


@pytest.mark.parametrize("name", ALL)
def test_projections_are_plain_modules(name: str) -> None:
    """``nn.Linear`` itself, so that LoRA, quantisation and pruning find it; ``nn.Identity`` where dropped."""
    module = layer(name)
    kept = module.mechanism.projections
    for letter, attribute in zip("qkvo", PROJECTIONS, strict=True):
        assert type(getattr(module, attribute)) is (nn.Linear if letter in kept else nn.Identity), attribute
    assert isinstance(module.align, nn.Identity) is not module.mechanism.aligned


@pytest.mark.parametrize("name", ALL)
def test_deepcopy_is_independent(name: str) -> None:
    module = layer(name)
    before = outputs(module)
    twin = copy.deepcopy(module)
    assert torch.equal(outputs(twin), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    assert torch.equal(outputs(module), before)
    if list(module.parameters()):
        assert not torch.equal(outputs(twin), before)


@pytest.mark.parametrize("name", ALL)
def test_pickle(name: str) -> None:
    module = layer(name, dropout=0.25).eval()
    twin = pickle.loads(pickle.dumps(module))  # noqa: S301 - our own bytes; torch users pickle whole modules
    assert torch.equal(outputs(twin), outputs(module))
    assert twin.mechanism == module.mechanism
    assert twin.dropout == 0.25
    assert repr(twin) == repr(module)


@pytest.mark.parametrize("name", ALL)
def test_state_dict_through_torch_save(name: str) -> None:
    source, target = layer(name), layer(name)
    buffer = io.BytesIO()
    torch.save(source.state_dict(), buffer)
    buffer.seek(0)
    target.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    assert torch.equal(outputs(target), outputs(source))


@pytest.mark.parametrize("name", [n for n in ALL if n != "no projections"])
def test_missing_and_extra_keys_are_named(name: str) -> None:
    module = layer(name)
    for missing in module.state_dict():
        state = module.state_dict()
        del state[missing]
        with pytest.raises(RuntimeError, match=f'(?s)Missing key.*"{missing}"'):
            module.load_state_dict(state)
        assert module.load_state_dict(state, strict=False).missing_keys == [missing]
    with pytest.raises(RuntimeError, match=r'(?s)Unexpected key.*"rotary"'):
        module.load_state_dict({**module.state_dict(), "rotary": torch.zeros(1)})
    wrong = {k: torch.zeros(*v.shape, 1) for k, v in module.state_dict().items()}
    with pytest.raises(RuntimeError, match="size mismatch"):
        module.load_state_dict(wrong)


@pytest.mark.parametrize("name", ALL)
def test_assign_takes_the_tensors_themselves(name: str) -> None:
    module = layer(name)
    state = {k: v.double() for k, v in layer(name).state_dict().items()}
    module.load_state_dict(state, assign=True)
    for key, parameter in module.named_parameters():
        assert parameter.dtype == torch.float64
        assert parameter.data_ptr() == state[key].data_ptr()
        assert isinstance(parameter, nn.Parameter)
    assert outputs(module, dtype=torch.float64).isfinite().all()


@pytest.mark.parametrize("how", ["context", "argument"])
@pytest.mark.parametrize("name", ALL)
def test_built_on_meta_then_loaded(name: str, how: str) -> None:
    source = layer(name)
    if how == "context":
        with torch.device("meta"):
            target = layer(name)
    else:
        target = layer(name, device="meta")
    assert all(p.is_meta for p in target.parameters())
    target.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(outputs(target), outputs(source))
    emptied = layer(name, device="meta").to_empty(device="cpu")
    emptied.load_state_dict(source.state_dict())
    assert torch.equal(outputs(emptied), outputs(source))


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_shapes_on_meta(name: str, need_weights: bool) -> None:
    """Models are sized before they are built: a call on the meta device has shapes and no numbers."""
    module, x = layer(name, device="meta"), torch.empty(B, S, E, device="meta")
    mask = torch.zeros(B, S, dtype=torch.bool, device="meta")
    bias = torch.zeros(S, S, device="meta")
    output, weights = module(x, x, x, key_padding_mask=mask, attn_mask=bias, need_weights=need_weights)
    assert output.is_meta
    assert output.shape == x.shape
    assert (weights.shape == (B, S, S)) if need_weights else weights is None


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_dtypes(name: str, need_weights: bool) -> None:
    module = layer(name)
    exact = outputs(copy.deepcopy(module).double(), need_weights=need_weights, dtype=torch.float64)
    for dtype, tolerance in [(torch.float32, 1e-5), (torch.float16, 2e-2), (torch.bfloat16, 2e-1)]:
        found = outputs(copy.deepcopy(module).to(dtype), need_weights=need_weights, dtype=dtype)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=tolerance * max(1, exact.abs().max().item()))
    assert all(p.dtype == torch.float16 for p in copy.deepcopy(module).half().parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ALL)
def test_dtype_argument(name: str, dtype: torch.dtype) -> None:
    module = layer(name, dtype=dtype, add_bias_kv=name == "standard")
    assert all(p.dtype == dtype for p in module.parameters())
    assert outputs(module, dtype=dtype).dtype == dtype


# --- autocast and mixed dtypes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", [n for n in ALL if n != "no projections"])
def test_autocast_gives_the_dtypes_of_stock(name: str, training: bool, need_weights: bool) -> None:
    module, stock = layer(name).train(training), nn.MultiheadAttention(E, N, batch_first=True).train(training)
    exact, _ = module(*(x := [tokens(B, S, E, dtype=torch.float32, requires_grad=True) for _ in range(3)]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = stock(*x, need_weights=need_weights)
        output, weights = module(*x, need_weights=need_weights)
    assert output.dtype == expected[0].dtype == torch.bfloat16
    assert (weights is None) == (expected[1] is None)
    if weights is not None:
        assert weights.dtype == expected[1].dtype
    torch.testing.assert_close(output.float(), exact, rtol=0, atol=0.1 * max(1, exact.abs().max().item()))
    output.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in (*x, *module.parameters()))


@pytest.mark.parametrize("mask", ["attn_mask", "key_padding_mask", "is_causal"])
@pytest.mark.parametrize("name", ["standard", "super causal", "expressive", "efficient+expressive learned scale"])
def test_masks_keep_their_meaning_under_autocast(name: str, mask: str) -> None:
    module = layer(name)
    x = tokens(B, S, E, dtype=torch.float32)
    arguments = {
        "attn_mask": {"attn_mask": torch.zeros(S, S).masked_fill(triangle(S), -torch.inf)},
        "key_padding_mask": {"key_padding_mask": padding(B, S)},
        "is_causal": {"is_causal": True},
    }[mask]
    changed = x.clone()
    changed[1:, -1] += 100.0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before, after = module(x, x, x, **arguments)[0], module(changed, changed, changed, **arguments)[0]
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.equal(before[1:, -1], after[1:, -1])


@pytest.mark.parametrize("mask_dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["standard", "expressive"])
def test_a_mask_of_another_float_type_is_read_rightly_or_refused(
    name: str, dtype: torch.dtype, mask_dtype: torch.dtype
) -> None:
    module = layer(name).to(dtype)
    x = tokens(B, S, E, dtype=dtype)
    mask = torch.full((S, S), -1.5, dtype=mask_dtype).tril().masked_fill(triangle(S), torch.finfo(mask_dtype).min)
    same = torch.full((S, S), -1.5, dtype=dtype).tril().masked_fill(triangle(S), -torch.inf)
    expected, _ = module(x, x, x, attn_mask=same)
    try:
        found, _ = module(x, x, x, attn_mask=mask)
    except (ValueError, TypeError) as error:
        assert dtype != mask_dtype
        assert str(mask_dtype) in str(error)  # noqa: PT017 - either outcome is right
    else:
        torch.testing.assert_close(found, expected)


# --- hooks, parametrisations, replaced sub-modules, distributed wrappers ------------------------------------------


def submodules(module: ba.MultiheadAttention) -> list[str]:
    return [*PROJECTIONS, "align"]


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad", "inference_mode"])
@pytest.mark.parametrize("name", ALL)
def test_every_submodule_is_called_once(name: str, mode: str) -> None:
    """torch's own class never calls its ``out_proj``, so hooks, pruning and LoRA miss it."""
    module = layer(name).train(mode == "train")
    calls: dict[str, int] = dict.fromkeys(submodules(module), 0)
    for attribute in calls:

        def count(*_: object, attribute: str = attribute) -> None:
            calls[attribute] += 1

        getattr(module, attribute).register_forward_hook(count)
    contexts = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
    with contexts.get(mode, torch.enable_grad)():
        outputs(module, need_weights=False)
    assert calls == dict.fromkeys(submodules(module), 1)


@pytest.mark.parametrize("name", ALL)
def test_hooks_may_replace_outputs_and_see_gradients(name: str) -> None:
    module = layer(name)
    seen: list[str] = []
    for attribute in PROJECTIONS:
        getattr(module, attribute).register_full_backward_hook(lambda *_, attribute=attribute: seen.append(attribute))
    x = tokens(B, S, E, dtype=torch.float32, requires_grad=True)
    module(x, x, x)[0].sum().backward()
    assert sorted(seen) == sorted(PROJECTIONS)
    for attribute in PROJECTIONS:
        before = outputs(module)
        handle = getattr(module, attribute).register_forward_hook(lambda _, __, output: output * 1.5 + output.sin())
        assert not torch.allclose(outputs(module), before), f"{attribute}: the hook's output was thrown away"
        handle.remove()


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2 + weight.sign()


@pytest.mark.parametrize("name", [n for n in ALL if n != "no projections"])
def test_parametrisations_act(name: str) -> None:
    for attribute in submodules(layer(name)):
        module = layer(name)
        child = getattr(module, attribute)
        if isinstance(child, nn.Identity):
            continue
        before, weight = outputs(module), child.weight.detach().clone()
        parametrize.register_parametrization(child, "weight", Doubled())
        plain = layer(name)
        plain.load_state_dict(
            {k: v for k, v in module.state_dict().items() if "parametrizations" not in k}, strict=False
        )
        with torch.no_grad():
            getattr(plain, attribute).weight.copy_(Doubled()(weight))
        assert not torch.allclose(outputs(module), before)
        torch.testing.assert_close(outputs(module), outputs(plain))


@pytest.mark.parametrize("name", ["standard", "super", "expressive"])
def test_weight_norm_and_pruning(name: str) -> None:
    module = layer(name)
    before = outputs(module).detach()
    parametrizations.weight_norm(module.q_proj)
    parametrizations.weight_norm(module.out_proj)
    torch.testing.assert_close(outputs(module), before)
    outputs(module).sum().backward()
    assert module.q_proj.parametrizations.weight.original0.grad.abs().max() > 0
    pruned = layer(name)
    prune.random_unstructured(pruned.out_proj, "weight", amount=1.0)
    torch.testing.assert_close(outputs(pruned), pruned.out_proj.bias.expand(B, S, E))


class LowRank(nn.Module):
    """LoRA in four lines: what adapter libraries put in the place of a linear map."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.a, self.b = base, nn.Linear(base.in_features, 2, False), nn.Linear(2, base.out_features, False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))


@pytest.mark.parametrize("name", [n for n in ALL if n != "no projections"])
def test_low_rank_adapters_take_the_place_of_the_projections(name: str) -> None:
    module = layer(name).requires_grad_(False)
    before = outputs(module)
    for attribute in PROJECTIONS:
        if isinstance(child := getattr(module, attribute), nn.Linear):
            setattr(module, attribute, LowRank(child))
    assert not torch.allclose(outputs(module), before)
    outputs(module).square().sum().backward()
    adapters = {n: p for n, p in module.named_parameters() if ".a." in n or ".b." in n}
    assert len(adapters) == 2 * len(module.mechanism.projections)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapters.values())


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("name", [n for n in ALL if n != "no projections"])
def test_no_parameter_is_unused(name: str, need_weights: bool) -> None:
    """DistributedDataParallel stops at the first parameter without a gradient."""
    module = layer(name, max_len=S, add_bias_kv=name == "standard")
    x = tokens(B, S, E, dtype=torch.float32)
    module(x, x, x, need_weights=need_weights)[0].square().sum().backward()
    for key, parameter in module.named_parameters():
        assert parameter.grad is not None, key
        if key != "k_proj.bias" or module.mechanism.score != "softmax":  # softmax is blind to a constant in a row
            assert parameter.grad.abs().max() > 0, key


@pytest.fixture
def one_process_group() -> object:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.usefixtures("one_process_group")
@pytest.mark.parametrize("name", [n for n in ALL if n != "no projections"])
def test_distributed_data_parallel(name: str) -> None:
    module = layer(name)
    wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(module), find_unused_parameters=False)
    x = tokens(B, S, E, dtype=torch.float32)
    for _ in range(2):  # unused parameters are reported at the second step
        wrapped.zero_grad()
        wrapped(x, x, x, need_weights=False)[0].square().sum().backward()
    module(x, x, x, need_weights=False)[0].square().sum().backward()
    for found, expected in zip(wrapped.parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")  # so does nn.Linear itself
@pytest.mark.usefixtures("one_process_group")
@pytest.mark.parametrize("name", NAMED)
def test_fully_sharded_from_meta(name: str) -> None:
    from torch.distributed.fsdp import fully_shard

    source = layer(name)
    module = layer(name, device="meta")
    fully_shard(module, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    module.to_empty(device="cpu")
    with torch.no_grad():
        for target, value in zip(module.parameters(), source.parameters(), strict=True):
            target.to_local().copy_(value)
    assert torch.equal(outputs(module), outputs(source))


def test_every_layer_of_the_shared_table_is_named_or_a_corner() -> None:
    assert set(NAMED) <= set(LAYERS)
