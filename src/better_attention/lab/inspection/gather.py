"""A run or a model, looked into: its attention on samples by every score, and its W_A."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from better_attention.errors import describe
from better_attention.inspect import Layers, alignment_kernels, attention_maps
from better_attention.lab.analysis.study import AlignmentPicture, AttentionMap
from better_attention.lab.comparison.run_pictures import draw_kernels
from better_attention.lab.inspection.inspection import Inspection, LayerMaps, Sample
from better_attention.lab.report.map_gallery import without_padding
from better_attention.lab.runs.folder import RunFolder
from better_attention.lab.runs.job import Job
from better_attention.lab.runs.load import Run
from better_attention.lab.runs.name import RunName
from better_attention.lab.tasks.base import count
from better_attention.lab.tasks.variant import Variant
from better_attention.lab.trained import host
from better_attention.lab.trained.model import Trained
from better_attention.lab.trained.origin import RunOrigin
from better_attention.mechanism import Mechanism
from better_attention.scores import DEFAULT_SCORE, SCORES


@dataclass(frozen=True, slots=True)
class RunInput:
    """One input of a run's model: what to call it, and its encoding, without the batch dimension."""

    title: str
    inputs: Tensor


@dataclass(frozen=True, slots=True)
class ModelInput:
    """One input of any model, a batch of one.

    Args:
        inputs: what the model takes: a tensor, a tuple of arguments, or a dict of keyword arguments.
        title: what it is, for the reader.
        tokens: the S tokens of a text.
        picture: uint8, (H, W) or (H, W, 3), of an image.
    """

    inputs: Any
    title: str = ""
    tokens: Sequence[str] | None = None
    picture: NDArray[np.uint8] | None = None


def look_into_run(run: Run, inputs: Sequence[RunInput], layers: Layers = None) -> Inspection:
    """The run's attention on ``inputs``, and its W_A beside that which training began with.

    Raises:
        ValueError: ``layers`` that the model does not have.
    """
    config = RunFolder(run.path).config()
    job = Job(run.task, Variant.of(config.mechanism), config.heads, config.seed)
    name = RunName(config.mechanism, config.heads, config.seed)
    facts = {
        "task": f"{run.task.name} ({run.task.scale}): {run.task.title}",
        "mechanism": config.mechanism,
        "heads": str(config.heads),
        "seed": str(config.seed),
        "parameters": f"{count(run.model):,}",
        **({"test accuracy": f"{found:.2f} %"} if (found := run.result.get("test_accuracy")) is not None else {}),
    }
    samples = [_run_sample(run, str(name), one, layers) for one in inputs]
    names = {mechanism.name for mechanism in _mechanisms(run.model, samples)}
    if names != {job.variant.mechanism.name}:  # of a converted model, whose W_A began with the conversion
        return Inspection(str(name), facts | {"converted to": ", ".join(sorted(names))}, samples, _kernels(run.model))
    return Inspection(str(name), facts, samples, draw_kernels(str(name), run.model, job))


def run_of(trained: Trained) -> Run:
    """A converted model of a run as a run, in the folder that describes the one before, without results.

    Raises:
        TypeError: it is not of a run.
    """
    origin = trained.origin
    if not isinstance(origin, RunOrigin):
        raise TypeError(f"{trained.path} is of a {type(origin).__name__}, not of a run.")
    config = {"run": origin.config.description}
    return Run(origin.folder, trained.model, origin.task, config, {}, origin.assets, [])


def text_inputs(trained: Trained, texts: Sequence[str]) -> list[ModelInput]:
    """Texts for a model of transformers, by the tokeniser beside it.

    Raises:
        ValueError: there is no tokeniser.
    """
    folder = trained.origin.folder
    batches = [host.tokenised(folder, [text], host.longest(folder)) for text in texts]
    return [
        ModelInput(batch, text, host.words(folder, batch["input_ids"][0].tolist()))
        for text, batch in zip(texts, batches, strict=True)
    ]


def examples(run: Run, splits: Any, number: int) -> list[RunInput]:
    """The first test samples that the run's task would show in a report.

    Args:
        run: the run.
        splits: its data.
        number: how many at most.
    """
    return [RunInput(title, splits.test.inputs[row].cpu()) for row, title in run.task.examples(splits, number)]


def _run_sample(run: Run, name: str, one: RunInput, layers: Layers) -> Sample:
    shown = run.task.show(one.inputs, run.assets)
    with torch.inference_mode():
        (prediction,) = run.task.predictions(run.model, one.inputs[None], run.assets)
    predicted = f"{prediction.label} ({100 * prediction.probability:.0f} %)"
    found = [
        LayerMaps(
            layer,
            own,
            {
                score: without_padding(
                    AttentionMap(
                        name,
                        layer,
                        one.title,
                        weights_NLS,
                        tokens=run.task.key_tokens(layer, shown),
                        picture=shown.picture,
                        queries=run.task.query_tokens(layer, shown),
                    )
                )
                for score, weights_NLS in by_score.items()
            },
        )
        for layer, own, by_score in _weights(run.model, one.inputs[None], layers)
    ]
    return Sample(one.title, found, predicted, shown.picture)


def look_into_model(model: nn.Module, title: str, inputs: Sequence[Any], layers: Layers = None) -> Inspection:
    """The attention of any model that :func:`better_attention.attention_maps` can read.

    Args:
        model: the model.
        title: its name, for the reader.
        inputs: a few inputs, each a :class:`ModelInput` or what the model takes.
        layers: see :func:`better_attention.attention_maps`.

    Raises:
        TypeError: ``inputs`` is not a list.
        ValueError: no inputs, inputs of more than one sample, or layers that the model does not have.
    """
    if not isinstance(inputs, list | tuple):
        raise TypeError(f"inputs must be a list of what the model takes, received {describe(inputs)}.")
    given = [one if isinstance(one, ModelInput) else ModelInput(one) for one in inputs]
    if not given:
        raise ValueError("there is nothing to look at: pass at least one input.")
    named = [replace(one, title=one.title or f"input {number}") for number, one in enumerate(given, start=1)]
    samples = [_model_sample(model, title, one, layers) for one in named]
    attention = ", ".join(dict.fromkeys(one.name for one in _mechanisms(model, samples))) or "none"
    facts = {"model": type(model).__name__, "parameters": f"{count(model):,}", "attention": attention}
    return Inspection(title, facts, samples, _kernels(model))


def _kernels(model: nn.Module) -> list[AlignmentPicture]:
    return [AlignmentPicture("", layer, weight.numpy()) for layer, weight in alignment_kernels(model)]


def _mechanisms(model: nn.Module, samples: Sequence[Sample]) -> list[Mechanism]:
    names = dict.fromkeys(layer.name for sample in samples for layer in sample.layers)
    return [_mechanism(model, name) for name in names]


def _model_sample(model: nn.Module, name: str, one: ModelInput, layers: Layers) -> Sample:
    found = []
    for layer, own, by_score in _weights(model, one.inputs, layers):
        tokens, queries = _tokens(by_score[own], one)
        maps = {
            score: without_padding(AttentionMap(name, layer, one.title, w, tokens, one.picture, queries))
            for score, w in by_score.items()
        }
        found.append(LayerMaps(layer, own, maps))
    return Sample(one.title, found, picture=one.picture)


def _tokens(weights_NLS: NDArray[np.floating], one: ModelInput) -> tuple[list[str] | None, list[str] | None]:
    """Words for the keys and the queries of a layer: tokens, or their numbers; empty for keys that no query sees."""
    _, L, S = weights_NLS.shape
    if one.picture is not None and one.tokens is None:
        return None, None
    given = list(one.tokens or ())
    keys = given if len(given) == S else [str(number) for number in range(1, S + 1)]
    seen = np.nan_to_num(weights_NLS).sum(axis=(0, 1)) > 0
    # An empty word stands for padding, and would be left out.
    shown = [key or "·" if there else "" for key, there in zip(keys, seen, strict=True)]
    return shown, shown if L == S else [str(number) for number in range(1, L + 1)]


def _weights(
    model: nn.Module, inputs: Any, layers: Layers
) -> Iterator[tuple[str, str, dict[str, NDArray[np.floating]]]]:
    """Layer, own score, and the weights (N, L, S) by every score."""
    args, kwargs = _arguments(inputs)
    by_score = {score: attention_maps(model, *args, layers=layers, score=score, **kwargs) for score in SCORES}
    for layer in by_score[DEFAULT_SCORE]:
        maps = {score: _one(found[layer]) for score, found in by_score.items()}
        yield layer, _mechanism(model, layer).score, maps


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)), {}


def _one(weights: Tensor) -> NDArray[np.floating]:
    """(N, L, S) of a batch of one."""
    if weights.dim() == 4 and len(weights) != 1:
        raise ValueError(f"an input is a batch of one sample, received {len(weights)}: pass them one by one.")
    found: NDArray[np.floating] = weights.reshape(weights.shape[-3:]).float().numpy()
    return found


def _mechanism(model: nn.Module, layer: str) -> Mechanism:
    # The name "blocks.0.attention#2" stands for the second call of one module.
    found = getattr(model.get_submodule(layer.partition("#")[0]), "mechanism", None)
    return found if isinstance(found, Mechanism) else Mechanism.of("standard")
