"""Measures and figure of SA2C by dose.

python results/sa2c-dose/analyse.py
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from scipy import stats

HERE = Path(__file__).parent
FLOOR = {"Hopper-v4": 0, "HalfCheetah-v4": -300, "InvertedDoublePendulum-v4": 0}
REWARDS = {"none": "clean", "normal": "noisy rewards", "adv_flip": "flipped advantages"}
COLORS = {"none": "black", "normal": "tab:blue", "adv_flip": "tab:orange"}
ALPHA = 0.5
BETAS = np.array([0, 0.5, 2, 20])
DOSES = np.log(1 + BETAS / ALPHA) / np.log(1 + BETAS[-1] / ALPHA)


def relative_scores(measure, same_rewards=False):
    """Scores (tasks, rewards, betas, seeds) above the task's floor, relative to beta 0 with clean
    rewards, as registered, or with the same rewards."""
    runs = pd.read_csv(HERE / "runs.csv.gz").query("finished").sort_values("seed")
    groups = runs.groupby(["env_id", "noise", "beta"])[measure]
    cells = []
    for task, floor in FLOOR.items():
        for noise in REWARDS:
            for beta in BETAS:
                cells.append(groups.get_group((task, noise, beta)) - floor)
    scores = np.reshape(cells, (len(FLOOR), len(REWARDS), len(BETAS), -1))
    baseline = scores[:, :, :1].mean(axis=-1, keepdims=True)
    return scores / (baseline if same_rewards else baseline[:, :1])


def slopes(scores):
    """Slopes over the dose (tasks, rewards, seeds), by least squares."""
    centred = DOSES - DOSES.mean()
    return np.einsum("trbs,b->trs", scores, centred) / (centred @ centred)


def paired(values):
    """Mean of seeds' values, and its 95 % interval by t."""
    test = stats.ttest_1samp(values, 0)
    return values.mean(), *test.confidence_interval()


def effects(measure, tasks=slice(None), same_rewards=False):
    """{name: (estimate, low, high)}: slopes, averaged over `tasks`, and interactions with noise."""
    by_seed = slopes(relative_scores(measure, same_rewards)[tasks]).mean(axis=0)
    clean, normal, adv_flip = by_seed
    return {
        "slope: clean": paired(clean),
        "slope: noisy rewards": paired(normal),
        "slope: flipped advantages": paired(adv_flip),
        "noisy minus clean": paired(normal - clean),
        "flipped minus clean": paired(adv_flip - clean),
    }


def estimate(value, low, high):
    value, low, high = np.round([value, low, high], 3) + 0.0  # no -0.000
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


def print_measures():
    rows = {
        "training, all three tasks": effects("training"),
        "training, without InvertedDoublePendulum": effects("training", slice(0, 2)),
    }
    for i, task in enumerate(FLOOR):
        rows[f"training, {task.partition('-')[0]}"] = effects("training", slice(i, i + 1))
    rows["last five evaluations"] = effects("last5")
    rows["last evaluation"] = effects("return_mean")
    rows["training, relative to the same rewards"] = effects("training", same_rewards=True)
    print(f"| | {' | '.join(effects('training'))} |\n|{'---|' * 6}")
    for name, found in rows.items():
        print(f"| {name} | {' | '.join(estimate(*values) for values in found.values())} |")


def print_doses():
    """Differences from beta 0 of each other beta, averaged over the tasks."""
    print(f"\n| beta | {' | '.join(REWARDS.values())} |\n|{'---|' * 4}")
    for i, beta in enumerate(BETAS[1:], start=1):
        cells = []
        for scores in relative_scores("return_mean").mean(axis=0):
            cells.append(estimate(*paired(scores[i] - scores[0])))
        print(f"| {beta:g} | {' | '.join(cells)} |")


def print_power():
    """What the slopes and interactions in training detect with 80 % power, by t."""
    degrees = relative_scores("training").shape[-1] - 1
    half_width, power = stats.t.ppf([0.975, 0.8], degrees)
    for name, (_, low, high) in effects("training").items():
        standard_error = (high - low) / 2 / half_width
        print(f"{name} detects {standard_error * (half_width + power):.2f}")


def print_smallest_dose():
    """Beta 0.5 minus 0 in each cell: Welch's intervals, corrected for the nine (Bonferroni)."""
    scores = relative_scores("training")
    for i, task in enumerate(FLOOR):
        for j, noise in enumerate(REWARDS):
            plain, small, *_ = scores[i, j]
            test = stats.ttest_ind(small, plain, equal_var=False)
            interval = test.confidence_interval(1 - 0.05 / 9)
            print(f"{task}, {noise}: {estimate(small.mean() - plain.mean(), *interval)}")


def draw():
    """Training score against dose: over all tasks, then each; a line for each kind of rewards."""
    scores = relative_scores("training")
    figure, axes = plt.subplots(1, 4, figsize=(10, 3.2), sharey=True, layout="constrained")
    panels = {"all three tasks": scores.mean(axis=0)}
    for task, values in zip(FLOOR, scores):
        panels[task.partition("-")[0]] = values
    for ax, (title, values) in zip(axes, panels.items()):
        for shift, (noise, label), cells in zip([-0.02, 0, 0.02], REWARDS.items(), values):
            half = stats.sem(cells, axis=1) * stats.t.ppf(0.975, cells.shape[1] - 1)
            mean = cells.mean(axis=1)
            x = DOSES + shift  # so that intervals stand side by side
            ax.errorbar(x, mean, half, marker="o", color=COLORS[noise], label=label)
        ax.set_xticks(DOSES, [f"{beta:g}" for beta in BETAS])
        ax.set_title(title)
        ax.set_xlabel("beta (alpha 0.5)")
    axes[0].set_ylabel("training score relative\nto clean A2C on bins")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3)
    figure.savefig(HERE / "dose.png", dpi=170)


if __name__ == "__main__":
    plt.switch_backend("agg")
    print_measures()
    print_doses()
    print_power()
    print_smallest_dose()
    draw()
