"""What the kernels take the processor to have: our own cpuid code against the compiler's, /proc/cpuinfo and a table.

The compiled program prints, for its own processor, what ``cpp/cpu.hpp`` and ``__builtin_cpu_supports`` say; and, for
registers that it reads from its arguments, what ``cpp/cpu.hpp`` makes of them, so that processors and operating systems
that are not at hand are tested as well.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from better_attention.native import library

NAMES = (
    *("avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vbmi", "avx512vnni"),
    *("avx512bf16", "avx512fp16", "amx_tile", "amx_int8", "amx_bf16"),
)
BUILTIN = {"amx_tile": "amx-tile", "amx_int8": "amx-int8", "amx_bf16": "amx-bf16"}
"""Names that the compiler spells in another way."""

PRINTS = "\n    ".join(f'if (cpu.{name}) std::printf("{name} ");' for name in NAMES)
BUILTINS = "\n    ".join(
    f'if (__builtin_cpu_supports("{BUILTIN.get(name, name)}")) std::printf("{name} ");' for name in NAMES
)
PROGRAM = f"""
#include <cstdio>
#include <cstdlib>
#include "cpu.hpp"

static void print(const ba_cpu& cpu) {{
    {PRINTS}
    std::printf("\\n");
}}

int main(int n, char** words) {{
    if (n == 7) {{
        ba_cpuid id = {{}};
        uint32_t* leaves[] = {{&id.leaf1_ecx, &id.leaf7_ebx, &id.leaf7_ecx, &id.leaf7_edx, &id.leaf7_1_eax}};
        for (int i = 0; i < 5; ++i) *leaves[i] = static_cast<uint32_t>(std::strtoull(words[i + 1], 0, 16));
        id.xcr0 = std::strtoull(words[6], 0, 16);
        print(ba_cpu_of(id));
        return 0;
    }}
    print(ba_cpu_of(ba_ask_cpu()));
    {BUILTINS}
    std::printf("\\n");
}}
"""

Program = Callable[..., list[set[str]]]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip("cpuid is an instruction of x86")
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is missing: apt-get install g++")
    folder = tmp_path_factory.mktemp("cpu")
    source = folder / "cpu.cpp"
    source.write_text(PROGRAM, "utf-8")
    headers = Path(library.__file__).parent / "cpp"
    command = [compiler, "-Wall", "-Wextra", "-Werror", "-I", str(headers), str(source), "-o", str(folder / "cpu")]
    subprocess.run(command, check=True, timeout=60)

    def run(*registers: int) -> list[set[str]]:
        words = [str(folder / "cpu"), *(f"{value:x}" for value in registers)]
        done = subprocess.run(words, check=True, capture_output=True, text=True, timeout=10)
        return [set(line.split()) for line in done.stdout.splitlines()]

    return run


def test_our_code_says_what_the_compiler_says(program: Program) -> None:
    ours, builtin = program()
    assert ours == builtin


def test_our_code_says_what_the_kernel_says(program: Program) -> None:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        pytest.skip("no /proc/cpuinfo")
    words = set(cpuinfo.read_text("utf-8").replace("avx512_", "avx512").split())
    (ours, _) = program()
    assert ours == words & set(NAMES)


def test_the_library_has_the_sets_that_the_processor_has(program: Program) -> None:
    if library.missing():
        pytest.skip("no compiled kernels")
    (ours, _) = program()
    expected = ["portable"]
    if {"avx2", "fma"} <= ours:
        expected.insert(0, "avx2")
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma"} <= ours:
        expected.insert(0, "avx512")
    assert library.instruction_sets() == tuple(expected)


def bits(*places: int) -> int:
    return sum(1 << place for place in places)


AVX = bits(12, 27, 28)  # leaf 1, ecx: FMA, OSXSAVE, AVX
AVX2 = bits(5)
AVX512 = bits(5, 16, 17, 30, 31)  # leaf 7, ebx: AVX2 and F, DQ, BW, VL
SSE_YMM, ZMM, TILES = 0x6, 0xE6, 0x600E6
HASWELL = {"avx2", "fma"}
SKYLAKE = HASWELL | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
SAPPHIRE = SKYLAKE | {"avx512vbmi", "avx512vnni", "avx512bf16", "avx512fp16", "amx_tile", "amx_int8", "amx_bf16"}


@pytest.mark.parametrize(
    ("registers", "expected"),
    [
        pytest.param((0, 0, 0, 0, 0, 0), set(), id="nothing"),
        pytest.param((AVX, AVX2, 0, 0, 0, SSE_YMM), HASWELL, id="AVX2"),
        pytest.param((AVX, AVX2, 0, 0, 0, 0x2), set(), id="AVX2, its registers not saved"),
        pytest.param((bits(12, 28), AVX2, 0, 0, 0, SSE_YMM), set(), id="no OSXSAVE"),
        pytest.param((bits(27, 28), AVX2, 0, 0, 0, SSE_YMM), {"avx2"}, id="AVX2 without FMA"),
        pytest.param((AVX, AVX512, 0, 0, 0, ZMM), SKYLAKE, id="AVX-512"),
        pytest.param((AVX, AVX512, 0, 0, 0, SSE_YMM), HASWELL, id="AVX-512, its registers not saved"),
        pytest.param((AVX, AVX512, 0, 0, 0, 0x66), HASWELL, id="AVX-512, only half of its registers saved"),
        pytest.param((AVX, AVX512 - bits(30), 0, 0, 0, ZMM), SKYLAKE - {"avx512bw"}, id="AVX-512 without BW"),
        pytest.param((AVX, AVX512, bits(1, 11), bits(22, 23, 24, 25), bits(5), TILES), SAPPHIRE, id="AMX"),
        pytest.param(
            (AVX, AVX512, bits(1, 11), bits(22, 23, 24, 25), bits(5), ZMM),
            {name for name in SAPPHIRE if not name.startswith("amx")},
            id="AMX, its tiles not saved",
        ),
        pytest.param(
            (AVX, AVX512, bits(1, 11), bits(22, 23, 24, 25), bits(5), 0x200E6),
            {name for name in SAPPHIRE if not name.startswith("amx")},
            id="AMX, its configuration saved and its data not",
        ),
    ],
)
def test_an_instruction_set_needs_the_processor_and_the_operating_system(
    registers: tuple[int, ...], expected: set[str], program: Program
) -> None:
    (found,) = program(*registers)
    assert found == expected
