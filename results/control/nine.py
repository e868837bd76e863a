"""SPPO, DPPO and Gaussian PPO on the paper's nine tasks of continuous control.

python -m results.control.nine    # prints the tables, draws the figure

What counts was registered before the first run (964497c), and is in the docstrings below. A score
is the mean of a run's last five evaluations. Effects are shares of the score: the difference of two
methods' means, divided by how far the mean of both is above a random agent's. Means are over seeds.
Five whole seeds were needed for the registered tests; two are there, so nothing is tested.
"""

from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from analysis.compare import cells_of, contrast
from analysis.measures import FIVE, LAST, TRAINING
from analysis.tables import markdown
from results.common import MEASURES, estimate_text, mean, read, score_text, short

HERE = Path(__file__).parent
TASKS = """\
InvertedDoublePendulum-v4 LunarLanderContinuous-v3 Hopper-v4 Ant-v4 HumanoidStandup-v4 Walker2d-v4
HalfCheetah-v4 Swimmer-v4 BipedalWalker-v3""".split()
NOISES = {"clean": "clean", "normal 0.05": "noisy"}
METHODS = {"ppo": "PPO", "dppo": "DPPO", "sppo": "SPPO"}
MATTERS = 0.1  # an effect that would matter
TOGETHER = "both together"
CHANGE = "noisy minus clean"


# ---- Scores


def random_scores():
    return pd.read_csv(HERE / "random.csv").groupby("task")["score"].mean()


def whole_seeds(scores, methods):
    """Scores of the seeds that have all runs: on nine tasks, clean and noisy."""
    runs = scores.groupby(["measure", "seed"])["score"].transform("size")
    return scores[runs == len(TASKS) * len(NOISES) * len(methods)]


def by_place(scores, measure):
    """{(task, noise, method): scores (seeds,)}"""
    cells = cells_of(scores, measure)
    return {(*place, method): x for place, cell in cells.items() for method, x in cell.items()}


def scores_of(measure=FIVE):
    return by_place(whole_seeds(read("control/nine"), METHODS), measure)


# ---- Statistics. An effect is a list of (scores, weight): its value sums weighted means


def estimate(effect):
    samples, weights = zip(*effect)
    return contrast(samples, weights)


def effect(a, b, random):
    """`a` minus `b` as a share of the score. The denominator is taken as known."""
    scale = (a.mean() + b.mean()) / 2 - random
    return [(a, 1 / scale), (b, -1 / scale)]


def counts(a, b, random):
    """Whether the mean of both exceeds a random agent's score by more than five of its standard
    errors, so that shares of it mean something."""
    both = contrast([a, b], [0.5, 0.5])
    return both.value - random > 5 * both.error


def pooled(effects):
    """Their mean: an effect, too."""
    return [(scores, weight / len(effects)) for parts in effects for scores, weight in parts]


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


def by_rewards(scores, left_out=None):
    """What the loss gives on the tasks that count, but for one that is left out. If a task counts
    with one kind of rewards only, together is the mean of all effects that count."""
    found = {}
    for noise, title in NOISES.items():
        effects = losses(scores, noise)
        found[title] = [effect for task, effect in effects.items() if task != left_out]
    return found | {TOGETHER: [effect for effects in found.values() for effect in effects]}


def noisy_minus_clean(scores):
    """Of the tasks that count in both."""
    clean, noisy = (losses(scores, noise) for noise in NOISES)
    found = []
    for task, parts in clean.items():
        if task in noisy:
            found.append(noisy[task] + [(sample, -weight) for sample, weight in parts])
    return found


# ---- Tables


def text_of(effect):
    return estimate_text(estimate(effect), 3)


def row_of(title, scores, left_out=None):
    """The pooled effects, by rewards."""
    effects = by_rewards(scores, left_out).values()
    return [title, *(text_of(pooled(parts)) for parts in effects)]


def pooled_text(effects):
    """The mean of `effects`, {task: effect}, and the tasks that do not count."""
    left_out = [short(task) for task in TASKS if task not in effects]
    text = text_of(pooled(effects.values()))
    return f"{text} without {', '.join(left_out)}" if left_out else text


def tests():
    """Over seeds, and with each effect, of a task with clean or noisy rewards, as the unit."""
    scores = scores_of()
    rows = []
    for title, effects in (by_rewards(scores) | {CHANGE: noisy_minus_clean(scores)}).items():
        values = np.array([estimate(parts).value for parts in effects])
        rows.append([title, text_of(pooled(effects)), estimate_text(mean(values), 3)])
    return markdown(["rewards", "SPPO minus DPPO", "over effects"], rows)


def measures():
    """The pooled effect in each measure."""
    rows = []
    for measure in [FIVE, LAST, TRAINING]:
        scores = scores_of(measure)
        texts = (pooled_text(losses(scores, noise)) for noise in NOISES)
        rows.append([MEASURES[measure], *texts])
    return markdown(["measure", *NOISES.values()], rows)


def each_task(scores=None):
    """Of all nine tasks; (no): the task does not count."""
    scores = scores or scores_of()
    columns = []
    for noise in NOISES:
        there = losses(scores, noise)
        effects = losses(scores, noise, all_tasks=True)
        columns.append([text_of(x) + ("" if t in there else " (no)") for t, x in effects.items()])
    return markdown(["task", *NOISES.values()], zip(map(short, TASKS), *columns))


def with_all_seeds(scores):
    """With those of other packs that ran a million steps: post hoc."""
    scores = dict(scores)
    for pack in ["three-tasks", "locomotion"]:
        for place, older in by_place(read(f"control/{pack}"), FIVE).items():
            if place in scores and place[2] in ["dppo", "sppo"]:
                scores[place] = np.append(scores[place], older)
    return scores


def all_seeds():
    scores = with_all_seeds(scores_of())
    sizes = [len(sample) for sample in scores.values()]
    row = row_of(f"{min(sizes)} to {max(sizes)}", scores)
    return markdown(["seeds a task", *by_rewards(scores)], [row])


def other_comparisons():
    """What bins do, what bins and the loss do, and what noise costs each method."""
    scores = scores_of()
    pairs = {}
    for noise, title in NOISES.items():
        pairs[f"DPPO minus PPO, {title}"] = (noise, "dppo"), (noise, "ppo")
        pairs[f"SPPO minus PPO, {title}"] = (noise, "sppo"), (noise, "ppo")
    clean, noisy = NOISES
    for method, title in METHODS.items():
        pairs[f"{title}, {CHANGE}"] = (noisy, method), (clean, method)
    rows = []
    for title, pair in pairs.items():
        effects = [effects_of(scores, *pair, all_tasks) for all_tasks in (False, True)]
        rows.append([title, *map(pooled_text, effects)])
    return markdown(["comparison", "tasks that count", "all nine tasks"], rows)


def paper_table():
    """Means ± standard errors."""
    scores = scores_of()
    rows = []
    for task in TASKS:
        places = product([task], NOISES, METHODS)
        rows.append([short(task), *(score_text(scores[place]) for place in places)])
    columns = [f"{method}, {noise}" for noise, method in product(NOISES.values(), METHODS.values())]
    return markdown(["task", *columns], rows)


def draw():
    """The effect on each task, and below the pooled ones, with 95 % intervals."""
    scores = scores_of()
    figure, ax = plt.subplots(figsize=(6.5, 4), layout="constrained")
    rows = [*map(short, TASKS), "mean of the tasks that count"]
    for offset, (noise, title) in zip([-0.15, 0.15], NOISES.items()):
        points = [estimate(parts) for parts in losses(scores, noise, all_tasks=True).values()]
        points.append(estimate(pooled(losses(scores, noise).values())))
        values = [point.value for point in points]
        half = [point.half_width() for point in points]
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
