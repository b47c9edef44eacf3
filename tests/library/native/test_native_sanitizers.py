"""The compiled kernels' own test program (C++, no Python, no torch): sanitized, poisoned, and for NEON emulated.

``kernel_test`` compares every kernel with a float64 oracle of its own. Here it is built through the project's
CMakeLists.txt and run with scratch memory full of NaN: under AddressSanitizer and UndefinedBehaviorSanitizer, once
with every tensor in an allocation of its own and once with every tensor ending where a forbidden page begins (masked
vector loads are not instrumented, but they do fault), and cross-compiled for aarch64 under qemu.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import better_attention
from better_attention.native import structs
from helpers import CHECKOUT

ROOT = CHECKOUT
NATIVE = ROOT / "src" / "better_attention" / "native" / "cpp"


def need(tool: str, package: str) -> str:
    """The path of a command; the test is skipped where it is missing."""
    path = shutil.which(tool)
    if path is None:
        pytest.skip(f"{tool} is missing: apt-get install {package}")
    return path


def run(*command: str | Path, seconds: float) -> str:
    """Standard output of a command that has to succeed."""
    environment = {k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", "CXXFLAGS", "LDFLAGS")}
    environment.setdefault("CMAKE_BUILD_PARALLEL_LEVEL", "2")
    environment["UBSAN_OPTIONS"] = "print_stacktrace=1"
    # Off, also where it is the default: GCC 12 and others place the frames of the fake stack that it needs without
    # regard to the alignment of 64 bytes that AVX-512 vectors have, and aligned stores into them fault.
    environment["ASAN_OPTIONS"] = "detect_stack_use_after_return=0"
    done = subprocess.run(
        [str(word) for word in command], env=environment, capture_output=True, text=True, timeout=seconds
    )
    words = " ".join(str(word) for word in command)
    errors = done.stderr if len(done.stderr) < 8000 else f"{done.stderr[:4000]}\n...\n{done.stderr[-4000:]}"
    assert done.returncode == 0, f"{words} ended with {done.returncode}\n{done.stdout[-2000:]}\n{errors}"
    return done.stdout


def build(folder: Path, *options: str) -> Path:
    """Build kernel_test with the kernels' CMakeLists.txt, on poisoned scratch memory, and say where it is."""
    cmake = need("cmake", "cmake")
    need("make", "make")
    settings = ("-DBETTER_ATTENTION_TESTS=ON", "-DBETTER_ATTENTION_POISON=ON", *options)
    # Make, not Ninja: the generator must not depend on what else a machine has.
    run(cmake, "-S", NATIVE, "-B", folder, "-G", "Unix Makefiles", *settings, seconds=120)
    run(cmake, "--build", folder, "--target", "kernel_test", seconds=900)
    found = [path for path in folder.rglob("kernel_test") if path.is_file()]
    assert len(found) == 1, f"expected one program kernel_test, built {found}"
    return found[0]


def instruction_sets(output: str) -> set[str]:
    """Those that kernel_test says it ran; and it must have run something, without failure."""
    match = re.search(r"^instruction sets: (.+)$", output, re.MULTILINE)
    tally = re.search(r"^(\d+) cases, 0 failures", output, re.MULTILINE)
    assert match, output
    assert tally, output
    assert int(tally[1]) > 300, output
    return set(match[1].split())


def of_this_processor() -> set[str]:
    """The instruction sets that this machine's kernel reports, portable included."""
    words = set(Path("/proc/cpuinfo").read_text().split()) if Path("/proc/cpuinfo").exists() else set()
    names = {"portable"}
    names |= {"avx2"} if {"avx2", "fma"} <= words else set()
    names |= {"avx512"} if {"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma"} <= words else set()
    names |= {"neon"} if "asimd" in words else set()
    return names


@pytest.mark.slow
def test_kernels_under_sanitizers_on_poisoned_memory(tmp_path: Path) -> None:
    need("g++", "g++")
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() {}\n")
    linked = subprocess.run(
        ["g++", "-fsanitize=address,undefined", probe, "-o", tmp_path / "probe"], capture_output=True, text=True
    )
    if linked.returncode != 0:
        pytest.skip("the sanitizers' libraries are missing: apt-get install libasan8 libubsan1")
    program = build(
        tmp_path / "build",
        "-DCMAKE_CXX_COMPILER=g++",
        "-DBETTER_ATTENTION_SANITIZE=ON",
    )
    for extra in ([], ["--pages"]):
        assert instruction_sets(run(program, "--quick", *extra, seconds=900)) == of_this_processor()


@pytest.mark.slow
def test_every_case_on_poisoned_memory(tmp_path: Path) -> None:
    need("g++", "g++")
    program = build(tmp_path / "build", "-DCMAKE_CXX_COMPILER=g++")
    assert instruction_sets(run(program, "--pages", seconds=600)) == of_this_processor()


@pytest.mark.slow
def test_neon_kernels_under_emulation(tmp_path: Path) -> None:
    need("aarch64-linux-gnu-g++", "g++-aarch64-linux-gnu")
    emulator = need("qemu-aarch64", "qemu-user")
    program = build(
        tmp_path / "build",
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        "-DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc",
        "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++",
    )
    output = run(emulator, "-L", "/usr/aarch64-linux-gnu", program, "--quick", "--pages", seconds=900)
    assert instruction_sets(output) == {"neon", "portable"}


def test_library_exports_its_interface_and_needs_no_runtime() -> None:
    """One library serves every torch and Python: nothing of theirs, and no OpenMP of its own, may be linked in."""
    library = Path(better_attention.__file__).parent / "native" / "libbetter_attention.so"
    if not library.exists():
        pytest.skip("no compiled library is installed here: apt-get install g++ and install better-attention again")
    nm, readelf = need("nm", "binutils"), need("readelf", "binutils")
    exported = {line.split()[-1] for line in run(nm, "-D", "--defined-only", library, seconds=30).splitlines()}
    assert exported == set(structs.FUNCTIONS)
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", run(readelf, "-d", library, seconds=30))
    assert needed, "readelf names no library at all, not even libc"
    strangers = [name for name in needed if not re.match(r"lib(c|m|dl|pthread)\.so|ld-linux", name)]
    assert not strangers, f"the library needs {strangers}"
