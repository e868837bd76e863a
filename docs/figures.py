"""Draws the figures of docs/symmetric-loss.md.

    python docs/figures.py                # into docs/figures/
    python docs/figures.py --out FOLDER

Losses and gradients come from the scripts' own functions, by automatic differentiation; shares over
training from the runs in results/evidence.
"""

import argparse
import csv
import gzip
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sa2c_continuous import symmetric_policy_losses as a2c_losses  # noqa: E402
from sppo_continuous import symmetric_policy_losses as ppo_losses  # noqa: E402

ALPHA, BETA, Z = 0.5, 1.0, -1.0  # k = 1.5, as on Atari; with k = 20.5 nothing else could be seen
P_OLD = 0.3
VARIANT = "SPPO without / p_old (ours)"
CLIP = 0.2
PROBABILITIES = torch.linspace(0.002, 0.998, 499, dtype=torch.float64)

COLORS = {
    "A2C": "tab:gray",
    "SA2C": "tab:purple",
    "PPO": "tab:blue",
    "DPPO": "tab:cyan",
    "DPPO, max_grad_norm / k": "tab:olive",
    "DPPO, vf_coef / k": "tab:green",
    "SPPO": "tab:red",
    VARIANT: "tab:orange",
}
ROWS = {  # as benchmark.sh names them
    "ppo": "PPO",
    "dppo": "DPPO",
    "dppo-norm": "DPPO, max_grad_norm / k",
    "dppo-coef": "DPPO, vf_coef / k",
    "sppo": "SPPO",
    "sppo-p": VARIANT,
}


def policy_loss(method, log_prob, old_log_prob, advantage):
    """The loss of `method`, a scalar, on tensors (batch,)."""
    if method.endswith("A2C"):
        plain_loss, reverse_loss = a2c_losses(log_prob, advantage, Z)
    else:
        plain_loss, reverse_loss = ppo_losses(log_prob, old_log_prob, advantage, CLIP, Z)
    if method in ("A2C", "PPO"):
        return plain_loss
    if method == VARIANT:
        ratio = (log_prob - old_log_prob).exp()
        unclipped = advantage * ratio <= advantage * ratio.clamp(1 - CLIP, 1 + CLIP)
        reverse = advantage * Z * (1 - log_prob.exp())
        reverse_loss = -torch.where(unclipped, reverse, 0.0).mean()
    return ALPHA * plain_loss + BETA * reverse_loss


def loss_and_weight(method, p, p_old, advantage):
    """Loss at each probability `p` and the factor w in its gradient -A w grad log p, both (n,)."""
    losses = torch.zeros_like(p)
    weights = torch.zeros_like(p)
    advantage = torch.full_like(p, advantage)
    for i in range(len(p)):
        one = slice(i, i + 1)
        log_prob = p[one].log().requires_grad_()
        loss = policy_loss(method, log_prob, p_old[one].log(), advantage[one])
        (gradient,) = torch.autograd.grad(loss, log_prob)
        losses[i] = loss.detach()
        weights[i] = -gradient.item() / advantage[i]
    return losses, weights


def draw_losses(folder):
    """Loss against p, less its value at p = P_OLD, since a constant has no gradient."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    families = [["A2C", "SA2C"], ["PPO", "SPPO", VARIANT]]
    p_old = torch.full_like(PROBABILITIES, P_OLD)
    start = (PROBABILITIES - P_OLD).abs().argmin()
    for ax, methods in zip(axes, families):
        for method in methods:
            for advantage in (1.0, -1.0):
                loss, _ = loss_and_weight(method, PROBABILITIES, p_old, advantage)
                ax.plot(
                    PROBABILITIES,
                    loss - loss[start],
                    color=COLORS[method],
                    linestyle="-" if advantage > 0 else "--",
                    label=method if advantage > 0 else None,
                )
        ax.axvline(P_OLD, color="black", lw=0.6, ls=":")
        ax.set_xlabel("p, probability of the action taken")
        ax.set_ylim(-2, 2)
        ax.legend(fontsize=8, loc="lower right")
        ax.grid(alpha=0.3)
    axes[0].set_title("A = 1 solid, A = -1 dashed", fontsize=10)
    axes[1].set_title(f"p_old = {P_OLD}, clip range {CLIP}", fontsize=10)
    axes[0].set_ylabel(f"loss, less the loss at p = {P_OLD}")
    save(figure, folder / "losses.png")


def draw_weights(folder):
    """The factor of each sample in the policy gradient against p."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6))
    p = PROBABILITIES
    p_old = torch.full_like(p, P_OLD)
    for method in ("PPO", "SPPO", VARIANT):
        for advantage in (1.0, -1.0):
            _, weight = loss_and_weight(method, p, p_old, advantage)
            line = "-" if advantage > 0 else "--"
            axes[1].plot(p, weight, line, color=COLORS[method])
    # All methods again before a rollout's first update, where p is p_old
    for method in ("A2C", "SA2C", "PPO", "SPPO", VARIANT):
        _, weight = loss_and_weight(method, p, p, 1.0)
        # Some lines lie on one another: draw the later ones dashed
        line = "-" if method in ("A2C", "SA2C", "SPPO") else (0, (3, 3))
        axes[0].plot(p, weight, color=COLORS[method], linestyle=line, label=method)
        axes[2].plot(p, weight * (1 - p), color=COLORS[method], linestyle=line)
    axes[0].set_title("weight of A grad log p, p = p_old", fontsize=10)
    axes[1].set_title(f"p_old = {P_OLD}; A = 1 solid, A = -1 dashed", fontsize=10)
    axes[2].set_title("in the logit of the action, p = p_old", fontsize=10)
    axes[1].axvline(P_OLD, color="black", lw=0.6, ls=":")
    axes[1].set_xlim(0, 0.6)
    axes[1].set_ylim(-0.1, 2.5)
    for ax in axes:
        ax.set_xlabel("p, probability of the action taken")
        ax.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=5, fontsize=8)
    save(figure, folder / "gradient-weights.png")


def logged(quantity):
    """Means of a logged quantity since the evaluation before, of each packed run: {name: (steps,
    means)}, tensors (20,)."""
    rows = {}
    with gzip.open(ROOT / "results/evidence/progress.csv.gz", "rt", newline="") as file:
        for row in csv.DictReader(file):
            values = (int(row["step"]), float(row[quantity]))
            rows.setdefault(row["run_name"], []).append(values)
    return {name: torch.tensor(values).T for name, values in rows.items()}


def draw_logged(quantity, label, path):
    """A logged quantity over training, one line per method: the mean over the packed seeds."""
    runs = logged(quantity)
    envs = sorted({name.split("__")[0] for name in runs})
    panels = [(env, noise) for env in envs for noise in ("none", "normal")]
    figure, axes = plt.subplots(1, len(panels), figsize=(2.9 * len(panels), 3.4), sharey=True)
    for ax, (env, noise) in zip(axes, panels):
        for row, method in ROWS.items():
            curves = []
            for name, curve in runs.items():
                if name.startswith(f"{env}__{row}__{noise}__"):
                    steps, means = curve
                    curves.append(means)
            if not curves:
                continue
            mean = torch.stack(curves).mean(0)
            ax.plot(steps, mean, color=COLORS[method], lw=1.2, label=method)
        ax.set_title(f"{env}, {'clean' if noise == 'none' else 'noisy'}", fontsize=9)
        ax.set_xticks([0, 500_000, 1_000_000], ["0", "0.5M", "1M"])
        ax.set_xlabel("steps")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel(label)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8)
    save(figure, path)


def save(figure, path):
    """A small picture on white, which can be read on a dark page as well."""
    figure.savefig(path, dpi=90, facecolor="white", metadata={"Software": None})
    plt.close(figure)
    print(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs/figures", help="folder")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    matplotlib.use("agg")
    plt.rcParams["figure.constrained_layout.use"] = True
    draw_losses(folder)
    draw_weights(folder)
    draw_logged(
        "losses/clipped_gradients",
        "share of clipped updates",
        folder / "clipped-updates.png",
    )
    draw_logged(
        "losses/advantage_sign_flips",
        "share of advantages",
        folder / "sign-flips.png",
    )


if __name__ == "__main__":
    main()
