"""A million steps of three tasks, and of HalfCheetah and Walker2d (the pack locomotion)."""

import numpy as np

from analysis.compare import mean_and_variance, pooled_difference
from analysis.runs import CELL
from analysis.tables import markdown
from results.common import HOPPER, LANDER, NOISES, PENDULUM, cells, read, score_table, short
from results.verdicts import Comparison, Interval, in_points

PAGE = "control/README.md#a-million-steps-three-tasks-eight-seeds"
PACKS = {
    "control/three-tasks": [HOPPER, PENDULUM, LANDER],
    "control/locomotion": ["HalfCheetah-v4", "Walker2d-v4"],
}
LOSS = ("sppo", "dppo")
COLUMNS = ["ppo", "dppo", "sppo", LOSS, ("dppo", "ppo")]


def scores():
    rows = {}
    for pack, tasks in PACKS.items():
        for task in tasks:
            for noise, rewards in NOISES.items():
                rows[f"{short(task)}, {rewards}"] = cells(pack)[task, noise]
    return score_table("task", rows, COLUMNS)


def shares():
    """Lowest and highest mean share over methods, tasks and kinds of noise."""
    clipped, changes = "losses/clipped_gradients:all", "losses/norm_sign_changes:all"
    scores = read("control/three-tasks", clipped, changes)
    low_k = read("control/k", clipped).query("method == 'k0.2'")
    rows = []
    for title, chosen, metric in [
        ("updates that are clipped", scores, clipped),
        ("the same, k = 0.2", low_k, clipped),
        ("advantages whose sign changes in normalisation", scores, changes),
    ]:
        means = 100 * chosen[chosen["measure"] == metric].groupby(CELL)["score"].mean()
        rows.append([title, f"{means.min():.0f} %", f"{means.max():.0f} %"])
    return markdown(["share", "lowest", "highest"], rows)


def log_mean_and_variance(scores):
    """The logarithm of the mean, above 0, of `scores` (..., runs), and its variance: (...,) each.
    The logarithm of a sample's mean is too low on average. The added term is the bias, exact if the
    mean is lognormal. Variances are too small where means are too large, hence `1 +`."""
    average, variance = mean_and_variance(scores)
    relative = variance / average**2
    return np.log(average) + np.log1p(relative) / 2, relative * (1 + relative)


def relative_gain(noise):
    """On Hopper and InvertedDoublePendulum, whose returns are above 0."""
    of_tasks = [cells("control/three-tasks")[task, noise] for task in [HOPPER, PENDULUM]]
    pairs = [(cell["sppo"], cell["dppo"]) for cell in of_tasks]
    found = pooled_difference(pairs, log_mean_and_variance)
    return Interval(*np.expm1([found.value, found.low, found.high]))


def comparisons():
    for claim, noise in zip(["1", "2"], NOISES):
        name = "Hopper and InvertedDoublePendulum"
        yield Comparison(claim, name, PAGE, relative_gain(noise), seeds=8, tasks=2)
        for pack, tasks in PACKS.items():
            for task in tasks:
                if task not in [HOPPER, PENDULUM]:
                    name = short(task)
                    yield in_points(claim, name, PAGE, pack, (task, noise), LOSS)
