"""Language models: tables of this folder's page and of two examples in docs/, what speaks to claims
10 and 11, predictions."""

from analysis.compare import cells_of, contrast, difference
from analysis.measures import LAST
from analysis.tables import markdown
from results.common import estimate_text, minus_text, packed, pair_texts, read, score_text
from results.comparisons import REWARD, in_points, includes_0

NOISES = {"clean": "clean", "flip 0.2": "flipped"}


def imdb():
    rows = ppo_and_sppo("text/imdb", "imdb")
    cell = cells_of(read("text/imdb"))["imdb", "clean"]
    rows.append(["clean, small", *pair_texts(cell["ppo-small"], cell["sppo-small"], 3)])
    return markdown(["rewards", "PPO", "SPPO", "SPPO minus PPO"], rows)


def ppo_and_sppo(pack, task):
    cells = cells_of(read(pack))
    rows = []
    for noise, rewards in NOISES.items():
        cell = cells[task, noise]
        rows.append([rewards, *pair_texts(cell["ppo"], cell["sppo"], 3)])
    return rows


def imdb_k20_5():
    columns = []
    for measure, places in {LAST: 3, "perplexity_real": 1}.items():
        cell = cells_of(read("text/imdb-k20.5"), measure)["imdb", "flip 0.2"]
        column = [
            *pair_texts(cell["ppo"], cell["sppo"], places),
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


def ends(values):
    return f"{values.min():.2g} to {values.max():.2g}"


def lora():
    """Of each alpha and learning rate with three seeds: least and most over seeds."""
    runs, progress = packed("text/lora")
    finished = runs[runs["finished"]]
    rows = []
    for (alpha, rate), cell in finished.groupby(["lora_alpha", "learning_rate"]):
        if len(cell) < 3:
            continue
        evaluations = progress[progress["run_name"].isin(cell["run_name"])]
        first = evaluations.groupby("run_name").first()
        last = evaluations.groupby("run_name").last()
        row = [alpha, rate, ends(first["return_mean"]), ends(last["return_mean"])]
        row.append(ends(last["kl"]))
        largest = f"{evaluations['kl'].max():.2g}"
        rows.append([*row, largest, ends(evaluations["losses/approx_kl"])])
    header = ["alpha", "learning rate", "`return_mean`, start", "end", "`kl`, end"]
    return markdown([*header, "largest `kl`", "`losses/approx_kl`"], rows)


def toy():
    """Least and most over both methods and all seeds, at three evaluations."""
    _, progress = packed("text/toy")
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
        runs, progress = packed(f"text/{pack}")
        chosen = runs.query(f"env_id == '{task}' and noise == 'none' and exp_name == '{method}'")
        of_runs = progress[progress["run_name"].isin(chosen["run_name"])].groupby("run_name")
        returns = of_runs["return_mean"]
        rows.append([title, len(chosen), ends(returns.first()), ends(returns.last())])
    return markdown(["mean reward", "seeds", "before", "after"], rows)


def of_imdb(claim, name, pack, noise, pair=("sppo", "ppo")):
    """A gain of a quarter of the distance to the best reward, 1, would matter."""
    baseline = cells_of(read(pack))["imdb", noise][pair[1]].mean()
    options = {"matters": (1 - baseline) / 4, "unit": REWARD}
    page = "text/README.md#film-reviews"
    return in_points(
        claim, f"SPPO minus PPO, IMDB, {name}", page, pack, ("imdb", noise), pair, **options
    )


def comparisons():
    k20_5 = "text/imdb-k20.5"
    epsilon = ("sppo-eps", "ppo-eps")
    small = ("sppo-small", "ppo-small")
    yield of_imdb("10", "20 updates, clean, k = 0.9", "text/imdb", "clean")
    yield of_imdb("10", "flipped", "text/imdb", "flip 0.2")
    yield of_imdb("10", "flipped, k = 20.5", k20_5, "flip 0.2")
    yield of_imdb("10", "flipped, k = 20.5, epsilon 1e-8", k20_5, "flip 0.2", epsilon)
    yield of_imdb("11", "1.5 million parameters", "text/imdb", "clean", small)


def predictions():
    """Of the sums."""
    cells = cells_of(read("text/sums"))
    clean, flipped = cells["toy", "clean"], cells["toy", "flip 0.2"]
    both = [difference(cell["sppo"], cell["ppo"]) for cell in (clean, flipped)]
    costs = [clean[method].mean() - flipped[method].mean() for method in ("ppo", "sppo")]
    return {
        "sums-loss": all(map(includes_0, both)),
        "sums-noise": all(0.02 < cost < 0.2 for cost in costs),
    }
