"""Collects finished runs of sppo_rlhf.py into runs.csv, curves.csv and curves.png, and prints
tables.

    pip install -e ".[report]" && python results/rlhf.py results/rlhf-imdb RUN_FOLDER...

Means over seeds and their standard errors; the figure shades one standard error. k = alpha + beta
|Z|. PPO is k 1 with the cross entropy's weight and the gradient norm of the task; what differs in
these is in the name."""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

ROW = ["policy", "noise", "program"]
PANELS = {
    "return_mean": "reward",
    "heldout_reward2": "held-out reward model",
    "kl": "KL to the reference, nats",
    "perplexity": "perplexity under the reference",
}
COLORS = {
    "PPO": "C1",
    "SPPO, k 0.9": "C0",
    "SPPO, k 20.5": "C2",
}  # others: as they come, from the fourth on
OLD_NAMES = {"reference_perplexity": "perplexity_real", "judge_reward2": "heldout_reward2"}
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
        program = f"PPO, {k:g}" if summary["beta"] == 0 else f"SPPO, k {k:g}"
        program = program.removesuffix(", 1")
        program += f", ce-coef {summary['ce_coef']:.2g}" * (summary["ce_coef"] != 0.1)
        program += f", max-grad-norm {summary['max_grad_norm']:.2g}" * (
            summary["max_grad_norm"] != 1
        )
        run = {
            "policy": Path(summary["policy_model"]).name,
            "noise": summary["noise"],
            "program": program,
        }
        run |= {name: summary[name] for name in ("algo", "seed", "alpha", "beta", "learning_rate")}
        run["commit"] = json.loads((folder / "args.json").read_text())["commit"]
        curve = pd.read_csv(folder / "progress.csv").rename(columns=OLD_NAMES)
        curves.append(curve.assign(**run))
    curves = pd.concat(curves)
    curves = curves.sort_values([*ROW, "seed", "step"]).reset_index(drop=True)
    finals = curves[curves["step"] == curves["step"].max()]
    finals.to_csv(out / "runs.csv", index=False, float_format="%.6g")
    curves[[*ROW, "seed", "step", *COLUMNS]].to_csv(
        out / "curves.csv", index=False, float_format="%.6g"
    )

    print(
        f"| policy | noise | program | seeds | {' | '.join(COLUMNS)} |\n"
        f"|{'---|' * (4 + len(COLUMNS))}"
    )
    for row, group in finals.groupby(ROW):
        cells = (
            f"{group[c].mean():.3g} ± {group[c].sem():.2g}".replace(" ± nan", "") for c in COLUMNS
        )
        print(f"| {' | '.join(map(str, row))} | {len(group)} | {' | '.join(cells)} |")
    print("\nMinus PPO, the same seeds, at the end:\n")
    for (policy, noise), group in finals.groupby(["policy", "noise"]):
        ppo = group[group["program"] == "PPO"].set_index("seed")
        for program, other in group[group["program"] != "PPO"].groupby("program"):
            pairs = (other.set_index("seed")[COLUMNS] - ppo[COLUMNS]).dropna()
            cells = (f"{c} {pairs[c].mean():+.3g} ± {pairs[c].sem():.2g}" for c in COLUMNS)
            line = f"- {policy}, {noise}, {program}, {len(pairs)} pairs: {', '.join(cells)}"
            print(line.replace(" ± nan", ""))

    blocks = list(curves.groupby(["policy", "noise"]))
    size = (3.6 * len(PANELS), 2.8 * len(blocks))
    figure, axes = plt.subplots(
        len(blocks), len(PANELS), figsize=size, squeeze=False, layout="constrained"
    )
    others = (f"C{i}" for i in range(3, 10))
    colors = {
        program: COLORS.get(program) or next(others)
        for program in sorted(curves["program"].unique())
    }
    for line, ((policy, noise), group) in zip(axes, blocks):
        for ax, (column, title) in zip(line, PANELS.items()):
            for program, runs in group.groupby("program"):
                scores = runs.groupby("step")[column]
                mean, sem = scores.mean(), scores.sem().fillna(0)
                name, color = f"{program}, {runs['seed'].nunique()} seed(s)", colors[program]
                ax.plot(mean.index, mean, color=color, label=name)
                ax.fill_between(mean.index, mean - sem, mean + sem, color=color, alpha=0.15)
            ax.set(title=title, xlabel="texts")
        line[0].set_ylabel(f"{policy}, noise {noise}")
        line[0].legend(frameon=False, fontsize="small")
    plt.savefig(out / "curves.png", dpi=110)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(
            "give a folder to write to and those of finished runs, for instance results/new runs/*"
        )
    main(Path(sys.argv[1]), [Path(argument) for argument in sys.argv[2:]])
