"""Table, predictions' measures and figure of the sweep over learning rate and clip range.

python results/sweep/analyse.py
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

HERE = Path(__file__).parent
FLOOR = {"Hopper-v4": 0, "LunarLanderContinuous-v3": -200}
RATES = [0.0001, 0.0003, 0.001]
CLIPS = [0.1, 0.2, 0.3]
SAMPLES = 10_000


def read():
    runs = pd.read_csv(HERE / "runs.csv.gz")
    runs["method"] = runs["exp_name"].str.partition("-")[0]
    runs["rewards"] = runs["noise"].replace({"none": "clean", "normal": "noisy"})
    return runs.rename(columns={"env_id": "task", "last5": "score"})


def scores_of(runs):
    """{(task, rewards, method): scores (seeds, learning rates, clip ranges)}."""
    cells = {}
    for cell, group in runs.groupby(["task", "rewards", "method"]):
        index = pd.MultiIndex.from_product([sorted(group["seed"].unique()), RATES, CLIPS])
        scores = group.set_index(["seed", "learning_rate", "clip_coef"])["score"][index]
        cells[cell] = scores.to_numpy().reshape(-1, len(RATES), len(CLIPS))
    return cells


def relative(scores, task):
    """Relative scores (..., settings) of scores (..., learning rates, clip ranges)."""
    above = scores.reshape(*scores.shape[:-2], -1) - FLOOR[task]
    return above / above.max(axis=-1, keepdims=True)


def resampled(scores, rng):
    """Means over resampled seeds (SAMPLES, learning rates, clip ranges)."""
    drawn = rng.integers(len(scores), size=(SAMPLES, len(scores)))
    return scores[drawn].mean(axis=1)


def print_measures(cells):
    """Both measures, averaged over cells, of each method and of SPPO minus DPPO."""
    rng = np.random.default_rng(0)
    statistics = {
        "A, mean relative score": lambda x: x.mean(axis=-1),
        "B, share of settings at 0.8 or more": lambda x: (x >= 0.8).mean(axis=-1),
    }
    values = {}
    samples = {}
    for (task, rewards, method), scores in cells.items():
        of_samples = relative(resampled(scores, rng), task)
        for name, statistic in statistics.items():
            for kind in ("all", rewards):
                key = (name, kind, method)
                values.setdefault(key, []).append(statistic(relative(scores.mean(0), task)))
                samples.setdefault(key, []).append(statistic(of_samples))
    print("| measure | rewards | DPPO | SPPO | SPPO minus DPPO |\n|---|---|---|---|---|")
    for name in statistics:
        for kind in ("all", "clean", "noisy"):
            texts = []
            of_method = {}
            for method in ("dppo", "sppo"):
                key = (name, kind, method)
                of_method[method] = np.mean(values[key]), np.mean(samples[key], axis=0)
                texts.append(estimate(*of_method[method]))
            difference = np.subtract(of_method["sppo"][0], of_method["dppo"][0])
            of_samples = of_method["sppo"][1] - of_method["dppo"][1]
            texts.append(estimate(difference, of_samples))
            print(f"| {name} | {kind} | {' | '.join(texts)} |")


def estimate(value, samples):
    low, high = np.quantile(samples, [0.025, 0.975])
    return f"{value:.2f} ({low:.2f} to {high:.2f})"


def print_main_effects(cells):
    """Scores by learning rate, averaged over clip ranges, and the other way round."""
    columns = [*(f"rate {rate:g}" for rate in RATES), *(f"clip {clip}" for clip in CLIPS)]
    print(f"| task | rewards | method | {' | '.join(columns)} |\n|{'---|' * 9}")
    for cell, scores in cells.items():
        means = scores.mean(axis=0)
        effects = [*means.mean(axis=1), *means.mean(axis=0)]
        print(f"| {' | '.join(cell)} | {' | '.join(f'{x:,.0f}' for x in effects)} |")


def print_settings(cells):
    """Mean ± standard error over seeds of every setting."""
    settings = [f"{rate:g}, {clip}" for rate in RATES for clip in CLIPS]
    print(f"| task | rewards | method | {' | '.join(settings)} |\n|{'---|' * 12}")
    for cell, scores in cells.items():
        means = scores.mean(axis=0).flatten()
        errors = scores.std(axis=0, ddof=1).flatten() / len(scores) ** 0.5
        texts = [f"{mean:,.0f} ± {error:,.0f}" for mean, error in zip(means, errors)]
        print(f"| {' | '.join(cell)} | {' | '.join(texts)} |")


def draw(runs):
    """A row for each task and kind of rewards, a column for each clip range."""
    runs = runs.assign(cell=runs["task"].str.partition("-")[0] + ", " + runs["rewards"])
    runs["method"] = runs["method"].str.upper()
    grid = sns.relplot(
        runs.rename(columns={"clip_coef": "clip range"}),
        kind="line",
        x="learning_rate",
        y="score",
        hue="method",
        palette={"DPPO": "tab:green", "SPPO": "tab:blue"},  # as in report.py
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
        axes[0].set_ylabel(cell.replace("Continuous", "") + "\nscore")
    grid.savefig(HERE / "sweep.png", dpi=160)


if __name__ == "__main__":
    plt.switch_backend("agg")
    runs = read()
    cells = scores_of(runs)
    print_measures(cells)
    print()
    print_main_effects(cells)
    print()
    print_settings(cells)
    draw(runs)
