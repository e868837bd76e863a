"""Measures and figure of the sweep over learning rate and clip range.

python -m results.robustness.sweep
"""

from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

from analysis.measures import FIVE
from analysis.methods import COLORS
from analysis.runs import read_pack
from analysis.tables import interval_text, markdown
from results.common import (
    HOPPER,
    LANDER,
    above_floors,
    bootstrapped,
    read,
    resampled_means,
    short,
)

TASKS = [HOPPER, LANDER]
REWARDS = {"clean": "clean", "normal 0.05": "noisy"}
METHODS = ["dppo", "sppo"]
RATES = [0.0001, 0.0003, 0.001]
CLIPS = [0.1, 0.2, 0.3]
METRICS = """losses/approx_kl losses/clipfrac losses/clipped_gradients losses/entropy
losses/explained_variance losses/grad_norm""".split()


def name_of(method, rate, clip):
    return f"{method}-lr{rate:g}-clip{clip:g}"


def scores_above():
    """Last five evaluations above the task's floor (tasks, rewards, methods, settings, seeds)."""
    names = [name_of(*setting) for setting in product(METHODS, RATES, CLIPS)]
    scores = above_floors(read("robustness/sweep"), FIVE, TASKS, REWARDS, names)
    return scores.reshape(len(TASKS), len(REWARDS), len(METHODS), len(RATES) * len(CLIPS), -1)


def normal():
    """5th to 95th percentile of metrics over all evaluations with the default settings."""
    runs, progress = read_pack(Path(__file__).with_name("sweep-runs.csv.gz"))
    columns = []
    for method in METHODS:
        names = runs["run_name"][runs["exp_name"] == name_of(method, 0.0003, 0.2)]
        evaluations = progress[progress["run_name"].isin(names)]
        columns.append(evaluations.quantile([0.05, 0.95], numeric_only=True))
    rows = []
    for metric in METRICS:
        cells = [f"{low:.2g} to {high:.2g}" for low, high in (c[metric] for c in columns)]
        rows.append([f"`{metric}`", *cells])
    return markdown(["", "DPPO", "SPPO"], rows)


def mean_share(shares):
    return shares.mean(axis=-2)


def share_of_good(shares):
    return (shares >= 0.8).mean(axis=-2)


MEASURES = {
    "A, mean relative score": mean_share,
    "B, share of settings at 0.8 or more": share_of_good,
}


def measures():
    """Averaged over tasks and rewards, of each method and of SPPO minus DPPO."""
    means = resampled_means(scores_above())
    shares = means / means.max(axis=-2, keepdims=True)  # of the best setting
    rows = []
    for title, measure in MEASURES.items():
        dppo, sppo = measure(shares).mean(axis=(0, 1))
        difference = interval_text(*bootstrapped(sppo - dppo), 2)
        rows.append([title, f"{dppo[0]:.2f}", f"{sppo[0]:.2f}", difference])
    return markdown(["measure", "DPPO", "SPPO", "SPPO minus DPPO"], rows)


def difference_in_share():
    """SPPO minus DPPO in measure A, with its bootstrap interval."""
    means = resampled_means(scores_above())
    shares = means / means.max(axis=-2, keepdims=True)
    dppo, sppo = mean_share(shares).mean(axis=(0, 1))
    return bootstrapped(sppo - dppo)


def draw():
    """A row for each task and kind of rewards, a column for each clip range."""
    settings = {}
    for method, rate, clip in product(METHODS, RATES, CLIPS):
        settings[name_of(method, rate, clip)] = [method.upper(), rate, clip]
    columns = ["variant", "learning rate", "clip range"]
    settings = pd.DataFrame.from_dict(settings, orient="index", columns=columns)
    scores = read("robustness/sweep").query("measure == @FIVE").join(settings, on="method")
    scores["cell"] = scores["task"].map(short) + ", " + scores["noise"].map(REWARDS)
    grid = sns.relplot(
        scores,
        kind="line",
        x="learning rate",
        y="score",
        hue="variant",
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
    for cell, axes in zip(grid.row_names, grid.axes):
        axes[0].set_ylabel(f"{cell}\nscore")
    grid.legend.set_title("")
    grid.savefig(Path(__file__).with_suffix(".png"), dpi=160)


if __name__ == "__main__":
    plt.switch_backend("agg")
    print(measures())
    draw()
