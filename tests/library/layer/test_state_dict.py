"""Weights travel between torch's class and ours, in both of torch's layouts, and none is lost on the way."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import better_attention as ba
from helpers.layers import NAMED, layer, padding, refused, tokens

B, L, S, N, E = 2, 3, 5, 2, 6

STOCK_OPTIONS: dict[str, dict[str, object]] = {
    "packed": {},
    "packed without bias": {"bias": False},
    "packed with bias_k": {"add_bias_kv": True},
    "separate": {"kdim": 5, "vdim": 7},
    "separate, keys alone": {"kdim": 5},
    "separate, values alone": {"vdim": 7},
    "separate without bias": {"kdim": 5, "vdim": 7, "bias": False},
    "separate with bias_k": {"kdim": 5, "vdim": 7, "add_bias_kv": True, "add_zero_attn": True},
    "double": {"dtype": torch.float64},
}


def stock(**options: object) -> nn.MultiheadAttention:
    """torch's layer with every parameter random: its biases start as zeros, which would hide a lost bias."""
    module = nn.MultiheadAttention(E, N, batch_first=True, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
    return module


def inputs(module: nn.Module) -> list[Tensor]:
    dtype = module.out_proj.weight.dtype
    return [tokens(B, n, width, dtype=dtype) for n, width in ((L, E), (S, module.kdim), (S, module.vdim))]


def assert_same_function(one: nn.Module, other: nn.Module) -> None:
    x = inputs(one)
    for arguments in ({}, {"key_padding_mask": padding(B, S)}, {"need_weights": False}):
        found, expected = one(*x, **arguments), other(*x, **arguments)
        torch.testing.assert_close(found, expected)


# --- torch -> ours -> torch -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", STOCK_OPTIONS)
def test_torch_into_standard_and_back(layout: str) -> None:
    options = STOCK_OPTIONS[layout]
    source = stock(**options)
    ours = ba.MultiheadAttention(E, N, batch_first=True, **options)
    result = ours.load_state_dict(source.state_dict(), strict=True)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert_same_function(ours, source)

    back = stock(**options)
    back.load_state_dict(ours.to_torch_state_dict(), strict=True)
    assert_same_function(back, source)
    for key, value in source.state_dict().items():
        assert torch.equal(ours.to_torch_state_dict()[key], value), key


@pytest.mark.parametrize("layout", STOCK_OPTIONS)
def test_the_dictionary_given_is_not_changed(layout: str) -> None:
    state = stock(**STOCK_OPTIONS[layout]).state_dict()
    before = {k: v.clone() for k, v in state.items()}
    ours = ba.MultiheadAttention(E, N, **STOCK_OPTIONS[layout])
    ours.load_state_dict(state)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    torch.testing.assert_close(dict(state), before, rtol=0, atol=0)


@pytest.mark.parametrize("layout", STOCK_OPTIONS)
def test_assign_and_meta(layout: str) -> None:
    source = stock(**STOCK_OPTIONS[layout])
    ours = ba.MultiheadAttention(E, N, batch_first=True, **{**STOCK_OPTIONS[layout], "device": "meta"})
    ours.load_state_dict(source.state_dict(), assign=True)
    assert all(isinstance(p, nn.Parameter) and p.requires_grad and p.is_leaf for p in ours.parameters())
    assert_same_function(ours, source)
    torch.optim.SGD(ours.parameters(), lr=0.1)  # takes leaves only


def test_what_to_torch_returns_is_plain_and_detached() -> None:
    state = layer("standard").to_torch_state_dict()
    assert isinstance(state, Mapping)
    assert set(state) == {"in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"}
    assert not any(value.requires_grad for value in state.values())
    separate = ba.MultiheadAttention(E, N, kdim=5, vdim=7).to_torch_state_dict()
    assert set(separate) == {
        "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias",
    }  # fmt: skip


@pytest.mark.parametrize("name", [n for n in NAMED if n != "standard"])
def test_other_mechanisms_refuse_to_become_torch(name: str) -> None:
    refused(layer(name).to_torch_state_dict, name, "standard", kind=ValueError)


def test_a_scale_torch_cannot_express_is_refused_or_folded() -> None:
    refused(ba.MultiheadAttention(E, N, scale="learned").to_torch_state_dict, "scale", kind=ValueError)
    ours = layer("standard", scale=0.7, embed_dim=E, num_heads=N)
    try:
        state = ours.to_torch_state_dict()
    except ValueError as error:
        assert "scale" in str(error)  # noqa: PT017 - either outcome is right
    else:
        back = stock()
        back.load_state_dict(state)
        assert_same_function(back, ours)


# --- nothing is dropped without a word --------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["packed", "separate"])
@pytest.mark.parametrize(("name", "lost"), [("efficient", "kv"), ("optimised", "v"), ("super", "kv")])
def test_what_a_mechanism_has_no_place_for_is_reported(name: str, lost: str, layout: str) -> None:
    state = stock().state_dict()
    if layout == "separate":  # the same weights as torch writes them where kdim or vdim differ
        weights = state.pop("in_proj_weight").chunk(3)
        state |= dict(zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), weights, strict=True))
    else:
        weights = state["in_proj_weight"].chunk(3)
    module = layer(name, E, N, max_len=S)
    with pytest.raises(RuntimeError, match="Unexpected key") as caught:
        module.load_state_dict(state, strict=True)
    for letter in lost:
        assert f"{letter}_proj" in str(caught.value)
    result = module.load_state_dict(state, strict=False)
    assert len([k for k in result.unexpected_keys if k[:6] in {f"{letter}_proj" for letter in lost}]) >= len(lost)
    assert torch.equal(module.q_proj.weight, weights[0]), "what does fit is loaded"
    assert [k for k in result.missing_keys if "align" not in k] == []


def test_expressive_takes_the_weights_of_standard() -> None:
    """Same parameters, another function of them: loading is allowed, and the function is not torch's."""
    source, ours = stock(), layer("expressive", E, N)
    ours.load_state_dict(source.state_dict(), strict=True)
    assert torch.equal(ours.v_proj.bias, source.in_proj_bias[2 * E :])
    x = inputs(source)
    assert not torch.allclose(ours(*x)[0], source(*x)[0])


@pytest.mark.parametrize("missing", ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"])
def test_missing_parts_are_reported(missing: str) -> None:
    state = stock().state_dict()
    del state[missing]
    with pytest.raises(RuntimeError, match="Missing key"):
        layer("standard", E, N).load_state_dict(state)
    names = {"in_proj_weight": "weight", "in_proj_bias": "bias"}
    expected = {f"{p}_proj.{names[missing]}" for p in "qkv"} if missing in names else {missing}
    assert set(layer("standard", E, N).load_state_dict(state, strict=False).missing_keys) == expected


def test_extra_parts_are_reported() -> None:
    with_bias, without = stock(), ba.MultiheadAttention(E, N, bias=False)
    with pytest.raises(RuntimeError, match=r"(?s)Unexpected key.*bias"):
        without.load_state_dict(with_bias.state_dict())
    with pytest.raises(RuntimeError, match=r"(?s)Unexpected key.*bias_k"):
        layer("standard", E, N).load_state_dict(stock(add_bias_kv=True).state_dict())
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*extra_k"):
        layer("standard", E, N, add_bias_kv=True).load_state_dict(stock().state_dict())


@pytest.mark.parametrize("name", ["standard", "efficient"])
@pytest.mark.parametrize("shape", [(2 * E, E), (3 * E, E + 1), (3 * E + 1, E), (E, E), (3 * E,), ()])
def test_a_packed_weight_of_the_wrong_shape_is_refused(name: str, shape: tuple[int, ...]) -> None:
    module = layer(name, E, N)
    before = module.q_proj.weight.detach().clone()
    state = {**stock().state_dict(), "in_proj_weight": torch.zeros(shape)}
    with pytest.raises((RuntimeError, ValueError)):
        module.load_state_dict(state)
    if len(shape) == 2:
        assert torch.equal(module.q_proj.weight, before)


def test_both_layouts_at_once_are_not_merged_silently() -> None:
    """A dictionary with packed and own keys that disagree: whichever wins, the other is reported."""
    ours = layer("standard", E, N)
    state = {**stock().state_dict(), **layer("standard", E, N).state_dict()}
    with pytest.raises((RuntimeError, ValueError), match=r"in_proj|q_proj"):
        ours.load_state_dict(state)


# --- inside larger models ---------------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self, kind: type[nn.Module], **options: object) -> None:
        super().__init__()
        self.embed = nn.Linear(4, E)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"attention": kind(E, N, batch_first=True, **options), "feed": nn.Linear(E, E)})
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block["attention"](x, x, x, need_weights=False)[0]
            x = x + block["feed"](x)
        return x


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"add_bias_kv": True}])
def test_prefixes_of_larger_models(options: dict[str, object]) -> None:
    source, target = Model(nn.MultiheadAttention, **options), Model(ba.MultiheadAttention, **options)
    state = source.state_dict()
    keys = set(state)
    result = target.load_state_dict(state, strict=True)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert set(state) == keys
    x = tokens(B, S, 4, dtype=torch.float32)
    torch.testing.assert_close(target(x), source(x))

    twin = Model(ba.MultiheadAttention, **options)
    twin.load_state_dict(target.state_dict(), strict=True)  # our own names, too
    assert torch.equal(twin(x), target(x))


def test_missing_keys_of_larger_models_carry_the_prefix() -> None:
    state = Model(nn.MultiheadAttention).state_dict()
    del state["blocks.1.attention.in_proj_weight"]
    result = Model(ba.MultiheadAttention).load_state_dict(state, strict=False)
    assert set(result.missing_keys) == {f"blocks.1.attention.{p}_proj.weight" for p in "qkv"}


def test_whole_torch_transformer_loads_into_one_with_our_layers() -> None:
    source = nn.Transformer(E, N, 1, 1, 11, 0.0, batch_first=True)
    target = nn.Transformer(E, N, 1, 1, 11, 0.0, batch_first=True)
    for host in (*target.encoder.layers, *target.decoder.layers):
        for attribute in ("self_attn", "multihead_attn"):
            if hasattr(host, attribute):
                setattr(host, attribute, ba.MultiheadAttention(E, N, batch_first=True))
    target.load_state_dict(source.state_dict(), strict=True)
    x, y = tokens(B, S, E, dtype=torch.float32), tokens(B, L, E, dtype=torch.float32)
    torch.testing.assert_close(target(x, y), source(x, y))


def test_a_training_step_commutes_with_the_round_trip() -> None:
    """One step from the same weights, with the same gradients, ends at the same weights."""
    source, ours = stock(), layer("standard", E, N)
    ours.load_state_dict(source.state_dict())
    x = inputs(source)
    for module in (source, ours):
        optimiser = torch.optim.SGD(module.parameters(), lr=0.01)
        module(*x)[0].square().sum().backward()
        optimiser.step()
    back = ours.to_torch_state_dict()
    for key, value in source.state_dict().items():
        torch.testing.assert_close(back[key], value)


# --- storage, names of earlier versions, explanations -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["standard", "optimised", "efficient", "super"])
@pytest.mark.parametrize("layout", ["packed", "own names, one storage"])
@pytest.mark.parametrize("assign", [False, True])
def test_loaded_parameters_own_their_storage(name: str, layout: str, assign: bool) -> None:
    """Savers drop or refuse parameters that share storage as duplicates, or write all of it for each of them."""
    state = stock().state_dict()
    if layout != "packed":  # as a layer whose parameters were views of one storage was saved
        for kind in ("weight", "bias"):
            parts = state.pop(f"in_proj_{kind}").chunk(3)
            state |= {f"{p}_proj.{kind}": part for p, part in zip("qkv", parts, strict=True)}
    wanted = {p: state[f"{p}_proj.weight"] for p in "qkv" if f"{p}_proj.weight" in state}
    module = layer(name, E, N, max_len=S, device="meta" if assign else "cpu")
    module.load_state_dict(state, strict=False, assign=assign)
    loaded = [parameter for parameter in module.parameters() if not parameter.is_meta]
    assert len({p.untyped_storage().data_ptr() for p in loaded}) == len(loaded)
    assert all(p.untyped_storage().nbytes() == p.numel() * p.element_size() for p in loaded)
    for letter, value in wanted.items():
        if letter in module.mechanism.projections:
            assert torch.equal(getattr(module, f"{letter}_proj").weight, value)


def test_an_assigned_layer_is_saved_whole(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is in the `experiments` extra")
    source = stock()
    ours = ba.MultiheadAttention(E, N, batch_first=True, device="meta")
    ours.load_state_dict(source.state_dict(), assign=True)
    safetensors.save_model(ours, str(tmp_path / "layer.safetensors"))
    back = ba.MultiheadAttention(E, N, batch_first=True)
    safetensors.load_model(back, str(tmp_path / "layer.safetensors"))
    assert_same_function(back, source)


def test_a_tie_stays_a_tie() -> None:
    weight = torch.randn(E, E)
    state = {**layer("standard", E, N).state_dict(), "q_proj.weight": weight, "k_proj.weight": weight}
    module = layer("standard", E, N, device="meta")
    module.load_state_dict(state, assign=True)
    assert module.q_proj.weight.data_ptr() == module.k_proj.weight.data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("prefix", ["", "block.attention."])
def test_names_of_earlier_checkpoints_load(prefix: str) -> None:
    source = layer("standard", E, N, add_bias_kv=True, scale="learned")
    now = {"extra_k.weight": "bias_k", "extra_v.weight": "bias_v", "scaling.log_scale": "log_scale"}
    state = {prefix + now.get(name, name): value for name, value in source.state_dict().items()}
    target = layer("standard", E, N, add_bias_kv=True, scale="learned")
    host = nn.ModuleDict({"block": nn.ModuleDict({"attention": target})}) if prefix else target
    host.load_state_dict(state, strict=True)
    for earlier in now.values():
        assert torch.equal(getattr(target, earlier), getattr(source, earlier))
    x = inputs(source)
    assert torch.equal(target(*x)[0], source(*x)[0])


WEIGHTS = {
    "standard": "W_Q, W_K, W_V, W_O",
    "expressive": "W_Q, W_K, W_V, W_O",
    "optimised": "W_Q, W_K, W_O",
    "efficient": "W_Q, W_O",
    "super": "W_Q, W_O, W_A",
    "standard+align": "W_Q, W_K, W_V, W_O, W_A",
}
PAIRS = [(a, b) for a in WEIGHTS for b in WEIGHTS if WEIGHTS[a] != WEIGHTS[b]]


def shared(name: str) -> ba.MultiheadAttention:
    """The layer called ``name``, its W_A of one size whatever the mechanism."""
    return layer(name, E, N, **{"align_heads": "shared"} if "W_A" in WEIGHTS[name] else {})


def below(prefix: str, module: nn.Module) -> nn.Module:
    """The module as a part of a larger one, where its names have that prefix."""
    return nn.ModuleDict({"block": nn.ModuleDict({"attention": module})}) if prefix else module


@pytest.mark.parametrize("prefix", ["", "block.attention."])
@pytest.mark.parametrize(
    ("layout", "source", "target"),
    [*(("own", *pair) for pair in PAIRS), *(("packed", *pair) for pair in PAIRS if pair[0] == "standard")],
)
def test_weights_of_another_mechanism_are_named(source: str, target: str, layout: str, prefix: str) -> None:
    """Both ways: weights too many, weights missing, or both."""
    state = stock().state_dict() if layout == "packed" else layer(source, E, N).state_dict()
    module = below(prefix, layer(target, E, N))
    state = {prefix + n: v for n, v in state.items()}
    words = f"{target!r} has {WEIGHTS[target]}, these weights have {WEIGHTS[source]}:", "strict=False"
    message = refused(lambda: module.load_state_dict(state), *words, kind=RuntimeError)
    assert repr(source) in message.partition("with their mechanism, ")[2]
    assert message.count("these weights have") == 1
    assert message.count("_proj.weight") == len(different(source, target) - {"align"})


def different(source: str, target: str) -> set[str]:
    """The modules with weights that one of two mechanisms has and the other has not."""
    one, other = ({n.rpartition(".")[0] for n in layer(m, E, N).state_dict()} for m in (source, target))
    return one ^ other


@pytest.mark.parametrize("prefix", ["", "block.attention."])
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_a_load_that_is_not_strict_is_torchs(source: str, target: str, prefix: str) -> None:
    """The keys that it returns are ordinary texts in torch's order, and nothing stays behind in the layer."""
    state = {prefix + n: v for n, v in shared(source).state_dict().items()}
    module, bare = below(prefix, shared(target)), below(prefix, nn.ModuleDict(dict(shared(target)._modules)))
    found, theirs = module.load_state_dict(state, strict=False), bare.load_state_dict(state, strict=False)
    assert found == theirs
    for keys in (found.missing_keys, found.unexpected_keys):
        assert [f"{key}" for key in keys] == keys
        assert {type(key) for key in pickle.loads(pickle.dumps(keys))} <= {str}  # noqa: S301 - our own
    assert not any(part._load_state_dict_post_hooks for part in module.modules())
    assert module.load_state_dict(module.state_dict()) == ([], [])


def test_a_layer_in_two_places_explains_itself_in_both() -> None:
    shared = layer("standard", E, N)
    module = nn.ModuleDict({"first": shared, "second": shared})
    state = layer("efficient", E, N).state_dict()
    both = {f"{place}.{n}": v for place in ("first", "second") for n, v in state.items()}
    message = refused(lambda: module.load_state_dict(both), '"first.k_proj.weight: mech', kind=RuntimeError)
    assert '"second.k_proj.weight: mech' in message


@pytest.mark.parametrize("names", [("in_proj_weight",), ("q_proj_weight", "k_proj.weight")])
def test_weights_of_no_mechanism_are_left_to_torch(names: tuple[str, ...]) -> None:
    """A packed matrix of another height says nothing of the projections, and neither does a name that nobody knows."""
    state = {"out_proj.weight": torch.zeros(E, E), "out_proj.bias": torch.zeros(E)}
    state |= {name: torch.zeros(E + 1, E) for name in names}
    state |= {"q_proj.weight": torch.zeros(E, E)} if "q_proj_weight" in names else {}
    message = refused(lambda: layer("standard", E, N).load_state_dict(state), "Missing key(s)", kind=RuntimeError)
    assert "these weights have" not in message


def test_hooks_of_the_user_are_kept_and_called() -> None:
    module, called = layer("standard", E, N), []
    module.register_load_state_dict_post_hook(lambda _, keys: called.append(len(keys.missing_keys)))
    state = layer("efficient", E, N).state_dict()
    for times in (1, 2):
        module.load_state_dict(state, strict=False)
        assert called == [4] * times
    assert len(module._load_state_dict_post_hooks) == 1


def test_a_layer_loaded_without_hooks_can_be_copied_and_pickled() -> None:
    """As sharded training does, which loads module by module."""
    module, state = layer("standard", E, N), layer("efficient", E, N).state_dict()
    module._load_from_state_dict(state, "", {}, True, [], [], [])
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):  # noqa: S301 - our own
        assert not copied._load_state_dict_post_hooks
    assert module.load_state_dict(module.state_dict()) == ([], [])
    assert not module._load_state_dict_post_hooks


def test_a_kernel_of_another_size_is_named() -> None:
    source, target = layer("super", E, N, max_len=7), layer("super", E, N, max_len=5)
    refused(lambda: target.load_state_dict(source.state_dict()), "max_len=7", kind=RuntimeError)
    source = layer("super per head", E, N, max_len=5)
    refused(lambda: target.load_state_dict(source.state_dict()), "max_len=5", "'per_head'", kind=RuntimeError)


# --- pickled layers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["standard", "efficient", "super"])
def test_a_pickled_layer_needs_few_permissions(name: str) -> None:
    source = layer(name, E, N, max_len=S, add_bias_kv=name == "efficient").eval()
    buffer = io.BytesIO()
    torch.save(source, buffer)
    buffer.seek(0)
    needed = {type(m) for m in source.modules()}
    names = {f"{kind.__module__}.{kind.__qualname__}" for kind in needed}
    assert set(torch.serialization.get_unsafe_globals_in_checkpoint(buffer)) == names
    assert len(names) <= 4
    buffer.seek(0)
    with torch.serialization.safe_globals(list(needed)):
        twin = torch.load(buffer, weights_only=True)
    assert twin.mechanism == source.mechanism
    x = inputs(source)
    assert torch.equal(twin(*x)[0], source(*x)[0])
    twin.load_state_dict(layer("standard", E, N).state_dict(), strict=False)
