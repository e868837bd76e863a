"""SA2C by dose, three tasks. The unit is the seed."""

import numpy as np

from analysis.measures import FIVE, LAST, TRAINING
from results.common import (
    HOPPER,
    MEASURES,
    PENDULUM,
    RESULTS,
    above_floors,
    corrected_p,
    draw_panels,
    estimate_table,
    mean,
    panels_of,
)
from results.verdicts import Comparison

PAGE = "a2c/README.md#twelve-seeds-four-doses"
TASKS = [HOPPER, "HalfCheetah-v4", PENDULUM]
REWARDS = {
    "clean": "clean",
    "normal 0.2": "noisy rewards",
    "adv_flip 0.2": "flipped advantages",
}
CLEAN, NOISY, FLIPPED = REWARDS.values()
ALPHA = 0.5
BETAS = {f"{beta:g}": beta for beta in (0, 0.5, 2, 20)}
LOGS = np.log1p(np.array(list(BETAS.values())) / ALPHA)
DOSES = LOGS / LOGS[-1]
CHANGES = {NOISY: "noisy minus clean", FLIPPED: "flipped minus clean"}


def relative_scores(measure, own=False):
    """Scores above the task's floor (tasks, rewards, betas, seeds), as registered relative to beta
    0, clean rewards; or to beta 0 with their `own` rewards."""
    methods = [f"sa2c-beta{beta}" for beta in BETAS]
    scores = above_floors("a2c/dose", measure, TASKS, REWARDS, methods)
    of_beta_0 = scores[:, :, :1].mean(axis=-1, keepdims=True)
    return scores / (of_beta_0 if own else of_beta_0[:, :1])


def effects(measure, tasks=slice(None), own=False):
    """{name: estimate}: slopes over the dose by least squares, averaged over `tasks`, and how noise
    changes them."""
    scores = relative_scores(measure, own)[tasks].mean(axis=0)
    centred = DOSES - DOSES.mean()
    slopes = np.einsum("rbs,b->rs", scores, centred) / (centred @ centred)
    slopes = dict(zip(REWARDS.values(), slopes))
    found = {f"slope: {rewards}": mean(slope) for rewards, slope in slopes.items()}
    return found | {name: mean(slopes[x] - slopes[CLEAN]) for x, name in CHANGES.items()}


def measures():
    found = {
        "training, all three tasks": effects(TRAINING),
        "training, without InvertedDoublePendulum": effects(TRAINING, slice(0, 2)),
        "training, of beta 0 with the same rewards": effects(TRAINING, own=True),
        "last five evaluations": effects(FIVE),
        "last evaluation": effects(LAST),
    }
    return estimate_table("", found, places=3)


def dose_effects():
    """Differences of other betas from beta 0 in the last evaluation, averaged over the tasks, as
    shares of beta 0's score with the same rewards: {beta: {rewards: estimate}}."""
    by_seed = relative_scores(LAST, own=True).mean(axis=0)
    found = {}
    for i, beta in enumerate(BETAS):
        if i > 0:
            found[beta] = {x: mean(y[i] - y[0]) for x, y in zip(REWARDS.values(), by_seed)}
    return found


def doses():
    return estimate_table("beta", dose_effects(), places=3)


def comparisons():
    """All are shares of beta 0's score with the same rewards."""
    options = {"seeds": 12, "tasks": 3, "matters": 0.1}
    p = corrected_p(dose_effects())
    for beta, of_beta in dose_effects().items():
        for rewards, found in of_beta.items():
            claim = "3" if rewards == CLEAN else "4"
            name = f"SA2C, beta {beta} against 0 (alpha 0.5), three tasks, 300,000 steps, {rewards}"
            # A claim stands by the default dose: decided after the scores, on 30 November 2026
            options |= {"p": p[beta, rewards], "beside": beta != "0.5" or rewards == FLIPPED}
            yield Comparison(claim, name, PAGE, found, **options)
    names = {f"slope: {x}": f"beta 20 against 0 by a fitted line, {x}" for x in REWARDS.values()}
    names["slope: flipped advantages"] += ", only through InvertedDoublePendulum"
    names["noisy minus clean"] = "change of the slope by noise"
    names["flipped minus clean"] = "change of the slope by flips"
    p = corrected_p({measure: effects(measure, own=True) for measure in MEASURES})
    options |= {"measure": MEASURES[TRAINING], "beside": True}
    for name, found in effects(TRAINING, own=True).items():
        claim = "3" if name == "slope: clean" else "4"
        options["p"] = p[TRAINING, name]
        yield Comparison(claim, names[name], PAGE, found, **options)


def draw():
    colors = zip(["black", "tab:blue", "tab:orange"], REWARDS.values())
    styles = [{"color": color, "label": rewards} for color, rewards in colors]
    panels = panels_of(relative_scores(TRAINING), TASKS, DOSES, styles, shift=0.02)
    label = "training score relative\nto beta 0, clean"
    ticks = dict(zip(BETAS, DOSES))
    draw_panels(RESULTS / "a2c/dose.png", panels, ticks, "beta (alpha 0.5)", label)
