"""Turns runs into tables, statistics and figures, in the folder report/.

python report.py runs/quick                                    # all runs in a folder
python report.py runs/quick --measure training                 # of another measure
python report.py runs/quick --pack packed/quick-runs.csv.gz    # pack them, for git
python report.py packed/quick-runs.csv.gz --compare sppo dppo  # packed runs; chosen pairs
python report.py runs/quick --narrow --names sppo=SPPO Hopper-v4=Hopper    # for a paper
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import tyro

from analysis import compare, figures, runs, tables
from analysis.methods import colors_of
from analysis.runs import CELL, Refusal
from analysis.tables import interval_text, markdown_of, with_interval

BOLD = """Bold: the highest of a task and noise, if it differs from each method it is compared \
with (p below 0.05 after correction)."""
CURVES = "Means over runs and, shaded, standard errors."
DIFFERENCES = """The method's mean minus the baseline's, with Welch's 95 % interval and p. \
p_corrected: by Benjamini and Hochberg, over all rows. detectable: the true difference that such \
runs find in 80 % of cases, without correction."""
IMPROVEMENTS = """The probability that a run of the method scores higher than one of the \
baseline, averaged over tasks and kinds of noise. Brunner and Munzel's 95 % intervals, \
uncorrected, need five runs."""
OTHERS = """These are not tested. Training: the mean return of the last 100 training episodes."""


@dataclass
class Args:
    # Folders of runs or packs, or packs, NAME-runs.csv.gz
    folders: tyro.conf.Positional[tuple[Path, ...]]
    # What is compared: last_evaluation, last_five_evaluations, training (the mean return of the
    # last 100 training episodes), or a column of progress.csv, such as success_rate
    measure: str = compare.LAST
    # Folder for the report; an earlier report there is replaced
    out: Path = Path("report")
    # Pairs of methods, such as: sppo dppo sppo ppo, of which alone the report is then; default:
    # each method and a baseline
    compare: tuple[tuple[str, str], ...] = ()
    # What methods, tasks and kinds of noise are called, such as: sppo=SPPO Hopper-v4=Hopper
    names: tuple[str, ...] = ()
    # Figures as wide as a column, 3.25 inches, instead of a page, 6.75
    narrow: bool = False
    # Also pack the runs, as this NAME-runs.csv.gz
    pack: Path | None = None


def title_of(measure):
    return measure.replace("_", " ").capitalize()


def new_names(table, texts):
    """{name: shown} of methods, tasks and kinds of noise, by texts such as sppo=SPPO."""
    there = sorted(set(table[CELL].to_numpy().flat))
    names = dict(zip(there, there))
    for text in texts:
        old, _, new = text.partition("=")
        if old not in names or not new:
            raise Refusal(f"--names {text}: not NAME=SHOWN; there are {', '.join(there)}")
        names[old] = new
    if len(set(names.values())) < len(names):
        raise Refusal(f"--names {' '.join(texts)}: two would be called the same")
    return names


def verdict(means, tested, improvements):
    """What differs, what the others could have found, and how methods compare over tasks."""
    if tested.empty:
        return "**Nothing is tested.** A test needs two methods, each with two runs or more."
    found = tested[tested["p_corrected"] < 0.05]
    page = [f"**{len(found)} of {len(tested)} differences have p below 0.05 after correction.**"]
    for row in found.head(3).itertuples():
        text = interval_text(row.difference, row.low, row.high)
        page.append(f"{row.method} minus {row.baseline} in {row.task}, {row.noise}: {text}.")
    rest = tested.drop(found.index)
    if len(rest):
        baselines = means[[*CELL, "mean"]].rename(columns={"method": "baseline"})
        rest = rest.merge(baselines)
        shares = 100 * rest["detectable"] / rest["mean"].abs()
        page.append(
            f"The other {len(rest)} would find, in 80 % of cases and without correction, a true "
            f"difference of {shares.min():.0f} % (the most sensitive) to {shares.max():.0f} % (the "
            "least) of the baseline's mean."
        )
    clear = improvements[(improvements["low"] > 0.5) | (improvements["high"] < 0.5)]
    for row in clear.itertuples():
        text = interval_text(row.probability, row.low, row.high)
        higher = f"Over tasks, a run of {row.method} scores higher than one of {row.baseline}"
        page.append(f"{higher} with probability {text}, uncorrected.")
    return " ".join(page)


def not_whole(means, begun, broken):
    """A line for each run that is in no table, and for each cell that lacks seeds."""
    lines = [f"**Broken: {line}**" for line in broken]
    for place, cell in begun.groupby(CELL):
        names = ", ".join(cell["run_name"])
        lines.append(f"**Not finished, or stopped by an error: {', '.join(place)}: {names}**")
    seeds = set().union(*means["seeds"])
    for row in means[means["runs"] < len(seeds)].itertuples():
        missing = ", ".join(map(str, sorted(seeds.difference(row.seeds))))
        lines.append(f"Missing seeds: {row.task}, {row.noise}, {row.method}: {missing}.")
    return lines


def write_latex(out, title, means, begun, tested, compared):
    caption = f"{title}: mean ± standard error over {means['runs'].max()} runs. {BOLD} {compared}"
    text = tables.latex_of_scores(means, begun, caption)
    (out / "scores.tex").write_text(text, encoding="utf-8")
    text = tables.latex_of_differences(tested, f"{title}. {DIFFERENCES}")
    (out / "differences.tex").write_text(text, encoding="utf-8")


def main(args):
    out = args.out
    if out.exists() and any(out.iterdir()) and not (out / "differences.csv").exists():
        raise Refusal(f"--out {out}: a folder that is not a report; choose another")
    everything, progress, broken = runs.read(args.folders)
    if args.pack and broken:
        raise Refusal(f"--pack: first delete what is broken, or run it again: {broken}")
    table = runs.in_cells(everything)
    pairs = compare.pairs_of(table[table["finished"]], args.compare)
    names = new_names(table, args.names)
    if args.compare:
        table = table[table["method"].isin(sum(pairs, ()))]
    colors = {names[method]: color for method, color in colors_of(table["method"]).items()}
    pairs = [(names[a], names[b]) for a, b in pairs]
    table = table.replace(dict.fromkeys(CELL, names))
    finished = table[table["finished"]]
    begun = table[~table["finished"]]

    scores = compare.scores_of(finished, progress)
    if args.measure not in set(scores["measure"]):
        there = ", ".join(sorted(set(scores["measure"])))
        raise Refusal(f"--measure {args.measure}: not recorded; there are {there}")
    differences = compare.differences_of(scores, pairs, args.measure)
    tested = differences.dropna(subset="p")
    improvements = compare.improvements_of(scores, pairs, args.measure)
    means = compare.means_of(scores)
    means["method"] = pd.Categorical(means["method"], list(colors))
    chosen = means["measure"] == args.measure
    means["best"] = chosen & compare.is_best(means, differences)
    primary = means[chosen]

    if args.pack:
        runs.write_pack(everything, progress, args.pack)
    out.mkdir(parents=True, exist_ok=True)
    for file in out.glob("differences.*"):  # of an earlier report
        file.unlink()
    differences.to_csv(out / "differences.csv", index=False)
    means.to_csv(out / "scores.csv", index=False)
    by_run = scores.pivot(index=[*CELL, "seed"], columns="measure", values="score")
    by_run.to_csv(out / "runs.csv")
    title = title_of(args.measure)
    compared = ", ".join(f"{a} with {b}" for a, b in pairs) or "nothing"
    compared = f"Compared: {compared}."
    write_latex(out, title, primary, begun, tested, compared)
    column = compare.COLUMNS.get(args.measure, args.measure)
    figures.draw_curves(finished, progress, column, colors, out / "curves", args.narrow)

    warnings = not_whole(primary, begun, broken) + compare.not_compared(finished, pairs)
    warnings += runs.not_alike(finished, progress)
    page = [f"# {title}", verdict(primary, tested, improvements), *warnings]
    count = primary["runs"].max()
    page += ["## Scores", f"Mean ± standard error over {count} runs. {BOLD} {compared}"]
    page += [markdown_of(tables.score_table(primary, begun, "method", bold="**{}**"))]
    page += ["## Learning curves", f"`{column}`. {CURVES}", "![Learning curves](curves.png)"]
    if len(tested):
        figures.draw_differences(tested, out / "differences", args.narrow)
        page += ["## Differences", DIFFERENCES, "![Differences](differences.png)"]
        page += [markdown_of(tables.difference_table(tested))]
    if len(improvements):
        table = with_interval(improvements, "probability")
        page += ["## Over tasks", IMPROVEMENTS, markdown_of(table)]
    page += ["## Other measures", OTHERS]
    for measure, part in means[~chosen].groupby("measure"):
        if "/" not in measure:
            page += [
                f"{title_of(measure)}:",
                markdown_of(tables.score_table(part, begun, "method")),
            ]
    page += ["## What was run", runs.shared_text(finished)]
    page += [markdown_of(runs.settings_table(finished))]
    (out / "report.md").write_text("\n\n".join(page) + "\n", encoding="utf-8")
    for line in warnings:
        print(line, file=sys.stderr)
    print(out / "report.md")


if __name__ == "__main__":
    figures.set_style()
    sys.stdout.reconfigure(errors="backslashreplace")  # for letters that a terminal does not have
    try:
        main(tyro.cli(Args))
    except (Refusal, OSError) as error:
        sys.exit(f"error: {error}")
