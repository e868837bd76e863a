#!/usr/bin/env bash
# Prints the suite's commands:
#     bash results/atari/crazyclimber.sh | python benchmarks/run.py --runs-dir runs/authors-atari
for seed in {10000..10009}; do
    run="python sppo_atari.py --env-id CrazyClimber --seed $seed --total-timesteps 500000"
    run+=" --eval-freq 100000 --runs-dir runs/authors-atari"
    echo $run --beta 0 --no-norm-adv --exp-name ppo-authors
    echo $run --beta 0 --exp-name ppo
    echo $run --exp-name sppo
done
