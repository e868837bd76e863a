"""SPPO in control at the ends of k. The unit is the seed."""

import numpy as np

from analysis.compare import Estimate, difference
from analysis.measures import FIVE, TRAINING
from analysis.methods import COLORS
from results.common import (
    HOPPER,
    LANDER,
    MEASURES,
    PENDULUM,
    RESULTS,
    above_floors,
    corrected_p,
    draw_panels,
    estimate_table,
    mean,
    short,
)
from results.verdicts import Comparison

PAGE = "control/README.md#the-ends-of-k"
TASKS = [PENDULUM, LANDER, HOPPER]
NOISES = ["clean", "normal 0.05"]
ENDS = {"k0.2": 0.2, "k1": 1, "k100": 100}
OLDER = "k = 20.5 minus 1"
SLOPE = "slope per tenfold k"


def relative(pack, measure, methods, baseline):
    """Scores (tasks, noises, methods, seeds) relative to the mean of the `baseline`."""
    scores = above_floors(pack, measure, TASKS, NOISES, methods)
    return scores / scores[:, :, [methods.index(baseline)]].mean(axis=-1, keepdims=True)


def effects(measure, tasks=slice(None), noises=slice(None)):
    """{name: estimate} of the relative scores' differences from k = 1 and of their slope, over
    `noises` and `tasks`, slices. Scores of SPPO, which is k = 20.5, are relative to DPPO, k = 1, of
    the same earlier runs."""
    ends = relative("control/k", measure, list(ENDS), "k1")
    earlier = relative("control/three-tasks", measure, ["dppo", "sppo"], "dppo")
    low, one, high = ends[tasks, noises].mean(axis=(0, 1))
    dppo, sppo = earlier[tasks, noises].mean(axis=(0, 1))
    slopes = np.polyfit(np.log10(list(ENDS.values())), [low, one, high], deg=1)[0]
    return {
        "k = 0.2 minus 1": mean(low - one),
        "k = 100 minus 1": mean(high - one),
        OLDER: difference(sppo, dppo),
        SLOPE: mean(slopes),
    }


def measures():
    rows = {title: effects(measure) for measure, title in MEASURES.items()}
    rows["last five evaluations, clean"] = effects(FIVE, noises=[0])
    rows["last five evaluations, noisy"] = effects(FIVE, noises=[1])
    return estimate_table("", rows, places=3)


def comparisons():
    options = {"seeds": 8, "tasks": 3, "measure": MEASURES[FIVE]}
    for i, (claim, rewards) in enumerate({"1": "clean", "2": "noisy"}.items()):
        found = effects(FIVE, noises=[i])[OLDER]
        yield Comparison(claim, f"SPPO minus DPPO, three tasks, {rewards}", PAGE, found, **options)
    options |= {"matters": 0.1, "beside": True}
    tested = {measure: effects(measure) for measure in MEASURES}
    for name, found in tested[FIVE].items():
        if name != SLOPE:
            options["matters"] = np.nan if name == OLDER else 0.1
            yield Comparison("1", f"{name}, clean and noisy", PAGE, found, **options)
    for of_measure in tested.values():
        del of_measure[OLDER]  # of other runs
    options |= {"measure": MEASURES[TRAINING], "p": corrected_p(tested)[TRAINING, SLOPE]}
    yield Comparison("1", f"{SLOPE}, clean and noisy", PAGE, tested[TRAINING][SLOPE], **options)


def points(tasks):
    """Last five evaluations relative to k = 1."""
    low, high, sppo, _ = effects(FIVE, tasks).values()
    lines = [(0, [Estimate(1, error=0, freedom=1)], {"color": COLORS["dppo"]})]
    for k, color, found in [
        (0.2, "black", low),
        (20.5, COLORS["sppo"], sppo),
        (100, "black", high),
    ]:
        found.value += 1
        lines.append((np.log10(k), [found], {"color": color}))
    return lines


def draw():
    panels = {"all three tasks": points(slice(None))}
    panels |= {short(task): points([i]) for i, task in enumerate(TASKS)}
    ticks = {"0.2": np.log10(0.2), "1\nDPPO": 0, "20.5\nSPPO": np.log10(20.5), "100": 2}
    label = "k, the weight of the policy loss"
    draw_panels(RESULTS / "control/k.png", panels, ticks, label, "score relative to k = 1")
