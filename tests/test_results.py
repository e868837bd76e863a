"""Numbers on the pages of results/ are those of the packed runs there."""

import importlib
import itertools
import re
import shlex
import subprocess
from pathlib import Path

import helpers
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.runs import read_pack, read_progress
from results import commands, common, comparisons, predictions, tables, verdicts

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in tables.PAGES}


def analysis(name):
    """The module of an analysis, such as control/k."""
    return importlib.import_module(f"results.{name.replace('/', '.')}")


def packed(name):
    runs, _ = read_pack(RESULTS / f"{name}-runs.csv.gz")
    return runs


# ---- Tables


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_as_generated_and_tables_of_means_have_markers(page):
    assert tables.with_tables(ROOT / page) == PAGES[page]
    assert not re.findall(r"(?m)^\|.*±.*", tables.MARKED.sub("", PAGES[page]))


# ---- Predictions and verdicts


def test_outcomes_of_predictions_are_those_that_packs_confirm():
    """Those with a key, but for those of tests that have not ended."""
    rows = predictions.table().query("key != ''").set_index("key")
    found = list(predictions.computed())
    assert len(found) == len(dict(found)) > 25
    assert rows.index.is_unique
    assert set(dict(found)) == set(rows.query("outcome != 'open'").index)
    for key, holds in found:
        assert rows["outcome"][key] == ("kept" if holds else "failed"), key


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
        place = (measure, "CrazyClimber", "clean", frozenset(methods))
        assert found[place] == pytest.approx(after)
    assert len(found) == 9


def test_simulated_coverage_is_that_of_todays_statistics():
    """Of the first cell that results/coverage.py simulates."""
    coverage = importlib.import_module("results.coverage")
    scores = coverage.simulate(np.random.default_rng(0), "normal", seeds=3, cells=1)
    found = coverage.difference_outside(scores, coverage.mean_and_variance)
    first = "statistic == 'points' and cells == 1 and seeds == 3 and pair == 'normal'"
    recorded = pd.read_csv(RESULTS / "coverage.csv").query(first)
    assert np.round(found, 1).tolist() == recorded[["above", "below"]].iloc[0].tolist()


def test_verdicts_are_those_that_packs_give():
    assert verdicts.csv_table().to_csv(index=False) == (RESULTS / "verdicts.csv").read_text()


def test_pages_put_the_runs_of_a_list_where_its_commands_do():
    lines = "\n".join(PAGES.values())
    shown = re.findall(
        r"bash (results/\S+\.sh) \| .*python benchmarks/run.py --runs-dir (\S+)", lines
    )
    assert len(shown) == 5
    for script, folder in shown:
        listed = subprocess.check_output(["bash", script], cwd=ROOT, text=True)
        assert set(re.findall(r"--runs-dir (\S+)", listed)) == {folder}


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/*-runs.csv.gz")), ids=lambda x: x.name)
def test_commands_of_packs_are_those_of_todays_scripts(path, monkeypatch):
    """All are accepted, with the recorded method and seed."""
    pack = str(path.relative_to(RESULTS)).removesuffix("-runs.csv.gz")
    listed, left_out = commands.commands_of(pack)
    runs = packed(pack)
    assert len(listed) + len(left_out) == len(runs)
    edited = {"control/three-tasks", "atari/breakout", "atari/epsilon", "text/grpo"}
    assert bool(left_out) == (pack in edited or pack.startswith("text/imdb"))
    kept = runs[~runs["run_name"].isin(left_out)].sort_values("seed", kind="stable")
    pairs = list(zip(listed, kept.itertuples()))
    some = pairs[:: max(1, len(pairs) // 20)]
    for line, run in some:
        script, *words = shlex.split(line)[1:]
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        args = helpers.parse(module, words)
        assert args.seed == int(run.seed)
        assert getattr(args, "noise", run.noise) == run.noise
        assert run.exp_name in (args.exp_name or "sb3-a2c sb3-ppo")


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


@pytest.mark.slow
def test_the_random_agent_plays_the_recorded_games_again():
    played = analysis("atari/random_agent").play("Breakout")
    recorded = pd.read_csv(RESULTS / "atari/random.csv").query("game == 'Breakout'")
    assert np.array_equal(played[["score", "steps"]], recorded[["score", "steps"]])


# ---- The registered test of the nine tasks, on made-up runs


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """The registered test, and made-up scores of six seeds: seed 20007 lacks a run, SPPO on noisy
    Swimmer stopped with seed 20002. SPPO's scores are a tenth above DPPO's, but on noisy
    BipedalWalker, where both are as good as a random agent."""
    test = analysis("control/nine_test")
    random = test.nine.random_scores()
    rng = np.random.default_rng(0)
    rows = []
    for place in itertools.product(test.TASKS, test.NOISES, test.METHODS, test.SEEDS):
        task, noise, method, seed = place
        if place == ("Swimmer-v4", "normal 0.05", "sppo", 20002):
            continue
        above = 0 if (task, noise) == ("BipedalWalker-v3", "normal 0.05") else 1000
        score = random[task] + above * (1.1 if method == "sppo" else 1) + rng.normal(0, 30)
        rows += [[*place, measure, score] for measure in common.MEASURES]
    scores = pd.DataFrame(rows, columns=["task", "noise", "method", "seed", "measure", "score"])
    found = scores.query("seed < 20007 or task != 'Ant-v4'")
    monkeypatch.setattr(test, "read", lambda pack: found)
    stopped = "task,noise,method,seed\nSwimmer-v4,normal 0.05,sppo,20002\n"
    (tmp_path / "control").mkdir()
    (tmp_path / "control/nine-test-stopped.csv").write_text(stopped)
    monkeypatch.setattr(test, "RESULTS", tmp_path)
    return test


def test_the_registered_test_takes_whole_seeds_and_counts_runs_that_stopped(made_up):
    assert sorted(set(made_up.read_scores()["seed"])) == [20002, 20003, 20004, 20005, 20006]
    scores = made_up.scores_of()
    random = made_up.nine.random_scores()
    assert random["Swimmer-v4"] in scores["Swimmer-v4", "normal 0.05", "sppo"]
    values = []
    variances = []
    for task, noise in itertools.product(made_up.TASKS, made_up.NOISES):
        samples = [scores[task, noise, method] for method in ("sppo", "dppo")]
        a, b = (sample.mean() for sample in samples)
        scale = (a + b) / 2 - random[task]
        values.append((a - b) / scale)
        variances.append([sample.var(ddof=1) / 5 / (17 * scale) ** 2 for sample in samples])
    values.pop()  # of noisy BipedalWalker
    variances = np.ravel(variances[:-1])
    freedom = variances.sum() ** 2 / (variances**2 / 4).sum()
    half = variances.sum() ** 0.5 * stats.t.ppf(0.975, freedom)
    assert made_up.each_task().count("(no)") == 1
    found, p, text = made_up.tested(scores)["both together"]
    assert found.value == pytest.approx(np.mean(values)) and p < 0.05
    assert found.half_width() == pytest.approx(half)
    assert text == "seen over both together"
    table = made_up.tests()
    assert table.count("| seen |") == table.count("| undecided |") == 1  # clean, noisy
    holds = made_up.predictions(scores)
    assert [key for key, is_kept in holds.items() if not is_kept] == ["nine-test-counts"]
    registered = predictions.table().query("pack == 'control/nine-test' and key != ''")
    assert list(holds) == registered["key"].to_list()
    assert made_up.evidence(scores) == {"for": True, "against": False}
    first = list(made_up.comparisons())[:3]
    assert [one.tasks for one in first] == [8, 9, 8]  # both together, clean, noisy
    assert [one.verdict() for one in first] == ["seen over both together", "seen", "undecided"]


def test_fewer_than_four_whole_seeds_have_no_registered_test(made_up, monkeypatch):
    four = made_up.read_scores().query("seed <= 20005")
    three = four.query("seed <= 20004")
    monkeypatch.setattr(made_up, "read_scores", lambda: four)
    assert "| p, by Holm | verdict |" in made_up.tests()
    monkeypatch.setattr(made_up, "read_scores", lambda: three)
    assert "verdict" not in made_up.tests() and "| clean | 0.0" in made_up.tests()


def test_the_registered_list_of_a2c_has_all_runs_of_its_test(made_up):
    a2c = analysis("a2c/nine")
    listed = subprocess.check_output(
        ["bash", "results/a2c/nine.sh"], cwd=ROOT, text=True
    ).splitlines()
    script = importlib.import_module("sa2c_continuous")
    runs = [helpers.parse(script, shlex.split(line)[2:]) for line in listed]
    places = [(run.env_id, run.noise, run.exp_name, run.seed) for run in runs]
    wanted = itertools.product(made_up.TASKS, ["none", "normal"], a2c.NAMES, a2c.SEEDS)
    assert sorted(places) == sorted(wanted)
    weights = {(run.exp_name, run.alpha, run.beta, run.total_timesteps) for run in runs}
    assert weights == {("da2c", 1, 0, 1_000_000), ("sa2c", 0.5, 0.5, 1_000_000)}
    assert {run.env_id for run in runs if run.gamma == 0.9999} == {"Swimmer-v4"}


def test_the_registered_test_of_a2c_is_that_of_ppo(made_up, monkeypatch):
    a2c = analysis("a2c/nine")
    expected = made_up.tests()
    names = {ppo: name for name, ppo in a2c.NAMES.items()}
    found = made_up.read("").replace({"method": names})
    found["seed"] += 30000 - 20002
    monkeypatch.setattr(made_up, "read", lambda pack: found)
    (made_up.RESULTS / "a2c").mkdir()
    stopped = "task,noise,method,seed\nSwimmer-v4,normal 0.05,sa2c,30000\n"
    (made_up.RESULTS / "a2c/nine-stopped.csv").write_text(stopped)
    with pytest.raises(AssertionError, match="too few whole seeds"):  # five
        a2c.scores_of()
    monkeypatch.setattr(a2c, "FEWEST", 5)
    scores = a2c.scores_of()
    assert made_up.tests(scores) == expected
    holds = a2c.predictions(scores)
    kept = [key for key, is_kept in holds.items() if is_kept]
    assert kept == ["a2c-nine-sign", "a2c-nine-cost"]
    assert a2c.evidence(scores) == {"for": True, "against": False}
    monkeypatch.setattr(a2c, "FEWEST", 10)  # tasks that count
    assert set(a2c.verdicts(scores).values()) == {"undecided", "seen over both together"}
    assert a2c.evidence(scores) == {"for": False, "against": False}
    registered = predictions.table().query("pack == 'a2c/nine' and key != ''")
    assert list(holds) == registered["key"].to_list()


def test_the_second_interval_counts_the_denominators_error(made_up):
    """Against many samples, and equal to Welch's where both methods have equal means."""
    rng = np.random.default_rng(0)
    samples = rng.normal(0, [[[1.0]], [[2.0]]], (2, 8, 20_000)) + np.array([[[30]], [[10]]])
    means = samples.mean(axis=1)
    spread = ((means[0] - means[1]) / (means.mean(axis=0) - 1)).std()
    errors = []
    for a, b in samples.transpose(2, 0, 1)[:200]:
        parts = made_up.linearised(a, b, random=1)
        errors.append(sum(weight**2 * x.var(ddof=1) / 8 for x, weight in parts) ** 0.5)
    assert np.mean(errors) == pytest.approx(spread, rel=0.05)
    equal = np.array([4.0, 5, 6]), np.array([3.0, 5, 7])
    assert made_up.linearised(*equal, random=1) == made_up.nine.effect(*equal, 1)


@pytest.mark.parametrize(
    ("low", "value", "high", "p", "first_p", "verdict"),
    [
        (0.1, 0.2, 0.3, 0.04, 0.04, "seen"),
        (-0.3, -0.2, -0.1, 0.04, 0.04, "reversed"),
        (0.1, 0.2, 0.3, 0.04, 0.06, "leaning for, its test failed"),
        (0.1, 0.2, 0.3, 0.06, 0.04, "leaning for, its test failed"),
        (-0.3, -0.2, -0.1, 0.01, 0.06, "leaning against, its test failed"),
        (-0.1, 0.0, 0.09, 0.9, 0.04, "not seen"),
        (-0.1, 0.0, 0.11, 0.9, 0.04, "undecided"),
    ],
)
def test_a_verdict_is_the_first_that_holds(low, value, high, p, first_p, verdict):
    """A registered one needs two tests."""
    found = comparisons.Interval(value, low, high)
    assert analysis("control/nine_test").verdict(found, p, first_p) == verdict
    other = comparisons.Comparison("1", "", "k", found, 8, corrected=max(p, first_p))
    assert other.verdict() == verdict.removesuffix(", its test failed")
