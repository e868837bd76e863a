"""Measures and figure of the authors' comparison on CrazyClimber, taken in two steps.

python results/atari/crazyclimber.py
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from scipy import stats

sys.path.append(str(Path(__file__).parents[1]))
from common import detected, estimate, print_table, read

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
MEASURES = {
    "training": "training",
    "last5": "mean of five evaluations",  # all that these runs have
    "return_mean": "last evaluation",
}


def relative_scores(measure):
    """Scores (seeds x methods), relative to PPO's mean without normalisation."""
    runs, _ = read("atari/crazyclimber")
    table = runs.pivot(index="seed", columns="exp_name", values=measure)
    return table / table["ppo-authors"].mean()


def contrast(scores, weights):
    """Weighted sum of methods' means, and its standard error and degrees of freedom by Welch and
    Satterthwaite."""
    value = sum(weight * scores[method].mean() for method, weight in weights.items())
    variances = [(weight * scores[method].sem()) ** 2 for method, weight in weights.items()]
    freedom = sum(variances) ** 2 / np.sum(np.square(variances) / (len(scores) - 1))
    return value, np.sqrt(sum(variances)), freedom


def print_measures():
    rows = {}
    for measure, title in MEASURES.items():
        rows[title] = []
        for weights in STEPS.values():
            value, error, freedom = contrast(relative_scores(measure), weights)
            half = error * stats.t.ppf(0.975, freedom)
            rows[title].append(estimate(value, value - half, value + half))
    print_table(rows, "", *STEPS)


def print_power():
    """p, and what is detected."""
    for measure, title in MEASURES.items():
        scores = relative_scores(measure)
        print(f"{title}: deviation over seeds", *(scores.std() / scores.mean()).round(3))
        for name, weights in STEPS.items():
            value, error, freedom = contrast(scores, weights)
            p = 2 * stats.t.sf(abs(value) / error, freedom)
            print(f"{title}, {name}: p {p:.4f}, detects {detected(error, freedom):.2f}")


def quoted_ratio():
    """SPPO's score to PPO's in the review's, and its error if their ± are standard errors."""
    game = pd.read_csv(HERE / "quoted.csv", index_col="game").loc["CrazyClimber"]
    ratio = game["sppo"] / game["ppo"]
    relative = np.hypot(
        game["sppo_plus_minus"] / game["sppo"], game["ppo_plus_minus"] / game["ppo"]
    )
    return ratio, ratio * relative


def draw():
    """Each seed's mean of five evaluations, and the means, from the authors' PPO to SPPO."""
    scores = relative_scores("last5")[list(METHODS)]
    ratio, error = quoted_ratio()
    x = np.arange(len(METHODS))
    figure, ax = plt.subplots(figsize=(5, 3.2), layout="constrained")
    ax.plot(x, scores.T, "o", color="tab:blue", alpha=0.4)
    half = scores.sem() * stats.t.ppf(0.975, len(scores) - 1)
    ax.errorbar(x, scores.mean(), half, marker="s", color="tab:blue", label="here")
    ax.errorbar(
        2, ratio, error, fmt="kx", markersize=9, zorder=3, label="the paper's, from a review"
    )
    ax.set_xticks(x, METHODS.values())
    ax.set_ylabel("mean of five evaluations,\nrelative to PPO, not normalised")
    ax.legend()
    figure.savefig(HERE / "crazyclimber.png", dpi=170)


if __name__ == "__main__":
    plt.switch_backend("agg")
    print_measures()
    print_power()
    print("quoted: {:.3f} ± {:.3f}".format(*quoted_ratio()))
    draw()
