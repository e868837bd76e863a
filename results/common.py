"""What the analyses in these folders share: scores of packs, estimates, tables, figures.

Reading, statistics and number format are the report's, in analysis/; what a page registered is in
its own analysis.
"""

from functools import cache
from itertools import combinations, product
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

from analysis.compare import cells_of, contrast, difference, scores_of
from analysis.measures import FIVE, LAST, TRAINING, measures_in
from analysis.runs import CELL, in_cells, read_pack
from analysis.runs import read as read_runs
from analysis.tables import interval_text, markdown, mean_text

RESULTS = Path(__file__).parent
HOPPER, PENDULUM, LANDER = "Hopper-v4", "InvertedDoublePendulum-v4", "LunarLanderContinuous-v3"
FLOORS = {LANDER: -200, "HalfCheetah-v4": -300}  # else 0
NOISES = {"clean": "clean", "normal 0.05": "noisy"}
MEASURES = {FIVE: "last five evaluations", LAST: "last evaluation", TRAINING: "training"}
TITLES = {  # of methods; else their names in capitals
    "ppo-authors": "PPO, not normalised",
    "ppo-corrected": "PPO, unbiased rewards",
    "ppo-coef": "PPO, weights / k",
    "sppo-p": "our variant",
    "a2c-half": "A2C with alpha 0.5",
    "ppo-eps": "PPO, epsilon 1e-8",
    "ppo-ce-eps": "PPO, ce-coef / k, epsilon 1e-8",
    "sppo-eps": "SPPO, epsilon 1e-8",
}


# ---- Scores


@cache
def read(pack, *chosen):
    """Scores of a pack, such as "control/k", also in `chosen` measures, as analysis/ has them."""
    runs, progress, broken = read_runs([RESULTS / f"{pack}-runs.csv.gz"])
    assert not broken, broken
    return scores_of(in_cells(runs).query("finished"), progress, measures_in(progress, *chosen))


def packed(pack):
    """Runs and evaluations of a pack."""
    return read_pack(RESULTS / f"{pack}-runs.csv.gz")


def cells(pack, measure=LAST):
    """{(task, noise): {method: scores (seeds,)}}"""
    return cells_of(read(pack), measure)


def above_floors(pack, measure, tasks, noises, methods):
    """Scores above the task's floor (tasks, noises, methods, seeds), the same seeds everywhere."""
    chosen = read(pack).query("measure == @measure").set_index("seed")
    groups = chosen.groupby(CELL)["score"]
    found = [groups.get_group(cell) for cell in product(tasks, noises, methods)]
    assert all(cell.index.equals(found[0].index) for cell in found), "other seeds"
    array = np.reshape(found, (len(tasks), len(noises), len(methods), -1))
    floors = np.array([FLOORS.get(task, 0) for task in tasks])
    return array - floors[:, None, None, None]


def short(task):
    return task.partition("-")[0].removesuffix("Continuous")


# ---- Estimates


def mean(sample):
    """By Student's t."""
    return contrast([sample], [1])


def holm(p):
    """p-values (tests,), corrected by Holm's method."""
    order = np.argsort(p)
    factors = np.arange(len(p), 0, -1)
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(1, np.maximum.accumulate(np.take(p, order) * factors))
    return corrected


def corrected_p(rows):
    """p of `rows`, {title: {name: estimate}}, by Benjamini and Hochberg: {(title, name): p}."""
    p = {(title, name): found.p for title, row in rows.items() for name, found in row.items()}
    return dict(zip(p, stats.false_discovery_control(np.nan_to_num(list(p.values()), nan=1))))


@cache
def corrected_suite(pack):
    """The same of the differences between all methods of a pack, in all measures:
    {((measure, task, noise), methods): p}."""
    rows = {}
    for measure in MEASURES:
        for place, cell in cells(pack, measure).items():
            rows[(measure, *place)] = {
                frozenset([a, b]): difference(cell[a], cell[b]) for a, b in combinations(cell, 2)
            }
    return corrected_p(rows)


# ---- Texts and tables


def score_text(sample, places=0):
    return mean_text(sample.mean(), stats.sem(sample), places)


def estimate_text(found, places=2):
    return interval_text(found.value, found.low, found.high, places)


def percent_text(found):
    """Of a log ratio."""
    value, low, high = 100 * np.expm1([found.value, found.low, found.high])
    return f"{value:.1f} % ({low:.1f} to {high:.1f})"


def estimate_table(name, rows, places=2):
    """A table of `rows`, {title: {column: estimate}}; `name` stands above the titles."""
    lines = []
    for title, found in rows.items():
        lines.append([title, *(estimate_text(x, places) for x in found.values())])
    return markdown([name, *found], lines)


def title_of(column):
    """Of a method, or of a pair of methods."""
    if isinstance(column, tuple):
        return " minus ".join(map(title_of, column))
    return TITLES.get(column, column.upper())


def cell_text(cell, column, places=0):
    """A method's mean ± standard error, a pair's difference; "" if the method is not there."""
    if isinstance(column, tuple):
        a, b = column
        return estimate_text(difference(cell[a], cell[b]), places)
    return score_text(cell[column], places) if column in cell else ""


def score_table(name, rows, columns, places=0):
    """A table of `rows`, {title: {method: scores}}; `columns` are methods and pairs of them."""
    lines = []
    for title, cell in rows.items():
        lines.append([title, *(cell_text(cell, x, places) for x in columns)])
    return markdown([name, *map(title_of, columns)], lines)


# ---- Figures


def bars(found):
    """Values and half widths of estimates."""
    return [x.value for x in found], [x.half_width() for x in found]


def panels_of(scores, tasks, x, styles, shift):
    """Lines of means, one for each of `styles`, averaged over the tasks and of each. `scores`:
    (tasks, lines, x, seeds). A `shift` in x lets intervals stand side by side."""
    shifts = shift * (np.arange(len(styles)) - 1)
    averaged = {"all three tasks": scores.mean(axis=0)} | dict(zip(map(short, tasks), scores))
    panels = {}
    for title, of_lines in averaged.items():
        lines = zip(shifts, of_lines, styles)
        panels[title] = [(x + dx, [mean(y) for y in line], style) for dx, line, style in lines]
    return panels


def draw_panels(file, panels, ticks, xlabel, ylabel):
    """Relative scores. `panels`: {title: [(x, estimates, style)]}; `ticks`: {text: x}."""
    size = (10, 3.2)
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, layout="constrained")
    for ax, (title, lines) in zip(axes, panels.items()):
        ax.axhline(1, color="gray", lw=0.8)
        for x, found, style in lines:
            ax.errorbar(x, *bars(found), marker="o", markersize=4, **style)
        ax.set_xticks(list(ticks.values()), ticks)
        ax.set_title(title)
        ax.set_xlabel(xlabel)
    axes[0].set_ylabel(ylabel)
    lines, labels = axes[0].get_legend_handles_labels()
    if labels:
        figure.legend(lines, labels, loc="outside upper center", ncols=3)
    figure.savefig(file, dpi=170)


def draw_rows(file, ticks, series, matters, xlabel):
    """Effects. `ticks`: {text: y}, from the top; `series`: [(y, values, half widths, style)]."""
    size = (6.8, 1.5 + 0.27 * len(ticks))
    figure, ax = plt.subplots(figsize=size, layout="constrained")
    ax.axvline(0, color="gray", lw=0.8)
    ax.axvline(matters, color="gray", lw=0.8, ls=":")
    for y, values, half, style in series:
        ax.errorbar(values, y, xerr=half, ls="", **style)
    ax.set_yticks(list(ticks.values()), ticks)
    ax.invert_yaxis()
    ax.set_xlabel(f"{xlabel} (dotted: a tenth)")
    figure.legend(loc="outside upper center", ncols=2)
    figure.savefig(file, dpi=170)
