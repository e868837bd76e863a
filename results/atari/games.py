"""How SPPO and two kinds of PPO differ on Atari games; and WizardOfWor, the authors' own.

The unit is the game. Each gives one log ratio of two methods' scores, which are means over seeds.
"""

import numpy as np
import pandas as pd

from analysis.measures import FIVE, LAST, TRAINING
from analysis.tables import markdown
from results.common import RESULTS, draw_rows, holm, mean, percent_text, read
from results.verdicts import LOG_RATIO, Comparison, in_points

PAGE = "atari/README.md#eighteen-games-one-seed"
MEASURES = {
    FIVE: "mean of five evaluations",
    TRAINING: "training",
    LAST: "last evaluation",
}
COLUMNS = {  # (method, noise)
    "PPO, not normalised": ("ppo-authors", "clean"),
    "PPO": ("ppo", "clean"),
    "SPPO": ("sppo", "clean"),
    "PPO, flipped": ("ppo", "flip 0.1"),
    "SPPO, flipped": ("sppo", "flip 0.1"),
}
CONTRASTS = {  # a column, and what it is divided by
    "loss": ("SPPO", "PPO"),
    "normalisation": ("PPO", "PPO, not normalised"),
    "both": ("SPPO", "PPO, not normalised"),
    "loss, flipped": ("SPPO, flipped", "PPO, flipped"),
    "noise, PPO": ("PPO, flipped", "PPO"),
    "noise, SPPO": ("SPPO, flipped", "SPPO"),
}
NOISY_LOSS = "loss, noisy minus clean"
TESTED = ["loss", "normalisation", "both", NOISY_LOSS]


def random_scores():
    return pd.read_csv(RESULTS / "atari/random.csv").groupby("game")["score"].mean()


def scores_of(measure):
    """Means over seeds: games down, COLUMNS across. As registered, a score below a tenth of a
    random agent's counts as that, so logarithms exist."""
    runs = read("atari/games").query("measure == @measure")
    least = runs["task"].map(random_scores()) / 10
    runs = runs.assign(score=runs["score"].clip(lower=least))
    means = runs.pivot_table(index="task", columns=["method", "noise"], values="score")
    return pd.DataFrame({title: means[column] for title, column in COLUMNS.items()})


def log_ratios(measure):
    """Of games and contrasts; NaN where a game lacks a method."""
    scores = scores_of(measure)
    ratios = {name: np.log(scores[a] / scores[b]) for name, (a, b) in CONTRASTS.items()}
    ratios[NOISY_LOSS] = ratios["loss, flipped"] - ratios["loss"]
    return pd.DataFrame(ratios)


def means_of(measure):
    """{contrast: mean over games}"""
    return {name: mean(x.dropna().to_numpy()) for name, x in log_ratios(measure).items()}


def registered_p():
    """By Holm's method."""
    found = means_of(FIVE)
    return dict(zip(TESTED, holm([found[name].p for name in TESTED])))


def table_of(contrasts):
    """Mean log ratios over games, as percentages; of the first row the registered tests."""
    rows = []
    for measure, title in MEASURES.items():
        found = means_of(measure)
        rows.append([title, *(percent_text(found[name]) for name in contrasts)])
    p = registered_p()
    last = ["p by Holm, first row", *(f"{p[x]:.2f}" if x in p else "" for x in contrasts)]
    return markdown(["", *contrasts], [*rows, last])


def measures():
    return table_of(["loss", "normalisation", "both"])


def noise():
    return table_of(["loss, flipped", "noise, PPO", "noise, SPPO", NOISY_LOSS])


def number_text(number):
    if np.isnan(number):
        return ""
    return f"{number:,.0f}" if number > 99 else f"{number:,.1f}"


def games():
    """Primary scores, and a random agent's."""
    scores = scores_of(FIVE)
    scores.insert(0, "random agent", random_scores())
    rows = scores.map(number_text).reset_index().to_numpy()
    return markdown(["game", *scores], rows)


def comparisons():
    titles = {
        "loss": "SPPO against PPO, eighteen games, 500,000 steps, interval over games",
        "both": "eight games, to PPO without normalised advantages",
        "loss, flipped": "SPPO against PPO, ten games, 500,000 steps",
        NOISY_LOSS: "ten games, noisy minus clean",
    }
    ratios = log_ratios(FIVE)
    for name, title in titles.items():
        claim = "5" if name in ["loss", "both"] else "7"
        options = {"unit": LOG_RATIO, "measure": MEASURES[FIVE], "matters": 0.095}
        options |= {"tasks": ratios[name].count(), "p": registered_p().get(name, np.nan)}
        options["beside"] = name in ["both", NOISY_LOSS]
        yield Comparison(claim, title, PAGE, means_of(FIVE)[name], seeds=1, **options)
    place = ("WizardOfWor", "flip 0.1")
    name = "WizardOfWor, the authors' own game"
    yield in_points("7", name, PAGE, "atari/wizardofwor", place, ("sppo", "ppo"))


def draw():
    """A row per game: log ratios, the paper's beside ours; below, means over games. A game is at
    random if PPO and SPPO, by their geometric mean, do not exceed a random agent by a fifth."""
    scores = scores_of(FIVE)
    quoted = pd.read_csv(RESULTS / "atari/quoted.csv", index_col="game")
    ratios = log_ratios(FIVE).assign(quoted=np.log(quoted["sppo"] / quoted["ppo"]))
    order = ratios["loss"].sort_values(ascending=False).index
    learned = np.sqrt(scores["PPO"] * scores["SPPO"]) >= 1.2 * random_scores()[scores.index]
    ticks = {x if learned[x] else f"{x} (at random)": y for y, x in enumerate(order)}
    series = []
    for i, (name, label, marker, color) in enumerate(
        [
            ("loss", "loss: SPPO to PPO", "o", "tab:blue"),
            ("both", "both: SPPO to PPO, not normalised", "s", "tab:green"),
            ("quoted", "both, quoted: the paper's SPPO to its PPO", "X", "black"),
            ("loss, flipped", "loss, flipped: SPPO to PPO", "D", "tab:orange"),
        ]
    ):
        style = {"marker": marker, "color": color}
        y = np.arange(len(order)) + 0.12 * (i - 1)
        series.append((y, ratios[name][order], None, style | {"label": label}))
        found = mean(ratios[name].dropna().to_numpy())
        y = len(order) + 1 + i
        series.append((y, found.value, found.half_width(), style))
        ticks[f"{label.partition(':')[0]}, {ratios[name].count()} games"] = y
    draw_rows(RESULTS / "atari/games.png", ticks, series, 0.095, "log ratio of scores")
