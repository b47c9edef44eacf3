"""The language task: splits by position, loss in bits, tokenisers, and a small language that is really learned."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator

from better_attention import MECHANISMS
from better_attention.lab.comparison.run_pictures import draw_maps
from better_attention.lab.models.causal_decoder import POSITIONS
from better_attention.lab.runs.folder import RunFolder
from better_attention.lab.runs.job import Job
from better_attention.lab.runs.load import load_run
from better_attention.lab.runs.record import RunRecord
from better_attention.lab.tasks.catalogue import TASKS
from better_attention.lab.tasks.language import LARGEST_LOGITS, LanguageTask
from better_attention.lab.tasks.splits import Split, Splits
from better_attention.lab.tasks.variant import Variant
from better_attention.lab.training.loop import Training
from better_attention.lab.training.progress import Interrupted
from better_attention.lab.training.randomness import initial_model
from better_attention.lab.training.step_time import on_torch

NAMES = ["ann", "bob", "eve", "tom"]


def language(sentences: int = 1200) -> str:
    """Sentences whose last word follows from the first: ``ann sees bob. bob nods.``"""
    draw = random.Random(0)
    pairs = (draw.sample(NAMES, 2) for _ in range(sentences))
    return "".join(f"{a} sees {b}. {b} nods.\n" for a, b in pairs)


def task(**changes: Any) -> LanguageTask:
    base = TASKS["text-lm"]("smoke")
    assert isinstance(base, LanguageTask)
    small: dict[str, Any] = {
        **{"width": 32, "length": 23, "default_heads": 2, "heads": (2,), "train_samples": None, "test_samples": None},
        **{"batch_size": 32, "lr": 5e-3, "dropout": 0.0, "stride": None, "vocabulary": 100},
        **{"validation_share": 0.1, "test_share": 0.1},
    }
    return replace(base, **(small | changes))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("language") / "sentences.txt"
    path.write_text(language(), "utf-8")
    return path


@pytest.fixture(scope="module")
def splits(file: Path) -> Splits:
    return task().load(file)


def training(folder: Path, splits: Splits, mechanism: str = "efficient", **changes: Any) -> Training:
    own = {key: changes.pop(key) for key in ("stop", "progress") if key in changes}
    vocabulary = len(splits.assets["symbols"]) + 1
    return Training(
        Job(task(vocabulary=vocabulary, **changes), Variant.of(mechanism), 2, 0),
        splits=splits,
        folder=RunFolder(folder),
        accelerator=Accelerator(cpu=True),
        **own,
    )


# --- data -------------------------------------------------------------------------------------------------------------


def text_of(splits: Splits, tokens: torch.Tensor) -> str:
    symbols = ["?", *splits.assets["symbols"]]
    return "".join(symbols[token] for token in tokens.tolist())


def test_the_text_is_split_by_position_and_targets_are_the_next_tokens(splits: Splits) -> None:
    text, parts = language(), (splits.train, splits.validation, splits.test)
    held = round(0.1 * len(text))
    starts = (0, len(text) - 2 * held, len(text) - held)
    for part, start in zip(parts, starts, strict=True):
        assert part.inputs.shape == part.targets.shape == (len(part), 23)
        assert torch.equal(part.inputs[:, 1:], part.targets[:, :-1])
        for row in (0, 1, len(part) - 1):
            at = start + 23 * row
            assert text_of(splits, part.inputs[row]) == text[at : at + 23]
            assert text_of(splits, part.targets[row]) == text[at + 1 : at + 24]
    assert [len(part) for part in parts] == [(size - 1) // 23 for size in (len(text) - 2 * held, held, held)]


def test_training_samples_may_overlap_and_held_out_ones_never_do(file: Path, splits: Splits) -> None:
    dense = task(stride=5).load(file)
    assert len(dense.train) == (len(language()) - 2 * round(0.1 * len(language())) - 24) // 5 + 1
    assert torch.equal(dense.train.inputs[1][:-5], dense.train.inputs[0][5:])
    assert torch.equal(dense.train.inputs[23], splits.train.inputs[5])
    assert torch.equal(dense.test.inputs, splits.test.inputs)


def test_subsets_depend_on_the_data_seed_alone(file: Path) -> None:
    few = [
        task(train_samples=7, test_samples=3, data_seed=seed, lr=lr).load(file) for seed, lr in ((0, 1), (0, 2), (1, 1))
    ]
    assert [(len(one.train), len(one.test)) for one in few] == [(7, 3)] * 3
    assert few[0].digest == few[1].digest != few[2].digest


def test_the_training_part_alone_chooses_the_characters(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("abc" * 300 + "xbc" * 20, "utf-8")
    splits = task().load(tmp_path / "text")
    assert splits.assets["symbols"] == ["a", "b", "c"]
    assert text_of(splits, splits.test.inputs[-1]).count("?") in (7, 8)
    assert "20 characters are not in the vocabulary: one token stands for all" in splits.notes
    assert task().fitted(tmp_path / "text").vocabulary == 4


def test_notes_say_what_a_reader_must_know(splits: Splits) -> None:
    notes = "\n".join(splits.notes)
    assert f"{len(language()):,} characters, split by position" in notes
    assert "begins without a context" in notes
    assert splits.departures[0].startswith("another text than Tiny Shakespeare: sentences.txt")


def test_guessing_by_frequencies_by_hand(tmp_path: Path) -> None:
    """Four tokens with one more count each: "a" 601 of 904, "b" 301, unknown 1, so the test part has these bits."""
    (tmp_path / "text").write_text("aab" * 300 + "aab" * 50, "utf-8")
    splits = task(validation_share=0.07143, test_share=0.07143).load(tmp_path / "text")
    bits = -(2 * math.log2(601 / 903) + math.log2(301 / 903)) / 3
    assert any(f"give {bits:.3f} bits per character of the test part" in note for note in splits.notes)


def test_a_text_that_is_too_short_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("abc" * 70, "utf-8")
    with pytest.raises(
        ValueError, match=r"the validation part of the text has 21 tokens, and a sample needs 24\. Take a"
    ):
        task().load(tmp_path / "text")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokeniser": "words"}, "tokeniser must be one of"),
        ({"positions": "sine"}, "positions must be one of"),
        ({"vocabulary": 1}, "vocabulary must be >= 2"),
        ({"tokeniser": "bpe", "vocabulary": 255}, "vocabulary must be >= 256"),
        ({"window": 0}, "window must be >= 1"),
        ({"kv_heads": 0}, "kv_heads must be >= 1"),
        ({"stride": 0}, "stride must be >= 1"),
        ({"test_share": 1.0}, "test_share must be below 1"),
        ({"epoch_updates": 0}, "epoch_updates must be >= 1"),
        ({"schedule": "step"}, "schedule must be one of"),
        ({"warmup": -1}, "warmup must be >= 0"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task(**change)


# --- loss, bits, perplexity -------------------------------------------------------------------------------------------


def test_loss_and_accuracy_are_means_over_tokens() -> None:
    logits, targets = torch.randn(3, 5, 7), torch.randint(7, (3, 5))
    expected = torch.stack([F.cross_entropy(logits[n], targets[n]) for n in range(3)])
    torch.testing.assert_close(task().losses(logits, targets), expected)
    right = (logits.argmax(-1) == targets).float().mean(dim=1)
    assert torch.equal(task().correct(logits, targets), right)


def test_bits_per_character_by_hand() -> None:
    """A loss of log 8 is three bits a token; with one token for two characters, one and a half a character."""
    assets = {"tokens_per_character": {"test": 0.5}}
    figures = task().figures("test", math.log(8), assets)
    assert figures == {"bits_per_character": pytest.approx(1.5), "perplexity": pytest.approx(8.0)}


def test_an_evaluation_holds_no_more_logits_than_fit() -> None:
    assert task().evaluation_batch == 512
    large = task(tokeniser="bpe", vocabulary=50_000, length=1024)
    assert 0 < large.evaluation_batch * 50_000 * 1024 <= max(LARGEST_LOGITS, 50_000 * 1024)


# --- the model of the task --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mechanism", [*MECHANISMS, "super+per-head", "standard+align"])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("equal", [False, True])
def test_sizes_are_computed_as_models_are_built(mechanism: str, equal: bool, window: int | None) -> None:
    one = task(equal_params=equal, window=window)
    assert one.size(mechanism, 2) == sum(p.numel() for p in one.build(mechanism, 2).parameters())


SHARED: dict[str, Any] = {"width": 48, "kv_heads": 2}
"""Of six heads, three share one of keys and values."""


@pytest.mark.parametrize("mechanism", [*MECHANISMS, "super+per-head", "standard+align+per-head"])
@pytest.mark.parametrize("equal", [False, True])
def test_sizes_of_models_that_share_heads(mechanism: str, equal: bool) -> None:
    one = task(equal_params=equal, **SHARED)
    model = one.build(mechanism, 6)
    assert one.size(mechanism, 6) == sum(p.numel() for p in model.parameters())
    layer = model.blocks[0].attention
    assert layer.num_kv_heads == (2 if "k" in layer.mechanism.projections else 6)


@pytest.mark.parametrize("mechanism", ["optimised", "efficient", "super"])
def test_equal_parameters_are_those_of_standard_with_shared_heads(mechanism: str) -> None:
    """Every allowed width is tried, and none is nearer."""
    one = task(equal_params=True, **SHARED)
    aim = sum(p.numel() for p in replace(one, equal_params=False).build("standard", 6).parameters())
    chosen = one.sized(Variant.of(mechanism), 6).width
    sizes = {
        width: sum(p.numel() for p in task(**SHARED | {"width": width}).build(mechanism, 6).parameters())
        for width in (48, *range(12, 121, 12))
    }
    assert abs(sizes[chosen] - aim) == min(abs(size - aim) for size in sizes.values())
    assert sizes[chosen] == one.size(mechanism, 6)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_every_mechanism_refuses_heads_that_cannot_be_shared(mechanism: str) -> None:
    for measure in (task(width=48, kv_heads=4).build, task(width=48, kv_heads=4).size):
        with pytest.raises(ValueError, match="kv_heads=4 must divide heads=6"):
            measure(mechanism, 6)


@pytest.mark.parametrize("positions", POSITIONS)
def test_torchs_own_layer_computes_the_twin(positions: str) -> None:
    twin = task(positions=positions, window=5, kv_heads=1).torch_twin()
    ours, tokens = twin.build("standard", 2).eval(), torch.randint(20, (3, 23))
    theirs = on_torch(ours)
    assert theirs is not None
    torch.testing.assert_close(theirs(tokens), ours(tokens))


def test_matrices_decay_and_gains_do_not() -> None:
    model = task().build("super", 2)
    groups = task(weight_decay=0.1).make_optimiser(model).param_groups
    assert [(group["weight_decay"], {p.dim() for p in group["params"]}) for group in groups] == [(0.1, {2}), (0.0, {1})]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_one_seed_gives_one_model_and_mechanisms_share_what_they_can() -> None:
    first, again, other = (
        initial_model(task(), Variant.of(name), 2, 3).state_dict() for name in ("super", "super", "standard")
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert torch.equal(first["blocks.1.attention.q_proj.weight"], other["blocks.1.attention.q_proj.weight"])
    assert torch.equal(first["tokens.weight"], other["tokens.weight"])


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory, splits: Splits) -> Path:
    """A finished run that has learned the language."""
    run = tmp_path_factory.mktemp("run") / "efficient-h2-s0"
    training(run, splits, epochs=6).run()
    return run


def test_a_language_is_learned_and_measured(learned: Path, splits: Splits) -> None:
    result = json.loads((learned / "result.json").read_text())
    assert result["test_loss"] < 0.45
    assert result["test_bits_per_character"] == pytest.approx(result["test_loss"] / math.log(2))
    assert result["test_perplexity"] == pytest.approx(math.exp(result["test_loss"]))
    assert RunRecord.read(learned / "result.json").test_bits_per_character == result["test_bits_per_character"]
    seconds = result["epoch_seconds"]
    assert result["tokens_per_second"] == pytest.approx(len(splits.train) * 23 / seconds)
    assert result["decoded_per_second"] > 0
    assert result["cache_bytes_per_token"] == 2 * 32 * 4  # two layers, one tensor of width 32 in float32


@pytest.mark.parametrize(
    ("mechanism", "widths"), [("standard", 16 + 16), ("optimised", 16 + 32), ("efficient", 32), ("super", 32 + 32)]
)
def test_a_cache_of_shared_heads_is_measured(mechanism: str, widths: int, tmp_path: Path, splits: Splits) -> None:
    """One head of width 16 instead of two for what is projected, in two layers in float32; slices stay whole."""
    training(tmp_path / "run", splits, mechanism, epochs=1, kv_heads=1).run()
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["cache_bytes_per_token"] == 2 * widths * 4
    assert load_run(tmp_path / "run").model.blocks[0].attention.value_heads == (1 if mechanism == "standard" else 2)


def test_the_learned_model_predicts(learned: Path) -> None:
    run = load_run(learned)
    (one,) = run.predict("ann sees bob. bob nod")
    assert (one.label, one.probabilities) == ("s", {})
    assert one.probability > 0.9
    labels = [p.label for p in run.predict(["tom sees eve. ev", "ann sees bob. bo"])]
    assert labels == ["e", "b"]
    assert run.predict("eve sees ann. ann nods.")[0].label == "↵"
    long = run.predict("bob sees tom. tom nods.\n" * 4 + "ann sees eve. e")
    assert long[0].label == "v"


def test_what_cannot_be_continued_is_refused(splits: Splits) -> None:
    with pytest.raises(TypeError, match=r"reads texts \(str\), received 3 \(int\)"):
        task().encode(["a", 3], splits.assets)
    with pytest.raises(ValueError, match="continues a text; received an empty one"):
        task().encode("", splits.assets)
    with pytest.raises(ValueError, match=r"no token for 'X' \(U\+0058\)"):
        task().encode("ann X", splits.assets)
    with pytest.raises(
        ValueError, match=r"equally many tokens are read together, received 3, 4\. .* use `better-attention gen"
    ):
        task().encode(["ann", "anna"], splits.assets)


def test_attention_maps_name_their_tokens(learned: Path, splits: Splits) -> None:
    maps = draw_maps("efficient-h2-s0", load_run(learned).model, task(), splits)
    assert len(maps) == 2 * 2
    assert maps[0].tokens is not None
    assert "".join(maps[0].tokens) == text_of(splits, splits.test.inputs[0]).replace("\n", "↵")
    assert maps[0].label == "test text from token 0"
    assert maps[2].label != maps[0].label


# --- epochs and learning rates ----------------------------------------------------------------------------------------


def test_learning_rates_by_hand() -> None:
    whole = [task(lr=0.5).learning_rate(n, 7) for n in range(7)]
    assert whole == [0.5] * 7, "without a schedule every update has the rate itself, to the last bit"
    linear = task(lr=0.8, schedule="linear")
    assert [linear.learning_rate(n, 4) for n in range(4)] == pytest.approx([0.8, 0.6, 0.4, 0.2])
    cosine = task(lr=0.8, schedule="cosine", warmup=3)
    rates = [cosine.learning_rate(n, 7) for n in range(7)]
    half = math.sqrt(0.5)
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.4 * (1 + half), 0.4, 0.4 * (1 - half)])
    assert [task(lr=0.8, warmup=3).learning_rate(n, 5) for n in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8])
    assert [task(lr=0.8, schedule="linear", warmup=9).learning_rate(n, 3) for n in range(3)] == pytest.approx(
        [0.08, 0.16, 0.24]
    )


def test_epochs_end_after_so_many_updates_and_rates_follow_all_of_them(tmp_path: Path, splits: Splits) -> None:
    """Three epochs of two updates: rates of six, each epoch with other samples, its loss the mean over those it saw."""
    seen: list[tuple[int, int, int, float]] = []
    run = training(
        tmp_path / "run",
        splits,
        **{"epochs": 3, "epoch_updates": 2, "schedule": "linear", "warmup": 2, "lr": 1e-3},
        progress=lambda at, steps: seen.append((at.epoch, at.step, steps, run.optimiser.param_groups[0]["lr"])),
    )
    record = run.run()
    assert [row[:3] for row in seen] == [(epoch, step, 2) for epoch in (1, 2, 3) for step in (1, 2)]
    assert [row[3] for row in seen] == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 7.5e-4, 5e-4, 2.5e-4])
    curve = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    # Hardly trained, so that each mean is near what guessing among the tokens costs; sums over all samples were not.
    chance = math.log(len(splits.assets["symbols"]) + 1)
    assert [row["train_loss"] for row in curve] == pytest.approx([chance] * 3, rel=0.2)
    result = record.values
    assert result["tokens_per_second"] == pytest.approx(2 * 32 * 23 / result["epoch_seconds"])


def test_an_epoch_of_more_updates_than_there_are_is_whole(splits: Splits) -> None:
    few = task(epoch_updates=10**6)
    assert few.epoch_updates_of(len(splits.train)) == math.ceil(len(splits.train) / 32)


def test_settings_of_runs_that_knew_no_schedule_are_read() -> None:
    settings = task(dropout=0.3).settings()
    for name in ("epoch_updates", "schedule", "warmup", "kv_heads"):
        del settings[name]
    assert task().with_settings(settings) == task(dropout=0.3)


@pytest.mark.parametrize(
    ("mechanism", "changes"),
    [
        ("standard", {}),
        ("super", {}),
        ("super", {"window": 5}),
        ("optimised", {"kv_heads": 1}),
        ("efficient", {"epoch_updates": 3, "schedule": "cosine", "warmup": 2}),
    ],
)
def test_an_interrupted_run_ends_with_the_same_bits(
    mechanism: str, changes: dict[str, Any], tmp_path: Path, splits: Splits
) -> None:
    changes = {"epochs": 2, "dropout": 0.1, **changes}
    fewer = replace(splits, train=Split(splits.train.inputs[:160], splits.train.targets[:160]))

    def weights(name: str) -> str:
        return sha256((tmp_path / name / "model.safetensors").read_bytes()).hexdigest()

    training(tmp_path / "straight", fewer, mechanism, **changes).run()
    stops = iter([False, False, True])
    with pytest.raises(Interrupted):
        training(tmp_path / "broken", fewer, mechanism, **changes, stop=lambda: next(stops)).run()
    assert not (tmp_path / "broken" / "result.json").exists()
    training(tmp_path / "broken", fewer, mechanism, **changes).run()
    assert weights("broken") == weights("straight")


def test_byte_pairs_are_a_setting(file: Path) -> None:
    pytest.importorskip("tokenizers", reason='tokenizers is not installed: pip install "better-attention[bpe]"')
    words = task(tokeniser="bpe", vocabulary=300).fitted(file)
    splits = words.load(file)
    rate = splits.assets["tokens_per_character"]["test"]
    assert 0.1 < rate < 0.6
    assert int(splits.train.inputs.max()) < words.vocabulary <= 300
    shown = words.show(splits.test.inputs[0], splits.assets).tokens
    assert shown is not None
    held = language()[-round(0.1 * len(language())) :].replace("\n", "↵")
    assert held.startswith("".join(shown))
    model = words.build("efficient", 2)
    assert model(splits.test.inputs[:2]).shape == (2, 23, words.vocabulary)


@pytest.mark.data
def test_the_real_text_has_sixty_five_characters(real_data: Path) -> None:
    small = TASKS["text-lm"]("small").fitted(real_data)
    splits = small.load(real_data)
    assert isinstance(small, LanguageTask)
    assert small.vocabulary == 66
    assert len(splits.assets["symbols"]) == 65
    assert splits.departures == ()
