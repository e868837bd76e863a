"""What the five scripts promise about a run: what it leaves, how it continues, what it refuses."""

import errno
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import distributions, version
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import helpers
import numpy as np
import pytest
import safetensors.torch
import torch
from filelock import FileLock
from helpers import (
    A2C,
    ATARI,
    CONTINUOUS,
    PPO,
    SA2C_ATARI,
    SA2C_CONTINUOUS,
    SETTINGS,
    SPPO_ATARI,
    SPPO_CONTINUOUS,
    checkpoint,
    only,
    progress,
    read_lines,
    scalars,
    sha256,
    weights,
    words,
)

import sppo_rlhf as rlhf

SMALL_TEXTS = helpers.SMALL_TEXTS | {"eval_freq": 32}
TEXTS = helpers.Setting(rlhf, SMALL_TEXTS, "", batch=8)
ALL = [*SETTINGS, TEXTS]
# One script for each text of `main`, `evaluate` and the functions that save an agent
KINDS = [SPPO_CONTINUOUS, SA2C_ATARI, TEXTS]
RUNS = Path("all")  # in the folder of the test


@pytest.fixture(autouse=True)
def workplace(request, monkeypatch, tmp_path, signals):
    """Scripts are started in `tmp_path`, where language models have the toy."""
    helpers.work_in(monkeypatch, tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    if "setting" in request.fixturenames and request.getfixturevalue("setting").is_text:
        Path("runs").mkdir()
        Path("runs/toy").symlink_to(request.getfixturevalue("toy"))


@pytest.fixture
def launch(setting, monkeypatch, capsys):
    """Runs `main` with flags over those of a small run. Returns (exit status or message, output,
    errors)."""

    def launch(*more, **flags):
        typed = words(setting.small | {"runs_dir": RUNS} | flags)
        end = helpers.call_main(monkeypatch, setting.script, *typed, *more)
        return end, *capsys.readouterr()

    return launch


def every(setting, updates=1):
    """Flags for an evaluation and a checkpoint after each so many updates."""
    steps = int(updates * setting.batch)
    if setting.is_text:
        return {"eval_freq": steps}
    return {"eval_freq": steps, "checkpoint_freq": steps // setting.small["num_envs"]}


def tensor_sha256(tensor):
    return hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest()


def files(folder):
    """{path: SHA-256}, but for the lock."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != "lock")
    return {path: sha256(path) for path in paths}


def sessions(folder):
    return read_lines(folder / "sessions.jsonl")


def evaluated(folder):
    """Steps of the evaluations after updates."""
    return [row["step"] for row in progress(folder) if row["step"]]


def step_and_speeds(state):
    """Step, and steps per second, in a checkpoint."""
    return state["progress"][0], state["progress"][-1]


# ---- What a run leaves


@only(*ALL)
def test_a_run_writes_its_files_and_messages(setting, launch, monkeypatch):
    """Each is on the disk before it gets its name; the summary comes last."""
    synced = set()
    named = []
    rename = os.replace
    flushes = helpers.record(monkeypatch, setting.script.SummaryWriter, "flush")

    def recording_replace(source, target):
        assert Path(source).stat().st_ino in synced
        named.append(Path(target).name)
        # TensorBoard's log reaches as far as a checkpoint
        assert len(flushes) >= named.count("checkpoint.pt")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", lambda file: synced.add(os.fstat(file).st_ino))
    monkeypatch.setattr(os, "replace", recording_replace)
    end, out, _ = launch(**every(setting, 2), seed=7, noise="uniform")
    assert end == 0
    (folder,) = RUNS.iterdir()
    script = Path(setting.script.__file__)
    agent = ["progress.csv", "samples.jsonl" if setting.is_text else "agent.safetensors"]
    initial = agent if setting.is_text else []
    saved = [*agent, "checkpoint.pt"]
    assert named == ["sessions.jsonl", script.name, *initial, *saved, *saved, "summary.json"]
    left = {path.name for path in folder.iterdir() if not path.name.startswith("events")}
    assert left - {"lock", "policy"} == set(named)
    assert (folder / "policy").exists() == setting.is_text

    row = progress(folder)[-1]
    score = f"reward {row['return_mean']:.3f}" if setting.is_text else f"{row['return_mean']:.1f}"
    last_line = out.splitlines()[-1]
    assert last_line.startswith(f"{folder}: ")
    assert f"{score}, " in last_line
    assert last_line.endswith(f"/s; to play it: python enjoy.py {folder}")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary == row | {"sps": np.median(step_and_speeds(checkpoint(folder))[1])}

    (session,) = sessions(folder)
    flags = {"seed": 7, "noise_level": 0.05, "alpha": 0.5, "exp_name": setting.symmetric_algo}
    assert flags.items() <= session["args"].items()
    assert session["command"] == sys.argv
    assert session["directory"] == str(script.parent)
    assert session["working_directory"] == str(Path.cwd())
    digest = sha256(script)
    assert session["files"][str(script)] == digest == sha256(folder / script.name)
    versions = {one.name: version(one.name) for one in distributions()}
    assert session["versions"] == versions | {"torch": torch.__version__}


@only(*ALL)
def test_progress_has_the_means_of_what_was_logged_since_the_evaluation_before(setting):
    """Evaluations follow where a multiple was passed, here of one and a half updates."""
    _, folder = setting.run(RUNS, **every(setting, 1.5))
    logged = scalars(folder)
    rows = progress(folder)
    one, *steps = (i * setting.batch for i in (1, 2, 3, 4))
    assert [step for step, _ in logged["losses/entropy"]] == [one, *steps]
    assert evaluated(folder) == steps
    scores = [(row["step"], pytest.approx(row["return_mean"])) for row in rows]
    assert logged.pop("eval/return_mean") == scores
    assert {*logged, "step", "return_mean", "return_std", "length_mean"} <= set(rows[-1])
    for before, row in zip([0, *steps], rows[-3:]):
        for name, entries in logged.items():
            since = [value for step, value in entries if before < step <= row["step"]]
            assert row[name] == pytest.approx(np.mean(since), rel=1e-4, abs=1e-6), name


@only(SPPO_CONTINUOUS, SA2C_ATARI)
def test_a_metric_may_be_missing_and_no_return_may_be_nan(setting):
    """Before an episode has ended, its length is missing."""
    flags = {} if setting.atari else {"env_id": "TenSteps-v0", "num_minibatches": 1}
    flags |= {"num_envs": 1, "num_steps": 4, "eval_freq": 4, "total_timesteps": 16}
    _, folder = setting.run(RUNS, **flags)
    lengths = [row["charts/episodic_length"] for row in progress(folder)]
    np.testing.assert_equal(lengths, [np.nan, np.nan, 10, 10])
    with pytest.raises(setting.script.Failed, match="a return of the evaluation at step 4"):
        setting.script.evaluation_row(4, np.array([1, np.inf]), np.ones(2), [])


@only(*A2C)
def test_an_entry_in_a2cs_log_has_the_means_of_all_updates_since_the_last(setting, monkeypatch):
    each = scalars(setting.run(RUNS)[1])
    monkeypatch.setattr(time, "perf_counter", itertools.count().__next__)  # a second a call
    summary, folder = setting.run(RUNS, log_freq=128)
    assert summary["sps"] == 128
    rare = scalars(folder)
    for name in ("losses/value_loss", "losses/entropy", "losses/grad_norm"):
        values = np.array([value for _, value in each[name]])
        steps, means = zip(*rare[name])
        assert steps == (128, 256)
        assert means == pytest.approx(values.reshape(2, 2).mean(axis=1))


@only(*ALL)
def test_a_tracked_run_tells_weights_and_biases_its_arguments(setting, monkeypatch):
    told = {}
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=told.update))
    _, folder = setting.run(RUNS, track=True, total_timesteps=setting.batch, seed=3)
    assert told["config"]["seed"] == 3
    assert told["name"] == folder.name
    assert told["sync_tensorboard"]
    # One id per folder, which W&B keeps there: not one for all runs of this name
    assert told["dir"] == folder
    assert told["resume"] == "auto"
    assert "id" not in told


# ---- Names of runs

HARMLESS = {"runs_dir": "elsewhere", "track": True, "compile": True, "device": "cuda"}
HARMLESS |= {"gradient_checkpointing": True, "start_from": None}  # a checkpoint's digest counts


@only(*ALL)
def test_only_what_may_change_results_changes_the_folder(setting, monkeypatch):
    def name(**flags):
        return setting.folder(**{"runs_dir": RUNS} | flags).name

    plain = name()
    task = setting.small.get("env_id", "toy")
    assert plain.startswith(f"{task}__{setting.symmetric_algo}__none__1__")
    for flags in ({"gamma": 0.9}, {"beta": 0.0}, {"eval_freq": 64}, {"seed": 2}):
        assert name(**flags) != plain, flags
    args = setting.args(RUNS)
    known = set(HARMLESS) & set(vars(args))
    assert set(setting.script.NO_EFFECT) == known
    for flag in known:
        assert name(**{flag: HARMLESS[flag]}) == plain, flag
    assert setting.folder(RUNS, exp_name="a/b").parent == setting.folder(RUNS).parent
    # A project that has moved finds its runs again
    moved = {f"/moved{path}": x for path, x in helpers.digests_of(setting.script, args).items()}
    assert setting.script.run_folder(args, moved).name == plain
    monkeypatch.setenv("WORLD_SIZE", "2")  # each process samples with a seed of its own
    assert (name() != plain) == setting.is_text
    monkeypatch.setattr(setting.script, "SOURCE", setting.script.SOURCE + b"# an edit\n")
    monkeypatch.delenv("WORLD_SIZE")
    assert name() != plain


@only(SA2C_CONTINUOUS)
def test_imported_files_that_are_not_installed_are_recorded(setting, tmp_path, monkeypatch):
    """Libraries, Python's own files and what torch.compile has made are not."""
    before = setting.script.file_digests()
    assert before[__file__] == sha256(Path(__file__))  # this module is not installed
    assert not {torch.__file__, json.__file__} & set(before)
    generated = tmp_path / "generated.py"
    generated.write_text("")
    module = SimpleNamespace(__file__=str(generated))
    for name in "torch.tasks.c", "c.inductor_entry_cpp":
        monkeypatch.setitem(sys.modules, name, module)
    assert setting.script.file_digests() == before
    monkeypatch.setitem(sys.modules, "of_ours", module)
    assert setting.script.file_digests().keys() - before == {str(generated)}


@only(SA2C_CONTINUOUS)
def test_a_script_that_is_edited_while_it_runs_is_recorded_as_it_was(setting, tmp_path):
    path = tmp_path / f"{setting}.py"
    was = shutil.copy(setting.script.__file__, path).read_bytes()
    script = helpers.import_file(path)
    path.write_text("# an edit")
    _, folder = replace(setting, script=script).run(RUNS, total_timesteps=64)
    assert (folder / path.name).read_bytes() == was
    (session,) = sessions(folder)
    assert session["files"][str(path)] == hashlib.sha256(was).hexdigest()


@only(SPPO_CONTINUOUS)
def test_an_edited_environment_makes_another_run(launch, tmp_path, monkeypatch):
    """Its file is imported only when the environment is made."""
    monkeypatch.syspath_prepend(tmp_path)
    gym.register("Mine-v0", "edited_env:Mine")
    flags = {"env_id": "Mine-v0", "total_timesteps": 64}
    for text, trains in (("", True), ("", False), ("# edited", True)):
        Path("edited_env.py").write_text(f"from test_contract import TenStepsEnv as Mine{text}")
        assert ("from step 0" in launch(**flags)[1]) == trains


READ = "texts.jsonl saved/1 saved/2 policy/weights reward/weights words/1 base/1".split()
READ = {name: name for name in READ} | {
    "reward/adapter_config.json": '{"base_model_name_or_path": "base"}',
    "own_part.py": "def own(texts): pass",
    "own_training.py": "from own_part import own",
    "own_other.py": "from own_part import own",
}


def test_what_a_run_on_texts_reads_is_part_of_its_name():
    """But for hidden files and byte code."""
    hidden = {"other.py": "", "policy/.cache/other": "", "saved/__pycache__/1.pyc": ""}
    for name, content in (READ | hidden).items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(content)
    flags = {"policy_model": "policy", "dataset": "texts.jsonl", "eval_dataset": "saved:test"}
    flags |= {"reward_model": ("own_training.py:own", "reward", "own_other.py:own")}
    flags |= {"tokenizer": "words"}
    rlhf.import_functions(TEXTS.args(RUNS, **flags))
    folder = TEXTS.folder(RUNS, **flags)
    for name, content in (READ | hidden).items():
        Path(name).write_text(content + " ")
        assert (TEXTS.folder(RUNS, **flags) == folder) == (name in hidden), name
        Path(name).write_text(content)
    Path("saved/1").rename("saved/3")
    assert TEXTS.folder(RUNS, **flags) != folder


# ---- Runs that are started again


@only(*KINDS)
def test_a_finished_run_is_not_trained_again(setting, launch):
    """The same command prints its score again, and writes a summary that a kill has prevented."""
    _, first, _ = launch()
    (folder,) = RUNS.iterdir()
    before = files(folder)
    end, again, _ = launch()
    assert end == 0
    assert again == first.splitlines()[-1] + "\n"
    assert files(folder) == before
    (folder / "summary.json").unlink()
    assert launch()[0] == 0
    after = files(folder)
    changed = {path.name for path in before if after[path] != before[path]}
    assert changed == {"sessions.jsonl"}


def draw():
    """From all global generators."""
    return random.random() + np.random.random() + torch.rand(1).item()


def lucky(texts):
    """A reward function."""
    return [draw() for _ in texts]


LORA = replace(TEXTS, small=TEXTS.small | {"lora_r": 2})


@only(*ALL, LORA)
def test_a_continued_run_equals_an_uninterrupted_one(setting):
    """To the last bit. A kill comes before the first checkpoint, which follows the third update,
    and another after an evaluation or an update that no checkpoint has: in the middle of episodes
    and of an entry in A2C's log."""
    batch = setting.batch
    flags = {"total_timesteps": 5 * batch, "seed": 5, "noise": "normal", "noise_level": 2.0}
    flags |= every(setting, 2.5)
    if setting.is_text:
        flags |= {"reward_model": (f"{__file__}:lucky",), "ce_coef": 0.1}
    else:
        flags |= {"eval_freq": 2 * batch} | ({} if setting.atari else {"env_id": "Drawing-v0"})
        flags |= {} if setting.ppo else {"log_freq": 2 * batch}
    whole_summary, whole = setting.run("whole", **flags)
    for rollouts, step in (1, None), (4, 3 * batch):
        torch.manual_seed(0)
        np.random.seed(None)
        folder = setting.interrupt("continued", rollouts, **flags)
        saved = (folder / "checkpoint.pt").exists()
        assert (step_and_speeds(checkpoint(folder))[0] if saved else None) == step
    torch.manual_seed(0)
    np.random.seed(None)
    summary, folder = setting.run("continued", **flags)
    assert len(sessions(folder)) == 3
    assert folder.name == whole.name
    assert_same_bytes(setting, folder, whole)
    assert scalars(folder) == scalars(whole)
    assert summary | {"sps": 0} == whole_summary | {"sps": 0}


def assert_same_bytes(setting, folder, whole):
    """But for measured speed."""
    states = checkpoint(folder), checkpoint(whole)
    for state in states:
        step_and_speeds(state)[1].clear()
    texts = [json.dumps(state, default=tensor_sha256) for state in states]
    assert texts[0] == texts[1]
    for name in ("progress.csv", "samples.jsonl" if setting.is_text else "agent.safetensors"):
        assert sha256(folder / name) == sha256(whole / name)


@only(*ALL, LORA)
def test_a_run_that_starts_from_another_equals_one_that_was_long_from_the_start(setting):
    """Wherever the other has moved. It is killed before its first checkpoint, and after."""
    flags = every(setting) | {"seed": 5, "noise": "normal"}
    flags |= {"anneal_lr": False, "anneal_clip": False} if setting in (SPPO_ATARI,) else {}
    longer = flags | {"total_timesteps": 4 * setting.batch}
    _, whole = setting.run("whole", **longer)
    _, first = setting.run(RUNS, **flags, total_timesteps=2 * setting.batch)
    names = set()
    for rollouts, place in (0, "moved"), (1, "again"):
        first = first.rename(place)
        names.add(setting.interrupt(RUNS, rollouts, **longer, start_from=place).name)
    _, folder = setting.run(RUNS, **longer, start_from=place)
    assert names == {folder.name} != {whole.name}
    assert len(step_and_speeds(checkpoint(folder))[1]) == 2  # its own
    assert_same_bytes(setting, folder, whole)
    session = sessions(folder)[-1]
    assert session["args"]["start_from"] == "again"
    path = str(first.absolute() / "checkpoint.pt")
    assert session["files"][path] == sha256(first / "checkpoint.pt")


@only(*KINDS)
def test_a_run_starts_only_from_a_checkpoint_with_fewer_steps(setting, launch, monkeypatch):
    """On which nobody is at work. Nothing has begun otherwise."""
    monkeypatch.setattr(setting.script, "FileLock", lambda path, **_: FileLock(path, timeout=0))
    folder = setting.interrupt(RUNS, 0, **every(setting))
    assert launch(start_from=folder, seed=2)[0] == f"error: {folder} has no checkpoint"
    folder = setting.interrupt(RUNS, 1, **every(setting))
    with FileLock(folder / "lock"):
        end, _, _ = launch(start_from=folder, seed=2)
    assert end.startswith(f"error: another process is at work on {folder.absolute()}, or locking")
    _, folder = setting.run(RUNS, **every(setting))
    end, _, _ = launch(start_from=folder)
    assert end.startswith(f"error: {folder} has {4 * setting.batch:,} of ")
    assert len(list(RUNS.iterdir())) == 1


@only(*KINDS)
def test_a_run_goes_on_from_an_unfinished_one_by_any_name(setting, launch, monkeypatch):
    """It keeps the rows if it does the same; else it has none, and what differs is said."""
    flags = every(setting) | ({"anneal_lr": False} if setting == SPPO_ATARI else {})
    _, whole = setting.run("whole", **flags)
    parent = setting.interrupt(RUNS, 2, **flags)
    os.symlink(parent.absolute(), "link")
    end, out, _ = launch(**flags, start_from="link")
    at = f"starts from {parent.name} at step {2 * setting.batch:,}; other: "
    assert end == 0
    assert f"{at}nothing, it goes on\n" in out
    (folder,) = {path for path in RUNS.iterdir() if path.name != parent.name}
    assert_same_bytes(setting, folder, whole)
    end, out, _ = launch(**flags, start_from="link", seed=2, learning_rate=1e-6)
    rate = setting.args(RUNS).learning_rate
    said = ["seed 1 -> 2", f"learning_rate {rate} -> 1e-06"]
    assert end == 0
    (line,) = re.findall(f"{re.escape(at)}(.*)", out)
    assert sorted(line.split(", ")) == sorted(said)
    names = {parent.name, folder.name}
    (other,) = {path for path in RUNS.iterdir() if path.name not in names}
    assert min(evaluated(other)) >= (2 if setting.is_text else 3) * setting.batch


@only(SA2C_CONTINUOUS, SA2C_ATARI)
def test_the_state_of_another_optimizer_is_refused(setting, launch):
    """It would be read, and fail at the first step."""
    ppo = SPPO_ATARI if setting.atari else SPPO_CONTINUOUS
    _, folder = ppo.run("ppo")
    end, _, _ = launch(start_from=folder, total_timesteps=10_000)
    assert end == f"error: {folder.absolute() / 'checkpoint.pt'} is from another optimizer"


@only(*ALL)
def test_a_started_run_has_its_own_scores_and_its_own_flags(setting):
    """Those of a run with other flags stay behind. What the optimizer has saved does not override
    flags."""
    flags = every(setting)
    if setting in CONTINUOUS:
        flags |= {"env_id": "Low-v0"}
        other = {"env_kwargs": '{"low": -3}'}
    elif setting.is_text:
        other = {"reward_model": (f"{__file__}:lucky",)}
    else:
        other = {"repeat_action_probability": 0.25}
    other |= {"learning_rate": 1e-6} | ({"anneal_lr": False} if setting == SPPO_ATARI else {})
    _, parent = setting.run(RUNS, **flags, total_timesteps=2 * setting.batch)
    _, folder = setting.run(RUNS, **flags, **other, start_from=str(parent))
    steps = [i * setting.batch for i in range(2 if setting.is_text else 3, 5)]
    assert [row["step"] for row in progress(folder)] == steps
    state = checkpoint(folder)
    (group,) = state["optimizer"]["param_groups"]
    assert group["lr"] == 1e-6
    assert len(state.get("recent_episodes", [])) == (12 if setting in CONTINUOUS else 0)


def break_disk(setting, patch):
    def half(content, path):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    patch.setattr(torch, "save", half)


def save_more(setting, patch):
    save = torch.save
    more = {"mine": np.float64(1)}  # as an edit may save
    patch.setattr(torch, "save", lambda content, path: save(content | more, path))


def make_infinite(setting, patch):
    original = setting.loss_function

    def infinite(*arguments):
        result, metrics = original(*arguments)
        if torch.is_tensor(result):
            return result * torch.inf, metrics
        return result, metrics | {"losses/grad_norm": torch.tensor(torch.inf)}

    patch.setattr(setting.script, setting.loss_name, infinite)


def raise_error(setting, patch):
    def raising(*_):
        raise ValueError("two\nlines")

    patch.setattr(setting.script, setting.loss_name, raising)


FAULTS = [  # what goes wrong in the second update, what is said, and what failed.txt has
    (break_disk, "No space left on device", None),
    (save_more, "checkpoint.pt.tmp can't be read: it is damaged, or has more than tensors", None),
    (make_infinite, "error: gradient not finite, step {} (rate? reward?)", "Failed: "),
    (raise_error, "two\nlines", "ValueError: "),
]


@only(*ALL)
@pytest.mark.parametrize(("fault", "message", "noted"), FAULTS)
def test_an_error_leaves_the_checkpoint_before_it(setting, launch, fault, message, noted):
    """The same command continues from there; what was written after it does not come twice. An
    error that may be the method's is noted, until the run goes on."""
    flags = every(setting)
    steps = [i * setting.batch for i in (1, 2, 3, 4)]
    folder = setting.interrupt(RUNS, 1, **flags)
    with pytest.MonkeyPatch.context() as patch:
        fault(setting, patch)
        try:
            end, _, _ = launch(**flags)
        except (OSError, ValueError) as error:
            end = str(error)
    assert message.format(steps[1]) in end
    assert step_and_speeds(checkpoint(folder))[0] == steps[0]
    assert evaluated(folder) == steps[: 1 if noted else 2]
    failed = folder / "failed.txt"
    assert failed.exists() == bool(noted)
    assert not noted or failed.read_text() == f"{noted}{' '.join(end.split())}\n"
    end, out, _ = launch(**flags)
    assert not failed.exists()
    assert end == 0
    assert f"from step {steps[0]}, with" in out
    assert evaluated(folder) == steps
    assert [step for step, _ in scalars(folder)["losses/entropy"]] == steps


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ZeroDivisionError("a\nb"), "ZeroDivisionError: a b\n"),
        (rlhf.Failed("error: a"), "Failed: error: a\n"),
        (OSError("a"), None),
        (SystemExit("a"), None),
        (KeyboardInterrupt(), None),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), None),
        (RuntimeError("CUDA error: a"), None),
        (RuntimeError("Connection closed by peer"), None),
    ],
    ids=str,
)
def test_only_errors_that_may_be_the_methods_are_noted(tmp_path, error, text):
    """Not the machine's, nor another process's. An older note is gone."""
    failed = tmp_path / "failed.txt"
    failed.write_text("older")
    with pytest.raises(type(error)), rlhf.failure_noted(tmp_path):
        raise error
    assert (failed.read_text() if failed.exists() else None) == text


@only(*KINDS)
def test_a_run_has_one_process_at_a_time(setting, launch):
    folder = setting.interrupt(RUNS, 1, **every(setting))
    before = files(folder)
    with FileLock(folder / "lock"):
        end, _, _ = launch(**every(setting))
    assert end.startswith(f"error: another process is at work on {folder}")
    assert files(folder) == before
    assert launch(**every(setting))[0] == 0


@helpers.needs_gpu
@only(*ATARI, TEXTS, replace(TEXTS, small=TEXTS.small | {"amp": "auto"}))
def test_on_a_gpu_a_run_is_compiled_and_continued(setting, launch):
    flags = every(setting) | {"device": "cuda"}
    flags |= {"compile": True, "amp": "auto"} if setting.atari else {}
    folder = setting.interrupt(RUNS, 2, **flags)
    end, out, _ = launch(**flags)
    assert end == 0
    assert "torch.compile failed" not in out
    assert len(sessions(folder)) == 2


# ---- What a run refuses

REFUSED = [  # scripts, and flags, of which the last is named in what is said
    (ALL, "--z 0, --z -inf, --seed -1, --vf-coef nan, --alpha -1, --beta -1, --alpha 0 --beta 0"),
    (ALL, "--learning-rate -1e-4, --gamma 1.01, --gae-lambda 95, --max-grad-norm 0"),
    (ALL, "--noise-level 0.1, --noise adv_flip --noise-level 1.5, --noise normal --noise-level -1"),
    (ALL, "--total-timesteps 0, --eval-freq 0, --eval-episodes 0"),
    (SETTINGS, "--num-envs 0, --num-steps 0, --ent-coef -0.01"),
    ([*PPO, TEXTS], "--num-minibatches 0, --num-minibatches 5, --update-epochs 0"),
    ([*PPO, TEXTS], "--clip-coef -0.1"),
    (PPO, "--num-minibatches 64 --norm-adv"),
    (A2C, "--num-envs 1 --num-steps 1 --norm-adv, --rmsprop-eps -1e-5, --log-freq 0"),
    (ATARI, "--env-id Brekout, --env-id ALE/Breakout-v5, --env-id PongDeterministic-v4"),
    (ATARI, "--checkpoint-freq 0, --repeat-action-probability 25"),
    (CONTINUOUS, "--checkpoint-freq -1, --hidden-sizes 0, --bins 1, --noise flip"),
    (CONTINUOUS, "--policy gaussian --beta 1, --env-id Hoper-v4, --env-id nowhere:Task-v0"),
    (CONTINUOUS, "--env-id CartPole-v1, --env-id Pictures-v0, --env-id Huge-v0"),
    (CONTINUOUS, "--policy gaussian --env-id Whole-v0, --env-kwargs [1], --env-kwargs {low"),
    ([TEXTS], "--batch-size 0, --prompt-length 0, --response-length 0, --micro-batch-size 0"),
    ([TEXTS], "--temperature 0, --noise flip --noise-level 1.5, --num-minibatches 8"),
    ([TEXTS], "--reward-weights 1 2, --reward-weights nan, --reward-weights inf"),
    ([TEXTS], "--reward-weights 0, --reward-model --reward-weights"),
    ([TEXTS], "--lora-r 8 --lora-alpha 0, --lora-alpha 8"),
]
CASES = []
for settings, flags in REFUSED:
    for each in settings:
        CASES += [(each, words) for words in flags.split(", ")]


@pytest.mark.parametrize(("setting", "flags"), CASES, ids=str, indirect=["setting"])
def test_flags_that_would_mean_something_else_are_refused(flags, launch, monkeypatch):
    """Nothing has begun then."""
    monkeypatch.setenv("WORLD_SIZE", "2")  # which only sppo_rlhf.py reads
    end, _, err = launch(*flags.split())
    name, *value = flags.split("--")[-1].split()
    said = " ".join(f"{end} {err}".replace("│", "").split()).replace("-", "_")  # in a box, or not
    named = value if name in ("env-id", "noise") else [name]
    assert end
    assert all(word.replace("-", "_") in said for word in named)
    assert not RUNS.exists()


@only(*CONTINUOUS)
def test_a_gaussian_policy_needs_no_bounds(launch):
    assert launch(env_id="Unbounded-v0", policy="gaussian")[0] == 0


@only(*CONTINUOUS)
def test_an_environment_is_made_with_its_keywords(setting):
    flags = {"env_id": "Low-v0", "env_kwargs": '{"low": -3}', "total_timesteps": 64}
    _, folder = setting.run(RUNS, **flags)
    assert setting.folder(RUNS, **flags | {"env_kwargs": '{"low":-3}'}) == folder
    low, high = safetensors.torch.load_file(folder / "agent.safetensors")["action_bounds"]
    assert low.tolist() == [-3, -3]
    assert high.tolist() == [1, 1]


@only(SPPO_CONTINUOUS, SA2C_ATARI)
def test_without_a_compiler_a_run_says_so_and_goes_on(setting, monkeypatch, capsys):
    """A function that fails uncompiled, too, shows its own error."""

    def root(x):
        if x < 0:
            raise ValueError("a copy's own mistake")
        return x**0.5

    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda *inputs: 1 / 0)
    call = setting.script.compiled(root)
    assert call(4) == 2
    assert call(9) == 3
    with pytest.raises(ValueError, match="a copy's own mistake"):
        call(-1)
    failed = "torch.compile failed, running uncompiled: ZeroDivisionError"
    assert capsys.readouterr().out.count(failed) == 1


# ---- Environments of one's own


class TenStepsEnv(gym.Env):
    """Episodes of ten steps. As in BipedalWalker, a seed does not undo what has been."""

    age = 0
    open = []
    wrong = {}  # what the fifth step returns instead: {place: value}

    def __init__(self, low=-1, high=1, dtype=np.float32):
        self.observation_space = gym.spaces.Box(-1, 1, (2,))
        self.action_space = gym.spaces.Box(low, high, (2,), dtype)
        self.open.append(self)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return np.array([self.np_random.random(), self.age], np.float32), {}

    def step(self, action):
        self.time += 1
        self.age += 1
        obs = np.array([self.np_random.random(), self.age], np.float32)
        returned = [obs, action.sum() + obs[0], self.time == 10, False, {}]
        for place, value in self.wrong.items() if self.age == 5 else ():
            returned[place] = value
        return tuple(returned)

    def close(self):
        self.open.remove(self)


class DrawingEnv(TenStepsEnv):
    """Draws from all random numbers, also when it is made, and leaves the working directory."""

    def __init__(self):
        super().__init__()
        self.age = draw()
        os.chdir("/")

    def step(self, action):
        self.age += draw()
        self.age += self.action_space.sample().sum() + self.observation_space.sample().sum()
        return super().step(action)


class DrawingWrapper(gym.Wrapper):
    """Draws from a space that only it has."""

    def __init__(self, env):
        super().__init__(env)
        self.action_space = gym.spaces.Box(-1, 1, (2,))

    def step(self, action):
        return self.env.step(action + self.action_space.sample())


LARGEST = np.finfo(np.float32).max
gym.register("Low-v0", TenStepsEnv)
gym.register("TenSteps-v0", lambda **_: TenStepsEnv())
gym.register("AYear-v0", lambda **_: TenStepsEnv(), max_episode_steps=105_120)
gym.register("Drawing-v0", lambda **_: DrawingWrapper(DrawingWrapper(DrawingEnv())))
gym.register("Pictures-v0", lambda **_: gym.wrappers.ReshapeObservation(TenStepsEnv(), (2, 1)))
gym.register("Unbounded-v0", lambda **_: TenStepsEnv(-np.inf, np.inf))
gym.register("Huge-v0", lambda **_: TenStepsEnv(-LARGEST, LARGEST))
gym.register("Whole-v0", lambda **_: TenStepsEnv(dtype=int))
NAN = np.array([np.nan, 0])
INF = np.array([0, np.inf])


@only(*CONTINUOUS)
@pytest.mark.parametrize("wrong", [{0: INF}, {0: NAN, 3: True}], ids=str)
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_a_number_that_is_not_finite_stops_the_run_where_it_begins(setting, wrong, monkeypatch):
    monkeypatch.setattr(TenStepsEnv, "wrong", wrong)
    with pytest.raises(SystemExit, match="error: observation not finite near step [56]: "):
        setting.run(RUNS, env_id="TenSteps-v0", **every(setting))
    (folder,) = RUNS.iterdir()
    left = {path.name for path in folder.iterdir()}
    assert not left & {"agent.safetensors", "checkpoint.pt", "progress.csv"}


@only(*CONTINUOUS)
@pytest.mark.parametrize(("until", "rate"), [(15, 0.25), (0, 0.0)])
def test_an_evaluation_has_the_share_of_episodes_whose_last_step_says_success(
    setting, until, rate, monkeypatch
):
    """Of four episodes two say nothing, which have failed."""
    flags = {"env_id": "TenSteps-v0", "eval_episodes": 4, "total_timesteps": 128}
    _, folder = setting.run(RUNS, **flags)
    assert "success_rate" not in progress(folder)[0]
    step = TenStepsEnv.step

    def step_with_success(env, action):
        *outcome, info = step(env, action)
        if env.time == 10 and env.age < 25:
            info = {"is_success": env.age < until}
        return *outcome, info

    monkeypatch.setattr(TenStepsEnv, "step", step_with_success)
    summary, folder = setting.run("more", **flags, **every(setting))
    assert summary["success_rate"] == rate
    assert [row["success_rate"] for row in progress(folder)] == [rate, rate]


@only(*CONTINUOUS)
def test_an_episode_of_a_registered_limit_fits_between_two_checkpoints(setting, launch):
    """Wherever in the rollout it begins."""
    flags = {"total_timesteps": 64, "num_envs": 2, "num_steps": 32}
    for env_id, interval in {"TenSteps-v0": 200_000, "AYear-v0": 2 * (105_120 + 32)}.items():
        _, out, _ = launch(env_id=env_id, **flags)
        assert f", with a checkpoint every {interval:,} steps" in out


@only(*ALL)
def test_environments_are_closed_after_all_ends_of_a_run(setting, monkeypatch, launch):
    """And after evaluations and checkpoints."""
    update = setting.script.update

    def interrupted(*args):
        if list(RUNS.glob("*/progress.csv")):
            raise KeyboardInterrupt
        return update(*args)

    monkeypatch.setattr(setting.script, "update", interrupted)
    monkeypatch.setattr(TenStepsEnv, "open", [])
    flags = {"env_id": "TenSteps-v0"} if setting in CONTINUOUS else {}
    end, _, _ = launch(**flags, **every(setting))
    assert end.startswith("interrupted; the same command continues")
    assert TenStepsEnv.open == []


@only(*CONTINUOUS)
def test_evaluations_change_no_training(setting):
    """Not even of environments that draw from Python's, NumPy's and PyTorch's global generators."""
    flags = {"env_id": "Drawing-v0", "noise": "normal"}
    _, often = setting.run(RUNS, eval_freq=64, **flags)
    _, rarely = setting.run(RUNS, eval_freq=256, **flags)
    assert torch.equal(weights(often), weights(rarely))


# ---- Kills at random times

LONGER = {
    "sppo_continuous": {"total_timesteps": 4096, "eval_freq": 512, "noise": "adv_flip"}
    | {"checkpoint_freq": 768},
    "sa2c_atari": {"total_timesteps": 512, "checkpoint_freq": 12},
    "sppo_rlhf": {"total_timesteps": 192, "eval_freq": 64},
}


@pytest.mark.slow
@only(*KINDS)
def test_a_run_killed_at_random_times_ends_with_the_same_bytes(setting):
    """It is killed twice, and once more when it has a checkpoint."""
    command = [sys.executable, setting.script.__file__]
    command += words(setting.small | LONGER[str(setting)])

    def start(runs_dir, pattern, count=1):
        """Waits until the run has so many files."""
        process = subprocess.Popen([*command, "--runs-dir", runs_dir])
        while len(list(Path(runs_dir).glob(pattern))) < count and process.poll() is None:
            time.sleep(0.01)
        return process

    process = start("whole", "*/events*")
    began = time.perf_counter()
    assert process.wait() == 0
    seconds = time.perf_counter() - began
    for pattern, count in ("*/events*", 1), ("*/events*", 2), ("*/checkpoint.pt", 1):
        process = start("killed", pattern, count)
        if pattern == "*/events*":
            time.sleep(random.uniform(0, seconds / 4))
        process.kill()
        process.wait()
    assert start("killed", "*/summary.json").wait() == 0
    (whole,) = Path("whole").iterdir()
    (killed,) = Path("killed").iterdir()
    assert killed.name == whole.name
    assert len(sessions(killed)) > 1
    for name in {"progress.csv", "agent.safetensors", "samples.jsonl"} & set(os.listdir(whole)):
        assert sha256(killed / name) == sha256(whole / name)
    assert torch.equal(weights(killed), weights(whole))
