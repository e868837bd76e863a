"""What every script promises about runs: identity, folder, stopping and resuming, errors."""

import copy
import hashlib
import io
import json
import math
import os
import pickle
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from filelock import FileLock
from helpers import (
    ONE_OF_EACH,
    SA2C_ATARI,
    SA2C_CONTINUOUS,
    SETTINGS,
    SPPO_ATARI,
    SPPO_CONTINUOUS,
    Signals,
    StopAfter,
    checkpoint,
    fake_wandb,
    progress,
    weights,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


@pytest.fixture(params=SETTINGS, ids=str)
def setting(request):
    return request.param


of_each = pytest.mark.parametrize("setting", ONE_OF_EACH, ids=str, indirect=True)
of_one = pytest.mark.parametrize("setting", [SPPO_CONTINUOUS], ids=str, indirect=True)


@pytest.fixture(autouse=True, scope="module")
def quick_games():
    """A game made here in place of the emulator, which `test_atari.py` tests."""
    with pytest.MonkeyPatch.context() as patch:
        for setting in (SPPO_ATARI, SA2C_ATARI):
            patch.setattr(setting.script, "AtariVectorEnv", Signals)
        yield


@pytest.fixture(scope="module")
def originals():
    """{(script, "finished" or "interrupted"): folder} of runs, for `a_run`."""
    return {}


@pytest.fixture
def a_run(originals, tmp_path_factory, tmp_path, setting):
    """Makes a copy of a run with an evaluation after each of its four updates: one that is
    finished, or one that was interrupted after the second update. Returns its folder."""

    def copy_run(finished):
        name = "finished" if finished else "interrupted"
        if (str(setting), name) not in originals:
            stop = None if finished else StopAfter(2)
            folder = tmp_path_factory.mktemp(name)
            originals[str(setting), name] = setting.run(folder, stop=stop, eval_freq=64)[1]
        folder = tmp_path / name / "run"
        shutil.copytree(originals[str(setting), name], folder)
        return folder

    return copy_run


def record_argument(monkeypatch, script, function, position) -> list:
    """The arguments at `position` of all calls of a script's function from here on, a list that
    goes on growing."""
    original = getattr(script, function)
    recorded = []

    def recording(*arguments):
        recorded.append(copy.deepcopy(arguments[position]))
        return original(*arguments)

    monkeypatch.setattr(script, function, recording)
    return recorded


def record_raw_advantages(setting, monkeypatch) -> list:
    """The advantages that `gradient_and_metrics` gets, one tensor a minibatch."""
    position = -3 if setting.atari else -2
    return record_argument(monkeypatch, setting.script, "gradient_and_metrics", position)


@pytest.mark.parametrize("noise", ["none", "adv_flip"])
def test_advantages_flip_before_normalisation_anew_in_every_epoch(
    setting, tmp_path, monkeypatch, noise
):
    original = setting.script.perturb_advantage
    flips = []

    def recording(advantage, level, generator):
        noisy = original(advantage, level, generator)
        flips.append((advantage.clone(), noisy.clone(), level))
        return noisy

    monkeypatch.setattr(setting.script, "perturb_advantage", recording)
    raw = record_raw_advantages(setting, monkeypatch)
    setting.run(tmp_path, noise=noise, total_timesteps=128, norm_adv=True)
    epochs = setting.small["update_epochs"] if setting.ppo else 1
    assert len(flips) == (2 * epochs if noise == "adv_flip" else 0)
    minibatches = setting.small["num_minibatches"] if setting.ppo else 1
    for i, (advantage, noisy, level) in enumerate(flips):
        assert advantage.shape == (64,)
        assert level == 0.1
        assert 0 < (noisy != advantage).float().mean() < 0.3
        assert abs(advantage.mean()) > 0.001  # not normalised yet: else the mean would be zero
        learnt_from = torch.cat(raw[i * minibatches : (i + 1) * minibatches])
        torch.testing.assert_close(learnt_from.sort().values, noisy.sort().values)
    if noise == "adv_flip" and setting.ppo:
        first, second = (noisy for _, noisy, _ in flips[:2])
        assert torch.equal(first.abs(), second.abs())
        assert not torch.equal(first, second)


@of_one
@pytest.mark.parametrize("level", [0.0, 0.1, 0.4])
def test_corrected_flips_are_unbiased(setting, level):
    """Of rewards -1, 0 and 1, each flipped 300,000 times: the mean is the reward without noise."""
    reward = np.tile([-1.0, 0.0, 1.0], (300_000, 1))
    noisy = setting.script.perturb_reward(reward, "flip", level, np.random.default_rng(0))
    corrected = setting.script.correct_flips(noisy, level)
    standard_error = corrected.std(0).max() / 300_000**0.5
    np.testing.assert_allclose(corrected.mean(0), [-1, 0, 1], atol=5 * standard_error + 1e-12)
    if level:
        assert abs(noisy.mean(0) - [-1, 0, 1]).max() > 0.1  # without the correction: biased


def test_a_run_corrects_flips_on_request(setting, tmp_path, monkeypatch):
    """Before `compute_gae`, and nothing else: the score of the training is that of raw rewards."""
    script = setting.script
    perturb_reward = script.perturb_reward
    flips = []

    def recording(*arguments):
        noisy = perturb_reward(*arguments)
        flips.append((arguments[0].copy(), noisy.copy()))
        return noisy

    monkeypatch.setattr(script, "perturb_reward", recording)
    rewards = record_argument(monkeypatch, script, "compute_gae", 0)
    summary, _ = setting.run(tmp_path, noise="flip", noise_level=0.2, correct_flips=True)
    assert summary["correct_flips"]
    assert len(rewards) == len(flips) == 4
    for reward, (clean, noisy) in zip(rewards, flips):
        assert 0.05 < (noisy != clean).mean() < 0.4
        np.testing.assert_allclose(reward, (noisy - 0.2) / 0.6, rtol=1e-12)


@pytest.mark.parametrize(
    "setting", [SPPO_CONTINUOUS, pytest.param(SPPO_ATARI, marks=pytest.mark.slow)], ids=str
)
def test_sppo_is_ppo_with_alpha_k(setting, tmp_path, monkeypatch):
    """With k = alpha + beta |z|; and PPO with its other coefficients divided by k."""
    k = 0.5 + 20.0
    recorded = setting.record_actions(monkeypatch)
    runs = {}
    if setting.atari:  # its sums are long enough for Adam to magnify float32's rounding

        class Float64Agent(setting.script.Agent):
            def __init__(self, *arguments, **keywords):
                super().__init__(*arguments, **keywords)
                self.double().dtype = torch.float64

        monkeypatch.setattr(setting.script, "Agent", Float64Agent)
    for name, flags in {
        "sppo": dict(alpha=0.5, beta=20.0, ent_coef=0.01),
        "scaled": dict(alpha=k, beta=0.0, ent_coef=0.01),
        "rest": dict(
            alpha=1.0,
            beta=0.0,
            vf_coef=0.5 / k,
            ent_coef=0.01 / k,
            max_grad_norm=0.5 / k,
            adam_eps=1e-5 / k,
        ),
        "ppo": dict(alpha=1.0, beta=0.0, ent_coef=0.01),
    }.items():
        recorded.clear()
        _, folder = setting.run(tmp_path / name, **flags)
        training = recorded[: setting.small["total_timesteps"] // len(recorded[0])]
        runs[name] = (np.concatenate(training), weights(folder))
    for name in ("scaled", "rest"):
        np.testing.assert_array_equal(runs[name][0], runs["sppo"][0])
        torch.testing.assert_close(runs[name][1], runs["sppo"][1], rtol=0, atol=1e-5)
    assert (runs["ppo"][1] - runs["sppo"][1]).abs().max() > 1e-3  # while PPO itself is another run


def test_without_reverse_loss_the_default_is_the_plain_algorithm(setting, tmp_path):
    args = setting.script.prepare(setting.script.Args(beta=0.0, runs_dir=str(tmp_path)))
    assert (args.alpha, args.beta) == (1.0, 0.0)
    assert args.algo == ("" if setting.atari else "d") + setting.symmetric_algo[1:]
    args = setting.script.prepare(setting.script.Args(runs_dir=str(tmp_path)))
    assert args.alpha == 0.5
    assert args.beta > 0
    assert args.algo == setting.symmetric_algo


PAPER = {
    "sa2c_atari": dict(
        num_envs=16,
        num_steps=5,
        total_timesteps=5e6,
        learning_rate=7e-4,
        rmsprop_eps=1e-5,
        gae_lambda=1.0,
        vf_coef=0.25,
        ent_coef=0.01,
        norm_adv=False,
    ),
    "sppo_atari": dict(
        num_envs=8,
        num_steps=128,
        num_minibatches=1024 // 256,
        update_epochs=4,
        total_timesteps=5e6,
        learning_rate=2.5e-4,
        anneal_lr=True,
        adam_eps=1e-5,
        gae_lambda=0.95,
        clip_coef=0.1,
        anneal_clip=True,
        vf_coef=0.5,
        ent_coef=0.01,
        norm_adv=True,
        beta=1,
        divide_by_p_old=True,
    ),
    "sa2c_continuous": dict(
        num_envs=4,
        num_steps=8,
        learning_rate=7e-4,
        rmsprop_eps=1e-5,
        gae_lambda=1.0,
        vf_coef=0.5,
        ent_coef=0,
        norm_adv=False,
        bins=11,
        hidden_sizes=(64, 64),
    ),
    "sppo_continuous": dict(
        num_envs=1,
        num_steps=2048,
        num_minibatches=2048 // 64,
        update_epochs=10,
        learning_rate=3e-4,
        adam_eps=1e-5,
        gae_lambda=0.95,
        clip_coef=0.2,
        vf_coef=0.5,
        ent_coef=0,
        norm_adv=True,
        bins=11,
        hidden_sizes=(64, 64),
        beta=20,
        divide_by_p_old=True,
    ),
}


def test_defaults_are_the_papers(setting, tmp_path):
    """Those of the authors' code; for SA2C's alpha and beta it has none."""
    args = setting.script.prepare(setting.script.Args(runs_dir=str(tmp_path)))
    common = dict(gamma=0.99, max_grad_norm=0.5, alpha=0.5, z=-1, layer_norm=False)
    paper = PAPER[str(setting)] | common | {"correct_flips": False}
    assert {name: getattr(args, name) for name in paper} == paper


def test_equal_seeds_give_equal_bits(setting, tmp_path):
    flags = dict(noise="adv_flip", num_envs=2, eval_freq=64, total_timesteps=128)
    first, again, other = (
        setting.run(tmp_path / name, seed=int(name[0]), **flags)[1] for name in ("3a", "3b", "4")
    )
    assert torch.equal(weights(first), weights(again))
    assert (first / "progress.csv").read_bytes() == (again / "progress.csv").read_bytes()
    assert not torch.equal(weights(first), weights(other))


def record_metrics(setting, monkeypatch) -> list:
    """The metrics of all updates from here on, as numbers: a list that goes on growing."""
    original = setting.script.gradient_and_metrics
    recorded = []

    def recording(*arguments):
        gradient, metrics = original(*arguments)
        recorded.append({name: metric.item() for name, metric in metrics.items()})
        return gradient, metrics

    monkeypatch.setattr(setting.script, "gradient_and_metrics", recording)
    return recorded


@pytest.mark.parametrize("setting", [SPPO_CONTINUOUS, SPPO_ATARI], ids=str)
def test_the_ratio_starts_at_one(setting, tmp_path, monkeypatch):
    """Log-probabilities of the rollout, and of its first minibatch, are the same."""
    recorded = record_metrics(setting, monkeypatch)
    setting.run(tmp_path, total_timesteps=64)
    first, *_, last = recorded
    assert abs(first["approx_kl"]) < 1e-6
    assert first["clipfrac"] == 0
    assert abs(first["policy_loss"]) < 1e-5  # minus the mean of normalised advantages
    assert last["approx_kl"] > 1e-6


def test_scores_are_logged_once_an_episode_has_finished(setting, tmp_path):
    """No episode ends in two steps."""
    flags = {"num_minibatches": 1} if setting.ppo else {}
    short, folder = setting.run(
        tmp_path / "short", num_envs=1, num_steps=2, total_timesteps=2, **flags
    )
    tags = EventAccumulator(str(folder)).Reload().Tags()["scalars"]
    charts = {tag for tag in tags if tag.startswith("charts/")}
    assert charts == {"charts/SPS", "charts/learning_rate"}
    assert short["train_return_last100"] is None
    _, folder = setting.run(tmp_path / "long", num_steps=128)
    tags = EventAccumulator(str(folder)).Reload().Tags()["scalars"]
    assert {"charts/SPS", "charts/episodic_return", "charts/episodic_length"} < set(tags)


# For each script a limit between the gradient norms of its first updates
LIMITS = {"sppo_continuous": 17, "sppo_atari": 8, "sa2c_continuous": 3.4, "sa2c_atari": 8}


def test_the_share_of_clipped_gradients_is_that_of_norms_above_the_limit(
    setting, tmp_path, monkeypatch
):
    limit = LIMITS[str(setting)]
    recorded = record_metrics(setting, monkeypatch)
    _, folder = setting.run(tmp_path, max_grad_norm=limit, log_freq=10_000)
    norms = np.array([metrics["grad_norm"] for metrics in recorded])
    share = (norms > limit).mean()
    assert 0 < share < 1, norms
    (logged,) = EventAccumulator(str(folder)).Reload().Scalars("losses/clipped_gradients")
    assert logged.value == pytest.approx(share)


@pytest.mark.parametrize("updates", ["many", "one"])
def test_infinite_weights_end_the_run_at_once_and_say_so(setting, tmp_path, monkeypatch, updates):
    monkeypatch.setattr(setting.script, "check", lambda args: None)  # of such a learning rate
    flags = {"num_minibatches": 1, "update_epochs": 1} if updates == "one" and setting.ppo else {}
    message = "weights not finite after the update at step (64|128|192|256),"
    with pytest.raises(setting.script.RunError, match=message):
        setting.run(tmp_path, learning_rate=1e38, total_timesteps=1024, log_freq=10_000, **flags)


def test_infinite_weights_never_replace_a_checkpoint(setting, tmp_path, monkeypatch):
    """The gradient is infinite in the third of four updates."""
    original = setting.script.gradient_and_metrics
    updates = 8 if setting.ppo else 1
    calls = []

    def failing(*arguments):
        gradient, metrics = original(*arguments)
        calls.append(1)
        return (gradient * math.inf if len(calls) == 2 * updates + 1 else gradient), metrics

    monkeypatch.setattr(setting.script, "gradient_and_metrics", failing)
    with pytest.raises(setting.script.RunError, match="at step 192"):
        setting.run(tmp_path, checkpoint_freq=1)
    assert checkpoint(tmp_path / "run")["global_step"] == 128
    assert weights(tmp_path / "run").isfinite().all()
    assert not (tmp_path / "run" / "summary.json").exists()


def test_log_entries_are_of_the_updates_since_the_last_one(setting, tmp_path, monkeypatch):
    """On made-up advantages; the last entry comes at the end of the run, however short."""
    rng = np.random.default_rng(0)
    advantages = [scale * rng.normal(0.3, 1, (4, 1)) for scale in (5, 1, 2, 3, 1, 1)]
    returns = [rng.normal(size=(4, 1)) for _ in advantages]
    given = iter(zip(advantages, returns))
    monkeypatch.setattr(setting.script, "compute_gae", lambda *_: next(given))
    flags = {"num_envs": 1, "num_steps": 4, "norm_adv": True}
    if setting.ppo:
        flags["num_minibatches"] = 1
    _, folder = setting.run(tmp_path, total_timesteps=20, log_freq=8, **flags)
    events = EventAccumulator(str(folder)).Reload()
    entries = {"largest": [], "explained": [], "flips": []}
    for since in (slice(0, 2), slice(2, 4), slice(4, 5)):
        adv, ret = np.stack(advantages[since]), np.stack(returns[since])
        entries["largest"].append(abs(adv).max())
        entries["explained"].append(1 - adv.var() / ret.var())
        flips = [(a > 0) != (a > a.mean()) for a in adv]
        entries["flips"].append(np.mean(flips))
    names = {
        "largest": "advantage_largest",
        "explained": "explained_variance",
        "flips": "advantage_sign_flips",
    }
    for key, name in names.items():
        logged = events.Scalars(f"losses/{name}")
        assert [entry.step for entry in logged] == [8, 16, 20]
        assert [entry.value for entry in logged] == pytest.approx(entries[key], rel=1e-5)
    assert len(set(entries["flips"])) > 1


def test_logged_losses_are_means_over_the_updates(setting, tmp_path):
    _, each = setting.run(tmp_path / "each")
    _, rare = setting.run(tmp_path / "rare", log_freq=128)
    each, rare = (EventAccumulator(str(folder)).Reload() for folder in (each, rare))
    for name in ("losses/value_loss", "losses/entropy", "losses/grad_norm"):
        a, b, c, d = (event.value for event in each.Scalars(name))
        means = [event.value for event in rare.Scalars(name)]
        assert means == pytest.approx([(a + b) / 2, (c + d) / 2], rel=1e-5)


def test_an_interrupted_run_has_logged_all_its_updates(setting, tmp_path):
    _, folder = setting.run(tmp_path, stop=StopAfter(2), log_freq=100_000)
    events = EventAccumulator(str(folder)).Reload()
    assert [entry.step for entry in events.Scalars("losses/value_loss")] == [128]


def test_steps_per_second_are_without_evaluations(setting, tmp_path, monkeypatch):
    """On a clock by which each evaluation takes a thousand seconds."""
    evaluate = setting.script.evaluate
    clock = time.perf_counter
    evaluations = []

    def slow_evaluate(*arguments):
        evaluations.append(1)
        return evaluate(*arguments)

    monkeypatch.setattr(setting.script, "evaluate", slow_evaluate)
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + 1000 * len(evaluations))
    _, folder = setting.run(tmp_path, stop=StopAfter(3), eval_freq=64)
    state = checkpoint(folder)
    before = state["train_seconds"]
    assert state["global_step"] == 192
    assert 0 < before < 1000
    assert 3000 < state["wall_seconds"] < 4000
    summary = setting.resume(folder)
    after = checkpoint(folder)["train_seconds"]
    assert before < after < 1000  # that of both parts
    assert summary["sps"] == pytest.approx(256 / after)


def test_a_run_leaves_what_it_promises(setting, tmp_path):
    summary, folder = setting.run(tmp_path, eval_freq=128, seed=7, noise="uniform", beta=20.0)
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summary))
    expected = {
        "script": Path(setting.script.__file__).name,
        "algo": setting.symmetric_algo,
        "env_id": setting.small["env_id"],
        "seed": 7,
    }
    expected |= {"noise": "uniform", "noise_level": 0.05, "alpha": 0.5, "beta": 20.0, "z": -1.0}
    expected |= {"total_timesteps": 256, "finished": True}
    assert {name: summary[name] for name in expected} == expected
    assert {"final_return_std", "train_return_last100", "sps", "wall_s"} <= set(summary)
    assert [row["step"] for row in progress(folder)] == [128, 256]
    assert progress(folder)[-1]["return_mean"] == summary["final_return_mean"]
    recorded = json.loads((folder / "args.json").read_text())
    assert recorded["args"]["noise_level"] == 0.05
    assert recorded["versions"]["torch"] == metadata.version("torch")
    script = Path(setting.script.__file__).read_bytes()
    assert recorded["script_sha256"] == hashlib.sha256(script).hexdigest()
    assert not list(folder.glob("*.tmp"))
    events = EventAccumulator(str(folder)).Reload()
    tags = set(events.Tags()["scalars"])
    charts = ("episodic_return", "episodic_length", "SPS", "learning_rate")
    assert {f"charts/{name}" for name in charts} <= tags
    (text,) = events.Tensors("hyperparameters/text_summary")
    assert '"noise_level": 0.05' in text.tensor_proto.string_val[0].decode()
    losses = "policy_loss value_loss reverse_loss entropy grad_norm clipped_gradients"
    losses += " advantage_sign_flips explained_variance advantage_largest"
    losses += " approx_kl clipfrac" if setting.ppo else " probability reverse_share"
    assert {tag for tag in tags if tag.startswith("losses/")} == {
        f"losses/{name}" for name in losses.split()
    }
    assert [event.step for event in events.Scalars("losses/policy_loss")] == [64, 128, 192, 256]


def test_interrupted_and_resumed_a_run_is_whole(setting, a_run, tmp_path):
    folder = a_run(finished=False)
    assert not (folder / "summary.json").exists()
    before = checkpoint(folder)
    assert before["global_step"] == 128

    summary = setting.resume(folder)
    assert summary["finished"]
    rows = progress(folder)
    assert [row["step"] for row in rows] == [64, 128, 192, 256]
    assert rows[:2] == progress(a_run(finished=True))[:2]
    after = checkpoint(folder)
    if setting.ppo:
        updates = 4 * setting.small["update_epochs"] * setting.small["num_minibatches"]
        assert after["optimizer"]["state"][0]["step"].item() == updates
    assert summary["wall_s"] > before["wall_seconds"]
    assert not torch.equal(after["generator"], before["generator"])


def test_resuming_restores_weights_and_random_states(setting, tmp_path, monkeypatch):
    """Without the optimiser's steps weights stay; the noise on rewards is drawn from where it
    stopped."""
    _, folder = setting.run(tmp_path, stop=StopAfter(2), noise="normal")
    before = checkpoint(folder)
    trained = weights(folder)
    monkeypatch.setattr(setting.optimizer, "step", lambda self: None)
    setting.resume(folder)
    after = checkpoint(folder)
    assert torch.equal(weights(folder), trained)
    moments = [state["optimizer"]["state"][0] for state in (before, after)]
    assert "square_avg" in moments[0] or "exp_avg_sq" in moments[0]
    for name, moment in moments[0].items():
        assert torch.equal(moment, moments[1][name])
    rng = np.random.default_rng()
    rng.bit_generator.state = before["rng"]
    rng.normal(0, 1, 2 * 64)
    assert rng.bit_generator.state == after["rng"]


def test_a_resumed_run_plays_other_episodes(setting, tmp_path, monkeypatch):
    """Simulators are not saved; from the first seed again, it would train on the same beginnings
    twice."""
    envs = getattr(setting.script, setting.envs)
    reset = envs.reset
    seeds = []
    monkeypatch.setattr(envs, "reset", lambda self, seed: seeds.append(seed) or reset(self, seed))
    _, folder = setting.run(tmp_path, seed=7, stop=StopAfter(2))
    setting.resume(folder)
    assert seeds[:2] == [7, 7 + 128]


def test_a_killed_run_goes_on_from_its_checkpoint_without_doubled_evaluations(setting, a_run):
    """As after SIGKILL: evaluations from after the last checkpoint are on disk, and must not come
    twice."""
    folder = a_run(finished=False)
    with (folder / "progress.csv").open("a") as file:
        file.write("192,-5.5,0.0,1.0,1\n")
    (folder / "checkpoint.pt.tmp").write_bytes(b"half a checkpoint")
    setting.resume(folder)
    rows = progress(folder)
    assert [row["step"] for row in rows] == [64, 128, 192, 256]
    assert rows[2]["return_mean"] != -5.5


def test_a_run_killed_before_its_first_checkpoint_starts_again(setting, a_run):
    whole = a_run(finished=True)
    folder = a_run(finished=False)
    (folder / "checkpoint.pt").unlink()
    setting.resume(folder)
    assert (folder / "progress.csv").read_bytes() == (whole / "progress.csv").read_bytes()
    assert torch.equal(weights(folder), weights(whole))


def test_a_run_killed_before_its_summary_is_completed_without_another_update(
    setting, a_run, tmp_path, monkeypatch
):
    whole = a_run(finished=True)
    save = setting.script.save

    def failing_save(path, content):
        if path.name == "summary.json":
            raise OSError("killed")
        save(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(setting.script, "save", failing_save)
        with pytest.raises(OSError, match="killed"):
            setting.run(tmp_path / "killed", eval_freq=64)
    folder = tmp_path / "killed" / "run"
    before = checkpoint(folder)
    assert not (folder / "summary.json").exists()
    updates = record_metrics(setting, monkeypatch)
    summary = setting.resume(folder)
    assert updates == []
    assert json.loads((folder / "summary.json").read_text())["finished"]
    assert summary["final_return_mean"] == progress(folder)[-1]["return_mean"]
    assert summary["sps"] == pytest.approx(256 / before["train_seconds"])
    assert (folder / "progress.csv").read_bytes() == (whole / "progress.csv").read_bytes()
    assert torch.equal(weights(folder), weights(whole))


def test_the_summary_is_written_last(setting, tmp_path, monkeypatch):
    save = setting.script.save
    written = []

    def recording_save(path, content):
        written.append(path.name)
        save(path, content)

    monkeypatch.setattr(setting.script, "save", recording_save)
    setting.run(tmp_path)
    last = ["progress.csv", "checkpoint.pt", "agent.safetensors", "summary.json"]
    assert written[-4:] == last
    assert written.count("summary.json") == 1


def test_a_checkpoint_has_named_entries(setting, a_run):
    """And can be loaded by `torch.load` as it is, without running code from the file."""
    folder = a_run(finished=True)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    expected = {"agent", "optimizer", "finished_episodes", "generator", "rng", "global_step"}
    expected |= {"evaluations", "train_seconds", "wall_seconds"}
    expected |= {"device"} if setting.atari else {"obs_stats", "return_stats"}
    assert set(state) == expected
    assert state["global_step"] == 256
    assert [evaluation["step"] for evaluation in state["evaluations"]] == [64, 128, 192, 256]
    assert state["evaluations"] == progress(folder)


def test_a_run_of_another_script_is_not_resumed(setting, a_run):
    folder = a_run(finished=False)
    for other in SETTINGS:
        if other is not setting:
            with pytest.raises(ValueError, match="a run of another script"):
                other.resume(folder)


@of_each
def test_a_resumed_run_is_checked_like_a_new_one(setting, a_run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folder = a_run(finished=False)
    saved = json.loads((folder / "args.json").read_text())
    saved["args"]["device"] = "cuda"
    (folder / "args.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="no GPU"):
        setting.resume(folder)


@of_each
def test_a_run_begun_on_a_gpu_goes_on_without_one(setting, a_run):
    """After `device` in its args.json was changed, as the refusal of other flags advises."""
    folder = a_run(finished=False)
    saved = json.loads((folder / "args.json").read_text())
    saved["args"]["device"] = "cpu"
    (folder / "args.json").write_text(json.dumps(saved))
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    if "device" in checkpoint:  # a GPU's generator has a state of 16 bytes, the CPU's of 5056
        checkpoint |= {"device": "cuda", "generator": torch.zeros(16, dtype=torch.uint8)}
        torch.save(checkpoint, folder / "checkpoint.pt")
    setting.resume(folder)
    assert (folder / "summary.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_run_is_compiled_and_resumed(setting, tmp_path):
    _, folder = setting.run(tmp_path, stop=StopAfter(2), device="cuda", compile=True)
    summary = setting.resume(folder)
    assert summary["finished"]
    assert summary["compile"]


@of_one
def test_due_is_whether_a_multiple_lies_in_the_last_steps(setting):
    """By counting: steps come in strides."""
    for every in range(25):
        for stride in range(1, 12):
            for step in range(stride, 80, stride):
                last_steps = range(step - stride + 1, step + 1)
                expected = every > 0 and any(s % every == 0 for s in last_steps)
                assert setting.script.due(every, step, stride) == expected


def test_checkpoints_come_as_often_as_asked(setting, tmp_path, monkeypatch):
    save = setting.script.save
    saved = []

    def recording_save(path, content):
        if path.name == "checkpoint.pt":
            saved.append(content["global_step"])
        save(path, content)

    monkeypatch.setattr(setting.script, "save", recording_save)
    setting.run(tmp_path, checkpoint_freq=150, total_timesteps=512)
    assert saved == [192, 320, 512]


@of_one
def test_an_interrupted_save_leaves_the_old_file(setting, tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    setting.script.save(path, {"step": 1})

    def failing_save(content, target):
        Path(target).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", failing_save)
    with pytest.raises(OSError, match="disk full"):
        setting.script.save(path, {"step": 2})
    assert torch.load(path) == {"step": 1}


def test_the_final_weights_are_there_as_safetensors(setting, a_run):
    folder = a_run(finished=True)
    tensors = safetensors.torch.load_file(folder / "agent.safetensors")
    state = checkpoint(folder)
    for name, weight in state["agent"].items():
        assert torch.equal(tensors.pop(name), weight)
    if not setting.atari:
        assert torch.equal(tensors.pop("obs_mean"), state["obs_stats"]["mean"])
        assert torch.equal(tensors.pop("obs_std"), state["obs_stats"]["std"])
    assert tensors == {}


def files(folder):
    """{name: content} of a folder, but for the lock."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}


def run_main(setting, monkeypatch, capsys, *arguments):
    """Runs the script with these arguments. Returns (exit status, standard output, error)."""
    monkeypatch.setattr(sys, "argv", [setting.script.__file__, *map(str, arguments)])
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest has its own handlers
    status = 0
    try:
        setting.script.main()
    except SystemExit as exit_:
        status = exit_.code
    out, err = capsys.readouterr()
    return status, out, err


class Malice:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def flip_a_weight(path):
    """Changes one byte of the largest tensor in a checkpoint."""
    content = bytearray(path.read_bytes())
    weight = max(torch.load(path)["agent"].values(), key=torch.numel)
    position = content.index(weight.numpy().tobytes()[:64])
    content[position + 3] ^= 64
    path.write_bytes(content)


def change_checkpoint(path, change):
    state = torch.load(path)
    change(state)
    torch.save(state, path)


CHECKPOINT_DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "garbage": lambda path: path.write_bytes(bytes(range(256)) * 99),
    "flipped": flip_a_weight,
    "list": lambda path: torch.save([1, 2], path),
    "no rng": lambda path: change_checkpoint(path, lambda state: state.pop("rng")),
    "no step": lambda path: change_checkpoint(path, lambda state: state.pop("global_step")),
    "rows": lambda path: change_checkpoint(path, lambda state: state.update(evaluations="text")),
    "size": lambda path: change_checkpoint(
        path, lambda state: state["agent"].update({next(iter(state["agent"])): torch.ones(7)})
    ),
    "code": lambda path: path.write_bytes(pickle.dumps(Malice(path.with_name("malice")))),
}


@pytest.mark.parametrize("damage", CHECKPOINT_DAMAGES)
def test_a_damaged_checkpoint_is_named_and_left_alone(setting, a_run, monkeypatch, capsys, damage):
    folder = a_run(finished=False)
    capsys.readouterr()
    CHECKPOINT_DAMAGES[damage](folder / "checkpoint.pt")
    before = files(folder)
    status, out, err = run_main(setting, monkeypatch, capsys, "--resume", folder)
    assert status == 2
    assert err.startswith(f"error: {folder / 'checkpoint.pt'}: cannot be used: ")
    assert (out, err.count("\n")) == ("", 1)
    assert files(folder) == before


ARGS_DAMAGES = {
    "empty": "",
    "half": '{"args": {"env_id"',
    "list": "[1, 2]",
    "null": "null",
    "choice": {"noise": "nonsense"},
    "text": {"num_envs": "4"},
    "nothing": {"total_timesteps": None},
    "negative": {"learning_rate": -1.0},
    "true": {"num_envs": True},
    "additional": {"nonsense": 1},
}


@of_each
@pytest.mark.parametrize("damage", ARGS_DAMAGES)
def test_damaged_arguments_are_named_and_left_alone(setting, a_run, monkeypatch, capsys, damage):
    folder = a_run(finished=False)
    capsys.readouterr()
    path = folder / "args.json"
    content = ARGS_DAMAGES[damage]
    if isinstance(content, dict):
        saved = json.loads(path.read_text())
        saved["args"].update(content)
        content = json.dumps(saved)
    path.write_text(content)
    before = files(folder)
    status, out, err = run_main(setting, monkeypatch, capsys, "--resume", folder)
    assert status == 2
    assert err.startswith(f"error: {path}: cannot be used: ")
    assert (out, err.count("\n")) == ("", 1)
    assert files(folder) == before


@of_each
def test_a_run_is_resumed_by_one_process_at_a_time(setting, a_run, monkeypatch, capsys):
    folder = a_run(finished=False)
    capsys.readouterr()
    before = files(folder)
    with FileLock(folder / "lock"):
        status, out, err = run_main(setting, monkeypatch, capsys, "--resume", folder)
    assert (status, out) == (2, "")
    assert err == f"error: {folder}: another process is at work on this run\n"
    assert files(folder) == before
    status, _, _ = run_main(setting, monkeypatch, capsys, "--resume", folder)
    assert status == 0
    assert checkpoint(folder)["global_step"] == 256


@of_each
def test_a_lack_of_memory_is_one_line_and_the_run_can_continue(setting, a_run, monkeypatch, capsys):
    folder = a_run(finished=False)
    capsys.readouterr()

    def failing_gradient(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB.")

    with monkeypatch.context() as patch:
        patch.setattr(setting.script, "gradient_and_metrics", failing_gradient)
        status, _, err = run_main(setting, patch, capsys, "--resume", folder)
    assert status == 1
    reason, _, advice = err.partition("; to continue from the last checkpoint: ")
    assert reason == "error: CUDA out of memory. Tried to allocate 2 GiB."
    assert shlex.split(advice)[2:] == ["--resume", str(folder)]
    assert setting.resume(folder)["finished"]


@of_each
def test_on_a_terminal_an_error_does_not_continue_the_progress_bar(setting, a_run, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def failing_gradient(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    folder = a_run(finished=False)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "argv", [setting.script.__file__, "--resume", str(folder)])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(setting.script, "gradient_and_metrics", failing_gradient)
    with pytest.raises(SystemExit):
        setting.script.main()
    bar, _, _ = terminal.getvalue().partition("error: ")
    assert "steps/s" in bar
    assert bar.endswith("\r") and bar.rstrip("\r").endswith(" " * 20)  # cleared, and from column 0


@of_each
def test_every_evaluation_is_printed(setting, tmp_path, capsys):
    _, folder = setting.run(tmp_path, eval_freq=64)
    printed = capsys.readouterr().out.splitlines()
    rows = progress(folder)
    assert len(rows) > 1
    for row, line in zip(rows, printed, strict=True):
        assert line == f"step {int(row['step']):,}: return {float(row['return_mean']):.1f}"


@of_each
@pytest.mark.parametrize("error", [RuntimeError("unexpected pos 0"), OSError(28, "No space left")])
def test_a_full_disk_is_one_line_and_the_run_can_continue(
    setting, a_run, monkeypatch, capsys, error
):
    folder = a_run(finished=False)
    capsys.readouterr()
    before = (folder / "checkpoint.pt").read_bytes()

    def failing_save(content, target):
        Path(target).write_bytes(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", failing_save)
        status, _, err = run_main(setting, patch, capsys, "--resume", folder)
    assert status == 1
    message, _, advice = err.rstrip("\n").partition("; to continue from the last checkpoint: ")
    assert message.startswith("error: ")
    assert str(error.args[-1]) in message
    assert shlex.split(advice)[2:] == ["--resume", str(folder)]
    assert (folder / "checkpoint.pt").read_bytes() == before
    assert setting.resume(folder)["finished"]


@of_each
def test_a_start_that_fails_leaves_no_folder(setting, tmp_path, monkeypatch):
    def failing_save(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(setting.script, "save", failing_save)
    with pytest.raises(setting.script.UsageError, match="No space left on device"):
        setting.run(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("at", [128, 256])
def test_a_signal_ends_an_evaluation_which_is_done_when_resumed(
    setting, a_run, tmp_path, monkeypatch, at
):
    """In the middle of the run or at its end; then the run is what it would have been."""
    whole = a_run(finished=True)
    stop = threading.Event()
    evaluate = setting.script.evaluate
    stopped_at = setting.small.get("seed", 1) + at

    def stopped_evaluate(*arguments):
        if stopped_at in arguments:
            stop.set()
        return evaluate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(setting.script, "evaluate", stopped_evaluate)
        summary, folder = setting.run(tmp_path, stop=stop, eval_freq=64)
    assert summary is None
    assert checkpoint(folder)["global_step"] == at
    setting.resume(folder)
    steps = [row["step"] for row in progress(folder)]
    assert steps == [64, 128, 192, 256]
    there = steps.index(at)
    assert progress(folder)[there] == progress(whole)[there]


def test_evaluate_plays_a_runs_policy(setting, tmp_path, monkeypatch, capsys):
    """With the seed of the last evaluation of the run, its score; and nothing is trained."""
    summary, folder = setting.run(tmp_path, eval_episodes=3)
    before = files(folder)
    seed = summary["seed"] + 256
    arguments = ["--evaluate", folder, "--eval-episodes", 3, "--seed", seed]
    status, out, err = run_main(setting, monkeypatch, capsys, *arguments)
    assert (status, err) == (0, "")
    deviation = summary["final_return_std"] / 2**0.5
    score = f"return {summary['final_return_mean']:.1f} ± {deviation:.1f} "
    assert f"after 256 steps: {score}(mean and standard error of 3 episodes)" in out
    assert files(folder) == before


def test_a_run_is_evaluated_without_what_its_training_needed(setting, a_run, monkeypatch, capsys):
    """Neither the GPU nor the package that the run was tracked with."""
    folder = a_run(finished=True)
    recorded = json.loads((folder / "args.json").read_text())
    recorded["args"] |= {"device": "cuda", "capture_video": True, "track": True}
    (folder / "args.json").write_text(json.dumps(recorded))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "wandb", None)
    capsys.readouterr()
    status, out, err = run_main(setting, monkeypatch, capsys, "--evaluate", folder)
    assert (status, err) == (0, "")
    assert "return" in out


@pytest.mark.parametrize("error", ["RunError", "OSError"])
def test_an_evaluation_that_fails_is_one_line(setting, a_run, monkeypatch, capsys, error):
    folder = a_run(finished=True)
    capsys.readouterr()

    def failing_evaluate(*arguments):
        raise getattr(setting.script, error, OSError)("Hopper, its step 7: no such joint")

    monkeypatch.setattr(setting.script, "evaluate", failing_evaluate)
    status, out, err = run_main(setting, monkeypatch, capsys, "--evaluate", folder)
    assert (status, out, err) == (1, "", "error: Hopper, its step 7: no such joint\n")


@pytest.mark.parametrize("flags", ["--eval-episodes 0", "--seed -1"])
def test_evaluate_names_a_wrong_flag(setting, a_run, flags, monkeypatch, capsys):
    folder = a_run(finished=True)
    capsys.readouterr()
    words = ["--evaluate", folder, *flags.split()]
    status, _, err = run_main(setting, monkeypatch, capsys, *words)
    assert status == 2
    assert err.startswith(f"error: {flags}: must be between")


def test_evaluate_refuses_flags_of_the_training(setting, a_run, monkeypatch, capsys):
    folder = a_run(finished=True)
    capsys.readouterr()
    arguments = ["--evaluate", folder, "--learning-rate", 1]
    status, _, err = run_main(setting, monkeypatch, capsys, *arguments)
    assert status == 2
    assert err.startswith("error: --evaluate takes only --seed, --eval-episodes")


@of_each
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_training(setting, tmp_path, monkeypatch, capsys, signum):
    """In this process, by calling the handler in the 100th step."""
    folder = tmp_path / "it's a run"
    handlers = {}
    envs = getattr(setting.script, setting.envs)
    step = envs.step
    steps = []

    def interrupted_step(self, action):
        steps.extend(action)
        if len(steps) == 100:
            handlers[signum](signum, None)
        return step(self, action)

    monkeypatch.setattr(envs, "step", interrupted_step)
    flags = setting.small | {"runs_dir": tmp_path, "run_name": folder.name, "eval_freq": 64}
    words = [setting.script.__file__]
    for name, value in flags.items():
        flag = name.replace("_", "-")
        words += [f"--no-{flag}"] if value is False else [f"--{flag}", str(value)]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    with pytest.raises(SystemExit) as exit_:
        setting.script.main()
    assert exit_.value.code == 130
    message, _, resume = capsys.readouterr().err.rstrip("\n").partition(": ")
    assert message == "interrupted; to continue"
    assert shlex.split(resume) == ["python", setting.script.__file__, "--resume", str(folder)]
    assert checkpoint(folder)["global_step"] == 128
    assert handlers[signum] is signal.SIG_DFL  # a second one kills


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "signum"),
    [
        (SPPO_CONTINUOUS, signal.SIGINT),
        (SPPO_ATARI, signal.SIGTERM),
        (SA2C_CONTINUOUS, signal.SIGTERM),
        (SA2C_ATARI, signal.SIGINT),
    ],
    ids=str,
)
def test_a_signal_stops_with_a_checkpoint_and_says_how_to_go_on(setting, tmp_path, signum):
    folder = tmp_path / "it's a run"
    flags = "--total-timesteps 200000 --no-compile --eval-freq 0 --eval-episodes 1"
    command = [sys.executable, setting.script.__file__, "--env-id", setting.small["env_id"]]
    command += [*flags.split(), "--runs-dir", tmp_path, "--run-name", folder.name]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 60
    while not list(folder.glob("events*")) and time.time() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signum)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    (message,) = [line for line in stderr.splitlines() if line.startswith("interrupted")]
    advice, _, resume = message.partition(": ")
    assert advice == "interrupted; to continue"
    assert shlex.split(resume) == ["python", setting.script.__file__, "--resume", str(folder)]
    assert "Traceback" not in stderr
    assert checkpoint(folder)["global_step"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("episodes", [1, 2])
def test_a_video_of_the_first_episode_of_each_evaluation(setting, tmp_path, episodes):
    flags = {"env_id": setting.video_env, "eval_freq": 128}
    _, folder = setting.run(tmp_path, capture_video=True, eval_episodes=episodes, **flags)
    names = sorted(path.stem for path in folder.glob("video/*.mp4"))
    assert [name.split("-episode")[0] for name in names] == ["step-128", "step-256"]


def test_tracking_tells_weights_and_biases_the_arguments(setting, tmp_path, monkeypatch):
    calls = []
    fake_wandb(monkeypatch, lambda **arguments: calls.append(arguments))
    setting.run(tmp_path, track=True, total_timesteps=64)
    assert calls[0]["config"]["env_id"] == setting.small["env_id"]
    assert calls[0]["id"] == calls[0]["name"] == "run"
    assert calls[0]["sync_tensorboard"]


def test_tracking_that_fails_is_one_line(setting, tmp_path, monkeypatch):
    def failing_init(**arguments):
        raise RuntimeError("no API key")

    fake_wandb(monkeypatch, failing_init)
    message = r"--track: cannot be used: RuntimeError\('no API key'\)"
    with pytest.raises(setting.script.UsageError, match=message):
        setting.run(tmp_path, track=True)


BAD_INPUT = {
    "--noise flip --noise-level 1.5": "--noise-level 1.5: must be between 0 and 1",
    "--noise flip --noise-level nan": "--noise-level nan: must be between 0 and 1",
    "--noise-level 0.1": "--noise-level: choose a kind with --noise",
    "--correct-flips": "--correct-flips: needs --noise flip",
    "--noise normal --correct-flips": "--correct-flips: needs --noise flip",
    "--noise adv_flip --correct-flips": "--correct-flips: needs --noise flip",
    "--noise flip --correct-flips --noise-level 0.5": "--noise-level below 0.5",
    "--noise flip --correct-flips --noise-level 0.9": "--noise-level below 0.5",
    "--alpha -1": "--alpha -1.0: must be between 0 and",
    "--beta inf": "--beta inf: must be between 0 and",
    "--z 1": "--z 1.0: must be between -1e+09 and -1e-09",
    "--z 0": "--z 0.0: must be between -1e+09 and -1e-09",
    "--seed 99999999999999999999": "--seed 99999999999999999999: must be between 0 and",
    "--total-timesteps 0": "--total-timesteps 0: must be between 1 and",
    "--log-freq 0": "--log-freq 0: must be between 1 and",
    "--learning-rate 0": "--learning-rate 0.0: must be between",
    "--max-grad-norm 0": "--max-grad-norm 0.0: must be between",
    "--device cuda": "--device cuda: no GPU here; use cpu",
    "--num-envs 4294967296": "--num-envs 4294967296: must be between 1 and 1",
    "--num-steps 100000000": "steps a rollout",
    "--eval-episodes 1000000": "--eval-episodes 1000000: must be between 1 and 1",
    "--run-name ../x": "--run-name '../x': give the plain name of a folder",
    "--run-name /x": "--run-name '/x': give the plain name of a folder",
    "--run-name ..": "--run-name '..': give the plain name of a folder",
    "--run-name .": "--run-name '.': give the plain name of a folder",
    "--run-name ''": "--run-name '': give the plain name of a folder",
    "--run-name a\udcff": "give the plain name of a folder",
    "--evaluate nowhere": "nowhere/args.json: cannot be used",
    "--runs-dir /dev/null": "/dev/null",
    "--runs-dir a\udcff": "not a printable name",
    "--resume nowhere": "--resume nowhere: not the folder of an interrupted run",
    f"--resume {'x' * 300}": "not the folder of an interrupted run",
    "--resume nowhere --seed 2": "--resume reuses the flags in the args.json of the run: leave out",
}
PPO_BAD_INPUT = {
    "--num-minibatches 33": "must divide",
    "--num-envs 1 --num-steps 4 --num-minibatches 4": "minibatches of 2 or more",
}
A2C_BAD_INPUT = {
    "--norm-adv --num-envs 1 --num-steps 1": "2 or more",
    "--rmsprop-eps 0": "--rmsprop-eps 0.0: must be between",
}
CONTINUOUS_BAD_INPUT = {
    "--env-id Hoper-v4": "Hopper",
    "--env-id CartPole-v1": "Discrete(2)",
    "--env-id nowhere:Nothing-v0": "nowhere",
    "--run-name a --env-id 'new\nline'": "--env-id new line: ",
    "--policy gaussian --beta 1": "--policy categorical",
    "--bins 1": "--bins 1: must be between 2 and",
    "--bins 100000": "--bins 100000: must be between 2 and 1000",
    "--hidden-sizes 64 0": "--hidden-sizes 0: must be between 1 and 10000",
    "--hidden-sizes 100000": "--hidden-sizes 100000: must be between 1 and 10000",
    "--eval-max-steps 0": "--eval-max-steps 0: must be between 1 and",
    "--policy gaussian --log-std-init nan": "--log-std-init nan: must be between -20 and 20",
}
ATARI_BAD_INPUT = {
    "--env-id Brekout": "breakout",
    "--env-id Hopper-v4": "no such game",
    "--env-id ALE/MsPackman-v5": "ms_pacman",
    "--env-id Breakout-ram-v4": "breakout",
    "--env-id Combat": "no such game",
    "--repeat-action-probability 2": "--repeat-action-probability 2.0: must be between 0 and 1",
    "--seed 2000000000": "--seed 2000000000: must be between 0 and 1e+09",
    "--total-timesteps 2000000000": "--total-timesteps 2000000000: must be between 1 and 1e+09",
}


@pytest.mark.parametrize(
    ("setting", "flags", "message"),
    [
        (setting, *pair)
        for setting in SETTINGS
        for table in (
            BAD_INPUT,
            PPO_BAD_INPUT if setting.ppo else A2C_BAD_INPUT,
            ATARI_BAD_INPUT if setting.atari else CONTINUOUS_BAD_INPUT,
        )
        for pair in table.items()
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_exit_code_2(
    setting, flags, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [setting.script.__file__, *shlex.split(flags)])
    monkeypatch.setattr(setting.script, "train", lambda *_: pytest.fail("training has begun"))
    with pytest.raises(SystemExit) as exit_:
        setting.script.main()
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert out == ""
    assert not list(tmp_path.iterdir())  # no work was begun


@of_each
def test_a_finished_run_or_a_taken_name_is_not_written_over(setting, a_run):
    folder = a_run(finished=True)
    before = (folder / "summary.json").read_bytes()
    with pytest.raises(ValueError, match="File exists"):
        setting.run(folder.parent)
    with pytest.raises(ValueError, match="not the folder of an interrupted run"):
        setting.resume(folder)
    assert (folder / "summary.json").read_bytes() == before


@pytest.mark.slow
def test_from_the_shell_errors_have_no_traceback(setting, tmp_path):
    for flags, what in (
        ("--env-id Nothing-v0", "error:"),
        ("--noise square", "square"),
        ("--sed 1", "--sed"),
    ):
        command = [sys.executable, setting.script.__file__, *flags.split()]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=os.environ | {"COLUMNS": "100"},
        )
        assert done.returncode == 2
        assert what in done.stderr
        assert "Traceback" not in done.stderr


def test_where_compiling_fails_it_says_so_and_runs(setting, tmp_path, monkeypatch, capsys):
    def failing_compile(function, **_):
        def call(*arguments):
            raise RuntimeError("no C++ compiler")

        return call

    monkeypatch.setattr(torch, "compile", failing_compile)
    summary, _ = setting.run(tmp_path, compile=True, total_timesteps=64)
    assert summary["finished"]
    assert summary["compile"] is False
    err = capsys.readouterr().err
    assert "torch.compile failed, continuing with --no-compile: " in err
    assert "RuntimeError('no C++ compiler')" in err
