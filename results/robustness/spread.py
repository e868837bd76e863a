"""Whether SPPO's scores spread less over seeds than DPPO's: claim 9, by control's three tasks."""

import numpy as np

from analysis.compare import cells_of
from results.common import read
from results.comparisons import Comparison, Interval


def comparisons():
    page = "control/README.md#a-million-steps-three-tasks-eight-seeds"
    ratios = []
    for cell in cells_of(read("control/three-tasks")).values():
        ratios.append(cell["sppo"].std(ddof=1) / cell["dppo"].std(ddof=1))
    found = Interval(np.median(ratios), min(ratios), max(ratios))
    name = "spread over seeds, SPPO's to DPPO's: median, least and most of six ratios"
    yield Comparison("9", name, page, found, 8, unit="ratio", tasks=3, decided="not tested")
