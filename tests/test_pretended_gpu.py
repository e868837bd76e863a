"""On a pretended GPU, uncompiled, nothing is on the wrong device, and nothing waits needlessly."""

import inspect
from dataclasses import replace
from pathlib import Path

import helpers
import pytest
from accelerate.state import AcceleratorState
from helpers import Setting, Signals, work_in
from pretended_gpu import pretend

import sppo_rlhf

# One rollout: eight steps or four texts
SMALL = {"eval_freq": 100, "eval_episodes": 1, "device": "cuda", "noise": "adv_flip"}
STEPS = {"total_timesteps": 8, "num_steps": 8, "num_envs": 1}
TEXTS = {"total_timesteps": 4, "batch_size": 4, "micro_batch_size": 1}
TEXTS |= {"prompt_length": 4, "response_length": 4, "stop_at_eos": False}
TEXTS |= {"num_minibatches": 2, "update_epochs": 1}
PPO = {"num_minibatches": 4, "update_epochs": 1}
A2C = {"log_freq": 100}

SPPO_ATARI, SA2C_ATARI = ATARI = [
    replace(setting, small=setting.small | SMALL | STEPS | (PPO if setting.ppo else A2C))
    for setting in (helpers.SPPO_ATARI, helpers.SA2C_ATARI)
]
SPPO_RLHF = Setting(sppo_rlhf, SMALL | TEXTS, "")
FUNCTION = {"reward_model": (f"{Path(__file__).with_name('test_rlhf.py')}:text_lengths",)}


class CutOff(Signals):
    """Games that are cut off after ten steps."""

    def step(self, action):
        images, reward, over, no, info = super().step(action)
        return images, reward, no, over, info | {"final_obs": images}


@pytest.fixture
def gpu(toy, monkeypatch):
    work_in(monkeypatch, toy.parent.parent)
    for setting in (*ATARI, SPPO_RLHF):
        monkeypatch.setattr(setting.script, "distributions", list, raising=False)  # slow
        monkeypatch.setattr(setting.script, "AtariVectorEnv", Signals, raising=False)
    AcceleratorState._reset_state(True)  # else it keeps the device of the test before
    with pretend() as gpu:
        yield gpu
    AcceleratorState._reset_state(True)


GAMES = {"amp": "auto", "checkpoint_freq": 1, "num_steps": 12}
RUNS = [(SPPO_ATARI, GAMES), (SA2C_ATARI, GAMES)]
RUNS += [(SPPO_RLHF, {}), (SPPO_RLHF, {"lora_r": 2, "ce_coef": 0.1} | FUNCTION)]


@pytest.mark.parametrize(("setting", "flags"), RUNS, ids=str)
def test_a_run_on_a_pretended_gpu(setting, flags, tmp_path, monkeypatch, gpu):
    """Its tensors are on the right device, and no line of a loss waits, but for copies to it."""
    monkeypatch.setattr(setting.script, "AtariVectorEnv", CutOff, raising=False)
    flags = flags | {"total_timesteps": 2 * setting.small["total_timesteps"], "eval_freq": 1}
    setting.interrupt(tmp_path, 1, **flags)
    setting.run(tmp_path, **flags)
    lines, first = inspect.getsourcelines(setting.loss_function)
    places = [f"{setting.script.__file__}:{first + i} " for i in range(len(lines))]
    waits = [wait for wait in gpu.waits if not wait.endswith(" to")]
    assert waits and not [wait for wait in waits if wait.startswith(tuple(places))]
