"""Steps per second of our scripts over those of Stable-Baselines3's PPO and A2C, of SBX's PPO (in
JAX) and of TRL's PPO, in one run.

    pip install -e ".[rlhf,peers]"
    python benchmarks/speed.py               # sppo_continuous.py
    python benchmarks/speed.py --algo a2c    # sa2c_continuous.py
    python benchmarks/speed.py --suite atari --env-id Breakout --total-timesteps 20480
    python benchmarks/speed.py --suite atari --env-id Breakout --total-timesteps 20480 --algo a2c
    python benchmarks/speed.py --suite rlhf --total-timesteps 336 --policy-model DIR --dataset FILE

The same work for all. Continuous, on one thread, observations and rewards normalised by running
statistics: PPO in one environment, with 2048 steps between updates, 10 epochs of 32 minibatches of
64; A2C in four, with 8 steps of each between updates. Atari, on all cores: PPO with 8 games, 128
steps between updates, 4 epochs of 4 minibatches of 256; A2C with 16 games and 5 steps. RLHF, on all
cores: 112 texts an update, prompts of 64 tokens and 48 new ones, sampled among all, 5 epochs of 4
minibatches of 28, a critic, the policy with a random head as reward model, no cross entropy on
reference texts; a step is a text. The programs take turns, so that a slow spell of the machine hits
them all; the table gives medians. Then, for PPO in control on a CPU, the parts of our step.
"""

import contextlib
import dataclasses
import io
import json
import math
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from unittest import mock

import numpy as np
import torch
import transformers
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import sppo_atari  # noqa: E402
import sppo_continuous as script  # noqa: E402


@dataclass
class Args:
    suite: Literal["continuous", "atari", "rlhf"] = "continuous"
    algo: Literal["ppo", "a2c"] = "ppo"
    env_id: str = "HalfCheetah-v4"
    policy_model: str | None = None  # for rlhf: a folder
    dataset: str | None = None  # for rlhf: JSONL, texts of 130 tokens or more
    total_timesteps: int = 200_000
    repeats: int = 3
    device: Literal["cpu", "cuda"] = "cpu"  # of all that take part
    out: str | None = None  # folder for speed.md (what is printed) and summary.json, when done


def programs(args: Args, scratch: Path) -> dict[str, list[str]]:
    """{name: command} of what takes part, the peer first."""
    suite, algo = args.suite, args.algo
    if suite == "rlhf":
        save_reward_model(args.policy_model, scratch / "reward")
        common = ["--policy-model", args.policy_model, "--reward-model", str(scratch / "reward")]
        common += ["--dataset", args.dataset, "--total-timesteps", str(args.total_timesteps)]
        common += ["--device", args.device]
        ours = ["sppo_rlhf.py", *common, "--task", "imdb", "--top-k", "0", "--ce-coef", "0"]
        ours += ["--eval-episodes", "1", "--eval-freq", "0", "--checkpoint-freq", "0"]
        return {
            "TRL, float32": ["benchmarks/trl_ppo.py", *common],
            "TRL, bfloat16": ["benchmarks/trl_ppo.py", *common, "--amp", "auto"],
            "ours, SPPO, float32": [*ours, "--amp", "off"],
            "ours, SPPO, bfloat16": ours,
        }
    file, plain, symmetric = f"s{algo}_{suite}.py", algo.upper(), "S" + algo.upper()
    peer = ["benchmarks/sb3.py", "--algo", algo] + (["--atari"] if suite == "atari" else [])
    common = ["--env-id", args.env_id, "--eval-episodes", "1"]
    common += ["--total-timesteps", str(args.total_timesteps), "--device", args.device]
    if suite == "atari":
        ours = {
            plain: ["--beta", "0"],
            symmetric: [],
            f"{plain}, --amp off": ["--beta", "0", "--amp", "off"],
        }
        ours |= {f"{symmetric}, --amp off": ["--amp", "off"]}
        compiled = "--compile" if args.device == "cuda" else "--no-compile"
        ours = {name: [*flags, compiled] for name, flags in ours.items()}
    else:
        ours = {f"Gaussian {plain}": ["--policy", "gaussian"], f"{symmetric} (11 bins)": []}
        ours |= {f"{name}, --no-compile": [*flags, "--no-compile"] for name, flags in ours.items()}
    ours = {
        f"ours, {name}": [file, *common, "--eval-freq", "0", *flags] for name, flags in ours.items()
    }
    peers = {"Stable-Baselines3": peer + common}
    if suite == "continuous" and algo == "ppo" and args.device == "cpu":
        peers["SBX"] = [*peer, "--library", "sbx", *common]
    return peers | ours


def save_reward_model(policy: str, folder: Path) -> None:
    """The policy with a head for scores, random, and its tokenizer, as TRL's reward model must have
    it."""
    torch.manual_seed(0)
    transformers.AutoModelForSequenceClassification.from_pretrained(
        policy, num_labels=1
    ).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(policy).save_pretrained(folder)


def steps_per_second(program: list[str]) -> float:
    with tempfile.TemporaryDirectory() as runs_dir:
        flags = ["--runs-dir", runs_dir, "--run-name", "speed"]
        command = [sys.executable, ROOT / program[0], *program[1:], *flags]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            sys.exit(f"error: {shlex.join(program)} failed:\n{result.stderr}")
        return json.loads(Path(runs_dir, "speed", "summary.json").read_text())["sps"]


def microseconds(function, calls: int = 2000) -> float:
    """Median over five rounds of the time of a call."""
    times = []
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(calls // 5):
            function()
        times.append((time.perf_counter() - started) / (calls // 5) * 1e6)
    return float(np.median(times))


def parts_of_a_step(env_id: str) -> dict[str, float]:
    """Microseconds per environment step, each part alone and so with warm caches: a lower bound."""
    torch.set_num_threads(1)
    args = script.Args(env_id=env_id, alpha=0.5, beta=20.0)
    envs = script.NormalizedEnvs(env_id, 1, args.gamma)
    agent = script.Agent(envs.envs[0], args)
    parameters = script.flatten_parameters(agent)
    optimizer = torch.optim.Adam([parameters], fused=True)
    generator = torch.Generator()
    obs = envs.reset(seed=0)
    act = agent.numpy_actor()
    noise = agent.sampling_noise((1,), generator)
    action = agent.to_env(act(obs, noise))
    rollout = (args.num_steps, 1)
    draw_noise = microseconds(lambda: agent.sampling_noise(rollout, generator), calls=50)
    acting = draw_noise / args.num_steps
    acting += microseconds(lambda: agent.to_env(act(obs, noise)), calls=10_000)
    env_alone = microseconds(lambda: envs.envs[0].unwrapped.step(action[0]))
    envs.reset(seed=0)
    env_step = microseconds(lambda: envs.step(action))

    n = 64
    updates_per_step = 10 / n  # every sample is in ten minibatches of 64
    b_obs = torch.randn(n, len(obs[0]))
    b_action = torch.from_numpy(act(b_obs.numpy(), agent.sampling_noise((n,), generator)))
    with torch.no_grad():
        minibatch = (b_obs, b_action, agent.policy(b_obs).log_prob(b_action), *torch.randn(2, n))
    compiled = script.compiled(agent, args, obs[None], act(obs)[None])
    parts = {
        "simulator": env_alone,
        "normalisation, bookkeeping": env_step - env_alone,
        "acting": acting,
    }
    for name, function in (
        ("gradient, compiled", compiled),
        ("gradient, --no-compile", script.gradient_and_metrics),
    ):
        parameters.grad, _ = function(agent, args, *minibatch)
        parts[name] = updates_per_step * microseconds(
            lambda function=function: function(agent, args, *minibatch)
        )
    parts["Adam"] = updates_per_step * microseconds(optimizer.step)
    return parts


def parts_of_an_atari_step(env_id: str, amp: str, steps: int) -> dict[str, list[float]]:
    """Microseconds per environment step of SPPO: {part: [during a run, alone and in a row]}."""
    during = dict.fromkeys(("environment", "inference", "update"), 0.0)

    def timed(function, part):
        def call(*arguments):
            started = time.perf_counter()
            result = function(*arguments)
            if part != "inference" or not torch.is_grad_enabled():  # else it belongs to the update
                during[part] += (time.perf_counter() - started) * 1e6
            return result

        return call

    minibatches_per_step = 16 / 1024
    args = sppo_atari.Args(env_id=env_id, amp=amp, total_timesteps=steps)
    args = dataclasses.replace(args, eval_freq=0, checkpoint_freq=0, device="cpu", compile=False)
    games, agent = sppo_atari.AtariGames, sppo_atari.Agent
    with (
        tempfile.TemporaryDirectory() as runs_dir,
        mock.patch.object(games, "step", timed(games.step, "environment")),
        mock.patch.object(agent, "forward", timed(agent.forward, "inference")),
        mock.patch.object(
            sppo_atari, "gradient_and_metrics", timed(sppo_atari.gradient_and_metrics, "update")
        ),
        mock.patch.object(torch.optim.Adam, "step", timed(torch.optim.Adam.step, "update")),
        mock.patch.object(sppo_atari, "evaluate", lambda *_: np.zeros((2, 1))),
    ):
        args = sppo_atari.prepare(dataclasses.replace(args, runs_dir=runs_dir))
        summary = sppo_atari.train(args, threading.Event())
    steps = math.ceil(steps / 1024) * 1024  # whole rollouts
    during = {part: us / steps for part, us in during.items()}

    envs, rng = sppo_atari.AtariGames(args, 8), np.random.default_rng(0)
    images = torch.from_numpy(envs.reset(0)).contiguous(memory_format=torch.channels_last)
    net = agent(envs.num_actions, bfloat16=amp == "auto")
    parameters = sppo_atari.flatten_parameters(net)
    optimizer = torch.optim.Adam([parameters], fused=True)
    samples = torch.ones(4, 256)
    minibatch = images.repeat(32, 1, 1, 1), samples[0].long(), *samples

    def update():
        parameters.grad, _ = sppo_atari.gradient_and_metrics(
            net, args, torch.tensor(0.1), *minibatch
        )
        optimizer.step()

    alone = {
        "environment": microseconds(lambda: envs.step(rng.integers(envs.num_actions, size=8)), 500)
        / 8
    }
    with torch.no_grad(), net.autocast():
        alone["inference"] = microseconds(lambda: net(images), 500) / 8
    alone["update"] = microseconds(update, 50) * minibatches_per_step
    table = {part: [during[part], alone[part]] for part in during}
    whole = 1e6 / summary["sps"]
    return table | {
        "rest": [whole - sum(during.values()), math.nan],
        "a whole step": [whole, math.nan],
    }


def measure(args: Args) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        commands = programs(args, Path(scratch))
        results = {name: [] for name in commands}
        for repeat in range(args.repeats):
            for name, command in commands.items():
                results[name].append(steps_per_second(command))
                print(
                    f"{repeat + 1}/{args.repeats} {name}: {results[name][-1]:,.1f} steps/s",
                    file=sys.stderr,
                )
    peer = next(iter(results.values()))
    digits = 2 if args.suite == "rlhf" else 0
    subject = args.suite if digits else args.env_id
    what = f"{subject}, {args.algo.upper()}, {args.total_timesteps:,} steps"
    print(f"{what}, {args.repeats} repeats, torch {torch.__version__}\n")
    print("| method | steps/s, median (range) | ratio of medians | in each repeat |")
    print("|---|---|---|---|")
    for name, sps in results.items():
        median, low, high = (f"{x:,.{digits}f}" for x in (np.median(sps), min(sps), max(sps)))
        spread = f"{median} ({low}-{high})"
        ratios = ", ".join(f"{x / y:.2f}" for x, y in zip(sps, peer))
        print(f"| {name} | {spread} | {np.median(sps) / np.median(peer):.2f} | {ratios} |")
    if args.algo == "a2c" or args.suite == "rlhf" or args.device == "cuda":
        return
    if args.suite == "continuous":
        print("\n| part of a step of ours | microseconds |\n|---|---|")
        for name, us in parts_of_a_step(args.env_id).items():
            print(f"| {name} | {us:.1f} |")
        return
    for amp in ("auto", "off"):
        print(f"\n| part of a step, --amp {amp} | microseconds, during a run | alone |")
        print("|---|---|---|")
        parts = parts_of_an_atari_step(args.env_id, amp, args.total_timesteps)
        for name, (during, alone) in parts.items():
            print(f"| {name} | {during:.0f} | {alone:.0f} |".replace("nan", ""))


def main(args: Args) -> None:
    page = io.StringIO()
    with contextlib.redirect_stdout(page):
        measure(args)
    print(page.getvalue(), end="")
    if args.out:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        script.save(Path(args.out, "speed.md"), page.getvalue() + "\n")
        script.save(Path(args.out, "summary.json"), '{"finished": true}')


if __name__ == "__main__":
    # an exception, so that the program under way is killed and its folder deleted
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: terminated"))
    main(tyro.cli(Args))
