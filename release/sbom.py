"""The bill of materials of a release, CycloneDX 1.6 in JSON: our files with digests, and what they need.

Nothing of anybody else is copied into the wheels but the start-up code and the run-time support of zig's compiler
(MIT), which is linked into the kernels.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def write_sbom(out: Path, files: Sequence[Path], epoch: int) -> Path:
    """Write ``better_attention-VERSION.cdx.json`` into ``out`` and return its path.

    Args:
        out: the folder of the release.
        files: its wheels and its sdist.
        epoch: the time that it carries, in seconds since 1970.
    """
    found = bill(files, epoch)
    path = out / f"better_attention-{found['metadata']['component']['version']}.cdx.json"
    path.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n", "utf-8")
    return path


def bill(files: Sequence[Path], epoch: int) -> dict[str, Any]:
    """The bill itself."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    version = version_of_source()
    us = f"pkg:pypi/{project['name']}@{version}"
    needed = [component(line) for line in project["dependencies"]]
    (ziglang,) = re.findall(
        r"^ziglang==(\S+)$", (ROOT / "release" / "requirements.txt").read_text("utf-8"), re.MULTILINE
    )
    zig = {
        "type": "library",
        "bom-ref": f"zig-runtime@{ziglang}",
        "name": "zig compiler run-time support (compiler-rt)",
        "version": ziglang,
        "licenses": [{"license": {"id": "MIT"}}],
        "scope": "required",
        "description": "linked into the compiled kernels of the wheels that have them",
    }
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "timestamp": datetime.fromtimestamp(epoch, UTC).isoformat().replace("+00:00", "Z"),
            "component": {
                "type": "library",
                "bom-ref": us,
                "name": project["name"],
                "version": version,
                "purl": us,
                "description": project["description"],
                "licenses": [{"license": {"id": project["license"]}}],
                "components": [file_component(file) for file in files],
            },
        },
        "components": [*needed, zig],
        "dependencies": [
            {"ref": us, "dependsOn": sorted(one["bom-ref"] for one in [*needed, zig])},
            *({"ref": one["bom-ref"]} for one in [*needed, zig]),
        ],
    }


def version_of_source() -> str:
    """The version, as ``better_attention/__init__.py`` has it."""
    text = (ROOT / "src" / "better_attention" / "__init__.py").read_text("utf-8")
    (version,) = re.findall(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    return version


def component(requirement: str) -> dict[str, Any]:
    """A dependency, which an installer chooses a version of."""
    match = NAME.match(requirement)
    if match is None:
        raise ValueError(f"a dependency begins with a name, received {requirement!r}.")
    name, rest = match[0].lower(), requirement[match.end() :].strip()
    return {
        "type": "library",
        "bom-ref": f"pkg:pypi/{name}",
        "name": name,
        "purl": f"pkg:pypi/{name}",
        "scope": "required",
        "description": f"any version {rest}" if rest else "any version",
    }


def file_component(file: Path) -> dict[str, Any]:
    """One file of the release."""
    content = hashlib.sha256(file.read_bytes()).hexdigest()
    return {
        "type": "file",
        "bom-ref": f"file:{file.name}",
        "name": file.name,
        "hashes": [{"alg": "SHA-256", "content": content}],
    }
