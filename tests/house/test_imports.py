"""The direction of imports (HOUSE.md 2) and the security gate on the source (RELIABILITY.md S12), by reading it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import better_attention

ROOT = Path(better_attention.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# --- imports ----------------------------------------------------------------------------------------------------------

RANKS: list[set[str]] = [
    {"torch_state", "command"},
    {"mechanism", "errors", "values", "native"},
    {"impl"},
    {"masks", "positions", "choice", "extras", "packed"},
    {"inputs", "alignment", "causality", "state_dict", "prepare", "attend"},
    {"functional", "cost"},
    {"module"},
    {"cache"},
    {"adapters", "convert", "distill", "export"},
    {"models", "data"},
    {"experiments"},
    {"benchmarks"},
    {"cli"},
    {"__main__"},
]
"""cli → experiments → models, data → adapters … → module → functional → impl → mechanism; helpers where they serve."""

RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}
LIGHT = {"torch"}
"""What the core may import beside the standard library; NumPy too is an extra."""
HEAVY = {"numpy", "scipy", "sklearn", "matplotlib", "accelerate", "safetensors", "jinja2", "pooch"}
SHARED_BY_IMPLS = {"__init__", "call"}  # align computes W_A, not a call


def imports(tree: ast.AST, package: str) -> Iterator[tuple[str, bool]]:
    """The absolute names that a module of ``package`` imports, and whether they are imported along with the module."""

    def waits(node: ast.AST) -> bool:
        return isinstance(node, ast.FunctionDef) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        )

    lazy = {id(inside) for node in ast.walk(tree) if waits(node) for inside in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) not in lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            for alias in node.names:
                yield f"{module}.{alias.name}", id(node) not in lazy


def of(file: Path) -> tuple[str, str, list[tuple[str, bool]]]:
    """The component that ``file`` belongs to, its dotted path below the package, and what it imports."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    package = ".".join((ROOT.name, *parts[:-1]))
    return parts[0], ".".join(parts), list(imports(ast.parse(file.read_text("utf-8")), package))


def own(name: str) -> str | None:
    """The component of ours that an absolute name lies in; None for the outside world."""
    head, _, rest = name.partition(".")
    return (rest.split(".")[0] or "__init__") if head == ROOT.name else None


def direction_faults(component: str, path: str, imported: list[tuple[str, bool]]) -> list[str]:
    """What a file of ``component`` imports against the direction."""
    faults = []
    for name, _ in imported:
        target = own(name)
        if target is None or component == "__init__" or target == component:
            continue
        if target not in RANK:  # a public name of the package itself
            if RANK[component] <= RANK["module"]:
                faults.append(f"{path}: imports {name} from the package's front door, from inside")
        elif RANK[target] >= RANK[component]:
            faults.append(f"{path}: {component} must not import {target} ({name})")
    return faults


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_dependencies_point_one_way(file: Path) -> None:
    component, path, imported = of(file)
    assert component in RANK or component == "__init__", f"{component}: give it a place in RANKS, and in HOUSE.md"
    assert direction_faults(component, path, imported) == []


def test_the_direction_test_sees_what_it_should() -> None:
    package = ROOT.name
    bad = [
        ("impl", "from ..functional import attention", f"{package}.impl"),
        ("mechanism", "from .errors import describe", package),
        ("module", "from better_attention.lab.models import vit", package),
        ("functional", "import better_attention.lab.runs.folder", package),
        ("masks", "def f():\n    from . import module", package),
        ("data", "from ..models.vit import ViT", f"{package}.data"),
        ("experiments", "from ..cli import console", f"{package}.experiments"),
        ("module", "from better_attention import attention", package),
    ]
    for component, source, within in bad:
        assert direction_faults(component, component, list(imports(ast.parse(source), within))), source
    good = [
        ("cli", "from ..experiments.runs import load_run", f"{package}.cli"),
        ("experiments", "import better_attention as ba", f"{package}.experiments"),
        ("module", "from .impl import reference\nimport torch", package),
        ("impl", "from . import call", f"{package}.impl"),
    ]
    for component, source, within in good:
        assert direction_faults(component, component, list(imports(ast.parse(source), within))) == [], source


def test_implementations_never_import_each_other() -> None:
    for file in sorted((ROOT / "impl").glob("*.py")):
        if file.stem == "__init__":
            continue
        _, path, imported = of(file)
        for name, _ in imported:
            inside = name.split(".")[2:3] if name.startswith(f"{ROOT.name}.impl.") else []
            assert not inside or inside[0] in SHARED_BY_IMPLS, f"{path} imports {name}"


def core_files() -> list[Path]:
    return [f for f in FILES if (c := of(f)[0]) == "__init__" or RANK.get(c, 99) <= RANK["cache"]]


@pytest.mark.parametrize("file", core_files(), ids=lambda f: str(f.relative_to(ROOT)))
def test_the_core_needs_torch_alone(file: Path) -> None:
    _, path, imported = of(file)
    for name, _ in imported:
        head = name.split(".")[0]
        assert head in LIGHT | set(sys.stdlib_module_names) | {ROOT.name}, f"{path} imports {name}"


def file_of(name: str) -> Path | None:
    """The file of ours that holds the module, or the module of the attribute, called ``name``."""
    parts = name.split(".")[1:]
    for depth in (len(parts), len(parts) - 1):
        path = ROOT.joinpath(*parts[:depth])
        for candidate in (path.with_suffix(".py"), path / "__init__.py"):
            if depth > 0 and candidate.exists():
                return candidate
    return None


def test_the_command_line_starts_light() -> None:
    """``better-attention --help`` loads every verb; what a verb needs it imports where it runs."""
    verbs = [f for f in (ROOT / "cli").glob("*.py") if "def add_arguments" in f.read_text("utf-8")]
    assert len(verbs) >= 4
    waiting, seen = [*verbs, ROOT / "cli" / "main.py"], set()
    while waiting:
        file = waiting.pop()
        if file in seen:
            continue
        seen.add(file)
        _, path, imported = of(file)
        for name, at_top in imported:
            if not at_top:
                continue
            assert name.split(".")[0] not in HEAVY, f"{path} imports {name} at its top level"
            if own(name) and (found := file_of(name)):
                waiting.append(found)
    assert len(seen) > len(verbs)


# --- S12: the security gate -------------------------------------------------------------------------------------------

FORBIDDEN_MODULES = {
    "pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "telnetlib", "xmlrpc", "pty",
}  # fmt: skip
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "tempfile.mktemp", "yaml.load",
    "yaml.unsafe_load", "yaml.full_load",
    "torch.jit.load", "torch.export.load", "torch.hub.load", "torch.package.PackageImporter",
    "shutil.unpack_archive", "ssl._create_unverified_context", "pandas.read_pickle", "numpy.ma.load",
}  # fmt: skip
FORBIDDEN_METHODS = {"extractall", "extract", "_unpickle", "read_pickle", "unsafe_load"}
ALLOWED_ADDRESSES = ("http://www.w3.org/",)
"""Names of XML vocabularies, which nothing ever fetches."""


def full_names(tree: ast.AST) -> dict[str, str]:
    """What each imported name stands for: ``np`` -> ``numpy``, ``load`` -> ``torch.load``."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    """The full dotted name of ``a.b.c``, imports resolved; "" for anything else."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        base = dotted(node.value, names)
        return f"{base}.{node.attr}" if base else ""
    return ""


def keyword(call: ast.Call, name: str) -> object:
    """The literal value of a keyword argument; Ellipsis where it is not a literal, None where it is not given."""
    for item in call.keywords:
        if item.arg == name:
            return item.value.value if isinstance(item.value, ast.Constant) else ...
    return None


def insecure(source: str) -> list[str]:
    """What S12 forbids in a piece of Python source, one line each."""
    tree = ast.parse(source)
    names = full_names(tree)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"imports {m}" for m in modules if m.split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.Call):
            found += insecure_call(node, dotted(node.func, names))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            allowed = node.value
            for address in ALLOWED_ADDRESSES:
                allowed = allowed.replace(address, "")
            found += ["an address without TLS"] * ("http://" in allowed)
    return found


def insecure_call(node: ast.Call, name: str) -> list[str]:
    """What S12 forbids about one call of the function ``name``."""
    method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
    rules = {
        f"calls {name}": name in FORBIDDEN_CALLS,
        f"calls .{method}": method in FORBIDDEN_METHODS,
        "torch.load without weights_only=True": name == "torch.load" and keyword(node, "weights_only") is not True,
        "allow_pickle": keyword(node, "allow_pickle") not in (None, False),
        "shell=True": keyword(node, "shell") not in (None, False),
        "verify=False": keyword(node, "verify") is False,
        "jinja2.Environment without autoescape": name in ("jinja2.Environment", "jinja2.sandbox.SandboxedEnvironment")
        and keyword(node, "autoescape") in (None, False),
        "jinja2.Template never escapes": name == "jinja2.Template",
        "trust_remote_code": keyword(node, "trust_remote_code") not in (None, False),
    }
    return [text for text, broken in rules.items() if broken]


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_s12_nothing_insecure(file: Path) -> None:
    assert insecure(file.read_text("utf-8")) == []


BAD = [
    "import pickle",
    "from pickle import loads",
    "import joblib.numpy_pickle",
    "import marshal as m",
    "import shelve",
    "eval('1')",
    "exec(text)",
    "import os\nos.system('ls')",
    "from os import popen\npopen('ls')",
    "import torch\ntorch.load(path)",
    "import torch\ntorch.load(path, weights_only=False)",
    "import torch\ntorch.load(path, weights_only=flag)",
    "from torch import load as read\nread(path)",
    "import torch\ntorch.jit.load(path)",
    "import torch.export\ntorch.export.load(path)",
    "import numpy as np\nnp.load(path, allow_pickle=True)",
    "import numpy as np\nnp.load(path, allow_pickle=trusted)",
    "import yaml\nyaml.load(text)",
    "archive.extractall(folder)",
    "import tarfile\ntarfile.open(p).extract(member)",
    "import shutil\nshutil.unpack_archive(p)",
    "import subprocess\nsubprocess.run(line, shell=True)",
    "import tempfile\ntempfile.mktemp()",
    "ADDRESS = 'http://example.org/mnist.gz'",
    "ADDRESS = f'http://{host}/mnist.gz'",
    "import jinja2\njinja2.Environment(loader=x)",
    "import jinja2\njinja2.Environment(autoescape=False)",
    "from jinja2 import Template\nTemplate(text)",
    "import requests\nrequests.get(a, verify=False)",
    "import ssl\nssl._create_unverified_context()",
    "load_dataset(name, trust_remote_code=True)",
]

GOOD = [
    "import json\njson.loads(text)",
    "import torch\ntorch.load(path, weights_only=True)",
    "import numpy as np\nnp.load(path, allow_pickle=False)",
    "import numpy as np\nnp.load(path)",
    "import ast\nast.literal_eval(text)",
    "module.eval()",
    "import re\nre.compile('x')",
    "import torch\ntorch.compile(model)",
    "import subprocess\nsubprocess.run(['git', 'log'])",
    "import jinja2\njinja2.Environment(autoescape=True)",
    "import jinja2\njinja2.Environment(autoescape=jinja2.select_autoescape())",
    "ADDRESS = 'https://example.org/mnist.gz'",
    "NAMESPACE = 'http://www.w3.org/2000/svg'",
    "from safetensors.torch import load_file\nload_file(path)",
]


@pytest.mark.parametrize("source", BAD)
def test_s12_the_gate_closes(source: str) -> None:
    assert insecure(source), source


@pytest.mark.parametrize("source", GOOD)
def test_s12_the_gate_opens(source: str) -> None:
    assert insecure(source) == [], source


def test_the_walk_found_the_package() -> None:
    names = {str(f.relative_to(ROOT)) for f in FILES}
    assert {"__init__.py", "mechanism.py", "module.py", "functional.py", "impl/reference.py"} <= names
