"""What every script promises about runs: identity, folder, stopping and resuming, errors."""

import importlib.machinery
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    SETTINGS,
    SPPO_ATARI,
    SPPO_CONTINUOUS,
    StopAfter,
    checkpoint,
    progress,
    weights,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


@pytest.fixture(params=SETTINGS, ids=str)
def setting(request):
    return request.param


@pytest.mark.parametrize("noise", ["none", "adv_flip"])
def test_advantages_flip_before_normalisation_anew_every_time(setting, tmp_path, monkeypatch, noise):
    seen, perturb_advantage = [], setting.script.perturb_advantage

    def recording(advantage, level, generator):
        noisy = perturb_advantage(advantage, level, generator)
        seen.append((advantage, noisy, level))
        return noisy

    monkeypatch.setattr(setting.script, "perturb_advantage", recording)
    setting.run(tmp_path, noise=noise, total_timesteps=256, norm_adv=True)
    epochs = setting.small["update_epochs"] if setting.ppo else 1
    assert len(seen) == (2 * epochs if noise == "adv_flip" else 0)
    for advantage, noisy, level in seen:
        assert advantage.shape == ((setting.small["num_minibatches"], 32) if setting.ppo else (128,))
        assert level == 0.1
        assert 0 < (noisy != advantage).float().mean() < 0.3
        assert abs(advantage.mean(-1)).max() > 0.01  # normalised ones would have a mean of zero


def advantages_learnt_from(setting, monkeypatch) -> list:
    """What `gradient_and_metrics` gets, from here on; the first call may be one on zeros, to compile."""
    advantages, original = [], setting.script.gradient_and_metrics

    def recording(*arguments):
        advantages.append(arguments[-3 if setting.atari else -2].clone())
        return original(*arguments)

    monkeypatch.setattr(setting.script, "gradient_and_metrics", recording)
    return advantages


def test_flipped_advantages_are_what_it_learns_from(setting, tmp_path, monkeypatch):
    """With a chance of 1: the same run but for the sign of what it learns from in its first update."""
    learnt = {}
    for noise, flags in {"none": {}, "adv_flip": {"noise_level": 1.0}}.items():
        with monkeypatch.context() as patch:
            advantages = advantages_learnt_from(setting, patch)
            one_epoch = {"update_epochs": 1} if setting.ppo else {}
            flags = flags | {"total_timesteps": 128, "norm_adv": False} | one_epoch
            setting.run(tmp_path / noise, noise=noise, **flags)
            learnt[noise] = torch.cat(advantages[-setting.small.get("num_minibatches", 1) :]).sort().values
    assert learnt["none"].abs().max() > 0.1
    torch.testing.assert_close(-learnt["none"].flip(0), learnt["adv_flip"])


def test_advantages_are_normalised_on_request(setting, tmp_path, monkeypatch):
    advantages = advantages_learnt_from(setting, monkeypatch)
    env = {"env_id": "Pong"} if setting.atari else {}  # there all actions are the agent's
    setting.run(tmp_path, total_timesteps=256, norm_adv=True, **env)
    advantages = advantages[-2 * (12 if setting.ppo else 1) :]
    for advantage in advantages:
        assert advantage.mean().item() == pytest.approx(0, abs=1e-4)
        assert advantage.std().item() == pytest.approx(1, abs=1e-3)


def test_advantages_can_stay_as_they_are(setting, tmp_path):
    normalized, plain = (setting.run(tmp_path / str(norm), norm_adv=norm)[1] for norm in (True, False))
    assert not torch.equal(weights(normalized), weights(plain))


@pytest.mark.parametrize("setting", [SPPO_CONTINUOUS, SPPO_ATARI], ids=str)
def test_sppo_is_ppo_with_alpha_k(setting, tmp_path, monkeypatch):
    k = 0.5 + 20.0
    if setting.atari:  # its sums are long enough for Adam to magnify float32's rounding

        class Float64Agent(setting.script.Agent):
            def __init__(self, *arguments, **keywords):
                super().__init__(*arguments, **keywords)
                self.double().dtype = torch.float64

        monkeypatch.setattr(setting.script, "Agent", Float64Agent)
    recorded, runs = setting.record_actions(monkeypatch), {}
    for name, flags in {
        "sppo": dict(alpha=0.5, beta=20.0, ent_coef=0.01),
        "scaled": dict(alpha=k, beta=0.0, ent_coef=0.01),
        "rest": dict(
            alpha=1.0, beta=0.0, vf_coef=0.5 / k, ent_coef=0.01 / k, max_grad_norm=0.5 / k, adam_eps=1e-5 / k
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
    "sa2c_atari": dict(num_envs=16, num_steps=5, total_timesteps=5e6, learning_rate=7e-4, rmsprop_eps=1e-5,
                       gae_lambda=1.0, vf_coef=0.25, ent_coef=0.01, norm_adv=False),
    "sppo_atari": dict(num_envs=8, num_steps=128, total_timesteps=5e6, learning_rate=2.5e-4, adam_eps=1e-5,
                       gae_lambda=0.95, vf_coef=0.5, ent_coef=0.01, norm_adv=True, update_epochs=4,
                       num_minibatches=1024 // 256, clip_coef=0.1, anneal_lr=True, anneal_clip=True, beta=1),
    "sa2c_continuous": dict(num_envs=4, num_steps=8, learning_rate=7e-4, rmsprop_eps=1e-5, gae_lambda=1.0,
                            vf_coef=0.5, ent_coef=0, norm_adv=False, bins=11, hidden_sizes=(64, 64)),
    "sppo_continuous": dict(num_envs=1, num_steps=2048, learning_rate=3e-4, adam_eps=1e-5, gae_lambda=0.95,
                            vf_coef=0.5, ent_coef=0, norm_adv=True, update_epochs=10, bins=11,
                            num_minibatches=2048 // 64, clip_coef=0.2, beta=20, hidden_sizes=(64, 64)),
}  # fmt: skip


def test_defaults_are_the_papers(setting, tmp_path):
    """Those of the authors' code; for SA2C's alpha and beta it has none."""
    args = setting.script.prepare(setting.script.Args(runs_dir=str(tmp_path)))
    paper = PAPER[str(setting)] | dict(gamma=0.99, max_grad_norm=0.5, alpha=0.5, z=-1, layer_norm=False)
    assert {name: getattr(args, name) for name in paper} == paper


def test_equal_seeds_give_equal_bits(setting, tmp_path):
    flags = dict(noise="adv_flip", num_envs=2, eval_freq=128)
    first, again, other = (
        setting.run(tmp_path / name, seed=int(name[0]), **flags)[1] for name in ("3a", "3b", "4")
    )
    assert torch.equal(weights(first), weights(again))
    assert (first / "progress.csv").read_bytes() == (again / "progress.csv").read_bytes()
    assert not torch.equal(weights(first), weights(other))


@pytest.mark.parametrize("setting", [SPPO_CONTINUOUS, SPPO_ATARI], ids=str)
def test_the_ratio_starts_at_one(setting, tmp_path, monkeypatch):
    """Log-probabilities of the rollout, and of its first minibatch, are the same."""
    recorded, gradient_and_metrics = [], setting.script.gradient_and_metrics

    def recording(*arguments):
        gradient, metrics = gradient_and_metrics(*arguments)
        recorded.append({name: metric.item() for name, metric in metrics.items()})
        return gradient, metrics

    monkeypatch.setattr(setting.script, "gradient_and_metrics", recording)
    setting.run(tmp_path, total_timesteps=128)
    updates = setting.small["update_epochs"] * setting.small["num_minibatches"]
    first, *_, last = recorded[-updates:]  # a call before is on zeros, to compile
    assert abs(first["approx_kl"]) < 1e-6
    assert first["clip_fraction"] == 0
    assert abs(first["policy"]) < 1e-5  # minus the mean of normalised advantages
    assert last["approx_kl"] > 1e-6


def test_the_logged_advantages_are_those_of_the_rollout(setting, tmp_path, monkeypatch):
    """Of advantages 3, .9, .5 and -.4, whose mean is 1, normalisation flips the sign of two."""

    advantage, values = np.array([[3.0], [0.9], [0.5], [-0.4]]), []

    def compute_gae(reward, value, *_):
        values.append(value[:-1])
        return advantage, advantage + value[:-1]

    monkeypatch.setattr(setting.script, "compute_gae", compute_gae)
    one_batch = {"num_minibatches": 1} if setting.ppo else {"norm_adv": True}
    _, folder = setting.run(tmp_path, num_envs=1, num_steps=4, total_timesteps=4, **one_batch)
    events = EventAccumulator(str(folder)).Reload()
    assert events.Scalars("losses/advantage_largest")[0].value == 3.0
    assert events.Scalars("losses/advantage_sign_flips")[0].value == 0.5
    explained = 1 - np.var(advantage) / np.var(advantage + values[0])
    assert events.Scalars("losses/explained_variance")[0].value == pytest.approx(explained, rel=1e-5)


@pytest.mark.parametrize("updates", ["many", "one"])
def test_an_infinite_gradient_ends_the_run_and_says_so(setting, tmp_path, updates):
    """At once; also where the last step of an update makes the weights infinite, and a rollout meets them."""
    flags = {"num_minibatches": 1, "update_epochs": 1} if updates == "one" and setting.ppo else {}
    with pytest.raises(SystemExit, match="gradient not finite at step (128|256|384|512);"):
        setting.run(tmp_path, learning_rate=1e18, total_timesteps=2048, log_freq=10_000, **flags)


def test_log_entries_are_of_the_updates_since_the_last_one(setting, tmp_path, monkeypatch):
    """On made-up advantages; the last entry comes at the end of the run, however short."""
    rng = np.random.default_rng(0)
    advantages = [scale * rng.normal(0.3, 1, (4, 1)) for scale in (5, 1, 2, 3, 1, 1)]
    returns = [rng.normal(size=(4, 1)) for _ in advantages]
    given = iter(zip(advantages, returns))
    monkeypatch.setattr(setting.script, "compute_gae", lambda *_: next(given))
    flags = {"num_envs": 1, "num_steps": 4, "norm_adv": True} | (
        {"num_minibatches": 1} if setting.ppo else {}
    )
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
    _, rare = setting.run(tmp_path / "rare", log_freq=256)
    each, rare = (EventAccumulator(str(folder)).Reload() for folder in (each, rare))
    for name in ("losses/value", "losses/entropy", "losses/grad_norm"):
        a, b, c, d = (event.value for event in each.Scalars(name))
        means = [event.value for event in rare.Scalars(name)]
        assert means == pytest.approx([(a + b) / 2, (c + d) / 2], rel=1e-5)


def test_an_interrupted_run_has_logged_all_its_updates(setting, tmp_path):
    _, folder = setting.run(tmp_path, stop=StopAfter(2), log_freq=100_000)
    events = EventAccumulator(str(folder)).Reload()
    assert [entry.step for entry in events.Scalars("losses/value")] == [256]


def test_steps_per_second_are_without_evaluations(setting, tmp_path, monkeypatch):
    evaluate = setting.script.evaluate

    def slow_evaluate(*arguments):
        time.sleep(1)
        return evaluate(*arguments)

    monkeypatch.setattr(setting.script, "evaluate", slow_evaluate)
    _, folder = setting.run(tmp_path, stop=StopAfter(3), eval_freq=128)
    step, _, before, wall = checkpoint(folder)["progress"]
    assert step == 384
    assert 0 < before < wall - 3
    summary = setting.resume(folder)
    after = checkpoint(folder)["progress"][2]
    assert after > before  # that of both parts
    assert summary["sps"] == pytest.approx(512 / after)


def test_a_run_leaves_what_it_promises(setting, tmp_path):
    summary, folder = setting.run(tmp_path, eval_freq=256, seed=7, noise="uniform", beta=20.0)
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summary))
    expected = {
        "script": Path(setting.script.__file__).name,
        "algo": setting.symmetric_algo,
        "env_id": setting.small["env_id"],
        "seed": 7,
    }
    expected |= {"noise": "uniform", "noise_level": 0.05, "alpha": 0.5, "beta": 20.0, "z": -1.0}
    expected |= {"total_timesteps": 512, "finished": True}
    assert {name: summary[name] for name in expected} == expected
    assert {"final_return_std", "train_return_last100", "sps", "wall_s"} <= set(summary)
    assert [row["step"] for row in progress(folder)] == [256, 512]
    assert progress(folder)[-1]["return_mean"] == summary["final_return_mean"]
    recorded = json.loads((folder / "args.json").read_text())
    assert recorded["args"]["noise_level"] == 0.05
    assert recorded["versions"]["torch"] == torch.__version__
    assert not list(folder.glob("*.tmp"))
    events = EventAccumulator(str(folder)).Reload()
    tags = set(events.Tags()["scalars"])
    assert {f"charts/{name}" for name in ("episodic_return", "episodic_length", "SPS")} < tags
    losses = "policy reverse value entropy explained_variance grad_norm"
    losses += " advantage_sign_flips advantage_largest"
    losses += " approx_kl clip_fraction" if setting.ppo else " probability reverse_share"
    assert {f"losses/{name}" for name in losses.split()} < tags
    assert [event.step for event in events.Scalars("losses/policy")] == [128, 256, 384, 512]


def test_interrupted_and_resumed_a_run_is_whole(setting, tmp_path):
    whole, _ = setting.run(tmp_path / "whole", eval_freq=128, total_timesteps=768)
    stopped, folder = setting.run(tmp_path / "broken", stop=StopAfter(3), eval_freq=128, total_timesteps=768)
    assert stopped is None
    assert not (folder / "summary.json").exists()
    before = checkpoint(folder)
    assert before["progress"][0] == 384

    summary = setting.resume(folder)
    assert summary["finished"]
    steps = [row["step"] for row in progress(folder)]
    assert steps == [128, 256, 384, 512, 640, 768]
    assert progress(folder)[:3] == progress(tmp_path / "whole" / "run")[:3]
    after = checkpoint(folder)
    if setting.ppo:
        updates = 768 // 128 * setting.small["update_epochs"] * setting.small["num_minibatches"]
        assert after["optimizer"]["state"][0]["step"].item() == updates
    assert summary["wall_s"] > before["progress"][3]
    assert not torch.equal(after["generator"], before["generator"])


def test_resuming_restores_weights_and_random_states(setting, tmp_path, monkeypatch):
    """Without the optimiser's steps weights stay; the noise on rewards is drawn from where it stopped."""
    _, folder = setting.run(tmp_path, stop=StopAfter(2), noise="normal")
    before, trained = checkpoint(folder), weights(folder)
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
    rng.normal(0, 1, 2 * 128)
    assert rng.bit_generator.state == after["rng"]


def test_a_resumed_run_plays_other_episodes(setting, tmp_path, monkeypatch):
    """Simulators are not saved; from the first seed again, it would train on the same beginnings twice."""
    envs, seeds = getattr(setting.script, setting.envs), []
    reset = envs.reset
    monkeypatch.setattr(envs, "reset", lambda self, seed: seeds.append(seed) or reset(self, seed))
    _, folder = setting.run(tmp_path, seed=7, stop=StopAfter(2))
    setting.resume(folder)
    assert seeds[:2] == [7, 7 + 256]


def test_a_killed_run_goes_on_from_its_checkpoint_without_doubled_evaluations(setting, tmp_path):
    """As after SIGKILL: evaluations from after the last checkpoint are on disk, and must not come twice."""
    _, folder = setting.run(tmp_path, stop=StopAfter(2), eval_freq=128)
    with (folder / "progress.csv").open("a") as file:
        file.write("384,-5.5,0.0,1.0,1\n")
    (folder / "checkpoint.pt.tmp").write_bytes(b"half a checkpoint")
    setting.resume(folder)
    rows = progress(folder)
    assert [row["step"] for row in rows] == [128, 256, 384, 512]
    assert rows[2]["return_mean"] != -5.5


def test_a_run_killed_before_its_first_checkpoint_starts_again(setting, tmp_path):
    _, whole = setting.run(tmp_path / "whole", eval_freq=128)
    _, folder = setting.run(tmp_path / "killed", stop=StopAfter(2), eval_freq=128)
    (folder / "checkpoint.pt").unlink()
    setting.resume(folder)
    assert (folder / "progress.csv").read_bytes() == (whole / "progress.csv").read_bytes()
    assert torch.equal(weights(folder), weights(whole))


def test_a_run_of_another_script_is_not_resumed(setting, tmp_path):
    _, folder = setting.run(tmp_path, stop=StopAfter(1))
    for other in SETTINGS:
        if other is not setting:
            with pytest.raises(ValueError, match="a run of another script"):
                other.resume(folder)


def test_a_resumed_run_is_checked_like_a_new_one(setting, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    _, folder = setting.run(tmp_path, stop=StopAfter(1))
    saved = json.loads((folder / "args.json").read_text())
    saved["args"]["device"] = "cuda"
    (folder / "args.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="no GPU"):
        setting.resume(folder)


def test_checkpoints_come_as_often_as_asked(setting, tmp_path, monkeypatch):
    saved, save = [], setting.script.save

    def recording_save(path, content):
        if path.name == "checkpoint.pt":
            saved.append(content["progress"][0])
        save(path, content)

    monkeypatch.setattr(setting.script, "save", recording_save)
    setting.run(tmp_path, checkpoint_freq=300, total_timesteps=1024)
    assert saved == [384, 640, 1024]


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


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_with_a_checkpoint_and_says_how_to_go_on(setting, tmp_path, signum):
    command = [sys.executable, setting.script.__file__, "--env-id", setting.small["env_id"],
               "--total-timesteps", "200000", "--no-compile", "--eval-freq", "0", "--eval-episodes", "1",
               "--run-name", "r"]  # fmt: skip
    process = subprocess.Popen([*command, "--runs-dir", tmp_path], stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 60
    while not list(tmp_path.glob("r/events*")) and time.time() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signum)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"--resume {tmp_path / 'r'}" in stderr
    assert "Traceback" not in stderr
    assert checkpoint(tmp_path / "r")["progress"][0] > 0


@pytest.mark.parametrize("episodes", [1, 2])
def test_a_video_of_the_first_episode_of_each_evaluation(setting, tmp_path, episodes):
    flags = {"env_id": setting.visible, "total_timesteps": 256, "eval_freq": 128}
    _, folder = setting.run(tmp_path, capture_video=True, eval_episodes=episodes, **flags)
    names = sorted(path.stem for path in folder.glob("video/*.mp4"))
    assert [name.split("-episode")[0] for name in names] == ["step-128", "step-256"]


def test_tracking_tells_weights_and_biases_the_arguments(setting, tmp_path, monkeypatch):
    calls = []
    wandb = types.ModuleType("wandb")
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    wandb.init = lambda **arguments: calls.append(arguments)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    setting.run(tmp_path, track=True, total_timesteps=128)
    assert calls[0]["config"]["env_id"] == setting.small["env_id"]
    assert calls[0]["id"] == calls[0]["name"] == "run"
    assert calls[0]["sync_tensorboard"]


BAD_INPUT = {
    "--noise flip --noise-level 1.5": "in [0, 1]",
    "--noise flip --noise-level nan": "in [0, 1]",
    "--noise-level 0.1": "--noise",
    "--alpha -1": "--alpha",
    "--beta inf": "--beta",
    "--z 1": "negative",
    "--seed 99999999999999999999": "--seed",
    "--total-timesteps 0": "at least 1",
    "--log-freq 0": "at least 1",
    "--learning-rate 0": "positive",
    "--device cuda": "use cpu",
    "--runs-dir /dev/null": "/dev/null",
    "--resume nowhere": "interrupted",
    "--resume nowhere --seed 2": "leave out",
}
PPO_BAD_INPUT = {"--num-minibatches 33": "must divide", "--num-envs 1 --num-steps 4": "parts > 1"}
A2C_BAD_INPUT = {"--norm-adv --num-envs 1 --num-steps 1": "2 or more", "--rmsprop-eps 0": "positive"}
CONTINUOUS_BAD_INPUT = {
    "--env-id Hoper-v4": "Hopper",
    "--env-id CartPole-v1": "Discrete(2)",
    "--env-id nowhere:Nothing-v0": "nowhere",
    "--policy gaussian --beta 1": "--policy categorical",
    "--bins 1": "at least 2",
    "--hidden-sizes 64 0": "at least 1",
}
ATARI_BAD_INPUT = {
    "--env-id Brekout": "breakout",
    "--env-id Hopper-v4": "no such game",
    "--env-id ALE/MsPackman-v5": "ms_pacman",
    "--env-id Breakout-ram-v4": "breakout",
    "--env-id Combat": "no such game",
    "--repeat-action-probability 2": "in [0, 1]",
    "--seed 2000000000": "1e9",
    "--total-timesteps 2000000000": "1e9",
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
def test_bad_input_is_one_line_and_exit_code_2(setting, flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [setting.script.__file__, *flags.split()])
    with pytest.raises(SystemExit) as exit_:
        setting.script.main()
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert out == ""
    assert not list(tmp_path.iterdir())  # no work was begun


def test_a_finished_run_or_a_taken_name_is_not_written_over(setting, tmp_path):
    _, folder = setting.run(tmp_path)
    before = (folder / "summary.json").read_bytes()
    with pytest.raises(ValueError, match="File exists"):
        setting.run(tmp_path)
    with pytest.raises(ValueError, match="not the folder of a run that was interrupted"):
        setting.resume(folder)
    assert (folder / "summary.json").read_bytes() == before


def test_from_the_shell_errors_have_no_traceback(setting, tmp_path):
    for flags, what in (
        ("--env-id Nothing-v0", "error:"),
        ("--noise square", "square"),
        ("--sed 1", "--sed"),
    ):
        command = [sys.executable, setting.script.__file__, *flags.split()]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"COLUMNS": "100"}
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
    summary, _ = setting.run(tmp_path, compile=True)
    assert summary["finished"]
    assert summary["compile"] is False
    err = capsys.readouterr().err
    assert "going on with --no-compile" in err
    assert "RuntimeError('no C++ compiler')" in err
