"""A short fault campaign, and that the campaign notices what it is there for."""

import json
import subprocess
import sys

import campaign
import pytest
import torch
from campaign import Failure, Outcome
from safetensors.torch import save_file


@pytest.mark.slow
@pytest.mark.parametrize("script", campaign.SMALL)
def test_a_short_campaign_fails_nowhere(script, tmp_path):
    counts = "--commands 8 --kills 3 --rename-kills 2 --damages 5 --no-faults"
    command = [sys.executable, campaign.__file__, "--scripts", script, *counts.split()]
    done = subprocess.run([*command, "--out", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert f"| {script} | command lines | 8 | 8 | 0 |" in done.stdout


def outcome(code, err, stopped=False):
    return Outcome(code, "", err, 1.0, stopped)


@pytest.mark.parametrize(
    "err",
    [
        "",
        "warning: not an error\n",
        "error: one\nerror: two\n",
        "error: on two\nlines\n",
        "Traceback (most recent call last):\nerror: no\n",
    ],
)
def test_an_error_is_one_line(err):
    assert campaign.error_line(outcome(2, "a warning\nerror: x\n")) == "error: x"
    with pytest.raises(Failure):
        campaign.error_line(outcome(2, err))


@pytest.mark.parametrize("code", [1, -9, None])
def test_a_wrong_exit_code_is_noticed(code):
    campaign.check_code(outcome(0, ""), 0, 2)
    with pytest.raises(Failure):
        campaign.check_code(outcome(code, ""), 0, 2)


@pytest.fixture
def finished(tmp_path):
    """The folder of a finished run, and what its checkpoint and summary hold."""
    rows = "step,return_mean\n64,1.0\n128,2.0\n"
    (tmp_path / "progress.csv").write_text(rows)
    state = {"agent": {"weight": torch.zeros(2, 2)}, "global_step": 128}
    torch.save(state, tmp_path / "checkpoint.pt")
    save_file(state["agent"], tmp_path / "agent.safetensors")
    summary = {"finished": True, "total_timesteps": 100, "final_return_mean": 2.0}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    campaign.check_finished(tmp_path, [64, 128])
    return tmp_path, state


def test_a_checkpoint_of_another_step_is_noticed(finished):
    folder, state = finished
    torch.save(state | {"global_step": 64}, folder / "checkpoint.pt")
    with pytest.raises(Failure, match="of step 64"):
        campaign.check_finished(folder)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_noticed(finished, value):
    folder, state = finished
    state["agent"]["weight"][1, 1] = value
    torch.save(state, folder / "checkpoint.pt")
    with pytest.raises(Failure, match="agent not finite"):
        campaign.check_finished(folder)


def test_other_final_weights_are_noticed(finished):
    folder, _ = finished
    save_file({"weight": torch.ones(2, 2)}, folder / "agent.safetensors")
    with pytest.raises(Failure, match="old weight"):
        campaign.check_finished(folder)
    (folder / "agent.safetensors").unlink()
    with pytest.raises(Failure, match="without weights"):
        campaign.check_finished(folder)


def test_half_a_checkpoint_is_noticed(finished):
    path = finished[0] / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(Failure, match="cannot be read"):
        campaign.check_checkpoint(finished[0])


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        ("64,1.0\n64,1.0\n128,2.0\n", "not once each"),
        ("128,2.0\n", "evaluations at"),
        ("64,1.0\n128,3.0\n", "differ"),
        ("64,1.0\n128\n", "cannot be read"),
    ],
)
def test_wrong_evaluations_are_noticed(finished, rows, what):
    folder, _ = finished
    (folder / "progress.csv").write_text(f"step,return_mean\n{rows}")
    with pytest.raises(Failure, match=what):
        campaign.check_finished(folder, [64, 128])
