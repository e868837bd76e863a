"""Compares our scripts' steps per second with those of Stable-Baselines3's PPO and A2C, SBX's PPO
(in JAX) and TRL's PPO, in one run.

    pip install -e ".[rlhf,peers]"
    python benchmarks/speed.py                             # sppo_continuous.py
    python benchmarks/speed.py --script sa2c_continuous
    python benchmarks/speed.py --script sppo_atari --env-id Breakout --total-timesteps 20480
    python benchmarks/speed.py --script sppo_rlhf --total-timesteps 224

Or compares two versions of one script, here the committed one and the one that is being edited:

    git worktree add ../before
    python benchmarks/speed.py --against ../before/sppo_continuous.py --repeats 7

All do the same work. Continuous, on one thread, observations and rewards normalised by running
statistics: PPO in one environment, with 2048 steps between updates, 10 epochs of 32 minibatches of
64; A2C in four, with 8 steps of each between updates. Atari, on all cores: PPO with 8 games, 128
steps between updates, 4 epochs of 4 minibatches of 256; A2C with 16 games and 5 steps. RLHF, on all
cores: 112 texts an update, prompts of 64 tokens and 48 new ones (no top-k), 5 epochs of 4
minibatches of 28, a critic, no cross entropy on reference texts; a step is a text. Policy and
reward model are untrained GPT-2s of 4 layers of 256, the texts random words. The programs take
turns, so that a slow spell of the machine hits them all; a ratio is the median of those in each
turn. Start-up and evaluation are not counted. A peer's speed is the mean over all updates,
ours the median. Two versions are compared by the median between entries of their logs, since older
versions have a mean.
"""

import json
import random
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np
import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = Literal["sppo_continuous", "sa2c_continuous", "sppo_atari", "sa2c_atari", "sppo_rlhf"]


@dataclass
class Args:
    script: SCRIPTS = "sppo_continuous"
    against: str | None = None  # another version of the script, instead of the peers
    flags: str = ""  # more flags for the script: --flags="--beta 0"
    against_flags: str = ""  # more flags for its other version: --against-flags="--x 1"
    env_id: str = "HalfCheetah-v4"
    total_timesteps: int = 200_000
    repeats: int = 3
    device: Literal["cpu", "cuda"] = "cpu"  # of all that take part; control has only the CPU


def programs(args, scratch):
    """{name: command} of what takes part, the one to compare with first."""
    ours = [ROOT / f"{args.script}.py", "--eval-freq", str(10**9), *shlex.split(args.flags)]
    common = ["--total-timesteps", str(args.total_timesteps)]
    if not args.script.endswith("continuous"):
        common += ["--device", args.device]
    peers = {}
    if args.script == "sppo_rlhf":
        save_models_and_texts(scratch)
        common += ["--policy-model", str(scratch / "policy")]
        common += ["--reward-model", str(scratch / "reward")]
        common += ["--dataset", str(scratch / "texts.jsonl")]
        trl = [ROOT / "benchmarks" / "trl_ppo.py"]
        peers = {"TRL, float32": trl, "TRL, bfloat16": [*trl, "--amp", "auto"]}
        ours += ["--task", "imdb", "--top-k", "0", "--ce-coef", "0", "--eval-episodes", "1"]
        variants = {"SPPO, float32": ["--amp", "off"], "SPPO, bfloat16": []}
    else:
        symmetric, suite = args.script.split("_")
        plain = symmetric[1:]
        common += ["--env-id", args.env_id, "--eval-episodes", "1"]
        sb3 = [ROOT / "benchmarks" / "sb3.py", "--algo", plain]
        if suite == "atari":
            peers = {"Stable-Baselines3": [*sb3, "--atari"]}
            variants = {
                plain: ["--beta", "0"],
                symmetric: [],
                f"{plain}, --amp off": ["--beta", "0", "--amp", "off"],
                f"{symmetric}, --amp off": ["--amp", "off"],
            }
            ours += ["--compile" if args.device == "cuda" else "--no-compile"]
        else:
            peers = {"Stable-Baselines3": sb3}
            if plain == "ppo":
                peers["SBX"] = [*sb3, "--library", "sbx"]
            variants = {
                f"Gaussian {plain}": ["--policy", "gaussian"],
                f"{symmetric} (11 bins)": [],
                f"Gaussian {plain}, --no-compile": ["--policy", "gaussian", "--no-compile"],
                f"{symmetric} (11 bins), --no-compile": ["--no-compile"],
            }
    if args.against:
        other = [Path(args.against), *ours[1:], *shlex.split(args.against_flags)]
        return {args.against: other + common, "this version": ours + common}
    commands = {name: command + common for name, command in peers.items()}
    for name, flags in variants.items():
        commands[f"ours, {name}"] = ours + common + flags
    return commands


def save_models_and_texts(scratch):
    """Two untrained GPT-2s with one tokenizer, as TRL must have it, and 500 texts of 200 words."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    random.seed(0)
    torch.manual_seed(0)
    words = [f"w{i}" for i in range(8000)]
    with open(scratch / "texts.jsonl", "w") as file:
        for _ in range(500):
            print(json.dumps({"text": " ".join(random.choices(words, k=200))}), file=file)

    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "w0", "eos_token": "w1", "pad_token": "w1"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)

    size = {"vocab_size": len(words), "n_positions": 128, "n_embd": 256, "n_layer": 4, "n_head": 4}
    ends = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1}
    config = transformers.GPT2Config(**size, **ends, num_labels=1)
    transformers.GPT2LMHeadModel(config).save_pretrained(scratch / "policy")
    transformers.GPT2ForSequenceClassification(config).save_pretrained(scratch / "reward")
    for name in ("policy", "reward"):
        tokenizer.save_pretrained(scratch / name)


def steps_per_second(program, from_log):
    """Of a program's run, by its summary.json, or between the entries of its TensorBoard log."""
    with tempfile.TemporaryDirectory() as runs_dir:
        command = [sys.executable, *program, "--runs-dir", runs_dir]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            failed = f"{shlex.join(map(str, program))}: exit status {result.returncode}"
            sys.exit(f"error: {failed}\n{result.stderr}")
        (summary,) = Path(runs_dir).glob("*/summary.json")
        if not from_log:
            return json.loads(summary.read_text())["sps"]
        events = EventAccumulator(str(summary.parent)).Reload().Scalars("losses/policy_loss")
        times, steps = zip(*((event.wall_time, event.step) for event in events))
        return np.median(np.diff(steps) / np.diff(times))


def main(args: Args):
    with tempfile.TemporaryDirectory() as scratch:
        commands = programs(args, Path(scratch))
        results = {name: [] for name in commands}
        for repeat in range(args.repeats):
            for name, command in commands.items():
                sps = steps_per_second(command, args.against)
                results[name].append(sps)
                print(f"{repeat + 1}/{args.repeats} {name}: {sps:,.1f} steps/s", file=sys.stderr)
    subject = args.script if args.script == "sppo_rlhf" else f"{args.script}, {args.env_id}"
    digits = 2 if args.script == "sppo_rlhf" else 0
    how = f"{args.device} {args.flags}".strip()
    print(f"{subject}, {args.total_timesteps:,} steps, torch {torch.__version__}, {how}\n")
    print("| program | steps/s, median (range) | ratio | in each turn |")
    print("|---|---|---|---|")
    peer = next(iter(results.values()))
    for name, all_sps in results.items():
        middle, low, high = (
            f"{sps:,.{digits}f}" for sps in (median(all_sps), min(all_sps), max(all_sps))
        )
        ratios = [ours / theirs for ours, theirs in zip(all_sps, peer)]
        turns = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"| {name} | {middle} ({low}-{high}) | {median(ratios):.2f} | {turns} |")


if __name__ == "__main__":
    main(tyro.cli(Args))
