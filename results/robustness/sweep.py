"""The sweep over learning rate and clip range, two tasks."""

from itertools import product

import numpy as np
import pandas as pd

from analysis.measures import FIVE
from analysis.tables import markdown
from results.common import (
    HOPPER,
    LANDER,
    MEASURES,
    NOISES,
    above_floors,
    estimate_text,
    packed,
)
from results.verdicts import Comparison, Interval

PACK = "robustness/sweep"
TASKS = [HOPPER, LANDER]
METHODS = ["dppo", "sppo"]
RATES = [0.0001, 0.0003, 0.001]
CLIPS = [0.1, 0.2, 0.3]
SETTINGS = [f"{x}-lr{rate:g}-clip{clip:g}" for x, rate, clip in product(METHODS, RATES, CLIPS)]
SAMPLES = 10_000  # of a registered bootstrap interval
MEAN_SHARE = "A, mean relative score"
METRICS = """losses/approx_kl losses/clipfrac losses/clipped_gradients losses/entropy
losses/explained_variance losses/grad_norm""".split()


def normal():
    """5th to 95th percentile of metrics over all evaluations with the default settings."""
    runs, progress = packed(PACK)
    columns = {}
    for name in ["dppo-lr0.0003-clip0.2", "sppo-lr0.0003-clip0.2"]:
        evaluations = progress[
            progress["run_name"].isin(runs["run_name"][runs["exp_name"] == name])
        ]
        low, high = (evaluations[METRICS].quantile(q).map("{:.2g}".format) for q in (0.05, 0.95))
        columns[name] = low + " to " + high
    rows = [[f"`{metric}`", *texts] for metric, *texts in pd.DataFrame(columns).itertuples()]
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
    scores = above_floors(PACK, FIVE, TASKS, NOISES, SETTINGS)
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
    options = {"seeds": 4, "tasks": 2, "measure": MEASURES[FIVE], "matters": 0.1}
    yield Comparison("8", name, page, found, **options)
