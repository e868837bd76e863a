"""The sweep over learning rate and clip range: tables, figure, what speaks to claim 8, prediction.

python -m results.robustness.sweep
"""

from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from analysis.measures import FIVE
from analysis.methods import COLORS
from analysis.tables import markdown
from results.common import (
    HOPPER,
    LANDER,
    MEASURES,
    NOISES,
    above_floors,
    estimate_text,
    packed,
    read,
    short,
)
from results.comparisons import Comparison, Interval, includes_0

TASKS = [HOPPER, LANDER]
METHODS = ["dppo", "sppo"]
RATES = [0.0001, 0.0003, 0.001]
CLIPS = [0.1, 0.2, 0.3]
SAMPLES = 10_000  # of a registered bootstrap interval
MEAN_SHARE = "A, mean relative score"
METRICS = """losses/approx_kl losses/clipfrac losses/clipped_gradients losses/entropy
losses/explained_variance losses/grad_norm""".split()


def name_of(method, rate, clip):
    return f"{method}-lr{rate:g}-clip{clip:g}"


def normal():
    """5th to 95th percentile of metrics over all evaluations with the default settings."""
    runs, progress = packed("robustness/sweep")
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


def resampled_means(scores):
    """Means (..., settings, 1 + SAMPLES) of `scores` (..., settings, seeds): the estimate, then
    those of resampled seeds, the same for all settings."""
    *cells, _, seeds = scores.shape
    rng = np.random.default_rng(0)
    drawn = rng.integers(seeds, size=(*cells, 1, SAMPLES, seeds))
    samples = np.take_along_axis(scores[..., None, :], drawn, axis=-1).mean(axis=-1)
    return np.concatenate([scores.mean(axis=-1, keepdims=True), samples], axis=-1)


def samples_of_measures():
    """{measure: (methods, 1 + SAMPLES)}, averaged over tasks and rewards. Scores are the last five
    evaluations above the task's floor."""
    names = [name_of(*setting) for setting in product(METHODS, RATES, CLIPS)]
    scores = above_floors(read("robustness/sweep"), FIVE, TASKS, NOISES, names)
    shape = [len(TASKS), len(NOISES), len(METHODS), len(RATES) * len(CLIPS), -1]
    means = resampled_means(scores.reshape(shape))
    shares = means / means.max(axis=-2, keepdims=True)  # of the best setting
    found = {MEAN_SHARE: shares, "B, share of settings at 0.8 or more": shares >= 0.8}
    return {title: x.mean(axis=-2).mean(axis=(0, 1)) for title, x in found.items()}


def sppo_minus_dppo(samples):
    differences = samples[1] - samples[0]
    return Interval(differences[0], *np.quantile(differences[1:], [0.025, 0.975]))


def measures():
    rows = []
    for title, samples in samples_of_measures().items():
        methods = [f"{estimate:.2f}" for estimate in samples[:, 0]]
        rows.append([title, *methods, estimate_text(sppo_minus_dppo(samples))])
    return markdown(["measure", "DPPO", "SPPO", "SPPO minus DPPO"], rows)


def comparisons():
    page = "robustness/README.md#learning-rate-and-clip-range"
    name = "three learning rates times three clip ranges"
    found = sppo_minus_dppo(samples_of_measures()[MEAN_SHARE])
    yield Comparison("8", name, page, found, 4, tasks=2, measure=MEASURES[FIVE])


def predictions():
    found = sppo_minus_dppo(samples_of_measures()[MEAN_SHARE])
    return {"sweep-mean": abs(found.value) < 0.1 and includes_0(found)}


def draw():
    """A row for each task and kind of rewards, a column for each clip range."""
    settings = {}
    for method, rate, clip in product(METHODS, RATES, CLIPS):
        settings[name_of(method, rate, clip)] = [method.upper(), rate, clip]
    columns = ["variant", "learning rate", "clip range"]
    settings = pd.DataFrame.from_dict(settings, orient="index", columns=columns)
    scores = read("robustness/sweep").query("measure == @FIVE").join(settings, on="method")
    scores["cell"] = scores["task"].map(short) + ", " + scores["noise"].map(NOISES)
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
