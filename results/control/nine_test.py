"""The registered test of the nine tasks: SPPO minus DPPO, with six seeds that nobody had seen.

python -m results.control.nine_test    # prints the tests, what stands beside them, the predictions

Runs: those of nine.sh with seeds 20002 to 20007, without Gaussian PPO, by the script of 964497c.
Two other seeds suggested the test, so they are not in it. Scores, effects, which tasks count and p
are nine.py's. The order of the tests and their verdicts were written before the first run, and were
committed here, when 16 of 216 runs had finished, before anybody saw a score.
"""

from itertools import product

import numpy as np
import pandas as pd

from analysis.compare import FIVE, cells_of
from results.common import read
from results.control import nine
from results.control.nine import (
    HERE,
    MEASURES,
    NOISES,
    PRIMARY,
    TASKS,
    counts,
    estimate,
    holm,
    losses,
    markdown,
    noisy_minus_clean,
    over_effects,
    pooled,
    random_scores,
    scores_of,
    short,
)

METHODS = ["dppo", "sppo"]
SEEDS = range(20002, 20008)
FEWEST = 4  # whole seeds, for a test
FIRST_SEEDS = 0.098  # the pooled effect that suggested the test
MATTERS = 0.1
TOGETHER, CLEAN, NOISY = "clean and noisy together", "clean", "noisy"
CHANGE = "noisy minus clean"


# ---- Scores


def read_runs():
    """A row for each run of a whole seed, one whose 36 runs have finished, or stopped twice with
    the script's own error. The latter are in nine-test-stopped.csv, and have a random agent's
    score. The columns of MEASURES have the scores."""
    runs = pd.read_csv(HERE / "nine-test-runs.csv.gz", dtype=str, keep_default_na=False)
    runs = runs[runs["finished"] == "True"].set_index("run_name")
    progress = pd.read_csv(HERE / "nine-test-progress.csv.gz")
    evaluations = progress[progress["run_name"].isin(runs.index)].groupby("run_name")
    assert set(evaluations.size()) == {20}
    last = evaluations.tail(1).set_index("run_name")
    runs[PRIMARY] = evaluations["return_mean"].apply(lambda x: x.tail(5).mean())
    runs["last evaluation"] = last["return_mean"]
    runs["training"] = last["charts/episodic_return"]
    if (HERE / "nine-test-stopped.csv").exists():
        stopped = pd.read_csv(HERE / "nine-test-stopped.csv", dtype=str)
        stopped[MEASURES] = np.transpose([stopped["env_id"].map(random_scores())] * 3)
        runs = pd.concat([runs, stopped])
    runs["seed"] = runs["seed"].astype(int)
    places = runs[["env_id", "noise", "exp_name", "seed"]]
    assert not places.duplicated().any()
    expected = set(product(TASKS, NOISES, METHODS, SEEDS))
    assert set(places.itertuples(index=False, name=None)) <= expected
    size = runs.groupby("seed")["env_id"].transform("size")
    return runs[size == len(TASKS) * len(NOISES) * len(METHODS)]


# ---- Effects


def effects_of(scores, left_out=()):
    """{title: effects}, of the tasks that count, without the tasks that are left out. If a task
    counts with one kind of rewards only, together is the mean of all effects that count."""
    found = {}
    for title, noise in zip([CLEAN, NOISY], NOISES):
        effects = losses(scores, noise)
        found[title] = [parts for task, parts in effects.items() if task not in left_out]
    return {TOGETHER: found[CLEAN] + found[NOISY]} | found


def linearised(a, b, random):
    """`a` minus `b` as a share of the score, by the delta method: its error counts that of the
    denominator, too. Its value means nothing."""
    scale = (a.mean() + b.mean()) / 2 - random
    half = (a.mean() - b.mean()) / scale / 2
    return [(a, (1 - half) / scale), (b, -(1 + half) / scale)]


def delta_half_width(scores, title):
    """Of the pooled effect's interval that counts the denominator's error."""
    noises = {TOGETHER: list(NOISES), CLEAN: ["none"], NOISY: ["normal"]}[title]
    parts = []
    for task, noise in product(TASKS, noises):
        a, b = scores[task, noise, "sppo"], scores[task, noise, "dppo"]
        random = random_scores()[task]
        if counts(a, b, random):
            parts.append(linearised(a, b, random))
    found = estimate(pooled(parts))
    return (found.high - found.low) / 2


# ---- The tests, in their order


def verdict(found, corrected_p, first_p):
    """Of clean or noisy rewards. `first_p`: of both together, without which neither is tested."""
    if first_p < 0.05 and corrected_p < 0.05:
        return "seen" if found.value > 0 else "reversed"
    if found.low > 0:
        return "leaning for, its test failed"
    if found.high < 0:
        return "leaning against, its test failed"
    return "not seen" if found.high < MATTERS else "undecided"


def tested(scores):
    """{title: (estimate, corrected p, verdict)}. Together comes first: only if its p is below 0.05,
    clean and noisy are tested, by Holm's method."""
    found = {title: estimate(pooled(parts)) for title, parts in effects_of(scores).items()}
    together = found[TOGETHER]
    corrected = dict(zip([CLEAN, NOISY], holm(found[CLEAN].p, found[NOISY].p)))
    rows = {}
    for title, p in corrected.items():
        rows[title] = found[title], p, verdict(found[title], p, together.p)
    alone = [text for _, _, text in rows.values() if text in ("seen", "reversed")]
    text = "not seen over both together"
    if together.p < 0.05:
        text = "seen over both together" if together.value > 0 else "reversed over both together"
        text += "" if alone else ", neither alone"
    return {TOGETHER: (together, together.p, text)} | rows


def tests():
    """With fewer than four whole seeds: estimates, without p and verdicts."""
    runs = read_runs()
    scores = scores_of(runs)
    rows = []
    for title, (found, p, text) in tested(scores).items():
        half = delta_half_width(scores, title)
        low, high = found.value - half, found.value + half
        row = [title, found, f"{low:.3f} to {high:.3f}"]
        rows.append([*row, f"{found.p:.2g}", f"{p:.2g}", text])
    header = ["rewards", "SPPO minus DPPO", "counting the denominator's error"]
    header += ["p", "p, by Holm", "verdict"]
    if runs["seed"].nunique() < FEWEST:
        header = header[:3]
        rows = [row[:3] for row in rows]
    return markdown(header, rows)


# ---- Beside them, without a test


def beside():
    """The pooled effects in each measure, and with each effect as the unit."""
    rows = []
    for measure in MEASURES:
        effects = effects_of(scores_of(read_runs(), measure))
        rows.append([measure, *(estimate(pooled(parts)) for parts in effects.values())])
    effects = effects_of(scores_of(read_runs()))
    rows.append([f"{PRIMARY}, over effects", *map(over_effects, effects.values())])
    return markdown(["measure", *effects], rows)


def with_older_seeds():
    """With the two seeds that suggested the test, and with all others that ran a million steps."""
    scores = scores_of(read_runs())
    found = {"the six seeds": dict(scores)}
    for place, older in nine.scores_of(nine.read_runs()).items():
        if place in scores:
            scores[place] = np.append(scores[place], older)
    found["all eight seeds"] = dict(scores)
    for pack in ["three-tasks", "locomotion"]:
        for (task, rewards), cell in cells_of(read(f"control/{pack}"), FIVE).items():
            noise = "none" if rewards == "clean" else "normal"
            for method in METHODS:
                place = (task, noise, method)
                scores[place] = np.append(scores[place], cell[method])
    found["all seeds of all packs"] = scores
    rows = []
    for title, of_seeds in found.items():
        effects = effects_of(of_seeds)
        rows.append([title, *(estimate(pooled(parts)) for parts in effects.values())])
    return markdown(["seeds", *effects], rows)


def each_task():
    """Of all nine tasks; (no): the task does not count."""
    scores = scores_of(read_runs())
    columns = []
    for noise in NOISES:
        counted = losses(scores, noise)
        column = []
        for task, parts in losses(scores, noise, all_tasks=True).items():
            column.append(f"{estimate(parts)}{'' if task in counted else ' (no)'}")
        columns.append(column)
    return markdown(["task", *NOISES.values()], zip(map(short, TASKS), *columns))


def without_one_task():
    effects = {task: effects_of(scores_of(read_runs()), [task]) for task in TASKS}
    rows = []
    for task, found in effects.items():
        rows.append([short(task), *(estimate(pooled(parts)) for parts in found.values())])
    return markdown(["without", TOGETHER, CLEAN, NOISY], rows)


# ---- Predictions


def predicted(scores):
    """{beginning of the prediction in predictions.csv: whether it holds}"""
    effects = effects_of(scores)
    found = {title: estimate(pooled(parts)) for title, parts in effects.items()}
    together = found[TOGETHER].value
    change = estimate(pooled(noisy_minus_clean(scores)))
    all_count = len(effects[CLEAN]) == len(effects[NOISY]) == len(TASKS)
    others = [estimate(pooled(effects_of(scores, [task])[TOGETHER])).value for task in TASKS]
    hopper = estimate(losses(scores, "normal", all_tasks=True)["Hopper-v4"]).value
    texts = [tested(scores)[title][2] for title in (CLEAN, NOISY)]
    return {
        "Together: above 0": 0 < together < FIRST_SEEDS,
        "Noisy rewards' effect": abs(found[NOISY].value - found[CLEAN].value) < 0.1,
        "Noisy minus clean": change.low <= 0 <= change.high,
        "All nine tasks count": all_count,
        "No single task decides": all(np.sign(value) == np.sign(together) for value in others),
        "Hopper with noisy": hopper < 0.25,
        "For the paper": found[TOGETHER].p < 0.05 and "seen" in texts,
        "Against the paper": set(texts) <= {"not seen", "reversed"},
    }


def main():
    runs = read_runs()
    print(f"whole seeds: {sorted(set(runs['seed']))}", end="\n\n")
    for table in [tests, beside, with_older_seeds, each_task, without_one_task]:
        print(table(), end="\n\n")
    for beginning, holds in predicted(scores_of(runs)).items():
        print(f"{beginning}: {holds}")


if __name__ == "__main__":
    main()
