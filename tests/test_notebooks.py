"""The notebooks run from top to bottom, and are committed with their outputs."""

import os
from pathlib import Path

import pytest
from helpers import ROOT

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def read(path: Path):
    return nbformat.read(path, as_version=4)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    """In an empty folder, on the CPU and without the network; the outputs are of the committed kinds."""
    pythonpath = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    for name, value in {
        "PYTHONPATH": pythonpath,
        "ACCELERATE_USE_CPU": "true",
        "HF_HUB_OFFLINE": "1",
        "OMP_WAIT_POLICY": "passive",  # threads that spin take six times as long on busy cores
    }.items():
        monkeypatch.setenv(name, value)
    notebook = read(path)
    committed = [[output.output_type for output in cell.get("outputs", [])] for cell in notebook.cells]
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    for cell, kinds in zip(notebook.cells, committed, strict=True):
        outputs = [o for o in cell.get("outputs", []) if o.get("name") != "stderr"]
        assert set(kinds) == {output.output_type for output in outputs}, cell.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_with_its_outputs(path):
    """Each in order, and the first cell says what to install."""
    notebook = read(path)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(cell.outputs for cell in cells)
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)
    assert "%pip install" in notebook.cells[0].source
    assert path.stat().st_size < 1_000_000


def test_there_are_two():
    assert [path.stem for path in NOTEBOOKS] == ["from_a_vit", "photographs"]
