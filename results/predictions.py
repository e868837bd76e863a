"""Registered predictions, in predictions.csv: how many held. Where a row has a key, a module's
`predictions` says from packed runs whether it holds."""

from pathlib import Path

import pandas as pd

from analysis.tables import markdown
from results.verdicts import MODULES

CSV = Path(__file__).with_suffix(".csv")


def table():
    return pd.read_csv(CSV, dtype=str, keep_default_na=False)


def counts():
    """By page. What would have been evidence for the paper is no prediction."""
    rows = table()
    rows = rows[~rows["prediction"].str.startswith("For the paper")]
    rows["page"] = rows["pack"].str.partition("/")[0]
    numbers = pd.crosstab(rows["page"], rows["outcome"]).reset_index()
    return markdown(numbers.columns, numbers.to_numpy())


def computed():
    """(key, whether the prediction holds), by the modules that have any."""
    for module in MODULES:
        if hasattr(module, "predictions"):
            yield from module.predictions().items()
