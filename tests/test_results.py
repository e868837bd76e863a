"""Numbers on the pages of results/ are those of the packed runs there."""

import importlib
import itertools
import re
import shlex
import subprocess
from types import SimpleNamespace

import helpers
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.runs import read_pack, read_progress
from results import common, tables, verdicts
from results.a2c import nine as a2c
from results.common import RESULTS
from results.control import nine
from results.tables import ROOT

PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in tables.PAGES}


def packed(name):
    runs, _ = read_pack(RESULTS / f"{name}-runs.csv.gz")
    return runs


# ---- Tables


@pytest.mark.parametrize("file", tables.PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_tables_are_as_generated_and_tables_of_means_have_markers(file):
    page = file.read_text()
    assert tables.with_tables(file) == page
    assert not re.findall(r"(?m)^\|.*±.*", tables.MARKED.sub("", page))


def test_a_marker_alone_gets_its_table(tmp_path):
    (tmp_path / "control").mkdir()
    page = tmp_path / "control/README.md"
    page.write_text("Runs:\n\n<!--ant.scores-->\n\nEnd\n")
    table = importlib.import_module("results.control.ant").scores()
    assert tables.with_tables(page) == f"Runs:\n\n<!--ant.scores-->\n{table}\n\nEnd\n"


# ---- Verdicts


def test_verdicts_are_those_that_packs_give():
    assert verdicts.csv_table().to_csv(index=False) == (RESULTS / "verdicts.csv").read_text()


def test_every_comparison_is_on_a_page_and_every_claim_that_has_any_stands_by_one():
    for one in verdicts.comparisons():
        page, _, _ = one.page.partition("#")
        assert (RESULTS / page).exists()
    for claim in verdicts.CLAIMS:
        found = verdicts.of_claim(claim)
        assert not found or verdicts.broadest(found).claim == claim


def test_a_new_analysis_is_found(monkeypatch):
    """And stands for its claim if it has more tasks than others."""
    found = verdicts.Interval(0.2, 0.11, 0.3)
    options = {"seeds": 3, "tasks": 2, "p": 0.3}
    one = verdicts.Comparison("12", "made up", "text/README.md", found, **options)
    new = SimpleNamespace(comparisons=lambda: [one])
    modules = [*verdicts.analyses(), new]
    monkeypatch.setattr(verdicts, "analyses", lambda: modules)
    monkeypatch.setattr(verdicts, "comparisons", verdicts.comparisons.__wrapped__)
    end = "| 0.200 (0.110 to 0.300) of the score | undecided (p 0.3) |  |"
    assert verdicts.claims().endswith(end)


@pytest.mark.parametrize(
    ("low", "high", "p", "matters", "verdict"),
    [
        (0.1, 0.3, 0.04, 0.1, "gain"),
        (-0.3, -0.1, 0.04, 0.1, "loss"),
        (0.1, 0.3, 0.06, 0.1, "undecided"),
        (0.1, 0.3, np.nan, 0.1, "undecided"),
        (-0.1, 0.09, 0.9, 0.1, "no gain that matters"),
        (-0.1, 0.09, 0.9, np.nan, "undecided"),
        (-0.1, 0.11, np.nan, 0.1, "undecided"),
    ],
)
def test_a_verdict_is_the_first_that_holds(low, high, p, matters, verdict):
    """Without a margin that was fixed before the scores, no gain is excluded."""
    found = verdicts.Interval((low + high) / 2, low, high)
    one = verdicts.Comparison("1", "", "k", found, 8, p=p, matters=matters)
    assert one.verdict() == verdict


def test_corrected_p_is_over_all_differences_of_a_pack_in_all_measures():
    p = {}
    scores = common.read("atari/crazyclimber")
    for measure in common.MEASURES:
        cell = scores[scores["measure"] == measure].groupby("method")["score"].apply(np.array)
        for a, b in itertools.combinations(cell.index, 2):
            p[measure, a, b] = stats.ttest_ind(cell[a], cell[b], equal_var=False).pvalue
    corrected = stats.false_discovery_control(list(p.values()))
    found = common.corrected_suite("atari/crazyclimber")
    for (measure, *methods), after in zip(p, corrected):
        place = (measure, "CrazyClimber", "clean"), frozenset(methods)
        assert found[place] == pytest.approx(after)
    assert len(found) == len(p)


def test_pages_put_the_runs_of_a_list_where_its_commands_do():
    lines = "\n".join(PAGES.values())
    shown = re.findall(
        r"bash (results/\S+\.sh) \| .*python benchmarks/run.py --runs-dir (\S+)", lines
    )
    assert shown
    for script, folder in shown:
        listed = subprocess.check_output(["bash", script], cwd=ROOT, text=True)
        assert set(re.findall(r"--runs-dir (\S+)", listed)) == {folder}


# ---- Runs


# speed/memory.sh prints no commands
SUITES = [path for path in sorted(RESULTS.glob("*/*.sh")) if path.stem != "memory"]


def flags_of(command):
    """The script and its flags with their values, in any order."""
    return frozenset(re.split(r" (?=--)", " ".join(command.split())))


@pytest.mark.parametrize("suite", SUITES, ids=lambda path: path.stem)
def test_a_suites_script_prints_the_commands_of_its_pack(suite):
    name = str(suite.relative_to(RESULTS).with_suffix(""))
    assert f"#     bash results/{name}.sh | python benchmarks/run.py " in suite.read_text()
    listed = subprocess.check_output(["bash", suite], cwd=ROOT, text=True)
    is_registered = "which were registered and have not run" in suite.read_text()
    runs = [] if is_registered else packed(name)["command"]
    commands = {flags_of("python " + command) for command in runs}
    assert commands <= {flags_of(line) for line in listed.splitlines()}


def test_runs_that_are_said_to_be_equal_are_equal_to_the_last_bit():
    """Of pairs only that with alpha 0.5 and beta 0.4 differs, since their sum rounds. CrazyClimber
    was repeated."""
    runs = packed("control/pairs").set_index("run_name")
    progress = read_progress(RESULTS / "control/pairs-progress.csv.gz").set_index("run_name")
    k_of_run = runs["alpha"].astype(float) + runs["beta"].astype(float)
    for (_, _, k), pair in runs.groupby(["env_id", "noise", k_of_run]):
        first, second = (progress.loc[name].to_numpy() for name in pair.index)
        assert len(first) == len(second) >= 4
        assert np.array_equal(first, second, equal_nan=True) == (k != 0.9)
        assert (pair["sha256"].nunique() == 1) == (k != 0.9)
    assert runs["sha256"].nunique() == len(runs) / 2 + 1

    files = [RESULTS / f"atari/{name}-progress.csv.gz" for name in ("crazyclimber", "games")]
    first, again = (read_progress(file).set_index("run_name") for file in files)
    names = again.index[again.index.str.startswith("CrazyClimber")].unique()
    assert len(names) == 3
    assert first.loc[names].equals(again.loc[names])


# ---- The registered test of the nine tasks, on made-up runs


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """Packs of made-up scores: seed 20007 lacks a run, SPPO on noisy Swimmer stopped with seed
    20002. SPPO's scores are a tenth above DPPO's, but on noisy BipedalWalker, where both are as
    good as a random agent."""
    random = nine.random_scores()
    rng = np.random.default_rng(0)
    rows = []
    for place in itertools.product(nine.TASKS, nine.NOISES, nine.METHODS, nine.SEEDS):
        task, noise, method, seed = place
        if place == ("Swimmer-v4", "normal 0.05", "sppo", 20002):
            continue
        above = 0 if (task, noise) == ("BipedalWalker-v3", "normal 0.05") else 1000
        score = random[task] + above * (1.1 if method == "sppo" else 1) + rng.normal(0, 30)
        rows += [[*place, measure, score] for measure in common.MEASURES]
    scores = pd.DataFrame(rows, columns=["task", "noise", "method", "seed", "measure", "score"])
    scores = scores.query("seed < 20007 or task != 'Ant-v4'")
    renamed = scores.replace({"method": {ppo: name for name, ppo in a2c.NAMES.items()}})
    renamed["seed"] += 30000 - 20002
    packs = {"control/nine-test": scores, "a2c/nine": renamed}
    monkeypatch.setattr(nine, "read", packs.get)
    for pack, line in {"control/nine-test": "sppo,20002", "a2c/nine": "sa2c,30000"}.items():
        file = tmp_path / f"{pack}-stopped.csv"
        file.parent.mkdir()
        file.write_text(f"task,noise,method,seed\nSwimmer-v4,normal 0.05,{line}\n")
    (tmp_path / "control/random.csv").write_text((RESULTS / "control/random.csv").read_text())
    monkeypatch.setattr(nine, "RESULTS", tmp_path)
    return packs


def test_the_registered_test_takes_whole_seeds_and_counts_runs_that_stopped(made_up):
    whole = nine.read_whole("control/nine-test", nine.SEEDS, nine.METHODS)
    assert sorted(set(whole["seed"])) == [20002, 20003, 20004, 20005, 20006]
    scores = nine.unseen()
    random = nine.random_scores()
    assert random["Swimmer-v4"] in scores["Swimmer-v4", "normal 0.05", "sppo"]
    values = []
    variances = []
    for task, noise in itertools.product(nine.TASKS, nine.NOISES):
        samples = [scores[task, noise, method] for method in ("sppo", "dppo")]
        a, b = (sample.mean() for sample in samples)
        scale = (a + b) / 2 - random[task]
        values.append((a - b) / scale)
        variances.append([sample.var(ddof=1) / 5 / (17 * scale) ** 2 for sample in samples])
    values.pop()  # of noisy BipedalWalker
    variances = np.ravel(variances[:-1])
    freedom = variances.sum() ** 2 / (variances**2 / 4).sum()
    half = variances.sum() ** 0.5 * stats.t.ppf(0.975, freedom)
    together, clean, noisy = nine.tested("", scores)
    assert together.found.value == pytest.approx(np.mean(values)) and together.p < 0.05
    assert together.found.half_width() == pytest.approx(half)
    assert [one.tasks for one in (together, clean, noisy)] == [8, 9, 8]
    verdicts_of = [one.verdict() for one in (together, clean, noisy)]
    assert verdicts_of == ["gain", "gain", "undecided"]
    assert nine.each_task(scores).count("Swimmer") == 1
    table = nine.tests()
    assert table.count("| gain |") == 2 and table.count("| undecided |") == 1


def test_clean_and_noisy_are_tested_only_if_both_together_gain(made_up):
    """Clean rewards alone would gain."""
    scores = made_up["control/nine-test"]
    noisy = scores["noise"] == "normal 0.05"
    lead = (scores["method"] == "sppo") * scores["score"]
    scores.loc[noisy, "score"] -= 0.2 * lead[noisy]
    together, clean, noisy = nine.tested("", nine.unseen())
    assert clean.found.p < 0.01 and together.p > 0.05 and clean.p == together.p
    assert [one.beside for one in (together, clean, noisy)] == [True, False, False]
    assert clean.verdict() != "gain"


def test_the_registered_list_of_a2c_has_all_runs_of_its_test():
    listed = subprocess.check_output(
        ["bash", "results/a2c/nine.sh"], cwd=ROOT, text=True
    ).splitlines()
    script = importlib.import_module("sa2c_continuous")
    runs = [helpers.parse(script, shlex.split(line)[2:]) for line in listed]
    places = [(run.env_id, run.noise, run.exp_name, run.seed) for run in runs]
    wanted = itertools.product(nine.TASKS, ["none", "normal"], a2c.NAMES, a2c.SEEDS)
    assert sorted(places) == sorted(wanted)
    weights = {(run.exp_name, run.alpha, run.beta, run.total_timesteps) for run in runs}
    assert weights == {("da2c", 1, 0, 1_000_000), ("sa2c", 0.5, 0.5, 1_000_000)}
    assert {run.env_id for run in runs if run.gamma == 0.9999} == {"Swimmer-v4"}


def test_the_registered_test_of_a2c_is_that_of_ppo(made_up, monkeypatch):
    with pytest.raises(AssertionError, match="too few whole seeds"):  # five
        a2c.scores_of()
    monkeypatch.setattr(a2c, "FEWEST", 5)
    scores = a2c.scores_of()
    assert nine.tests(scores) == nine.tests()
    holds = a2c.predictions(scores)
    kept = [key for key, is_kept in holds.items() if is_kept]
    assert kept == ["a2c-nine-sign", "a2c-nine-cost"]
    assert a2c.evidence(scores) == {"for": True, "against": False}
    monkeypatch.setattr(a2c, "FEWEST", 10)  # tasks that count
    assert set(a2c.verdicts(scores).values()) == {"undecided", "gain"}
    assert a2c.evidence(scores) == {"for": False, "against": False}
    table = pd.read_csv(RESULTS / "predictions.csv", keep_default_na=False)
    registered = table.query("pack == 'a2c/nine' and key != ''")
    assert list(holds) == registered["key"].to_list()


def test_the_second_interval_counts_the_denominators_error():
    """Against many samples, and equal to Welch's where both methods have equal means."""
    rng = np.random.default_rng(0)
    samples = rng.normal(0, [[[1.0]], [[2.0]]], (2, 8, 20_000)) + np.array([[[30]], [[10]]])
    means = samples.mean(axis=1)
    spread = ((means[0] - means[1]) / (means.mean(axis=0) - 1)).std()
    errors = []
    for a, b in samples.transpose(2, 0, 1)[:200]:
        errors.append(nine.effect(a, b, random=1, delta=True).error)
    assert np.mean(errors) == pytest.approx(spread, rel=0.05)
    equal = np.array([4.0, 5, 6]), np.array([3.0, 5, 7])
    assert nine.effect(*equal, random=1, delta=True) == nine.effect(*equal, random=1)
