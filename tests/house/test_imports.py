"""The four houses and the direction of imports between them (DESIGN.md), and the security gate, by reading the source.

Every file is read as it is: nothing is imported, and no file is named here that a rename could leave behind.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import pytest

import better_attention

ROOT = Path(better_attention.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# --- imports ----------------------------------------------------------------------------------------------------------

HOUSES = ("library", "lab", "bench", "cli")
"""Each may import the houses before it, never those after it."""

LAB_ROOMS = (
    {"files", "catalogue", "timing"},
    {"lock", "csv_json"},
    {"data", "models", "published"},
    {"generation", "hugging_face"},
    {"tasks"},
    {"runs"},
    {"training"},
    {"trained"},
    {"analysis"},
    {"report"},
    {"paper"},
    {"comparison"},
    {"ladder"},
    {"trial"},
    {"inspection"},
)
"""The rooms of the lab in the order in which data walks through them."""

LIBRARY_ROOMS = (
    {"errors", "text", "evaluation", "command", "imported"},
    {"tensors"},
    {"scores"},
    {"mechanism"},
    {"cache"},
    {"call"},
    {"operators"},
    {"native"},
    {"dropout"},
    {"gpu"},
    {"impl"},
    {"positions", "functional", "causality"},
    {"layer"},
    {"costs"},
    {"adapters", "export", "parallel"},
    {"conversion"},
    {"inspect"},
    {"keras"},
)
"""From the values that describe a call to the layer that people build models with."""

LIGHT = {"torch"}
"""What the library may import beside the standard library; NumPy too is an extra."""
HEAVY = {"numpy", "scipy", "sklearn", "matplotlib", "accelerate", "safetensors", "jinja2", "pooch"}
EXTRAS = {
    "conversion.recipe": {"safetensors"},
    "export.onnx": {"onnx", "onnxruntime", "onnxscript"},
    "export.quantise": {"onnx", "onnxruntime", "torchao"},
    "gpu.toolchain": {"triton"},
    "gpu.launches": {"triton"},
}
"""What a module of the library may import inside its functions: an extra, whose absence it reports."""
GATES = {"adapters.transformers": {"transformers"}, "keras": {"keras", "jax", "numpy"}}
"""Modules and rooms that users of another library import, and nothing else does: they may import that library."""
LATE = {"gpu.kernels": {"triton"}}
"""Rooms that are imported inside functions alone, once it is known that a library is there: they may import it."""
CATALOGUES = {"cli", "bench/suites", "lab/tasks/catalogue", "lab/data/published", "lab/published"}
"""Folders whose files are rows of a table: verbs, suites, tasks, data sets. They may grow."""
ROOM_SIZE = 15


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


def path_of(file: Path) -> str:
    """The dotted path of ``file`` below the package."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


@cache
def of(file: Path) -> tuple[str, tuple[tuple[str, bool], ...]]:
    """The dotted path of ``file`` below the package, and what it imports."""
    package = ".".join((ROOT.name, *file.relative_to(ROOT).parts[:-1]))
    return path_of(file), tuple(imports(ast.parse(file.read_text("utf-8")), package))


def house(path: str) -> str:
    """The house of a dotted path below the package: its first folder, or the library."""
    head = path.split(".")[0]
    return "cli" if head == "__main__" else head if head in HOUSES else "library"


def rank(rooms: tuple[set[str], ...], room: str) -> int | None:
    """Where ``room`` stands in an order of rooms; None for a room that has no place."""
    return next((number for number, names in enumerate(rooms) if room in names), None)


def below(name: str) -> str | None:
    """The dotted path below our package that an absolute name stands for; None for the outside world."""
    head, _, rest = name.partition(".")
    return rest if head == ROOT.name else None


def is_ours(path: str) -> bool:
    """Whether a dotted path below the package names a file or folder, and not a public name of the package itself."""
    first = path.split(".")[0]
    return (ROOT / first).is_dir() or (ROOT / f"{first}.py").is_file()


def direction_faults(path: str, imported: Sequence[tuple[str, bool]]) -> list[str]:
    """What the file at ``path`` imports against the direction."""
    mine, faults = house(path), []
    if path == "__init__":  # the front door opens every house, for those who ask
        return []
    for name, _ in imported:
        target = below(name)
        if target is None:
            continue
        if not is_ours(target):
            if mine == "library":
                faults.append(f"{path}: imports {name} from the package's front door, from inside")
        elif HOUSES.index(house(target)) > HOUSES.index(mine):
            faults.append(f"{path}: the {mine} must not import the {house(target)} ({name})")
        elif house(target) == mine:
            faults += room_faults(mine, path, target)
    return faults


def room_faults(mine: str, path: str, target: str) -> list[str]:
    """An import inside a house, against the order of its rooms."""
    rooms = {"library": LIBRARY_ROOMS, "lab": LAB_ROOMS}.get(mine)
    if rooms is None:
        return []
    depth = 1 if mine == "lab" else 0
    here, there = (p.split(".")[depth : depth + 1] for p in (path, target))
    if not here or not there or here == there or here == ["__init__"]:
        return []
    from_rank, to_rank = rank(rooms, here[0]), rank(rooms, there[0])
    if from_rank is None or to_rank is None:
        return [f"{path}: give {here[0] if from_rank is None else there[0]} a place in the order of rooms"]
    return [f"{path}: {here[0]} must not import {there[0]}"] if to_rank >= from_rank else []


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_dependencies_point_one_way(file: Path) -> None:
    path, imported = of(file)
    assert not direction_faults(path, imported)


def test_the_direction_test_sees_what_it_should() -> None:
    package = ROOT.name
    bad = [
        ("impl.native", "from ..functional import attention", f"{package}.impl"),
        ("mechanism", "from .impl import reference", package),
        ("layer.multihead", "from better_attention.lab.models import vision_transformer", f"{package}.layer"),
        ("functional", "import better_attention.lab.runs.folder", package),
        ("call.masks", "def f():\n    from better_attention import layer", f"{package}.call"),
        ("lab.data.store", "from better_attention.lab.models.text_classifier import X", f"{package}.lab.data"),
        ("lab.runs.folder", "from better_attention.lab.training.loop import train", f"{package}.lab.runs"),
        ("lab.tasks.base", "from better_attention.cli import console", f"{package}.lab.tasks"),
        ("lab.nowhere.x", "from better_attention.lab.files import x", f"{package}.lab.nowhere"),
        ("bench.runner", "from better_attention.cli import console", f"{package}.bench"),
        ("layer.multihead", "from better_attention import attention", f"{package}.layer"),
    ]
    for path, source, within in bad:
        assert direction_faults(path, list(imports(ast.parse(source), within))), source
    good = [
        ("cli.runs", "from ..lab.runs.load import load_run", f"{package}.cli"),
        ("lab.training.loop", "import better_attention as ba", f"{package}.lab.training"),
        ("layer.multihead", "from ..impl import reference\nimport torch", f"{package}.layer"),
        ("impl.native", "from . import reference", f"{package}.impl"),
    ]
    for path, source, within in good:
        assert direction_faults(path, list(imports(ast.parse(source), within))) == [], source


def file_of(name: str) -> Path | None:
    """The file of ours that holds the module, or the module of the attribute, called ``name``."""
    parts = name.split(".")[1:]
    for depth in (len(parts), len(parts) - 1):
        path = ROOT.joinpath(*parts[:depth])
        for candidate in (path.with_suffix(".py"), path / "__init__.py"):
            if depth > 0 and candidate.exists():
                return candidate
    return None


def graph() -> dict[Path, set[Path]]:
    """Which file imports which at run time, now or later; the front door is not part of the house behind it."""
    edges: dict[Path, set[Path]] = {}
    for file in FILES:
        tree = ast.parse(file.read_text("utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                node.body = [ast.Pass()]
        package = ".".join((ROOT.name, *file.relative_to(ROOT).parts[:-1]))
        targets = (file_of(name) for name, _ in imports(tree, package) if below(name))
        edges[file] = {target for target in targets if target and target != file}
    edges[ROOT / "__init__.py"] = set()
    return edges


def circles(edges: Mapping[Path, set[Path]]) -> list[Path]:
    """The files that lie on or behind a circle: what is left once every file without an import is taken away."""
    left = {file: set(targets) for file, targets in edges.items()}
    while ends := {file for file, targets in left.items() if not targets}:
        left = {file: targets - ends for file, targets in left.items() if file not in ends}
    return sorted(left)


def test_there_is_no_circle_of_imports() -> None:
    assert [str(file.relative_to(ROOT)) for file in circles(graph())] == []


def test_the_search_for_circles_finds_one() -> None:
    a, b, c, d = (Path(name) for name in "abcd")
    assert circles({a: {b}, b: {c}, c: {a}, d: set()}) == [a, b, c]
    assert circles({a: {b, c}, b: {c}, c: {d}, d: set()}) == []


@pytest.mark.parametrize("folder", sorted({f.parent for f in FILES}), ids=lambda f: str(f.relative_to(ROOT)))
def test_no_room_is_a_heap(folder: Path) -> None:
    if folder.relative_to(ROOT).as_posix() in CATALOGUES:
        return
    assert len([f for f in folder.glob("*.py") if f.name != "__init__.py"]) <= ROOM_SIZE


def test_implementations_never_import_each_other() -> None:
    from better_attention.impl import IMPLEMENTATIONS

    for name in IMPLEMENTATIONS:
        path, imported = of(ROOT / "impl" / f"{name}.py")
        others = {f"{ROOT.name}.impl.{other}" for other in IMPLEMENTATIONS if other != name}
        assert not [i for i, _ in imported if any(i == o or i.startswith(f"{o}.") for o in others)], path


def test_verbs_import_no_verbs() -> None:
    verbs = {f for f in (ROOT / "cli").glob("*.py") if "def add_arguments" in f.read_text("utf-8")}
    assert len(verbs) >= 4
    faults = [
        f"{path} imports {name}"
        for path, imported in map(of, sorted(verbs))
        for name, _ in imported
        if below(name) and file_of(name) in verbs
    ]
    assert faults == []


def late(path: str) -> set[str]:
    """The libraries that a module in a room of :data:`LATE` may import; none elsewhere."""
    return next((needs for room, needs in LATE.items() if f"{path}.".startswith(f"{room}.")), set())


def gate_of(path: str) -> str:
    """The entry of GATES that a dotted path below the package lies behind, or an empty text."""
    return next((gate for gate in GATES if path == gate or path.startswith(f"{gate}.")), "")


@pytest.mark.parametrize(
    "file", [f for f in FILES if house(path_of(f)) == "library"], ids=lambda f: str(f.relative_to(ROOT))
)
def test_the_library_needs_torch_alone(file: Path) -> None:
    path, imported = of(file)
    for name, at_top in imported:
        head, gate = name.split(".")[0], gate_of(path)
        if (not at_top and head in EXTRAS.get(path, set())) or head in GATES.get(gate, set()) | late(path):
            continue
        target = below(name)
        if target is not None and late(target) and not late(path):
            assert not at_top, f"{path} imports {name} along with itself, which needs another library"
        behind = gate_of(target or "")
        assert behind in ("", gate), f"{path} imports {name}, which needs another library"
        assert head in LIGHT | set(sys.stdlib_module_names) | {ROOT.name}, f"{path} imports {name}"


def imported_with(files: Iterable[Path]) -> dict[Path, list[str]]:
    """File -> what it imports at its top level: of the files, and of all of ours that are imported with them."""
    waiting, found = list(files), {}
    while waiting:
        file = waiting.pop()
        if file in found:
            continue
        found[file] = [name for name, at_top in of(file)[1] if at_top]
        waiting += [target for name in found[file] if below(name) and (target := file_of(name))]
    return found


def test_the_keras_room_needs_no_torch() -> None:
    """What it imports of ours, and what that imports when it is imported, is free of torch."""
    seen = imported_with((ROOT / "keras").glob("*.py"))
    for file, names in seen.items():
        for name in names:
            assert name.split(".")[0] != "torch", f"{path_of(file)} imports {name}"
    assert ROOT / "mechanism.py" in seen


def test_the_command_line_starts_light() -> None:
    """``better-attention --help`` loads every verb; what a verb needs it imports where it runs."""
    verbs = [f for f in (ROOT / "cli").glob("*.py") if "def add_arguments" in f.read_text("utf-8")]
    assert len(verbs) >= 4
    seen = imported_with([*verbs, ROOT / "cli" / "main.py"])
    for file, names in seen.items():
        for name in names:
            assert name.split(".")[0] not in HEAVY, f"{path_of(file)} imports {name} at its top level"
    assert len(seen) > len(verbs)


# --- the security gate ------------------------------------------------------------------------------------------------

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
    """What is forbidden in a piece of Python source, one line each."""
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
    """What is forbidden about one call of the function ``name``."""
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
def test_nothing_insecure(file: Path) -> None:
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
def test_the_gate_closes(source: str) -> None:
    assert insecure(source), source


@pytest.mark.parametrize("source", GOOD)
def test_the_gate_opens(source: str) -> None:
    assert insecure(source) == [], source


def test_the_walk_found_the_package() -> None:
    names = {str(f.relative_to(ROOT)) for f in FILES}
    assert {"__init__.py", "mechanism.py", "functional.py", "impl/reference.py", "cli/main.py"} <= names
