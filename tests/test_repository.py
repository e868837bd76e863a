"""What the parts of the repository promise each other: pins, README, length of the scripts."""

import dataclasses
import re
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

import sppo_continuous

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SCRIPTS = sorted(path.name for path in ROOT.glob("s*_*.py"))


def script_metadata(name):
    """The PEP 723 block of a script."""
    block = re.search(r"(?m)^# /// script\n((?:#.*\n)+?)# ///$", (ROOT / name).read_text()).group(1)
    return tomllib.loads("".join(line[2:] + "\n" if len(line) > 1 else "\n" for line in block.splitlines()))


def imports(name):
    return set(re.findall(r"(?m)^(?:import|from) (\w+)", (ROOT / name).read_text()))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_has_the_projects_pins(name):
    metadata, pins = script_metadata(name), PROJECT["dependencies"]
    assert metadata["requires-python"] == PROJECT["requires-python"]
    assert metadata["dependencies"]
    assert set(metadata["dependencies"]) <= set(pins)
    pinned = {re.match(r"[\w-]+", pin).group() for pin in metadata["dependencies"]}
    third_party = imports(name) - set(sys.stdlib_module_names)
    assert third_party <= pinned, "imported, but not among the script's own dependencies"


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_imports_nothing_from_here(name):
    assert not imports(name) & {path.stem for path in ROOT.rglob("*.py")}


def length_of(source, *functions):
    """Lines of these top-level functions, from `def` to the last line, blank lines at the end left out."""
    blocks = re.split(r"(?m)^(?=def |class |@)", source)
    found = [block for block in blocks if re.match(rf"def ({'|'.join(functions)})\(", block)]
    assert len(found) == len(functions)
    return sum(block.rstrip().count("\n") + 1 for block in found)


def test_the_script_is_short_and_the_algorithm_a_part_of_it():
    source = (ROOT / "sppo_continuous.py").read_text()
    assert source.count("\n") <= 550
    algorithm = ("symmetric_policy_loss", "compute_gae", "gradient_and_metrics", "train")
    assert length_of(source, *algorithm) <= 200


def test_readme_names_only_flags_that_exist():
    readme = (ROOT / "README.md").read_text()
    flags = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(sppo_continuous.Args)}
    flags |= {flag.replace("--", "--no-", 1) for flag in flags}
    commands = "".join(re.findall(r"(?m)^python sppo_continuous\.py(?:[^\\\n]|\\\n)*", readme))
    table = "".join(re.findall(r"(?m)^\| `--.*$", readme))
    named = set(re.findall(r"--[a-z][a-z-]*", commands + table))
    assert len(named) > 20
    assert named <= flags
