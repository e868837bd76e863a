"""What the analyses in these folders share: scores of packs, estimates, and their texts.

Reading, statistics and number format are the report's, in analysis/; what a page registered is in
its own analysis.
"""

from functools import cache
from itertools import combinations, product
from pathlib import Path

import numpy as np
from scipy import stats

from analysis.compare import (
    cells_of,
    contrast,
    difference,
    mean_and_variance,
    scores_of,
)
from analysis.measures import FIVE, LAST, TRAINING, measures_in
from analysis.runs import CELL, in_cells, read_pack
from analysis.runs import read as read_runs
from analysis.tables import interval_text, markdown, mean_text

RESULTS = Path(__file__).parent
HOPPER, PENDULUM, LANDER = "Hopper-v4", "InvertedDoublePendulum-v4", "LunarLanderContinuous-v3"
FLOORS = {LANDER: -200, "HalfCheetah-v4": -300}  # else 0
NOISES = {"clean": "clean", "normal 0.05": "noisy"}
MEASURES = {FIVE: "last five evaluations", LAST: "last evaluation", TRAINING: "training"}


# ---- Scores


@cache
def read(pack, *chosen):
    """Scores of a pack, such as "control/k", also in `chosen` measures, as analysis/ has them."""
    runs, progress, broken = read_runs([RESULTS / f"{pack}-runs.csv.gz"])
    assert not broken, broken
    return scores_of(in_cells(runs).query("finished"), progress, measures_in(progress, *chosen))


def packed(name):
    """Runs and evaluations of a pack."""
    return read_pack(RESULTS / f"{name}-runs.csv.gz")


def by_cell(scores, measure):
    """{(task, noise, method): scores (seeds,)}"""
    cells = cells_of(scores, measure)
    return {(*place, method): x for place, cell in cells.items() for method, x in cell.items()}


def above_floors(scores, measure, tasks, noises, methods):
    """Scores above the task's floor (tasks, noises, methods, seeds), the same seeds everywhere."""
    chosen = scores.query("measure == @measure").set_index("seed")
    groups = chosen.groupby(CELL)["score"]
    cells = [groups.get_group(cell) for cell in product(tasks, noises, methods)]
    assert all(cell.index.equals(cells[0].index) for cell in cells), "other seeds"
    array = np.reshape(cells, (len(tasks), len(noises), len(methods), -1))
    floors = np.array([FLOORS.get(task, 0) for task in tasks])
    return array - floors[:, None, None, None]


def short(task):
    return task.partition("-")[0].removesuffix("Continuous")


# ---- Estimates


def mean(sample):
    """By Student's t."""
    return contrast([sample], [1])


def log_mean_and_variance(scores):
    """The logarithm of the mean, above 0, of `scores` (..., runs), and its variance: (...,) each.
    The logarithm of a sample's mean is too low on average. The added term is the bias, exact if the
    mean is lognormal. Variances are too small where means are too large, hence `1 +`."""
    average, variance = mean_and_variance(scores)
    relative = variance / average**2
    return np.log(average) + np.log1p(relative) / 2, relative * (1 + relative)


def holm(p):
    """p-values (tests,), corrected by Holm's method."""
    order = np.argsort(p)
    factors = np.arange(len(p), 0, -1)
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(1, np.maximum.accumulate(np.take(p, order) * factors))
    return corrected


@cache
def corrected_suite(pack):
    """p of the differences between all methods of a pack, in all measures, by Benjamini and
    Hochberg: {(measure, task, noise, methods): p}."""
    p = {}
    for measure in MEASURES:
        for place, cell in cells_of(read(pack), measure).items():
            for a, b in combinations(cell, 2):
                p[(measure, *place, frozenset([a, b]))] = difference(cell[a], cell[b]).p
    corrected = stats.false_discovery_control([1 if np.isnan(x) else x for x in p.values()])
    return dict(zip(p, corrected))


# ---- Texts and figures


def bars(found):
    """Values and half widths of estimates, for error bars."""
    return [x.value for x in found], [x.half_width() for x in found]


def score_text(sample, places=0):
    return mean_text(sample.mean(), stats.sem(sample), places)


def estimate_text(found, places=2):
    return interval_text(found.value, found.low, found.high, places)


def minus_text(a, b, places=0):
    return estimate_text(difference(a, b), places)


def pair_texts(a, b, places=0):
    """Two methods' scores, and the second minus the first."""
    return [score_text(a, places), score_text(b, places), minus_text(b, a, places)]


def percent_text(found):
    """Of a log ratio."""
    value, low, high = 100 * np.expm1([found.value, found.low, found.high])
    return f"{value:.1f} % ({low:.1f} to {high:.1f})"


def estimate_table(name, rows, places=2):
    """A table of `rows`, {title: {column: estimate}}; `name` stands above the titles."""
    lines = []
    for title, found in rows.items():
        lines.append([title, *(estimate_text(x, places) for x in found.values())])
    return markdown([name, *found], lines)


def corrected_p(rows):
    """p of `rows`, {title: {name: estimate}}, by Benjamini and Hochberg: {(title, name): p}."""
    found = {(title, name): x.p for title, row in rows.items() for name, x in row.items()}
    return dict(zip(found, stats.false_discovery_control(list(found.values()))))
