"""Draws the figures of docs/symmetric-loss.md and README.md.

    python docs/figures.py                # into docs/figures/
    python docs/figures.py --out FOLDER

Losses and gradients come from the scripts' own functions, by automatic differentiation; the runs
are the notebook's. A method has the same colour as in the pictures of report.py.
"""

import argparse
import base64
import json
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "docs/symmetric_loss.ipynb"
sys.path.insert(0, str(ROOT))

from report import COLORS as REPORT_COLORS  # noqa: E402
from sa2c_continuous import symmetric_policy_losses as a2c_losses  # noqa: E402
from sppo_continuous import symmetric_policy_losses as ppo_losses  # noqa: E402

ALPHA, BETA, Z = 0.5, 1.0, -1.0  # k = 1.5, as on Atari; with k = 20.5 nothing else could be seen
P_OLD = 0.3
VARIANT = "SPPO without / p_old (ours)"
CLIP = 0.2
PROBABILITIES = torch.linspace(0.002, 0.998, 499, dtype=torch.float64)

COLORS = {method: REPORT_COLORS[method.lower()] for method in ("A2C", "SA2C", "PPO", "SPPO")}
COLORS |= {VARIANT: REPORT_COLORS["sppo-p"], "reverse": "black", "generalised": "tab:gray"}


def policy_loss(method, log_prob, old_log_prob, advantage):
    """The loss of `method`, a scalar, on tensors (batch,)."""
    if method.endswith("A2C"):
        plain_loss, reverse_loss = a2c_losses(log_prob, advantage, Z)
    else:
        plain_loss, reverse_loss = ppo_losses(log_prob, old_log_prob, advantage, CLIP, Z)
        ratio = (log_prob - old_log_prob).exp()
        unclipped = advantage * ratio <= advantage * ratio.clamp(1 - CLIP, 1 + CLIP)
        constant = advantage * Z / old_log_prob.exp()  # the scripts leave it out
        reverse_loss = reverse_loss - torch.where(unclipped, constant, 0.0).mean()
    if method in ("A2C", "PPO"):
        return plain_loss
    if method == VARIANT:
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
    """Losses against p: of a label, left, and of an action with advantage 1 or -1, right."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    p = PROBABILITIES
    p_old = torch.full_like(p, P_OLD)
    for method, label in (("A2C", "cross entropy (A2C)"), ("SA2C", "symmetric (SA2C)")):
        loss, _ = loss_and_weight(method, p, p_old, 1.0)
        left.plot(p, loss, color=COLORS[method], label=label)
    left.plot(p, 2 * (1 - p.sqrt()), color=COLORS["generalised"], label="generalised, q = 0.5")
    left.plot(p, 1 - p, color=COLORS["reverse"], label="reverse")
    left.set_title("a label, or an action with A = 1", fontsize=10)
    left.set_ylim(-0.1, 4)
    left.set_ylabel("loss")

    start = (p - P_OLD).abs().argmin()
    for method in ("PPO", "SPPO"):
        for advantage in (1.0, -1.0):
            loss, _ = loss_and_weight(method, p, p_old, advantage)
            line = "-" if advantage > 0 else "--"
            label = f"{method}, A = {advantage:.0f}"
            right.plot(p, loss - loss[start], line, color=COLORS[method], label=label)
    right.axvline(P_OLD, color="black", lw=0.6)
    right.set_title(f"p_old = {P_OLD} (vertical line), clip range {CLIP}", fontsize=10)
    right.set_ylim(-3.2, 2.8)
    right.set_ylabel(f"loss, less the loss at p = {P_OLD}")
    for ax in (left, right):
        ax.set_xlabel("p, probability of the action taken")
        ax.legend(fontsize=8, loc="upper right" if ax is left else "lower left")
        ax.grid(alpha=0.3)
    save(figure, folder / "losses.png")


def draw_weights(folder):
    """How much a sample counts in the policy gradient, against p and against r = p / p_old."""
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.3), sharey=True)
    p = PROBABILITIES
    # Before a rollout's first update, where p is p_old
    for ax, methods in zip(axes, (["A2C", "SA2C"], ["PPO", "SPPO", VARIANT])):
        for method in methods:
            _, weight = loss_and_weight(method, p, p, 1.0)
            ax.plot(p, weight, color=COLORS[method], label=method)
        ax.set_xlabel("p, probability of the action taken")
    ratio = torch.linspace(0.5, 1.5, 501, dtype=torch.float64)
    p_old = torch.full_like(ratio, P_OLD)
    for method in ("PPO", "SPPO"):
        for advantage in (1.0, -1.0):
            _, weight = loss_and_weight(method, ratio * p_old, p_old, advantage)
            label = f"{method}, A {'>' if advantage > 0 else '<'} 0"
            line = "-" if advantage > 0 else "--"
            axes[2].plot(ratio, weight, line, color=COLORS[method], label=label)
    axes[0].set_ylabel("weight in the policy gradient")
    axes[0].set_title("A2C and SA2C", fontsize=10)
    axes[1].set_title("PPO and SPPO, first update (r = 1)", fontsize=10)
    axes[2].set_title(f"PPO and SPPO, clip range {CLIP}", fontsize=10)
    axes[2].set_xlabel("r = p / p_old")
    axes[0].set_ylim(-0.1, 2.5)
    for ax in axes:
        ax.legend(fontsize=8, loc="upper left")
        ax.grid(alpha=0.3)
    save(figure, folder / "gradient-weights.png")


def copy_same_run(folder):
    """The notebook's picture of SPPO, of DPPO with alpha k, which lies on it, and of DPPO."""
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        if "plot_runs(default)" in "".join(cell["source"]):
            (image,) = [o["data"]["image/png"] for o in cell["outputs"] if "data" in o]
    path = folder / "same-run.png"
    path.write_bytes(base64.b64decode(image))
    print(path)


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
    copy_same_run(folder)


if __name__ == "__main__":
    main()
