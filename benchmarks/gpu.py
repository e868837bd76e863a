"""Whether everything here runs on a GPU, computes the same there as on a CPU, and how fast.

    python benchmarks/gpu.py                         # checks, then speed
    python benchmarks/gpu.py --suite atari           # what limits games, and by how much
    python benchmarks/gpu.py --suite language        # language models of random weights
    python benchmarks/gpu.py --device cpu --quick --minutes 20    # any of them without a GPU

Tests rehearse the smallest steps only: rehearse a suite before a GPU runs it. Each step is a
process with a time limit: what it had printed by its end is its result, written to gpu-SUITE.json
at once. A command in that file repeats its step alone, in a folder where `gpu.py toy`, or the
models that it names, came first. What is measured are the scripts in the folder above this file's:
for another version of them, copy it there.
"""

import copy
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from itertools import pairwise, product
from pathlib import Path
from statistics import median
from typing import Literal

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as in the scripts: torch reads it when loaded

import numpy as np
import torch
import tyro
from accelerate.utils import send_to_device
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Timer
from torch.utils.collect_env import get_pretty_env_info

ROOT = Path(__file__).resolve().parent.parent
# Scripts, and ways to compute their gradient
SCRIPTS = {
    "sppo_continuous": ["float32", "compiled"],
    "sa2c_continuous": ["float32", "compiled"],
    "sppo_atari": ["float32", "bfloat16", "compiled"],
    "sa2c_atari": ["float32", "bfloat16", "compiled"],
    "sppo_rlhf": ["float32", "bfloat16"],
}
BURN_IN = 10  # updates that are not counted
# Script, games at a time, steps of each in a rollout, updates
SPEEDS = [
    ("sppo_atari", 8, 128, 30),
    ("sa2c_atari", 16, 5, 400),
    ("sppo_atari", 128, 128, 15),
    ("sppo_atari", 32, 128, 20),
]


@dataclass
class Args:
    suite: Literal["checks", "atari", "language"] = "checks"
    device: Literal["cuda", "cpu"] = "cuda"
    quick: bool = False  # everything once and small, nothing compiled
    minutes: float = 9.3  # for all steps together; what comes too late is skipped
    step_seconds: float = 200  # for each step


def make_steps(args):
    """[({name: command}, how many of them run side by side)], the most informative ones first."""
    suites = {"checks": check_steps, "atari": atari_steps, "language": language_steps}
    return [({"machine": step("machine")}, 1), *suites[args.suite](args)]


def step(*words):
    return [sys.executable, __file__, *map(str, words)]


def check_steps(args):
    checks = {}
    for script, modes in SCRIPTS.items():
        modes = [mode for mode in modes if mode != "compiled" or not args.quick]
        checks[f"{script}, first gradient"] = step("gradient", script, args.device, *modes)
    killed = {"sppo_atari": 2048, "sppo_rlhf": 336}
    for script, steps in killed.items():
        for other in {args.device, "cpu"}:
            name = f"{script}, killed, continued on {other}"
            checks[name] = step("kill", script, args.device, other, steps)
    speeds = {}
    # Games of Pong are long: resets are rare
    timed = SPEEDS[:2] if args.quick else SPEEDS
    for speed, game in product(timed, ["Breakout", "Pong"]):
        name = "{}, {}, {} games".format(game, *speed)
        speeds[name] = train_step(args, game, *speed)
    side_by_side = max(1, os.cpu_count() // 4)
    return [({"toy": step("toy")}, 1), (checks, side_by_side), (speeds, 1)]


def train_step(args, game, script, games, num_steps, updates):
    flags = []
    if args.quick:
        flags += ["--no-compile"]
        num_steps = min(num_steps, 16)
        updates = BURN_IN + 3
    flags += ["--device", args.device, "--env-id", game, "--num-envs", games]
    flags += ["--num-steps", num_steps, "--total-timesteps", games * num_steps * updates]
    return step("train", script, *flags)


def atari_steps(args):
    steps = {}
    command = train_step(args, "Breakout", *SPEEDS[0])
    for count in (1, 2) if args.quick else (1, 8, 4, 2):
        steps[f"{count} jobs of 8 games"] = step("jobs", count, *command)
    ways = ["as in the script", "one graph, eager", "one graph, compiled"]
    for part, way in product(["acting", "minibatch"], ways):
        steps[f"{part}, {way}"] = step(part, way, args.device)
    steps["emulators"] = step("emulators")
    return [(steps, 1)]


def language_steps(args):
    size = "small" if args.quick else "full"
    device = ["--device", args.device]
    steps = {}
    for task, texts in [("imdb", 112), ("tldr", 32)]:  # tldr: half the authors' batch
        flags = ["--batch-size", texts, "--total-timesteps", 4 * texts]
        if args.quick:
            flags = ["--batch-size", 8, "--total-timesteps", 4 * 8, "--update-epochs", 1]
            flags += ["--prompt-length", 16, "--response-length", 8]
        for made in {"small", size}:
            steps[f"{task}, {made} models"] = step("models", task, made, args.device)
        steps[task] = step("language", task, size, *device, *flags)
        steps[f"{task}, kernels"] = step("kernels", task, "small", *device)
    return [(steps, 1)]


def run_steps(groups, args):
    """Runs groups of steps, writes their results to gpu-SUITE.json."""
    deadline = time.monotonic() + 60 * args.minutes
    out = Path(f"gpu-{args.suite}.json")

    def run(command):
        seconds = min(args.step_seconds, deadline - time.monotonic())
        result = {"error": "skipped: no time left"}
        if seconds > 1:
            result = run_step(command, seconds, folder)
        return result | {"command": command}

    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for steps, workers in groups:
            with ThreadPoolExecutor(workers) as pool:
                for name, result in zip(steps, pool.map(run, steps.values())):
                    results[name] = result
                    out.with_suffix(".tmp").write_text(json.dumps(results, indent=2))
                    out.with_suffix(".tmp").replace(out)
                    print(name, result.get("error", "succeeded"))
    return results


def run_step(command, seconds, folder):
    """The JSON objects that the command prints, a line each, as one, with its seconds and error."""
    started = time.monotonic()
    limited = ["timeout", "--kill-after=5", str(seconds), *command]  # ends its children, too
    process = subprocess.run(limited, cwd=folder, capture_output=True, text=True)
    result = {"seconds": time.monotonic() - started}
    for line in process.stdout.splitlines():
        if line.startswith("{"):  # others are a script's own
            result |= json.loads(line)
    # Scripts continue without torch.compile
    if process.returncode or "torch.compile failed" in process.stderr:
        result["error"] = f"exit status {process.returncode} (124: too slow)"
        result["last_lines"] = process.stderr.splitlines()[-12:]
    return result


def report(result):
    print(json.dumps(result), flush=True)


def run_script(module, *flags):
    """A run with no evaluations but those at its start and end."""
    sys.argv = [module.__name__, "--runs-dir", f"runs/{os.getpid()}", *flags]
    sys.argv += ["--eval-freq", str(10**9), "--eval-episodes", "1"]
    module.main()


def watch(owner, name, measure):
    """Replaces a function by one that `measure` calls, and lists what else `measure` returns."""
    function = getattr(owner, name)
    found = []

    def watched(*args):
        result, measured = measure(function, *args)
        found.append(measured)
        return result

    setattr(owner, name, watched)
    return found


def timed(function, *args):
    started = time.perf_counter()
    result = function(*args)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - started


def memory():
    return {
        "ram_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "gpu_mib": torch.cuda.max_memory_reserved() // 2**20,
    }


def machine():
    """Software and hardware. `blobs` name the text of files that are not committed, too."""
    command = ["git", "hash-object", __file__, *(f"{script}.py" for script in SCRIPTS)]
    blobs = subprocess.check_output(command, cwd=ROOT, text=True).split()
    found = {"blobs": blobs, "siblings": siblings()}
    found["torch_threads"] = torch.get_num_threads()
    found["environment"] = get_pretty_env_info().splitlines()
    packages = ["gymnasium", "ale-py", "numpy", "transformers", "peft", "accelerate"]
    found["versions"] = {name: version(name) for name in packages}
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    found["commit"] = subprocess.check_output(command, cwd=ROOT, text=True).strip()
    report(found)


def siblings():
    """Logical cores of this process, each with all that share its physical one, such as "0,8"."""
    found = {}
    for core in os.sched_getaffinity(0):
        path = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
        found[core] = path.read_text().strip()
    return found


def toy():
    rlhf = import_module("sppo_rlhf")
    train = rlhf.train_toy_model  # briefly: no step needs good models
    rlhf.train_toy_model = lambda model, data, steps, *others: train(model, data, 20, *others)
    rlhf.make_toy(Path(rlhf.TOY))


def gradient(script, device, *modes):
    """Begins a run on the CPU in float32 and computes the gradient of its first minibatch on
    `device` too: reports the differences, relative to the gradient's norm, and exits."""
    module = import_module(script)
    control = script.endswith("continuous")
    name = "gradient_and_metrics" if control else "loss_and_metrics"
    function = getattr(module, name)

    def compare(model, *rest):
        args, *inputs = rest[1:] if control else rest  # without the parameters that it trains
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases begin at 0: for black pixels ReLU then has two slopes
                parameter.data += 0.01 * torch.randn_like(parameter)
        expected = flat_gradient(function, model, args, inputs)
        model = copy.deepcopy(model).to(device)
        inputs = send_to_device(inputs, device)
        for mode in modes:
            model.dtype = torch.bfloat16 if mode == "bfloat16" else torch.float32
            called = function
            if mode == "compiled":
                torch._dynamo.config.trace_autograd_ops = True
                called = torch.compile(function, fullgraph=True, mode="reduce-overhead")
            for _ in range(3):  # CUDA graphs are recorded after a warm-up
                actual = flat_gradient(called, model, args, inputs).cpu()
            difference = (actual - expected).norm() / expected.norm()
            report({mode: difference.item()})
            if mode != "bfloat16" and difference > 1e-3:
                sys.exit("gradients differ")
        sys.exit()

    setattr(module, name, compare)
    flags = ["--no-compile"] if control else ["--amp", "off", "--device", "cpu"]
    run_script(module, *flags)


def flat_gradient(function, model, args, inputs):
    trained = [p for p in model.parameters() if p.requires_grad]
    if function.__name__ == "gradient_and_metrics":
        gradients, _ = function(model, trained, args, *inputs)
    else:
        loss, _ = function(model, args, *inputs)
        model.zero_grad()
        loss.backward()
        gradients = [p.grad for p in trained if p.grad is not None]
    return torch.cat([gradient.flatten() for gradient in gradients])


def kill(script, device, other, steps):
    """Kills a run at its first checkpoint; the same command continues it, on the other device."""
    folder = Path("runs", str(os.getpid()))
    command = [sys.executable, ROOT / f"{script}.py", "--runs-dir", folder]
    command += ["--eval-freq", "1", "--eval-episodes", "1"]
    if script != "sppo_rlhf":  # where each evaluation is followed by a checkpoint
        command += ["--checkpoint-freq", "1"]
    command += ["--total-timesteps", steps, "--device"]
    process = subprocess.Popen([*command, device])
    while process.poll() is None and not list(folder.glob("*/checkpoint.pt")):
        time.sleep(0.01)
    process.kill()
    process.wait()
    subprocess.run([*command, other], check=True)
    (sessions,) = folder.glob("*/sessions.jsonl")  # one folder, though on other devices
    report({"continued": len(sessions.read_text().splitlines()) - 1})


def train(script, *flags):
    """Steps per second of games, and what part of the time resets took."""
    module = import_module(script)
    updates = watch(module, "perturb_reward", timed_update)  # called once an update
    steps = watch(module.AtariVectorEnv, "step", timed_step)
    run_script(module, *flags)
    report(after_burn_in(updates, steps) | memory())


def timed_update(function, reward, *others):
    return function(reward, *others), (time.perf_counter(), reward.size)


def timed_step(function, envs, action):
    result, seconds = timed(function, envs, action)
    _, _, terminated, truncated, _ = result
    reset = bool((terminated | truncated).any())
    return result, (time.perf_counter(), seconds, reset)


def after_burn_in(updates, steps):
    """Speed, the median over updates, (time, steps in it), and the share of resets: what emulators'
    steps, (time, seconds, whether a game was reset), with one took longer than the others."""
    kept = updates[BURN_IN:]
    first = kept[0][0]
    last = kept[-1][0]
    rates = [after[1] / (after[0] - before[0]) for before, after in pairwise(kept)]
    steps = [step for step in steps if first <= step[0] < last]
    usual = median(seconds for _, seconds, reset in steps if not reset)
    lost = sum(seconds - usual for _, seconds, reset in steps if reset)
    return {"per_second": median(rates), "reset_share": lost / (last - first)}


def jobs(count, *command):
    """Runs a command several times side by side, each with its share of the cores; their sum."""
    threads = max(1, len(os.sched_getaffinity(0)) // int(count))
    processes = []
    for seed in range(int(count)):
        seeded = ["env", f"OMP_NUM_THREADS={threads}", *command, "--seed", str(seed)]
        processes.append(subprocess.Popen(seeded, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in processes]
    results = [json.loads(output.splitlines()[-1]) for output in outputs]
    for name in ("per_second", "ram_mib", "gpu_mib"):
        report({name: sum(result[name] for result in results)})


def called_as(way, function, inputs):
    """`function` compiled to CUDA graphs or as one CUDA graph; on a CPU as it is."""
    if not inputs[0].is_cuda:
        return function
    if way == "as in the script":
        return torch.compile(function, mode="reduce-overhead", fullgraph=True, dynamic=False)
    if way == "one graph, compiled":
        function = torch.compile(function, fullgraph=True, dynamic=False)
    fixed = tuple(x.clone() for x in inputs)
    # Of a module it would replace `forward`, for good
    return torch.cuda.make_graphed_callables(lambda *args: function(*args), fixed)


def milliseconds(function, *args):
    for _ in range(3):  # CUDA graphs are recorded after a warm-up
        function(*args)
    timer = Timer("function(*args)", globals=locals())
    return 1000 * timer.blocked_autorange().median


def atari_agent(device, games):
    """An agent for four actions, and images as it sees them."""
    module = import_module("sppo_atari")
    images = torch.randint(256, (games, 84, 84, 4), dtype=torch.uint8, device=device)
    images = images.permute(0, 3, 1, 2)  # channels last in memory
    agent = module.Agent(4, bfloat16=device == "cuda")
    return agent.to(device), images


@torch.no_grad()
def acting(way, device):
    """Milliseconds from images on the device to actions on the CPU, for numbers of games."""
    agent, all_images = atari_agent(device, 64)

    def act(agent_fn, images):
        logits, _ = agent_fn(images)
        logits.argmax(-1).cpu()

    for games in (8, 16, 64, 4):
        images = all_images[:games]
        agent_fn = called_as(way, agent, [images])
        report({f"{games} games": milliseconds(act, agent_fn, images)})


def minibatch(way, device):
    """Milliseconds of the gradient of a minibatch of PPO with 8 games. The script's graphs are of
    the loss, and of its derivative."""
    module = import_module("sppo_atari")
    args = module.Args()
    agent, images = atari_agent(device, 256)
    clip_coef = torch.tensor(args.clip_coef, device=device)
    action = torch.randint(4, (256,), device=device)
    others = torch.rand(4, 256, device=device)
    inputs = [clip_coef, images, action, *others]

    def gradient_and_metrics(*inputs):
        loss, metrics = loss_fn(agent, args, *inputs)
        return torch.autograd.grad(loss, list(agent.parameters())), metrics

    torch._dynamo.config.trace_autograd_ops = True
    loss_fn, gradient_fn = module.loss_and_metrics, gradient_and_metrics
    if way == "as in the script":
        loss_fn = called_as(way, loss_fn, inputs)
    else:
        gradient_fn = called_as(way, gradient_fn, inputs)
    report({"ms": milliseconds(gradient_fn, *inputs)})


def emulators():
    """Milliseconds of a step of games, by whether threads have a core each and by time between."""
    vector_env = import_module("ale_py.vector_env").AtariVectorEnv
    shared = siblings()
    # One of each physical core first
    cores = sorted(shared, key=lambda core: not re.match(rf"{core}\b", shared[core]))
    for games, pinned in product((8, 32, 128), (False, True)):
        before = set(os.listdir("/proc/self/task"))
        threads = min(games, len(cores))
        envs = vector_env("breakout", games, num_threads=threads, autoreset_mode="SameStep")
        envs.reset(seed=np.arange(games))
        workers = sorted(set(os.listdir("/proc/self/task")) - before)
        if pinned:
            for worker, core in zip(workers, cores):
                os.sched_setaffinity(int(worker), {core})
        for gap in (0, 0.0002, 0.0006):
            seconds = []
            for _ in range(4000 // games):
                acted = time.perf_counter() + gap
                while time.perf_counter() < acted:
                    pass  # who launches kernels and polls for their end does not sleep
                action = np.random.randint(4, size=games)
                _, taken = timed(envs.step, action)
                seconds.append(taken)
            name = f"{games} games, pinned: {pinned}, gap of {gap} s"
            report({name: 1000 * median(seconds)})


def models(task, size, device):
    """What a task needs, in a folder TASK-SIZE: models of the real shape (small: only as deep) with
    random weights, and texts of random words. A word is a token. The reward model is small."""
    random.seed(1)  # the same texts for each version of the scripts
    transformers = import_module("transformers")
    folder = Path(f"{task}-{size}")
    shape = {}
    if size == "small":
        shape = {"n_embd": 64, "n_head": 4, "rotary_dim": 8}
    config = transformers.GPT2Config(**shape)  # 124M
    dtype = torch.float32
    if task == "tldr":
        config = transformers.GPTJConfig(**shape)  # 6B
        dtype = torch.bfloat16
    with torch.device(device):
        policy = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    reward_config = transformers.DistilBertConfig(vocab_size=config.vocab_size)
    reward = transformers.DistilBertForSequenceClassification(reward_config)
    policy.save_pretrained(folder / "policy")
    reward.save_pretrained(folder / "reward")
    tokenizers = import_module("tokenizers")
    words = [f"w{i}" for i in range(config.eos_token_id)]
    numbers = {word: i for i, word in enumerate([*words, "<|endoftext|>"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "reward")

    def text(least, most):
        count = random.randint(least, most)
        return " ".join(random.choices(words, k=count))

    with open(folder / "texts.jsonl", "w") as file:
        for _ in range(256):
            row = {
                "text": text(224, 224),
                "prompt": text(100, 500),
                "label": text(24, 50),
            }
            print(json.dumps(row), file=file)


def run_language(module, task, size, *flags):
    """Trains on what `models` has made."""
    folder = f"{task}-{size}"
    files = ["--policy-model", f"{folder}/policy", "--reward-model", f"{folder}/reward"]
    files += ["--dataset", f"{folder}/texts.jsonl"]
    run_script(module, "--task", task, *files, *flags)


def language(task, size, *flags):
    """Seconds of an update by phase, the median of all but the first."""
    module = import_module("sppo_rlhf")
    generation = watch(module.ActorCritic, "generate", timed)  # called once in a rollout
    rollout = watch(module, "collect_rollout", timed)
    update = watch(module, "update", timed)
    run_language(module, task, size, *flags)
    # The first rollout and the last are evaluations
    generating = median(generation[2:-1])
    seconds = {
        "generation": generating,
        "scoring": median(rollout[2:-1]) - generating,
        "update": median(update[1:]),
    }
    texts = module.parse_args().batch_size
    speed = {"per_second": texts / sum(seconds.values())}
    report(seconds | speed | memory())


def kernels(task, size, *flags):
    """Kernels that a token and a micro batch launch, or for a CPU operators, which are similar."""
    module = import_module("sppo_rlhf")
    generation = watch(module.ActorCritic, "generate", count_kernels)
    micro_batch = watch(module, "accumulate_gradient", count_kernels)
    lengths = ["--prompt-length", "16", "--response-length", "16"]
    sizes = ["--total-timesteps", "4", "--batch-size", "4", "--num-minibatches", "1"]
    run_language(module, task, size, *lengths, *sizes, *flags)
    for kind, count in generation[0].items():
        report({f"{kind} per token": count / 16})
    for kind, count in micro_batch[0].items():
        report({f"{kind} per micro batch": count})


class OperatorCounter(TorchDispatchMode):
    """Counts operators that compute something, so neither views nor allocations."""

    count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        idle = re.search("empty|view|detach|lift_fresh", operator.name())
        self.count += not (operator.is_view or idle)
        return operator(*args, **(kwargs or {}))


def count_kernels(function, *args):
    """What the function returns, and its operators and, on a GPU, kernels."""
    with torch.profiler.profile() as profiler, OperatorCounter() as counter:
        result = function(*args)
    counts = {"operators": counter.count}
    if torch.cuda.is_available():
        on_gpu = torch.autograd.DeviceType.CUDA
        counts["kernels"] = sum(e.device_type == on_gpu for e in profiler.events())
    return result, counts


def main(args: Args):
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: PyTorch finds no GPU here; --device cpu rehearses without one")
    results = run_steps(make_steps(args), args)
    if any("error" in result for result in results.values()):
        sys.exit(f"error: not all steps succeeded; gpu-{args.suite}.json has their last lines")


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1] in globals():
        sys.path.insert(0, str(ROOT))
        globals()[sys.argv[1]](*sys.argv[2:])
    else:
        main(tyro.cli(Args))
