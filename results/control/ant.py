"""Ant, the authors' own task."""

from analysis.measures import FIVE, LAST
from results.common import MEASURES, cells, score_table
from results.control.three_tasks import COLUMNS, LOSS
from results.verdicts import in_points

PAGE = "control/README.md#the-authors-own-task-ant"
PLACE = ("Ant-v4", "clean")


def scores():
    rows = {MEASURES[x]: cells("control/ant", x)[PLACE] for x in [LAST, FIVE]}
    return score_table("measure", rows, COLUMNS)


def comparisons():
    yield in_points("1", "Ant, the authors' own task", PAGE, "control/ant", PLACE, LOSS)
