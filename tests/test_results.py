"""Tables of means in README.md, docs/ and results/ show what the packed runs in results/ give.

Such a table follows a comment `<!-- PACK [PACK ...]: LABELS -->`, with packs such as control/ant. A
value has the comment's labels, those that begin its row, and its column's heading: tasks, kinds of
reward, methods (also "A minus B") and measures, separated by ", "."""

import re
import runpy
import subprocess
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import report

ROOT = Path(__file__).resolve().parent.parent
PATHS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("results/**/*.md"))]
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in PATHS}
TABLE = re.compile(r"(?m)(?:^<!-- ([\w. /-]+): (.+) -->\n\n?)?((?:^ *\|.*\n)+)")
NUMBER = r"([+-]?[\d,]*\.?\d+)"
VALUE = re.compile(rf"{NUMBER}(?: ± {NUMBER}| \({NUMBER} to {NUMBER}\))?")
WORDS = {"", "task", "rewards", "method", "measure"}  # headings above labels
# Methods with a name of their own on pages, and their --exp-name
METHODS = """\
Gaussian PPO: ppo; DPPO, max-grad-norm / k: dppo-norm; DPPO, vf-coef / k: dppo-coef; \
PPO, max-grad-norm / k: ppo-norm; PPO, vf-coef / k: ppo-coef; PPO, ce-coef / k: ppo-ce; \
PPO, vf-coef / k, ent-coef / k: ppo-coef; PPO, corrected rewards: ppo-corrected; \
PPO, epsilon 1e-8: ppo-eps; PPO, ce-coef / k, epsilon 1e-8: ppo-ce-eps; our variant: sppo-p; \
SPPO, epsilon 1e-8: sppo-eps; SPPO, k 20.5: sppo-k20.5; PPO, 1.5M: ppo-small; \
SPPO, 1.5M: sppo-small; Gaussian A2C: a2c; A2C, alpha 0.5: a2c-half; DA2C, alpha 0.5: da2c-half; \
Stable-Baselines3: sb3-ppo sb3-a2c; the authors' PPO: ppo-authors"""
METHODS = {label: names.split() for label, names in re.findall(r"(.+?): (.+?)(?:; |$)", METHODS)}
NOISY = ["flip", "normal", "uniform", "adv_flip"]
REWARDS = {"clean": [(1, ["none"])], "noisy": [(1, NOISY)], "flipped": [(1, NOISY)]}
REWARDS["cost of noise"] = [(1, ["none"]), (-1, NOISY)]
MEASURES = {"last evaluation": "return_mean", "last five evaluations": "last5"}
MEASURES |= {name: name for name in ("return_mean", "last5", "training")}
MEASURES |= {"reward": "return_mean", "KL": "kl"}


def pack(name):
    return ROOT / f"results/{name}-runs.csv.gz"


@cache
def read(suites):
    """Finished runs of suites, with the last of what evaluations measured, and means of what was
    logged. And what labels mean: {label: (column, [(sign, values that the column may have)])}."""
    runs, progress, _ = report.read_folders(tuple(map(pack, suites.split())))
    runs = runs[runs["finished"]].copy()
    evaluations = progress.groupby("run_name")["return_mean"]
    five = evaluations.nth[-5:].groupby(progress["run_name"]).agg(["mean", "size"])
    five = five["mean"].where(five["size"] == 5)
    runs["last5"] = runs["last5"].fillna(runs["run_name"].map(five))  # the report wants ten
    labels = {label: ("measure", column) for label, column in MEASURES.items()}
    for name in progress.columns.difference(report.EVALUATION):
        of_run = progress.groupby("run_name")[name]
        runs[name] = runs["run_name"].map(of_run.mean() if "/" in name else of_run.last())
        labels[name] = ("measure", name)
    for task in runs["env_id"].unique():
        for label in (task, task.partition("-")[0].removesuffix("Continuous")):
            labels[label] = ("env_id", [(1, [task])])
    names = runs["exp_name"].unique()
    methods = METHODS | {name: [name] for name in names} | {name.upper(): [name] for name in names}
    for a, first in methods.items():
        labels[a] = ("exp_name", [(1, first)])
        for b, second in methods.items():
            labels[f"{a} minus {b}"] = ("exp_name", [(1, first), (-1, second)])
    return runs, labels | {label: ("noise", groups) for label, groups in REWARDS.items()}


def split(text, labels):
    """The labels in a cell; a label may have ", " in it."""
    parts = text.split(", ")
    for end in range(len(parts), 0, -1):
        if (label := ", ".join(parts[:end])) in labels:
            return [label, *(split(", ".join(parts[end:]), labels) if parts[end:] else [])]
    raise AssertionError(f"unknown label: {text}")


def value_of(suites, texts):
    """Mean, its standard error and 95 % interval: of runs, or of a difference between two or four
    groups of runs, by Welch's test."""
    runs, labels = read(suites)
    found = {label: labels[label] for text in texts for label in split(text, labels)}
    chosen = dict(found.values())
    assert len(chosen) == len(found), f"{texts}: two labels of a kind"
    measure = chosen.pop("measure")
    mean, variances, freedom = 0, [], []
    for groups in product(*chosen.values()):
        group = runs
        for column, (_, values) in zip(chosen, groups):
            group = group[group[column].isin(values)]
        for column in ("env_id", "exp_name", "noise", "noise_level"):
            assert group[column].nunique() == 1, f"{texts}: which {column}?"
        assert not group["seed"].duplicated().any()
        scores = group[measure]
        mean += np.prod([sign for sign, _ in groups]) * scores.mean()
        variances.append(scores.sem() ** 2)  # nan of one run
        freedom.append(len(scores) - 1)
    error = np.sqrt(sum(variances))
    with np.errstate(invalid="ignore"):  # if scores do not vary
        half = error * stats.t.ppf(0.975, error**4 / sum(np.square(variances) / freedom))
    return mean, error, mean - half, mean + half


def check(cell, suites, texts, heading):
    found = VALUE.fullmatch(cell.replace("**", ""))
    assert found, f"not a value: {cell}"
    for shown, value in zip(found.groups(), value_of(suites, [*texts, heading])):
        if shown:
            digits = len(shown.partition(".")[2])
            assert float(shown.replace(",", "")) == float(f"{value:.{digits}f}"), (texts, heading)


TABLES = [(page, *found.groups()) for page, text in PAGES.items() for found in TABLE.finditer(text)]
MARKED = [table for table in TABLES if table[1]]


@pytest.mark.parametrize(("page", "suites", "common", "table"), MARKED)
def test_a_table_shows_what_packed_runs_give(page, suites, common, table):
    lines = [re.split(r"(?<!\\)\|", line.strip()[1:-1]) for line in table.splitlines()]
    headings, _, *rows = [[cell.strip() for cell in line] for line in lines]
    first = [heading in WORDS for heading in headings].index(False)
    for row in rows:
        texts = [common, *filter(None, row[:first])]
        for heading, cell in zip(headings[first:], row[first:], strict=True):
            if cell:
                check(cell, suites, texts, heading)


@pytest.mark.parametrize("page", PAGES)
def test_every_table_of_means_is_checked(page):
    unmarked = [table for name, suites, _, table in TABLES if name == page and not suites]
    assert [line for table in unmarked for line in table.splitlines() if "±" in line] == []


def test_intervals_of_claims_are_on_pages_of_results():
    """Rounded, where a claim is put in words."""
    number = rf"{NUMBER}(?: %| points)?"
    found = re.compile(rf"{number}(?: \(|, could be ){NUMBER} to {NUMBER}")

    def numbers(texts):
        return [float(text.replace(",", "")) for text in texts]

    pages = "\n".join(text for page, text in PAGES.items() if page.startswith("results/"))
    there = [numbers(texts) for texts in found.findall(pages)]
    claims = found.findall(PAGES["docs/reproduction.md"])
    assert len(claims) > 40
    for claim in claims:
        digits = [len(text.partition(".")[2]) for text in claim]
        assert numbers(claim) in [[*map(round, values, digits)] for values in there], claim


def percentages(text):
    """Numbers of "1.6 % (-8.9 to 13.3)", as often as it is there."""
    found = re.findall(rf"{NUMBER} % \((?:95 % interval )?{NUMBER} to {NUMBER}\)", text)
    return [tuple(map(float, numbers)) for numbers in found]


def test_pooled_percentages_are_those_of_the_report():
    """Of three tasks of continuous control, but for those of k."""
    runs = report.label_runs(*report.read_folders((pack("control/three-tasks"),))[:2])
    pairs = [("sppo", "dppo"), ("ppo", "dppo"), ("sppo-p", "dppo")]
    pooled = "\n\n".join(report.pooled_text(runs, pairs))
    control, _, rest = PAGES["results/control/README.md"].partition("\n## The ends of k\n")
    assert "\n## Predictions\n" in rest
    shown = percentages(control + PAGES["docs/symmetric-loss.md"])
    assert len(shown) == 11
    for numbers in shown:
        assert "{:+}% ({:+}% to {:+}%)".format(*numbers) in pooled


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("control/k", 2),
        ("robustness/sweep", 1),
    ],
)
def test_percentages_beside_registered_measures(name, count, capsys):
    """Corrected log ratios: how many of them the page shows."""
    analysis = runpy.run_path(str(ROOT / f"results/{name}.py"))
    analysis["print_percent"]()
    printed = percentages(capsys.readouterr().out)
    page = percentages(PAGES[f"results/{name.partition('/')[0]}/README.md"])
    assert len([numbers for numbers in page if numbers in printed]) == count


@pytest.mark.parametrize(
    ("runs", "packs", "page", "count"),
    [
        ("noise", "robustness/noise", "results/robustness/README.md", 225),
        ("authors", "control/ant", "results/control/README.md", 15),
        ("authors", "atari/wizardofwor", "results/atari/README.md", 6),
        ("k-ends", "control/k", "results/control/README.md", 144),
        ("sa2c-dose", "a2c/dose", "results/a2c/README.md", 432),
        ("rlhf-sums", "text/sums", "results/text/README.md", 12),
        ("authors-atari", "atari/crazyclimber", "results/atari/README.md", 24),
        ("atari-games", "atari/games", "results/atari/README.md", 24),
    ],
)
def test_documented_lines_list_the_packed_runs(runs, packs, page, count):
    """Whose commands are in runs.csv.gz, without "python"."""
    run = f"python benchmarks/run.py --runs-dir runs/{runs}"
    blocks = re.findall(r"(?s)```sh\n(.+?)```", PAGES[page])
    (lines,) = [lines for lines in blocks if run in lines]
    (line,) = re.findall(rf"(?s)^(?:.*\n)?((?:bash|for|{{).+?{re.escape(run)})", lines)
    listed = subprocess.check_output(["bash", "-c", line.replace(run, "cat")], cwd=ROOT, text=True)
    commands = pd.concat([report.read_csv(pack(name))["command"] for name in packs.split()])
    assert len(set(commands)) == count
    assert set("python " + commands) <= {" ".join(line.split()) for line in listed.splitlines()}


def test_pairs_of_sppo_and_ppo_are_equal_to_the_last_bit():
    """But for one: where alpha and beta are 0.5 and 0.4, their sum rounds."""
    folder = ROOT / "results/control"
    runs = report.read_csv(folder / "pairs-runs.csv.gz").set_index("run_name")
    runs["sha256"] = report.read_csv(folder / "pairs-sha256.csv").set_index("run_name")["sha256"]
    listed = subprocess.check_output(["bash", str(folder / "pairs.sh")], text=True)
    assert set("python " + runs["command"]) == set(listed.splitlines())
    progress = dict(list(report.read_csv(folder / "pairs-progress.csv.gz").groupby("run_name")))
    for (_, _, k), pair in runs.groupby(["env_id", "noise", runs["alpha"] + runs["beta"]]):
        first, second = (progress[name].drop(columns="run_name") for name in pair.index)
        assert len(first) == len(second) >= 4
        same_rows = np.array_equal(first, second, equal_nan=True)
        assert [same_rows, pair["sha256"].nunique() == 1] == [k != 0.9, k != 0.9]
    assert runs["sha256"].nunique() == len(runs) / 2 + 1


def test_how_far_rounding_parts_two_runs_of_one_algorithm():
    scores = pd.read_csv(ROOT / "results/control/rounding.csv")
    rounding = (scores["dppo-k"] - scores["sppo"]).abs()
    method = (scores["dppo"] - scores["sppo"]).abs()
    assert (rounding > 0).all() and len(rounding) == 10
    shown = f"by {rounding.mean():.0f} on average, up to {rounding.max():,.0f} (SPPO and DPPO: "
    assert shown + f"{method.mean():.0f})" in PAGES["results/control/README.md"]


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("robustness/noise", "print_measures"),
        ("robustness/noise", "print_intervals"),
        ("robustness/sweep", "print_measures"),
        ("control/k", "print_measures"),
        ("a2c/dose", "print_measures"),
        ("a2c/dose", "print_doses"),
        ("a2c/dose", "print_interactions"),
        ("atari/crazyclimber", "print_measures"),
        ("atari/games", "print_measures"),
        ("atari/games", "print_games"),
    ],
)
def test_a_page_shows_the_measures_of_its_analysis(name, function, capsys):
    analysis = runpy.run_path(str(ROOT / f"results/{name}.py"))
    analysis[function]()
    table = capsys.readouterr().out.strip().rpartition("\n\n")[-1]
    assert table in PAGES[f"results/{name.partition('/')[0]}/README.md"]


@pytest.mark.parametrize(
    ("name", "function", "effect", "shown"),
    [
        ("control/k", "print_corrected", "training, slope over log10 k", "(corrected p = 0.14)"),
        ("a2c/dose", "print_corrected", "training, noisy minus clean", "noisy rewards (p = 0.001)"),
        ("a2c/dose", "print_corrected", "training, flipped minus clean", "for flips (0.08)"),
        ("a2c/dose", "print_interactions", "training, log ratio, noisy", "(corrected p = 0.11)"),
        ("a2c/dose", "print_interactions", "evaluation, log ratio, flipped", "reverse (0.03)"),
    ],
)
def test_corrected_p_of_slopes(name, function, effect, shown, capsys):
    analysis = runpy.run_path(str(ROOT / f"results/{name}.py"))
    analysis[function]()
    printed = capsys.readouterr().out
    (corrected,) = re.findall(rf"(?m)^.*{effect}.*: p = .* corrected for \d+ ([\d.]+)$", printed)
    p = float(re.search(r"[\d.]+(?=\))", shown).group())
    assert p == round(float(corrected), len(str(p).partition(".")[2]))
    assert shown in PAGES[f"results/{name.partition('/')[0]}/README.md"]


def test_differences_from_k_1_are_by_seed():
    """Paired t-tests, on a seed's mean over the six tasks and kinds of rewards."""
    runs = report.read_csv(pack("control/k"))
    runs["score"] = runs["last5"] + 200.0 * (runs["env_id"] == "LunarLanderContinuous-v3")
    cells = runs.groupby(["env_id", "noise"])
    runs["score"] /= cells["exp_name"].transform(
        lambda names: runs.loc[names.index[names == "k1"], "score"].mean()
    )
    of_seeds = runs.pivot_table(index="seed", columns="exp_name", values="score")
    page = PAGES["results/control/README.md"]
    for end in ("k0.2", "k100"):
        test = stats.ttest_rel(of_seeds[end], of_seeds["k1"])
        low, high = test.confidence_interval()
        mean = (of_seeds[end] - of_seeds["k1"]).mean()
        assert f"| {mean:.3f} ({low:.3f} to {high:.3f}) |" in page.replace("-0.000", "0.000")


def test_slopes_over_the_dose_are_by_seed():
    """Fitted to a seed's scores over all tasks at once, each from its own level."""
    runs = report.read_csv(pack("a2c/dose"))
    runs["score"] = runs["training"] + 300.0 * (runs["env_id"] == "HalfCheetah-v4")
    baseline = runs.query("noise == 'none' and beta == 0").groupby("env_id")["score"].mean()
    runs["score"] /= runs["env_id"].map(baseline)
    runs["dose"] = np.log(1 + 2 * runs["beta"]) / np.log(41)
    cells = runs.groupby(["noise", "seed", "dose"])["score"].mean().reset_index()
    fits = cells.groupby(["noise", "seed"])[["dose", "score"]].apply(
        lambda cell: stats.linregress(cell["dose"], cell["score"]).slope
    )
    clean, noisy, flipped = (fits[noise] for noise in ("none", "normal", "adv_flip"))
    row = "| training, all three tasks |"
    for slopes in (clean, noisy, flipped, noisy - clean, flipped - clean):
        low, high = stats.ttest_1samp(slopes, 0).confidence_interval()
        row += f" {slopes.mean():.3f} ({low:.3f} to {high:.3f}) |"
    assert row in PAGES["results/a2c/README.md"]


def test_steps_from_the_authors_ppo_to_sppo_are_relative_to_it():
    """Welch's differences in points, divided by its mean; and the difference of the two steps."""
    base = "the authors' PPO"
    methods = (base, "PPO", "SPPO")
    pairs = (f"PPO minus {base}", "SPPO minus PPO", f"SPPO minus {base}")
    for measure in ("training", "last five evaluations", "last evaluation"):
        texts = ["CrazyClimber", "clean", measure]
        scale = value_of("atari/crazyclimber", [*texts, base])[0]
        values = {}
        for name in (*methods, *pairs):
            values[name] = np.divide(value_of("atari/crazyclimber", [*texts, name]), scale)
        cells = [values[pair][[0, 2, 3]] for pair in pairs]
        errors = np.array([1, 2, 1]) * [values[method][1] for method in methods]
        half = np.sqrt(sum(errors**2))
        half *= stats.t.ppf(0.975, sum(errors**2) ** 2 / sum(errors**4 / 7))  # of eight seeds
        cells.append(cells[0][0] - cells[1][0] + np.array([0, -half, half]))
        row = " | ".join("{:.2f} ({:.2f} to {:.2f})".format(*cell) for cell in cells)
        assert f"| {measure} | {row} |" in PAGES["results/atari/README.md"]


def test_games_are_tested_when_all_are_there(tmp_path, capsys):
    """Until then intervals come without p-values."""
    analysis = runpy.run_path(str(ROOT / "results/atari/games.py"))
    listed = subprocess.check_output(["bash", str(ROOT / "results/atari/games.sh")], text=True)
    runs = pd.DataFrame(re.findall(r"--env-id (\w+) --seed (\d+)(.*)--exp-name (.+)", listed))
    runs = runs.set_axis(["env_id", "seed", "flags", "exp_name"], axis="columns")
    runs["noise"] = np.where(runs.pop("flags").str.contains("--noise flip"), "flip", "none")
    logs = runs["exp_name"].map({"ppo-authors": 0.0, "ppo": 0.1, "sppo": 0.3})
    logs[(runs["noise"] == "flip") & (runs["exp_name"] == "ppo")] -= 0.2
    logs += np.sin(np.arange(len(runs))) / 1000
    runs["training"] = runs["return_mean"] = 1e5 * np.exp(logs)
    runs = runs.assign(run_name=runs.index, finished=True)
    for there, complete in ((runs, True), (runs[:24], False)):
        there.to_csv(tmp_path / "games-runs.csv.gz")
        there.to_csv(tmp_path / "games-progress.csv.gz")
        for function in ("print_measures", "print_tests", "draw"):
            analysis[function](tmp_path)
        lines = capsys.readouterr().out.splitlines()
        means = [cell.partition(" ")[0] for cell in lines[2].split(" | ")[1:]]
        assert means == ["0.20", "0.10", "0.30", "-0.20", "0.00", "0.20"][: len(means)]
        assert ["by Holm 0.0000" in line for line in lines[7:10]] == 3 * [complete]


def test_crazyclimber_repeats_its_packed_runs():
    suites = ("crazyclimber", "games")
    files = [ROOT / f"results/atari/{name}-progress.csv.gz" for name in suites]
    first, again = (report.read_csv(file).set_index("run_name") for file in files)
    names = again.index[again.index.str.startswith("CrazyClimber")].unique()
    assert len(names) == 3 and first.loc[names].equals(again.loc[names])


def test_mean_cosines_between_gradients():
    cosines = report.read_csv(ROOT / "results/a2c/cosines.csv")
    means = cosines.groupby(cosines["run_name"].str.split("-").str[0]).mean(numeric_only=True)
    tasks = ("Hopper", "HalfCheetah", "InvertedDoublePendulum")
    first, second, third = (f"{means.loc[task, 'beta20']:.3f} on {task}" for task in tasks)
    shown = f"is {first}, {second} and {third}; of beta 0.5 at least {means['beta0.5'].min():.3f}."
    assert shown in PAGES["results/a2c/README.md"]


def test_areas_under_the_curves_of_noise():
    """Means over tasks and levels, as in the predictions."""
    runs = report.read_csv(pack("robustness/noise"))
    runs["level"] = runs["noise_level"].where(runs["noise"] == "normal", 0.0)
    runs["score"] = runs["last5"] + 200.0 * (runs["env_id"] == "LunarLanderContinuous-v3")
    means = runs.groupby(["exp_name", "level", "env_id"])["score"].mean()
    relative = means / means["dppo", 0.0]
    page = PAGES["results/robustness/README.md"]
    for name, method in (("Gaussian PPO", "ppo"), ("DPPO", "dppo"), ("SPPO", "sppo")):
        assert f"\n| {name} | {relative[method].mean():.2f} |" in page


def test_intervals_by_t_of_noise_are_welchs():
    """On one task, of seeds' means over two levels; there both units are the same."""
    analysis = runpy.run_path(str(ROOT / "results/robustness/noise.py"))
    runs = report.read_csv(pack("robustness/noise")).query("env_id == 'Hopper-v4'")
    clean = runs.query("noise == 'none' and exp_name == 'dppo'")["last5"].mean()
    noisy = runs.query("noise == 'normal' and noise_level in (0.1, 0.2)")
    of_seeds = noisy.groupby(["exp_name", "seed"])["last5"].mean() / clean
    a, b = of_seeds["sppo"], of_seeds["ppo"]
    expected = stats.ttest_ind(a, b, equal_var=False)
    low, high = expected.confidence_interval()
    hopper = analysis["scores_above"]()[:1]
    for found in analysis["by_t"]("sppo", "ppo", hopper, slice(2, 4)):
        assert found == pytest.approx((a.mean() - b.mean(), low, high, expected.pvalue))


def test_speeds_are_those_recorded():
    speeds = pd.read_csv(ROOT / "results/speed/cpu.csv", dtype=str)
    control = speeds["script"].str.contains("continuous")
    shown = speeds[speeds["commit"] == np.where(control, "fdbdd6e", "bc33b3a")]
    assert len(shown) == 10
    for row in shown.itertuples():
        rate = f"{float(row.rate):,g}"
        cells = f"| {rate} | {row.ratio} ({row.ratio_low} to {row.ratio_high}) |"
        assert cells in PAGES["results/speed/README.md"]


def detected(suite, *texts):
    """What runs could detect, with 80 % power, as results/README.md says."""
    a, _, b = texts[-1].partition(" minus ")
    errors = np.array([value_of(suite, [*texts[:-1], method])[1] for method in (a, b)])
    seeds = 5 if suite in ("control/ant", "control/stable-baselines3") else 8
    freedom = sum(errors**2) ** 2 / sum(errors**4 / (seeds - 1))
    return np.sqrt(sum(errors**2)) * stats.t.ppf([0.975, 0.8], freedom).sum()


def test_what_runs_in_control_detect():
    page = PAGES["results/control/README.md"]
    runs, _ = read("control/three-tasks")
    runs = runs[runs["exp_name"].isin(["dppo", "sppo"])]
    hopper = runs[runs["env_id"] == "Hopper-v4"]
    pooled = runs[runs["env_id"] != "LunarLanderContinuous-v3"]
    parts = [pooled, *(group for _, group in pooled.groupby("noise"))]
    parts += [group for _, group in hopper.groupby("noise")]
    gains = []
    for part in parts:
        variances = part.groupby(["env_id", "noise", "exp_name"])["return_mean"].agg(
            lambda x: report.log_mean_and_variance(x.to_numpy())[1]
        )
        freedom = variances.sum() ** 2 / (variances**2 / 7).sum()
        error = np.sqrt(variances.sum()) / len(variances) * 2
        gains.append(round(100 * np.expm1(error * stats.t.ppf([0.975, 0.8], freedom).sum())))
    shown = "{} % pooled ({} % clean, {} % noisy)".format(*gains[:3])
    assert shown in page and shown in PAGES["docs/reproduction.md"]
    assert "on Hopper {} % (clean) and {} % (noisy)".format(*gains[3:]) in page
    assert f"below {gains[0]} to {gains[2]} % (pooled)" in PAGES["README.md"]
    ant = detected("control/ant", "Ant", "clean", "last evaluation", "SPPO minus DPPO")
    assert f"could detect {ant:,.0f}, 57 % of DPPO's score" in page
    place = ("Hopper", "clean", "last evaluation", "PPO minus Stable-Baselines3")
    assert f"on Hopper {detected('control/stable-baselines3', *place):,.0f} would be" in page


@pytest.mark.parametrize(
    ("game", "digits"),
    [
        ("WizardOfWor", 0),
        ("Breakout", 1),
        ("CrazyClimber", 0),
    ],
)
def test_the_page_shows_a_random_agents_score(game, digits):
    score = report.read_csv(ROOT / "results/atari/random.csv").query("game == @game")["score"]
    shown = f"{score.mean():,.{digits}f} ± {score.sem():.{digits}f}"
    assert shown in PAGES["results/atari/README.md"]


@pytest.mark.parametrize(
    ("name", "place", "methods", "shown"),
    [
        ("atari/breakout", ("clean", "last evaluation"), "sppo minus ppo", "(corrected p = 0.08)"),
        ("atari/epsilon", ("clean", "training"), "sa2c minus a2c", "(corrected p = 0.12)"),
        (
            "atari/crazyclimber",
            ("clean", "training"),
            "ppo minus ppo-authors",
            "(p = 0.02; corrected p = 0.046)",
        ),
        ("text/imdb-k20.5", ("flip 0.2", "last evaluation"), "sppo-eps minus ppo-eps", "p = 0.28)"),
        (
            "text/imdb-k20.5",
            ("flip 0.2", "last evaluation"),
            "ppo-ce-eps minus ppo-eps",
            "corrected p = 0.045)",
        ),
    ],
)
def test_corrected_p_is_over_all_differences_of_a_suite(name, place, methods, shown):
    """Between two methods, in all measures."""
    runs = report.label_runs(*report.read_folders((pack(name),))[:2])
    pair = tuple(methods.split(" minus "))
    differences = report.make_differences(runs, [pair])
    differences["corrected"] = stats.false_discovery_control(differences["p"])
    found = differences.set_index(["noise", "measure", "method", "other"]).loc[(*place, *pair)]
    digits = len(shown.rpartition(".")[2]) - 1
    assert shown.endswith(f"p = {found['corrected']:.{digits}f})")
    assert shown in PAGES[f"results/{name.partition('/')[0]}/README.md"]
