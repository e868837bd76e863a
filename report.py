"""Turns runs into tables, statistics and figures, in the folder report/.

python report.py runs/quick                                    # all runs in a folder
python report.py runs/quick --measure return_mean:all          # of another measure
python report.py runs/quick --pack packed/quick-runs.csv.gz    # pack them, for git
python report.py packed/quick-runs.csv.gz --compare sppo dppo  # packed runs; chosen pairs
python report.py runs/quick --narrow --names sppo=SPPO Hopper-v4=Hopper    # for a paper
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import tyro
from matplotlib.colors import is_color_like

from analysis import compare, figures, runs, tables
from analysis.measures import LAST, measures_in
from analysis.methods import colors_of, in_order
from analysis.runs import CELL, Refusal
from analysis.tables import markdown_of, with_interval

BOLD = """Bold: the {best} of a task and noise, if it differs from each method it is compared with \
(p below 0.05 after correction)."""
DIFFERENCES = """{title}: the method's mean minus the baseline's, with Welch's 95 % interval. \
p_corrected: by Benjamini and Hochberg over {rows} rows; without a test (of one run, or of scores \
that do not vary) p is 1."""
IMPROVEMENTS = """The probability that the method's run scores {better} than the baseline's, over \
tasks and noise. Brunner and Munzel's 95 % intervals, uncorrected, need five runs, \
and a task and noise where not all of one method beat all of the other."""
OTHERS = """Not tested. A `progress.csv` row has an evaluation and means of what was logged since \
the one before; `charts/episodic_return`: the mean return of the last 100 training episodes."""


@dataclass
class Args:
    # Folders of runs or packs, or packs, NAME-runs.csv.gz
    folders: tyro.conf.Positional[tuple[Path, ...]]
    # What is compared: a column of progress.csv in the last row, NAME, the last five, NAME:five, or
    # all, NAME:all. last_evaluation, last_five_evaluations and training are return_mean,
    # return_mean:five and charts/episodic_return
    measure: str = LAST
    # A lower score is the better one, as of costs
    lower_is_better: bool = False
    # Folder for the report; an earlier report there is replaced
    out: Path = Path("report")
    # Pairs of methods, alone in the report: sppo dppo sppo ppo; default: each and a baseline
    compare: tuple[tuple[str, str], ...] = ()
    # What methods, tasks, kinds of noise and measures are called: sppo=SPPO Hopper-v4=Hopper
    names: tuple[str, ...] = ()
    # Colours of methods: sppo=#1f77b4 mine=black
    colors: tuple[str, ...] = ()
    # What runs that failed score: Hopper-v4=0, or 0 if there is one task; default: they have none
    failed: tuple[str, ...] = ()
    # Figures as wide as a column, 3.25 inches, instead of a page, 6.75; LaTeX tables, too
    narrow: bool = False
    # Also pack the runs, as this NAME-runs.csv.gz
    pack: Path | None = None


def assigned(option, texts, there):
    """{name: value} of texts such as sppo=SPPO, with names that are `there`."""
    values = {}
    for text in texts:
        possible = [name for name in there if text.startswith(f"{name}=")]
        name = max(possible, key=len, default="")  # a task's name may hold "="
        values[name] = text.removeprefix(f"{name}=")
        if not name or not values[name]:
            raise Refusal(f"--{option} {text}: not NAME=VALUE; there are {', '.join(there)}")
    return values


def new_names(table, measures, texts):
    """{name: shown} of methods, tasks, kinds of noise and measures."""
    there = sorted(set(table[CELL].to_numpy().flat))
    columns = [measure.column for measure in measures.values()]
    names = {name: name.replace("_", " ").capitalize() for name in [*measures, *columns]}
    names |= dict(zip(there, there))
    names |= assigned("names", texts, names)
    if len({names[name] for name in there}) < len(there):
        raise Refusal(f"--names {' '.join(texts)}: two would be called the same")
    return names


def scores_given(texts, tasks):
    """Scores by task, of texts such as Hopper-v4=0, or of a number alone, if there is one task."""
    if len(tasks) == 1:
        texts = [text if "=" in text else f"{tasks[0]}={text}" for text in texts]
    scores = pd.Series(assigned("failed", texts, tasks), dtype=str)
    scores = pd.to_numeric(scores, errors="coerce")
    if not np.isfinite(scores).all():
        raise Refusal(f"--failed {' '.join(texts)}: not all are numbers")
    return scores


@dataclass
class Chosen:
    """What is compared. Methods, tasks and kinds of noise have the names that are shown."""

    runs: pd.DataFrame  # a row for each that was begun
    progress: pd.DataFrame
    measures: dict
    names: dict
    pairs: list
    colors: dict
    given: pd.Series  # scores of runs that failed, by task
    warnings: list

    @property
    def finished(self):
        return self.runs[self.runs["finished"]]

    @property
    def failed(self):
        return self.runs[runs.has_failed(self.runs)]

    def survivors(self):
        """A sentence, if runs failed."""
        tasks = sorted(set(self.failed["task"]))
        texts = ", ".join(f"{task} {self.given.get(task, 'none')}" for task in tasks)
        causes = self.failed["state"].str.replace(":.*", "", regex=True).value_counts().sort_index()
        why = ", ".join(f"{count} {cause}" for cause, count in causes.items())
        text = f"{len(self.failed)} of {len(self.runs)} runs failed: {why}. Scores given: {texts}"
        return f"{text} (if none, survivors alone are compared). " if texts else ""

    def curves(self, column):
        """Evaluations of finished runs, and of failed ones that are given a score, which they have
        from their last evaluation on."""
        whole = self.finished[["run_name", *CELL]].merge(self.progress)
        parts = [whole]
        for run in self.failed[self.failed["task"].isin(self.given.index)].itertuples():
            of_task = whole[whole["task"] == run.task]
            alike = of_task[(of_task["method"] == run.method) & (of_task["noise"] == run.noise)]
            steps = (of_task if alike.empty else alike)["step"].unique()
            own = self.progress[self.progress["run_name"] == run.run_name]
            end = own["step"].max() if len(own) else 0
            later = pd.DataFrame({"step": steps[steps >= end], column: self.given[run.task]})
            parts += [own[own["step"] < end], later.assign(run_name=run.run_name)]
        return pd.concat(parts)[[*self.progress]]


def choose(args, everything, evaluations, broken):
    table = runs.in_cells(everything)
    warnings = [f"**Broken: {line}**" for line in broken]
    gone = everything[~everything["run_name"].isin(table["run_name"])].sort_values("run_name")
    why = gone.get("failed", pd.Series("", gone.index))
    failed = gone["run_name"] + " (" + why + ")"
    parents = gone["run_name"][why == ""]
    if any(why != ""):
        names = ", ".join(failed[why != ""])
        warnings.append(f"**Failed, but another run of the seed counts: {names}.**")
    if any(parents):
        warnings.append(f"**Left out, since others began from them: {', '.join(parents)}.**")
    for run in table[table["start_from"] != ""].itertuples():
        warnings.append(f"{run.run_name} began from {Path(run.start_from).name}.")
    progress = runs.with_success(table, evaluations)
    measures = measures_in(progress, args.measure)
    names = new_names(table, measures, args.names)
    pairs = compare.pairs_of(table, args.compare)
    if args.compare:
        table = table[table["method"].isin(sum(pairs, ()))]
    given = scores_given(args.failed, sorted(set(table["task"]))).rename(names)
    colors = assigned("colors", args.colors, in_order(table["method"]))
    if not all(map(is_color_like, colors.values())):
        raise Refusal(f"--colors {' '.join(args.colors)}: not all are colours, such as #1f77b4")
    colors = {names[a]: color for a, color in colors_of(table["method"], colors).items()}
    pairs = [(names[a], names[b]) for a, b in pairs]
    table = table.replace(dict.fromkeys(CELL, names))
    return Chosen(table, progress, measures, names, pairs, colors, given, warnings)


def scores_of(args, chosen):
    """Of all measures, and a row without a score for each run that lacks the one compared."""
    table = chosen.runs
    scores = compare.scores_of(chosen.finished, chosen.progress, chosen.measures)
    own = scores["run_name"][scores["measure"] == args.measure]
    if own.empty:
        raise Refusal(f"--measure {args.measure}: no run has it in each row that it needs")
    without = table[~table["run_name"].isin(own)]
    given = chosen.failed["task"].map(chosen.given)
    added = without.assign(measure=args.measure, score=given)
    scores = pd.concat([scores, added[list(scores)]])
    chosen.warnings += compare.not_whole(table, without)
    chosen.warnings += compare.not_compared(table, scores, chosen.pairs, args.measure)
    chosen.warnings += runs.not_alike(chosen.finished, chosen.progress)
    return scores


def write(args, chosen, scores):
    out, lower = args.out, args.lower_is_better
    best, better = ("lowest", "lower") if lower else ("highest", "higher")
    title = chosen.names[args.measure]
    measure = chosen.measures[args.measure]
    differences = compare.differences_of(scores, chosen.pairs, args.measure)
    means = compare.means_of(scores)
    means["method"] = pd.Categorical(means["method"], list(chosen.colors))
    is_measure = means["measure"] == args.measure
    means["best"] = is_measure & compare.is_best(means, differences, lower)
    primary = means[is_measure]
    usual = primary["runs"].max()
    differences.to_csv(out / "differences.csv", index=False)
    means.to_csv(out / "scores.csv", index=False)
    run = [*CELL, "seed", "run_name"]
    scores.pivot(index=run, columns="measure", values="score").to_csv(out / "runs.csv")

    compared = ", ".join(f"{a} with {b}" for a, b in chosen.pairs) or "nothing"
    how = f"{title}: mean ± standard error over {usual} runs, if n says no other number. "
    how += f"{BOLD.format(best=best)} Compared: {compared}. {chosen.survivors()}"
    what = DIFFERENCES.format(title=title, rows=len(differences))
    shown = tables.difference_table(differences)
    shown_scores = tables.score_table(primary, usual, "noise")
    text = tables.latex(shown_scores, how.strip(), f"tab:{out.resolve().name}-scores", args.narrow)
    (out / "scores.tex").write_text(text, encoding="utf-8")
    label = f"tab:{out.resolve().name}-differences"
    text = tables.latex(shown.drop(columns="p"), what, label, args.narrow)
    (out / "differences.tex").write_text(text, encoding="utf-8")
    width = 3.25 if args.narrow else 6.75
    curves = chosen.runs, chosen.curves(measure.column), measure.column
    curves = *curves, chosen.names[measure.column]
    figures.draw_curves(*curves, chosen.colors, out / "curves", width)

    count = f"{(differences['p_corrected'] < 0.05).sum()} of {len(differences)} differences"
    count = f"{chosen.survivors()}**{count} have p below 0.05 after correction.**"
    page = [f"# {title} ({measure})", count, *chosen.warnings]
    page += ["## Scores", how.strip(), markdown_of(tables.score_table(primary, usual, "method"))]
    given = chosen.failed["task"].isin(chosen.given.index).sum()
    curves = f"`{measure.column}`: means over finished runs and, shaded, standard errors."
    if given:
        curves += f" {given} failed runs have the score given from their last evaluation on."
    page += ["## Learning curves", curves, "![Learning curves](curves.png)"]
    if len(differences):
        figures.draw_differences(differences, title, out / "differences", width)
        page += ["## Differences", what, "![Differences](differences.png)", markdown_of(shown)]
    improvements = compare.improvements_of(scores, chosen.pairs, args.measure, lower)
    if len(improvements):
        table = with_interval(improvements, "probability")
        page += ["## Over tasks", IMPROVEMENTS.format(better=better), markdown_of(table)]
    page += ["## Other measures", OTHERS]
    for name, part in means[~is_measure].groupby("measure"):
        page += [f"{chosen.names[name]} ({chosen.measures[name]}):"]
        page += [markdown_of(tables.score_table(part, usual, "method"))]
    page += ["## What was run", runs.shared_text(chosen.finished)]
    page += [markdown_of(runs.settings_table(chosen.finished))]
    (out / "report.md").write_text("\n\n".join(page) + "\n", encoding="utf-8")


def main(args):
    out = args.out
    if out.exists() and any(out.iterdir()) and not (out / "differences.csv").exists():
        raise Refusal(f"--out {out}: a folder that is not a report; choose another")
    if args.pack and not runs.is_pack(args.pack):
        raise Refusal(f"--pack {args.pack}: its name must end with -runs.csv.gz")
    everything, evaluations, broken = runs.read(args.folders)
    if args.pack and broken:
        raise Refusal(f"--pack: first delete what is broken, or run it again: {broken}")
    chosen = choose(args, everything, evaluations, broken)
    scores = scores_of(args, chosen)
    if args.pack:
        runs.write_pack(everything, evaluations, args.pack)
    out.mkdir(parents=True, exist_ok=True)
    for kind in ("png", "pdf"):
        (out / f"differences.{kind}").unlink(missing_ok=True)  # of an earlier report
    write(args, chosen, scores)
    for line in chosen.warnings:
        print(line, file=sys.stderr)
    print(out / "report.md")


if __name__ == "__main__":
    figures.set_style()
    sys.stdout.reconfigure(errors="backslashreplace")  # for letters that a terminal does not have
    try:
        options = [word.partition("=")[0] for word in sys.argv if word.startswith("--")]
        for option in options:
            if options.count(option) > 1:  # tyro would take the last
                raise Refusal(f"{option} is there twice: give all its values at once")
        main(tyro.cli(Args))
    except (Refusal, OSError) as error:
        sys.exit(f"error: {error}")
