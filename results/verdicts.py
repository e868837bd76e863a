"""Verdicts on the paper's twelve claims, from packed runs.

python -m results.verdicts    # writes verdicts.csv, with every comparison

docs/reproduction.md says how a verdict is reached.
"""

from importlib import import_module
from pathlib import Path

import pandas as pd

from analysis.tables import interval_text, markdown
from results.common import percent_text
from results.comparisons import LOG_RATIO, POINTS, REWARD
from results.control import nine_test

# In the order of verdicts.csv
NAMES = """\
control.tables control.k control.nine_test control.nine robustness.noise robustness.sweep a2c.tables
a2c.dose atari.games atari.crazyclimber atari.tables text.tables""".split()
MODULES = [import_module(f"results.{name}") for name in NAMES]
COLUMNS = """\
claims comparison page measure effect low high unit tasks seeds p_corrected verdict""".split()
CLAIMS = {
    "1": "SPPO gains in continuous control",
    "2": "the same with noisy rewards",
    "3": "SA2C gains in continuous control",
    "4": "the same with noisy rewards",
    "5": "SPPO gains on Atari",
    "6": "SA2C gains on Atari",
    "7": "SPPO gains on Atari with noisy rewards",
    "8": "SPPO does better across hyperparameters",
    "9": "SPPO's training is more stable",
    "10": "SPPO improves a language model on IMDB",
    "11": "the same with a model of another size",
    "12": "SPPO improves summaries (TL;DR)",
}


def effect_text(comparison):
    found = comparison.found
    if comparison.unit == "ratio":
        return f"median {found.value:.2f}, from {found.low:.2f} to {found.high:.2f}"
    if comparison.unit == LOG_RATIO:
        return percent_text(found)
    places = None if comparison.unit in (POINTS, REWARD) else 3
    return f"{interval_text(found.value, found.low, found.high, places)} {comparison.unit}"


def comparisons():
    return [one for module in MODULES for one in module.comparisons()]


def by_claim():
    found = {number: [] for number in CLAIMS}
    for one in comparisons():
        found[one.claim].append(one)
    return found


def best_of(found):
    """The comparison over the most tasks, of these the one with the narrowest interval."""
    direct = [one for one in found if one.direct]
    return min(direct, key=lambda one: (-one.tasks, one.width()))


def but_text(best, found):
    """All comparisons that lean or are decided otherwise, by verdict."""
    names = {}
    for one in found:
        verdict = one.verdict()
        if verdict not in ["not seen", "undecided", best.verdict()]:
            names.setdefault(verdict, []).append(f"{one.name} ({one.measure})")
    return "; ".join(f"**{verdict}**: {', '.join(those)}" for verdict, those in names.items())


def claims():
    rows = []
    for number, found in by_claim().items():
        row = [number, CLAIMS[number], "", "", "not run", ""]
        if found:
            best = best_of(found)
            name = f"[{best.name}](../results/{best.page})"
            row[2:] = name, effect_text(best), best.verdict(), but_text(best, found)
        rows.append(row)
    header = ["", "the paper's claim", "our broadest comparison", "effect", "verdict", "but"]
    return markdown(header, rows)


FRONT_PAGE = {
    "SPPO, control": "1",
    "SPPO, control, noisy rewards": "2",
    "SA2C, control": "3",
    "SPPO, Atari": "5",
    "SPPO, language models": "10",
}


def front_page():
    found = by_claim()
    shown = {"SPPO, control, both together": next(nine_test.comparisons())}
    shown |= {title: best_of(found[claim]) for title, claim in FRONT_PAGE.items()}
    rows = []
    for title, best in shown.items():
        link = f"[{best.name}](results/{best.page}), {best.measure}"
        rows.append([title, link, best.seeds, effect_text(best), best.verdict()])
    return markdown(["", "compared", "seeds", "difference (95 % interval)", "verdict"], rows)


def rounded(x):
    return float(f"{x:.3g}")  # nan: not tested


def csv_table():
    rows = []
    for one in comparisons():
        found = one.found
        row = [one.claim, one.name, one.page, one.measure]
        row += [rounded(x) for x in (found.value, found.low, found.high)]
        row += [one.unit, one.tasks, one.seeds, rounded(one.corrected), one.verdict()]
        rows.append(row)
    return pd.DataFrame(rows, columns=COLUMNS)


def main():
    csv_table().to_csv(Path(__file__).with_suffix(".csv"), index=False)


if __name__ == "__main__":
    main()
