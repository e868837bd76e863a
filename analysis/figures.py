"""Figures of a report, as PNG and as PDF: as wide as a page, 6.75 inches, or a column of text."""

import math
import textwrap
from itertools import cycle

import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.ticker import EngFormatter

from analysis.runs import CELL


def set_style():
    """Of all figures; a program that draws calls it first."""
    plt.switch_backend("agg")
    sns.set_context("paper", font_scale=0.8)
    plt.rcParams["figure.labelsize"] = "medium"
    plt.rcParams["text.parse_math"] = False  # a method may be called "$a$b"
    plt.rcParams["pdf.fonttype"] = 42  # text stays text, in no Type 3 font: publishers refuse it


def save(figure, file):
    for suffix in [".png", ".pdf"]:
        figure.savefig(file.with_suffix(suffix), dpi=200)
    plt.close(figure)


def wrapped(text, inches):
    return textwrap.fill(text, int(15 * inches))


def panels(titles, columns, width, height, **options):
    """A figure with at most so many columns, and {title: its axes}."""
    titles = list(dict.fromkeys(titles))
    columns = min(columns, len(titles))
    rows = math.ceil(len(titles) / columns)
    options |= {"figsize": (width, rows * height), "squeeze": False, "layout": "constrained"}
    figure, axes = plt.subplots(rows, columns, **options)
    for ax in axes.flat[len(titles) :]:
        ax.remove()
    for title, ax in zip(titles, axes.flat):
        ax.set_title(wrapped(title, width / columns), loc="right")
    return figure, dict(zip(titles, axes.flat))


def draw_curves(runs, progress, column, label, colors, file, width):
    """`column` of progress.csv, a panel for each task and noise that has it; and as a CSV."""
    curves = runs[["run_name", *CELL]].merge(progress[["run_name", "step", column]]).dropna()
    points = curves.groupby([*CELL, "step"])[column].agg(["mean", "sem", "size"]).reset_index()
    points.to_csv(file.with_suffix(".csv"), index=False)
    points["panel"] = points["task"] + ", " + points["noise"]
    columns = int(width / 1.6)
    columns -= columns % min(columns, points["noise"].nunique())  # a task's side by side
    height = min(1.8, 8 * columns / points["panel"].nunique())  # no higher than a page
    figure, axes = panels(points["panel"], columns, width, height)
    lines = {}  # for the legend
    dashes = cycle(["-", "--", "-.", ":"])  # equal curves can both be seen
    for method, color in colors.items():
        style = {"color": color, "linestyle": next(dashes), "marker": "o", "markersize": 2}
        for panel, line in points[points["method"] == method].groupby("panel"):
            ax = axes[panel]
            x, y, error = line["step"], line["mean"], line["sem"]
            lines[wrapped(method, width - 1)] = ax.plot(x, y, **style)[0]
            ax.fill_between(x, y - error, y + error, color=color, alpha=0.2, linewidth=0)
            ax.xaxis.set_major_formatter(EngFormatter(sep=""))  # 500k, 1M
    figure.supxlabel("step")
    figure.supylabel(label)
    columns = int(width / (0.7 + max(map(len, lines)) / 16)) or 1
    figure.legend(lines.values(), lines, loc="outside upper center", ncols=columns)
    save(figure, file)


def draw_differences(differences, label, file, width):
    """A panel for each task; pairs of methods and kinds of noise down."""
    pairs = differences["method"] + " minus " + differences["baseline"]
    names = (pairs + ", " + differences["noise"]).map(lambda name: wrapped(name, width / 3))
    rows = sorted(set(names), reverse=True)
    lines = 1 + max(name.count("\n") for name in names)
    height = 0.7 + 0.15 * lines * len(rows)
    tasks = sorted(differences["task"])
    figure, axes = panels(tasks, int(width / 2), width, height, sharey=True)
    for task, panel in differences.groupby("task"):
        half = panel["high"] - panel["difference"]
        y = names[panel.index].map(rows.index)
        axes[task].errorbar(panel["difference"], y, xerr=half, fmt="ok", markersize=3)
        axes[task].axvline(0, linestyle="--", color="gray")
        axes[task].locator_params(axis="x", nbins=4)
        axes[task].set_yticks(range(len(rows)), rows)
        axes[task].set_ylim(-0.5, len(rows) - 0.5)
    figure.supxlabel(f"difference: {label}")
    save(figure, file)
