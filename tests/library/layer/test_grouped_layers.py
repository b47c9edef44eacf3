"""Layers whose keys and values have fewer heads than their queries, as objects: files, errors, cost, programs."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import better_attention as ba
from helpers.compiler import Programs
from helpers.grouped import (
    EVERY,
    MAX_LEN,
    MECHANISMS,
    B,
    D,
    H,
    L,
    N,
    S,
    drawn,
    three,
)
from helpers.layers import padding, refused, tokens

GROUPS = (1, 2, N)
FEWER = (1, 3)


# --- the object -------------------------------------------------------------------------------------------------------


def test_shapes_of_the_parameters() -> None:
    module = ba.MultiheadAttention(D, N, num_kv_heads=2, kdim=5, vdim=11, add_bias_kv=True)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    assert shapes == {
        "q_proj.weight": (D, D), "q_proj.bias": (D,),
        "k_proj.weight": (2 * H, 5), "k_proj.bias": (2 * H,),
        "v_proj.weight": (2 * H, 11), "v_proj.bias": (2 * H,),
        "out_proj.weight": (D, D), "out_proj.bias": (D,),
        "extra_k.weight": (1, 1, 2 * H), "extra_v.weight": (1, 1, 2 * H),
    }  # fmt: skip
    assert (module.bias_k.shape, module.bias_v.shape) == ((1, 1, 2 * H), (1, 1, 2 * H))
    assert module.k_proj_weight is module.k_proj.weight
    slices = ba.MultiheadAttention(D, N, num_kv_heads=2, mechanism="optimised", add_bias_kv=True)
    assert (slices.bias_k.shape, slices.bias_v.shape) == ((1, 1, 2 * H), (1, 1, D))
    for mechanism, heads in (("standard+align", 2), ("optimised+align", N)):
        for size in ({"max_len": 9}, {"window": 9}):
            aligned = ba.MultiheadAttention(D, N, num_kv_heads=2, mechanism=mechanism, align_heads="per_head", **size)
            assert (aligned.align.weight.shape, aligned.align.bias.shape) == ((heads, 9, 9), (heads, 9))
    assert ba.MultiheadAttention(D, N, num_kv_heads=2, scale="learned").log_scale.shape == (N,)
    assert (module.embed_dim, module.num_heads, module.head_dim, module.num_kv_heads) == (D, N, H, 2)


def test_the_number_reads_back_and_is_shown_where_it_differs() -> None:
    for groups in GROUPS:
        module = ba.MultiheadAttention(D, N, num_kv_heads=groups)
        assert module.num_kv_heads == groups
        assert (f"num_kv_heads={groups}" in repr(module)) == (groups != N)
    assert ba.MultiheadAttention(D, N).num_kv_heads == N
    for name in ba.MECHANISMS:
        size = {"max_len": 5} if name == "super" else {}
        same = ba.MultiheadAttention(D, N, num_kv_heads=N, mechanism=name, **size)
        assert same.num_kv_heads == N
        assert "num_kv_heads" not in repr(same)


@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}, {"kdim": 5, "vdim": 7}, {"bias": False}])
@pytest.mark.parametrize("mechanism", ba.MECHANISMS)
def test_as_many_heads_as_queries_is_the_ordinary_layer(mechanism: str, options: dict[str, Any]) -> None:
    """With the same initial draws, and as many random numbers taken."""
    if "kdim" in options and not {"k", "v"} <= ba.MECHANISMS[mechanism].projections:
        options = {}
    size = {"max_len": 5} if ba.MECHANISMS[mechanism].aligned else {}
    states, after = [], []
    for more in ({}, {"num_kv_heads": N}, {"num_kv_heads": None}):
        torch.manual_seed(3)
        states.append(ba.MultiheadAttention(D, N, mechanism=mechanism, **size, **options, **more).state_dict())
        after.append(torch.rand(()))
    for state in states[1:]:
        torch.testing.assert_close(dict(state), dict(states[0]), rtol=0, atol=0)
    assert after[0] == after[1] == after[2]


def test_initial_weights() -> None:
    """Glorot's bound of each matrix or of the packed one; never more, and biases of zero."""
    torch.manual_seed(5)
    module = ba.MultiheadAttention(240, 12, num_kv_heads=3)
    for part in (module.q_proj, module.k_proj, module.v_proj):
        loosest = (6 / (240 + part.out_features)) ** 0.5
        tightest = (6 / (240 + 3 * 240)) ** 0.5
        assert 0.9 * tightest < part.weight.abs().max() <= loosest
        assert not part.bias.any()
    before = copy.deepcopy(module.state_dict())
    torch.manual_seed(5)
    ba.MultiheadAttention.redraw(module)
    assert not torch.equal(module.k_proj.weight, before["k_proj.weight"]) or torch.equal(
        module.q_proj.weight, before["q_proj.weight"]
    )
    module.reset_parameters()
    assert not torch.equal(module.k_proj.weight, before["k_proj.weight"])


@pytest.mark.parametrize("groups", FEWER)
@pytest.mark.parametrize("name", EVERY)
def test_copies_files_and_devices(name: str, groups: int) -> None:
    options = EVERY[name]
    module = drawn(D, N, groups, **options, add_bias_kv=True).eval()
    x = tuple(x.float() for x in three(options))
    expected = module(*x)[0]
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    loaded, meta = (drawn(D, N, groups, **options, add_bias_kv=True).eval() for _ in range(2))
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    meta = meta.to("meta")
    meta.load_state_dict(module.state_dict(), assign=True)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded, meta):  # noqa: S301 - our own bytes
        assert twin.num_kv_heads == groups
        assert repr(twin) == repr(module)
        assert torch.equal(twin(*x)[0], expected)


# --- beside torch -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"kdim": 5, "vdim": 11}, {"kdim": 5}, {"add_bias_kv": True, "add_zero_attn": True}],
    ids=str,
)
@pytest.mark.parametrize("groups", GROUPS)
def test_torchs_class_computes_the_same_from_converted_weights(groups: int, options: dict[str, Any]) -> None:
    module = drawn(D, N, groups, **options)
    stock = nn.MultiheadAttention(D, N, batch_first=True, **options)
    stock.load_state_dict(module.to_torch_state_dict(), strict=True)
    x = tuple(x.float() for x in three(options))
    for arguments in ({}, {"key_padding_mask": padding(B, S)}, {"attn_mask": torch.randn(B * N, L, S)}):
        found = module(*x, **arguments, average_attn_weights=False)
        torch.testing.assert_close(found, stock(*x, **arguments, average_attn_weights=False), rtol=1e-4, atol=1e-5)
    # And from there into an ordinary layer.
    ordinary = ba.MultiheadAttention(D, N, batch_first=True, **options)
    ordinary.load_state_dict(stock.state_dict())
    torch.testing.assert_close(ordinary(*x)[0], module(*x)[0], rtol=1e-4, atol=1e-5)
    assert not any(value.requires_grad for value in module.to_torch_state_dict().values())


@pytest.mark.parametrize("mechanism", MECHANISMS[1:])
def test_other_mechanisms_do_not_become_torchs(mechanism: str) -> None:
    refused(drawn(D, N, 2, mechanism=mechanism).to_torch_state_dict, mechanism, "standard", kind=ValueError)


USES: dict[str, Callable[[nn.Module], object]] = {
    "shape": lambda m: m.in_proj_weight.shape,
    "data": lambda m: m.in_proj_weight.data,
    "an initialiser": lambda m: nn.init.xavier_uniform_(m.in_proj_weight),
    "a product": lambda m: m.in_proj_weight * 2,
    "a slice": lambda m: m.in_proj_weight[:D],
    "in place": lambda m: m.in_proj_weight.mul_(2),
    "chunks": lambda m: m.in_proj_weight.chunk(3),
    "rows": lambda m: list(m.in_proj_weight),
    "length": lambda m: len(m.in_proj_weight),
    "a function of torch": lambda m: torch.cat([m.in_proj_weight]),
    "a map": lambda m: nn.functional.linear(torch.zeros(2, D), m.in_proj_weight),
    "assignment": lambda m: setattr(m, "in_proj_weight", nn.Parameter(torch.zeros(3 * D, D))),
    "biases": lambda m: nn.init.zeros_(m.in_proj_bias),
    "assigned biases": lambda m: setattr(m, "in_proj_bias", nn.Parameter(torch.zeros(3 * D))),
    "an assigned tensor": lambda m: setattr(m, "in_proj_weight", torch.zeros(3 * D, D)),
    "torch's function": lambda m: nn.functional.multi_head_attention_forward(
        *[torch.zeros(L, B, D)] * 3, D, N, m.in_proj_weight, m.in_proj_bias, None, None, False, 0.0,
        m.out_proj.weight, m.out_proj.bias,
    ),
}  # fmt: skip


@pytest.mark.parametrize("use", USES)
def test_packed_weights_are_not_to_be_had(use: str) -> None:
    module = ba.MultiheadAttention(D, N, num_kv_heads=2)
    before = copy.deepcopy(module.state_dict())
    refused(lambda: USES[use](module), "num_kv_heads", kind=(AttributeError, TypeError, ValueError, RuntimeError))
    torch.testing.assert_close(dict(module.state_dict()), dict(before), rtol=0, atol=0)


def test_inside_torchs_transformers() -> None:
    """Where hosts read the packed weights of ordinary layers, in every mode."""
    host = nn.TransformerEncoderLayer(D, N, 11, dropout=0.0, batch_first=True)
    host.self_attn = drawn(D, N, 2)
    reference = copy.deepcopy(host)
    reference.self_attn = nn.MultiheadAttention(D, N, batch_first=True)
    reference.self_attn.load_state_dict(host.self_attn.to_torch_state_dict())
    x = tokens(B, S, D, dtype=torch.float32)
    for training in (True, False):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                ours, theirs = (
                    layer.train(training)(x, src_key_padding_mask=padding(B, S)) for layer in (host, reference)
                )
            shown = ~padding(B, S)
            torch.testing.assert_close(ours[shown], theirs[shown], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", ["standard", "optimised", "expressive", "standard+align", "efficient"])
@pytest.mark.parametrize("source", ["standard", "optimised"])
def test_a_converted_layer_works_or_is_refused(source: str, target: str) -> None:
    """What is called exact computes the same; what is refused is as it was."""
    x = tokens(B, S, D, dtype=torch.float32)
    size = {"max_len": S} if "align" in target else {}
    for exact in (True, False):
        model = nn.ModuleList([drawn(D, N, 2, mechanism=source)])
        before = model[0](x, x, x)[0]
        try:
            report = ba.convert(model, target, exact=exact, **size)
        except ValueError:
            assert torch.equal(model[0](x, x, x)[0], before)
            continue
        after = model[0](x, x, x)[0]
        assert after.isfinite().all()
        if report.exact:
            torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


# --- weights of another number of heads -------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "block.attention."])
@pytest.mark.parametrize(("source", "target"), [(2, 3), (N, 2), (1, N), (2, 1)])
@pytest.mark.parametrize("mechanism", ["standard", "optimised"])
def test_weights_of_another_number_of_heads_say_how_to_build(
    mechanism: str, source: int, target: int, prefix: str
) -> None:
    state = {prefix + k: v for k, v in drawn(D, N, source, mechanism=mechanism).state_dict().items()}
    module: nn.Module = drawn(D, N, target, mechanism=mechanism)
    module = nn.ModuleDict({"block": nn.ModuleDict({"attention": module})}) if prefix else module
    refused(lambda: module.load_state_dict(state), f"num_kv_heads={source}", kind=RuntimeError)


def test_torchs_packed_weights_do_not_load_into_fewer_heads() -> None:
    stock = nn.MultiheadAttention(D, N)
    refused(
        lambda: ba.MultiheadAttention(D, N, num_kv_heads=2).load_state_dict(stock.state_dict()),
        "num_kv_heads", kind=(RuntimeError, ValueError),
    )  # fmt: skip
    separate = nn.MultiheadAttention(D, N, kdim=5, vdim=11)
    refused(
        lambda: ba.MultiheadAttention(D, N, kdim=5, vdim=11, num_kv_heads=2).load_state_dict(separate.state_dict()),
        "num_kv_heads", kind=(RuntimeError, ValueError),
    )  # fmt: skip


def test_rows_that_are_no_heads_promise_nothing() -> None:
    """Five rows, and the weights of a wider model, of which no number of heads makes this layer."""
    five = drawn(D, N, 2).state_dict() | {"k_proj.weight": torch.zeros(5, D)}
    for state in (five, drawn(2 * D, 2 * N, 2 * N).state_dict()):
        with pytest.raises(RuntimeError, match="size mismatch") as caught:
            drawn(D, N, 2).load_state_dict(state)
        assert "num_kv_heads=" not in str(caught.value)


def test_w_a_of_another_number_of_heads_is_not_blamed() -> None:
    options = {"mechanism": "standard+align", "max_len": S, "align_heads": "per_head"}
    target, state = drawn(D, N, 1, **options), drawn(D, N, 2, **options).state_dict()
    message = refused(lambda: target.load_state_dict(state), "num_kv_heads=2", kind=RuntimeError)
    assert f"max_len={S}" not in message, "that is as it was built"


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [(0, ()), (-1, ()), (3, ("4", "divide")), (8, ("4",)), (1.5, ()), (2.0, ()), (True, ()), ("2", ()), ([2], ())],
)
def test_numbers_of_heads_that_cannot_be(given: Any, words: tuple[str, ...]) -> None:
    """In the layer and in its cost; what came is named, what is expected, and what to do."""
    for call in (
        lambda: ba.MultiheadAttention(24, 4, num_kv_heads=given),
        lambda: ba.MultiheadAttention(24, 4, num_kv_heads=given, mechanism="optimised"),
        lambda: ba.cost(24, 4, 8, num_kv_heads=given),
    ):
        kind = ValueError if type(given) is int else TypeError
        refused(call, "num_kv_heads", repr(given), *words, kind=kind)


@pytest.mark.parametrize("name", ["efficient", "super", "efficient+expressive", "super+expressive", "qvo"])
def test_mechanisms_without_keys_of_their_own_refuse_fewer_heads(name: str) -> None:
    mechanism = ba.Mechanism(frozenset("qvo")) if name == "qvo" else name
    size = {"max_len": 5} if "super" in name else {}
    for groups in (1, 2):
        for call in (
            lambda g=groups: ba.MultiheadAttention(24, 4, num_kv_heads=g, mechanism=mechanism, **size),
            lambda g=groups: ba.cost(24, 4, 5, num_kv_heads=g, mechanism=mechanism),
        ):
            refused(call, f"num_kv_heads={groups}", "W_K", kind=ValueError)
    assert ba.MultiheadAttention(24, 4, num_kv_heads=4, mechanism=mechanism, **size).num_kv_heads == 4


def test_numpy_integers_are_numbers() -> None:
    assert ba.MultiheadAttention(24, np.int64(4), num_kv_heads=np.int64(2)).num_kv_heads == 2


def test_a_mask_per_head_counts_query_heads() -> None:
    module, x = drawn(D, N, 2), tokens(B, S, D, dtype=torch.float32)
    refused(lambda: module(x, x, x, attn_mask=torch.zeros(B * 2, S, S, dtype=torch.bool)), f"{B * N}")


# --- cost -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("name", EVERY)
def test_cost(name: str, groups: int, bias: bool) -> None:
    """Parameters are those of the module, operations those that torch counts, bytes those of a cache."""
    options = EVERY[name]
    kept = {k: v for k, v in options.items() if k not in ("max_len", "align_causal")}
    module = drawn(
        D, N, groups, **(options | ({"max_len": S} if "max_len" in options else {})), bias=bias, impl="reference"
    )
    record = ba.cost(D, N, S, num_kv_heads=groups, bias=bias, **kept)
    assert record.params == sum(p.numel() for p in module.parameters())
    assert record.weight_bytes == 4 * record.params
    x = tokens(B, S, D, dtype=torch.float32, requires_grad=True)
    for backward in (False, True):
        counter = FlopCounterMode(display=False)
        with counter:
            output, _ = module(x, x, x, need_weights=True)
            if backward:
                output.sum().backward()
        assert ba.cost(D, N, S, num_kv_heads=groups, bias=bias, batch=B, backward=backward, **kept).flops == (
            counter.get_total_flops()
        )
    values = groups if "v" in module.mechanism.projections else N
    tensors = groups + values * (2 if module.mechanism.aligned else 1)  # values are remembered as they are and aligned
    assert record.cache_bytes_per_token == 4 * H * tensors
    assert ba.cost(D, N, S, num_kv_heads=groups, batch=B, **kept).cache_bytes == B * S * record.cache_bytes_per_token


def test_cost_by_formula() -> None:
    """Two products of the width and the width, and two with G/N of it; scores and mixes as before."""
    d, heads, length = 768, 12, 196
    for groups in (1, 3, 12):
        narrow = d * groups // heads
        forward = 2 * length * d * (2 * d + 2 * narrow) + 4 * length**2 * d
        record = ba.cost(d, heads, length, num_kv_heads=groups, backward=False)
        assert record.flops == forward
        assert record.params == 2 * d * (d + 1) + 2 * narrow * (d + 1)
        assert record.cache_bytes == length * 2 * narrow * 4
    windowed = ba.cost(d, heads, length, num_kv_heads=3, window=16)
    assert windowed.cache_bytes == 16 * 2 * (d // 4) * 4
    assert windowed.params == ba.cost(d, heads, length, num_kv_heads=3).params


# --- programs ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_program_for_every_length() -> None:
    torch._dynamo.reset()
    module = drawn(D, N, 2, mechanism="optimised").double()
    programs = Programs("aot_eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=programs)
    for length in (5, 3, 11):
        x = tokens(B, length, D, requires_grad=True)
        results = []
        for call in (module, compiled):
            x.grad = None
            module.zero_grad()
            output, _ = call(x, x, x, is_causal=True, need_weights=False)
            output.square().sum().backward()
            results.append((output.detach(), x.grad, module.k_proj.weight.grad))
        torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)
    assert programs.count <= 2, f"{programs.count} programs for 3 lengths"
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_an_exported_program(name: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = drawn(D, N, 2, **EVERY[name]).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    model = Model().eval()
    lengths = ({1: torch.export.Dim("length", min=2, max=MAX_LEN)},)
    program = torch.export.export(model, (tokens(B, 5, D, dtype=torch.float32),), dynamic_shapes=lengths).module()
    for length in (2, 5, 8):
        x = tokens(B, length, D, dtype=torch.float32)
        torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_vmap_and_functional_calls(mechanism: str) -> None:
    """Several layers' weights at once, as ensembles take them."""
    modules = [drawn(D, N, 3, mechanism=mechanism).eval() for _ in range(3)]
    parameters, _ = torch.func.stack_module_state(modules)
    x = tokens(B, S, D, dtype=torch.float32)

    def one(given: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(modules[0], given, (x, x, x), {"need_weights": False})[0]

    found = torch.func.vmap(one)(parameters)
    for output, module in zip(found, modules, strict=True):
        torch.testing.assert_close(output, module(x, x, x)[0], rtol=1e-4, atol=1e-5)
