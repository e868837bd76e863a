"""benchmark.sh: its lists of commands. benchmarks/run.py: where and whether runs start."""

import functools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import ale_py
import gymnasium as gym
import helpers
import pytest
from helpers import SETTINGS, import_file, sha256

import sppo_rlhf

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {f"{setting}.py": setting.script for setting in SETTINGS} | {"sppo_rlhf.py": sppo_rlhf}
ENVIRON = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
for variable in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
    ENVIRON.pop(variable, None)


def sh(*command, **options):
    options = {"cwd": ROOT, "env": ENVIRON, "capture_output": True, "text": True} | options
    return subprocess.run([str(word) for word in command], **options)


@functools.cache
def listed(arguments):
    """Commands of a list, as words after `python`, of a folder without runs."""
    suite, *options = shlex.split(arguments)
    result = sh("./benchmark.sh", suite, "--dry-run", "--runs-dir", "none", *options)
    return [shlex.split(line)[1:] for line in result.stdout.splitlines()]


def parse(words):
    """The arguments of a command's script."""
    return helpers.parse(SCRIPTS[words[0]], words[1:])


gym.register_envs(ale_py)
M = 1_000_000
SUITES = [("quick", 50, 3, {200_000}), ("continuous", 144, 30, {2 * M, 5 * M, 10 * M})]
SUITES += [("atari", 308, 5, {5 * M}), ("rlhf", 20, 5, {60 * 112, 200 * 64})]
SUITES += [("tiny", 6, 5, {50_000}), ("evidence", 30, 8, {M}), ("sweep", 72, 5, {200_000})]


@pytest.mark.parametrize("suite, per_seed, seeds, steps", SUITES)
def test_a_suite_has_its_size_and_its_commands_are_valid(suite, per_seed, seeds, steps):
    commands = listed(suite)
    numbers = [int(words[words.index("--seed") + 1]) for words in commands]
    assert numbers == sorted([*range(10000, 10000 + seeds)] * per_seed)
    assert sum("--noise" in words for words in commands) == len(commands) / 2
    # Of many, each environment and each method, but not each of both
    runs = []
    for words in commands[: per_seed : 5 if per_seed > 100 else 1]:
        at = words.index("--exp-name")
        method = words[at + 1].partition("-")[0]
        args = parse(words[:at] + words[at + 2 :])
        assert args.exp_name == method  # as the script itself calls what has these flags
        if suite != "rlhf":
            assert {args.env_id, f"ALE/{args.env_id}-v5"} & gym.registry.keys()
        runs.append(args)
    assert len({str(args) for args in runs}) == len(runs)
    assert {args.total_timesteps for args in runs} == steps


def test_tasks_have_the_papers_steps():
    steps = {"Walker2d-v4": 5 * M, "HumanoidStandup-v4": 10 * M}  # of PPO's
    for words in listed("continuous --seeds 1"):
        args = parse(words)
        ppo = "sppo" in words[0]
        assert args.total_timesteps == (steps.get(args.env_id, 2 * M) if ppo else 2 * M)


FACTORS = {"norm": ["max_grad_norm"], "coef": ["vf_coef", "ent_coef"], "ce": ["ce_coef"]}
FACTORS |= {"authors": ["norm_adv"], "k": ["alpha"]}
LISTS = ["quick InvertedDoublePendulum-v4 normal", "atari Pong flip", "evidence Breakout flip"]
LISTS += ["evidence imdb flip", "rlhf toy none", "rlhf tldr adv_flip"]


@pytest.mark.parametrize("name", LISTS)
def test_methods_between_ppo_and_sppo_differ_from_ppo_in_one_factor(name):
    """Which is 1 / k, k = alpha + beta |Z| of SPPO."""
    suite, task, noise = name.split()
    commands = [c for c in listed(f"{suite} --envs {task} --seeds 1") if "sppo" in c[0]]
    found = {args.exp_name: vars(args) for args in map(parse, commands) if args.noise == noise}
    sppo = found["sppo"]
    k = sppo["alpha"] - sppo["beta"] * sppo["z"]
    baseline = "dppo" if "dppo" in found else "ppo"
    assert {"sppo", f"{baseline}-coef"} <= found.keys()
    for method, args in found.items():
        changed = {key for key in args if args[key] != found[baseline][key]} - {"exp_name"}
        if method in ("sppo", baseline):
            assert changed <= {"alpha", "beta"}
        elif method.startswith(f"{baseline}-"):
            names = FACTORS[method.split("-")[1]]
            assert changed == {key for key in names if found[baseline].get(key)}
            for key in changed - {"norm_adv"}:
                factor = k if method == "dppo-k" else 1 / k
                assert args[key] == pytest.approx(found[baseline][key] * factor, rel=1e-5)


def test_options_and_flags_for_every_command():
    options = (
        "--envs Swimmer-v5 reach:Reach Pong --seeds 2 --steps 5000 --device cpu --runs-dir 'a b'"
    )
    runs = [parse(words) for words in listed(f"quick {options} -- --gae-lambda 0.9")]
    assert len(runs) == (8 + 8 + 7) * 2 * 2  # an environment of a module is control
    for args in runs:
        assert args.total_timesteps == 5000
        assert args.eval_freq == 500
        assert args.gae_lambda == 0.9
        assert args.runs_dir == "a b"
        assert getattr(args, "device", "cpu") == "cpu"  # control has only that
        swimmer = args.env_id == "Swimmer-v5" and "a2c" in args.exp_name
        assert args.gamma == (0.9999 if swimmer else 0.99)


def test_methods_may_be_chosen():
    chosen = listed("quick --seeds 1 --methods sppo dppo-k")
    methods = [words[words.index("--exp-name") + 1] for words in chosen]
    assert sorted(methods) == ["dppo-k"] * 2 + ["sppo"] * 6
    refused = sh("./benchmark.sh", "quick", "--dry-run", "--methods", "sppo", "spo")
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert "--methods spo: quick has no such method" in refused.stderr


def test_shellcheck_finds_nothing():
    found = sh("shellcheck", "benchmark.sh", ".ci/run")
    assert found.returncode == 0
    assert found.stdout == ""


STUB = """import json, os, shutil, sys, time
from pathlib import Path
began = time.time()
time.sleep(0.1)
with open(f"{began}-{os.getpid()}.json", "w") as file:
    variables = [os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")]
    json.dump([began, time.time(), sys.argv, *variables], file)
runs = sys.argv[sys.argv.index("--runs-dir") + 1] if "--runs-dir" in sys.argv else "runs"
run = Path(runs, f"{began}-{os.getpid()}")
run.mkdir(parents=True)
shutil.copy(sys.argv[0], run)
session = {"command": sys.argv, "directory": os.getcwd(), "files": {}}
(run / "sessions.jsonl").write_text(json.dumps(session))
(run / "summary.json").write_text("{}")
"""
TORCH = """import os
from itertools import takewhile
names = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1,2").split(",")
class cuda:
    device_count = lambda: len(list(takewhile(["0", "1", "2", "GPU-8f"].__contains__, names)))
"""


@pytest.fixture
def stubs(tmp_path, monkeypatch):
    """A folder of benchmark.sh, scripts that note where they run, and a torch with three GPUs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "benchmarks").mkdir()
    for name in ("benchmark.sh", "benchmarks/run.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    for script in SCRIPTS:
        (tmp_path / script).write_text(STUB)
    (tmp_path / "torch.py").write_text(TORCH)
    return tmp_path


def run(commands, *flags, more="", cores=2, **variables):
    """benchmarks/run.py, here, on a machine with `cores`. `more`: further lines of its input."""
    lines = "\n".join(shlex.join(["python", *words]) for words in commands) + f"\n{more}"
    env = ENVIRON | {"PYTHONPATH": f".:{ROOT}/benchmarks"} | variables
    program = f"import run; run.CORES = {cores}; run.main()"
    return sh(sys.executable, "-c", program, *flags, cwd=".", env=env, input=lines)


def records():
    return [json.loads(path.read_text()) for path in sorted(Path().glob("*.json"))]


def test_what_cannot_run_is_refused_before_any_run(stubs):
    refusals = {
        "quick -- --vf_coef=1": "--vf-coef: not for all commands: ",
        "quick --dry-run -- --z -2": "--z: not for all commands: ",
        "atari --dry-run -- --noise-level 0.2": "--noise-level: not for all commands: ",
        "evidence --envs imdb tldr --dry-run": "evidence: not with tldr\n",
        "rlhf --envs toy": "no runs/toy; this makes it: python toy.py\n",
    }
    for words, why in refusals.items():
        refused = sh("./benchmark.sh", *words.split(), cwd=".")
        assert refused.returncode == 2
        assert why in refused.stderr
    for line in "python none.py", "pyhton sppo_atari.py", "sppo_atari.py --env-id Pong":
        refused = run([["sppo_atari.py"]], more=line)
        assert refused.stderr.startswith("error: each line must be `python SCRIPT FLAGS`: ")
    for flag in "--jobs", "--jobs-per-gpu":
        refused = run([["sppo_atari.py"]], flag, 0)
        assert refused.stderr == "error: --jobs and --jobs-per-gpu must be at least 1\n"
    assert not records()


# CUDA_VISIBLE_DEVICES; the games or language models; cores; flags; the GPUs, and jobs on each
GPUS = [
    (None, "Pong", 16, "--jobs-per-gpu 2", ["0", "1", "2"], 2),
    ("1,-1,2", "Pong", 16, "", ["1"], 4),  # games share a GPU
    ("0,1", "Pong", 4, "", ["0", "1"], 2),
    ("2,GPU-8f", "Pong imdb", 16, "", ["2", "GPU-8f"], 1),  # language models do not
    ("-1", "Pong", 16, "", [], 0),
]


@pytest.mark.parametrize("visible, envs, cores, flags, gpus, per_gpu", GPUS)
def test_games_go_to_gpus_and_control_to_the_cpu(visible, envs, cores, flags, gpus, per_gpu, stubs):
    control = listed("evidence --envs Hopper-v4 --seeds 1")
    games = listed(f"evidence --envs {envs} --seeds 1 --device cuda")
    games = [shlex.split(shlex.join(words).replace("--device ", "--device=")) for words in games]
    variables = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    flags = ["--runs-dir", "none", "--jobs", 2, *flags.split()]
    assert run(control + games, *flags, cores=cores, **variables).returncode == 0
    found = records()
    assert sorted(argv for _, _, argv, *_ in found) == sorted(control + games)
    assert {gpu for _, _, argv, gpu, _ in found if argv in control} == {""}
    assert {gpu for _, _, argv, gpu, _ in found if argv in games} == set(gpus or [""])
    for place in ["", *gpus]:
        times = [(began, ended) for began, ended, _, gpu, _ in found if gpu == place]
        at_once = max(sum(b <= began < e for b, e in times) for began, _ in times)
        assert at_once <= (per_gpu if place else 2)
    jobs = 2 + min(len(games), len(gpus) * per_gpu)
    assert {threads for *_, threads in found} == {str(max(1, cores // jobs))}


def test_a_suite_runs_its_commands(stubs):
    """One after the other, if `--jobs` says so."""
    result = sh("./benchmark.sh", "tiny", "--seeds", 1, "--jobs", 1, cwd=".")
    assert result.returncode == 0, result.stderr
    began, ended, commands, *_ = zip(*records())
    assert sorted(commands) == sorted(listed("tiny --seeds 1 --runs-dir runs/tiny"))
    assert all(end < start for end, start in zip(ended, began[1:]))


def test_a_failed_run_is_named_and_the_others_go_on(stubs):
    """One run is ended by a library, with status 0. One prints the score of an earlier session."""
    Path("sppo_atari.py").write_text("raise ValueError('no')")
    Path("sa2c_continuous.py").write_text("import os\nos._exit(0)")
    Path("sppo_rlhf.py").write_text("print('runs/a: reward 1; to play it: python enjoy.py')")
    named = ["--env-id", "Pong", "--seed", "1", "--exp-name", "a" * 235]
    commands = [["sppo_atari.py", *named], ["sa2c_continuous.py"]]
    commands += [["sppo_rlhf.py"], ["sppo_continuous.py"]]
    result = run(commands, "--jobs", 1, PATH="/nowhere")  # which has no `python`
    assert result.returncode == 1
    assert result.stderr.endswith("2 of 4 failed\n")
    log = re.search(r"failed, see (runs/logs/Pong__1__\w+\.log)", result.stdout)[1]
    assert Path(log).read_text().endswith("ValueError: no\n")
    assert len(records()) == 1


def test_a_command_is_told_by_its_words_but_for_the_folder_of_runs():
    key_of = import_file(ROOT / "benchmarks/run.py").key_of
    assert key_of("a.py", "--x", "a  b") != key_of("a.py", "--x", "a b")
    words = ["--x", "1"]
    for more in (["--runs-dir", "p"], ["--runs_dir=q"]):
        assert key_of("a.py", *more, *words) == key_of("b/a.py", *words)


@pytest.mark.parametrize("name", ["sppo_continuous.py", "parts/helper.py", "../data.jsonl"])
def test_a_command_runs_again_if_a_file_of_its_run_has_changed(name, tmp_path, monkeypatch):
    """Or if it has only begun. The folder of runs may have moved, and files in the script's folder
    with it, others not. A dry run writes nothing."""
    (tmp_path / "here/parts").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    script = "sppo_continuous.py"
    digests = {}
    for file in map(Path, [script, "parts/helper.py", "../data.jsonl"]):
        file.write_text("as it was")
        digests[str(file.resolve())] = sha256(file)
    command = [script, "--runs-dir", "it's elsewhere"]
    session = {"command": command, "directory": os.getcwd(), "files": digests}
    Path("runs/any").mkdir(parents=True)
    Path("runs/any/sessions.jsonl").write_text(json.dumps(session))
    Path("runs/any/summary.json").write_text("{}")
    monkeypatch.chdir(shutil.copytree(".", "../clone"))

    def left():
        return run([[script]], "--dry-run").stdout

    assert left() == ""
    Path(name).write_text("edited")
    assert left() == "python sppo_continuous.py\n"
    Path(name).write_text("as it was")
    Path("runs/any/summary.json").unlink()
    assert left() == "python sppo_continuous.py\n"
    assert os.listdir("runs") == ["any"]


def wait_for(condition, seconds=600):
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds
        time.sleep(0.05)


SLOW_TO_CLOSE = """import os, pathlib, time
child = os.fork()
pathlib.Path(f"{os.getpid()}.started").touch()
try:
    time.sleep(600)
except KeyboardInterrupt:
    if not child:
        time.sleep(600)  # does not notice
    time.sleep(0.7)
"""
KILLS = [(os.kill, signal.SIGTERM), (os.killpg, signal.SIGINT)]


@pytest.mark.parametrize("kill, number", KILLS)
def test_a_signal_ends_all_runs_and_a_second_signal_interrupts_none(kill, number, stubs):
    """Of run.py alone, as by a scheduler, or its group. Children of runs end with them."""
    Path("sppo_continuous.py").write_text(SLOW_TO_CLOSE + STUB)
    lines = [f"python sppo_continuous.py --seed {seed}\n" for seed in range(4)]
    Path("list").write_text("".join(lines))
    command = "exec env --default-signal=INT python benchmarks/run.py --jobs 3 < list"
    options = {"env": ENVIRON, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    process = subprocess.Popen(["bash", "-c", command], **options)
    wait_for(lambda: len(list(Path().glob("*.started"))) == 6)
    for _ in range(3):
        kill(process.pid, number)
        time.sleep(0.2)
    _, errors = process.communicate()
    assert process.returncode == 1
    assert errors.endswith("interrupted; the same command continues\n")
    began, ended, *_ = zip(*records())
    assert len(began) == 3
    assert max(began) < min(ended)
    for path in Path().glob("*.started"):
        wait_for(lambda path=path: not Path("/proc", path.stem).exists(), seconds=10)


SBATCH = """#!/usr/bin/env bash
# Runs the jobs of an array one after the other
for word; do
    case $word in --array=1-*) last=${word#--array=1-} ;; *) wrap=$word ;; esac
done
echo "Submitted batch job of $last"
for ((i = 1; i <= last; i++)); do SLURM_ARRAY_TASK_ID=$i bash -c "$wrap" >>jobs.log; done
"""


def test_the_documented_lines_for_slurm_run_each_command_once(stubs, monkeypatch):
    """In arrays of at most so many jobs as `split` says."""
    Path("sbatch").write_text(SBATCH)
    Path("sbatch").chmod(0o755)
    monkeypatch.setitem(ENVIRON, "PATH", f"{stubs}:{ENVIRON['PATH']}")
    page = (ROOT / "docs/benchmark.md").read_text()
    lines = re.search(r"With Slurm.*?```sh\n(.*?)```", page, re.DOTALL)[1]
    lines = lines.replace("continuous", "tiny").replace("-l 1000", "-l 7")
    done = sh("bash", "-euo", "pipefail", "-c", lines, cwd=".")
    assert done.returncode == 0 and not done.stderr, done.stderr
    sizes = re.findall(r"Submitted batch job of (\d+)", done.stdout)
    assert sizes == ["7", "7", "7", "7", "2"]
    expected = listed("tiny --runs-dir runs/tiny")
    assert sorted(argv for _, _, argv, *_ in records()) == sorted(expected)


def test_an_own_method_joins_the_suites_with_the_pages_line(tmp_path):
    """With DPPO's flags, whatever the script is called."""
    page = (ROOT / "docs/benchmark.md").read_text()
    first, added = re.search(r"```diff\n (.*\n)\+(.*\n)", page).groups()
    text = (ROOT / "benchmark.sh").read_text()
    assert text.count(first) == 1
    added = added.replace("sppo_mine", "my")
    (tmp_path / "benchmark.sh").write_text(text.replace(first, first + added))
    for name in ("benchmarks", *SCRIPTS):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "sppo_continuous.py", tmp_path / "my.py")
    done = sh("bash", "benchmark.sh", "continuous", "--seeds", "2", "--dry-run", cwd=tmp_path)
    mine = re.findall("python my.py (.*)", done.stdout)
    of_dppo = re.findall("python sppo_continuous.py (.* dppo .*)", done.stdout)
    assert len(mine) == 9 * 2 * 2
    assert mine == [words.replace(" dppo ", " dppo-mine ") for words in of_dppo]


@pytest.mark.slow
def test_trl_can_be_measured(tmp_path):
    """benchmarks/trl_ppo.py, which uses functions of sppo_rlhf.py."""
    make = "import pathlib, speed; speed.save_models_and_texts(pathlib.Path())"
    env = ENVIRON | {"PYTHONPATH": ROOT / "benchmarks"}
    made = sh(sys.executable, "-c", make, cwd=tmp_path, env=env)
    assert made.returncode == 0, made.stderr
    flags = "--policy-model policy --reward-model reward --dataset texts.jsonl --total-timesteps 1"
    done = sh(sys.executable, ROOT / "benchmarks/trl_ppo.py", *flags.split(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "runs/trl/summary.json").read_text())["sps"] > 0
