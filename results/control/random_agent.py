"""A random agent's episodes of the paper's nine tasks of continuous control.

python -m results.control.random_agent    # writes random.csv: 100 episodes of each, four minutes
"""

import pandas as pd
from tqdm import tqdm

from results.control.nine import HERE, TASKS
from sppo_continuous import Args, make_env


def play(task, episodes=100, seed=1):
    """Raw returns and lengths of episodes of uniform actions."""
    rows = []
    with make_env(Args(env_id=task), seed) as env:
        for episode in range(episodes):
            env.reset(seed=None if episode else seed)
            score = 0.0
            steps = 0
            done = False
            while not done:
                _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
                score += reward
                steps += 1
                done = terminated or truncated
            rows.append({"task": task, "score": score, "steps": steps})
    return pd.DataFrame(rows)


if __name__ == "__main__":
    played = pd.concat([play(task) for task in tqdm(TASKS)])
    played.round({"score": 3}).to_csv(HERE / "random.csv", index=False)
    print(played.groupby("task")["score"].agg(["mean", "sem", "count"]))
