# SPDX-FileCopyrightText: 2026 The symmetric-rl-loss authors
# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10,<3.15"
# dependencies = ["torch>=2.11", "gymnasium>=1.2.3", "ale-py>=0.11.1", "numpy>=2.0",
#   "tyro>=1.0.16", "filelock>=3.24", "safetensors>=0.4.5", "tensorboard>=2.19", "tqdm>=4.66.5"]
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

SPPO differs from PPO in two lines, those with `reverse_loss = ` and `beta * reverse_loss`. The
gradient of Lr is |Z| times that of L, so SPPO's policy gradient is (alpha + beta |Z|) times PPO's.
That raises its weight relative to the value loss and the entropy bonus, and makes gradient clipping
more frequent.
"""

import csv
import ctypes
import difflib
import hashlib
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # torch's idle threads leave cores to the games

import ale_py
import gymnasium as gym
import numpy as np
import safetensors.torch
import torch
import tyro
from ale_py.vector_env import AtariVectorEnv
from filelock import FileLock, Timeout
from torch import nn
from torch.distributions import Categorical
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

gym.register_envs(ale_py)


@dataclass
class Args:
    # Run
    env_id: str = "Breakout"  # a game: the NAME of Gymnasium's ALE/NAME-v5
    total_timesteps: int = 5_000_000  # steps (4 frames each) summed over games, in whole rollouts
    seed: int = 1  # of all random numbers (the authors' runs: 10000, 10001, ...)
    exp_name: str | None = None  # name of the method in reports; default: the algorithm
    run_name: str | None = None  # folder of the run; default: main settings and a hash of all
    runs_dir: str = "runs"  # folder of all runs
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU, where there is one
    amp: Literal["auto", "off"] = "auto"  # auto: bfloat16 where the hardware has it; off: float32
    compile: bool = True  # compile on a GPU; a CPU gains nothing by it, and never does
    checkpoint_freq: int = 31_250  # steps of each game between checkpoints; all begin anew
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
    noise: Literal["none", "flip", "normal", "uniform", "adv_flip"] = "none"  # adv_flip: advantages
    noise_level: float | None = None  # flip probability (default 0.1) or scale (default 0.05)

    # Evaluation
    evaluate: str | None = None  # folder of a run: play its agent instead of training
    eval_freq: int | None = None  # steps between evaluations; default: total / 20
    eval_episodes: int = 10  # games per evaluation: sampled actions, raw scores without noise
    capture_video: bool = False  # record the first game of each evaluation (pip install moviepy)

    def __post_init__(self):
        if self.alpha is None:
            self.alpha = 0.5 if self.beta else 1.0
        if self.noise_level is None:
            levels = {"none": 0.0, "normal": 0.05, "uniform": 0.05}
            self.noise_level = levels.get(self.noise, 0.1)
        if self.eval_freq is None:
            self.eval_freq = max(1, self.total_timesteps // 20)
        self.env_id = self.env_id.removesuffix("NoFrameskip-v4")  # the same, with another name
        if self.exp_name is None:
            self.exp_name = "sppo" if self.beta else "ppo"
        self.check()
        if self.run_name is None:  # the same command has the same folder, so it continues there
            digest = hashlib.sha256(json.dumps(self.identity()).encode()).hexdigest()[:8]
            self.run_name = f"{self.env_id}__{self.exp_name}__{self.noise}__{self.seed}__{digest}"

    def check(self):
        """Refuses what would run, but mean something else than it says. tyro prints the message."""

        def require(condition, message):
            if not condition:
                raise ValueError(message)

        counts = "num_envs num_steps num_minibatches update_epochs"
        counts += " total_timesteps eval_freq eval_episodes checkpoint_freq"
        for name in counts.split():
            require(getattr(self, name) >= 1, f"{name} must be at least 1")
        for name in "seed alpha beta noise_level learning_rate clip_coef vf_coef ent_coef".split():
            require(0 <= getattr(self, name) < math.inf, f"{name} must be finite and not negative")
        for name in "gamma gae_lambda repeat_action_probability".split():
            require(0 <= getattr(self, name) <= 1, f"{name} must be between 0 and 1")
        require(self.max_grad_norm > 0, "max_grad_norm must be positive; 1e9 turns clipping off")
        require(-math.inf < self.z < 0, "z stands for log 0: negative and finite")
        require(self.alpha + self.beta > 0, "with alpha and beta 0 nothing trains the policy")
        if self.noise.endswith("flip"):
            require(self.noise_level <= 1, "noise_level is the probability of a flip, so at most 1")
        require(self.noise != "none" or not self.noise_level, "noise_level needs a kind of noise")
        require(self.run_name not in ("", ".", ".."), "run_name must be the name of a folder")
        batch_size = self.num_envs * self.num_steps
        if batch_size % self.num_minibatches or batch_size == self.num_minibatches:
            raise ValueError(f"num_minibatches must divide {batch_size} steps into 2 or more each")
        games = [name[4:-3] for name in gym.registry if name.startswith("ALE/")]  # ALE/NAME-v5
        if self.env_id not in games:
            name = re.sub(r"^ALE/|(Deterministic|NoFrameskip)?-v\d$| ", "", self.env_id)
            (closest,) = difflib.get_close_matches(name, games, n=1, cutoff=0)
            sticky = "For sticky actions, as in v5, add --repeat-action-probability 0.25"
            raise ValueError(f"no game {self.env_id!r}; did you mean {closest}? {sticky}")
        require(not self.track or find_spec("wandb"), "track needs wandb: pip install wandb")
        require(not self.capture_video or find_spec("moviepy"), "for videos: pip install moviepy")

    def identity(self) -> dict:
        """What makes two runs the same: the script, and the arguments that may change results."""
        script = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
        others = "run_name runs_dir device compile track evaluate capture_video".split()
        kept = {name: value for name, value in vars(self).items() if name not in others}
        return json.loads(json.dumps({"script_sha256": script} | kept))  # tuples become lists

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.run_name.replace("/", "-").replace(":", "-")


class AtariGames:
    """Games in parallel, preprocessed as in DeepMind's DQN, each reset as soon as it ends.

    A step repeats an action for four frames. Observations are grey 84 x 84 images, the maximum of
    the last two frames, stacked over the last four steps. A game starts with FIRE (if it has that
    action) and no-ops, together fewer than 30 frames, and is truncated after 108,000 frames. For
    the learner a lost life ends the episode, but the game continues. The next action is FIRE,
    whatever the agent chose, since many games wait for it.
    """

    def __init__(self, args, num_games, max_frames=108_000):
        num_threads = torch.get_num_threads()
        on_gpu = args.device != "cpu" and torch.cuda.is_available()
        if on_gpu and hasattr(os, "sched_getaffinity"):  # where torch leaves all cores to the games
            cores = len(os.sched_getaffinity(0))
            num_threads = int(os.environ.get("OMP_NUM_THREADS", cores))
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


def perturb_advantage(advantage, level, generator):
    """Advantages of any shape, the sign of each flipped with probability `level`."""
    uniform = torch.rand(advantage.shape, generator=generator)
    flipped = (uniform < level).to(advantage.device)
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
        device = next(self.parameters()).device
        return torch.autocast(device.type, torch.bfloat16, enabled=enabled)

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


def sample_gumbel(shape, generator):
    """Gumbel-max trick: the arg max of logits + these is a sample, faster than Categorical's."""
    exponential = torch.empty(shape).exponential_(generator=generator)
    return -exponential.log()


def symmetric_policy_losses(log_prob, old_log_prob, advantage, clip_coef, z):
    """PPO loss L and reverse PPO loss Lr, scalars to minimise as alpha L + beta Lr.

    Tensors (batch,): `log_prob`, `old_log_prob`: log pi(a|s) of the action taken, under the
    current policy and under the one that sampled it; `advantage`: its advantage. Numbers:
    `clip_coef`: PPO's epsilon; `z` < 0.

    (1 - p) / p_old = 1 / p_old - r; its first term is constant, huge for unlikely actions, and left
    out of the returned Lr, which therefore has the paper's gradient but not its value.
    """
    ratio = (log_prob - old_log_prob).exp()
    surrogate = advantage * ratio
    clipped = advantage * ratio.clamp(1 - clip_coef, 1 + clip_coef)
    unclipped = surrogate <= clipped  # m: where PPO's gradient flows
    policy_loss = -torch.where(unclipped, surrogate, clipped).mean()
    reverse_loss = torch.where(unclipped, z * surrogate, 0.0).mean()  # all that SPPO adds to PPO
    return policy_loss, reverse_loss


def compute_gae(reward, value, final_value, terminated, truncated, gamma, gae_lambda):
    """Advantages and returns (T, N) by generalised advantage estimation (Schulman et al., arXiv
    1506.02438).

    Arrays of T steps in N environments: `reward`, `terminated`, `truncated` (T, N); `value`
    (T + 1, N) of the observations before each step and after the last; `final_value` (T, N) of
    truncated episodes' final observations, from which they bootstrap.
    """
    if value[1:].shape != reward.shape:  # they would broadcast
        raise ValueError(f"value must be (T + 1, N), not {value.shape}, for reward {reward.shape}")
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
    policy_loss, reverse_loss = symmetric_policy_losses(
        log_prob, old_log_prob, weighted, clip_coef, args.z
    )
    value_loss = (value.view_as(returns) - returns).square().mean()
    entropy = (weight * policy.entropy()).mean()
    loss = args.alpha * policy_loss + args.beta * reverse_loss
    loss = loss + args.vf_coef * value_loss - args.ent_coef * entropy
    # Instead of backward() and clip_grad_norm_, so that torch.compile makes a single graph
    trained = [parameter for parameter in agent.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, trained, materialize_grads=True)  # 0 for unused ones
    gradient = torch.cat([g.flatten() for g in gradients])
    grad_norm = gradient.norm()
    scale = (args.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1)
    sign_changes = weight * ((normalized > 0) != (advantage > 0))
    log_ratio = (log_prob - old_log_prob).detach()
    kl = log_ratio.exp() - 1 - log_ratio  # joschu.net/blog/kl-approx.html
    clipped = (log_ratio.exp() - 1).abs() > clip_coef
    metrics = {
        "policy_loss": policy_loss.detach(),
        "reverse_loss": reverse_loss.detach(),
        "value_loss": value_loss.detach(),
        "entropy": entropy.detach(),
        "grad_norm": grad_norm,  # before clipping
        "clipped_gradients": (grad_norm > args.max_grad_norm).float(),
        "norm_sign_changes": sign_changes.mean(),
        "approx_kl": (weight * kl).mean(),
        "clipfrac": (weight * clipped).mean(),
    }
    return scale * gradient, metrics


def train(args: Args):
    keep_freed_memory()
    generator = torch.manual_seed(args.seed)  # initial weights, actions, minibatches, adv_flip
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.device != "auto":
        device = torch.device(args.device)
    torch.backends.cudnn.allow_tf32 = args.amp == "auto"  # --amp off: full float32
    rng = np.random.default_rng([args.seed, 1])  # reward noise
    envs = AtariGames(args, args.num_envs)
    bfloat16 = args.amp == "auto" and has_bfloat16(device)
    agent = Agent(envs.num_actions, args.layer_norm, bfloat16).to(device)
    # An optimizer updates a single tensor faster than many: all that is trained becomes views of
    # one vector, and its gradients views of the vector's
    trained = [p for p in agent.parameters() if p.requires_grad]
    parameters = nn.utils.parameters_to_vector(trained).detach()
    nn.utils.vector_to_parameters(parameters, trained)
    parameters.grad = torch.zeros_like(parameters)
    for p, gradient in zip(trained, parameters.grad.split([p.numel() for p in trained])):
        p.grad = gradient.view_as(p)
    optimizer = torch.optim.Adam([parameters], lr=args.learning_rate, eps=args.adam_eps, fused=True)
    check_copy(agent, parameters, optimizer)

    global_step = 0
    seconds = 0.0  # without start-up, evaluations and checkpoints
    evaluations = []  # rows of progress.csv
    history = {}  # what was logged since the last evaluation, a list by name
    checkpoint_path = args.run_dir / "checkpoint.pt"
    if checkpoint_path.exists():
        checkpoint = torch.load(checkpoint_path, weights_only=True, map_location="cpu")
        agent.load_state_dict(checkpoint["agent"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        envs.recent_episodes.extend(checkpoint["recent_episodes"])
        generator.set_state(checkpoint["generator"])
        rng.bit_generator.state = checkpoint["rng"]
        global_step = checkpoint["global_step"]
        seconds = checkpoint["seconds"]
        evaluations = checkpoint["evaluations"]
        history = checkpoint["history"]
    if args.track:
        import wandb

        options = {"project": "symmetric-rl", "sync_tensorboard": True}
        options["resume"] = "auto"  # one id per `dir`, also when the run is continued
        wandb.init(name=args.run_name, dir=args.run_dir, config=vars(args), **options)
    writer = SummaryWriter(args.run_dir, purge_step=global_step + 1)
    writer.add_text("hyperparameters", f"```\n{json.dumps(vars(args), indent=2)}\n```")

    T, N = args.num_steps, args.num_envs
    obs = torch.zeros((T + 1, N, 84, 84, 4), dtype=torch.uint8, device=device)
    obs = obs.permute(0, 1, 4, 2, 3)  # channels last in memory
    logits = torch.zeros(T, N, envs.num_actions, device=device)
    value = torch.zeros(T + 1, N, device=device)
    action = torch.zeros(T, N, dtype=torch.int64, device=device)
    reward = np.zeros((T, N))
    terminated = np.zeros((T, N), bool)
    truncated = np.zeros((T, N), bool)
    overridden = np.zeros((T, N), bool)  # FIRE replaced the agent's action
    final_value = np.zeros((T, N))  # of truncated games' final images
    obs[T] = torch.from_numpy(envs.reset([args.seed, global_step]))
    bar = tqdm(total=args.total_timesteps, initial=global_step, unit=" steps", disable=None)
    agent_fn = agent
    gradient_fn = gradient_and_metrics
    if args.compile and device.type == "cuda":
        agent_fn, gradient_fn = compiled(agent, args, obs)

    while global_step < args.total_timesteps:
        # Rollout
        started = time.perf_counter()
        remaining = 1 - global_step / args.total_timesteps
        clip_coef = torch.tensor(args.clip_coef, device=device)  # a number would be compiled in
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = args.learning_rate * remaining
        if args.anneal_clip:
            clip_coef = torch.tensor(args.clip_coef * remaining, device=device)
        obs[0] = obs[T]
        gumbel = sample_gumbel((T, N, envs.num_actions), generator).to(device)
        with torch.no_grad(), agent.autocast():  # uncompiled, casts most weights only once
            for t in range(T):
                logits[t], value[t] = agent_fn(obs[t])
                action[t] = (logits[t] + gumbel[t]).argmax(-1)
                step = envs.step(action[t].cpu().numpy())
                images, reward[t], terminated[t], truncated[t], overridden[t], final_images = step
                obs[t + 1] = torch.from_numpy(images)
                for i, one_images in final_images.items():
                    _, one_value = agent(torch.from_numpy(one_images[None]).to(device))
                    final_value[t, i] = one_value.item()
            _, value[T] = agent_fn(obs[T])
        global_step += T * N
        bar.update(T * N)

        # Advantages. `b_` names are of the whole batch (T * N, ...)
        b_obs = obs[:T].flatten(0, 1)
        b_action = action.flatten()
        policy = Categorical(logits=logits, validate_args=False)
        b_log_prob = policy.log_prob(action).flatten()
        noisy_reward = perturb_reward(reward, args.noise, args.noise_level, rng)
        values = value.cpu().numpy()
        advantage, returns = compute_gae(
            noisy_reward, values, final_value, terminated, truncated, args.gamma, args.gae_lambda
        )
        b_advantage = torch.from_numpy(advantage).float().to(device).flatten()
        b_returns = torch.from_numpy(returns).float().to(device).flatten()
        b_mask = torch.from_numpy(~overridden).float().to(device).flatten()

        # Update
        metrics = []
        for _ in range(args.update_epochs):
            epoch_advantage = b_advantage
            if args.noise == "adv_flip":
                epoch_advantage = perturb_advantage(b_advantage, args.noise_level, generator)
            batch = [b_obs, b_action, b_log_prob, epoch_advantage, b_returns, b_mask]
            order = torch.randperm(T * N, generator=generator).to(device)
            chunks = [tensor[order].chunk(args.num_minibatches) for tensor in batch]
            for minibatch in zip(*chunks):  # `mb_`: of a minibatch
                gradient, mb_metrics = gradient_fn(agent, args, clip_coef, *minibatch)
                parameters.grad.copy_(gradient)
                optimizer.step()
                # CUDA graphs overwrite their outputs
                metrics.append({name: x.clone() for name, x in mb_metrics.items()})
        if not parameters.isfinite().all():
            sys.exit(f"error: weights not finite at step {global_step}; lower the learning rate")
        if any(p.grad is None for p in trained):
            sys.exit("error: leave out zero_grad(), which drops the parameters' gradients")

        # Log
        scalars = {}
        for name in metrics[0]:
            scalars[f"losses/{name}"] = torch.stack([m[name] for m in metrics]).mean()
        # advantage = return - value
        unexplained = advantage[~overridden].var() / max(returns[~overridden].var(), 1e-8)
        scalars["losses/explained_variance"] = 1 - unexplained
        if envs.recent_episodes:  # means of the last 100
            episodic_return, episodic_length = np.mean(envs.recent_episodes, axis=0)
            scalars["charts/episodic_return"] = episodic_return
            scalars["charts/episodic_length"] = episodic_length
            bar.set_postfix_str(f"return {episodic_return:.1f}")
        for name, scalar in scalars.items():
            history.setdefault(name, []).append(float(scalar))
            writer.add_scalar(name, history[name][-1], global_step)
        seconds += time.perf_counter() - started
        writer.add_scalar("charts/SPS", global_step / seconds, global_step)

        # Evaluation and checkpoint
        finished = global_step >= args.total_timesteps
        if finished or global_step % args.eval_freq < T * N:  # passed a multiple
            video = args.run_dir / "video" / f"step-{global_step}.mp4"
            scores, lengths = evaluate(agent, args, args.seed + global_step, video)
            evaluation = {"return_mean": scores.mean(), "return_std": scores.std()}
            evaluation["length_mean"] = lengths.mean()
            evaluation |= {name: np.mean(logged) for name, logged in history.items()}
            history = {}
            evaluations.append({"step": global_step} | {k: float(x) for k, x in evaluation.items()})
            save_csv(args.run_dir / "progress.csv", evaluations)
            writer.add_scalar("eval/return_mean", evaluation["return_mean"], global_step)
            tqdm.write(f"step {global_step:,}: return {scores.mean():.1f}")
            with atomic_write(args.run_dir / "agent.safetensors") as path:
                tensors = {name: tensor.clone() for name, tensor in agent.state_dict().items()}
                path.write_bytes(safetensors.torch.save(tensors))
        if finished or global_step % (args.checkpoint_freq * N) < T * N:
            checkpoint = {
                "agent": agent.state_dict(),
                "optimizer": optimizer.state_dict(),
                "recent_episodes": list(envs.recent_episodes),
                "generator": generator.get_state(),
                "rng": rng.bit_generator.state,
                "global_step": global_step,
                "seconds": seconds,
                "evaluations": evaluations,
                "history": history,
            }
            with atomic_write(checkpoint_path) as path:
                torch.save(checkpoint, path)
            obs[T] = torch.from_numpy(envs.reset([args.seed, global_step]))  # as when continued

    writer.close()
    outcome = {"sps": global_step / seconds, "finished": True}
    save_json(args.run_dir / "summary.json", evaluations[-1] | outcome)  # last: marks the end


@torch.no_grad()
def evaluate(agent, args, seed, video):
    """Raw scores and lengths in steps (eval_episodes,) of whole games, played in parallel with
    sampled actions. `video`: path for a video of the first game, if `args.capture_video`."""
    device = next(agent.parameters()).device
    rng = np.random.default_rng([seed, 0, 2])  # training has [seed, step] and [seed, 1]
    generator = torch.Generator().manual_seed(rng.integers(2**31).item())
    games = AtariGames(args, args.eval_episodes)
    images = games.reset(rng.integers(2**31))
    results = {}
    frames = []
    while len(results) < args.eval_episodes:
        if args.capture_video and 0 not in results:
            grey = images[0, -1, :, :, None]
            frames.append(grey.repeat(3, axis=-1))
        logits, _ = agent(torch.from_numpy(images).to(device))
        gumbel = sample_gumbel(logits.shape, generator).to(device)
        images, *_ = games.step((logits + gumbel).argmax(-1).cpu().numpy())
        results = games.ended | results  # the first game of each
    if args.capture_video:  # enlarged, in real time: 15 steps a second
        video.parent.mkdir(exist_ok=True)
        from moviepy import ImageSequenceClip

        clip = ImageSequenceClip(frames, fps=15).resized(4)
        clip.write_videofile(str(video), logger=None)
    games_in_order = [results[i] for i in range(args.eval_episodes)]
    scores, lengths = np.array(games_in_order).T
    return scores, lengths


def evaluate_run(args: Args):
    """Prints the score of the latest agent of the run in the folder `args.evaluate`."""
    chosen = {name: getattr(args, name) for name in "seed eval_episodes capture_video".split()}
    if args != Args(evaluate=args.evaluate, **chosen):
        sys.exit("error: --evaluate takes only --seed, --eval-episodes and --capture-video")
    folder = Path(args.evaluate)
    if not (folder / "agent.safetensors").exists():
        sys.exit(f"error: --evaluate {args.evaluate!r}: not the folder of a run with an agent")
    begun = json.loads((folder / "args.json").read_text())
    if begun["args"].keys() != vars(args).keys():
        sys.exit(f"error: {folder} is of another script or version; use {folder}/{begun['script']}")
    if begun["identity"]["script_sha256"] != args.identity()["script_sha256"]:
        print(f"warning: edited; the run's copy is {folder}/{begun['script']}", file=sys.stderr)
    run = Args(**begun["args"] | chosen | {"track": False})
    bfloat16 = run.amp == "auto" and has_bfloat16(torch.device("cpu"))
    agent = Agent(AtariGames(run, 1).num_actions, run.layer_norm, bfloat16)
    agent.load_state_dict(safetensors.torch.load_file(folder / "agent.safetensors"))
    video = folder / "video" / f"evaluate-{run.seed}.mp4"
    scores, _ = evaluate(agent, run, run.seed, video)
    print(f"{folder}: return {scores.mean():.1f} (standard deviation {scores.std():.1f})")
    if run.capture_video:
        print(f"video: {video}")


# What follows is plumbing, not part of the algorithm.


def check_copy(agent, vector, *optimizers):
    """Refuses layers that differ between rollout and update, which would make the probabilities of
    the one meaningless in the other, and optimizers without the `vector` or some parameters."""
    for name, module in agent.named_modules():
        kinds = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)
        if isinstance(module, kinds) and module.training:
            sys.exit(f"error: {name} is {module}: probabilities would change from pass to pass")
    given = {p for one in optimizers for group in one.param_groups for p in group["params"]}
    trained = {name: p for name, p in agent.named_parameters() if p.requires_grad}
    left_out = [name for name, p in trained.items() if not {p, vector} & given]
    if left_out:
        sys.exit(f"error: the optimizer leaves out {', '.join(left_out)}")


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
    except Exception as error:  # any exception is possible here, without a C++ compiler for one
        tqdm.write(f"torch.compile failed, continuing without: {error!r:.200}", file=sys.stderr)
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


@contextmanager
def atomic_write(path):
    """Yields the path of a temporary file that then replaces `path`: no file is half written."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:  # Windows syncs only what can be written
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # a full disk; torch.save then raises the latter
        sys.exit(f"error: cannot write {path} ({error}): disk full? The same command continues")
    os.replace(temporary, path)


def save_csv(path, rows):
    with atomic_write(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[-1])  # the first row may have fewer columns
        writer.writeheader()
        writer.writerows(rows)


def save_json(path, content):
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2))


def provenance():
    """What one needs to repeat a run, besides its arguments."""
    script = Path(__file__).resolve()
    packages = "gymnasium ale-py numpy".split()
    commit = None
    if shutil.which("git"):
        command = ["git", "-C", script.parent, "describe", "--always", "--dirty", "--abbrev=40"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    return {
        "script": script.name,
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "commit": commit,
        "versions": {"torch": torch.__version__} | {name: version(name) for name in packages},
        "platform": platform.platform(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def begin(args: Args) -> bool:
    """Writes args.json and a copy of the script or, if they are there, checks that they are of the
    same run. Returns whether the run has still to be finished."""
    path = args.run_dir / "args.json"
    if not path.exists():
        with atomic_write(args.run_dir / Path(__file__).name) as copy:
            shutil.copyfile(__file__, copy)
        begun = {"args": vars(args), "identity": args.identity(), **provenance(), "continued": []}
        save_json(path, begun)
        return True
    begun = json.loads(path.read_text())
    for name, value in args.identity().items():
        before = begun["identity"].get(name)
        if before != value:
            difference = f"{name} {before!s:.20}, not {value!s:.20}"  # shortens hashes
            sys.exit(f"error: {args.run_dir} was begun with {difference}; give another --run-name")
    if (args.run_dir / "summary.json").exists():
        return False
    begun["continued"].append(provenance())
    save_json(path, begun)
    return True


def main():
    args = tyro.cli(Args)
    if args.evaluate is not None:
        evaluate_run(args)
        return
    args.run_dir.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(args.run_dir / "lock", blocking=False).acquire()
    except Timeout:
        sys.exit(f"error: another process is at work on this run, or delete {args.run_dir}/lock")
    except OSError as error:
        sys.exit(f"error: cannot lock {args.run_dir} ({error.strerror}); use another --runs-dir")
    try:
        with lock:
            if begin(args):
                train(args)
    except KeyboardInterrupt:
        step = 0
        if (args.run_dir / "checkpoint.pt").exists():
            step = torch.load(args.run_dir / "checkpoint.pt", "cpu", mmap=True)["global_step"]
        sys.exit(f"interrupted; the same command continues from step {step:,}")
    if args.capture_video and not (args.run_dir / "video").exists():
        print(f"already finished; for a video: --evaluate {args.run_dir} --capture-video")
    summary = json.loads((args.run_dir / "summary.json").read_text())
    score = f"return {summary['return_mean']:.1f} (standard deviation {summary['return_std']:.1f})"
    print(f"{args.run_dir}: {score}, {summary['sps']:,.0f} steps/s")


if __name__ == "__main__":
    main()
