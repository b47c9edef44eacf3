"""Inside torch's own transformers, where a drop-in is easily bypassed without a word.

In eval mode without gradients ``nn.TransformerEncoderLayer`` reads the weights off ``self_attn`` and runs standard
attention itself, never calling ``forward``. So these tests count calls. They count in a subclass, not in a hook: a hook
switches torch's fast path off and would hide the fault.
"""

from __future__ import annotations

import copy
import inspect
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.transformer import _get_clones

import better_attention as ba
from helpers.layers import ALL, CAUSAL, NAMED, layer, padding, refused, tokens, triangle

B, S, T, N, E = 3, 5, 7, 2, 6  # an even number of heads: an odd one switches torch's fast path off by itself
HOSTS = [name for name in ALL if name != "no projections"]

MODES: dict[str, tuple[bool, Callable[[], object]]] = {
    "train": (True, nullcontext),
    "eval": (False, nullcontext),
    "eval, no_grad": (False, torch.no_grad),
    "eval, inference_mode": (False, torch.inference_mode),
}

ENCODER_MASKS: dict[str, Callable[[], dict[str, object]]] = {
    "none": dict,
    "src_mask bool": lambda: {"src_mask": torch.rand(S, S).fill_diagonal_(1) < 0.4},
    "src_mask float": lambda: {"src_mask": torch.randn(S, S, dtype=torch.float64)},
    "padding": lambda: {"src_key_padding_mask": padding(B, S)},
    "both": lambda: {"src_mask": torch.rand(S, S).fill_diagonal_(1) < 0.4, "src_key_padding_mask": padding(B, S, 1)},
    "causal": lambda: {"src_mask": triangle(S), "is_causal": True},
    "causal and padding": lambda: {"src_mask": triangle(S), "is_causal": True, "src_key_padding_mask": padding(B, S)},
}


class Counted(ba.MultiheadAttention):
    """Counts the calls of ``forward`` of all its instances, copies included."""

    calls = 0

    def forward(self, *inputs: object, **arguments: object) -> tuple[Tensor, Tensor | None]:
        type(self).calls += 1
        return super().forward(*inputs, **arguments)


@pytest.fixture
def calls() -> Callable[[], int]:
    """Returns the calls since it was last asked."""

    def since() -> int:
        Counted.calls, count = 0, Counted.calls
        return count

    since()
    return since


def counted(name: str, **options: object) -> Counted:
    module = layer(name, E, N, **options).double()
    module.__class__ = Counted
    return module


def encoder_layer(name: str, *, norm_first: bool = False, **options: object) -> nn.TransformerEncoderLayer:
    host = nn.TransformerEncoderLayer(E, N, 11, dropout=0.0, batch_first=True, norm_first=norm_first).double()
    host.self_attn = counted(name, **options)
    return host


def run(host: nn.Module, mode: str, *inputs: Tensor, **arguments: object) -> Tensor:
    training, context = MODES[mode]
    with context():
        return host.train(training)(*inputs, **arguments).clone().detach()


@contextmanager
def torch_fast_path_off() -> Iterator[None]:
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def by_hand(host: nn.TransformerEncoderLayer, x: Tensor, attention: nn.Module, arguments: dict[str, object]) -> Tensor:
    """The encoder layer written out (its own documentation, figures 1 of arXiv 1706.03762 and 2002.04745)."""
    masks = {"attn_mask": arguments.get("src_mask"), "key_padding_mask": arguments.get("src_key_padding_mask")}
    feed = lambda x: host.linear2(torch.relu(host.linear1(x)))  # noqa: E731
    if host.norm_first:
        y = host.norm1(x)
        x = x + attention(y, y, y, **masks)[0]
        return x + feed(host.norm2(x))
    x = host.norm1(x + attention(x, x, x, **masks)[0])
    return host.norm2(x + feed(x))


# --- encoder ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize(
    ("name", "mask"), [(n, m) for n in HOSTS for m in ENCODER_MASKS if n in CAUSAL or "causal" not in m]
)
def test_encoder_layer_calls_the_mechanism_in_every_mode(
    name: str, mask: str, norm_first: bool, calls: Callable[[], int]
) -> None:
    host, x, arguments = encoder_layer(name, norm_first=norm_first), tokens(B, S, E), ENCODER_MASKS[mask]()
    independent = layer(name, E, N, impl="reference").double()
    independent.load_state_dict(host.self_attn.state_dict())
    expected = by_hand(host, x, independent, arguments)
    for mode in MODES:
        output = run(host, mode, x, **arguments)
        assert calls() == 1, mode
        torch.testing.assert_close(output, expected, msg=lambda text, mode=mode: f"{mode}: {text}")


@pytest.mark.parametrize("mode", ["train", "eval, no_grad"])
@pytest.mark.parametrize("name", HOSTS)
def test_padding_and_masks_keep_their_meaning(name: str, mode: str) -> None:
    """What is hidden does not matter, bit by bit, NaN included; what is shown does."""
    host, x = encoder_layer(name), tokens(B, S, E)
    hidden = padding(B, S)
    other = torch.where(hidden[..., None], torch.full_like(x, torch.nan), x)
    before, after = (run(host, mode, y, src_key_padding_mask=hidden)[~hidden] for y in (x, other))
    assert torch.equal(before, after)
    assert not torch.allclose(run(host, mode, x)[1:], run(host, mode, x, src_key_padding_mask=hidden)[1:])
    if name in CAUSAL:
        later = torch.cat([x[:, :3], torch.full_like(x[:, 3:], 1e3)], dim=1)
        causal = {"src_mask": triangle(S), "is_causal": True}
        assert torch.equal(run(host, mode, x, **causal)[:, :3], run(host, mode, later, **causal)[:, :3])
        assert not torch.allclose(run(host, mode, x)[:, :3], run(host, mode, later)[:, :3])


@pytest.mark.parametrize("replaced", ["before the encoder is built", "after"])
@pytest.mark.parametrize("name", HOSTS)
def test_encoder_with_nested_tensors_enabled(name: str, replaced: str, calls: Callable[[], int]) -> None:
    x, hidden = tokens(B, S, E), padding(B, S)
    if replaced == "after":
        stock = nn.TransformerEncoderLayer(E, N, 11, dropout=0.0, batch_first=True).double()
        encoder = nn.TransformerEncoder(stock, 3, enable_nested_tensor=True)
        for host in encoder.layers:
            host.self_attn = counted(name)
    else:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="enable_nested_tensor is True, but")  # torch says what is true
            encoder = nn.TransformerEncoder(encoder_layer(name), 3, enable_nested_tensor=True)
    expected = run(encoder, "train", x, src_key_padding_mask=hidden)
    assert calls() == 3
    for mode in MODES:
        output = run(encoder, mode, x, src_key_padding_mask=hidden)
        assert calls() == 3, mode
        assert output.shape == x.shape, "a nested tensor was made and cut to the longest sample"
        torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("name", [name for name in HOSTS if name in CAUSAL])
def test_encoder_detects_and_passes_on_a_causal_mask(name: str, calls: Callable[[], int]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="enable_nested_tensor is True, but")
        encoder = nn.TransformerEncoder(encoder_layer(name), 2)
    x = tokens(B, S, E)
    mask = nn.Transformer.generate_square_subsequent_mask(S, dtype=torch.float64)
    for mode in MODES:
        told, detected = run(encoder, mode, x, mask=mask, is_causal=True), run(encoder, mode, x, mask=mask)
        assert calls() == 4
        torch.testing.assert_close(told, detected)
        later = torch.cat([x[:, :3], x[:, 3:] + 9], dim=1)
        assert torch.equal(run(encoder, mode, later, mask=mask)[:, :3], detected[:, :3])
        calls()


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("mask", ENCODER_MASKS)
def test_standard_equals_the_stock_encoder(mask: str, norm_first: bool, batch_first: bool) -> None:
    stock = nn.TransformerEncoderLayer(E, N, 11, 0.0, batch_first=batch_first, norm_first=norm_first).double()
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.normal_(std=0.5)
    ours = copy.deepcopy(stock)
    ours.self_attn = ba.MultiheadAttention(E, N, batch_first=batch_first).double()
    ours.self_attn.load_state_dict(stock.self_attn.state_dict())
    x, arguments = tokens(*((B, S, E) if batch_first else (S, B, E))), ENCODER_MASKS[mask]()
    for mode in MODES:
        output = run(ours, mode, x, **arguments)
        if mask != "src_mask float":  # torch's fast path takes every bias that is not 0 for "masked", and returns NaN
            torch.testing.assert_close(output, run(stock, mode, x, **arguments))
        with torch_fast_path_off():
            torch.testing.assert_close(output, run(stock, mode, x, **arguments))


def test_the_count_notices_a_bypass() -> None:
    """The negative control: a subclass of torch's own class, asked the same way, is not called."""

    class Deaf(nn.MultiheadAttention):
        calls = 0

        def forward(self, *inputs: object, **arguments: object) -> tuple[Tensor, Tensor | None]:
            type(self).calls += 1
            return super().forward(*inputs, **arguments)

    host = nn.TransformerEncoderLayer(E, N, 11, dropout=0.0, batch_first=True).double()
    host.self_attn = Deaf(E, N, batch_first=True).double()
    run(host, "eval, no_grad", tokens(B, S, E))
    assert Deaf.calls == 0


# --- decoder ----------------------------------------------------------------------------------------------------------


def decoder_layer(name: str, *, norm_first: bool = False) -> nn.TransformerDecoderLayer:
    host = nn.TransformerDecoderLayer(E, N, 11, dropout=0.0, batch_first=True, norm_first=norm_first).double()
    host.self_attn, host.multihead_attn = counted(name), counted(name)
    return host


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("name", HOSTS)
def test_decoder_layer(name: str, norm_first: bool, calls: Callable[[], int]) -> None:
    host, target, memory = decoder_layer(name, norm_first=norm_first), tokens(B, S, E), tokens(B, T, E)
    arguments: dict[str, object] = {
        "tgt_key_padding_mask": padding(B, S, 1),
        "memory_key_padding_mask": padding(B, T),
        "memory_mask": torch.rand(S, T) < 0.3,
    }
    arguments["memory_mask"][:, 0] = False
    if name in CAUSAL:
        arguments |= {"tgt_mask": triangle(S), "tgt_is_causal": True}
    expected = run(host, "train", target, memory, **arguments)
    assert calls() == 2
    for mode in MODES:
        torch.testing.assert_close(run(host, mode, target, memory, **arguments), expected)
        assert calls() == 2, mode
    hidden = padding(B, T)
    poisoned = torch.where(hidden[..., None], torch.full_like(memory, 1e6), memory)
    expected = run(host, "eval, no_grad", target, memory, **arguments)
    assert torch.equal(run(host, "eval, no_grad", target, poisoned, **arguments), expected)
    if name in CAUSAL:
        later = torch.cat([target[:, :2], target[:, 2:] - 7], dim=1)
        assert torch.equal(run(host, "eval, no_grad", later, memory, **arguments)[:, :2], expected[:, :2])


@pytest.mark.parametrize("name", HOSTS)
def test_decoder_stack(name: str, calls: Callable[[], int]) -> None:
    decoder = nn.TransformerDecoder(decoder_layer(name), 3, norm=nn.LayerNorm(E).double())
    target, memory = tokens(B, S, E), tokens(B, T, E)
    arguments = {"tgt_mask": triangle(S)} if name in CAUSAL else {}
    outputs = []
    for mode in MODES:
        outputs.append(run(decoder, mode, target, memory, memory_key_padding_mask=padding(B, T), **arguments))
        assert calls() == 6, mode
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0])


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", HOSTS)
def test_whole_transformer(name: str, batch_first: bool, calls: Callable[[], int]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="enable_nested_tensor is True, but")  # torch, of batch_first=False
        model = nn.Transformer(E, N, 2, 2, 11, dropout=0.0, batch_first=batch_first).double()
    for host in (*model.encoder.layers, *model.decoder.layers):
        for attribute in ("self_attn", "multihead_attn"):
            if hasattr(host, attribute):
                setattr(host, attribute, counted(name, batch_first=batch_first))
    source, target = (tokens(*((B, length, E) if batch_first else (length, B, E))) for length in (T, S))
    arguments: dict[str, object] = {"src_key_padding_mask": padding(B, T), "memory_key_padding_mask": padding(B, T)}
    if name in CAUSAL:
        arguments["tgt_mask"] = triangle(S)
    outputs = []
    for mode in MODES:
        outputs.append(run(model, mode, source, target, **arguments))
        assert calls() == 6, mode
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0])


def test_standard_equals_the_stock_transformer() -> None:
    stock = nn.Transformer(E, N, 2, 2, 11, dropout=0.0, batch_first=True).double()
    ours = copy.deepcopy(stock)
    for host in (*ours.encoder.layers, *ours.decoder.layers):
        for attribute in ("self_attn", "multihead_attn"):
            if hasattr(host, attribute):
                replacement = ba.MultiheadAttention(E, N, batch_first=True).double()
                replacement.load_state_dict(getattr(host, attribute).state_dict())
                setattr(host, attribute, replacement)
    source, target = tokens(B, T, E), tokens(B, S, E)
    hidden = padding(B, T)
    arguments = {"tgt_mask": triangle(S), "memory_key_padding_mask": hidden, "tgt_key_padding_mask": padding(B, S, 1)}
    for mode in MODES:
        torch.testing.assert_close(
            run(ours, mode, source, target, **arguments), run(stock, mode, source, target, **arguments)
        )


# --- copies, names, signatures, initial weights -----------------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTS)
def test_clones_are_whole_and_independent(name: str) -> None:
    host = encoder_layer(name)
    clones = _get_clones(host, 3)
    x = tokens(B, S, E)
    expected = run(host, "eval", x)
    for clone in clones:
        assert clone.self_attn.mechanism == host.self_attn.mechanism
        torch.testing.assert_close(run(clone, "eval", x), expected, rtol=0, atol=0)
    pointers = [{p.data_ptr() for p in clone.parameters()} for clone in clones]
    assert not pointers[0] & pointers[1]


def test_signatures_are_those_of_torch() -> None:
    stock, ours = (inspect.signature(c.__init__).parameters for c in (nn.MultiheadAttention, ba.MultiheadAttention))
    for theirs, mine in zip(stock.values(), list(ours.values())[: len(stock)], strict=True):
        assert (mine.name, mine.default, mine.kind) == (theirs.name, theirs.default, theirs.kind)
    own = list(ours.values())[len(stock) :]
    assert {p.name: p.default for p in own} == {
        "mechanism": "standard",
        "max_len": None,
        "align_heads": "shared",
        "align_causal": False,
        "align_init": "xavier",
        "scale": None,
        "rotary": None,
        "window": None,
        "alibi": None,
        "num_kv_heads": None,
        "impl": "auto",
    }
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in own)
    forwards = [inspect.signature(c.forward).parameters for c in (nn.MultiheadAttention, ba.MultiheadAttention)]
    described = [[(p.name, p.default, p.kind) for p in forward.values()] for forward in forwards]
    assert described[1][: len(described[0])] == described[0]
    assert described[1][len(described[0]) :] == [("cache", None, inspect.Parameter.KEYWORD_ONLY)]


def test_signature_of_attention() -> None:
    parameters = inspect.signature(ba.attention).parameters
    assert list(parameters)[:3] == ["query", "key", "value"]
    assert {p.name: p.default for p in list(parameters.values())[3:]} == {
        "score": "softmax",
        "attn_mask": None,
        "is_causal": False,
        "offset": 0,
        "window": None,
        "dropout_p": 0.0,
        "scale": None,
        "enable_gqa": False,
        "need_weights": False,
        "impl": "auto",
    }
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in list(parameters.values())[3:])


def test_positional_arguments_mean_what_they_mean_in_torch() -> None:
    stock = nn.MultiheadAttention(E, N, 0.0, True, True, True, 5, 7, True)
    ours = ba.MultiheadAttention(E, N, 0.0, True, True, True, 5, 7, True)
    ours.load_state_dict(stock.state_dict())
    q, k, v = tokens(B, 3, E), tokens(B, S, 5), tokens(B, S, 7)
    q, k, v = q.float(), k.float(), v.float()
    mask = torch.rand(3, S) < 0.3
    positional = (q, k, v, padding(B, S), True, mask, False, False)
    torch.testing.assert_close(ours(*positional), stock(*positional))


@pytest.mark.parametrize("name", NAMED)
def test_attributes_that_hosts_read(name: str) -> None:
    module = layer(name, E, N, dropout=0.25, batch_first=True)
    stock = nn.MultiheadAttention(E, N, dropout=0.25, batch_first=True)
    for attribute in ("embed_dim", "num_heads", "head_dim", "kdim", "vdim", "dropout", "batch_first", "add_zero_attn"):
        assert getattr(module, attribute) == getattr(stock, attribute), attribute
    assert module.bias_k is None
    assert module.bias_v is None
    assert module.mechanism is ba.MECHANISMS[name]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"add_bias_kv": True},
        {"kdim": 5, "vdim": 7},
        {"kdim": 5, "bias": False, "add_bias_kv": True, "add_zero_attn": True},
        {"dtype": torch.float64},
    ],
)
def test_same_seed_same_initial_weights_as_torch(options: dict[str, object]) -> None:
    """Also the second layer's: as many random numbers are drawn, so a whole model starts from the same weights."""
    states = []
    for kind in (nn.MultiheadAttention, ba.MultiheadAttention):
        torch.manual_seed(3)
        pair = [kind(12, 3, **options) for _ in range(2)]
        convert = nn.Module.state_dict if kind is nn.MultiheadAttention else ba.MultiheadAttention.to_torch_state_dict
        states.append([convert(module) for module in pair])
    for stock, ours in zip(*states, strict=True):
        torch.testing.assert_close(dict(ours), dict(stock), rtol=0, atol=0)


# --- hosts that read or initialise the attributes of torch's layer ----------------------------------------------------

INITIALISERS: dict[str, Callable[[Tensor], object]] = {
    "normal_": lambda t: nn.init.normal_(t, std=3.0),
    "xavier_uniform_": nn.init.xavier_uniform_,
    "trunc_normal_": lambda t: nn.init.trunc_normal_(t, std=3.0),
    "zeros_": nn.init.zeros_,
    "data.fill_": lambda t: t.data.fill_(2.0),
    "detach().mul_": lambda t: t.detach().mul_(2.0),
    "slice": lambda t: t[: len(t) // 3].data.uniform_(4.0, 5.0),
    "chunk": lambda t: t.chunk(3)[0].detach().zero_(),
}


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("initialise", INITIALISERS)
@pytest.mark.parametrize("name", NAMED)
def test_what_is_written_to_packed_weights_reaches_the_projections(
    name: str, initialise: str, mode: Callable[[], object]
) -> None:
    """As torch's layer would hold it after the same initialiser from the same seed, where the mechanism learns it."""
    module, stock = layer(name, E, N), nn.MultiheadAttention(E, N)
    with torch.no_grad():
        stock.in_proj_weight.copy_(module.in_proj_weight)
    before = module.in_proj_weight.detach().clone()
    for attention in (stock, module):
        torch.manual_seed(5)
        with mode():
            INITIALISERS[initialise](attention.in_proj_weight)
    expected = dict(zip("qkv", stock.in_proj_weight.chunk(3), strict=True))
    for letter in "qkv":
        if letter in module.mechanism.projections:
            assert torch.equal(getattr(module, f"{letter}_proj").weight, expected[letter]), letter
            assert getattr(module, f"{letter}_proj").weight.is_leaf
    assert not torch.equal(module.in_proj_weight, before)


@pytest.mark.parametrize("name", NAMED)
def test_packed_biases_are_written_through_or_none(name: str) -> None:
    module = layer(name, E, N)
    assert module.in_proj_bias.shape == (3 * E,)
    nn.init.constant_(module.in_proj_bias, 0.25)
    kept = [getattr(module, f"{p}_proj").bias for p in "qkv" if p in module.mechanism.projections]
    assert all(bool((bias == 0.25).all()) for bias in kept)
    assert ba.MultiheadAttention(E, N, bias=False).in_proj_bias is None
    separate = ba.MultiheadAttention(E, N, kdim=5, vdim=7)
    assert separate.in_proj_weight is None
    assert separate.k_proj_weight is separate.k_proj.weight
    nn.init.ones_(separate.in_proj_bias)
    assert bool((separate.v_proj.bias == 1).all())


@pytest.mark.parametrize("name", NAMED)
def test_packed_weights_read_as_what_the_layer_computes(name: str) -> None:
    """Unlearned maps are identities; gradients of what a host computes from the packed weights reach the parameters."""
    module, x = layer(name, E, N).double(), tokens(4, E)
    projected = nn.functional.linear(x, module.in_proj_weight, module.in_proj_bias)
    expected = torch.cat([module.q_proj(x), module.k_proj(x), module.v_proj(x)], dim=-1)
    torch.testing.assert_close(projected, expected)
    projected.square().sum().backward()
    assert torch.equal(module.in_proj_weight.grad[:E], module.q_proj.weight.grad)
    assert module.q_proj.weight.grad.abs().max() > 0
    module.in_proj_weight.requires_grad_(False)
    assert not module.q_proj.weight.requires_grad
    module.q_proj.weight.flag = True
    assert hasattr(module.in_proj_weight, "flag") is (len(module.mechanism.projections & set("qkv")) == 1)


@pytest.mark.parametrize("name", ["optimised", "efficient", "super"])
def test_trained_weights_are_not_dropped(name: str) -> None:
    module, stock = layer(name, E, N), nn.MultiheadAttention(E, N)
    before = module.q_proj.weight.detach().clone()

    def assign() -> None:
        module.in_proj_weight.data = stock.in_proj_weight.data

    for write in (lambda: module.in_proj_weight.detach().copy_(stock.in_proj_weight.detach()), assign):
        refused(write, name, ("W_K", "W_V"), kind=ValueError)
    assert torch.equal(module.q_proj.weight, before)


@pytest.mark.parametrize("name", NAMED)
def test_torchs_function_does_not_compute_another_mechanism(name: str) -> None:
    module, x = layer(name, E, N).double(), tokens(S, B, E)
    arguments = (x, x, x, E, N, module.in_proj_weight, module.in_proj_bias, None, None, False, 0.0)
    output = (module.out_proj.weight, module.out_proj.bias)
    if name in ("super", "expressive"):
        with pytest.raises(TypeError, match=f"(?s)standard attention.*{name}.*call the layer"):
            nn.functional.multi_head_attention_forward(*arguments, *output)
    else:
        module.batch_first = False
        torch.testing.assert_close(
            nn.functional.multi_head_attention_forward(*arguments, *output)[0], module(x, x, x)[0]
        )


ASSIGNMENTS: dict[str, Callable[[nn.Module, str, Tensor], object]] = {
    "a parameter": lambda module, name, new: setattr(module, name, nn.Parameter(new)),
    "a tensor": lambda module, name, new: setattr(module, name, new),
    "in place": lambda module, name, new: setattr(module, name, getattr(module, name).mul_(0).add_(new)),
}


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_what_is_assigned_to_packed_weights_reaches_the_projections(kind: str, assignment: str) -> None:
    """As converters of checkpoints do, and ``layer.in_proj_weight *= 2``."""
    module, name = layer("standard", E, N), f"in_proj_{kind}"
    keys = set(module.state_dict())
    new = torch.randn_like(getattr(nn.MultiheadAttention(E, N), name))
    with torch.no_grad():
        ASSIGNMENTS[assignment](module, name, new)
    for letter, part in zip("qkv", new.chunk(3), strict=True):
        projection = getattr(module, f"{letter}_proj")
        assert torch.equal(getattr(projection, kind), part)
        assert getattr(projection, kind).untyped_storage().nbytes() == part.numel() * part.element_size()
    assert set(module.state_dict()) == keys


def test_what_cannot_be_assigned_to_packed_weights_is_refused() -> None:
    def assign(module: nn.Module, name: str, value: object) -> Callable[[], None]:
        return lambda: setattr(module, name, value)

    weight = nn.Parameter(torch.randn(3 * E, E))
    refused(assign(layer("efficient", E, N), "in_proj_weight", weight), "W_K", "'standard'", kind=ValueError)
    refused(assign(layer("standard", E, N), "in_proj_weight", weight[:E]), (3 * E, E), (E, E), kind=ValueError)
    refused(assign(layer("standard", E, N), "in_proj_bias", None), "in_proj_bias", "bias=False", kind=TypeError)
    bare = layer("standard", E, N, bias=False)
    bare.in_proj_bias = None  # as it is
    refused(assign(bare, "in_proj_bias", weight[:, 0]), "no in_proj_bias", "q_proj", kind=TypeError)


def test_packed_weights_leave_the_layer_as_ordinary_tensors() -> None:
    module = layer("efficient", E, N)
    expected = module.in_proj_weight.detach().clone()
    buffer = io.BytesIO()
    torch.save({"weight": module.in_proj_weight}, buffer)
    buffer.seek(0)
    for left in (torch.load(buffer, weights_only=True)["weight"], copy.deepcopy(module.in_proj_weight)):
        assert type(left) is Tensor
        assert torch.equal(left, expected)
        left.zero_()
    assert torch.equal(module.in_proj_weight, expected)


def initialise_as_clip_does(model: nn.Module, width: int, layers: int) -> None:
    """The attention part of OpenAI CLIP's ``initialize_parameters`` (MIT licence)."""
    for block in model.layers:
        nn.init.normal_(block.self_attn.in_proj_weight, std=width**-0.5)
        nn.init.normal_(block.self_attn.out_proj.weight, std=(width**-0.5) * ((2 * layers) ** -0.5))


def convert_as_clip_does(module: nn.Module) -> None:
    """The attention part of OpenAI CLIP's ``convert_weights`` (MIT licence)."""
    if isinstance(module, nn.Linear):
        for parameter in module.parameters():
            parameter.data = parameter.data.half()
    if isinstance(module, ba.MultiheadAttention):
        for attribute in (
            "in_proj_weight",
            "q_proj_weight",
            "k_proj_weight",
            "v_proj_weight",
            "in_proj_bias",
            "bias_k",
            "bias_v",
        ):
            tensor = getattr(module, attribute)
            if tensor is not None:
                tensor.data = tensor.data.half()


@pytest.mark.parametrize("name", NAMED)
def test_clips_initialiser_and_conversion(name: str) -> None:
    width = 64
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="enable_nested_tensor is True, but")
        host = nn.TransformerEncoderLayer(width, N, 11, batch_first=True)
        host.self_attn = layer(name, width, N, add_bias_kv=True)
        model = nn.TransformerEncoder(host, 2)
    initialise_as_clip_does(model, width, 2)
    for block in model.layers:
        for projection in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj):
            if isinstance(projection, nn.Linear):
                assert projection.weight.std().item() == pytest.approx(width**-0.5, rel=0.1)
    attention = model.layers[0].self_attn
    attention.in_proj_weight.data = attention.in_proj_weight.data.half()
    assert attention.q_proj.weight.dtype == torch.float16
    model.apply(convert_as_clip_does)
    assert {p.dtype for n, p in model.named_parameters() if "self_attn" in n and "align" not in n} == {torch.float16}


@pytest.mark.parametrize("name", NAMED)
def test_weights_as_torch_draws_them_after_a_hosts_loop(name: str) -> None:
    """nn.Transformer and DETR draw every matrix by itself, (D, D) here, where torch's layer has one (3D, D)."""
    width = 64
    model = nn.Sequential(
        layer(name, width, N, add_bias_kv=True, **({"align_init": "identity"} if name == "super" else {}))
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    looped = model[0].q_proj.weight.abs().max().item()
    output = model[0].out_proj.weight.clone()
    ba.MultiheadAttention.redraw(model)
    stock = nn.MultiheadAttention(width, N).in_proj_weight.abs().max().item()
    assert looped == pytest.approx(stock * 2**0.5, rel=0.02)
    for projection in (model[0].q_proj, model[0].k_proj, model[0].v_proj):
        if isinstance(projection, nn.Linear):
            assert projection.weight.abs().max().item() == pytest.approx(stock, rel=0.02)
            assert not projection.bias.any()
    assert torch.equal(model[0].out_proj.weight, output)
    if name == "super":
        assert torch.equal(model[0].align.weight, torch.eye(7))


@pytest.mark.parametrize("name", NAMED)
def test_where_there_is_nothing_to_pack_the_message_says_what_there_is(name: str) -> None:
    module = layer(name, E, N).double()
    module.q_proj = nn.Sequential(module.q_proj)  # as adapters do
    for use in (nn.init.zeros_, nn.init.normal_, nn.init.xavier_uniform_, lambda t: t.shape, lambda t: t.data):
        for packed in (module.in_proj_weight, module.in_proj_bias):
            assert packed is not None
            refused(lambda u=use, p=packed: u(p), "q_proj", "reset_parameters()", kind=(TypeError, AttributeError))
    host, x = encoder_layer(name), tokens(B, S, E)
    host.self_attn = module
    expected = run(host, "train", x)
    for mode in MODES:
        torch.testing.assert_close(run(host, mode, x), expected)
