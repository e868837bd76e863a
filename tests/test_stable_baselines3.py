"""Our scripts take the updates of Stable-Baselines3: A2C and PPO, which are ours with beta 0, and
SA2C and SPPO as docs/copy-and-modify.md makes them of these. benchmarks/sb3.py's runs are read like
ours."""

import copy
import re
import runpy
import shlex
import sys
from functools import partial
from pathlib import Path

import gymnasium as gym
import helpers
import numpy as np
import pytest
import torch
from helpers import CONTINUOUS, SPPO_ATARI, SPPO_CONTINUOUS, checkpoint, only, record
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.buffers import RolloutBufferSamples
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.logger import configure
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from stable_baselines3.common.vec_env import DummyVecEnv

import report

T = 5
N = 2
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import run as benchmark_run  # noqa: E402


def run_recorded(setting, tmp_path, monkeypatch, **flags):
    """A run, by default without a reverse loss. Returns its minibatches (without Atari's mask), the
    weights at the beginning and at the end (dicts by name), and the clip fractions."""
    agents = []

    class Agent(setting.script.Agent):
        def __init__(self, *options):
            super().__init__(*options)
            agents.append(copy.deepcopy(self.state_dict()))

    monkeypatch.setattr(setting.script, "Agent", Agent)
    calls = record(monkeypatch, setting.script, setting.loss_name)
    plain = {"num_envs": N, "alpha": 1.0, "beta": 0.0, "env_id": "Pong"}
    if setting.atari:  # a whole game would take long
        monkeypatch.setattr(setting.script, "evaluate", lambda *_: (np.zeros(1), np.zeros(1)))
    else:
        plain |= {"env_id": "Hopper-v4", "policy": "gaussian"}
    _, folder = setting.run(tmp_path, **plain | flags)
    batches = [x[:5] for arguments, _ in calls for x in arguments if hasattr(x, "log_prob")]
    clip_fractions = [metrics.get("losses/clipfrac") for _, (_, metrics) in calls]
    return batches, agents[0], checkpoint(folder)["agent"], clip_fractions


def sb3_model(setting, algorithm, weights, **settings):
    """Stable-Baselines3's algorithm with our weights, and its parameters in our order."""
    policy = "MlpPolicy"
    make_env = partial(gym.make, "Hopper-v4")
    if setting.atari:  # the spaces of Pong
        policy = "CnnPolicy"
        make_env = partial(FakeImageEnv, n_channels=4, channel_first=True)
    envs = DummyVecEnv([make_env] * N)
    model = algorithm(policy, envs, n_steps=T, device="cpu", **settings)
    return model, take_weights(model, weights, setting.atari)


def take_weights(model, weights, atari=False):
    """Gives Stable-Baselines3's model our weights. Returns its parameters in our order."""
    model.set_logger(configure(None, []))
    policy = model.policy
    if atari:
        extractor = policy.features_extractor
        modules = extractor.cnn, extractor.linear, policy.action_net, policy.value_net
    else:
        extractor = policy.mlp_extractor
        modules = extractor.policy_net, policy.action_net, extractor.value_net, policy.value_net
    parameters = [policy.log_std] if hasattr(policy, "log_std") else []
    for module in modules:
        parameters.extend(module.parameters())
    assert len(parameters) == len(list(policy.parameters())) == len(weights)
    with torch.no_grad():
        for parameter, weight in zip(parameters, weights.values()):
            parameter.copy_(weight)
    return parameters


def check_same_update(theirs, before, after, atol=1e-6):
    for parameter, (name, weight) in zip(theirs, after.items()):
        assert (weight - before[name]).abs().max() > 3e-5, name
        torch.testing.assert_close(weight, parameter.detach(), rtol=0, atol=atol)


@only(*helpers.A2C)
def test_a2c_takes_stable_baselines3s_updates(setting, tmp_path, monkeypatch):
    """From the same weights and the same rollouts: three updates, so that RMSprop has a past."""
    flags = {"num_steps": T, "total_timesteps": 3 * T * N}
    flags |= {"learning_rate": 0.1, "rmsprop_eps": 0.1}  # so that epsilon matters
    settings = {"learning_rate": 0.1, "rms_prop_eps": 0.1}
    if setting.atari:
        optimizer = {"optimizer_class": RMSpropTFLike, "optimizer_kwargs": {"eps": 0.1}}
        settings |= {"vf_coef": 0.25, "ent_coef": 0.01, "policy_kwargs": optimizer}
    batches, before, after, _ = run_recorded(setting, tmp_path, monkeypatch, **flags)
    assert len(batches) == 3
    model, theirs = sb3_model(setting, A2C, before, **settings)
    train_a2c(model, batches)
    check_same_update(theirs, before, after)


def train_a2c(model, batches):
    buffer = model.rollout_buffer
    for obs, action, _, advantage, returns in batches:
        buffer.reset()
        with torch.no_grad():
            _, log_prob, _ = model.policy.evaluate_actions(obs, action)
        fields = {"observations": obs, "actions": action, "log_probs": log_prob}
        fields |= {"advantages": advantage, "returns": returns}
        for name, tensor in fields.items():
            setattr(buffer, name, tensor.numpy().reshape(getattr(buffer, name).shape))
        buffer.full = True
        model.train()


@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size:UserWarning")
@pytest.mark.parametrize(("setting", "k"), [(SPPO_CONTINUOUS, 1), (SPPO_ATARI, 1), (SPPO_ATARI, 3)])
def test_ppo_takes_stable_baselines3s_updates(setting, k, tmp_path, monkeypatch):
    """From the same weights and the same minibatches: a rollout of two epochs of four. SPPO is PPO
    with settings divided by k."""
    flags = {"num_steps": 4 * T, "total_timesteps": 4 * T * N}
    flags |= {"learning_rate": 0.01, "adam_eps": 0.01}  # so ratios are clipped, and epsilon matters
    settings = {"ent_coef": 0.0}
    if setting.atari:
        flags |= {"learning_rate": 0.002, "anneal_lr": False, "anneal_clip": False}
        flags |= {"seed": 2}  # no ratio on a bound, where their minimum halves the gradient
        flags |= {"alpha": 1.0, "beta": k - 1.0}
        settings = {"ent_coef": 0.01 / k, "clip_range": 0.1}
    batches, before, after, clip_fractions = run_recorded(setting, tmp_path, monkeypatch, **flags)
    assert len(batches) == 8
    assert max(clip_fractions) > 0
    optimizer = {"optimizer_kwargs": {"eps": 0.01 / k}}
    settings |= {"learning_rate": flags["learning_rate"], "policy_kwargs": optimizer}
    settings |= {"vf_coef": 0.5 / k, "max_grad_norm": 0.5 / k}
    model, theirs = sb3_model(setting, PPO, before, **settings)
    train_ppo(model, batches)
    check_same_update(theirs, before, after)


def train_ppo(model, batches):
    samples = []
    for obs, action, old_log_prob, advantage, returns in batches:
        samples.append(RolloutBufferSamples(obs, action, None, old_log_prob, advantage, returns))
    model.rollout_buffer.get = lambda batch_size: samples
    model.n_epochs = 1
    model.train()


@only(*CONTINUOUS)
def test_the_pages_models_take_our_symmetric_updates(setting, tmp_path, monkeypatch):
    """A whole rollout of PPO with all defaults, ten of A2C."""
    pytest.importorskip("Box2D", reason="no wheel for Python 3.14")
    monkeypatch.syspath_prepend(tmp_path)
    page = (ROOT / "docs/copy-and-modify.md").read_text()
    for name, block in re.findall(r"(?ms)^```python\n# (\w+_sb3\.py)\n(.+?)^```$", page):
        (tmp_path / name).write_text(block)
    for algorithm in (A2C, PPO):
        monkeypatch.setattr(algorithm, "learn", lambda *_: None)
    file = tmp_path / f"{setting.symmetric_algo}_sb3.py"
    model = runpy.run_path(str(file), run_name="__main__")["model"]

    flags = {"env_id": "LunarLanderContinuous-v3", "policy": "categorical", "alpha": None}
    flags |= {"beta": None, "num_envs": 4, "num_steps": 8, "total_timesteps": 320}
    if setting.ppo:
        flags |= {"num_envs": 1, "num_steps": 2048, "num_minibatches": 32, "update_epochs": 10}
    batches, before, after, _ = run_recorded(setting, tmp_path, monkeypatch, **flags)
    assert len(batches) == (320 if setting.ppo else 10)
    theirs = take_weights(model, before)
    (train_ppo if setting.ppo else train_a2c)(model, batches)
    check_same_update(theirs, before, after, atol=1e-5)


def test_runs_of_stable_baselines3_are_read_like_ours(tmp_path, monkeypatch):
    """In reports, and in lists of commands."""
    runs = tmp_path / "runs"
    command = ["benchmarks/sb3.py", "--algo", "a2c", "--env-id", "InvertedDoublePendulum-v4"]
    command += ["--total-timesteps", "64", "--eval-episodes", "1", "--runs-dir", str(runs)]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", command)
    runpy.run_path(command[0], run_name="__main__")
    commands = [shlex.join(["python", *words]) for words in (command, [*command, "--seed=2"])]
    assert list(benchmark_run.unfinished(commands, runs)) == commands[1:]
    report.main(report.Args(folders=(runs,), out=tmp_path / "report"))
    assert "| sb3-a2c |" in (tmp_path / "report/report.md").read_text()
