"""benchmarks/gpu.py, rehearsed on the CPU."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import gpu  # noqa: E402

PYTHON = [sys.executable, "-c"]


def test_a_step_that_fails_or_hangs_does_not_take_the_rest_with_it(tmp_path):
    # a process that the step leaves behind holds what it writes to open
    child = "import subprocess, time; subprocess.Popen(['sleep', '60']); time.sleep(60)"
    steps = {
        "fails": [*PYTHON, "print(1); raise ValueError('no such device')"],
        "hangs": [*PYTHON, child],
        "works": [*PYTHON, "print('a line'); print('{\"per_second\": 5}')"],
    }
    args = gpu.Args(out=str(tmp_path / "gpu.json"), step_seconds=3)
    results = gpu.run_steps([(steps, 2)], args)
    assert results["fails"]["error"] == "exit status 1"
    assert results["fails"]["last_lines"][-1] == "ValueError: no such device"
    assert results["hangs"]["error"] == "no end within 3 seconds"
    assert results["works"]["per_second"] == 5
    assert json.loads((tmp_path / "gpu.json").read_text()) == results


@pytest.mark.slow
def test_every_step_succeeds_on_a_cpu(tmp_path):
    args = gpu.Args("cpu", quick=True, minutes=20, step_seconds=400, out=str(tmp_path / "gpu.json"))
    for name, result in gpu.run_steps(gpu.make_steps(args), args).items():
        assert "error" not in result, (name, result)
        if "gradient" in name:
            assert result["float32"] < 1e-3 and result.get("bfloat16", 0) < 0.2
        if "killed" in name:
            assert result["continued_at"] > 0
