"""Runs that are killed at random times, and started again by the same command: they end with the
same bytes as one that is not killed."""

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
CONTINUOUS = "--env-id BipedalWalker-v3 --num-envs 2 --num-steps 32 --eval-episodes 1"
CONTINUOUS += " --total-timesteps 4096 --eval-freq 512 --checkpoint-freq 384 --no-compile"
ATARI = "--num-envs 8 --num-steps 8 --eval-episodes 1 --amp off --device cpu --no-compile"
ATARI += " --total-timesteps 512 --eval-freq 256 --checkpoint-freq 12"
ATARI += " --repeat-action-probability 0.25"
PPO = "--num-minibatches 2 --update-epochs 2"
RLHF = "--total-timesteps 192 --batch-size 8 --num-minibatches 2 --update-epochs 2 --eval-freq 64"
RLHF += " --prompt-length 8 --response-length 10 --eval-episodes 4 --amp off --device cpu"
RUNS = {  # of each pair one: what writes files is the same text
    "sppo_continuous": f"{CONTINUOUS} {PPO} --noise adv_flip",
    "sa2c_atari": ATARI,
    "sppo_rlhf": RLHF,
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


def start(command, runs, folder):
    """Starts a run, and waits until it trains. Returns the process and the time then."""
    begun = len(list(runs.rglob("events*")))
    process = subprocess.Popen([*command, "--runs-dir", runs], cwd=folder)
    wait_for(lambda: len(list(runs.rglob("events*"))) > begun, process)
    return process, time.perf_counter()


def kill(process):
    process.kill()
    process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("script", RUNS)
def test_a_run_killed_at_random_times_is_the_same_run(script, tmp_path, request):
    runs = folder = tmp_path
    if script == "sppo_rlhf":
        folder = request.getfixturevalue("toy").parent.parent
    command = [sys.executable, ROOT / f"{script}.py", *RUNS[script].split()]
    process, started = start(command, runs / "whole", folder)
    assert process.wait() == 0
    seconds = time.perf_counter() - started
    for _ in range(2):
        process, _ = start(command, runs / "killed", folder)
        time.sleep(random.uniform(0, seconds / 4))
        kill(process)
        load(runs / "killed")
    process, _ = start(command, runs / "killed", folder)
    # so that one is continued
    wait_for(lambda: list((runs / "killed").glob("*/checkpoint.pt")), process)
    kill(process)
    load(runs / "killed")
    process, _ = start(command, runs / "killed", folder)
    assert process.wait() == 0
    (whole,), (killed,) = (runs / "whole").iterdir(), (runs / "killed").iterdir()
    assert killed.name == whole.name
    assert len((killed / "sessions.jsonl").read_text().splitlines()) > 1
    for name in ("progress.csv", "agent.safetensors", "samples.jsonl"):
        if (whole / name).exists():
            assert (killed / name).read_bytes() == (whole / name).read_bytes()
    agent = load(killed)["checkpoint.pt"]["agent"]
    for name, tensor in load(whole)["checkpoint.pt"]["agent"].items():
        assert torch.equal(agent[name], tensor), name
