#!/usr/bin/env bash
# Prints the suite's commands:
#     bash results/a2c/dose.sh | python benchmarks/run.py --runs-dir runs/sa2c-dose
for seed in {10000..10011}; do
    for env in Hopper-v4 HalfCheetah-v4 InvertedDoublePendulum-v4; do
        for noise in "" "--noise normal --noise-level 0.2" "--noise adv_flip --noise-level 0.2"; do
            for beta in 0 0.5 2 20; do
                run="python sa2c_continuous.py --env-id $env --seed $seed $noise"
                run+=" --alpha 0.5 --beta $beta --total-timesteps 300000 --eval-freq 30000"
                echo $run --exp-name sa2c-beta$beta --runs-dir runs/sa2c-dose
            done
        done
    done
done
