"""A random agent's episodes of the paper's nine tasks of continuous control.

python results/control/random_agent.py    # writes random.csv: 100 episodes of each, four minutes
"""

import sys
from pathlib import Path

import pandas as pd
from tqdm import tqdm

HERE = Path(__file__).parent
TASKS = """\
InvertedDoublePendulum-v4 LunarLanderContinuous-v3 Hopper-v4 Ant-v4 HumanoidStandup-v4 Walker2d-v4
HalfCheetah-v4 Swimmer-v4 BipedalWalker-v3""".split()


def play(task, episodes=100, seed=1):
    """Raw returns and lengths of episodes of uniform actions."""
    sys.path.append(str(HERE.parents[1]))
    from sppo_continuous import Args, make_env

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
