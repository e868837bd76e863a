"""Writes the tables of packed runs into the pages of these folders. Each stands below a marker, a
comment with a name in TABLES, or with the function of an analysis that prints the table: in
control/README.md `<!--k.print_measures-->` means print_measures in control/k.py.

python results/tables.py            # writes all tables anew
python results/tables.py --check    # fails if a page would change
"""

import contextlib
import io
import re
import runpy
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.append(str(Path(__file__).parent))
from common import MEASURES, RESULTS, estimate, print_table, read, short, welch

MARKED = re.compile(r"(?m)(?<=^<!--)([\w.-]+)-->\n(?:\|.*\n)+")
HOPPER, PENDULUM, LANDER = "Hopper-v4", "InvertedDoublePendulum-v4", "LunarLanderContinuous-v3"
METHODS = {  # labels on pages, where they are not the --exp-name in capitals
    "Gaussian PPO": "ppo",
    "PPO, unbiased rewards": "ppo-corrected",
    "PPO, epsilon 1e-8": "ppo-eps",
    "PPO, ce-coef / k, epsilon 1e-8": "ppo-ce-eps",
    "SPPO, epsilon 1e-8": "sppo-eps",
}
REWARDS = {"clean": ["none"], "noisy": ["normal"], "flipped": ["flip"]}


# ---- Rows and columns are {label: {column of the runs: [value]}}, the runs with this value.
# [a, b]: the runs with a minus the runs with b


def methods(*labels):
    """Rows or columns by labels such as "PPO" and "SPPO minus PPO"."""
    found = {}
    for label in labels:
        pair = label.split(" minus ")
        found[label] = {"exp_name": [METHODS.get(method, method.lower()) for method in pair]}
    return found


def rewards(*labels):
    return {label: {"noise": REWARDS[label]} for label in labels}


def tasks(*names):
    return {short(name): {"env_id": [name]} for name in names}


def both(rows, others):
    """Each of `rows` with each of `others`."""
    pairs = product(rows.items(), others.items())
    return {f"{a}, {b}": first | second for (a, first), (b, second) in pairs}


def measures(*columns):
    return {MEASURES[column]: {"measure": [column]} for column in columns}


# ---- Cells


def read_packs(*packs):
    """Finished runs, with what their last evaluation measured."""
    parts = []
    for pack in packs:
        runs, progress = read(pack)
        last = progress.drop_duplicates("run_name", keep="last").set_index("run_name")
        parts.append(runs.join(last[last.columns.difference(runs.columns)], on="run_name"))
    return pd.concat(parts)


def make_cell(runs, place, digits):
    """Mean ± standard error of the runs in `place`, {column: [value]}; with [a, b], the difference
    with its 95 % interval by Welch's test. Empty if there are no runs."""
    (measure,) = place["measure"]
    columns = [column for column in place if column != "measure"]
    added, subtracted = [], []
    for chosen in product(*(enumerate(place[column]) for column in columns)):
        group = runs
        for column, (_, value) in zip(columns, chosen):
            group = group[group[column] == value]
        if group.empty:
            return ""
        assert group["seed"].is_unique, f"{place}: two runs with one seed"
        second = sum(number for number, _ in chosen)
        (subtracted if second % 2 else added).append(group[measure].to_numpy())
    if subtracted:
        mean = welch(*zip(added, subtracted))[:3]
        return estimate(*np.multiply(mean, len(added)), digits)
    (scores,) = added
    error = scores.std(ddof=1) / len(scores) ** 0.5
    return f"{scores.mean():,.{digits}f} ± {error:,.{digits}f}"


def print_scores(packs, heading, rows, columns, digits=0, **fixed):
    """A table of cells. `digits`: a number, or one for each column."""
    runs = read_packs(*packs.split())
    digits = np.broadcast_to(digits, len(columns))
    texts = {}
    for label, row in rows.items():
        texts[label] = []
        for column, count in zip(columns.values(), digits):
            texts[label].append(make_cell(runs, fixed | row | column, count))
    print_table(texts, heading, *columns)


# ---- Tables

LAST = ["return_mean"]
PPO_AND_SPPO = methods("PPO", "SPPO", "SPPO minus PPO")
EACH_TASK = both(tasks(HOPPER, PENDULUM, LANDER), rewards("clean", "noisy"))
TABLES = {
    "three-tasks": dict(
        packs="control/three-tasks",
        heading="task",
        rows=EACH_TASK,
        columns=methods("PPO", "DPPO", "SPPO", "SPPO minus DPPO", "DPPO minus PPO"),
        measure=LAST,
    ),
    "ant": dict(
        packs="control/ant",
        heading="method",
        rows=methods("Gaussian PPO", "DPPO", "SPPO", "SPPO minus DPPO", "DPPO minus Gaussian PPO"),
        columns=measures("return_mean", "last5", "training"),
    ),
    "stable-baselines3": dict(
        packs="control/stable-baselines3",
        heading="task",
        rows=tasks(HOPPER, LANDER),
        columns={"PPO minus Stable-Baselines3": {"exp_name": ["ppo", "sb3-ppo"]}},
        noise=["none"],
        measure=LAST,
    ),
    "million": dict(
        packs="a2c/million a2c/fresh",
        heading="task",
        rows=EACH_TASK,
        columns=methods("DA2C", "SA2C minus DA2C"),
        measure=LAST,
    ),
    "a2c": dict(
        packs="a2c/million a2c/fresh",
        heading=None,
        rows={"": {}},
        columns={
            "A2C": {"exp_name": ["a2c"]},
            "Stable-Baselines3": {"exp_name": ["sb3-a2c"]},
            "A2C minus Stable-Baselines3": {"exp_name": ["a2c", "sb3-a2c"]},
        },
        env_id=[HOPPER],
        noise=["none"],
        measure=LAST,
    ),
    "breakout": dict(
        packs="atari/breakout",
        heading="rewards",
        rows=rewards("clean", "flipped"),
        columns=PPO_AND_SPPO | methods("PPO, unbiased rewards"),
        digits=1,
        measure=LAST,
    ),
    "wizardofwor": dict(
        packs="atari/wizardofwor",
        heading="measure",
        rows=measures("return_mean", "last5", "training"),
        columns=PPO_AND_SPPO,
    ),
    "epsilon": dict(
        packs="atari/epsilon",
        heading="measure",
        rows=measures("return_mean", "training"),
        columns=methods("A2C", "SA2C", "SA2C minus A2C"),
        digits=1,
        noise=["none"],
    ),
    "imdb": dict(
        packs="text/imdb",
        heading="rewards",
        rows=rewards("clean", "flipped"),
        columns=PPO_AND_SPPO,
        digits=3,
        measure=LAST,
    ),
    "imdb-k20.5": dict(
        packs="text/imdb-k20.5",
        heading="method",
        rows=methods(
            "PPO",
            "SPPO",
            "SPPO minus PPO",
            "PPO, epsilon 1e-8",
            "PPO, ce-coef / k, epsilon 1e-8",
            "SPPO, epsilon 1e-8",
            "SPPO, epsilon 1e-8 minus PPO, epsilon 1e-8",
        ),
        columns={"reward": {"measure": LAST}, "perplexity_real": {"measure": ["perplexity_real"]}},
        digits=[3, 1],
    ),
    "sums": dict(
        packs="text/sums",
        heading="rewards",
        rows=rewards("clean", "flipped") | {"cost of noise": {"noise": ["none", "flip"]}},
        columns=PPO_AND_SPPO,
        digits=3,
        measure=LAST,
    ),
}


# ---- Pages


def make_table(folder, name):
    """The last table that the entry of TABLES, or the analysis, prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        if name in TABLES:
            print_scores(**TABLES[name])
        else:
            analysis, _, function = name.rpartition(".")
            runpy.run_path(str(folder / f"{analysis}.py"))[function]()
    return printed.getvalue().strip().rpartition("\n\n")[-1] + "\n"


def write(page):
    """A page's text with its tables made anew."""

    def marked(found):
        return f"{found[1]}-->\n{make_table(page.parent, found[1])}"

    return MARKED.sub(marked, page.read_text(encoding="utf-8"))


def main(check=False):
    for page in sorted(RESULTS.glob("**/*.md")):
        text = write(page)
        if text != page.read_text(encoding="utf-8"):
            if check:
                sys.exit(f"{page}: not up to date; run python results/tables.py")
            page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(check="--check" in sys.argv)
