"""The benchmark of GPUs: what it says where there is none, what it makes of times, and what kernels use of an H100."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("benchmarks.gpu", reason="a source distribution has no benchmarks")

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import contenders, resources, timing
from benchmarks.gpu.timing import Cell

from better_attention.gpu.launches import PLAIN
from helpers import CHECKOUT


def cell(contender: str, milliseconds: float, direction: str = "forward", length: int = 512) -> Cell:
    return Cell(direction, length, 64, contender, milliseconds, milliseconds * 0.9, milliseconds * 1.1, 3)


FOUND = [
    cell("ours, expressive", 2.0), cell("SDPA flash", 3.0), cell("SDPA math", 9.0),
    cell("ours, expressive", 5.0, length=1024), cell("SDPA flash", 4.0, length=1024),
    cell("ours, softmax, K = V", 1.0, "decode"), cell("SDPA cuDNN", 2.0, "decode"),
]  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line_and_succeeds(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert command.main(["--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [command.NOTHING_HERE]
    assert not list(tmp_path.iterdir())


def test_the_table_is_relative_to_the_best_backend_of_its_row() -> None:
    text = command.table(FOUND)
    assert "| forward | 64 | 512 | SDPA flash | 3.000 | 1.50 | 1.00 | 0.33 |" in text
    assert "| forward | 64 | 1024 | SDPA flash | 4.000 | 0.80 | 1.00 | – |" in text
    assert "| decode | 64 | 512 | SDPA cuDNN | 2.000 | – | – | – | 2.00 | 1.00 |" in text


def test_the_verdicts_count_the_rows_that_reach_a_goal() -> None:
    forward, both, decode = command.verdicts(FOUND)
    assert "0.80 to 1.50 times as fast" in forward
    assert "reached in 1 of 2 rows" in forward
    assert "not measured" in both
    assert "reached in 1 of 1 rows" in decode


def test_contenders_take_turns_and_the_median_counts() -> None:
    order: list[str] = []
    ticks = {"a": iter([1, 5.0, 1.0, 3.0]), "b": iter([1, 2.0, 2.0, 2.0])}
    calls = {name: lambda name=name: order.append(name) for name in ticks}

    def clock(call: object, repeats: int) -> float:
        call()  # type: ignore[operator]
        return next(ticks[order[-1]])

    times = timing.alternating(calls, 3, clock)
    assert times == {"a": [5.0, 1.0, 3.0], "b": [2.0, 2.0, 2.0]}
    assert "".join(order[-6:]) == "abbaab"
    a, b = timing.cells("forward", 512, 64, times)
    assert (a.milliseconds, a.low, a.high, b.milliseconds) == (3.0, 1.0, 5.0, 2.0)


def test_what_is_written_can_be_read(tmp_path: Path) -> None:
    command.write(tmp_path, {"device": "NVIDIA H100 80GB HBM3"}, FOUND, ["one is left out"])
    document = json.loads((tmp_path / "gpu-nvidia-h100-80gb-hbm3.json").read_text("utf-8"))
    assert document["left_out"] == ["one is left out"]
    with (tmp_path / "gpu-nvidia-h100-80gb-hbm3.csv").open(encoding="utf-8") as file:
        assert [row["contender"] for row in csv.DictReader(file)] == [c.contender for c in FOUND]


def test_a_wrong_contender_is_found() -> None:
    q, k, v = contenders.inputs(
        37, 16, decode=False, shared=False, tokens=37, features=32, device="cpu", dtype=torch.float32
    )
    right = contenders.Contender("right", "expressive", contenders._ours("expressive", "reference", True))
    wrong = contenders.Contender("wrong", "expressive", contenders._ours("expressive", "reference", False))
    upstream = torch.randn_like(q)
    expected = contenders.exact(q, k, v, "expressive", True, upstream)
    assert contenders.worst(contenders.computed(right, q, k, v, upstream), expected) < 1e-5
    assert contenders.worst(contenders.computed(wrong, q, k, v, upstream), expected) > 0.1
    assert len(contenders.timed(right, (q, k, v), backward=True)()) == 3
    assert len(contenders.timed(right, (q, k, k), backward=True)()) == 2


def test_the_loop_of_a_program_is_found() -> None:
    code = "\n".join(
        [
            "        /*0010*/                   MOV R1, c[0x0][0x28] ;",
            "        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;",
            "        /*0030*/                   MUFU.RCP R4, R4 ;",
            "        /*0040*/              @!P0 BRA 0x20 ;",
            "        /*0050*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;",
            "        /*0060*/                   FSEL R4, R4, RZ, P1 ;",
            "        /*0070*/                   FSEL R5, R5, RZ, P1 ;",
            "        /*0080*/               @P2 BRA 0x50 ;",
            "        /*0090*/                   EXIT ;",
        ]
    )
    assert resources.main_loop(code) == Counter({"HGMMA": 1, "MUFU": 1, "BRA": 1})


def test_the_clocks_of_a_tile_are_those_of_the_units() -> None:
    """128 x 128 scores of 64 features: 2 products of 2^21 operations, one reciprocal for each score."""
    loop = Counter({"HGMMA": 12, "MUFU": 64, "FMUL": 128, "FMNMX": 64})
    r = resources.Resources("forward_kernel", resources.Block(128, 128, 8, 3), 200, 0, 0, loop)
    c = resources.clocks(r, 64)
    assert c.tensor == 2 * 2 * 128 * 128 * 64 / 4096
    assert c.special == 128 * 128 / 16
    assert c.issue == (12 + 64 + 128 + 2 * 64) * 8 / 4
    assert c.overlapped == 1.0
    assert c.in_turns == pytest.approx(0.5)


# --- for an H100, without one -----------------------------------------------------------------------------------------

compiles = pytest.mark.skipif(
    resources.tool("ptxas") is None or resources.tool("cuobjdump") is None,
    reason="this Triton brings no ptxas and cuobjdump",
)


SPILLS = {("key_gradient_kernel", 128): 128}
"""Bytes of a thread, at most, where two gradients of 128 features leave no register; elsewhere 0."""


def _fits(launch: resources.Launch, width: int) -> None:
    for block in launch.alternatives:
        r = resources.resources(launch, block)
        assert r.registers <= 255
        most = SPILLS.get((launch.kernel, width), 0)
        assert r.spilled <= most, f"{launch.kernel} {tuple(block)} spills {r.spilled} bytes"
        assert r.shared <= 227 * 1024


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("score", ["expressive", "softmax"])
@pytest.mark.parametrize("width", [64, 128])
def test_the_kernels_fit_an_h100(width: int, score: str) -> None:
    for launch in resources.all_launches(resources.example(width, score=score)):
        # The one that adds careful rows nearly always has nothing to do.
        if launch.kernel in resources.PRODUCTS and launch.constants.get("WHICH", PLAIN) == PLAIN:
            assert launch.constants["TMA"], "tiles are copied by descriptor"
            _fits(launch, width)


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [16, 32, 64, 128, 256])
def test_every_width_and_dtype_compiles(width: int, dtype: torch.dtype) -> None:
    for launch in resources.all_launches(resources.example(width, dtype=dtype)):
        r = resources.resources(launch)
        assert r.shared <= 227 * 1024


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("score", ["expressive", "softmax"])
def test_every_feature_compiles(score: str) -> None:
    mask = torch.zeros(1, 4, 1024, 1024)
    for options in (
        {"mask": mask}, {"mask": mask > 0, "shared": True}, {"dropout": 0.1}, {"window": 256},
        {"queries": 1, "length": 4096, "shared": True, "causal": False},
        {"queries": 3, "length": 4096, "mask": mask[..., :3, :1].expand(1, 4, 3, 4096)},
    ):  # fmt: skip
        for launch in resources.all_launches(resources.example(64, score=score, **options)):
            resources.resources(launch)


@compiles
@pytest.mark.slow
def test_expressive_weights_take_one_reciprocal_each_and_no_exponential() -> None:
    (launch, *_) = resources.all_launches(resources.example(64, causal=False))
    r = resources.resources(launch)
    scores = r.block.outer * r.block.inner / (r.block.warps * resources.WARP)
    assert r.loop["MUFU"] == scores
    (softmax, *_) = resources.all_launches(resources.example(64, causal=False, score="softmax"))
    assert resources.resources(softmax).loop["MUFU"] >= scores


@compiles
@pytest.mark.slow
def test_the_command_prints_the_rows_of_the_page(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["resources", "--width", "64", "--score", "softmax"])
    resources.main()
    head, _, *printed = capsys.readouterr().out.splitlines()
    page = (CHECKOUT / "docs" / "gpu.md").read_text("utf-8").splitlines()
    assert head in page
    # The last cells are those of the pinned version of Triton.
    tiles = [line.split("|")[1:7] for line in page if line.count("|") == head.count("|")]
    assert len(printed) == 4
    assert all(line.split("|")[1:7] in tiles for line in printed)
