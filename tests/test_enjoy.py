"""enjoy.py: plays the agents of runs by the runs' own copies of the scripts, and films them."""

import importlib
import re
import sys

import ale_py.vector_env
import gymnasium as gym
import helpers
import imageio.v3
import numpy as np
import pytest
import torch
from helpers import ATARI, SA2C_ATARI, SETTINGS, SPPO_CONTINUOUS, Signals, only, progress, record

import enjoy


@pytest.fixture
def watch(monkeypatch, capsys, tmp_path, signals):
    """Runs enjoy.py with words in `tmp_path`. Returns (what it exits with, output, errors)."""
    monkeypatch.chdir(tmp_path)
    for each in SETTINGS:  # which a copy replaces
        monkeypatch.setitem(sys.modules, str(each), each.script)
    monkeypatch.setattr(sys, "path", [*sys.path])
    # Copies import it from there
    monkeypatch.setattr(ale_py.vector_env, "AtariVectorEnv", Signals)

    def watch(*words):
        return helpers.call_main(monkeypatch, enjoy, *words), *capsys.readouterr()

    return watch


def test_enjoy_prints_the_score_of_the_evaluation(setting, watch, tmp_path, capsys):
    """With its seed, of a run at work and of a finished one, and changes no file."""

    def check(folder):
        before = {path: helpers.sha256(path) for path in folder.iterdir()}
        row = progress(folder)[-1]
        capsys.readouterr()
        end, out, err = watch(folder, "--episodes", 3, "--seed", 1 + int(row["step"]))
        score = f"{row['return_mean']:.1f} (standard deviation {row['return_std']:.1f})"
        assert end == 0
        measures = [f"length_mean: {row['length_mean']:.4g}\n"]
        if "success_rate" in row:
            measures.append(f"success_rate: {row['success_rate']:.4g}\n")
        assert out == f"{''.join(measures)}{folder}: return {score}\n"
        assert err == ""
        assert {path: helpers.sha256(path) for path in folder.iterdir()} == before

    flags = {"eval_freq": 64, "eval_episodes": 3, "total_timesteps": 128}
    check(setting.interrupt(tmp_path, 1, **flags))
    check(setting.run(tmp_path, **flags)[1])


@only(SPPO_CONTINUOUS)
def test_enjoy_plays_in_another_environment_by_a_script_that_was_a_link(setting, watch, tmp_path):
    """With its arguments beside the run's own."""
    limits = ['{"max_episode_steps": 7}', '{"max_episode_steps": 4}']
    _, folder = setting.run(tmp_path, env_id="HalfCheetah-v4", env_kwargs=limits[0])
    (folder / "stored").write_bytes((folder / "sppo_continuous.py").read_bytes())
    path = folder / "sessions.jsonl"
    path.write_text(
        path.read_text().replace('"script": "sppo_continuous.py"', '"script": "stored"')
    )
    assert "length_mean: 7\n" in watch(folder)[1]
    assert "length_mean: 4\n" in watch(folder, "--env-kwargs", limits[1])[1]


@only(*ATARI)
@pytest.mark.parametrize(("amp", "expected"), [("auto", torch.bfloat16), ("off", torch.float32)])
def test_an_agent_computes_as_in_its_training(setting, watch, tmp_path, monkeypatch, amp, expected):
    """In bfloat16 where the hardware has it, and unless `--amp off`."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    agents = record(monkeypatch, setting.script, "Agent")
    _, folder = setting.run(tmp_path, total_timesteps=64, amp=amp)
    assert agents[0][1].dtype == expected
    first_layers = record(monkeypatch, torch, "conv2d")
    assert watch(folder, "--episodes", 1)[0] == 0
    assert first_layers[0][1].dtype == expected


# ---- Films


@pytest.mark.slow
def test_a_film_of_a_run_at_work(setting, watch, tmp_path):
    """Of the first episode only, in a size that players can show."""
    if not setting.atari:
        pytest.importorskip("Box2D", reason="no wheel for Python 3.14")
    flags = {"env_id": setting.video_env, "eval_freq": 64, "total_timesteps": 128}
    folder = setting.interrupt(tmp_path, 1, **flags)
    end, out, _ = watch(folder, "--episodes", 2, "--video")
    assert end == 0
    kept, length = map(int, re.search(r"mp4, (\d+) frames of (\d+) steps", out).groups())
    assert kept == length - setting.atari  # the last image is the next game's first
    frames = imageio.v3.imread(folder / "video/seed-1.mp4")
    assert len(frames) in (kept - 1, kept)  # moviepy may leave out the last one
    assert not (np.array(frames.shape[1:3]) % 2).any()


# ---- In other code


@only(SPPO_CONTINUOUS, SA2C_ATARI)
def test_an_agent_acts_in_other_code_as_in_its_evaluations(setting, watch, tmp_path):
    """Those on Atari sample: this one knows nothing yet. Those in control are greedy and clean."""
    flags = {"noise": "normal", "noise_level": 1.0, "eval_episodes": 2}
    summary, folder = setting.run(tmp_path, **flags)
    act = enjoy.load_agent(folder, seed=3)
    if setting.atari:
        games = setting.script.AtariGames(setting.args(tmp_path), 1)
        obs = games.reset(0)[0]
        assert len({act(obs) for _ in range(20)}) == games.num_actions
        with pytest.raises(ValueError, match=r"one obs.+ uint8 \(4, 84, 84\), not float64"):
            act(obs / 255)
    else:
        env = gym.make(setting.small["env_id"])
        scores = []
        for seed in (1 + 256, None):  # that of the run plus the step
            obs, _ = env.reset(seed=seed)
            score = 0
            over = False
            while not over:
                obs, reward, terminated, truncated, _ = env.step(act(obs))
                score += reward
                over = terminated or truncated
            scores.append(score)
        assert summary["return_mean"] == pytest.approx(np.mean(scores), rel=1e-6)
        assert summary["return_std"] == pytest.approx(np.std(scores), rel=1e-6)
        with pytest.raises(ValueError, match="observation not finite"):
            act([np.inf, *obs[1:]])
    with pytest.raises(ValueError, match="act needs one observation"):
        act([obs, obs])


ENVIRONMENT = """
import gymnasium as gym
from gain_elsewhere import GAIN

class Push(gym.Env):
    observation_space = gym.spaces.Box(-9, 9, (2,))
    action_space = gym.spaces.Box(-2, 3, (1,))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        over = self.np_random.random() < 0.1
        return self.observation_space.sample(), GAIN * action[0], over, False, {}

gym.register("Push-v0", Push)
"""


def test_an_agent_finds_its_environment_where_the_run_did(watch, tmp_path, monkeypatch, capsys):
    """Without PYTHONPATH. To act, it needs none: agent.safetensors has the bounds of actions."""
    path = [*sys.path]

    def forget():
        sys.path[:] = path
        for name in ("pushing", "pushing.envs", "gain_elsewhere"):
            sys.modules.pop(name, None)
        gym.registry.pop("Push-v0", None)
        importlib.invalidate_caches()

    module = tmp_path / "a/pushing/envs.py"
    helper = tmp_path / "b/gain_elsewhere.py"
    for file, text in {module: ENVIRONMENT, helper: "GAIN = 1000.0"}.items():
        file.parent.mkdir(parents=True)
        file.write_text(text)
    sys.path[:0] = [str(tmp_path / "a"), str(helper.parent)]
    flags = {"env_id": "pushing.envs:Push-v0", "total_timesteps": 64}
    SPPO_CONTINUOUS.script.prepare(SPPO_CONTINUOUS.args(tmp_path, **flags))  # imports them
    _, folder = SPPO_CONTINUOUS.run(tmp_path / "runs", **flags)
    helper.write_text("GAIN = 1000.0\n")
    forget()
    capsys.readouterr()
    act = enjoy.load_agent(folder)
    warning = f"warning: {helper} has changed since this run\n"
    assert capsys.readouterr().err == warning
    assert not {"pushing.envs", "gain_elsewhere"} & set(sys.modules)
    end, out, err = watch()  # the newest run
    assert end == 0
    assert err == warning
    assert "return" in out
    forget()
    module.unlink()
    action = enjoy.load_agent(folder)([0.0, 1.0])
    assert action == act([0.0, 1.0])
    assert -2 <= action[0] <= 3
