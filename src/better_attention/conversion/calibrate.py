"""Calibration: a layer's calls while the model runs on samples, and the fit of its successor to what it did there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from better_attention.adapters.probe import CoreCall, angles, probe, tokens
from better_attention.adapters.source import LinearMap, Source
from better_attention.errors import describe
from better_attention.evaluation import evaluating
from better_attention.text import plural

from .fit import KeyRegression, OutputRegression, relative_error
from .fit_kernel import KernelFit, Mixing
from .fold import Folded, key_blocks, query_times
from .report import HeadFit
from .sites import Site


def check_batches(calibration: object) -> list[Any]:
    """The calibration batches as a list.

    Raises:
        TypeError: not an iterable of batches; a single batch without a list around it is not.
        ValueError: there are none.
    """
    if isinstance(calibration, Tensor | Mapping | str) or not isinstance(calibration, Iterable):
        raise TypeError(
            "calibration must be a list of batches, each what the model takes: a tensor, a tuple of arguments, or a "
            f"dict of keyword arguments; received {describe(calibration)}."
        )
    batches = list(calibration)
    if not batches:
        raise ValueError("calibration holds no batches: pass a few hundred samples, or leave it out.")
    return batches


class _Seen(Exception):  # noqa: N818 - no error: it ends a forward pass whose rest nobody needs
    pass


def calls_of(model: nn.Module, site: Site, batches: list[Any]) -> list[CoreCall]:
    """The calls that the site's module receives while ``model`` runs on the batches, in evaluation mode.

    Raises:
        ValueError: a batch that the model does not take, or one in which the module is not called.
    """
    calls: list[CoreCall] = []
    once = False

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(CoreCall(tuple(map(_without_cache, args)), {k: _without_cache(v) for k, v in kwargs.items()}))

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if once:
            raise _Seen

    core = site.core
    handles = [core.register_forward_pre_hook(note, with_kwargs=True), core.register_forward_hook(leave)]
    try:
        with calling_layers(model):
            for number, batch in enumerate(batches):
                # The first batch runs to its end and shows how often the module is called: if once, others end there.
                before = len(calls)
                _run(model, batch, number)
                if len(calls) == before:
                    raise ValueError(f"calibration batch {number} does not reach {site.name}: leave that layer out.")
                once = len(calls) == before + 1  # once a pass: what follows it need not be computed
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _without_cache(value: Any) -> Any:
    """A host's cache would grow whenever a call is repeated: as on the first token, there is none."""
    return None if hasattr(value, "get_seq_length") else value


def _run(model: nn.Module, batch: Any, number: int) -> None:
    try:
        if isinstance(batch, Mapping):
            model(**batch)
        elif isinstance(batch, tuple | list):
            model(*batch)
        else:
            model(batch)
    except _Seen:
        return
    except Exception as error:
        raise ValueError(
            f"calibration batch {number} does not run through the model: {type(error).__name__}: {error}"
        ) from error


@contextmanager
def calling_layers(model: nn.Module) -> Iterator[None]:
    """Evaluation, without the fast path of nn.TransformerEncoder, which calls no layer."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with evaluating(model):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class Fit:
    """The fit of one layer to what its predecessor did.

    Args:
        site: where it is.
        source: what the old layer computes.
        calls: what it received.
    """

    @torch.no_grad()
    def __init__(self, site: Site, source: Source, calls: list[CoreCall]) -> None:
        self.site, self.source, self.calls = site, source, calls
        # The old function in a layer of ours, because only ours can be probed from inside.
        self.old = site.adapter.build(site.module, source).eval()
        self.heads: list[HeadFit] = []
        self.error_before = self.error_after = 0.0
        self.length = 0
        self.rows: list[Tensor] = []  # which positions are tokens
        self.outputs: list[Tensor] = []  # what the old layer returned there

    @torch.no_grad()
    def run(self, folded: Folded) -> Folded:
        """``folded`` with W_Q and W_O fitted where it is not exact; errors are measured on the way.

        Raises:
            ValueError: fewer tokens than unknowns.
        """
        keys = self._compare(folded.source)
        self.error_after = self.error_before
        # Errors are reported for exact conversions too: they show the rounding.
        if folded.exact:
            return folded
        source = folded.source
        if keys is not None and self.source.q is not None and source.q is not None:
            B_NHH = keys.solve()
            self.heads = keys.fits(B_NHH, _ranks(self.source))
            source = source.with_maps(q=query_times(self.source, self.source.q, B_NHH, source.q.trains))
            folded.note("q_proj", "approximated", "fitted to the calibration inputs, without W_K")
        folded.note("out_proj", "approximated", "fitted to the calibration inputs")
        # W_O comes last, because it has to make up for what the new weights changed before it.
        source = self._with_output(source)
        if source.align is not None and self.source.align is None and source.align.weight.dim() == 2:
            folded.note("align", "new", "fitted to the calibration inputs")
            # W_O is fitted twice: W_A needs a W_O to be fitted behind, and changes the mixed values that W_O reads.
            source = self._with_output(self._with_kernel(source))
        return replace(folded, source=source)

    def _build(self, source: Source) -> nn.Module:
        return self.site.adapter.build(self.site.module, source).eval()

    def _compare(self, folded: Source) -> KeyRegression | None:
        """Run both layers on every call: the error, and the sums for W_Q where W_K is gone."""
        new, N = self._build(folded), self.source.num_heads
        regression = None
        if folded.k is None and self.source.k is not None:
            regression = KeyRegression(key_blocks(self.source, self.source.k))
        got = []
        for call in self.calls:
            then, now = probe(self.old, call, need_weights=True), probe(new, call, need_weights=False)
            weights = then.weights_BNLS
            assert weights is not None  # noqa: S101 - for the type checker: they were asked for
            self.length = max(self.length, weights.shape[-1])
            # Padding is left out of errors and fits: what a layer returns there is never read.
            self.rows.append(tokens(weights))
            self.outputs.append(then.output_BLD[self.rows[-1]])
            got.append(now.output_BLD[self.rows[-1]])
            if regression is not None:
                old_BNSH, new_BNSH = (_heads(x.key_BSK, self.source.head_dim, N) for x in (then, now))
                # Keys that the layer adds behind the sequence stay as they are.
                weights = weights[..., : old_BNSH.shape[2]]
                if self.source.rotary:
                    regression.add_turned(old_BNSH, new_BNSH, weights, *angles(self.old, call))
                else:
                    regression.add(old_BNSH, new_BNSH, weights)
        self.error_before = relative_error(got, self.outputs)
        return regression

    def _with_output(self, folded: Source) -> Source:
        """W_O by least squares from the new layer's mixed values to the old layer's output."""
        start = folded.o
        if start is None:
            return folded
        regression = OutputRegression(start.weight.detach(), start.bias is not None)
        new = self._build(folded)
        for call, rows, output in zip(self.calls, self.rows, self.outputs, strict=True):
            regression.add(probe(new, call, need_weights=False).mixed_BLM[rows], output)
        # Below this number the equations have no single solution, and the ridge would hide it.
        unknown = start.weight.shape[1] + 1
        if regression.rows < unknown:
            raise ValueError(
                f"calibration holds {plural(regression.rows, 'token')} for {self.site.name}, whose W_O has {unknown} "
                "unknowns for each output: pass more samples, a few hundred or more."
            )
        weight, bias = regression.solve()
        self.error_after = regression.error(weight, bias)
        dtype = start.weight.dtype
        return folded.with_maps(o=LinearMap(weight.to(dtype), None if bias is None else bias.to(dtype), start.trains))

    def _with_kernel(self, folded: Source) -> Source:
        """W_A by least squares, with the weights and W_O as they are."""
        align, o = folded.align, folded.o
        if align is None or o is None:
            return folded
        new, batches = self._build(folded), []
        for call, rows, output in zip(self.calls, self.rows, self.outputs, strict=True):
            now = probe(new, call, need_weights=True)
            assert now.weights_BNLS is not None  # noqa: S101 - for the type checker: they were asked for
            values = _heads(now.value_BSV, self.source.head_dim, self.source.num_heads)
            # What is fitted is a change of W_A, which explains what the output still lacks.
            missing_RD = output - now.output_BLD[rows]
            batches.append(Mixing(_wide(now.weights_BNLS), _wide(values), _wide(missing_RD), rows))
        fit = KernelFit(batches, o.weight.detach(), align.max_len, align.causal, align.bias is not None)
        change, shift = fit.solve()
        weight = (align.weight.to(change.dtype) + change).to(align.weight.dtype)
        bias = None if align.bias is None else (align.bias.to(shift.dtype) + shift).to(align.bias.dtype)
        return folded.with_maps(align=replace(align, weight=weight, bias=bias))


def _wide(x: Tensor) -> Tensor:
    # Products in 16 bits would lose the small differences that a fit is about.
    return x if x.dtype == torch.float64 else x.float()


def _heads(x_BSK: Tensor, head_dim: int, num_heads: int) -> Tensor:
    """(B, N, S, H), grouped heads repeated."""
    B, S, K = x_BSK.shape
    x_BGSH = x_BSK.reshape(B, S, K // head_dim, head_dim).transpose(1, 2)
    # Whatever the grouping: the width alone says how many heads there are.
    return x_BGSH.repeat_interleave(num_heads * head_dim // K, dim=1)


def _ranks(source: Source) -> list[int]:
    """The rank of W_Q W_K^T of each head."""
    if source.q is None or source.k is None:
        return []
    H, N = source.head_dim, source.num_heads
    q_NHD = source.q.weight.detach().double().view(N, H, -1)
    k_GHD = source.k.weight.detach().double().view(-1, H, source.k.weight.shape[1])
    k_NHD = k_GHD.repeat_interleave(N // len(k_GHD), dim=0)
    # The product has the rank of the small H x H matrix R_q R_k^T of the two QR decompositions.
    small = torch.linalg.qr(q_NHD.mT)[1] @ torch.linalg.qr(k_NHD.mT)[1].mT
    return [int(rank) for rank in torch.linalg.matrix_rank(small)]
