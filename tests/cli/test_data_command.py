"""``better-attention data``, through the arguments a user types."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from better_attention.cli import UserError
from better_attention.cli import data as verb
from better_attention.lab.data import store
from better_attention.lab.data.catalogue import read
from better_attention.lab.data.own_pictures import cache as image_cache
from better_attention.lab.data.own_pictures.read import find
from better_attention.lab.data.published import SOURCES, mnist
from better_attention.lab.data.samples import DataError
from better_attention.lab.files import digest
from helpers import publisher as site
from helpers.layouts import write_imdb, write_mnist
from helpers.publisher import HOST, Publisher


def call(*words: str | Path) -> int:
    parser = argparse.ArgumentParser(prog="better-attention data")
    verb.add_arguments(parser)
    return verb.run(parser.parse_args([str(word) for word in words]))


def test_a_running_text_is_shown_with_its_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "input.txt").write_text("a text\nof two lines\n", "utf-8")
    assert call("show", "tinyshakespeare", "--data", tmp_path) == 0
    out = capsys.readouterr().out
    assert "20 characters of running text, which the task splits" in out
    assert "not the official file's" in out
    assert call("show", "tinyshakespeare", "--data", tmp_path, "--json") == 0
    assert json.loads(capsys.readouterr().out)["characters"] == 20


@pytest.mark.parametrize("words", [[], ["list"]])
def test_the_list(cache: Path, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    write_mnist(cache / "mnist")
    assert call(*words) == 0
    out = capsys.readouterr().out
    assert "scikit-learn carries it" in out
    assert "better-attention data fetch imdb" in out
    assert "fetch mnist" not in out


def test_the_list_as_json(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_mnist(tmp_path / "mine")
    assert call("--json", "--data", tmp_path / "mine") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["folder"] == str(tmp_path / "mine")
    states = {row["name"]: row["state"] for row in record["data_sets"]}
    assert list(states) == list(SOURCES)
    assert states == dict.fromkeys(SOURCES, "absent") | {"digits": "embedded", "mnist": "found"}


def test_decoded_pictures_are_listed_with_their_size(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call() == 0
    assert "decoded pictures" not in capsys.readouterr().out
    photos = tmp_path / "photos"
    for label in range(2):
        (photos / f"class{label}").mkdir(parents=True)
        for number in range(5):
            Image.new("L", (9, 9), 90 * label + number).save(photos / f"class{label}" / f"{number}.png")
    find(photos).pixels(np.arange(10), 8, 1)
    assert call("--json") == 0
    told = json.loads(capsys.readouterr().out)["decoded_pictures"]
    files = list(Path(told["folder"]).glob("*.npy"))
    assert (told["sets"], told["bytes"]) == (1, sum(file.stat().st_size for file in files))
    assert told["bytes"] >= 10 * 8 * 8
    assert call() == 0
    assert (
        f"1 set of decoded pictures, 0 MiB, in {told['folder']}; `better-attention data clear`"
        in capsys.readouterr().out
    )
    assert call("clear") == 0
    assert f"removed 1 set of decoded pictures, 0 MiB, from {told['folder']}" in capsys.readouterr().out
    assert image_cache.held() == (0, 0)
    assert call("clear", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"folder": told["folder"], "sets": 0, "bytes": 0}
    with pytest.raises(UserError, match="remove --data"):
        call("--data", str(tmp_path), "clear")


def test_options_count_before_and_after_the_action(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_mnist(tmp_path)
    for words in (("--data", tmp_path, "--json", "list"), ("list", "--data", tmp_path, "--json")):
        call(*words)
        states = {row["name"]: row["state"] for row in json.loads(capsys.readouterr().out)["data_sets"]}
        assert states["mnist"] == "found"


def test_a_half_filled_folder_is_listed_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    assert call("--data", tmp_path) == 0
    out = capsys.readouterr().out
    assert "incomplete" in out
    assert "lacks t10k-labels-idx1-ubyte" in " ".join(out.split())


def test_import_then_show(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive = write_imdb(tmp_path / "reviews.tar.xz")
    assert call("import", "imdb", archive) == 0
    assert f"imported, in {cache / 'imdb'}" in capsys.readouterr().out
    assert call("show", "imdb") == 0
    out = capsys.readouterr().out
    for part in (
        "5 training and 3 test samples",
        "classes: neg, pos",
        "2 texts occur in both splits",
        digest(archive),
        "not the official file's",
        SOURCES["imdb"].remotes[0].url,
        read("imdb").fingerprint(),
    ):
        assert part in out


def test_show_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_mnist(tmp_path)
    assert call("show", "mnist", "--data", tmp_path, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["train"], record["test"], record["shape"], record["peak"]) == (13, 7, [5, 3], 255)
    assert record["classes"] == list("0123456789")
    assert [file["official"] for file in record["files"]] == [False] * 4
    assert [file["sha256"] for file in record["official"]] == [remote.sha256 for remote in SOURCES["mnist"].remotes]


def test_show_the_embedded_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("show", "digits") == 0
    out = capsys.readouterr().out
    assert "1,438 training and 359 test samples of 8×8, white is 16" in out
    assert "scikit-learn ships no split" in out


def test_show_what_is_not_here_says_how_to_get_it(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("show", "imdb") == 0
    out = capsys.readouterr().out
    assert "not here" in out
    assert "`better-attention data fetch imdb`" in out


def test_show_reads_all_of_it(tmp_path: Path) -> None:
    file = write_mnist(tmp_path) / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(DataError, match="is cut short"):
        call("show", "mnist", "--data", tmp_path)


@pytest.fixture
def small_mnist(publisher: Publisher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MNIST's row with four small files at the loopback server."""
    contents = {file.name: file.read_bytes() for file in write_mnist(tmp_path / "published").iterdir()}
    remotes = tuple(site.remote(contents[remote.name], name=remote.name) for remote in SOURCES["mnist"].remotes)
    monkeypatch.setattr(mnist, "SOURCE", replace(mnist.SOURCE, remotes=remotes))
    publisher.answers = [site.serves(contents[remote.name]) for remote in remotes]
    fetch = store.fetch
    monkeypatch.setattr(store, "fetch", lambda *a, **k: fetch(*a, **k, session=publisher.session(), hosts={HOST}))


@pytest.mark.usefixtures("small_mnist")
def test_fetch_says_what_it_does_line_by_line(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for variable in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(variable, raising=False)
    assert call("fetch", "mnist") == 0
    captured = capsys.readouterr()
    assert captured.err.count("fetching https://data.example/files/") == 4
    assert "\x1b" not in captured.err  # no terminal, no bars
    assert f"fetched, SHA-256 checked, in {cache / 'mnist'}" in captured.out
    call("show", "mnist", "--json")
    assert all(file["official"] for file in json.loads(capsys.readouterr().out)["files"])


@pytest.mark.usefixtures("small_mnist")
def test_fetch_as_json_into_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("fetch", "mnist", "--data", tmp_path / "mine", "--json") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert json.loads(captured.out)["where"] == str(tmp_path / "mine" / "mnist")


@pytest.mark.usefixtures("small_mnist")
def test_fetch_draws_bars_on_a_terminal(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    assert call("fetch", "mnist") == 0
    err = capsys.readouterr().err
    assert "train-images-idx3-ubyte.gz" in err
    assert "\x1b[" in err


def test_mistakes(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        DataError,
        match="unknown data set 'minst': choose one of amazon, cifar100",
    ):
        call("show", "minst")
    with pytest.raises(UserError, match="'images' reads your own files in place: `better-attention compare images"):
        call("show", "images")
    with pytest.raises(DataError, match="'digits' needs no download"):
        call("fetch", "digits")
    with pytest.raises(DataError, match="does not hold imdb"):
        call("import", "imdb", tmp_path)
    for words in (["fetch"], ["import", "mnist"], ["burn", "mnist"]):
        with pytest.raises(SystemExit, match="2"):
            call(*words)
    assert "usage: better-attention data" in capsys.readouterr().err
