"""Least squares on calibration inputs, against NumPy's; and convert(calibration=...) through the public interface."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import better_attention as ba
from better_attention.conversion.fit import RIDGE, KeyRegression, OutputRegression, relative_error
from better_attention.conversion.fit_kernel import RIDGE as KERNEL_RIDGE
from better_attention.conversion.fit_kernel import KernelFit, Mixing
from helpers.layers import padding, refused, tokens, triangle

B, N, L, S, H, E = 3, 2, 5, 7, 4, 8


# --- the regressions against NumPy ------------------------------------------------------------------------------------


def weights() -> Tensor:
    """Rows that sum to one, and one query that sees nothing."""
    found = torch.rand(B, N, L, S, dtype=torch.float64).softmax(dim=-1)
    found[1, :, 3] = 0.0
    return found


def test_the_key_regression_is_weighted_least_squares_row_by_row() -> None:
    old, new, a, start = tokens(B, N, S, H), tokens(B, N, S, H), weights(), tokens(N, H, H)
    regression = KeyRegression(start)
    for b in range(B):  # streamed
        regression.add(old[b : b + 1], new[b : b + 1], a[b : b + 1])
    solution = regression.solve()
    for n in range(N):
        rows, wanted = [], []
        for b in range(B):
            for l in range(L):
                mean_old, mean_new = a[b, n, l] @ old[b, n], a[b, n, l] @ new[b, n]
                for s in range(S):
                    root = a[b, n, l, s].sqrt()
                    rows.append(root * (new[b, n, s] - mean_new))
                    wanted.append(root * (old[b, n, s] - mean_old))
        X, Y = torch.stack(rows).numpy(), torch.stack(wanted).numpy()
        pull = np.sqrt(RIDGE * np.trace(X.T @ X) / H)
        X = np.vstack([X, pull * np.eye(H)])
        Y = np.vstack([Y, pull * start[n].numpy().T])
        best = np.linalg.lstsq(X, Y, rcond=None)[0].T
        np.testing.assert_allclose(solution[n].numpy(), best, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("bias", [True, False])
def test_the_output_regression_is_least_squares_and_knows_its_error(bias: bool) -> None:
    mixed, output, start = tokens(41, E), tokens(41, 3), tokens(3, E)
    regression = OutputRegression(start, bias)
    for rows in (slice(0, 13), slice(13, 41)):
        regression.add(mixed[rows], output[rows])
    weight, shift = regression.solve()
    X = np.hstack([mixed.numpy(), np.full((41, 1), float(bias))])
    pull = np.sqrt(RIDGE * np.trace(mixed.numpy().T @ mixed.numpy()) / E)
    X = np.vstack([X, np.hstack([pull * np.eye(E), np.zeros((E, 1))])])
    Y = np.vstack([output.numpy(), pull * start.numpy().T])
    best = np.linalg.lstsq(X, Y, rcond=None)[0]
    np.testing.assert_allclose(weight.numpy().T, best[:E], rtol=1e-7, atol=1e-9)
    assert (shift is not None) == bias
    got = mixed @ weight.T + (0.0 if shift is None else shift)
    assert regression.error(weight, shift) == pytest.approx(float((got - output).norm() / output.norm()))
    assert relative_error([got[:9], got[9:]], [output[:9], output[9:]]) == pytest.approx(
        regression.error(weight, shift)
    )


def test_directions_that_the_inputs_do_not_show_stay_as_they_were() -> None:
    start = tokens(3, E)
    regression = OutputRegression(start, bias=False)
    mixed = tokens(30, E)
    mixed[:, 5:] = 0.0
    regression.add(mixed, tokens(30, 3))
    torch.testing.assert_close(regression.solve()[0][:, 5:], start[:, 5:])


def mixing(samples: int) -> tuple[Mixing, Tensor]:
    """A batch whose last sample does not count, and W_O."""
    rows = torch.ones(samples, L, dtype=torch.bool)
    rows[-1] = False
    output = tokens(E, N * H)
    found = torch.rand(samples, N, L, S, dtype=torch.float64).softmax(dim=-1)
    return Mixing(found, tokens(samples, N, S, H), tokens(int(rows.sum()), E), rows), output


def effect(batch: Mixing, output: Tensor, change: Tensor, shift: Tensor) -> Tensor:
    """What the output gains, from the definition."""
    mixed = batch.weights_BNLS @ (change[:S, :S] @ batch.values_BNSH + shift[:S, None])
    return (mixed.transpose(1, 2).flatten(2) @ output.T)[batch.rows_BL]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_kernel_fit_solves_the_normal_equations(causal: bool, bias: bool) -> None:
    """Against the dense matrix, column by column; positions that no input has stay as they were."""
    (batch, output), l = mixing(9), S + 2
    change, shift = KernelFit([batch], output, l, causal, bias, steps=500, enough=1e-13).solve()
    columns, free = [], []
    for i in range(l + 1):
        for j in range(l):
            if (i < l and not (causal and j > i)) or (i == l and bias):
                unit = torch.zeros(l + 1, l, dtype=torch.float64)
                unit[i, j] = 1.0
                free.append((i, j))
                columns.append(effect(batch, output, unit[:-1], unit[-1]).flatten())
    X = torch.stack(columns, dim=1)
    pull = KERNEL_RIDGE * batch.values_BNSH.square().sum() * output.square().mean() / l
    gram = X.T @ X + pull * torch.eye(X.shape[1], dtype=torch.float64)
    best = torch.linalg.solve(gram, X.T @ batch.missing_RD.flatten())
    found = torch.stack([change[i, j] if i < l else shift[j] for i, j in free])
    torch.testing.assert_close(found, best, rtol=1e-6, atol=1e-8)
    assert not change[S:].any()
    assert not change[:, S:].any()
    assert not (causal and change.triu(1).any())
    assert bool(shift.any()) == bias


def test_few_steps_find_a_planted_kernel() -> None:
    (batch, output), change, shift = mixing(40), tokens(S, S), tokens(S)
    planted = Mixing(batch.weights_BNLS, batch.values_BNSH, effect(batch, output, change, shift), batch.rows_BL)
    found = effect(batch, output, *KernelFit([planted], output, S, causal=False, bias=True).solve())
    assert relative_error([found], [planted.missing_RD]) < 0.1


# --- whole models -----------------------------------------------------------------------------------------------------


def encoder(**options: object) -> nn.TransformerEncoder:
    options = {"batch_first": True, "dropout": 0.3, **options}
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, N, 11, **options), 2, enable_nested_tensor=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return model


def batches(number: int = 4) -> list[Tensor]:
    return [tokens(16, L, E, dtype=torch.float32) for _ in range(number)]


@pytest.mark.parametrize("mechanism", ["optimised", "efficient", "super", "expressive", "efficient+expressive"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "length first"])
def test_the_fit_comes_closer_and_is_reported(mechanism: str, batch_first: bool) -> None:
    model = encoder(batch_first=batch_first)
    samples = batches()
    calibration = samples if batch_first else [x.transpose(0, 1) for x in samples]
    aligned = ba.Mechanism.of(mechanism).aligned
    report = ba.convert(model, mechanism, exact=False, calibration=calibration, max_len=S if aligned else None)
    assert report.length == L
    for row in report.layers:
        assert 0.0 < row.error_after < 0.98 * row.error_before
        assert {c.tensor: c.status for c in row.changes}["out_proj"] == "approximated"
        lost_keys = "k" not in ba.Mechanism.of(mechanism).projections
        assert [head.rank for head in row.heads] == [H] * N * lost_keys
        assert all(0.0 < head.residual < 1.0 for head in row.heads)
    assert f"{report.layers[0].error_after:.2g}" in str(report)


@pytest.mark.parametrize("options", [{}, {"rotary": True}, {"add_zero_attn": True}], ids=["plain", "rotary", "zeros"])
def test_keys_that_the_layer_adds_are_left_out_of_the_fit(options: dict[str, Any]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = ba.MultiheadAttention(E, N, batch_first=True, add_bias_kv=True, **options).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x, x, x)[0]  # type: ignore[no-any-return]

    report = ba.convert(Model(), "efficient", exact=False, calibration=[tokens(30, L, E)])
    (converted,) = report.layers
    assert converted.error_after < converted.error_before


def test_the_kernel_of_super_is_fitted_too() -> None:
    model, samples = encoder(), batches()
    twin = copy.deepcopy(model)
    efficient = ba.convert(twin, "efficient", exact=False, calibration=samples, layers=0)
    report = ba.convert(model, "super", exact=False, calibration=samples, layers=0, max_len=L)
    assert report.layers[0].error_after < 0.99 * efficient.layers[0].error_after
    assert {c.tensor: c.note for c in report.layers[0].changes}["align"] == "fitted to the calibration inputs"


@pytest.mark.parametrize("masks", ["none", "padding", "causal"])
def test_the_reported_errors_are_those_of_the_layers(masks: str) -> None:
    """Of the first layer, whose inputs the conversion of others does not change; padding does not count."""
    model, samples = encoder().eval(), batches()
    hidden = padding(16, L)
    given = {"none": {}, "padding": {"src_key_padding_mask": hidden}, "causal": {"mask": triangle(L)}}[masks]
    inner = {"none": {}, "padding": {"key_padding_mask": hidden}, "causal": {"attn_mask": triangle(L)}}[masks]
    old = copy.deepcopy(model.layers[0].self_attn)
    report = ba.convert(model, "efficient", exact=False, calibration=[{"src": x, **given} for x in samples])
    new, real = model.layers[0].self_attn, ~hidden if masks == "padding" else slice(None)
    with torch.no_grad():
        got, want = ([layer(x, x, x, **inner)[0][real] for x in samples] for layer in (new, old))
    assert report.layers[0].error_after == pytest.approx(relative_error(got, want), rel=1e-4)


def test_what_the_inputs_allow_is_found_exactly() -> None:
    """Inputs whose second half follows from the first: every slice holds all of the input, nothing has to be lost."""
    turn = torch.linalg.qr(torch.randn(H, H))[0]

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(E, N, batch_first=True)

        def forward(self, z: Tensor) -> Tensor:
            x = torch.cat([z, z @ turn], dim=-1)
            return self.attention(x, x, x, need_weights=False)[0]

    model = Both()
    calibration = [tokens(16, L, H, dtype=torch.float32) for _ in range(4)]
    fresh = tokens(16, L, H, dtype=torch.float32)
    want = model(fresh)
    report = ba.convert(model, "efficient", exact=False, calibration=calibration)
    assert report.layers[0].error_before > 0.1
    assert report.layers[0].error_after < 1e-3
    assert relative_error([model(fresh).detach()], [want.detach()]) < 1e-3
    assert all(head.residual < 1e-5 for head in report.layers[0].heads)


def test_exact_layers_are_measured_and_not_touched() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, 1, 11, batch_first=True), 1, enable_nested_tensor=False)
    twin = copy.deepcopy(model)
    report = ba.convert(model, "efficient", calibration=batches())
    assert report.exact
    assert report.layers[0].error_before == report.layers[0].error_after < 1e-5
    ba.convert(twin, "efficient")
    for name, value in model.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name])


def test_the_modes_of_the_modules_and_their_hooks_are_as_before() -> None:
    model = encoder()
    model.layers[1].eval()
    modes = {name: m.training for name, m in model.named_modules() if "self_attn" not in name}
    ba.convert(model, "efficient", exact=False, calibration=batches())
    assert modes == {name: m.training for name, m in model.named_modules() if "self_attn" not in name}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_module_that_is_called_twice_is_fitted_to_both_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(E, N, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                x = x + self.attention(x, x, x, need_weights=False)[0]
            return x

    model = Twice()
    few = [tokens(1, 5, E, dtype=torch.float32)]  # 5 tokens are fewer than 9 unknowns, 10 are not
    ba.convert(model, "optimised", exact=False, calibration=few)


@pytest.mark.parametrize(
    ("calibration", "kind", "words"),
    [
        (torch.zeros(4, L, E), TypeError, "list of batches"),
        ({"src": torch.zeros(4, L, E)}, TypeError, "list of batches"),
        (7, TypeError, "7"),
        ([], ValueError, "no batches"),
        ([torch.zeros(1, 3, E)], ValueError, "3 tokens"),
        ([torch.zeros(4, L, E), torch.zeros(4, L, E + 1)], ValueError, "batch 1 does not run"),
        ([{"wrong": torch.zeros(4, L, E)}], ValueError, "batch 0 does not run"),
    ],
)
def test_bad_calibration_changes_nothing(calibration: object, kind: type[Exception], words: str) -> None:
    model = encoder()
    modules = dict(model.named_modules())
    refused(lambda: ba.convert(model, "efficient", exact=False, calibration=calibration), words, kind=kind)
    assert dict(model.named_modules()) == modules
    assert all(m.training for m in model.modules())


def test_a_layer_that_no_batch_reaches_is_named() -> None:
    model = nn.ModuleDict({"used": nn.Linear(E, E), "unused": nn.MultiheadAttention(E, N)})
    model.forward = lambda x: model["used"](x)
    refused(lambda: ba.convert(model, "efficient", exact=False, calibration=batches()), "unused", kind=ValueError)
