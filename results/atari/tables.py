"""Breakout, WizardOfWor, and SA2C on Breakout (epsilon): tables, what speaks to claims 5 to 7,
predictions. games.py and crazyclimber.py have the rest of this folder's page."""

from analysis.compare import cells_of
from analysis.measures import LAST, TRAINING
from analysis.tables import markdown
from results.common import (
    MEASURES,
    corrected_suite,
    minus_text,
    pair_texts,
    read,
    score_text,
)
from results.comparisons import in_points

ONLY_FLIPPED = {
    "ppo-corrected": "PPO, unbiased rewards",
    "ppo-coef": "PPO, weights / k",
    "sppo-p": "our variant",
}


def breakout():
    cells = cells_of(read("atari/breakout"))
    clean, flipped = cells["Breakout", "clean"], cells["Breakout", "flip 0.1"]
    others = [score_text(flipped[method], 1) for method in ONLY_FLIPPED]
    rows = [
        ["clean", *pair_texts(clean["ppo"], clean["sppo"], 1), *[""] * len(others)],
        ["flipped", *pair_texts(flipped["ppo"], flipped["sppo"], 1), *others],
    ]
    header = ["rewards", "PPO", "SPPO", "SPPO minus PPO", *ONLY_FLIPPED.values()]
    return markdown(header, rows)


def epsilon():
    rows = []
    for measure in [LAST, TRAINING]:
        cell = cells_of(read("atari/epsilon"), measure)["Breakout", "clean"]
        half = minus_text(cell["sa2c"], cell["a2c-half"], 1)
        rows.append([MEASURES[measure], *pair_texts(cell["a2c"], cell["sa2c"], 1), half])
    header = ["measure", "A2C", "SA2C", "SA2C minus A2C", "SA2C minus A2C with alpha 0.5"]
    return markdown(header, rows)


def comparisons():
    ppo = ("sppo", "ppo")
    page = "atari/README.md#breakout-three-seeds"
    for claim, noise in {"5": "clean", "7": "flip 0.1"}.items():
        place = ("Breakout", noise)
        yield in_points(claim, "Breakout", page, "atari/breakout", place, ppo)
    name = "WizardOfWor, the authors' own game"
    page = "atari/README.md#eighteen-games-one-seed"
    yield in_points("7", name, page, "atari/wizardofwor", ("WizardOfWor", "flip 0.1"), ppo)
    page = "atari/README.md#sa2c-breakout-three-seeds"
    a2c = ("sa2c", "a2c")
    place = ("Breakout", "clean")
    yield in_points("6", "Breakout, a million steps", page, "atari/epsilon", place, a2c)
    yield in_points("6", "Breakout", page, "atari/epsilon", place, a2c, TRAINING, direct=False)


def predictions():
    """Of Breakout."""
    chosen = read("atari/breakout").query("seed == 10002 and noise == 'flip 0.1'")
    last = chosen[chosen["measure"] == LAST].set_index("method")["score"]
    p_of_others = []
    for (_, _, noise, pair), p in corrected_suite("atari/breakout").items():
        if noise == "flip 0.1" and "ppo-corrected" not in pair:
            p_of_others.append(p)
    return {
        "breakout-unbiased": last.idxmin() == "ppo-corrected",
        "breakout-lighter": last.idxmax() != "ppo-coef",
        "breakout-others": min(p_of_others) >= 0.05,
    }
