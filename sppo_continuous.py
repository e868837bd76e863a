# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch==2.13.0", "gymnasium[mujoco,box2d]==1.4.0", "mujoco==4.0.0", "numpy>=2.0", "tyro==1.0.16",
#   "tensorboard==2.21.0", "tqdm==4.70.1",
# ]
# ///
"""Symmetric PPO (SPPO) for continuous control, whole: from the environment to the learning curve.

    python sppo_continuous.py --env-id Hopper-v4                      # SPPO, 11 bins in each action dimension
    python sppo_continuous.py --env-id Hopper-v4 --noise normal       # the same, learning from noisy rewards
    python sppo_continuous.py --env-id Hopper-v4 --policy gaussian    # the baseline: PPO with a Gaussian policy
    python sppo_continuous.py --resume runs/NAME                      # go on with an interrupted run

From "Symmetric Reinforcement Learning Loss for Robust Learning on Diverse Tasks and Model Scales" (Byun &
Perrault, ICML 2025, arXiv 2405.17618). With p = pi(a|s) for the action taken, p_old the same when it was
sampled, r = p / p_old, its advantage A, and Z < 0 in the place of log 0:

    PPO loss          L  = -mean( min(A r, A clip(r, 1 - eps, 1 + eps)) )
    reverse PPO loss  Lr = -mean( m A Z (1 - p) / p_old ),  m = 1 where the gradient of L flows, else 0
    symmetric loss    alpha L + beta Lr

The gradient of Lr is |Z| times that of L, so SPPO's policy gradient is (alpha + beta |Z|) times PPO's. What
changes is its weight against the value loss, the entropy bonus and the limit on the gradient norm. Lr needs
probabilities, hence the bins; the probability of an action is the product over its dimensions.

A run writes runs/NAME/: TensorBoard events, args.json, progress.csv (the evaluations), checkpoint.pt and, when
it has finished, summary.json. Defaults are the paper's settings; Humanoid-v4 has its own there:

    python sppo_continuous.py --env-id Humanoid-v4 --total-timesteps 10000000 --num-steps 512 \
        --num-minibatches 2 --update-epochs 5 --gamma 0.95 --learning-rate 3.5e-5 --ent-coef 0.002 \
        --clip-coef 0.3 --hidden-sizes 256 256 --activation relu --no-ortho-init --log-std-init -2
"""

import dataclasses
import importlib
import io
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import mujoco
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    env_id: str = "Hopper-v4"  # Gymnasium id; observations and actions are vectors, actions bounded
    total_timesteps: int = 1_000_000  # environment steps in all, rounded up to whole rollouts
    seed: int = 1  # of everything random (the paper's runs: 10000, 10001, ...)
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the CPU, the faster one for networks this small
    compile: bool = True  # compile the gradient step, where there is a C++ compiler: starts later, runs 1.5x faster
    runs_dir: str = "runs"  # folder of all runs
    run_name: str | None = None  # folder of this run; default: environment, algorithm, noise, seed and time
    resume: str | None = None  # folder of an interrupted run to go on with, under the flags it was started with
    checkpoint_freq: int | None = None  # steps between checkpoints; default: a twentieth of the run; 0: at its end
    track: bool = False  # log to Weights & Biases as well (pip install wandb)

    policy: Literal["categorical", "gaussian"] = "categorical"  # gaussian: plain PPO, the baseline
    bins: int = 11  # values of each action dimension, evenly spaced from lowest to highest
    num_envs: int = 1  # environments, stepped in turn
    num_steps: int = 2048  # steps of each environment between updates
    num_minibatches: int = 32  # parts that a rollout is split into
    update_epochs: int = 10  # passes over a rollout
    learning_rate: float = 3e-4  # of Adam, constant
    adam_eps: float = 1e-5  # epsilon of Adam
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.95  # lambda of generalised advantage estimation
    clip_coef: float = 0.2  # epsilon of the clip range
    norm_adv: bool = True  # normalise advantages in each minibatch
    vf_coef: float = 0.5  # weight of the value loss
    ent_coef: float = 0.0  # weight of the entropy bonus
    max_grad_norm: float = 0.5  # limit on the norm of the gradient of all parameters together

    hidden_sizes: tuple[int, ...] = (64, 64)  # hidden layers of the actor and, apart from it, of the critic
    activation: Literal["tanh", "relu"] = "tanh"  # after each hidden layer
    layer_norm: bool = False  # layer normalisation before each activation
    ortho_init: bool = True  # orthogonal initial weights; else PyTorch's own
    log_std_init: float = 0.0  # initial log standard deviation of the Gaussian policy

    alpha: float | None = None  # weight of the PPO loss; default: 0.5, with the Gaussian policy 1
    beta: float | None = None  # weight of the reverse loss; default: 20, with the Gaussian policy 0
    z: float = -1.0  # Z, which stands for log 0

    noise: Literal["none", "flip", "normal", "uniform", "adv_flip"] = "none"  # on training rewards or advantages
    noise_level: float | None = None  # probability of a flip (default 0.1) or size of the noise (default 0.05)

    eval_freq: int | None = None  # steps between evaluations; default: a twentieth of the run; 0: at its end
    eval_episodes: int = 10  # episodes in an evaluation: greedy actions, raw rewards without noise
    capture_video: bool = False  # film the first episode of each evaluation (pip install moviepy)

    @property
    def algo(self) -> str:
        return "ppo" if self.policy == "gaussian" else "sppo" if self.beta else "dppo"


def make_env(env_id: str, video_dir: Path | None = None) -> gym.Env:
    """An environment; with `video_dir`, one that films its episodes into that folder."""
    # The paper's environments are MuJoCo's v4; that they are old is no news to whoever asks for them.
    warnings.filterwarnings("ignore", message=".*is out of date.*")
    mujoco.set_mju_user_warning(lambda text: "is deprecated" in text or print(text, file=sys.stderr))
    if video_dir is None:
        return gym.make(env_id)
    env = gym.make(env_id, render_mode="rgb_array")
    return gym.wrappers.RecordVideo(env, str(video_dir), episode_trigger=lambda episode: True)


class RunningStats:
    """Mean and population standard deviation of all values seen, in float64 (Welford 1962)."""

    def __init__(self, shape: tuple[int, ...]):
        self.count, self.mean, self.m2 = 0, np.zeros(shape), np.zeros(shape)

    def update(self, batch: np.ndarray) -> None:
        for value in batch:
            self.count += 1
            delta = value - self.mean
            self.mean = self.mean + delta / self.count
            self.m2 = self.m2 + delta * (value - self.mean)

    def std(self) -> np.ndarray:
        return np.sqrt(self.m2 / max(self.count, 1) + 1e-8)


class NormalizedEnvs:
    """`num_envs` environments, stepped in turn, normalised like Stable-Baselines3's VecNormalize.

    Observations are standardised with running statistics. Rewards are divided by the running standard deviation
    of the discounted return, not centred. Both are clipped to [-10, 10]. When an episode ends, the next one
    starts in the same step. `finished`: (return, length) of the last 100 episodes, in raw rewards.
    """

    def __init__(self, env_id: str, num_envs: int, gamma: float):
        self.envs, self.gamma = [make_env(env_id) for _ in range(num_envs)], gamma
        self.obs_stats = RunningStats(self.envs[0].observation_space.shape)
        self.return_stats = RunningStats(())
        self.finished = deque(maxlen=100)

    def normalize_obs(self, obs: np.ndarray) -> np.ndarray:
        return ((obs - self.obs_stats.mean) / self.obs_stats.std()).clip(-10, 10).astype(np.float32)

    def reset(self, seed: int) -> np.ndarray:
        """Starts an episode in every environment. Returns normalised observations (num_envs, obs_dim)."""
        self.obs = np.stack([env.reset(seed=seed + i)[0] for i, env in enumerate(self.envs)]).astype(float)
        self.obs_stats.update(self.obs)
        self.episode_return, self.discounted_return, self.episode_length = np.zeros((3, len(self.envs)))
        return self.normalize_obs(self.obs)

    def step(self, action: np.ndarray):
        """Steps all environments by `action` (num_envs, action_dim).

        Returns normalised observations (num_envs, obs_dim), normalised rewards, terminated and truncated
        (num_envs,), and {index: normalised last observation} of the environments that were truncated.
        """
        reward, final_obs = np.zeros(len(self.envs)), {}
        terminated, truncated = np.zeros((2, len(self.envs)), bool)
        for i, env in enumerate(self.envs):
            self.obs[i], reward[i], terminated[i], truncated[i], _ = env.step(action[i])
        self.episode_return += reward
        self.episode_length += 1
        self.discounted_return = self.gamma * self.discounted_return + reward
        self.return_stats.update(self.discounted_return)
        for i in np.flatnonzero(terminated | truncated):
            if not terminated[i]:
                final_obs[i] = self.obs[i].copy()
            self.finished.append((float(self.episode_return[i]), int(self.episode_length[i])))
            self.episode_return[i] = self.discounted_return[i] = self.episode_length[i] = 0
            self.obs[i], _ = self.envs[i].reset()
        self.obs_stats.update(self.obs)
        final_obs = {i: self.normalize_obs(obs) for i, obs in final_obs.items()}
        reward = (reward / self.return_stats.std()).clip(-10, 10)
        return self.normalize_obs(self.obs), reward, terminated, truncated, final_obs


def perturb_reward(reward: np.ndarray, noise: str, level: float, rng: np.random.Generator) -> np.ndarray:
    """Rewards, of any shape, as a noisy judge gives them.

    flip: r -> 1 - r with probability `level`; normal: r + N(0, level^2); uniform: r + U(-level, level).
    """
    if noise == "flip":
        return np.where(rng.random(reward.shape) < level, 1 - reward, reward)
    if noise == "normal":
        return reward + rng.normal(0, level, reward.shape)
    if noise == "uniform":
        return reward + rng.uniform(-level, level, reward.shape)
    return reward


def perturb_advantage(advantage: torch.Tensor, level: float, generator: torch.Generator) -> torch.Tensor:
    """Advantages, of any shape, each with its sign flipped with probability `level`."""
    flip = torch.rand(advantage.shape, generator=generator, device=advantage.device) < level
    return torch.where(flip, -advantage, advantage)


def mlp(in_dim: int, out_dim: int, out_gain: float, args: Args) -> nn.Sequential:
    """Multi-layer perceptron; orthogonal weights of gain sqrt(2), in the last layer `out_gain`; zero biases."""
    layers, widths = [], (in_dim, *args.hidden_sizes, out_dim)
    for i in range(1, len(widths)):
        last = i == len(widths) - 1
        layers.append(nn.Linear(widths[i - 1], widths[i]))
        if args.ortho_init:
            nn.init.orthogonal_(layers[-1].weight, out_gain if last else math.sqrt(2))
            nn.init.zeros_(layers[-1].bias)
        if not last:
            layers += [nn.LayerNorm(widths[i])] if args.layer_norm else []
            layers += [nn.Tanh() if args.activation == "tanh" else nn.ReLU()]
    return nn.Sequential(*layers)


class Agent(nn.Module):
    """Actor and critic, which share nothing.

    Categorical: each action dimension takes one of `bins` values; the actor gives logits (batch, action_dim, bins)
    and an action is the indices of the values. Gaussian: the actor gives means (batch, action_dim), the standard
    deviations are parameters of their own, and the environment gets actions clipped to their bounds.
    """

    def __init__(self, env: gym.Env, args: Args):
        super().__init__()
        (obs_dim,), space, self.gaussian = env.observation_space.shape, env.action_space, args.policy == "gaussian"
        self.values = np.linspace(space.low, space.high, args.bins, axis=1)  # (action_dim, bins)
        self.actor_shape = space.shape if self.gaussian else self.values.shape
        self.actor = mlp(obs_dim, math.prod(self.actor_shape), 0.01, args)
        self.critic = mlp(obs_dim, 1, 1.0, args)
        if self.gaussian:
            self.log_std = nn.Parameter(torch.full(space.shape, args.log_std_init))

    def policy(self, obs):
        return self.actor(obs).view(-1, *self.actor_shape)

    def value(self, obs):
        return self.critic(obs).squeeze(-1)

    def sampling_noise(self, *batch: int, generator: torch.Generator) -> torch.Tensor:
        """What makes a sample of the actor's output: Gumbel noise for arg max, or standard normal."""
        noise = torch.empty(*batch, *self.actor_shape, device=generator.device)
        return noise.normal_(generator=generator) if self.gaussian else -noise.exponential_(generator=generator).log()

    def act(self, obs, noise):
        """Actions (batch, action_dim): sampled with `sampling_noise`, greedy with 0."""
        policy = self.policy(obs)
        return policy + self.log_std.exp() * noise if self.gaussian else (policy + noise).argmax(-1)

    def to_env(self, action: np.ndarray) -> np.ndarray:
        bounds = self.values[:, 0], self.values[:, -1]
        return action.clip(*bounds) if self.gaussian else self.values[np.arange(len(self.values)), action]

    def log_prob(self, policy, action):
        """Of the joint action, (batch,): summed over its dimensions."""
        if self.gaussian:
            standardized = (action - policy) * (-self.log_std).exp()
            return -(0.5 * standardized.square() + self.log_std + 0.5 * math.log(2 * math.pi)).sum(-1)
        return policy.log_softmax(-1).gather(-1, action.unsqueeze(-1)).squeeze(-1).sum(-1)

    def entropy(self, policy):
        if self.gaussian:
            return (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum().expand(len(policy))
        log_p = policy.log_softmax(-1)
        return -(log_p.exp() * log_p).sum((-2, -1))


def symmetric_policy_loss(log_prob, old_log_prob, advantage, clip_coef, alpha, beta, z):
    """alpha * PPO loss + beta * reverse PPO loss, a scalar to minimise (arXiv 2405.17618).

    Tensors (batch,): `log_prob`, `old_log_prob`: log pi(a|s) of the joint action taken, now and when it was
    sampled; `advantage`: its advantage. Numbers: `clip_coef`: PPO's epsilon; `alpha`, `beta` >= 0; `z` < 0.

    (1 - p) / p_old is written 1 / p_old - r. The first term has no gradient but grows with the dimension of the
    action, in float32 to infinity (log p_old < -88): judge this loss by its gradient, not by its value.
    """
    ratio = (log_prob - old_log_prob).exp()
    surrogate = advantage * ratio
    clipped = advantage * ratio.clamp(1 - clip_coef, 1 + clip_coef)
    unclipped = surrogate <= clipped  # m: where PPO's gradient flows
    objective = alpha * torch.where(unclipped, surrogate, clipped)
    if beta:  # all that symmetric PPO adds to PPO
        reverse = advantage * z * ((-old_log_prob).exp() - ratio)
        objective = objective + beta * torch.where(unclipped, reverse, 0.0)
    return -objective.mean()


def compute_gae(reward, value, final_value, terminated, truncated, gamma, gae_lambda):
    """Advantages and returns, (T, N), by generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438).

    Arrays of T steps in N environments: `reward`, `terminated`, `truncated` (T, N); `value` (T + 1, N): of the
    observations before each step and after the last; `final_value` (T, N): where an episode was truncated, the
    value of its last observation. After termination nothing follows; a truncated episode would have gone on.
    """
    next_value = np.where(truncated, final_value, value[1:]) * ~terminated
    delta = reward + gamma * next_value - value[:-1]
    decay = gamma * gae_lambda * ~(terminated | truncated)
    advantage, following = np.zeros_like(delta), 0.0
    for t in reversed(range(len(delta))):
        advantage[t] = following = delta[t] + decay[t] * following
    return advantage, advantage + value[:-1]


def loss_gradient(agent, args, obs, action, old_log_prob, advantage, returns):
    """Gradient of the loss as one vector, clipped, and its norm before; tensors of a minibatch, (batch, ...)."""
    policy = agent.policy(obs)
    log_prob, symmetric = agent.log_prob(policy, action), (args.alpha, args.beta, args.z)
    loss = symmetric_policy_loss(log_prob, old_log_prob, advantage, args.clip_coef, *symmetric)
    loss = loss + args.vf_coef * F.mse_loss(agent.value(obs), returns)
    if args.ent_coef:
        loss = loss - args.ent_coef * agent.entropy(policy).mean()
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(agent.parameters()))])
    norm = gradient.norm()
    return gradient * (args.max_grad_norm / (norm + 1e-6)).clamp(max=1), norm


@torch.no_grad()
def diagnose(agent, args, obs, action, old_log_prob, advantage, returns) -> dict[str, float]:
    """Losses and distances of the agent after an update, over the whole rollout; tensors (batch, ...)."""
    policy = agent.policy(obs)
    log_prob = agent.log_prob(policy, action)
    ratio = (log_prob - old_log_prob).exp()
    if args.norm_adv:
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    flows = advantage * ratio <= advantage * ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    scalars = {
        "policy": symmetric_policy_loss(log_prob, old_log_prob, advantage, args.clip_coef, 1.0, 0.0, args.z),
        # without its constant, A Z / p_old, which has no gradient and would drown the rest
        "reverse": torch.where(flows, args.z * advantage * ratio, 0.0).mean(),
        "value": F.mse_loss(agent.value(obs), returns),
        "entropy": agent.entropy(policy).mean(),
        "approx_kl": (ratio - 1 - (log_prob - old_log_prob)).mean(),  # k3 of joschu.net/blog/kl-approx.html
        "clip_fraction": ((ratio - 1).abs() > args.clip_coef).float().mean(),
    }
    return {f"losses/{name}": scalar.item() for name, scalar in scalars.items()}


@torch.inference_mode()
def evaluate(agent: Agent, envs: list[gym.Env], training_envs: NormalizedEnvs, seed: int) -> dict[str, float]:
    """One episode in each of `envs`: greedy actions, raw rewards, no noise; training statistics stay as they are."""
    device = next(agent.parameters()).device
    obs = np.stack([env.reset(seed=seed + i)[0] for i, env in enumerate(envs)]).astype(float)
    returns, lengths, running = np.zeros(len(envs)), np.zeros(len(envs)), list(range(len(envs)))
    while running:
        normalized = torch.from_numpy(training_envs.normalize_obs(obs[running])).to(device)
        action, still_running = agent.to_env(agent.act(normalized, 0.0).cpu().numpy()), []
        for i, env_action in zip(running, action):
            obs[i], reward, terminated, truncated, _ = envs[i].step(env_action)
            returns[i] += reward
            lengths[i] += 1
            still_running += [] if terminated or truncated else [i]
        running = still_running
    scores = {"return_mean": returns.mean(), "return_std": returns.std(), "length_mean": lengths.mean()}
    return {name: float(score) for name, score in scores.items()} | {"episodes": len(envs)}


def save(path: Path, content: str | bytes) -> None:
    """Writes a temporary file and renames it, so that an interruption leaves the old content or the new."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, path)


def save_progress(path: Path, evaluations: list[dict]) -> None:
    rows = [",".join(map(str, evaluation.values())) for evaluation in evaluations]
    save(path, "\n".join(["step,return_mean,return_std,length_mean,episodes", *rows, ""]))


def describe_machine() -> dict:
    """What it takes, beside the arguments, to judge or repeat a run."""
    git = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty", "--abbrev=40"]
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "gymnasium", "mujoco")}
    hardware = {"platform": platform.platform(), "cpu": torch.backends.cpu.get_cpu_capability(), "cores": os.cpu_count()}
    hardware["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    versions["python"] = platform.python_version()
    return {"command": sys.argv, "versions": versions, "hardware": hardware, "commit": commit}


def train(args: Args, stop: threading.Event) -> dict | None:
    """A run, with arguments from `prepare`. Returns the content of summary.json; None if `stop` was set early."""
    started = time.perf_counter()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # the networks are too small to be shared among cores
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if args.device == "cuda" else "cpu")
    generator = torch.Generator(device).manual_seed(args.seed)  # for actions, minibatches, flips of advantages
    rng = np.random.default_rng(args.seed)  # for noise on rewards
    run_dir = Path(args.resume or Path(args.runs_dir) / args.run_name)

    envs = NormalizedEnvs(args.env_id, args.num_envs, args.gamma)
    eval_envs = [make_env(args.env_id) for _ in range(args.eval_episodes)]
    if args.capture_video:
        eval_envs[0] = make_env(args.env_id, run_dir / "videos")
    agent = Agent(eval_envs[0], args).to(device)
    parameters = parameters_to_vector(agent.parameters()).detach()
    vector_to_parameters(parameters, agent.parameters())  # now views of this vector: Adam is one operation
    optimizer = torch.optim.Adam([parameters], lr=args.learning_rate, eps=args.adam_eps, fused=True)
    torch._dynamo.config.trace_autograd_ops = True  # compiles the gradient into one graph with the loss
    gradient_fn = torch.compile(loss_gradient) if args.compile else loss_gradient

    global_step, evaluations, train_seconds, wall_seconds = 0, [], 0.0, 0.0
    if args.resume:
        state = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=False)
        agent.load_state_dict(state["agent"])
        optimizer.load_state_dict(state["optimizer"])
        vars(envs.obs_stats).update(state["obs_stats"])
        vars(envs.return_stats).update(state["return_stats"])
        envs.finished = state["finished"]
        generator.set_state(state["generator"])
        rng.bit_generator.state = state["rng"]
        global_step, evaluations = state["global_step"], state["evaluations"]
        train_seconds, wall_seconds = state["train_seconds"], state["wall_seconds"]
        save_progress(run_dir / "progress.csv", evaluations)  # without those from after the checkpoint
    else:
        save(run_dir / "args.json", json.dumps({"args": vars(args)} | describe_machine(), indent=2))
    if args.track:
        wandb = importlib.import_module("wandb")
        wandb.init(project="symmetric-rl", id=args.run_name, resume="allow", config=vars(args), sync_tensorboard=True)
    writer = SummaryWriter(run_dir, purge_step=global_step + 1)

    T, N = args.num_steps, args.num_envs
    obs = np.zeros((T + 1, N, *envs.obs_stats.mean.shape), np.float32)
    action = np.zeros((T, N, len(agent.values)), np.float32 if agent.gaussian else np.int64)
    (reward, final_value), (terminated, truncated) = np.zeros((2, T, N)), np.zeros((2, T, N), bool)
    obs[T] = envs.reset(seed=args.seed + global_step)  # after resuming too: a simulator's state is not saved
    progress_bar = tqdm(total=args.total_timesteps, initial=global_step, unit=" steps", disable=None)
    while global_step < args.total_timesteps:
        iteration_started = time.perf_counter()

        # Rollout
        obs[0] = obs[T]
        noise = agent.sampling_noise(T, N, generator=generator)
        with torch.inference_mode():
            for t in range(T):
                action[t] = agent.act(torch.from_numpy(obs[t]).to(device), noise[t]).cpu().numpy()
                env_action = agent.to_env(action[t])
                obs[t + 1], reward[t], terminated[t], truncated[t], final_obs = envs.step(env_action)
                for i, last_obs in final_obs.items():
                    final_value[t, i] = agent.value(torch.from_numpy(last_obs).to(device)).item()
        global_step += T * N

        # Advantages; values and log-probabilities at one go, since the agent stood still during the rollout
        batch_obs = torch.from_numpy(obs).to(device)
        batch_action = torch.from_numpy(action).to(device).flatten(0, 1)
        with torch.no_grad():
            value = agent.value(batch_obs).cpu().numpy()
            batch_obs = batch_obs[:T].flatten(0, 1)
            old_log_prob = agent.log_prob(agent.policy(batch_obs), batch_action)
        noisy_reward = perturb_reward(reward, args.noise, args.noise_level, rng)
        gae = compute_gae(noisy_reward, value, final_value, terminated, truncated, args.gamma, args.gae_lambda)
        advantage, returns = (torch.as_tensor(x, dtype=torch.float32, device=device).flatten() for x in gae)

        # Update
        grad_norms, sign_flips = [], []
        for _ in range(args.update_epochs):
            order = torch.randperm(T * N, generator=generator, device=device).view(args.num_minibatches, -1)
            mb_advantage = advantage[order]  # all minibatches at once: (minibatch, sample)
            if args.noise == "adv_flip":
                mb_advantage = perturb_advantage(mb_advantage, args.noise_level, generator)
            if args.norm_adv:
                mean, std = mb_advantage.mean(1, keepdim=True), mb_advantage.std(1, keepdim=True)
                sign_flips.append(((mb_advantage > 0) != (mb_advantage > mean)).float().mean())
                mb_advantage = (mb_advantage - mean) / (std + 1e-8)
            for minibatch in zip(
                batch_obs[order], batch_action[order], old_log_prob[order], mb_advantage, returns[order]
            ):
                parameters.grad, grad_norm = gradient_fn(agent, args, *minibatch)
                optimizer.step()
                grad_norms.append(grad_norm)
        train_seconds += time.perf_counter() - iteration_started

        # Logging
        scalars = diagnose(agent, args, batch_obs, batch_action, old_log_prob, advantage, returns)
        scalars["losses/grad_norm"] = torch.stack(grad_norms).mean().item()  # before clipping
        scalars["losses/explained_variance"] = 1 - np.var(gae[0]) / np.var(gae[1])
        scalars["losses/advantage_sign_flips"] = torch.tensor(sign_flips or [0.0]).mean().item()
        scalars["losses/advantage_largest"] = advantage.abs().max().item()
        scalars["charts/SPS"] = global_step / train_seconds
        if envs.finished:
            scalars["charts/episodic_return"], scalars["charts/episodic_length"] = np.mean(envs.finished, axis=0)
            progress_bar.set_postfix_str(f"return {scalars['charts/episodic_return']:.1f}")
        for name, scalar in scalars.items():
            writer.add_scalar(name, scalar, global_step)
        progress_bar.update(min(T * N, args.total_timesteps - progress_bar.n))
        if not math.isfinite(scalars["losses/grad_norm"]):
            sys.exit(f"error: gradient not finite at step {global_step}; lower --learning-rate or --beta")

        # Evaluation and checkpoint, when a multiple of their frequency has been passed
        finished, stopping = global_step >= args.total_timesteps, stop.is_set()
        due = [freq > 0 and global_step % freq < T * N for freq in (args.eval_freq, args.checkpoint_freq)]
        if due[0] or finished:
            evaluations.append({"step": global_step} | evaluate(agent, eval_envs, envs, args.seed + global_step))
            save_progress(run_dir / "progress.csv", evaluations)
            writer.add_scalar("eval/return_mean", evaluations[-1]["return_mean"], global_step)
        if due[1] or finished or stopping:
            state = {
                "agent": agent.state_dict(), "optimizer": optimizer.state_dict(), "finished": envs.finished,
                "obs_stats": vars(envs.obs_stats), "return_stats": vars(envs.return_stats),
                "generator": generator.get_state(), "rng": rng.bit_generator.state,
                "global_step": global_step, "evaluations": evaluations, "train_seconds": train_seconds,
                "wall_seconds": wall_seconds + time.perf_counter() - started,
            }  # fmt: skip
            torch.save(state, buffer := io.BytesIO())
            save(run_dir / "checkpoint.pt", buffer.getvalue())
        if stopping and not finished:
            return None

    names = "algo env_id seed noise noise_level alpha beta z total_timesteps".split()
    summary = {"script": Path(__file__).name} | {name: getattr(args, name) for name in names} | {
        "final_return_mean": evaluations[-1]["return_mean"], "final_return_std": evaluations[-1]["return_std"],
        "train_return_last100": scalars.get("charts/episodic_return", math.nan),
        "sps": global_step / train_seconds, "wall_s": state["wall_seconds"], "finished": True,
    }  # fmt: skip
    save(run_dir / "summary.json", json.dumps(summary, indent=2))
    return summary


def saved_args(run_dir: str) -> Args:
    """The flags of the run in that folder. Raises ValueError unless it can go on."""
    for name in ("args.json", "checkpoint.pt"):
        if not (Path(run_dir) / name).is_file():
            raise ValueError(f"--resume {run_dir}: no {name} there; give the folder of an interrupted run")
    if (Path(run_dir) / "summary.json").is_file():
        raise ValueError(f"--resume {run_dir}: this run has finished")
    saved = json.loads((Path(run_dir) / "args.json").read_text())["args"]
    return Args(**(saved | {"hidden_sizes": tuple(saved["hidden_sizes"]), "resume": run_dir}))


def prepare(args: Args) -> Args:
    """Checks the arguments, fills in the defaults that depend on others and makes the folder of the run.

    Raises ValueError with one line that says what is wrong and what to do.
    """
    gaussian, twentieth = args.policy == "gaussian", max(1, args.total_timesteps // 20)
    defaults = {
        "alpha": 1.0 if gaussian else 0.5, "beta": 0.0 if gaussian else 20.0,
        "noise_level": {"none": 0.0, "normal": 0.05, "uniform": 0.05}.get(args.noise, 0.1),
        "eval_freq": twentieth, "checkpoint_freq": twentieth,
    }  # fmt: skip
    args = dataclasses.replace(args, **{k: v for k, v in defaults.items() if getattr(args, k) is None})
    stamp = f"{args.env_id}__{args.algo}__{args.noise}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    args = dataclasses.replace(args, run_name=args.run_name or stamp.replace("/", "-"))

    counts = "total_timesteps num_envs num_steps num_minibatches update_epochs eval_episodes"
    for names, what, valid in (
        (counts, "at least 1", lambda x: x >= 1),
        ("hidden_sizes", "at least 1 each", lambda x: min(x, default=1) >= 1),
        ("bins", "at least 2", lambda x: x >= 2),
        ("alpha beta vf_coef ent_coef eval_freq checkpoint_freq seed", "at least 0", lambda x: 0 <= x < math.inf),
        ("learning_rate adam_eps clip_coef max_grad_norm", "positive", lambda x: 0 < x < math.inf),
        ("gamma gae_lambda noise_level", "in [0, 1]", lambda x: 0 <= x <= 1),
        ("z", "negative, as it stands for log 0", lambda x: -math.inf < x < 0),
    ):
        for name in names.split():
            if not valid(getattr(args, name)):
                raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be {what}")
    minibatch_size, rest = divmod(args.num_envs * args.num_steps, args.num_minibatches)
    packages = {"wandb": args.track, "moviepy": args.capture_video}
    missing = [name for name, wanted in packages.items() if wanted and not importlib.util.find_spec(name)]
    for wrong, message in (
        (rest, f"--num-minibatches {args.num_minibatches}: must divide --num-envs x --num-steps"),
        (args.norm_adv and minibatch_size < 2, "minibatches of one step: lower --num-minibatches, or --no-norm-adv"),
        (gaussian and args.beta > 0, "--beta with --policy gaussian: it has no probabilities; use categorical"),
        (args.noise == "none" and args.noise_level > 0, "--noise-level without noise: choose one with --noise"),
        (args.device == "cuda" and not torch.cuda.is_available(), "--device cuda: no GPU here; use --device cpu"),
        (missing, f"--track or --capture-video: pip install {' '.join(missing)}"),
    ):
        if wrong:
            raise ValueError(message)
    if args.compile and not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        print("no C++ compiler: running with --no-compile, at two thirds of the speed", file=sys.stderr)
        args.compile = False

    try:
        env = make_env(args.env_id)
    except (gym.error.Error, ImportError) as error:
        raise ValueError(f"--env-id {args.env_id}: {error}") from error
    for space in (env.observation_space, env.action_space):
        if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1 or space is env.action_space and not space.is_bounded():
            raise ValueError(f"--env-id {args.env_id}: needs vectors, with bounded actions, but has {space}")

    run_dir = Path(args.runs_dir) / args.run_name
    if args.resume:
        changed = [name for name, saved in vars(saved_args(args.resume)).items() if getattr(args, name) != saved]
        if changed:
            raise ValueError(f"--{changed[0].replace('_', '-')}: a resumed run keeps its flags; leave this one out")
        return args
    try:
        run_dir.mkdir(parents=True)
    except OSError as error:
        remedy = "choose another --runs-dir or --run-name, or go on with --resume"
        raise ValueError(f"cannot make the folder {run_dir} ({error.strerror}): {remedy}") from error
    return args


def main() -> None:
    args = tyro.cli(Args)
    try:
        args = prepare(tyro.cli(Args, default=saved_args(args.resume)) if args.resume else args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    stop = threading.Event()

    def request_stop(signum, frame) -> None:
        stop.set()
        signal.signal(signum, signal.SIG_DFL)  # a second one does not wait for the checkpoint

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, request_stop)
    summary, run_dir = train(args, stop), args.resume or Path(args.runs_dir) / args.run_name
    if summary is None:
        print(f"interrupted; to go on: python {sys.argv[0]} --resume {run_dir}", file=sys.stderr)
        sys.exit(130)
    score = f"{summary['final_return_mean']:.1f} ± {summary['final_return_std']:.1f}"
    print(f"{args.env_id} {args.algo}: return {score}, {summary['sps']:,.0f} steps/s, {run_dir}")


if __name__ == "__main__":
    main()
