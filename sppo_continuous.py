# SPDX-FileCopyrightText: 2026 The symmetric-rl-loss authors
# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10,<3.15"
# dependencies = ["torch>=2.11", "gymnasium[mujoco]>=1.2.3", "mujoco>=3.1.6", "numpy>=2.0",
#   "gymnasium[box2d]>=1.2.3; python_version < '3.14' and platform_machine != 'aarch64'",
#   "tyro>=1.0.16", "filelock>=3.30", "safetensors>=0.4.5", "tensorboard>=2.19", "tqdm>=4.66.5"]
# [tool.uv]  # the versions of requirements.lock
# exclude-newer = "2026-11-17T00:00:00Z"
# constraint-dependencies = ["torch==2.13.0"]
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

SPPO differs from PPO in two lines, "all that SPPO adds to PPO" and `beta * reverse_loss`. Its
policy gradient is (alpha + beta |Z|) times PPO's. Lr needs probabilities, so each action dimension
is discretised into bins, and p is the product over the dimensions.

The same command continues a killed run, with the same bytes if seeds determine the environment.
"""

import csv
import hashlib
import json
import math
import os
import platform
import random
import re
import sys
import time
import warnings
from collections import deque
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import safetensors.torch
import torch
import tyro
from filelock import FileLock
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, Normal
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCRIPT = Path(__file__).resolve()
SOURCE = SCRIPT.read_bytes()  # read at once, since the file may be edited during the run
START = Path.cwd()  # relative paths begin here, even where an environment changes directory
# The same run continues although these differ (`start_digest` stands for start_from)
NO_EFFECT = ["runs_dir", "start_from", "compile", "track"]
GOES_ON = [*NO_EFFECT, "total_timesteps", "eval_freq", "eval_episodes"]  # from another one


@dataclass
class Args:
    # Run
    env_id: str = "Hopper-v4"  # Gymnasium's, or MODULE:ID; observations and actions are vectors
    env_kwargs: str = "{}"  # JSON, for the environment when it is made: {"delay": 5}
    total_timesteps: int = 1_000_000  # environment steps, rounded up to whole rollouts
    seed: int = 1  # of all random numbers (the authors' runs: 10000, 10001, ...)
    exp_name: str | None = None  # name of the method in reports; default: the algorithm
    runs_dir: str = "runs"  # folder of all runs
    start_from: str | None = None  # folder of a run: begin with its checkpoint
    compile: bool = True  # compile the gradient (needs a C++ compiler): slower start, faster run
    checkpoint_freq: int = 0  # an environment's steps per checkpoint (ends episodes); 0: 100,000+
    track: bool = False  # log to Weights & Biases as well (pip install wandb)
    # Algorithm
    policy: Literal["categorical", "gaussian"] = "categorical"  # gaussian: plain PPO
    bins: int = 11  # values per action dimension, from lowest to highest
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
    max_grad_norm: float = 0.5  # gradient clipping, over all parameters
    # Networks
    hidden_sizes: tuple[int, ...] = (64, 64)  # sizes of hidden layers, of actor and critic alike
    activation: Literal["tanh", "relu"] = "tanh"  # after each hidden layer
    ortho_init: bool = True  # orthogonal initial weights; else PyTorch's default
    log_std_init: float = 0.0  # initial log standard deviation of the Gaussian policy
    # Symmetric loss, and noise on normalised rewards
    alpha: float | None = None  # weight of the PPO loss; default: 0.5, or 1 if beta is 0
    beta: float | None = None  # weight of the reverse loss; default: 20, or 0 if Gaussian
    z: float = -1.0  # Z, which stands for log 0
    noise: Literal["none", "normal", "uniform", "adv_flip"] = "none"  # adv_flip: on advantages
    noise_level: float | None = None  # flip probability (default 0.1) or scale (default 0.05)
    # Evaluation
    eval_freq: int | None = None  # steps between evaluations; default: total / 20
    eval_episodes: int = 10  # episodes per evaluation: greedy actions, raw rewards without noise

    def __post_init__(self):
        if self.beta is None:
            self.beta = 0.0 if self.policy == "gaussian" else 20.0
        if self.alpha is None:
            self.alpha = 0.5 if self.beta else 1.0
        if self.noise_level is None:
            defaults = {"none": 0.0, "normal": 0.05, "uniform": 0.05}
            self.noise_level = defaults.get(self.noise, 0.1)
        if self.eval_freq is None:
            self.eval_freq = max(1, self.total_timesteps // 20)
        if self.exp_name is None:
            plain = "ppo" if self.policy == "gaussian" else "dppo"
            self.exp_name = "sppo" if self.beta else plain
        check(self)
        self.env_kwargs = json.dumps(json.loads(self.env_kwargs), sort_keys=True)


# ---- Environment


def make_env(args, seed=0, **options):
    """Makes the environment. Seeds its spaces, since some environments sample from them."""
    warnings.filterwarnings("ignore", message=".*is out of date.*")  # as the paper's MuJoCo v4 is
    env = gym.make(args.env_id, **json.loads(args.env_kwargs) | options)
    rng = np.random.default_rng([seed, 3])  # `seed` alone would repeat the environment's numbers
    part = env
    while isinstance(part, gym.Env):  # a wrapper and the environment in it may each have spaces
        for name in "action_space", "observation_space":
            if hasattr(part, name):
                getattr(part, name).seed(rng.integers(2**31).item())
        part = getattr(part, "env", None)
    return env


def prepare(args):
    """Imports the environment's files, for `file_digests`. Refuses spaces that are no vectors."""
    try:
        with make_env(args) as env:
            env.reset(seed=0)  # some environments import files only here
    except (ImportError, gym.error.Error) as error:
        sys.exit(f"error: --env-id {args.env_id}: {error} (FILE:ID: FILE.py on PYTHONPATH?)")
    for space in (env.observation_space, env.action_space):
        if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
            sys.exit(f"error: {args.env_id}: {space} is no vector; see docs/copy-and-modify.md")
    action_space = env.action_space
    bound = np.abs([action_space.low, action_space.high]).max()  # float32's maximum: no bound
    if action_space.dtype.kind != "f" or (bound > 1e30 and args.policy == "categorical"):
        sys.exit(f"error: {args.env_id}: needs float actions, bounded unless --policy gaussian")


class RunningStats:
    """Mean and population standard deviation of all values so far, in float64 (Welford 1962)."""

    def __init__(self):
        self.count = 0
        self.mean = 0.0
        self.m2 = 0.0  # sum of squared deviations from the mean
        self.std = 1.0

    def update(self, batch):
        for value in batch:
            self.count += 1
            delta = value - self.mean
            self.mean += delta / self.count
            self.m2 += delta * (value - self.mean)
        self.std = np.sqrt(self.m2 / self.count + 1e-8)
        return self

    def normalize(self, obs):
        if not np.isfinite(obs).all():  # with NaN, an agent would always take the lowest action
            raise Failed(f"error: observation not finite near step {self.count:,}: {obs}")
        return ((obs - self.mean) / self.std).clip(-10, 10).astype(np.float32)

    def state_dict(self):
        return {name: torch.as_tensor(value) for name, value in vars(self).items()}

    def load_state_dict(self, state):
        vars(self).update({name: tensor.numpy().copy() for name, tensor in state.items()})


class NormalizedEnvs:
    """Environments stepped one after the other; one whose episode ends is reset in the same step.

    As in Stable-Baselines3's VecNormalize, observations are standardised by running statistics,
    rewards divided by the discounted return's standard deviation, and both clipped to [-10, 10]."""

    def __init__(self, args):
        self.args = args
        self.envs = []
        self.obs_stats = RunningStats()
        self.return_stats = RunningStats()
        self.recent_episodes = deque(maxlen=100)  # (return, length) of the last episodes

    def reset(self, seed):
        """Begins all episodes. Returns normalised observations (num_envs, obs_dim)."""
        n = self.args.num_envs
        self.discounted_return = np.zeros(n)
        self.episode_return = np.zeros(n)  # so far, of raw rewards
        self.episode_length = np.zeros(n)
        # With seed + i, runs with neighbouring seeds would share environments' seeds
        seeds = np.random.default_rng(seed).integers(2**31, size=n).tolist()
        random.seed(seeds[0])  # some environments draw from these global generators
        np.random.seed(seeds[0])
        torch.manual_seed(seeds[0])
        self.close()  # new environments follow, since BipedalWalker keeps state across resets
        self.envs = [make_env(self.args, s) for s in seeds]
        self.obs = np.array([env.reset(seed=s)[0] for env, s in zip(self.envs, seeds)], float)
        return self.obs_stats.update(self.obs).normalize(self.obs)

    def step(self, action):
        """Steps all environments by `action` (num_envs, action_dim). Returns normalised `obs` and
        `reward`, `done` (terminated or truncated), `only_truncated` (by a time limit, for example),
        and `final_obs`, the last observations of episodes that are only truncated."""
        reward = np.zeros_like(self.episode_return)
        terminated = np.zeros_like(reward, bool)
        truncated = np.zeros_like(terminated)
        for i, env in enumerate(self.envs):
            self.obs[i], reward[i], terminated[i], truncated[i], _ = env.step(action[i])
        self.episode_return += reward
        self.episode_length += 1
        self.discounted_return = self.args.gamma * self.discounted_return + reward
        self.return_stats.update(self.discounted_return)

        done = terminated | truncated
        final_obs = np.zeros_like(self.obs, np.float32)
        for i in np.flatnonzero(done):
            if not terminated[i]:  # after a termination, anything may come
                final_obs[i] = self.obs_stats.normalize(self.obs[i])
            episode = float(self.episode_return[i]), float(self.episode_length[i])
            self.recent_episodes.append(episode)
            self.discounted_return[i] = 0
            self.episode_return[i] = 0
            self.episode_length[i] = 0
            self.obs[i], _ = self.envs[i].reset()

        obs = self.obs_stats.update(self.obs).normalize(self.obs)
        reward = (reward / self.return_stats.std).clip(-10, 10)
        return obs, reward, done, truncated & ~terminated, final_obs

    def close(self):
        for env in self.envs:
            env.close()


def perturb_reward(reward, noise, level, rng):
    """Rewards of any shape with noise: normal adds N(0, level^2), uniform adds U(-level, level)."""
    if noise == "normal":
        return reward + rng.normal(0, level, reward.shape)
    if noise == "uniform":
        return reward + rng.uniform(-level, level, reward.shape)
    if noise in ("none", "adv_flip"):
        return reward.copy()  # callers write into it
    raise ValueError(f"perturb_reward does not know the noise {noise!r}")


def perturb_advantage(advantage, level, rng):
    """Advantages of any shape, the sign of each flipped with probability `level`."""
    flipped = torch.from_numpy(rng.random(advantage.shape) < level)
    return torch.where(flipped.to(advantage.device), -advantage, advantage)


# ---- Agent


def mlp(in_dim, out_dim, out_gain, args):
    """Multi-layer perceptron. Orthogonal weights have gain sqrt(2), the last layer `out_gain`."""
    layers = []
    for width in args.hidden_sizes:
        layers.append(nn.Linear(in_dim, width))
        layers.append({"tanh": nn.Tanh, "relu": nn.ReLU}[args.activation]())
        in_dim = width
    layers.append(nn.Linear(in_dim, out_dim))
    for layer in layers:
        if args.ortho_init and isinstance(layer, nn.Linear):
            gain = out_gain if layer is layers[-1] else math.sqrt(2)
            nn.init.orthogonal_(layer.weight, gain)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def numpy_layer(layer):
    """`layer` as a function of NumPy arrays (batch, inputs), which shares its weights. For a single
    observation NumPy takes a third of PyTorch's time."""
    if isinstance(layer, nn.Tanh):
        return np.tanh
    if type(layer) is nn.Linear and layer.bias is not None and not layer._forward_pre_hooks:
        weight = layer.weight.detach().numpy().T
        bias = layer.bias.detach().numpy()
        return lambda x: x.dot(weight) + bias
    return lambda x: layer(torch.from_numpy(x)).detach().numpy()  # all others


class Agent(nn.Module):
    """Separate actor and critic.

    output = actor(obs)               logits (batch, action_dim, bins), or means (batch, action_dim)
    action                            output + exploration; with bins, the bin where this is highest
    to_env(action)                    the environment's action
    policy(output).log_prob(action)   log-probability (batch,), for the losses"""

    def __init__(self, env, args):
        super().__init__()
        obs_dim = env.observation_space.shape[0]
        self.low = env.action_space.low
        self.high = env.action_space.high
        self.gaussian = args.policy == "gaussian"
        if self.gaussian:
            self.output_shape = self.low.shape  # (action_dim,)
            self.log_std = nn.Parameter(torch.full(self.output_shape, args.log_std_init))
        else:
            self.bin_values = np.linspace(self.low, self.high, args.bins, axis=1)
            self.output_shape = self.bin_values.shape  # (action_dim, bins)
        self.actor = mlp(obs_dim, math.prod(self.output_shape), 0.01, args)
        self.critic = mlp(obs_dim, 1, 1.0, args)

    def policy(self, output):
        """Distribution of the joint action: log-probabilities are summed over its dimensions."""
        output = output.view(-1, *self.output_shape)
        if self.gaussian:
            distribution = Normal(output, self.log_std.exp(), validate_args=False)
        else:
            distribution = Categorical(logits=output, validate_args=False)
        return Independent(distribution, 1)

    def exploration(self, shape, generator):
        """Random numbers (*shape, action_dim) or (*shape, action_dim, bins) that `act` adds to the
        output, to sample from `policy`. Nothing tests that they match `policy`: change both."""
        draws = torch.empty(*shape, *self.output_shape)
        if self.gaussian:
            draws = self.log_std.exp() * draws.normal_(generator=generator)
        else:  # Gumbel-max trick: the arg max of logits + Gumbel draws is a sample
            draws = -draws.exponential_(generator=generator).log()
        return draws.detach().numpy()

    def actor_fn(self):
        """The actor in NumPy. `act(obs, exploration)` returns actions (batch, action_dim), bin
        indices or Gaussian values, and the output. Without exploration, actions are greedy."""
        layers = self.actor if type(self.actor) is nn.Sequential else [self.actor]
        layers = [numpy_layer(layer) for layer in layers]

        def act(obs, exploration=0.0):
            output = np.asarray(obs, np.float32)
            for layer in layers:
                output = layer(output)
            output = output.reshape(-1, *self.output_shape)
            action = output + exploration
            if not self.gaussian:
                action = action.argmax(-1)
            return action, output

        return act

    def acting_log_prob(self, action, output):
        """log p (batch,) of actions, from the actor's outputs when it acted. Repeats the formula of
        `policy` on purpose: an edit of only one of the two stops the run at its first update."""
        if self.gaussian:
            distribution = Normal(output, self.log_std.exp(), validate_args=False)
            log_prob = distribution.log_prob(action)
        else:
            log_prob = output.log_softmax(-1).gather(-1, action.unsqueeze(-1)).squeeze(-1)
        return log_prob.sum(-1)

    def to_env(self, action):
        """Converts actions from `act` to the environment's, (batch, action_dim)."""
        if self.gaussian:
            return action.clip(self.low, self.high)
        return self.bin_values[np.arange(len(self.bin_values)), action]


# ---- Rollout


class Batch(NamedTuple):
    """Steps of a rollout, a tensor (n, ...) each. A field that is added reaches the loss, too."""

    obs: Tensor
    action: Tensor
    log_prob: Tensor  # under the policy that acted
    advantage: Tensor  # in float64, until it is normalised
    returns: Tensor  # in float64


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


def collect(agent, args, envs, obs, rng, generator):
    """A rollout from observations `obs` (num_envs, obs_dim), with advantages. Returns a `Batch` of
    all its steps, and the observations after the last."""
    act = agent.actor_fn()
    steps = []
    for exploration in agent.exploration((args.num_steps, args.num_envs), generator):
        action, output = act(obs, exploration)
        next_obs, *outcome = envs.step(agent.to_env(action))
        steps.append([obs, action, output, *outcome])
        obs = next_obs
    obs, action, output, *outcomes = zip(*steps)
    reward, done, only_truncated, final_obs = map(np.array, outcomes)

    # Values of all observations at once, `next_obs` and those of truncated episodes among them
    all_obs = torch.from_numpy(np.concatenate([*obs, next_obs, final_obs[only_truncated]]))
    action, output = (torch.from_numpy(np.concatenate(x)) for x in (action, output))
    with torch.no_grad():
        log_prob = agent.acting_log_prob(action, output)
        all_values = agent.critic(all_obs).flatten().numpy()
    value, final_value = np.split(all_values, [len(action) + args.num_envs])
    noisy_reward = perturb_reward(reward, args.noise, args.noise_level, rng)
    # A truncated episode would have gone on: bootstrap from where it stopped
    noisy_reward[only_truncated] += args.gamma * final_value
    value = value.reshape(-1, args.num_envs)
    advantage, returns = compute_gae(noisy_reward, value, done, args.gamma, args.gae_lambda)
    advantage, returns = (torch.from_numpy(x).flatten() for x in (advantage, returns))
    return Batch(all_obs[: len(action)], action, log_prob, advantage, returns), next_obs


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


def gradient_and_metrics(agent, trained, args, batch):
    """Clipped gradients of the loss on a minibatch, by `trained` parameters, and what to log."""
    normalized = batch.advantage
    if args.norm_adv:  # float64, as float32 can give equal advantages a deviation above 1e-8
        normalized = (normalized - normalized.mean()) / (normalized.std() + 1e-8)
    policy = agent.policy(agent.actor(batch.obs))
    log_prob = policy.log_prob(batch.action)
    normalized = normalized.to(log_prob.dtype)
    policy_loss, reverse_loss = symmetric_policy_losses(
        log_prob, batch.log_prob, normalized, args.clip_coef, args.z
    )
    value = agent.critic(batch.obs).flatten()
    value_loss = (value - batch.returns.to(value.dtype)).square().mean()
    entropy = policy.entropy().mean()
    # A term added here competes with k = alpha + beta |Z| times PPO's loss: 20.5 times by default
    loss = args.alpha * policy_loss + args.beta * reverse_loss
    loss = loss + args.vf_coef * value_loss - args.ent_coef * entropy

    # Instead of backward() and clip_grad_norm_, so that torch.compile makes a single graph
    gradients = torch.autograd.grad(loss, trained, materialize_grads=True)  # 0 for unused ones
    grad_norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    scale = (args.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1)
    # A gradient may have other strides than its parameter: fused optimizers would mix elements up
    clipped_gradients = [torch.empty_like(p).copy_(scale * g) for p, g in zip(trained, gradients)]

    log_ratio = log_prob - batch.log_prob
    metrics = {
        "losses/policy_loss": policy_loss,
        "losses/reverse_loss": reverse_loss,
        "losses/value_loss": value_loss,
        "losses/entropy": entropy,
        "losses/grad_norm": grad_norm,  # before clipping
        "losses/clipped_gradients": grad_norm > args.max_grad_norm,
        "losses/norm_sign_changes": ((normalized > 0) != (batch.advantage > 0)).float().mean(),
        "losses/approx_kl": (log_ratio.expm1() - log_ratio).mean(),  # joschu.net/blog/kl-approx
        "losses/clipfrac": (log_ratio.expm1().abs() > args.clip_coef).float().mean(),
    }
    return clipped_gradients, {name: metric.detach() for name, metric in metrics.items()}


# ---- Training


def update(agent, args, optimizer, gradient_fn, batch, rng, generator):
    """Passes `update_epochs` times over a batch. Returns the metrics of each minibatch."""
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    metrics = []
    for _ in range(args.update_epochs):
        noisy_batch = batch
        if args.noise == "adv_flip":  # drawn anew in every epoch
            advantage = perturb_advantage(batch.advantage, args.noise_level, rng)
            noisy_batch = batch._replace(advantage=advantage)
        order = torch.randperm(len(batch.obs), generator=generator)
        for rows in order.chunk(args.num_minibatches):
            minibatch = Batch(*(tensor[rows] for tensor in noisy_batch))
            gradients, minibatch_metrics = gradient_fn(agent, trained, args, minibatch)
            for p, gradient in zip(trained, gradients):
                p.grad = gradient
            optimizer.step()
            metrics.append(minibatch_metrics)
    return metrics


def train(envs, args, folder):
    torch.set_num_threads(1)  # the networks are too small to gain from more
    with make_env(args, args.seed) as env:  # for its spaces and its time limit
        torch.manual_seed(args.seed)  # initial weights
        agent = Agent(env, args)
        limit = getattr(env.spec, "max_episode_steps", None) or 0
    trained = [p for p in agent.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=args.learning_rate, eps=args.adam_eps, fused=True)

    # An edited script's own network or optimizer belongs here, too
    stateful = {"agent": agent, "optimizer": optimizer}
    stateful |= {"obs_stats": envs.obs_stats, "return_stats": envs.return_stats}
    checkpoint_path = folder / "checkpoint.pt"
    checkpoint = restore(stateful, args, folder)
    # Steps, rows of progress.csv, what was logged since the last row, and steps per second
    global_step, evaluations, history, speeds = checkpoint["progress"]
    envs.recent_episodes.extend(checkpoint["recent_episodes"])
    if args.track:
        import wandb

        # W&B keeps the run's id in `dir`, so that resume="auto" finds it
        options = {"config": vars(args), "sync_tensorboard": True, "resume": "auto"}
        wandb.init(project="symmetric-rl", name=folder.name, dir=folder, **options)
    writer = SummaryWriter(folder, purge_step=global_step + 1)

    batch_size = args.num_steps * args.num_envs
    begun = global_step
    obs = envs.reset([args.seed, global_step])
    gradient_fn = gradient_and_metrics
    if args.compile:
        gradient_fn = compiled(gradient_and_metrics, options={"cpp_wrapper": True})
    interval = args.checkpoint_freq or max(100_000, limit + args.num_steps)  # whole episodes
    interval *= args.num_envs
    print(f"{folder.name}: from step {global_step:,}, with a checkpoint every {interval:,} steps")
    bar = tqdm(total=args.total_timesteps, initial=global_step, unit=" steps", disable=None)

    while global_step < args.total_timesteps:
        started = time.perf_counter()
        # Seed and step determine all random numbers, so checkpoints hold no generators
        rng = np.random.default_rng([args.seed, global_step, 1])
        generator = torch.Generator().manual_seed(rng.integers(2**31).item())
        number = rng.integers(2**31).item()  # layers and environments may draw from these
        random.seed(number)
        np.random.seed(number)
        torch.default_generator.manual_seed(number)  # torch.manual_seed is slow
        batch, obs = collect(agent, args, envs, obs, rng, generator)
        global_step += batch_size
        bar.update(batch_size)

        metrics = update(agent, args, optimizer, gradient_fn, batch, rng, generator)
        # The first policy is almost uniform, so a mismatch shows only after an update: look twice
        rounding = 1e-8 + 1e-14 * batch.log_prob.mean() ** 2  # grows with |log p|
        if global_step <= begun + 2 * batch_size and metrics[0]["losses/approx_kl"] > rounding:
            message = "the policy that acts is not the one that is trained (dropout/memory?)"
            raise Failed(f"error: {message}")

        # Log
        scalars = means(metrics)
        if not math.isfinite(scalars["losses/grad_norm"]):
            raise Failed(f"error: gradient not finite, step {global_step} (rate? reward?)")
        # advantage = return - value
        unexplained = batch.advantage.numpy().var() / max(batch.returns.numpy().var(), 1e-8)
        scalars["losses/explained_variance"] = 1 - unexplained
        if envs.recent_episodes:  # means of the last 100
            score, length = np.mean(envs.recent_episodes, axis=0)
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
            seed = (args.seed + global_step) % 2**31
            with make_env(args, seed) as env:  # a new one, as in training
                scores, lengths, successes = evaluate(agent, args, envs.obs_stats, seed, env)
            evaluations.append(evaluation_row(global_step, scores, lengths, successes + history))
            history = []
            save_agent(agent, envs.obs_stats, evaluations, folder)
            writer.add_scalar("eval/return_mean", scores.mean(), global_step)
            tqdm.write(f"step {global_step:,}: return {scores.mean():.1f}")
        if finished or global_step % interval < batch_size:
            checkpoint = {name: part.state_dict() for name, part in stateful.items()}
            checkpoint["recent_episodes"] = list(envs.recent_episodes)
            checkpoint["progress"] = global_step, evaluations, history, speeds
            writer.flush()
            with atomic_write(checkpoint_path) as path:
                torch.save(checkpoint, path)
                load_checkpoint(path, "meta")  # checks only: an edit may save what can't be read
            obs = envs.reset([args.seed, global_step])  # ends episodes, as continuing does

    writer.close()
    summary = {name: x for name, x in evaluations[-1].items() if math.isfinite(x)}  # JSON lacks nan
    summary["sps"] = np.median(speeds)
    with atomic_write(folder / "summary.json") as path:  # last: marks the end
        path.write_text(json.dumps(summary, indent=2))


def evaluate(agent, args, obs_stats, seed, env):
    """Raw returns and lengths (eval_episodes,) of greedy episodes; successes if `info` has any."""
    # Wrappers outside of a TimeLimit may join episodes; others have no limit
    longest = max(args.checkpoint_freq or 100_000, getattr(env.spec, "max_episode_steps", 0) or 0)
    act = agent.actor_fn()
    returns = np.zeros(args.eval_episodes)
    lengths = np.zeros_like(returns)
    successes = []
    for episode in range(args.eval_episodes):
        # With seed + episode, runs with neighbouring seeds would share most initial states
        obs, _ = env.reset(seed=None if episode else seed)
        while lengths[episode] < longest:
            action, _ = act(obs_stats.normalize(np.array([obs], float)))
            obs, reward, terminated, truncated, info = env.step(agent.to_env(action)[0])
            returns[episode] += float(reward)  # as in training
            lengths[episode] += 1
            if terminated or truncated:
                break
        else:
            tqdm.write(f"warning: evaluation cut after {longest:,} steps; see --checkpoint-freq")
        if "is_success" in info:  # at the end
            successes.append(float(info["is_success"]))
    # Some environments say it only of a success
    rates = [{"success_rate": sum(successes) / args.eval_episodes}] if successes else []
    return returns, lengths, rates


# ---- Plumbing


def check(args):
    """Refuses arguments that contradict each other or are out of range. tyro prints the message."""

    def require(condition, message):
        if not condition:
            raise ValueError(message)

    counts = "total_timesteps eval_freq eval_episodes num_envs num_steps"
    for name in f"{counts} num_minibatches update_epochs".split():
        require(getattr(args, name) >= 1, f"{name} must be at least 1")
    weights = "alpha beta noise_level learning_rate adam_eps clip_coef vf_coef ent_coef"
    for name in f"seed checkpoint_freq {weights}".split():
        require(0 <= getattr(args, name) < math.inf, f"{name} must be finite and not negative")
    for name in "gamma", "gae_lambda":
        require(0 <= getattr(args, name) <= 1, f"{name} must be between 0 and 1")
    env_kwargs = None
    with suppress(ValueError):
        env_kwargs = json.loads(args.env_kwargs)
    require(isinstance(env_kwargs, dict), 'env_kwargs must be a JSON object, as {"delay": 5}')
    require(args.bins >= 2, "bins must be at least 2")
    require(min(args.hidden_sizes, default=1) >= 1, "hidden_sizes must be at least 1")
    require(args.seed < 2**63, "seed must be below 2**63")
    require(args.max_grad_norm > 0, "max_grad_norm must be positive; 1e9 turns clipping off")
    require(-math.inf < args.z < 0, "z stands for log 0: it must be negative and finite")
    require(args.alpha + args.beta > 0, "with alpha and beta 0 nothing trains the policy")
    require(math.isfinite(args.log_std_init), "log_std_init must be finite")
    if args.policy == "gaussian":
        require(args.beta == 0, "beta needs probabilities: --policy categorical, or --beta 0")
    require(args.noise != "none" or not args.noise_level, "noise_level needs a --noise")
    if args.noise == "adv_flip":
        require(args.noise_level <= 1, "noise_level is the probability of a flip, so at most 1")
    batch_size = args.num_envs * args.num_steps
    minibatch_size, rest = divmod(batch_size, args.num_minibatches)
    require(rest == 0, f"num_minibatches must divide the {batch_size} steps of a rollout")
    require(minibatch_size > 1 or not args.norm_adv, "norm_adv needs 2 or more steps a minibatch")


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
    torch._dynamo.config.trace_autograd_ops = True  # one graph for the gradient and the loss
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


def save_agent(agent, obs_stats, evaluations, folder):
    """Writes progress.csv, and agent.safetensors, weights and statistics."""
    with atomic_write(folder / "progress.csv") as path, open(path, "w", encoding="utf-8") as file:
        table = csv.DictWriter(file, means(evaluations), lineterminator="\n")  # all rows' names
        table.writeheader()
        table.writerows(evaluations)
    tensors = {f"obs_{name}": tensor for name, tensor in obs_stats.state_dict().items()}
    for name, tensor in agent.state_dict().items():
        # A copy, since safetensors refuses tensors that share memory or are not contiguous
        tensors[name] = tensor.clone(memory_format=torch.contiguous_format)
    tensors["action_bounds"] = torch.tensor(np.array([agent.low, agent.high]))
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
        prepare(args)
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
                with failure_noted(folder), closing(NormalizedEnvs(args)) as envs:
                    train(envs, args, folder)
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command continues from its last checkpoint, if any")
    summary = json.loads(summary_path.read_text())
    score = f"return {summary['return_mean']:.1f}, {summary['sps']:,.0f} steps/s"
    name = f"{args.runs_dir}/{folder.name}"  # as it was typed
    print(f"{name}: {score}; to play it: python enjoy.py {name}")


if __name__ == "__main__":
    main()
