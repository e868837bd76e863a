"""Tables of examples: sums, and in docs/ LoRA, the toy and GRPO. None speaks to a claim."""

from analysis.compare import contrast
from analysis.tables import markdown
from results.common import cell_text, cells, estimate_text, packed, score_table
from results.text.imdb import LOSS, NOISES


def sums():
    found = cells("text/sums")
    rows = {rewards: found["toy", noise] for noise, rewards in NOISES.items()}
    table = score_table("rewards", rows, ["ppo", "sppo", LOSS], places=3)
    clean, flipped = rows.values()
    costs = [cell_text({"a": clean[x], "b": flipped[x]}, ("a", "b"), 3) for x in ["ppo", "sppo"]]
    samples = [clean["sppo"], flipped["sppo"], clean["ppo"], flipped["ppo"]]
    change = estimate_text(contrast(samples, [1, -1, -1, 1]), 3)
    return f"{table}\n| clean minus flipped | {' | '.join(costs)} | {change} |"


def ends(values):
    return f"{values.min():.2g} to {values.max():.2g}"


def lora():
    """Of each alpha and learning rate with three seeds: least and most over seeds."""
    runs, progress = packed("text/lora")
    finished = runs[runs["finished"]]
    rows = []
    for (alpha, rate), cell in finished.groupby(["lora_alpha", "learning_rate"]):
        evaluations = progress[progress["run_name"].isin(cell["run_name"])]
        of_runs = evaluations.groupby("run_name")
        first, last = of_runs.first(), of_runs.last()
        row = [alpha, rate, ends(first["return_mean"]), ends(last["return_mean"]), ends(last["kl"])]
        row += [f"{evaluations['kl'].max():.2g}", ends(evaluations["losses/approx_kl"])]
        if len(cell) == 3:
            rows.append(row)
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
