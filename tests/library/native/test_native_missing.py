"""What is said where the compiled kernels are missing: the reason, and the command that installs them."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest

from better_attention.native import library

PAST_THE_CACHE = "pip install --no-cache-dir --force-reinstall --no-deps "
FROM_AN_INDEX = "--no-binary better-attention better-attention"
"""An index has wheels, and one of them is without the kernels."""


def installed(monkeypatch: pytest.MonkeyPatch, record: object) -> None:
    """Let the package have come from what ``record`` says, a ``direct_url.json``."""

    class Distribution:
        def read_text(self, name: str) -> str | None:
            assert name == "direct_url.json"
            return record if record is None or isinstance(record, str) else json.dumps(record)

    monkeypatch.setattr(metadata, "distribution", lambda name: Distribution())


@pytest.mark.parametrize(
    ("record", "target"),
    [
        (None, FROM_AN_INDEX),
        ({"url": "file:///home/me/my%20clone", "dir_info": {}}, "file:///home/me/my%20clone"),
        ({"url": "file:///home/me/clone", "dir_info": {"editable": True}}, "--editable file:///home/me/clone"),
        ({"url": "https://host/a.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}}, "git+https://host/a.git@abc"),
        ({"url": "https://host/a;b.tar.gz", "archive_info": {}}, "'https://host/a;b.tar.gz'"),
        ("no JSON", FROM_AN_INDEX),
        ([], FROM_AN_INDEX),
    ],
)
def test_the_command_goes_back_to_where_the_package_came_from(
    record: object, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch, record)
    assert library.way_out() == f"with a C++ compiler there: {PAST_THE_CACHE}{target}"


def test_without_any_record_of_the_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", none)
    assert library.way_out().endswith(f"{PAST_THE_CACHE}{FROM_AN_INDEX}")


@pytest.mark.parametrize("how", ["no library", "note", "not a library"])
def test_every_reason_comes_with_the_command(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, None)
    monkeypatch.delenv("BETTER_ATTENTION_NATIVE", raising=False)
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    package = type("Package", (), {"__path__": []})
    monkeypatch.setitem(library.sys.modules, "better_attention", package)
    if how == "note":
        (tmp_path / "missing.txt").write_text("no C++ compiler was found: install g++\n")
    elif how == "not a library":
        (tmp_path / "libbetter_attention.so").write_bytes(b"text")
    reason = library._Library().reason
    assert reason is not None
    assert reason.endswith(f"{PAST_THE_CACHE}{FROM_AN_INDEX}")
    assert ("install g++; with a C++ compiler there: pip" in reason) == (how == "note")
    assert ("could not be loaded" in reason) == (how == "not a library")


def test_every_reason_of_the_build_says_what_to_install() -> None:
    text = (Path(library.__file__).parent / "cpp" / "CMakeLists.txt").read_text("utf-8")
    reasons = [line for line in text.splitlines() if line.strip().startswith('give_up("')]
    assert len(reasons) == 3
    for reason in reasons:
        assert ": install " in reason
        assert "reinstall" not in reason
