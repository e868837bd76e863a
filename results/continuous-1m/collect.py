"""Collects finished runs into runs.csv, curves.csv and curves.png beside this file, and prints the table.

    pip install -e ".[report]" && python results/continuous-1m/collect.py RUN_FOLDER...

Scores are means over seeds with their standard errors; the figure shades one standard error.
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

HERE = Path(__file__).resolve().parent
RUN = ["script", "algo", "env_id", "seed", "noise", "noise_level", "alpha", "beta", "z", "total_timesteps"]
SCORES = ["final_return_mean", "train_return_last100"]
ROW = ["env_id", "script", "algo", "noise"]
LABELS = {
    ("sppo", "none"): ("SPPO, clean rewards", "C0", "-"),
    ("sppo", "normal"): ("SPPO, noisy rewards", "C0", "--"),
    ("ppo", "none"): ("Gaussian PPO, clean rewards", "C1", "-"),
    ("ppo", "normal"): ("Gaussian PPO, noisy rewards", "C1", "--"),
}


def main(folders: list[Path]) -> None:
    runs, curves = [], []
    for folder in folders:
        if not (folder / "summary.json").exists():
            print(f"{folder}: not finished, left out", file=sys.stderr)
            continue
        summary = json.loads((folder / "summary.json").read_text())
        recorded = folder / "args.json"
        summary["commit"] = json.loads(recorded.read_text())["commit"] if recorded.exists() else None
        runs.append({name: summary[name] for name in [*RUN, *SCORES, "final_return_std", "commit"]})
        if (folder / "progress.csv").exists():
            curves.append(
                pd.read_csv(folder / "progress.csv").assign(**{name: summary[name] for name in RUN})
            )
    runs, curves = pd.DataFrame(runs).sort_values([*ROW, "seed"]), pd.concat(curves)
    curves = curves[["env_id", "algo", "noise", "seed", "step", "return_mean", "return_std", "length_mean"]]
    curves = curves.sort_values(list(curves.columns[:5]))
    runs.to_csv(HERE / "runs.csv", index=False)
    curves.to_csv(HERE / "curves.csv", index=False, float_format="%.6g")

    scores = runs.groupby(ROW)[SCORES].agg(["mean", "sem", "count"])
    print("| environment | program | noise | seeds | last evaluation | last 100 training episodes |")
    print("|---|---|---|---|---|---|")
    for (env_id, script, algo, noise), row in scores.iterrows():
        last, train = (f"{row[score, 'mean']:.0f} ± {row[score, 'sem']:.0f}" for score in SCORES)
        print(f"| {env_id} | {script} {algo} | {noise} | {row[SCORES[0], 'count']:.0f} | {last} | {train} |")

    env_ids = sorted(curves["env_id"].unique())
    _, axes = plt.subplots(1, len(env_ids), figsize=(5 * len(env_ids), 3.6), squeeze=False)
    for ax, env_id in zip(axes[0], env_ids):
        for variant, (label, color, style) in LABELS.items():
            chosen = (curves[["env_id", "algo", "noise"]] == [env_id, *variant]).all(axis=1)
            group = curves[chosen].groupby("step")
            mean, sem = group["return_mean"].mean(), group["return_mean"].sem()
            ax.plot(mean.index, mean, style, color=color, label=label)
            ax.fill_between(mean.index, mean - sem, mean + sem, color=color, alpha=0.15)
        ax.set(title=env_id, xlabel="steps", ylabel="return (greedy actions, raw rewards)")
    axes[0][-1].legend(frameon=False, loc="lower right")
    plt.tight_layout()
    plt.savefig(HERE / "curves.png", dpi=120)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("give the folders of finished runs, for instance runs/*")
    main([Path(argument) for argument in sys.argv[1:]])
