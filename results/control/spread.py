"""Claim 9: how much last evaluations spread over seeds. The unit is the task."""

import numpy as np
from scipy import stats

from analysis.tables import markdown
from results.common import NOISES, cells, mean
from results.control import nine, three_tasks
from results.verdicts import LOG_RATIO, Comparison


def log_ratio(cell):
    """DPPO's standard deviation to SPPO's: a gain is above 0."""
    return np.log(cell["dppo"].std(ddof=1) / cell["sppo"].std(ddof=1))


def log_ratios(pack):
    """(tasks, noises)"""
    found = cells(pack)
    tasks = sorted({task for task, _ in found})
    return np.array([[log_ratio(found[task, noise]) for noise in NOISES] for task in tasks])


def comparisons():
    for pack, name, page, seeds in [
        ("control/nine-test", "nine tasks", nine.PAGE, 6),
        ("control/three-tasks", "three tasks", three_tasks.PAGE, 8),
    ]:
        ratios = log_ratios(pack)
        name = f"spread over seeds, DPPO's to SPPO's, {name}, clean and noisy"
        options = {"tasks": len(ratios), "unit": LOG_RATIO}
        yield Comparison("9", name, page, mean(ratios.mean(axis=1)), seeds, **options)


def coverage(samples=10_000):
    """How often the interval of nine tasks holds the true ratio, of simulated normal scores."""
    rng = np.random.default_rng(0)
    measured = log_ratios("control/nine-test")
    rows = []
    for title, true in [("equal", np.zeros_like(measured)), ("as measured", measured)]:
        scores = rng.normal(size=(2, samples, *true.shape, 6))
        dppo, sppo = np.log(scores.std(axis=-1, ddof=1))
        ratios = (true + dppo - sppo).mean(axis=-1)
        half = stats.t.ppf(0.975, len(true) - 1) * stats.sem(ratios, axis=1)
        is_covered = np.abs(ratios.mean(axis=1) - true.mean()) <= half
        rows.append([title, f"{100 * is_covered.mean():.1f} %"])
    return markdown(["each cell's true ratio of spreads", "coverage"], rows)
