"""What is said of the GPU implementations where there is no GPU, and that nothing on their way asks a device."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import better_attention as ba
from better_attention.gpu import toolchain

PACKAGE = Path(ba.__file__).parent


def test_importing_the_package_imports_no_triton() -> None:
    code = "import sys, better_attention; print('triton' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_explain_says_why_not() -> None:
    q = torch.ones(1, 2, 5, 16)
    reasons = ba.explain(q, q, q, score="expressive").reasons
    assert reasons["flex"] == ["it is for CUDA devices, not 'cpu'"]
    assert reasons["triton"] == ["its kernels are for GPUs, not 'cpu'"]
    with pytest.raises(ValueError, match="flex: it is for CUDA devices, not 'cpu'"):
        ba.attention(q, q, q, impl="flex")


@pytest.mark.parametrize("impl", ["triton", "flex"])
def test_every_reason_is_given(impl: str) -> None:
    q = torch.ones(1, 1, 2, 300, dtype=torch.float64)
    mask = torch.zeros(2, 2, requires_grad=True)
    explained = ba.explain(q, q, q, attn_mask=mask, need_weights=True, dropout_p=0.1, impl=impl)
    assert explained.chosen is None
    text = "; ".join(explained.reasons[impl])
    assert "float64" in text
    assert "weights" in text
    if impl == "triton":
        assert "width 300" in text
        assert "mask" in text
    else:
        assert "dropout" in text


def test_without_triton_the_reason_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "_installed", lambda: False)
    assert toolchain.missing(torch.device("cuda")) == "Triton is not installed: pip install triton"


def test_meta_tensors_are_refused_by_name() -> None:
    """So that the choice for a device does not depend on this machine."""
    assert toolchain.missing(torch.device("meta")) == "its kernels are for GPUs, not 'meta'"


# --- nothing waits for a device ---------------------------------------------------------------------------------------

ON_THE_WAY = [
    *sorted((PACKAGE / "gpu").rglob("*.py")),
    *(PACKAGE / "impl" / f"{name}.py" for name in ("triton", "flex", "chunked", "sdpa", "arguments")),
    *sorted((PACKAGE / "scores").glob("*.py")),
    *sorted((PACKAGE / "operators").glob("*.py")),
]
"""Every file that a call on a GPU passes through, apart from checks that look at CPU tensors alone."""

WAITS = {
    "item", "cpu", "tolist", "numpy", "nonzero", "synchronize", "argwhere", "masked_select", "unique", "equal",
    "allclose", "is_nonzero",
}  # fmt: skip
"""Methods and functions that hand a value of a tensor to Python, or wait for the queue."""
ALLOWED = {
    # The seed lies in the memory of the host.
    "int(seed)",
    # After the question whether the tensor is the CPU's.
    "bool(there.any())",
    # Settings of the call, not tensors; shapes.
    "bool(triton.knobs.runtime.interpret)", "int(L >= blocks.LENGTH_TO_TUNE)",
    "int(min(L, S) >= blocks.LENGTH_TO_TUNE)", "int(p.dropout_p * 2.0 ** 32)",
    "bool(call.q_BNLH.shape[1] != call.k_BNSH.shape[1])", "bool(ctx.needs_input_grad[i])",
}  # fmt: skip


def waits(source: str) -> list[str]:
    """The calls in a piece of source that may wait for a device."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        text = ast.unparse(node)
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if isinstance(node.func, ast.Attribute) and name in WAITS:
            found.append(text)
        # bool(), float() and int() of anything that is not a literal.
        elif isinstance(node.func, ast.Name) and name in ("bool", "float", "int") and text not in ALLOWED:
            literal = all(isinstance(argument, ast.Constant) for argument in node.args)
            found += [] if literal else [text]
    return found


@pytest.mark.parametrize("file", ON_THE_WAY, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_nothing_on_the_way_of_a_gpu_call_waits_for_the_device(file: Path) -> None:
    assert waits(file.read_text("utf-8")) == []


@pytest.mark.parametrize(
    "source",
    ["x.item()", "x.sum().cpu()", "x.tolist()", "bool(x.any())", "float(x)", "int(x)", "torch.cuda.synchronize()",
     "x.nonzero()", "torch.equal(x, y)", "if bool(x > 0): pass"],
)  # fmt: skip
def test_the_search_finds_what_waits(source: str) -> None:
    assert waits(source)


@pytest.mark.parametrize("source", ["float('inf')", "x.sum()", "torch.empty(3)", "bool(there.any())"])
def test_the_search_lets_the_rest_through(source: str) -> None:
    assert waits(source) == []
