"""What the four control scripts share: advantages, noise, gradients, `train`, learning."""

import copy
import shutil

import numpy as np
import pytest
import torch
from helpers import EACH, MINIBATCHES, PPO, Signals, only, progress, record, sha256
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats
from torch.distributions import Categorical
from torch.testing import assert_close

import sppo_atari

# ---- Settings

COMMON = "gamma=0.99 max_grad_norm=0.5 alpha=0.5 z=-1.0 eval_episodes=10 seed=1 noise=none"
COMMON += " noise_level=0.0 compile=True track=False runs_dir=runs start_from=None"
VECTORS = "env_id=Hopper-v4 total_timesteps=1000000 eval_freq=50000 checkpoint_freq=0 vf_coef=0.5"
VECTORS += " ent_coef=0.0 bins=11 hidden_sizes=(64,64) activation=tanh ortho_init=True"
VECTORS += " policy=categorical log_std_init=0.0 env_kwargs={}"
GAMES = "env_id=Breakout total_timesteps=5000000 eval_freq=250000 checkpoint_freq=31250"
GAMES += " ent_coef=0.01 repeat_action_probability=0.0 device=auto amp=auto"
OF_A2C = "learning_rate=0.0007 rmsprop_eps=1e-05 gae_lambda=1.0 norm_adv=False log_freq=1000"
OF_A2C += " exp_name=sa2c beta=0.5"
OF_PPO = "adam_eps=1e-05 gae_lambda=0.95 norm_adv=True exp_name=sppo"
DEFAULTS = {
    "sppo_continuous": f"{VECTORS} {OF_PPO} num_envs=1 num_steps=2048 num_minibatches=32 "
    "update_epochs=10 learning_rate=0.0003 clip_coef=0.2 beta=20.0",
    "sa2c_continuous": f"{VECTORS} {OF_A2C} num_envs=4 num_steps=8",
    "sppo_atari": f"{GAMES} {OF_PPO} num_envs=8 num_steps=128 num_minibatches=4 update_epochs=4 "
    "learning_rate=0.00025 clip_coef=0.1 vf_coef=0.5 beta=1.0 anneal_lr=True anneal_clip=True",
    "sa2c_atari": f"{GAMES} {OF_A2C} num_envs=16 num_steps=5 vf_coef=0.25",
}


def test_defaults_are_the_authors_settings(setting):
    """As in their public code, but for control's number of steps and A2C's alpha and beta."""
    defaults = {f"{name}={x}".replace(" ", "") for name, x in vars(setting.script.Args()).items()}
    assert defaults == set(f"{COMMON} {DEFAULTS[str(setting)]}".split())
    assert setting.script.Args(beta=0.0).alpha == 1.0  # the baseline's loss is not halved
    for noise, level in {"normal": 0.05, "uniform": 0.05, "adv_flip": 0.1}.items():
        assert setting.script.Args(noise=noise).noise_level == level


# ---- Advantages and noise


@settings(deadline=None, max_examples=50, database=None)
@given(seed=st.integers(0, 1000), T=st.integers(1, 20), gamma=st.floats(0, 1), lam=st.floats(0, 1))
def test_gae_is_the_brute_force_sum(seed, T, gamma, lam):
    rng = np.random.default_rng(seed)
    reward = rng.normal(size=(T, 2))
    value = rng.normal(size=(T + 1, 2))
    ended = rng.random((T, 2)) < 0.2
    advantage, returns = sppo_atari.compute_gae(reward, value, ended, gamma, lam)
    expected = np.zeros((T, 2))
    for t, n in np.ndindex(T, 2):
        for step in range(t, T):
            bootstrap = 0.0 if ended[step, n] else value[step + 1, n]
            delta = reward[step, n] + gamma * bootstrap - value[step, n]
            expected[t, n] += (gamma * lam) ** (step - t) * delta
            if ended[step, n]:
                break
    assert_allclose(advantage, expected, atol=1e-9)
    assert_allclose(returns, expected + value[:-1], atol=1e-9)


def test_noise_has_its_distribution(setting):
    reward = np.full((100, 200), 3.0)
    distributions = {"normal": stats.norm(3, 0.05), "uniform": stats.uniform(2.95, 0.1)}
    for noise, distribution in distributions.items():
        noisy = setting.script.perturb_reward(reward, noise, 0.05, np.random.default_rng(0))
        assert stats.kstest(noisy.flatten(), distribution.cdf).pvalue > 1e-3
        assert len(np.unique(noisy)) == 20_000  # each has its own
    for noise in ("none", "adv_flip"):
        noisy = setting.script.perturb_reward(reward, noise, 0.05, np.random.default_rng(0))
        assert (noisy == reward).all()

    advantage = torch.randn(300, 300)
    noisy = setting.script.perturb_advantage(advantage, 0.1, np.random.default_rng(0))
    assert torch.equal(noisy.abs(), advantage.abs())
    flipped = (noisy != advantage).double()
    assert flipped.mean().item() == pytest.approx(0.1, abs=0.005)
    for dim in (0, 1):  # each by itself
        assert flipped.mean(dim).std().item() < 0.03


# ---- Gradients


def make_agent(setting):
    """An agent for Hopper or Breakout whose outputs vary."""
    torch.manual_seed(0)
    if setting.atari:
        agent = setting.script.Agent(4)
        torch.nn.init.normal_(agent.actor.weight, std=0.1)
    else:
        args = setting.script.Args()
        agent = setting.script.Agent(setting.script.make_env(args), args)
        torch.nn.init.normal_(agent.actor[-1].weight, std=0.3)
    return agent


def outputs(setting, agent, obs):
    """Logits and values."""
    if setting.atari:
        return agent(obs)
    return agent.actor(obs).view(-1, 3, 11), agent.critic(obs).squeeze(-1)


def log_prob_entropy_value(setting, agent, obs, action):
    """Of a categorical policy, (batch,) each."""
    logits, value = outputs(setting, agent, obs)
    policy = Categorical(logits=logits)
    log_prob = policy.log_prob(action)
    entropy = policy.entropy()
    if setting.atari:
        return log_prob, entropy, value
    return log_prob.sum(-1), entropy.sum(-1), value


def some_batch(setting, agent):
    if setting.atari:
        obs = torch.randint(256, (48, 4, 84, 84)).byte()
        action = torch.randint(4, (48,))
    else:
        obs = torch.randn(48, 11)
        action = torch.randint(11, (48, 3))
    with torch.no_grad():
        log_prob, _, _ = log_prob_entropy_value(setting, agent, obs, action)
    old_log_prob = log_prob + 0.3 * torch.randn(48)
    advantage = 0.5 + torch.randn(48)
    mask = [(torch.rand(48) < 0.7).float()] if setting.atari else []
    return setting.script.Batch(obs, action, old_log_prob, advantage, torch.randn(48), *mask)


def one_update(setting, **flags):
    """Arguments for an update with a whole batch."""
    flags |= {"num_minibatches": 1, "update_epochs": 1} if setting.ppo else {}
    return setting.script.Args(**flags)


def gradient_and_metrics(setting, agent, args, batch, function=None):
    """Of such an update, the clipped gradient as one vector."""
    agent = copy.deepcopy(agent)
    metrics = setting.update(agent, args, batch, function)
    (metrics,) = metrics if setting.ppo else [metrics]
    return torch.cat([parameter.grad.flatten() for parameter in agent.parameters()]), metrics


@pytest.mark.parametrize(("max_grad_norm", "norm_adv"), [(0.2, True), (1e6, False)])
def test_gradient_and_metrics_are_those_of_alpha_l_plus_beta_lr(setting, max_grad_norm, norm_adv):
    """Steps on which FIRE replaced the agent's action are left out, but for the critic."""
    agent = make_agent(setting)
    flags = dict(alpha=2.0, beta=3.0, z=-2.0, ent_coef=0.3, vf_coef=0.7)
    args = one_update(setting, max_grad_norm=max_grad_norm, norm_adv=norm_adv, **flags)
    batch = some_batch(setting, agent)
    gradient, metrics = gradient_and_metrics(setting, agent, args, batch)

    own = torch.ones(48, dtype=bool)
    if setting.atari:
        own = batch.mask == 1
        assert 0 < own.sum() < 48
    log_prob, entropy, value = log_prob_entropy_value(setting, agent, batch.obs, batch.action)
    log_prob = log_prob[own]
    entropy = entropy[own].mean()
    raw_advantage = batch.advantage[own]
    old_log_prob = batch.log_prob[own]
    advantage = raw_advantage
    if norm_adv:
        advantage = (raw_advantage - raw_advantage.mean()) / raw_advantage.std()
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()
    expected = {"losses/approx_kl": (ratio - 1 - log_ratio).mean()}
    if setting.ppo:  # test_loss.py tests the two losses
        losses = log_prob, old_log_prob, advantage, 0.2, -2.0
        expected["losses/clipfrac"] = ((ratio < 0.8) | (ratio > 1.2)).float().mean()
        assert 0 < expected["losses/clipfrac"] < 1
    else:
        losses = log_prob, advantage, -2.0
        p = log_prob.exp()
        expected["losses/reverse_share"] = (6 * p / (2 + 6 * p)).mean()
    policy_loss, reverse_loss = setting.script.symmetric_policy_losses(*losses)
    value_loss = torch.nn.functional.mse_loss(value, batch.returns)
    (2.0 * policy_loss + 3.0 * reverse_loss + 0.7 * value_loss - 0.3 * entropy).backward()
    norm = torch.nn.utils.clip_grad_norm_(agent.parameters(), max_grad_norm)
    assert norm > 0.3
    plain = torch.cat([parameter.grad.flatten() for parameter in agent.parameters()])
    assert_close(gradient, plain, rtol=3e-3, atol=1e-5)  # measured: up to 5e-4

    expected |= {
        "losses/policy_loss": policy_loss,
        "losses/reverse_loss": reverse_loss,
        "losses/value_loss": value_loss,
        "losses/entropy": entropy,
        "losses/norm_sign_changes": ((raw_advantage > 0) != (advantage > 0)).float().mean(),
        "losses/grad_norm": norm,
        "losses/clipped_gradients": torch.tensor(max_grad_norm == 0.2),
    }
    assert (expected["losses/norm_sign_changes"] > 0) == norm_adv
    assert metrics.keys() == expected.keys()
    for name, metric in expected.items():
        assert_close(metrics[name], metric.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="--compile needs a C++ compiler")
def test_compiled_functions_compute_the_same(setting, capsys):
    agent = make_agent(setting)
    batch = some_batch(setting, agent)
    args = one_update(setting)
    options = {} if setting.atari else {"options": {"cpp_wrapper": True}}
    compiled = setting.script.compiled(setting.loss_function, **options)
    expected = gradient_and_metrics(setting, agent, args, batch)
    result = gradient_and_metrics(setting, agent, args, batch, compiled)
    assert_close(result, expected, rtol=1e-3, atol=1e-5)
    assert "failed" not in capsys.readouterr().out


# ---- Rollouts and updates


class MadeUp:
    """Two environments whose observations, rewards and ends are drawn. `steps` has all of them."""

    num_actions = 4

    def __init__(self, setting):
        self.atari = setting.atari
        self.rng = np.random.default_rng(1)
        self.first_obs = self.draw_obs()
        self.steps = []

    def draw_obs(self):
        if self.atari:
            return self.rng.integers(256, size=(2, 4, 84, 84), dtype=np.uint8)
        return self.rng.normal(size=(2, 11)).astype(np.float32)

    def step(self, action):
        obs = self.draw_obs()
        last_obs = self.draw_obs()
        reward = self.rng.normal(size=2)
        done, truncated, overridden = self.rng.random((3, 2)) < 0.5
        cut_off = done & truncated
        self.steps.append([action, obs, reward, done, cut_off, last_obs, overridden])
        if self.atari:
            last_obs = {i: last_obs[i] for i in np.flatnonzero(cut_off)}
            return obs, reward, done, overridden, last_obs, {}
        return obs, reward, done, cut_off, last_obs


@torch.no_grad()
def test_a_rollout_has_what_belongs_to_each_step(setting):
    """Actions are samples. Rewards get noise before episodes that were cut off bootstrap from their
    last observation."""
    agent = make_agent(setting)
    envs = MadeUp(setting)
    flags = {"num_envs": 2, "num_steps": 32, "gamma": 0.9, "gae_lambda": 0.7}
    args = setting.script.Args(**flags, noise="normal", noise_level=0.1)
    batch, next_obs = setting.collect(agent, args, envs, envs.first_obs)
    played, obs, reward, done, cut_off, last_obs, overridden = map(np.array, zip(*envs.steps))
    assert_array_equal(next_obs, obs[-1])
    all_obs = torch.from_numpy(np.array([envs.first_obs, *obs])).flatten(0, 1)
    obs = all_obs[:64]

    generator = torch.Generator().manual_seed(0)
    if setting.atari:
        draws = setting.script.sample_gumbel((32, 2, 4), generator)
    else:
        draws = torch.from_numpy(agent.exploration((32, 2), generator))
        played = (5 * played).round() + 5  # of 11 bins
    assert len(draws.unique()) > 0.99 * draws.numel()
    logits, _ = outputs(setting, agent, obs)
    action = (logits + draws.flatten(0, 1)).argmax(-1)
    assert_array_equal(played.reshape(action.shape), action)
    log_prob, _, _ = log_prob_entropy_value(setting, agent, obs, action)

    noisy = setting.script.perturb_reward(reward, "normal", 0.1, np.random.default_rng(0))
    assert abs(noisy - reward).min() > 0
    _, value = outputs(setting, agent, all_obs)
    _, last_value = outputs(setting, agent, torch.from_numpy(last_obs).flatten(0, 1))
    noisy += 0.9 * np.where(cut_off, last_value.reshape(32, 2), 0)
    value = value.reshape(33, 2).numpy()
    advantages = setting.script.compute_gae(noisy, value, done, 0.9, 0.7)
    expected = [obs, action, log_prob, *(x.flatten() for x in advantages)]
    expected += [~overridden.flatten()] if setting.atari else []
    for name, tensor, right in zip(batch._fields, batch, expected, strict=True):
        assert_allclose(tensor, right, rtol=1e-4, atol=1e-5, err_msg=name)


def test_an_epoch_trains_on_every_step_once_with_flips_of_its_own(setting):
    """In an order of its own. Advantages are not normalised yet, and all else stays."""
    minibatches = []

    def loss(*arguments):
        minibatches.extend(x for x in arguments if isinstance(x, setting.script.Batch))
        return setting.loss_function(*arguments)

    agent = make_agent(setting)
    batch = some_batch(setting, agent)._replace(returns=torch.arange(48.0))  # they tell the steps
    flags = {"noise": "adv_flip", "noise_level": 0.8, "norm_adv": True}
    flags |= MINIBATCHES if setting.ppo else {}
    setting.update(agent, setting.script.Args(**flags), batch, loss)
    count = 4 if setting.ppo else 1  # of minibatches in an epoch
    assert len(minibatches) == (2 * count if setting.ppo else 1)
    orders = []
    flips = []
    for first in range(0, len(minibatches), count):
        epoch = minibatches[first : first + count]
        epoch = setting.script.Batch(*map(torch.cat, zip(*epoch)))
        order = epoch.returns.long()
        assert sorted(order.tolist()) == list(range(48))
        flip = torch.sign(epoch.advantage * batch.advantage[order])
        epoch = epoch._replace(advantage=flip * epoch.advantage)
        for found, tensor in zip(epoch, batch):
            assert torch.equal(found, tensor[order])
        orders.append(order)
        flips.append(flip[order.argsort()])
    assert 0.7 < (torch.stack(flips) < 0).float().mean() < 0.9
    if setting.ppo:
        assert not torch.equal(*orders)
        assert not torch.equal(*flips)


# ---- What `train` does


def test_no_random_seed_is_used_twice(setting, tmp_path, monkeypatch):
    """Else noise would repeat numbers that environments start from, or those of another run."""
    seeds = []
    SeedSequence = np.random.SeedSequence

    class Generator(torch.Generator):
        def manual_seed(self, seed):
            seeds.append(seed)
            return super().manual_seed(seed)

    class Games(Signals):
        def reset(self, seed):
            seeds.extend(seed.tolist())
            return super().reset(seed)

    generators = record(monkeypatch, np.random, "default_rng")
    sequences = record(monkeypatch, np.random, "SeedSequence")  # Gymnasium's, of an environment
    manual = record(monkeypatch, torch, "manual_seed")  # of initial weights, and layers that draw
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(setting.script, "AtariVectorEnv", Games, raising=False)
    flags = {"noise": "normal", "num_envs": 2, "num_steps": 32, "eval_episodes": 3, **EACH}
    setting.run(tmp_path / "1", **flags)
    setting.run(tmp_path / "2", seed=2, **flags)
    if setting.atari:  # an evaluation with the run's seed, as by enjoy.py
        games = setting.script.AtariGames(setting.args(tmp_path), 3)
        setting.script.evaluate(setting.script.Agent(3), games, seed=1)
    seeds += [tuple(SeedSequence(seed).generate_state(4)) for (seed,), _ in generators + sequences]
    seeds += [("manual", seed) for (seed,), _ in manual]
    assert len(seeds) > (40 if setting.atari else 15)
    assert len(seeds) == len(set(seeds))


def test_rollouts_follow_each_other_and_explained_variance_is_that_of_their_returns(
    setting, tmp_path, monkeypatch, signals
):
    """Without steps on which FIRE replaced the agent's action."""
    begins = []
    ends = []
    explained = []
    collect = setting.script.collect

    def masking_collect(agent, args, envs, obs, *more):
        batch, last_obs = collect(agent, args, envs, obs, *more)
        begins.append(obs)
        ends.append(last_obs)
        own = torch.ones(64, dtype=bool)
        if setting.atari:
            own = torch.rand(64) < 0.5
            batch = batch._replace(mask=own.float())
        unexplained = batch.advantage[own].numpy().var() / batch.returns[own].numpy().var()
        explained.append(1 - unexplained)
        return batch, last_obs

    monkeypatch.setattr(setting.script, "collect", masking_collect)
    _, folder = setting.run(tmp_path)
    assert_array_equal(begins[1:], ends[:-1])
    (row,) = progress(folder)
    assert row["losses/explained_variance"] == pytest.approx(np.mean(explained))


@only(*PPO)
def test_sppo_is_ppo_with_another_weight_to_the_last_bit(setting, tmp_path, signals):
    """Where alpha + beta does not round, in a minibatch whose size is a power of two."""
    short = {"noise": "adv_flip", "learning_rate": 0.01, "clip_coef": 0.05}
    short |= {"total_timesteps": 128}

    def trained(name, **weights):
        _, folder = setting.run(tmp_path / name, **short, **weights)
        assert progress(folder)[-1]["losses/clipfrac"] > 0.1  # the mask counts
        return sha256(folder / "agent.safetensors")

    k = 0.5 + setting.script.Args().beta
    sppo = trained("sppo")
    assert trained("ppo-k", alpha=k, beta=0.0) == sppo
    assert trained("ppo", beta=0.0) != sppo


# ---- Learning

AT_THE_END = {"eval_freq": 10**6}
PENDULUM = AT_THE_END | {"env_id": "InvertedPendulum-v4", "eval_episodes": 5}
SIGNALS = AT_THE_END | {"eval_episodes": 20, "ent_coef": 0.0}
LEARNING = {
    "sppo_continuous": PENDULUM
    | {"total_timesteps": 24_576, "num_steps": 2048}
    | {"num_minibatches": 32, "update_epochs": 10},
    "sa2c_continuous": PENDULUM | {"total_timesteps": 40_000, "num_envs": 4, "num_steps": 8},
    "sppo_atari": SIGNALS
    | {"total_timesteps": 4096, "num_envs": 8, "num_steps": 16}
    | {"learning_rate": 1e-3, "num_minibatches": 4, "update_epochs": 3},
    # RMSprop's average of squares falls from 1 slowly: large steps. Rewards follow at once: gamma 0
    "sa2c_atari": SIGNALS
    | {"total_timesteps": 8000, "num_envs": 16, "num_steps": 5}
    | {"learning_rate": 0.1, "gamma": 0.0},
}


@pytest.mark.slow
def test_a_script_learns_a_simple_task(setting, tmp_path, signals):
    """A pendulum that random play balances for about 6 steps, or signals, by chance 6.7 points."""
    summary, _ = setting.run(tmp_path, **LEARNING[str(setting)])
    assert summary["return_mean"] > (15 if setting.atari else 300)
