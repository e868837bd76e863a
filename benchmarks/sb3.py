"""Stable-Baselines3's PPO and A2C, and the PPO of SBX (Stable-Baselines3 in JAX), with the settings
of our baselines and without a reverse loss: a yardstick.

    pip install -e ".[peers]"
    python benchmarks/sb3.py                                # sppo_continuous.py --policy gaussian
    python benchmarks/sb3.py --library sbx                  # the same in JAX, compiled
    python benchmarks/sb3.py --algo a2c                     # sa2c_continuous.py --policy gaussian
    python benchmarks/sb3.py --atari --env-id Breakout      # sppo_atari.py --beta 0 --amp off
    python benchmarks/sb3.py --atari --env-id Breakout --algo a2c   # sa2c_atari.py, the same

For continuous control all follow Stable-Baselines3's defaults, with VecNormalize; A2C takes eight
steps in four environments. For Atari the settings are those of its own benchmark, with its usual
wrappers. SBX has no A2C. Scores are taken as in our scripts: raw rewards, and greedy actions and
the statistics of the training, or sampled actions in whole games. Writes runs/NAME/summary.json
with the keys that our own runs have; `sps` is without start-up and evaluation."""

import json
import sys
import time
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import ale_py
import gymnasium as gym
import numpy as np
import torch
import tyro
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize

PACKAGES = {"sb3": "stable-baselines3", "sbx": "sbx-rl"}


@dataclass
class Args:
    algo: Literal["ppo", "a2c"] = "ppo"
    library: Literal["sb3", "sbx"] = "sb3"
    env_id: str = "Hopper-v4"
    atari: bool = False
    seed: int = 1
    total_timesteps: int = 1_000_000
    eval_episodes: int = 10
    device: Literal["cpu", "cuda"] = "cpu"
    runs_dir: str = "runs"
    run_name: str | None = None


def atari_envs(args: Args, num_envs: int, **wrapper):
    return VecFrameStack(
        make_atari_env(f"{args.env_id}NoFrameskip-v4", num_envs, args.seed, wrapper_kwargs=wrapper),
        4,
    )


def main(args: Args) -> None:
    if args.library == "sbx" and (args.atari or args.algo != "ppo"):
        sys.exit("error: --library sbx: only PPO in continuous control")
    warnings.filterwarnings("ignore", message=".*is out of date.*")
    gym.register_envs(ale_py)
    wall_started = time.perf_counter()
    run_dir = Path(args.runs_dir) / (
        args.run_name or f"{args.env_id}__{args.library}-{args.algo}__none__{args.seed}"
    )
    if (run_dir / "summary.json").exists():
        sys.exit(f"error: {run_dir}: a finished run; choose another --run-name")
    run_dir.mkdir(parents=True, exist_ok=True)
    seed_and_device = {"seed": args.seed, "device": args.device}
    if args.atari and args.algo == "ppo":
        settings = dict(n_steps=128, n_epochs=4, batch_size=256, ent_coef=0.01)
        settings |= dict(
            learning_rate=lambda left: 2.5e-4 * left, clip_range=lambda left: 0.1 * left
        )
        model = PPO("CnnPolicy", atari_envs(args, 8), **settings, **seed_and_device)
    elif args.atari:
        settings = dict(ent_coef=0.01, vf_coef=0.25)
        settings |= dict(
            policy_kwargs=dict(optimizer_class=RMSpropTFLike, optimizer_kwargs=dict(eps=1e-5))
        )
        model = A2C("CnnPolicy", atari_envs(args, 16), **settings, **seed_and_device)
    else:
        torch.set_num_threads(1)
        count = 1 if args.algo == "ppo" else 4
        envs = VecNormalize(DummyVecEnv([lambda: Monitor(gym.make(args.env_id))] * count))
        if args.library == "sbx":
            import sbx  # with JAX, which takes seconds

            model = sbx.PPO("MlpPolicy", envs, **seed_and_device)
        elif args.algo == "ppo":
            model = PPO("MlpPolicy", envs, **seed_and_device)
        else:
            model = A2C("MlpPolicy", envs, n_steps=8, **seed_and_device)
    if args.library == "sbx":
        if args.total_timesteps <= model.n_steps:
            sys.exit(f"error: --total-timesteps: more than {model.n_steps}, the first rollout")
        model.learn(1)  # one rollout and update: JAX compiles, which is start-up
    first_step = model.num_timesteps
    started = time.perf_counter()
    model.learn(args.total_timesteps - first_step, reset_num_timesteps=False)
    train_s = time.perf_counter() - started

    train_returns = [episode["r"] for episode in model.ep_info_buffer]
    if args.atari:
        envs = atari_envs(args, 1, clip_reward=False)
    else:
        envs.training = envs.norm_reward = False
    envs.seed(args.seed + model.num_timesteps)
    returns, _ = evaluate_policy(
        model, envs, args.eval_episodes, deterministic=not args.atari, return_episode_rewards=True
    )
    summary = vars(args) | {
        "script": PACKAGES[args.library],
        "version": version(PACKAGES[args.library]),
        "noise": "none",
        "noise_level": 0.0,
        "alpha": 1.0,
        "beta": 0.0,
        "z": -1.0,
        "final_return_mean": np.mean(returns),
        "final_return_std": np.std(returns),
        "train_return_last100": np.mean(train_returns) if train_returns else None,
        "sps": (model.num_timesteps - first_step) / train_s,
        "wall_s": time.perf_counter() - wall_started,
        "finished": True,
    }
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main(tyro.cli(Args))
