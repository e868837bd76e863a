#!/usr/bin/env bash
# Prints the suite's commands (of the small models, two seeds were run):
#     bash results/text/imdb.sh | python benchmarks/run.py --runs-dir runs/imdb
# They need folders with models and files with reviews, which are not published. At 497c801 the
# model that is only watched, reward2, was that of --eval-reward-model.
for seed in {10000..10002}; do
    run="python sppo_rlhf.py --task imdb --seed $seed --reward-model reward reward2"
    run+=" --reward-weights 1 0 --dataset imdb_train.jsonl.gz"
    run+=" --eval-dataset imdb_test.jsonl.gz --learning-rate 3e-5 --adam-eps 1e-8"
    run+=" --total-timesteps 2240 --eval-freq 448 --eval-episodes 256 --runs-dir runs/imdb"
    for noise in "" "--noise flip --noise-level 0.2"; do
        echo $run --policy-model policy $noise --beta 0 --exp-name ppo
        echo $run --policy-model policy $noise --beta 0.4 --exp-name sppo
    done
    echo $run --policy-model policy_small --beta 0 --exp-name ppo-small
    echo $run --policy-model policy_small --beta 0.4 --exp-name sppo-small
done
