"""Every notebook runs from top to bottom on a fresh clone, is committed with its plots, and holds no logic."""

import ast
import os
import re

import nbformat
import pytest
from experiments import ROOT
from nbclient import NotebookClient

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LOGIC = (ast.FunctionDef, ast.ClassDef, ast.Lambda, ast.While, ast.If, ast.Try, ast.BinOp)


def cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def pictures(notebook) -> int:
    return sum("image/svg+xml" in output.get("data", {}) for cell in cells(notebook) for output in cell.outputs)


def test_there_are_four():
    assert [re.sub(r"\d_", "", path.stem) for path in NOTEBOOKS] == [
        "reading_logs", "fitting_a_law", "comparing_objectives", "planning_a_run"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    committed = nbformat.read(path, 4)
    fresh = nbformat.read(path, 4)
    for cell in cells(fresh):
        cell.outputs = []
    NotebookClient(fresh, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}},
                   ).execute()  # raises what a cell raises
    assert pictures(fresh) == pictures(committed) > 0 and path.stat().st_size < 200_000
    assert all(cell.execution_count for cell in cells(committed))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_hold_no_logic(path):
    for cell in cells(nbformat.read(path, 4)):
        tree = ast.parse(cell.source)
        found = [type(node).__name__ for node in ast.walk(tree) if isinstance(node, LOGIC)
                 and not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult))]
        assert not found and len(cell.source.splitlines()) <= 10, cell.source
