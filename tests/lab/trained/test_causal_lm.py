"""A run of a language model inside transformers: the same numbers, the same tokens, the same text."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from better_attention.lab.data.tokenisers import Tokeniser, tokeniser_of
from better_attention.lab.generation.sampling import Sampling
from better_attention.lab.generation.writer import Settings, write
from better_attention.lab.runs.folder import RunFolder
from better_attention.lab.runs.job import Job
from better_attention.lab.runs.load import load_run
from better_attention.lab.tasks.catalogue import TASKS
from better_attention.lab.tasks.language import LanguageTask
from better_attention.lab.tasks.variant import Variant
from better_attention.lab.training.loop import Training
from helpers import hosts, tiny

pytestmark = pytest.mark.hosts

TEXT = "".join(random.Random(0).choices("ab cdéf\n日", k=1500)) + "zzz"
PROMPTS = ["ab", "c dé\nf", "日日b"]


def trained(folder: Path, mechanism: str, **changes: Any) -> Path:
    """A run of one epoch on random text."""
    base = TASKS["text-lm"]("smoke")
    assert isinstance(base, LanguageTask)
    small: dict[str, Any] = {"width": 24, "length": 20, "epochs": 1, "train_samples": None, "test_samples": None}
    (folder / "text").write_text(TEXT, "utf-8")
    task = replace(base, **(small | {"validation_share": 0.1, "test_share": 0.1} | changes)).fitted(folder / "text")
    run = RunFolder(folder / "run")
    job = Job(task, Variant.of(mechanism), 2, 0)
    Training(job, splits=task.load(folder / "text"), folder=run, accelerator=Accelerator(cpu=True)).run()
    return run.path


@pytest.mark.parametrize(
    ("mechanism", "changes"),
    [
        ("efficient", {}),
        ("super+per-head", {"window": 5, "positions": "learned"}),
        ("expressive", {"tokeniser": "bpe", "vocabulary": 270}),
        ("optimised", {"kv_heads": 1}),
        ("efficient", {"kv_heads": 1}),
    ],
)
def test_the_same_numbers_tokens_and_text(tmp_path: Path, mechanism: str, changes: dict[str, Any]) -> None:
    t = hosts.transformers()
    from better_attention.lab.trained.causal_lm import causal_lm

    folder = trained(tmp_path, mechanism, **changes)
    run, (model, tokenizer) = load_run(folder), causal_lm(folder)
    ours = tokeniser_of(run.assets)
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again = t.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").double()
    tokenizer = t.AutoTokenizer.from_pretrained(tmp_path / "saved")
    check_tokens(tokenizer, ours)
    x = torch.tensor([ours.encode("ab cd")])
    torch.testing.assert_close(again(x).logits, run.model.double()(x))
    settings = Settings(Sampling(temperature=0.0), max_tokens=10)
    written = write(run.model, ours, PROMPTS, settings)  # type: ignore[arg-type] # the model of a text-lm run
    found = again.generate(**tokenizer(PROMPTS, padding=True, return_tensors="pt"), max_new_tokens=10, do_sample=False)
    new = tokenizer.batch_decode(found[:, -10:])
    assert new == [one.text for one in written]


def check_tokens(tokenizer: Any, ours: Tokeniser) -> None:
    assert len(tokenizer) == len(ours)
    for text in (TEXT, *PROMPTS, " a  b\n\n c "):
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokens == ours.encode(text)
        assert tokenizer.decode(tokens) == ours.decode(tokens).decode()


def test_a_run_of_another_task_is_refused(tmp_path: Path) -> None:
    hosts.transformers()
    from better_attention.lab.trained.causal_lm import causal_lm

    tiny.training(tmp_path / "super-h3-s0", epochs=1).run()
    with pytest.raises(ValueError, match="super-h3-s0 is not a run of text-lm"):
        causal_lm(tmp_path / "super-h3-s0")
