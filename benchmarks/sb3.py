"""Stable-Baselines3's PPO and A2C, and the PPO of SBX (Stable-Baselines3 in JAX), with the settings
of our baselines and without a reverse loss: a yardstick.

    pip install -e ".[peers]"
    python benchmarks/sb3.py                                # sppo_continuous.py --policy gaussian
    python benchmarks/sb3.py --library sbx                  # the same in JAX, compiled
    python benchmarks/sb3.py --algo a2c                     # sa2c_continuous.py --policy gaussian
    python benchmarks/sb3.py --atari --env-id Breakout      # sppo_atari.py --beta 0 --amp off
    python benchmarks/sb3.py --atari --env-id Breakout --algo a2c   # sa2c_atari.py, the same

For continuous control all follow Stable-Baselines3's defaults, with VecNormalize; A2C takes eight
steps in four environments. For Atari the settings are those of Stable-Baselines3's own benchmark,
with its usual wrappers. SBX has no A2C. Scores are taken as in our scripts: raw rewards; in control
greedy actions and the training's statistics, on Atari sampled actions in whole games. Writes
sessions.jsonl, progress.csv and summary.json like our scripts, for report.py and run.py; `sps` is
without start-up and evaluation."""

import csv
import hashlib
import json
import platform
import shutil
import sys
import time
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import ale_py
import gymnasium as gym
import torch
import tyro
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize

sys.path.append(str(Path(__file__).resolve().parent.parent))  # environments beside our scripts, too
import sppo_continuous  # noqa: E402


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
    exp_name: str | None = None  # default: library-algorithm
    runs_dir: str = "runs"


def atari_envs(args, num_envs, **wrapper):
    env_id = f"{args.env_id}NoFrameskip-v4"
    return VecFrameStack(make_atari_env(env_id, num_envs, args.seed, wrapper_kwargs=wrapper), 4)


def make_model(args):
    common = {"seed": args.seed, "device": args.device}
    if args.atari and args.algo == "ppo":
        return PPO(
            "CnnPolicy",
            atari_envs(args, 8),
            n_steps=128,
            n_epochs=4,
            batch_size=256,
            ent_coef=0.01,
            learning_rate=lambda left: 2.5e-4 * left,
            clip_range=lambda left: 0.1 * left,
            **common,
        )
    if args.atari:
        optimizer = {"optimizer_class": RMSpropTFLike, "optimizer_kwargs": {"eps": 1e-5}}
        envs = atari_envs(args, 16)
        return A2C(
            "CnnPolicy", envs, ent_coef=0.01, policy_kwargs=optimizer, vf_coef=0.25, **common
        )
    torch.set_num_threads(1)
    count = 1 if args.algo == "ppo" else 4
    envs = VecNormalize(DummyVecEnv([lambda: Monitor(gym.make(args.env_id))] * count))
    if args.library == "sbx":
        import sbx  # with JAX, which takes seconds

        return sbx.PPO("MlpPolicy", envs, **common)
    if args.algo == "ppo":
        return PPO("MlpPolicy", envs, **common)
    return A2C("MlpPolicy", envs, n_steps=8, **common)


def evaluate(args, model):
    """The row of progress.csv."""
    if args.atari:
        envs = atari_envs(args, 1, clip_reward=False)
    else:
        envs = model.get_env()
        envs.training = False
        envs.norm_reward = False
    envs.seed(args.seed + model.num_timesteps)
    episodes = evaluate_policy(
        model,
        envs,
        args.eval_episodes,
        deterministic=not args.atari,
        return_episode_rewards=True,
    )
    returns, lengths = map(torch.tensor, episodes)
    return {
        "step": model.num_timesteps,
        "return_mean": returns.double().mean().item(),
        "return_std": returns.double().std(correction=0).item(),
        "length_mean": lengths.double().mean().item(),
    }


def file_digests(args):
    """{path: SHA-256} of this file and of the environment's, as in our scripts."""
    if not args.atari:
        with gym.make(args.env_id) as env:  # imports its files
            env.reset(seed=0)
    script = Path(__file__).resolve()
    digests = sppo_continuous.file_digests()
    del digests[str(sppo_continuous.SCRIPT)]
    return digests | {str(script): hashlib.sha256(script.read_bytes()).hexdigest()}


def folder_of(args, digests):
    """Folder of the run. The same command with the same files has the same folder."""
    files = sorted((Path(path).name, digest) for path, digest in digests.items())
    digest = hashlib.sha256(json.dumps([vars(args), files]).encode())
    name = f"{args.env_id}__{args.exp_name}__none__{args.seed}__{digest.hexdigest()[:8]}"
    return Path(args.runs_dir, name)


def session_of(args, digests, folder):
    """The line of sessions.jsonl, by the names that our scripts give its parts."""
    script = Path(__file__).resolve()
    package = {"sb3": "stable-baselines3", "sbx": "sbx-rl"}[args.library]
    return {
        "run": folder.name,
        "script": script.name,
        "args": vars(args) | {"noise": "none", "noise_level": 0.0},
        "command": sys.argv,
        "files": digests,
        "directory": str(script.parent),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "versions": {package: version(package), "torch": torch.__version__},
        "platform": platform.platform(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def main(args: Args):
    if args.library == "sbx" and (args.atari or args.algo != "ppo"):
        sys.exit("error: --library sbx: only PPO in continuous control")
    args.exp_name = args.exp_name or f"{args.library}-{args.algo}"
    warnings.filterwarnings("ignore", message=".*is out of date.*")
    digests = file_digests(args)
    folder = folder_of(args, digests)
    if (folder / "summary.json").exists():
        print(f"{folder}: finished")
        return
    session = session_of(args, digests, folder)
    gym.register_envs(ale_py)
    model = make_model(args)
    if args.library == "sbx":
        if args.total_timesteps <= model.n_steps:
            sys.exit(f"error: --total-timesteps must be more than a rollout, {model.n_steps}")
        model.learn(1)  # one rollout and update: JAX compiles, which is start-up
    first_step = model.num_timesteps
    started = time.perf_counter()
    model.learn(args.total_timesteps - first_step, reset_num_timesteps=False)
    seconds = time.perf_counter() - started

    row = evaluate(args, model)
    sps = (model.num_timesteps - first_step) / seconds
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sessions.jsonl").write_text(json.dumps(session) + "\n")
    shutil.copy(__file__, folder)
    with open(folder / "progress.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerow(row)
    (folder / "summary.json").write_text(json.dumps(row | {"sps": sps}, indent=2))
    print(f"{folder}: return {row['return_mean']:.1f}, {sps:,.0f} steps/s")


if __name__ == "__main__":
    main(tyro.cli(Args))
