"""Measures and figure of SPPO in control at the ends of k.

python -m results.control.k
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from analysis.compare import difference
from analysis.measures import FIVE
from analysis.methods import COLORS
from results.common import (
    HOPPER,
    LANDER,
    MEASURES,
    PENDULUM,
    above_floors,
    estimate_table,
    mean,
    read,
    short,
)

TASKS = [PENDULUM, LANDER, HOPPER]
NOISES = ["clean", "normal 0.05"]
ENDS = {"k0.2": 0.2, "k1": 1, "k100": 100}


def both_suites(measure):
    """Scores above floors (tasks, noises, methods, seeds): of k = 0.2, 1 and 100, and of earlier
    runs of DPPO, which is k = 1, and of SPPO, k = 20.5."""
    ends = above_floors(read("control/k"), measure, TASKS, NOISES, ENDS)
    methods = ["dppo", "sppo"]
    earlier = above_floors(read("control/three-tasks"), measure, TASKS, NOISES, methods)
    return ends, earlier


def relative(scores, baseline):
    """Scores relative to the mean of the method with the index `baseline`."""
    return scores / scores[:, :, [baseline]].mean(axis=-1, keepdims=True)


def effects(measure, tasks=slice(None), noises=slice(None)):
    """{name: estimate} of the relative scores' differences from k = 1 and of their slope, over
    `noises` and `tasks`, slices. The unit is the seed. Scores of k = 20.5 are relative to the k = 1
    of the earlier runs."""
    ends, earlier = both_suites(measure)
    low, one, high = relative(ends, baseline=1)[tasks, noises].mean(axis=(0, 1))
    dppo, sppo = relative(earlier, baseline=0)[tasks, noises].mean(axis=(0, 1))
    slopes = np.polyfit(np.log10(list(ENDS.values())), [low, one, high], deg=1)[0]
    return {
        "k = 0.2 minus 1": mean(low - one),
        "k = 100 minus 1": mean(high - one),
        "k = 20.5 minus 1": difference(sppo, dppo),
        "slope per tenfold k": mean(slopes),
    }


def measures():
    rows = {title: effects(measure) for measure, title in MEASURES.items()}
    rows["last five evaluations, clean"] = effects(FIVE, noises=[0])
    rows["last five evaluations, noisy"] = effects(FIVE, noises=[1])
    return estimate_table("", rows, places=3)


def tested():
    """Of the runs with k = 0.2, 1 and 100, whose p is corrected for all of these."""
    rows = {}
    for measure, title in MEASURES.items():
        found = effects(measure).items()
        rows[title] = {name: effect for name, effect in found if "20.5" not in name}
    return rows


def draw():
    """Score relative to k = 1 against k: over all tasks, then each."""
    figure, axes = plt.subplots(1, 4, figsize=(10, 2.9), sharey=True, layout="constrained")
    panels = {"all three tasks": slice(None)}
    for i, task in enumerate(TASKS):
        panels[short(task)] = slice(i, i + 1)
    for ax, (title, tasks) in zip(axes, panels.items()):
        low, high, sppo, *_ = effects(FIVE, tasks).values()
        ax.axhline(1, color="gray", lw=0.8)
        ax.plot(1, 1, "o", color=COLORS["dppo"])
        points = [(0.2, "black", low), (20.5, COLORS["sppo"], sppo), (100, "black", high)]
        for k, color, found in points:
            ax.plot(k, 1 + found.value, "o", color=color)
            ax.vlines(k, 1 + found.low, 1 + found.high, color=color)
        ax.set_xscale("log")
        ax.set_xticks([0.2, 1, 20.5, 100], ["0.2", "1\nDPPO", "20.5\nSPPO", "100"])
        ax.minorticks_off()
        ax.set_title(title)
        ax.set_xlabel("k, the weight of the policy loss")
    axes[0].set_ylabel("score relative to k = 1")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=170)


if __name__ == "__main__":
    plt.switch_backend("agg")
    print(measures())
    draw()
