"""A measure is a column of progress.csv and a time: NAME, NAME:five or NAME:all."""

from dataclasses import dataclass

import numpy as np

from analysis.runs import EVALUATION, Refusal

TIMES = {
    "last": "last row",
    "five": "mean of the last five rows",
    "all": "mean of all rows, weighed by steps",
}
LAST = "last_evaluation"
FIVE = "last_five_evaluations"
TRAINING = "training"
NAMES = {LAST: "return_mean", FIVE: "return_mean:five", TRAINING: "charts/episodic_return"}


@dataclass(frozen=True)
class Measure:
    column: str
    time: str  # of TIMES

    def __str__(self):
        return f"{self.column}, {TIMES[self.time]}"

    def score_of(self, rows, started=False):
        """Of a run with these rows of progress.csv; nan if one that counts lacks the column.
        `started`: from another run, perhaps of another task, whose steps do not count."""
        values = rows[self.column].to_numpy()
        if self.time == "last":
            return values[-1]
        if self.time == "five":
            return values[-5:].mean() if len(values) >= 5 else np.nan
        # A row has means since the row before, and counts that long; before training not at all
        steps = np.diff(rows["step"], prepend=0)
        if started:
            steps[0] = min(steps[0], max(steps[1:], default=steps[0]))
            if np.isnan(rows.get(NAMES[TRAINING], rows["step"]).iloc[0]):
                steps[0] = 0  # evaluated before training
        counts = steps > 0
        return np.average(values[counts], weights=steps[counts])


def measure_of(name, columns):
    """A whole column's name comes first, since columns may hold a colon."""
    text = name if name in columns else NAMES.get(name, name)
    if text in columns:
        return Measure(text, "last")
    column, _, time = text.rpartition(":")
    if column in columns and time in TIMES:
        return Measure(column, time)
    there = f"{', '.join(NAMES)}; also with :five and :all {', '.join(columns)}"
    raise Refusal(f"--measure {name}: not recorded; there are {there}")


def measures_in(progress, *chosen):
    """{name: measure} of what is chosen, of NAMES, and of what evaluations say."""
    columns = list(progress.columns.drop(["step", "run_name"]))
    named = [name for name, text in NAMES.items() if text.partition(":")[0] in columns]
    said = [name for name in columns if "/" not in name and name not in EVALUATION]
    return {name: measure_of(name, columns) for name in [*chosen, *named, *said]}
