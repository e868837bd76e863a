"""Small runs of the scripts, and what they leave."""

import csv
import threading
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

import sppo_atari
import sppo_continuous


class StopAfter(threading.Event):
    """An event that sets itself when it has been looked at `updates` times: `train` looks once an update."""

    def __init__(self, updates: int):
        super().__init__()
        self.left = updates

    def is_set(self) -> bool:
        self.left -= 1
        return self.left <= 0


@dataclass
class Setting:
    """A script, and flags for a short run: four updates on 128 steps, of 3 epochs of 4 minibatches each."""

    script: ModuleType
    envs: str  # name of the class whose `step` takes the training's actions
    small: dict
    visible: str  # an environment that can be filmed without a display

    def __str__(self):
        return self.script.__name__

    def run(self, runs_dir, stop=None, **flags):
        """Trains with `flags` over `small`. Returns (what `train` returned, the run's folder)."""
        flags = self.small | {"runs_dir": str(runs_dir), "run_name": "run"} | flags
        args = self.script.prepare(self.script.Args(**flags))
        return self.script.train(args, stop or threading.Event()), Path(args.runs_dir) / args.run_name

    def resume(self, folder):
        return self.script.train(self.script.prepare(self.script.Args(resume=str(folder))), threading.Event())

    def record_actions(self, monkeypatch) -> list:
        """The actions of all steps from here on, a list that goes on growing."""
        envs, actions = getattr(self.script, self.envs), []
        step = envs.step

        def recording_step(games, action):
            actions.append(action.copy())
            return step(games, action)

        monkeypatch.setattr(envs, "step", recording_step)
        return actions


SMALL = {"total_timesteps": 512, "num_minibatches": 4, "update_epochs": 3, "eval_episodes": 1, "eval_freq": 0}
SMALL |= {"compile": False, "device": "cpu"}
CONTINUOUS = Setting(
    sppo_continuous, "NormalizedEnvs", SMALL | {"env_id": "InvertedDoublePendulum-v4", "num_steps": 128},
    visible="LunarLanderContinuous-v3",
)  # fmt: skip
ATARI = Setting(
    sppo_atari, "AtariGames", SMALL | {"env_id": "Breakout", "num_envs": 2, "num_steps": 64, "amp": "off"},
    visible="Pong",
)  # fmt: skip


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=False)


def weights(folder):
    return torch.cat([w.flatten() for w in checkpoint(folder)["agent"].values()])


def progress(folder):
    with (folder / "progress.csv").open() as file:
        return [{name: float(x) for name, x in row.items()} for row in csv.DictReader(file)]
