"""Measures, scores and figure of the runs at five levels of noise.

python results/noise/analyse.py
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

HERE = Path(__file__).parent
FLOOR = {"InvertedDoublePendulum-v4": 0, "LunarLanderContinuous-v3": -200, "Hopper-v4": 0}
LEVELS = [0, 0.05, 0.1, 0.2, 0.5]
METHODS = {"ppo": "Gaussian PPO", "dppo": "DPPO", "sppo": "SPPO"}
COLORS = {"ppo": "tab:orange", "dppo": "tab:green", "sppo": "tab:blue"}  # as in report.py
SAMPLES = 10_000


def read():
    runs = pd.read_csv(HERE / "runs.csv.gz").query("finished")
    runs["level"] = runs["noise_level"].where(runs["noise"] == "normal", 0)
    return runs.rename(columns={"env_id": "task", "exp_name": "method", "last5": "score"})


def scores_of(runs):
    """{(task, level, method): scores (seeds,)}."""
    groups = runs.groupby(["task", "level", "method"])["score"]
    return {cell: scores.to_numpy() for cell, scores in groups}


def relative_scores(scores, baseline="dppo"):
    """{method: (1 + SAMPLES, tasks, levels)}: the estimate, then those of resampled seeds. Without
    a baseline, relative to the method's own clean score."""
    rng = np.random.default_rng(0)
    means = {}
    for cell, of_seeds in scores.items():
        drawn = rng.choice(of_seeds, (SAMPLES, len(of_seeds)))
        means[cell] = np.append(of_seeds.mean(), drawn.mean(axis=1))
    relative = {method: np.empty((1 + SAMPLES, len(FLOOR), len(LEVELS))) for method in METHODS}
    for i, (task, floor) in enumerate(FLOOR.items()):
        for j, level in enumerate(LEVELS):
            for method in METHODS:
                above = means[task, level, method] - floor
                clean = means[task, 0, baseline or method] - floor
                relative[method][:, i, j] = above / clean
    return relative


def interval(samples):
    return np.quantile(samples[1:], [0.025, 0.975], axis=0)


def estimate(samples):
    value, low, high = np.round([samples[0], *interval(samples)], 2) + 0.0  # no -0.00
    return f"{value:.2f} ({low:.2f} to {high:.2f})"


def print_table(title, relative):
    """Areas and levels of methods and of their differences; `relative`: (1 + SAMPLES, levels)."""
    rows = {METHODS[method]: values for method, values in relative.items()}
    for a, b in (("sppo", "dppo"), ("dppo", "ppo"), ("sppo", "ppo")):
        rows[f"{METHODS[a]} minus {METHODS[b]}"] = relative[a] - relative[b]
    print(f"| {title} | area | {' | '.join(map(str, LEVELS))} |\n|{'---|' * 7}")
    for name, values in rows.items():
        texts = [estimate(values.mean(axis=-1)), *map(estimate, values.T)]
        print(f"| {name} | {' | '.join(texts)} |")
    print()


def print_measures(scores):
    """Averaged over the tasks."""
    relative = relative_scores(scores)
    print_table("", {method: values.mean(axis=1) for method, values in relative.items()})


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
    x = np.arange(len(LEVELS))
    for shift, (method, values) in zip((-0.1, 0, 0.1), relative_scores(scores).items()):
        panels = {"all three tasks": values.mean(axis=1)}
        panels |= {task.partition("-")[0]: values[:, i] for i, task in enumerate(FLOOR)}
        for ax, (title, samples) in zip(axes, panels.items()):
            style = {"color": COLORS[method], "label": METHODS[method]}
            ax.plot(x + shift, samples[0], "o-", markersize=4, **style)
            ax.vlines(x + shift, *interval(samples), color=COLORS[method])
            ax.set_title(title)
            ax.set_xticks(x, LEVELS)
            ax.set_xlabel("standard deviation of the noise")
            ax.grid(alpha=0.3)
    axes[0].set_ylabel("score relative to clean DPPO")
    axes[0].legend()
    figure.savefig(HERE / "noise.png", dpi=80)


if __name__ == "__main__":
    plt.switch_backend("agg")
    scores = scores_of(read())
    print_measures(scores)
    print_tasks(scores)
    print_own(scores)
    print_scores(scores)
    draw(scores)
