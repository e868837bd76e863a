"""docs/symmetric-loss.md, its figures and its notebook: are they right, can they be made again?"""

import csv
import gzip
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

import sa2c_continuous
import sppo_continuous

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGE = (DOCS / "symmetric-loss.md").read_text()
NOTEBOOK = DOCS / "symmetric_loss.ipynb"
EXERCISE = DOCS / "symmetric_loss_exercise.ipynb"


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


def test_the_worked_example_is_right():
    """Each number of its table, with the reverse loss as the paper has it."""
    header = r"\| \$A\$ \| \$L\$ .*\n\|[-|]+\n((?:\|.*\n)+)"
    rows = re.search(header, PAGE).group(1).splitlines()
    assert len(rows) == 2
    for row, advantage in zip(rows, (1.0, -1.0)):
        p_old = torch.tensor(0.3, dtype=torch.float64)
        p = (1.1 * p_old).requires_grad_()
        scripts = sppo_continuous.symmetric_policy_losses(p.log(), p_old.log(), advantage, 0.2, -1)
        papers = scripts[0], advantage * (1 - p) / p_old
        slopes = [torch.autograd.grad(x, p, retain_graph=True)[0] for x in (*scripts, *papers)]
        torch.testing.assert_close(slopes[:2], slopes[2:])
        values = [advantage, *papers, *slopes[:2], 0.5 * slopes[0] + 20 * slopes[1]]
        expected = [f"{torch.as_tensor(value).item():.2f}" for value in values]
        assert [f"{float(cell):.2f}" for cell in row.strip("|").split("|")] == expected


def test_the_reverse_a2c_loss_lowers_the_best_actions_logit():
    """In the page's example, whose probabilities and pays it names in one sentence."""
    (numbers,) = re.findall(r"with probabilities ([\d., ]+) pay ([\d., ]+), it", PAGE)
    prob, pays = (torch.tensor([float(x) for x in text.split(",")]) for text in numbers)
    advantage = pays - prob @ pays
    logits = prob.log().requires_grad_()
    gradients = 0
    for action in range(3):  # by its probability, hence the expectation
        losses = sa2c_continuous.symmetric_policy_losses(
            logits.log_softmax(-1)[action, None], advantage[action, None], -1.0
        )
        both = [torch.autograd.grad(-loss, logits, retain_graph=True)[0] for loss in losses]
        gradients = gradients + prob[action] * torch.stack(both)
    assert gradients[0, 2] > 0  # A2C raises it
    assert gradients[1, 2] < -0.001


def test_the_shares_over_training_are_those_of_the_packed_runs():
    """Of clipped updates and of changed signs: means over seeds and time, for each method on each
    task, with each kind of rewards."""
    quoted = {
        "losses/clipped_gradients": r"(\d+) to (\d+) % of updates",
        "losses/advantage_sign_flips": r"in our million-step runs of (\d+) to (\d+) %",
    }
    cells = {name: {} for name in quoted}
    with gzip.open(ROOT / "results/evidence/progress.csv.gz", "rt", newline="") as file:
        for row in csv.DictReader(file):
            cell = row["run_name"].rsplit("__", 1)[0]
            for name in quoted:
                cells[name].setdefault(cell, []).append(100 * float(row[name]))
    for name, pattern in quoted.items():
        low, high = re.search(pattern, " ".join(PAGE.split())).groups()
        means = [np.mean(values) for values in cells[name].values()]
        assert len(means) == 36
        assert (f"{min(means):.0f}", f"{max(means):.0f}") == (low, high)


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
    readme = (ROOT / "README.md").read_text()
    assert made == set(re.findall(r"\]\((?:docs/)?figures/([^)]+)\)", PAGE + readme))
    for name in made:
        new = plt.imread(tmp_path / name)
        committed = plt.imread(DOCS / "figures" / name)
        # Another machine may round a line to the pixel beside
        assert np.abs(new - committed).mean() < 0.001, name


def test_a_method_has_the_same_colour_everywhere(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    figures = importlib.import_module("figures")
    report = importlib.import_module("report")
    colors = {}
    for path in (NOTEBOOK, EXERCISE):
        source = "".join(cell.source for cell in nbformat.read(path, as_version=4).cells)
        lines = re.findall(r"(?m)^colors (?:=|\|=) .+$", source)
        exec("\n".join(lines), {}, colors)
        for method, color in (colors["colors"] | figures.COLORS).items():
            assert report.COLORS.get(method.lower(), color) == color


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


# ---- The student's copy


def true_objective(prob, advantage):
    return (advantage * prob.square()).sum() / 2


def bandit_for_sa2c():
    """Few steps from a policy that prefers the best arm, many flips."""
    best = torch.tensor([0.0, 0.0, 1.0])
    settings = {"pays": best, "start": 2 * best, "flip_rate": 0.4, "batch_size": 2, "steps": 20}
    return settings | {"beta": 5.0}


RIGHT = {
    "a2c_losses": sa2c_continuous.symmetric_policy_losses,
    "ppo_losses": sppo_continuous.symmetric_policy_losses,
    "climbs": true_objective,
    "bandit": bandit_for_sa2c,
}


def grade(**answers):
    """Runs all cells of the student's copy but the heavy ones, with a student's `answers`."""
    namespace = {}
    written = set()
    plt.switch_backend("agg")
    for cell in nbformat.read(EXERCISE, as_version=4).cells:
        tags = cell.metadata.get("tags", [])
        if cell.cell_type != "code" or "heavy" in tags:
            continue
        exec(cell.source, namespace)
        if "student" in tags:
            for name in answers.keys() & (namespace.keys() - written):
                stub = inspect.signature(namespace[name])
                assert list(stub.parameters) == list(inspect.signature(answers[name]).parameters)
                namespace[name] = answers[name]
                written.add(name)
    plt.close("all")
    assert written == set(RIGHT)


def test_the_grader_passes_the_scripts_losses():
    grade(**RIGHT)


@pytest.mark.parametrize("name", RIGHT)
def test_the_grader_asks_for_each_function(name):
    with pytest.raises(NotImplementedError):
        grade(**{other: RIGHT[other] for other in RIGHT if other != name})


def wrong_sign(log_prob, advantage, z):
    policy_loss, reverse_loss = RIGHT["a2c_losses"](log_prob, advantage, z)
    return policy_loss, -reverse_loss


def plain_probability(log_prob, advantage, z):
    """p instead of 1 - p."""
    return -(advantage * log_prob).mean(), -(advantage * z * log_prob.exp()).mean()


def z_is_forgotten(log_prob, advantage, z):
    return RIGHT["a2c_losses"](log_prob, advantage, -1.0)


def no_mask(log_prob, old_log_prob, advantage, clip_coef, z):
    policy_loss, _ = RIGHT["ppo_losses"](log_prob, old_log_prob, advantage, clip_coef, z)
    return policy_loss, z * (advantage * (log_prob - old_log_prob).exp()).mean()


def symmetric_mask(log_prob, old_log_prob, advantage, clip_coef, z):
    """Masks wherever r is outside the clip range."""
    policy_loss, _ = RIGHT["ppo_losses"](log_prob, old_log_prob, advantage, clip_coef, z)
    ratio = (log_prob - old_log_prob).exp()
    inside = (ratio - 1).abs() <= clip_coef
    return policy_loss, z * (inside * advantage * ratio).mean()


def not_divided(log_prob, old_log_prob, advantage, clip_coef, z):
    policy_loss, _ = RIGHT["ppo_losses"](log_prob, old_log_prob, advantage, clip_coef, z)
    ratio = (log_prob - old_log_prob).exp()
    mask = advantage * ratio <= advantage * ratio.clamp(1 - clip_coef, 1 + clip_coef)
    return policy_loss, -(mask * advantage * z * (1 - log_prob.exp())).mean()


def no_clipping(log_prob, old_log_prob, advantage, clip_coef, z):
    return RIGHT["ppo_losses"](log_prob, old_log_prob, advantage, 1e9, z)


def expected_advantage(prob, advantage):
    return prob @ advantage


def bandit_of_section_5():
    settings = {"pays": torch.linspace(0, 1, 10), "start": torch.zeros(10), "flip_rate": 0.2}
    return settings | {"batch_size": 8, "steps": 20, "beta": 5.0}


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("a2c_losses", wrong_sign),
        ("a2c_losses", plain_probability),
        ("a2c_losses", z_is_forgotten),
        ("ppo_losses", no_mask),
        ("ppo_losses", symmetric_mask),
        ("ppo_losses", not_divided),
        ("ppo_losses", no_clipping),
        ("climbs", expected_advantage),
        ("bandit", bandit_of_section_5),
    ],
)
def test_the_grader_fails_a_wrong_answer(name, wrong):
    with pytest.raises(AssertionError):
        grade(**RIGHT | {name: wrong})


def test_the_students_copy_is_empty():
    """No outputs, and no answers below the questions."""
    for cell in nbformat.read(EXERCISE, as_version=4).cells:
        assert "<details>" not in cell.source
        if cell.cell_type == "code":
            assert not cell.outputs
            assert cell.execution_count is None
