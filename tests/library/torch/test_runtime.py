"""Dropout, determinism, memory, threads and the import itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import better_attention as ba
from better_attention.scores import SCORES
from helpers import TESTS
from helpers.layers import ALL, CAUSAL, LAYERS, NAMED, fingerprint, layer, padding, tokens
from helpers.memory import profiled_memory

EXTRAS = ("accelerate", "matplotlib", "sklearn", "rich", "jinja2", "scipy", "pooch", "safetensors", "numpy")


def python(*arguments: str, **environment: str) -> str:
    """Runs a fresh interpreter that writes no byte code, and returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-B", "-W", "error", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- dropout -----------------------------------------------------------------------------------------------------


def dropped_weights(score: str, p: float, *, size: int = 60) -> tuple[Tensor, Tensor]:
    """The attention weights without dropout and as dropout left them, read off as the output for V = identity."""
    q, k = tokens(2, 3, size, 8), tokens(2, 3, size, 8)
    v = torch.eye(size, dtype=torch.float64).expand(2, 3, size, size)
    return ba.attention(q, k, v, score=score), ba.attention(q, k, v, score=score, dropout_p=p)


@pytest.mark.parametrize("p", [0.1, 0.3, 0.8])
@pytest.mark.parametrize("score", SCORES)
def test_dropout_zeroes_a_share_p_and_scales_the_rest(score: str, p: float) -> None:
    weights, dropped = dropped_weights(score, p)
    n = weights.numel()
    zeros = (dropped == 0).sum().item()
    assert abs(zeros - n * p) <= 4 * (n * p * (1 - p)) ** 0.5  # four standard deviations of the binomial
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], weights[kept] / (1 - p))
    shares = (dropped == 0).double().mean(dim=-1)  # no row, head or sample is spared or emptied as a whole
    assert shares.std() < 3 * (p * (1 - p) / weights.shape[-1]) ** 0.5


@pytest.mark.parametrize("score", SCORES)
def test_the_ends_of_the_range(score: str) -> None:
    weights, dropped = dropped_weights(score, 0.0)
    assert torch.equal(dropped, weights)
    _, dropped = dropped_weights(score, 1.0)
    assert torch.equal(dropped, torch.zeros_like(dropped))


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_the_seed_decides_and_eval_switches_it_off(name: str, need_weights: bool) -> None:
    module, plain = layer(name, dropout=0.5, max_len=11), layer(name, max_len=11)
    plain.load_state_dict(module.state_dict())
    x = tokens(3, 11, 6, dtype=torch.float32)

    def seeded(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return module(x, x, x, need_weights=need_weights)[0]

    module.train()
    first, again, other = seeded(1), seeded(1), seeded(2)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    module.eval()
    state = torch.get_rng_state()
    torch.testing.assert_close(
        module(x, x, x, need_weights=need_weights)[0], plain(x, x, x, need_weights=need_weights)[0]
    )
    assert torch.equal(torch.get_rng_state(), state), "eval drew random numbers"


@pytest.mark.parametrize("name", ["standard", "super", "expressive"])
def test_everything_dropped_leaves_the_output_bias(name: str) -> None:
    module = layer(name, dropout=1.0).train()
    x = tokens(3, 7, 6, dtype=torch.float32, requires_grad=True)
    output, _ = module(x, x, x, need_weights=False)
    torch.testing.assert_close(output, module.out_proj.bias.expand_as(output))
    output.sum().backward()
    assert x.grad.isfinite().all()


# --- determinism -------------------------------------------------------------------------------------------------


def forward_and_backward(module: nn.Module, x: Tensor, **arguments: object) -> list[Tensor]:
    module.zero_grad()
    x = x.detach().requires_grad_()
    output, _ = module(x, x, x, need_weights=False, **arguments)
    output.square().sum().backward()
    return [output.detach(), x.grad, *(p.grad for p in module.parameters())]


@pytest.mark.parametrize("name", NAMED)
def test_250_repeats_are_equal_bit_by_bit(name: str) -> None:
    module = layer(name, 8, 2, max_len=17)
    x, mask = tokens(2, 17, 8, dtype=torch.float32), padding(2, 17)
    first = forward_and_backward(module, x, key_padding_mask=mask)
    for _ in range(249):
        again = forward_and_backward(module, x, key_padding_mask=mask)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMED)
def test_repeats_are_equal_where_work_is_split(name: str) -> None:
    """Long enough for several chunks, and for several threads."""
    threads = torch.get_num_threads()
    module = layer(name, 16, 2, max_len=1_531, spread=0.1)
    x, mask = tokens(2, 1_531, 16, dtype=torch.float32), padding(2, 1_531)
    try:
        results = []
        for count in (1, 1, 2, 2):
            torch.set_num_threads(count)
            results.append(forward_and_backward(module, x, key_padding_mask=mask))
    finally:
        torch.set_num_threads(threads)
    for a, b in ((0, 1), (2, 3)):
        assert all(torch.equal(x, y) for x, y in zip(results[a], results[b], strict=True))
    for one, two in zip(results[0], results[2], strict=True):  # another order of summation
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5 * one.abs().max().item())


@pytest.mark.parametrize("name", ALL)
def test_deterministic_algorithms_suffice(name: str) -> None:
    module = layer(name, dropout=0.2)
    x = tokens(2, 7, 6, dtype=torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        forward_and_backward(module, x, key_padding_mask=padding(2, 7))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", NAMED)
def test_one_and_two_threads_agree(name: str) -> None:
    threads = torch.get_num_threads()
    module = layer(name, 8, 2, max_len=211)
    x = tokens(2, 211, 8, dtype=torch.float32)
    try:
        torch.set_num_threads(1)
        one = forward_and_backward(module, x)
        torch.set_num_threads(2)
        two = forward_and_backward(module, x)
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6 * max(1.0, a.abs().max().item()))


@pytest.fixture(scope="module")
def bare_process() -> dict[str, str]:
    """Another process, in which torch is all that can be imported: its fingerprint, and what explain chose."""
    program = f"""
import importlib.abc, json, sys, warnings
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {EXTRAS!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
sys.path.insert(0, {str(TESTS)!r})
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch remarks on a missing NumPy
    import torch
    torch.zeros(1)
torch.set_num_threads(1)
import better_attention as ba
from helpers import layers
x = torch.zeros(1, 2, 3, 4)
ba.cost(8, 2, 5)
print(json.dumps({{"fingerprint": layers.fingerprint(), "chosen": ba.explain(x, x, x).chosen}}))
"""
    return json.loads(python("-c", program, PYTHONHASHSEED="1"))


def test_two_processes_give_the_same_bytes(bare_process: dict[str, str]) -> None:
    assert fingerprint() == bare_process["fingerprint"]


# --- memory by shape, and at run time ----------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Watches every operation and remembers the largest storage, in elements, that is not one of the given tensors'."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {t.untyped_storage()._cdata for t in known}
        self.keep: list[Tensor] = []  # a freed storage's address could be used again by a new one
        self.largest, self.by = 0, ""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in self.known:
                self.keep.append(leaf)
                elements = leaf.untyped_storage().nbytes() // leaf.element_size()
                if elements > self.largest:
                    self.largest, self.by = elements, str(function)
        return result

    def count(self, elements: int) -> int:
        """How many different storages of at least that many elements were made."""
        storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() // t.element_size() for t in self.keep}
        return sum(size >= elements for size in storages.values())


LONG = 8_192
LONG_MASKS = {
    "none": {},
    "padding": {"key_padding_mask": True},
    "causal": {"is_causal": True},
    "causal and padding": {"is_causal": True, "key_padding_mask": True},
}


def watched(name: str, mask: str, *, training: bool, batch: int = 1, need_weights: bool = False) -> LargestTensor:
    """What a forward (and backward) of a layer makes at 8,192 tokens, nothing really allocated."""
    with FakeTensorMode():
        module = layer(name, 32, 2, max_len=LONG)
        x = torch.empty(batch, LONG, 32, requires_grad=training)
        arguments = dict(LONG_MASKS[mask])
        if "key_padding_mask" in arguments:
            arguments["key_padding_mask"] = torch.zeros(batch, LONG, dtype=torch.bool)
        watch = LargestTensor(*module.parameters())
        with watch, torch.set_grad_enabled(training):
            output, _ = module(x, x, x, need_weights=need_weights, **arguments)
            if training:
                output.sum().backward()
        return watch


WITHOUT_KERNEL = [name for name in ALL if not ba.Mechanism.of(LAYERS[name]["mechanism"]).aligned]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("name", "mask"),
    [
        pytest.param(name, mask, marks=[] if name in ("standard", "expressive") else pytest.mark.slow)
        for name in WITHOUT_KERNEL
        for mask in LONG_MASKS
    ],
)
def test_nothing_of_the_size_of_the_score_matrix(name: str, mask: str, training: bool) -> None:
    watch = watched(name, mask, training=training)
    assert 0 < watch.largest < LONG * LONG, f"{watch.by} made {watch.largest:,} elements"


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["super", "super causal", "super per head", "super+expressive"])
def test_super_makes_nothing_of_that_size_but_its_own_kernel(name: str, training: bool) -> None:
    """W_A's lower triangle and its gradient are ℓ × ℓ (h of them if per head): no more of them for a larger batch."""
    kernels = 2 if LAYERS[name].get("align_heads") == "per_head" else 1
    for mask in ("none", "padding", *(["causal and padding"] if name in CAUSAL else [])):
        watch = watched(name, mask, training=training, batch=1)
        assert watch.largest <= kernels * LONG * LONG, f"{mask}: {watch.by} made {watch.largest:,} elements"
        if not training:
            assert watch.count(LONG * LONG) <= (1 if name in CAUSAL else 0), mask
    larger = watched(name, mask, training=training, batch=3)
    assert larger.largest <= kernels * LONG * LONG, f"{larger.by} made {larger.largest:,} elements for 3 samples"
    assert larger.count(LONG * LONG) == watch.count(LONG * LONG)


@pytest.mark.parametrize("name", ["standard", "expressive"])
def test_the_watch_sees_a_score_matrix_where_there_is_one(name: str) -> None:
    watch = watched(name, "none", training=False, need_weights=True)
    assert watch.largest >= 2 * LONG * LONG
    assert watch.count(LONG * LONG) >= 1


def peak_of_chunked(score: str, mask: str, L: int) -> int:
    q, k, v = (tokens(1, 1, L, 8, dtype=torch.float32, requires_grad=True) for _ in range(3))
    attn_mask = (torch.rand(1, 1, 1, L) > 0.2) if "padding" in mask else None
    with profiled_memory() as measured:
        output = ba.attention(q, k, v, score=score, attn_mask=attn_mask, is_causal="causal" in mask, impl="chunked")
        output.sum().backward()
    return measured["peak"]


@pytest.mark.parametrize(
    ("score", "mask"),
    [
        ("expressive", "causal and padding"),
        *(pytest.param("softmax", mask, marks=pytest.mark.slow) for mask in LONG_MASKS),
        *(pytest.param("expressive", mask, marks=pytest.mark.slow) for mask in ("none", "padding", "causal")),
    ],
)
def test_memory_of_chunked_grows_with_the_length_not_its_square(score: str, mask: str) -> None:
    peaks = {L: peak_of_chunked(score, mask, L) for L in (1_024, 2_048, 4_096)}
    assert peaks[1_024] > 4 * 1_024 * 8  # the profiler sees at least the output
    assert peaks[4_096] < 4 * 4_096 * 4_096, "as much as one score matrix in float32"
    assert peaks[4_096] <= 2.5 * peaks[2_048], peaks  # linear doubles, quadratic quadruples


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["none", "padding", "causal", "causal and padding"])
@pytest.mark.parametrize("name", ["standard", "efficient", "expressive", "efficient+expressive learned scale"])
def test_memory_of_a_layer_at_run_time(name: str, mask: str) -> None:
    """What ``impl="auto"`` chooses, really run: kernels allocate inside, where no dispatch mode can look."""
    peaks = []
    for L in (2_048, 4_096):
        module = layer(name, 16, 2, spread=0.1)
        x = tokens(1, L, 16, dtype=torch.float32, requires_grad=True)
        hidden = padding(1, L) if "padding" in mask else None
        with profiled_memory() as measured:
            module(x, x, x, key_padding_mask=hidden, is_causal="causal" in mask, need_weights=False)[0].sum().backward()
        peaks.append(measured["peak"])
    assert peaks[1] < 4 * 4_096 * 4_096
    assert peaks[1] <= 2.5 * peaks[0], peaks


# --- threads -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_eight_threads_share_a_module(name: str) -> None:
    module = layer(name).eval()
    work = [(tokens(2, 2 + i % 6, 6, dtype=torch.float32), bool(i % 3), bool(i % 2)) for i in range(32)]

    def run(item: tuple[Tensor, bool, bool]) -> list[Tensor]:
        x, need_weights, differentiate = item
        with torch.set_grad_enabled(differentiate):
            output, weights = module(x, x, x, need_weights=need_weights, key_padding_mask=padding(2, x.shape[1], 1))
        return [output.detach()] + ([] if weights is None else [weights.detach()])

    alone = [run(item) for item in work]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            together = list(pool.map(run, work))
            for found, expected in zip(together, alone, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# --- the import --------------------------------------------------------------------------------------------------

IMPORT = """
import json, random, sys, threading, time, warnings
import torch

def state():
    return {
        "torch rng": hash(bytes(torch.get_rng_state().tolist())),
        "python rng": hash(random.getstate()),
        "default dtype": str(torch.get_default_dtype()),
        "grad": torch.is_grad_enabled(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads(), threading.active_count()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "filters": [str(f) for f in warnings.filters],
        "environment": sorted(__import__("os").environ.items()),
        "recursion": sys.getrecursionlimit(),
        "hooks": [repr(sys.excepthook), repr(sys.displayhook), repr(warnings.showwarning)],
        "cuda": torch.cuda.is_initialized(),
    }

acts = []
def audit(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        writes = any(c in (mode or "") for c in "wax+") or (isinstance(flags, int) and flags & 0o3)
        if writes:
            acts.append(f"opens {path!r} for writing")
    elif event.startswith(("socket.", "urllib", "subprocess", "os.system", "os.mkdir", "os.remove", "os.rename",
                           "shutil.", "tempfile.", "os.putenv", "os.fork", "http.", "ftplib", "smtplib")):
        acts.append(event)

before, loaded = state(), set(sys.modules)
sys.addaudithook(audit)
start = time.process_time()
import better_attention
seconds = time.process_time() - start
found = list(acts)
after = state()
print(json.dumps({
    "acts": found,
    "changed": [key for key in before if before[key] != after[key]],
    "new": sorted({name.split(".")[0] for name in set(sys.modules) - loaded}),
    "seconds": seconds,
}))
"""


@pytest.fixture(scope="module")
def imported() -> dict[str, object]:
    return json.loads(python("-c", IMPORT))


def test_the_import_changes_nothing_and_writes_nothing(imported: dict[str, object]) -> None:
    assert imported["changed"] == []
    assert imported["acts"] == []


def test_the_import_brings_no_extra(imported: dict[str, object]) -> None:
    assert "better_attention" in imported["new"]
    assert [name for name in imported["new"] if name in EXTRAS] == []


def test_the_import_is_quick(imported: dict[str, object]) -> None:
    assert imported["seconds"] < 0.5, "processor seconds beyond torch's own import"


def test_torch_alone_is_enough(bare_process: dict[str, str]) -> None:
    """Every extra was made impossible to import; every layer trained."""
    assert bare_process["chosen"]


def test_the_public_names_are_the_documented_ones() -> None:
    promised = "MECHANISMS Mechanism MultiheadAttention attention explain cost assert_causal"
    assert set(promised.split()) <= set(ba.__all__)
    assert callable(ba.load_run)
    assert "load_run" not in ba.__all__  # a star import must work without the extras that it needs
    source = Path(ba.__file__)
    assert (source.parent / "py.typed").exists()


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="load_runs"):
        ba.load_runs  # noqa: B018 - the access is the test
