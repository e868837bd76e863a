"""Measures and figure of SPPO in control at the ends of k.

python results/k-ends/analyse.py
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from scipy import stats

HERE = Path(__file__).parent
FLOOR = {"InvertedDoublePendulum-v4": 0, "LunarLanderContinuous-v3": -200, "Hopper-v4": 0}
REWARDS = {"none": "clean rewards", "normal": "noisy rewards"}
ENDS = {"k0.2": 0.2, "k1": 1, "k100": 100}
PACKED = {"dppo": 1, "sppo": 20.5}
COLORS = {"dppo": "tab:green", "sppo": "tab:blue"}  # as in report.py
MEASURES = {
    "last5": "last five evaluations",
    "return_mean": "last evaluation",
    "training": "training",
}


def read(folder, methods, measure):
    """Scores above their task's floor (tasks, rewards, methods, seeds) of finished runs."""
    runs = pd.read_csv(folder / "runs.csv.gz").query("finished").sort_values("seed")
    groups = runs.groupby(["env_id", "noise", "exp_name"])[measure]
    cells = []
    for task, floor in FLOOR.items():
        for noise in REWARDS:
            for method in methods:
                cells.append(groups.get_group((task, noise, method)) - floor)
    return np.reshape(cells, (len(FLOOR), len(REWARDS), len(methods), -1))


def relative(scores, baseline):
    """Scores relative to the mean of the method with the index `baseline`."""
    return scores / scores[:, :, [baseline]].mean(axis=-1, keepdims=True)


def paired(values):
    """Mean of seeds' values, and its 95 % interval by t."""
    test = stats.ttest_1samp(values, 0)
    return values.mean(), *test.confidence_interval()


def welch(a, b):
    """Difference of the means of two groups of seeds, and its 95 % interval."""
    test = stats.ttest_ind(a, b, equal_var=False)
    return a.mean() - b.mean(), *test.confidence_interval()


def effects(measure, tasks=slice(None)):
    """{name: (estimate, low, high)} of the relative scores' differences from k = 1 and of their
    slope, over the rewards and `tasks`, a slice."""
    scores = relative(read(HERE, ENDS, measure), baseline=1)
    low, one, high = scores[tasks].mean(axis=(0, 1))
    packed = relative(read(HERE.parent / "evidence", PACKED, measure), baseline=0)
    dppo, sppo = packed[tasks].mean(axis=(0, 1))
    slopes = np.polyfit(np.log10(list(ENDS.values())), [low, one, high], deg=1)[0]
    return {
        "k = 0.2 minus 1": paired(low - one),
        "k = 20.5 minus 1, earlier runs": welch(sppo, dppo),
        "k = 100 minus 1": paired(high - one),
        "slope over log10 k": paired(slopes),
    }


def estimate(value, low, high):
    value, low, high = np.round([value, low, high], 3) + 0.0  # no -0.000
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


def print_measures():
    for measure, title in MEASURES.items():
        found = effects(measure)
        if measure == "last5":
            print(f"| | {' | '.join(found)} |\n|{'---|' * (1 + len(found))}")
        print(f"| {title} | {' | '.join(estimate(*values) for values in found.values())} |")


def print_clipped():
    """Share of updates whose gradient was clipped, by k, lowest and highest of six cells."""
    runs = pd.read_csv(HERE / "runs.csv.gz").query("finished")
    progress = pd.read_csv(HERE / "progress.csv.gz")
    runs = runs.set_index("run_name")
    runs["clipped"] = progress.groupby("run_name")["losses/clipped_gradients"].mean()
    cells = runs.groupby(["exp_name", "env_id", "noise"])["clipped"].mean()
    for method, k in ENDS.items():
        print(f"k = {k:g}: clipped {cells[method].min():.4f} to {cells[method].max():.4f}")


def draw():
    """Score relative to k = 1 against k: over all tasks, then each."""
    figure, axes = plt.subplots(1, 4, figsize=(10, 2.9), sharey=True, layout="constrained")
    panels = {"all three tasks": slice(None)}
    for i, task in enumerate(FLOOR):
        panels[task.partition("-")[0].removesuffix("Continuous")] = slice(i, i + 1)
    for ax, (title, tasks) in zip(axes, panels.items()):
        low, sppo, high, _ = effects("last5", tasks).values()
        ax.axhline(1, color="gray", lw=0.8)
        ax.plot(1, 1, "o", color=COLORS["dppo"])
        points = [(0.2, "black", low), (20.5, COLORS["sppo"], sppo), (100, "black", high)]
        for k, color, found in points:
            value, *ends = np.add(found, 1)
            ax.plot(k, value, "o", color=color)
            ax.vlines(k, *ends, color=color)
        ax.set_xscale("log")
        ax.set_xticks([0.2, 1, 20.5, 100], ["0.2", "1\nDPPO", "20.5\nSPPO", "100"])
        ax.minorticks_off()
        ax.set_title(title)
        ax.set_xlabel("k, the weight of the policy loss")
    axes[0].set_ylabel("score relative to k = 1")
    figure.savefig(HERE / "k-ends.png", dpi=170)


if __name__ == "__main__":
    plt.switch_backend("agg")
    print_measures()
    print_clipped()
    draw()
