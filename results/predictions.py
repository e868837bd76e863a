"""Registered predictions, in predictions.csv: how many held, and which outcomes packs confirm."""

from pathlib import Path

import pandas as pd

from analysis.compare import cells_of, difference
from analysis.measures import FIVE, LAST, TRAINING
from analysis.tables import markdown
from results.a2c import dose
from results.atari import crazyclimber, games
from results.common import HOPPER, LANDER, corrected_suite, read
from results.control import k, nine
from results.robustness import noise, sweep

CSV = Path(__file__).with_suffix(".csv")


def table():
    return pd.read_csv(CSV, dtype=str, keep_default_na=False)


def counts():
    """By page. What would have been evidence for the paper is no prediction."""
    rows = table()
    rows = rows[~rows["prediction"].str.startswith("For the paper")]
    rows["page"] = rows["pack"].str.partition("/")[0]
    numbers = pd.crosstab(rows["page"], rows["outcome"]).reset_index()
    return markdown(numbers.columns, numbers.to_numpy())


def includes_0(found):
    return found.low <= 0 <= found.high


def fresh_difference(pack, place, pair, seeds, measure=LAST):
    """Of the runs with these seeds."""
    scores = read(pack)
    cell = cells_of(scores[scores["seed"].isin(seeds)], measure)[place]
    return difference(*(cell[method] for method in pair))


def computed():
    """(pack, beginning of the prediction, whether it holds)"""
    ends = k.effects(FIVE)
    low, high = ends["k = 0.2 minus 1"], ends["k = 100 minus 1"]
    within = max(abs(low.value), abs(high.value)) < 0.1
    yield "control/k", "Last five evaluations with k = 0.2 and 100", within
    three = [low, high, ends["slope per tenfold k"]]
    yield "control/k", "Their intervals and the slope's", all(map(includes_0, three))

    fresh = range(10004, 10008)
    place = (HOPPER, "normal 0.05")
    found = fresh_difference("control/three-tasks", place, ("sppo", "dppo"), fresh, FIVE)
    yield "control/three-tasks", "Noisy Hopper, seeds 10004", found.value > 0
    signs = []
    intervals = []
    for task, sign in {HOPPER: 1, LANDER: -1}.items():
        for other in ["sppo", "dppo"]:
            place = (task, "clean")
            found = fresh_difference("control/three-tasks", place, ("ppo", other), fresh)
            signs.append(found.value * sign > 0)
            intervals.append(not includes_0(found))
    yield "control/three-tasks", "Clean, fresh: PPO is above SPPO", all(signs)
    yield "control/three-tasks", "Clean, fresh: of these four", intervals[:2] == [False, False]

    cell = cells_of(read("control/ant"))["Ant-v4", "clean"]
    found = difference(cell["sppo"], cell["dppo"])
    small = abs(found.value) < 0.2 * cell["dppo"].mean()
    yield "control/ant", "SPPO minus DPPO is under 20 %", small and includes_0(found)
    yield "control/ant", "DPPO ends above", cell["dppo"].mean() > cell["ppo"].mean()

    scores = nine.scores_of()
    clean, noisy = (nine.losses(scores, rewards).values() for rewards in nine.NOISES)
    small = [abs(nine.estimate(nine.pooled(effects)).value) < 0.1 for effects in (clean, noisy)]
    yield "control/nine", "Clean and noisy: the pooled effects", all(small)
    change = nine.estimate(nine.pooled(nine.noisy_minus_clean(scores)))
    yield "control/nine", "SPPO minus DPPO, noisy minus clean", includes_0(change)
    yield "control/nine", "All nine tasks count", len(clean) == len(noisy) == 9
    bins = []
    for rewards in nine.NOISES:
        effects = nine.effects_of(scores, (rewards, "dppo"), (rewards, "ppo"))
        bins.append(nine.estimate(nine.pooled(effects.values())).value)
    yield "control/nine", "DPPO minus PPO: the pooled effect", bins[1] > bins[0]
    costs = {}
    for method in nine.METHODS:
        effects = nine.effects_of(scores, ("normal 0.05", method), ("clean", method))
        costs[method] = nine.estimate(nine.pooled(effects.values()))
    yield "control/nine", "Noise costs PPO: noisy minus clean", costs["ppo"].high < 0
    most = min(costs, key=lambda method: costs[method].value)
    yield "control/nine", "Noise costs PPO a larger share", most == "ppo"
    pairs = [(scores[task, "clean", "dppo"], scores[task, "clean", "ppo"]) for task in nine.TASKS]
    above = sum(dppo.mean() > ppo.mean() for dppo, ppo in pairs)
    yield "control/nine", "Clean, DPPO minus PPO: above 0", 2 <= above <= 7

    shares = {method: x.mean(axis=(0, 2)) for method, x in noise.shares().items()}
    falls = all((x[1:] < x[:-1]).all() and x[-1] < 0.4 for x in shares.values())
    yield "robustness/noise", "Each method's score falls", falls
    value, low, high = sweep.difference_in_share()
    yield "robustness/sweep", "A, SPPO minus DPPO", abs(value) < 0.1 and low <= 0 <= high

    slopes = dose.effects(TRAINING)
    yield "a2c/dose", "Training, slope over the dose", slopes["slope: clean"].high < 0
    without = dose.effects(TRAINING, slice(0, 2))["slope: clean"]
    yield "a2c/dose", "Without InvertedDoublePendulum", includes_0(without)
    for name in ["Noisy", "Flipped"]:
        holds = includes_0(slopes[f"{name.lower()} minus clean"])
        yield "a2c/dose", f"{name} minus clean slope", holds

    ratios = games.log_ratios(games.scores_of(FIVE))
    found = {name: games.mean_over_games(ratios[name]) for name in ratios}
    for title, name in {"Loss: the mean": "loss", "Both: the mean": "both"}.items():
        yield "atari/games", title, found[name].value > 0 and includes_0(found[name])
    yield "atari/games", "Normalisation: the mean", found["normalisation"].value > 0
    yield "atari/games", "Loss, noisy minus clean", includes_0(found[games.NOISY_LOSS])
    cost = [found["noise, PPO"].high < 0, found["noise, SPPO"].high < 0]
    yield "atari/games", "Flips cost PPO and SPPO", all(cost)
    steps = crazyclimber.steps(TRAINING)
    yield "atari/crazyclimber", "Normalisation's interval", steps["normalisation"].low > 0
    yield "atari/crazyclimber", "The loss's interval", includes_0(steps["loss"])
    yield "atari/crazyclimber", "The interval of both", steps["both"].low > 0
    scores = read("atari/breakout").query("seed == 10002 and noise == 'flip 0.1'")
    last = scores[scores["measure"] == LAST].set_index("method")["score"]
    yield "atari/breakout", "Flipped, seed 10002: PPO with unb", last.idxmin() == "ppo-corrected"
    yield "atari/breakout", "Flipped, seed 10002: PPO with light", last.idxmax() != "ppo-coef"
    small = {x for x, p in corrected_suite("atari/breakout").items() if p < 0.05}
    flipped = [methods for _, _, rewards, methods in small if rewards == "flip 0.1"]
    only = all("ppo-corrected" in methods for methods in flipped)
    yield "atari/breakout", "Flipped: only differences", only

    cells = cells_of(read("text/sums"))
    clean, flipped = cells["toy", "clean"], cells["toy", "flip 0.2"]
    both = [difference(cell["sppo"], cell["ppo"]) for cell in (clean, flipped)]
    yield "text/sums", "SPPO minus PPO includes 0", all(map(includes_0, both))
    costs = [clean[method].mean() - flipped[method].mean() for method in ("ppo", "sppo")]
    yield "text/sums", "Flips cost both", min(costs) > 0.02 and max(costs) < 0.2
