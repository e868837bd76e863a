"""How long symmetric PPO and PPO with `--alpha k --beta 0`, one run in exact arithmetic, are one in
float32.

    python results/same_run.py runs/quick

For each pair of the suite quick: up to which step both had the same training episodes, and the
final scores."""

import json
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def episodic_returns(run: Path) -> dict[int, float]:
    """{step: mean return of the last 100 training episodes}."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    return {event.step: event.value for event in events.Scalars("charts/episodic_return")}


print("| noise | seed | the same until step | of | last evaluation, SPPO | PPO, alpha k, beta 0 |")
print("|---|---|---|---|---|---|")
for symmetric in sorted(Path(sys.argv[1]).glob("*__sppo__*")):
    scaled = symmetric.with_name(symmetric.name.replace("__sppo__", "__dppo-k__"))
    if not (scaled / "summary.json").exists():
        continue
    a, b = episodic_returns(symmetric), episodic_returns(scaled)
    same = 0
    for step in sorted(a):
        if a[step] != b[step]:
            break
        same = step
    scores = [
        json.loads((run / "summary.json").read_text())["final_return_mean"]
        for run in (symmetric, scaled)
    ]
    _, _, noise, seed = symmetric.name.split("__")
    print(f"| {noise} | {seed} | {same:,} | {max(a):,} | {scores[0]:,.0f} | {scores[1]:,.0f} |")
