"""convert(): another mechanism in the place of the attention that a model has."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from better_attention.adapters.adapter import names
from better_attention.adapters.source import Source
from better_attention.call.torch_private import own_parameters
from better_attention.errors import check_bool, check_int
from better_attention.mechanism import Mechanism
from better_attention.text import plural

from .calibrate import Fit, calls_of, check_batches
from .fold import Folded, fold, impossible, obstacles
from .report import ConversionReport, LayerReport, Size
from .revert import install
from .sites import Replacements, Site, check_model, chosen, find_sites, joined

LENGTH = 128
"""Tokens for which FLOPs are counted where neither calibration nor max_len says how many."""


def convert(
    model: nn.Module,
    mechanism: str | Mechanism,
    *,
    layers: str | int | Iterable[str | int] | None = None,
    max_len: int | None = None,
    align_causal: bool | None = None,
    exact: bool = True,
    calibration: Iterable[Any] | None = None,
    keep_original: bool = True,
) -> ConversionReport:
    """Give the attention layers of ``model`` another mechanism, in place, keeping the trained weights where possible.

    Exact are: one head, for any mechanism of softmax; and for any number of heads the way upwards (efficient,
    optimised, standard; efficient to super, whose W_A starts as the identity). Everything else is an approximation,
    and needs ``exact=False``: the least squares projection of the weights, or with ``calibration`` a fit of W_Q, W_O
    and W_A to what each layer computes there, one layer after another, each on what the converted ones before return.

    Args:
        model: any module that holds attention which an adapter knows. Changed in place; on any error it is as it was.
            Build optimisers afterwards: some parameters are new ones.
        mechanism: a name or a ``Mechanism``.
        layers: which attention layers: names or patterns (``"encoder.*"``), numbers in the order of the model, or a
            list of both; None for all.
        max_len: size of a new W_A, the longest value sequence.
        align_causal: keep a new W_A triangular; None for what the host says of its layer. Layers that get their
            causality from a mask at each call (``nn.Transformer``) need True for causal use.
        exact: refuse what would only be an approximation.
        calibration: batches on which errors are measured and approximations fitted: a list of what the model takes,
            each a tensor, a tuple of arguments or a dict of keyword arguments. A few hundred samples.
        keep_original: keep the old modules, which :func:`revert` puts back. They are neither in the state dict nor
            moved with the model. Parameters that are taken over unchanged are shared, so that training changes both.

    Returns:
        What became of each tensor and layer.

    Raises:
        ValueError: no attention that an adapter knows; a layer that cannot be converted, or not exactly, with all
            reasons.
        TypeError: an argument of the wrong kind.

    Note:
        A query from which every key is hidden has the output b_O before and b_V W_O + b_O after W_V was folded away.
        Adjust what reads such rows.

    >>> from torch import nn
    >>> import better_attention as ba
    >>> encoder = nn.TransformerEncoderLayer(6, 1, 12, batch_first=True)
    >>> ba.convert(encoder, "efficient").exact
    True
    """
    check_model(model)
    target = Mechanism.of(mechanism)
    check_bool(exact, "exact")
    if max_len is not None:
        check_int(max_len, "max_len")
        if not target.aligned:
            raise ValueError(
                f"max_len={max_len} is the size of W_A, which {target.name!r} does not have: leave it out."
            )
    everything, left = find_sites(model)
    sites = chosen(everything, layers)
    if not sites:
        raise ValueError(_nothing_found(model, left))
    batches = None if calibration is None else check_batches(calibration)
    plan = Plan(target, max_len, align_causal, batches, keep_original)
    _refuse(sites, plan, exact)
    work = Replacements(model)
    try:
        done = [_convert_site(work, site, plan) for site in sites]
    # Ctrl-C too: a long fit that is interrupted must leave the model as it was.
    except BaseException:
        work.take_back()
        raise
    # Calibration knows how long the sequences are; only without it is a length assumed.
    length = max((one.fit.length for one in done if one.fit is not None), default=max_len or LENGTH)
    return ConversionReport(target.name, length, [_report(one, length) for one in done], left)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked of every layer, see :func:`convert`."""

    target: Mechanism
    max_len: int | None
    align_causal: bool | None
    batches: list[Any] | None
    keep_original: bool


@dataclass(frozen=True, slots=True)
class Done:
    """One converted layer: where, what it was, what it is, and how it was fitted."""

    site: Site
    source: Source
    folded: Folded
    fit: Fit | None


def _nothing_found(model: nn.Module, left: list[tuple[str, str]]) -> str:
    unknown = "".join(f"\n  {name}: {why}" for name, why in left)
    return (
        f"{type(model).__name__} has no attention that can be converted; adapters: {', '.join(names())}. For a class "
        f"of your own, register an Adapter (better_attention.adapters.adapter).{unknown}"
    )


def _refuse(sites: list[Site], plan: Plan, exact: bool) -> None:
    """Raise an error with every reason of every layer, before anything is changed."""
    reasons: list[str] = []
    approximate = False
    for site in sites:
        why = site.refusals()
        source = None if why else site.adapter.read(site.module)
        if source is not None:
            why = impossible(source, plan.target, plan.max_len, plan.align_causal)
        if source is not None and not why and exact:
            why = obstacles(source, plan.target)
            # Remembered, because only then does exact=False help.
            approximate = approximate or bool(why)
        reasons += [f"  {site.name or '(the model)'}: {reason}" for reason in why]
        if not site.name and not site.adapter.place:
            reasons.append(
                "  the model is itself an attention layer: put it into a container, nn.Sequential for example"
            )
    if reasons:
        what = "exactly" if approximate else "at all"
        hint = "\nPass exact=False for an approximation." if approximate else ""
        raise ValueError(
            f"{plural(len(reasons), 'reason')} why this model cannot be converted to {plan.target.name!r} {what}; it "
            f"is as it was:\n" + "\n".join(reasons) + hint
        )


def _convert_site(work: Replacements, site: Site, plan: Plan) -> Done:
    source = site.adapter.read(site.module)
    causal = source.causal if plan.align_causal is None else plan.align_causal
    folded = fold(source, plan.target, max_len=plan.max_len, align_causal=causal)
    fit = None
    if plan.batches is not None:
        # The model runs with the layers before this one already converted: these are the inputs that it will get.
        fit = Fit(site, source, calls_of(work.model, site, plan.batches))
        folded = fit.run(folded)
    new = site.adapter.build(site.module, folded.source)
    # Only here is known which parameters the new layer still has.
    _refuse_broken_ties(work.model, site, new)
    install(work, site, new, plan.keep_original)
    return Done(site, source, folded, fit)


def _refuse_broken_ties(model: nn.Module, site: Site, new: nn.Module) -> None:
    """A parameter that this layer shares with another module and no longer has would silently become two."""
    # By identity: equal values are no tie.
    kept = {id(p) for p in new.parameters()}
    inside = {id(m) for m in site.module.modules()}
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        for own, parameter in own_parameters(module).items():
            mine = [n for n, p in site.module.named_parameters() if p is parameter]
            if parameter is not None and mine and id(parameter) not in kept:
                raise ValueError(
                    f"{joined(site.name, mine[0])} is tied to {joined(name, own)}, and the conversion would make two "
                    "different weights of them. Untie them first (give one a clone), or leave the layer out (layers=)."
                )


def _report(done: Done, length: int) -> LayerReport:
    site, source, folded, fit = done.site, done.source, done.folded, done.fit
    return LayerReport(
        site.name,
        site.adapter.name,
        source.mechanism.name,
        folded.source.mechanism.name,
        folded.exact,
        folded.changes,
        folded.inexact,
        _size(source, length),
        _size(folded.source, length),
        None if fit is None else fit.error_before,
        None if fit is None else fit.error_after,
        [] if fit is None else fit.heads,
    )


def _size(source: Source, length: int) -> Size:
    return Size(source.parameters, source.flops(length), source.cache_bytes)
