"""Scores as one long table, and the statistics of them."""

from dataclasses import dataclass
from itertools import permutations

import numpy as np
import pandas as pd
from scipy import special, stats

from analysis.measures import LAST
from analysis.methods import baselines_of, in_order
from analysis.runs import CELL, Refusal

SAME = 1e-12  # scores that differ by less, relative to them, differ by rounding
FEWEST = 5  # runs for an interval by Brunner and Munzel: results/coverage.csv


def scores_of(runs, progress, measures):
    """A row for each run and measure that it has: run_name, CELL, seed, measure, score."""
    started = set(runs["run_name"][runs["start_from"] != ""])
    rows = []
    for run_name, evaluations in progress.groupby("run_name"):
        for name, measure in measures.items():
            score = measure.score_of(evaluations, run_name in started)
            rows.append({"run_name": run_name, "measure": name, "score": score})
    table = runs[["run_name", *CELL, "seed"]].merge(pd.DataFrame(rows).dropna())
    return table.sort_values([*CELL, "seed"])


def cells_of(scores, measure=LAST):
    """{(task, noise): {method: scores (seeds,)}}"""
    chosen = scores[scores["measure"] == measure].dropna()
    cells = {}
    for (task, noise, method), cell in chosen.groupby(CELL)["score"]:
        cells.setdefault((task, noise), {})[method] = cell.to_numpy(float)
    return cells


def pairs_of(runs, chosen=()):
    """Chosen pairs of methods, or each method with its baseline."""
    there = set()
    for _, methods in runs.groupby(["task", "noise"])["method"]:
        there.update(permutations(set(methods), 2))
    methods = in_order(runs["method"])
    for a, b in chosen:
        if (a, b) not in there:
            raise Refusal(f"--compare {a} {b}: no task has both; there are {', '.join(methods)}")
    if chosen:
        return list(dict.fromkeys(chosen))
    pairs = []
    for method in methods:
        possible = [(method, other) for other in baselines_of(method)]
        pairs += [pair for pair in possible if pair in there][:1]
    return pairs


def not_compared(runs, scores, pairs, measure):
    """A line for methods that are in no pair, and for each half of a pair that is alone."""
    lines = []
    unpaired = in_order(set(runs["method"]).difference(*pairs))
    if unpaired and runs["method"].nunique() > 1:
        lines.append(f"**Not compared: {', '.join(unpaired)}: use `--compare`.**")
    cells = cells_of(scores, measure).items()
    for a, b in [*pairs, *(pair[::-1] for pair in pairs)]:
        alone = [", ".join(place) for place, cell in cells if a in cell and b not in cell]
        if alone:
            lines.append(f"Not compared: {a} without {b}: {'; '.join(alone)}.")
    return lines


def not_whole(table, without):
    """A line for each cell with runs that are `without` a score of their own, or lack seeds."""
    lines = []
    for place, cell in without.groupby(CELL):
        why = cell["state"].replace("finished", "lacks the measure")
        names = ", ".join(cell["run_name"] + " (" + why + ")")
        lines.append(f"**No score of its own: {', '.join(place)}: {names}**")
    seeds = set(table["seed"].drop(without.index))
    for place, there in table.groupby(CELL)["seed"]:
        missing = ", ".join(map(str, sorted(seeds.difference(there))))
        if missing:
            lines.append(f"Missing seeds: {', '.join(place)}: {missing}.")
    return lines


@dataclass
class Estimate:
    """A value, its standard error and the degrees of freedom of that. Without a variance, as of
    single or equal scores, interval and p are nan."""

    value: float
    error: float
    freedom: float

    def half_width(self):
        """Of the 95 % interval, by t."""
        return self.error * stats.t.ppf(0.975, self.freedom)

    @property
    def low(self):
        return self.value - self.half_width()

    @property
    def high(self):
        return self.value + self.half_width()

    @property
    def p(self):
        return 2 * stats.t.sf(np.abs(self.value) / self.error, self.freedom)


def mean_and_variance(scores):
    """The mean of `scores` (..., runs), and its variance: (...,) each."""
    runs = scores.shape[-1]
    variance = scores.var(axis=-1, ddof=min(1, runs - 1)) / runs
    varies = np.ptp(scores, axis=-1) > SAME * np.abs(scores).max(axis=-1)
    return scores.mean(axis=-1), np.where(varies, variance, 0)


def contrast(samples, weights, moments=mean_and_variance):
    """The weighted sum of the means of `samples` (..., runs), by Welch and Satterthwaite. One
    sample with the weight 1 has its mean by Student's t, two with 1 and -1 have Welch's test."""
    values, variances = zip(*map(moments, samples))
    parts = np.stack(variances, axis=-1) * np.square(weights)
    total = parts.sum(axis=-1)
    freedom_of_parts = [sample.shape[-1] - 1 for sample in samples]
    with np.errstate(divide="ignore", invalid="ignore"):  # no variance
        freedom = total**2 / (parts**2 / freedom_of_parts).sum(axis=-1)
        error = np.where(total > 0, np.sqrt(total), np.nan)
    return Estimate(np.stack(values, axis=-1) @ np.asarray(weights), error, freedom)


def difference(a, b):
    return contrast([a, b], [1, -1])


def pooled_difference(cells, moments=mean_and_variance):
    """The mean over `cells`, pairs of scores (..., runs), of the difference in means."""
    samples = [sample for pair in cells for sample in pair]
    weights = np.tile([1, -1], len(cells)) / len(cells)
    return contrast(samples, weights, moments)


def placements(a, b):
    """For each run of `a` (..., n) the share of the runs `b` (..., m) that it beats, ties half."""
    a = a[..., :, None]
    b = b[..., None, :]
    rounding = SAME * np.maximum(np.abs(a), np.abs(b))
    return ((a > b + rounding).mean(axis=-1) + (a >= b - rounding).mean(axis=-1)) / 2


def probability_of_improvement(cells):
    """That a run of the first beats one of the second, the mean over `cells`, pairs of scores
    (..., runs), with its 95 % interval by Brunner and Munzel (Biometrical Journal 42, 2000), of the
    logit: cautious with few runs, where bootstrap intervals are too narrow, and near 0 and 1. None
    with fewer than FEWEST runs, or if no placement varies."""
    placed = pooled_difference([(placements(a, b), placements(b, a)) for a, b in cells])
    value = (1 + placed.value) / 2
    # Not halved: the second mean is 1 minus the first, so both variances are of the first
    half = placed.half_width() / (value * (1 - value))
    if min(sample.shape[-1] for pair in cells for sample in pair) < FEWEST:
        half = np.nan
    return value, *special.expit(special.logit(value) + np.array([-half, half]))


def means_of(scores):
    """Of each cell and measure, with the numbers of runs with a score and of seeds begun."""
    means = scores.groupby(["measure", *CELL]).agg(
        mean=("score", "mean"),
        standard_error=("score", "sem"),
        runs=("score", "count"),
    )
    means = means.join(scores.groupby(CELL)["seed"].nunique().rename("begun"))
    half = means["standard_error"] * stats.t.ppf(0.975, means["runs"] - 1)
    means["low"] = means["mean"] - half
    means["high"] = means["mean"] + half
    return means.reset_index()


def differences_of(scores, pairs, measure):
    """Of `pairs`, with p as corrected by Benjamini and Hochberg for the number of rows, where what
    cannot be tested counts with p = 1."""
    rows = []
    for (task, noise), cell in cells_of(scores, measure).items():
        for a, b in pairs:
            if a in cell and b in cell:
                found = difference(cell[a], cell[b])
                rows.append([task, noise, a, b, found.value, found.low, found.high, found.p])
    columns = [*CELL, "baseline", "difference", "low", "high", "p"]
    table = pd.DataFrame(rows, columns=columns).astype({"p": float})
    table = table.sort_values("p", ignore_index=True)
    table["p_corrected"] = stats.false_discovery_control(table["p"].fillna(1))
    return table


def is_best(means, differences, lower):
    """Whether a mean is the highest, or `lower` the lowest, of its measure, task and noise, and
    differs, after correction, from all that it is compared with."""
    cells = means.groupby(["measure", "task", "noise"])["mean"]
    best = cells.transform("min" if lower else "max")
    turned = differences.assign(method=differences["baseline"])
    largest_p = pd.concat([differences, turned]).groupby(CELL)["p_corrected"].max()
    return (means["mean"] == best) & (means.join(largest_p, on=CELL)["p_corrected"] < 0.05)


def improvements_of(scores, pairs, measure, lower):
    """A row for each pair: its probability of improvement over the cells that have both."""
    sign = -1 if lower else 1
    rows = []
    for a, b in pairs:
        cells = cells_of(scores, measure).values()
        both = [(sign * cell[a], sign * cell[b]) for cell in cells if a in cell and b in cell]
        if both:
            rows.append([a, b, len(both), *probability_of_improvement(both)])
    return pd.DataFrame(rows, columns=["method", "baseline", "cells", "probability", "low", "high"])
