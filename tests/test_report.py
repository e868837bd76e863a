"""report.py: numbers against hand-computed ones and SciPy, packing, and what it refuses."""

import hashlib
import json
import math
import os
import re
import resource
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import optimize, special, stats

import report

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "results"))
import coverage  # noqa: E402

HOPPER = "Hopper-v4"
LANDER = "LunarLanderContinuous-v3"
POOLED = "## Differences over tasks, uncorrected"
SCORES = {  # {(task, method): last evaluations, a seed each}
    (HOPPER, "dppo"): [10, 12, 14],
    (HOPPER, "sppo"): [12, 15, 18],
    (LANDER, "dppo"): [100, 110, 120],
    (LANDER, "sppo"): [99, 110, 112],
}


def make_run(
    runs, method, score, seed=1, task=HOPPER, finished=True, columns=(), version="abc", **changes
):
    """A folder as scripts leave it, with twelve evaluations, the first the best, the last `score`.
    `columns` of progress.csv; `version`: all that is in the script; `changes` of arguments, of the
    script's name, the texts of what it imports, or a package's version."""
    language = task == "imdb"
    script = changes.pop("script", "sppo_rlhf.py" if language else "sppo_continuous.py")
    texts = {rf"C:\{script}": version} | changes.pop("imported", {})
    evaluations = changes.pop("evaluations", 12)
    continued = changes.pop("continued", {})
    files = {path: hashlib.sha256(text.encode()).hexdigest() for path, text in texts.items()}
    versions = {"torch": "2.13.0", "numpy": "2.13.0", "highway-env": changes.pop("highway", "1.8")}
    if seed % 2:  # in the order of a folder's files
        versions = dict(reversed(versions.items()))
    args = {"exp_name": method, "seed": seed, "noise": "none", "noise_level": 0.05}
    args |= {"total_timesteps": 1200, "vf_coef": 0.5, "hidden_sizes": [64, 64], "device": "cpu"}
    args |= {"task": task, "policy_model": "gpt2"} if language else {"env_id": task}
    args |= changes.pop("also", {}) | changes
    folder = runs / f"{task}__{method}__{args['noise']}__{seed}__{version}"
    folder.mkdir(parents=True)
    (folder / script).write_text(version)
    session = {"args": args, "script": script, "versions": versions, "files": files}
    session |= {"command": ["sppo_continuous.py", "--seed", str(seed)], "platform": "Linux-6.1"}
    session |= {"started": f"2026-01-0{1 + seed} 12:00:00", "cpu": "AVX512", "gpu": None}
    later = session | {"started": "2026-02-01 12:00:00"} | continued
    (folder / "sessions.jsonl").write_text(f"{json.dumps(session)}\n{json.dumps(later)}\n")
    progress = {"step": range(100, 1300, 100), "return_std": 1.0, "length_mean": 9.0}
    progress["return_mean"] = [2 * score, *np.linspace(0, score, 12)[1:]]
    progress["losses/clipped_gradients"] = np.linspace(0, 1, 12)
    progress["charts/episodic_return"] = np.linspace(0, score / 2, 12)
    table = pd.DataFrame(progress | dict(columns))[-evaluations:]
    table.to_csv(folder / "progress.csv", index=False)
    if finished:
        summary = table.iloc[-1].to_dict() | {"sps": 1000.0}
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def make_grid(runs: Path, **changes) -> Path:
    for (task, method), scores in SCORES.items():
        for seed, score in enumerate(scores):
            make_run(runs, method, score, seed, task, **changes)
    return runs


def write_report(*folders: Path, out: Path, figures=False, **options) -> str:
    with pytest.MonkeyPatch.context() as patch:
        if not figures:  # they take most of the time
            patch.setattr(report, "draw_curves", lambda *args: [])
            patch.setattr(report, "draw_differences", lambda *args: [])
        report.main(report.Args(folders=folders, out=out, **options))
    return (out.expanduser() / "report.md").read_text()


def table_after(page: str, title: str) -> list[list[str]]:
    """Rows of the first table after the line that begins with `title`, the header first."""
    after = page.split(f"\n{title}", 1)[1]
    rows = re.search(r"(?m)(^\|.*\n)+", after)[0].splitlines()
    cells = [[cell.strip() for cell in row[1:-1].split("|")] for row in rows]
    return [cells[0], *cells[2:]]


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """Two methods on two tasks with three seeds, in runs/, and the report of them, in report/."""
    folder = tmp_path_factory.mktemp("grid")
    write_report(make_grid(folder / "runs"), out=folder / "report")
    return folder


@pytest.fixture
def kept(monkeypatch):
    """Figures that are drawn from here on. They are not written, which takes most of the time."""
    figures = []
    monkeypatch.setattr(report.plt, "close", figures.append)
    monkeypatch.setattr(report.plt.Figure, "savefig", lambda *_, **__: None)
    return figures


# ---- Tables


def test_tables_have_means_and_standard_errors_and_scores_csv_has_intervals_by_t(grid):
    page = (grid / "report/report.md").read_text()
    error = np.std([12, 15, 18], ddof=1) / math.sqrt(3)
    rows = table_after(page, "Last evaluation (runs: 3):")
    assert rows[0] == ["task", "noise", "dppo", "sppo"]
    assert rows[1] == [HOPPER, "clean", "12.0 ± 1.2", f"15.0 ± {error:.1f}"]
    assert rows[2] == [LANDER, "clean", "110.0 ± 5.8", "107.0 ± 4.0"]
    # of twelve evaluations that rise to the score the last five are 7/11 to 11/11 of it
    rows = table_after(page, "Mean of the last five evaluations (runs: 3):")
    assert rows[1][2].startswith(f"{12 * 9 / 11:.2f} ± 0.")
    assert table_after(page, "Training (runs: 3):")[2][2] == "55.0 ± 2.9"
    rows = table_after(page, "`losses/clipped_gradients`, mean over the run (runs: 3):")
    assert rows[1] == [HOPPER, "clean", "0.5000 ± 0.0000", "0.5000 ± 0.0000"]

    scores = pd.read_csv(grid / "report/scores.csv")
    assert len(scores) == 4 * 5  # cells, measures
    place = (scores["measure"] == "last evaluation") & (scores["method"] == "sppo")
    row = scores[place & (scores["task"] == HOPPER)].iloc[0]
    interval = stats.ttest_1samp([12, 15, 18], 0).confidence_interval()
    assert (row["low"], row["high"]) == pytest.approx((interval.low, interval.high))
    assert row["mean"] == 15 and row["standard_error"] == pytest.approx(error)
    assert [row["noise"], row["seeds"], row["text"]] == ["clean", "[0, 1, 2]", "15.0 ± 1.7"]


def test_an_error_has_two_digits_and_a_mean_without_error_has_four():
    numbers = {(100.217, 0.0726): "100.217 ± 0.073", (-1e-7, 6.7e-5): "0.000000 ± 0.000067"}
    numbers |= {(12_766.7, 433.3): "12,770 ± 430", (50, 9.96): "50 ± 10"}
    numbers |= {(123_456, math.nan): "123,500", (math.inf, math.nan): "inf"}
    for (mean, error), text in numbers.items():
        assert " ± ".join(report.digits(error, mean, error)) == text


def make_clear_differences(runs, scores):
    """In {method: [its mean on Hopper, on LunarLander]}; the standard deviation is 1."""
    for method, means in scores.items():
        for task, mean in zip([HOPPER, LANDER], means):
            for seed in range(3):
                make_run(runs, method, mean - 1 + seed, seed, task)
    return runs


@pytest.mark.parametrize(
    ("scores", "bold"),
    [
        ({"dppo": [10, 10], "sppo": [90, 12]}, [["sppo"], []]),  # p is 0.07 on LunarLander
        ({"dppo": [90, 10], "sppo": [10, 11]}, [["dppo"], []]),  # a baseline may be the best
        ({"ppo": [10, 10], "dppo": [90, 50], "sppo": [91, 10]}, [[], ["dppo"]]),
        ({"ppo": [10, 10], "sa2c": [90, 90]}, [[], []]),  # they are not compared
    ],
)
def test_bold_is_the_best_if_it_differs_from_all_that_it_is_compared_with(scores, bold, tmp_path):
    page = write_report(make_clear_differences(tmp_path / "runs", scores), out=tmp_path / "out")
    header, *rows = table_after(page, "Last evaluation (runs: 3):")
    assert [[name for name, cell in zip(header, row) if "**" in cell] for row in rows] == bold
    table = (tmp_path / "out/scores.tex").read_text()
    assert table.count(r"\textbf{") == len(sum(bold, []))


def test_what_cannot_be_tested_is_not_bold_but_shown(tmp_path):
    """Equal scores, and a single run. In the correction their p counts as 1."""
    scores = {"ppo": [10, 11, 12], "dppo": [500] * 3, "sppo": [500] * 3, "mine": [90]}
    for method, of_seeds in scores.items():
        for seed, score in enumerate(of_seeds):
            make_run(tmp_path / "runs", method, score, seed)
    pairs = ("sppo", "dppo"), ("sppo", "ppo"), ("mine", "ppo")
    page = write_report(tmp_path / "runs", out=tmp_path / "out", compare=pairs)
    assert not any("**" in cell for cell in table_after(page, "Last evaluation (runs: 3):")[1])
    rows = table_after(page, "## Differences, task by task")
    shown = {row[3]: row[4:] for row in rows if row[2] == "last evaluation"}
    assert shown["sppo minus dppo"] == ["0.00", "", "", ""]
    assert shown["mine minus ppo"] == ["79.00", "", "", ""]
    differences = pd.read_csv(tmp_path / "out/differences.csv").dropna(subset="p_corrected")
    corrected = stats.false_discovery_control(differences["p"].fillna(1))
    assert differences["p_corrected"].to_list() == pytest.approx(corrected)


def test_a_table_for_latex_has_tasks_down_and_noise_across(tmp_path):
    """Without a better method, which is not among those to compare."""
    scores = {"dppo": [-9, 10], "sppo_a": [90, 10], "better": [99, 99]}
    runs = make_clear_differences(tmp_path / "runs", scores)
    make_run(runs, "dppo", 5, noise="normal", policy="categorical")
    names = ("sppo_a=100% & more", "normal 0.05=noisy", f"{HOPPER}=Hopper_#1")
    write_report(runs, out=tmp_path / "out", compare=(("sppo_a", "dppo"),), names=names)
    table = (tmp_path / "out/scores.tex").read_text()
    begin = "% Compared: 100% & more with dppo.\n% Without bins (Gaussian policy): none.\n"
    assert table.startswith(begin + "% \\usepackage{booktabs}\n")
    assert "\n\\begin{table*}[t]\n" in table and "Compared: 100\\% \\& more with dppo.}" in table
    rows = table.partition("\\toprule\n")[2].partition("\\bottomrule")[0].splitlines()
    assert rows == [
        r" & \multicolumn{2}{c}{clean} & noisy \\",
        r" & dppo & 100\% \& more & dppo \\",
        r"\midrule",
        r"Hopper\_\#1 & $-$9.00 $\pm$ 0.58 & \textbf{90.00 $\pm$ 0.58} & 5.000$^*$ \\",
        rf"{LANDER} & 10.00 $\pm$ 0.58 & 10.00 $\pm$ 0.58 &  \\",
    ]
    assert "\\end{tabular}\\\\[1ex]\n$^*$ fewer runs, at least 1\n" in table


def test_an_environment_may_say_success_only_where_there_is_one(tmp_path):
    for seed, rate in enumerate([0.5, math.nan, 1.0]):
        make_run(tmp_path / "runs", "sppo", 1, seed, columns={"success_rate": rate})
    page = write_report(tmp_path / "runs", out=tmp_path / "out")
    error = stats.sem([0.5, 0, 1])
    expected = [HOPPER, "clean", f"0.50 ± {error:.2f}"]
    assert table_after(page, "Success_rate, last evaluation (runs: 3):")[1] == expected


def test_language_models_have_tables_of_their_columns_and_curves_over_texts(tmp_path, kept):
    for seed, kl in enumerate([3.0, 5.0]):
        columns = {"kl": np.linspace(0, kl, 12)}
        script = "sppo_text_kl.py"  # a copy
        make_run(tmp_path / "runs", "sppo", 1, seed, "imdb", columns=columns, script=script)
    page = write_report(tmp_path / "runs", out=tmp_path / "out", figures=True)
    assert table_after(page, "Kl, last evaluation (runs: 2):")[1] == ["imdb", "clean", "4.0 ± 1.0"]
    assert kept[0].get_supxlabel() == "texts"


# A file of a run or of a pack; of what length it is left, or what replaces 18.0 in it; what is said
BROKEN = [
    ("sessions.jsonl", 99, "JSONDecodeError"),
    ("sppo_continuous.py", None, "No such file or directory: '/sppo_continuous.py'"),
    ("progress.csv", 391, "progress.csv: cut at step 500 of 1200"),
    ("progress.csv", "inf", "an evaluation that is not a number"),
    ("progress.csv.gz", 200, "EOFError: Compressed file ended"),
    ("progress.csv.gz", "others", f"progress.csv.gz does not have {HOPPER}__sppo__none__1__abc"),
]


@pytest.mark.parametrize(("name", "left", "why"), BROKEN)
def test_a_broken_run_is_named_and_the_others_are_reported(name, left, why, grid, tmp_path, capsys):
    folder = make_run(tmp_path / "runs", "sppo", 9)
    place = folder.parent
    if name.endswith(".gz"):
        report.pack(*report.read_folders((folder,))[:2], tmp_path / "pack")
        folder = place = tmp_path / "pack"
    content = (folder / name).read_bytes()
    if left is None:
        (folder / name).unlink()
    elif left == "others":
        pd.read_csv(folder / name)[:0].to_csv(folder / name)
    elif left == "inf":
        (folder / name).write_bytes(content.replace(b",18.0,", b",inf,"))
    else:
        (folder / name).write_bytes(content[:left])
    runs, progress, broken = report.read_folders((place, grid / "runs"))
    assert len(runs) == 12 and len(progress) == 144
    (line,) = broken
    assert line.startswith(f"{folder.name}: left out: ") and why in line
    assert capsys.readouterr().err == f"{line}\n"
    with pytest.raises(report.Refusal, match="--pack: delete the runs that are left out"):
        write_report(place, grid / "runs", out=tmp_path / "out", pack=tmp_path / "packed")


def test_a_report_names_runs_that_are_not_finished_or_not_whole(tmp_path):
    runs = make_grid(tmp_path / "runs")
    begun = make_run(runs, "sppo", 1e6, seed=3, finished=False, vf_coef=9)
    early = make_run(runs, "sppo", 1e6, seed=4, finished=False)
    (early / "progress.csv").unlink()
    broken = make_run(runs, "sppo", 1e6, seed=5)
    (broken / "summary.json").write_text("{")
    for seed in (1, 2, 3):
        make_run(runs, "mine", 9, seed, policy="gaussian")
    page = write_report(runs, out=tmp_path / "out")
    shown = page.partition("## What was run")[2]
    names = f"{begun.name}, {early.name}"
    assert "**Begun, not finished, not in scores: 2.** The same commands continue them, " in shown
    assert f"or say again why they fail:\n\n{names}\n" in shown
    assert "**Not whole: 1.** To have a run whole (not a pack), delete its folder" in shown
    assert f"- `{broken.name}: left out: JSONDecodeError: Expecting" in shown
    row = table_after(page, "Last evaluation (runs: 3):")[1]
    assert row == [HOPPER, "clean", "12.0 ± 1.2", "15.0 ± 1.7", "9.000 ± 0.000"]
    places = [f"{method} in {HOPPER}, clean" for method in ("dppo", "sppo", "mine")]
    places += [f"{method} in {LANDER}, clean" for method in ("dppo", "sppo")]
    missing = "; ".join(f"{place}: {0 if 'mine' in place else 3}" for place in places)
    assert f"\nMissing seeds: {missing}.\n" in page
    assert "\nWithout bins (Gaussian policy): mine.\n" in page


# ---- Statistics


def test_pooled_wins_and_percentages_are_as_computed_by_hand(grid):
    """Logarithms of means are corrected for the variance that they have."""
    page = (grid / "report/report.md").read_text()
    logarithm = {}
    for cell, scores in SCORES.items():
        relative = stats.sem(scores) ** 2 / np.mean(scores) ** 2
        logarithm[cell] = math.log(np.mean(scores)) + math.log(1 + relative) / 2
    differences = [logarithm[task, "sppo"] - logarithm[task, "dppo"] for task in (HOPPER, LANDER)]
    header, row, *_ = table_after(page, POOLED)
    found = dict(zip(header, row))
    assert found["methods"] == "sppo against dppo"
    assert [found["cells"], found["runs"], found["tasks"]] == ["2", "12", "2 of 2"]
    # 7.5 and 3.5 of nine pairs, since 12 ties 12, and 110 ties 110; three runs have no interval
    assert found["wins"] == "0.61"
    assert found["percent"].startswith(f"{100 * (math.exp(np.mean(differences)) - 1):.1f} (")
    explained = page.partition(POOLED)[2].partition("\n| methods")[0]
    columns = "cells runs wins percent tasks".split()
    assert re.findall(r"(?m)^- \*(.+?)\*: ", explained) == columns


@pytest.mark.parametrize("pair", coverage.PAIRS)
@pytest.mark.parametrize(("seeds", "bias"), [(3, 1.5), (5, 1.0), (8, 1.0)])
def test_methods_with_equal_means_differ_by_no_percentage(pair, seeds, bias):
    """Over 2,000 data sets; 2.5 % of the intervals may lie on either side of 0."""
    far = pair == "skewed, spreads 1 and 0.1"
    scores = coverage.simulate(np.random.default_rng(1), pair, seeds, cells=18)
    value, low, high, p = report.pooled_difference(scores, report.log_mean_and_variance)
    assert abs(100 * np.expm1(value).mean()) < (5 * bias if far else bias)
    above, below = coverage.outside(0, low, high)
    assert max(above, below) <= (14 if far else 6)
    assert above + below >= 0.5  # or it is too wide to be of use
    assert ((low > 0) | (high < 0) == (p < 0.05)).all()


@pytest.mark.parametrize("pair", coverage.PAIRS)
@pytest.mark.parametrize("lead", [0, 0.4])
@pytest.mark.parametrize("cells", [1, 4])
def test_intervals_of_win_rates_cover_the_true_rate(pair, cells, lead):
    """At five seeds, in at least 97 % of the cases on either side."""
    rng = np.random.default_rng(1)
    scores = coverage.simulate(rng, pair, 5, cells, data_sets=500)
    assert max(coverage.win_rate_outside(rng, scores, pair, lead)) <= 3


def test_an_interval_of_a_win_rate_is_brunner_and_munzels():
    """Of the logit. SciPy has their test: at the p of 0.05 where the interval ends."""
    a, b = np.random.default_rng(1).normal([[0.3], [0]], 1, (2, 20)).round()  # with ties
    value, low, high = report.win_rate([(a, b)])
    test = stats.brunnermunzel(a, b)
    half_of_error = abs((value - 0.5) / test.statistic)
    degrees = optimize.brentq(lambda n: 2 * stats.t.sf(abs(test.statistic), n) - test.pvalue, 1, 99)
    half = half_of_error * stats.t.ppf(0.975, degrees)
    ends = special.logit(value) + np.array([-half, half]) / (value * (1 - value))
    assert (low, high) == pytest.approx(special.expit(ends))
    won = [(x > y) + (x == y) / 2 for x in a for y in b]
    assert value == pytest.approx(np.mean(won))
    assert report.win_rate([(b, a)]) == pytest.approx((1 - value, 1 - high, 1 - low), rel=1e-12)


def test_scores_that_do_not_vary_have_no_interval():
    tenths = [(np.full(3, 0.1), np.full(3, 0.7))]  # whose mean is rounded
    assert np.isnan(report.pooled_difference(tenths, report.mean_and_variance)[1:]).all()
    cells = [(np.full(6, 2.0), np.full(6, 1.0)), (np.full(7, 300.0), np.full(7, 100.0))]
    value, *others = report.pooled_difference(cells, report.mean_and_variance)
    assert value == (1 + 200) / 2 and np.isnan(others).all()
    rate, *interval = report.win_rate(cells)
    assert rate == 1 and np.isnan(interval).all()


def test_wins_have_an_interval_from_five_runs_on_and_one_run_has_no_intervals(tmp_path):
    runs = tmp_path / "runs"
    for seed, (a, b) in enumerate(zip([10, 12, 14, 11, 15], [13, 16, 12, 17, 18])):
        make_run(runs, "dppo", a, seed)
        make_run(runs, "sppo", b, seed)
    page = write_report(runs, out=tmp_path / "out")
    assert re.fullmatch(r"0\.82 \(0\.\d\d to 0\.\d\d\)", table_after(page, POOLED)[1][5])
    shutil.rmtree(next(runs.glob("*dppo__none__4__*")))
    page = write_report(runs, out=tmp_path / "out")
    assert table_after(page, POOLED)[1][5] == f"{17.5 / 20:.2f}"
    for folder in runs.glob("*__[1-4]__*"):
        shutil.rmtree(folder)
    page = write_report(runs, out=tmp_path / "out", figures=True)
    assert table_after(page, POOLED)[1][5:7] == ["1.00", "30.00"]
    assert table_after(page, "Last evaluation (runs: 1):")[1][2:] == ["10.00", "13.00"]
    assert "task by task" not in page
    assert not (tmp_path / "out/differences.png").exists()


@pytest.mark.parametrize(
    "below", [{"return_mean": [9.0, *10 * [-1.0], 9.0]}, {"charts/episodic_return": 0.0}]
)
def test_a_pair_is_compared_in_points_where_returns_are_0_or_less(below, tmp_path):
    """In all its cells of the task, though only one return shows it, and not another method's."""
    runs = make_grid(tmp_path / "runs")
    for noise in ("none", "normal"):
        for method, score in {"dppo": 10, "sppo": 20}.items():
            for seed in range(2):
                make_run(runs, method, score + seed, seed, "Pong", noise=noise, evaluations=6)

    def pooled(measure="last evaluation"):
        header, *rows = table_after(write_report(runs, out=tmp_path / "out"), POOLED)
        rows = [dict(zip(header, row)) for row in rows if row[0] == "sppo against dppo"]
        return {row["noise"]: row for row in rows if row["measure"] == measure}

    make_run(runs, "ppo", 9, 0, "Pong", noise="normal", columns=below)
    clean = pooled()["clean"]
    assert clean["tasks"] == "3 of 3" and not clean.get("points")
    last5 = pooled("mean of the last five evaluations")["clean"]  # there are six
    assert last5["tasks"] == f"2 of 3: {HOPPER}, {LANDER}"
    make_run(runs, "dppo", 9, 2, "Pong", noise="normal", columns=below)
    after = pooled()
    assert after["clean"]["tasks"] == f"2 of 3: {HOPPER}, {LANDER}"
    assert after["normal 0.05"]["percent"] == after["normal 0.05"]["tasks"] == ""
    assert after["clean"]["points"] == "10.0 (7.0 to 13.0) in Pong"
    assert re.fullmatch(r"[\d.]+ \([\d.]+ to [\d.]+\) in Pong", after["normal 0.05"]["points"])


def test_differences_are_welchs_and_those_of_chosen_pairs_are_corrected_and_shown(tmp_path):
    runs = make_grid(tmp_path / "runs")
    ppo, mine = [9, 11, 14], [20, 21, 25]
    for seed in range(3):
        make_run(runs, "ppo", ppo[seed], seed)
        make_run(runs, "mine", mine[seed], seed)
    pairs = ("mine", "ppo"), ("sppo", "dppo"), ("mine", "ppo")
    page = write_report(runs, out=tmp_path / "out", compare=pairs)
    assert page.count("| mine against ppo | clean | last evaluation |") == 1
    differences = pd.read_csv(tmp_path / "out/differences.csv")
    assert len(differences) == 3 * (6 + 1) and differences["p"].is_monotonic_increasing
    rows = differences.query("measure == 'last evaluation'").set_index(["task", "method", "other"])
    row = rows.loc[HOPPER, "mine", "ppo"]
    test = stats.ttest_ind(mine, ppo, equal_var=False)
    expected = [np.mean(mine) - np.mean(ppo), *test.confidence_interval(), test.pvalue]
    assert row[["difference", "low", "high", "p"]].to_list() == pytest.approx(expected)
    size = rows["runs_for_power"][HOPPER, "sppo", "dppo"], 10_000
    scores = [SCORES[HOPPER, name] for name in ("sppo", "dppo")]
    rng = np.random.default_rng(1)
    samples = [rng.normal(np.mean(x), np.std(x, ddof=1), size) for x in scores]
    test = stats.ttest_ind(*samples, equal_var=False)
    assert 0.8 < (test.pvalue < 0.05).mean() < 0.84
    chosen = differences.dropna(subset="p_corrected")
    assert set(chosen["method"] + chosen["other"]) == {"mineppo", "sppodppo"}
    corrected = stats.false_discovery_control(chosen["p"])
    assert chosen["p_corrected"].to_list() == pytest.approx(corrected)
    rows = table_after(page, "## Differences, task by task")[1:]
    assert [row[-2] for row in rows] == [f"{value:.2g}" for value in corrected]
    assert [row[-1] for row in rows] == chosen["runs_for_power"].map(str).to_list()
    small, remaining = (chosen["p"] < 0.05).sum(), (corrected < 0.05).sum()
    assert f"\n{small} of 9 differences have p < 0.05, {remaining} also after correction." in page
    assert 0 < remaining < 9 and "| mine minus ppo |" in page


def test_a_method_is_compared_with_one_baseline(tmp_path):
    """A symmetric one with what has its bins, a variant with its method."""
    expected = "dppo ppo, sppo dppo, da2c a2c, sa2c da2c, dppo-norm dppo, ppo-ce-eps ppo, "
    expected += "sb3-ppo ppo, mine sppo"
    expected = {tuple(pair.split()) for pair in expected.split(", ")}
    for method in set(sum(expected, ())):
        make_run(tmp_path, method, 1)
    runs = report.label_runs(*report.read_folders((tmp_path,))[:2])
    assert set(report.pairs_of(runs, ())) == expected
    for method in ("ppo", "sppo"):  # without bins
        for task in ("Breakout", "Pong"):
            make_run(tmp_path, method, 1, task=task)
    make_run(tmp_path, "ppo-ce-eps", 1, task="Breakout")
    make_run(tmp_path, "ppo", 1, task="alone")
    page = write_report(tmp_path, out=tmp_path / "out")
    found = re.findall(r"\*\*Not compared: (.+): name", page)
    assert found == ["Breakout: sppo", "Pong: ppo, sppo"]
    runs = runs[~runs["exp_name"].isin(["dppo", "a2c", "da2c"])]
    assert ("sppo", "ppo") in report.pairs_of(runs, ())


# ---- Figures


def legend_of(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_figures_show_every_method_in_its_own_colour(tmp_path, kept):
    runs = make_grid(tmp_path / "runs")
    for method in ("sppo-p", "dppo-coef", "mine", "yours"):
        make_run(runs, method, 3)
    write_report(runs, out=tmp_path / "out", figures=True)
    curves, differences = kept
    assert legend_of(curves) == ["dppo", "dppo-coef", "sppo", "sppo-p", "mine", "yours"]
    assert curves.get_figwidth() == differences.get_figwidth() == 6.75
    drawn = pd.read_csv(tmp_path / "out/curves.csv").query("task == @HOPPER and method == 'sppo'")
    assert drawn["mean"].to_list() == pytest.approx(curves.axes[0].lines[2].get_ydata())
    assert drawn.iloc[-1, 3:].to_list() == pytest.approx([1200, 15, math.sqrt(3), 3])
    colors = [line.get_color() for line in curves.legends[0].get_lines()]
    assert colors[2] == "tab:blue" and len(set(colors)) == 6
    assert len(set(report.COLORS.values())) == len(report.COLORS)
    test = stats.ttest_ind(*(SCORES[HOPPER, name] for name in ("sppo", "dppo")), equal_var=False)
    bar = differences.axes[0].collections[0].get_segments()[0]
    assert bar[:, 0] == pytest.approx(test.confidence_interval())


def test_chosen_methods_and_names_are_shown_in_narrow_figures_and_in_tables(tmp_path, kept):
    """A renamed method keeps its colour, place and baseline. Long names stay within the figure."""
    runs = make_grid(tmp_path / "runs", noise="normal")
    make_run(runs, "sppo", 3)
    make_run(runs, "mine", 3, noise="normal")
    name = "A with a name as long as this"
    names = (f"sppo={name}", f"dppo=B{name}", f"{HOPPER}=The hopper", "normal 0.05=noisy")
    options = {"figures": True, "narrow": True, "compare": (("sppo", "dppo"),), "names": names}
    page = write_report(runs, out=tmp_path / "out", **options)
    curves, differences = kept
    assert curves.get_figwidth() == differences.get_figwidth() == 3.25
    table = (tmp_path / "out/scores.tex").read_text()
    assert "\\begin{table}[t]" in table and "\nThe hopper & noisy & " in table
    assert legend_of(curves) == [f"B{name}", name]
    for figure in kept:
        figure.canvas.draw()
    for text in (curves.legends[0], differences.axes[0].get_yticklabels()[0]):
        box = text.get_window_extent()
        assert 0 <= box.x0 < box.x1 <= text.figure.bbox.width
    assert curves.legends[0].get_lines()[1].get_color() == "tab:blue"
    titles = [ax.get_title() for ax in curves.axes]
    assert titles == ["The hopper\nclean", "The hopper\nnoisy", f"{LANDER}\nnoisy"]
    assert [ax.get_title() for ax in differences.axes] == ["The hopper", LANDER]
    labels = [label.get_text() for label in differences.axes[0].get_yticklabels()]
    assert labels == [f"{name}\nminus B{name}, noisy"]
    assert table_after(page, "Last evaluation")[0] == ["task", "noise", f"B{name}", name, "mine"]
    assert "sppo" not in page.partition("## What was run")[0]


# ---- Packing


def test_packed_runs_give_the_same_report_and_pack_and_say_how_to_repeat_a_run(grid, tmp_path):
    runs = shutil.copytree(grid / "runs", tmp_path / "runs")
    make_run(runs, "sppo", 1, seed=3, finished=False)
    first, again = tmp_path / "pack/NAME-runs.csv.gz", tmp_path / "again/NAME-runs.csv.gz"
    page = write_report(runs, out=tmp_path / "out", pack=first)
    assert write_report(first, out=tmp_path / "out", pack=again) == page
    for name in ("NAME-runs.csv.gz", "NAME-progress.csv.gz"):
        packed = (tmp_path / "pack" / name).read_bytes()
        assert (tmp_path / "again" / name).read_bytes() == packed
        assert packed[4:8] == bytes(4)  # no time

    packed = report.read_csv(first).set_index("run_name")
    run = packed.loc[f"{LANDER}__sppo__none__2__abc"]
    assert run["command"] == "sppo_continuous.py --seed 2"
    assert run["started"] == "2026-01-03 12:00:00"
    assert run["script_sha256"] == hashlib.sha256(b"abc").hexdigest()
    (versions,) = map(json.loads, set(packed["versions"]))
    assert versions.keys() == {"numpy", "torch", "others, SHA-256"}
    assert json.loads(run["hardware"]) == ["Linux-6.1", "AVX512", None]
    scores = ["vf_coef", "return_mean", "training", "seed"]
    assert run[scores].to_list() == [0.5, 112, 56, 2]
    progress = pd.read_csv(tmp_path / "pack/NAME-progress.csv.gz")
    assert len(progress) == 12 * len(packed) == 156


def test_a_pack_grows_by_runs_of_other_versions_but_loses_none(tmp_path):
    # Which have other types in a pack
    flags = {"schedule": "1e-3", "prefix": "", "fill": "nan", "maybe": True, "never": None}
    old = make_run(tmp_path / "runs", "sppo", 1, seed=1, **flags)
    new = make_run(tmp_path / "runs", "sppo", 2, seed=2, version="def", new_flag=1, **flags)
    pack = tmp_path / "pack"
    write_report(old, out=tmp_path / "out", pack=pack)
    before = (pack / "runs.csv.gz").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))  # as on a full disk
    try:
        with pytest.raises(OSError):
            report.pack(*report.read_folders([old, new])[:2], pack)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (pack / "runs.csv.gz").read_bytes() == before
    (old / "summary.json").unlink()  # as of a run that has begun anew
    for folders in ((new,), (old, new)):
        with pytest.raises(report.Refusal, match="would lose runs, such as Hopper"):
            write_report(*folders, out=tmp_path / "out", pack=pack)
    alike = make_run(tmp_path / "runs", "sppo", 3, seed=3, **flags)
    page = write_report(pack, new, alike, out=tmp_path / "out", pack=pack)
    rows = table_after(page, "Last evaluation (runs: 3):")
    assert rows[1] == [HOPPER, "clean", "2.00 ± 0.58"]
    flags = report.read_csv(pack / "runs.csv.gz").set_index("seed")["new_flag"]
    assert np.isnan(flags[1]) and flags[2] == 1


# ---- What it refuses


def test_runs_of_a_cell_may_differ_in_where_they_ran_and_methods_in_arguments(tmp_path):
    free = {"device": "cuda", "compile": False, "track": True, "runs_dir": "elsewhere"}
    free["noise_level"] = 0.1  # of no noise
    make_run(tmp_path / "runs", "sppo", 1, seed=1)
    make_run(tmp_path / "runs", "sppo", 2, seed=2, version="def", **free)
    for noise, weights in {"none": (0.5, 0.1), "normal": (0.1, 0.5)}.items():
        for method, weight in zip(("sppo", "ppo"), weights):
            make_run(tmp_path / "runs", method, 1, 3, noise=noise, vf_coef=weight)
    for noise, width in {"none": 1, "normal": 2}.items():
        for method, (bins, depth) in {"sppo": (11, None), "ppo": (7.0, 1e5)}.items():
            flags = {"noise": noise, "width": width, "bins": bins, "depth": depth}
            make_run(tmp_path / "runs", method, 3, task=LANDER, **flags)
    page = write_report(tmp_path / "runs", out=tmp_path / "out")
    header, *rows = table_after(page, "## What was run")
    assert header[:2] == ["method", "script"]
    digests = {hashlib.sha256(version).hexdigest() for version in (b"abc", b"def")}
    assert {row[3] for row in rows} == digests and {row[0] for row in rows} == {"ppo", "sppo"}
    report.pack(*report.read_folders([tmp_path / "runs"])[:2], tmp_path / "pack")
    for shown in (page, write_report(tmp_path / "pack", out=tmp_path / "out")):
        rows = table_after(shown, "Arguments in which runs of a task differ:")
        of_vf_coef = ["vf_coef", "0.1, 0.5", "0.1, 0.5"]  # of either one in each kind of noise
        of_width = ["width", "1, 2", "1, 2"]  # of each method in one kind of noise
        of_depth = ["depth", "100000", "None"]
        assert rows[1:] == [["bins", "7", "11"], of_depth, of_vf_coef, of_width]


TWO = {"/x/__init__.py": "x11", "/y/__init__.py": ""}  # the first has the largest digest
EDITED = TWO | {"/y/__init__.py": "edited"}
STEPS = [*range(100, 1200, 100)]


@pytest.mark.parametrize(
    ("changes", "unlike"),
    [
        ({"imported": {"C:\\a\\__init__.py": "x11", "C:\\b\\__init__.py": ""}}, ""),
        ({"version": "def"}, "versions of sppo_continuous.py"),
        ({"imported": EDITED}, "versions of __init__.py"),
        ({"imported": {}}, "versions of sppo_continuous.py's imports"),
        ({"script": "mine.py", "imported": TWO | {"/sppo_continuous.py": "abc"}}, ""),
        ({"script": "mine.py", "version": "mine", "imported": EDITED}, "versions of __init__.py"),
        ({"highway": "1.10"}, "versions of packages"),
        ({"continued": {"versions": {"torch": "2.14.0"}}}, "versions of packages"),
        ({"continued": {"cpu": "AVX2"}}, ""),
        ({"noise": "normal", "version": "def"}, "versions of sppo_continuous.py"),
        ({"columns": {"step": [*STEPS, 1212]}}, ""),
        ({"columns": {"step": [*STEPS, 1224]}}, "last step 1,200 to 1,224"),
        ({"evaluations": 6}, "number of evaluations 6 to 12"),
    ],
)
def test_a_task_whose_runs_are_not_alike_is_named(changes, unlike, tmp_path):
    make_run(tmp_path / "runs", "sppo", 1, imported=TWO)
    make_run(tmp_path / "runs", "ppo", 2, **{"imported": TWO} | changes)
    page = write_report(tmp_path / "runs", out=tmp_path / "out")
    lines = re.findall(r"(?m)^\*\*Not alike: Hopper-v4: (.+)\.\*\*$", page)
    assert lines == ([unlike] if unlike else [])


def test_older_packs_have_no_digests_of_helpers_and_nothing_for_none(tmp_path):
    old = make_run(tmp_path / "runs", "sppo", 1, imported=EDITED, depth=None)
    new = make_run(tmp_path / "runs", "sppo", 2, seed=2, imported=TWO, depth=None)
    report.pack(*report.read_folders([old])[:2], tmp_path / "pack")
    packed = pd.read_csv(tmp_path / "pack/runs.csv.gz").drop(columns="files")
    packed.replace("None", "").to_csv(tmp_path / "pack/runs.csv.gz", index=False)
    page = write_report(tmp_path / "pack", new, out=tmp_path / "out")
    assert "(runs: 2)" in page and "Not alike" not in page


def test_letters_that_latex_reserves():
    assert r"a_~b^c\d".translate(report.LATEX) == r"a\_\~{}b\^{}c\textbackslash{}d"


OWN = [*report.OWN, "task", "reward", "lowest", "score"]  # what an argument may be called, too


@pytest.mark.parametrize(
    "changes, why",
    [
        *(({"version": "abc", "also": {name: 1}}, f"differ in (--)?{name} ") for name in OWN),
        ({"vf_coef": 0.1}, r"clean Hopper-v4 sppo: runs differ in vf_coef \(0.5, 0.1\)"),
        ({"vf_coef": None}, r"runs differ in vf_coef \(0.5, None\)"),
        ({"seed": 1}, "clean Hopper-v4 sppo: the same seed in Hopper.*abc and Hopper.*def"),
    ],
)
def test_a_cell_with_two_settings_is_refused(tmp_path, changes, why):
    make_run(tmp_path / "runs", "sppo", 1, seed=1)
    make_run(tmp_path / "runs", "sppo", 2, **({"seed": 2, "version": "def"} | changes))
    report.pack(*report.read_folders([tmp_path / "runs"])[:2], tmp_path / "pack")
    for folder in ("runs", "pack"):
        with pytest.raises(report.Refusal, match=why):
            write_report(tmp_path / folder, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_logged_quantity_may_be_called_as_a_column(grid, tmp_path):
    """It has a table of its own, and changes no other."""
    names = {*report.RUN, *report.PROVENANCE, "last evaluation", "a score"}
    names -= {*report.EVALUATION}
    runs = make_grid(tmp_path / "runs", columns=dict.fromkeys(names, 7))
    page = write_report(runs, out=tmp_path / "out")
    for title in ("Last evaluation", "Training"):
        rows = table_after((grid / "report/report.md").read_text(), title)
        assert table_after(page, title) == rows
    for name in names:
        assert table_after(page, f"Logged {name}, last evaluation ")[1][2:] == ["7.000 ± 0.000"] * 2


@pytest.mark.parametrize(
    "options, why",
    [
        (
            {"compare": (("sppo", "ppo"),)},
            "--compare sppo ppo: no task has both; before --names, .* dppo, sppo",
        ),
        ({"names": ("a=b",)}, "--names a=b: not NAME=SHOWN; there are .*, clean, dppo, sppo"),
        ({"names": ("sppo=",)}, "--names sppo=: not NAME=SHOWN"),
        ({"names": ("sppo=dppo",)}, "--names sppo=dppo: two would be called the same"),
    ],
)
def test_options_that_mean_nothing_are_refused(grid, tmp_path, options, why):
    with pytest.raises(report.Refusal, match=why):
        write_report(grid / "runs", **({"out": tmp_path / "out"} | options))


NAMES = ["null", "NA", "None", "nan", "", "_mine", "a|b", "$a$b", "*a*"]
NAMES += ["task", "noise", "a", "a=方"]


def test_any_name_of_a_method_is_shown_as_it_is(tmp_path, kept, capsys):
    """Its letters may not be in figures."""
    runs = tmp_path / "runs"
    for i, name in enumerate(NAMES):
        for seed in range(2):
            make_run(runs, name, 10 + i + seed, seed).rename(runs / f"{i}{seed}")
    options = {"figures": True, "compare": (("null", ""), ("_mine", "a|b"))}
    page = write_report(runs, out=tmp_path / "out", pack=tmp_path / "pack", **options)
    assert capsys.readouterr().err == "figures lack letters (use --names): 方\n"
    names = [name.replace("|", r"\|") for name in sorted(NAMES)]
    assert f"| {' | '.join(['task', 'noise', *names])} |\n" in page
    assert "| null minus  |" in page and r"| _mine minus a\|b |" in page
    assert write_report(tmp_path / "pack", out=tmp_path / "out", **options) == page
    for figure in kept:
        figure.canvas.draw()
        texts = figure.findobj(report.plt.Text)
        assert not any(text.get_parse_math() for text in texts)
    assert legend_of(kept[0]) == legend_of(kept[2]) == ["", "_mine", "a|b", "null"]
    page = write_report(runs, out=tmp_path / "out", names=("a=方=k=20", "a=first"))
    assert {"k=20", "first"} <= set(table_after(page, "Last evaluation")[0])
    # Too wide with noise across
    assert f"\n{HOPPER} & clean & " in (tmp_path / "out/scores.tex").read_text()


def test_folders_without_finished_runs_are_refused(grid, tmp_path, capsys, monkeypatch):
    """On the command line a refusal is one line."""
    (tmp_path / "runs/logs").mkdir(parents=True)
    begun = make_run(tmp_path / "runs", "sppo", 1, finished=False)
    copied = shutil.copytree(grid / "runs", tmp_path / "copied")
    with_pack = shutil.copytree(grid / "runs", tmp_path / "with_pack")
    report.pack(*report.read_folders((with_pack,))[:2], with_pack)
    refused = {
        (begun, tmp_path / "runs/logs"): "none of 1 runs has finished",
        (begun, tmp_path / "run"): "run: no such folder",
        (grid / "runs", copied): "Hopper-v4__dppo__none__0__abc: in two places",
        (with_pack,): "Hopper-v4__dppo__none__0__abc: in two places",
    }
    for folders, why in refused.items():
        with pytest.raises(report.Refusal, match=why):
            write_report(*folders, out=tmp_path / "out")
    said = capsys.readouterr().err
    assert f"{tmp_path}/runs/logs: no runs in it " in said
    shutil.copytree(grid / "runs", copied / "more")
    assert len(report.read_folders((copied,))[0]) == 12
    assert f"{copied}/more is read only if it is given, too" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path)])
    with pytest.raises(SystemExit, match="^error: none of 0 runs has finished; give folders .*$"):
        runpy.run_path(str(ROOT / "report.py"), run_name="__main__")


def test_a_report_needs_neither_a_notebooks_backend_nor_letters_of_the_terminal(grid, tmp_path):
    command = [sys.executable, ROOT / "report.py", grid / "runs", "--out", tmp_path / "größer"]
    env = os.environ | {"MPLBACKEND": "module://missing", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{tmp_path}/gr\\xf6\\xdfer/report.md\n"


def test_an_earlier_report_is_replaced_and_other_files_stay(grid, tmp_path, monkeypatch):
    """A folder without a report is not written to. Figures are PNG, and PDF whose text is text."""
    monkeypatch.setenv("HOME", str(tmp_path))
    out = tmp_path / "out"
    out.mkdir()
    (out / ".gitignore").touch()
    write_report(grid / "runs", out=Path("~/out"), figures=True)
    for name in ("curves", "differences"):
        pdf = (out / f"{name}.pdf").read_bytes()
        assert pdf.startswith(b"%PDF") and b"/Type3" not in pdf
        assert (out / f"{name}.png").read_bytes()[1:4] == b"PNG"
    with pytest.raises(report.Refusal, match="a folder that is not a report"):
        write_report(grid / "runs", out=tmp_path)
    (out / "README.md").write_text("mine")
    (out / "report.md").unlink()  # as if the report had been interrupted
    one = make_run(tmp_path / "runs", "sppo", 1)
    write_report(one, out=out, figures=True)
    assert (out / "README.md").read_text() == "mine" and (out / "curves.png").exists()
    assert not (out / "differences.png").exists()
