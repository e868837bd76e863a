# SPDX-FileCopyrightText: 2026 The symmetric-rl-loss authors
# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10,<3.15"
# dependencies = ["torch>=2.11", "gymnasium[mujoco]>=1.2.3", "mujoco>=3.1.6", "ale-py>=0.11.1",
#   "gymnasium[box2d]>=1.2.3; python_version < '3.14' and platform_machine != 'aarch64'",
#   "numpy>=2.0", "tyro>=1.0.16", "filelock>=3.24", "safetensors>=0.4.5", "tensorboard>=2.19",
#   "tqdm>=4.66.5", "transformers>=5.0", "datasets>=4.0", "accelerate>=1.10", "peft>=0.18",
#   "moviepy>=2.1"]
# [tool.uv]  # the versions of requirements.lock
# exclude-newer = "2026-11-17T00:00:00Z"
# constraint-dependencies = ["torch==2.13.0"]
# ///
"""Plays the agent of a run and prints its score; films the first episode, if asked. A language
model writes to held-out prompts.

    python enjoy.py                                            # the newest run
    python enjoy.py runs/NAME --episodes 100 --seed 7 --video

Imports the copy of the script in the run's folder, so edited scripts and unfinished runs work, too.
"""

import importlib.util
import json
import os
import sys
import warnings
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import safetensors.torch
import torch
import tyro

try:
    from moviepy import ImageSequenceClip
except ImportError:  # without --video it is not needed
    ImageSequenceClip = None


@dataclass
class Args:
    run: tyro.conf.Positional[Path | None] = None  # folder of the run; default: the newest of runs/
    episodes: int = 10
    seed: int = 1
    video: bool = False  # of the first episode, if not of a text (pip install moviepy)


class Film(gym.Wrapper):
    """Frames cropped to even sizes, as codecs require, and copied: some environments reuse one."""

    def render(self):
        frame = self.env.render()
        height, width = np.array(frame.shape[:2]) // 2 * 2
        return frame[:height, :width].copy()


def play_control(script, run_args, tensors, args, video):
    """Scores (episodes,) of an agent of continuous control."""
    options = {"render_mode": "rgb_array"} if args.video else {}
    env = script.make_env(run_args, **options)
    if args.video:
        renderer = getattr(env.unwrapped, "mujoco_renderer", None)
        if renderer and renderer.camera_id == -1 and renderer.model.ncam:
            renderer.camera_id = 0  # it follows the agent; Gymnasium 1.4's default does not
        options = {"name_prefix": video.stem, "episode_trigger": lambda i: i == 0}
        env = gym.wrappers.RecordVideo(Film(env), str(video.parent), **options)
    agent = script.Agent(env, run_args)
    obs_stats = script.RunningStats()
    obs_stats.load_state_dict({n: tensors.pop(f"obs_{n}") for n in obs_stats.state_dict()})
    agent.load_state_dict(tensors)
    with closing(env):  # which writes the film
        scores, _ = script.evaluate(agent, run_args, obs_stats, args.seed, env)
    return scores


def play_atari(script, run_args, tensors, args, video):
    """Scores (episodes,) of an agent of an Atari game, which computes as in training."""
    games = script.AtariGames(run_args, args.episodes)
    bfloat16 = run_args.amp == "auto" and script.has_bfloat16(torch.device("cpu"))
    agent = script.Agent(games.num_actions, bfloat16)
    agent.load_state_dict(tensors)
    frames = []
    step = games.step

    def step_and_film(action):
        result = step(action)
        images = result[0]
        frames.append(images[0, -1].copy())  # the first game's latest
        return result

    games.step = step_and_film
    scores, lengths = script.evaluate(agent, games, args.seed)
    if args.video:  # without the last image, which is the next game's first
        first_game = [grey[..., None].repeat(3, axis=-1) for grey in frames[: int(lengths[0]) - 1]]
        video.parent.mkdir(exist_ok=True)
        film = ImageSequenceClip(first_game, fps=15)  # in real time
        film.resized(4).write_videofile(str(video), logger=None)  # enlarged
    return scores


def play_text(script, run_args, folder, args):
    """Prints responses of a language model to held-out prompts, and what its script's evaluations
    measure, over all `episodes` of them."""
    run_args = replace(run_args, seed=args.seed)
    setup = script.load(run_args)
    progress = script.restore(setup, folder, torch.Generator(), np.random.default_rng())
    row, samples = script.evaluate(setup, run_args, progress.global_step)
    for sample in samples:
        print(f"{sample['reward']:.3f} {sample['prompt']} [{sample['response'].strip()}]")
    for name, number in row.items():
        print(f"{name}: {number:.4g}")
    score = f"reward {row['return_mean']:.3f} (standard deviation {row['return_std']:.3f})"
    print(f"{folder}: {score}")


def newest_run():
    """Folder of the run in runs/ that has saved an agent last, if any has."""
    saved = [*Path("runs").rglob("agent.safetensors"), *Path("runs").rglob("samples.jsonl")]
    return max(saved, key=lambda path: path.stat().st_mtime).parent if saved else None


def load_run(folder):
    """Imports the run's own copy of its script. Returns it and the run's arguments."""
    session = json.loads((folder / "sessions.jsonl").read_text().splitlines()[-1])
    path = folder / session["script"]
    sys.path.append(str(Path(session["command"][0]).absolute().parent))  # where its helpers are
    spec = importlib.util.spec_from_file_location(path.stem, path)
    script = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    kept = {name: x for name, x in session["args"].items() if name not in script.NO_EFFECT}
    run_args = script.Args(**kept)  # on any device
    if hasattr(script, "prepare"):
        script.prepare(run_args)  # imports the rest
    if run_args.folder().name != session["run"]:
        print("warning: a file that the script imports has changed since this run", file=sys.stderr)
    return script, run_args


def main():
    args = tyro.cli(Args)
    if args.video:
        if not ImageSequenceClip:
            sys.exit("error: --video needs moviepy: pip install moviepy")
        if sys.platform == "linux" and "DISPLAY" not in os.environ:
            os.environ.setdefault("MUJOCO_GL", "egl")  # before MuJoCo is imported; no display
        warnings.filterwarnings("ignore", message=".*Overwriting existing videos")
    folder = args.run or newest_run()
    if not folder:
        sys.exit("error: no agent in runs/; a run saves one at its first evaluation")
    if not (folder / "sessions.jsonl").exists():
        sys.exit(f"error: {folder}: not a run, or one of an earlier version")
    script, run_args = load_run(folder)
    run_args = replace(run_args, eval_episodes=args.episodes)
    is_text = hasattr(script, "load")
    if not (folder / ("samples.jsonl" if is_text else "agent.safetensors")).exists():
        sys.exit(f"error: {folder}: no agent yet; a run saves one at its first evaluation")
    if is_text:
        play_text(script, run_args, folder, args)
        return
    # Read whole, since a file that is open for long can't be replaced on Windows
    tensors = safetensors.torch.load((folder / "agent.safetensors").read_bytes())
    video = folder / "video" / f"seed-{args.seed}.mp4"
    play = play_atari if hasattr(script, "AtariGames") else play_control
    scores = play(script, run_args, tensors, args, video)
    print(f"{folder}: return {scores.mean():.1f} (standard deviation {scores.std():.1f})")
    if args.video:
        print(f"film: {video.parent}")


if __name__ == "__main__":
    main()
