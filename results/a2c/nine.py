"""Registered, and not run: SA2C, at its default dose, minus DA2C, whose alpha is 1, over the nine
tasks, a million steps, eight seeds.

python -m results.a2c.nine    # what the test can detect; once packed, the test and predictions

Runs: those of nine.sh, by the script of the commit that registers this. Measure, effects, tasks
that count, whole seeds (at least four), stopped runs, the tests' order and their verdicts are those
of results/control/nine_test.py. Clean rewards decide claim 3, noisy ones claim 4. Scores are looked
at once. When that is depends on time and whole seeds, never on a score.
"""

import numpy as np
from scipy import stats

from analysis.measures import FIVE
from analysis.tables import markdown
from results.common import RESULTS, by_cell, read
from results.comparisons import includes_0
from results.control import nine, nine_test
from results.control.nine import NOISES, TASKS, TOGETHER, by_rewards, pooled

SEEDS = range(30000, 30008)
NAMES = {"da2c": "dppo", "sa2c": "sppo"}


def scores_of(measure=FIVE):
    """Methods have the names of PPO's, by which results/control/nine.py finds them."""
    scores = nine_test.read_scores("a2c/nine", SEEDS)
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
    """Half width of both together's interval, and how often its test finds a true effect, if all
    tasks count and have `spread`."""
    rows = []
    for seeds in [4, 6, 8]:
        effects = len(TASKS) * len(NOISES)
        error = spread() * np.sqrt(2 / (seeds * effects))
        freedom = 2 * effects * (seeds - 1)
        bound = stats.t.ppf(0.975, freedom)
        found = [stats.nct.sf(bound, freedom, true / error) for true in (0.05, 0.1, 0.2)]
        rows.append([seeds, f"{bound * error:.3f}", *(f"{x:.0%}" for x in found)])
    header = ["seeds", "half width", "finds 0.05", "finds 0.1", "finds 0.2"]
    return markdown(header, rows)


def predictions(scores):
    """{key in predictions.csv: whether it holds}"""
    effects = by_rewards(scores)
    found = {title: pooled(parts) for title, parts in effects.items()}
    together = found[TOGETHER]
    clean, noisy = NOISES
    cost = nine.effects_of(scores, (noisy, "dppo"), (clean, "dppo"))
    return {
        "a2c-nine-together": abs(together.value) < 0.1,
        "a2c-nine-test": together.p >= 0.05,
        "a2c-nine-change": includes_0(pooled(nine.noisy_minus_clean(scores))),
        "a2c-nine-counts": len(effects[TOGETHER]) < 2 * len(TASKS),
        "a2c-nine-cost": pooled(cost.values()).value < 0,
    }


def main():
    print(power())
    if (RESULTS / "a2c/nine-runs.csv.gz").exists():
        scores = scores_of()
        print(nine_test.tests(scores, "SA2C minus DA2C"), nine.each_task(scores), sep="\n\n")
        for key, holds in (predictions(scores) | nine_test.evidence(scores)).items():
            print(f"{key}: {holds}")


if __name__ == "__main__":
    main()
