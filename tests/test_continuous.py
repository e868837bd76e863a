"""What is particular to continuous control: environments, policies, gradients, what `train` does
with them.

The scripts share most of their text, as `test_repository.py` guards: that is tested on
`sppo_continuous.py`. What each has for itself, `train` above all, is tested on both."""

import itertools
import json
import shutil
import threading

import gymnasium as gym
import mujoco
import numpy as np
import pytest
import torch
from helpers import (
    SA2C_CONTINUOUS,
    SPPO_CONTINUOUS,
    StopAfter,
    act,
    checkpoint,
    progress,
    weights,
)

import sa2c_continuous
import sppo_continuous as script

SMALL = SPPO_CONTINUOUS.small


@pytest.fixture(params=[SPPO_CONTINUOUS, SA2C_CONTINUOUS], ids=str)
def setting(request):
    return request.param


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
    standardized = (action - act(agent, obs)) / np.exp(-0.7)
    expected = -0.5 * (standardized**2 + np.log(2 * np.pi)).sum(-1) + 6 * 0.7
    torch.testing.assert_close(agent.policy(obs).log_prob(action), expected)
    expected = torch.full((64,), 6 * (0.5 * np.log(2 * np.pi * np.e) - 0.7), dtype=torch.float32)
    torch.testing.assert_close(agent.policy(obs).entropy(), expected)


def test_categorical_samples_follow_the_softmax():
    agent, _ = make_agent()
    torch.nn.init.normal_(agent.actor[-1].weight)
    obs = torch.randn(1, 17).expand(20_000, 17)
    with torch.no_grad():
        p = agent.output(obs[:1]).softmax(-1)[0]
        action = act(agent, obs, torch.Generator().manual_seed(0))
        frequency = torch.nn.functional.one_hot(action, 11).float().mean(0)
        assert (act(agent, obs) == p.argmax(-1)).all()  # without a generator: greedy
    assert p.max() > 0.3  # far from uniform, or the test would say little
    assert (frequency - p).abs().max() < 5 * (0.25 / 20_000) ** 0.5


def test_gaussian_samples_have_the_mean_and_spread():
    agent, env = make_agent("gaussian", log_std_init=-1.0)
    obs = torch.randn(1, 17).expand(20_000, 17)
    with torch.no_grad():
        mean = act(agent, obs[:1])[0]
        action = act(agent, obs, torch.Generator().manual_seed(0))
    torch.testing.assert_close(action.mean(0), mean, rtol=0, atol=0.02)
    torch.testing.assert_close(action.std(0), agent.log_std.exp().detach(), rtol=0.03, atol=0)


def test_actions_reach_the_environment_within_its_bounds():
    # bounds of 0.4, so that a missing scale would show
    agent, _ = make_agent(env_id="Humanoid-v4")
    indices = np.stack([np.zeros(17, int), np.full(17, 5), np.full(17, 10)])
    np.testing.assert_allclose(
        agent.to_env(indices), [[-0.4] * 17, [0.0] * 17, [0.4] * 17], atol=1e-7
    )
    agent, _ = make_agent("gaussian", env_id="Humanoid-v4")
    np.testing.assert_allclose(
        agent.to_env(np.array([[-3.0, 0.1, 3.0] + [0.0] * 14]))[0, :3], [-0.4, 0.1, 0.4]
    )


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("hidden_sizes", [(), (8,), (32, 16), (64, 64, 7)])
def test_the_numpy_network_is_the_torch_network(hidden_sizes, activation, layer_norm):
    torch.manual_seed(0)
    flags = dict(hidden_sizes=hidden_sizes, activation=activation, layer_norm=layer_norm)
    network = script.mlp(17, 6, 1.0, script.Args(**flags))
    for parameter in network.parameters():  # biases and layer norms of their own
        torch.nn.init.normal_(parameter, std=0.5)
    forward = script.numpy_mlp(network)
    for obs in (torch.randn(1, 17), torch.randn(50, 17)):
        expected = network(obs).detach().numpy()
        output = forward(obs.numpy())
        assert output.dtype == np.float32
        assert abs(output).max() > 0.5
        np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("policy", ["categorical", "gaussian"])
def test_the_numpy_actor_has_the_present_weights(policy):
    """Also after the optimiser has changed them in place, as it does in `train`."""
    agent, _ = make_agent(policy)
    parameters = script.flatten_parameters(agent)
    for seed in range(2):
        parameters.normal_(generator=torch.Generator().manual_seed(seed))
        obs = torch.randn(30, 17)
        with torch.no_grad():
            output = agent.output(obs)
        expected = output if policy == "gaussian" else output.argmax(-1)
        torch.testing.assert_close(act(agent, obs), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("policy", ["categorical", "gaussian"])
def test_noise_of_a_rollout_is_drawn_anew_for_each_step(policy):
    agent, _ = make_agent(policy)
    noise = agent.sampling_noise((40, 3), torch.Generator().manual_seed(0))
    per_sample = (6,) if policy == "gaussian" else (6, 11)
    assert noise.shape == (40, 3, *per_sample)
    assert len(np.unique(noise)) == noise.size
    again = agent.sampling_noise((40, 3), torch.Generator().manual_seed(0))
    assert np.array_equal(noise, again)


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
    advantage, returns = script.compute_gae(
        reward, value, final_value, terminated, truncated, gamma, lam
    )
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
    for terminated, truncated, bootstrap in (
        (at_the_end, no, 0.0),
        (no, at_the_end, 8.0),
        (no, no, 10.0),
    ):
        _, returns = script.compute_gae(reward, value, final_value, terminated, truncated, 0.5, 1.0)
        assert returns[0, 0] == pytest.approx(1 + 0.5 * 2 + 0.25 * 4 + 0.125 * bootstrap)


# ---- Noise


def test_flip_has_its_rate_and_three_outcomes():
    reward = np.tile([-1.0, 0.0, 1.0], (60_000, 1))
    noisy = script.perturb_reward(reward, "flip", 0.1, np.random.default_rng(0))
    for column, flipped in enumerate([2.0, 1.0, 0.0]):
        assert set(noisy[:, column]) == {reward[0, column], flipped}
        assert (noisy[:, column] == flipped).mean() == pytest.approx(0.1, abs=0.005)
    assert (
        script.perturb_reward(reward, "flip", 1.0, np.random.default_rng(0)) == 1 - reward
    ).all()


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
def gae_calls(monkeypatch, setting):
    """Episodes of at most 6 steps, and what `train` gives to `compute_gae`, with what it should
    have given.

    A list of dicts, one a rollout: the arguments, `noisy` (what `perturb_reward` returned), and
    `expected`, the critic's values of the last observations of truncated episodes, by (step,
    environment)."""
    script = setting.script
    calls = []
    agents = []
    ends = []
    noisy = []
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
            {
                "reward": reward,
                "final_value": final_value.copy(),
                "expected": values,
                "clean": clean,
            }
        )
        calls[-1] |= {"noisy": perturbed, "cut": truncated & ~terminated}
        return original["compute_gae"](reward, value, final_value, terminated, truncated, *rest)

    monkeypatch.setattr(
        script, "make_env", lambda env_id, mode=None: gym.make(env_id, max_episode_steps=6)
    )
    for name, replacement in {"Agent": make_agent, "perturb_reward": perturb_reward}.items():
        monkeypatch.setattr(script, name, replacement)
    monkeypatch.setattr(script, "NormalizedEnvs", Envs)
    monkeypatch.setattr(script, "compute_gae", compute_gae)
    return calls


def test_truncated_episodes_bootstrap_from_their_last_observation(setting, tmp_path, gae_calls):
    setting.run(tmp_path, env_id="InvertedPendulum-v4", num_envs=2)
    assert sum(len(call["expected"]) for call in gae_calls) > 10
    for call in gae_calls:
        assert set(zip(*np.nonzero(call["cut"]))) == set(call["expected"])
        for index, value in call["expected"].items():
            assert call["final_value"][index] == pytest.approx(value, abs=1e-5)


def test_noise_comes_after_normalisation_and_before_the_bootstrap(setting, tmp_path, gae_calls):
    """And the score of the training is that of raw rewards: this pendulum pays 1 a step, at most 6
    steps."""
    summary, _ = setting.run(tmp_path, env_id="InvertedPendulum-v4", noise="flip", noise_level=1.0)
    for call in gae_calls:
        assert 0 < call["clean"].max() <= 10
        np.testing.assert_array_equal(call["noisy"], 1 - call["clean"])
        np.testing.assert_array_equal(call["reward"], call["noisy"])
    assert any(
        abs(call["clean"] - 1).max() > 0.1 for call in gae_calls
    )  # normalised, not the raw 1
    assert 2 < summary["train_return_last100"] <= 6
    assert 2 < summary["final_return_mean"] <= 6


def test_evaluation_is_a_plain_greedy_episode_on_raw_rewards(setting, tmp_path):
    summary, folder = setting.run(tmp_path, noise="flip", noise_level=1.0, eval_episodes=2)
    env, state = gym.make(SMALL["env_id"]), checkpoint(folder)
    agent, _ = make_agent(env_id=SMALL["env_id"])
    agent.load_state_dict(state["agent"])
    stats = {name: tensor.numpy() for name, tensor in state["obs_stats"].items()}
    returns = []
    for episode in range(2):
        obs, _ = env.reset(seed=1 + SMALL["total_timesteps"] if episode == 0 else None)
        score, ended = 0.0, False
        while not ended:
            z = (obs - stats["mean"]) / np.sqrt(stats["m2"] / stats["count"] + 1e-8)
            logits = agent.output(torch.tensor(z.clip(-10, 10), dtype=torch.float32))
            action = np.linspace(env.action_space.low, env.action_space.high, 11)[
                logits[0, 0].argmax()
            ]
            obs, reward, terminated, truncated, _ = env.step(action)
            score, ended = score + reward, terminated or truncated
        returns.append(score)
    assert summary["final_return_mean"] == pytest.approx(np.mean(returns), rel=1e-6)
    assert summary["final_return_std"] == pytest.approx(np.std(returns), rel=1e-6)


def test_runs_with_neighbouring_seeds_share_no_initial_state_of_an_evaluation(setting):
    agent, env = make_agent(env_id=SMALL["env_id"])
    args = script.Args(eval_episodes=10)
    shown = []

    class Envs:
        def normalize_obs(self, obs):
            shown.append(obs)
            return obs

    class FirstStepOnly:
        def reset(self, seed):
            return env.reset(seed=seed)

        def step(self, action):
            return env.observation_space.sample(), 0.0, True, False, {}

    for seed in (5, 6, 5):
        setting.script.evaluate(agent, FirstStepOnly(), Envs(), args, seed, threading.Event())
    first, neighbour, again = np.array(shown).reshape(3, 10, -1)
    assert len(np.unique(np.concatenate([first, neighbour]), axis=0)) == 20
    assert np.array_equal(first, again)


def test_actions_and_initial_weights_have_different_random_numbers(setting, tmp_path, monkeypatch):
    drawn = []
    sampling_noise = setting.script.Agent.sampling_noise

    def recorded(self, shape, generator):
        drawn.append(sampling_noise(self, shape, generator))
        return drawn[-1]

    monkeypatch.setattr(setting.script.Agent, "sampling_noise", recorded)
    setting.run(tmp_path, seed=5)
    agent, _ = make_agent(env_id=SMALL["env_id"])
    weights_generator = torch.Generator().manual_seed(5)
    same = sampling_noise(agent, (SMALL["num_steps"], SMALL["num_envs"]), weights_generator)
    assert drawn[0].shape == same.shape
    assert not np.isin(drawn[0], same).any()


# ---- Normalisation


@pytest.fixture
def stepped_envs(monkeypatch):
    """Three pendulums with a time limit of 12 steps after 200 random steps, and their whole raw
    streams."""
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
        [
            obs
            for stream in streams
            for kind, obs, _ in stream
            if kind not in ("terminated", "truncated")
        ]
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
    assert max(length for _, length in envs.recent_episodes) == 12
    assert all(
        episode_return == length for episode_return, length in envs.recent_episodes
    )  # this pendulum pays 1 a step
    # the last step, by hand: statistics of the whole stream, as the test above checks
    last_obs = np.stack([stream[-1][1] for stream in streams])
    last_reward = [
        [reward for kind, _, reward in stream if kind != "reset"][-1] for stream in streams
    ]
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
    before = json.dumps(
        [envs.obs_stats.mean.tolist(), envs.obs_stats.count, envs.return_stats.count]
    )
    agent, env = make_agent(env_id="InvertedPendulum-v4")
    args = script.Args(eval_episodes=3)
    returns, lengths = script.evaluate(agent, env, envs, args, 0, threading.Event())
    assert returns.shape == lengths.shape == (3,)
    assert before == json.dumps(
        [envs.obs_stats.mean.tolist(), envs.obs_stats.count, envs.return_stats.count]
    )


# ---- Environments of others


class Trouble(gym.Env):
    """Episodes of 100 steps; what `trouble` says happens at every 50th step."""

    observation_space = gym.spaces.Box(-1, 1, (3,))
    action_space = gym.spaces.Box(-1, 1, (1,))

    def __init__(self, trouble="none"):  # no render_mode, which Gymnasium does not ask for
        self.trouble = trouble
        self.t = 0

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        obs = np.zeros(3, np.float32)
        if self.trouble == "NaN after reset" and self.t > 0:
            obs[1] = np.nan
        self.t = 0
        return obs, {}

    def step(self, action):
        self.t += 1
        obs = np.zeros(3)
        reward = 1.0
        if self.t % 50 == 0:
            if self.trouble == "NaN observation":
                obs[1] = np.nan
            elif self.trouble == "huge observation":
                obs[1] = 1e200
            elif self.trouble == "infinite reward":
                reward = -np.inf
            elif self.trouble == "error":
                raise KeyError("no such joint")
            elif self.trouble == "exit":
                raise SystemExit(0)
        return obs, reward, False, self.t == 100 and self.trouble != "endless", {}


@pytest.fixture
def trouble():
    """Registers Trouble as an environment. Returns its name for a trouble."""
    names = []

    def register(what):
        name = f"Trouble-{what.replace(' ', '-')}-v0"
        gym.register(name, Trouble, kwargs={"trouble": what})
        names.append(name)
        return name

    yield register
    for name in names:
        del gym.registry[name]


@pytest.mark.parametrize(
    ("spaces", "message"),
    [
        ({"action_space": gym.spaces.Box(-1, 1, (2, 3))}, "needs one-dimensional Box spaces"),
        ({"action_space": gym.spaces.Box(-1, np.inf, (2,))}, "unbounded actions"),
        ({"observation_space": gym.spaces.Dict(a=gym.spaces.Box(0, 1))}, "needs one-dimensional"),
    ],
)
def test_spaces_that_are_not_supported_are_named(spaces, message, trouble, monkeypatch, tmp_path):
    for name, space in spaces.items():
        monkeypatch.setattr(Trouble, name, space)
    env_id = trouble("none")
    with pytest.raises(script.UsageError, match=f"--env-id {env_id}: {message}"):
        SPPO_CONTINUOUS.run(tmp_path, env_id=env_id)
    assert not list(tmp_path.iterdir())


class Dice(gym.Env):
    """Draws a number in each step, its observation."""

    observation_space = gym.spaces.Box(0, 1, (1,))
    action_space = gym.spaces.Box(-1, 1, (1,))
    draws: list = []  # of all environments

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.draws.append(self.np_random.random())
        return np.float32([self.draws[-1]]), 0.0, False, False, {}


def test_reward_noise_does_not_repeat_the_environments_random_numbers(
    setting, tmp_path, monkeypatch
):
    """Rewards are 0 and the noise is uniform between -1 and 1: 2 u - 1."""
    noise = []
    perturb_reward = setting.script.perturb_reward

    def recording_perturb_reward(*arguments):
        noisy = perturb_reward(*arguments)
        noise.extend(noisy.flatten())
        return noisy

    monkeypatch.setattr(setting.script, "perturb_reward", recording_perturb_reward)
    monkeypatch.setattr(Dice, "draws", [])
    monkeypatch.setitem(gym.registry, "Dice-v0", gym.envs.registration.EnvSpec("Dice-v0", Dice))
    flags = {"noise": "uniform", "noise_level": 1.0, "eval_max_steps": 1}
    setting.run(tmp_path, env_id="Dice-v0", **flags)
    assert len(noise) == 256
    repeated = np.isclose((np.array(noise) + 1) / 2, np.array(Dice.draws)[:, None], atol=1e-9)
    assert not repeated.any()


@pytest.mark.filterwarnings("ignore")  # Gymnasium's own, of such observations
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("NaN observation", "nan"),
        ("huge observation", "e+200"),
        ("infinite reward", "-inf"),
        ("error", "KeyError('no such joint') in test_continuous.py:"),
        ("exit", "SystemExit(0) in test_continuous.py:"),
    ],
)
def test_an_environment_that_fails_is_named(setting, trouble, tmp_path, what, message):
    env_id = trouble(what)
    with pytest.raises(setting.script.RunError) as error:
        setting.run(tmp_path, env_id=env_id)
    assert str(error.value).startswith(f"{env_id}, its step 50: ")
    assert message in str(error.value)


@pytest.mark.filterwarnings("ignore")
def test_a_first_observation_that_is_not_finite_is_named(setting, trouble, tmp_path):
    env_id = trouble("NaN after reset")
    message = f"{env_id}, its step 100: .*first observation.* nan .*not finite"
    with pytest.raises(setting.script.RunError, match=message):
        setting.run(tmp_path, env_id=env_id, num_steps=128, num_envs=1, total_timesteps=128)


def test_an_environment_that_fails_in_an_evaluation_is_named(setting, trouble, tmp_path):
    """The training takes 32 steps, too few for that."""
    env_id = trouble("error")
    flags = {"env_id": env_id, "num_envs": 1, "num_steps": 32, "total_timesteps": 32}
    with pytest.raises(setting.script.RunError, match=f"{env_id}, its step 50: KeyError"):
        setting.run(tmp_path, **flags)


def test_an_endless_episode_is_cut_off_in_evaluations(setting, trouble, tmp_path):
    flags = {"eval_episodes": 2, "eval_max_steps": 70}
    summary, folder = setting.run(tmp_path, env_id=trouble("endless"), **flags)
    assert summary["final_return_mean"] == 70
    assert summary["train_return_last100"] is None
    evaluation = progress(folder)[-1]
    assert (evaluation["length_mean"], evaluation["return_std"]) == (70, 0)


# ---- Runs: identity, reproducibility, learning


def some_minibatch(agent, n=64, obs_dim=17):
    obs = torch.randn(n, obs_dim)
    advantage = 0.5 + torch.randn(n)
    returns = torch.randn(n)
    with torch.no_grad():
        action = act(agent, obs, torch.Generator().manual_seed(0))
        old_log_prob = agent.policy(obs).log_prob(action) + 0.3 * torch.randn(n)
    return obs, action, old_log_prob, advantage, returns


LOSSES = {
    "gaussian": dict(policy="gaussian", beta=0.0),
    "categorical": dict(beta=0.0),
    "symmetric": dict(beta=3.0, z=-2.0),
    "symmetric, not divided": dict(beta=3.0, z=-2.0, divide_by_p_old=False),
}


@pytest.mark.parametrize("norm_adv", [False, True])
@pytest.mark.parametrize("max_grad_norm", [0.2, 1e6])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_and_metrics_are_those_of_plain_pytorch(loss, max_grad_norm, norm_adv):
    """PPO in its usual words, with backward() and clip_grad_norm_; the metrics by hand."""
    torch.manual_seed(0)
    flags = dict(alpha=2.0, ent_coef=0.3, vf_coef=0.7, norm_adv=norm_adv) | LOSSES[loss]
    args = script.Args(max_grad_norm=max_grad_norm, **flags)
    agent, _ = make_agent(args.policy, env_id="LunarLanderContinuous-v3")
    torch.nn.init.normal_(agent.actor[-1].weight, std=0.3)
    obs, action, old_log_prob, raw_advantage, returns = some_minibatch(agent, obs_dim=8)
    gradient, metrics = script.gradient_and_metrics(
        agent, args, obs, action, old_log_prob, raw_advantage, returns
    )

    advantage = raw_advantage
    if norm_adv:
        advantage = (raw_advantage - raw_advantage.mean()) / raw_advantage.std()
    output = agent.actor(obs)
    if args.policy == "gaussian":
        distribution = torch.distributions.Normal(output, agent.log_std.exp())
    else:
        distribution = torch.distributions.Categorical(logits=output.reshape(64, 2, 11))
    log_prob = distribution.log_prob(action).sum(-1)
    entropy = distribution.entropy().sum(-1).mean()
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()
    ppo = -torch.min(advantage * ratio, advantage * torch.clamp(ratio, 0.8, 1.2)).mean()
    value_loss = torch.nn.functional.mse_loss(agent.critic(obs).flatten(), returns)
    outside = ((ratio > 1.2) & (advantage > 0)) | ((ratio < 0.8) & (advantage < 0))
    divisor = old_log_prob.exp() if args.divide_by_p_old else 1
    reverse = -(advantage * args.z * (1 - log_prob.exp()) / divisor)[~outside].sum() / 64
    (2.0 * ppo + args.beta * reverse + 0.7 * value_loss - 0.3 * entropy).backward()
    norm = torch.nn.utils.clip_grad_norm_(agent.parameters(), max_grad_norm)
    expected = torch.cat([parameter.grad.flatten() for parameter in agent.parameters()])
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    assert norm > 0.3

    by_hand = {
        "policy_loss": ppo,
        # without the part that is constant
        "reverse_loss": (args.z * advantage * log_prob.exp() / divisor)[~outside].sum() / 64,
        "value_loss": value_loss,
        "entropy": entropy,
        "grad_norm": norm,
        "clipped_gradients": torch.tensor(float(max_grad_norm == 0.2)),
        "advantage_sign_flips": ((raw_advantage > 0) != (advantage > 0)).float().mean(),
        "approx_kl": (ratio - 1 - log_ratio).mean(),
        "clipfrac": ((ratio < 0.8) | (ratio > 1.2)).float().mean(),
    }
    assert 0 < by_hand["clipfrac"] < 1
    assert (by_hand["advantage_sign_flips"] > 0) == norm_adv
    assert set(metrics) == set(by_hand)
    for name, metric in by_hand.items():
        torch.testing.assert_close(metrics[name], metric.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("norm_adv", [False, True])
@pytest.mark.parametrize("max_grad_norm", [0.2, 1e6])
@pytest.mark.parametrize("beta", [0.0, 20.0])
@pytest.mark.parametrize("policy", ["categorical", "gaussian"])
def test_a2cs_gradient_and_metrics_are_those_of_plain_pytorch(
    policy, beta, max_grad_norm, norm_adv
):
    torch.manual_seed(0)
    agent, _ = make_agent(policy, env_id="LunarLanderContinuous-v3")
    torch.nn.init.normal_(agent.actor[-1].weight, std=0.3)
    flags = dict(policy=policy, alpha=0.5, beta=beta, z=-2.0, ent_coef=0.3, vf_coef=0.7)
    args = sa2c_continuous.Args(max_grad_norm=max_grad_norm, norm_adv=norm_adv, **flags)
    obs, action, _, raw_advantage, returns = some_minibatch(agent, obs_dim=8)
    gradient, metrics = sa2c_continuous.gradient_and_metrics(
        agent, args, obs, action, raw_advantage, returns
    )

    advantage = raw_advantage
    if norm_adv:
        advantage = (raw_advantage - raw_advantage.mean()) / raw_advantage.std()
    output = agent.actor(obs)
    if policy == "gaussian":
        distribution = torch.distributions.Normal(output, agent.log_std.exp())
    else:
        distribution = torch.distributions.Categorical(logits=output.reshape(64, 2, 11))
    log_prob, entropy = distribution.log_prob(action).sum(-1), distribution.entropy().sum(-1).mean()
    p = log_prob.exp()
    a2c, reverse = -(advantage * log_prob).mean(), -(advantage * -2 * (1 - p)).mean()
    value_loss = torch.nn.functional.mse_loss(agent.critic(obs).flatten(), returns)
    (0.5 * a2c + beta * reverse + 0.7 * value_loss - 0.3 * entropy).backward()
    norm = torch.nn.utils.clip_grad_norm_(agent.parameters(), max_grad_norm)
    expected = torch.cat([parameter.grad.flatten() for parameter in agent.parameters()])
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    assert norm > 0.3

    by_hand = {
        "policy_loss": a2c,
        "reverse_loss": reverse + (advantage * -2).mean(),  # without the part that is constant
        "value_loss": value_loss,
        "entropy": entropy,
        "grad_norm": norm,
        "clipped_gradients": torch.tensor(float(max_grad_norm == 0.2)),
        "advantage_sign_flips": ((raw_advantage > 0) != (advantage > 0)).float().mean(),
        "probability": p.mean(),
        "reverse_share": (2 * beta * p / (0.5 + 2 * beta * p)).mean(),
    }
    assert (by_hand["advantage_sign_flips"] > 0) == norm_adv
    assert set(metrics) == set(by_hand)
    for name, metric in by_hand.items():
        torch.testing.assert_close(metrics[name], metric.detach(), rtol=1e-4, atol=1e-6)


def record_answers(monkeypatch, script) -> list:
    """(observations, noise, actions) of all steps of the training from here on."""
    numpy_actor = script.Agent.numpy_actor
    answers = []

    def recording_actor(agent):
        act = numpy_actor(agent)

        def recording_act(obs, noise=None):
            if noise is None:  # an evaluation
                return act(obs)
            action = act(obs, noise)
            answers.append((obs.copy(), noise.copy(), action.copy()))
            return action

        return recording_act

    monkeypatch.setattr(script.Agent, "numpy_actor", recording_actor)
    return answers


def test_every_action_answers_the_latest_observation(setting, tmp_path, monkeypatch):
    """Across rollouts too; each with noise of its own."""
    script = setting.script
    shown = []

    class Envs(script.NormalizedEnvs):
        def reset(self, seed):
            shown.append(super().reset(seed))
            return shown[-1]

        def step(self, action):
            output = super().step(action)
            shown.append(output[0])
            return output

    monkeypatch.setattr(script, "NormalizedEnvs", Envs)
    answers = record_answers(monkeypatch, script)
    setting.run(tmp_path, num_envs=2)
    assert len(answers) == SMALL["total_timesteps"] / 2
    np.testing.assert_array_equal([obs for obs, _, _ in answers], shown[:-1])
    noise = np.stack([noise for _, noise, _ in answers])
    assert len(np.unique(noise[..., 0].reshape(-1))) == noise[..., 0].size


def test_the_actors_weights_are_those_of_the_last_update(setting, tmp_path, monkeypatch):
    """Each rollout has its own actor, and not the one that the run began with."""
    script = setting.script
    agents = []
    original = script.Agent

    class RecordingAgent(original):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            agents.append(self)

        def numpy_actor(self):
            act = super().numpy_actor()
            network = self.actor

            def checked_act(obs, noise=0.0):
                action = act(obs, noise)
                with torch.no_grad():
                    logits = network(torch.as_tensor(obs)).reshape(-1, *self.output_shape)
                assert (action == (logits.numpy() + noise).argmax(-1)).all()
                return action

            return checked_act

    monkeypatch.setattr(script, "Agent", RecordingAgent)
    setting.run(tmp_path, learning_rate=0.01, num_envs=2, num_steps=64)
    assert len(agents) == 1


def test_an_epoch_trains_on_every_step_once(setting, tmp_path, monkeypatch):
    """Each observation goes with the action that answered it, and with its advantage and return."""
    script = setting.script
    compute_gae = script.compute_gae
    gradient_and_metrics = script.gradient_and_metrics
    computed = []
    updates = []
    trained = []

    def pairs(obs, action):
        return [(o.tobytes(), a.tobytes()) for o, a in zip(obs, action)]

    def recording_gradient(agent, args, obs, action, *rest):
        trained.extend(pairs(obs.numpy(), action.numpy()))
        updates.extend(zip(*(x.tolist() for x in rest[-2:])))
        return gradient_and_metrics(agent, args, obs, action, *rest)

    def recording_gae(*arguments):
        advantage, returns = compute_gae(*arguments)
        assert arguments[-2:] == (0.9, 0.7)  # gamma and lambda
        computed.extend(zip(advantage.flatten().tolist(), returns.flatten().tolist()))
        return advantage, returns

    answers = record_answers(monkeypatch, script)
    monkeypatch.setattr(script, "gradient_and_metrics", recording_gradient)
    monkeypatch.setattr(script, "compute_gae", recording_gae)
    one_epoch = {"update_epochs": 1} if setting.ppo else {}
    flags = {"num_envs": 2, "gamma": 0.9, "gae_lambda": 0.7, "norm_adv": False}
    setting.run(tmp_path, total_timesteps=256, **flags, **one_epoch)
    acted = [pair for obs, _, action in answers for pair in pairs(obs, action)]
    assert len(acted) == len(set(acted)) == 256
    assert sorted(acted) == sorted(trained)
    order = [acted.index(pair) for pair in trained]
    np.testing.assert_allclose(updates, np.array(computed)[order], rtol=1e-5)


# ---- Gradient clipping


def test_without_clipping_sppo_is_dppo(tmp_path):
    """SPPO's policy gradient is 20.5 times DPPO's. Adam is invariant to the scale of a gradient,
    and actor and critic share no parameters: so only clipping, which sees both together, tells
    SPPO, DPPO, and DPPO with a value loss of 1 / 20.5 of its weight apart."""
    algorithms = {
        "sppo": dict(alpha=0.5, beta=20.0),
        "dppo": dict(alpha=1.0, beta=0.0),
        "small value loss": dict(alpha=1.0, beta=0.0, vf_coef=0.5 / 20.5),
    }
    clippings = {"off": dict(max_grad_norm=1e9, adam_eps=1e-20), "on": dict(adam_eps=1e-20)}
    returns = {}
    final_weights = {}
    for clipping, clipping_flags in clippings.items():
        for algorithm, flags in algorithms.items():
            _, folder = SPPO_CONTINUOUS.run(
                tmp_path / clipping / algorithm,
                total_timesteps=2048,
                num_steps=512,
                num_minibatches=8,
                eval_freq=512,
                **clipping_flags,
                **flags,
            )
            returns[clipping, algorithm] = [row["return_mean"] for row in progress(folder)]
            final_weights[clipping, algorithm] = weights(folder)
    distance = {}
    for clipping, algorithm in final_weights:
        difference = final_weights[clipping, algorithm] - final_weights[clipping, "sppo"]
        distance[clipping, algorithm] = difference.abs().max()
    for algorithm in ("dppo", "small value loss"):
        assert returns["off", algorithm] == pytest.approx(returns["off", "sppo"], rel=1e-6)
        assert distance["off", algorithm] < 1e-5
        assert returns["on", algorithm] != pytest.approx(returns["on", "sppo"], rel=1e-6)
        assert distance["on", algorithm] > 1e-3


# ---- Runs


def test_gaussian_runs_are_the_plain_algorithm(setting, tmp_path, monkeypatch):
    recorded_actions = setting.record_actions(monkeypatch)
    summary, _ = setting.run(tmp_path, policy="gaussian", env_id="LunarLanderContinuous-v3")
    actions = np.concatenate(recorded_actions)
    plain = setting.symmetric_algo[1:]
    assert (summary["algo"], summary["alpha"], summary["beta"]) == (plain, 1.0, 0.0)
    assert abs(actions).max() == 1  # clipped to the bounds
    assert (actions != actions.round()).mean() > 0.5  # and not cut to integers


COMPILERS = [c for c in ("c++", "g++", "clang++") if shutil.which(c)]


@pytest.mark.slow
@pytest.mark.skipif(not COMPILERS, reason="--compile needs a C++ compiler")
@pytest.mark.parametrize("policy", ["categorical", "gaussian"])
def test_compiled_gradient_is_the_gradient(setting, policy):
    script = setting.script
    torch._dynamo.config.trace_autograd_ops = True
    args = script.Args(
        policy=policy, alpha=0.5, beta=0.0 if policy == "gaussian" else 20.0, ent_coef=0.01
    )
    agent, _ = make_agent(policy)
    obs, action, old_log_prob, *rest = some_minibatch(agent)
    minibatch = (obs, action, old_log_prob, *rest) if setting.ppo else (obs, action, *rest)
    gradient, metrics = script.gradient_and_metrics(agent, args, *minibatch)
    compiled, compiled_metrics = torch.compile(script.gradient_and_metrics)(agent, args, *minibatch)
    assert gradient.norm() > 0.1
    torch.testing.assert_close(compiled, gradient, rtol=1e-4, atol=1e-6)
    assert gradient.norm().item() == pytest.approx(0.5, rel=1e-3)  # clipped
    for name, metric in metrics.items():
        torch.testing.assert_close(compiled_metrics[name], metric, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("policy", ["categorical", "gaussian"])
def test_a_gpu_computes_the_same_gradient(setting, policy):
    script = setting.script
    beta = 0.0 if policy == "gaussian" else 20.0
    args = script.Args(policy=policy, alpha=0.5, beta=beta, ent_coef=0.01)
    agent, _ = make_agent(policy)
    obs, action, old_log_prob, *rest = some_minibatch(agent)
    tensors = [obs, action, old_log_prob, *rest] if setting.ppo else [obs, action, *rest]
    gradient, _ = script.gradient_and_metrics(agent, args, *tensors)
    agent.to("cuda")
    on_gpu = [tensor.to("cuda") for tensor in tensors]
    gradient_there, _ = script.gradient_and_metrics(agent, args, *on_gpu)
    torch.testing.assert_close(gradient_there.cpu(), gradient, rtol=1e-4, atol=1e-6)


LEARNING = {"env_id": "InvertedPendulum-v4", "eval_episodes": 5}
PPO_LEARNING = {
    "total_timesteps": 24_576,
    "num_steps": 2048,
    "num_minibatches": 32,
    "update_epochs": 10,
}
A2C_LEARNING = {"total_timesteps": 40_000, "num_envs": 4, "num_steps": 8}


@pytest.mark.slow
def test_it_learns_to_balance(setting, tmp_path):
    """Random play balances about 6 steps; 300 and more are learned, not luck."""
    summary, _ = setting.run(
        tmp_path, **LEARNING, **(PPO_LEARNING if setting.ppo else A2C_LEARNING)
    )
    assert summary["final_return_mean"] > 300


@pytest.mark.slow
def test_it_does_not_learn_from_negated_advantages(setting, tmp_path, monkeypatch):
    compute_gae = setting.script.compute_gae

    def negated(*arguments):
        advantage, returns = compute_gae(*arguments)
        return -advantage, returns

    monkeypatch.setattr(setting.script, "compute_gae", negated)
    summary, _ = setting.run(
        tmp_path, **LEARNING, **(PPO_LEARNING if setting.ppo else A2C_LEARNING)
    )
    assert summary["final_return_mean"] < 60


# ---- Videos


@pytest.mark.parametrize("env_id", ["Hopper-v4", "Walker2d-v5", "HalfCheetah-v4"])
def test_the_camera_follows_the_robot(setting, env_id):
    renderer = setting.script.make_env(env_id, "rgb_array").unwrapped.mujoco_renderer
    mode = renderer.model.camera(renderer.camera_id).mode[0]
    assert mode == mujoco.mjtCamLight.mjCAMLIGHT_TRACKCOM


# ---- Resuming


def test_statistics_and_scores_go_on_after_resuming(setting, tmp_path):
    _, folder = setting.run(tmp_path, stop=StopAfter(2), num_envs=2, total_timesteps=512)
    before = checkpoint(folder)
    setting.resume(folder)
    after = checkpoint(folder)
    assert after["obs_stats"]["count"] == 512 + 2 * 2  # every step, and two first observations
    assert after["return_stats"]["count"] == 512
    assert before["finished_episodes"][-1] in after["finished_episodes"]


def test_an_evaluation_done_when_resumed_has_the_statistics_of_the_training(
    setting, tmp_path, monkeypatch
):
    """Nothing is left to train then, so no environment is reset."""
    stop = threading.Event()
    evaluate = setting.script.evaluate

    def stopped_evaluate(*arguments):
        stop.set()
        return evaluate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(setting.script, "evaluate", stopped_evaluate)
        summary, folder = setting.run(tmp_path, stop=stop, eval_freq=0)
    assert summary is None
    before = checkpoint(folder)["obs_stats"]
    setting.resume(folder)
    after = checkpoint(folder)["obs_stats"]
    assert before["count"] == after["count"] > 256
    assert torch.equal(before["mean"], after["mean"])


def test_the_default_name_suits_files_and_weights_and_biases(setting):
    args = setting.script.Args(env_id="target:dm_control/Target-v0", beta=0.0)
    name = setting.script.with_defaults(args).run_name
    assert "target-dm_control-Target-v0" in name
    assert not set(name) & set("/\\#?%:")
