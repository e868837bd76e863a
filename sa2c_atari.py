# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "gymnasium[mujoco,box2d]==1.4.0", "ale-py==0.12.1", "numpy>=2.0",
#   "tyro==1.0.16", "tensorboard==2.21.0", "tqdm==4.70.1"]
# ///
"""Symmetric A2C (SA2C) for Atari games: all of it, from the emulator to the learning curve.

    python sa2c_atari.py --env-id Breakout                        # SA2C
    python sa2c_atari.py --env-id Breakout --noise flip           # the same, learning from noisy rewards
    python sa2c_atari.py --env-id Breakout --alpha 1 --beta 0     # the baseline, A2C

From "Symmetric Reinforcement Learning Loss for Robust Learning on Diverse Tasks and Model Scales" (Byun &
Perrault, ICML 2025, arXiv 2405.17618). With p = pi(a|s) for the action taken, its advantage A, and Z < 0 in
the place of log 0:

    A2C loss          L  = -mean( A log p )
    reverse A2C loss  Lr = -mean( A Z (1 - p) )
    symmetric loss    alpha L + beta Lr

The gradient of the symmetric loss is -mean( A (alpha + beta |Z| p) grad log p ): likely actions gain weight
on unlikely ones.
"""

import ctypes
import difflib
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from importlib import import_module, metadata, util
from pathlib import Path
from typing import Literal

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # idle threads of torch's make way for the games'

import numpy as np
import torch
import tyro
from ale_py import Action, roms
from ale_py.vector_env import AtariVectorEnv
from torch import nn
from torch.distributions import Categorical
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    env_id: str = "Breakout"  # an Atari game, also as BreakoutNoFrameskip-v4, ALE/Breakout-v5 or breakout
    total_timesteps: int = 5_000_000  # steps of 4 frames in all environments, rounded up to whole rollouts
    seed: int = 1  # seed of everything random (the paper's runs: 10000, 10001, ...)
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU, where there is one
    amp: Literal["auto", "off"] = "auto"  # auto: bfloat16 where the hardware has it; off: float32
    compile: bool = torch.cuda.is_available()  # compile for the GPU; a CPU gains nothing by it
    runs_dir: str = "runs"  # folder of all runs
    run_name: str | None = None  # folder of this run; default: environment, algorithm, noise, seed and time
    resume: str | None = None  # folder of an interrupted run to go on with; the only flag, then
    checkpoint_freq: int | None = None  # steps between checkpoints; default: run / 20; 0: at the end
    log_freq: int = 1000  # steps between entries in the log
    track: bool = False  # log to Weights & Biases as well (pip install wandb)

    repeat_action_probability: float = 0.0  # sticky actions: chance to repeat the last
    num_envs: int = 16  # games played in parallel
    num_steps: int = 5  # steps of each game between updates
    learning_rate: float = 7e-4  # RMSprop's learning rate, constant
    rmsprop_eps: float = 1e-5  # RMSprop's epsilon
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 1.0  # lambda of generalised advantage estimation; 1: discounted returns
    norm_adv: bool = False  # normalise advantages in each rollout
    vf_coef: float = 0.25  # weight of the value loss
    ent_coef: float = 0.01  # weight of the entropy bonus
    max_grad_norm: float = 0.5  # limit on the norm of the gradient of all parameters together
    layer_norm: bool = False  # layer normalisation before each activation

    alpha: float | None = None  # weight of the A2C loss; default: 0.5, without reverse loss 1
    beta: float = 0.5  # weight of the reverse loss; 0: A2C
    z: float = -1.0  # Z, which stands for log 0
    noise: Literal["none", "flip", "normal", "uniform", "adv_flip"] = "none"  # on rewards, or on advantages
    noise_level: float | None = None  # chance of a flip (default 0.1) or size (default 0.05)

    eval_freq: int | None = None  # steps between evaluations; default: run / 20; 0: at the end
    eval_episodes: int = 10  # whole games in an evaluation: sampled actions, raw scores without noise
    capture_video: bool = False  # film the first game of each evaluation (pip install moviepy)

    @property
    def algo(self) -> str:
        return "sa2c" if self.beta else "a2c"


def rom_name(env_id: str) -> str:
    """A game's name in ale-py: ms_pacman for MsPacman, ALE/MsPacman-v5, ... Raises ValueError if none."""
    for_two = {"combat", "joust", "maze_craze", "warlords"}  # ALE ends the process over them
    names = {name.replace("_", ""): name for name in roms.get_all_rom_ids() if name not in for_two}
    game = re.sub(r"^ALE/|(NoFrameskip|Deterministic)?(-v\d)?$", "", env_id).replace("_", "").lower()
    if game not in names:
        nearest = [names[name] for name in difflib.get_close_matches(game, names, n=4, cutoff=0.4)]
        raise ValueError(f"--env-id {env_id}: no such game; near: {', '.join(nearest) or 'none'}")
    return names[game]


class AtariGames:
    """Games in parallel, preprocessed as for DeepMind's DQN; where one ends, the next starts in that step.

    A step is four frames of one action. Images are grey, 84 x 84, the brighter of the last two frames, the
    last four of them in a stack. A game begins with one frame of FIRE, where there is such an action, and
    idle ones, fewer than 30 in all, and is cut off after 108,000. To the learner a lost life ends the
    episode, but the game goes on: with FIRE, whatever the agent chose, since many games wait for it.
    """

    def __init__(self, args: Args, num_games: int, max_frames: int = 108_000):
        self.envs = AtariVectorEnv(
            rom_name(args.env_id), num_games, num_threads=min(num_games, torch.get_num_threads()),
            autoreset_mode="SameStep", reward_clipping=False,  # `step` clips, and counts lives
            repeat_action_probability=args.repeat_action_probability, max_num_frames_per_episode=max_frames,
        )  # fmt: skip
        actions = self.envs.ale.get_action_set()
        self.num_actions = len(actions)
        self.fire = actions.index(Action.FIRE) if Action.FIRE in actions else None
        self.finished = []  # (raw score, steps) of the last 100 games

    def reset(self, seed: int) -> np.ndarray:
        """Starts all games. Returns images (num_games, 4, 84, 84), uint8."""
        images, info = self.envs.reset(seed=seed)
        self.lives = info["lives"]
        self.life_lost = np.zeros(len(images), bool)
        self.score, self.length = np.zeros((2, len(images)))
        return images

    def step(self, action: np.ndarray):
        """Steps by `action` (num_games,). Returns images (num_games, 4, 84, 84); rewards, clipped to -1, 0 or
        1; terminated: a life or the game was lost; truncated; overridden: FIRE replaced the action; and
        {index: last images} where truncated. `self.ended` is then {index: (raw score, steps)}."""
        overridden = self.life_lost & (self.fire is not None)
        action = np.where(overridden, self.fire or 0, action)
        images, reward, terminated, truncated, info = self.envs.step(action)
        over = terminated | truncated
        self.life_lost = (info["lives"] > 0) & (info["lives"] < self.lives) & ~over
        self.lives = info["lives"]
        self.score += reward
        self.length += 1
        self.ended = {i: (self.score[i], self.length[i]) for i in np.flatnonzero(over)}
        self.finished = [*self.finished, *self.ended.values()][-100:]
        self.score[over] = self.length[over] = 0
        final_images = {i: info["final_obs"][i] for i in np.flatnonzero(truncated & ~terminated)}
        return images, np.sign(reward), terminated | self.life_lost, truncated, overridden, final_images


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


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Where convolutions and matrix products are of this type, whatever that of their tensors."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


class Agent(nn.Module):
    """Actor and critic on one convolutional network, DQN's (Mnih et al., Nature 2015)."""

    def __init__(self, num_actions: int, layer_norm: bool = False, bfloat16: bool = False):
        super().__init__()
        self.dtype = torch.bfloat16 if bfloat16 else torch.float32
        norm = (lambda channels: [nn.GroupNorm(1, channels)]) if layer_norm else (lambda channels: [])
        self.conv = nn.Conv2d(4, 32, 8, stride=4)
        self.trunk = nn.Sequential(
            *norm(32), nn.ReLU(),
            nn.Conv2d(32, 64, 4, stride=2), *norm(64), nn.ReLU(),
            nn.Conv2d(64, 64, 3), *norm(64), nn.ReLU(),
            nn.Flatten(), nn.Linear(64 * 7 * 7, 512), *norm(512), nn.ReLU(),
        )  # fmt: skip
        self.actor, self.critic = nn.Linear(512, num_actions), nn.Linear(512, 1)
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.orthogonal_(layer.weight, {self.actor: 0.01, self.critic: 1.0}.get(layer, 2**0.5))
                nn.init.zeros_(layer.bias)

    def forward(self, images):
        """Logits (batch, num_actions) and values (batch,), for images (batch, 4, 84, 84) of bytes."""
        with autocast(images.device, self.dtype):
            x = images.to(self.dtype, memory_format=torch.channels_last)  # bytes are exact in bfloat16
            x = self.trunk(torch.conv2d(x, self.conv.weight / 255, self.conv.bias, stride=4))
        with autocast(images.device, torch.float32):  # the loss must not see rounded probabilities
            x = x.to(self.actor.weight.dtype)
            return self.actor(x), self.critic(x).squeeze(-1)


def sample(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Actions (...) from logits (..., num_actions), by Gumbel noise: faster than by Categorical."""
    return (logits - torch.empty_like(logits).exponential_(generator=generator).log()).argmax(-1)


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


class RMSpropTF(torch.optim.Optimizer):
    """RMSprop as in TensorFlow, with which A2C got its scores on Atari: unlike in PyTorch, epsilon is inside
    the square root, and the average of squares starts at one, so that the first steps are small."""

    def __init__(self, parameters, lr: float, alpha: float, eps: float):
        super().__init__(parameters, {"lr": lr, "alpha": alpha, "eps": eps})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if not self.state[parameter]:
                    self.state[parameter]["square_avg"] = torch.ones_like(parameter)
                square_avg, gradient = self.state[parameter]["square_avg"], parameter.grad
                square_avg.mul_(group["alpha"]).addcmul_(gradient, gradient, value=1 - group["alpha"])
                parameter.addcdiv_(gradient, (square_avg + group["eps"]).sqrt_(), value=-group["lr"])


def gradient_and_metrics(agent, args, obs, action, advantage, returns, weight):
    """Clipped gradient of the loss, as one vector, and what to log; tensors of a rollout, (batch, ...).
    `weight`, 1 on average, is 0 where the action was not the agent's: such a step teaches only the critic."""
    logits, value = agent(obs)
    policy = Categorical(logits=logits, validate_args=False)
    log_prob = policy.log_prob(action)
    samples = (log_prob, weight * advantage)  # the loss scales with the advantage
    policy_loss = symmetric_policy_loss(*samples, args.alpha, args.beta, args.z)
    value_loss = (value - returns).square().mean()
    entropy = (weight * policy.entropy()).mean()
    loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(agent.parameters()))])
    norm = gradient.norm()
    with torch.no_grad():
        p = log_prob.exp()
        reverse = args.beta * abs(args.z) * p  # weight of grad log p, beside alpha
        metrics = {
            "policy": symmetric_policy_loss(*samples, 1.0, 0.0, args.z),
            "reverse": (args.z * weight * advantage * p).mean(),  # with gradient
            "value": value_loss.detach(), "entropy": entropy.detach(), "grad_norm": norm,  # before clipping
            "probability": (weight * p).mean(),
            "reverse_share": (weight * reverse / (args.alpha + reverse)).mean(),
        }  # fmt: skip
    return gradient * (args.max_grad_norm / (norm + 1e-6)).clamp(max=1), metrics


@torch.no_grad()
def evaluate(agent: Agent, args: Args, seed: int, video: Path | None):
    """Raw scores and steps, (eval_episodes,) each, of whole games played in parallel with sampled actions."""
    device = next(agent.parameters()).device
    games, generator = AtariGames(args, args.eval_episodes), torch.Generator(device).manual_seed(seed)
    images, results, film = games.reset(seed), {}, []
    while len(results) < args.eval_episodes:
        if video and 0 not in results:
            film.append(np.broadcast_to(images[0, -1, ..., None].copy(), (84, 84, 3)))
        logits, _ = agent(torch.from_numpy(images).to(device))
        images, *_ = games.step(sample(logits, generator).cpu().numpy())
        results = games.ended | results  # the first game of each
    if video:  # what the agent saw, enlarged, in real time: 15 steps a second
        video.parent.mkdir(exist_ok=True)
        clip = import_module("moviepy").ImageSequenceClip(film, fps=15).resized(4)
        clip.write_videofile(str(video), logger=None)
    return np.array([results[i] for i in range(args.eval_episodes)]).T


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


def keep_freed_memory() -> None:
    """glibc returns freed memory to the system, and takes it again at a page fault for each 4 KiB: a quarter
    of an update on a CPU. This tells it not to; under other C libraries it does nothing."""
    if platform.libc_ver()[0] == "glibc":
        for parameter, number in ((-4, 0), (-1, -1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h
            ctypes.CDLL(None).mallopt(parameter, number)


def compiled(agent: Agent, args: Args, obs: torch.Tensor):
    """`agent` and `gradient_and_metrics`, on a GPU as CUDA graphs: called on zeros of the shapes to come, as
    compiling is part of starting up; where that fails, uncompiled. `obs` (T + 1, N, 4, 84, 84)."""
    n = args.num_steps * args.num_envs
    zeros = torch.zeros(4, n, device=obs.device)
    mode = "reduce-overhead" if obs.is_cuda else "default"
    try:
        torch._dynamo.config.trace_autograd_ops = True  # gradient and loss in one graph
        functions = [torch.compile(f, mode=mode, fullgraph=True) for f in (agent, gradient_and_metrics)]
        for _ in range(3):  # CUDA graphs are recorded after a warm-up
            with torch.no_grad(), autocast(obs.device, agent.dtype):
                functions[0](obs[0])
            functions[1](agent, args, obs.flatten(0, 1)[:n], zeros[0].long(), *zeros[1:])
        return functions
    except Exception as error:
        print(f"going on with --no-compile: {error!r}"[:300], file=sys.stderr)
        return agent, gradient_and_metrics


def train(args: Args, stop: threading.Event) -> dict | None:
    """A run, with arguments from `prepare`. Returns what is in summary.json, or None if `stop` came first."""
    started = time.perf_counter()
    keep_freed_memory()
    torch.manual_seed(args.seed)
    cuda = args.device != "cpu" and torch.cuda.is_available()
    torch.backends.cudnn.allow_tf32 = args.amp == "auto"  # off: float32 indeed
    device = torch.device("cuda" if cuda else "cpu")
    generator = torch.Generator(device).manual_seed(args.seed)  # of all but weights and noisy rewards
    rng = np.random.default_rng(args.seed)  # noise on rewards
    run_dir = Path(args.resume or Path(args.runs_dir) / args.run_name)
    envs = AtariGames(args, args.num_envs)
    fast = torch.cuda.is_bf16_supported(False) if cuda else torch.cpu.get_capabilities().get("avx512_bf16")
    agent = Agent(envs.num_actions, args.layer_norm, bfloat16=args.amp == "auto" and bool(fast)).to(device)
    parameters = nn.utils.parameters_to_vector(agent.parameters()).detach()
    nn.utils.vector_to_parameters(parameters, agent.parameters())  # views of it: one update for all
    optimizer = RMSpropTF([parameters], lr=args.learning_rate, alpha=0.99, eps=args.rmsprop_eps)
    global_step, evaluations, train_seconds, wall_seconds = 0, [], 0.0, 0.0
    if (run_dir / "checkpoint.pt").is_file():
        state = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=False)
        agent.load_state_dict(state["agent"])
        optimizer.load_state_dict(state["optimizer"])
        envs.finished = state["envs"]
        if state["generator"].shape == generator.get_state().shape:  # else from a GPU to a CPU, or back
            generator.set_state(state["generator"])
        rng.bit_generator.state = state["rng"]
        global_step, evaluations, train_seconds, wall_seconds = state["progress"]
    if args.track:
        run = {"project": "symmetric-rl", "id": args.run_name, "name": args.run_name, "config": vars(args)}
        import_module("wandb").init(**run, resume="allow", sync_tensorboard=True)
    writer = SummaryWriter(run_dir, purge_step=global_step + 1)
    T, N = args.num_steps, args.num_envs
    obs = torch.zeros(T + 1, N, 84, 84, 4, dtype=torch.uint8, device=device).permute(0, 1, 4, 2, 3)
    value = torch.zeros(T + 1, N, device=device)
    action = torch.zeros(T, N, dtype=torch.int64, device=device)
    reward, final_value = np.zeros((2, T, N))
    terminated, truncated, overridden = np.zeros((3, T, N), bool)
    obs[T] = torch.from_numpy(envs.reset(args.seed + global_step))  # emulators are not in the checkpoint
    agent_fn, gradient_fn = compiled(agent, args, obs) if args.compile else (agent, gradient_and_metrics)
    progress_bar = tqdm(total=args.total_timesteps, initial=global_step, unit=" steps", disable=None)
    metrics, gaes, sign_flips = [], [], []
    while True:
        # Rollout
        iteration_started = time.perf_counter()
        obs[0] = obs[T]
        with torch.no_grad(), autocast(device, agent.dtype):  # out here: rounds the weights only once
            for t in range(T):
                logits, value[t] = agent_fn(obs[t])
                action[t] = sample(logits, generator)
                step = envs.step(action[t].cpu().numpy())
                images, reward[t], terminated[t], truncated[t], overridden[t], final_images = step
                obs[t + 1] = torch.from_numpy(images)
                for i, last in final_images.items():
                    final_value[t, i] = agent(torch.from_numpy(last[None]).to(device))[1].item()
            value[T] = agent_fn(obs[T])[1]
        global_step += T * N

        # Advantages
        b_obs, b_action = obs[:T].flatten(0, 1), action.flatten()
        noisy = perturb_reward(reward, args.noise, args.noise_level, rng)
        rollout = noisy, value.cpu().numpy(), final_value, terminated, truncated
        gae = np.stack([*compute_gae(*rollout, args.gamma, args.gae_lambda), ~overridden])
        advantage, returns, own = torch.tensor(gae, dtype=torch.float32, device=device).flatten(1)

        # Update
        count = own.sum().clamp(min=2)
        if args.noise == "adv_flip":
            advantage = perturb_advantage(advantage, args.noise_level, generator)
        if args.norm_adv:  # over the agent's own actions
            mean = (own * advantage).sum() / count
            std = ((own * (advantage - mean)).square().sum() / (count - 1)).sqrt()
            sign_flips.append((own * ((advantage > 0) != (advantage > mean))).sum() / own.sum())
            advantage = (advantage - mean) / (std + 1e-8)
        weight = own / count * len(own)
        samples = b_action, advantage, returns, weight
        parameters.grad, new_metrics = gradient_fn(agent, args, b_obs, *samples)
        optimizer.step()
        metrics.append(torch.stack([*new_metrics.values()]))
        gaes.append(gae)
        if not math.isfinite(new_metrics["grad_norm"].item()):  # waits for the GPU
            sys.exit(f"error: gradient not finite at step {global_step}; lower --learning-rate or --beta")

        # Logging, over all updates since the last time
        finished, stopping = global_step >= args.total_timesteps, stop.is_set()
        if global_step % args.log_freq < T * N or finished or stopping:
            scalars = dict(zip((f"losses/{k}" for k in new_metrics), torch.stack(metrics).mean(0).tolist()))
            gae = np.stack(gaes, axis=1)
            scalars["losses/explained_variance"] = 1 - np.var(gae[0]) / np.var(gae[1])
            scalars["losses/advantage_sign_flips"] = torch.tensor(sign_flips or [0.0]).mean().item()
            scalars["losses/advantage_largest"] = abs(gae[2] * gae[0]).max()
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
            video = run_dir / "video" / f"step-{global_step}.mp4" if args.capture_video else None
            scores, lengths = evaluate(agent, args, args.seed + global_step, video)
            evaluations.append((global_step, scores.mean(), scores.std(), lengths.mean(), len(scores)))
            rows = [("step", "return_mean", "return_std", "length_mean", "episodes"), *evaluations]
            save(run_dir / "progress.csv", "".join(",".join(map(str, row)) + "\n" for row in rows))
            writer.add_scalar("eval/return_mean", scores.mean(), global_step)
        wall = wall_seconds + time.perf_counter() - started
        if finished:
            summary = {"script": Path(__file__).name, "algo": args.algo} | vars(args) | {
                "final_return_mean": scores.mean(), "final_return_std": scores.std(), "finished": True,
                "train_return_last100": episodic_return if envs.finished else None,
                "sps": global_step / train_seconds, "wall_s": wall, "compile": agent_fn is not agent,
            }  # fmt: skip
            save(run_dir / "summary.json", json.dumps(summary, indent=2))
        if save_due or finished or stopping:
            save(run_dir / "checkpoint.pt", {
                "agent": agent.state_dict(), "optimizer": optimizer.state_dict(),
                "envs": envs.finished, "generator": generator.get_state(), "rng": rng.bit_generator.state,
                "progress": (global_step, evaluations, train_seconds, wall),
            })  # fmt: skip
        if finished or stopping:
            writer.close()
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
        args = Args(**saved | {"resume": args.resume})
    defaults = dict.fromkeys(("eval_freq", "checkpoint_freq"), max(1, args.total_timesteps // 20)) | {
        "alpha": 0.5 if args.beta else 1.0,
        "noise_level": {"none": 0.0, "normal": 0.05, "uniform": 0.05}.get(args.noise, 0.1),
    }  # fmt: skip
    args = replace(args, **{name: x for name, x in defaults.items() if getattr(args, name) is None})
    args = replace(args, env_id=rom_name(args.env_id).title().replace("_", ""))  # one name for all spellings
    stamp = f"{args.env_id}__{args.algo}__{args.noise}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    args = replace(args, run_name=args.run_name or stamp)
    for names, what, valid in (
        ("total_timesteps num_envs num_steps eval_episodes log_freq", "at least 1", lambda x: x >= 1),
        ("alpha beta vf_coef ent_coef eval_freq checkpoint_freq", ">= 0", lambda x: 0 <= x < math.inf),
        ("seed total_timesteps", "in [0, 1e9], for the emulator's seeds", lambda x: 0 <= x <= 1e9),
        ("learning_rate rmsprop_eps max_grad_norm", "positive", lambda x: 0 < x < math.inf),
        ("gamma gae_lambda noise_level repeat_action_probability", "in [0, 1]", lambda x: 0 <= x <= 1),
        ("z", "negative, for it stands for log 0", lambda x: -math.inf < x < 0),
    ):
        for name in names.split():
            if not valid(getattr(args, name)):
                raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be {what}")
    for wrong, message in (
        (args.norm_adv and args.num_envs * args.num_steps == 1, "--norm-adv: needs --num-steps 2 or more"),
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
