# SPDX-FileCopyrightText: 2026 The symmetric-rl-loss authors
# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "gymnasium[mujoco,box2d]>=1.2.3", "mujoco>=3.1.6", "numpy>=2.0",
#   "tyro>=1.0", "typeguard>=4.3", "filelock>=3.16", "safetensors>=0.4.5", "tensorboard>=2.19",
#   "tqdm>=4.66.5"]
# ///
"""Symmetric PPO (SPPO) for continuous control in one file.

    python sppo_continuous.py --env-id Hopper-v4                    # SPPO, 11 bins per dimension
    python sppo_continuous.py --env-id Hopper-v4 --noise normal     # the same with noisy rewards
    python sppo_continuous.py --env-id Hopper-v4 --policy gaussian  # PPO with a Gaussian policy
    python sppo_continuous.py --env-id Hopper-v4 --beta 0           # PPO with the same bins (DPPO)

From "Symmetric Reinforcement Learning Loss for Robust Learning on Diverse Tasks and Model Scales"
(Byun & Perrault, ICML 2025, arXiv 2405.17618), which adds a reverse cross-entropy term to the PPO
loss, meant to make training robust to noise. With p = pi(a|s) the probability of the action taken,
p_old its probability under the policy that sampled it, r = p / p_old, A its advantage, and Z < 0 a
constant that stands for log 0:

    PPO loss          L  = -mean( min(A r, A clip(r, 1 - eps, 1 + eps)) )
    reverse PPO loss  Lr = -mean( m A Z (1 - p) / p_old ),  m = 1 where L has a gradient, else 0
    symmetric loss    alpha L + beta Lr

What SPPO adds to PPO is the block `if beta:` in `symmetric_policy_loss`. The gradient of Lr is |Z|
times that of L, so SPPO's policy gradient is (alpha + beta |Z|) times PPO's. Actor and critic are
separate, and Adam ignores a constant factor: by default the factor acts only through the gradient
clipping that actor and critic share, and through Adam's epsilon.

Lr needs probabilities, so each action dimension is discretised into bins; the probability of an
action is the product over its dimensions.
"""

import hashlib
import json
import math
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
import zipfile
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from importlib import import_module, metadata, util
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import safetensors.torch
import torch
import tyro
from filelock import FileLock, Timeout
from gymnasium.wrappers import RecordVideo
from torch import nn
from torch.distributions import Categorical, Independent, Normal
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from typeguard import check_type


@dataclass
class Args:
    # Run
    env_id: str = "Hopper-v4"  # Gymnasium id; needs vector observations and bounded vector actions
    total_timesteps: int = 1_000_000  # environment steps, rounded up to whole rollouts
    seed: int = 1  # of all random numbers (the authors' runs: 10000, 10001, ...)
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the CPU, since the networks are small
    compile: bool = True  # compile the gradient, given a C++ compiler: slower start, faster run
    runs_dir: str = "runs"  # folder of all runs
    run_name: str | None = None  # default: environment, algorithm, noise, seed and time
    resume: str | None = None  # folder of an interrupted run to continue; takes no other flag
    evaluate: str | None = None  # folder of a run to evaluate, without training it
    checkpoint_freq: int | None = None  # steps between checkpoints; default: total / 20; 0: at end
    log_freq: int = 1000  # steps between entries in the log
    track: bool = False  # log to Weights & Biases as well (pip install wandb)

    # Algorithm
    policy: Literal["categorical", "gaussian"] = "categorical"  # gaussian: plain PPO
    bins: int = 11  # values per action dimension, evenly spaced from lowest to highest
    num_envs: int = 1  # environments, stepped one after the other
    num_steps: int = 2048  # steps of each environment per rollout
    num_minibatches: int = 32  # minibatches per epoch
    update_epochs: int = 10  # passes over a rollout
    learning_rate: float = 3e-4  # Adam's learning rate, constant
    adam_eps: float = 1e-5  # Adam's epsilon
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.95  # lambda of generalised advantage estimation
    clip_coef: float = 0.2  # epsilon of the clip range
    norm_adv: bool = True  # normalise advantages in each minibatch
    vf_coef: float = 0.5  # weight of the value loss, an MSE without CleanRL's factor of 1/2
    ent_coef: float = 0.0  # weight of the entropy bonus
    max_grad_norm: float = 0.5  # gradient clipping, over all parameters together

    # Networks
    hidden_sizes: tuple[int, ...] = (64, 64)  # sizes of hidden layers, of actor and critic alike
    activation: Literal["tanh", "relu"] = "tanh"  # after each hidden layer
    layer_norm: bool = False  # layer normalisation before each activation
    ortho_init: bool = True  # orthogonal initial weights; else PyTorch's default
    log_std_init: float = 0.0  # initial log standard deviation of the Gaussian policy

    # Symmetric loss, and noise on normalised rewards
    alpha: float | None = None  # weight of the PPO loss; default: 0.5, or 1 if beta is 0
    beta: float | None = None  # weight of the reverse loss; default: 20, or 0 if Gaussian
    z: float = -1.0  # Z, which stands for log 0
    divide_by_p_old: bool = True  # as in the paper; without the division: our bounded variant
    noise: Literal["none", "flip", "normal", "uniform", "adv_flip"] = "none"  # adv_flip: advantages
    noise_level: float | None = None  # flip probability (default 0.1) or scale (default 0.05)
    correct_flips: bool = False  # make flipped rewards unbiased, given the noise level

    # Evaluation
    eval_freq: int | None = None  # steps between evaluations; default: total / 20; 0: at the end
    eval_episodes: int = 10  # episodes per evaluation: greedy actions, raw rewards without noise
    eval_max_steps: int = 100_000  # steps after which an evaluation episode is truncated
    capture_video: bool = False  # record the first episode of each evaluation (pip install moviepy)

    @property
    def algo(self) -> str:
        if self.policy == "gaussian":
            return "ppo"
        return "sppo" if self.beta else "dppo"

    @property
    def render_mode(self) -> str | None:
        return "rgb_array" if self.capture_video else None

    @property
    def run_dir(self) -> Path:
        return Path(self.resume or Path(self.runs_dir) / self.run_name)


def make_env(env_id, render_mode=None):
    # Gymnasium warns that the paper's environments (MuJoCo v4) have newer versions
    warnings.filterwarnings("ignore", message=".*is out of date.*")
    # Some environments do not accept `render_mode`
    options = {"render_mode": render_mode} if render_mode else {}
    env = gym.make(env_id, **options)
    renderer = getattr(env.unwrapped, "mujoco_renderer", None)
    if renderer is not None and renderer.model.ncam > 0:
        renderer.camera_id = 0  # follows the robot; Gymnasium's default camera does not
    return CheckedEnv(env)


class RunningStats:
    """Mean and population standard deviation of all values so far, in float64 (Welford 1962)."""

    def __init__(self, shape):
        self.count = 0
        self.mean = np.zeros(shape)
        self.m2 = np.zeros(shape)  # sum of squared deviations from the mean
        self.std = np.ones(shape)

    def update(self, batch):
        for value in batch:
            self.count += 1
            delta = value - self.mean
            self.mean += delta / self.count
            self.m2 += delta * (value - self.mean)
        self.std = np.sqrt(self.m2 / self.count + 1e-8)

    def state_dict(self):
        return {name: torch.as_tensor(value) for name, value in vars(self).items()}

    def load_state_dict(self, state):
        for name, tensor in state.items():
            setattr(self, name, tensor.numpy())


class NormalizedEnvs:
    """Environments stepped one after the other, with autoreset in the same step.

    Observations are standardised by running statistics, rewards divided by the running standard
    deviation of the discounted return; both are clipped to [-10, 10], as in Stable-Baselines3's
    VecNormalize.
    """

    def __init__(self, env_id, num_envs, gamma):
        self.envs = [make_env(env_id) for _ in range(num_envs)]
        self.gamma = gamma
        self.obs_stats = RunningStats(self.envs[0].observation_space.shape)
        self.return_stats = RunningStats(())
        self.episode_return = np.zeros(num_envs)
        self.episode_length = np.zeros(num_envs)
        self.discounted_return = np.zeros(num_envs)
        self.recent_episodes = deque(maxlen=100)  # (raw return, length) of the last episodes

    def normalize_obs(self, obs):
        standardized = (obs - self.obs_stats.mean) / self.obs_stats.std
        return standardized.clip(-10, 10).astype(np.float32)

    def reset(self, seed):
        """Resets all environments. Returns normalised observations (num_envs, obs_dim)."""
        first_obs = [env.reset(seed=seed + i)[0] for i, env in enumerate(self.envs)]
        self.obs = np.stack(first_obs).astype(float)
        self.obs_stats.update(self.obs)
        return self.normalize_obs(self.obs)

    def step(self, action):
        """Steps all environments by `action` (num_envs, action_dim).

        Returns normalised observations (num_envs, obs_dim) and rewards (num_envs,), terminated,
        truncated, and {index: normalised final observation} of truncated episodes.
        """
        reward = np.zeros(len(self.envs))
        terminated = np.zeros(len(self.envs), bool)
        truncated = np.zeros(len(self.envs), bool)
        for i, env in enumerate(self.envs):
            transition = env.step(action[i])
            self.obs[i], reward[i], terminated[i], truncated[i], _ = transition
        self.episode_return += reward
        self.episode_length += 1
        self.discounted_return = self.gamma * self.discounted_return + reward
        self.return_stats.update(self.discounted_return)

        final_obs = {}
        for i in np.flatnonzero(terminated | truncated):
            if not terminated[i]:
                final_obs[i] = self.normalize_obs(self.obs[i])
            episode = (self.episode_return[i].item(), self.episode_length[i].item())
            self.recent_episodes.append(episode)
            self.episode_return[i] = 0
            self.episode_length[i] = 0
            self.discounted_return[i] = 0
            self.obs[i], _ = self.envs[i].reset()

        self.obs_stats.update(self.obs)
        reward = (reward / self.return_stats.std).clip(-10, 10)
        return self.normalize_obs(self.obs), reward, terminated, truncated, final_obs


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


def mlp(in_dim, out_dim, out_gain, args):
    """Multi-layer perceptron. Orthogonal weights have gain sqrt(2), the last layer `out_gain`."""
    layers = []
    for width in args.hidden_sizes:
        layers.append(nn.Linear(in_dim, width))
        if args.layer_norm:
            layers.append(nn.LayerNorm(width))
        layers.append(nn.Tanh() if args.activation == "tanh" else nn.ReLU())
        in_dim = width
    layers.append(nn.Linear(in_dim, out_dim))
    if args.ortho_init:
        for layer in layers:
            if isinstance(layer, nn.Linear):
                gain = out_gain if layer is layers[-1] else math.sqrt(2)
                nn.init.orthogonal_(layer.weight, gain)
                nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class Agent(nn.Module):
    """Separate actor and critic. The actor gives logits (batch, action_dim, bins) or, for the
    Gaussian policy, means (batch, action_dim)."""

    def __init__(self, env, args):
        super().__init__()
        space = env.action_space
        obs_dim = env.observation_space.shape[0]
        self.gaussian = args.policy == "gaussian"
        # (action_dim, bins)
        self.bin_values = np.linspace(space.low, space.high, args.bins, axis=1)
        self.output_shape = self.bin_values.shape
        if self.gaussian:
            self.output_shape = space.shape
            self.log_std = nn.Parameter(torch.full(space.shape, args.log_std_init))
        output_size = math.prod(self.output_shape)
        self.actor = mlp(obs_dim, output_size, 0.01, args)
        self.critic = mlp(obs_dim, 1, 1.0, args)

    def output(self, obs):
        return self.actor(obs).view(-1, *self.output_shape)

    def policy(self, obs):
        """Distribution of the joint action: log-probabilities are summed over its dimensions."""
        output = self.output(obs)
        if self.gaussian:
            distribution = Normal(output, self.log_std.exp(), validate_args=False)
        else:
            distribution = Categorical(logits=output, validate_args=False)
        return Independent(distribution, 1)

    def value(self, obs):
        return self.critic(obs).squeeze(-1)

    def sampling_noise(self, shape, generator):
        """Noise for `act`, an array (*shape, action_dim) or (*shape, action_dim, bins)."""
        noise = torch.empty(*shape, *self.output_shape)
        if self.gaussian:
            noise = self.log_std.exp().cpu() * noise.normal_(generator=generator)
        else:  # Gumbel-max trick: the arg max of logits + noise is a sample
            noise = -noise.exponential_(generator=generator).log()
        return noise.detach().numpy()

    def numpy_actor(self):
        """The actor as a function of NumPy arrays, `act(obs, noise)`. It returns actions (batch,
        action_dim), bin indices or Gaussian values: sampled with noise, greedy without it."""
        network = numpy_mlp(self.actor)

        def act(obs, noise=0.0):
            output = network(obs).reshape(-1, *self.output_shape) + noise
            return output if self.gaussian else output.argmax(-1)

        return act

    def to_env(self, action):
        """Converts actions from `act` to the environment's, (batch, action_dim)."""
        if self.gaussian:  # the first and the last bin are the bounds
            return action.clip(self.bin_values[:, 0], self.bin_values[:, -1])
        dimensions = np.arange(len(self.bin_values))
        return self.bin_values[dimensions, action]


def evaluate(agent, env, training_envs, args, seed, stop):
    """Raw returns and lengths (eval_episodes,) of greedy episodes; None if `stop` came first.
    Observations are normalised by the training statistics, which are not updated."""
    returns = np.zeros(args.eval_episodes)
    lengths = np.zeros(args.eval_episodes)
    act = agent.numpy_actor()
    for episode in range(args.eval_episodes):
        # With seed + episode, runs with neighbouring seeds would share most initial states
        obs, _ = env.reset(seed=seed if episode == 0 else None)
        ended = False
        while not ended:
            if stop.is_set():
                return None
            action = act(training_envs.normalize_obs(obs))
            obs, reward, terminated, truncated, _ = env.step(agent.to_env(action)[0])
            returns[episode] += reward
            lengths[episode] += 1
            ended = terminated or truncated or lengths[episode] == args.eval_max_steps
    return returns, lengths


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


def gradient_and_metrics(agent, args, obs, action, old_log_prob, advantage, returns):
    """Clipped gradient of the loss on a minibatch, as one vector, and what to log."""
    normalized = advantage
    if args.norm_adv:
        normalized = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    policy = agent.policy(obs)
    log_prob = policy.log_prob(action)
    symmetric_loss = symmetric_policy_loss(
        log_prob,
        old_log_prob,
        normalized,
        args.clip_coef,
        args.alpha,
        args.beta,
        args.z,
        args.divide_by_p_old,
    )
    value_loss = (agent.value(obs) - returns).square().mean()
    entropy = policy.entropy().mean()
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
        surrogate = normalized * ratio
        clipped = normalized * ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
        # The part of the reverse loss that has a gradient: m A Z r or, undivided, m A Z p
        reverse = args.z * torch.where(surrogate <= clipped, surrogate, 0.0)
        if not args.divide_by_p_old:
            reverse = reverse * old_log_prob.exp()
        sign_flips = (normalized > 0) != (advantage > 0)
        metrics = {
            "policy_loss": -torch.minimum(surrogate, clipped).mean(),
            "reverse_loss": reverse.mean(),
            "value_loss": value_loss.detach(),
            "entropy": entropy.detach(),
            "grad_norm": grad_norm,  # before clipping
            "clipped_gradients": (grad_norm > args.max_grad_norm).float(),
            "advantage_sign_flips": sign_flips.float().mean(),  # due to normalisation
            "approx_kl": (ratio - 1 - log_ratio).mean(),  # joschu.net/blog/kl-approx.html
            "clipfrac": ((ratio - 1).abs() > args.clip_coef).float().mean(),
        }
    return scale * gradient, metrics


def train(args: Args, stop: threading.Event) -> dict | None:
    """Trains with arguments from `prepare`. Returns the content of summary.json, or None if
    interrupted through `stop`. Raises RunError if the run can't continue, UsageError if its
    checkpoint is damaged, OSError if a file can't be written."""
    started = time.perf_counter()
    torch.set_num_threads(1)  # the networks are too small to gain from more
    generator = torch.manual_seed(args.seed)  # initial weights, actions, minibatches, adv_flip
    device = torch.device("cuda" if args.device == "cuda" else "cpu")
    # Noise on rewards. With the seed alone it would repeat environment 0's random numbers
    rng = np.random.default_rng([args.seed, 1])
    envs = NormalizedEnvs(args.env_id, args.num_envs, args.gamma)
    eval_env = make_env(args.env_id, args.render_mode)
    if args.capture_video:
        folder = args.run_dir / "video"
        eval_env = RecordVideo(eval_env, folder, lambda episode: episode % args.eval_episodes == 0)
    agent = Agent(eval_env, args).to(device)
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
            envs.obs_stats.load_state_dict(checkpoint["obs_stats"])
            envs.return_stats.load_state_dict(checkpoint["return_stats"])
            envs.recent_episodes.extend(checkpoint["finished_episodes"])
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
    obs_dim = eval_env.observation_space.shape[0]
    action_dim = eval_env.action_space.shape[0]
    action_dtype = np.float32 if agent.gaussian else np.int64
    obs = np.zeros((T + 1, N, obs_dim), np.float32)
    action = np.zeros((T, N, action_dim), action_dtype)
    reward = np.zeros((T, N))
    terminated = np.zeros((T, N), bool)
    truncated = np.zeros((T, N), bool)
    final_value = np.zeros((T, N))  # of truncated episodes' final observations
    gradient_fn = gradient_and_metrics
    if args.compile:
        gradient_fn = compiled(agent, args, obs, action)
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
            eval_env.name_prefix = f"step-{global_step}"  # of the video, if any
            result = evaluate(agent, eval_env, envs, args, args.seed + global_step, stop)
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
                "obs_stats": envs.obs_stats.state_dict(),
                "return_stats": envs.return_stats.state_dict(),
                "finished_episodes": list(envs.recent_episodes),
                "generator": generator.get_state(),
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
        # Checkpoints hold no simulator state, so a resumed run begins new episodes. `reset` is here
        # and not before the loop because it updates the statistics of observations, and an
        # evaluation that is still due needs them as they were saved
        if global_step == first_step:
            obs[T] = envs.reset(args.seed + global_step)
        obs[0] = obs[T]
        act = agent.numpy_actor()
        action_noise = agent.sampling_noise((T, N), generator)
        for t in range(T):
            action[t] = act(obs[t], action_noise[t])
            transition = envs.step(agent.to_env(action[t]))
            obs[t + 1], reward[t], terminated[t], truncated[t], final_obs = transition
            for i, last_obs in final_obs.items():
                with torch.no_grad():
                    last_value = agent.value(torch.from_numpy(last_obs).to(device))
                final_value[t, i] = last_value.item()
        global_step += T * N
        progress_bar.update(T * N)

        # Advantages. The agent has not changed since the rollout: one pass gives all values
        all_obs = torch.from_numpy(obs).to(device)  # including obs[T], for bootstrapping
        b_obs = all_obs[:T].flatten(0, 1)
        b_action = torch.from_numpy(action).to(device).flatten(0, 1)
        with torch.no_grad():
            value = agent.value(all_obs).cpu().numpy()
            old_log_prob = agent.policy(b_obs).log_prob(b_action)
        noisy_reward = perturb_reward(reward, args.noise, args.noise_level, rng)
        if args.correct_flips:
            noisy_reward = correct_flips(noisy_reward, args.noise_level)
        advantage, returns = compute_gae(
            noisy_reward, value, final_value, terminated, truncated, args.gamma, args.gae_lambda
        )
        all_advantages.append(advantage)
        all_returns.append(returns)
        b_advantage = torch.tensor(advantage, dtype=torch.float32, device=device).flatten()
        b_returns = torch.tensor(returns, dtype=torch.float32, device=device).flatten()

        # Update
        for _ in range(args.update_epochs):
            epoch_advantage = b_advantage
            if args.noise == "adv_flip":
                epoch_advantage = perturb_advantage(b_advantage, args.noise_level, generator)
            order = torch.randperm(T * N, generator=generator).to(device)
            for mb_inds in order.view(args.num_minibatches, -1):
                parameters.grad, mb_metrics = gradient_fn(
                    agent,
                    args,
                    b_obs[mb_inds],
                    b_action[mb_inds],
                    old_log_prob[mb_inds],
                    epoch_advantage[mb_inds],
                    b_returns[mb_inds],
                )
                optimizer.step()
                metrics.append(mb_metrics)
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
            variance = np.var(all_returns)
            if variance > 0:  # advantage = return - value
                scalars["losses/explained_variance"] = 1 - np.var(all_advantages) / variance
            scalars["losses/advantage_largest"] = np.abs(all_advantages).max()
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
    eval_env.close()
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
    # To use the agent elsewhere: its weights and the statistics that normalise observations
    tensors = agent.state_dict()
    tensors["obs_mean"] = torch.from_numpy(envs.obs_stats.mean)
    tensors["obs_std"] = torch.from_numpy(envs.obs_stats.std)
    save(args.run_dir / "agent.safetensors", safetensors.torch.save(tensors))
    # Written last, since summary.json marks a run as finished
    save(args.run_dir / "summary.json", json.dumps(summary, indent=2))
    return summary


def evaluate_run(args: Args) -> None:
    """Plays the policy of the run in the folder `args.evaluate`, and prints its score."""
    run = evaluated_args(args, "seed", "eval_episodes", "eval_max_steps", "capture_video")
    check_env(run)
    env = make_env(run.env_id, run.render_mode)
    if run.capture_video:
        name = f"evaluate-{run.seed}"
        env = RecordVideo(env, run.run_dir / "video", lambda i: i == 0, name_prefix=name)
    agent = Agent(env, run)
    envs = NormalizedEnvs(run.env_id, 1, run.gamma)
    with usable(run.run_dir / "checkpoint.pt"):
        checkpoint = load_checkpoint(run.run_dir / "checkpoint.pt")
        agent.load_state_dict(checkpoint["agent"])
        envs.obs_stats.load_state_dict(checkpoint["obs_stats"])
    returns, _ = evaluate(agent, env, envs, run, run.seed, threading.Event())
    env.close()
    print_score(run, checkpoint["global_step"], returns)


# What follows is plumbing, not part of the algorithm.


class CheckedEnv(gym.Wrapper):
    """Raises a RunError that names environment, step and line if the environment's code fails
    (even by `sys.exit`) or returns values that are huge or not finite."""

    steps = 0  # since this process started, not since the run did

    def reset(self, **options):
        try:
            obs, info = self.env.reset(**options)
            if not abs(float(np.sum(obs))) < 1e100:  # False for NaN, too
                raise ValueError(f"first observation {obs}: not finite, or huge")
        except (Exception, SystemExit) as error:
            raise self.failure(error) from error
        return obs, info

    def step(self, action):
        self.steps += 1
        try:
            transition = self.env.step(action)
            obs, reward, *_ = transition
            if not (abs(reward) < 1e100 and abs(float(np.sum(obs))) < 1e100):
                raise ValueError(f"observation {obs}, reward {reward}: not finite, or huge")
        except (Exception, SystemExit) as error:
            raise self.failure(error) from error
        return transition

    def failure(self, error):
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        return RunError(f"{self.env.spec.id}, its step {self.steps}: {error!r:.300} in {where}")


def numpy_mlp(network):
    """A network from `mlp` as a function of NumPy arrays, which takes a third of PyTorch's time for
    a single observation."""
    layers = []
    for layer in network:
        layers.append((layer, [p.detach().cpu().numpy() for p in layer.parameters()]))

    def forward(x):
        for layer, parameters in layers:
            if isinstance(layer, nn.Tanh):
                x = np.tanh(x)
            elif isinstance(layer, nn.ReLU):
                x = np.maximum(x, 0)
            elif isinstance(layer, nn.Linear):
                weight, bias = parameters
                x = x @ weight.T + bias
            else:  # nn.LayerNorm
                weight, bias = parameters
                variance = x.var(-1, keepdims=True) + layer.eps
                x = (x - x.mean(-1, keepdims=True)) / np.sqrt(variance) * weight + bias
        return x

    return forward


def due(every, step, stride):
    """Whether a multiple of `every` lies in the last `stride` steps; never if `every` is 0."""
    return every > 0 and step % every < stride


def flatten_parameters(agent):
    """Makes all parameters views of one vector, and returns it: the optimizer then updates one
    tensor instead of a dozen small ones."""
    parameters = nn.utils.parameters_to_vector(agent.parameters()).detach()
    nn.utils.vector_to_parameters(parameters, agent.parameters())
    return parameters


def compiled(agent, args, obs, action):
    """Compiles `gradient_and_metrics` by a call on a minibatch of zeros, before training is timed.
    Returns it uncompiled if that fails. `obs` (T + 1, N, obs_dim), `action` (T, N, action_dim)."""
    device = next(agent.parameters()).device
    n = args.num_steps * args.num_envs // args.num_minibatches
    mb_obs = torch.zeros(n, obs.shape[-1], device=device)
    mb_action = torch.from_numpy(action[0, 0]).repeat(n, 1).to(device)
    # cpp_wrapper makes a call cheaper; it has not been tried on a GPU
    gradient_fn = torch.compile(gradient_and_metrics, options={"cpp_wrapper": device.type == "cpu"})
    try:
        torch._dynamo.config.trace_autograd_ops = True  # one graph for the gradient and the loss
        gradient_fn(agent, args, mb_obs, mb_action, *torch.zeros(3, n, device=device))
        return gradient_fn
    except Exception as error:  # any exception is possible here
        warning = f"torch.compile failed, continuing with --no-compile: {error!r:.200}"
        tqdm.write(warning, file=sys.stderr)
        return gradient_and_metrics


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
    gaussian = args.policy == "gaussian"
    if args.beta is None:
        args.beta = 0.0 if gaussian else 20.0
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
        args.run_name = f"{Path(__file__).stem}__{name}".replace("/", "-").replace(":", "-")
    return args


def check(args: Args) -> None:
    """Raises UsageError for an argument that is out of range or contradicts another."""
    require_range(args, "total_timesteps num_steps num_minibatches", 1, 1e12)
    require_range(args, "eval_max_steps log_freq", 1, 1e12)
    require_range(args, "num_envs eval_episodes", 1, 10_000)
    require_range(args, "update_epochs", 1, 1000)
    require_range(args, "bins", 2, 1000)
    require_range(args, "log_std_init", -20, 20)
    require_range(args, "seed eval_freq checkpoint_freq", 0, 1e18)
    require_range(args, "alpha beta vf_coef ent_coef", 0, 1e9)
    require_range(args, "learning_rate adam_eps clip_coef max_grad_norm", 1e-30, 1e12)
    require_range(args, "gamma gae_lambda noise_level", 0, 1)
    require_range(args, "z", -1e9, -1e-9)  # negative, since it stands for log 0
    batch_size = args.num_envs * args.num_steps
    require(
        batch_size <= 10_000_000, "--num-envs, --num-steps: more than 10,000,000 steps a rollout"
    )
    require(
        batch_size % args.num_minibatches == 0 and batch_size > args.num_minibatches,
        f"--num-minibatches {args.num_minibatches}: must divide {batch_size}"
        " (environments x steps) into minibatches of 2 or more",
    )
    for size in args.hidden_sizes:
        require(1 <= size <= 10_000, f"--hidden-sizes {size}: must be between 1 and 10000")
    require(
        args.policy == "categorical" or args.beta == 0,
        "--beta: needs probabilities, not a Gaussian's densities; use --policy categorical",
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


def check_env(args: Args) -> None:
    """Raises UsageError unless the environment can be made, reset and, for videos, rendered."""
    with usable(f"--env-id {args.env_id}"):
        env = make_env(args.env_id, args.render_mode)
    for space in (env.observation_space, env.action_space):
        vector = isinstance(space, gym.spaces.Box) and len(space.shape) == 1
        require(vector, f"--env-id {args.env_id}: needs one-dimensional Box spaces, not {space}")
    require(env.action_space.is_bounded(), f"--env-id {args.env_id}: unbounded actions")
    with usable(f"--env-id {args.env_id}"):
        env.reset()
        if args.capture_video:
            env.render()  # without a display, MuJoCo needs MUJOCO_GL=egl


def prepare(args: Args) -> Args:
    """Completes and checks arguments, and makes the run's folder. Raises UsageError."""
    if args.resume is not None:
        args = resumed_args(args)
    args = with_defaults(args)
    check(args)
    require(not args.track or util.find_spec("wandb"), "--track: pip install wandb")
    check_env(args)
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
