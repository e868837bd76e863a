# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "gymnasium[mujoco,box2d]==1.4.0", "mujoco==4.0.0", "numpy>=2.0",
#   "tyro==1.0.16", "tensorboard==2.21.0", "tqdm==4.70.1"]
# ///
"""Symmetric A2C (SA2C) for continuous control: all of it, from the environment to the learning curve.

    python sa2c_continuous.py --env-id Hopper-v4                      # SA2C, 11 bins per action dimension
    python sa2c_continuous.py --env-id Hopper-v4 --noise normal       # the same, learning from noisy rewards
    python sa2c_continuous.py --env-id Hopper-v4 --policy gaussian    # the baseline, A2C

From "Symmetric Reinforcement Learning Loss for Robust Learning on Diverse Tasks and Model Scales" (Byun &
Perrault, ICML 2025, arXiv 2405.17618). With p = pi(a|s) for the action taken, its advantage A, and Z < 0 in
the place of log 0:

    A2C loss          L  = -mean( A log p )
    reverse A2C loss  Lr = -mean( A Z (1 - p) )
    symmetric loss    alpha L + beta Lr

The gradient of the symmetric loss is -mean( A (alpha + beta |Z| p) grad log p ): likely actions gain weight
on unlikely ones. Lr needs probabilities, hence the bins; the probability of an action is the product over its
dimensions, so that in many dimensions p, and with it the reverse part, is next to nothing until the policy
has made up its mind.
"""

import json
import math
import os
import platform
import signal
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import dataclass, replace
from importlib import import_module, metadata, util
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import nn
from torch.distributions import Categorical, Independent, Normal
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    env_id: str = "Hopper-v4"  # Gymnasium id; its observations and actions are vectors, actions bounded
    total_timesteps: int = 1_000_000  # environment steps in all, rounded up to whole rollouts
    seed: int = 1  # seed of everything random (the paper's runs: 10000, 10001, ...)
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the CPU
    compile: bool = True  # compile the gradient, given a C++ compiler: starts later, runs faster
    runs_dir: str = "runs"  # folder of all runs
    run_name: str | None = None  # folder of this run; default: environment, algorithm, noise, seed and time
    resume: str | None = None  # folder of an interrupted run to go on with; the only flag, then
    checkpoint_freq: int | None = None  # steps between checkpoints; default: run / 20; 0: at the end
    log_freq: int = 1000  # steps between entries in the log
    track: bool = False  # log to Weights & Biases as well (pip install wandb)

    policy: Literal["categorical", "gaussian"] = "categorical"  # gaussian: plain A2C, the baseline
    bins: int = 11  # values of each action dimension, evenly spaced from lowest to highest
    num_envs: int = 4  # environments, stepped in turn
    num_steps: int = 8  # steps of each environment between updates
    learning_rate: float = 7e-4  # RMSprop's learning rate, constant
    rmsprop_eps: float = 1e-5  # RMSprop's epsilon
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 1.0  # lambda of generalised advantage estimation; 1: discounted returns
    norm_adv: bool = False  # normalise advantages in each rollout
    vf_coef: float = 0.5  # weight of the value loss
    ent_coef: float = 0.0  # weight of the entropy bonus
    max_grad_norm: float = 0.5  # limit on the norm of the gradient of all parameters together

    hidden_sizes: tuple[int, ...] = (64, 64)  # hidden layers of the actor and, apart from it, of the critic
    activation: Literal["tanh", "relu"] = "tanh"  # after each hidden layer
    layer_norm: bool = False  # layer normalisation before each activation
    ortho_init: bool = True  # orthogonal initial weights; else PyTorch's own
    log_std_init: float = 0.0  # initial log standard deviation of the Gaussian policy

    alpha: float | None = None  # weight of the A2C loss; default: 0.5, without reverse loss 1
    beta: float | None = None  # weight of the reverse loss; default: 0.5, with the Gaussian policy 0
    z: float = -1.0  # Z, which stands for log 0
    noise: Literal["none", "flip", "normal", "uniform", "adv_flip"] = "none"  # on rewards, or on advantages
    noise_level: float | None = None  # chance of a flip (default 0.1) or size (default 0.05)

    eval_freq: int | None = None  # steps between evaluations; default: run / 20; 0: at the end
    eval_episodes: int = 10  # episodes in an evaluation: greedy actions, raw rewards without noise
    capture_video: bool = False  # film the first episode of each evaluation (pip install moviepy)

    @property
    def algo(self) -> str:
        return "a2c" if self.policy == "gaussian" else "sa2c" if self.beta else "da2c"


def make_env(env_id: str, render_mode: str | None = None) -> gym.Env:
    warnings.filterwarnings("ignore", message=".*is out of date.*")  # the paper's environments are MuJoCo v4
    return gym.make(env_id, render_mode=render_mode)


class RunningStats:
    """Mean and population standard deviation of all values so far, in float64 (Welford 1962)."""

    def __init__(self, shape: tuple[int, ...]):
        self.count, self.mean, self.m2, self.std = 0, np.zeros(shape), np.zeros(shape), np.ones(shape)

    def update(self, batch: np.ndarray) -> None:
        for value in batch:
            self.count += 1
            delta = value - self.mean
            self.mean = self.mean + delta / self.count
            self.m2 = self.m2 + delta * (value - self.mean)
        self.std = np.sqrt(self.m2 / self.count + 1e-8)


class NormalizedEnvs:
    """Environments stepped in turn; where an episode ends, the next one starts in the same step.

    Observations are standardised by running statistics, rewards divided by the running standard deviation of
    the discounted return, both then clipped to [-10, 10], as by Stable-Baselines3's VecNormalize.
    """

    def __init__(self, env_id: str, num_envs: int, gamma: float):
        self.envs, self.gamma = [make_env(env_id) for _ in range(num_envs)], gamma
        self.obs_stats = RunningStats(self.envs[0].observation_space.shape)
        self.return_stats = RunningStats(())
        self.finished = []  # (return, length) of the last 100 episodes, in raw rewards

    def normalize_obs(self, obs: np.ndarray) -> np.ndarray:
        return ((obs - self.obs_stats.mean) / self.obs_stats.std).clip(-10, 10).astype(np.float32)

    def reset(self, seed: int) -> np.ndarray:
        """Starts an episode in every environment. Returns normalised observations (num_envs, obs_dim)."""
        self.obs = np.stack([env.reset(seed=seed + i)[0] for i, env in enumerate(self.envs)]).astype(float)
        self.obs_stats.update(self.obs)
        self.episode_return, self.discounted_return, self.episode_length = np.zeros((3, len(self.envs)))
        return self.normalize_obs(self.obs)

    def step(self, action: np.ndarray):
        """Steps by `action` (num_envs, action_dim). Returns normalised observations (num_envs, obs_dim) and
        rewards (num_envs,), terminated, truncated, and {index: normalised last observation} if truncated."""
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
                final_obs[i] = self.normalize_obs(self.obs[i])
            self.finished = [*self.finished[-99:], (self.episode_return[i], self.episode_length[i])]
            self.episode_return[i] = self.discounted_return[i] = self.episode_length[i] = 0
            self.obs[i], _ = self.envs[i].reset()
        self.obs_stats.update(self.obs)
        reward = (reward / self.return_stats.std).clip(-10, 10)
        return self.normalize_obs(self.obs), reward, terminated, truncated, final_obs


def perturb_reward(reward: np.ndarray, noise: str, level: float, rng: np.random.Generator) -> np.ndarray:
    """Rewards of any shape as a noisy judge gives them: flip turns r into 1 - r with probability `level`,
    normal adds N(0, level^2), uniform adds U(-level, level), the others leave rewards alone."""
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
    """Multi-layer perceptron; orthogonal weights of gain sqrt(2), at last `out_gain`, and zero biases."""
    layers, activation = [], nn.Tanh if args.activation == "tanh" else nn.ReLU
    for width in args.hidden_sizes:
        norm = [nn.LayerNorm(width)] if args.layer_norm else []
        layers += [nn.Linear(in_dim, width), *norm, activation()]
        in_dim = width
    layers.append(nn.Linear(in_dim, out_dim))
    for layer in layers if args.ortho_init else []:
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight, out_gain if layer is layers[-1] else math.sqrt(2))
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class Agent(nn.Module):
    """An actor, which gives logits (batch, action_dim, bins) or means (batch, action_dim), and a critic."""

    def __init__(self, env: gym.Env, args: Args):
        super().__init__()
        (obs_dim,), space = env.observation_space.shape, env.action_space
        self.gaussian = args.policy == "gaussian"
        self.values = np.linspace(space.low, space.high, args.bins, axis=1)  # (action_dim, bins)
        self.actor_shape = space.shape if self.gaussian else self.values.shape
        self.actor = mlp(obs_dim, math.prod(self.actor_shape), 0.01, args)
        self.critic = mlp(obs_dim, 1, 1.0, args)
        if self.gaussian:
            self.log_std = nn.Parameter(torch.full(space.shape, args.log_std_init))

    def output(self, obs):
        return self.actor(obs).view(-1, *self.actor_shape)

    def policy(self, obs):
        """Distribution of the joint action: its log-probability is the sum over the action's dimensions."""
        if self.gaussian:
            return Independent(Normal(self.output(obs), self.log_std.exp(), validate_args=False), 1)
        return Independent(Categorical(logits=self.output(obs), validate_args=False), 1)

    def value(self, obs):
        return self.critic(obs).squeeze(-1)

    def act(self, obs, generator=None):
        """Actions (batch, action_dim), indices of bins or numbers: sampled with `generator`, else greedy."""
        output = self.output(obs)
        if generator is not None and self.gaussian:
            output = output + self.log_std.exp() * torch.empty_like(output).normal_(generator=generator)
        elif generator is not None:  # Gumbel noise: the arg max is then a sample, sooner than by Categorical
            output = output - torch.empty_like(output).exponential_(generator=generator).log()
        return output if self.gaussian else output.argmax(-1)

    def to_env(self, action: np.ndarray) -> np.ndarray:
        if self.gaussian:
            return action.clip(self.values[:, 0], self.values[:, -1])
        return self.values[np.arange(len(self.values)), action]


def symmetric_policy_loss(log_prob, advantage, alpha, beta, z):
    """alpha * A2C loss + beta * reverse A2C loss, a scalar to minimise (arXiv 2405.17618).

    Tensors (batch,): `log_prob`: log pi(a|s) of the joint action taken; `advantage`: its advantage. Numbers:
    `alpha`, `beta` >= 0; `z` < 0.
    """
    objective = alpha * advantage * log_prob
    if beta:  # all that symmetric A2C adds to A2C
        objective = objective + beta * advantage * z * (1 - log_prob.exp())
    return -objective.mean()


def compute_gae(reward, value, final_value, terminated, truncated, gamma, gae_lambda):
    """Advantages and returns (T, N): generalised advantage estimation (Schulman et al., arXiv 1506.02438).

    Arrays of T steps in N environments: `reward`, `terminated`, `truncated` (T, N); `value` (T + 1, N) of the
    observations before each step and after the last; `final_value` (T, N) of truncated episodes' last ones.
    """
    next_value = np.where(truncated, final_value, value[1:]) * ~terminated
    delta = reward + gamma * next_value - value[:-1]
    decay = gamma * gae_lambda * ~(terminated | truncated)
    advantage, following = np.zeros_like(delta), 0.0
    for t in reversed(range(len(delta))):
        advantage[t] = following = delta[t] + decay[t] * following
    return advantage, advantage + value[:-1]


def gradient_and_metrics(agent, args, obs, action, advantage, returns):
    """Clipped gradient of the loss, as one vector, and what to log; tensors of a rollout, (batch, ...)."""
    policy = agent.policy(obs)
    log_prob = policy.log_prob(action)
    policy_loss = symmetric_policy_loss(log_prob, advantage, args.alpha, args.beta, args.z)
    value_loss = (agent.value(obs) - returns).square().mean()
    entropy = policy.entropy().mean()
    loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(agent.parameters()))])
    norm = gradient.norm()
    with torch.no_grad():
        p = log_prob.exp()
        reverse = args.beta * abs(args.z) * p  # weight of grad log p, beside alpha
        metrics = {
            "policy": symmetric_policy_loss(log_prob, advantage, 1.0, 0.0, args.z),
            "reverse": (args.z * advantage * p).mean(),  # the part with gradient
            "value": value_loss.detach(), "entropy": entropy.detach(), "grad_norm": norm,  # before clipping
            "probability": p.mean(), "reverse_share": (reverse / (args.alpha + reverse)).mean(),
        }  # fmt: skip
    return gradient * (args.max_grad_norm / (norm + 1e-6)).clamp(max=1), metrics


@torch.inference_mode()
def evaluate(agent: Agent, env: gym.Env, training_envs: NormalizedEnvs, episodes: int, seed: int):
    """Returns and lengths (episodes,): greedy actions, raw rewards, statistics of the training, untouched."""
    device, (returns, lengths) = next(agent.parameters()).device, np.zeros((2, episodes))
    for i in range(episodes):
        (obs, _), ended = env.reset(seed=seed + i), False
        while not ended:
            normalized = torch.from_numpy(training_envs.normalize_obs(obs)).to(device)
            action = agent.to_env(agent.act(normalized)[0].cpu().numpy())
            obs, reward, terminated, truncated, _ = env.step(action)
            returns[i] += reward
            lengths[i] += 1
            ended = terminated or truncated
    return returns, lengths


def save(path: Path, content: str | dict) -> None:
    """Writes a temporary file and renames it, so that an interruption leaves the old content or the new."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(content) if isinstance(content, str) else torch.save(content, temporary)
    os.replace(temporary, path)


def describe_machine() -> dict:
    """What it takes, beside the arguments, to judge or repeat a run."""
    git = f'git -C "{Path(__file__).resolve().parent}" describe --always --dirty --abbrev=40'
    commit = subprocess.run(git, shell=True, capture_output=True, text=True).stdout.strip() or None
    versions = {"python": platform.python_version()} | {p.name: p.version for p in metadata.distributions()}
    hardware = {"platform": platform.platform(), "cpu": torch.backends.cpu.get_cpu_capability()}
    hardware |= {"cores": os.cpu_count(), "gpu": torch.cuda.is_available() and torch.cuda.get_device_name()}
    return {"command": sys.argv, "commit": commit, "versions": versions, "hardware": hardware}


def train(args: Args, stop: threading.Event) -> dict | None:
    """A run, with arguments from `prepare`. Returns what is in summary.json, or None if `stop` came first."""
    started = time.perf_counter()
    torch.set_num_threads(1)  # the networks are too small to be shared among cores
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if args.device == "cuda" else "cpu")
    generator = torch.Generator(device).manual_seed(args.seed)  # of all but weights and noisy rewards
    rng = np.random.default_rng(args.seed)  # noise on rewards
    run_dir = Path(args.resume or Path(args.runs_dir) / args.run_name)
    envs = NormalizedEnvs(args.env_id, args.num_envs, args.gamma)
    eval_env = make_env(args.env_id, "rgb_array" if args.capture_video else None)
    if args.capture_video:
        eval_env = gym.wrappers.RecordVideo(eval_env, run_dir / "video", lambda i: not i % args.eval_episodes)
    agent = Agent(eval_env, args).to(device)
    parameters = nn.utils.parameters_to_vector(agent.parameters()).detach()
    nn.utils.vector_to_parameters(parameters, agent.parameters())  # views of it: one update for all
    optimizer = torch.optim.RMSprop([parameters], lr=args.learning_rate, alpha=0.99, eps=args.rmsprop_eps)
    global_step, evaluations, train_seconds, wall_seconds = 0, [], 0.0, 0.0
    if (run_dir / "checkpoint.pt").is_file():
        state = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=False)
        agent.load_state_dict(state["agent"])
        optimizer.load_state_dict(state["optimizer"])
        obs_stats, return_stats, envs.finished = state["envs"]
        vars(envs.obs_stats).update(obs_stats)
        vars(envs.return_stats).update(return_stats)
        generator.set_state(state["generator"])
        rng.bit_generator.state = state["rng"]
        global_step, evaluations, train_seconds, wall_seconds = state["progress"]
    if args.track:
        run = {"project": "symmetric-rl", "id": args.run_name, "name": args.run_name, "config": vars(args)}
        import_module("wandb").init(**run, resume="allow", sync_tensorboard=True)
    writer = SummaryWriter(run_dir, purge_step=global_step + 1)
    T, N = args.num_steps, args.num_envs
    obs = np.zeros((T + 1, N, *envs.obs_stats.mean.shape), np.float32)
    action = np.zeros((T, N, len(agent.values)), np.float32 if agent.gaussian else np.int64)
    (reward, final_value), (terminated, truncated) = np.zeros((2, T, N)), np.zeros((2, T, N), bool)
    obs[T] = envs.reset(seed=args.seed + global_step)  # after resuming too: a simulator's state is not saved
    torch._dynamo.config.trace_autograd_ops = True  # compiles the gradient into one graph with the loss
    gradient_fn = torch.compile(gradient_and_metrics) if args.compile else gradient_and_metrics
    try:  # on a rollout of zeros: compiling is part of starting up, and may fail
        zeros = torch.zeros(T * N, *obs.shape[2:]), torch.from_numpy(action[0, 0]).repeat(T * N, 1)
        gradient_fn(agent, args, *(x.to(device) for x in (*zeros, *torch.zeros(2, T * N))))
    except Exception as error:
        print(f"going on with --no-compile, more slowly: {error!r}"[:300], file=sys.stderr)
        args, gradient_fn = replace(args, compile=False), gradient_and_metrics
    progress_bar = tqdm(total=args.total_timesteps, initial=global_step, unit=" steps", disable=None)
    metrics, gaes, sign_flips = [], [], []
    while True:
        # Rollout
        iteration_started = time.perf_counter()
        obs[0] = obs[T]
        with torch.inference_mode():
            for t in range(T):
                action[t] = agent.act(torch.from_numpy(obs[t]).to(device), generator).cpu().numpy()
                obs[t + 1], reward[t], terminated[t], truncated[t], final = envs.step(agent.to_env(action[t]))
                for i, last_obs in final.items():
                    final_value[t, i] = agent.value(torch.from_numpy(last_obs).to(device)).item()
        global_step += T * N

        # Advantages; values in one batch, since the agent did not change on the way
        b_obs = torch.from_numpy(obs).to(device)
        b_action = torch.from_numpy(action).to(device).flatten(0, 1)
        with torch.no_grad():
            value = agent.value(b_obs).cpu().numpy()
            b_obs = b_obs[:T].flatten(0, 1)
        noisy = perturb_reward(reward, args.noise, args.noise_level, rng)
        gae = compute_gae(noisy, value, final_value, terminated, truncated, args.gamma, args.gae_lambda)
        advantage, returns = (torch.as_tensor(x, dtype=torch.float32, device=device).flatten() for x in gae)

        # Update
        if args.noise == "adv_flip":
            advantage = perturb_advantage(advantage, args.noise_level, generator)
        if args.norm_adv:
            mean, std = advantage.mean(), advantage.std()
            sign_flips.append(((advantage > 0) != (advantage > mean)).float().mean())
            advantage = (advantage - mean) / (std + 1e-8)
        parameters.grad, new_metrics = gradient_fn(agent, args, b_obs, b_action, advantage, returns)
        optimizer.step()
        metrics.append(new_metrics)
        gaes.append(gae)
        if not math.isfinite(metrics[-1]["grad_norm"]):
            sys.exit(f"error: gradient not finite at step {global_step}; lower --learning-rate or --beta")

        # Logging, over all updates since the last time
        finished, stopping = global_step >= args.total_timesteps, stop.is_set()
        if global_step % args.log_freq < T * N or finished or stopping:
            scalars = {f"losses/{k}": torch.stack([m[k] for m in metrics]).mean().item() for k in metrics[0]}
            gae = np.stack(gaes, axis=1)
            scalars["losses/explained_variance"] = 1 - np.var(gae[0]) / np.var(gae[1])
            scalars["losses/advantage_sign_flips"] = torch.tensor(sign_flips or [0.0]).mean().item()
            scalars["losses/advantage_largest"] = abs(gae[0]).max()
            scalars["charts/SPS"] = global_step / (train_seconds + time.perf_counter() - iteration_started)
            episodic_return, episodic_length = np.mean(envs.finished or [[math.nan] * 2], axis=0)
            scalars |= {"charts/episodic_return": episodic_return, "charts/episodic_length": episodic_length}
            for name, scalar in scalars.items():
                writer.add_scalar(name, scalar, global_step)
            progress_bar.update(min(global_step, args.total_timesteps) - progress_bar.n)
            progress_bar.set_postfix_str(f"return {episodic_return:.1f}")
            metrics, gaes, sign_flips = [], [], []
        train_seconds += time.perf_counter() - iteration_started

        # Evaluation and checkpoint, when a multiple of their frequency has been passed
        eval_due, save_due = (f and global_step % f < T * N for f in (args.eval_freq, args.checkpoint_freq))
        if eval_due or finished:
            eval_env.name_prefix = f"step-{global_step}"  # of the video, if any
            scores, lengths = evaluate(agent, eval_env, envs, args.eval_episodes, args.seed + global_step)
            evaluations.append((global_step, scores.mean(), scores.std(), lengths.mean(), len(scores)))
            rows = [("step", "return_mean", "return_std", "length_mean", "episodes"), *evaluations]
            save(run_dir / "progress.csv", "".join(",".join(map(str, row)) + "\n" for row in rows))
            writer.add_scalar("eval/return_mean", scores.mean(), global_step)
        wall = wall_seconds + time.perf_counter() - started
        if finished:
            summary = {"script": Path(__file__).name, "algo": args.algo} | vars(args) | {
                "final_return_mean": scores.mean(), "final_return_std": scores.std(), "finished": True,
                "train_return_last100": episodic_return if envs.finished else None,
                "sps": global_step / train_seconds, "wall_s": wall,
            }  # fmt: skip
            save(run_dir / "summary.json", json.dumps(summary, indent=2))
        if save_due or finished or stopping:
            save(run_dir / "checkpoint.pt", {
                "agent": agent.state_dict(), "optimizer": optimizer.state_dict(),
                "envs": (vars(envs.obs_stats), vars(envs.return_stats), envs.finished),
                "generator": generator.get_state(), "rng": rng.bit_generator.state,
                "progress": (global_step, evaluations, train_seconds, wall),
            })  # fmt: skip
        if finished or stopping:
            writer.close()
            eval_env.close()
            return summary if finished else None


def prepare(args: Args) -> Args:
    """Checks arguments, fills in defaults, makes the folder. Raises ValueError: what is wrong, what to do."""
    if args.resume:
        if replace(args, resume=None) != Args():
            raise ValueError("--resume goes on under the flags of that run: leave out all others")
        if not Path(args.resume, "args.json").is_file() or Path(args.resume, "summary.json").is_file():
            raise ValueError(f"--resume {args.resume}: not the folder of a run that was interrupted")
        saved = json.loads(Path(args.resume, "args.json").read_text())["args"]
        if saved.keys() != vars(args).keys():
            raise ValueError(f"--resume {args.resume}: a run of another script")
        args = Args(**saved | {"hidden_sizes": tuple(saved["hidden_sizes"]), "resume": args.resume})
    gaussian = args.policy == "gaussian"
    defaults = dict.fromkeys(("eval_freq", "checkpoint_freq"), max(1, args.total_timesteps // 20)) | {
        "alpha": 1.0 if gaussian or args.beta == 0 else 0.5, "beta": 0.0 if gaussian else 0.5,
        "noise_level": {"none": 0.0, "normal": 0.05, "uniform": 0.05}.get(args.noise, 0.1),
    }  # fmt: skip
    args = replace(args, **{name: x for name, x in defaults.items() if getattr(args, name) is None})
    stamp = f"{args.env_id}__{args.algo}__{args.noise}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    args = replace(args, run_name=args.run_name or stamp.replace("/", "-"))
    for names, what, valid in (
        ("total_timesteps num_envs num_steps eval_episodes log_freq", "at least 1", lambda x: x >= 1),
        ("bins", "at least 2", lambda x: x >= 2),
        ("alpha beta vf_coef ent_coef eval_freq checkpoint_freq seed", ">= 0", lambda x: 0 <= x < 2**63),
        ("learning_rate rmsprop_eps max_grad_norm", "positive", lambda x: 0 < x < math.inf),
        ("gamma gae_lambda noise_level", "in [0, 1]", lambda x: 0 <= x <= 1),
        ("z", "negative, for it stands for log 0", lambda x: -math.inf < x < 0),
    ):
        for name in names.split():
            if not valid(getattr(args, name)):
                raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be {what}")
    try:
        env = make_env(args.env_id, "rgb_array" if args.capture_video else None)
        env.reset()
        env.render() if args.capture_video else None  # MuJoCo without a display: MUJOCO_GL=egl
    except Exception as error:  # an environment may fail in any way
        raise ValueError(f"--env-id {args.env_id}: {error!r}") from error
    spaces = (env.observation_space, env.action_space)
    fit = all(isinstance(s, gym.spaces.Box) and len(s.shape) == 1 for s in spaces) and spaces[1].is_bounded()
    for wrong, message in (
        (not fit, f"--env-id {args.env_id}: needs vectors to observe and, bounded, to act, not {spaces}"),
        (args.norm_adv and args.num_envs * args.num_steps == 1, "--norm-adv: needs --num-steps 2 or more"),
        (min(args.hidden_sizes, default=1) < 1, "--hidden-sizes: must be at least 1 each"),
        (gaussian and args.beta > 0, "--beta: a Gaussian has no probabilities; use --policy categorical"),
        (args.noise == "none" and args.noise_level > 0, "--noise-level: choose a kind with --noise"),
        (args.device == "cuda" and not torch.cuda.is_available(), "--device cuda: no GPU here; use cpu"),
        (args.track and not util.find_spec("wandb"), "--track: pip install wandb"),
        (args.capture_video and not util.find_spec("moviepy"), "--capture-video: pip install moviepy"),
    ):  # fmt: skip
        if wrong:
            raise ValueError(message)
    run_dir = Path(args.resume or Path(args.runs_dir) / args.run_name)
    try:
        run_dir.mkdir(parents=True, exist_ok=bool(args.resume))
    except OSError as error:
        raise ValueError(f"{run_dir}: {error.strerror}; try another --run-name or --runs-dir") from error
    if not args.resume:
        save(run_dir / "args.json", json.dumps({"args": vars(args)} | describe_machine(), indent=2))
    return args


def main() -> None:
    try:
        args = prepare(tyro.cli(Args))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    stop = threading.Event()
    for signum in (signal.SIGINT, signal.SIGTERM):  # the first one asks for a checkpoint, a second one kills
        signal.signal(signum, lambda signum, _: (stop.set(), signal.signal(signum, signal.SIG_DFL)))
    run_dir = args.resume or Path(args.runs_dir) / args.run_name
    if (summary := train(args, stop)) is None:
        print(f"interrupted; to go on: python {sys.argv[0]} --resume {run_dir}", file=sys.stderr)
        sys.exit(130)
    score = "{env_id} {algo}: return {final_return_mean:.1f} ± {final_return_std:.1f}, {sps:,.0f} steps/s"
    print(f"{score.format(**summary)}, {run_dir}")


if __name__ == "__main__":
    main()
