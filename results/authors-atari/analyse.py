"""Measures and figure of the authors' comparison on Atari, taken in two steps.

python results/authors-atari/analyse.py
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from scipy import stats

HERE = Path(__file__).parent
METHODS = {  # --exp-name: label
    "ppo-authors": "PPO, not\nnormalised",
    "ppo": "PPO,\nnormalised",
    "sppo": "SPPO,\nnormalised",
}
STEPS = {  # weights of the methods' means
    "normalisation": {"ppo": 1, "ppo-authors": -1},
    "loss": {"sppo": 1, "ppo": -1},
    "both": {"sppo": 1, "ppo-authors": -1},
    "normalisation minus loss": {"ppo": 2, "ppo-authors": -1, "sppo": -1},
}
QUOTED = 103588 / 86764  # SPPO's mean over PPO's in the review 9oq0iY2Jxx on OpenReview
MEASURES = {
    "training": "training",
    "last5": "last five evaluations",
    "return_mean": "last evaluation",
}


def relative_scores(measure):
    """Scores (seeds x methods), relative to PPO's mean without normalisation."""
    runs = pd.read_csv(HERE / "runs.csv.gz").query("finished")
    progress = pd.read_csv(HERE / "progress.csv.gz")
    evaluations = progress.groupby("run_name")["return_mean"]
    runs["last5"] = runs["run_name"].map(evaluations.mean())  # of five, which are all there are
    table = runs.pivot(index="seed", columns="exp_name", values=measure)
    return table / table["ppo-authors"].mean()


def contrast(scores, weights):
    """Weighted sum of methods' means, and its standard error and degrees of freedom by Welch and
    Satterthwaite."""
    value = sum(weight * scores[method].mean() for method, weight in weights.items())
    variances = [(weight * scores[method].sem()) ** 2 for method, weight in weights.items()]
    freedom = sum(variances) ** 2 / np.sum(np.square(variances) / (len(scores) - 1))
    return value, np.sqrt(sum(variances)), freedom


def estimate(value, error, freedom):
    half = error * stats.t.ppf(0.975, freedom)
    value, low, high = np.round([value, value - half, value + half], 2) + 0.0  # no -0.00
    return f"{value:.2f} ({low:.2f} to {high:.2f})"


def print_measures():
    print(f"| | {' | '.join(STEPS)} |\n|---|---|---|---|---|")
    for measure, title in MEASURES.items():
        scores = relative_scores(measure)
        cells = [estimate(*contrast(scores, weights)) for weights in STEPS.values()]
        print(f"| {title} | {' | '.join(cells)} |")


def print_power():
    """p, and what is detected with 80 % power, by t."""
    for measure, title in MEASURES.items():
        scores = relative_scores(measure)
        for name, weights in STEPS.items():
            value, error, freedom = contrast(scores, weights)
            p = 2 * stats.t.sf(abs(value) / error, freedom)
            detected = error * stats.t.ppf([0.975, 0.8], freedom).sum()
            print(f"{title}, {name}: p {p:.3f}, detects {detected:.2f}")


def draw():
    """Each seed's training score, and the means, from the authors' PPO to SPPO."""
    scores = relative_scores("training")[list(METHODS)]
    x = np.arange(len(METHODS))
    figure, ax = plt.subplots(figsize=(5, 3.2), layout="constrained")
    ax.plot(x, scores.T, "o", color="tab:blue", alpha=0.4)
    half = scores.sem() * stats.t.ppf(0.975, len(scores) - 1)
    ax.errorbar(x, scores.mean(), half, marker="s", color="tab:blue", label="here, training")
    ax.plot([0, 2], [1, QUOTED], "kx", markersize=9, zorder=3, label="quoted from the paper")
    ax.set_xticks(x, METHODS.values())
    ax.set_ylabel("score relative to\nPPO, not normalised")
    ax.legend()
    figure.savefig(HERE / "steps.png", dpi=170)


if __name__ == "__main__":
    plt.switch_backend("agg")
    print_measures()
    print_power()
    draw()
