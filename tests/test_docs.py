"""README.md and docs/: commands, links, worked examples, and the glossary of metrics."""

import ast
import dataclasses
import importlib
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from helpers import PPO, SETTINGS, SMALL, SPPO_CONTINUOUS, progress
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import report
import sppo_continuous
import sppo_rlhf

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted(ROOT.glob("docs/*.md"))
PAGES = [ROOT / "README.md", *DOCS]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
SCRIPTS = {path.name: importlib.import_module(path.stem) for path in sorted(ROOT.glob("s*_*.py"))}
EXAMPLES = (ROOT / "docs" / "copy-and-modify.md").read_text()


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_a_page_is_short(page):
    lines = page.read_text().splitlines()
    assert len(lines) < 300


# ---- Links


def anchors(page):
    """What GitHub calls a page's headings in links."""
    found = set()
    for heading in re.findall(r"(?m)^#+ (.+)$", page.read_text()):
        plain = re.sub(r"[^\w\s-]", "", heading.lower())
        found.add(plain.strip().replace(" ", "-"))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    page = ROOT / name
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), f"{name}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{name}: {link}"


@pytest.mark.parametrize("name", NAMES)
def test_the_functions_that_a_page_names_exist(name):
    for file, function in re.findall(r"`([\w/]+\.py):(\w+)`", (ROOT / name).read_text()):
        if not (ROOT / file).exists():
            continue  # an example's own file
        nodes = ast.parse((ROOT / file).read_text()).body
        assert function in {getattr(node, "name", None) for node in nodes}, f"{file}:{function}"


@pytest.mark.parametrize("name", NAMES)
def test_the_flags_that_a_page_names_exist(name):
    fields = {
        field.name for script in SCRIPTS.values() for field in dataclasses.fields(script.Args)
    }
    flags = {"--" + field.replace("_", "-") for field in fields}
    flags |= {flag.replace("--", "--no-", 1) for flag in flags}
    flags |= {"--" + field.name for field in dataclasses.fields(report.Args)} | {"--help"}
    flags |= set(re.findall(r"--[a-z][a-z-]+", (ROOT / "benchmark.sh").read_text().split("END")[1]))
    flags |= {"--nproc-per-node", "--num_processes"}  # of torchrun and accelerate
    text = re.sub(r"(?ms)^```.*?^```", "", (ROOT / name).read_text())
    named = set(re.findall(r"`[^`\n]*`", text))
    named = {flag for code in named for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", code)}
    assert named <= flags


# ---- Commands

NOT_OURS = {"pip", "pytest", "cp", "patch", "tensorboard", "mkdir", "git", "if", "fi", "pre-commit"}
NOT_OURS |= {"uv", "export", "diff"}


def code_blocks(text, *languages):
    return re.findall(rf"(?ms)^```(?:{'|'.join(languages)})\n(.+?)^```$", text)


def commands(text):
    """Commands, lists of words, in a page's shell blocks; in a console block after `$ `."""
    lines = []
    for block in code_blocks(text, "sh", "bash"):
        lines += block.replace("\\\n", " ").splitlines()
    for block in code_blocks(text, "console"):
        block = block.replace("\\\n", " ")
        lines += [line[2:] for line in block.splitlines() if line.startswith("$ ")]
    found = []
    for line in lines:
        line = re.sub(r"\$\w+", "1", line)  # variables of a loop, or of Slurm
        for part in line.split("&&"):
            words = shlex.split(part, comments=True)
            while words and (words[0] in ("exec", "env") or re.match(r"\w+=", words[0])):
                words = words[1:]
            if words:
                found.append(words)
    return found


def script_arguments(words):
    """(script, arguments) of a command that starts one of this repository, or (None, None)."""
    for i, word in enumerate(words):
        if word in SCRIPTS and words[0] in ("python", "uv", "accelerate", "torchrun"):
            return word, words[i + 1 :]
    return None, None


def parse(script, arguments):
    if script == "sppo_rlhf.py":
        return sppo_rlhf.parse_args(arguments)
    return tyro.cli(SCRIPTS[script].Args, args=arguments)


ALL_COMMANDS = {}  # by the text
for name in NAMES:
    for words in commands((ROOT / name).read_text()):
        ALL_COMMANDS[shlex.join(words)] = words
ELSEWHERE = {"--device", "--load-in-4bit", "--track"}  # where this machine lacks something


@pytest.mark.parametrize("words", ALL_COMMANDS.values(), ids=ALL_COMMANDS.keys())
def test_a_command_is_valid(words):
    script, arguments = script_arguments(words)
    if words[0] == "./benchmark.sh":
        dry = [words[0], words[1], "--dry-run", *words[2:]]
        done = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "python " in done.stdout
    elif script and "--help" not in arguments:
        args = parse(script, arguments)  # exits if a flag is wrong
        if not args.resume and not args.evaluate and not ELSEWHERE & set(arguments):
            SCRIPTS[script].check(SCRIPTS[script].with_defaults(args))
    elif words[:2] == ["python", "report.py"]:
        tyro.cli(report.Args, args=words[2:])
    elif words[0] == "python" and not script:
        file = words[1]
        assert (ROOT / file).exists() or f"python {file}" in EXAMPLES
    else:
        assert script or words[0] in NOT_OURS, "a command that this test does not know"


def test_what_is_checked_can_fail():
    assert commands("```sh\nexec python a.py \\\n  --x 1 # c\n```\n") == [
        ["python", "a.py", "--x", "1"]
    ]
    assert commands("```console\n$ OMP_NUM_THREADS=1 python a.py && pytest\noutput\n```\n") == [
        ["python", "a.py"],
        ["pytest"],
    ]
    for line in (
        "python sppo_continuous.py --no-such-flag",
        "./benchmark.sh no-such-suite",
        "python no_such_file.py",
        "no-such-command",
    ):
        with pytest.raises((AssertionError, SystemExit)):
            test_a_command_is_valid(line.split())


def trains_here(words):
    """Whether a command trains, with nothing that only its reader has."""
    script, arguments = script_arguments(words)
    if words[0] != "python" or script is None:
        return False
    absent = {"--resume", "--evaluate", "--capture-video", "--help", "--task", "--policy-model"}
    if ":" in " ".join(arguments):  # a file of an example, which has a test of its own
        return False
    return not (absent | ELSEWHERE) & set(arguments)


def train(script, args, folder, **flags):
    """A run with `flags` over `args`. Returns its folder."""
    flags |= {"runs_dir": str(folder), "run_name": "run", "device": "cpu"}
    args = script.prepare(dataclasses.replace(args, **flags))
    assert script.train(args, threading.Event())["finished"]
    return args.run_dir


RUNNABLE = {text: words for text, words in ALL_COMMANDS.items() if trains_here(words)}


@pytest.mark.slow
@pytest.mark.parametrize("words", RUNNABLE.values(), ids=RUNNABLE.keys())
def test_a_command_trains(words, tmp_path, toy):
    """With the steps of one rollout, and a short evaluation."""
    script, arguments = script_arguments(words)
    args = parse(script, arguments)
    if script == "sppo_rlhf.py":
        (tmp_path / "toy").symlink_to(toy)
        short = {"total_timesteps": 1, "eval_episodes": 8}
    elif "atari" in script:
        short = {"total_timesteps": 1, "num_envs": 2, "num_steps": 16, "eval_episodes": 1}
    else:
        short = {"total_timesteps": 1, "eval_episodes": 1, "eval_max_steps": 50, "compile": False}
    folder = train(SCRIPTS[script], args, tmp_path, **short)
    assert progress(folder)


def test_python_blocks_of_usage_run(tmp_path, monkeypatch):
    """In a folder with a finished run of the name that they use."""
    page = (ROOT / "docs" / "usage.md").read_text()
    blocks = [block for block in code_blocks(page, "python") if not block.startswith("# ")]
    assert blocks
    monkeypatch.chdir(tmp_path)
    folder = SPPO_CONTINUOUS.run("runs", run_name="hopper", env_id="Hopper-v4")[1]
    assert (folder / "agent.safetensors").exists()
    for block in blocks:
        exec(block, {})


def test_the_suites_are_as_large_as_the_page_says():
    page = sections((ROOT / "docs" / "benchmark.md").read_text())["Suites"]
    suites = re.findall(r"(?m)^\| `(\w+)` \|.*\| ([\d,]+) \|$", page)
    assert len(suites) == 9
    for suite, runs in suites:
        dry = ["./benchmark.sh", suite, "--dry-run"]
        output = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        commands = [line for line in output.splitlines() if line.startswith("python ")]
        assert len(commands) == int(runs.replace(",", "")), suite


# ---- Worked examples


def sections(text):
    """{heading: text of the section}."""
    parts = re.split(r"(?m)^## (.+)\n", text)
    return dict(zip(parts[1::2], parts[2::2]))


def example(heading):
    """(diff, python blocks by file name, commands) of a worked example."""
    text = sections(EXAMPLES)[heading]
    files = {}
    for block in code_blocks(text, "python"):
        files[re.match(r"# (\w+\.py)\n", block).group(1)] = block
    diffs = code_blocks(text, "diff")
    return diffs[0] if diffs else None, files, commands(text)


DIFFS = [heading for heading in sections(EXAMPLES) if example(heading)[0]]
BROKEN = (
    "The diff of this example in docs/copy-and-modify.md no longer fits the script. Make its change"
    " by hand in a copy of the script, and replace the block by the output of"
    " `diff -U1 sppo_continuous.py COPY`, with sppo_continuous.py as the name in its first lines."
)


def apply_diff(diff, folder):
    """Applies a diff to a copy of its script in `folder`. Returns the copy."""
    script = re.match(r"--- (\w+\.py)\n\+\+\+ \1\n", diff).group(1)
    copy = folder / script
    shutil.copy(ROOT / script, copy)
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
    command = ["git", "apply", "-p0", "--unidiff-zero", "-"]
    done = subprocess.run(
        command, cwd=folder, input=diff, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{BROKEN}\n{done.stderr}"
    assert copy.read_bytes() != (ROOT / script).read_bytes()
    return copy


def load(path, monkeypatch):
    """A script as a module."""
    specification = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, path.stem, module)  # dataclasses look it up
    specification.loader.exec_module(module)
    return module


def changed_script(heading, folder):
    """A copy of the script with the example's diff, named as in the example's first command."""
    diff, _, lines = example(heading)
    copy = apply_diff(diff, folder)
    name = next(words[1] for words in lines if words[1] not in SCRIPTS)
    return copy.rename(folder / name)


@pytest.fixture
def changed(tmp_path, monkeypatch):
    """The script of an example as a module, and its example's first command on it, parsed."""

    def changed_(heading):
        path = changed_script(heading, tmp_path)
        words = next(words for words in example(heading)[2] if words[1] == path.name)
        module = load(path, monkeypatch)
        return module, tyro.cli(module.Args, args=words[2:])

    return changed_


SHORT = SMALL | {"num_steps": 128, "eval_max_steps": 200} | PPO


@pytest.mark.parametrize("heading", DIFFS)
def test_an_example_changes_at_most_15_lines(heading, tmp_path):
    diff = example(heading)[0]
    changes = [line for line in diff.splitlines()[2:] if line[0] in "+-"]
    assert 1 <= len(changes) <= 15
    apply_diff(diff, tmp_path)


def test_a_diff_that_does_not_fit_is_reported(tmp_path):
    diff = example("Discrete actions")[0].replace("obs_dim =", "obs_dim  =")
    with pytest.raises(AssertionError, match="no longer fits"):
        apply_diff(diff, tmp_path)


def test_discrete_actions(changed, tmp_path):
    script, args = changed("Discrete actions")
    assert args.env_id == "CartPole-v1"
    folder = train(script, args, tmp_path, **SHORT)
    assert 5 < progress(folder)[-1]["return_mean"] <= 500
    env = script.make_env("Acrobot-v1")
    agent = script.Agent(env, script.with_defaults(args))
    action = agent.numpy_actor()(
        np.zeros((200, 6)), agent.sampling_noise((200,), torch.Generator())
    )
    assert set(agent.to_env(action)) == {0, 1, 2}
    assert all(env.action_space.contains(a) for a in agent.to_env(action))
    for env_id in ("Pendulum-v1", "Taxi-v3"):  # actions, or observations, of another kind
        with pytest.raises(script.UsageError, match="--env-id"):
            script.prepare(dataclasses.replace(args, env_id=env_id, runs_dir=str(tmp_path)))


@pytest.mark.slow
def test_discrete_actions_solve_cartpole(tmp_path):
    path = changed_script("Discrete actions", tmp_path)
    words = next(words for words in example("Discrete actions")[2] if words[1] == path.name)
    command = [sys.executable, *words[1:], "--run-name", "run"]
    subprocess.run(command, cwd=tmp_path, check=True)
    rows = progress(tmp_path / "runs" / "run")
    assert max(row["return_mean"] for row in rows if row["step"] <= 50_000) == 500


def write_files(heading, folder, monkeypatch):
    """Writes an example's own files into `folder`, which becomes the working directory."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    files = example(heading)[1]
    for name, text in files.items():
        (folder / name).write_text(text)
    return files


def test_your_own_environment(tmp_path, monkeypatch):
    write_files("Your own environment", tmp_path, monkeypatch)
    lines = example("Your own environment")[2]
    words = next(words for words in lines if words[1] == "sppo_continuous.py")
    args = tyro.cli(sppo_continuous.Args, args=words[2:])
    assert args.env_id.startswith("target:")
    folder = train(sppo_continuous, args, tmp_path, **SHORT)
    row = progress(folder)[-1]
    assert row["length_mean"] == 20
    assert -40 < row["return_mean"] < 0
    gym.registry.pop("Target-v0")
    sys.modules.pop("target")


def test_observations_in_a_dictionary(changed, tmp_path, monkeypatch):
    class Pair(gym.Env):
        observation_space = gym.spaces.Dict(
            {"a": gym.spaces.Box(-1, 1, (2,)), "b": gym.spaces.Box(-1, 1, (1,))}
        )
        action_space = gym.spaces.Box(-1, 1, (1,))

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return self.observation_space.sample(), {}

        def step(self, action):
            return self.observation_space.sample(), 1.0, False, False, {}

    gym.register("Pair-v0", Pair, max_episode_steps=10)
    script, args = changed("Your own environment")
    args = dataclasses.replace(args, env_id="Pair-v0")
    folder = train(script, args, tmp_path, **SHORT)
    assert progress(folder)[-1]["return_mean"] == 10
    assert script.make_env("LunarLanderContinuous-v3", "rgb_array").render_mode == "rgb_array"
    with pytest.raises(sppo_continuous.UsageError, match="Box"):
        train(sppo_continuous, sppo_continuous.Args(env_id="Pair-v0"), tmp_path / "unchanged")
    gym.registry.pop("Pair-v0")


def test_your_own_noise(changed, tmp_path):
    script, args = changed("Your own noise")
    noisy = script.perturb_reward(np.full((100, 100), 2.0), "lost", 0.3, np.random.default_rng(0))
    assert set(np.unique(noisy)) == {0, 2}
    assert (noisy == 0).mean() == pytest.approx(0.3, abs=0.02)
    with pytest.raises(SystemExit):
        tyro.cli(sppo_continuous.Args, args=["--noise", "lost"])
    folder = train(script, args, tmp_path, **SHORT)
    recorded = json.loads((folder / "args.json").read_text())["args"]
    assert recorded["noise"] == "lost"
    assert recorded["noise_level"] == 0.5


def test_your_own_loss_has_the_gradient_of_the_variant(changed, tmp_path):
    script, args = changed("Your own loss")
    torch.manual_seed(0)
    old_log_prob = torch.rand(1000, dtype=torch.float64).log()
    log_prob = (old_log_prob + 0.3 * torch.randn(1000)).requires_grad_()
    advantage = torch.randn(1000, dtype=torch.float64)

    def gradient(loss, *options):
        value = loss(log_prob, old_log_prob, advantage, 0.2, 0.5, 3.0, -2.0, *options)
        return torch.autograd.grad(value, log_prob)[0]

    ours = gradient(script.symmetric_policy_loss)
    variant = gradient(sppo_continuous.symmetric_policy_loss, False)
    torch.testing.assert_close(ours, variant)
    assert (ours - gradient(sppo_continuous.symmetric_policy_loss)).abs().max() > 1e-4
    train(script, args, tmp_path, **SHORT)


def test_a_function_as_reward(toy, tmp_path, monkeypatch):
    heading = "A Python function as the reward of a language model"
    write_files(heading, tmp_path, monkeypatch)
    words = next(words for words in example(heading)[2] if words[1] == "sppo_rlhf.py")
    args = sppo_rlhf.parse_args(words[2:])
    (tmp_path / "toy").symlink_to(toy)
    folder = train(sppo_rlhf, args, tmp_path, total_timesteps=112, eval_episodes=16)
    variety = runpy.run_path(tmp_path / "variety.py")["variety"]
    assert variety(["a b a b", ""]) == [0.5, 0]
    samples = [json.loads(line) for line in (folder / "samples.jsonl").open()]
    texts = [sample["prompt"] + sample["response"] for sample in samples]
    assert [sample["reward"] for sample in samples] == pytest.approx(variety(texts))


def test_a_new_metric(changed, tmp_path):
    script, args = changed("A new metric")
    flags = SHORT | {"total_timesteps": 128, "eval_episodes": 4}
    folder = train(script, args, tmp_path, **flags)
    scalars = tags(folder)
    assert scalars["losses/probability"] == pytest.approx(1 / 11, rel=0.1)
    (row,) = progress(folder)
    assert row["return_worst"] < row["return_mean"]


# ---- Metrics


def tags(folder):
    """{tag: last value} of the scalars in TensorBoard's files."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}


def glossary():
    """{metric: where it is logged} by the table in docs/usage.md."""
    text = sections((ROOT / "docs" / "usage.md").read_text())["Metrics"]
    rows = re.findall(r"(?m)^\| `([^`]+)` \| ([^|]+) \|", text)
    found = {}
    for metric, where in rows:
        assert metric not in found
        found[metric] = where.strip()
    assert set(found.values()) == {"all", "control", "PPO", "A2C", "LM", "LM, options"}
    return found


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_the_glossary_is_complete_for_control(setting, tmp_path):
    longer = (
        {"total_timesteps": 2048, "num_envs": 4} if setting.atari else {}
    )  # to the end of a game
    folder = setting.run(tmp_path, **longer)[1]
    here = {"all", "control", "PPO" if setting.ppo else "A2C"}
    expected = {metric for metric, where in glossary().items() if where in here}
    assert set(tags(folder)) == expected


def test_the_glossary_is_complete_for_language_models(toy, tmp_path):
    """Two runs: the toy with all that is optional, and summaries, by a model with LoRA."""
    small = {"total_timesteps": 8, "batch_size": 8, "num_minibatches": 2, "update_epochs": 1}
    small |= {"eval_episodes": 8}
    (tmp_path / "toy").symlink_to(toy)
    heldout = (str(toy / "reward"),)
    args = sppo_rlhf.Args(ce_coef=0.1, eval_reward_model=heldout)
    logged = set(tags(train(sppo_rlhf, args, tmp_path, **small)))

    posts = tmp_path / "posts.jsonl"
    row = {"prompt": "the plot was dull . TL;DR:", "label": "it was dull ."}
    posts.write_text((json.dumps(row) + "\n") * 40)
    tldr = dataclasses.replace(
        sppo_rlhf.TASKS["tldr"],
        policy_model=str(toy / "policy"),
        reward_model=(str(toy / "reward"),),
        dataset=str(posts),
        eval_dataset=str(posts),
        prompt_length=10,
        response_length=10,
    )
    logged |= set(tags(train(sppo_rlhf, tldr, tmp_path / "tldr", **small)))

    expected = set()
    for metric, where in glossary().items():
        if where in ("all", "PPO", "LM", "LM, options"):
            expected.add(metric.replace("NAME", "reward"))
    assert logged == expected
    columns = {metric.removeprefix("eval/") for metric in expected if metric.startswith("eval/")}
    rows = progress(tmp_path / "run") + progress(tmp_path / "tldr" / "run")
    assert set().union(*rows) == columns
