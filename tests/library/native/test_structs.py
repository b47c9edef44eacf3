"""``native/structs.py`` against ``cpp/api.h``, as a C compiler reads it: numbers, sizes, offsets and functions."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from better_attention.native import library, structs

API = Path(structs.__file__).parent / "cpp" / "api.h"
STRUCTURES = {
    "ba_call": structs.Call,
    "ba_align": structs.Align,
    "ba_layer": structs.Layer,
    "ba_step": structs.Step,
    "ba_drop": structs.Drop,
}
C_TYPES = {"int64_t": ctypes.c_int64, "double": ctypes.c_double, "ba_call": structs.Call}
CONSTANTS = {
    "BA_ABI": structs.ABI,
    "BA_F32": structs.ELEMENT_TYPES[torch.float32],
    "BA_BF16": structs.ELEMENT_TYPES[torch.bfloat16],
    "BA_BOOL": structs.ELEMENT_TYPES[torch.bool],
    "BA_NONE": structs.NO_MASK,
    **{f"BA_{name.upper()}": number for name, number in structs.SCORES.items()},
    "BA_OK": structs.OK,
    "BA_NO_MEMORY": structs.NO_MEMORY,
    "BA_NO_SUCH_ISA": structs.NO_SUCH_ISA,
    "BA_NO_SUCH_SCORE": structs.NO_SUCH_SCORE,
    "BA_FEW": structs.FEW,
    "BA_DECODES_ONLY": structs.DECODES_ONLY,
    "BA_BEST": structs.BEST_ISA,
    **{f"BA_{name.upper()}": number for name, number in structs.ISAS.items()},
}


def source() -> str:
    """``api.h`` without comments."""
    return re.sub(r"/\*.*?\*/", "", API.read_text("utf-8"), flags=re.DOTALL)


def declared_fields(structure: str) -> list[tuple[str, type]]:
    """Names and types of a structure's fields, in their order."""
    (body,) = re.findall(rf"typedef struct \{{([^}}]*)\}} {structure};", source())
    fields: list[tuple[str, type]] = []
    for declaration in filter(None, (part.strip() for part in body.split(";"))):
        kind, _, names = declaration.removeprefix("const ").partition(" ")
        for name in names.split(","):
            pointer = "*" in name
            fields.append((name.strip(" *"), ctypes.c_void_p if pointer else C_TYPES[kind]))
    return fields


@pytest.mark.parametrize("name", STRUCTURES)
def test_fields_have_the_names_types_and_order_of_the_header(name: str) -> None:
    assert [(field[0], field[1]) for field in STRUCTURES[name]._fields_] == declared_fields(name)


def test_every_function_is_declared_with_its_structure() -> None:
    questions = dict.fromkeys(re.findall(r"BA_EXPORT int64_t (ba_\w+)\(void\);", source()))
    kernels = {f"ba_{name}": STRUCTURES[c] for name, c in re.findall(r"\bF\((\w+), (ba_\w+)\)", source())}
    assert {**questions, **kernels} == structs.FUNCTIONS


def test_every_number_of_the_header_is_known() -> None:
    declared = {name for body in re.findall(r"enum \{([^}]*)\}", source()) for name in re.findall(r"BA_\w+", body)}
    assert declared == set(CONSTANTS)


def test_a_score_without_kernels_is_refused_at_the_interface() -> None:
    """Python refuses it first; a kernel would compute one of its own scores instead."""
    if library.missing() is not None:
        pytest.skip(f"there are no compiled kernels here: {library.missing()}")
    unknown = max(structs.SCORES.values()) + 1
    step = structs.Step(attention=structs.Call(score=unknown))
    for name, call in (
        ("ba_forward", structs.Call(score=unknown)),
        ("ba_layer_forward", structs.Layer(score=unknown)),
        ("ba_layer_step", step),
    ):
        with pytest.raises(RuntimeError, match=rf"{name} returned {structs.NO_SUCH_SCORE}"):
            library.call(name, call)


def test_a_compiler_gives_the_same_sizes_offsets_and_numbers(tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler is installed here: apt-get install gcc")
    expressions = {f"sizeof({name})": ctypes.sizeof(structure) for name, structure in STRUCTURES.items()}
    for name, structure in STRUCTURES.items():
        for field, *_ in structure._fields_:
            expressions[f"offsetof({name}, {field})"] = getattr(structure, field).offset
    expressions |= CONSTANTS
    prints = "\n".join(f'    printf("%lld\\n", (long long)({expression}));' for expression in expressions)
    (tmp_path / "layout.c").write_text(
        f'#include <stddef.h>\n#include <stdio.h>\n#include "api.h"\nint main(void) {{\n{prints}\n    return 0;\n}}\n'
    )
    program = tmp_path / "layout"
    subprocess.run([compiler, "-I", API.parent, tmp_path / "layout.c", "-o", program], check=True, timeout=120)
    printed = subprocess.run([program], check=True, capture_output=True, text=True, timeout=60).stdout.split()
    assert dict(zip(expressions, map(int, printed), strict=True)) == expressions
