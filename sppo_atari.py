# SPDX-FileCopyrightText: 2026 The symmetric-rl-loss authors
# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10,<3.15"
# dependencies = ["torch>=2.11", "gymnasium>=1.2.3", "ale-py>=0.11.1", "numpy>=2.0",
#   "tyro>=1.0.16", "filelock>=3.30", "safetensors>=0.4.5", "tensorboard>=2.19", "tqdm>=4.66.5"]
# [tool.uv]  # the versions of requirements.lock
# exclude-newer = "2026-11-17T00:00:00Z"
# constraint-dependencies = ["torch==2.13.0"]
# ///
"""Symmetric PPO (SPPO) for Atari games in one file.

    python sppo_atari.py --env-id Breakout                   # SPPO
    python sppo_atari.py --env-id Breakout --noise flip      # the same with noisy rewards
    python sppo_atari.py --env-id Breakout --beta 0          # the baseline, PPO

From "Symmetric Reinforcement Learning Loss for Robust Learning on Diverse Tasks and Model Scales"
(Byun & Perrault, ICML 2025, arXiv 2405.17618), which adds a reverse cross-entropy term to the PPO
loss, meant to make training robust to noise. With p = pi(a|s) the probability of the action taken,
p_old its probability under the policy that sampled it, r = p / p_old, A its advantage, and Z < 0 a
constant that stands for log 0:

    PPO loss          L  = -mean( min(A r, A clip(r, 1 - eps, 1 + eps)) )
    reverse PPO loss  Lr = -mean( m A Z (1 - p) / p_old ),  m = 1 where L has a gradient, else 0
    symmetric loss    alpha L + beta Lr

SPPO differs from PPO in two lines, "all that SPPO adds to PPO" and `beta * reverse_loss`. The
gradient of Lr is |Z| times that of L, so SPPO's policy gradient is (alpha + beta |Z|) times PPO's.
A factor above 1 raises the weight of the policy loss relative to value loss and entropy bonus, and
makes gradient clipping more frequent.

The same command continues a killed run. On a CPU in float32 it ends as if it had not been killed.
"""

import csv
import ctypes
import hashlib
import json
import math
import os
import platform
import re
import sys
import time
from collections import deque
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Literal, NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # torch's idle threads leave cores to the games

import ale_py
import gymnasium as gym
import numpy as np
import safetensors.torch
import torch
import tyro
from ale_py.vector_env import AtariVectorEnv
from filelock import FileLock
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

gym.register_envs(ale_py)

SCRIPT = Path(__file__).resolve()
SOURCE = SCRIPT.read_bytes()  # read at once, since the file may be edited during the run
START = Path.cwd()  # relative paths begin here, even where an environment changes directory
# The same run continues although these differ (`start_digest` stands for start_from)
NO_EFFECT = ["runs_dir", "start_from", "device", "compile", "track"]
GOES_ON = [*NO_EFFECT, "total_timesteps", "eval_freq", "eval_episodes"]  # from another one


@dataclass
class Args:
    # Run
    env_id: str = "Breakout"  # a game: the NAME of Gymnasium's ALE/NAME-v5
    total_timesteps: int = 5_000_000  # steps (4 frames each) summed over games, in whole rollouts
    seed: int = 1  # of all random numbers (the authors' runs: 10000, 10001, ...)
    exp_name: str | None = None  # name of the method in reports; default: the algorithm
    runs_dir: str = "runs"  # folder of all runs
    start_from: str | None = None  # folder of a run: begin with its checkpoint
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU, where there is one
    amp: Literal["auto", "off"] = "auto"  # auto: bfloat16 where it is faster; off: float32
    compile: bool = True  # compile on a GPU (never on a CPU, which would gain nothing)
    checkpoint_freq: int = 31_250  # steps of each game between checkpoints, at which games restart
    track: bool = False  # log to Weights & Biases as well (pip install wandb)
    # Algorithm
    repeat_action_probability: float = 0.0  # sticky actions: probability of a repeat; 0.25 in v5
    num_envs: int = 8  # games played in parallel
    num_steps: int = 128  # steps of each game per rollout
    num_minibatches: int = 4  # minibatches per epoch
    update_epochs: int = 4  # passes over a rollout
    learning_rate: float = 2.5e-4  # Adam's initial learning rate
    anneal_lr: bool = True  # decrease the learning rate linearly to 0
    adam_eps: float = 1e-5  # Adam's epsilon
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.95  # lambda of generalised advantage estimation
    clip_coef: float = 0.1  # initial epsilon of the clip range
    anneal_clip: bool = True  # decrease the clip range linearly to 0
    norm_adv: bool = True  # normalise advantages in each minibatch
    vf_coef: float = 0.5  # weight of the value loss, an MSE without CleanRL's factor of 1/2
    ent_coef: float = 0.01  # weight of the entropy bonus
    max_grad_norm: float = 0.5  # gradient clipping, over all parameters together
    # Symmetric loss, and noise on clipped rewards
    alpha: float | None = None  # weight of the PPO loss; default: 0.5, or 1 if beta is 0
    beta: float = 1.0  # weight of the reverse loss; 0: PPO
    z: float = -1.0  # Z, which stands for log 0
    noise: Literal["none", "flip", "normal", "uniform", "adv_flip"] = "none"  # adv_flip: advantages
    noise_level: float | None = None  # flip probability (default 0.1) or scale (default 0.05)
    # Evaluation
    eval_freq: int | None = None  # steps between evaluations; default: total / 20
    eval_episodes: int = 10  # games per evaluation: sampled actions, raw scores without noise

    def __post_init__(self):
        if self.alpha is None:
            self.alpha = 0.5 if self.beta else 1.0
        if self.noise_level is None:
            defaults = {"none": 0.0, "normal": 0.05, "uniform": 0.05}
            self.noise_level = defaults.get(self.noise, 0.1)
        if self.eval_freq is None:
            self.eval_freq = max(1, self.total_timesteps // 20)
        self.env_id = self.env_id.removesuffix("NoFrameskip-v4")  # the same game, with another name
        if self.exp_name is None:
            self.exp_name = "sppo" if self.beta else "ppo"
        check(self)


# ---- Environment


class AtariGames:
    """Games in parallel, preprocessed as in DeepMind's DQN, each reset as soon as it ends.

    A step repeats an action for four frames. Observations are grey 84 x 84 images, the maximum of
    the last two frames, stacked over the last four steps. A game starts with FIRE (if it has that
    action) and no-ops, together fewer than 30 frames, and is truncated after 108,000 frames. For
    the learner a lost life ends the episode, but the game continues. The next action is FIRE,
    whatever the agent chose, since many games wait for it."""

    def __init__(self, args, num_games, max_frames=108_000):
        num_threads = torch.get_num_threads()
        on_gpu = args.device != "cpu" and torch.cuda.is_available()
        if on_gpu and hasattr(os, "sched_getaffinity"):  # torch needs no core, the games get all
            cores = len(os.sched_getaffinity(0))
            num_threads = int(os.environ.get("OMP_NUM_THREADS") or cores)
        self.envs = AtariVectorEnv(
            gym.spec(f"ALE/{args.env_id}-v5").kwargs["game"],
            num_games,
            num_threads=min(num_games, num_threads),
            autoreset_mode="SameStep",
            reward_clipping=False,  # done by `step`, which also counts lives
            repeat_action_probability=args.repeat_action_probability,
            max_num_frames_per_episode=max_frames,
        )
        fire = ale_py.Action.FIRE
        actions = self.envs.ale.get_action_set()
        self.num_actions = len(actions)
        self.fire = actions.index(fire) if fire in actions else None
        self.num_games = num_games
        self.recent_episodes = deque(maxlen=100)  # (raw score, steps) of the last games

    def reset(self, seed):
        """Starts all games. Returns images (num_games, 4, 84, 84), uint8."""
        # With seed + i, runs with neighbouring seeds would share games' seeds
        seeds = np.random.default_rng(seed).integers(2**31, size=self.num_games)
        images, info = self.envs.reset(seed=seeds)
        self.lives = info["lives"]
        self.life_lost = np.zeros(self.num_games, bool)
        self.score = np.zeros(self.num_games)
        self.length = np.zeros(self.num_games)
        return images

    def step(self, action):
        """Steps all games by `action` (num_games,). Returns images (num_games, 4, 84, 84), rewards
        clipped to -1, 0 or 1, done (a life was lost or the game is over), overridden (FIRE replaced
        the action), {index: last images} of truncated games, and {index: (raw score, steps)} of the
        games that are over."""
        overridden = np.zeros_like(self.life_lost)
        if self.fire is not None:
            overridden = self.life_lost
            action = np.where(overridden, self.fire, action)
        images, reward, terminated, truncated, info = self.envs.step(action)
        over = terminated | truncated
        self.life_lost = (info["lives"] > 0) & (info["lives"] < self.lives) & ~over
        self.lives = info["lives"]
        self.score += reward
        self.length += 1

        results = {}
        final_images = {}
        for i in np.flatnonzero(over):
            results[i] = float(self.score[i]), float(self.length[i])
            self.recent_episodes.append(results[i])
            self.score[i] = 0
            self.length[i] = 0
            if not terminated[i]:
                final_images[i] = info["final_obs"][i]
        return images, np.sign(reward), over | self.life_lost, overridden, final_images, results


def perturb_reward(reward, noise, level, rng):
    """Rewards of any shape with noise: flip replaces r by 1 - r with probability `level`, normal
    adds N(0, level^2), uniform adds U(-level, level)."""
    if noise == "flip":
        flipped = rng.random(reward.shape) < level
        return np.where(flipped, 1 - reward, reward)
    if noise == "normal":
        return reward + rng.normal(0, level, reward.shape)
    if noise == "uniform":
        return reward + rng.uniform(-level, level, reward.shape)
    if noise in ("none", "adv_flip"):
        return reward
    raise ValueError(f"perturb_reward does not know the noise {noise!r}")


def perturb_advantage(advantage, level, rng):
    """Advantages of any shape, the sign of each flipped with probability `level`."""
    flipped = torch.from_numpy(rng.random(advantage.shape) < level)
    return torch.where(flipped.to(advantage.device), -advantage, advantage)


# ---- Agent


class Agent(nn.Module):
    """Actor and critic on one convolutional network, that of DQN (Mnih et al., Nature 2015)."""

    def __init__(self, num_actions, bfloat16=False):
        super().__init__()
        self.dtype = torch.bfloat16 if bfloat16 else torch.float32  # both exact for 0, ..., 255
        self.conv = nn.Conv2d(4, 32, 8, stride=4)
        self.trunk = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(32, 64, 4, stride=2),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * 7 * 7, 512),
            nn.ReLU(),
        )
        self.actor = nn.Linear(512, num_actions)
        self.critic = nn.Linear(512, 1)
        gains = {self.actor: 0.01, self.critic: 1.0}
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.orthogonal_(layer.weight, gains.get(layer, math.sqrt(2)))
                nn.init.zeros_(layer.bias)

    def autocast(self, enabled=True):
        enabled = enabled and self.dtype == torch.bfloat16
        device = next(self.parameters()).device
        return torch.autocast(device.type, torch.bfloat16, enabled=enabled)

    def forward(self, images):
        """Logits (batch, num_actions) and values (batch,) of images (batch, 4, 84, 84), uint8."""
        x = images.to(self.dtype, memory_format=torch.channels_last)
        with self.autocast():
            weight = self.conv.weight / 255  # cheaper than scaling the images
            x = torch.conv2d(x, weight, self.conv.bias, self.conv.stride, self.conv.padding)
            x = self.trunk(x)
        with self.autocast(enabled=False):  # the loss must not see rounded probabilities
            x = x.float()
            return self.actor(x), self.critic(x).squeeze(-1)


def sample_gumbel(shape, generator):
    """Gumbel-max trick: arg max of logits + these numbers is a sample; faster than Categorical."""
    return -torch.empty(shape).exponential_(generator=generator).log()


# ---- Rollout


class Batch(NamedTuple):
    """Steps of a rollout, a tensor (n, ...) each. A field that is added reaches the loss, too."""

    obs: Tensor
    action: Tensor
    log_prob: Tensor  # under the policy that acted
    advantage: Tensor  # in float64, until it is normalised
    returns: Tensor  # in float64
    mask: Tensor  # 0 where FIRE replaced the action, a step that trains only the critic, else 1


def compute_gae(reward, value, done, gamma, gae_lambda):
    """Advantages and returns (T, N) by generalised advantage estimation (arXiv 1506.02438).

    `reward` and `done`, whether a step ended its episode, are (T, N); `value` is (T + 1, N), of
    the observations before each step and after the last."""
    next_value = np.where(done, 0.0, value[1:])
    delta = reward + gamma * next_value - value[:-1]
    decay = np.where(done, 0.0, gamma * gae_lambda)
    advantage = delta.copy()
    for t in reversed(range(len(delta) - 1)):
        advantage[t] += decay[t] * advantage[t + 1]
    return advantage, advantage + value[:-1]


@torch.no_grad()
def collect(agent, args, games, images, rng, generator, agent_fn):
    """A rollout from `images` (num_envs, 4, 84, 84), with advantages. Returns a `Batch` of all its
    steps, and the images after the last. `agent_fn` is the agent, compiled or not."""
    device = next(agent.parameters()).device
    T, N = args.num_steps, args.num_envs
    obs = torch.empty((T + 1, N, 84, 84, 4), dtype=torch.uint8, device=device)
    obs = obs.permute(0, 1, 4, 2, 3)  # channels last in memory
    obs[0] = torch.from_numpy(images)
    logits = torch.empty(T, N, games.num_actions, device=device)
    value = torch.empty(T + 1, N, device=device)
    action = torch.empty(T, N, dtype=torch.int64, device=device)
    reward, final_value = np.zeros((2, T, N))  # the latter of truncated games
    done, overridden = np.zeros((2, T, N), bool)  # the latter where FIRE replaced the action
    gumbel = sample_gumbel(logits.shape, generator).to(device)
    with agent.autocast():  # so that weights are cast once a rollout
        for t in range(T):
            logits[t], value[t] = agent_fn(obs[t])
            action[t] = (logits[t] + gumbel[t]).argmax(-1)
            step = games.step(action[t].cpu().numpy())
            images, reward[t], done[t], overridden[t], final_images, _ = step
            obs[t + 1] = torch.from_numpy(images)
            for i, one_images in final_images.items():
                _, one_value = agent(torch.from_numpy(one_images[None]).to(device))
                final_value[t, i] = one_value.item()
        _, value[T] = agent_fn(obs[T])

    log_prob = Categorical(logits=logits, validate_args=False).log_prob(action)
    noisy_reward = perturb_reward(reward, args.noise, args.noise_level, rng)
    # A truncated game would have gone on: bootstrap from where it stopped
    noisy_reward = noisy_reward + args.gamma * final_value
    values = value.double().cpu().numpy()
    advantage, returns = compute_gae(noisy_reward, values, done, args.gamma, args.gae_lambda)
    arrays = advantage, returns, (~overridden).astype(np.float32)
    tensors = obs[:T], action, log_prob, *(torch.from_numpy(x).to(device) for x in arrays)
    return Batch(*(tensor.flatten(0, 1) for tensor in tensors)), images


# ---- Losses


def symmetric_policy_losses(log_prob, old_log_prob, advantage, clip_coef, z):
    """PPO loss L and reverse PPO loss Lr, to minimise as alpha L + beta Lr. The tensors (n,) are
    log p, log p_old and A of n actions; `clip_coef` is PPO's epsilon.

    (1 - p) / p_old = 1 / p_old - r, where 1 / p_old is constant, and huge for unlikely actions. The
    Lr returned leaves it out: it has the gradient of the authors' code, but not the value.
    """
    ratio = (log_prob - old_log_prob).exp()
    surrogate = advantage * ratio
    clipped = advantage * ratio.clamp(1 - clip_coef, 1 + clip_coef)
    unclipped = surrogate <= clipped  # m: where PPO's gradient flows
    policy_loss = -torch.where(unclipped, surrogate, clipped).mean()  # the minimum of both
    reverse_loss = torch.where(unclipped, z * surrogate, 0.0).mean()  # all that SPPO adds to PPO
    return policy_loss, reverse_loss


def loss_and_metrics(agent, args, batch, clip_coef):
    """Loss on a minibatch, and what to log."""
    mask = batch.mask
    count = mask.sum().clamp(min=1)  # a divisor, so not 0
    weight = mask / count * len(mask)  # mean(weight * x) is the mean of x where mask is 1
    normalized = batch.advantage
    if args.norm_adv:  # float64, as float32 can give equal advantages a deviation above 1e-8
        mean = (mask * normalized).sum() / count
        variance = (mask * (normalized - mean)).square().sum() / (count - 1).clamp(min=1)
        normalized = (normalized - mean) / (variance.sqrt() + 1e-8)
    logits, value = agent(batch.obs)
    policy = Categorical(logits=logits, validate_args=False)
    log_prob = policy.log_prob(batch.action)
    normalized = normalized.to(log_prob.dtype)
    policy_loss, reverse_loss = symmetric_policy_losses(
        log_prob, batch.log_prob, weight * normalized, clip_coef, args.z
    )
    value_loss = (value.flatten() - batch.returns.to(value.dtype)).square().mean()
    entropy = (weight * policy.entropy()).mean()
    # A term added here competes with k = alpha + beta |Z| times PPO's loss: 1.5 times by default
    loss = args.alpha * policy_loss + args.beta * reverse_loss
    loss = loss + args.vf_coef * value_loss - args.ent_coef * entropy

    sign_changes = weight * ((normalized > 0) != (batch.advantage > 0))
    log_ratio = log_prob - batch.log_prob
    kl = log_ratio.expm1() - log_ratio  # joschu.net/blog/kl-approx.html
    clipped = log_ratio.expm1().abs() > clip_coef
    metrics = {
        "losses/policy_loss": policy_loss,
        "losses/reverse_loss": reverse_loss,
        "losses/value_loss": value_loss,
        "losses/entropy": entropy,
        "losses/norm_sign_changes": sign_changes.mean(),
        "losses/approx_kl": (weight * kl).mean(),
        "losses/clipfrac": (weight * clipped).mean(),
    }
    return loss, {name: metric.detach() for name, metric in metrics.items()}


# ---- Training


def update(agent, args, optimizer, loss_fn, batch, rng, generator, clip_coef):
    """Passes `update_epochs` times over a batch. Returns the metrics of each minibatch."""
    metrics = []
    for _ in range(args.update_epochs):
        noisy_batch = batch
        if args.noise == "adv_flip":  # drawn anew in every epoch
            advantage = perturb_advantage(batch.advantage, args.noise_level, rng)
            noisy_batch = batch._replace(advantage=advantage)
        order = torch.randperm(len(batch.obs), generator=generator).to(batch.obs.device)
        for rows in order.chunk(args.num_minibatches):
            minibatch = Batch(*(tensor[rows] for tensor in noisy_batch))
            loss, minibatch_metrics = loss_fn(agent, args, minibatch, clip_coef)
            optimizer.zero_grad()
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
            optimizer.step()
            # Copies, since CUDA graphs overwrite their outputs
            minibatch_metrics = {name: x.clone() for name, x in minibatch_metrics.items()}
            minibatch_metrics["losses/grad_norm"] = grad_norm  # before clipping
            minibatch_metrics["losses/clipped_gradients"] = grad_norm > args.max_grad_norm
            metrics.append(minibatch_metrics)
    return metrics


def train(args, folder):
    keep_freed_memory()
    torch.manual_seed(args.seed)  # initial weights
    fastest = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(fastest if args.device == "auto" else args.device)
    torch.backends.cudnn.allow_tf32 = args.amp == "auto"  # --amp off: full float32
    games = AtariGames(args, args.num_envs)
    bfloat16 = args.amp == "auto" and has_bfloat16(device)
    agent = Agent(games.num_actions, bfloat16).to(device)
    optimizer = torch.optim.Adam(
        agent.parameters(), lr=args.learning_rate, eps=args.adam_eps, fused=True
    )

    # An edited script's own network or optimizer belongs here, too
    stateful = {"agent": agent, "optimizer": optimizer}
    checkpoint_path = folder / "checkpoint.pt"
    checkpoint = restore(stateful, args, folder)
    # Steps, rows of progress.csv, what was logged since the last row, and steps per second
    global_step, evaluations, history, speeds = checkpoint["progress"]
    games.recent_episodes.extend(checkpoint["recent_episodes"])
    if args.track:
        import wandb

        # W&B keeps the run's id in `dir`, so that resume="auto" finds it
        options = {"config": vars(args), "sync_tensorboard": True, "resume": "auto"}
        wandb.init(project="symmetric-rl", name=folder.name, dir=folder, **options)
    writer = SummaryWriter(folder, purge_step=global_step + 1)

    batch_size = args.num_steps * args.num_envs
    begun = global_step
    interval = args.checkpoint_freq * args.num_envs
    images = games.reset([args.seed, global_step])
    print(f"{folder.name}: from step {global_step:,}, with a checkpoint every {interval:,} steps")
    bar = tqdm(total=args.total_timesteps, initial=global_step, unit=" steps", disable=None)
    agent_fn, loss_fn = agent, loss_and_metrics
    if args.compile and device.type == "cuda":  # to CUDA graphs
        agent_fn = compiled(agent, mode="reduce-overhead")
        loss_fn = compiled(loss_and_metrics, mode="reduce-overhead")

    while global_step < args.total_timesteps:
        started = time.perf_counter()
        # Seed and step determine all random numbers, so checkpoints hold no generators
        rng = np.random.default_rng([args.seed, global_step, 1])
        generator = torch.Generator().manual_seed(rng.integers(2**31).item())
        torch.manual_seed(rng.integers(2**31).item())  # for layers that draw, such as dropout
        remaining = 1 - global_step / args.total_timesteps
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = args.learning_rate * remaining
        clip_coef = args.clip_coef * remaining if args.anneal_clip else args.clip_coef
        clip_coef = torch.tensor(clip_coef, device=device)  # compiled, a float would be a constant
        batch, images = collect(agent, args, games, images, rng, generator, agent_fn)
        global_step += batch_size
        bar.update(batch_size)

        metrics = update(agent, args, optimizer, loss_fn, batch, rng, generator, clip_coef)
        # The first policy is almost uniform, so a mismatch shows only after an update: look twice
        limit = 1e-6 if bfloat16 else 1e-8  # bfloat16's rounding: some 1e-8
        if global_step <= begun + 2 * batch_size and metrics[0]["losses/approx_kl"] > limit:
            message = "the policy that acts is not the one that is trained (dropout/memory?)"
            if device.type == "cpu":
                raise Failed(f"error: {message}")
            tqdm.write(f"warning: {message}, or this GPU rounds more", file=sys.stderr)

        # Log
        scalars = means(metrics)
        if not math.isfinite(scalars["losses/grad_norm"]):
            raise Failed(f"error: gradient not finite, step {global_step} (rate? reward?)")
        # advantage = return - value
        own = batch.mask == 1
        advantage, returns = (x[own].cpu().numpy() for x in (batch.advantage, batch.returns))
        unexplained = advantage.var() / max(returns.var(), 1e-8)
        scalars["losses/explained_variance"] = 1 - unexplained
        if games.recent_episodes:  # means of the last 100
            score, length = np.mean(games.recent_episodes, axis=0)
            scalars["charts/episodic_return"] = score
            scalars["charts/episodic_length"] = length
            bar.set_postfix_str(f"return {score:.1f}")
        history.append(means([scalars]))  # as Python's numbers
        speeds.append(batch_size / (time.perf_counter() - started))
        for name, scalar in scalars.items():
            writer.add_scalar(name, scalar, global_step)
        writer.add_scalar("charts/SPS", speeds[-1], global_step)

        # Evaluation and checkpoint, whenever a multiple of their frequencies is passed
        finished = global_step >= args.total_timesteps
        if finished or global_step % args.eval_freq < batch_size:
            eval_games = AtariGames(args, args.eval_episodes)
            scores, lengths = evaluate(agent, eval_games, args.seed + global_step)
            evaluations.append(evaluation_row(global_step, scores, lengths, history))
            history = []
            save_agent(agent, evaluations, folder)
            writer.add_scalar("eval/return_mean", scores.mean(), global_step)
            tqdm.write(f"step {global_step:,}: return {scores.mean():.1f}")
        if finished or global_step % interval < batch_size:
            checkpoint = {name: part.state_dict() for name, part in stateful.items()}
            checkpoint["recent_episodes"] = list(games.recent_episodes)
            checkpoint["progress"] = global_step, evaluations, history, speeds
            writer.flush()
            with atomic_write(checkpoint_path) as path:
                torch.save(checkpoint, path)
                load_checkpoint(path, "meta")  # checks only: an edit may save what can't be read
            images = games.reset([args.seed, global_step])  # as when continuing

    writer.close()
    summary = {name: x for name, x in evaluations[-1].items() if math.isfinite(x)}  # JSON lacks nan
    summary["sps"] = np.median(speeds)
    with atomic_write(folder / "summary.json") as path:  # last: marks the end
        path.write_text(json.dumps(summary, indent=2))


@torch.no_grad()
def evaluate(agent, games, seed):
    """Raw scores and lengths in steps (num_games,) of whole games, with sampled actions."""
    device = next(agent.parameters()).device
    rng = np.random.default_rng([seed, 0, 2])  # training's are [seed, step] and [seed, step, 1]
    generator = torch.Generator().manual_seed(rng.integers(2**31).item())
    images = games.reset(rng.integers(2**31))
    results = {}
    while len(results) < games.num_games:
        logits, _ = agent(torch.from_numpy(images).to(device))
        gumbel = sample_gumbel(logits.shape, generator).to(device)
        images, *_, ended = games.step((logits + gumbel).argmax(-1).cpu().numpy())
        results = ended | results  # the first game of each
    results = np.array([results[i] for i in range(games.num_games)])
    return results[:, 0], results[:, 1]


# ---- Plumbing


def check(args):
    """Refuses arguments that contradict each other or are out of range. tyro prints the message."""

    def require(condition, message):
        if not condition:
            raise ValueError(message)

    counts = "total_timesteps eval_freq eval_episodes checkpoint_freq num_envs num_steps"
    for name in f"{counts} num_minibatches update_epochs".split():
        require(getattr(args, name) >= 1, f"{name} must be at least 1")
    weights = "alpha beta noise_level learning_rate adam_eps clip_coef vf_coef ent_coef"
    for name in f"seed {weights}".split():
        require(0 <= getattr(args, name) < math.inf, f"{name} must be finite and not negative")
    for name in "gamma gae_lambda repeat_action_probability".split():
        require(0 <= getattr(args, name) <= 1, f"{name} must be between 0 and 1")
    require(args.seed < 2**63, "seed must be below 2**63")
    require(args.max_grad_norm > 0, "max_grad_norm must be positive; 1e9 turns clipping off")
    require(-math.inf < args.z < 0, "z stands for log 0: it must be negative and finite")
    require(args.alpha + args.beta > 0, "with alpha and beta 0 nothing trains the policy")
    require(args.noise != "none" or not args.noise_level, "noise_level needs a --noise")
    if args.noise.endswith("flip"):
        require(args.noise_level <= 1, "noise_level is the probability of a flip, so at most 1")
    batch_size = args.num_envs * args.num_steps
    minibatch_size, rest = divmod(batch_size, args.num_minibatches)
    require(rest == 0, f"num_minibatches must divide the {batch_size} steps of a rollout")
    require(minibatch_size > 1 or not args.norm_adv, "norm_adv needs 2 or more steps a minibatch")
    try:
        gym.spec(f"ALE/{args.env_id}-v5")
    except gym.error.Error as error:
        raise ValueError(f"env_id must be the NAME of an ALE/NAME-v5: {error}") from error


def file_digests():
    """{path: SHA-256} of the files that decide what a run does: this script, and imported files
    that are the user's own. A program that imports this script is not part of the run."""
    installed = {Path(os.__file__).parent}
    installed |= {x for x in map(Path, sys.path) if re.match("(site|dist)-packages$|DLLs$", x.name)}
    # Modules of programs that import this script, of what runs at each start, of torch.compile
    foreign = r"__(mp_)?main__$|(site|user)customize$|torch\.|.+\.inductor_entry_cpp$"
    digests = {}
    for name, module in list(sys.modules.items()):
        file = Path(getattr(module, "__file__", None) or "")
        is_foreign = re.match(foreign, name) or installed & set(file.parents)
        if file.is_file() and not is_foreign:
            digests[str(file.resolve())] = hashlib.sha256(file.read_bytes()).hexdigest()
    digests[str(SCRIPT)] = hashlib.sha256(SOURCE).hexdigest()
    return digests


def start_digest(args):
    """{path: SHA-256} of the checkpoint that a run starts from: of any with fewer steps, if none is
    at work on it. {} without `start_from`."""
    if not args.start_from:
        return {}
    path = Path(START, args.start_from).resolve() / "checkpoint.pt"
    if not path.exists():
        sys.exit(f"error: {args.start_from} has no checkpoint")
    step, *_ = load_checkpoint(path, "meta")["progress"]
    if step >= args.total_timesteps:
        sys.exit(f"error: {args.start_from} has {step:,} of --total-timesteps already: give more")
    try:
        with suppress(PermissionError), FileLock(path.with_name("lock"), timeout=10):
            pass  # nobody is at work on it, or the folder may only be read
    except OSError as error:
        sys.exit(f"error: another process is at work on {path.parent}, or locking fails: {error}")
    return {str(path): hashlib.sha256(np.memmap(path, mode="r")).hexdigest()}


def differences(*folders):
    """Texts of what a run has other than the one it starts from; none if it only goes on."""
    lines = [(folder / "sessions.jsonl").read_text().splitlines()[-1] for folder in folders]
    sessions = [json.loads(line) for line in lines]
    was, now = (session["args"] for session in sessions)
    names = [name for name in now | was if name not in GOES_ON and was.get(name) != now.get(name)]
    files = [{(Path(path).name, x) for path, x in run["files"].items()} for run in sessions]
    changed = {name for name, _ in files[0] ^ files[1]} - {"checkpoint.pt"}
    return [f"{name} {was.get(name)} -> {now.get(name)}" for name in names] + sorted(changed)


def run_folder(args, digests):
    """Folder of a run. Its name ends with a hash of arguments and files, so the same command finds
    its run again, and a changed script starts a new one."""
    kept = {name: value for name, value in vars(args).items() if name not in NO_EFFECT}
    files = sorted((Path(path).name, digest) for path, digest in digests.items())
    digest = hashlib.sha256(json.dumps([kept, files]).encode()).hexdigest()
    name = f"{args.env_id}__{args.exp_name}__{args.noise}__{args.seed}"
    name = re.sub(r'[<>:"/\\|?*]', "-", name)  # Windows refuses these characters
    return Path(START, args.runs_dir, f"{name}__{digest[:8]}")


def compiled(function, **options):
    """`function`, compiled at its first call. If that fails, for example without a C++ compiler, it
    runs uncompiled. Then an edited copy shows Python's own error."""
    current = torch.compile(function, **options)

    def call(*inputs):
        nonlocal current
        try:
            return current(*inputs)
        except Exception as error:  # any is possible here
            if current is function:
                raise
            tqdm.write(f"warning: torch.compile failed, running uncompiled: {error!r:.200}")
            current = function
            return function(*inputs)

    return call


def has_bfloat16(device):
    """Whether bfloat16 is faster. CPUs with avx512_fp16 need AMX, which virtual ones may lack."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    needed = "amx_bf16" if able.get("avx512_fp16") else "avx512_bf16"
    return able.get(needed, False)


def keep_freed_memory():
    """Tells glibc to keep freed memory. By default it goes back to the system, and each 4 KiB
    costs a page fault when needed again: a quarter of the time of an update on a CPU."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX of malloc.h
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD


def means(rows):
    """Means of numbers by their names, over the `rows` that have them."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {
        name: np.mean([float(row[name]) for row in rows if name in row]).item() for name in names
    }


def evaluation_row(step, scores, lengths, history):
    """A row of progress.csv: an evaluation, and means of what was logged since the one before."""
    if not np.isfinite(scores).all():
        raise Failed(f"error: a return of the evaluation at step {step} is not finite: rewards?")
    evaluation = {
        "return_mean": scores.mean(),
        "return_std": scores.std(),
        "length_mean": lengths.mean(),
    }
    # Raises TypeError if a logged metric has the name of a column of the evaluation
    return dict(step=step, **means([evaluation]), **means(history))


def save_agent(agent, evaluations, folder):
    """Writes progress.csv, and agent.safetensors, the weights."""
    with atomic_write(folder / "progress.csv") as path, open(path, "w", encoding="utf-8") as file:
        table = csv.DictWriter(file, means(evaluations), lineterminator="\n")  # all rows' names
        table.writeheader()
        table.writerows(evaluations)
    tensors = {  # copies, since safetensors refuses tensors that share memory or are not contiguous
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in agent.state_dict().items()
    }
    with atomic_write(folder / "agent.safetensors") as path:
        path.write_bytes(safetensors.torch.save(tensors))


def restore(stateful, args, folder):
    """Loads the run's checkpoint, if it has one, else that of the run which it starts from, if any.
    Returns what else is in it. Only a run that goes on keeps the other's rows and episodes."""
    path = folder / "checkpoint.pt"
    starts = args.start_from and not path.exists()
    if starts:
        path = Path(START, args.start_from).resolve() / path.name
    if not path.exists():
        return {"progress": (0, [], [], []), "recent_episodes": []}
    checkpoint = load_checkpoint(path)
    for name, part in stateful.items():
        saved = checkpoint[name]
        if starts and "param_groups" in saved:  # of an optimizer, whose options are flags
            options = part.state_dict()["param_groups"]
            if options[0].keys() != saved["param_groups"][0].keys():
                sys.exit(f"error: {path} is from another optimizer")
            saved["param_groups"] = options
        part.load_state_dict(saved)
    if starts:
        step, *logged, _ = checkpoint["progress"]
        other = differences(path.parent, folder)
        said = ", ".join(other) or "nothing, it goes on"
        print(f"starts from {path.parent.name} at step {step:,}; other: {said}")
        if other:  # the rows are another run's
            logged = [], []
            checkpoint["recent_episodes"] = []
        checkpoint["progress"] = step, *logged, []
    return checkpoint


def load_checkpoint(path, device="cpu"):
    try:
        return torch.load(path, weights_only=True, map_location=device)
    except Exception as error:  # any is possible here
        cause = "it is damaged, or has more than tensors and Python's own types"
        sys.exit(f"error: {path} can't be read: {cause}: {error!r:.200}")


@contextmanager
def atomic_write(path):
    """Yields the path of a temporary file that then replaces `path`: no file is half written."""
    temporary = path.with_name(path.name + ".tmp")
    yield temporary
    with open(temporary, "rb+") as file:  # Windows syncs only what can be written
        os.fsync(file.fileno())
    os.replace(temporary, path)


class Failed(SystemExit):
    """Ends a run by a sentence, which reports have, too."""


@contextmanager
def failure_noted(folder):
    """Leaves failed.txt, for reports, if training ends by an error that may be the method's."""
    failed = folder / "failed.txt"
    failed.unlink(missing_ok=True)
    try:
        yield
    except (OSError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise  # these say nothing of it
    except (Exception, Failed) as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        if not re.search("allocate memory|CUDA error|[Cc]onnection", text):  # nor do these
            with atomic_write(failed) as path:
                path.write_text(f"{text}\n", "utf-8", "backslashreplace")
        raise


def begin_session(args, digests, folder):
    """Adds a line to the run's sessions.jsonl, with what is needed to reproduce it, and copies this
    script into its folder."""
    versions = {"torch": torch.__version__}  # with its kind of build
    for package in distributions():
        versions.setdefault(str(package.name), package.version)  # of two, Python imports the first
    session = {
        "script": SCRIPT.name,
        "args": vars(args),
        "command": sys.argv,
        "files": digests,
        "directory": SCRIPT.parent,
        "path": sys.path,
        "working_directory": START,
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "versions": versions,
        "platform": platform.platform(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    path = folder / "sessions.jsonl"
    earlier = path.read_text() if path.exists() else ""
    with atomic_write(path) as temporary:
        temporary.write_text(earlier + json.dumps(session, default=str) + "\n")
    with atomic_write(folder / SCRIPT.name) as temporary:
        temporary.write_bytes(SOURCE)


def main():
    args = tyro.cli(Args)
    with suppress(AttributeError):  # of a notebook's stdout, which has all letters
        sys.stdout.reconfigure(errors="backslashreplace")  # for letters that a terminal lacks
    try:
        digests = file_digests() | start_digest(args)
        folder = run_folder(args, digests)
        summary_path = folder / "summary.json"
        try:
            lock = FileLock(folder / "lock", blocking=False).acquire()  # makes the folder, too
        except OSError as error:
            sys.exit(f"error: another process is at work on {folder}, or locking fails: {error}")
        with lock:
            if not summary_path.exists():
                begin_session(args, digests, folder)
                with failure_noted(folder):
                    train(args, folder)
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command continues from its last checkpoint, if any")
    summary = json.loads(summary_path.read_text())
    score = f"return {summary['return_mean']:.1f}, {summary['sps']:,.0f} steps/s"
    name = f"{args.runs_dir}/{folder.name}"  # as it was typed
    print(f"{name}: {score}; to play it: python enjoy.py {name}")


if __name__ == "__main__":
    main()
