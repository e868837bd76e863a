"""Draws the figures of docs/symmetric-loss.md and README.md.

    python docs/figures.py                # into docs/figures/
    python docs/figures.py --out FOLDER
    MUJOCO_GL=egl python docs/figures.py --agents RUN RUN RUN

The last makes agents.gif of the agents at play in the folders of three runs. Those in it were
trained at fdbdd6e (Breakout) and beed2a4 by:

    python sppo_continuous.py --seed 10007 --total-timesteps 500000 --run-name hopper
    python sppo_continuous.py --env-id LunarLanderContinuous-v3 --total-timesteps 500000 \
        --run-name lander
    python sa2c_atari.py --rmsprop-eps 1e-10 --total-timesteps 800000 --eval-freq 100000 \
        --eval-episodes 5 --run-name breakout

Losses and gradients come from the scripts' own functions, by automatic differentiation; the runs
are the notebook's. A method has the same colour as in the pictures of report.py.
"""

import argparse
import base64
import json
import sys
from pathlib import Path

import gymnasium as gym
import matplotlib
import matplotlib.pyplot as plt
import torch
from ale_py.vector_env import AtariVectorEnv
from matplotlib.colors import to_rgb
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "docs/symmetric_loss.ipynb"
sys.path.insert(0, str(ROOT))

import enjoy  # noqa: E402
from analysis.methods import COLORS as REPORT_COLORS  # noqa: E402
from sa2c_continuous import symmetric_policy_losses as a2c_losses  # noqa: E402
from sppo_continuous import symmetric_policy_losses as ppo_losses  # noqa: E402

ALPHA, BETA, Z = 0.5, 1.0, -1.0  # k = 1.5, as on Atari; with 20.5, PPO's curves would look flat
P_OLD = 0.3
P_OLD_TEXT = r"$p_\mathrm{old}$"
VARIANT = "SPPO without / p_old (ours)"
CLIP = 0.2
PROBABILITIES = torch.linspace(0.002, 0.998, 499, dtype=torch.float64)

# Of the moving picture; sizes in pixels
SIDE, GAP = 260, 4
SECONDS = 5
FRAMES_PER_SECOND = 20
SKIPPED = 950  # steps of a game, whose beginning is slow
EPISODE = 4  # its seed: one in which the lander lands between the flags, as in 3 of 1 to 12

COLORS = {method: REPORT_COLORS[method.lower()] for method in ("A2C", "SA2C", "PPO", "SPPO")}
COLORS |= {VARIANT: "tab:brown", "reverse": "black"}


def policy_loss(method, log_prob, old_log_prob, advantage, beta=BETA):
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
    return ALPHA * plain_loss + beta * reverse_loss


def loss_and_weight(method, p, p_old, advantage, beta=BETA):
    """Loss at each probability `p` and the factor w in its gradient -A w grad log p, both (n,)."""
    losses = torch.zeros_like(p)
    weights = torch.zeros_like(p)
    advantage = torch.full_like(p, advantage)
    for i in range(len(p)):
        one = slice(i, i + 1)
        log_prob = p[one].log().requires_grad_()
        loss = policy_loss(method, log_prob, p_old[one].log(), advantage[one], beta)
        (gradient,) = torch.autograd.grad(loss, log_prob)
        losses[i] = loss.detach()
        weights[i] = -gradient.item() / advantage[i]
    return losses, weights


def parts(low, high, edge):
    """Points from `low` to `edge`, and from there to `high`, where a curve may jump."""
    left = torch.linspace(low, edge * (1 - 1e-9), 150, dtype=torch.float64)
    right = torch.linspace(edge * (1 + 1e-9), high, 150, dtype=torch.float64)
    return left, right


def plot_with_jump(ax, x, y, closed, open_style=None, **style):
    """The curves x[0], y[0] and x[1], y[1]. The one with the number `closed` owns the point between
    them, and the other has an open end."""
    for i in (0, 1):
        ls = open_style if open_style and i != closed else style.get("ls", "-")
        ax.plot(x[i], y[i], **style | {"ls": ls})
    ends = [(x[0][-1], y[0][-1]), (x[1][0], y[1][0])]
    if abs(ends[0][1] - ends[1][1]) > 1e-3:
        for i, end in enumerate(ends):
            face = style["color"] if i == closed else "white"
            marker = dict(marker="o", ms=6, mec=style["color"], mfc=face, mew=1.5, zorder=5)
            ax.plot(*end, **marker)


def label(ax, x, y, text, method, **style):
    """`text` beside the method's curve, in a darker shade of its colour."""
    shade = [0.75 * part for part in to_rgb(COLORS[method])]
    ax.text(x, y, text, color=shade, **style)


def mark_clip_range(ax, low, high, y):
    ax.axvspan(low, high, color="0.93", lw=0)
    name((low + high) / 2, y, "clip range", ax)


def name(x, y, text, ax):
    """Grey `text` on the grey of the clip range."""
    box = dict(facecolor="0.93", edgecolor="none", pad=1.5)
    ax.text(x, y, text, color="0.3", ha="center", va="center", size=9.5, bbox=box)


def draw_losses(folder):
    """Losses against p: of an action with advantage 1, left, or with 1 and -1, right."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.8, 4))
    p = PROBABILITIES
    for method in ("A2C", "SA2C"):
        loss, _ = loss_and_weight(method, p, p, 1.0)
        left.plot(p, loss, color=COLORS[method])
    left.plot(p, -Z * (1 - p), color=COLORS["reverse"])
    label(left, 0.10, 2.75, "A2C: cross entropy", "A2C")
    label(left, 0.42, 1.15, "SA2C: half of A2C's\n+ reverse loss", "SA2C")
    label(left, 0.06, 0.45, "reverse loss", "reverse")
    left.set_title("A2C and SA2C, $A = 1$")
    left.set_ylim(-0.1, 4)

    for method in ("PPO", "SPPO"):
        for advantage in (1.0, -1.0):
            edge = P_OLD * (1 + CLIP * advantage)
            x = parts(0.002, 0.6, edge)
            y = [
                loss_and_weight(method, part, torch.full_like(part, P_OLD), advantage)[0]
                for part in x
            ]
            style = dict(color=COLORS[method], ls="-" if advantage > 0 else "--")
            plot_with_jump(right, x, y, 0 if advantage > 0 else 1, **style)
    right.axvline(P_OLD, color="0.35", lw=0.8, ls=":")
    mark_clip_range(right, P_OLD * (1 - CLIP), P_OLD * (1 + CLIP), -2.45)
    name(P_OLD, 3.25, P_OLD_TEXT, right)
    label(right, 0.6, -0.46, "SPPO, $A = 1$", "SPPO", ha="right")
    label(right, 0.6, -1.58, "PPO, $A = 1$", "PPO", ha="right")
    label(right, 0.375, 2.85, "SPPO, $A = -1$", "SPPO")
    label(right, 0.6, 1.05, "PPO, $A = -1$", "PPO", ha="right")
    right.set_title(f"PPO and SPPO, {P_OLD_TEXT} = {P_OLD}")
    right.set_ylim(-2.8, 3.6)
    for ax in (left, right):
        ax.set_xlabel("$p$, probability of the action taken")
        ax.set_ylabel("policy loss of one sample")
        ax.grid(alpha=0.3)
    save(figure, folder / "losses.png")


def draw_weights(folder):
    """How much a sample counts in the policy gradient, against p and against r = p / p_old."""
    figure, axes = plt.subplots(2, 2, figsize=(8.8, 6.4), sharey=True)
    p = PROBABILITIES
    # Before a rollout's first update, where p is p_old
    for ax, methods in zip(axes[0], (["A2C", "SA2C"], ["PPO", "SPPO", VARIANT])):
        for method in methods:
            _, weight = loss_and_weight(method, p, p, 1.0)
            ax.plot(p, weight, color=COLORS[method])
        ax.set_xlabel("$p$, probability of the action taken")
    label(axes[0, 0], 0.02, 1.06, "A2C", "A2C")
    label(axes[0, 0], 0.75, 1.38, "SA2C", "SA2C", ha="right")
    label(axes[0, 1], 0.02, 1.56, "SPPO", "SPPO")
    label(axes[0, 1], 0.02, 1.06, "PPO", "PPO")
    label(axes[0, 1], 0.28, 0.6, f"ours, without the\ndivision by {P_OLD_TEXT}", VARIANT, va="top")

    for ax, advantage in zip(axes[1], (1.0, -1.0)):
        for method, zero in (("SPPO", "-"), ("PPO", (0, (5, 5)))):  # both can be seen at 0
            x = parts(0.5, 1.5, 1 + CLIP * advantage)
            y = []
            for ratio in x:
                p_old = torch.full_like(ratio, P_OLD)
                y.append(loss_and_weight(method, ratio * p_old, p_old, advantage)[1])
            plot_with_jump(ax, x, y, 0 if advantage > 0 else 1, zero, color=COLORS[method])
        mark_clip_range(ax, 1 - CLIP, 1 + CLIP, 2.35)
        ax.set_xlabel(f"$r$ = $p$ / {P_OLD_TEXT}")
        ax.set_title(f"PPO and SPPO, $A {'>' if advantage > 0 else '<'} 0$")
    label(axes[1, 0], 0.52, 1.05, "SPPO", "SPPO")
    label(axes[1, 0], 0.58, 0.36, "PPO", "PPO")
    label(axes[1, 1], 1.37, 2.18, "SPPO", "SPPO", ha="right")
    label(axes[1, 1], 1.3, 1.08, "PPO", "PPO")
    axes[1, 0].text(1.35, 0.1, "both", ha="center")
    axes[1, 1].text(0.65, 0.1, "both", ha="center")
    axes[0, 0].set_title("A2C and SA2C")
    axes[0, 1].set_title("PPO and SPPO, first update of a rollout ($r = 1$)")
    axes[0, 0].set_ylim(-0.12, 2.5)
    for ax in axes[:, 0]:
        ax.set_ylabel("weight $w$ in the policy gradient")
    for ax in axes.flat:
        ax.grid(alpha=0.3)
    save(figure, folder / "gradient-weights.png")


def draw_slope(folder):
    """For a slide: of samples in and outside the clip range, SPPO's gradient against PPO's. With
    control's beta, 20."""
    beta = 20.0
    figure, ax = plt.subplots(figsize=(4.6, 3.4))
    ratio = torch.linspace(0.5, 1.5, 21, dtype=torch.float64)
    p_old = torch.full_like(ratio, P_OLD)
    gradients = {"PPO": [], "SPPO": []}
    for advantage in (-2.0, -1.0, -0.5, 0.5, 1.0, 2.0):
        for method, found in gradients.items():
            _, weight = loss_and_weight(method, ratio * p_old, p_old, advantage, beta)
            found.append(-advantage * weight)
    ppo, sppo = (torch.cat(found) for found in gradients.values())
    k = ALPHA + beta * abs(Z)
    ends = torch.stack([ppo.min(), ppo.max()])
    ax.plot(ends, k * ends, color="0.6", lw=1)
    ax.plot(ends, ends, color=COLORS["PPO"], lw=1, ls="--")
    ax.plot(ppo, sppo, "o", color=COLORS["SPPO"], ms=4)
    label(ax, 1.5, 44, rf"slope $k = \alpha + \beta\,|Z| = {k:g}$", "SPPO", ha="right")
    label(ax, 1.6, 7, "slope 1", "PPO")
    ax.text(0.25, -5, "clipped: both 0", color="0.3", va="top")
    ax.set_xlabel(r"gradient of PPO's loss in $\log p$")
    ax.set_ylabel(r"gradient of SPPO's loss in $\log p$")
    ax.grid(alpha=0.3)
    path = folder / "slope.pdf"
    figure.savefig(path, metadata={"CreationDate": None})  # the same bytes each time
    plt.close(figure)
    print(path)


def copy_same_run(folder):
    """The notebook's picture of SPPO, of DPPO with alpha k, which lies on it, and of DPPO."""
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        if "plot_runs(default)" in "".join(cell["source"]):
            (image,) = [o["data"]["image/png"] for o in cell["outputs"] if "data" in o]
    path = folder / "same-run.png"
    path.write_bytes(base64.b64decode(image))
    print(path)


def play(run):
    """Square pictures, FRAMES_PER_SECOND, of SECONDS that the agent of a run plays: the last ones
    of an episode's first 600 steps."""
    script, args, tensors = enjoy.load_run(run.absolute())
    if hasattr(script, "AtariGames"):
        return play_game(script, args, tensors)
    args.eval_episodes = 1
    watched = enjoy.Args(seed=EPISODE, video=True)
    *_, frames, fps, _ = enjoy.play_control(script, args, tensors, watched)
    every = max(1, round(fps / FRAMES_PER_SECOND))
    pictures = []
    for frame in frames[:600:every]:  # later, Hopper leaves the floor
        picture = Image.fromarray(frame)
        margin = (picture.width - picture.height) // 2
        square = picture.crop((margin, 0, picture.width - margin, picture.height))
        pictures.append(square.resize((SIDE, SIDE), Image.Resampling.LANCZOS))
    number = SECONDS * FRAMES_PER_SECOND
    pictures += pictures[-1:] * (number - len(pictures))  # of a short episode the end stands still
    return pictures[-number:]


def play_game(script, args, tensors):
    """As `play`. The agent sees small grey images, so the same game runs once more in colour."""
    games = script.AtariGames(args, 1)
    screen = AtariVectorEnv(
        gym.spec(f"ALE/{args.env_id}-v5").kwargs["game"],
        1,
        autoreset_mode="SameStep",
        repeat_action_probability=args.repeat_action_probability,
        grayscale=False,
        stack_num=1,
        img_height=SIDE,
        img_width=SIDE,
    )
    pictures = []
    reset_games, step_games = games.envs.reset, games.envs.step

    def reset_both(seed):
        screen.reset(seed=seed)
        return reset_games(seed=seed)

    def step_both(action):
        colours = screen.step(action)[0]
        pictures.append(Image.fromarray(colours[0, 0]))
        return step_games(action)

    games.envs.reset = reset_both
    games.envs.step = step_both
    script.evaluate(enjoy.atari_agent(script, args, tensors, games), games, seed=1)
    number = SECONDS * FRAMES_PER_SECOND
    return pictures[: SKIPPED + number][-number:]


def draw_agents(runs, folder):
    """The agents of runs at play, side by side, in one moving picture."""
    pages = []
    for pictures in zip(*map(play, runs)):
        page = Image.new("RGB", (len(runs) * (SIDE + GAP) - GAP, SIDE), "white")
        for i, picture in enumerate(pictures):
            page.paste(picture, (i * (SIDE + GAP), 0))
        pages.append(page.quantize(128, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE))
    path = folder / "agents.gif"
    duration = 1000 // FRAMES_PER_SECOND
    pages[0].save(path, save_all=True, append_images=pages[1:], duration=duration, loop=0)
    print(path)


def save(figure, path):
    """A picture on white, which can be read on a dark page as well, about twice as wide in pixels
    as GitHub shows it. Its metadata say what it shows, since pixels differ between versions."""
    metadata = {"Software": None, "Description": json.dumps(content(figure))}
    figure.savefig(path, dpi=170, facecolor="white", metadata=metadata)
    plt.close(figure)
    print(path)


def content(figure):
    """Texts and, of each line, every 25th point, for each panel of a figure."""
    panels = []
    for ax in figure.axes:
        texts = [ax.get_title(), ax.get_xlabel(), ax.get_ylabel()]
        texts += [text.get_text() for text in ax.texts]
        lines = [line.get_xydata()[::25].round(4).tolist() for line in ax.lines]
        panels.append({"texts": texts, "lines": lines})
    return panels


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs/figures", help="folder")
    parser.add_argument("--agents", type=Path, nargs="+", metavar="RUN", help="only agents.gif")
    args = parser.parse_args()
    folder = args.out
    folder.mkdir(parents=True, exist_ok=True)
    if args.agents:
        draw_agents(args.agents, folder)
        return
    matplotlib.use("agg")
    plt.rcParams |= {"figure.constrained_layout.use": True, "lines.linewidth": 2}
    plt.rcParams |= {"axes.titlesize": 11, "axes.labelsize": 11, "font.size": 10.5}
    plt.rcParams["pdf.fonttype"] = 42  # text stays text
    draw_losses(folder)
    draw_weights(folder)
    draw_slope(folder)
    copy_same_run(folder)


if __name__ == "__main__":
    main()
