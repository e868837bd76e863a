# SPDX-FileCopyrightText: 2026 The symmetric-rl-loss authors
# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10,<3.15"
# dependencies = ["torch>=2.11", "gymnasium[mujoco]>=1.2.3", "mujoco>=3.1.6", "numpy>=2.0",
#   "gymnasium[box2d]>=1.2.3; python_version < '3.14' and platform_machine != 'aarch64'",
#   "tyro>=1.0.16", "filelock>=3.24", "safetensors>=0.4.5", "tensorboard>=2.19", "tqdm>=4.66.5"]
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

SPPO differs from PPO in two lines, those with `reverse_loss = ` and `beta * reverse_loss`. Its
policy gradient is (alpha + beta |Z|) times PPO's. By default the factor acts only through Adam's
epsilon and the gradient clipping, which actor and critic share. Lr needs probabilities, so each
action dimension is discretised into bins, and p is the product over the dimensions.
"""

import csv
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
import warnings
from collections import deque
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import safetensors.torch
import torch
import tyro
from filelock import FileLock, Timeout
from gymnasium.wrappers import AddRenderObservation, RecordVideo
from torch import nn
from torch.distributions import Categorical, Independent, Normal
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    # Run
    env_id: str = "Hopper-v4"  # Gymnasium id; needs vector observations and bounded vector actions
    total_timesteps: int = 1_000_000  # environment steps, rounded up to whole rollouts
    seed: int = 1  # of all random numbers (the authors' runs: 10000, 10001, ...)
    exp_name: str | None = None  # name of the method in reports; default: the algorithm
    run_name: str | None = None  # folder of the run; default: main settings and a hash of all
    runs_dir: str = "runs"  # folder of all runs
    device: Literal["cpu", "cuda"] = "cpu"  # the networks are too small to gain from a GPU
    compile: bool = True  # compile the gradient (needs a C++ compiler): slower start, faster run
    checkpoint_freq: int = 100_000  # steps of each environment between checkpoints; all begin anew
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
    noise: Literal["none", "normal", "uniform", "adv_flip"] = "none"  # adv_flip: on advantages
    noise_level: float | None = None  # flip probability (default 0.1) or scale (default 0.05)
    # Evaluation
    evaluate: str | None = None  # folder of a run: play its agent instead of training
    eval_freq: int | None = None  # steps between evaluations; default: total / 20
    eval_episodes: int = 10  # episodes per evaluation: greedy actions, raw rewards without noise
    capture_video: bool = False  # record the first episode of each evaluation (pip install moviepy)

    def __post_init__(self):
        if self.beta is None:
            self.beta = 0.0 if self.policy == "gaussian" else 20.0
        if self.alpha is None:
            self.alpha = 0.5 if self.beta else 1.0
        if self.noise_level is None:
            self.noise_level = {"none": 0.0, "adv_flip": 0.1}.get(self.noise, 0.05)
        if self.eval_freq is None:
            self.eval_freq = max(1, self.total_timesteps // 20)
        if self.exp_name is None:
            self.exp_name = "ppo" if self.policy == "gaussian" else "sppo" if self.beta else "dppo"
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
        counts += " total_timesteps eval_freq eval_episodes checkpoint_freq hidden_sizes"
        for name in counts.split():
            require(np.min(getattr(self, name), initial=1) >= 1, f"{name} must be at least 1")
        for name in "seed alpha beta noise_level learning_rate clip_coef vf_coef ent_coef".split():
            require(0 <= getattr(self, name) < math.inf, f"{name} must be finite and not negative")
        for name in "gamma gae_lambda".split():
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
        require(self.bins >= 2, "bins must be at least 2")
        require(not self.beta or self.policy != "gaussian", "beta needs probabilities: use bins")
        require(not self.track or find_spec("wandb"), "track needs wandb: pip install wandb")
        require(not self.capture_video or find_spec("moviepy"), "for videos: pip install moviepy")

    def identity(self) -> dict:
        """What makes two runs the same: the script, the file of an environment MODULE:ID, and the
        arguments that may change results."""
        script = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
        others = "run_name runs_dir device compile track evaluate capture_video".split()
        kept = {name: value for name, value in vars(self).items() if name not in others}
        if ":" in self.env_id and (module := find_spec(self.env_id.split(":")[0])):
            kept["env_sha256"] = hashlib.sha256(Path(module.origin).read_bytes()).hexdigest()
        return json.loads(json.dumps({"script_sha256": script} | kept))  # tuples become lists

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.run_name.replace("/", "-").replace(":", "-")


def make_env(args, render=False):
    # Gymnasium warns that the paper's environments (MuJoCo v4) have newer versions, and of videos
    warnings.filterwarnings("ignore", message=".*(is out of date|Overwriting existing videos).*")
    if render and sys.platform == "linux" and "DISPLAY" not in os.environ:
        os.environ.setdefault("MUJOCO_GL", "egl")  # before MuJoCo is imported; needs no display
    options = {"render_mode": "rgb_array"} if render else {}  # some environments do not accept it
    env = gym.make(args.env_id, **options)
    if render:
        renderer = getattr(env.unwrapped, "mujoco_renderer", None)
        if renderer and renderer.camera_id == -1 and renderer.model.ncam:
            renderer.camera_id = 0  # it follows the agent; Gymnasium 1.4's default does not
    return env


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
            self.mean = self.mean + delta / self.count
            self.m2 = self.m2 + delta * (value - self.mean)
        self.std = np.sqrt(self.m2 / self.count + 1e-8)

    def normalize(self, obs):
        return ((obs - self.mean) / self.std).clip(-10, 10).astype(np.float32)

    def state_dict(self):
        return {name: torch.as_tensor(value) for name, value in vars(self).items()}

    def load_state_dict(self, state):
        vars(self).update({name: tensor.numpy() for name, tensor in state.items()})


class NormalizedEnvs:
    """Environments stepped one after the other, with autoreset in the same step.

    Observations are standardised by running statistics, rewards divided by the running standard
    deviation of the discounted return; both are clipped to [-10, 10], as in Stable-Baselines3's
    VecNormalize.
    """

    def __init__(self, args):
        self.args = args
        self.envs = [make_env(args) for _ in range(args.num_envs)]
        self.obs_stats = RunningStats()
        self.return_stats = RunningStats()
        self.recent_episodes = deque(maxlen=100)  # (return, length) of the last ones that ended

    def reset(self, seed):
        """Begins all episodes. Returns normalised observations (num_envs, obs_dim)."""
        self.close()  # and made anew: BipedalWalker keeps traces of its past
        self.envs = [make_env(self.args) for _ in self.envs]
        self.discounted_return = np.zeros(len(self.envs))
        self.episode_return = np.zeros(len(self.envs))  # so far, of raw rewards
        self.episode_length = np.zeros(len(self.envs))
        # With seed + i, runs with neighbouring seeds would share environments' seeds
        seeds = np.random.default_rng(seed).integers(2**31, size=len(self.envs)).tolist()
        self.obs = np.array([env.reset(seed=s)[0] for env, s in zip(self.envs, seeds)], float)
        self.obs_stats.update(self.obs)
        return self.obs_stats.normalize(self.obs)

    def step(self, action):
        """Steps all environments by `action` (num_envs, action_dim).

        Returns normalised observations (num_envs, obs_dim) and rewards (num_envs,), terminated,
        truncated, and {index: normalised final observation} of truncated episodes.
        """
        reward = np.zeros(len(self.envs))
        terminated, truncated = np.zeros((2, len(self.envs)), bool)
        for i, env in enumerate(self.envs):
            self.obs[i], reward[i], terminated[i], truncated[i], _ = env.step(action[i])
        self.episode_return += reward
        self.episode_length += 1
        self.discounted_return = self.args.gamma * self.discounted_return + reward
        self.return_stats.update(self.discounted_return)

        final_obs = {}
        for i in (terminated | truncated).nonzero()[0]:
            if not terminated[i]:
                final_obs[i] = self.obs_stats.normalize(self.obs[i])
            episode = (self.episode_return[i].item(), self.episode_length[i].item())
            self.recent_episodes.append(episode)
            self.episode_return[i] = 0
            self.episode_length[i] = 0
            self.discounted_return[i] = 0
            self.obs[i], _ = self.envs[i].reset()

        self.obs_stats.update(self.obs)
        reward = (reward / self.return_stats.std).clip(-10, 10)
        return self.obs_stats.normalize(self.obs), reward, terminated, truncated, final_obs

    def close(self):
        for env in self.envs:
            env.close()


def perturb_reward(reward, noise, level, rng):
    """Rewards of any shape with noise: normal adds N(0, level^2), uniform adds U(-level, level)."""
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
    for layer in layers:
        if args.ortho_init and isinstance(layer, nn.Linear):
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
        if self.gaussian:
            self.low, self.high = space.low, space.high
            self.output_shape = space.shape
            self.log_std = nn.Parameter(torch.full(space.shape, args.log_std_init))
        else:
            self.bin_values = np.linspace(space.low, space.high, args.bins, axis=1)
            self.output_shape = self.bin_values.shape  # (action_dim, bins)
        self.actor = mlp(obs_dim, math.prod(self.output_shape), 0.01, args)
        self.critic = mlp(obs_dim, 1, 1.0, args)

    def policy(self, obs):
        """Distribution of the joint action: log-probabilities are summed over its dimensions."""
        output = self.actor(obs).view(-1, *self.output_shape)
        if self.gaussian:
            distribution = Normal(output, self.log_std.exp(), validate_args=False)
        else:
            distribution = Categorical(logits=output, validate_args=False)
        return Independent(distribution, 1)

    def value(self, obs):
        return self.critic(obs).squeeze(-1)

    def exploration(self, shape, generator):
        """What `act` adds to sample: arrays (*shape, action_dim) or (*shape, action_dim, bins)."""
        draws = torch.empty(*shape, *self.output_shape)
        if self.gaussian:
            draws = self.log_std.exp().cpu() * draws.normal_(generator=generator)
        else:  # Gumbel-max trick: the arg max of logits + Gumbel draws is a sample
            draws = -draws.exponential_(generator=generator).log()
        return draws.detach().numpy()

    def actor_fn(self):
        """The actor as a function of NumPy arrays: `act(obs, exploration)` returns actions (batch,
        action_dim), bin indices or Gaussian values; without exploration, greedy ones."""
        forward = numpy_fn(self.actor)

        def act(obs, exploration=0.0):
            output = forward(obs).reshape(-1, *self.output_shape) + exploration
            return output if self.gaussian else output.argmax(-1)

        return act

    def to_env(self, action):
        """Converts actions from `act` to the environment's, (batch, action_dim)."""
        if self.gaussian:
            return action.clip(self.low, self.high)
        return self.bin_values[np.arange(len(self.bin_values)), action]


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


def gradient_and_metrics(agent, args, obs, action, old_log_prob, advantage, returns):
    """Clipped gradient of the loss on a minibatch, as one vector, and what to log."""
    normalized = advantage
    if args.norm_adv:
        normalized = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    policy = agent.policy(obs)
    log_prob = policy.log_prob(action).view_as(advantage)
    policy_loss, reverse_loss = symmetric_policy_losses(
        log_prob, old_log_prob, normalized, args.clip_coef, args.z
    )
    value_loss = (agent.value(obs).view_as(returns) - returns).square().mean()
    entropy = policy.entropy().mean()
    loss = args.alpha * policy_loss + args.beta * reverse_loss
    loss = loss + args.vf_coef * value_loss - args.ent_coef * entropy
    # Instead of backward() and clip_grad_norm_, so that torch.compile makes a single graph
    trained = [parameter for parameter in agent.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, trained, materialize_grads=True)  # 0 for unused ones
    gradient = torch.cat([g.flatten() for g in gradients])
    grad_norm = gradient.norm()
    scale = (args.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1)
    log_ratio = (log_prob - old_log_prob).detach()
    metrics = {
        "policy_loss": policy_loss.detach(),
        "reverse_loss": reverse_loss.detach(),
        "value_loss": value_loss.detach(),
        "entropy": entropy.detach(),
        "grad_norm": grad_norm,  # before clipping
        "clipped_gradients": (grad_norm > args.max_grad_norm).float(),
        "norm_sign_changes": ((normalized > 0) != (advantage > 0)).float().mean(),
        "approx_kl": (log_ratio.exp() - 1 - log_ratio).mean(),  # joschu.net/blog/kl-approx.html
        "clipfrac": ((log_ratio.exp() - 1).abs() > args.clip_coef).float().mean(),
    }
    return scale * gradient, metrics


def train(envs, args):
    torch.set_num_threads(1)  # the networks are too small to gain from more
    generator = torch.manual_seed(args.seed)  # initial weights, actions, minibatches, adv_flip
    rng = np.random.default_rng([args.seed, 1])  # reward noise
    agent = Agent(envs.envs[0], args).to(args.device)
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
        envs.obs_stats.load_state_dict(checkpoint["obs_stats"])
        envs.return_stats.load_state_dict(checkpoint["return_stats"])
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
    obs = np.zeros((T + 1, N, *envs.envs[0].observation_space.shape), np.float32)
    obs[T] = envs.reset([args.seed, global_step])
    reward = np.zeros((T, N))
    terminated, truncated = np.zeros((2, T, N), bool)
    bar = tqdm(total=args.total_timesteps, initial=global_step, unit=" steps", disable=None)
    gradient_fn = compiled(agent, args, obs) if args.compile else gradient_and_metrics

    while global_step < args.total_timesteps:
        # Rollout
        started = time.perf_counter()
        obs[0] = obs[T]
        final_obs = np.zeros_like(obs[1:])  # of truncated episodes
        act = agent.actor_fn()
        exploration = agent.exploration((T, N), generator)
        actions = []
        for t in range(T):
            actions.append(act(obs[t], exploration[t]))
            transition = envs.step(agent.to_env(actions[t]))
            obs[t + 1], reward[t], terminated[t], truncated[t], final = transition
            for i, one_obs in final.items():
                final_obs[t, i] = one_obs
        finite = np.isfinite(obs[1:] + final_obs).all((1, 2)) & np.isfinite(reward).all(1)
        if not finite.all():
            sys.exit(f"error: step {global_step + N * finite.argmin()}: obs or reward not finite")
        global_step += T * N
        bar.update(T * N)

        # Advantages, from one pass for all values. `b_` names are of the whole batch (T * N, ...)
        all_obs = torch.from_numpy(np.concatenate([obs, final_obs])).to(args.device).flatten(0, 1)
        b_obs = all_obs[: T * N]  # without each rollout's last and the final observations
        b_action = torch.from_numpy(np.concatenate(actions)).to(args.device)
        with torch.no_grad():
            values = agent.value(all_obs).view(2 * T + 1, N).cpu().numpy()
            b_log_prob = agent.policy(b_obs).log_prob(b_action).flatten()
        value, final_value = np.split(values, [T + 1])
        noisy_reward = perturb_reward(reward, args.noise, args.noise_level, rng)
        advantage, returns = compute_gae(
            noisy_reward, value, final_value, terminated, truncated, args.gamma, args.gae_lambda
        )
        b_advantage = torch.from_numpy(advantage).float().to(args.device).flatten()
        b_returns = torch.from_numpy(returns).float().to(args.device).flatten()

        # Update
        metrics = []
        for _ in range(args.update_epochs):
            epoch_advantage = b_advantage
            if args.noise == "adv_flip":
                epoch_advantage = perturb_advantage(b_advantage, args.noise_level, generator)
            batch = [b_obs, b_action, b_log_prob, epoch_advantage, b_returns]
            order = torch.randperm(T * N, generator=generator).to(args.device)
            chunks = [tensor[order].chunk(args.num_minibatches) for tensor in batch]
            for minibatch in zip(*chunks):  # `mb_`: of a minibatch
                gradient, mb_metrics = gradient_fn(agent, args, *minibatch)
                parameters.grad.copy_(gradient)
                optimizer.step()
                metrics.append(mb_metrics)
        if not parameters.isfinite().all():
            sys.exit(f"error: weights not finite at step {global_step}; lower the learning rate")
        if any(p.grad is None for p in trained):
            sys.exit("error: leave out zero_grad(), which drops the parameters' gradients")

        # Log
        scalars = {}
        for name in metrics[0]:
            scalars[f"losses/{name}"] = torch.stack([m[name] for m in metrics]).mean()
        unexplained = advantage.var() / max(returns.var(), 1e-8)  # advantage = return - value
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
            video = args.run_dir / "video" / f"step-{global_step}"
            scores, lengths = evaluate(agent, args, envs.obs_stats, args.seed + global_step, video)
            evaluation = {"return_mean": scores.mean(), "return_std": scores.std()}
            evaluation["length_mean"] = lengths.mean()
            evaluation |= {name: np.mean(logged) for name, logged in history.items()}
            history = {}
            evaluations.append({"step": global_step} | {k: float(x) for k, x in evaluation.items()})
            save_csv(args.run_dir / "progress.csv", evaluations)
            writer.add_scalar("eval/return_mean", evaluation["return_mean"], global_step)
            tqdm.write(f"step {global_step:,}: return {scores.mean():.1f}")
            tensors = {name: tensor.clone() for name, tensor in agent.state_dict().items()}
            tensors["obs_mean"] = torch.from_numpy(envs.obs_stats.mean)
            tensors["obs_std"] = torch.from_numpy(envs.obs_stats.std)
            with atomic_write(args.run_dir / "agent.safetensors") as path:
                path.write_bytes(safetensors.torch.save(tensors))
        if finished or global_step % (args.checkpoint_freq * N) < T * N:
            checkpoint = {
                "agent": agent.state_dict(),
                "optimizer": optimizer.state_dict(),
                "obs_stats": envs.obs_stats.state_dict(),
                "return_stats": envs.return_stats.state_dict(),
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
            obs[T] = envs.reset([args.seed, global_step])  # as when the run is continued

    writer.close()
    outcome = {"sps": global_step / seconds, "finished": True}
    save_json(args.run_dir / "summary.json", evaluations[-1] | outcome)  # last: marks the end


def evaluate(agent, args, obs_stats, seed, video):
    """Raw returns and lengths (eval_episodes,) of greedy episodes. `video`: path without suffix for
    a video of the first episode, if `args.capture_video`."""
    env = make_env(args, args.capture_video)  # anew, as in training
    if args.capture_video:
        env = RecordVideo(env, video.parent, lambda i: i == 0, name_prefix=video.name)
    act = agent.actor_fn()
    returns, lengths = np.zeros((2, args.eval_episodes))
    with closing(env):
        for episode in range(args.eval_episodes):
            # With seed + episode, runs with neighbouring seeds would share most initial states
            obs, _ = env.reset(seed=seed if episode == 0 else None)
            ended = False
            while not ended:
                action = agent.to_env(act(obs_stats.normalize(np.array([obs]))))[0]
                obs, reward, terminated, truncated, _ = env.step(action)
                returns[episode] += reward
                lengths[episode] += 1
                ended = terminated or truncated or lengths[episode] == 100_000  # if no time limit
    return returns, lengths


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
    tensors = safetensors.torch.load_file(folder / "agent.safetensors")
    obs_stats = RunningStats()
    obs_stats.load_state_dict({"mean": tensors.pop("obs_mean"), "std": tensors.pop("obs_std")})
    with closing(make_env(run, run.capture_video)) as env:  # tells the spaces
        agent = Agent(env, run)
    agent.load_state_dict(tensors)
    video = folder / "video" / f"evaluate-{run.seed}"
    scores, _ = evaluate(agent, run, obs_stats, run.seed, video)
    print(f"{folder}: return {scores.mean():.1f} (standard deviation {scores.std():.1f})")
    if run.capture_video:
        print(f"video: {video}-episode-0.mp4")


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
    """Compiles `gradient_and_metrics` by a call on a minibatch like those to come, before training
    is timed. Returns it uncompiled if that fails. `obs` (T + 1, N, obs_dim)."""
    n = args.num_envs * args.num_steps // args.num_minibatches
    mb_obs = obs.reshape(-1, obs.shape[-1])[:n]
    mb_action = agent.actor_fn()(mb_obs)
    tensors = [torch.from_numpy(mb_obs), torch.from_numpy(mb_action), *torch.zeros(3, n)]
    try:
        torch._dynamo.config.trace_autograd_ops = True  # one graph for the gradient and the loss
        options = {"cpp_wrapper": args.device == "cpu"}  # cheaper calls; not tried on a GPU
        gradient_fn = torch.compile(gradient_and_metrics, options=options)
        gradient_fn(agent, args, *[tensor.to(args.device) for tensor in tensors])
        return gradient_fn
    except Exception as error:  # any exception is possible here, without a C++ compiler for one
        tqdm.write(f"torch.compile failed, continuing without: {error!r:.200}", file=sys.stderr)
        return gradient_and_metrics


def numpy_fn(network):
    """`network` as a function of NumPy arrays (batch, inputs), to be made anew after an update.
    Linear, Tanh and ReLU in a Sequential are computed in NumPy, which for a single observation
    takes a third of PyTorch's time; any other network in PyTorch."""

    @torch.no_grad()
    def in_torch(x):
        device = next(network.parameters()).device
        return network(torch.from_numpy(x).to(device)).numpy(force=True)

    layers = []
    for layer in network if type(network) is nn.Sequential else [network]:
        parameters = [p.numpy(force=True) for p in layer.parameters()]
        if type(layer) not in (nn.Linear, nn.Tanh, nn.ReLU) or len(parameters) == 1:  # no bias
            return in_torch
        layers.append((type(layer), parameters))

    def in_numpy(x):
        for kind, parameters in layers:
            if kind is nn.Linear:
                weight, bias = parameters
                x = x.dot(weight.T) + bias
            else:
                x = np.tanh(x) if kind is nn.Tanh else np.maximum(x, 0)
        return x

    return in_numpy


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
    packages = "gymnasium mujoco numpy".split()  # MuJoCo may be missing
    commit = None
    if shutil.which("git"):
        command = ["git", "-C", script.parent, "describe", "--always", "--dirty", "--abbrev=40"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    versions = {d.name: d.version for d in distributions() if d.name in packages}
    return {
        "script": script.name,
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "commit": commit,
        "versions": {"torch": torch.__version__} | versions,
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
    with closing(make_env(args, args.capture_video)) as env:  # before a folder is made
        for space in (env.observation_space, env.action_space):
            if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
                sys.exit(f"error: {args.env_id}: {space} is no vector; see docs/copy-and-modify.md")
        bound = np.abs([space.low, space.high]).max()  # of actions; float's maximum stands for none
        if space.dtype.kind != "f" or (args.policy == "categorical" and bound > 1e30):
            sys.exit(f"error: {args.env_id}: needs float actions, bounded unless --policy gaussian")
        if args.capture_video:
            AddRenderObservation(env)  # raises unless it renders pictures
    args.run_dir.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(args.run_dir / "lock", blocking=False).acquire()
    except Timeout:
        sys.exit(f"error: another process is at work on this run, or delete {args.run_dir}/lock")
    except OSError as error:
        sys.exit(f"error: cannot lock {args.run_dir} ({error.strerror}); use another --runs-dir")
    try:
        with lock, closing(NormalizedEnvs(args)) as envs:  # after errors and Ctrl-C, too
            if begin(args):
                train(envs, args)
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
