"""Tables of this folder's page, but for those of dose.py."""

from pathlib import Path

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
    cell = read_cells()[HOPPER, "clean"]
    ours, theirs = cell["a2c"], cell["sb3-a2c"]
    row = [score_text(ours), score_text(theirs), minus_text(ours, theirs)]
    return markdown(["A2C", "Stable-Baselines3", "A2C minus Stable-Baselines3"], [row])


def cosines():
    """Between the gradients of DA2C and of SA2C with other betas, of the final agents."""
    found = pd.read_csv(Path(__file__).with_name("cosines.csv")).set_index("run_name")
    means = found.groupby(found.index.str.split("-").str[0]).mean()
    rows = [[task, *(f"{x:.3f}" for x in row)] for task, row in means.iterrows()]
    return markdown(["task", "beta 0.5", "beta 2", "beta 20"], rows)
