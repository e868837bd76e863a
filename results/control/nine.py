"""SPPO, DPPO and Gaussian PPO on the paper's nine tasks of continuous control, as registered.

python -m results.control.nine    # prints the tables, draws the figure

Runs: nine.sh. What counts was registered before the first run, and is in the docstrings below. A
score is the mean of a run's last five evaluations, a run that stopped twice with the script's own
error has a random agent's score. Effects are shares of the score: the difference of two methods'
means, divided by how far the mean of both is above a random agent's. Means are over seeds.
"""

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from scipy import stats

HERE = Path(__file__).parent
TASKS = """\
InvertedDoublePendulum-v4 LunarLanderContinuous-v3 Hopper-v4 Ant-v4 HumanoidStandup-v4 Walker2d-v4
HalfCheetah-v4 Swimmer-v4 BipedalWalker-v3""".split()
NOISES = {"none": "clean", "normal": "noisy"}
METHODS = {"ppo": "PPO", "dppo": "DPPO", "sppo": "SPPO"}
PRIMARY = "last five evaluations"
MEASURES = [PRIMARY, "last evaluation", "training"]
MATTERS = 0.1  # an effect that would matter
FEWEST = 5  # whole seeds, for a test


# ---- Scores


def random_scores():
    return pd.read_csv(HERE / "random.csv").groupby("task")["score"].mean()


def read_runs():
    """A row for each run that has finished, or stopped twice with the script's own error, and is of
    a whole seed, one with all 54 runs. The columns of MEASURES have its scores."""
    runs = pd.read_csv(HERE / "nine-runs.csv.gz", dtype=str, keep_default_na=False)
    runs = runs[runs["finished"] == "True"].set_index("run_name")
    progress = pd.read_csv(HERE / "nine-progress.csv.gz")
    evaluations = progress[progress["run_name"].isin(runs.index)].groupby("run_name")
    assert set(evaluations.size()) == {20}
    last = evaluations.tail(1).set_index("run_name")
    runs[PRIMARY] = evaluations["return_mean"].apply(lambda x: x.tail(5).mean())
    runs["last evaluation"] = last["return_mean"]
    runs["training"] = last["charts/episodic_return"]
    runs["stopped"] = False
    if (HERE / "nine-stopped.csv").exists():
        stopped = pd.read_csv(HERE / "nine-stopped.csv", dtype=str).assign(stopped=True)
        stopped[MEASURES] = np.transpose([stopped["env_id"].map(random_scores())] * 3)
        runs = pd.concat([runs, stopped])
    runs["seed"] = runs["seed"].astype(int)
    assert not runs.duplicated(["env_id", "noise", "exp_name", "seed"]).any()
    whole = runs.groupby("seed")["env_id"].transform("size")
    return runs[whole == len(TASKS) * len(NOISES) * len(METHODS)]


def scores_of(runs, measure=PRIMARY):
    """{(task, noise, method): scores (seeds,), in the same order everywhere}"""
    cells = runs.sort_values("seed").groupby(["env_id", "noise", "exp_name"])[measure]
    return {place: cell.to_numpy(float) for place, cell in cells}


# ---- Statistics. A comparison is a list of (scores, weight), whose value sums weighted means


@dataclass
class Estimate:
    value: float
    low: float
    high: float
    p: float

    def __str__(self):
        value, low, high = np.round([self.value, self.low, self.high], 3) + 0.0  # no -0.000
        return f"{value:.3f} ({low:.3f} to {high:.3f})"


def estimate(comparison):
    """The value with its 95 % interval over seeds, by Welch and Satterthwaite, and p."""
    value = sum(weight * scores.mean() for scores, weight in comparison)
    sizes = np.array([len(scores) for scores, _ in comparison])
    variances = np.array([weight**2 * scores.var(ddof=1) for scores, weight in comparison]) / sizes
    error = np.sqrt(variances.sum())
    freedom = variances.sum() ** 2 / (variances**2 / (sizes - 1)).sum()
    half = error * stats.t.ppf(0.975, freedom)
    return Estimate(value, value - half, value + half, 2 * stats.t.sf(abs(value) / error, freedom))


def effect(a, b, random):
    """`a` minus `b` as a share of the score. The denominator is taken as known."""
    scale = (a.mean() + b.mean()) / 2 - random
    return [(a, 1 / scale), (b, -1 / scale)]


def counts(a, b, random):
    """Whether the mean of both exceeds a random agent's score by more than five of its standard
    errors, so that shares of it mean something."""
    error = np.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b)) / 2
    return (a.mean() + b.mean()) / 2 - random > 5 * error


def pooled(effects):
    """Their mean: a comparison, too."""
    return [(scores, weight / len(effects)) for parts in effects for scores, weight in parts]


def over_effects(effects):
    """The mean with the effect, of a task with clean or noisy rewards, as the unit, by t."""
    values = [estimate(parts).value for parts in effects]
    test = stats.ttest_1samp(values, 0)
    return Estimate(np.mean(values), *test.confidence_interval(), test.pvalue)


def effects_of(scores, first, second, all_tasks=False):
    """{task: effect}, of the tasks that count. `first` and `second` are (noise, method)."""
    found = {}
    for task, random in random_scores()[TASKS].items():
        pair = scores[(task, *first)], scores[(task, *second)]
        if all_tasks or counts(*pair, random):
            found[task] = effect(*pair, random)
    return found


def losses(scores, noise, all_tasks=False):
    """What the loss gives: SPPO minus DPPO."""
    return effects_of(scores, (noise, "sppo"), (noise, "dppo"), all_tasks)


def noisy_minus_clean(scores):
    """Of the tasks that count in both."""
    noisy = losses(scores, "normal")
    found = []
    for task, clean in losses(scores, "none").items():
        if task in noisy:
            found.append(noisy[task] + [(values, -weight) for values, weight in clean])
    return found


def holm(first, second):
    """Two p-values, corrected by Holm's method."""
    smaller = min(1, 2 * min(first, second))
    larger = max(smaller, first, second)
    return (smaller, larger) if first <= second else (larger, smaller)


def verdict(found, corrected_p):
    if corrected_p < 0.05:
        return "seen" if found.value > 0 else "reversed"
    return "not seen" if found.high < MATTERS else "undecided"


# ---- Tables


def markdown(header, rows):
    lines = [f"| {' | '.join(map(str, row))} |" for row in [header, *rows]]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def short(task):
    return task.partition("-")[0].removesuffix("Continuous")


def pooled_text(effects):
    """The mean of `effects`, {task: effect}, and the tasks that do not count."""
    left_out = [short(task) for task in TASKS if task not in effects]
    text = str(estimate(pooled(effects.values())))
    return f"{text} without {', '.join(left_out)}" if left_out else text


def tests():
    """The two registered tests, and below them what has none. Fewer than five whole seeds: no test,
    only estimates."""
    runs = read_runs()
    scores = scores_of(runs)
    clean, noisy = ([*losses(scores, noise).values()] for noise in NOISES)
    effects = {"clean": clean, "noisy": noisy, "both together": clean + noisy}
    effects["noisy minus clean"] = noisy_minus_clean(scores)
    found = {title: estimate(pooled(parts)) for title, parts in effects.items()}
    corrected = dict(zip(found, holm(found["clean"].p, found["noisy"].p)))
    rows = []
    for title, parts in effects.items():
        row = [title, found[title], over_effects(parts), "", "", ""]
        if title in corrected:
            p = corrected[title]
            row[3:] = f"{found[title].p:.2g}", f"{p:.2g}", verdict(found[title], p)
        rows.append(row)
    header = ["rewards", "SPPO minus DPPO", "over effects", "p", "p, by Holm", "verdict"]
    if runs["seed"].nunique() < FEWEST:
        header = header[:3]
        rows = [row[:3] for row in rows]
    return markdown(header, rows)


def measures():
    """The pooled effect in each measure."""
    rows = []
    for measure in MEASURES:
        scores = scores_of(read_runs(), measure)
        rows.append([measure, *(pooled_text(losses(scores, noise)) for noise in NOISES)])
    return markdown(["measure", *NOISES.values()], rows)


def each_task():
    """Of all nine tasks; (no): the task does not count."""
    scores = scores_of(read_runs())
    columns = []
    for noise in NOISES:
        effects = losses(scores, noise, all_tasks=True)
        marks = dict.fromkeys(losses(scores, noise), "")
        columns.append([f"{estimate(x)}{marks.get(t, ' (no)')}" for t, x in effects.items()])
    return markdown(["task", *NOISES.values()], zip(map(short, TASKS), *columns))


def other_comparisons():
    """What bins do, what bins and the loss do, and what noise costs each method."""
    scores = scores_of(read_runs())
    pairs = {}
    for noise, title in NOISES.items():
        pairs[f"DPPO minus PPO, {title}"] = (noise, "dppo"), (noise, "ppo")
        pairs[f"SPPO minus PPO, {title}"] = (noise, "sppo"), (noise, "ppo")
    for method, title in METHODS.items():
        pairs[f"{title}, noisy minus clean"] = ("normal", method), ("none", method)
    rows = []
    for title, pair in pairs.items():
        effects = [effects_of(scores, *pair, all_tasks) for all_tasks in (False, True)]
        rows.append([title, *map(pooled_text, effects)])
    return markdown(["comparison", "tasks that count", "all nine tasks"], rows)


def paper_table():
    """Means ± standard errors, and how many runs stopped, where some did."""
    runs = read_runs()
    scores = scores_of(runs)
    stopped = runs.groupby(["env_id", "noise", "exp_name"])["stopped"].sum()
    rows = []
    for task in TASKS:
        row = [short(task)]
        for place in product([task], NOISES, METHODS):
            text = f"{scores[place].mean():,.0f} ± {stats.sem(scores[place]):,.0f}"
            row.append(f"{text} ({stopped[place]} stopped)" if stopped[place] else text)
        rows.append(row)
    columns = [f"{method}, {noise}" for noise, method in product(NOISES.values(), METHODS.values())]
    return markdown(["task", *columns], rows)


def draw():
    """The effect on each task, and below the pooled ones, with 95 % intervals."""
    scores = scores_of(read_runs())
    figure, ax = plt.subplots(figsize=(6.5, 4), layout="constrained")
    rows = [*map(short, TASKS), "mean of the tasks that count"]
    for offset, (noise, title) in zip([-0.15, 0.15], NOISES.items()):
        points = [estimate(parts) for parts in losses(scores, noise, all_tasks=True).values()]
        points.append(estimate(pooled(losses(scores, noise).values())))
        values = np.array([point.value for point in points])
        half = values - [point.low for point in points]
        ax.errorbar(values, offset + np.arange(len(rows)), xerr=half, fmt="o", label=title)
    ax.axvline(0, color="gray", linewidth=0.8)
    ax.axvline(MATTERS, color="gray", linewidth=0.8, linestyle=":")
    ax.set_yticks(range(len(rows)), rows)
    ax.invert_yaxis()
    ax.set_xlim(-1, 1)  # two seeds' intervals are wider
    ax.set_xlabel("SPPO minus DPPO, share of the score (dotted: a tenth)")
    figure.legend(loc="outside upper center", ncols=2)
    figure.savefig(HERE / "nine.png", dpi=170)


if __name__ == "__main__":
    plt.switch_backend("agg")
    for table in [tests, measures, each_task, other_comparisons, paper_table]:
        print(table(), end="\n\n")
    draw()
