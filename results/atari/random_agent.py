"""A random agent's games of Atari.

python -m results.atari.random_agent    # plays the games that random.csv lacks
"""

from pathlib import Path

import numpy as np
import pandas as pd

from sppo_atari import Args, AtariGames

HERE = Path(__file__).parent
PLAYED = HERE / "random.csv"
GAMES = """\
WizardOfWor Breakout Pong CrazyClimber Alien Centipede Gravitar MsPacman NameThisGame Qbert UpNDown
Gopher StarGunner VideoPinball Assault Asterix BeamRider DemonAttack RoadRunner""".split()


def play(game, num_games=40, seed=1):
    """Raw scores and steps of whole games, as in an evaluation, but with uniform actions."""
    rng = np.random.default_rng(seed)
    games = AtariGames(Args(env_id=game, device="cpu"), num_games)
    games.reset(seed)
    results = {}
    while len(results) < num_games:
        *_, ended = games.step(rng.integers(games.num_actions, size=num_games))
        results = ended | results  # the first game of each
    rows = [(game, *results[i]) for i in range(num_games)]
    return pd.DataFrame(rows, columns=["game", "score", "steps"])


if __name__ == "__main__":
    for game in GAMES:
        if not PLAYED.exists():
            play(game).to_csv(PLAYED, index=False)
        elif game not in set(pd.read_csv(PLAYED)["game"]):
            play(game).to_csv(PLAYED, mode="a", header=False, index=False)
    print(pd.read_csv(PLAYED).groupby("game")["score"].agg(["mean", "sem", "count"]))
