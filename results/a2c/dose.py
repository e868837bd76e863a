"""Measures and figure of SA2C by dose.

python results/a2c/dose.py
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

sys.path.append(str(Path(__file__).parents[1]))
from common import (
    MEASURES,
    detected,
    estimate,
    log_ratio,
    paired,
    print_p,
    print_table,
    read,
    scores_of,
    short,
)

HERE = Path(__file__).parent
TASKS = ["Hopper-v4", "HalfCheetah-v4", "InvertedDoublePendulum-v4"]
REWARDS = {"none": "clean", "normal": "noisy rewards", "adv_flip": "flipped advantages"}
COLORS = {"none": "black", "normal": "tab:blue", "adv_flip": "tab:orange"}
ALPHA = 0.5
BETAS = np.array([0, 0.5, 2, 20])
DOSES = np.log(1 + BETAS / ALPHA) / np.log(1 + BETAS[-1] / ALPHA)


def scores_above(measure):
    """Scores above the task's floor (tasks, rewards, betas, seeds)."""
    runs, _ = read("a2c/dose")
    return scores_of(runs, measure, env_id=TASKS, noise=REWARDS, beta=BETAS)


def relative_scores(measure, same_rewards=False):
    """Scores (tasks, rewards, betas, seeds) relative to beta 0 with clean rewards, as registered,
    or with the same rewards."""
    scores = scores_above(measure)
    baseline = scores[:, :, :1].mean(axis=-1, keepdims=True)
    return scores / (baseline if same_rewards else baseline[:, :1])


def slopes(scores):
    """Slopes over the dose (tasks, rewards, seeds), by least squares."""
    centred = DOSES - DOSES.mean()
    return np.einsum("trbs,b->trs", scores, centred) / (centred @ centred)


def effects(measure, tasks=slice(None), same_rewards=False):
    """{name: (estimate, low, high, p)}: slopes, averaged over `tasks`, and interactions with noise.
    The unit is the seed."""
    by_seed = slopes(relative_scores(measure, same_rewards)[tasks]).mean(axis=0)
    clean, normal, adv_flip = by_seed
    return {
        "slope: clean": paired(clean),
        "slope: noisy rewards": paired(normal),
        "slope: flipped advantages": paired(adv_flip),
        "noisy minus clean": paired(normal - clean),
        "flipped minus clean": paired(adv_flip - clean),
    }


def print_measures():
    found = {
        "training, all three tasks": effects("training"),
        "training, without InvertedDoublePendulum": effects("training", slice(0, 2)),
    }
    for i, task in enumerate(TASKS):
        found[f"training, {short(task)}"] = effects("training", slice(i, i + 1))
    found["last five evaluations"] = effects("last5")
    found["last evaluation"] = effects("return_mean")
    rows = {}
    for name, values in found.items():
        rows[name] = [estimate(*value[:3], digits=3) for value in values.values()]
    print_table(rows, "", *effects("training"))


def print_corrected():
    found = {}
    for measure in ("training", "last5", "return_mean"):
        for name, effect in effects(measure).items():
            found[f"{MEASURES[measure]}, {name}"] = effect
    print_p(found)


def print_same_rewards():
    """Training, relative to beta 0 with the same rewards instead of clean ones."""
    for name, values in effects("training", same_rewards=True).items():
        print(f"{name}, relative to the same rewards: {estimate(*values[:3], digits=3)}")


def print_doses():
    """Differences of other betas from beta 0 in the last evaluation, averaged over the tasks."""
    rows = {}
    for i, beta in enumerate(BETAS[1:], start=1):
        by_seed = relative_scores("return_mean").mean(axis=0)
        found = [paired(scores[i] - scores[0]) for scores in by_seed]
        rows[f"{beta:g}"] = [estimate(*value[:3], digits=3) for value in found]
    print_table(rows, "beta", *REWARDS.values())


def print_interactions():
    """Of the log ratios of beta 20 to 0 with the same rewards, without a ratio's bias."""
    rows = {}
    effects_of_noise = {}
    for measure in ("training", "last5", "return_mean"):
        scores = scores_above(measure)
        clean = list(zip(scores[:, 0, 0], scores[:, 0, -1]))  # beta 0 to 20: its negative
        rows[MEASURES[measure]] = []
        for noise in (1, 2):
            noisy = list(zip(scores[:, noise, -1], scores[:, noise, 0]))
            *half, p = log_ratio(noisy + clean)  # the mean of both parts of the interaction
            total = np.multiply(half, 2)
            rows[MEASURES[measure]].append(estimate(*total, digits=3))
            rewards = list(REWARDS.values())[noise]
            effects_of_noise[f"{MEASURES[measure]}, log ratio, {rewards}"] = (*total, p)
    print_p(effects_of_noise)
    print()
    print_table(rows, "log ratio, beta 20 to 0", "noisy minus clean", "flipped minus clean")


def print_power():
    """What the slopes and interactions detect."""
    freedom = scores_above("training").shape[-1] - 1
    for measure in ("training", "return_mean"):
        for name, (_, low, high, _) in effects(measure).items():
            error = (high - low) / 2 / stats.t.ppf(0.975, freedom)
            print(f"{measure}, {name} detects {detected(error, freedom):.2f}")


def print_smallest_dose():
    """Beta 0.5 minus 0 in each cell: Welch's intervals, corrected for the nine (Bonferroni)."""
    scores = relative_scores("training")
    for i, task in enumerate(TASKS):
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
    for task, values in zip(TASKS, scores):
        panels[short(task)] = values
    for ax, (title, values) in zip(axes, panels.items()):
        for shift, (noise, label), cells in zip([-0.02, 0, 0.02], REWARDS.items(), values):
            half = stats.sem(cells, axis=1) * stats.t.ppf(0.975, cells.shape[1] - 1)
            mean = cells.mean(axis=1)
            x = DOSES + shift  # so that intervals stand side by side
            ax.errorbar(x, mean, half, marker="o", color=COLORS[noise], label=label)
        ax.set_xticks(DOSES, [f"{beta:g}" for beta in BETAS])
        ax.set_title(title)
        ax.set_xlabel("beta (alpha 0.5)")
    axes[0].set_ylabel("training score relative\nto clean DA2C")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3)
    figure.savefig(HERE / "dose.png", dpi=170)


if __name__ == "__main__":
    plt.switch_backend("agg")
    print_measures()
    print_corrected()
    print_same_rewards()
    print_doses()
    print_interactions()
    print_power()
    print_smallest_dose()
    draw()
