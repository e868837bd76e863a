"""Three tasks, Ant and locomotion: tables, what speaks to claims 1 and 2, predictions. k.py and
nine.py have the rest of this folder's page."""

import numpy as np

from analysis.compare import cells_of, difference, pooled_difference
from analysis.measures import FIVE, LAST
from analysis.runs import CELL
from analysis.tables import markdown
from results.common import (
    HOPPER,
    LANDER,
    MEASURES,
    NOISES,
    PENDULUM,
    log_mean_and_variance,
    minus_text,
    read,
    score_text,
    short,
)
from results.comparisons import Comparison, Interval, in_points, includes_0
from results.control.nine import METHODS


def table(name, cells):
    """A row for each of `cells`, {title: {method: scores}}."""
    rows = []
    for title, cell in cells.items():
        scores = [score_text(cell[method]) for method in METHODS]
        differences = minus_text(cell["sppo"], cell["dppo"]), minus_text(cell["dppo"], cell["ppo"])
        rows.append([title, *scores, *differences])
    return markdown([name, *METHODS.values(), "SPPO minus DPPO", "DPPO minus PPO"], rows)


def three_tasks():
    cells = cells_of(read("control/three-tasks")) | cells_of(read("control/locomotion"))
    chosen = {}
    for task in [HOPPER, PENDULUM, LANDER, "HalfCheetah-v4", "Walker2d-v4"]:
        for noise, rewards in NOISES.items():
            chosen[f"{short(task)}, {rewards}"] = cells[task, noise]
    return table("task", chosen)


def shares():
    """Lowest and highest mean share over methods, tasks and kinds of noise."""
    clipped, changes = "losses/clipped_gradients:all", "losses/norm_sign_changes:all"
    scores = read("control/three-tasks", clipped, changes)
    low_k = read("control/k", clipped).query("method == 'k0.2'")
    rows = []
    for title, chosen, metric in [
        ("updates that are clipped", scores, clipped),
        ("the same, k = 0.2", low_k, clipped),
        ("advantages whose sign changes in normalisation", scores, changes),
    ]:
        means = 100 * chosen[chosen["measure"] == metric].groupby(CELL)["score"].mean()
        rows.append([title, f"{means.min():.0f} %", f"{means.max():.0f} %"])
    return markdown(["share", "lowest", "highest"], rows)


def ant_cell(measure=LAST):
    return cells_of(read("control/ant"), measure)["Ant-v4", "clean"]


def ant():
    return table("measure", {MEASURES[measure]: ant_cell(measure) for measure in [LAST, FIVE]})


def relative_gain(noise):
    """On Hopper and InvertedDoublePendulum, whose returns are above 0."""
    cells = cells_of(read("control/three-tasks"))
    chosen = [cells[task, noise] for task in [HOPPER, PENDULUM]]
    pairs = [(cell["sppo"], cell["dppo"]) for cell in chosen]
    found = pooled_difference(pairs, log_mean_and_variance)
    return Interval(*np.expm1([found.value, found.low, found.high]))


def comparisons():
    pair = ("sppo", "dppo")
    page = "control/README.md#the-authors-own-task-ant"
    name = "Ant, the authors' own task"
    yield in_points("1", name, page, "control/ant", ("Ant-v4", "clean"), pair)
    page = "control/README.md#a-million-steps-three-tasks-eight-seeds"
    for claim, noise in zip(["1", "2"], NOISES):
        name = "Hopper and InvertedDoublePendulum"
        yield Comparison(claim, name, page, relative_gain(noise), 8, tasks=2)
        place = (LANDER, noise)
        yield in_points(claim, "LunarLander", page, "control/three-tasks", place, pair)
        for task in ["HalfCheetah-v4", "Walker2d-v4"]:
            place = (task, noise)
            yield in_points(claim, short(task), page, "control/locomotion", place, pair)
    ratios = []
    for cell in cells_of(read("control/three-tasks")).values():
        ratios.append(cell["sppo"].std(ddof=1) / cell["dppo"].std(ddof=1))
    found = Interval(np.median(ratios), min(ratios), max(ratios))
    name = "spread over seeds, SPPO's to DPPO's: median, least and most of six ratios"
    yield Comparison("9", name, page, found, 8, unit="ratio", tasks=3, decided="not tested")


def predictions():
    fresh = read("control/three-tasks").query("seed > 10003")
    noisy_hopper = cells_of(fresh, FIVE)[HOPPER, "normal 0.05"]
    cells = cells_of(fresh)
    hopper, lander = cells[HOPPER, "clean"], cells[LANDER, "clean"]
    bins = ["dppo", "sppo"]
    above = [hopper["ppo"].mean() > hopper[method].mean() for method in bins]
    below = [lander["ppo"].mean() < lander[method].mean() for method in bins]
    on_hopper = [difference(hopper["ppo"], hopper[method]) for method in bins]
    cell = ant_cell()
    of_loss = difference(cell["sppo"], cell["dppo"])
    small = abs(of_loss.value) < 0.2 * cell["dppo"].mean()
    return {
        "fresh-hopper": noisy_hopper["sppo"].mean() > noisy_hopper["dppo"].mean(),
        "fresh-signs": all(above + below),
        "fresh-intervals": all(map(includes_0, on_hopper)),
        "ant-loss": small and includes_0(of_loss),
        "ant-bins": cell["dppo"].mean() > cell["ppo"].mean(),
    }
