"""What is particular to Atari: games, evaluations, network, schedules.

Text that both scripts share, which `test_repository.py` guards, is tested on `sppo_atari.py` alone.
Advantages, noise and seeds: see test_control.py."""

import ale_py
import cv2
import gymnasium as gym
import numpy as np
import pytest
import torch
from ale_py import Action
from helpers import SPPO_ATARI
from numpy.testing import assert_allclose, assert_array_equal
from pytest import approx
from scipy import stats
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
        self.score = 0.0
        self.length = 0
        self.life_lost = False

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
    assert max(frames) < 30
    assert len(set(frames)) > 1  # games begin at different moments
    return games, [PlainGame(game, number) for number in frames], images


@pytest.mark.parametrize(("game", "steps"), [("Breakout", 600), ("MsPacman", 300), ("Pong", 200)])
def test_games_are_those_of_a_plain_emulator(game, steps):
    """In the first game of each. Two things cannot match: the three images before the first one,
    which AtariVectorEnv leaves black, and what follows, where the idle frames are drawn anew."""
    games, plain, images = begin_games(game, 3, seed=11)
    for i, one in enumerate(plain):
        screen = cv2.resize(one.ale.getScreenGrayscale(), (84, 84), interpolation=cv2.INTER_AREA)
        assert_array_equal(images[i, 3], screen)
    actions = [i for i, action in enumerate(plain[0].actions) if action != Action.FIRE]
    rng = np.random.default_rng(0)
    playing = {0, 1, 2}
    seen = []
    for step in range(steps):
        action = rng.choice(actions, 3)
        images, reward, ended, overridden, final_images, results = games.step(action)
        assert not final_images
        for i in sorted(playing):
            stack, raw_reward, lost, over = plain[i].step(action[i])
            seen.append([raw_reward, lost, plain[i].overridden])
            assert reward[i] == np.sign(raw_reward)
            assert ended[i] == lost
            assert overridden[i] == plain[i].overridden
            assert (i in results) == over
            if over:
                assert results[i] == (plain[i].score, plain[i].length)
                playing.remove(i)
            elif step >= 3:
                assert_array_equal(images[i], stack)
    rewards, lives_lost, overridden_steps = np.transpose(seen)
    if game != "Pong":  # it has no lives
        assert lives_lost.sum() >= 4
    if game == "Breakout":
        assert not playing  # whole games
        assert overridden_steps.sum() >= 4
    if game == "MsPacman":  # it has no FIRE
        assert rewards.max() > 1


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
        assert_array_equal(final_images[i][:3], stack[:3])
        assert (final_images[i][3] != stack[3]).sum() <= 45
        assert not images[i][:3].any()  # which are those of the next game
        assert results[i] == (plain[i].score, 30)


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
    """Two games, of 1,000 and 5,000 steps, that pay 1 and 10 a step, in later rounds 100 times
    that."""

    def __init__(self, *_, **options):
        Countdown.options = options
        self.ale = self
        self.actions = []
        self.time = np.zeros(2, int)
        self.rounds = np.zeros(2, int)
        self.images = np.zeros((2, 4, 84, 84), np.uint8)
        self.info = {"lives": np.zeros(2, int)}

    def get_action_set(self):
        return [Action.NOOP, Action.FIRE]

    def reset(self, seed):
        return self.images, self.info

    def step(self, action):
        self.actions.append(action)
        reward = np.array([1, 10]) * np.where(self.rounds, 100, 1)
        self.time += 1
        over = self.time == [1_000, 5_000]
        self.time[over] = 0
        self.rounds += over
        return self.images, reward, over, np.zeros(2, bool), self.info


class Biased(nn.Module):
    """Fires with a probability of 0.8."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([0.2, 0.8]).log())

    def forward(self, images):
        return self.logits.expand(len(images), -1), None


def test_an_evaluation_samples_and_counts_the_first_game_of_each(monkeypatch):
    """Others would favour short games. Noise has no part; after half an hour it is cut off. In each
    game actions are drawn by themselves."""
    monkeypatch.setattr(script, "AtariVectorEnv", Countdown)
    args = script.Args(noise="flip", noise_level=1.0, repeat_action_probability=0.25)
    games = script.AtariGames(args, 2)
    scores, lengths = script.evaluate(Biased(), games, 0)
    assert scores.tolist() == [1_000, 50_000]
    assert lengths.tolist() == [1_000, 5_000]
    again = 100_000, 1_000
    assert set(games.recent_episodes) == {(1_000, 1_000), again, (50_000, 5_000)}
    assert games.recent_episodes.maxlen == 100
    assert Countdown.options["repeat_action_probability"] == 0.25
    assert Countdown.options["max_num_frames_per_episode"] == 30 * 60 * 60
    first, second = np.transpose(games.envs.actions)
    assert first.mean() == approx(0.8, abs=0.03)
    assert second.mean() == approx(0.8, abs=0.03)
    assert (first == second).mean() == approx(0.2**2 + 0.8**2, abs=0.03)


# ---- Network


def test_the_network_starts_orthogonal():
    """What it computes: see test_stable_baselines3.py."""
    layers = [m for m in script.Agent(6).modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    for layer, gain in zip(layers, [2**0.5] * 4 + [0.01, 1.0], strict=True):
        weight = layer.weight.detach().flatten(1)
        shorter = weight if weight.shape[0] <= weight.shape[1] else weight.T
        expected = gain**2 * torch.eye(len(shorter))
        torch.testing.assert_close(shorter @ shorter.T, expected, rtol=0, atol=1e-5)
        assert not layer.bias.any()


def test_bfloat16_changes_outputs_little_and_does_not_reach_the_last_layers():
    agent = script.Agent(4)
    rounded = script.Agent(4, bfloat16=True)
    nn.init.normal_(agent.actor.weight)
    rounded.load_state_dict(agent.state_dict())
    images = torch.randint(0, 256, (64, 4, 84, 84), dtype=torch.uint8)
    with rounded.autocast():  # as in a rollout
        assert torch.is_autocast_enabled("cpu")
        outputs = rounded(images)
    for exact, near in zip(agent(images), outputs):
        assert near.dtype == torch.float32
        assert (near != near.bfloat16()).any()
        assert not torch.equal(exact, near)
        assert (exact - near).abs().mean() < 0.02 * exact.std()


@pytest.mark.parametrize(
    ("able", "faster"),
    [
        ("avx512_bf16", True),
        ("avx512_bf16 avx512_fp16", False),  # Intel's, AMX hidden
        ("avx512_bf16 avx512_fp16 amx_bf16", True),
        ("", False),
    ],
)
def test_bfloat16_is_chosen_where_it_is_faster(monkeypatch, able, faster):
    """Whether a network then is in bfloat16: see test_enjoy.py."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(able.split(), True))
    assert script.has_bfloat16(torch.device("cpu")) == faster


def test_samples_follow_the_softmax():
    """Which the arg max of logits plus such numbers does."""
    numbers = script.sample_gumbel((60_000,), torch.Generator().manual_seed(0))
    assert stats.kstest(numbers, stats.gumbel_r.cdf).pvalue > 1e-3


def test_a_flip_has_its_rate_and_three_outcomes():
    reward = np.tile([-1.0, 0.0, 1.0], (60_000, 1))
    noisy = script.perturb_reward(reward, "flip", 0.1, np.random.default_rng(0))
    flipped = noisy != reward
    assert_array_equal(noisy[flipped], 1 - reward[flipped])
    assert flipped.mean(axis=0) == approx(0.1, abs=0.005)
    assert len(np.unique(flipped, axis=0)) == 8  # each by itself


# ---- What `train` does


@pytest.mark.parametrize(("anneal_lr", "anneal_clip"), [(True, False), (False, True)])
def test_what_is_annealed_falls_linearly(tmp_path, monkeypatch, signals, anneal_lr, anneal_clip):
    """Learning rate, or clip range, also in a run that was interrupted."""
    rates = []
    ranges = []
    update = script.update

    def noting_update(agent, args, optimizer, *more):
        rates.append(optimizer.param_groups[0]["lr"])
        ranges.append(more[-1].item())
        return update(agent, args, optimizer, *more)

    monkeypatch.setattr(script, "update", noting_update)
    flags = {"anneal_lr": anneal_lr, "anneal_clip": anneal_clip, "checkpoint_freq": 16}
    SPPO_ATARI.interrupt(tmp_path, rollouts=2, **flags)
    SPPO_ATARI.run(tmp_path, **flags)
    falling = np.array([1.0, 0.75, 0.5, 0.25])
    constant = np.ones(4)
    assert_allclose(rates, 2.5e-4 * (falling if anneal_lr else constant))
    assert_allclose(ranges, 0.1 * (falling if anneal_clip else constant), rtol=1e-6)
