"""Steps per second of `sppo_continuous.py` over those of Stable-Baselines3's PPO, in one run.

    pip install -e ".[peers]" && python tests/speed.py

The same work for all, on one thread: one environment, 2048 steps between updates, 10 epochs of 32 minibatches
of 64, observations and rewards normalised by running statistics. The programs take turns, so that a slow
spell of the machine hits them all; the table gives medians. Then the parts of our step, each on its own.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import sppo_continuous as script  # noqa: E402


@dataclass
class Args:
    env_id: str = "HalfCheetah-v4"
    total_timesteps: int = 200_000
    repeats: int = 3


PROGRAMS = {
    "Stable-Baselines3 PPO": ["tests/sb3_ppo.py"],
    "ours, Gaussian PPO": ["sppo_continuous.py", "--policy", "gaussian", "--eval-freq", "0"],
    "ours, SPPO (11 bins)": ["sppo_continuous.py", "--eval-freq", "0"],
    "ours, Gaussian PPO, --no-compile": [
        *("sppo_continuous.py", "--policy", "gaussian", "--eval-freq", "0", "--no-compile")
    ],
    "ours, SPPO (11 bins), --no-compile": ["sppo_continuous.py", "--eval-freq", "0", "--no-compile"],
}


def steps_per_second(program: list[str], args: Args) -> float:
    with tempfile.TemporaryDirectory() as runs_dir:
        flags = ["--env-id", args.env_id, "--total-timesteps", str(args.total_timesteps)]
        flags += ["--eval-episodes", "1", "--runs-dir", runs_dir, "--run-name", "speed"]
        subprocess.run(
            [sys.executable, ROOT / program[0], *program[1:], *flags], check=True, capture_output=True
        )
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
    torch._dynamo.config.trace_autograd_ops = True
    args = script.Args(env_id=env_id, alpha=0.5, beta=20.0)
    envs = script.NormalizedEnvs(env_id, 1, args.gamma)
    agent = script.Agent(envs.envs[0], args)
    parameters = torch.nn.utils.parameters_to_vector(agent.parameters()).detach()
    torch.nn.utils.vector_to_parameters(parameters, agent.parameters())
    optimizer = torch.optim.Adam([parameters], fused=True)
    generator, obs = torch.Generator(), envs.reset(seed=0)
    with torch.inference_mode():
        act = microseconds(
            lambda: agent.to_env(agent.act(torch.from_numpy(obs), generator).numpy()), calls=10_000
        )
        action = agent.to_env(agent.act(torch.from_numpy(obs), generator).numpy())
    env_alone = microseconds(lambda: envs.envs[0].unwrapped.step(action[0]))
    envs.reset(seed=0)
    env_step = microseconds(lambda: envs.step(action))

    n, updates_per_step = 64, 10 / 64  # every sample is in ten minibatches of 64
    b_obs = torch.randn(n, len(obs[0]))
    with torch.no_grad():
        b_action = agent.act(b_obs, generator)
        minibatch = (b_obs, b_action, agent.policy(b_obs).log_prob(b_action), *torch.randn(2, n))
    parts = {"simulator": env_alone, "normalisation, bookkeeping": env_step - env_alone, "acting": act}
    for name, function in (
        ("gradient, compiled", torch.compile(script.gradient_and_metrics)),
        ("gradient, --no-compile", script.gradient_and_metrics),
    ):
        parameters.grad, _ = function(agent, args, *minibatch)
        parts[name] = updates_per_step * microseconds(lambda f=function: f(agent, args, *minibatch))
    parts["Adam"] = updates_per_step * microseconds(optimizer.step)
    return parts


def main(args: Args) -> None:
    results = {name: [] for name in PROGRAMS}
    for repeat in range(args.repeats):
        for name, program in PROGRAMS.items():
            results[name].append(steps_per_second(program, args))
            print(f"{repeat + 1}/{args.repeats} {name}: {results[name][-1]:,.0f} steps/s", file=sys.stderr)
    peer = np.median(results["Stable-Baselines3 PPO"])
    print(
        f"{args.env_id}, {args.total_timesteps:,} steps, {args.repeats} repeats, torch {torch.__version__}\n"
    )
    print("| program | steps/s, median (range) | ratio |\n|---|---|---|")
    for name, sps in results.items():
        spread = f"{np.median(sps):,.0f} ({min(sps):,.0f}-{max(sps):,.0f})"
        print(f"| {name} | {spread} | {np.median(sps) / peer:.2f} |")
    print("\n| part of a step of ours | microseconds |\n|---|---|")
    for name, us in parts_of_a_step(args.env_id).items():
        print(f"| {name} | {us:.1f} |")


if __name__ == "__main__":
    main(tyro.cli(Args))
