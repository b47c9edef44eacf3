"""What a release consists of: one version, a citation, a workflow without secrets, and files that are what they say."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

import better_attention
from helpers import CHECKOUT
from release import build, check, sbom

WORKFLOW = CHECKOUT / ".github" / "workflows" / "release.yml"
PLATFORM = build.PLATFORMS[0]


def test_the_version_stands_in_one_place() -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text("utf-8"))
    assert "version" not in project["project"]
    assert "version" in project["project"]["dynamic"]
    assert (CHECKOUT / project["tool"]["scikit-build"]["metadata"]["version"]["input"]).samefile(
        better_attention.__file__
    )
    assert sbom.version_of_source() == better_attention.__version__


def test_the_changelog_and_the_citation_know_the_version() -> None:
    assert f"\n## [{better_attention.__version__}]" in (CHECKOUT / "CHANGELOG.md").read_text("utf-8")
    citation = yaml.safe_load((CHECKOUT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == better_attention.__version__
    assert citation["cff-version"] == "1.2.0"
    assert {one["url"].rpartition("/")[2] for one in citation["references"]} == {"2403.01643", "2407.18601"}
    assert all(citation[key] for key in ("message", "title", "authors", "license"))


def test_the_workflow_keeps_no_secret_and_takes_nothing_by_a_name_that_can_move() -> None:
    text = WORKFLOW.read_text("utf-8")
    assert "secrets" not in text
    assert "password" not in text.replace("no password", "")
    used = re.findall(r"uses: (\S+)", text)
    assert len(used) >= 5
    assert all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action) for action in used)
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {}
    rights = {name: job["permissions"] for name, job in workflow["jobs"].items()}
    assert rights == {"build": {"contents": "read"}, "try": {}, "publish": {"id-token": "write"}}
    publish = workflow["jobs"]["publish"]
    assert publish["needs"] == "try"
    assert "github.ref_type == 'tag'" in publish["if"]
    assert publish["environment"]["name"] == "pypi"


def test_every_tool_is_pinned() -> None:
    lines = [line for line in build.REQUIREMENTS.read_text("utf-8").splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w-]+==[\w.]+", line) for line in lines)
    assert {"build", "scikit-build-core", "ziglang", "auditwheel", "twine"} <= {
        line.partition("==")[0] for line in lines
    }


def test_tools_of_another_version_are_named(tmp_path: Path) -> None:
    pinned = tmp_path / "requirements.txt"
    pinned.write_text(f"pytest==0.1  # a remark\npytest=={pytest.__version__}\nno-such-tool==1\n", "utf-8")
    assert list(build.other_versions(pinned)) == [
        f"pytest is {pytest.__version__}, expected 0.1",
        "no-such-tool is not installed, expected 1",
    ]


def test_the_page_names_every_file() -> None:
    page = (CHECKOUT / "docs" / "wheels.md").read_text("utf-8")
    for platform in build.PLATFORMS:
        ending = platform.tag.rpartition(".")[2]  # of several tags, the last
        (line,) = (line for line in page.splitlines() if f"`{ending}.whl`" in line)
        assert f"`{platform.library}`" in line
        assert ("AVX-512, AVX2" in line) == (platform.processor in ("x86_64", "AMD64"))
        assert ("NEON" in line) == (platform.processor in ("aarch64", "arm64"))


def test_the_bill_has_the_digest_of_every_file_and_is_the_same_each_time(tmp_path: Path) -> None:
    wheel = tmp_path / "better_attention-1-py3-none-any.whl"
    wheel.write_bytes(b"a wheel")
    path = sbom.write_sbom(tmp_path, [wheel], 1_700_000_000)
    first = path.read_bytes()
    bill = json.loads(first)
    (file,) = bill["metadata"]["component"]["components"]
    assert (file["name"], file["hashes"][0]["content"]) == (wheel.name, hashlib.sha256(b"a wheel").hexdigest())
    assert bill["metadata"]["timestamp"] == "2023-11-14T22:13:20Z"
    assert bill["metadata"]["component"]["version"] == better_attention.__version__
    assert [one["purl"] for one in bill["components"] if "purl" in one] == ["pkg:pypi/torch"]
    assert sbom.write_sbom(tmp_path, [wheel], 1_700_000_000).read_bytes() == first


def wheel_of(
    folder: Path, tag: str, files: dict[str, bytes], *, pure: bool, sources: Sequence[str] = check.SOURCES
) -> Path:
    """A wheel with these files, and those that every wheel has."""
    path = folder / f"better_attention-1-py3-none-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("better_attention-1.dist-info/WHEEL", f"Root-Is-Purelib: {str(pure).lower()}\n")
        for name in sources:
            archive.writestr(name, b"")
        for name, content in files.items():
            archive.writestr(name, content)
    return path


LIBRARY = f"better_attention/native/{PLATFORM.library}"


def test_a_wheel_that_is_what_it_says_passes(tmp_path: Path) -> None:
    assert check.contents(wheel_of(tmp_path, PLATFORM.tag, {LIBRARY: b""}, pure=False)).endswith(PLATFORM.library)
    assert check.contents(wheel_of(tmp_path, "any", {}, pure=True)).endswith("no compiled library")


@pytest.mark.parametrize(
    ("tag", "files", "pure", "message"),
    [
        pytest.param(PLATFORM.tag, {}, False, "libraries", id="no library"),
        pytest.param("any", {LIBRARY: b""}, True, "libraries", id="a library in the pure wheel"),
        pytest.param(PLATFORM.tag, {LIBRARY: b"", LIBRARY + ".a": b""}, False, "libraries", id="another library"),
        pytest.param(PLATFORM.tag, {LIBRARY: bytes(1_000_001)}, False, "stripped", id="not stripped"),
        pytest.param(PLATFORM.tag, {LIBRARY: b""}, True, "pure", id="called pure"),
        pytest.param("any", {}, False, "pure", id="not called pure"),
        pytest.param("any", {"better_attention/a.cpp": b""}, True, "do not belong", id="sources"),
        pytest.param("any", {"tests/a.py": b""}, True, "do not belong", id="another package"),
        pytest.param("any", {"better_attention/a.py": bytes(1_250_000)}, True, "bytes", id="too large"),
    ],
)
def test_a_wheel_that_is_not_what_it_says_ends_the_check(
    tag: str, files: dict[str, bytes], pure: bool, message: str, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=message):
        check.contents(wheel_of(tmp_path, tag, files, pure=pure))


def test_a_wheel_without_the_sources_of_the_kernels_for_jax_ends_the_check(tmp_path: Path) -> None:
    wheel = wheel_of(tmp_path, "any", {}, pure=True, sources=check.SOURCES[:1])
    with pytest.raises(SystemExit, match=r"lacks \['better_attention/native/cpp/api\.h'\]"):
        check.contents(wheel)
