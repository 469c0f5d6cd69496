"""Every notebook runs from its first cell to its last, in a fresh process and folder; what it stores is small and clean."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.patience import PATIENCE

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
IDS = [notebook.stem for notebook in NOTEBOOKS]
STORED = 20 * 1024  # bytes of outputs in one notebook, pictures included


def code_cells(notebook: Path) -> list:
    cells = [cell for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]
    assert cells
    return cells


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=IDS)
def test_a_notebook_runs(notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / ".ipython"))
    run = nbformat.read(notebook, as_version=4)
    # Raises at the first cell that fails, with its traceback.
    NotebookClient(
        run, timeout=int(PATIENCE), kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=IDS)
def test_what_a_notebook_stores_is_small_and_clean(notebook):
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert len(json.dumps(outputs)) <= STORED
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"], "warnings name one machine's folders"
    counts = [cell.execution_count for cell in code_cells(notebook)]
    if outputs:
        assert counts == list(range(1, len(counts) + 1)), "outputs of one run, from the first cell to the last"
