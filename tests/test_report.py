"""report.py: numbers against hand-computed ones, and what it refuses."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tyro
from helpers import SETTINGS, SPPO_CONTINUOUS
from rliable import metrics
from scipy import stats
from torch.utils.tensorboard import SummaryWriter

import report
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
    } | flags
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
        "step": [2048, 4096],
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
    """Three programs on two tasks with three seeds, and the report of them."""
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
    tables = pd.read_csv(grid / "report" / "tables.csv").set_index(["env_id", "program"])
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
    assert len(pd.read_csv(grid / "report" / "curves.csv")) == 36


def test_differences_by_welch(grid):
    """Welch's formula, by hand, for SPPO [55, 65, 100] less DPPO [50, 60, 70]."""
    differences = pd.read_csv(grid / "report" / "differences.csv").set_index(
        ["env_id", "program", "less"]
    )
    d = differences.loc[TASKS[1], "SPPO", "DPPO"]
    a, b = 1675 / 3 / 3, 100 / 3  # variances of the means
    t = (73 + 1 / 3 - 60) / math.sqrt(a + b)
    freedom = (a + b) ** 2 / (a**2 / 2 + b**2 / 2)
    assert d["difference"] == pytest.approx(40 / 3, rel=1e-5) and d["sem"] == pytest.approx(
        math.sqrt(a + b), rel=1e-5
    )
    assert d["p"] == pytest.approx(2 * stats.t.sf(t, freedom), rel=1e-4)
    assert len(differences) == 6  # three pairs in each of two tasks
    symmetric = differences[differences["symmetric"]].reset_index()
    assert set(symmetric["program"]) == {"SPPO"}
    assert differences["symmetric"].sum() == 4


def test_paired_differences_by_seed(grid):
    """SPPO [55, 65, 100] less DPPO [50, 60, 70], seed by seed: 5, 5, 30."""
    differences = pd.read_csv(grid / "report" / "differences.csv").set_index(
        ["env_id", "program", "less"]
    )
    d = differences.loc[TASKS[1], "SPPO", "DPPO"]
    assert d["paired_sem"] == pytest.approx(np.std([5, 5, 30], ddof=1) / 3**0.5, rel=1e-5)


def test_corrected_rewards_are_compared_with_all_others(tmp_path):
    for row, flags in {"dppo": {}, "corrected": {"correct_flips": True}}.items():
        for seed in (0, 1):
            flags = flags | {"beta": 0.0, "noise": "flip"}
            make_run(
                tmp_path / "runs", f"{row}-{seed}", "sppo_continuous", 5.0 + seed, seed, **flags
            )
    report.main(report.Args(runs=(tmp_path / "runs",), out=tmp_path / "report", reps=50))
    assert "DPPO, correct-flips less DPPO" in (tmp_path / "report" / "report.md").read_text()


def test_statistics_over_all_tasks(grid):
    """Scores normalised by the worst and best of a task; interquartile mean: without the lowest and
    the highest of six; probability of improvement: pairs, counted, ties half."""
    aggregates = pd.read_csv(grid / "report" / "aggregates.csv").set_index("program")
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
    for name in ("curves-continuous-ppo-clean", "aggregates-continuous-ppo"):
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
    assert list(aggregates["program"]) == ["SPPO"] and "DPPO, PPO clean" in text
    differences = pd.read_csv(tmp_path / "report" / "differences.csv")
    assert differences["symmetric"].sum() == 2
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


def test_an_unfinished_rival_keeps_the_others_from_being_bold(tmp_path):
    """Its first seed has begun, so that it has no cell yet."""
    runs = make_grid(tmp_path / "runs", rows=["dppo", "sppo"])
    make_run(runs, "rival", "sppo_continuous", 0.0, 0, env_id=TASKS[0], **FLAGS["norm"])
    (runs / "rival" / "summary.json").unlink()
    report.main(report.Args(runs=(runs,), out=tmp_path / "report", reps=50))
    assert [TASKS[0], "12.0 ± 1.2", "31.0 ± 0.6"] in lines(tmp_path / "report")


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
    runs = report.label_programs(report.read_runs([tmp_path], ())[0])
    aggregates, left_out = report.make_aggregates(report.make_cells(runs, []), reps=50)
    values = aggregates.set_index("program")["value"]
    assert values["PPO"] == pytest.approx(0.5) and values["SPPO"] == pytest.approx(1.5)
    assert values["SPPO > PPO"] == 1 and not left_out


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
    "script, flags, program",
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
        ("sa2c_atari", {"env_id": "Pong", "beta": 0.0}, "A2C"),
        ("sppo_rlhf", {"task": "imdb"}, "SPPO"),
        ("sppo_rlhf", {"task": "tldr", "beta": 0.0, "ce_coef": 0.2}, "PPO, ce-coef 0.2"),
        ("sppo_rlhf", {"task": "imdb", "reward_model": ["a", "b"], "reward_aggregate": "min"},
         "SPPO, reward-model x 2, reward-aggregate min"),
    ],
)  # fmt: skip
def test_programs_are_named_by_what_they_are(script, flags, program, tmp_path):
    """One run alone, without others that might tell what is usual."""
    make_run(tmp_path, "run", script, 1.0, **flags)
    runs = report.label_programs(report.read_runs([tmp_path], ())[0])
    assert list(runs["program"]) == [program]


def test_alphas_are_told_apart(tmp_path):
    for name, alpha in (("a", 0.5), ("b", 1.0)):
        make_run(tmp_path, name, "sppo_continuous", 1.0, alpha=alpha)
    runs = report.label_programs(report.read_runs([tmp_path], ())[0])
    assert set(runs["program"]) == {"SPPO, alpha 0.5", "SPPO, alpha 1"}


def test_single_factors_are_told_by_k_and_its_twin_does_not_compete(tmp_path):
    """k = .5 + 20 = 20.5. The twin is as good as SPPO, which is bold nevertheless."""
    rows = {
        "SPPO": {}, "DPPO": {"beta": 0.0}, "DPPO, alpha k": {"beta": 0.0, "alpha": 20.5},
        "DPPO, max-grad-norm / k": {"beta": 0.0, "max_grad_norm": 0.0243902},
        "DPPO, vf-coef / k": {"beta": 0.0, "vf_coef": 0.0243902},
        "DPPO, max-grad-norm 0.0244": {"beta": 0.0, "max_grad_norm": 0.0244},
    }  # fmt: skip
    for i, (program, flags) in enumerate(rows.items()):
        for seed in range(3):
            score = seed / 10 + (10 if program in ("SPPO", "DPPO, alpha k") else 1)
            make_run(tmp_path / "runs", f"{i}-{seed}", "sppo_continuous", score, seed, **flags)
    report.main(report.Args(runs=(tmp_path / "runs",), out=tmp_path / "report", reps=50))
    tables = pd.read_csv(tmp_path / "report" / "tables.csv").set_index("program")
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
        report.label_programs(report.read_runs([tmp_path], ())[0])


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


def test_kept_curves_are_means_of_blocks(tmp_path):
    values = np.arange(250.0)
    make_run(tmp_path / "runs", "0", "sppo_continuous", 1.0, 0, logged={"losses/entropy": values})
    keep = tmp_path / "kept"
    flags = {"reps": 50, "keep": keep, "logged": ("losses/entropy",)}
    report.main(report.Args(runs=(tmp_path / "runs",), out=tmp_path / "report", **flags))
    logged = pd.read_csv(keep / "0" / "logged.csv")
    assert len(logged) == 84  # of three values each
    assert logged["value"].iloc[0] == 1.0 and logged["step"].iloc[0] == 3 * 2048


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


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def empty(folder: Path) -> None:
    folder.mkdir()


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
        (
            lambda runs: edit(
                runs / "a" / "summary.json", lambda s: s.update(total_timesteps=8192)
            ),
            "differ in total_timesteps",
        ),
        (
            lambda runs: edit(runs / "a" / "summary.json", lambda s: s.update(bins=7)),
            "differ in bins",
        ),
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
        (
            lambda runs: edit(runs / "a" / "summary.json", lambda s: s.update(script="my_ppo.py")),
            "my_ppo.py: runs of another script",
        ),
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


def test_an_error_is_one_line(tmp_path):
    command = [sys.executable, ROOT / "report.py", tmp_path, "--out", tmp_path / "report"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1 and result.stdout == ""
    assert (
        result.stderr
        == f"error: {tmp_path}: no runs in it; give folders of runs, such as runs/quick\n"
    )


def test_two_runs_of_one_name(tmp_path):
    for folder in ("x", "y"):
        make_run(tmp_path / folder, "run", "sppo_continuous", 1.0)
    with pytest.raises(ValueError, match=r"x/run and .*y/run: two runs of one name"):
        report.read_runs([tmp_path / "x", tmp_path / "y"], ())


def test_a_folder_that_is_no_report_is_not_replaced(grid, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="not a report"):
        report.main(report.Args(runs=(grid / "runs",), out=tmp_path))
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_real_runs(tmp_path):
    """What a script leaves is what the report reads, events included."""
    for seed in (1, 2):
        SPPO_CONTINUOUS.run(tmp_path / "runs", run_name=str(seed), seed=seed, eval_freq=256)
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
