"""Tables of this folder's page, but for those of games.py and crazyclimber.py."""

from analysis.compare import cells_of
from analysis.measures import LAST, TRAINING
from analysis.tables import markdown
from results.common import MEASURES, minus_text, read, score_text


def breakout():
    cells = cells_of(read("atari/breakout"))
    rows = []
    for noise, rewards in {"clean": "clean", "flip 0.1": "flipped"}.items():
        cell = cells["Breakout", noise]
        ppo, sppo = cell["ppo"], cell["sppo"]
        rows.append([rewards, score_text(ppo, 1), score_text(sppo, 1), minus_text(sppo, ppo, 1)])
    unbiased = cells["Breakout", "flip 0.1"]["ppo-corrected"]
    rows[0].append("")
    rows[1].append(score_text(unbiased, 1))
    header = ["rewards", "PPO", "SPPO", "SPPO minus PPO", "PPO, unbiased rewards"]
    return markdown(header, rows)


def epsilon():
    rows = []
    for measure in [LAST, TRAINING]:
        cell = cells_of(read("atari/epsilon"), measure)["Breakout", "clean"]
        a2c, sa2c = cell["a2c"], cell["sa2c"]
        scores = [score_text(a2c, 1), score_text(sa2c, 1), minus_text(sa2c, a2c, 1)]
        rows.append([MEASURES[measure], *scores])
    return markdown(["measure", "A2C", "SA2C", "SA2C minus A2C"], rows)
