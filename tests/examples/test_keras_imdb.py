"""keras.io's text example with our layer: the paper's parameter counts, and a run over reviews in a folder."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from better_attention.lab import published
from helpers import CHECKOUT

keras = pytest.importorskip("keras", reason="needs pip install 'better-attention[keras]'")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("keras_imdb", CHECKOUT / "examples" / "keras_imdb.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def paper_rows() -> list[dict[str, str]]:
    with (Path(published.__file__).parent / "table08_imdb.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("row", paper_rows(), ids=lambda row: f"{row['mechanism']}-{row['heads']}")
def test_attention_has_the_parameters_of_the_papers_table(row: dict[str, str], example: ModuleType) -> None:
    block = example.TransformerBlock(int(row["d_model"]), int(row["heads"]), 32, 32, row["mechanism"])
    block.att.build((None, 32, 32), (None, 32, 32))
    assert block.att.count_params() == int(row["attention_params"])


def test_the_whole_model_has_the_papers_parameters(example: ModuleType) -> None:
    model = example.build_model("standard", maxlen=32, num_heads=4, units=6, outputs=1)
    assert model.count_params() == 647_693  # "650K" in the text
    assert example.build_model("efficient", maxlen=32, num_heads=4, units=6, outputs=1).count_params() == 647_693 - 2112


def reviews(folder: Path) -> Path:
    """Short reviews that one word decides, in the official layout."""
    rng = np.random.default_rng(5)
    for split in ("train", "test"):
        for label, word in (("pos", "wonderful"), ("neg", "dreadful")):
            place = folder / "aclImdb" / split / label
            place.mkdir(parents=True)
            for index in range(40):
                filler = " ".join(rng.choice(["the", "film", "was", "plot", "it"], size=9))
                (place / f"{index}_{9 if label == 'pos' else 2}.txt").write_text(f"{filler}<br />A {word} film")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", ["super", "efficient+expressive"])
def test_it_learns_from_reviews_in_a_folder(
    mechanism: str, tmp_path: Path, example: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    result = example.main(["--smoke", "--mechanism", mechanism, "--data", str(reviews(tmp_path)), "--epochs", "30"])
    assert result["accuracy"] > 0.9
    assert f"{mechanism}: {result['parameters']:,} parameters" in capsys.readouterr().out


def test_words_are_numbered_by_frequency(tmp_path: Path, example: ModuleType) -> None:
    (train, labels), (test, _) = example.load(reviews(tmp_path), vocab_size=12)
    assert len(train) == len(test) == len(labels) == 80
    assert {number for review in train for number in review} <= set(range(1, 12))
    assert all(review[0] == 1 for review in train)
    assert train[0][-1] == example.vocabulary(["film film it"], 5)["film"]
    with pytest.raises(SystemExit, match="holds no reviews"):
        example.load(tmp_path / "aclImdb" / "train" / "pos", vocab_size=12)
