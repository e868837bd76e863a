#!/usr/bin/env bash
# Prints the suite's commands:
#     bash results/control/ant.sh | python benchmarks/run.py --runs-dir runs/authors
for seed in {10000..10007}; do
    run="python sppo_continuous.py --env-id Ant-v4 --seed $seed"
    echo $run --policy gaussian --total-timesteps 2000000 --exp-name ppo --runs-dir runs/authors
    echo $run --beta 0 --total-timesteps 2000000 --exp-name dppo --runs-dir runs/authors
    echo $run --total-timesteps 2000000 --exp-name sppo --runs-dir runs/authors
done
