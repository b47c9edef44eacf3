"""Names of runs: built and parsed in one place."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from better_attention import MECHANISMS
from better_attention.lab.runs.name import RunName

MECHANISM_NAMES = [*MECHANISMS, *(f"{name}+expressive" for name in MECHANISMS), "super+per-head+identity"]


@given(st.sampled_from(MECHANISM_NAMES), st.integers(0, 999), st.integers(0, 999))
def test_a_name_is_parsed_back(mechanism: str, heads: int, seed: int) -> None:
    name = RunName(mechanism, heads, seed)
    assert RunName.of(str(name)) == name
    assert RunName.names_a_folder(name.folder)
    assert RunName.of_record({"mechanism": mechanism, "heads": heads, "seed": seed}) == name


@pytest.mark.parametrize(
    "name", ["", "keep", "super-h4", "super-h4-sx", "../super-h4-s0", "a b-h1-s1", "super+x-h1-s1"]
)
def test_other_folders_are_not_runs(name: str) -> None:
    assert not RunName.names_a_folder(name)


@pytest.mark.parametrize("mechanism", ["x" * 64, "../x", "a b", "\n"])
def test_a_name_that_no_folder_should_have_is_refused(mechanism: str) -> None:
    with pytest.raises(ValueError, match="at most 64 letters, digits, dots, dashes and underscores are allowed"):
        _ = RunName(mechanism, 1, 0).folder
