"""enjoy.py: plays the agents of runs by the runs' own copies of the scripts, and films them."""

import contextlib
import importlib
import io
import os
import random
import re
import sys
from dataclasses import replace
from pathlib import Path

import ale_py.vector_env
import gymnasium as gym
import helpers
import imageio.v3
import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import SA2C_ATARI, SETTINGS, SPPO_ATARI, SPPO_CONTINUOUS, Signals, progress, record

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
        monkeypatch.setattr(sys, "argv", ["enjoy.py", *map(str, words)])
        end = 0
        try:
            enjoy.main()
        except SystemExit as exit_:
            end = exit_.code
        return end, *capsys.readouterr()

    return watch


def test_enjoy_prints_the_score_of_the_evaluation(setting, watch, tmp_path, capsys):
    """With its seed, of a run at work and of a finished one, and changes no file."""
    flags = {"eval_freq": 64, "eval_episodes": 3, "total_timesteps": 128}
    runs = [lambda: setting.interrupt(tmp_path, 1, **flags), lambda: setting.run(tmp_path, **flags)]
    for run in runs:
        run()
        (folder,) = tmp_path.glob("*__*")
        before = {path: helpers.sha256(path) for path in folder.iterdir()}
        row = progress(folder)[-1]
        capsys.readouterr()
        end, out, err = watch(folder, "--episodes", 3, "--seed", 1 + int(row["step"]))
        score = f"{row['return_mean']:.1f} (standard deviation {row['return_std']:.1f})"
        assert (end, out, err) == (0, f"{folder}: return {score}\n", "")
        assert {path: helpers.sha256(path) for path in folder.iterdir()} == before


@pytest.mark.parametrize("setting", [SPPO_ATARI, SA2C_ATARI], ids=str)
@pytest.mark.parametrize(("amp", "expected"), [("auto", torch.bfloat16), ("off", torch.float32)])
def test_an_agent_computes_as_in_its_training(setting, watch, tmp_path, monkeypatch, amp, expected):
    """In bfloat16 where the hardware has it, and unless `--amp off`."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    _, folder = setting.run(tmp_path, total_timesteps=64, amp=amp)
    first_layers = record(monkeypatch, torch, "conv2d")
    assert watch(folder, "--episodes", 1)[0] == 0
    assert first_layers[0][1].dtype == expected


@pytest.mark.parametrize("setting", [SPPO_CONTINUOUS, SA2C_ATARI], ids=str)
def test_an_edited_copy_plays_and_a_changed_helper_is_named(setting, watch, tmp_path, monkeypatch):
    """The copy cuts an argument when it begins, which is recorded, and not cut again."""
    monkeypatch.syspath_prepend(tmp_path)
    helper = tmp_path / f"helper_of_{setting}.py"
    helper.write_text("BONUS = 1000.0\n")
    path = tmp_path / f"my_{setting}.py"
    text = Path(setting.script.__file__).read_text()
    returned = "    return results[:, 0]," if setting.atari else "    return returns,"
    imported = "import numpy as np\n"
    converting = "    def __post_init__(self):\n"
    for edited in (returned, imported, converting):
        assert text.count(edited) == 1
    text = text.replace(imported, f"{imported}from {helper.stem} import BONUS\n")
    text = text.replace(converting, f"    sizes: tuple[int, ...] = (64,)\n\n{converting}")
    text = text.replace(converting, f"{converting}        self.env_id = self.env_id[2:]\n")
    path.write_text(text.replace(returned, f"{returned[:-1]} + BONUS,"))
    script = importlib.import_module(path.stem)
    flags = {"total_timesteps": 64, "env_id": f"a/{setting.small['env_id']}"}
    summary, folder = replace(setting, script=script).run("runs", **flags)
    assert summary["return_mean"] > 900
    assert enjoy.load_run(folder)[1].sizes == (64,)  # not a list, which adds otherwise
    older = Path("runs/older/agent.safetensors")
    older.parent.mkdir()
    older.touch()
    os.utime(older, (0, 0))
    end, out, err = watch()  # the newest run
    assert (end, err) == (0, "")
    assert float(out.split("return ")[1].split()[0]) > 900
    helper.write_text("BONUS = 0.0\n")
    importlib.invalidate_caches()
    del sys.modules[helper.stem]
    _, out, err = watch(folder)
    assert err == f"warning: {helper} has changed since this run\n"
    assert float(out.split("return ")[1].split()[0]) < 900


def test_what_cannot_be_played_is_named(watch, tmp_path, monkeypatch):
    assert watch()[0] == "error: no agent in runs/; a run saves one at its first evaluation"
    with contextlib.redirect_stdout(io.StringIO()):  # as a notebook's
        assert watch(tmp_path)[0].startswith(f"error: {tmp_path}: not a run")
    folder = SPPO_CONTINUOUS.interrupt(tmp_path, 0)
    assert watch(folder)[0].startswith(f"error: {folder}: no agent yet")
    monkeypatch.setitem(sys.modules, "moviepy", None)
    assert watch("--video")[0] == "error: --video needs moviepy: pip install moviepy"
    for words in (["--episodes", 0], ["--seed", -1], ["--seed", 2**32]):
        assert watch(*words)[0].startswith("error: --episodes must be at least 1, and --seed from")


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
    assert out.splitlines()[-1].startswith(f"film: {folder / 'video' / 'seed-1.mp4'}, ")
    (film,) = (folder / "video").iterdir()
    kept, length = map(int, re.search(r"(\d+) frames of (\d+) steps", out).groups())
    assert kept == length - setting.atari  # the last image is the next game's first
    frames = imageio.v3.imread(film)
    assert not (np.array(frames.shape[1:3]) % 2).any()
    assert len(frames) > 3
    assert (frames[0] != frames[-1]).any()


class OddEnv(gym.Env):
    """All frames are one buffer, of odd size: a bar that grows. Rewards are global generators'."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))
    action_space = gym.spaces.Box(-1, 1, (2,))
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, render_mode=None):
        self.render_mode = render_mode
        self.frame = np.zeros((65, 67, 3), np.uint8)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        self.frame[:] = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.time += 1
        self.frame[:, : self.time * 6] = 255
        reward = random.random() + np.random.random() + torch.rand(1).item()
        return np.zeros(2, np.float32), reward, self.time == 10, False, {}

    def render(self):
        return self.frame


gym.register("Odd-v0", OddEnv)


def test_two_plays_of_one_seed_are_the_same_and_a_long_film_is_cut(watch, tmp_path, monkeypatch):
    """Frames are copied, and of even size. A sentence says why one cannot be filmed."""
    _, folder = SPPO_CONTINUOUS.run(tmp_path, env_id="Odd-v0", total_timesteps=64)
    score, film = watch(folder, "--video")[1].splitlines()[-2:]
    path = folder / "video/seed-1.mp4"
    assert film == f"film: {path}, 10 frames of 10 steps"
    frames = imageio.v3.imread(path)
    assert frames.shape[1:] == (64, 66, 3)
    assert len(frames) in (9, 10)  # moviepy may leave out the last one
    widths = (frames[:, 0, :, 0] > 128).sum(1)
    assert (abs(np.diff(widths) - 6) <= 2).all()
    monkeypatch.setattr(enjoy, "MAX_FRAMES", 4)
    again = watch(folder, "--video")[1].splitlines()[-2:]
    assert again == [score, f"film: {path}, 4 frames of 10 steps"]
    for picture in (None, np.zeros((8, 8), np.uint8)):
        monkeypatch.setattr(OddEnv, "render", lambda _, picture=picture: picture)
        assert watch(folder, "--video")[0].startswith("error: no film: render() must return images")
    begin = OddEnv.__init__
    monkeypatch.setattr(OddEnv, "__init__", lambda self: begin(self))
    with pytest.raises(TypeError, match="unexpected keyword argument 'render_mode'"):
        watch(folder, "--video")


@pytest.mark.parametrize(("env_id", "follows"), [("Hopper-v4", True), ("Reacher-v4", False)])
def test_films_follow_agents_that_move_away(env_id, follows, watch, tmp_path, monkeypatch):
    """By the only camera of the model, if it has one. They need no display."""
    monkeypatch.setitem(os.environ, "MUJOCO_GL", "osmesa")
    del os.environ["MUJOCO_GL"]
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    _, folder = SPPO_CONTINUOUS.run(tmp_path, env_id=env_id, total_timesteps=64)
    keep_frames = record(monkeypatch, enjoy, "keep_frames")
    picture = np.zeros((8, 8, 3), np.uint8)
    renderer = gym.envs.mujoco.mujoco_rendering.MujocoRenderer
    monkeypatch.setattr(renderer, "render", lambda *_: picture)
    assert watch(folder, "--episodes", 1, "--video")[0] == 0
    (((env, *_), _),) = keep_frames
    assert env.unwrapped.mujoco_renderer.camera_id == (0 if follows else -1)
    assert os.environ["MUJOCO_GL"] == "egl"


# ---- In other code


@pytest.mark.parametrize("setting", [SPPO_CONTINUOUS, SA2C_ATARI], ids=str)
def test_an_agent_acts_in_other_code_as_in_its_evaluations(setting, watch, tmp_path, capsys):
    """Twice in one process, without a warning, and so that its script finds its run again."""
    _, folder = setting.run(tmp_path, total_timesteps=128)
    capsys.readouterr()
    for _ in range(2):
        act = enjoy.load_agent(folder, seed=3)
        script = setting.script
        if setting.atari:
            games = script.AtariGames(setting.args(tmp_path), 1)
            obs, *others = [games.reset(i)[0] for i in range(20)]
            actions = {act(other) for other in others}
            assert len(actions) == games.num_actions  # sampled by an agent that knows nothing
            with pytest.raises(ValueError, match=r"one obs.+ uint8 \(4, 84, 84\), not float64"):
                act(obs / 255)
        else:
            with contextlib.closing(script.make_env(setting.args(tmp_path))) as env:
                row = progress(folder)[-1]
                obs, _ = env.reset(seed=1 + int(row["step"]))
                score, over = 0, False
                while not over:
                    obs, reward, terminated, truncated, _ = env.step(act(obs))
                    score += reward
                    over = terminated or truncated
            assert score == pytest.approx(row["return_mean"])
            for number in (np.nan, np.inf, -np.inf):
                with pytest.raises(ValueError, match="observation not finite"):
                    act([number, *obs[1:]])
        with pytest.raises(ValueError, match="act needs one observation"):
            act([obs, obs])
    assert capsys.readouterr().err == ""
    assert setting.folder(tmp_path, total_timesteps=128) == folder


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

    module, helper = tmp_path / "a/pushing/envs.py", tmp_path / "b/gain_elsewhere.py"
    for file, text in ((module, ENVIRONMENT), (helper, "GAIN = 1000.0")):
        file.parent.mkdir(parents=True)
        file.write_text(text)
    sys.path[:0] = [str(tmp_path / "a"), str(helper.parent)]
    flags = {"env_id": "pushing.envs:Push-v0", "total_timesteps": 64}
    SPPO_CONTINUOUS.script.prepare(SPPO_CONTINUOUS.args(tmp_path, **flags))  # imports them
    _, folder = SPPO_CONTINUOUS.run(tmp_path / "runs", **flags)
    capsys.readouterr()
    for changed in (None, helper, module):
        forget()
        if changed:
            changed.write_text(changed.read_text() + "\n")
        warnings = {f"warning: {file} has changed since this run" for file in (helper, module)}
        warnings = {line for line in warnings if changed == module or str(changed) in line}
        act = enjoy.load_agent(folder)
        assert -2 <= act([0.0, 1.0])[0] <= 3
        assert set(capsys.readouterr().err.splitlines()) == warnings
        assert not {"pushing.envs", "gain_elsewhere"} & set(sys.modules)
        end, out, err = watch(folder)
        assert end == 0 and "return" in out
        assert set(err.splitlines()) == warnings
    forget()
    module.unlink()
    assert enjoy.load_agent(folder)([0.0, 1.0]) == act([0.0, 1.0])
    end, _, _ = watch(folder)
    assert end.startswith("error: No module named 'pushing") and "on PYTHONPATH?" in end
    forget()

    tensors = safetensors.torch.load_file(folder / "agent.safetensors")
    np.testing.assert_array_equal(tensors["action_bounds"], [[-2], [3]])
