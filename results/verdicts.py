"""Verdicts on the paper's twelve claims, from packed runs.

python -m results.verdicts    # writes verdicts.csv, with every comparison

docs/reproduction.md says how a verdict is reached.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from analysis.tables import interval_text, markdown
from results.common import percent_text
from results.comparisons import LOG_RATIO, POINTS, REWARD, comparisons

PAGES = {
    "three tasks": "control/README.md#a-million-steps-three-tasks-eight-seeds",
    "k": "control/README.md#the-ends-of-k",
    "ant": "control/README.md#the-authors-own-task-ant",
    "locomotion": "control/README.md#run-it-again",
    "nine": "control/README.md#nine-tasks-a-million-steps-two-seeds",
    "noise": "robustness/README.md#score-against-the-level-of-noise",
    "sweep": "robustness/README.md#learning-rate-and-clip-range",
    "dose": "a2c/README.md#twelve-seeds-four-doses",
    "million": "a2c/README.md#a-million-steps",
    "games": "atari/README.md#eighteen-games-one-seed",
    "crazyclimber": "atari/README.md#crazyclimber-eight-seeds",
    "breakout": "atari/README.md#breakout-three-seeds",
    "wizardofwor": "atari/README.md#eighteen-games-one-seed",
    "epsilon": "atari/README.md#sa2c-breakout-three-seeds",
    "text": "text/README.md#film-reviews",
}
CLAIMS = {
    "1": "SPPO gains in continuous control",
    "2": "the same with noisy rewards",
    "3": "SA2C gains in continuous control",
    "4": "the same with noisy rewards",
    "5": "SPPO gains on Atari",
    "6": "SA2C gains on Atari",
    "7": "SPPO gains on Atari with noisy rewards",
    "8": "SPPO does better across hyperparameters",
    "9": "SPPO's training is more stable",
    "10": "SPPO improves a language model on IMDB",
    "11": "the same with a model of another size",
    "12": "SPPO improves summaries (TL;DR)",
}


def effect_text(comparison):
    found = comparison.found
    if comparison.decided:
        return f"median {found.value:.2f}, from {found.low:.2f} to {found.high:.2f}"
    if comparison.unit == LOG_RATIO:
        return percent_text(*np.expm1([found.value, found.low, found.high]))
    places = None if comparison.unit in (POINTS, REWARD) else 3
    return f"{interval_text(found.value, found.low, found.high, places)} {comparison.unit}"


def best_of(claim, found):
    """The comparison over the most tasks, of these the one with the narrowest interval."""
    direct = [one for one in found if claim in one.claims.split() and one.direct]
    return min(direct, key=lambda one: (-one.tasks, one.width()))


def but_text(claim, best, found):
    """All comparisons that lean or are decided otherwise, by verdict."""
    names = {}
    for one in found:
        verdict = one.verdict()
        if claim in one.claims.split() and verdict not in ["not seen", "undecided", best.verdict()]:
            names.setdefault(verdict, []).append(f"{one.name} ({one.measure})")
    return "; ".join(f"**{verdict}**: {', '.join(those)}" for verdict, those in names.items())


def claims():
    found = comparisons()
    rows = []
    for number, claim in CLAIMS.items():
        row = [number, claim, "", "", "not run", ""]
        if any(number in one.claims.split() for one in found):
            best = best_of(number, found)
            name = f"[{best.name}](../results/{PAGES[best.page]})"
            but = but_text(number, best, found)
            row = [number, claim, name, effect_text(best), best.verdict(), but]
        rows.append(row)
    header = ["", "the paper's claim", "our broadest comparison", "effect", "verdict", "but"]
    return markdown(header, rows)


FRONT_PAGE = {
    "PPO, control": "1",
    "PPO, control, noisy rewards": "2",
    "A2C, control": "3",
    "PPO, Atari": "5",
    "PPO, language models": "10",
}


def front_page():
    found = comparisons()
    rows = []
    for title, claim in FRONT_PAGE.items():
        best = best_of(claim, found)
        link = f"[{effect_text(best)}](results/{PAGES[best.page]})"
        rows.append([title, best.verdict(), link, f"{best.name}, {best.measure}", best.seeds])
    return markdown(["", "verdict", "effect", "comparison", "seeds"], rows)


def rounded(x):
    return float(f"{x:.3g}")  # nan: not tested


def csv_table():
    rows = []
    for one in comparisons():
        row = {"claims": one.claims, "comparison": one.name, "page": PAGES[one.page]}
        row |= {"measure": one.measure, "effect": rounded(one.found.value)}
        row |= {"low": rounded(one.found.low), "high": rounded(one.found.high), "unit": one.unit}
        row |= {"tasks": one.tasks, "seeds": one.seeds, "p_corrected": rounded(one.corrected)}
        rows.append(row | {"verdict": one.verdict()})
    return pd.DataFrame(rows)


def main():
    csv_table().to_csv(Path(__file__).with_suffix(".csv"), index=False)


if __name__ == "__main__":
    main()
