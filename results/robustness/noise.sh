#!/usr/bin/env bash
# Prints the suite's commands:
#     bash results/robustness/noise.sh | python benchmarks/run.py --runs-dir runs/noise
for seed in {10000..10004}; do
    for env in InvertedDoublePendulum-v4 LunarLanderContinuous-v3 Hopper-v4; do
        for noise in "" "--noise normal --noise-level "{0.05,0.1,0.2,0.5}; do
            run="python sppo_continuous.py --env-id $env --seed $seed $noise"
            run+=" --total-timesteps 200000 --eval-freq 20000 --runs-dir runs/noise"
            echo $run --policy gaussian --exp-name ppo
            echo $run --beta 0 --exp-name dppo
            echo $run --exp-name sppo
        done
    done
done
