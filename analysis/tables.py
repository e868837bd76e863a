"""Numbers and tables as text: one format of numbers, Markdown, LaTeX."""

import re
from decimal import Decimal

import numpy as np

from analysis.runs import CELL

LATEX = {letter: f"\\{letter}" for letter in "&%$#_{}"}
LATEX |= {"\\": r"\textbackslash{}", "~": r"\~{}", "^": r"\^{}", "±": r"$\pm$"}
LATEX |= {letter: f"${letter}$" for letter in "<>|"}
FITTED = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{"


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
    """With digits enough to show on which side of 0 a bound is, unless `places` are given."""
    half = (high - low) / 2
    texts = texts_of([value, low, high], half, places)
    if len(texts) < 3:
        return texts[0]
    while places is None and hides_side(texts, low, high):
        half /= 10
        texts = texts_of([value, low, high], half)
    return "{} ({} to {})".format(*texts)


def hides_side(texts, *bounds):
    """Whether a bound that is not 0, by more than rounding, is written as 0."""
    written = [float(text.replace(",", "")) for text in texts[1:]]
    return any(not x and abs(bound) > 1e-9 for x, bound in zip(written, bounds))


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


def score_table(means, usual, across):
    """Texts of the means of one measure, the values of one column of CELL across, others down. A
    cell says its number of runs if that is not the `usual` one, or if not all have a score."""
    texts = []
    for row in means.itertuples():
        text = mean_text(row.mean, row.standard_error) if row.runs else ""
        text = f"**{text}**" if row.best else text
        if row.runs < row.begun:
            text += f" (n = {row.runs} of {row.begun})"
        elif row.runs != usual:
            text += f" (n = {row.runs})"
        texts.append(text.strip())
    down = [name for name in CELL if name != across]
    table = means.assign(text=texts).pivot(index=down, columns=across, values="text").fillna("")
    table.columns = table.columns.astype(str)
    return table.reset_index()


def difference_table(differences):
    table = with_interval(differences, "difference")
    for name in ["p", "p_corrected"]:
        table[name] = table[name].map("{:.2g}".format).replace("nan", "")
    return table


def latex_text(text):
    return str(text).translate(str.maketrans(LATEX))


def latex_cell(text):
    """Bold as in Markdown, and minus signs."""
    bold = re.sub(r"\*\*(.+)\*\*", r"\\textbf{\1}", text)
    return re.sub(r"(^|[ ({])-(?=\d)", r"\1$-$", bold)


def latex(table, caption, label, narrow):
    """A table of texts. No wider than a column if `narrow`, else a page."""
    table = table.map(latex_text).rename(columns=latex_text)
    options = {"caption": latex_text(caption), "label": label, "position": "t"}
    text = table.map(latex_cell).to_latex(index=False, **options)
    lengths = r"\setlength{\tabcolsep}{4pt}\setlength{\belowcaptionskip}{4pt}"
    text = text.replace("[t]", rf"[t]\centering\small{lengths}")
    text = text.replace(r"\begin{tabular}", FITTED + r"\begin{tabular}")
    text = text.replace(r"\end{tabular}", r"\end{tabular}}")
    text = text if narrow else text.replace("{table}", "{table*}")
    return "% \\usepackage{booktabs, graphicx}\n" + text
