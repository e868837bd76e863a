"""Whether everything here runs on a GPU, computes the same there as on a CPU, and how fast.

    python benchmarks/gpu.py                         # eight minutes; all results in gpu.json
    python benchmarks/gpu.py --device cpu --quick    # a rehearsal without a GPU, two minutes

Each step is a process of its own with a time limit, so that one that fails or hangs does not take
the rest with it: the last lines of what it wrote are its result. gpu.json is written after each
step; a command in it repeats that step alone, in a folder where `gpu.py toy` came first.
"""

import copy
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import distributions
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch.utils import _pytree as pytree
from torch.utils.collect_env import get_pretty_env_info

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["sppo_continuous", "sa2c_continuous", "sppo_atari", "sa2c_atari", "sppo_rlhf"]


@dataclass
class Args:
    device: Literal["cuda", "cpu"] = "cuda"
    quick: bool = False  # one update each, nothing compiled, 8 games only
    minutes: float = 8  # for all steps together; what comes too late is skipped
    step_seconds: float = 100  # for each step
    out: str = "gpu.json"


def make_steps(args):
    """[(steps, how many of them run side by side)], where steps are {name: command}. The most
    informative ones come first."""
    device = args.device
    common = ["--device", device, "--eval-episodes", 1]
    once = [*common, "--eval-freq", 10**9]  # evaluated at the end only
    compilation = ["--no-compile"] if args.quick else ["--compile"]

    timed = {"machine": step("machine"), "toy": step("toy")}
    for script in SCRIPTS[:4]:
        flags = ["--total-timesteps", 1 if args.quick else 8_192]  # in whole rollouts
        timed[script] = step("train", script, *once, *flags, *compilation)
    flags = ["--total-timesteps", 1 if args.quick else 672]  # in whole batches of 112
    timed["sppo_rlhf"] = step("train", "sppo_rlhf", *once, *flags)

    checks = {}
    for script in SCRIPTS:
        modes = ["float32"]
        modes += [] if script.endswith("continuous") else ["bfloat16"]
        modes += [] if script == "sppo_rlhf" or args.quick else ["compiled"]
        checks[f"{script}, first gradient"] = step("gradient", script, device, *modes)
    often = [*common, "--eval-freq", 1]  # a checkpoint after each update
    atari = ["sppo_atari", *often, "--num-steps", 16, "--total-timesteps", 512, "--no-compile"]
    checks["sppo_atari, killed"] = step("kill", device, *atari)
    if device == "cuda":
        checks["sppo_atari, killed, continued on the CPU"] = step("kill", "cpu", *atari)
    texts = ["sppo_rlhf", *often, "--total-timesteps", 336]
    checks["sppo_rlhf, killed"] = step("kill", device, *texts)

    variants = ["--num-envs 32", "--num-envs 128", "--no-compile", "--amp off"]
    speeds = {}
    for variant in variants[-1:] if args.quick else variants:
        flags = ["--total-timesteps", 1 if args.quick else 32_768, *compilation, *variant.split()]
        speeds[f"sppo_atari {variant}"] = step("train", "sppo_atari", *once, *flags)
    return [(timed, 1), (checks, max(1, os.cpu_count() // 4)), (speeds, 1)]


def step(*words):
    return [sys.executable, str(Path(__file__).resolve()), *map(str, words)]


def run_steps(groups, args):
    """Runs groups of steps, prints a table of their results and writes them to `args.out`."""
    deadline = time.monotonic() + 60 * args.minutes

    def run(command):
        seconds = min(args.step_seconds, deadline - time.monotonic())
        result = {"error": "skipped: no time left"}
        if seconds > 1:
            result = run_step(command, seconds, Path(folder))
        return result | {"command": command}

    results = {}
    print("| step | result |\n|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for steps, workers in groups:
            with ThreadPoolExecutor(workers) as pool:
                for name, result in zip(steps, pool.map(run, steps.values())):
                    results[name] = result
                    Path(args.out).write_text(json.dumps(results, indent=2))
                    short = {k: v for k, v in result.items() if isinstance(v, (str, int, float))}
                    print(f"| {name} | {json.dumps(short)[1:-1]} |", flush=True)
    return results


def run_step(command, seconds, folder):
    """What the command prints in its last line, a JSON object, and its seconds; or its error."""
    started = time.monotonic()
    output = Path(tempfile.mkdtemp(dir=folder))
    # Files: a pipe stays open as long as any process that the step has left behind
    with open(output / "stdout", "w") as stdout, open(output / "stderr", "w") as stderr:
        streams = {"stdout": stdout, "stderr": stderr}
        process = subprocess.Popen(command, cwd=folder, start_new_session=True, **streams)
        try:
            status = process.wait(seconds)
            error = f"exit status {status}" if status else None
        except subprocess.TimeoutExpired:
            error = f"no end within {seconds:.0f} seconds"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    result = {"seconds": round(time.monotonic() - started, 1)}
    lines = (output / "stderr").read_text(errors="replace").splitlines()
    if error:
        return result | {"error": error, "last_lines": lines[-12:]}
    warnings = [line for line in lines if line.startswith("torch.compile failed")]
    if warnings:  # the scripts go on without
        result["warning"] = warnings[0]
    return result | json.loads((output / "stdout").read_text().splitlines()[-1])


# The steps, in processes of their own, in a folder that they share


def machine():
    """Software and hardware, mostly in PyTorch's words."""
    return {
        "commit": import_module("sppo_continuous").provenance()["commit"],
        "environment": get_pretty_env_info().splitlines(),
        "packages": {package.name: package.version for package in distributions()},
    }


def toy():
    """The toy's models after a tenth of their training: no step needs better ones."""
    rlhf = import_module("sppo_rlhf")
    train_toy_model = rlhf.train_toy_model

    def train_briefly(model, data, steps, *others):
        train_toy_model(model, data, steps // 10, *others)

    rlhf.train_toy_model = train_briefly
    rlhf.make_toy(Path(rlhf.TOY))
    return {}


def train(script, *flags):
    name = str(os.getpid())
    sys.argv = [script, "--run-name", name, *flags]
    import_module(script).main()
    summary = json.loads(Path("runs", name, "summary.json").read_text())
    result = {"per_second": round(summary["sps"], 1), "return_mean": summary["return_mean"]}
    result["ram_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    if torch.cuda.is_available():
        result["gpu_mib"] = torch.cuda.max_memory_reserved() // 2**20
        result["skips"] = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    return result


def gradient(script, device, *modes):
    """Begins a run on the CPU in float32 and computes the gradient of its first minibatch on
    `device` too: prints the differences, relative to the gradient's norm, and exits."""
    module = import_module(script)
    name = "loss_and_metrics" if script == "sppo_rlhf" else "gradient_and_metrics"
    function = getattr(module, name)

    def compare(model, args, *inputs):
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases begin at 0: for black pixels ReLU then has two slopes
                parameter.data += 0.01 * torch.randn_like(parameter)
        expected = flat_gradient(function, model, args, inputs)
        model = copy.deepcopy(model).to(device)
        inputs = pytree.tree_map_only(torch.Tensor, lambda x: x.to(device), inputs)
        differences = {}
        for mode in modes:
            model.dtype = torch.bfloat16 if mode == "bfloat16" else torch.float32
            called = function
            if mode == "compiled":
                torch._dynamo.config.trace_autograd_ops = True
                called = torch.compile(function, fullgraph=True, mode="reduce-overhead")
                for _ in range(2):  # CUDA graphs are recorded after a warm-up
                    called(model, args, *inputs)
            actual = flat_gradient(called, model, args, inputs).cpu()
            difference = (actual - expected).norm() / expected.norm()
            differences[mode] = float(f"{difference:.2g}")
        print(json.dumps(differences))
        worst = max(differences[mode] for mode in modes if mode != "bfloat16")
        sys.exit(None if worst < 1e-3 else f"gradients differ: {differences}")

    setattr(module, name, compare)
    sys.argv = [script, "--device", "cpu", "--eval-episodes", "1"]
    sys.argv += [] if script.endswith("continuous") else ["--amp", "off"]
    sys.argv += [] if script == "sppo_rlhf" else ["--no-compile"]
    module.main()


def flat_gradient(function, model, args, inputs):
    result, _ = function(model, args, *inputs)
    if result.ndim:  # in control it is a gradient already, for texts the loss
        return result
    model.zero_grad()
    result.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def kill(device, script, *flags):
    """Kills a run at its first checkpoint; the same command continues it, on `device`."""
    name = str(os.getpid())
    command = [sys.executable, ROOT / f"{script}.py", "--run-name", name, *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not Path("runs", name, "checkpoint.pt").exists():
        if process.poll() is not None:
            sys.exit(f"exit status {process.returncode} before the first checkpoint")
        time.sleep(0.01)
    process.kill()
    process.wait()
    subprocess.run([*command, "--device", device], stdout=subprocess.DEVNULL, check=True)
    summary = json.loads(Path("runs", name, "summary.json").read_text())
    return {"continued_at": summary["continued_at"][0], "return_mean": summary["return_mean"]}


def main(args: Args):
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: PyTorch finds no GPU here; --device cpu rehearses without one")
    results = run_steps(make_steps(args), args)
    if any("error" in result for result in results.values()):
        sys.exit(f"error: not all steps succeeded; {args.out} has their last lines")


if __name__ == "__main__":
    STEPS = {"machine": machine, "toy": toy, "train": train, "gradient": gradient, "kill": kill}
    if len(sys.argv) > 1 and sys.argv[1] in STEPS:
        sys.path.insert(0, str(ROOT))
        print(json.dumps(STEPS[sys.argv[1]](*sys.argv[2:])))
    else:
        main(tyro.cli(Args))
