#!/usr/bin/env bash
# Prints pairs of commands, SPPO and PPO with the weight k, which give the same bytes (k = 0.9: up to rounding):
#     bash results/control/pairs.sh | python benchmarks/run.py --jobs 1 --runs-dir runs/identity
# The last two need runs/toy, which python toy.py makes.
while read -r script flag task noise alpha beta k steps; do
    run="python $script.py $flag $task --noise $noise --noise-level 0.2 --total-timesteps $steps"
    run+=" --eval-freq $((steps / 10)) --runs-dir runs/identity"
    echo "$run --alpha $alpha --beta $beta --exp-name sppo-k$k"
    echo "$run --alpha $k --beta 0 --exp-name ppo-k$k"
done <<'END'
sppo_continuous --env-id Hopper-v4 normal 8 8 16 200000
sppo_continuous --env-id Hopper-v4 normal 0.5 0.5 1 200000
sppo_continuous --env-id Hopper-v4 adv_flip 0.5 0.5 1 200000
sppo_continuous --env-id HalfCheetah-v4 normal 0.5 0.5 1 200000
sppo_continuous --env-id HalfCheetah-v4 adv_flip 8 8 16 200000
sppo_continuous --env-id LunarLanderContinuous-v3 normal 8 8 16 200000
sppo_continuous --env-id LunarLanderContinuous-v3 adv_flip 0.5 0.5 1 200000
sppo_atari --env-id Breakout flip 0.5 0.5 1 51200
sppo_continuous --env-id Hopper-v4 normal 0.5 20 20.5 200000
sppo_continuous --env-id LunarLanderContinuous-v3 adv_flip 0.5 20 20.5 200000
sppo_atari --env-id Breakout flip 0.5 1 1.5 20480
sppo_rlhf --task toy adv_flip 0.5 0.5 1 448
sppo_rlhf --task toy adv_flip 0.5 0.4 0.9 448
END
