"""Five levels of noise: table, figure, what speaks to claim 2, prediction.

python -m results.robustness.noise
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

from analysis.compare import difference, pooled_difference
from analysis.measures import FIVE
from analysis.methods import COLORS
from analysis.tables import markdown
from results.common import (
    HOPPER,
    LANDER,
    MEASURES,
    PENDULUM,
    above_floors,
    bars,
    estimate_text,
    mean,
    read,
    short,
)
from results.comparisons import Comparison

TASKS = [HOPPER, PENDULUM, LANDER]
LEVELS = {"clean": 0, "normal 0.05": 0.05, "normal 0.1": 0.1, "normal 0.2": 0.2, "normal 0.5": 0.5}
METHODS = {"ppo": "Gaussian PPO", "dppo": "DPPO", "sppo": "SPPO"}
PAIRS = [("sppo", "dppo"), ("dppo", "ppo"), ("sppo", "ppo")]


def shares():
    """Last five evaluations above the task's floor, as shares of clean DPPO's mean, which counts as
    known: {method: (tasks, levels, seeds)}."""
    scores = above_floors(read("robustness/noise"), FIVE, TASKS, LEVELS, METHODS)
    clean_dppo = scores[:, :1, [1]].mean(axis=-1, keepdims=True)
    return dict(zip(METHODS, np.moveaxis(scores / clean_dppo, 2, 0)))


def area_difference(a, b):
    """In the mean over levels. The unit is the seed: a seed's share is its mean over tasks."""
    return difference(a.mean(axis=(0, 1)), b.mean(axis=(0, 1)))


def level_differences(a, b):
    """At each level, averaged over tasks."""
    return [pooled_difference(list(zip(a[:, i], b[:, i]))) for i in range(len(LEVELS))]


def measures():
    """Averaged over the tasks: methods' means, and differences by Welch's t."""
    scores = shares()
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


def smallest_p():
    """Of differences at single levels: averaged over the tasks, and Hopper's; as corrected by
    Benjamini and Hochberg for the fifteen of each."""
    scores = shares()
    lines = []
    for name, tasks in {"all tasks": slice(None), "Hopper": slice(0, 1)}.items():
        p = []
        for a, b in PAIRS:
            p += [x.p for x in level_differences(scores[a][tasks], scores[b][tasks])]
        corrected = stats.false_discovery_control(p).min()
        lines.append(f"{name}: smallest p {min(p):.2g}, corrected {corrected:.2g}")
    return "\n".join(lines)


def comparisons():
    page = "robustness/README.md#score-against-the-level-of-noise"
    scores = shares()
    found = area_difference(scores["sppo"], scores["dppo"])
    name = "no noise and four levels"
    yield Comparison("2", name, page, found, 5, tasks=3, measure=MEASURES[FIVE])


def predictions():
    of_levels = [scores.mean(axis=(0, 2)) for scores in shares().values()]
    falls = all((x[1:] < x[:-1]).all() and x[-1] < 0.4 for x in of_levels)
    return {"noise-falls": falls}


def draw():
    """Share against level: averaged over the tasks, then for each."""
    figure, axes = plt.subplots(1, 4, figsize=(12, 3.2), sharey=True, layout="constrained")
    x = np.array(list(LEVELS.values()))
    for shift, (method, scores) in zip([-0.006, 0, 0.006], shares().items()):
        panels = {"all three tasks": scores.mean(axis=0)}
        panels |= {short(task): scores[i] for i, task in enumerate(TASKS)}
        for ax, (title, of_levels) in zip(axes, panels.items()):
            middle, half = bars([mean(cell) for cell in of_levels])
            options = {"color": COLORS[method], "label": METHODS[method], "markersize": 4}
            ax.errorbar(x + shift, middle, half, fmt="o-", **options)
            ax.set_title(title)
            ax.set_xticks(x, ["0", "", "0.1", "0.2", "0.5"])
            ax.set_xlabel("standard deviation of the noise")
            ax.grid(alpha=0.3)
    axes[0].set_ylabel("score (clean DPPO: 1 by definition)")
    axes[0].legend()
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=160)


if __name__ == "__main__":
    plt.switch_backend("agg")
    print(measures(), smallest_p(), sep="\n\n")
    draw()
