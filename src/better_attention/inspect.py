"""Attention weights and alignment kernels of a model, read without changing what it computes."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from better_attention.adapters.host_attention import HostAttention, Score
from better_attention.adapters.hosts.torch_attention import TORCH
from better_attention.conversion.calibrate import calling_layers
from better_attention.conversion.sites import Site, chosen, find_sites
from better_attention.errors import check_choice, choices
from better_attention.layer.alignment import Alignment
from better_attention.layer.multihead import MultiheadAttention
from better_attention.scores import SCORES

READABLE = (MultiheadAttention, nn.MultiheadAttention, HostAttention)
"""Kinds of attention that say their weights."""
Layers = str | int | Iterable[str | int] | None
Note = Callable[[Tensor], None]
"""Receives the weights of one call."""


def attention_maps(
    model: nn.Module, *inputs: Any, layers: Layers = None, score: str | None = None, **kwargs: Any
) -> dict[str, Tensor]:
    """The weights of every attention layer that ``model(*inputs, **kwargs)`` calls.

    The layers are :class:`better_attention.MultiheadAttention`, ``torch.nn.MultiheadAttention``, and the attention of
    other libraries' models once :func:`better_attention.convert` has replaced it (to ``"standard"`` this is exact).

    The model runs once, in eval mode and without gradients; each layer computes its weights from the very arguments
    that it received. Training flags, hooks, parameters and the state of the random generators are left as they were.
    A compiled model runs without its compiled code, which is kept.

    Args:
        model: any module that holds such layers.
        inputs: what the model takes, a batch of B inputs.
        layers: which layers: names or patterns (``"encoder.*"``), numbers in the order of the model, or a list of both;
            None for all.
        score: a key of ``SCORES``: return the weights that this score makes of each layer's queries and keys, which
            the model computes with its own score as before. None: the weights of each layer's own score.
        kwargs: what the model takes by name.

    Returns:
        Name of the layer -> weights on the CPU, (B, heads, L, S), before dropout; in the order of the calls. A layer
        called again gets ``"#2"``, ``"#3"``, ... behind its name. Unbatched input gives (heads, L, S).

    Raises:
        ValueError: a layer that does not exist or whose weights cannot be read, or an unknown score.
        TypeError: ``layers`` of another kind.

    >>> from better_attention import MultiheadAttention
    >>> layer = MultiheadAttention(6, 3, mechanism="efficient")
    >>> x = torch.zeros(5, 1, 6)
    >>> {name: tuple(weights.shape) for name, weights in attention_maps(layer, x, x, x).items()}
    {'': (1, 3, 5, 5)}
    """
    if score is not None:
        check_choice(score, "score", SCORES)
    collected: dict[str, Tensor] = {}

    def note(name: str) -> Note:
        def add(weights: Tensor) -> None:
            times = 1 + sum(key == name or key.startswith(f"{name}#") for key in collected)
            collected[name if times == 1 else f"{name}#{times}"] = weights.detach().cpu()

        return add

    sites = _readable(model, layers)
    handles: list[RemovableHandle] = []
    try:
        # Inside the try, so that hooks are removed even if a later layer cannot be watched.
        handles += [_watched(site.core, score, note(site.name)) for site in sites]
        with _undisturbed(model):
            model(*inputs, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return collected


def _readable(model: nn.Module, layers: Layers) -> list[Site]:
    """The sites that ``layers`` names and whose weights can be read."""
    sites, _ = find_sites(model)
    readable = [site for site in sites if isinstance(site.core, READABLE)]
    wanted = chosen(sites, layers)
    others = [site.name for site in wanted if site not in readable]
    # Without a choice, attention that cannot be read is passed over, as long as there is some that can.
    if others and (layers is not None or not readable):
        raise ValueError(
            f"the attention of another library does not say its weights: {choices(others)}. Replace it first, with the "
            "weights that it has: better_attention.convert(model, 'standard')."
        )
    return [site for site in wanted if site in readable]


def _watched(core: nn.Module, score: str | None, note: Note) -> RemovableHandle:
    """A hook that hands the weights of each call of ``core`` to ``note``.

    At once, and not after the run: the model may change the layer's input in place (a residual sum, say). By forward,
    and not by calling the module: other people's hooks on the layer are not to fire twice.
    """
    if isinstance(core, HostAttention):
        own = core.score
        # In eval mode, because the weights are wanted before dropout.
        part = own if score is None else Score(score, own.scale, own.dropout).eval()

        def inside(module: nn.Module, args: tuple[Any, ...]) -> None:
            q_BNLH, k_BGSH, v_BGSH, mask, causal, _ = args
            note(cast(Tensor, part.forward(q_BNLH, k_BGSH, v_BGSH, mask, causal, need_weights=True)[1]))

        # On the score and not on the layer, because hosts pass their own arguments to the layer and ours to the score.
        return core.score.register_forward_pre_hook(inside)

    layer = core if score is None else _with_score(core, score)
    signature = inspect.signature(layer.forward)

    def outside(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = signature.bind(*args, **kwargs).arguments
        note(layer.forward(**{**call, "need_weights": True, "average_attn_weights": False})[1])

    return core.register_forward_pre_hook(outside, with_kwargs=True)


def _with_score(layer: nn.Module, score: str) -> nn.Module:
    """A layer with the weights of ``layer``, torch's or ours, and another score."""
    if isinstance(layer, nn.MultiheadAttention):
        source = TORCH.read(layer)
        # torch's class knows softmax alone, hence a layer of ours with its weights.
        return TORCH.build(layer, replace(source, mechanism=replace(source.mechanism, score=score)))
    # A shallow copy shares parameters and sub-modules, so that only the mechanism is another.
    twin = copy.copy(cast(MultiheadAttention, layer))
    twin.mechanism = replace(twin.mechanism, score=score)
    return twin


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, the hooks of compiled modules heard, and the random generators as they were afterwards."""
    # Named, because fork_rng() would otherwise save the state of every GPU in the machine.
    devices = {p.device for p in model.parameters() if p.is_cuda}
    with calling_layers(model), torch.random.fork_rng(devices=devices), torch.compiler.set_stance("force_eager"):
        yield


def alignment_kernels(model: nn.Module) -> list[tuple[str, Tensor]]:
    """W_A of every layer that has one: (name of the layer, weight (l, l) or (heads, l, l) on the CPU).

    A kernel that is kept causal comes as it acts, lower triangular.

    >>> from better_attention import MultiheadAttention
    >>> layer = MultiheadAttention(6, 3, mechanism="super", max_len=5)
    >>> [(name, tuple(weight.shape)) for name, weight in alignment_kernels(layer)]
    [('', (5, 5))]
    """
    return [
        (name, (kernel.weight.tril() if kernel.causal else kernel.weight).detach().cpu().clone())
        for name, layer in model.named_modules()
        if isinstance(layer, MultiheadAttention | HostAttention) and isinstance(kernel := layer.align, Alignment)
    ]
