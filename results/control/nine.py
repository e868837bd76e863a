"""SPPO, DPPO and Gaussian PPO on the paper's nine tasks of continuous control.

What counts was registered before the first run (964497c), and is in the docstrings below. A score
is the mean of a run's last five evaluations. Effects are shares of the score: the difference of two
methods' means, divided by how far the mean of both is above a random agent's. Means are over seeds.
Five whole seeds were needed for the registered tests; two are there, so nothing is tested. They
suggested the test in nine_test.py.
"""

from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.compare import contrast
from analysis.measures import FIVE
from analysis.tables import markdown
from results.common import (
    MEASURES,
    NOISES,
    by_cell,
    estimate_text,
    mean,
    read,
    score_text,
    short,
)
from results.comparisons import Comparison, includes_0

HERE = Path(__file__).parent
TASKS = """\
InvertedDoublePendulum-v4 LunarLanderContinuous-v3 Hopper-v4 Ant-v4 HumanoidStandup-v4 Walker2d-v4
HalfCheetah-v4 Swimmer-v4 BipedalWalker-v3""".split()
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


def scores_of(measure=FIVE):
    return by_cell(whole_seeds(read("control/nine"), METHODS), measure)


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
    return both.value - random > 5 * np.nan_to_num(both.error)  # nan: equal scores


def pooled(effects):
    """The estimate of their mean."""
    return estimate([(x, weight / len(effects)) for parts in effects for x, weight in parts])


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
    return found | {TOGETHER: sum(found.values(), [])}


def over_tasks(scores):
    """The same with the task as the unit: of both together, the mean of its effects."""
    found = {}
    for noise, title in NOISES.items():
        effects = losses(scores, noise).items()
        found[title] = pd.Series({task: estimate(parts).value for task, parts in effects})
    found[TOGETHER] = pd.DataFrame(found).mean(axis=1)
    return {title: mean(effects.to_numpy()) for title, effects in found.items()}


def noisy_minus_clean(scores):
    """Of the tasks that count in both."""
    clean, noisy = (losses(scores, noise) for noise in NOISES)
    both = [task for task in clean if task in noisy]
    return [noisy[task] + [(x, -weight) for x, weight in clean[task]] for task in both]


# ---- Tables, claims, predictions


def row_of(title, scores, **options):
    """The pooled effects, by rewards."""
    effects = by_rewards(scores, **options).values()
    return [title, *(estimate_text(pooled(parts), 3) for parts in effects)]


def pooled_text(effects):
    """The mean of `effects`, {task: effect}, and the tasks that do not count."""
    left_out = [short(task) for task in TASKS if task not in effects]
    text = estimate_text(pooled(effects.values()), 3)
    return f"{text} without {', '.join(left_out)}" if left_out else text


def each_task(scores):
    """Of all nine tasks; (no): the task does not count."""
    columns = []
    for noise in NOISES:
        there = losses(scores, noise)
        effects = losses(scores, noise, all_tasks=True)
        texts = {task: estimate_text(estimate(parts), 3) for task, parts in effects.items()}
        columns.append([texts[task] + ("" if task in there else " (no)") for task in TASKS])
    return markdown(["task", *NOISES.values()], zip(map(short, TASKS), *columns))


def with_all_seeds(scores):
    """With those of other packs that ran a million steps: post hoc."""
    scores = dict(scores)
    for pack in ["three-tasks", "locomotion"]:
        for place, older in by_cell(read(f"control/{pack}"), FIVE).items():
            if place in scores and place[2] in ["dppo", "sppo"]:
                scores[place] = np.append(scores[place], older)
    return scores


def other_pairs():
    """{title: pair}: what bins do, what bins and the loss do, and what noise costs each method."""
    pairs = {}
    for noise, title in NOISES.items():
        pairs[f"DPPO minus PPO, {title}"] = (noise, "dppo"), (noise, "ppo")
        pairs[f"SPPO minus PPO, {title}"] = (noise, "sppo"), (noise, "ppo")
    clean, noisy = NOISES
    for method, title in METHODS.items():
        pairs[f"{title}, {CHANGE}"] = (noisy, method), (clean, method)
    return pairs


def other_comparisons():
    scores = scores_of()
    rows = []
    for title, pair in other_pairs().items():
        effects = [effects_of(scores, *pair, all_tasks) for all_tasks in (False, True)]
        rows.append([title, *map(pooled_text, effects)])
    return markdown(["comparison", "tasks that count", "all nine tasks"], rows)


def paper_table(scores):
    """Means ± standard errors."""
    rows = []
    for task in TASKS:
        places = product([task], NOISES, METHODS)
        rows.append([short(task), *(score_text(scores[place]) for place in places)])
    columns = [f"{method}, {noise}" for noise, method in product(NOISES.values(), METHODS.values())]
    return markdown(["task", *columns], rows)


def tasks_of(rewards, effects):
    """How many tasks count in all of these rewards."""
    return len(effects) // len(NOISES) if rewards == TOGETHER else len(effects)


def compared(name, scores, measure=FIVE):
    """The pooled effects, without a test."""
    page = "control/README.md#nine-tasks-a-million-steps"
    seeds = min(map(len, scores.values()))
    for claim, (rewards, effects) in zip(["1", "2", "1"], by_rewards(scores).items()):
        found = pooled(effects)
        options = {"tasks": tasks_of(rewards, effects), "measure": MEASURES[measure]}
        options |= {"direct": False, "enough": False}
        yield Comparison(claim, f"{name}, {rewards}", page, found, seeds, **options)


def comparisons():
    """Of the two seeds that suggested the test."""
    yield from compared("nine tasks, two seeds seen before", scores_of())


def predictions():
    scores = scores_of()
    clean, noisy = (losses(scores, noise) for noise in NOISES)
    effects = {title: effects_of(scores, *pair) for title, pair in other_pairs().items()}
    found = {title: pooled(parts.values()) for title, parts in effects.items()}
    costs = [found[f"{title}, {CHANGE}"].value for title in METHODS.values()]
    pairs = [(scores[task, "clean", "dppo"], scores[task, "clean", "ppo"]) for task in TASKS]
    above = sum(dppo.mean() > ppo.mean() for dppo, ppo in pairs)
    return {
        "nine-pooled": all(abs(pooled(x.values()).value) < 0.1 for x in (clean, noisy)),
        "nine-change": includes_0(pooled(noisy_minus_clean(scores))),
        "nine-counts": len(clean) == len(noisy) == 9,
        "nine-bins": found["DPPO minus PPO, noisy"].value > found["DPPO minus PPO, clean"].value,
        "nine-cost": found[f"PPO, {CHANGE}"].high < 0,
        "nine-largest-cost": found[f"PPO, {CHANGE}"].value == min(costs),
        "nine-clean-bins": 2 <= above <= 7,
    }
