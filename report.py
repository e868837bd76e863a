"""Turns runs into tables, statistics and figures, in the folder report/.

    python report.py runs/quick                        # all runs in a folder
    python report.py runs/quick --pack packed/quick    # pack them, for git
    python report.py packed/quick --compare sppo dppo  # packed runs; chosen pairs
    python report.py runs/quick --narrow --names sppo=SPPO Hopper-v4=Hopper    # for a paper

Packed runs are two files: runs.csv.gz, a row for each run, and progress.csv.gz, a row for each
evaluation. If a folder has several packs, NAME- stands before both names."""

import hashlib
import json
import math
import os
import shlex
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from itertools import combinations, permutations
from pathlib import Path, PureWindowsPath
from tempfile import TemporaryDirectory

os.environ["MPLBACKEND"] = "agg"  # before matplotlib reads that of a notebook, which may be missing
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import tyro
from matplotlib import font_manager
from matplotlib.ticker import EngFormatter
from pandas import DataFrame
from scipy import special, stats

plt.rcdefaults()  # a matplotlibrc may ask for what is not installed, such as LaTeX
plt.rcParams["text.parse_math"] = False  # a method may be called "$a$b"
plt.rcParams["pdf.fonttype"] = 42  # text stays text, in no Type 3 font, which publishers refuse
plt.rcParams["figure.constrained_layout.use"] = True
warnings.filterwarnings("ignore", "Glyph")  # `rename` has one line on letters without a glyph
sns.set_context("paper", font_scale=0.8, rc={"figure.labelsize": "medium"})

HOW_TO_READ = """Scores are mean returns. "Training" is that of the last 100 training episodes,
averaged since the evaluation before (language models: of the batch). "Last five" needs ten
evaluations. A cell is a method, a task and a kind of noise; its runs differ in seed. 95 %
intervals: where the mean over many seeds may lie."""

BOLD = """the best of a task and noise, if it differs from each method that it is compared with \
(Welch's test, p below 0.05 after Benjamini and Hochberg's correction)"""

COLUMNS = {  # explained above a table that has them
    "cells": "how many cells have both methods",
    "wins": """the probability that a run of the first method beats one of the second, averaged
over cells, with Brunner and Munzel's interval, of the logit, if cells have at least five runs""",
    "runs": "of both methods together",
    "percent": """by how much the first method's mean is higher, where all scores were above 0; by
logarithms, corrected for the bias of few runs, so not the plain ratio; with Welch's interval""",
    "tasks": "over which tasks the percentage is averaged, of how many with the row's noise",
    "points": "the difference in returns, on tasks where a run of either had a return of 0 or less",
    "difference": "the first method's mean minus the second's, with Welch's interval and p",
    "p, corrected": "by Benjamini and Hochberg, for the number of differences in the table",
    "runs for 80 % power": """of each method, if difference and spread are as here; numbers below 5
are too low; 1000: or more""",
}

NOT_WHOLE = """To have a run whole (not a pack), delete its folder and run its command again. Until
then its command and benchmark.sh treat a run with a whole summary.json as finished."""

MEASURES = {  # columns of runs
    "return_mean": "last evaluation",
    "last5": "mean of the last five evaluations",
    "training": "training",
}

# A method's baseline: the first with runs; of sppo-p sppo, of sb3-ppo ppo, else sppo or sa2c
BASELINES = {"sppo": "dppo ppo", "dppo": "ppo", "ppo": ""}
BASELINES |= {"sa2c": "da2c a2c", "da2c": "a2c", "a2c": ""}

# Methods in the order of tables, then variants; others follow, in alphabetical order
COLORS = """\
a2c goldenrod, da2c darkgreen, sa2c navy, ppo tab:orange, dppo tab:green, sppo tab:blue, \
dppo-coef tab:red, ppo-coef firebrick, dppo-norm tab:purple, ppo-norm indigo, ppo-ce tab:pink"""
COLORS = dict(item.split() for item in COLORS.split(", "))

# Columns in which runs of a cell may differ, beside SCORES and PROVENANCE
FREE = "seed run_name runs_dir device compile track gradient_checkpointing capture_video".split()
PROVENANCE = "commit script_sha256 files command started versions hardware".split()
SCORES = ["finished", "return_mean", "return_std", "last5", "training", "sps"]
RUN = ["run_name", "exp_name", "script", "env_id", "noise", "noise_level", "seed", *SCORES]
OWN = ["run_name", "script", *SCORES, *PROVENANCE]  # an argument called so is called "--script"
EVALUATION = ["run_name", "step", "return_mean", "return_std", "length_mean"]
NOISE = "noise and level"  # as no argument can be called
LOWEST = "lowest return"
LAST_STEP = "last step"
EVALUATIONS = "number of evaluations"
PACKAGES = "torch numpy gymnasium mujoco Box2D ale-py transformers stable-baselines3 trl".split()
CELL = [NOISE, "env_id", "exp_name"]
SHOWN = dict(zip(CELL, ["noise", "task", "method"]))
DIFFERENCE = ["measure", "task", "noise", "method", "other"]
DIFFERENCE += ["difference", "low", "high", "p", "runs_for_power"]
LOGGED = ["losses/clipped_gradients", "losses/norm_sign_changes"]  # these get tables
FEW = 5  # with fewer runs a cell, wins have no interval: results/coverage.py
LATEX = str.maketrans({letter: f"\\{letter}" for letter in "&%$#_{}"})
LATEX |= str.maketrans({"~": r"\~{}", "^": r"\^{}", "\\": r"\textbackslash{}"})
EMPTY = ["None", "''", "'nan'"]
RUN_FILES = ["sessions.jsonl", "progress.csv", "summary.json"]


@dataclass
class Args:
    # Folders of runs or of packed runs, or packed runs' NAME-runs.csv.gz
    folders: tyro.conf.Positional[tuple[Path, ...]]
    # Folder for report.md, scores.csv, scores.tex and figures; an earlier report there is replaced
    out: Path = Path("report")
    # Pairs of methods, such as: sppo dppo sppo ppo; default: each method and a baseline. If given,
    # curves and scores.tex are of these methods only
    compare: tuple[tuple[str, str], ...] = ()
    # What methods, tasks and kinds of noise are called, such as: sppo=SPPO Hopper-v4=Hopper
    names: tuple[str, ...] = ()
    # Figures of 3.25 inches, as wide as a column, instead of 6.75, as a page
    narrow: bool = False
    # Also pack the runs, into this folder or as this NAME-runs.csv.gz
    pack: Path | None = None


class Refusal(ValueError):
    """One line that says what is wrong with the input and what to do."""


# ---- Reading and packing


def read_folders(folders: Iterable[Path]) -> tuple[DataFrame, DataFrame, list[str]]:
    """All runs, a row each, their evaluations, and a line for each run or pack that is broken.
    Raises Refusal if a folder is not there, no run has finished, or one is there twice."""
    rows = []
    progress = []
    broken = []
    for folder in folders:
        paths = sorted({file.parent for name in RUN_FILES for file in folder.glob(f"*/{name}")})
        if any((folder / name).exists() for name in RUN_FILES) or tables_of(folder)[0].exists():
            paths.append(folder.resolve())  # "." has no name
        elif not folder.exists():
            raise Refusal(f"{folder}: no such folder")
        elif not paths:  # as runs/quick/logs of runs/quick/*
            print(f"{folder}: no runs in it (for packs, give NAME-runs.csv.gz)", file=sys.stderr)
        below = [file.parents[1] for file in folder.glob("*/*/summary.json")]
        for place in [*below, *folder.glob("*-runs.csv.gz")][:1]:
            print(f"{folder}: {place} is read only if it is given, too", file=sys.stderr)
        for path in paths:
            try:
                found, evaluations = read_run(path)
                rows += found
                progress.append(evaluations)
            except Exception as error:  # a broken file may raise anything
                why = f"{type(error).__name__}: {error}".removeprefix("Refusal: ")
                broken.append(f"{path.name}: left out: {why.replace(str(path), '')}")
    print(*broken, sep="\n", file=sys.stderr, end="\n" if broken else "")
    if not any(row["finished"] for row in rows):
        raise Refusal(f"none of {len(rows)} runs has finished; give folders such as runs/quick")
    runs = DataFrame(rows)
    for name in runs["run_name"][runs["run_name"].duplicated()]:
        raise Refusal(f"{name}: in two places (a pack among its runs?); leave one out")
    return runs, pd.concat(progress, ignore_index=True), broken


def read_csv(path: Path) -> DataFrame:
    """A table, in which a method may have any name, such as "null"."""
    texts = ["run_name", *CELL, *PROVENANCE]
    options = {"low_memory": False, "dtype": dict.fromkeys(texts, str), "keep_default_na": False}
    if pd.__version__.startswith("2"):
        options["float_precision"] = "round_trip"  # the default of later versions
    old_names = {"losses/advantage_sign_flips": "losses/norm_sign_changes"}
    columns = pd.read_csv(path, nrows=0).columns.difference(["run_name", *CELL])
    options["na_values"] = dict.fromkeys(columns, ["", "nan"])
    return pd.read_csv(path, **options).rename(columns=old_names)


def tables_of(pack: Path) -> tuple[Path, Path]:
    """Files of runs and of evaluations, of a folder or of a path to NAME-runs.csv.gz."""
    runs = pack if pack.name.endswith("runs.csv.gz") else pack / "runs.csv.gz"
    return runs, runs.with_name(runs.name.replace("runs.csv", "progress.csv"))


def read_run(path: Path) -> tuple[list[dict], DataFrame]:
    """A list with the run's arguments, SCORES and PROVENANCE, and its evaluations. Of a pack, the
    same of all its runs. Broken files may raise anything."""
    packed, evaluations = tables_of(path)
    if packed.exists():
        runs = read_csv(packed)
        lacking = {*RUN, "total_timesteps", "script_sha256"} - {*runs}
        if lacking:
            raise Refusal(f"no column {min(lacking)} in it")
        runs = runs.reindex(columns=runs.columns.union(PROVENANCE, sort=False))
        progress = read_csv(evaluations)
        lacking = set(runs["run_name"][runs["finished"]]) - set(progress["run_name"])
        if lacking:
            raise Refusal(f"{evaluations.name} does not have {min(lacking)}")
        return runs.to_dict("records"), progress
    lines = (path / "sessions.jsonl").read_text(encoding="utf-8").strip().split("\n")
    sessions = [json.loads(line) for line in lines]
    session = sessions[0]
    hardware = [json.dumps([one[name] for name in ("platform", "cpu", "gpu")]) for one in sessions]
    script_sha256 = hashlib.sha256((path / session["script"]).read_bytes()).hexdigest()
    run = dict.fromkeys([*SCORES, *PROVENANCE])
    for name, value in session["args"].items():
        column = f"--{name}" if name in OWN else name
        run[column] = json.dumps(value) if isinstance(value, (list, dict)) else value
        if repr(value) in EMPTY and name != "exp_name":  # a pack's empty cell: no such flag
            run[column] = repr(value)
    if "env_id" not in run:  # a language model
        run["env_id"] = run.pop("task")
    versions = {name: x for name, x in session["versions"].items() if name in PACKAGES}
    if any(one["versions"] != session["versions"] for one in sessions):
        versions["continued"] = "with other versions"
    others = sorted(session["versions"].items() - versions.items())
    versions["others, SHA-256"] = hashlib.sha256(json.dumps(others).encode()).hexdigest()[:8]
    files = session.get("files", {}).items()
    helpers = [[PureWindowsPath(path).name, x] for path, x in files if x != script_sha256]
    run |= {
        "run_name": path.name,
        "script": session["script"],
        "finished": (path / "summary.json").exists(),
        "started": session["started"],
        "script_sha256": script_sha256,
        "command": shlex.join(session["command"]),
        "files": json.dumps(sorted(helpers)),
        "versions": json.dumps(versions, sort_keys=True),
        "hardware": ", then ".join(dict.fromkeys(hardware)),
        "exp_name": run["exp_name"],
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
        progress.insert(0, "run_name", path.name)
    if run["finished"]:
        summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
        run["sps"] = float(summary["sps"])
        end = progress["step"].max()
        if end != summary["step"]:
            raise Refusal(f"progress.csv: cut at step {end} of {summary['step']}")
        last = progress.iloc[-1]
        run |= dict(last[["return_mean", "return_std"]])
        run["training"] = last.get("charts/episodic_return")
        if len(progress) >= 10:
            run["last5"] = progress["return_mean"].tail(5).mean()
    return [run], progress


def pack(runs: DataFrame, progress: DataFrame, place: Path) -> None:
    """Writes both tables; equal runs give equal bytes. Raises Refusal if it would lose runs."""
    packed, evaluations = tables_of(place)
    if packed.exists():
        old = read_csv(packed)
        lost = set(old["run_name"]) - set(runs["run_name"])
        lost |= set(old["run_name"][old["finished"]]) - set(runs["run_name"][runs["finished"]])
        if lost:
            raise Refusal(f"--pack {place}: it would lose runs, such as {min(lost)}; read it, too")
    packed.parent.mkdir(parents=True, exist_ok=True)
    settings = runs.columns.difference([*RUN, *PROVENANCE], sort=False)
    options = {"index": False, "lineterminator": "\n"}
    options["compression"] = {"method": "gzip", "mtime": 0}
    tables = {packed: runs.reindex(columns=[*RUN, *settings, *PROVENANCE])}
    tables[evaluations] = progress[list(dict.fromkeys([*EVALUATION, *progress]))]
    with TemporaryDirectory(dir=packed.parent) as folder:  # a full disk destroys no pack
        for file, table in tables.items():
            table.to_csv(Path(folder, file.name), **options)
        for file in tables:
            os.replace(Path(folder, file.name), file)


# ---- What is compared


def label_runs(runs: DataFrame, progress: DataFrame) -> DataFrame:
    """Finished runs with NOISE ("clean" or noise and level), LOWEST, LAST_STEP, EVALUATIONS, and
    columns of `progress`, after "logged" if their name is taken: "losses/..." as means over a run,
    others as in the last evaluation. Columns of CELL are categories. Raises Refusal if a cell is
    mixed."""
    finished = runs[runs["finished"]].copy()
    clean = finished["noise"] == "none"
    finished["noise_level"] = finished["noise_level"].mask(clean, 0.0)
    noisy = finished["noise"] + finished["noise_level"].map(" {:g}".format)
    finished[NOISE] = noisy.mask(clean, "clean")
    for cell, group in finished.groupby(CELL):
        check_cell(" ".join(cell), group)
    evaluations = progress.groupby("run_name")
    last = evaluations.tail(1).set_index("run_name")
    lowest = finished["run_name"].map(evaluations["return_mean"].min())
    finished[LOWEST] = np.fmin(lowest, finished["training"].astype(float))
    finished[LAST_STEP] = finished["run_name"].map(last["step"])
    finished[EVALUATIONS] = finished["run_name"].map(evaluations.size())
    taken = [*finished, *MEASURES.values(), "a score"]
    for name in progress.columns.difference(EVALUATION):
        values = evaluations[name].mean() if "/" in name else last[name]
        column = f"logged {name}" if name in taken else name
        finished[column] = finished["run_name"].map(values)
        if name == "success_rate":  # some environments say it only of a success
            is_known = finished.groupby("env_id")[column].transform("count") > 0
            finished.loc[is_known, column] = finished.loc[is_known, column].fillna(0)
    noise = finished.sort_values(["noise_level", NOISE])[NOISE].unique()
    orders = [noise, sorted(set(finished["env_id"])), in_order(finished["exp_name"])]
    for name, order in zip(CELL, orders):
        finished[name] = pd.Categorical(finished[name], order)
    return finished.sort_values([*CELL, "seed"])


def rename(runs: DataFrame, pairs: list, names: tuple) -> list:
    """Renames categories of `runs` by `names`, such as "sppo=SPPO", and returns the renamed pairs.
    Raises Refusal for what is not there, and for equal names. Prints letters that figures lack."""
    there = {name for column in CELL for name in runs[column].cat.categories}
    new = dict(zip(there, there))
    for text in names:
        old = max((name for name in there if text.startswith(name + "=")), default=None)  # longest
        if old is None or text == old + "=":
            raise Refusal(f"--names {text}: not NAME=SHOWN; there are {', '.join(sorted(there))}")
        new[old] = text.removeprefix(old + "=")
    if len(set(new.values())) < len(there):
        raise Refusal(f"--names {' '.join(names)}: two would be called the same")
    font = font_manager.get_font(font_manager.findfont("sans"))
    lacking = set("".join(new.values())) - set(map(chr, font.get_charmap()))
    if lacking:
        print("figures lack letters (use --names):", *sorted(lacking), file=sys.stderr)
    for column in CELL:
        runs[column] = runs[column].cat.rename_categories(new)
    return [(new[a], new[b]) for a, b in pairs]


def check_cell(cell: str, runs: DataFrame) -> None:
    """Raises Refusal if `runs` of one cell differ in a setting, or have the same seed. A
    flag that another version of the script lacks is no difference."""
    for name in runs.columns.difference([*FREE, *SCORES, *PROVENANCE]):
        values = runs[name].map(plain).where(runs[name].notna())  # a pack has other types
        lacking = runs["script_sha256"][values.isna()]
        others = runs["script_sha256"][values.notna() & ~values.isin(EMPTY)]  # not in older packs
        if values.nunique() > 1 or lacking.isin(others).any():
            rare = values.map(values.value_counts(dropna=False)).idxmin()
            several = ", ".join(map(str, runs[name].unique()))
            found = f"{name} ({several}), such as {runs['run_name'][rare]}"
            raise Refusal(f"{cell}: runs differ in {found}; report them separately")
    twice = " and ".join(runs["run_name"][runs["seed"].duplicated(keep=False)])
    if twice:
        raise Refusal(f"{cell}: the same seed in {twice}; leave one out")


def in_order(methods) -> list[str]:
    """Each method once: the known ones first; variants, such as dppo-norm, after their method."""
    rank = {name: place for place, name in enumerate(COLORS)}
    return sorted(set(methods), key=lambda name: (rank.get(name.partition("-")[0], 99), name))


def colors_of(methods: Iterable, shown: Iterable) -> dict:
    """The colours of methods, by the names that they are shown with."""
    others = [name for name in methods if name not in COLORS]
    palette = sns.husl_palette(len(others), h=0.49, l=0.5)  # far from COLORS
    colors = COLORS | dict(zip(others, palette))
    return {name: colors[method] for method, name in zip(methods, shown)}


def cells_of(runs: DataFrame, measure: str) -> dict:
    """{(noise, task): {method: scores (seeds,)}} of runs that have the measure."""
    cells = {}
    there = runs.dropna(subset=measure)
    for (noise, task, method), scores in there.groupby(CELL, observed=True)[measure]:
        cells.setdefault((noise, task), {})[method] = scores.to_numpy(float)
    return cells


def pairs_of(runs: DataFrame, compare: Iterable[tuple]) -> list:
    """Pairs of methods to compare. Raises Refusal for a pair that no task has."""
    cells = cells_of(runs, "return_mean").values()
    together = {pair for cell in cells for pair in permutations(cell, 2)}
    chosen = list(dict.fromkeys(compare))
    for a, b in chosen:
        if (a, b) not in together:
            there = ", ".join(in_order(runs["exp_name"]))
            raise Refusal(f"--compare {a} {b}: no task has both; before --names, there are {there}")
    if not chosen:
        for method in in_order(runs["exp_name"]):
            baselines = BASELINES.get(method, f"{method.replace('-', ' ', 1)} sppo sa2c")
            there = [(method, other) for other in baselines.split() if (method, other) in together]
            chosen += there[:1]
    return chosen


def versions_of(run) -> dict[str, str]:
    """What the run may have in another version than other runs. Older packs lack files."""
    versions = {run.script: run.script_sha256, "packages": run.versions}
    if isinstance(run.files, str):
        helpers = json.loads(run.files)
        versions[f"{run.script}'s imports"] = " ".join(name for name, _ in helpers)
        for name, digest in helpers:
            versions[name] = versions.get(name, "") + digest  # of all files of that name
    return versions


def remarks(runs: DataFrame, pairs: list) -> list:
    """Paragraphs: first what is compared, then methods without bins, those that lack their partner
    in a task, as games lack a baseline of control, and tasks whose runs differ in files, packages,
    steps or evaluations."""
    compared = ", ".join(f"{a} with {b}" for a, b in pairs)
    page = [f"Compared: {compared or 'nothing'}."]
    if "policy" in runs:
        names = runs.loc[runs["policy"] == "gaussian", "exp_name"].unique()
        page.append(f"Without bins (Gaussian policy): {', '.join(names) or 'none'}.")
    for task, group in runs.groupby("env_id", observed=True):
        methods = set(group["exp_name"])
        there = [pair for pair in pairs if methods.issuperset(pair)]
        of_interest = set(sum(pairs, ())) if there else methods
        alone = methods & of_interest - set(sum(there, ()))
        if len(methods) > 1 and alone:
            names = ", ".join(in_order(alone))
            page.append(f"**Not compared: {task}: {names}: name a pair with `--compare`.**")
        versions = DataFrame(map(versions_of, group.itertuples())).nunique()
        unlike = [f"versions of {name}" for name in versions.index[versions > 1]]
        for column in (LAST_STEP, EVALUATIONS):  # "Training" is averaged between evaluations
            least, most = group[column].min(), group[column].max()
            if most > 1.01 * least:  # else rounded up to whole rollouts
                unlike.append(f"{column} {least:,.0f} to {most:,.0f}")
        if unlike:
            page.append(f"**Not alike: {task}: {', '.join(unlike)}.**")
    return page


# ---- Statistics


def placements(a, b):
    """For each run of `a` (..., n) the share of the runs `b` (..., m) that it beats, ties half."""
    a = a[..., :, None]
    b = b[..., None, :]
    return ((a > b).mean(axis=-1) + (a >= b).mean(axis=-1)) / 2


def win_rate(cells: list):
    """Probability that a run of the first beats one of the second, the mean over `cells`, pairs of
    scores (..., runs), and its 95 % interval by Brunner and Munzel (Biometrical Journal 42, 2000):
    as long as Welch's for the difference in placements, but for the logit. So it holds the truth
    near 0 and 1, too, and is cautious with few runs. No interval if no placement varies."""
    both = [(placements(a, b), placements(b, a)) for a, b in cells]
    difference, _, high, _ = pooled_difference(both, mean_and_variance)
    value = (1 + difference) / 2
    with np.errstate(invalid="ignore"):  # no interval
        half = (high - difference) / (value * (1 - value))
    return value, *special.expit(special.logit(value) + np.array([-half, half]))


def mean_and_variance(scores):
    """The mean of `scores` (..., runs), and its variance, 0 of a single score: (...,) each."""
    runs = scores.shape[-1]
    variance = scores.var(-1, ddof=min(1, runs - 1)) / runs
    return scores.mean(-1), np.where(np.ptp(scores, -1) == 0, 0, variance)  # not a rounding error


def log_mean_and_variance(scores):
    """The logarithm of the mean, above 0, of `scores` (..., runs), and its variance: (...,) each.
    The logarithm of a sample's mean is too low on average. The added term is the bias, exact if the
    mean is lognormal. Variances are too small where means are too large, hence `1 +`."""
    mean, variance = mean_and_variance(scores)
    relative = variance / mean**2
    return np.log(mean) + np.log1p(relative) / 2, relative * (1 + relative)


def pooled_difference(cells: list, moments):
    """Mean over `cells`, pairs of scores (..., runs), of the difference in a value, its 95 %
    interval and two-sided p by Welch and Satterthwaite: (...,) each. `moments` gives the value and
    its variance. Interval and p are nan for single or equal scores, all are without cells."""
    if not cells:
        return np.full(4, np.nan)
    scores = [one for pair in cells for one in pair]
    values, variances = zip(*map(moments, scores))
    freedom = [one.shape[-1] - 1 for one in scores]
    value = np.mean(np.subtract(values[::2], values[1::2]), axis=0)
    variances = np.stack(variances, axis=-1)
    total = variances.sum(axis=-1)
    error = np.sqrt(total) / len(cells)
    with np.errstate(divide="ignore", invalid="ignore"):  # a single score, or no variance: nan
        degrees = total**2 / (variances**2 / freedom).sum(axis=-1)
        half = error * stats.t.ppf(0.975, degrees)
        p = 2 * stats.t.sf(np.abs(value) / error, degrees)
    return value, value - half, value + half, p


def runs_for_power(a, b):
    """Runs of each method that detect a difference like that of scores `a` and `b` with 80 % power:
    t's quantiles 0.975 and 0.8 times the standard error are at most as large. 1000: or more."""
    runs = np.arange(2, 1000)
    variances = np.array([a.var(ddof=1), b.var(ddof=1)])
    errors = np.sqrt(variances.sum() / runs)
    degrees = (runs - 1) * variances.sum() ** 2 / (variances**2).sum()
    detected = errors * (stats.t.ppf(0.975, degrees) + stats.t.ppf(0.8, degrees))
    return runs[detected <= abs(a.mean() - b.mean())].min(initial=1000)


def make_differences(runs: DataFrame, pairs: list) -> DataFrame:
    """Every method minus every other one of its task and noise, in each of MEASURES, with Welch's
    test; for `pairs` also p as corrected by Benjamini and Hochberg for their number. What cannot be
    tested, single or equal scores, counts there with p = 1."""
    rows = []
    for measure, title in MEASURES.items():
        for (noise, task), cell in cells_of(runs, measure).items():
            for b, a in combinations(cell, 2):
                if (b, a) in pairs:
                    a, b = b, a
                found = pooled_difference([(cell[a], cell[b])], mean_and_variance)
                tested = not np.isnan(found[-1])
                needed = runs_for_power(cell[a], cell[b]) if tested else pd.NA
                rows.append([title, task, noise, a, b, *found, needed])
    differences = DataFrame(rows, columns=DIFFERENCE).astype({"runs_for_power": "Int64"})
    differences["task"] = pd.Categorical(differences["task"], runs["env_id"].cat.categories)
    differences = differences.sort_values("p", ignore_index=True)
    chosen = [pair in pairs for pair in zip(differences["method"], differences["other"])]
    p = differences.loc[chosen, "p"].astype(float)
    differences.loc[chosen, "p_corrected"] = stats.false_discovery_control(p.fillna(1))
    return differences


def make_scores(runs: DataFrame, measures: list[str], differences: DataFrame) -> DataFrame:
    """Mean, standard error, runs, their seeds, 95 % interval by t and text of each cell in each
    measure. `bold`: as BOLD says, by `differences`, of which the best has at least one."""
    each = runs[[*CELL, "seed", *measures]].rename(columns=MEASURES)
    each = each.melt([*CELL, "seed"], var_name="measure", value_name="a score")
    each = each.dropna().astype({"a score": float})
    cells = each.groupby(["measure", *CELL], observed=True, sort=False)
    scores = cells["a score"].agg(mean="mean", standard_error="sem", runs="size")
    scores["seeds"] = cells["seed"].agg(list)
    scores = scores.reset_index().rename(columns=SHOWN)
    half = scores["standard_error"] * stats.t.ppf(0.975, scores["runs"] - 1)
    scores = scores.assign(low=scores["mean"] - half, high=scores["mean"] + half)
    place = ["measure", "task", "noise"]
    best = scores.groupby(place, observed=True)["mean"].transform("max")
    both_ways = pd.concat([differences, differences.assign(method=differences["other"])])
    p = both_ways.groupby([*place, "method"], observed=True)["p_corrected"].max()
    p = scores.join(p, on=[*place, "method"])["p_corrected"]
    scores["bold"] = (scores["mean"] == best) & (p < 0.05)
    both = scores[["mean", "standard_error"]].to_numpy()
    scores["text"] = [" ± ".join(digits(error, mean, error)) for mean, error in both]
    return scores


# ---- Tables


def markdown(table: DataFrame) -> str:
    rows = [table.columns, ["---"] * len(table.columns), *table.to_numpy()]
    rows = [[text.replace("|", r"\|") for text in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def explained(table: DataFrame) -> list:
    """What the columns of a table mean, and the table, without columns that have no text."""
    table = table.loc[:, (table != "").any()]
    lines = [f"- *{name}*: {COLUMNS[name]}." for name in table if name in COLUMNS]
    return ["\n".join(lines), markdown(table)]


def digits(error, *values, least=-99):
    """Those values that are not nan as texts, with the decimal places that two digits of the error
    need, at least `least`. Without an error, the first value has four digits."""
    if not error > 1e-9 * abs(values[0]):  # nan, or less than rounding
        error = values[0] / 100
    places = max(1 - Decimal(f"{error:.1e}").adjusted(), least)
    there = [round(value, places) + 0.0 for value in values if not np.isnan(value)]  # no -0
    return [f"{value:,.{max(places, 0)}f}" for value in there]


def estimate(value, low, high, least=-99):
    """A value with its interval, if it has one; empty for nan."""
    texts = digits((high - low) / 2, value, low, high, least=least)
    return "{} ({} to {})".format(*texts) if len(texts) == 3 else "".join(texts)


def notes(scores: DataFrame) -> list:
    """A sentence on the seeds that cells lack, if others have them."""
    seeds = set().union(*scores["seeds"])
    lines = []
    for row in scores[scores["seeds"].map(len) < len(seeds)].itertuples():
        missing = ", ".join(map(str, sorted(seeds.difference(row.seeds))))
        lines.append(f"{row.method} in {row.task}, {row.noise}: {missing}")
    return [f"Missing seeds: {'; '.join(lines)}."] if lines else []


def score_text(scores: DataFrame) -> list:
    """A table for each measure, tasks and noise down, methods across, after its title."""
    page = []
    shown = scores.assign(text=scores["text"].mask(scores["bold"], "**" + scores["text"] + "**"))
    for measure, part in shown.groupby("measure", sort=False):
        table = part.pivot(index=["task", "noise"], columns="method", values="text").fillna("")
        title = f"`{measure}`, mean over the run" if "/" in measure else measure.capitalize()
        title += "" if "/" in measure or measure in MEASURES.values() else ", last evaluation"
        table = table.reset_index(allow_duplicates=True).astype(str)
        page += [f"{title} (runs: {part['runs'].max()}):", markdown(table), *notes(part)]
    return page


def latex(scores: DataFrame, compared: str, narrow: bool) -> str:
    """A LaTeX table of last evaluations: tasks down, methods across, noise across or, if this is
    too wide, down. The caption ends with the sentence `compared`."""
    runs = scores["runs"]
    texts = scores["text"].str.replace("±", r"$\pm$").str.replace("-", "$-$")
    texts = texts.mask(scores["bold"], r"\textbf{" + texts + "}")
    most = runs.max()
    texts = texts.mask(runs < most, texts + "$^*$")
    down = ["task"]
    across = ["noise", "method"]
    if narrow or len(scores[across].drop_duplicates()) > 7:
        down.append(across.pop(0))
    table = scores.assign(text=texts).pivot(index=down, columns=across, values="text").fillna("")
    table = table.rename_axis(index=[None] * len(down), columns=[None] * len(across))
    style = table.style.format_index(escape="latex").format_index(escape="latex", axis="columns")
    caption = rf"Last evaluation: mean return $\pm$ standard error over {most} runs. Bold: {BOLD}. "
    caption += compared.translate(LATEX)
    options = {"position": "t", "position_float": "centering", "multicol_align": "c"}
    options["environment"] = "table" if narrow else "table*"
    options["column_format"] = f"@{{}}{'l' * len(down)}{'r' * len(table.columns)}@{{}}"
    options |= {"sparse_index": False, "label": "tab:scores"}
    text = style.to_latex(hrules=True, caption=caption, **options)
    size = "\\scriptsize\\setlength{\\tabcolsep}{2pt}" if narrow else "\\small"
    text = "% \\usepackage{booktabs}\n" + text.replace("\\centering", f"\\centering{size}")
    note = f"\\\\[1ex]\n$^*$ fewer runs, at least {runs.min()}" if runs.nunique() > 1 else ""
    return text.replace("\\end{tabular}", "\\end{tabular}" + note)


def pooled_text(runs: DataFrame, pairs: list) -> list:
    """Paragraphs on all pairs: a table, which has each kind of noise, too, after its columns."""
    if not pairs:
        return ["No method has a baseline here; `--compare A B` compares two of them."]
    parts = dict(list(runs.groupby(NOISE, observed=True)))
    parts = {"all": runs} | parts if len(parts) > 1 else parts
    rows = []
    for a, b in pairs:
        both = runs[runs["exp_name"].isin([a, b])]
        signed = set(both.loc[both[LOWEST] <= 0, "env_id"])
        for noise, part in parts.items():
            for measure, title in MEASURES.items():
                found = pool(cells_of(part, measure), a, b, signed, part["env_id"].nunique())
                if found:
                    place = {"methods": f"{a} against {b}", "noise": noise, "measure": title}
                    rows.append(place | found)
    return explained(DataFrame(rows))


def pool(cells: dict, a: str, b: str, signed: set, tasks: int) -> dict:
    """A row of a table, over the cells that both have: how often a beats b, and their difference in
    percent; in points in all cells of `signed` tasks, else only cells ruined by noise drop out."""
    groups = {}  # by task
    for (_, task), cell in cells.items():
        if a in cell and b in cell:
            groups.setdefault(task, []).append((cell[a], cell[b]))
    if not groups:
        return {}
    both = sum(groups.values(), [])
    positive = {task: group for task, group in sorted(groups.items()) if task not in signed}
    points = []
    for task in sorted(signed & groups.keys()):
        found = pooled_difference(groups[task], mean_and_variance)[:3]
        points.append(f"{estimate(*found)} in {task}")
    logarithms = pooled_difference(sum(positive.values(), []), log_mean_and_variance)[:3]
    rate, low, high = win_rate(both)
    sizes = [len(scores) for pair in both for scores in pair]
    names = f": {', '.join(positive)}" if len(positive) < tasks else ""
    return {
        "cells": str(len(both)),
        "runs": str(sum(sizes)),
        "wins": estimate(rate, low, high) if min(sizes) >= FEW else f"{rate:.2f}",
        "percent": estimate(*100 * np.expm1(logarithms), least=1),
        "tasks": f"{len(positive)} of {tasks}{names}" if positive else "",
        "points": ", ".join(points),
    }


def difference_text(differences: DataFrame) -> list:
    """Paragraphs: how many differences have small p-values, also after correction; a table."""
    rows = []
    for row in differences.itertuples():
        texts = [row.task, row.noise, row.measure, f"{row.method} minus {row.other}"]
        tested = [f"{row.p:.2g}", f"{row.p_corrected:.2g}", str(row.runs_for_power)]
        tested = [""] * 3 if np.isnan(row.p) else tested
        rows.append([*texts, estimate(row.difference, row.low, row.high), *tested])
    small, remaining = (differences[["p", "p_corrected"]] < 0.05).sum()
    text = f"{small} of {len(rows)} differences have p < 0.05, {remaining} also after correction. "
    text += "Differences between all methods are in differences.csv."
    columns = ["task", "noise", "measure", "methods", "difference", "p", "p, corrected"]
    table = DataFrame(rows, columns=[*columns, "runs for 80 % power"])
    return ["## Differences, task by task", text, *explained(table)]


def plain(value) -> str:
    """Numbers without a needless ".0", also where a pack has them as texts."""
    try:
        return f"{float(str(value)):.12g}"
    except ValueError:
        return str(value)


def provenance_text(runs: DataFrame, arguments, unfinished: list, broken: list) -> list:
    """Paragraphs on what was run, what is not whole, whether it is one version of a script, and in
    which of the columns `arguments` runs of a task differ."""
    page = []
    if broken:
        page.append(f"**Not whole: {len(broken)}.** {NOT_WHOLE}")
        page.append("\n".join(f"- `{line}`" for line in broken))
    if unfinished:
        how = "The same commands continue them, or say again why they fail:"
        page.append(f"**Begun, not finished, not in scores: {len(unfinished)}.** {how}")
        page.append(", ".join(unfinished))
    origin = runs[["script", "total_timesteps", *PROVENANCE]].drop(columns=["command", "started"])
    origin = origin.dropna(axis=1, how="all").map(str).replace(["nan", "None"], "not recorded")
    origin.insert(0, "method", runs["exp_name"].astype(str))
    page.append(markdown(origin.value_counts().reset_index(name="runs").astype(str)))
    texts = runs[arguments].map(plain).where(runs[arguments].notna(), "")  # "": flag lacking
    cells = texts.groupby([runs[name] for name in CELL], observed=True).max()
    differ = cells.groupby("env_id", observed=True).nunique().max() > 1
    by_method = cells.loc[:, differ].groupby("exp_name", observed=True)
    table = by_method.agg(lambda values: ", ".join(sorted(set(values) - {""}))).T
    if len(table):
        table = table.rename_axis("argument").reset_index(allow_duplicates=True)
        page += ["Arguments in which runs of a task differ:", markdown(table.astype(str))]
    return page


# ---- Figures


def make_panels(count: int, columns: int, height: float, narrow: bool, **options):
    """A figure as wide as a page or a column of text, and `count` axes in it, `height` inches."""
    columns = min(columns, 2 if narrow else 4)
    rows = math.ceil(count / columns)
    size = (3.25 if narrow else 6.75, rows * height)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, **options)
    for ax in axes.flat[count:]:
        ax.remove()
    return figure, axes.flat[:count]


def save(figure, file: Path, title: str) -> list:
    """As PNG and PDF. Returns the Markdown that shows it."""
    figure.savefig(file.with_suffix(".png"), dpi=200)
    figure.savefig(file.with_suffix(".pdf"))
    plt.close(figure)
    return [f"![{title}]({file.name}.png)"]


def draw_curves(runs, progress, colors: dict, file: Path, narrow: bool) -> list:
    """A panel for each task and kind of noise. Returns the Markdown. Its numbers are in a CSV."""
    curves = runs[["run_name", *CELL]].merge(progress[EVALUATION[:3]]).rename(columns=SHOWN)
    points = curves.groupby(["noise", "task", "method", "step"], observed=True)["return_mean"]
    points.agg(["mean", "sem", "size"]).to_csv(file.with_suffix(".csv"))
    rows_first = ["task", "noise"] if narrow else ["noise", "task"]
    panels = [panel for _, panel in curves.groupby(rows_first, observed=True)]
    columns = curves[rows_first[1]].nunique()
    figure, axes = make_panels(len(panels), columns if columns > 1 else len(panels), 1.7, narrow)
    for ax, panel in zip(axes, panels):
        options = {"hue": "method", "palette": colors, "errorbar": "se", "legend": False}
        sns.lineplot(panel, x="step", y="return_mean", ax=ax, **options)
        ax.set(title="\n".join(panel.iloc[0][["task", "noise"]]), xlabel="", ylabel="")
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))  # 500k, 1M
    is_text = "policy_model" in runs and runs["policy_model"].notna().all()
    figure.supxlabel("texts" if is_text else "steps")
    figure.supylabel("return of evaluations")
    methods = [name for name in colors if name in set(curves["method"])]
    lines = [plt.Line2D([], [], color=colors[name]) for name in methods]
    options = {"loc": "outside upper center", "columnspacing": 1}
    width = figure.legend(lines, methods, **options).get_window_extent().width
    figure.legends[0].remove()
    columns = int(figure.bbox.width / width) or 1
    figure.legend(lines, methods, ncols=columns, **options)
    figure.set_figheight(figure.get_figheight() + 0.15 * math.ceil(len(methods) / columns))
    return save(figure, file, "Learning curves")


def draw_differences(differences: DataFrame, file: Path, narrow: bool) -> list:
    """A panel for each task. Returns the Markdown that shows it."""
    names = differences["method"] + "\nminus " + differences["other"] + ", " + differences["noise"]
    heights, labels = pd.factorize(names, sort=True)
    panels = list(differences.assign(height=heights).groupby("task", observed=True))
    height = 0.6 + 0.3 * len(labels)
    figure, axes = make_panels(len(panels), len(panels), height, narrow, sharey=True)
    for ax, (task, panel) in zip(axes, panels):
        half = panel["high"] - panel["difference"]
        ax.errorbar(panel["difference"], panel["height"], xerr=half, fmt="ok", capsize=3)
        ax.axvline(0, linestyle="--", color="gray")
        ax.set(title=task, yticks=range(len(labels)), yticklabels=labels)
        ax.set_ylim(len(labels) - 0.5, -0.5)
        ax.locator_params(axis="x", nbins=3)
    figure.supxlabel("difference in the last evaluation")
    return save(figure, file, "Differences in the last evaluation, with 95 % intervals")


def main(args: Args) -> None:
    """Reads all runs and writes report.md and what it shows. Raises Refusal, OSError."""
    out = args.out.expanduser()
    there = {path.name for path in out.glob("[!.]*")}
    if there and not there & {"report.md", "differences.csv", "runs.csv.gz"}:
        raise Refusal(f"--out {out}: a folder that is not a report; choose another")
    everything, progress, broken = read_folders([path.expanduser() for path in args.folders])
    runs = label_runs(everything, progress)
    methods = runs["exp_name"].cat.categories
    pairs = rename(runs, pairs_of(runs, args.compare), args.names)
    colors = colors_of(methods, runs["exp_name"].cat.categories)
    differences = make_differences(runs, pairs)
    others = runs.columns.difference([*everything, NOISE, LOWEST, LAST_STEP, EVALUATIONS])
    scores = make_scores(runs, [*MEASURES, *others], differences)
    if args.pack and broken:
        raise Refusal("--pack: delete the runs that are left out (named above), or run them again")
    if args.pack:
        pack(everything, progress, args.pack.expanduser())
    out.mkdir(parents=True, exist_ok=True)
    for path in out.glob("differences.p*"):  # of an earlier report
        path.unlink()
    differences.to_csv(out / "differences.csv", index=False)
    scores.to_csv(out / "scores.csv", index=False)
    chosen = set(sum(pairs, ())) if args.compare else set(colors)
    drawn = runs[runs["exp_name"].isin(chosen)]
    last = scores["measure"] == "last evaluation"
    said = remarks(drawn, pairs)
    paper = latex(make_scores(drawn, ["return_mean"], differences), said[0], args.narrow)
    comments = "".join(f"% {remark}\n" for remark in said)
    (out / "scores.tex").write_text(comments + paper, encoding="utf-8")
    page = ["# Report", HOW_TO_READ, "## Scores", f"Mean ± standard error over runs. Bold: {BOLD}."]
    page += score_text(scores[last]) + remarks(runs, pairs)
    page += ["## Learning curves", "Evaluations, mean and, shaded, standard error over runs:"]
    page += draw_curves(drawn, progress, colors, out / "curves", args.narrow)
    page += ["## Differences over tasks, uncorrected", *pooled_text(runs, pairs)]
    compared = differences.dropna(subset="p_corrected")
    shown = compared[compared["measure"] == "last evaluation"]
    if shown["p"].notna().any():
        page += draw_differences(shown, out / "differences", args.narrow)
    if compared["p"].notna().any():
        page += difference_text(compared)
    shown = ~last & (scores["measure"].isin(LOGGED) | ~scores["measure"].str.contains("/"))
    page += ["## Other measures", "Of these, only returns are tested.", *score_text(scores[shown])]
    unfinished = everything["run_name"][~everything["finished"]]
    arguments = everything.columns.difference([*FREE, *RUN, *PROVENANCE])
    page += ["## What was run", *provenance_text(runs, arguments, list(unfinished), broken)]
    (out / "report.md").write_text("\n\n".join(page) + "\n", encoding="utf-8")
    print(out / "report.md")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # for letters that a terminal does not have
    try:
        main(tyro.cli(Args))
    except (Refusal, OSError) as error:
        sys.exit(f"error: {error}")
