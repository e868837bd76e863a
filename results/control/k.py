"""SPPO in control at the ends of k: table, figure, what speaks to claims 1 and 2, predictions.

python -m results.control.k
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from analysis.compare import difference
from analysis.measures import FIVE, TRAINING
from analysis.methods import COLORS
from results.common import (
    HOPPER,
    LANDER,
    MEASURES,
    PENDULUM,
    above_floors,
    corrected_p,
    estimate_table,
    mean,
    read,
    short,
)
from results.comparisons import Comparison, includes_0

TASKS = [PENDULUM, LANDER, HOPPER]
NOISES = ["clean", "normal 0.05"]
SLOPE = "slope per tenfold k"
ENDS = {"k0.2": 0.2, "k1": 1, "k100": 100}


def relative(scores, baseline):
    """Scores (tasks, noises, methods, seeds) relative to the mean of the method with the index
    `baseline`."""
    return scores / scores[:, :, [baseline]].mean(axis=-1, keepdims=True)


def effects(measure, tasks=slice(None), noises=slice(None)):
    """{name: estimate} of the relative scores' differences from k = 1 and of their slope, over
    `noises` and `tasks`, slices. The unit is the seed. Scores of SPPO, which is k = 20.5, are
    relative to DPPO, k = 1, of the same earlier runs."""
    ends = above_floors(read("control/k"), measure, TASKS, NOISES, ENDS)
    methods = ["dppo", "sppo"]
    earlier = above_floors(read("control/three-tasks"), measure, TASKS, NOISES, methods)
    low, one, high = relative(ends, baseline=1)[tasks, noises].mean(axis=(0, 1))
    dppo, sppo = relative(earlier, baseline=0)[tasks, noises].mean(axis=(0, 1))
    slopes = np.polyfit(np.log10(list(ENDS.values())), [low, one, high], deg=1)[0]
    return {
        "k = 0.2 minus 1": mean(low - one),
        "k = 100 minus 1": mean(high - one),
        "k = 20.5 minus 1": difference(sppo, dppo),
        SLOPE: mean(slopes),
    }


def measures():
    rows = {title: effects(measure) for measure, title in MEASURES.items()}
    rows["last five evaluations, clean"] = effects(FIVE, noises=[0])
    rows["last five evaluations, noisy"] = effects(FIVE, noises=[1])
    return estimate_table("", rows, places=3)


def comparisons():
    page = "control/README.md#the-ends-of-k"
    options = {"tasks": 3, "measure": MEASURES[FIVE]}
    for i, (claim, rewards) in enumerate({"1": "clean", "2": "noisy"}.items()):
        found = effects(FIVE, noises=[i])["k = 20.5 minus 1"]
        name = f"SPPO minus DPPO, three tasks, {rewards}"
        yield Comparison(claim, name, page, found, 8, **options)
    options["direct"] = False
    for name, found in effects(FIVE).items():
        if name != SLOPE:
            yield Comparison("1", f"{name}, clean and noisy", page, found, 8, **options)
    tested = {measure: effects(measure) for measure in MEASURES}
    for of_measure in tested.values():
        of_measure.pop("k = 20.5 minus 1")  # of other runs
    found = tested[TRAINING][SLOPE]
    options |= {"measure": MEASURES[TRAINING], "corrected": corrected_p(tested)[TRAINING, SLOPE]}
    yield Comparison("1", f"{SLOPE}, clean and noisy", page, found, 8, **options)


def predictions():
    found = effects(FIVE)
    ends = [found["k = 0.2 minus 1"], found["k = 100 minus 1"]]
    return {
        "k-ends": all(abs(end.value) < 0.1 for end in ends),
        "k-intervals": all(map(includes_0, [*ends, found[SLOPE]])),
    }


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
