"""Measures and figure of the authors' comparison on CrazyClimber, taken in two steps.

python -m results.atari.crazyclimber
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from analysis.compare import cells_of, contrast
from analysis.measures import FIVE, LAST, TRAINING
from results.common import estimate_table, mean, read

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
    found = {}
    for name, weights in STEPS.items():
        samples = [scores[method] for method in weights]
        found[name] = contrast(samples, list(weights.values()))
    return found


def measures():
    return estimate_table("", {title: steps(measure) for measure, title in MEASURES.items()})


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
    found = [mean(scores[method]) for method in METHODS]
    middle = [estimate.value for estimate in found]
    half = [estimate.half_width() for estimate in found]
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
