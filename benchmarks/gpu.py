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
    """{name: command} of all steps, the most informative ones first."""
    steps = {}

    def add(name, *words):
        steps[name] = [sys.executable, str(Path(__file__).resolve()), *map(str, words)]

    device = args.device
    common = ["--device", device, "--eval-episodes", 1]
    once = [*common, "--eval-freq", 10**9]  # evaluated at the end only
    compilation = ["--no-compile"] if args.quick else ["--compile"]
    add("machine", "machine")
    add("toy", "toy")
    for script in SCRIPTS[:4]:
        steps_in_all = 1 if args.quick else 4096  # in whole rollouts
        add(script, "train", script, *once, "--total-timesteps", steps_in_all, *compilation)
    for amp in ("auto", "off"):
        texts = 1 if args.quick else 672  # in whole batches of 112
        flags = [*once, "--total-timesteps", texts, "--amp", amp]
        add(f"sppo_rlhf, --amp {amp}", "train", "sppo_rlhf", *flags)

    for script in SCRIPTS:
        modes = ["float32"]
        modes += [] if script.endswith("continuous") else ["bfloat16"]
        modes += [] if script == "sppo_rlhf" or args.quick else ["compiled"]
        add(f"{script}, first gradient", "gradient", script, device, *modes)

    often = [*common, "--eval-freq", 1]  # a checkpoint after each update
    atari = ["sppo_atari", *often, "--num-steps", 16, "--total-timesteps", 512, "--no-compile"]
    add("sppo_atari, killed", "kill", device, *atari)
    if device == "cuda":
        add("sppo_atari, killed, continued on the CPU", "kill", "cpu", *atari)
    add("sppo_rlhf, killed", "kill", device, "sppo_rlhf", *often, "--total-timesteps", 336)

    for amp in ("auto", "off"):
        for flag in compilation if args.quick else ("--compile", "--no-compile"):
            for games in (8,) if args.quick else (8, 32, 128):
                flags = ["--num-envs", games, "--amp", amp, flag]
                flags += ["--total-timesteps", 1024 if args.quick else 32_768]
                name = f"sppo_atari {' '.join(map(str, flags))}"
                add(name, "train", "sppo_atari", *once, *flags)
    return steps


def run_steps(steps, args):
    """Runs the steps in turn, prints a table of their results and writes them to `args.out`."""
    deadline = time.monotonic() + 60 * args.minutes
    results = {}
    print("| step | result |\n|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, command in steps.items():
            left = deadline - time.monotonic()
            result = {"error": "skipped: no time left"}
            if left > 1:
                result = run_step(command, min(args.step_seconds, left), Path(folder))
            results[name] = result | {"command": command}
            Path(args.out).write_text(json.dumps(results, indent=2))
            short = {k: v for k, v in result.items() if isinstance(v, (str, int, float))}
            print(f"| {name} | {json.dumps(short)[1:-1]} |", flush=True)
    return results


def run_step(command, seconds, folder):
    """What the command prints in its last line, a JSON object, and its seconds; or its error."""
    started = time.monotonic()
    # Files: a pipe stays open as long as any process that the step has left behind
    with open(folder / "stdout", "w") as stdout, open(folder / "stderr", "w") as stderr:
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
    lines = (folder / "stderr").read_text(errors="replace").splitlines()
    if error:
        return result | {"error": error, "last_lines": lines[-12:]}
    warnings = [line for line in lines if line.startswith("torch.compile failed")]
    if warnings:  # the scripts go on without
        result["warning"] = warnings[0]
    return result | json.loads((folder / "stdout").read_text().splitlines()[-1])


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
