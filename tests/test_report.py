"""report.py: numbers against hand-computed ones, and what it refuses."""

import json
import math
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import tyro
from helpers import SETTINGS, SPPO_CONTINUOUS
from rliable import metrics
from scipy import stats
from torch.utils.tensorboard import SummaryWriter

import report
import sppo_continuous
import sppo_rlhf

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {setting.script.__name__: setting.script for setting in SETTINGS}
HARDWARE = {"platform": "Linux", "cpu": "AVX2", "cores": 2, "gpu": False}


def make_run(
    runs: Path,
    name: str,
    script: str,
    score: float,
    seed: int = 10000,
    logged=None,
    curve=None,
    **flags,
):
    """A folder as the script leaves it, with settings from its own defaults, and this score."""
    flags = {
        "runs_dir": str(runs / "made"),
        "run_name": name,
        "seed": seed,
        "total_timesteps": 4096,
        "eval_freq": 2048,
    } | flags
    steps = [2048, 4096]
    if script == "sppo_rlhf":
        flags |= {"eval_freq": 0, "batch_size": 4096}
        steps = [0, 4096]
    elif script != "sppo_continuous":
        flags |= {"num_envs": 16, "num_steps": 128}
    if script == "sppo_rlhf":
        args = vars(sppo_rlhf.TASKS[flags["task"]]) | {"noise_level": 0.0}
        args |= {"env_id": flags["task"]} | flags
        args |= {"algo": "sppo", "alpha": 0.5} if args["beta"] else {"algo": "ppo", "alpha": 1.0}
    else:
        args = SCRIPTS[script].prepare(SCRIPTS[script].Args(**flags))
        args = {"algo": args.algo} | vars(args)
        shutil.rmtree(runs / "made")
    folder = runs / name
    folder.mkdir(parents=True)
    recorded = {
        "args": args,
        "command": [f"{script}.py", "--seed", str(seed)],
        "commit": "abc",
        "versions": {},
    }
    (folder / "args.json").write_text(json.dumps(recorded | {"hardware": HARDWARE}))
    summary = {"script": f"{script}.py"} | args | {
        "final_return_mean": float(score), "final_return_std": 1.0, "finished": True,
        "train_return_last100": score / 2, "sps": 1000.0, "wall_s": 36.0,
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    rows = {
        "step": steps,
        "return_mean": [0.0, score],
        "return_std": 1.0,
        "length_mean": 9,
        "episodes": 10,
    }
    pd.DataFrame(rows | (curve or {})).to_csv(folder / "progress.csv", index=False)
    if logged:
        with SummaryWriter(folder) as writer:
            for tag, values in logged.items():
                for i, value in enumerate(values):
                    writer.add_scalar(tag, value, 2048 * (i + 1))
    return folder


SCORES = {  # {row: scores of three seeds in each of two tasks}
    "dppo": ([10, 12, 14], [50, 60, 70]),
    "norm": ([11, 13, 15], [40, 80, 90]),
    "sppo": ([30, 31, 32], [55, 65, 100]),
}
FLAGS = {"dppo": {"beta": 0.0}, "norm": {"beta": 0.0, "max_grad_norm": 0.0244}, "sppo": {}}
TASKS = "InvertedDoublePendulum-v4", "LunarLanderContinuous-v3"


def make_grid(runs: Path, rows=FLAGS, **flags) -> Path:
    for row in rows:
        for env_id, scores in zip(TASKS, SCORES[row]):
            for seed, score in enumerate(scores):
                name = f"{env_id}-{row}-{seed}"
                make_run(
                    runs, name, "sppo_continuous", score, seed, env_id=env_id, **FLAGS[row], **flags
                )
    return runs


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """Three methods on two tasks with three seeds, and the report of them."""
    folder = tmp_path_factory.mktemp("grid")
    make_grid(folder / "runs")
    report.main(report.Args(runs=(folder / "runs",), out=folder / "report", reps=200))
    return folder


def lines(folder: Path) -> list[list[str]]:
    """Cells of all table rows of a report."""
    text = (folder / "report.md").read_text()
    return [
        [cell.strip() for cell in line.strip("| ").split(" | ")]
        for line in text.splitlines()
        if line[:1] == "|"
    ]


def test_tables_show_mean_and_standard_error_and_bold_only_what_is_significant(grid):
    """[10, 12, 14] has mean 12 and standard error 2 / sqrt(3) = 1.155; 31 is better than 13 (t =
    14) and 12; on the other task the best, 73.33, is not better than 60 (t = .85)."""
    found = lines(grid / "report")
    assert (
        "| DPPO | DPPO, max-grad-norm 0.0244 | SPPO |"
        in (grid / "report" / "report.md").read_text()
    )
    assert [TASKS[0], "12.0 ± 1.2", "13.0 ± 1.2", "**31.0 ± 0.6**"] in found
    assert [TASKS[1], "60.0 ± 5.8", "70.0 ± 15.3", "73.3 ± 13.6"] in found
    assert [TASKS[0], "6.00 ± 0.58", "6.50 ± 0.58", "15.5 ± 0.3"] in found  # training; never bold


def test_csv_tables_agree_with_numpy(grid):
    tables = pd.read_csv(grid / "report" / "tables.csv").set_index(["env_id", "method"])
    names = {"dppo": "DPPO", "norm": "DPPO, max-grad-norm 0.0244", "sppo": "SPPO"}
    for row, name in names.items():
        for env_id, scores in zip(TASKS, SCORES[row]):
            cell = tables.loc[env_id, name]
            assert cell["mean"] == pytest.approx(np.mean(scores), rel=1e-5)
            assert cell["sem"] == pytest.approx(np.std(scores, ddof=1) / math.sqrt(3), rel=1e-5)
            assert (cell["seeds"], cell["missing"]) == (3, 0)
    runs = pd.read_csv(grid / "report" / "runs.csv")
    assert len(runs) == 18 and set(runs["command"]) == {
        f"python sppo_continuous.py --seed {i}" for i in range(3)
    }
    assert set(runs["commit"]) == {"abc"}
    assert len(pd.read_csv(grid / "report" / "curves.csv")) == 36


def differences_in(grid, quantity):
    differences = pd.read_csv(grid / "report" / "differences.csv")
    differences = differences[differences["quantity"] == quantity]
    return differences.set_index(["env_id", "method", "minus"])


def test_differences_by_welch(grid):
    """Welch's formula, by hand, for SPPO [55, 65, 100] minus DPPO [50, 60, 70]."""
    differences = differences_in(grid, "return")
    d = differences.loc[TASKS[1], "SPPO", "DPPO"]
    a, b = 1675 / 3 / 3, 100 / 3  # variances of the means
    t = (73 + 1 / 3 - 60) / math.sqrt(a + b)
    freedom = (a + b) ** 2 / (a**2 / 2 + b**2 / 2)
    assert d["difference"] == pytest.approx(40 / 3, rel=1e-5) and d["sem"] == pytest.approx(
        math.sqrt(a + b), rel=1e-5
    )
    assert d["p"] == pytest.approx(2 * stats.t.sf(t, freedom), rel=1e-4)
    half = stats.t.ppf(0.975, freedom) * math.sqrt(a + b)
    assert (d["low"], d["high"]) == pytest.approx((40 / 3 - half, 40 / 3 + half), rel=1e-5)
    assert len(differences) == 6  # three pairs in each of two tasks
    compared = differences[differences["compared"]].reset_index()
    assert set(compared["method"]) == {"SPPO"}
    assert differences["compared"].sum() == 4


def test_differences_in_training(grid):
    """The returns in training of these runs are half of those of the last evaluation."""
    d = differences_in(grid, "train").loc[TASKS[1], "SPPO", "DPPO"]
    evaluation = differences_in(grid, "return").loc[TASKS[1], "SPPO", "DPPO"]
    for name in ("difference", "sem", "low", "high", "paired_low", "paired_high"):
        assert d[name] == pytest.approx(evaluation[name] / 2, rel=1e-5)
    assert d["p"] == pytest.approx(evaluation["p"], rel=1e-4)
    row = [TASKS[1], "clean", "training", "SPPO minus DPPO", "6.67 ± 7.41"]
    assert row in [found[:5] for found in lines(grid / "report")]


def test_mean_of_the_last_five_evaluations(tmp_path):
    """DPPO 3, SPPO 8 in the last five of ten evaluations, though both end at 10. With nine
    evaluations there is no such mean."""
    endings = {"dppo": [1.0, 0.0, 1.0, 3.0, 10.0], "sppo": [9.0, 7.0, 8.0, 6.0, 10.0]}
    for count in (9, 10):
        total = 2048 * count
        steps = list(range(2048, total + 1, 2048))
        for row, ending in endings.items():
            returns = [100.0] * (count - 5) + ending
            for seed in (0, 1):
                make_run(
                    tmp_path / f"{count}", f"{row}-{seed}", "sppo_continuous", 10.0, seed,
                    curve={"step": steps, "return_mean": returns}, env_id=TASKS[0],
                    total_timesteps=total, **FLAGS[row],
                )  # fmt: skip
        out = tmp_path / f"report-{count}"
        report.main(report.Args(runs=(tmp_path / f"{count}",), out=out, reps=10))
    assert [TASKS[0], "3.00 ± 0.00", "8.00 ± 0.00"] in lines(tmp_path / "report-10")
    differences = pd.read_csv(tmp_path / "report-10" / "differences.csv")
    of_last5 = differences[differences["quantity"] == "last5"]
    assert list(of_last5["difference"]) == [5.0]
    assert "five" not in (tmp_path / "report-9" / "report.md").read_text()


def test_welch_with_a_sample_that_has_no_variance():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        p, low, high = report.welch([1.0, 1.0, 1.0], [0.1, 0.2, 0.3])
    half = stats.t.ppf(0.975, 2) * 0.1 / math.sqrt(3)  # as of one sample
    assert p < 0.01
    assert (low, high) == pytest.approx((0.8 - half, 0.8 + half))


def test_welch_says_nothing_of_two_samples_without_variance():
    assert np.isnan(report.welch([1000.0, 1000.0], [999.5, 999.5])).all()


def test_paired_differences_by_seed(grid):
    """SPPO [55, 65, 100] minus DPPO [50, 60, 70], seed by seed: 5, 5, 30."""
    differences = differences_in(grid, "return")
    d = differences.loc[TASKS[1], "SPPO", "DPPO"]
    sem = np.std([5, 5, 30], ddof=1) / 3**0.5
    assert d["paired_sem"] == pytest.approx(sem, rel=1e-5)
    low, high = stats.t.interval(0.95, 2, 40 / 3, sem)
    assert (d["paired_low"], d["paired_high"]) == pytest.approx((low, high), rel=1e-5)
    row = [TASKS[1], "clean", "last evaluation", "SPPO minus DPPO"]
    (shown,) = [found for found in lines(grid / "report") if found[:4] == row]
    assert shown[4:] == ["13.3 ± 14.8", "-37 to 64", "0.441", "-23 to 49"]


def test_significant_differences_are_corrected_for_their_number(grid):
    """By Benjamini and Hochberg's rule: of m sorted p-values, those up to the largest that is at
    most 5 % times its rank / m."""
    p = [0.001, 0.012, 0.03, 0.035, 0.2, 0.9]
    tested = pd.read_csv(grid / "report" / "differences.csv").iloc[: len(p)].assign(p=p[::-1])
    ranks = range(1, len(p) + 1)
    last = max(rank for rank in ranks if p[rank - 1] <= 0.05 * rank / len(p))
    assert last == 2  # the plain rule would have four
    text = report.chance_text(tested)
    assert ": 6 differences, of which 4 have p < 0.05; chance alone would give 0.3. " in text
    assert "5 %), significant: 2: " in text
    for _, row in tested.iloc[-last:].iterrows():
        assert f"{row['method']} minus {row['minus']} ({row['env_id']}, " in text
    assert text.count(" minus ") == last
    assert ": 12 differences, " in (grid / "report" / "report.md").read_text()


def test_logged_quantities_are_not_counted_among_the_differences(tmp_path):
    """Two methods are compared in two measures; their entropies, too, but these do not count."""
    for beta in (0.0, 20.0):
        for seed in range(3):
            flags = {"logged": {"losses/entropy": (beta, 1.0 + beta)}, "beta": beta}
            name, score = f"{beta}-{seed}", beta + seed
            make_run(tmp_path / "runs", name, "sppo_continuous", score, seed, **flags)
    out = tmp_path / "report"
    report.main(report.Args((tmp_path / "runs",), out=out, reps=50, logged=("losses/entropy",)))
    assert "losses/entropy" in set(pd.read_csv(out / "differences.csv")["quantity"])
    assert ": 2 differences, " in (out / "report.md").read_text()


def test_corrected_rewards_are_compared_with_all_others(tmp_path):
    """Whether their names come before or after in the alphabet."""
    rows = {"dppo": {}, "corrected": {"correct_flips": True}, "norm": {"max_grad_norm": 0.1}}
    for row, flags in rows.items():
        for seed in (0, 1):
            flags = flags | {"beta": 0.0, "noise": "flip"}
            make_run(
                tmp_path / "runs", f"{row}-{seed}", "sppo_continuous", 5.0 + seed, seed, **flags
            )
    report.main(report.Args(runs=(tmp_path / "runs",), out=tmp_path / "report", reps=50))
    page = (tmp_path / "report" / "report.md").read_text()
    assert "DPPO, correct-flips minus DPPO |" in page
    assert "DPPO, correct-flips minus DPPO, max-grad-norm 0.1 |" in page
    assert "minus DPPO, correct-flips" not in page


def test_statistics_over_all_tasks(grid):
    """Scores normalised by the worst and best of a task; interquartile mean: without the lowest and
    the highest of six; probability of improvement: pairs, counted, ties half."""
    aggregates = pd.read_csv(grid / "report" / "aggregates.csv").set_index("method")
    normalised = {
        row: [(x - 10) / 22 for x in scores[0]] + [(x - 40) / 60 for x in scores[1]]
        for row, scores in SCORES.items()
    }
    names = {"dppo": "DPPO", "norm": "DPPO, max-grad-norm 0.0244", "sppo": "SPPO"}
    for row, name in names.items():
        cell = aggregates.loc[name]
        assert cell["value"] == pytest.approx(np.mean(sorted(normalised[row])[1:-1]), rel=1e-5)
        assert cell["low"] <= cell["value"] <= cell["high"] and cell["low"] < cell["high"]
        if row != "sppo":
            shares = [
                np.mean(
                    [(x > y) + 0.5 * (x == y) for x in SCORES["sppo"][i] for y in SCORES[row][i]]
                )
                for i in (0, 1)
            ]
            assert aggregates.loc[f"SPPO > {name}", "value"] == pytest.approx(
                np.mean(shares), rel=1e-5
            )


def test_figures_are_there_and_shown(grid):
    text = (grid / "report" / "report.md").read_text()
    for name in (
        "curves-continuous-ppo-clean",
        "differences-continuous-ppo",
        "aggregates-continuous-ppo",
    ):
        assert (grid / "report" / f"{name}.png").stat().st_size > 10_000
        assert "<svg" in (grid / "report" / f"{name}.svg").read_text()
        assert f"({name}.png)" in text


def test_equal_runs_give_equal_bytes(grid, tmp_path):
    report.main(report.Args(runs=(grid / "runs",), out=tmp_path / "report", reps=200))
    for path in (grid / "report").glob("*.[cm]*"):
        assert path.read_bytes() == (tmp_path / "report" / path.name).read_bytes()


def test_missing_seeds_are_said_and_not_averaged_over(tmp_path):
    runs = make_grid(tmp_path / "runs")
    shutil.rmtree(runs / f"{TASKS[0]}-dppo-1")
    (runs / f"{TASKS[1]}-norm-2" / "summary.json").unlink()
    report.main(report.Args(runs=(runs,), out=tmp_path / "report", reps=200))
    found, text = lines(tmp_path / "report"), (tmp_path / "report" / "report.md").read_text()
    assert [TASKS[0], "2 of 3 seeds", "13.0 ± 1.2", "31.0 ± 0.6"] in found  # not bold: who knows
    assert [TASKS[1], "60.0 ± 5.8", "2 of 3 seeds", "73.3 ± 13.6"] in found
    assert "2 of 6 cells lack seeds; 1 runs have begun and not finished" in text
    assert f"{TASKS[1]}-norm-2" in text
    aggregates = pd.read_csv(tmp_path / "report" / "aggregates.csv")
    assert list(aggregates["method"]) == ["SPPO"] and "DPPO, PPO clean" in text
    differences = pd.read_csv(tmp_path / "report" / "differences.csv")
    assert differences.groupby("quantity")["compared"].sum().to_dict() == {"return": 2, "train": 2}
    tables = pd.read_csv(tmp_path / "report" / "tables.csv")
    assert (
        list(tables["missing"]) == list(tables["mean"].isna().astype(int))
        and sum(tables["missing"]) == 2
    )


def test_a_benchmark_that_was_broken_off_compares_on_the_seeds_that_all_have(grid, tmp_path):
    """One run of a fourth seed has finished and one begun."""
    runs = tmp_path / "runs"
    shutil.copytree(grid / "runs", runs)
    for row in ("sppo", "dppo"):
        make_run(
            runs, f"{TASKS[0]}-{row}-3", "sppo_continuous", 99.0, 3, env_id=TASKS[0], **FLAGS[row]
        )
    (runs / f"{TASKS[0]}-dppo-3" / "summary.json").unlink()
    report.main(report.Args(runs=(runs,), out=tmp_path / "report", reps=200, seeds=3))
    for name in ("tables", "differences", "aggregates", "runs"):
        assert (tmp_path / "report" / f"{name}.csv").read_bytes() == (
            grid / "report" / f"{name}.csv"
        ).read_bytes()
    report.main(report.Args(runs=(runs,), out=tmp_path / "report", reps=200))
    assert [TASKS[1], "3 of 4 seeds", "3 of 4 seeds", "3 of 4 seeds"] in lines(tmp_path / "report")


def test_seeds_are_counted_by_kind_of_task(tmp_path):
    """Continuous control has the seeds 0 to 2, Atari 2 to 4, and one run of seed 2 has begun."""
    for seed in range(3):
        make_run(tmp_path / "runs", f"c{seed}", "sppo_continuous", seed, seed)
        make_run(tmp_path / "runs", f"a{seed}", "sppo_atari", seed, 2 + seed, env_id="Pong")
    begun = make_run(tmp_path / "runs", "begun", "sppo_continuous", 1.0, 2, beta=0.0)
    (begun / "summary.json").unlink()
    runs, unfinished = report.read_runs([tmp_path / "runs"], ())
    selected, still = report.select_seeds(report.label_methods(runs), unfinished, 2)
    assert sorted(selected["name"]) == ["a0", "a1", "c0", "c1"] and still == []


def test_an_unfinished_run_is_a_missing_seed(tmp_path):
    for seed in range(3):
        make_run(tmp_path / "runs", str(seed), "sppo_continuous", 1.0 + seed, seed)
    (tmp_path / "runs" / "2" / "summary.json").unlink()
    report.main(report.Args(runs=(tmp_path / "runs",), out=tmp_path / "report", reps=50))
    assert ["Hopper-v4", "2 of 3 seeds"] in lines(tmp_path / "report")


def test_an_unfinished_rival_keeps_the_others_from_being_bold(tmp_path):
    """Its first seed has begun, so that it has no cell yet."""
    runs = make_grid(tmp_path / "runs", rows=["dppo", "sppo"])
    make_run(runs, "rival", "sppo_continuous", 0.0, 0, env_id=TASKS[0], **FLAGS["norm"])
    (runs / "rival" / "summary.json").unlink()
    report.main(report.Args(runs=(runs,), out=tmp_path / "report", reps=50))
    assert [TASKS[0], "12.0 ± 1.2", "31.0 ± 0.6"] in lines(tmp_path / "report")


@pytest.mark.parametrize("script", ["sppo_mine", "reinforce"])
def test_an_unfinished_run_of_another_script_is_a_rival_too(script, tmp_path):
    """Its arguments do not say which algorithm it is."""
    runs = make_grid(tmp_path / "runs", rows=["dppo", "sppo"])
    out = tmp_path / "report"
    report.main(report.Args(runs=(runs,), out=out, reps=50))
    assert [TASKS[0], "12.0 ± 1.2", "**31.0 ± 0.6**"] in lines(out)
    make_run(runs, "rival", "sppo_continuous", 0.0, 0, env_id=TASKS[0], **FLAGS["norm"])
    (runs / "rival" / "summary.json").unlink()

    def rename(recorded):
        recorded["command"][0] = f"{script}.py"
        del recorded["args"]["algo"]

    edit(runs / "rival" / "args.json", rename)
    report.main(report.Args(runs=(runs,), out=out, reps=50))
    assert [TASKS[0], "12.0 ± 1.2", "31.0 ± 0.6"] in lines(out)


def test_probability_of_improvement_is_rliables():
    rng = np.random.default_rng(0)
    for _ in range(20):
        x, y = rng.integers(0, 4, (5, 3)), rng.integers(0, 4, (4, 3))
        expected = metrics.probability_of_improvement(x, y)
        np.testing.assert_allclose(report.probability_of_improvement(x, y), [expected])


def test_atari_is_normalised_by_a_human(tmp_path):
    for game, low, high in (("Breakout", 1.7, 30.5), ("Pong", -20.7, 14.6)):
        for seed, share in enumerate((0.25, 0.5, 0.75)):
            for beta, bonus in ((0.0, 0.0), (1.0, 1.0)):
                flags = dict(env_id=game, beta=beta)
                score = low + (share + bonus) * (high - low)
                make_run(tmp_path, f"{game}{seed}{beta}", "sppo_atari", score, seed, **flags)
    runs = report.label_methods(report.read_runs([tmp_path], ())[0])
    aggregates, left_out = report.make_aggregates(report.make_cells(runs, []), reps=50)
    values = aggregates.set_index("method")["value"]
    assert values["PPO"] == pytest.approx(0.5) and values["SPPO"] == pytest.approx(1.5)
    assert values["SPPO > PPO"] == 1 and not left_out


def aggregates_of(runs: Path):
    labelled = report.label_methods(report.read_runs([runs], ())[0])
    return report.make_aggregates(report.make_cells(labelled, []), reps=50)[0]


def test_a_game_without_a_human_score_leaves_no_statistic_over_games(tmp_path):
    for game in ("Breakout", "Adventure"):
        for seed in (0, 1):
            make_run(tmp_path, f"{game}{seed}", "sppo_atari", 1.0 + seed, seed, env_id=game)
        assert len(aggregates_of(tmp_path)) == (game == "Breakout")


def test_one_seed_gives_no_statistics_over_tasks(tmp_path):
    for task in TASKS:
        make_run(tmp_path, task, "sppo_continuous", len(task), 0, env_id=task)
    assert aggregates_of(tmp_path).empty


def test_scores_of_incomplete_cells_do_not_count_in_normalisation(tmp_path):
    make_grid(tmp_path)
    before = aggregates_of(tmp_path)["value"]
    make_run(tmp_path, "a", "sppo_continuous", 1e6, 0, env_id=TASKS[0], layer_norm=True)
    pd.testing.assert_series_equal(aggregates_of(tmp_path)["value"], before)


def test_human_scores_cover_the_games_of_the_benchmark():
    listed = subprocess.run(
        [ROOT / "benchmark.sh", "atari", "--dry-run", "--seeds", "1"],
        capture_output=True,
        text=True,
        check=True,
    )
    games = {line.split("--env-id ")[1].split()[0] for line in listed.stdout.splitlines()[1:]}
    assert games == report.RANDOM_AND_HUMAN.keys()
    assert all(low < high for low, high in report.RANDOM_AND_HUMAN.values())


@pytest.mark.parametrize(
    "script, flags, method",
    [
        ("sppo_continuous", {}, "SPPO"),
        ("sppo_continuous", {"policy": "gaussian"}, "PPO"),
        ("sppo_continuous", {"beta": 0.0}, "DPPO"),
        ("sppo_continuous", {"alpha": 20.5, "beta": 0.0}, "DPPO, alpha 20.5"),
        ("sppo_continuous", {"layer_norm": True}, "SPPO, layer-norm"),
        ("sppo_continuous", {"beta": 0.0, "learning_rate": 1e-4}, "DPPO, learning-rate 0.0001"),
        ("sppo_atari", {"env_id": "Pong", "beta": 0.0, "norm_adv": False}, "PPO, no-norm-adv"),
        (
            "sppo_atari",
            {"env_id": "Pong", "beta": 0.0, "vf_coef": 1 / 3, "ent_coef": 0.01 / 1.5},
            "PPO, vf-coef 0.333, ent-coef 0.00667",
        ),
        ("sa2c_continuous", {}, "SA2C"),
        ("sppo_continuous", {"z": -5.0}, "SPPO, z -5"),
        ("sa2c_atari", {"env_id": "Pong", "beta": 0.0}, "A2C"),
        ("sa2c_atari", {"env_id": "Pong", "rmsprop_eps": 1e-10}, "SA2C, rmsprop-eps 1e-10"),
        ("sppo_rlhf", {"task": "imdb"}, "SPPO"),
        ("sppo_rlhf", {"task": "imdb", "adam_eps": 1e-8}, "SPPO, adam-eps 1e-08"),
        ("sppo_rlhf", {"task": "tldr", "beta": 0.0, "ce_coef": 0.2}, "PPO, ce-coef 0.2"),
        ("sppo_rlhf", {"task": "imdb", "reward_model": ["a", "b"], "reward_aggregate": "min"},
         "SPPO, reward-model x 2, reward-aggregate min"),
        ("sppo_rlhf", {"task": "imdb", "reward_model": ["a"]}, "SPPO, reward-model a"),
    ],
)  # fmt: skip
def test_methods_are_named_by_what_they_are(script, flags, method, tmp_path):
    """One run alone, without others that might tell what is usual."""
    make_run(tmp_path, "run", script, 1.0, **flags)
    runs = report.label_methods(report.read_runs([tmp_path], ())[0])
    assert list(runs["method"]) == [method]


def test_what_all_runs_share_is_said_once_and_not_in_names(tmp_path):
    flags = {"learning_rate": 1e-4, "layer_norm": True, "noise": "normal"}
    flags |= {"gamma": 0.9, "hidden_sizes": [8, 9]}
    rows = {"a": {}, "b": {"beta": 0.0}, "c": {"beta": 0.0, "max_grad_norm": 0.5 / 20.5}}
    for name, row in rows.items():
        make_run(tmp_path / "runs", name, "sppo_continuous", 1.0, **flags, **row)
    report.main(report.Args(runs=(tmp_path / "runs",), out=tmp_path / "report", reps=50))
    page = (tmp_path / "report" / "report.md").read_text()
    assert "| DPPO | DPPO, max-grad-norm / k | SPPO |" in page
    said = "have learning-rate 0.0001, layer-norm, gamma 0.9, hidden-sizes 8 9, total-timesteps"
    assert page.count("layer-norm") == page.count(said) == 1
    assert f"All runs of `sppo_continuous.py` {said} 4096." in page


def test_alphas_are_told_apart(tmp_path):
    for name, alpha in (("a", 0.5), ("b", 1.0)):
        make_run(tmp_path, name, "sppo_continuous", 1.0, alpha=alpha)
    runs = report.label_methods(report.read_runs([tmp_path], ())[0])
    assert set(runs["method"]) == {"SPPO, alpha 0.5", "SPPO, alpha 1"}


def test_single_factors_are_told_by_k_and_its_twin_does_not_compete(tmp_path):
    """k = .5 + 20 = 20.5. The twin is as good as SPPO, which is bold nevertheless."""
    rows = {
        "SPPO": {}, "DPPO": {"beta": 0.0}, "DPPO, alpha k": {"beta": 0.0, "alpha": 20.5},
        "DPPO, max-grad-norm / k": {"beta": 0.0, "max_grad_norm": 0.0243902},
        "DPPO, vf-coef / k": {"beta": 0.0, "vf_coef": 0.0243902},
        "DPPO, max-grad-norm 0.0244": {"beta": 0.0, "max_grad_norm": 0.0244},
    }  # fmt: skip
    for i, (method, flags) in enumerate(rows.items()):
        for seed in range(3):
            score = seed / 10 + (10 if method in ("SPPO", "DPPO, alpha k") else 1)
            make_run(tmp_path / "runs", f"{i}-{seed}", "sppo_continuous", score, seed, **flags)
    report.main(report.Args(runs=(tmp_path / "runs",), out=tmp_path / "report", reps=50))
    tables = pd.read_csv(tmp_path / "report" / "tables.csv").set_index("method")
    assert set(tables.index) == rows.keys()
    assert list(tables.index[tables["best"]]) == ["SPPO"]
    plain = pd.read_csv(tmp_path / "report" / "table-continuous-ppo-clean-evaluation.csv")
    assert plain.loc[0, "SPPO"] == "10.1 ± 0.1" and list(plain["env_id"]) == ["Hopper-v4"]


@pytest.mark.parametrize(
    "script, first, second, key",
    [
        (
            "sppo_continuous",
            {"max_grad_norm": 0.02441},
            {"max_grad_norm": 0.02442},
            "max_grad_norm",
        ),
        ("sppo_rlhf", {"reward_model": ["a", "b"]}, {"reward_model": ["a", "c"]}, "reward_model"),
    ],
)
def test_settings_that_look_alike_are_not_mixed(script, first, second, key, tmp_path):
    task = {"task": "imdb"} if script == "sppo_rlhf" else {}
    for seed, flags in enumerate((first, second)):
        make_run(tmp_path, str(seed), script, 1.0, seed, **task, **flags)
    with pytest.raises(ValueError, match=f"0 and 1 differ in {key}"):
        report.label_methods(report.read_runs([tmp_path], ())[0])


def test_tasks_and_methods_with_settings_of_their_own_are_no_sweep(tmp_path):
    other = {"learning_rate": 1e-4, "clip_coef": 0.1}
    settings = {"dppo": {"beta": 0.0}, "sppo": {"beta": 20.0, "update_epochs": 5}}
    for env_id, flags in zip(TASKS, ({}, other)):
        for name, own in settings.items():
            folder = make_run(
                tmp_path / "runs", f"{name} {env_id}", "sppo_continuous", 1.0, env_id=env_id,
                **flags, **own,
            )  # fmt: skip
            if name == "sppo":
                rename_script(folder, "sppo_mine.py")
    report.main(report.Args(runs=(tmp_path / "runs",), out=tmp_path / "report", reps=50))
    assert {TASKS[0], TASKS[1]} <= {row[0] for row in lines(tmp_path / "report")}
    assert not list((tmp_path / "report").glob("sweep*"))


def test_a_difference_from_a_run_that_lacks_the_quantity_is_blank(tmp_path):
    """DPPO's first seed has not finished an episode in training."""
    for seed in (0, 1, 2):
        make_run(tmp_path / "runs", f"s{seed}", "sppo_continuous", 8.0 + seed, seed)
        make_run(tmp_path / "runs", f"d{seed}", "sppo_continuous", 4.0 + seed, seed, beta=0.0)
    edit(tmp_path / "runs" / "d0" / "summary.json", lambda s: s.update(train_return_last100=None))
    report.main(report.Args(runs=(tmp_path / "runs",), out=tmp_path / "report", reps=50))
    differences = pd.read_csv(tmp_path / "report" / "differences.csv").set_index("quantity")
    figures = ["difference", "sem", "low", "high", "paired_sem", "paired_low", "paired_high"]
    assert differences.loc["return", figures].notna().all()
    assert differences.loc["train", figures].isna().all()


@pytest.mark.parametrize(
    "low, high, text",
    [
        (-4.3, 12.3, "-4 to 12"),
        (-0.312, 0.418, "-0.31 to 0.42"),
        (1234.5, 2345.6, "1,234 to 2,346"),
        (0.5, 0.5, "0.50 to 0.50"),
        (-2.5, -2.5, "-2.5 to -2.5"),
        (0.0, 0.0, "0 to 0"),
        (math.nan, math.nan, ""),
    ],
)
def test_intervals_are_rounded_to_two_digits_of_their_length(low, high, text):
    assert report.interval_text(low, high) == text


@pytest.mark.parametrize("seeds", [0, -1])
def test_numbers_of_seeds_below_one_are_refused(seeds, grid, tmp_path):
    with pytest.raises(report.Refusal, match=f"--seeds {seeds}: must be at least 1"):
        report.main(report.Args(runs=(grid / "runs",), out=tmp_path / "report", seeds=seeds))


@pytest.mark.parametrize(
    "arguments, message",
    [({"runs": ()}, "no runs; give folders of runs"), ({"reps": 0}, "--reps 0: must be at least")],
)
def test_a_report_of_nothing_is_refused(arguments, message, grid, tmp_path):
    wanted = {"runs": (grid / "runs",), "out": tmp_path / "report"} | arguments
    with pytest.raises(report.Refusal, match=message):
        report.main(report.Args(**wanted))


def test_a_report_replaces_no_runs(grid, tmp_path):
    """Neither those that it reads, nor those that it keeps, nor any others."""
    out = tmp_path / "report"
    with pytest.raises(report.Refusal, match="--keep .*: inside --out"):
        report.main(report.Args(runs=(grid / "runs",), out=out, keep=out / "kept", reps=50))
    assert not out.exists()
    shutil.copytree(grid / "report", out)
    shutil.copytree(grid / "runs", out / "kept")
    for runs in (out / "kept", grid / "runs"):
        with pytest.raises(report.Refusal, match="a folder that is not a report"):
            report.main(report.Args(runs=(runs,), out=out, reps=50))
    assert len(list((out / "kept").glob("*/summary.json"))) == 18


def test_a_logged_quantity_that_no_run_has_is_refused(tmp_path):
    """But not those of the default, which A2C's runs do not have."""
    make_run(tmp_path / "runs", "a", "sa2c_continuous", 1.0, logged={"losses/entropy": (1.0, 2.0)})
    arguments = {"runs": (tmp_path / "runs",), "reps": 50}
    report.main(report.Args(**arguments, out=tmp_path / "default"))
    misspelt = report.Args(**arguments, out=tmp_path / "misspelt", logged=("losses/entrpy",))
    with pytest.raises(report.Refusal, match="--logged losses/entrpy: no finished run logged it"):
        report.main(misspelt)
    assert not (tmp_path / "misspelt").exists()


def test_any_logged_quantity(tmp_path):
    for seed, values in enumerate(((0.1, 0.2), (0.3, 0.4))):
        logged = {"losses/advantage_sign_flips": values, "losses/entropy": (1.0, 2.0)}
        make_run(tmp_path / "runs", str(seed), "sppo_continuous", 1.0, seed, logged=logged)
    out = tmp_path / "report"
    report.main(report.Args(runs=(tmp_path / "runs",), out=out, reps=50))
    cell = pd.read_csv(out / "tables.csv").iloc[0]
    assert cell["losses/advantage_sign_flips_mean"] == pytest.approx(0.25)
    assert cell["losses/advantage_sign_flips_sem"] == pytest.approx(0.1)
    assert ["Hopper-v4", "0.250 ± 0.100"] in lines(out)
    assert (out / "logged-losses-advantage_sign_flips-continuous-ppo-clean.svg").exists()
    assert not list(out.glob("*entropy*"))
    report.main(
        report.Args(runs=(tmp_path / "runs",), out=out, reps=50, logged=("losses/entropy",))
    )
    assert pd.read_csv(out / "tables.csv").iloc[0]["losses/entropy_mean"] == pytest.approx(1.5)
    assert (out / "logged-losses-entropy-continuous-ppo-clean.svg").exists()


def test_what_a_method_did_not_log_is_left_blank(tmp_path):
    for name, flags in (("a", {}), ("b", {"beta": 0.0})):
        logged = {"losses/entropy": (1.0, 2.0)} if name == "a" else None
        make_run(tmp_path / "runs", name, "sppo_continuous", 1.0, logged=logged, **flags)
    arguments = {"reps": 50, "logged": ("losses/entropy",)}
    report.main(report.Args(runs=(tmp_path / "runs",), out=tmp_path / "report", **arguments))
    assert "| Hopper-v4 |  | 1.50 |" in (tmp_path / "report" / "report.md").read_text()


def test_kept_runs_give_the_same_report(tmp_path):
    for seed, shares in enumerate(((0.1, 0.2), (0.3, 0.4))):
        logged = {"losses/clipped_gradients": shares}
        make_run(tmp_path / "runs", str(seed), "sppo_continuous", 1.0 + seed, seed, logged=logged)
    keep = tmp_path / "kept"
    runs = tmp_path / "runs"
    report.main(report.Args(runs=(runs,), out=tmp_path / "report", reps=50, keep=keep))
    report.main(report.Args(runs=(keep,), out=tmp_path / "again", reps=50))
    for name in ("tables", "curves", "runs"):
        kept = (tmp_path / "again" / f"{name}.csv").read_bytes()
        assert kept == (tmp_path / "report" / f"{name}.csv").read_bytes()
    assert not list(keep.glob("*/events*")) and not list(keep.glob("*/checkpoint.pt"))


def test_what_is_kept_of_kept_runs_is_the_same(tmp_path):
    """As when runs continue from those of the repository; steps have more than four digits."""
    for seed in (0, 1):
        logged = {"losses/clipped_gradients": np.linspace(0.1, 0.9, 9)}
        make_run(tmp_path / "runs", str(seed), "sppo_continuous", 1.0 + seed, seed, logged=logged)
    kept = []
    for source, copy in (("runs", "kept"), ("kept", "again")):
        arguments = {"out": tmp_path / "report", "reps": 50, "keep": tmp_path / copy}
        report.main(report.Args(runs=(tmp_path / source,), **arguments))
        kept.append((tmp_path / copy / "0" / "logged.csv").read_text())
    assert kept[0] == kept[1]
    assert ",18432,0.9" in kept[0]


def test_a_quantity_kept_earlier_stays(tmp_path):
    logged = {"losses/entropy": (0.5, 0.6), "losses/grad_norm": (1.0, 2.0)}
    make_run(tmp_path / "runs", "a", "sppo_continuous", 1.0, logged=logged)
    for tag, quantities in (("losses/entropy", 1), ("losses/grad_norm", 2)):
        flags = {"out": tmp_path / "report", "reps": 50, "keep": tmp_path / "kept"}
        report.main(report.Args(runs=(tmp_path / "runs",), logged=(tag,), **flags))
        kept = pd.read_csv(tmp_path / "kept" / "a" / "logged.csv")
        assert kept["tag"].nunique() == quantities and len(kept) == 2 * quantities


def test_another_run_of_the_same_name_is_not_kept_in_its_place(tmp_path):
    for folder, score in (("x", 1.0), ("y", 2.0)):
        make_run(tmp_path / folder, "run", "sppo_continuous", score)
    flags = {"out": tmp_path / "report", "reps": 50, "keep": tmp_path / "kept"}
    report.main(report.Args(runs=(tmp_path / "x",), **flags))
    before = (tmp_path / "kept" / "run" / "summary.json").read_bytes()
    with pytest.raises(report.Refusal, match="kept/run: another run of this name"):
        report.main(report.Args(runs=(tmp_path / "y",), **flags))
    assert (tmp_path / "kept" / "run" / "summary.json").read_bytes() == before


def test_refused_runs_are_not_kept(tmp_path):
    for seed in (0, 1):
        make_run(tmp_path / "runs", str(seed), "sppo_continuous", 1.0, seed, gamma=0.9 + seed / 20)
    with pytest.raises(report.Refusal, match="gamma"):
        flags = {"out": tmp_path / "report", "reps": 50, "keep": tmp_path / "kept"}
        report.main(report.Args(runs=(tmp_path / "runs",), **flags))
    assert not (tmp_path / "kept").exists()


def test_the_last_value_of_a_step_logged_twice_counts(tmp_path):
    """As after resuming."""
    with SummaryWriter(tmp_path) as writer:
        for value in (1.0, 2.0):
            writer.add_scalar("losses/entropy", value, 10)
    found = report.read_logged(tmp_path, ("losses/entropy",))
    assert found["losses/entropy"].to_numpy().tolist() == [[10, 2]]


def test_the_working_directory_is_a_run_with_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(make_run(tmp_path / "runs", "a", "sppo_continuous", 1.0))
    runs, _ = report.read_runs([Path(".")], ())
    assert list(runs["name"]) == ["a"]


def test_kept_curves_are_means_of_blocks(tmp_path, pictures):
    """Entries at steps 10, 20, ... of 4096, and in the second run at 13, 23, ...; a hundredth of
    the run is 40.96 steps. No step is in both, yet their mean is drawn."""
    runs = tmp_path / "runs"
    for seed, offset in enumerate((0, 3)):
        folder = make_run(runs, str(seed), "sppo_continuous", 1.0, seed)
        with SummaryWriter(folder) as writer:
            for step in range(10 + offset, 4097, 10):
                writer.add_scalar("losses/entropy", step, step)
    keep = tmp_path / "kept"
    flags = {"out": tmp_path / "report", "reps": 50, "logged": ("losses/entropy",)}
    report.main(report.Args(runs=(runs,), keep=keep, **flags))
    logged = pd.read_csv(keep / "0" / "logged.csv")
    assert len(logged) == 100
    assert logged["value"].iloc[0] == (10 + 20 + 30 + 40) / 4 and logged["step"].iloc[0] == 40
    pictures.clear()
    report.main(report.Args(runs=(keep,), **flags))
    (ax,) = pictures["logged-losses/entropy-continuous-ppo-clean"].axes
    steps, values = ax.lines[0].get_data()
    assert (steps[0], steps[-1]) == (40, 4090)
    assert values[-1] == pytest.approx(4090, rel=0.05)


def test_mean_curve_of_runs_with_different_steps():
    """Between its steps a curve is a line; the mean starts and ends where both are known."""
    curves = [pd.Series([0.0, 10.0], [0, 10]), pd.Series([3.0, 13.0], [1, 11])]
    _, ax = plt.subplots()
    report.draw_mean_curve(ax, curves, "SPPO", "black")
    steps, values = ax.lines[0].get_data()
    assert list(steps) == [1, 10] and list(values) == [2.0, 11.0]


def test_levels_of_noise(tmp_path):
    for level, score in ((None, 5.0), (0.1, 4.0), (0.2, 2.0)):
        for seed in (0, 1):
            noise = {"noise": "none" if level is None else "normal", "noise_level": level}
            make_run(
                tmp_path / "runs", f"{level}-{seed}", "sppo_continuous", score + seed, seed, **noise
            )
    report.main(report.Args(runs=(tmp_path / "runs",), out=tmp_path / "report", reps=50))
    assert (tmp_path / "report" / "noise-continuous-ppo.png").exists()
    text = (tmp_path / "report" / "report.md").read_text()
    assert text.index("PPO, clean") < text.index("PPO, normal 0.1") < text.index("PPO, normal 0.2")


@pytest.mark.parametrize("missing", [0, 1])
def test_sweep_is_a_heat_map(missing, tmp_path, monkeypatch):
    """Scores that are sums of the settings; `missing` runs have not finished."""
    figures = []
    monkeypatch.setattr(
        report, "save", lambda figure, out, name: figures.append((figure, name)) or ""
    )
    for beta in (0.0, None):
        for rate in (1e-4, 3e-4, 1e-3):
            for clip in (0.1, 0.2):
                for epochs in (5, 10):
                    score = 1e4 * rate + 100 * clip + epochs + (1000 if beta is None else 0)
                    flags = dict(
                        learning_rate=rate, clip_coef=clip, update_epochs=epochs, beta=beta
                    )
                    make_run(
                        tmp_path / "runs",
                        f"{beta}{rate}{clip}{epochs}",
                        "sppo_continuous",
                        score,
                        **flags,
                    )
    if missing:
        (tmp_path / "runs" / "0.00.00010.15" / "summary.json").unlink()
        for path in (tmp_path / "runs").glob("None*10"):
            (path / "summary.json").unlink()
    report.main(report.Args(runs=(tmp_path / "runs",), out=tmp_path / "report", reps=50))
    ((figure, name),) = figures
    assert name == "sweep-ppo-Hopper-v4-clean"
    maps = {ax.get_title(): ax for ax in figure.axes if ax.get_title()}
    assert maps.keys() == {
        f"{p}, update_epochs {n}" for p in ("DPPO", "SPPO", "difference") for n in (5, 10)
    }
    expected = [
        [1e4 * rate + 100 * clip + 10 for rate in (1e-4, 3e-4, 1e-3)] for clip in (0.1, 0.2)
    ]
    np.testing.assert_allclose(maps["DPPO, update_epochs 10"].images[0].get_array(), expected)
    difference = maps["difference, update_epochs 5"].images[0].get_array()
    assert difference.count() == 6 - missing  # masked where a run is missing
    np.testing.assert_allclose(difference.compressed(), 1000)
    assert maps["SPPO, update_epochs 10"].images[0].get_array().count() == 6 * (1 - missing)


def test_language_models(tmp_path):
    for seed in (0, 1):
        curve = {"kl": [0.0, 2.0 + seed], "perplexity": [20.0, 30.0]}
        make_run(tmp_path / "runs", str(seed), "sppo_rlhf", 0.9, seed, curve=curve, task="imdb")
    report.main(report.Args(runs=(tmp_path / "runs",), out=tmp_path / "report", reps=50))
    assert ["imdb", "2.50 ± 0.50"] in lines(tmp_path / "report")  # the last evaluation's KL
    assert ["imdb", "0.900 ± 0.000"] in lines(tmp_path / "report")
    assert (tmp_path / "report" / "curves-kl-rlhf-ppo-clean.png").exists()


def test_differences_of_language_models_in_every_quantity(tmp_path):
    """KL by seed: 2, 3 and 5, 9; so that SPPO minus PPO is 3, 6, mean 4.5, standard error 1.5."""
    for beta, kl in ((0.0, (2.0, 3.0)), (0.4, (5.0, 9.0))):
        for seed in (0, 1):
            curve = {"kl": [0.0, kl[seed]]}
            flags = {"task": "imdb", "beta": beta}
            name = f"{beta}-{seed}"
            make_run(tmp_path / "runs", name, "sppo_rlhf", 0.9, seed, curve=curve, **flags)
    report.main(report.Args(runs=(tmp_path / "runs",), out=tmp_path / "report", reps=50))
    differences = pd.read_csv(tmp_path / "report" / "differences.csv").set_index("quantity")
    d = differences.loc["kl"]
    assert (d["method"], d["minus"]) == ("SPPO", "PPO")
    assert d["difference"] == 4.5 and d["paired_sem"] == pytest.approx(1.5)
    assert set(differences.index) == {"return", "kl"}
    assert any("kl" in row and "SPPO minus PPO" in row for row in lines(tmp_path / "report"))


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def update(folder: Path, **values) -> None:
    """Changes arguments of a run, where it has recorded them and in its summary."""
    edit(folder / "args.json", lambda content: content["args"].update(values))
    if (folder / "summary.json").exists():
        edit(folder / "summary.json", lambda content: content.update(values))


def swap(a: Path, b: Path) -> None:
    contents = a.read_bytes(), b.read_bytes()
    b.write_bytes(contents[0])
    a.write_bytes(contents[1])


def edit_rows(folder: Path, change) -> None:
    """`change`: from the lines of progress.csv, the first of them its header, to new ones."""
    path = folder / "progress.csv"
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")


@pytest.mark.parametrize(
    "spoil, message",
    [
        (
            lambda runs: (runs / "a" / "summary.json").write_text('{"script": "sppo'),
            "a/summary.json: corrupt",
        ),
        (lambda runs: (runs / "a" / "args.json").write_text(""), "a/args.json: corrupt"),
        (
            lambda runs: edit(runs / "a" / "summary.json", lambda s: s.pop("sps")),
            "a/summary.json: no 'sps'",
        ),
        (
            lambda runs: edit(
                runs / "a" / "summary.json", lambda s: s.update(final_return_mean=math.nan)
            ),
            "a/summary.json: final_return_mean is nan",
        ),
        (
            lambda runs: (runs / "a" / "progress.csv").write_text("step,return_mean\n1,2\n"),
            "no ['return_std'",
        ),
        (
            lambda runs: (runs / "a" / "progress.csv").write_text(",".join(report.EVALUATION)),
            "no rows",
        ),
        (lambda runs: (runs / "a" / "progress.csv").unlink(), "a/progress.csv"),
        (lambda runs: shutil.copytree(runs / "a", runs / "c"), "a and c are the same run"),
        (lambda runs: update(runs / "a", gamma=0.9), "differ in gamma"),
        (lambda runs: update(runs / "a", bins=7), "differ in bins"),
        (
            lambda runs: [(path / "summary.json").unlink() for path in runs.glob("?")],
            "none has finished",
        ),
        (lambda runs: shutil.rmtree(runs), "no runs in it"),
        (
            lambda runs: (runs / "a" / "summary.json").write_text("null"),
            "a/summary.json: no 'script'",
        ),
        (lambda runs: (runs / "a" / "args.json").unlink(), "a/args.json"),
    ],
)
def test_what_is_wrong_is_said_and_the_old_report_stays(spoil, message, tmp_path):
    for seed, name in enumerate("ab"):
        make_run(tmp_path / "runs", name, "sppo_continuous", 1.0, seed)
    spoil(tmp_path / "runs")
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.md").write_text("the old one")
    with pytest.raises((report.Refusal, OSError)) as caught:
        report.main(report.Args(runs=(tmp_path / "runs",), out=tmp_path / "report"))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["report.md"]
    assert (tmp_path / "report" / "report.md").read_text() == "the old one"
    assert {path.name for path in tmp_path.iterdir()} <= {"runs", "report"}


@pytest.mark.parametrize(
    "spoil, message",
    [
        (
            lambda a: edit(a / "summary.json", lambda s: s.update(algo="dqn")),
            "summary.json: algo is 'dqn'",
        ),
        (lambda a: update(a, seed=None), "args.json: seed is None"),
        (
            lambda a: edit(a / "summary.json", lambda s: s.update(seed=None)),
            "summary.json: seed is None",
        ),
        (lambda a: update(a, seed="one"), "args.json: seed is 'one'"),
        (lambda a: update(a, alpha="half"), "args.json: alpha is 'half'"),
        (lambda a: update(a, learning_rate=[1]), "args.json: learning_rate is [1]"),
        (lambda a: update(a, env_id=3), "args.json: env_id is 3"),
        (lambda a: update(a, noise=None), "args.json: noise is None"),
        (
            lambda a: edit(a / "summary.json", lambda s: s.update(wall_s="long")),
            "summary.json: wall_s is 'long'",
        ),
        (
            lambda a: edit(a / "summary.json", lambda s: s.update(sps=10**400)),
            "summary.json: sps is 1000",
        ),
        (
            lambda a: edit(a / "summary.json", lambda s: s.update(train_return_last100="good")),
            "summary.json: train_return_last100 is 'good'",
        ),
        (
            lambda a: edit(a / "summary.json", lambda s: s.update(finished=False)),
            "summary.json: finished is False",
        ),
        (
            lambda a: edit(a / "args.json", lambda s: s.update(versions=None)),
            "args.json: versions is None",
        ),
        (
            lambda a: edit(a / "args.json", lambda s: s.update(hardware="a big one")),
            "args.json: hardware is 'a big one'",
        ),
        (lambda a: edit(a / "args.json", lambda s: s.update(args=None)), "args.json: args is None"),
        (
            lambda a: edit(a / "args.json", lambda s: s.update(command=[])),
            "args.json: command is []",
        ),
        (
            lambda a: edit(a / "args.json", lambda s: s["args"].pop("seed")),
            "args.json: no 'seed' among the arguments",
        ),
        (
            lambda a: edit(a / "args.json", lambda s: s["args"].pop("eval_freq")),
            "args.json: eval_freq is None",
        ),
        (lambda a: update(a, num_steps=0), "args.json: num_steps is 0"),
        (
            lambda a: swap(a / "summary.json", a.with_name("b") / "summary.json"),
            "summary.json: run_name is 'b', in args.json 'a'",
        ),
        (
            lambda a: swap(a / "progress.csv", a.with_name("b") / "progress.csv"),
            "progress.csv: last return_mean is 2.0, in summary.json 1.0",
        ),
        (
            lambda a: edit_rows(a, lambda rows: [*rows, rows[-1]]),
            "progress.csv: steps are duplicated",
        ),
        (
            lambda a: edit_rows(a, lambda rows: [rows[0], rows[2]]),
            "progress.csv: evaluations missing or not due, at steps [2048]",
        ),
        (lambda a: edit_rows(a, lambda rows: rows[:2]), "progress.csv: ends at step 2048 of 4096"),
        (
            lambda a: edit_rows(a, lambda rows: [rows[0], "2048,high,1,9,10", rows[2]]),
            "progress.csv: return_mean is 'high', not a number",
        ),
        (
            lambda a: edit_rows(a, lambda rows: [rows[0], f"2048,1,1,{10**23},10", rows[2]]),
            f"progress.csv: length_mean is '{10**23}', not a number",
        ),
        (
            lambda a: edit_rows(a, lambda rows: [*rows[:2], "4096,1.0,7,9,10"]),
            "progress.csv: last return_std is 7.0, in summary.json 1.0",
        ),
        (
            lambda a: edit_rows(a, lambda rows: [rows[0], "2048,1", rows[2]]),
            "progress.csv: not every return_std is a finite number",
        ),
        (
            lambda a: edit_rows(a, lambda rows: [*rows[:2], rows[2] + ",1,2,3"]),
            "progress.csv: Error tokenizing data",
        ),
        (lambda a: (a / "progress.csv").write_bytes(b"\xff\xfe\x00"), "progress.csv: "),
        (lambda a: (a / "logged.csv").write_text("tag,step,value\nx,1,high\n"), "logged.csv: "),
        (lambda a: (a / "logged.csv").write_text("step\n1\n"), "logged.csv: "),
    ],
)
def test_files_of_a_finished_run_that_cannot_be_right(spoil, message, tmp_path):
    for seed, name in enumerate("ab"):
        make_run(tmp_path / "runs", name, "sppo_continuous", 1.0 + seed, seed)
    spoil(tmp_path / "runs" / "a")
    with pytest.raises(report.Refusal, match=re.escape(f"{tmp_path / 'runs' / 'a'}/")) as caught:
        report.main(report.Args(runs=(tmp_path / "runs",), out=tmp_path / "report", reps=50))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "report").exists()


def test_arguments_of_an_unfinished_run_are_checked_too(tmp_path):
    for seed, name in enumerate("ab"):
        make_run(tmp_path / "runs", name, "sppo_continuous", 1.0, seed)
    (tmp_path / "runs" / "a" / "summary.json").unlink()
    update(tmp_path / "runs" / "a", seed=None)
    with pytest.raises(report.Refusal, match="a/args.json: seed is None"):
        report.read_runs([tmp_path / "runs"], ())


def test_evaluations_are_those_of_the_training_loop():
    """The loop of the scripts, with their own `due`."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        args = {"num_envs": int(rng.integers(1, 9)), "num_steps": int(rng.integers(1, 50))}
        args["total_timesteps"] = int(rng.integers(1, 2000))
        args["eval_freq"] = int(rng.integers(0, 500)) * int(rng.integers(0, 2))
        batch, step, steps = args["num_envs"] * args["num_steps"], 0, []
        while step < args["total_timesteps"]:
            step += batch
            finished = step >= args["total_timesteps"]
            if finished or sppo_continuous.due(args["eval_freq"], step, batch):
                steps.append(step)
        assert report.evaluation_steps(args) == steps
    args = {"task": "imdb", "batch_size": 112, "total_timesteps": 6720, "eval_freq": 3000}
    assert report.evaluation_steps(args) == [0, 3024, 6048, 6720]


def rename_script(folder: Path, script: str, **more) -> None:
    """Makes it the run of another script, which records `more`."""
    edit(folder / "summary.json", lambda s: s.update(script=script, **more))
    edit(folder / "args.json", lambda s: s.update(command=[f"somewhere/{script}"]))
    edit(folder / "args.json", lambda s: s["args"].update(more))


def test_a_copied_script_is_a_method_beside_the_others(tmp_path):
    """Three seeds of DPPO, SPPO and a copy with an argument of its own and other evaluations."""
    runs = make_grid(tmp_path / "runs", rows=["dppo", "sppo"])
    for env_id in TASKS:
        for seed in range(3):
            folder = make_run(
                runs, f"{env_id}-mine-{seed}", "sppo_continuous", 20.0 + seed, seed, env_id=env_id
            )
            edit_rows(folder, lambda rows: [rows[0], rows[2]])
            rename_script(folder, "sppo_mine.py", temperature=0.5)
    report.main(report.Args(runs=(runs,), out=tmp_path / "report", reps=50))
    assert ["DPPO", "SPPO", "sppo_mine"] in lines(tmp_path / "report")
    assert [TASKS[0], "12.0 ± 1.2", "**31.0 ± 0.6**", "21.0 ± 0.6"] in lines(tmp_path / "report")
    differences = pd.read_csv(tmp_path / "report" / "differences.csv")
    mine = differences[differences["method"] == "sppo_mine"]
    assert set(mine["minus"]) == {"DPPO", "SPPO"} and mine["compared"].all()
    text = (tmp_path / "report" / "report.md").read_text()
    assert "sppo_mine minus SPPO" in text and "sppo_mine > DPPO" in text


def test_a_copied_script_with_longer_runs_is_not_compared(tmp_path):
    make_run(tmp_path, "short", "sppo_continuous", 1.0)
    folder = make_run(tmp_path, "long", "sppo_continuous", 2.0)
    update(folder, total_timesteps=8192)
    rename_script(folder, "sppo_mine.py")
    edit_rows(folder, lambda rows: [*rows[:2], rows[2].replace("4096", "8192")])
    with pytest.raises(report.Refusal, match="differ in total_timesteps"):
        report.label_methods(report.read_runs([tmp_path], ())[0])


def test_settings_and_algorithms_of_a_copied_script_are_told_apart(tmp_path):
    settings = ({}, {"max_grad_norm": 1.0}, {"beta": 0.0})
    for i, flags in enumerate(settings):
        rename_script(make_run(tmp_path, str(i), "sppo_continuous", 1.0, **flags), "my_agent.py")
    rename_script(make_run(tmp_path, "3", "sppo_atari", 1.0, env_id="Pong"), "my_games.py")
    runs = report.label_methods(report.read_runs([tmp_path], ())[0])
    assert dict(zip(runs["name"], runs["method"])) == {
        "0": "my_agent SPPO, max-grad-norm 0.5",
        "1": "my_agent SPPO, max-grad-norm 1",
        "2": "my_agent DPPO",
        "3": "my_games",
    }
    kinds = dict(zip(runs["name"], runs["kind"]))
    assert kinds["0"] == "continuous" and kinds["3"] == "atari"
    assert set(runs["family"]) == {"ppo"}


def test_an_algorithm_that_only_a_copied_script_has(tmp_path):
    folder = make_run(tmp_path / "runs", "a", "sppo_continuous", 1.0)
    rename_script(folder, "dqn.py", algo="dqn", env_id="my_package:CartPole-v1")
    report.main(report.Args(runs=(tmp_path / "runs",), out=tmp_path / "report", reps=50))
    assert ["my_package:CartPole-v1", "1.00"] in lines(tmp_path / "report")


def test_runs_of_older_and_newer_versions_of_a_script(tmp_path):
    """The older one has no --divide-by-p-old yet, whose default is what it did, and no --patience,
    whose default is not known. What only newer runs record does not matter."""
    for seed in range(3):
        make_run(tmp_path / "runs", f"new-{seed}", "sppo_continuous", 1.0 + seed, seed)
        update(tmp_path / "runs" / f"new-{seed}", patience=7)
        more = {"script_sha256": "ab" * 32, "script_status": ""}
        edit(tmp_path / "runs" / f"new-{seed}" / "args.json", lambda s, more=more: s.update(more))
    for name in ("args", "summary"):
        path = tmp_path / "runs" / "new-0" / f"{name}.json"
        edit(path, lambda s: [s.get("args", s).pop(key) for key in ("patience", "divide_by_p_old")])
    runs = report.label_methods(report.read_runs([tmp_path / "runs"], ())[0])
    assert list(runs["method"]) == ["SPPO"] * 3
    report.main(report.Args(runs=(tmp_path / "runs",), out=tmp_path / "report", reps=50))
    assert ["Hopper-v4", "2.00 ± 0.58"] in lines(tmp_path / "report")
    update(tmp_path / "runs" / "new-1", patience=8)
    with pytest.raises(report.Refusal, match="new-1 and new-2 differ in patience"):
        report.label_methods(report.read_runs([tmp_path / "runs"], ())[0])


def test_a_changed_script_is_said(tmp_path):
    make_run(tmp_path / "runs", "a", "sppo_continuous", 1.0)
    edit(
        tmp_path / "runs" / "a" / "args.json",
        lambda s: s.update(script_status=" M sppo_continuous.py"),
    )
    edit_rows(tmp_path / "runs" / "a", lambda rows: [rows[0], rows[2]])  # evaluates as it likes
    report.main(report.Args(runs=(tmp_path / "runs",), out=tmp_path / "report", reps=50))
    text = (tmp_path / "report" / "report.md").read_text()
    assert "- commit: abc, but sppo_continuous.py was changed (1 runs)" in text


def test_runs_before_and_after_an_edit_of_a_script_are_not_one_cell(tmp_path):
    """Unless both versions are committed: then the report lists the commits."""
    for seed in (0, 1):
        folder = make_run(tmp_path / "runs", str(seed), "sppo_continuous", 1.0, seed)
        version = {"script_sha256": str(seed), "script_status": ""}
        edit(folder / "args.json", lambda s, version=version: s.update(version))
    report.label_methods(report.read_runs([tmp_path / "runs"], ())[0])
    changed = {"script_status": " M sppo_continuous.py"}
    no_repository = {"script_status": None, "commit": None}
    for version in (changed, no_repository):
        edit(folder / "args.json", lambda s, version=version: s.update(version))
        with pytest.raises(report.Refusal, match="0 and 1 differ in script_sha256"):
            report.label_methods(report.read_runs([tmp_path / "runs"], ())[0])


def test_two_scripts_share_no_cell(tmp_path):
    """PPO.py is called as our Gaussian PPO is."""
    make_run(tmp_path / "runs", "ours", "sppo_continuous", 1.0, policy="gaussian")
    folder = make_run(tmp_path / "runs", "theirs", "sppo_continuous", 2.0, 1, policy="gaussian")
    edit(folder / "args.json", lambda s: s.update(command=["PPO.py"]))
    edit(folder / "summary.json", lambda s: s.update(script="PPO.py"))
    with pytest.raises(report.Refusal, match="ours and theirs differ in script"):
        report.label_methods(report.read_runs([tmp_path / "runs"], ())[0])


@pytest.mark.parametrize("algo", ["ppo", "PPO", "MaskablePPO"])
def test_the_family_of_another_scripts_algorithm(algo):
    assert report.family_of({"algo": algo, "script": "theirs.py"}) == "ppo"


def test_runs_of_another_library(tmp_path):
    """Stable-Baselines3, as recorded by our yardstick: a summary, no arguments, no curve."""
    runs = tmp_path / "runs"
    for seed in (0, 1):
        make_run(runs, f"ours-{seed}", "sppo_continuous", 3.0 + seed, seed, policy="gaussian")
        folder = make_run(runs, f"theirs-{seed}", "sppo_continuous", 5.0 + seed, seed, beta=0.0)
        kept = [*report.NEEDED, "version"]
        edit(
            folder / "summary.json",
            lambda s: s.update(script="stable_baselines3", version="2.9", algo="ppo"),
        )
        content = json.loads((folder / "summary.json").read_text())
        kept = {key: content[key] for key in kept} | {"run_name": None}
        (folder / "summary.json").write_text(json.dumps(kept))
        (folder / "args.json").unlink()
        (folder / "progress.csv").unlink()
    report.main(report.Args(runs=(runs / "theirs-0",), out=tmp_path / "report", reps=50))
    report.main(report.Args(runs=(runs,), out=tmp_path / "report", reps=50))
    assert ["PPO", "stable_baselines3"] in lines(tmp_path / "report")
    assert ["Hopper-v4", "3.50 ± 0.50", "5.50 ± 0.50"] in lines(tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    runs_csv = pd.read_csv(tmp_path / "report" / "runs.csv").set_index("name")
    assert runs_csv["command"].isna().to_dict()["theirs-0"]
    report.main(report.Args(runs=(runs,), out=tmp_path / "again", reps=50, keep=tmp_path / "kept"))
    assert (tmp_path / "kept" / "theirs-0" / "summary.json").exists()
    assert "stable_baselines3 minus PPO" in text and "stable_baselines3 2.9 (2 runs)" in text
    edit(runs / "theirs-0" / "summary.json", lambda s: s.update(total_timesteps=8192))
    with pytest.raises(report.Refusal, match="theirs-0 and theirs-1 differ in total_timesteps"):
        report.label_methods(report.read_runs([runs], ())[0])


@pytest.fixture
def pictures(monkeypatch):
    """Collects the figures of reports, {name: figure}, instead of saving them."""
    figures = {}
    monkeypatch.setattr(
        report, "save", lambda figure, out, name: figures.setdefault(name, figure) and ""
    )
    return figures


ROWS = {  # {method: flags}; two of them are no usual ones
    "SPPO": {},
    "DPPO": {"beta": 0.0},
    "SPPO, layer-norm": {"layer_norm": True},
    "SPPO, ent-coef 0.01": {"ent_coef": 0.01},
}


def make_levels(runs: Path) -> None:
    """A task with two levels of a noise, one with another noise and without DPPO, one clean."""
    noises = [("none", 0.0, TASKS[0]), ("none", 0.0, TASKS[1]), ("none", 0.0, "Hopper-v4")]
    noises += [("normal", 0.1, TASKS[0]), ("normal", 0.2, TASKS[0]), ("flip", 0.1, TASKS[1])]
    for noise, level, env_id in noises:
        for method, flags in ROWS.items():
            for seed in (0, 1):
                if method != "DPPO" or env_id != TASKS[1]:
                    flags = flags | {"noise": noise, "noise_level": level, "env_id": env_id}
                    name = f"{env_id} {method} {noise} {level} {seed}"
                    make_run(runs, name, "sppo_continuous", seed, seed, **flags)


def test_a_method_has_one_color_in_all_pictures_and_no_panel_is_empty(tmp_path, pictures):
    make_levels(tmp_path / "runs")
    report.main(report.Args(runs=(tmp_path / "runs",), out=tmp_path / "report", reps=50))
    # clean, three noises, across their levels, differences, over all tasks
    assert len(pictures) == 7
    colors = {}
    for figure in pictures.values():
        for ax in figure.axes:
            assert ax.has_data()
            for line, label in zip(*ax.get_legend_handles_labels()):
                line = line[0] if isinstance(line, tuple) else line
                if label in ROWS:  # and not a noise
                    colors.setdefault(label, set()).add(line.get_color())
    assert colors.keys() == ROWS.keys()
    assert all(len(found) == 1 for found in colors.values())
    assert len(set.union(*colors.values())) == len(colors)
    assert colors["SPPO"] == {report.COLORS["SPPO"]}
    panels = [ax.get_title() for ax in pictures["noise-continuous-ppo"].axes]
    assert sorted(panels) == sorted(TASKS)


def test_the_picture_of_differences_shows_all_of_the_last_evaluation(tmp_path, pictures):
    make_levels(tmp_path / "runs")
    report.main(report.Args(runs=(tmp_path / "runs",), out=tmp_path / "report", reps=50))
    axes = pictures["differences-continuous-ppo"].axes
    labels = [label.get_text() for label in axes[0].get_yticklabels()]
    assert len(set(labels)) == len(labels)
    drawn = []
    for ax in axes:
        for container in ax.containers:
            line, _, (intervals,) = container
            for x, y, segment in zip(*line.get_data(), intervals.get_segments()):
                label = labels[math.floor(-y)]  # conditions are below each other, by less than 1
                low, high = segment[:, 0]
                drawn.append([ax.get_title(), container.get_label(), label, x, low, high])
    differences = pd.read_csv(tmp_path / "report" / "differences.csv").dropna(subset="low")
    table = differences[differences["compared"] & (differences["quantity"] == "return")]
    names = table["method"] + " minus " + table["minus"]
    columns = [table["env_id"], table["condition"], names]
    columns += [table[name].round(3) for name in ("difference", "low", "high")]
    expected = [list(row) for row in zip(*columns)]
    assert len(expected) > 10
    found = [row[:3] + [round(value, 3) for value in row[3:]] for row in drawn]
    assert sorted(found) == sorted(expected)


def test_aggregates_of_baselines_alone_have_no_empty_side(tmp_path, pictures):
    for seed in (0, 1):
        make_run(tmp_path / "runs", str(seed), "sppo_continuous", seed, seed, beta=0.0)
    report.main(report.Args(runs=(tmp_path / "runs",), out=tmp_path / "report", reps=50))
    (ax,) = pictures["aggregates-continuous-ppo"].axes
    assert ax.has_data()


def test_colors_do_not_depend_on_the_order(tmp_path):
    methods = ["SPPO", "PPO", "b", "a", "c"]
    assert report.color_methods(methods) == report.color_methods(methods[::-1])
    assert len(set(report.color_methods(methods).values())) == 5
    many = report.color_methods([f"m{i}" for i in range(14)] + list(report.COLORS))
    others = {color for method, color in many.items() if method[0] == "m"}
    assert len(others) == 14 and not others & set(report.COLORS.values())


def test_an_error_is_one_line(tmp_path):
    command = [sys.executable, ROOT / "report.py", tmp_path, "--out", tmp_path / "report"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1 and result.stdout == ""
    assert (
        result.stderr
        == f"error: {tmp_path}: no runs in it; give folders of runs, such as runs/quick\n"
    )


def test_a_resumed_run_is_no_other_one(tmp_path):
    """Its last start had --resume, and may have failed to compile."""
    path = make_run(tmp_path, "a", "sppo_continuous", 1.0) / "summary.json"
    edit(path, lambda s: s.update(resume="runs/a", compile=not s["compile"]))
    assert len(report.read_runs([tmp_path], ())[0]) == 1


def test_two_runs_of_one_name(tmp_path):
    for folder in ("x", "y"):
        make_run(tmp_path / folder, "run", "sppo_continuous", 1.0)
    with pytest.raises(ValueError, match=r"x/run and .*y/run: two runs with the same name"):
        report.read_runs([tmp_path / "x", tmp_path / "y"], ())


@pytest.mark.parametrize("has_report", [False, True])
def test_a_folder_with_other_files_is_not_replaced(has_report, grid, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    if has_report:
        (tmp_path / "report.md").write_text("# My own report")
    with pytest.raises(ValueError, match="not a report"):
        report.main(report.Args(runs=(grid / "runs",), out=tmp_path))
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_real_runs(tmp_path):
    """What a script leaves is what the report reads, events included."""
    for seed in (1, 2):
        flags = {"total_timesteps": 512, "num_steps": 128, "eval_freq": 256, "seed": seed}
        SPPO_CONTINUOUS.run(tmp_path / "runs", run_name=str(seed), **flags)
    args = tyro.cli(
        report.Args,
        args=[str(tmp_path / "runs"), "--out", str(tmp_path / "report"), "--reps", "50"],
    )
    report.main(args)
    cell = pd.read_csv(tmp_path / "report" / "tables.csv").iloc[0]
    scores = [
        json.loads(path.read_text())["final_return_mean"]
        for path in (tmp_path / "runs").glob("*/summary.json")
    ]
    assert (
        cell["mean"] == pytest.approx(np.mean(scores), rel=1e-5)
        and 0 < cell["losses/advantage_sign_flips_mean"] < 0.5
    )
    assert len(pd.read_csv(tmp_path / "report" / "curves.csv")) == 4
