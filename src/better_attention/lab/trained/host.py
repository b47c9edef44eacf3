"""Models of transformers in a folder that ``save_pretrained`` wrote: read from the disk alone, nothing unpickled."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from better_attention.lab.runs.json_file import read_json

DESCRIPTION = (
    *("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt", "spiece.model", "tokenizer.model", "generation_config.json"),
)
"""Files of such a folder that are not weights."""
EXTRA = "models of transformers need transformers 5.24 or newer: pip install 'better-attention[transformers]'."


def is_host(folder: Path) -> bool:
    """Whether ``folder`` describes a model of transformers."""
    path = folder / "config.json"
    return path.is_file() and {"model_type"} <= read_json(path).keys()


def build(folder: Path) -> nn.Module:
    """The model that ``config.json`` describes, with random weights, in evaluation mode.

    Raises:
        ImportError: transformers is missing.
        ValueError: a class that this version of transformers does not have.
    """
    library = _transformers()
    config = library.AutoConfig.from_pretrained(folder, local_files_only=True)
    model: nn.Module = _class(library, folder)._from_config(config)
    return model.eval()


def load(folder: Path) -> nn.Module:
    """The trained model in ``folder``, in evaluation mode.

    Raises:
        ImportError: transformers is missing.
        FileNotFoundError: the folder has no weights in safetensors.
        ValueError: a class that this version of transformers does not have, or weights that are not all of the model's.
    """
    library = _transformers()
    if not sorted(folder.glob("*.safetensors")):
        raise FileNotFoundError(
            f"{folder} holds no weights in safetensors: save the model again with save_pretrained(FOLDER)."
        )
    model, report = _class(library, folder).from_pretrained(
        folder, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{folder} lacks weights of {type(model).__name__}: {', '.join(missing[:5])}.")
    found: nn.Module = model
    return found.eval()


def tokenised(folder: Path, texts: Sequence[str], length: int | None) -> dict[str, Tensor]:
    """Texts as one batch by the tokeniser in ``folder``: ``input_ids`` and ``attention_mask``, each (N, L).

    Args:
        folder: with the files of the tokeniser.
        texts: at least one.
        length: most tokens of a text; None: as many as the tokeniser says that the model takes.

    Raises:
        ImportError: transformers is missing.
        ValueError: there is no tokeniser in the folder.
    """
    tokeniser = _tokeniser(folder)
    if tokeniser.pad_token is None:
        tokeniser.pad_token = tokeniser.eos_token
    batch = tokeniser(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt")
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def words(folder: Path, ids: Sequence[int]) -> list[str]:
    """The tokens with these numbers, as the tokeniser in ``folder`` writes them.

    Raises:
        ImportError, ValueError: as for :func:`tokenised`.
    """
    return [str(token) for token in _tokeniser(folder).convert_ids_to_tokens(list(ids))]


def _tokeniser(folder: Path) -> Any:
    library = _transformers()
    try:
        return library.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(
            f"{folder} holds no tokeniser that can be read ({type(error).__name__}): save it there with "
            "tokeniser.save_pretrained(FOLDER)."
        ) from error


def longest(folder: Path) -> int | None:
    """Most tokens that the model in ``folder`` reads, where its configuration says so."""
    config = read_json(folder / "config.json")
    found = [config[key] for key in ("max_position_embeddings", "n_positions", "n_ctx") if key in config]
    return next((number for number in found if isinstance(number, int)), None)


def _transformers() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own imports
            library = importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError(EXTRA) from error
    library.utils.logging.disable_progress_bar()
    return library


def _class(library: Any, folder: Path) -> Any:
    names = read_json(folder / "config.json").get("architectures") or ["AutoModel"]
    found = getattr(library, str(names[0]), None)
    if found is None or not isinstance(names[0], str) or not hasattr(found, "from_pretrained"):
        raise ValueError(
            f"{folder / 'config.json'} describes a {names[0]!r}, which transformers {library.__version__} does not "
            "have."
        )
    return found
