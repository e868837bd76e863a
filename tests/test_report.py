"""report.py and analysis/: numbers against hand-computed ones and SciPy, packs, and refusals."""

import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pytest import approx
from scipy import optimize, special, stats

import report
from analysis import compare, figures, runs, tables

ROOT = Path(__file__).resolve().parent.parent
HOPPER = "Hopper-v4"
LANDER = "LunarLanderContinuous-v3"
RUNS, OUT = Path("runs"), Path("out")  # in the folder of the test
SCORES = {  # {(task, method): last evaluations, a seed each}
    (HOPPER, "dppo"): [10, 12, 14],
    (HOPPER, "sppo"): [12, 15, 18],
    (LANDER, "dppo"): [100, 110, 120],
    (LANDER, "sppo"): [99, 110, 112],
}


def make_run(
    method,
    score,
    seed=1,
    task=HOPPER,
    script="sppo_continuous.py",
    version="abc",
    imported="",
    columns=(),
    evaluations=12,
    finished=True,
    failed="",
    continued=(),
    runs=RUNS,
    **changes,
):
    """A folder as scripts leave it, with twelve evaluations, the first the best, the last `score`.
    `version` and `imported`: all that is in the script and in what it imports; `columns` of
    progress.csv; `failed`: why; what a `continued` run's second session says; `changes` of
    arguments."""
    texts = {rf"C:\{script}": version, "/y/helper.py": imported}
    files = {path: hashlib.sha256(text.encode()).hexdigest() for path, text in texts.items()}
    args = {"exp_name": method, "env_id": task, "seed": seed, "noise": "none", "noise_level": 0.05}
    args |= {"total_timesteps": 1200, "vf_coef": 0.5, "hidden_sizes": [64, 64], "device": "cpu"}
    args |= changes
    folder = runs / f"{task}__{method}__{args['noise']}__{seed}__{version}"
    folder.mkdir(parents=True)
    (folder / script).write_text(version)
    session = {"args": args, "script": script, "versions": {"torch": "2.13.0"}, "files": files}
    session |= {"command": ["sppo_continuous.py", "--seed", str(seed)], "platform": "Linux-6.1"}
    session |= {"started": "2026-01-01 12:00:00", "cpu": "AVX512", "gpu": None}
    later = session | dict(continued)
    (folder / "sessions.jsonl").write_text(f"{json.dumps(session)}\n{json.dumps(later)}\n")
    progress = {"step": range(100, 1300, 100), "return_std": 1.0, "length_mean": 9.0}
    progress["return_mean"] = [2 * score, *np.linspace(0, score, 12)[1:]]
    progress["charts/episodic_return"] = np.linspace(0, score / 2, 12)
    table = pd.DataFrame(progress | dict(columns))[-evaluations:]
    table.to_csv(folder / "progress.csv", index=False)
    if failed:
        (folder / "failed.txt").write_text(f"{failed}\n")
    elif finished:
        summary = {"step": int(table["step"].max())}
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def make_grid(runs=RUNS):
    for (task, method), scores in SCORES.items():
        for seed, score in enumerate(scores):
            make_run(method, score, seed, task, runs=runs)
    return runs


def write_report(*folders, out=OUT, draws=False, **options):
    """Of RUNS, if there are no `folders`."""
    with pytest.MonkeyPatch.context() as patch:
        if not draws:  # figures take most of the time
            patch.setattr(figures, "draw_curves", lambda *args: None)
            patch.setattr(figures, "draw_differences", lambda *args: None)
        report.main(report.Args(folders=folders or (RUNS,), out=out, **options))
    return (out / "report.md").read_text()


def rows_after(page, title="## Scores"):
    """Rows of the first table after the line that begins with `title`, the header first."""
    _, after = page.split(f"\n{title}", 1)
    table = re.search(r"(?m)(^\|.*\n)+", after)[0]
    header, _, *rows = table.splitlines()
    return [header, *rows]


@pytest.fixture(autouse=True)
def workplace(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """Two methods on two tasks with three seeds, in runs/, and the report of them, in report/."""
    folder = tmp_path_factory.mktemp("grid")
    write_report(make_grid(folder / "runs"), out=folder / "report")
    return folder


# ---- Tables


def test_tables_have_means_and_errors_and_scores_csv_has_intervals_by_t(grid):
    page = (grid / "report/report.md").read_text()
    assert rows_after(page) == [
        "| task | noise | dppo | sppo |",
        "| Hopper-v4 | clean | 12.0 ± 1.2 | 15.0 ± 1.7 |",
        "| LunarLanderContinuous-v3 | clean | 110.0 ± 5.8 | 107.0 ± 4.0 |",
    ]
    # Of twelve evaluations that rise to the score the last five are 7/11 to 11/11 of it
    rows = rows_after(page, "Last five evaluations (return_mean, mean of the last five rows):")
    assert rows[1].startswith(f"| Hopper-v4 | clean | {12 * 9 / 11:.2f} ± 0.")
    rows = rows_after(page, "Training (charts/episodic_return, last row):")
    assert rows[2].startswith("| LunarLanderContinuous-v3 | clean | 55.0 ± 2.9 |")

    scores = pd.read_csv(grid / "report/scores.csv").set_index(["measure", "task", "method"])
    row = scores.loc["last_evaluation", HOPPER, "sppo"]
    interval = stats.ttest_1samp([12, 15, 18], 0).confidence_interval()
    assert (row["low"], row["high"]) == approx((interval.low, interval.high))
    assert [row["mean"], row["runs"]] == [15, 3]


def make_clear_differences(scores):
    """Of {method: [its mean on Hopper, on LunarLander]}; the standard deviation is 1."""
    for method, means in scores.items():
        for task, mean in zip([HOPPER, LANDER], means):
            for seed in range(3):
                make_run(method, mean - 1 + seed, seed, task)


def test_the_best_is_not_bold_if_it_does_not_differ_from_all_that_it_is_compared_with():
    """On Hopper a baseline is the best, on LunarLander a method."""
    scores = {"ppo": [10, 10], "dppo": [91, 50], "sppo": [90, 51]}
    make_clear_differences(scores)
    page = write_report()
    assert "**" not in "".join(rows_after(page))


def test_the_table_for_latex_is_of_the_methods_compared_with_few_columns():
    """And the report begins with the number of clear differences."""
    scores = {"dppo": [-9], "sppo_a": [90], "better": [99]}
    make_clear_differences(scores)
    make_run("dppo", 5, noise="normal")
    names = ("sppo_a=100% & <more", "normal 0.05=noisy", f"{HOPPER}=Hopper_#1")
    page = write_report(compare=(("sppo_a", "dppo"),), names=names)
    begin = "# Last evaluation (return_mean, last row)\n\n"
    assert page.startswith(f"{begin}**1 of 1 differences have p below 0.05 after correction.**\n")
    row = rows_after(page, "## Differences")[1]
    assert row.startswith("| Hopper_#1 | clean | 100% & <more | dppo | 99.0 (96.7 to 101.3) |")
    table = Path("out/scores.tex").read_text()
    assert "\\begin{table*}[t]" in table  # as wide as a page
    assert "Compared: 100\\% \\& $<$more with dppo.}" in table
    rows = table.partition("\\toprule\n")[2].partition("\\bottomrule")[0].splitlines()
    assert rows == [
        r"task & method & clean & noisy \\",
        r"\midrule",
        r"Hopper\_\#1 & dppo & $-$9.00 $\pm$ 0.58 & 5.000 (n = 1) \\",
        r"Hopper\_\#1 & 100\% \& $<$more & \textbf{90.00 $\pm$ 0.58} &  \\",
    ]


def test_success_is_filled_for_scores_and_curves_where_a_script_says_it():
    """Success is tested, other measures are shown."""
    make_run("sppo", 1, columns={"success_rate": 0.5})
    for method, seed in (("sppo", 2), ("dppo", 1), ("dppo", 2)):
        make_run(method, 1, seed, columns={"success_rate": math.nan})
    make_run("sb3-ppo", 1, script="sb3.py")
    make_run("sppo", 1, seed=3, imported="an older environment")
    page = write_report(measure="success_rate", draws=True)
    assert rows_after(page) == [
        "| task | noise | dppo | sppo | sb3-ppo |",
        "| Hopper-v4 | clean | 0.00 ± 0.00 | 0.25 ± 0.25 (n = 2 of 3) | (n = 0 of 1) |",
    ]
    assert "| 0.2 (-2.9 " in rows_after(page, "## Differences")[1]
    assert rows_after(page, "## Over tasks")[1].endswith("| 0.7500 |")
    row = rows_after(page, "Last evaluation (")[1]
    assert row.startswith("| Hopper-v4 | clean | 1.000 ± 0.000 |")
    assert "clean, sb3-ppo: Hopper-v4__sb3-ppo__none__1__abc (lacks the measure)" in page
    curves = pd.read_csv("out/curves.csv").groupby("method")["mean"].last()
    assert curves.to_dict() == {"dppo": 0, "sppo": 0.25}


def test_runs_that_lack_the_measure_are_named_and_what_is_alone_in_a_pair():
    """One seed lacks it in the last five rows, and a method in all."""
    partly = [*range(8), math.nan, 1, 2, 3]
    for seed in range(3):
        columns = {"cost": partly if seed == 1 else 1.0 + seed}
        make_run("dppo", 1, seed, columns=columns)
        make_run("sppo", 1, seed)
    page = write_report(measure="cost:five")
    row = "| Hopper-v4 | clean | 2.0 ± 1.0 (n = 2 of 3) | (n = 0 of 3) |"
    assert rows_after(page)[1] == row
    assert f"{HOPPER}, clean, dppo: {HOPPER}__dppo__none__1__abc (lacks the measure)**" in page
    assert page.count("(lacks the measure)") == 1 + 3
    assert f"\nNot compared: dppo without sppo: {HOPPER}, clean.\n" in page
    assert "**0 of 0 differences" in page


def test_failed_runs_count_with_the_score_that_is_given():
    """Others that did not finish do not."""
    why = ["", "", "Failed: error: gradient not finite, step 9 (rate?)", "ValueError: NaN in QACC"]
    for seed, score in enumerate([10, 12, 14, 15]):
        make_run("dppo", score, seed)
        make_run("sppo", 2 * score, seed, failed=why[seed])
    make_run("dppo", 16, seed=4)
    make_run("sppo", 1, seed=4, finished=False)
    page = write_report()
    begin = f"2 of 10 runs failed: 1 ValueError, 1 diverged. Scores given: {HOPPER} none (if none, "
    assert page.splitlines()[2].startswith(begin)
    row = "| Hopper-v4 | clean | 13.4 ± 1.1 | 22.0 ± 2.0 (n = 2 of 5) |"
    assert rows_after(page)[1] == row
    assert f"{HOPPER}__sppo__none__2__abc (diverged: gradient not finite, step 9 (rate?))" in page
    assert rows_after(page, "Training (")[1].endswith(" 11.0 ± 1.0 (n = 2 of 5) |")

    pack = Path("N-runs.csv.gz")
    options = {"failed": ("-3",), "names": (f"{HOPPER}=Hop",)}
    page = write_report(pack=pack, **options)
    assert page == write_report(pack, **options)
    assert "Scores given: Hop -3 (" in page.splitlines()[2]
    assert "Scores given: Hop -3 (" in Path("out/scores.tex").read_text()
    assert "2 failed runs have the score given from their last evaluation on." in page
    (row,) = pd.read_csv("out/differences.csv").to_dict("records")
    test = stats.ttest_ind([20, 24, -3, -3], [10, 12, 14, 15, 16], equal_var=False)
    assert row["p"] == approx(test.pvalue)
    run = RUNS / f"{HOPPER}__sppo__none__2__abc"
    with pytest.raises(runs.Refusal, match="no finished run of 1; diverged: gradient not finite,"):
        write_report(run)
    (run / "summary.json").write_text('{"step": 1200}')
    assert "1 of 10 runs failed: 1 ValueError." in write_report()


def test_failed_runs_have_the_score_given_in_curves(monkeypatch):
    """From their last evaluation on."""
    curves = []
    monkeypatch.setattr(figures, "draw_curves", lambda runs, progress, *_: curves.append(progress))
    make_run("sppo", 11, seed=1)
    make_run("sppo", 22, seed=2, failed="ValueError: a")
    path = RUNS / f"{HOPPER}__sppo__none__2__abc/progress.csv"
    pd.read_csv(path)[:5].to_csv(path, index=False)
    monkeypatch.setattr(figures, "draw_differences", lambda *_: None)
    report.main(report.Args(folders=(RUNS,), out=OUT, failed=("-3",)))
    table = curves[0].pivot(index="step", columns="run_name", values="return_mean")
    assert table.iloc[:4, 1].to_list() == approx(pd.read_csv(path)["return_mean"][:4].to_list())
    assert (table.iloc[4:, 1] == -3).all()
    assert (table.iloc[:, 0] != -3).all()
    assert len(table) == 12


def test_another_run_of_a_seed_stands_for_one_that_failed():
    """With another rate or script. Of several that failed, the last counts."""
    for seed in (1, 2, 3):
        make_run("dppo", seed, seed)
        make_run("sppo", seed, seed) if seed > 1 else None
    make_run("sppo", 9, seed=2, failed="ValueError: a", vf_coef=0.1, version="def")
    page = write_report()
    name = f"{HOPPER}__sppo__none__2__def"
    assert f"**Failed, but another run of the seed counts: {name} (ValueError: a).**" in page
    assert rows_after(page)[1].endswith("| 2.50 ± 0.50 (n = 2) |")
    for version, hour in (("one", 10), ("two", 14)):
        folder = make_run("sppo", 9, seed=1, failed=f"ValueError: {version}", version=version)
        sessions = folder / "sessions.jsonl"
        sessions.write_text(sessions.read_text().replace("12:00:00", f"{hour}:00:00"))
    page = write_report()
    assert "1 of 6 runs failed: 1 ValueError." in page
    assert "one (ValueError: one)" in page


def test_a_failed_run_is_not_replaced_by_the_one_it_began_from():
    parents = [make_run("sppo", 1, seed, version="short") for seed in (1, 2)]
    for seed, parent in enumerate(parents, 1):
        flags = {"total_timesteps": 2400, "start_from": parent.name}
        make_run("sppo", 2, seed, failed=(seed == 1) and "ValueError: a", version="long", **flags)
    page = write_report()
    assert "1 of 2 runs failed: 1 ValueError." in page
    assert rows_after(page)[1].endswith("| 2.000 (n = 1 of 2) |")


@pytest.mark.parametrize(
    ("one", "other"),
    [(1, "1"), (True, "True"), (None, "None"), (1.0, "1.0"), ([1], "[1]"), ({"a": 1}, "{'a': 1}")],
)
def test_an_environments_argument_keeps_its_type(one, other):
    """In the task's name, also beside others."""
    tasks = []
    for value in (one, other):
        make_run("sppo", 1, env_kwargs=json.dumps({"level": value}), version=f"{len(tasks)}")
        (folder,) = RUNS.iterdir()
        table, _ = runs.read_run(folder)
        tasks += table["env_kwargs"].to_list()
        shutil.rmtree(folder)
    assert len(set(tasks)) == 2


def test_an_interval_shows_on_which_side_of_0_its_bounds_are():
    assert tables.interval_text(-20, -41, 0.4) == "-20.0 (-41.0 to 0.4)"
    assert tables.interval_text(-20, -41, -0.04) == "-20.00 (-41.00 to -0.04)"
    assert tables.interval_text(-20, -40, 0.0) == "-20 (-40 to 0)"


def test_negative_numbers_have_minus_signs_in_latex_when_bold_too():
    assert tables.latex_cell("**-20 ± 3** (-4 to 5)") == r"\textbf{$-$20 ± 3} ($-$4 to 5)"


def test_scores_that_differ_by_rounding_are_equal():
    for seed in range(5):
        make_run("dppo", 100, seed)
        make_run("sppo", 100 * (1 + 1e-15 * (seed + 1)), seed)
    page = write_report()
    assert "**0 of 1 differences have p below 0.05" in page


@pytest.mark.parametrize(
    ("measure", "score"),
    [
        ("a.py:cost", 5),
        ("a.py:cost:last", 5),
        ("a.py:cost:five", (2 + 6 + 5 + 3 + 5) / 5),
        # Half as often in the second half: a row counts for the steps since the row before
        ("a.py:cost:all", (1 * (3 + 1 + 4 + 1 + 5) + 2 * (9 + 2 + 6 + 5 + 3 + 5)) / 17),
        ("a.py:five", 7),
    ],
)
def test_a_measure_is_a_column_and_a_time(measure, score):
    """A whole column's name comes first. Before training there is nothing to weigh."""
    columns = {"step": [*range(0, 600, 100), *range(700, 1900, 200)], "a.py:five": 7}
    columns["a.py:cost"] = [99, 3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    make_run("sppo", 1, columns=columns)
    write_report(measure=measure)
    assert pd.read_csv("out/runs.csv")[measure].item() == approx(score)


def test_a_run_that_began_elsewhere_is_measured_from_there():
    columns = {"step": range(2000, 3200, 100), "cost": [0, *[50] * 10, 83]}
    make_run("dppo", 1, columns=columns)
    make_run("sppo", 1, columns=columns, start_from="runs/elsewhere")
    columns |= {"charts/episodic_return": [math.nan, *range(11)]}  # as language models begin
    make_run("text", 1, columns=columns, start_from="runs/elsewhere")
    write_report(measure="cost:all")
    scores = pd.read_csv("out/runs.csv").set_index("method")["cost:all"]
    assert scores["sppo"] == approx(583 / 12)
    assert scores["text"] == approx(583 / 11)
    assert scores["dppo"] == approx(100 * 583 / 3100)


def test_of_costs_the_lowest_is_the_best_and_beats():
    scores = {"dppo": [90], "sppo": [10]}
    make_clear_differences(scores)
    page = write_report(lower_is_better=True)
    assert rows_after(page)[1] == "| Hopper-v4 | clean | 90.00 ± 0.58 | **10.00 ± 0.58** |"
    assert "Bold: the lowest of" in page
    assert rows_after(page, "## Over tasks")[1].endswith("| 1.000 |")
    assert "**" not in page.partition("## Other measures")[2]


def test_figures_and_tables_have_the_names_and_colours_that_are_chosen(grid, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, file: drawn.append(figure))
    names = ("sppo=SPPO, k=20", f"{HOPPER}=The hopper", "last_evaluation=Steps = time")
    names += ("return_mean=Return",)
    options = {"names": names, "colors": ("sppo=#123456",), "draws": True}
    page = write_report(grid / "runs", **options)
    assert page.startswith("# Steps = time (return_mean, last row)\n")
    curves, differences = drawn
    assert curves.get_supylabel() == "Return"
    (legend,) = curves.legends
    assert [text.get_text() for text in legend.get_texts()] == ["dppo", "SPPO, k=20"]
    assert legend.get_lines()[1].get_color() == "#123456"
    points = pd.read_csv("out/curves.csv").query("method == 'SPPO, k=20'")
    assert points.iloc[-1, 3:].to_list() == approx([1200, 15, math.sqrt(3), 3])
    assert [ax.get_title("right") for ax in differences.axes] == [LANDER, "The hopper"]


def test_rows_of_differences_stand_in_one_order(monkeypatch):
    """Also if the first task lacks one."""
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, file: drawn.append(figure))
    rows = [["A", "clean", method, "ppo"] for method in "xz"]
    rows += [["B", "clean", method, "ppo"] for method in "xyz"]
    table = pd.DataFrame(rows, columns=[*runs.CELL, "baseline"])
    figures.draw_differences(table.assign(difference=0, low=-1, high=1), "", "", 6.5)
    first, second = drawn[0].axes
    labels = [label.get_text() for label in first.get_yticklabels()]
    assert labels == [f"{method} minus ppo, clean" for method in "zyx"]
    assert first.lines[0].get_ydata().tolist() == [2, 0]
    assert second.lines[0].get_ydata().tolist() == [2, 1, 0]


# ---- Statistics


@pytest.mark.parametrize("other", [[0.7, 0.7, 0.7], [0.7]])
def test_equal_scores_and_single_runs_have_no_interval(other):
    found = compare.difference(np.full(3, 0.1), np.array(other))  # whose mean is rounded
    assert found.value == approx(-0.6)
    assert np.isnan([found.low, found.high, found.p]).all()


def test_the_probability_of_improvement_has_brunner_and_munzels_interval():
    """Of the logit. SciPy has their test: at the p of 0.05 where the interval ends."""
    a, b = np.random.default_rng(1).normal([[0.3], [0]], 1, (2, 20)).round()  # with ties
    value, low, high = compare.probability_of_improvement([(a, b)])
    assert value == approx(stats.mannwhitneyu(a, b).statistic / 20**2)
    test = stats.brunnermunzel(a, b)
    t = abs(test.statistic)
    freedom = optimize.brentq(lambda n: 2 * stats.t.sf(t, n) - test.pvalue, 1, 99)
    half = abs(value - 0.5) / t * stats.t.ppf(0.975, freedom)
    half /= value * (1 - value)
    assert special.logit([low, high]) == approx(special.logit(value) + [-half, half])


def test_fewer_than_five_runs_have_a_probability_without_interval(grid):
    page = (grid / "report/report.md").read_text()
    # 7.5 and 3.5 of nine pairs, since 12 ties 12, and 110 ties 110
    assert rows_after(page, "## Over tasks")[1] == "| sppo | dppo | 2 | 0.6111 |"


def test_differences_are_welchs_and_corrected_for_the_pairs_that_are_compared():
    """What cannot be tested counts with p = 1, and is shown. The table begins with the clearest."""
    make_grid()
    make_run("alone", 9)
    pairs = ("sppo", "dppo"), ("alone", "dppo"), ("sppo", "dppo")
    page = write_report(compare=pairs)
    differences = pd.read_csv("out/differences.csv")
    assert len(differences) == 2 + 1
    assert "over 3 rows" in page
    last = rows_after(page, "## Differences")[-1]
    assert last == "| Hopper-v4 | clean | alone | dppo | -3.000 |  | 1 |"
    corrected = stats.false_discovery_control(differences["p"].fillna(1))
    assert differences["p_corrected"].to_list() == approx(corrected)
    for task, row in zip((HOPPER, LANDER), differences.to_dict("records")):
        assert row["task"] == task
        scores = SCORES[task, "sppo"]
        baseline = SCORES[task, "dppo"]
        test = stats.ttest_ind(scores, baseline, equal_var=False)
        assert row["difference"] == approx(np.mean(scores) - np.mean(baseline))
        assert (row["low"], row["high"]) == approx(tuple(test.confidence_interval()))
        assert row["p"] == approx(test.pvalue)


def test_a_method_is_compared_with_one_baseline():
    """A symmetric one with what has its bins, a variant with its method."""
    expected = "dppo ppo, sppo dppo, da2c a2c, sa2c da2c, dppo-norm dppo, sb3-ppo ppo, mine sppo"
    expected = {tuple(pair.split()) for pair in expected.split(", ")}
    for method in set(sum(expected, ())):
        make_run(method, 1)
    found = runs.in_cells(runs.read([RUNS])[0])
    assert set(compare.pairs_of(found)) == expected
    without = found[~found["method"].isin(["dppo", "a2c", "da2c"])]
    assert ("sppo", "ppo") in compare.pairs_of(without)


# ---- Figures


def test_figures_are_written_as_png_and_as_pdf_whose_text_is_text(grid):
    """A report in the same folder takes the place of the first, and of no other file. A refusal is
    one line."""
    command = [sys.executable, ROOT / "report.py", grid / "runs", "--out", OUT, "--narrow"]
    subprocess.run(command, check=True)
    for name in ("curves", "differences"):
        assert (OUT / f"{name}.png").read_bytes()[1:4] == b"PNG"
        pdf = (OUT / f"{name}.pdf").read_bytes()
        assert b"/Type3" not in pdf
        assert b"/MediaBox [ 0 0 234 " in pdf  # 3.25 inches
    (OUT / "differences.md").write_text("mine")
    write_report(make_run("sppo", 1))
    assert (OUT / "differences.md").read_text() == "mine"
    assert not (OUT / "differences.png").exists()
    done = subprocess.run([*command, "--measure", "none"], capture_output=True, text=True)
    assert re.fullmatch("error: --measure none: .*\n", done.stderr)
    twice = [*command, "--names", "sppo=SPPO", "--names=ppo=PPO"]
    done = subprocess.run(twice, capture_output=True, text=True)
    assert done.stderr == "error: --names is there twice: give all its values at once\n"


# ---- Packs


def test_packed_runs_give_the_same_report_and_pack_and_say_how_to_repeat_a_run(grid):
    shutil.copytree(grid / "runs", RUNS)
    make_run("sppo", 1, seed=3, finished=False)
    first = Path("pack/NAME-runs.csv.gz")
    again = Path("again/NAME-runs.csv.gz")
    page = write_report(pack=first)
    assert write_report(first, pack=again) == page
    for file in first.parent.iterdir():
        packed = file.read_bytes()
        assert (again.parent / file.name).read_bytes() == packed
        assert packed[4:8] == bytes(4)  # no time
    table, progress = runs.read_pack(first)
    run = table.set_index("run_name").loc[f"{LANDER}__sppo__none__2__abc"]
    assert run["command"] == "sppo_continuous.py --seed 2"
    assert run["script_sha256"] == hashlib.sha256(b"abc").hexdigest()
    assert json.loads(run["hardware"]) == ["Linux-6.1", "AVX512", None]
    assert len(table) == 13
    assert len(progress) == 13 * 12


def test_a_pack_grows_but_loses_no_run():
    """Texts and numbers of flags stay what they are. New versions may have new flags."""
    flags = {"schedule": "1e-3", "prefix": "", "fill": "nan", "maybe": True, "never": None}
    old = make_run("sppo", 1, seed=1, **flags)
    new = make_run("sppo", 2, seed=2, version="def", new_flag=1, **flags)
    pack = Path("NAME-runs.csv.gz")
    write_report(old, pack=pack)
    (old / "summary.json").unlink()  # as of a run that has begun anew
    for folders in ((new,), (old, new)):
        with pytest.raises(runs.Refusal, match="would lose runs, such as Hopper"):
            write_report(*folders, pack=pack)
    page = write_report(pack, new, pack=pack)
    assert rows_after(page)[1] == "| Hopper-v4 | clean | 1.50 ± 0.50 |"


def test_runs_behind_links_are_read_once(grid):
    """Links to runs, to folders of links, and to what is around them."""
    linked = RUNS / "linked"
    linked.mkdir(parents=True)
    for place in (grid / "runs").iterdir():
        (linked / place.name).symlink_to(place)
    (linked / "round").symlink_to(RUNS.absolute())
    (RUNS / "again").symlink_to("linked")
    page = write_report()
    assert page == (grid / "report/report.md").read_text()
    (RUNS / "gone").symlink_to("nowhere")
    page = write_report()
    assert "\n**Broken: gone: left out: FileNotFoundError" in page


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ((",18.0,", ",inf,"), "an evaluation that is not a number"),
        (("\n1200,", "\n1190,"), "progress.csv: cut before step 1200"),
    ],
)
def test_what_is_broken_is_named_and_the_others_are_reported(change, why, grid):
    folder = make_run("sppo", 9)
    file = folder / "progress.csv"
    file.write_text(file.read_text().replace(*change))
    page = write_report(folder, grid / "runs")
    (line,) = re.findall(r"\*\*Broken: (.*)\*\*", page)
    assert "left out: " in line
    assert why in line
    assert rows_after(page)[1].endswith("| 15.0 ± 1.7 |")
    with pytest.raises(runs.Refusal, match="--pack: first delete what is broken"):
        write_report(folder, grid / "runs", pack=Path("N-runs.csv.gz"))


def test_runs_that_are_not_finished_and_seeds_that_a_cell_lacks_are_named():
    make_grid()
    begun = make_run("sppo", 1e6, seed=3, finished=False, vf_coef=9)
    (begun / "progress.csv").unlink()
    make_run("mine", 9, seed=1)
    page = write_report()
    place = f"{HOPPER}, clean, sppo: {begun.name}"
    assert f"\n**No score of its own: {place} (not finished)**\n" in page
    assert f"\nMissing seeds: {HOPPER}, clean, mine: 0, 2.\n" in page
    assert rows_after(page)[1].endswith("| 15.0 ± 1.7 (n = 3 of 4) | 9.000 (n = 1) |")
    assert "(n = 3 of 4)" in Path("out/scores.tex").read_text()


# ---- What is refused, or named


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"vf_coef": 0.1}, r"Hopper-v4 clean sppo: runs differ in vf_coef \(0.1, 0.5\)"),
        ({"vf_coef": 0.1, "failed": "ValueError: nan"}, r"runs differ in vf_coef"),
        ({"script": "mine.py"}, r"runs differ in script \(mine.py, sppo_continuous.py\)"),
        ({"seed": 1}, r"Hopper-v4 clean sppo: seed 1 is there twice \(.* and .*\)"),
    ],
)
def test_a_cell_with_two_settings_is_refused(changes, why):
    make_run("sppo", 1, seed=1)
    make_run("sppo", 2, **({"seed": 2, "version": "def"} | changes))
    with pytest.raises(runs.Refusal, match=why):
        write_report()
    assert not OUT.exists()


def test_runs_of_a_cell_may_differ_in_where_they_ran_and_methods_in_settings():
    free = {"device": "cuda", "compile": False, "track": True, "runs_dir": "elsewhere"}
    free["noise_level"] = 0.1  # of no noise
    make_run("sppo", 1, seed=1, gamma=1)
    make_run("sppo", 2, seed=2, version="def", gamma=1.0, **free)
    make_run("ppo", 1, vf_coef=0.1, depth=None)
    make_run("sppo", 1, task=LANDER, vf_coef=0.1)  # the other way round
    make_run("ppo", 1, task=LANDER)
    page = write_report()
    assert rows_after(page, "## What was run") == [
        "| setting | ppo | sppo |",
        "| depth | , None |  |",
        "| gamma |  | , 1 |",
        "| vf_coef | 0.1, 0.5 | 0.1, 0.5 |",
    ]


def test_a_run_from_which_another_began_is_left_out_and_kwargs_are_of_the_task():
    """The others of a cell may be whole runs, or have begun from runs that are not here."""
    parent = make_run("sppo", 1, seed=1, total_timesteps=600)
    make_run("sppo", 5, seed=1, version="def", start_from=f"runs/{parent.name}/")
    make_run("sppo", 7, seed=2, start_from=None)
    make_run("sppo", 9, seed=3, start_from="elsewhere/run")
    for delay in (3, 5):
        kwargs = json.dumps({"delay": delay, "at": [0, 1]})
        make_run("sppo", 2, seed=delay, task="Arm-v0", env_kwargs=kwargs)
    pack = Path("N-runs.csv.gz")
    names = ("Arm-v0 (at=[0, 1], delay=5)=Slow = 5",)
    page = write_report(pack=pack, names=names)
    assert f"\n**Left out, since others began from them: {parent.name}.**\n" in page
    assert f"\n{HOPPER}__sppo__none__1__def began from {parent.name}.\n" in page
    assert "__sppo__none__2__abc began" not in page
    assert ", runs that began from others beside runs that did not.**\n" in page
    assert rows_after(page) == [
        "| task | noise | sppo |",
        "| Arm-v0 (at=[0, 1], delay=3) | clean | 2.000 (n = 1) |",
        "| Hopper-v4 | clean | 7.0 ± 1.2 |",
        "| Slow = 5 | clean | 2.000 (n = 1) |",
    ]
    assert write_report(pack, names=names) == page


def test_a_run_stays_if_what_began_from_it_is_another_method_or_has_failed():
    name = make_run("sppo", 1, seed=1).name
    make_run("sppo-tuned", 5, seed=1, start_from=name)
    make_run("sppo", 9, seed=1, version="def", start_from=name, finished=False)
    page = write_report()
    assert "Left out" not in page
    assert rows_after(page)[1] == "| Hopper-v4 | clean | 1.000 | 5.000 |"  # of one seed


STEPS = [*range(100, 1200, 100)]
EDITED = "versions of sppo_continuous.py or its imports, some without size"


@pytest.mark.parametrize(
    ("changes", "unlike"),
    [
        ({}, ""),
        ({"imported": "edited"}, "versions of sppo_continuous.py or its imports"),
        ({"version": "def", "size": 1}, EDITED),
        ({"continued": {"versions": {"torch": "2.14.0"}}}, "versions of torch"),
        ({"continued": {"platform": "Linux-6.2"}}, ""),
        ({"continued": {"gpu": "H100"}}, "hardware (CPU kernels or GPU)"),
        ({"columns": {"step": [*STEPS, 1224]}}, "1,200 to 1,224 steps"),
        ({"evaluations": 6}, "6 to 12 evaluations"),
    ],
)
def test_a_task_whose_runs_are_not_alike_is_named(changes, unlike):
    make_run("sppo", 1)
    make_run("ppo", 2, **changes)
    page = write_report()
    lines = re.findall(r"(?m)^\*\*Not alike: Hopper-v4: (.+)\.\*\*$", page)
    assert lines == ([unlike] if unlike else [])


@pytest.mark.parametrize(
    "options, why",
    [
        ({"compare": (("sppo", "ppo"),)}, "--compare sppo ppo: no task has both; .* dppo, sppo"),
        ({"names": ("a=b",)}, "--names a=b: not NAME=VALUE; there are .*, clean, dppo, sppo"),
        ({"names": ("sppo=dppo",)}, "--names sppo=dppo: two would be called the same"),
        ({"colors": ("sppo=#12345",)}, "--colors sppo=#12345: not all are colours"),
        ({"failed": ("Hopper=0",)}, "--failed Hopper=0: not NAME=VALUE; there are Hopper-v4"),
        ({"failed": ("-9",)}, "--failed -9: not NAME=VALUE"),
        ({"failed": ("Hopper-v4=nan",)}, "--failed Hopper-v4=nan: not all are numbers"),
        ({"measure": "cost:five"}, "--measure cost:five: not recorded; there are.* training; "),
        ({"pack": Path("N.csv.gz")}, "--pack N.csv.gz: its name must end with -runs.csv.gz"),
        ({"folders": ("runs", "runs")}, "Hopper-v4__dppo__none__0__abc: in two places"),
        ({"out": ROOT}, "a folder that is not a report; choose another"),
    ],
)
def test_what_means_nothing_is_refused(grid, options, why):
    folders = [grid / name for name in options.pop("folders", ["runs"])]
    with pytest.raises(runs.Refusal, match=why):
        write_report(*folders, **options)
