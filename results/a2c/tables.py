"""A million steps of SA2C and DA2C: tables, and what speaks to claims 3 and 4. dose.py has the rest
of this folder's page."""

import numpy as np

from analysis.compare import cells_of
from analysis.tables import markdown
from results.common import HOPPER, LANDER, NOISES, PENDULUM, minus_text, read, score_text, short
from results.comparisons import in_points


def million():
    cells = cells_of(read("a2c/million"))
    rows = []
    for task in [HOPPER, PENDULUM, LANDER]:
        for noise, rewards in NOISES.items():
            cell = cells[task, noise]
            difference = minus_text(cell["sa2c"], cell["da2c"])
            rows.append([f"{short(task)}, {rewards}", score_text(cell["da2c"]), difference])
    return markdown(["task", "DA2C", "SA2C minus DA2C"], rows)


def comparisons():
    """Without a test."""
    page = "a2c/README.md#a-million-steps"
    for claim, noise in zip(["3", "4"], NOISES):
        for task in [HOPPER, LANDER, PENDULUM]:
            place = (task, noise)
            pair = ("sa2c", "da2c")
            yield in_points(claim, short(task), page, "a2c/million", place, pair, corrected=np.nan)
