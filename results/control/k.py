"""Measures and figure of SPPO in control at the ends of k.

python results/control/k.py
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

sys.path.append(str(Path(__file__).parents[1]))
from common import (
    MEASURES,
    estimate,
    in_percent,
    paired,
    percent,
    print_p,
    print_table,
    read,
    scores_of,
    short,
    welch,
)

from report import COLORS

HERE = Path(__file__).parent
TASKS = ["InvertedDoublePendulum-v4", "LunarLanderContinuous-v3", "Hopper-v4"]
REWARDS = ["none", "normal"]
ENDS = {"k0.2": 0.2, "k1": 1, "k100": 100}
CELLS = {"env_id": TASKS, "noise": REWARDS}


def both_suites(measure):
    """Scores above floors (tasks, rewards, methods, seeds): of k = 0.2, 1 and 100, and of earlier
    runs of DPPO, which is k = 1, and of SPPO, k = 20.5."""
    ends, _ = read("control/k")
    earlier, _ = read("control/three-tasks")
    return (
        scores_of(ends, measure, **CELLS, exp_name=ENDS),
        scores_of(earlier, measure, **CELLS, exp_name=["dppo", "sppo"]),
    )


def relative(scores, baseline):
    """Scores relative to the mean of the method with the index `baseline`."""
    return scores / scores[:, :, [baseline]].mean(axis=-1, keepdims=True)


def effects(measure, tasks=slice(None)):
    """{name: (estimate, low, high, p)} of the relative scores' differences from k = 1 and of their
    slope, over the rewards and `tasks`, a slice. The unit is the seed. Scores of k = 20.5 are
    relative to the k = 1 of the earlier runs."""
    ends, earlier = both_suites(measure)
    low, one, high = relative(ends, baseline=1)[tasks].mean(axis=(0, 1))
    dppo, sppo = relative(earlier, baseline=0)[tasks].mean(axis=(0, 1))
    slopes = np.polyfit(np.log10(list(ENDS.values())), [low, one, high], deg=1)[0]
    # Through both baselines, whose means are subject to chance, too; welch gives the mean of two
    *half, p = welch((sppo, dppo), (one, high))
    return {
        "k = 0.2 minus 1": paired(low - one),
        "k = 100 minus 1": paired(high - one),
        "k = 20.5 minus 1": welch((sppo, dppo)),
        "k = 20.5 minus 100": (*np.multiply(half, 2), p),
        "slope over log10 k": paired(slopes),
    }


def print_measures():
    rows = {}
    for measure, title in MEASURES.items():
        rows[title] = [estimate(*found[:3], digits=3) for found in effects(measure).values()]
    print_table(rows, "", *effects("last5"))


def print_corrected():
    """Of the runs with k = 0.2, 1 and 100."""
    found = {}
    for measure, title in MEASURES.items():
        for name, effect in effects(measure).items():
            if "20.5" not in name:
                found[f"{title}, {name}"] = effect
    print_p(found)


def print_percent():
    """Ratios to k = 1, pooled over the six cells without the bias of a ratio."""
    rows = {}
    for measure, title in MEASURES.items():
        ends, earlier = (scores.reshape(6, -1, 8) for scores in both_suites(measure))
        low, one, high = ends.swapaxes(0, 1)
        dppo, sppo = earlier.swapaxes(0, 1)
        pairs = [(low, one), (high, one), (sppo, dppo)]
        rows[title] = [in_percent(*percent(zip(a, b))) for a, b in pairs]
    print_table(rows, "log ratios", "k = 0.2 to 1", "k = 100 to 1", "k = 20.5 to 1")


def print_tasks():
    for i, task in enumerate(TASKS):
        for measure, title in MEASURES.items():
            found = effects(measure, slice(i, i + 1)).values()
            print(short(task), title, *(estimate(*values[:3]) for values in found), sep=" | ")
        ends, earlier = both_suites("last5")
        best = max(relative(ends, baseline=1)[i].max(), relative(earlier, baseline=0)[i].max())
        print(f"{short(task)}: best run {best:.2f} times k = 1's mean")


def print_clipped():
    """Share of updates whose gradient was clipped, by k, lowest and highest of six cells."""
    runs, progress = read("control/k")
    runs = runs.set_index("run_name")
    runs["clipped"] = progress.groupby("run_name")["losses/clipped_gradients"].mean()
    cells = runs.groupby(["exp_name", "env_id", "noise"])["clipped"].mean()
    for method, k in ENDS.items():
        print(f"k = {k:g}: clipped {cells[method].min():.4f} to {cells[method].max():.4f}")


def draw():
    """Score relative to k = 1 against k: over all tasks, then each."""
    figure, axes = plt.subplots(1, 4, figsize=(10, 2.9), sharey=True, layout="constrained")
    panels = {"all three tasks": slice(None)}
    for i, task in enumerate(TASKS):
        panels[short(task)] = slice(i, i + 1)
    for ax, (title, tasks) in zip(axes, panels.items()):
        low, high, sppo, *_ = effects("last5", tasks).values()
        ax.axhline(1, color="gray", lw=0.8)
        ax.plot(1, 1, "o", color=COLORS["dppo"])
        points = [(0.2, "black", low), (20.5, COLORS["sppo"], sppo), (100, "black", high)]
        for k, color, found in points:
            value, *ends = np.add(found[:3], 1)
            ax.plot(k, value, "o", color=color)
            ax.vlines(k, *ends, color=color)
        ax.set_xscale("log")
        ax.set_xticks([0.2, 1, 20.5, 100], ["0.2", "1\nDPPO", "20.5\nSPPO", "100"])
        ax.minorticks_off()
        ax.set_title(title)
        ax.set_xlabel("k, the weight of the policy loss")
    axes[0].set_ylabel("score relative to k = 1")
    figure.savefig(HERE / "k.png", dpi=170)


if __name__ == "__main__":
    plt.switch_backend("agg")
    print_measures()
    print_corrected()
    print_percent()
    print_tasks()
    print_clipped()
    draw()
