"""Numbers and tables as text: one format of numbers, Markdown, LaTeX."""

from decimal import Decimal

import numpy as np
import pandas as pd

from analysis.runs import CELL

LATEX = {letter: f"\\{letter}" for letter in "&%$#_{}"}
LATEX |= {"\\": r"\textbackslash{}", "~": r"\~{}", "^": r"\^{}", "±": r"$\pm$"}


def texts_of(numbers, error, places=None):
    """Numbers, but for nan, with the decimal places that two digits of the error need. Without an
    error, the first number has four digits."""
    if not error > 1e-9 * abs(numbers[0]):  # nan, or less than rounding
        error = numbers[0] / 100
    if places is None:
        places = 1 - Decimal(f"{error:.1e}").adjusted()
    rounded = [round(float(x), places) + 0.0 for x in numbers if not np.isnan(x)]  # no -0
    return [f"{x:,.{max(places, 0)}f}" for x in rounded]


def mean_text(mean, error, places=None):
    return " ± ".join(texts_of([mean, error], error, places))


def interval_text(value, low, high, places=None):
    texts = texts_of([value, low, high], (high - low) / 2, places)
    return "{} ({} to {})".format(*texts) if len(texts) == 3 else texts[0]


def markdown(header, rows):
    lines = []
    for row in [header, *rows]:
        cells = [str(cell).replace("|", r"\|") for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    lines.insert(1, "|" + "---|" * len(header))
    return "\n".join(lines)


def markdown_of(table):
    return markdown(table.columns, table.to_numpy())


def with_interval(table, name):
    """The table, where the column `name` has its interval, too."""
    texts = [interval_text(*row) for row in table[[name, "low", "high"]].to_numpy()]
    return table.assign(**{name: texts}).drop(columns=["low", "high"])


def score_table(means, begun, across, bold="{}"):
    """Texts of the means of one measure, and how many runs a cell has `begun`, but not finished:
    the values of one column of CELL across, others down."""
    texts = {}
    for row in means.itertuples():
        text = mean_text(row.mean, row.standard_error)
        texts[row.task, row.noise, row.method] = bold.format(text) if row.best else text
    for place, count in begun.groupby(CELL).size().items():
        texts[place] = f"{texts.get(place, '')} ({count} not finished)".strip()
    table = pd.Series(texts).rename_axis(CELL).reset_index(name="text")
    table["method"] = pd.Categorical(table["method"], means["method"].cat.categories)
    down = [name for name in CELL if name != across]
    table = table.pivot(index=down, columns=across, values="text").fillna("")
    table.columns = table.columns.astype(str)
    return table.reset_index()


def difference_table(differences):
    table = with_interval(differences, "difference")
    for name in ["p", "p_corrected"]:
        table[name] = table[name].map("{:.2g}".format)
    table["detectable"] = [texts_of([x], x)[0] for x in table["detectable"]]
    return table


def latex_text(text):
    return text.translate(str.maketrans(LATEX))


def latex(table, caption, label, size):
    """A table of texts, in which bold ones are LaTeX already."""
    table = table.rename(columns=latex_text)
    table = table.replace({"±": r"$\\pm$", r"(^|[ (])-(?=\d)": r"\1$-$"}, regex=True)
    options = {"caption": latex_text(caption), "label": label, "position": "t"}
    text = table.to_latex(index=False, **options)
    return "% \\usepackage{booktabs}\n" + text.replace("[t]", f"[t]\\centering\\{size}")


def latex_of_scores(means, begun, caption):
    """With few columns, since methods stand one below the other."""
    table = score_table(means, begun, across="noise", bold=r"\textbf{{{}}}")
    table[["task", "method"]] = table[["task", "method"]].astype(str).map(latex_text)
    return latex(table, caption, "tab:scores", "small")


def latex_of_differences(differences, caption):
    table = difference_table(differences)
    names = [*CELL, "baseline"]
    table[names] = table[names].map(latex_text)
    return latex(table, caption, "tab:differences", "scriptsize")
