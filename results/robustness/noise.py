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


def resampled(scores, count=SAMPLES):
    """Means (tasks, levels, methods, 1 + count): the estimate, then those of resampled seeds,
    drawn for each cell."""
    rng = np.random.default_rng(0)
    *cells, seeds = scores.shape
    drawn = rng.integers(seeds, size=(*cells, count, seeds))
    samples = np.take_along_axis(scores[..., None, :], drawn, axis=-1).mean(axis=-1)
    return np.concatenate([scores.mean(axis=-1, keepdims=True), samples], axis=-1)


def relative(means):
    """As registered, to clean DPPO's mean: {method: (tasks, levels, 1 + count)}."""
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
    """Averaged over the tasks: methods' means, and differences by t."""
    scores = scores_above()
    rows = {}
    for method in ("ppo", "dppo", "sppo"):
        of_levels = relative(scores.mean(axis=-1, keepdims=True))[method].mean(axis=(0, 2))
        rows[METHODS[method]] = [f"{value:.2f}" for value in (of_levels.mean(), *of_levels)]
    for pair in PAIRS:
        places = [slice(None), *([i] for i in range(len(LEVELS)))]
        found = [by_t(*pair, scores, place)[0] for place in places]
        rows[difference(*pair)] = [estimate(*values) for *values, _ in found]
    print_table(rows, "", "area", *map(str, LEVELS))


def areas(scores, count=SAMPLES):
    """{pair: estimates of the difference in area, with intervals}: by t, by t with seeds as the
    unit, and from the bootstrap of `count` samples, as registered."""
    shares = relative(resampled(scores, count))
    samples = {method: values.mean(axis=(0, 1)) for method, values in shares.items()}
    found = {}
    for a, b in PAIRS:
        gap = samples[a] - samples[b]
        found[a, b] = [*(values[:3] for values in by_t(a, b, scores)), (gap[0], *interval(gap))]
    return found


def print_intervals(simulations=2000):
    """The other two intervals of the differences in area; and how many of all three hold the truth
    where scores are normal, with the cells' means and deviations."""
    scores = scores_above()
    rows = {}
    for pair, (_, of_seeds, bootstrap) in areas(scores).items():
        rows[difference(*pair)] = [estimate(*of_seeds), estimate(*bootstrap)]
    mean = scores.mean(axis=-1, keepdims=True)
    deviation = scores.std(axis=-1, ddof=1, keepdims=True)
    truth = areas(mean.repeat(2, axis=-1), 1)
    rng = np.random.default_rng(0)
    held = []
    for _ in range(simulations):
        drawn = areas(rng.normal(mean, deviation, scores.shape), 500)
        for pair, intervals in drawn.items():
            held.append([low <= truth[pair][0][0] <= high for _, low, high in intervals])
    shares = [f"{100 * share:.0f} %" for share in np.mean(held, axis=0)]
    print(f"Of intervals by t {shares[0]} hold the truth in simulations.\n")
    rows["hold the truth in simulations"] = shares[1:]
    print_table(rows, "area", "by t, seeds as the unit", "bootstrap")


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
    print_levels()
    print_tasks()
    draw()
