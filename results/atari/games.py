"""Tables and figure of the Atari games, a row each: how SPPO, PPO and the authors' PPO differ.

python results/atari/games.py

The unit is the game. Each gives one log ratio of two methods' scores, which are means over seeds.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from scipy import stats

sys.path.append(str(Path(__file__).parents[1]))
from common import detected, estimate, in_percent, paired, print_table

HERE = Path(__file__).parent
MEASURES = {
    "evaluations": "mean of five evaluations",
    "training": "training",
    "last": "last evaluation",
    "above_random": "mean of five, minus a random agent's",
}
CONTRASTS = {  # (method, kind of rewards), and what it is divided by
    "loss": (("sppo", "none"), ("ppo", "none")),
    "normalisation": (("ppo", "none"), ("ppo-authors", "none")),
    "both": (("sppo", "none"), ("ppo-authors", "none")),
    "loss, flipped": (("sppo", "flip"), ("ppo", "flip")),
    "noise, PPO": (("ppo", "flip"), ("ppo", "none")),
    "noise, SPPO": (("sppo", "flip"), ("sppo", "none")),
}
METHODS = {"ppo-authors": "the authors' PPO", "ppo": "PPO", "sppo": "SPPO"}
REWARDS = {"none": "", "flip": ", flipped"}
NOISY_LOSS = "loss, noisy minus clean"
# Games, as registered
TESTED = {"loss": 18, "normalisation": 8, "both": 8, NOISY_LOSS: 10}


def quoted_scores():
    return pd.read_csv(HERE / "quoted.csv", index_col="game")


def random_scores():
    return pd.read_csv(HERE / "random.csv").groupby("game")["score"].mean()


def read_scores(folder=HERE):
    """Means over seeds (games x methods and rewards) of each measure."""
    runs = pd.read_csv(folder / "games-runs.csv.gz").query("finished")
    progress = pd.read_csv(folder / "games-progress.csv.gz")
    evaluations = runs["run_name"].map(progress.groupby("run_name")["return_mean"].apply(list))
    assert set(evaluations.map(len)) == {5}
    seeds = runs.sort_values("seed").groupby(["env_id", "exp_name", "noise"])["seed"].apply(tuple)
    games = seeds.groupby("env_id").agg(["size", "nunique"])
    methods = np.where(games.index.isin(quoted_scores().index), 3, 4)  # and kinds of rewards
    whole = (games["size"] == methods) & (games["nunique"] == 1)
    assert whole.all(), f"games that are not whole: {games.index[~whole].tolist()}"
    runs["evaluations"] = evaluations.map(np.mean)
    runs["last"] = runs["return_mean"]
    runs["random"] = runs["env_id"].map(random_scores())
    assert runs["random"].notna().all(), "first play the other games: random_agent.py"
    runs["above_random"] = runs["evaluations"] - runs["random"]
    # As registered, a score below a tenth of a random agent's counts as that, so logarithms exist
    for measure in MEASURES:
        runs[measure] = np.maximum(runs[measure], runs["random"] / 10)
    cells = runs.groupby(["env_id", "exp_name", "noise"])[list(MEASURES)].mean()
    return {measure: cells[measure].unstack(["exp_name", "noise"]) for measure in MEASURES}


def is_learned(scores):
    """Whether PPO and SPPO, by their geometric mean on clean rewards, exceed a random agent by a
    fifth: a value for each game."""
    clean = np.sqrt(scores["ppo", "none"] * scores["sppo", "none"])
    return clean >= 1.2 * random_scores()[clean.index]


def log_ratios(scores):
    """Log ratios (games x contrasts); NaN where a game lacks a method."""
    ratios = {name: np.log(scores[a] / scores[b]) for name, (a, b) in CONTRASTS.items()}
    ratios[NOISY_LOSS] = ratios["loss, flipped"] - ratios["loss"]
    return pd.DataFrame(ratios)


def holm(p):
    """p-values (tests,), corrected by Holm's method."""
    p = np.asarray(p)
    order = np.argsort(p)
    factors = np.arange(len(p), 0, -1)
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(1, np.maximum.accumulate(p[order] * factors))
    return corrected


def in_share(holds):
    """For how many games it holds, with Clopper and Pearson's interval for their share."""
    low, high = stats.binomtest(holds.sum(), holds.count()).proportion_ci()
    return f"{holds.sum()} of {holds.count()} ({100 * low:.0f} to {100 * high:.0f} %)"


def registered_tests(ratios):
    """p-values: a row for each contrast in TESTED, a column for each kind."""
    values = {name: ratios[name].dropna() for name in TESTED}
    assert {name: len(x) for name, x in values.items()} == TESTED
    tests = pd.DataFrame(index=list(TESTED))
    tests["p, by t"] = [paired(x)[3] for x in values.values()]
    tests["p, by Holm"] = holm(tests["p, by t"])
    tests["p, by Wilcoxon"] = [stats.wilcoxon(x).pvalue for x in values.values()]
    return tests


def print_measures(folder=HERE, contrasts=("loss", "normalisation", "both")):
    """Mean log ratios over games, by t; of the first row the registered tests."""
    rows = {}
    for measure, scores in read_scores(folder).items():
        ratios = log_ratios(scores)
        parts = {MEASURES[measure]: ratios}
        if measure == "evaluations":
            primary = ratios
            if "both" in contrasts:  # of CrazyClimber the gain was known; it ran on clean rewards
                parts["the same, without CrazyClimber"] = ratios.drop("CrazyClimber")
            parts["the same, learned games"] = ratios[is_learned(scores)]
        for title, part in parts.items():
            rows[title] = [estimate(*paired(part[name].dropna())[:3]) for name in contrasts]
    values = [primary[name].dropna() for name in contrasts]
    without = [(x.sum() - x) / (len(x) - 1) for x in values]
    rows["mean without any one game"] = [f"{x.min():.2f} to {x.max():.2f}" for x in without]
    rows["games above 0 in the first row"] = [in_share(x > 0) for x in values]
    rows["could detect"] = [f"{detected(x.sem(), len(x) - 1):.2f}" for x in values]
    for title, p in registered_tests(primary).reindex(contrasts).items():
        rows[title] = [f"{x:.3f}".replace("nan", "") for x in p]
    print_table(rows, "log ratio", *contrasts)


def print_noise(folder=HERE):
    """The same of flipped rewards."""
    print_measures(folder, ("loss, flipped", "noise, PPO", "noise, SPPO", NOISY_LOSS))


def print_percent(folder=HERE):
    """The loss's mean log ratios, as gains in percent."""
    ratios = log_ratios(read_scores(folder)["evaluations"])
    for name in ("loss", "loss, flipped"):
        gain = np.expm1(paired(ratios[name].dropna())[:3])
        print(f"{name}: {in_percent(*gain)}")


def print_games(folder=HERE):
    """Primary scores, and a random agent's."""
    scores = read_scores(folder)["evaluations"]
    names = {(a, b): METHODS[a] + REWARDS[b] for b in REWARDS for a in METHODS if (a, b) in scores}
    scores = scores[list(names)].set_axis([*names.values()], axis="columns")
    scores.insert(0, "random agent", random_scores())
    texts = scores.map(lambda x: f"{x:,.{0 if x > 99 else 1}f}").replace("nan", "")
    print_table(dict(zip(texts.index, texts.to_numpy())), "game", *texts)


def draw(folder=HERE):
    """A row per game: log ratios, the paper's beside ours; below, means over games."""
    scores = read_scores(folder)["evaluations"]
    ratios = log_ratios(scores)
    quoted = quoted_scores()
    paper = np.log(quoted["sppo"] / quoted["ppo"])
    points = {
        "loss: SPPO to PPO": (ratios["loss"], "o", "tab:blue"),
        "both: SPPO to the authors' PPO": (ratios["both"], "s", "tab:green"),
        "both, quoted: the paper's SPPO to its PPO": (paper, "X", "black"),
        "loss, flipped: SPPO to PPO": (ratios["loss, flipped"], "D", "tab:orange"),
    }
    order = ratios["loss"].sort_values().index
    at_random = ~is_learned(scores)
    y = np.arange(len(order))
    size = (7, 2 + 0.3 * (len(order) + len(points)))
    figure, ax = plt.subplots(figsize=size, layout="constrained")
    ax.axvline(0, color="gray", linewidth=0.8)
    ax.axvline(0.095, color="gray", linewidth=0.8, linestyle=":")
    ax.axhline(-1, color="lightgray", linewidth=0.8)
    for row, (label, (values, marker, color)) in enumerate(points.items()):
        ax.plot(values.reindex(order), y + 0.12 - 0.12 * row, marker, color=color, label=label)
        mean, low, high, _ = paired(values.dropna())
        ax.errorbar(mean, -2 - row, xerr=[[mean - low], [high - mean]], fmt=marker, color=color)
    games = [f"{game} (at random)" if at_random[game] else game for game in order]
    means = [f"{x.split(':')[0]}, {points[x][0].count()} games" for x in points]
    ax.set_yticks([*y, *(-2 - np.arange(len(points)))], [*games, *means])
    ax.set_xlabel("log ratio of scores (dotted: a tenth more)")
    figure.legend(loc="outside upper center", ncols=2)
    figure.savefig(folder / "games.png", dpi=160)


if __name__ == "__main__":
    plt.switch_backend("agg")
    print_measures()
    print()
    print_noise()
    print()
    print_percent()
    print()
    print_games()
    draw()
