"""Runs as two tables, from run folders or packs: a row for each run, a row for each evaluation.

A pack is NAME-runs.csv.gz and NAME-progress.csv.gz. What would make a wrong table is refused here.
"""

import hashlib
import json
import os
import re
import shlex
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd

CELL = ["task", "noise", "method"]  # runs of a cell differ in their seed only
EVALUATION = ["step", "return_mean", "return_std", "length_mean"]
FILES = {"sessions.jsonl", "progress.csv", "summary.json", "failed.txt", "diverged.txt"}
# Columns of runs that are no settings
IDENTITY = ["run_name", "script", "env_id", "exp_name", "noise_level", "seed", "finished"]
LATER = ["failed", "env_kwargs", "start_from"]  # what older packs lack
PROVENANCE = ["commit", "script_sha256", "files", "command", "started", "versions", "hardware"]
PROVENANCE += ["start_from"]
FREE = ["runs_dir", "device", "compile", "track", "gradient_checkpointing"]
NO_SETTINGS = [*CELL, "state", *IDENTITY, *LATER, *PROVENANCE, *FREE]


class Refusal(ValueError):
    """One sentence that says what is wrong with the input and what to do."""


def read(folders):
    """All runs in `folders` or packs, their evaluations, and a line for each that is broken."""
    tables = []
    broken = []
    for place in places_in(folders):
        try:
            tables.append(read_run(place) if place.is_dir() else read_pack(place))
        except Exception as error:  # a broken file may raise anything
            broken.append(f"{place.name}: left out: {type(error).__name__}: {error}")
    if not any(runs["finished"].any() for runs, _ in tables):
        failed = [*broken, *(why for runs, _ in tables for why in runs["failed"] if why)]
        found = "; ".join([f"no finished run of {len(tables) + len(broken)}", *failed[:3]])
        raise Refusal(f"{found}; give folders such as runs/quick, or packs")
    runs, progress = (pd.concat(parts, ignore_index=True) for parts in zip(*tables))
    runs = runs.fillna("")  # a flag that another version lacks
    numbers = [*runs.columns.difference(NO_SETTINGS), "noise_level"]
    whole = runs[numbers].replace(r"^(-?\d+)\.0$", r"\1", regex=True)  # older scripts say 1
    runs = runs.assign(**whole)
    runs["seed"] = runs["seed"].astype(int)
    return runs, progress, broken


def places_in(folders):
    """All run folders and packs in `folders`, at any depth, also behind links. And links that lead
    nowhere, which can't be read."""
    places = []
    for folder in folders:
        if not folder.exists():
            raise Refusal(f"{folder}: no such file or folder; give folders such as runs/quick")
        found = {folder} if folder.is_file() else set()
        seen = set()
        for path, below, files in os.walk(folder, followlinks=True):
            place = Path(path).resolve()
            if place in seen:  # links may lead round
                below.clear()
            seen.add(place)
            found.update(x for x in map(place.joinpath, files) if is_pack(x) or not x.exists())
            if FILES.intersection(files):
                found.add(place)
        places += sorted(found)
    return places


def is_pack(file):
    return file.name.endswith("-runs.csv.gz")


def read_pack(file):
    runs = pd.read_csv(file, dtype=str, keep_default_na=False)  # a method may be called "null"
    runs = runs.rename(columns={"diverged": "failed"})  # of older packs
    runs["finished"] = runs["finished"] == "True"
    progress = read_progress(progress_of(file))
    finished = runs["run_name"][runs["finished"]]
    lacking = set(finished) - set(progress["run_name"])
    if lacking:
        raise ValueError(f"{progress_of(file).name} does not have {min(lacking)}")
    return runs, progress


def progress_of(file):
    return file.with_name(file.name.replace("runs.csv", "progress.csv"))


def read_progress(file):
    return pd.read_csv(file, dtype={"run_name": str}, float_precision="round_trip")


def read_run(folder):
    lines = (folder / "sessions.jsonl").read_text(encoding="utf-8").splitlines()
    sessions = [json.loads(line) for line in lines]
    first = sessions[0]
    args = first["args"]
    if "env_id" not in args:  # of language models
        args["env_id"] = args.pop("task")
    kwargs = sorted(json.loads(args.pop("env_kwargs", "{}")).items())
    script = folder / first["script"]
    # Runs that begin with other runs' checkpoints are still alike
    files = {path: x for path, x in first["files"].items() if Path(path).name != "checkpoint.pt"}
    parents = [Path(path).parent.name for path in first["files"].keys() - files.keys()]
    if parents and args.get("start_from"):
        args["start_from"] = parents[0]  # the flag may be "." or a link
    facts = {
        "run_name": folder.name,
        "script": script.name,
        "finished": (folder / "summary.json").exists(),
        "failed": why_failed(folder),
        "env_kwargs": ", ".join(f"{typed(name)}={typed(value)}" for name, value in kwargs),
        "script_sha256": hashlib.sha256(script.read_bytes()).hexdigest(),
        "files": str(sorted(files.values())),
        "command": shlex.join(first["command"]),
        "started": first["started"],
        "versions": distinct(sessions, ["versions"]),
        "hardware": distinct(sessions, ["platform", "cpu", "gpu"]),
    }
    for name in set(args) & {*facts, "task", "method", "commit", "state"}:
        raise ValueError(f"an argument is called {name}: rename it")
    run = {  # "": no such flag
        name: (str if name in IDENTITY else value_text)(value) or "''"
        for name, value in args.items()
    }
    run |= facts
    progress = pd.DataFrame(columns=EVALUATION, dtype=float)
    if run["finished"] or (folder / "progress.csv").exists():  # not before the first evaluation
        progress = read_progress(folder / "progress.csv")
    if run["finished"]:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        if progress["step"].max() != summary["step"]:
            raise ValueError(f"progress.csv: cut before step {summary['step']}")
    if not np.isfinite(progress[EVALUATION].to_numpy()).all():
        raise ValueError("progress.csv: an evaluation that is not a number")
    return pd.DataFrame([run]), progress.assign(run_name=folder.name)


def value_text(value):
    """Of a flag. A text that reads as another type is quoted."""
    other = r"[-+]?\d+(\.\d*)?(e[-+]?\d+)?|nan|-?inf|True|False|None"
    is_like_another = isinstance(value, str) and re.fullmatch(other, value)
    return repr(value) if is_like_another else str(value)


def typed(value):
    """Text of an environment's argument, which is one of several."""
    is_several = isinstance(value, str) and re.search(r"^$|^[\[{]|['\",=]", value)
    return repr(value) if is_several else value_text(value)


def why_failed(folder):
    """The type and the message of the error that ended the run; "" if none did, or it finished."""
    files = [folder / "failed.txt", folder / "diverged.txt"]  # the latter of older scripts
    there = [file for file in files if file.exists() and not (folder / "summary.json").exists()]
    if not there:
        return ""
    text = there[0].read_text(encoding="utf-8").strip()
    text = re.sub("^(Failed: )?error: ", "", text)
    return f"diverged: {text}" if "not finite" in text else text


def distinct(sessions, names):
    """What the sessions of a run say; of a continued run all that differ."""
    facts = [[session[name] for name in names] for session in sessions]
    return ", then ".join(dict.fromkeys(json.dumps(fact, sort_keys=True) for fact in facts))


def write_pack(runs, progress, file):
    """Equal runs give equal bytes."""
    if file.exists():
        old, _ = read_pack(file)
        lost = set(old["run_name"]) - set(runs["run_name"])
        lost |= set(old["run_name"][old["finished"]]) - set(runs["run_name"][runs["finished"]])
        if lost:
            raise Refusal(f"--pack {file}: it would lose runs, such as {min(lost)}; read it, too")
    file.parent.mkdir(parents=True, exist_ok=True)
    options = {"index": False, "lineterminator": "\n"}
    options["compression"] = {"method": "gzip", "mtime": 0}
    tables = {file: runs, progress_of(file): progress}
    with TemporaryDirectory(dir=file.parent) as folder:  # a full disk destroys no pack
        for target, table in tables.items():
            table.to_csv(Path(folder, target.name), **options)
        for target in tables:
            os.replace(Path(folder, target.name), target)


def in_cells(runs):
    """The runs, with the columns of CELL and `state`: finished, not finished, or how it failed. One
    from which another of its cell began, and finished or failed, is left out, and one that failed,
    where another of its seed finished, or failed and was begun later. Refuses a run that is there
    twice, and mixed cells."""
    for name in runs["run_name"][runs["run_name"].duplicated()]:
        raise Refusal(f"{name}: in two places; to add to a pack, give it and the new runs only")
    runs = runs.assign(**{name: runs.get(name, "") for name in LATER})
    runs["start_from"] = runs["start_from"].replace("None", "")
    noisy = runs["noise"] + " " + runs["noise_level"]
    noise = noisy.mask(runs["noise"] == "none", "clean")
    task = runs["env_id"] + runs["env_kwargs"].str.replace("(.+)", r" (\1)", regex=True)
    state = runs["failed"].replace("", "not finished").mask(runs["finished"], "finished")
    runs = runs.assign(task=task, noise=noise, method=runs["exp_name"], state=state)
    origin = runs["start_from"].map(lambda text: Path(text).name)
    ended = runs[runs["state"] != "not finished"]
    began = ended.assign(run_name=origin)[["run_name", *CELL]]
    runs = runs[~runs["run_name"].isin(runs.merge(began)["run_name"])]
    seed = runs.groupby([*CELL, "seed"])
    has_finished = seed["finished"].transform("any")
    failed = runs[has_failed(runs)].assign(started=runs.get("started", ""))  # older packs lack it
    last = failed.sort_values("started").drop_duplicates([*CELL, "seed"], keep="last")
    is_replaced = has_failed(runs) & (has_finished | ~runs.index.isin(last.index))
    replaced = seed["run_name"].transform(lambda names: names.isin(failed["run_name"]).any())
    check(runs[~is_replaced & (runs["state"] != "not finished")], replaced)
    return runs[~is_replaced]


def has_failed(runs):
    return ~runs["state"].isin(["finished", "not finished"])


def check(runs, replaced):
    """Refuses cells with a seed twice, or of two settings, except that a run of a seed that has
    `failed` may have others."""
    settings = runs.columns.difference(NO_SETTINGS)
    for cell, group in runs.groupby(CELL):
        where = " ".join(cell)
        alike = group[~replaced[group.index] | has_failed(group)]
        for name in ["script", *settings]:
            if differ(alike[name]):
                values = ", ".join(sorted(set(alike[name])))
                raise Refusal(f"{where}: runs differ in {name} ({values}); report them separately")
        for seed in group["seed"][group["seed"].duplicated()]:
            names = " and ".join(group["run_name"][group["seed"] == seed])
            raise Refusal(f"{where}: seed {seed} is there twice ({names}); leave one out")


def with_success(runs, progress):
    """`progress`, where a success rate that is not said is 0, since some environments say it only
    of a success. Where no run of a task and version ever says it, there is none."""
    if "success_rate" not in progress:
        return progress
    versions = runs.reindex(columns=["task", "script", "files"], fill_value="")
    version = versions.agg(" ".join, axis=1).set_axis(runs["run_name"])
    rates = progress["success_rate"]
    is_said = rates.groupby(progress["run_name"].map(version)).transform("count") > 0
    return progress.assign(success_rate=rates.fillna(0).where(is_said))


def differ(values):
    """An older version of a script may lack a flag: that is no difference."""
    return len(set(values) - {""}) > 1


def differing_packages(versions):
    """Names of packages with several versions, of texts as JSON, or as older packs have them."""
    found = versions.str.extractall(r'([\w.-]+)"?:? "?(\d[^\s",]*)').drop_duplicates()
    names = found[0]
    return sorted(set(names[names.duplicated()]))


def not_alike(runs, progress):
    """A line for each task whose runs have several versions, or were evaluated otherwise."""
    evaluations = progress.groupby("run_name")["step"]
    counts = {"steps": evaluations.max(), "evaluations": evaluations.size()}
    lines = []
    for task, group in runs.groupby("task"):
        unlike = []
        if packages := differing_packages(group["versions"]):
            unlike.append(f"versions of {', '.join(packages)}")
        kinds = re.findall(r'", ([^\]]+)\]', " ".join(group["hardware"]))  # without the platform
        if differ(kinds):
            unlike.append("hardware (CPU kernels or GPU)")
        for script, part in group.groupby("script"):
            if differ(part["script_sha256"]) or differ(part.get("files", [])):
                unlike.append(f"versions of {script} or its imports")
                lacking = part[part.columns.difference(NO_SETTINGS)].eq("").nunique() > 1
                unlike += [f"some without {name}" for name in lacking.index[lacking]]
        if group["start_from"].eq("").nunique() > 1:
            unlike.append("runs that began from others beside runs that did not")
        for name, of_run in counts.items():
            numbers = of_run[group["run_name"]]
            if numbers.max() > 1.01 * numbers.min():  # else rounded up to whole rollouts
                unlike.append(f"{numbers.min():,.0f} to {numbers.max():,.0f} {name}")
        if unlike:
            lines.append(f"**Not alike: {task}: {', '.join(unlike)}.**")
    return lines


def shared_text(runs):
    """What all runs have in common, but for settings."""
    torch = runs["versions"].str.extract(r'"torch": "([^"]*)"', expand=False).fillna("")
    facts = runs[["script", "total_timesteps", "hardware"]].assign(torch=torch)
    shared = facts.loc[:, facts.nunique() == 1].iloc[0]
    return f"All runs: {', '.join(f'{name} {value}' for name, value in shared.items() if value)}."


def settings_table(runs):
    """Settings in which methods differ, on any task."""

    def joined(values):
        return ", ".join(sorted(set(values)))

    settings = list(runs.columns.difference(NO_SETTINGS))
    table = runs.groupby("method")[settings].agg(joined)
    of_cells = runs.groupby(CELL)[settings].agg(joined).groupby(["task", "noise"])
    differs = (table.nunique() > 1) | (of_cells.nunique().max() > 1)
    return table.loc[:, differs].T.reset_index(names="setting")
