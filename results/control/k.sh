#!/usr/bin/env bash
# Prints the suite's commands:
#     bash results/control/k.sh | python benchmarks/run.py --runs-dir runs/k-ends
for seed in {10000..10007}; do
    for env in InvertedDoublePendulum-v4 LunarLanderContinuous-v3 Hopper-v4; do
        for noise in "" "--noise normal"; do
            for k in 0.2 1 100; do
                run="python sppo_continuous.py --env-id $env --seed $seed $noise --beta 0"
                echo $run --alpha $k --total-timesteps 1000000 --exp-name k$k --runs-dir runs/k-ends
            done
        done
    done
done
