"""``convert``, ``distil`` and ``export`` on a model that save_pretrained of transformers wrote, with texts of ours."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest

from better_attention.cli import main
from better_attention.lab.trained.model import open_trained
from helpers import hosts

pytestmark = pytest.mark.filterwarnings("ignore")  # of other libraries
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A tiny BERT with random weights and a tokeniser of letters."""
    transformers = hosts.transformers()
    sizes: dict[str, float] = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 31,
    }
    sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(vocab_size=40, max_position_embeddings=30, **sizes)
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    draw = random.Random(0)
    lines = (" ".join(draw.choices(LETTERS, k=draw.randint(4, 40))) for _ in range(80))
    (tmp_path / "texts.txt").write_text("\n".join(lines))
    return tmp_path / "bert"


@pytest.mark.hosts
def test_a_model_of_transformers_is_converted_distilled_and_exported(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxscript")
    texts, out = ["--texts", str(tmp_path / "texts.txt")], tmp_path / "out"
    words = ["convert", str(bert), "optimised", "--approximate", *texts, "--out", str(out), "--json"]
    capsys.readouterr()
    assert main.main(words) == 0
    story = json.loads(capsys.readouterr().out)
    assert story["calibration_samples"] == 72  # nine tenths of the texts
    assert story["accuracy"] == {"before": None, "after": None}
    assert all(layer["error_after"] < layer["error_before"] for layer in story["conversion"]["layers"])
    assert type(open_trained(out).model).__name__ == "BertModel"
    assert main.main([*words, "--calibrate", "0"]) == 0  # the fit leaves nothing to learn
    capsys.readouterr()
    distilled = str(tmp_path / "distilled")
    options = ["--teacher", str(bert), "--out", distilled, "--device", "cpu", "--json"]
    options += ["--hidden-epochs", "8", "--batch-size", "8", "--lr", "0.01"]
    assert main.main(["distil", str(out), *options, *texts]) == 0
    losses = json.loads(capsys.readouterr().out)["hidden"]
    assert sum(losses[-1]) < 0.5 * sum(losses[0])
    assert main.main(["export", distilled, *texts, "--out", str(tmp_path / "m.onnx"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parity"]["worst"] < 1e-5


@pytest.mark.hosts
def test_what_a_model_of_transformers_needs_is_told(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "out")]
    for words, said in (
        (["convert", str(bert), "optimised", "--calibrate", "9", *out], "name a file with one text in each line"),
        (["convert", str(bert), "optimised", "--data", ".", *out], "give it a file of texts with --texts"),
        (["export", str(bert), *out], "name a file with one text in each line"),
    ):
        assert main.main(words) == 2
        assert said in capsys.readouterr().err
    (tmp_path / "one.txt").write_text("a b c\n\n")
    assert main.main(["export", str(bert), "--texts", str(tmp_path / "one.txt"), *out]) == 2
    assert "holds 1 text: write at least two" in capsys.readouterr().err
    (bert / "model.safetensors").unlink()
    assert main.main(["convert", str(bert), "optimised", *out]) == 2
    assert "holds no weights in safetensors" in capsys.readouterr().err


def test_without_transformers_the_command_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    assert main.main(["convert", str(tmp_path), "optimised", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "pip install 'better-attention[transformers]'" in said
    assert "Traceback" not in said
