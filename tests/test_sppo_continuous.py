"""Everything in `sppo_continuous.py` but the loss, which has `test_loss.py`."""

import csv
import importlib.machinery
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import sppo_continuous as script

SCRIPT = Path(script.__file__)
SMALL = {
    "env_id": "InvertedDoublePendulum-v4",
    "total_timesteps": 512,
    "num_steps": 128,
    "num_minibatches": 4,
    "update_epochs": 3,
    "eval_episodes": 1,
    "eval_freq": 0,
    "compile": False,
}


class StopAfter(threading.Event):
    """An event that sets itself when it has been looked at `updates` times: `train` looks once an update."""

    def __init__(self, updates: int):
        super().__init__()
        self.left = updates

    def is_set(self) -> bool:
        self.left -= 1
        return self.left <= 0


def run(runs_dir, stop=None, **flags):
    """Trains with `flags` over SMALL. Returns (what `train` returned, the run's folder)."""
    args = script.prepare(script.Args(**SMALL | {"runs_dir": str(runs_dir), "run_name": "run"} | flags))
    return script.train(args, stop or threading.Event()), Path(args.runs_dir) / args.run_name


def resume(folder):
    return script.train(script.prepare(script.Args(resume=str(folder))), threading.Event())


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=False)


def weights(folder):
    return torch.cat([w.flatten() for w in checkpoint(folder)["agent"].values()])


def progress(folder):
    with (folder / "progress.csv").open() as file:
        return [{name: float(x) for name, x in row.items()} for row in csv.DictReader(file)]


@pytest.fixture
def recorded_actions(monkeypatch):
    """The actions of all training steps from here on, in a list."""
    actions, step = [], script.NormalizedEnvs.step

    def recording_step(self, action):
        actions.append(action.copy())
        return step(self, action)

    monkeypatch.setattr(script.NormalizedEnvs, "step", recording_step)
    return actions


# ---- Policies


def make_agent(policy="categorical", env_id="HalfCheetah-v4", **flags):
    env = script.make_env(env_id)
    return script.Agent(env, script.Args(policy=policy, **flags)), env


def test_categorical_policy_is_the_joint_distribution():
    """Over all 5 x 5 joint actions the probabilities are products, and entropy is -sum p log p."""
    agent, _ = make_agent(env_id="LunarLanderContinuous-v3", bins=5)
    torch.nn.init.normal_(agent.actor[-1].weight)
    obs = torch.randn(1, 8)
    p = agent.output(obs).softmax(-1)[0]
    joint = torch.tensor(list(itertools.product(range(5), repeat=2)))
    log_prob = agent.policy(obs.expand(25, 8)).log_prob(joint)
    torch.testing.assert_close(log_prob.exp(), p[0][joint[:, 0]] * p[1][joint[:, 1]])
    torch.testing.assert_close(agent.policy(obs).entropy()[0], -(log_prob.exp() * log_prob).sum())


def test_gaussian_policy_is_the_joint_density():
    agent, _ = make_agent("gaussian", log_std_init=-0.7)
    obs, action = torch.randn(64, 17), torch.randn(64, 6)
    standardized = (action - agent.act(obs)) / np.exp(-0.7)
    expected = -0.5 * (standardized**2 + np.log(2 * np.pi)).sum(-1) + 6 * 0.7
    torch.testing.assert_close(agent.policy(obs).log_prob(action), expected)
    expected = torch.full((64,), 6 * (0.5 * np.log(2 * np.pi * np.e) - 0.7), dtype=torch.float32)
    torch.testing.assert_close(agent.policy(obs).entropy(), expected)


def test_categorical_samples_follow_the_softmax():
    agent, env = make_agent()
    torch.nn.init.normal_(agent.actor[-1].weight)
    obs = torch.randn(1, 17).expand(20_000, 17)
    with torch.no_grad():
        p = agent.output(obs[:1]).softmax(-1)[0]
        action = agent.act(obs, torch.Generator().manual_seed(0))
        frequency = torch.nn.functional.one_hot(action, 11).float().mean(0)
        assert (agent.act(obs) == p.argmax(-1)).all()  # without a generator: greedy
    assert p.max() > 0.3  # far from uniform, or the test would say little
    assert (frequency - p).abs().max() < 5 * (0.25 / 20_000) ** 0.5


def test_gaussian_samples_have_the_mean_and_spread():
    agent, env = make_agent("gaussian", log_std_init=-1.0)
    obs = torch.randn(1, 17).expand(20_000, 17)
    with torch.no_grad():
        mean = agent.act(obs[:1])[0]
        action = agent.act(obs, torch.Generator().manual_seed(0))
    torch.testing.assert_close(action.mean(0), mean, rtol=0, atol=0.02)
    torch.testing.assert_close(action.std(0), agent.log_std.exp().detach(), rtol=0.03, atol=0)


def test_actions_reach_the_environment_within_its_bounds():
    agent, env = make_agent(env_id="Humanoid-v4")  # bounds of 0.4, so that a missing scale would show
    indices = np.stack([np.zeros(17, int), np.full(17, 5), np.full(17, 10)])
    np.testing.assert_allclose(agent.to_env(indices), [[-0.4] * 17, [0.0] * 17, [0.4] * 17], atol=1e-7)
    agent, env = make_agent("gaussian", env_id="Humanoid-v4")
    np.testing.assert_allclose(
        agent.to_env(np.array([[-3.0, 0.1, 3.0] + [0.0] * 14]))[0, :3], [-0.4, 0.1, 0.4]
    )


@pytest.mark.parametrize("policy", ["categorical", "gaussian"])
def test_networks_are_as_the_flags_say(policy):
    flags = dict(hidden_sizes=(32, 16), activation="relu", layer_norm=True, ortho_init=False)
    agent, _ = make_agent(policy, **flags)
    kinds = [type(layer).__name__ for layer in agent.actor]
    assert kinds == ["Linear", "LayerNorm", "ReLU"] * 2 + ["Linear"]
    assert kinds == [type(layer).__name__ for layer in agent.critic]
    agent, _ = make_agent(policy)
    for network, gain in ((agent.actor, 0.01), (agent.critic, 1.0)):
        for layer, expected in zip((network[0], network[2], network[4]), (2**0.5, 2**0.5, gain)):
            w = layer.weight if layer.weight.shape[0] <= layer.weight.shape[1] else layer.weight.T
            torch.testing.assert_close(w @ w.T, expected**2 * torch.eye(len(w)), rtol=0, atol=1e-5)
            assert not layer.bias.any()


# ---- Advantages


@pytest.mark.parametrize("lam", [0.0, 0.9, 1.0])
def test_gae_is_the_brute_force_sum(lam):
    rng, T, N, gamma = np.random.default_rng(1), 40, 3, 0.97
    reward, final_value = rng.normal(size=(2, T, N))
    value = rng.normal(size=(T + 1, N))
    terminated, truncated = rng.random((2, T, N)) < 0.15
    assert (terminated & truncated).any()  # a step can be both: then the episode has terminated
    advantage, returns = script.compute_gae(reward, value, final_value, terminated, truncated, gamma, lam)
    for n in range(N):
        for t in range(T):
            expected, weight = 0.0, 1.0
            for step in range(t, T):
                if terminated[step, n]:
                    bootstrap = 0.0
                else:
                    bootstrap = final_value[step, n] if truncated[step, n] else value[step + 1, n]
                expected += weight * (reward[step, n] + gamma * bootstrap - value[step, n])
                weight *= gamma * lam
                if terminated[step, n] or truncated[step, n]:
                    break
            assert advantage[t, n] == pytest.approx(expected)
    np.testing.assert_allclose(returns, advantage + value[:-1])


def test_with_lambda_one_returns_are_discounted_rewards_with_a_bootstrap():
    reward, value = np.array([[1.0], [2.0], [4.0]]), np.full((4, 1), 10.0)
    no, at_the_end = np.zeros((3, 1), bool), np.array([[False], [False], [True]])
    final_value = np.full((3, 1), 8.0)
    for terminated, truncated, bootstrap in ((at_the_end, no, 0.0), (no, at_the_end, 8.0), (no, no, 10.0)):
        _, returns = script.compute_gae(reward, value, final_value, terminated, truncated, 0.5, 1.0)
        assert returns[0, 0] == pytest.approx(1 + 0.5 * 2 + 0.25 * 4 + 0.125 * bootstrap)


# ---- Noise


def test_flip_has_its_rate_and_three_outcomes():
    reward = np.tile([-1.0, 0.0, 1.0], (60_000, 1))
    noisy = script.perturb_reward(reward, "flip", 0.1, np.random.default_rng(0))
    for column, flipped in enumerate([2.0, 1.0, 0.0]):
        assert set(noisy[:, column]) == {reward[0, column], flipped}
        assert (noisy[:, column] == flipped).mean() == pytest.approx(0.1, abs=0.005)
    assert (script.perturb_reward(reward, "flip", 1.0, np.random.default_rng(0)) == 1 - reward).all()


def test_additive_noise_has_its_mean_and_spread():
    reward = np.full((500, 400), 3.0)
    normal = script.perturb_reward(reward, "normal", 0.05, np.random.default_rng(0)) - reward
    uniform = script.perturb_reward(reward, "uniform", 0.05, np.random.default_rng(0)) - reward
    for noise, std, largest in ((normal, 0.05, 1.0), (uniform, 0.05 / 3**0.5, 0.05)):
        assert noise.mean() == pytest.approx(0, abs=5 * std / noise.size**0.5)
        assert noise.std() == pytest.approx(std, rel=0.01)
        assert abs(noise).max() <= largest
    assert abs(normal).max() > 0.15  # a Gaussian has tails
    for noise in ("none", "adv_flip"):  # not on rewards
        assert (script.perturb_reward(reward, noise, 1.0, np.random.default_rng(0)) == reward).all()


def test_advantage_flip_has_its_rate_and_keeps_sizes():
    advantage = torch.randn(300, 300)
    noisy = script.perturb_advantage(advantage, 0.1, torch.Generator().manual_seed(0))
    assert torch.equal(noisy.abs(), advantage.abs())
    assert (noisy != advantage).float().mean().item() == pytest.approx(0.1, abs=0.005)


@pytest.fixture
def gae_calls(monkeypatch):
    """Episodes of at most 6 steps, and what `train` gives to `compute_gae`, with what it should have given.

    A list of dicts, one a rollout: the arguments, `noisy` (what `perturb_reward` returned), and `expected`,
    the critic's values of the last observations of truncated episodes, by (step, environment).
    """
    calls, agents, ends, noisy = [], [], [], []
    original = {name: getattr(script, name) for name in ("compute_gae", "perturb_reward", "Agent")}

    def make_agent(*arguments):
        agents.append(original["Agent"](*arguments))
        return agents[-1]

    def perturb_reward(*arguments):
        noisy.append((arguments[0].copy(), original["perturb_reward"](*arguments)))
        return noisy[-1][1]

    class Envs(script.NormalizedEnvs):
        def step(self, action):
            output = super().step(action)
            ends.append(output[4])
            return output

    def compute_gae(reward, value, final_value, terminated, truncated, *rest):
        with torch.no_grad():
            values = {
                (t, i): agents[-1].value(torch.from_numpy(obs)).item()
                for t, last in enumerate(ends)
                for i, obs in last.items()
            }
        ends.clear()
        clean, perturbed = noisy[-1]
        calls.append(
            {"reward": reward, "final_value": final_value.copy(), "expected": values, "clean": clean}
        )
        calls[-1] |= {"noisy": perturbed, "cut": truncated & ~terminated}
        return original["compute_gae"](reward, value, final_value, terminated, truncated, *rest)

    monkeypatch.setattr(script, "make_env", lambda env_id, mode=None: gym.make(env_id, max_episode_steps=6))
    for name, replacement in {"Agent": make_agent, "perturb_reward": perturb_reward}.items():
        monkeypatch.setattr(script, name, replacement)
    monkeypatch.setattr(script, "NormalizedEnvs", Envs)
    monkeypatch.setattr(script, "compute_gae", compute_gae)
    return calls


def test_truncated_episodes_bootstrap_from_their_last_observation(tmp_path, gae_calls):
    run(tmp_path, env_id="InvertedPendulum-v4", num_envs=2)
    assert sum(len(call["expected"]) for call in gae_calls) > 10
    for call in gae_calls:
        assert set(zip(*np.nonzero(call["cut"]))) == set(call["expected"])
        for index, value in call["expected"].items():
            assert call["final_value"][index] == pytest.approx(value, abs=1e-5)


def test_noise_comes_after_normalisation_and_before_the_bootstrap(tmp_path, gae_calls):
    """And the score of the training is that of raw rewards: this pendulum pays 1 a step, at most 6 steps."""
    summary, _ = run(tmp_path, env_id="InvertedPendulum-v4", noise="flip", noise_level=1.0)
    for call in gae_calls:
        assert 0 < call["clean"].max() <= 10
        np.testing.assert_array_equal(call["noisy"], 1 - call["clean"])
        np.testing.assert_array_equal(call["reward"], call["noisy"])
    assert any(abs(call["clean"] - 1).max() > 0.1 for call in gae_calls)  # normalised, not the raw 1
    assert 2 < summary["train_return_last100"] <= 6
    assert 2 < summary["final_return_mean"] <= 6


@pytest.mark.parametrize("noise", ["none", "adv_flip"])
def test_advantages_flip_before_normalisation_anew_in_every_epoch(tmp_path, monkeypatch, noise):
    seen, perturb_advantage = [], script.perturb_advantage

    def recording(advantage, level, generator):
        noisy = perturb_advantage(advantage, level, generator)
        seen.append((advantage, noisy, level))
        return noisy

    monkeypatch.setattr(script, "perturb_advantage", recording)
    run(tmp_path, noise=noise, total_timesteps=256)
    assert len(seen) == (2 * SMALL["update_epochs"] if noise == "adv_flip" else 0)
    for advantage, noisy, level in seen:
        assert advantage.shape == (SMALL["num_minibatches"], 32)
        assert level == 0.1
        assert 0 < (noisy != advantage).float().mean() < 0.3
        assert abs(advantage.mean(1)).max() > 0.01  # normalised ones would have a mean of zero


def test_advantages_can_stay_as_they_are(tmp_path):
    normalized, plain = (run(tmp_path / str(norm), norm_adv=norm)[1] for norm in (True, False))
    assert not torch.equal(weights(normalized), weights(plain))


def test_evaluation_is_a_plain_greedy_episode_on_raw_rewards(tmp_path):
    summary, folder = run(tmp_path, noise="flip", noise_level=1.0, eval_episodes=2)
    env, state = gym.make(SMALL["env_id"]), checkpoint(folder)
    agent, _ = make_agent(env_id=SMALL["env_id"])
    agent.load_state_dict(state["agent"])
    stats, returns = state["envs"][0], []
    for episode in range(2):
        obs, _ = env.reset(seed=1 + 512 + episode)
        score, ended = 0.0, False
        while not ended:
            z = (obs - stats["mean"]) / np.sqrt(stats["m2"] / stats["count"] + 1e-8)
            logits = agent.output(torch.tensor(z.clip(-10, 10), dtype=torch.float32))
            action = np.linspace(env.action_space.low, env.action_space.high, 11)[logits[0, 0].argmax()]
            obs, reward, terminated, truncated, _ = env.step(action)
            score, ended = score + reward, terminated or truncated
        returns.append(score)
    assert summary["final_return_mean"] == pytest.approx(np.mean(returns), rel=1e-6)
    assert summary["final_return_std"] == pytest.approx(np.std(returns), rel=1e-6)


# ---- Normalisation


@pytest.fixture
def stepped_envs(monkeypatch):
    """Three pendulums with a time limit of 12 steps after 200 random steps, and their whole raw streams."""
    streams = []

    class Recorder(gym.Wrapper):
        def reset(self, **kwargs):
            obs, info = self.env.reset(**kwargs)
            self.stream.append(("reset", obs, 0.0))
            return obs, info

        def step(self, action):
            obs, reward, terminated, truncated, info = self.env.step(action)
            self.stream.append(
                ("terminated" if terminated else "truncated" if truncated else "", obs, reward)
            )
            return obs, reward, terminated, truncated, info

    def make_env(env_id, render_mode=None):
        env = Recorder(gym.make(env_id, max_episode_steps=12))
        env.stream = []
        streams.append(env.stream)
        return env

    monkeypatch.setattr(script, "make_env", make_env)
    envs = script.NormalizedEnvs("InvertedPendulum-v4", 3, gamma=0.9)
    rng, outputs = np.random.default_rng(0), []
    envs.reset(seed=5)
    for _ in range(200):
        outputs.append(envs.step(rng.uniform(-3, 3, (3, 1))))
    return envs, streams, outputs


def test_running_statistics_are_numpys_on_the_whole_stream(stepped_envs):
    envs, streams, _ = stepped_envs
    first = [stream[0][1] for stream in streams]
    assert not np.array_equal(first[0], first[1])  # each environment has a seed of its own
    kinds = [kind for stream in streams for kind, _, _ in stream]
    assert kinds.count("terminated") > 5
    assert kinds.count("truncated") > 5
    # an observation that ends an episode is replaced by the first of the next one
    obs = np.array(
        [obs for stream in streams for kind, obs, _ in stream if kind not in ("terminated", "truncated")]
    )
    np.testing.assert_allclose(envs.obs_stats.mean, obs.mean(0))
    np.testing.assert_allclose(envs.obs_stats.std, np.sqrt(obs.var(0) + 1e-8))
    assert envs.obs_stats.count == len(obs) == 603
    discounted = []
    for stream in streams:
        total = 0.0
        for kind, _, reward in stream:
            if kind == "reset":
                total = 0.0
            else:
                total = 0.9 * total + reward
                discounted.append(total)
    np.testing.assert_allclose(envs.return_stats.std, np.sqrt(np.var(discounted) + 1e-8))
    assert envs.return_stats.count == len(discounted) == 600


def test_step_returns_normalised_values_and_ends(stepped_envs):
    envs, streams, outputs = stepped_envs
    obs, reward, terminated, truncated, final_obs = (list(x) for x in zip(*outputs))
    for i, stream in enumerate(streams):
        steps = [entry for entry in stream if entry[0] != "reset"]
        assert [kind == "terminated" for kind, _, _ in steps] == [bool(x[i]) for x in terminated]
        assert [i in x for x in final_obs] == [kind == "truncated" for kind, _, _ in steps]
    assert max(length for _, length in envs.finished) == 12
    assert all(
        episode_return == length for episode_return, length in envs.finished
    )  # this pendulum pays 1 a step
    # the last step, by hand: statistics of the whole stream, as the test above checks
    last_obs = np.stack([stream[-1][1] for stream in streams])
    last_reward = [[reward for kind, _, reward in stream if kind != "reset"][-1] for stream in streams]
    expected = ((last_obs - envs.obs_stats.mean) / envs.obs_stats.std).clip(-10, 10)
    np.testing.assert_allclose(obs[-1], expected, rtol=1e-5)
    np.testing.assert_allclose(reward[-1], np.clip(last_reward / envs.return_stats.std, -10, 10))
    assert max(abs(r).max() for r in reward) == 10  # the first rewards have no spread yet: clipped


def test_truncation_hands_out_the_last_observation(stepped_envs):
    envs, streams, outputs = stepped_envs
    ends = [(t, i, last) for t, output in enumerate(outputs) for i, last in output[4].items()]
    t, i, last = ends[-1]
    raw = [entry for entry in streams[i] if entry[0] != "reset"][t]
    assert raw[0] == "truncated"
    # normalised with the statistics of that moment, which the last ones are close to
    np.testing.assert_allclose(last, envs.normalize_obs(raw[1]), atol=0.2)
    assert abs(last - outputs[t][0][i]).max() > 0.05  # and not the first of the next episode


def test_evaluation_leaves_the_training_statistics_alone():
    envs = script.NormalizedEnvs("InvertedPendulum-v4", 1, 0.99)
    envs.reset(seed=0)
    before = json.dumps([envs.obs_stats.mean.tolist(), envs.obs_stats.count, envs.return_stats.count])
    agent, env = make_agent(env_id="InvertedPendulum-v4")
    returns, lengths = script.evaluate(agent, env, envs, episodes=3, seed=0)
    assert returns.shape == lengths.shape == (3,)
    assert before == json.dumps([envs.obs_stats.mean.tolist(), envs.obs_stats.count, envs.return_stats.count])


# ---- Runs: identity, reproducibility, learning


def test_sppo_is_ppo_with_alpha_k(tmp_path, recorded_actions):
    k = 0.5 + 20.0
    flags = dict(ent_coef=0.01)
    _, sppo = run(tmp_path / "sppo", alpha=0.5, beta=20.0, **flags)
    _, scaled_loss = run(tmp_path / "scaled", alpha=k, beta=0.0, **flags)
    _, rest = run(
        tmp_path / "rest", alpha=1.0, beta=0.0, vf_coef=0.5 / k, ent_coef=0.01 / k, max_grad_norm=0.5 / k,
        adam_eps=1e-5 / k,
    )  # fmt: skip
    _, ppo = run(tmp_path / "ppo", alpha=1.0, beta=0.0, **flags)
    steps = SMALL["total_timesteps"]
    actions = [np.concatenate(recorded_actions[i * steps : (i + 1) * steps]) for i in range(4)]
    for other, other_actions in ((scaled_loss, actions[1]), (rest, actions[2])):
        np.testing.assert_array_equal(actions[0], other_actions)
        torch.testing.assert_close(weights(sppo), weights(other), rtol=0, atol=1e-5)
    assert (weights(sppo) - weights(ppo)).abs().max() > 1e-3  # while PPO itself is another run


def test_equal_seeds_give_equal_bits(tmp_path):
    flags = dict(noise="adv_flip", num_envs=2, eval_freq=128)
    first, again, other = (run(tmp_path / name, seed=int(name[0]), **flags)[1] for name in ("3a", "3b", "4"))
    assert torch.equal(weights(first), weights(again))
    assert (first / "progress.csv").read_bytes() == (again / "progress.csv").read_bytes()
    assert not torch.equal(weights(first), weights(other))


def some_minibatch(agent, n=64):
    obs, advantage, returns = torch.randn(n, 17), torch.randn(n), torch.randn(n)
    with torch.no_grad():
        action = agent.act(obs, torch.Generator().manual_seed(0))
        old_log_prob = agent.policy(obs).log_prob(action) + 0.3 * torch.randn(n)
    return obs, action, old_log_prob, advantage, returns


@pytest.mark.parametrize("policy", ["categorical", "gaussian"])
def test_gradient_and_metrics_are_those_of_plain_pytorch(policy):
    """PPO in its usual words, with backward() and clip_grad_norm_, has this gradient; the metrics by hand."""
    torch.manual_seed(0)
    agent, _ = make_agent(policy)
    torch.nn.init.normal_(agent.actor[-1].weight, std=0.1)
    args = script.Args(policy=policy, alpha=2.0, beta=0.0, ent_coef=0.3, vf_coef=0.7, max_grad_norm=0.2)
    obs, action, old_log_prob, advantage, returns = some_minibatch(agent)
    gradient, metrics = script.gradient_and_metrics(
        agent, args, obs, action, old_log_prob, advantage, returns
    )

    output = agent.actor(obs)
    if policy == "gaussian":
        distribution = torch.distributions.Normal(output, agent.log_std.exp())
    else:
        distribution = torch.distributions.Categorical(logits=output.reshape(64, 6, 11))
    log_ratio = distribution.log_prob(action).sum(-1) - old_log_prob
    ratio, entropy = log_ratio.exp(), distribution.entropy().sum(-1).mean()
    ppo = -torch.min(advantage * ratio, advantage * torch.clamp(ratio, 0.8, 1.2)).mean()
    value_loss = torch.nn.functional.mse_loss(agent.critic(obs).flatten(), returns)
    (2.0 * ppo + 0.7 * value_loss - 0.3 * entropy).backward()
    norm = torch.nn.utils.clip_grad_norm_(agent.parameters(), 0.2)
    expected = torch.cat([parameter.grad.flatten() for parameter in agent.parameters()])
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)
    assert norm > 0.3  # so that it was clipped

    outside = ((ratio > 1.2) & (advantage > 0)) | ((ratio < 0.8) & (advantage < 0))
    by_hand = {
        "policy": ppo,
        "reverse": (-1 * advantage * ratio)[~outside].sum() / 64,
        "value": value_loss,
        "entropy": entropy,
        "grad_norm": norm,
        "approx_kl": (ratio - 1 - log_ratio).mean(),
        "clip_fraction": ((ratio < 0.8) | (ratio > 1.2)).float().mean(),
    }
    assert 0 < by_hand["clip_fraction"] < 1
    assert set(metrics) == set(by_hand)
    for name, metric in by_hand.items():
        torch.testing.assert_close(metrics[name], metric.detach(), rtol=1e-4, atol=1e-6)


def test_the_ratio_starts_at_one(tmp_path, monkeypatch):
    """Log-probabilities of the rollout, and of its first minibatch, are the same."""
    recorded, gradient_and_metrics = [], script.gradient_and_metrics

    def recording(*arguments):
        gradient, metrics = gradient_and_metrics(*arguments)
        recorded.append({name: metric.item() for name, metric in metrics.items()})
        return gradient, metrics

    monkeypatch.setattr(script, "gradient_and_metrics", recording)
    run(tmp_path, total_timesteps=128)
    _, first, *_, last = recorded  # the very first call compiles, on zeros
    assert abs(first["approx_kl"]) < 1e-6
    assert first["clip_fraction"] == 0
    assert abs(first["policy"]) < 1e-5  # minus the mean of normalised advantages
    assert last["approx_kl"] > 1e-6


def test_the_logged_advantages_are_those_of_the_rollout(tmp_path, monkeypatch):
    """Of advantages 3, .9, .5 and -.4, whose mean is 1, normalisation flips the sign of two."""

    advantage, values = np.array([[3.0], [0.9], [0.5], [-0.4]]), []

    def compute_gae(reward, value, *_):
        values.append(value[:-1])
        return advantage, advantage + value[:-1]

    monkeypatch.setattr(script, "compute_gae", compute_gae)
    _, folder = run(tmp_path, num_steps=4, num_minibatches=1, total_timesteps=4)
    events = EventAccumulator(str(folder)).Reload()
    assert events.Scalars("losses/advantage_largest")[0].value == 3.0
    assert events.Scalars("losses/advantage_sign_flips")[0].value == 0.5
    explained = 1 - np.var(advantage) / np.var(advantage + values[0])
    assert events.Scalars("losses/explained_variance")[0].value == pytest.approx(explained, rel=1e-5)


def test_an_infinite_gradient_ends_the_run_and_says_so(tmp_path):
    with pytest.raises(SystemExit, match="gradient not finite at step"):
        run(tmp_path, learning_rate=1e18, total_timesteps=1024)


def test_every_action_answers_the_latest_observation(tmp_path, monkeypatch):
    """Across rollouts too."""
    shown, answered, act = [], [], script.Agent.act

    class Envs(script.NormalizedEnvs):
        def reset(self, seed):
            shown.append(super().reset(seed))
            return shown[-1]

        def step(self, action):
            output = super().step(action)
            shown.append(output[0])
            return output

    def recording_act(self, obs, generator=None):
        if generator is not None:
            answered.append(obs.numpy().copy())
        return act(self, obs, generator)

    monkeypatch.setattr(script, "NormalizedEnvs", Envs)
    monkeypatch.setattr(script.Agent, "act", recording_act)
    run(tmp_path, num_envs=2)
    assert len(answered) == SMALL["total_timesteps"] / 2
    np.testing.assert_array_equal(answered, shown[:-1])


def test_an_epoch_trains_on_every_step_once(tmp_path, monkeypatch):
    """Each observation goes with the action that answered it."""
    acted, trained, act, gradient_and_metrics = [], [], script.Agent.act, script.gradient_and_metrics

    def pairs(obs, action):
        return [(o.numpy().tobytes(), a.numpy().tobytes()) for o, a in zip(obs, action)]

    def recording_act(self, obs, generator=None):
        action = act(self, obs, generator)
        if generator is not None:
            acted.extend(pairs(obs, action))
        return action

    def recording_gradient(agent, args, obs, action, *rest):
        trained.extend(pairs(obs, action))
        return gradient_and_metrics(agent, args, obs, action, *rest)

    monkeypatch.setattr(script.Agent, "act", recording_act)
    monkeypatch.setattr(script, "gradient_and_metrics", recording_gradient)
    run(tmp_path, update_epochs=1, num_envs=2, total_timesteps=256)
    del trained[: 256 // SMALL["num_minibatches"]]  # the first call is on zeros, to compile
    assert len(acted) == 256
    assert sorted(acted) == sorted(trained)


def test_gaussian_runs_are_ppo(tmp_path, recorded_actions):
    summary, _ = run(tmp_path, policy="gaussian", env_id="LunarLanderContinuous-v3")
    actions = np.concatenate(recorded_actions)
    assert (summary["algo"], summary["alpha"], summary["beta"]) == ("ppo", 1.0, 0.0)
    assert abs(actions).max() == 1  # clipped to the bounds
    assert (actions != actions.round()).mean() > 0.5  # and not cut to integers


COMPILERS = [c for c in ("c++", "g++", "clang++") if shutil.which(c)]


@pytest.mark.skipif(not COMPILERS, reason="--compile needs a C++ compiler")
@pytest.mark.parametrize("policy", ["categorical", "gaussian"])
def test_compiled_gradient_is_the_gradient(policy):
    torch._dynamo.config.trace_autograd_ops = True
    args = script.Args(policy=policy, alpha=0.5, beta=0.0 if policy == "gaussian" else 20.0, ent_coef=0.01)
    agent, _ = make_agent(policy)
    minibatch = some_minibatch(agent)
    gradient, metrics = script.gradient_and_metrics(agent, args, *minibatch)
    compiled, compiled_metrics = torch.compile(script.gradient_and_metrics)(agent, args, *minibatch)
    assert gradient.norm() > 0.1
    torch.testing.assert_close(compiled, gradient, rtol=1e-4, atol=1e-6)
    assert gradient.norm().item() == pytest.approx(0.5, rel=1e-3)  # clipped
    for name, metric in metrics.items():
        torch.testing.assert_close(compiled_metrics[name], metric, rtol=1e-4, atol=1e-5)


LEARNING = dict(env_id="InvertedPendulum-v4", total_timesteps=24_576, num_steps=2048, num_minibatches=32,
                update_epochs=10, eval_episodes=5)  # fmt: skip


def test_it_learns_to_balance(tmp_path):
    """Random play balances about 6 steps; 300 and more are learned, not luck."""
    summary, _ = run(tmp_path, **LEARNING)
    assert summary["final_return_mean"] > 300


def test_it_does_not_learn_with_advantages_turned_round(tmp_path, monkeypatch):
    compute_gae = script.compute_gae

    def turned(*arguments):
        advantage, returns = compute_gae(*arguments)
        return -advantage, returns

    monkeypatch.setattr(script, "compute_gae", turned)
    summary, _ = run(tmp_path, **LEARNING)
    assert summary["final_return_mean"] < 60


# ---- The folder of a run; stopping and resuming


def test_a_run_leaves_what_it_promises(tmp_path):
    summary, folder = run(tmp_path, eval_freq=256, seed=7, noise="uniform")
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summary))
    expected = {"script": "sppo_continuous.py", "algo": "sppo", "env_id": SMALL["env_id"], "seed": 7}
    expected |= {"noise": "uniform", "noise_level": 0.05, "alpha": 0.5, "beta": 20.0, "z": -1.0}
    expected |= {"total_timesteps": 512, "finished": True}
    assert {name: summary[name] for name in expected} == expected
    assert {"final_return_std", "train_return_last100", "sps", "wall_s"} <= set(summary)
    assert [row["step"] for row in progress(folder)] == [256, 512]
    assert progress(folder)[-1]["return_mean"] == summary["final_return_mean"]
    recorded = json.loads((folder / "args.json").read_text())
    assert recorded["args"]["noise_level"] == 0.05
    assert recorded["versions"]["torch"] == torch.__version__
    assert not list(folder.glob("*.tmp"))
    events = EventAccumulator(str(folder)).Reload()
    tags = set(events.Tags()["scalars"])
    assert {f"charts/{name}" for name in ("episodic_return", "episodic_length", "SPS")} < tags
    losses = "policy reverse value entropy approx_kl clip_fraction explained_variance grad_norm"
    losses += " advantage_sign_flips advantage_largest"
    assert {f"losses/{name}" for name in losses.split()} < tags
    assert [event.step for event in events.Scalars("losses/policy")] == [128, 256, 384, 512]


def test_interrupted_and_resumed_a_run_is_whole(tmp_path):
    whole, _ = run(tmp_path / "whole", eval_freq=128, total_timesteps=768)
    stopped, folder = run(tmp_path / "broken", stop=StopAfter(3), eval_freq=128, total_timesteps=768)
    assert stopped is None
    assert not (folder / "summary.json").exists()
    before = checkpoint(folder)
    assert before["progress"][0] == 384

    summary = resume(folder)
    assert summary["finished"]
    steps = [row["step"] for row in progress(folder)]
    assert steps == [128, 256, 384, 512, 640, 768]
    assert progress(folder)[:3] == progress(tmp_path / "whole" / "run")[:3]
    after = checkpoint(folder)
    updates = 768 // 128 * SMALL["update_epochs"] * SMALL["num_minibatches"]
    assert after["optimizer"]["state"][0]["step"].item() == updates
    assert after["envs"][0]["count"] == 768 + 2  # every step once, and two first observations
    assert after["envs"][1]["count"] == 768
    assert summary["wall_s"] > before["progress"][3]
    assert not torch.equal(after["generator"], before["generator"])


def test_resuming_restores_weights_and_random_states(tmp_path, monkeypatch):
    """Without steps of Adam the weights stay; the noise on rewards is drawn from where it stopped."""
    _, folder = run(tmp_path, stop=StopAfter(2), noise="normal")
    before, trained = checkpoint(folder), weights(folder)
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: None)
    resume(folder)
    after = checkpoint(folder)
    assert torch.equal(weights(folder), trained)
    assert before["envs"][2][-1] in after["envs"][2]  # an episode that had ended before
    rng = np.random.default_rng()
    rng.bit_generator.state = before["rng"]
    rng.normal(0, 1, (2, SMALL["num_steps"], 1))
    assert rng.bit_generator.state == after["rng"]


def test_a_killed_run_goes_on_from_its_checkpoint_without_doubled_evaluations(tmp_path):
    """As after SIGKILL: evaluations from after the last checkpoint are on disk, and must not come twice."""
    _, folder = run(tmp_path, stop=StopAfter(2), eval_freq=128)
    with (folder / "progress.csv").open("a") as file:
        file.write("384,1.0,0.0,1.0,1\n")
    (folder / "checkpoint.pt.tmp").write_bytes(b"half a checkpoint")
    resume(folder)
    rows = progress(folder)
    assert [row["step"] for row in rows] == [128, 256, 384, 512]
    assert rows[2]["return_mean"] != 1.0


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path):
    _, whole = run(tmp_path / "whole", eval_freq=128)
    _, folder = run(tmp_path / "killed", stop=StopAfter(2), eval_freq=128)
    (folder / "checkpoint.pt").unlink()
    resume(folder)
    assert (folder / "progress.csv").read_bytes() == (whole / "progress.csv").read_bytes()
    assert torch.equal(weights(folder), weights(whole))


def test_a_resumed_run_is_checked_like_a_new_one(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    _, folder = run(tmp_path, stop=StopAfter(1))
    saved = json.loads((folder / "args.json").read_text())
    saved["args"]["device"] = "cuda"
    (folder / "args.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="no GPU"):
        resume(folder)


def test_checkpoints_come_as_often_as_asked(tmp_path, monkeypatch):
    saved, save = [], script.save

    def recording_save(path, content):
        if path.name == "checkpoint.pt":
            saved.append(content["progress"][0])
        save(path, content)

    monkeypatch.setattr(script, "save", recording_save)
    run(tmp_path, checkpoint_freq=300, total_timesteps=1024)
    assert saved == [384, 640, 1024]


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    script.save(path, {"step": 1})

    def failing_save(content, target):
        Path(target).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", failing_save)
    with pytest.raises(OSError, match="disk full"):
        script.save(path, {"step": 2})
    assert torch.load(path) == {"step": 1}


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_with_a_checkpoint_and_says_how_to_go_on(tmp_path, signum):
    command = [sys.executable, SCRIPT, "--env-id", "InvertedPendulum-v4", "--total-timesteps", "200000",
               "--no-compile", "--eval-freq", "0", "--eval-episodes", "1", "--run-name", "r"]  # fmt: skip
    process = subprocess.Popen([*command, "--runs-dir", tmp_path], stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 60
    while not list(tmp_path.glob("r/events*")) and time.time() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signum)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"--resume {tmp_path / 'r'}" in stderr
    assert "Traceback" not in stderr
    assert checkpoint(tmp_path / "r")["progress"][0] > 0


@pytest.mark.parametrize("episodes", [1, 2])
def test_a_video_of_the_first_episode_of_each_evaluation(tmp_path, episodes):
    flags = {"env_id": "LunarLanderContinuous-v3", "total_timesteps": 256, "eval_freq": 128}
    _, folder = run(tmp_path, capture_video=True, eval_episodes=episodes, **flags)
    names = sorted(path.name for path in folder.glob("video/*.mp4"))
    assert [name.split("-episode")[0] for name in names] == ["step-128", "step-256"]


def test_tracking_tells_weights_and_biases_the_arguments(tmp_path, monkeypatch):
    calls = []
    wandb = types.ModuleType("wandb")
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    wandb.init = lambda **arguments: calls.append(arguments)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run(tmp_path, track=True, total_timesteps=128)
    assert calls[0]["config"]["env_id"] == SMALL["env_id"]
    assert calls[0]["id"] == calls[0]["name"] == "run"
    assert calls[0]["sync_tensorboard"]


# ---- Bad input


BAD_INPUT = {
    "--env-id Hoper-v4": "Hopper",
    "--env-id CartPole-v1": "Discrete(2)",
    "--env-id nowhere:Nothing-v0": "nowhere",
    "--policy gaussian --beta 1": "--policy categorical",
    "--noise flip --noise-level 1.5": "in [0, 1]",
    "--noise flip --noise-level nan": "in [0, 1]",
    "--noise-level 0.1": "--noise",
    "--alpha -1": "--alpha",
    "--beta inf": "--beta",
    "--z 1": "negative",
    "--bins 1": "at least 2",
    "--hidden-sizes 64 0": "at least 1",
    "--seed 99999999999999999999": "--seed",
    "--num-minibatches 33": "must divide 2048",
    "--num-steps 32": "parts > 1",
    "--total-timesteps 0": "at least 1",
    "--learning-rate 0": "positive",
    "--device cuda": "use cpu",
    "--runs-dir /dev/null": "/dev/null",
    "--resume nowhere": "interrupted",
    "--resume nowhere --seed 2": "leave out",
}


@pytest.mark.parametrize("flags", BAD_INPUT)
def test_bad_input_is_one_line_and_exit_code_2(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["sppo_continuous.py", *flags.split()])
    with pytest.raises(SystemExit) as exit_:
        script.main()
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert BAD_INPUT[flags] in err
    assert out == ""
    assert not list(tmp_path.iterdir())  # no work was begun


def test_a_finished_run_or_a_taken_name_is_not_written_over(tmp_path):
    _, folder = run(tmp_path)
    before = (folder / "summary.json").read_bytes()
    with pytest.raises(ValueError, match="File exists"):
        run(tmp_path)
    with pytest.raises(ValueError, match="not the folder of a run that was interrupted"):
        resume(folder)
    assert (folder / "summary.json").read_bytes() == before


def test_from_the_shell_errors_have_no_traceback(tmp_path):
    for flags, what in (
        ("--env-id Nothing-v0", "error:"),
        ("--policy square", "square"),
        ("--sed 1", "--sed"),
    ):
        command = [sys.executable, SCRIPT, *flags.split()]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"COLUMNS": "100"}
        )
        assert done.returncode == 2
        assert what in done.stderr
        assert "Traceback" not in done.stderr


def test_where_compiling_fails_it_says_so_and_runs(tmp_path, monkeypatch, capsys):
    def failing_compile(function):
        def call(*arguments):
            raise RuntimeError("no C++ compiler")

        return call

    monkeypatch.setattr(torch, "compile", failing_compile)
    summary, _ = run(tmp_path, compile=True)
    assert summary["finished"]
    assert summary["compile"] is False
    assert "at about half the speed: RuntimeError('no C++ compiler')" in capsys.readouterr().err
