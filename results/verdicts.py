"""Verdicts on the paper's twelve claims. Each analysis has `comparisons`; one rule gives each of
them a verdict. docs/reproduction.md explains it.
"""

from dataclasses import dataclass
from functools import cache
from importlib import import_module

import numpy as np
import pandas as pd

from analysis.compare import Estimate, difference
from analysis.measures import LAST
from analysis.tables import interval_text, markdown
from results.common import MEASURES, RESULTS, cells, corrected_suite, percent_text

POINTS = "points"
REWARD = "reward"
LOG_RATIO = "(log ratio)"
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
FRONT_PAGE = {
    "SPPO, control": "1",
    "SPPO, control, noisy rewards": "2",
    "SA2C, control": "3",
    "SPPO, Atari": "5",
    "SPPO, language models": "10",
}
REGISTERED = "SPPO minus DPPO, nine tasks, a million steps, both together"
COLUMNS = """\
claims comparison page measure effect low high unit tasks seeds p_corrected verdict""".split()
GAIN, LOSS, NO_GAIN, UNDECIDED = "gain", "loss", "no gain that matters", "undecided"


@dataclass
class Interval:
    """An estimate without a test."""

    value: float
    low: float
    high: float


@dataclass
class Comparison:
    claim: str
    name: str
    page: str
    found: Estimate | Interval
    seeds: int  # the fewest of a task
    tasks: int = 1
    measure: str = MEASURES[LAST]
    unit: str = "of the score"
    matters: float = np.nan  # a gain that would matter; nan: none was fixed before the scores
    p: float = np.nan  # corrected; nan: not tested
    beside: bool = False  # not what the claim says, or a second look: never stands for the claim

    def verdict(self):
        """The first that holds."""
        if self.p < 0.05:
            return GAIN if self.found.value > 0 else LOSS
        return NO_GAIN if self.found.high < self.matters else UNDECIDED

    def verdict_text(self):
        """With the p of what is undecided, if it was tested."""
        tested = self.verdict() == UNDECIDED and not np.isnan(self.p)
        return f"{UNDECIDED} (p {self.p:.2g})" if tested else self.verdict()

    def effect(self):
        if self.unit == LOG_RATIO:
            return percent_text(self.found)
        places = None if self.unit in (POINTS, REWARD) else 3
        text = interval_text(self.found.value, self.found.low, self.found.high, places)
        return f"{text} {self.unit}"


def in_points(claim, name, page, pack, place, pair, measure=LAST, **options):
    """Of one task and kind of rewards."""
    a, b = (cells(pack, measure)[place][method] for method in pair)
    p = corrected_suite(pack)[(measure, *place), frozenset(pair)]
    options = {"measure": MEASURES[measure], "p": p, "unit": POINTS} | options
    return Comparison(claim, name, page, difference(a, b), len(a), **options)


# ---- All comparisons


@cache
def analyses():
    """The modules in the folders here."""
    files = sorted(RESULTS.glob("*/*.py"))
    return [import_module(f"results.{file.parent.name}.{file.stem}") for file in files]


@cache
def comparisons():
    """By claim."""
    found = []
    for module in analyses():
        if hasattr(module, "comparisons"):
            found += module.comparisons()
    return sorted(found, key=lambda one: int(one.claim))


def of_claim(number):
    return [one for one in comparisons() if one.claim == number]


def broadest(found):
    """Over the most tasks, of these with the narrowest interval."""

    def rank(one):
        return -one.tasks, one.found.high - one.found.low

    return min((one for one in found if not one.beside), key=rank)


# ---- Tables


def others_text(best, found):
    """Up to three other comparisons with a gain or a loss."""
    parts = []
    for one in found:
        if one is not best and one.verdict() in (GAIN, LOSS):
            parts.append(f"{one.verdict()}: {one.name} ({one.measure})")
    return "; ".join(parts[:3])


def claims():
    rows = []
    for number, claim in CLAIMS.items():
        found = of_claim(number)
        row = [number, claim, "", "", "not run", ""]
        if found:
            best = broadest(found)
            name = f"[{best.name}](../results/{best.page})"
            row[2:] = name, best.effect(), best.verdict_text(), others_text(best, found)
        rows.append(row)
    header = ["", "the paper's claim", "our broadest comparison", "effect", "verdict", "but"]
    return markdown(header, rows)


def front_page():
    named = {one.name: one for one in comparisons()}
    shown = {"SPPO, control, both together": named[REGISTERED]}
    shown |= {title: broadest(of_claim(number)) for title, number in FRONT_PAGE.items()}
    rows = []
    for title, one in shown.items():
        link = f"[{one.name}](results/{one.page}), {one.measure}"
        rows.append([title, link, one.seeds, one.effect(), one.verdict_text()])
    return markdown(["", "compared", "seeds", "difference (95 % interval)", "verdict"], rows)


def predictions():
    """Outcomes by page. What would have been evidence for the paper is no prediction."""
    rows = pd.read_csv(RESULTS / "predictions.csv", dtype=str, keep_default_na=False)
    rows = rows[~rows["prediction"].str.startswith("For the paper")]
    page = rows["pack"].str.partition("/")[0].rename("page")
    counts = pd.crosstab(page, rows["outcome"], margins=True, margins_name="all").reset_index()
    return markdown(counts.columns, counts.to_numpy())


def csv_table():
    """verdicts.csv. An empty p: not tested."""
    rows = []
    for one in comparisons():
        numbers = [one.found.value, one.found.low, one.found.high, one.p]
        effect, low, high, p = (float(f"{x:.3g}") for x in numbers)
        row = [one.claim, one.name, one.page, one.measure, effect, low, high, one.unit]
        rows.append([*row, one.tasks, one.seeds, p, one.verdict()])
    return pd.DataFrame(rows, columns=COLUMNS)
