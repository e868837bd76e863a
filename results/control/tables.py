"""Tables of this folder's page, but for those of k.py."""

from analysis.compare import cells_of
from analysis.measures import FIVE, LAST
from analysis.runs import CELL
from analysis.tables import markdown
from results.common import (
    HOPPER,
    LANDER,
    MEASURES,
    PENDULUM,
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


def pairs(a, b, noises):
    """Scores of two methods on Hopper and InvertedDoublePendulum, whose returns are above 0."""
    cells = cells_of(read("control/three-tasks"))
    chosen = [cells[task, noise] for task in [HOPPER, PENDULUM] for noise in noises]
    return [(cell[a], cell[b]) for cell in chosen]


def shares():
    """Lowest and highest mean share over methods, tasks and kinds of noise."""
    rows = []
    for title, pack, metric in [
        ("updates that are clipped", "three-tasks", "losses/clipped_gradients:all"),
        ("the same, k = 0.2", "k", "losses/clipped_gradients:all"),
        (
            "advantages whose sign changes in normalisation",
            "three-tasks",
            "losses/norm_sign_changes:all",
        ),
    ]:
        scores = read(f"control/{pack}", metric)
        chosen = scores[scores["measure"] == metric]
        if pack == "k":
            chosen = chosen[chosen["method"] == "k0.2"]
        means = 100 * chosen.groupby(CELL)["score"].mean()
        rows.append([title, f"{means.min():.0f} %", f"{means.max():.0f} %"])
    return markdown(["share", "lowest", "highest"], rows)


def ant():
    rows = []
    for measure in [LAST, FIVE]:
        cell = cells_of(read("control/ant"), measure)["Ant-v4", "clean"]
        scores = [score_text(cell[method]) for method in ["ppo", "dppo", "sppo"]]
        differences = minus_text(cell["sppo"], cell["dppo"]), minus_text(cell["dppo"], cell["ppo"])
        rows.append([MEASURES[measure], *scores, *differences])
    header = ["measure", "PPO", "DPPO", "SPPO", "SPPO minus DPPO", "DPPO minus PPO"]
    return markdown(header, rows)
