"""Turns finished runs into tables, statistics over all tasks and learning curves, in the folder
report/.

    python report.py runs/quick                              # all that benchmark.sh left there
    python report.py runs/continuous/Hopper-v4__* --out hopper
    python report.py runs/quick --logged losses/entropy      # any quantity that the runs logged

A method is an algorithm and the settings in which runs of its script differ: DPPO; SPPO; DPPO,
max-grad-norm / k, where k = alpha + beta |Z| of the symmetric runs on that environment. A script
from outside this repository gives its file name: sppo_mine. A cell is a method on an environment
with one kind and level of noise. Runs of a cell may differ in their seed only, otherwise there is
no report. A cell shows the last evaluation, mean ± standard error over seeds. If it lacks seeds
that other cells have, it shows how many it has, and no mean; --seeds compares on fewer. Bold is the
best of a row, if the row is complete and Welch's t-test finds it better than every other method,
each at 5 %, two-sided; "alpha k", the same method as the symmetric one, does not compete.

Statistics over all tasks are those of the library rliable (Agarwal et al., NeurIPS 2021):
interquartile mean of normalised scores and probability of improvement, with 95 % stratified
bootstrap intervals, which are too narrow with a handful of seeds. Atari scores are normalised by
those of a random and a human player (Wang et al., ICML 2016), others by the worst (0) and best (1)
run on the environment here, over all methods and noises: they are not comparable across reports."""

import ast
import functools
import json
import math
import re
import shlex
import shutil
import sys
import tempfile
import warnings
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
    from pandas import DataFrame, Series
    from rliable import library as rly
    from rliable import metrics
    from scipy import stats
except ImportError as error:
    sys.exit(f"error: {error}; install what reports need: pip install -e '.[report]'")

plt.switch_backend("agg")

SCRIPTS = [
    "sa2c_atari.py",
    "sa2c_continuous.py",
    "sppo_atari.py",
    "sppo_continuous.py",
    "sppo_rlhf.py",
]
ALGOS = {"a2c": 0, "da2c": 1, "sa2c": 2, "ppo": 3, "dppo": 4, "sppo": 5}  # places in tables
SYMMETRIC = ["sa2c", "sppo"]

# Settings that tell methods of a script apart; a method's name has those that are not the default
SWEPT = ["learning_rate", "clip_coef", "update_epochs"]
COMPARED = [
    *SWEPT,
    "adam_eps",
    "rmsprop_eps",
    "max_grad_norm",
    "vf_coef",
    "ent_coef",
    "ce_coef",
    "norm_adv",
    "layer_norm",
    "reward_model",
    "reward_aggregate",
    "correct_flips",
    "divide_by_p_old",
]
WEIGHTS = ["alpha", "beta", "z"]
CELL = ["script", "env_id", "noise", "noise_level", "algo", "policy", *WEIGHTS, *COMPARED]
# Settings that may differ within a cell, since learning does not depend on them
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
    "checkpoint_freq",
    "micro_batch_size",
]

# Keys of args.json and the types of their values
RECORDED = {"args": dict, "command": list, "commit": object, "versions": dict, "hardware": dict}
RESULTS = ["final_return_mean", "final_return_std", "train_return_last100", "sps", "wall_s"]
NEEDED = [
    "script",
    "algo",
    "env_id",
    "seed",
    "noise",
    "noise_level",
    *WEIGHTS,
    "total_timesteps",
    *RESULTS,
    "finished",
]
TEXTS = ["script", "algo", "env_id", "task", "noise", "policy"]
NUMBERS = [
    "seed",
    "total_timesteps",
    "noise_level",
    *WEIGHTS,
    *SWEPT,
    "adam_eps",
    "rmsprop_eps",
    "max_grad_norm",
    "vf_coef",
    "ent_coef",
    "ce_coef",
    "eval_freq",
    "num_envs",
    "num_steps",
    "batch_size",
    "final_return_mean",
    "final_return_std",
    "sps",
    "wall_s",
]
EVALUATION = ["step", "return_mean", "return_std", "length_mean", "episodes"]
AGAIN = "delete the run's summary.json and --resume it, or delete its folder and run it again"

TASK = ["kind", "family", "condition", "env_id"]  # cells of one row of a table
LABELS = ["base", "noise", "level", "order", "symmetric", "compared", "alpha_k"]

# Of lines in figures; methods not listed here get OTHER_COLORS, in alphabetical order
COLORS = {
    "PPO": "tab:orange",
    "A2C": "tab:orange",
    "DPPO": "tab:green",
    "DA2C": "tab:green",
    "SPPO": "tab:blue",
    "SA2C": "tab:blue",
    "PPO, max-grad-norm / k": "tab:red",
    "DPPO, max-grad-norm / k": "tab:red",
    "PPO, vf-coef / k": "tab:purple",
    "DPPO, vf-coef / k": "tab:purple",
    "PPO, vf-coef / k, ent-coef / k": "tab:purple",
    "SPPO, no-divide-by-p-old": "tab:cyan",
    "PPO, correct-flips": "tab:brown",
    "DPPO, correct-flips": "tab:brown",
    "PPO, no-norm-adv": "tab:gray",
    "DPPO, alpha k": "tab:gray",
}
OTHER_COLORS = [
    "tab:pink",
    "tab:olive",
    "black",
    "gold",
    "navy",
    "lime",
    "maroon",
    "violet",
    "teal",
    "salmon",
    "indigo",
    "khaki",
    "skyblue",
    "darkgreen",
]

MARKERS = "osD^v<>pPX*"  # of the kinds and levels of noise, in figures over all tasks

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
    # Runs, or folders of runs such as those of benchmark.sh
    runs: tyro.conf.Positional[tuple[Path, ...]]
    # Folder to write; an earlier report there is replaced
    out: Path = Path("report")
    # How many seeds to compare on, the first ones; default: all
    seeds: int | None = None
    # TensorBoard tags
    logged: tuple[str, ...] = ("losses/advantage_sign_flips", "losses/clipped_gradients")
    # Also keep small copies of finished runs in this folder, which report.py can read
    keep: Path | None = None
    # Bootstrap samples of statistics over all tasks
    reps: int = 10_000


class Refusal(ValueError):
    """One line that says what is wrong with the input and what to do."""


# ---- Loading runs


def read_runs(folders: list[Path], tags: tuple[str, ...]) -> tuple[DataFrame, list[dict]]:
    """Finished runs, a row each from `read_finished`, and the arguments of those that have begun
    and not finished.

    Raises Refusal if there are no runs, if a file is corrupt or belongs to another run, or if two
    runs have the same name."""
    finished = []
    unfinished = []
    for path in tqdm(find_runs(folders), "reading", unit=" runs", disable=None, leave=False):
        if (path / "summary.json").exists():
            finished.append(read_finished(path, tags))
        else:
            unfinished.append(read_unfinished(path))
    if not finished:
        where = ", ".join(map(str, folders))
        raise Refusal(f"{where}: {len(unfinished)} runs, and none has finished")
    return DataFrame(finished), unfinished


def is_run(path: Path) -> bool:
    return (path / "args.json").exists() or (path / "summary.json").exists()


def find_runs(folders: list[Path]) -> list[Path]:
    """Folders of all runs in `folders`, each of which is a run or contains runs. Raises Refusal if
    one has no runs, or if two runs have the same name."""
    paths = []
    for folder in folders:
        if is_run(folder):
            paths.append(folder.resolve())  # "." has no name
            continue
        inside = sorted(path for path in folder.glob("*") if is_run(path))
        if not inside:
            raise Refusal(f"{folder}: no runs in it; give folders of runs, such as runs/quick")
        paths += inside
    times = Counter(path.name for path in paths)
    for name in times:
        if times[name] > 1:
            where = " and ".join(str(path) for path in paths if path.name == name)
            raise Refusal(f"{where}: two runs with the same name; leave one out")
    return paths


def read_unfinished(path: Path) -> dict:
    recorded = read_recorded(path / "args.json")
    script = Path(recorded["command"][0]).name
    return recorded["args"] | {"script": script, "name": path.name}


def read_finished(path: Path, tags: tuple[str, ...]) -> dict:
    """A finished run: its summary, with defaults for settings that its version of the script did
    not have yet, and name, path, recorded, curve, logged."""
    summary = read_json(path / "summary.json", NEEDED)
    script = summary["script"]
    ours = (path / "args.json").exists() or str(script).endswith(".py")
    recorded = read_recorded(path / "args.json") if ours else peer_recorded(summary)
    check_summary(path / "summary.json", summary, recorded)
    if ours:
        curve = read_curve(path / "progress.csv", summary, recorded)
    else:
        curve = DataFrame(columns=EVALUATION)
    found = {
        "name": path.name,
        "path": path,
        "recorded": recorded,
        "curve": curve,
        "logged": read_logged(path, tags),
    }
    return defaults(script, summary["env_id"]) | summary | found


def read_recorded(path: Path) -> dict:
    """What args.json says: arguments, command, commit, versions, hardware, and whatever else newer
    scripts record. Raises Refusal if a part is missing or of the wrong type."""
    recorded = read_json(path, list(RECORDED))
    for key, kind in RECORDED.items():
        if not isinstance(recorded[key], kind):
            raise Refusal(f"{path}: {key} is {recorded[key]!r}; {AGAIN}")
    command = recorded["command"]
    if not command or not all(isinstance(word, str) for word in command):
        raise Refusal(f"{path}: command is {command!r}; {AGAIN}")
    args = recorded["args"]
    for key in ("seed", "noise", "total_timesteps"):
        if key not in args:
            raise Refusal(f"{path}: no {key!r} among the arguments; {AGAIN}")
    args.setdefault("env_id", args.get("task"))
    check_values(path, args)
    return recorded


def peer_recorded(summary: dict) -> dict:
    """What args.json would say, for a run of another library, which leaves a summary.json only."""
    left_out = [*RESULTS, "finished", "version"]
    return {
        "args": {key: summary[key] for key in summary if key not in left_out},
        "command": [],
        "commit": None,
        "versions": {summary["script"]: summary.get("version")},
        "hardware": {},
    }


def read_json(path: Path, needed: list[str]) -> dict:
    """What is in `path`. Raises Refusal if it is no JSON, or lacks one of the keys `needed`."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise Refusal(f"{path}: corrupt ({error}); {AGAIN}") from error
    for key in needed:
        if not isinstance(content, dict) or key not in content:
            raise Refusal(f"{path}: no {key!r}; {AGAIN}")
    return content


def read_csv(path: Path, **options) -> DataFrame:
    """What is in `path`, by pandas. Raises Refusal if it cannot be read."""
    try:
        return pd.read_csv(path, **options)
    except (OSError, ValueError) as error:
        raise Refusal(f"{path}: {' '.join(str(error).split())}") from error


def read_curve(path: Path, summary: dict, recorded: dict) -> DataFrame:
    """Evaluations, a row each: columns EVALUATION, for language models also others. Raises Refusal
    unless they are complete and agree with the summary."""
    curve = read_csv(path, float_precision="round_trip")
    check_numbers(path, curve)
    check_steps(path, curve, summary, recorded)
    for column in ("return_mean", "return_std"):
        last = curve[column].iloc[-1]
        final = summary[f"final_{column}"]
        if not math.isclose(last, final, rel_tol=1e-6, abs_tol=1e-12):
            raise Refusal(f"{path}: last {column} is {last}, in summary.json {final}; {AGAIN}")
    return curve


def read_logged(path: Path, tags: tuple[str, ...]) -> dict[str, DataFrame]:
    """What a run logged: {tag: columns step, value}, without tags that it did not log. From
    logged.csv, where `keep_runs` has left one, else from TensorBoard's files. Raises Refusal if
    logged.csv is corrupt."""
    kept = path / "logged.csv"
    logged = {}
    if kept.exists():
        types = {"tag": str, "step": int, "value": float}
        rows = read_csv(kept, usecols=list(types), dtype=types)
        for tag in tags:
            values = rows[rows["tag"] == tag]
            if len(values):
                logged[tag] = values[["step", "value"]]
        return logged
    events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
    for tag in tags:
        if tag in events.Tags()["scalars"]:
            # A resumed run may have logged a step twice: the last value counts
            values = {event.step: event.value for event in events.Scalars(tag)}
            logged[tag] = DataFrame(values.items(), columns=["step", "value"])
    return logged


def keep_runs(runs: DataFrame, folder: Path) -> None:
    """Copies runs, without checkpoints and with logged.csv in place of TensorBoard's files: the
    tags that were read, as means over blocks of a hundredth of the run. Tags that `folder` has from
    an earlier time stay. Raises Refusal if it has another run of the same name."""
    for _, run in runs.iterrows():
        kept = folder / run["name"] / "summary.json"
        summary = run["path"] / "summary.json"
        if kept.exists() and kept.read_bytes() != summary.read_bytes():
            raise Refusal(f"--keep {kept.parent}: another run of this name; choose another folder")
    for _, run in runs.iterrows():
        target = folder / run["name"]
        target.mkdir(parents=True, exist_ok=True)
        for name in ("args.json", "progress.csv", "summary.json"):
            if (run["path"] / name).exists():  # other libraries leave a summary only
                shutil.copy(run["path"] / name, target)
        parts = []
        if (target / "logged.csv").exists():
            before = read_csv(target / "logged.csv")
            parts.append(before[~before["tag"].isin(list(run["logged"]))])
        for tag, values in run["logged"].items():
            blocks = values.groupby((values["step"] - 1) * 100 // run["total_timesteps"])
            means = blocks.agg({"step": "last", "value": "mean"})
            means.insert(0, "tag", tag)
            parts.append(means)
        if parts:
            pd.concat(parts).to_csv(target / "logged.csv", index=False, float_format="%.4g")


def select_seeds(
    runs: DataFrame, unfinished: list[dict], count: int
) -> tuple[DataFrame, list[dict]]:
    """Those of `runs` and `unfinished` with the first `count` seeds of their kind of task."""
    rank = runs.groupby("kind")["seed"].rank("dense")
    selected = runs[rank <= count]
    seeds = selected.groupby("kind")["seed"].agg(set)
    return selected, [run for run in unfinished if run["seed"] in seeds.get(kind_of(run), ())]


# ---- Checks


def is_number(value) -> bool:
    """Whether `value` is a finite number; a bool is not."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < 1e300


def check_values(path: Path, values: dict) -> None:
    """Raises Refusal if a value has the wrong type for its key."""
    for key, value in values.items():
        if key in NUMBERS and not is_number(value):
            raise Refusal(f"{path}: {key} is {value!r}, not a finite number; {AGAIN}")
        if key in TEXTS and not isinstance(value, str):
            raise Refusal(f"{path}: {key} is {value!r}, not a string; {AGAIN}")


def check_summary(path: Path, summary: dict, recorded: dict) -> None:
    """Raises Refusal unless the summary is whole and belongs to the arguments `recorded`."""
    check_values(path, summary)
    if summary["finished"] is not True:
        raise Refusal(f"{path}: finished is {summary['finished']!r}; {AGAIN}")
    training = summary["train_return_last100"]
    if training is not None and not is_number(training):
        raise Refusal(f"{path}: train_return_last100 is {training!r}; {AGAIN}")
    script = summary["script"]
    algo = summary["algo"]
    if script in SCRIPTS and algo not in ALGOS:
        raise Refusal(f"{path}: algo is {algo!r}, which {script} does not have; {AGAIN}")
    args = recorded["args"]
    shared = args.keys() & summary.keys()
    for key in sorted(shared - {"resume", "compile"}):  # these two may change on resuming
        value = summary[key]
        if value != args[key]:
            raise Refusal(f"{path}: {key} is {value!r}, in args.json {args[key]!r}; {AGAIN}")


def check_numbers(path: Path, curve: DataFrame) -> None:
    """Raises Refusal unless the evaluations in `path` have all their columns, and numbers there."""
    if missing := [column for column in EVALUATION if column not in curve]:
        raise Refusal(f"{path}: no {missing}; {AGAIN}")
    if curve.empty:
        raise Refusal(f"{path}: no rows; {AGAIN}")
    for column, values in curve.items():
        if not pd.api.types.is_numeric_dtype(values):
            # Pandas reads integers that are too long for it as text
            numbers = pd.to_numeric(values, errors="coerce")
            wrong = values[~(numbers.abs() < 2.0**63)]
            raise Refusal(f"{path}: {column} is {wrong.iloc[0]!r}, not a number; {AGAIN}")
    for column in EVALUATION:
        if not np.isfinite(curve[column]).all():
            raise Refusal(f"{path}: not every {column} is a finite number; {AGAIN}")


def check_steps(path: Path, curve: DataFrame, summary: dict, recorded: dict) -> None:
    """Raises Refusal unless the evaluations in `path` are exactly those that were due. Scripts
    that are not ours, or had uncommitted changes, may evaluate at any step."""
    steps = list(curve["step"])
    total = summary["total_timesteps"]
    if (np.diff(steps) <= 0).any():
        raise Refusal(f"{path}: steps are duplicated or out of order; {AGAIN}")
    if steps[-1] < total:
        raise Refusal(f"{path}: ends at step {steps[-1]} of {total}; {AGAIN}")
    if summary["script"] not in SCRIPTS or recorded.get("script_status"):
        return
    args = recorded["args"]
    check_schedule(path.with_name("args.json"), args)
    wrong = set(evaluation_steps(args)) ^ set(steps)
    if wrong:
        first = sorted(wrong)[:3]
        raise Refusal(f"{path}: evaluations missing or not due, at steps {first}; {AGAIN}")


def check_schedule(path: Path, args: dict) -> None:
    """Raises Refusal unless `args` of one of the five scripts say when it evaluates."""
    batch = ["batch_size"] if "task" in args else ["num_envs", "num_steps"]
    for key in ["eval_freq", *batch]:
        value = args.get(key)
        least = 0 if key == "eval_freq" else 1
        if not isinstance(value, int) or value < least:
            raise Refusal(f"{path}: {key} is {value!r}; {AGAIN}")


def evaluation_steps(args: dict) -> list[int]:
    """Steps of all evaluations of a run of one of the five scripts, with the arguments `args`: one
    for each multiple of eval_freq, at the end of a batch, one at the end of the run, and of
    language models one at the start."""
    batch = args["batch_size"] if "task" in args else args["num_envs"] * args["num_steps"]
    last = math.ceil(args["total_timesteps"] / batch) * batch
    steps = {last}
    if "task" in args:
        steps.add(0)
    if args["eval_freq"] > 0:
        for due in range(args["eval_freq"], last, args["eval_freq"]):
            steps.add(math.ceil(due / batch) * batch)
    return sorted(steps)


def check_comparable(runs: DataFrame) -> None:
    """Raises Refusal where runs of one script on one environment differ in an argument that is not
    compared. An argument that a run's version of the script did not have is passed over, unless its
    default is known."""
    for (script, env_id), group in runs.groupby(["script", "env_id"]):
        usual = defaults(script, env_id)
        recorded = [record["args"] for record in group["recorded"]]
        fixed = set().union(*recorded) - {*CELL, *FREE}
        for key in sorted(fixed & set(runs.columns)):
            had = [key in usual or key in args for args in recorded]
            check_same(group[had], key, "")


def check_cells(runs: DataFrame) -> None:
    """Raises Refusal if runs of one cell differ in a setting, or have the same seed."""
    cell = [*TASK, "method"]
    for _, group in runs.groupby(cell):
        for key in ["script", "policy", "level", *WEIGHTS, *COMPARED]:
            check_same(group, key, ", too little for two names")
        recorded = group["recorded"]
        # A commit names the version of a script, unless it was changed or there is no repository
        if any(record.get("script_status") or not record.get("commit") for record in recorded):
            sums = [record.get("script_sha256") for record in recorded]
            check_same(group.assign(script_sha256=sums), "script_sha256", "")
    key = [*cell, "seed"]
    twice = runs[runs.duplicated(key, keep=False)]
    if len(twice):
        a, b = twice.sort_values(key)["name"][:2]
        raise Refusal(f"{a} and {b} are the same run, of the same seed: leave one out")


def check_same(runs: DataFrame, key: str, why: str) -> None:
    """Raises Refusal if not all `runs` have the same value of `key`."""
    values = runs[key].map(hashable)
    different = values[~values.duplicated()]
    if len(different) > 1:
        a, b = runs["name"][different.index].head(2)
        x, y = different.head(2)
        raise Refusal(f"{a} and {b} differ in {key} ({x}, {y}){why}: report them separately")


def hashable(value):
    return json.dumps(value) if isinstance(value, (list, tuple, dict)) else value


# ---- Methods


def label_methods(runs: DataFrame) -> DataFrame:
    """Adds columns: `method`, `base` (without what a sweep varies), `condition` (the noise), its
    `level`, `kind` and `family`, `order` in tables, `symmetric`, `compared` (whether report.md
    shows how much better it is than each other method) and `alpha_k`. Raises Refusal where runs
    that would be compared differ in more than what is compared, or are there twice."""
    check_comparable(runs)
    runs = runs.reindex(columns=runs.columns.union(CELL))
    ours = runs["script"].isin(SCRIPTS)
    symmetric = runs["algo"].isin(SYMMETRIC)
    noisy = runs["noise"] != "none"
    noise = runs["noise"] + " " + runs["noise_level"].map("{:g}".format)
    runs = runs.assign(
        kind=runs.apply(kind_of, axis=1),
        family=runs.apply(family_of, axis=1),
        condition=noise.where(noisy, "clean"),
        level=runs["noise_level"].where(noisy, 0.0),
        order=runs["algo"].map(ALGOS).where(ours, len(ALGOS)),
        symmetric=symmetric,
        compared=~ours | symmetric | runs["correct_flips"].eq(True),
        alpha_k=ours & ~symmetric & (runs["alpha"] != 1),
    )
    for _, group in runs.groupby(["family", "env_id"]):
        check_same(group, "total_timesteps", "")  # of copies of scripts, and of other libraries
    shared = {script: shared_settings(group) for script, group in runs.groupby("script")}
    names = [name_method(run, runs, shared[run["script"]]) for _, run in runs.iterrows()]
    runs[["base", "method"]] = DataFrame(names, runs.index)
    check_cells(runs)
    runs["noise"] = runs["noise"].replace("none", "")  # sorted first
    order = ["kind", "family", "noise", "level", "env_id", "order", "method", "seed"]
    return runs.sort_values(order).reset_index(drop=True)


def kind_of(run: Series | dict) -> str:
    """Kind of task: continuous, atari or rlhf; guessed from the environment if not our script."""
    if run["script"] in SCRIPTS:
        return run["script"].removesuffix(".py").partition("_")[2]
    if run["env_id"] in ("toy", "imdb", "tldr"):
        return "rlhf"
    return "continuous" if re.search(r"-v\d+$", run["env_id"]) else "atari"


def family_of(run: Series | dict) -> str | None:
    """Methods of one family are in one table: a2c, ppo, or whatever another script says. None if an
    unfinished run does not say it."""
    for family in ("a2c", "ppo"):
        if family in f"{run['algo']} {run['script']}".lower():
            return family
    return run["algo"]


def name_method(run: Series, runs: DataFrame, shared: list[str]) -> tuple[str, str]:
    """Two names of a run's method, without and with the settings that a sweep varies. `shared`:
    settings that are the same in all runs of the script, so that no name needs them."""
    usual = defaults(run["script"], run["env_id"])
    same_script = runs[runs["script"] == run["script"]]
    k = symmetric_k(same_script[same_script["env_id"] == run["env_id"]])
    family = same_script[same_script["family"] == run["family"]]
    alike = family[family["algo"] == run["algo"]]
    base = run["algo"].upper()
    if run["script"] not in SCRIPTS:
        stem = Path(run["script"]).stem
        base = f"{stem} {base}" if family["algo"].nunique() > 1 else stem
    swept = ""
    for key in changed_settings(run, usual, alike):
        if key in shared:
            continue
        change = change_of(key, run[key], usual.get(key), k)
        if key in SWEPT:
            swept += f", {change}"
        else:
            base += f", {change}"
    return base, base + swept


def symmetric_k(runs: DataFrame) -> float:
    """k = alpha + beta |Z| of the symmetric ones among `runs`; nan if that is not one number."""
    symmetric = runs[runs["symmetric"]]
    ks = symmetric["alpha"] - symmetric["beta"] * symmetric["z"]
    return ks.iloc[0] if ks.nunique() == 1 else math.nan


def changed_settings(run: Series, usual: dict, alike: DataFrame) -> list[str]:
    """Settings in which a run differs from `usual`, its script's defaults or, where these are not
    known, in which the runs `alike`, of the same script and algorithm, differ."""
    changed = []
    for key in [*WEIGHTS, *COMPARED]:
        value = hashable(run[key])
        if key in WEIGHTS and not run["symmetric"]:
            differs = key == "alpha" and value != 1
        elif key in usual:
            differs = value != hashable(usual[key])
        else:
            differs = alike[key].map(hashable).nunique() > 1
        if differs and not pd.isna(value):
            changed.append(key)
    return changed


def shared_settings(runs: DataFrame) -> list[str]:
    """Settings that are the same in all `runs` of a script, and so tell no methods apart; none if
    they are of one method."""
    settings = runs[["algo", *WEIGHTS, *COMPARED]].map(hashable)
    if len(settings.drop_duplicates()) == 1:
        return []
    return [key for key in COMPARED if settings[key].nunique(dropna=False) == 1]


def shared_text(runs: DataFrame) -> str:
    """Says which settings other than the defaults all runs of a script share."""
    lines = []
    for script, group in runs.groupby("script"):
        changes = {}
        for _, run in group.iterrows():
            usual = defaults(script, run["env_id"])
            for key in [*changed_settings(run, usual, group), *changed_others(run, usual)]:
                changes[key] = change_of(key, run[key], usual.get(key), math.nan)
        shared = shared_settings(group)
        for key in changes.keys() - {*WEIGHTS, *COMPARED}:
            if group[key].map(hashable).nunique(dropna=False) == 1:
                shared.append(key)
        texts = [changes[key] for key in changes if key in shared]
        if texts:
            lines.append(f"All runs of `{script}` have {', '.join(texts)}.")
    return " ".join(lines)


def changed_others(run: Series, usual: dict) -> list[str]:
    """Settings that no method's name has, in which a run differs from `usual`."""
    others = run["recorded"]["args"].keys() & usual.keys() - {*CELL, *FREE, "task"}
    return sorted(key for key in others if hashable(run[key]) != hashable(usual[key]))


def change_of(key: str, value, usual, k: float) -> str:
    """How a method's name says that setting `key` is `value`; `usual` is its default, if known."""
    flag = key.replace("_", "-")
    if isinstance(value, bool):
        return flag if value else f"no-{flag}"
    if isinstance(value, list):
        ensemble = key == "reward_model" and len(value) > 1
        return f"{flag} x {len(value)}" if ensemble else f"{flag} {' '.join(map(str, value))}"
    if isinstance(value, str):
        return f"{flag} {value}"
    if key == "alpha" and math.isclose(value, k):
        return "alpha k"
    divided = is_number(usual) and math.isclose(value, usual / k, rel_tol=1e-4)
    if divided and key not in SWEPT:
        return f"{flag} / k"
    return f"{flag} {value:.3g}" if isinstance(value, float) else f"{flag} {value}"


@functools.cache
def defaults(script: str, env_id: str) -> dict:
    """Default settings that one of the five scripts gives as plain values, also those of a language
    model's task; empty for any other script."""
    if script not in SCRIPTS:
        return {}
    source = Path(__file__).with_name(script).read_text()
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == "Args":
            for field in node.body:
                if isinstance(field, ast.AnnAssign) and is_literal(field.value):
                    found[field.target.id] = ast.literal_eval(field.value)
        if isinstance(node, ast.Assign) and node.targets[0].id == "TASKS":
            code = compile(ast.Expression(node.value), script, "eval")
            tasks = eval(code, {"Args": dict})
            found |= tasks.get(env_id, {})
    return {key: value for key, value in found.items() if value is not None}


def is_literal(node: ast.expr) -> bool:
    return isinstance(node, (ast.Constant, ast.UnaryOp, ast.Tuple))


# ---- Statistics


def complete(cells: DataFrame) -> DataFrame:
    """Cells that have all seeds."""
    return cells[cells["missing"] == 0]


def make_cells(runs: DataFrame, unfinished: list[dict]) -> DataFrame:
    """One row per cell: its seeds, how many are missing, scores, mean, standard error, whether it
    is best. No means where seeds are missing."""
    seeds = runs.groupby("kind")["seed"].agg(set).to_dict()
    begun = set()
    for run in unfinished:
        seeds.setdefault(kind_of(run), set()).add(run["seed"])
        family = family_of({"algo": None} | run)
        begun.add((family, run["env_id"], run["noise"]))
    rows = []
    for _, group in runs.groupby([*TASK, "method"], sort=False):
        first = group.iloc[0]
        cell = make_cell(group, len(seeds[first["kind"]]))
        task = (first["env_id"], first["noise"] or "none")
        # A run of an unknown family may be a rival of any method
        cell["begun"] = (first["family"], *task) in begun or (None, *task) in begun
        rows.append(cell)
    cells = DataFrame(rows)
    cells["best"] = cells.index.isin(find_best(cells))
    means = [column for column in cells if column.endswith(("mean", "sem"))]
    cells.loc[cells["missing"] > 0, means] = math.nan
    return cells


def make_cell(runs: DataFrame, planned: int) -> dict:
    """The cell of `runs` of one method, one per seed; `planned` is how many seeds there should
    be."""
    first = runs.iloc[0]
    values = quantities(runs)
    cell = {name: first[name] for name in [*TASK, "method", *LABELS]}
    cell |= {
        "seeds": len(runs),
        "missing": planned - len(runs),
        "scores": runs["final_return_mean"].to_numpy(),
        "by_seed": values,
    }
    cell |= mean_and_error("", values["return"])
    for name in SWEPT:
        cell[f"swept_{name}"] = first[name]
    for name in values.columns.drop("return"):
        cell |= mean_and_error(f"{name}_", values[name])
    return cell


def mean_and_error(prefix: str, values: Series) -> dict[str, float]:
    """Mean and standard error, both nan if a value is."""
    return {
        f"{prefix}mean": values.mean(skipna=False),
        f"{prefix}sem": values.sem(skipna=False),
    }


def quantities(runs: DataFrame) -> DataFrame:
    """What the runs of a cell are compared in, a row per seed: `return`, from the last evaluation,
    `last5`, the mean of the last five evaluations if there are ten or more, and `train`, the mean
    return of the last 100 training episodes; for language models, instead of the last two, the
    other columns of the evaluation; logged quantities, as means over the run."""
    values = DataFrame({"seed": runs["seed"], "return": runs["final_return_mean"]})
    if runs["kind"].iloc[0] != "rlhf":
        if runs["curve"].map(len).min() >= 10:
            values["last5"] = [curve["return_mean"].tail(5).mean() for curve in runs["curve"]]
        values["train"] = runs["train_return_last100"].astype(float)
    columns = [set(curve.columns) for curve in runs["curve"]]
    for column in sorted(set.intersection(*columns) - set(EVALUATION)):
        values[column] = [curve[column].iloc[-1] for curve in runs["curve"]]
    for tag in sorted(set().union(*runs["logged"])):
        for i, logged in runs["logged"].items():
            if tag in logged:
                values.loc[i, tag] = logged[tag]["value"].mean()
    return values.set_index("seed")


def find_best(cells: DataFrame) -> list[int]:
    """Indices of cells that are better than every other one of their row, by Welch's t-test at
    5 %; none of a row that lacks runs."""
    best = []
    for _, row in cells[~cells["alpha_k"]].groupby(TASK):
        incomplete = row["missing"].any() or row["begun"].any()
        if incomplete or len(row) == 1:
            continue
        first = row["mean"].idxmax()
        scores = row["scores"][first]
        rivals = row["scores"].drop(first)
        if all(welch(scores, rival)[0] < 0.05 for rival in rivals):
            best.append(first)
    return best


def welch(x, y) -> tuple[float, float, float]:
    """Welch's t-test: two-sided p-value, and the ends of the 95 % interval of the difference of
    means; nan with fewer than two scores, or if neither `x` nor `y` varies."""
    if min(len(x), len(y)) < 2 or np.ptp(x) == np.ptp(y) == 0:
        return math.nan, math.nan, math.nan
    with warnings.catch_warnings():
        # SciPy warns where one of them has no variance, such as a share that is 1 in every run
        warnings.simplefilter("ignore", RuntimeWarning)
        test = stats.ttest_ind(x, y, equal_var=False)
    low, high = test.confidence_interval()
    return test.pvalue, low, high


def student(differences: Series) -> tuple[float, float]:
    """Ends of the 95 % interval of the mean of paired differences, by Student's t-distribution;
    nan with fewer than two, or if one is missing."""
    if len(differences) < 2:
        return math.nan, math.nan
    half = stats.t.ppf(0.975, len(differences) - 1) * differences.sem(skipna=False)
    return differences.mean() - half, differences.mean() + half


def make_differences(cells: DataFrame) -> DataFrame:
    """Every method minus every other one of its row, in each of their `quantities`, with two
    standard errors and 95 % intervals: of the difference of independent means (Welch), and of the
    mean of differences by seed (Student)."""
    rows = []
    for _, row in complete(cells).groupby(TASK, sort=False):
        methods = [cell for _, cell in row.iterrows()]
        for i, ours in enumerate(methods):
            for other in methods[:i]:
                if other["compared"] and not ours["compared"]:
                    rows += differences_of(other, ours)
                else:
                    rows += differences_of(ours, other)
    return DataFrame(rows)


def differences_of(ours: Series, other: Series) -> list[dict]:
    """A cell minus another one, in each quantity that both have."""
    task = {key: ours[key] for key in TASK}
    rows = []
    for quantity, x in ours["by_seed"].items():
        if quantity not in other["by_seed"]:
            continue
        y = other["by_seed"][quantity]
        p, low, high = welch(x, y)
        pairs = x - y
        paired_low, paired_high = student(pairs)
        row = {
            "quantity": quantity,
            "method": ours["method"],
            "minus": other["method"],
            "difference": x.mean(skipna=False) - y.mean(skipna=False),
            "sem": math.hypot(x.sem(skipna=False), y.sem(skipna=False)),
            "low": low,
            "high": high,
            "p": p,
            "paired_sem": pairs.sem(skipna=False),
            "paired_low": paired_low,
            "paired_high": paired_high,
            "compared": ours["compared"],
        }
        rows.append(task | row)
    return rows


def make_aggregates(cells: DataFrame, reps: int) -> tuple[DataFrame, list[str]]:
    """Interquartile means and probabilities of improvement over all tasks, with 95 % intervals of
    `reps` bootstrap samples, a row each; and names of methods that had to be left out."""
    rows = []
    left_out = []
    normalised = cells.assign(normalised=normalise(cells))
    keys = ["kind", "family", "condition"]
    for (kind, family, condition), group in normalised.groupby(keys, sort=False):
        scores = score_matrices(group)
        for method in group["method"].unique():
            if method not in scores:
                left_out.append(f"{method}, {family.upper()} {condition}")
        if not scores:
            continue
        pairs = {}
        compared = set(group[group["compared"]]["method"])
        for ours in scores:
            for other in scores:
                if ours in compared and ours != other:
                    pairs[f"{ours} > {other}"] = scores[ours], scores[other]
        found = estimate("iqm", scores, interquartile_mean, reps)
        found += estimate("probability of improvement", pairs, probability_of_improvement, reps)
        where = {
            "kind": kind,
            "family": family,
            "condition": condition,
            "tasks": group["env_id"].nunique(),
        }
        rows += [where | row for row in found]
    return DataFrame(rows), left_out


def normalise(cells: DataFrame) -> Series:
    """Scores of each cell (runs), normalised to 0 and 1 at the ends of `score_range`; None where
    these are not known."""
    whole = complete(cells)
    normalised = []
    for _, cell in cells.iterrows():
        low, high = score_range(cell, whole)
        scores = (cell["scores"] - low) / (high - low)
        normalised.append(None if math.isnan(low) else scores)
    return Series(normalised, cells.index)


def score_range(cell: Series, cells: DataFrame) -> tuple[float, float]:
    """On Atari the scores of a random and a human player, else the worst and the best score of the
    environment in `cells`; nan if there are none."""
    if cell["kind"] == "atari":
        return RANDOM_AND_HUMAN.get(cell["env_id"], (math.nan, math.nan))
    same_kind = cells[cells["kind"] == cell["kind"]]
    same_task = same_kind[same_kind["env_id"] == cell["env_id"]]
    scores = same_task["scores"].explode().astype(float)
    low = scores.min()
    return low, max(scores.max(), low + 1e-9)


def score_matrices(cells: DataFrame) -> dict[str, np.ndarray]:
    """Normalised scores (seeds, tasks) of each method that has run every task with every seed, two
    at least; of none if the range of a task is not known."""
    matrices = {}
    if cells["normalised"].isna().any():
        return matrices
    tasks = sorted(cells["env_id"].unique())
    for method, group in cells.groupby("method", sort=False):
        whole = len(group) == len(complete(group)) == len(tasks)
        if whole and group["seeds"].min() > 1:
            scores = group.set_index("env_id")["normalised"]
            matrices[method] = np.stack(list(scores[tasks]), axis=1)
    return matrices


def estimate(statistic: str, scores: dict, function, reps: int) -> list[dict]:
    """`function` of each of `scores`, {name: matrix or pair of matrices}, with its 95 % stratified
    bootstrap interval."""
    points, intervals = rly.get_interval_estimates(scores, function, reps=reps)
    rows = []
    for name, point in points.items():
        low, high = intervals[name][:, 0]
        row = {
            "statistic": statistic,
            "method": name,
            "value": point[0],
            "low": low,
            "high": high,
        }
        rows.append(row)
    return rows


def interquartile_mean(scores: np.ndarray) -> np.ndarray:
    """(1,), of scores (runs, tasks)."""
    return np.array([metrics.aggregate_iqm(scores)])


def probability_of_improvement(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """P(X > Y), ties half, mean over tasks: (1,), of scores (runs, tasks). As rliable's, whose
    Mann-Whitney test at every bootstrap sample would take minutes a pair."""
    wins = (x[:, None] > y).mean()  # of all pairs of runs
    ties = (x[:, None] == y).mean()
    return np.array([wins + ties / 2])


# ---- Tables


def number(mean: float, sem: float) -> str:
    """Mean ± standard error, with the digits that the size of the mean deserves; nothing if there
    is no mean."""
    if math.isnan(mean):
        return ""
    digits = 0
    for limit in (100, 10, 1):
        if abs(mean) < limit:
            digits += 1
    text = f"{mean:,.{digits}f}"
    return text if math.isnan(sem) else f"{text} ± {sem:,.{digits}f}"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table of texts: `header`, and `rows` as long as it."""
    line = ["---"] * len(header)
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, line, *rows])


def in_order(cells: DataFrame) -> list[str]:
    """Methods of `cells`: baselines, then symmetric ones, then those of other scripts."""
    ordered = cells.sort_values(["order", "method"])
    return list(ordered["method"].unique())


def file_name(name: str) -> str:
    return re.sub(r"[ /:]", "-", name)


def table(cells: DataFrame, out: Path, name: str, value: str = "") -> str:
    """One row per environment, one column per method: columns `value`mean and `value`sem of
    `cells`. Writes it as CSV, and returns it as Markdown."""
    methods = in_order(cells)
    rows = []
    for env_id, group in cells.groupby("env_id"):
        row = [env_id]
        by_method = group.set_index("method")
        for method in methods:
            there = method in by_method.index
            row.append(cell_text(by_method.loc[method], value) if there else "")
        rows.append(row)
    what = value.rstrip("_") or "evaluation"
    texts = DataFrame(rows, columns=["env_id", *methods])
    plain = texts.replace(r"\*\*", "", regex=True)
    plain.to_csv(out / file_name(f"table-{name}-{what}.csv"), index=False)
    return markdown(["", *methods], rows)


def cell_text(cell: Series, value: str) -> str:
    if cell["missing"]:
        return f"{cell['seeds']} of {cell['seeds'] + cell['missing']} seeds"
    text = number(cell[f"{value}mean"], cell[f"{value}sem"])
    return f"**{text}**" if cell["best"] and not value else text


QUANTITIES = {
    "return": "last evaluation",
    "last5": "last five evaluations",
    "train": "training",
}


def difference_table(differences: DataFrame) -> str:
    rows = []
    for _, row in differences.iterrows():
        quantity = QUANTITIES.get(row["quantity"], row["quantity"])
        what = [row["env_id"], row["condition"], quantity]
        methods = f"{row['method']} minus {row['minus']}"
        difference = number(row["difference"], row["sem"])
        interval = interval_text(row["low"], row["high"])
        p = "" if math.isnan(row["p"]) else f"{row['p']:.3f}"
        paired = interval_text(row["paired_low"], row["paired_high"])
        rows.append([*what, methods, difference, interval, p, paired])
    header = ["", "noise", "quantity", "", "difference"]
    return markdown([*header, "95 % interval", "p (Welch)", "95 % interval by seed"], rows)


def chance_text(tested: DataFrame) -> str:
    """How many differences have p < 0.05, and which remain significant after correction for
    multiple comparisons (Benjamini and Hochberg 1995)."""
    significant = tested["p"] < 0.05
    corrected = stats.false_discovery_control(tested["p"])
    remaining = tested[corrected <= 0.05]
    text = (
        f"All pairs of methods were compared in each measure (logged quantities left out): "
        f"{len(tested)} differences, of which {significant.sum()} have p < 0.05; chance alone "
        f"would give {0.05 * len(tested):.1f}. After correction for multiple comparisons "
        f"(Benjamini and Hochberg, 5 %), significant: {len(remaining)}"
    )
    names = []
    for _, row in remaining.iterrows():
        quantity = QUANTITIES.get(row["quantity"], row["quantity"])
        task = f"{row['env_id']}, {row['condition']}, {quantity}"
        names.append(f"{row['method']} minus {row['minus']} ({task})")
    if 0 < len(names) <= 30:  # more are hard to read
        text += ": " + "; ".join(names)
    return text + "."


def interval_text(low: float, high: float) -> str:
    """Both ends, with two digits of the interval's length, or of its ends if they are equal; empty
    for nan."""
    if math.isnan(low):
        return ""
    size = high - low or abs(high)
    decimals = 0
    if size > 0:
        decimals = max(0, 1 - math.floor(math.log10(size)))
    return f"{low:,.{decimals}f} to {high:,.{decimals}f}"


def aggregate_table(aggregates: DataFrame) -> str:
    rows = []
    for _, row in aggregates.iterrows():
        value = f"{row['value']:.3f}"
        interval = f"{row['low']:.3f} to {row['high']:.3f}"
        what = [row["statistic"], row["method"], row["condition"], str(row["tasks"])]
        rows.append([*what, value, interval])
    return markdown(["", "", "noise", "tasks", "value", "95 % interval"], rows)


def describe_runs(runs: DataFrame) -> str:
    """What it takes to repeat or to judge them: commits, versions, machines, time."""
    hours = runs["wall_s"].sum() / 3600
    lines = [
        f"{len(runs)} runs, {hours:,.1f} hours of computing; the command of each is in runs.csv."
    ]
    for what in ("commit", "versions", "hardware"):
        counts = Counter(recorded_text(run, what) for _, run in runs.iterrows())
        for text, count in counts.items():
            lines.append(f"- {what}: {text or 'not recorded'} ({count} runs)")
    return "\n".join(lines)


def recorded_text(run: Series, what: str) -> str | None:
    """What a run recorded of its commit, versions or hardware, in a line."""
    script = run["script"]
    part = run["recorded"][what]
    if what == "commit":
        changed = run["recorded"].get("script_status")
        return f"{part}, but {script} was changed" if changed else part
    names = part
    if what == "versions":
        names = ("python", "torch", "gymnasium", "mujoco", "ale-py", script)
    return ", ".join(f"{name} {part[name]}" for name in names if name in part)


def write_tables(
    runs: DataFrame,
    cells: DataFrame,
    differences: DataFrame,
    aggregates: DataFrame,
    out: Path,
) -> None:
    """CSV files of everything."""
    columns = ["name", "script", "env_id", "condition", "method", "seed", "total_timesteps"]
    listed = runs[[*columns, *RESULTS]]
    commits = []
    commands = []
    curves = []
    for _, run in runs.iterrows():
        command = run["recorded"]["command"]
        commits.append(run["recorded"]["commit"])
        commands.append(shlex.join(["python", *command]) if command else None)
        curves.append(run["curve"].assign(name=run["name"]))
    filled = [curve for curve in curves if len(curve)]
    frames = {
        "runs": listed.assign(commit=commits, command=commands),
        "curves": pd.concat(filled or curves),
        "tables": cells.drop(columns=[*LABELS, "scores", "by_seed", "begun"]),
        "differences": differences,
        "aggregates": aggregates,
    }
    for name, frame in frames.items():
        frame.to_csv(out / f"{name}.csv", index=False, float_format="%.6g")


# ---- Figures


def color_methods(methods: list[str]) -> dict[str, str]:
    """The color of each method, in every picture of a report."""
    colors = {method: COLORS[method] for method in methods if method in COLORS}
    for i, method in enumerate(sorted(set(methods) - set(colors))):
        colors[method] = OTHER_COLORS[i % len(OTHER_COLORS)]
    return colors


def save(figure, out: Path, name: str) -> str:
    """Saves as PNG and SVG. Returns the Markdown that shows it."""
    file = file_name(name)
    figure.savefig(out / f"{file}.png", dpi=120)
    figure.savefig(out / f"{file}.svg", metadata={"Date": None})
    plt.close(figure)
    return f"![{file}]({file}.png)"


def panels(count: int, height: float = 3.2, **options):
    """A figure with `count` panels of `height` inches, at most five in a row. `options` are those
    of plt.subplots."""
    rows = math.ceil(count / 5)
    columns = math.ceil(count / rows)
    options |= {"figsize": (max(7, 4 * columns), height * rows + 0.6)}
    figure, axes = plt.subplots(rows, columns, squeeze=False, layout="constrained", **options)
    for ax in axes.flat[count:]:
        ax.remove()
    return figure, list(axes.flat[:count])


def add_legend(figure, axes, colors: dict[str, str]) -> None:
    """One legend for all panels, below them, in the order of `colors`."""
    lines = {}
    for ax in axes:
        handles, labels = ax.get_legend_handles_labels()
        lines |= dict(zip(labels, handles))
    methods = [method for method in colors if method in lines]
    ordered = [lines[method] for method in methods]
    figure.legend(ordered, methods, loc="outside lower center", ncols=3, frameon=False)


def curve_of(run: Series, column: str) -> Series:
    """Values of `column` by step, logged or of the evaluations; empty if the run has none."""
    if column in run["logged"]:
        return run["logged"][column].set_index("step")["value"]
    if column in run["curve"]:
        return run["curve"].set_index("step")[column]
    return Series()


def draw_curves(
    runs: DataFrame, column: str, label: str, out: Path, name: str, colors: dict
) -> str:
    """A panel per environment, a line per method, by `draw_mean_curve`. Returns the Markdown that
    shows it, or nothing if no run has such a curve."""
    lengths = [len(curve_of(run, column)) for _, run in runs.iterrows()]
    shown = runs[np.array(lengths) > 0]
    if shown.empty:
        return ""
    figure, axes = panels(shown["env_id"].nunique())
    for ax, (env_id, of_task) in zip(axes, shown.groupby("env_id")):
        for method, group in of_task.groupby("method", sort=False):
            curves = [curve_of(run, column) for _, run in group.iterrows()]
            draw_mean_curve(ax, curves, method, colors[method])
        ax.set(title=env_id, xlabel="steps")
    axes[0].set_ylabel(label)
    add_legend(figure, axes, colors)
    return save(figure, out, name)


def draw_mean_curve(ax, curves: list[Series], method: str, color: str) -> None:
    """Mean of `curves`, one per seed, and its 95 % bootstrap interval. Between its steps a curve is
    interpolated. Curves of many points are smoothed by running means over a twentieth of them."""
    values = pd.concat(curves, axis=1, ignore_index=True).sort_index()
    values = values.interpolate("index", limit_area="inside").dropna()
    window = max(1, len(values) // 20)
    smooth = values.rolling(window, min_periods=1).mean()
    scores = {method: smooth.to_numpy().T[:, None, :]}  # seeds, one task, steps
    mean, interval = rly.get_interval_estimates(scores, lambda x: x.mean((0, 1)), reps=1000)
    ax.plot(smooth.index, mean[method], color=color, label=method)
    ax.fill_between(smooth.index, *interval[method], color=color, alpha=0.12, lw=0)


def draw_intervals(ax, rows: DataFrame, labels: list[str], conditions: list[str]) -> None:
    """Values with their intervals: `labels` from top to bottom, and below each other the
    conditions. `rows` have columns label, condition, value, low and high."""
    heights = {label: -i for i, label in enumerate(labels)}
    for i, condition in enumerate(conditions):
        group = rows[rows["condition"] == condition]
        value = group["value"].to_numpy()
        error = abs(group[["low", "high"]].to_numpy().T - value)
        y = group["label"].map(heights) - 0.7 * i / len(conditions)
        marker = MARKERS[i % len(MARKERS)]
        # black, since methods have colors
        ax.errorbar(value, y, xerr=error, fmt=marker, ms=4, color="black", label=condition)
    ax.set_yticks(list(heights.values()), labels)


def draw_differences(differences: DataFrame, out: Path, name: str) -> str:
    """Differences in the last evaluation and their 95 % intervals (Welch), a panel per environment.
    Returns the Markdown that shows it, or nothing if there is no interval."""
    shown = differences[differences["quantity"] == "return"].dropna(subset="low")
    if shown.empty:
        return ""
    rows = shown.rename(columns={"difference": "value"})
    rows["label"] = rows["method"] + " minus " + rows["minus"]
    labels = list(rows["label"].unique())
    conditions = list(rows["condition"].unique())
    height = 0.6 + 0.2 * len(labels) * len(conditions)
    figure, axes = panels(rows["env_id"].nunique(), max(2.5, height), sharey=True)
    for ax, (env_id, of_task) in zip(axes, rows.groupby("env_id")):
        draw_intervals(ax, of_task, labels, conditions)
        ax.axvline(0, color="grey", lw=0.8, zorder=0)
        ax.set(title=env_id, xlabel="difference in the last evaluation")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=5, frameon=False)
    return save(figure, out, name)


def draw_aggregates(aggregates: DataFrame, out: Path, name: str) -> str:
    """Interquartile means, and probabilities of improvement if there are any, a marker per
    noise."""
    sides = aggregates.groupby("statistic")
    height = max(2.5, 1 + 0.3 * aggregates["method"].nunique())
    size = (6 * len(sides), height)
    figure, axes = plt.subplots(1, len(sides), figsize=size, squeeze=False, layout="constrained")
    conditions = list(aggregates["condition"].unique())
    for ax, (statistic, side) in zip(axes[0], sides):
        labels = list(side["method"].unique())
        draw_intervals(ax, side.rename(columns={"method": "label"}), labels, conditions)
        if statistic == "iqm":
            ax.set_xlabel("interquartile mean of normalised scores")
        else:
            ax.set_xlabel(statistic)
            ax.axvline(0.5, color="grey", lw=0.8, zorder=0)
    handles = axes[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=5, frameon=False)
    return save(figure, out, name)


def draw_noise(cells: DataFrame, out: Path, name: str, colors: dict) -> str:
    """Score against noise level: a panel per environment and kind of noise, a line per method.
    Complete cells only."""
    whole = complete(cells)
    shown = []  # (kind of noise, environment, cells)
    for noise in whole["noise"].unique():
        levels = whole[whole["noise"].isin(["", noise])]
        for env_id, group in levels.groupby("env_id"):
            if noise and (group["noise"] == noise).any():
                shown.append((noise, env_id, group))
    if not shown:
        return ""
    figure, axes = panels(len(shown))
    for ax, (noise, env_id, of_task) in zip(axes, shown):
        for method, group in of_task.sort_values("level").groupby("method", sort=False):
            points = group[["level", "mean", "sem"]].to_numpy().T
            ax.errorbar(*points, color=colors[method], label=method, capsize=3)
        ax.set(title=env_id, xlabel=f"level of noise: {noise}")
    axes[0].set_ylabel("return, mean ± standard error")
    add_legend(figure, axes, colors)
    return save(figure, out, name)


def draw_sweep(cells: DataFrame, out: Path, name: str) -> str:
    """Heat maps of mean scores over two swept settings, with a column for each value of the third,
    a row for each method, and a row for the symmetric method minus the other. Complete cells only;
    white is missing."""
    x, y, third = sorted(SWEPT, key=lambda key: -cells[f"swept_{key}"].nunique())
    levels = {}
    for key in (third, y, x):
        levels[key] = sorted(complete(cells)[f"swept_{key}"].unique())
    grids = sweep_grids(cells, levels)
    rows = len(grids)
    columns = len(levels[third])
    x_labels = [f"{value:g}" for value in levels[x]]
    y_labels = [f"{value:g}" for value in levels[y]]
    scores = cells["mean"]
    size = (1 + 3.6 * columns, 0.6 + 2.9 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for row, (base, grid) in zip(axes, grids.items()):
        colors = dict(vmin=scores.min(), vmax=scores.max(), cmap="viridis")
        if base == "difference":
            largest = np.nan_to_num(abs(grid)).max()
            colors = dict(vmin=-largest, vmax=largest, cmap="RdBu")
        for ax, level, means in zip(row, levels[third], grid):
            image = draw_heat_map(ax, means, colors)
            ax.set_xticks(range(len(x_labels)), x_labels)
            ax.set_yticks(range(len(y_labels)), y_labels)
            ax.set(xlabel=x, ylabel=y, title=f"{base}, {third} {level:g}")
        figure.colorbar(image, ax=row)
    return save(figure, out, name)


def sweep_grids(cells: DataFrame, levels: dict[str, list]) -> dict[str, np.ndarray]:
    """Mean scores of each method at all `levels`, {setting: values}, an axis per setting; nan where
    seeds are missing. Of two methods, one of them symmetric, also their difference."""
    columns = [f"swept_{key}" for key in levels]
    everywhere = pd.MultiIndex.from_product(levels.values())
    shape = [len(values) for values in levels.values()]
    grids = {}
    for base, group in cells.groupby("base", sort=False):
        means = group.set_index(columns)["mean"].reindex(everywhere)
        grids[base] = means.to_numpy().reshape(shape)
    ours = cells[cells["symmetric"]]["base"].unique()
    others = cells[~cells["symmetric"]]["base"].unique()
    if len(ours) == len(others) == 1:
        grids["difference"] = grids[ours[0]] - grids[others[0]]
    return grids


def draw_heat_map(ax, means: np.ndarray, colors: dict):
    """One panel of a sweep, `means` (y, x), with its numbers. Returns the image."""
    box = dict(facecolor="white", alpha=0.6, lw=0)
    for (y, x), mean in np.ndenumerate(means):
        if not math.isnan(mean):
            ax.text(x, y, f"{mean:,.0f}", ha="center", va="center", fontsize=8, bbox=box)
    return ax.imshow(means, aspect="auto", **colors)


# ---- The report


def write_report(args: Args, out: Path) -> None:
    """Reads all runs and writes report.md, CSV files and figures into `out`. Raises Refusal."""
    np.random.seed(0)  # rliable ignores its random_state and uses NumPy's global generator
    finished, unfinished = read_runs(list(args.runs), args.logged)
    logged = set().union(*finished["logged"])
    for tag in args.logged:
        # Those of the default are not in every script's runs
        if tag not in logged and tag not in Args.logged:
            raise Refusal(f"--logged {tag}: no finished run logged it; TensorBoard lists the names")
    runs = label_methods(finished)
    if args.keep:
        keep_runs(finished, args.keep)
    if args.seeds is not None:
        runs, unfinished = select_seeds(runs, unfinished, args.seeds)
    cells = make_cells(runs, unfinished)
    differences = make_differences(cells)
    aggregates, left_out = make_aggregates(cells, args.reps)
    write_tables(runs, cells, differences, aggregates, out)

    how_to_read = __doc__.split("\n\n", 2)[2].strip()
    page = ["# Report", how_to_read, missing_text(cells, unfinished)]
    colors = color_methods(in_order(cells))
    for (kind, family), section in cells.groupby(["kind", "family"], sort=False):
        frames = [of_section(frame, kind, family) for frame in (runs, differences, aggregates)]
        page += write_section(section, *frames, colors, out)
    if left_out:
        why = "they lack a task or a seed, have one seed, or a game has no human score here"
        page.append(f"Left out of statistics over all tasks ({why}): {'; '.join(left_out)}.")
    page += ["## What was run", describe_runs(runs)]
    paragraphs = [part for part in page if part]
    (out / "report.md").write_text("\n\n".join(paragraphs) + "\n")


def missing_text(cells: DataFrame, unfinished: list[dict]) -> str:
    """Says what is incomplete; nothing if all is there."""
    lacking = len(cells) - len(complete(cells))
    if not unfinished and not lacking:
        return ""
    begun = f"{len(unfinished)} runs have begun and not finished"
    if unfinished:
        begun += f": {', '.join(run['name'] for run in unfinished)}"
    return f"**Incomplete**: {lacking} of {len(cells)} cells lack seeds; {begun}."


def of_section(frame: DataFrame, kind: str, family: str) -> DataFrame:
    if frame.empty:
        return frame
    return frame[(frame["kind"] == kind) & (frame["family"] == family)]


def write_section(
    cells: DataFrame,
    runs: DataFrame,
    differences: DataFrame,
    aggregates: DataFrame,
    colors: dict,
    out: Path,
) -> list[str]:
    """Paragraphs of report.md on the methods of one kind and family."""
    kind, family = cells.iloc[0][["kind", "family"]]
    page = [f"## {kind}, {family.upper()}", shared_text(runs)]
    alike = cells.groupby(["env_id", "base"])
    varied = [key for key in SWEPT if (alike[f"swept_{key}"].nunique() > 1).any()]
    if len(varied) > 1:
        for (env_id, condition), part in cells.groupby(["env_id", "condition"], sort=False):
            if len(complete(part)):
                name = f"sweep-{family}-{env_id}-{condition}"
                page += [f"{env_id}, {condition}: mean return", draw_sweep(part, out, name)]
        return page
    for condition, part in cells.groupby("condition", sort=False):
        there = runs[runs["condition"] == condition]
        page += write_condition(part, there, colors, out)
    if (cells.groupby("noise")["level"].nunique() > 1).any():
        page.append("### Against the level of noise")
        page.append(draw_noise(cells, out, f"noise-{kind}-{family}", colors))
    if len(differences):
        logged = set().union(*runs["logged"])
        compared = differences[differences["compared"]]
        shown = compared[~compared["quantity"].isin(logged)]
        if len(shown):
            picture = draw_differences(shown, out, f"differences-{kind}-{family}")
            page += ["### Differences", picture, difference_table(shown)]
            tested = differences[~differences["quantity"].isin(logged)].dropna(subset=["p"])
            if len(tested):
                page.append(chance_text(tested))
    if len(aggregates):
        page += ["### Over all tasks", aggregate_table(aggregates)]
        page.append(draw_aggregates(aggregates, out, f"aggregates-{kind}-{family}"))
    return page


def write_condition(cells: DataFrame, runs: DataFrame, colors: dict, out: Path) -> list[str]:
    """Tables and curves of one noise, given its cells and runs."""
    kind, family, condition = cells.iloc[0][["kind", "family", "condition"]]
    name = f"{kind}-{family}-{condition}"
    seeds = (cells["seeds"] + cells["missing"]).max()
    shown = runs.merge(complete(cells)[["env_id", "method"]])
    logged = set().union(*shown["logged"])

    page = [f"### {kind}, {family.upper()}, {condition} (seeds: {seeds})"]
    page += ["Last evaluation:", table(cells, out, name)]
    label = "return of evaluations"
    page.append(draw_curves(shown, "return_mean", label, out, f"curves-{name}", colors))
    columns = set().union(*cells["by_seed"])
    if "last5" in columns:
        page += ["Mean of the last five evaluations:", table(cells, out, name, "last5_")]
    if "train" in columns:
        page += ["The last 100 episodes of training:", table(cells, out, name, "train_")]
    columns -= set(QUANTITIES)
    for column in sorted(columns):
        if not cells[f"{column}_mean"].fillna(0).any():
            continue
        if column in logged:
            page.append(f"`{column}`, mean over the run:")
            picture = f"logged-{column}-{name}"
        else:  # of language models
            page.append(f"Last evaluation, {column}:")
            picture = f"curves-{column}-{name}"
        page.append(table(cells, out, name, f"{column}_"))
        page.append(draw_curves(shown, column, column, out, picture, colors))
    return page


def main(args: Args) -> None:
    """Writes the report to `args.out`, all of it or nothing. Raises Refusal, OSError."""
    if args.seeds is not None and args.seeds < 1:
        raise Refusal(f"--seeds {args.seeds}: must be at least 1")
    if args.reps < 1:
        raise Refusal(f"--reps {args.reps}: must be at least 1")
    if not args.runs:
        raise Refusal("no runs; give folders of runs, such as runs/quick")
    out = args.out
    if args.keep and args.keep.resolve().is_relative_to(out.resolve()):
        raise Refusal(f"--keep {args.keep}: inside --out, which is replaced; choose another")
    if out.exists() and any(out.iterdir()):
        is_report = (out / "report.md").exists()
        ours = (".md", ".csv", ".png", ".svg")
        others = [path for path in out.iterdir() if path.suffix not in ours]
        if others or not is_report:  # these are somebody's runs, or other files
            raise Refusal(f"--out {out}: a folder that is not a report; choose another")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        new = Path(scratch, "new")
        new.mkdir()
        write_report(args, new)
        if out.exists():
            shutil.move(out, Path(scratch, "old"))
        shutil.move(new, out)
    print(out / "report.md")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except (Refusal, OSError) as error:
        sys.exit(f"error: {error}")
