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
    pooled_difference,
    scores_of,
)
from analysis.measures import FIVE, LAST, TRAINING, measures_in
from analysis.runs import CELL, in_cells
from analysis.runs import read as read_runs
from analysis.tables import interval_text, markdown, mean_text

RESULTS = Path(__file__).parent
HOPPER, PENDULUM, LANDER = "Hopper-v4", "InvertedDoublePendulum-v4", "LunarLanderContinuous-v3"
FLOORS = {LANDER: -200, "HalfCheetah-v4": -300}  # else 0
MEASURES = {FIVE: "last five evaluations", LAST: "last evaluation", TRAINING: "training"}
SAMPLES = 10_000  # of a registered bootstrap interval


# ---- Scores


@cache
def read(pack, *chosen):
    """Scores of a pack, such as "control/k", also in `chosen` measures, as analysis/ has them."""
    runs, progress, broken = read_runs([RESULTS / f"{pack}-runs.csv.gz"])
    assert not broken, broken
    return scores_of(in_cells(runs).query("finished"), progress, measures_in(progress, *chosen))


def above_floors(scores, measure, tasks, noises, methods):
    """Scores above the task's floor (tasks, noises, methods, seeds), the same seeds everywhere."""
    chosen = scores[scores["measure"] == measure].set_index("seed")
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


def gain(cells):
    """With its interval: by the bias-corrected log ratio of means, averaged over `cells`."""
    found = pooled_difference(list(cells), log_mean_and_variance)
    return np.expm1([found.value, found.low, found.high])


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


def resampled_means(scores, count=SAMPLES):
    """Means (..., rows, 1 + count) of `scores` (..., rows, seeds): the estimate, then those of
    resampled seeds, the same for all rows."""
    *cells, _, seeds = scores.shape
    rng = np.random.default_rng(0)
    drawn = rng.integers(seeds, size=(*cells, 1, count, seeds))
    samples = np.take_along_axis(scores[..., None, :], drawn, axis=-1).mean(axis=-1)
    return np.concatenate([scores.mean(axis=-1, keepdims=True), samples], axis=-1)


def bootstrapped(samples):
    """The estimate, which is the first sample, and the interval of the others."""
    return samples[..., 0], *np.quantile(samples[..., 1:], [0.025, 0.975], axis=-1)


# ---- Texts


def score_text(sample, places=0):
    return mean_text(sample.mean(), stats.sem(sample), places)


def estimate_text(found, places=2):
    return interval_text(found.value, found.low, found.high, places)


def minus_text(a, b, places=0):
    return estimate_text(difference(a, b), places)


def percent_text(value, low, high):
    return f"{100 * value:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


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
