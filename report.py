"""Turns runs into tables, statistics and figures, in the folder report/.

    python report.py runs/quick                        # all runs in a folder
    python report.py runs/quick --pack packed/quick    # pack them, for git
    python report.py packed/quick --compare sppo dppo  # packed runs; chosen pairs

Packed runs are two files: runs.csv.gz, a row for each run, and progress.csv.gz, a row for each
evaluation; where a folder has several packs, with NAME- before both."""

import gzip
import hashlib
import json
import math
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations, permutations
from pathlib import Path

import numpy as np
import tyro

try:
    import matplotlib.pyplot as plt
    import pandas as pd
    import seaborn as sns
    from pandas import DataFrame
    from scipy import stats
except ImportError as error:
    sys.exit(f"error: {error}; install what reports need: pip install -e '.[report]'")

plt.switch_backend("agg")
plt.rcdefaults()  # a matplotlibrc may ask for what is not installed, such as LaTeX
plt.rcParams["text.parse_math"] = False  # a method may be called "$a$b"

HOW_TO_READ = """\
"Last evaluation" is its mean return, "training" that of the last 100 training episodes, averaged
since the evaluation before: it is about learning speed, too. A cell is a method, a task and a kind
of reward; its runs differ in seed. Intervals are 95 %: where the mean over many seeds may lie. A
difference in percent is the ratio of two methods' means, averaged over cells as a logarithm, with
Welch's interval; in points, on tasks where a run of the two had a return of 0 or less. The
probability that a run of the first beats one of the second, averaged over cells, has Brunner and
Munzel's interval; with fewer than five runs in a cell, or if all of one beat all of the other,
pairs of runs are counted instead."""

MEASURES = {  # columns of runs
    "return_mean": "last evaluation",
    "last5": "mean of the last five evaluations",
    "training": "training",
}

# What a method is compared with: the first of them that is there. A variant, such as sppo-p, is
# compared with its method, sb3-ppo with ppo, another method with a symmetric one
BASELINES = {"sppo": "dppo ppo", "dppo": "ppo", "ppo": ""}
BASELINES |= {"sa2c": "da2c a2c", "da2c": "a2c", "a2c": ""}

# Methods in the order of tables, then variants; others follow, in alphabetical order
COLORS = """\
a2c goldenrod, da2c darkgreen, sa2c navy, ppo tab:orange, dppo tab:green, sppo tab:blue, \
dppo-coef tab:red, ppo-coef firebrick, dppo-norm tab:purple, ppo-norm indigo, ppo-ce tab:pink"""
COLORS = dict(item.split() for item in COLORS.split(", "))

# What may differ between the runs of a cell, besides what follows from it
FREE = "seed run_name runs_dir device compile track capture_video evaluate".split()
PROVENANCE = ["commit", "script_sha256", "command", "started", "versions", "hardware"]
SCORES = ["finished", "return_mean", "return_std", "last5", "training", "sps"]
RUN = ["run_name", "exp_name", "script", "env_id", "noise", "noise_level", "seed", *SCORES]
EVALUATION = ["run_name", "step", "return_mean", "return_std", "length_mean"]
CELL = ["reward", "env_id", "exp_name"]
DIFFERENCE = ["env_id", "reward", "measure", "methods", "difference", "low", "high", "p"]
FEW = 5  # with fewer runs a cell, wins are counted: results/coverage.py
DPI = 160


@dataclass
class Args:
    # Folders of runs or of packed runs, or packed runs' NAME-runs.csv.gz
    folders: tyro.conf.Positional[tuple[Path, ...]]
    # Folder for report.md and its figures; an earlier report there is replaced
    out: Path = Path("report")
    # Pairs of methods, such as: sppo dppo sppo ppo; default: each method and a baseline. If given,
    # curves are of these methods only
    compare: tuple[str, ...] = ()
    # Logged quantities to make tables of, as means over the evaluations of a run
    logged: tuple[str, ...] = ("losses/clipped_gradients", "losses/norm_sign_changes")
    # Also pack the runs, into this folder or as this NAME-runs.csv.gz
    pack: Path | None = None


class Refusal(ValueError):
    """One line that says what is wrong with the input and what to do."""


# ---- Reading and packing


def read_folders(folders: Iterable[Path]) -> tuple[DataFrame, DataFrame, list[str]]:
    """All runs, a row each, their evaluations, and what is broken, a line for each run or pack left
    out. Raises Refusal if a folder is not there, no run has finished, or one is there twice."""
    rows = []
    progress = []
    broken = []
    places = {}
    for folder in folders:
        paths = sorted(path for path in folder.glob("*") if record_of(path).exists())
        if record_of(folder).exists() or tables_of(folder)[0].exists():
            paths = [folder.resolve()]  # "." has no name
        elif not folder.exists():
            raise Refusal(f"{folder}: no such folder")
        elif not paths:  # as runs/quick/logs of runs/quick/*
            print(f"{folder}: no runs in it (of packs give NAME-runs.csv.gz)", file=sys.stderr)
        for path in paths:
            try:
                found, evaluations = read_run(path)
            except Exception as error:  # a broken file may raise anything
                why = error if isinstance(error, Refusal) else repr(error)
                broken.append(f"{path.name}: {why}")
                print(f"left out: {broken[-1]}", file=sys.stderr)
                continue
            rows += found
            progress.append(evaluations)
            for row in found:
                place = places.setdefault(row["run_name"], path)
                if place is not path:
                    raise Refusal(f"{row['run_name']}: in {place} and in {path}; leave one out")
    if not any(row["finished"] for row in rows):
        raise Refusal(f"none of {len(rows)} runs has finished; give folders such as runs/quick")
    return DataFrame(rows), pd.concat(progress, ignore_index=True), broken


def record_of(folder: Path) -> Path:
    """The file that says how the run in a folder began: args.json if its script is an older one."""
    sessions = folder / "sessions.jsonl"
    return sessions if sessions.exists() else folder / "args.json"


def read_json(path: Path) -> dict:
    """The first value in a file: in sessions.jsonl, how the run began."""
    try:
        return json.JSONDecoder().raw_decode(path.read_text(encoding="utf-8"))[0]
    except ValueError as error:
        raise Refusal(f"{path.name}: {error}") from error


def read_csv(path: Path) -> DataFrame:
    """A table, in which a method may have any name, such as "null"."""
    texts = ["run_name", *CELL, *PROVENANCE]
    options = {"low_memory": False, "dtype": dict.fromkeys(texts, str), "keep_default_na": False}
    if pd.__version__.startswith("2"):
        options["float_precision"] = "round_trip"  # the default of later versions
    old_names = {"losses/advantage_sign_flips": "losses/norm_sign_changes"}
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
        columns = set(file.readline().decode().strip().split(","))
        options["na_values"] = dict.fromkeys(columns - {"run_name", *CELL}, ["", "nan"])
        file.seek(0)
        return pd.read_csv(file, **options).rename(columns=old_names)


def tables_of(pack: Path) -> tuple[Path, Path]:
    """Files of runs and of evaluations, of a folder or of a path to NAME-runs.csv.gz."""
    runs = pack if pack.name.endswith("runs.csv.gz") else pack / "runs.csv.gz"
    return runs, runs.with_name(runs.name.replace("runs.csv", "progress.csv"))


def read_run(path: Path) -> tuple[list[dict], DataFrame]:
    """A run's arguments, SCORES and PROVENANCE, in a list, and its evaluations, or those of packed
    runs. Raises Refusal and what else broken files may raise."""
    packed, evaluations = tables_of(path)
    if packed.exists():
        runs = read_csv(packed)
        lacking = {*RUN, "total_timesteps", *PROVENANCE} - {"started", "hardware", *runs}
        if lacking:
            raise Refusal(f"no column {min(lacking)} in it")
        return runs.to_dict("records"), read_csv(evaluations)
    recorded = read_json(record_of(path))
    if "run" in recorded:  # in sessions.jsonl
        script = (path / recorded["script"]).read_bytes()
        recorded["identity"] = {"script_sha256": hashlib.sha256(script).hexdigest()}
        recorded["versions"] = dict(sorted(recorded["versions"].items()))  # alike on all machines
    if "identity" not in recorded:
        raise Refusal("a run of an earlier version of the scripts")
    run = dict.fromkeys([*SCORES, *PROVENANCE])
    hardware = [recorded.get(name) for name in ("platform", "cpu", "gpu")]
    where = {"versions": recorded.get("versions"), "hardware": hardware}
    for name, value in (recorded["args"] | where).items():
        run[name] = json.dumps(value) if isinstance(value, (list, dict)) else value
    if "task" in run:
        run["env_id"] = run.pop("task")
    run |= {
        "run_name": path.name,
        "script": recorded["script"],
        "finished": (path / "summary.json").exists(),
        "commit": recorded.get("commit"),  # of older scripts
        "started": recorded.get("started"),
        "script_sha256": recorded["identity"].get("script_sha256"),
        "command": shlex.join(recorded["command"]),
        "exp_name": str(run["exp_name"]),
        "total_timesteps": int(run["total_timesteps"]),
        "seed": int(run["seed"]),
        "noise": str(run["noise"]),
        "noise_level": float(run["noise_level"]),
    }
    progress = DataFrame()
    if run["finished"] or (path / "progress.csv").exists():  # not before the first evaluation
        progress = read_csv(path / "progress.csv")
        progress.to_numpy(float)  # raises if there are texts; a loss may be nan
        if not np.isfinite(progress[EVALUATION[1:]].to_numpy(float)).all():
            raise Refusal("progress.csv: an evaluation that is not a number")
        progress["run_name"] = path.name
    if run["finished"]:
        summary = read_json(path / "summary.json")
        run["sps"] = float(summary["sps"])
        end = progress["step"].max()
        if end != summary["step"]:
            raise Refusal(f"progress.csv: cut at step {end} of {summary['step']}")
        last = progress.iloc[-1]
        run |= {"return_mean": last["return_mean"], "return_std": last["return_std"]}
        run["training"] = last.get("charts/episodic_return")
        if len(progress) >= 10:
            run["last5"] = progress["return_mean"].tail(5).mean()
    return [run], progress


def pack(runs: DataFrame, progress: DataFrame, place: Path) -> None:
    """Writes both tables; equal runs give equal bytes. Raises Refusal if others are there."""
    packed, evaluations = tables_of(place)
    if packed.exists():
        lost = set(read_csv(packed)["run_name"]) - set(runs["run_name"])
        if lost:
            raise Refusal(f"--pack {place}: it has other runs, such as {min(lost)}; give it, too")
    packed.parent.mkdir(parents=True, exist_ok=True)
    settings = runs.columns.difference([*RUN, *PROVENANCE], sort=False)
    logged = progress.columns.difference(EVALUATION, sort=False)
    options = {"index": False, "lineterminator": "\n"}
    options["compression"] = {"method": "gzip", "mtime": 0}
    runs.reindex(columns=[*RUN, *settings, *PROVENANCE]).to_csv(packed, **options)
    progress[[*EVALUATION, *logged]].to_csv(evaluations, **options)


# ---- What is compared


def label_runs(runs: DataFrame, progress: DataFrame, logged: tuple) -> DataFrame:
    """Finished runs with `reward`, the kind they learned from, their `lowest` return, and
    `extra_columns`: logged ones as means over a run, others from the last evaluation. Raises
    Refusal if a cell mixes settings."""
    finished = runs[runs["finished"]].copy()
    clean = finished["noise"] == "none"
    finished["noise_level"] = finished["noise_level"].mask(clean, 0.0)
    noisy = finished["noise"] + finished["noise_level"].map(" {:g}".format)
    finished["reward"] = noisy.mask(clean, "clean")
    for cell, group in finished.groupby(CELL):
        check_cell(" ".join(cell), group)
    for (_, task), group in finished.groupby(CELL[:2]):
        finished.loc[group.index, "noted_task"] = task + note_on(group)
    evaluations = progress.groupby("run_name")
    last = progress.drop_duplicates("run_name", keep="last").set_index("run_name")
    lowest = finished["run_name"].map(evaluations["return_mean"].min())
    finished["lowest"] = np.fmin(lowest, finished["training"].astype(float))
    for name in extra_columns(progress, logged):
        values = evaluations[name].mean() if name in logged else last[name]
        finished[name] = finished["run_name"].map(values)
    return finished.sort_values(["noise_level", *CELL, "seed"])


def extra_columns(progress: DataFrame, logged: tuple) -> list:
    """Columns that get tables: what only language models' evaluations have, and `logged`."""
    others = [name for name in progress if "/" not in name and name not in EVALUATION]
    return [name for name in progress if name in logged or name in others]


def check_cell(cell: str, runs: DataFrame) -> None:
    """Raises Refusal if `runs` of one cell differ in a setting, or have the same seed. That a run
    lacks a flag is no difference, if it is of another version of the script."""
    for name in runs.columns.difference([*FREE, *SCORES, *PROVENANCE]):
        values = runs[name]
        versions = runs["script_sha256"]
        lacking = versions[values.isna()]
        if values.nunique() > 1 or lacking.isin(versions[values.notna()]).any():
            several = ", ".join(map(str, values.unique()))
            raise Refusal(f"{cell}: runs differ in {name} ({several}); report them separately")
    twice = runs[runs["seed"].duplicated(keep=False)]
    if len(twice):
        names = " and ".join(twice["run_name"])
        raise Refusal(f"{cell}: the same seed in {names}; leave one out")


def in_order(methods) -> list[str]:
    """Each method once: the known ones first; variants, such as dppo-norm, after their method."""
    known = list(COLORS)

    def place(method: str):
        base = method.partition("-")[0]
        return known.index(base) if base in known else len(known), method

    return sorted(set(methods), key=place)


def cells_of(runs: DataFrame, measure: str) -> dict:
    """{(reward, task): {method: scores (seeds,)}} of runs that have the measure."""
    cells = {}
    there = runs.dropna(subset=measure)
    for cell, scores in there.groupby(CELL, sort=False)[measure]:
        *place, method = cell
        cells.setdefault(tuple(place), {})[method] = scores.to_numpy(float)
    return cells


def pairs_of(runs: DataFrame, compare: tuple) -> list[tuple]:
    """Pairs of methods to compare. Raises Refusal for a pair that no task has."""
    cells = cells_of(runs, "return_mean").values()
    together = {pair for cell in cells for pair in permutations(cell, 2)}
    if len(compare) % 2:
        raise Refusal(f"--compare {' '.join(compare)}: not pairs of methods")
    chosen = list(zip(compare[::2], compare[1::2]))
    for a, b in chosen:
        if (a, b) not in together:
            there = ", ".join(in_order(runs["exp_name"]))
            raise Refusal(f"--compare {a} {b}: no task has both; there are {there}")
    if not chosen:
        for method in in_order(runs["exp_name"]):
            baselines = BASELINES.get(method, f"{method.replace('-', ' ', 1)} sppo sa2c")
            there = [(method, other) for other in baselines.split() if (method, other) in together]
            chosen += there[:1]
    return chosen


def note_on(runs: DataFrame) -> str:
    """What a comparison of `runs` has to say, in brackets: several numbers of steps, several
    versions of a script."""
    notes = []
    steps = sorted(runs["total_timesteps"].unique())
    if len(steps) > 1:
        notes.append(" and ".join(map("{:,}".format, steps)) + " steps")
    versions = runs.groupby("script")["script_sha256"].nunique().max()
    if versions > 1:
        notes.append(f"{versions} versions of a script")
    return f" ({', '.join(notes)})" if notes else ""


# ---- Statistics


def placements(a, b):
    """For each run of `a` (..., n) the share of the runs `b` (..., m) that it beats, ties half."""
    a = a[..., :, None]
    b = b[..., None, :]
    return ((a > b).mean(axis=-1) + (a >= b).mean(axis=-1)) / 2


def win_rate(cells: list):
    """Probability that a run of the first beats one of the second, the mean over `cells`, pairs of
    scores (..., runs), and its 95 % interval by Brunner and Munzel (Biometrical Journal 42, 2000):
    as long as Welch's of the difference in placements. No interval if none varies."""
    both = [(placements(a, b), placements(b, a)) for a, b in cells]
    difference, _, high, _ = pooled_difference(both, mean_and_variance)
    value = (1 + difference) / 2
    half = high - difference
    return value, np.maximum(value - half, 0), np.minimum(value + half, 1)


def mean_and_variance(scores):
    """The mean of `scores` (..., runs), and its variance, 0 of a single score: (...,) each."""
    runs = scores.shape[-1]
    variance = scores.var(-1, ddof=min(1, runs - 1)) / runs
    return scores.mean(-1), np.where(np.ptp(scores, -1) == 0, 0, variance)  # rounding is no spread


def log_mean_and_variance(scores):
    """The logarithm of the mean of positive `scores` (..., runs), and its variance: (...,) each.
    That of a sample's mean is too low on average, exactly by what is added here if the mean is
    lognormal. Its variance is too small where the mean is too large: hence `1 +`."""
    mean, variance = mean_and_variance(scores)
    relative = variance / mean**2
    return np.log(mean) + np.log1p(relative) / 2, relative * (1 + relative)


def pooled_difference(cells: list, moments):
    """Mean over `cells`, pairs of scores (..., runs), of the difference in a value, its 95 %
    interval and two-sided p by Welch and Satterthwaite: (...,) each. `moments` gives the value and
    its variance. No interval and p of a single score, or if none varies; all is nan of no cell."""
    if not cells:
        return math.nan, math.nan, math.nan, math.nan
    differences = []
    variances = []
    freedom = []
    for a, b in cells:
        value_a, variance_a = moments(a)
        value_b, variance_b = moments(b)
        differences.append(value_a - value_b)
        variances += [variance_a, variance_b]
        freedom += [a.shape[-1] - 1, b.shape[-1] - 1]
    value = np.mean(differences, axis=0)
    variances = np.stack(variances, axis=-1)
    total = variances.sum(axis=-1)
    error = np.sqrt(total) / len(cells)
    with np.errstate(divide="ignore", invalid="ignore"):  # a single score, or no variance: nan
        degrees = total**2 / (variances**2 / freedom).sum(axis=-1)
        half = error * stats.t.ppf(0.975, degrees)
        p = 2 * stats.t.sf(np.abs(value) / error, degrees)
    return value, value - half, value + half, p


def make_differences(runs: DataFrame, pairs: list[tuple]) -> DataFrame:
    """Every method minus every other one of its task and reward, in each of MEASURES, by the p of
    Welch's test."""
    rows = []
    groups = runs.groupby(CELL)[["total_timesteps", "script", "script_sha256"]]
    for measure, title in MEASURES.items():
        for (reward, env_id), cell in cells_of(runs, measure).items():
            for b, a in combinations(in_order(cell), 2):
                if (b, a) in pairs:
                    a, b = b, a
                found = pooled_difference([(cell[a], cell[b])], mean_and_variance)
                if not math.isnan(found[-1]):
                    both = [groups.get_group((reward, env_id, method)) for method in (a, b)]
                    noted = reward + note_on(pd.concat(both))
                    rows.append([env_id, noted, title, f"{a} minus {b}", *found])
    return DataFrame(rows, columns=DIFFERENCE).sort_values("p", ignore_index=True)


# ---- Tables


def markdown(table: DataFrame) -> str:
    rule = ["---"] * len(table.columns)
    lines = []
    for row in [table.columns, rule, *table.to_numpy()]:
        cells = [text.replace("|", r"\|") for text in row]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def number(value: float, error: float = math.nan) -> str:
    """A mean, and ± its standard error, with the digits that its size deserves."""
    digits = sum(abs(value) < limit for limit in (100, 10, 1))
    text = f"{value:,.{digits}f}"
    return text if math.isnan(error) else f"{text} ± {error:,.{digits}f}"


def interval(low: float, high: float) -> str:
    """Both ends, with three digits of the interval's length."""
    digits = max(0, 2 - math.floor(math.log10(high - low)))
    return f"{low:,.{digits}f} to {high:,.{digits}f}"


def estimate(value: float, low: float, high: float, form: str) -> str:
    """A value in the format `form`, with its interval; empty for nan."""
    if math.isnan(value):
        return ""
    text = format(value, form)
    return text if math.isnan(low) else f"{text} ({low:{form}} to {high:{form}})"


def score_table(runs: DataFrame, measure: str) -> list[str]:
    """Title and table, tasks by methods, of `runs` with one kind of reward: mean ± standard error
    over seeds, and how many seeds where it is not the most. Nothing if no run has the measure."""
    there = runs.dropna(subset=measure)
    if there.empty:
        return []
    cells = there.groupby(["noted_task", "exp_name"])[measure]
    most = cells.size().max()

    def text_of(scores):
        fewer = f" (seeds: {len(scores)})" if len(scores) < most else ""
        return number(scores.mean(), scores.sem()) + fewer

    texts = cells.agg(text_of).unstack(fill_value="")[in_order(there["exp_name"])]
    when = "mean over the run" if "/" in measure else "last evaluation"
    title = MEASURES.get(measure, "").capitalize() or f"`{measure}`, {when}"
    table = texts.reset_index(names="", allow_duplicates=True)
    return [f"{title} (seeds: {most}):", markdown(table)]


def pooled_text(runs: DataFrame, pairs: list[tuple]) -> list[str]:
    """Paragraphs on all pairs: a sentence each, and a table that has each kind of reward, too."""
    if not pairs:
        return ["No method has a baseline here; `--compare A B` compares two of them."]
    parts = dict(list(runs.groupby("reward", sort=False)))
    if len(parts) > 1:
        parts = {"all": runs} | parts
    sentences = []
    rows = []
    for a, b in pairs:
        both = runs[runs["exp_name"].isin([a, b])]
        signed = set(both.loc[both["lowest"] <= 0, "env_id"])
        of_pair = []
        for reward, part in parts.items():
            for measure, title in MEASURES.items():
                found = pool(cells_of(part, measure), a, b, signed)
                if found:
                    place = {"": f"{a} against {b}", "rewards": reward, "measure": title}
                    of_pair.append(place | found)
        rows += of_pair
        total = of_pair[0]
        sentence = f"- Over {total['of']}, a run of {a} beats one of {b} "
        sentence += ("in " if "pairs" in total["wins"] else "with probability ") + total["wins"]
        if total["percent"]:
            sentence += f"; on tasks with only positive returns ({total['tasks']}) {a}'s last "
            sentence += f"evaluation differs from {b}'s by {total['percent']}"
        sentences.append(f"{sentence}.")
    return ["## Over all tasks", "\n".join(sentences), markdown(DataFrame(rows))]


def pool(cells: dict, a: str, b: str, signed: set) -> dict[str, str]:
    """What a table says of the cells that both have: how often a beats b, and their difference, in
    percent and, on `signed` tasks, on which they had returns of 0 or less, in points: in all their
    cells, since by its own scores a cell would drop out where noise has ruined the task."""
    groups = {}  # by task
    for (_, task), cell in cells.items():
        if a in cell and b in cell:
            groups.setdefault(task, []).append((cell[a], cell[b]))
    if not groups:
        return {}
    both = sum(groups.values(), [])
    positive = []
    points = []
    for task, group in sorted(groups.items()):
        if task in signed:
            found = pooled_difference(group, mean_and_variance)[:3]
            points.append(f"{estimate(*found, ',.2f')} in {task}")
        else:
            positive += group
    logarithms = pooled_difference(positive, log_mean_and_variance)[:3]
    runs = sum(len(a) + len(b) for a, b in both)
    return {
        "of": f"{len(both)} {'cell' if len(both) == 1 else 'cells'}, {runs} runs",
        "wins": wins_text(both),
        "percent": estimate(*np.expm1(logarithms), "+.1%"),
        "tasks": f"{len(groups) - len(points)} of {len(groups)}",
        "points": ", ".join(points),
    }


def wins_text(cells: list) -> str:
    """How often a run of the first beats one of the second: a probability, or pairs of runs."""
    rate, low, high = win_rate(cells)
    if math.isnan(low) or min(len(scores) for cell in cells for scores in cell) < FEW:
        pairs = sum(len(a) * len(b) for a, b in cells)
        won = sum(placements(a, b).sum() * len(b) for a, b in cells)
        return f"{won:g} of {pairs} pairs"
    return estimate(rate, low, high, ".2f")


def difference_text(differences: DataFrame) -> list[str]:
    """Paragraphs: how many differences there are, how many of them may be chance; a table."""
    if differences.empty:
        return []
    corrected = stats.false_discovery_control(differences["p"])
    rows = []
    for row, p in zip(differences.itertuples(), corrected):
        texts = [row.env_id, row.reward, row.measure, row.methods, number(row.difference)]
        texts += [interval(row.low, row.high), f"{row.p:.3f}", f"{p:.3f}"]
        rows.append(texts)
    small = (differences["p"] < 0.05).sum()
    remaining = (corrected <= 0.05).sum()
    text = (
        f"{len(rows)} differences between two methods, {small} of them with p < 0.05 (Welch's "
        f"t-test); chance alone would give {0.05 * len(rows):.1f}. After correction for their "
        f"number (Benjamini and Hochberg, 5 %) {remaining} remain. The surest come first; those "
        "between all methods are in differences.csv:"
    )
    columns = ["", "rewards", "measure", "methods", "difference", "95 % interval", "p"]
    table = DataFrame(rows, columns=[*columns, "p, corrected"])
    return ["## Differences", text, markdown(table)]


def provenance_text(runs: DataFrame, unfinished: list[str], broken: list[str]) -> list[str]:
    """Paragraphs on what was run, what is left out, and whether it is one version of a script."""
    page = ["## What was run"]
    if broken:
        page.append(f"**Left out, since a file is broken: {len(broken)}**")
        page.append("\n".join(f"- `{line}`" for line in broken))
    if unfinished:
        page.append(f"**Begun, not finished: {len(unfinished)} ({', '.join(unfinished)}).**")
    names = {"script": "script", "total_timesteps": "steps", "commit": "commit"}
    names |= {"script_sha256": "SHA-256 of the script", "versions": "versions"}
    if runs["commit"].isna().all():
        del names["commit"]
    origin = runs[list(names)].map(str).replace(["nan", "None"], "not recorded")
    rows = [[str(count), *values] for values, count in origin.value_counts().items()]
    return [*page, markdown(DataFrame(rows, columns=["runs", *names.values()]))]


# ---- Figures


def draw_curves(runs: DataFrame, progress: DataFrame, file: Path) -> list[str]:
    """A panel for each task and reward. Returns the Markdown, nothing if there is no curve."""
    points = progress.dropna(subset="return_mean")
    points = points[points["run_name"].duplicated(keep=False)]
    labelled = runs[["run_name", "noted_task", *CELL]].merge(points[EVALUATION[:3]])
    if labelled.empty:
        return []
    methods = in_order(labelled["exp_name"])
    shown = {method: f" {method}" for method in methods}  # legends leave out what begins with "_"
    labelled["exp_name"] = labelled["exp_name"].map(shown)
    others = [name for name in methods if name not in COLORS]
    colors = COLORS | dict(zip(others, sns.husl_palette(len(others), h=0.2)))
    labels = ["million steps", "return of evaluations"]
    if runs["script"].str.contains("rlhf").all():
        labels = ["texts", "reward"]
    else:
        labelled["step"] /= 1e6
    panels = labelled["noted_task"] + "\n" + labelled["reward"]
    labelled["panel"] = panels.str.replace(" (", "\n(", regex=False)
    tasks = labelled["env_id"].nunique()
    size = {"height": 2.5, "aspect": 1.3, "col_wrap": min(tasks, 4)}
    if tasks == 1:
        size |= {"height": 3.5, "col_wrap": min(labelled["panel"].nunique(), 4)}
    grid = sns.FacetGrid(labelled, col="panel", sharex=False, sharey=False, **size)
    palette = {shown[method]: colors[method] for method in methods}
    hue = {"hue": "exp_name", "hue_order": list(palette), "palette": palette}
    grid.map_dataframe(sns.lineplot, "step", "return_mean", errorbar="se", **hue)
    grid.add_legend()
    grid.set_titles("{col_name}")
    grid.set_axis_labels(*labels)
    grid.savefig(file, dpi=DPI)
    plt.close(grid.figure)
    return [f"![Learning curves]({file.name})"]


def draw_differences(differences: DataFrame, file: Path) -> list[str]:
    """A panel for each task. Returns the Markdown that shows it, nothing without differences."""
    if differences.empty:
        return []
    shown = differences.assign(none=0, error=differences["high"] - differences["difference"])
    rewards = shown["reward"].str.replace(" (", "\n(", regex=False)
    names = shown["methods"] + ", " + rewards
    labels = sorted(names.unique())
    shown["height"] = names.map(labels.index)
    height = 1.2 + 0.3 * len(labels)
    size = {"height": height, "aspect": 3 / height}
    size["col_wrap"] = min(shown["env_id"].nunique(), 4)
    grid = sns.FacetGrid(shown, col="env_id", sharex=False, **size)
    columns = ["difference", "height", "none", "error"]  # x, y, and the errors of y and x
    grid.map(plt.errorbar, *columns, fmt="o", capsize=3, color="black")
    grid.refline(x=0)
    grid.set(yticks=range(len(labels)), yticklabels=labels)
    grid.set(ylim=(len(labels) - 0.5, -0.5))
    for ax in grid.axes.flat:
        ax.locator_params(axis="x", nbins=5)
    grid.set_titles("{col_name}")
    grid.set_axis_labels("difference in the last evaluation", "")
    grid.savefig(file, dpi=DPI)
    plt.close(grid.figure)
    return [f"![Differences in the last evaluation, with 95 % intervals]({file.name})"]


def main(args: Args) -> None:
    """Reads all runs and writes report.md and its figures. Raises Refusal, OSError."""
    out = args.out.expanduser()
    there = {path.name for path in out.glob("[!.]*")}
    if there and not there & {"report.md", "runs.csv.gz"}:
        raise Refusal(f"--out {out}: a folder that is not a report; choose another")
    everything, progress, broken = read_folders([path.expanduser() for path in args.folders])
    for name in args.logged:
        if "/" not in name or name not in progress and name not in Args.logged:
            raise Refusal(f"--logged {name}: no run has logged it (as losses/entropy)")
    runs = label_runs(everything, progress, args.logged)
    pairs = pairs_of(runs, args.compare)
    differences = make_differences(runs, pairs)
    if args.pack:
        pack(everything, progress, args.pack.expanduser())
    out.mkdir(parents=True, exist_ok=True)
    for picture in ("curves.png", "differences.png", "variants.png"):
        (out / picture).unlink(missing_ok=True)  # of an earlier report
    differences.to_csv(out / "differences.csv", index=False)
    chosen = [f"{a} minus {b}" for a, b in pairs]
    differences = differences[differences["methods"].isin(chosen)]
    page = ["# Report", HOW_TO_READ, *pooled_text(runs, pairs)]
    shown = differences[differences["measure"] == "last evaluation"].sort_values("env_id")
    page += draw_differences(shown, out / "differences.png")
    drawn = runs[runs["exp_name"].isin(args.compare or runs["exp_name"])]
    variants = drawn["exp_name"].str.contains("-")
    page += ["## Learning curves", "Evaluations, mean and, shaded, standard error over seeds:"]
    page += draw_curves(drawn[~variants], progress, out / "curves.png")
    if variants.any():  # with which a picture is too full to show the main methods
        page += draw_curves(drawn, progress, out / "variants.png")
    for reward, part in runs.groupby("reward", sort=False):
        page.append(f"## Scores, {reward}")
        for measure in [*MEASURES, *extra_columns(progress, args.logged)]:
            page += score_table(part, measure)
    page += difference_text(differences)
    unfinished = everything[~everything["finished"]]
    page += provenance_text(runs, list(unfinished["run_name"]), broken)
    (out / "report.md").write_text("\n\n".join(page) + "\n", encoding="utf-8")
    print(out / "report.md")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except (Refusal, OSError) as error:
        sys.exit(f"error: {error}")
