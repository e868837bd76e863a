"""The registered test of the paper's nine tasks: SPPO minus DPPO, with six unseen seeds.

Runs: those of nine.sh with seeds 20002 to 20007, without Gaussian PPO, by the script of 964497c.
Seeds 20000 and 20001 (the pack nine) suggested the test, so they are not in it. What counts was
registered in 964497c, the order of the tests and their verdicts were committed (db9a099) when 16 of
216 runs had finished, before anybody saw a score. a2c/nine.py has the same test of SA2C.

A score is the mean of a run's last five evaluations. Effects are shares of the score: the
difference of two methods' means, divided by how far the mean of both is above a random agent's.
"""

from itertools import product

import numpy as np
import pandas as pd
from scipy import stats

from analysis.compare import Estimate, contrast
from analysis.measures import FIVE, LAST, TRAINING
from analysis.runs import CELL
from analysis.tables import interval_text, markdown
from results.common import (
    MEASURES,
    NOISES,
    RESULTS,
    bars,
    draw_rows,
    estimate_table,
    estimate_text,
    holm,
    mean,
    read,
    score_text,
    short,
)
from results.verdicts import Comparison

PAGE = "control/README.md#nine-tasks-a-million-steps"
TASKS = """\
InvertedDoublePendulum-v4 LunarLanderContinuous-v3 Hopper-v4 Ant-v4 HumanoidStandup-v4 Walker2d-v4
HalfCheetah-v4 Swimmer-v4 BipedalWalker-v3""".split()
METHODS = ["dppo", "sppo"]
SEEDS = range(20002, 20008)
CLEAN, NOISY = NOISES.values()
TOGETHER = "both together"
CLAIMS = {TOGETHER: "1", CLEAN: "1", NOISY: "2"}


# ---- Scores: {(task, noise, method): scores (seeds,)}


def random_scores():
    return pd.read_csv(RESULTS / "control/random.csv").groupby("task")["score"].mean()


def whole_seeds(scores, methods):
    """Scores of the seeds that have all runs: on nine tasks, clean and noisy."""
    runs = scores.groupby(["measure", "seed"])["score"].transform("size")
    return scores[runs == len(TASKS) * len(NOISES) * len(methods)]


def with_stopped(pack, scores):
    """With the runs that stopped twice with the script's own error, which are in PACK-stopped.csv,
    and have a random agent's score."""
    path = RESULTS / f"{pack}-stopped.csv"
    if not path.exists():
        return scores
    stopped = pd.read_csv(path)
    stopped["score"] = stopped["task"].map(random_scores())
    return pd.concat([scores, *(stopped.assign(measure=measure) for measure in MEASURES)])


def read_whole(pack, seeds, methods):
    """Scores of a pack's whole seeds, of those that are registered."""
    scores = read(pack)
    scores = with_stopped(pack, scores[scores["measure"].isin(MEASURES)])
    places = scores.groupby(["measure", *CELL, "seed"]).size()
    assert set(scores["seed"]) <= set(seeds) and set(places) == {1}
    return whole_seeds(scores, methods)


def by_place(scores, measure=FIVE):
    chosen = scores[scores["measure"] == measure]
    return {place: x.to_numpy(float) for place, x in chosen.groupby(CELL)["score"]}


def unseen(measure=FIVE):
    return by_place(read_whole("control/nine-test", SEEDS, METHODS), measure)


def first_seeds():
    """Of the two that suggested the test, with Gaussian PPO."""
    return by_place(read_whole("control/nine", range(20000, 20008), ["ppo", *METHODS]))


def joined(scores, others):
    """With those of `others`."""
    return {place: np.append(x, others.get(place, [])) for place, x in scores.items()}


def all_seeds():
    """With those of other packs that ran a million steps: post hoc."""
    scores = joined(unseen(), first_seeds())
    for pack in ["control/three-tasks", "control/locomotion"]:
        scores = joined(scores, by_place(read(pack)))
    return scores


# ---- Effects


def effect(a, b, random, delta=False):
    """`a` minus `b` as a share of the score. The denominator is taken as known. By the `delta`
    method its error counts, too, and the value means nothing."""
    scale = (a.mean() + b.mean()) / 2 - random
    half = (a.mean() - b.mean()) / scale / 2 if delta else 0
    return contrast([a, b], [(1 - half) / scale, -(1 + half) / scale])


def counts(a, b, random):
    """Whether the mean of both exceeds a random agent's score by more than five of its standard
    errors, so that shares of it mean something."""
    both = contrast([a, b], [0.5, 0.5])
    return both.value - random > 5 * np.nan_to_num(both.error)  # nan: equal scores


def effects_of(scores, first, second, all_tasks=False, delta=False):
    """{task: effect}, of the tasks that count. `first` and `second` are (noise, method)."""
    found = {}
    for task, random in random_scores()[TASKS].items():
        a, b = scores[(task, *first)], scores[(task, *second)]
        if all_tasks or counts(a, b, random):
            found[task] = effect(a, b, random, delta)
    return found


def losses(scores, noise, **options):
    """What the loss gives: SPPO minus DPPO."""
    return effects_of(scores, (noise, "sppo"), (noise, "dppo"), **options)


def pooled(effects):
    """The estimate of their mean, by Welch and Satterthwaite."""
    values, errors, freedoms = zip(*((x.value, x.error, x.freedom) for x in effects))
    squares = np.square(errors)
    freedom = np.nansum(squares) ** 2 / np.nansum(squares**2 / freedoms)  # nan: equal scores
    return Estimate(np.mean(values), np.sqrt(np.nansum(squares)) / len(values), freedom)


def by_rewards(scores, without=None, **options):
    """{rewards: effects} on the tasks that count, but for the one that is left out. If a task
    counts with one kind of rewards only, together is the mean of all effects that count."""
    found = {}
    for noise, rewards in NOISES.items():
        effects = losses(scores, noise, **options)
        found[rewards] = [effect for task, effect in effects.items() if task != without]
    return found | {TOGETHER: found[CLEAN] + found[NOISY]}


def pooled_by_rewards(scores, **options):
    return {rewards: pooled(effects) for rewards, effects in by_rewards(scores, **options).items()}


def over_tasks(scores):
    """The same with the task as the unit: of both together, the mean of its effects."""
    values = pd.DataFrame(index=TASKS)
    for noise, rewards in NOISES.items():
        values[rewards] = pd.Series({task: x.value for task, x in losses(scores, noise).items()})
    values[TOGETHER] = values.mean(axis=1)
    return {rewards: mean(column.dropna().to_numpy()) for rewards, column in values.items()}


# ---- Comparisons


def compared(name, scores, measure=FIVE):
    """Both together, clean, noisy; without a test."""
    options = {"measure": MEASURES[measure], "matters": 0.1, "beside": True}
    options["seeds"] = min(map(len, scores.values()))
    effects = by_rewards(scores)
    for rewards, claim in CLAIMS.items():
        found = pooled(effects[rewards])
        tasks = len(effects[rewards]) // (2 if rewards == TOGETHER else 1)
        yield Comparison(claim, f"{name}, {rewards}", PAGE, found, tasks=tasks, **options)


def tested(name, scores):
    """The same with the registered tests. Together comes first: clean and noisy, by Holm's method,
    are tested only if its p is below 0.05, so theirs is no smaller."""
    together, clean, noisy = compared(name, scores)
    together.p = together.found.p
    for one, p in zip([clean, noisy], holm([clean.found.p, noisy.found.p])):
        one.p = max(p, together.p)
        one.beside = False
    return [together, clean, noisy]


def comparisons():
    yield from tested("SPPO minus DPPO, nine tasks, a million steps", unseen())
    for measure in (LAST, TRAINING):
        yield from compared("nine tasks, unseen seeds", unseen(measure), measure)
    with_two = joined(unseen(), first_seeds())
    yield from compared("nine tasks, with two seeds seen before", with_two)
    yield from compared("nine tasks, all seeds of all packs", all_seeds())
    yield from compared("nine tasks, two seeds seen before", first_seeds())


# ---- Tables


def power(found, gain):
    """The share of tests in which such a gain has p below 0.05."""
    critical = stats.t.ppf(0.975, found.freedom)
    return f"{100 * stats.nct.sf(critical, found.freedom, gain / found.error):.0f} %"


def tests(scores=None, difference="SPPO minus DPPO"):
    scores = unseen() if scores is None else scores
    wider = by_rewards(scores, delta=True)
    rows = []
    for rewards, one in zip(CLAIMS, tested("", scores)):
        found = one.found
        half = pooled(wider[rewards]).half_width()
        second = interval_text(found.value, found.value - half, found.value + half, 3)
        row = [rewards, estimate_text(found, 3), second, f"{found.p:.2g}", f"{one.p:.2g}"]
        rows.append([*row, one.verdict(), power(found, 0.1), power(found, 0.05)])
    header = ["rewards", difference, "counting the denominator's error", "p", "p, by Holm"]
    return markdown([*header, "verdict", "finds a tenth in", "half of it in"], rows)


def beside():
    """Without a test: other measures, the task as the unit, older seeds."""
    rows = {title: pooled_by_rewards(unseen(measure)) for measure, title in MEASURES.items()}
    rows["over tasks"] = over_tasks(unseen())
    rows["the two seeds seen before"] = pooled_by_rewards(first_seeds())
    rows["with these two"] = pooled_by_rewards(joined(unseen(), first_seeds()))
    rows["all seeds of all packs"] = pooled_by_rewards(all_seeds())
    return estimate_table("", rows, places=3)


def each_task(scores):
    """Of all nine, whether they count or not."""
    found = {rewards: losses(scores, noise, all_tasks=True) for noise, rewards in NOISES.items()}
    rows = {short(task): {x: effects[task] for x, effects in found.items()} for task in TASKS}
    return estimate_table("task", rows, places=3)


def without_one_task(scores):
    rows = {short(task): pooled_by_rewards(scores, without=task) for task in TASKS}
    return estimate_table("without", rows, places=3)


def paper_table():
    """Of DPPO and SPPO with the two seeds seen before, of PPO of these two only."""
    scores = first_seeds() | joined(unseen(), first_seeds())
    columns = list(product(NOISES, ["ppo", *METHODS]))
    rows = [[short(x), *(score_text(scores[(x, *column)]) for column in columns)] for x in TASKS]
    header = [f"{method.upper()}, {NOISES[noise]}" for noise, method in columns]
    return markdown(["task", *header], rows)


def draw():
    """The effect on each task, and below the pooled ones. Crosses: the two seeds seen before."""
    names = [*map(short, TASKS), "mean of the tasks that count", TOGETHER]
    ticks = {name: y for y, name in enumerate(names)}
    together = pooled_by_rewards(unseen())[TOGETHER]
    style = {"color": "black", "marker": "o"}
    series = [(ticks[TOGETHER], together.value, together.half_width(), style)]
    for shift, color, (noise, rewards) in zip([-0.15, 0.15], ["C0", "C1"], NOISES.items()):
        y = shift + np.arange(len(TASKS) + 1)
        for seeds, scores in {"": unseen(), ", two seeds seen before": first_seeds()}.items():
            effects = losses(scores, noise, all_tasks=True).values()
            values, half = bars([*effects, pooled(losses(scores, noise).values())])
            style = {"color": color, "label": rewards + seeds}
            style |= {"marker": "x", "alpha": 0.5} if seeds else {"marker": "o"}
            series.append((y, values, None if seeds else half, style))
    file = RESULTS / "control/nine.png"
    draw_rows(file, ticks, series, matters=0.1, xlabel="SPPO minus DPPO, share of the score")
