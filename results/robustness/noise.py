"""Measures, scores and figure of the runs at five levels of noise.

python results/robustness/noise.py
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

sys.path.append(str(Path(__file__).parents[1]))
from common import (
    SAMPLES,
    estimate,
    in_percent,
    percent,
    print_table,
    read,
    scores_of,
    short,
    welch,
)

from report import COLORS

HERE = Path(__file__).parent
TASKS = ["Hopper-v4", "InvertedDoublePendulum-v4", "LunarLanderContinuous-v3"]
LEVELS = [0, 0.05, 0.1, 0.2, 0.5]
METHODS = {"dppo": "DPPO", "ppo": "Gaussian PPO", "sppo": "SPPO"}
DPPO = list(METHODS).index("dppo")
PAIRS = [("sppo", "dppo"), ("dppo", "ppo"), ("sppo", "ppo")]


def scores_above():
    """Last five evaluations above the task's floor (tasks, levels, methods, seeds)."""
    runs, _ = read("robustness/noise")
    runs["level"] = runs["noise_level"].where(runs["noise"] == "normal", 0)
    return scores_of(runs, "last5", env_id=TASKS, level=LEVELS, exp_name=METHODS)


def resampled(scores):
    """Means (tasks, levels, methods, 1 + SAMPLES): the estimate, then those of resampled seeds,
    drawn for each cell."""
    rng = np.random.default_rng(0)
    *cells, seeds = scores.shape
    drawn = rng.integers(seeds, size=(*cells, SAMPLES, seeds))
    samples = np.take_along_axis(scores[..., None, :], drawn, axis=-1).mean(axis=-1)
    return np.concatenate([scores.mean(axis=-1, keepdims=True), samples], axis=-1)


def relative(means):
    """As registered, to clean DPPO's mean: {method: (tasks, levels, 1 + SAMPLES)}."""
    shares = means / means[:, :1, [DPPO]]
    return {method: shares[:, :, i] for i, method in enumerate(METHODS)}


def by_t(a, b, scores, levels=slice(None)):
    """Method a's relative score minus b's, with 95 % interval and p by Welch's test: a seed's score
    is its mean over the levels, and clean DPPO's mean counts as known. Then the same with seeds'
    means over the tasks."""
    clean = scores[:, 0, DPPO].mean(axis=-1)
    of_seeds = scores[:, levels].mean(axis=1) / clean[:, None, None]
    i, j = (list(METHODS).index(method) for method in (a, b))
    return welch(*zip(of_seeds[:, i], of_seeds[:, j])), welch(of_seeds[:, [i, j]].mean(axis=0))


def interval(samples):
    return np.quantile(samples[..., 1:], [0.025, 0.975], axis=-1)


def difference(a, b):
    return f"{METHODS[a]} minus {METHODS[b]}"


def print_areas(title, shares):
    """Areas and levels of methods and of their differences; `shares`: (levels, 1 + SAMPLES)."""
    values = {METHODS[method]: shares[method] for method in ("ppo", "dppo", "sppo")}
    for a, b in PAIRS:
        values[difference(a, b)] = shares[a] - shares[b]
    rows = {}
    for name, samples in values.items():
        cells = [samples.mean(axis=0), *samples]
        rows[name] = [estimate(cell[0], *interval(cell)) for cell in cells]
    print_table(rows, title, "area", *map(str, LEVELS))


def print_measures():
    """Averaged over the tasks."""
    shares = relative(resampled(scores_above()))
    print_areas("", {method: values.mean(axis=0) for method, values in shares.items()})


def print_intervals():
    """Two other intervals of the differences in area, with p."""
    scores = scores_above()
    rows = {}
    for pair in PAIRS:
        rows[difference(*pair)] = []
        for _, low, high, p in by_t(*pair, scores):
            rows[difference(*pair)].append(f"{low:.2f} to {high:.2f} ({p:.2g})")
    print_table(rows, "area", "by t (p)", "by t, seeds as the unit (p)")


def print_percent():
    """Ratios of two methods at the same level, pooled over tasks and levels without their bias."""
    scores = scores_above()
    rows = {}
    for a, b in PAIRS:
        i, j = (list(METHODS).index(method) for method in (a, b))
        rows[difference(a, b)] = []
        for levels in (5, 4):
            cells = scores[:, :levels].reshape(-1, *scores.shape[2:])
            rows[difference(a, b)].append(in_percent(*percent(zip(cells[:, i], cells[:, j]))))
    print_table(rows, "", "all levels", "without 0.5")


def print_levels():
    """p of differences at single levels, by Welch's test: averaged over the tasks, then Hopper's;
    below, the smallest after Benjamini and Hochberg's correction for all of its table."""
    scores = scores_above()
    for name, part in (("all tasks", scores), ("Hopper", scores[:1])):
        rows = {}
        every_p = []
        for pair in PAIRS:
            p = [by_t(*pair, part, [i])[0][-1] for i in range(len(LEVELS))]
            rows[difference(*pair)] = [f"{value:.2g}" for value in p]
            every_p += p
        print_table(rows, f"p, {name}", *map(str, LEVELS))
        print(f"\nSmallest, corrected: {stats.false_discovery_control(every_p).min():.2g}\n")


def print_tasks():
    shares = relative(resampled(scores_above()))
    for i, task in enumerate(TASKS):
        print_areas(short(task), {method: values[i] for method, values in shares.items()})


def draw():
    """Relative score against level: averaged over the tasks, then for each."""
    figure, axes = plt.subplots(1, 4, figsize=(12, 3.2), sharey=True, layout="constrained")
    x = np.array(LEVELS)
    shares = relative(resampled(scores_above()))
    for shift, method in zip((-0.006, 0, 0.006), ("ppo", "dppo", "sppo")):
        panels = {"all three tasks": shares[method].mean(axis=0)}
        panels |= {short(task): shares[method][i] for i, task in enumerate(TASKS)}
        for ax, (title, samples) in zip(axes, panels.items()):
            style = {"color": COLORS[method], "label": METHODS[method]}
            ax.plot(x + shift, samples[:, 0], "o-", markersize=4, **style)
            ax.vlines(x + shift, *interval(samples), color=COLORS[method])
            ax.set_title(title)
            ax.set_xticks(x, ["0", "", "0.1", "0.2", "0.5"])
            ax.set_xlabel("standard deviation of the noise")
            ax.grid(alpha=0.3)
    axes[0].set_ylabel("score (clean DPPO: 1 by definition)")
    axes[0].legend()
    figure.savefig(HERE / "noise.png", dpi=160)


if __name__ == "__main__":
    plt.switch_backend("agg")
    print_measures()
    print_intervals()
    print_percent()
    print_levels()
    print_tasks()
    draw()
