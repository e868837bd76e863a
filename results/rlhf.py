"""Collects finished runs of sppo_rlhf.py into runs.csv, curves.csv and curves.png, and prints tables.

    pip install -e ".[report]" && python results/rlhf.py results/rlhf-imdb RUN_FOLDER...

Means over seeds with their standard errors; the figure shades one standard error. k = alpha + beta |Z|.
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

ROW = ["policy", "noise", "k"]
PANELS = {
    "return_mean": "reward",
    "judge_reward2": "opinion of the other judge",
    "kl": "KL to the reference, nats",
    "perplexity": "perplexity under the reference",
}
COLUMNS = [*PANELS, "perplexity_real", "distinct_1", "distinct_2"]


def main(out: Path, folders: list[Path]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    curves = []
    for folder in folders:
        if not (folder / "summary.json").exists():
            print(f"{folder}: not finished, left out", file=sys.stderr)
            continue
        summary = json.loads((folder / "summary.json").read_text())
        k = summary["alpha"] + summary["beta"] * abs(summary["z"])
        run = {"policy": Path(summary["policy_model"]).name, "noise": summary["noise"], "k": round(k, 3)}
        run |= {name: summary[name] for name in ("algo", "seed", "alpha", "beta", "learning_rate")}
        run["commit"] = json.loads((folder / "args.json").read_text())["commit"]
        curves.append(pd.read_csv(folder / "progress.csv").assign(**run))
    curves = pd.concat(curves).rename(columns={"reference_perplexity": "perplexity_real"})
    curves = curves.sort_values([*ROW, "seed", "step"]).reset_index(drop=True)
    finals = curves[curves["step"] == curves["step"].max()]
    finals.to_csv(out / "runs.csv", index=False, float_format="%.6g")
    curves[[*ROW, "seed", "step", *COLUMNS]].to_csv(out / "curves.csv", index=False, float_format="%.6g")

    print(f"| policy | noise | k | seeds | {' | '.join(COLUMNS)} |\n|{'---|' * (4 + len(COLUMNS))}")
    for row, group in finals.groupby(ROW):
        cells = (f"{group[c].mean():.3g} ± {group[c].sem():.2g}".replace(" ± nan", "") for c in COLUMNS)
        print(f"| {' | '.join(map(str, row))} | {len(group)} | {' | '.join(cells)} |")
    print("\nSPPO minus PPO, the same seeds, at the end:\n")
    for (policy, noise), group in finals.groupby(["policy", "noise"]):
        ppo = group[group["k"] == 1].set_index("seed")
        for k, other in group[group["k"] != 1].groupby("k"):
            pairs = (other.set_index("seed")[COLUMNS] - ppo[COLUMNS]).dropna()
            cells = (f"{c} {pairs[c].mean():+.3g} ± {pairs[c].sem():.2g}" for c in COLUMNS)
            print(f"- {policy}, {noise}, k {k}, {len(pairs)} pairs: {', '.join(cells)}".replace(" ± nan", ""))

    blocks = list(curves.groupby(["policy", "noise"]))
    size = (3.6 * len(PANELS), 2.8 * len(blocks))
    figure, axes = plt.subplots(len(blocks), len(PANELS), figsize=size, squeeze=False, layout="constrained")
    for line, ((policy, noise), group) in zip(axes, blocks):
        for ax, (column, title) in zip(line, PANELS.items()):
            for color, (k, runs) in zip(("C0", "C1", "C2"), group.groupby("k")):
                scores = runs.groupby("step")[column]
                mean, sem = scores.mean(), scores.sem().fillna(0)
                name = f"{'PPO' if k == 1 else 'SPPO'}, k {k:g}, {runs['seed'].nunique()} seed(s)"
                ax.plot(mean.index, mean, color=color, label=name)
                ax.fill_between(mean.index, mean - sem, mean + sem, color=color, alpha=0.15)
            ax.set(title=title, xlabel="texts")
        line[0].set_ylabel(f"{policy}, noise {noise}")
        line[0].legend(frameon=False, fontsize="small")
    plt.savefig(out / "curves.png", dpi=110)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("give a folder to write to and those of finished runs, for instance results/new runs/*")
    main(Path(sys.argv[1]), [Path(argument) for argument in sys.argv[2:]])
