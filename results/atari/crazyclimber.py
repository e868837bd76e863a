"""The authors' comparison on CrazyClimber, taken in two steps: table, figure, what speaks to claim
5, predictions.

python -m results.atari.crazyclimber
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from analysis.compare import cells_of, difference
from analysis.measures import FIVE, LAST, TRAINING
from results.common import bars, corrected_suite, estimate_table, mean, read
from results.comparisons import Comparison, includes_0

HERE = Path(__file__).parent
METHODS = {  # --exp-name: label
    "ppo-authors": "PPO, not\nnormalised",
    "ppo": "PPO,\nnormalised",
    "sppo": "SPPO,\nnormalised",
}
STEPS = {  # method, and what it is compared with
    "normalisation": ("ppo", "ppo-authors"),
    "loss": ("sppo", "ppo"),
    "both": ("sppo", "ppo-authors"),
}
MEASURES = {
    TRAINING: "training",
    FIVE: "mean of five evaluations",  # all that these runs have
    LAST: "last evaluation",
}


def relative_scores(measure):
    """{method: scores (seeds,)}, relative to PPO's mean without normalisation."""
    cell = cells_of(read("atari/crazyclimber"), measure)["CrazyClimber", "clean"]
    return {method: cell[method] / cell["ppo-authors"].mean() for method in METHODS}


def steps(measure):
    scores = relative_scores(measure)
    return {name: difference(scores[a], scores[b]) for name, (a, b) in STEPS.items()}


def measures():
    return estimate_table("", {title: steps(measure) for measure, title in MEASURES.items()})


def comparisons():
    page = "atari/README.md#crazyclimber-eight-seeds"
    suite = corrected_suite("atari/crazyclimber")
    for measure, title in MEASURES.items():
        p = suite[(measure, "CrazyClimber", "clean", frozenset(["sppo", "ppo"]))]
        found = steps(measure)["loss"]
        yield Comparison("5", "CrazyClimber", page, found, 8, measure=title, corrected=p)


def predictions():
    found = steps(TRAINING)
    return {
        "crazyclimber-normalisation": found["normalisation"].low > 0,
        "crazyclimber-loss": includes_0(found["loss"]),
        "crazyclimber-both": found["both"].low > 0,
    }


def quoted_ratio():
    """SPPO's score to PPO's in the review's, and its error if their ± are standard errors."""
    game = pd.read_csv(HERE / "quoted.csv", index_col="game").loc["CrazyClimber"]
    ratio = game["sppo"] / game["ppo"]
    error_of_sppo = game["sppo_plus_minus"] / game["sppo"]
    error_of_ppo = game["ppo_plus_minus"] / game["ppo"]
    return ratio, ratio * np.hypot(error_of_sppo, error_of_ppo)


def draw():
    """Each seed's mean of five evaluations, and the means, from the authors' PPO to SPPO."""
    scores = relative_scores(FIVE)
    middle, half = bars([mean(scores[method]) for method in METHODS])
    x = np.arange(len(METHODS))
    ratio, error = quoted_ratio()
    figure, ax = plt.subplots(figsize=(5, 3.2), layout="constrained")
    ax.plot(x, list(scores.values()), "o", color="tab:blue", alpha=0.4)
    ax.errorbar(x, middle, half, marker="s", color="tab:blue", label="here")
    label = "the paper's, from a review"
    ax.errorbar(2, ratio, error, fmt="kx", markersize=9, zorder=3, label=label)
    ax.set_xticks(x, METHODS.values())
    ax.set_ylabel("mean of five evaluations,\nrelative to PPO, not normalised")
    ax.legend()
    figure.savefig(HERE / "crazyclimber.png", dpi=170)


if __name__ == "__main__":
    plt.switch_backend("agg")
    print(measures())
    print("quoted: {:.3f} ± {:.3f}".format(*quoted_ratio()))
    draw()
