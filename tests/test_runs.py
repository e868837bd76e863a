"""What every control script promises about runs: folders, files, continuing, errors."""

import csv
import errno
import fcntl
import hashlib
import importlib
import json
import os
import random
import shutil
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import safetensors.torch
import torch
from filelock import FileLock
from helpers import (
    EACH,
    ONE_OF_EACH,
    SA2C_ATARI,
    SA2C_CONTINUOUS,
    SETTINGS,
    SPPO_ATARI,
    SPPO_CONTINUOUS,
    Signals,
    checkpoint,
    needs_gpu,
    progress,
    record,
    scalars,
    weights,
    words,
)

PPO, A2C = [SPPO_CONTINUOUS, SPPO_ATARI], [SA2C_CONTINUOUS, SA2C_ATARI]
CONTINUOUS, ATARI = [SPPO_CONTINUOUS, SA2C_CONTINUOUS], [SPPO_ATARI, SA2C_ATARI]


@pytest.fixture(params=SETTINGS, ids=str)
def setting(request):
    return request.param


of_each = pytest.mark.parametrize("setting", ONE_OF_EACH, ids=str, indirect=True)


@pytest.fixture(autouse=True)
def quick_games(monkeypatch):
    """A game made here in place of the emulator, which `test_atari.py` tests."""
    for setting in ATARI:
        monkeypatch.setattr(setting.script, "AtariVectorEnv", Signals)


@pytest.fixture
def launch(setting, monkeypatch, capsys, tmp_path):
    """Runs the script's `main` with flags, by default over those of a small run. Returns (what it
    exits with: 0, a status or a message; output; errors)."""

    def launch(**flags):
        small = setting.small | {"runs_dir": tmp_path}
        monkeypatch.setattr(sys, "argv", [setting.script.__file__, *words(small | flags)])
        end = 0
        try:
            setting.script.main()
        except SystemExit as exit_:
            end = exit_.code
        return end, *capsys.readouterr()

    return launch


def files(folder):
    """{name: content} of a folder, but for the lock."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}


def sessions(folder):
    return [json.loads(line) for line in (folder / "sessions.jsonl").read_text().splitlines()]


def as_text(state):
    """The content of a checkpoint, to the last bit."""
    return json.dumps(state, default=lambda tensor: tensor.numpy().tobytes().hex())


def fail(*_, **__):
    pytest.fail("this must not be called")


def test_a_run_leaves_what_it_promises(setting, launch, tmp_path, monkeypatch):
    """Each file is on the disk before it gets its name, and the order loses nothing: a checkpoint
    is of the agent that is there, and the summary of a run that has all else."""
    synced, named = set(), []
    rename = os.replace

    def recording_replace(source, target):
        assert Path(source).stat().st_ino in synced
        named.append(Path(target).name)
        rename(source, target)

    def fsync(file):
        os.write(file, b"")  # Windows, too, refuses files that are open for reading only
        synced.add(os.fstat(file).st_ino)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", recording_replace)
    frequency = {"eval_freq": 128, "checkpoint_freq": 128 // setting.small["num_envs"]}
    end, out, _ = launch(**frequency, seed=7, noise="uniform")
    evaluation = ["progress.csv", "agent.safetensors", "checkpoint.pt"]
    script = f"{setting}.py"
    assert named == ["sessions.jsonl", script, *evaluation, *evaluation, "summary.json"]
    (folder,) = tmp_path.iterdir()
    assert set(files(folder)) == {*named, *(path.name for path in folder.glob("events*"))}
    assert (folder / script).read_bytes() == Path(setting.script.__file__).read_bytes()
    assert len({(folder / name).stat().st_mode for name in named}) == 1

    rows = progress(folder)
    assert end == 0
    first, *printed, last = out.splitlines()
    assert first == f"{folder.name}: from step 0, with a checkpoint every 128 steps"
    assert printed == [f"step {row['step']:.0f}: return {row['return_mean']:.1f}" for row in rows]
    assert last.startswith(f"{folder}: return {rows[-1]['return_mean']:.1f}, ")
    assert last.endswith(f" steps/s; to watch it: python enjoy.py {folder}")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary.pop("sps") > 0
    assert summary == rows[-1]
    (begun,) = sessions(folder)
    expected = {"seed": 7, "noise_level": 0.05, "alpha": 0.5, "exp_name": setting.symmetric_algo}
    assert expected.items() <= begun["args"].items()
    assert (begun["run"], begun["script"], begun["command"]) == (folder.name, script, sys.argv)
    path = Path(setting.script.__file__)
    assert begun["files"][str(path)] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert begun["directory"] == str(path.parent)
    assert begun["working_directory"] == str(setting.script.START)
    started = time.mktime(time.strptime(begun["started"], "%Y-%m-%d %H:%M:%S"))
    assert 0 <= time.time() - started < 600
    versions = {"torch": torch.__version__, "gymnasium": gym.__version__, "numpy": np.__version__}
    emulator = "ale-py" if setting.atari else "mujoco"
    assert (versions | {emulator: version(emulator)}).items() <= begun["versions"].items()
    assert "pip" not in begun["versions"]  # not imported
    state = checkpoint(folder)
    tensors = dict(state["agent"])
    if not setting.atari:
        tensors |= {f"obs_{name}": tensor for name, tensor in state["obs_stats"].items()}
    saved = safetensors.torch.load_file(folder / "agent.safetensors")
    torch.testing.assert_close(saved, tensors, rtol=0, atol=0)


def test_progress_has_the_means_of_what_was_logged_since_the_evaluation_before(setting, tmp_path):
    _, folder = setting.run(tmp_path, eval_freq=128)
    logged = scalars(folder)
    columns = set(logged) - {"eval/return_mean"}
    assert [step for step, _ in logged["losses/entropy"]] == [64, 128, 192, 256]
    rows = progress(folder)
    assert [row["step"] for row in rows] == [128, 256]
    assert set(rows[1]) == columns | {"step", "return_mean", "return_std", "length_mean"}
    for row in rows:
        for name in columns:
            entries = [value for step, value in logged[name] if 0 <= row["step"] - step < 128]
            assert row[name] == pytest.approx(np.mean(entries), rel=1e-4, abs=1e-6), name
    evaluated = [(row["step"], pytest.approx(row["return_mean"])) for row in rows]
    assert logged["eval/return_mean"] == evaluated


@pytest.mark.parametrize("setting", A2C, ids=str, indirect=True)
def test_an_entry_in_a2cs_log_has_the_means_of_all_updates_since_the_last(
    setting, tmp_path, monkeypatch
):
    each = scalars(setting.run(tmp_path / "each")[1])
    gae = record(monkeypatch, setting.script, "compute_gae")
    rare = scalars(setting.run(tmp_path / "rare", log_freq=128)[1])
    for name in ("losses/value_loss", "losses/entropy", "losses/grad_norm"):
        a, b, c, d = (value for _, value in each[name])
        means = [(128, pytest.approx((a + b) / 2)), (256, pytest.approx((c + d) / 2))]
        assert rare[name] == means
    for i, (_, explained) in enumerate(rare["losses/explained_variance"]):
        advantage, returns = np.stack([result for _, result in gae[2 * i : 2 * i + 2]], axis=1)
        assert explained == pytest.approx(1 - advantage.var() / returns.var(), abs=1e-5)


def test_equal_seeds_give_equal_bytes_and_others_other_actions(setting, tmp_path, monkeypatch):
    """A new policy is almost uniform: its actions show the random numbers that they come from."""
    actions = setting.record_actions(monkeypatch)
    sampled = {}
    for name in ("3", "3 again", "4"):
        actions.clear()
        setting.run(tmp_path / name, seed=int(name[0]), noise="normal", total_timesteps=128)
        sampled[name] = np.concatenate(actions)[:64]
    (first,), (again,) = (tmp_path / "3").iterdir(), (tmp_path / "3 again").iterdir()
    assert first.name == again.name
    assert torch.equal(weights(first), weights(again))
    assert (first / "progress.csv").read_bytes() == (again / "progress.csv").read_bytes()
    assert (sampled["3"] == sampled["4"]).mean() < 0.6


@of_each
def test_scores_are_logged_once_an_episode_has_ended(setting, tmp_path):
    """Episodes and games here are of ten steps."""
    flags = {} if setting.atari else {"env_id": "Ageing-v0"}
    flags |= {"num_minibatches": 1} if setting.ppo else {}
    flags |= {"num_envs": 1, "num_steps": 4, "eval_freq": 4, "total_timesteps": 16}
    _, folder = setting.run(tmp_path, **flags)
    with (folder / "progress.csv").open() as file:
        lengths = [row["charts/episodic_length"] for row in csv.DictReader(file)]
    assert lengths == ["", "", "10.0", "10.0"]
    assert scalars(folder)["charts/episodic_length"] == [(12, 10.0), (16, 10.0)]


@of_each
def test_a_tracked_run_tells_weights_and_biases_its_arguments(setting, tmp_path, monkeypatch):
    calls = []
    wandb = SimpleNamespace(init=lambda **arguments: calls.append(arguments))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    _, folder = setting.run(tmp_path, track=True, total_timesteps=64)
    (call,) = calls
    assert call["config"]["env_id"] == setting.small["env_id"]
    assert (call["name"], call["sync_tensorboard"]) == (folder.name, True)
    # One id per folder, which W&B keeps there: not one for all runs of this name
    assert (call["dir"], call["resume"], call.get("id")) == (folder, "auto", None)


def test_only_what_may_change_results_changes_the_folder(setting, monkeypatch):
    def name(runs_dir="runs", **flags):
        return setting.folder(runs_dir, **flags).name

    plain = name()
    assert plain.startswith(f"{setting.small['env_id']}__{setting.symmetric_algo}__none__1__")
    for flags in ({"gamma": 0.9}, {"beta": 0.0}, {"eval_freq": 64}, {"num_steps": 16}, {"seed": 2}):
        assert name(**flags) != plain, flags
    harmless = [{"compile": True}, {"track": True}, {"runs_dir": "elsewhere"}]
    harmless += [{"device": "cuda"}] if setting.atari else []
    for flags in harmless:
        assert name(**flags) == plain, flags
    assert set(setting.script.NO_EFFECT) == {name for flags in harmless for name in flags}
    if setting.atari:
        assert name(env_id="BreakoutNoFrameskip-v4") == plain
    monkeypatch.setattr(setting.script, "SOURCE", setting.script.SOURCE + b"# an edit\n")
    assert name() != plain


def test_a_folders_name_is_valid_on_all_systems(setting):
    """Windows refuses these; with a colon, Gymnasium imports a module first."""
    env_id = {} if setting.atari else {"env_id": "module:namespace/Task-v0"}
    folder = setting.folder("runs", exp_name='a/b\\c<d>"e"|f?g*h', **env_id)
    assert folder.parent.name == "runs"
    assert not set(folder.name) & set('<>:"/\\|?*')


def test_files_that_are_imported_and_not_installed_count(setting, tmp_path, monkeypatch):
    """Helpers that the script imports, and what these import; neither libraries nor Python's, nor
    what torch.compile, a debugger or an editor has made or imported."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / f"helper_{setting}.py").write_text(f"import further_{setting}")
    further = tmp_path / f"further_{setting}.py"
    further.write_text("x = 1")
    before = setting.script.file_digests()
    assert {setting.script.__file__, __file__} <= set(before)  # this module is not installed
    for library in (torch, json, np):
        assert library.__file__ not in before
    importlib.import_module(f"helper_{setting}")
    foreign = {"torch._inductor.runtime.compile_tasks.c": "c.py", "c.inductor_entry_cpp": "c.so"}
    foreign |= {"pydevd": "debugpy/pydevd.py", "sitecustomize": "ide/sitecustomize.py"}
    for name, place in foreign.items():
        path = tmp_path / place
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(__file__=str(path)))
    after = setting.script.file_digests()
    added = {str(tmp_path / f"helper_{setting}.py"), str(further)}
    assert set(after) - set(before) == added
    further.write_text("x = 2")
    assert setting.script.file_digests()[str(further)] == hashlib.sha256(b"x = 2").hexdigest()


def test_a_script_that_is_edited_while_it_runs_is_recorded_as_it_was(setting, tmp_path):
    """By its own place, if a link led to it."""
    path = tmp_path / "scripts" / f"{setting}.py"
    path.parent.mkdir()
    shutil.copy(setting.script.__file__, path)
    link = tmp_path / "link.py"
    link.symlink_to(path)
    spec = importlib.util.spec_from_file_location("edited_later", link)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    was = path.read_bytes()
    path.write_text("# an edit")
    script.AtariVectorEnv = Signals
    _, folder = replace(setting, script=script).run(tmp_path / "runs", total_timesteps=64)
    assert (folder / path.name).read_bytes() == was
    (session,) = sessions(folder)
    assert session["files"][str(path)] == hashlib.sha256(was).hexdigest()
    assert session["directory"] == str(path.parent)


@of_each
def test_a_finished_run_is_not_trained_again(setting, launch, tmp_path, monkeypatch):
    """The same command prints its score again; an edited script begins anew."""
    _, first, _ = launch()
    (folder,) = tmp_path.iterdir()
    before = files(folder)
    train = setting.script.train
    monkeypatch.setattr(setting.script, "train", fail)
    end, again, _ = launch()
    assert (end, again) == (0, first.splitlines()[-1] + "\n")
    assert files(folder) == before
    edited = setting.script.SOURCE + b"# an edit"
    monkeypatch.setattr(setting.script, "SOURCE", edited)
    monkeypatch.setattr(setting.script, "train", train)
    assert launch()[0] == 0
    (other,) = set(tmp_path.iterdir()) - {folder}
    assert (other / f"{setting}.py").read_bytes() == edited
    assert files(folder) == before


class AgeingEnv(gym.Env):
    """Episodes of ten steps. As in BipedalWalker, a seed does not undo what has been."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))
    action_space = gym.spaces.Box(-1, 1, (2,))
    age = 0

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return np.array([self.np_random.random(), self.age], np.float32), {}

    def step(self, action):
        self.time += 1
        self.age += 1
        obs = np.array([self.np_random.random(), self.age], np.float32)
        return obs, action.sum() + obs[0], self.time == 10, False, {}


class DrawingEnv(AgeingEnv):
    """Draws from all random numbers that there are, also when it is made, and leaves the working
    directory."""

    action_space = gym.spaces.Box(-1, 1, (2,))
    observation_space = gym.spaces.Box(-1, 1, (2,))

    def __init__(self):
        self.age = np.random.random() + torch.rand(1).item()
        os.chdir("/")

    def step(self, action):
        self.age = random.random() + np.random.random() + torch.rand(1).item()
        self.age += self.action_space.sample().sum() + self.observation_space.sample().sum()
        return super().step(action)


class DrawingWrapper(gym.Wrapper):
    """Draws from spaces that only it has."""

    def __init__(self, env):
        super().__init__(env)
        self.action_space = gym.spaces.Box(-1, 1, (2,))

    def step(self, action):
        obs, reward, *ends = self.env.step(action)
        return obs, reward + self.action_space.sample().sum(), *ends


gym.register("Drawing-v0", lambda **_: gym.Wrapper(DrawingWrapper(DrawingEnv())))


class UnboundedEnv(AgeingEnv):
    action_space = gym.spaces.Box(-np.inf, np.inf, (2,))


class HugeEnv(AgeingEnv):
    action_space = gym.spaces.Box(*np.finfo(np.float32).max * np.array([-1, 1]), (2,))


gym.register("Ageing-v0", lambda **_: AgeingEnv())
gym.register("Unbounded-v0", lambda **_: UnboundedEnv())


class WholeEnv(AgeingEnv):
    action_space = gym.spaces.Box(-1, 1, (2,), int)


class BrokenEnv(AgeingEnv):
    """At its fifth step it returns what is `wrong`."""

    def step(self, action):
        step = dict(enumerate(super().step(action)))
        return tuple((step | self.wrong if self.age == 5 else step).values())


gym.register("Huge-v0", lambda **_: HugeEnv())
gym.register("Whole-v0", lambda **_: WholeEnv())
gym.register("Broken-v0", lambda **_: BrokenEnv())


NAN = np.array([np.nan, 0])
WRONG = [{0: NAN}, {0: NAN, 3: True}, {0: np.array([0, -np.inf])}, {1: np.nan}, {1: None}]


@pytest.mark.parametrize("setting", CONTINUOUS, ids=str, indirect=True)
@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_not_finite_stops_the_run_before_it_is_saved(setting, wrong, tmp_path, monkeypatch):
    monkeypatch.setattr(BrokenEnv, "wrong", wrong, raising=False)
    with pytest.raises(SystemExit, match="error: gradient not finite, step 64 .* reward"):
        setting.run(tmp_path, env_id="Broken-v0", **EACH)
    (folder,) = tmp_path.iterdir()
    assert not list(folder.glob("[acp]*.[cps]*t*"))  # no agent, no checkpoint, no progress


@pytest.mark.parametrize("setting", CONTINUOUS, ids=str, indirect=True)
def test_an_evaluation_that_is_not_finite_stops_the_run(setting, tmp_path, monkeypatch):
    """As of a policy that meets it only when it is greedy."""
    monkeypatch.setattr(setting.script, "evaluate", lambda *_: (np.array([np.nan]), np.ones(1)))
    with pytest.raises(SystemExit, match="error: a return of the evaluation at step 64 is not fin"):
        setting.run(tmp_path, **EACH)


@pytest.mark.parametrize("setting", CONTINUOUS, ids=str, indirect=True)
def test_what_comes_after_the_end_of_an_episode_may_be_anything(setting, tmp_path, monkeypatch):
    """As from a simulator that has diverged."""
    monkeypatch.setattr(BrokenEnv, "wrong", {0: NAN, 2: True}, raising=False)
    _, folder = setting.run(tmp_path, env_id="Broken-v0")
    assert weights(folder).isfinite().all()


class CountedEnv(AgeingEnv):
    open, most = [], 0

    def __init__(self):
        self.open.append(self)
        CountedEnv.most = max(self.most, len(self.open))

    def close(self):
        self.open.remove(self)


gym.register("Counted-v0", lambda **_: CountedEnv())


@pytest.mark.parametrize("setting", CONTINUOUS, ids=str, indirect=True)
def test_environments_are_closed_after_all_ends_of_a_run(setting, tmp_path, monkeypatch):
    """And no more are open at a time than those of the training, and one to evaluate."""
    flags = {"env_id": "Counted-v0", "num_envs": 2, "num_steps": 32}
    setting.run(tmp_path / "whole", **flags, **EACH)
    assert (CountedEnv.open, CountedEnv.most) == ([], 3)
    setting.interrupt(tmp_path / "interrupted", 1, **flags)
    assert CountedEnv.open == []
    monkeypatch.setattr(setting.script, "evaluate", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        setting.run(tmp_path / "failed", **flags)
    assert CountedEnv.open == []


@pytest.mark.parametrize("setting", CONTINUOUS, ids=str, indirect=True)
def test_an_edited_environment_makes_another_run(setting, launch, tmp_path, monkeypatch):
    """Of a package: any of its files."""
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / f"mine_{setting}"
    package.mkdir()
    register = "import gymnasium\ngymnasium.register('Mine-v0', '{}.envs:Mine')\n"
    (package / "__init__.py").write_text(register.format(package.name))
    (package / "envs.py").write_text("from test_runs import AgeingEnv as Mine\n")
    flags = {"env_id": f"{package.name}:Mine-v0", "total_timesteps": 64}
    flags |= {"runs_dir": tmp_path / "runs"}
    assert "from step 0" in launch(**flags)[1]
    assert "from step" not in launch(**flags)[1]
    (package / "envs.py").write_text("from test_runs import AgeingEnv as Mine  # an edit\n")
    assert "from step 0" in launch(**flags)[1]
    assert len(list((tmp_path / "runs").iterdir())) == 2


@pytest.mark.parametrize("setting", CONTINUOUS, ids=str, indirect=True)
def test_exploration_is_not_the_same_in_each_rollout(setting, tmp_path, monkeypatch):
    """Where an environment seeds PyTorch at each reset."""

    def reset(self, seed=None, options=None):
        torch.manual_seed(0)
        return original(self, seed=seed, options=options)

    original = AgeingEnv.reset
    monkeypatch.setattr(AgeingEnv, "reset", reset)
    draws = record(monkeypatch, setting.script.Agent, "exploration")
    setting.run(tmp_path, env_id="Ageing-v0", total_timesteps=128)
    assert len(np.unique([result for _, result in draws])) == 128 * 2 * 11


@pytest.mark.parametrize("setting", CONTINUOUS, ids=str, indirect=True)
def test_whatever_an_environment_draws_from_a_killed_run_is_continued(
    setting, tmp_path, monkeypatch
):
    """Also where it leaves the working directory: relative paths begin where the run began."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(setting.script, "START", tmp_path)
    flags = {"env_id": "Drawing-v0", "seed": 5, **EACH}
    _, whole = setting.run("whole", **flags)
    torch.manual_seed(0)
    np.random.seed(None)
    setting.interrupt("continued", 2, **flags)
    torch.manual_seed(0)
    np.random.seed(None)
    _, folder = setting.run("continued", **flags)
    assert torch.equal(weights(folder), weights(whole))
    assert (folder / "progress.csv").read_bytes() == (whole / "progress.csv").read_bytes()
    assert {whole.parent.parent, folder.parent.parent} == {tmp_path}


@pytest.mark.parametrize("setting", CONTINUOUS, ids=str, indirect=True)
def test_exploration_is_independent_of_what_an_environment_draws(setting, tmp_path, monkeypatch):
    """From PyTorch's global generator, and from its spaces and its own generator."""
    draws = record(monkeypatch, setting.script.Agent, "exploration")
    drawn = []

    def step(self, action):
        drawn.append([torch.rand(1).item(), self.action_space.sample()[0], self.np_random.random()])
        return original(self, action)

    original = AgeingEnv.step
    monkeypatch.setattr(AgeingEnv, "step", step)
    setting.run(tmp_path, env_id="Ageing-v0", total_timesteps=2048, eval_freq=2048)
    exploration = np.concatenate([result.reshape(64, -1) for _, result in draws])
    # Exponential draws are -log of uniform ones
    columns = np.exp(-np.exp(-exploration))
    drawn = np.array(drawn[:2048])
    together = np.corrcoef(np.hstack([columns, drawn]).T)
    assert np.abs(together[np.triu_indices_from(together, 1)]).max() < 5 / np.sqrt(2048)


def test_a_continued_run_equals_an_uninterrupted_one(setting, tmp_path, monkeypatch):
    """To the last bit. It is cut after an evaluation, its last checkpoint is between two, in the
    middle of episodes and, for A2C, of an entry in the log."""
    flags = {"total_timesteps": 320, "eval_freq": 128, "noise": "normal"}
    flags |= {"checkpoint_freq": 192 // setting.small["num_envs"]}
    flags |= {} if setting.atari else {"env_id": "Ageing-v0"}
    flags |= {} if setting.ppo else {"log_freq": 128}
    folder = setting.interrupt(tmp_path / "continued", 4, **flags)
    assert checkpoint(folder)["progress"][0] == 192
    assert [row["step"] for row in progress(folder)] == [128, 256]
    summary, _ = setting.run(tmp_path / "continued", **flags)
    whole_summary, whole = setting.run(tmp_path / "whole", **flags)
    assert folder.name == whole.name
    for name in ("progress.csv", "agent.safetensors"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    assert scalars(folder) == scalars(whole)
    assert summary | {"sps": 0} == whole_summary | {"sps": 0}
    states = checkpoint(folder), checkpoint(whole)
    for state in states:
        *kept, speeds = state["progress"]
        assert len(speeds) == 5 if setting.ppo else len(speeds) >= 3
        state["progress"] = kept
    assert as_text(states[0]) == as_text(states[1])
    begun, again = sessions(folder)
    assert again["versions"] == begun["versions"]


@pytest.mark.parametrize("setting", [SA2C_CONTINUOUS, SPPO_ATARI], ids=str, indirect=True)
def test_a_full_disk_leaves_the_checkpoint_before(setting, launch, tmp_path, monkeypatch):
    """The same command continues from there; what was written after it does not come twice."""
    folder = setting.interrupt(tmp_path, 1, **EACH)

    def failing_save(content, path):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(torch, "save", failing_save)
        launch(**EACH)
    assert checkpoint(folder)["progress"][0] == 64
    assert [row["step"] for row in progress(folder)] == [64, 128]
    end, out, _ = launch(**EACH)
    assert end == 0 and "from step 64, with" in out
    assert [row["step"] for row in progress(folder)] == [64, 128, 192, 256]
    assert [step for step, _ in scalars(folder)["losses/entropy"]] == [64, 128, 192, 256]


@of_each
def test_a_checkpoint_that_cannot_be_read_back_leaves_the_one_before(
    setting, launch, tmp_path, monkeypatch
):
    """As of an edit that adds a NumPy scalar."""
    folder = setting.interrupt(tmp_path, 1, **EACH)
    save = torch.save

    def save_more(content, path):
        save(content | {"mine": np.float64(1)}, path)

    monkeypatch.setattr(torch, "save", save_more)
    end, _, _ = launch(**EACH)
    said = f"error: {folder / 'checkpoint.pt.tmp'} can't be read: it is damaged, or has more than"
    assert end.startswith(said)
    assert checkpoint(folder)["progress"][0] == 64
    (folder / "checkpoint.pt").write_bytes(b"half")
    end, _, _ = launch(**EACH)
    assert end.startswith(f"error: {folder / 'checkpoint.pt'} can't be read: ")
    assert (folder / "checkpoint.pt").read_bytes() == b"half"


def test_metrics_may_be_missing_or_nan_and_numpys(setting, tmp_path, monkeypatch):
    """As one that an edit logs in some rollouts: it is a column, and summary.json is JSON."""
    calls = []

    def loss(*arguments):
        calls.append(arguments)
        result, metrics = original(*arguments)
        late = len(calls) > (24 if setting.ppo else 3)
        return result, metrics | ({"losses/späte": torch.tensor(torch.nan)} if late else {})

    original = setting.loss_function
    monkeypatch.setattr(setting.script, setting.loss_name, loss)
    _, folder = setting.run(tmp_path, **EACH)
    text = (folder / "progress.csv").read_bytes().decode()
    assert "\r" not in text
    rows = list(csv.DictReader(text.splitlines()))
    assert [row["losses/späte"] for row in rows] == ["", "", "", "nan"]
    summary = (folder / "summary.json").read_text()
    assert "losses/späte" not in json.loads(summary, parse_constant=fail)


@of_each
def test_a_file_that_another_program_has_open_is_tried_again(setting, launch, monkeypatch):
    """On Windows it cannot be replaced, as a progress.csv in a spreadsheet."""
    tries = []
    rename = os.replace

    def refusing_replace(source, target):
        tries.append(Path(target).name)
        if tries.count("progress.csv") == 1:
            raise PermissionError
        rename(source, target)

    monkeypatch.setattr(os, "replace", refusing_replace)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert launch()[0] == 0


@of_each
def test_a_run_killed_before_its_summary_only_writes_it(setting, launch, tmp_path, monkeypatch):
    launch()
    (folder,) = tmp_path.iterdir()
    before = files(folder)
    (folder / "summary.json").unlink()
    monkeypatch.setattr(setting.script, setting.loss_name, fail)
    monkeypatch.setattr(setting.script, "evaluate", fail)
    assert launch()[0] == 0
    after = files(folder)
    for name in ("progress.csv", "checkpoint.pt", "agent.safetensors"):
        assert after[name] == before[name]
    first, again = (json.loads(content["summary.json"]) for content in (before, after))
    assert again == first


@of_each
def test_a_run_has_one_process_at_a_time(setting, launch, tmp_path, monkeypatch):
    folder = setting.interrupt(tmp_path, 1, **EACH)
    before = files(folder)
    with monkeypatch.context() as patch, FileLock(folder / "lock"):
        patch.setattr(setting.script, "train", fail)
        end, _, _ = launch(**EACH)
    assert end.startswith(f"error: another process is at work on {folder}, or it cannot be locked")
    assert files(folder) == before
    (folder / "lock").write_text("")  # as a killed process leaves it
    assert launch(**EACH)[0] == 0


@of_each
def test_a_folder_that_has_no_locks(setting, launch, tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    end, _, _ = launch()
    (folder,) = tmp_path.iterdir()
    said = f"error: another process is at work on {folder}, or it cannot be locked: "
    assert end == f"{said}[Errno 5] Input/output error"


BAD = [
    (SETTINGS, {"z": 0.0}, "z stands for log 0"),
    (SETTINGS, {"z": -np.inf}, "z stands for log 0"),
    (SETTINGS, {"alpha": -1.0}, "alpha must be finite and not negative"),
    (SETTINGS, {"seed": -1}, "seed must be finite and not negative"),
    (SETTINGS, {"noise": "normal", "noise_level": -1.0}, "noise_level must be finite and not"),
    (SETTINGS, {"noise": "normal", "noise_level": np.nan}, "noise_level must be finite and not"),
    (SETTINGS, {"learning_rate": -1e-4}, "learning_rate must be finite and not negative"),
    (PPO, {"clip_coef": -0.1}, "clip_coef must be finite and not negative"),
    (SETTINGS, {"vf_coef": np.nan}, "vf_coef must be finite and not negative"),
    (SETTINGS, {"ent_coef": -0.01}, "ent_coef must be finite and not negative"),
    ([SA2C_ATARI], {"rmsprop_eps": -1e-5}, "rmsprop_eps must be finite and not negative"),
    (CONTINUOUS, {"hidden_sizes": 0}, "hidden_sizes must be at least 1"),
    (SETTINGS, {"gamma": 1.01}, "gamma must be between 0 and 1"),
    (SETTINGS, {"gae_lambda": 95.0}, "gae_lambda must be between 0 and 1"),
    (ATARI, {"repeat_action_probability": 25.0}, "repeat_action_probability must be between 0"),
    (SETTINGS, {"alpha": 0.0, "beta": 0.0}, "with alpha and beta 0 nothing trains the policy"),
    (SETTINGS, {"max_grad_norm": 0.0}, "max_grad_norm must be positive; 1e9 turns clipping off"),
    (SETTINGS, {"noise_level": 0.1}, "noise_level needs a kind of noise"),
    (
        SETTINGS,
        {"noise": "adv_flip", "noise_level": 1.5},
        "noise_level is the probability of a flip",
    ),
    (PPO, {"num_minibatches": 5}, "num_minibatches must divide the 64 steps of a rollout"),
    (PPO, {"num_minibatches": 64}, "norm_adv needs 2 or more steps in a minibatch"),
    (CONTINUOUS, {"policy": "gaussian", "beta": 1.0}, "beta needs probabilities"),
    (CONTINUOUS, {"noise": "flip"}, "invalid choice 'flip'"),
    (CONTINUOUS, {"env_id": "Hoper-v4"}, "--env-id Hoper-v4: Environment `Hoper` doesn't exist"),
    (CONTINUOUS, {"env_id": "nowhere:Task-v0"}, "nowhere:Task-v0: No module named 'nowhere'"),
    (CONTINUOUS, {"env_id": "CartPole-v1"}, "Discrete(2) is no vector; see docs/copy-and"),
    (CONTINUOUS, {"env_id": "Unbounded-v0"}, "needs float actions, bounded unless --policy g"),
    (
        CONTINUOUS,
        {"env_id": "Huge-v0"},
        "needs float actions, bounded unless --policy gaussian",
    ),
    (CONTINUOUS, {"env_id": "Whole-v0", "policy": "gaussian"}, "needs float actions"),
    (CONTINUOUS, {"bins": 1}, "bins must be at least 2"),
    (A2C, {"norm_adv": True, "num_envs": 1, "num_steps": 1}, "norm_adv needs more than one step"),
    (
        ATARI,
        {"env_id": "Brekout"},
        "`Brekout` doesn't exist in namespace ALE. Did you mean: `Break",
    ),
    (ATARI, {"env_id": "ALE/Breakout-v5"}, "env_id must be the NAME of an ALE/NAME-v5"),
    (ATARI, {"env_id": "PongDeterministic-v4"}, "env_id must be the NAME of an ALE/NAME-v5"),
]


@pytest.mark.parametrize(
    ("setting", "flags", "message"),
    [(setting, flags, message) for settings, flags, message in BAD for setting in settings],
    ids=str,
)
def test_bad_input_is_named_and_begins_nothing(setting, flags, message, launch, tmp_path):
    end, _, err = launch(**flags)
    assert end != 0
    box = "".join(err.split("│")) if "│" in err else err
    assert " ".join(message.split()) in " ".join(f"{end} {box}".split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("setting", PPO, ids=str, indirect=True)
def test_minibatches_of_one_step_train(setting, tmp_path):
    """Where nothing is normalised."""
    flags = {"num_steps": 4, "total_timesteps": 8, "norm_adv": False}
    batch = 4 * setting.small["num_envs"]
    summary, _ = setting.run(tmp_path, **flags, num_minibatches=batch)
    assert np.isfinite(summary["losses/policy_loss"])


def test_a_keyboard_interrupt_says_what_continues(setting, launch, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(setting.script, setting.advantages, interrupt)
    said = "interrupted; the same command continues from its last checkpoint, if any"
    assert launch()[0] == said


def test_gradients_that_are_not_finite_spare_the_files(setting, launch, tmp_path, monkeypatch):
    folder = setting.interrupt(tmp_path, 1, **EACH)
    original = setting.loss_function

    def infinite(*arguments):
        result, metrics = original(*arguments)
        if setting.atari:
            return result * torch.inf, metrics
        return result, metrics | {"losses/grad_norm": torch.tensor(torch.inf)}

    monkeypatch.setattr(setting.script, setting.loss_name, infinite)
    end, _, _ = launch(**EACH)
    assert end.startswith("error: gradient not finite, step 128")
    assert checkpoint(folder)["progress"][0] == 64
    assert [row["step"] for row in progress(folder)] == [64]


def test_without_a_compiler_it_says_so_and_runs(setting, launch, monkeypatch):
    """On Atari nothing is compiled for a CPU."""
    monkeypatch.setattr(torch, "compile", lambda *_, **__: lambda *_: 1 / 0)
    end, _, err = launch(compile=True, total_timesteps=64)
    assert end == 0
    failed = "torch.compile failed, continuing without: ZeroDivisionError"
    assert (failed in err) != setting.atari


@of_each
def test_a_function_that_fails_uncompiled_too_shows_its_own_error(setting, monkeypatch, capsys):
    def broken(x):
        raise ValueError("a copy's own mistake")

    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda *inputs: 1 / 0)
    call = setting.script.compiled(broken)
    with pytest.raises(ValueError, match="a copy's own mistake"):
        call(1)
    with pytest.raises(ValueError, match="a copy's own mistake"):
        call(1)
    assert capsys.readouterr().err.count("torch.compile failed") == 1


@pytest.mark.parametrize("setting", CONTINUOUS, ids=str, indirect=True)
def test_a_gaussian_policy_needs_no_bounds(setting, tmp_path, monkeypatch):
    actions = setting.record_actions(monkeypatch)
    setting.run(tmp_path, env_id="Unbounded-v0", policy="gaussian")
    assert 2 < np.abs(actions).max() < np.inf


@needs_gpu
def test_on_a_gpu_a_run_is_compiled_and_continued(setting, launch, tmp_path):
    flags = {"device": "cuda", "compile": True} | EACH
    setting.interrupt(tmp_path, 2, **flags)
    end, _, err = launch(**flags)
    assert end == 0
    assert "torch.compile failed" not in err
    (folder,) = tmp_path.iterdir()
    assert len(sessions(folder)) == 2


def test_noise_is_a_scale_but_for_flips(setting):
    assert setting.args("runs", noise="normal", noise_level=2.0).noise_level == 2
