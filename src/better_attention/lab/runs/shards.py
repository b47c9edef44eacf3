"""Checkpoints of a model whose tensors are spread over processes: each process writes its part, in safetensors.

A checkpoint is a folder, ``checkpoint-000007.shards``, that torch.distributed.checkpoint writes with its Hugging Face
storage, and ``checkpoint-000007.json`` with the SHA-256 of every file in it (:mod:`.checkpoint`). The usual form of
torch.distributed.checkpoint has a ``.metadata`` that is a pickle; this one has none: where a part belongs stands in the
header of its file. That form knows tensors alone, none without dimensions. So the state of an optimiser is saved as
named tensors, its step counts with one dimension, and its settings are those of the run.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from better_attention.lab.files import digest, sync_folder

SUFFIX = ".shards"


def write(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the part of this process of every tensor; all processes call this together.

    Args:
        folder: of the checkpoint; the parts of a crash that lie there are removed.
        tensors: name -> tensor, sharded (``DTensor``) or equal on all processes.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    shaped = {name: tensor.reshape(1) if tensor.ndim == 0 else tensor for name, tensor in tensors.items()}
    with _quiet():
        save(shaped, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))


def read(folder: Path) -> dict[str, Tensor]:
    """Every tensor, whole, on the CPU, in this process alone."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    stored = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)  # the other kind is pickled, which is never written here
    }
    with _quiet():
        load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    return tensors


def names(folder: Path) -> set[str]:
    """The names of the tensors."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    return set(HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata)


def read_into(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill ``tensors`` with their stored values; all processes call this together, and each reads its own part."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    shaped = {name: tensor.view(1) if tensor.ndim == 0 else tensor for name, tensor in tensors.items()}
    with _quiet():
        load(shaped, storage_reader=HuggingFaceStorageReader(str(folder)))


def digests(folder: Path) -> dict[str, str]:
    """Name of each file -> its SHA-256."""
    return {path.name: digest(path) for path in sorted(folder.iterdir())}


def seal(folder: Path) -> dict[str, str]:
    """The digests of a checkpoint that was just written, once its names are on the disk."""
    sync_folder(folder)
    return digests(folder)


def remove(folder: Path) -> None:
    """Remove a checkpoint, if there is one. A link in its place is removed itself, not what it leads to."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's remarks on its own interfaces and on running without a process group."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
