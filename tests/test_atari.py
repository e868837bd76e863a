"""What is particular to Atari: games, evaluations, network, schedules.

Text that both scripts share, which `test_repository.py` guards, is tested on `sppo_atari.py` alone.
Advantages, noise and seeds: see test_control.py."""

from types import SimpleNamespace

import ale_py
import cv2
import gymnasium as gym
import numpy as np
import pytest
import torch
from ale_py import Action
from helpers import ATARI, SPPO_ATARI, only, record
from torch import nn

import sppo_atari as script

ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)


# ---- Games, against one plain emulator each with Gymnasium's own preprocessing


class PlainGame:
    """Gymnasium's preprocessing of one emulator, brought to where AtariVectorEnv's game began:
    after one frame of FIRE, where there is such an action, and a random number of idle ones, in all
    `frames`, the only thing that the reference takes from what it checks."""

    def __init__(self, game, frames):
        env = gym.make(f"ALE/{game}-v5", frameskip=1, repeat_action_probability=0.0)
        env = gym.wrappers.AtariPreprocessing(env, noop_max=0, frame_skip=4, screen_size=84)
        self.env = gym.wrappers.FrameStackObservation(env, 4, padding_type="zero")
        self.ale = self.env.unwrapped.ale
        self.actions = self.ale.getMinimalActionSet()
        self.env.reset()
        for frame in range(frames):
            fires = frame == 0 and Action.FIRE in self.actions
            self.ale.act(Action.FIRE if fires else Action.NOOP)
        self.score, self.length, self.life_lost = 0.0, 0, False

    def step(self, action):
        """Returns images, the raw reward, whether a life or the game was lost, or the game."""
        self.overridden = self.life_lost and Action.FIRE in self.actions
        if self.overridden:
            action = self.actions.index(Action.FIRE)
        lives = self.ale.lives()
        stack, reward, over, _, _ = self.env.step(action)
        self.life_lost = 0 < self.ale.lives() < lives and not over
        self.score += reward
        self.length += 1
        return stack, reward, over or self.life_lost, over


def begin_games(game, num_games, seed, **flags):
    """Games of ours, their plain counterparts, and their first images."""
    games = script.AtariGames(script.Args(env_id=game), num_games, **flags)
    images = games.reset(seed)
    seeds = np.random.default_rng(seed).integers(2**31, size=num_games)
    again, info = games.envs.reset(seed=seeds)  # the same once more, for the number of frames
    assert np.array_equal(images, again)
    frames = info["episode_frame_number"].tolist()
    assert max(frames) < 30 and len(set(frames)) > 1  # games begin at different moments
    return games, [PlainGame(game, number) for number in frames], images


@pytest.mark.parametrize(("game", "steps"), [("Breakout", 600), ("MsPacman", 300), ("Pong", 200)])
def test_games_are_those_of_a_plain_emulator(game, steps):
    """In the first game of each. Two things cannot match: the three images before the first one,
    which AtariVectorEnv leaves black, and what follows, where the idle frames are drawn anew."""
    games, plain, images = begin_games(game, 3, seed=11)
    for i, one in enumerate(plain):
        screen = cv2.resize(one.ale.getScreenGrayscale(), (84, 84), interpolation=cv2.INTER_AREA)
        np.testing.assert_array_equal(images[i, 3], screen)
    actions = [i for i, action in enumerate(plain[0].actions) if action != Action.FIRE]
    rng = np.random.default_rng(0)
    playing, lives_lost, overridden_steps, largest = {0, 1, 2}, 0, 0, 0
    for step in range(steps):
        action = rng.choice(actions, 3)
        images, reward, ended, overridden, final_images, results = games.step(action)
        assert not final_images
        for i in sorted(playing):
            stack, raw_reward, lost, over = plain[i].step(action[i])
            assert reward[i] == np.sign(raw_reward)
            assert ended[i] == lost
            assert overridden[i] == plain[i].overridden
            assert (i in results) == over
            lives_lost += lost and not over
            overridden_steps += plain[i].overridden
            largest = max(largest, raw_reward)
            if over:
                assert results[i] == (plain[i].score, plain[i].length)
                playing.remove(i)
            elif step >= 3:
                np.testing.assert_array_equal(images[i], stack)
    assert lives_lost >= 4 or game == "Pong"  # it has no lives
    assert overridden_steps == (lives_lost if game != "MsPacman" else 0)  # it has no FIRE
    assert largest > 1 or game in ("Breakout", "Pong")
    assert not playing or game != "Breakout"  # whole games


def test_a_game_that_is_cut_off_is_truncated_with_its_last_images():
    """But for the very last: there AtariVectorEnv shows Breakout's ball a bit elsewhere."""
    games, plain, _ = begin_games("Breakout", 2, seed=1, max_frames=120)
    for step in range(30):
        action = np.array([2, 3])
        images, _, ended, _, final_images, results = games.step(action)
        stacks = [one.step(a)[0] for one, a in zip(plain, action)]
        assert len(final_images) == (2 if step == 29 else 0)
    assert ended.all()
    for i, stack in enumerate(stacks):
        np.testing.assert_array_equal(final_images[i][:3], stack[:3])
        assert (final_images[i][3] != stack[3]).sum() <= 45
        assert not images[i][:3].any()  # which are those of the next game
        assert results[i] == (plain[i].score, 30)
    assert list(games.recent_episodes) == [results[0], results[1]]
    assert games.recent_episodes.maxlen == 100
    for _ in range(30):
        games.step(action)
    assert [length for _, length in games.recent_episodes] == [30] * 4


def test_fire_does_not_follow_a_life_that_was_lost_before_a_reset(monkeypatch):
    """In games of two lives, of which the first ends with the first step. Without lives a game is
    about to end, as Q*bert is for a few frames."""
    monkeypatch.setattr(script, "AtariVectorEnv", Countdown)
    games = script.AtariGames(script.Args(), 2)
    for _ in range(2):
        games.envs.info = {"lives": np.array([2, 2])}
        games.reset(0)
        games.envs.info = {"lives": np.array([1, 0])}
        _, _, _, overridden, _, _ = games.step(np.zeros(2))
        assert not overridden.any()
        assert games.life_lost.tolist() == [True, False]


# ---- Evaluation


class Countdown:
    """Two games, of 3 and 20 steps, that pay 1 and 10 a step, in later rounds 100 times that."""

    def __init__(self, *_, **options):
        Countdown.options = options
        self.ale, self.time, self.rounds = self, np.zeros(2, int), np.zeros(2, int)
        self.images, self.info = np.zeros((2, 4, 84, 84), np.uint8), {"lives": np.zeros(2, int)}

    def get_action_set(self):
        return [Action.NOOP, Action.FIRE]

    def reset(self, seed):
        return self.images, self.info

    def step(self, action):
        reward = np.array([1, 10]) * np.where(self.rounds, 100, 1)
        self.time += 1
        over = self.time == [3, 20]
        self.time[over] = 0
        self.rounds += over
        return self.images, reward, over, np.zeros(2, bool), self.info


def test_evaluation_counts_the_first_game_of_each(monkeypatch):
    """Others would favour short games. Noise has no part; after half an hour it is cut off."""
    monkeypatch.setattr(script, "AtariVectorEnv", Countdown)
    args = script.Args(noise="flip", noise_level=1.0, repeat_action_probability=0.25)
    scores, lengths = script.evaluate(script.Agent(2), script.AtariGames(args, 2), 0)
    assert scores.tolist() == [3, 200]
    assert lengths.tolist() == [3, 20]
    assert Countdown.options["repeat_action_probability"] == 0.25
    assert Countdown.options["max_num_frames_per_episode"] == 30 * 60 * 60


# ---- Network


def test_the_network_is_dqns_on_pixels_between_zero_and_one_and_starts_orthogonal():
    agent = script.Agent(6)
    images = torch.randint(0, 256, (5, 4, 84, 84), dtype=torch.uint8)
    convolutions = nn.Conv2d(4, 32, 8, 4), nn.Conv2d(32, 64, 4, 2), nn.Conv2d(64, 64, 3, 1)
    layers = [layer for convolution in convolutions for layer in (convolution, nn.ReLU())]
    plain = nn.Sequential(*layers, nn.Flatten(), nn.Linear(3136, 512), nn.ReLU())
    shared = nn.utils.parameters_to_vector([*agent.conv.parameters(), *agent.trunk.parameters()])
    nn.utils.vector_to_parameters(shared, plain.parameters())
    features = plain(images.float() / 255)
    logits, value = agent(images)
    torch.testing.assert_close(logits, agent.actor(features), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(value, agent.critic(features)[:, 0], rtol=1e-4, atol=1e-5)
    layers = [m for m in agent.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    for layer, gain in zip(layers, [2**0.5] * 4 + [0.01, 1.0], strict=True):
        w = layer.weight.detach().flatten(1)
        w = w if w.shape[0] <= w.shape[1] else w.T
        torch.testing.assert_close(w @ w.T, gain**2 * torch.eye(len(w)), rtol=0, atol=1e-5)
        assert not layer.bias.any()


def test_bfloat16_changes_outputs_little_and_does_not_reach_the_last_layers():
    agent, rounded = script.Agent(4), script.Agent(4, bfloat16=True)
    nn.init.normal_(agent.actor.weight)
    rounded.load_state_dict(agent.state_dict())
    images = torch.randint(0, 256, (64, 4, 84, 84), dtype=torch.uint8)
    for exact, near in zip(agent(images), rounded(images)):
        assert not torch.equal(exact, near)
        assert (exact - near).abs().mean() < 0.02 * exact.std()
    with rounded.autocast():  # as in a rollout: the last layers stay as they are
        assert torch.is_autocast_enabled("cpu")
        for inside in rounded(images):
            assert inside.dtype == torch.float32
            assert (inside != inside.bfloat16()).any()


CPUS = [  # --amp, what a CPU can do, whether the network is in bfloat16
    ("auto", "avx512_bf16", True),
    ("auto", "avx512_bf16 avx512_fp16", False),  # Intel's, AMX hidden: bfloat16 is slower
    ("auto", "avx512_bf16 avx512_fp16 amx_bf16", True),
    ("auto", "", False),
    ("off", "avx512_bf16", False),
]


@only(*ATARI)
@pytest.mark.parametrize(("amp", "able", "bfloat16"), CPUS)
@pytest.mark.usefixtures("signals")
def test_the_network_is_as_the_flags_say(setting, tmp_path, monkeypatch, amp, able, bfloat16):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(able.split(), True))
    losses = record(monkeypatch, setting.script, "loss_and_metrics")
    setting.run(tmp_path, amp=amp, total_timesteps=64)
    (agent, *_), _ = losses[0]
    assert agent.dtype == (torch.bfloat16 if bfloat16 else torch.float32)


def test_samples_follow_the_softmax():
    torch.manual_seed(0)
    logits = torch.randn(1, 6).expand(60_000, 6)
    noise = script.sample_gumbel(logits.shape, torch.Generator().manual_seed(0))
    action = (logits + noise).argmax(-1)
    frequency = nn.functional.one_hot(action, 6).float().mean(0)
    assert (frequency - logits[0].softmax(-1)).abs().max() < 5 * (0.25 / 60_000) ** 0.5


class Biased(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.logits = nn.Parameter(p.log())

    def forward(self, images):
        return self.logits.expand(len(images), -1), None


def test_an_evaluation_samples_actions():
    """In each game by itself."""
    p, actions = torch.tensor([0.6, 0.3, 0.1]), []

    def step(action):
        actions.append(action)
        return images, dict.fromkeys(range(2), (0.0, 0.0)) if len(actions) == 10_000 else {}

    images = np.zeros((2, 4, 84, 84), np.uint8)
    games = SimpleNamespace(num_games=2, reset=lambda seed: images, step=step)
    script.evaluate(Biased(p), games, 0)
    frequency = nn.functional.one_hot(torch.from_numpy(np.array(actions))).float().mean(0)
    assert (frequency - p).abs().max() < 5 * (0.25 / 10_000) ** 0.5
    first, second = np.transpose(actions)
    assert (first == second).mean() == pytest.approx(p.square().sum().item(), abs=0.03)


def test_a_flip_has_its_rate_and_three_outcomes():
    reward = np.tile([-1.0, 0.0, 1.0], (60_000, 1))
    noisy = script.perturb_reward(reward, "flip", 0.1, np.random.default_rng(0))
    for column, clean, flipped in zip(noisy.T, [-1, 0, 1], [2, 1, 0]):
        assert set(column) == {clean, flipped}
        assert (column == flipped).mean() == pytest.approx(0.1, abs=0.005)
    assert len(np.unique(noisy != reward, axis=0)) == 8  # each by itself
    assert not np.shares_memory(reward, script.perturb_reward(reward, "none", 0.0, None))


# ---- What `train` does


@pytest.mark.parametrize(("anneal_lr", "anneal_clip"), [(True, False), (False, True)])
def test_what_is_annealed_falls_linearly(tmp_path, monkeypatch, signals, anneal_lr, anneal_clip):
    """Learning rate, or clip range, also in a run that was interrupted."""
    annealed = []

    def noting_update(agent, args, optimizer, *more):
        annealed.append([optimizer.param_groups[0]["lr"], more[-1].item()])
        return update(agent, args, optimizer, *more)

    update = script.update
    monkeypatch.setattr(script, "update", noting_update)
    flags = {"anneal_lr": anneal_lr, "anneal_clip": anneal_clip, "checkpoint_freq": 16}
    SPPO_ATARI.interrupt(tmp_path, rollouts=2, **flags)
    SPPO_ATARI.run(tmp_path, **flags)
    learning_rates, clip_coefs = np.transpose(annealed)
    falling, constant = np.array([1.0, 0.75, 0.5, 0.25]), np.ones(4)
    np.testing.assert_allclose(learning_rates, 2.5e-4 * (falling if anneal_lr else constant))
    np.testing.assert_allclose(clip_coefs, 0.1 * (falling if anneal_clip else constant), rtol=1e-6)
