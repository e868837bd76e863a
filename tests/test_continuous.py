"""What is particular to continuous control: policies, normalisation, evaluations.

Text that both scripts share, which `test_repository.py` guards, is tested on `sppo_continuous.py`
alone."""

import itertools
from decimal import Decimal
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import SPPO_CONTINUOUS
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
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


def test_exploration_of_bins_makes_samples():
    """Which the arg max of logits plus Gumbel numbers is. Log-probabilities, entropy, and where
    these numbers are added: see test_control.py."""
    numbers = make_agent().exploration((2000,), torch.Generator().manual_seed(0))
    assert numbers.shape == (2000, 3, 11)
    assert stats.kstest(numbers.flatten(), stats.gumbel_r.cdf).pvalue > 1e-3


@torch.no_grad()
def test_a_gaussian_policy_has_the_joint_density():
    agent = make_agent("gaussian", log_std_init=-0.7)
    obs = torch.randn(1, 11)
    output = agent.actor(obs)
    reference = stats.multivariate_normal(output[0], np.exp(-0.7) ** 2 * np.eye(3))
    policy = agent.policy(output)
    actions = output + torch.randn(64, 3)
    for log_prob in (policy.log_prob(actions), agent.acting_log_prob(actions, output)):
        assert_allclose(log_prob, reference.logpdf(actions), rtol=1e-4)
    assert policy.entropy().item() == pytest.approx(reference.entropy())
    greedy, _ = agent.actor_fn()(obs.numpy())
    assert_allclose(greedy, output, rtol=1e-5)


def test_bins_are_spread_between_the_environments_bounds():
    """Humanoid's are -0.4 and 0.4, in 17 dimensions."""
    agent = make_agent(env_id="Humanoid-v4", bins=5)
    index = np.arange(17) % 5
    expected = np.array([-0.4, -0.2, 0.0, 0.2, 0.4])[index]
    assert_allclose(agent.to_env(index[None]), expected[None], atol=1e-7)


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
    agent = make_agent()
    agent.actor = actor
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.normal_(std=0.5)
    exploration = agent.exploration((50,), torch.Generator().manual_seed(0))
    obs = torch.randn(50, 11)
    action, output = agent.actor_fn()(obs.numpy(), exploration)
    with torch.no_grad():
        expected = agent.actor(obs).view(50, 3, 11).numpy()
    assert_allclose(output, expected, rtol=1e-4, atol=1e-4)
    assert_array_equal(action, (output + exploration).argmax(-1))


@pytest.mark.parametrize("ortho_init", [True, False])
def test_networks_are_as_the_flags_say(ortho_init):
    args = script.Args(hidden_sizes=(32, 16), activation="relu", ortho_init=ortho_init)
    agent = script.Agent(script.make_env(args), args)
    for network, last_gain in ((agent.actor, 0.01), (agent.critic, 1.0)):
        first, relu, second, _, last = network
        assert type(relu) is nn.ReLU
        assert first.out_features == 32
        assert second.out_features == 16
        for layer, gain in {first: 2**0.5, second: 2**0.5, last: last_gain}.items():
            stretch = torch.linalg.svdvals(layer.weight.detach())
            is_orthogonal = torch.allclose(stretch, torch.tensor(gain), atol=1e-5)
            assert is_orthogonal == ortho_init
            assert layer.bias.any() != ortho_init


# ---- Normalisation


def test_steps_are_normalised_as_by_stable_baselines3(monkeypatch):
    """Three pendulums that fall within 4 to 10 steps. But the last observation of a truncated
    episode is normalised by what was seen before it."""
    env = {"id": "InvertedDoublePendulum-v4", "max_episode_steps": 8}
    monkeypatch.setattr(script, "make_env", lambda *_: gym.make(**env))
    envs = script.NormalizedEnvs(script.Args(num_envs=3, gamma=0.9))
    plain = DummyVecEnv(3 * [lambda: Monitor(gym.make(**env))])
    plain._seeds = np.random.default_rng(5).integers(2**31, size=3).tolist()
    theirs = VecNormalize(plain, gamma=0.9)
    theirs.obs_rms = RunningMeanStd(1e-12, (11,))  # without a first guess
    theirs.ret_rms = RunningMeanStd(1e-12)
    assert_allclose(envs.reset(seed=5), theirs.reset(), rtol=1e-4, atol=1e-4)
    episodes = []
    cuts = 0
    for action in np.random.default_rng(0).uniform(-1, 1, (300, 3, 1)):
        mean = envs.obs_stats.mean.copy()
        std = envs.obs_stats.std
        obs, reward, ended, cut_off, final_obs = envs.step(action)
        their_obs, their_reward, their_ended, infos = theirs.step(action)
        assert_allclose(obs, their_obs, rtol=1e-4, atol=1e-4)
        assert_allclose(reward, their_reward, rtol=1e-4)  # the first are clipped
        assert_array_equal(ended, their_ended)
        for i, info in enumerate(infos):
            assert cut_off[i] == info["TimeLimit.truncated"]
            if cut_off[i]:
                cuts += 1
                last_obs = theirs.unnormalize_obs(info["terminal_observation"])
                expected = (last_obs - mean) / std
                assert_allclose(final_obs[i], expected, rtol=1e-3, atol=1e-3)
            if ended[i]:
                episodes.append((info["episode"]["r"], info["episode"]["l"]))
    assert len(episodes) > 110
    assert_allclose(envs.recent_episodes, episodes[-100:], atol=1e-5)
    assert cuts > 3
    assert set(envs.obs_stats.normalize(np.full(11, 1e9))) == {10}
    copy = script.RunningStats()
    copy.load_state_dict(envs.obs_stats.state_dict())
    assert_array_equal(copy.mean, envs.obs_stats.mean)
    copy.update(np.ones((1, 11)))  # and leaves the original alone
    assert (copy.mean != envs.obs_stats.mean).all()


# ---- Evaluation


@pytest.mark.parametrize(
    ("freq", "limit", "length"), [(0, 10, 100_000), (300, None, 300), (300, 500, 500)]
)
def test_an_episode_that_does_not_end_is_cut_off_in_an_evaluation(freq, limit, length, capsys):
    """Where a checkpoint would end it in training, which is said. A time limit inside of a wrapper
    that joins episodes is no end. Observations may be lists."""
    agent = make_agent(hidden_sizes=())
    obs = [0.0] * 11
    env = gym.Env()
    env.spec = SimpleNamespace(max_episode_steps=limit) if limit else None
    env.reset = lambda seed: (obs, {})
    env.step = lambda _: (obs, 0.5, False, False, {})
    args = script.Args(eval_episodes=1, checkpoint_freq=freq)
    scores, lengths, _ = script.evaluate(agent, args, script.RunningStats(), 0, env)
    assert scores == length / 2
    assert lengths == length
    said = f"warning: evaluation cut after {length:,} steps; see --checkpoint-freq\n"
    assert capsys.readouterr().out == said


@pytest.mark.parametrize(
    "one",
    [np.float16(1), torch.tensor([1.0]).bfloat16(), Decimal(1), np.ones((), np.float32), 1],
    ids=str,
)
def test_an_evaluation_adds_rewards_and_reads_observations_in_float64(one):
    """As training does, whatever their type. In bfloat16, 256 + 1 is 256."""
    agent = make_agent(hidden_sizes=())
    env = gym.Env()
    obs = np.full(11, one).reshape(11).tolist() if isinstance(one, Decimal) else [float(one)] * 11
    env.reset = lambda seed: (obs, {})
    steps = itertools.count(1)
    env.step = lambda _: (obs, one, next(steps) == 3000, False, {})
    args = script.Args(eval_episodes=1)
    scores, lengths, _ = script.evaluate(agent, args, script.RunningStats(), 0, env)
    assert scores == lengths == 3000


# ---- Rollouts


@torch.no_grad()
def test_gaussian_actions_train_as_they_were_sampled_and_reach_environments_clipped():
    agent = make_agent("gaussian", log_std_init=1.0)
    obs = np.ones((2, 11), np.float32)
    no = np.zeros(2, bool)
    played = []

    def step(action):
        played.extend(action)
        return obs, np.zeros(2), no, no, obs

    args = script.Args(policy="gaussian", num_envs=2, num_steps=64)
    batch, _ = SPPO_CONTINUOUS.collect(agent, args, SimpleNamespace(step=step), obs)
    standard = (batch.action - agent.actor(batch.obs)) / np.e
    assert stats.kstest(standard.flatten(), stats.norm.cdf).pvalue > 1e-3
    assert len(standard.unique()) > 380
    assert_array_equal(played, batch.action.clip(-1, 1))
