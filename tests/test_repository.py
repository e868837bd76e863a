"""What the parts of the repository promise each other: pins, flags, text that scripts share."""

import ast
import dataclasses
import difflib
import functools
import importlib
import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
LOCK = re.findall(r"(?m)^[^#\n].*$", (ROOT / "requirements.lock").read_text())
CONTINUOUS = ["sppo_continuous", "sa2c_continuous"]
ATARI = ["sppo_atari", "sa2c_atari"]
CONTROL = CONTINUOUS + ATARI
SCRIPTS = [*CONTROL, "sppo_rlhf"]


def source(script):
    return (ROOT / f"{script}.py").read_text()


# ---- Dependencies


def metadata(script):
    """The block that `uv run` reads."""
    block = re.search(r"(?m)^# /// script\n((?:#.*\n)+?)# ///$", source(script)).group(1)
    return tomllib.loads(re.sub(r"(?m)^# ?", "", block))


@pytest.mark.parametrize("script", [*SCRIPTS, "toy"])
def test_a_script_imports_only_dependencies_that_it_names_with_the_projects_bounds(script):
    """So it needs no other file of the repository, and can be copied alone."""
    block = metadata(script)
    bounds = PROJECT["dependencies"] + ([] if script in CONTROL else EXTRAS["rlhf"])
    if script in ATARI:  # they need neither MuJoCo nor Box2D
        bounds = [text.replace("[mujoco]", "") for text in bounds]
    assert block["requires-python"] == PROJECT["requires-python"]
    assert set(block["dependencies"]) <= set(bounds)
    needed = {Requirement(text).name.replace("-", "_") for text in block["dependencies"]}
    needed |= {"wandb"}  # which --help tells whom to install
    imported = set(re.findall(r"(?m)^ *(?:import|from) (\w+)", source(script)))
    assert imported - sys.stdlib_module_names <= needed


def test_enjoy_has_the_bounds_of_all_scripts_and_of_films():
    wanted = set(EXTRAS["video"]).union(*(metadata(script)["dependencies"] for script in SCRIPTS))
    wanted -= {"gymnasium>=1.2.3"}  # that with MuJoCo is among them
    assert set(metadata("enjoy")["dependencies"]) == wanted
    assert metadata("enjoy")["tool"] == metadata("sppo_rlhf")["tool"]


def test_the_lock_file_has_every_dependency():
    """.ci/run looks whether versions are within bounds, for every Python and system."""
    locked = {Requirement(line).name for line in LOCK}
    needed = {Requirement(text).name for text in sum(EXTRAS.values(), PROJECT["dependencies"])}
    assert needed - {PROJECT["name"]} <= locked


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_lone_copy_gets_the_versions_of_the_lock_file(script):
    settings = metadata(script)["tool"]["uv"]
    page = (ROOT / "CONTRIBUTING.md").read_text()
    assert f"--exclude-newer {settings['exclude-newer']} " in page
    (constraint,) = settings["constraint-dependencies"]
    assert f"echo {constraint} |" in page
    assert constraint in LOCK
    version = constraint.partition("==")[2]
    for page in ("README.md", "docs/handout.md"):
        assert f"--torch-backend cpu torch=={version}\n" in (ROOT / page).read_text()


# ---- Text of scripts: what several share, lengths, licence, comments


@functools.cache
def definitions(script):
    """{name: text} of functions and classes, decorators included."""
    found = {}
    for node in ast.parse(source(script)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = "\n".join(source(script).splitlines()[first - 1 : node.end_lineno])
    return found


# Each script has its own
OWN = {"Args", "gradient_and_metrics", "loss_and_metrics", "update", "check", "train"}
SAME = [
    (SCRIPTS, "perturb_advantage file_digests means load_checkpoint atomic_write begin_session"),
    (SCRIPTS, "start_digest differences Failed failure_noted"),
    (CONTROL, "compute_gae run_folder evaluation_row restore"),
    (CONTINUOUS, "make_env prepare RunningStats NormalizedEnvs perturb_reward mlp numpy_layer"),
    (CONTINUOUS, "Agent Batch collect evaluate compiled save_agent main"),
    (ATARI, "AtariGames Agent sample_gumbel Batch collect evaluate compiled save_agent main"),
    (ATARI, "keep_freed_memory"),
    ([*ATARI, "sppo_rlhf"], "perturb_reward has_bfloat16"),
    (["sppo_continuous", "sppo_atari", "sppo_rlhf"], "symmetric_policy_losses"),
    (["sa2c_continuous", "sa2c_atari"], "symmetric_policy_losses"),
]


@pytest.mark.parametrize(("scripts", "names"), SAME)
def test_what_scripts_share_is_the_same_text(scripts, names):
    for name in names.split():
        for script in scripts[1:]:
            assert definitions(script)[name] == definitions(scripts[0])[name], f"{name}: {script}"


@pytest.mark.parametrize("script", CONTROL)
def test_no_other_name_is_in_two_control_scripts(script):
    """So that what is copied from now on is in the table above."""
    named = OWN.union(*(names.split() for scripts, names in SAME if script in scripts))
    for other in set(CONTROL) - {script}:
        assert set(definitions(script)) & set(definitions(other)) <= named


@pytest.mark.parametrize(("pair", "limit"), [(CONTINUOUS, 190), (ATARI, 225)], ids=str)
def test_a_diff_of_the_pair_is_short(pair, limit):
    """What it shows is the algorithm. A line that changed counts twice, once on either side."""
    lines = [source(script).splitlines() for script in pair]
    assert sum(line[:2] in ("- ", "+ ") for line in difflib.ndiff(*lines)) <= limit


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_names_its_licence_is_short_and_begins_with_the_algorithm(script):
    lines = source(script).splitlines()
    holder = re.search(r"(?m)^Copyright \(c\) (.*)$", (ROOT / "LICENSE").read_text()).group(1)
    assert lines[0] == f"# SPDX-FileCopyrightText: {holder}"
    assert lines[1] == f"# SPDX-License-Identifier: {PROJECT['license']}"
    assert len(lines) <= (950 if script in CONTINUOUS else 860 if script in ATARI else 1500)
    assert max(map(len, lines)) <= 100 >= len(source("toy").splitlines())
    order = list(definitions(script))
    for name in ("perturb_reward", "symmetric_policy_losses", "train"):
        assert order.index(name) < order.index("file_digests")


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_argument_is_explained_on_its_own_line(script):
    """tyro shows the comment beside a field in --help; where the formatter wraps, it is lost."""
    lines = definitions(script)["Args"].splitlines()
    fields = [line for line in lines if re.match(r"    \w+: ", line)]
    assert len(fields) == len(dataclasses.fields(importlib.import_module(script).Args))
    assert [line for line in fields if not re.search(r" = .*  # \w", line)] == []
