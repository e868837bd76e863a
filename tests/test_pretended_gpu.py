"""All scripts on a pretended GPU, uncompiled: nothing is on the wrong device, mistakes are caught,
and what waits for the GPU is counted."""

import importlib.util
from collections import Counter
from dataclasses import replace
from pathlib import Path

import helpers
import pytest
from accelerate.state import AcceleratorState
from helpers import Setting, Signals, load_and_train, work_in
from pretended_gpu import WrongDevice, pretend

import sppo_rlhf

# One rollout: eight steps or four texts
SMALL = {"eval_freq": 1, "eval_episodes": 1, "device": "cuda", "noise": "adv_flip"}
STEPS = {"total_timesteps": 8, "num_steps": 8, "num_envs": 1, "checkpoint_freq": 1}
TEXTS = {"total_timesteps": 4, "batch_size": 4, "micro_batch_size": 1}
TEXTS |= {"prompt_length": 4, "response_length": 4, "stop_at_eos": False}
PPO = {"num_minibatches": 2, "update_epochs": 1}

ATARI = [
    replace(setting, small=setting.small | SMALL | STEPS | (PPO if setting.ppo else {}))
    for setting in (helpers.SPPO_ATARI, helpers.SA2C_ATARI)
]
SPPO_ATARI, SA2C_ATARI = ATARI
SPPO_RLHF = Setting(sppo_rlhf, "", SMALL | TEXTS | PPO, "", "token_advantages")
FUNCTION = {"reward_model": (f"{Path(__file__).with_name('test_rlhf.py')}:text_lengths",)}


@pytest.fixture
def gpu(toy, monkeypatch):
    work_in(monkeypatch, toy.parent.parent)
    for setting in (*ATARI, SPPO_RLHF):
        monkeypatch.setattr(setting.script, "distributions", list, raising=False)  # slow
    for setting in ATARI:
        monkeypatch.setattr(setting.script, "AtariVectorEnv", Signals)
    AcceleratorState._reset_state(True)  # else it keeps the device of the test before
    with pretend() as gpu:
        yield gpu
    AcceleratorState._reset_state(True)


BFLOAT16 = {"amp": "auto"}
RUNS = [
    (SPPO_ATARI, BFLOAT16),
    (SPPO_ATARI, {"noise": "flip"}),
    (SPPO_ATARI, {"noise": "normal"}),
    (SA2C_ATARI, BFLOAT16),
    (SA2C_ATARI, {"noise": "uniform"}),
    (SPPO_RLHF, {"noise": "flip"}),
    (SPPO_RLHF, {"lora_r": 2, "ce_coef": 0.1} | FUNCTION),
]


@pytest.mark.parametrize(("setting", "flags"), RUNS, ids=str)
def test_a_run_is_begun_and_continued(setting, flags, tmp_path, gpu):
    flags = flags | {"total_timesteps": 2 * setting.small["total_timesteps"]}
    setting.interrupt(tmp_path, 1, **flags)
    setting.run(tmp_path, **flags)
    assert gpu.waits


# Scripts, what is right there, and what is wrong
MISTAKES = [
    # The CPU's generator for what is on the GPU
    ([SPPO_ATARI], "e, generator=generator)", "e, generator=generator, device='cuda')"),
    # An index left on the CPU
    (ATARI, "dtype=torch.int64, device=device)", "dtype=torch.int64)"),
    ([SPPO_RLHF], "places.to(device), tokens.to(device)", "places.to(device), tokens"),
    ([SPPO_RLHF], "return inputs.to(setup.actor_critic.policy.device)", "return inputs"),
    ([SPPO_RLHF], "torch.cat(advantages).to(device)", "torch.cat(advantages)"),
    # A mask left there
    (ATARI, "flipped.to(advantage.device)", "flipped"),
    (ATARI, "(~overridden).float().to(device)", "(~overridden).float()"),
    # numpy() on the GPU
    (ATARI, "action[t].cpu().numpy()", "action[t].numpy()"),
]
MISTAKES = [(setting, *texts) for settings, *texts in MISTAKES for setting in settings]


@pytest.mark.parametrize(("setting", "right", "wrong"), MISTAKES, ids=str)
def test_a_mistake_is_caught(setting, right, wrong, tmp_path, gpu):
    source = Path(setting.script.__file__).read_text()
    assert source.count(right) == 1
    path = tmp_path / "mistaken.py"
    path.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.AtariVectorEnv = Signals
    reward = FUNCTION if setting is SPPO_RLHF else {}
    args = replace(setting, script=script).args(tmp_path, **reward)
    with pytest.raises(WrongDevice):
        load_and_train(script, args, tmp_path)


# What is doubled, and how many waits that adds: units by waits of each. Each step of a game waits
# for the action and for the image; each epoch for the order and the flips; each minibatch of games
# for each of nine metrics; each of A2C's rollouts for what is logged and saved, too; each micro
# batch of texts for its seven tensors and, in policy and critic, for transformers' look at the
# mask; each minibatch of language models for what is logged; each token that `generate` samples for
# whether a text goes on, in a check, a rollout and two evaluations, which look at a mask, too.
RLHF_WAITS = {"response_length": 4 * 4 + 4, "micro_batch_size": -2 * 9, "num_minibatches": 2 * 7}
RLHF_WAITS |= {"batch_size": 4 * 9}
WAITS = [
    (SPPO_ATARI, {"num_steps": 8 * 2, "num_minibatches": 2 * 9, "update_epochs": 2 + 2 * 9}),
    (SA2C_ATARI, {"num_steps": 8 * 2, "total_timesteps": 8 * 2 + 17}),
    (SPPO_RLHF, RLHF_WAITS),
]


@pytest.mark.parametrize(("setting", "expected"), WAITS, ids=str)
def test_what_waits_for_the_gpu(setting, expected, tmp_path, gpu):
    def count(**flags):
        gpu.waits.clear()
        setting.run(tmp_path / "".join(flags), **{"eval_freq": 100} | flags)
        return Counter(gpu.waits)

    before = count()
    found, lines = {}, {}
    for name in expected:
        after = count(**{name: 2 * setting.small[name]})
        after.subtract(before)
        lines[name] = {line: times for line, times in after.items() if times}
        found[name] = sum(lines[name].values())
    assert found == expected, lines
