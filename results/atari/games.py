"""Tables and figure of the Atari games, a row each: how SPPO, PPO and the authors' PPO differ.

python results/atari/games.py

The unit is the game. Each gives one log ratio of two methods' scores, which are means over seeds.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from scipy import stats

HERE = Path(__file__).parent
MEASURES = {
    "evaluations": "mean of five evaluations",
    "training": "training",
    "last": "last evaluation",
    "above_random": "mean of five evaluations, minus a random agent's score",
}
CONTRASTS = {  # (method, kind of rewards), and what it is divided by
    "loss": (("sppo", "none"), ("ppo", "none")),
    "normalisation": (("ppo", "none"), ("ppo-authors", "none")),
    "both": (("sppo", "none"), ("ppo-authors", "none")),
}
NOISE = {
    "noise, PPO": (("ppo", "flip"), ("ppo", "none")),
    "noise, SPPO": (("sppo", "flip"), ("sppo", "none")),
}
TESTED = [*CONTRASTS, "loss, noisy minus clean"]  # those that Holm's correction is over


def read_scores(folder=HERE):
    """Means over seeds (games x methods and rewards) of each measure."""
    runs = pd.read_csv(folder / "games-runs.csv.gz").query("finished")
    progress = pd.read_csv(folder / "games-progress.csv.gz")
    runs["evaluations"] = runs["run_name"].map(progress.groupby("run_name")["return_mean"].mean())
    runs["last"] = runs["return_mean"]
    games = pd.read_csv(HERE / "random.csv").groupby("game")
    runs["random"] = runs["env_id"].map(games["score"].mean())
    runs["above_random"] = runs["evaluations"] - runs["random"]
    # As registered, a score below a tenth of a random agent's counts as that, so logarithms exist
    for measure in MEASURES:
        runs[measure] = np.maximum(runs[measure], runs["random"] / 10)
    cells = runs.groupby(["env_id", "exp_name", "noise"])[list(MEASURES)].mean()
    return {measure: cells[measure].unstack(["exp_name", "noise"]) for measure in MEASURES}


def log_ratios(scores):
    """Log ratios (games x contrasts); NaN where a game lacks a method."""
    pairs = CONTRASTS | NOISE
    ratios = pd.DataFrame({name: np.log(scores[a] / scores[b]) for name, (a, b) in pairs.items()})
    ratios["loss, noisy minus clean"] = ratios["noise, SPPO"] - ratios["noise, PPO"]
    return ratios


def estimate(ratios):
    """Mean over games of log ratios, 95 % limits by t, and p."""
    values = ratios.dropna()
    test = stats.ttest_1samp(values, 0)
    return values.mean(), *test.confidence_interval(), test.pvalue


def holm(p):
    """p-values (tests,), corrected by Holm's method."""
    p = np.asarray(p)
    order = np.argsort(p)
    factors = np.arange(len(p), 0, -1)
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(1, np.maximum.accumulate(p[order] * factors))
    return corrected


def print_tables(scores):
    primary = log_ratios(scores["evaluations"])
    corrected = dict(zip(TESTED, holm([estimate(primary[name])[3] for name in TESTED])))
    print("| | " + " | ".join(primary) + " |\n" + "|---" * (primary.shape[1] + 1) + "|")
    for measure, title in MEASURES.items():
        ratios = log_ratios(scores[measure])
        cells = ["{:.2f} ({:.2f} to {:.2f})".format(*estimate(ratios[name])) for name in ratios]
        print(f"| {title} | {' | '.join(cells)} |")
    for name in primary:
        values = primary[name].dropna()
        *_, p = estimate(values)
        half = stats.t.ppf([0.975, 0.8], len(values) - 1).sum() * values.sem()
        wilcoxon = stats.wilcoxon(values).pvalue
        print(
            f"{name}: {len(values)} games, p {p:.4f}, by Wilcoxon {wilcoxon:.4f}, "
            f"by Holm {corrected.get(name, np.nan):.4f}; detects {half:.2f}"
        )
    new = primary["loss"].drop("CrazyClimber")
    print("loss, without CrazyClimber: {:.2f} ({:.2f} to {:.2f})".format(*estimate(new)))
    print(primary.round(2).to_string())


def draw(scores):
    """A row per game: log ratio of SPPO to PPO, clean and flipped; crosses: the paper's."""
    ratios = log_ratios(scores["evaluations"])
    flipped = ratios["loss"] + ratios["loss, noisy minus clean"]
    quoted = pd.read_csv(HERE / "quoted.csv", index_col="game")
    order = ratios["loss"].sort_values().index
    y = np.arange(len(order))
    figure, ax = plt.subplots(figsize=(7, 6), layout="constrained")
    ax.axvline(0, color="gray", linewidth=0.8)
    ax.plot(ratios["loss"][order], y, "o", color="tab:blue", label="clean rewards")
    ax.plot(flipped[order], y, "D", color="tab:orange", label="flipped rewards")
    paper = np.log(quoted["sppo"] / quoted["ppo"]).reindex(order)
    ax.plot(paper, y, "kx", label="the paper's SPPO to its PPO, from a review")
    for row, (name, values) in enumerate({"clean": ratios["loss"], "flipped": flipped}.items()):
        mean, low, high, _ = estimate(values)
        ax.errorbar(mean, -2 - row, xerr=[[mean - low], [high - mean]], marker="s", color="black")
        ax.text(low, -2 - row, f"mean, {name}  ", ha="right", va="center")
    ax.set_yticks(y, order)
    ax.set_xlabel("log ratio of scores, SPPO to PPO")
    figure.legend(loc="outside upper center")
    figure.savefig(HERE / "games.png", dpi=160)


if __name__ == "__main__":
    plt.switch_backend("agg")
    scores = read_scores()
    print_tables(scores)
    draw(scores)
