"""What is particular to continuous control: policies, normalisation, evaluations.

Text that both scripts share, which `test_repository.py` guards, is tested on `sppo_continuous.py`
alone."""

import itertools
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import CONTINUOUS, checkpoint, only, record
from scipy import stats
from torch import nn
from torch.nn.utils import prune

import sppo_continuous as script

# ---- Policies


def make_agent(policy="categorical", env_id="Hopper-v4", **flags):
    """An agent, for Hopper with observations (11,) and actions (3,), whose outputs vary."""
    torch.manual_seed(0)
    args = script.Args(env_id=env_id, policy=policy, **flags)
    agent = script.Agent(script.make_env(args), args)
    torch.nn.init.normal_(agent.actor[-1].weight, std=0.3)
    return agent


def sample_actions(agent, obs):
    """20,000 sampled actions, and the greedy one, for an observation (1, 11)."""
    act = agent.actor_fn()
    exploration = agent.exploration((20_000,), torch.Generator().manual_seed(0))
    return act(obs.expand(20_000, 11).numpy(), exploration)[0], act(obs.numpy())[0][0]


def test_a_categorical_policy_has_the_distribution_of_joint_actions_and_samples_it():
    agent = make_agent(bins=5)
    torch.nn.init.normal_(agent.actor[-1].weight)
    obs = torch.randn(1, 11)
    output = agent.actor(obs)
    p = output.view(3, 5).softmax(-1)
    joint = torch.tensor(list(itertools.product(range(5), repeat=3)))
    expected = p[0, joint[:, 0]] * p[1, joint[:, 1]] * p[2, joint[:, 2]]
    policy = agent.policy(output)
    acting_log_prob = agent.acting_log_prob(joint, output.view(1, 3, 5).expand(125, 3, 5))
    torch.testing.assert_close(policy.log_prob(joint), expected.log())
    torch.testing.assert_close(acting_log_prob, expected.log())
    torch.testing.assert_close(policy.entropy()[0], -(expected * expected.log()).sum())

    actions, greedy = sample_actions(agent, obs)
    frequency = nn.functional.one_hot(torch.from_numpy(actions), 5).float().mean(0)
    assert p.max() > 0.6  # far from uniform, or the test would say little
    assert (frequency - p).abs().max() < 5 * (0.25 / 20_000) ** 0.5
    np.testing.assert_array_equal(greedy, p.argmax(-1))


def test_a_gaussian_policy_has_the_joint_density_and_samples_it():
    agent = make_agent("gaussian", log_std_init=-0.7)
    obs = torch.randn(1, 11)
    output = agent.actor(obs)
    mean = output[0].detach().numpy()
    reference = stats.multivariate_normal(mean, np.exp(-0.7) ** 2 * np.eye(3))
    policy = agent.policy(output)
    actions, greedy = sample_actions(agent, obs)
    some = torch.from_numpy(actions[:64])
    for log_prob in (policy.log_prob(some), agent.acting_log_prob(some, output)):
        np.testing.assert_allclose(log_prob.detach(), reference.logpdf(some), rtol=1e-4)
    assert policy.entropy().item() == pytest.approx(reference.entropy())

    standard = (actions - mean) / np.exp(-0.7)
    assert (stats.kstest(standard, stats.norm.cdf, axis=0).pvalue > 1e-3).all()
    correlation = np.corrcoef(actions.T) - np.eye(3)
    assert abs(correlation).max() < 5 / 20_000**0.5
    np.testing.assert_allclose(greedy, mean, rtol=1e-5)


def test_bins_are_spread_between_the_environments_bounds():
    """Humanoid's are -0.4 and 0.4, in 17 dimensions."""
    agent = make_agent(env_id="Humanoid-v4", bins=5)
    index = np.arange(17) % 5
    expected = np.array([-0.4, -0.2, 0.0, 0.2, 0.4])[index]
    np.testing.assert_allclose(agent.to_env(index[None]), expected[None], atol=1e-7)


class Doubled(nn.Sequential):
    """A module that does more than call its layers one after the other."""

    def forward(self, x):
        return 2 * super().forward(x)


ACTORS = [
    Doubled(nn.Linear(11, 33)),
    nn.Sequential(
        nn.Sequential(nn.Linear(11, 64), nn.LayerNorm(64), nn.Tanh()),
        prune.identity(nn.Linear(64, 64), "weight"),
        nn.Linear(64, 33, bias=False),
        nn.ReLU(),
    ),
]


@pytest.mark.parametrize("actor", ACTORS)
def test_any_network_acts_in_numpy_as_in_pytorch(actor):
    """Also after an optimiser has changed the weights in place, and without a gradient."""
    agent = make_agent()
    agent.actor = actor
    for _ in range(2):
        with torch.no_grad():
            for parameter in agent.parameters():
                parameter.normal_(std=0.5)
        exploration = agent.exploration((50,), torch.Generator().manual_seed(0))
        obs = torch.randn(50, 11)
        action, output = agent.actor_fn()(obs.numpy(), exploration)
        with torch.no_grad():
            expected = agent.actor(obs).view(50, 3, 11).numpy()
        np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(action, (output + exploration).argmax(-1))


@pytest.mark.parametrize("ortho_init", [True, False])
def test_networks_are_as_the_flags_say(ortho_init):
    args = script.Args(hidden_sizes=(32, 16), activation="relu", ortho_init=ortho_init)
    agent = script.Agent(script.make_env(args), args)
    for network, out_gain in ((agent.actor, 0.01), (agent.critic, 1.0)):
        kinds = [type(layer).__name__ for layer in network]
        assert kinds == ["Linear", "ReLU"] * 2 + ["Linear"]
        assert [layer.out_features for layer in network[:4:2]] == [32, 16]
        for layer, gain in zip(network[::2], (2**0.5, 2**0.5, out_gain), strict=True):
            w = layer.weight.detach()
            w = w if w.shape[0] <= w.shape[1] else w.T
            error = (w @ w.T - gain**2 * torch.eye(len(w))).abs().max()
            assert (error < 1e-5 and not layer.bias.any()) == ortho_init


# ---- Normalisation


def test_steps_are_normalised_by_all_that_was_seen_before(monkeypatch):
    """By three pendulums that fall within 4 to 10 steps; a truncated one's last does not count."""
    with_episodes = gym.wrappers.RecordEpisodeStatistics
    steps = record(monkeypatch, with_episodes, "step")
    resets = record(monkeypatch, with_episodes, "reset")

    def normalized(obs):
        z = (obs - np.mean(seen, axis=0)) / np.sqrt(np.var(seen, axis=0) + 1e-8)
        return np.clip(z, -10, 10)

    env = {"id": "InvertedDoublePendulum-v4", "max_episode_steps": 8}
    monkeypatch.setattr(script, "make_env", lambda *_: with_episodes(gym.make(**env)))
    envs = script.NormalizedEnvs(script.Args(num_envs=3, gamma=0.9))
    first_obs = envs.reset(seed=5)
    seen = [obs for _, (obs, _) in resets]
    assert len(np.unique(seen, axis=0)) == 3
    np.testing.assert_allclose(first_obs, normalized(seen), rtol=1e-4, atol=1e-4)
    discounted = np.zeros(3)
    all_discounted = []
    episodes = []
    clipped = 0
    cuts = 0
    for action in np.random.default_rng(0).uniform(-1, 1, (300, 3, 1)):
        resets.clear()
        obs, reward, ended, cut_off, final_obs = envs.step(action)
        results = [result for _, result in steps[-3:]]
        last_obs, raw_reward, terminated, truncated, infos = zip(*results)
        first_of_next = [obs for _, (obs, _) in resets]
        np.testing.assert_array_equal(ended, np.logical_or(terminated, truncated))
        np.testing.assert_array_equal(cut_off, ended & ~np.array(terminated))
        discounted = 0.9 * discounted + raw_reward
        all_discounted.extend(discounted)
        latest_obs = list(last_obs)
        for i in range(3):
            if cut_off[i]:
                expected = normalized(last_obs[i])
                np.testing.assert_allclose(final_obs[i], expected, rtol=1e-4, atol=1e-4)
                cuts += 1
            if ended[i]:
                latest_obs[i] = first_of_next.pop(0)
                discounted[i] = 0
                episodes.append((infos[i]["episode"]["r"], infos[i]["episode"]["l"]))
        seen.extend(latest_obs)
        np.testing.assert_allclose(obs, normalized(latest_obs), rtol=1e-4, atol=1e-4)
        expected = raw_reward / np.sqrt(np.var(all_discounted) + 1e-8)
        np.testing.assert_allclose(reward, np.clip(expected, -10, 10))
        clipped += (expected > 10).sum()
    assert len(episodes) > 110
    np.testing.assert_allclose(envs.recent_episodes, episodes[-100:])
    assert set(envs.obs_stats.normalize(np.full(11, 1e9))) == {10}
    assert cuts > 3
    assert clipped > 0  # the first rewards: there is no spread yet


# ---- Evaluation


@only(*CONTINUOUS)
def test_an_evaluation_is_greedy_with_the_statistics_of_the_training_and_clean(setting, tmp_path):
    """Noise of this level would change its score by hundreds. Its environment's seed is that of
    the run plus the step."""
    flags = {"noise": "normal", "noise_level": 1.0, "eval_episodes": 2}
    summary, folder = setting.run(tmp_path, **flags)
    env = gym.wrappers.RecordEpisodeStatistics(gym.make(setting.small["env_id"]))
    saved = checkpoint(folder)
    obs_mean, obs_std = (saved["obs_stats"][name].numpy() for name in ("mean", "std"))
    agent = make_agent(env_id=setting.small["env_id"])
    agent.load_state_dict(saved["agent"])
    for episode in range(2):
        obs, _ = env.reset(seed=1 + 256 if episode == 0 else None)
        ended = False
        while not ended:
            z = ((obs - obs_mean) / obs_std).clip(-10, 10)
            logits = agent.actor(torch.tensor(z, dtype=torch.float32))
            action = np.linspace(-1, 1, 11)[logits.argmax(), None]
            obs, _, terminated, truncated, _ = env.step(action)
            ended = terminated or truncated
    assert summary["return_mean"] == pytest.approx(np.mean(env.return_queue), rel=1e-6)
    assert summary["return_std"] == pytest.approx(np.std(env.return_queue), rel=1e-6)
    assert saved["obs_stats"]["count"] == 256 + 1  # with the first observation


@pytest.mark.parametrize(
    ("freq", "limit", "end", "length"),
    [(0, 10, None, 100_000), (0, 100_500, 100_500, 100_500)]
    + [(300, None, None, 300), (300, 500, 500, 500)],
)
def test_an_episode_that_does_not_end_is_cut_off_in_an_evaluation(freq, limit, end, length, capsys):
    """Where a checkpoint would end it in training, which is said. A time limit inside of a wrapper
    that joins episodes is no end. Observations may be lists."""
    obs, time = [0.0] * 11, itertools.count(1)
    env = SimpleNamespace(reset=lambda seed: (obs, {}), close=lambda: None)
    env.step = lambda _: (obs, 0.5, False, next(time) == end, {})
    env.spec = SimpleNamespace(max_episode_steps=limit) if limit else None
    agent = make_agent(hidden_sizes=())
    args = script.Args(eval_episodes=1, checkpoint_freq=freq)
    scores, lengths, _ = script.evaluate(agent, args, script.RunningStats(), 0, env)
    assert (scores.tolist(), lengths.tolist()) == ([length / 2], [length])
    said = f"warning: evaluation cut after {length:,} steps; see --checkpoint-freq\n"
    assert capsys.readouterr().out == ("" if end else said)


# ---- Rollouts


def test_gaussian_actions_train_as_they_were_sampled_and_reach_environments_clipped():
    agent, steps = make_agent("gaussian", log_std_init=1.0), []
    obs, no = torch.randn(2, 11).numpy(), np.zeros(2, bool)
    envs = SimpleNamespace(step=lambda x: steps.append(x) or (obs, np.zeros(2), no, no, obs))
    args = script.Args(policy="gaussian", num_envs=2, num_steps=64)
    draws = [torch.Generator().manual_seed(0) for _ in range(2)]
    batch, _ = script.collect(agent, args, envs, obs, None, draws[0])
    exploration = torch.from_numpy(agent.exploration((64, 2), draws[1])).flatten(0, 1)
    assert len(exploration.unique()) == 384
    torch.testing.assert_close(batch.action, agent.actor(batch.obs).detach() + exploration)
    played = np.concatenate(steps)
    np.testing.assert_array_equal(played, batch.action.clip(-1, 1))
    assert 0.1 < (np.abs(played) < 1).mean() < 0.9
