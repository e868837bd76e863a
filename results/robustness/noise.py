"""Five levels of noise, three tasks."""

import numpy as np

from analysis.compare import difference, pooled_difference
from analysis.measures import FIVE
from analysis.methods import COLORS
from analysis.tables import markdown
from results.common import (
    HOPPER,
    LANDER,
    MEASURES,
    PENDULUM,
    RESULTS,
    above_floors,
    draw_panels,
    estimate_text,
    panels_of,
)
from results.verdicts import Comparison

TASKS = [HOPPER, PENDULUM, LANDER]
LEVELS = {"clean": 0, "normal 0.05": 0.05, "normal 0.1": 0.1, "normal 0.2": 0.2, "normal 0.5": 0.5}
METHODS = {"ppo": "Gaussian PPO", "dppo": "DPPO", "sppo": "SPPO"}
PAIRS = [("sppo", "dppo"), ("dppo", "ppo"), ("sppo", "ppo")]


def shares():
    """Last five evaluations above the task's floor, as shares of clean DPPO's mean, which counts as
    known: (tasks, methods, levels, seeds)."""
    scores = above_floors("robustness/noise", FIVE, TASKS, LEVELS, METHODS).swapaxes(1, 2)
    return scores / scores[:, [1], :1].mean(axis=-1, keepdims=True)


def of_methods():
    """{method: (tasks, levels, seeds)}"""
    return dict(zip(METHODS, shares().swapaxes(0, 1)))


def area_difference(a, b):
    """In the mean over levels. The unit is the seed: a seed's share is its mean over tasks."""
    return difference(a.mean(axis=(0, 1)), b.mean(axis=(0, 1)))


def level_differences(a, b):
    """At each level, averaged over tasks."""
    return [pooled_difference(list(zip(a[:, i], b[:, i]))) for i in range(len(LEVELS))]


def measures():
    """Averaged over the tasks: methods' means, and differences by Welch's t."""
    scores = of_methods()
    rows = []
    for method, title in METHODS.items():
        of_levels = scores[method].mean(axis=(0, 2))
        rows.append([title, *(f"{x:.2f}" for x in [of_levels.mean(), *of_levels])])
    for pair in PAIRS:
        a, b = (scores[method] for method in pair)
        found = [area_difference(a, b), *level_differences(a, b)]
        title = " minus ".join(METHODS[method] for method in pair)
        rows.append([title, *map(estimate_text, found)])
    return markdown(["", "area", *LEVELS.values()], rows)


def comparisons():
    page = "robustness/README.md#score-against-the-level-of-noise"
    scores = of_methods()
    found = area_difference(scores["sppo"], scores["dppo"])
    options = {"seeds": 5, "tasks": 3, "measure": MEASURES[FIVE]}
    yield Comparison("2", "no noise and four levels", page, found, **options)


def draw():
    styles = [{"color": COLORS[method], "label": title} for method, title in METHODS.items()]
    levels = list(LEVELS.values())
    panels = panels_of(shares(), TASKS, np.array(levels), styles, shift=0.006)
    ticks = dict(zip(["0", "", "0.1", "0.2", "0.5"], levels))
    file = RESULTS / "robustness/noise.png"
    label = "score (clean DPPO: 1 by definition)"
    draw_panels(file, panels, ticks, "standard deviation of the noise", label)
