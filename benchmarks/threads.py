"""Steps per second of sppo_continuous.py with environments stepped by threads, a worked example of
docs/copy-and-modify.md, against one after the other, in one run. Writes results/speed/threads.csv.

    python benchmarks/threads.py    # ten minutes
"""

import os
import platform
import re
import subprocess
import tempfile
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pandas as pd
from speed import ROOT, steps_per_second

TASKS = {
    "waits 1 ms": "threads:Waits-v0",
    "computes 1 ms in Python": "threads:Computes-v0",
    "Humanoid": "Humanoid-v4",
}
STEPS = 1024  # of a rollout


class Waits(gym.Env):
    """A step takes a millisecond, in which another thread may run."""

    observation_space = gym.spaces.Box(-1, 1, (4,))
    action_space = gym.spaces.Box(-1, 1, (2,))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(4, np.float32), {}

    def work(self):
        time.sleep(1e-3)

    def step(self, action):
        self.work()
        return np.zeros(4, np.float32), 0.0, False, False, {}


class Computes(Waits):
    """In Python, which runs one thread at a time."""

    def work(self):
        end = time.perf_counter() + 1e-3
        while time.perf_counter() < end:
            pass


gym.register("Waits-v0", Waits, max_episode_steps=100)
gym.register("Computes-v0", Computes, max_episode_steps=100)


def threaded(folder):
    """The page's copy of the script."""
    page = (ROOT / "docs" / "copy-and-modify.md").read_text()
    section = page.partition("## Environments that wait\n")[2]
    (diff,) = re.findall(r"(?ms)^```diff\n(.+?)^```$", section.partition("\n## ")[0])
    path = folder / "sppo_threads.py"
    path.write_text((ROOT / "sppo_continuous.py").read_text())
    subprocess.run(["patch", "-F0", path], input=diff, text=True, check=True)
    return path


def main():
    os.environ["PYTHONPATH"] = str(ROOT / "benchmarks")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        scripts = [ROOT / "sppo_continuous.py", threaded(Path(folder))]
        for task, env_id in TASKS.items():
            for count in (1, 2, 8):
                flags = f"--num-envs {count} --num-steps {STEPS // count} --num-minibatches 16"
                flags += f" --total-timesteps {3 * STEPS} --eval-episodes 1 --eval-freq {3 * STEPS}"
                ratios = []
                for _ in range(3):
                    command = ["--env-id", env_id, "--no-compile", *flags.split()]
                    one, many = (steps_per_second([x, *command], False) for x in scripts)
                    ratios.append(many / one)
                    print(f"{task}, {count}: {one:,.0f} and {many:,.0f} steps/s", flush=True)
                rows.append([task, count, np.median(ratios), min(ratios), max(ratios)])
    columns = ["environment", "environments", "ratio", "ratio_low", "ratio_high"]
    table = pd.DataFrame(rows, columns=columns).round(2)
    table.insert(0, "cpu", f"{platform.machine()}, {os.cpu_count()} cores")
    table.to_csv(ROOT / "results" / "speed" / "threads.csv", index=False)


if __name__ == "__main__":
    main()
