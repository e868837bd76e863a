"""Tables of this folder's page, but for those of dose.py."""

import pandas as pd

from analysis.compare import cells_of
from analysis.tables import markdown
from results.common import HOPPER, LANDER, PENDULUM, minus_text, read, score_text, short


def read_cells():
    """Of both packs, which have different seeds."""
    scores = pd.concat([read("a2c/million"), read("a2c/fresh")])
    assert not scores.drop(columns="score").duplicated().any(), "the same seed in both"
    return cells_of(scores)


def million():
    cells = read_cells()
    rows = []
    for task in [HOPPER, PENDULUM, LANDER]:
        for noise, rewards in {"clean": "clean", "normal 0.05": "noisy"}.items():
            cell = cells[task, noise]
            difference = minus_text(cell["sa2c"], cell["da2c"])
            rows.append([f"{short(task)}, {rewards}", score_text(cell["da2c"]), difference])
    return markdown(["task", "DA2C", "SA2C minus DA2C"], rows)


def against_stable_baselines3():
    cells = {"all eight seeds": read_cells(), "the last five seeds": cells_of(read("a2c/fresh"))}
    rows = []
    for title, found in cells.items():
        cell = found[HOPPER, "clean"]
        ours, theirs = cell["a2c"], cell["sb3-a2c"]
        rows.append([title, score_text(ours), score_text(theirs), minus_text(ours, theirs)])
    return markdown(["", "A2C", "Stable-Baselines3", "A2C minus Stable-Baselines3"], rows)
