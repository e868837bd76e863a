"""Every comparison of packed runs that speaks to a claim of the paper."""

from dataclasses import dataclass

import numpy as np

from analysis.compare import Estimate, cells_of, difference
from analysis.measures import FIVE, LAST, TRAINING
from results.a2c import dose
from results.atari import crazyclimber, games
from results.common import (
    HOPPER,
    LANDER,
    MEASURES,
    PENDULUM,
    corrected_p,
    corrected_suite,
    gain,
    read,
    short,
)
from results.control import k, nine
from results.control import tables as control
from results.robustness import noise, sweep

POINTS = "points"
REWARD = "reward"
SHARE = "of the score"
LOG_RATIO = "(log ratio)"


@dataclass
class Comparison:
    claims: str
    name: str
    page: str
    found: Estimate
    seeds: int
    unit: str = SHARE
    measure: str = MEASURES[LAST]
    tasks: int = 1
    matters: float = 0.1  # a gain that would matter, in the unit
    corrected: float = np.nan  # p, where it is tested
    direct: bool = True  # of the paper's method and its baseline, so it may stand for the claim
    decided: str = ""  # a verdict without a test
    enough: bool = True  # seeds, for a test: else the verdict is leaning at most

    def verdict(self):
        """The first that holds."""
        if self.decided:
            return self.decided
        includes_0 = self.found.low <= 0 <= self.found.high
        forgotten = self.enough and np.isnan(self.corrected)
        assert includes_0 or not forgotten, f"{self.name}: not tested"
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


def in_points(claims, name, page, pack, place, pair, measure=LAST, **options):
    """Of one task and kind of rewards. A gain of a tenth of the baseline's return would matter."""
    cell = cells_of(read(pack), measure)[place]
    a, b = (cell[method] for method in pair)
    p = corrected_suite(pack)[(measure, *place, frozenset(pair))]
    options = {"matters": abs(b.mean()) / 10, "corrected": p, "unit": POINTS} | options
    found = difference(a, b)
    return Comparison(claims, name, page, found, len(a), measure=MEASURES[measure], **options)


# ---- Control, SPPO


def of_control():
    pair = ("sppo", "dppo")
    pack = "control/three-tasks"
    yield in_points(
        "1", "Ant, the authors' own task", "ant", "control/ant", ("Ant-v4", "clean"), pair
    )
    for claim, rewards in {"1": "clean", "2": "normal 0.05"}.items():
        found = gain(control.pairs(*pair, noises=[rewards]))
        name = "Hopper and InvertedDoublePendulum"
        yield Comparison(claim, name, "three tasks", Interval(*found), 8, tasks=2)
        yield in_points(claim, "LunarLander", "three tasks", pack, (LANDER, rewards), pair)
        for task in ["HalfCheetah-v4", "Walker2d-v4"]:
            place = (task, rewards)
            yield in_points(claim, short(task), "locomotion", "control/locomotion", place, pair)
    options = {"tasks": 3, "measure": MEASURES[FIVE]}
    name = "k = 20.5 minus 1"
    for claim, (rewards, noises) in {"1": ("clean", [0]), "2": ("noisy", [1])}.items():
        found = k.effects(FIVE, noises=noises)[name]
        title = f"SPPO minus DPPO, three tasks, {rewards}"
        yield Comparison(claim, title, "k", found, 8, **options)
    for name, found in k.effects(FIVE).items():
        if name.endswith("minus 1"):
            title = f"{name}, clean and noisy"
            yield Comparison("1", title, "k", found, 8, direct=False, **options)
    name = "slope per tenfold k"
    found = k.effects(TRAINING)[name]
    options |= {"direct": False, "measure": MEASURES[TRAINING]}
    p = corrected_p(k.tested())[MEASURES[TRAINING], name]
    title = f"{name}, clean and noisy"
    yield Comparison("1", title, "k", found, 8, corrected=p, **options)


def of_nine_tasks():
    """Registered, but with too few seeds for the registered tests."""
    scores = nine.scores_of()
    options = {"tasks": 9, "measure": MEASURES[FIVE], "enough": False}
    for claim, (rewards, title) in zip(["1", "2"], nine.NOISES.items()):
        found = nine.estimate(nine.pooled(nine.losses(scores, rewards).values()))
        name = f"SPPO minus DPPO, nine tasks, a million steps, {title}"
        yield Comparison(
            claim, name, "nine", found, len(scores[HOPPER, rewards, "dppo"]), **options
        )


def of_hyperparameters():
    scores = noise.shares()
    found = noise.area_difference(scores["sppo"], scores["dppo"])
    options = {"tasks": 3, "measure": MEASURES[FIVE]}
    yield Comparison("2", "no noise and four levels", "noise", found, 5, **options)
    found = Interval(*sweep.difference_in_share())
    name = "three learning rates times three clip ranges"
    yield Comparison("8", name, "sweep", found, 4, tasks=2, measure=MEASURES[FIVE])
    ratios = []
    for cell in cells_of(read("control/three-tasks")).values():
        ratios.append(cell["sppo"].std(ddof=1) / cell["dppo"].std(ddof=1))
    found = Interval(np.median(ratios), min(ratios), max(ratios))
    name = "spread over seeds, SPPO's to DPPO's: median, least and most of six ratios"
    options = {"unit": "ratio", "tasks": 3, "decided": "not tested"}
    yield Comparison("9", name, "three tasks", found, 8, **options)


# ---- Control, SA2C


def of_a2c():
    million = cells_of(read("a2c/million"))
    for claim, rewards in {"3": "clean", "4": "normal 0.05"}.items():
        for task in [HOPPER, LANDER, PENDULUM]:
            cell = million[task, rewards]
            a, b = cell["sa2c"], cell["da2c"]
            options = {"matters": abs(b.mean()) / 10, "unit": POINTS}
            yield Comparison(claim, short(task), "million", difference(a, b), len(a), **options)
    options = {"tasks": 3, "seeds": 12, "page": "dose"}
    for beta, of_beta in dose.dose_effects().items():
        for rewards, found in of_beta.items():
            claim = "3" if rewards == "clean" else "4"
            name = f"three tasks, {rewards} (beta {beta} minus 0)"
            tested = {"corrected": dose.corrected_doses()[beta, rewards], "direct": False}
            yield Comparison(claim, name, found=found, **options, **tested)
    options["measure"] = MEASURES[TRAINING]
    found = dose.effects(TRAINING)
    p = corrected_p(dose.tested())
    slope = "beta 20 minus 0, by a line; Hopper, HalfCheetah, InvertedDoublePendulum"
    names = {
        "slope: clean": f"{slope}, clean",
        "slope: noisy rewards": f"{slope}, noisy rewards",
        "slope: flipped advantages": f"{slope}, flipped advantages",
        "noisy minus clean": "change of the slope by noise",
        "flipped minus clean": "change of the slope by flips",
    }
    for name, title in names.items():
        claim = "3" if name == "slope: clean" else "4"
        corrected = p[MEASURES[TRAINING], name]
        direct = name in ["slope: clean", "slope: noisy rewards"]  # registered as primary
        own = options | {"corrected": corrected, "direct": direct}
        yield Comparison(claim, title, found=found[name], **own)


# ---- Atari


def of_atari():
    ratios = games.log_ratios(games.scores_of(FIVE))
    names = {
        "loss": ("5", "eighteen games"),
        "both": ("5", "eight games, to PPO without normalised advantages"),
        "loss, flipped": ("7", "ten games"),
        games.NOISY_LOSS: ("7", "ten games, noisy minus clean"),
    }
    holm = games.registered_tests(ratios)
    for column, (claim, name) in names.items():
        found = games.mean_over_games(ratios[column])
        options = {"unit": LOG_RATIO, "measure": "mean of five evaluations", "matters": 0.095}
        options |= {"tasks": ratios[column].count(), "corrected": holm.get(column, np.nan)}
        options["direct"] = column.startswith("loss") and column != games.NOISY_LOSS
        yield Comparison(claim, name, "games", found, 1, **options)
    suite = corrected_suite("atari/crazyclimber")
    for measure in [TRAINING, FIVE, LAST]:
        p = suite[(measure, "CrazyClimber", "clean", frozenset(["sppo", "ppo"]))]
        options = {"measure": crazyclimber.MEASURES[measure], "corrected": p}
        found = crazyclimber.steps(measure)["loss"]
        yield Comparison("5", "CrazyClimber", "crazyclimber", found, 8, **options)
    for claim, rewards in {"5": "clean", "7": "flip 0.1"}.items():
        place = ("Breakout", rewards)
        yield in_points(claim, "Breakout", "breakout", "atari/breakout", place, ("sppo", "ppo"))
    place = ("WizardOfWor", "flip 0.1")
    name = "WizardOfWor, the authors' own game"
    yield in_points("7", name, "wizardofwor", "atari/wizardofwor", place, ("sppo", "ppo"))
    for measure in [LAST, TRAINING]:
        place = ("Breakout", "clean")
        pair = ("sa2c", "a2c")
        direct = measure == LAST
        yield in_points(
            "6", "Breakout", "epsilon", "atari/epsilon", place, pair, measure, direct=direct
        )


# ---- Language models


def of_text():
    rows = [
        ("10", "IMDB, clean, k = 0.9", "text/imdb", "clean", ("sppo", "ppo")),
        ("10", "IMDB, flipped", "text/imdb", "flip 0.2", ("sppo", "ppo")),
        ("10", "IMDB, flipped, k = 20.5", "text/imdb-k20.5", "flip 0.2", ("sppo", "ppo")),
        (
            "10",
            "IMDB, flipped, k = 20.5, epsilon 1e-8",
            "text/imdb-k20.5",
            "flip 0.2",
            ("sppo-eps", "ppo-eps"),
        ),
        ("11", "IMDB, 1.5 million parameters", "text/imdb", "clean", ("sppo-small", "ppo-small")),
    ]
    for claim, name, pack, rewards, pair in rows:
        baseline = cells_of(read(pack))["imdb", rewards][pair[1]].mean()
        quarter = (1 - baseline) / 4  # of the distance to the best reward
        options = {"matters": quarter, "unit": REWARD}
        yield in_points(claim, name, "text", pack, ("imdb", rewards), pair, **options)


def comparisons():
    parts = [of_control, of_nine_tasks, of_hyperparameters, of_a2c, of_atari, of_text]
    return [comparison for part in parts for comparison in part()]
