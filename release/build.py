"""Build everything that a release consists of: the sdist, a wheel for each platform, the pure wheel, an SBOM, digests.

    python -m release.build [--out dist] [--only sdist,pure,manylinux-x86_64,...]

Everything is compiled on this machine by zig, which knows the headers and the C libraries of every platform below. All
wheels come from the sdist, in an empty folder, so that nothing of a working tree slips in. The same commit gives the
same bytes: times are those of ``SOURCE_DATE_EPOCH`` (or of the commit), and tools are those of ``requirements.txt``.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "release" / "requirements.txt"


@dataclass(frozen=True)
class Platform:
    """One platform that a wheel is built for.

    Args:
        name: what the wheel is called on the command line.
        tag: the platform tag of the wheel.
        target: zig's name for it: processor, system and, where it matters, the oldest version of the system.
        system, processor: CMake's names.
        library: the file name of the compiled kernels.
    """

    name: str
    tag: str
    target: str
    system: str
    processor: str
    library: str


PLATFORMS = (
    Platform(
        "manylinux-x86_64",
        "manylinux2014_x86_64.manylinux_2_17_x86_64",
        "x86_64-linux-gnu.2.17",
        "Linux",
        "x86_64",
        "libbetter_attention.so",
    ),
    Platform(
        "manylinux-aarch64",
        "manylinux2014_aarch64.manylinux_2_17_aarch64",
        "aarch64-linux-gnu.2.17",
        "Linux",
        "aarch64",
        "libbetter_attention.so",
    ),
    Platform("macos-arm64", "macosx_11_0_arm64", "aarch64-macos.11.0", "Darwin", "arm64", "libbetter_attention.dylib"),
    Platform("windows-amd64", "win_amd64", "x86_64-windows-gnu", "Windows", "AMD64", "libbetter_attention.dll"),
)
PURE = "pure"
SDIST = "sdist"
NAMES = (SDIST, PURE, *(platform.name for platform in PLATFORMS))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder of the files (default: dist)")
    parser.add_argument("--only", default=",".join(NAMES), help=f"some of {', '.join(NAMES)}")
    args = parser.parse_args(arguments)
    wanted = args.only.split(",")
    unknown = sorted(set(wanted) - set(NAMES))
    if unknown:
        parser.error(f"--only {','.join(unknown)}: expected some of {', '.join(NAMES)}.")
    wrong = list(other_versions())
    if wrong:
        parser.error(f"{'; '.join(wrong)}. Install the tools: pip install -r release/requirements.txt")
    args.out.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(epoch()), "PYTHONHASHSEED": "0"}
    with tempfile.TemporaryDirectory(prefix="better-attention-") as folder:
        work = Path(folder)
        sdist = build_sdist(work, environment)
        source = unpack(sdist, work)
        for name in wanted:
            file = sdist if name == SDIST else build_wheel(name, source, work, environment)
            shutil.copyfile(file, args.out / file.name)
            print(f"{args.out / file.name}: {file.stat().st_size / 1e6:.2f} MB", flush=True)
    from release.sbom import write_sbom

    # What lies there already, of the same version, belongs to the release as well.
    files = sorted(file for file in args.out.iterdir() if file.name.startswith(sdist.name.removesuffix(".tar.gz")))
    files = [file for file in files if file.suffix in (".whl", ".gz")]
    listed = [*files, write_sbom(args.out, files, int(environment["SOURCE_DATE_EPOCH"]))]
    sums = "".join(f"{digest(file)}  {file.name}\n" for file in listed)
    (args.out / "SHA256SUMS").write_text(sums, "utf-8")
    print(sums, end="")


def other_versions(requirements: Path = REQUIREMENTS) -> Iterator[str]:
    """What is installed in another version than the pinned one: the bytes of the result depend on it."""
    for line in requirements.read_text("utf-8").splitlines():
        name, _, version = line.partition("#")[0].strip().partition("==")
        if name:
            try:
                installed = metadata.version(name)
            except metadata.PackageNotFoundError:
                installed = "not installed"
            if installed != version:
                yield f"{name} is {installed}, expected {version}"


def epoch() -> int:
    """The time that files carry: ``SOURCE_DATE_EPOCH``, or that of the last commit."""
    given = os.environ.get("SOURCE_DATE_EPOCH")
    if given is not None:
        return int(given)
    done = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout)


def build_sdist(work: Path, environment: dict[str, str]) -> Path:
    """The sdist, from the files that git knows."""
    run(["-m", "build", "--no-isolation", "--sdist", "--outdir", str(work / "sdist"), str(ROOT)], environment)
    (found,) = (work / "sdist").iterdir()
    return found


def unpack(sdist: Path, work: Path) -> Path:
    """The folder of the unpacked sdist; the filter lets nothing leave it."""
    shutil.unpack_archive(sdist, work / "source", filter="data")
    (found,) = (work / "source").iterdir()
    return found


def build_wheel(name: str, source: Path, work: Path, environment: dict[str, str]) -> Path:
    """The wheel of one platform, or the pure one, from the unpacked sdist."""
    out = work / name
    command = ["-m", "build", "--no-isolation", "--wheel", "--outdir", str(out)]
    if name == PURE:
        command += ["-Cwheel.cmake=false"]
    else:
        (platform,) = (platform for platform in PLATFORMS if platform.name == name)
        tools = write_tools(platform, work / f"{name}-tools")
        environment = {**environment, **compilers(tools)}
        tags = (f"py3-none-{tag}" for tag in platform.tag.split("."))
        command += [f"-Cwheel.tags={';'.join(tags)}"]
        command += [f"-Ccmake.define.{key}={value}" for key, value in settings(platform, tools, source).items()]
    run([*command, str(source)], environment)
    (found,) = out.iterdir()
    return found


def settings(platform: Platform, tools: Path, source: Path) -> dict[str, str]:
    """What CMake cannot find out, because it compiles for another machine than the one that it runs on."""
    found = {
        "CMAKE_SYSTEM_NAME": platform.system,
        "CMAKE_SYSTEM_PROCESSOR": platform.processor,
        # The folder's name is another one each time. zig would describe everything to debuggers; it is stripped anyway.
        "CMAKE_CXX_FLAGS": f"-g0 -ffile-prefix-map={source}=better-attention",
        "CMAKE_AR": str(tools / "ar"),
        "CMAKE_RANLIB": str(tools / "ranlib"),
    }
    if platform.system == "Darwin":
        # Without an SDK, and without the tool that renames what a library links to: it links to nothing of ours.
        found |= {"CMAKE_OSX_SYSROOT": "", "CMAKE_OSX_ARCHITECTURES": "", "CMAKE_INSTALL_NAME_TOOL": shell("true")}
        found |= {"CMAKE_OSX_DEPLOYMENT_TARGET": ""}  # zig's target has it
    if platform.system == "Windows":
        found |= {"CMAKE_RC_COMPILER": str(tools / "rc")}
    return found


def shell(command: str) -> str:
    """The path of a command of this machine."""
    found = shutil.which(command)
    if found is None:
        raise SystemExit(f"release/build.py needs the command {command!r}, which is not there.")
    return found


def write_tools(platform: Platform, folder: Path) -> Path:
    """Scripts named like the tools of a compiler, which call zig for ``platform``."""
    import ziglang

    zig = Path(ziglang.__file__).parent / "zig"
    folder.mkdir()
    calls = {
        "cc": f'cc -target {platform.target} "$@"',
        # Without the C++ library, which the kernels do not use and zig would first have to compile.
        "c++": f'c++ -nostdlib++ -target {platform.target} "$@"',
        "ar": 'ar "$@"',
        "ranlib": 'ranlib "$@"',
        "rc": 'rc "$@"',
    }
    for name, call in calls.items():
        script = folder / name
        script.write_text(f"#!/bin/sh\nexec {zig} {call}\n", "utf-8")
        script.chmod(0o755)
    return folder


def compilers(tools: Path) -> dict[str, str]:
    """The environment that makes CMake use ``tools``; zig keeps what it compiles of C libraries."""
    cache = os.environ.get("ZIG_GLOBAL_CACHE_DIR", str(ROOT / "build" / "zig-cache"))
    none = dict.fromkeys(("CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS"), "")
    return {
        **none,
        "CC": str(tools / "cc"),
        "CXX": str(tools / "c++"),
        "ZIG_GLOBAL_CACHE_DIR": cache,
        "ZIG_LOCAL_CACHE_DIR": cache,
    }


def run(arguments: Sequence[str], environment: dict[str, str]) -> None:
    """Run this Python with ``arguments``; its output is shown where it fails."""
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode != 0:
        raise SystemExit(f"{done.stdout}\n{' '.join(arguments)} ended with {done.returncode}.")


def digest(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
