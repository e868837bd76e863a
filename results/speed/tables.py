"""Tables of this folder's page."""

import json
from pathlib import Path

import pandas as pd

from analysis.tables import markdown

HERE = Path(__file__).parent
TASKS = {
    "sppo_continuous.py": "HalfCheetah, one core",
    "sa2c_continuous.py": "HalfCheetah, one core",
    "sppo_atari.py": "Breakout, two cores",
    "sa2c_atari.py": "Breakout, two cores",
    "sppo_rlhf.py": "a GPT-2 of 4 layers, two cores",
}


def rates():
    return pd.read_csv(HERE / "cpu.csv", keep_default_na=False)


def peers():
    """Lowest and highest median ratio over the CPUs, as the scripts run by default and without
    compiling (control) or bfloat16 (the others)."""
    rows = []
    for script, task in TASKS.items():
        runs = rates()[rates()["script"] == script]
        row = [f"`{script}`", task, runs["cpu"].nunique()]
        for part in (runs[runs["flags"] == ""], runs[runs["flags"] != ""]):
            row.append(f"{part['ratio'].min():.2f} to {part['ratio'].max():.2f}")
        rows.append([*row, f"`{runs['flags'].max()}`"])
    header = ["script", "task", "CPU models", "ratio", "ratio with the flag", "flag"]
    return markdown(header, rows)


def quick_start():
    runs = pd.read_csv(HERE / "quickstart.csv")
    rows = []
    for run in runs.itertuples():
        minutes = f"{run.time_s / 60:.0f}"
        rows.append([run.commit, run.cpu, minutes, f"{run.steps_per_s:,}", run.last_evaluation])
    header = ["commit", "CPU, one core", "minutes", "steps/s", "return"]
    return markdown(header, rows)


def threads():
    table = pd.read_csv(HERE / "threads.csv")
    ratio = table["ratio"].map("{:.2f}".format)
    by_count = table.assign(ratio=ratio).pivot(
        index="environment", columns="environments", values="ratio"
    )
    return markdown(["environments", *by_count.columns], by_count.reset_index().to_numpy())


GPU_RUNS = {
    "sppo_atari": "`sppo_atari.py`, 8 games",
    "sppo_atari --num-envs 32": "`sppo_atari.py`, 32 games",
    "sppo_atari --num-envs 128": "`sppo_atari.py`, 128 games",
    "sa2c_atari": "`sa2c_atari.py`, 16 games",
    "sppo_rlhf": "the toy language model",
}


def gpu():
    measured = json.loads((HERE / "gpu.json").read_text())
    rows = []
    for name, title in GPU_RUNS.items():
        run = measured[name]
        rows.append([title, f"{run['per_second']:,.0f}", f"{run['gpu_mib']:,} MiB"])
    return markdown(["", "steps (texts) per second", "GPU memory"], rows)
