"""What is exact: one head in every mechanism of softmax, the way upwards for any number of heads, and nothing else."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import better_attention as ba
from helpers import oracle
from helpers.layers import padding, refused, tokens, triangle

B, L, S, E = 3, 5, 7, 6
SOFTMAX = [name for name, row in ba.MECHANISMS.items() if row.score == "softmax"]
UPWARDS = [
    ("efficient", "optimised"),
    ("efficient", "standard"),
    ("optimised", "standard"),
    ("efficient", "super"),
    ("efficient", "efficient"),
    ("super", "standard+align"),
]


def trained(module: nn.Module) -> nn.Module:
    """Every parameter random: a bias of zero would hide that it is ignored."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, dtype=torch.float64))
    return module.eval()


def torchs(heads: int, **options: object) -> nn.Sequential:
    """Torch's layer in a container, float64."""
    options = {"batch_first": True, "dtype": torch.float64, **options}
    return nn.Sequential(trained(nn.MultiheadAttention(E, heads, **options)))


def ours(mechanism: str, heads: int) -> nn.Sequential:
    row = ba.Mechanism.of(mechanism)
    layer = ba.MultiheadAttention(
        E, heads, mechanism=row, max_len=S if row.aligned else None, batch_first=True, dtype=torch.float64
    )
    return nn.Sequential(trained(layer))


def cross() -> tuple[Tensor, Tensor]:
    return tokens(B, L, E, requires_grad=True), tokens(B, S, E, requires_grad=True)


MASKS = {
    "none": {},
    "padding": {"key_padding_mask": padding(B, S)},
    "triangle": {"attn_mask": triangle(L, S)},
    "bias": {"attn_mask": torch.linspace(-2, 2, L * S, dtype=torch.float64).view(L, S)},
    "bias and padding": {
        "attn_mask": torch.linspace(-2, 2, L * S, dtype=torch.float64).view(L, S),
        "key_padding_mask": torch.zeros(B, S, dtype=torch.float64).masked_fill(padding(B, S), -torch.inf),
    },
}


def output_and_gradients(layer: nn.Module, x: Tensor, y: Tensor, masks: dict[str, Tensor]) -> tuple[Tensor, ...]:
    output = layer(x, y, y, **masks, need_weights=False)[0]
    return output, *torch.autograd.grad(output.sin().sum(), (x, y))


@pytest.mark.parametrize("masks", list(MASKS))
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("mechanism", SOFTMAX)
def test_one_head_folds_exactly_into_every_mechanism_of_softmax(mechanism: str, bias: bool, masks: str) -> None:
    model, (x, y) = torchs(1, bias=bias), cross()
    before = output_and_gradients(model[0], x, y, MASKS[masks])
    aligned = ba.Mechanism.of(mechanism).aligned
    causal = True if aligned and masks == "triangle" else None  # a causal mask needs a triangular W_A
    report = ba.convert(model, mechanism, max_len=S if aligned else None, align_causal=causal)
    assert report.exact
    assert isinstance(model[0], ba.MultiheadAttention)
    assert model[0].mechanism.name == mechanism
    for old, new in zip(before, output_and_gradients(model[0], x, y, MASKS[masks]), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-11, atol=1e-11)


def as_numpy(x: Tensor | None) -> np.ndarray | None:
    return None if x is None else x.detach().numpy()


def test_the_folded_weights_give_the_same_numbers_by_the_oracle() -> None:
    model, (x, y) = torchs(1), cross()
    old = model[0]
    wq, wk, wv = (as_numpy(w) for w in old.in_proj_weight.chunk(3))
    bq, bk, bv = (as_numpy(b) for b in old.in_proj_bias.chunk(3))
    whole = oracle.Weights(
        heads=1, q=wq, k=wk, v=wv, o=as_numpy(old.out_proj.weight), q_bias=bq, k_bias=bk, v_bias=bv,
        o_bias=as_numpy(old.out_proj.bias),
    )  # fmt: skip
    ba.convert(model, "efficient")
    new = model[0]
    folded = oracle.Weights(
        heads=1,
        q=as_numpy(new.q_proj.weight),
        q_bias=as_numpy(new.q_proj.bias),
        o=as_numpy(new.out_proj.weight),
        o_bias=as_numpy(new.out_proj.bias),
    )
    args = (as_numpy(x), as_numpy(y), as_numpy(y))
    for old_numbers, new_numbers in zip(oracle.multihead(whole, *args), oracle.multihead(folded, *args), strict=True):
        np.testing.assert_allclose(new_numbers, old_numbers, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("heads", [1, 2, 3])
@pytest.mark.parametrize(("below", "above"), UPWARDS)
def test_the_way_upwards_is_exact_for_every_number_of_heads(below: str, above: str, heads: int) -> None:
    model, (x, y) = ours(below, heads), cross()
    masks = MASKS["bias and padding"]
    before = output_and_gradients(model[0], x, y, masks)
    report = ba.convert(model, above, max_len=S if above == "super" else None)
    assert report.exact
    assert model[0].mechanism.name == above
    for old, new in zip(before, output_and_gradients(model[0], x, y, masks), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-11, atol=1e-11)


SHARED: list[tuple[str, dict[str, object]]] = [
    ("standard", {}),
    ("optimised", {}),
    ("standard", {"add_bias_kv": True, "rotary": True}),
    ("standard+align", {"max_len": S, "align_heads": "per_head", "align_causal": True}),
]


def shared(mechanism: str, width: int = 24, **options: object) -> nn.Sequential:
    """A layer of ours whose six query heads share two of keys and values."""
    given: dict[str, object] = {"batch_first": True, "dtype": torch.float64, "num_kv_heads": 2, **options}
    return nn.Sequential(trained(ba.MultiheadAttention(width, 6, mechanism=mechanism, **given)))


def unshared(layer: nn.Module, mechanism: str, **options: object) -> nn.Sequential:
    """The same function with keys and values of their own for each query head, by torch's repeat_interleave."""
    whole = shared(mechanism, num_kv_heads=None, **options)
    state = {}
    for name, x in layer.state_dict().items():
        part = name.split(".")[0]
        if part in ("k_proj", "v_proj"):
            x = x.unflatten(0, (2, 4)).repeat_interleave(3, 0).flatten(0, 1)
        elif part in ("extra_k", "extra_v"):
            x = x.unflatten(2, (2, 4)).repeat_interleave(3, 2).flatten(2)
        elif part == "align":
            x = x.repeat_interleave(3, 0)
        state[name] = x
    whole[0].load_state_dict(state)
    return whole


@pytest.mark.parametrize(
    ("below", "options", "above"),
    # To leave W_A out would not be exact.
    [
        (*one, above)
        for one in SHARED
        for above in ("standard", "standard+align")
        if "align" in above or "align" not in one[0]
    ],
)
def test_shared_heads_stay_shared_or_become_equal_ones(below: str, options: dict[str, object], above: str) -> None:
    model, (x, y) = shared(below, **options), (tokens(B, S, 24, requires_grad=True) for _ in range(2))
    before = output_and_gradients(model[0], x, y, {})
    kept = model[0].v_proj.weight if "v" in model[0].mechanism.projections else None
    report = ba.convert(model, above, max_len=S if "align" in above else None)
    assert report.exact
    new = model[0]
    for old, now in zip(before, output_and_gradients(new, x, y, {}), strict=True):
        torch.testing.assert_close(now, old, rtol=1e-11, atol=1e-11)
    # The identity is a value for each head: keys are then no longer shared either.
    assert new.num_kv_heads == (6 if below == "optimised" else 2)
    changed = {change.tensor: change.note for layer in report.layers for change in layer.changes}
    if kept is None:
        assert changed["k_proj"] == "its heads repeated, one for each query head"
    else:
        assert new.v_proj.weight is kept
    parts = (new.q_proj, new.k_proj, new.v_proj, new.out_proj, new.align)
    assert report.layers[0].size_after.parameters == sum(p.numel() for part in parts for p in part.parameters())


def test_one_head_of_keys_and_values_for_one_query_head_folds() -> None:
    model, (x, y) = nn.Sequential(trained(ba.MultiheadAttention(
        E, 1, batch_first=True, dtype=torch.float64, num_kv_heads=1))), cross()  # fmt: skip
    before = output_and_gradients(model[0], x, y, {})
    assert ba.convert(model, "efficient").exact
    for old, new in zip(before, output_and_gradients(model[0], x, y, {}), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("target", ["optimised", "efficient", "super"])
@pytest.mark.parametrize(("mechanism", "options"), [one for one in SHARED if "add_bias_kv" not in one[1]])
def test_an_approximation_of_shared_heads_is_that_of_equal_ones(
    mechanism: str, options: dict[str, object], target: str, calibrated: bool
) -> None:
    short = shared(mechanism, **options)
    long = unshared(short[0], mechanism, **options)
    x = tokens(B, S, 24)
    torch.testing.assert_close(short[0](x, x, x)[0], long[0](x, x, x)[0])
    batches = [(tokens(20, S, 24),)] if calibrated else None
    outputs = []
    for layer in (short[0], long[0]):
        model = SelfAttention(layer)
        causal = True if options.get("align_causal") else None
        length = S if target == "super" else None
        ba.convert(model, target, exact=False, max_len=length, align_causal=causal, calibration=batches)
        outputs.append(model(x))
        assert model.layer.mechanism.name == target
    torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-6)


class SelfAttention(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_standard_is_torchs_layer_with_its_gradients(heads: int) -> None:
    model, (x, y) = torchs(heads), cross()
    twin = copy.deepcopy(model)
    ba.convert(model, "standard")
    for layer in (model[0], twin[0]):
        layer(x, y, y)[0].sin().sum().backward()
    packed = model[0].to_torch_state_dict()
    assert packed.keys() == dict(twin[0].named_parameters()).keys()
    grads = torch.cat([p.grad for p in (model[0].q_proj.weight, model[0].k_proj.weight, model[0].v_proj.weight)])
    torch.testing.assert_close(grads, twin[0].in_proj_weight.grad)
    torch.testing.assert_close(model[0].out_proj.bias.grad, twin[0].out_proj.bias.grad)


def test_a_query_that_sees_nothing_keeps_the_bias_of_the_values() -> None:
    """The documented exception: its weights are zero, not a row that sums to one."""
    model, x = torchs(1), tokens(B, L, E)
    hidden = torch.ones(L, L, dtype=torch.bool)
    value_bias = model[0].in_proj_bias.chunk(3)[2] @ model[0].out_proj.weight.T
    ba.convert(model, "standard")
    before = model[0](x, x, x, attn_mask=hidden, need_weights=False)[0]
    ba.convert(model, "optimised")
    after = model[0](x, x, x, attn_mask=hidden, need_weights=False)[0]
    torch.testing.assert_close(after, before + value_bias)


@pytest.mark.parametrize(
    ("model", "mechanism", "words"),
    [
        (lambda: torchs(2), "optimised", "W_V cannot be folded into W_O with 2 heads"),
        (lambda: torchs(3), "efficient", "W_K cannot be folded into W_Q with 3 heads"),
        (lambda: torchs(1), "expressive", "another function than 'softmax'"),
        (lambda: torchs(1, add_bias_kv=True), "efficient", "add_bias_kv"),
        (lambda: torchs(1, add_zero_attn=True), "optimised", "add_zero_attn"),
        (lambda: ours("super", 1), "efficient", "W_A is not the identity"),
        (lambda: ours("standard+align", 1), "super", "W_A mixes the bias of W_V"),
        (lambda: ours("expressive", 1), "efficient+expressive", "does not cancel"),
    ],
)
def test_what_is_not_exact_is_refused_with_its_reason_and_done_on_request(model, mechanism: str, words: str) -> None:
    built = model()
    old = built[0]
    refused(lambda: ba.convert(built, mechanism), words, "exact=False", kind=ValueError)
    assert built[0] is old
    report = ba.convert(built, mechanism, exact=False)
    assert not report.exact
    assert any(words in reason for reason in report.layers[0].reasons)
    assert built[0](*[tokens(B, L, E)] * 3)[0].isfinite().all()


def test_expressive_folds_exactly_where_the_keys_have_no_bias() -> None:
    model = ours("expressive", 1)
    with torch.no_grad():
        model[0].k_proj.bias.zero_()
    x, y = cross()
    before = model[0](x, y, y)[0]
    assert ba.convert(model, "efficient+expressive").exact
    torch.testing.assert_close(model[0](x, y, y)[0], before, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("heads", [2, 3])
def test_the_projection_is_the_least_squares_solution_for_inputs_of_identity_covariance(heads: int) -> None:
    """Against lstsq on the scores, with one-hot queries and keys: their covariance is the identity."""
    model, H = torchs(heads, bias=False), E // heads
    wq, wk, _ = model[0].in_proj_weight.detach().chunk(3)
    ba.convert(model, "efficient", exact=False)
    eye = torch.eye(E, dtype=torch.float64)
    for i in range(heads):
        rows = slice(i * H, (i + 1) * H)
        scores = (eye @ wq[rows].T) @ (eye @ wk[rows].T).T
        best = torch.linalg.lstsq(eye[:, rows], scores.T).solution  # of (H, queries), for the queries as columns
        torch.testing.assert_close(model[0].q_proj.weight[rows], best, rtol=1e-9, atol=1e-9)


def test_half_precision_stays_and_is_folded_in_more() -> None:
    model, x = torchs(1, dtype=torch.float32), tokens(B, L, E, dtype=torch.float32)
    low = copy.deepcopy(model).to(torch.bfloat16)
    wide = copy.deepcopy(low).to(torch.float64)
    want = wide[0](*[x.to(torch.bfloat16).double()] * 3)[0]
    ba.convert(low, "efficient")
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    ba.convert(wide, "efficient")
    torch.testing.assert_close(low[0].q_proj.weight, wide[0].q_proj.weight.to(torch.bfloat16), rtol=0, atol=0)
    got = low[0](*[x.to(torch.bfloat16)] * 3)[0].double()
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("source", ["standard", "optimised"])
def test_values_alone_are_not_grouped(source: str, calibrated: bool) -> None:
    """A layer groups projected keys: where they go, values are repeated for the query heads."""
    torch.manual_seed(0)
    model = nn.Sequential(ba.MultiheadAttention(16, 4, batch_first=True, num_kv_heads=2, mechanism=source).double())
    before = model[0].v_proj
    calibration = [tokens(12, 5, 16)] if calibrated else None

    class Self(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = model[0]

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x, x, x)[0]  # type: ignore[no-any-return]

    whole = Self()
    ba.convert(whole, ba.Mechanism(frozenset("qvo")), exact=False, calibration=calibration)
    found = whole.layer
    assert found.num_kv_heads == 4
    assert found.v_proj.weight.shape == (16, 16)
    if source == "standard":
        expected = before.weight.unflatten(0, (2, 4)).repeat_interleave(2, 0).flatten(0, 1)
        torch.testing.assert_close(found.v_proj.weight, expected)
    x = tokens(2, 5, 16)
    assert whole(x).isfinite().all()
