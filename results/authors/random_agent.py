"""A random agent's games of Atari, and the runs' evaluations beside its score.

python results/authors/random_agent.py    # plays the games again if random.csv is not there
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

HERE = Path(__file__).parent
PLAYED = HERE / "random.csv"
GAMES = ["WizardOfWor", "Breakout", "Pong", "CrazyClimber"]
METHODS = {"ppo": "PPO", "dppo": "DPPO", "sppo": "SPPO"}
COLORS = {"ppo": "tab:orange", "dppo": "tab:green", "sppo": "tab:blue"}  # as in report.py


def play(game, num_games=40, seed=1):
    """Raw scores and steps of whole games, as in an evaluation, but with uniform actions."""
    sys.path.append(str(HERE.parents[1]))
    from sppo_atari import Args, AtariGames

    rng = np.random.default_rng(seed)
    games = AtariGames(Args(env_id=game, device="cpu"), num_games)
    games.reset(seed)
    results = {}
    while len(results) < num_games:
        games.step(rng.integers(games.num_actions, size=num_games))
        results = games.ended | results  # the first game of each
    rows = [(game, *results[i]) for i in range(num_games)]
    return pd.DataFrame(rows, columns=["game", "score", "steps"])


def draw_band(ax, x, mean, error, color, label):
    ax.plot(x, mean, color=color, label=label)
    ax.fill_between(x, mean - error, mean + error, color=color, alpha=0.2)


def draw(random_mean, random_error):
    """Mean and, shaded, standard error: over seeds, for the random agent over games."""
    runs = pd.read_csv(HERE / "runs.csv.gz")[["run_name", "env_id", "exp_name"]]
    points = runs.merge(pd.read_csv(HERE / "progress.csv.gz"))
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for ax, (task, of_task) in zip(axes, points.groupby("env_id")):
        for method, of_method in of_task.groupby("exp_name"):
            returns = of_method.groupby("step")["return_mean"].agg(["mean", "sem"])
            x = returns.index / 1e6
            draw_band(ax, x, returns["mean"], returns["sem"], COLORS[method], METHODS[method])
        if task == "WizardOfWor":
            draw_band(ax, x[[0, -1]], random_mean, random_error, "black", "random agent")
        ax.set_title(task)
        ax.set_xlabel("million steps")
        ax.legend()
    axes[0].set_ylabel("return of evaluations")
    figure.savefig(HERE / "evaluations.png", dpi=160)


if __name__ == "__main__":
    plt.switch_backend("agg")
    if not PLAYED.exists():
        pd.concat(map(play, GAMES)).to_csv(PLAYED, index=False)
    played = pd.read_csv(PLAYED).groupby("game")["score"].agg(["mean", "sem", "count"])
    print(played)
    wizard = played.loc["WizardOfWor"]
    draw(np.full(2, wizard["mean"]), wizard["sem"])
