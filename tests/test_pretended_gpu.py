"""On a pretended GPU, uncompiled, nothing is on the wrong device, and nothing waits needlessly."""

from dataclasses import replace
from pathlib import Path

import helpers
import pytest
from accelerate.state import AcceleratorState
from helpers import Setting, Signals, load_and_train, work_in
from pretended_gpu import WrongDevice, pretend
from test_copies import edited

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
SPPO_RLHF = Setting(sppo_rlhf, "", SMALL | TEXTS, "", "token_advantages")
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
def test_a_run_is_begun_and_continued(setting, flags, tmp_path, monkeypatch, gpu):
    monkeypatch.setattr(setting.script, "AtariVectorEnv", CutOff, raising=False)
    flags = flags | {"total_timesteps": 2 * setting.small["total_timesteps"], "eval_freq": 1}
    setting.interrupt(tmp_path, 1, **flags)
    setting.run(tmp_path, **flags)
    assert gpu.waits


MISTAKES = [  # what is right in a script, and what is wrong
    (SPPO_ATARI, "e, generator=generator)", "e, generator=generator, device='cuda')"),
    (SPPO_ATARI, "action[t].cpu().numpy()", "action[t].numpy()"),
    (SA2C_ATARI, "(~overridden).float().to(device)", "(~overridden).float()"),
    (SA2C_ATARI, "flipped.to(advantage.device)", "flipped"),
    (SPPO_RLHF, "places.to(device), tokens.to(device)", "places.to(device), tokens"),
    (SPPO_RLHF, "return inputs.to(setup.actor_critic.policy.device)", "return inputs"),
]


@pytest.mark.parametrize(("setting", "right", "wrong"), MISTAKES, ids=str)
def test_a_tensor_on_the_wrong_device_is_found(setting, right, wrong, tmp_path, gpu):
    script = edited(setting.script, tmp_path / "copy", (right, wrong))
    args = replace(setting, script=script).args(tmp_path)
    with pytest.raises(WrongDevice):
        load_and_train(script, args, tmp_path)


# How often the CPU may wait from the first to the third call of a function. A step of a game waits
# for its action and its images, a rollout for six tensors, A2C's first updates for a check. Each
# micro batch of texts is copied in seven tensors, and transformers looks twice at a mask.
MOST_WAITS = [
    (SPPO_ATARI, "AtariGames.step", 2 * 2),
    (SPPO_ATARI, "loss_and_metrics", 0),
    (SA2C_ATARI, "AtariGames.step", 2 * 2),
    (SA2C_ATARI, "loss_and_metrics", 2 * (8 * 2 + 6 + 1)),
    (SPPO_RLHF, "loss_and_metrics", 2 * (7 + 2)),
]


@pytest.mark.parametrize(("setting", "name", "most"), MOST_WAITS, ids=str)
def test_nothing_else_waits(setting, name, most, tmp_path, monkeypatch, gpu):
    *owner, name = name.split(".")
    owner = getattr(setting.script, *owner) if owner else setting.script
    function = getattr(owner, name)
    waits_before = []

    def counted(*args):
        waits_before.append(len(gpu.waits))
        return function(*args)

    monkeypatch.setattr(owner, name, counted)
    setting.run(tmp_path, total_timesteps=3 * setting.small["total_timesteps"])
    first, _, third, *_ = waits_before
    assert third - first <= most, gpu.waits[first:third]
