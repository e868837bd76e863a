"""docs/symmetric-loss.md, its figures and its notebook: are they right, can they be made again?"""

import importlib
import inspect
import io
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from helpers import sha256
from nbclient import NotebookClient
from PIL import Image

import sa2c_continuous
import sppo_continuous

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGE = (DOCS / "symmetric-loss.md").read_text()
TEACHING = (DOCS / "teaching.md").read_text()
NOTEBOOK = DOCS / "symmetric_loss.ipynb"
EXERCISE = DOCS / "symmetric_loss_exercise.ipynb"


def test_quoted_code_is_in_the_function_or_script_that_it_is_from():
    """The README's two lines are apart in theirs."""
    text = PAGE + (ROOT / "README.md").read_text()
    quotes = re.findall(r"(?ms)^```python\n# (\w+)\.py:?(\w*)\n(.+?)^```$", text)
    assert len(quotes) == 4
    for script, function, lines in quotes:
        source = inspect.getsource(importlib.import_module(script))
        if function:
            source = inspect.getsource(getattr(importlib.import_module(script), function))
        for part in [lines] if function else lines.splitlines(keepends=True):
            assert f"\n{part}" in source, part


@pytest.fixture
def figures(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    return importlib.import_module("figures")


def test_one_command_makes_all_figures_again(tmp_path, monkeypatch, figures):
    """With the same lines and texts."""
    monkeypatch.setattr(sys, "argv", ["figures.py", "--out", str(tmp_path)])
    with plt.rc_context():
        figures.main()
    made = {path.name for path in tmp_path.iterdir()}
    assert made == {path.name for path in (DOCS / "figures").iterdir()} - {"agents.gif"}
    assert made - {"same-run.png"} == set(re.findall(r"\]\(figures/([^)]+)\)", PAGE + TEACHING))
    same_run = "same-run.png"  # the notebook's
    assert sha256(tmp_path / same_run) == sha256(DOCS / "figures" / same_run)
    for name in made - {same_run, "slope.pdf"}:
        new = json.loads(Image.open(tmp_path / name).text["Description"])
        committed = json.loads(Image.open(DOCS / "figures" / name).text["Description"])
        for panel, committed_panel in zip(new, committed, strict=True):
            assert panel["texts"] == committed_panel["texts"]
            for line, committed_line in zip(panel["lines"], committed_panel["lines"], strict=True):
                np.testing.assert_allclose(line, committed_line, atol=1e-3)


LOSS_PAGE = DOCS / "loss.html"
in_a_browser = pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
MOVE_SLIDERS = """<script>
const shown = STATES.map((state) => {
  for (const [id, value] of Object.entries(state)) {
    element(id)[id === "mask" ? "checked" : "value"] = value;
    element(id).dispatchEvent(new Event("input", { bubbles: true }));
  }
  const cells = [...document.querySelectorAll("td[id]")].map((cell) => [cell.id, cell.textContent]);
  element("mask").dispatchEvent(new Event("change", { bubbles: true }));
  return { hash: location.hash, ...Object.fromEntries(cells) };
});
document.body.innerHTML = `<pre>${JSON.stringify(shown)}</pre>`;
</script>"""


def in_chromium(address, folder):
    """The page, as text, after its scripts have run."""
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", address]
    command.append(f"--user-data-dir={folder}/profile")
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def losses_and_slopes(state):
    """What the page has to show, by the script's function and automatic differentiation."""
    p = torch.tensor(state["p"], dtype=torch.float64, requires_grad=True)
    p_old = torch.tensor(state["p_old"], dtype=torch.float64)
    inputs = (p.log(), p_old.log(), state["A"])
    loss, reverse_loss = sppo_continuous.symmetric_policy_losses(*inputs, 0.2, -1)
    if not state["mask"]:  # a wide range clips nothing
        _, reverse_loss = sppo_continuous.symmetric_policy_losses(*inputs, 1e9, -1)
    both = state["alpha"] * loss + state["beta"] * reverse_loss
    found = {}
    for name, value in {"L": loss, "Lr": reverse_loss, "S": both}.items():
        found[name] = value.item()
        found[f"d{name}"] = torch.autograd.grad(value, p, retain_graph=True)[0].item()
    return found


@in_a_browser
def test_the_page_shows_the_scripts_losses_and_slopes_as_sliders_move(tmp_path):
    rng = np.random.default_rng(0)
    states = []
    while len(states) < 100:
        state = {"A": rng.integers(-30, 31) / 10, "mask": bool(rng.integers(2))}
        state |= {"p": rng.integers(1, 100) / 100, "p_old": rng.integers(5, 96) / 100}
        state |= {"alpha": rng.integers(0, 21) / 10, "beta": rng.integers(0, 201) / 10}
        ratio = state["p"] / state["p_old"]
        if min(abs(ratio - 0.8), abs(ratio - 1.2)) > 1e-6:  # at an edge, rounding decides
            states.append(state)
    page = tmp_path / "loss.html"
    script = MOVE_SLIDERS.replace("STATES", json.dumps(states))
    page.write_text(LOSS_PAGE.read_text().replace("</body>", f"{script}</body>"))
    printed = in_chromium(page.as_uri(), tmp_path)
    shown = json.loads(re.search("<pre>(.+)</pre>", printed)[1].replace("&amp;", "&"))
    clipped = 0
    for state, cells in zip(states, shown, strict=True):
        expected = losses_and_slopes(state)
        for name, value in expected.items():
            assert float(cells[name]) == pytest.approx(value, abs=0.00501), (state, name)
        assert float(cells["k"]) == pytest.approx(state["alpha"] + state["beta"], abs=0.00501)
        assert cells["quotient"] == ("none" if expected["dL"] == 0 else cells["k"])
        clipped += expected["dL"] == 0 != expected["dS"]
        address = dict(pair.split("=") for pair in cells["hash"][1:].split("&"))
        assert (address.pop("mask") == "on") == state["mask"]
        assert all(float(value) == state[name] for name, value in address.items())
    assert clipped > 10  # without the mask PPO has no slope, but SPPO has


@in_a_browser
def test_a_link_opens_the_page_in_a_state(tmp_path):
    state = {"A": -1.5, "p": 0.1, "p_old": 0.4, "alpha": 0.7, "beta": 3.0, "mask": False}
    link = "#A=-1.5&p=0.1&p_old=0.4&alpha=0.7&beta=3&mask=off"
    printed = in_chromium(LOSS_PAGE.as_uri() + link, tmp_path)
    shown = dict(re.findall(r'<td id="(\w+)">([^<]+)<', printed))
    for name, value in losses_and_slopes(state).items():
        assert float(shown[name]) == pytest.approx(value, abs=0.00501)


def code_cells(path):
    cells = nbformat.read(path, as_version=4).cells
    return [cell for cell in cells if cell.cell_type == "code"]


def test_the_notebook_is_committed_as_executed_and_what_students_get_without_answers():
    cells = code_cells(NOTEBOOK)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    kinds = {output.get("name", output.output_type) for output in outputs}
    assert kinds == {"stdout", "display_data"}  # neither errors nor warnings
    assert not re.search(r"/(tmp|home|root|work|usr)/", NOTEBOOK.read_text())

    assert not any(cell.outputs or cell.execution_count for cell in code_cells(EXERCISE))
    handout = (DOCS / "handout.md").read_text()
    for answer in (r"\alpha+\beta", r"Z\,(1-p)", r"\pi(b)^2", "linear in $A$", "times PPO's"):
        assert answer in PAGE
        assert answer not in handout
    exercise = EXERCISE.read_text()
    assert "[the handout](handout.md)" in exercise
    assert "20.5" not in exercise


@pytest.mark.slow
def test_the_notebook_runs():
    """Its cells hold the assertions, and `execute` raises if a cell fails."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(DOCS)}}).execute()


def test_the_notebooks_first_cell_finds_or_clones_the_scripts_or_says_what_to_do(tmp_path):
    """With a pip that only prints. The last line printed is where the scripts then are."""
    cell, same = (code_cells(path)[0].source for path in (NOTEBOOK, EXERCISE))
    assert cell == same
    cell += "\nfrom importlib.util import find_spec\nprint(find_spec('sppo_continuous').origin)"
    (tmp_path / "pip.py").write_text("import sys; print(*sys.argv[1:])")
    clone = tmp_path / "symmetric-loss"
    empty = tmp_path / "empty"
    (clone / "docs").mkdir(parents=True)
    empty.mkdir()
    (clone / "sppo_continuous.py").touch()
    for command in ("init -q", "add .", "-c user.name=a -c user.email=a@b commit -qm all"):
        subprocess.run(["git", *command.split()], cwd=clone, check=True)

    def start(folder, address=""):
        source = cell.replace('REPOSITORY = ""', f"REPOSITORY = {address!r}")
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        command = [sys.executable, "-c", source]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        return done.stdout.splitlines() or done.stderr

    assert "install that beside it, or put the repository's address into" in start(empty)
    for folder in (clone / "docs", clone, tmp_path):
        assert start(folder) == [f"{clone}/sppo_continuous.py"]
    fetched = empty / "symmetric-rl-loss"
    where = f"{fetched}/sppo_continuous.py"
    assert start(empty, clone.as_uri()) == [f"install --quiet {fetched}[report]", where]
    assert start(empty) == [where]  # a second time nothing is fetched


# A bandit of few steps, from a policy that prefers the best arm, with many flips
START = torch.tensor([0.0, 0.0, 2.0])
BANDIT = dict(pays=START / 2, start=START, flip_rate=0.4, batch_size=2, steps=20, beta=5.0)
RIGHT = {
    "a2c_losses": sa2c_continuous.symmetric_policy_losses,
    "a2c_weight": lambda p, alpha, beta, z: (alpha + beta * abs(z) * p).numpy(),
    "ppo_losses": sppo_continuous.symmetric_policy_losses,
    "ppo_weight": lambda p, p_old, alpha, beta, z: ((alpha + beta * abs(z)) * p / p_old).tolist(),
    "unmasked_weight": lambda p, p_old, alpha, beta, z: beta * abs(z) * p / p_old,
    "varies": "SA2C / A2C",
    "k": 20.5,
    "same_without_clipping": True,
    "same_if_all_are_clipped": True,
    "climbs": lambda prob, advantage: (advantage * prob.square()).sum() / 2,
    "climbs_divided": torch.dot,
    "flip_factors": lambda e: (1 - 2 * e, 1 - 2 * e),
    "largest_signal": "reverse loss alone",
    "negative_push": True,
    "bandit": lambda: BANDIT,
}


def run_exercise(*kinds, steps=8192, **answers):
    """Claims that do not hold, and what is printed, with these `answers`. Cells with a tag heavy,
    open (task) or plot run only if `kinds` has it; runs have `steps`, in a class 8192."""
    namespace = {}
    printed = io.StringIO()
    plt.switch_backend("agg")
    for cell in code_cells(EXERCISE):
        tags = cell.metadata.get("tags", [])
        if {"heavy", "open", "plot"}.intersection(tags).issubset(kinds):
            with redirect_stdout(printed):
                exec(cell.source.replace("8192", str(steps)), namespace)
        if "student" in tags:
            namespace.update(answers)
    plt.close("all")
    results = namespace["results"].items()
    wrong = [f"{result}: {claim}" for claim, result in results if result != "holds"]
    return wrong, printed.getvalue()


def only_signs_and_no_mask(log_prob, old_log_prob, advantage, clip_coef, z):
    policy_loss, _ = RIGHT["ppo_losses"](log_prob, old_log_prob, advantage.sign(), clip_coef, z)
    return policy_loss, z * (advantage * (log_prob - old_log_prob).exp()).mean()


def mean_of_unclipped(log_prob, old_log_prob, advantage, *others):
    loss, reverse_loss = RIGHT["ppo_losses"](log_prob, old_log_prob, advantage, *others)
    ratio = (log_prob - old_log_prob).exp()
    unclipped = advantage * ratio <= advantage * ratio.clamp(0.8, 1.2)
    return loss, reverse_loss * len(ratio) / unclipped.sum().clamp(min=1)


def with_a_fixed_clip_range(log_prob, old_log_prob, advantage, clip_coef, z):
    return RIGHT["ppo_losses"](log_prob, old_log_prob, advantage, 0.2, z)


def detached(log_prob, *others):
    return RIGHT["a2c_losses"](log_prob.detach(), *others)


def to_do(*_):
    raise NotImplementedError


WIDE = "for r = 1.25, A = 1 and clip_coef = 0.4 expected -3.3333, found 0: 2a, L"
TO_DO = {"a2c_losses": to_do, "ppo_losses": to_do, "same_if_all_are_clipped": None}
FIRST_SLIPS = {
    "a2c_losses": detached,
    "ppo_losses": only_signs_and_no_mask,
    "k": 20.0,
    "climbs": torch.dot,
    "bandit": lambda: BANDIT | {"beta": 0.01},
}
SLIPS = {
    "a2c_weight": lambda p, *_: p,
    "ppo_losses": mean_of_unclipped,
    "same_without_clipping": False,
    "climbs_divided": RIGHT["climbs"],
    "flip_factors": lambda e: (1 - 2 * e, 1.0),
}
LAST_SLIPS = {
    "ppo_losses": with_a_fixed_clip_range,
    "ppo_weight": RIGHT["unmasked_weight"],
    "unmasked_weight": RIGHT["ppo_weight"],
}


@pytest.mark.parametrize(
    ("answers", "wrong"),
    [
        ({}, []),
        (
            TO_DO,
            [
                "to do: 1a, L:",
                "to do: 1a, Lr:",
                "to do: 2a, L:",
                "to do: 2a, Lr:",
                "to do: 2a, L and Lr:",
                "to do: 3, same_if_all_are_clipped",
            ],
        ),
        (
            FIRST_SLIPS,
            [
                "fails: expected a gradient, found none: 1a, L:",
                "fails: expected a gradient, found none: 1a, Lr:",
                "fails: for r = 1.1, A = 2 and clip_coef = 0.2 expected -6.6667, found -3.3333",
                "fails: for r = 1.25, A = 1 and clip_coef = 0.2 expected 0",
                "fails: ",
                "fails: for the logit",
                "fails: expected a gain of more than",
            ],
        ),
        (
            SLIPS,
            [
                "fails: ",
                "fails: for Lr and the first of two samples expected",
                "fails: False is not right: 3, same_without_clipping",
                "fails: for the logit",
                "fails: for Lr and e = 0.1 expected 0.8",
            ],
        ),
        (
            LAST_SLIPS,
            [f"fails: {WIDE}:", "fails: for r = 1.25, A = 1", "fails: ", "fails: "],
        ),
    ],
)
def test_a_slip_costs_the_claims_on_its_answer_and_no_others(answers, wrong):
    found, _ = run_exercise("open", **RIGHT | answers)
    assert len(found) == len(wrong)
    for line, start in zip(found, wrong):
        assert line.startswith(start)


SHOWN_AFTER_A_GUESS = ("largest / smallest", "clipping, SPPO", "clipped, SPPO", "signal to noise")


@pytest.mark.slow
def test_results_are_shown_after_a_guess_and_2a_costs_nothing_in_3():
    _, printed = run_exercise("heavy", "plot", "open", steps=2048)
    assert printed.endswith("\n0 of 16 claims hold, 16 to do\n")
    assert not any(words in printed for words in SHOWN_AFTER_A_GUESS)
    guesses = {"same_without_clipping": False, "same_if_all_are_clipped": False}
    answers = RIGHT | guesses | {"ppo_losses": only_signs_and_no_mask}
    wrong, printed = run_exercise("heavy", "plot", steps=2048, **answers)
    assert len(wrong) == 4
    assert "so the script's is used here" in printed
    assert all(words in printed for words in SHOWN_AFTER_A_GUESS)
    differences = re.findall(r"clip.+, SPPO and.+weights: (\S+)", printed)
    assert len(differences) == 2 and max(map(float, differences)) < 1e-4  # both are one run
    assert run_exercise("heavy", steps=2048, **RIGHT)[0] == []
