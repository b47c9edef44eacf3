"""Between our parameter names (q_proj.weight ...) and those of torch.nn.MultiheadAttention, both ways."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from better_attention.call.distributed import is_dtensor, part_like
from better_attention.call.torch_private import load_hooks, set_load_hooks
from better_attention.layer.part import Part
from better_attention.layer.parts import PARTS, mechanism_with, parts_of
from better_attention.mechanism import MECHANISMS, Mechanism

_EARLIER = {"bias_k": "extra_k.weight", "bias_v": "extra_v.weight", "log_scale": "scaling.log_scale"}
"""Names of torch and of earlier versions of this library, and where these parameters are now."""


def unpack(module: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Before loading: torch's packed (``in_proj_weight``) and separate (``q_proj_weight`` ...) names become ours.

    What the module has no place for, W_V for "optimised" say, is left under our name, so that a strict load
    reports it as unexpected rather than dropping it; so are the second of two layouts
    that come together, and a packed matrix of another height.
    """
    for kind in ("weight", "bias"):
        ours = [f"{prefix}{p}_proj.{kind}" for p in "qkv"]
        packed = state_dict.get(f"{prefix}in_proj_{kind}")
        fits = packed is not None and packed.shape[:1] == (3 * int(module.embed_dim),)  # type: ignore[arg-type]
        if packed is not None and fits and not any(name in state_dict for name in ours):
            # torch loads from a shallow copy of what it was given, so that the caller's dictionary keeps its names.
            del state_dict[f"{prefix}in_proj_{kind}"]
            # Views of the packed matrix: an ordinary load copies them, and separate() gives them storage of their own.
            state_dict.update(zip(ours, packed.chunk(3), strict=True))
    for p in "qkv":
        if f"{prefix}{p}_proj_weight" in state_dict and f"{prefix}{p}_proj.weight" not in state_dict:
            state_dict[f"{prefix}{p}_proj.weight"] = state_dict.pop(f"{prefix}{p}_proj_weight")
    for earlier, now in _EARLIER.items():
        has_place = getattr(module, now.split(".")[0]) is not None
        if has_place and f"{prefix}{earlier}" in state_dict and f"{prefix}{now}" not in state_dict:
            state_dict[f"{prefix}{now}"] = state_dict.pop(f"{prefix}{earlier}")


def whole_or_parts(module: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Let weights of a layer that processes share load into an ordinary one, and the other way round.

    Putting a parameter together takes all processes: then each of them has to load.
    """
    for name, parameter in module.named_parameters():
        x = state_dict.get(f"{prefix}{name}")
        if x is None or is_dtensor(x) == is_dtensor(parameter):
            continue
        if is_dtensor(x):
            state_dict[f"{prefix}{name}"] = x.full_tensor()
        elif x.shape == parameter.shape:
            state_dict[f"{prefix}{name}"] = part_like(x, parameter)


def separate(state_dict: dict[str, Any], prefix: str) -> None:
    """Give entries that are parts of one storage a storage of their own.

    With ``assign=True`` they become the parameters themselves, and parameters that share storage are dropped as
    duplicates, or refused, or written several times over when they are saved.
    """
    sharing: dict[int, list[str]] = {}
    for name, x in state_dict.items():
        if name.startswith(prefix) and type(x) in (Tensor, nn.Parameter) and not x.is_meta:
            sharing.setdefault(x.untyped_storage().data_ptr(), []).append(name)
    for names in sharing.values():
        places = {(state_dict[n].storage_offset(), state_dict[n].shape, state_dict[n].stride()) for n in names}
        if len(places) > 1:  # one place under several names is a tie, and stays one
            state_dict.update({name: state_dict[name].detach().clone() for name in names})


class _Explained(str):
    """A key that says, in torch's error about missing and unexpected keys, why it is one; elsewhere an ordinary text.

    Whether a load is strict is known to the outermost ``load_state_dict`` alone, which formats the keys it was handed.
    """

    why: str

    def __format__(self, spec: str) -> str:
        plain, caller = super().__format__(spec), sys._getframe(1).f_globals.get("__name__")
        # Programs that print the keys themselves get the plain name.
        return f"{plain}: {self.why}" if caller == nn.Module.__module__ else plain

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        # In a pickle or a copy the reason is lost on purpose: it concerns this load only.
        return str, (str(self),)


def explain_parts(module: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Let torch's error say so where the weights are another mechanism's, and what to do; once for the layer.

    Args:
        module: the layer.
        state_dict: under our names; of keys that the mechanism has no place for, the first is replaced by an equal one.
        prefix: of the layer's names.
    """
    mechanism: Mechanism = module.mechanism  # type: ignore[assignment]
    has = parts_of(mechanism)
    modules = {name: name.removeprefix(prefix).split(".")[0] for name in state_dict if name.startswith(prefix)}
    by_module = {part.module: part for part in PARTS}
    came = [part for part in PARTS if part.module in modules.values()]
    layer_modules = {name for name, _ in module.named_modules(remove_duplicate=False)}
    surplus, lacking = [part for part in came if part not in has], [part for part in has if part not in came]
    if surplus:
        # One key is enough: torch lists all of them in one message, which needs the reason once.
        key = _Explained(next(name for name, module in modules.items() if by_module.get(module) in surplus))
        key.why = _another_mechanism(mechanism, came, "leaves the others out")
        # Assigning to an equal key would keep the old key object, so the dictionary is filled anew.
        renamed = [(key if name == key else name, value) for name, value in state_dict.items()]
        state_dict.clear()
        state_dict.update(renamed)
    # Beside names that are no layer's of ours, nobody knows what the weights are of.
    elif came and lacking and all(name in layer_modules for name in modules.values()):
        _MissingParts(
            tuple(f"{prefix}{part.module}." for part in lacking),
            _another_mechanism(mechanism, came, f"leaves {_listed(lacking)} at the values that the layer has now"),
        ).wait(module)


def _another_mechanism(mechanism: Mechanism, came: list[Part], consequence: str) -> str:
    """What to do about weights of another mechanism; ``consequence``: of a load that is not strict."""
    alike = [repr(name) for name, row in MECHANISMS.items() if parts_of(row) == came]
    return (
        f"mechanism {mechanism.name!r} has {_listed(parts_of(mechanism))}, these weights have {_listed(came)}: build "
        f"the layer with their mechanism, {' or '.join(alike or [repr(mechanism_with(came).name)])}; or load what fits "
        f"with strict=False, which {consequence} and makes it another function than the one that was trained"
    )


def _listed(parts: list[Part]) -> str:
    return ", ".join(part.symbol for part in parts) or "no weights"


@dataclass(frozen=True, slots=True)
class _MissingParts:
    """A hook that lets the first missing key below ``names`` say why it is missing, once.

    torch finds out which keys are missing only after the layer's own turn, when it comes to the modules in it.
    """

    names: tuple[str, ...]
    why: str

    def wait(self, module: nn.Module) -> None:
        """Be called when the modules in ``module`` have been loaded."""
        hooks = _lasting_hooks(module)
        if hooks is not None:
            set_load_hooks(module, OrderedDict(hooks, **{"missing parts": self}))

    def __call__(self, module: nn.Module, keys: Any) -> None:
        set_load_hooks(module, _lasting_hooks(module) or OrderedDict())  # a new one: torch goes through the old one
        for index, name in enumerate(keys.missing_keys):
            if name.startswith(self.names):
                key = keys.missing_keys[index] = _Explained(name)
                key.why = self.why
                return


def _lasting_hooks(module: nn.Module) -> OrderedDict[Any, Any] | None:
    """The hooks that torch calls after loading, without one of ours that is still waiting.

    It waits for ever where a program loads module by module and calls no hooks.
    """
    hooks = load_hooks(module)
    if hooks is None:
        return None
    return OrderedDict((key, hook) for key, hook in hooks.items() if not isinstance(hook, _MissingParts))


def without_waiting_hook(module: nn.Module) -> dict[str, Any]:
    """The attributes of a layer, to be copied or pickled, without a hook of ours that is still waiting."""
    state, hooks = dict(module.__dict__), _lasting_hooks(module)
    return {name: hooks if value is load_hooks(module) else value for name, value in state.items()}


def other_size(module: nn.Module, state_dict: Mapping[str, Any], prefix: str) -> list[str]:
    """What to do about a W_A of another size, or another number of heads of keys and values: sentences, or none."""
    return _other_heads(module, state_dict, prefix) + _other_kernel(module, state_dict, prefix)


def _other_heads(module: nn.Module, state_dict: Mapping[str, Any], prefix: str) -> list[str]:
    width = int(module.head_dim)  # type: ignore[arg-type]
    for part in ("k_proj", "v_proj"):
        came, expected = state_dict.get(f"{prefix}{part}.weight"), getattr(getattr(module, part), "weight", None)
        if came is None or expected is None or came.dim() != 2 or len(came) == len(expected):
            continue
        heads, all_heads = len(came) // width, int(module.num_heads)  # type: ignore[arg-type]
        # Else more than the number of heads is another.
        if came.shape[1] == expected.shape[1] and len(came) % width == 0 and heads > 0 and all_heads % heads == 0:
            return [
                f"{prefix}{part}.weight in these weights is of a layer with {heads} heads of width {width}, this one "
                f"has {len(expected) // width}: build it with num_kv_heads={heads}."
            ]
    return []


def _other_kernel(module: nn.Module, state_dict: Mapping[str, Any], prefix: str) -> list[str]:
    kernel = state_dict.get(f"{prefix}align.weight")
    expected = getattr(module.align, "weight", None)
    if kernel is None or expected is None or kernel.shape == expected.shape or kernel.dim() not in (2, 3):
        return []
    if kernel.dim() == expected.dim() and kernel.shape[-1] == expected.shape[-1]:
        return [
            f"{prefix}align.weight in these weights is of a layer whose values have {len(kernel)} heads, this one's "
            f"have {len(expected)}: build it with the same num_heads and num_kv_heads."
        ]
    return [
        f"{prefix}align.weight in these weights is of a layer with max_len={kernel.shape[-1]} and "
        f"align_heads={'shared' if kernel.dim() == 2 else 'per_head'!r}: build this layer with the same."
    ]


def with_repeated_heads(state_dict: Mapping[str, Tensor], head_dim: int, group: int) -> dict[str, Tensor]:
    """Our state dict with a head of keys and values for each query head, where ``group`` neighbours share one."""
    if group == 1:
        return dict(state_dict)

    def repeated(name: str, x: Tensor) -> Tensor:
        part = name.split(".")[0]
        if part not in ("k_proj", "v_proj", "extra_k", "extra_v"):
            return x
        return repeat_heads(x, head_dim, group, dim=0 if part.endswith("_proj") else 2)

    return {name: repeated(name, x) for name, x in state_dict.items()}


def repeat_heads(x: Tensor, head_dim: int, times: int, dim: int = 0) -> Tensor:
    """The heads that lie one after the other along ``dim``, each of them ``times`` times, copies side by side."""
    heads: Tensor = x.unflatten(dim, (-1, head_dim)).repeat_interleave(times, dim)
    return heads.flatten(dim, dim + 1)


def to_packed(state_dict: Mapping[str, Tensor], *, packed: bool) -> dict[str, Tensor]:
    """Our state dict of a standard layer under torch's names; ``packed`` as torch does for equal widths."""
    ours = dict(state_dict)
    for torchs, name in _EARLIER.items():
        if name in ours:
            ours[torchs] = ours.pop(name)
    weights = {p: ours.pop(f"{p}_proj.weight") for p in "qkv"}
    biases = [ours.pop(f"{p}_proj.bias") for p in "qkv" if f"{p}_proj.bias" in ours]
    renamed: dict[str, Tensor] = {}
    if packed:
        renamed["in_proj_weight"] = torch.cat([weights[p] for p in "qkv"])
    else:
        renamed.update({f"{p}_proj_weight": w for p, w in weights.items()})
    if biases:
        renamed["in_proj_bias"] = torch.cat(biases)
    return {**renamed, **ours}
