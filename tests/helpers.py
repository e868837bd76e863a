"""Small runs of the scripts, and what they leave."""

import contextlib
import copy
import csv
import hashlib
import importlib.util
import json
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from ale_py import Action
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

import sa2c_atari
import sa2c_continuous
import sppo_atari
import sppo_continuous

# Event files of the same second are read in the order of a count, as text: 10 before 9
event_file_writer._global_uid = event_file_writer.AtomicCounter(10**6)


def needs_gpu(test):
    """`pytest -m gpu` runs all of these."""
    without = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    return pytest.mark.gpu(without(test))


def only(*settings):
    """A test of these scripts; others are of the four control scripts."""
    return pytest.mark.parametrize("setting", settings, ids=str, indirect=True)


@dataclass
class Setting:
    """A script, and flags for a short run: four updates on 64 steps, in PPO 2 epochs of 4
    minibatches."""

    script: types.ModuleType
    small: dict
    video_env: str  # an environment that can be rendered without a display
    batch: int = 64  # steps of a rollout

    @property
    def ppo(self) -> bool:
        return self.script.__name__.startswith("sppo")

    @property
    def atari(self) -> bool:
        return self.script.__name__.endswith("atari")

    @property
    def is_text(self) -> bool:
        return self.script.__name__ == "sppo_rlhf"

    @property
    def symmetric_algo(self) -> str:
        return self.script.__name__.split("_")[0]

    @property
    def loss_name(self) -> str:
        continuous = hasattr(self.script, "gradient_and_metrics")
        return "gradient_and_metrics" if continuous else "loss_and_metrics"

    @property
    def loss_function(self):
        return getattr(self.script, self.loss_name)

    def __str__(self):
        return self.script.__name__

    def args(self, runs_dir, **flags):
        """Arguments of a run with `flags` over `small`."""
        args = self.script.Args(**self.small | {"runs_dir": str(runs_dir)} | flags)
        if hasattr(args, "resolve"):
            args.resolve()
        return args

    def run(self, runs_dir, **flags):
        """Trains as the same command would: begins, continues, or finds the run finished. Returns
        (summary.json, the run's folder)."""
        folder = train(self.script, self.args(runs_dir, **flags))
        return json.loads((folder / "summary.json").read_text()), folder

    def interrupt(self, runs_dir, rollouts, **flags):
        """Ends a run like a kill would, after a number of updates, before the next. Returns its
        folder."""
        calls = []

        def update(*args):
            calls.append(args)
            if len(calls) > rollouts:
                raise KeyboardInterrupt
            return original(*args)

        original = self.script.update
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(self.script, "update", update)
            writers = record(patch, self.script, "SummaryWriter")
            self.run(runs_dir, **flags)
        for _, writer in writers:  # whose thread may lag behind
            writer.close()
        return self.folder(runs_dir, **flags)

    def collect(self, agent, args, envs, obs):
        """As in a run, uncompiled, with random numbers of its own."""
        numbers = np.random.default_rng(0), torch.Generator().manual_seed(0)
        more = [agent] if self.atari else []
        return self.script.collect(agent, args, envs, obs, *numbers, *more)

    def update(self, agent, args, batch, function=None):
        """As in a run of a control script, uncompiled, but by gradient descent."""
        optimizer = torch.optim.SGD(agent.parameters(), 0.01)
        numbers = [np.random.default_rng(0)] + [torch.Generator()] * self.ppo
        more = [torch.tensor(0.2)] * (self.ppo and self.atari)  # the clip range
        function = function or self.loss_function
        return self.script.update(agent, args, optimizer, function, batch, *numbers, *more)

    def folder(self, runs_dir, **flags):
        args = self.args(runs_dir, **flags)
        return self.script.run_folder(args, digests_of(self.script, args))


SMALL = {"total_timesteps": 256, "eval_episodes": 1, "eval_freq": 256, "compile": False}
MINIBATCHES = {"num_minibatches": 4, "update_epochs": 2}
VECTORS = SMALL | {"env_id": "InvertedDoublePendulum-v4", "num_envs": 1, "num_steps": 64}
GAMES = SMALL | {"env_id": "Breakout", "num_envs": 8, "num_steps": 8, "amp": "off", "device": "cpu"}
CONTINUOUS = SPPO_CONTINUOUS, SA2C_CONTINUOUS = [
    Setting(script, VECTORS | more, video_env="LunarLanderContinuous-v3")
    for script, more in ((sppo_continuous, MINIBATCHES), (sa2c_continuous, {"log_freq": 1}))
]
ATARI = SPPO_ATARI, SA2C_ATARI = [
    Setting(script, GAMES | more, "Pong")
    for script, more in ((sppo_atari, MINIBATCHES), (sa2c_atari, {"log_freq": 1}))
]
PPO = [SPPO_CONTINUOUS, SPPO_ATARI]
A2C = [SA2C_CONTINUOUS, SA2C_ATARI]
SETTINGS = PPO + A2C
# For sppo_rlhf.py: four updates of four minibatches, evaluated after 0, 16 and 32 texts
SMALL_TEXTS = {"total_timesteps": 32, "batch_size": 8, "num_minibatches": 2, "update_epochs": 2}
SMALL_TEXTS |= {"prompt_length": 8, "response_length": 10, "eval_freq": 16, "eval_episodes": 4}
SMALL_TEXTS |= {"amp": "off", "device": "cpu"}
# An evaluation and a checkpoint after each rollout
EACH = {"eval_freq": 1, "checkpoint_freq": 1}


class Signals:
    """Atari's vector interface on a game of ten steps: a bar at the left or the right, or none,
    says what to press; each right answer pays 2 points. By chance that makes 20 / 3 points a
    game."""

    def __init__(self, _, num_games, **__):
        self.ale = self
        self.num_games = num_games

    def get_action_set(self):
        return [Action.NOOP, Action.RIGHT, Action.LEFT]

    def show(self):
        self.signal = self.rng.integers(3, size=len(self.images))
        self.images = np.roll(self.images, -1, axis=1)
        self.images[:, -1] = 0
        self.images[self.signal == 1, -1, :, 64:] = 200
        self.images[self.signal == 2, -1, :, :20] = 200
        return self.images.copy()

    def reset(self, seed):
        self.rng = np.random.Generator(np.random.PCG64(seed))
        self.images = np.zeros((self.num_games, 4, 84, 84), np.uint8)
        self.time = np.zeros(self.num_games, int)
        return self.show(), {"lives": np.zeros(self.num_games, int)}

    def step(self, action):
        reward = 2 * (action == self.signal)
        self.time += 1
        over = self.time == 10
        self.time[over] = 0
        no = np.zeros_like(over)
        return self.show(), reward, over, no, {"lives": np.zeros(len(over), int)}


def work_in(monkeypatch, folder):
    """As if scripts had been started there."""
    monkeypatch.chdir(folder)
    for name, module in list(sys.modules.items()):
        if name.startswith(("sppo_", "sa2c_")):
            monkeypatch.setattr(module, "START", folder, raising=False)


def import_file(path):
    """A script as a module of its own."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sha256(path):
    """Of a file. Tests compare these, since pytest takes hours to show how two agents differ."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def digests_of(script, args):
    """Of the files that decide what a run does."""
    local = script.local_digests(args) if hasattr(script, "local_digests") else {}
    return script.file_digests() | local | script.start_digest(args)


def train(script, args):
    """Does what `main` of a script does: begins or continues a run, or finds it finished. Language
    models are loaded and environments made first. Returns the run's folder."""
    digests = digests_of(script, args)
    folder = script.run_folder(args, digests)
    if (folder / "summary.json").exists():
        return folder
    with contextlib.ExitStack() as stack:
        made = []
        if hasattr(script, "load"):
            made = [script.load(args)]
        elif hasattr(script, "NormalizedEnvs"):
            made = [stack.enter_context(contextlib.closing(script.NormalizedEnvs(args)))]
        folder.mkdir(parents=True, exist_ok=True)
        script.begin_session(args, digests, folder)
        script.train(*made, args, folder)
    return folder


def record(monkeypatch, module, name):
    """Arguments, arrays and tensors copied, and result of each call of a function from here on, a
    list that goes on growing."""
    calls = []
    function = getattr(module, name)

    def recording(*args, **options):
        copies = [copy.deepcopy(x) if isinstance(x, np.ndarray | torch.Tensor) else x for x in args]
        calls.append((copies, function(*args, **options)))
        return calls[-1][1]

    monkeypatch.setattr(module, name, recording)
    return calls


def read_lines(path):
    """Of a file of JSON lines."""
    return [json.loads(line) for line in Path(path).open()]


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt")


def weights(folder):
    return torch.cat([w.flatten() for w in checkpoint(folder)["agent"].values()])


def progress(folder):
    """The rows of progress.csv; what has not been logged yet is nan."""
    with (folder / "progress.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{name: float(x or "nan") for name, x in row.items()} for row in rows]


def scalars(folder):
    """{tag: [(step, value), ...]} of TensorBoard's events, without those of measured speed."""
    events = EventAccumulator(str(folder)).Reload()
    logged = {}
    for tag in set(events.Tags()["scalars"]) - {"charts/SPS"}:
        logged[tag] = [(event.step, event.value) for event in events.Scalars(tag)]
    return logged


def call_main(monkeypatch, module, *words):
    """What a script that is called with words exits with: 0, or why."""
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, words)])
    try:
        module.main()
    except SystemExit as end:
        return end.code
    return 0


def parse(script, words):
    """The script's arguments. It exits if it would refuse them."""
    if hasattr(script, "parse_args"):
        return script.parse_args(words)
    return tyro.cli(script.Args, args=words)


def words(flags):
    """Flags as they are typed. Those that are None are left out."""
    typed = []
    for name, value in flags.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            typed.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, tuple):
            typed += [f"--{flag}", *map(str, value)]
        elif value is not None:
            typed += [f"--{flag}", str(value)]
    return typed
