"""An argument is better than a patched global: what of ours the tests still patch, and why no argument serves there."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType

from helpers import TESTS

BOUND = "a bound that protects: with an argument a caller could lift it"
COMMAND = "the command line is the whole interface; what it calls would take minutes, end it at once, or fetch files"
FAULT = "a fault of ours is simulated, which no argument may ask for"
TIME = "drawing and benchmark rows are made small or once, so that the unit tests stay short"
SEEN = "what happens inside one call is watched, where its result does not show it"

PATCHED: Mapping[str, Mapping[str, str]] = {
    "bench/test_benchmarks.py": {
        "decode.MOST_PAIRS": TIME,
        "kernel.SLICED": TIME,
        "kernel.ba.attention": SEEN,
        "model._build": FAULT,
    },
    "benchmarks/test_gpu.py": {"sys.argv": COMMAND},
    "benchmarks/test_language.py": {"sys.argv": COMMAND},
    "cli/test_bench_command.py": {
        "Alignment.forward": FAULT,
        "machine.describe": COMMAND,
        "machine.measure_limits": COMMAND,
        "runner.measure": COMMAND,
    },
    "cli/test_data_command.py": {"mnist.SOURCE": COMMAND, "store.fetch": COMMAND},
    "cli/test_edge_command.py": {"machine.describe": COMMAND, "timing.measure_group": COMMAND},
    "cli/test_interrupt.py": {
        "climb.Climb.train": COMMAND,
        "step_time._evaluation": COMMAND,
        "step_time._updates": COMMAND,
    },
    "cli/test_ladder_command.py": {"Training.run": COMMAND},
    "cli/test_main.py": {"importlib.import_module('better_attention.cli.list').run": FAULT},
    "cli/test_screen.py": {"list_verb.run": FAULT},
    "lab/comparison/test_ray_engine.py": {"ray_worker.measure": TIME},
    "lab/data/own_pictures/test_picture_layouts.py": {
        "better_attention.lab.data.archives._MEMBERS": BOUND,
        "better_attention.lab.data.archives._NAMES_LIMIT": BOUND,
        "decode._LARGE": BOUND,
        "decode.fit": SEEN,
    },
    "lab/data/own_pictures/test_read.py": {"tree.FILE_LIMIT": BOUND},
    "lab/data/own_texts/test_read.py": {"better_attention.lab.data.own_texts.records._LIMIT": BOUND},
    "lab/data/own_texts/test_texts_of_the_world.py": {"better_attention.lab.data.own_texts.records._LIMIT": BOUND},
    "lab/report/test_charts.py": {"charts.saved": SEEN},
    "lab/report/test_html.py": {
        "Comparison.verdict": FAULT,
        "gallery.learning_curves": TIME,
        "gallery.over_heads": TIME,
    },
    "lab/runs/test_damage.py": {"checkpoint.save": FAULT, "type(tiny.task()).build": SEEN},
    "lab/training/test_loop.py": {"randomness.reseed": FAULT},
    "lab/training/test_processes.py": {"processes.Accelerator": "accelerate's class, as it is on machines with GPUs"},
    "library/cache/test_decoding.py": {
        "decoding.by_kernels": SEEN,
        "step.call_library": SEEN,
        "stored.by_kernels": SEEN,
    },
    "library/call/test_every_argument.py": {"fast_path.attend": SEEN},
    "library/gpu/test_choice.py": {"toolchain._installed": FAULT},
    "library/impl/test_chunked_dropout.py": {"chunked.TILE": TIME, "module.IMPLEMENTATIONS": FAULT},
    "library/native/test_native_missing.py": {"library.__file__": FAULT},
}
"""Test file -> what of ours it patches -> why."""

FOREIGN = {
    "lab/runs/test_checkpoint.py": {"owner.name"},
    "lab/runs/test_disk_full.py": {"owner.name"},
    "lab/test_files.py": {"(os if step == 'fsync' else Path).step"},
}
"""Calls of the operating system that a loop or a parameter names."""


def patches(tree: ast.Module) -> Iterator[tuple[ast.expr, str]]:
    """Owner and ``owner.name`` of every ``setattr(owner, name, ...)`` of a test's ``MonkeyPatch``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "setattr":
            owner, *rest = node.args
            if isinstance(owner, ast.Constant):  # the dotted name, all in one string
                yield owner, str(owner.value)
            else:
                name = rest[0].value if isinstance(rest[0], ast.Constant) else ast.unparse(rest[0])
                yield owner, f"{ast.unparse(ast.Attribute(owner, '_'))[:-2]}.{name}"


def imports(tree: ast.Module) -> dict[str, str]:
    """Name in the file -> dotted name of what was imported."""
    known = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            known |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            known |= {alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names}
    return known


def is_foreign(owner: ast.expr, known: Mapping[str, str]) -> bool:
    """Whether the module or class is not ours; what cannot be told by reading counts as ours."""
    names = []
    while isinstance(owner, ast.Attribute):
        names.append(owner.attr)
        owner = owner.value
    if not isinstance(owner, ast.Name) or owner.id not in known:
        return False
    module, _, last = known[owner.id].rpartition(".")
    try:
        value: object = importlib.import_module(known[owner.id])
    except ModuleNotFoundError:
        value = getattr(importlib.import_module(module), last)
    for name in reversed(names):
        value = getattr(value, name)
    home = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", type(value).__module__)
    return not home.startswith("better_attention")


def patched(file: Path) -> set[str]:
    """What of ours a test file patches."""
    tree = ast.parse(file.read_text("utf-8"))
    known = imports(tree)
    return {name for owner, name in patches(tree) if not is_foreign(owner, known)}


def test_no_other_global_of_ours_is_patched() -> None:
    """Pass an argument instead: a keyword whose default is the constant, a field, a function that measures."""
    found = {str(file.relative_to(TESTS)): patched(file) for file in sorted(TESTS.rglob("*.py"))}
    ours = {file: names - FOREIGN.get(file, set()) for file, names in found.items()}
    assert {file: names for file, names in ours.items() if names} == {file: {*why} for file, why in PATCHED.items()}


def test_a_patch_is_recognised_in_every_form(tmp_path: Path) -> None:
    file = tmp_path / "test_some.py"
    file.write_text(
        "import os\nfrom better_attention.lab import lock\nfrom better_attention.lab.training.loop import Training\n"
        "def test(monkeypatch, thing):\n"
        "    monkeypatch.setattr(os, 'open', 1)\n    monkeypatch.setattr(lock.os, 'open', 1)\n"
        "    monkeypatch.setattr(lock, 'MARKER', 1)\n    monkeypatch.setattr(Training, 'run', 1)\n"
        "    monkeypatch.setattr('better_attention.lab.lock.MARKER', 1)\n"
        "    with monkeypatch.context() as patch:\n        patch.setattr(thing, 'name', 1)\n"
    )
    assert patched(file) == {"lock.MARKER", "Training.run", "better_attention.lab.lock.MARKER", "thing.name"}
