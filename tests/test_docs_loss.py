"""docs/symmetric-loss.md, its figures and its notebook: are they right, can they be made again?"""

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGE = (DOCS / "symmetric-loss.md").read_text()
NOTEBOOK = DOCS / "symmetric_loss.ipynb"


def test_quoted_code_is_in_the_function_that_it_is_from():
    quotes = re.findall(r"(?ms)^```python\n# (\w+)\.py:(\w+)\n(.+?)^```$", PAGE)
    assert len(quotes) == 4
    for script, function, lines in quotes:
        source = inspect.getsource(getattr(importlib.import_module(script), function))
        assert lines in source, lines


def test_python_blocks_run():
    (block,) = re.findall(r"(?ms)^```python\n(import.+?)^```$", PAGE)
    assert "assert_close" in block
    exec(block, {})


@pytest.mark.parametrize(
    ("method", "scale", "slope"),  # of the weight: scale + slope times p, where it is not clipped
    [
        ("A2C", 1.0, 0.0),
        ("SA2C", 0.5, 1.0),
        ("PPO", 1.0, 0.0),
        ("SPPO", 1.5, 0.0),
        ("SPPO without / p_old (ours)", 0.5, 0.4),
    ],
)
def test_the_figures_weights_are_the_closed_forms(method, scale, slope, monkeypatch):
    """At p = 0.44 and p_old = 0.4; below and above the clip range where PPO clips."""
    monkeypatch.syspath_prepend(DOCS)
    figures = importlib.import_module("figures")
    p = torch.tensor([0.2, 0.44, 0.8], dtype=torch.float64)
    p_old = torch.full_like(p, 0.4)
    for advantage, clipped in ((2.0, 2), (-2.0, 0)):
        _, weight = figures.loss_and_weight(method, p, p_old, advantage)
        if method.endswith("A2C"):
            expected = scale + slope * p
        else:
            expected = (scale + slope) * p / p_old
            expected[clipped] = 0
        torch.testing.assert_close(weight, expected)


def test_one_command_makes_all_figures_again(tmp_path):
    command = [sys.executable, "docs/figures.py", "--out", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    made = {path.name for path in tmp_path.iterdir()}
    assert made == {path.name for path in (DOCS / "figures").iterdir()}
    assert made == set(re.findall(r"\]\(figures/([^)]+)\)", PAGE))
    for name in made:
        new = plt.imread(tmp_path / name)
        committed = plt.imread(DOCS / "figures" / name)
        # Another machine may round a line to the pixel beside
        assert np.abs(new - committed).mean() < 0.001, name


def images(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    kinds = {output.get("name", output.output_type) for output in outputs}
    assert kinds == {"stdout", "display_data"}  # neither errors nor warnings
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_the_notebook_is_committed_as_executed():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert images(notebook) == 6
    assert not re.search(r"/(tmp|home|root|work|usr)/", NOTEBOOK.read_text())


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    """Its cells hold the assertions."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=600, resources=where).execute()  # raises if a cell fails
    assert images(notebook) == 6
