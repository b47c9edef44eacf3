"""Reading by name: where it looks, what it says when nothing is there, and what it never does."""

from __future__ import annotations

import ast
import socket
from pathlib import Path

import pytest

import better_attention.lab.data
from better_attention.lab.data.catalogue import read
from better_attention.lab.data.published import SOURCES
from better_attention.lab.data.samples import DataError, Images, NotFetched, Texts
from helpers.layouts import write_imdb, write_mnist


def test_the_table() -> None:
    assert {"digits", "mnist", "cifar100", "imdb", "amazon", "translation"} <= set(SOURCES)
    assert all(name == source.name for name, source in SOURCES.items())
    with pytest.raises(TypeError):
        SOURCES["mine"] = SOURCES["mnist"]  # type: ignore[index]


@pytest.mark.parametrize("below", ["", "mnist"])
def test_in_the_folder_or_below_it_under_the_name(tmp_path: Path, below: str) -> None:
    write_mnist(tmp_path / below)
    assert isinstance(read("mnist", tmp_path), Images)


def test_below_comes_before_beside(tmp_path: Path) -> None:
    write_imdb(tmp_path / "aclImdb_v1.tar.gz", {"other": "text"})  # would be refused
    write_imdb(tmp_path / "imdb" / "aclImdb_v1.tar.gz")
    assert isinstance(read("imdb", tmp_path), Texts)


def test_a_file_itself(tmp_path: Path) -> None:
    assert isinstance(read("imdb", write_imdb(tmp_path / "reviews.tar.xz")), Texts)


def test_the_home_only_where_no_folder_is_named(cache: Path, tmp_path: Path) -> None:
    write_mnist(cache / "mnist")
    assert isinstance(read("mnist"), Images)
    (tmp_path / "mine").mkdir()
    with pytest.raises(NotFetched):
        read("mnist", tmp_path / "mine")
    write_mnist(cache)  # not where the home keeps it
    for file in (cache / "mnist").iterdir():
        file.unlink()
    with pytest.raises(NotFetched):
        read("mnist")


@pytest.mark.parametrize("name", ["mnist", "imdb"])
def test_what_is_missing_says_how_to_get_it(cache: Path, name: str) -> None:
    with pytest.raises(NotFetched) as caught:
        read(name)
    message = str(caught.value)
    assert isinstance(caught.value, ValueError)
    for part in (
        f"'{name}' is not in {cache / name}",
        f"`better-attention data fetch {name}`",
        f"`better-attention data import {name} FROM`",
        "`--data DIR`",
        SOURCES[name].layout,
    ):
        assert part in message


def test_a_folder_that_does_not_exist_and_a_name_that_does_not(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere does not exist"):
        read("mnist", tmp_path / "nowhere")
    with pytest.raises(DataError, match="unknown data set 'mnits': choose one of amazon, cifar100, digits, imdb"):
        read("mnits")


def test_reading_never_goes_to_the_network(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bomb(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", bomb)
    monkeypatch.setattr(socket, "getaddrinfo", bomb)
    for name in ("mnist", "imdb"):
        with pytest.raises(NotFetched):
            read(name)
    read("digits")
    read("mnist", write_mnist(tmp_path / "mine"))


FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "joblib", "dill", "cloudpickle", "yaml"}
FORBIDDEN_CALLS = {"eval", "exec", "extract", "extractall", "mktemp", "system", "popen", "load"}


def unsafe(code: str) -> list[str]:
    """What in ``code`` could run or write what a stranger's file says."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [name for name in names if name.split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            owner = getattr(getattr(node.func, "value", None), "id", "")
            # json's load and a data set's own are meant by these names; numpy's and torch's are not.
            found += [name] if name in FORBIDDEN_CALLS and owner not in ("source", "row", "json") else []
            for keyword in node.keywords:
                value = getattr(keyword.value, "value", None)
                if (keyword.arg, value) in (("verify", False), ("shell", True), ("allow_pickle", True)):
                    found.append(f"{keyword.arg}={value}")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("http://"):
            found.append(node.value)
    return found


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from joblib import load",
        "import os, marshal",
        "tar.extractall(path)",
        "tar.extract(member)",
        "np.load(file)",
        "torch.load(file)",
        "numpy.fromfile(f, allow_pickle=True)",
        "eval(text)",
        "tempfile.mktemp()",
        "requests.get(url, verify=False)",
        "subprocess.run(line, shell=True)",
        "os.system(line)",
        "url = 'http://data.example/file'",
    ],
)
def test_the_scan_finds_what_it_is_for(code: str) -> None:
    assert unsafe(code)


def test_no_reader_runs_or_unpacks_what_a_file_says() -> None:
    files = sorted(Path(better_attention.lab.data.__file__).parent.rglob("*.py"))
    assert len(files) > 5
    assert {file.name: found for file in files if (found := unsafe(file.read_text(encoding="utf-8")))} == {}
