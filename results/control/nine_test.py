"""The registered test of the nine tasks: SPPO minus DPPO, with six seeds that nobody had seen.

python -m results.control.nine_test    # prints tests, what stands beside them, predictions; draws

Runs: those of nine.sh with seeds 20002 to 20007, without Gaussian PPO, by the script of 964497c.
Two other seeds suggested the test, so they are not in it. Scores, effects, which tasks count and p
are nine.py's. The order of the tests and their verdicts were written before the first run, and were
committed (db9a099) when 16 of 216 runs had finished, before anybody saw a score.
"""

from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from analysis.measures import FIVE, LAST, TRAINING
from analysis.runs import CELL
from analysis.tables import interval_text, markdown
from results.common import (
    MEASURES,
    RESULTS,
    bars,
    by_cell,
    estimate_text,
    holm,
    read,
    short,
)
from results.comparisons import Comparison
from results.control import nine
from results.control.nine import NOISES, TASKS, TOGETHER, by_rewards, estimate, pooled, row_of

CLEAN, NOISY = NOISES.values()
METHODS = ["dppo", "sppo"]
SEEDS = range(20002, 20008)
FEWEST = 4  # whole seeds, for a test
FIRST_SEEDS = 0.098  # the pooled effect that suggested the test


# ---- Scores


def read_scores(pack="control/nine-test", seeds=SEEDS):
    """Of the whole seeds, whose 36 runs have finished, or stopped twice with the script's own
    error. The latter are in PACK-stopped.csv, and have a random agent's score."""
    scores = read(pack)
    scores = scores[scores["measure"].isin(MEASURES)]
    path = RESULTS / f"{pack}-stopped.csv"
    if path.exists():
        stopped = pd.read_csv(path)
        stopped["score"] = stopped["task"].map(nine.random_scores())
        copies = [stopped.assign(measure=measure) for measure in MEASURES]
        scores = pd.concat([scores, *copies])
    places = scores.groupby(["measure", *CELL, "seed"]).size()
    assert set(scores["seed"]) <= set(seeds) and set(places) == {1}
    return nine.whole_seeds(scores, METHODS)


def scores_of(measure=FIVE):
    return by_cell(read_scores(), measure)


# ---- The second interval


def linearised(a, b, random):
    """`a` minus `b` as a share of the score, by the delta method: its error counts that of the
    denominator, too. Its value means nothing."""
    scale = (a.mean() + b.mean()) / 2 - random
    half = (a.mean() - b.mean()) / scale / 2
    return [(a, (1 - half) / scale), (b, -(1 + half) / scale)]


def delta_half_width(scores, noises):
    """Of the pooled effect's interval that counts the denominator's error."""
    parts = []
    for task, noise in product(TASKS, noises):
        pair = scores[task, noise, "sppo"], scores[task, noise, "dppo"]
        random = nine.random_scores()[task]
        if nine.counts(*pair, random):
            parts.append(linearised(*pair, random))
    return pooled(parts).half_width()


# ---- The tests, in their order


def verdict(found, corrected_p, first_p):
    """Of clean or noisy rewards. `first_p`: of both together, without which neither is tested."""
    if first_p < 0.05 and corrected_p < 0.05:
        return "seen" if found.value > 0 else "reversed"
    if found.low > 0:
        return "leaning for, its test failed"
    if found.high < 0:
        return "leaning against, its test failed"
    return "not seen" if found.high < nine.MATTERS else "undecided"


def tested(scores):
    """{title: (estimate, corrected p, verdict)}. Together comes first: only if its p is below 0.05,
    clean and noisy are tested, by Holm's method."""
    found = {title: pooled(parts) for title, parts in by_rewards(scores).items()}
    together = found.pop(TOGETHER)
    corrected = holm([one.p for one in found.values()])
    rows = {}
    for (title, one), p in zip(found.items(), corrected):
        rows[title] = one, p, verdict(one, p, together.p)
    alone = [text for _, _, text in rows.values() if text in ("seen", "reversed")]
    text = "its test failed"
    if together.p < 0.05:
        text = "seen over both together" if together.value > 0 else "reversed over both together"
        text += "" if alone else ", neither alone"
    return {TOGETHER: (together, together.p, text)} | rows


def tests(scores=None, difference="SPPO minus DPPO"):
    """With fewer than four whole seeds: estimates, without p and verdicts."""
    scores = scores_of() if scores is None else scores
    noises = {TOGETHER: list(NOISES)} | {title: [noise] for noise, title in NOISES.items()}
    rows = []
    for title, (found, p, text) in tested(scores).items():
        half = delta_half_width(scores, noises[title])
        wider = interval_text(found.value, found.value - half, found.value + half, 3)
        rows.append([title, estimate_text(found, 3), wider, f"{found.p:.2g}", f"{p:.2g}", text])
    header = ["rewards", difference, "counting the denominator's error"]
    header += ["p", "p, by Holm", "verdict"]
    if min(map(len, scores.values())) < FEWEST:
        header = header[:3]
        rows = [row[:3] for row in rows]
    return markdown(header, rows)


# ---- Beside them, without a test


def with_first_seeds(scores):
    """With the two that suggested the test."""
    older = nine.scores_of()
    return {place: np.append(sample, older[place]) for place, sample in scores.items()}


def beside():
    """The pooled effects in each measure, with the task as the unit, and with older seeds."""
    scores = scores_of()
    rows = [row_of(title, scores_of(measure)) for measure, title in MEASURES.items()]
    units = nine.over_tasks(scores).values()
    rows.append(["over tasks", *(estimate_text(found, 3) for found in units)])
    rows.append(row_of("the two seeds seen before", nine.scores_of()))
    scores = with_first_seeds(scores)
    rows.append(row_of("with these two", scores))
    rows.append(row_of("all seeds of all packs", nine.with_all_seeds(scores)))
    return markdown(["", *by_rewards(scores)], rows)


def each_task():
    return nine.each_task(scores_of())


def without_one_task(scores=None):
    scores = scores_of() if scores is None else scores
    rows = [row_of(short(task), scores, left_out=task) for task in TASKS]
    return markdown(["without", *by_rewards(scores)], rows)


def without_one_seed():
    scores = read_scores()
    rows = []
    for seed in sorted(set(scores["seed"])):
        fewer = by_cell(scores[scores["seed"] != seed], FIVE)
        rows.append(row_of(seed, fewer))
    return markdown(["without seed", *by_rewards(scores_of())], rows)


def paper_table():
    """Of DPPO and SPPO with the two seeds seen before, of PPO of these two only."""
    return nine.paper_table(nine.scores_of() | with_first_seeds(scores_of()))


# ---- Figure, claims, predictions


def points_of(scores, noise):
    """The effect on each task, and the pooled one."""
    effects = nine.losses(scores, noise, all_tasks=True)
    return [*map(estimate, effects.values()), pooled(nine.losses(scores, noise).values())]


def draw():
    """The effect on each task, and below the pooled ones: with 95 % intervals, and as crosses those
    of the two seeds seen before."""
    figure, ax = plt.subplots(figsize=(6.5, 4), layout="constrained")
    labels = [*map(short, TASKS), "mean of the tasks that count"]
    for offset, color, (noise, title) in zip([-0.15, 0.15], ["C0", "C1"], NOISES.items()):
        y = offset + np.arange(len(labels))
        values, half = bars(points_of(scores_of(), noise))
        ax.errorbar(values, y, xerr=half, fmt="o", color=color, label=title)
        before, _ = bars(points_of(nine.scores_of(), noise))
        ax.plot(before, y, "x", color=color, alpha=0.5, label=f"{title}, two seeds seen before")
    ax.axvline(0, color="gray", linewidth=0.8)
    ax.axvline(nine.MATTERS, color="gray", linewidth=0.8, linestyle=":")
    ax.set_yticks(range(len(labels)), labels)
    ax.invert_yaxis()
    ax.set_xlabel("SPPO minus DPPO, share of the score (dotted: a tenth)")
    figure.legend(loc="outside upper center", ncols=2)
    figure.savefig(nine.HERE / "nine.png", dpi=170)


def comparisons():
    scores = scores_of()
    page = "control/README.md#nine-tasks-a-million-steps"
    claims = {TOGETHER: "1", CLEAN: "1", NOISY: "2"}
    for rewards, (found, p, text) in tested(scores).items():
        name = f"SPPO minus DPPO, nine tasks, a million steps, {rewards}"
        options = {
            "tasks": nine.tasks_of(rewards, by_rewards(scores)[rewards]),
            "measure": MEASURES[FIVE],
        }
        options |= {"corrected": p, "decided": text, "direct": rewards != TOGETHER}
        seeds = min(map(len, scores.values()))
        yield Comparison(claims[rewards], name, page, found, seeds, **options)
    for measure in (LAST, TRAINING):
        yield from nine.compared("nine tasks, unseen seeds", scores_of(measure), measure)
    with_two = with_first_seeds(scores)
    yield from nine.compared("nine tasks, with two seeds seen before", with_two)
    with_all = nine.with_all_seeds(with_two)
    yield from nine.compared("nine tasks, all seeds of all packs", with_all)


def predictions(scores=None):
    """{key in predictions.csv: whether it holds}"""
    scores = scores or scores_of()
    effects = by_rewards(scores)
    found = {title: pooled(parts) for title, parts in effects.items()}
    together = found[TOGETHER].value
    change = pooled(nine.noisy_minus_clean(scores))
    fewer = [by_rewards(scores, task)[TOGETHER] for task in TASKS]
    others = [pooled(parts).value for parts in fewer]
    hopper = estimate(nine.losses(scores, "normal 0.05", all_tasks=True)["Hopper-v4"])
    return {
        "nine-test-together": 0 < together < FIRST_SEEDS,
        "nine-test-within": abs(found[NOISY].value - found[CLEAN].value) < 0.1,
        "nine-test-change": change.low <= 0 <= change.high,
        "nine-test-counts": len(effects[TOGETHER]) == 2 * len(TASKS),
        "nine-test-no-single-task": all(np.sign(value) == np.sign(together) for value in others),
        "nine-test-hopper": hopper.value < 0.25,
    }


def evidence(scores):
    """Whether it is for the paper, and against it. As registered, "leaning against" is not against
    it, which we noticed on 30 November 2026, before the look."""
    rows = tested(scores)
    texts = [rows[title][2] for title in (CLEAN, NOISY)]
    return {
        "for": rows[TOGETHER][0].p < 0.05 and "seen" in texts,
        "against": set(texts) <= {"not seen", "reversed"},
    }


def main():
    plt.switch_backend("agg")
    draw()
    print(f"whole seeds: {sorted(set(read_scores()['seed']))}", end="\n\n")
    for table in [tests, beside, each_task, without_one_task, without_one_seed, paper_table]:
        print(table(), end="\n\n")
    for key, holds in (predictions(scores_of()) | evidence(scores_of())).items():
        print(f"{key}: {holds}")


if __name__ == "__main__":
    main()
