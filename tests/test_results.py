"""Numbers on the pages of results/ are those of the packed runs there."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import report

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
sys.path.append(str(RESULTS))
import tables  # noqa: E402

PAGES = {str(path.relative_to(RESULTS)): path.read_text() for path in RESULTS.glob("**/*.md")}
REPRODUCTION = (ROOT / "docs/reproduction.md").read_text()
NUMBER = r"([+-]?[\d,]*\.?\d+)"


def analysis(name):
    """Functions of a script, such as control/k."""
    return runpy.run_path(str(RESULTS / f"{name}.py"))


def page_of(name):
    """The page on a pack or an analysis, such as control/k."""
    return PAGES[f"{name.partition('/')[0]}/README.md"]


def packed(name):
    return report.read_csv(RESULTS / f"{name}-runs.csv.gz")


# ---- Tables


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_as_results_tables_writes_them(page):
    assert tables.write(RESULTS / page) == PAGES[page]


@pytest.mark.parametrize("page", PAGES)
def test_every_table_of_means_has_a_marker(page):
    assert not re.findall(r"(?m)^\|.*±.*", tables.MARKED.sub("", PAGES[page]))


def test_a_wrong_number_in_a_table_is_corrected(tmp_path, monkeypatch):
    page = tmp_path / "text/README.md"
    page.parent.mkdir()
    page.write_text(PAGES["text/README.md"].replace("0.963 ± 0.002", "0.999 ± 0.002"))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    with pytest.raises(SystemExit, match="python results/tables.py would change it"):
        tables.main(check=True)
    tables.main()
    assert page.read_text() == PAGES["text/README.md"]


def test_a_difference_in_a_table_is_welchs():
    runs = packed("text/sums").query("noise == 'none'")
    scores = [runs.loc[runs["exp_name"] == name, "return_mean"] for name in ("sppo", "ppo")]
    low, high = stats.ttest_ind(*scores, equal_var=False).confidence_interval()
    difference = scores[0].mean() - scores[1].mean()
    row = f"| clean | {scores[1].mean():.3f} ± {scores[1].sem():.3f} | "
    row += f"{scores[0].mean():.3f} ± {scores[0].sem():.3f} | "
    assert row + f"{difference:.3f} ({low:.3f} to {high:.3f}) |" in page_of("text/sums")


# ---- The analyses against SciPy


def test_slopes_over_the_dose_are_by_seed():
    """Fitted to a seed's scores over all tasks at once, each from its own level."""
    runs = packed("a2c/dose")
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
    assert row in page_of("a2c/dose")


def test_steps_to_sppo_on_crazyclimber_are_welchs():
    scores = packed("atari/crazyclimber").groupby("exp_name")["training"].apply(list)
    scale = np.mean(scores["ppo-authors"])
    row = "| training |"
    for a, b in (("ppo", "ppo-authors"), ("sppo", "ppo"), ("sppo", "ppo-authors")):
        test = stats.ttest_ind(scores[a], scores[b], equal_var=False)
        low, high = np.divide(test.confidence_interval(), scale)
        row += (
            f" {(np.mean(scores[a]) - np.mean(scores[b])) / scale:.2f} ({low:.2f} to {high:.2f}) |"
        )
    assert row in page_of("atari/crazyclimber")


def test_intervals_by_t_of_noise_are_welchs():
    """On one task, of seeds' means over two levels; there both units are the same."""
    noise = analysis("robustness/noise")
    runs = packed("robustness/noise").query("env_id == 'Hopper-v4'")
    clean = runs.query("noise == 'none' and exp_name == 'dppo'")["last5"].mean()
    noisy = runs.query("noise == 'normal' and noise_level in (0.1, 0.2)")
    of_seeds = noisy.groupby(["exp_name", "seed"])["last5"].mean() / clean
    a, b = of_seeds["sppo"], of_seeds["ppo"]
    expected = stats.ttest_ind(a, b, equal_var=False)
    low, high = expected.confidence_interval()
    for found in noise["by_t"]("sppo", "ppo", noise["scores_above"]()[:1], slice(2, 4)):
        assert found == pytest.approx((a.mean() - b.mean(), low, high, expected.pvalue))


def test_games_are_tested_only_when_all_are_there(tmp_path, capsys):
    games = analysis("atari/games")
    listed = subprocess.check_output(["bash", RESULTS / "atari/games.sh"], text=True)
    runs = pd.DataFrame(re.findall(r"--env-id (\w+) --seed (\d+)(.*)--exp-name (.+)", listed))
    runs.columns = ["env_id", "seed", "flags", "exp_name"]
    runs["noise"] = np.where(runs.pop("flags").str.contains("--noise flip"), "flip", "none")
    scores = 1e5 + 1e4 * np.sin(np.arange(len(runs)))
    runs = runs.assign(run_name=runs.index, finished=True, return_mean=scores, training=scores)
    for there, tested in ((runs, True), (runs[:24], False)):
        there.to_csv(tmp_path / "games-runs.csv.gz")
        there.to_csv(tmp_path / "games-progress.csv.gz")
        games["print_tests"](tmp_path)
        printed = capsys.readouterr().out
        assert ("by Holm" in printed, "No p-values" in printed) == (tested, not tested)


# ---- Numbers in sentences


def test_intervals_of_claims_are_on_pages_of_results():
    """Rounded, where a claim is put in words."""
    number = rf"{NUMBER}(?: %| points)?"
    found = re.compile(rf"{number}(?: \(|, could be ){NUMBER} to {NUMBER}")

    def numbers(texts):
        return [float(text.replace(",", "")) for text in texts]

    there = [numbers(texts) for texts in found.findall("\n".join(PAGES.values()))]
    claims = found.findall(REPRODUCTION)
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
    runs = report.label_runs(
        *report.read_folders([RESULTS / "control/three-tasks-runs.csv.gz"])[:2]
    )
    pairs = [("sppo", "dppo"), ("ppo", "dppo"), ("sppo-p", "dppo")]
    pooled = "\n\n".join(report.pooled_text(runs, pairs))
    before, _, _ = PAGES["control/README.md"].partition("\n## The ends of k\n")
    shown = percentages(before + (ROOT / "docs/symmetric-loss.md").read_text())
    assert len(shown) == 11
    for numbers in shown:
        assert "{:+}% ({:+}% to {:+}%)".format(*numbers) in pooled


@pytest.mark.parametrize(("name", "count"), [("control/k", 2), ("robustness/sweep", 1)])
def test_percentages_of_an_analysis_are_on_its_page(name, count, capsys):
    analysis(name)["print_percent"]()
    printed = percentages(capsys.readouterr().out)
    assert len([numbers for numbers in percentages(page_of(name)) if numbers in printed]) == count


CORRECTED = [  # a suite; a row of its differences; how its page ends the p of that
    ("atari/breakout", "clean, last evaluation, sppo, ppo", "(corrected p = 0.08)"),
    ("atari/epsilon", "clean, training, sa2c, a2c", "(corrected p = 0.12)"),
    ("atari/crazyclimber", "clean, training, ppo, ppo-authors", "(p = 0.02; corrected p = 0.046)"),
    ("text/imdb-k20.5", "flip 0.2, last evaluation, sppo-eps, ppo-eps", "(corrected p = 0.28)"),
    ("text/imdb-k20.5", "flip 0.2, last evaluation, ppo-ce-eps, ppo-eps", "corrected p = 0.045)"),
]


@pytest.mark.parametrize(("name", "row", "shown"), CORRECTED)
def test_corrected_p_is_over_all_differences_of_a_suite(name, row, shown):
    runs = report.label_runs(*report.read_folders([RESULTS / f"{name}-runs.csv.gz"])[:2])
    noise, measure, *pair = row.split(", ")
    differences = report.make_differences(runs, [tuple(pair)])
    differences["corrected"] = stats.false_discovery_control(differences["p"])
    rows = differences.set_index(["noise", "measure", "method", "other"])
    p = rows.loc[(noise, measure, *pair), "corrected"]
    digits = len(shown.rpartition(".")[2]) - 1
    assert shown.endswith(f"p = {p:.{digits}f})") and shown in page_of(name)


SLOPES = [  # an analysis; a function; the line that it prints; how the page shows the last p
    ("control/k", "corrected", "training, slope over log10 k", "(corrected p = 0.14)"),
    ("a2c/dose", "corrected", "training, noisy minus clean", "noisy rewards (p = 0.001)"),
    ("a2c/dose", "corrected", "training, flipped minus clean", "for flips (0.08)"),
    ("a2c/dose", "interactions", "training, log ratio, noisy", "(corrected p = 0.11)"),
    ("a2c/dose", "interactions", "evaluation, log ratio, flipped", "reverse (0.03)"),
]


@pytest.mark.parametrize(("name", "function", "line", "shown"), SLOPES)
def test_corrected_p_of_slopes(name, function, line, shown, capsys):
    analysis(name)[f"print_{function}"]()
    (corrected,) = re.findall(rf"{line}.*: p = .* corrected for \d+ (.+)", capsys.readouterr().out)
    p = re.search(r"[\d.]+(?=\))", shown)[0]
    assert float(p) == round(float(corrected), len(p.partition(".")[2]))
    assert shown in page_of(name)


def test_what_runs_in_control_detect():
    """A gain whose interval by t is above 0 in 80 % of the cases."""
    runs = packed("control/three-tasks").query("env_id != 'LunarLanderContinuous-v3'")
    gains = []
    for part in (runs, runs.query("noise == 'none'"), runs.query("noise == 'normal'")):
        cells = part[part["exp_name"].isin(["dppo", "sppo"])]
        scores = cells.groupby(["env_id", "noise", "exp_name"])["return_mean"].apply(np.array)
        variances = np.array([report.log_mean_and_variance(x)[1] for x in scores])
        error = np.sqrt(variances.sum()) / (len(scores) / 2)
        freedom = variances.sum() ** 2 / (variances**2 / 7).sum()
        gain = np.expm1(error * stats.t.ppf([0.975, 0.8], freedom).sum())
        gains.append(round(100 * gain))
    shown = "{} % pooled ({} % clean, {} % noisy)".format(*gains)
    assert shown in PAGES["control/README.md"] and shown in REPRODUCTION
    assert f"below {gains[0]} to {gains[2]} % (pooled)" in (ROOT / "README.md").read_text()


def test_sentences_show_what_small_tables_give():
    rounding = pd.read_csv(RESULTS / "control/rounding.csv")
    apart = (rounding["dppo-k"] - rounding["sppo"]).abs()
    method = (rounding["dppo"] - rounding["sppo"]).abs().mean()
    shown = (
        f"by {apart.mean():.0f} on average, up to {apart.max():,.0f} (SPPO and DPPO: {method:.0f})"
    )
    assert shown in PAGES["control/README.md"]

    cosines = report.read_csv(RESULTS / "a2c/cosines.csv")
    means = cosines.groupby(cosines["run_name"].str.split("-").str[0]).mean(numeric_only=True)
    tasks = ("Hopper", "HalfCheetah", "InvertedDoublePendulum")
    first, second, third = (f"{means.loc[task, 'beta20']:.3f} on {task}" for task in tasks)
    shown = f"is {first}, {second} and {third}; of beta 0.5 at least {means['beta0.5'].min():.3f}."
    assert shown in PAGES["a2c/README.md"]

    games = report.read_csv(RESULTS / "atari/random.csv").groupby("game")["score"]
    for game, digits in (("WizardOfWor", 0), ("Breakout", 1), ("CrazyClimber", 0)):
        score, error = games.mean()[game], games.sem()[game]
        assert f"{score:,.{digits}f} ± {error:.{digits}f}" in PAGES["atari/README.md"]

    speeds = pd.read_csv(RESULTS / "speed/cpu.csv", dtype=str)
    control = speeds["script"].str.contains("continuous")
    measured = speeds[speeds["commit"] == np.where(control, "fdbdd6e", "bc33b3a")]
    assert len(measured) == 10
    for row in measured.itertuples():
        cells = f"| {float(row.rate):,g} | {row.ratio} ({row.ratio_low} to {row.ratio_high}) |"
        assert cells in PAGES["speed/README.md"]


# ---- Runs


@pytest.mark.parametrize(
    ("runs_dir", "name", "count"),
    [
        ("noise", "robustness/noise", 225),
        ("authors", "control/ant", 15),
        ("authors", "atari/wizardofwor", 6),
        ("k-ends", "control/k", 144),
        ("sa2c-dose", "a2c/dose", 432),
        ("rlhf-sums", "text/sums", 12),
        ("authors-atari", "atari/crazyclimber", 24),
        ("atari-games", "atari/games", 24),
    ],
)
def test_documented_lines_list_the_packed_runs(runs_dir, name, count):
    run = rf" \| python benchmarks/run\.py --runs-dir runs/{runs_dir}\n"
    (line,) = re.findall(rf"(?m)^(bash .+){run}", page_of(name))
    listed = subprocess.check_output(["bash", "-c", line], cwd=ROOT, text=True)
    commands = packed(name)["command"]
    assert len(set(commands)) == count
    assert set("python " + commands) <= {" ".join(line.split()) for line in listed.splitlines()}


def test_pairs_of_sppo_and_ppo_are_equal_to_the_last_bit():
    """But for one: where alpha and beta are 0.5 and 0.4, their sum rounds."""
    runs = packed("control/pairs").set_index("run_name")
    hashes = report.read_csv(RESULTS / "control/pairs-sha256.csv")
    runs["sha256"] = hashes.set_index("run_name")["sha256"]
    listed = subprocess.check_output(["bash", RESULTS / "control/pairs.sh"], text=True)
    assert set("python " + runs["command"]) == set(listed.splitlines())
    progress = report.read_csv(RESULTS / "control/pairs-progress.csv.gz").set_index("run_name")
    for (_, _, k), pair in runs.groupby(["env_id", "noise", runs["alpha"] + runs["beta"]]):
        first, second = (progress.loc[name].to_numpy() for name in pair.index)
        assert len(first) == len(second) >= 4
        assert np.array_equal(first, second, equal_nan=True) == (k != 0.9)
        assert (pair["sha256"].nunique() == 1) == (k != 0.9)
    assert runs["sha256"].nunique() == len(runs) / 2 + 1


def test_crazyclimber_repeats_its_packed_runs():
    files = [RESULTS / f"atari/{name}-progress.csv.gz" for name in ("crazyclimber", "games")]
    first, again = (report.read_csv(file).set_index("run_name") for file in files)
    names = again.index[again.index.str.startswith("CrazyClimber")].unique()
    assert len(names) == 3 and first.loc[names].equals(again.loc[names])
