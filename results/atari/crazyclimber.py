"""The authors' comparison on CrazyClimber, taken in two steps: table, what speaks to claim 5,
predictions."""

from analysis.compare import cells_of, difference
from analysis.measures import FIVE, LAST, TRAINING
from results.common import corrected_suite, estimate_table, read
from results.comparisons import Comparison, includes_0

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


def steps(measure):
    """Shares of PPO's mean without normalisation, which counts as known."""
    cell = cells_of(read("atari/crazyclimber"), measure)["CrazyClimber", "clean"]
    shares = {method: scores / cell["ppo-authors"].mean() for method, scores in cell.items()}
    return {name: difference(shares[a], shares[b]) for name, (a, b) in STEPS.items()}


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
