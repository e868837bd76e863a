"""Runs that are killed at random times, and started again by the same command."""

import csv
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

ROOT = Path(__file__).resolve().parent.parent
CONTINUOUS = "--env-id InvertedDoublePendulum-v4 --num-envs 1 --num-steps 64 --eval-episodes 1"
CONTINUOUS += " --total-timesteps 4096 --eval-freq 512 --no-compile"
ATARI = "--num-envs 8 --num-steps 8 --eval-episodes 1 --amp off --device cpu --no-compile"
ATARI += " --total-timesteps 512 --eval-freq 64"
PPO = "--num-minibatches 2 --update-epochs 2"
RLHF = "--total-timesteps 512 --batch-size 8 --num-minibatches 2 --update-epochs 2 --eval-freq 64"
RLHF += " --prompt-length 8 --response-length 10 --eval-episodes 4 --amp off --device cpu"
RUNS = {
    "sppo_continuous": (f"{CONTINUOUS} {PPO}", range(512, 4097, 512)),
    "sa2c_continuous": (CONTINUOUS, range(512, 4097, 512)),
    "sppo_atari": (f"{ATARI} {PPO}", range(64, 513, 64)),
    "sa2c_atari": (ATARI, range(64, 513, 64)),
    "sppo_rlhf": (RLHF, range(0, 513, 64)),
}


def load(folder):
    """{name: content} of all files of a run, each of which must be whole. Those not yet renamed
    don't count."""
    loaders = {
        ".json": lambda path: json.loads(path.read_text()),
        ".csv": lambda path: list(csv.DictReader(path.open())),
        ".pt": lambda path: torch.load(path, weights_only=True),
        ".safetensors": safetensors.torch.load_file,
    }
    contents = {}
    for path in folder.rglob("*"):
        if path.suffix in loaders and ".tmp" not in str(path.relative_to(folder)):
            contents[path.name] = loaders[path.suffix](path)
    return contents


def wait_for(condition, process):
    while not condition() and process.poll() is None:
        time.sleep(0.01)


def start(command, folder):
    """Starts a run, and waits until it trains. Returns the process and the time then."""
    begun = len(list(folder.glob("events*")))
    process = subprocess.Popen(command, cwd=ROOT)
    wait_for(lambda: len(list(folder.glob("events*"))) > begun, process)
    return process, time.perf_counter()


def kill(process):
    process.kill()
    process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("script", RUNS)
def test_a_run_survives_kills_at_random_times(script, tmp_path, request):
    exact = script == "sppo_rlhf"  # the others begin new episodes
    runs = request.getfixturevalue("toy").parent if exact else tmp_path
    flags, steps = RUNS[script]
    command = [sys.executable, f"{script}.py", *flags.split(), "--runs-dir", runs, "--run-name"]
    process, started = start([*command, "whole"], runs / "whole")
    assert process.wait() == 0
    seconds = time.perf_counter() - started
    for _ in range(2):
        process, _ = start([*command, "killed"], runs / "killed")
        time.sleep(random.uniform(0, seconds / 3))
        kill(process)
        load(runs / "killed")
    process, _ = start([*command, "killed"], runs / "killed")
    wait_for((runs / "killed" / "checkpoint.pt").exists, process)  # so that one is continued
    kill(process)
    load(runs / "killed")
    process, _ = start([*command, "killed"], runs / "killed")
    assert process.wait() == 0
    whole, killed = load(runs / "whole"), load(runs / "killed")
    assert killed["args.json"]["continued"]
    assert [int(row["step"]) for row in killed["progress.csv"]] == list(steps)
    same_until = min(killed["summary.json"]["continued_at"])
    if exact:
        same_until = steps[-1]
        for name, tensor in whole["checkpoint.pt"]["agent"].items():
            assert torch.equal(killed["checkpoint.pt"]["agent"][name], tensor), name
    for row, expected in zip(killed["progress.csv"], whole["progress.csv"]):
        if int(row["step"]) <= same_until:  # a score is missing until an episode has ended
            assert {**expected, **row} == expected
