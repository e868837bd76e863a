"""Tables of means in README.md, docs/ and results/ show what the packed runs in results/ give.

Such a table follows a comment `<!-- SUITE [SUITE ...]: LABELS -->`. A value is the one of all its
labels together: the comment's, those at the beginning of its row, and its column's heading. Labels
are tasks, kinds of reward, methods (also "A minus B") and measures, separated by ", "."""

import re
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import report

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [ROOT / "README.md", *ROOT.glob("docs/*.md"), *sorted(ROOT.glob("results/*.md"))]
}
TABLE = re.compile(r"(?m)(?:^<!-- ([\w. -]+): (.+) -->\n\n?)?((?:^ *\|.*\n)+)")
NUMBER = r"([+-]?[\d,]*\.?\d+)"
VALUE = re.compile(rf"{NUMBER}(?: ± {NUMBER}| \({NUMBER} to {NUMBER}\))?")
WORDS = {"", "task", "rewards", "method", "measure"}  # headings above labels

METHODS = {
    "Gaussian PPO": ["ppo"],
    "DPPO, max-grad-norm / k": ["dppo-norm"],
    "DPPO, vf-coef / k": ["dppo-coef"],
    "PPO, max-grad-norm / k": ["ppo-norm"],
    "PPO, vf-coef / k": ["ppo-coef"],
    "PPO, vf-coef / k, ent-coef / k": ["ppo-coef"],
    "PPO, ce-coef / k": ["ppo-ce"],
    "PPO, corrected rewards": ["ppo-corrected"],
    "PPO, epsilon 1e-8": ["ppo-eps"],
    "PPO, ce-coef / k, epsilon 1e-8": ["ppo-ce-eps"],
    "SPPO, epsilon 1e-8": ["sppo-eps"],
    "SPPO, k 20.5": ["sppo-k20.5"],
    "PPO, 1.5M": ["ppo-small"],
    "SPPO, 1.5M": ["sppo-small"],
    "our variant": ["sppo-p"],
    "Gaussian A2C": ["a2c"],
    "A2C, alpha 0.5": ["a2c-half"],
    "DA2C, alpha 0.5": ["da2c-half"],
    "beta 0": ["da2c-half"],
    "Stable-Baselines3": ["sb3-ppo", "sb3-a2c"],
} | {f"beta {beta}": [f"sa2c-alpha0.5-beta{beta}"] for beta in ("0.5", "2", "5", "20")}
NOISY = ["flip", "normal", "uniform", "adv_flip"]
REWARDS = {
    "clean": [(1, ["none"])],
    "noisy": [(1, NOISY)],
    "flipped": [(1, NOISY)],
    "cost of noise": [(1, ["none"]), (-1, NOISY)],
}
MEASURES = {"last evaluation": "return_mean", "last five evaluations": "last5"}
MEASURES |= {"reward": "return_mean", "KL": "kl"}


@cache
def read(suites):
    """Finished runs of suites, with the last of what evaluations measured, and means of what was
    logged. And what labels mean: {label: (column, [(sign, values that the column may have)])}."""
    runs, progress = report.read_folders(tuple(ROOT / "results" / name for name in suites.split()))
    runs = runs[runs["finished"]].copy()
    evaluations = progress.groupby("run_name")
    measures = {name: name for name in ("return_mean", "last5", "training")} | MEASURES
    for name in progress.columns.difference(report.EVALUATION):
        values = evaluations[name].mean() if "/" in name else evaluations[name].last()
        runs[name] = runs["run_name"].map(values)
        measures[name] = name
    labels = {label: ("measure", column) for label, column in measures.items()}
    for task in runs["env_id"].unique():
        for label in (task, task.partition("-")[0].removesuffix("Continuous")):
            labels[label] = ("env_id", [(1, [task])])
    methods = METHODS | {name: [name] for name in runs["exp_name"].unique()}
    methods |= {name.upper(): [name] for name in runs["exp_name"].unique()}
    for (a, first), (b, second) in product(methods.items(), repeat=2):
        labels[f"{a} minus {b}"] = ("exp_name", [(1, first), (-1, second)])
    for label, names in methods.items():
        labels[label] = ("exp_name", [(1, names)])
    return runs, labels | {label: ("noise", groups) for label, groups in REWARDS.items()}


def split(text, labels):
    """The labels in a cell; a label may have ", " in it."""
    parts = text.split(", ")
    for end in range(len(parts), 0, -1):
        if ", ".join(parts[:end]) in labels:
            rest = ", ".join(parts[end:])
            return [", ".join(parts[:end]), *(split(rest, labels) if rest else [])]
    raise AssertionError(f"unknown label: {text}")


def value_of(suites, texts):
    """Mean, its standard error, its 95 % interval, and seeds: of runs, or of a difference
    between two or four groups of runs, by Welch's test."""
    runs, labels = read(suites)
    chosen = dict(labels[label] for text in texts for label in split(text, labels))
    measure = chosen.pop("measure")
    mean, variances, freedom = 0, [], []
    for groups in product(*chosen.values()):
        group = runs
        for column, (_, values) in zip(chosen, groups):
            group = group[group[column].isin(values)]
        for column in ("env_id", "exp_name", "noise", "noise_level"):
            assert group[column].nunique() == 1, f"{texts}: which {column}?"
        assert not group["seed"].duplicated().any()
        scores = group[measure].to_numpy(float)
        mean += np.prod([sign for sign, _ in groups]) * scores.mean()
        variances.append(scores.var(ddof=1) / len(scores) if len(scores) > 1 else np.nan)
        freedom.append(len(scores) - 1)
    error = np.sqrt(sum(variances))
    half = np.nan
    if error > 0:
        half = error * stats.t.ppf(0.975, error**4 / sum(np.square(variances) / freedom))
    return mean, error, mean - half, mean + half, len(scores)


def check(cell, suites, texts, heading):
    if heading == "seeds":
        assert int(cell) == value_of(suites, [*texts, "last evaluation"])[-1], texts
        return
    found = VALUE.fullmatch(cell.replace("**", ""))
    assert found, f"not a value: {cell}"
    for shown, value in zip(found.groups(), value_of(suites, [*texts, heading])):
        if shown:
            digits = len(shown.partition(".")[2])
            assert float(shown.replace(",", "")) == float(f"{value:.{digits}f}"), (texts, heading)


TABLES = [(page, *found.groups()) for page, text in PAGES.items() for found in TABLE.finditer(text)]
MARKED = [table for table in TABLES if table[1]]


@pytest.mark.parametrize(("page", "suites", "common", "table"), MARKED)
def test_a_table_shows_what_packed_runs_give(page, suites, common, table):
    lines = [re.split(r"(?<!\\)\|", line.strip()[1:-1]) for line in table.splitlines()]
    headings, _, *rows = [[cell.strip() for cell in line] for line in lines]
    first = [heading in WORDS for heading in [*headings, "end"]].index(False)
    assert first < len(headings)
    for row in rows:
        texts = [common, *filter(None, row[:first])]
        for heading, cell in zip(headings[first:], row[first:], strict=True):
            if cell:
                check(cell, suites, texts, heading)


@pytest.mark.parametrize("page", PAGES)
def test_every_table_of_means_is_checked(page):
    unmarked = [table for name, suites, _, table in TABLES if name == page and not suites]
    assert [line for table in unmarked for line in table.splitlines() if "±" in line] == []
