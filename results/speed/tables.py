"""Tables of measurements, which are CSV files here."""

import json

import pandas as pd

from analysis.tables import markdown
from results.common import RESULTS

TASKS = {
    "sppo_continuous.py": "HalfCheetah, one core",
    "sa2c_continuous.py": "HalfCheetah, one core",
    "sppo_atari.py": "Breakout, two cores",
    "sa2c_atari.py": "Breakout, two cores",
    "sppo_rlhf.py": "a GPT-2 of 4 layers, two cores",
}
GPU_RUNS = {
    "sppo_atari": "`sppo_atari.py`, 8 games",
    "sppo_atari --num-envs 32": "`sppo_atari.py`, 32 games",
    "sppo_atari --num-envs 128": "`sppo_atari.py`, 128 games",
    "sa2c_atari": "`sa2c_atari.py`, 16 games",
    "sppo_rlhf": "the toy language model",
}


def measured(name):
    return pd.read_csv(RESULTS / f"speed/{name}.csv", keep_default_na=False)


def peers():
    """Lowest and highest median ratio over the CPUs, as the scripts run by default and without
    compiling (control) or bfloat16 (the others)."""
    rates = measured("cpu")
    rows = []
    for script, task in TASKS.items():
        runs = rates[rates["script"] == script]
        row = [f"`{script}`", task, runs["cpu"].nunique()]
        for part in (runs[runs["flags"] == ""], runs[runs["flags"] != ""]):
            row.append(f"{part['ratio'].min():.2f} to {part['ratio'].max():.2f}")
        rows.append([*row, f"`{runs['flags'].max()}`"])
    header = ["script", "task", "CPU models", "ratio", "ratio with the flag", "flag"]
    return markdown(header, rows)


def quick_start():
    rows = []
    for run in measured("quickstart").itertuples():
        minutes = f"{run.time_s / 60:.0f}"
        rows.append([run.commit, run.cpu, minutes, f"{run.steps_per_s:,}", run.last_evaluation])
    return markdown(["commit", "CPU, one core", "minutes", "steps/s", "return"], rows)


def threads():
    table = measured("threads").astype({"ratio": float})
    table["ratio"] = table["ratio"].map("{:.2f}".format)
    by_count = table.pivot(index="environment", columns="environments", values="ratio")
    return markdown(["environments", *by_count], by_count.reset_index().to_numpy())


def gpu():
    found = json.loads((RESULTS / "speed/gpu.json").read_text())
    rows = []
    for name, title in GPU_RUNS.items():
        run = found[name]
        rows.append([title, f"{run['per_second']:,.0f}", f"{run['gpu_mib']:,} MiB"])
    return markdown(["", "steps (texts) per second", "GPU memory"], rows)
