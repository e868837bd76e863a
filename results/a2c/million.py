"""A million steps of SA2C and DA2C, three tasks. Nothing is tested."""

import numpy as np

from results.common import HOPPER, LANDER, NOISES, PENDULUM, cells, score_table, short
from results.verdicts import in_points

PAGE = "a2c/README.md#a-million-steps"
PACK = "a2c/million"
LOSS = ("sa2c", "da2c")


def scores():
    rows = {}
    for task in [HOPPER, PENDULUM, LANDER]:
        for noise, rewards in NOISES.items():
            rows[f"{short(task)}, {rewards}"] = cells(PACK)[task, noise]
    return score_table("task", rows, ["da2c", LOSS])


def comparisons():
    for claim, noise in zip(["3", "4"], NOISES):
        for task in [HOPPER, LANDER, PENDULUM]:
            yield in_points(claim, short(task), PAGE, PACK, (task, noise), LOSS, p=np.nan)
