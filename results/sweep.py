"""Collects runs of SA2C over alpha and beta: scores, and how much of the gradient is the reverse
loss's.

    pip install -e ".[report]" && python results/sweep.py results/sa2c-sweep RUN_FOLDER...

Writes runs.csv, shares.csv (the logged mean probability of the actions taken, and the mean share of
the reverse loss in their gradient, in twentieths of a run) and shares.png, and prints the table,
means over seeds ± their standard errors."""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

RUN = ["env_id", "alpha", "beta", "seed", "z", "noise", "noise_level", "total_timesteps"]
SCORES = ["final_return_mean", "train_return_last100"]
CELL = ["env_id", "alpha", "beta"]


def shares(folder: Path, summary: dict) -> pd.DataFrame:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = {"probability": "losses/probability", "reverse_share": "losses/reverse_share"}
    logged = pd.DataFrame(
        {name: {e.step: e.value for e in events.Scalars(tag)} for name, tag in tags.items()}
    )
    width = summary["total_timesteps"] // 20
    bins = np.minimum((logged.index - 1) // width + 1, 20) * width
    means = logged.groupby(bins).mean().rename_axis("step").reset_index()
    return means.assign(**{name: summary[name] for name in (*CELL, "seed")})


def main(out: Path, folders: list[Path]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    runs, curves = [], []
    for folder in folders:
        if not (folder / "summary.json").exists():
            print(f"{folder}: not finished, left out", file=sys.stderr)
            continue
        summary = json.loads((folder / "summary.json").read_text())
        commit = json.loads((folder / "args.json").read_text())["commit"]
        runs.append({name: summary[name] for name in (*RUN, *SCORES)} | {"commit": commit})
        curves.append(shares(folder, summary))
    runs, curves = pd.DataFrame(runs).sort_values([*CELL, "seed"]), pd.concat(curves)
    curves = curves[[*CELL, "seed", "step", "probability", "reverse_share"]]
    curves = curves.sort_values(list(curves.columns[:5]))
    if len(mixed := runs[["z", "noise", "noise_level", "total_timesteps"]].drop_duplicates()) > 1:
        sys.exit(f"runs of different settings, which do not belong in one table:\n{mixed}")
    runs.to_csv(out / "runs.csv", index=False)
    curves.to_csv(out / "shares.csv", index=False, float_format="%.4g")

    print("| environment | alpha | beta | seeds | last evaluation | last 100 training episodes "
          "| mean p, first and last twentieth | reverse share, first and last |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|")
    for (env_id, alpha, beta), here in runs.groupby(CELL):
        scores = [
            f"{here[score].mean():.0f} ± {here[score].sem():.0f}".replace("nan", "?")
            for score in SCORES
        ]
        at = (
            curves[(curves[CELL] == (env_id, alpha, beta)).all(axis=1)]
            .groupby("step")
            .mean(numeric_only=True)
        )
        ends = at.iloc[[0, -1]]
        p, share = (
            ", ".join(f"{x:.2g}" for x in ends[name]) for name in ("probability", "reverse_share")
        )
        cells = [env_id, f"{alpha:g}", f"{beta:g}", str(len(here)), *scores, p, share]
        print("| " + " | ".join(cells) + " |")

    curves = curves[curves["beta"] > 0]
    weights = sorted(set(zip(curves["alpha"], curves["beta"])))
    env_ids = sorted(curves["env_id"].unique())
    figure, axes = plt.subplots(
        1,
        len(env_ids),
        figsize=(4 * len(env_ids), 3.6),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for ax, env_id in zip(axes[0], env_ids):
        for i, (alpha, beta) in enumerate(weights):
            group = curves[(curves[CELL] == (env_id, alpha, beta)).all(axis=1)]
            mean = group.groupby("step")["reverse_share"].mean()
            ax.plot(mean.index / 1000, mean, color=f"C{i}", label=f"alpha {alpha:g}, beta {beta:g}")
        ax.set(title=env_id, xlabel="thousand steps", ylim=(0, 1))
    axes[0][0].set_ylabel("reverse loss's share of a sample's gradient")
    handles = axes[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=len(weights), frameon=False)
    plt.savefig(out / "shares.png", dpi=120)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(
            "give a folder to write to and those of finished runs, for instance results/new runs/*"
        )
    main(Path(sys.argv[1]), [Path(argument) for argument in sys.argv[2:]])
