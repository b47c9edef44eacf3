"""The translation task: splits, loss, BLEU, Keras' RMSprop, and a small language that is really learned."""

from __future__ import annotations

import itertools
import json
import math
import random
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from accelerate import Accelerator

from better_attention.lab.comparison.run_pictures import draw_maps
from better_attention.lab.runs import checkpoint
from better_attention.lab.runs.folder import RunFolder
from better_attention.lab.runs.job import Job
from better_attention.lab.runs.load import load_run
from better_attention.lab.tasks.catalogue import TASKS
from better_attention.lab.tasks.optimisers import RMSprop
from better_attention.lab.tasks.splits import Split, Splits
from better_attention.lab.tasks.translation import TranslationTask, bleu, cut_pairs, sentences
from better_attention.lab.tasks.variant import Variant
from better_attention.lab.training.loop import Training
from better_attention.lab.training.progress import Interrupted
from better_attention.lab.training.randomness import initial_model

ADJECTIVES = {"red": "rojo", "small": "pequeño", "old": "viejo", "sad": "triste", "cold": "frío", "tall": "alto"}
NOUNS = {"cat": "gato", "dog": "perro", "bird": "pájaro", "horse": "caballo", "wolf": "lobo", "fish": "pez"}
VERBS = {"sees": "ve", "loves": "ama", "hears": "oye", "finds": "encuentra"}


def write_language(folder: Path, pairs: int = 900) -> Path:
    """A language in Anki's layout: word by word, but adjectives follow their noun; some sentences occur twice."""
    every = list(itertools.product(ADJECTIVES, NOUNS, VERBS, ADJECTIVES, NOUNS))
    lines = []
    for a, b, c, d, e in random.Random(0).sample(every, pairs):
        target = f"{NOUNS[b]} {ADJECTIVES[a]} {VERBS[c]} {NOUNS[e]} {ADJECTIVES[d]}"
        lines.append(f"The {a} {b} {c} the {d} {e}.\t¡El {target}!\tmade up")
    lines += [lines[row].replace("The", "THE").replace("!", "?") for row in range(40)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spa.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def task(**changes: Any) -> TranslationTask:
    base = TASKS["translation"]("smoke")
    assert isinstance(base, TranslationTask)
    small: dict[str, Any] = {
        **{"vocabulary": 29, "width": 32, "hidden": 32, "length": 9, "train_samples": None, "test_samples": None},
        **{"default_heads": 2, "heads": (2,), "batch_size": 32, "lr": 3e-3, "output_dropout": 0.1},
        **{"test_share": 0.06, "validation_share": 0.06},
    }
    return replace(base, **(small | changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_language(tmp_path_factory.mktemp("language"))


@pytest.fixture(scope="module")
def splits(folder: Path) -> Splits:
    return task().load(folder)


def training(folder: Path, splits: Splits, mechanism: str = "super", **changes: Any) -> Training:
    own = {key: changes.pop(key) for key in ("stop", "checkpoint_seconds") if key in changes}
    return Training(
        Job(task(**changes), Variant.of(mechanism), 2, 0),
        splits=splits,
        folder=RunFolder(folder),
        accelerator=Accelerator(cpu=True),
        **own,
    )


def words(splits: Splits, side: str, tokens: torch.Tensor) -> list[str]:
    return sentences(tokens, splits.assets[side])


# --- data -------------------------------------------------------------------------------------------------------------


def test_inputs_and_targets_are_those_of_the_example(splits: Splits) -> None:
    inputs, targets = splits.train.inputs, splits.train.targets
    assert inputs.shape == (len(splits.train), 9 + 9)
    assert targets.shape == (len(splits.train), 9)
    assert (inputs[:, 9] == 2).all()
    assert torch.equal(inputs[:, 10:], targets[:, :-1])
    assert ((targets == 3).sum(dim=1) == 1).all()
    source, target = words(splits, "source", inputs[:1, :9])[0], words(splits, "target", targets[:1])[0]
    assert source.split()[0] == "the"
    assert target.split()[0] == "el"
    assert {w for w in source.split() if w in NOUNS} == {e for e, s in NOUNS.items() if s in target.split()}
    assert splits.assets["target"][:2] == ["[start]", "[end]"]
    assert sentences(torch.tensor([[4, 28, 5]]), splits.assets["target"][:4]) == [
        f"{splits.assets['target'][2]} ? {splits.assets['target'][3]}"  # a number that no word has
    ]


def test_equal_sources_lie_on_one_side(splits: Splits) -> None:
    parts = [
        set(words(splits, "source", part.inputs[:, :9])) for part in (splits.train, splits.validation, splits.test)
    ]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 900
    assert sum(len(part) for part in (splits.train, splits.validation, splits.test)) == 940
    assert any(note.startswith("all translations of one source sentence lie in one split: ") for note in splits.notes)


def test_the_cut_depends_on_the_data_seed_alone() -> None:
    sources = [str(number // 2) for number in range(1000)]
    first = cut_pairs(task(), sources)
    assert first == cut_pairs(task(lr=1.0), sources)
    assert first != cut_pairs(task(data_seed=1), sources)
    assert sorted(itertools.chain(*first)) == list(range(1000))
    assert [len(part) for part in first] == [880, 60, 60]
    fewer = cut_pairs(task(train_samples=100, test_samples=10), sources)
    assert fewer == (first[0][:100], first[1], first[2][:10])
    with pytest.raises(ValueError, match=r"leaves no test pairs of 4 \(test_share=0\.06, .*Raise the share"):
        cut_pairs(task(), list("abcd"))


def test_the_paper_holds_out_a_thousandth_of_each() -> None:
    paper = TASKS["translation"]("paper")
    assert isinstance(paper, TranslationTask)
    train, validation, test = cut_pairs(paper, [str(number) for number in range(100_000)])
    assert [len(part) for part in (train, validation, test)] == [99_800, 100, 100]
    assert (paper.width, paper.length, paper.vocabulary, paper.hidden) == (1024, 20, 15_000, 2048)
    assert (paper.encoder_layers, paper.layers, paper.heads, paper.seeds) == (1, 2, (1, 2, 4), 5)
    assert (paper.optimiser, paper.lr, paper.batch_size, paper.epochs) == ("rmsprop", 1e-3, 64, 6)
    assert (paper.output_dropout, paper.dropout, paper.beam) == (0.5, 0.0, 1)


def test_vocabularies_know_training_pairs_alone_and_have_no_more_than_their_rows(folder: Path) -> None:
    splits = task(vocabulary=10).load(folder)
    assert (len(splits.assets["source"]) + 2, len(splits.assets["target"]) + 2) == (10, 10)
    assert int(splits.train.inputs.max()) == 9
    (folder / "other").mkdir()
    lines = [f"own{n} word\tpropia{n} palabra\n" for n in range(50)]
    (folder / "other" / "spa.txt").write_text("".join(lines), encoding="utf-8")
    splits = task(vocabulary=1000).load(folder / "other")
    assert len(splits.assets["source"]) == len(splits.train) + 1
    assert ((splits.test.inputs == 1).sum(dim=1) == 2).all()
    assert not (splits.train.inputs == 1).any()


def test_notes_say_what_a_reader_must_know(folder: Path, splits: Splits) -> None:
    notes = "\n".join(splits.notes)
    assert "without Europarl" in notes
    assert "signature nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:" in notes
    assert "greedy decoding" in notes
    assert "means over sentences, each the mean over its tokens" in notes
    assert "not comparable with BLEU on raw text" in notes
    assert "super attention in translation is ours, not the paper's" in notes
    assert "a beam of 4, length penalty 0.6" in "\n".join(task(beam=4, length_penalty=0.6).load(folder).notes)


def test_pairs_without_a_word_are_left_out(tmp_path: Path) -> None:
    write_language(tmp_path)
    with (tmp_path / "spa.txt").open("a", encoding="utf-8") as file:
        file.write("...\t...\nYes.\t!\n")
    splits = task().load(tmp_path)
    assert "2 pairs without a word on one side left out" in splits.notes
    assert sum(map(len, (splits.train, splits.validation, splits.test))) == 940


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beam": 0}, "beam must be >= 1"),
        ({"vocabulary": 4}, "vocabulary must be >= 5"),
        ({"encoder_layers": 0}, "encoder_layers must be >= 1"),
        ({"test_share": 1.5}, "test_share must be between 0 and 1"),
        ({"length_penalty": -1.0}, "length_penalty must be"),
        ({"output_dropout": 2.0}, "output_dropout must be between 0 and 1"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task(**change)


# --- loss, accuracy, BLEU ---------------------------------------------------------------------------------------------


def test_loss_and_accuracy_are_means_over_a_samples_tokens() -> None:
    logits = torch.randn(3, 5, 7, dtype=torch.float64)
    targets = torch.tensor([[4, 2, 3, 0, 0], [5, 6, 4, 1, 3], [3, 0, 0, 0, 0]])
    losses, correct = task().losses(logits, targets), task().correct(logits, targets)
    for row, length in enumerate((3, 5, 1)):
        expected = F.cross_entropy(logits[row, :length], targets[row, :length])
        torch.testing.assert_close(losses[row], expected)
        right = (logits[row, :length].argmax(dim=1) == targets[row, :length]).double().mean()
        assert correct[row] == right
    padded = logits.clone()
    padded[0, 3:] += 100 * torch.randn(2, 7)
    assert torch.equal(task().losses(padded, targets), losses)
    assert torch.equal(task().correct(padded, targets), correct)
    with_one_class = torch.randn(3, 1, 7)  # one target a sample: still no logit of one class of two
    assert task().losses(with_one_class, targets[:, :1]).shape == (3,)


def test_bleu_by_hand() -> None:
    """p1 = 5/6, p2 = 3/5, p3 = 2/4, p4 = 1/3, six words against seven: 100 · exp(1 − 7/6) · (p1 p2 p3 p4)^(1/4)."""
    score, signature = bleu(["el gato ve la casa azul"], ["el gato ve la gran casa roja"])
    assert signature.startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    expected = 100 * math.exp(1 - 7 / 6) * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25
    assert score == pytest.approx(expected, abs=1e-9)
    assert bleu(["el gato ve la casa"], ["el gato ve la casa"])[0] == pytest.approx(100.0)


def test_an_unknown_word_of_a_reference_is_never_matched(splits: Splits) -> None:
    tokens = torch.tensor([[4, 1, 5, 1, 6, 3, 0]])
    first, second, third = splits.assets["target"][2:5]
    assert sentences(tokens, splits.assets["target"]) == [f"{first} ? {second} ? {third}"]
    found = sentences(tokens, splits.assets["target"])
    reference = sentences(tokens, splits.assets["target"], unknown="\N{REPLACEMENT CHARACTER}")
    known = f"{first} secreta {second} oculta {third}"
    assert bleu(found * 4, reference * 4) == bleu(found * 4, [known] * 4)
    assert bleu(found * 4, reference * 4)[0] < 50 < bleu(found * 4, found * 4)[0]


def test_a_model_that_knows_no_word_scores_nothing(splits: Splits) -> None:
    model = initial_model(task(), Variant.of("efficient"), 2, seed=0).eval().requires_grad_(False)
    model.output.bias[1] += 1000.0  # type: ignore[union-attr, operator, index]
    strange = Split(splits.test.inputs[:5], torch.ones_like(splits.test.targets[:5]))
    assert task().predictions(model, strange.inputs, splits.assets)[0].label == " ".join("?" * 9)
    assert task().scores(model, strange, splits.assets) == {"bleu": 0.0}


# --- Keras' RMSprop ---------------------------------------------------------------------------------------------------


def test_rmsprop_is_keras_own() -> None:
    """Two steps by hand: v = 0.9 v + 0.1 g², w -= lr g / √(v + 1e-7), with gradients large and below √ε."""
    weight = torch.nn.Parameter(torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64))
    optimiser = RMSprop([weight], lr=0.01)
    expected, mean = [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]
    for gradient in ([2.0, 1e-4, 0.0], [-1.0, 1e-5, 0.0]):
        weight.grad = torch.tensor(gradient, dtype=torch.float64)
        optimiser.step()
        mean = [0.9 * v + 0.1 * g * g for v, g in zip(mean, gradient, strict=True)]
        expected = [w - 0.01 * g / math.sqrt(v + 1e-7) for w, v, g in zip(expected, mean, gradient, strict=True)]
    assert weight.tolist() == pytest.approx(expected, abs=1e-12)
    assert expected[1] > 1 - 0.01 * (1e-4 + 1e-5) / math.sqrt(1e-7)  # torch's would have moved it by 0.03 at once


def test_rmsprop_shrinks_weights_passes_over_what_has_no_gradient_and_calls_a_closure() -> None:
    one, two = (torch.nn.Parameter(torch.tensor([4.0])) for _ in range(2))
    one.grad = torch.zeros(1)
    optimiser = RMSprop([one, two], lr=0.1, weight_decay=0.5)
    assert optimiser.step(lambda: 7.0) == 7.0
    assert (one.item(), two.item()) == (pytest.approx(4.0 * 0.95), 4.0)


def test_rmsprop_comes_back_exactly_from_a_checkpoint() -> None:
    models = [torch.nn.Linear(3, 5) for _ in range(2)]
    optimisers = [task().make_optimiser(model) for model in models]
    assert all(isinstance(optimiser, RMSprop) for optimiser in optimisers)
    x = torch.randn(7, 3)

    def step(which: int) -> None:
        models[which](x).pow(2).sum().backward()
        optimisers[which].step()
        optimisers[which].zero_grad()

    for _ in range(3):
        step(0)
    models[1].load_state_dict(models[0].state_dict())
    stored = checkpoint.tensor_bytes(checkpoint.optimiser_tensors(optimisers[0]))
    checkpoint.load_optimiser(optimisers[1], safetensors.torch.load(stored))
    step(0)
    step(1)
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory, splits: Splits) -> Path:
    """A finished run that has learned the language."""
    run = tmp_path_factory.mktemp("run") / "super-h2-s0"
    training(run, splits, epochs=16).run()
    return run


def test_a_language_is_learned(learned: Path) -> None:
    result = json.loads((learned / "result.json").read_text())
    assert result["test_bleu"] > 90
    assert result["train_bleu"] > 90
    assert result["test_accuracy"] > 95
    assert result["attention_params"] == 2 * (32 * 32 + 32) + 9 * 9 + 9


def test_the_learned_model_translates_new_sentences(learned: Path) -> None:
    run = load_run(learned)
    found = run.predict(["The old WOLF finds the cold fish!", "the tall bird loves the tall bird"])
    assert [p.label for p in found] == ["el lobo viejo encuentra pez frío", "el pájaro alto ama pájaro alto"]
    assert all(0.5 < p.probability <= 1.0 and p.probabilities == {} for p in found)
    assert run.predict("the old wolf finds the cold fish")[0].label == found[0].label
    wide = replace(run, task=replace(run.task, beam=4))  # type: ignore[call-arg]
    assert wide.predict("the old wolf finds the cold fish")[0].label == found[0].label


def test_what_is_no_sentence_is_refused(splits: Splits) -> None:
    with pytest.raises(TypeError, match=r"reads sentences \(str\), received 3 \(int\)"):
        task().encode(["a", 3], splits.assets)
    with pytest.raises(ValueError, match=r"translates words; '\?!' holds none"):
        task().encode("?!", splits.assets)
    row = task().encode("The cat", splits.assets)[0]
    assert task().show(row, splits.assets).tokens == ("the", "cat", *[""] * 7, "[start]", *[""] * 8)
    long = task().encode("the " * 50, splits.assets)
    assert words(splits, "source", long[:, :9]) == [" ".join(["the"] * 9)]


def test_attention_maps_name_the_keys_of_each_layer(learned: Path, splits: Splits) -> None:
    maps = draw_maps("super-h2-s0", load_run(learned).model, task(), splits)
    assert len(maps) == 2 * 5
    by_layer = {one.layer: one for one in maps[:5]}
    assert set(by_layer) == {
        "encoder.0.attention",
        *(f"decoder.{n}.{k}" for n in (0, 1) for k in ("attention", "cross")),
    }
    source, target = by_layer["decoder.0.cross"].tokens, by_layer["decoder.0.attention"].tokens
    assert source is not None
    assert target is not None
    assert (source[0], target[:2]) == ("the", ("[start]", "el"))
    assert by_layer["encoder.0.attention"].tokens == source
    assert by_layer["encoder.0.attention"].queries == source
    assert by_layer["decoder.0.cross"].tokens == source
    assert by_layer["decoder.0.cross"].queries == by_layer["decoder.0.attention"].queries == target
    shown = " ".join(source).strip(), " ".join(target[1:]).strip().removesuffix(" [end]")
    assert maps[0].label.split(": ")[1] == " → ".join(shown)
    assert maps[0].label != maps[5].label


def test_examples_are_whole_sentences_first(folder: Path) -> None:
    short = task(length=7)
    (folder / "mixed").mkdir()
    lines = [f"short{n} one\tcorta una\n" for n in range(30)] + [f"w{n} b c d e f g h i\tuno dos\n" for n in range(70)]
    (folder / "mixed" / "spa.txt").write_text("".join(lines), encoding="utf-8")
    splits = replace(short, test_share=0.4, vocabulary=500).load(folder / "mixed")
    labels = [label for _, label in short.examples(splits, 2)]
    assert [label.split(": ")[1] for label in labels] == ["? one → corta una", "? b c d e f g → uno dos"]


@pytest.mark.parametrize("mechanism", ["standard", "super"])
def test_an_interrupted_run_ends_with_the_same_bits(mechanism: str, tmp_path: Path, splits: Splits) -> None:
    fewer = replace(splits, train=Split(splits.train.inputs[:160], splits.train.targets[:160]))

    def weights(name: str) -> str:
        return sha256((tmp_path / name / "model.safetensors").read_bytes()).hexdigest()

    training(tmp_path / "straight", fewer, mechanism, epochs=2).run()
    stops = iter([False, False, True])
    with pytest.raises(Interrupted):
        training(tmp_path / "broken", fewer, mechanism, epochs=2, stop=lambda: next(stops)).run()
    assert not (tmp_path / "broken" / "result.json").exists()
    training(tmp_path / "broken", fewer, mechanism, epochs=2).run()
    assert weights("broken") == weights("straight")


def test_scores_take_the_first_pairs_of_a_split_and_the_beam_of_the_task(splits: Splits) -> None:
    few = task(bleu_samples=3)
    model = initial_model(few, Variant.of("efficient"), 2, seed=0).eval()
    asked: list[int] = []
    model.encoder[0].register_forward_pre_hook(lambda _, inputs: asked.append(len(inputs[0])))  # type: ignore[index]
    decoded: list[int] = []
    model.decoder[0].register_forward_pre_hook(lambda _, inputs: decoded.append(len(inputs[0])))  # type: ignore[index]
    first = few.scores(model, splits.test, splits.assets)["bleu"]
    assert (asked, set(decoded)) == ([3], {3})
    expected = few.predictions(model, splits.test.inputs[:3], splits.assets)
    references = words(splits, "target", splits.test.targets[:3])
    assert first == bleu([p.label for p in expected], references)[0]
    replace(few, beam=5).scores(model, splits.test, splits.assets)
    assert decoded[-1] == 3 * 5


@pytest.mark.data
def test_the_real_data_hold_a_thousand_test_sentences(real_data: Path) -> None:
    splits = TASKS["translation"]("small").load(real_data)
    assert (len(splits.train), len(splits.test)) == (30_000, 1_000)
    assert len(splits.assets["source"]) + 2 == len(splits.assets["target"]) + 2 == 5_000
