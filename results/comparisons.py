"""A comparison of packed runs that speaks to a claim of the paper, as the analyses make them."""

from dataclasses import dataclass

import numpy as np

from analysis.compare import Estimate, cells_of, difference
from analysis.measures import LAST
from results.common import FLOORS, MEASURES, corrected_suite, read

POINTS = "points"
REWARD = "reward"
LOG_RATIO = "(log ratio)"


@dataclass
class Comparison:
    claim: str
    name: str
    page: str
    found: Estimate
    seeds: int
    unit: str = "of the score"
    measure: str = MEASURES[LAST]
    tasks: int = 1
    matters: float = 0.1  # a gain that would matter, in the unit
    corrected: float = np.nan  # p, where it is tested
    direct: bool = True  # of the paper's method and its baseline, so it may stand for the claim
    decided: str = ""  # a verdict by other rules
    enough: bool = True  # seeds, for a test: else the verdict is leaning at most

    def verdict(self):
        """The first that holds."""
        if self.decided:
            return self.decided
        forgotten = self.enough and np.isnan(self.corrected)
        assert includes_0(self.found) or not forgotten, f"{self.name}: not tested"
        if self.corrected < 0.05:
            return "seen" if self.found.value > 0 else "reversed"
        if self.found.low > 0:
            return "leaning for"
        if self.found.high < 0:
            return "leaning against"
        return "not seen" if self.found.high < self.matters else "undecided"

    def width(self):
        """Of the interval, relative to a gain that would matter."""
        return (self.found.high - self.found.low) / self.matters


@dataclass
class Interval:
    """An estimate without a test."""

    value: float
    low: float
    high: float


def includes_0(found):
    return found.low <= 0 <= found.high


def in_points(claim, name, page, pack, place, pair, measure=LAST, **options):
    """Of one task and kind of rewards. A gain of a tenth of the baseline's score would matter."""
    cell = cells_of(read(pack), measure)[place]
    a, b = (cell[method] for method in pair)
    p = corrected_suite(pack)[(measure, *place, frozenset(pair))]
    score = b.mean() - FLOORS.get(place[0], 0)
    options = {"matters": abs(score) / 10, "corrected": p, "unit": POINTS} | options
    found = difference(a, b)
    return Comparison(claim, name, page, found, len(a), measure=MEASURES[measure], **options)
