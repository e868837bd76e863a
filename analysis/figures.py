"""Figures of a report, as PNG and as PDF: as wide as a page, 6.75 inches, or a column of text."""

import math

import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.ticker import EngFormatter

from analysis.runs import CELL


def set_style():
    """Of all figures; a program that draws calls it first."""
    plt.switch_backend("agg")
    sns.set_context("paper", font_scale=0.8)
    plt.rcParams["text.parse_math"] = False  # a method may be called "$a$b"
    plt.rcParams["pdf.fonttype"] = 42  # text stays text, in no Type 3 font: publishers refuse it


def save(figure, file):
    for suffix in [".png", ".pdf"]:
        figure.savefig(file.with_suffix(suffix), dpi=200, bbox_inches="tight", pad_inches=0.03)
    plt.close(figure)


def draw_curves(runs, progress, column, colors, file, narrow):
    """`column` of progress.csv over the run, a panel for each task and kind of noise. The numbers
    are in a CSV, too."""
    curves = runs[["run_name", *CELL]].merge(progress[["run_name", "step", column]], on="run_name")
    points = curves.groupby([*CELL, "step"])[column]
    points.agg(["mean", "sem", "size"]).to_csv(file.with_suffix(".csv"))
    curves["panel"] = curves["task"] + "\n" + curves["noise"]
    down, across = ["task", "noise"] if narrow else ["noise", "task"]
    columns = min(curves[across].nunique(), 2 if narrow else 4)
    grid = sns.relplot(
        curves.sort_values([down, across]),
        kind="line",
        x="step",
        y=column,
        hue="method",
        hue_order=[method for method in colors if method in set(curves["method"])],
        palette=colors,
        style="method",  # dashes, so that equal curves can both be seen
        marker="o",  # so that a single evaluation can be seen
        markersize=2.5,
        markeredgewidth=0,
        errorbar="se",
        col="panel",
        col_wrap=columns,
        height=1.7,
        aspect=(3.25 if narrow else 6.75) / columns / 1.7,
        facet_kws={"sharey": False},
    )
    grid.set_titles("{col_name}")
    is_text = "policy_model" in runs and (runs["policy_model"] != "").all()
    grid.set_axis_labels("texts" if is_text else "steps", column)
    grid.axes.flat[0].xaxis.set_major_formatter(EngFormatter(sep=""))  # 500k, 1M
    options = {"bbox_to_anchor": (0.5, 1), "ncols": 3 if narrow else 6, "title": ""}
    sns.move_legend(grid, "lower center", **options)
    save(grid.figure, file)


def draw_differences(differences, file, narrow):
    """A panel for each task; pairs of methods and kinds of noise down."""
    pairs = differences["method"] + " minus " + differences["baseline"]
    table = differences.assign(row=pairs + ", " + differences["noise"])
    table = table.sort_values("row", ascending=False)
    tasks = sorted(set(table["task"]))
    columns = min(len(tasks), 1 if narrow else 4)
    rows = math.ceil(len(tasks) / columns)
    size = (3.25 if narrow else 6.75, rows * (0.7 + 0.15 * table["row"].nunique()))
    options = {"sharey": True, "squeeze": False, "layout": "constrained"}
    figure, axes = plt.subplots(rows, columns, figsize=size, **options)
    for task, ax in zip(tasks, axes.flat):
        panel = table[table["task"] == task]
        half = panel["high"] - panel["difference"]
        ax.errorbar(panel["difference"], panel["row"], xerr=half, fmt="ok", markersize=3)
        ax.axvline(0, linestyle="--", color="gray")
        ax.set_title(task)
    for ax in axes.flat[len(tasks) :]:
        ax.remove()
    figure.supxlabel("difference", size="medium")
    save(figure, file)
