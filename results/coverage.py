"""Whether 95 % intervals hold the truth: simulated runs of two methods whose true difference is
known. Writes coverage.csv: how many intervals in a hundred lie above it, and below.

python -m results.coverage    # four minutes
"""

from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from analysis.compare import (
    FEWEST,
    mean_and_variance,
    placements,
    pooled_difference,
    probability_of_improvement,
)
from results.common import log_mean_and_variance

DATA_SETS = 2000
CELLS = [1, 3, 18]
SEEDS = [3, 5, 8]


def normal(rng, size, spread=0.3):
    return rng.normal(1, spread, size)


def lognormal(rng, size, spread=0.6):
    sigma = np.sqrt(np.log1p(spread**2))
    return rng.lognormal(-(sigma**2) / 2, sigma, size)


def failing(rng, size):
    """One run in four scores a tenth of what the others do."""
    scores = rng.normal(1, 0.1, size)
    return np.where(rng.random(size) < 0.25, 0.1 * scores, scores) / (0.75 + 0.25 * 0.1)


def heavy(rng, size):
    """The logarithm has Student's t with three degrees of freedom."""
    return np.exp(0.3 * rng.standard_t(3, size).clip(-8, 8))


PAIRS = {  # all have equal means
    "normal": (normal, normal),
    "skewed": (lognormal, lognormal),
    "heavy tails": (heavy, heavy),
    "one run in four fails": (failing, failing),
    "spreads 0.3 and 0.05": (normal, partial(normal, spread=0.05)),
    "skewed, spreads 0.6 and 0.2": (lognormal, partial(lognormal, spread=0.2)),
    "skewed, spreads 1 and 0.1": (partial(lognormal, spread=1), partial(lognormal, spread=0.1)),
    "only one method fails": (failing, partial(normal, spread=0.1)),
}


def simulate(rng, pair, seeds, cells, data_sets=DATA_SETS):
    return [[draw(rng, (data_sets, seeds)) for draw in PAIRS[pair]] for _ in range(cells)]


def outside(truth, low, high):
    """Percentages of intervals above and below the truth, of those that exist."""
    exists = ~np.isnan(low)
    low, high = low[exists], high[exists]
    return 100 * np.mean(low > truth), 100 * np.mean(high < truth)


def difference_outside(scores, moments):
    found = pooled_difference(scores, moments)
    return outside(0, found.low, found.high)


def improvement_outside(rng, scores, pair, lead=0.0):
    """`lead` is added to the scores of the first method."""
    ((many, others),) = simulate(rng, pair, seeds=500, cells=1, data_sets=100)
    truth = placements(many + lead, others).mean()
    _, low, high = probability_of_improvement([(a + lead, b) for a, b in scores])
    return outside(truth, low, high)


def bootstrap_outside(rng, scores, pair, lead, samples=300):
    """The same of the usual interval instead: quantiles over resampled runs."""
    ((many, others),) = simulate(rng, pair, seeds=500, cells=1, data_sets=100)
    truth = placements(many + lead, others).mean()
    means = []
    for _ in range(samples):
        placed = []
        for a, b in scores:
            first, second = rng.integers(a.shape[1], size=(2, *a.shape))
            a = np.take_along_axis(a + lead, first, axis=1)
            b = np.take_along_axis(b, second, axis=1)
            placed.append(placements(a, b).mean(axis=-1))
        means.append(np.mean(placed, axis=0))
    return outside(truth, *np.quantile(means, [0.025, 0.975], axis=0))


def main():
    rng = np.random.default_rng(0)
    bootstrap_rng = np.random.default_rng(1)
    rows = []
    for cells, seeds, pair in tqdm(list(product(CELLS, SEEDS, PAIRS))):
        scores = simulate(rng, pair, seeds, cells)
        found = {
            "points": difference_outside(scores, mean_and_variance),
            "percent": difference_outside(scores, log_mean_and_variance),
        }
        if seeds >= FEWEST:
            found["improvement"] = improvement_outside(rng, scores, pair)
            found["improvement, means 1.4 and 1"] = improvement_outside(rng, scores, pair, lead=0.4)
            by_bootstrap = bootstrap_outside(bootstrap_rng, scores, pair, lead=0.4)
            found["improvement, means 1.4 and 1, by bootstrap"] = by_bootstrap
        for statistic, (above, below) in found.items():
            rows.append([statistic, cells, seeds, pair, round(above, 1), round(below, 1)])
    columns = ["statistic", "cells", "seeds", "pair", "above", "below"]
    table = pd.DataFrame(rows, columns=columns).sort_values(columns[:3], kind="stable")
    table.to_csv(Path(__file__).with_suffix(".csv"), index=False)


if __name__ == "__main__":
    main()
