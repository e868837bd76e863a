"""What is particular to Atari: games, network, schedules, steps that are not the agent's.

The scripts share most of their text, as `test_repository.py` guards: that is tested on
`sppo_atari.py`. What each has for itself, `train` above all, is tested on both."""

import functools
import shutil
import threading

import ale_py
import cv2
import gymnasium as gym
import numpy as np
import pytest
import torch
from ale_py import Action
from helpers import SA2C_ATARI, SPPO_ATARI, Signals, StopAfter, checkpoint, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import sa2c_atari
import sppo_atari as script

ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
gym.register_envs(ale_py)


@pytest.fixture(params=[SPPO_ATARI, SA2C_ATARI], ids=str)
def setting(request):
    return request.param


@pytest.fixture
def quick_games(monkeypatch, setting):
    """Games of ten steps that are made here, where it is the training that matters."""
    monkeypatch.setattr(setting.script, "AtariVectorEnv", Signals)


# ---- Games, against one plain emulator each with Gymnasium's own preprocessing


class PlainGame:
    """Gymnasium's preprocessing of one emulator, brought to where AtariVectorEnv's game began.

    A game there begins with one frame of FIRE, where there is such an action, then a random number
    of idle ones. How many in all, `frames`, is the only thing that the reference takes from what it
    checks."""

    def __init__(self, game):
        env = gym.make(f"ALE/{game}-v5", frameskip=1, repeat_action_probability=0.0)
        env = gym.wrappers.AtariPreprocessing(env, noop_max=0, frame_skip=4, screen_size=84)
        self.env = gym.wrappers.FrameStackObservation(env, 4, padding_type="zero")
        self.ale = self.env.unwrapped.ale
        self.has_fire = Action.FIRE in self.ale.getMinimalActionSet()

    def begin(self, frames):
        self.env.reset()
        for frame in range(frames):
            self.ale.act(Action.FIRE if frame == 0 and self.has_fire else Action.NOOP)
        self.score, self.length, self.fire_next = 0.0, 0, False

    def step(self, action):
        """Returns the stack, the raw reward, whether a life or the game was lost, whether the game
        was."""
        fire = self.ale.getMinimalActionSet().index(Action.FIRE) if self.has_fire else None
        self.overridden = self.fire_next and self.has_fire
        lives = self.ale.lives()
        stack, reward, over, truncated, _ = self.env.step(fire if self.overridden else action)
        assert not truncated
        self.fire_next = 0 < self.ale.lives() < lives and not over
        self.score += reward
        self.length += 1
        return stack, reward, over or self.fire_next, over


def begin_games(game, num_games, seed, **flags):
    """Games of ours and, as far as they have begun, their plain counterparts."""
    games = script.AtariGames(script.Args(env_id=game), num_games, **flags)
    images = games.reset(seed)
    again, info = games.envs.reset(seed=seed)  # the same once more, for the number of frames
    assert np.array_equal(images, again)
    plain = [PlainGame(game) for _ in range(num_games)]
    for i, one in enumerate(plain):
        one.begin(info["episode_frame_number"][i])
    return games, plain, images


@pytest.mark.parametrize(
    ("game", "steps"), [("Breakout", 600), ("SpaceInvaders", 500), ("MsPacman", 400)]
)
def test_games_are_those_of_a_plain_emulator(game, steps):
    """Images, rewards, lives, ends and raw scores; the first game of each, with every action but
    FIRE.

    What can't match: the three images before the first one, which AtariVectorEnv leaves black (as
    the stack of DeepMind's), and what follows the end of a game, since the number of idle frames is
    drawn anew."""
    games, plain, _ = begin_games(game, 3, seed=11)
    actions = [
        i for i, action in enumerate(games.envs.ale.get_action_set()) if action != Action.FIRE
    ]
    rng, playing, lives_lost, overridden_steps = np.random.default_rng(0), {0, 1, 2}, 0, 0
    for step in range(steps):
        action = rng.choice(actions, 3)
        images, reward, terminated, truncated, overridden, final_images = games.step(action)
        assert not truncated.any()
        assert not final_images
        for i in sorted(playing):
            stack, plain_reward, plain_terminated, over = plain[i].step(action[i])
            assert reward[i] == np.sign(plain_reward)
            assert terminated[i] == plain_terminated
            assert overridden[i] == plain[i].overridden
            assert (i in games.ended) == over
            lives_lost += plain_terminated and not over
            overridden_steps += plain[i].overridden
            if over:
                assert games.ended[i] == (plain[i].score, plain[i].length)
                playing.remove(i)
            elif step >= 3:
                np.testing.assert_array_equal(images[i], stack)
        if not playing:
            break
    assert lives_lost >= 4
    assert overridden_steps == (lives_lost if game != "MsPacman" else 0)  # it has no FIRE
    assert not playing or game != "Breakout"  # a whole game at least


def test_a_game_without_lives_is_one_episode():
    games, (plain,), _ = begin_games("Pong", 1, seed=3)
    for step in range(1500):
        action = np.array([step % 6])
        _, reward, terminated, _, overridden, _ = games.step(action)
        _, plain_reward, _, over = plain.step(action[0])
        assert not overridden
        assert reward[0] == plain_reward
        assert terminated[0] == over
        if over:
            break
    assert games.ended[0] == (plain.score, plain.length)
    assert games.ended[0][0] <= -15


def test_the_first_image_is_that_of_the_plain_emulator():
    _, plain, images = begin_games("Breakout", 2, seed=5)
    for i, one in enumerate(plain):
        screen = cv2.resize(one.ale.getScreenGrayscale(), (84, 84), interpolation=cv2.INTER_AREA)
        np.testing.assert_array_equal(images[i, 3], screen)
        assert not images[i, :3].any()


def test_games_begin_at_different_moments_and_last_half_an_hour_at_most(monkeypatch):
    games = script.AtariGames(script.Args(), 16)
    _, info = games.envs.reset(seed=0)
    assert len(set(info["episode_frame_number"].tolist())) > 5
    assert info["episode_frame_number"].max() < 30
    made = []
    monkeypatch.setattr(
        script, "AtariVectorEnv", lambda *_, **flags: made.append(flags) or games.envs
    )
    script.AtariGames(script.Args(), 16)
    assert made[0]["max_num_frames_per_episode"] == 30 * 60 * 60  # 60 frames a second
    assert not made[0]["reward_clipping"]


def test_breakout_goes_on_without_the_agent_pressing_fire():
    """And would not, if lost lives had no FIRE: the paddle waits for a ball that never comes."""
    rng = np.random.default_rng(0)
    for presses in (True, False):
        games = script.AtariGames(script.Args(), 2)
        games.fire = games.fire if presses else None
        games.reset(0)
        for _ in range(400):
            games.step(rng.choice([0, 2, 3], 2))
        assert (len(games.recent_episodes) > 0) == presses


def test_a_game_that_is_cut_off_is_truncated_with_its_last_images():
    """But for the very last: there AtariVectorEnv shows Breakout's ball, a dozen pixels, a bit
    elsewhere."""
    games, plain, _ = begin_games("Breakout", 2, seed=1, max_frames=120)
    for step in range(30):
        action = np.array([2, 3])
        images, _, terminated, truncated, _, final_images = games.step(action)
        stacks = [one.step(a) for one, a in zip(plain, action)]
        assert truncated.all() == truncated.any() == (step == 29)
    assert not terminated.any()
    for i, (stack, *_) in enumerate(stacks):
        np.testing.assert_array_equal(final_images[i][:3], stack[:3])
        assert (final_images[i][3] != stack[3]).sum() <= 45
        assert not images[i][:3].any()  # which are those of the next game
        assert games.ended[i] == (plain[i].score, 30)


def test_sticky_actions_only_on_request():
    def scores(probability):
        games = script.AtariGames(script.Args(repeat_action_probability=probability), 1)
        games.reset(0)
        rng = np.random.default_rng(0)
        return np.concatenate([games.step(rng.integers(4, size=1))[0] for _ in range(60)])

    assert script.Args().repeat_action_probability == 0
    assert np.array_equal(scores(0.0), scores(0.0))
    assert not np.array_equal(scores(0.0), scores(0.9))


@pytest.mark.parametrize(
    ("env_id", "name"),
    [
        ("Breakout", "breakout"),
        ("BreakoutNoFrameskip-v4", "breakout"),
        ("BreakoutDeterministic-v4", "breakout"),
        ("ALE/Breakout-v5", "breakout"),
        ("breakout", "breakout"),
        ("MsPacman", "ms_pacman"),
        ("ms_pacman", "ms_pacman"),
        ("ALE/UpNDown-v5", "up_n_down"),
        ("TicTacToe3D", "tic_tac_toe_3d"),
        ("WizardOfWorNoFrameskip-v4", "wizard_of_wor"),
    ],
)
def test_games_go_by_all_their_names(env_id, name):
    assert script.rom_name(env_id) == name


def test_a_run_has_the_game_by_one_name(tmp_path):
    args = script.prepare(script.Args(env_id="ALE/MsPacman-v5", runs_dir=str(tmp_path)))
    assert args.env_id == "MsPacman"
    assert args.run_name.startswith("sppo_atari__MsPacman__sppo__none__1__")


def test_evaluation_scores_whole_games_as_a_plain_emulator_does(monkeypatch):
    agent, args = script.Agent(4), script.Args(eval_episodes=2)
    nn.init.normal_(agent.actor.weight, std=0.1)
    recorded = SPPO_ATARI.record_actions(monkeypatch)
    scores, lengths = script.evaluate(agent, args, 7, None, threading.Event())
    _, plain, _ = begin_games("Breakout", 2, seed=7)
    for i, one in enumerate(plain):
        for action in recorded:
            if one.step(action[i])[3]:
                break
        assert (scores[i], lengths[i]) == (one.score, one.length)
    assert lengths.max() == len(recorded)
    choices = np.concatenate(recorded)
    assert len(set(choices.tolist())) > 1
    again, _ = script.evaluate(agent, args, 7, None, threading.Event())
    assert np.array_equal(scores, again)


class Countdown:
    """Atari's vector interface on two games, of 3 and of 20 steps, that pay 1 and 10 a step, and
    100 times as much from the second round on."""

    def __init__(self, *_, **__):
        self.ale, self.time, self.rounds = self, np.zeros(2, int), np.zeros(2, int)

    def get_action_set(self):
        return [Action.NOOP, Action.FIRE]

    def reset(self, seed):
        return np.zeros((2, 4, 84, 84), np.uint8), {"lives": np.zeros(2, int)}

    def step(self, action):
        reward = np.array([1, 10]) * np.where(self.rounds, 100, 1)
        self.time += 1
        over = self.time == [3, 20]
        self.time[over] = 0
        self.rounds += over
        return (
            np.zeros((2, 4, 84, 84), np.uint8),
            reward,
            over,
            over & False,
            {"lives": np.zeros(2, int)},
        )


def test_evaluation_counts_the_first_game_of_each(monkeypatch):
    """The last ones, or those that end first, would favour short games."""
    monkeypatch.setattr(script, "AtariVectorEnv", Countdown)
    scores, lengths = script.evaluate(
        script.Agent(2), script.Args(eval_episodes=2), 0, None, threading.Event()
    )
    assert scores.tolist() == [3, 200]
    assert lengths.tolist() == [3, 20]


@pytest.mark.usefixtures("quick_games")
def test_evaluations_of_a_run_play_different_games(setting, tmp_path, monkeypatch):
    seeds, evaluate = [], setting.script.evaluate
    monkeypatch.setattr(setting.script, "evaluate", lambda *a: seeds.append(a[2]) or evaluate(*a))
    setting.run(tmp_path, seed=5, eval_freq=128)
    assert seeds == [5 + 128, 5 + 256]


# ---- Network


def test_the_network_is_dqns_on_pixels_between_zero_and_one():
    agent = script.Agent(6)
    images = torch.randint(0, 256, (5, 4, 84, 84), dtype=torch.uint8)
    plain = nn.Sequential(
        nn.Conv2d(4, 32, 8, 4),
        nn.ReLU(),
        nn.Conv2d(32, 64, 4, 2),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(3136, 512),
        nn.ReLU(),
    )
    weights = nn.utils.parameters_to_vector([*agent.conv.parameters(), *agent.trunk.parameters()])
    nn.utils.vector_to_parameters(weights, plain.parameters())
    features = plain(images.float() / 255)
    logits, value = agent(images)
    torch.testing.assert_close(logits, agent.actor(features), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(value, agent.critic(features)[:, 0], rtol=1e-4, atol=1e-5)
    channels_last = images.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(agent(channels_last)[0], logits)


def test_weights_start_orthogonal():
    agent = script.Agent(6)
    layers = [m for m in agent.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(layers) == 6
    for layer, gain in zip(layers, [2**0.5] * 4 + [0.01, 1.0]):
        w = layer.weight.flatten(1)
        w = w if w.shape[0] <= w.shape[1] else w.T
        torch.testing.assert_close(w @ w.T, gain**2 * torch.eye(len(w)), rtol=0, atol=1e-4)
        assert not layer.bias.any()


def test_layer_norm_standardises_before_each_activation():
    agent = script.Agent(6, layer_norm=True)
    seen = []
    for layer in agent.modules():
        if isinstance(layer, nn.ReLU):
            layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    agent(torch.randint(0, 256, (3, 4, 84, 84), dtype=torch.uint8))
    assert len(seen) == 4
    for x in seen:
        torch.testing.assert_close(x.flatten(1).mean(1), torch.zeros(3), rtol=0, atol=1e-4)
        torch.testing.assert_close(
            x.flatten(1).std(1, correction=0), torch.ones(3), rtol=1e-2, atol=0
        )


def test_bfloat16_is_close_and_stays_inside():
    agent, rounded = script.Agent(4), script.Agent(4, bfloat16=True)
    nn.init.normal_(agent.actor.weight)
    rounded.load_state_dict(agent.state_dict())
    images = torch.randint(0, 256, (64, 4, 84, 84), dtype=torch.uint8)
    for exact, near in zip(agent(images), rounded(images)):
        assert near.dtype == torch.float32
        assert not torch.equal(exact, near)
        assert (exact - near).abs().mean() < 0.02 * exact.std()
    with rounded.autocast():  # as in a rollout: the last layers stay as they are
        for inside in rounded(images):
            assert inside.dtype == torch.float32
            assert (inside != inside.bfloat16()).any()


def test_autocast_is_for_bfloat16_only():
    for bfloat16 in (False, True):
        agent = script.Agent(4, bfloat16=bfloat16)
        with agent.autocast():
            assert torch.is_autocast_enabled("cpu") == bfloat16
            with agent.autocast(enabled=False):
                assert not torch.is_autocast_enabled("cpu")


def test_samples_follow_the_softmax():
    logits = torch.randn(1, 6).expand(60_000, 6)
    action = script.sample(logits, torch.Generator().manual_seed(0))
    frequency = nn.functional.one_hot(action, 6).float().mean(0)
    assert (frequency - logits[0].softmax(-1)).abs().max() < 5 * (0.25 / 60_000) ** 0.5


# ---- Gradient, and steps that are not the agent's


def some_minibatch(agent, n=48):
    images = torch.randint(0, 256, (n, 4, 84, 84), dtype=torch.uint8)
    action = torch.randint(4, (n,))
    advantage = 0.5 + torch.randn(n)
    returns = torch.randn(n)
    with torch.no_grad():
        log_prob = agent(images)[0].log_softmax(-1).gather(1, action[:, None])[:, 0]
    return images, action, log_prob + 0.2 * torch.randn(n), advantage, returns


LOSSES = {
    "ppo": dict(beta=0.0),
    "symmetric": dict(beta=3.0, z=-2.0),
    "symmetric, not divided": dict(beta=3.0, z=-2.0, divide_by_p_old=False),
}


@pytest.mark.parametrize(("max_grad_norm", "norm_adv"), [(0.2, True), (1e6, False)])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_and_metrics_are_those_of_plain_pytorch(loss, max_grad_norm, norm_adv):
    """With backward() and clip_grad_norm_; overridden steps are left out by hand, but for the
    critic."""
    torch.manual_seed(0)
    agent = script.Agent(4)
    nn.init.normal_(agent.actor.weight, std=0.1)
    flags = dict(alpha=2.0, ent_coef=0.3, vf_coef=0.7, norm_adv=norm_adv) | LOSSES[loss]
    args = script.Args(max_grad_norm=max_grad_norm, **flags)
    images, action, old_log_prob, advantage, returns = some_minibatch(agent)
    own = torch.rand(48) < 0.7
    minibatch = images, action, old_log_prob, advantage, returns, own.float()
    gradient, metrics = script.gradient_and_metrics(agent, args, torch.tensor(0.15), *minibatch)

    logits, value = agent(images)
    distribution = torch.distributions.Categorical(logits=logits[own])
    log_prob = distribution.log_prob(action[own])
    entropy = distribution.entropy().mean()
    old_log_prob = old_log_prob[own]
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()
    raw_advantage = advantage[own]
    advantage = raw_advantage
    if norm_adv:
        advantage = (raw_advantage - raw_advantage.mean()) / raw_advantage.std()
    ppo = -torch.min(advantage * ratio, advantage * torch.clamp(ratio, 0.85, 1.15)).mean()
    value_loss = nn.functional.mse_loss(value, returns)
    outside = ((ratio > 1.15) & (advantage > 0)) | ((ratio < 0.85) & (advantage < 0))
    divisor = old_log_prob.exp() if args.divide_by_p_old else 1
    reverse = -(advantage * args.z * (1 - log_prob.exp()) / divisor)[~outside].sum() / own.sum()
    (2.0 * ppo + args.beta * reverse + 0.7 * value_loss - 0.3 * entropy).backward()
    norm = nn.utils.clip_grad_norm_(agent.parameters(), max_grad_norm)
    expected = torch.cat([parameter.grad.flatten() for parameter in agent.parameters()])
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)
    assert norm > 0.3

    by_hand = {
        "policy_loss": ppo,
        # without the part that is constant
        "reverse_loss": (args.z * advantage * log_prob.exp() / divisor)[~outside].sum() / own.sum(),
        "value_loss": value_loss,
        "entropy": entropy,
        "grad_norm": norm,
        "clipped_gradients": torch.tensor(float(max_grad_norm == 0.2)),
        "advantage_sign_flips": ((raw_advantage > 0) != (advantage > 0)).float().mean(),
        "approx_kl": (ratio - 1 - log_ratio).mean(),
        "clipfrac": ((ratio < 0.85) | (ratio > 1.15)).float().mean(),
    }
    assert 0 < by_hand["clipfrac"] < 1
    assert (by_hand["advantage_sign_flips"] > 0) == norm_adv
    assert set(metrics) == set(by_hand)
    for name, metric in by_hand.items():
        torch.testing.assert_close(metrics[name], metric.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm_adv", [True, False])
@pytest.mark.parametrize("of", [script, sa2c_atari], ids=lambda module: module.__name__)
def test_a_single_step_of_the_agents_own_counts_in_full(of, norm_adv):
    """The mean over it is its own value; its advantage minus the mean is 0."""
    torch.manual_seed(0)
    agent = of.Agent(4)
    nn.init.normal_(agent.actor.weight, std=0.1)
    images, action, _, advantage, returns = some_minibatch(agent, 8)
    policy = torch.distributions.Categorical(logits=agent(images)[0].detach())
    log_prob = policy.log_prob(action)
    mask = torch.zeros(8)
    mask[3] = 1
    args = of.Args(alpha=1.0, beta=0.0, norm_adv=norm_adv)
    if of is script:
        inputs = torch.tensor(0.15), images, action, log_prob, advantage, returns, mask
        policy_loss = -advantage[3]  # at a ratio of 1
    else:
        inputs = images, action, advantage, returns, mask
        policy_loss = -advantage[3] * log_prob[3]
    _, metrics = of.gradient_and_metrics(agent, args, *inputs)
    expected = torch.zeros(()) if norm_adv else policy_loss
    torch.testing.assert_close(metrics["policy_loss"], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(metrics["entropy"], policy.entropy()[3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("max_grad_norm", "norm_adv"), [(0.2, True), (1e6, False)])
@pytest.mark.parametrize("beta", [0.0, 5.0])
def test_a2cs_gradient_and_metrics_are_those_of_plain_pytorch(beta, max_grad_norm, norm_adv):
    torch.manual_seed(0)
    agent = sa2c_atari.Agent(4)
    nn.init.normal_(agent.actor.weight, std=0.1)
    flags = dict(alpha=0.5, beta=beta, z=-2.0, ent_coef=0.3, vf_coef=0.7, norm_adv=norm_adv)
    args = sa2c_atari.Args(max_grad_norm=max_grad_norm, **flags)
    images, action, _, advantage, returns = some_minibatch(agent)
    own = torch.rand(48) < 0.7
    minibatch = images, action, advantage, returns, own.float()
    gradient, metrics = sa2c_atari.gradient_and_metrics(agent, args, *minibatch)

    logits, value = agent(images)
    distribution = torch.distributions.Categorical(logits=logits[own])
    log_prob = distribution.log_prob(action[own])
    entropy = distribution.entropy().mean()
    raw_advantage = advantage[own]
    advantage = raw_advantage
    if norm_adv:
        advantage = (raw_advantage - raw_advantage.mean()) / raw_advantage.std()
    p = log_prob.exp()
    a2c = -(advantage * log_prob).mean()
    reverse = -(advantage * -2 * (1 - p)).mean()
    value_loss = nn.functional.mse_loss(value, returns)
    (0.5 * a2c + beta * reverse + 0.7 * value_loss - 0.3 * entropy).backward()
    norm = nn.utils.clip_grad_norm_(agent.parameters(), max_grad_norm)
    expected = torch.cat([parameter.grad.flatten() for parameter in agent.parameters()])
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)
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
        torch.testing.assert_close(metrics[name], metric.detach(), rtol=1e-4, atol=1e-5)


@pytest.fixture
def rollouts(monkeypatch, setting):
    """What `train` sees and does, in lists: steps (images before, action, the step's outcome),
    minibatches (images, action, advantage, return, mask), PPO's clip ranges, learning rates of the
    optimiser's steps, and the arguments of `compute_gae`."""
    script = setting.script
    seen = {
        "steps": [],
        "minibatches": [],
        "clip": [],
        "learning_rates": [],
        "gae": [],
        "critic": [],
        "agents": [],
    }
    original = {
        name: getattr(script, name) for name in ("gradient_and_metrics", "compute_gae", "Agent")
    }

    class Games(script.AtariGames):
        def reset(self, seed):
            self.images = super().reset(seed)
            return self.images

        def step(self, action):
            outcome = super().step(action)
            if len(action) == setting.small["num_envs"]:  # not in an evaluation, of one game
                seen["steps"].append((self.images, action.copy(), outcome))
            self.images = outcome[0]
            return outcome

    def gradient_and_metrics(agent, args, *rest):
        if setting.ppo:
            seen["clip"].append(rest[0].item())
        images, action = rest[1:3] if setting.ppo else rest[:2]
        seen["minibatches"].append([x.clone() for x in (images, action, *rest[-3:])])
        return original["gradient_and_metrics"](agent, args, *rest)

    def compute_gae(*arguments):
        with torch.no_grad():
            values = {
                (t, i): seen["agents"][-1](torch.from_numpy(last[None]))[1].item()
                for t, (_, _, outcome) in enumerate(seen["steps"][-len(arguments[0]) :])
                for i, last in outcome[-1].items()
            }
            steps = seen["steps"][-len(arguments[0]) :]
            images = [images for images, *_ in steps] + [steps[-1][2][0]]
            critic = np.stack([seen["agents"][-1](torch.from_numpy(x))[1].numpy() for x in images])
        result = original["compute_gae"](*arguments)
        seen["gae"].append(([np.copy(x) for x in arguments], values, result))
        seen["critic"].append(critic)
        return result

    def agent(*arguments, **keywords):
        seen["agents"].append(original["Agent"](*arguments, **keywords))
        return seen["agents"][-1]

    step = setting.optimizer.step

    def optimizer_step(self):
        seen["learning_rates"].append(self.param_groups[0]["lr"])
        step(self)

    monkeypatch.setattr(script, "AtariGames", Games)
    monkeypatch.setattr(script, "gradient_and_metrics", gradient_and_metrics)
    monkeypatch.setattr(script, "compute_gae", compute_gae)
    monkeypatch.setattr(script, "Agent", agent)
    monkeypatch.setattr(setting.optimizer, "step", optimizer_step)
    return seen


def test_an_epoch_trains_on_every_step_once_and_on_overridden_ones_the_critic_only(
    setting, tmp_path, rollouts, monkeypatch
):
    symmetric_policy_loss = setting.script.symmetric_policy_loss
    weighted = []  # the advantages that the policy loss gets

    def recording_loss(*arguments):
        weighted.append(arguments[2 if setting.ppo else 1].clone())
        return symmetric_policy_loss(*arguments)

    monkeypatch.setattr(setting.script, "symmetric_policy_loss", recording_loss)
    one_epoch = {"update_epochs": 1} if setting.ppo else {}
    setting.run(tmp_path, norm_adv=True, num_steps=128, **one_epoch)
    acted = []
    for images, action, (_, _, _, _, overridden, _) in rollouts["steps"]:
        for i in range(2):
            acted.append((images[i].tobytes(), int(action[i]), bool(overridden[i])))
    trained = []
    for images, action, _, _, mask in rollouts["minibatches"]:
        for image, one_action, own in zip(images, action, mask):
            trained.append((image.numpy().tobytes(), one_action.item(), own.item() == 0))
    assert len(trained) == 256
    assert sorted(acted) == sorted(trained)
    assert sum(overridden for _, _, overridden in trained) >= 4  # lives lost by a beginner
    for (_, _, raw, _, mask), advantage in zip(rollouts["minibatches"], weighted, strict=True):
        own = mask == 1
        assert torch.equal(own, mask != 0)
        assert not advantage[~own].any()
        normalized = (raw[own] - raw[own].mean()) / raw[own].std()
        weight = len(mask) / own.sum()  # 1 on average over the minibatch
        torch.testing.assert_close(advantage[own], weight * normalized, rtol=1e-3, atol=1e-4)


def test_overridden_steps_are_not_in_the_logged_advantages(setting, tmp_path, monkeypatch):
    """Of 3, .9, .5, -.4, 9 and .7, with a mean of 1 but for the last two, which were overridden."""
    advantage = np.array([[3.0], [0.9], [0.5], [-0.4], [9.0], [0.7]])
    returns = np.array([[1.0], [-2.0], [3.0], [-4.0], [50.0], [-60.0]])
    step = setting.script.AtariGames.step

    def overriding_step(self, action):
        outcome = step(self, action)
        return *outcome[:4], self.length >= 5, outcome[5]

    monkeypatch.setattr(setting.script, "compute_gae", lambda *_: (advantage, returns))
    monkeypatch.setattr(setting.script.AtariGames, "step", overriding_step)
    flags = {"num_minibatches": 1} if setting.ppo else {"norm_adv": True}
    _, folder = setting.run(tmp_path, num_envs=1, num_steps=6, total_timesteps=6, **flags)
    events = EventAccumulator(str(folder)).Reload()
    assert events.Scalars("losses/advantage_largest")[0].value == 3.0
    assert events.Scalars("losses/advantage_sign_flips")[0].value == 0.5
    explained = 1 - advantage[:4].var() / returns[:4].var()
    assert events.Scalars("losses/explained_variance")[0].value == pytest.approx(explained)


def test_gae_gets_what_was_seen_and_minibatches_what_gae_gave(setting, tmp_path, rollouts):
    flags = dict(gamma=0.9, gae_lambda=0.7, norm_adv=False) | (
        {"update_epochs": 1} if setting.ppo else {}
    )
    setting.run(tmp_path, total_timesteps=64, **flags)
    (((reward, value, *_, gamma, gae_lambda), _, (advantage, returns)),) = rollouts["gae"]
    np.testing.assert_array_equal(reward, [outcome[1] for _, _, outcome in rollouts["steps"]])
    np.testing.assert_allclose(value, rollouts["critic"][0], atol=1e-5)
    assert (gamma, gae_lambda) == (0.9, 0.7)
    expected, trained = [], []
    for t, (images, action, _) in enumerate(rollouts["steps"]):
        for i in range(2):
            expected.append((images[i].tobytes(), action[i], advantage[t, i], returns[t, i]))
    for images, action, mb_advantage, mb_returns, _ in rollouts["minibatches"]:
        for sample in zip(images, action, mb_advantage, mb_returns):
            trained.append((sample[0].numpy().tobytes(), *(x.item() for x in sample[1:])))
    assert len(trained) == len(expected) == 64
    for (image, *rest), (expected_image, *expected_rest) in zip(sorted(trained), sorted(expected)):
        assert image == expected_image
        np.testing.assert_allclose(rest, expected_rest, rtol=1e-5)


@pytest.mark.usefixtures("quick_games")
def test_the_network_is_as_the_flags_say(setting, tmp_path, rollouts, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    for amp, layer_norm in (("auto", False), ("off", True)):
        setting.run(tmp_path / amp, amp=amp, layer_norm=layer_norm, total_timesteps=64)
        agent = rollouts["agents"][-1]
        assert agent.dtype == (torch.bfloat16 if amp == "auto" else torch.float32)
        assert any(isinstance(layer, nn.GroupNorm) for layer in agent.modules()) == layer_norm
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False})
    setting.run(tmp_path / "old processor", amp="auto", total_timesteps=64)
    assert rollouts["agents"][-1].dtype == torch.float32


@pytest.mark.usefixtures("quick_games")
@pytest.mark.parametrize("setting", [SPPO_ATARI], ids=str, indirect=True)
def test_learning_rate_and_clip_range_fall_linearly(setting, tmp_path, rollouts):
    setting.run(tmp_path, update_epochs=1, num_minibatches=2)
    fractions = np.repeat([1.0, 0.75, 0.5, 0.25], 2)
    np.testing.assert_allclose(rollouts["learning_rates"], 2.5e-4 * fractions)
    np.testing.assert_allclose(rollouts["clip"], 0.1 * fractions, rtol=1e-6)


@pytest.mark.usefixtures("quick_games")
@pytest.mark.parametrize("setting", [SPPO_ATARI], ids=str, indirect=True)
@pytest.mark.parametrize("stays", ["learning rate", "clip range"])
def test_learning_rate_or_clip_range_can_stay(setting, tmp_path, rollouts, stays):
    anneal = {"anneal_lr": stays != "learning rate", "anneal_clip": stays != "clip range"}
    setting.run(tmp_path, update_epochs=1, num_minibatches=2, total_timesteps=128, **anneal)
    lr, clip = np.divide(rollouts["learning_rates"], 2.5e-4), np.divide(rollouts["clip"], 0.1)
    constant, falling = (lr, clip) if stays == "learning rate" else (clip, lr)
    np.testing.assert_allclose(constant, 1, rtol=1e-6)
    np.testing.assert_allclose(falling, [1, 1, 0.5, 0.5], rtol=1e-6)


@pytest.mark.usefixtures("quick_games")
@pytest.mark.parametrize("setting", [SPPO_ATARI], ids=str, indirect=True)
def test_schedules_go_on_after_resuming(setting, tmp_path, rollouts):
    _, folder = setting.run(tmp_path, stop=StopAfter(2), update_epochs=1, num_minibatches=2)
    setting.resume(folder)
    np.testing.assert_allclose(
        rollouts["learning_rates"], 2.5e-4 * np.repeat([1.0, 0.75, 0.5, 0.25], 2)
    )


@pytest.mark.usefixtures("quick_games")
def test_scores_go_on_after_resuming(setting, tmp_path):
    _, folder = setting.run(tmp_path, stop=StopAfter(2))
    state = checkpoint(folder)
    state["finished_episodes"] = [(864.0, 1000.0)]
    torch.save(state, folder / "checkpoint.pt")
    setting.resume(folder)
    assert (864.0, 1000.0) in checkpoint(folder)["finished_episodes"]


def test_rewards_are_clipped_then_noisy_and_scores_are_raw(setting, tmp_path, rollouts):
    """Space Invaders pays 5 to 30 and more for a hit."""
    flags = {"update_epochs": 1} if setting.ppo else {}
    flags |= {"noise": "flip", "noise_level": 1.0, "num_steps": 128}
    summary, _ = setting.run(tmp_path, env_id="SpaceInvaders", **flags)
    rewards = np.concatenate([arguments[0] for arguments, _, _ in rollouts["gae"]])
    clipped = np.stack([outcome[1] for _, _, outcome in rollouts["steps"]])
    assert set(np.unique(clipped)) == {0, 1}
    np.testing.assert_array_equal(rewards, 1 - clipped)
    assert summary["final_return_mean"] >= 5
    assert summary["final_return_mean"] % 5 == 0


def test_games_that_are_cut_off_bootstrap_from_their_last_images(
    setting, tmp_path, monkeypatch, rollouts
):
    short_games = functools.partial(setting.script.AtariGames, max_frames=80)
    monkeypatch.setattr(setting.script, "AtariGames", short_games)
    setting.run(tmp_path, env_id="Pong", num_steps=64)
    for (_, _, final_value, terminated, truncated, *_), values, _ in rollouts["gae"]:
        assert set(zip(*np.nonzero(truncated & ~terminated))) == set(values)
        assert len(values) == 2 * 3
        for index, value in values.items():
            assert final_value[index] == pytest.approx(value, abs=1e-5)


def test_lost_lives_end_episodes_for_the_learner(setting, tmp_path, rollouts):
    """After one, nothing counts: the advantage is the reward less the value."""
    one_epoch = {"update_epochs": 1} if setting.ppo else {}
    setting.run(tmp_path, num_steps=128, total_timesteps=512, **one_epoch)
    lost = 0
    for (reward, value, _, terminated, _, *_), _, (advantage, _) in rollouts["gae"]:
        np.testing.assert_allclose(advantage[terminated], (reward - value[:-1])[terminated])
        lost += terminated.sum()
    assert lost >= 5


COMPILERS = [c for c in ("c++", "g++", "clang++") if shutil.which(c)]


@pytest.mark.slow
@pytest.mark.skipif(not COMPILERS, reason="--compile needs a C++ compiler")
def test_compiled_functions_compute_the_same(setting):
    script = setting.script
    flags = {"num_minibatches": 1} if setting.ppo else {}
    agent, args = script.Agent(4), script.Args(alpha=0.5, num_envs=2, num_steps=8, **flags)
    images, action, old_log_prob, *rest = some_minibatch(agent, n=16)
    agent_fn, gradient_fn = script.compiled(agent, args, images.view(8, 2, 4, 84, 84))
    assert agent_fn is not agent
    for ours, plain in zip(agent_fn(images[:2]), agent(images[:2])):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    arguments = agent, args, images, action, *rest, torch.ones(16)
    if setting.ppo:
        arguments = (
            agent,
            args,
            torch.tensor(0.1),
            images,
            action,
            old_log_prob,
            *rest,
            torch.ones(16),
        )
    gradient, metrics = script.gradient_and_metrics(*arguments)
    compiled_gradient, compiled_metrics = gradient_fn(*arguments)
    torch.testing.assert_close(compiled_gradient, gradient, rtol=1e-3, atol=1e-5)
    for name, metric in metrics.items():
        torch.testing.assert_close(compiled_metrics[name], metric, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_whole_run_on_a_gpu_in_bfloat16(setting, tmp_path):
    summary, _ = setting.run(tmp_path, device="cuda", compile=True, amp="auto")
    assert summary["finished"]
    assert summary["compile"]


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_computes_the_same_gradient(setting, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    script = setting.script
    agent = script.Agent(4)
    images, action, old_log_prob, *rest = some_minibatch(agent)
    tensors = [images, action, *rest, torch.ones(48)]
    if setting.ppo:
        tensors = [torch.tensor(0.1), images, action, old_log_prob, *rest, torch.ones(48)]
    args = script.Args(alpha=0.5, beta=1.0)
    gradient, _ = script.gradient_and_metrics(agent, args, *tensors)
    agent.to("cuda")
    on_gpu = [tensor.to("cuda") for tensor in tensors]
    gradient_there, _ = script.gradient_and_metrics(agent, args, *on_gpu)
    torch.testing.assert_close(gradient_there.cpu(), gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not COMPILERS, reason="--compile needs a C++ compiler")
def test_a_compiled_run_is_the_same_run(setting, tmp_path):
    """But for rounding, which Adam magnifies."""
    flags = {"total_timesteps": 128} | ({} if setting.ppo else {"learning_rate": 0.1})
    plain, compiled = (setting.run(tmp_path / str(x), compile=x, **flags) for x in (False, True))
    assert compiled[0]["compile"]
    assert not plain[0]["compile"]
    tolerance = 3e-3 if setting.ppo else 1e-5
    torch.testing.assert_close(weights(compiled[1]), weights(plain[1]), rtol=0, atol=tolerance)
    _, other = setting.run(tmp_path / "other", seed=2, **flags)
    assert (weights(other) - weights(plain[1])).abs().max() > 10 * tolerance


# ---- Learning


LEARNING = dict(eval_episodes=20, ent_coef=0.0)
PPO_LEARNING = dict(total_timesteps=4096, num_envs=8, num_steps=16, learning_rate=1e-3)
PPO_LEARNING |= dict(num_minibatches=4, update_epochs=3)
# RMSprop's average of squares falls from one slowly: large steps. Rewards follow at once: gamma 0.
A2C_LEARNING = dict(total_timesteps=8000, num_envs=16, num_steps=5, learning_rate=0.1, gamma=0.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [{}, {"alpha": 1.0, "beta": 0.0, "amp": "auto"}], ids=["symmetric", "plain"]
)
def test_it_learns_to_follow_signals(setting, tmp_path, monkeypatch, flags):
    monkeypatch.setattr(setting.script, "AtariVectorEnv", Signals)
    summary, _ = setting.run(
        tmp_path, **LEARNING, **(PPO_LEARNING if setting.ppo else A2C_LEARNING), **flags
    )
    assert summary["final_return_mean"] > 15


@pytest.mark.slow
def test_it_does_not_learn_from_negated_advantages(setting, tmp_path, monkeypatch):
    compute_gae = setting.script.compute_gae

    def negated(*arguments):
        advantage, returns = compute_gae(*arguments)
        return -advantage, returns

    monkeypatch.setattr(setting.script, "AtariVectorEnv", Signals)
    monkeypatch.setattr(setting.script, "compute_gae", negated)
    summary, _ = setting.run(
        tmp_path, **LEARNING, **(PPO_LEARNING if setting.ppo else A2C_LEARNING)
    )
    assert summary["final_return_mean"] < 5
