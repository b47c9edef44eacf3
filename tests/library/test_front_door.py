"""``import better_attention``: no torch until it is needed, every public name as before, operators in either order."""

from __future__ import annotations

import ast
import copy
import importlib
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import better_attention as ba
from better_attention.imported import when_imported

SOURCE = Path(ba.__file__).read_text("utf-8")


def python(code: str) -> str:
    """What a fresh interpreter prints, in which warnings are errors."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


WITHOUT_TORCH = """
import sys
import better_attention
from better_attention import Mechanism
from better_attention.mechanism import MECHANISMS
assert Mechanism.of("efficient+expressive").name == "efficient+expressive" and len(MECHANISMS) == 5
try:
    Mechanism.of("fast")
except ValueError as error:
    print(error)
assert "attention" in dir(better_attention) and "MultiheadAttention" in dir(better_attention)
assert "torch" not in sys.modules, "torch was imported"
"""


def test_mechanisms_and_their_messages_need_no_torch() -> None:
    assert "unknown mechanism 'fast'" in python(WITHOUT_TORCH)


FIRST = ["native.library", "layer.multihead"]
LATER = ["dropout", "scores.expressive", "call.call", "impl.native", "positions"]


@pytest.mark.parametrize("module", [*FIRST, *(pytest.param(name, marks=pytest.mark.slow) for name in LATER)])
def test_every_module_can_be_the_first(module: str) -> None:
    """What waits for torch does not find half of the module that imports torch."""
    code = f"import better_attention.{module}, torch, fractions; print(torch.ops.better_attention.native)"
    assert python(code) == "better_attention.native"


BEFORE_TORCH = """
import sys
import better_attention
assert "torch" not in sys.modules
import torch
assert torch.ops.better_attention.native.default and torch.ops.better_attention.align.default
assert "triton" not in sys.modules
import importlib
assert importlib.util.find_spec("torch").loader.__class__.__name__ == "SourceFileLoader"
from torch.utils.flop_counter import FlopCounterMode
x = torch.randn(1, 2, 64, 8)
with FlopCounterMode(display=False) as counter:
    better_attention.attention(x, x, x, score="expressive")
print(counter.get_total_flops())
"""


def test_operators_are_registered_when_torch_comes_later() -> None:
    """A saved program names them, and FLOPs are counted, although triton is not imported for it."""
    assert python(BEFORE_TORCH) == str(4 * 64 * 64 * 16)


LIGHT = """
import sys, torch
before = set(sys.modules)
x = torch.randn(1, 2, 8, 4, requires_grad=True)
import better_attention as ba
layer = ba.MultiheadAttention(4, 2, mechanism="super", max_len=8, batch_first=True)
layer(x[0], x[0], x[0])[0].sum().backward()
ba.attention(x, x, x, score="expressive").sum().backward()
for name in ba.__all__:
    getattr(ba, name)
ours = {"better_attention", *sys.stdlib_module_names}
print(sorted(module for module in sys.modules.keys() - before if module.partition(".")[0] not in ours))
"""


def test_nothing_but_torch_is_imported_along_and_nothing_more_of_torch() -> None:
    """What takes long: NumPy where torch came without, torch._dynamo, torch.export, Triton, Keras, ONNX."""
    assert python(LIGHT) == "[]"


COMPILED = """
import torch, better_attention as ba
import torch._dynamo
@torch.compile(backend="eager", fullgraph=True)
def f(x):
    return ba.attention(x, x, x, score="expressive")
x = torch.randn(1, 2, 5, 8)
assert torch.allclose(f(x), ba.attention(x, x, x, score="expressive"))
"""


@pytest.mark.slow
def test_a_name_may_be_used_first_inside_a_compiled_function() -> None:
    python(COMPILED)


@pytest.mark.parametrize("name", ba.__all__)
def test_every_public_name_is_what_its_module_defines(name: str) -> None:
    module = importlib.import_module(f"better_attention.{ba._HOMES[name]}")
    assert getattr(ba, name) is getattr(module, name)
    assert name in dir(ba)


def test_type_checkers_and_the_interpreter_see_the_same_names() -> None:
    (block,) = [n for n in ast.parse(SOURCE).body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    static = {
        alias.name: (node.module or "").removeprefix("better_attention.")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert static == ba._HOMES
    assert set(ba.__all__) == ba._HOMES.keys() - {"load_run", "distil"}


def test_no_public_name_is_the_name_of_a_module() -> None:
    """Importing the module would put itself in the place of what is public."""
    inside = {file.stem for file in Path(ba.__file__).parent.iterdir()}
    assert inside & ba._HOMES.keys() == set()


def test_a_star_import_brings_every_public_name() -> None:
    names: dict[str, object] = {}
    exec("from better_attention import *", names)  # noqa: S102 - our own package
    assert set(ba.__all__) <= names.keys()


def test_what_there_is_not_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'atention'"):
        ba.atention  # noqa: B018
    with pytest.raises(ImportError, match="atention"):
        exec("from better_attention import atention")  # noqa: S102
    assert not hasattr(ba, "__wrapped__")


def test_classes_and_functions_are_pickled_by_their_module() -> None:
    for value in (ba.MultiheadAttention, ba.KVCache, ba.attention, ba.Mechanism.of("super")):
        copied = pickle.loads(pickle.dumps(value))  # noqa: S301 - our own
        assert copied is value or copied == value
    assert copy.deepcopy(ba.MultiheadAttention(4, 2)).num_heads == 2
    assert ba.MultiheadAttention.__module__ == "better_attention.layer.multihead"
    assert torch.nn.Module in ba.MultiheadAttention.__mro__


def test_several_actions_wait_for_one_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "awaited_module.py").write_text("value = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    seen: list[str] = []
    finders = list(sys.meta_path)
    for word in ("first", "second"):
        when_imported("awaited_module", lambda word=word: seen.append(word))
    assert importlib.util.find_spec("another_module_that_is_not_there") is None
    assert seen == []
    module = importlib.import_module("awaited_module")
    assert (module.value, seen) == (3, ["first", "second"])
    assert sys.meta_path == finders
    assert "exec_module" not in vars(module.__spec__.loader)
    when_imported("awaited_module", lambda: seen.append("third"))
    assert seen[-1] == "third"
    sys.modules.pop("awaited_module")


def test_a_module_that_is_not_there_stays_a_module_not_found() -> None:
    when_imported("module_that_nobody_has", lambda: pytest.fail("it was imported"))
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("module_that_nobody_has")


WITHOUT_THE_EXTRA = """
import sys
sys.modules["{missing}"] = None  # as where it is not installed
import better_attention as ba
try:
    ba.{name}
except ModuleNotFoundError as error:
    print(error)
"""


@pytest.mark.parametrize(("name", "missing"), [("distil", "accelerate"), ("load_run", "safetensors")])
def test_a_name_that_needs_an_extra_says_which(name: str, missing: str) -> None:
    said = python(WITHOUT_THE_EXTRA.format(name=name, missing=missing))
    assert said.startswith(f"better_attention.{name} needs {missing}, which is missing")
    assert "pip install 'better-attention[experiments]'" in said
