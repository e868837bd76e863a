"""Measures, scores and figure of the runs at five levels of noise.

python results/noise/analyse.py
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from scipy import stats

HERE = Path(__file__).parent
FLOOR = {"InvertedDoublePendulum-v4": 0, "LunarLanderContinuous-v3": -200, "Hopper-v4": 0}
LEVELS = [0, 0.05, 0.1, 0.2, 0.5]
METHODS = {"ppo": "Gaussian PPO", "dppo": "DPPO", "sppo": "SPPO"}
COLORS = {"ppo": "tab:orange", "dppo": "tab:green", "sppo": "tab:blue"}  # as in report.py
PAIRS = [("sppo", "dppo"), ("dppo", "ppo"), ("sppo", "ppo")]
SAMPLES = 10_000


def read():
    runs = pd.read_csv(HERE / "runs.csv.gz").query("finished")
    runs["level"] = runs["noise_level"].where(runs["noise"] == "normal", 0)
    return runs.rename(columns={"env_id": "task", "exp_name": "method", "last5": "score"})


def scores_of(runs):
    """{(task, level, method): scores (seeds,)}, the seeds in the same order everywhere."""
    groups = runs.sort_values("seed").groupby(["task", "level", "method"])["score"]
    return {cell: scores.to_numpy() for cell, scores in groups}


def relative_scores(scores, baseline="dppo", joint=False):
    """{method: (1 + SAMPLES, tasks, levels)}: the estimate, then those of resampled seeds, drawn
    for each cell or, `joint`, for all levels of a task and a method at once. Without a baseline,
    relative to the method's own clean score."""
    rng = np.random.default_rng(0)
    drawn = {}
    means = {}
    for (task, level, method), of_seeds in scores.items():
        group = (task, method) if joint else (task, level, method)
        if group not in drawn:
            drawn[group] = rng.integers(len(of_seeds), size=(SAMPLES, len(of_seeds)))
        resampled = of_seeds[drawn[group]].mean(axis=1)
        means[task, level, method] = np.append(of_seeds.mean(), resampled)
    relative = {method: np.empty((1 + SAMPLES, len(FLOOR), len(LEVELS))) for method in METHODS}
    for i, (task, floor) in enumerate(FLOOR.items()):
        for j, level in enumerate(LEVELS):
            for method in METHODS:
                above = means[task, level, method] - floor
                clean = means[task, 0, baseline or method] - floor
                relative[method][:, i, j] = above / clean
    return relative


def welch(scores, a, b, levels=LEVELS, tasks=FLOOR):
    """Method a's mean relative score minus b's, with 95 % interval and p by Welch's test: a seed's
    score is its mean over `levels`, and clean DPPO's mean counts as known."""
    terms = []
    for task in tasks:
        clean = scores[task, 0, "dppo"].mean() - FLOOR[task]
        for sign, method in ((1, a), (-1, b)):
            of_seeds = np.mean([scores[task, level, method] for level in levels], axis=0)
            terms.append(sign * (of_seeds - FLOOR[task]) / clean / len(tasks))
    mean = sum(term.mean() for term in terms)
    variances = np.array([term.var(ddof=1) / len(term) for term in terms])
    error = variances.sum() ** 0.5
    freedom = [len(term) - 1 for term in terms]
    t = stats.t(error**4 / (variances**2 / freedom).sum())
    half = error * t.ppf(0.975)
    return mean, mean - half, mean + half, 2 * t.sf(abs(mean) / error)


def interval(samples):
    return np.quantile(samples[1:], [0.025, 0.975], axis=0)


def estimate(samples):
    value, low, high = np.round([samples[0], *interval(samples)], 2) + 0.0  # no -0.00
    return f"{value:.2f} ({low:.2f} to {high:.2f})"


def difference(a, b):
    return f"{METHODS[a]} minus {METHODS[b]}"


def print_table(title, relative):
    """Areas and levels of methods and of their differences; `relative`: (1 + SAMPLES, levels)."""
    rows = {METHODS[method]: values for method, values in relative.items()}
    for a, b in PAIRS:
        rows[difference(a, b)] = relative[a] - relative[b]
    print(f"| {title} | area | {' | '.join(map(str, LEVELS))} |\n|{'---|' * 7}")
    for name, values in rows.items():
        texts = [estimate(values.mean(axis=-1)), *map(estimate, values.T)]
        print(f"| {name} | {' | '.join(texts)} |")
    print()


def print_measures(scores):
    """Averaged over the tasks; then areas with two other intervals, and p."""
    relative = relative_scores(scores)
    print_table("", {method: values.mean(axis=1) for method, values in relative.items()})
    joint = relative_scores(scores, joint=True)
    print(f"| area | jointly | by t | p, by t |\n|{'---|' * 4}")
    for a, b in PAIRS:
        area = (joint[a] - joint[b]).mean(axis=(1, 2))
        _, *by_t, p = welch(scores, a, b)
        intervals = [f"{low:.2f} to {high:.2f}" for low, high in (interval(area), by_t)]
        print(f"| {difference(a, b)} | {' | '.join(intervals)} | {p:.2g} |")
    print()


def print_levels(scores):
    """p of differences at single levels, by Welch's test: averaged over the tasks, then Hopper's;
    below, the smallest after Benjamini and Hochberg's correction for all of its table."""
    for name, tasks in (("all tasks", FLOOR), ("Hopper", ["Hopper-v4"])):
        found = [[welch(scores, *pair, [level], tasks)[-1] for level in LEVELS] for pair in PAIRS]
        corrected = stats.false_discovery_control(found, axis=None)
        print(f"| p, {name} | {' | '.join(map(str, LEVELS))} |\n|{'---|' * 6}")
        for pair, values in zip(PAIRS, found):
            print(f"| {difference(*pair)} | {' | '.join(f'{p:.2g}' for p in values)} |")
        print(f"\nSmallest, corrected: {corrected.min():.2g}\n")


def print_tasks(scores):
    relative = relative_scores(scores)
    for i, task in enumerate(FLOOR):
        print_table(task, {method: values[:, i] for method, values in relative.items()})


def print_own(scores):
    """Averaged over the tasks, relative to each method's own clean score."""
    relative = relative_scores(scores, baseline=None)
    print_table("own", {method: values.mean(axis=1) for method, values in relative.items()})


def print_scores(scores):
    """Mean ± standard error over seeds, and how many seeds, of every cell."""
    print("| task | level | method | score | seeds |\n|---|---|---|---|---|")
    for cell, of_seeds in scores.items():
        error = of_seeds.std(ddof=1) / len(of_seeds) ** 0.5
        place = " | ".join(map(str, cell))
        print(f"| {place} | {of_seeds.mean():,.0f} ± {error:,.0f} | {len(of_seeds)} |")


def draw(scores):
    """Relative score against level: averaged over the tasks, then for each."""
    figure, axes = plt.subplots(1, 4, figsize=(12, 3.2), sharey=True, layout="constrained")
    x = np.array(LEVELS)
    for shift, (method, values) in zip((-0.006, 0, 0.006), relative_scores(scores).items()):
        panels = {"all three tasks": values.mean(axis=1)}
        panels |= {task.partition("-")[0]: values[:, i] for i, task in enumerate(FLOOR)}
        for ax, (title, samples) in zip(axes, panels.items()):
            style = {"color": COLORS[method], "label": METHODS[method]}
            ax.plot(x + shift, samples[0], "o-", markersize=4, **style)
            ax.vlines(x + shift, *interval(samples), color=COLORS[method])
            ax.set_title(title)
            ax.set_xticks(x, ["0", "", "0.1", "0.2", "0.5"])
            ax.set_xlabel("standard deviation of the noise")
            ax.grid(alpha=0.3)
    axes[0].set_ylabel("score (clean DPPO: 1 by definition)")
    axes[0].legend()
    figure.savefig(HERE / "noise.png", dpi=160)


if __name__ == "__main__":
    plt.switch_backend("agg")
    scores = scores_of(read())
    print_measures(scores)
    print_levels(scores)
    print_tasks(scores)
    print_own(scores)
    print_scores(scores)
    draw(scores)
