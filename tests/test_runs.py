"""What every control script promises about runs: folders, files, continuing, errors."""

import csv
import dataclasses
import errno
import fcntl
import json
import os
import shutil
import sys
import time
from importlib.metadata import distributions, version
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
    progress,
    record,
    scalars,
    weights,
    words,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

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
    """Runs the script's `main` with flags, by default over those of a small run in the folder
    "run". Returns (what it exits with: 0, a status or a message; output; errors)."""

    def launch(**flags):
        small = setting.small | {"runs_dir": tmp_path, "run_name": "run"}
        if "evaluate" in flags:
            small = {}
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


def as_text(state):
    """The content of a checkpoint, to the last bit."""
    return json.dumps(state, default=lambda tensor: tensor.numpy().tobytes().hex())


def fail(*_, **__):
    pytest.fail("this must not be called")


def test_a_run_leaves_what_it_promises(setting, launch, tmp_path, monkeypatch):
    """Each file is on the disk before it gets its name, and the order loses nothing: a checkpoint
    is of the agent that is there, and the summary of a run that has all else."""
    replace = os.replace
    synced, named = set(), []

    def recording_replace(source, target):
        assert Path(source).stat().st_ino in synced
        named.append(Path(target).name)
        replace(source, target)

    def fsync(file):
        os.write(file, b"")  # Windows, too, refuses files that are open for reading only
        synced.add(os.fstat(file).st_ino)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", recording_replace)
    frequency = {"eval_freq": 128, "checkpoint_freq": 128 // setting.small["num_envs"]}
    end, out, _ = launch(**frequency, seed=7, noise="uniform")
    evaluation = ["progress.csv", "agent.safetensors", "checkpoint.pt"]
    script = f"{setting}.py"
    assert named == [script, "args.json", *evaluation, *evaluation, "summary.json"]
    folder = tmp_path / "run"
    assert set(files(folder)) == {*named, *(path.name for path in folder.glob("events*"))}
    assert (folder / script).read_bytes() == Path(setting.script.__file__).read_bytes()
    assert len({(folder / name).stat().st_mode for name in named}) == 1

    rows = progress(folder)
    assert end == 0
    *printed, last = out.splitlines()
    assert printed == [f"step {row['step']:.0f}: return {row['return_mean']:.1f}" for row in rows]
    assert last.startswith(f"{folder}: return {rows[-1]['return_mean']:.1f} (standard deviation ")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary.pop("sps") > 0
    assert summary == rows[-1] | {"finished": True}
    begun = json.loads((folder / "args.json").read_text())
    expected = {"seed": 7, "noise_level": 0.05, "alpha": 0.5, "exp_name": setting.symmetric_algo}
    assert expected.items() <= begun["args"].items()
    assert (begun["script"], begun["command"]) == (script, sys.argv)
    started = time.mktime(time.strptime(begun["started"], "%Y-%m-%d %H:%M:%S"))
    assert 0 <= time.time() - started < 600
    versions = {"torch": torch.__version__, "gymnasium": gym.__version__, "numpy": np.__version__}
    emulator = "ale-py" if setting.atari else "mujoco"
    assert begun["versions"] == versions | {emulator: version(emulator)}
    state = checkpoint(folder)
    tensors = dict(state["agent"])
    if not setting.atari:
        tensors["obs_mean"] = state["obs_stats"]["mean"]
        tensors["obs_std"] = state["obs_stats"]["std"]
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


def test_tensorboard_shows_the_hyperparameters(setting, tmp_path):
    _, folder = setting.run(tmp_path, total_timesteps=64, gamma=0.97)
    (event,) = EventAccumulator(str(folder)).Reload().Tensors("hyperparameters/text_summary")
    assert '"gamma": 0.97' in event.tensor_proto.string_val[0].decode()


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
    first, again = tmp_path / "3" / "run", tmp_path / "3 again" / "run"
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
    monkeypatch.setattr(setting.script, "find_spec", lambda name: True)
    wandb = SimpleNamespace(init=lambda **arguments: calls.append(arguments))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    _, folder = setting.run(tmp_path, track=True, total_timesteps=64)
    (call,) = calls
    assert call["config"]["env_id"] == setting.small["env_id"]
    assert (call["name"], call["sync_tensorboard"]) == ("run", True)
    # One id per folder, which W&B keeps there: not one for all runs of this name
    assert (call["dir"], call["resume"], call.get("id")) == (folder, "auto", None)
    monkeypatch.setattr(setting.script, "find_spec", lambda name: None)  # played elsewhere
    setting.script.evaluate_run(setting.script.Args(evaluate=str(folder), eval_episodes=1))


@pytest.mark.slow
def test_a_video_of_the_first_episode_of_each_evaluation(setting, tmp_path, capsys):
    flags = {"env_id": setting.video_env, "eval_freq": 128, "eval_episodes": 2}
    _, folder = setting.run(tmp_path, capture_video=True, **flags)
    flags = {"evaluate": str(folder), "eval_episodes": 4, "capture_video": True}
    setting.script.evaluate_run(setting.script.Args(**flags))
    printed = capsys.readouterr().out.splitlines()[-1]
    assert Path(printed.removeprefix("video: ")).exists()
    names = sorted(path.stem.split("-episode")[0] for path in folder.glob("video/*.mp4"))
    assert names == ["evaluate-1", "step-128", "step-256"]


def test_only_what_may_change_results_changes_the_folder(setting, tmp_path, monkeypatch):
    def name(**flags):
        return setting.args("runs", run_name=None, **flags).run_name

    monkeypatch.setattr(setting.script, "find_spec", lambda name: True)  # all is installed
    plain = name()
    assert plain.startswith(f"{setting.small['env_id']}__{setting.symmetric_algo}__none__1__")
    for flags in ({"gamma": 0.9}, {"beta": 0.0}, {"eval_freq": 64}, {"num_steps": 16}, {"seed": 2}):
        assert name(**flags) != plain, flags
    harmless = {"run_name", "runs_dir", "device", "compile", "track", "evaluate", "capture_video"}
    fields = {field.name for field in dataclasses.fields(setting.script.Args)}
    assert fields - set(setting.args("runs").identity()) == harmless
    for flags in ({"device": "cuda"}, {"compile": True}, {"track": True}, {"capture_video": True}):
        assert name(**flags) == plain, flags
    assert setting.args("elsewhere", run_name=None).run_name == plain
    if setting.atari:
        assert name(env_id="BreakoutNoFrameskip-v4") == plain
    edited = tmp_path / "edited.py"
    edited.write_text(Path(setting.script.__file__).read_text() + "# an edit\n")
    monkeypatch.setattr(setting.script, "__file__", str(edited))
    assert name() != plain


@of_each
def test_a_finished_run_is_not_trained_again(setting, launch, tmp_path, monkeypatch):
    """The same command prints its score again, others are refused."""
    _, first, _ = launch(run_name=None)
    (folder,) = tmp_path.iterdir()
    before = files(folder)
    monkeypatch.setattr(setting.script, "train", fail)
    end, again, _ = launch(run_name=None)
    assert (end, again) == (0, first.splitlines()[-1] + "\n")
    refusal = f"error: {folder} was begun with"
    end, _, _ = launch(run_name=folder.name, seed=2)
    assert end == f"{refusal} seed 1, not 2; give another --run-name"
    edited = tmp_path / "edited.py"
    edited.write_text("# another script")
    monkeypatch.setattr(setting.script, "__file__", str(edited))
    end, _, _ = launch(run_name=folder.name)
    assert end.startswith(f"{refusal} script_sha256 ") and end.endswith("; give another --run-name")
    assert len(end) < len(f"{refusal}") + 100
    assert set(tmp_path.iterdir()) == {folder, edited}
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
def test_what_is_not_finite_is_named(setting, wrong, tmp_path, monkeypatch):
    monkeypatch.setattr(BrokenEnv, "wrong", wrong, raising=False)
    with pytest.raises(SystemExit, match="error: step 4: obs or reward not finite"):
        setting.run(tmp_path, env_id="Broken-v0")


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
    """Of a module that is found, not imported, for its hash."""
    monkeypatch.syspath_prepend(tmp_path)
    module = tmp_path / f"mine_{setting}.py"
    module.write_text("import gymnasium\ngymnasium.register('Mine-v0', 'test_runs:AgeingEnv')\n")
    flags = {"env_id": f"{module.stem}:Mine-v0", "total_timesteps": 64}
    name = setting.args("runs", run_name=None, **flags).run_name
    assert module.stem not in sys.modules
    assert launch(**flags)[0] == 0
    assert setting.args("runs", run_name=None, **flags).run_name == name
    module.write_text(module.read_text() + "# an edit\n")
    assert setting.args("runs", run_name=None, **flags).run_name != name
    assert launch(**flags)[0].startswith(f"error: {tmp_path / 'run'} was begun with env_sha256 ")


def test_a_continued_run_equals_an_uninterrupted_one(setting, tmp_path, monkeypatch):
    """To the last bit. It is cut after an evaluation, its last checkpoint is between two, in the
    middle of episodes and, for A2C, of an entry in the log."""
    clock, evaluate = [0], setting.script.evaluate

    def perf_counter():
        clock[0] += 1000
        return clock[0]

    def slow_evaluate(*arguments):
        clock[0] += 10**6
        return evaluate(*arguments)

    fake = SimpleNamespace(perf_counter=perf_counter, strftime=time.strftime)
    monkeypatch.setattr(setting.script, "time", fake)
    monkeypatch.setattr(setting.script, "evaluate", slow_evaluate)
    flags = {"total_timesteps": 320, "eval_freq": 128, "noise": "normal"}
    flags |= {"checkpoint_freq": 192 // setting.small["num_envs"]}
    flags |= {} if setting.atari else {"env_id": "Ageing-v0"}
    flags |= {} if setting.ppo else {"log_freq": 128}
    folder = setting.interrupt(tmp_path / "continued", 4, **flags)
    assert checkpoint(folder)["global_step"] == 192
    assert [row["step"] for row in progress(folder)] == [128, 256]
    summary, _ = setting.run(tmp_path / "continued", **flags)
    whole_summary, whole = setting.run(tmp_path / "whole", **flags)

    for name in ("progress.csv", "agent.safetensors"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    assert scalars(folder) == scalars(whole)
    assert summary == whole_summary
    assert summary["sps"] > 320 / 10**6  # evaluations don't count
    assert as_text(checkpoint(folder)) == as_text(checkpoint(whole))
    begun = json.loads((folder / "args.json").read_text())
    assert [again["versions"] for again in begun["continued"]] == [begun["versions"]]


@pytest.mark.parametrize("setting", [SA2C_CONTINUOUS, SPPO_ATARI], ids=str, indirect=True)
@pytest.mark.parametrize("kind", [OSError, RuntimeError])
def test_a_full_disk_leaves_the_checkpoint_before(setting, kind, launch, tmp_path, monkeypatch):
    """The same command continues from there; what was written after it does not come twice."""
    folder = setting.interrupt(tmp_path, 1, **EACH)
    path = folder / "checkpoint.pt"

    def failing_save(content, path):
        Path(path).write_bytes(b"half")
        raise kind("unexpected pos 64 vs 0")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", failing_save)
        end, _, _ = launch(**EACH)
    reason = "(unexpected pos 64 vs 0): disk full? The same command continues"
    assert end == f"error: cannot write {path} {reason}"
    assert checkpoint(folder)["global_step"] == 64
    assert [row["step"] for row in progress(folder)] == [64, 128]
    assert launch(**EACH)[0] == 0
    assert [row["step"] for row in progress(folder)] == [64, 128, 192, 256]
    assert [step for step, _ in scalars(folder)["losses/entropy"]] == [64, 128, 192, 256]


@of_each
def test_a_run_killed_before_its_summary_only_writes_it(setting, launch, tmp_path, monkeypatch):
    launch()
    before = files(tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    monkeypatch.setattr(setting.script, "gradient_and_metrics", fail)
    monkeypatch.setattr(setting.script, "evaluate", fail)
    assert launch()[0] == 0
    after = files(tmp_path / "run")
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
    assert end == f"error: another process is at work on this run, or delete {folder / 'lock'}"
    assert files(folder) == before
    (folder / "lock").write_text("")  # as a killed process leaves it
    assert launch(**EACH)[0] == 0


@of_each
@pytest.mark.parametrize("kind", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_a_folder_that_has_no_locks(setting, kind, launch, tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(kind, os.strerror(kind))

    monkeypatch.setattr(fcntl, "flock", flock)
    end, _, _ = launch()
    folder = tmp_path / "run"
    assert end == f"error: cannot lock {folder} ({os.strerror(kind)}); use another --runs-dir"


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
    (SETTINGS, {"run_name": ""}, "run_name must be the name of a folder"),
    (SETTINGS, {"run_name": ".."}, "run_name must be the name of a folder"),
    (SETTINGS, {"max_grad_norm": 0.0}, "max_grad_norm must be positive; 1e9 turns clipping off"),
    (SETTINGS, {"noise_level": 0.1}, "noise_level needs a kind of noise"),
    (
        SETTINGS,
        {"noise": "adv_flip", "noise_level": 1.5},
        "noise_level is the probability of a flip",
    ),
    (SETTINGS, {"evaluate": "x", "gamma": 0.9}, "--evaluate takes only --seed"),
    (SETTINGS, {"evaluate": ""}, "--evaluate '': not the folder of a run with an agent"),
    (SETTINGS, {"capture_video": True}, "for videos: pip install moviepy"),
    (SETTINGS, {"track": True}, "track needs wandb: pip install wandb"),
    (PPO, {"num_minibatches": 5}, "must divide 64 steps"),
    (CONTINUOUS, {"policy": "gaussian", "beta": 1.0}, "beta needs probabilities"),
    (CONTINUOUS, {"noise": "flip"}, "invalid choice 'flip'"),
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
    (ATARI, {"env_id": "Brekout"}, "no game 'Brekout'; did you mean Breakout? For sticky"),
    (ATARI, {"env_id": "ALE/Breakout-v5"}, "did you mean Breakout? For sticky actions, as in v5"),
    (ATARI, {"env_id": "PongDeterministic-v4"}, "did you mean Pong?"),
    (ATARI, {"env_id": "Ms Pacman"}, "did you mean MsPacman?"),
]


@pytest.mark.parametrize(
    ("setting", "flags", "message"),
    [(setting, flags, message) for settings, flags, message in BAD for setting in settings],
    ids=str,
)
def test_bad_input_is_named_and_begins_nothing(
    setting, flags, message, launch, tmp_path, monkeypatch
):
    monkeypatch.setattr(setting.script, "find_spec", lambda name: None)  # nothing is installed
    end, _, err = launch(**flags)
    assert end != 0
    box = "".join(err.split("│")) if "│" in err else err
    assert " ".join(message.split()) in " ".join(f"{end} {box}".split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("rollouts", "step"), [(0, 0), (3, 128)])
def test_a_keyboard_interrupt_says_where_the_same_command_continues(
    setting, rollouts, step, launch, tmp_path, monkeypatch
):
    """At its last checkpoint, not its last evaluation."""
    flags = {"eval_freq": 64, "checkpoint_freq": 128 // setting.small["num_envs"]}
    setting.interrupt(tmp_path, rollouts, **flags)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(setting.script, setting.advantages, interrupt)
    assert launch(**flags)[0] == f"interrupted; the same command continues from step {step}"


def test_weights_that_are_not_finite_spare_the_files(setting, launch, tmp_path, monkeypatch):
    folder = setting.interrupt(tmp_path, 1, **EACH)
    original = setting.script.gradient_and_metrics

    def infinite(*arguments):
        gradient, metrics = original(*arguments)
        return gradient * torch.inf, metrics

    monkeypatch.setattr(setting.script, "gradient_and_metrics", infinite)
    end, _, _ = launch(**EACH)
    assert end == "error: weights not finite at step 128; lower the learning rate"
    assert checkpoint(folder)["global_step"] == 64
    assert [row["step"] for row in progress(folder)] == [64]


@pytest.mark.parametrize("compile", [lambda *_, **__: 1 / 0, lambda *_, **__: lambda *_: 1 / 0])
def test_without_git_and_a_compiler_it_says_so_and_runs(
    setting, launch, tmp_path, monkeypatch, compile
):
    """On Atari nothing is compiled for a CPU."""
    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(shutil, "which", lambda command: None)
    end, _, err = launch(compile=True, total_timesteps=64)
    assert end == 0
    assert json.loads((tmp_path / "run" / "args.json").read_text())["commit"] is None
    failed = "torch.compile failed, continuing without: ZeroDivisionError"
    assert (failed in err) != setting.atari
    if setting.atari:
        agent = setting.script.Agent(3)
        obs = torch.zeros(33, 2, 4, 84, 84, dtype=torch.uint8)
        eager = setting.script.compiled(agent, setting.args(tmp_path), obs)
        assert eager == (agent, setting.script.gradient_and_metrics)


def test_outside_a_repository_there_is_no_commit(setting, tmp_path, monkeypatch):
    copied = shutil.copy(setting.script.__file__, tmp_path)
    monkeypatch.setattr(setting.script, "__file__", copied)
    assert setting.script.provenance()["commit"] is None


@pytest.mark.parametrize("setting", CONTINUOUS, ids=str, indirect=True)
def test_a_gaussian_policy_needs_no_bounds(setting, tmp_path, monkeypatch):
    actions = setting.record_actions(monkeypatch)
    setting.run(tmp_path, env_id="Unbounded-v0", policy="gaussian")
    assert 2 < np.abs(actions).max() < np.inf


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_run_is_compiled_and_continued(setting, launch, tmp_path):
    flags = {"device": "cuda", "compile": True} | EACH
    setting.interrupt(tmp_path, 2, **flags)
    end, _, err = launch(**flags)
    assert end == 0
    assert "torch.compile failed" not in err
    assert json.loads((tmp_path / "run" / "args.json").read_text())["continued"]


def test_evaluate_plays_the_latest_agent_of_a_run(setting, launch, tmp_path):
    """Of an unfinished and of a finished one: with the seed of an evaluation, its very score."""
    flags = {"eval_freq": 64, "eval_episodes": 3, "total_timesteps": 128}
    for train in (lambda: setting.interrupt(tmp_path, 1, **flags), lambda: launch(**flags)):
        train()
        folder = tmp_path / "run"
        before = files(folder)
        row = progress(folder)[-1]
        seed = 1 + int(row["step"])
        end, out, _ = launch(evaluate=folder, eval_episodes=3, seed=seed)
        score = f"{row['return_mean']:.1f} (standard deviation {row['return_std']:.1f})"
        assert (end, out.splitlines()[-1]) == (0, f"{folder}: return {score}")
        assert files(folder) == before


@pytest.mark.parametrize("setting", ATARI, ids=str, indirect=True)
def test_evaluate_computes_as_training_did(setting, tmp_path, monkeypatch):
    """In bfloat16 where the hardware has it, and unless `--amp off`."""
    monkeypatch.setattr(setting.script, "has_bfloat16", lambda device: True)
    dtypes = []
    forward = setting.script.Agent.forward

    def recording_forward(agent, images):
        dtypes.append(agent.dtype)
        return forward(agent, images)

    monkeypatch.setattr(setting.script.Agent, "forward", recording_forward)
    for amp, dtype in (("auto", torch.bfloat16), ("off", torch.float32)):
        _, folder = setting.run(tmp_path / amp, total_timesteps=64, amp=amp)
        setting.script.evaluate_run(setting.script.Args(evaluate=str(folder), eval_episodes=1))
        assert set(dtypes) == {dtype}
        dtypes.clear()


@of_each
def test_evaluate_warns_of_an_edited_script(setting, launch, tmp_path, monkeypatch):
    launch()
    assert launch(evaluate=tmp_path / "run")[2] == ""
    edited = tmp_path / "edited.py"
    edited.write_text(Path(setting.script.__file__).read_text() + "# an edit\n")
    monkeypatch.setattr(setting.script, "__file__", str(edited))
    end, _, err = launch(evaluate=tmp_path / "run")
    copy = tmp_path / "run" / f"{setting}.py"
    assert (end, err) == (0, f"warning: edited; the run's copy is {copy}\n")


@of_each
def test_evaluate_names_the_script_of_another_run(setting, launch, tmp_path):
    launch()
    args_json = tmp_path / "run" / "args.json"
    begun = json.loads(args_json.read_text())
    del begun["args"]["norm_adv"]
    args_json.write_text(json.dumps(begun | {"script": "other.py"}))
    end, _, _ = launch(evaluate=tmp_path / "run")
    folder = tmp_path / "run"
    assert end == f"error: {folder} is of another script or version; use {folder / 'other.py'}"


@of_each
def test_a_finished_run_gets_its_video_by_evaluation(setting, launch, tmp_path, monkeypatch):
    monkeypatch.setattr(setting.script, "find_spec", lambda name: True)
    launch(env_id=setting.video_env)
    said = f"already finished; for a video: --evaluate {tmp_path / 'run'} --capture-video\n"
    assert said in launch(env_id=setting.video_env, capture_video=True)[1]
    assert said not in launch(env_id=setting.video_env)[1]


class BlindEnv(CountedEnv):
    render_mode = "rgb_array"

    def render(self):
        raise ValueError("no display")


class FormlessEnv(CountedEnv):
    """It does not know its render_mode."""

    def render(self):
        return np.zeros((9, 9, 3), np.uint8)


gym.register("Blind-v0", lambda **_: BlindEnv())
gym.register("Formless-v0", lambda **_: FormlessEnv())


@pytest.mark.parametrize("setting", CONTINUOUS, ids=str, indirect=True)
@pytest.mark.parametrize("kind", ["Blind", "Formless"])
def test_an_environment_that_cannot_be_filmed_begins_nothing(
    setting, kind, launch, tmp_path, monkeypatch
):
    monkeypatch.setattr(setting.script, "find_spec", lambda name: True)
    with pytest.raises((ValueError, AssertionError)):  # Gymnasium's
        launch(env_id=f"{kind}-v0", capture_video=True)
    assert list(tmp_path.iterdir()) == []
    assert CountedEnv.open == []
    assert launch(env_id=f"{kind}-v0")[0] == 0


def test_noise_is_a_scale_but_for_flips(setting):
    assert setting.args("runs", noise="normal", noise_level=2.0).noise_level == 2


def test_a_folders_name_is_valid_on_all_systems(setting):
    """Windows refuses these; with a colon, Gymnasium imports a module first."""
    folder = setting.args("runs", run_name="module:namespace/Task-v0__1").run_dir
    assert folder.parent.name == "runs"
    assert not set(folder.name) & set('<>:"/|?*')


@pytest.mark.parametrize("setting", [SPPO_CONTINUOUS], ids=str, indirect=True)
def test_an_environment_of_ones_own_needs_no_mujoco(setting, monkeypatch):
    others = [found for found in distributions() if found.name != "mujoco"]
    monkeypatch.setattr(setting.script, "distributions", lambda: others)
    assert set(setting.script.provenance()["versions"]) == {"torch", "gymnasium", "numpy"}
