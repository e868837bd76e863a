"""What a copy of a control script changes works, or stops the run: optimizers, networks."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import pytest
import torch
from helpers import ATARI, CONTINUOUS, Signals, import_file, only
from test_control import make_agent, one_update, some_batch
from torch import nn


def edited(script, folder, *edits):
    """A copy of a script in `folder` with edits, pairs of old and new text."""
    text = Path(script.__file__).read_text()
    for old, new in edits:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path = folder / Path(script.__file__).name
    path.parent.mkdir()
    path.write_text(text)
    copy = import_file(path)
    copy.AtariVectorEnv = Signals
    return copy


def run_copy(setting, folder, change, **flags):
    """Runs a copy whose agents are changed, for a rollout."""
    script = edited(setting.script, folder)

    class Agent(script.Agent):
        def __init__(self, *options):
            super().__init__(*options)
            change(self)

    script.Agent = Agent
    flags = {"total_timesteps": 64, "num_envs": 2, "num_steps": 32} | flags
    replace(setting, script=script).run(folder, **flags)


# ---- What stops a run

NOT_THE_SAME = "error: the policy that acts is not the one that is trained"


def test_dropout_stops_the_run(setting, tmp_path):
    """Outputs are not as small as they usually are at first, so that the difference shows."""

    def drop_out(agent):
        if setting.atari:
            nn.init.normal_(agent.actor.weight, std=0.3)
            agent.trunk[-1] = nn.Dropout(0.5)
        else:
            nn.init.normal_(agent.actor[-1].weight, std=0.3)
            agent.actor.insert(4, nn.Dropout(0.5))

    with pytest.raises(SystemExit, match=NOT_THE_SAME):
        run_copy(setting, tmp_path / "copy", drop_out)


@only(*CONTINUOUS)
def test_another_policy_in_training_stops_a_run_that_starts_from_another(setting, tmp_path):
    _, parent = setting.run(tmp_path / "runs", total_timesteps=128)
    edit = "Categorical(logits=output,", "Categorical(logits=output / 0.9,"
    copy = replace(setting, script=edited(setting.script, tmp_path / "copy", edit))
    with pytest.raises(SystemExit, match=NOT_THE_SAME):
        copy.run(tmp_path / "runs", start_from=str(parent))


def shift_log_prob(script, monkeypatch, shift, rollout=1):
    """Of one rollout. Returns a list that gets the batches as they were."""

    def shifted_collect(*arguments):
        batch, obs = collect(*arguments)
        batches.append(batch)
        shifted = batch._replace(log_prob=batch.log_prob + shift)
        return shifted if len(batches) == rollout else batch, obs

    batches = []
    collect = script.collect
    monkeypatch.setattr(script, "collect", shifted_collect)
    return batches


@pytest.mark.parametrize(("rollout", "shift", "stops"), [(1, 2e-4, 1), (2, 2e-4, 1), (1, 5e-5, 0)])
def test_first_ratios_of_two_rollouts_are_1(
    setting, tmp_path, monkeypatch, signals, rollout, shift, stops
):
    """Up to a KL divergence of 1e-8. A shift s of log-probabilities gives s ** 2 / 2."""
    batches = shift_log_prob(setting.script, monkeypatch, shift, rollout)
    with pytest.raises(SystemExit, match=NOT_THE_SAME) if stops else nullcontext():
        setting.run(tmp_path)
    assert len(batches) == (rollout if stops else 4)


@only(*ATARI)
@pytest.mark.parametrize(("shift", "stops"), [(2e-3, True), (1e-3, False)])
def test_bfloat16_may_round_first_ratios(setting, tmp_path, monkeypatch, shift, stops):
    """Up to a KL divergence of 1e-6."""
    monkeypatch.setattr(setting.script, "has_bfloat16", lambda device: True)
    shift_log_prob(setting.script, monkeypatch, shift)
    with pytest.raises(SystemExit, match=NOT_THE_SAME) if stops else nullcontext():
        setting.run(tmp_path, amp="auto")


@only(*CONTINUOUS)
def test_rounding_in_thousands_of_dimensions_stops_no_run(setting, tmp_path):
    """There log p is -7,200, and float32 has seven digits."""

    def make_wide(**_):
        box = gym.spaces.Box(-2, 2, (3000,))
        return gym.wrappers.TransformAction(gym.make("Pendulum-v1"), lambda x: x[:1], box)

    gym.register("Wide-v0", make_wide)
    setting.run(tmp_path, env_id="Wide-v0", total_timesteps=128)


# ---- What works: optimizers, networks, a start from another run


@only(*CONTINUOUS)
def test_layers_may_be_shared_and_the_critic_may_normalise_batches(setting, tmp_path):
    """One of two rollouts has a truncated episode, the other none."""

    def share_and_normalise(agent):
        agent.critic[0] = agent.actor[0]
        agent.critic.insert(1, nn.BatchNorm1d(64))

    flags = {"env_id": "Pendulum-v1", "num_steps": 100, "num_envs": 1, "total_timesteps": 200}
    run_copy(setting, tmp_path / "copy", share_and_normalise, **flags)


@only(*CONTINUOUS)
def test_gradients_are_laid_out_like_weights(setting):
    """That of a convolution is laid out like its input. Fused optimizers would mix elements up."""
    agent = make_agent(setting)
    images = nn.Unflatten(1, (4, 2, 4))
    images.register_forward_hook(lambda *io: io[-1].to(memory_format=torch.channels_last))
    convolution = nn.Conv2d(4, 33, (2, 4))
    agent.actor = nn.Sequential(nn.Linear(11, 32), images, convolution, nn.Flatten())
    setting.update(agent, one_update(setting), some_batch(setting, agent))
    for parameter in agent.parameters():
        assert parameter.grad.stride() == parameter.stride()
