"""Breakout: SPPO, and SA2C (the pack epsilon)."""

from analysis.measures import LAST, TRAINING
from results.common import MEASURES, cells, score_table
from results.verdicts import in_points

PAGE = "atari/README.md#breakout-three-seeds"
NOISES = {"clean": "clean", "flip 0.1": "flipped"}
LOSS = ("sppo", "ppo")
A2C_PAGE = "atari/README.md#sa2c-breakout-three-seeds"
A2C_LOSS = ("sa2c", "a2c")
CLEAN = ("Breakout", "clean")


def scores():
    found = cells("atari/breakout")
    rows = {rewards: found["Breakout", noise] for noise, rewards in NOISES.items()}
    return score_table(
        "rewards", rows, ["ppo", "sppo", LOSS, "ppo-corrected", "ppo-coef", "sppo-p"], places=1
    )


def epsilon():
    rows = {MEASURES[x]: cells("atari/epsilon", x)[CLEAN] for x in [LAST, TRAINING]}
    columns = ["a2c", "sa2c", A2C_LOSS, ("sa2c", "a2c-half")]
    return score_table("measure", rows, columns, places=1)


def comparisons():
    for claim, noise in zip(["5", "7"], NOISES):
        yield in_points(claim, "Breakout", PAGE, "atari/breakout", ("Breakout", noise), LOSS)
    a2c = (A2C_PAGE, "atari/epsilon", CLEAN, A2C_LOSS)
    yield in_points("6", "Breakout, a million steps", *a2c)
    yield in_points("6", "Breakout", *a2c, TRAINING, beside=True)
