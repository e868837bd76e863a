"""Turns finished runs into tables, statistics over all tasks and learning curves, in a folder:
report/.

    python report.py runs/quick                              # all that benchmark.sh left there
    python report.py runs/continuous/Hopper-v4__* --out hopper
    python report.py runs/quick --logged losses/entropy      # any quantity that the runs logged

A method is a script with those of its settings that are compared: DPPO; SPPO; DPPO, max-grad-norm
/ k, where k = alpha + beta |Z| is that of the symmetric runs there. Runs of a script that is not of
this repository have its file name: sppo_mine. A cell is a method on an environment with one kind
and level of noise; its runs differ in the seed and nothing else, or there is no report. It shows
the last evaluation, mean ± standard error over seeds. A cell that lacks seeds which others have
shows how many it has, and no mean: --seeds compares on fewer. Bold is the best of a row, if the row
is complete and Welch's t-test finds it better than every other method, each at 5 %, two-sided;
"alpha k", the same method as the symmetric one, does not compete.

Over all tasks, by the library rliable (Agarwal et al., NeurIPS 2021): interquartile mean of
normalised scores and probability of improvement, with 95 % stratified bootstrap intervals, which a
handful of seeds makes too narrow. Atari scores are normalised by those of a random and a human
player (Wang et al., ICML 2016), others by the worst (0) and the best run (1) of the environment
here, all methods and noises together: they compare within a report only."""

import ast
import functools
import json
import math
import re
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

SCRIPTS = [
    "sa2c_atari.py",
    "sa2c_continuous.py",
    "sppo_atari.py",
    "sppo_continuous.py",
    "sppo_rlhf.py",
]
ALGOS = ["a2c", "da2c", "sa2c", "ppo", "dppo", "sppo"]
SYMMETRIC = ["sa2c", "sppo"]

# Settings that make another method of the same script, named by their flags where not the default
SWEPT = ["learning_rate", "clip_coef", "update_epochs"]
COMPARED = [*SWEPT, "max_grad_norm", "vf_coef", "ent_coef", "ce_coef", "norm_adv", "layer_norm"]
COMPARED += ["reward_model", "reward_aggregate", "correct_flips", "divide_by_p_old"]
WEIGHTS = ["alpha", "beta", "z"]
CELL = ["script", "env_id", "noise", "noise_level", "algo", "policy", *WEIGHTS, *COMPARED]
# What may differ within a cell, since it has no part in what is learnt
FREE = ["seed", "run_name", "runs_dir", "resume", "device", "compile", "track", "capture_video"]
FREE += ["log_freq", "checkpoint_freq", "micro_batch_size"]

RECORDED = ["args", "command", "commit", "versions", "hardware"]
RESULTS = ["final_return_mean", "final_return_std", "train_return_last100", "sps", "wall_s"]
RESULTS += ["finished"]
NEEDED = ["script", "algo", "env_id", "seed", "noise", "noise_level", *WEIGHTS]
NEEDED += ["total_timesteps", *RESULTS]
TEXTS = ["script", "algo", "env_id", "task", "noise", "policy"]
NUMBERS = ["seed", "total_timesteps", "noise_level", *WEIGHTS, *SWEPT, "eval_freq", "num_envs"]
NUMBERS += ["num_steps", "batch_size", "max_grad_norm", "vf_coef", "ent_coef", "ce_coef"]
NUMBERS += ["final_return_mean", "final_return_std", "sps", "wall_s"]
EVALUATION = ["step", "return_mean", "return_std", "length_mean", "episodes"]
AGAIN = "delete the run's folder and run it again"

# Of a picture's lines; other methods have OTHER_COLORS, in the order of their names
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
OTHER_COLORS = ["tab:pink", "tab:olive", "black", "gold", "navy", "lime", "maroon", "violet"]
OTHER_COLORS += ["teal", "salmon", "indigo", "khaki", "skyblue", "darkgreen"]

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
    # Folders of runs, as benchmark.sh leaves them, or runs
    runs: tyro.conf.Positional[tuple[Path, ...]]
    # Folder to write; an earlier report there is replaced
    out: Path = Path("report")
    # Compare on the first so many seeds; default: all that there are
    seeds: int | None = None
    # TensorBoard tags
    logged: tuple[str, ...] = ("losses/advantage_sign_flips", "losses/clipped_gradients")
    # Also copy finished runs here, small enough for git; report.py reads them
    keep: Path | None = None
    # Bootstrap samples of statistics over all tasks
    reps: int = 10_000


class Refusal(ValueError):
    """What is wrong with what was given, in one line, and what to do."""


# Reading


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


def is_number(value) -> bool:
    """Whether it is a number, and finite; neither nan nor true is."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def check_values(path: Path, values: dict) -> None:
    """Raises Refusal for a value of another type than its key wants."""
    for key, value in values.items():
        if key in NUMBERS and not is_number(value):
            raise Refusal(f"{path}: {key} is {value!r}, not a finite number; {AGAIN}")
        if key in TEXTS and not isinstance(value, str):
            raise Refusal(f"{path}: {key} is {value!r}, not a text; {AGAIN}")


def read_recorded(path: Path) -> dict:
    """What args.json says: arguments, command, commit, versions, hardware, and whatever else newer
    scripts record."""
    recorded = read_json(path, RECORDED)
    types = {"args": dict, "command": list, "versions": dict, "hardware": dict}
    for key, kind in types.items():
        if not isinstance(recorded[key], kind):
            raise Refusal(f"{path}: {key} is {recorded[key]!r}; {AGAIN}")
    words = recorded["command"]
    if not words or not all(isinstance(word, str) for word in words):
        raise Refusal(f"{path}: command is {words!r}; {AGAIN}")
    args = recorded["args"]
    for key in ("seed", "noise", "total_timesteps"):
        if key not in args:
            raise Refusal(f"{path}: no {key!r} among the arguments; {AGAIN}")
    check_values(path, {"env_id": args.get("env_id", args.get("task"))} | args)
    return recorded


def peer_recorded(run: dict) -> dict:
    """What args.json would say, for a run of another library, which leaves a summary.json only."""
    args = {key: value for key, value in run.items() if key not in [*RESULTS, "version"]}
    versions = {run["script"]: run.get("version")}
    return {"args": args, "command": [], "commit": None, "versions": versions, "hardware": {}}


def check_summary(path: Path, run: dict, recorded: dict) -> None:
    """Raises Refusal unless the summary `run` is whole and belongs to the arguments `recorded`."""
    check_values(path, run)
    if run["finished"] is not True:
        raise Refusal(f"{path}: finished is {run['finished']!r}; {AGAIN}")
    if run["train_return_last100"] is not None and not is_number(run["train_return_last100"]):
        raise Refusal(f"{path}: train_return_last100 is {run['train_return_last100']!r}; {AGAIN}")
    if run["script"] in SCRIPTS and run["algo"] not in ALGOS:
        raise Refusal(f"{path}: algo is {run['algo']!r}, which {run['script']} has not; {AGAIN}")
    args = recorded["args"]
    for key in sorted(args.keys() & run.keys() - {"resume", "compile"}):  # of this start only
        if run[key] != args[key]:
            raise Refusal(f"{path}: {key} is {run[key]!r}, in args.json {args[key]!r}; {AGAIN}")


def check_schedule(path: Path, args: dict) -> None:
    """Raises Refusal unless `args` of one of the five scripts say when it evaluates."""
    keys = ["batch_size"] if "task" in args else ["num_envs", "num_steps"]
    for key in ["eval_freq", *keys]:
        value = args.get(key)
        if not isinstance(value, int) or value < (0 if key == "eval_freq" else 1):
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


def read_curve(path: Path, run: dict, recorded: dict) -> pd.DataFrame:
    """Evaluations, a row each. Raises Refusal unless they are whole and the summary's. Scripts that
    are not ours, or that git saw changed, may evaluate when they like."""
    try:
        curve = pd.read_csv(path, float_precision="round_trip")
    except (OSError, ValueError) as error:
        raise Refusal(f"{path}: {' '.join(str(error).split())}") from error
    if missing := [column for column in EVALUATION if column not in curve]:
        raise Refusal(f"{path}: no {missing}; {AGAIN}")
    if curve.empty:
        raise Refusal(f"{path}: no rows; {AGAIN}")
    for column in curve:
        if not pd.api.types.is_numeric_dtype(curve[column]):
            text = curve[column][pd.to_numeric(curve[column], errors="coerce").isna()].iloc[0]
            raise Refusal(f"{path}: {column} is {text!r}, not a number; {AGAIN}")
    for column in EVALUATION:
        if not np.isfinite(curve[column]).all():
            raise Refusal(f"{path}: not every {column} is a finite number; {AGAIN}")

    steps = list(curve["step"])
    if (np.diff(steps) <= 0).any():
        raise Refusal(f"{path}: rows that are doubled or out of order, by their steps; {AGAIN}")
    if steps[-1] < run["total_timesteps"]:
        raise Refusal(f"{path}: ends at step {steps[-1]} of {run['total_timesteps']}; {AGAIN}")
    if run["script"] in SCRIPTS and not recorded.get("script_status"):
        check_schedule(path.with_name("args.json"), recorded["args"])
        if wrong := sorted(set(evaluation_steps(recorded["args"])) ^ set(steps)):
            raise Refusal(f"{path}: evaluations missing or not due, at steps {wrong[:3]}; {AGAIN}")
    for column in ("return_mean", "return_std"):
        last, final = curve[column].iloc[-1], run[f"final_{column}"]
        if not math.isclose(last, final, rel_tol=1e-6, abs_tol=1e-12):
            raise Refusal(f"{path}: last {column} is {last}, in summary.json {final}; {AGAIN}")
    return curve


def read_logged(path: Path, tags: tuple[str, ...]) -> dict[str, pd.DataFrame]:
    """What a run logged: {tag: columns step, value}, without tags that it did not log. From
    logged.csv, where `keep_runs` has left one, else from TensorBoard's files."""
    kept = path / "logged.csv"
    if kept.exists():
        try:
            types = {"tag": str, "step": float, "value": float}
            everything = pd.read_csv(kept, usecols=list(types), dtype=types)
        except (OSError, ValueError) as error:
            raise Refusal(f"{kept}: {' '.join(str(error).split())}") from error
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
            if (run["path"] / name).exists():  # other libraries leave a summary only
                shutil.copy(run["path"] / name, target)
        parts = []
        for tag, values in run["logged"].items():
            blocks = np.arange(len(values)) // math.ceil(len(values) / 100)
            means = values.groupby(blocks).agg({"step": "last", "value": "mean"})
            parts.append(means.assign(tag=tag)[["tag", "step", "value"]])
        if parts:
            logged = pd.concat(parts)
            logged.to_csv(target / "logged.csv", index=False, float_format="%.4g")


def find_runs(folders: list[Path]) -> list[Path]:
    """Folders of runs that are in `folders`, or are themselves given."""
    paths = []
    for folder in folders:
        inside = {
            path.parent for name in ("args", "summary") for path in folder.glob(f"*/{name}.json")
        }
        itself = (folder / "args.json").exists() or (folder / "summary.json").exists()
        paths += [folder] if itself else sorted(inside)
        if not inside and not itself:
            raise Refusal(f"{folder}: no runs in it; give folders of runs, such as runs/quick")
    doubled = [name for name, times in Counter(path.name for path in paths).items() if times > 1]
    if doubled:
        where = " and ".join(str(path) for path in paths if path.name == doubled[0])
        raise Refusal(f"{where}: two runs of one name; leave one out")
    return paths


def read_finished(path: Path, tags: tuple[str, ...]) -> dict:
    """A finished run: its summary, with its default settings for those that its version of the
    script did not have, and name, path, recorded, curve, logged."""
    run = read_json(path / "summary.json", NEEDED)
    peer = not (path / "args.json").exists() and not str(run["script"]).endswith(".py")
    recorded = peer_recorded(run) if peer else read_recorded(path / "args.json")
    check_summary(path / "summary.json", run, recorded)
    if peer and not (path / "progress.csv").exists():
        curve = pd.DataFrame(columns=EVALUATION)
    else:
        curve = read_curve(path / "progress.csv", run, recorded)
    found = {"name": path.name, "path": path, "recorded": recorded, "curve": curve}
    found["logged"] = read_logged(path, tags)
    return defaults(run["script"], run["env_id"]) | run | found


def read_runs(folders: list[Path], tags: tuple[str, ...]) -> tuple[pd.DataFrame, list[dict]]:
    """Finished runs, a row each, and the arguments of those that have begun and not finished.

    Raises Refusal: no runs, a file that is corrupt or belongs to another run, a name or a run that
    is there twice."""
    runs, unfinished = [], []
    for path in tqdm(find_runs(folders), "reading", unit=" runs", disable=None, leave=False):
        if (path / "summary.json").exists():
            runs.append(read_finished(path, tags))
            continue
        recorded = read_recorded(path / "args.json")
        args = recorded["args"]
        run = {"env_id": args.get("task"), "script": Path(recorded["command"][0]).name}
        unfinished.append(run | args | {"name": path.name})
    if not runs:
        where = ", ".join(map(str, folders))
        raise Refusal(f"{where}: {len(unfinished)} runs, and none has finished")
    return pd.DataFrame(runs), unfinished


# Methods


@functools.cache
def defaults(script: str, env_id: str) -> dict:
    """Default settings that are written as plain values in one of the five scripts, for a language
    model's task too; none of another script."""
    path, found = Path(__file__).with_name(script), {}
    if script not in SCRIPTS or not path.is_file():
        return {}
    source = ast.parse(path.read_text())
    for node in source.body:
        if isinstance(node, ast.ClassDef) and node.name == "Args":
            for field in node.body:
                if isinstance(field, ast.AnnAssign) and isinstance(field.value, ast.Constant):
                    found[field.target.id] = field.value.value
        if isinstance(node, ast.Assign) and node.targets[0].id == "TASKS":
            tasks = eval(compile(ast.Expression(node.value), script, "eval"), {"Args": dict})
            for key, value in tasks.get(env_id, {}).items():
                found[key] = list(value) if isinstance(value, tuple) else value
    return {key: value for key, value in found.items() if value is not None}


def kind_of(script: str, env_id: str) -> str:
    """What is learnt: continuous, atari, rlhf; of another script than ours by the environment."""
    if script in SCRIPTS:
        return script.removesuffix(".py").partition("_")[2]
    if env_id in ("toy", "imdb", "tldr"):
        return "rlhf"
    return "continuous" if re.search(r"-v\d+$", env_id) else "atari"


def family_of(script: str, algo: str) -> str:
    """Methods of one family are in one table: a2c, ppo, or whatever another script says."""
    for family in ("a2c", "ppo"):
        if family in algo or family in script:
            return family
    return algo


def change_of(key: str, value, usual, k: float) -> str:
    """How a method's name says that setting `key` is `value`; `usual` is its default, if known."""
    flag = key.replace("_", "-")
    if isinstance(value, (bool, np.bool_)):
        return flag if value else f"no-{flag}"
    if isinstance(value, list):
        return f"{flag} x {len(value)}"
    if isinstance(value, str):
        return f"{flag} {value}"
    if key == "alpha" and math.isclose(value, k):
        return "alpha k"
    if is_number(usual) and key not in SWEPT and math.isclose(value, usual / k, rel_tol=1e-4):
        return f"{flag} / k"
    return f"{flag} {value:.3g}" if isinstance(value, float) else f"{flag} {value}"


def hashable(value):
    return json.dumps(value) if isinstance(value, (list, dict)) else value


def check_comparable(runs: pd.DataFrame) -> None:
    """Raises Refusal where runs of one script on one environment differ in an argument that is not
    compared. An argument that a run's version of the script did not have is passed over, unless its
    default is known."""
    for (script, env_id), group in runs.groupby(["script", "env_id"]):
        usual = defaults(script, env_id)
        recorded = [set(run["args"]) for run in group["recorded"]]
        for key in sorted(set().union(*recorded) & set(runs.columns) - {*CELL, *FREE}):
            had = [key in usual or key in args for args in recorded]
            different = group[had].drop_duplicates(key)
            if len(different) > 1:
                (a, x), (b, y) = different[["name", key]].values[:2]
                raise Refusal(f"{a} and {b} differ in {key} ({x}, {y}): report them apart")


def label_methods(runs: pd.DataFrame) -> pd.DataFrame:
    """Adds columns: `method`, `base` (without what a sweep varies), `condition` (the noise), `kind`
    and `family`, `order` in tables, `symmetric`, `compared` (whether report.md shows how much
    better it is than each other method) and `alpha_k`. Raises Refusal where runs that would be
    compared differ in more than what is compared."""
    runs = runs.reindex(columns=runs.columns.union(CELL))
    pairs = list(zip(runs["script"], runs["algo"], runs["env_id"]))
    ours = runs["script"].isin(SCRIPTS)
    runs["kind"] = [kind_of(script, env_id) for script, _, env_id in pairs]
    runs["family"] = [family_of(script, algo) for script, algo, _ in pairs]
    runs["symmetric"] = runs["algo"].isin(SYMMETRIC)
    runs["alpha_k"] = ours & ~runs["symmetric"] & (runs["alpha"] != 1)
    runs["compared"] = ~ours | runs["symmetric"] | runs["correct_flips"].eq(True)
    # The symmetric ones last of ours
    runs["order"] = [ALGOS.index(a) if s in SCRIPTS else len(ALGOS) for s, a, _ in pairs]
    runs["condition"] = "clean"
    noisy = runs["noise"] != "none"
    levels = runs["noise_level"].map("{:g}".format)
    runs.loc[noisy, "condition"] = runs["noise"] + " " + levels

    complex_columns = ["name", "path", "recorded", "curve", "logged"]
    plain = runs[runs.columns.difference(complex_columns)].map(hashable)
    plain = plain.join(runs[["name", "recorded"]])
    check_comparable(plain)
    bases, methods = {}, {}
    for (script, env_id), group in plain.groupby(["script", "env_id"]):
        usual = {key: hashable(value) for key, value in defaults(script, env_id).items()}
        of_symmetric = group[group["symmetric"]]
        ks = (of_symmetric["alpha"] - of_symmetric["beta"] * of_symmetric["z"]).unique()
        k = ks[0] if len(ks) == 1 else math.nan
        for i, run in group.iterrows():
            of_script = plain[(plain["script"] == script) & (plain["family"] == run["family"])]
            alike = of_script[of_script["algo"] == run["algo"]]
            base, swept = run["algo"].upper(), ""
            if script not in SCRIPTS:
                several = of_script["algo"].nunique() > 1
                base = Path(script).stem + f" {base}" * several
            for key in [*WEIGHTS, *COMPARED]:
                if key in WEIGHTS and not run["symmetric"]:
                    differs = key == "alpha" and run[key] != 1
                elif key in usual:
                    differs = run[key] != usual[key]
                else:
                    differs = alike[key].nunique() > 1
                if pd.isna(run[key]) or not differs:
                    continue
                change = f", {change_of(key, runs.loc[i, key], usual.get(key), k)}"
                if key in SWEPT:
                    swept += change
                else:
                    base += change
            bases[i], methods[i] = base, base + swept
    runs["base"], runs["method"] = pd.Series(bases), pd.Series(methods)

    plain = plain.join(runs["method"])
    for _, cell in plain.groupby(["script", "env_id", "condition", "method"]):
        for key in [*WEIGHTS, *COMPARED]:
            if cell[key].nunique(dropna=False) > 1:
                (a, x), (b, y) = cell.drop_duplicates(key)[["name", key]].values[:2]
                differ = f"{a} and {b} differ in {key} ({x}, {y})"
                raise Refusal(f"{differ}, too little to tell: report them apart")
    key = ["script", "env_id", "condition", "method", "seed"]
    if (twice := runs.duplicated(key, keep=False)).any():
        a, b = runs[twice].sort_values(key)["name"][:2]
        raise Refusal(f"{a} and {b} are the same run, of the same seed: leave one out")
    runs["level"] = runs["noise_level"].where(noisy, 0.0)
    runs["noise"] = runs["noise"].replace("none", "")  # sorted first
    order = ["kind", "family", "noise", "level", "env_id", "order", "method", "seed"]
    return runs.sort_values(order).reset_index(drop=True)


# Statistics


def welch(x, y) -> float:
    """Two-sided p-value of Welch's t-test; nan with fewer than two scores, or scores that are all
    equal."""
    if min(len(x), len(y)) < 2 or np.ptp([*x, *y]) == 0:
        return math.nan
    return float(stats.ttest_ind(x, y, equal_var=False).pvalue)


def quantities(group: pd.DataFrame) -> pd.DataFrame:
    """What the runs of a cell are compared in, a row per seed: `return`, the last evaluation; of
    language models the other columns of that; logged quantities, as means over the run."""
    values = pd.DataFrame({"seed": group["seed"], "return": group["final_return_mean"]})
    columns = [curve.columns.difference(EVALUATION) for curve in group["curve"]]
    for column in sorted(set.intersection(*map(set, columns))):
        values[column] = [curve[column].iloc[-1] for curve in group["curve"]]
    for tag in sorted({tag for logged in group["logged"] for tag in logged}):
        values[tag] = [
            logged[tag]["value"].mean() if tag in logged else math.nan for logged in group["logged"]
        ]
    return values.set_index("seed")


def make_cells(runs: pd.DataFrame, unfinished: list[dict]) -> pd.DataFrame:
    """One row per cell: its seeds, how many are missing, scores, mean, standard error, whether it
    is best."""
    seeds = {kind: set(group["seed"]) for kind, group in runs.groupby("kind")}
    begun = set()
    for run in unfinished:
        kind = kind_of(run["script"], run["env_id"])
        seeds[kind] = seeds.get(kind, set()) | {run["seed"]}
        begun.add((run["script"], run["env_id"], run["noise"]))
    cells = []
    keys = ["kind", "family", "condition", "env_id", "method"]
    same = ["base", "noise", "level", "order", "symmetric", "compared", "alpha_k"]
    for key, group in runs.groupby(keys, sort=False):
        first = group.iloc[0]
        cell = dict(zip(keys, key)) | {name: first[name] for name in same}
        cell["begun"] = (first["script"], first["env_id"], first["noise"] or "none") in begun
        cell["seeds"] = len(group)
        cell["missing"] = len(seeds[first["kind"]]) - len(group)
        cell["scores"] = group["final_return_mean"].to_numpy()
        values = quantities(group)
        cell["by_seed"] = values
        training = group["train_return_last100"].astype(float)
        cell |= {"mean": values["return"].mean(), "sem": values["return"].sem()}
        cell |= {"train_mean": training.mean(skipna=False), "train_sem": training.sem(skipna=False)}
        cell |= {f"swept_{name}": first[name] for name in SWEPT}
        for name in values.columns[1:]:
            cell[f"{name}_mean"] = values[name].mean(skipna=False)
            cell[f"{name}_sem"] = values[name].sem(skipna=False)
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
    """Every method less every other one of its row, in each of their `quantities`, with two
    standard errors: of the difference of independent means, and of the mean of differences by
    seed."""
    rows = []
    keys = ["kind", "family", "condition", "env_id"]
    for key, row in cells[cells["missing"] == 0].groupby(keys, sort=False):
        for ours_index in range(len(row)):
            ours = row.iloc[ours_index]
            for other_index in range(ours_index):
                other = row.iloc[other_index]
                for quantity in ours["by_seed"].columns:
                    if quantity not in other["by_seed"]:
                        continue
                    x, y = ours["by_seed"][quantity], other["by_seed"][quantity]
                    difference = dict(zip(keys, key))
                    difference["quantity"] = quantity
                    difference["method"] = ours["method"]
                    difference["less"] = other["method"]
                    difference["difference"] = x.mean() - y.mean()
                    difference["sem"] = math.hypot(x.sem(), y.sem())
                    difference["paired_sem"] = (x - y).sem()
                    difference["p"] = welch(x, y)
                    difference["compared"] = ours["compared"]
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
        for method, there in group.groupby("method", sort=False):
            complete = (there["missing"] == 0).all() and set(there["env_id"]) == set(tasks)
            if complete and not set(tasks) & set(unknown) and there["seeds"].min() > 1:
                matrices[method] = np.stack(
                    list(there.set_index("env_id")["normalised"][tasks]), axis=1
                )
            else:
                left_out.append(f"{method}, {key[1].upper()} {key[2]}")
        if not matrices:
            continue
        where = dict(zip(["kind", "family", "condition"], key)) | {"tasks": len(tasks)}
        iqm = rly.get_interval_estimates(
            matrices, lambda x: np.array([metrics.aggregate_iqm(x)]), reps=reps
        )
        compared = set(group[group["compared"]]["method"])
        pairs = {}
        for ours in matrices:
            for other in matrices:
                if ours in compared and other != ours:
                    pairs[f"{ours} > {other}"] = matrices[ours], matrices[other]
        better = rly.get_interval_estimates(pairs, probability_of_improvement, reps=reps)
        for what, (points, intervals) in (("iqm", iqm), ("probability of improvement", better)):
            for name, point in points.items():
                low, high = intervals[name][:, 0]
                rows.append(
                    where
                    | {
                        "statistic": what,
                        "method": name,
                        "value": point[0],
                        "low": low,
                        "high": high,
                    }
                )
    return pd.DataFrame(rows), left_out


# Tables and figures


def number(mean: float, sem: float) -> str:
    """Mean ± standard error, with the digits that the size of the mean deserves; nothing if there
    is no mean."""
    if math.isnan(mean):
        return ""
    digits = 0 if abs(mean) >= 100 else 1 if abs(mean) >= 10 else 2 if abs(mean) >= 1 else 3
    return f"{mean:,.{digits}f}" + ("" if math.isnan(sem) else f" ± {sem:,.{digits}f}")


def markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def in_order(frame: pd.DataFrame) -> list[str]:
    """Its methods: baselines, the symmetric ones, those of other scripts."""
    return list(frame.sort_values(["order", "method"])["method"].unique())


def color_methods(methods: list[str]) -> dict[str, str]:
    """The color of each method, in every picture of a report."""
    colors = {method: COLORS[method] for method in methods if method in COLORS}
    for i, method in enumerate(sorted(set(methods) - set(colors))):
        colors[method] = OTHER_COLORS[i % len(OTHER_COLORS)]
    return colors


def file_name(name: str) -> str:
    return re.sub(r"[ /:]", "-", name)


def table(cells: pd.DataFrame, out: Path, name: str, value: str = "") -> str:
    """One row per environment, one column per method: columns `value`mean and `value`sem of
    `cells`. Writes it as CSV, and returns it as Markdown."""
    methods, rows = in_order(cells), []
    for env_id, here in cells.groupby("env_id"):
        rows.append([env_id])
        for method in methods:
            cell = here[here["method"] == method]
            if cell.empty:
                rows[-1].append("")
            elif (cell := cell.iloc[0])["missing"]:
                rows[-1].append(f"{cell['seeds']} of {cell['seeds'] + cell['missing']} seeds")
            else:
                text = number(cell[f"{value}mean"], cell[f"{value}sem"])
                rows[-1].append(f"**{text}**" if cell["best"] and not value else text)
    name = file_name(f"table-{name}-{value.rstrip('_') or 'evaluation'}.csv")
    plain = pd.DataFrame(rows, columns=["env_id", *methods]).replace(r"\*\*", "", regex=True)
    plain.to_csv(out / name, index=False)
    return markdown(["", *methods], rows)


def save(figure, out: Path, name: str) -> str:
    """Saves as PNG and SVG. Returns the Markdown that shows it."""
    name = file_name(name)
    for suffix, options in (("png", {"dpi": 120}), ("svg", {"metadata": {"Date": None}})):
        figure.savefig(out / f"{name}.{suffix}", **options)
    plt.close(figure)
    return f"![{name}]({name}.png)"


def panels(count: int, height: float = 3.2):
    """A figure with `count` panels, at most five in a row."""
    rows = math.ceil(count / 5)
    columns = math.ceil(count / rows)
    size = (max(7, 4 * columns), height * rows + 0.6)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for ax in axes.flat[count:]:
        ax.remove()
    return figure, list(axes.flat[:count])


def add_legend(figure, axes, colors: dict[str, str]) -> None:
    """One for all panels, below them, in the order of `colors`."""
    handles = {}
    for ax in axes:
        handles |= {label: handle for handle, label in zip(*ax.get_legend_handles_labels())}
    labels = [method for method in colors if method in handles]
    lines = [handles[method] for method in labels]
    figure.legend(lines, labels, loc="outside lower center", ncols=3, frameon=False)


def draw_curves(
    runs: pd.DataFrame, what: str, column: str, axis: str, out: Path, name: str, colors: dict
) -> str:
    """A panel per environment, a line per method: mean over seeds, and a 95 % bootstrap interval
    of it; of curves with many points running means over a twentieth of the run."""
    runs = runs[[column in curve and len(curve) > 0 for curve in runs[what]]]
    if runs.empty:
        return ""
    figure, axes = panels(runs["env_id"].nunique())
    for ax, (env_id, here) in zip(axes, runs.groupby("env_id")):
        for method, group in here.groupby("method", sort=False):
            curves = [
                run[what].set_index("step")[column].rename(run["seed"])
                for _, run in group.iterrows()
            ]
            curves = pd.concat(curves, axis=1).dropna()
            curves = curves.rolling(max(1, len(curves) // 20), min_periods=1).mean()
            scores = {method: curves.to_numpy().T[:, None, :]}  # seeds, one task, steps
            mean, interval = rly.get_interval_estimates(scores, lambda x: x.mean((0, 1)), reps=1000)
            color = colors[method]
            ax.plot(curves.index, mean[method], color=color, label=method)
            ax.fill_between(curves.index, *interval[method], color=color, alpha=0.12, lw=0)
        ax.set(title=env_id, xlabel="steps")
    axes[0].set_ylabel(axis)
    add_legend(figure, axes, colors)
    return save(figure, out, name)


def draw_aggregates(aggregates: pd.DataFrame, out: Path, name: str) -> str:
    """Interquartile means, and probabilities of improvement if there are any, a marker per
    noise."""
    titles = {"iqm": "interquartile mean of normalised scores"}
    titles["probability of improvement"] = "probability of improvement"
    sides = [statistic for statistic in titles if (aggregates["statistic"] == statistic).any()]
    height = 1 + 0.3 * aggregates["method"].nunique()
    size = (6 * len(sides), max(2.5, height))
    figure, axes = plt.subplots(1, len(sides), figsize=size, squeeze=False, layout="constrained")
    conditions = list(aggregates["condition"].unique())
    for ax, statistic in zip(axes[0], sides):
        there = aggregates[aggregates["statistic"] == statistic]
        names = list(there["method"].unique())[::-1]
        for i, (condition, group) in enumerate(there.groupby("condition", sort=False)):
            y = [names.index(method) - 0.7 * i / len(conditions) for method in group["method"]]
            error = abs(group[["low", "high"]].sub(group["value"], axis=0).to_numpy().T)
            marker = "osD^v"[conditions.index(condition) % 5]
            style = dict(fmt=marker, ms=4, color="black", label=condition)  # methods have colors
            ax.errorbar(group["value"].to_numpy(), y, xerr=error, **style)
        ax.set_yticks(range(len(names)), names)
        ax.set_xlabel(titles[statistic])
        if statistic != "iqm":
            ax.axvline(0.5, color="grey", lw=0.8, zorder=0)
    handles = axes[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=5, frameon=False)
    return save(figure, out, name)


def draw_noise(cells: pd.DataFrame, out: Path, name: str, colors: dict) -> str:
    """Score against noise level: a panel per environment and kind of noise, a line per method.
    Complete cells only."""
    cells = cells[cells["missing"] == 0]
    shown = []  # (kind of noise, environment, cells)
    for noise in cells[cells["noise"] != ""]["noise"].unique():
        for env_id, here in cells[cells["noise"].isin(["", noise])].groupby("env_id"):
            if (here["noise"] == noise).any():
                shown.append((noise, env_id, here))
    if not shown:
        return ""
    figure, axes = panels(len(shown))
    for ax, (noise, env_id, here) in zip(axes, shown):
        for method, group in here.sort_values("level").groupby("method", sort=False):
            points = group[["level", "mean", "sem"]].to_numpy().T
            ax.errorbar(*points, color=colors[method], label=method, capsize=3)
        ax.set(title=env_id, xlabel=f"level of noise: {noise}")
    axes[0].set_ylabel("return, mean ± standard error")
    add_legend(figure, axes, colors)
    return save(figure, out, name)


def draw_sweep(cells: pd.DataFrame, out: Path, name: str) -> str:
    """Heat maps of mean scores over two swept settings, beside each other for a third: a row for
    every method, and one for the symmetric less the other. Complete cells only; white is
    missing."""
    varied = sorted(SWEPT, key=lambda key: -cells[f"swept_{key}"].nunique())
    x, y, z = (f"swept_{key}" for key in varied)
    values = [sorted(cells[cells["missing"] == 0][key].unique()) for key in (z, y, x)]
    every = pd.MultiIndex.from_product(values)
    grids = {  # {method: means (z, y, x)}, nan where seeds are missing
        base: group.set_index([z, y, x])["mean"]
        .reindex(every)
        .to_numpy()
        .reshape([len(v) for v in values])
        for base, group in cells.groupby("base", sort=False)
    }
    symmetric = set(cells[cells["symmetric"]]["base"])
    ours = [base for base in grids if base in symmetric]
    others = [base for base in grids if base not in symmetric]
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
        for script, recorded in zip(runs["script"], runs["recorded"]):
            part = recorded[what]
            if what == "commit" and recorded.get("script_status"):
                part = f"{part}, {script} not as in it"
            if what == "versions":
                names = ("python", "torch", "gymnasium", "mujoco", "ale-py", script)
                part = {name: part[name] for name in names if name in part}
            if isinstance(part, dict):
                part = ", ".join(f"{key} {value}" for key, value in part.items())
            counts[part] += 1
        for part, count in counts.items():
            lines.append(f"- {what}: {part or 'not recorded'} ({count} runs)")
    return "\n".join(lines)


def difference_table(differences: pd.DataFrame) -> str:
    rows = []
    for _, d in differences.iterrows():
        times = f"{d['difference'] / d['sem']:+.1f}" if d["sem"] > 0 else ""
        p = "" if math.isnan(d["p"]) else f"{d['p']:.3f}"
        what = [d["env_id"], d["condition"], d["quantity"], f"{d['method']} less {d['less']}"]
        paired = number(d["difference"], d["paired_sem"]).partition(" ± ")[2]
        rows.append([*what, number(d["difference"], d["sem"]), times, p, paired])
    header = ["", "noise", "last evaluation", "", "difference", "standard errors", "p (Welch)"]
    return markdown([*header, "standard error by seed"], rows)


def aggregate_table(aggregates: pd.DataFrame) -> str:
    rows = []
    for _, a in aggregates.iterrows():
        interval = f"{a['low']:.3f} to {a['high']:.3f}"
        rows.append([a["statistic"], a["method"], a["condition"], f"{a['value']:.3f}", interval])
    return markdown(["", "", "noise", "value", "95 % interval"], rows)


def of_section(frame: pd.DataFrame, kind: str, family: str) -> pd.DataFrame:
    if frame.empty:
        return frame
    return frame[(frame["kind"] == kind) & (frame["family"] == family)]


def write_condition(
    cells: pd.DataFrame, runs: pd.DataFrame, logged: tuple[str, ...], colors: dict, out: Path
) -> list[str]:
    """Tables and curves of one noise, given its cells and runs."""
    first = cells.iloc[0]
    kind, family, condition = first[["kind", "family", "condition"]]
    name = f"{kind}-{family}-{condition}"
    seeds = (cells["seeds"] + cells["missing"]).max()
    complete = set()
    for _, cell in cells[cells["missing"] == 0].iterrows():
        complete.add((cell["env_id"], cell["method"]))
    runs = runs[[key in complete for key in zip(runs["env_id"], runs["method"])]]

    page = [f"### {kind}, {family.upper()}, {condition} (seeds: {seeds})"]
    page += ["Last evaluation:", table(cells, out, name)]
    axis = "return of evaluations"
    page.append(draw_curves(runs, "curve", "return_mean", axis, out, f"curves-{name}", colors))
    if kind != "rlhf":
        page += ["The last 100 episodes of training:", table(cells, out, name, "train_")]
    for column in sorted({name for values in cells["by_seed"] for name in values} - {"return"}):
        if not cells[f"{column}_mean"].fillna(0).any():
            continue
        if column in logged:
            page.append(f"`{column}`, mean over the run:")
            curves = runs.assign(logged=[run.get(column, pd.DataFrame()) for run in runs["logged"]])
            what, value, figure = "logged", "value", f"logged-{column}-{name}"
        else:  # of language models
            page.append(f"Last evaluation, {column}:")
            curves, what, value, figure = runs, "curve", column, f"curves-{column}-{name}"
        page.append(table(cells, out, name, f"{column}_"))
        page.append(draw_curves(curves, what, value, column, out, figure, colors))
    return page


def write_section(
    cells: pd.DataFrame,
    runs: pd.DataFrame,
    differences: pd.DataFrame,
    aggregates: pd.DataFrame,
    logged: tuple[str, ...],
    colors: dict,
    out: Path,
) -> list[str]:
    """Paragraphs of report.md on the methods of one kind and family."""
    kind, family = cells.iloc[0][["kind", "family"]]
    page = [f"## {kind}, {family.upper()}"]
    if sum(cells[f"swept_{key}"].nunique() > 1 for key in SWEPT) > 1:
        for (env_id, condition), part in cells.groupby(["env_id", "condition"], sort=False):
            if (part["missing"] == 0).any():
                name = f"sweep-{family}-{env_id}-{condition}"
                page += [f"{env_id}, {condition}: mean return", draw_sweep(part, out, name)]
        return page
    for condition, part in cells.groupby("condition", sort=False):
        there = runs[runs["condition"] == condition]
        page += write_condition(part, there, logged, colors, out)
    if (cells.groupby("noise")["level"].nunique() > 1).any():
        page.append("### Against the level of noise")
        page.append(draw_noise(cells, out, f"noise-{kind}-{family}", colors))
    if len(differences):
        shown = differences[differences["compared"] & ~differences["quantity"].isin(logged)]
        if len(shown):
            page += ["### Differences", difference_table(shown)]
    if len(aggregates):
        page += [f"### Over all tasks ({aggregates['tasks'].iloc[0]})", aggregate_table(aggregates)]
        page.append(draw_aggregates(aggregates, out, f"aggregates-{kind}-{family}"))
    return page


def write_tables(
    runs: pd.DataFrame,
    cells: pd.DataFrame,
    differences: pd.DataFrame,
    aggregates: pd.DataFrame,
    out: Path,
) -> None:
    """CSV files of everything."""
    columns = ["name", "script", "env_id", "condition", "method", "seed", "total_timesteps"]
    columns += ["final_return_mean", "final_return_std", "train_return_last100", "sps", "wall_s"]
    commits, commands = [], []
    for recorded in runs["recorded"]:
        command = recorded["command"]
        commits.append(recorded["commit"])
        commands.append(shlex.join(["python", *command]) if command else None)
    listed = runs[columns].assign(commit=commits, command=commands)
    curves = [run["curve"].assign(name=run["name"]) for _, run in runs.iterrows()]
    curves = pd.concat([curve for curve in curves if len(curve)] or curves)
    inner = ["scores", "by_seed", "base", "noise", "level", "begun", "alpha_k", "order"]
    frames = {
        "runs": listed,
        "curves": curves,
        "tables": cells.drop(columns=[*inner, "symmetric", "compared"]),
        "differences": differences,
        "aggregates": aggregates,
    }
    for name, frame in frames.items():
        frame.to_csv(out / f"{name}.csv", index=False, float_format="%.6g")


def write_report(args: Args, out: Path) -> None:
    """Reads all runs and writes report.md, CSV files and figures into `out`. Raises Refusal."""
    np.random.seed(0)  # rliable samples by NumPy's generator, whatever random_state it is given
    runs, unfinished = read_runs(list(args.runs), args.logged)
    if args.keep:
        keep_runs(runs, args.keep)
    runs = label_methods(runs)
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
    write_tables(runs, cells, differences, aggregates, out)

    page = ["# Report", __doc__.split("\n\n", 2)[2].strip()]
    if unfinished or (cells["missing"] > 0).any():
        lacking = f"{(cells['missing'] > 0).sum()} of {len(cells)} cells lack seeds"
        names = f": {', '.join(run['name'] for run in unfinished)}" if unfinished else ""
        page.append(
            f"**Incomplete**: {lacking}; {len(unfinished)} runs have begun and not finished{names}."
        )
    colors = color_methods(in_order(cells))
    for (kind, family), here in cells.groupby(["kind", "family"], sort=False):
        frames = [of_section(frame, kind, family) for frame in (runs, differences, aggregates)]
        page += write_section(here, *frames, args.logged, colors, out)
    if left_out:
        why = "not every task with every seed, or a game whose human score is not known here"
        page.append(f"Left out of statistics over all tasks ({why}): {'; '.join(left_out)}.")
    page += ["## What was run", describe_runs(runs)]
    (out / "report.md").write_text("\n\n".join(part for part in page if part) + "\n")


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
