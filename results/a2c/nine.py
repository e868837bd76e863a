"""Registered, and not run: SA2C, at its default dose, minus DA2C over the nine tasks.

python -m results.a2c.nine    # once packed: tests, predictions

Runs: those of nine.sh, by the scripts of the commit that predictions.csv names, in a worktree of it
and with its requirements.lock. A run that is killed is repeated by its command. A run that stops
twice with the script's own error is in nine-stopped.csv. Scores are looked at once: when all runs
have ended, or, if time ends before, those of the whole seeds, at least six.

Measure, effects, tasks that count, stopped runs, tests and verdicts are those of control/nine.py.
Clean rewards decide claim 3, noisy ones claim 4; a claim is undecided if fewer than six tasks
count. SA2C's alpha is 0.5, DA2C's is 1, so an effect need not come from the reverse loss.
Swimmer's gamma is the authors' 0.9999.
"""

from results.common import NOISES
from results.control import nine
from results.control.nine import CLEAN, NOISY, TASKS, TOGETHER, pooled
from results.verdicts import GAIN, LOSS, NO_GAIN, UNDECIDED

SEEDS = range(30000, 30008)
FEWEST = 6  # whole seeds, and tasks that count
NAMES = {"da2c": "dppo", "sa2c": "sppo"}  # by which control/nine.py finds methods


def scores_of():
    scores = nine.read_whole("a2c/nine", SEEDS, list(NAMES))
    assert scores["seed"].nunique() >= FEWEST, "too few whole seeds for a test"
    return nine.by_place(scores.replace({"method": NAMES}))


def verdicts(scores):
    """{rewards: verdict}"""
    found = {}
    for rewards, one in zip(nine.CLAIMS, nine.tested("", scores)):
        few = len(nine.by_rewards(scores)[rewards]) < FEWEST
        found[rewards] = UNDECIDED if few else one.verdict()
    return found


def predictions(scores):
    """{key in predictions.csv: whether it holds}"""
    found = nine.pooled_by_rewards(scores)
    clean, noisy = NOISES
    pendulums = [nine.losses(scores, noise, all_tasks=True)[TASKS[0]] for noise in NOISES]
    cost = nine.effects_of(scores, (noisy, "dppo"), (clean, "dppo"))
    return {
        "a2c-nine-test": not {GAIN, LOSS} & set(verdicts(scores).values()),
        "a2c-nine-sign": found[TOGETHER].value > 0,
        "a2c-nine-noise": found[NOISY].value > found[CLEAN].value,
        "a2c-nine-lander": "LunarLanderContinuous-v3" not in nine.losses(scores, noisy),
        "a2c-nine-pendulum": all(abs(effect.value) < 0.05 for effect in pendulums),
        "a2c-nine-cost": pooled(cost.values()).high < 0,
    }


def evidence(scores):
    """Whether it is for the paper, and against it. Registered in older words, by which an interval
    above 0 is not against it."""
    found = {verdicts(scores)[rewards] for rewards in (CLEAN, NOISY)}
    effects = nine.pooled_by_rewards(scores)
    is_above = max(effects[CLEAN].low, effects[NOISY].low) > 0
    return {
        "for": GAIN in found and LOSS not in found,
        "against": found <= {NO_GAIN, LOSS} and not is_above,
    }


if __name__ == "__main__":
    scores = scores_of()
    print(nine.tests(scores, "SA2C minus DA2C"), nine.each_task(scores), sep="\n\n")
    print(nine.without_one_task(scores))
    print(verdicts(scores), predictions(scores), evidence(scores), sep="\n")
