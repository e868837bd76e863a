"""The fault campaign: odd command lines, kills, damaged folders, faulty environments, full disks.

    python tests/campaign.py                                  # all five scripts: about half an hour
    python tests/campaign.py --scripts sa2c_atari --seed 7    # one script, other faults

What the scripts promise: an error found before training is one line "error: ..." and exit code 2,
and leaves no folder; a run that fails says so in one line with exit code 1, and its last checkpoint
is whole; a signal saves a checkpoint, exit code 130; `--resume` finishes what was interrupted, with
each evaluation once. Anything else is a failure: the campaign lists it and exits with 1.

A case is `main()` of a script in a forked process, in a folder of its own.
"""

import csv
import importlib
import json
import logging
import math
import os
import pickle
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import ModuleType
from typing import Literal, get_args, get_origin, get_type_hints

import gymnasium as gym
import numpy as np
import torch
import tyro
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.optim.optimizer import register_optimizer_step_post_hook
from tqdm import tqdm

MEMORY = 8 * 2**30  # bytes of address space of a run
Script = Literal["sppo_continuous", "sa2c_continuous", "sppo_atari", "sa2c_atari", "sppo_rlhf"]


@dataclass
class Args:
    scripts: tuple[Script, ...] = get_args(Script)  # the scripts to try
    seed: int = 0  # of all faults
    commands: int = 500  # command lines, over all scripts
    kills: int = 100  # SIGKILLs of each script, those at renames included
    rename_kills: int = 30  # of these, right before or after a rename
    damages: int = 40  # damaged folders of each script
    faults: bool = True  # faulty environments and full disks as well
    out: Path | None = None  # keep what failing cases leave here; default: keep nothing


# Small runs, of ten or more updates with a checkpoint after every second

COMMON = {"device": "cpu", "runs-dir": "runs", "run-name": "run", "eval-episodes": 1}
CONTINUOUS = {"env-id": "InvertedDoublePendulum-v4", "num-envs": 1, "num-steps": 64}
CONTINUOUS |= {"total-timesteps": 1024, "eval-freq": 256, "checkpoint-freq": 128, "log-freq": 64}
CONTINUOUS |= {"compile": False}
ATARI = {"env-id": "Breakout", "num-envs": 2, "num-steps": 8, "amp": "off", "compile": False}
ATARI |= {"total-timesteps": 192, "eval-freq": 96, "checkpoint-freq": 32, "log-freq": 16}
RLHF = {"batch-size": 8, "prompt-length": 8, "response-length": 10, "amp": "off"}
RLHF |= {"total-timesteps": 80, "eval-freq": 16, "eval-episodes": 4, "checkpoint-freq": 16}
PPO = {"num-minibatches": 4, "update-epochs": 2}
SMALL = {
    "sppo_continuous": COMMON | CONTINUOUS | PPO,
    "sa2c_continuous": COMMON | CONTINUOUS,
    "sppo_atari": COMMON | ATARI | {"num-minibatches": 2, "update-epochs": 1},
    "sa2c_atari": COMMON | ATARI,
    "sppo_rlhf": COMMON | RLHF | PPO,
}


def to_argv(flags):
    """A command line; a value may be a bool, a list of words or anything that has a text."""
    argv = []
    for name, value in flags.items():
        if isinstance(value, bool):
            argv.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            argv += [f"--{name}", *value]
        else:
            argv += [f"--{name}", str(value)]
    return argv


# Cases


class Failure(Exception):
    """What a script did, and should not have done."""


def expect(condition, what):
    if not condition:
        raise Failure(what)


@dataclass
class Outcome:
    code: int | None  # negative: the signal that ended it; None: it had to be killed
    out: str
    err: str
    limit: float  # seconds, after which it got SIGTERM
    stopped: bool  # whether it got SIGTERM


@dataclass
class Case:
    script: ModuleType
    toy: Path | None  # of RLHF: models and texts for all cases
    folder: Path  # of this case
    rng: random.Random
    done: str = ""  # what was done, for the report

    def __post_init__(self):
        self.work = self.folder / "work"
        self.run = self.work / "runs" / "run"
        self.run.parent.mkdir(parents=True)
        if self.toy:
            (self.run.parent / "toy").symlink_to(self.toy)

    @property
    def flags(self):
        return SMALL[self.script.__name__]

    def start(self, argv, hook=None):
        """Calls `hook()` and then the script's `main()`, in a forked process. Returns its id."""
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        pid = os.fork()
        if pid == 0:
            os._exit(self.child(argv, hook))
        return pid

    def child(self, argv, hook):
        """Exit code of a Python process that runs the script."""
        os.chdir(self.work)
        for stream, name in enumerate(("out", "err"), start=1):
            path = f"{self.folder}.{name}.{os.getpid()}"
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
        sys.stdout = os.fdopen(1, "w", 1, "utf-8")
        sys.stderr = os.fdopen(2, "w", 1, "utf-8", errors="backslashreplace")
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        sys.argv = [self.script.__file__, *argv]
        code = 1
        try:
            if self.toy:
                self.script.make_toy = self.link_toy
            if hook:
                hook()
            self.script.main()
            code = 0
        except SystemExit as error:
            code = error.code
            if isinstance(code, str):
                print(code, file=sys.stderr)
                code = 1
        except BaseException:  # as the interpreter does
            traceback.print_exc()
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except OSError:
            code = 120
        return code or 0

    def move_script(self):
        """To a folder whose name a shell would execute."""
        folder = self.folder.parent / "$(touch pwned)"
        folder.mkdir(exist_ok=True)
        self.script.__file__ = shutil.copy(self.script.__file__, folder)
        sys.argv[0] = self.script.__file__

    def link_toy(self, folder):
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.symlink_to(self.toy)

    def wait(self, pid, limit=60.0, grace=30.0):
        """Waits, after `limit` seconds sends SIGTERM, and SIGKILL another `grace` seconds later."""
        status = wait_until(pid, time.monotonic() + limit)
        stopped = status is None
        if stopped:
            os.kill(pid, signal.SIGTERM)
            status = wait_until(pid, time.monotonic() + grace)
        code = None
        if status is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        else:
            code = os.waitstatus_to_exitcode(status)
        texts = []
        for name in ("out", "err"):
            path = Path(f"{self.folder}.{name}.{pid}")
            texts.append(path.read_text(errors="backslashreplace") if path.exists() else "")
        return Outcome(code, *texts, limit, stopped)

    def call(self, argv, hook=None, **limits):
        return self.wait(self.start(argv, hook), **limits)

    def resume(self, hook=None, **limits):
        return self.call(["--resume", "runs/run"], hook, **limits)


def wait_until(pid, deadline):
    """The status of a child that ended, or None at the deadline."""
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status
        if time.monotonic() > deadline:
            return None
        time.sleep(0.002)


def hook_renames(action):
    """Calls `action(n, moment)` "before" and "after" the n-th rename of this process."""
    count = Counter()

    def hooked(rename):
        def hooked_rename(*arguments, **keywords):
            count["renames"] += 1
            n = count["renames"]
            action(n, "before")
            result = rename(*arguments, **keywords)
            action(n, "after")
            return result

        return hooked_rename

    os.replace = hooked(os.replace)
    Path.rename = hooked(Path.rename)


def at_rename(n, moment, action):
    """A hook that calls `action()` at one rename."""

    def act(now, now_moment):
        if (now, now_moment) == (n, moment):
            action()

    return lambda: hook_renames(act)


# What a run may leave


def load(path):
    """A checkpoint, which must be whole and loadable without running code from it."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # any exception is possible here
        raise Failure(f"{path.name} cannot be read: {error!r}"[:200]) from error


def tensors(tree):
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict):
        for branch in tree.values():
            yield from tensors(branch)


def check_checkpoint(folder):
    """Raises Failure unless the checkpoint, if any, is whole and finite. Returns it, or None."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        return None
    state = load(path)
    for part in ("agent", "obs_stats", "return_stats"):
        for tensor in tensors(state.get(part, {})):
            expect(tensor.isfinite().all(), f"checkpoint.pt: {part} not finite")
    return state


def global_step(state):
    return state["progress"]["global_step"] if "progress" in state else state["global_step"]


def progress(folder):
    """Rows of progress.csv, numbers. Raises Failure if it is not whole."""
    try:
        with (folder / "progress.csv").open() as file:
            rows = list(csv.DictReader(file))
        return [{name: float(value) for name, value in row.items()} for row in rows]
    except (OSError, TypeError, ValueError) as error:
        raise Failure(f"progress.csv cannot be read: {error!r}"[:200]) from error


def check_finished(folder, steps=None):
    """Raises Failure unless `folder` is a finished run; `steps`: those of its evaluations."""
    try:
        summary = json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError) as error:
        raise Failure(f"summary.json cannot be read: {error!r}"[:200]) from error
    expect(summary["finished"] is True, "summary.json: not finished")
    state = check_checkpoint(folder)
    expect(state, "finished without a checkpoint")
    rows = progress(folder)
    evaluated = [int(row["step"]) for row in rows]
    expect(evaluated == sorted(set(evaluated)), f"evaluations not once each: {evaluated}")
    if steps:
        expect(evaluated == steps, f"evaluations at {evaluated}, not {steps}")
    total = global_step(state)
    expect(total == evaluated[-1], f"summary.json, but the checkpoint is of step {total}")
    expect(total >= summary["total_timesteps"], f"finished at step {total}")
    same = summary["final_return_mean"] == rows[-1]["return_mean"]
    expect(same, "summary.json and progress.csv differ")
    check_tensorboard(folder)
    check_weights(folder, state["agent"])
    return rows


def check_tensorboard(folder):
    events = EventAccumulator(str(folder), {"scalars": 0}).Reload()
    if "eval/return_mean" in events.Tags()["scalars"]:
        steps = [event.step for event in events.Scalars("eval/return_mean")]
        expect(len(steps) == len(set(steps)), f"TensorBoard: evaluations twice, {steps}")


def check_weights(folder, agent):
    """Raises Failure unless the final weights, as safetensors, are the checkpoint's."""
    paths = list(folder.rglob("*.safetensors"))
    expect(paths, "finished, but without weights as safetensors")
    for path in paths:
        saved = load_file(path)
        names = [name for name in saved if name in agent or f"policy.{name}" in agent]
        adapter = path.name == "adapter_model.safetensors"  # has other names
        expect(names or adapter, f"{path.name}: none of the checkpoint's weights")
        for name in names:
            expected = agent.get(name, agent.get(f"policy.{name}"))
            expect(torch.equal(saved[name], expected), f"{path.name}: old {name}")


def same_run(folder, other):
    """Whether two finished runs have equal weights and evaluations."""
    agents = [load(path / "checkpoint.pt")["agent"] for path in (folder, other)]
    if agents[0].keys() != agents[1].keys() or progress(folder) != progress(other):
        return False
    return all(torch.equal(agents[0][name], agents[1][name]) for name in agents[0])


def snapshot(folder):
    """Contents of all files by name, but for the lock."""
    content = {}
    for path in sorted(folder.rglob("*")):
        if path.name != "lock":
            content[str(path.relative_to(folder))] = path.read_bytes() if path.is_file() else None
    return content


def error_line(outcome):
    """The one line that says what is wrong; warnings may precede it."""
    lines = outcome.err.rstrip("\n").split("\n")
    expect("Traceback" not in outcome.err, f"traceback, {len(lines)} lines: {lines[-1][:150]}")
    errors = [line for line in lines if line.startswith("error: ")]
    expect(len(errors) == 1, f"{len(errors)} lines of error: {outcome.err[-200:]!r}")
    expect(lines[-1] == errors[0], f"the error is not the last line: {lines[-1][:150]!r}")
    return errors[0]


def check_code(outcome, *codes):
    expect(outcome.code is not None, f"deaf to SIGTERM after {outcome.limit:g} s")
    if outcome.code not in codes:
        last = outcome.err.strip().split("\n")[-1][:200]
        what = f"exit code {outcome.code}"
        if outcome.code < 0:
            what = f"killed by {signal.Signals(-outcome.code).name}"
        raise Failure(f"{what}, not {' or '.join(map(str, codes))}: {last}")


def check_interrupted(outcome, folder):
    """Raises Failure unless it was stopped by a signal as promised."""
    check_code(outcome, 130)
    expect("Traceback" not in outcome.err, "traceback")
    _, found, command = outcome.err.rpartition("interrupted; to continue: ")
    expect(found, f"no word on how to continue: {outcome.err[-200:]!r}")
    words = shlex.split(command)
    expect(words[2:3] == ["--resume"] and len(words) == 4, f"not a command line: {command!r}")
    if "\\udc" not in command:  # a name that is no text cannot be printed
        expect((folder / words[3]).is_dir(), f"{words[3]!r}: not the run's folder")


def check_failed(outcome, run, *words):
    """Raises Failure unless the run failed as promised: one line, exit code 1, a checkpoint as it
    was before."""
    check_code(outcome, 1)
    line = error_line(outcome)
    for word in words:
        expect(re.search(word, line), f"the error does not say {word!r}: {line[:200]}")
    expect(not (run / "summary.json").exists(), "failed, but left a summary.json")
    check_checkpoint(run)


# 1. Command lines

INTS = "0 1 2 3 5 8 100 -1 -7 1000000 1000000000000 4294967296 18446744073709551616"
NUMBERS = "0 1 8 -1 0.5 1000 -0.0 1e-45 1e-300 1e9 1e12 1e23 1e30 1e38 1e308 1e400 nan inf -inf"
NO_NUMBERS = ["", " ", "1 2", "x", "None", "0x10", "1e3", "nan", "٣"]
NAMES = ["", " ", ".", "..", "../x", "a/b", "a b", "it's", 'a"b', "$(touch pwned)", "`touch pwned`"]
NAMES += ["new\nline", "\x1b[31m", os.fsdecode(b"\xff\xfe"), "é", "x" * 300, "~", "-x", "nowhere"]
NAMES += ["/dev/null", "None", "a;touch pwned"]
ENVS = ["Nothing-v0", "nowhere:Nothing-v0", "CartPole-v1", "Pendulum-v1", "Hopper-v99", "Breakout"]
ENVS += ["Brekout", "ALE/Pong-v5", "Pong", "os:system", "os", ":", "Hopper-v"]
ODD_FLAGS = [
    {"noise-level": 0.1},
    {"correct-flips": True},
    {"noise": "flip", "noise-level": 0.5, "correct-flips": True},
    {"noise": "normal", "noise-level": 1},
    {"policy": "gaussian", "beta": 1},
    {"policy": "gaussian", "log-std-init": "nan"},
    {"policy": "gaussian", "log-std-init": 1000},
    {"resume": "runs/run"},
    {"resume": ""},
    {"sed": 1},
    {"num-envs": 2**32},
    {"num-steps": 10**23},
    {"num-steps": 2**32},
    {"bins": 10**6, "hidden-sizes": "100000"},
    {"hidden-sizes": 10**9},
    {"batch-size": 2**32},
    {"micro-batch-size": 10**23},
    {"lora-r": 10**12},
    {"update-epochs": 10**12},
    {"eval-episodes": 10**12},
    {"run-name": "../x"},
    {"run-name": "."},
    {"run-name": os.fsdecode(b"\xff")},
    {"learning-rate": "1e39"},
    {"alpha": "1e30"},
]


def random_value(rng, name, kind):
    """A valid or invalid value of a flag, as words of a command line."""
    choices = get_args(kind)
    if rng.random() < 0.1:
        return [rng.choice(NO_NUMBERS)]
    if get_origin(kind) is Literal:
        return [rng.choice(choices)]
    if get_origin(kind) is tuple:
        words = NAMES if str in choices else INTS.split()
        return rng.sample(words, rng.randrange(4))
    if name == "env_id":
        return [rng.choice(ENVS + NAMES)]
    if name == "runs_dir":  # any folder will do, but the campaign must find it again
        return [rng.choice([word for word in NAMES if ".." not in word])]
    if kind is str or str in choices:
        return [rng.choice(NAMES)]
    if kind is int or int in choices:
        return [rng.choice(INTS.split())]
    return [rng.choice(NUMBERS.split())]


def random_flags(case):
    """One to three flags at random."""
    rng = case.rng
    kinds = get_type_hints(case.script.Args)
    known = [f.name for f in fields(case.script.Args) if f.name not in ("compile", "track")]
    known += [name for name in known if kinds[name] not in (bool, float)]  # there is more to try
    flags = {}
    for name in rng.sample(known, rng.choice([1, 1, 1, 2, 3])):
        if kinds[name] is bool:
            value = rng.choice([True, True, False, False, ["maybe"]])
        else:
            value = random_value(rng, name, kinds[name])
        flags[name.replace("_", "-")] = value
    return flags


def try_command_line(case, number):
    flags = ODD_FLAGS[number] if number < len(ODD_FLAGS) else random_flags(case)
    argv = to_argv(case.flags | flags)
    if flags.keys() == {"resume"} and number % 2 == 0:
        argv = to_argv(flags)  # it takes no others
    case.done = shlex.join(to_argv(flags))
    hook = None
    if case.rng.random() < 0.05:
        case.done += " (script in '$(touch pwned)')"
        hook = case.move_script
    outcome = case.call(argv, hook, limit=5.0)
    if flags.get("resume", ["None"]) != ["None"]:  # tyro reads None as no value
        check_code(outcome, 2)
    check_accepted_or_refused(case, argv, outcome)


def check_accepted_or_refused(case, argv, outcome):
    following = dict(zip(argv, argv[1:]))
    runs = Path(os.path.normpath(case.work / following.get("--runs-dir", "runs")))
    left = []
    for path in case.folder.rglob("*"):
        if path in (runs, case.work, case.run.parent) or path in runs.parents:
            continue
        if path.name in ("toy", "MUJOCO_LOG.TXT"):  # MuJoCo writes it where it is
            continue
        expect(runs in path.parents, f"outside of --runs-dir: {path.relative_to(case.folder)}")
        left.append(path)
    runs_begun = [path.parent for path in left if path.name == "args.json"]
    check_code(outcome, 0, 1, 2, 130, -signal.SIGTERM)
    if outcome.code == 2:
        if "\nerror: " in f"\n{outcome.err}":
            error_line(outcome)
        else:
            by_parser = "full helptext" in outcome.err or outcome.err.startswith("usage:")
            expect(by_parser, f"no error message: {outcome.err[-200:]!r}")
        expect(not left, f"refused, but left {[str(p.relative_to(runs)) for p in left[:3]]}")
        return
    if outcome.code == -signal.SIGTERM:  # before it began: nothing to save yet
        expect(outcome.stopped and not left, "killed by SIGTERM, with a folder left")
        return
    expect(len(runs_begun) == 1, f"exit code {outcome.code} and {len(runs_begun)} folders")
    folder = runs_begun[0]
    expect(folder.parent == runs, f"{folder}: not directly in --runs-dir")
    if outcome.code == 130:
        expect(outcome.stopped, "exit code 130 without a signal")
        check_interrupted(outcome, case.work)
        check_checkpoint(folder)
    elif outcome.code == 1:
        check_failed(outcome, folder)
    else:
        check_finished(folder)


# 2. Kills


@dataclass
class Reference:
    """Runs to compare with."""

    whole: Path  # folder of an uninterrupted run
    steps: list[int]  # of its evaluations
    seconds: float  # that it took
    renames: int
    interrupted: Path  # folder of a run after half of its steps
    resumed: Path  # the same, finished


def make_reference(case):
    case.done = "an uninterrupted run"
    counter = case.folder / "renames"
    started = time.monotonic()

    def count():
        hook_renames(lambda n, moment: counter.write_text(str(n)))

    check_code(case.call(to_argv(case.flags), count), 0)
    seconds = time.monotonic() - started
    steps = [int(row["step"]) for row in check_finished(case.run)]
    renames = int(counter.read_text()) if counter.exists() else 0
    expect(renames > len(steps), "does not rename what it has written")
    whole = case.run.rename(case.folder / "whole")

    case.done = "a run, interrupted and resumed"
    stop = at_rename(renames // 2, "after", lambda: os.kill(os.getpid(), signal.SIGTERM))
    check_interrupted(case.call(to_argv(case.flags), stop), case.work)
    interrupted = shutil.copytree(case.run, case.folder / "interrupted")
    check_code(case.resume(), 0)
    check_finished(case.run, steps)
    return Reference(whole, steps, seconds, renames, interrupted, case.run)


def check_after_kill(case):
    """Raises Failure unless what a killed run left is whole."""
    check_checkpoint(case.run)
    if (case.run / "progress.csv").exists():
        progress(case.run)
    if (case.run / "summary.json").exists():
        check_finished(case.run)


def go_on(case, hook=None):
    """Starts what continues a killed run. Returns the process's id, or None if it is finished."""
    if (case.run / "summary.json").exists():
        return None
    if (case.run / "args.json").exists():
        return case.start(["--resume", "runs/run"], hook)
    shutil.rmtree(case.run, ignore_errors=True)  # killed before it began
    return case.start(to_argv(case.flags), hook)


def finish(case, reference):
    pid = go_on(case)
    if pid:
        outcome = case.wait(pid)
        check_code(outcome, 0)
        expect("Traceback" not in outcome.err, "traceback")
    check_finished(case.run, reference.steps)
    if case.toy:
        expect(same_run(case.run, reference.whole), "not the uninterrupted run")


def try_kills(case, reference):
    """Kills a run one to three times at random moments. Returns how often."""
    kills = 0
    for _ in range(case.rng.choice([1, 1, 2, 3])):
        pid = go_on(case)
        if pid is None:
            break
        seconds = case.rng.uniform(0, reference.seconds)
        case.done += f"killed after {seconds:.3f} s; "
        if wait_until(pid, time.monotonic() + seconds) is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            kills += 1
        check_after_kill(case)
    finish(case, reference)
    return kills


def try_rename_kill(case, reference, n, moment):
    case.done = f"killed {moment} rename {n} of {reference.renames}"
    hook = at_rename(n, moment, lambda: os.kill(os.getpid(), signal.SIGKILL))
    outcome = case.call(to_argv(case.flags), hook)
    check_code(outcome, -signal.SIGKILL)
    check_after_kill(case)
    finish(case, reference)


def rename_moments(rng, renames, count):
    """Numbers of renames, "before" or "after": the last five first, with them a run ends."""
    moments = [(n, moment) for n in range(1, renames + 1) for moment in ("before", "after")]
    others = moments[:-10]
    rng.shuffle(others)
    return (moments[-10:] + others)[:count]


# 3. Damaged folders


class Evil:
    """As a pickle, this runs code when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def damage_bytes(path, rng, kind):
    content = bytearray(path.read_bytes())
    if kind == "half":
        content = content[: len(content) // 2]
    elif kind == "without its last byte":
        content = content[:-1]
    elif kind == "empty":
        content = b""
    elif kind == "garbage":
        content = rng.randbytes(5000)
    elif kind == "text":
        content = b"no checkpoint\n"
    elif kind == "a pickle of code":
        content = pickle.dumps(Evil())
    elif kind == "flipped bytes":
        for _ in range(rng.choice([1, 1, 3, 50])):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


WRONG_FILES = ["half", "without its last byte", "empty", "garbage", "text"]
WRONG_CHECKPOINTS = ["a list", "nothing", "code", "a weight less", "a weight of other size"]
WRONG_CHECKPOINTS += ["a moment of other size"]
WRONG_VALUES = ["text", None, [7], {"x": 7}, 7, True]


def other_type(rng, value):
    """A value that cannot stand for `value`."""
    numbers = (int, float)
    while True:
        wrong = rng.choice(WRONG_VALUES)
        same = type(wrong) is type(value) or isinstance(value, (list, tuple)) and wrong == [7]
        if not same and not (isinstance(value, numbers) and isinstance(wrong, numbers)):
            return wrong


def damage_checkpoint(path, kind):
    """Saves a checkpoint that is whole but wrong."""
    state = load(path)
    name = next(name for name, weight in state["agent"].items() if weight.dim() == 2)
    weight = state["agent"][name]
    moments = state["optimizer"]["state"][0]
    moment = next(key for key in moments if moments[key].dim() > 0)
    if kind == "a list":
        state = [state]
    elif kind == "nothing":
        state = None
    elif kind == "code":
        state["agent"] = Evil()
    elif kind == "a weight less":
        del state["agent"][name]
    elif kind == "a weight of other size":
        state["agent"][name] = weight[:-1]
    elif kind == "a moment of other size":
        moments[moment] = moments[moment][:-1]
    torch.save(state, path)


def damage_key(path, rng, key, kind):
    """Removes an entry of the checkpoint, or makes it something of another type."""
    state = load(path)
    if kind == "missing":
        del state[key]
    else:
        state[key] = other_type(rng, state[key])
        kind = f"is {state[key]!r}"
    torch.save(state, path)
    return kind


def damage_args(path, case):
    """Puts something wrong into args.json. Returns what."""
    saved = json.loads(path.read_text())
    rng, args = case.rng, saved["args"]
    kinds = get_type_hints(case.script.Args)
    name = rng.choice([name for name in args if name not in ("resume", "runs_dir", "run_name")])
    kind = rng.choice(["missing", "additional", "type", "type", "type", "range", "range"])
    if kind == "range" and isinstance(args[name], bool | list | None):
        kind = "type"
    if kind == "missing":
        del args[name]
    elif kind == "additional":
        name = "surplus"
        args[name] = 1
    elif kind == "range":
        wrong = "nonsense" if isinstance(args[name], str) else rng.choice([-1e300, 1e300, math.nan])
        args[name] = wrong
    else:
        args[name] = other_type(rng, args[name])
    path.write_text(json.dumps(saved))
    return f"{name}: {kind} {args.get(name)!r} (a {kinds.get(name)})"


WRONG_ARGS = {"null": "null", "empty list": "[]", "no arguments": '{"args": null}'}
WRONG_ARGS |= {"empty list of arguments": '{"args": []}', "no args": "{}"}
HARMLESS = ["without progress.csv", "wrong progress.csv", "without events", "without checkpoint.pt"]
HARMLESS += ["half a temporary checkpoint"]


def plan_damages(rng, count):
    """(file, what happens to it), `count` times: each of the fixed kinds, then random ones."""
    plan = [("checkpoint.pt", kind) for kind in [*WRONG_FILES, "a pickle of code"]]
    plan += [("checkpoint.pt", kind) for kind in WRONG_CHECKPOINTS]
    plan += [("args.json", kind) for kind in [*WRONG_FILES, *WRONG_ARGS, "deleted"]]
    plan += [("", kind) for kind in HARMLESS]
    rng.shuffle(plan)
    at_random = [("checkpoint.pt", "flipped bytes"), ("checkpoint.pt", "missing key")]
    at_random += [("checkpoint.pt", "wrong key"), ("args.json", "entry")]
    while len(plan) < count:
        plan.append(at_random[len(plan) % len(at_random)])
    return plan[:count]


def try_damage(case, reference, name, kind):
    shutil.copytree(reference.interrupted, case.run)
    path = case.run / name
    case.done = f"{name}: {kind}"
    expected = reference.resumed
    if kind in HARMLESS:
        do_no_harm(case.run, kind)
        if kind == "without checkpoint.pt":
            expected = reference.whole
    elif kind in WRONG_CHECKPOINTS:
        damage_checkpoint(path, kind)
    elif kind in WRONG_ARGS:
        path.write_text(WRONG_ARGS[kind])
    elif kind == "deleted":
        path.unlink()
    elif kind == "entry":
        case.done = f"{name}: {damage_args(path, case)}"
    elif kind.endswith("key"):
        key = case.rng.choice(list(load(path)))
        case.done = f"{name}: {key} {damage_key(path, case.rng, key, kind.split()[0])}"
    else:
        damage_bytes(path, case.rng, kind)

    before = snapshot(case.run)
    outcome = case.resume()
    expect(not (case.work / "executed").exists(), "ran code from the file")
    if kind in HARMLESS:
        check_code(outcome, 0)
    if outcome.code == 0:
        expect("Traceback" not in outcome.err, "traceback")
        expect(same_run(case.run, expected), "not noticed, and not the run that it was")
        check_finished(case.run)
        return
    check_code(outcome, 2)
    line = error_line(outcome)
    expect(name in line or kind == "deleted", f"does not name {name}: {line[:200]}")
    expect(snapshot(case.run) == before, "refused, but changed the folder")


def do_no_harm(folder, kind):
    if kind == "wrong progress.csv":
        (folder / "progress.csv").write_text("step\n\x00")
    elif kind == "half a temporary checkpoint":
        (folder / "checkpoint.pt.tmp").write_bytes(b"half")
    else:
        pattern = {"events": "events*"}.get(kind.split()[-1], kind.split()[-1])
        for path in folder.glob(pattern):
            path.unlink()


# 4. Environments


class Faulty(gym.Env):
    """An environment with one fault, at the `at`-th step of this process. Its episodes have 50
    steps; with the fault "endless" they never end from then on."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = gym.spaces.Box(-1, 1, (2,))
    steps = 0  # of all instances

    def __init__(self, fault, at):
        self.fault = fault
        self.at = at

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.length = 0
        if self.fault == "ValueError in reset" and Faulty.steps >= self.at:
            raise ValueError("no reset\ntoday")
        return self.np_random.normal(size=3), {}

    def step(self, action):
        Faulty.steps += 1
        self.length += 1
        obs = self.np_random.normal(size=3)
        reward = float(action[0])
        name, _, value = self.fault.partition(" ")
        if Faulty.steps == self.at:
            if name == "observation":
                obs[1] = float(value)
            elif name == "reward":
                reward = float(value)
            elif name == "ValueError" and value == "in step":
                raise ValueError("no step\ntoday")
            elif name == "SystemExit":
                raise SystemExit(0)
            elif value == "with SIGTERM":
                os.kill(os.getpid(), signal.SIGTERM)
        endless = name == "endless" and Faulty.steps >= 1024
        return obs, reward, False, self.length >= 50 and not endless, {}


def faulty_env(fault, at):
    """A hook that registers the environment of module `faulty`."""

    def register():
        sys.modules["faulty"] = ModuleType("faulty")
        gym.register("Faulty-v0", lambda render_mode=None: Faulty(fault, at))

    return register


FAULTS = ["observation nan", "observation inf", "observation 1e300"]
FAULTS += ["reward nan", "reward inf", "reward 1e300"]
FAULTS += ["ValueError in step", "ValueError in reset", "SystemExit in step"]
EVAL_FAULTS = ["observation nan", "reward nan", "reward inf", "ValueError in step"]
EVAL_FAULTS += ["SystemExit in step", "endless", "endless with SIGTERM"]


def try_env(case, fault, evaluation):
    """A fault in training or in the evaluation at its end; then continues without it."""
    at = case.rng.randrange(1025, 1070) if evaluation else case.rng.randrange(200, 1000)
    case.done = f"{fault}, environment step {at}{' (evaluation)' if evaluation else ''}"
    flags = case.flags | {"env-id": "faulty:Faulty-v0", "eval-freq": 0}
    if fault == "endless" and hasattr(case.script.Args, "eval_max_steps"):
        flags["eval-max-steps"] = 300
    outcome = case.call(to_argv(flags), faulty_env(fault, at), limit=15, grace=10)
    if fault == "endless":
        check_code(outcome, 0)
        check_finished(case.run, [1024])
        return
    if fault == "endless with SIGTERM":
        check_interrupted(outcome, case.work)
    else:
        check_failed(
            outcome, case.run, "Faulty-v0", r"step \d", "to continue from the last checkpoint: "
        )
    state = check_checkpoint(case.run)
    expect(state, "no checkpoint")
    case.done += "; continued without the fault"
    outcome = case.resume(faulty_env("", 0))
    check_code(outcome, 0)
    check_finished(case.run, [1024])


# 5. Disks, and what else goes wrong in mid-run


def mount_tmpfs(folder):
    mount = ["mount", "-t", "tmpfs", "-o", "size=100m", "none", folder]
    return subprocess.run(mount, capture_output=True).returncode == 0


def may_mount(folder):
    folder.mkdir()
    may = mount_tmpfs(folder)
    if may:
        subprocess.run(["umount", folder], check=True)
    folder.rmdir()
    return may


def fill(folder):
    """Fills the disk, to the last byte."""
    with (folder / "filler").open("wb", buffering=0) as file:
        for size in (2**20, 2**12, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                pass


def in_mid_run(case, reference):
    """A rename in mid-run, after the first checkpoint and before the last."""
    return case.rng.randrange(max(3, reference.renames // 3), reference.renames - 3)


def try_full_disk(case, reference, at_start):
    case.done = "disk full at the start"
    runs = case.work / "runs"
    expect(mount_tmpfs(runs), "cannot mount a tmpfs")
    try:
        if case.toy:
            case.link_toy(runs / "toy")
        if at_start:
            fill(runs)
            outcome = case.call(to_argv(case.flags))
            check_code(outcome, 2)
            error_line(outcome)
            left = {path.name for path in runs.iterdir()} - {"toy", "filler"}
            expect(not left, f"refused, but left {left}")
            return
        n = in_mid_run(case, reference)
        case.done = f"disk full after rename {n} of {reference.renames}"
        hook = at_rename(n, "after", lambda: fill(runs))
        outcome = case.call(to_argv(case.flags), hook)
        check_failed(outcome, case.run, "to continue from the last checkpoint: ")
        expect((case.run / "checkpoint.pt").exists(), "no checkpoint")
        (runs / "filler").unlink()
        case.done += "; continued with space"
        finish(case, reference)
    finally:
        subprocess.run(["umount", "--lazy", runs], check=True)


def try_file_limit(case, reference):
    n = in_mid_run(case, reference)
    case.done = f"files limited to 20,000 bytes after rename {n} of {reference.renames}"
    limits = (20_000, resource.RLIM_INFINITY)
    hook = at_rename(n, "after", lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits))
    check_failed(
        case.call(to_argv(case.flags), hook), case.run, "to continue from the last checkpoint: "
    )
    case.done += "; continued without a limit"
    finish(case, reference)


def try_deleted_folder(case, reference):
    n = in_mid_run(case, reference)
    case.done = f"folder deleted after rename {n} of {reference.renames}"
    hook = at_rename(n, "after", lambda: shutil.rmtree(case.run))
    check_failed(case.call(to_argv(case.flags), hook), case.run)


def try_two_at_once(case, reference):
    case.done = "two --resume at once"
    shutil.copytree(reference.interrupted, case.run)
    ready, go = case.folder / "ready", case.folder / "go"

    def pause():
        ready.touch()
        while not go.exists():
            time.sleep(0.01)

    first = case.start(["--resume", "runs/run"], at_rename(1, "before", pause))
    deadline = time.monotonic() + 60
    while not ready.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    before = {name: content for name, content in snapshot(case.run).items() if "events" not in name}
    second = case.resume()
    after = {name: content for name, content in snapshot(case.run).items() if "events" not in name}
    go.touch()
    outcome = case.wait(first)
    check_code(second, 2)
    error_line(second)
    expect(before == after, "the second changed the folder")
    check_code(outcome, 0)
    check_finished(case.run, reference.steps)
    expect(same_run(case.run, reference.resumed), "the first was disturbed")


def optimizer_steps(flags):
    batch = flags.get("batch-size") or flags["num-envs"] * flags["num-steps"]
    updates = flags["total-timesteps"] // batch
    return updates * flags.get("update-epochs", 1) * flags.get("num-minibatches", 1)


def try_infinite_weights(case, reference, last):
    """The optimizer makes weights infinite, at the very last step or at another."""
    total = optimizer_steps(case.flags)
    n = total if last else case.rng.randrange(total // 2, total)
    case.done = f"weights infinite after step {n} of {total} of the optimizer"
    steps = []

    def spoil(optimizer, arguments, keywords):
        steps.append(1)
        if len(steps) == n:
            optimizer.param_groups[0]["params"][0].data.fill_(math.inf)

    outcome = case.call(to_argv(case.flags), lambda: register_optimizer_step_post_hook(spoil))
    check_failed(outcome, case.run, "not finite", "to continue from the last checkpoint: ")
    expect((case.run / "checkpoint.pt").exists(), "no checkpoint")
    case.done += "; continued"
    finish(case, reference)


def try_learning_rate(case, learning_rate):
    argv = to_argv(case.flags | {"learning-rate": learning_rate})
    case.done = f"--learning-rate {learning_rate}"
    check_accepted_or_refused(case, argv, case.call(argv))


# The campaign


@dataclass
class Campaign:
    args: Args
    out: Path
    bar: tqdm
    tried: Counter = field(default_factory=Counter)
    failed: Counter = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def attempt(self, script, toy, kind, function, *arguments):
        """Tries a case. Returns what `function` returns, or None if it failed."""
        row = (script.__name__, kind)
        number = self.tried[row]
        rng = random.Random(f"{self.args.seed} {row} {number}")
        folder = self.out / f"{script.__name__}-{kind.replace(' ', '-')}-{number}"
        case = Case(script, toy, folder, rng)
        self.tried[row] += 1
        self.bar.set_postfix_str(f"{script.__name__}, {kind}, {len(self.failures)} failures")
        result = None
        try:
            result = function(case, *arguments)
        except Exception as error:  # a Failure, or what no script should have left
            what = error if isinstance(error, Failure) else repr(error)
            self.failed[row] += 1
            self.failures.append(f"{script.__name__}, {kind} {number}: {case.done}: {what}")
            self.bar.write(self.failures[-1], file=sys.stderr)
        else:
            if not isinstance(result, Reference):
                for path in self.out.glob(f"{folder.name}*"):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.bar.update()
        return result

    def try_script(self, script, toy):
        def attempt(*arguments):
            return self.attempt(script, toy, *arguments)

        args = self.args
        for number in range(args.commands // len(args.scripts)):
            attempt("command lines", try_command_line, number)
        reference = attempt("reference", make_reference)
        if reference is None:
            return
        kills = 0
        while kills < args.kills - args.rename_kills:
            done = attempt("kills", try_kills, reference)
            kills += 1 if done is None else done
        self.tried[script.__name__, "kills"] = kills
        rng = random.Random(f"{args.seed} {script.__name__}")
        for n, moment in rename_moments(rng, reference.renames, args.rename_kills):
            attempt("rename kills", try_rename_kill, reference, n, moment)
        for name, damage in plan_damages(rng, args.damages):
            attempt("damaged folders", try_damage, reference, name, damage)
        if args.faults:
            self.try_faults(attempt, script, reference)

    def try_faults(self, attempt, script, reference):
        if script.__name__.endswith("continuous"):
            for fault in FAULTS:
                attempt("environments", try_env, fault, False)
            for fault in EVAL_FAULTS:
                attempt("environments", try_env, fault, True)
        if may_mount(self.out / "mount"):
            attempt("disks", try_full_disk, reference, True)
            for _ in range(3):
                attempt("disks", try_full_disk, reference, False)
        else:
            print("full disks: skipped, may not mount a tmpfs")
        for _ in range(2):
            attempt("disks", try_file_limit, reference)
            attempt("disks", try_deleted_folder, reference)
        attempt("two at once", try_two_at_once, reference)
        for last in (False, True):
            attempt("divergence", try_infinite_weights, reference, last)
        for learning_rate in ("1e38", "1e12", "1e9"):
            attempt("divergence", try_learning_rate, learning_rate)

    def report(self):
        lines = ["| script | cases | tried | fine | failed |", "|---|---|---:|---:|---:|"]
        for row, tried in self.tried.items():
            failed = self.failed[row]
            lines.append(f"| {' | '.join(row)} | {tried} | {tried - failed} | {failed} |")
        if self.failures:
            lines.append("")
        for failure in self.failures:
            lines.append(f"- {' '.join(failure.split())[:400]}")
        return "\n".join(lines)


def in_child(function):
    """Calls `function()` in a forked process, silently."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, 1)
            os.dup2(null, 2)
            function()
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    assert status == 0, f"{function} failed"


def make_toy(script, folder):
    """The toy task of RLHF, with models that have hardly learnt: enough for faults."""
    train = script.train_toy_model

    def train_briefly(model, data, steps, *rest):
        train(model, data, 10, *rest)

    def make():
        script.train_toy_model = train_briefly
        script.make_toy(folder)

    in_child(make)


def import_what_runs_import(case):
    """So that forked processes need not."""
    names = case.folder / "modules"

    def run():
        case.child(to_argv(case.flags), None)
        names.write_text("\n".join(sys.modules))

    in_child(run)
    for name in names.read_text().split():
        with suppress(Exception):  # some exist only in that process
            importlib.import_module(name)


def main(args: Args) -> int:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    torch.set_num_threads(1)  # forking needs a process without threads
    tqdm.monitor_interval = 0
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    out = (args.out or Path(tempfile.mkdtemp(prefix="campaign-"))).resolve()
    out.mkdir(parents=True, exist_ok=True)
    os.environ["HF_HOME"] = str(out / "huggingface")
    total = args.commands + len(args.scripts) * (args.kills + args.damages)
    campaign = Campaign(args, out, tqdm(total=total, unit=" cases", disable=None))
    for name in args.scripts:
        script = importlib.import_module(name)
        toy = None
        if name == "sppo_rlhf":
            toy = out / "toy"
            make_toy(script, toy)
        import_what_runs_import(Case(script, toy, out / f"{name}-imports", random.Random()))
        campaign.try_script(script, toy)
    campaign.bar.close()
    print(campaign.report())
    if not args.out:
        shutil.rmtree(out)
    return 1 if campaign.failures else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
