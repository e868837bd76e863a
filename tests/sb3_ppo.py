"""Stable-Baselines3's PPO under the settings of `sppo_continuous.py --policy gaussian`: a yardstick.

    pip install -e ".[peers]" && python tests/sb3_ppo.py --env-id Hopper-v4 --seed 10000

Both follow Stable-Baselines3's defaults for PPO and VecNormalize, so nothing has to be set here. The score is
taken in the same way: episodes with greedy actions, raw rewards and the statistics of the training. Writes
runs/NAME/summary.json with the keys that our own runs have; `sps` is without start-up and evaluation.
"""

import json
import time
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize


@dataclass
class Args:
    env_id: str = "Hopper-v4"
    seed: int = 1
    total_timesteps: int = 1_000_000
    eval_episodes: int = 10
    runs_dir: str = "runs"
    run_name: str | None = None


def main(args: Args) -> None:
    warnings.filterwarnings("ignore", message=".*is out of date.*")
    wall_started = time.perf_counter()
    torch.set_num_threads(1)
    run_dir = Path(args.runs_dir) / (args.run_name or f"{args.env_id}__sb3__none__{args.seed}")
    run_dir.mkdir(parents=True)
    envs = VecNormalize(DummyVecEnv([lambda: Monitor(gym.make(args.env_id))]))
    model = PPO("MlpPolicy", envs, seed=args.seed, device="cpu")
    started = time.perf_counter()
    model.learn(args.total_timesteps)
    train_s = time.perf_counter() - started

    train_returns = [episode["r"] for episode in model.ep_info_buffer]
    envs.training = envs.norm_reward = False
    envs.seed(args.seed + model.num_timesteps)
    returns, _ = evaluate_policy(
        model, envs, args.eval_episodes, deterministic=True, return_episode_rewards=True
    )
    summary = vars(args) | {
        "script": "stable_baselines3",
        "version": version("stable-baselines3"),
        "algo": "ppo",
        "noise": "none",
        "noise_level": 0.0,
        "alpha": 1.0,
        "beta": 0.0,
        "z": -1.0,
        "final_return_mean": np.mean(returns),
        "final_return_std": np.std(returns),
        "train_return_last100": np.mean(train_returns) if train_returns else None,
        "sps": model.num_timesteps / train_s,
        "wall_s": time.perf_counter() - wall_started,
        "finished": True,
    }
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main(tyro.cli(Args))
