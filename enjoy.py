# SPDX-FileCopyrightText: 2026 The symmetric-rl-loss authors
# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10,<3.15"
# dependencies = ["torch>=2.11", "gymnasium[mujoco]>=1.2.3", "mujoco>=3.1.6", "ale-py>=0.11.1",
#   "gymnasium[box2d]>=1.2.3; python_version < '3.14' and platform_machine != 'aarch64'",
#   "numpy>=2.0", "tyro>=1.0.16", "filelock>=3.30", "safetensors>=0.4.5", "tensorboard>=2.19",
#   "tqdm>=4.66.5", "transformers>=5.0", "datasets>=4.0", "accelerate>=1.10", "peft>=0.18",
#   "pyarrow>=21.0", "moviepy>=2.1"]
# [tool.uv]  # the versions of requirements.lock
# exclude-newer = "2026-11-17T00:00:00Z"
# constraint-dependencies = ["torch==2.13.0"]
# ///
"""Plays the agent of a run, which may be unfinished, with the copy of the script in its folder.
Prints its score; films the first episode, if asked. A language model answers held-out prompts.

    python enjoy.py                                            # the newest run
    python enjoy.py runs/NAME --episodes 100 --seed 7 --video
    python enjoy.py runs/NAME --env-kwargs '{"delay": 5}'      # in another environment

In your own code, `import enjoy; act = enjoy.load_agent("runs/NAME")`, then `action = act(obs)`."""

import hashlib
import importlib.util
import json
import os
import random
import sys
from contextlib import closing, suppress
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path

import gymnasium as gym
import numpy as np
import safetensors.torch
import torch
import tyro

MAX_FRAMES = 2000  # of a film; until it is written, each takes about a megabyte of memory


@dataclass
class Args:
    run: tyro.conf.Positional[Path | None] = None  # folder of the run; default: the newest of runs/
    episodes: int = 10
    seed: int = 1
    env_kwargs: str = "{}"  # JSON, of control: arguments of the environment, beside the run's own
    video: bool = False  # films the first episode, not of language models (pip install moviepy)


def load_run(folder, plays=True):
    """Imports the run's own copy of its script, and what it plays. Returns the script, the run's
    arguments, and the tensors of agent.safetensors, which a language model does not have."""
    if not (folder / "sessions.jsonl").exists():
        raise FileNotFoundError(f"{folder}: not a run, it has no sessions.jsonl")
    session = json.loads((folder / "sessions.jsonl").read_text().splitlines()[-1])
    # Modules are found where the run found them; earlier runs have not recorded their path
    used = {parent for file in session["files"] for parent in Path(file).parents}
    path = [Path(session["working_directory"], x).resolve() for x in session.get("path", [])]
    sys.path[:0] = [session["directory"], *(str(entry) for entry in path if entry in used)]
    # By its loader, since a script that was a link to a file may lack ".py"
    loader = SourceFileLoader(folder.name, str(folder / session["script"]))
    spec = importlib.util.spec_from_loader(folder.name, loader)
    script = sys.modules[folder.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    del sys.modules[folder.name]  # a run started later in this process would list it
    script.START = Path(session["working_directory"])  # where relative paths in its arguments begin
    run_args = object.__new__(script.Args)  # __post_init__ has already converted these values
    for name, value in session["args"].items():
        if name not in script.NO_EFFECT:  # whatever the device
            setattr(run_args, name, tuple(value) if isinstance(value, list) else value)
    is_text = hasattr(script, "local_digests")
    if is_text:
        os.chdir(script.START)
    if plays:  # imports the environment, or the reward functions
        for name in {"prepare", "import_functions"} & vars(script).keys():
            vars(script)[name](run_args)
    local = script.local_digests(run_args) if is_text else {}
    if not plays:  # an environment is not imported
        files = filter(Path.is_file, map(Path, session["files"]))
        local |= {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    now = {}
    for path, digest in (script.file_digests() | local).items():
        now.setdefault(Path(path).name, []).append(digest)
    for path, digest in session["files"].items():
        if digest not in now.get(Path(path).name, [digest]):
            print(f"warning: {path} has changed since this run", file=sys.stderr)
    if not (folder / ("checkpoint.pt" if is_text else "agent.safetensors")).exists():
        raise FileNotFoundError(f"{folder}: no agent yet; a run saves one at its first evaluation")
    if is_text:
        return script, run_args, None
    # Read whole, since a file that is open for long can't be replaced on Windows
    return script, run_args, safetensors.torch.load((folder / "agent.safetensors").read_bytes())


def control_agent(script, run_args, tensors, env):
    """An agent of continuous control, and the statistics that normalise its observations."""
    tensors.pop("action_bounds", None)
    agent = script.Agent(env, run_args)
    obs_stats = script.RunningStats()
    obs_stats.load_state_dict({n: tensors.pop(f"obs_{n}") for n in obs_stats.state_dict()})
    agent.load_state_dict(tensors)
    return agent, obs_stats


def atari_agent(script, run_args, tensors, games):
    """An agent of an Atari game, which computes as in training."""
    bfloat16 = run_args.amp == "auto" and script.has_bfloat16(torch.device("cpu"))
    agent = script.Agent(games.num_actions, bfloat16)
    agent.load_state_dict(tensors)
    return agent


def load_agent(folder, seed=1):
    """The agent of a run as a function `act(obs)`, which returns an action as in evaluations.

    In control, `obs` and actions are those of the script's `make_env`, and actions are greedy. On
    Atari, `obs` is the last four images (4, 84, 84), uint8; actions are sampled, with `seed`."""
    script, run_args, tensors = load_run(Path(folder).absolute(), plays=False)
    if tensors is None:
        raise ValueError(f"{folder}: a language model; load its policy/ with from_pretrained")
    if hasattr(script, "AtariGames"):
        games = script.AtariGames(run_args, 1)
        example = games.reset(seed)[0]
        agent = atari_agent(script, run_args, tensors, games)
        generator = torch.Generator().manual_seed(seed)

        def choose(batch):
            with torch.no_grad():
                logits, _ = agent(torch.from_numpy(batch))
            return (logits + script.sample_gumbel(logits.shape, generator)).argmax(-1).tolist()
    else:
        low, high = tensors["action_bounds"].numpy()
        example = np.zeros(len(tensors["obs_mean"]))
        env = gym.Env()  # which has only spaces
        env.observation_space = gym.spaces.Box(-np.inf, np.inf, example.shape)
        env.action_space = gym.spaces.Box(low, high, dtype=low.dtype)
        agent, obs_stats = control_agent(script, run_args, tensors, env)
        actor = agent.actor_fn()

        def choose(batch):
            return agent.to_env(actor(obs_stats.normalize(batch))[0])

    def act(obs):
        found = np.array(obs)
        if found.shape != example.shape or not np.can_cast(found.dtype, example.dtype, "same_kind"):
            needed = f"act needs one observation, {example.dtype} {example.shape}"
            raise ValueError(f"{needed}, not {found.dtype} {found.shape}")
        if not np.isfinite(found).all():
            raise ValueError(f"observation not finite: {found}")
        return choose(found[None])[0]

    return act


def keep_frames(env, get_frame, is_over):
    """Makes `env.step` keep frames until an episode is over, in the list that is returned.
    `get_frame` and `is_over` are functions of what `step` returns."""
    frames, over, step = [], [], env.step

    def step_and_keep(action):
        result = step(action)
        if not over and len(frames) < MAX_FRAMES:
            try:
                frame = np.array(get_frame(result))  # a copy: some environments reuse one array
            except Exception as error:  # a renderer may raise any
                sys.exit(f"error: no frame: {error!r:.200}; MuJoCo: MUJOCO_GL=egl, osmesa or glfw?")
            if frame.ndim != 3 or frame.shape[2] not in (3, 4) or frame.dtype != np.uint8:
                sys.exit("error: no film: render() must return images (height, width, 3), uint8")
            frames.append(frame)
        if is_over(result):
            over.append(True)
        return result

    env.step = step_and_keep
    return frames


def play_control(script, run_args, tensors, args):
    """Scores, lengths (episodes,), other measures, frames (if filmed), frames per second and
    magnification."""
    options = {"render_mode": "rgb_array"} if args.video else {}
    with closing(script.make_env(run_args, args.seed, **options)) as env:
        renderer = getattr(env.unwrapped, "mujoco_renderer", None)
        if renderer and renderer.camera_id == -1 and renderer.model.ncam:
            renderer.camera_id = 0  # it follows the agent; Gymnasium 1.4's default does not
        frames = []
        if args.video:
            frames = keep_frames(env, lambda _: env.render(), lambda result: result[2] or result[3])
        agent, obs_stats = control_agent(script, run_args, tensors, env)
        scores, lengths, *rows = script.evaluate(agent, run_args, obs_stats, args.seed, env)
    measures = script.means(sum(rows, [])) if hasattr(script, "means") else {}
    return scores, lengths, measures, frames, env.metadata.get("render_fps") or 30, 1


def play_atari(script, run_args, tensors, args):
    """Returns the same as `play_control`."""
    games = script.AtariGames(run_args, args.episodes)
    frames = []
    if args.video:
        frames = keep_frames(
            games,
            lambda result: result[0][0, -1, ..., None].repeat(3, axis=-1),  # of the first game
            lambda result: 0 in result[-1],  # it is among the games that are over
        )
    agent = atari_agent(script, run_args, tensors, games)
    scores, lengths = script.evaluate(agent, games, args.seed)
    frames = frames[: int(lengths[0]) - 1]  # the last image is the next game's first
    return scores, lengths, {}, frames, 15, 4  # in real time


def play_text(script, run_args, folder, args):
    """Prints responses to some held-out prompts, then the measures of an evaluation."""
    setup = script.load(run_args)
    progress = script.restore(setup, folder)
    row, samples = script.evaluate(setup, run_args, progress.global_step)
    for sample in samples:
        print(f"{sample['reward']:.3f} {sample['prompt']} [{sample['response'].strip()}]")
    for name, number in row.items():
        print(f"{name}: {number:.4g}")
    print(f"{folder}: reward {row['return_mean']:.3f} (standard deviation {row['return_std']:.3f})")


def main():
    args = tyro.cli(Args)
    with suppress(AttributeError):  # of a notebook's stdout, which has all letters
        sys.stdout.reconfigure(errors="backslashreplace")  # for letters that a terminal lacks
    if args.episodes < 1 or not 0 <= args.seed < 2**32:
        sys.exit("error: --episodes must be at least 1, and --seed from 0 to 4294967295")
    if args.video and not importlib.util.find_spec("moviepy"):
        sys.exit("error: --video needs moviepy: pip install moviepy")
    if args.video and sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")  # before MuJoCo is imported
    random.seed(args.seed)  # some environments draw from these global generators
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    saved = [*Path("runs").rglob("agent.safetensors"), *Path("runs").rglob("samples.jsonl")]
    if not args.run and not saved:
        sys.exit("error: no agent in runs/; a run saves one at its first evaluation")
    folder = args.run or max(saved, key=lambda path: path.stat().st_mtime).parent
    folder = folder.absolute()  # since the run's files may change the working directory
    try:
        script, run_args, tensors = load_run(folder)
    except ImportError as error:
        sys.exit(f"error: {error} (is its module on PYTHONPATH?)")
    except (FileNotFoundError, gym.error.Error) as error:
        sys.exit(f"error: {error}")
    try:
        own_kwargs = dict(json.loads(args.env_kwargs))
    except (TypeError, ValueError):
        sys.exit('error: --env-kwargs must be a JSON object, as {"delay": 5}')
    if own_kwargs:
        if not hasattr(run_args, "env_kwargs"):
            sys.exit("error: --env-kwargs is for continuous control")
        run_args.env_kwargs = json.dumps(json.loads(run_args.env_kwargs) | own_kwargs)
    run_args.eval_episodes = args.episodes
    run_args.seed = args.seed
    if tensors is None:
        play_text(script, run_args, folder, args)
        return
    play = play_atari if hasattr(script, "AtariGames") else play_control
    scores, lengths, measures, frames, fps, magnification = play(script, run_args, tensors, args)
    for name, number in {"length_mean": lengths.mean(), **measures}.items():
        print(f"{name}: {number:.4g}")
    print(f"{folder}: return {scores.mean():.1f} (standard deviation {scores.std():.1f})")
    if args.video:
        from moviepy import ImageSequenceClip

        height, width = np.array(frames[0].shape[:2]) // 2 * 2  # codecs require even sizes
        clip = ImageSequenceClip([frame[:height, :width] for frame in frames], fps=fps)
        path = folder / "video" / f"seed-{args.seed}.mp4"
        path.parent.mkdir(exist_ok=True)
        clip.resized(magnification).write_videofile(str(path), logger=None)
        print(f"film: {path}, {len(frames):,} frames of {lengths[0]:,.0f} steps")


if __name__ == "__main__":
    main()
