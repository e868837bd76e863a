"""README.md, CONTRIBUTING.md, docs/: links, flags, commands, worked examples, list of metrics."""

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
import helpers
import nbformat
import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
import transformers
from gymnasium.envs.mujoco.hopper_v4 import HopperEnv
from helpers import CONTINUOUS, SETTINGS, checkpoint, progress, read_lines, record, sha256, work_in
from numpy.testing import assert_array_equal
from pytest import approx
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_control import MadeUp, make_agent
from test_copies import edited
from torch.testing import assert_close

import enjoy
import report
import sppo_continuous
import sppo_rlhf

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "docs"))
import grade  # noqa: E402

PAGES = {
    str(page.relative_to(ROOT)): page.read_text()
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
}
EXAMPLES = PAGES["docs/copy-and-modify.md"]
ENVIRON = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
SCRIPTS = {path.name: importlib.import_module(path.stem) for path in sorted(ROOT.glob("s*_*.py"))}


# ---- Links and names


def anchors(text):
    """What GitHub calls a page's headings in links."""
    headings = re.findall(r"(?m)^#+ (.+)$", text)
    plain = [re.sub(r"[^\w\s-]", "", heading.lower()) for heading in headings]
    return {heading.strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", [*PAGES, *(str(p) for p in ROOT.glob("results/**/*.md"))])
def test_links_lead_to_files_and_headings(page):
    page = ROOT / page
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        file, _, anchor = link.partition("#")
        if file.startswith("http"):
            continue
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def is_defined(function, file):
    return re.search(rf"(?m)^(def|class) {function}\b", (ROOT / file).read_text())


@pytest.mark.parametrize("text", PAGES.values(), ids=PAGES)
def test_the_functions_and_flags_that_a_page_names_exist(text):
    for file, function in re.findall(r"`([\w/]+\.py):(\w+)`", text):
        if (ROOT / file).exists():  # else an example's own file
            assert is_defined(function, file)
    # Implementation details name functions of scripts in parentheses
    for name in set(re.findall(r"\(`([A-Za-z]\w+)`\)", text)) - set(sppo_rlhf.TASKS):
        assert any(is_defined(name, script) for script in SCRIPTS), name
    flags = {"--help", "--group-size"}  # the latter is an example's
    for script in (*SCRIPTS.values(), report):
        flags |= {"--" + field.name.replace("_", "-") for field in dataclasses.fields(script.Args)}
    flags |= {flag.replace("--", "--no-", 1) for flag in flags}
    for other in ("benchmark.sh", "report.py", "benchmarks/speed.py", "enjoy.py"):
        flags |= set(re.findall(r"--[a-z][a-z-]+", (ROOT / other).read_text()))
    flags |= {"--gpus", "--requeue", "--time", "--episodes", "--video"}  # Slurm's, enjoy.py's
    code = re.findall(r"`[^`\n]*`", re.sub(r"(?ms)^```.*?^```", "", text))
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", " ".join(code))) <= flags


# ---- Commands

NOT_OURS = "pip pytest cp cmp patch tensorboard git pre-commit uv diff srun sbatch".split()
NOT_OURS += "pdflatex mkdir mv cd source if fi export for done echo mktemp find { }".split()


def code_blocks(text, language):
    return re.findall(rf"(?ms)^```{language}\n(.+?)^```$", text)


def commands(text):
    """Commands, lists of words, in a page's shell blocks."""
    block = "".join(code_blocks(text, "sh")).replace("\\\n", " ")
    block = re.sub(r"\$\w+", "1", block)  # variables of Slurm
    block = re.sub(r"\w+=\$\((.*)\)", r"\1", block)
    found = [
        shlex.split(line, comments=True)
        for line in re.split(r"\n|&&|(?m:^)(?:exec|\w+=\S*) ", block)
    ]
    return [words for words in found if words]


PROGRAMS = SCRIPTS | {"report.py": report, "enjoy.py": enjoy}


def parse(words):
    """(script, Args) of a command that starts one of ours. Exits if a flag is wrong."""
    name = next(word for word in words if word in PROGRAMS)
    return PROGRAMS[name], helpers.parse(PROGRAMS[name], words[words.index(name) + 1 :])


DOCSTRINGS = [
    re.sub(r"(?m)^    (.*\.py.*)$", r"```sh\n\1\n```", x.__doc__) for x in SCRIPTS.values()
]
COMMANDS = [words for text in [*PAGES.values(), *DOCSTRINGS] for words in commands(text)]
COMMANDS = {shlex.join(words): words for words in COMMANDS if "--help" not in words}


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_a_command_is_valid(words):
    if words[0] == "./benchmark.sh":
        end = next((i for i, word in enumerate(words) if word[0] in "|>"), None)
        dry = [*words[:2], *"--dry-run --runs-dir none --seeds 1".split(), *words[2:end]]
        done = subprocess.run(dry, cwd=ROOT, env=ENVIRON, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "python " in done.stdout
    elif words[0] in ("python", "accelerate", "torchrun"):
        if set(words) & set(PROGRAMS):
            parse(words)
        elif words[1] != "-m":  # another program, or an example's script
            assert (ROOT / words[1]).exists() or f"python {words[1]}" in EXAMPLES
    else:
        assert "=" in words[0] or words[0] in NOT_OURS, "a command that this test does not know"


def train(script, args, **flags):
    """A run with `flags` over `args`. Returns its folder."""
    args = dataclasses.replace(args, runs_dir="own", **flags)
    if hasattr(script, "prepare"):
        script.prepare(args)
    return helpers.train(script, args)


@pytest.fixture
def play(monkeypatch, capsys):
    """enjoy.py plays a run, and prints a return or a reward."""

    def play(folder):
        helpers.call_main(monkeypatch, enjoy, folder, "--episodes", 2)
        assert f"\n{folder}: re" in capsys.readouterr().out

    return play


@pytest.mark.slow
def test_the_check_of_the_same_run_holds_for_compiled_runs(tmp_path):
    """README's, with all defaults."""
    (check,) = code_blocks(sections(PAGES["README.md"])["The same run"], "sh")
    check = check.replace("sppo_continuous.py", str(ROOT / "sppo_continuous.py"))
    printed = subprocess.check_output(["bash", "-ec", check], cwd=tmp_path, env=ENVIRON)
    assert printed.endswith(b"\nequal\n") and b"failed" not in printed


# ---- The exercise


def small_exercise(*answers):
    """A notebook with answers, each a list of cells, that hold if the last defines f() as 1."""
    cells = [nbformat.v4.new_code_cell("results = {}", metadata={"tags": ["setup"]})]
    for claim, answer in zip(("0, a: claim", "1, b: claim"), answers):
        cells += [nbformat.v4.new_code_cell(source) for source in answer]
        cells[-1].metadata.tags = ["student"]
        check = f"results['{claim}'] = 'holds' if f() == 1 else 'fails: why'"
        cells.append(nbformat.v4.new_code_cell(check, metadata={"tags": ["grader"]}))
    return nbformat.v4.new_notebook(cells=cells)


GRADES = """\
name,points,holds,remark,"0, a: claim","1, b: claim"
ada/a.ipynb,3.0,1,f: has added cells,holds,fails: why
bob.ipynb,0.0,0,f: has a syntax error,fails: why,fails: why
eve/x/b.IPYNB,3.0,1,f: takes too long,holds,not reached
gil.ipynb,,,not graded: ValueError('1 answers instead of 2'),,
zoe,,,not graded: ValueError('no notebook (*.ipynb)'),,
"""
FEEDBACK = """\
0 of 3.5 points
task 0: 0 of 3
task 1: 0 of 0.5
0, a: claim: fails: why (handout: Labels)
1, b: claim: fails: why (handout: Flips)"""


def test_a_class_gets_points_and_feedback_for_answers_and_added_cells(tmp_path, monkeypatch):
    """Changed checks do not count. Nor does one mistake, or a loop without end, cost all."""
    monkeypatch.chdir(tmp_path)
    right = ["def f(): return 1"]
    wrong = ["def f(): return 2"]
    monkeypatch.setattr(grade, "EXERCISE", Path("exercise.ipynb"))
    nbformat.write(small_exercise(wrong, wrong), grade.EXERCISE)
    changed = small_exercise(["one = 1", "def f(): return one"], wrong)
    changed.cells[-1].source = "results['1, b: claim'] = 'holds'"
    for name, notebook in {
        "ada/a.ipynb": changed,
        "ada/.ipynb_checkpoints/a.ipynb": changed,
        "bob.ipynb": small_exercise(wrong, ["a mistake"]),
        "eve/x/b.IPYNB": small_exercise(right, ["def f():\n    while True: pass"]),
        "gil.ipynb": small_exercise(right),
    }.items():
        path = Path("class", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, path)
    Path("class/zoe").mkdir()
    points = Path("points.csv")
    points.write_text("task,points,handout\n0,3,Labels\n1,0.5,Flips\n")
    args = grade.Args(Path("class"), Path("out"), points, timeout=5, jobs=2)
    grade.main(args)
    assert Path("out/grades.csv").read_text() == GRADES
    assert Path("out/bob.ipynb.txt").read_text() == FEEDBACK
    page = Path("out/answers.md").read_text()
    assert page.count("## `def f`\n") == 2
    assert page.count("### ") == 2 * 3
    assert "### ada/a.ipynb\n\nhas added cells\n\n```python\none = 1\n\ndef f()" in page

    points.write_text("task,points\n0,3\n")
    with pytest.raises(SystemExit, match="must have the tasks 0, 1"):
        grade.main(args)


@pytest.mark.parametrize(("source", "remark"), [
    ("from m import symmetric_policy_losses as f", "uses symmetric_policy_losses"),
    ("def claim(text): pass\ndef f(): return 2", "overwrites claim"),
    ("def f(): claim = 1", ""),
])  # fmt: skip
def test_what_to_look_at_in_an_answer(source, remark):
    template = nbformat.v4.new_code_cell("def f(): raise NotImplementedError")
    cells = [nbformat.v4.new_code_cell(source)]
    assert "; ".join(grade.marks(cells, template, {"claim", "f"})) == remark


def test_the_table_of_points_has_the_exercises_tasks():
    points = pd.read_csv(ROOT / "docs/points.csv", dtype={"task": str})
    text = (ROOT / "docs/symmetric_loss_exercise.ipynb").read_text()
    assert list(points["task"]) == list(dict.fromkeys(re.findall(r'claim\(f?\\"(\w+),', text)))
    assert set(points["handout"]) <= set(sections(PAGES["docs/handout.md"]))


def test_students_get_scripts_without_answers_that_train_as_before(tmp_path, monkeypatch):
    subprocess.run([sys.executable, ROOT / "docs/pack.py"], cwd=tmp_path, check=True)
    shutil.unpack_archive(tmp_path / "symmetric-loss.zip", tmp_path)
    folder = tmp_path / "symmetric-loss"
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    scripts = {"sa2c_continuous.py", "sppo_continuous.py"}
    pages = {"docs/handout.md", "docs/symmetric_loss_exercise.ipynb", "docs/loss.html"}
    assert files == scripts | pages | {"LICENSE", "pyproject.toml", "requirements.lock"}
    handout = (folder / "docs/handout.md").read_text()
    links = set(re.findall(r"\]\(([^h:)]\S*)\)", handout))
    assert links == {"symmetric_loss_exercise.ipynb", "loss.html"}
    packed = helpers.import_file(folder / "sppo_continuous.py")
    _, run = SETTINGS[0].run(tmp_path / "readable", total_timesteps=64)
    setting = dataclasses.replace(SETTINGS[0], script=packed)
    _, packed_run = setting.run(tmp_path / "packed", total_timesteps=64)
    weights = "agent.safetensors"
    assert sha256(run / weights) == sha256(packed_run / weights)
    for name in scripts:
        text = (folder / name).read_text()
        answers = r"def symmetric_policy|surrogate|log_prob\.exp|constant|rescaled|PPO's times"
        assert not re.search(answers, text)


# ---- Worked examples

SHORT = helpers.SMALL | helpers.MINIBATCHES | {"num_steps": 128}
SHORT_LM = {"total_timesteps": 8, "batch_size": 8, "num_minibatches": 2, "update_epochs": 1}
SHORT_LM |= {"eval_episodes": 8, "device": "cpu"}


def sections(text):
    """{heading: text of the section}."""
    parts = re.split(r"(?m)^## (.+)\n", text)
    return dict(zip(parts[1::2], parts[2::2]))


SECTIONS = sections(EXAMPLES)
DIFFS = {}
for heading, text in SECTIONS.items():
    if found := code_blocks(text, "diff"):
        (DIFFS[heading],) = found
# {anchor of a section: scripts that its diff is for}, of the page's table
ROWS = re.findall(r"(?m)^\| \[.+?\]\(#(.+?)\).*? \| (`.+?`) \|", EXAMPLES)
FITS = {anchor: re.findall(r"\w+", names) for anchor, names in ROWS}
# Hunks begin and end with three lines of context. No diff ends with an empty line, which copying
# may lose
HUNK = r"@@.+\n(?: .*\n){3}(?:[-+ ].*\n)+?(?: .*\n){3}"
DIFF = re.compile(rf"--- (\w+)\.py\n\+\+\+ \1\.py\n(?:{HUNK})+(?<!\n \n)")
COPYING, PATCHING = code_blocks(EXAMPLES.partition("## ")[0], "sh")[0].splitlines()


def patched(text, diff, folder):
    """A script's text after the page's command, and the command's exit status."""
    copy = folder / COPYING.split()[-1]
    copy.write_text(text)
    (folder / "change.diff").write_text(diff)
    done = subprocess.run(["bash", "-c", PATCHING], cwd=folder, capture_output=True)
    return copy.read_text(), done.returncode


@pytest.mark.parametrize("heading", DIFFS)
def test_a_diff_goes_into_the_scripts_that_the_table_names_and_into_no_other(heading, tmp_path):
    """Also into longer ones."""
    first = DIFF.fullmatch(DIFFS[heading])[1]
    (anchor,) = anchors(f"# {heading}")
    assert first in FITS[anchor]
    more = re.compile(r"(?m)^(?=SOURCE = |class )")
    for script in SCRIPTS:
        text = (ROOT / script).read_text()
        result, code = patched(text, DIFFS[heading], tmp_path)
        if script.removesuffix(".py") not in FITS[anchor]:
            assert result == text
            assert code == 1
            continue
        assert code == 0
        longer = more.sub("# One more line\n" * 9, text)
        expected = more.sub("# One more line\n" * 9, result)
        assert patched(longer, DIFFS[heading], tmp_path) == (expected, 0)


def fitting(heading):
    """A test of a section's diff, in each script that it is for."""
    (anchor,) = anchors(f"# {heading}")
    cases = [(heading, script) for script in FITS[anchor]]
    return pytest.mark.parametrize("example", cases, ids=FITS[anchor], indirect=True)


@pytest.fixture
def example(request, tmp_path, monkeypatch):
    """A section's example: a module, and the arguments of its command in a short run."""
    work_in(monkeypatch, tmp_path)
    heading, script = request.param
    words = commands(SECTIONS[heading])[0]
    text, code = patched((ROOT / f"{script}.py").read_text(), DIFFS[heading], tmp_path)
    assert code == 0
    path = tmp_path / words[1].replace("sppo", script.partition("_")[0])
    path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module(path.stem)
    args = helpers.parse(module, words[2:])
    if script == "sppo_rlhf":
        return module, args
    known = {name: value for name, value in SHORT.items() if hasattr(args, name)}
    return module, dataclasses.replace(args, **known)


def setting_of(copy):
    """Of the script that was copied."""
    ppo, a2c = CONTINUOUS
    return a2c if copy.__name__.startswith("sa2c") else ppo


@fitting("Discrete actions")
def test_discrete_actions(example, monkeypatch, play):
    script, args = example
    folder = train(script, args)
    assert 5 < progress(folder)[-1]["return_mean"] <= 500
    play(folder)
    acrobot = gym.make("Acrobot-v1").unwrapped
    acrobot.action_space = gym.spaces.Discrete(3, start=-1)
    monkeypatch.setattr(gym, "make", lambda *_: acrobot)
    for flags in ({}, {"bins": 3, "policy": "gaussian", "beta": 0}):
        with pytest.raises(SystemExit, match="needs --bins 3, and no --policy gaussian"):
            script.make_env(dataclasses.replace(args, **flags))
    args.bins = 3
    env = script.make_env(args)
    assert env.action_space.low == 0
    assert env.action_space.high == 2
    assert [env.get_wrapper_attr("action")([index]) for index in range(3)] == [-1, 0, 1]


def test_your_own_environment_and_its_agent_in_other_code(tmp_path, monkeypatch, play):
    work_in(monkeypatch, tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("docking.py").write_text(*code_blocks(PAGES["docs/tiny.md"], "python"))
    script, args = parse(commands(SECTIONS["Your own environment"])[0])
    folder = train(script, args, **SHORT)
    play(folder)
    assert progress(folder)[-1]["length_mean"] == 50
    assert -300 < progress(folder)[-1]["return_mean"] < 0
    assert 'py-modules = ["enjoy"]' in (ROOT / "pyproject.toml").read_text()
    (block,) = code_blocks(PAGES["docs/usage.md"], "python")
    names = {}
    exec(block.replace("runs/NAME", str(folder)), names)
    env = gym.make(args.env_id)
    obs = env.reset(seed=0)[0].tolist()  # float64, where the environment's is float32
    assert env.action_space.contains(names["act"](obs).astype(np.float32))


@fitting("Your own reward")
def test_your_own_reward(example, play):
    """The learner's reward is shaped, reported returns are not."""
    script, args = example
    shaped = script.NormalizedEnvs(args)
    plain = sppo_continuous.NormalizedEnvs(args)
    action = np.array([[0.5, -1.0, 0.25]] * args.num_envs)
    for envs in (shaped, plain):
        envs.reset(0)
        envs.step(action)
    cost = plain.discounted_return - shaped.discounted_return
    np.testing.assert_allclose(cost, 0.1 * np.square(action[0]).sum())
    assert_array_equal(shaped.episode_return, plain.episode_return)
    play(train(script, args))


@fitting("Your own noise")
def test_your_own_noise(example, play):
    script, args = example
    rng = np.random.default_rng(0)
    noisy = script.perturb_reward(np.full((100, 100), 2.0), "lost", 0.3, rng)
    assert set(np.unique(noisy)) == {0, 2}
    assert (noisy == 0).mean() == approx(0.3, abs=0.02)
    play(train(script, args))


@fitting("A reverse loss of your own")
def test_your_own_loss_is_not_divided_by_the_old_probability(example, play):
    script, args = example
    torch.manual_seed(0)
    log_p_old = torch.rand(1000, dtype=torch.float64).log()
    log_p = (log_p_old + 0.3 * torch.randn(1000)).requires_grad_()
    batch = log_p, log_p_old, torch.randn(1000), 0.2, -2.0
    losses = script.symmetric_policy_losses(*batch), sppo_continuous.symmetric_policy_losses(*batch)
    (policy_loss, reverse_loss), (ppo_loss, divided_loss) = losses
    assert policy_loss == ppo_loss
    (gradient,) = torch.autograd.grad(reverse_loss, log_p)
    (divided,) = torch.autograd.grad(divided_loss, log_p)
    assert_close(gradient, log_p_old.exp() * divided)
    play(train(script, args))


@fitting("Your own loss")
def test_a_term_of_ones_own_weighs_k_times_more_with_beta_0(example):
    """Beside SPPO it takes k times the weight to train the same policy, if nothing is clipped."""
    script, args = example
    assert args.alpha == 1
    assert args.beta == 0
    flags = {"max_grad_norm": 1e9, "adam_eps": 1e-20, "learning_rate": 1e-3}

    def actor(size_coef, **weights):
        folder = train(script, args, **flags, size_coef=size_coef, **weights)
        state = checkpoint(folder)["agent"]
        return torch.cat([state[name].flatten() for name in state if name.startswith("actor")])

    ppo = {"alpha": 1.0, "beta": 0.0}
    sppo = {"alpha": 0.5, "beta": 20.0}
    expected = actor(1.0, **ppo)
    assert_close(actor(20.5, **sppo), expected, rtol=0, atol=1e-4)
    assert (actor(1.0, **sppo) - expected).abs().max() > 5e-3
    assert_close(actor(1.0, **sppo), actor(1.0 / 20.5, **ppo), rtol=0, atol=1e-4)


@fitting("A loss on next observations")
def test_a_loss_on_next_observations(example, play):
    script, args = example
    setting = dataclasses.replace(setting_of(script), script=script)
    agent = make_agent(setting)
    envs = MadeUp(setting)
    args = dataclasses.replace(args, num_envs=2, num_steps=32)
    batch, _ = setting.collect(agent, args, envs, envs.first_obs)
    _, after, _, done, cut_off, last_obs, _ = map(np.array, zip(*envs.steps))
    obs = batch.obs.view(32, 2, 11).numpy()
    expected = np.where(done[..., None], np.where(cut_off[..., None], last_obs, obs), after)
    assert_array_equal(batch.next_obs.view(32, 2, 11), expected)

    def change(smooth_coef):
        torch.manual_seed(0)
        agent = make_agent(setting)
        flags = dataclasses.replace(args, smooth_coef=smooth_coef, max_grad_norm=1e9)
        for _ in range(20):
            setting.update(agent, flags, batch)
        with torch.no_grad():
            return (agent.actor(batch.next_obs) - agent.actor(batch.obs)).square().mean()

    assert change(1.0) < 0.7 * change(0.0)
    play(train(script, args, num_steps=128))


@fitting("A measure from `info`")
def test_a_measure_from_info(example, monkeypatch):
    """Its mean over an evaluation's episodes."""
    script, args = example
    steps = record(monkeypatch, HopperEnv, "step")
    row = progress(train(script, args, eval_episodes=3))[-1]
    ends = []
    for _, (_, _, terminated, _, info) in steps:
        if terminated:
            ends.append(info["x_position"])
    assert len(set(ends[-3:])) == 3
    assert row["x_position"] == approx(np.mean(ends[-3:]))


@fitting("The best agent")
def test_the_best_agent_is_kept(example, monkeypatch):
    """Of equal ones the last."""
    script, args = example
    weights = []
    scores = iter([1.0, 3.0, 2.0, 3.0, 2.0])

    def evaluate(agent, *_):
        weights.append(agent.critic[0].weight.detach().clone())
        return np.array([next(scores)]), np.ones(1), []

    monkeypatch.setattr(script, "evaluate", evaluate)
    folder = train(script, args, total_timesteps=512, eval_freq=128)
    best = safetensors.torch.load_file(folder / "best.safetensors")["critic.0.weight"]
    assert [torch.equal(best, one) for one in weights] == [False, False, False, True]
    longer = train(script, args, total_timesteps=640, eval_freq=128, start_from=str(folder))
    assert not (longer / "best.safetensors").exists()


@fitting("Environments that wait")
def test_environments_that_wait_are_stepped_at_once(example):
    """The same bytes as one after the other. A step ends when all have begun."""
    script, args = example
    args = dataclasses.replace(args, num_envs=3)
    expected = train(setting_of(script).script, args)
    found = train(script, args)
    for name in ("progress.csv", "agent.safetensors"):
        assert sha256(found / name) == sha256(expected / name)
    barrier = threading.Barrier(3, timeout=60)

    def step(action):
        barrier.wait()  # raises an error if the others don't begin
        return np.zeros(11), 0.0, False, False, {}

    envs = script.NormalizedEnvs(args)
    envs.reset(0)
    for env in envs.envs:
        env.step = step
    envs.step(np.zeros((3, 3)))
    envs.close()


@fitting("Your own network")
def test_your_own_network(example, play):
    script, args = example
    play(train(script, args))
    agent = script.Agent(script.make_env(args), args)
    for network in (agent.actor, agent.critic):
        kinds = [type(layer).__name__ for layer in network]
        assert kinds == ["Linear", "LayerNorm", "Tanh"] * 2 + ["Linear"]


@fitting("A learning-rate schedule")
def test_a_learning_rate_schedule(example):
    """The last of three rollouts begins after two thirds of the run; the warm-up is longer."""
    script, args = example
    flags = {"num_envs": 1, "num_steps": 128, "total_timesteps": 384}
    (group,) = checkpoint(train(script, args, **flags))["optimizer"]["param_groups"]
    assert group["lr"] == approx(args.learning_rate * 384 / 20_000 / 3)


@fitting("A schedule for a language model")
def test_a_schedule_for_a_language_model(example, here):
    """The second of two batches begins after half of the run; the warm-up is longer."""
    script, args = example
    folder = train(script, args, **SHORT_LM | {"total_timesteps": 16})
    (group,) = checkpoint(folder)["optimizer"]["param_groups"]
    assert group["lr"] == approx(args.learning_rate * 16 / 1120 / 2)


@pytest.mark.parametrize(("learning_rate", "steps"), [(1e-7, 24), (10.0, 8)])
@fitting("Stopping an update at a KL divergence")
def test_a_kl_target(example, learning_rate, steps):
    script, args = example
    flags = {"learning_rate": learning_rate, "update_epochs": 3}
    optimizer = checkpoint(train(script, args, **flags))["optimizer"]
    assert optimizer["state"][0]["step"] == steps


@pytest.fixture
def here(toy, tmp_path, monkeypatch):
    """A folder with the toy, in which language models seem to have been started."""
    work_in(monkeypatch, tmp_path)
    Path("runs").symlink_to(toy.parent)
    return tmp_path


def test_other_ways_of_sampling_in_an_edited_copy(here):
    """With the page's top_p, but so small that only the most likely token is left."""
    text = sections(PAGES["docs/language-models.md"])["Sampling"]
    added, above = re.search(r"`(top_p=[\d.]+,)` below `(.+?)`", text).groups()
    assert eval(f"dict({added})")["top_p"] < 1
    script = edited(sppo_rlhf, here / "copy", (above, f"{above} top_p=1e-9,"))
    texts = []
    for greedy in (False, True):
        folder = train(script, script.parse_args([]), **SHORT_LM, eval_greedy=greedy)
        texts.append([row["response"] for row in read_lines(folder / "samples.jsonl")[:8]])
    assert texts[0] == texts[1]


def test_data_and_reward_functions_of_the_page_on_language_models(here):
    page = PAGES["docs/language-models.md"]
    mine, use = code_blocks(page, "python")
    Path("mine.py").write_text(mine)
    runpy.run_path("mine.py", run_name="__main__")
    script, args = parse(commands(sections(page)["Your own model and data"])[1])
    script.split_rows(script.read_rows(args.dataset), [], args)  # there are enough
    shutil.copytree("runs/toy/policy", "own")
    Path("own/chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    flags = SHORT_LM | {"policy_model": "own", "prompt_length": 16, "response_length": 16}
    folder = train(script, args, **flags)
    names = {}
    exec(use.replace("runs/NAME", str(folder)), names)
    chat = [{"role": "user", "content": "the plot"}]
    merged = transformers.pipeline("text-generation", "merged", tokenizer=names["pipe"].tokenizer)
    written = [one(chat, do_sample=False) for one in (names["pipe"], merged)]
    assert written[0] == written[1]
    assert merged.model.generation_config.max_new_tokens == 16


def test_a_reward_that_knows_the_answer(here, play):
    text = SECTIONS["A reward that knows the answer"]
    Path("correct.py").write_text(*code_blocks(text, "python"))
    making, training = commands(text)
    runpy.run_path(ROOT / making[1])["make"](Path(making[2]), steps=5)
    script, args = parse(training)
    folder = train(script, args, **SHORT_LM)
    rows = read_lines("sums/test.jsonl") + read_lines("sums/train.jsonl")
    sums = {row["prompt"]: row["label"] for row in rows}
    correct = runpy.run_path("correct.py")["correct"]
    for sample in read_lines(folder / "samples.jsonl"):
        assert [sample["reward"]] == correct([sample["response"]], [sums[sample["prompt"]]])
    assert correct(completions=["42", "4"], label=["42", "42"]) == [1, 0]
    play(folder)


def some_rewards(completions, number):
    return [(len(text) + i) % 3 for text, i in zip(completions, number)]


@fitting("GRPO: a baseline from the group")
def test_grpo(example, here, monkeypatch, play):
    """Groups of one prompt, but of different rows. The symmetric loss only weighs the loss."""
    script, args = example
    rows = [{"prompt": "the plot was", "number": i, "answer": "."} for i in range(40)]
    Path("same.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = SHORT_LM | {"batch_size": 16, "total_timesteps": 32, "group_size": 4}
    flags |= {"dataset": "same.jsonl", "eval_dataset": "same.jsonl", "prompt_length": 9}
    flags |= {"policy_model": "runs/toy/policy", "reward_model": (f"{__file__}:some_rewards",)}
    updates = record(monkeypatch, script, "update")
    folder = train(script, args, **flags)
    assert all(name.startswith("policy.") for name in checkpoint(folder)["agent"])
    for (_, _, samples, _), _ in updates:
        groups = {}
        for sample in samples:
            groups.setdefault(sample.row["number"], []).append(sample)
        assert [len(group) for group in groups.values()] == [4] * 4
        for group in groups.values():
            rewards = torch.tensor([sample.scores[0].item() for sample in group])
            expected = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
            for sample, advantage in zip(group, expected):
                assert not sample.value.any()
                tokens = advantage.expand(len(sample.response))
                assert_close(sample.advantage, tokens, rtol=1e-5, atol=1e-5)
    for group_size in (1, 3):
        with pytest.raises(SystemExit, match="group_size must be at least 2 and divide batch_size"):
            dataclasses.replace(args, group_size=group_size).check()
    play(folder)
    twice = dataclasses.replace(args, alpha=0.5, beta=0.5)  # k = 1, as for alpha 1 and beta 0
    symmetric = train(script, twice, **flags)
    policy = "policy/model.safetensors"
    assert sha256(symmetric / policy) == sha256(folder / policy)


@fitting("Targets of chat messages")
def test_targets_of_chat_messages(example, here, monkeypatch):
    script, args = example
    shutil.copytree("runs/toy/policy", "own")
    turns = "{% for m in messages %}{{ m.content }}<|endoftext|>\n{% endfor %}"
    Path("own/chat_template.jinja").write_text(turns)
    chat = [{"role": "user", "content": "the plot"}]
    rows = [{"prompt": chat, "label": "was dull", "number": i} for i in range(40)]
    Path("answers.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = SHORT_LM | {"policy_model": "own", "reward_model": (f"{__file__}:some_rewards",)}
    flags |= {"prompt_length": 16, "response_length": 16, "eval_dataset": "answers.jsonl"}
    updates = record(monkeypatch, script, "update")
    folder = train(script, args, **flags)
    target = script.load_tokenizer("own").encode("was dull<|endoftext|>")
    assert {tuple(sample.target) for (_, _, samples, _), _ in updates for sample in samples} == {
        tuple(target)
    }
    assert progress(folder)[-1]["losses/sft_loss"] > 0
    Path("own/chat_template.jinja").write_text(
        "{{ messages[0].content }}{% if add_generation_prompt %}|{% endif %}"
    )
    with pytest.raises(SystemExit, match="does not write the label behind the prompt$"):
        train(script, args, **flags | {"seed": 2})


@fitting("A new metric")
def test_a_new_metric(example, play):
    script, args = example
    flags = {"env_id": "Pendulum-v1", "eval_episodes": 4}
    folder = train(script, args, **flags)
    play(folder)
    (row,) = progress(folder)
    assert row["losses/probability"] == approx(1 / 11, rel=0.1)
    assert row["return_worst"] < row["return_mean"]


STATED = {  # sentences with defaults
    "control": [
        "{ppo.bins} bins per action dimension",
        "every 100,000 steps of an environment (Atari: {atari.checkpoint_freq:,},",
        "of {a2c.num_envs} environments x {a2c.num_steps} steps",
        "(Atari: {games.num_envs} x {games.num_steps})",
        "Alpha and beta are {a2c.beta}.",
    ],
    "atari": ["Alpha and beta are {games.beta}, as"],
    "usage": ["at most {enjoy.MAX_FRAMES:,} frames"],
    "symmetric-loss": [
        "| continuous control | {ppo.alpha}, {ppo.beta:g} |",
        "| Atari | {atari.alpha}, {atari.beta:g} |",
        "| language models, IMDB | {imdb.alpha}, {imdb.beta} |",
        "| language models, TL;DR | {tldr.alpha}, {tldr.beta} |",
    ],
}


def test_defaults_on_pages_are_those_of_the_scripts():
    ppo, atari, a2c, games = (setting.script.Args() for setting in SETTINGS)
    imdb, tldr = (sppo_rlhf.parse_args(["--task", task]) for task in ("imdb", "tldr"))
    named = {"ppo": ppo, "atari": atari, "a2c": a2c, "games": games, "imdb": imdb, "tldr": tldr}
    for page, sentences in STATED.items():
        for sentence in sentences:
            assert sentence.format(enjoy=enjoy, **named) in PAGES[f"docs/{page}.md"]
    levels = re.findall(r"(?m)^- `(\w+)`.*: .*, default (.+)\.$", PAGES["docs/usage.md"])
    assert len(levels) == 4
    for noise, level in levels:
        assert sppo_rlhf.parse_args(["--noise", noise]).noise_level == float(level)


# ---- Metrics


def metrics(*kinds, page="docs/usage.md"):
    """Names of metrics of `kinds` of scripts, and of all, in a page's list. NAME is the toy's."""
    text = sections(PAGES[page])["Metrics"].replace("NAME", "runs/toy/reward")
    found = set()
    for names, kind in re.findall(r"(?m)^- ((?:`[^`]+`(?:, )?)+)(?: \((.+?)\))?: ", text):
        if kind in ("", *kinds):
            found |= set(re.findall(r"`([^`]+)`", names))
    return found


def logged(folder):
    """Tags in TensorBoard, and columns of progress.csv less those that every script has."""
    tags = EventAccumulator(str(folder)).Reload().Tags()["scalars"]
    columns = (folder / "progress.csv").read_text().splitlines()[0].split(",")
    return set(tags), set(columns) - {"step", "return_mean", "return_std", "length_mean"}


def test_the_list_of_metrics_is_complete_for_control(setting, tmp_path, signals):
    expected = metrics("PPO" if setting.ppo else "A2C", "control, Atari")
    tags, columns = logged(setting.run(tmp_path)[1])
    assert tags == expected
    assert columns == expected - {"charts/SPS", "eval/return_mean"}


def test_the_list_of_metrics_is_complete_for_language_models(here):
    """Two runs: the toy with all that is optional, and summaries, by a model with LoRA."""
    args = sppo_rlhf.parse_args(["--ce-coef", "0.1"])
    toy_tags, toy_columns = logged(train(sppo_rlhf, args, **SHORT_LM))
    row = {"prompt": "the plot was dull . TL;DR:", "label": "it was dull ."}
    Path("posts.jsonl").write_text((json.dumps(row) + "\n") * 40)
    words = "--task tldr --policy-model runs/toy/policy --reward-model runs/toy/reward"
    words += " --dataset posts.jsonl --eval-dataset posts.jsonl"
    args = sppo_rlhf.parse_args(words.split())
    lengths = {"prompt_length": 10, "response_length": 10}
    tags, columns = logged(train(sppo_rlhf, args, **SHORT_LM, **lengths))
    own = metrics(page="docs/language-models.md")
    expected = metrics("PPO") | own
    csv = metrics("csv", page="docs/language-models.md") - own
    assert tags | toy_tags == expected
    assert columns | toy_columns == csv | expected - {"charts/SPS", "eval/return_mean"}


def test_the_toys_packed_runs_have_the_default_settings():
    """As the page on language models says of what is normal."""
    runs = pd.read_csv(ROOT / "results/text/toy-runs.csv.gz")
    packed = runs[(runs["exp_name"] == "sppo") & (runs["seed"] == 1)].iloc[0]
    for name, value in vars(sppo_rlhf.parse_args([])).items():
        assert not isinstance(value, int | float) or packed[name] == value, name
