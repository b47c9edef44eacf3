"""Check what ``release/build.py`` has built, and say of each file what was run on this machine and what was not.

    python -m release.check [dist] [--reproduce] [--torch SITE_PACKAGES] [--emulators FOLDER]

Names, tags, contents and sizes; ``twine check``; ``auditwheel show``; instruction sets and numbers of each compiled
library, by ``probe.c`` (aarch64 under qemu-user-static, Windows under wine, installed or in FOLDER);
the wheel, the pure wheel and the sdist installed in fresh environments without a compiler, and used.
"""

from __future__ import annotations

import argparse
import os
import platform as host
import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

from release.build import PLATFORMS, ROOT, Platform, digest, epoch, shell, write_tools
from release.sbom import version_of_source

LARGEST = 1_250_000
LARGEST_LIBRARY = 1_000_000
"""Bytes of a wheel and of the library in it: they are installed into many images."""
SOURCES = ["better_attention/keras/kernels/jax_ffi.cpp", "better_attention/native/cpp/api.h"]
"""What a wheel has in C++: what better_attention.keras.kernels compiles against the headers of the jaxlib it finds."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dist", type=Path, nargs="?", default=ROOT / "dist")
    parser.add_argument("--reproduce", action="store_true", help="build everything again and compare the bytes")
    parser.add_argument("--torch", type=Path, help="site-packages with torch, to install nothing of it again")
    parser.add_argument("--emulators", type=Path, help="folder into which packages with qemu or wine were unpacked")
    parser.add_argument("--no-install", action="store_true", help="leave out the fresh environments")
    args = parser.parse_args(arguments)
    files = sorted(args.dist.glob(f"better_attention-{version_of_source()}*"))
    wheels = [file for file in files if file.suffix == ".whl"]
    (sdist,) = (file for file in files if file.name.endswith(".tar.gz"))
    run([sys.executable, "-m", "twine", "check", "--strict", *map(str, [*wheels, sdist])])
    say("twine check --strict", "passed")
    validate(args.dist / f"better_attention-{version_of_source()}.cdx.json")
    with tempfile.TemporaryDirectory(prefix="better-attention-check-") as folder:
        work = Path(folder)
        for wheel in wheels:
            say(wheel.name, f"{wheel.stat().st_size / 1e6:.2f} MB, {contents(wheel)}")
        for platform in PLATFORMS:
            for wheel in (one for one in wheels if platform.tag in one.name):
                if platform.system == "Linux":
                    say(platform.name, audited(wheel, platform))
                say(platform.name, probed(wheel, platform, work, args.emulators))
        if not args.no_install:
            for file in [*installable(wheels), sdist]:
                say(file.name, installed(file, work, args.torch))
        if args.reproduce:
            reproduced(files, work)


def say(what: str, text: str) -> None:
    """A line of the report."""
    print(f"{what}: {text}", flush=True)


def run(command: Sequence[str], environment: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    """What a command that has to succeed prints."""
    done = subprocess.run(
        command, env=environment, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}")
    return done.stdout


def contents(wheel: Path) -> str:
    """What is wrong with a wheel ends the check; otherwise a sentence on what it has."""
    if wheel.stat().st_size > LARGEST:
        raise SystemExit(f"{wheel.name} has {wheel.stat().st_size:,} bytes, expected {LARGEST:,} at most.")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (tags,) = (archive.read(name).decode() for name in names if name.endswith(".dist-info/WHEEL"))
        libraries = [name for name in names if re.search(r"\.(so|dylib|dll|pyd|a|lib|pdb)$", name)]
        sizes = [archive.getinfo(name).file_size for name in libraries]
    platform = next((one for one in PLATFORMS if one.tag in wheel.name), None)
    expected = [f"better_attention/native/{platform.library}"] if platform else []
    if libraries != expected:
        raise SystemExit(f"{wheel.name} has the libraries {libraries}, expected {expected}.")
    if max(sizes, default=0) > LARGEST_LIBRARY:
        raise SystemExit(
            f"{libraries[0]} has {max(sizes):,} bytes, expected {LARGEST_LIBRARY:,} at most. Is it stripped?"
        )
    pure = "Root-Is-Purelib: true" in tags
    if pure != (platform is None):
        raise SystemExit(f"{wheel.name} says that it is {'pure' if pure else 'not pure'}.")
    foreign = [name for name in names if not name.startswith(("better_attention/", "better_attention-"))]
    sources = [name for name in names if name.endswith((".cpp", ".hpp", ".h"))]
    if extra := foreign + sorted(set(sources) - set(SOURCES)):
        raise SystemExit(f"{wheel.name} has files that do not belong there: {extra}.")
    if lost := sorted(set(SOURCES) - set(sources)):
        raise SystemExit(f"{wheel.name} lacks {lost}, which the kernels for JAX are compiled from.")
    return f"{len(names)} files, {'no compiled library' if pure else platform.library if platform else ''}"


def validate(bill: Path) -> None:
    """The SBOM against the schema of CycloneDX."""
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    error = JsonStrictValidator(SchemaVersion.V1_6).validate_str(bill.read_text("utf-8"))
    if error is not None:
        raise SystemExit(f"{bill.name} is no CycloneDX 1.6: {error}")
    say(bill.name, "valid CycloneDX 1.6")


def audited(wheel: Path, platform: Platform) -> str:
    """What auditwheel says of a wheel for Linux."""
    text = " ".join(run([sys.executable, "-m", "auditwheel", "show", str(wheel)]).split())
    newest = platform.tag.rpartition(".")[2]
    if f'consistent with the following platform tag: "{newest}"' not in text:
        raise SystemExit(f"auditwheel finds {wheel.name} not consistent with {newest}:\n{text}")
    return f"auditwheel show: consistent with {newest}"


def probed(wheel: Path, platform: Platform, work: Path, emulators: Path | None) -> str:
    """The instruction sets of the compiled library and its errors, where this machine can run it."""
    folder = work / f"{platform.name}-probe"
    folder.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        library = folder / platform.library
        library.write_bytes(archive.read(f"better_attention/native/{platform.library}"))
    program = folder / ("probe.exe" if platform.system == "Windows" else "probe")
    tools = write_tools(platform, folder / "tools")
    headers = ROOT / "src" / "better_attention" / "native" / "cpp"
    cache = os.environ.get("ZIG_GLOBAL_CACHE_DIR", str(ROOT / "build" / "zig-cache"))
    environment = {**os.environ, "ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache}
    compiled = [str(tools / "cc"), "-O1", "-I", str(headers), str(ROOT / "release" / "probe.c"), "-o", str(program)]
    run([*compiled, *(["-ldl", "-lm"] if platform.system == "Linux" else [])], environment)
    how, command = emulator(platform, emulators)
    if command is None:
        return f"built, not run here ({how})"
    environment |= {"WINEPREFIX": str(folder / "wine"), "WINEDEBUG": "-all"}
    lines = run([*command, str(program), str(library)], environment).replace("\r", "").strip().splitlines()
    lines = [line for line in lines if not line.startswith("wine: ")]  # of the folder that it makes for itself
    sets = [line.split()[0] for line in lines if re.fullmatch(r"(portable|neon|avx2|avx512) [\d.]+e[-+]\d+", line)]
    best = {"aarch64": "neon"}.get(platform.processor, best_here())
    # A wheel that runs the portable kernels alone would be slow without a word.
    if "portable" not in sets or best not in sets:
        raise SystemExit(f"{wheel.name} runs {', '.join(sets) or 'nothing'}, expected {best} and portable, {how}.")
    return f"run {how}; instruction sets and largest error against double: {'; '.join(lines)}"


def best_here() -> str:
    """The best instruction set of this x86 processor that there are kernels for, as Linux says."""
    cpuinfo = Path("/proc/cpuinfo")
    words = set(cpuinfo.read_text("utf-8").split()) if cpuinfo.exists() else set()
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= words:
        return "avx512"
    return "avx2" if {"avx2", "fma"} <= words else "portable"


def emulator(platform: Platform, folder: Path | None) -> tuple[str, list[str] | None]:
    """How a program of ``platform`` is run here, in words and as the beginning of a command; None: not at all."""
    if host.system() == platform.system and host.machine().lower() == platform.processor.lower():
        return "on this machine", []
    if host.system() != "Linux":
        return "this machine has another system", None
    root = folder or Path("/")
    if platform.system == "Linux" and platform.processor == "aarch64":
        qemu, libc = root / "usr/bin/qemu-aarch64-static", root / "usr/aarch64-linux-gnu"
        if qemu.exists() and libc.exists():
            return "under qemu-user", [str(qemu), "-L", str(libc)]
        return "no qemu-user-static and libc6-arm64-cross", None
    if platform.system == "Windows":
        wine = next(
            (found for name in ("usr/lib/wine/wine64", "usr/bin/wine64") if (found := root / name).exists()), None
        )
        return ("under wine", [str(wine)]) if wine else ("no wine", None)
    return "needs a Mac", None


def installable(wheels: Sequence[Path]) -> list[Path]:
    """The pure wheel, and the one for this machine."""
    here = f"{host.system()} {host.machine()}".lower()
    tags = [platform.tag for platform in PLATFORMS if f"{platform.system} {platform.processor}".lower() == here]
    return [wheel for wheel in wheels if wheel.name.endswith(("none-any.whl", *(f"{tag}.whl" for tag in tags)))]


SMOKE = """
import sys
import torch
import better_attention as ba
from better_attention.native import library

expected = sys.argv[1]
assert ba.__version__ == sys.argv[2], ba.__version__
assert "site-packages" in ba.__file__, ba.__file__
missing = library.missing()
assert (missing is None) == (expected == "kernels"), missing
x = torch.randn(2, 37, 32)
for mechanism in ba.MECHANISMS:
    options = {"mechanism": mechanism, "batch_first": True, "max_len": 37 if ba.MECHANISMS[mechanism].aligned else None}
    layer = ba.MultiheadAttention(32, 4, **options).eval()
    other = ba.MultiheadAttention(32, 4, impl="reference", **options).eval()
    other.load_state_dict(layer.state_dict())
    y, z = (one(x, x, x, need_weights=False)[0] for one in (layer, other))
    torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-5)
    y.sum().backward()
print("kernels " + ", ".join(library.instruction_sets()) if missing is None else "no kernels: " + missing.split(";")[0])
"""


def installed(file: Path, work: Path, torch: Path | None) -> str:
    """A file of the release in an environment of its own, on a machine without a compiler."""
    folder = work / f"{file.name}-environment"
    venv.create(folder, with_pip=True)
    scripts = folder / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / "python"
    if torch is not None:
        place = run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip()
        (Path(place) / "torch.pth").write_text(f"{torch}\n", "utf-8")
    # No compiler: neither by name nor on the path, but the commands that pip and CMake need.
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CFLAGS", "CXXFLAGS", "LDFLAGS")}
    environment |= {"CC": shell("false"), "CXX": shell("false"), "PATH": f"{scripts}{os.pathsep}{work / 'none'}"}
    run([str(python), "-m", "pip", "install", "-q", *(["--no-deps"] if torch else []), str(file)], environment, work)
    compiled = file.suffix == ".whl" and "none-any" not in file.name
    kernels = "kernels" if compiled else "none"
    said = run([str(python), "-c", SMOKE, kernels, version_of_source()], environment, work)
    version = run([str(scripts / "better-attention"), "--version"], environment, work).strip()
    if version != f"better-attention {version_of_source()}":
        raise SystemExit(f"{file.name}: --version prints {version!r}.")
    shown = run([str(scripts / "better-attention"), "show", "super"], environment, work)
    if "super attention" not in shown:
        raise SystemExit(f"{file.name}: `show super` prints {shown!r}.")
    return f"installed without a compiler, {said.strip().splitlines()[-1]}; all mechanisms agree with the reference"


def reproduced(files: Sequence[Path], work: Path) -> None:
    """The same bytes a second time, in another folder."""
    again = work / "again"
    built = [file for file in files if file.suffix in (".whl", ".gz")]
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(epoch())}
    run([sys.executable, "-m", "release.build", "--out", str(again)], environment, ROOT)
    other = [file.name for file in built if digest(again / file.name) != digest(file)]
    if other:
        raise SystemExit(f"built again, these have other bytes: {', '.join(other)}.")
    say("reproducible", f"{len(built)} files have the same SHA-256 a second time")


if __name__ == "__main__":
    main()
