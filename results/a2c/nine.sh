#!/usr/bin/env bash
# Prints the suite's commands, which were registered and have not run:
#     bash results/a2c/nine.sh | python benchmarks/run.py --runs-dir runs/a2c-nine
for seed in {30000..30007}; do
    for env in InvertedDoublePendulum-v4 LunarLanderContinuous-v3 Hopper-v4 Ant-v4 HumanoidStandup-v4 \
        Walker2d-v4 HalfCheetah-v4 "Swimmer-v4 --gamma 0.9999" BipedalWalker-v3; do
        for noise in "" "--noise normal"; do
            run="python sa2c_continuous.py --env-id $env --seed $seed $noise"
            run+=" --total-timesteps 1000000 --runs-dir runs/a2c-nine"
            echo $run --beta 0 --exp-name da2c
            echo $run --exp-name sa2c
        done
    done
done
