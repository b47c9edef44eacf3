"""The compiled CPU kernels in JAX, forward and backward, through XLA's foreign function interface.

A small C++ file (``jax_ffi.cpp``) has to be compiled against the headers that jaxlib brings. That happens once, at the
first use or by ``python -m better_attention.keras.kernels``, with the C++ compiler ``$CXX`` or ``c++``, without a
network; the result is kept in the user's cache folder. The rest of ``better_attention.keras`` needs none of this.

>>> attention(x, x, x, score="expressive", causal=True)  # doctest: +SKIP

Shape suffixes: B batch, L queries, S keys, N heads, G heads of keys, H head width, W width of values.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from better_attention.errors import check_bool, check_choice, check_float, check_int

ABI = 4
"""Version of ``native/cpp/api.h``; a test compares it with the torch side's."""
SCORES = {"softmax": 0, "expressive": 1}
"""The scores that the kernels compute, by their numbers in api.h."""
SWITCH = "BETTER_ATTENTION_NATIVE"
DTYPES = ("float32", "bfloat16")
_HERE = Path(__file__).parent
_PATTERNS = ("*better_attention*.so", "*better_attention*.dylib")


class KernelsMissingError(RuntimeError):
    """The kernels cannot be used here; the message says why and what to do."""


def attention(
    query: Any,
    key: Any,
    value: Any,
    mask: Any | None = None,
    *,
    score: str = "softmax",
    causal: bool = False,
    scale: float | None = None,
    threads: int | None = None,
) -> Any:
    """Attention by the compiled CPU kernels; may be jitted, differentiated once (reverse mode), and mapped by vmap.

    Args:
        query: (B, L, N, H), float32 or bfloat16.
        key: (B, S, G, H), of the same dtype; N is a multiple of G.
        value: (B, S, G, W), likewise.
        mask: bool, True where a query sees a key, (B or 1, N or 1, L or 1, S or 1).
        score: "softmax" or "expressive".
        causal: query l sees keys s <= l; the mask applies as well.
        scale: factor on q.k; None: 1/sqrt(H).
        threads: how many threads compute; None: as many as this process may use, or $OMP_NUM_THREADS.

    Returns:
        (B, L, N, W). A query that sees no key has zeros.

    Raises:
        ValueError, TypeError: arguments that do not go together.
        KernelsMissingError: no kernels, no compiler, or no headers here.
    """
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    _check(query, key, value, mask)
    check_choice(score, "score", SCORES)
    settings = (
        SCORES[score],
        _threads() if threads is None else check_int(threads, "threads"),
        check_bool(causal, "causal"),
        mask is not None,
        1.0 / math.sqrt(query.shape[-1]) if scale is None else check_float(scale, "scale"),
    )
    _register()
    mask = jnp.ones((1, 1, 1, 1), bool) if mask is None else jnp.asarray(mask)
    return _attention(settings, query, key, value, mask)


Settings = tuple[int, int, bool, bool, float]


def _output(settings: Settings, q_BLNH: Any, k_BSGH: Any, v_BSGW: Any, mask: Any) -> Any:
    return _forward(settings, q_BLNH, k_BSGH, v_BSGW, mask)[0]


def _forward(settings: Settings, q_BLNH: Any, k_BSGH: Any, v_BSGW: Any, mask: Any) -> tuple[Any, Any]:
    """The output, and per row the normaliser and the shift of its exponent, which the derivative reads."""
    B, L, N, _ = q_BLNH.shape
    results = (
        jax.ShapeDtypeStruct((B, L, N, v_BSGW.shape[-1]), q_BLNH.dtype),
        jax.ShapeDtypeStruct((B, N, L, 2), jnp.float32),
    )
    out, stats = _call("ba_jax_forward", results, settings, q_BLNH, k_BSGH, v_BSGW, mask)
    return out, stats


def _save(settings: Settings, q_BLNH: Any, k_BSGH: Any, v_BSGW: Any, mask: Any) -> tuple[Any, Any]:
    out, stats = _forward(settings, q_BLNH, k_BSGH, v_BSGW, mask)
    return out, (q_BLNH, k_BSGH, v_BSGW, mask, out, stats)


def _derive(settings: Settings, saved: Any, grad_BLNW: Any) -> tuple[Any, Any, Any, None]:
    results = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in saved[:3])
    dq, dk, dv = _call("ba_jax_backward", results, settings, *saved, grad_BLNW)
    return dq, dk, dv, None


_attention: Any = jax.custom_vjp(_output, nondiff_argnums=(0,))
_attention.defvjp(_save, _derive)


def _call(name: str, results: Any, settings: Settings, *arrays: Any) -> Any:
    score, threads, causal, masked, scale = settings
    function = jax.ffi.ffi_call(name, results, vmap_method="sequential")
    return function(
        *arrays,
        score=np.int64(score),
        threads=np.int64(threads),
        isa=np.int64(0),  # the best that the processor has
        causal=np.bool_(causal),
        masked=np.bool_(masked),
        scale=np.float64(scale),
    )


def _check(q: Any, k: Any, v: Any, mask: Any | None) -> None:
    shapes = f"query {q.shape}, key {k.shape}, value {v.shape}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"query, key and value must be (batch, length, heads, width); received {shapes}.")
    if len({q.dtype, k.dtype, v.dtype}) > 1 or str(q.dtype) not in DTYPES:
        raise TypeError(
            f"query, key and value must all be float32, or all bfloat16; received {q.dtype}, {k.dtype} and {v.dtype}."
        )
    fits = q.shape[0] == k.shape[0] == v.shape[0] and k.shape[1:3] == v.shape[1:3] and q.shape[3] == k.shape[3]
    if not fits or 0 in (*q.shape, *k.shape, *v.shape) or q.shape[2] % k.shape[2]:
        raise ValueError(
            "query (B, L, N, H), key (B, S, G, H) and value (B, S, G, W) must agree in B, S, G and H, be nowhere "
            f"empty, and N must be a multiple of G; received {shapes}."
        )
    if mask is None:
        return
    whole = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    given = tuple(getattr(mask, "shape", ()))
    if len(given) != 4 or any(a not in (1, b) for a, b in zip(given, whole, strict=True)):
        raise ValueError(
            f"mask must be broadcastable to (B, N, L, S) = {whole} and have 4 dimensions; received {given}."
        )
    if str(getattr(mask, "dtype", None)) != "bool":
        raise TypeError(f"mask must be bool, True where a query sees a key; received {getattr(mask, 'dtype', mask)!r}.")


def _threads() -> int:
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdecimal() and int(given) > 0:
        return int(given)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- finding, building, registering -----------------------------------------------------------------------------------


def missing() -> str | None:
    """Why the kernels cannot be used here, or None if they can. Builds the C++ file if that has not happened yet."""
    try:
        _register()
    except KernelsMissingError as error:
        return str(error)
    return None


@cache
def _register() -> None:
    if os.environ.get(SWITCH, "1").lower() in ("0", "off", "false", "no"):
        raise KernelsMissingError(f"the compiled kernels are switched off by {SWITCH}={os.environ[SWITCH]}.")
    if jax.default_backend() != "cpu":
        raise KernelsMissingError(
            f"the compiled kernels are for CPUs, and JAX computes on {jax.default_backend()!r} here: use keras.ops, "
            "the default, or set JAX_PLATFORMS=cpu."
        )
    kernels, wrapper = ctypes.CDLL(str(_kernels_file())), ctypes.CDLL(str(build()))
    for library, function in ((kernels, "ba_abi"), (wrapper, "ba_jax_abi")):
        interface = getattr(library, function)
        interface.restype = ctypes.c_int64
        if interface() != ABI:
            raise KernelsMissingError(
                f"the compiled kernels have interface {interface()}, this version needs {ABI}: install "
                "better-attention again, with a C++ compiler there."
            )
    wrapper.ba_jax_use(
        *(ctypes.cast(getattr(kernels, name), ctypes.c_void_p) for name in ("ba_forward", "ba_backward"))
    )
    for name in ("ba_jax_forward", "ba_jax_backward"):
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(wrapper, name)), platform="cpu")


def _package() -> list[Path]:
    """The package's folders: an editable installation has a second one for what was compiled."""
    return [Path(folder) for folder in sys.modules[__name__.partition(".")[0]].__path__]


def _kernels_file() -> Path:
    folders = [folder / "native" for folder in _package()]
    for folder in folders:
        for pattern in _PATTERNS:
            for file in sorted(folder.glob(pattern)):
                return file
    raise KernelsMissingError(
        "no compiled kernels were installed with better-attention (no C++ compiler at installation?): install it again "
        "with a C++ compiler there."
    )


def build() -> Path:
    """The compiled ``jax_ffi.cpp``, compiled now unless that was done for this jaxlib before.

    Raises:
        KernelsMissingError: no compiler or no headers, or the compiler's own message.
    """
    source, headers, interface = _HERE / "jax_ffi.cpp", Path(jax.ffi.include_dir()), _interface()
    if not (headers / "xla" / "ffi" / "api" / "ffi.h").is_file():
        raise KernelsMissingError(f"jaxlib's headers are not in {headers}: install another jaxlib, 0.7 or newer.")
    digest = hashlib.sha256(source.read_bytes() + (interface / "api.h").read_bytes())
    digest.update(version("jaxlib").encode())
    file = _cache() / f"jax_ffi_{digest.hexdigest()[:16]}.so"
    if not file.is_file():
        _compile([str(source), "-I", str(headers), "-I", str(interface)], file)
    return file


def _interface() -> Path:
    for folder in _package():
        if (folder / "native" / "cpp" / "api.h").is_file():
            return folder / "native" / "cpp"
    raise KernelsMissingError("the sources of the kernels, native/cpp/api.h, were not installed with better-attention.")


def _cache() -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "better-attention" / "jax"


def _compile(arguments: list[str], file: Path) -> None:
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        raise KernelsMissingError(
            f"there is no C++ compiler {compiler[0]!r} to build the kernels for JAX with: install one, or name it in "
            "the environment variable CXX."
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    # Another process may build the same file: each writes its own, and the last renames over the others.
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        output = Path(folder) / file.name
        command = [*compiler, "-std=c++17", "-O1", "-fPIC", "-shared", *arguments, "-o", str(output)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise KernelsMissingError(f"the kernels for JAX could not be built:\n{shlex.join(command)}\n{done.stderr}")
        output.replace(file)
