"""What the parts of the repository promise each other: pins, README, density of the scripts."""

import ast
import dataclasses
import difflib
import io
import re
import sys
import tokenize
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from helpers import SETTINGS

import sppo_rlhf

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SCRIPTS = ["sa2c_atari.py", "sa2c_continuous.py"]
SCRIPTS += ["sppo_atari.py", "sppo_continuous.py", "sppo_rlhf.py"]
CONTROL = [name for name in SCRIPTS if name != "sppo_rlhf.py"]


def script_metadata(name):
    """The PEP 723 block of a script."""
    block = re.search(r"(?m)^# /// script\n((?:#.*\n)+?)# ///$", (ROOT / name).read_text()).group(1)
    return tomllib.loads(
        "".join(line[2:] + "\n" if len(line) > 1 else "\n" for line in block.splitlines())
    )


def imports(name):
    return set(re.findall(r"(?m)^(?:import|from) (\w+)", (ROOT / name).read_text()))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_has_the_projects_pins(name):
    metadata, pins = script_metadata(name), PROJECT["dependencies"]
    if name not in CONTROL:
        pins = pins + PROJECT["optional-dependencies"]["rlhf"]
    assert metadata["requires-python"] == PROJECT["requires-python"]
    assert metadata["dependencies"]
    assert set(metadata["dependencies"]) <= set(pins)
    pinned = {
        re.match(r"[\w-]+", pin).group().replace("-", "_") for pin in metadata["dependencies"]
    }
    third_party = imports(name) - set(sys.stdlib_module_names)
    assert third_party <= pinned, "imported, but not among the script's own dependencies"


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_copied_script_carries_the_licence(name):
    holder = re.search(r"(?m)^Copyright \(c\) (.*)$", (ROOT / "LICENSE").read_text()).group(1)
    text = (ROOT / name).read_text()
    assert text.startswith(f"# SPDX-FileCopyrightText: {holder}\n")
    assert f"\n# SPDX-License-Identifier: {PROJECT['license']}\n" in text


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_imports_nothing_from_here(name):
    ours = [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("results/*.py")]
    assert len(ours) > 5
    assert not imports(name) & {path.stem for path in ours}


def definitions(name):
    """{name: text} of a script's functions and classes at the top level, decorators included."""
    text, found = (ROOT / name).read_text(), {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = "\n".join(text.splitlines()[first - 1 : node.end_lineno])
    return found


# What scripts have in common by name only: each has its own, or each algorithm has.
OWN = {"Args", "Agent", "gradient_and_metrics", "evaluate", "train", "prepare"}
OWN |= {"with_defaults", "check", "evaluate_run"}
PER_ALGORITHM = {"symmetric_policy_loss", "compiled"}
NOT_RLHF = {"main"}  # sppo_rlhf.py has its own, the control scripts share theirs
SHARED = {"perturb_reward", "perturb_advantage", "due", "start_tracking", "save_progress", "save"}
SHARED |= {"describe_machine", "git", "require", "require_range", "UsageError", "RunError"}
SHARED |= {"usable", "load_checkpoint", "saved_args", "evaluated_args", "resumed_args"}
SHARED |= {"make_run_dir", "fail"}
CONTROL_SHARED = SHARED | NOT_RLHF | {"correct_flips", "compute_gae", "flatten_parameters"}
CONTROL_SHARED |= {"print_score"}
IN_PAIR = {"Args", "gradient_and_metrics", "train", "with_defaults", "check"} | PER_ALGORITHM


@pytest.mark.parametrize(
    ("scripts", "own", "expected"),
    [
        (SCRIPTS, OWN | PER_ALGORITHM | NOT_RLHF, SHARED),
        (CONTROL, OWN | PER_ALGORITHM, CONTROL_SHARED),
        (
            ["sppo_atari.py", "sppo_rlhf.py"],
            OWN | NOT_RLHF | {"symmetric_policy_loss"},
            {"keep_freed_memory", "has_bfloat16"},
        ),
        (["sppo_continuous.py", "sppo_atari.py"], OWN | {"compiled"}, {"symmetric_policy_loss"}),
        (["sa2c_continuous.py", "sa2c_atari.py"], OWN | {"compiled"}, {"symmetric_policy_loss"}),
        (
            ["sppo_continuous.py", "sa2c_continuous.py"],
            IN_PAIR,
            {"Agent", "evaluate", "NormalizedEnvs", "RunningStats", "mlp", "numpy_mlp"}
            | {"make_env", "check_env", "prepare", "CheckedEnv", "evaluate_run"},
        ),
        (
            ["sppo_atari.py", "sa2c_atari.py"],
            IN_PAIR,
            {"Agent", "evaluate", "AtariGames", "rom_name", "sample", "has_bfloat16"}
            | {"keep_freed_memory", "prepare"},
        ),
    ],
    ids=["all", "control", "processor", "ppo", "a2c", "continuous", "atari"],
)
def test_what_scripts_share_is_the_same_text(scripts, own, expected):
    texts = {}
    for script in scripts:
        for name, text in definitions(script).items():
            texts.setdefault(name, {})[script] = text
    shared = {name for name, copies in texts.items() if len(copies) > 1} - own
    assert shared >= expected
    for name in shared:
        first, *others = texts[name].items()
        for script, text in others:
            assert text == first[1], f"{name}: {script} and {first[0]} have drifted apart"


@pytest.mark.parametrize(("kind", "limit"), [("continuous", 185), ("atari", 215)])
def test_a_diff_of_the_pair_is_short(kind, limit):
    """What it shows is the algorithm. A line that changed counts twice, once on either side."""
    ppo, a2c = (
        (ROOT / f"{algorithm}_{kind}.py").read_text().splitlines() for algorithm in ("sppo", "sa2c")
    )
    changed = [line for line in difflib.ndiff(ppo, a2c) if line[:2] in ("- ", "+ ")]
    assert len(changed) <= limit


# ---- Length and density: code tokens and code lines are without comments, docstrings, blank lines

CONTROL_TOKENS = 7_300
RLHF_TOKENS = 10_600
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
LAYOUT |= {tokenize.ENDMARKER}


def code_tokens(text):
    """The line of each code token."""
    docstrings = set()  # first lines
    for node in ast.walk(ast.parse(text)):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if documented and ast.get_docstring(node) is not None:
            docstrings.add(node.body[0].lineno)
    lines = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        is_docstring = token.type == tokenize.STRING and token.start[0] in docstrings
        if token.type not in LAYOUT and not is_docstring:
            lines.append(token.start[0])
    return lines


def functions(text):
    """[(name, first line, last line)] of top-level functions and of methods, in source order."""
    found = []
    for node in ast.parse(text).body:
        members = node.body if isinstance(node, ast.ClassDef) else [node]
        for member in members:
            if isinstance(member, ast.FunctionDef):
                found.append((member.name, member.lineno, member.end_lineno))
    return found


def test_code_tokens_are_counted_as_defined():
    text = '''"""Docstring of the module."""

x = 1  # a comment


def f(y):
    """Docstring
    of two lines."""
    return (
        y
    )


class C:
    """Docstring."""

    def method(self):
        return "not a docstring"
'''
    lines = [3] * 3 + [6] * 6 + [9] * 2 + [10] + [11] + [14] * 3 + [17] * 6 + [18] * 2
    assert code_tokens(text) == lines
    assert functions(text) == [("f", 6, 11), ("method", 17, 18)]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_short_and_plain_to_read(name):
    text = (ROOT / name).read_text()
    assert max(len(line) for line in text.splitlines()) <= 100
    tokens = code_tokens(text)
    assert len(tokens) <= (CONTROL_TOKENS if name in CONTROL else RLHF_TOKENS)
    assert len(tokens) / len(set(tokens)) <= 10.0
    dense = {}
    for function, first, last in functions(text):
        inside = [line for line in tokens if first <= line <= last]
        code_lines = len(set(inside))
        if code_lines >= 10 and len(inside) / code_lines > 12.5:
            dense[function] = len(inside) / code_lines
    assert dense == {}


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_algorithm_comes_before_the_plumbing(name):
    order = [function for function, _, _ in functions((ROOT / name).read_text())]
    algorithm = ["symmetric_policy_loss", "train"]
    if name in CONTROL:
        algorithm += ["compute_gae", "gradient_and_metrics"]
    else:
        algorithm += ["token_advantages", "loss_and_metrics", "accumulate_gradient"]
    for function in algorithm:
        assert order.index(function) < order.index("due"), function


@pytest.mark.parametrize("script", [setting.script for setting in SETTINGS] + [sppo_rlhf])
def test_readme_names_only_flags_that_exist(script):
    readme = (ROOT / "README.md").read_text()
    flags = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(script.Args)}
    flags |= {flag.replace("--", "--no-", 1) for flag in flags}
    commands = "".join(re.findall(rf"(?m)^python {script.__name__}\.py(?:[^\\\n]|\\\n)*", readme))
    named = set(re.findall(r"--[a-z][a-z0-9-]*", commands))
    assert len(named) >= 2
    assert named <= flags


def test_usage_table_names_only_flags_that_exist():
    usage = (ROOT / "docs/usage.md").read_text()
    table = "".join(re.findall(r"(?m)^\| `--.*$", usage))
    scripts = [setting.script for setting in SETTINGS] + [sppo_rlhf]
    names = {field.name for script in scripts for field in dataclasses.fields(script.Args)}
    named = set(re.findall(r"--[a-z][a-z0-9-]*", table))
    assert len(named) > 10
    assert named <= {"--" + name.replace("_", "-") for name in names}


PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("results/**/*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """On a clean checkout: a file that git ignores is not there."""
    page = ROOT / page
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_argument_is_explained_on_its_own_line(name):
    """tyro shows the comment beside a field in --help; where the formatter wraps, it is lost."""
    text = (ROOT / name).read_text()
    arguments = next(node for node in ast.parse(text).body if getattr(node, "name", "") == "Args")
    fields = [node for node in arguments.body if isinstance(node, ast.AnnAssign)]
    assert len(fields) > 30
    for field in fields:
        assert field.lineno == field.end_lineno
        assert "  # " in text.splitlines()[field.lineno - 1]
