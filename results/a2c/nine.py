"""Registered, and not run: SA2C, at its default dose, minus DA2C over the nine tasks.

python -m results.a2c.nine    # what the tests can find; once packed, tests and predictions

Runs: those of nine.sh, by the scripts of the commit that predictions.csv names, in a worktree of it
and with its requirements.lock. A run that is killed is repeated by its command. A run that stops
twice with the script's own error is in nine-stopped.csv. Scores are looked at once: when all runs
have ended, or, if time ends before, those of the whole seeds, at least six.

Measure, effects, tasks that count, stopped runs, tests and verdicts are those of the same commit's
results/control/nine_test.py. Clean rewards decide claim 3, noisy ones claim 4; a claim is undecided
if fewer than six tasks count. SA2C's alpha is 0.5, DA2C's is 1, so an effect need not come from the
reverse loss. Swimmer's gamma is the authors' 0.9999.
"""

import numpy as np
from scipy import stats

from analysis.measures import FIVE
from analysis.tables import markdown
from results.common import RESULTS, by_cell, read
from results.control import nine, nine_test
from results.control.nine import NOISES, TASKS, TOGETHER, by_rewards, estimate, pooled
from results.control.nine_test import CLEAN, NOISY

SEEDS = range(30000, 30008)
FEWEST = 6  # whole seeds, and tasks that count
NAMES = {"da2c": "dppo", "sa2c": "sppo"}


def scores_of(measure=FIVE):
    """Methods have the names of PPO's, by which results/control/nine.py finds them."""
    scores = nine_test.read_scores("a2c/nine", SEEDS)
    assert scores["seed"].nunique() >= FEWEST, "too few whole seeds for a test"
    return by_cell(scores.replace({"method": NAMES}), measure)


def spread():
    """The standard deviation over seeds, as a share of the score: of three tasks, from runs that
    had been packed before, the root of the mean square."""
    scores = by_cell(read("a2c/million"), FIVE)
    random = nine.random_scores()
    variances = []
    for task, noise in sorted({place[:2] for place in scores}):
        pair = [scores[task, noise, method] for method in NAMES]
        scale = np.mean([sample.mean() for sample in pair]) - random[task]
        variances += [sample.var(ddof=1) / scale**2 for sample in pair]
    return np.sqrt(np.mean(variances))


def power():
    """How often eight seeds find a true effect, if all tasks have `spread`, and the half width of
    the interval. Of one kind of rewards, Holm's first step, at 0.025."""
    rows = []
    for title, effects, level in [("both together", 18, 0.05), ("clean or noisy alone", 9, 0.025)]:
        error = spread() * np.sqrt(2 / (len(SEEDS) * effects))
        freedom = 2 * effects * (len(SEEDS) - 1)
        half = error * stats.t.ppf(0.975, freedom)
        bound = stats.t.ppf(1 - level / 2, freedom)
        found = [stats.nct.sf(bound, freedom, true / error) for true in (0.1, 0.2)]
        rows.append([title, f"{half:.2f}", *(f"{100 * x:.0f} %" for x in found)])
    return markdown(["effect", "half width", "a tenth", "two tenths"], rows)


def verdicts(scores):
    """{rewards: verdict}"""
    effects = by_rewards(scores)
    texts = {title: text for title, (_, _, text) in nine_test.tested(scores).items()}
    few = {title: "undecided" for title in texts if len(effects[title]) < FEWEST}
    return texts | few


def predictions(scores):
    """{key in predictions.csv: whether it holds}"""
    found = {title: pooled(parts) for title, parts in by_rewards(scores).items()}
    clean, noisy = NOISES
    pendulums = [nine.losses(scores, noise, all_tasks=True)[TASKS[0]] for noise in NOISES]
    cost = nine.effects_of(scores, (noisy, "dppo"), (clean, "dppo"))
    return {
        "a2c-nine-test": not {"seen", "reversed"} & set(verdicts(scores).values()),
        "a2c-nine-sign": found[TOGETHER].value > 0,
        "a2c-nine-noise": found[NOISY].value > found[CLEAN].value,
        "a2c-nine-lander": "LunarLanderContinuous-v3" not in nine.losses(scores, noisy),
        "a2c-nine-pendulum": all(abs(estimate(parts).value) < 0.05 for parts in pendulums),
        "a2c-nine-cost": pooled(cost.values()).high < 0,
    }


def evidence(scores):
    """Whether it is for the paper, and against it."""
    texts = {verdicts(scores)[title] for title in (CLEAN, NOISY)}
    return {
        "for": "seen" in texts and "reversed" not in texts,
        "against": texts <= {"not seen", "reversed", "leaning against, its test failed"},
    }


def main():
    print(power())
    if (RESULTS / "a2c/nine-runs.csv.gz").exists():
        scores = scores_of()
        print(nine_test.tests(scores, "SA2C minus DA2C"), verdicts(scores), sep="\n\n")
        print(nine.each_task(scores), nine_test.without_one_task(scores), sep="\n\n")
        print(predictions(scores), evidence(scores))


if __name__ == "__main__":
    main()
