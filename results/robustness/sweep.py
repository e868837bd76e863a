"""Measures, predictions' table and figure of the sweep over learning rate and clip range.

python results/robustness/sweep.py
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns

sys.path.append(str(Path(__file__).parents[1]))
from common import SAMPLES, estimate, in_percent, percent, print_table, read, scores_of, short

from report import COLORS

HERE = Path(__file__).parent
TASKS = ["Hopper-v4", "LunarLanderContinuous-v3"]
REWARDS = {"none": "clean", "normal": "noisy"}
METHODS = ["dppo", "sppo"]
RATES = [0.0001, 0.0003, 0.001]
CLIPS = [0.1, 0.2, 0.3]
SHARES = {
    "A, mean relative score": lambda x: x.mean(axis=-1),
    "B, share of settings at 0.8 or more": lambda x: (x >= 0.8).mean(axis=-1),
}


def read_runs():
    runs, _ = read("robustness/sweep")
    return runs.assign(method=runs["exp_name"].str.partition("-")[0])


def scores_above(runs):
    """Last five evaluations above the task's floor (tasks, rewards, methods, settings, seeds)."""
    axes = {"learning_rate": RATES, "clip_coef": CLIPS}
    scores = scores_of(runs, "last5", env_id=TASKS, noise=REWARDS, method=METHODS, **axes)
    return scores.reshape(*scores.shape[:3], -1, scores.shape[-1])


def relative(means):
    """To the best setting; `means`: (..., settings)."""
    return means / means.max(axis=-1, keepdims=True)


def resampled(scores, rng):
    """Means over resampled seeds (SAMPLES, settings) of scores (settings, seeds)."""
    seeds = scores.shape[-1]
    drawn = rng.integers(seeds, size=(SAMPLES, seeds))
    return scores.T[drawn].mean(axis=1)


def print_measures():
    """Both measures, averaged over cells, of each method and of SPPO minus DPPO."""
    rng = np.random.default_rng(0)
    scores = scores_above(read_runs())
    *cells, _, _ = scores.shape
    shares = np.empty((*cells, 1 + SAMPLES, scores.shape[3]))
    for cell in np.ndindex(*cells):
        shares[cell][0] = relative(scores[cell].mean(axis=-1))
        shares[cell][1:] = relative(resampled(scores[cell], rng))
    rows = {}
    for name, statistic in SHARES.items():
        by_rewards = statistic(shares).mean(axis=0)
        dppo, sppo = by_rewards.mean(axis=0)
        rows[name] = [bootstrapped(samples) for samples in (dppo, sppo, sppo - dppo)]
        for rewards, (dppo, sppo) in zip(REWARDS.values(), by_rewards):
            found = map(bootstrapped, (dppo, sppo, sppo - dppo))
            print("{}, {}: DPPO {}, SPPO {}, difference {}".format(name, rewards, *found))
    print()
    print_table(rows, "measure", "DPPO", "SPPO", "SPPO minus DPPO")


def bootstrapped(samples):
    return estimate(samples[0], *np.quantile(samples[1:], [0.025, 0.975]))


def print_percent():
    """SPPO to DPPO at the same setting: ratios, pooled over 36 or 18 cells without their bias."""
    scores = scores_above(read_runs())
    parts = {"all": scores, "clean": scores[:, :1], "noisy": scores[:, 1:]}
    for rewards, part in parts.items():
        dppo, sppo = part.swapaxes(0, 2).reshape(2, -1, part.shape[-1])
        print(f"SPPO to DPPO, {rewards}: {in_percent(*percent(zip(sppo, dppo)))}")


def print_main_effects():
    """Scores by learning rate, averaged over clip ranges, and the other way round."""
    scores = scores_above(read_runs()).mean(axis=-1)
    rows = {}
    for i, task in enumerate(TASKS):
        for j, rewards in enumerate(REWARDS.values()):
            for k, method in enumerate(METHODS):
                means = scores[i, j, k].reshape(len(RATES), len(CLIPS))
                effects = [*means.mean(axis=1), *means.mean(axis=0)]
                name = f"{short(task)}, {rewards}, {method}"
                rows[name] = [f"{effect:,.0f}" for effect in effects]
    columns = [*(f"rate {rate:g}" for rate in RATES), *(f"clip {clip}" for clip in CLIPS)]
    print_table(rows, "above the floor", *columns)


def draw():
    """A row for each task and kind of rewards, a column for each clip range."""
    runs = read_runs()
    runs["cell"] = runs["env_id"].map(short) + ", " + runs["noise"].map(REWARDS)
    runs["method"] = runs["method"].str.upper()
    grid = sns.relplot(
        runs.rename(columns={"clip_coef": "clip range", "last5": "score"}),
        kind="line",
        x="learning_rate",
        y="score",
        hue="method",
        hue_order=["DPPO", "SPPO"],
        palette={method.upper(): COLORS[method] for method in METHODS},
        col="clip range",
        row="cell",
        errorbar="se",
        err_style="bars",
        marker="o",
        height=1.8,
        aspect=1.5,
        facet_kws={"sharey": "row"},
    )
    grid.set(xscale="log", xticks=RATES, xticklabels=RATES)
    grid.set_titles("clip range {col_name}")
    grid.set_xlabels("learning rate")
    for cell, axes in zip(grid.row_names, grid.axes):
        axes[0].set_ylabel(f"{cell}\nscore")
    grid.savefig(HERE / "sweep.png", dpi=160)


if __name__ == "__main__":
    plt.switch_backend("agg")
    print_measures()
    print_percent()
    print_main_effects()
    draw()
