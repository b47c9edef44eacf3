"""``better-attention inspect``: a run, a converted model, a model in Python, and what is refused."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

import better_attention as ba
from better_attention.cli import main
from helpers import hosts

SHORT = ["--mechanisms", "super", "--scale", "smoke", "--epochs", "1", "--seeds", "1", "--device", "cpu"]

MODELS = """
import torch
from torch import nn


def encoder():
    one = nn.TransformerEncoderLayer(6, 1, 11, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(one, num_layers=2, enable_nested_tensor=False)


def inputs():
    torch.manual_seed(3)
    return [torch.randn(1, 5, 6), torch.randn(1, 4, 6)]


def number():
    return 7
"""


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run of the digits task."""
    out = tmp_path_factory.mktemp("digits")
    assert main.main(["compare", "digits", *SHORT, "--out", str(out)]) == 0
    return out / "super-h4-s0"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with a module of the user's in it."""
    (tmp_path / "my_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("my_models", None)


def inspect(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The page that is written, whose path is printed."""
    capsys.readouterr()
    assert main.main(["inspect", *map(str, arguments)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    return Path(printed.strip()).read_text("utf-8")


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main.main(["inspect", *map(str, arguments)]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def test_a_run_on_its_test_samples(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.read_bytes() for path in digits.iterdir()}
    monkeypatch.chdir(tmp_path)
    html = inspect(capsys, digits)
    assert [path.name for path in tmp_path.iterdir()] == ["inspection-super-h4-s0.html"]
    assert html.count('role="radiogroup"') == 3
    assert html.count('type="radio"') == 3 * 2 * 4
    assert "Alignment kernels" in html
    assert {path: path.read_bytes() for path in digits.iterdir()} == before
    assert inspect(capsys, digits, "--examples", 1).count('role="radiogroup"') == 1  # replaces its own page


def test_named_samples_and_layers(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    html = inspect(capsys, digits, "--index", 0, "--index", 3, "--layers", 1, "--out", page)
    assert html.count('role="radiogroup"') == 2
    assert html.count('type="radio"') == 2 * 4
    assert "test sample 3, class" in html
    assert "layer 2, head 1" in html
    assert "layer 1, head 1" not in html


def test_a_converted_model(module: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(6, 1, 11, batch_first=True), num_layers=2, enable_nested_tensor=False
    )
    ba.convert(encoder, "efficient")
    ba.save_converted(encoder, module / "converted")
    options = ("--model", "my_models:encoder", "--samples", "my_models:inputs")
    html = inspect(capsys, "converted", *options, "--out", "page.html")
    assert "<dd>efficient</dd>" in html
    assert html.count('type="radio"') == 2 * 2
    assert inspect(capsys, "converted/recipe.json", *options, "--out", "page.html") == html
    assert "holds no recipe.json" in refused(capsys, "converted.old", *options)
    assert "add --model" in refused(capsys, "converted", *options[2:])
    assert "needs --samples" in refused(capsys, "converted", *options[:2])
    assert "is a model, for which --index has no meaning" in refused(capsys, "converted", *options, "--index", 0)


def test_what_the_command_converted_describes_itself(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there, page = tmp_path / "efficient", tmp_path / "page.html"
    assert main.main(["convert", str(digits), "efficient", "--approximate", "--out", str(there)]) == 0
    html = inspect(capsys, there, "--index", 0, "--out", page)
    assert "<dt>mechanism</dt><dd>super</dd>" in html
    assert "<dt>converted to</dt><dd>efficient</dd>" in html
    assert html.count('type="radio"') == 2 * 4
    assert "Alignment kernels" not in html
    assert "says itself what its model is" in refused(capsys, there, "--model", "a:b", "--out", page)


@pytest.mark.hosts
@pytest.mark.filterwarnings("ignore")
def test_a_model_of_transformers_reads_texts_by_its_own_tokeniser(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    library = hosts.transformers()
    (tmp_path / "bert").mkdir()
    vocabulary = tmp_path / "bert" / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "film"]))
    library.BertTokenizer(str(vocabulary)).save_pretrained(tmp_path / "bert")
    library.BertModel(hosts.bert(24, 3).config).save_pretrained(tmp_path / "bert")  # with its pooling layer
    assert main.main(["convert", str(tmp_path / "bert"), "standard", "--out", str(tmp_path / "converted")]) == 0
    page = tmp_path / "page.html"
    html = inspect(capsys, tmp_path / "converted", "a good film", "--out", page)
    assert html.count('type="radio"') == 2 * 3
    shown = re.findall(r"<mark[^>]*>([^<]*)</mark>", html)
    assert shown[:5] == ["[CLS]", "[UNK]", "good", "film", "[SEP]"]
    assert "name texts" in refused(capsys, tmp_path / "converted", "--out", page)
    assert "convert(model" in refused(capsys, tmp_path / "bert", "a good film", "--out", page)  # not converted


def test_a_model_in_python(module: Path, capsys: pytest.CaptureFixture[str]) -> None:
    html = inspect(capsys, "my_models:encoder", "--samples", "my_models:inputs", "--layers", "layers.1.*")
    assert (module / "inspection-my-models-encoder.html").exists()
    assert html.count('type="radio"') == 2
    assert "<dd>standard</dd>" in html
    assert "layers.\N{ZERO WIDTH SPACE}1" in html


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("my_models:decoder", "my_models has no function 'decoder'"),
        ("her_models:encoder", "No module named 'her_models'"),
        ("my_models:number", "expected a function that returns an nn.Module, received 7 (int)"),
    ],
)
def test_a_function_that_cannot_be_used(
    module: Path, capsys: pytest.CaptureFixture[str], named: str, said: str
) -> None:
    assert said in refused(capsys, named, "--samples", "my_models:inputs")


def test_samples_that_cannot_be_used(module: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "inputs must be a list of what the model takes, received 7" in refused(
        capsys, "my_models:encoder", "--samples", "my_models:number"
    )


def test_what_is_refused_of_a_run(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    assert "fits no attention layer" in refused(capsys, digits, "--layers", "2", "--out", page)
    assert "is a run, for which --samples has no meaning" in refused(capsys, digits, "--samples", "a:b", "--out", page)
    assert "omit one of them" in refused(capsys, digits, "--index", 0, "--examples", 2, "--out", page)
    assert "does not exist" in refused(capsys, tmp_path / "nowhere", "--out", page)
    assert not page.exists()
    page.write_text("my own notes")
    assert "refusing to overwrite" in refused(capsys, digits, "--out", page)
    assert page.read_text() == "my own notes"
