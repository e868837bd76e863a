"""Collects finished runs into runs.csv, curves.csv and curves.png in a folder, and prints the
table.

    pip install -e ".[report]" && python results/collect.py results/continuous-1m RUN_FOLDER...

Scores are means over seeds with their standard errors; the figure shades one standard error.
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

RUN = [
    "script",
    "algo",
    "env_id",
    "seed",
    "noise",
    "noise_level",
    "alpha",
    "beta",
    "z",
    "total_timesteps",
]
SCORES = ["final_return_mean", "train_return_last100"]
ROW = ["env_id", "script", "algo", "noise"]
NOISE = {
    "none": ("clean rewards", "-"),
    "normal": ("noisy rewards", "--"),
    "flip": ("flipped rewards", "--"),
}


def main(out: Path, folders: list[Path]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    runs, curves = [], []
    for folder in folders:
        if not (folder / "summary.json").exists():
            print(f"{folder}: not finished, left out", file=sys.stderr)
            continue
        summary = json.loads((folder / "summary.json").read_text())
        recorded = folder / "args.json"
        summary["commit"] = (
            json.loads(recorded.read_text())["commit"] if recorded.exists() else None
        )
        runs.append({name: summary[name] for name in [*RUN, *SCORES, "final_return_std", "commit"]})
        if (folder / "progress.csv").exists():
            curves.append(
                pd.read_csv(folder / "progress.csv").assign(**{name: summary[name] for name in RUN})
            )
    runs, curves = pd.DataFrame(runs).sort_values([*ROW, "seed"]), pd.concat(curves)
    curves = curves[
        ["env_id", "algo", "noise", "seed", "step", "return_mean", "return_std", "length_mean"]
    ]
    curves = curves.sort_values(list(curves.columns[:5]))
    runs.to_csv(out / "runs.csv", index=False)
    curves.to_csv(out / "curves.csv", index=False, float_format="%.6g")

    scores = runs.groupby(ROW)[SCORES].agg(["mean", "sem", "count"])
    print(
        "| environment | program | noise | seeds | last evaluation | last 100 training episodes |"
    )
    print("|---|---|---|---|---|---|")
    for (env_id, script, algo, noise), row in scores.iterrows():
        digits = 0 if abs(row[SCORES[0], "mean"]) >= 100 else 1
        last, train = (
            f"{row[score, 'mean']:.{digits}f} ± {row[score, 'sem']:.{digits}f}" for score in SCORES
        )
        print(
            f"| {env_id} | {script} {algo} | {noise} | {row[SCORES[0], 'count']:.0f} | {last} |"
            f" {train} |"
        )

    env_ids = sorted(curves["env_id"].unique())
    figure, axes = plt.subplots(
        1, len(env_ids), figsize=(5 * len(env_ids), 4), squeeze=False, layout="constrained"
    )
    for ax, env_id in zip(axes[0], env_ids):
        here = curves[curves["env_id"] == env_id]
        for (algo, noise), group in here.groupby(["algo", "noise"], sort=True):
            scores = group.groupby("step")["return_mean"]
            mean, sem = scores.mean(), scores.sem().fillna(0)
            what, style = NOISE[noise]
            color = {"s": "C0", "d": "C2"}.get(algo[0], "C1")  # symmetric, discretised, Gaussian
            ax.plot(mean.index, mean, style, color=color, label=f"{algo.upper()}, {what}")
            ax.fill_between(mean.index, mean - sem, mean + sem, color=color, alpha=0.15)
        ax.set(title=env_id, xlabel="steps", ylabel="return of evaluations, raw rewards")
    handles = axes[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=6, frameon=False)
    plt.savefig(out / "curves.png", dpi=120)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(
            "give a folder to write to and those of finished runs, for instance results/new runs/*"
        )
    main(Path(sys.argv[1]), [Path(argument) for argument in sys.argv[2:]])
