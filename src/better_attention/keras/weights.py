"""Weights to and from the torch layer, as plain NumPy arrays under its names: neither side imports the other's library.

>>> layer = MultiHeadAttention(2, key_dim=3, mechanism="efficient")
>>> layer.build((None, None, 6), (None, None, 6))
>>> sorted(to_torch_state(layer))
['out_proj.bias', 'out_proj.weight', 'q_proj.bias', 'q_proj.weight']
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from keras import ops

from .layer import MultiHeadAttention

Array = np.ndarray[Any, Any]


def torch_options(layer: MultiHeadAttention) -> dict[str, Any]:
    """Keyword arguments with which ``better_attention.MultiheadAttention`` computes the same function.

    Args:
        layer: built, of self-attention width: the torch layer's heads together are as wide as its model.

    Raises:
        ValueError: a setting that the torch layer does not have.
    """
    config = layer.get_config()
    width = _check(layer)
    options = {
        "embed_dim": width,
        "num_heads": layer.num_heads,
        "dropout": layer.dropout,
        "bias": layer.use_bias,
        "batch_first": True,
        "mechanism": layer.mechanism,
        "kdim": _input_width(layer.key_dense, width),
        "vdim": _input_width(layer.value_dense, width),
        "scale": config["scale"],
    }
    if config["sliding_window"] is not None:
        options["window"] = config["sliding_window"]  # causal in torch: call Keras' side with use_causal_mask=True
    if layer.mechanism.aligned:
        options |= {"align_heads": config["align_heads"], "align_init": config["align_init"]}
    if layer.mechanism.aligned and config["sliding_window"] is None:
        options |= {"max_len": config["max_len"], "align_causal": config["align_causal"]}
    return options


def to_torch_state(layer: MultiHeadAttention) -> dict[str, Array]:
    """The weights as ``better_attention.MultiheadAttention(**torch_options(layer))`` names and lays them out.

    Load them with ``torch_layer.load_state_dict({name: torch.from_numpy(x) for name, x in state.items()})``.

    Args:
        layer: a built layer; LoRA is merged.

    Raises:
        ValueError: the layer is not built, is quantised, or has a setting that the torch layer does not have.

    >>> layer = MultiHeadAttention(2, key_dim=3)
    >>> layer.build((None, None, 6), (None, None, 5))
    >>> to_torch_state(layer)["v_proj.weight"].shape
    (6, 5)
    """
    _check(layer)
    state: dict[str, Array] = {}
    for name, dense in _maps(layer):
        kernel = _numbers(dense.kernel)
        if name == "out_proj":
            state[f"{name}.weight"] = kernel.reshape(-1, kernel.shape[-1]).T.copy()
        else:
            state[f"{name}.weight"] = kernel.reshape(kernel.shape[0], -1).T.copy()
        if dense.bias is not None:
            state[f"{name}.bias"] = _numbers(dense.bias).reshape(-1)
    state |= {name: _numbers(variable) for name, variable in _square(layer)}
    return state


def from_torch_state(layer: MultiHeadAttention, state: Mapping[str, Any]) -> None:
    """Load the weights of a ``better_attention.MultiheadAttention``; the reverse of :func:`to_torch_state`.

    This layer has a head of keys and values for each query head. Where that one has fewer (``num_kv_heads``), each
    query head gets a copy of those that it shared, which computes the same.

    Args:
        layer: a built layer of the same settings.
        state: its ``state_dict()``: arrays, or tensors on the CPU. All names, and no others.

    Raises:
        ValueError: names or shapes that are not those of the layer, a layer that has no counterpart in torch, or one
            with LoRA.

    >>> layer, twin = MultiHeadAttention(2, key_dim=3), MultiHeadAttention(2, key_dim=3)
    >>> for one in (layer, twin):
    ...     one.build((None, None, 6), (None, None, 6))
    >>> from_torch_state(twin, to_torch_state(layer))
    >>> bool((to_torch_state(twin)["q_proj.weight"] == to_torch_state(layer)["q_proj.weight"]).all())
    True
    """
    if any(dense.lora_enabled for _, dense in _maps(layer)):
        raise ValueError(
            "this layer has LoRA on its maps, and a state holds whole maps: load it into a layer without, and call "
            "enable_lora afterwards."
        )
    wanted = to_torch_state(layer)
    missing, unknown = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if missing or unknown:
        raise ValueError(
            f"the state does not belong to a layer with mechanism {layer.mechanism.name!r}: "
            f"{_listed('missing', missing)}{_listed('not in this layer', unknown)}"
            f"it needs {', '.join(sorted(wanted))}. Build both layers with the same settings (torch_options)."
        )
    arrays = {name: _each_head(np.asarray(value), wanted[name], name, layer) for name, value in state.items()}
    for name, array in arrays.items():
        if array.shape != wanted[name].shape:
            raise ValueError(
                f"{name} has shape {array.shape}, but this layer needs {wanted[name].shape}. Build both layers with "
                "the same settings (torch_options)."
            )
    # Nothing is assigned before everything has been checked.
    for name, dense in _maps(layer):
        # Rows as they lay before: products of the NumPy backend differ in their last bits where memory is transposed.
        dense.kernel.assign(np.ascontiguousarray(arrays[f"{name}.weight"].T).reshape(dense.kernel.shape))
        if dense.bias is not None:
            dense.bias.assign(arrays[f"{name}.bias"].reshape(dense.bias.shape))
    for name, variable in _square(layer):
        variable.assign(arrays[name])


def _each_head(x: Array, wanted: Array, name: str, layer: MultiHeadAttention) -> Array:
    """The array of keys or values with the copies that query heads need which shared a head; any other as it is."""
    # W_A comes as one kernel a head, which lie one after the other as the rows of a map's heads do.
    width = {"k_proj": layer.key_dim, "v_proj": layer.value_dim, "align": 1}.get(name.split(".")[0])
    if width is None or x.ndim != wanted.ndim or x.shape[1:] != wanted.shape[1:] or x.shape[0] in (0, wanted.shape[0]):
        return x
    if wanted.shape[0] != layer.num_heads * width or x.shape[0] % width or wanted.shape[0] % x.shape[0]:
        return x
    heads = x.reshape(x.shape[0] // width, width, *x.shape[1:])
    return np.repeat(heads, wanted.shape[0] // x.shape[0], axis=0).reshape(wanted.shape)


def _maps(layer: MultiHeadAttention) -> Iterator[tuple[str, Any]]:
    """The linear maps that the layer learns, by their names in torch."""
    named = {
        "q_proj": layer.query_dense,
        "k_proj": layer.key_dense,
        "v_proj": layer.value_dense,
        "out_proj": layer.output_dense,
    }
    return ((name, dense) for name, dense in named.items() if dense is not None)


def _square(layer: MultiHeadAttention) -> Iterator[tuple[str, Any]]:
    """What both sides lay out alike."""
    if layer.align is not None:
        yield "align.weight", layer.align.kernel
        if layer.align.bias is not None:
            yield "align.bias", layer.align.bias
    if layer.log_scale is not None:
        yield "scaling.log_scale", layer.log_scale


def _check(layer: MultiHeadAttention) -> int:
    """The model width of a layer that torch's can take over."""
    if not isinstance(layer, MultiHeadAttention):
        raise TypeError(
            f"layer must be a better_attention.keras.MultiHeadAttention, received {type(layer).__name__}. Weights of "
            "keras.layers.MultiHeadAttention load into ours with set_weights(layer.get_weights())."
        )
    if not layer.built:
        raise ValueError("the layer has no weights yet: call it, or build(query_shape, value_shape), first.")
    width, config = layer.num_heads * layer.key_dim, layer.get_config()
    output = None if layer.output_dense is None else layer.output_dense.kernel.shape[2:]
    reasons = {
        "use_gate=True": config["use_gate"],
        f"value_dim={layer.value_dim}, which is not key_dim={layer.key_dim}": layer.value_dim != layer.key_dim,
        f"an output of shape {output} for heads of {width} features": output not in (None, (width,)),
        f"queries of {_input_width(layer.query_dense, width)} features for heads of {width}": _input_width(
            layer.query_dense, width
        )
        != width,
        "quantised weights": any(dense.quantization_mode is not None for _, dense in _maps(layer)),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(
                f"better_attention.MultiheadAttention has one width, num_heads * key_dim, and no gate; this layer has "
                f"{reason}, so that its weights have no place there."
            )
    return width


def _input_width(dense: Any, otherwise: int) -> int:
    return otherwise if dense is None else int(dense.kernel.shape[0])


def _numbers(x: Any) -> Array:
    return np.array(ops.convert_to_numpy(x))


def _listed(what: str, names: list[str]) -> str:
    return f"{what}: {', '.join(names)}; " if names else ""
