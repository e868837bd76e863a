"""Cosine between the policy gradients of each dose and of beta 0, at the last agents of runs.

python results/a2c/cosines.py runs/sa2c-dose > cosines.csv
"""

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.append(str(Path(__file__).parents[2]))
from sa2c_continuous import Agent, Args, NormalizedEnvs, compute_gae, gradient_and_metrics

BETAS = (0.5, 2.0, 20.0)
ROLLOUTS = 64  # of 4 x 8 steps, as in training


def policy_gradients(folder):
    """Sums over ROLLOUTS of the actor's gradients (parameters,) for beta 0 and BETAS. Rewards are
    clean, and statistics those of the last training step."""
    session = json.loads((folder / "sessions.jsonl").read_text().splitlines()[0])
    args = Args(**session["args"])
    args = replace(args, noise="none", noise_level=0.0, max_grad_norm=1e9)
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    generator = torch.Generator().manual_seed(args.seed)
    envs = NormalizedEnvs(args)
    envs.obs_stats.load_state_dict(checkpoint["obs_stats"])
    envs.return_stats.load_state_dict(checkpoint["return_stats"])
    obs = envs.reset([args.seed, args.total_timesteps])
    agent = Agent(envs.envs[0], args)
    agent.load_state_dict(checkpoint["agent"])
    actor = list(agent.actor.parameters())
    act = agent.actor_fn()

    def value_of(obs):
        with torch.no_grad():
            return agent.critic(torch.from_numpy(obs)).squeeze(-1).numpy()

    T, N = args.num_steps, args.num_envs
    gradients = [0 for _ in (0, *BETAS)]
    for _ in range(ROLLOUTS):
        exploration = agent.exploration((T, N), generator)
        steps = []
        for t in range(T):
            action, output = act(obs, exploration[t])
            next_obs, *outcome = envs.step(agent.to_env(action))
            steps.append((obs, action, output, *outcome))
            obs = next_obs
        all_obs, action, output, reward, ended, cut_off, final_obs = map(np.array, zip(*steps))
        value = value_of(np.append(all_obs, [obs], axis=0))
        reward[cut_off] += args.gamma * value_of(final_obs[cut_off])
        advantage, returns = compute_gae(reward, value, ended, args.gamma, args.gae_lambda)
        batch = [all_obs, action, output, np.float32(advantage), np.float32(returns)]
        batch = [torch.from_numpy(x).flatten(0, 1) for x in batch]
        batch[2] = agent.acting_log_prob(batch[1], batch[2])
        for i, beta in enumerate((0.0, *BETAS)):
            parts, _ = gradient_and_metrics(agent, actor, replace(args, beta=beta), *batch)
            gradients[i] += torch.cat([part.flatten() for part in parts])
    envs.close()
    return gradients


def main(runs):
    writer = csv.writer(sys.stdout)
    writer.writerow(["run_name", *(f"beta{beta:g}" for beta in BETAS)])
    for summary in sorted(Path(runs).glob("*/summary.json")):
        plain, *others = policy_gradients(summary.parent)
        cosines = [torch.cosine_similarity(plain, other, dim=0).item() for other in others]
        writer.writerow([summary.parent.name, *(f"{cosine:.4f}" for cosine in cosines)])


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
