"""Turns finished runs into tables, statistics over all tasks and learning curves, in a folder:
report/.

    python report.py runs/quick                              # all that benchmark.sh left there
    python report.py runs/continuous/Hopper-v4__* --out hopper

A program is a script with those of its settings that are compared: DPPO; SPPO; DPPO, max-grad-norm
/ k, where k = alpha + beta |Z| is that of the symmetric runs there. A cell is a program on an
environment with one kind and level of noise; its runs differ in the seed and nothing else, or there
is no report. It shows the last evaluation, mean ± standard error over seeds. A cell that lacks
seeds which others have shows how many it has, and no mean: --seeds compares on fewer. Bold is the
best of a row, if the row is complete and Welch's t-test finds it better than every other program,
each at 5 %, two-sided; "alpha k", the same program as the symmetric one, does not compete.

Over all tasks, by the library rliable (Agarwal et al., NeurIPS 2021): interquartile mean of
normalised scores and probability of improvement, with 95 % stratified bootstrap intervals, which a
handful of seeds makes too narrow. Atari scores are normalised by those of a random and a human
player (Wang et al., ICML 2016), others by the worst (0) and the best run (1) of the environment
here, all programs and noises together: they compare within a report only."""

import ast
import json
import math
import shlex
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

try:
    import matplotlib.pyplot as plt
    import pandas as pd
    from rliable import library as rly
    from rliable import metrics
    from scipy import stats
except ImportError as error:
    sys.exit(f"error: {error}; install what reports need: pip install -e '.[report]'")

plt.switch_backend("agg")

# Settings that make another method of the same script, named by their flags where not the default
SWEPT = ["learning_rate", "clip_coef", "update_epochs"]
COMPARED = [*SWEPT, "max_grad_norm", "vf_coef", "ent_coef", "ce_coef", "norm_adv", "layer_norm"]
COMPARED += ["reward_model", "reward_aggregate", "correct_flips", "divide_by_p_old"]
WEIGHTS = ["alpha", "beta", "z"]
CELL = ["script", "env_id", "noise", "noise_level", "algo", "policy", *WEIGHTS, *COMPARED]
# What may differ within a cell: it has no part in what is learnt, or is the result
FREE = [
    "seed",
    "run_name",
    "runs_dir",
    "resume",
    "device",
    "compile",
    "track",
    "capture_video",
    "log_freq",
]
FREE += ["checkpoint_freq", "micro_batch_size", "finished", "sps", "wall_s", "train_return_last100"]
FREE += ["first_return_mean", "final_return_mean", "final_return_std"]
NEEDED = [
    "script",
    "algo",
    "env_id",
    "seed",
    "noise",
    "noise_level",
    "alpha",
    "beta",
    "z",
    "run_name",
]
NEEDED += ["total_timesteps", "final_return_mean", "train_return_last100", "sps", "wall_s"]
EVALUATION = ["step", "return_mean", "return_std", "length_mean", "episodes"]
SCRIPTS = [
    "sa2c_atari.py",
    "sa2c_continuous.py",
    "sppo_atari.py",
    "sppo_continuous.py",
    "sppo_rlhf.py",
]
ALGOS = ["a2c", "da2c", "sa2c", "ppo", "dppo", "sppo"]
ROW = ["kind", "family", "noise", "env_id"]

RANDOM_AND_HUMAN = {  # raw scores
    "Alien": (227.8, 7127.7),
    "Amidar": (5.8, 1719.5),
    "Assault": (222.4, 742.0),
    "Asterix": (210.0, 8503.3),
    "BeamRider": (363.9, 16926.5),
    "Boxing": (0.1, 12.1),
    "Breakout": (1.7, 30.5),
    "Centipede": (2090.9, 12017.0),
    "CrazyClimber": (10780.5, 35829.4),
    "DemonAttack": (152.1, 1971.0),
    "Freeway": (0.0, 29.6),
    "Frostbite": (65.2, 4334.7),
    "Gopher": (257.6, 2412.5),
    "Krull": (1598.0, 2665.5),
    "KungFuMaster": (258.5, 22736.3),
    "MsPacman": (307.3, 6951.6),
    "Pong": (-20.7, 14.6),
    "Qbert": (163.9, 13455.0),
    "RoadRunner": (11.5, 7845.0),
    "Seaquest": (68.4, 42054.7),
    "SpaceInvaders": (148.0, 1668.7),
    "WizardOfWor": (563.5, 4756.5),
}


@dataclass
class Args:
    runs: tyro.conf.Positional[
        tuple[Path, ...]
    ]  # folders of runs, as benchmark.sh leaves them, or runs
    out: Path = Path("report")  # folder to write; an earlier report there is replaced
    seeds: int | None = None  # compare on the first so many seeds; default: all that there are
    logged: tuple[str, ...] = (
        "losses/advantage_sign_flips",
        "losses/clipped_gradients",
    )  # TensorBoard tags
    keep: Path | None = (
        None  # also copy finished runs here, small enough for git; report.py reads them
    )
    reps: int = 10_000  # bootstrap samples of statistics over all tasks


class Refusal(ValueError):
    """What is wrong with what was given, in one line, and what to do."""


# Reading


def read_json(path: Path, needed: list[str]) -> dict:
    """What is in `path`. Raises Refusal if it is no JSON, or lacks one of the keys `needed`."""
    again = "delete the run's folder and run it again"
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise Refusal(f"{path}: corrupt ({error}); {again}") from error
    for key in needed:
        if not isinstance(content, dict) or key not in content:
            raise Refusal(f"{path}: no {key!r}; {again}")
    return content


def read_logged(path: Path, tags: tuple[str, ...]) -> dict[str, pd.DataFrame]:
    """What a run logged: {tag: columns step, value}, without tags that it did not log. From
    logged.csv, where `keep_runs` has left one, else from TensorBoard's files."""
    if (path / "logged.csv").exists():
        everything = pd.read_csv(path / "logged.csv")
        groups = {tag: group[["step", "value"]] for tag, group in everything.groupby("tag")}
        return {tag: groups[tag] for tag in tags if tag in groups}
    events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
    logged = {}
    for tag in tags:
        if tag in events.Tags()["scalars"]:
            # after resuming the last value of a step counts
            values = {event.step: event.value for event in events.Scalars(tag)}
            logged[tag] = pd.DataFrame({"step": list(values), "value": list(values.values())})
    return logged


def keep_runs(runs: pd.DataFrame, folder: Path) -> None:
    """Copies runs without checkpoints and without TensorBoard's files; of these, logged.csv has the
    tags that were read, as means over blocks of a hundredth of the run."""
    for _, run in runs.iterrows():
        target = folder / run["name"]
        target.mkdir(parents=True, exist_ok=True)
        for name in ("args.json", "progress.csv", "summary.json"):
            shutil.copy(run["path"] / name, target)
        parts = []
        for tag, values in run["logged"].items():
            blocks = np.arange(len(values)) // math.ceil(len(values) / 100)
            means = values.groupby(blocks).agg({"step": "last", "value": "mean"})
            parts.append(means.assign(tag=tag)[["tag", "step", "value"]])
        if parts:
            logged = pd.concat(parts)
            logged.to_csv(target / "logged.csv", index=False, float_format="%.4g")


def read_runs(folders: list[Path], tags: tuple[str, ...]) -> tuple[pd.DataFrame, list[dict]]:
    """Finished runs, a row each, and the arguments of those that have begun and not finished.

    Raises Refusal: no runs, a corrupt file, a missing column, a name or a run that is there
    twice."""
    paths = []
    for folder in folders:
        inside = {
            path.parent for name in ("args", "summary") for path in folder.glob(f"*/{name}.json")
        }
        paths += [folder] if (folder / "args.json").exists() else sorted(inside)
        if not inside and not (folder / "args.json").exists():
            raise Refusal(f"{folder}: no runs in it; give folders of runs, such as runs/quick")
    doubled = [name for name, times in Counter(path.name for path in paths).items() if times > 1]
    if doubled:
        where = " and ".join(str(path) for path in paths if path.name == doubled[0])
        raise Refusal(f"{where}: two runs of one name; leave one out")
    runs, unfinished = [], []
    for path in tqdm(paths, "reading", unit=" runs", disable=None, leave=False):
        recorded = read_json(
            path / "args.json", ["args", "command", "commit", "versions", "hardware"]
        )
        if not (path / "summary.json").exists():
            run = {
                "env_id": recorded["args"].get("task"),
                "script": Path(recorded["command"][0]).name,
            }
            unfinished.append(run | recorded["args"] | {"name": path.name})
            continue
        run = read_json(path / "summary.json", NEEDED)
        if not isinstance(run["final_return_mean"], float) or not math.isfinite(
            run["final_return_mean"]
        ):
            raise Refusal(
                f"{path / 'summary.json'}: final_return_mean is {run['final_return_mean']}"
            )
        try:
            curve = pd.read_csv(path / "progress.csv")
        except (OSError, ValueError) as error:
            raise Refusal(f"{path / 'progress.csv'}: {error}") from error
        if missing := [column for column in EVALUATION if column not in curve] or curve.empty:
            raise Refusal(f"{path / 'progress.csv'}: no {missing if curve.size else 'rows'}")
        logged = read_logged(path, tags)
        found = {"name": path.name, "path": path, "recorded": recorded}
        runs.append(run | found | {"curve": curve, "logged": logged})
    if not runs:
        raise Refusal(
            f"{', '.join(map(str, folders))}: {len(unfinished)} runs, and none has finished"
        )
    return pd.DataFrame(runs), unfinished


def defaults(script: str, env_id: str) -> dict:
    """Default settings that are written as plain values in the script, for a language model's task
    too."""
    path, found = Path(__file__).with_name(script), {}
    if not path.is_file() or script not in SCRIPTS:
        raise Refusal(
            f"{script}: runs of another script than {', '.join(SCRIPTS)}, which are not known here"
        )
    source = ast.parse(path.read_text())
    for node in source.body:
        if isinstance(node, ast.ClassDef) and node.name == "Args":
            for field in node.body:
                if isinstance(field, ast.AnnAssign) and isinstance(field.value, ast.Constant):
                    found[field.target.id] = field.value.value
        if isinstance(node, ast.Assign) and node.targets[0].id == "TASKS":
            tasks = eval(compile(ast.Expression(node.value), script, "eval"), {"Args": dict})
            found |= {
                key: list(x) if isinstance(x, tuple) else x for key, x in tasks[env_id].items()
            }
    return {key: value for key, value in found.items() if value is not None}


def label_programs(runs: pd.DataFrame) -> pd.DataFrame:
    """Adds columns: `program`, `base` (without what a sweep varies), `condition` (the noise),
    `kind` and `family`. Raises Refusal where runs that would be compared differ in more than what
    is compared."""
    runs = runs.reindex(columns=runs.columns.union([*CELL, *FREE]))
    plain = runs.map(lambda x: json.dumps(x) if isinstance(x, list) else x)
    parts = []
    for (script, env_id), group in plain.groupby(["script", "env_id"]):
        free = [*CELL, *FREE, "name", "path", "recorded", "curve", "logged"]
        for key in group.columns.difference(free):
            if group[key].nunique(dropna=False) > 1:
                (a, x), (b, y) = group.drop_duplicates(key)[["name", key]].values[:2]
                raise Refusal(f"{a} and {b} differ in {key} ({x}, {y}): report them apart")
        usual = defaults(script, env_id)
        usual = {key: json.dumps(x) if isinstance(x, list) else x for key, x in usual.items()}
        of_symmetric = group[group["algo"].str.startswith("s")]
        ks = (of_symmetric["alpha"] - of_symmetric["beta"] * of_symmetric["z"]).unique()
        k = ks[0] if len(ks) == 1 else math.nan
        for i, run in group.iterrows():
            base, swept = run["algo"].upper(), ""
            for key in [*WEIGHTS, *COMPARED]:
                alike = plain[(plain["script"] == script) & (plain["algo"] == run["algo"])]
                if key in WEIGHTS and not run["algo"].startswith("s"):
                    differs = key == "alpha" and run[key] != 1
                elif key in usual:
                    differs = run[key] != usual[key]
                else:
                    differs = alike[key].nunique() > 1
                if pd.isna(run[key]) or not differs:
                    continue
                flag, value = key.replace("_", "-"), runs.loc[i, key]
                if isinstance(value, (bool, np.bool_)):
                    change = flag if value else f"no-{flag}"
                elif isinstance(value, list):
                    change = f"{flag} x {len(value)}"
                elif key == "alpha" and math.isclose(value, k):
                    change = "alpha k"
                elif isinstance(value, str):
                    change = f"{flag} {value}"
                elif (
                    key in usual
                    and key not in SWEPT
                    and math.isclose(value, usual[key] / k, rel_tol=1e-4)
                ):
                    change = f"{flag} / k"
                else:
                    change = (
                        f"{flag} {value:.3g}" if isinstance(value, float) else f"{flag} {value}"
                    )
                if key in SWEPT:
                    swept += f", {change}"
                else:
                    base += f", {change}"
            noise = "clean" if run["noise"] == "none" else f"{run['noise']} {run['noise_level']:g}"
            family, _, kind = script.removesuffix(".py").partition("_")
            parts.append(dict(index=i, base=base, program=base + swept, condition=noise, kind=kind))
            parts[-1]["family"] = family.removeprefix("s")
    runs = runs.join(pd.DataFrame(parts).set_index("index"))
    plain = plain.join(runs[["program", "condition"]])
    for _, cell in plain.groupby(["script", "env_id", "condition", "program"]):
        for key in [*WEIGHTS, *COMPARED]:
            if cell[key].nunique(dropna=False) > 1:
                (a, x), (b, y) = cell.drop_duplicates(key)[["name", key]].values[:2]
                raise Refusal(
                    f"{a} and {b} differ in {key} ({x}, {y}), too little to tell: report them apart"
                )
    key = ["script", "env_id", "condition", "program", "seed"]
    if (twice := runs.duplicated(key, keep=False)).any():
        a, b = runs[twice].sort_values(key)["name"][:2]
        raise Refusal(f"{a} and {b} are the same run, of the same seed: leave one out")
    runs["order"] = runs["algo"].map(ALGOS.index)  # the symmetric ones last
    runs["level"] = runs["noise_level"].where(runs["noise"] != "none", 0.0)
    order = ["kind", "family", "noise", "level", "env_id", "order", "program", "seed"]
    runs = runs.assign(noise=runs["noise"].replace("none", "")).sort_values(
        order
    )  # clean ones first
    return runs.reset_index(drop=True)


# Statistics


def welch(x, y) -> float:
    """Two-sided p-value of Welch's t-test; nan with fewer than two scores, or scores that are all
    equal."""
    if min(len(x), len(y)) < 2 or np.ptp([*x, *y]) == 0:
        return math.nan
    return float(stats.ttest_ind(x, y, equal_var=False).pvalue)


def make_cells(runs: pd.DataFrame, unfinished: list[dict]) -> pd.DataFrame:
    """One row per cell: its seeds, how many are missing, scores, mean, standard error, whether it
    is best."""
    seeds = {kind: set(group["seed"]) for kind, group in runs.groupby("kind")}
    begun = set()
    for run in unfinished:
        kind = run["script"].removesuffix(".py").partition("_")[2]
        seeds[kind] = seeds.get(kind, set()) | {run["seed"]}
        begun.add((run["script"], run["env_id"], run["noise"]))
    cells = []
    keys = ["kind", "family", "condition", "env_id", "program"]
    for key, group in runs.groupby(keys, sort=False):
        scores, training = group["final_return_mean"], group["train_return_last100"].astype(float)
        first = group.iloc[0]
        cell = dict(zip(keys, key)) | {
            "algo": first["algo"],
            "base": first["base"],
            "noise": first["noise"],
        }
        cell |= {"begun": (first["script"], first["env_id"], first["noise"] or "none") in begun}
        cell |= {"alpha_k": not first["algo"].startswith("s") and first["alpha"] != 1}
        cell |= {
            "level": first["level"],
            "seeds": len(group),
            "missing": len(seeds[first["kind"]]) - len(group),
        }
        cell |= {"scores": scores.to_numpy(), "mean": scores.mean(), "sem": scores.sem()}
        cell |= {"by_seed": group.set_index("seed")["final_return_mean"]}
        cell |= {"train_mean": training.mean(skipna=False), "train_sem": training.sem(skipna=False)}
        cell |= {f"swept_{name}": first[name] for name in SWEPT}
        for tag in {tag for logged in group["logged"] for tag in logged}:
            means = [
                logged[tag]["value"].mean() if tag in logged else math.nan
                for logged in group["logged"]
            ]
            sem = stats.sem(means) if len(means) > 1 else math.nan
            cell |= {f"{tag}_mean": np.mean(means), f"{tag}_sem": sem}
        for column in group["curve"].iloc[0].columns.difference(EVALUATION):  # of language models
            last = group["curve"].map(lambda curve, column=column: curve[column].iloc[-1])
            cell |= {f"{column}_mean": last.mean(), f"{column}_sem": last.sem()}
        cells.append(cell)
    cells = pd.DataFrame(cells)
    cells["best"] = False
    for _, row in cells[~cells["alpha_k"]].groupby(["kind", "family", "condition", "env_id"]):
        if len(row) > 1 and not row["missing"].any() and not row["begun"].any():
            best = row["mean"].idxmax()
            others = row.drop(best)["scores"]
            cells.loc[best, "best"] = all(welch(row["scores"][best], x) < 0.05 for x in others)
    numbers = [c for c in cells if c.endswith(("mean", "sem"))]
    cells.loc[cells["missing"] > 0, numbers] = math.nan
    return cells


def make_differences(cells: pd.DataFrame) -> pd.DataFrame:
    """Every method less every other one of its row, with two standard errors: of the difference of
    independent means, and of the mean of differences by seed. `symmetric`: one of the two is, or
    corrects rewards."""
    rows = []
    keys = ["kind", "family", "condition", "env_id"]
    for key, row in cells[cells["missing"] == 0].groupby(keys, sort=False):
        for ours_index in range(len(row)):
            ours = row.iloc[ours_index]
            for other_index in range(ours_index):
                other = row.iloc[other_index]
                by_seed = ours["by_seed"] - other["by_seed"]
                difference = dict(zip(keys, key))
                difference["program"] = ours["program"]
                difference["less"] = other["program"]
                difference["difference"] = ours["mean"] - other["mean"]
                difference["sem"] = math.hypot(ours["sem"], other["sem"])
                difference["paired_sem"] = by_seed.sem()
                difference["p"] = welch(ours["scores"], other["scores"])
                difference["symmetric"] = (
                    ours["algo"].startswith("s") or "correct-flips" in ours["program"]
                )
                rows.append(difference)
    return pd.DataFrame(rows)


def normalise(cells: pd.DataFrame) -> pd.Series:
    """Scores of each cell, normalised; None for a game whose human score is not known here."""
    everything = (
        cells[cells["missing"] == 0]
        .groupby(["kind", "env_id"])["scores"]
        .agg(lambda scores: np.concatenate(list(scores)))
    )
    normalised = []
    for _, cell in cells.iterrows():
        if cell["kind"] == "atari":
            low, high = RANDOM_AND_HUMAN.get(cell["env_id"], (math.nan, math.nan))
        else:
            scores = everything.get((cell["kind"], cell["env_id"]), np.zeros(1))
            low, high = scores.min(), max(scores.max(), scores.min() + 1e-9)
        normalised.append(None if math.isnan(low) else (cell["scores"] - low) / (high - low))
    return pd.Series(normalised, cells.index)


def probability_of_improvement(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """P(X > Y), ties half, mean over tasks, of scores (runs, tasks). As rliable's, whose
    Mann-Whitney test at every bootstrap sample would take minutes a pair."""
    x, y = x[:, None], y[None]
    return np.array([(x > y).mean() + (x == y).mean() / 2])


def make_aggregates(cells: pd.DataFrame, reps: int) -> tuple[pd.DataFrame, list[str]]:
    """Interquartile means and probabilities of improvement over all tasks, and what had to be left
    out."""
    rows, left_out = [], []
    cells = cells.assign(normalised=normalise(cells))
    unknown = cells[cells["normalised"].isna()]["env_id"].unique()
    for key, group in cells.groupby(["kind", "family", "condition"], sort=False):
        tasks, matrices = sorted(group["env_id"].unique()), {}
        for program, there in group.groupby("program", sort=False):
            complete = (there["missing"] == 0).all() and set(there["env_id"]) == set(tasks)
            if complete and not set(tasks) & set(unknown) and there["seeds"].min() > 1:
                matrices[program] = np.stack(
                    list(there.set_index("env_id")["normalised"][tasks]), axis=1
                )
            else:
                left_out.append(f"{program}, {key[1].upper()} {key[2]}")
        if not matrices:
            continue
        where = dict(zip(["kind", "family", "condition"], key)) | {"tasks": len(tasks)}
        iqm = rly.get_interval_estimates(
            matrices, lambda x: np.array([metrics.aggregate_iqm(x)]), reps=reps
        )
        symmetric = [p for p in matrices if p.startswith("S")]
        pairs = {
            f"{ours} > {p}": (matrices[ours], matrices[p]) for ours in symmetric for p in matrices
        }
        pairs = {name: pair for name, pair in pairs.items() if pair[0] is not pair[1]}
        better = rly.get_interval_estimates(pairs, probability_of_improvement, reps=reps)
        for what, (points, intervals) in (("iqm", iqm), ("probability of improvement", better)):
            for name, point in points.items():
                low, high = intervals[name][:, 0]
                rows.append(
                    where
                    | {
                        "statistic": what,
                        "program": name,
                        "value": point[0],
                        "low": low,
                        "high": high,
                    }
                )
    return pd.DataFrame(rows), left_out


# Tables and figures


def number(mean: float, sem: float) -> str:
    """Mean ± standard error, with the digits that the size of the mean deserves."""
    digits = 0 if abs(mean) >= 100 else 1 if abs(mean) >= 10 else 2 if abs(mean) >= 1 else 3
    return f"{mean:,.{digits}f}" + ("" if math.isnan(sem) else f" ± {sem:,.{digits}f}")


def markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def in_order(frame: pd.DataFrame) -> list[str]:
    """Its programs, baselines first and the symmetric ones last."""
    frame = frame.assign(order=frame["algo"].map(ALGOS.index)).sort_values(["order", "program"])
    return list(frame["program"].unique())


def table(cells: pd.DataFrame, out: Path, name: str, value: str = "") -> str:
    """One row per environment, one column per program: columns `value`mean and `value`sem of
    `cells`. Writes it as CSV, and returns it as Markdown."""
    programs, rows = in_order(cells), []
    for env_id, here in cells.groupby("env_id"):
        rows.append([env_id])
        for program in programs:
            cell = here[here["program"] == program]
            if cell.empty:
                rows[-1].append("")
            elif (cell := cell.iloc[0])["missing"]:
                rows[-1].append(f"{cell['seeds']} of {cell['seeds'] + cell['missing']} seeds")
            else:
                text = number(cell[f"{value}mean"], cell[f"{value}sem"])
                rows[-1].append(f"**{text}**" if cell["best"] and not value else text)
    name = f"table-{name}-{value.rstrip('_') or 'evaluation'}.csv".replace(" ", "-").replace(
        "/", "-"
    )
    plain = pd.DataFrame(rows, columns=["env_id", *programs]).replace(r"\*\*", "", regex=True)
    plain.to_csv(out / name, index=False)
    return markdown(["", *programs], rows)


def save(figure, out: Path, name: str) -> str:
    """Saves as PNG and SVG. Returns the Markdown that shows it."""
    name = name.replace(" ", "-")
    for suffix, options in (("png", {"dpi": 120}), ("svg", {"metadata": {"Date": None}})):
        figure.savefig(out / f"{name}.{suffix}", **options)
    plt.close(figure)
    return f"![{name}]({name}.png)"


def panels(count: int, height: float = 3.2):
    """A figure with `count` panels, at most five in a row."""
    columns = min(5, count)
    rows = math.ceil(count / columns)
    size = (max(7, 4 * columns), height * rows + 0.6)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for ax in axes.flat[count:]:
        ax.set_axis_off()
    return figure, list(axes.flat)


def draw_curves(runs: pd.DataFrame, what: str, column: str, axis: str, out: Path, name: str) -> str:
    """A panel per environment, a line per program: mean over seeds, and a 95 % bootstrap interval
    of it; of curves with many points running means over a twentieth of the run."""
    figure, axes = panels(runs["env_id"].nunique())
    colors = {program: f"C{i}" for i, program in enumerate(in_order(runs))}
    for ax, (env_id, here) in zip(axes, runs.groupby("env_id")):
        for program, group in here.groupby("program", sort=False):
            curves = [
                run[what].set_index("step")[column].rename(run["seed"])
                for _, run in group.iterrows()
            ]
            curves = pd.concat(curves, axis=1).dropna()
            curves = curves.rolling(max(1, len(curves) // 20), min_periods=1).mean()
            scores = {program: curves.to_numpy().T[:, None, :]}  # seeds, one task, steps
            mean, interval = rly.get_interval_estimates(scores, lambda x: x.mean((0, 1)), reps=1000)
            ax.plot(curves.index, mean[program], color=colors[program], label=program)
            ax.fill_between(
                curves.index, *interval[program], color=colors[program], alpha=0.12, lw=0
            )
        ax.set(title=env_id, xlabel="steps")
    axes[0].set_ylabel(axis)
    handles = {
        label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels())
    }
    handles = {program: handles[program] for program in colors}
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False
    )
    return save(figure, out, name)


def draw_aggregates(aggregates: pd.DataFrame, out: Path, name: str) -> str:
    """Interquartile means on the left, probabilities of improvement on the right, a colour per
    noise."""
    sides = [("iqm", "interquartile mean of normalised scores")]
    sides += [("probability of improvement", "probability of improvement")]
    height = 1 + 0.3 * aggregates["program"].nunique()
    figure, axes = plt.subplots(1, 2, figsize=(12, max(2.5, height)), layout="constrained")
    for ax, (statistic, title) in zip(axes, sides):
        there = aggregates[aggregates["statistic"] == statistic]
        names = list(there["program"].unique())[::-1]
        for i, (condition, group) in enumerate(there.groupby("condition", sort=False)):
            y = [
                names.index(program) - 0.7 * i / there["condition"].nunique()
                for program in group["program"]
            ]
            error = abs(group[["low", "high"]].sub(group["value"], axis=0).to_numpy().T)
            ax.errorbar(
                group["value"].to_numpy(),
                y,
                xerr=error,
                fmt="o",
                ms=4,
                color=f"C{i}",
                label=condition,
            )
        ax.set_yticks(range(len(names)), names)
        ax.set_xlabel(title)
    axes[1].axvline(0.5, color="grey", lw=0.8, zorder=0)
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=5, frameon=False)
    return save(figure, out, name)


def draw_noise(cells: pd.DataFrame, out: Path, name: str) -> str:
    """Score against noise level: a panel per environment and kind of noise, a line per program."""
    kinds = [noise for noise in cells["noise"].unique() if noise]
    env_ids = sorted(cells["env_id"].unique())
    figure, axes = panels(len(kinds) * len(env_ids))
    colors = {program: f"C{i}" for i, program in enumerate(in_order(cells))}
    for ax, (noise, env_id) in zip(
        axes, [(noise, env_id) for noise in kinds for env_id in env_ids]
    ):
        here = cells[
            (cells["env_id"] == env_id) & cells["noise"].isin(["", noise])
        ]  # nan: seeds are missing
        for program, group in here.sort_values("level").groupby("program", sort=False):
            ax.errorbar(
                *group[["level", "mean", "sem"]].to_numpy().T,
                color=colors[program],
                label=program,
                capsize=3,
            )
        ax.set(title=env_id, xlabel=f"level of noise: {noise}")
    axes[0].set_ylabel("return, mean ± standard error")
    handles = {
        label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels())
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False
    )
    return save(figure, out, name)


def draw_sweep(cells: pd.DataFrame, out: Path, name: str) -> str:
    """Heat maps of mean scores over two swept settings, beside each other for a third: a row for
    every program, and one for the symmetric less the other. Complete cells only; white is
    missing."""
    varied = sorted(SWEPT, key=lambda key: -cells[f"swept_{key}"].nunique())
    x, y, z = (f"swept_{key}" for key in varied)
    values = [sorted(cells[key].unique()) for key in (z, y, x)]
    every = pd.MultiIndex.from_product(values)
    grids = {  # {program: means (z, y, x)}, nan where seeds are missing
        base: group.set_index([z, y, x])["mean"]
        .reindex(every)
        .to_numpy()
        .reshape([len(v) for v in values])
        for base, group in cells.groupby("base", sort=False)
    }
    ours, others = (
        [b for b in grids if b.startswith("S") == symmetric] for symmetric in (True, False)
    )
    if len(ours) == len(others) == 1:
        grids["difference"] = grids[ours[0]] - grids[others[0]]
    size = (1 + 3.6 * len(values[0]), 0.6 + 2.9 * len(grids))
    figure, axes = plt.subplots(
        len(grids), len(values[0]), figsize=size, squeeze=False, layout="constrained"
    )
    scores = cells["mean"]
    for row, (base, grid) in zip(axes, grids.items()):
        colors = dict(vmin=scores.min(), vmax=scores.max(), cmap="viridis")
        if base == "difference":
            largest = np.nan_to_num(abs(grid)).max()
            colors = dict(vmin=-largest, vmax=largest, cmap="RdBu")
        for ax, third, part in zip(row, values[0], grid):
            image = ax.imshow(part, aspect="auto", **colors)
            for (i, j), value in np.ndenumerate(part):
                text, box = (
                    "" if math.isnan(value) else f"{value:,.0f}",
                    dict(facecolor="white", alpha=0.6, lw=0),
                )
                ax.text(
                    j, i, text, ha="center", va="center", fontsize=8, bbox=box if text else None
                )
            ax.set_xticks(range(len(values[2])), [f"{v:g}" for v in values[2]])
            ax.set_yticks(range(len(values[1])), [f"{v:g}" for v in values[1]])
            ax.set(xlabel=varied[0], ylabel=varied[1], title=f"{base}, {varied[2]} {third:g}")
        figure.colorbar(image, ax=row)
    return save(figure, out, name)


def describe_runs(runs: pd.DataFrame) -> str:
    """What it takes to repeat or to judge them: commits, versions, machines, time."""
    hours = runs["wall_s"].sum() / 3600
    lines = [
        f"{len(runs)} runs, {hours:,.1f} hours of computing; the command of each is in runs.csv."
    ]
    for what in ("commit", "versions", "hardware"):
        counts = Counter()
        for recorded in runs["recorded"]:
            part = recorded[what]
            if what == "versions":
                part = {
                    name: part.get(name)
                    for name in ("python", "torch", "gymnasium", "mujoco", "ale-py")
                }
            if isinstance(part, dict):
                part = ", ".join(f"{key} {value}" for key, value in part.items())
            counts[part] += 1
        lines += [f"- {what}: {part} ({count} runs)" for part, count in counts.items()]
    return "\n".join(lines)


def compare_all(differences: pd.DataFrame, aggregates: pd.DataFrame) -> list[str]:
    """Tables of symmetric methods, and of corrected rewards, against each other one, and over all
    tasks."""
    rows = []
    shown = differences[differences["symmetric"]] if len(differences) else differences
    for _, d in shown.iterrows():
        times = f"{d['difference'] / d['sem']:+.1f}" if d["sem"] > 0 else ""
        p = "" if math.isnan(d["p"]) else f"{d['p']:.3f}"
        what = [d["env_id"], d["condition"], f"{d['program']} less {d['less']}"]
        paired = number(d["difference"], d["paired_sem"]).partition(" ± ")[2]
        rows.append([*what, number(d["difference"], d["sem"]), times, p, paired])
    header = [
        "",
        "noise",
        "",
        "difference",
        "standard errors",
        "p (Welch)",
        "standard error by seed",
    ]
    parts = ["### Differences", markdown(header, rows)] if rows else []
    rows = []
    for _, a in aggregates.iterrows():
        interval = f"{a['low']:.3f} to {a['high']:.3f}"
        rows.append([a["statistic"], a["program"], a["condition"], f"{a['value']:.3f}", interval])
    if rows:
        parts.append(f"### Over all tasks ({aggregates['tasks'].iloc[0]})")
        parts.append(markdown(["", "", "noise", "value", "95 % interval"], rows))
    return parts


def write_report(args: Args, out: Path) -> None:
    """Reads all runs and writes report.md, CSV files and figures into `out`. Raises Refusal."""
    np.random.seed(
        0
    )  # rliable samples by NumPy's global generator, whatever random_state it is given
    runs, unfinished = read_runs(list(args.runs), args.logged)
    if args.keep:
        keep_runs(runs, args.keep)
    runs = label_programs(runs)
    if args.seeds:
        first = {
            kind: sorted(group["seed"].unique())[: args.seeds]
            for kind, group in runs.groupby("kind")
        }
        runs = runs[[run["seed"] in first[run["kind"]] for _, run in runs.iterrows()]]
        unfinished = [
            run for run in unfinished if run["seed"] in {s for some in first.values() for s in some}
        ]
    cells = make_cells(runs, unfinished)
    differences = make_differences(cells)
    aggregates, left_out = make_aggregates(cells, args.reps)
    columns = ["name", "script", "env_id", "condition", "program", "seed", "total_timesteps"]
    columns += ["final_return_mean", "final_return_std", "train_return_last100", "sps", "wall_s"]
    commit = runs["recorded"].map(lambda recorded: recorded["commit"])
    command = runs["recorded"].map(lambda recorded: shlex.join(["python", *recorded["command"]]))
    curves = pd.concat([run["curve"].assign(name=run["name"]) for _, run in runs.iterrows()])
    tables = cells.drop(
        columns=["scores", "by_seed", "base", "algo", "noise", "level", "begun", "alpha_k"]
    )
    for name, frame in {
        "runs": runs[columns].assign(commit=commit, command=command),
        "curves": curves,
        "tables": tables,
        "differences": differences,
        "aggregates": aggregates,
    }.items():
        frame.to_csv(out / f"{name}.csv", index=False, float_format="%.6g")

    page = ["# Report", __doc__.split("\n\n", 2)[2].strip()]
    if unfinished or (cells["missing"] > 0).any():
        lacking = f"{(cells['missing'] > 0).sum()} of {len(cells)} cells lack seeds"
        names = f": {', '.join(run['name'] for run in unfinished)}" if unfinished else ""
        page.append(
            f"**Incomplete**: {lacking}; {len(unfinished)} runs have begun and not finished{names}."
        )
    for (kind, family), here in cells.groupby(["kind", "family"], sort=False):

        def of_here(frame, kind=kind, family=family):
            return (
                frame[(frame["kind"] == kind) & (frame["family"] == family)]
                if len(frame)
                else frame
            )

        title = f"{kind}, {family.upper()}"
        page.append(f"## {title}")
        if sum(here[f"swept_{key}"].nunique() > 1 for key in SWEPT) > 1:
            for (env_id, condition), part in here.groupby(["env_id", "condition"], sort=False):
                name = f"sweep-{family}-{env_id}-{condition}"
                page += [f"{env_id}, {condition}: mean return", draw_sweep(part, out, name)]
            continue
        for condition, part in here.groupby("condition", sort=False):
            name, seeds = f"{kind}-{family}-{condition}", (part["seeds"] + part["missing"]).max()
            page += [
                f"### {title}, {condition} (seeds: {seeds})",
                "Last evaluation:",
                table(part, out, name),
            ]
            if kind != "rlhf":
                page += ["The last 100 episodes of training:", table(part, out, name, "train_")]
            for column in part.columns.difference(["train_mean"]):  # of language models
                if column.endswith("_mean") and "/" not in column and part[column].notna().any():
                    value = column.removesuffix("mean")
                    page += [
                        f"Last evaluation, {value.rstrip('_')}:",
                        table(part, out, name, value),
                    ]
            complete = (
                part[part["missing"] == 0][["env_id", "program"]].to_records(index=False).tolist()
            )
            there = of_here(runs)
            there = there[there["condition"] == condition]
            there = there[[key in complete for key in zip(there["env_id"], there["program"])]]
            if there.empty:
                continue
            page.append(
                draw_curves(
                    there, "curve", "return_mean", "return of evaluations", out, f"curves-{name}"
                )
            )
            for tag in args.logged:
                if f"{tag}_mean" not in part or not (part[f"{tag}_mean"] > 0).any():
                    continue
                page += [f"`{tag}`, mean over the run:", table(part, out, name, f"{tag}_")]
                logged = there[[tag in run for run in there["logged"]]]
                logged = logged.assign(logged=[run[tag] for run in logged["logged"]])
                figure = f"logged-{tag.replace('/', '-')}-{name}"
                page.append(draw_curves(logged, "logged", "value", tag, out, figure))
        if (here.groupby("noise")["level"].nunique() > 1).any():
            page += [
                "### Against the level of noise",
                draw_noise(here, out, f"noise-{kind}-{family}"),
            ]
        page += compare_all(of_here(differences), of_here(aggregates))
        if len(of_here(aggregates)):
            page.append(draw_aggregates(of_here(aggregates), out, f"aggregates-{kind}-{family}"))
    if left_out:
        why = "not every task with every seed, or a game whose human score is not known here"
        page.append(f"Left out of statistics over all tasks ({why}): {'; '.join(left_out)}.")
    page += ["## What was run", describe_runs(runs)]
    (out / "report.md").write_text("\n\n".join(page) + "\n")


def main(args: Args) -> None:
    if (
        args.out.is_file()
        or args.out.exists()
        and not (args.out / "report.md").exists()
        and any(args.out.iterdir())
    ):
        raise Refusal(f"--out {args.out}: a folder that is not a report; choose another")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out.parent) as scratch:
        new, old = Path(scratch, "new"), Path(scratch, "old")
        new.mkdir()
        write_report(args, new)
        if args.out.exists():
            shutil.move(args.out, old)
        shutil.move(new, args.out)
    print(f"{args.out / 'report.md'}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except (Refusal, OSError) as error:
        sys.exit(f"error: {error}")
