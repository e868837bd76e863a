"""Whether everything here runs on a GPU, computes the same there as on a CPU, and how fast.

    python benchmarks/gpu.py                         # checks, then speed: eight minutes at most
    python benchmarks/gpu.py --suite atari           # what limits games, and by how much
    python benchmarks/gpu.py --suite language        # language models of random weights
    python benchmarks/gpu.py --device cpu --quick    # any of them rehearsed without a GPU

Each step is a process of its own with a time limit, so that one that fails or hangs does not take
the rest with it: the last line that it wrote is its result. The file of results is written after
each step; a command in it repeats that step alone, in a folder where `gpu.py toy`, or the models
that it names, came first. What is measured are the scripts in the folder above this file's: for
another version of them, copy it there.
"""

import copy
import hashlib
import json
import os
import random
import re
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
from itertools import pairwise, product
from pathlib import Path
from statistics import mean, median
from typing import Literal

import numpy as np
import torch
import tyro
from torch.utils import _pytree as pytree
from torch.utils.collect_env import get_pretty_env_info

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["sppo_continuous", "sa2c_continuous", "sppo_atari", "sa2c_atari", "sppo_rlhf"]
# Script, game, games at a time, updates: ten are not counted. Games of Pong are long, resets rare
SPEEDS = [
    ("sppo_atari", "Breakout", 8, 30),
    ("sppo_atari", "Pong", 8, 30),
    ("sppo_atari", "Breakout", 128, 20),
    ("sppo_atari", "Pong", 128, 20),
    ("sa2c_atari", "Breakout", 16, 400),
    ("sa2c_atari", "Pong", 16, 400),
    ("sppo_atari", "Breakout", 32, 30),
    ("sppo_atari", "Pong", 32, 30),
]
BURN_IN = 10  # updates
# Operators that launch nothing; of the others the innermost are counted
NO_KERNEL = """_reshape_alias _unsafe_view alias as_strided chunk contiguous detach detach_ dropout
empty empty_like empty_strided expand expand_as flatten item lift_fresh movedim narrow new_empty
permute reshape resize_ resolve_conj resolve_neg result_type select set_ slice split squeeze t to
transpose unbind unflatten unfold unsqueeze view view_as""".split()


@dataclass
class Args:
    suite: Literal["checks", "atari", "language"] = "checks"
    device: Literal["cuda", "cpu"] = "cuda"
    quick: bool = False  # everything once and small, nothing compiled
    minutes: float = 8  # for all steps together; what comes too late is skipped
    step_seconds: float = 200  # for each step
    out: str | None = None  # file of results; default: gpu-SUITE.json


def make_steps(args):
    """[(steps, how many of them run side by side)], where steps are {name: command}. The most
    informative ones come first."""
    suites = {"checks": check_steps, "atari": atari_steps, "language": language_steps}
    return [({"machine": step("machine")}, 1), *suites[args.suite](args)]


def check_steps(args):
    device = args.device
    common = ["--device", device, "--eval-episodes", 1]
    once = [*common, "--eval-freq", 10**9]  # evaluated at the end only
    compilation = ["--no-compile"] if args.quick else ["--compile"]

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

    speeds = {}
    for speed in SPEEDS[::4] if args.quick else SPEEDS:
        speeds["{}, {}, {} games".format(*speed)] = train_on_games(args, *speed)
    for script in ("sppo_rlhf", "sppo_continuous", "sa2c_continuous"):
        flags = [] if script == "sppo_rlhf" else compilation
        steps = 672 if script == "sppo_rlhf" else 8_192  # in whole batches of 112
        flags = [*once, *flags, "--total-timesteps", 1 if args.quick else steps]
        speeds[script] = step("train", script, *flags)
    for flags in [] if args.quick else [["--no-compile"], ["--amp", "off"]]:
        speeds[f"sppo_atari {' '.join(flags)}"] = train_on_games(args, *SPEEDS[0], *flags)
    return [({"toy": step("toy")}, 1), (checks, max(1, os.cpu_count() // 4)), (speeds, 1)]


def train_on_games(args, script, game, games, updates, *flags):
    num_steps = 5 if script == "sa2c_atari" else 128
    if args.quick:
        num_steps = min(num_steps, 16)
        updates = BURN_IN + 3
    flags = ["--no-compile" if args.quick else "--compile", *flags, "--device", args.device]
    flags += ["--env-id", game, "--num-envs", games, "--num-steps", num_steps]
    flags += ["--total-timesteps", games * num_steps * updates]
    flags += ["--eval-freq", 10**9, "--eval-episodes", 1]
    return step("train", script, *flags)


def atari_steps(args):
    """What the choice between ways to act, to learn and to share a GPU rests on."""
    compilation = "eager" if args.quick else "compiled"
    emulated = [8] if args.quick else [8, 32, 128]
    acting = [8] if args.quick else [8, 16, 64, 4]
    jobs = {}
    for count in (1, 2) if args.quick else (1, 8, 4, 2):
        train_command = train_on_games(args, *SPEEDS[0])
        jobs[f"{count} jobs of 8 games"] = step("jobs", count, *train_command[3:])
    parts = {
        "emulators": step("emulators", *emulated),
        "acting": step("acting", args.device, compilation, *acting),
        "minibatch": step("minibatch", args.device, compilation),
    }
    return [(jobs, 1), (parts, 1)]


def language_steps(args):
    size = "small" if args.quick else "full"

    def train(task, texts, updates, *flags):
        if args.quick:
            texts = 8
            flags = [*flags, "--update-epochs", 1, "--prompt-length", 16, "--response-length", 8]
        flags = [*flags, "--batch-size", texts, "--total-timesteps", texts * updates]
        return step("language", task, size, "--device", args.device, *flags)

    # tldr: half the authors' batch, in minibatches of as many texts as theirs
    halves = ["--num-minibatches", 2, "--micro-batch-size"]
    steps = {
        "imdb, models": step("models", "imdb", size, args.device),
        "imdb": train("imdb", 112, 4),
        "tldr, models": step("models", "tldr", size, args.device),
        "tldr, micro batch 4": train("tldr", 32, 4, *halves, 4),
        "tldr, micro batch 8": train("tldr", 32, 2, *halves, 8),
        "imdb, float32": train("imdb", 112, 4, "--amp", "off"),
    }
    for task in ("imdb", "tldr"):
        if not args.quick:
            steps[f"{task}, small models"] = step("models", task, "small", args.device)
        steps[f"{task}, kernels"] = step("kernels", task, "--device", args.device)
    return [(steps, 1)]


def step(*words):
    return [sys.executable, str(Path(__file__).resolve()), *map(str, words)]


def run_steps(groups, args):
    """Runs groups of steps, prints a table of their results and writes them to `args.out`."""
    deadline = time.monotonic() + 60 * args.minutes
    out = Path(args.out or f"gpu-{args.suite}.json")

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
                    out.with_suffix(".tmp").write_text(json.dumps(results, indent=2))
                    out.with_suffix(".tmp").replace(out)
                    short = {k: v for k, v in result.items() if isinstance(v, (str, int, float))}
                    print(f"| {name} | {json.dumps(short)[1:-1]} |", flush=True)
    return results


def run_step(command, seconds, folder):
    """The JSON objects that the command prints, a line each, as one, and its seconds; what it
    printed before it failed, and its error."""
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
    for line in (output / "stdout").read_text(errors="replace").splitlines():
        with suppress(ValueError):  # a script's own output, or a line that was cut off
            found = json.loads(line) if line.startswith("{") else {}
            result |= found
    if error:
        return result | {"error": error, "last_lines": lines[-12:]}
    warnings = [line for line in lines if line.startswith("torch.compile failed")]
    if warnings:  # the scripts go on without
        result["warning"] = warnings[0]
    return result


# The steps, in processes of their own, in a folder that they share


def machine():
    """Software and hardware, mostly in PyTorch's words. A script's `git hash-object` names its text
    also where the folder is not that of a clean commit."""
    blobs = {}
    for path in [Path(__file__), *(ROOT / f"{script}.py" for script in SCRIPTS)]:
        text = path.read_bytes()
        blobs[path.name] = hashlib.sha1(b"blob %d\0" % len(text) + text).hexdigest()
    changed = ["git", "-C", ROOT, "status", "--porcelain"]
    changed = subprocess.run(changed, capture_output=True, text=True).stdout
    return {
        "commit": import_module("sppo_continuous").provenance()["commit"],
        "changed": changed.splitlines(),
        "blobs": blobs,
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "siblings": siblings(),
        "environment": get_pretty_env_info().splitlines(),
        "packages": {package.name: package.version for package in distributions()},
    }


def siblings():
    """Logical cores of each physical one, as the system lists them."""
    folder = Path("/sys/devices/system/cpu")
    lists = {path.read_text().strip() for path in folder.glob("cpu*/topology/thread_siblings_list")}
    return sorted(lists, key=lambda cores: int(re.match(r"\d+", cores)[0]))


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
    """Runs a script. Its speed is the median over updates after the burn-in, if it has so many."""
    module = import_module(script)
    updates, steps = timed(module)
    name = str(os.getpid())
    sys.argv = [script, "--run-name", name, *flags]
    module.main()
    summary = json.loads(Path("runs", name, "summary.json").read_text())
    result = {"per_second": round(summary["sps"], 1), "return_mean": summary["return_mean"]}
    if len(updates) > BURN_IN + 1:
        result |= after_burn_in(updates, steps)
    result["ram_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    if torch.cuda.is_available():
        result["gpu_mib"] = torch.cuda.max_memory_reserved() // 2**20
        result["skips"] = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    return result


def timed(module):
    """Two lists that fill while a script runs: (time, steps, emulator steps so far) of each update
    and, of each step of the emulators, (seconds, whether one was reset in it)."""
    updates = []
    steps = []
    perturb_reward = module.perturb_reward  # called once an update, after the rollout

    def timed_perturb_reward(reward, *others):
        updates.append((time.perf_counter(), reward.size, len(steps)))
        return perturb_reward(reward, *others)

    module.perturb_reward = timed_perturb_reward
    if hasattr(module, "AtariVectorEnv"):

        class TimedEnv(module.AtariVectorEnv):
            def step(self, actions):
                started = time.perf_counter()
                result = super().step(actions)
                seconds = time.perf_counter() - started
                steps.append((seconds, bool((result[2] | result[3]).any())))
                return result

        module.AtariVectorEnv = TimedEnv
    return updates, steps


def after_burn_in(updates, steps):
    """Speed, and shares of the time that went to the emulators and, of that, to resets: what a step
    with one took longer than the median of the others."""
    kept = updates[BURN_IN:]
    rates = [after[1] / (after[0] - before[0]) for before, after in pairwise(kept)]
    result = {"per_second": round(median(rates), 1), "updates": len(rates)}
    if steps:
        seconds = kept[-1][0] - kept[0][0]
        steps = steps[kept[0][2] : kept[-1][2]]
        usual = median(taken for taken, reset in steps if not reset)
        lost = sum(taken - usual for taken, reset in steps if reset)
        result["emulator_ms"] = round(1000 * usual, 3)
        result["emulator_share"] = round(sum(taken for taken, _ in steps) / seconds, 3)
        result["reset_share"] = round(lost / seconds, 3)
    return result


def jobs(count, *command):
    """Runs `train` several times side by side, each with its share of the cores; their sum."""
    cores = len(os.sched_getaffinity(0))
    threads = str(max(1, cores // int(count)))
    processes = []
    for seed in range(int(count)):
        options = {"stdout": subprocess.PIPE, "text": True}
        options["env"] = os.environ | {"OMP_NUM_THREADS": threads}
        processes.append(subprocess.Popen(step("train", *command, "--seed", seed), **options))
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        sys.exit("a job failed")
    results = [json.loads(output.splitlines()[-1]) for output in outputs]
    found = {"threads_each": threads, "each": [result["per_second"] for result in results]}
    for name in ("per_second", "ram_mib", "gpu_mib"):
        found[name] = round(sum(result.get(name, 0) for result in results), 1)
    return found


def emulators(*counts):
    """Random games of Breakout without an agent: milliseconds of a step of all games, median and
    mean (resets are in the mean only), by games, threads, whether each thread has a core of its
    own, and the time between steps, in which an agent would act."""
    vector_env = import_module("ale_py.vector_env").AtariVectorEnv
    allowed = os.sched_getaffinity(0)
    first_of_each = {int(re.match(r"\d+", cores)[0]) for cores in siblings()} & allowed
    cores = [*sorted(first_of_each), *sorted(allowed - first_of_each)]
    for games in map(int, counts):
        all_threads = {min(games, len(first_of_each)), min(games, len(cores))}
        for threads, pinned in product(sorted(all_threads), (False, True)):
            before = set(os.listdir("/proc/self/task"))
            options = {"autoreset_mode": "SameStep", "reward_clipping": False}
            envs = vector_env("breakout", games, num_threads=threads, **options)
            envs.reset(seed=np.arange(games))
            workers = sorted(set(os.listdir("/proc/self/task")) - before)
            for worker, core in zip(workers, cores) if pinned else ():
                os.sched_setaffinity(int(worker), {core})
            for gap in (0, 0.2, 0.6):
                taken = [emulator_step(envs, games, gap) for _ in range(8000 // games)]
                found = {"ms": round(median(taken), 3), "mean_ms": round(mean(taken), 3)}
                found["workers"] = len(workers)
                how = "pinned" if pinned else "not pinned"
                name = f"{games} games, {threads} threads, {how}, {gap} ms between steps"
                print(json.dumps({name: found}), flush=True)
    return {}


def emulator_step(envs, games, gap):
    started = time.perf_counter()
    while time.perf_counter() - started < gap / 1000:
        pass  # who launches kernels and polls for their end does not sleep
    action = np.random.randint(4, size=games)
    started = time.perf_counter()
    envs.step(action)
    return 1000 * (time.perf_counter() - started)


def acting(device, compilation, *counts):
    """A step of an agent, from images on the device to actions on the CPU."""
    module = import_module("sppo_atari")
    bfloat16 = module.has_bfloat16(torch.device(device))
    agent = module.Agent(4, bfloat16=bfloat16).to(device)

    def act_in(games):
        images = torch.randint(256, (games, 84, 84, 4), dtype=torch.uint8, device=device)
        images = images.permute(0, 3, 1, 2)  # channels last in memory
        logits = torch.zeros(1, games, 4, device=device)
        value = torch.zeros(1, games, device=device)
        action = torch.zeros(1, games, dtype=torch.int64, device=device)

        def act(agent_fn):
            with agent.autocast():
                logits[0], value[0] = agent_fn(images)
            action[0] = logits[0].argmax(-1)
            action[0].cpu()
            return logits[0]

        compare_graphs(f"{games} games", agent, [images], act, compilation)

    with torch.no_grad():
        for games in map(int, counts):
            act_in(games)
    return {}


def minibatch(device, compilation):
    """Sixteen minibatches, as in an update of PPO: rows, gradient, optimizer, copies of metrics."""
    module = import_module("sppo_atari")
    function = module.gradient_and_metrics

    def measure(agent, args, *inputs):
        parameters = torch.nn.utils.parameters_to_vector(agent.parameters()).detach()
        torch.nn.utils.vector_to_parameters(parameters, agent.parameters())
        optimizer = torch.optim.Adam([parameters], lr=0.0, fused=True)  # so that weights stay
        size = inputs[-1].shape[0]
        batch = [torch.cat([x] * 4) if x.ndim else x for x in inputs]
        rows = torch.randperm(4 * size, device=inputs[-1].device)

        def learn(gradient_fn):
            for mb_inds in rows.repeat(4).view(16, size):
                inputs = [x[mb_inds] if x.ndim else x for x in batch]
                parameters.grad, metrics = gradient_fn(*inputs)
                optimizer.step()
                metrics = {name: x.clone() for name, x in metrics.items()}
            return parameters.grad.cpu()  # waits for the GPU

        def gradient_fn(*inputs):
            return function(agent, args, *inputs)

        torch._dynamo.config.trace_autograd_ops = True
        compare_graphs("update", gradient_fn, inputs, learn, compilation)
        print("{}")
        sys.exit()

    module.gradient_and_metrics = measure
    sys.argv = ["sppo_atari", "--device", device, "--eval-episodes", "1", "--no-compile"]
    module.main()


def compare_graphs(name, function, inputs, use, compilation):
    """Prints milliseconds of `use(function)` with the function compiled to CUDA graphs, as it is in
    the scripts, and as one CUDA graph made by hand, compiled or not; and the largest difference of
    what `use` returns from what it returns at first."""

    def compiled(mode):
        if compilation == "eager":
            return function
        torch._dynamo.reset()
        return torch.compile(function, fullgraph=True, dynamic=False, mode=mode)

    ways = {
        "as in the script": lambda: compiled("reduce-overhead"),
        "one graph, compiled": lambda: one_graph(compiled("default"), inputs),
        "one graph, eager": lambda: one_graph(function, inputs),
    }
    expected = None
    for way, make in ways.items():
        try:
            called = make()
            for _ in range(1 if compilation == "eager" else 3):
                actual = use(called).clone()
            expected = actual if expected is None else expected
            difference = (actual - expected).abs().max().item()
            taken = []
            for _ in range(2 if compilation == "eager" else 200):
                started = time.perf_counter()
                use(called)
                taken.append(1000 * (time.perf_counter() - started))
            found = {"ms": round(median(taken), 4), "difference": difference}
        except Exception as error:  # the other ways are still worth measuring
            found = {"failed": repr(error)[:300]}
        print(json.dumps({f"{name}, {way}": found}), flush=True)


def one_graph(function, inputs):
    """The function as a CUDA graph with inputs and outputs in fixed places; on a CPU as it is."""
    if not inputs[0].is_cuda:
        return function
    fixed = [x.clone() for x in inputs]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function(*fixed)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function(*fixed)

    def replay(*new):
        for place, x in zip(fixed, new):
            place.copy_(x)
        graph.replay()
        return outputs

    return replay


def models(task, size, device):
    """What a task needs, in a folder TASK-SIZE: a policy of the real shape (small: only as deep)
    with random weights, a reward model (imdb) or function, and texts of random words. A word is a
    token, "w17" number 17."""
    transformers = import_module("transformers")
    folder = Path(f"{task}-{size}")
    folder.mkdir()
    shape = {"n_embd": 64, "n_head": 4} if size == "small" else {}
    if task == "imdb":
        config = transformers.GPT2Config(**shape)  # 124M
    else:
        shape |= {"rotary_dim": 8} if size == "small" else {}
        config = transformers.GPTJConfig(**shape)  # 6B
    torch.manual_seed(0)
    dtype = torch.bfloat16 if task == "tldr" else torch.float32
    with torch.device(device):
        policy = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    policy.save_pretrained(folder / "policy")
    save_tokenizer(config.eos_token_id + 1, folder / "policy")
    if task == "imdb":
        classifier = transformers.DistilBertForSequenceClassification
        reward_config = transformers.DistilBertConfig()
        classifier(reward_config).save_pretrained(folder / "reward")
        save_tokenizer(reward_config.vocab_size, folder / "reward")
    # The real reward model is another GPT-J: left out
    (folder / "reward.py").write_text("def score(texts):\n    return [len(t) % 9 for t in texts]\n")

    rng = random.Random(0)

    def words(least, most):
        return " ".join(f"w{rng.randrange(30_000)}" for _ in range(rng.randint(least, most)))

    with open(folder / "texts.jsonl", "w") as file:
        for _ in range(256):
            row = {"text": words(224, 224), "prompt": words(100, 500), "label": words(24, 50)}
            print(json.dumps(row), file=file)
    return {"parameters": policy.num_parameters()}


def save_tokenizer(size, folder):
    tokenizers = import_module("tokenizers")
    transformers = import_module("transformers")
    number = {f"w{i}": i for i in range(size - 1)} | {"<|endoftext|>": size - 1}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(number, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        eos_token="<|endoftext|>",
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.save_pretrained(folder)


def run_language(module, task, size, *flags):
    """Trains on what `models` has made."""
    folder = f"{task}-{size}"
    reward = f"{folder}/reward" if task == "imdb" else f"{folder}/reward.py:score"
    sys.argv = ["sppo_rlhf", "--task", task, "--policy-model", f"{folder}/policy"]
    sys.argv += ["--reward-model", reward, "--dataset", f"{folder}/texts.jsonl"]
    sys.argv += ["--eval-freq", str(10**9), "--eval-episodes", "1"]
    sys.argv += ["--run-name", f"{os.getpid()}-{time.monotonic_ns()}", *flags]
    module.main()


def watch(module, ended):
    """Calls `ended("rollout")` and `ended("update")` after these phases of each update of a run.
    What is between updates counts as a rollout: nothing, as long as no evaluation is due."""
    perturb_reward = module.perturb_reward  # called once an update, after the rollout

    def watched(*args):
        ended("rollout")
        return perturb_reward(*args)

    class Writer(module.SummaryWriter):
        def add_scalar(self, tag, *others):
            super().add_scalar(tag, *others)
            if tag == "charts/SPS":  # the last that an update logs
                ended("update")

    module.perturb_reward = watched
    module.SummaryWriter = Writer


def language(task, size, *flags):
    """Seconds of an update by phase, the median of all but the first."""
    module = import_module("sppo_rlhf")
    phases = {"rollout": [], "update": []}
    generation = []  # of each call
    generations = []  # of each rollout
    last = time.perf_counter()

    def ended(phase):
        nonlocal last
        now = time.perf_counter()
        phases[phase].append(now - last)
        last = now
        if phase == "rollout":
            generations.append(sum(generation))
        generation.clear()

    watch(module, ended)
    generate = module.ActorCritic.generate

    def timed_generate(*args):
        synchronize()
        started = time.perf_counter()
        result = generate(*args)
        synchronize()
        generation.append(time.perf_counter() - started)
        return result

    module.ActorCritic.generate = timed_generate
    run_language(module, task, size, *flags)
    args = module.parse_args()
    rollout, learning = (median(phases[name][1:]) for name in ("rollout", "update"))
    generating = median(generations[1:])
    result = {
        "per_second": round(args.batch_size / (rollout + learning), 2),
        "generation": round(generating, 3),
        "scoring": round(rollout - generating, 3),
        "update": round(learning, 3),
        "updates": len(phases["update"]) - 1,
    }
    result["ram_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    if torch.cuda.is_available():
        result["gpu_mib"] = torch.cuda.max_memory_reserved() // 2**20
    return result


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def kernels(task, *flags):
    """Kernels that a token and a micro batch (forward and backward) launch: differences between
    runs with more of one of them. Widths are shrunk; numbers of layers, on which it depends, are
    not. `operators` are counted, which a CPU can do too, and on a GPU also the kernels."""
    module = import_module("sppo_rlhf")
    counts = {}
    profiler = None

    def ended(phase):
        nonlocal profiler
        if profiler:
            synchronize()
            profiler.stop()
            counts[phase] = count_kernels(profiler.events())
        profiler = torch.profiler.profile()
        profiler.start()

    def count(tokens, texts):
        nonlocal profiler
        profiler = None
        lengths = ["--prompt-length", "16", "--response-length", str(tokens)]
        sizes = ["--batch-size", "8", "--num-minibatches", "1", "--update-epochs", "1"]
        sizes += ["--micro-batch-size", str(texts), "--total-timesteps", "16"]
        run_language(module, task, "small", *lengths, *sizes, *flags)
        profiler.stop()
        return dict(counts)

    watch(module, ended)
    few = count(8, 4)
    more_tokens = count(24, 4)
    more_micro_batches = count(8, 2)
    result = {}
    for kind in few["rollout"]:
        result[f"{kind} per token"] = (more_tokens["rollout"][kind] - few["rollout"][kind]) / 16
        more = more_micro_batches["update"][kind] - few["update"][kind]
        result[f"{kind} per micro batch"] = more / 2  # four instead of two
    return result


def count_kernels(events):
    """Operators that do something themselves, and on a GPU what ran there."""

    def operators(event):
        inside = sum(map(operators, event.cpu_children))
        works = event.name.startswith("aten::") and event.name[6:] not in NO_KERNEL
        return inside or int(works)

    on_cpu = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    found = {"operators": sum(operators(e) for e in on_cpu if e.cpu_parent is None)}
    if torch.cuda.is_available():
        found["kernels"] = len(events) - len(on_cpu)
    return found


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
    STEPS = {f.__name__: f for f in (machine, toy, train, gradient, kill, jobs, emulators, acting)}
    STEPS |= {f.__name__: f for f in (minibatch, models, language, kernels)}
    if len(sys.argv) > 1 and sys.argv[1] in STEPS:
        sys.path.insert(0, str(ROOT))
        step_function = STEPS[sys.argv[1]]
        print(json.dumps(step_function(*sys.argv[2:])))
    else:
        main(tyro.cli(Args))
