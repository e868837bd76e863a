"""What concerns a GPU, without one: benchmarks/gpu.py rehearsed, and the threads that games get."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import sa2c_atari
import sppo_atari

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import gpu  # noqa: E402


def test_a_step_that_fails_or_hangs_does_not_take_the_rest_with_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    programs = {
        "fails": "print(1); raise ValueError('no such device')",
        # a process that it leaves behind holds open what it writes to
        "hangs": "import os; os.system('sleep 60 & sleep 60')",
        "works": "print('a line'); print('{\"per_second\": 5}')",
    }
    steps = {name: [sys.executable, "-c", program] for name, program in programs.items()}
    args = gpu.Args(step_seconds=3)
    results = gpu.run_steps([(steps, 2)], args)
    assert results["fails"]["last_lines"][-1] == "ValueError: no such device"
    assert "124" in results["hangs"]["error"]
    assert results["hangs"]["seconds"] < 30
    assert results["works"]["per_second"] == 5
    assert json.loads(Path("gpu-checks.json").read_text()) == results


def test_speed_is_a_median_after_the_burn_in_and_resets_are_what_they_take_longer():
    times = [60.0 * i for i in range(gpu.BURN_IN)]  # not counted
    times += [600.0, 602.0, 603.0, 607.0]
    steps = [(time, 9.0, True) for time in [*times[: gpu.BURN_IN], 608.0]]  # not counted either
    steps += [(601.0, 0.1, False), (602.5, 0.3, False), (603.0, 0.1, False), (605.0, 0.8, True)]
    found = gpu.after_burn_in([(time, 4) for time in times], steps)
    assert found["per_second"] == 2
    assert found["reset_share"] == pytest.approx(0.7 / 7, abs=1e-3)


def test_kernels_are_the_operators_that_do_something():
    def compute(x):
        x = x @ x.T
        return x.view(2, 8).softmax(-1).T.contiguous()  # product, softmax, copy

    _, counts = gpu.count_kernels(compute, torch.rand(4, 3))
    assert counts["operators"] == 3


# OMP_NUM_THREADS, a GPU or none, --device, and threads for 8 and for 128 games on 16 cores
THREADS = [
    (None, True, "auto", [8, 16]),
    ("1", True, "auto", [1, 1]),
    ("4", True, "cuda", [4, 4]),
    (None, True, "cpu", [3, 3]),
    ("4", False, "auto", [3, 3]),  # PyTorch's own number, whatever that makes of it
]


@pytest.mark.parametrize("script", [sppo_atari, sa2c_atari])
@pytest.mark.parametrize("variable, gpu, device, expected", THREADS)
def test_on_a_gpu_games_get_all_cores(variable, gpu, device, expected, script, monkeypatch):
    found = []

    def vector_env(game, num_games, num_threads, **others):
        found.append(num_threads)
        assert others["max_num_frames_per_episode"] == 30 * 60 * 60  # half an hour
        return SimpleNamespace(ale=SimpleNamespace(get_action_set=list))

    monkeypatch.setattr(script, "AtariVectorEnv", vector_env)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    for num_games in (8, 128):
        script.AtariGames(script.Args(device=device), num_games)
    assert found == expected


@pytest.mark.slow
def test_the_smallest_step_of_each_kind_succeeds_on_a_cpu(tmp_path, monkeypatch):
    """The rest is for who has a GPU to rehearse: it takes longer than all other slow tests."""
    monkeypatch.chdir(tmp_path)
    smallest = {
        "checks": ["machine", "sa2c_continuous, first gradient", "Breakout, sa2c_atari, 16 games"],
        "atari": ["acting, as in the script", "minibatch, as in the script"],
    }
    for suite, names in smallest.items():
        args = gpu.Args(suite, "cpu", quick=True)
        steps = {k: step for group, _ in gpu.make_steps(args) for k, step in group.items()}
        for name, result in gpu.run_steps([({k: steps[k] for k in names}, 2)], args).items():
            assert "error" not in result, (name, result)
