"""Stable-Baselines3's PPO with the settings of `sppo_continuous.py --policy gaussian`: the yardstick for scores and speed.

    python tests/sb3_ppo.py --env-id Hopper-v4 --seed 10000

Writes `runs/<run_name>/summary.json` with the keys of this repository's own runs. `sps` is without start-up and
evaluation, as there. Settings: the defaults of Stable-Baselines3, with VecNormalize (both are its documented recipe for
MuJoCo), and the same final evaluation: ten episodes, greedy actions, unnormalised rewards, frozen statistics.
"""

import json
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import stable_baselines3
import torch
import tyro
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize


@dataclass
class Args:
    env_id: str = "Hopper-v4"
    seed: int = 10000
    total_timesteps: int = 1_000_000
    eval_episodes: int = 10
    runs_dir: str = "runs"
    run_name: str | None = None


def main(args: Args) -> None:
    warnings.filterwarnings("ignore", message=".*is out of date.*")
    torch.set_num_threads(1)
    started = time.perf_counter()
    envs = VecNormalize(DummyVecEnv([lambda: Monitor(gym.make(args.env_id))]))
    model = stable_baselines3.PPO("MlpPolicy", envs, seed=args.seed, device="cpu")
    training_started = time.perf_counter()
    model.learn(args.total_timesteps)
    train_s = time.perf_counter() - training_started
    train_returns = [episode["r"] for episode in model.ep_info_buffer]

    envs.training = envs.norm_reward = False
    envs.seed(args.seed + model.num_timesteps)
    if args.eval_episodes:
        returns, _ = evaluate_policy(model, envs, args.eval_episodes, deterministic=True, return_episode_rewards=True)
    else:
        returns = [float("nan")]
    summary = dict(
        script="stable_baselines3", version=stable_baselines3.__version__, algo="ppo", env_id=args.env_id,
        seed=args.seed, noise="none", noise_level=0.0, alpha=1.0, beta=0.0, z=-1.0,
        total_timesteps=args.total_timesteps, final_return_mean=float(np.mean(returns)),
        final_return_std=float(np.std(returns)), train_return_last100=float(np.mean(train_returns or [np.nan])),
        sps=model.num_timesteps / train_s, wall_s=time.perf_counter() - started, finished=True,
    )  # fmt: skip
    run_dir = Path(args.runs_dir) / (args.run_name or f"{args.env_id}__sb3_ppo__none__{args.seed}")
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"{summary['final_return_mean']:.1f} ({summary['sps']:.0f} steps/s)")


if __name__ == "__main__":
    main(tyro.cli(Args))
