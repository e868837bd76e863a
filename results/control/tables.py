"""Tables of this folder's page, but for those of k.py."""

import numpy as np

from analysis.compare import FIVE, LAST, TRAINING, cells_of, pooled_difference
from analysis.tables import markdown
from results.common import (
    HOPPER,
    LANDER,
    MEASURES,
    PENDULUM,
    gain_text,
    log_mean_and_variance,
    minus_text,
    read,
    score_text,
    short,
)

NOISES = ["clean", "normal 0.05"]


def three_tasks():
    cells = cells_of(read("control/three-tasks"))
    rows = []
    for task in [HOPPER, PENDULUM, LANDER]:
        for noise, rewards in zip(NOISES, ["clean", "noisy"]):
            cell = cells[task, noise]
            row = [
                f"{short(task)}, {rewards}",
                score_text(cell["ppo"]),
                score_text(cell["dppo"]),
                score_text(cell["sppo"]),
                minus_text(cell["sppo"], cell["dppo"]),
                minus_text(cell["dppo"], cell["ppo"]),
            ]
            rows.append(row)
    header = ["task", "PPO", "DPPO", "SPPO", "SPPO minus DPPO", "DPPO minus PPO"]
    return markdown(header, rows)


def pairs(a, b, measure=LAST, noises=NOISES):
    """Scores of two methods on Hopper and InvertedDoublePendulum, whose returns are above 0."""
    cells = cells_of(read("control/three-tasks"), measure)
    chosen = [cells[task, noise] for task in [HOPPER, PENDULUM] for noise in noises]
    return [(cell[a], cell[b]) for cell in chosen]


def gains():
    rows = []
    for measure in [LAST, FIVE, TRAINING]:
        texts = [gain_text(pairs(method, "dppo", measure)) for method in ["sppo", "ppo"]]
        rows.append([MEASURES[measure], *texts])
        if measure == LAST:
            for title, noise in zip(["the same, clean", "the same, noisy"], NOISES):
                found = [pairs(method, "dppo", noises=[noise]) for method in ["sppo", "ppo"]]
                rows.append([title, *map(gain_text, found)])
    return markdown(["measure", "SPPO", "Gaussian PPO"], rows)


def detected_gains():
    """What gains of SPPO the runs could detect."""
    texts = []
    for noises in [NOISES, NOISES[:1], NOISES[1:]]:
        found = pooled_difference(pairs("sppo", "dppo", noises=noises), log_mean_and_variance)
        texts.append(f"{100 * np.expm1(found.detectable):.0f} %")
    return "{} pooled ({} clean, {} noisy)".format(*texts)


def variant():
    return gain_text(pairs("sppo-p", "dppo"))


def ant():
    """The page's only table with methods down."""
    columns = []
    for measure in [LAST, FIVE, TRAINING]:
        cell = cells_of(read("control/ant"), measure)["Ant-v4", "clean"]
        column = [
            score_text(cell["ppo"]),
            score_text(cell["dppo"]),
            score_text(cell["sppo"]),
            minus_text(cell["sppo"], cell["dppo"]),
            minus_text(cell["dppo"], cell["ppo"]),
        ]
        columns.append(column)
    names = ["Gaussian PPO", "DPPO", "SPPO", "SPPO minus DPPO", "DPPO minus Gaussian PPO"]
    header = ["method", "last evaluation", "last five evaluations", "training"]
    return markdown(header, zip(names, *columns))


def stable_baselines3():
    cells = cells_of(read("control/stable-baselines3"))
    rows = []
    for task in [HOPPER, LANDER]:
        cell = cells[task, "clean"]
        rows.append([short(task), minus_text(cell["ppo"], cell["sb3-ppo"])])
    return markdown(["task", "PPO minus Stable-Baselines3"], rows)
