# SPDX-FileCopyrightText: 2026 The symmetric-rl-loss authors
# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "gymnasium[mujoco,box2d]>=1.2.3", "ale-py>=0.11.1", "numpy>=2.0",
#   "tyro>=1.0", "typeguard>=4.3", "filelock>=3.16", "safetensors>=0.4.5", "tensorboard>=2.19",
#   "tqdm>=4.66.5"]
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

What SPPO adds to PPO is the block `if beta:` in `symmetric_policy_loss`. The gradient of Lr is |Z|
times that of L, so SPPO's policy gradient is (alpha + beta |Z|) times PPO's. That raises its weight
relative to the value loss and the entropy bonus, and makes gradient clipping more frequent.
"""

import ctypes
import difflib
import hashlib
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from importlib import import_module, metadata, util
from pathlib import Path
from typing import Literal

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # torch's idle threads leave cores to the games

import numpy as np
import safetensors.torch
import torch
import tyro
from ale_py import Action, roms
from ale_py.vector_env import AtariVectorEnv
from filelock import FileLock, Timeout
from torch import nn
from torch.distributions import Categorical
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from typeguard import check_type


@dataclass
class Args:
    # Run
    env_id: str = "Breakout"  # a game, also as ALE/Breakout-v5, but without v5's sticky actions
    total_timesteps: int = 5_000_000  # steps (4 frames each) summed over games, in whole rollouts
    seed: int = 1  # of all random numbers (the authors' runs: 10000, 10001, ...)
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU, where there is one
    amp: Literal["auto", "off"] = "auto"  # auto: bfloat16 where the hardware has it; off: float32
    compile: bool = torch.cuda.is_available()  # compile for the GPU; a CPU gains nothing by it
    runs_dir: str = "runs"  # folder of all runs
    run_name: str | None = None  # default: game, algorithm, noise, seed and time
    resume: str | None = None  # folder of an interrupted run to continue; takes no other flag
    evaluate: str | None = None  # folder of a run to evaluate, without training it
    checkpoint_freq: int | None = None  # steps between checkpoints; default: total / 20; 0: at end
    log_freq: int = 1000  # steps between entries in the log
    track: bool = False  # log to Weights & Biases as well (pip install wandb)

    # Algorithm
    repeat_action_probability: float = 0.0  # sticky actions: probability of a repeat; v5: 0.25
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
    layer_norm: bool = False  # layer normalisation before each activation

    # Symmetric loss, and noise on clipped rewards
    alpha: float | None = None  # weight of the PPO loss; default: 0.5, or 1 if beta is 0
    beta: float = 1.0  # weight of the reverse loss; 0: PPO
    z: float = -1.0  # Z, which stands for log 0
    divide_by_p_old: bool = True  # as in the paper; without the division: our bounded variant
    noise: Literal["none", "flip", "normal", "uniform", "adv_flip"] = "none"  # adv_flip: advantages
    noise_level: float | None = None  # flip probability (default 0.1) or scale (default 0.05)
    correct_flips: bool = False  # make flipped rewards unbiased, given the noise level

    # Evaluation
    eval_freq: int | None = None  # steps between evaluations; default: total / 20; 0: at the end
    eval_episodes: int = 10  # games per evaluation: sampled actions, raw scores without noise
    capture_video: bool = False  # record the first game of each evaluation (pip install moviepy)

    @property
    def algo(self) -> str:
        return "sppo" if self.beta else "ppo"

    @property
    def run_dir(self) -> Path:
        return Path(self.resume or Path(self.runs_dir) / self.run_name)


class AtariGames:
    """Games in parallel, preprocessed as in DeepMind's DQN, each reset as soon as it ends.

    A step repeats an action for four frames. Observations are grey 84 x 84 images, the maximum of
    the last two frames, stacked over the last four steps. A game starts with FIRE (if it has that
    action) and no-ops, together fewer than 30 frames, and is truncated after 108,000 frames. For
    the learner a lost life ends the episode, but the game continues. The next action is FIRE,
    whatever the agent chose, since many games wait for it.
    """

    def __init__(self, args, num_games, max_frames=108_000):
        self.envs = AtariVectorEnv(
            rom_name(args.env_id),
            num_games,
            num_threads=min(num_games, torch.get_num_threads()),
            autoreset_mode="SameStep",
            reward_clipping=False,  # done by `step`, which also counts lives
            repeat_action_probability=args.repeat_action_probability,
            max_num_frames_per_episode=max_frames,
        )
        actions = self.envs.ale.get_action_set()
        self.num_actions = len(actions)
        self.fire = actions.index(Action.FIRE) if Action.FIRE in actions else None
        self.life_lost = np.zeros(num_games, bool)
        self.score = np.zeros(num_games)
        self.length = np.zeros(num_games)
        self.recent_episodes = deque(maxlen=100)  # (raw score, steps) of the last games

    def reset(self, seed):
        """Starts all games. Returns images (num_games, 4, 84, 84), uint8."""
        images, info = self.envs.reset(seed=seed)
        self.lives = info["lives"]
        return images

    def step(self, action):
        """Steps all games by `action` (num_games,). Returns images (num_games, 4, 84, 84), rewards
        clipped to -1, 0 or 1, terminated (a life or the game was lost), truncated, overridden (FIRE
        replaced the action), and {index: final images} of truncated games.

        `self.ended` is then {index: (raw score, steps)} of the games that ended in this step."""
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

        self.ended = {}
        final_images = {}
        for i in np.flatnonzero(over):
            self.ended[i] = (self.score[i].item(), self.length[i].item())
            self.recent_episodes.append(self.ended[i])
            self.score[i] = 0
            self.length[i] = 0
            if not terminated[i]:
                final_images[i] = info["final_obs"][i]
        terminated = terminated | self.life_lost
        return images, np.sign(reward), terminated, truncated, overridden, final_images


def perturb_reward(reward, noise, level, rng):
    """Rewards of any shape with noise: flip replaces r by 1 - r with probability `level`, normal
    adds N(0, level^2), uniform adds U(-level, level); other kinds leave rewards unchanged."""
    if noise == "flip":
        flipped = rng.random(reward.shape) < level
        return np.where(flipped, 1 - reward, reward)
    if noise == "normal":
        return reward + rng.normal(0, level, reward.shape)
    if noise == "uniform":
        return reward + rng.uniform(-level, level, reward.shape)
    return reward


def correct_flips(reward, level):
    """Unbiased rewards, given flips r -> 1 - r with probability `level` < 1/2: the mean of a noisy
    reward is (1 - 2 level) r + level. After Wang et al., AAAI 2020, "Reinforcement Learning with
    Perturbed Rewards"."""
    return (reward - level) / (1 - 2 * level)


def perturb_advantage(advantage, level, generator):
    """Advantages of any shape, the sign of each flipped with probability `level`."""
    uniform = torch.rand(advantage.shape, generator=generator, device=generator.device)
    flipped = uniform.to(advantage.device) < level
    return torch.where(flipped, -advantage, advantage)


class Agent(nn.Module):
    """Actor and critic on one convolutional network, that of DQN (Mnih et al., Nature 2015)."""

    def __init__(self, num_actions, layer_norm=False, bfloat16=False):
        super().__init__()
        self.dtype = torch.bfloat16 if bfloat16 else torch.float32  # both exact for 0, ..., 255

        def norm(channels):
            return nn.GroupNorm(1, channels) if layer_norm else nn.Identity()

        self.conv = nn.Conv2d(4, 32, 8, stride=4)
        self.trunk = nn.Sequential(
            norm(32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 4, stride=2),
            norm(64),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3),
            norm(64),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * 7 * 7, 512),
            norm(512),
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
        return torch.autocast(self.conv.weight.device.type, torch.bfloat16, enabled=enabled)

    def forward(self, images):
        """Logits (batch, num_actions) and values (batch,) of images (batch, 4, 84, 84), uint8."""
        x = images.to(self.dtype, memory_format=torch.channels_last)
        with self.autocast():
            # scaling the weights by 1 / 255 is cheaper than scaling the images
            x = torch.conv2d(x, self.conv.weight / 255, self.conv.bias, stride=4)
            x = self.trunk(x)
        with self.autocast(enabled=False):  # the loss must not see rounded probabilities
            x = x.to(self.actor.weight.dtype)
            return self.actor(x), self.critic(x).squeeze(-1)


def sample(logits, generator):
    """Actions (...) from logits (..., num_actions): Gumbel-max, faster than Categorical.sample."""
    exponential = torch.empty_like(logits).exponential_(generator=generator)
    return (logits - exponential.log()).argmax(-1)


@torch.no_grad()
def evaluate(agent, args, seed, video, stop):
    """Raw scores and lengths in steps, (eval_episodes,) each, of whole games played in parallel
    with sampled actions. `video`: path of a video of the first game, or None. Returns
    None if `stop` came first."""
    device = agent.conv.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    games = AtariGames(args, args.eval_episodes)
    images = games.reset(seed)
    results = {}
    frames = []
    while len(results) < args.eval_episodes:
        if stop.is_set():
            return None
        if video and 0 not in results:
            grey = images[0, -1, :, :, None]
            frames.append(grey.repeat(3, axis=-1))
        logits, _ = agent(torch.from_numpy(images).to(device))
        images, *_ = games.step(sample(logits, generator).cpu().numpy())
        results = games.ended | results  # the first game of each
    if video:  # enlarged, in real time: 15 steps a second
        video.parent.mkdir(exist_ok=True)
        clip = import_module("moviepy").ImageSequenceClip(frames, fps=15).resized(4)
        clip.write_videofile(str(video), logger=None)
    scores, lengths = zip(*(results[i] for i in range(args.eval_episodes)))
    return np.array(scores), np.array(lengths)


def symmetric_policy_loss(
    log_prob, old_log_prob, advantage, clip_coef, alpha, beta, z, divide_by_p_old=True
):
    """alpha * PPO loss + beta * reverse PPO loss, a scalar to minimise (arXiv 2405.17618).

    Tensors (batch,): `log_prob`, `old_log_prob`: log pi(a|s) of the joint action taken, under the
    current policy and under the one that sampled it; `advantage`: its advantage. Numbers:
    `clip_coef`: PPO's epsilon; `alpha`, `beta` >= 0; `z` < 0.

    (1 - p) / p_old is computed as 1 / p_old - r. The term 1 / p_old has no gradient, but is huge
    for unlikely actions, and inf in float32 where log p_old < -88. Judge this loss by its gradient,
    not its value.

    If `divide_by_p_old` is false (our variant, not in the paper), the reverse loss is bounded and
    gives likely actions more weight: where m is 1, the gradient of the symmetric loss is
    alpha + beta |z| p_old times PPO's, instead of alpha + beta |z| times.
    """
    ratio = (log_prob - old_log_prob).exp()
    surrogate = advantage * ratio
    clipped = advantage * ratio.clamp(1 - clip_coef, 1 + clip_coef)
    unclipped = surrogate <= clipped  # m: where PPO's gradient flows
    objective = alpha * torch.where(unclipped, surrogate, clipped)
    if beta:  # all that symmetric PPO adds to PPO
        if divide_by_p_old:
            reverse = advantage * z * ((-old_log_prob).exp() - ratio)
        else:
            reverse = advantage * z * (1 - log_prob.exp())
        objective = objective + beta * torch.where(unclipped, reverse, 0.0)
    return -objective.mean()


def compute_gae(reward, value, final_value, terminated, truncated, gamma, gae_lambda):
    """Advantages and returns (T, N) by generalised advantage estimation (Schulman et al., arXiv
    1506.02438).

    Arrays of T steps in N environments: `reward`, `terminated`, `truncated` (T, N); `value`
    (T + 1, N) of the observations before each step and after the last; `final_value` (T, N) of
    truncated episodes' final observations, from which they bootstrap.
    """
    next_value = np.where(truncated, final_value, value[1:])
    next_value = np.where(terminated, 0.0, next_value)
    delta = reward + gamma * next_value - value[:-1]
    decay = np.where(terminated | truncated, 0.0, gamma * gae_lambda)
    advantage = np.zeros_like(delta)
    last_gae_lam = 0.0
    for t in reversed(range(len(delta))):
        last_gae_lam = delta[t] + decay[t] * last_gae_lam
        advantage[t] = last_gae_lam
    return advantage, advantage + value[:-1]


def gradient_and_metrics(
    agent, args, clip_coef, obs, action, old_log_prob, advantage, returns, mask
):
    """Clipped gradient of the loss on a minibatch, as one vector, and metrics. `mask` is 0 where
    FIRE replaced the agent's action: such a step trains only the critic. Elsewhere it is 1."""
    count = mask.sum().clamp(min=1)  # a divisor, so not 0
    weight = mask / count * len(mask)  # mean(weight * x) is the mean of x where mask is 1
    normalized = advantage
    if args.norm_adv:
        mean = (mask * advantage).sum() / count
        variance = (mask * (advantage - mean)).square().sum() / (count - 1).clamp(min=1)
        normalized = (advantage - mean) / (variance.sqrt() + 1e-8)
    weighted = weight * normalized  # weight 0 removes a step from the policy loss
    logits, value = agent(obs)
    policy = Categorical(logits=logits, validate_args=False)
    log_prob = policy.log_prob(action)
    symmetric_loss = symmetric_policy_loss(
        log_prob,
        old_log_prob,
        weighted,
        clip_coef,
        args.alpha,
        args.beta,
        args.z,
        args.divide_by_p_old,
    )
    value_loss = (value - returns).square().mean()
    entropy = (weight * policy.entropy()).mean()
    loss = symmetric_loss + args.vf_coef * value_loss - args.ent_coef * entropy
    # Instead of backward() and clip_grad_norm_, so that torch.compile makes a single graph
    gradients = torch.autograd.grad(loss, list(agent.parameters()))
    gradient = torch.cat([g.flatten() for g in gradients])
    grad_norm = gradient.norm()
    scale = (args.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1)
    with torch.no_grad():
        # For logging: the two losses of symmetric_policy_loss, without alpha and beta
        log_ratio = log_prob - old_log_prob
        ratio = log_ratio.exp()
        surrogate = weighted * ratio
        clipped = weighted * ratio.clamp(1 - clip_coef, 1 + clip_coef)
        # The part of the reverse loss that has a gradient: m A Z r or, undivided, m A Z p
        reverse = args.z * torch.where(surrogate <= clipped, surrogate, 0.0)
        if not args.divide_by_p_old:
            reverse = reverse * old_log_prob.exp()
        sign_flips = weight * ((normalized > 0) != (advantage > 0))
        kl = ratio - 1 - log_ratio  # joschu.net/blog/kl-approx.html
        metrics = {
            "policy_loss": -torch.minimum(surrogate, clipped).mean(),
            "reverse_loss": reverse.mean(),
            "value_loss": value_loss.detach(),
            "entropy": entropy.detach(),
            "grad_norm": grad_norm,  # before clipping
            "clipped_gradients": (grad_norm > args.max_grad_norm).float(),
            "advantage_sign_flips": sign_flips.mean(),  # due to normalisation
            "approx_kl": (weight * kl).mean(),
            "clipfrac": (weight * ((ratio - 1).abs() > clip_coef)).mean(),
        }
    return scale * gradient, metrics


def train(args: Args, stop: threading.Event) -> dict | None:
    """Trains with arguments from `prepare`. Returns the content of summary.json, or None if
    interrupted through `stop`. Raises RunError if the run can't continue, UsageError if its
    checkpoint is damaged, OSError if a file can't be written."""
    started = time.perf_counter()
    keep_freed_memory()
    torch.manual_seed(args.seed)
    cuda = args.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    torch.backends.cudnn.allow_tf32 = args.amp == "auto"  # --amp off: full float32
    generator = torch.Generator(device).manual_seed(args.seed)  # actions, minibatches, adv_flip
    # Noise on rewards, with random numbers of its own
    rng = np.random.default_rng([args.seed, 1])
    envs = AtariGames(args, args.num_envs)
    bfloat16 = args.amp == "auto" and has_bfloat16(device)
    agent = Agent(envs.num_actions, args.layer_norm, bfloat16).to(device)
    parameters = flatten_parameters(agent)
    optimizer = torch.optim.Adam([parameters], lr=args.learning_rate, eps=args.adam_eps, fused=True)
    global_step = 0
    evaluations = []  # rows of progress.csv
    train_seconds = 0.0
    checkpoint_path = args.run_dir / "checkpoint.pt"
    if checkpoint_path.is_file():
        with usable(checkpoint_path):
            checkpoint = load_checkpoint(checkpoint_path)
            agent.load_state_dict(checkpoint["agent"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            envs.recent_episodes.extend(checkpoint["finished_episodes"])
            saved_device = torch.device(checkpoint["device"])
            if saved_device.type == device.type:  # else the run moved to or from a GPU
                generator.set_state(checkpoint["generator"])
            rng.bit_generator.state = checkpoint["rng"]
            # `+=` so that a value of the wrong type raises here, inside `usable`
            global_step += checkpoint["global_step"]
            evaluations += map(dict, checkpoint["evaluations"])
            train_seconds += checkpoint["train_seconds"]
            started -= checkpoint["wall_seconds"]
    if args.track:
        with usable("--track"):
            start_tracking(args)
    writer = SummaryWriter(args.run_dir, purge_step=global_step + 1)
    writer.add_text("hyperparameters", f"```\n{json.dumps(vars(args), indent=2)}\n```")
    progress_bar = tqdm(
        total=args.total_timesteps, initial=global_step, unit=" steps", disable=None
    )

    T, N = args.num_steps, args.num_envs
    images_shape = (T + 1, N, 84, 84, 4)
    obs = torch.zeros(images_shape, dtype=torch.uint8, device=device)
    obs = obs.permute(0, 1, 4, 2, 3)  # channels last in memory
    logits = torch.zeros(T, N, envs.num_actions, device=device)
    value = torch.zeros(T + 1, N, device=device)
    action = torch.zeros(T, N, dtype=torch.int64, device=device)
    reward = np.zeros((T, N))
    terminated = np.zeros((T, N), bool)
    truncated = np.zeros((T, N), bool)
    overridden = np.zeros((T, N), bool)  # FIRE replaced the agent's action
    final_value = np.zeros((T, N))  # of truncated games' final images
    # Checkpoints hold no emulator state: a resumed run begins new games, too
    obs[T] = torch.from_numpy(envs.reset(args.seed + global_step))
    agent_fn = agent
    gradient_fn = gradient_and_metrics
    if args.compile:
        agent_fn, gradient_fn = compiled(agent, args, obs)
    metrics = []  # of all minibatches since the last entry in the log
    all_advantages = []  # of all rollouts since that entry
    all_returns = []

    first_step = global_step
    stopping = False
    while True:
        # Evaluation (also one that an interrupted run did not finish) and checkpoint
        finished = global_step >= args.total_timesteps
        evaluated = evaluations and evaluations[-1]["step"] == global_step
        evaluation_due = finished or due(args.eval_freq, global_step, T * N)
        if global_step > 0 and evaluation_due and not evaluated:
            video = None
            if args.capture_video:
                video = args.run_dir / "video" / f"step-{global_step}.mp4"
            result = evaluate(agent, args, args.seed + global_step, video, stop)
            if result is None:
                stopping = True
            else:
                scores, lengths = result
                evaluation = {
                    "step": global_step,
                    "return_mean": scores.mean().item(),
                    "return_std": scores.std().item(),
                    "length_mean": lengths.mean().item(),
                    "episodes": len(scores),
                }
                evaluations.append(evaluation)
                save_progress(args.run_dir / "progress.csv", evaluations)
                tqdm.write(f"step {global_step:,}: return {scores.mean():.1f}")
                writer.add_scalar("eval/return_mean", evaluation["return_mean"], global_step)
        checkpoint_due = global_step > first_step and due(args.checkpoint_freq, global_step, T * N)
        if finished or stopping or checkpoint_due:
            checkpoint = {
                "agent": agent.state_dict(),
                "optimizer": optimizer.state_dict(),
                "finished_episodes": list(envs.recent_episodes),
                "generator": generator.get_state(),
                "device": device.type,
                "rng": rng.bit_generator.state,
                "global_step": global_step,
                "evaluations": evaluations,
                "train_seconds": train_seconds,
                "wall_seconds": time.perf_counter() - started,
            }
            save(checkpoint_path, checkpoint)
        if finished or stopping:
            break

        # Rollout
        iteration_started = time.perf_counter()
        remaining = 1 - global_step / args.total_timesteps
        clip_coef = torch.tensor(args.clip_coef, device=device)  # a number would be compiled in
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = args.learning_rate * remaining
        if args.anneal_clip:
            clip_coef = torch.tensor(args.clip_coef * remaining, device=device)
        obs[0] = obs[T]
        with torch.no_grad(), agent.autocast():  # uncompiled, casts most weights only once
            for t in range(T):
                logits[t], value[t] = agent_fn(obs[t])
                action[t] = sample(logits[t], generator)
                step = envs.step(action[t].cpu().numpy())
                images, reward[t], terminated[t], truncated[t], overridden[t], final_images = step
                obs[t + 1] = torch.from_numpy(images)
                for i, last_images in final_images.items():
                    _, last_value = agent(torch.from_numpy(last_images[None]).to(device))
                    final_value[t, i] = last_value.item()
            _, value[T] = agent_fn(obs[T])
        global_step += T * N
        progress_bar.update(T * N)

        # Advantages
        b_obs = obs[:T].flatten(0, 1)
        b_action = action.flatten()
        policy = Categorical(logits=logits, validate_args=False)
        old_log_prob = policy.log_prob(action).flatten()
        noisy_reward = perturb_reward(reward, args.noise, args.noise_level, rng)
        if args.correct_flips:
            noisy_reward = correct_flips(noisy_reward, args.noise_level)
        advantage, returns = compute_gae(
            noisy_reward,
            value.cpu().numpy(),
            final_value,
            terminated,
            truncated,
            args.gamma,
            args.gae_lambda,
        )
        # For logging, without the steps on which FIRE replaced the action
        all_advantages.append(advantage[~overridden])
        all_returns.append(returns[~overridden])
        b_advantage = torch.tensor(advantage, dtype=torch.float32, device=device).flatten()
        b_returns = torch.tensor(returns, dtype=torch.float32, device=device).flatten()
        b_mask = torch.tensor(~overridden, dtype=torch.float32, device=device).flatten()

        # Update
        for _ in range(args.update_epochs):
            epoch_advantage = b_advantage
            if args.noise == "adv_flip":
                epoch_advantage = perturb_advantage(b_advantage, args.noise_level, generator)
            order = torch.randperm(T * N, generator=generator, device=device)
            for mb_inds in order.view(args.num_minibatches, -1):
                parameters.grad, mb_metrics = gradient_fn(
                    agent,
                    args,
                    clip_coef,
                    b_obs[mb_inds],
                    b_action[mb_inds],
                    old_log_prob[mb_inds],
                    epoch_advantage[mb_inds],
                    b_returns[mb_inds],
                    b_mask[mb_inds],
                )
                optimizer.step()
                # CUDA graphs overwrite their outputs
                metrics.append({name: x.clone() for name, x in mb_metrics.items()})
        if not parameters.isfinite().all():
            grad_norm = metrics[-1]["grad_norm"]
            raise RunError(
                f"weights not finite after the update at step {global_step}, where the gradient's"
                f" norm was {grad_norm:g}; lower --learning-rate or --beta in a new run"
            )

        # Logging, of all updates since the last entry
        finished = global_step >= args.total_timesteps
        stopping = stop.is_set()
        if finished or stopping or due(args.log_freq, global_step, T * N):
            scalars = {}
            for name in metrics[0]:
                scalars[f"losses/{name}"] = torch.stack([m[name] for m in metrics]).mean()
            residual = np.concatenate(all_advantages)
            variance = np.var(np.concatenate(all_returns))
            if variance > 0:
                scalars["losses/explained_variance"] = 1 - np.var(residual) / variance
            scalars["losses/advantage_largest"] = np.abs(residual).max(initial=0)
            seconds = train_seconds + time.perf_counter() - iteration_started
            scalars["charts/SPS"] = global_step / seconds
            scalars["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
            if envs.recent_episodes:  # means of the last 100
                episodic_return, episodic_length = np.mean(envs.recent_episodes, axis=0)
                scalars["charts/episodic_return"] = episodic_return
                scalars["charts/episodic_length"] = episodic_length
                progress_bar.set_postfix_str(f"return {episodic_return:.1f}")
            for name, scalar in scalars.items():
                writer.add_scalar(name, scalar, global_step)
            metrics = []
            all_advantages = []
            all_returns = []
        train_seconds += time.perf_counter() - iteration_started

    writer.close()
    if stopping:
        return None
    summary = {
        "script": Path(__file__).name,
        "algo": args.algo,
        **vars(args),
        "final_return_mean": evaluations[-1]["return_mean"],
        "final_return_std": evaluations[-1]["return_std"],
        "train_return_last100": np.mean(envs.recent_episodes, axis=0)[0]
        if envs.recent_episodes
        else None,
        "sps": global_step / train_seconds,
        "wall_s": time.perf_counter() - started,
        "compile": gradient_fn is not gradient_and_metrics,  # False if compiling failed
        "finished": True,
    }
    weights = safetensors.torch.save(agent.state_dict())
    save(args.run_dir / "agent.safetensors", weights)
    # Written last, since summary.json marks a run as finished
    save(args.run_dir / "summary.json", json.dumps(summary, indent=2))
    return summary


def evaluate_run(args: Args) -> None:
    """Plays the policy of the run in the folder `args.evaluate`, and prints its score."""
    run = evaluated_args(args, "seed", "eval_episodes", "capture_video")
    agent = Agent(AtariGames(run, 1).num_actions, run.layer_norm)
    with usable(run.run_dir / "checkpoint.pt"):
        checkpoint = load_checkpoint(run.run_dir / "checkpoint.pt")
        agent.load_state_dict(checkpoint["agent"])
    video = None
    if run.capture_video:
        video = run.run_dir / "video" / f"evaluate-{run.seed}.mp4"
    scores, _ = evaluate(agent, run, run.seed, video, threading.Event())
    print_score(run, checkpoint["global_step"], scores)


# What follows is plumbing, not part of the algorithm.


def due(every, step, stride):
    """Whether a multiple of `every` lies in the last `stride` steps; never if `every` is 0."""
    return every > 0 and step % every < stride


def flatten_parameters(agent):
    """Makes all parameters views of one vector, and returns it: the optimizer then updates one
    tensor instead of a dozen small ones."""
    parameters = nn.utils.parameters_to_vector(agent.parameters()).detach()
    nn.utils.vector_to_parameters(parameters, agent.parameters())
    return parameters


def compiled(agent, args, obs):
    """Compiles `agent` and `gradient_and_metrics`, on a GPU to CUDA graphs, by calls on zeros of
    the right shapes, before training is timed. Returns them uncompiled if that fails. `obs`
    (T + 1, N, 4, 84, 84)."""
    n = args.num_steps * args.num_envs // args.num_minibatches
    clip_coef = torch.tensor(args.clip_coef, device=obs.device)
    mb_obs = obs.flatten(0, 1)[:n]
    mb_action = torch.zeros(n, dtype=torch.int64, device=obs.device)
    zeros = torch.zeros(4, n, device=obs.device)
    mode = "reduce-overhead" if obs.is_cuda else "default"
    try:
        torch._dynamo.config.trace_autograd_ops = True  # one graph for the gradient and the loss
        agent_fn = torch.compile(agent, mode=mode, fullgraph=True)
        gradient_fn = torch.compile(gradient_and_metrics, mode=mode, fullgraph=True)
        for _ in range(3):  # CUDA graphs are recorded after a warm-up
            with torch.no_grad(), agent.autocast():
                agent_fn(obs[0])
            gradient_fn(agent, args, clip_coef, mb_obs, mb_action, *zeros)
        return agent_fn, gradient_fn
    except Exception as error:  # any exception is possible here
        warning = f"torch.compile failed, continuing with --no-compile: {error!r:.200}"
        tqdm.write(warning, file=sys.stderr)
        return agent, gradient_and_metrics


def has_bfloat16(device):
    """Whether this hardware computes in bfloat16 and does not merely emulate it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu.get_capabilities().get("avx512_bf16", False)


def keep_freed_memory():
    """Tells glibc to keep freed memory. By default it goes back to the system, and each 4 KiB
    costs a page fault when needed again: a quarter of the time of an update on a CPU."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX of malloc.h
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD


def rom_name(env_id):
    """A game's name in ale-py: ms_pacman for MsPacman, ALE/MsPacman-v5, ... Raises UsageError if
    there is no such game."""
    names = {}
    two_player = ("combat", "joust", "maze_craze", "warlords")  # these crash the emulator
    for name in roms.get_all_rom_ids():
        if name not in two_player:
            names[name.replace("_", "")] = name
    game = re.sub(r"^ALE/|(NoFrameskip|Deterministic)?(-v\d)?$", "", env_id)
    game = game.replace("_", "").lower()
    if game not in names:
        nearest = difflib.get_close_matches(game, names, n=4, cutoff=0.4)
        near = ", ".join(names[name] for name in nearest) or "none"
        raise UsageError(f"--env-id {env_id}: no such game; similar names: {near}")
    return names[game]


def start_tracking(args):
    """Mirrors TensorBoard to Weights & Biases."""
    import_module("wandb").init(
        project="symmetric-rl",
        id=args.run_name,
        name=args.run_name,
        config=vars(args),
        resume="allow",
        sync_tensorboard=True,
    )


def save_progress(path, evaluations):
    """Writes progress.csv; `evaluations`: dicts, all with the same keys."""
    lines = [",".join(evaluations[0])]
    for row in evaluations:
        lines.append(",".join(map(str, row.values())))
    save(path, "\n".join(lines) + "\n")


def save(path, content):
    """Writes text, bytes or, with torch.save, any object atomically: a temporary file, then a
    rename. Raises OSError."""
    temporary = path.with_name(path.name + ".tmp")
    if isinstance(content, str):
        temporary.write_text(content)
    elif isinstance(content, bytes):
        temporary.write_bytes(content)
    else:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # what PyTorch raises if the disk is full
            raise OSError(f"{temporary}: {error!r}") from error
    os.replace(temporary, path)


@contextmanager
def usable(what):
    """Turns any exception into a UsageError that names `what`: a run's file, or a flag."""
    try:
        yield
    except Exception as error:  # files and environments may raise anything
        raise UsageError(f"{what}: cannot be used: {error!r:.300}") from error


def load_checkpoint(path):
    """Loads a checkpoint, after a test of its checksums, which torch.load ignores."""
    require(zipfile.ZipFile(path).testzip() is None, "damaged")
    return torch.load(path, map_location="cpu", weights_only=True)


def git(*command):
    """What git prints in the script's folder; None without git or a repository."""
    folder = Path(__file__).resolve().parent
    if not shutil.which("git"):
        return None
    done = subprocess.run(["git", "-C", folder, *command], capture_output=True, text=True)
    return None if done.returncode else done.stdout.strip()


def describe_machine():
    """Command, script, commit, versions and hardware, to reproduce a run."""
    script = Path(__file__).resolve()
    versions = {package.name: package.version for package in metadata.distributions()}
    versions["python"] = platform.python_version()
    return {
        "command": sys.argv,
        "script_sha256": hashlib.sha256(script.read_bytes()).hexdigest(),
        "script_status": git("status", "--short", "--", script),  # "" if unchanged since the commit
        "commit": git("describe", "--always", "--dirty", "--abbrev=40"),
        "versions": versions,
        "hardware": {
            "platform": platform.platform(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "gpu": torch.cuda.is_available() and torch.cuda.get_device_name(),
        },
    }


class UsageError(ValueError):
    """Wrong input; the message says what is wrong and what to do."""


class RunError(RuntimeError):
    """A run that can't continue; the message says why."""


def require(condition, message):
    if not condition:
        raise UsageError(message)


def require_range(args, names, low, high):
    """Raises UsageError unless all arguments in `names` are between `low` and `high`."""
    for name in names.split():
        value = getattr(args, name)
        flag = f"--{name.replace('_', '-')} {value}"
        inside = low <= value <= high and value is not True  # `true` in args.json counts as 1
        require(inside, f"{flag}: must be between {low:g} and {high:g}")


def resumed_args(args: Args) -> Args:
    """The arguments of the interrupted run that `args.resume` names."""
    require(
        replace(args, resume=None) == Args(),
        "--resume reuses the flags in the args.json of the run: leave out all others",
    )
    folder = Path(args.resume)
    begun = os.path.isfile(folder / "args.json")
    finished = os.path.isfile(folder / "summary.json")
    require(begun and not finished, f"--resume {folder}: not the folder of an interrupted run")
    return saved_args(folder, resume=args.resume)


def saved_args(folder: Path, **given) -> Args:
    """The arguments in a run's args.json, overridden by `given`, and checked like flags."""
    path = folder / "args.json"
    with usable(path):
        saved = json.loads(path.read_text())["args"]
        names = {field.name for field in fields(Args)}
        require(saved.keys() == names, "a run of another script, or of another version of it")
        for field in fields(Args):
            if isinstance(saved[field.name], list):
                saved[field.name] = tuple(saved[field.name])
            check_type(saved[field.name], field.type)
        args = Args(**saved | given)
        check(args)
    return args


def evaluated_args(args: Args, *names: str) -> Args:
    """The arguments of the run in `args.evaluate`, overridden by the flags in `names`."""
    given = {name: getattr(args, name) for name in names}
    flags = ", ".join(f"--{name.replace('_', '-')}" for name in names)
    require(args == Args(evaluate=args.evaluate, **given), f"--evaluate takes only {flags}")
    check(with_defaults(args))
    # `resume` makes that folder the `run_dir`, wherever it was during training
    settings = {"resume": args.evaluate, "device": "cpu"} | given
    return saved_args(Path(args.evaluate), **settings)


def print_score(run, global_step, scores):
    """Prints the mean and its standard error."""
    # std(ddof=1) / sqrt(n), and 0 for a single episode
    error = scores.std() / max(1, len(scores) - 1) ** 0.5
    score = f"{scores.mean():.1f} ± {error:.1f} (mean and standard error of {len(scores)} episodes)"
    print(f"{run.run_dir}, {run.env_id} {run.algo} after {global_step:,} steps: return {score}")


def with_defaults(args: Args) -> Args:
    """A copy with the defaults that depend on other arguments filled in."""
    args = replace(args)
    args.env_id = rom_name(args.env_id).title().replace("_", "")  # one name for all spellings
    if args.alpha is None:
        args.alpha = 0.5 if args.beta else 1.0
    if args.noise_level is None:
        levels = {"none": 0.0, "normal": 0.05, "uniform": 0.05}
        args.noise_level = levels.get(args.noise, 0.1)
    twentieth = max(1, args.total_timesteps // 20)
    if args.eval_freq is None:
        args.eval_freq = twentieth
    if args.checkpoint_freq is None:
        args.checkpoint_freq = twentieth
    if args.run_name is None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        name = f"{args.env_id}__{args.algo}__{args.noise}__{args.seed}__{stamp}"
        args.run_name = f"{Path(__file__).stem}__{name}".replace("/", "-")
    return args


def check(args: Args) -> None:
    """Raises UsageError for an argument that is out of range or contradicts another."""
    rom_name(args.env_id)  # raises UsageError if there is no such game
    require_range(args, "num_steps num_minibatches log_freq", 1, 1e12)
    require_range(args, "num_envs eval_episodes update_epochs", 1, 1000)
    require_range(args, "total_timesteps", 1, 1e9)  # seed + step must be a valid emulator seed
    require_range(args, "seed", 0, 1e9)
    require_range(args, "eval_freq checkpoint_freq", 0, 1e18)
    require_range(args, "alpha beta vf_coef ent_coef", 0, 1e9)
    require_range(args, "learning_rate adam_eps clip_coef max_grad_norm", 1e-30, 1e12)
    require_range(args, "gamma gae_lambda noise_level repeat_action_probability", 0, 1)
    require_range(args, "z", -1e9, -1e-9)  # negative, since it stands for log 0
    batch_size = args.num_envs * args.num_steps
    require(batch_size <= 1_000_000, "--num-envs, --num-steps: more than 1,000,000 steps a rollout")
    require(
        batch_size % args.num_minibatches == 0 and batch_size > args.num_minibatches,
        f"--num-minibatches {args.num_minibatches}: must divide {batch_size}"
        " (environments x steps) into minibatches of 2 or more",
    )
    require(
        args.noise != "none" or not args.noise_level, "--noise-level: choose a kind with --noise"
    )
    if args.correct_flips:
        flips = args.noise == "flip" and args.noise_level < 0.5
        require(flips, "--correct-flips: needs --noise flip and a --noise-level below 0.5")
    require(
        args.device != "cuda" or torch.cuda.is_available(), "--device cuda: no GPU here; use cpu"
    )
    plain = Path(args.run_name).name == args.run_name and args.run_name.isprintable()
    require(
        plain and args.run_name not in ("", ".."),
        f"--run-name {args.run_name!r}: give the plain name of a folder",
    )
    require(args.runs_dir.isprintable(), f"--runs-dir {args.runs_dir!r}: not a printable name")
    require(
        not args.capture_video or util.find_spec("moviepy"), "--capture-video: pip install moviepy"
    )


def prepare(args: Args) -> Args:
    """Completes and checks arguments, and makes the run's folder. Raises UsageError."""
    if args.resume is not None:
        args = resumed_args(args)
    args = with_defaults(args)
    check(args)
    require(not args.track or util.find_spec("wandb"), "--track: pip install wandb")
    if not args.resume:
        make_run_dir(args)
    return args


def make_run_dir(args: Args) -> None:
    content = {"args": vars(args)} | describe_machine()
    try:
        args.run_dir.mkdir(parents=True)
    except OSError as error:
        advice = "try another --run-name or --runs-dir"
        raise UsageError(f"{args.run_dir}: {error.strerror}; {advice}") from error
    try:
        save(args.run_dir / "args.json", json.dumps(content, indent=2))
    except OSError as error:
        shutil.rmtree(args.run_dir)
        raise UsageError(f"{args.run_dir}: {error.strerror}") from error


def fail(message, status):
    # print would write into the progress bar, which is still there
    tqdm.write(" ".join(f"error: {message}".splitlines()), file=sys.stderr)
    sys.exit(status)


def main() -> None:
    try:
        args = tyro.cli(Args)
        if args.evaluate is not None:
            evaluate_run(args)
            return
        args = prepare(args)
    except UsageError as error:
        fail(error, 2)
    except (RunError, OSError) as error:  # from --evaluate
        fail(error, 1)
    stop = threading.Event()

    def request_stop(signum, frame):
        stop.set()
        signal.signal(signum, signal.SIG_DFL)  # a second signal kills

    signal.signal(signal.SIGINT, request_stop)
    signal.signal(signal.SIGTERM, request_stop)
    # No traceback from TensorBoard's thread: `writer` raises its error in the main thread
    threading.excepthook = lambda details: None
    resume = shlex.join(["python", sys.argv[0], "--resume", str(args.run_dir)])
    try:
        with FileLock(args.run_dir / "lock", blocking=False):
            summary = train(args, stop)
    except Timeout:
        fail(f"{args.run_dir}: another process is at work on this run", 2)
    except UsageError as error:
        fail(error, 2)
    except (RunError, OSError, torch.OutOfMemoryError) as error:
        fail(f"{error}; to continue from the last checkpoint: {resume}", 1)
    if summary is None:
        print(f"interrupted; to continue: {resume}", file=sys.stderr)
        sys.exit(130)
    print(
        f"{args.env_id} {args.algo}: return {summary['final_return_mean']:.1f} "
        f"(standard deviation {summary['final_return_std']:.1f}), "
        f"{summary['sps']:,.0f} steps/s, {args.run_dir}"
    )


if __name__ == "__main__":
    main()
