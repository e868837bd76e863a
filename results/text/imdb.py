"""Film reviews: k = 0.9, and k = 20.5 (the pack imdb-k20.5)."""

from analysis.measures import LAST
from analysis.tables import markdown
from results.common import cell_text, cells, score_table, title_of
from results.verdicts import REWARD, in_points

PAGE = "text/README.md#film-reviews"
NOISES = {"clean": "clean", "flip 0.2": "flipped"}
LOSS = ("sppo", "ppo")
SMALL = ("sppo-small", "ppo-small")
EPSILON = ("sppo-eps", "ppo-eps")


def imdb():
    found = cells("text/imdb")
    rows = {rewards: found["imdb", noise] for noise, rewards in NOISES.items()}
    rows["clean, small"] = {x: found["imdb", "clean"][f"{x}-small"] for x in LOSS}
    return score_table("rewards", rows, ["ppo", "sppo", LOSS], places=3)


def imdb_k20_5():
    place = ("imdb", "flip 0.2")
    of_reward, of_perplexity = (
        cells("text/imdb-k20.5", measure)[place] for measure in [LAST, "perplexity_real"]
    )
    rows = []
    for x in ["ppo", "sppo", LOSS, "ppo-eps", "ppo-ce-eps", "sppo-eps", EPSILON]:
        rows.append([title_of(x), cell_text(of_reward, x, 3), cell_text(of_perplexity, x, 1)])
    return markdown(["method", "reward", "perplexity_real"], rows)


def comparisons():
    for claim, name, pack, noise, pair in [
        ("10", "20 updates, clean, k = 0.9", "text/imdb", "clean", LOSS),
        ("10", "flipped", "text/imdb", "flip 0.2", LOSS),
        ("10", "flipped, k = 20.5", "text/imdb-k20.5", "flip 0.2", LOSS),
        ("10", "flipped, k = 20.5, epsilon 1e-8", "text/imdb-k20.5", "flip 0.2", EPSILON),
        ("11", "1.5 million parameters", "text/imdb", "clean", SMALL),
    ]:
        place = ("imdb", noise)
        name = f"SPPO minus PPO, IMDB, {name}"
        yield in_points(claim, name, PAGE, pack, place, pair, unit=REWARD)
