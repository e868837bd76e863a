"""Tables of this folder's page, and of two examples in docs/."""

from pathlib import Path

from analysis.compare import cells_of, contrast
from analysis.measures import LAST
from analysis.runs import read_pack
from analysis.tables import markdown
from results.common import estimate_text, minus_text, read, score_text

NOISES = {"clean": "clean", "flip 0.2": "flipped"}


def imdb():
    rows = ppo_and_sppo("text/imdb", "imdb")
    cell = cells_of(read("text/imdb"))["imdb", "clean"]
    ppo, sppo = cell["ppo-small"], cell["sppo-small"]
    rows.append(["clean, small", score_text(ppo, 3), score_text(sppo, 3), minus_text(sppo, ppo, 3)])
    return markdown(["rewards", "PPO", "SPPO", "SPPO minus PPO"], rows)


def ppo_and_sppo(pack, task):
    cells = cells_of(read(pack))
    rows = []
    for noise, rewards in NOISES.items():
        ppo, sppo = cells[task, noise]["ppo"], cells[task, noise]["sppo"]
        rows.append([rewards, score_text(ppo, 3), score_text(sppo, 3), minus_text(sppo, ppo, 3)])
    return rows


def imdb_k20_5():
    columns = []
    for measure, places in {LAST: 3, "perplexity_real": 1}.items():
        cell = cells_of(read("text/imdb-k20.5"), measure)["imdb", "flip 0.2"]
        column = [
            score_text(cell["ppo"], places),
            score_text(cell["sppo"], places),
            minus_text(cell["sppo"], cell["ppo"], places),
            score_text(cell["ppo-eps"], places),
            score_text(cell["ppo-ce-eps"], places),
            score_text(cell["sppo-eps"], places),
            minus_text(cell["sppo-eps"], cell["ppo-eps"], places),
        ]
        columns.append(column)
    names = [
        "PPO",
        "SPPO",
        "SPPO minus PPO",
        "PPO, epsilon 1e-8",
        "PPO, ce-coef / k, epsilon 1e-8",
        "SPPO, epsilon 1e-8",
        "SPPO, epsilon 1e-8 minus PPO, epsilon 1e-8",
    ]
    return markdown(["method", "reward", "perplexity_real"], zip(names, *columns))


def sums():
    rows = ppo_and_sppo("text/sums", "toy")
    cells = cells_of(read("text/sums"))
    clean, flipped = (cells["toy", noise] for noise in NOISES)
    samples = [clean["sppo"], flipped["sppo"], clean["ppo"], flipped["ppo"]]
    cost = [
        "clean minus flipped",
        minus_text(clean["ppo"], flipped["ppo"], 3),
        minus_text(clean["sppo"], flipped["sppo"], 3),
        estimate_text(contrast(samples, [1, -1, -1, 1]), 3),
    ]
    return markdown(["rewards", "PPO", "SPPO", "SPPO minus PPO"], [*rows, cost])


def ends(values, digits=2):
    return f"{values.min():.{digits}g} to {values.max():.{digits}g}"


def lora():
    """Of each alpha and learning rate with three seeds: least and most over seeds."""
    runs, progress = read_pack(Path(__file__).with_name("lora-runs.csv.gz"))
    finished = runs[runs["finished"]]
    rows = []
    for (alpha, rate), cell in finished.groupby(["lora_alpha", "learning_rate"]):
        if len(cell) < 3:
            continue
        evaluations = progress[progress["run_name"].isin(cell["run_name"])]
        last = evaluations.groupby("run_name").last()
        row = [alpha, rate, ends(last["return_mean"]), ends(last["kl"])]
        largest = f"{evaluations['kl'].max():.2g}"
        rows.append([*row, largest, ends(evaluations["losses/approx_kl"])])
    header = ["alpha", "learning rate", "`return_mean`, end", "`kl`, end", "largest `kl`"]
    return markdown([*header, "`losses/approx_kl`"], rows)


def toy():
    """Least and most over both methods and all seeds, at three evaluations."""
    _, progress = read_pack(Path(__file__).with_name("toy-runs.csv.gz"))
    columns = ["return_mean", "kl", "perplexity", "perplexity_real"]
    rows = []
    for step in (0, 896, 2240, 4480):
        evaluations = progress[progress["step"] == step]
        rows.append([f"{step:,}", *(ends(evaluations[column]) for column in columns)])
    return markdown(["step", *(f"`{column}`" for column in columns)], rows)


def grpo():
    """Least and most over seeds, before and after; PPO's of the sums for comparison."""
    rows = []
    for title, pack, task, method in [
        ("sums, GRPO", "grpo", "train", "grpo"),
        ("sums, PPO", "sums", "toy", "ppo"),
        ("the toy, GRPO", "grpo", "toy", "grpo"),
    ]:
        runs, progress = read_pack(Path(__file__).with_name(f"{pack}-runs.csv.gz"))
        runs = runs[(runs["env_id"] == task) & (runs["noise"] == "none")]
        chosen = runs[runs["exp_name"] == method]
        of_runs = progress[progress["run_name"].isin(chosen["run_name"])].groupby("run_name")
        returns = of_runs["return_mean"]
        rows.append([title, len(chosen), ends(returns.first()), ends(returns.last())])
    return markdown(["mean reward", "seeds", "before", "after"], rows)
