"""A torch that renames what is private: the package imports all the same, and its results stay right.

Names are removed from the package's own list of them, not from torch, which needs them itself.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

import better_attention as ba
from better_attention.call import torch_private
from better_attention.call.torch_private import PRIVATE_NAMES, is_bare, own_parameters

PRIVATE = re.compile(
    r"torch\._(?!_|foreach_)|\b_C\.|\b_dynamo|_forward_(pre_)?hooks\b|_load_state_dict_post_hooks|\._parameters\b|\._version\b"
)
"""What private names look like; ``torch._foreach_*`` is in torch's documentation, as a beta."""

CHECKS = """
import json, os, sys, types
import torch
from pathlib import Path

def check(name):
    # The module as it is, but for one name that it does not find any more.
    full = "better_attention.call.torch_private"
    source = Path(sys.argv[1]).read_text("utf-8")
    assert source.count(f'"{name}"') == 1, name
    private = types.ModuleType(full)
    sys.modules[full] = private
    exec(compile(source.replace(f'"{name}"', f'"{name}_gone"'), sys.argv[1], "exec"), private.__dict__)
    import better_attention as ba

    torch.manual_seed(0)
    x = torch.randn(4, 16, 20, 8, requires_grad=True)
    for score in ("softmax", "expressive"):
        ours = ba.attention(x, x, x, score=score, is_causal=True)
        right = ba.attention(x, x, x, score=score, is_causal=True, impl="reference")
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-5)
        gradients = [torch.autograd.grad(y.sin().sum(), x)[0] for y in (ours, right)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
        batched = torch.func.vmap(lambda q: ba.attention(q, q, q, score=score))(x)
        torch.testing.assert_close(batched, ba.attention(x, x, x, score=score, impl="reference"), rtol=1e-4, atol=1e-5)
    for mechanism, options in (("standard", {}), ("super", {"max_len": 6})):
        options |= {"mechanism": mechanism, "batch_first": True}
        layer, reference = (ba.MultiheadAttention(16, 2, **options, impl=impl) for impl in ("auto", "reference"))
        reference.load_state_dict(layer.state_dict())
        x = torch.randn(2, 6, 16)
        with torch.no_grad():
            ours, right = (y(x, x, x, need_weights=False)[0] for y in (layer.eval(), reference.eval()))
        torch.testing.assert_close(ours, right)
        host = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
        host.self_attn = layer
        with torch.no_grad():
            inside = host(x)
        torch.testing.assert_close(inside, host(x.clone().requires_grad_()).detach())
        try:
            torch.nn.init.constant_(layer.in_proj_weight, 0.5)
        except TypeError:  # the careful answer: there are no packed weights
            continue
        assert bool((layer.q_proj.weight == 0.5).all())
    if "assert" in name:
        compiled = torch.compile(ba.MultiheadAttention(16, 2, mechanism="super", max_len=6), backend="eager")
        triangle = torch.nn.Transformer.generate_square_subsequent_mask(6)
        try:
            compiled(*[torch.randn(6, 1, 16)] * 3, attn_mask=triangle)
        except Exception as error:
            assert "future would leak" in str(error), error
        else:
            raise AssertionError("a causal mask on a full W_A was not refused")

for name in json.loads(sys.argv[2]):
    print(name, end=" ", flush=True)
    child = os.fork()
    if child == 0:
        try:
            check(name)
        except BaseException as error:
            print(repr(error)[:300].replace(chr(10), " "), flush=True)
            os._exit(1)
        print("right", flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    """What came of each name's absence: one process that imports torch, and a fork of it for each name."""
    result = subprocess.run(
        [sys.executable, "-c", CHECKS, torch_private.__file__, json.dumps(PRIVATE_NAMES)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    return dict(line.split(" ", 1) for line in result.stdout.splitlines())


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("name", PRIVATE_NAMES)
def test_without_a_private_name_results_are_right(name: str, outcomes: dict[str, str]) -> None:
    assert outcomes.get(name) == "right"


@pytest.mark.parametrize("name", PRIVATE_NAMES)
def test_this_torch_has_the_name(name: str) -> None:
    """A name that is misspelt would take the careful path for ever, and nobody would notice but the clock."""
    module, _, path = name.partition(":")
    value: object = importlib.import_module(module)
    for part in path.split("."):
        value = getattr(value, part)


def test_a_module_without_the_attributes_of_today_counts_as_hooked() -> None:
    linear = nn.Linear(2, 2)
    assert is_bare(linear)
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        renamed = nn.Linear(2, 2)
        renamed.__dict__[f"{name}_gone"] = renamed.__dict__.pop(name)
        assert not is_bare(renamed), name


def test_parameters_are_found_without_the_attribute_of_today() -> None:
    linear = nn.Linear(2, 2)
    renamed = SimpleNamespace(named_parameters=linear.named_parameters)
    assert own_parameters(renamed) == own_parameters(linear) == {"weight": linear.weight, "bias": linear.bias}


def test_everything_private_of_torch_is_in_one_file() -> None:
    root = Path(ba.__file__).parent
    allowed = {root / "call" / "torch_private.py"}
    faults = [
        f"{path.relative_to(root)}: {line.strip()}"
        for path in sorted(root.rglob("*.py"))
        if path not in allowed
        for line in path.read_text("utf-8").splitlines()
        if PRIVATE.search(line.split("#")[0])
    ]
    assert faults == []
