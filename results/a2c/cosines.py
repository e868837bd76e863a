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
    args = Args(**json.loads((folder / "args.json").read_text())["args"])
    args = replace(args, noise="none", noise_level=0.0, max_grad_norm=1e9)
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    generator = torch.Generator().manual_seed(args.seed)
    envs = NormalizedEnvs(args)
    envs.obs_stats.load_state_dict(checkpoint["obs_stats"])
    envs.return_stats.load_state_dict(checkpoint["return_stats"])
    agent = Agent(envs.envs[0], args)
    agent.load_state_dict(checkpoint["agent"])
    actor_size = sum(parameter.numel() for parameter in agent.actor.parameters())
    act = agent.actor_fn()

    def value_of(obs):
        with torch.no_grad():
            return agent.value(torch.from_numpy(obs)).numpy()

    T, N = args.num_steps, args.num_envs
    gradients = [torch.zeros(actor_size) for _ in (0, *BETAS)]
    obs = envs.reset([args.seed, args.total_timesteps])
    for _ in range(ROLLOUTS):
        exploration = agent.exploration((T, N), generator)
        all_obs = [obs]
        actions = []
        transitions = []
        final_value = np.zeros((T, N))
        for t in range(T):
            actions.append(act(obs, exploration[t]))
            obs, reward, terminated, truncated, final_obs = envs.step(agent.to_env(actions[t]))
            transitions.append((reward, terminated, truncated))
            all_obs.append(obs)
            for i, last_obs in final_obs.items():
                final_value[t, i] = value_of(last_obs[None]).item()
        reward, terminated, truncated = (np.array(x) for x in zip(*transitions))
        value = value_of(np.array(all_obs))
        advantage, returns = compute_gae(
            reward, value, final_value, terminated, truncated, args.gamma, args.gae_lambda
        )
        batch = [np.array(all_obs[:T]), np.array(actions), advantage, returns]
        batch = [torch.from_numpy(x).flatten(0, 1) for x in batch]
        batch[2:] = [x.float() for x in batch[2:]]
        for total, beta in zip(gradients, (0.0, *BETAS)):
            gradient, _ = gradient_and_metrics(agent, replace(args, beta=beta), *batch)
            total += gradient[:actor_size]
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
