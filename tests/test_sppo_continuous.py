"""Everything in `sppo_continuous.py` but the loss, which has `test_loss.py`."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

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


def test_categorical_log_prob_and_entropy_are_those_of_torch():
    agent, env = make_agent()
    logits, action = torch.randn(64, 6, 11), torch.randint(11, (64, 6))
    reference = torch.distributions.Independent(torch.distributions.Categorical(logits=logits), 1)
    torch.testing.assert_close(agent.log_prob(logits, action), reference.log_prob(action))
    torch.testing.assert_close(agent.entropy(logits), reference.entropy())


def test_gaussian_log_prob_and_entropy_are_those_of_torch():
    agent, env = make_agent("gaussian", log_std_init=-0.7)
    mean, action = torch.randn(64, 6), torch.randn(64, 6)
    reference = torch.distributions.Independent(torch.distributions.Normal(mean, agent.log_std.exp()), 1)
    torch.testing.assert_close(agent.log_prob(mean, action), reference.log_prob(action))
    torch.testing.assert_close(agent.entropy(mean), reference.entropy())


def test_categorical_samples_follow_the_softmax():
    agent, env = make_agent()
    torch.nn.init.normal_(agent.actor[-1].weight)
    obs = torch.randn(1, 17).expand(20_000, 17)
    with torch.no_grad():
        p = agent.policy(obs[:1]).softmax(-1)[0]
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


def test_noise_enters_training_and_nothing_else(tmp_path, monkeypatch, recorded_actions):
    """The reward noise sees the normalised, clipped reward before the bootstrap of truncated episodes."""
    seen = []

    def shift(reward, noise, level, rng):
        seen.append(reward.copy())
        return reward + level

    clean, clean_run = run(tmp_path / "clean")
    monkeypatch.setattr(script, "perturb_reward", shift)
    noisy, noisy_run = run(tmp_path / "noisy", noise="normal", noise_level=1.0)
    assert abs(np.concatenate(seen)).max() <= 10
    steps = len(recorded_actions) // 2
    first_rollout = slice(0, SMALL["num_steps"])
    assert np.array_equal(recorded_actions[:steps][first_rollout], recorded_actions[steps:][first_rollout])
    assert not torch.equal(weights(clean_run), weights(noisy_run))
    assert clean["train_return_last100"] > 0  # raw rewards, as nothing normalised would be


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
            logits = agent.policy(torch.tensor(z.clip(-10, 10), dtype=torch.float32))
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


def test_values_of_the_rollout_are_those_of_the_first_minibatch(tmp_path, monkeypatch):
    """The ratio starts at 1: log-probabilities of the rollout and of the first minibatch agree."""
    kls = []
    gradient_and_metrics = script.gradient_and_metrics

    def recording(*arguments):
        gradient, metrics = gradient_and_metrics(*arguments)
        kls.append((metrics["approx_kl"].item(), metrics["clip_fraction"].item(), metrics["policy"].item()))
        return gradient, metrics

    monkeypatch.setattr(script, "gradient_and_metrics", recording)
    run(tmp_path, total_timesteps=128)
    kl, clip_fraction, policy_loss = kls[0]
    assert abs(kl) < 1e-6
    assert clip_fraction == 0
    assert abs(policy_loss) < 1e-5  # minus the mean of normalised advantages
    assert kls[-1][0] > 1e-6


COMPILERS = [c for c in ("c++", "g++", "clang++") if shutil.which(c)]


@pytest.mark.skipif(not COMPILERS, reason="--compile needs a C++ compiler")
@pytest.mark.parametrize("policy", ["categorical", "gaussian"])
def test_compiled_gradient_is_the_gradient(policy):
    torch._dynamo.config.trace_autograd_ops = True
    args = script.Args(policy=policy, alpha=0.5, beta=0.0 if policy == "gaussian" else 20.0, ent_coef=0.01)
    agent, _ = make_agent(policy)
    obs, advantage, returns = torch.randn(64, 17), torch.randn(64), torch.randn(64)
    with torch.no_grad():
        action = agent.act(obs, torch.Generator().manual_seed(0))
        old_log_prob = agent.log_prob(agent.policy(obs), action) + 0.2 * torch.randn(64)
    minibatch = (obs, action, old_log_prob, advantage, returns)
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

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

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


def test_a_video_of_the_first_episode_of_each_evaluation(tmp_path):
    flags = dict(env_id="LunarLanderContinuous-v3", total_timesteps=256, eval_freq=128, eval_episodes=2)
    _, folder = run(tmp_path, capture_video=True, **flags)
    assert sorted(path.name for path in folder.glob("*.mp4")) == [f"rl-video-episode-{i}.mp4" for i in (0, 2)]


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


def test_without_a_compiler_it_says_so_and_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    summary, _ = run(tmp_path, compile=True)
    assert summary["compile"] is False
    assert "--no-compile" in capsys.readouterr().err
