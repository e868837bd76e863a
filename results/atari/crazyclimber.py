"""The authors' comparison on CrazyClimber, taken in two steps."""

from analysis.compare import difference
from analysis.measures import FIVE, LAST, TRAINING
from results.common import cells, corrected_suite, estimate_table
from results.verdicts import Comparison

PAGE = "atari/README.md#crazyclimber-eight-seeds"
PACK = "atari/crazyclimber"
PLACE = ("CrazyClimber", "clean")
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
    cell = cells(PACK, measure)[PLACE]
    shares = {method: scores / cell["ppo-authors"].mean() for method, scores in cell.items()}
    return {name: difference(shares[a], shares[b]) for name, (a, b) in STEPS.items()}


def measures():
    return estimate_table("", {title: steps(measure) for measure, title in MEASURES.items()})


def comparisons():
    for measure, title in MEASURES.items():
        p = corrected_suite(PACK)[(measure, *PLACE), frozenset(["sppo", "ppo"])]
        found = steps(measure)["loss"]
        yield Comparison("5", "CrazyClimber", PAGE, found, 8, measure=title, p=p)
