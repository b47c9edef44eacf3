"""What each kernel uses of an H100, from the machine code that Triton's own ptxas makes for it. No GPU takes part.

``python -m benchmarks.gpu.resources`` prints the tables of docs/gpu.md.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from better_attention.gpu import launches
from better_attention.gpu.blocks import Block
from better_attention.gpu.launches import Launch, Problem
from better_attention.gpu.toolchain import Target
from better_attention.tensors import empty_heads

H100 = Target("cuda", 90, 132, descriptors=True)
WARP = 32

TENSOR_FLOPS = 4096
"""Operations of one multiprocessor's tensor cores in a clock, dense bfloat16: 989.4e12 / (132 x 1.83e9)."""
SPECIAL_PER_CLOCK = 16
"""Results of its special-function units (reciprocal, 2^x, log2) in a clock."""
ISSUED_PER_CLOCK = 4
"""Instructions of warps that its four schedulers start in a clock, such as sums and products of float32."""
HALF_RATE = ("FMNMX", "FSETP", "FSEL", "F2FP", "F2F", "ISETP", "SEL", "LOP3", "SHF", "PRMT", "IADD3", "LEA", "VIADD")
"""Instructions of which 64 results come in a clock: minimum, comparison, selection, conversion, integers."""

POINTERS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.uint8: "u8"}
NOT_SPECIALISED = ("seed", "below", "batch_first", "batch_step", "offset", "window", "share")


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses.

    Args:
        kernel, block: what was compiled, and with which tiles.
        registers: of each thread.
        spilled: bytes of each thread's memory that hold what did not fit into registers.
        shared: bytes of shared memory of a program.
        loop: instructions of one warp, by name, in one round of the loop over tiles in which nothing is hidden.
    """

    kernel: str
    block: Block
    registers: int
    spilled: int
    shared: int
    loop: Counter[str]


def tool(name: str) -> Path | None:
    """One of the programs of CUDA that Triton's wheel brings; None where it does not."""
    try:
        import triton
    except ImportError:
        return None
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return path if path.exists() else None


def compile_ahead(launch: Launch, block: Block) -> Any:
    """The kernel of a launch compiled for an H100, with everything a real launch would tell the compiler."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.tools.tensor_descriptor import TensorDescriptor

    kernel = launches.kernel(launch.kernel)
    constants = dict(launch.constants) | ({launch.outer: block.outer} if launch.outer else {})
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}
    for index, name in enumerate(kernel.arg_names):
        value = constants.get(name, launch.arguments.get(name))
        if name in constants or value is None:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[index,] = f"*{POINTERS[value.dtype]}", [["tt.divisibility", 16]]
        elif isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{POINTERS[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and name not in NOT_SPECIALISED:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0 and name not in NOT_SPECIALISED:
                attributes[index,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": block.warps, "num_stages": block.stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", H100.capability, WARP), options=options)


def resources(launch: Launch, block: Block | None = None) -> Resources:
    """Compile the kernel of a launch, and read what it uses."""
    block = block or launch.alternatives[0]
    compiled = compile_ahead(launch, block)
    reader = tool("cuobjdump")
    if reader is None:
        raise FileNotFoundError("Triton's wheel has no cuobjdump: install the one from PyPI.")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _output([str(reader), "-res-usage", str(cubin)])
        code = _output([str(reader), "-sass", str(cubin)])
    numbers = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    spilled = numbers["STACK"] + numbers["LOCAL"]
    return Resources(launch.kernel, block, numbers["REG"], spilled, compiled.metadata.shared, main_loop(code))


def _output(line: list[str]) -> str:
    return subprocess.run(line, check=True, capture_output=True, text=True).stdout


def main_loop(code: str) -> Counter[str]:
    """Instructions by name in the innermost loop that multiplies matrices with the fewest other instructions.

    That is the loop over tiles in which nothing is hidden; those at the edges of the band compare and select besides.
    """
    instructions: list[tuple[int, str, str]] = []
    for line in code.splitlines():
        found = re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_]*)([^;]*);", line)
        if found:
            instructions.append((int(found[1], 16), found[2], found[3]))
    loops = []
    for number, (address, name, rest) in enumerate(instructions):
        target = re.search(r"0x([0-9a-f]+)", rest)
        if name != "BRA" or target is None or int(target[1], 16) >= address:
            continue
        body = [x for x in instructions[: number + 1] if x[0] >= int(target[1], 16)]
        # An outer loop holds another one's jump back.
        inner = sum(x[1] == "BRA" and _backwards(x) for x in body) == 1
        products = sum(x[1] in ("HGMMA", "HMMA") for x in body)
        if inner and products:
            loops.append(Counter(x[1] for x in body))
    return min(loops, key=lambda loop: sum(loop.values()), default=Counter())


def _backwards(instruction: tuple[int, str, str]) -> bool:
    target = re.search(r"0x([0-9a-f]+)", instruction[2])
    return target is not None and int(target[1], 16) < instruction[0]


# --- the roofline of a tile -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clocks:
    """How many clocks of a multiprocessor each of its units needs for one tile of one program."""

    tensor: float
    special: float
    issue: float

    @property
    def overlapped(self) -> float:
        """The share of the tensor cores' peak if the units work at the same time, the ideal."""
        return self.tensor / max(self.tensor, self.special, self.issue)

    @property
    def in_turns(self) -> float:
        """The share if products wait for weights and weights for products: one program alone, without pipelining."""
        return self.tensor / (self.tensor + max(self.special, self.issue))


PRODUCTS = {"forward_kernel": 2, "query_gradient_kernel": 3, "key_gradient_kernel": 4, "split_kernel": 2}
"""Matrix products of one tile, each of 2 x outer x inner x width operations."""


def clocks(r: Resources, width: int, rounds: int = 1) -> Clocks:
    """The roofline of one tile of ``r``, for heads of ``width`` features.

    Args:
        r: from :func:`resources`.
        width: of queries, keys and values.
        rounds: tiles that one round of the loop computes.
    """
    outer, inner, warps, _ = r.block
    half = sum(count for name, count in r.loop.items() if name in HALF_RATE)
    total = sum(r.loop.values())
    return Clocks(
        tensor=2.0 * PRODUCTS[r.kernel] * outer * inner * width / TENSOR_FLOPS,
        special=r.loop["MUFU"] * warps * WARP / SPECIAL_PER_CLOCK / rounds,
        # Half-rate instructions take the place of two.
        issue=(total + half) * warps / ISSUED_PER_CLOCK / rounds,
    )


# --- the problems of the table ----------------------------------------------------------------------------------------


def example(
    width: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    score: str = "expressive",
    causal: bool = True,
    shared: bool = False,
    length: int = 1024,
    queries: int | None = None,
    dropout: float = 0.0,
    mask: torch.Tensor | None = None,
    window: int | None = None,
) -> Problem:
    """A call whose numbers nobody computes: only its shapes, dtypes and strides matter to the compiler."""
    L = length if queries is None else queries

    def heads(rows: int) -> torch.Tensor:
        return torch.empty(1, rows, 4, width, dtype=dtype).transpose(1, 2)

    k = heads(length)
    return Problem(
        heads(L), k, None if shared else heads(length), mask, None, (5, 0, 1) if dropout else None, causal,
        length - L if causal else 0, window, score, width**-0.5, dropout,
    )  # fmt: skip


def all_launches(p: Problem, target: Target = H100) -> list[Launch]:
    """Every launch of the forward and the backward pass of a call."""
    _, out, stats = _with_results(p)
    grads = empty_heads(p.q), empty_heads(p.k), None if p.v is None else empty_heads(p.v)
    return [
        *launches.forward_launches(p, out, stats, target),
        *launches.backward_launches(torch.empty_like(out), p, out, stats, *grads, target),
    ]


def rows(widths: Sequence[int], scores: Sequence[str]) -> Iterator[tuple[int, str, Resources]]:
    """The kernels over tiles, without a triangle, for each width and score."""
    for width in widths:
        for score in scores:
            for launch in all_launches(example(width, score=score, causal=False)):
                if launch.kernel in PRODUCTS and launch.constants.get("WHICH", launches.PLAIN) == launches.PLAIN:
                    yield width, score, resources(launch)
        for score in scores:
            launch = launches.forward_launches(
                *_with_results(example(width, score=score, causal=False, shared=True, queries=1, length=16384)), H100
            )[0]
            yield width, score, resources(launch)


def _with_results(p: Problem) -> tuple[Problem, torch.Tensor, torch.Tensor]:
    return p, empty_heads(p.q, p.values.shape[-1]), launches.empty_statistics(p)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.resources", description=__doc__)
    parser.add_argument("--width", type=int, nargs="+", default=[64, 128], help="head widths")
    parser.add_argument("--score", nargs="+", default=["expressive", "softmax"], choices=launches.COMPUTED)
    options = parser.parse_args()
    if tool("ptxas") is None or tool("cuobjdump") is None:
        print("This Triton brings no ptxas and cuobjdump: nothing can be compiled.")
        return
    head = (
        "kernel", "score", "width", "tile", "warps", "stages", "registers", "spilled", "shared KiB", "tensor",
        "special", "issue", "in turns", "overlapped",
    )  # fmt: skip
    print("| " + " | ".join(head) + " |")
    print("|---|---|" + "---:|" * (len(head) - 2))
    for width, score, r in rows(options.width, options.score):
        c = clocks(r, width)
        cells = (
            r.kernel.removesuffix("_kernel"), score, width, f"{r.block.outer} x {r.block.inner}", r.block.warps,
            r.block.stages, r.registers, r.spilled, f"{r.shared / 1024:.0f}", f"{c.tensor:.0f}", f"{c.special:.0f}",
            f"{c.issue:.0f}", f"{c.in_turns:.0%}", f"{c.overlapped:.0%}",
        )  # fmt: skip
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
