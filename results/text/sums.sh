#!/usr/bin/env bash
# Prints the suite's commands:
#     bash results/text/sums.sh | python benchmarks/run.py --runs-dir runs/rlhf-sums
for seed in {10000..10002}; do
    for noise in "" "--noise flip --noise-level 0.2"; do
        for method in "--beta 0" ""; do
            run="python sppo_rlhf.py --policy-model sums/policy --dataset sums/train.jsonl"
            run+=" --eval-dataset sums/test.jsonl --reward-model correct.py:correct"
            run+=" --prompt-length 6 --response-length 4 --learning-rate 1e-4"
            run+=" --total-timesteps 8960 --eval-episodes 512 --amp off"
            echo $run --seed $seed $method $noise --runs-dir runs/rlhf-sums
        done
    done
done
