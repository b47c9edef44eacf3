"""Checkpoints: the whole state of a training run, on disk whole or not at all, in safetensors and JSON.

A checkpoint is a pair, ``checkpoint-000007.safetensors`` and ``checkpoint-000007.json``. The JSON is
written last and carries the SHA-256 of both, so a pair that was damaged by a crash, a full disk or a flipped bit is
recognised, and the previous pair, which is kept until then, takes its place. Nothing is ever unpickled. A model that
is spread over processes has the folder ``checkpoint-000007.shards`` in place of the first file (:mod:`.shards`).
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from better_attention.lab.files import digest as digest_of
from better_attention.lab.files import open_regular, parse_json, read_regular, remove_leftovers, write_atomic
from better_attention.lab.runs import shards


def save(folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write a new checkpoint into ``folder``, which exists, and remove all but the last two.

    Args:
        tensors: name -> tensor, on any device.
        state: plain JSON values, finite numbers only.

    Raises:
        OSError: the disk is full or the folder cannot be written; earlier checkpoints are untouched.
    """
    number = next_number(folder)
    content = tensor_bytes(tensors)

    def write() -> dict[str, Any]:
        write_atomic(file_of(folder, number, ".safetensors"), content, make_folder=False)
        return {"tensors": sha256(content).hexdigest()}

    complete(folder, number, write, state)


def next_number(folder: Path) -> int:
    """The number of the next checkpoint in ``folder``: a new one never takes the name of one that may be needed."""
    return max(_numbers(folder), default=0) + 1


def file_of(folder: Path, number: int, suffix: str = "") -> Path:
    """A file of a checkpoint, or with :data:`.shards.SUFFIX` the folder of its parts."""
    return folder / f"checkpoint-{number:06d}{suffix}"


def complete(folder: Path, number: int, write: Callable[[], Mapping[str, Any]], state: Mapping[str, Any]) -> None:
    """Write a new checkpoint into ``folder`` and remove all but the last two.

    Args:
        folder: exists.
        number: of the checkpoint, from :func:`next_number`.
        write: writes its tensors; returns their digest or digests as an entry of the JSON.
        state: plain JSON values, finite numbers only.

    Raises:
        OSError: the disk is full or the folder cannot be written; earlier checkpoints are untouched.
    """
    numbers = _numbers(folder) - {number}
    # A pair without its JSON was never complete, so it is not the one to fall back on.
    previous = max((n for n in numbers if file_of(folder, n, ".json").exists()), default=None)
    try:
        manifest = {**write(), "state": state}
        # JSON has no NaN and no infinity: Python would write them, and other readers would refuse the file.
        text = json.dumps({"digest": _digest(manifest), **manifest}, allow_nan=False)
        write_atomic(file_of(folder, number, ".json"), text, make_folder=False)
    except OSError:
        _remove(folder, number)  # half a pair is of no use and takes space
        raise
    # Only now that the new pair is complete. The one before it stays, in case the new one is damaged later.
    for other in numbers - {previous}:
        _remove(folder, other)


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest whole checkpoint in ``folder`` (tensors on the CPU, state); None if there is none.

    Warns about each damaged one that it skips.
    """
    found = newest(folder)
    if found is None:
        return None
    content, state = found
    return (shards.read(content) if isinstance(content, Path) else content), state


def newest(folder: Path) -> tuple[dict[str, Tensor] | Path, dict[str, Any]] | None:
    """As :func:`load`, but of a checkpoint in shards only the folder that holds them."""
    for number in sorted(_numbers(folder), reverse=True):
        stem = file_of(folder, number)
        try:
            manifest = parse_json(read_regular(stem.with_suffix(".json")))
            digest = manifest.pop("digest")
            if digest != _digest(manifest):
                raise ValueError(f"{stem.name}.json was altered: its digest is {_digest(manifest)}, not {digest}")
            if "shards" in manifest:
                parts = stem.with_suffix(shards.SUFFIX)
                if shards.digests(parts) != manifest["shards"]:
                    raise ValueError(f"{parts.name} holds other files than were written")
                return parts, manifest["state"]
            # Read once, then hashed and parsed from the same bytes: the file cannot change between the two.
            with open_regular(stem.with_suffix(".safetensors")) as file:
                content = file.read()
            if (digest := sha256(content).hexdigest()) != manifest["tensors"]:
                raise ValueError(f"{stem.name}.safetensors has SHA-256 {digest}, not {manifest['tensors']}")
            return safetensors.torch.load(content), manifest["state"]
        # The last three are what JSON of another shape leads to.
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            warnings.warn(f"{folder}: passing over a damaged checkpoint ({error}).", stacklevel=2)
    return None


def last_state(folder: Path) -> dict[str, Any] | None:
    """The state of the newest checkpoint in ``folder`` whose tensors are there, None if there is none.

    For a listing: of the tensors only the header is read. :func:`load` checks every byte.
    """
    for number in sorted(_numbers(folder), reverse=True):
        stem = file_of(folder, number)
        try:
            manifest = parse_json(read_regular(stem.with_suffix(".json")))
            if manifest.pop("digest") == _digest(manifest) and isinstance(state := manifest["state"], dict):
                if "shards" in manifest:
                    if {path.name for path in stem.with_suffix(shards.SUFFIX).iterdir()} != set(manifest["shards"]):
                        continue
                    return state
                open_regular(stem.with_suffix(".safetensors")).close()  # nothing that would block
                with safetensors.safe_open(stem.with_suffix(".safetensors"), framework="pt"):
                    return state
        except (OSError, ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError):
            continue
    return None


def clear(folder: Path) -> None:
    """Remove every checkpoint in ``folder``, and what a crash left of unfinished ones."""
    for number in _numbers(folder):
        _remove(folder, number)
    remove_leftovers(folder)


def tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """``tensors`` as the bytes of a safetensors file."""
    # safetensors refuses tensors that are not contiguous.
    content: bytes = safetensors.torch.save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
    return content


def check_digest(path: Path, digest: object) -> None:
    """Make sure that the bytes of a file are those that were written.

    Args:
        path: the file.
        digest: their SHA-256 as the run recorded it; None for runs of a version that did not record it.

    Raises:
        ValueError: the file was changed.
    """
    if digest is None:
        return
    actual = digest_of(path)
    if actual != digest:
        raise ValueError(
            f"{path} was changed since it was written: its SHA-256 is {actual}, not {digest}. Delete the run and train "
            "it again."
        )


def tensor_count(path: Path) -> int:
    """Number of tensors in a safetensors file, of which only the header is read.

    Raises:
        ValueError: the file is damaged.
    """
    open_regular(path).close()  # nothing that would block
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return len(file.keys())
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}). Delete the run and train it again."
        ) from None


def load_weights(model: nn.Module, path: Path) -> None:
    """Replace the weights of ``model``, which may be on the meta device, by those in the safetensors file ``path``.

    Raises:
        ValueError: the file is damaged, or its names, shapes or dtypes are not the model's. Names and shapes
            are compared before any tensor is read.
    """
    expected = {name: (tuple(t.shape), t.dtype) for name, t in model.state_dict().items()}
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            # Compared by the header alone; reading the tensors first could fill the memory with those of another model.
            wrong = [
                f"{name}: {stored.get(name, 'missing')} in the file, {expected.get(name, ('unknown',))[0]} in the model"
                for name in sorted(stored.keys() | expected.keys())
                if stored.get(name) != expected.get(name, ("unknown",))[0]
            ]
            if wrong:
                raise ValueError(f"{path} does not hold the weights of this model:\n  " + "\n  ".join(wrong[:10]))
            tensors = {name: file.get_tensor(name) for name in stored}
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}). Delete the run and train it again."
        ) from None
    for name, tensor in tensors.items():
        if tensor.dtype != expected[name][1]:
            raise ValueError(f"{path}: {name} is {tensor.dtype} in the file, {expected[name][1]} in the model.")
    # Tensors on the meta device have no memory that could be copied into, so they are replaced.
    model.load_state_dict(tensors, assign=True)


def optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The moments and step counts of an optimiser, named ``"INDEX.KEY"`` by the order of its parameters."""
    state = optimiser.state_dict()["state"]
    return {f"{index}.{key}": value for index, entry in state.items() for key, value in entry.items()}


def load_optimiser(optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put what :func:`optimiser_tensors` gave back into a fresh optimiser over the same parameters."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        # Step counts of a checkpoint in shards have one dimension, where optimisers keep none.
        state.setdefault(int(index), {})[key] = tensor.reshape(()) if key == "step" else tensor
    # The groups (rates, weight decay) are the fresh optimiser's own: the settings of the run decide them, not the file.
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})


def _digest(manifest: Mapping[str, Any]) -> str:
    # Sorted keys make the digest one of the value and not of its spelling.
    return sha256(json.dumps(manifest, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _numbers(folder: Path) -> set[int]:
    matches = (
        re.fullmatch(r"checkpoint-(\d{6})\.(?:json|safetensors|shards)", path.name)
        for path in folder.glob("checkpoint-*")
    )
    return {int(match[1]) for match in matches if match}


def _remove(folder: Path, number: int) -> None:
    """Remove one pair, the JSON first: tensors without their JSON are never mistaken for a complete pair."""
    for suffix in (".json", ".safetensors"):
        file_of(folder, number, suffix).unlink(missing_ok=True)
    shards.remove(file_of(folder, number, shards.SUFFIX))
