"""How SPPO and two kinds of PPO differ on Atari games: tables, figure, what speaks to claims 5 and
7, predictions.

python -m results.atari.games

The unit is the game. Each gives one log ratio of two methods' scores, which are means over seeds.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from analysis.measures import FIVE, LAST, TRAINING
from analysis.tables import markdown
from results.common import holm, mean, percent_text, read
from results.comparisons import LOG_RATIO, Comparison, includes_0

HERE = Path(__file__).parent
MEASURES = {
    FIVE: "mean of five evaluations",
    TRAINING: "training",
    LAST: "last evaluation",
}
CONTRASTS = {  # (method, noise), and what it is divided by
    "loss": (("sppo", "clean"), ("ppo", "clean")),
    "normalisation": (("ppo", "clean"), ("ppo-authors", "clean")),
    "both": (("sppo", "clean"), ("ppo-authors", "clean")),
    "loss, flipped": (("sppo", "flip 0.1"), ("ppo", "flip 0.1")),
    "noise, PPO": (("ppo", "flip 0.1"), ("ppo", "clean")),
    "noise, SPPO": (("sppo", "flip 0.1"), ("sppo", "clean")),
}
NOISY_LOSS = "loss, noisy minus clean"
COLUMNS = {
    ("ppo-authors", "clean"): "PPO, not normalised",
    ("ppo", "clean"): "PPO",
    ("sppo", "clean"): "SPPO",
    ("ppo", "flip 0.1"): "PPO, flipped",
    ("sppo", "flip 0.1"): "SPPO, flipped",
}
# Games, as registered
TESTED = {"loss": 18, "normalisation": 8, "both": 8, NOISY_LOSS: 10}


# ---- Scores


def random_scores():
    return pd.read_csv(HERE / "random.csv").groupby("game")["score"].mean()


def scores_of(measure):
    """Means over seeds: games down, methods and noises across. As registered, a score below a tenth
    of a random agent's counts as that, so logarithms exist."""
    runs = read("atari/games").pivot(
        index=["task", "seed"], columns=["measure", "method", "noise"], values="score"
    )
    missing = runs[FIVE].isna().groupby("task").mean()
    assert missing.isin([0, 1]).all(axis=None), "a game that is not whole"
    of_random = random_scores()[runs.index.get_level_values("task")].to_numpy()
    return runs[measure].clip(lower=of_random / 10, axis=0).groupby("task").mean()


def log_ratios(scores):
    """Log ratios (games x contrasts); NaN where a game lacks a method."""
    ratios = {name: np.log(scores[a] / scores[b]) for name, (a, b) in CONTRASTS.items()}
    ratios[NOISY_LOSS] = ratios["loss, flipped"] - ratios["loss"]
    return pd.DataFrame(ratios)


def mean_over_games(ratios):
    return mean(ratios.dropna().to_numpy())


# ---- Tables


def registered_tests(ratios):
    """p-values by t of the contrasts in TESTED, corrected by Holm's method."""
    assert ratios[list(TESTED)].count().to_dict() == TESTED
    p = np.array([mean_over_games(ratios[name]).p for name in TESTED])
    return pd.Series(holm(p), index=list(TESTED))


def table_of(contrasts):
    """Mean log ratios over games, by t, as percentages; of the first row the registered tests."""
    rows = []
    for measure, title in MEASURES.items():
        ratios = log_ratios(scores_of(measure))
        rows.append([title, *(percent_text(mean_over_games(ratios[name])) for name in contrasts)])
    p = registered_tests(log_ratios(scores_of(FIVE))).reindex(contrasts)
    rows.append(["p by Holm, first row", *("" if np.isnan(x) else f"{x:.2f}" for x in p)])
    return markdown(["", *contrasts], rows)


def measures():
    return table_of(["loss", "normalisation", "both"])


def noise():
    return table_of(["loss, flipped", "noise, PPO", "noise, SPPO", NOISY_LOSS])


def games():
    """Primary scores, and a random agent's."""
    scores = scores_of(FIVE)[list(COLUMNS)]
    rows = []
    for game, numbers in scores.iterrows():
        row = [game]
        for number in [random_scores()[game], *numbers]:
            places = 0 if number > 99 else 1
            row.append("" if np.isnan(number) else f"{number:,.{places}f}")
        rows.append(row)
    return markdown(["game", "random agent", *COLUMNS.values()], rows)


# ---- Claims and predictions


def comparisons():
    page = "atari/README.md#eighteen-games-one-seed"
    ratios = log_ratios(scores_of(FIVE))
    p = registered_tests(ratios)
    titles = {
        "loss": "SPPO against PPO, eighteen games, 500,000 steps, interval over games",
        "both": "eight games, to PPO without normalised advantages",
        "loss, flipped": "SPPO against PPO, ten games, 500,000 steps",
        NOISY_LOSS: "ten games, noisy minus clean",
    }
    for name, title in titles.items():
        claim = "5" if name in ["loss", "both"] else "7"
        options = {"unit": LOG_RATIO, "measure": MEASURES[FIVE], "matters": 0.095}
        options |= {"tasks": ratios[name].count(), "corrected": p.get(name, np.nan)}
        options["direct"] = name in ["loss", "loss, flipped"]
        yield Comparison(claim, title, page, mean_over_games(ratios[name]), 1, **options)


def predictions():
    ratios = log_ratios(scores_of(FIVE))
    found = {name: mean_over_games(ratios[name]) for name in ratios}
    return {
        "games-loss": found["loss"].value > 0 and includes_0(found["loss"]),
        "games-normalisation": found["normalisation"].value > 0,
        "games-both": found["both"].value > 0 and includes_0(found["both"]),
        "games-noisy-loss": includes_0(found[NOISY_LOSS]),
        "games-noise": found["noise, PPO"].high < 0 and found["noise, SPPO"].high < 0,
    }


# ---- Figure


def draw():
    """A row per game: log ratios, the paper's beside ours; below, means over games. A game is at
    random if PPO and SPPO, by their geometric mean, do not exceed a random agent by a fifth."""
    scores = scores_of(FIVE)
    ratios = log_ratios(scores)
    quoted = pd.read_csv(HERE / "quoted.csv", index_col="game")
    paper = np.log(quoted["sppo"] / quoted["ppo"])
    points = {
        "loss: SPPO to PPO": (ratios["loss"], "o", "tab:blue"),
        "both: SPPO to PPO, not normalised": (ratios["both"], "s", "tab:green"),
        "both, quoted: the paper's SPPO to its PPO": (paper, "X", "black"),
        "loss, flipped: SPPO to PPO": (ratios["loss, flipped"], "D", "tab:orange"),
    }
    order = ratios["loss"].sort_values().index
    y = np.arange(len(order))
    size = (7, 2 + 0.3 * (len(order) + len(points)))
    figure, ax = plt.subplots(figsize=size, layout="constrained")
    ax.axvline(0, color="gray", linewidth=0.8)
    ax.axvline(0.095, color="gray", linewidth=0.8, linestyle=":")
    ax.axhline(-1, color="lightgray", linewidth=0.8)
    for row, (label, (values, marker, color)) in enumerate(points.items()):
        ax.plot(values.reindex(order), y + 0.12 - 0.12 * row, marker, color=color, label=label)
        found = mean_over_games(values)
        ax.errorbar(found.value, -2 - row, xerr=found.half_width(), fmt=marker, color=color)
    clean = np.sqrt(scores["ppo", "clean"] * scores["sppo", "clean"])
    learned = clean >= 1.2 * random_scores()[clean.index]
    labels = [game if learned[game] else f"{game} (at random)" for game in order]
    means = [f"{x.split(':')[0]}, {points[x][0].count()} games" for x in points]
    ax.set_yticks([*y, *(-2 - np.arange(len(points)))], [*labels, *means])
    ax.set_xlabel("log ratio of scores (dotted: a tenth more)")
    figure.legend(loc="outside upper center", ncols=2)
    figure.savefig(HERE / "games.png", dpi=160)


if __name__ == "__main__":
    plt.switch_backend("agg")
    print(measures(), noise(), games(), sep="\n\n")
    draw()
