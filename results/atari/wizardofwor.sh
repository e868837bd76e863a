#!/usr/bin/env bash
# Prints the suite's commands:
#     bash results/atari/wizardofwor.sh | python benchmarks/run.py --runs-dir runs/authors
for seed in {10000..10004}; do
    for method in "ppo --beta 0" "sppo"; do
        read -r name flags <<<"$method"
        run="python sppo_atari.py --env-id WizardOfWor --seed $seed $flags --noise flip"
        run+=" --device auto --total-timesteps 1000000 --exp-name $name --runs-dir runs/authors"
        echo $run --eval-freq 100000
    done
done
