"""The language model against NumPy; causality, padding, size, initial weights, and one seed gives one model."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from better_attention import MECHANISMS, ModelCache, MultiheadAttention, assert_causal
from better_attention.lab.models.causal_decoder import POSITIONS
from better_attention.lab.models.language_model import LanguageModel, hidden_width, language_model_size
from better_attention.positions import alibi_slopes
from helpers import hosts, oracle
from helpers.compiler import Programs

VOCABULARY, LENGTH, WIDTH, HEADS, LAYERS = 7, 11, 12, 3, 2
NAMES = (*MECHANISMS, "super+expressive", "standard+align")
GROUPED = {"width": 24, "heads": 6, "kv_heads": 2}
"""Three query heads share one of keys and values."""
GROUPS = ("standard", "optimised", "expressive", "standard+align")
"""Mechanisms that project keys."""


def sizes(**changes: Any) -> dict[str, Any]:
    return {"vocabulary": VOCABULARY, "length": LENGTH, "width": WIDTH, "layers": LAYERS, "heads": HEADS} | changes


def build(mechanism: str = "standard", **changes: Any) -> LanguageModel:
    """A model in float64 whose parameters are all far from their start."""
    model = hosts.random(LanguageModel(mechanism=mechanism, **sizes(**changes)).double().eval())
    assert isinstance(model, LanguageModel)
    return model


def tokens(batch: int = 3, length: int = LENGTH) -> Tensor:
    return torch.randint(VOCABULARY, (batch, length))


# --- the formula ------------------------------------------------------------------------------------------------------


def rms(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * gain


def swiglu(x: np.ndarray, expand: np.ndarray, contract: np.ndarray) -> np.ndarray:
    gate, up = np.split(x @ expand.T, 2, axis=-1)
    return (gate / (1 + np.exp(-gate)) * up) @ contract.T


def turned(x: np.ndarray) -> np.ndarray:
    """Rotary positions as complex numbers; x (B, N, L, H)."""
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[2])[:, None] * 10_000.0 ** (-np.arange(half) / half)
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], axis=-1)


def attended(layer: dict[str, np.ndarray], x: np.ndarray, mechanism: str, positions: str) -> np.ndarray:
    """A layer by the oracle; its queries and keys turned, or its weights biased."""
    row, (B, L, D) = MECHANISMS[mechanism], x.shape
    w = oracle.Weights(
        heads=HEADS,
        **{name: layer.get(f"{name}_proj.weight") for name in "qkv"},
        o=layer["out_proj.weight"],
        align=layer.get("align.weight"),
        align_causal=True,
        score=row.score,
    )
    if positions != "rotary":
        far = np.arange(L)[:, None] - np.arange(L)
        bias = -np.array(alibi_slopes(HEADS))[:, None, None] * far
        places = {
            "learned": {},
            "alibi-weight": {"bias": np.broadcast_to(bias, (B, HEADS, L, L))},
            "alibi-score": {"inside": bias},
        }
        return oracle.multihead(w, x, x, x, causal=True, **places[positions])[0]
    q, k, v = (oracle.linear(x, m, None) for m in (w.q, w.k, w.v))
    if w.align is not None:
        v = np.stack([oracle.align(one, w.align, None, True) for one in v])
    apart = [a.reshape(B, L, HEADS, D // HEADS).transpose(0, 2, 1, 3) for a in (q, k, v)]
    out, _ = oracle.attention(turned(apart[0]), turned(apart[1]), apart[2], score=row.score, causal=True)
    return oracle.linear(out.transpose(0, 2, 1, 3).reshape(B, L, D), w.o, None)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_the_model_is_that_of_the_equations(mechanism: str, positions: str) -> None:
    model, read = build(mechanism, positions=positions), tokens()
    w = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    x = w["tokens.weight"][read.numpy()]
    if positions == "learned":
        x = x + w["positions.weight"]
    for n in range(LAYERS):
        block = {name.removeprefix(f"blocks.{n}."): value for name, value in w.items()}
        layer = {name.removeprefix("attention."): value for name, value in block.items()}
        x = x + attended(layer, rms(x, block["norm1.weight"]), mechanism, positions)
        x = x + swiglu(rms(x, block["norm2.weight"]), block["mlp.expand.weight"], block["mlp.contract.weight"])
    expected = rms(x, w["norm.weight"]) @ w["tokens.weight"].T
    np.testing.assert_allclose(model(read).detach().numpy(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("mechanism", GROUPS)
def test_shared_heads_are_equal_heads(mechanism: str, positions: str) -> None:
    """As a model with a head of keys and values for each query head, in which three neighbours are copies."""
    model, read = build(mechanism, positions=positions, **GROUPED), tokens()
    whole = build(mechanism, positions=positions, **GROUPED | {"kv_heads": None})
    state = model.state_dict()
    for name, x in state.items():
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            assert x.shape == (2 * 4, 24)
            state[name] = torch.cat([x[:4]] * 3 + [x[4:]] * 3)
    whole.load_state_dict(state)
    torch.testing.assert_close(model(read), whole(read), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("mechanism", "kv_heads", "kind", "message"),
    [
        ("standard", 4, ValueError, "^kv_heads=4 must divide heads=6: each head of keys and values"),
        ("standard", 0, ValueError, "^kv_heads must be >= 1, received 0"),
        ("standard", "two", TypeError, r"^kv_heads must be a whole number >= 1, received 'two' \(str\)"),
        ("efficient", 2, ValueError, "^kv_heads=2 groups projected keys, and mechanism 'efficient' has no W_K"),
        ("super", 2, ValueError, "Leave kv_heads out, or use a mechanism that learns 'k'"),
    ],
)
def test_heads_that_cannot_be_shared(mechanism: str, kv_heads: Any, kind: type[Exception], message: str) -> None:
    shape = sizes(**GROUPED | {"kv_heads": kv_heads}) | {"mechanism": mechanism}
    for make in (LanguageModel, language_model_size):
        with pytest.raises(kind, match=message):
            make(**shape)


# --- causality, padding -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("mechanism", NAMES)
def test_no_logit_knows_a_later_token(mechanism: str, positions: str, window: int | None) -> None:
    model = build(mechanism, positions=positions, window=window)
    assert_causal(model, tokens())
    assert_causal(model.float(), tokens())


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("mechanism", ["standard", "efficient+expressive", "super"])
def test_padding_in_front_changes_nothing(mechanism: str, positions: str) -> None:
    model, texts = build(mechanism, positions=positions, window=4 if mechanism == "super" else None), tokens(3, 6)
    padded = torch.cat([torch.randint(VOCABULARY, (3, 4)), texts], dim=1)
    padding = torch.arange(10).expand(3, -1) < 4
    torch.testing.assert_close(model(padded, padding_BL=padding)[:, 4:], model(texts))
    if positions == "learned":
        assert not torch.allclose(model(padded, padding_BL=padding, positions_BL=torch.arange(10))[:, 4:], model(texts))


def test_padding_is_refused_where_w_a_counts_it() -> None:
    model, x = build("super").requires_grad_(False), tokens()
    places = torch.arange(LENGTH).expand(3, -1)
    message = r"W_A counts places .* Pass texts of one length, or build the model with win"
    with pytest.raises(ValueError, match=message):
        model(x, padding_BL=places < 2)
    with pytest.raises(ValueError, match=message):
        model(x, padding_BL=places == 3)
    torch.testing.assert_close(model(x, padding_BL=places < 0), model(x))
    # Behind a text it changes nothing, as long as no token follows it.
    torch.testing.assert_close(model(x, padding_BL=places > 6)[:, :7], model(x)[:, :7])
    with pytest.raises(ValueError, match=message):
        model(x, padding_BL=places > 6, cache=ModelCache(model, 3))


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("mechanism", NAMES)
def test_one_layer_with_a_window_knows_no_earlier_token(mechanism: str, positions: str) -> None:
    model, x = build(mechanism, positions=positions, window=4, layers=1), tokens()
    other = torch.cat([(x[:, :1] + 1) % VOCABULARY, x[:, 1:]], dim=1)
    assert torch.equal(model(x)[:, 4:], model(other)[:, 4:])
    assert not torch.allclose(model(x)[:, 3], model(other)[:, 3])


# --- the cache --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("mechanism", NAMES)
def test_with_a_cache_as_in_one_pass(mechanism: str, positions: str, window: int | None, chunk: int) -> None:
    model, x = build(mechanism, positions=positions, window=window).requires_grad_(False), tokens()
    cache = ModelCache(model, 3)
    parts = [model(part, cache=cache) for part in x.split(chunk, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(x))
    assert cache.length == LENGTH


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("mechanism", GROUPS)
def test_with_a_cache_of_shared_heads(mechanism: str, positions: str, window: int | None) -> None:
    model, x = build(mechanism, positions=positions, window=window, **GROUPED).requires_grad_(False), tokens()
    cache = ModelCache(model, 3)
    parts = [model(part, cache=cache) for part in x.split(3, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(x))


@pytest.mark.parametrize("mechanism", NAMES)
def test_after_a_rewind_and_in_a_branch(mechanism: str) -> None:
    model, x = build(mechanism).requires_grad_(False), tokens()
    cache = ModelCache(model, 3)
    model(x[:, :8], cache=cache)
    branch = cache.branch()
    model(tokens(3, 3), cache=cache)
    cache.rewind(6)
    torch.testing.assert_close(model(x[:, 5:], cache=cache), model(x)[:, 5:])
    torch.testing.assert_close(model(x[:, 8:], cache=branch), model(x)[:, 8:])


def test_a_cache_holds_what_the_mechanism_needs() -> None:
    """Bytes of a token in float64: two tensors of width 12 in each of two layers, one for efficient."""
    for mechanism, tensors in (("standard", 2), ("optimised", 2), ("efficient", 1), ("super", 2)):
        model = build(mechanism).requires_grad_(False)
        cache = ModelCache(model, 3, max_len=LENGTH)
        model(tokens(), cache=cache)
        assert cache.nbytes == 3 * LENGTH * LAYERS * tensors * WIDTH * 8, mechanism


def test_a_cache_stops_at_the_longest() -> None:
    model = build("super").requires_grad_(False)
    cache = ModelCache(model, 3)
    model(tokens(), cache=cache)
    with pytest.raises(ValueError, match="at most 11 tokens, received 12"):
        model(tokens(3, 1), cache=cache)


# --- lengths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mechanism", "positions", "window", "longest"),
    [
        ("standard", "rotary", None, None),
        ("efficient", "alibi-weight", None, None),
        ("efficient", "learned", None, 11),
        ("super", "rotary", None, 11),
        ("super", "rotary", 4, None),
        ("super", "learned", 4, 11),
    ],
)
def test_what_can_be_read(mechanism: str, positions: str, window: int | None, longest: int | None) -> None:
    model = build(mechanism, positions=positions, window=window)
    assert model.longest == longest
    torch.testing.assert_close(model(x := tokens())[:, :4], model(x[:, :4]))
    if longest is None:
        assert model(tokens(1, 3 * LENGTH)).shape == (1, 3 * LENGTH, VOCABULARY)
    else:
        with pytest.raises(ValueError, match="at most 11 tokens, received 12"):
            model(tokens(1, 12))


def test_numbers_of_tokens_behind_a_cache_have_to_be_given_where_there_is_padding() -> None:
    model, x = build("efficient", positions="learned").requires_grad_(False), tokens(3, 4)
    cache = ModelCache(model, 3)
    model(x, cache=cache)
    padding = torch.arange(4).expand(3, -1) < 1
    with pytest.raises(ValueError, match="padding behind cached tokens: pass positions_BL"):
        model(x, padding_BL=padding, cache=cache)
    with pytest.raises(ValueError, match="at most 11 tokens, received 12"):
        model(x, positions_BL=torch.arange(8, 12).expand(3, -1), cache=cache)


def test_logits_of_some_tokens_alone() -> None:
    model, x = build("efficient"), tokens()
    whole = model(x)
    torch.testing.assert_close(model(x, last=3), whole[:, -3:])
    torch.testing.assert_close(model(x, last=100), whole)
    torch.testing.assert_close(model(x, last=torch.tensor([5, 2])), whole[:, [5, 2]])
    places = torch.tensor([[0, 3], [10, 1], [4, 4]])
    torch.testing.assert_close(model(x, last=places), torch.stack([whole[n, row] for n, row in enumerate(places)]))
    torch.testing.assert_close(model(x, last=x > 3), whole[x > 3])
    with pytest.raises(ValueError, match="last must be >= 1, received 0"):
        model(x, last=0)


@pytest.mark.parametrize(
    ("read", "kind", "message"),
    [
        (torch.zeros(3, 0), ValueError, r"no token to read: received shape \(3, 0\), expected .* Begin with one token"),
        (
            torch.zeros(3, dtype=torch.int64),
            ValueError,
            r"tokens must have the shape \(batch, tokens\), received a int64",
        ),
        (torch.zeros(1, 2), TypeError, r"tokens must be whole numbers, .* received a float32 tensor of shape \(1, 2\)"),
        ([[1, 2]], TypeError, r"tokens must be a tensor .* received \[\[1, 2\]\] \(list\)"),
        (
            torch.tensor([[1, 7]]),
            ValueError,
            "token 7 is unknown to this model, whose vocabulary is the 7 tokens from 0 ",
        ),
        (torch.tensor([[-1, 6]]), ValueError, "token -1 is unknown to this model"),
    ],
)
def test_what_is_no_text_is_refused(read: Any, kind: type[Exception], message: str) -> None:
    for cache in (None, ModelCache(model := build().requires_grad_(False), len(read))):
        with pytest.raises(kind, match=message):
            model(read, cache=cache)


def test_what_is_no_cache_is_refused() -> None:
    with pytest.raises(TypeError, match=r"cache must be a better_attention.ModelCache, received 3 \(int\). Make one"):
        build()(tokens(), cache=3)


def test_it_is_compiled_whole_and_exported() -> None:
    model, x = build("efficient", positions="learned").requires_grad_(False), tokens()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))
    sizes_of = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=LENGTH)},)
    exported = torch.export.export(model, (x,), dynamic_shapes=sizes_of).module()
    torch.testing.assert_close(exported(x[:2, :5]), model(x[:2, :5]))


# --- size, initial weights, training ----------------------------------------------------------------------------------


CASES: list[tuple[str, dict[str, Any]]] = [
    *((mechanism, {}) for mechanism in NAMES),
    *(("super", {"positions": positions, "scale": "learned", "width": 36}) for positions in POSITIONS),
    *((mechanism, {"window": 4}) for mechanism in NAMES),
    *((mechanism, GROUPED) for mechanism in GROUPS),
    ("standard+align", GROUPED | {"window": 4, "scale": "learned"}),
    ("efficient", GROUPED | {"kv_heads": 6}),
]


@pytest.mark.parametrize(("mechanism", "changes"), CASES)
def test_the_size_is_that_of_the_model(mechanism: str, changes: dict[str, Any]) -> None:
    shape = sizes(**changes) | {"mechanism": mechanism}
    assert language_model_size(**shape) == sum(p.numel() for p in LanguageModel(**shape).parameters())
    if "super" in mechanism or "align" in mechanism:
        model = LanguageModel(**shape, options={"align_heads": "per_head"})
        assert language_model_size(**shape, per_head=True) == sum(p.numel() for p in model.parameters())


def test_the_number_of_parameters_by_hand() -> None:
    """Four maps, an MLP of three maps of width 32, two norms a block; a norm and one table, used twice."""
    assert hidden_width(12) == 32
    assert language_model_size(**sizes()) == 2 * (4 * 144 + 3 * 12 * 32 + 2 * 12) + 12 + 7 * 12


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_every_parameter_is_trained(mechanism: str, positions: str) -> None:
    model = build(mechanism, positions=positions, scale="learned")
    model(tokens()).pow(2).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_initial_weights_are_gpt2s() -> None:
    """Standard deviation 0.02, of what is added to the residual stream 0.02 / sqrt(2 · 8); norms are 1."""
    model = LanguageModel(vocabulary=97, length=64, width=128, layers=8, heads=4, positions="learned")
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all()
        else:
            expected = 0.02 / 4 if name.endswith(("out_proj.weight", "contract.weight")) else 0.02
            deviation = float(parameter.detach().std()) / expected
            assert abs(deviation - 1) < 5 / math.sqrt(2 * parameter.numel()), name  # five of its own deviations
    layer = LanguageModel(**sizes(), mechanism="super", options={"align_init": "identity"}).blocks[0].attention
    assert isinstance(layer, MultiheadAttention)
    assert torch.equal(layer.align.weight, torch.eye(LENGTH))


def test_one_seed_gives_one_model() -> None:
    models = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        models.append(LanguageModel(**sizes(), mechanism="super"))
    x = tokens()
    assert torch.equal(models[0](x), models[1](x))
    assert not torch.equal(models[0](x), models[2](x))


def test_options_scale_and_dropout_arrive() -> None:
    model = build("super", dropout=0.4, scale=1.0, options={"align_heads": "per_head"})
    layers = [m for m in model.modules() if isinstance(m, MultiheadAttention)]
    assert [(a.dropout, a.scale, a.rotary, a.align.weight.shape) for a in layers] == [
        (0.4, 1.0, 10_000.0, (HEADS, LENGTH, LENGTH))
    ] * LAYERS
    assert all(isinstance(m, nn.Identity) or m.bias is None for a in layers for m in (a.q_proj, a.k_proj, a.out_proj))
    x = tokens()
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": "sine"}, "positions must be one of"),
        ({"width": 9}, "must be even"),
        ({"positions": "learned", "length": 0}, "length must be >= 1"),
        ({"vocabulary": 0}, "vocabulary must be >= 1"),
    ],
)
def test_what_cannot_be_built(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**change)


def test_a_step_after_an_interrupted_one_is_as_if_that_had_not_been() -> None:
    """Ctrl-C between two layers leaves the first with a token more."""
    torch.manual_seed(3)
    model = LanguageModel(vocabulary=7, length=12, width=16, layers=2, heads=2, mechanism="efficient").eval()
    tokens, cache = torch.randint(7, (1, 9)), ModelCache(model, 1)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with torch.no_grad():
        expected = model(tokens)
        model(tokens[:, :6], cache=cache)
        hook = model.blocks[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(tokens[:, 6:7], cache=cache)
        hook.remove()
        found = model(tokens[:, 6:], cache=cache)
    torch.testing.assert_close(found, expected[:, 6:], rtol=1e-4, atol=1e-5)
    assert cache.length == 9


def test_a_compiled_model_reads_its_cache_with_few_programs() -> None:
    torch._dynamo.reset()
    torch.manual_seed(3)
    sizes = {"vocabulary": 7, "length": 32, "width": 16, "layers": 3, "heads": 2}
    model = LanguageModel(mechanism="efficient", **sizes).eval().requires_grad_(False)
    programs = Programs("eager")
    compiled = torch.compile(model, backend=programs)
    tokens, cache = torch.randint(7, (2, 24)), ModelCache(model, 2, max_len=32)
    with torch.no_grad():
        steps = [compiled(token, cache=cache) for token in tokens.split(1, dim=1)]
        torch.testing.assert_close(torch.cat(steps, dim=1), model(tokens), rtol=1e-4, atol=1e-5)
    assert programs.count <= 3, "the first token, the second, and all others"
