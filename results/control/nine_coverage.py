"""Whether nine.py's pooled interval holds the truth, and how wide it is: made-up runs, whose true
effect is known. Writes nine-coverage.csv.

python -m results.control.nine_coverage    # four minutes

Made-up scores are drawn from packed runs of DPPO, where there are any (three-tasks, ant and
locomotion), and else from a distribution that the column `others` names: normal with this
coefficient of variation, or "two modes", where three runs in ten score a quarter of what others do.
The true effect is 0 ("equal") or a tenth; with "packed", SPPO's scores are from its packed runs.
"""

from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from analysis.measures import FIVE
from results.common import by_cell, read
from results.control.nine import NOISES, TASKS, TOGETHER, counts, effect, pooled, random_scores

HERE = Path(__file__).parent
DATA_SETS = 2000
OTHERS = ["0.15", "0.3", "0.5", "two modes"]
TRUTHS = ["equal", "a tenth", "packed"]


def packed_scores():
    """{(task, noise, method): mean of the last five evaluations of its runs}"""
    found = {}
    for pack in ["three-tasks", "locomotion", "ant"]:
        found |= by_cell(read(f"control/{pack}"), FIVE)
    return found


def population(packed, task, noise, method, others):
    """A large sample of scores above a random agent's, in units of DPPO's mean."""
    rng = np.random.default_rng(1)
    if (task, "clean", "dppo") in packed:
        noise = noise if (task, noise, "dppo") in packed else "clean"  # Ant has only clean runs
        baseline = packed[task, noise, "dppo"].mean() - random_scores()[task]
        scores = packed[task, noise, method] - random_scores()[task]
        # Draws with replacement have a smaller variance than the runs were drawn from
        n = len(scores)
        return (scores.mean() + (scores - scores.mean()) * np.sqrt(n / (n - 1))) / baseline
    if others == "two modes":
        scores = rng.normal(1, 0.1, 10_000)
        scores[:3000] /= 4
        return scores / scores.mean()
    return rng.normal(1, float(others), 10_000)


def simulate(rng, packed, noises, seeds, others, truth):
    """Share of data sets whose interval lies above the truth, below it, and mean half width."""
    populations = {}
    for task, noise in product(TASKS, noises):
        dppo = population(packed, task, noise, "dppo", others)
        if truth == "packed":
            sppo = population(packed, task, noise, "sppo", others)
        else:
            sppo = dppo * (1.105 if truth == "a tenth" else 1)
        populations[task, noise] = sppo, dppo
    true = {
        place: 2 * (sppo.mean() - dppo.mean()) / (sppo.mean() + dppo.mean())
        for place, (sppo, dppo) in populations.items()
    }
    rows = []
    for _ in range(DATA_SETS):
        effects = {}
        for place, pair in populations.items():
            a, b = (rng.choice(scores, seeds) for scores in pair)
            if counts(a, b, 0):
                effects[place] = effect(a, b, 0)
        found = pooled(effects.values())
        target = np.mean([true[place] for place in effects])
        half = found.high - found.value
        rows.append([found.low > target, found.high < target, half, len(effects)])
    above, below, half, counted = np.mean(rows, axis=0)
    return {
        "percent above": round(100 * above, 1),
        "percent below": round(100 * below, 1),
        "half width": round(half, 3),
        "effects": round(counted, 1),
    }


def main():
    rng = np.random.default_rng(0)
    packed = packed_scores()
    kinds = {title: [noise] for noise, title in NOISES.items()}
    settings = list(product(kinds, [5, 8], OTHERS, TRUTHS))
    settings += product(kinds, [2], OTHERS, TRUTHS)  # added when two seeds were whole
    kinds[TOGETHER] = list(NOISES)
    settings += product([TOGETHER], [2, 4, 6], OTHERS, TRUTHS)  # added later
    rows = []
    for rewards, seeds, others, truth in tqdm(settings):
        place = {"rewards": rewards, "seeds": seeds, "others": others, "truth": truth}
        rows.append(place | simulate(rng, packed, kinds[rewards], seeds, others, truth))
    pd.DataFrame(rows).to_csv(HERE / "nine-coverage.csv", index=False)


if __name__ == "__main__":
    main()
