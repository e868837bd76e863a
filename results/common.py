"""What the analyses in these folders share: packed runs as arrays, intervals, numbers as text.

Statistics are report.py's; what else a page registered is in its own analysis.
"""

import sys
from itertools import product
from pathlib import Path

import numpy as np
from scipy import stats

sys.path.append(str(Path(__file__).parents[1]))
from report import log_mean_and_variance, mean_and_variance, pooled_difference, read_csv, tables_of

RESULTS = Path(__file__).parent
FLOORS = {"LunarLanderContinuous-v3": -200, "HalfCheetah-v4": -300}  # else 0
MEASURES = {
    "last5": "last five evaluations",
    "return_mean": "last evaluation",
    "training": "training",
}
SAMPLES = 10_000  # of a registered bootstrap interval


def read(pack):
    """Finished runs of `pack`, such as "control/k", and their evaluations. `last5` is there with
    five evaluations, too, while the report wants ten."""
    runs_file, progress_file = tables_of(RESULTS / f"{pack}-runs.csv.gz")
    runs = read_csv(runs_file).query("finished")
    progress = read_csv(progress_file)
    returns = progress["return_mean"].groupby(progress["run_name"])
    five = returns.nth[-5:].groupby(progress["run_name"]).mean()
    enough = returns.size() >= 5
    runs["last5"] = runs["last5"].fillna(runs["run_name"].map(five[enough]))
    return runs, progress


def scores_of(runs, measure, **axes):
    """Scores above their task's floor: an array with an axis for each of `axes`, {column: values},
    and one for seeds, in the same order everywhere."""
    runs = runs.sort_values("seed").set_index("seed")
    above = runs[measure] - runs["env_id"].map(FLOORS).fillna(0)
    groups = above.groupby([runs[name] for name in axes])
    cells = [groups.get_group(cell) for cell in product(*axes.values())]
    assert all(cell.index.equals(cells[0].index) for cell in cells), "other seeds"
    return np.reshape(cells, (*map(len, axes.values()), -1))


def short(task):
    return task.partition("-")[0].removesuffix("Continuous")


# ---- Estimates: a value and its 95 % interval


def paired(values):
    """Mean of seeds' values, by t; and p."""
    test = stats.ttest_1samp(values, 0)
    return values.mean(), *test.confidence_interval(), test.pvalue


def welch(*cells):
    """Mean over `cells`, pairs of scores, of the difference in means, by Welch's t; and p."""
    return pooled_difference(list(cells), mean_and_variance)


def log_ratio(cells):
    """Bias-corrected log ratio of means, averaged over `cells`; and p. All are nan if a mean is not
    positive."""
    cells = list(cells)
    if min(scores.mean() for pair in cells for scores in pair) <= 0:
        return np.full(4, np.nan)
    return pooled_difference(cells, log_mean_and_variance)


def percent(cells):
    """The same as a difference in percent."""
    return np.expm1(log_ratio(cells)[:3])


def detected(error, freedom):
    """What t detects with 80 % power: the true difference is above 0.975's limit in 80 %."""
    return error * stats.t.ppf([0.975, 0.8], freedom).sum()


# ---- Text


def estimate(value, low, high, digits=2):
    if np.isnan(value):
        return "mean below floor"
    value, low, high = np.round([value, low, high], digits) + 0.0  # no -0.00
    return f"{value:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def in_percent(value, low, high):
    return f"{100 * value:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def print_p(estimates):
    """p of {name: (value, low, high, p)}, and after Benjamini and Hochberg's correction."""
    every_p = {name: found[3] for name, found in estimates.items() if np.isfinite(found[3])}
    corrected = stats.false_discovery_control(list(every_p.values()))
    for (name, p), after in zip(every_p.items(), corrected):
        print(f"{name}: p = {p:.2g}, corrected for {len(every_p)} {after:.2g}")


def print_table(rows, *headings):
    """`rows`: {name: texts}; the first heading is that of names, which None leaves out."""
    first = 1 if headings[0] is None else 0
    headings = headings[first:]
    print(f"| {' | '.join(headings)} |\n|{'---|' * len(headings)}")
    for name, texts in rows.items():
        print(f"| {' | '.join([name, *texts][first:])} |")
